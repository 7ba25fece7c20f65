"""A plan ready to run: what is put into its slots, and how its instructions are issued.

`bind` makes it, once for each plan; `ReadyPlan.run` runs it, once for each call. A run
only dispatches: JAX's runtime runs each program when its inputs are there, so the
devices work while the host is already issuing what comes next. Nothing is waited for,
except in a call that is recorded.

The slots of a plan of two stages, on two devices, with several microbatches:

    slot              before a call   what a call puts in
    0 params 0[0]     None            the caller's array, as it is
    1 params 1[0]     None            the caller's array, as it is
    2 x[0]            None            one transfer to cpu:0, with all that goes there
    3 targets[0]      None            one transfer to cpu:1
    4 number 0        uint32(0)       nothing: a constant, on cpu:0 since `bind`
    …                 None            nothing: an instruction fills it

Each run and each move is one step; the frees that follow it are part of the step.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
from jax.sharding import SingleDeviceSharding

from fpipe._core.errors import add_note
from fpipe._core.meshes import is_explicit
from fpipe._core.processes import (
    alive,
    connect,
    ghost,
    is_here,
    is_shared,
    meet,
)
from fpipe._core.pytrees import eval_shape, is_inexact, nbytes
from fpipe._core.settings import checked, debugging, unchecked
from fpipe._executors.placed.compile import Progress, compile_plan, slot_shapes
from fpipe._executors.placed.crossing import Crossing, Together, agree, links_of
from fpipe._executors.placed.instructions import (
    Copy,
    GradientTree,
    Half,
    Instruction,
    Move,
    Plan,
    Run,
    read_from_outside,
)
from fpipe._executors.placed.not_finite import Search
from fpipe._executors.placed.pace import Pace, clock
from fpipe._executors.placed.threads import Call, Crew, Share, Step, divide
from fpipe._executors.placed.watch import Probe, Watch, probes_of
from fpipe._executors.placement import Placement
from fpipe._executors.programs import Layout
from fpipe._executors.recording import Recorder, recorders_of
from fpipe._executors.request import Inputs
from fpipe._executors.tracers import refuse_shapes
from fpipe._model.stages import Leaf, Port
from fpipe.schedules._action import joined_names

# Who dispatches. One thread is enough where a dispatch returns at once. A thread for
# each device costs more on the host, and is needed where a dispatch may wait for the
# program: then the other devices would stand idle meanwhile. On CPU a program with a
# host callback runs inline on the thread that calls it. With stages that sleep 20 ms
# (4 stages, 8 microbatches, ideal 220 ms) one thread took 400 to 700 ms, a thread for
# each device 232 to 249 ms (measured on jax 0.10.2, CPU).
Dispatch: TypeAlias = Literal["auto", "one_thread", "thread_per_device"]
DISPATCH: tuple[Dispatch, ...] = get_args(Dispatch)

_KINDS = {
    "F": "forward",
    "O": "copy to the host",
    "L": "copy from the host",
    "R": "recomputation",
    "B": "backward",
    "I": "input gradient",
    "W": "weight gradient",
}


class InputTransfer(NamedTuple):
    """Inputs of a call that are put on one placement together, and their slots.

    Together, because a `device_put` of a list costs one dispatch.

    Attributes:
        targets: how each is to lie there.
        stacks: in how many pieces each is stacked before; 0: it is not.
        shardings: those with which each was last found to be there already.
    """

    placement: Placement
    leaves: tuple[Leaf, ...]
    slots: tuple[int, ...]
    targets: tuple[Any, ...]
    stacks: tuple[int, ...]
    shardings: list[Any]

    def bring(self, arrays: Sequence[Any]) -> list[Any]:
        """The arrays on the placement."""
        # Most of a decoding step's inputs are the caches that the last one left here.
        # To put 48 of them where they are takes 760 µs, to see that they are there 8 µs
        # (measured on jax 0.10.2, CPU).
        here = [self._given(n, array) for n, array in enumerate(arrays)]
        away = [n for n, array in enumerate(here) if not self._is_here(n, array)]
        if not away:
            return here
        targets = [self.targets[n] for n in away]
        given = [
            stacked(here[n], self.stacks[n]) if self.stacks[n] else here[n]
            for n in away
        ]
        taken = self.placement.take(given, targets)
        for n, array in zip(away, taken, strict=True):
            here[n] = array
        return here

    def _given(self, n: int, array: Any) -> Any:
        """The `n`-th array as this process has it.

        Raises:
            TypeError: it has a shape alone.
            ValueError: it has a part of it alone.
        """
        if isinstance(array, jax.ShapeDtypeStruct):
            refuse_shapes([array], f"{self.leaves[n]} is read on {self.placement}")
        if not isinstance(array, jax.Array) or array.is_fully_addressable:
            return array
        if array.sharding.device_set == self.targets[n].device_set:
            return array
        if array.is_fully_replicated and is_here(array.sharding):
            return array.addressable_data(0)
        raise ValueError(
            f"a Pipe was called with {self.leaves[n]} over devices of several "
            f"processes ({array.sharding}), but {self.placement} reads all of it; give "
            "the whole array in the process that reads it, and its shape "
            "(jax.ShapeDtypeStruct) in the others"
        )

    def _is_here(self, n: int, array: Any) -> bool:
        """Whether the `n`-th array is on the placement, and bound to it."""
        # One that is not committed may be on the device by chance, and would compile
        # the programs that read it once more.
        if not getattr(array, "committed", False) or self.stacks[n]:
            return False
        sharding = array.sharding
        # By identity first: to compare two of them by value takes 2 µs.
        if sharding is not self.shardings[n]:
            if sharding != self.targets[n]:
                return False
            self.shardings[n] = sharding
        return True


def stacked(array: Any, pieces: int) -> Any:
    """The pieces of an array on a first axis."""
    # An array over explicit axes is reshaped by no operation that does not say how it
    # is cut then.
    if is_explicit(array):
        array = jax.device_put(array, SingleDeviceSharding(jax.local_devices()[0]))
    return array.reshape(pieces, array.shape[0] // pieces, *array.shape[1:])


@dataclasses.dataclass(frozen=True, eq=False)
class ReadyPlan:
    """A plan ready to run.

    Attributes:
        threaded: whether each device has a dispatching thread.
        shardings: those with which the parameters were last found where they belong.
            Parameters fill the first slots.
        transfers: what else is put where.
        shapes: those of all inputs, by slot.
        residuals: the slots that the backward half reads and does not make.
        initial: what all slots hold before a call: constants, and `None`.
        ghosts: what a call returns and another process has, by slot.
        crossings: the moves between processes, by the number of their instruction.
        gradients: those of each argument that the call asks for.
    """

    plan: Plan
    layout: Layout
    pace: Pace
    shardings: list[Any]
    transfers: tuple[InputTransfer, ...]
    shapes: Mapping[int, jax.ShapeDtypeStruct]
    residuals: tuple[int, ...]
    initial: tuple[Any, ...]
    ghosts: Mapping[int, Any]
    crossings: Mapping[int, Crossing]
    gradients: tuple[GradientTree, ...]

    def are_placed(self, params: Sequence[Any]) -> bool:
        """Whether parameters are where they belong, as far as their shardings tell."""
        # The parameters of a training step have the very same objects as those of the
        # step before, so these are kept. Lists compare objects by identity first; to
        # compare two of these by value takes 0.6 µs (measured on jax 0.10.2, CPU).
        try:
            found = [array.sharding for array in params]
        except AttributeError:  # numpy arrays have none
            return False
        if found != self.shardings:
            return False
        self.shardings[:] = found
        return True

    def slots(
        self, params: Sequence[Any], others: Mapping[Port, Sequence[Any]]
    ) -> list[Any]:
        """Fresh slots with the inputs in them, each put where it is read."""
        slots = self.fresh_slots()
        # Parameters are where they belong (the executor has checked that), and there
        # are many of them: one slice, no `device_put`.
        slots[: len(params)] = params
        for transfer in self.transfers:
            given = [others[leaf.port][leaf.number] for leaf in transfer.leaves]
            for slot, array in zip(transfer.slots, transfer.bring(given), strict=True):
                slots[slot] = array
        return slots

    def fresh_slots(self) -> list[Any]:
        """What all slots hold before a call."""
        slots = list(self.initial)
        for slot, own in self.ghosts.items():
            slots[slot] = alive(own)
        return slots

    def compile(
        self, threads: int | None = None, progress: Progress | None = None
    ) -> int:
        """Compile everything that the plan runs; returns how many programs that is."""
        compiled = compile_plan(self.plan, self.shapes, threads, progress)
        return len({id(program) for program in compiled.values()})

    def run(self, slots: list[Any], half: Half = Half.WHOLE) -> list[Any]:
        """Issue the plan, or a half of it, on slots; returns the slots."""
        if self.layout.is_over_processes:
            self._joined  # noqa: B018 - once, before the first run
        recorders = recorders_of(self.layout)
        if recorders:
            self._record(slots, half, recorders)
        elif self.layout.is_over_processes and debugging():
            self._search(slots, half)
        elif self.pace.is_open and half is Half.WHOLE:
            shares = self.shares[half]
            self.pace.look(
                lambda watched: self.issue(with_calls(shares, watched), slots), clock
            )
        else:
            self.issue(self.shares[half], slots)
        return slots

    def _search(self, slots: list[Any], half: Half) -> None:
        """Run, and raise in all processes if a program of one made a NaN."""
        search = Search(self._described)
        with unchecked():
            self.issue(with_calls(self.shares[half], search.looked_at), slots)
        search.conclude()

    def _record(
        self, slots: list[Any], half: Half, recorders: Sequence[Recorder]
    ) -> None:
        """Run, watched, until everything has run."""
        # A clock that starts now would count compilation, and the work of earlier calls
        # that the inputs still wait for.
        probes = self.probes  # compiles everything, before the clock starts
        jax.block_until_ready([array for array in slots if array is not None])
        threaded = self.threaded
        with Watch(self.plan, probes, threaded) as watch:
            shares = with_calls(self._shares(threaded)[half], watch.watched)
            started = time.perf_counter()
            self.issue(shares, slots)
            watch.host = time.perf_counter() - started
        # A program that fails makes those fail that read its results. The first in the
        # order of the plan is the cause; in time, a later one may have been seen first.
        if watch.failures:
            failed, error = min(watch.failures, key=lambda failure: failure.number)
            doing = self._described(self.plan.instructions[failed])
            add_note(error, f"while running {doing}")
            try:
                raise error
            finally:
                del watch, error  # no cycle through the traceback
        call = watch.call(half)
        if self.layout.is_over_processes:
            call = call.merged(self._sizes)
        for recorder in recorders:
            recorder.add(call)

    def issue(self, shares: Sequence[Share], slots: list[Any]) -> None:
        """Issue some shares: all in this thread, or each in a thread of its own.

        An exception leaves with a note that says what was being dispatched.
        """
        # Names in profiles cost little. Where a release of JAX cannot tell whether a
        # profile is being taken, they are always given.
        profiled = getattr(jax.profiler.TraceAnnotation, "is_enabled", None)
        if profiled is None or profiled():
            shares = with_calls(shares, _annotated)
        # A single share needs no thread of its own.
        if len(shares) > 1:
            failure = Crew(shares).run(slots)
            if failure is None:
                return
            add_note(
                failure.error, f"while dispatching {self._described(failure.step.item)}"
            )
            try:
                raise failure.error
            finally:
                # No cycle through the traceback: what the run held is dropped now.
                del failure
        # One thread: there is one share at most. `step` is what the loop had reached
        # when it raised.
        with checked():
            for share in shares:
                step = share.steps[0]
                try:
                    for step in share.steps:
                        read, call, outs, frees = step.issue
                        slots[outs] = call(*read(slots))
                        for slot in frees:
                            slots[slot] = None
                except Exception as error:
                    add_note(error, f"while dispatching {self._described(step.item)}")
                    raise

    @property
    def threaded(self) -> bool:
        """Whether each device has a dispatching thread."""
        return self.pace.threaded

    @property
    def shares(self) -> Mapping[Half, tuple[Share, ...]]:
        """What each thread issues, for each half that a call may run."""
        return self._shares(self.threaded)

    def _shares(self, threaded: bool) -> Mapping[Half, tuple[Share, ...]]:
        return self._threads_shares if threaded else self._one_share

    @functools.cached_property
    def _threads_shares(self) -> Mapping[Half, tuple[Share, ...]]:
        return self._divided(threaded=True)

    @functools.cached_property
    def _one_share(self) -> Mapping[Half, tuple[Share, ...]]:
        return self._divided(threaded=False)

    def _divided(self, threaded: bool) -> Mapping[Half, tuple[Share, ...]]:
        # Threads call what is compiled here, in the thread of the caller: tracing
        # depends on its settings, such as `jax.enable_x64`, and they do not have them.
        # A single thread is the caller's, so it may call the `jit` functions, which
        # trace and compile what is still missing.
        # Over processes everything is compiled before the first transfer.
        ahead = threaded or self.layout.is_over_processes
        compiled = {**self._compiled, **self._together} if ahead else {}

        def shared(half: Half) -> tuple[Share, ...]:
            return divide(self.plan, half, threaded, compiled, self.crossings)

        # Only a differentiated call has a backward half.
        if self.plan.backward == len(self.plan.instructions):
            whole = shared(Half.WHOLE)
            return {Half.WHOLE: whole, Half.FORWARD: whole, Half.BACKWARD: ()}
        return {half: shared(half) for half in (Half.FORWARD, Half.BACKWARD)}

    @functools.cached_property
    def _joined(self) -> None:
        """What all processes do together before the first run: they compare the plan,
        each compiles its programs, and they try the ways that arrays will take.
        """
        agree(self.plan, self.layout, slot_shapes(self.plan, self.shapes))
        failed: Exception | None = None
        try:
            self._compiled  # noqa: B018 - kept
        except Exception as error:
            failed = error
        # The others would wait for a process that stops here.
        told = meet(
            [failed is not None], lambda: "all processes to compile their programs"
        )
        if failed is not None:
            raise failed
        others = [process for process, (bad,) in enumerate(told) if bad]
        if others:
            raise RuntimeError(
                f"process {others[0]} could not compile its programs of this call; its "
                "own error says why"
            )
        connect(links_of(self.plan))

    @functools.cached_property
    def _compiled(self) -> Mapping[int, Any]:
        """The compiled program of each run, by the number of its instruction."""
        return compile_plan(self.plan, self.shapes)

    @functools.cached_property
    def _together(self) -> Mapping[int, Together]:
        """The programs that this process runs together with others, by the number of
        their instruction.
        """
        if not self.layout.is_over_processes:
            return {}
        shapes = slot_shapes(self.plan, self.shapes)
        return {
            number: Together.of(
                self._compiled[number], item, self._described(item), shapes
            )
            for number, item in enumerate(self.plan.instructions)
            if isinstance(item, Run) and is_shared(item.placement.sharding)
        }

    @functools.cached_property
    def _sizes(self) -> Mapping[int, Sequence[int]]:
        """The bytes of each array of each transfer."""
        shapes = slot_shapes(self.plan, self.shapes)
        return {
            number: [nbytes(shapes[slot]) for slot in item.outs]
            for number, item in enumerate(self.plan.instructions)
            if isinstance(item, Move)
        }

    @functools.cached_property
    def probes(self) -> Mapping[int, Probe]:
        """How a recorded call learns the end of each instruction."""
        return probes_of(self.plan, self._compiled)

    def _described(self, item: Instruction) -> str:
        """An instruction in words, for notes on errors."""
        if not isinstance(item, Run | Copy):
            number = self.plan.instructions.index(item)
            found = self.crossings.get(number)
            return "a transfer" if found is None else found.what
        actions = item.actions if isinstance(item, Run) else (item.action,)
        if not actions:
            assert isinstance(item, Run)
            return f"{item.name!r} on {item.placement}"
        # By stage: the actions of one program are of one microbatch.
        of_stages: dict[int, list[str]] = {}
        for kind, stage, _ in actions:
            of_stages.setdefault(stage, []).append(_KINDS[kind])
        doing = " and ".join(
            f"the {' and '.join(kinds)} of stage {stage} "
            f"({self.layout.stages[stage].described})"
            for stage, kinds in of_stages.items()
        )
        microbatch = actions[0].microbatch
        return f"{doing}, microbatch {microbatch}, on {item.placement}"


def with_calls(
    shares: Sequence[Share], wrap: Callable[[Step], Call]
) -> tuple[Share, ...]:
    """The shares with what `wrap` makes of each step in place of its call."""
    return tuple(
        share._replace(steps=tuple(step.with_call(wrap(step)) for step in share.steps))
        for share in shares
    )


def _annotated(step: Step) -> Call:
    """The call of a step with a name in profiles, such as `stage2 F mb3`."""
    item, call = step.item, step.call
    if isinstance(item, Move):
        name = f"transfer to {item.placement}"
    elif isinstance(item, Copy):
        name = item.action.name
    else:
        name = joined_names(item.actions) or f"{item.name} on {item.placement}"

    def annotated(*arrays: Any) -> Sequence[Any]:
        with jax.profiler.TraceAnnotation(name):
            return call(*arrays)

    return annotated


def bind(
    plan: Plan,
    layout: Layout,
    inputs: Inputs,
    dispatch: Dispatch,
    constant: Callable[[Any, Placement], Any],
    gradients: tuple[GradientTree, ...],
) -> ReadyPlan:
    """Make a plan ready to run: everything that is the same in each of its calls is
    worked out here.

    Arguments:
        layout: the stages, for the names in errors.
        dispatch: who dispatches, as the user chose it.
        inputs: the shapes of the call's inputs.
        constant: `constant(value, placement)` is a value that stays where it is read.
        gradients: those of each argument that the call asks for.
    """
    # What is in the slots before a call, and the shape of everything that gets in.
    initial: list[Any] = [None] * len(plan.slots)
    shapes: dict[int, jax.ShapeDtypeStruct] = {}
    for slot, value in plan.constants.items():
        shapes[slot] = jax.ShapeDtypeStruct(value.shape, value.dtype)
        if plan.slots[slot].placement.is_here:
            initial[slot] = constant(value, plan.slots[slot].placement)

    # The inputs: parameters stay where they are, the rest is grouped by placement.
    shardings: list[Any] = []
    together: dict[Placement, list[tuple[Leaf, int]]] = {}
    for leaf, slot in plan.feeds:
        placement = plan.slots[slot].placement
        shapes[slot] = inputs.of(leaf.port).leaves[leaf.number]
        if slot in plan.stacks:
            shapes[slot] = eval_shape(
                functools.partial(stacked, pieces=plan.stacks[slot]), shapes[slot]
            )
        if leaf.port.kind == "params":
            assert slot == len(shardings), "parameters fill the first slots, in order"
            shardings.append(plan.sharding(slot))
        elif placement.is_here:
            together.setdefault(placement, []).append((leaf, slot))
    transfers = [
        InputTransfer(
            placement,
            leaves=tuple(leaf for leaf, _ in entries),
            slots=tuple(slot for _, slot in entries),
            targets=tuple(plan.sharding(slot) for _, slot in entries),
            stacks=tuple(plan.stacks.get(slot, 0) for _, slot in entries),
            shardings=[None] * len(entries),
        )
        for placement, entries in together.items()
    ]

    # The second half starts from the cotangents of `y`, and from what the first leaves.
    if plan.y is not None and plan.cotangents:
        carrying = [shape for shape in plan.y.shape.leaves if is_inexact(shape)]
        shapes.update(dict(zip(plan.cotangents, carrying, strict=True)))
    backward = plan.instructions[plan.backward :]
    residuals = read_from_outside(backward) - set(plan.constants) - set(plan.cotangents)

    # What other processes have, and what goes between.
    ghosts: dict[int, Any] = {}
    crossings: dict[int, Crossing] = {}
    if layout.is_over_processes:
        every = slot_shapes(plan, shapes)
        for slot in plan.returned:
            if not plan.slots[slot].placement.is_here:
                shape = every[slot]
                ghosts[slot] = ghost(shape.shape, shape.dtype, plan.sharding(slot))
        crossings = {
            number: Crossing.of(plan, item, every)
            for number, item in enumerate(plan.instructions)
            if isinstance(item, Move) and item.crosses
        }

    # On one device programs run one after the other whoever dispatches them, so threads
    # would only cost.
    runs = [
        item
        for item in plan.instructions
        if isinstance(item, Run) and item.placement.is_here
    ]
    several_devices = len({run.placement for run in runs}) > 1
    wanted = dispatch == "thread_per_device" or (
        dispatch == "auto" and any(run.calls_host for run in runs)
    )
    # While JAX looks for NaNs it waits for each result, and only the functions that a
    # single thread calls say which operation made one: threads call compiled programs.
    wanted = wanted and not debugging()
    # All processes would have to take the same choice at the same call.
    measured = dispatch == "auto" and several_devices and not debugging()
    measured = measured and not layout.is_over_processes and not wanted
    return ReadyPlan(
        plan=plan,
        layout=layout,
        pace=Pace(threaded=wanted and several_devices, is_open=measured),
        shardings=shardings,
        transfers=tuple(transfers),
        shapes=shapes,
        residuals=tuple(sorted(residuals)),
        initial=tuple(initial),
        ghosts=ghosts,
        crossings=crossings,
        gradients=gradients,
    )
