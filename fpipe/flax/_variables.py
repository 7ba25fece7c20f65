"""Checkpoints: the variables of the whole Flax model and those of its layers, into each other."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.core
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from fpipe._layer import Layer
from fpipe._tree import PyTree
from fpipe.flax._batch_norm import MOMENTS, plain_stats
from fpipe.flax._borrow import Path, keep_own
from fpipe.flax._layers import entry, layers
from fpipe.flax._linen import IGNORED, STATS, Linen
from fpipe.flax._nnx import NNX


def split_variables(
    model: Any, variables: Any, *, deferred_batch_norm: bool = False
) -> tuple[tuple[PyTree, ...], tuple[PyTree, ...]]:
    """Parameters and states of the layers, from the variables of the whole Flax model.

    Arguments:
        model: what `layers` takes, or the list that it returned.
        variables: of an `nn.Sequential` `{"params": {"layers_0": …}, "batch_stats": {…}}`; of an `nnx.Sequential` its
            `nnx.state(model)`, or that as nested dicts `{"layers": {0: …}}`. What has the structure of variables, such as
            the moments of an optimizer, will do.
        deferred_batch_norm: as the pipe has it: batch norms that are deferred keep more in their state.

    Returns:
        `(params, state)`: a tuple each with one entry per layer, for `pipe.place(params)` and `state=`. The state of a
        layer without state is `None`. What is sown, and random state, is left out.

    Raises:
        ValueError: variables of no layer; a layer whose state is not there.

    Example:
        >>> from flax import linen as nn
        >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
        >>> params, state = fpipe.flax.split_variables(model, model.init(jax.random.key(0), jnp.ones((1, 3))))
        >>> jax.tree.map(jnp.shape, params)
        ({'bias': (4,), 'kernel': (3, 4)}, (), {'bias': (2,), 'kernel': (4, 2)})
        >>> state
        (None, None, None)
    """
    given = _layers(model, "split_variables")
    if deferred_batch_norm:
        given = [one if one.defer is None else dataclasses.replace(one, apply=one.defer().apply) for one in given]
    if any(isinstance(layer.apply, NNX) for layer in given):
        return _split_nnx(given, variables)
    collections = {name: dict(tree) for name, tree in flax.core.unfreeze(variables).items() if name not in IGNORED}
    params, state = list[PyTree](), list[PyTree]()
    for k, layer in enumerate(given):
        if not isinstance(layer.apply, Linen):
            params.append(())
            state.append(None)
            continue
        name = entry(k)
        params.append({} if layer.apply.owns_nothing else collections.get("params", {}).pop(name, {}))
        found = {c: tree.pop(name) for c, tree in collections.items() if c != "params" and name in tree}
        if layer.asks("state") and not found:
            raise ValueError(
                f"`fpipe.flax.split_variables`: layer {k} {layer.name!r} has state, but the variables have none under "
                f"{name!r}; they have the collections {list(collections)}"
            )
        state.append(layer.apply.kept(found) or None)
    left = [f"{c}/{name}" for c, tree in collections.items() for name in tree]
    if left:
        raise ValueError(
            f"`fpipe.flax.split_variables`: no layer owns {left}; the layers are {[x.name for x in given]}"
        )
    return tuple(params), tuple(state)


def merge_variables(model: Any, params: Sequence[PyTree], state: Sequence[PyTree] | None = None) -> dict[str, PyTree]:
    """The variables of the whole Flax model: the inverse of `split_variables`.

    Arguments:
        model: what `layers` takes, or the list that it returned.
        params: one entry per layer: `pipe.gather(params)`, or gradients in that form.
        state: one entry per layer, or `None` to leave all states out.

    Returns:
        Of linen modules `{"params": {"layers_0": …}, "batch_stats": {…}}`; of NNX modules nested dicts for
        `nnx.update(model, …)`.

    Raises:
        ValueError: not one entry for each layer.

    Example:
        >>> from flax import linen as nn
        >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> again = fpipe.flax.merge_variables(model, *fpipe.flax.split_variables(model, variables))
        >>> jax.tree.structure(again) == jax.tree.structure(variables)
        True
    """
    given = _layers(model, "merge_variables")
    states = [None] * len(given) if state is None else list(state)
    for what, entries in (("params", params), ("state", states)):
        if len(entries) != len(given):
            raise ValueError(
                f"`fpipe.flax.merge_variables`: {what} has {len(entries)} entries, but there are {len(given)} layers"
            )
    if any(isinstance(layer.apply, NNX) for layer in given):
        return _merge_nnx(given, params, states)
    out: dict[str, PyTree] = {}
    for k, (layer, own, kept) in enumerate(zip(given, params, states, strict=True)):
        if isinstance(layer.apply, Linen):
            name = entry(k)
            for collection, tree in ({"params": own} | (kept or {})).items():
                if tree:
                    out.setdefault(collection, {})[name] = plain_stats(tree) if collection == STATS else tree
    return out


def _layers(model: Any, call: str) -> list[Layer]:
    given = layers(model)
    kinds = {type(layer.apply) for layer in given} & {Linen, NNX}
    if len(kinds) > 1:
        raise ValueError(f"`fpipe.flax.{call}`: the model has linen and NNX modules; Flax has no variables for both")
    return given


def _split_nnx(given: Sequence[Layer], variables: Any) -> tuple[tuple[PyTree, ...], tuple[PyTree, ...]]:
    pure = nnx.to_pure_dict(variables) if isinstance(variables, nnx.State) else dict(variables)
    entries = pure.get("layers", pure)
    params, state = list[PyTree](), list[PyTree]()
    for k, layer in enumerate(given):
        tree = entries.get(k, entries.get(str(k), {}))
        if not isinstance(layer.apply, NNX):
            params.append(())
            state.append(None)
            continue
        needed = keep_own(layer.apply.borrow, layer.apply.params.tree)
        own = list(flatten_dict(needed))
        params.append(_pick(tree, own, k, layer))
        if not layer.asks("state"):
            state.append(None)
            continue
        # What a deferred norm keeps beside the running statistics is empty between calls.
        flat: dict[Path, Any] = flatten_dict(tree)
        missing = [path for path in layer.apply.rest if path[-1] in MOMENTS and path not in flat]
        flat |= {path: jnp.zeros_like(flat[(*path[:-1], "mean")]) for path in missing if (*path[:-1], "mean") in flat}
        state.append(_pick(unflatten_dict(flat), layer.apply.rest, k, layer))
    return tuple(params), tuple(state)


def _pick(tree: Mapping[Any, Any], wanted: Sequence[Path], k: int, layer: Layer) -> PyTree:
    flat = flatten_dict(tree)
    missing = ["/".join(map(str, path)) for path in wanted if path not in flat]
    if missing:
        raise ValueError(
            f"`fpipe.flax.split_variables`: layer {k} {layer.name!r} has {missing}, the variables have not"
        )
    return unflatten_dict({path: flat[path] for path in wanted})


def _merge_nnx(given: Sequence[Layer], params: Sequence[PyTree], states: Sequence[PyTree]) -> dict[str, PyTree]:
    out = {}
    for k, (layer, own, kept) in enumerate(zip(given, params, states, strict=True)):
        if isinstance(layer.apply, NNX):
            rest = {path: a for path, a in flatten_dict(kept or {}).items() if path in layer.apply.rest}
            flat = flatten_dict(own) | rest
            if flat:
                out[k] = unflatten_dict(flat)
    return {"layers": out}
