"""How far a compilation is: a function of `(done, total)`, or a bar on stderr.

compiling [###############...............] 12/24
"""

import sys
from collections.abc import Callable
from typing import TypeAlias

# How many programs are compiled, of how many.
Progress: TypeAlias = Callable[[int, int], None]


def as_progress(progress: bool | Progress | None) -> Progress | None:
    """What `Pipe.compile(progress=...)` was given, as a function or nothing."""
    # On a terminal each bar replaces the one before; a log file would keep them all.
    if progress is None:
        progress = sys.stderr.isatty()
    return (show_bar if progress else None) if isinstance(progress, bool) else progress


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
