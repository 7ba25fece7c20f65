"""From a schedule to a plan, in three passes.

1. The actions, in one order for all devices, become *work*: programs that read and make
   values wherever these are (`work.py`). After them come programs that join outputs
   and reduce losses and gradients (`epilogue.py`).
2. What a program reads elsewhere is moved before it runs: straight from the placement
   that made it, once for each placement that reads it, all that a program needs from
   elsewhere together. Slots get numbers.
3. Every slot is freed after its last use.

For a forward of two stages with one microbatch:

    1. work                  2. moves                       3. frees
    stage0_F: x -> y0        cpu:0: F(0,0) (x) -> y0        cpu:0: F(0,0) (x) -> y0
                                                            free x
    stage1_F: y0 -> y1       cpu:0 -> cpu:1: y0             cpu:0 -> cpu:1: y0
                                                            free y0 (of cpu:0)
                             cpu:1: F(1,0) (y0) -> y1       cpu:1: F(1,0) (y0) -> y1
                                                            free y0 (of cpu:1)

Three passes and not one, because each needs the whole result of the one before: what a
program reads decides the moves, and a last use is known when all uses are.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
from jax.sharding import NamedSharding

from fpipe._core.caches import Recent
from fpipe._core.pytrees import is_inexact
from fpipe._executors.placed.epilogue import (
    SlotTree,
    deliver,
    finish_gradients,
    finish_states,
    join_outputs,
    reduce_loss,
)
from fpipe._executors.placed.fuse import fuse
from fpipe._executors.placed.instructions import (
    FIRST_HALF,
    CallValue,
    Copy,
    Feed,
    Move,
    OutputTree,
    Part,
    Plan,
    Run,
    SentPart,
    Slot,
    add_frees,
    read_from_outside,
)
from fpipe._executors.placed.shardings import Shardings
from fpipe._executors.placed.work import CallWork, CopyWork, Work
from fpipe._executors.placement import Placement
from fpipe._executors.programs import (
    Layout,
    ProgramForm,
    Programs,
    apart_pairs,
    direct_pairs,
    split_pairs,
)
from fpipe._executors.request import CallKind, Inputs, Request
from fpipe._executors.transfers import Sending
from fpipe._model.remat import Remat
from fpipe._model.stages import Leaf, Y
from fpipe._program.code import Cotangent
from fpipe.schedules import Action, Kind, Schedule
from fpipe.schedules._simulate import launch_order


def lower(
    layout: Layout,
    schedule: Schedule,
    remat: Remat,
    inputs: Inputs,
    request: Request,
    kept: Recent,
    params: Mapping[Leaf, NamedSharding],
) -> Plan:
    """Lower a call to a plan.

    A differentiated call (`PULL_BACK`) has one plan in two halves, because both halves
    are made from the same trace: what the second one needs decides which residuals the
    forwards return.

    Arguments:
        layout: the stages, and where each is.
        schedule: for the number of microbatches that were made.
        remat: which backwards recompute their forward.
        inputs: the shapes of the call's inputs, and how they are cut.
        request: what it asks for.
        kept: the programs of earlier calls.
        params: for each array of parameters on a mesh how the caller has it.
    """
    # Which programs there are. What a program computes depends on the order: a backward
    # right after its forward recomputes nothing.
    order = issue_order(schedule, request.kind)
    direct = direct_pairs(order, layout.placements)
    split = split_pairs(order)
    form = ProgramForm()
    if layout.has_meshes:
        form = ProgramForm(
            # Sums over shared rows need recomputations inlined; see `row_sums`.
            inline_remats=any(place.parts > 1 for place in layout.placements),
            axes={
                s: place.axes
                for s, place in enumerate(layout.placements)
                if place.axes is not None
            },
        )
    programs = Programs(
        layout.routes,
        form,
        direct,
        split,
        apart_pairs(order),
        remat,
        inputs,
        request,
        kept,
    )
    shardings = Shardings(layout, inputs, params)
    call = CallWork(layout, programs, shardings)

    # The first pass.
    y = loss = aux = weight = None
    told: list[Slot] = []
    cotangents: list[Slot] = []
    gradients: dict[Leaf, Slot] = {}
    if request.kind is CallKind.PULL_BACK:
        call.add(action for action in order if action.kind in FIRST_HALF)
        y = join_outputs(call)
        told += deliver(call, y)
        states = finish_states(call)
        # The second half is issued when the pull-back is called. It starts from what
        # the first half leaves, and from the cotangents.
        half = len(call.work)
        for k, shape in enumerate(y.shape.leaves):
            if is_inexact(shape):
                value = CallValue(Cotangent(Leaf(Y, k)))
                cotangents.append(Slot(value, layout.placements[-1], "inputs"))
        call.add(action for action in order if action.kind not in FIRST_HALF)
        gradients = finish_gradients(call, None)
    else:
        call.add(order)
        if request.loss is None:
            y = join_outputs(call)
        else:
            loss, weight, aux = reduce_loss(call, request.loss)
            told += deliver(call, loss, *(() if aux is None else (aux,)))
        states = finish_states(call)
        if request.kind.differentiates:
            gradients = finish_gradients(call, weight)
        half = len(call.work)

    # What is read of a half, or of all, when it is done.
    trees = [tree for tree in (y, loss, aux, *states.values()) if tree is not None]
    returned = [slot for tree in trees for slot in tree.slots]
    returned += [*told, *gradients.values()]
    left = {slot.value for slot in returned}
    later = {slot.value for item in call.work[half:] for slot in item.reads}
    work = fuse(call.work[:half], left | later, programs, shardings)
    work_after = fuse(call.work[half:], left, programs, shardings)

    # What is there before anything runs has the first numbers; parameters are the first
    # of these, so that a call can put them in with one slice.
    given = [*call.feeds, *call.constants, *cotangents]
    numbers = {slot: number for number, slot in enumerate(given)}
    # The second pass. Both halves share the numbers: what the first half moved to a
    # placement is not moved there again by the second.
    send = shardings.sent if layout.has_meshes else None
    first = add_moves(work, numbers, send)
    second = add_moves(work_after, numbers, send)
    for item in call.work:
        # What is copied may have come by a move.
        if isinstance(item, CopyWork) and item.placement.mesh is not None:
            shardings.add_copies(item.ins, item.outs)

    # The third pass. Two halves are two runs: what the second one reads outlives the
    # first, and nothing that is returned is ever freed.
    keep = {numbers[slot] for slot in returned}
    # A constant is the same array in the next call. A call begins with a copy of the
    # list of slots, so a `Free` would not harm the next one; it would only cost time.
    keep.update(numbers[slot] for slot in call.constants)
    forward = add_frees(first, keep | read_from_outside(second))
    backward = add_frees(second, keep)

    def numbered(tree: SlotTree) -> OutputTree:
        return OutputTree(tree.shape, tuple(numbers[slot] for slot in tree.slots))

    def as_told(tree: SlotTree) -> OutputTree:
        """What every process has a copy of: the one of this process."""
        if not layout.is_over_processes or layout.placements[-1].is_here:
            return numbered(tree)
        own = tuple(slot.on(layout.first) for slot in tree.slots)
        return numbered(tree._replace(slots=own))

    return Plan(
        schedule=schedule,
        order=tuple(order),
        instructions=(*forward, *backward),
        slots=tuple(numbers),
        shardings={
            number: shardings.known[slot]
            for slot, number in numbers.items()
            if slot in shardings.known
        },
        free=frozenset(numbers[slot] for slot in shardings.free),
        stacks={numbers[slot]: m for slot, m in shardings.stacks.items()},
        feeds=tuple(Feed(leaf, numbers[slot]) for slot, leaf in call.feeds.items()),
        constants={numbers[slot]: value for slot, value in call.constants.items()},
        backward=len(forward),
        cotangents=tuple(numbers[slot] for slot in cotangents),
        y=None if y is None else (as_told if told else numbered)(y),
        loss=None if loss is None else as_told(loss),
        aux=None if aux is None else as_told(aux),
        state={layer: numbered(tree) for layer, tree in states.items()},
        gradients={leaf: numbers[slot] for leaf, slot in gradients.items()},
        warnings=tuple(programs.warnings),
    )


def issue_order(schedule: Schedule, kind: CallKind) -> list[Action]:
    """One order for all devices: the clock order of the schedule, at a forward of 1 and
    a backward of 2.

    A thread that dispatches asynchronously must never enqueue one stage's whole work
    first: a device's queue is finite. The program number 32 in flight on one device
    blocks the thread that calls it (measured on jax 0.10.2, CPU), and all other devices
    stand idle. In clock order the queues fill evenly.

    The order of each device is the schedule's, whatever the costs of this simulation
    are; they decide only how the devices are interleaved. For 1F1B, two devices, two
    microbatches:

        device 0   F0 F1       B0       B1
        device 1      F0 B0    F1 B1
        order      F(0,0) F(0,1) F(1,0) B(1,0) B(0,0) F(1,1) B(1,1) B(0,1)
    """
    if kind is CallKind.GRADIENT:
        return launch_order(schedule)
    # Other calls run parts of the schedule. A pull-back runs each device's backwards
    # after all of its forwards, in the order that they have in the schedule.
    first: tuple[Kind, ...] = FIRST_HALF if kind is CallKind.PULL_BACK else ("F",)
    forwards = [[a for a in row if a.kind in first] for row in schedule.actions]
    backwards = [[a for a in row if a.kind not in first] for row in schedule.actions]
    if kind is not CallKind.PULL_BACK:
        backwards = [[] for _ in forwards]
    rows = [[*f, *b] for f, b in zip(forwards, backwards, strict=True)]
    order = launch_order(Schedule(rows, schedule.stage_to_device))
    # The last stage may start its backwards while earlier devices still run forwards.
    # The halves are issued apart, so the forwards are put first (a stable sort).
    return sorted(order, key=lambda action: action.kind not in first)


def add_moves(
    work: Sequence[Work | CopyWork],
    numbers: dict[Slot, int],
    send: Callable[[Slot, Placement], Sending] | None = None,
) -> list[Run | Move | Copy]:
    """The second pass: moves before the programs that need them, and slots as numbers.

    A move within a process is as late as it can be, right before the first program that
    needs it. So a copy takes memory on the reader's device only when it is about to be
    used. A move to another process is as early as it can be, right after the program
    that makes what is moved. Between CPUs a send takes a thread that also runs
    programs: if the next one has been issued first, it runs before the send.

    A value that is read on three placements has three slots and is moved twice, both
    times from the placement that made it.

    Arguments:
        numbers: those of the slots that there are so far; new ones are added. A slot
            that has a number has been filled.
        send: how an array comes to another placement, where some are meshes. What has
            to be cut for that is cut right after the program that makes it: later, the
            reader would wait for what its maker runs in between.
    """
    code = _Code()
    for item in work:
        placement = item.placement
        if isinstance(item, CopyWork):
            # Both ends are on one placement, so nothing has to come there.
            ins = tuple(numbers[slot] for slot in item.ins)
            outs = tuple(numbers.setdefault(slot, len(numbers)) for slot in item.outs)
            code.add(Copy(ins, outs, placement, item.action))
            continue
        # For each copy that is missing here, what it is a copy of. All of them go in
        # one `Move`: one call of `device_put` for a list costs less than one for each.
        reads = [slot.on(placement) for slot in item.ins]
        copies: dict[Slot, Slot] = {}
        for slot in (*item.ins, *item.brings):
            here = slot.on(placement)
            # Of the members of a fused program one may know a value where it was made,
            # and another one here, where the first one brings it.
            if here not in numbers and slot != here:
                copies.setdefault(here, slot)
        for group in _together(copies, placement):
            sendings: list[Sending] = []
            sources: list[int] = []
            for slot in group.values():
                if send is None:
                    sources.append(numbers[slot])
                    continue
                to = send(slot, placement)
                sendings.append(to)
                if not to.cuts:
                    sources.append(numbers[slot])
                    continue
                cut = _cut(slot, to, numbers)
                sources += cut.outs
                code.add_after(cut.ins, cut)
            for here in group:
                numbers[here] = len(numbers)
            move = Move(
                tuple(sources),
                tuple(numbers[here] for here in group),
                placement,
                tuple(sendings),
                crosses=_crosses(next(iter(group.values())).placement, placement),
            )
            if move.crosses:
                code.add_after([numbers[slot] for slot in group.values()], move)
            else:
                code.add(move)
        for slot in item.outs:
            numbers[slot] = len(numbers)
        parts = item.parts or ((item,) if item.action is not None else ())
        for part in parts:
            for slot in part.outs:
                numbers.setdefault(slot, len(numbers))
        call = item.call
        if call is not None:
            if not item.ins and placement.mesh is None:
                # `jit` runs where its arguments are, and here there are none (`zeros`).
                # Without this it would run on the default device.
                call = jax.jit(call, out_shardings=placement.sharding)
            run = Run(
                name=item.name,
                call=call,
                ins=tuple([numbers[here] for here in reads]),
                outs=tuple([numbers[slot] for slot in item.outs]),
                placement=placement,
                parts=tuple([_part(part, numbers) for part in parts]),
                calls_host=item.calls_host,
                donates=tuple(numbers[slot] for slot in item.donates),
            )
            code.add(run)
    return code.whole()


class _Code:
    """Instructions in the making. Some of them follow what was added long before."""

    def __init__(self) -> None:
        self.entries: list[Run | Move | Copy] = []
        # By slot, the number of the entry that makes it.
        self.made_by: dict[int, int] = {}
        # By the number of an entry, what comes right after it.
        self.following: dict[int, list[Run | Move]] = {}

    def add(self, entry: Run | Move | Copy) -> None:
        """Add an instruction at the end."""
        self.made_by.update(dict.fromkeys(entry.outs, len(self.entries)))
        self.entries.append(entry)

    def add_after(self, slots: Iterable[int], entry: Run | Move) -> None:
        """Add an instruction as soon as there is what is in some slots, or at the end,
        if that is there before anything runs.
        """
        makers = [self.made_by.get(slot, -1) for slot in slots]
        if -1 in makers:
            self.add(entry)
        else:
            self.following.setdefault(max(makers), []).append(entry)

    def whole(self) -> list[Run | Move | Copy]:
        """All instructions in their order."""
        if not self.following:
            return self.entries
        return [
            each
            for number, entry in enumerate(self.entries)
            for each in (entry, *self.following.get(number, ()))
        ]


def _part(item: Work, numbers: Mapping[Slot, int]) -> Part:
    """An action of a program, with numbers in place of slots."""
    assert item.action is not None
    assert item.code is not None
    assert item.call is not None
    return Part(
        item.action,
        item.code,
        item.call,
        tuple([numbers[slot.on(item.placement)] for slot in item.ins]),
        tuple([numbers[slot] for slot in item.outs]),
    )


def _crosses(source: Placement, target: Placement) -> bool:
    """Whether what goes from one placement to another leaves a process."""
    return len(source.processes | target.processes) > 1


def _together(copies: Mapping[Slot, Slot], target: Placement) -> list[dict[Slot, Slot]]:
    """The copies that one move makes: all within a process, and those from each
    placement of other processes. A transfer between processes goes one way.
    """
    groups: dict[Placement | None, dict[Slot, Slot]] = {}
    for here, slot in copies.items():
        crosses = _crosses(slot.placement, target)
        group = groups.setdefault(slot.placement if crosses else None, {})
        group[here] = slot
    return list(groups.values())


def _cut(slot: Slot, to: Sending, numbers: dict[Slot, int]) -> Run:
    """The program that cuts an array into what is sent; its results get numbers."""
    outs = []
    for n, _ in enumerate(to.cuts):
        part = Slot(SentPart(slot.value, to, n), slot.placement, slot.role)
        outs.append(numbers.setdefault(part, len(numbers)))
    return Run(
        name="cut for a transfer",
        call=jax.jit(to.cut, out_shardings=[to.made] * len(to.cuts)),
        ins=(numbers[slot],),
        outs=tuple(outs),
        placement=slot.placement,
    )
