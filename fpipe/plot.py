"""Schedules and timelines, drawn by matplotlib.

`pip install "fpipe[plot]"`, and `import fpipe.plot` to use it. It draws the same
`Picture` as the drawings of `fpipe.schedules`.

    fpipe.plot.save(fpipe.schedules.gpipe(4, 8), "gpipe.png")
"""

import importlib
import itertools
import os
import pathlib
import textwrap
from typing import TYPE_CHECKING, Any

from fpipe.schedules import Kind, Schedule, Timeline, svg
from fpipe.schedules._draw.picture import (
    IDLE,
    INK,
    LIGHTER,
    WORDS,
    Box,
    Picture,
    picture,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What it imports, such as `svg`, has its home elsewhere.
__all__ = ["SUFFIXES", "WIDTH", "draw", "save"]

SUFFIXES = (".svg", ".png", ".pdf")
"""The suffixes of the files that `save` writes."""
WIDTH = 12.0
"""The width of a new figure, in inches."""
# The height of the row of a copy engine; that of a device is 1.
_THIN = 0.3


def draw(
    what: Schedule | Timeline,
    ax: "Axes | None" = None,
    over: Schedule | Timeline | None = None,
) -> "Axes":
    """Draw a schedule, or a timeline, on axes of matplotlib.

    Each device has a row, and each event a box with the number of its microbatch. The
    colour of a box shows the kind of action. The later stages of a device have lighter
    colours. `fpipe.schedules.svg` draws the same picture. `pyplot` is not used.

    Arguments:
        what: a `Schedule` or a `Timeline`. In a schedule a forward takes 1 unit of time
            and a backward 2.
        ax: the axes to draw on. Default: the axes of a new figure, which is
            `draw(what).figure`.
        over: another schedule or timeline to compare with, as for
            `fpipe.schedules.svg`.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `what` is neither a `Schedule` nor a `Timeline`.
        ValueError: the timeline has no events, or `what` and `over` have different
            numbers of devices.
    """
    shown = picture(what, "plot.draw", over)
    # Where matplotlib is missing, that is said before anything is made.
    _matplotlib("patches")
    if ax is None:
        ax = _new_axes(shown)
    ax.set_xlim(0, shown.span or 1.0)
    heights = _heights(shown)
    *tops, bottom = itertools.accumulate(heights, initial=0.0)
    ax.set_ylim(bottom, 0.0)
    for top, height in zip(tops, heights, strict=True):
        place = (top + 0.04 * height, 0.92 * height)
        ax.broken_barh([(0, shown.span)], place, facecolors=IDLE, zorder=0)
    # Of a row's height 0.92 is drawn on; what is beneath takes the foot of that.
    share = 0.64 if shown.beneath else 0.92
    plain = {"edgecolors": "white", "linewidth": 0.4}
    faint = {"edgecolors": INK, "linewidth": 0.4, "alpha": 0.45}
    _draw_boxes(ax, shown, shown.boxes, 0.04, share, plain)
    _draw_boxes(ax, shown, shown.beneath, 0.06 + share, 0.88 - share, faint)
    size = _draw_labels(ax, shown, share)
    named = [n for n, row in enumerate(shown.rows) if not row.thin]
    ax.set_yticks(
        [tops[n] + heights[n] / 2 for n in named],
        [shown.rows[n].title for n in named],
        fontsize=max(size, 5.0),
    )
    ax.set_xticks(shown.ticks(14))
    ax.tick_params(axis="y", length=0)
    for side in ("left", "right", "top"):
        ax.spines[side].set_visible(False)
    ax.set_title(
        "\n".join(textwrap.wrap(shown.caption, 120)),
        loc="left",
        fontsize=10,
        parse_math=False,
    )
    _draw_legend(ax, shown)
    return ax


def _heights(shown: Picture) -> list[float]:
    """The height of each row, in those of a device."""
    return [_THIN if row.thin else 1.0 for row in shown.rows]


def _new_axes(shown: Picture) -> "Axes":
    """Axes of a new figure that is as high as its rows need."""
    count = sum(_heights(shown))
    row = 0.36 if count <= 16 else 0.2
    if shown.beneath:
        row *= 1.4
    figure = _matplotlib("figure").Figure(
        figsize=(WIDTH, 1.3 + row * count), layout="constrained"
    )
    _matplotlib("backends.backend_agg").FigureCanvasAgg(figure)
    return figure.add_subplot()


def _draw_boxes(
    ax: "Axes",
    shown: Picture,
    boxes: tuple[Box, ...],
    top: float,
    share: float,
    style: dict[str, Any],
) -> None:
    """Draw boxes at this share of the height of their rows, from this top on."""
    heights = _heights(shown)
    tops = list(itertools.accumulate(heights, initial=0.0))
    # One collection for all boxes of a colour: one for each box would take minutes.
    groups: dict[tuple[int, Kind, int], list[tuple[float, float]]] = {}
    for box in boxes:
        group = groups.setdefault((box.row, box.kind, box.chunk), [])
        group.append((box.start, box.end - box.start))
    for (row, kind, chunk), spans in sorted(groups.items()):
        fill = shown.fill(kind, chunk)
        place = (tops[row] + top * heights[row], share * heights[row])
        ax.broken_barh(spans, place, facecolors=fill, **style)


def _draw_labels(ax: "Axes", shown: Picture, share: float) -> float:
    """Write the numbers of the microbatches where they fit; the size of the letters."""
    position = ax.get_position()
    figure = ax.get_figure(root=True)
    assert figure is not None
    inches = figure.get_size_inches()
    points = 72 * position.width * inches[0] / (shown.span or 1.0)
    heights = _heights(shown)
    tops = list(itertools.accumulate(heights, initial=0.0))
    row = 72 * position.height * inches[1] / tops[-1]
    size = min(9.0, row * 0.65 * share)
    for box in shown.boxes:
        if shown.rows[box.row].thin:
            continue
        label = box.short_label
        if len(label) * size * 0.62 + 1.5 <= (box.end - box.start) * points:
            ax.text(
                (box.start + box.end) / 2,
                tops[box.row] + 0.04 + share / 2,
                label,
                ha="center",
                va="center_baseline",
                fontsize=size,
                color=INK,
                clip_on=True,
            )
    return size


def _draw_legend(ax: "Axes", shown: Picture) -> None:
    """For each kind its colours side by side."""
    patch = _matplotlib("patches").Patch
    handles: list[tuple[Any, ...]] = []
    for kind in shown.kinds:
        fills = [shown.fill(kind, chunk) for chunk in range(shown.chunks)]
        handles.append(tuple(patch(color=fill) for fill in fills))
    words = [WORDS[kind] for kind in shown.kinds]
    if shown.chunks > 1:
        handles.append((patch(alpha=0),))
        words.append(LIGHTER)
    side_by_side = _matplotlib("legend_handler").HandlerTuple(ndivide=None, pad=0)
    ax.legend(
        handles,
        words,
        handler_map={tuple: side_by_side},
        loc="upper left",
        bbox_to_anchor=(0, 0),
        borderaxespad=2.6,
        borderpad=0,
        frameon=False,
        ncols=len(words),
        fontsize=9,
    )


def save(
    what: Schedule | Timeline,
    path: str | os.PathLike[str],
    over: Schedule | Timeline | None = None,
) -> None:
    """Draw a schedule, or a timeline, into a file.

    Arguments:
        what: a `Schedule` or a `Timeline`. In a schedule a forward takes 1 unit of time
            and a backward 2.
        path: the file. Its suffix gives the format: `.svg` (without matplotlib), `.png`
            or `.pdf`.
        over: another schedule or timeline to compare with, as for
            `fpipe.schedules.svg`.

    Raises:
        ImportError: matplotlib is needed and not installed.
        TypeError: `what` is neither a `Schedule` nor a `Timeline`.
        ValueError: the suffix is another one, the timeline has no events, or `what` and
            `over` have different numbers of devices.
        OSError: the file cannot be written.
    """
    path = pathlib.Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"`plot.save`: {str(path)!r} ends in none of {', '.join(SUFFIXES)}"
        )
    if suffix == ".svg":
        path.write_text(svg(what, over=over), encoding="utf-8")
        return
    figure: Any = draw(what, over=over).get_figure(root=True)
    # Without the date of its making the same timeline is the same file.
    metadata = {"CreationDate": None} if suffix == ".pdf" else None
    figure.savefig(path, dpi=150, metadata=metadata)


def _matplotlib(name: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        raise ImportError(
            '`fpipe.plot` draws with matplotlib: pip install "fpipe[plot]"'
        ) from error
