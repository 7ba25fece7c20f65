"""Trees as a transformation is to see them: one entry per layer, without what it has no
business with.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fpipe._core.pytrees import (
    PyTree,
    Shape,
    Tracer,
    is_array,
    is_inexact,
    map_arrays,
    strong,
)
from fpipe._executors.scan.mesh import AXIS, by_stage
from fpipe._executors.scan.packing import Entry, Packed, Packing, Row
from fpipe._model.frozen import Frozen, spread

Path = tuple[Any, ...]


def is_packed(node: Any) -> bool:
    """Whether a node is parameters of the scan executor, or a state like them."""
    return isinstance(node, Packed)


def any_packed(tree: PyTree) -> bool:
    """Whether there are any."""
    return any(map(is_packed, jax.tree.leaves(tree, is_leaf=is_packed)))


def unpacked(tree: PyTree) -> PyTree:
    """Every `Packed` as a tuple with one pytree per layer."""

    def unpack(node: Any) -> Any:
        if not is_packed(node):
            return node
        rows = node.arrays
        return node.packing.trees(
            [
                # A row without a gradient is handed on as it is: nothing looks at it.
                rows[node.packing.where[e][0]]
                if is_empty(rows[node.packing.where[e][0]])
                else node.packing.take(rows, e)
                for e in node.packing.entries
            ]
        )

    return jax.tree.map(unpack, tree, is_leaf=is_packed)


def is_empty(array: Any) -> bool:
    """Whether a row is none: no gradient, or an update that changes nothing."""
    return getattr(array, "dtype", None) == jax.dtypes.float0 or np.ndim(array) == 0


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Which leaves of a tree a transformation sees.

    Attributes:
        paths: of all leaves.
        kept: whether it sees each.
    """

    treedef: Any
    paths: tuple[Path, ...]
    kept: tuple[bool, ...]

    @classmethod
    def of(cls, tree: PyTree, frozen: Frozen) -> "Chosen":
        """Of the unpacked parameters; what cannot be trained is passed over."""
        named, treedef = jax.tree_util.tree_flatten_with_path(tree)
        flags = [False] * len(named) if frozen is None else _flags(frozen, tree)
        kept = tuple(
            is_array(leaf) and is_inexact(leaf) and not flag
            for (_, leaf), flag in zip(named, flags, strict=True)
        )
        return cls(treedef, tuple(path for path, _ in named), kept)

    def leaves(self, tree: PyTree, what: str) -> list[Any]:
        """What another tree has in the place of each leaf."""
        try:
            return self.treedef.flatten_up_to(tree)
        except ValueError as error:
            raise ValueError(
                f"`per_stage(tx).update`: the {what} have another structure than the "
                f"parameters ({error}); both are trees "
                "as `pipe.place` gives them"
            ) from error

    def select(self, leaves: Sequence[Any]) -> list[Any]:
        """The leaves that it sees."""
        return [leaf for leaf, kept in zip(leaves, self.kept, strict=True) if kept]

    def seen(self, leaves: Sequence[Any]) -> PyTree:
        """The tree that it sees, from the leaves that it sees."""
        rest = iter(leaves)
        return self.treedef.unflatten(
            [next(rest) if kept else optax.MaskedNode() for kept in self.kept]
        )

    def fill(self, leaves: Sequence[Any], others: Sequence[Any]) -> list[Any]:
        """All leaves, from those that it sees and zeros like `others`."""
        rest = iter(leaves)
        return [
            next(rest) if kept else zero(other)
            for kept, other in zip(self.kept, others, strict=True)
        ]

    @property
    def names(self) -> list[Path]:
        """The paths of the leaves that it sees."""
        return self.select(self.paths)


def _flags(frozen: Frozen, tree: PyTree) -> list[bool]:
    try:
        return [bool(flag) for flag in spread(frozen, tree)]
    except ValueError as error:
        if callable(frozen):
            raise
        raise ValueError(
            "`per_stage(frozen=...)`: bools in the structure of the parameters, or of "
            "their first levels, are needed "
            f"({error}); the parameters are one entry per layer"
        ) from error


def zero(leaf: Any) -> Any:
    """An update that changes nothing and takes no memory; `None` where there is no
    array.
    """
    if not is_array(leaf):
        return None
    return np.zeros(
        (), leaf.dtype if isinstance(leaf.dtype, np.dtype) else jax.dtypes.float0
    )


def owners(paths: Sequence[Path], state: PyTree) -> list[int | None]:
    """For each leaf of a state the parameter that it belongs to: whose path its own
    ends with.
    """
    number = {path: n for n, path in enumerate(paths)}
    found = []
    for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]:
        ends = (number.get(path[n:]) for n in range(len(path) + 1))
        found.append(next((n for n in ends if n is not None), None))
    return found


# --- packed again ---


def mesh_of(tree: PyTree) -> Any:
    """The mesh that packed arrays lie on, in a trace too; `None` if that cannot be
    told.
    """
    for node in jax.tree.leaves(tree, is_leaf=is_packed):
        for array in node.arrays if is_packed(node) else ():
            sharding = (
                jax.typeof(array).sharding
                if isinstance(array, Tracer)
                else getattr(array, "sharding", None)
            )
            mesh = getattr(sharding, "mesh", None)
            if mesh is not None and AXIS in mesh.axis_names:
                return mesh
    return None


def lay(rows: Sequence[Any], mesh: Any) -> tuple[Any, ...]:
    """Rows over the stages of the mesh."""
    if mesh is None:
        return tuple(rows)
    sharding = by_stage(mesh)
    return tuple(
        jax.lax.with_sharding_constraint(a, sharding) if np.ndim(a) else a for a in rows
    )


def _stacked(row: Row, own: Sequence[Any]) -> Any:
    dtypes = [a.dtype for a in own if a is not None]
    dtype = max(dtypes, key=lambda d: d.itemsize)
    blocks = [
        jnp.zeros(row.shape, dtype) if a is None else row.put(a.astype(dtype))
        for a in own
    ]
    return jnp.stack(blocks)


class Template:
    """How the layers of one `Packed` are packed: states with leaves in the same places
    are packed alike.
    """

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self.number: dict[tuple[int, Path], Entry] = {}
        for k, shape in enumerate(packing.shapes):
            tree = shape.spec.fill(range(len(shape.leaves)), None)
            self.number |= {
                (k, path): (k, n)
                for path, n in jax.tree_util.tree_flatten_with_path(tree)[0]
            }

    def fits(self, node: Any) -> bool:
        """Whether a node is a tuple of layers with nothing but leaves that are
        parameters' too.
        """
        if type(node) is not tuple or len(node) != len(self.packing.shapes):
            return False
        places = [
            (k, path)
            for k, layer in enumerate(node)
            for path, _ in jax.tree_util.tree_flatten_with_path(layer)[0]
        ]
        return bool(places) and all(place in self.number for place in places)

    def packing_of(self, layers: Sequence[PyTree]) -> Packing:
        """How a tuple of layers, or the shapes of one, is packed."""
        entries: dict[Entry, Entry] = {}  # of the parameters: of the state
        for k, layer in enumerate(layers):
            for n, (path, _) in enumerate(
                jax.tree_util.tree_flatten_with_path(layer)[0]
            ):
                entries[self.number[k, path]] = (k, n)
        shapes = tuple(Shape.of(layer) for layer in layers)
        return Packing(
            shapes,
            tuple(
                row
                for old in self.packing.rows
                for row in self._rows(old, entries, shapes)
            ),
        )

    def pack(self, layers: tuple[PyTree, ...], mesh: Any) -> Packed:
        """A tuple of layers, packed; without weak types, so that a state has one
        structure in all steps.
        """
        layers = map_arrays(strong, layers)
        packing = self.packing_of(layers)
        leaves = {
            (k, n): leaf
            for k, layer in enumerate(layers)
            for n, leaf in enumerate(jax.tree.leaves(layer))
        }
        stacked = [
            _stacked(row, [None if e is None else leaves[e] for e in row.entries])
            for row in packing.rows
        ]
        return Packed(lay(stacked, mesh), packing)

    def _rows(
        self, old: Row, entries: Mapping[Entry, Entry], shapes: Sequence[Shape]
    ) -> Iterator[Row]:
        """The rows of a state for one of the parameters: one, but for states of several
        dtypes.
        """
        new = [entries.get(e) if e is not None else None for e in old.entries]
        of = {e: shapes[e[0]].leaves[e[1]] for e in new if e is not None}
        for dtype in dict.fromkeys(a.dtype for a in of.values()):
            own = tuple(
                e if e is not None and of[e].dtype == dtype else None for e in new
            )
            forms = [of[e].shape for e in own if e is not None]
            like = all(
                of[e].shape == self.packing.shape(p).shape
                for e, p in zip(own, old.entries, strict=True)
                if e is not None and p is not None
            )
            if like:
                shape = old.shape
            elif len(set(forms)) == 1:
                shape = forms[0]
            else:
                shape = (max(int(np.prod(form, dtype=np.int64)) for form in forms),)
            yield Row(shape, dtype, own)


def templates(tree: PyTree) -> list[Template]:
    """Of each `Packed` in a tree."""
    return [
        Template(node.packing)
        for node in jax.tree.leaves(tree, is_leaf=is_packed)
        if is_packed(node)
    ]


def packed_state(state: PyTree, forms: Sequence[Template], mesh: Any) -> PyTree:
    """A state with everything that is like the parameters packed like them."""

    def form(node: Any) -> Template | None:
        return next((t for t in forms if t.fits(node)), None)

    def pack(node: Any) -> Any:
        fit = form(node)
        return node if fit is None else fit.pack(node, mesh)

    return jax.tree.map(pack, state, is_leaf=lambda node: form(node) is not None)
