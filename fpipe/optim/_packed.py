"""`fpipe.Packed` trees as an optimizer needs them: leaf by leaf, and packed again.

This is the one module of `fpipe.optim` that knows how the scan executor lays parameters
over a mesh. Every device holds a *block* of each *row*; two layers of different size on
two devices, and a moment of them, are

    parameters   row 0: | device 0: w of layer 0 | device 1: w of layer 1, padded |
    moment       row 1: | device 0: moment 0     | device 1: moment 1, padded     |

A transformation is shown the four leaves; `Cell`s remember where each lies. Its results
are packed like the parameters again, if they have leaves in the same places.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._core.meshes import AnyMesh, set_aside
from fpipe._core.pytrees import (
    PyTree,
    Shape,
    Tracer,
    float0_like,
    is_array,
    map_arrays,
    pack,
    shapes_of,
    strong,
)
from fpipe._executors.scan.mesh import by_stage
from fpipe._executors.scan.packing import Entry, Packing
from fpipe._executors.scan.packing import Packed as Packed
from fpipe._executors.scan.packing import Row as Row
from fpipe._executors.scan.storage import as_stored as as_stored
from fpipe._executors.scan.storage import from_stored as from_stored
from fpipe._executors.scan.storage import stored_shape as stored_shape
from fpipe._executors.stage_places import AXIS as AXIS
from fpipe._model.function_layers import OwnTree
from fpipe._model.specs import WHOLE, spec_without_axis
from fpipe.optim._seen_leaves import Path, SeenLeaves, leaf_name, no_update

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def is_packed(node: Any) -> bool:
    """Whether a node is parameters of the scan executor, or a state like them."""
    return isinstance(node, Packed)


def any_packed(tree: PyTree) -> bool:
    """Whether any part of a tree is a `Packed`."""
    return bool(packed_nodes(tree))


def packed_nodes(tree: PyTree) -> list[Packed]:
    nodes = jax.tree.leaves(tree, is_leaf=is_packed)
    return [node for node in nodes if isinstance(node, Packed)]


def mesh_of(tree: PyTree) -> AnyMesh | None:
    """The mesh that packed arrays lie on, in a trace too; `None` if that cannot be
    told.
    """
    for node in packed_nodes(tree):
        for array in node.arrays:
            # In a trace the sharding is part of the type, and its mesh is an
            # `AbstractMesh`; `shard_map` takes both kinds.
            sharding = (
                jax.typeof(array).sharding
                if isinstance(array, Tracer)
                else getattr(array, "sharding", None)
            )
            mesh = getattr(sharding, "mesh", None)
            if mesh is not None and AXIS in mesh.axis_names:
                return mesh
    return None


def off_callers_mesh(f: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """A function of trees that lie on devices of their own, whatever mesh its caller
    has in JAX's context.
    """

    @functools.wraps(f)
    def run(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        with set_aside(lambda: mesh_of((args, kwargs))):
            return f(*args, **kwargs)

    return run


def _is_empty(array: Any) -> bool:
    """Whether a row has no blocks: no gradient, or an update that changes nothing."""
    return getattr(array, "dtype", None) == jax.dtypes.float0 or np.ndim(array) == 0


def unpack_tree(tree: PyTree) -> PyTree:
    """Every `Packed` as the tree that it stands for, such as a tuple of layers."""

    def unpack(node: Any) -> Any:
        if not isinstance(node, Packed):
            return node
        leaves = []
        for entry in node.packing.shown_entries:
            row = node.arrays[node.packing.where[entry][0]]
            if not node.has_gradient(entry):
                leaves.append(float0_like(node.packing.shape(entry)))
            else:
                # A row without blocks is handed on as it is: nothing looks at it.
                leaves.append(
                    row if _is_empty(row) else node.packing.take(node.arrays, entry)
                )
        return node.packing.shown_spec.unpack(leaves)

    return jax.tree.map(unpack, tree, is_leaf=is_packed)


def shapes_unpacked(tree: PyTree) -> PyTree:
    """The shapes of a tree, packed or not, as they are when it is unpacked."""
    return shapes_of(
        jax.tree.map(
            lambda node: (
                node.packing.shown_shapes if isinstance(node, Packed) else node
            ),
            tree,
            is_leaf=is_packed,
        )
    )


def constrain_to_stages(
    rows: Sequence[Any], forms: Sequence[Row], mesh: AnyMesh | None
) -> tuple[Any, ...]:
    """Rows, laid over the stages of the mesh, and cut as their forms say."""
    if mesh is None:
        return tuple(rows)
    return tuple(
        jax.lax.with_sharding_constraint(row, by_stage(mesh, form.spec))
        if np.ndim(row)
        else row
        for row, form in zip(rows, forms, strict=True)
    )


# --- in: leaves, and where they lie ---


@dataclasses.dataclass(frozen=True)
class Cell:
    """Where a leaf lies: in a device's block of a row.

    Attributes:
        row: the number of the row in `Rows.arrays`.
        device: the device.
        form: how the row is made.
        shape: that of the leaf.
    """

    row: int
    device: int
    form: Row
    shape: tuple[int, ...]

    def take(self, blocks: Sequence[Any]) -> Any:
        """The leaf, from the blocks that its device has of all rows."""
        return self.form.take(blocks[self.row], self.shape)


class PackedLeaf(jax.ShapeDtypeStruct):
    """The shape of a leaf that lies in a cell.

    To JAX it is a shape like any other, so that packed trees are traced and checked by
    the code that placed trees are. The cell travels along with it.
    """

    def __init__(self, shape: Any, dtype: Any, cell: Cell) -> None:
        super().__init__(shape, dtype)
        self.cell = cell


class Rows:
    """The rows of some trees.

    Arguments:
        spread: whether an update that changes nothing, which is one zero for all
            devices, is shown as zeros of its shape, each device's own.

    Attributes:
        arrays: the rows, in the order in which trees were added.
    """

    def __init__(self, spread: bool = False) -> None:
        self.arrays: list[Any] = []
        self._spread = spread

    def add(self, tree: PyTree) -> PyTree:
        """The tree unpacked, with a `PackedLeaf` for every leaf of a `Packed`."""
        return jax.tree.map(
            lambda node: self._shown(node) if isinstance(node, Packed) else node,
            tree,
            is_leaf=is_packed,
        )

    def _shown(self, node: Packed) -> PyTree:
        packing = node.packing
        # Trees are added one after the other (parameters, state, gradients), so a row
        # has one number in its own `Packed` and another one here.
        number: dict[int, int] = {}
        for r, array in enumerate(node.arrays):
            float0 = getattr(array, "dtype", None) == jax.dtypes.float0
            if not _is_empty(array) or (self._spread and not float0):
                number[r] = len(self.arrays)
                self.arrays.append(array)
        leaves = []
        for entry in packing.shown_entries:
            r, device = packing.where[entry]
            if not node.has_gradient(entry):
                leaves.append(float0_like(packing.shape(entry)))
            elif r in number:
                shape = packing.shape(entry).shape
                cell = Cell(number[r], device, packing.rows[r], shape)
                leaves.append(PackedLeaf(shape, node.arrays[r].dtype, cell))
            else:
                leaves.append(node.arrays[r])  # It is not trained.
        return packing.shown_spec.unpack(leaves)


# --- out: rows, and what each device has in them ---


@dataclasses.dataclass(frozen=True)
class PackedOutput:
    """A `Packed` to be made.

    Attributes:
        packing: its form.
        numbers: for each row the output that each device has in its block, if any.
        absent: the leaves that are `float0`: there is no gradient.
    """

    packing: Packing
    numbers: tuple[tuple[int | None, ...], ...]
    absent: frozenset[Entry] = frozenset()

    @classmethod
    def of(
        cls,
        packing: Packing,
        number: Mapping[Entry, int],
        absent: Iterable[Entry] = (),
    ) -> "PackedOutput":
        """From the number of the output for each leaf."""
        return cls(
            packing,
            tuple(
                tuple(None if e is None else number.get(e) for e in row.entries)
                for row in packing.rows
            ),
            frozenset(absent),
        )

    def packed(self, made: Sequence[Any]) -> Packed:
        """The `Packed`, from its rows; `None`: one in which nothing is."""
        kept = {r for r, array in enumerate(made) if array is not None}
        rows = []
        for array, row in zip(made, self.packing.rows, strict=True):
            if array is not None:
                rows.append(array)
            elif self.absent.issuperset(filter(None, row.entries)):
                shape = (len(row.entries), *row.shape)
                rows.append(np.zeros(shape, jax.dtypes.float0))
            else:
                rows.append(no_update(jax.ShapeDtypeStruct((), row.dtype)))
        # As in `Parameters.pack_gradients`: a row that is `float0` says so itself.
        absent = {e for e in self.absent if self.packing.where[e].row in kept}
        return Packed(tuple(rows), self.packing, frozenset(absent))


@dataclasses.dataclass(frozen=True)
class NoGradient:
    """What stands for a `float0` leaf in a trace, where it is static.

    Attributes:
        shape: of the leaf.
    """

    shape: tuple[int, ...]


def without_float0(tree: PyTree) -> PyTree:
    """A tree with a `NoGradient` for each `float0` leaf, which JAX cannot trace."""
    return jax.tree.map(
        lambda a: (
            NoGradient(tuple(a.shape))
            if getattr(a, "dtype", None) == jax.dtypes.float0
            else a
        ),
        tree,
    )


def with_float0(tree: PyTree) -> PyTree:
    """The inverse of `without_float0`."""
    return jax.tree.map(
        lambda a: float0_like(a) if isinstance(a, NoGradient) else a, tree
    )


@dataclasses.dataclass(frozen=True)
class WholeOutput:
    """An output that all devices have."""

    number: int


def update_outputs(like: PyTree, seen: SeenLeaves) -> PyTree:
    """The outputs that are updates, packed like the parameters `like`.

    What is not trained has an update that changes nothing.
    """
    numbers = iter(range(sum(seen.is_seen)))
    is_seen = iter(seen.is_seen)

    def output(node: Any) -> Any:
        if not isinstance(node, Packed):
            return WholeOutput(next(numbers)) if next(is_seen) else no_update(node)
        number: dict[Entry, int] = {}
        entries = node.packing.shown_entries
        # Static leaves count among all leaves, and are not seen.
        positions = node.packing.shown_spec.fill(range(len(entries)), -1)
        for n in jax.tree.leaves(positions):
            if next(is_seen):
                number[entries[n]] = next(numbers)
        return PackedOutput.of(node.packing, number)

    return jax.tree.map(output, like, is_leaf=is_packed)


def state_outputs(
    state: PyTree, templates: Sequence["StateTemplate"], first: int
) -> PyTree:
    """The outputs that are a new state. Parts with the structure of the parameters are
    packed like them, and all devices have the rest.

    Arguments:
        state: shapes.
        first: the number of the first of these outputs.
    """
    # A tree like the state, with the number of the output in the place of each array.
    arrays, spec = pack(state)
    numbers = spec.unpack(range(first, first + len(arrays)))

    def output(node: Any, number: Any) -> Any:
        template = _find_template(templates, node)
        if template is None:
            return WholeOutput(number) if isinstance(number, int) else number
        leaves: dict[Entry, int] = {}
        absent: list[Entry] = []
        for entry, leaf in template.leaves_of(number):
            if isinstance(leaf, NoGradient):
                absent.append(entry)
            else:
                leaves[entry] = leaf
        return PackedOutput.of(template.packing_of(node), leaves, absent)

    return jax.tree.map(
        output,
        state,
        numbers,
        # A tree like the parameters is one leaf here, at any depth of the state.
        is_leaf=lambda node: _find_template(templates, node) is not None,
    )


def _lies_in_a_cell(leaf: Any) -> bool:
    """Whether a leaf of a new tree is one of a packing: an array, its number among
    outputs, or a gradient that is not there.
    """
    return is_array(leaf) or type(leaf) is int or isinstance(leaf, NoGradient)


class StateTemplate:
    """How states that are like one `Packed` are packed: with leaves in the same places.

    A moment has one leaf for each parameter, of the same shape; Adafactor's factors
    have other shapes, and a masked state has not all of them. All of them lie on the
    device of their parameter.
    """

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        entries = packing.shown_entries
        positions = packing.shown_spec.fill(range(len(entries)), None)
        # Static leaves are set aside in a packing, and have no entry.
        self._entry_of: dict[Path, Entry] = {
            path: entries[n]
            for path, n in jax.tree_util.tree_flatten_with_path(positions)[0]
        }

    def fits(self, node: Any) -> bool:
        """Whether a node is a tree such as the parameters, with leaves in their places
        and nowhere else.
        """
        root = self.packing.shown_shapes
        if is_array(root):
            # One array of numbers is its own tree: a moment has its shape.
            return is_array(node) and (node.shape, node.dtype) == (
                root.shape,
                root.dtype,
            )
        # The states of optax are named tuples, so a plain tuple is one of layers, or
        # the state of an `optax.chain`. A chain of bare numbers fits too, if each layer
        # is a bare array; it is packed then, and comes out right all the same.
        if type(node) is not type(root):
            return False
        if isinstance(root, (tuple, list)) and len(node) != len(root):
            return False
        places = [path for path, _ in _leaves_in_cells(node)]
        if not places:
            # Parameters without any array are parameters too.
            whole = jax.tree.structure(root)
            return not self._entry_of and jax.tree.structure(node) == whole
        return all(place in self._entry_of for place in places)

    def leaves_of(self, node: PyTree) -> list[tuple[Entry, Any]]:
        """The leaves of a state that is like the parameters, each with its entry in the
        packing of the state.
        """
        # A masked state has fewer leaves than the layer, so its leaves have other
        # numbers.
        places = _leaves_in_cells(node)
        mine = sorted(self._entry_of[path] for path, _ in places)
        number: dict[Entry, Entry] = {}
        counts: dict[int, int] = {}
        for entry in mine:
            k = entry[0]
            number[entry] = (k, counts.get(k, 0))
            counts[k] = counts.get(k, 0) + 1
        return [(number[self._entry_of[path]], leaf) for path, leaf in places]

    def packing_of(self, node: PyTree) -> Packing:
        """How a tree that is like the parameters, or the shapes of one, is packed."""
        node = self._with_dtypes(node)
        leaves = dict(self.leaves_of(node))
        places = [path for path, _ in _leaves_in_cells(node)]
        state_entry = {  # By the parameter's.
            self._entry_of[path]: entry
            for path, entry in zip(places, leaves, strict=True)
        }
        if self.packing.own is None:
            shapes = tuple(map(Shape.of, node))
            own = None
        else:
            layers: list[list[Any]] = [[] for _ in self.packing.shapes]
            for k, n in sorted(leaves):
                layers[k].append(leaves[k, n])
            shapes = tuple(Shape.of(tuple(layer)) for layer in layers)
            own = OwnTree(pack(node)[1], tuple(leaves))
        rows = [
            row
            for old in self.packing.rows
            for row in self._rows_like(old, state_entry, shapes)
        ]
        return Packing(shapes, tuple(rows), own)

    def _with_dtypes(self, node: PyTree) -> PyTree:
        """A tree with the shape of the parameter where there is no gradient: that is
        how gradients are packed.
        """

        def shape(path: Path, leaf: Any) -> Any:
            if not isinstance(leaf, NoGradient):
                return leaf
            dtype = self.packing.shape(self._entry_of[path]).dtype
            return jax.ShapeDtypeStruct(leaf.shape, dtype)

        return jax.tree_util.tree_map_with_path(shape, node)

    def pack(self, node: PyTree, mesh: AnyMesh | None) -> Packed:
        """A tree that is like the parameters, packed; without weak types, so that a
        state has one structure in all steps.
        """
        node = map_arrays(strong, node)
        packing = self.packing_of(node)
        leaves = dict(self.leaves_of(node))
        rows = []
        for row in packing.rows:
            blocks = [
                jnp.zeros(row.shape, row.dtype)
                if entry is None
                else row.put(leaves[entry].astype(row.dtype))
                for entry in row.entries
            ]
            rows.append(jnp.stack(blocks))
        return Packed(constrain_to_stages(rows, packing.rows, mesh), packing)

    def _rows_like(
        self, old: Row, state_entry: Mapping[Entry, Entry], shapes: Sequence[Shape]
    ) -> Iterator[Row]:
        """The rows of a state for one row of the parameters: one for each dtype."""
        # For two parameters that share a row, and states of Adam and Adafactor:
        #
        #   parameters   (4, 4) and (4, 2)   float32[2, 16]   flat, padded
        #   mu           (4, 4) and (4, 2)   float32[2, 16]   like the parameters
        #   v_col        (4,) and (4,)       float32[2, 4]    a stack
        #   v_row        (4,) and (2,)       float32[2, 4]    flat, padded
        new = [None if e is None else state_entry.get(e) for e in old.entries]
        leaf = {e: shapes[e[0]].leaves[e[1]] for e in new if e is not None}
        for dtype in dict.fromkeys(a.dtype for a in leaf.values()):
            entries = tuple(
                e if e is not None and leaf[e].dtype == dtype else None for e in new
            )
            own = [leaf[e].shape for e in entries if e is not None]
            parameter = [
                self.packing.shape(p).shape
                for e, p in zip(entries, old.entries, strict=True)
                if e is not None and p is not None
            ]
            # Like the parameters if it can be, so that a moment lies as they do; else a
            # stack without padding, if all have one shape; else flat, as parameters of
            # several shapes are.
            spec = WHOLE
            if own == parameter:
                shape, spec = old.shape, old.spec
            elif len(set(own)) == 1:
                shape = own[0]
                # Parameters that are cut share a row with those of their shape alone.
                spec = spec_without_axis(old.spec, old.shape, shape)
            else:
                shape = (max(int(np.prod(s, dtype=np.int64)) for s in own),)
            yield Row(shape, dtype, entries, spec)


def _leaves_in_cells(tree: PyTree) -> list[tuple[Path, Any]]:
    """The parts of a state like the parameters that lie in cells."""
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(path, leaf) for path, leaf in named if _lies_in_a_cell(leaf)]


def templates_of(tree: PyTree) -> list[StateTemplate]:
    """One for each `Packed` in a tree."""
    return [StateTemplate(node.packing) for node in packed_nodes(tree)]


def _find_template(
    templates: Sequence[StateTemplate], node: Any
) -> StateTemplate | None:
    return next((template for template in templates if template.fits(node)), None)


def pack_state(
    state: PyTree, templates: Sequence[StateTemplate], mesh: AnyMesh | None
) -> PyTree:
    """A state in which every part with the structure of the parameters is packed like
    them.
    """

    def pack_node(node: Any) -> Any:
        template = _find_template(templates, node)
        return node if template is None else template.pack(node, mesh)

    return jax.tree.map(
        pack_node,
        state,
        is_leaf=lambda node: _find_template(templates, node) is not None,
    )


def check_packing(templates: Sequence[StateTemplate], state: PyTree, fix: str) -> None:
    """Refuse a state that is packed for another partition."""
    named = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_packed)[0]
    for path, node in named:
        if not isinstance(node, Packed):
            continue
        # The leaves may be right and their places wrong: the same layers on other
        # devices. The update would gather everything that crosses the mesh, so every
        # device would hold the whole state. `place` moves the state before the update.
        tree = node.packing.shown_shapes
        if not any(
            template.fits(tree) and template.packing_of(tree) == node.packing
            for template in templates
        ):
            raise ValueError(
                f"`per_stage(tx).update`: {leaf_name('state', path)} is packed "
                f"for another partition than the parameters; {fix}"
            )
