"""Microbatches: how a batch is split on axis 0 and how outputs are put together again."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fpipe._tree import PyTree, Spec, is_array, pack


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class NoChunk:
    """A value that goes whole to every microbatch; its gradient is the sum over them.

    Arguments:
        value: an array, or a pytree of arrays. 0-d arrays need it.
    """

    value: PyTree

    def tree_flatten(self) -> tuple[tuple[PyTree], None]:
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[PyTree]) -> "NoChunk":
        del aux
        return cls(children[0])


def _no_chunk(leaf: Any) -> bool:
    return isinstance(leaf, NoChunk)


@dataclasses.dataclass(frozen=True)
class Split:
    """How one pytree is cut into `m` pieces.

    Attributes:
        spec: the structure of the whole pytree, `NoChunk`s included.
        piece: the structure that a microbatch gets, with `NoChunk`s unwrapped.
        whole: for each array whether it goes whole to every microbatch.
        rows: for each array its rows in each piece; empty for a whole one.
    """

    spec: Spec
    piece: Spec
    whole: tuple[bool, ...]
    rows: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int | None:
        """`m`, or `None` if nothing is cut."""
        return next((len(r) for r in self.rows if r), None)

    def cut(self, k: int, i: int, leaf: Any) -> Any:
        """The `i`-th piece of the `k`-th array."""
        if self.whole[k]:
            return leaf
        start = sum(self.rows[k][:i])
        return jax.lax.slice_in_dim(leaf, start, start + self.rows[k][i])

    def shape(self, k: int, i: int, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """The shape of the `i`-th piece of the `k`-th array."""
        if self.whole[k]:
            return leaf
        return jax.ShapeDtypeStruct((self.rows[k][i], *leaf.shape[1:]), leaf.dtype, weak_type=leaf.weak_type)


def pieces(rows: int, chunks: int) -> tuple[int, ...]:
    """The rows of each piece: `ceil(rows / chunks)` each, the last one what is left."""
    size = -(-rows // chunks)
    return tuple(min(size, rows - start) for start in range(0, rows, size))


def split(tree: PyTree, chunks: int, what: str) -> Split:
    """Decide how a pytree is cut.

    Arguments:
        tree: arrays (or shapes), static leaves, `None`, `NoChunk`s.
        chunks: the most pieces.
        what: its name in errors: `x`, `side`, `targets`.

    Raises:
        ValueError: a 0-d array outside `NoChunk`, no rows, or leaves that give unequal numbers of pieces.
    """
    _, spec = pack(tree)
    paths = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_no_chunk)[0]
    whole: list[bool] = []
    rows: list[tuple[int, ...]] = []
    named: list[tuple[str, tuple[int, ...]]] = []
    for path, leaf in paths:
        if isinstance(leaf, NoChunk):
            for inner in jax.tree.leaves(leaf.value):
                if is_array(inner):
                    whole.append(True)
                    rows.append(())
        elif is_array(leaf):
            name = what + jax.tree_util.keystr(path)
            if not leaf.shape:
                raise ValueError(
                    f"`{name}` is a 0-d array and cannot be cut into microbatches; wrap it in fpipe.NoChunk to send "
                    "it whole to every microbatch"
                )
            if not leaf.shape[0]:
                raise ValueError(f"`{name}` has no rows: its shape is {leaf.shape}")
            whole.append(False)
            rows.append(pieces(leaf.shape[0], chunks))
            named.append((name, leaf.shape))
    check_counts(named, chunks)
    inner = jax.tree.map(lambda leaf: leaf.value if _no_chunk(leaf) else leaf, tree, is_leaf=_no_chunk)
    return Split(spec, pack(inner)[1], tuple(whole), tuple(rows))


def check_counts(named: Sequence[tuple[str, tuple[int, ...]]], chunks: int) -> None:
    """Every array must give the same number of pieces."""
    if not named:
        return
    first, first_shape = named[0]
    count = len(pieces(first_shape[0], chunks))
    for name, shape in named[1:]:
        got = len(pieces(shape[0], chunks))
        if got != count:
            raise ValueError(
                f"`{first}` of shape {first_shape} gives {count} pieces with chunks={chunks}, but `{name}` of shape "
                f"{shape} gives {got}; wrap one in fpipe.NoChunk, or give both the same number of rows"
            )


def join(parts: Sequence[Any]) -> Any:
    """Outputs of the microbatches as one: concatenated on axis 0, 0-d ones stacked to `(m,)`."""
    if not parts[0].shape:
        return jnp.stack(parts)
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]
