"""How the package speaks to its user: notes on errors, and warnings.

An exception from inside a layer keeps its own type and message, whether it is JAX's or
the user's. A note says where it happened:

    ZeroDivisionError: division by zero
    fpipe: in layer 3 'norm', stage 1, microbatch 0

A warning points at the line of the user's code that called the package.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator

PREFIX = "fpipe: "


@contextlib.contextmanager
def noting(text: str) -> Iterator[None]:
    """Add `text` as a note to any exception that passes.

    Of nested contexts (a layer inside a stage inside a call) the innermost adds its
    note, as it names the place most exactly, and the others add none.
    """
    try:
        yield
    # A Ctrl-C is no `Exception`: the layer that it interrupts is not to blame.
    except Exception as error:
        add_note(error, text)
        raise


def add_note(error: BaseException, text: str) -> None:
    """Add `text` as a note, unless a note of this package is there already. Notes of
    JAX, such as that on filtered tracebacks, do not count.
    """
    if not any(note.startswith(PREFIX) for note in getattr(error, "__notes__", ())):
        error.add_note(PREFIX + text)


def entries(value: object) -> str:
    """How many entries a tuple or list has, or the type of anything else: for errors
    about values that should have one entry per layer.
    """
    if isinstance(value, (tuple, list)):
        return f"{len(value)} entries"
    return f"a {type(value).__name__}"


def warn(text: str) -> None:
    """Warn, at the line outside of this package and of JAX that led here.

    Between that line and this one there are as many frames as the call has layers of
    its own: a pull-back is called by JAX, a context manager by `contextlib`. So the
    frames are looked at and not counted. (`skip_file_prefixes` of `warnings.warn` would
    do the same, from Python 3.12 on.)
    """
    # By the names of modules and not by their files: generated code, a decorator's for
    # one, has no file to go by.
    inside = {"fpipe", "jax", "jaxlib", "contextlib", "functools"}
    level = 1
    frame = sys._getframe()
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in inside:
            break
        frame = frame.f_back
        level += 1
    warnings.warn(text, stacklevel=level)
