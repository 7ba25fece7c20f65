"""Microbatches: how a batch is cut by rows.

A call with ten rows and `chunks=4` has four microbatches, the last one smaller:

    x                  float32[10,8]      rows 0-2 | 3-5 | 6-8 | 9
    side: Chunk(…, 1)  int32[3,10]        rows 0-2 | 3-5 | 6-8 | 9     on axis 1
    side: NoChunk      float32[8]         all      | all | all | all

`cut_inputs` says so as a `Cut`, without cutting anything:

    rows       (3, 3, 3, 1)
    x          Rows(array=0, axis=0)
    side       Rows(array=0, axis=1), Whole(array=1)

`Cut.piece` then makes the pieces. Of `Microbatches([x0, x1])` the source is
`Ready(arrays=(0, 1))`: what a microbatch gets is one of the call's arrays as it is.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import jax

from fpipe._core.pytrees import PyTree, Shape, Spec, aval, describe, is_array, pack
from fpipe._core.statics import check_leaves
from fpipe._model.needs import INPUTS, ROW_INPUTS
from fpipe._model.straight import names_of
from fpipe._model.wrappers import (
    Chunk,
    Microbatches,
    NoChunk,
    PerRow,
    is_wrapper,
    unwrapped,
)
from fpipe.schedules._checks import counted


@dataclasses.dataclass(frozen=True)
class Whole:
    """An array of the call that goes whole to every microbatch, by its number."""

    array: int


@dataclasses.dataclass(frozen=True)
class Rows:
    """An array of the call. A microbatch gets its own rows of it, on an axis."""

    array: int
    axis: int


@dataclasses.dataclass(frozen=True)
class Ready:
    """Arrays of the call that are what the microbatches get, one for each.

    Attributes:
        axis: of the rows; `None` for 0-d arrays.
    """

    arrays: tuple[int, ...]
    axis: int | None


# Where an array that a microbatch gets comes from.
Source: TypeAlias = Whole | Rows | Ready


@dataclasses.dataclass(frozen=True)
class Split:
    """How one pytree is cut into pieces.

    Attributes:
        piece: the structure that a microbatch gets, without wrappers.
        sources: of each array of it.
    """

    piece: Spec
    sources: tuple[Source, ...]

    def array(self, k: int, i: int) -> int:
        """The number of the array of the call that the `k`-th array of microbatch `i`
        is, or is a part of.
        """
        match self.sources[k]:
            case Ready(arrays, _):
                return arrays[i]
            case source:
                return source.array

    def place(self, array: int) -> tuple[int, int | None]:
        """The inverse: the array's number in a microbatch, and the number of that
        microbatch if it is ready-made.
        """
        for k, source in enumerate(self.sources):
            if isinstance(source, Ready):
                if array in source.arrays:
                    return k, source.arrays.index(array)
            elif source.array == array:
                return k, None
        raise AssertionError(array)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How all inputs of a call are cut into `m` microbatches.

    It holds numbers and no arrays, so that plans, which have shapes only, use it too.

    Attributes:
        splits: for each input of the call, by its name in the table of needs, how its
            arrays are cut.
        m: the number of microbatches.
        rows: of each microbatch, in the arrays that are cut; empty if none is.
        weights: of each microbatch in a mean: its rows.
        row_counts: of each microbatch; empty if `x` has none.
        like: for each microbatch the first one with the same shapes. Microbatches of
            equal shapes have the same programs: of ten rows in four microbatches 0 or
            3.
        ready: whether any of them are ready-made.
    """

    splits: Mapping[str, Split]
    m: int
    rows: tuple[int, ...]
    weights: tuple[int, ...]
    row_counts: tuple[int, ...]
    like: tuple[int, ...]
    ready: bool

    @property
    def shares(self) -> tuple[float, ...]:
        """Each microbatch's share of the rows: its weight in a mean.

        Raises:
            ValueError: a microbatch has no rows. Its mean is NaN, whatever its weight.
        """
        if 0 in self.weights:
            raise ValueError(
                '`reduction="mean"`: the ready-made microbatch '
                f"{self.weights.index(0)} has no rows; leave it out, or let `loss_fn` "
                'return a sum, and use `reduction="sum"`, or `"weighted"` with '
                "`(sum, weight)`"
            )
        return tuple(n / sum(self.weights) for n in self.weights)

    @cached_property
    def alike(self) -> tuple[tuple[int, ...], ...]:
        """The microbatches of each shape, in the order of the first ones. Of ten rows
        in four chunks: `((0, 1, 2), (3,))`.
        """
        found: dict[int, list[int]] = {}
        for i, first in enumerate(self.like):
            found.setdefault(first, []).append(i)
        return tuple(map(tuple, found.values()))

    def piece(self, name: str, i: int, tree: PyTree) -> PyTree:
        """What microbatch `i` gets of an input, a pytree of arrays."""
        split, arrays = self.splits[name], pack(tree)[0]
        start = sum(self.rows[:i])
        pieces = []
        for k, source in enumerate(split.sources):
            array = arrays[split.array(k, i)]
            if isinstance(source, Rows):
                stop = start + self.rows[i]
                array = jax.lax.slice_in_dim(array, start, stop, axis=source.axis)
            pieces.append(array)
        return split.piece.unpack(pieces)

    def piece_shape(
        self, name: str, i: int, leaves: Sequence[jax.ShapeDtypeStruct]
    ) -> Shape:
        """The shape of what microbatch `i` gets of an input, from the shapes of the
        call's arrays.
        """
        split = self.splits[name]
        pieces = []
        for k, source in enumerate(split.sources):
            a = leaves[split.array(k, i)]
            if isinstance(source, Rows):
                axis = source.axis
                shape = (*a.shape[:axis], self.rows[i], *a.shape[axis + 1 :])
                a = a.update(shape=shape)
            pieces.append(a)
        return Shape(split.piece, tuple(pieces))

    def doubled_shape(self, name: str, leaves: Sequence[jax.ShapeDtypeStruct]) -> Shape:
        """The shape of twice what the first microbatch gets of an input."""
        piece = self.piece_shape(name, 0, leaves)
        doubled = []
        for source, a in zip(self.splits[name].sources, piece.leaves, strict=True):
            axis = None if isinstance(source, Whole) else source.axis
            if axis is not None:
                rows = 2 * a.shape[axis]
                a = a.update(shape=(*a.shape[:axis], rows, *a.shape[axis + 1 :]))
            doubled.append(a)
        return Shape(piece.spec, tuple(doubled))

    def pieces(self, i: int, inputs: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """What microbatch `i` gets of the inputs."""
        return {name: self.piece(name, i, tree) for name, tree in inputs.items()}


def cut_inputs(inputs: Mapping[str, PyTree], chunks: int) -> Cut:
    """Decide the microbatches of a call.

    Arguments:
        inputs: what the call gives, by the names of the needs (`x`, `side`, `targets`,
            …): arrays (or shapes), static leaves, `None`, wrappers. What is not there
            is nothing.
        chunks: the most pieces.

    Raises:
        TypeError: no array in `x`.
        ValueError: a 0-d array outside `NoChunk`, no rows, an axis that is not there,
            arrays with unequal numbers of rows, or ready-made microbatches that differ
            in number or structure.
    """
    # Without an array in `x` nothing says how many rows a microbatch has.
    if not any(map(is_array, jax.tree.leaves(inputs["x"]))):
        raise TypeError(
            "`pipe(params, x)`: x has no array; a pipeline needs at least one array to "
            "cut into microbatches"
        )
    splits: dict[str, Split] = {}
    found: dict[str, list[InputLeaf]] = {}
    # In the order of the table, `x` first: errors compare the others with `x`.
    for name in INPUTS:
        tree = inputs.get(name)
        if name not in ROW_INPUTS:
            arrays, spec = pack(tree)
            splits[name] = Split(spec, tuple(map(Whole, range(len(arrays)))))
            continue
        leaves = [leaf for leaf in input_leaves_of(name, tree) if leaf.source]
        sources = tuple(leaf.source for leaf in leaves if leaf.source)
        splits[name] = Split(pack(unwrapped(tree))[1], sources)
        found[name] = leaves
    every = [leaf for leaves in found.values() for leaf in leaves]
    ready = [leaf for leaf in every if isinstance(leaf.source, Ready)]
    sliced = [leaf for leaf in every if isinstance(leaf.source, Rows)]
    for leaf in sliced:
        if leaf.rows != sliced[0].rows:
            text = _unequal_rows(leaf, sliced[0])
            within_x = any(leaf is own for own in found["x"])
            if within_x and type(inputs["x"]) in (list, tuple):
                text += (
                    "; if `x` is a list of ready-made microbatches, pass "
                    "`fpipe.Microbatches(x)`"
                )
            raise ValueError(text)
    for leaf in ready:
        if len(leaf.values) != len(ready[0].values):
            raise ValueError(
                f"`{leaf.name}` has "
                f"{counted(len(leaf.values), 'ready-made microbatch', 'es')}, but "
                f"`{ready[0].name}` has {len(ready[0].values)}: "
                "all `fpipe.Microbatches` of a call have equally many"
            )
    m = len(ready[0].values) if ready else 1
    rows: tuple[int, ...] = ()
    if sliced:
        rows = pieces(sliced[0].rows[0], m if ready else chunks)
        if ready:
            _check_fits(sliced[0], rows, ready[0])
        m = len(rows)
    # A mean weighs by the rows of the first array of `x` that has any.
    first = next((leaf for leaf in found["x"] if leaf.rows), None)
    weights = rows or (1,) * m
    counts = rows
    if first is not None and isinstance(first.source, Ready):
        weights = counts = first.rows
        if sliced and weights != rows:
            raise ValueError(
                f"`{sliced[0].name}` of shape {sliced[0].values[0].shape} is cut into "
                f"microbatches of {_listed(rows)} rows, but those of `{first.name}` "
                f"have {_listed(weights)}; give it as fpipe.Microbatches([…]) too, or "
                "wrap it in fpipe.NoChunk(…), if it goes whole to every microbatch"
            )
    shapes = [
        (rows[i : i + 1], tuple(leaf.values[i].shape for leaf in ready))
        for i in range(m)
    ]
    like = tuple(map(shapes.index, shapes))
    return Cut(splits, m, rows, weights, counts, like, bool(ready))


@dataclasses.dataclass(frozen=True)
class InputLeaf:
    """A leaf of what a microbatch gets, and how it is cut out of the call's arrays.

    Attributes:
        name: as the user reaches it, such as `side['mask']`.
        values: an array, its shape, or something static; if it is ready-made, one for
            each microbatch.
        source: which arrays these are; `None` for what is static.
    """

    name: str
    values: tuple[Any, ...]
    source: Source | None

    @property
    def axis(self) -> int | None:
        """The axis of the rows; `None` if there are none."""
        return None if isinstance(self.source, Whole | None) else self.source.axis

    @property
    def rows(self) -> tuple[int, ...]:
        """How many rows each of the values has; nothing if they have none."""
        if self.axis is None:
            return ()
        return tuple(int(value.shape[self.axis]) for value in self.values)


def input_leaves_of(name: str, tree: PyTree) -> Iterator[InputLeaf]:
    """The leaves of an input that is cut, as a microbatch gets them.

    Arguments:
        name: of the input, in the table of needs.

    Raises:
        ValueError: an array that cannot be cut as it is said to be.
    """
    # Arrays are numbered as `pack` flattens the tree.
    number = 0
    parts = [_named(known_as, part) for known_as, part in names_of(name, tree)]
    for where, leaf in itertools.chain(*parts):
        if isinstance(leaf, Microbatches):
            yield from _ready_leaves(where, leaf, number)
            number += len(pack(leaf)[0])
            continue
        if isinstance(leaf, PerRow):
            raise ValueError(
                f"`{where}` is an fpipe.PerRow, which is for the aux of a loss "
                "function; give the array itself"
            )
        inside = _named(where, leaf.value) if is_wrapper(leaf) else [(where, leaf)]
        for at, inner in inside:
            if is_wrapper(inner):
                raise ValueError(_nested(at, inner, leaf))
            if not is_array(inner):
                yield InputLeaf(at, (inner,), None)
                continue
            source: Source = Whole(number)
            if not isinstance(leaf, NoChunk):
                axis = leaf.axis if isinstance(leaf, Chunk) else 0
                _check_rows(at, inner, axis, "fpipe.Chunk" if inner is not leaf else "")
                source = Rows(number, axis % len(inner.shape))
            yield InputLeaf(at, (inner,), source)
            number += 1


def _ready_leaves(where: str, ready: Microbatches, start: int) -> Iterator[InputLeaf]:
    """The leaves of ready-made microbatches.

    Arguments:
        start: the number of their first array.

    Raises:
        ValueError: they differ in structure, static leaves or dtypes.
    """
    bare = [unwrapped(piece) for piece in ready]
    packs = [pack(piece) for piece in bare]
    count = len(packs[0][0])
    for i, (arrays, spec) in enumerate(packs):
        if spec != packs[0][1]:
            raise ValueError(
                f"`{where}`: the ready-made microbatch {i} is {describe(bare[i])}, but "
                f"microbatch 0 is {describe(bare[0])}: all need the same structure and "
                "static leaves"
            )
        for a, first in zip(arrays, packs[0][0], strict=True):
            if aval(a).dtype != aval(first).dtype:
                raise ValueError(
                    f"`{where}`: the ready-made microbatch {i} has {describe(a)} "
                    f"where microbatch 0 has {describe(first)}: all need the same "
                    "dtype"
                )
    k = 0
    for at, leaf in _named(where, ready[0]):
        axis = 0
        inside = [(at, leaf)]
        if isinstance(leaf, Chunk):
            axis, inside = leaf.axis, _named(at, leaf.value)
        for name, inner in inside:
            if is_wrapper(inner):
                raise ValueError(_nested(name, inner, ready))
            if not is_array(inner):
                yield InputLeaf(name, (inner,), None)
                continue
            values = tuple(arrays[k] for arrays, _ in packs)
            own = None
            if isinstance(leaf, Chunk):
                for value in values:
                    _check_rows(name, value, axis, "fpipe.Chunk")
            if all(value.shape for value in values):
                own = axis
            numbers = tuple(start + i * count + k for i in range(len(packs)))
            yield InputLeaf(name, values, Ready(numbers, own))
            k += 1


def _named(name: str, tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves and wrappers of a pytree with their names."""
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_wrapper)[0]
    return [(name + jax.tree_util.keystr(path), leaf) for path, leaf in found]


def _nested(name: str, inner: Any, outer: Any) -> str:
    """What is wrong with a wrapper inside of a wrapper."""
    return (
        f"`{name}`: an fpipe.{type(inner).__name__} inside of an "
        f"fpipe.{type(outer).__name__}; one of the two says how it is cut"
    )


def _check_rows(name: str, array: Any, axis: int, wrapper: str) -> None:
    """Refuse an array that has no rows on an axis.

    Arguments:
        wrapper: who says which axis it is, if anybody does.
    """
    if not array.shape:
        raise ValueError(
            f"`{name}` is a 0-d array and cannot be cut into microbatches; "
            "wrap it in fpipe.NoChunk to send it whole to every microbatch"
        )
    if not has_axis(array, axis):
        raise ValueError(
            f"`{name}` in `{wrapper}(…, axis={axis})` has the shape {array.shape}: its "
            f"axes are {axes_of(array)}"
        )
    if not array.shape[axis]:
        on = f" on axis {axis}" if wrapper else ""
        raise ValueError(f"`{name}` has no rows{on}: its shape is {array.shape}")


def has_axis(array: Any, axis: int) -> bool:
    """Whether an array has an axis; negative ones count from the last."""
    return -len(array.shape) <= axis < len(array.shape)


def axes_of(array: Any) -> str:
    """The axes of an array, for errors."""
    last = len(array.shape) - 1
    return f"0 to {last}" if last else "0 alone"


def _check_fits(leaf: InputLeaf, rows: tuple[int, ...], ready: InputLeaf) -> None:
    """An array is cut into as many microbatches as there are ready-made ones."""
    m = len(ready.values)
    if len(rows) != m:
        raise ValueError(
            f"`{leaf.name}` of shape {leaf.values[0].shape} makes "
            f"{counted(len(rows), 'microbatch', 'es')} of up to "
            f"{counted(rows[0], 'row')}, but `{ready.name}` has {m} "
            "ready-made ones; give it as fpipe.Microbatches([…]) too, or wrap it in "
            "fpipe.NoChunk(…), if it goes whole to every microbatch"
        )


def _listed(rows: tuple[int, ...]) -> str:
    """Numbers of rows, not too many of them, for errors."""
    text = ", ".join(map(str, rows[:8]))
    return text if len(rows) <= 8 else f"{text}, …"


def _unequal_rows(leaf: InputLeaf, first: InputLeaf) -> str:
    """What is wrong with an array whose rows are not as many as those of the first, and
    the cures.
    """
    (array,), (rows,) = leaf.values, leaf.rows
    text = (
        f"`{leaf.name}` of shape {array.shape} has {counted(rows, 'row')}, but "
        f"`{first.name}` of shape {first.values[0].shape} has {first.rows[0]}: the "
        "rows of all arrays are cut together, so give both equally many, or wrap one "
        "in fpipe.NoChunk(…), if it goes whole to every microbatch, or in "
        "fpipe.Chunk(…, axis=…), if its rows are on another axis"
    )
    # Which cure it is often shows in the shapes: then it is said as it is written.
    pairs = [(leaf, first), (first, leaf)]
    for one, other in pairs:
        (array,), (wanted,) = one.values, other.rows
        if one.axis == 0 and wanted in array.shape:
            axis = array.shape.index(wanted)
            return f"{text}; `fpipe.Chunk({one.name}, axis={axis})` has {wanted}"
    for one, other in pairs:
        (array,), (rows,), (wanted,) = one.values, one.rows, other.rows
        groups, rest = divmod(rows, wanted)
        if one.axis == 0 and not rest and wanted > 1:
            shape = (wanted, groups, *array.shape[1:])
            return (
                f"{text}; rows in groups of {groups} are reshaped, "
                f"`{one.name}.reshape{shape}`"
            )
    return text


@dataclasses.dataclass(frozen=True)
class BatchShapes:
    """The shapes of what layers are given of a call, for one microbatch or for several
    together.

    Attributes:
        x: with no wrapper in it.
        needs: those that are given.
        rows: of each microbatch; empty if everything goes whole to one microbatch.
    """

    x: PyTree
    needs: Mapping[str, PyTree]
    rows: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class CallShapes:
    """The shapes of a call's inputs, and of what layers are given of them.

    Attributes:
        cut: how the inputs are cut.
        leaves: the shapes of the arrays of each input, by its name.
    """

    cut: Cut
    leaves: Mapping[str, Sequence[jax.ShapeDtypeStruct]]

    @classmethod
    def of(cls, x: PyTree, needs: Mapping[str, PyTree], chunks: int) -> "CallShapes":
        """Those of `x` and of the needs that are given.

        Raises:
            TypeError: a leaf that is neither an array nor a value that compares.
            ValueError: an input that cannot be cut.
        """
        inputs = {"x": x, **needs}
        for name, tree in inputs.items():
            check_leaves(tree, name)
        leaves = {name: list(map(aval, pack(t)[0])) for name, t in inputs.items()}
        return cls(cut_inputs(inputs, chunks), leaves)

    @property
    def first(self) -> tuple[PyTree, Mapping[str, PyTree]]:
        """`x` and the needs of the first microbatch."""
        first = self._microbatch(0)
        return first.x, first.needs

    @property
    def twice(self) -> BatchShapes:
        """Two microbatches like the first, together."""
        rows = (self.cut.weights[0],) * 2
        return self._batch(rows, lambda name, a: self.cut.doubled_shape(name, a).tree)

    @property
    def whole(self) -> BatchShapes | None:
        """All microbatches together; `None` if there is one alone, or if they are
        ready-made.
        """
        if self.cut.m == 1 or self.cut.ready:
            return None
        # Without the wrappers that say how it is cut, as layers see it.
        splits = self.cut.splits
        return self._batch(
            self.cut.rows, lambda name, a: splits[name].piece.unpack(list(a))
        )

    @property
    def ready(self) -> tuple[BatchShapes, ...]:
        """Each microbatch, if they are ready-made; else nothing."""
        count = self.cut.m if self.cut.ready else 0
        return tuple(map(self._microbatch, range(count)))

    def _microbatch(self, i: int) -> BatchShapes:
        rows = self.cut.row_counts[i : i + 1]
        return self._batch(rows, lambda name, a: self.cut.piece_shape(name, i, a).tree)

    def _batch(
        self,
        rows: tuple[int, ...],
        shape_of: Callable[[str, Sequence[jax.ShapeDtypeStruct]], PyTree],
    ) -> BatchShapes:
        shapes = {name: shape_of(name, own) for name, own in self.leaves.items()}
        return BatchShapes(shapes.pop("x"), shapes, rows)


def first_example(x: PyTree, chunks: int) -> PyTree:
    """The shapes of the first microbatch of `x`, in wrappers that say where it has
    rows: what goes whole to every microbatch is a `NoChunk` again.

    Raises:
        ValueError: it cannot be cut.
    """
    cut = cut_inputs({"x": x}, chunks)
    shape = cut.piece_shape("x", 0, [aval(a) for a in pack(x)[0]])
    wrapped = list[Any]()
    for source, a in zip(cut.splits["x"].sources, shape.leaves, strict=True):
        axis = None if isinstance(source, Whole) else source.axis
        wrapped.append(NoChunk(a) if axis is None else Chunk(a, axis) if axis else a)
    return shape.spec.unpack(wrapped)


def pieces(rows: int, chunks: int) -> tuple[int, ...]:
    """The rows of each piece: `ceil(rows / chunks)` each, the last one what is left.

    Example:
        >>> pieces(10, 4), pieces(2, 4)
        ((3, 3, 3, 1), (1, 1))
    """
    # The rule of `torch.chunk`, and so of torch's `Pipe`: all pieces but the last have
    # one size, so there are at most two sets of programs.
    size = -(-rows // chunks)
    return tuple(min(size, rows - start) for start in range(0, rows, size))
