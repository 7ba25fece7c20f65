"""Rows of stacked parameters: a leaf that several pieces own, block by block.

In: a leaf of the parameters in which the layers of a model are stacked, `w[48, 4, 4]`.
Out: `Rows`, which name parts of the leaf on its first axis, and `RowBlocks`, which
replace the leaf in the user's tree when it is placed:

    Rows(leaf=0, start=0, stop=24)      piece 0       RowBlocks(w[0:24], w[24:48])
    Rows(leaf=0, start=24, stop=48)     piece 1       each block on its own device
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._core.pytrees import PyTree, is_array
from fpipe._split.by_rows import Part

# The `stop` of a leaf that is not divided, for any rank.
_WHOLE = -1


@dataclasses.dataclass(frozen=True, order=True)
class Rows:
    """A leaf of the parameters, or some of its rows.

    Attributes:
        leaf: its number among the arrays of the parameters.
        start, stop: its rows from `start` up to `stop`; a leaf that is not divided ends
            at -1.
        axis: where the rows are.
    """

    leaf: int
    start: int = 0
    stop: int = _WHOLE
    axis: int = 0

    @property
    def whole(self) -> bool:
        """Whether it is all of the leaf."""
        return self.stop == _WHOLE

    @property
    def count(self) -> int:
        """How many rows, of a leaf that is divided."""
        return self.part.count

    @property
    def part(self) -> Part:
        """The rows of a leaf that is divided."""
        return Part(self.axis, self.start, self.stop)

    def of(self, array: Any) -> Any:
        """These rows of the leaf, or of its shape."""
        if self.whole:
            return array
        if isinstance(array, jax.ShapeDtypeStruct):
            shape = self.part.shape(array.shape)
            return jax.ShapeDtypeStruct(shape, array.dtype, weak_type=array.weak_type)
        return self.part.of(array)

    def has(self, other: "Rows") -> bool:
        """Whether other rows are among these."""
        inside = self.start <= other.start and other.stop <= self.stop
        same = (self.leaf, self.axis) == (other.leaf, other.axis)
        return (same and inside) or (self.whole and self.leaf == other.leaf)

    def after(self, other: "Rows") -> bool:
        """Whether these follow other rows of the same leaf."""
        same = (self.leaf, self.axis) == (other.leaf, other.axis)
        return same and self.start == other.stop

    def split(self, array: Any, parts: Sequence["Rows"]) -> list[Any]:
        """Some parts of these rows, from the array that has all of them."""
        if list(parts) == [self] or any(part.whole for part in parts):
            return [array for _ in parts]
        # Of a leaf that one piece has as a whole the axis is that of its parts.
        axis = parts[0].axis
        ends = sorted({e - self.start for p in parts for e in (p.start, p.stop)})
        ends = [*({0} - {ends[0]}), *ends, *({array.shape[axis]} - {ends[-1]})]
        # As one operation, whose derivative puts the gradients of all parts together:
        # of so many slices it would add as many arrays of all rows.
        sizes = [b - a for a, b in itertools.pairwise(ends)]
        made = dict(zip(ends, jax.lax.split(array, sizes, axis), strict=False))
        return [made[part.start - self.start] for part in parts]

    def joined(self, arrays: Sequence[Any], parts: Sequence["Rows"]) -> Any:
        """The inverse of `split`, of all parts of these rows."""
        return arrays[0] if len(parts) == 1 else jnp.concatenate(arrays, parts[0].axis)

    def label(self, path: str) -> str:
        """What tables call them, by the path of the leaf."""
        if self.whole:
            return path or "(all)"
        last = f":{self.stop}" if self.count > 1 else ""
        return f"{path or '(all)'}[{':, ' * self.axis}{self.start}{last}]"


class Place(NamedTuple):
    """Where a block is: a piece, and the number of the block there."""

    piece: int
    number: int


@dataclasses.dataclass(frozen=True)
class Roots:
    """What a trace reads by itself of parameters and of state: leaves, and rows of
    stacked ones.
    """

    params: tuple[Rows, ...]
    state: tuple[Rows, ...]


@dataclasses.dataclass(frozen=True)
class Owners:
    """Which piece has which leaves, and rows of leaves.

    Attributes:
        owned: for each piece its blocks, in order.
    """

    owned: tuple[tuple[Rows, ...], ...]

    @classmethod
    def of(
        cls,
        roots: Sequence[Rows],
        owner: Mapping[int, int],
        shapes: Sequence[Any],
        pieces: int,
    ) -> "Owners":
        """From the piece that has each root. Rows that follow each other are one block.

        Arguments:
            owner: for each root its piece, in the order of the blocks.
            shapes: of the leaves.
        """
        owned: list[list[Rows]] = [[] for _ in range(pieces)]
        joined = set[int]()
        for root, piece in owner.items():
            if root in joined:
                continue

            def continues(before: int, after: int, piece: int = piece) -> bool:
                same = owner.get(before) == owner.get(after) == piece
                return same and roots[after].after(roots[before])

            first = last = root
            while continues(first - 1, first):
                first -= 1
            while continues(last, last + 1):
                last += 1
            joined.update(range(first, last + 1))
            a, b = roots[first], roots[last]
            block = Rows(a.leaf, a.start, b.stop, a.axis)
            if not a.whole and block.count == shapes[a.leaf].shape[a.axis]:
                block = Rows(a.leaf)
            owned[piece].append(block)
        return cls(tuple(map(tuple, owned)))

    @cached_property
    def places_of(self) -> dict[int, list[Place]]:
        """Of each leaf the places of its rows, in order."""
        found: dict[int, list[tuple[Rows, Place]]] = {}
        for k, blocks in enumerate(self.owned):
            for n, rows in enumerate(blocks):
                found.setdefault(rows.leaf, []).append((rows, Place(k, n)))
        return {
            leaf: [place for _, place in sorted(places)]
            for leaf, places in found.items()
        }

    @cached_property
    def places(self) -> list[Place]:
        """For each array of a tree with its leaves in blocks where it is."""
        return [
            place for leaf in sorted(self.places_of) for place in self.places_of[leaf]
        ]

    def place_of(self, root: Rows) -> Place:
        """Where the block is that a root is in."""
        for place in self.places_of[root.leaf]:
            if self.owned[place.piece][place.number].has(root):
                return place
        raise AssertionError(root)

    def by_piece(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
        """The leaves, or their shapes, as the pieces have them."""
        return tuple(
            tuple(rows.of(arrays[rows.leaf]) for rows in blocks)
            for blocks in self.owned
        )

    def from_blocks(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
        """The same from the arrays of a tree with its leaves in blocks."""
        made = dict(zip(self.places, arrays, strict=True))
        return tuple(
            tuple(made[Place(k, n)] for n in range(len(blocks)))
            for k, blocks in enumerate(self.owned)
        )

    def leaves(self, pieces: Sequence[Sequence[Any]]) -> list[Any]:
        """The inverse of both: an array for each leaf, or a `RowBlocks`."""
        found = []
        for leaf in sorted(self.places_of):
            places = self.places_of[leaf]
            blocks = [pieces[p.piece][p.number] for p in places]
            axis = self.owned[places[0].piece][places[0].number].axis
            if len(blocks) == 1:
                found += blocks
            else:
                found.append(RowBlocks(tuple(blocks), axis))
        return found


def divided(rows: int, asked: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of a leaf that are read apart, gaps between them included; none: it is
    read as a whole, or in parts that overlap. Of parts in parts, as those of a loop in
    a loop, it is the inner ones.
    """
    parts, end = [], 0
    # An outer part comes right before what is in it.
    asked = sorted(asked, key=lambda part: (part[0], -part[1]))
    asked = [
        (start, stop)
        for (start, stop), following in zip(asked, [*asked[1:], None], strict=True)
        if following is None or following[1] > stop or following[0] >= stop
    ]
    for start, stop in asked:
        if start < end:
            return []
        parts += [(end, start)] if start > end else []
        parts.append((start, stop))
        end = stop
    return parts + ([(end, rows)] if end < rows else []) if len(asked) > 1 else []


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class RowBlocks:
    """A stacked parameter in blocks of rows, each on the device of its owner.

    It replaces an array whose rows belong to several pieces of an `fpipe.split`: in
    placed parameters, in gradients, and in the states of optimizers. `pipe.place` makes
    it, and `pipe.gather` joins it. It is a pytree of its blocks.

    Attributes:
        blocks: arrays with consecutive rows of the whole array.
        axis: the axis of the rows, on which layers are stacked. Default 0.

    Example:
        >>> whole = fpipe.RowBlocks((jnp.ones((2, 3)), jnp.zeros((1, 3))))
        >>> whole.shape
        (3, 3)
        >>> whole.join().shape
        (3, 3)
    """

    blocks: tuple[Any, ...]
    axis: int = 0

    @property
    def counts(self) -> list[int]:
        """The number of rows of each block."""
        return [block.shape[self.axis] for block in self.blocks]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole array."""
        return Part(self.axis, 0, sum(self.counts)).shape(self.blocks[0].shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the blocks."""
        return self.blocks[0].dtype

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        # numpy would make an array of one object.
        raise TypeError(
            "a `RowBlocks` is no array: its rows are in blocks, which may be on "
            "several devices; `pipe.gather(...)` or `step.gather(...)` joins them, or "
            "`blocks.join()` if all are on one device"
        )

    def join(self) -> Any:
        """All rows as one array.

        The blocks must be on one device, or traced.
        """
        if self.dtype == jax.dtypes.float0:
            return np.zeros(self.shape, jax.dtypes.float0)
        if isinstance(self.blocks[0], jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(self.shape, self.dtype)
        if all(isinstance(block, np.ndarray) for block in self.blocks):
            return np.concatenate(self.blocks, self.axis)
        return jnp.concatenate(self.blocks, self.axis)

    def of_whole(self, array: Any) -> "RowBlocks":
        """Cut a whole array into blocks with as many rows as these.

        Arguments:
            array: an array of the same shape, or its shape.

        Returns:
            A `RowBlocks`.
        """
        ends = list(itertools.accumulate(self.counts, initial=0))
        rows = (Rows(0, a, b, self.axis) for a, b in itertools.pairwise(ends))
        return RowBlocks(tuple(part.of(array) for part in rows), self.axis)

    def with_blocks(self, blocks: Iterable[Any]) -> "RowBlocks":
        """Other blocks in the place of these.

        Arguments:
            blocks: one entry for each block.

        Returns:
            A `RowBlocks` with the same axis.
        """
        return RowBlocks(tuple(blocks), self.axis)

    def tree_flatten_with_keys(self) -> tuple[tuple[Any, ...], int]:
        """The blocks with their numbers; JAX calls this."""
        keys = map(jax.tree_util.SequenceKey, range(len(self.blocks)))
        return tuple(zip(keys, self.blocks, strict=True)), self.axis

    @classmethod
    def tree_unflatten(cls, axis: int, blocks: Sequence[Any]) -> "RowBlocks":
        """A `RowBlocks` of new blocks; JAX calls this."""
        return cls(tuple(blocks), axis)


def is_row_blocks(node: Any) -> bool:
    """Whether a node of a tree is a leaf in blocks."""
    return isinstance(node, RowBlocks)


def joined(
    tree: PyTree, join_blocks: Callable[[RowBlocks], Any] = RowBlocks.join
) -> PyTree:
    """A tree with an array in the place of each leaf in blocks.

    Arguments:
        join_blocks: makes the array of the blocks.
    """

    def join(node: Any) -> Any:
        if not isinstance(node, RowBlocks):
            return node
        # A leaf that an optax transformation does not see has no rows. Neither has an
        # update that changes nothing.
        rows = all(is_array(block) and block.ndim > node.axis for block in node.blocks)
        return join_blocks(node) if rows else node.blocks[0]

    return jax.tree.map(join, tree, is_leaf=is_row_blocks)
