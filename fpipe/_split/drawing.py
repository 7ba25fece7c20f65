"""Where everything stands in the drawing of a cut function, in pixels.

In: a `CutGraph`. Out: a `Drawing`, plain data. A U-Net of three pieces, whose first one
sends a skip to the last one:

         ┌─── tanh 24 B ───┐         lane 1: an `Arc`
    x ─ [0] ──── [1] ──── [2] ─ y    a `Box` for each piece; `Arrow`s are boundaries
             24 B     12 B

Arcs are drawn as in pictures of U-Nets: one that is inside of another runs below it. A
value that several pieces read is one arc with several ends. What a call gives to others
than the first piece comes from the left margin.
"""

import dataclasses
import enum
import itertools
from collections.abc import Iterable, Sequence

from fpipe._planning.text import quantity, size
from fpipe._split.cut_graph import CutGraph, Reason
from fpipe._split.table import NAME, paths, short
from fpipe.schedules._checks import counted
from fpipe.schedules._draw.elements import LETTER, LINE, MARGIN, SIZE

# A drawing of up to 12 pieces is not wider.
WIDTH = 700
# For the names of what comes in, and of what comes out.
_LEFT, _RIGHT = 60.0, 34.0
# Between two boxes, for the arrow.
_GAP = 15.0
_NARROWEST, _WIDEST = 42.0, 120.0
# Between a line and what is beside it.
_CLEAR = 3.0
# Of what goes the same way, in a tooltip.
_NAMES = 8
# The source of what a call gives.
_OUTSIDE = -1


class Way(enum.Enum):
    """How something comes to a piece."""

    BOUNDARY = "boundary: read next"
    SKIP = "skip: read later, or by several"
    KEY = "key"
    BORROWED = "borrowed parameters"
    GIVEN = "given by the call"


@dataclasses.dataclass(frozen=True)
class Label:
    """A line of text.

    Attributes:
        words: what it says.
        x: its middle.
        y: its baseline.
    """

    words: str
    x: float
    y: float

    @property
    def left(self) -> float:
        """Where it begins."""
        return self.x - width_of(self.words) / 2

    @property
    def right(self) -> float:
        """Where it ends."""
        return self.x + width_of(self.words) / 2


@dataclasses.dataclass(frozen=True)
class Box:
    """A piece.

    Attributes:
        filled: its time beside that of the most expensive piece, 0 to 1.
        lines: what stands in it.
        title: everything about it.
    """

    x: float
    y: float
    width: float
    height: float
    filled: float
    lines: tuple[str, ...]
    title: str


@dataclasses.dataclass(frozen=True)
class Arrow:
    """A boundary, or what comes in or out.

    Attributes:
        label: its bytes, below.
    """

    way: Way
    start: float
    end: float
    y: float
    title: str
    label: Label | None


@dataclasses.dataclass(frozen=True)
class Arc:
    """What goes from one box over others.

    Attributes:
        start: where it leaves its box, or where it comes in.
        ends: where it reaches the boxes that read it.
        foot: the upper side of the boxes.
        y: of its lane.
        outside: whether it comes from the margin.
        label: its name and bytes, or its bytes, if there is room.
    """

    way: Way
    start: float
    ends: tuple[float, ...]
    foot: float
    y: float
    outside: bool
    title: str
    label: Label | None


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A cut function, ready to be drawn by anything.

    Attributes:
        names: of what comes in and goes out, beside the first and the last box.
        notes: the titles of arcs that have no room for a label.
        rows: of each piece its number, name, FLOPs, share of the time, and parameters.
        bottom: where what stands below the boxes ends.
    """

    width: int
    caption: str
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    arcs: tuple[Arc, ...]
    names: tuple[Label, ...]
    notes: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bottom: float


def width_of(words: str) -> float:
    """How wide a text is: SVG does not tell, so it is estimated."""
    return len(words) * SIZE * LETTER


def drawing(graph: CutGraph) -> Drawing:
    """What to draw of a cut function."""
    flows = _flows(graph)
    over = [flow for flow in flows if flow.way is not Way.BOUNDARY]
    near = {flow.source: flow for flow in flows if flow.way is Way.BOUNDARY}
    lanes = _lanes(over)
    foot = MARGIN + 2 * LINE + LINE * max(lanes, default=0) + _CLEAR
    boxes = _boxes(graph, flows, foot)
    width = round(boxes[-1].x + boxes[-1].width + _RIGHT + MARGIN)
    rows = _rows(graph)
    width = max(width, round(sum(column_widths(rows)) + 2 * MARGIN), 320)
    arrows, bottom = _arrows(graph, near, boxes)
    arcs = _arcs(over, lanes, boxes, width)
    middle = foot + boxes[0].height / 2
    given = ", ".join(g.name for g in graph.given if g.readers == (0,))
    return Drawing(
        width,
        _caption(graph),
        boxes,
        arrows,
        arcs,
        (
            Label(given, MARGIN + (_LEFT - _GAP) / 2, middle - 5),
            Label("y", arrows[-1].end + 8, middle + SIZE * 0.35),
        ),
        tuple(arc.title for arc in arcs if arc.label is None),
        rows,
        bottom,
    )


def _caption(graph: CutGraph) -> str:
    sent = sum(c.value.bytes * len(c.readers) for c in graph.crossing)
    caption = f"{graph.name}: {counted(len(graph.pieces), 'piece')}"
    return f"{caption}, {size(sent)} go between them" if sent else caption


# --- pieces ---


def _boxes(graph: CutGraph, flows: Sequence["_Flow"], foot: float) -> tuple[Box, ...]:
    count = len(graph.pieces)
    most = max(graph.shares) or 1.0
    name = max(width_of(piece.name) for piece in graph.pieces) + 2 * _CLEAR
    # So wide that labels fit, as far as there is room for that.
    labels = [(width_of(f.label) + _GAP) / (f.span[1] - f.span[0]) for f in flows]
    room = (WIDTH - 2 * MARGIN - _LEFT - _RIGHT) / count
    wanted = max(name + _GAP, 64.0, *labels)
    column = float(round(max(min(room, wanted, _WIDEST), _NARROWEST) - 0.5))
    named = name <= column - _GAP
    return tuple(
        Box(
            MARGIN + _LEFT + column * k,
            foot,
            column - _GAP,
            46.0 if named else 32.0,
            graph.shares[k] / most,
            (str(k), piece.name) if named else (str(k),),
            f"piece {k}, {piece.name}: {quantity(piece.flops, 'FLOP')}, "
            f"{graph.shares[k]:.1%} of the time",
        )
        for k, piece in enumerate(graph.pieces)
    )


def _rows(graph: CutGraph) -> tuple[tuple[str, ...], ...]:
    """What is said of each piece below the drawing."""
    return tuple(
        (
            str(k),
            short(piece.name, NAME),
            quantity(piece.flops, "FLOP"),
            f"{graph.shares[k]:.1%}",
            paths(piece.owned),
        )
        for k, piece in enumerate(graph.pieces)
    )


def column_widths(rows: Iterable[Sequence[str]]) -> list[float]:
    """How wide the columns of some rows are."""
    return [max(map(width_of, column)) + LINE for column in zip(*rows, strict=True)]


# --- what goes between them ---


@dataclasses.dataclass(frozen=True)
class _Flow:
    """What goes the same way, from the same piece to the same pieces."""

    way: Way
    source: int
    readers: tuple[int, ...]
    names: tuple[str, ...]
    bytes: int

    @property
    def name(self) -> str:
        """One for all of it."""
        if self.way is Way.KEY:
            return "key" if len(self.names) == 1 else f"{len(self.names)} keys"
        if self.way is Way.BORROWED:
            return paths(self.names)
        return self.names[0] if len(self.names) == 1 else f"{len(self.names)} arrays"

    @property
    def label(self) -> str:
        """What is written at it, if there is room: of boundaries the bytes alone."""
        told = size(self.bytes)
        return told if self.way is Way.BOUNDARY else f"{self.name} {told}"

    @property
    def title(self) -> str:
        """Everything about it."""
        to = ", ".join(map(str, self.readers))
        origin = "" if self.source == _OUTSIDE else f" from piece {self.source}"
        names = ", ".join(self.names[:_NAMES])
        if len(self.names) > _NAMES:
            names += f" and {len(self.names) - _NAMES} more"
        what = f"{names}, {size(self.bytes)}"
        return f"{self.way.value}: {what},{origin} to {to}"

    @property
    def span(self) -> tuple[float, float]:
        """From where to where it goes, in columns: it enters a box left of where others
        leave it.
        """
        return self.source + 0.25, self.readers[-1] - 0.25


def _flows(graph: CutGraph) -> list[_Flow]:
    """What goes to the pieces, all that goes the same way together."""
    kinds = {Reason.NEXT: Way.BOUNDARY, Reason.KEY: Way.KEY}
    found: dict[tuple[Way, int, tuple[int, ...]], list[tuple[str, int]]] = {}
    for c in graph.crossing:
        key = kinds.get(c.reason, Way.SKIP), c.source, c.readers
        found.setdefault(key, []).append((c.value.name, c.value.bytes))
    for lent in graph.borrowed:
        key = Way.BORROWED, lent.owner, lent.readers
        found.setdefault(key, []).append((lent.path, lent.bytes))
    for given in graph.given:
        if given.readers != (0,):
            key = Way.GIVEN, _OUTSIDE, given.readers
            found.setdefault(key, []).append((given.name, given.bytes))
    return [
        _Flow(*key, tuple(name for name, _ in own), sum(count for _, count in own))
        for key, own in found.items()
    ]


def _arrows(
    graph: CutGraph, near: dict[int, _Flow], boxes: Sequence[Box]
) -> tuple[tuple[Arrow, ...], float]:
    """What comes in, the boundaries and what goes out; and where their labels end."""
    y = boxes[0].y + boxes[0].height / 2
    below = boxes[0].y + boxes[0].height + SIZE + _CLEAR
    first = [given for given in graph.given if given.readers == (0,)]
    incoming = sum(given.bytes for given in first)
    names = ", ".join(given.name for given in first)
    title = f"{Way.GIVEN.value}: {names}, {size(incoming)}"
    start = MARGIN
    middle = start + (_LEFT - _GAP) / 2
    made = [
        Arrow(
            Way.GIVEN,
            start,
            boxes[0].x,
            y,
            title,
            Label(size(incoming), middle, below),
        )
    ]
    # Labels that are wider than their column stand on two lines in turn.
    column = boxes[0].width + _GAP
    widest = max((width_of(size(f.bytes)) for f in near.values()), default=0.0)
    turns = 2 if widest + _CLEAR > column else 1
    for k, (box, after) in enumerate(itertools.pairwise(boxes)):
        left, right = box.x + box.width, after.x
        label, title = None, "nothing but skips"
        if k in near:
            line = below + LINE * (k % turns)
            label = Label(size(near[k].bytes), (left + right) / 2, line)
            title = near[k].title
        made.append(Arrow(Way.BOUNDARY, left, right, y, title, label))
    end = boxes[-1].x + boxes[-1].width
    made.append(Arrow(Way.BOUNDARY, end, end + _GAP, y, "what comes out", None))
    return tuple(made), below + LINE * (turns - 1) + _CLEAR


def _lanes(flows: Sequence[_Flow]) -> list[int]:
    """The lane of each flow, 1 the lowest: above all shorter ones that it overlaps."""
    lanes = [0] * len(flows)

    def length(n: int) -> tuple[float, float]:
        first, last = flows[n].span
        return last - first, first

    for n in sorted(range(len(flows)), key=length):
        start, end = flows[n].span
        lanes[n] = 1 + max(
            (
                lanes[other]
                for other, flow in enumerate(flows)
                if lanes[other] and flow.span[0] < end and start < flow.span[1]
            ),
            default=0,
        )
    return lanes


def _arcs(
    flows: Sequence[_Flow], lanes: Sequence[int], boxes: Sequence[Box], width: float
) -> tuple[Arc, ...]:
    starts, ends = _ports(flows, lanes, boxes)
    foot = boxes[0].y
    arcs = [
        Arc(
            flow.way,
            starts[n],
            tuple(ends[n, k] for k in flow.readers),
            foot,
            foot - LINE * lanes[n],
            flow.source == _OUTSIDE,
            flow.title,
            None,
        )
        for n, flow in enumerate(flows)
    ]
    # Short ones first: they have the least choice.
    for n in sorted(range(len(arcs)), key=lambda n: arcs[n].ends[-1] - arcs[n].start):
        arcs[n] = dataclasses.replace(arcs[n], label=_label(n, flows[n], arcs, width))
    return tuple(arcs)


def _ports(
    flows: Sequence[_Flow], lanes: Sequence[int], boxes: Sequence[Box]
) -> tuple[list[float], dict[tuple[int, int], float]]:
    """Where each flow leaves its box, and enters those that read it, by its number and
    theirs.
    """
    starts = [MARGIN] * len(flows)
    ends = dict[tuple[int, int], float]()
    for k, box in enumerate(boxes):
        # In this order no arc crosses another one at the box: of those that come in
        # the lowest is left, of those that go out the highest.
        numbers = sorted(range(len(flows)), key=lanes.__getitem__)
        entering = [n for n in numbers if k in flows[n].readers]
        leaving = [n for n in reversed(numbers) if flows[n].source == k]
        step = box.width / (len(entering) + len(leaving) + 1)
        for place, n in enumerate(entering, 1):
            ends[n, k] = box.x + step * place
        for place, n in enumerate(leaving, len(entering) + 1):
            starts[n] = box.x + step * place
    return starts, ends


def _label(n: int, flow: _Flow, arcs: Sequence[Arc], width: float) -> Label | None:
    """The label on an arc, where nothing else is: with its name if there is room."""
    arc = arcs[n]
    taken: list[tuple[float, float]] = []
    for other in (*arcs[:n], *arcs[n + 1 :]):
        if other.y < arc.y:
            # Its verticals come down through this lane.
            sides = other.ends if other.outside else (other.start, *other.ends)
            taken += [(x - _CLEAR, x + _CLEAR) for x in sides]
        elif other.y == arc.y:
            taken.append((other.start - _CLEAR, other.ends[-1] + _CLEAR))
            if other.label is not None:
                taken.append((other.label.left - _CLEAR, other.label.right + _CLEAR))
    for words in (flow.label, size(flow.bytes)):
        half = width_of(words) / 2
        fitting = [
            (min(end, arc.ends[-1]) - max(start, arc.start), start, end)
            for start, end in _free(taken, MARGIN, width - MARGIN)
            if end - start >= 2 * half
        ]
        common, start, end = max(fitting, default=(0.0, 0.0, 0.0))
        if common > 0:
            middle = max(start, arc.start) + common / 2
            x = min(max(middle, start + half), end - half)
            return Label(words, x, arc.y - _CLEAR)
    return None


def _free(
    taken: Iterable[tuple[float, float]], start: float, end: float
) -> list[tuple[float, float]]:
    """What is left of a line of some intervals of it."""
    found = []
    for left, right in sorted(taken):
        if left > start:
            found.append((start, min(left, end)))
        start = max(start, right)
    return [*found, (start, end)] if start < end else found
