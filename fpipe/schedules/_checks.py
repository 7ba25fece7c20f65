"""Arguments of schedules, checked.

    check_int("draw", "width", 0, 1)
        ValueError: `draw(width=0)`: width must be at least 1
    shown([1, 2])        "[1, 2]"
    shown(jnp.ones)      "a function"

An error shows numbers, strings and lists of them as they are written, and anything else
by its type.
"""

import math
import numbers
from collections.abc import Iterable, Mapping, Set
from typing import Any


def shown(value: Any) -> str:
    """A value in one short line.

    Example:
        >>> shown([1, 0.5, "a", object()])
        "[1, 0.5, 'a', an object]"
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
    return a_type(value)


def a_type(value: Any) -> str:
    """What a value is, by its type: `a Batch`, `an object`."""
    name = type(value).__name__
    # `an Unhashable`, and `a UserDict`.
    vowel = name[:1].lower() in "aeio" or name[:2].lower() == "un"
    return f"{'an' if vowel else 'a'} {name}"


def counted(number: int, noun: str, plural: str = "s") -> str:
    """A number of things; `plural` is the ending of several.

    Example:
        >>> counted(1, "stage"), counted(2, "microbatch", "es")
        ('1 stage', '2 microbatches')
    """
    return f"{number} {noun}{'' if number == 1 else plural}"


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


def read_numbers(call: str, each: str, value: Any) -> float | tuple[float, ...]:
    """A number as a float, or numbers, one per `each`, as a tuple of floats.

    Arguments:
        call: what was called, for the message.
        each: what there may be several numbers for; `""`: there may be one only.
        value: whatever was given.
    """
    # A set has no order that could be that of the stages, and a dict iterates its keys.
    several = isinstance(value, Iterable) and not isinstance(
        value, (str, bytes, Mapping, Set)
    )
    # An array of numpy without an axis is iterable by its type alone.
    if several and each and getattr(value, "ndim", 1):
        return tuple(_read_number(call, each, number) for number in value)
    return _read_number(call, each, value)


def _read_number(call: str, each: str, value: Any) -> float:
    # `Real` has the numbers of numpy and fractions too. A bool is one by accident.
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        several = f", or one number per {each}" if each else ""
        raise TypeError(f"`{call}`: a number{several}")
    if not 0.0 <= float(value) < math.inf:
        raise ValueError(f"`{call}`: finite and not negative")
    return float(value)


def read_limits(call: str, devices: int, memory: Any) -> tuple[float, ...]:
    """The memory limit of each device: one number for all, or one for each.

    Arguments:
        call: the name of what was called with `memory=`, for the message.
        devices: how many devices there are.
        memory: whatever was given.

    Example:
        >>> read_limits("offload", 2, 4)
        (4.0, 4.0)
    """
    given = f"{call}(memory={shown(memory)})"
    limits = read_numbers(given, "device", memory)
    if not isinstance(limits, tuple):
        return (limits,) * devices
    if len(limits) != devices:
        raise ValueError(
            f"`{given}`: a number for each device is needed, {devices} in all, got "
            f"{len(limits)}"
        )
    return limits
