"""`print(split)`: what the pieces are, and what goes over their cuts and why.

In: a cut function as a graph. Out: four tables. Of two blocks that add a bias, which
is made from a mask,

    piece  name  parameters     FLOPs   time  boundary  made again
        0  h/*   h/0/w       34 kFLOP  50.0%
        1  h/*   h/1/w       34 kFLOP  50.0%     1 KiB       128 B

    crosses  array            bytes  from  to        made at      why
    add      float32[2,16,8]  1 KiB  0     the next  model.py:12  read there alone

    of the call  array       bytes  given to
    x['mask']    bool[2,16]   32 B  0-1

    made again  array            bytes  in  out of     made at
    select_n    float32[2,1,16]  128 B  1   x['mask']  model.py:8

Equal rows of neighbours are one row: a model of a hundred blocks has a table of a few
lines.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from fpipe._planning.text import Table, quantity, size
from fpipe._split.cut_graph import CutGraph, Reason, Value

# What a cell has room for, so that lines have 100 columns.
NAME = 20
_PATHS = 32
_WHERE = 20


def tables(graph: CutGraph) -> list[Table]:
    """The tables that have rows."""
    found = [_pieces(graph), _sent(graph), _given(graph), _again(graph)]
    return [table for table in found if table.rows]


# --- pieces ---


def _pieces(graph: CutGraph) -> Table:
    """A row for each piece."""
    cells = []
    for k, piece in enumerate(graph.pieces):
        read = [c for c in graph.crossing if k in c.readers]
        near = sum(c.value.bytes for c in read if c.reason is Reason.NEXT)
        far = [c for c in read if c.reason is not Reason.NEXT]
        sources = numbers({c.source for c in far})
        cells.append(
            (
                str(k),
                short(piece.name, NAME),
                paths(piece.owned),
                paths(piece.borrowed),
                paths(piece.state),
                quantity(piece.flops, "FLOP"),
                f"{graph.shares[k]:.1%}",
                size(near) if k and near else "",
                f"{size(sum(c.value.bytes for c in far))} of {sources}" if far else "",
                size(piece.again) if piece.again else "",
            )
        )
    head = ("piece", "name", "parameters", "borrows", "state", "FLOPs")
    head += ("time", "boundary", "skips", "made again")
    return Table(head, cells, left=(1, 2, 3, 4))


def paths(given: Sequence[str]) -> str:
    """Paths of parameters in a cell, what they all begin with once: `h/0/(b w)`."""
    every = [path or "(all)" for path in given]
    if len(every) < 2:
        return short(" ".join(every), _PATHS)
    parts = [path.split("/") for path in every]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    ends = ["/".join(p[shared:]) for p in parts]
    beginning = "/".join(parts[0][:shared])
    inside = ends if len(ends) <= 4 else [*ends[:3], "…", ends[-1]]
    text = " ".join(inside)
    if not beginning:
        return short(text, _PATHS)
    return f"{beginning}/({short(text, max(8, _PATHS - len(beginning) - 3))})"


def numbers(given: Iterable[int]) -> str:
    """Numbers in a cell: `0, 2-5`."""
    spans: list[list[int]] = []
    for n in sorted(set(given)):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)


def short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


# --- what crosses ---


def _sent(graph: CutGraph) -> Table:
    """A row for each value that pieces hand to others."""
    # Boundaries that are alike, as those between blocks, by their makers.
    near: dict[Value, list[int]] = {}
    far: dict[tuple[Value, int, tuple[int, ...], Reason], int] = {}
    for c in graph.crossing:
        value = _as_shown(c.value)
        if c.reason is Reason.NEXT:
            near.setdefault(value, []).append(c.source)
        else:
            key = value, c.source, c.readers, c.reason
            far[key] = far.get(key, 0) + 1
    rows = [
        _row(value, numbers(sources), "the next", Reason.NEXT)
        for value, sources in near.items()
    ]
    for (value, source, readers, reason), count in far.items():
        if count > 1:
            value = dataclasses.replace(value, name=f"{count} {value.name}")
        rows.append(_row(value, str(source), numbers(readers), reason))
    head = ("crosses", "array", "bytes", "from", "to", "made at", "why")
    return Table(head, rows, left=(0, 1, 3, 4, 5, 6))


def _row(value: Value, source: str, to: str, why: Reason) -> tuple[str, ...]:
    of_value = value.name, value.array, size(value.bytes)
    return (*of_value, source, to, value.where, why.value)


def _given(graph: CutGraph) -> Table:
    """A row for each input that the call gives to pieces after the first one."""
    rows = [
        (short(own.name, NAME), own.array, size(own.bytes), numbers(own.readers))
        for own in graph.given
        if any(own.readers)
    ]
    return Table(("of the call", "array", "bytes", "given to"), rows, left=(0, 1, 3))


def _again(graph: CutGraph) -> Table:
    """A row for each value that a piece makes again, and itself reads."""
    found: dict[tuple[Value, tuple[str, ...]], list[int]] = {}
    for made in graph.again:
        found.setdefault((_as_shown(made.value), made.sources), []).append(made.piece)
    rows = [
        (
            value.name,
            value.array,
            size(value.bytes),
            numbers(pieces),
            ", ".join(sources),
            value.where,
        )
        for (value, sources), pieces in found.items()
    ]
    head = ("made again", "array", "bytes", "in", "out of", "made at")
    return Table(head, rows, left=(0, 1, 3, 4, 5))


def _as_shown(value: Value) -> Value:
    """As much of it as its cells have room for: what looks equal is one row."""
    name, where = short(value.name, NAME), short(value.where, _WHERE)
    return dataclasses.replace(value, name=name, where=where)
