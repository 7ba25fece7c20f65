"""Numbers with units, and tables, as text and for notebooks.

size(3 * 2**20)          3 MiB
quantity(2.5e9, "FLOP")  2.5 GFLOP
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from fpipe.schedules._html import escape

# Of a table in a notebook: however large a model is, the notebook stays small.
MOST_ROWS = 64
MOST_CHARACTERS = 256

# The largest first: a value is told in the first unit that it is not less than.
_BYTES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
# FLOPs by powers of ten and bytes by powers of two, as vendors and allocators tell
# them.
_FLOP = (
    (1e15, "PFLOP"),
    (1e12, "TFLOP"),
    (1e9, "GFLOP"),
    (1e6, "MFLOP"),
    (1e3, "kFLOP"),
    (1.0, "FLOP"),
)
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def byte_unit(count: float) -> tuple[int, str]:
    """The unit in which so many bytes are readable, and its name."""
    return next((unit for unit in _BYTES if count >= unit[0]), _BYTES[-1])


def size(count: float) -> str:
    """Bytes with their unit."""
    unit, name = byte_unit(count)
    return f"{count / unit:.3g} {name}"


def scaled(value: float, unit: str) -> tuple[float, str]:
    """A scale in which FLOPs, or seconds, are readable, and its name."""
    scales = _FLOP if unit == "FLOP" else _SECONDS
    return next((scale for scale in scales if value >= scale[0]), scales[-1])


def quantity(value: float, unit: str) -> str:
    """FLOPs, or seconds, with their unit."""
    scale, name = scaled(value, unit)
    return f"{value / scale:.3g} {name}"


def option_name(option: Any) -> str:
    """What a schedule or a checkpoint mode is called: by itself, by its name, or by the
    name of the function that it is.
    """
    if isinstance(option, str):
        return option
    return str(getattr(option, "name", getattr(option, "__name__", option)))


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells of text in columns; those that are empty are left out.

    Arguments:
        left: the columns that are aligned to the left.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Collection[int] = ()

    @property
    def _kept(self) -> list[int]:
        # A column that is empty says nothing, such as the skips of a model without.
        return [n for n in range(len(self.head)) if any(row[n] for row in self.rows)]

    def __str__(self) -> str:
        """Columns as wide as they need to be."""
        widths = {
            n: max(len(row[n]) for row in (self.head, *self.rows)) for n in self._kept
        }
        lines = []
        for row in (self.head, *self.rows):
            cells = [
                row[n].ljust(width) if n in self.left else row[n].rjust(width)
                for n, width in widths.items()
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def html(self) -> str:
        """The same for a notebook, at most `MOST_ROWS` rows of it."""
        lines = [self._html_row("th", self.head)]
        lines += [self._html_row("td", row) for row in self.rows[:MOST_ROWS]]
        text = "\n".join(["<table>", *lines, "</table>"])
        left_out = len(self.rows) - MOST_ROWS
        return f"{text}\n<p>and {left_out} more</p>" if left_out > 0 else text

    def _html_row(self, tag: str, row: Sequence[str]) -> str:
        cells = []
        for n in self._kept:
            side = "left" if n in self.left else "right"
            text = row[n]
            if len(text) > MOST_CHARACTERS:
                text = f"{text[: MOST_CHARACTERS - 1]}…"
            cells.append(f'<{tag} style="text-align:{side}">{escape(text)}</{tag}>')
        return f"<tr>{''.join(cells)}</tr>"
