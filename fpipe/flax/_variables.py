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

Inside this module variables are leaves by their names, so that each has one owner:

    ("params", "layers_0", "kernel"): K       layer 0 takes it as ("kernel",): K
    ("batch_stats", "blocks", "mean"): M      layers 1 and 2 take a row each
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict

from fpipe._core.checks import as_bool
from fpipe._core.pytrees import PyTree, describe, is_array, is_traced
from fpipe._model.layer import Layer, without_params
from fpipe.flax._batch_norm import MOMENTS, plain_stats
from fpipe.flax._borrow import Path, keep_own
from fpipe.flax._function import ModuleFunction
from fpipe.flax._layers import layers, sequential_name
from fpipe.flax._linen import IGNORED, STATS, LinenFunction
from fpipe.flax._nnx import NNXFunction
from fpipe.flax._places import Names, Place, as_names, in_model

# The collection of the state of a layer that is no linen module.
STATE = "state"

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
            `deferred_batch_norm`, a module does not show its norms.

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
                f"per layer, got a {type(entries).__name__}; what is packed is "
                "`pipe.gather(params)` first"
            )
        if len(entries) != len(found_layers):
            raise ValueError(
                f"`fpipe.flax.merge_variables`: {argument} has {len(entries)} entries, "
                f"but there are {len(found_layers)} layers"
            )
    layout = Layout.of(found_layers)
    whole = Whole(found_layers, layout)
    for position, layer in enumerate(found_layers):
        collections = _merge_layer(layer, params[position], states[position], layout)
        for collection, tree in collections.items():
            whole.put(position, collection, tree)
    return whole.variables()


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the variables of a whole model are laid out: as those of an NNX model, or as
    those of a linen one.

    Attributes:
        nnx: as those of an NNX model. In the code below they are a collection
            `"params"`, as if they were linen's.
        has_state: whether a layer that is no Flax module has state.
        numbered: whether a layer has its variables by its number.
    """

    nnx: bool
    has_state: bool
    numbered: bool

    @classmethod
    def of(cls, found_layers: Sequence[Layer]) -> "Layout":
        """How Flax lays out the variables of a model of these layers."""
        # One linen module is enough for linen's layout: NNX has no collections to put
        # its variables in, and linen has room for anything.
        kinds = {type(layer.apply) for layer in found_layers}
        nnx = NNXFunction in kinds and LinenFunction not in kinds
        foreign = [x for x in found_layers if not isinstance(x.apply, ModuleFunction)]
        modules = [x.apply for x in found_layers if isinstance(x.apply, ModuleFunction)]
        return cls(
            nnx,
            has_state=any(layer.asks("state") for layer in foreign),
            numbered=bool(foreign) or not all(module.places for module in modules),
        )

    def places(self, layer: Layer, position: int) -> tuple[Place, ...]:
        """Where the variables of a layer are: as the user says, or by its number."""
        if isinstance(layer.apply, ModuleFunction) and layer.apply.places:
            return layer.apply.places
        if self.nnx:
            return (Place((), ("layers", str(position))),)
        return (Place((), (sequential_name(position),)),)

    def key(self, name: str) -> str | int:
        """A name of the user's in the dicts of the model."""
        return int(name) if self.nnx and name.isdigit() else name

    def title(self, names: Names) -> str:
        """A collection and names in it, for errors."""
        return "/".join(names[1:] if self.nnx and names[0] == "params" else names)

    def read(self, variables: Mapping[Any, Any]) -> dict[str, PyTree]:
        """The collections, as nested dicts."""
        if not self.nnx:
            collections = flax.core.unfreeze(dict(variables))
            return {c: tree for c, tree in collections.items() if c not in IGNORED}
        if isinstance(variables, nnx.State):
            kept = nnx.filter_state(variables, nnx.Not(nnx.Intermediate))
            variables = nnx.to_pure_dict(kept)
        params = {str(name): tree for name, tree in variables.items()}
        state = params.pop(STATE, {}) if self.has_state else {}
        # A list of modules may have no `"layers"` around its variables.
        # `{"layers": {0: …}}` is what an `nnx.Sequential` has, `{0: …}` what a list
        # has. The states of other layers stand beside, by number, in both.
        if self.numbered and params and all(name.isdigit() for name in params):
            params = {"layers": params}
        return {"params": params} | ({STATE: {"layers": state}} if state else {})


class Leaf(NamedTuple):
    """A variable: its path with the keys that its dicts have, and its value."""

    path: Path
    value: Any


class Available:
    """The variables of the whole model, and which layer has taken which.

    A layer asks for a collection at its places, and gets its own paths:

        {"params": {"h": {"0": {"kernel": K}}}}      at Place((), ("h", "0"))
            -> {("kernel",): K}
    """

    def __init__(
        self,
        found_layers: Sequence[Layer],
        layout: Layout,
        collections: Mapping[str, PyTree],
    ) -> None:
        self.layers = found_layers
        self.layout = layout
        self.collections = collections
        self._leaves: dict[Names, Leaf] = {}
        for collection, tree in collections.items():
            for path, value in _flat(tree).items():
                names = (collection, *as_names(path))
                self._leaves[names] = Leaf(path, value)
        # By names, the first layer that has taken it.
        self._owners: dict[Names, int] = {}
        self._rows = _rows(found_layers)

    def places(self, position: int) -> tuple[Place, ...]:
        """Where the variables of a layer are."""
        return self.layout.places(self.layers[position], position)

    def take_all(self, position: int, collection: str) -> dict[Path, Any]:
        """What is at the places of a layer, by its own paths."""
        taken = {}
        for place in self.places(position):
            start = (collection, *place.model)
            for names in [n for n in self._leaves if n[: len(start)] == start]:
                path = self._leaves[names].path[len(place.model) :]
                taken[(*place.own, *path)] = self._take(position, place, names)
        return taken

    def take(
        self, position: int, collection: str, wanted: Iterable[Path]
    ) -> tuple[dict[Path, Any], list[str]]:
        """Variables of a layer by its own paths, and the names of those that are not
        there.
        """
        taken: dict[Path, Any] = {}
        missing = []
        for path in wanted:
            found = in_model(self.places(position), as_names(path))
            names = () if found is None else (collection, *found[1])
            if found is None or names not in self._leaves:
                missing.append("/".join(as_names(path)))
            else:
                taken[path] = self._take(position, found[0], names)
        return taken, missing

    def take_tree(self, position: int, collection: str) -> PyTree:
        """What is at the place of a layer that is no Flax module, as it is; `None` if
        nothing is.
        """
        (place,) = self.places(position)
        tree = self.collections.get(collection, {})
        for name in place.model:
            tree = {str(key): inner for key, inner in tree.items()}.get(name)
            if tree is None:
                return None
        self.take_all(position, collection)
        return tree

    def check_places(self, position: int) -> None:
        """Refuse a path that leads to nothing.

        Raises:
            ValueError: it names what is there instead.
        """
        layer = self.layers[position]
        for place in self.places(position):
            starts = [(c, *place.model) for c in self.collections]
            if any(n[: len(start)] == start for n in self._leaves for start in starts):
                continue
            # The longest beginning of the path that leads somewhere.
            names, there = (), []
            for end in range(len(place.model)):
                start = place.model[:end]
                size = end + 1
                inside = [n[1:] for n in self._leaves if n[1:size] == start]
                if inside:
                    names, there = start, sorted({n[end] for n in inside if n[end:]})
            raise ValueError(
                f"`fpipe.flax.split_variables`: layer {position} {layer.name!r}: "
                f"nothing is at its path {str(place)!r}; at {'/'.join(names)!r} are "
                f"{there}"
            )

    def not_owned(self) -> list[str]:
        """What no layer has taken, each the whole part that nobody knows."""
        known = {names[:end] for names in self._owners for end in range(len(names) + 1)}
        unknown: dict[str, None] = {}
        for names in self._leaves:
            if names in self._owners or self._is_random(names):
                continue
            ends = range(2, len(names) + 1)
            parts = [names[:end] for end in ends if names[:end] not in known]
            unknown[self.layout.title(parts[0] if parts else names)] = None
        return list(unknown)

    def _is_random(self, names: Names) -> bool:
        """Whether a variable is of a random stream of NNX, which the key of a call
        makes: two stand there, `key` and `count`.
        """
        if not self.layout.nnx or names[-1] not in ("key", "count"):
            return False
        other = "count" if names[-1] == "key" else "key"
        return (*names[:-1], other) in self._leaves

    def _take(self, position: int, place: Place, names: Names) -> Any:
        """A variable, or the layer's row of it."""
        owner = self._owners.setdefault(names, position)
        if not place.stacked:
            if owner != position:
                _refuse_shared("split", self.layers, owner, position, names[1:])
            return self._leaves[names].value
        users = self._rows[place]
        if owner not in users:
            _refuse_shared("split", self.layers, owner, position, names[1:])
        number = users.index(position)

        def row(value: Any) -> Any:
            if not is_array(value) or value.shape[:1] != (len(users),):
                raise ValueError(
                    f"`fpipe.flax.split_variables`: {len(users)} layers have "
                    f"stacked={str(place)!r}, but {self.layout.title(names)!r} is "
                    f"{describe(value)}: it needs a row for each"
                )
            if isinstance(value, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(value.shape[1:], value.dtype)
            return value[number]

        return jax.tree.map(row, self._leaves[names].value)


class Whole:
    """The variables of the whole model, while layers put theirs in."""

    def __init__(self, found_layers: Sequence[Layer], layout: Layout) -> None:
        self.layers = found_layers
        self.layout = layout
        self._tree: dict[str, PyTree] = {"layers": {}} if self._bare else {}
        self._owners: dict[Names, int] = {}
        self._rows = _rows(found_layers)
        # Of what is stacked the row of each layer, by collection and path.
        self._stacked: dict[Path, tuple[Place, dict[int, Any]]] = {}

    @property
    def _bare(self) -> bool:
        """Whether the variables are those of an `nnx.Sequential`."""
        return self.layout.nnx and not any(
            place.model[:1] != ("layers",)
            for position, layer in enumerate(self.layers)
            for place in self.layout.places(layer, position)
        )

    def put(self, position: int, collection: str, tree: PyTree) -> None:
        """The variables of a layer in one collection."""
        layer = self.layers[position]
        places = self.layout.places(layer, position)
        if not isinstance(layer.apply, ModuleFunction):
            # Its variables are a pytree of any kind, which stays as it is.
            self._put_leaf(position, self._path(collection, places[0].model), tree)
            return
        for path, value in _flat(tree).items():
            found = in_model(places, as_names(path))
            if found is None:
                raise ValueError(
                    f"`fpipe.flax.merge_variables`: layer {position} {layer.name!r} "
                    f"has {'/'.join(as_names(path))!r}, for which its path= names no "
                    "place"
                )
            place = found[0]
            start = self._path(collection, place.model)
            whole = (*start, *path[len(place.own) :])
            if place.stacked:
                _, rows = self._stacked.setdefault(whole, (place, {}))
                rows[position] = value
            else:
                self._put_leaf(position, whole, value)

    def _path(self, collection: str, model: Names) -> Path:
        """A place in a collection, by the keys of the dicts."""
        keys = tuple(map(self.layout.key, model))
        if not self.layout.nnx:
            return (collection, *keys)
        # NNX has no collections, and those of other layers stand by their numbers.
        return keys if collection == "params" else (collection, *keys[1:])

    def _put_leaf(self, position: int, path: Path, value: Any) -> None:
        names = as_names(path)
        inner = self._tree
        for end, key in enumerate(path[:-1], 1):
            inner = inner.setdefault(key, {})
            owner = self._owners.get(names[:end])
            if owner is not None:
                _refuse_shared("merge", self.layers, owner, position, names[:end])
        if path[-1] in inner:
            inside = [n for n in self._owners if n[: len(names)] == names]
            owner = self._owners[inside[0]]
            _refuse_shared("merge", self.layers, owner, position, names)
        self._owners[names] = position
        inner[path[-1]] = {} if value is empty_node else value

    def variables(self) -> dict[str, PyTree]:
        """All of it, rows stacked."""
        for path, (place, rows) in self._stacked.items():
            users = self._rows[place]
            values = [rows.get(position) for position in users]
            structures = {jax.tree.structure(value) for value in values}
            if len(structures) > 1:
                names = "/".join(as_names(path))
                lacking = [k for k in users if k not in rows]
                raise ValueError(
                    f"`fpipe.flax.merge_variables`: the layers {users} have "
                    f"stacked={str(place)!r}, but {names!r} cannot be stacked: "
                    + (f"{lacking} lack it" if lacking else "structures differ")
                )
            value = values[0]
            if value is not empty_node:
                value = jax.tree.map(_stack, *values)
            self._put_leaf(users[0], path, value)
        return self._tree


def _rows(found_layers: Sequence[Layer]) -> dict[Place, list[int]]:
    """The layers that have a row each at a place, in their order."""
    users: dict[Place, list[int]] = {}
    for position, layer in enumerate(found_layers):
        if isinstance(layer.apply, ModuleFunction):
            for place in layer.apply.places:
                users.setdefault(place, []).append(position)
    return users


def _stack(*rows: Any) -> Any:
    """Rows as one array; each may be on the device of its stage."""
    first = rows[0]
    if any(row.shape != first.shape or row.dtype != first.dtype for row in rows):
        raise ValueError(
            "`fpipe.flax.merge_variables`: rows of one stack differ: "
            f"{[describe(row) for row in rows]}"
        )
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(rows), *first.shape), first.dtype)
    if all(isinstance(row, np.ndarray) for row in rows):
        return np.stack(rows)
    if not any(is_traced(row) for row in rows):
        sharding = getattr(first, "sharding", None)
        rows = tuple(jax.device_put(row, sharding) for row in rows)
    return jnp.stack(rows)


def _refuse_shared(
    what: str, found_layers: Sequence[Layer], first: int, second: int, path: Names
) -> NoReturn:
    """The error of two layers with one variable."""
    one, other = found_layers[first].name, found_layers[second].name
    raise ValueError(
        f"`fpipe.flax.{what}_variables`: layer {first} {one!r} and layer {second} "
        f"{other!r} share {'/'.join(path)!r}. If a module is used twice, write "
        "`fpipe.flax.tied(module, owner)` in the second place. If a module has only a "
        "part of what is at its path, give a sample, `fpipe.flax.layer(module, x, "
        "path=...)`, or name its parts, `path={'wte': 'transformer/wte'}`"
    )


def _flat(tree: PyTree) -> dict[Path, Any]:
    """The leaves of nested dicts; an empty dict is one."""
    if not isinstance(tree, Mapping):
        return {(): tree}
    return flatten_dict(tree, keep_empty_nodes=True)


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
            flat, lacking = available.take(position, collection, _flat(tree))
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
