"""From a schedule to a machine: operations, and the table that says which runs when.

In: units, a schedule, and a call. Out: a `Machine` (see `machine.py`, where its table
is drawn). The passes:

    ticks.py        schedule            ->  ticks: when each action runs
    values.py       units, call         ->  bundles: what each action makes and reads
    buffers.py      bundles, ticks      ->  wires, pools and slots
    operations.py   programs, buffers   ->  operations: each program with its sources
                                            and targets; equal ones are one
    table.py        operations, ticks   ->  columns, and the numbers in them
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from fpipe._core.caches import Recent
from fpipe._core.pytrees import Shape
from fpipe._executors.request import CallKind, Inputs, Request
from fpipe._executors.scan.buffers import Absence, Trip, absences, place_bundles
from fpipe._executors.scan.feeds import is_large
from fpipe._executors.scan.machine import (
    InputStack,
    LocalPool,
    Machine,
    Pool,
    PoolName,
    Wire,
    WireName,
)
from fpipe._executors.scan.operations import Operations
from fpipe._executors.scan.packing import Packing
from fpipe._executors.scan.table import make_segment
from fpipe._executors.scan.ticks import ticks_of
from fpipe._executors.scan.units import Units
from fpipe._executors.scan.values import Work, find_work
from fpipe._model.microbatch import Rows
from fpipe._model.model import LAYER_CALL
from fpipe._model.needs import ROW_INPUTS
from fpipe._model.remat import Remat
from fpipe._model.stages import ROW_NEEDS, TARGETS, Leaf, Port, Stage, X
from fpipe._program.code import Input
from fpipe._program.control_flow import asks_host
from fpipe._program.graph import called, inline
from fpipe._program.trace import FlatStage
from fpipe.schedules import Action, Schedule


def lower(
    units: Units,
    schedule: Schedule,
    remat: Remat,
    inputs: Inputs,
    request: Request,
    params: Packing,
    state: Packing | None,
    shards: int,
    kept: Recent,
    shared: bool,
) -> tuple[Machine, tuple[Mapping[Port, Shape], ...]]:
    """Lower a call. Also what the last unit returns for a microbatch of each shape.

    Arguments:
        shared: whether a stage has axes of the mesh that are left to XLA.
        shards: over how many devices the rows of a microbatch are shared. Over several,
            sums over rows need recomputations inlined; see `row_sums`.
        kept: the traces of earlier calls.
    """
    opened = shards > 1
    # When each action runs. Whether backwards recompute is asked for a typical
    # microbatch, the first of two: it only decides which form of ticks is cheaper.
    ticks = ticks_of(
        schedule,
        forwards_alone=request.kind is not CallKind.GRADIENT,
        backwards=request.differentiates,
        recomputes=remat.recomputes(0, 2, direct=False),
    )
    # Counted through both loops of a call that is differentiated from outside: what a
    # forward in the first one keeps waits for a backward in the second.
    position: dict[Action, int] = {}
    for loop in ticks:
        position |= loop.positions(1 + max(position.values(), default=-1))
    # What units make and read, and where that waits.
    work = find_work(units, schedule, position, remat, inputs, request, opened, kept)
    if shared:
        _refuse_callbacks(work)
    buffers = place_bundles(work, position, absences(schedule, position))
    # Only the first unit reads `x` and only the last one the targets, and a side input
    # may have one reader too. All other devices would hold them for nothing. What goes
    # whole to every microbatch stays whole, and so does what several stages read.
    cut, readers = inputs.cut, _readers_of_needs(work)
    spread = frozenset(
        InputStack(leaf, shape)
        for port in (X, *ROW_NEEDS, TARGETS)
        for leaf in inputs.cut_leaves(port)
        if port not in ROW_NEEDS or len(readers.get(leaf, ())) == 1
        for shape, own in enumerate(cut.alike)
        # One microbatch alone is on each device in either way.
        if len(own) > 1 and is_large(inputs.stack(leaf, shape), schedule.devices)
    )
    # Without a data axis a slice of the whole is a piece already, and no copy of the
    # batch lies beside it.
    stacked = {stack.leaf for stack in spread}
    sliced = frozenset(
        leaf
        for port in map(Port, ROW_INPUTS)
        for leaf in inputs.cut_leaves(port)
        if not opened
        and leaf not in stacked
        and isinstance(cut.splits[port.kind].sources[leaf.number], Rows)
    )
    # Making the segments fills `operations.loans`, `.outputs` and `.inputs`, which are
    # read below: an operation is made when the first action asks for it.
    operations = Operations(work, buffers, params, state, sliced, spread)
    first, segments = 0, []
    for loop in ticks:
        segments.append(make_segment(loop, operations, first))
        first += len(loop.rows) * len(loop.phases)
    pools: dict[PoolName, Pool] = {}
    for name, count in buffers.counts.items():
        # What stays in its unit is always read; for the rest there is a slot of what
        # nobody reads.
        unread = isinstance(name, WireName | LocalPool)
        on_host = buffers.host_counts.get(name, 0)
        pools[name] = Pool(count + unread, tuple(buffers.kinds[name]), on_host)
    # With a phase for each direction every wire carries something in nearly every tick.
    # It then runs unasked, which lets XLA move it beside the other phase.
    always = all(len(loop.phases) > 1 for loop in ticks)
    # A wire has no pool if nobody reads what comes by it.
    wires = {
        name: Wire(tuple(sorted(pairs)), pools[name].avals, always)
        for name, pairs in buffers.pairs.items()
        if name in pools
    }
    machine = Machine(
        devices=schedule.devices,
        counts=tuple(map(len, cut.alike)),
        rows=tuple(cut.weights[own[0]] for own in cut.alike),
        segments=tuple(segments),
        pools=pools,
        wires=wires,
        params=params,
        state=state,
        loans=tuple(operations.loans),
        outputs=operations.outputs,
        inputs=operations.inputs,
        sliced=sliced,
        spread=spread,
        overwritten=frozenset(operations.overwritten),
        copied=_copied_pools(buffers.trips),
        warnings=tuple(work.programs.warnings),
    )
    last = len(units.stages) - 1
    return machine, tuple(work.programs.flat(last, own[0]).out for own in cut.alike)


def _copied_pools(trips: Sequence[Trip]) -> dict[int, list[PoolName]]:
    """For each stage that copies to the host, the pools whose slots it copies for the
    first microbatch. `copied_bytes` counts one copy by these.
    """
    firsts: dict[int, Absence] = {}
    pools: dict[int, list[PoolName]] = defaultdict(list)
    for trip in trips:
        if firsts.setdefault(trip.stage, trip.absence) == trip.absence:
            pools[trip.stage].append(trip.pool)
    return dict(pools)


def _refuse_callbacks(work: Work) -> None:
    """Refuse layers, or a loss, that wait for what Python returns.

    JAX does so when it compiles, without the name of a layer. It has no rule for which
    of the devices that share a stage would call.
    """
    for group in work.groups:
        for unit in group.units:
            who = _asks_host(unit.stage, unit.flat)
            if who:
                raise NotImplementedError(
                    f"{who} has a `jax.pure_callback` (or `io_callback`): with "
                    'executor="scan" JAX refuses callbacks that return something if '
                    'the mesh has other axes than "stage". Use a mesh with that axis '
                    'alone, or executor="placed". `jax.debug.print` and '
                    "`jax.debug.callback` return nothing, so they work"
                )


def _asks_host(stage: Stage, flat: FlatStage) -> str:
    """Which part of a stage calls Python for a result; empty if none does."""
    bodies = called(flat.closed, LAYER_CALL)
    for k, body in zip(stage.span, bodies, strict=False):
        if asks_host(body.nodes):
            return f"layer {k} {stage.model.layers[k].name!r}"
    # What is after the layers.
    return "the loss function" if asks_host(inline(flat.closed).nodes) else ""


def _readers_of_needs(work: Work) -> dict[Leaf, set[int]]:
    """The stages that read each array of the needs that are cut into microbatches."""
    readers: dict[Leaf, set[int]] = {}
    for group in work.groups:
        for unit in group.units:
            for program in unit.programs.values():
                for value in program.ins:
                    if isinstance(value, Input) and value.leaf.port in ROW_NEEDS:
                        stages = readers.setdefault(value.leaf, set())
                        stages.add(unit.stage.pipe_stage)
    return readers
