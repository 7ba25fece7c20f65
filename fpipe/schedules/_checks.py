"""Arguments of schedules, checked; and how an error shows what a user gave: numbers,
strings and lists of them as they are written, anything else by its type.
"""

import math
from typing import Any


def shown(value: Any) -> str:
    """A value in one short line.

    Example:
        >>> shown([1, 0.5, "a", object()])
        "[1, 0.5, 'a', a object]"
    """
    # Not `repr`: that of an array or of a foreign object may fill pages.
    if isinstance(value, (list, tuple)):
        entries = [shown(v) for v in value[:16]] + ["…"] * (len(value) > 16)
        text = ", ".join(entries) + "," * (isinstance(value, tuple) and len(value) == 1)
        return f"({text})" if isinstance(value, tuple) else f"[{text}]"
    if isinstance(value, (set, frozenset)) and value:
        return "{" + shown(list(value))[1:-1] + "}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{shown(k)}: …" for k in list(value)[:16]) + "}"
    if value is None or isinstance(value, (int, float, complex, str, bytes)):
        text = repr(value)
        return text if len(text) <= 200 else text[:199] + "…"
    return f"a {type(value).__name__}"


def check_type(call: str, value: Any, kind: type) -> None:
    """Refuse what is of another type."""
    if not isinstance(value, kind):
        raise TypeError(f"{call}: a {kind.__name__} is needed, got {shown(value)}")


def check_int(call: str, name: str, value: Any, least: int) -> None:
    """Refuse what is no int, or too small."""
    if type(value) is not int:  # a bool is none
        raise TypeError(f"`{call}({name}={shown(value)})`: {name} must be an int")
    if value < least:
        raise ValueError(f"`{call}({name}={value})`: {name} must be at least {least}")


def check_bool(call: str, name: str, value: Any) -> None:
    """Refuse what is no switch."""
    if type(value) is not bool and not (type(value) is int and value in (0, 1)):
        raise TypeError(
            f"`{call}({name}={shown(value)})`: {name} must be True or False"
        )


def check_positive(call: str, name: str, value: Any) -> None:
    """Refuse what is no finite number, or not more than 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number:
        raise TypeError(f"`{call}({name}={shown(value)})`: {name} must be a number")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"`{call}({name}={value})`: {name} must be finite and more than 0"
        )
