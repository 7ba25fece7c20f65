"""Parameters as arrays over the mesh: each device holds those of its own stages, and no
others.

In: the units, and the shapes of each layer's parameters. Out: a `Packing`, which tells
where every array is, and packs and unpacks pytrees.

Every device of a mesh holds a block of the same shape, so parameters of several stages
share an array with an axis of devices, a *row*. Where the arrays of the stages have one
shape the row is their stack, without padding. Where they differ the largest of each
stage share a row, then the next, and so on; each is flattened and padded to the
longest. Two layers on two devices, each with a bias (array 0) and a weight (array 1):

    row 0   float32[2, 3]      layer 0 array 0      layer 1 array 0     alike: a stack
    row 1   float32[2, 3, 3]   layer 0 array 1      layer 1 array 1

    row 0   float32[2, 9]      layer 0 array 1      layer 1 array 1     the weights, of
    row 1   float32[2, 3]      layer 0 array 0      layer 1 array 0     9 and 6 numbers

An array that is cut over other axes of the mesh keeps its axes, so it is never
flattened: it shares a row with arrays of its own shape and spec alone. Where a stage
has none of these, its devices hold zeros. With the second weight cut by columns:

    row 0   float32[2, 3, 2]   nothing              layer 1 array 1     P(None, "model")
    row 1   float32[2, 9]      layer 0 array 1      layer 1 array 0     flat, padded
    row 2   float32[2, 3]      layer 0 array 0      nothing
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from fpipe._core.pytrees import PyTree, Shape, Spec, nbytes, pack
from fpipe._executors.scan.units import Units
from fpipe._model.function_layers import OwnTree
from fpipe._model.specs import WHOLE

# An array: a layer, and the array's number among the layer's own.
Entry: TypeAlias = tuple[int, int]


class Location(NamedTuple):
    """Where an array is: its row, and its device's block of that."""

    row: int
    device: int


@dataclasses.dataclass(frozen=True)
class Row:
    """An array with an axis of devices. Each device holds its own block of it.

    Attributes:
        shape: of each device's block; flat if the arrays differ.
        entries: the array that each device has there, if any.
        spec: how a block is cut over the axes of the mesh beside that of the stages.
    """

    shape: tuple[int, ...]
    dtype: Any
    entries: tuple[Entry | None, ...]
    spec: P = WHOLE

    @property
    def is_empty(self) -> bool:
        """Whether its arrays are `float0`, which hold nothing: gathered gradients of
        integers and of what is frozen. JAX has no such arrays, numpy has.
        """
        return self.dtype == jax.dtypes.float0

    def put(self, array: Any) -> Any:
        """An array as a block: flat and padded with zeros, if the row is."""
        if array.shape == self.shape:
            return array
        flat = array.reshape(-1)
        # What is on the host stays there.
        pad = np.pad if isinstance(flat, np.ndarray) else jnp.pad
        return pad(flat, (0, self.shape[0] - flat.shape[0]))

    def take(self, block: Any, shape: tuple[int, ...]) -> Any:
        """The array of that shape in a block; the inverse of `put`."""
        if shape == self.shape:
            return block
        size = math.prod(shape)
        return (block if size == self.shape[0] else block[:size]).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where every array of a tuple with one pytree per layer is.

    Attributes:
        shapes: of each layer's pytree.
        rows: the arrays over the mesh.
        own: of parameters of a function that was split the tree that its user has;
            `None`: users have one entry per layer.
    """

    shapes: tuple[Shape, ...]
    rows: tuple[Row, ...]
    own: OwnTree | None = None

    @classmethod
    def of(
        cls,
        units: Units,
        shapes: Sequence[Shape],
        specs: Mapping[Entry, P] | None = None,
    ) -> "Packing":
        """Rows for the parameters (or states) of all layers; `specs` are of those
        arrays that are cut.

        Cores and whole stages are sorted by their position on the device; all ends go
        together. For the model in `units.py`, each of whose layers has one array:

            row 0    block 1    block 3    block 5     the first block of each core
            row 1    block 2    block 4    block 6     the second
            row 2    embed      nothing    head        flat, padded to the longer
        """
        # Cores of one position are alike, so their rows are stacks. Ends differ anyway:
        # the first device's and the last one's share rows, with padding.
        # With several stages on a device each position has rows of its own. One row for
        # all of them would have to be sliced by the stage's number in each tick, which
        # copies the parameters.
        devices = 1 + max(units.device)
        groups: dict[tuple[bool, int], list[list[Entry]]] = {}
        for unit, role, device, position in zip(
            units.stages, units.roles, units.device, units.position, strict=True
        ):
            key = (True, 0) if role == "end" else (False, position)
            group = groups.setdefault(key, [[] for _ in range(devices)])
            for k in unit.span:
                for n in range(len(shapes[k].leaves)):
                    group[device].append((k, n))
        rows: list[Row] = []
        for key in sorted(groups):
            rows += _rows(groups[key], shapes, specs or {})
        return cls(tuple(shapes), tuple(rows))

    @property
    def whole(self) -> tuple[PyTree, ...]:
        """The shapes of the arrays, as one pytree for each layer."""
        return tuple(shape.tree for shape in self.shapes)

    # --- as users see it: by layer, or a function's own tree ---

    @cached_property
    def by_layer(self) -> "Packing":
        """The same arrays with one entry per layer, as executors take them."""
        return self if self.own is None else Packing(self.shapes, self.rows)

    @cached_property
    def _shown(self) -> dict[OwnTree, "Packing"]:
        return {}

    def shown_as(self, own: OwnTree) -> "Packing":
        """The same arrays as a function's own tree."""
        if own not in self._shown:
            made = Packing(self.shapes, self.rows, own)
            # The very same one comes back: calls compare it.
            made.__dict__["by_layer"] = self
            self._shown[own] = made
        return self._shown[own]

    @cached_property
    def shown_entries(self) -> tuple[Entry, ...]:
        """The arrays in the order of the tree that users see."""
        return self.entries if self.own is None else self.own.places

    @cached_property
    def shown_spec(self) -> Spec:
        """The structure of the tree that users see."""
        return pack(self.whole)[1] if self.own is None else self.own.spec

    @property
    def shown_shapes(self) -> PyTree:
        """The tree that users see, of shapes."""
        return self.shown_spec.unpack([self.shape(e) for e in self.shown_entries])

    @cached_property
    def where(self) -> Mapping[Entry, Location]:
        """The row and the device of each array."""
        return {
            entry: Location(r, d)
            for r, row in enumerate(self.rows)
            for d, entry in enumerate(row.entries)
            if entry
        }

    @cached_property
    def specs(self) -> Mapping[Entry, P]:
        """How those arrays are cut that are."""
        return {
            e: self.rows[row].spec
            for e, (row, _) in self.where.items()
            if self.rows[row].spec
        }

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """A name for each row: its first array's, by layer."""
        first = [next(e for e in row.entries if e) for row in self.rows]
        if self.own is not None:
            return tuple(self._keys[e] for e in first)
        return tuple(f"{e[0]}{self._keys[e]}" for e in first)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """A name for each row that no row of another partition has: its first array's,
        with the number of devices and a digest of what each of them has there.

        Checkpoint libraries save rows by name. Rows of another partition may have the
        same first array and the same shape, and be restored in silence; with a name of
        their own they are missing.
        """
        return tuple(
            f"{path} ({len(row.entries)} devices, {self._digest(row)})"
            for path, row in zip(self.paths, self.rows, strict=True)
        )

    def _digest(self, row: Row) -> str:
        """The same in every process: of each array its name and its shape."""
        held = [e and f"{self.name(e)}{self.shape(e).shape}" for e in row.entries]
        return f"{zlib.crc32(repr((row.shape, held)).encode()):08x}"

    def name(self, entry: Entry) -> str:
        """An array's path in the tree that users see, such as `[0]['w']`."""
        if self.own is not None:
            return self._keys[entry]
        return f"[{entry[0]}]{self._keys[entry]}"

    @cached_property
    def _keys(self) -> Mapping[Entry, str]:
        """Each array's path in its layer, or in a function's own tree."""
        keys: dict[Entry, str] = {}
        if self.own is not None:
            numbers = self.own.spec.fill(range(len(self.own.places)), None)
            for path, n in jax.tree_util.tree_flatten_with_path(numbers)[0]:
                keys[self.own.places[n]] = jax.tree_util.keystr(path)
            return keys
        for k, shape in enumerate(self.shapes):
            # The layer's pytree with a number in place of each array gives its path.
            numbers = shape.spec.unpack(range(shape.spec.arrays))
            for path, n in jax.tree_util.tree_flatten_with_path(numbers)[0]:
                if type(n) is int:
                    keys[(k, n)] = jax.tree_util.keystr(path)
        return keys

    @property
    def padding(self) -> int:
        """The bytes on all devices together that hold nothing."""
        there = sum(len(row.entries) * nbytes(row) for row in self.rows)
        held = sum(nbytes(a) for shape in self.shapes for a in shape.leaves)
        return there - held

    def shape(self, entry: Entry) -> jax.ShapeDtypeStruct:
        """The shape of an array."""
        return self.shapes[entry[0]].leaves[entry[1]]

    def blocks(self, device: int, trees: Mapping[int, PyTree]) -> list[Any]:
        """A device's block of every row, from the pytrees of its layers."""
        leaves = {k: pack(tree)[0] for k, tree in trees.items()}
        blocks = []
        for row in self.rows:
            entry = row.entries[device]
            if row.is_empty:
                blocks.append(np.zeros(row.shape, row.dtype))
            elif entry is None:
                blocks.append(jnp.zeros(row.shape, row.dtype))
            else:
                blocks.append(row.put(leaves[entry[0]][entry[1]]))
        return blocks

    def pack(self, trees: Sequence[PyTree]) -> tuple[Any, ...]:
        """The rows, from the pytrees of all layers: whole arrays, for use in a trace.
        `Parameters.place` makes the blocks of each device by themselves.
        """
        every = dict(enumerate(trees))
        # Every row has an entry for each device, if only `None`.
        count = len(self.rows[0].entries) if self.rows else 0
        blocks = [self.blocks(d, every) for d in range(count)]
        return tuple(
            (np if row.is_empty else jnp).stack(column)
            for row, column in zip(self.rows, zip(*blocks, strict=True), strict=True)
        )

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Every array, layer by layer."""
        return tuple(
            (k, n)
            for k, shape in enumerate(self.shapes)
            for n in range(len(shape.leaves))
        )

    def take(self, rows: Mapping[int, Any] | Sequence[Any], entry: Entry) -> Any:
        """An array out of its row."""
        r, d = self.where[entry]
        return self.rows[r].take(rows[r][d], self.shape(entry).shape)

    def trees(self, leaves: Sequence[Any]) -> tuple[PyTree, ...]:
        """The pytrees of all layers, from all arrays in order."""
        rest = iter(leaves)
        return tuple(
            shape.spec.unpack([next(rest) for _ in shape.leaves])
            for shape in self.shapes
        )


def _rows(
    group: Sequence[Sequence[Entry]],
    shapes: Sequence[Shape],
    specs: Mapping[Entry, P],
) -> list[Row]:
    """Rows for the arrays of several devices: in their order if they are alike, else
    first those that are cut, each kind by itself, and then the largest first.
    """

    def aval(entry: Entry) -> jax.ShapeDtypeStruct:
        return shapes[entry[0]].leaves[entry[1]]

    def spec(entry: Entry) -> P:
        return specs.get(entry, WHOLE)

    kinds = [
        [(aval(e).shape, aval(e).dtype, spec(e)) for e in entries] for entries in group
    ]
    # A device may have nothing here: an end is on the first and the last one only.
    some = [own for own in kinds if own]
    if some and all(own == some[0] for own in some):
        sorts = [group]
    else:
        sorts = []
        # A flat array could not be cut along an axis of its own.
        for kind in dict.fromkeys(kind for own in kinds for kind in own if kind[2]):
            sorts.append(
                [
                    [e for e, own in zip(entries, row, strict=True) if own == kind]
                    for entries, row in zip(group, kinds, strict=True)
                ]
            )
        # Large beside large, so that little is padded. A row has one dtype.
        for dtype in sorted({str(kind[1]) for own in kinds for kind in own}):
            of_dtype = [
                [e for e in entries if str(aval(e).dtype) == dtype and not spec(e)]
                for entries in group
            ]
            sorts.append([sorted(own, key=lambda e: -aval(e).size) for own in of_dtype])
    # The n-th array of each device goes into the n-th row; some have fewer.
    rows = []
    for devices in sorts:
        for n in range(max(map(len, devices))):
            entries = tuple(own[n] if n < len(own) else None for own in devices)
            avals = [aval(e) for e in entries if e]
            shape = avals[0].shape
            if any(a.shape != shape for a in avals):
                shape = (max(a.size for a in avals),)
            cut = next(spec(e) for e in entries if e)
            rows.append(Row(shape, avals[0].dtype, entries, cut))
    return rows


@dataclasses.dataclass(frozen=True, repr=False)
class PackedForm:
    """What JAX keeps of a `Packed` beside its arrays: two `Packed` have one structure
    if this is equal.

    Gradients without those of frozen parameters have another structure than the
    parameters. So what combines the two number by number is refused, by JAX, which
    shows both forms: an optimizer that decays weights would decay frozen ones, for they
    may lie in one row with trained ones.

    Attributes:
        packing: which layer's array is where.
        absent: the arrays that have no gradient, in rows in which others have one.
    """

    packing: Packing
    absent: frozenset[Entry] = frozenset()

    @cached_property
    def absent_names(self) -> str:
        """The first of what has no gradient, such as `[0]['b'], [0]['w'], …`."""
        names = [self.packing.name(entry) for entry in sorted(self.absent)]
        return ", ".join(names if len(names) <= 4 else [*names[:4], "…"])

    def __repr__(self) -> str:
        if not self.absent:
            # Enough to tell two packings apart in an error of JAX, on few lines.
            rows = [
                " | ".join(
                    "-" if e is None else self.packing.name(e) for e in row.entries
                )
                + (f" cut by {row.spec}" if row.spec else "")
                for row in self.packing.rows[:8]
            ]
            more = ["…"] if len(self.packing.rows) > 8 else []
            return f"a packing with the rows {', '.join([*rows, *more])}"
        return (
            f"gradients without those of the frozen {self.absent_names}; to update the "
            "others, write `fpipe.optim.per_stage(tx, frozen=...)`, with the `frozen` "
            "of `value_and_grad`"
        )


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Placed parameters, or their gradients, of a pipe with `executor="scan"`.

    It is a pytree. Its leaves are arrays over the mesh, and the first axis of each
    array is the devices. `jax.tree.map` and optax work on it. Checkpoint libraries work
    on it too, but such a checkpoint only loads for the same partition: the same balance
    on as many devices. `pipe.gather` returns a tuple with one entry per layer, or the
    tree of a function that was split. After `import fpipe.flax`, `flax.serialization`
    saves a `Packed` in that form.

    Attributes:
        arrays: the arrays. Block `d` of each is on device `d` of the mesh axis
            `"stage"`.
        packing: the place of each layer's arrays in `arrays`.
        absent: for gradients, the frozen parameters that share an array with others.
            Their blocks are zero, and `pipe.gather` returns `float0` for them.
    """

    arrays: tuple[Any, ...]
    packing: Packing
    absent: frozenset[Entry] = frozenset()

    @property
    def form(self) -> PackedForm:
        """Everything except the arrays."""
        return PackedForm(self.packing, self.absent)

    def has_gradient(self, entry: Entry) -> bool:
        """Whether an array has a gradient: not if it is frozen or an integer.

        Arguments:
            entry: the number of the layer, and that of the array among the layer's own.
        """
        row = self.arrays[self.packing.where[entry].row]
        dtype = getattr(row, "dtype", None)
        return entry not in self.absent and dtype != jax.dtypes.float0

    @property
    def padding(self) -> int:
        """The bytes of padding, on all devices together.

        Arrays are padded where the parameters of the stages have different shapes.
        """
        return self.packing.padding

    @property
    def by_layer(self) -> "Packed":
        """The arrays with one entry per layer, in the form that executors take."""
        return Packed(self.arrays, self.packing.by_layer, self.absent)

    def __contains__(self, name: object) -> bool:
        """`False`: arrays have no names that could be asked for. Flax's `TrainState`
        asks all parameters.
        """
        return False

    def __repr__(self) -> str:
        parts = []
        for path, array in zip(self.packing.paths, self.arrays, strict=False):
            text = repr(array)
            if hasattr(array, "dtype"):
                text = f"{array.dtype}[{','.join(map(str, array.shape))}]"
            parts.append(f"{path}: {text}")
        absent = f"; none of {self.form.absent_names}" if self.absent else ""
        return f"Packed({', '.join(parts)}; {self.padding} bytes of padding{absent})"

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], PackedForm]:
        """The arrays with their names; JAX calls this."""
        return [
            (jax.tree_util.DictKey(label), array)
            for label, array in zip(self.packing.labels, self.arrays, strict=True)
        ], self.form

    def tree_flatten(self) -> tuple[tuple[Any, ...], PackedForm]:
        """The arrays; JAX calls this."""
        return self.arrays, self.form

    @classmethod
    def tree_unflatten(cls, form: PackedForm, arrays: Sequence[Any]) -> "Packed":
        """A `Packed` of new leaves; JAX calls this. The leaves may be other things than
        arrays, such as shapes or specs.
        """
        return cls(tuple(arrays), form.packing, form.absent)
