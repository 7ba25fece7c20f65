"""`PlanData` of the placed executor: read off a plan that is ready to run.

Of the plan of two stages in `instructions.py`, with parameters of 36 bytes, and inputs
and outputs of 96 bytes:

    work             (F, 0), (F, 1), (B, 1), (B, 0): the code of each, and its program

    device           parameters  inputs  boundaries  residuals  gradients  at
    0 (cpu:0)        36          96      192         0          36         B(0,0)
    1 (cpu:1)        36          0       192         96         36         B(1,0)

The second device has freed the targets by then. `gradients` at `B(0,0)` are the sums
that the backwards so far have made.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax

from fpipe._core.pytrees import aval, nbytes, pack
from fpipe._executors.call import Args
from fpipe._executors.placed.compile import compile_plan, traced_runs
from fpipe._executors.placed.dispatch import ReadyPlan
from fpipe._executors.placed.instructions import Copy, Move, Plan, Run
from fpipe._executors.placed.memory import (
    copied_bytes,
    most_on_host,
    on_one_device,
    peaks,
)
from fpipe._executors.placement import Placement
from fpipe._executors.plan_data import DeviceMemory, PlanData, Work, closed_over
from fpipe._executors.scheduling import Scheduling
from fpipe._model.microbatch import cut_inputs
from fpipe._model.needs import ROW_INPUTS
from fpipe._model.remat import Remat
from fpipe._model.stages import Leaf, Port
from fpipe._program.code import Code
from fpipe.schedules import Kind


def plan_data(
    bound: ReadyPlan,
    args: Args,
    scheduling: Scheduling,
    remat: Remat,
    compiled: bool,
) -> PlanData:
    """What a plan tells of its call.

    Arguments:
        bound: the plan.
        args: what the call is given, arrays or their shapes.
        scheduling: what makes the schedule for other numbers of microbatches.
        remat: which backwards recompute their forward.
        compiled: whether to compile the programs, for the memory that they need for
            themselves.
    """
    # As many chunks as there are microbatches cut a batch as it was cut.
    microbatches = bound.plan.schedule.microbatches
    runs = [item for item in bound.plan.instructions if isinstance(item, Run)]
    moves = [i for i in bound.plan.instructions if isinstance(i, Move | Copy)]
    keys = {traced.key for traced in traced_runs(bound.plan, bound.shapes)}
    return PlanData(
        executor="placed",
        launchers="per_device" if bound.threaded else "one",
        stages=bound.layout.stages,
        schedule=bound.plan.schedule,
        scheduling=scheduling,
        remat=remat,
        microbatch_rows=cut_inputs(args.inputs, microbatches).rows,
        work=_work(bound),
        fused=tuple(run.actions for run in runs if len(run.parts) > 1),
        programs=len(keys),
        launches=len(runs) + len(moves),
        devices=_memory(bound, args, compiled),
        copied=copied_bytes(bound.plan, bound.shapes),
        warnings=bound.plan.warnings,
    )


def _work(bound: ReadyPlan) -> dict[tuple[Kind, int], tuple[Work, ...]]:
    """The program of each kind of action on each stage, for its first microbatch."""
    found: dict[tuple[Kind, int], tuple[Work, ...]] = {}
    for traced in traced_runs(bound.plan, bound.shapes):
        run = bound.plan.instructions[traced.number]
        assert isinstance(run, Run)
        # What a part reads comes in, or another part makes it.
        held = dict(zip(run.ins, traced.key.shapes, strict=True))
        for slot, shape in run.inside.items():
            held[slot] = shape.update(sharding=bound.plan.sharding(slot))
        held |= zip(run.outs, traced.made, strict=True)
        for part in run.parts:
            action = part.action
            # The first microbatch stands for all: a prediction wants the usual piece of
            # a batch, and only the last one may be smaller.
            if (action.kind, action.stage) in found:
                continue
            shapes = tuple(held[slot] for slot in part.ins)
            work = Work(part.code, part.call, shapes, run.placement)
            found[action.kind, action.stage] = (work,)
    return found


def _memory(bound: ReadyPlan, args: Args, compiled: bool) -> tuple[DeviceMemory, ...]:
    """The fullest moment of each device."""
    plan, layout = bound.plan, bound.layout
    programs = compile_plan(plan, bound.shapes) if compiled else {}

    def temporary(number: int) -> int:
        # Not every backend of XLA has the analysis. What runs in another process is
        # compiled there.
        analysis = programs[number].memory_analysis() if number in programs else None
        return 0 if analysis is None else analysis.temp_size_in_bytes

    # What stays inside a program is part of what XLA says that it needs.
    inside = not compiled
    found = peaks(plan, bound.shapes, kept_slots(bound, args), temporary, inside)
    host = most_on_host(plan, bound.shapes)
    # A placement may be several devices of the schedule; it is named by the first.
    device_of: dict[Placement, int] = {}
    stage_to_device = plan.schedule.stage_to_device
    for place, device in zip(layout.placements, stage_to_device, strict=True):
        device_of[place] = min(device, device_of.get(place, device))
    # Parameters by their owner. The roles count borrowed copies too, but an optimizer
    # has state for the owner's array alone.
    owned_by: dict[Placement, int] = defaultdict(int)
    for feed in plan.feeds:
        if feed.leaf.port.kind == "params":
            own = on_one_device(bound.shapes[feed.slot], plan.sharding(feed.slot))
            owned_by[plan.slots[feed.slot].placement] += nbytes(own)
    rows = []
    for place, device in device_of.items():
        peak = found[place]
        # The plan counts an input where it is read. The caller may have it on other
        # devices too, where it takes memory all the same.
        roles = dict(peak.roles)
        # The plan does not see what the caller has beside it, such as targets that lie
        # on the first device while the last stage reads a copy.
        roles["inputs"] = roles.get("inputs", 0) + _unread(bound, args, place)
        constants = _constant_bytes(plan, place)
        if constants:
            roles["constants"] = constants
        rows.append(
            DeviceMemory(
                device=device,
                name=str(place),
                roles=roles,
                owned=owned_by[place],
                temporary=peak.temporary if compiled and place.is_here else None,
                moment=peak.doing,
                host=host.get(place, 0),
            )
        )
    return tuple(sorted(rows, key=lambda row: row.device))


def _constant_bytes(plan: Plan, place: Placement) -> int:
    """The bytes of the arrays that programs close over. Each program that is compiled
    for a device has them for itself.
    """
    codes: dict[tuple[int, int], Code] = {}
    for run in plan.instructions:
        if isinstance(run, Run) and run.placement == place:
            for n, part in enumerate(run.parts):
                codes[id(run.call), n] = part.code
    return sum(nbytes(a) for code in codes.values() for a in closed_over(code))


def kept_slots(bound: ReadyPlan, args: Args) -> set[int]:
    """The slots of what stays after its last use: parameters, constants, and inputs
    that the caller has where they are read.
    """
    plan, inputs = bound.plan, _inputs(args)
    kept = set(plan.constants)
    for feed in plan.feeds:
        arrays = inputs.get(feed.leaf.port)
        if arrays is None:
            kept.add(feed.slot)
            continue
        # A shape is taken to lie where it is read.
        array = arrays[feed.leaf.number]
        shape = isinstance(array, jax.ShapeDtypeStruct)
        if shape or plan.slots[feed.slot].placement.holds(array):
            kept.add(feed.slot)
    return kept


def _unread(bound: ReadyPlan, args: Args, place: Placement) -> int:
    """The bytes of inputs that the caller has on a device where nothing reads them."""
    plan = bound.plan
    read = {
        feed.leaf for feed in plan.feeds if plan.slots[feed.slot].placement == place
    }
    # An array may be given twice, and counts once.
    idle: dict[int, int] = {}
    counted = set[int]()
    for port, arrays in _inputs(args).items():
        for k, array in enumerate(arrays):
            if place.holds(array):
                own = on_one_device(aval(array), array.sharding)
                idle[id(array)] = nbytes(own)
                if Leaf(port, k) in read:
                    counted.add(id(array))
    return sum(size for key, size in idle.items() if key not in counted)


def _inputs(args: Args) -> Mapping[Port, list[Any]]:
    """The arrays of a call's inputs, parameters and states aside."""
    inputs = args.inputs
    return {Port(name): pack(inputs[name])[0] for name in ROW_INPUTS}
