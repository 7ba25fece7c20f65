"""Static leaves: which leaves of a pytree may be constants of a program.

What is no array goes to every microbatch as it is, and a compiled program is kept for
its value. So it has to compare by value. Of the inputs

    {"image": array, "mode": "train", "batch": Batch(array)}

the string is a static leaf. The object compares by identity, so a program would keep
the array that is in it today: it is refused, with what to write instead.
"""

import dataclasses
import enum
import functools
import types
from collections.abc import Iterable, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._core.errors import a_type
from fpipe._core.pytrees import PyTree, is_array

# JAX makes one object for equal values of these, or there is one of each anyway.
_JAX_VALUES = (
    jax.sharding.PartitionSpec,
    jax.sharding.Mesh,
    jax.sharding.AbstractMesh,
    jax.sharding.Sharding,
    jax.Device,
)
_VALUES = (bool, int, float, complex, str, bytes, range, enum.Enum, type, np.dtype)
_SINGLETONS = (None, ..., NotImplemented)

# Functions that bind nothing: whether two of them are the same is told by identity.
_PLAIN_FUNCTIONS = (
    types.FunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
    np.ufunc,
)


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why a value cannot be static.

    Attributes:
        value: what is wrong: the leaf itself, or something in it.
        why: what is wrong with it.
        cure: what to write instead.
        held: how the leaf has the value: `"that binds"`, for example.
    """

    value: Any
    why: str
    cure: str
    held: str = ""


def find_fault(value: Any) -> Fault | None:
    """Why a leaf that is no array cannot be static; `None` if it can.

    This is the one place of the rule. A static leaf is hashable and compares by value.
    Functions are static too, as long as all that they bind is.
    """
    if isinstance(value, (*_VALUES, *_JAX_VALUES)) or any(
        value is one for one in _SINGLETONS
    ):
        return None
    if isinstance(value, functools.partial):
        bound = (value.func, *value.args, *value.keywords.values())
        return _first_fault(bound, "that binds")
    if isinstance(value, (types.MethodType, types.MethodWrapperType)):
        return _first_fault((value.__self__,), "that binds")
    if isinstance(value, types.BuiltinFunctionType):
        owner = value.__self__  # of a function of a module, the module
        if isinstance(owner, types.ModuleType):
            return None
        return _first_fault((owner,), "that binds")
    wrapped = getattr(value, "__wrapped__", None)
    if callable(value) and wrapped is not None:
        # What `jax.jit`, `jax.vmap` and decorators return.
        return _first_fault((wrapped,), "around")
    if isinstance(value, _PLAIN_FUNCTIONS):
        return None
    if _is_data(value):
        return Fault(
            value,
            "its values may change",
            "give an array as a leaf of its own; convert one of another library by "
            "`numpy.asarray(...)`",
        )
    if not _is_hashable(value):
        return Fault(value, "it cannot be hashed", _cure(value))
    # A class says how it compares, or it compares by identity.
    kind = type(value)
    if kind.__eq__ is object.__eq__ or kind.__hash__ is object.__hash__:
        return Fault(value, "it compares by identity", _cure(value))
    if isinstance(value, (tuple, frozenset)):
        return _first_fault(value, "that holds")
    if dataclasses.is_dataclass(value):
        compared = [f.name for f in dataclasses.fields(value) if f.compare]
        held = [getattr(value, name, None) for name in compared]
        return _first_fault(held, "that holds")
    return None


def _first_fault(values: Iterable[Any], held: str) -> Fault | None:
    """The first fault of what a value has."""
    for value in values:
        fault = find_fault(value)
        if fault is not None:
            # Of several steps to the value the first: the leaf is what the user gave.
            return dataclasses.replace(fault, held=held)
    return None


def _is_foreign_array(value: Any) -> bool:
    """Whether a value is an array of another library: their `==` compares element by
    element, and some hash by identity.
    """
    return any(
        hasattr(value, name) for name in ("__array__", "__jax_array__", "__dlpack__")
    )


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _cure(value: Any) -> str:
    """What to write in place of a value that is no static leaf."""
    kind = type(value).__name__
    if isinstance(value, Set):
        return "give a tuple or a frozenset"
    if isinstance(value, Mapping):
        return "give `dict(...)` of it, which is a pytree"
    if isinstance(value, (list, tuple)):
        return "bind tuples of values"
    if dataclasses.is_dataclass(value):
        return (
            "if it holds arrays, make it a pytree, once: "
            f"`jax.tree_util.register_dataclass({kind})`; if it holds none, make it "
            "constant: `@dataclasses.dataclass(frozen=True)`"
        )
    # The names of its arrays, so that the line can be pasted.
    attributes = getattr(value, "__dict__", {}).items()
    names = [name for name, v in attributes if any(map(_is_data, jax.tree.leaves(v)))]
    arrays = " ".join(f"v.{name}," for name in names or ["array"])
    return (
        "if it holds arrays, make it a pytree, once: "
        f"`jax.tree_util.register_pytree_node({kind}, lambda v: (({arrays}), None), "
        f"lambda _, arrays: {kind}(*arrays))`, or give the arrays alone, in a tuple or "
        "a dict; if it holds none, make it a frozen dataclass, or let the function "
        "that reads it close over it"
    )


def _is_data(value: Any) -> bool:
    return is_array(value) or _is_foreign_array(value)


def check_leaves(tree: PyTree, name: str, where: str = "") -> None:
    """Refuse leaves that are neither arrays that JAX takes nor static.

    Arguments:
        name: of the tree; a leaf in it is `x['image']`.
        where: what stands before the name in errors.

    Raises:
        TypeError: a leaf that is neither; it says what to write.
    """
    leaves = jax.tree.leaves(tree)
    if all(map(_fits, leaves)):
        return
    # Paths are made for the error alone: they cost more than the check.
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        at = f"{where}`{name}{jax.tree_util.keystr(path)}`"
        if is_array(leaf) and not _has_dtype(leaf):
            raise TypeError(
                f"{at} is an array of {leaf.dtype}, a dtype that JAX does not have: "
                "its arrays hold numbers, booleans or keys. Leave it out. If it is the "
                "same for all rows, a static leaf will do, such as a tuple of strings"
            )
        fault = None if is_array(leaf) else find_fault(leaf)
        if fault is None:
            continue
        if fault.value is leaf:
            what = f"{a_type(leaf)}, no pytree of arrays"
        else:
            bound = "an array" if is_array(fault.value) else a_type(fault.value)
            what = f"{a_type(leaf)} {fault.held} {bound}"
        raise TypeError(
            f"{at} is {what}, and cannot be a static leaf, a constant of the programs: "
            f"{fault.why}; {fault.cure}"
        )


def _fits(leaf: Any) -> bool:
    return _has_dtype(leaf) if is_array(leaf) else find_fault(leaf) is None


def _has_dtype(leaf: Any) -> bool:
    """Whether JAX has arrays of a leaf's dtype; numpy has arrays of strings too."""
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return True
    dtype = leaf.dtype
    return (
        bool(jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_))
        or dtype == jax.dtypes.float0
    )
