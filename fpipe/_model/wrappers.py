"""Wrappers: a user puts one around a value to say how the value is cut or joined.

    in x, side, targets            what a microbatch gets
    -----------------------------  ---------------------------------------------
    NoChunk(mask)                  all of it
    Chunk(hidden, axis=1)          its rows, which lie along axis 1
    Microbatches([x0, x1, x2])     `x0`, `x1` or `x2`

    returned                       what the caller gets
    -----------------------------  ---------------------------------------------
    Chunk(y, axis=1)               by the last layer: `y`, concatenated on axis 1
    PerRow(prediction)             in aux: it, concatenated on axis 0

All are pytrees, so `jax.grad`, `jax.device_put` and the user's own maps reach the
arrays inside. Layers and losses never get a wrapper.
"""

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from fpipe._core.errors import a_type
from fpipe._core.pytrees import PyTree


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class NoChunk:
    """A value that every microbatch gets whole, in `x`, `side` or targets.

    Its gradient is the sum over the microbatches.

    Arguments:
        value: an array, or a pytree of arrays. A 0-d array needs this wrapper, because
            it has no rows.

    Example:
        >>> temperature = fpipe.NoChunk(jnp.float32(0.7))
        >>> x = {"image": jnp.ones((8, 32)), "temperature": temperature}
    """

    value: PyTree

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

    In `x`, `side` and targets the value is cut along that axis, and its gradient comes
    back as a `Chunk`. The last layer may return a `Chunk`: then the outputs of the
    microbatches are concatenated on that axis. Layers, the loss and the caller get the
    array itself, without the wrapper.

    Arguments:
        value: an array, or a pytree of arrays. All have their rows on `axis`.
        axis: the axis of the rows. A negative axis counts from the last.

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
                f"`fpipe.Chunk(…, axis={self.axis!r})`: axis must be an int, such as 1"
            ) from None

    def tree_flatten(self) -> tuple[tuple[PyTree], int]:
        return (self.value,), self.axis

    @classmethod
    def tree_unflatten(cls, axis: int, children: tuple[PyTree]) -> "Chunk":
        return cls(children[0], axis)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Microbatches:
    """Ready-made microbatches, in the place of an input that would be cut.

    The shapes of the microbatches may differ, for example in the lengths of sequences.
    Their structure, dtypes and static leaves (those that are no arrays) must be equal.
    The number of pieces is the call's number of microbatches, whatever `chunks` says.
    The call's other inputs are cut into the same number, or are `Microbatches` too.
    `pipe(...)` then returns `Microbatches`.

    Each set of shapes is compiled once. `reduction="mean"` weighs a microbatch by the
    rows of the first array of `x`. `"weighted"` is exact for any lengths.

    Arguments:
        pieces: one pytree for each microbatch, at least one. A `Chunk` around an array
            in it says on which axis the rows of that array are.

    Raises:
        TypeError: `pieces` is no list or tuple.
        ValueError: `pieces` is empty.

    Example:
        >>> short, long = jnp.ones((4, 16, 8)), jnp.ones((4, 64, 8))
        >>> x = fpipe.Microbatches([short, long])
        >>> len(x)
        2
    """

    pieces: tuple[PyTree, ...]

    def __init__(self, pieces: Sequence[PyTree]) -> None:
        if not isinstance(pieces, (list, tuple)):
            raise TypeError(
                "`fpipe.Microbatches(pieces)`: a list with what each microbatch gets "
                f"is needed, got {a_type(pieces)}"
            )
        if not pieces:
            raise ValueError(
                "`fpipe.Microbatches([])`: at least one microbatch is needed"
            )
        object.__setattr__(self, "pieces", tuple(pieces))

    def __len__(self) -> int:
        return len(self.pieces)

    def __iter__(self) -> Iterator[PyTree]:
        return iter(self.pieces)

    def __getitem__(self, i: int) -> PyTree:
        return self.pieces[i]

    def tree_flatten(self) -> tuple[tuple[PyTree, ...], None]:
        return self.pieces, None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[PyTree, ...]) -> "Microbatches":
        del aux
        return cls(tuple(children))


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class PerRow:
    """A value in a loss function's `aux` that has one entry for each row.

    The caller gets the entries of all rows: the values of the microbatches are
    concatenated on axis 0. Other leaves of `aux` are stacked on a new axis, with one
    entry for each microbatch. If the inputs are `Microbatches`, the caller gets
    `Microbatches`.

    Arguments:
        value: an array, or a pytree of arrays, with the rows on axis 0.

    Example:
        >>> def loss_fn(logits, labels):
        ...     hit = logits.argmax(-1) == labels
        ...     return -logits.max(-1).mean(), {"hit": fpipe.PerRow(hit)}
    """

    value: PyTree

    def tree_flatten(self) -> tuple[tuple[PyTree], None]:
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[PyTree]) -> "PerRow":
        del aux
        return cls(children[0])


def is_wrapper(leaf: Any) -> bool:
    """Whether a value is a wrapper; for `is_leaf` of JAX's functions."""
    return isinstance(leaf, (NoChunk, Chunk, Microbatches, PerRow))


def wrappers_in(tree: PyTree) -> list[Any]:
    """The outermost wrappers in a pytree."""
    return [
        leaf for leaf in jax.tree.leaves(tree, is_leaf=is_wrapper) if is_wrapper(leaf)
    ]


def without_chunks(tree: PyTree) -> PyTree:
    """An output without the `Chunk`s that say how it is joined."""
    is_chunk = lambda leaf: isinstance(leaf, Chunk)  # noqa: E731
    return jax.tree.map(
        lambda leaf: leaf.value if is_chunk(leaf) else leaf, tree, is_leaf=is_chunk
    )


def unwrapped(tree: PyTree) -> PyTree:
    """An input as a microbatch has it: what wrappers hold in their places, of
    `Microbatches` the first.
    """

    def bare(leaf: Any) -> Any:
        if isinstance(leaf, Microbatches):
            return unwrapped(leaf.pieces[0])
        return leaf.value if is_wrapper(leaf) else leaf

    return jax.tree.map(bare, tree, is_leaf=is_wrapper)
