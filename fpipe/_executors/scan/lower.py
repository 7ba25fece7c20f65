"""From a schedule to a machine: operations, and the table that says which runs when.

In: units, a schedule, and a call. Out: a `Machine` (see `machine.py`, where its table
is drawn). The passes:

    ticks.py     schedule              ->  ticks: when each action runs
    values.py    units, call           ->  bundles: what each action makes and reads
    buffers.py   bundles, ticks        ->  wires, pools and slots
    Operations   programs, buffers     ->  operations: each program with its sources
                                           and targets; equal ones are one
    _segment     operations, ticks     ->  columns, and the numbers in them

An operation is a unit's program with all taken out that only this unit has: layers,
slots and microbatches. What is taken out becomes numbers in the table. So equal units
give equal operations, and the program has one of them. For unit 1 of the machine that
`machine.py` draws (the first layer), kind `F`, `Operations.find` gives

    op          stage0-1 F, equal to that of unit 2
    number      1                   0 is the operation of unit 0
    arguments   {0: (0, 0, 0, 1),   for each microbatch: itself, its slot in forward 0,
                 1: (1, 1, 1, 1),   the slot of what it keeps for its backward, and the
                 2: (2, 0, 0, 1)}   slot for the loss, where 1 means that nobody reads
    arrivals    forward 0 on device 1
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from fpipe._core.caches import Recent
from fpipe._core.errors import at_line
from fpipe._core.pytrees import Shape
from fpipe._executors.request import CallKind, Inputs, Request
from fpipe._executors.scan.buffers import Buffers, Place, place_bundles
from fpipe._executors.scan.feeds import feed_steps, is_large
from fpipe._executors.scan.machine import (
    Add,
    BorrowedParameter,
    FedPiece,
    Feed,
    Held,
    InputGradient,
    InputPiece,
    InputRows,
    InputStack,
    Loan,
    LoanGradient,
    LocalPool,
    Machine,
    Maximise,
    Number,
    Op,
    Outbox,
    OutputBuffer,
    Parameter,
    Part,
    PhaseCode,
    Pool,
    PoolName,
    Put,
    RowGradient,
    Segment,
    Send,
    SetState,
    SetStatePart,
    Source,
    State,
    StateBlock,
    StateMaximum,
    StatePart,
    TableOp,
    TableWire,
    Target,
    WholeInput,
    Wire,
    WireName,
    Write,
)
from fpipe._executors.scan.packing import Entry, Packing
from fpipe._executors.scan.ticks import Phase, Ticks, ticks_of
from fpipe._executors.scan.units import Units
from fpipe._executors.scan.values import (
    EARLIER,
    ActivationValue,
    Bundle,
    CotangentValue,
    Group,
    Value,
    Work,
    find_work,
)
from fpipe._model.microbatch import Rows
from fpipe._model.model import LAYER_CALL
from fpipe._model.needs import ROW_INPUTS, Share
from fpipe._model.remat import Remat
from fpipe._model.scopes import LOSS_SCOPE, layer_in
from fpipe._model.stages import (
    AUX,
    FIRST,
    INDEX,
    LOSS,
    SIDE,
    TARGETS,
    WEIGHT,
    Leaf,
    Port,
    Stage,
    X,
    Y,
)
from fpipe._program.code import (
    Cotangent,
    Gradient,
    GradientSum,
    Input,
    Output,
    ProgramValue,
)
from fpipe._program.control_flow import asks_host
from fpipe._program.graph import called, inline
from fpipe._program.host_memory import kept_on_device
from fpipe._program.moved_rows import find_moved_rows
from fpipe._program.trace import FlatStage
from fpipe.schedules import Action, Kind, Schedule


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
    on_cpus: bool,
) -> tuple[Machine, tuple[Mapping[Port, Shape], ...]]:
    """Lower a call. Also what the last unit returns for a microbatch of each shape.

    Arguments:
        shared: whether a stage has axes of the mesh that are left to XLA.
        shards: over how many devices the rows of a microbatch are shared. Over several,
            sums over rows need recomputations inlined; see `row_sums`.
        kept: the traces of earlier calls.
        on_cpus: whether the mesh is of CPU devices.
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
    if opened and on_cpus:
        _refuse_moved_rows(work, shards)
    buffers = place_bundles(work, position)
    # Only the first unit reads `x` and only the last one the targets, and a side input
    # may have one reader too. All other devices would hold them for nothing. What goes
    # whole to every microbatch stays whole, and so does what several stages read.
    cut, readers = inputs.cut, _readers_of_side(work)
    spread = frozenset(
        InputStack(leaf, shape)
        for port in (X, SIDE, TARGETS)
        for leaf in inputs.cut_leaves(port)
        if port != SIDE or len(readers.get(leaf, ())) == 1
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
    # To make the segments fills `operations.loans`, `.outputs` and `.inputs`, which are
    # read below: an operation is made when the first action asks for it.
    operations = Operations(work, buffers, params, state, sliced, spread)
    segments = tuple(_segment(loop, operations) for loop in ticks)
    pools: dict[PoolName, Pool] = {}
    for name, count in buffers.counts.items():
        # What stays in its unit is always read; for the rest there is a slot of what
        # nobody reads.
        unread = isinstance(name, WireName | LocalPool)
        pools[name] = Pool(count + unread, tuple(buffers.kinds[name]))
    # With a phase for each direction every wire carries something in nearly every tick.
    # It then runs unasked, which lets XLA move it beside the other phase.
    always = all(len(loop.phases) > 1 for loop in ticks)
    # A wire without a pool is one by which nothing comes that anybody reads.
    wires = {
        name: Wire(tuple(sorted(pairs)), pools[name].avals, always)
        for name, pairs in buffers.pairs.items()
        if name in pools
    }
    machine = Machine(
        devices=schedule.devices,
        counts=tuple(map(len, cut.alike)),
        rows=tuple(cut.weights[own[0]] for own in cut.alike),
        segments=segments,
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
        warnings=tuple(work.programs.warnings),
    )
    last = len(units.stages) - 1
    return machine, tuple(work.programs.flat(last, own[0]).out for own in cut.alike)


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


def _refuse_moved_rows(work: Work, shards: int) -> None:
    """Refuse layers, or a loss, that move rows which devices share.

    XLA exchanges them by a `collective-permute`. On CPUs that waits for all devices of
    the mesh, those of other stages too, which do something else: the step would hang.
    """
    cut = work.programs.inputs.cut
    for group in work.groups:
        i = group.microbatches[0]
        if cut.weights[i] % shards:
            continue  # each device has all of them
        for u, unit in enumerate(work.units.stages):
            flat = work.programs.flat(u, i)
            graph = inline(flat.closed)
            rows_on = {
                v: axis
                for v, leaf, shape in zip(
                    graph.inputs, flat.inputs, flat.shapes, strict=True
                )
                if leaf not in flat.constant
                and (axis := _rows_of(work, u, leaf, shape, cut.weights[i])) is not None
            }
            moving = find_moved_rows(graph, rows_on)
            if moving is None:
                continue
            layer = layer_in(moving.scope)
            who = "the loss function"
            if layer is not None and layer != LOSS_SCOPE:
                who = f"layer {layer} {unit.model.layers[layer].name!r}"
            raise NotImplementedError(
                f"{who}: `{moving.name}`{at_line(moving.where)} moves rows of a "
                'microbatch, which devices share. With executor="scan" the devices of '
                "a CPU would wait for each other for ever. Take "
                'executor="placed", or `data_axes=()`, or move rows before the pipe'
            )


def _rows_of(
    work: Work, u: int, leaf: Leaf, shape: jax.ShapeDtypeStruct, rows: int
) -> int | None:
    """The axis on which rows of a microbatch lie in what enters a unit."""
    kind = leaf.port.kind
    if kind not in (*ROW_INPUTS, "skip"):
        return None
    if work.programs.routes.is_given(u, leaf.port):
        source = work.programs.inputs.cut.splits[kind].sources[leaf.number]
        return source.axis if isinstance(source, Rows) else None
    return 0 if shape.shape[:1] == (rows,) else None


def _asks_host(stage: Stage, flat: FlatStage) -> str:
    """Which part of a stage calls Python for a result; empty if none does."""
    bodies = called(flat.closed, LAYER_CALL)
    for k, body in zip(stage.span, bodies, strict=False):
        if asks_host(body.nodes):
            return f"layer {k} {stage.model.layers[k].name!r}"
    # What is behind the layers.
    return "the loss function" if asks_host(inline(flat.closed).nodes) else ""


# --- operations ---


@dataclasses.dataclass(frozen=True, slots=True)
class MicrobatchNumber:
    """The number of the microbatch, always argument 0."""


@dataclasses.dataclass(frozen=True, slots=True)
class PlaceNumber:
    """The place of the microbatch among those of its shape: outputs and inputs that are
    cut are found by it. Where the two are the same it is the number of the microbatch.
    """


@dataclasses.dataclass(frozen=True, slots=True)
class LayerNumber:
    """The number of a layer, which it folds into its key, or says where it is by."""

    layer: int


@dataclasses.dataclass(frozen=True, slots=True)
class SlotNumber:
    """The slot of a microbatch's bundle in a pool. A bundle that nobody reads there has
    the last slot.
    """

    pool: PoolName
    value: Value


Argument: TypeAlias = MicrobatchNumber | PlaceNumber | LayerNumber | SlotNumber


@dataclasses.dataclass(frozen=True)
class UnitOp:
    """An operation as one unit runs it.

    Attributes:
        number: of the operation among all. The table is filled by this number, for
            an operation takes long to hash, and there is an entry for every action.
        arguments: for each microbatch the numbers that go into the table.
        fed: what it reads that a feed brings.
        arrivals: where the bundles arrive that the unit sends in this action.
    """

    op: Op
    number: int
    arguments: Mapping[int, Sequence[int]]
    fed: tuple[InputStack, ...]
    arrivals: tuple[Place, ...]


class Operations:
    """The operations of a call, each made when a unit's action first asks for it.

    They are made once for each unit, group of microbatches and kind, not once for each
    action: with thousands of microbatches only the numbers in the table are many.

    Attributes:
        numbers: the operations by number.
        loans: the parameters that they borrow, each with its number.
        outputs: what they write for the user, with the shape of a microbatch's piece.
        places: of each microbatch, among those of its shape.
        inputs: the inputs whose gradient they add up over microbatches, with the shape
            of the whole.
        overwritten: the arrays of states that they make in backwards.
    """

    def __init__(
        self,
        work: Work,
        buffers: Buffers,
        params: Packing,
        state: Packing | None,
        sliced: frozenset[Leaf],
        spread: frozenset[InputStack],
    ) -> None:
        self.work = work
        self.buffers = buffers
        self.params = params
        self.state = state
        self.sliced = sliced
        self.spread = spread
        self.numbers: dict[Op, int] = {}
        self.loans: dict[Loan, int] = {}
        self.outputs: dict[OutputBuffer, jax.ShapeDtypeStruct] = {}
        self.inputs: dict[Leaf, jax.ShapeDtypeStruct] = {}
        self.overwritten: set[Entry] = set()
        self.alike = work.programs.inputs.cut.alike
        self.places = {i: n for own in self.alike for n, i in enumerate(own)}
        self._shapes = {i: shape for shape, own in enumerate(self.alike) for i in own}
        self._made: dict[tuple[int, int, Kind], UnitOp] = {}

    def find(self, u: int, i: int, kind: Kind) -> UnitOp | None:
        """The operation of a unit's action; `None` if it has nothing to do."""
        group = self.work.group_of[i]
        if kind not in group.units[u].programs:
            return None
        key = (u, group.microbatches[0], kind)
        if key not in self._made:
            self._made[key] = self._make(group, u, kind)
        # A program may have nothing to do: no code, and nothing that it passes on.
        found = self._made[key]
        return found if found.op.code is not None or found.op.targets else None

    def _make(self, group: Group, u: int, kind: Kind) -> UnitOp:
        """The operation of a unit's actions of one kind, for a group of microbatches.

        An equal operation may be there already, made for another unit: then this is the
        same operation with other numbers, and the program does not grow.
        """
        unit = group.units[u]
        program = unit.programs[kind]
        # What the operation has to be told, in the order of its columns. Units that
        # compute the same ask for the same in the same order, so their operations are
        # equal, and only the numbers differ.
        arguments: dict[Argument, int] = {MicrobatchNumber(): 0}
        taken = unit.taken[kind]
        sources = [self._source(group, u, kind, v, arguments) for v in taken]
        # Values have numbers: first what is taken, then what the code makes.
        number = {value: n for n, value in enumerate((*taken, *program.outs))}

        # An alias has no number of its own. It is handed on as the value that it is the
        # same as.
        def number_of(value: ProgramValue) -> int:
            return number[value if value in number else unit.resolve(kind, value)]

        def put(bundle: Bundle[Any], pool: PoolName) -> Put:
            slot = SlotNumber(pool, bundle.value)
            argument = arguments.setdefault(slot, len(arguments))
            values = tuple(map(number_of, bundle.arrays))
            return Put(pool, argument, bundle.avals, values)

        # What becomes of the values. First comes what the unit keeps for later actions.
        targets: list[Target] = []
        arrivals: list[Place] = []
        kept = group.kept[u].get(kind)
        if kept is not None:
            targets.append(put(kept, self.buffers.pool_of[group, kept.value, u]))
        # Then what it makes for other units goes to each place where one of them looks.
        for bundle in group.sent[u][kind]:
            for destination in self.buffers.destinations[group, bundle.value]:
                if isinstance(destination, Outbox):
                    values = tuple(map(number_of, bundle.arrays))
                    targets.append(Send(destination, bundle.avals, values))
                else:
                    targets.append(put(bundle, destination))
            arrivals += self.buffers.arrivals[group, bundle.value]
        # Last come outputs, sums of gradients and states.
        targets += self._results(group, u, kind, number_of, arguments)
        op = Op(
            kind,
            tuple(sources),
            # What goes to the host goes there behind the operation (`interpreter.py`).
            None if program.code is None else kept_on_device(program.code),
            tuple(number[unit.resolve(kind, value)] for value in program.ins),
            tuple(targets),
            unit.identity,
            self.work.programs.inputs.cut.weights[group.microbatches[0]],
            name=kind,
        )
        fed = tuple(source.stack for source in sources if isinstance(source, FedPiece))
        # An equal operation of another unit keeps its number.
        n = self.numbers.setdefault(op, len(self.numbers))
        # Each argument as a column of the table, with a number for every microbatch of
        # the group.
        columns: list[Sequence[int]] = []
        for argument in arguments:
            match argument:
                case MicrobatchNumber():
                    columns.append(group.microbatches)
                case PlaceNumber():
                    columns.append([self.places[i] for i in group.microbatches])
                case LayerNumber(layer):
                    columns.append([layer] * len(group.microbatches))
                case SlotNumber(pool, value):
                    place = Place(pool, self.work.units.device[u], value)
                    # Equal units put their bundle in the same places. Where only others
                    # have a reader (the loss reads what the last core makes, and
                    # nobody reads there what the first one makes) there is no slot.
                    slot_of = self.buffers.slot_of.get(place, {})
                    unread = self.buffers.counts[pool]
                    columns.append([slot_of.get(i, unread) for i in group.microbatches])
        numbers = zip(*columns, strict=True)
        by_microbatch = dict(zip(group.microbatches, numbers, strict=True))
        return UnitOp(op, n, by_microbatch, fed, tuple(arrivals))

    def _source(
        self,
        group: Group,
        u: int,
        kind: Kind,
        value: ProgramValue,
        arguments: dict[Argument, int],
    ) -> Source:
        """Where an operation takes a value from. It adds what it needs to know to its
        `arguments`.
        """
        unit = group.units[u]

        def held(bundle: Bundle[Any], array: ProgramValue) -> Held:
            pool = self.buffers.pool_of[group, bundle.value, u]
            slot = SlotNumber(pool, bundle.value)
            argument = arguments.setdefault(slot, len(arguments))
            return Held(pool, argument, bundle.avals, bundle.arrays.index(array))

        # What an earlier action of this unit has kept comes first: a state is there as
        # that action saw it, whatever has become of it since.
        for earlier in EARLIER[kind]:
            kept = group.kept[u].get(earlier)
            if earlier != kind and kept is not None and value in kept.arrays:
                return held(kept, value)
        # A cotangent comes from the backward of each unit that read the value. That of
        # the model's output comes from the user, who called the pull-back: it is an
        # input that is cut like others.
        if isinstance(value, Cotangent):
            port, k = value.leaf
            if port == Y and unit.stage.last:
                return self._piece(group, Leaf(Port("y"), k), arguments)
            readers = self.work.programs.readers(u, value.leaf, group.microbatches[0])
            reader, name = readers[value.number]
            bundle = group.bundles[CotangentValue(reader, port, u)]
            return held(bundle, Gradient(name))
        # What is left is an input of the unit. Another unit has made it:
        assert isinstance(value, Input), value
        port, k = leaf = value.leaf
        maker = self.work.programs.routes.source(u, port)
        if maker is not None:
            bundle = group.bundles[ActivationValue(maker.stage, maker.port)]
            return held(bundle, Output(Leaf(maker.port, k)))
        # It lies in a row, on this device or on one that lends it:
        if port.kind == "params":
            aval = self.params.shape((port.of, k))
            loan = self._loan(u, (port.of, k))
            if loan is None:
                return Parameter(self.params.where[port.of, k].row, aval)
            return BorrowedParameter(loan, aval)
        if port.kind == "state":
            assert self.state is not None
            row = self.state.where[port.of, k].row
            aval = self.state.shape((port.of, k))
            shape = unit.input_shapes[leaf].shape
            part = self._part(leaf, shape)
            if part is not None:
                return StatePart(row, aval, part, shape)
            return State(row, aval)
        # It is a number in the table:
        if port == INDEX:
            return Number(0)
        if port == FIRST or port.kind == "number":
            own = unit.stage
            key_number = own.model.key_number
            number = own.span.start if port == FIRST else key_number(port.of)
            layer = LayerNumber(number)
            return Number(arguments.setdefault(layer, len(arguments)))
        # Or the call gives it: whole, brought by a feed, or cut where it lies.
        if leaf in unit.flat.constant:
            return WholeInput(leaf)
        if leaf in self.sliced:
            cut = self.work.programs.inputs.cut
            source = cut.splits[port.kind].sources[k]
            assert isinstance(source, Rows)
            count = cut.rows[group.microbatches[0]]
            return InputRows(leaf, source.axis, cut.rows[0], count)
        stack = InputStack(leaf, self._shapes[group.microbatches[0]])
        if stack in self.spread:
            return FedPiece(stack, kind)
        return self._piece(group, leaf, arguments)

    def _piece(
        self, group: Group, leaf: Leaf, arguments: dict[Argument, int]
    ) -> InputPiece:
        """A piece of an input, cut where it lies."""
        stack = InputStack(leaf, self._shapes[group.microbatches[0]])
        return InputPiece(stack, self._place(group, arguments))

    def _place(self, group: Group, arguments: dict[Argument, int]) -> int:
        """The argument that tells the place of a microbatch among those of its
        shape.
        """
        if all(self.places[i] == i for i in group.microbatches):
            return arguments[MicrobatchNumber()]
        return arguments.setdefault(PlaceNumber(), len(arguments))

    def _part(self, leaf: Leaf, shape: tuple[int, ...]) -> Part | None:
        """Which part of an array of a state belongs to a microbatch, if it has one of
        its own.

        Arguments:
            shape: of what the layer gets.
        """
        inputs = self.work.programs.inputs
        match inputs.share(leaf):
            case Share.ROWS:
                # All before the last one have as many rows as the first.
                return Part(inputs.cut.rows[0] if inputs.cut.rows else 0, shape)
            case Share.READY:
                return Part(1, (1, *shape))
            case _:
                return None

    def _results(
        self,
        group: Group,
        u: int,
        kind: Kind,
        number_of: Callable[[ProgramValue], int],
        arguments: dict[Argument, int],
    ) -> Iterator[Target]:
        """What goes to the user, and what is summed.

        A gradient is either. That of an input that is cut belongs to one microbatch, so
        it is an output with a place for each. What all microbatches see whole, such as
        a parameter, has one gradient, the sum over them.
        """
        unit = group.units[u]
        flat = unit.flat

        def write(leaf: Leaf, aval: Any, value: ProgramValue, add: bool) -> Write:
            buffer = OutputBuffer(leaf, self._shapes[group.microbatches[0]])
            self.outputs.setdefault(buffer, aval)
            place = self._place(group, arguments)
            return Write(buffer, number_of(value), place, add)

        if kind == "F":
            for port, shape in flat.out.items():
                # Equal units share one trace, which knows the place of the first of
                # them alone: only the unit itself knows whether it is the last.
                returned = port in (LOSS, WEIGHT, AUX) or (
                    port == Y and unit.stage.last
                )
                for k, aval in enumerate(shape.leaves):
                    leaf = Leaf(port, k)
                    if returned:
                        yield write(leaf, aval, Output(leaf), False)
                    elif port.kind == "state" and leaf not in flat.constant:
                        assert self.state is not None
                        block = StateBlock(self.state.where[port.of, k].row)
                        value = number_of(Output(leaf))
                        part = self._part(leaf, aval.shape)
                        if part is not None:
                            whole = self.state.shape((port.of, k))
                            yield SetStatePart(block, value, whole, part)
                        else:
                            yield SetState(block, value)
        # `W` makes sums only: inputs have their gradients from `I`.
        if kind in "BI":
            for leaf in unit.joint.gradients:
                given = self.work.programs.routes.is_given(u, leaf.port)
                if given and leaf not in flat.constant:
                    # Several units may read the same input: each adds its own.
                    adds = leaf.port not in (X, TARGETS)
                    yield write(leaf, unit.input_shapes[leaf], Gradient(leaf), adds)
        for value in unit.programs[kind].outs:
            if isinstance(value, GradientSum):
                port, k = value.leaf
                if port.kind == "state":
                    assert self.state is not None
                    self.overwritten.add((port.of, k))
                    row = self.state.where[port.of, k].row
                    yield Maximise(StateMaximum(row), number_of(value))
                    continue
                if port.kind == "params":
                    # A borrower sums on its own device, and sends once at the end.
                    loan = self._loan(u, (port.of, k))
                    row = self.params.where[port.of, k].row
                    buffer = RowGradient(row) if loan is None else LoanGradient(loan)
                else:
                    inputs = self.work.programs.inputs
                    whole = inputs.array_shape(inputs.array(value.leaf))
                    self.inputs[value.leaf] = whole
                    buffer = InputGradient(value.leaf)
                yield Add(buffer, number_of(value))

    def _loan(self, u: int, entry: tuple[int, int]) -> int | None:
        """The loan by which a unit has a parameter; `None` if its device has it."""
        row, owner = self.params.where[entry]
        borrower = self.work.units.device[u]
        if owner == borrower:
            return None
        loan = Loan(row, owner, borrower, self.params.shape(entry))
        return self.loans.setdefault(loan, len(self.loans))


# --- the table ---


class _Entry(NamedTuple):
    """Numbers for a device in a tick: the arguments of an operation, or a slot."""

    tick: int
    device: int
    numbers: Sequence[int]


@dataclasses.dataclass
class _OpEntries:
    """The entries of an operation.

    Attributes:
        op: with no name yet.
        order: by which the operations of a phase are sorted: forwards first, and along
            the way of what they pass on to each other. An operation of several units
            has the place of its first one.
        stages: those that run it, for its name.
        runs: where and with which arguments it runs.
    """

    op: Op
    order: tuple[int, int]
    stages: set[int]
    runs: list[_Entry]


@dataclasses.dataclass
class _FeedEntries:
    """The entries of a feed.

    Attributes:
        reader: the device that reads.
        stacks: the inputs that it brings.
        read_in: for each tick in which something is read the place of the microbatch
            among those of its shape.
        moves: the ticks in which it moves, and what each device puts in then.
    """

    reader: int
    stacks: set[InputStack] = dataclasses.field(default_factory=set)
    read_in: dict[int, int] = dataclasses.field(default_factory=dict)
    moves: list[tuple[int, list[int]]] = dataclasses.field(default_factory=list)


class _PhaseEntries:
    """What is to be in the table for one phase of each tick.

    Columns can be given out only when all operations of the phase are known. So the
    actions are entered first (`enter`), then feeds get their steps (`move_feeds`), then
    columns are given out (`lay_out`), and at last the numbers are written (`fill`).

    Attributes:
        ops: by number.
        arrivals: for each wire the slots where bundles arrive.
        feeds: by the port that they bring, the stage and the kind of action that read
            it, and the shape of the microbatches.
    """

    def __init__(self, operations: Operations) -> None:
        self.operations = operations
        self.ops: dict[int, _OpEntries] = {}
        self.arrivals: dict[WireName, list[_Entry]] = defaultdict(list)
        self.feeds: dict[tuple[Port, int, int, Kind], _FeedEntries] = {}

    def enter(self, action: Action, tick: int, device: int) -> None:
        """Enter what a device does in a tick."""
        kind, s, i = action
        units = self.operations.work.units
        for u in units.of_stage[s]:
            found = self.operations.find(u, i, kind)
            if found is None:
                continue
            # On one device an embedding runs before the core that reads it, and its
            # backward after the core's.
            order = ("FRBIW".index(kind), -u if kind in "BIW" else u)
            own = self.ops.get(found.number)
            if own is None:
                own = self.ops[found.number] = _OpEntries(found.op, order, set(), [])
            own.order = min(own.order, order)
            own.stages.add(s)
            own.runs.append(_Entry(tick, device, found.arguments[i]))
            # What a feed must have brought by this tick. What it brings is read by one
            # stage alone.
            for stack in found.fed:
                name = (stack.leaf.port, s, stack.shape, kind)
                feed = self.feeds.setdefault(name, _FeedEntries(device))
                feed.stacks.add(stack)
                feed.read_in[tick] = self.operations.places[i]
            # The slot where a bundle arrives is told to the receiver, in the tick in
            # which it is sent.
            for place in found.arrivals:
                assert isinstance(place.pool, WireName)
                slot = self.operations.buffers.slot_of[place][i]
                entry = _Entry(tick, place.device, [slot])
                self.arrivals[place.pool].append(entry)

    def move_feeds(self, devices: int) -> int:
        """Find when feeds move: in each tick in which something is read, and in as many
        before the first of these as the farthest microbatch has to go.

        Returns:
            How many ticks that takes before tick 0. Such ticks have negative numbers.
        """
        lead = 0
        for (*_, shape, _), feed in self.feeds.items():
            count = len(self.operations.alike[shape])
            times = sorted(feed.read_in)
            order = [feed.read_in[t] for t in times]
            steps, early = feed_steps(order, count, devices, feed.reader)
            times = [*range(times[0] - early, times[0]), *times]
            feed.moves = list(zip(times, steps, strict=True))
            lead = max(lead, -times[0])
        return lead

    def lay_out(self) -> tuple[PhaseCode, int]:
        """Give out columns; also how many there are.

        In the order of the drawing in `machine.py`: for each operation whether it runs,
        then its arguments; for each wire and feed two.
        """
        column = itertools.count()
        ops = []
        # The program runs the operations in this order. The entries are sorted, and not
        # only what is made of them, so that `fill` meets them in the same order.
        self.ops = dict(sorted(self.ops.items(), key=lambda item: item[1].order))
        for own in self.ops.values():
            op = dataclasses.replace(own.op, name=_op_name(own))
            ops.append(TableOp(op, next(column), next(column)))
            # Every entry of an operation has as many numbers.
            for _ in own.runs[0].numbers[1:]:
                next(column)
        wires = [TableWire(wire, next(column), next(column)) for wire in self.arrivals]
        feeds = [
            Feed(
                kind, tuple(sorted(own.stacks)), own.reader, next(column), next(column)
            )
            for (*_, kind), own in self.feeds.items()
        ]
        return PhaseCode(tuple(ops), tuple(wires), tuple(feeds)), next(column)

    def fill(self, table: np.ndarray, code: PhaseCode, lead: int) -> None:
        """Write the entries.

        Arguments:
            table: that of this phase, `(devices, ticks, columns)`.
            code: what `lay_out` returned.
            lead: how many ticks the table has before the first one.
        """
        for own, (_, runs, first) in zip(self.ops.values(), code.ops, strict=True):
            for tick, device, numbers in own.runs:
                table[device, lead + tick, runs] = 1
                table[device, lead + tick, first : first + len(numbers)] = numbers
        for wire, slot, used in code.wires:
            # What comes where nothing was sent goes to the slot of what nobody reads.
            table[:, :, slot] = self.operations.buffers.counts[wire]
            for tick, device, (number,) in self.arrivals[wire]:
                table[device, lead + tick, slot] = number
                # A wire carries on all devices or on none: it is a collective. A device
                # to which nothing is sent gets something too, for the spare slot.
                table[:, lead + tick, used] = 1
        for feed, own in zip(code.feeds, self.feeds.values(), strict=True):
            for tick, numbers in own.moves:
                table[:, lead + tick, feed.piece] = numbers
                table[:, lead + tick, feed.moves] = 1


def _readers_of_side(work: Work) -> dict[Leaf, set[int]]:
    """The stages that read each array of the side inputs."""
    readers: dict[Leaf, set[int]] = {}
    for group in work.groups:
        for unit in group.units:
            for program in unit.programs.values():
                for value in program.ins:
                    if isinstance(value, Input) and value.leaf.port == SIDE:
                        stages = readers.setdefault(value.leaf, set())
                        stages.add(unit.stage.pipe_stage)
    return readers


def _segment(ticks: Ticks, operations: Operations) -> Segment:
    """One loop: what its phases do, and the table."""
    # First enter all actions; what a phase does is known only behind the last one.
    devices = len(ticks.rows[0][0])
    phases = [_PhaseEntries(operations) for _ in ticks.phases]
    for tick, row in enumerate(ticks.rows):
        for phase, actions in zip(phases, row, strict=True):
            for device, action in enumerate(actions):
                if action is not None:
                    phase.enter(action, tick, device)
    # All phases begin in the same tick, so the feed that needs most ticks before the
    # first action gives their number; in these nothing runs.
    lead = max(phase.move_feeds(devices) for phase in phases)
    # One array holds the numbers of all phases, as wide as the widest.
    codes = []
    width = 0
    for phase in phases:
        code, columns = phase.lay_out()
        codes.append(code)
        width = max(width, columns)
    shape = (devices, lead + len(ticks.rows), len(phases), width)
    table = np.zeros(shape, np.int32)
    for p, (phase, code) in enumerate(zip(phases, codes, strict=True)):
        phase.fill(table[:, :, p], code, lead)
    nothing: tuple[Phase, ...] = ((None,) * devices,) * len(phases)
    return Segment(tuple(codes), (nothing,) * lead + ticks.rows, table)


def _op_name(entries: _OpEntries) -> str:
    """What profiles call an operation: `stage2 F`, or, where it serves several stages,
    `stage0-3,5 F`.
    """
    runs: list[list[int]] = []
    for s in sorted(entries.stages):
        if runs and runs[-1][-1] == s - 1:
            runs[-1].append(s)
        else:
            runs.append([s])
    texts = [str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs]
    return f"stage{','.join(texts)} {entries.op.kind}"
