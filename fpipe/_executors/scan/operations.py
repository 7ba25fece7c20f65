"""The operations of a call: the programs of its units, without what only one unit has.

In: the programs of units, and where their values wait. Out: `Op`s, and for each unit
and microbatch the numbers that are left.

Layers, slots and microbatches are taken out, and become numbers in the table. So equal
units give equal operations, and the program has one of them. For unit 1 of the
machine that `machine.py` draws (the first layer), kind `F`, `Operations.find` gives

    op          stage0-1 F, equal to that of unit 2
    number      1                   0 is the operation of unit 0
    arguments   {0: (0, 0, 0, 1),   for each microbatch: itself, its slot in forward 0,
                 1: (1, 1, 1, 1),   the slot of what it keeps for its backward, and the
                 2: (2, 0, 0, 1)}   slot for the loss, where 1 means that nobody reads
    arrivals    forward 0 on device 1
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax

from fpipe._executors.scan.buffers import Buffers, Place
from fpipe._executors.scan.machine import (
    Add,
    BorrowedParameter,
    FedPiece,
    Held,
    InputGradient,
    InputPiece,
    InputRows,
    InputStack,
    Loan,
    LoanGradient,
    Maximise,
    Number,
    Op,
    Outbox,
    OutputBuffer,
    Parameter,
    Part,
    PoolName,
    Put,
    RowGradient,
    Send,
    SetState,
    SetStatePart,
    Source,
    State,
    StateBlock,
    StateMaximum,
    StatePart,
    Target,
    WholeInput,
    Write,
)
from fpipe._executors.scan.packing import Entry, Packing
from fpipe._executors.scan.values import (
    EARLIER,
    ActivationValue,
    Bundle,
    CotangentValue,
    Group,
    Value,
    Work,
)
from fpipe._model.microbatch import Rows
from fpipe._model.needs import Share
from fpipe._model.stages import (
    AUX,
    FIRST,
    INDEX,
    LOSS,
    TARGETS,
    WEIGHT,
    Leaf,
    Port,
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
from fpipe._program.host_memory import kept_on_device
from fpipe.schedules import Kind


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
    """The number of a layer, for its key, or for the place in an error."""

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
            # What goes to the host goes there after the operation (`interpreter.py`).
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
                    if kind != "F":
                        back = place._replace(returned=True)
                        slot_of = {**slot_of, **self.buffers.slot_of.get(back, {})}
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
