"""The machine: what a step is lowered to, as data.

`lower.py` makes a `Machine` of a schedule and the programs of the stages;
`interpreter.py` turns it into one XLA program.

Every device runs the same program, a loop over ticks. So everything that differs
between devices and between ticks is in a *table* of numbers: for each device, tick and
phase it tells which *operations* run, and with which *arguments* (the microbatch, or
the slot of a pool). Stages that compute the same, from and to the same kind of place,
share one operation. Two equal layers on two devices, three microbatches under `"1f1b"`:
these are the rows of device 0, without the operations that it never runs.

    tick  action  stage0 F  stage0-1 F  stage0-1 B  forward 0  backward 0
    0     F mb0   1 0 0     1 0 0 0 1   . . . . .   2 1        1 0
    1     F mb1   1 1 1     1 1 1 1 1   . . . . .   2 1        1 0
    2             . . .     . . . . .   . . . . .   2 0        0 1
    3     B mb0   . . .     . . . . .   1 0 0 0 0   2 0        1 0
    4     F mb2   1 2 0     1 2 0 0 1   . . . . .   2 1        0 1
    5     B mb1   . . .     . . . . .   1 1 1 0 1   2 0        1 0
    6             . . .     . . . . .   . . . . .   2 0        0 1
    7     B mb2   . . .     . . . . .   1 2 0 0 0   2 0        1 0

The first number of an operation is 1 where it runs, the second is the microbatch, and
the others are slots: `stage0 F` puts the microbatch's input into a slot of the pool
`WireName("forward", 0)`. `stage0-1 F` takes it from there, keeps its output for the
backward, sends it, and puts it where the loss finds it on the last device. On device 0
nobody reads that, so it goes to slot 1 of `LocalPool("forward")`. Of a wire the first
number is the slot where its bundle arrives on this device, the second is 1 where any
device sends something. No device sends anything to device 0 by `forward 0`, and a
`ppermute` then delivers zeros: these go to slot 2, which nobody reads.

The words of this room, each for one thing:

- *unit*: a stage, or a piece of one: the end of the first or last stage, or the core
  that is the same on all stages (`units.py`).
- *bundle*: the arrays of one value that travel and wait together: a boundary, a skip, a
  cotangent, or what a forward keeps for its backward (`values.py`).
- *pool*: numbered slots for bundles, as many on every device (`buffers.py`). A bundle
  has its slot from its arrival to its last use. `WireName("forward", 0)` on device 0,
  in the table above:

      tick      0    1    2    3    4    5    6    7
      slot 0    mb0  mb0  mb0  mb0  mb2  mb2  mb2  mb2
      slot 1         mb1  mb1  mb1  mb1  mb1

- *wire*: one `ppermute`, which runs at the end of a phase. It takes one bundle from
  each sender's *outbox* to a slot of the wire's pool on the receiver. Activations and
  cotangents have wires of their own; a ring of neighbours is one wire:

      device 0 --forward 0---> device 1 --forward 0---> device 2
      device 0 <--backward 0-- device 1 <--backward 0-- device 2
      device 0 ----------------forward 1--------------> device 2      a skip

- *shape*: microbatches may have several shapes, which are numbered: the last one of a
  batch may be smaller, and ready-made ones may differ. Each shape has operations of its
  own, and a stack of each input and output. A slot or an outbox has room for the
  largest.
- *feed*: brings a large input to the device that reads it, one microbatch at a time.
  Each device holds its share of the microbatches (`feeds.py`).
- *loan*: a parameter that another device's stage uses too. It is sent once, before the
  first tick, and its gradient goes back once, after the last.
- *row*: an array with an axis of devices, which holds one parameter (or state) of each
  (`packing.py`).

Names are frozen dataclasses, not named tuples: two of different types are never equal,
whatever they hold, and all of them are keys of one dictionary in the interpreter.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import numpy as np

from fpipe._executors.scan.packing import Entry, Packing
from fpipe._executors.scan.ticks import Phase
from fpipe._executors.scan.units import Role
from fpipe._model.stages import Leaf
from fpipe._program.code import Code
from fpipe.schedules import Kind

Avals: TypeAlias = tuple[jax.ShapeDtypeStruct, ...]

# Activations go with the layers, cotangents against them.
Direction: TypeAlias = Literal["forward", "backward"]


# --- buffers: what a device holds from tick to tick ---


@dataclasses.dataclass(frozen=True, slots=True)
class WireName:
    """A wire, and the pool in which what arrives by it waits."""

    direction: Direction
    color: int


@dataclasses.dataclass(frozen=True, slots=True)
class LocalPool:
    """The pool of what one unit sends to another on its own device."""

    direction: Direction


@dataclasses.dataclass(frozen=True, slots=True)
class SavedPool:
    """The pool of what forwards keep for their backwards.

    A backward that recomputes needs little or nothing of its forward, one that does not
    needs its residuals. Ends and cores keep different things too. With a pool for each
    all bundles of a pool are usually of one kind, and no slot is padded.
    """

    role: Role
    recomputes: bool


@dataclasses.dataclass(frozen=True, slots=True)
class RecomputedPool:
    """The pool of what each `R` makes again for its backward."""

    role: Role


@dataclasses.dataclass(frozen=True, slots=True)
class HandedPool:
    """The pool of what each `I` hands to its `W`."""

    role: Role
    recomputes: bool


PoolName: TypeAlias = WireName | LocalPool | SavedPool | RecomputedPool | HandedPool


@dataclasses.dataclass(frozen=True, slots=True)
class Outbox:
    """What a device sends by a wire at the end of a phase.

    It has the arrays of one bundle: at most one is sent by a wire in a phase.
    """

    wire: WireName


@dataclasses.dataclass(frozen=True, slots=True)
class OutputBuffer:
    """An output of the call: a place for each microbatch of one shape.

    Attributes:
        shape: the number of that shape.
    """

    leaf: Leaf
    shape: int


@dataclasses.dataclass(frozen=True, slots=True)
class StateBlock:
    """A device's block of a row of states."""

    row: int


@dataclasses.dataclass(frozen=True, slots=True)
class StateMaximum:
    """What backwards make of a device's block of a row of states: the maximum so
    far.
    """

    row: int


@dataclasses.dataclass(frozen=True, slots=True)
class RowGradient:
    """The sum of the gradients of a device's block of a row of parameters."""

    row: int


@dataclasses.dataclass(frozen=True, slots=True)
class LoanGradient:
    """The sum of the borrower's gradients of a loan."""

    loan: int


@dataclasses.dataclass(frozen=True, slots=True)
class InputGradient:
    """The sum of the gradients of an input that goes whole to every microbatch."""

    leaf: Leaf


SummedGradient: TypeAlias = RowGradient | LoanGradient | InputGradient


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class InputStack:
    """The pieces of an input that is cut, of all microbatches of one shape, on a first
    axis.

    Attributes:
        shape: the number of that shape.
    """

    leaf: Leaf
    shape: int


# --- sources: where an operation takes a value from ---
#
# A source names no unit and no layer, so that equal units have equal sources: what
# differs between them is in the table. `argument` is the number of one of the
# operation's arguments there; argument 0 is the microbatch.


@dataclasses.dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter, from a row: each device reads its own block of it."""

    row: int
    aval: jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, slots=True)
class BorrowedParameter:
    """A parameter that another device lends."""

    loan: int
    aval: jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """A layer's state, from a row, as the last forward on that device left it."""

    row: int
    aval: jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """The part of an array that belongs to a microbatch.

    Attributes:
        stride: how many entries of the first axis each microbatch before it has.
        sizes: of the part, on each axis. On all but the first it begins where the array
            does.
    """

    stride: int
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class StatePart:
    """The microbatch's own part of a layer's state, from a row: rows of a state that is
    cut, or its piece of a stack.

    Attributes:
        aval: of the whole state, or of the stack.
        part: where it is.
        shape: of what the layer gets.
    """

    row: int
    aval: jax.ShapeDtypeStruct
    part: Part
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class WholeInput:
    """An input that goes whole to every microbatch."""

    leaf: Leaf


@dataclasses.dataclass(frozen=True, slots=True)
class InputRows:
    """The microbatch's rows of an input that every device has.

    Attributes:
        axis: of the rows.
        stride: how many rows each microbatch before it has.
        count: how many it has itself.
    """

    leaf: Leaf
    axis: int
    stride: int
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class InputPiece:
    """The microbatch's piece of an input that was cut before the loop, and that every
    device has. The argument is its place among those of its shape.
    """

    stack: InputStack
    argument: int


@dataclasses.dataclass(frozen=True, slots=True)
class FedPiece:
    """The microbatch's piece of an input that a feed brings to actions of one kind."""

    stack: InputStack
    kind: Kind


@dataclasses.dataclass(frozen=True, slots=True)
class Number:
    """An argument itself: the number of the microbatch or of a layer.

    Layers fold both into their keys. As a constant in the code the number of a layer
    would make an operation of each of several equal layers.
    """

    argument: int


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """The `k`-th array of the bundle in a slot of a pool.

    `avals` tells which kind of bundle is there: a pool may hold several, and each lies
    in a slot in its own way (`storage.py`).
    """

    pool: PoolName
    argument: int
    avals: Avals
    k: int


Source: TypeAlias = (
    Parameter
    | BorrowedParameter
    | State
    | StatePart
    | WholeInput
    | InputRows
    | InputPiece
    | FedPiece
    | Number
    | Held
)


# --- targets: what becomes of an operation's values, and the buffer that it changes ---
#
# A value is a number: first come the operation's sources, then what its code returns.
# Sources count too, for an operation may pass on what it was given (a skip that a unit
# also reads, or the input that the first end hands to the first core).


@dataclasses.dataclass(frozen=True, slots=True)
class Put:
    """A bundle goes into a slot of a pool."""

    buffer: PoolName
    argument: int
    avals: Avals
    values: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Send:
    """A bundle goes into an outbox, and from there to another device when the phase
    ends.
    """

    buffer: Outbox
    avals: Avals
    values: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Add:
    """A value is added to a gradient."""

    buffer: SummedGradient
    value: int


@dataclasses.dataclass(frozen=True, slots=True)
class Write:
    """A value goes into the microbatch's place of an output, which the argument tells,
    or is added to what is there (`add`): several units may each have a gradient for the
    same side input.
    """

    buffer: OutputBuffer
    value: int
    argument: int
    add: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class SetState:
    """A value becomes a layer's state."""

    buffer: StateBlock
    value: int


@dataclasses.dataclass(frozen=True, slots=True)
class SetStatePart:
    """A value takes the place of the microbatch's own part of a layer's state.

    Attributes:
        aval: of the whole state, or of the stack.
        part: where it is.
    """

    buffer: StateBlock
    value: int
    aval: jax.ShapeDtypeStruct
    part: Part


@dataclasses.dataclass(frozen=True, slots=True)
class Maximise:
    """Each number of a value replaces the number in the buffer, if that is smaller."""

    buffer: StateMaximum
    value: int


Target: TypeAlias = Put | Send | Add | Write | SetState | SetStatePart | Maximise


# --- the program of every device ---


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation: one piece of work, of all units that compute the same.

    `stage0-1 F` of the machine above. Both devices run it, each with its own block of
    the rows and with its own slots:

        sources       value 0    Parameter(row 0)    the bias
                      value 1    Parameter(row 1)    the weight
                      value 2    Held(forward 0)     the slot is argument 1
        code          value 3 = f(value 0, value 1, value 2)
        targets       Put value 3 into SavedPool("core"), the slot is argument 2
                      Send value 3 by forward 0
                      Put value 3 into LocalPool("forward"), the slot is argument 3

    Attributes:
        kind: of action.
        sources: what it takes.
        code: what it computes; `None` if it only passes things on.
        code_inputs: which of the sources the code takes.
        targets: what becomes of its values.
        identity: equal for codes that compute the same.
        rows: how many a microbatch has that it is for.
        name: for profiles and errors: `stage0-3 F`.
    """

    kind: Kind
    sources: tuple[Source, ...]
    # Every unit has a trace of its own, so its code is another object. `identity` is
    # what makes the operations of equal units equal; the code of the first is kept.
    code: Code | None = dataclasses.field(compare=False)
    code_inputs: tuple[int, ...]
    targets: tuple[Target, ...]
    identity: Hashable
    rows: int
    # Known only when all stages that share the operation are, so it takes no part.
    name: str = dataclasses.field(compare=False)


class TableOp(NamedTuple):
    """An operation, and its columns in the table: the one that is 1 where it runs, and
    the first of those of its arguments.
    """

    op: Op
    runs: int
    arguments: int


class TableWire(NamedTuple):
    """A wire, and its columns in the table: the slot on the receiver, and whether
    anything is sent at all.
    """

    wire: WireName
    slot: int
    carries: int


class TableCopy(NamedTuple):
    """What copies a slot of a pool to the host's memory, and its columns in the table:
    the slot, and the one on the host. It copies in every tick: where there is nothing
    to copy, to a slot on the host that nobody reads.
    """

    pool: PoolName
    slot: int
    on_host: int


class TableReturn(NamedTuple):
    """What copies back, and its columns in the table: the one that is 1 where it does,
    the slot on the host, and that of the pool.
    """

    pool: PoolName
    runs: int
    on_host: int
    slot: int


class Feed(NamedTuple):
    """What brings the pieces of large inputs to the actions of one kind.

    Attributes:
        stacks: the inputs, all of one port and shape of microbatch.
        reader: the device that reads them.
        piece: the column that says which of its own microbatches a device puts in.
        moves: the column that says whether the feed moves at all.
    """

    kind: Kind
    stacks: tuple[InputStack, ...]
    reader: int
    piece: int
    moves: int


class PhaseCode(NamedTuple):
    """What the program does in one phase of every tick: first feeds move, then
    operations run in this order, then slots go to the host and come back, then wires
    carry.

    The order within a phase is the same on all devices: it is the order of the
    program. So an operation that reads what another makes on the same device in the
    same phase (the core after the embedding) stands after it.
    """

    ops: tuple[TableOp, ...]
    wires: tuple[TableWire, ...]
    feeds: tuple[Feed, ...]
    copies: tuple[TableCopy, ...] = ()
    returns: tuple[TableReturn, ...] = ()


@dataclasses.dataclass(frozen=True)
class Segment:
    """One loop over ticks.

    Attributes:
        phases: of a tick, one or two.
        actions: for each tick and phase the action of each device. The program does
            not need them; recordings and plans do.
        table: int32, `(devices, ticks, phases, columns)`. Each device gets its own part
            of it, and `lax.scan` goes over its ticks, so that neither the program nor
            the time to compile it grows with the microbatches.
    """

    phases: tuple[PhaseCode, ...]
    actions: tuple[tuple[Phase, ...], ...]
    table: np.ndarray


@dataclasses.dataclass(frozen=True)
class Wire:
    """A `ppermute`.

    Attributes:
        pairs: source and target devices.
        avals: the arrays of each kind of bundle that it carries.
        always: whether it runs in every phase in which it may; otherwise only where the
            table says that somebody sends.
    """

    pairs: tuple[tuple[int, int], ...]
    avals: tuple[Avals, ...]
    always: bool


@dataclasses.dataclass(frozen=True)
class Pool:
    """Slots for bundles.

    Attributes:
        slots: how many. Where there can be bundles that nobody reads, one more than
            the schedule needs: such a bundle goes to the last slot, so that writing it
            needs no conditional of its own.
        avals: the arrays of each kind of bundle.
        on_host: how many slots there are in the host's memory, for bundles that an `O`
            copies there and an `L` back.
    """

    slots: int
    avals: tuple[Avals, ...]
    on_host: int = 0


class Loan(NamedTuple):
    """A parameter's array that another device's stage uses too, such as a tied
    embedding: the first device owns it, and the last one, with the head, borrows it.
    """

    row: int
    owner: int
    borrower: int
    aval: jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Machine:
    """A step.

    Attributes:
        counts: how many microbatches there are of each shape.
        rows: how many rows one of each shape has.
        segments: one, or two for a call that is differentiated from outside: forwards,
            then backwards.
        params, state: how they are packed.
        loans: parameters that other devices use too.
        outputs: the shape of one microbatch's piece of each output. The gradient of an
            input that is cut is one, under the input's name.
        inputs: those that go whole to every microbatch and whose gradient is made.
        sliced: those that operations slice their rows from. Others that have rows are
            cut before the loop: each device has only its share of all microbatches, or
            of the rows of each.
        spread: those inputs that are too large for every device to hold: each has its
            share of the microbatches, and feeds bring them.
        overwritten: the arrays of states that backwards make, by layer and number.
        copied: for each stage that copies to the host, the pools whose slots it copies.
        warnings: what the user should know.
    """

    devices: int
    counts: tuple[int, ...]
    rows: tuple[int, ...]
    segments: tuple[Segment, ...]
    pools: dict[PoolName, Pool]
    wires: dict[WireName, Wire]
    params: Packing
    state: Packing | None
    loans: tuple[Loan, ...]
    outputs: dict[OutputBuffer, jax.ShapeDtypeStruct]
    inputs: dict[Leaf, jax.ShapeDtypeStruct]
    sliced: frozenset[Leaf]
    spread: frozenset[InputStack]
    overwritten: frozenset[Entry]
    copied: dict[int, list[PoolName]]
    warnings: Sequence[str]

    @property
    def microbatches(self) -> int:
        """The number of microbatches."""
        return sum(self.counts)
