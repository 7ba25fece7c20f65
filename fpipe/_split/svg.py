"""A cut function as SVG: pieces as boxes, what crosses as arrows and arcs.

In: a `CutGraph`. Out: a document as those of timelines are, with a tooltip on each
part. From the top: the caption, arcs, boxes, bytes of the boundaries, a line for each
piece and for each arc without a label, a legend. Two pieces with a skip to a third:

      ╭──── 8 B ────╮
    [ 0 ]──>[ 1 ]──>[ 2 ]
       1 KiB    1 KiB
"""

import dataclasses

from fpipe._split.cut_graph import CutGraph
from fpipe._split.drawing import (
    Arc,
    Arrow,
    Box,
    Drawing,
    Label,
    Way,
    column_widths,
    drawing,
    width_of,
)
from fpipe._split.table import short
from fpipe.schedules._draw.elements import (
    LINE,
    MARGIN,
    SIZE,
    document,
    rect,
    text,
)
from fpipe.schedules._html import escape

# Of a drawing in a notebook.
MOST_PIECES = 24

BOX = "#e3f1fa"
FILLED = "#a9d5ef"
FILLED_WORDS = "time, beside the most expensive piece"
# How round the corners of arcs are.
_CORNER = 6.0


@dataclasses.dataclass(frozen=True)
class Stroke:
    """How a line is drawn: colours of Okabe and Ito, and dashes for who sees none."""

    colour: str
    dashes: str = ""

    @property
    def style(self) -> str:
        """The attributes."""
        dashes = f' stroke-dasharray="{self.dashes}"' if self.dashes else ""
        return f'fill="none" stroke="{self.colour}" stroke-width="1.5"{dashes}'


STROKES = {
    Way.BOUNDARY: Stroke("#1a1a1a"),
    Way.SKIP: Stroke("#0072b2"),
    Way.KEY: Stroke("#c44e00", "2 2"),
    Way.BORROWED: Stroke("#00795a", "6 3"),
    Way.GIVEN: Stroke("#6b6b6b"),
}


def svg(graph: CutGraph) -> str:
    """The document."""
    shown = drawing(graph)
    parts = [text(MARGIN, MARGIN + SIZE, _short(shown, shown.caption))]
    parts += [_box(box) for box in shown.boxes]
    parts += [_arrow(arrow) for arrow in shown.arrows]
    # The highest first: where lines cross, the shorter arc is above.
    parts += [_arc(arc) for arc in sorted(shown.arcs, key=lambda arc: arc.y)]
    labels = [part.label for part in (*shown.arrows, *shown.arcs)]
    parts += [_label(label) for label in (*labels, *shown.names) if label is not None]
    y = shown.bottom + LINE
    parts += _rows(shown, y)
    y += LINE * (len(shown.rows) + 0.5)
    for note in shown.notes:
        parts.append(text(MARGIN, y, _short(shown, note)))
        y += LINE
    legend, bottom = _legend(shown, y)
    return document(shown.width, bottom, shown.caption, [*parts, *legend])


def _short(shown: Drawing, words: str) -> str:
    """As much of a line as there is room for."""
    return short(words, int((shown.width - 2 * MARGIN) / width_of("m")))


def _box(box: Box) -> str:
    filled = box.height * box.filled
    style = f'fill="{BOX}" stroke="#5b7a8c"'
    middle = box.x + box.width / 2
    first = box.y + (box.height - SIZE * 1.3 * (len(box.lines) - 1)) / 2 + SIZE * 0.35
    lines = [
        text(middle, first + SIZE * 1.3 * n, line, 'text-anchor="middle"')
        for n, line in enumerate(box.lines)
    ]
    return "\n".join(
        [
            f'<g class="piece"><title>{escape(box.title)}</title>',
            f'<rect x="{box.x:.2f}" y="{box.y:g}" width="{box.width:.2f}" '
            f'height="{box.height:g}" {style}/>',
            rect(box.x + 1, box.y + box.height - filled, box.width - 2, filled, FILLED),
            *lines,
            "</g>",
        ]
    )


def _arrow(arrow: Arrow) -> str:
    line = f"M{arrow.start:.2f} {arrow.y:g}H{arrow.end - 4:.2f}"
    head = f"M{arrow.end:.2f} {arrow.y:g}l-6 -3.5v7z"
    return _line("boundary", arrow.way, arrow.title, line, head)


def _arc(arc: Arc) -> str:
    """Up from its box, along its lane, and down to each box that reads it."""
    top = arc.y + _CORNER
    line = f"M{arc.start:.2f} {arc.y:g}"
    if not arc.outside:
        line = f"M{arc.start:.2f} {arc.foot:g}V{top:g}q0 -{_CORNER:g} {_CORNER:g} "
        line += f"-{_CORNER:g}"
    line += f"H{arc.ends[-1] - _CORNER:.2f}"
    for end in arc.ends:
        line += f"M{end - _CORNER:.2f} {arc.y:g}q{_CORNER:g} 0 {_CORNER:g} {_CORNER:g}"
        line += f"V{arc.foot - 4:g}"
    heads = "".join(f"M{end:.2f} {arc.foot:g}l-3.5 -6h7z" for end in arc.ends)
    return _line("arc", arc.way, arc.title, line, heads)


def _line(name: str, way: Way, title: str, line: str, heads: str) -> str:
    stroke = STROKES[way]
    return (
        f'<g class="{name}"><title>{escape(title)}</title>'
        f'<path d="{line}" {stroke.style}/>'
        f'<path d="{heads}" fill="{stroke.colour}"/></g>'
    )


def _label(label: Label) -> str:
    style = 'text-anchor="middle" pointer-events="none"'
    return text(label.x, label.y, label.words, style)


def _rows(shown: Drawing, y: float) -> list[str]:
    """What is said of the pieces, in columns."""
    parts = []
    widths = column_widths(shown.rows)
    for n, row in enumerate(shown.rows):
        x = MARGIN
        for cell, width in zip(row, widths, strict=True):
            parts.append(text(x, y + LINE * n, cell))
            x += width
    return parts


def _legend(shown: Drawing, y: float) -> tuple[list[str], float]:
    """The ways that there are, and what fills a box; and where the drawing ends."""
    used = {part.way for part in (*shown.arrows, *shown.arcs)}
    parts: list[str] = []
    x = MARGIN
    for words in [*(way.value for way in Way if way in used), FILLED_WORDS]:
        width = 26 + width_of(words)
        if x > MARGIN and x + width > shown.width - MARGIN:
            x = MARGIN
            y += LINE
        middle = y - SIZE * 0.35
        if words == FILLED_WORDS:
            parts.append(rect(x, middle - 5, 18, 10, FILLED))
        else:
            stroke = STROKES[Way(words)].style
            parts.append(f'<path d="M{x:.2f} {middle:g}h18" {stroke}/>')
        parts.append(text(x + 24, y, words))
        x += width + 12
    return parts, y + MARGIN
