"""`print(split)`: what the pieces are, and what goes over their cuts and why.

In: a cut trace, and who owns which parameters. Out: three tables. Of two blocks that
add a bias, which is made from a mask,

    piece  name  parameters     FLOPs  boundary      skips  made again
        0  h/*   h/0/w       34 kFLOP
        1  h/*   h/1/w       34 kFLOP     1 KiB  32 B of 0       128 B

    crosses    array            bytes  from  to        made at      why
    add        float32[2,16,8]  1 KiB  0     the next  model.py:12  read there alone
    x['mask']  bool[2,16]        32 B  0     1                      read later

    made again  array            bytes  in  out of     made at
    select_n    float32[2,1,16]  128 B  1   x['mask']  model.py:8

A value is called by its path, if it is an input of the function, and else by the
operation that makes it, for a trace does not know the names of variables. Equal rows
of neighbours are one row: a model of a hundred blocks has a table of a few lines.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax

from fpipe._core.pytrees import PyTree, describe, is_array
from fpipe._planning.text import Table, quantity, size
from fpipe._split.pieces import CutTrace, Piece
from fpipe._split.trace import Kind

# What a cell has room for, so that lines have 100 columns.
_NAME = 20
_PATHS = 34
_WHERE = 20

# Operations that give a value another form.
_FORMS = ("broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "transpose")


@dataclasses.dataclass(frozen=True)
class PieceRow:
    """What the layers say of a piece.

    Attributes:
        name: of the layer.
        owned, borrowed: paths of the parameters that it owns, and of those of others
            that it reads.
        state: paths of the arrays of the state that it reads and writes.
    """

    name: str
    owned: Sequence[str]
    borrowed: Sequence[str]
    state: Sequence[str] = ()


def tables(
    cut: CutTrace, kind: Kind, rows: Sequence[PieceRow], state: PyTree = None
) -> list[Table]:
    """The tables that have rows.

    Arguments:
        kind: what the trace is for.
        state: the shapes of the function's state.
    """
    crossing = _Crossing(cut, kind, state)
    found = [_pieces(cut, rows), crossing.sent(), crossing.again()]
    return [table for table in found if table.rows]


# --- pieces ---


def _pieces(cut: CutTrace, rows: Sequence[PieceRow]) -> Table:
    """A row for each piece."""
    cells = []
    for k, (piece, row) in enumerate(zip(cut.pieces, rows, strict=True)):
        far = cut.skips(k)
        near = [v for v in piece.takes if v not in far]
        sources = numbers(set(far.values()))
        cells.append(
            (
                str(k),
                _short(row.name, _NAME),
                paths(row.owned),
                paths(row.borrowed),
                paths(row.state),
                quantity(piece.flops, "FLOP"),
                size(cut.bytes_of(near)) if k else "",
                f"{size(cut.bytes_of(list(far)))} of {sources}" if far else "",
                size(cut.bytes_of(piece.again)) if piece.again else "",
            )
        )
    head = ("piece", "name", "parameters", "borrows", "state", "FLOPs")
    head += ("boundary", "skips", "made again")
    return Table(head, cells, left=(1, 2, 3, 4))


def paths(given: Sequence[str]) -> str:
    """Paths of parameters in a cell, what they all begin with once: `h/0/(b w)`."""
    every = [path or "(all)" for path in given]
    if len(every) < 2:
        return _short(" ".join(every), _PATHS)
    parts = [path.split("/") for path in every]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    ends = ["/".join(p[shared:]) for p in parts]
    beginning = "/".join(parts[0][:shared])
    inside = ends if len(ends) <= 4 else [*ends[:3], "…", ends[-1]]
    text = " ".join(inside)
    if not beginning:
        return _short(text, _PATHS)
    return f"{beginning}/({_short(text, max(8, _PATHS - len(beginning) - 3))})"


def numbers(given: Iterable[int]) -> str:
    """Numbers in a cell: `0, 2-5`."""
    spans: list[list[int]] = []
    for n in sorted(given):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


# --- what crosses ---


@dataclasses.dataclass(frozen=True)
class _Value:
    """What is said of a value: equal ones share a row."""

    name: str
    array: str
    bytes: str
    where: str


class _Crossing:
    """The tables of what crosses, and of what is made again so that it need not."""

    def __init__(self, cut: CutTrace, kind: Kind, state: PyTree) -> None:
        self._cut, self._traced = cut, cut.traced
        self._inputs: dict[int, str] = {}
        trees = {n: getattr(kind, n).tree for n in ("x", "side", "key", "step")}
        for name, tree in (*trees.items(), ("state", state)):
            named = jax.tree_util.tree_leaves_with_path(tree)
            arrays = [path for path, leaf in named if is_array(leaf)]
            for v, path in zip(getattr(self._traced, name), arrays, strict=True):
                self._inputs[v] = name + jax.tree_util.keystr(path)

    def sent(self) -> Table:
        """A row for each value that pieces hand to others."""
        # Boundaries that are alike, as those between blocks, by their makers.
        near: dict[_Value, list[int]] = {}
        far: dict[tuple[_Value, int, tuple[int, ...], str], int] = {}
        for v, (source, readers) in sorted(self._cut.senders.items()):
            value = self._value(v)
            if v in self._cut.boundary_values:
                near.setdefault(value, []).append(source)
            else:
                key = value, source, readers, self._why(v, readers)
                far[key] = far.get(key, 0) + 1
        rows = [
            self._row(value, numbers(sources), "the next", "read there alone")
            for value, sources in near.items()
        ]
        for (value, source, readers, why), count in far.items():
            if count > 1:
                value = dataclasses.replace(value, name=f"{count} {value.name}")
            rows.append(self._row(value, str(source), numbers(readers), why))
        head = ("crosses", "array", "bytes", "from", "to", "made at", "why")
        return Table(head, rows, left=(0, 1, 3, 4, 5, 6))

    def _row(self, value: _Value, source: str, to: str, why: str) -> tuple[str, ...]:
        return value.name, value.array, value.bytes, source, to, value.where, why

    def _why(self, v: int, readers: Sequence[int]) -> str:
        """Why a value is no part of a boundary."""
        if v in self._traced.of_key and v not in self._traced.of_data:
            return "a key: all draw from one"
        if v not in self._traced.of_data:
            return "small beside its parameters"
        return "several read it" if len(readers) > 1 else "read later"

    def again(self) -> Table:
        """A row for each value that a piece makes again, and itself reads."""
        found: dict[tuple[_Value, str], list[int]] = {}
        for k, piece in enumerate(self._cut.pieces):
            for v in self._read_of_again(piece):
                sources = sorted(self._sources(v, piece), key=self._name)
                names = ", ".join(dict.fromkeys(map(self._name, sources)))
                found.setdefault((self._value(v), names), []).append(k)
        rows = [
            (value.name, value.array, value.bytes, numbers(ks), names, value.where)
            for (value, names), ks in found.items()
        ]
        head = ("made again", "array", "bytes", "in", "out of", "made at")
        return Table(head, rows, left=(0, 1, 3, 4, 5))

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

    def _value(self, v: int) -> _Value:
        aval = self._traced.graph.avals[v]
        maker = self._traced.graph.maker.get(v)
        # The name of the file and the line; the rest of the path fills the column.
        line = "" if maker is None else maker.where.partition(" ")[0]
        return _Value(
            _short(self._name(v), _NAME),
            describe(jax.ShapeDtypeStruct(aval.shape, aval.dtype)),
            size(self._cut.bytes_of([v])),
            _short(line.replace("\\", "/").rpartition("/")[2], _WHERE),
        )

    def _name(self, v: int) -> str:
        """A value's path, that of what it is another form of, or what makes it."""
        maker = self._traced.graph.maker
        at = v
        while at in maker and maker[at].name in _FORMS and len(maker[at].ins) == 1:
            (at,) = maker[at].ins
        if at in self._inputs:
            return self._inputs[at]
        return maker[v].name
