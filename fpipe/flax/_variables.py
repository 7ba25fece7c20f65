"""Checkpoints: the variables of the whole Flax model and those of its layers, into each
other.

    of the model (linen)                      of the layers
    {"params": {"layers_0": P0,               params: (P0, (), P2)
                "layers_2": P2},        <->   state:  ({"batch_stats": S0}, None, None)
     "batch_stats": {"layers_0": S0}}

In the variables of an NNX model, parameters and state of a layer stand together:
`{"layers": {0: …, 2: …}}`. What is no Flax module has its state in a collection
`"state"` of its own, in both.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import flax.core
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from fpipe._core.checks import as_bool
from fpipe._core.pytrees import PyTree
from fpipe._model.layer import Layer, without_params
from fpipe.flax._batch_norm import MOMENTS, plain_stats
from fpipe.flax._borrow import Path, keep_own
from fpipe.flax._layers import layers, sequential_name
from fpipe.flax._linen import IGNORED, STATS, LinenFunction
from fpipe.flax._nnx import NNXFunction

# The collection of the state of a layer that is no linen module.
STATE = "state"

# What the variables have of one layer, by collection.
Collections: TypeAlias = dict[str, PyTree]


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
            `pipe.place(params)` and `state=`. The state of a layer without state is
            `None`, and the parameters of one that is no Flax module are `()` if there
            are none. What is sown, and random state, is left out.

    Raises:
        TypeError: `variables` is no dict.
        ValueError: variables of no layer; a layer whose state, or an NNX module whose
            parameter, is not there.

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
            f"dicts or an nnx.State, got a {type(variables).__name__}; of an NNX model "
            "they are `nnx.state(model)`"
        )
    layout = Layout.of(found_layers)
    # Each layer takes what is its own out of `rest`. What is left belongs to nobody,
    # and says that variables and model do not fit: a renamed module, a missing layer.
    rest = layout.read(variables)
    params: list[PyTree] = []
    states: list[PyTree] = []
    not_owned: list[str] = []
    for position, layer in enumerate(found_layers):
        name = layout.name(position)
        found = {
            c: tree.pop(str(name)) for c, tree in rest.items() if str(name) in tree
        }
        own, kept = _split_layer(layer, position, found, state)
        params.append(own)
        states.append(kept)
        not_owned += [f"{layout.place(c)}/{name}" for c in found]
    for collection, tree in rest.items():
        not_owned += [f"{layout.place(collection)}/{name}" for name in tree]
    if not_owned:
        raise ValueError(
            f"`fpipe.flax.split_variables`: no layer owns {not_owned}; the layers are "
            f"{[layer.name for layer in found_layers]}"
        )
    return tuple(params), tuple(states)


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
                f"per layer, got a {type(entries).__name__}; what is packed is "
                "`pipe.gather(params)` first"
            )
        if len(entries) != len(found_layers):
            raise ValueError(
                f"`fpipe.flax.merge_variables`: {argument} has {len(entries)} entries, "
                f"but there are {len(found_layers)} layers"
            )
    layout = Layout.of(found_layers)
    variables: dict[str, PyTree] = {"layers": {}} if layout.nnx else {}
    for position, layer in enumerate(found_layers):
        merged = _merge_layer(layer, params[position], states[position], layout)
        for collection, tree in merged.items():
            place = variables.setdefault(layout.place(collection), {})
            place[layout.name(position)] = tree
    return variables


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the variables of a whole model are laid out: as those of an NNX model, or as
    those of a linen one.
    """

    nnx: bool

    @classmethod
    def of(cls, found_layers: Sequence[Layer]) -> "Layout":
        """How Flax lays out the variables of a model of these layers."""
        # One linen module is enough for linen's layout: NNX has no collections to put
        # its variables in, and linen has room for anything.
        kinds = {type(layer.apply) for layer in found_layers}
        return cls(NNXFunction in kinds and LinenFunction not in kinds)

    def place(self, collection: str) -> str:
        """Where the layers' parts of a collection stand."""
        return "layers" if self.nnx and collection == "params" else collection

    def name(self, position: int) -> str | int:
        """The name of a layer: `2`, or `"layers_2"`."""
        return position if self.nnx else sequential_name(position)

    def read(self, variables: Mapping[Any, Any]) -> dict[str, dict[str, PyTree]]:
        """The parts of the layers, by collection and name. A number is a string, as a
        file gives it back.
        """
        if not self.nnx:
            collections = flax.core.unfreeze(dict(variables))
            return {
                c: dict(tree) for c, tree in collections.items() if c not in IGNORED
            }
        if isinstance(variables, nnx.State):
            variables = nnx.to_pure_dict(variables)
        # A list of modules may have no `"layers"` around its variables.
        # `{"layers": {0: …}}` is what an `nnx.Sequential` has, `{0: …}` what a list
        # has.
        bare = {name: tree for name, tree in variables.items() if name != STATE}
        params = variables.get("layers", bare)
        state = variables.get(STATE, {})
        return {
            "params": {str(name): tree for name, tree in params.items()},
            STATE: {str(name): tree for name, tree in state.items()},
        }


def _split_layer(
    layer: Layer, position: int, found: Collections, with_state: bool
) -> tuple[PyTree, PyTree]:
    """Parameters and state of a layer, taken out of what was found of it.

    Arguments:
        found: what is not taken out has no owner.
    """
    function = layer.apply
    if isinstance(function, NNXFunction):
        return _split_nnx(layer, function, position, found, with_state)
    if isinstance(function, LinenFunction):
        params = {} if function.owns_nothing else found.pop("params", {})
        collections = [c for c in found if c != "params"]
        state = function.as_state({c: found.pop(c) for c in collections})
    else:
        params = () if without_params(layer) else found.pop("params", ())
        state = found.pop(STATE, None)
    if not with_state:
        return params, None
    # Starting with empty statistics would be a silent loss of a part of the checkpoint.
    if layer.asks("state") and _is_empty(state):
        raise ValueError(
            f"`fpipe.flax.split_variables`: layer {position} {layer.name!r} has state, "
            "but the variables have none; give the other collections beside the "
            "parameters, or say `state=False` where there are none, as of gradients "
            "and moments"
        )
    return params, None if _is_empty(state) else state


def _split_nnx(
    layer: Layer,
    function: NNXFunction,
    position: int,
    found: Collections,
    with_state: bool,
) -> tuple[PyTree, PyTree]:
    """`_split_layer` of an NNX module, whose parameters and state stand together."""
    # Parameters and state are told apart by the layer, which knows the paths of both.
    there: dict[Path, Any] = {}
    for collection in ("params", STATE):
        for path, array in flatten_dict(found.pop(collection, {})).items():
            there[_as_strings(path)] = array
    # What a deferred norm keeps beside the running statistics is empty between calls.
    for *norm, name in map(_as_strings, function.state_paths):
        mean = there.get((*norm, "mean"))
        if name in MOMENTS and mean is not None:
            there.setdefault((*norm, name), jnp.zeros_like(mean))

    def pick(wanted: Sequence[Path]) -> PyTree:
        names = {path: _as_strings(path) for path in wanted}
        missing = ["/".join(name) for name in names.values() if name not in there]
        if missing:
            raise ValueError(
                f"`fpipe.flax.split_variables`: layer {position} {layer.name!r} has "
                f"{missing}, the variables have not"
            )
        return unflatten_dict({path: there[name] for path, name in names.items()})

    # What is borrowed is stored once, with its owner.
    own = keep_own(function.borrow, function.params.tree)
    params = pick(list(flatten_dict(own)))
    if not (with_state and layer.asks("state")):
        return params, None
    return params, pick(function.state_paths)


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


def _as_strings(path: Path) -> tuple[str, ...]:
    """A path with strings for numbers, as a file gives them back."""
    return tuple(map(str, path))
