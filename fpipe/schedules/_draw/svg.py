"""A timeline as SVG, written by hand.

In: a schedule or a timeline. Out: a document, from the top: the caption, a row for each
device with its boxes and labels, an axis of time, a legend. `svg(gpipe(2, 1))` shows

    device 0 [F 0]          [B 0   ]
    device 1      [F 0][B 0   ]
             0         2         4

There is no dependency, no script, no style sheet, and no `id` to clash with others.
"""

import dataclasses
import itertools
import textwrap

from fpipe.schedules._action import Kind
from fpipe.schedules._checks import shown as shown_value
from fpipe.schedules._draw.elements import (
    LETTER,
    LINE,
    MARGIN,
    SIZE,
    document,
    rect,
    text,
)
from fpipe.schedules._draw.picture import (
    IDLE,
    INK,
    LIGHTER,
    WORDS,
    Box,
    Picture,
    picture,
)
from fpipe.schedules._schedule import Schedule
from fpipe.schedules._timeline import Timeline

SMALLEST = 200
FOOT = 0.4  # of a row's height, for what is beneath, added to it
THIN = 0.3  # of a row's height, for a copy engine


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where things are, in pixels.

    Attributes:
        left: of the boxes; the names of the devices end before it.
        right: of the boxes.
        tops: of the rows.
        heights: of the rows.
        foot: the part of a height, from below, for what is beneath.
        scale: pixels a unit of time.
    """

    left: float
    right: float
    tops: tuple[float, ...]
    heights: tuple[float, ...]
    foot: float
    scale: float

    def x(self, time: float) -> float:
        """Where a time is."""
        return self.left + time * self.scale

    def foot_of(self, row: int) -> float:
        """The part of a row's height for what is beneath."""
        return self.foot * self.heights[row]


def svg(
    what: Schedule | Timeline, width: int = 960, over: Schedule | Timeline | None = None
) -> str:
    """Draw a schedule, or a timeline, as an SVG document.

    Each device has a row, and each event a box with the number of its microbatch. The
    colour of a box shows the kind of action; later stages of a device have lighter
    colours. Copies to the host and back are thin rows below their device. If launches
    take time, each launching thread has a row. A tooltip on a box has its details.

    Arguments:
        what: a `Schedule` or a `Timeline`. In a schedule a forward takes 1 unit of time
            and a backward 2.
        width: the width in pixels, at least 200. The height depends on the number of
            devices.
        over: another schedule or timeline to compare with, such as the simulation of a
            recording. It is drawn as outlines at the bottom of each row. Its time is
            scaled so that the work of both is equal.

    Returns:
        The SVG document.

    Raises:
        TypeError: `what` is neither a `Schedule` nor a `Timeline`.
        ValueError: `width` is below 200, a timeline has no events, or `what` and `over`
            have different numbers of devices.
    """
    if type(width) not in (int, float):
        raise TypeError(f"`svg(width={shown_value(width)})`: a number of pixels")
    if not width >= SMALLEST:
        raise ValueError(
            f"`svg(width={width})`: a width must be at least {SMALLEST} pixels"
        )
    shown = picture(what, "svg", over)
    # Lower rows for many devices, so that 64 of them are 704 pixels and fit a screen.
    count = len([row for row in shown.rows if not row.thin])
    height = 26.0 if count <= 16 else 17.0 if count <= 40 else 11.0
    letters = min(SIZE, height - 2)
    foot = FOOT / (1 + FOOT) if shown.beneath else 0.0
    heights = tuple(
        height * (THIN if row.thin else 1.0) / (1.0 - foot) for row in shown.rows
    )
    # SVG wraps no text and does not tell its width, so that is estimated by `LETTER`.
    caption = textwrap.wrap(
        shown.caption,
        int((width - 2 * MARGIN) / (SIZE * LETTER)),
        break_on_hyphens=False,
    )
    titles = [row.title for row in shown.rows if not row.thin]
    left = MARGIN + LETTER * letters * max(map(len, titles)) + 6
    top = MARGIN + LINE * len(caption)
    *tops, bottom = itertools.accumulate(heights, initial=top)
    layout = _Layout(
        left=left,
        right=width - MARGIN,
        tops=tuple(tops),
        heights=heights,
        foot=foot,
        scale=(width - left - MARGIN) / (shown.span or 1.0),
    )

    # Later parts lie over earlier ones: the grey of idle time, boxes, labels on them.
    parts = [
        text(MARGIN, MARGIN + SIZE + LINE * n, line) for n, line in enumerate(caption)
    ]
    for row, y, height in zip(shown.rows, tops, heights, strict=True):
        parts.append(rect(left, y + 1, width - left - MARGIN, height - 2, IDLE))
        if row.thin:
            continue
        middle = y + height / 2 + letters * 0.35
        style = f'text-anchor="end" font-size="{letters:g}"'
        parts.append(text(left - 6, middle, row.title, style))
    parts += _boxes(shown, layout)
    parts += _labels(shown, layout)
    parts += _boxes_beneath(shown, layout)
    parts += _axis(shown, layout, bottom)
    legend, height = _legend(shown, layout, bottom + 28)
    parts += legend
    return document(width, height, shown.caption, parts)


def _boxes(shown: Picture, layout: _Layout) -> list[str]:
    groups: dict[str, list[str]] = {}
    for box in shown.boxes:
        y = layout.tops[box.row] + 1
        height = layout.heights[box.row] - 2 - layout.foot_of(box.row)
        fill = shown.fill(box.kind, box.chunk)
        groups.setdefault(fill, []).append(_box(shown, box, layout, y, height))
    return _grouped(groups, style="")


def _boxes_beneath(shown: Picture, layout: _Layout) -> list[str]:
    groups: dict[str, list[str]] = {}
    for box in shown.beneath:
        foot = layout.foot_of(box.row)
        y = layout.tops[box.row] + layout.heights[box.row] - foot
        fill = shown.fill(box.kind, box.chunk)
        drawn = _box(shown, box, layout, y, max(foot - 1.5, 1.0))
        groups.setdefault(fill, []).append(drawn)
    style = f' fill-opacity="0.45" stroke="{INK}" stroke-width="0.6"'
    return _grouped(groups, style)


def _grouped(groups: dict[str, list[str]], style: str) -> list[str]:
    """A group for each fill: a document with 10^5 boxes says it once."""
    return [
        "\n".join([f'<g fill="{fill}"{style}>', *boxes, "</g>"])
        for fill, boxes in groups.items()
    ]


def _box(shown: Picture, box: Box, layout: _Layout, y: float, height: float) -> str:
    width = (box.end - box.start) * layout.scale
    # A pixel between boxes where there is room for it; what takes no time is seen
    # nevertheless.
    width = width - 1 if width > 4 else max(width, 0.5)
    return (
        f'<rect x="{layout.x(box.start):.2f}" y="{y:g}" width="{width:.2f}" '
        f'height="{height:g}"><title>{shown.tooltip(box)}</title></rect>'
    )


def _labels(shown: Picture, layout: _Layout) -> list[str]:
    # The first row is one of a device.
    height = layout.heights[0] - layout.foot_of(0)
    size = min(SIZE, height - 4)
    # Without pointer events, a pointer on a label still shows the box's tooltip.
    parts = [f'<g text-anchor="middle" font-size="{size:g}" pointer-events="none">']
    for box in shown.boxes:
        if shown.rows[box.row].thin:
            continue
        label = box.short_label
        width = (box.end - box.start) * layout.scale
        # A label that does not fit is left out: a part of `12` would be another number.
        if len(label) * size * LETTER + 2 <= width:
            x = layout.left + (box.start + box.end) / 2 * layout.scale
            y = layout.tops[box.row] + height / 2 + size * 0.35
            parts.append(text(x, y, label))
    return [*parts, "</g>"]


def _axis(shown: Picture, layout: _Layout, y: float) -> list[str]:
    parts: list[str] = []
    # A tick for each 70 pixels at most, which is room for its number.
    for time in shown.ticks(int((layout.right + MARGIN - layout.left) / 70)):
        x = layout.x(time)
        parts.append(f'<path d="M{x:.2f} {y:g}v5" stroke="{INK}"/>')
        parts.append(text(x, y + 5 + SIZE, f"{time:g}", 'text-anchor="middle"'))
    return parts


def _legend(shown: Picture, layout: _Layout, y: float) -> tuple[list[str], float]:
    """The legend, and where the picture ends."""
    fills_of: dict[str, list[str]] = {}
    for kind in shown.kinds:
        fills_of[WORDS[kind]] = _fills(shown, kind)
    if shown.chunks > 1:
        fills_of[LIGHTER] = []
    parts: list[str] = []
    x = layout.left
    # Entries go on in a new line where the next one does not fit.
    for words, fills in fills_of.items():
        width = 12 * len(fills) + 6 + len(words) * SIZE * LETTER
        if x > layout.left and x + width > layout.right:
            x = layout.left
            y += LINE
        for n, fill in enumerate(fills):
            parts.append(rect(x + 12 * n, y, 12, 12, fill))
        indent = 12 * len(fills) + 5 if fills else 0
        parts.append(text(x + indent, y + SIZE * 0.85, words))
        x += width + 12
    return parts, y + LINE + MARGIN / 2


def _fills(shown: Picture, kind: Kind) -> list[str]:
    return [shown.fill(kind, chunk) for chunk in range(shown.chunks)]
