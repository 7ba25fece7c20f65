"""How the package speaks to its user: notes on errors, and warnings.

An exception from inside a layer keeps its own type and message, whether it is JAX's or
the user's. A note says where it happened:

    ZeroDivisionError: division by zero
    fpipe: in layer 3 'norm', stage 1, microbatch 0

A warning points at the line of the user's code that called the package.
"""

import contextlib
import enum
import functools
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

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
    """Add `text` as a note, unless a note of this package is there already, or in the
    text of the error: JAX makes text of what a callback raises. Notes of JAX, such as
    that on filtered tracebacks, do not count.
    """
    said = [*getattr(error, "__notes__", ()), *str(error).splitlines()]
    if not any(line.startswith(PREFIX) for line in said):
        error.add_note(PREFIX + text)


def entries(value: object) -> str:
    """How many entries a tuple or list has, or the type of anything else: for errors
    about values that should have one entry per layer.
    """
    if isinstance(value, (tuple, list)):
        return "1 entry" if len(value) == 1 else f"{len(value)} entries"
    return a_type(value)


def a_type(value: object) -> str:
    """What a value is, by its type: `a Batch`, `the class Batch`, `a function`."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    # `an Unhashable`, and `a UserDict`.
    vowel = name[:1].lower() in "aeio" or name[:2].lower() == "un"
    return f"{'an' if vowel else 'a'} {name}"


def shown(value: object) -> str:
    """A value that a user gave, in one short line: numbers, strings, dtypes and small
    containers of them as they are written, arrays by their shape, anything else by its
    type or name.

    Example:
        >>> shown([1, "a", jnp.ones((2, 3))])
        "[1, 'a', float32[2,3]]"
    """
    # Not `repr`: that of an array or of a foreign object may fill pages, or hold what
    # nobody wants in a log.
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple) and dtype is not None:
        if isinstance(value, np.generic):
            return _short(repr(value))
        return f"{dtype}[{','.join(map(str, shape))}]"
    known = (bool, int, float, complex, str, bytes, enum.Enum, range, np.dtype)
    if value is None or value is ... or isinstance(value, known):
        return _short(repr(value))
    if type(value) in (tuple, list, set, frozenset):
        return _container(value)
    if type(value) is dict:
        items = list(value.items())
        inside = [f"{shown(k)}: {shown(v)}" for k, v in items[:_SHOWN]]
        return _short("{" + ", ".join(inside + ["…"] * (len(items) > _SHOWN)) + "}")
    if isinstance(value, type):
        # A scalar type of numpy or JAX is a dtype.
        known = hasattr(value, "dtype")
        return value.__name__ if known else a_type(value)
    if hasattr(value, "device_kind"):
        return repr(value)  # a device of JAX
    if isinstance(value, functools.partial):
        return f"functools.partial({shown(value.func)}, ...)"
    if callable(value) and isinstance(getattr(value, "__name__", None), str):
        return f"the function {value.__name__}"
    return a_type(value)


_SHOWN = 16  # entries of a container that an error shows


def _container(value: Any) -> str:
    entries = [shown(v) for v, _ in zip(value, range(_SHOWN), strict=False)]
    if len(value) > _SHOWN:
        entries.append("…")
    text = ", ".join(entries)
    if isinstance(value, tuple):
        return _short(f"({text}{',' * (len(value) == 1)})")
    if isinstance(value, list):
        return _short(f"[{text}]")
    braced = "{" + text + "}" if value else "set()"
    return _short(f"frozenset({braced})" if isinstance(value, frozenset) else braced)


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:199] + "…"


# Whose lines are not the user's: by folders of packages.
_LIBRARIES = ("jax", "jaxlib", "numpy", "fpipe", "flax", "optax", "equinox", "haiku")
_STDLIB = os.path.dirname(os.__file__) + os.sep


def user_line(frames: Iterable[tuple[str, int, str]]) -> str:
    """The innermost line that is not of a library for models, or of Python's own.

    Arguments:
        frames: file, line and function of each, the innermost first.

    Returns:
        `model.py:12 (attention)`, the file as seen from the working directory; `""` if
        there is no such line.

    Example:
        >>> user_line([("/x/site-packages/jax/a.py", 3, "f"), ("model.py", 12, "g")])
        'model.py:12 (g)'
    """
    own = os.path.dirname(os.path.dirname(__file__)) + os.sep
    for file, line, function in frames:
        _, installed, inside = file.partition(f"site-packages{os.sep}")
        package = inside.partition(os.sep)[0]
        if (
            package in _LIBRARIES
            if installed
            else file.startswith((own, _STDLIB, "<frozen"))
        ):
            continue
        near = file.removeprefix(os.getcwd() + os.sep)
        return f"{near}:{line} ({function.rpartition('.')[2]})"
    return ""


def at_line(line: str) -> str:
    """A line within a sentence: ` at model.py:12 (attention)`; `""` if it is
    unknown.
    """
    return f" at {line}" if line else ""


def line_of(error: BaseException) -> str:
    """The user's line that an exception comes from; `""` if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    return user_line((f.filename, f.lineno or 0, f.name) for f in reversed(frames))


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
