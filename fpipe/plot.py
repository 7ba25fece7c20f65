"""Schedules and timelines through matplotlib: `pip install "fpipe[plot]"`. `import
fpipe.plot` to use it.
"""

import importlib
import itertools
import os
import pathlib
import textwrap
from typing import TYPE_CHECKING, Any

from fpipe.schedules import Schedule, Timeline, svg
from fpipe.schedules._draw.picture import IDLE, INK, LIGHTER, WORDS, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png", ".pdf")
"""What `save` writes, by the suffix of the file."""
WIDTH = 12.0
"""Of a new figure, in inches."""


def draw(
    what: Schedule | Timeline,
    ax: "Axes | None" = None,
    over: Schedule | Timeline | None = None,
) -> "Axes":
    """Draw a schedule, or a timeline, on axes of matplotlib.

    A row for each device, a box for each event with the number of its microbatch, a
    colour for each kind, lighter for the later stages of a device, as
    `fpipe.schedules.svg` draws it. `pyplot` is not used.

    Arguments:
        what: a `Schedule` (drawn with a forward of 1 and a backward of 2) or a
            `Timeline`.
        ax: axes to draw on; default those of a new figure, which is
            `draw(what).figure`.
        over: another schedule or timeline, as for `fpipe.schedules.svg`.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: neither a `Schedule` nor a `Timeline`.
        ValueError: a timeline without events, or one over another with more or fewer
            devices.
    """
    shown = picture(what, "plot.draw", over)
    patches = _matplotlib("patches")
    if ax is None:
        row = (0.36 if shown.devices <= 16 else 0.2) * (1.4 if shown.beneath else 1.0)
        figure = _matplotlib("figure").Figure(
            figsize=(WIDTH, 1.3 + row * shown.devices), layout="constrained"
        )
        _matplotlib("backends.backend_agg").FigureCanvasAgg(figure)
        ax = figure.add_subplot()
    assert ax is not None
    ax.set_xlim(0, shown.span or 1.0)
    ax.set_ylim(shown.devices - 0.5, -0.5)
    for d in range(shown.devices):
        ax.broken_barh([(0, shown.span)], (d - 0.46, 0.92), facecolors=IDLE, zorder=0)
    high = 0.64 if shown.beneath else 0.92
    for layer, top, size, style in (
        (shown.boxes, -0.46, high, {"edgecolors": "white", "linewidth": 0.4}),
        (
            shown.beneath,
            -0.44 + high,
            0.88 - high,
            {"edgecolors": INK, "linewidth": 0.4, "alpha": 0.45},
        ),
    ):
        ordered = sorted(layer, key=lambda b: (b.device, b.kind, b.chunk))
        for (d, kind, chunk), boxes in itertools.groupby(
            ordered, key=lambda b: (b.device, b.kind, b.chunk)
        ):
            spans = [(b.start, b.end - b.start) for b in boxes]
            ax.broken_barh(
                spans, (d + top, size), facecolors=shown.fill(kind, chunk), **style
            )

    box = ax.get_position()
    inches = ax.get_figure(root=True).get_size_inches()  # pyright: ignore[reportOptionalMemberAccess]
    points = 72 * box.width * inches[0] / (shown.span or 1.0)
    size = min(9.0, 72 * box.height * inches[1] / shown.devices * 0.65 * high)
    for b in shown.boxes:
        label = str(b.microbatch)
        if len(label) * size * 0.62 + 1.5 <= (b.end - b.start) * points:
            middle = (b.start + b.end) / 2
            ax.text(
                middle,
                b.device - 0.46 + high / 2,
                label,
                ha="center",
                va="center_baseline",
                fontsize=size,
                color=INK,
                clip_on=True,
            )

    ax.set_yticks(
        range(shown.devices),
        [f"device {d}" for d in range(shown.devices)],
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
    handles = [
        tuple(
            patches.Patch(color=shown.fill(kind, chunk))
            for chunk in range(shown.chunks)
        )
        for kind in shown.kinds
    ]
    words = [WORDS[kind] for kind in shown.kinds]
    if shown.chunks > 1:
        handles.append((patches.Patch(alpha=0),))
        words.append(LIGHTER)
    together = {tuple: _matplotlib("legend_handler").HandlerTuple(ndivide=None, pad=0)}
    ax.legend(
        handles, words, handler_map=together, loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=2.6,
        borderpad=0, frameon=False, ncols=len(words), fontsize=9,
    )  # fmt: skip
    return ax


def save(
    what: Schedule | Timeline,
    path: str | os.PathLike[str],
    over: Schedule | Timeline | None = None,
) -> None:
    """Draw a schedule, or a timeline, into a file.

    Arguments:
        what: a `Schedule` (drawn with a forward of 1 and a backward of 2) or a
            `Timeline`.
        path: its suffix says the form: `.svg` (without matplotlib), `.png` or `.pdf`.
        over: another schedule or timeline, as for `fpipe.schedules.svg`.

    Raises:
        ImportError: matplotlib is needed and not installed.
        TypeError: neither a `Schedule` nor a `Timeline`.
        ValueError: another suffix, a timeline without events, or one over another with
            more or fewer devices.
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
    figure.savefig(
        path, dpi=150, metadata={"CreationDate": None} if suffix == ".pdf" else None
    )


def _matplotlib(name: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        raise ImportError(
            'drawing through matplotlib needs it: pip install "fpipe[plot]"'
        ) from error
