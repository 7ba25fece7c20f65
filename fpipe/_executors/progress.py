"""Reports how far a compilation is: to a function of `(done, total)`, or as a bar on
stderr.

compiling [###############...............] 12/24
"""

import sys
from collections.abc import Callable
from typing import TypeAlias

from fpipe._core.errors import shown

# How many programs are compiled, of how many.
Progress: TypeAlias = Callable[[int, int], None]


def as_progress(progress: bool | Progress | None) -> Progress | None:
    """What `Pipe.compile(progress=...)` was given, as a function or nothing."""
    # On a terminal each bar replaces the one before; a log file would keep them all.
    if progress is None:
        progress = sys.stderr.isatty()
    if isinstance(progress, bool):
        return show_bar if progress else None
    if not callable(progress):
        raise TypeError(
            f"`pipe.compile(progress={shown(progress)})`: True, False, or a function "
            "`f(done, total)`"
        )
    return progress


def show_bar(done: int, total: int) -> None:
    """Draw the bar over the one before."""
    full = 30 * done // max(total, 1)
    end = "\n" if done == total else ""
    print(
        f"\rcompiling [{'#' * full}{'.' * (30 - full)}] {done}/{total}",
        end=end,
        file=sys.stderr,
        flush=True,
    )
