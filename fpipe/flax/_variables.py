"""Checkpoints: from the variables of a whole Flax model to those of its layers, and
back.

    of the model (linen)                      of the layers
    {"params": {"layers_0": P0,               params: (P0, (), P2)
                "layers_2": P2},        <->   state:  ({"batch_stats": S0}, None, None)
     "batch_stats": {"layers_0": S0}}

The variables of an NNX model have a layer's parameters and state in one place:
`{"layers": {0: …, 2: …}}`. A layer that is no Flax module has its state in a separate
collection `"state"`, for linen and for NNX. A layer with a path has its variables at
that path (`_places.py`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from fpipe._core.checks import as_bool
from fpipe._core.errors import a_type
from fpipe._core.pytrees import PyTree
from fpipe._model.layer import Layer, without_params
from fpipe.flax._batch_norm import MOMENTS, plain_stats
from fpipe.flax._borrow import keep_own
from fpipe.flax._function import ModuleFunction
from fpipe.flax._layers import layers
from fpipe.flax._layout import STATE, Available, Layout, Whole, by_path
from fpipe.flax._linen import STATS, LinenFunction
from fpipe.flax._nnx import NNXFunction
from fpipe.flax._places import as_names

# What the variables have of one layer, by collection.
Collections: TypeAlias = dict[str, PyTree]


def split_variables(
    model: Any, variables: Any, *, deferred_batch_norm: bool = False, state: bool = True
) -> tuple[tuple[PyTree, ...], tuple[PyTree, ...]]:
    """Split the variables of a whole Flax model into those of its layers.

    Arguments:
        model: a model that `layers` takes, or the list that `layers` returned. A layer
            with `path` or `stacked` takes the variables at that path, in every
            collection.
        variables: the variables of the model. For an `nn.Sequential` they are
            `{"params": {"layers_0": …}, "batch_stats": {…}}`. For an `nnx.Sequential`
            they are `nnx.state(model)`, or the same as nested dicts `{"layers": {0:
            …}}`, with numbers or strings as keys. For a list of layers, variables of
            layers that are no Flax modules are in the form of `merge_variables`.
        deferred_batch_norm: the value that the pipe has. Deferred batch norms have
            additional entries in their state.
        state: `False` if `variables` have parameters only, for example gradients or the
            moments of an optimizer.

    Returns:
        `(params, state)`: two tuples with one entry per layer, for `pipe.place(params)`
            and `state=`. The state of a layer without state is `None`. A layer that is
            no Flax module has the parameters `()` if there are none for it. Sown values
            and random state are left out.

    Raises:
        TypeError: `variables` is no dict.
        ValueError: a variable belongs to no layer, or to two. The state of a layer is
            missing, or a variable of its module is missing. Nothing is at a layer's
            path. A stack does not have one row for each of its layers. With
            `deferred_batch_norm`, there are batch statistics for a layer that does not
            know of its batch norms, because it was made without a sample `x`.

    Example:
        >>> from flax import linen as nn
        >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> params, state = fpipe.flax.split_variables(model, variables)
        >>> jax.tree.map(jnp.shape, params)
        ({'bias': (4,), 'kernel': (3, 4)}, (), {'bias': (2,), 'kernel': (4, 2)})
        >>> state
        (None, None, None)
    """
    call = "fpipe.flax.split_variables"
    as_bool(call, "deferred_batch_norm", deferred_batch_norm)
    as_bool(call, "state", state)
    found_layers = layers(model)
    if deferred_batch_norm:
        # Of a deferred layer only the function is needed: it knows its state.
        found_layers = [
            layer
            if layer.defer is None
            else dataclasses.replace(layer, apply=layer.defer().apply)
            for layer in found_layers
        ]
    if not isinstance(variables, Mapping):
        raise TypeError(
            "`fpipe.flax.split_variables(model, variables)`: the variables are nested "
            f"dicts or an nnx.State, got {a_type(variables)}; of an NNX model "
            "they are `nnx.state(model)`"
        )
    layout = Layout.of(found_layers)
    # Each layer takes what is its own. What is left belongs to nobody, and says that
    # variables and model do not fit: a renamed module, a missing layer.
    available = Available(found_layers, layout, layout.read(variables))
    params: list[PyTree] = []
    states: list[PyTree] = []
    for position, layer in enumerate(found_layers):
        own, kept = _split_layer(layer, position, available, state, deferred_batch_norm)
        params.append(own)
        states.append(kept)
    not_owned = available.not_owned()
    if not_owned:
        raise ValueError(
            f"`fpipe.flax.split_variables`: no layer owns {not_owned}; the layers are "
            f"{[layer.name for layer in found_layers]}"
        )
    return tuple(params), tuple(states)


def merge_variables(
    model: Any, params: Sequence[PyTree], state: Sequence[PyTree] | None = None
) -> dict[str, PyTree]:
    """Merge the variables of layers into those of the whole Flax model.

    This is the inverse of `split_variables`.

    Arguments:
        model: a model that `layers` takes, or the list that `layers` returned.
        params: one entry per layer: `pipe.gather(params)`, or gradients in that form.
        state: one entry per layer, or `None` to leave all states out.

    Returns:
        For linen modules, `{"params": {"layers_0": …}, "batch_stats": {…}}`. For NNX
        modules, nested dicts for `nnx.update(model, …)`. In a list, a layer that is no
        Flax module has its parameters unchanged under its own path, and its state in a
        collection `"state"`. The same holds for an NNX module in a list with linen
        modules.

    Raises:
        TypeError: `params` are packed.
        ValueError: there is not one entry for each layer, two layers have the same
            path, or the rows of a stack differ in shape or dtype.

    Example:
        >>> from flax import linen as nn
        >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> params, state = fpipe.flax.split_variables(model, variables)
        >>> again = fpipe.flax.merge_variables(model, params, state)
        >>> jax.tree.structure(again) == jax.tree.structure(variables)
        True
    """
    found_layers = layers(model)
    states = [None] * len(found_layers) if state is None else state
    for argument, entries in (("params", params), ("state", states)):
        if not isinstance(entries, Sequence):
            raise TypeError(
                f"`fpipe.flax.merge_variables`: {argument} is a tuple with one entry "
                f"per layer, got {a_type(entries)}; what is packed is "
                "`pipe.gather(params)` first"
            )
        if len(entries) != len(found_layers):
            raise ValueError(
                f"`fpipe.flax.merge_variables`: {argument} is a tuple with one entry "
                f"per layer, {len(found_layers)} in all, got {len(entries)}"
            )
    layout = Layout.of(found_layers)
    whole = Whole(found_layers, layout)
    for position, layer in enumerate(found_layers):
        collections = _merge_layer(layer, params[position], states[position], layout)
        for collection, tree in collections.items():
            whole.put(position, collection, tree)
    return whole.variables()


def _split_layer(
    layer: Layer,
    position: int,
    available: Available,
    with_state: bool,
    deferred: bool,
) -> tuple[PyTree, PyTree]:
    """Parameters and state of a layer, out of the variables of the whole model."""
    function = layer.apply
    if isinstance(function, ModuleFunction) and function.places:
        available.check_places(position)
    if isinstance(function, NNXFunction):
        return _split_nnx(layer, function, position, available, with_state)
    if isinstance(function, LinenFunction):
        params, state = _split_linen(
            layer, function, position, available, with_state, deferred
        )
    else:
        params = None
        if not without_params(layer):
            params = available.take_tree(position, "params")
        params = () if params is None else params
        state = available.take_tree(position, STATE)
    if not with_state:
        return params, None
    # Starting with empty statistics would be a silent loss of a part of the checkpoint.
    if layer.asks("state") and _is_empty(state):
        raise ValueError(
            f"`fpipe.flax.split_variables`: layer {position} {layer.name!r} has state, "
            "but the variables have none; give the other collections too, or "
            "`state=False` for variables without state, such as gradients and moments"
        )
    return params, None if _is_empty(state) else state


def _split_linen(
    layer: Layer,
    function: LinenFunction,
    position: int,
    available: Available,
    with_state: bool,
    deferred: bool,
) -> tuple[PyTree, PyTree]:
    """`_split_layer` of a linen module."""
    found: Collections = {}
    missing: list[str] = []
    if function.shapes is None:
        # Nobody knows what the module has: all that is at its place.
        for collection in available.collections:
            if collection == "params" and function.owns_nothing:
                continue
            flat = available.take_all(position, collection)
            if flat:
                found[collection] = unflatten_dict(flat)
    else:
        shapes = function.shapes
        own = keep_own(function.borrow, shapes.get("params", {}))
        for collection, tree in {**shapes, "params": own}.items():
            flat, lacking = available.take(position, collection, by_path(tree))
            if collection == "params":
                missing += [name for name in lacking if name]
            elif collection not in function.collections:
                continue  # What a module has sown is nobody's.
            elif flat:
                missing += lacking
            if flat:
                found[collection] = unflatten_dict(flat)
    if missing:
        _refuse_missing(layer, position, missing)
    params = found.pop("params", {})
    if deferred and with_state and STATS in found and not function.deferred:
        raise ValueError(
            "`fpipe.flax.split_variables(deferred_batch_norm=True)`: layer "
            f"{position} {layer.name!r} has batch statistics, but does not show the "
            "norms that they belong to: give the layers of the pipe, made with a "
            "sample, `fpipe.flax.layer(module, x)`"
        )
    return params, function.as_state(found)


def _split_nnx(
    layer: Layer,
    function: NNXFunction,
    position: int,
    available: Available,
    with_state: bool,
) -> tuple[PyTree, PyTree]:
    """`_split_layer` of an NNX module, whose parameters and state stand together."""
    # Parameters and state are told apart by the layer, which knows the paths of both.
    # What is borrowed is stored once, with its owner.
    own = list(flatten_dict(keep_own(function.borrow, function.params.tree)))
    params, missing = available.take(position, "params", own)
    collection = "params" if available.layout.nnx else STATE
    state, lacking = available.take(position, collection, function.state_paths)
    # What a deferred norm keeps beside the running statistics is empty between calls.
    for path in function.state_paths:
        mean = state.get((*path[:-1], "mean"))
        if path[-1] in MOMENTS and path not in state and mean is not None:
            state[path] = jnp.zeros_like(mean)
            lacking.remove("/".join(as_names(path)))
    wants_state = with_state and layer.asks("state")
    if missing or (wants_state and lacking):
        _refuse_missing(layer, position, missing or lacking)
    if not wants_state:
        return unflatten_dict(params), None
    # In the order of the module.
    ordered = {path: state[path] for path in function.state_paths}
    return unflatten_dict(params), unflatten_dict(ordered)


def _refuse_missing(layer: Layer, position: int, missing: Sequence[str]) -> NoReturn:
    """The error of variables that a module has and the whole model has not."""
    where = ""
    if isinstance(layer.apply, ModuleFunction) and layer.apply.places:
        where = f" at {' and '.join(repr(str(p)) for p in layer.apply.places)}"
    raise ValueError(
        f"`fpipe.flax.split_variables`: layer {position} {layer.name!r} has "
        f"{list(missing)}, which the variables lack{where}"
    )


def _merge_layer(
    layer: Layer, params: PyTree, state: PyTree, layout: Layout
) -> Collections:
    """What the variables have of a layer: the inverse of `_split_layer`."""
    function = layer.apply
    collections = {"params": params, STATE: state}
    if isinstance(function, NNXFunction):
        # A deferred norm keeps moments beside these; the model has no place for them.
        # Moments of deferred norms are empty between calls, so nothing is lost.
        flat = flatten_dict(state or {})
        flat = {path: a for path, a in flat.items() if path in function.state_paths}
        if layout.nnx:
            collections = {"params": unflatten_dict(flatten_dict(params) | flat)}
        else:
            collections[STATE] = unflatten_dict(flat)
    elif isinstance(function, LinenFunction):
        # A linen state is collections already.
        collections = {"params": params, **(state or {})}
        if STATS in collections:
            collections[STATS] = plain_stats(collections[STATS])
    return {c: tree for c, tree in collections.items() if not _is_empty(tree)}


def _is_empty(tree: PyTree) -> bool:
    """Whether a layer has nothing of that kind: `None`, `{}` or `()`."""
    return tree is None or (isinstance(tree, (Mapping, tuple)) and not tree)
