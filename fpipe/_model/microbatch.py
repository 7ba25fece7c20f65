"""Microbatches: how a batch is cut by rows and how outputs are put together again.

A call with ten rows and `chunks=4` has four microbatches, the last one smaller:

    x                  float32[10,8]      rows 0-2 | 3-5 | 6-8 | 9
    side: Chunk(…, 1)  int32[3,10]        rows 0-2 | 3-5 | 6-8 | 9     on axis 1
    side: NoChunk      float32[8]         all      | all | all | all
    y of each          float32[3,2] three times, then float32[1,2]
    y of the call      float32[10,2]

`cut_inputs` says so as a `Cut`, without cutting anything: `rows == (3, 3, 3, 1)`, and
the axes of the arrays are 0, 1 and `None`. `Cut.piece` then makes the pieces. A `Join`
says how the outputs are put together.
"""

import dataclasses
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fpipe._core.pytrees import PyTree, Shape, Spec, aval, describe, is_array, pack
from fpipe._core.statics import check_leaves
from fpipe._model.needs import INPUTS, ROW_INPUTS


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class NoChunk:
    """A value that goes whole to every microbatch; its gradient is the sum over them.

    Arguments:
        value: an array, or a pytree of arrays. 0-d arrays need it.

    Example:
        >>> temperature = fpipe.NoChunk(jnp.float32(0.7))
        >>> x = {"image": jnp.ones((8, 32)), "temperature": temperature}
    """

    value: PyTree

    # A pytree, so that `jax.grad`, `jax.device_put` and the user's own maps reach what
    # is inside.
    def tree_flatten(self) -> tuple[tuple[PyTree], None]:
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[PyTree]) -> "NoChunk":
        del aux
        return cls(children[0])


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Chunk:
    """A value whose rows lie along another axis than the first.

    In `x`, `side` and targets it is cut along that axis, and its gradient comes back as
    a `Chunk`. Returned by the last layer, the outputs of the microbatches are
    concatenated on that axis; the caller and the loss get the array itself. Layers
    never see one.

    Arguments:
        value: an array, or a pytree of arrays, all with their rows on that axis.
        axis: which; negative ones count from the last.

    Raises:
        TypeError: `axis` is no int.

    Example:
        >>> sequence_first = fpipe.Chunk(jnp.ones((128, 8, 32)), axis=1)  # 8 rows
        >>> x = {"hidden": sequence_first, "label": jnp.ones(8)}
    """

    value: PyTree
    axis: int

    def __post_init__(self) -> None:
        # A part of the key of a plan: numpy's integers hash like Python's own.
        try:
            if isinstance(self.axis, bool):
                raise TypeError
            object.__setattr__(self, "axis", operator.index(self.axis))
        except TypeError:
            raise TypeError(
                f"`fpipe.Chunk(…, axis={self.axis!r})`: axis is an int, such as 1"
            ) from None

    def tree_flatten(self) -> tuple[tuple[PyTree], int]:
        return (self.value,), self.axis

    @classmethod
    def tree_unflatten(cls, axis: int, children: tuple[PyTree]) -> "Chunk":
        return cls(children[0], axis)


@dataclasses.dataclass(frozen=True)
class Split:
    """How one pytree is cut into pieces.

    Attributes:
        piece: the structure that a microbatch gets, with `NoChunk`s and `Chunk`s
            unwrapped.
        axes: for each array the axis of its rows; `None` for one that goes whole to
            every microbatch.
    """

    piece: Spec
    axes: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Cut:
    """How all inputs of a call are cut into `m` microbatches.

    It holds numbers and no arrays, so that plans, which have shapes only, use it too.

    Attributes:
        splits: for each input of the call, by its name in the table of needs, how its
            arrays are cut.
        rows: of each microbatch; empty if everything goes whole to one microbatch.
    """

    splits: Mapping[str, Split]
    rows: tuple[int, ...]

    @property
    def m(self) -> int:
        """The number of microbatches."""
        return max(1, len(self.rows))

    @property
    def shares(self) -> tuple[float, ...]:
        """Each microbatch's share of the rows: its weight in a mean."""
        rows = self.rows or (1,)
        return tuple(n / sum(rows) for n in rows)

    def first_like(self, i: int) -> int:
        """The first microbatch with the shapes of the `i`-th. Microbatches of equal
        shapes have the same programs: of ten rows in four chunks 0 or 3.
        """
        return self.rows.index(self.rows[i]) if self.rows else 0

    def piece(self, name: str, i: int, tree: PyTree) -> PyTree:
        """What microbatch `i` gets of an input, a pytree of arrays."""
        split = self.splits[name]
        start = sum(self.rows[:i])
        pieces = [
            a
            if axis is None
            else jax.lax.slice_in_dim(a, start, start + self.rows[i], axis=axis)
            for a, axis in zip(pack(tree)[0], split.axes, strict=True)
        ]
        return split.piece.unpack(pieces)

    def piece_shape(
        self, name: str, i: int, leaves: Sequence[jax.ShapeDtypeStruct]
    ) -> Shape:
        """The shape of what microbatch `i` gets of an input, from the shapes of its
        whole arrays.
        """
        split = self.splits[name]
        pieces = [
            a
            if axis is None
            else a.update(shape=(*a.shape[:axis], self.rows[i], *a.shape[axis + 1 :]))
            for a, axis in zip(leaves, split.axes, strict=True)
        ]
        return Shape(split.piece, tuple(pieces))

    def pieces(self, i: int, inputs: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """What microbatch `i` gets of the inputs."""
        return {name: self.piece(name, i, tree) for name, tree in inputs.items()}


def cut_inputs(inputs: Mapping[str, PyTree], chunks: int) -> Cut:
    """Decide the microbatches of a call.

    Arguments:
        inputs: what the call gives, by the names of the needs (`x`, `side`, `targets`,
            …): arrays (or shapes), static leaves, `None`, `NoChunk`s, `Chunk`s. What is
            not there is nothing.
        chunks: the most pieces.

    Raises:
        TypeError: no array in `x`.
        ValueError: a 0-d array outside `NoChunk`, no rows, an axis that is not there,
            or arrays with unequal numbers of rows.
    """
    # Without an array in `x` nothing says how many rows a microbatch has.
    if not any(map(is_array, jax.tree.leaves(inputs["x"]))):
        raise TypeError(
            "`pipe(params, x)`: x has no array; a pipeline needs at least one array to "
            "cut into microbatches"
        )
    splits: dict[str, Split] = {}
    first: InputLeaf | None = None
    # In the order of the table, `x` first: errors compare the others with `x`.
    for name in INPUTS:
        tree = inputs.get(name)
        if name not in ROW_INPUTS:
            arrays, spec = pack(tree)
            splits[name] = Split(spec, (None,) * len(arrays))
            continue
        axes = []
        for leaf in input_leaves_of(name, tree):
            if not is_array(leaf.value):
                continue
            axes.append(leaf.axis)
            if leaf.axis is not None:
                first = leaf if first is None else first
                if leaf.rows != first.rows:
                    raise ValueError(_unequal_rows(leaf, first))
        # Layers never see a wrapper: it says how to cut and is no part of the value.
        splits[name] = Split(pack(_unwrapped(tree, (NoChunk, Chunk)))[1], tuple(axes))
    return Cut(splits, () if first is None else pieces(first.rows, chunks))


@dataclasses.dataclass(frozen=True)
class InputLeaf:
    """A leaf of what a call gives, and how it is cut.

    Attributes:
        name: as the user reaches it, such as `side['mask']`.
        value: an array, its shape, or something static.
        axis: of its rows; `None` if it has none: it goes whole to every microbatch.
    """

    name: str
    value: Any
    axis: int | None

    @property
    def rows(self) -> int:
        """How many rows it has."""
        assert self.axis is not None
        return int(self.value.shape[self.axis])


def input_leaves_of(name: str, tree: PyTree) -> Iterator[InputLeaf]:
    """The leaves of an input that is cut, in the order in which they are flattened.

    Arguments:
        name: of the input, in the table of needs.

    Raises:
        ValueError: an array that cannot be cut as it is said to be.
    """
    wrapped = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_wrapper)[0]
    for path, leaf in wrapped:
        where = name + jax.tree_util.keystr(path)
        if not _is_wrapper(leaf):
            yield _input_leaf(where, leaf, 0, "")
            continue
        kind = f"fpipe.{type(leaf).__name__}"
        inside = jax.tree_util.tree_flatten_with_path(leaf.value, is_leaf=_is_wrapper)
        for below, inner in inside[0]:
            at = where + jax.tree_util.keystr(below)
            if _is_wrapper(inner):
                raise ValueError(
                    f"`{at}`: an fpipe.{type(inner).__name__} inside of an {kind}; one "
                    "of the two says how it is cut"
                )
            if isinstance(leaf, Chunk):
                yield _input_leaf(at, inner, leaf.axis, kind)
            else:
                yield InputLeaf(at, inner, None)


def _input_leaf(name: str, leaf: Any, axis: int, wrapper: str) -> InputLeaf:
    """A leaf that is cut on an axis, which may be negative; static ones are not."""
    if not is_array(leaf):
        return InputLeaf(name, leaf, None)
    if not leaf.shape:
        raise ValueError(
            f"`{name}` is a 0-d array and cannot be cut into microbatches; "
            "wrap it in fpipe.NoChunk to send it whole to every microbatch"
        )
    if not has_axis(leaf, axis):
        raise ValueError(
            f"`{name}` in `{wrapper}(…, axis={axis})` has the shape {leaf.shape}: its "
            f"axes are {_axes(leaf)}"
        )
    axis %= len(leaf.shape)
    if not leaf.shape[axis]:
        on = f" on axis {axis}" if wrapper else ""
        raise ValueError(f"`{name}` has no rows{on}: its shape is {leaf.shape}")
    return InputLeaf(name, leaf, axis)


def has_axis(array: Any, axis: int) -> bool:
    """Whether an array has an axis; negative ones count from the last."""
    return -len(array.shape) <= axis < len(array.shape)


def _axes(array: Any) -> str:
    """The axes of an array, for errors."""
    last = len(array.shape) - 1
    return f"0 to {last}" if last else "0 alone"


def _unequal_rows(leaf: InputLeaf, first: InputLeaf) -> str:
    """What is wrong with an array whose rows are not as many as those of the first, and
    the cures.
    """
    text = (
        f"`{leaf.name}` of shape {leaf.value.shape} has {leaf.rows} "
        f"row{'' if leaf.rows == 1 else 's'}, but "
        f"`{first.name}` of shape {first.value.shape} has {first.rows}: the rows of "
        "all arrays are cut together, so give both equally many, or wrap one in "
        "fpipe.NoChunk(…), if it goes whole to every microbatch, or in "
        "fpipe.Chunk(…, axis=…), if its rows are on another axis"
    )
    # Which cure it is often shows in the shapes: then it is said as it is written.
    pairs = [(leaf, first), (first, leaf)]
    for one, other in pairs:
        if one.axis == 0 and other.rows in one.value.shape:
            axis = one.value.shape.index(other.rows)
            return f"{text}; `fpipe.Chunk({one.name}, axis={axis})` has {other.rows}"
    for one, other in pairs:
        groups, rest = divmod(one.rows, other.rows)
        if one.axis == 0 and not rest and other.rows > 1:
            shape = (other.rows, groups, *one.value.shape[1:])
            return (
                f"{text}; rows in groups of {groups} are reshaped, "
                f"`{one.name}.reshape{shape}`"
            )
    return text


def check_equal_pieces(cut: Cut, chunks: int) -> None:
    """Refuse pieces of different sizes, which one program cannot take.

    Raises:
        ValueError: it says which numbers of chunks would do.
    """
    rows = cut.rows
    if len(set(rows)) > 1:
        total = sum(rows)
        # The six nearest, as a user will change the number of chunks by little.
        divisors = [n for n in range(1, total + 1) if total % n == 0]
        divisors.sort(key=lambda n: (abs(n - chunks), n))
        nearest = ", ".join(map(str, sorted(divisors[:6])))
        raise ValueError(
            f'executor="scan" needs microbatches of equal size, but {total} rows '
            f"in {chunks} chunks give pieces of {rows[0]} rows and a last one of "
            f"{rows[-1]}; chunks={nearest} would do, or pad the batch"
        )


@dataclasses.dataclass(frozen=True)
class BatchShapes:
    """The shapes of what layers are given of a call, for one microbatch or for all
    together.

    Attributes:
        x: with no wrapper in it.
        needs: those that are given.
        rows: of each microbatch; empty if everything goes whole to one microbatch.
    """

    x: PyTree
    needs: Mapping[str, PyTree]
    rows: tuple[int, ...]


def first_microbatch(
    x: PyTree, needs: Mapping[str, PyTree], chunks: int
) -> tuple[PyTree, dict[str, PyTree]]:
    """The shapes of the first microbatch: of `x`, and of the needs that are given.

    Raises:
        TypeError: a leaf that is neither an array nor a value that compares.
    """
    inputs = {"x": x, **needs}
    for name, tree in inputs.items():
        check_leaves(tree, name)
    cut = cut_inputs(inputs, chunks)
    shapes = {
        name: cut.piece_shape(name, 0, [aval(a) for a in pack(tree)[0]]).tree
        for name, tree in inputs.items()
    }
    return shapes.pop("x"), shapes


def whole_batch(
    x: PyTree, needs: Mapping[str, PyTree], chunks: int
) -> BatchShapes | None:
    """The shapes of all rows together; `None` if there is one microbatch alone."""
    inputs = {"x": x, **needs}
    cut = cut_inputs(inputs, chunks)
    if cut.m == 1:
        return None
    # Without the wrappers that say how it is cut, as layers see it.
    shapes = {
        name: cut.splits[name].piece.unpack([aval(a) for a in pack(tree)[0]])
        for name, tree in inputs.items()
    }
    return BatchShapes(shapes.pop("x"), shapes, cut.rows)


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


@dataclasses.dataclass(frozen=True)
class Join:
    """How the outputs of the microbatches become the output of the call.

    Attributes:
        whole: the structure of the whole, with `Chunk`s unwrapped.
        axes: for each array the axis on which its pieces are concatenated; `None` for
            0-d ones, which are stacked to `(m,)`. (Such as a mean over the rows: what a
            mean of means would be is for the user to say.)
    """

    whole: Spec
    axes: tuple[int | None, ...]

    @classmethod
    def of(cls, piece: Shape) -> "Join":
        """From the output of one microbatch, as the last layer returned it."""
        axes: list[int | None] = []
        for leaf in jax.tree.leaves(piece.tree, is_leaf=_is_chunk):
            axis = leaf.axis if _is_chunk(leaf) else 0
            for array in pack(leaf)[0]:
                rank = len(array.shape)
                axes.append(axis % rank if rank else None)
        return cls(pack(without_chunks(piece.tree))[1], tuple(axes))


def without_chunks(tree: PyTree) -> PyTree:
    """An output without the `Chunk`s that say how it is joined."""
    return _unwrapped(tree, Chunk)


def has_chunks(tree: PyTree) -> bool:
    """Whether an output says of any of its arrays how they are joined."""
    return any(map(_is_chunk, jax.tree.leaves(tree, is_leaf=_is_chunk)))


def check_output_axes(y: PyTree, who: str) -> None:
    """Refuse a `Chunk` with an axis that an array in it does not have.

    Arguments:
        who: the layer that returned `y`.

    Raises:
        ValueError: there is one.
    """
    for chunk in filter(_is_chunk, jax.tree.leaves(y, is_leaf=_is_chunk)):
        if has_chunks(chunk.value):
            raise ValueError(
                f"{who} returned an fpipe.Chunk inside of an fpipe.Chunk; one of the "
                "two says how it is joined"
            )
        for array in pack(chunk)[0]:
            if not array.shape:
                raise ValueError(
                    f"{who} returned `fpipe.Chunk(…, axis={chunk.axis})` of a 0-d "
                    "array, which has no rows; return the array itself"
                )
            if not has_axis(array, chunk.axis):
                raise ValueError(
                    f"{who} returned `fpipe.Chunk(…, axis={chunk.axis})` of "
                    f"{describe(array)}: its axes are {_axes(array)}"
                )


def check_alike(
    parts: Sequence[Shape], name: str, axes: Sequence[int | None] | None
) -> None:
    """What is put together again has one structure, the same static leaves, and shapes
    that fit.

    Arguments:
        parts: the shape of each microbatch's part.
        name: what it is, in errors, with the call.
        axes: those of a `Join`; `None`: everything is stacked on a new axis.

    Raises:
        ValueError: a part that differs from the first.
    """
    if axes is None:
        axes = (None,) * len(parts[0].leaves)

    def kept(leaf: jax.ShapeDtypeStruct, axis: int | None) -> tuple[int, ...]:
        """What of a shape must be the same: all but the number of rows."""
        if axis is None:
            return leaf.shape
        return (*leaf.shape[:axis], -1, *leaf.shape[axis + 1 :])

    # Microbatch 0 is the measure: it always has the full number of rows.
    first = parts[0]
    for i, part in enumerate(parts[1:], 1):
        if part.spec != first.spec:
            raise ValueError(
                f"{name} of microbatch {i} is {describe(part.tree)}, that of "
                f"microbatch 0 {describe(first.tree)}: they are put together again, so "
                "structure and static leaves must not depend on the number of rows"
            )
        for a, b, axis in zip(part.leaves, first.leaves, axes, strict=True):
            if a.dtype != b.dtype:
                raise ValueError(
                    f"{name} of microbatch {i} has a {describe(a)} where that of "
                    f"microbatch 0 has a {describe(b)}: they become one array, so the "
                    "dtype must not depend on the number of rows"
                )
            if len(a.shape) != len(b.shape) or kept(a, axis) != kept(b, axis):
                joined = f"they are concatenated on axis {axis}"
                if axis is None:
                    joined = "they are stacked over microbatches"
                raise ValueError(
                    f"{name} of microbatch {i} has the shapes "
                    f"{[a.shape for a in part.leaves]}, that of microbatch 0 "
                    f"{[a.shape for a in first.leaves]}; {joined}, so reduce what "
                    "depends on the number of rows"
                )


def join(parts: Sequence[Any], axis: int | None) -> Any:
    """The pieces of one array, concatenated on an axis; `None`: stacked."""
    if axis is None:
        return jnp.stack(parts)
    # One piece alone is the output already.
    return jnp.concatenate(parts, axis) if len(parts) > 1 else parts[0]


def stacked_pieces(whole: Any, m: int, axis: int) -> Any:
    """An array as its `m` pieces of equal size, on a new first axis."""
    shape = whole.shape
    split = whole.reshape(*shape[:axis], m, shape[axis] // m, *shape[axis + 1 :])
    return jnp.moveaxis(split, axis, 0) if axis else split


def joined_pieces(pieces: Any, axis: int | None) -> Any:
    """The inverse: pieces on a first axis, joined as `join` does it."""
    if axis is None:
        return pieces
    m, *shape = pieces.shape
    moved = jnp.moveaxis(pieces, 0, axis) if axis else pieces
    return moved.reshape(*shape[:axis], m * shape[axis], *shape[axis + 1 :])


def _is_chunk(leaf: Any) -> bool:
    return isinstance(leaf, Chunk)


def _is_wrapper(leaf: Any) -> bool:
    return isinstance(leaf, (NoChunk, Chunk))


def _unwrapped(tree: PyTree, kinds: Any) -> PyTree:
    """A pytree with what the wrappers of these kinds hold in their places."""
    is_kind = lambda leaf: isinstance(leaf, kinds)  # noqa: E731
    return jax.tree.map(
        lambda leaf: leaf.value if is_kind(leaf) else leaf, tree, is_leaf=is_kind
    )
