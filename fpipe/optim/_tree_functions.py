"""Functions of trees with leaves on several devices: `apply_updates`, `global_norm`.

In: trees, placed or packed. Out: what optax computes for them. The computation is
divided over the devices: each device adds, or sums, its own leaves. The norm of two
layers:

    cpu:0    sum(g0 ** 2)  ──> cpu:0    sqrt(sum of both)
    cpu:1    sum(g1 ** 2)  ──> cpu:0
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fpipe._core.caches import Key, Recent
from fpipe._core.processes import fetch
from fpipe._core.pytrees import (
    PyTree,
    is_array,
    is_inexact,
    is_traced,
    map_arrays,
    strong,
)
from fpipe._core.settings import explicit_transfers, settings
from fpipe.optim._dispatch import Input, Output, PlacedFunction, divide
from fpipe.optim._leaf_devices import (
    array_form,
    device_of,
    first_device,
    first_of_each,
    lies_like,
    over_processes,
    parameter_devices,
    refuse_tracers,
)
from fpipe.optim._packed import any_packed, off_callers_mesh
from fpipe.optim._seen_leaves import check_donate
from fpipe.optim._update_graph import trace_update_graph

# The module keeps the plans, because these functions have no object that could. A
# training loop calls each function with one or two forms of trees.
_plans = Recent(32)

_DONATABLE = ("params", "updates")


@off_callers_mesh
def apply_updates(
    params: PyTree, updates: PyTree, donate: Iterable[str] = ()
) -> PyTree:
    """`optax.apply_updates`, compiled, on the devices of the parameters.

    Arguments:
        params: the parameters, placed or packed.
        updates: the updates, in the structure of `params`. A parameter stays the same
            if its update is not a JAX array. (`per_stage` gives a 0-d numpy zero for
            frozen and integer parameters.)

    Other Arguments:
        donate: the arguments whose memory may be reused: `"params"`, `"updates"`, or
            both. Their arrays are deleted. Default: none.

    Returns:
        The new parameters.

    Raises:
        TypeError: placed parameters are given inside `jax.jit`.
        ValueError: the structures differ, or the parameters are not placed.

    Example:
        >>> import numpy as np
        >>> import fpipe.optim
        >>> params = jax.device_put((jnp.ones(2), jnp.ones(3)), jax.devices()[0])
        >>> fpipe.optim.apply_updates(params, (jnp.ones(2), np.zeros(())))
        (Array([2., 2.], dtype=float32), Array([1., 1., 1.], dtype=float32))
    """
    names = check_donate("apply_updates", donate, _DONATABLE)
    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in named]
    try:
        changes = treedef.flatten_up_to(updates)
    except ValueError as error:
        raise ValueError(
            f"`apply_updates(params, updates)`: they have different structures: {error}"
        ) from error
    # `per_stage` gives a numpy zero where nothing changes; to add it would be a program
    # that copies the parameter.
    changing = [
        n
        for n, change in enumerate(changes)
        if isinstance(change, jax.Array)
        and is_array(leaves[n])
        and is_inexact(leaves[n])
    ]
    # Weak types go for the reason that they go in `update`: one plan for all steps.
    old = map_arrays(strong, [leaves[n] for n in changing])
    added = map_arrays(strong, [changes[n] for n in changing])
    packed = any_packed(params)
    if is_traced((old, added)):
        if not packed:
            refuse_tracers("fpipe.optim.apply_updates")
        new = _add(old, added)
    elif packed:
        new = _compiled_add("params" in names, "updates" in names)(old, added)
    else:
        paths = [named[n][0] for n in changing]
        devices = parameter_devices("apply_updates", old, paths)
        key = (
            "apply",
            settings(),
            tuple(map(array_form, old)),
            tuple(map(array_form, added)),
            names,
        )
        plan = _plans.get(Key(key), lambda: _plan_addition(old, added, devices, names))
        new = plan([*old, *added])
    for n, array in zip(changing, new, strict=True):
        leaves[n] = array
    return treedef.unflatten(leaves)


def _add(params: Sequence[Any], updates: Sequence[Any]) -> list[Any]:
    new: Any = optax.apply_updates(list(params), list(updates))
    return new


# One `jit` for each choice of what is donated, as `jit` fixes that when it is made.
@functools.cache
def _compiled_add(
    donate_params: bool, donate_updates: bool
) -> Callable[[list[Any], list[Any]], list[Any]]:
    flags = (donate_params, donate_updates)
    return jax.jit(_add, donate_argnums=tuple(n for n in (0, 1) if flags[n]))


def _plan_addition(
    params: list[Any], updates: list[Any], devices: list[Any], names: tuple[str, ...]
) -> PlacedFunction:
    arrays = [*params, *updates]
    count = len(params)
    graph = trace_update_graph(lambda *a: _add(a[:count], a[count:]), arrays)
    inputs = [Input(device, donate="params" in names) for device in devices]
    inputs += [Input(device_of(a), donate="updates" in names) for a in updates]
    outputs = [
        Output(home, lies=lies_like(like.shape, home, like))
        for home, like in zip(devices, params, strict=True)
    ]
    return divide(graph, arrays, inputs, outputs, first_device(devices))


@off_callers_mesh
def global_norm(tree: PyTree) -> Any:
    """The square root of the sum of all squares: `optax.tree.norm` of a placed tree.

    Each device sums the squares of its own leaves.

    Arguments:
        tree: gradients, updates or parameters, placed or packed. Integers and `float0`
            are not counted.

    Returns:
        A scalar. For placed trees it is on the device of the first leaf. Over several
        processes each has it, on the first of its own devices.

    Raises:
        TypeError: placed arrays are given inside `jax.jit`.

    Example:
        >>> import fpipe.optim
        >>> print(fpipe.optim.global_norm((jnp.full(2, 2.0), jnp.full(2, 2.0))))
        4.0
    """
    return _reduce("fpipe.optim.global_norm", optax.tree.norm, tree)


def all_finite(tree: PyTree) -> Any:
    """Whether no leaf has a NaN or an infinity, of leaves as for `global_norm`. A norm
    would not tell: squares overflow.
    """
    return _reduce("DynamicLossScale.adjusted", _all_finite, tree)


def _all_finite(arrays: Sequence[Any]) -> Any:
    finite = [jnp.isfinite(a).all() for a in arrays]
    return functools.reduce(jnp.logical_and, finite, jnp.bool_(True))


# One for each function there is: `global_norm` and `all_finite` have one each.
@functools.cache
def _compiled_reduction(f: Callable[[Sequence[Any]], Any]) -> Callable[..., Any]:
    return jax.jit(f)


@explicit_transfers()
def _reduce(call: str, f: Callable[[Sequence[Any]], Any], tree: PyTree) -> Any:
    """A number that is made from the leaves that can be trained, on the device of the
    first one if they are placed.
    """
    arrays = [a for a in jax.tree.leaves(tree) if is_array(a) and is_inexact(a)]
    # Rows of a `Packed` go in whole: their padding is zero, which adds nothing to a
    # norm and is finite. XLA adds up the devices' parts, in one program: of programs
    # that run at once on one mesh the collectives of CPU devices block one another.
    if any_packed(tree) or not arrays:
        return f(arrays) if is_traced(arrays) else _compiled_reduction(f)(arrays)
    if is_traced(arrays):
        refuse_tracers(call)
        return f(arrays)

    def plan() -> PlacedFunction:
        owners = [device_of(a) for a in arrays]
        first = first_device([device for device in owners if device is not None])
        graph = trace_update_graph(lambda *leaves: [f(leaves)], arrays)
        inputs = [Input(owner) for owner in owners]
        return divide(graph, arrays, inputs, [Output(first)], first)

    # The name of the call stands for `f`: each call has one.
    key = (call, settings(), tuple(map(array_form, arrays)))
    made = _plans.get(Key(key), plan)(arrays)
    owners = [device_of(a) for a in arrays]
    if over_processes(owners):
        made = fetch(made, first_of_each(owners))
    return made[0]
