"""A timeline as text: one line per device, one column per unit of time.

device 0 F0 F1          B0--- B1---
device 1    F0 F1 B0--- B1---
gpipe: makespan 9, bubble 33.3%, peak live microbatches 2, 2
"""

import dataclasses
import itertools
import os
import statistics
import sys
import textwrap
from typing import NamedTuple

from fpipe.schedules._action import Kind
from fpipe.schedules._checks import check_bool, check_int
from fpipe.schedules._draw.picture import Box, Picture, Row, picture
from fpipe.schedules._schedule import Schedule
from fpipe.schedules._timeline import Timeline

# For each kind two backgrounds of the 256 colours of terminals, near to those of the
# other drawings.
SHADES: dict[Kind, tuple[int, int]] = {
    "F": (75, 153),
    "O": (145, 188),
    "L": (108, 151),
    "R": (227, 229),
    "B": (214, 223),
    "I": (175, 219),
    "W": (72, 157),
}
# Columns of the longest box, where a timeline is too long for the line anyway.
WIDEST = 40


class _Labelled(NamedTuple):
    """A box with the whole of its label."""

    box: Box
    label: str


@dataclasses.dataclass
class _Line:
    """A line of the drawing.

    Attributes:
        title: what stands before it.
        characters: one for each column.
        shades: the background of each, 0 for none.
    """

    title: str
    characters: list[str]
    shades: list[int]

    def put(self, box: Box, label: str, start: int, end: int, shade: int) -> None:
        """Draw a box from a column to another, as far as the line has them."""
        columns = len(self.characters)
        if start >= columns:
            self.characters[-1] = "…"
            return
        # A column is left free after it, but it has one at least.
        room = max(end - start - 1, 1)
        text = label if len(label) <= room else "".join(box.kinds)[:room]
        text = text.ljust(min(room, columns - start), "-")[: columns - start]
        self.characters[start : start + len(text)] = text
        self.shades[start : start + len(text)] = [shade] * len(text)


def draw(
    what: Schedule | Timeline,
    width: int = 120,
    colour: bool | None = False,
    over: Schedule | Timeline | None = None,
    fit: bool = False,
) -> str:
    """Draw a schedule, or a timeline, for a terminal.

    The width of a box is the time of its action. `F3` is the forward of microbatch 3.
    If a device has several stages, the stage is before the letter: `2F3`. A box that is
    too small for its label has only the letter. A device that copies to its host has a
    line for each direction. If launches take time, each launching thread has a line.

    Arguments:
        what: a `Schedule` or a `Timeline`. In a schedule a forward takes 1 unit of time
            and a backward 2.
        width: the largest number of characters in a line. Longer lines end in `…`.
        colour: whether each kind of action has a colour. Every other stage of a device
            has a second shade; if a device has one stage, every other microbatch has.
            `None`: only if standard output is a terminal and the environment variable
            `NO_COLOR` is not set. Default `False`.
        over: another schedule or timeline to compare with, such as the simulation of a
            recording. Each device has a second line for it. Its time is scaled so that
            the work of both is equal.
        fit: whether the boxes shrink until the whole drawing fits into `width`. Default
            `False`: long lines are cut.

    Returns:
        The drawing, as lines of text.

    Raises:
        TypeError: `what` is neither a `Schedule` nor a `Timeline`.
        ValueError: `width` is below 1, a timeline has no events, or `what` and `over`
            have different numbers of devices.

    Example:
        >>> schedule = fpipe.schedules.gpipe(devices=2, microbatches=2)
        >>> print(fpipe.schedules.draw(schedule))
        device 0 F0 F1          B0--- B1---
        device 1    F0 F1 B0--- B1---
        gpipe: makespan 9, bubble 33.3%, peak live microbatches 2, 2
    """
    check_int("draw", "width", width, 1)
    if colour is not None:
        check_bool("draw", "colour", colour)
    check_bool("draw", "fit", fit)
    shown = picture(what, "draw", over)
    if colour is None:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    layers = [_labelled(shown, shown.boxes)]
    if over is not None:
        layers.append(_labelled(shown, shown.beneath))
    title = 1 + max(len(row.title) for row in shown.rows if not row.thin)
    title = max(title, 1 + max(len(_short(row)) for row in shown.rows))
    room = width - title
    scale = _scale(shown, layers, room)
    if fit and shown.span:
        # A box has a column at least.
        scale = min(scale, (room - 1) / shown.span)
    # One more than fits shows that something is cut.
    columns = min(round(shown.span * scale), width) + 1

    # A line for each row, or two with `over`: that of the row, then that beneath.
    lines: list[_Line] = []
    for row in shown.rows:
        name = _short(row).rjust(title - 1) if row.thin else row.title
        titles = [name.ljust(title), "over".rjust(title - 1).ljust(title)]
        lines += [
            _Line(one, [" "] * columns, [0] * columns) for one in titles[: len(layers)]
        ]
    for n, layer in enumerate(layers):
        for box, label in layer:
            of_kind = box.chunk if shown.chunks > 1 else box.microbatch
            lines[box.row * len(layers) + n].put(
                box,
                label,
                start=round(box.start * scale),
                end=round(box.end * scale),
                shade=SHADES[box.kind][of_kind % 2],
            )

    texts: list[str] = []
    for line in lines:
        text = line.title + "".join(line.characters).rstrip()
        if len(text) > width:
            text = text[: width - 1] + "…"
        texts.append(_paint(text, [0] * title + line.shades) if colour else text)
    texts += textwrap.wrap(shown.caption, width, break_on_hyphens=False)
    return "\n".join(texts)


def _short(row: Row) -> str:
    """The title of a row below its device."""
    return row.title.split(" ", 2)[2] if row.thin else row.title


def _labelled(shown: Picture, boxes: tuple[Box, ...]) -> list[_Labelled]:
    labelled: list[_Labelled] = []
    for box in boxes:
        # One thread launches for all devices, so there the stage has to be told too.
        of_all = shown.is_launch(box) and len(shown.rows) > 2 * shown.threads
        several = shown.chunks > 1 or of_all
        stage = box.stage if several else ""
        label = f"{stage}{box.kind}{box.microbatch}"
        for action in box.after:
            stage = action.stage if several else ""
            label += f"+{stage}{action.kind}{action.microbatch}"
        labelled.append(_Labelled(box, label))
    return labelled


def _scale(shown: Picture, layers: list[list[_Labelled]], room: int) -> float:
    """Columns a unit of time."""
    span = shown.span
    launches: list[list[_Labelled]] = []
    actions: list[list[_Labelled]] = []
    for layer in layers:
        launches.append([one for one in layer if shown.is_launch(one.box)])
        actions.append([one for one in layer if not shown.is_launch(one.box)])
    scales = _scales(actions)
    if not scales:
        return max(room, 1) / span if span else 1.0
    scale = max(scales.values())
    # Measured launches are short: they stretch the actions to twice at most.
    for_launches = max(_scales(launches).values(), default=0.0)
    scale = max(scale, min(for_launches, 2 * scale))
    if span * scale <= room:
        return scale
    return max(room / span, min(scale, WIDEST / max(scales)))


def _scales(layers: list[list[_Labelled]]) -> dict[float, float]:
    """For the usual length of each kind of box on each stage, the columns a unit of
    time that it needs.
    """
    # Enough for the labels of each kind and stage in a box of that kind's usual length,
    # and a column between boxes. The usual length, not the shortest: one short event of
    # a measured timeline must not stretch all.
    sizes: dict[tuple[int, Kind, int], list[float]] = {}
    longest: dict[tuple[int, Kind, int], int] = {}
    for n, layer in enumerate(layers):
        for box, label in layer:
            group = (n, box.kind, box.stage)
            sizes.setdefault(group, []).append(box.end - box.start)
            longest[group] = max(longest.get(group, 0), len(label))
    scales: dict[float, float] = {}
    for group, lengths in sizes.items():
        usual = statistics.median_high(lengths)
        if usual > 0:
            scale = (longest[group] + 1) / usual
            scales[usual] = max(scale, scales.get(usual, 0.0))
    return scales


def _paint(text: str, shades: list[int]) -> str:
    """Dark text on the shades, 0 for none."""
    painted: list[str] = []
    start = 0
    for shade, columns in itertools.groupby(shades[: len(text)]):
        end = start + len(list(columns))
        part = text[start:end]
        if shade:
            part = f"\x1b[38;5;16;48;5;{shade}m{part}\x1b[0m"
        painted.append(part)
        start = end
    return "".join(painted)
