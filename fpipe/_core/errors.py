"""Notes on errors: JAX's and the user's own types and messages stay, and where it
happened is added.
"""

import contextlib
from collections.abc import Iterator

PREFIX = "fpipe: "


@contextlib.contextmanager
def noting(text: str) -> Iterator[None]:
    """Add `text` as a note to any exception that passes, once: the innermost place is
    the one to look at.
    """
    try:
        yield
    except Exception as error:
        add_note(error, text)
        raise


def add_note(error: Exception, text: str) -> None:
    """Add `text` as a note, unless a note of ours is there already."""
    if not any(note.startswith(PREFIX) for note in getattr(error, "__notes__", ())):
        error.add_note(PREFIX + text)


def entries(value: object) -> str:
    """How many entries a tuple or list has, or what it is instead."""
    return (
        f"{len(value)} entries"
        if isinstance(value, (tuple, list))
        else f"a {type(value).__name__}"
    )
