"""What a cut function is as a graph: its pieces, and what goes from one to another.

In: a cut trace, and what the layers say of its pieces. Out: a `CutGraph`, plain data,
which `table.py` prints and `svg.py` draws. Of two blocks that add a bias, which is made
from a mask,

    pieces    0 h/*   1 h/*
    crossing  add        1 KiB  0 -> 1  NEXT
    again     select_n   128 B  in 1    out of x['mask']
    given     x          1 KiB  -> 0
              x['mask']   32 B  -> 0, 1

An input of the function is called by its path. Any other value is called by the
operation that makes it, because a trace does not know the names of variables.
"""

import dataclasses
import enum
from collections.abc import Sequence
from functools import cached_property

import jax

from fpipe._core.pytrees import PyTree, describe, is_array
from fpipe._split.pieces import CutTrace, Piece
from fpipe._split.trace import Kind

# Operations that give a value another form.
_FORMS = ("broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "transpose")


class Reason(enum.Enum):
    """Why a value is sent as it is: `NEXT` is the boundary, all others are skips."""

    NEXT = "read there alone"
    SEVERAL = "several read it"
    LATER = "read later"
    KEY = "a key: all draw from one"
    REDUCED = "small beside its parameters"


@dataclasses.dataclass(frozen=True)
class PieceNode:
    """A piece.

    Attributes:
        name: of its layer.
        owned, borrowed: paths of the parameters that it owns, and of those of others
            that it reads.
        state: paths of the arrays of the state that it reads and writes.
        flops: of its forward.
        cost: what it takes in a step that trains (`fpipe._program.roofline`).
        again: bytes of what it makes again.
    """

    name: str
    owned: tuple[str, ...]
    borrowed: tuple[str, ...]
    state: tuple[str, ...]
    flops: float
    cost: float
    again: int


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of the trace.

    Attributes:
        name: its path, or the operation that makes it.
        array: its dtype and shape.
        bytes: of one microbatch of the example.
        where: the file and the line that makes it; empty for an input.
    """

    name: str
    array: str
    bytes: int
    where: str


@dataclasses.dataclass(frozen=True)
class CrossingValue:
    """A value that a piece sends to others."""

    value: Value
    source: int
    readers: tuple[int, ...]
    reason: Reason


@dataclasses.dataclass(frozen=True)
class MadeAgain:
    """A value that a piece makes again, and itself reads.

    Attributes:
        value: what is made again.
        piece: where.
        sources: names of what it is made of.
    """

    value: Value
    piece: int
    sources: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class BorrowedParameter:
    """A parameter, or rows of one, that other pieces read than the one that owns it."""

    path: str
    bytes: int
    owner: int
    readers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class GivenInput:
    """What a call gives straight to some pieces.

    Attributes:
        name: the path of an array, such as `x['mask']`; `x` is all of it that the first
            piece alone gets.
        array: its dtype and shape; empty for several.
    """

    name: str
    bytes: int
    readers: tuple[int, ...]
    array: str = ""


@dataclasses.dataclass(frozen=True)
class CutGraph:
    """A cut function: its pieces, and all that goes to them.

    Attributes:
        name: of the function.
        crossing: in the order in which the function makes the values.
    """

    name: str
    pieces: tuple[PieceNode, ...]
    crossing: tuple[CrossingValue, ...]
    again: tuple[MadeAgain, ...]
    borrowed: tuple[BorrowedParameter, ...]
    given: tuple[GivenInput, ...]

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """The share of each piece in what all cost, from 0 to 1."""
        total = sum(piece.cost for piece in self.pieces) or 1.0
        return tuple(piece.cost / total for piece in self.pieces)


def values_and_inputs(
    cut: CutTrace, kind: Kind, state: PyTree
) -> tuple[tuple[CrossingValue, ...], tuple[MadeAgain, ...], tuple[GivenInput, ...]]:
    """What goes between the pieces of a trace, what they make again, and what a call
    gives them.

    Arguments:
        kind: what the trace is for.
        state: the shapes of the function's state.
    """
    found = _Values(cut, kind, state)
    return found.crossing(), found.again(), found.given()


def _names(what: str, tree: PyTree) -> list[str]:
    """What the arrays of an input are called."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    return [what + jax.tree_util.keystr(p) for p, leaf in named if is_array(leaf)]


class _Values:
    """The values of a trace that cross its cuts, and those that need not."""

    def __init__(self, cut: CutTrace, kind: Kind, state: PyTree) -> None:
        self._cut, self._traced = cut, cut.traced
        self._inputs: dict[int, str] = {}
        traced = self._traced
        inputs = zip(traced.needs.items(), kind.needs, strict=True)
        for (name, values), shape in ((("x", traced.x), kind.x), *inputs):
            named = _names(name, shape.tree)
            self._inputs.update(zip(values, named, strict=True))
        named = _names("state", state)
        for v, rows in zip(traced.state, traced.state_roots, strict=True):
            self._inputs[v] = rows.label(named[rows.leaf])

    def crossing(self) -> tuple[CrossingValue, ...]:
        """What pieces send to others."""
        return tuple(
            CrossingValue(self._value(v), source, readers, self._reason(v, readers))
            for v, (source, readers) in sorted(self._cut.senders.items())
        )

    def given(self) -> tuple[GivenInput, ...]:
        """What a call gives to pieces."""
        traced, pieces = self._cut.traced, self._cut.pieces
        first = [v for n, v in enumerate(traced.x) if n not in self._cut.straight]
        found = [GivenInput("x", self._cut.bytes_of(first), (0,))] if first else []
        straight = [traced.x[n] for n in sorted(self._cut.straight)]
        readers = {
            v: tuple(k for k, piece in enumerate(pieces) if v in piece.given)
            for v in (*straight, *traced.row_needs)
        }
        for name, values in traced.needs.items():
            own = tuple(k for k, piece in enumerate(pieces) if name in piece.needs)
            if own:
                readers |= dict.fromkeys(values, own)
        for v, own in readers.items():
            if own:
                value = self._value(v)
                found.append(GivenInput(value.name, value.bytes, own, value.array))
        return tuple(found)

    def _reason(self, v: int, readers: Sequence[int]) -> Reason:
        if v in self._cut.boundary_values:
            return Reason.NEXT
        if v not in self._traced.of_data:
            return Reason.KEY if v in self._traced.of_key else Reason.REDUCED
        return Reason.SEVERAL if len(readers) > 1 else Reason.LATER

    def again(self) -> tuple[MadeAgain, ...]:
        """What pieces make again, and read."""
        found = []
        for k, piece in enumerate(self._cut.pieces):
            for v in self._read_of_again(piece):
                sources = sorted(self._sources(v, piece), key=self._name)
                names = dict.fromkeys(map(self._name, sources))
                found.append(MadeAgain(self._value(v), k, tuple(names)))
        return tuple(found)

    def _read_of_again(self, piece: Piece) -> list[int]:
        """What a piece makes again, without what it makes on the way there."""
        again = set(piece.again)
        read = dict.fromkeys(
            v
            for node in piece.nodes
            if again.isdisjoint(node.outs)
            for v in node.ins
            if v in again
        )
        return list(read)

    def _sources(self, v: int, piece: Piece) -> set[int]:
        """What a value is made again out of."""
        maker, again = self._traced.graph.maker, set(piece.again)
        found, pending = set[int](), [v]
        while pending:
            for u in maker[pending.pop()].ins:
                if u in again:
                    pending.append(u)
                elif u in self._traced.of_data:
                    found.add(u)
        return found

    def _value(self, v: int) -> Value:
        aval = self._traced.graph.avals[v]
        maker = self._traced.graph.maker.get(v)
        # The name of the file and the line, without the function and the folder.
        line = "" if maker is None else maker.where.partition(" ")[0]
        return Value(
            self._name(v),
            describe(jax.ShapeDtypeStruct(aval.shape, aval.dtype)),
            self._cut.bytes_of([v]),
            line.replace("\\", "/").rpartition("/")[2],
        )

    def _name(self, v: int) -> str:
        """A value's path, that of what it is another form of, or what makes it."""
        maker = self._traced.graph.maker
        at = v
        while at in maker and maker[at].name in _FORMS and len(maker[at].ins) == 1:
            (at,) = maker[at].ins
        if at in self._inputs:
            return self._inputs[at]
        return maker[v].told_name
