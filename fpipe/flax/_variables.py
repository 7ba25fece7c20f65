"""Checkpoints: the variables of the whole Flax model and those of its layers, into each
other.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import flax.core
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from fpipe._core.pytrees import PyTree
from fpipe._model.layer import Layer, without_params
from fpipe.flax._batch_norm import MOMENTS, plain_stats
from fpipe.flax._borrow import Path, keep_own
from fpipe.flax._layers import entry, layers
from fpipe.flax._linen import IGNORED, STATS, Linen
from fpipe.flax._nnx import NNX

# Where the state of a layer that is no linen module stands in the variables of a whole
# model.
STATE = "state"

Entry: TypeAlias = dict[
    str, PyTree
]  # what the variables have of one layer, by collection


def split_variables(
    model: Any, variables: Any, *, deferred_batch_norm: bool = False, state: bool = True
) -> tuple[tuple[PyTree, ...], tuple[PyTree, ...]]:
    """Parameters and states of the layers, from the variables of the whole Flax model.

    Arguments:
        model: what `layers` takes, or the list that it returned.
        variables: of an `nn.Sequential` `{"params": {"layers_0": …}, "batch_stats":
            {…}}`; of an `nnx.Sequential` its `nnx.state(model)`, or that as nested
            dicts `{"layers": {0: …}}`, numbers as strings too. In a list stands beside
            them what `merge_variables` makes of layers that are no Flax modules.
        deferred_batch_norm: as the pipe has it: batch norms that are deferred keep more
            in their state.
        state: `False` for what has the structure of parameters alone, such as gradients
            or the moments of an optimizer.

    Returns:
        `(params, state)`: a tuple each with one entry per layer, for
            `pipe.place(params)` and `state=`. The state of a
        layer without state is `None`, and the parameters of one that is no Flax module
        are `()` if there are none. What is sown, and random state, is left out.

    Raises:
        TypeError: `variables` is no dict.
        ValueError: variables of no layer; a layer whose state, or an NNX module whose
            parameter, is not there.

    Example:
        >>> from flax import linen as nn
        >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
        >>> params, state = fpipe.flax.split_variables(model, model.init(jax.random.key(0), jnp.ones((1, 3))))
        >>> jax.tree.map(jnp.shape, params)
        ({'bias': (4,), 'kernel': (3, 4)}, (), {'bias': (2,), 'kernel': (4, 2)})
        >>> state
        (None, None, None)
    """
    given = layers(model)
    if deferred_batch_norm:
        given = [
            one
            if one.defer is None
            else dataclasses.replace(one, apply=one.defer().apply)
            for one in given
        ]
    if not isinstance(variables, Mapping):
        raise TypeError(
            "`fpipe.flax.split_variables(model, variables)`: the variables are nested "
            "dicts or an nnx.State, got a "
            f"{type(variables).__name__}; of an NNX model they are `nnx.state(model)`"
        )
    whole = _is_nnx(given)
    collections = _collections_nnx(variables) if whole else _collections(variables)
    split, left = [], list[str]()
    for k, layer in enumerate(given):
        found = {
            c: tree.pop(name)
            for c, tree in collections.items()
            if (name := str(_place(c, k, whole)[1])) in tree
        }
        split.append(_split(layer, k, found, state))
        left += ["/".join(map(str, _place(c, k, whole))) for c in found]
    left += [
        f"{_place(c, 0, whole)[0]}/{name}"
        for c, tree in collections.items()
        for name in tree
    ]
    if left:
        raise ValueError(
            f"`fpipe.flax.split_variables`: no layer owns {left}; the layers are "
            f"{[x.name for x in given]}"
        )
    params, states = zip(*split, strict=True) if split else ((), ())
    return params, states


def merge_variables(
    model: Any, params: Sequence[PyTree], state: Sequence[PyTree] | None = None
) -> dict[str, PyTree]:
    """The variables of the whole Flax model: the inverse of `split_variables`.

    Arguments:
        model: what `layers` takes, or the list that it returned.
        params: one entry per layer: `pipe.gather(params)`, or gradients in that form.
        state: one entry per layer, or `None` to leave all states out.

    Returns:
        Of linen modules `{"params": {"layers_0": …}, "batch_stats": {…}}`; of NNX
        modules nested dicts for `nnx.update(model, …)`. Layers of a list that are no
        Flax modules have their parameters there as they are, and their state in a
        collection `"state"`; so have NNX modules in a list with linen ones.

    Raises:
        TypeError: packed parameters.
        ValueError: not one entry for each layer.

    Example:
        >>> from flax import linen as nn
        >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> again = fpipe.flax.merge_variables(model, *fpipe.flax.split_variables(model, variables))
        >>> jax.tree.structure(again) == jax.tree.structure(variables)
        True
    """
    given = layers(model)
    states = [None] * len(given) if state is None else state
    for what, entries in (("params", params), ("state", states)):
        if not isinstance(entries, Sequence):
            raise TypeError(
                f"`fpipe.flax.merge_variables`: {what} is a tuple with one entry per "
                f"layer, got a {type(entries).__name__}; "
                "what is packed is `pipe.gather(params)` first"
            )
        if len(entries) != len(given):
            raise ValueError(
                f"`fpipe.flax.merge_variables`: {what} has {len(entries)} entries, but "
                f"there are {len(given)} layers"
            )
    whole = _is_nnx(given)
    out: dict[str, PyTree] = {"layers": {}} if whole else {}
    for k, (layer, own, kept) in enumerate(zip(given, params, states, strict=True)):
        for collection, tree in _merge(layer, own, kept, whole).items():
            place, name = _place(collection, k, whole)
            out.setdefault(place, {})[name] = tree
    return out


def _is_nnx(given: Sequence[Layer]) -> bool:
    """Whether the variables are those of an NNX model."""
    kinds = {type(layer.apply) for layer in given}
    return NNX in kinds and Linen not in kinds


def _place(collection: str, k: int, whole: bool) -> tuple[str, str | int]:
    """Where the variables of a model (`whole`: of an NNX model) have a collection of
    layer `k`.
    """
    return (
        ("layers" if collection == "params" else collection, k)
        if whole
        else (collection, entry(k))
    )


def _collections(variables: Mapping[str, Any]) -> dict[str, dict[str, PyTree]]:
    """Linen's variables, by collection and layer."""
    return {
        c: dict(tree)
        for c, tree in flax.core.unfreeze(dict(variables)).items()
        if c not in IGNORED
    }


def _collections_nnx(variables: Mapping[Any, Any]) -> dict[str, dict[str, PyTree]]:
    """The same of NNX's variables; numbers are strings where a file gives them back."""
    pure = (
        nnx.to_pure_dict(variables) if isinstance(variables, nnx.State) else variables
    )
    own = pure.get(
        "layers", {name: tree for name, tree in pure.items() if name != STATE}
    )
    return {
        c: {str(k): tree for k, tree in tree.items()}
        for c, tree in (("params", own), (STATE, pure.get(STATE, {})))
    }


def _split(layer: Layer, k: int, found: Entry, state: bool) -> tuple[PyTree, PyTree]:
    """Parameters and state of a layer, taken out of what was found of it."""
    asked = state and layer.asks("state")
    if isinstance(layer.apply, NNX):
        own = list(flatten_dict(keep_own(layer.apply.borrow, layer.apply.params.tree)))
        flat: dict[Any, Any] = {
            _said(path): a
            for c in ("params", STATE)
            for path, a in flatten_dict(found.pop(c, {})).items()
        }
        # What a deferred norm keeps beside the running statistics is empty between
        # calls.
        for *norm, name in map(_said, layer.apply.rest):
            if name in MOMENTS and (mean := flat.get((*norm, "mean"))) is not None:
                flat.setdefault((*norm, name), jnp.zeros_like(mean))
        return _pick(flat, own, k, layer), _pick(
            flat, layer.apply.rest, k, layer
        ) if asked else None
    if isinstance(layer.apply, Linen):
        params = {} if layer.apply.owns_nothing else found.pop("params", {})
        kept = layer.apply.kept({c: found.pop(c) for c in list(found) if c != "params"})
    else:
        params = () if without_params(layer) else found.pop("params", ())
        kept = found.pop(STATE, None)
    if asked and _empty(kept):
        raise ValueError(
            f"`fpipe.flax.split_variables`: layer {k} {layer.name!r} has state, but "
            "the variables have none; give the other "
            "collections beside the parameters, or say `state=False` where there are "
            "none, as of gradients and moments"
        )
    return params, None if not state or _empty(kept) else kept


def _merge(layer: Layer, own: PyTree, kept: PyTree, whole: bool) -> Entry:
    """What the variables have of a layer: the inverse of `_split`."""
    if isinstance(layer.apply, NNX):
        kept = unflatten_dict(
            {
                path: a
                for path, a in flatten_dict(kept or {}).items()
                if path in layer.apply.rest
            }
        )
        if whole:
            own, kept = unflatten_dict(flatten_dict(own) | flatten_dict(kept)), None
    if isinstance(layer.apply, Linen):
        rest = {
            c: plain_stats(tree) if c == STATS else tree
            for c, tree in (kept or {}).items()
        }
    else:
        rest = {STATE: kept}
    return {c: tree for c, tree in {"params": own, **rest}.items() if not _empty(tree)}


def _empty(tree: PyTree) -> bool:
    return tree is None or (isinstance(tree, (Mapping, tuple)) and not tree)


def _said(path: Path) -> tuple[str, ...]:
    """A path with strings for numbers, as a file gives them back."""
    return tuple(map(str, path))


def _pick(
    flat: Mapping[Path, Any], wanted: Sequence[Path], k: int, layer: Layer
) -> PyTree:
    missing = ["/".join(_said(path)) for path in wanted if _said(path) not in flat]
    if missing:
        raise ValueError(
            f"`fpipe.flax.split_variables`: layer {k} {layer.name!r} has {missing}, "
            "the variables have not"
        )
    return unflatten_dict({path: flat[_said(path)] for path in wanted})
