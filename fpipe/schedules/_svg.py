"""A timeline as SVG, written by hand: no dependency, no script, no style sheet, no `id`
to clash with others.
"""

import html
import re
import textwrap

from fpipe.schedules._picture import IDLE, INK, LIGHTER, WORDS, Box, Picture, picture
from fpipe.schedules._schedule import Schedule
from fpipe.schedules._timeline import Timeline

FONT = "system-ui, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif"
SIZE = 12.0  # of the letters, in pixels
LETTER = 0.6  # width of a letter by its size, on the wide side
LINE = 18.0
MARGIN = 12.0
SMALLEST = 200
FOOT = 0.4  # of a row's height, for what is beneath
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def svg(
    what: Schedule | Timeline, width: int = 960, over: Schedule | Timeline | None = None
) -> str:
    """Draw a schedule, or a timeline, as an SVG document.

    A row for each device, a box for each event with the number of its microbatch, a
    colour for each kind, lighter for the later stages of a device. A pointer on a box
    shows all about it.

    Arguments:
        what: a `Schedule` (drawn with a forward of 1 and a backward of 2) or a
            `Timeline`.
        width: in pixels; the height follows from the number of devices.
        over: another schedule or timeline, such as the simulated one of what was
            recorded: outlines at the foot of each row. A unit of its time is as long as
            makes the work of both the same.

    Raises:
        TypeError: neither a `Schedule` nor a `Timeline`.
        ValueError: a width below 200, a timeline without events, or one over another
            with more or fewer devices.
    """
    if width < SMALLEST:
        raise ValueError(f"`svg(width={width})`: a width is at least {SMALLEST} pixels")
    shown = picture(what, "svg", over)
    row = 26.0 if shown.devices <= 16 else 17.0 if shown.devices <= 40 else 11.0
    small, foot = min(SIZE, row - 2), FOOT * row if shown.beneath else 0.0
    row += foot
    caption = textwrap.wrap(
        shown.caption,
        int((width - 2 * MARGIN) / (SIZE * LETTER)),
        break_on_hyphens=False,
    )
    left = MARGIN + LETTER * small * len(f"device {shown.devices - 1}") + 6
    top = MARGIN + LINE * len(caption)
    bottom = top + row * shown.devices
    scale = (width - left - MARGIN) / (shown.span or 1.0)

    out = [
        _text(MARGIN, MARGIN + SIZE + LINE * n, line) for n, line in enumerate(caption)
    ]
    for d in range(shown.devices):
        y = top + row * d
        out.append(_rect(left, y + 1, width - left - MARGIN, row - 2, IDLE))
        out.append(
            _text(
                left - 6,
                y + row / 2 + small * 0.35,
                f"device {d}",
                f'text-anchor="end" font-size="{small:g}"',
            )
        )
    out += _boxes(shown, left, top, row, foot, scale)
    out += _labels(shown, left, top, row, foot, scale)
    out += _beneath(shown, left, top, row, foot, scale)
    out += _axis(shown, left, bottom, scale, width)
    legend, height = _legend(shown, left, bottom + 28, width)
    out += legend
    size = f'width="{width}" height="{height:g}" viewBox="0 0 {width} {height:g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" '
        f'aria-label="{_escape(shown.caption)}" '
        f'font-family="{FONT}" font-size="{SIZE:g}" fill="{INK}">\n'
        f'<rect width="{width}" height="{height:g}" fill="#ffffff"/>\n'
        + "\n".join(out)
        + "\n</svg>\n"
    )


def _boxes(
    shown: Picture, left: float, top: float, row: float, foot: float, scale: float
) -> list[str]:
    groups: dict[str, list[str]] = {}
    for b in shown.boxes:
        box = _box(b, left, top + row * b.device + 1, row - 2 - foot, scale)
        groups.setdefault(shown.fill(b.kind, b.chunk), []).append(box)
    return [
        "\n".join([f'<g fill="{fill}">', *boxes, "</g>"])
        for fill, boxes in groups.items()
    ]


def _beneath(
    shown: Picture, left: float, top: float, row: float, foot: float, scale: float
) -> list[str]:
    if not shown.beneath:
        return []
    groups: dict[str, list[str]] = {}
    for b in shown.beneath:
        box = _box(b, left, top + row * (b.device + 1) - foot, foot - 1.5, scale)
        groups.setdefault(shown.fill(b.kind, b.chunk), []).append(box)
    lined = f'fill-opacity="0.45" stroke="{INK}" stroke-width="0.6"'
    return [
        "\n".join([f'<g fill="{fill}" {lined}>', *boxes, "</g>"])
        for fill, boxes in groups.items()
    ]


def _box(b: Box, left: float, y: float, high: float, scale: float) -> str:
    wide = (b.end - b.start) * scale
    # A pixel between boxes where there is room for it; what takes no time is seen
    # nevertheless.
    wide = wide - 1 if wide > 4 else max(wide, 0.5)
    x, title = left + b.start * scale, f"<title>{b.title}</title>"
    return f'<rect x="{x:.2f}" y="{y:g}" width="{wide:.2f}" height="{high:g}">{title}</rect>'


def _labels(
    shown: Picture, left: float, top: float, row: float, foot: float, scale: float
) -> list[str]:
    size = min(SIZE, row - foot - 4)
    out = [f'<g text-anchor="middle" font-size="{size:g}" pointer-events="none">']
    for b in shown.boxes:
        label = str(b.microbatch)
        if len(label) * size * LETTER + 2 <= (b.end - b.start) * scale:
            middle = left + (b.start + b.end) / 2 * scale
            out.append(
                _text(
                    middle, top + row * b.device + (row - foot) / 2 + size * 0.35, label
                )
            )
    return [*out, "</g>"]


def _axis(
    shown: Picture, left: float, y: float, scale: float, width: float
) -> list[str]:
    out = []
    for t in shown.ticks(int((width - left) / 70)):
        x = left + t * scale
        out.append(f'<path d="M{x:.2f} {y:g}v5" stroke="{INK}"/>')
        out.append(_text(x, y + 5 + SIZE, f"{t:g}", 'text-anchor="middle"'))
    return out


def _legend(
    shown: Picture, left: float, y: float, width: float
) -> tuple[list[str], float]:
    """The legend, and where the picture ends."""
    words = [
        (WORDS[kind], [shown.fill(kind, n) for n in range(shown.chunks)])
        for kind in shown.kinds
    ]
    out, x = [], left
    for text, fills in [*words, *([(LIGHTER, [])] if shown.chunks > 1 else [])]:
        long = 12 * len(fills) + 6 + len(text) * SIZE * LETTER
        if x > left and x + long > width - MARGIN:
            x, y = left, y + LINE
        out += [_rect(x + 12 * n, y, 12, 12, fill) for n, fill in enumerate(fills)]
        out.append(
            _text(x + 12 * len(fills) + (5 if fills else 0), y + SIZE * 0.85, text)
        )
        x += long + 12
    return out, y + LINE + MARGIN / 2


def _rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{height:g}" fill="{fill}"/>'


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.2f}" y="{y:.2f}"{more and " " + more}>{_escape(text)}</text>'


def _escape(text: str) -> str:
    return html.escape(NOT_XML.sub("\ufffd", text))
