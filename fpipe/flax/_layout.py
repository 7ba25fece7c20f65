"""The variables of a whole Flax model by their names, and which layer owns which.

In: the layers of a model, and its variables, or those of each layer. Out: those of each
layer, or of the model. Here variables are leaves by their names, so that each has one
owner:

    ("params", "layers_0", "kernel"): K       layer 0 takes it as ("kernel",): K
    ("batch_stats", "blocks", "mean"): M      layers 1 and 2 take a row each

`Available` hands them out, and `Whole` gathers them. `Layout` knows how linen and NNX
lay them out.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import empty_node, flatten_dict

from fpipe._core.pytrees import PyTree, describe, is_array, is_traced
from fpipe._model.layer import Layer
from fpipe.flax._borrow import Path
from fpipe.flax._function import ModuleFunction
from fpipe.flax._layers import sequential_name
from fpipe.flax._linen import IGNORED, LinenFunction
from fpipe.flax._nnx import NNXFunction
from fpipe.flax._places import Names, Place, as_names, in_model
from fpipe.schedules._checks import counted

# The collection of the state of a layer that is no linen module.
STATE = "state"


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
            for path, value in by_path(tree).items():
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
                    f"`fpipe.flax.split_variables`: stacked={str(place)!r} is in "
                    f"{counted(len(users), 'layer')}, but "
                    f"{self.layout.title(names)!r} is "
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
        for path, value in by_path(tree).items():
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


def by_path(tree: PyTree) -> dict[Path, Any]:
    """The leaves of nested dicts; an empty dict is one."""
    if not isinstance(tree, Mapping):
        return {(): tree}
    return flatten_dict(tree, keep_empty_nodes=True)
