"""The last step of a call's gradients: those of a scaled loss are divided by the scale,
and gradients of earlier calls are added.

Gradients lie where their parameters do, and a program runs on one set of devices. So
there is one program for each place. With `loss_scale=1024` and `grads=(g0, g1)`:

    in       w0 on cpu:0, w1 on cpu:1           the gradients of the scaled loss
    cpu:0    w0 / 1024 + g0
    cpu:1    w1 / 1024 + g1                     the scale is copied there

The scan executor's gradients lie on one mesh, and are grouped by their shardings.
Inside a trace there are no places: all are one group.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._core.checks import is_number
from fpipe._core.errors import shown
from fpipe._core.processes import is_here
from fpipe._core.pytrees import PyTree, describe, is_traced
from fpipe._core.settings import debugging
from fpipe._model.loss import divided, wide


def unscale_and_add(gradients: PyTree, scale: Any, given: PyTree, call: str) -> PyTree:
    """`gradients / scale + given`, on the devices where the gradients are.

    Arguments:
        gradients: arrays, `float0` arrays among them, which stay.
        scale: 0-d, or `None`.
        given: gradients of earlier calls, in the same structure, or `None`.
        call: for errors.

    Raises:
        ValueError: `given` has another structure, shape or device.
    """
    if scale is None and given is None:
        return gradients
    # By place: integer parameters have `float0` gradients, which are left alone.
    flat, tree = jax.tree.flatten(gradients)
    old = [None] * len(flat) if given is None else _checked(given, gradients, call)
    out, groups = list(flat), dict[Any, list[int]]()
    for n, g in enumerate(flat):
        if g.dtype != jax.dtypes.float0:
            groups.setdefault(None if is_traced(g) else g.sharding, []).append(n)
    for where, numbers in groups.items():
        # Another process has them, and does this.
        if where is not None and not is_here(where):
            continue
        # A scale may come from the device of the loss, or from the host.
        own = scale
        if where is not None and scale is not None and not is_traced(scale):
            own = jax.device_put(scale, _scalar(where))
        finish = _finisher(not debugging())
        made = finish([flat[n] for n in numbers], own, [old[n] for n in numbers])
        for n, value in zip(numbers, made, strict=True):
            out[n] = value
    return jax.tree.unflatten(tree, out)


def as_scale(value: Any) -> Any:
    """A loss scale as a 0-d array.

    Raises:
        TypeError: it is no real number. ValueError: it is zero, negative or not finite.
        The value of an array on a device is not checked, because that would wait for
        it.
    """
    if is_number(value) and not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"`loss_scale={shown(value)}`: a finite number more than 0; gradients are "
            "divided by it"
        )
    # A NumPy scalar is an array for `jit`, so another scale compiles nothing anew. A
    # Python float would be static here.
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return np.float32(value)
    dtype = getattr(value, "dtype", None)
    if (
        dtype is None
        or getattr(value, "shape", None) != ()
        or not jnp.issubdtype(dtype, jnp.floating)
    ):
        raise TypeError(
            f"`loss_scale={shown(value)}`: a number or a 0-d array of floats is needed"
        )
    return value


def _scalar(sharding: Any) -> Any:
    """Where a number belongs that goes with arrays of this sharding."""
    # A spec such as `P("stage")` has an axis that a 0-d array lacks: replicate it.
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding


# The new gradients were made by this call, and give their memory to the result. The
# old ones are the caller's, who may read them again.
@functools.cache
def _finisher(donating: bool) -> Callable[..., list[Any]]:
    return jax.jit(_finish, donate_argnums=(0,) if donating else ())


def _finish(new: list[Any], scale: Any, old: list[Any]) -> list[Any]:
    """The new gradients, divided and added in float32 at least, and cast once."""
    out = []
    for g, before in zip(new, old, strict=True):
        total = wide(g)
        if scale is not None:
            real = jnp.finfo(total.dtype).dtype
            total = divided(total, jnp.asarray(scale).astype(real))
        out.append((total if before is None else total + wide(before)).astype(g.dtype))
    return out


_TYPE = ("shape", "dtype")


def _checked(given: PyTree, gradients: PyTree, call: str) -> Sequence[Any]:
    """The arrays of given gradients, which fit."""
    # Here and not in `_finish`: there a wrong shape might broadcast silently, and a
    # wrong device would be an error of `jit` without the name of the parameter.
    if jax.tree.structure(given) != jax.tree.structure(gradients):
        raise ValueError(
            f"{call}: they must have the structure of the gradients, "
            f"{describe(gradients)}, got {describe(given)}; pass what "
            "an earlier call of the same pipe returned, with the same `argnums` and "
            "`frozen`"
        )
    old = jax.tree.leaves(given)
    for (path, g), before in zip(
        jax.tree_util.tree_leaves_with_path(gradients), old, strict=True
    ):
        where = f"{call}: at {jax.tree_util.keystr(path)}"
        # A Python number has no shape and no dtype.
        if (g.shape, g.dtype) != tuple(getattr(before, a, None) for a in _TYPE):
            raise ValueError(
                f"{where} they are {describe(before)}, but the gradient is "
                f"{describe(g)}"
            )
        if (
            isinstance(before, jax.Array)
            and not (is_traced(before) or is_traced(g))
            and before.sharding != g.sharding
        ):
            raise ValueError(
                f"{where} they are on {before.sharding}, but the gradient is on "
                f"{g.sharding}"
            )
    return old
