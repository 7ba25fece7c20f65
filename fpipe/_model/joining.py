"""What the microbatches return, put together.

In: the output, or the aux, of one microbatch as it was returned, with wrappers. Out: a
`Join`, which says what the whole is made of. For ten rows in four microbatches, of
which one returns

    {"y": Chunk(float32[5,3,8], 1), "mean": float32[]}

    whole     {"y": …, "mean": …}
    parts     Stacked(0), Concatenated(1, axis=1)       "mean" comes first: a dict is
                                                        flattened by its sorted keys
    arrays    float32[4], float32[5,10,8]

Of a call with ready-made microbatches each output is `Apart`, in a `Microbatches`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._core.pytrees import PyTree, Shape, Spec, describe, pack
from fpipe._model.microbatch import axes_of, has_axis
from fpipe._model.wrappers import (
    Chunk,
    Microbatches,
    PerRow,
    without_chunks,
    wrappers_in,
)


@dataclasses.dataclass(frozen=True)
class Stacked:
    """All microbatches' arrays of a number, on a new first axis of `m`."""

    number: int


@dataclasses.dataclass(frozen=True)
class Concatenated:
    """All microbatches' arrays of a number, concatenated on an axis."""

    number: int
    axis: int


@dataclasses.dataclass(frozen=True)
class Apart:
    """The array of a number of one microbatch, as it is."""

    number: int
    microbatch: int


# The microbatches of each shape, ascending; see `Cut.alike`.
Alike: TypeAlias = Sequence[Sequence[int]]

# What an array of the whole is made of.
Part: TypeAlias = Stacked | Concatenated | Apart


@dataclasses.dataclass(frozen=True)
class Join:
    """How what the microbatches return becomes what the call returns.

    Attributes:
        whole: the structure of the whole, without wrappers.
        parts: what each array of it is made of.
    """

    whole: Spec
    parts: tuple[Part, ...]

    @classmethod
    def of_output(cls, piece: Shape, ready: int | None) -> "Join":
        """Of outputs: concatenated on axis 0 or on that of a `Chunk`, 0-d ones stacked.

        Arguments:
            piece: of one microbatch, as the last layer returned it.
            ready: the number of ready-made microbatches; `None`: they were cut.
        """
        # (0-d outputs are means over the rows, say: what a mean of means would be is
        # for the user to say.)
        marks = _marks(piece)
        if ready is not None:
            return cls._of(_apart(without_chunks(marks), ready))

        def joined(leaf: Any) -> Any:
            if not isinstance(leaf, Chunk):
                return leaf.concatenated(0) if isinstance(leaf, _Mark) else leaf
            return _map_marks(lambda mark: mark.concatenated(leaf.axis), leaf.value)

        return cls._of(jax.tree.map(joined, marks, is_leaf=_is(Chunk)))

    @classmethod
    def of_aux(cls, piece: Shape, ready: int | None) -> "Join":
        """Of aux: stacked, or, in a `PerRow`, concatenated on axis 0."""

        def joined(leaf: Any) -> Any:
            if not isinstance(leaf, PerRow):
                return Stacked(leaf.number) if isinstance(leaf, _Mark) else leaf
            if ready is not None:
                return _apart(leaf.value, ready)
            return _map_marks(lambda mark: mark.concatenated(0), leaf.value)

        return cls._of(jax.tree.map(joined, _marks(piece), is_leaf=_is(PerRow)))

    @classmethod
    def _of(cls, tree: PyTree) -> "Join":
        """From a pytree with parts in the places of arrays."""
        leaves, treedef = jax.tree.flatten(tree)
        parts = tuple(leaf for leaf in leaves if isinstance(leaf, Part))
        static = tuple(
            (n, leaf) for n, leaf in enumerate(leaves) if not isinstance(leaf, Part)
        )
        return cls(Spec(treedef, static, len(parts)), parts)

    def arrays(self, columns: Sequence[Sequence[Any]]) -> list[Any]:
        """The arrays of the whole.

        Arguments:
            columns: for each array of a microbatch those of all microbatches.
        """
        made = []
        for part in self.parts:
            column = columns[part.number]
            match part:
                case Stacked():
                    made.append(jnp.stack(column))
                case Concatenated(_, axis):
                    # One piece alone is the output already.
                    one = len(column) == 1
                    made.append(column[0] if one else jnp.concatenate(column, axis))
                case Apart(_, i):
                    made.append(column[i])
        return made

    def of_stacks(self, columns: Sequence[Sequence[Any]], alike: Alike) -> list[Any]:
        """The arrays of the whole.

        Arguments:
            columns: for each array of a microbatch those of the microbatches of each
                shape, on a first axis.
        """
        made = []
        for part in self.parts:
            stacks = columns[part.number]
            match part:
                case Stacked():
                    made.append(in_order(stacks, alike))
                case Concatenated(_, axis):
                    made.append(joined_stacks(stacks, alike, axis))
                case Apart(_, i):
                    made.append(piece_of(stacks, alike, i))
        return made

    def stacks(
        self,
        number: int,
        arrays: Sequence[Any],
        shapes: Sequence[jax.ShapeDtypeStruct],
        alike: Alike,
    ) -> list[Any]:
        """The inverse for one array of the microbatches: those of each shape on a first
        axis.

        Arguments:
            arrays: those of the whole.
            shapes: of the array, for each shape of microbatch.
        """
        found = [n for n, part in enumerate(self.parts) if part.number == number]
        whole = arrays[found[0]]
        match self.parts[found[0]]:
            case Stacked():
                return [_taken(whole, pieces) for pieces in alike]
            case Concatenated(_, axis):
                stride = shapes[0].shape[axis]
                return [
                    stacked_pieces(whole, axis, pieces, stride, shape.shape[axis])
                    for pieces, shape in zip(alike, shapes, strict=True)
                ]
            case Apart():
                return [jnp.stack([arrays[found[i]] for i in own]) for own in alike]

    def part_of(self, number: int, i: int) -> tuple[int, Part]:
        """The array of the whole that an array of microbatch `i` is in, and how."""
        return next(
            (n, part)
            for n, part in enumerate(self.parts)
            if part.number == number
            and not (isinstance(part, Apart) and part.microbatch != i)
        )


@dataclasses.dataclass(frozen=True)
class _Mark:
    """Stands for an array of one microbatch."""

    number: int
    rank: int

    def concatenated(self, axis: int) -> Part:
        if not self.rank:
            return Stacked(self.number)
        return Concatenated(self.number, axis % self.rank)


def _marks(piece: Shape) -> PyTree:
    return piece.spec.unpack(
        [_Mark(n, len(a.shape)) for n, a in enumerate(piece.leaves)]
    )


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda leaf: isinstance(leaf, kind)


def _map_marks(f: Callable[[_Mark], Part], tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: f(leaf) if _is(_Mark)(leaf) else leaf, tree)


def _apart(tree: PyTree, m: int) -> Microbatches:
    """What ready-made microbatches returned, as it comes back."""

    def piece(i: int) -> PyTree:
        return _map_marks(lambda mark: Apart(mark.number, i), tree)

    return Microbatches([piece(i) for i in range(m)])


def stacked_pieces(
    whole: Any, axis: int, pieces: Sequence[int], stride: int, size: int
) -> Any:
    """Pieces of an array, on a new first axis.

    Arguments:
        pieces: their numbers, ascending.
        stride: how long each piece before the last one of the array is on the axis.
        size: how long each of these is.
    """
    if not _is_range(pieces):
        # Others of another shape are between them, so these are not the last ones.
        every = stacked_pieces(
            whole, axis, range(whole.shape[axis] // stride), stride, size
        )
        return _taken(every, pieces)
    start = pieces[0] * stride
    stop = start + len(pieces) * size
    part = jax.lax.slice_in_dim(whole, start, stop, axis=axis)
    shape = part.shape
    split = part.reshape(*shape[:axis], len(pieces), size, *shape[axis + 1 :])
    return jnp.moveaxis(split, axis, 0) if axis else split


def joined_pieces(pieces: Any, axis: int) -> Any:
    """The inverse: pieces on a first axis, concatenated."""
    m, *shape = pieces.shape
    moved = jnp.moveaxis(pieces, 0, axis) if axis else pieces
    return moved.reshape(*shape[:axis], m * shape[axis], *shape[axis + 1 :])


def in_order(stacks: Sequence[Any], alike: Alike) -> Any:
    """The arrays of all microbatches on a first axis, from those of each shape."""
    if len(stacks) == 1:
        return stacks[0]
    together = jnp.concatenate(stacks)
    order = [i for pieces in alike for i in pieces]
    return together if _is_range(order) else together[np.argsort(order)]


def joined_stacks(stacks: Sequence[Any], alike: Alike, axis: int) -> Any:
    """The arrays of all microbatches concatenated, from those of each shape."""
    if len(stacks) == 1:
        return joined_pieces(stacks[0], axis)
    order = [i for pieces in alike for i in pieces]
    if _is_range(order):
        return jnp.concatenate([joined_pieces(s, axis) for s in stacks], axis)
    pieces = [piece_of(stacks, alike, i) for i in sorted(order)]
    return jnp.concatenate(pieces, axis)


def piece_of(stacks: Sequence[Any], alike: Alike, i: int) -> Any:
    """The array of microbatch `i`, from those of each shape."""
    n = next(n for n, pieces in enumerate(alike) if i in pieces)
    return stacks[n][alike[n].index(i)]


def _taken(stack: Any, pieces: Sequence[int]) -> Any:
    """Some of the pieces on a first axis; their numbers are ascending."""
    if _is_range(pieces):
        return jax.lax.slice_in_dim(stack, pieces[0], pieces[-1] + 1)
    return stack[np.array(pieces)]


def _is_range(numbers: Sequence[int]) -> bool:
    """Whether each number is the one before and one."""
    return list(numbers) == list(range(numbers[0], numbers[0] + len(numbers)))


def check_output_axes(y: PyTree, who: str) -> None:
    """Refuse a `Chunk` with an axis that an array in it does not have.

    Arguments:
        y: with no other wrappers in it.
        who: the layer that returned it.

    Raises:
        ValueError: there is one.
    """
    for chunk in wrappers_in(y):
        for inner in wrappers_in(chunk.value):
            raise ValueError(
                f"{who} returned an fpipe.{type(inner).__name__} inside of an "
                "fpipe.Chunk; one wrapper says how it is joined"
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
                    f"{describe(array)}: its axes are {axes_of(array)}"
                )


def check_alike(pieces: Sequence[Shape], name: str, join: Join) -> None:
    """What is put together again has one structure, the same static leaves, and shapes
    that fit.

    Arguments:
        pieces: the shape of what each microbatch returned.
        name: what it is, in errors, with the call.

    Raises:
        ValueError: one that differs from the first.
    """

    def kept(shape: tuple[int, ...], part: Part) -> tuple[int, ...] | None:
        """What of a shape must be the same."""
        match part:
            case Stacked():
                return shape
            case Concatenated(_, axis):
                return (*shape[:axis], -1, *shape[axis + 1 :])
            case Apart():
                return None

    # Microbatch 0 is the measure: of those that are cut it has the full number of rows.
    first = pieces[0]
    for i, piece in enumerate(pieces[1:], 1):
        if piece.spec != first.spec:
            raise ValueError(
                f"{name} of microbatch {i} is {describe(piece.tree)}, that of "
                f"microbatch 0 {describe(first.tree)}: they are joined, so structure "
                "and static leaves must not depend on the number of rows"
            )
        for k, (a, b) in enumerate(zip(piece.leaves, first.leaves, strict=True)):
            if a.dtype != b.dtype:
                raise ValueError(
                    f"{name} of microbatch {i} has {describe(a)} where that of "
                    f"microbatch 0 has {describe(b)}: they are joined, so the dtype "
                    "must not depend on the number of rows"
                )
            part = join.part_of(k, i)[1]
            if kept(a.shape, part) != kept(b.shape, part):
                joined = "they are stacked over microbatches"
                if isinstance(part, Concatenated):
                    joined = f"they are concatenated on axis {part.axis}"
                raise ValueError(
                    f"{name} of microbatch {i} has the shapes "
                    f"{[a.shape for a in piece.leaves]}, that of microbatch 0 "
                    f"{[a.shape for a in first.leaves]}; {joined}, so reduce what "
                    "depends on the number of rows"
                )
