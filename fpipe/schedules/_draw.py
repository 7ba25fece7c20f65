"""A timeline as text: one line per device, one column per unit of time."""

import itertools
import os
import statistics
import sys
import textwrap

from fpipe.schedules._action import Kind
from fpipe.schedules._picture import Box, picture
from fpipe.schedules._schedule import Schedule
from fpipe.schedules._timeline import Timeline

# For each kind two backgrounds of the 256 colours of terminals, near to those of the
# other drawings.
SHADES: dict[Kind, tuple[int, int]] = {
    "F": (75, 153),
    "B": (214, 223),
    "I": (175, 219),
    "W": (72, 157),
}
WIDEST = (
    40  # columns of the longest box, where a timeline is too long for the line anyway
)


def draw(
    what: Schedule | Timeline,
    width: int = 120,
    colour: bool | None = False,
    over: Schedule | Timeline | None = None,
    fit: bool = False,
) -> str:
    """Draw a schedule, or a timeline, for a terminal.

    Each box is as wide as its action is long; `F3` is the forward of microbatch 3.
    Where a device has several stages the stage stands before the letter. A box too
    small for that has the letter alone.

    Arguments:
        what: a `Schedule` (drawn with a forward of 1 and a backward of 2) or a
            `Timeline`.
        width: at most this many characters a line; what does not fit is cut with `…`.
        colour: a colour for each kind, with a second shade for every other stage of a
            device, or where a device has one stage, for every other microbatch; `None`:
            if standard output is a terminal and the variable `NO_COLOR` is not set.
        over: another schedule or timeline, such as the simulated one of what was
            recorded. Each device has a second line for it, in which a unit of time is
            as long as makes the work of both the same.
        fit: whether all of it is to fit into the width, with smaller boxes, rather than
            be cut.

    Raises:
        TypeError: neither a `Schedule` nor a `Timeline`.
        ValueError: a width below 1, a timeline without events, or one over another with
            more or fewer devices.

    Example:
        >>> print(fpipe.schedules.draw(fpipe.schedules.gpipe(devices=2, microbatches=2)))
        device 0 F0 F1          B0--- B1---
        device 1    F0 F1 B0--- B1---
        gpipe: makespan 9, bubble 33.3%, peak live microbatches 2, 2
    """
    if width < 1:
        raise ValueError(f"`draw(width={width})`: a width is at least 1")
    shown = picture(what, "draw", over)
    if colour is None:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    head = len(f"device {shown.devices - 1} ")
    layers = [shown.boxes, *([] if over is None else [shown.beneath])]
    labels = [
        [f"{b.stage if shown.chunks > 1 else ''}{b.kind}{b.microbatch}" for b in boxes]
        for boxes in layers
    ]
    room = width - head
    scale = _scale(shown.span, layers, labels, room)
    scale = (
        min(scale, (room - 1) / shown.span) if fit and shown.span else scale
    )  # a box has a column at least
    lines = [
        title.ljust(head)
        for d in range(shown.devices)
        for title in (f"device {d}", "over".rjust(head - 1))[: len(layers)]
    ]
    columns = (
        min(round(shown.span * scale), width) + 1
    )  # one more than fits shows that something is cut
    characters = [[" "] * columns for _ in lines]
    shades = [[0] * columns for _ in lines]
    for n, (boxes, own) in enumerate(zip(layers, labels, strict=True)):
        for label, box in zip(own, boxes, strict=True):
            row, a, b = (
                box.device * len(layers) + n,
                round(box.start * scale),
                round(box.end * scale),
            )
            if a >= columns:
                characters[row][-1] = "…"
                continue
            room = max(b - a - 1, 1)
            text = label if len(label) <= room else box.kind
            text = text.ljust(min(room, columns - a), "-")[: columns - a]
            shade = SHADES[box.kind][
                (box.chunk if shown.chunks > 1 else box.microbatch) % 2
            ]
            characters[row][a : a + len(text)] = text
            shades[row][a : a + len(text)] = [shade] * len(text)
    for n, row in enumerate(characters):
        text = lines[n] + "".join(row).rstrip()
        text = text if len(text) <= width else text[: width - 1] + "…"
        lines[n] = _paint(text, [0] * head + shades[n]) if colour else text
    return "\n".join(
        [*lines, *textwrap.wrap(shown.caption, width, break_on_hyphens=False)]
    )


def _scale(
    span: float, layers: list[tuple[Box, ...]], labels: list[list[str]], room: int
) -> float:
    """Columns a unit of time."""
    # Enough for the labels of each kind and stage in a box of that kind's usual length,
    # and a column between boxes. The usual length, not the shortest: one short event of
    # a measured timeline must not stretch all.
    sizes: dict[tuple[int, str, int], list[float]] = {}
    longest: dict[tuple[int, str, int], int] = {}
    for n, (boxes, own) in enumerate(zip(layers, labels, strict=True)):
        for label, box in zip(own, boxes, strict=True):
            of = n, box.kind, box.stage
            sizes.setdefault(of, []).append(box.end - box.start)
            longest[of] = max(longest.get(of, 0), len(label))
    usual = {
        of: m
        for of, values in sizes.items()
        if (m := statistics.median_high(values)) > 0
    }
    if not usual:
        return max(room, 1) / span if span else 1.0
    scale = max((longest[of] + 1) / size for of, size in usual.items())
    if span * scale <= room:
        return scale
    return max(room / span, min(scale, WIDEST / max(usual.values())))


def _paint(text: str, shades: list[int]) -> str:
    """Dark text on the shades, 0 for none."""
    out = []
    for shade, run in itertools.groupby(
        zip(text, shades, strict=False), key=lambda pair: pair[1]
    ):
        part = "".join(character for character, _ in run)
        out.append(f"\x1b[38;5;16;48;5;{shade}m{part}\x1b[0m" if shade else part)
    return "".join(out)
