"""What a step is lowered to, as data: operations with static sources and targets, and a
table that says which runs when.

Every device runs the same program, so all that differs between devices and ticks is in
a table: for each tick, phase and device the number of the operation to run (0: none)
and its *arguments*, numbers such as the microbatch or the slot of a pool. An operation
is described by where it takes and puts things; stages that compute the same, from and
to the same kind of place, share one.

A *pool* holds bundles (the arrays of one boundary, skip, cotangent, or what a forward
keeps for its backward) in numbered slots. A *wire* is what one `ppermute` carries each
phase: one bundle per device, from its outbox to the pool of that wire on the receiving
device.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np

from fpipe._executors.scan.packing import Packing
from fpipe._executors.scan.ticks import Phase
from fpipe._model.stages import Leaf, Port
from fpipe._program.code import Code

Avals: TypeAlias = tuple[jax.ShapeDtypeStruct, ...]


class PoolName(NamedTuple):
    """A pool. `forward` and `backward`: of a wire; -1 for what stays on its device.
    `saved`: what a forward keeps for its backward, `shared`: what an `I` keeps for its
    `W`; `of` tells kinds of them apart.
    """

    kind: Literal["forward", "backward", "saved", "shared"]
    of: Any


# --- where an operation takes a value from; `arg` is the number of one of its arguments ---


class Param(NamedTuple):
    """A parameter's array: of a row, or (`borrowed`) of what another device lends."""

    row: int
    aval: jax.ShapeDtypeStruct
    borrowed: bool = False


class StateLeaf(NamedTuple):
    """A state's array: of a row."""

    row: int
    aval: jax.ShapeDtypeStruct


class Piece(NamedTuple):
    """The microbatch's piece of an input of the call, or all of it. What lies over the
    devices is brought by a feed.
    """

    port: Port
    k: int
    whole: bool


class Number(NamedTuple):
    """An argument as a number."""

    arg: int


class Held(NamedTuple):
    """An array of a bundle in a pool."""

    pool: PoolName
    arg: int
    avals: Avals
    k: int


Source: TypeAlias = Param | StateLeaf | Piece | Number | Held


# --- where it puts values, which are numbers: of what it fetched, then of what its code made ---


class Put(NamedTuple):
    """A bundle into a pool."""

    pool: PoolName
    arg: int
    avals: Avals
    values: tuple[int, ...]


class Send(NamedTuple):
    """A bundle into the outbox of a wire."""

    wire: PoolName
    avals: Avals
    values: tuple[int, ...]


class Add(NamedTuple):
    """A value to a gradient: `of` is a row, a borrowed array, or an input that goes
    whole to every microbatch.
    """

    to: Literal["row", "borrowed", "input"]
    of: Any
    value: int


class Write(NamedTuple):
    """A value into the microbatch's place of an output, or added to what is there."""

    output: Any
    value: int
    add: bool = False


class SetState(NamedTuple):
    """A state's array."""

    row: int
    value: int


Target: TypeAlias = Put | Send | Add | Write | SetState


@dataclasses.dataclass(frozen=True)
class Op:
    """One piece of work of a unit.

    Attributes:
        kind: of action.
        fetch: what it takes.
        code: what it computes; `None` if it only passes things on.
        ins: which of the fetched values the code takes.
        targets: what becomes of its values.
        identity: equal for codes that compute the same.
        name: for profiles and errors.
    """

    kind: str
    fetch: tuple[Source, ...]
    code: Code | None = dataclasses.field(compare=False)
    ins: tuple[int, ...]
    targets: tuple[Target, ...]
    identity: Any
    name: str = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Wire:
    """A `ppermute`.

    Attributes:
        pairs: source and target devices.
        avals: the kinds of bundles that it carries.
        always: whether it runs in every phase in which it may; else only where the
            table says that somebody sends.
    """

    pairs: tuple[tuple[int, int], ...]
    avals: tuple[Avals, ...]
    always: bool


@dataclasses.dataclass(frozen=True)
class Pool:
    """Slots for bundles."""

    slots: int
    avals: tuple[Avals, ...]


@dataclasses.dataclass(frozen=True)
class Segment:
    """A scan over ticks.

    Attributes:
        ops: for each phase of a tick the operations in the order in which they are
            tried, with the column that tells whether they run.
        wires: for each phase the wires that carry something.
        feeds: for each phase those that move.
        actions: for each tick and phase what each device does.
        table: `(devices, ticks, phases, columns)`. An operation's column is 1 where it
            runs; its arguments begin in its first argument column.
    """

    ops: tuple[tuple["Slotted", ...], ...]
    wires: tuple[tuple["Arrival", ...], ...]
    feeds: tuple[tuple["Feed", ...], ...]
    actions: tuple[tuple[Phase, ...], ...]
    table: np.ndarray


class Slotted(NamedTuple):
    """An operation in the table: the column that says whether it runs, and where its
    arguments begin.
    """

    op: Op
    column: int
    first: int


class Arrival(NamedTuple):
    """A wire in the table: the column of the slot where its bundle goes, and that of
    whether it carries any.
    """

    wire: PoolName
    column: int
    used: int


class Feed(NamedTuple):
    """What brings the arrays of `port` that lie over the devices to the actions of one
    kind that read them. The columns: which microbatch of its own a device puts in, and
    whether the feed moves at all.
    """

    port: Port
    kind: str
    arrays: tuple[int, ...]
    reader: int
    column: int
    used: int


class Loan(NamedTuple):
    """A parameter's array that another device's stage uses too."""

    row: int
    owner: int
    borrower: int
    aval: jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Machine:
    """A step.

    Attributes:
        segments: one, or two for a call that is differentiated from outside: forwards,
            then backwards.
        params, state: how they are packed.
        outputs: by name the shape of one microbatch's piece, and the devices that write
            it.
        loans: parameters that other devices use too.
        inputs: those that go whole to every microbatch and whose gradient is made.
        spread: those of which each device has its share of the microbatches.
    """

    devices: int
    microbatches: int
    segments: tuple[Segment, ...]
    pools: dict[PoolName, Pool]
    wires: dict[PoolName, Wire]
    params: Packing
    state: Packing | None
    loans: tuple[Loan, ...]
    outputs: dict[Any, tuple[jax.ShapeDtypeStruct, frozenset[int]]]
    inputs: dict[tuple[Port, int], jax.ShapeDtypeStruct]
    spread: frozenset[Leaf]
    warnings: Sequence[str]
