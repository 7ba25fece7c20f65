"""Arguments of public functions as checked values: bools, ints, numbers and names.

    as_bool("Pipe", "detect_anomaly", "yes")
        TypeError: `Pipe(detect_anomaly='yes')`: detect_anomaly is True or False
    as_int("Pipe", "chunks", 2.0)
        TypeError: `Pipe(chunks=2.0)`: chunks must be an int

Python takes any object for a truth value, and a bool for an int. Neither is what a
user means.
"""

import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any

import jax.numpy as jnp
import numpy as np

from fpipe._core.errors import shown


def is_bool(value: Any) -> bool:
    """Whether a value is a bool, of Python or of numpy, or 0 or 1."""
    return isinstance(value, (bool, np.bool_)) or (
        type(value) is int and value in (0, 1)
    )


def is_one_of(value: Any, names: Iterable[str]) -> bool:
    """Whether a value is one of some names; an array is none, and has no truth."""
    return isinstance(value, str) and value in names


def as_names(value: Iterable[str], where: str) -> tuple[str, ...]:
    """A tuple of names, or an error that says what is wrong with it.

    A string is refused although it is iterable: `stash="skip"` would declare the four
    skips "s", "k", "i" and "p".
    """
    if isinstance(value, str):
        raise TypeError(
            f"{where}: got the string {shown(value)} where a list of names belongs: "
            "write "
            f"[{shown(value)}]"
        )
    if not isinstance(value, Iterable):
        raise TypeError(f"{where}: a list of names belongs here, got {shown(value)}")
    # An iterator can be read once, so a tuple is made before anything is checked.
    result = tuple(value)
    for name in result:
        if not isinstance(name, str):
            raise TypeError(f"{where}: names must be strings, got {shown(name)}")
    if len(set(result)) < len(result):
        raise ValueError(f"{where}: a name occurs twice in {list(result)}")
    return result


def as_bool(call: str, name: str, value: Any) -> bool:
    """A switch, checked."""
    if not is_bool(value):
        raise TypeError(
            f"`{call}({name}={shown(value)})`: {name} must be True or False"
        )
    return bool(value)


def as_int(call: str, name: str, value: Any, least: int = 1) -> int:
    """A number of something, checked."""
    # `operator.index` takes NumPy's integers too, and `True`, which is refused here.
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"`{call}({name}={shown(value)})`: {name} must be an int"
        ) from None
    if number < least:
        raise ValueError(f"`{call}({name}={number})`: {name} must be at least {least}")
    return number


def is_number(value: Any) -> bool:
    """Whether a value is a real number; numpy's are, and bools are not."""
    # `True` is an int for Python; as a speed it is a mistake.
    return isinstance(value, Real) and not isinstance(value, bool)


def is_at_least(value: Any, least: float) -> bool:
    """Whether a value is a finite number, and not too small."""
    return is_number(value) and math.isfinite(value) and value >= least


def as_compute_dtype(call: str, dtype: Any, name: str = "compute_dtype") -> Any:
    """A dtype of floats, such as a model computes in, checked; `None` stays."""
    if dtype is None:
        return None
    try:
        made = jnp.dtype(dtype)
    except TypeError:
        made = None
    if made is None or not jnp.issubdtype(made, jnp.floating):
        raise TypeError(
            f"`{call}({name}={shown(dtype)})`: a floating dtype is needed, "
            "such as jnp.bfloat16"
        )
    return made
