"""Microbatches: how a batch is cut on axis 0 and how outputs are put together again."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from fpipe._core.pytrees import PyTree, Shape, Spec, aval, describe, is_array, pack
from fpipe._model.needs import BY_NAME, INPUTS, Share


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class NoChunk:
    """A value that goes whole to every microbatch; its gradient is the sum over them.

    Arguments:
        value: an array, or a pytree of arrays. 0-d arrays need it.

    Example:
        >>> x = {"image": jnp.ones((8, 32)), "temperature": fpipe.NoChunk(jnp.float32(0.7))}
    """

    value: PyTree

    def tree_flatten(self) -> tuple[tuple[PyTree], None]:
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[PyTree]) -> "NoChunk":
        del aux
        return cls(children[0])


@dataclasses.dataclass(frozen=True)
class Split:
    """How one pytree is cut into pieces.

    Attributes:
        piece: the structure that a microbatch gets, with `NoChunk`s unwrapped.
        rows: for each array its rows in each piece; `None` for one that goes whole to
            every microbatch.
    """

    piece: Spec
    rows: tuple[tuple[int, ...] | None, ...]

    def cut(self, k: int, i: int, leaf: Any) -> Any:
        """The `i`-th piece of the `k`-th array."""
        rows = self.rows[k]
        if rows is None:
            return leaf
        start = sum(rows[:i])
        return jax.lax.slice_in_dim(leaf, start, start + rows[i])

    def shape(self, i: int, leaves: Sequence[jax.ShapeDtypeStruct]) -> Shape:
        """The shape of the `i`-th piece, from the shapes of the whole arrays."""
        return Shape(
            self.piece,
            tuple(
                a
                if rows is None
                else jax.ShapeDtypeStruct(
                    (rows[i], *a.shape[1:]), a.dtype, weak_type=a.weak_type
                )
                for a, rows in zip(leaves, self.rows, strict=True)
            ),
        )

    def tree(self, i: int, tree: PyTree) -> PyTree:
        """The `i`-th piece of a pytree of arrays."""
        return self.piece.unpack(
            [self.cut(k, i, a) for k, a in enumerate(pack(tree)[0])]
        )


@dataclasses.dataclass(frozen=True)
class Cut:
    """How what a call gives is cut into `m` microbatches.

    Attributes:
        splits: for each input of the call, by its name in the table of needs, how its
            arrays are cut.
    """

    splits: Mapping[str, Split]
    m: int

    @cached_property
    def columns(self) -> tuple[tuple[int, ...], ...]:
        """The rows in each piece of every array that is cut, `x` first."""
        return tuple(
            rows for split in self.splits.values() for rows in split.rows if rows
        )

    @property
    def shares(self) -> tuple[float, ...]:
        """Each microbatch's share of the rows: its weight in a mean."""
        rows = next(iter(self.columns), (1,))
        return tuple(n / sum(rows) for n in rows)

    def variant(self, i: int) -> tuple[int, ...]:
        """Microbatches with equal variants have equal shapes."""
        return tuple(rows[i] for rows in self.columns)

    def pieces(self, i: int, inputs: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """What microbatch `i` gets of the inputs."""
        return {name: self.splits[name].tree(i, tree) for name, tree in inputs.items()}


def cut_inputs(inputs: Mapping[str, PyTree], chunks: int) -> Cut:
    """Decide the microbatches of a call.

    Arguments:
        inputs: what the call gives, by the names of the needs (`x`, `side`, `targets`,
            …): arrays (or shapes), static leaves, `None`, `NoChunk`s. What is not
            there is nothing.
        chunks: the most pieces.

    Raises:
        TypeError: no array in `x`.
        ValueError: a 0-d array outside `NoChunk`, no rows, or arrays that give unequal
            numbers of pieces.
    """
    if not any(map(is_array, jax.tree.leaves(inputs["x"]))):
        raise TypeError(
            "`pipe(params, x)`: x has no array; a pipeline needs at least one array to "
            "cut into microbatches"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    splits: dict[str, Split] = {}
    for name in INPUTS:
        tree = inputs.get(name)
        if BY_NAME[name].share is Share.ROWS:
            splits[name] = _split(tree, chunks, name, shapes)
        else:
            arrays, spec = pack(tree)
            splits[name] = Split(spec, (None,) * len(arrays))
    counts = {name: len(pieces(shape[0], chunks)) for name, shape in shapes.items()}
    first = next(iter(counts), "")
    for name, count in counts.items():
        if count != counts[first]:
            raise ValueError(
                f"with chunks={chunks} `{first}` of shape {shapes[first]} gives "
                f"{counts[first]} pieces, but `{name}` of "
                f"shape {shapes[name]} gives {count}; give both the same number of "
                "rows, or wrap one in fpipe.NoChunk"
            )
    return Cut(splits, m=counts.get(first, 1))


def check_equal_pieces(cut: Cut, chunks: int) -> None:
    """Refuse pieces of different sizes, which one program cannot take.

    Raises:
        ValueError: it says which numbers of chunks would do.
    """
    for rows in cut.columns:
        if len(set(rows)) > 1:
            total = sum(rows)
            fit = [n for n in range(1, total + 1) if total % n == 0]
            near = sorted(sorted(fit, key=lambda n: (abs(n - chunks), n))[:6])
            raise ValueError(
                f'executor="scan" needs microbatches of equal size, but {total} rows '
                f"in {chunks} chunks give pieces of "
                f"{rows[0]} rows and a last one of {rows[-1]}; "
                f"chunks={', '.join(map(str, near))} would do, or "
                "pad the batch"
            )


def first_microbatch(
    x: PyTree, needs: Mapping[str, PyTree], chunks: int
) -> tuple[PyTree, dict[str, PyTree]]:
    """The shapes of the first microbatch: of `x`, and of the needs that are given."""
    inputs = {"x": x, **needs}
    cut = cut_inputs(inputs, chunks)
    shapes = {
        name: cut.splits[name].shape(0, [aval(a) for a in pack(tree)[0]]).tree
        for name, tree in inputs.items()
    }
    return shapes.pop("x"), shapes


def pieces(rows: int, chunks: int) -> tuple[int, ...]:
    """The rows of each piece: `ceil(rows / chunks)` each, the last one what is left.

    Example:
        >>> pieces(10, 4), pieces(2, 4)
        ((3, 3, 3, 1), (1, 1))
    """
    size = -(-rows // chunks)
    return tuple(min(size, rows - start) for start in range(0, rows, size))


def check_alike(parts: Sequence[Shape], what: str, stacked: bool) -> None:
    """What is put together again has one structure, the same static leaves, and shapes
    that fit.

    Arguments:
        parts: the shape of each microbatch's part.
        what: its name in errors, with the call.
        stacked: on a new axis, or concatenated on axis 0.

    Raises:
        ValueError: a part that differs from the first.
    """
    first = parts[0]
    for i, part in enumerate(parts[1:], 1):
        if part.spec != first.spec:
            raise ValueError(
                f"{what} of microbatch {i} is {describe(part.tree)}, that of "
                f"microbatch 0 {describe(first.tree)}: they are "
                "put together again, so structure and static leaves must not depend on "
                "the number of rows"
            )
        shapes = [
            [a.shape if stacked or not a.shape else a.shape[1:] for a in p.leaves]
            for p in (part, first)
        ]
        dtypes = [[a.dtype for a in p.leaves] for p in (part, first)]
        if shapes[0] != shapes[1] or dtypes[0] != dtypes[1]:
            how = (
                "aux is stacked over microbatches"
                if stacked
                else "they are concatenated on axis 0"
            )
            raise ValueError(
                f"{what} of microbatch {i} has the shapes "
                f"{[a.shape for a in part.leaves]}, that of microbatch 0 "
                f"{[a.shape for a in first.leaves]}; {how}, so reduce what depends on "
                "the number of rows"
            )


def join(parts: Sequence[Any]) -> Any:
    """Outputs of the microbatches as one: concatenated on axis 0, 0-d ones stacked to
    `(m,)`.
    """
    if not parts[0].shape:
        return jnp.stack(parts)
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _is_whole(leaf: Any) -> bool:
    return isinstance(leaf, NoChunk)


def _split(
    tree: PyTree, chunks: int, what: str, shapes: dict[str, tuple[int, ...]]
) -> Split:
    """Decide how a pytree is cut, and add the shapes of its cut arrays by name to
    `shapes`.
    """
    rows: list[tuple[int, ...] | None] = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_whole)[0]:
        name = what + jax.tree_util.keystr(path)
        if _is_whole(leaf):
            rows += [None for inner in jax.tree.leaves(leaf.value) if is_array(inner)]
        elif is_array(leaf):
            if not leaf.shape:
                raise ValueError(
                    f"`{name}` is a 0-d array and cannot be cut into microbatches; "
                    "wrap it in fpipe.NoChunk to send it "
                    "whole to every microbatch"
                )
            if not leaf.shape[0]:
                raise ValueError(f"`{name}` has no rows: its shape is {leaf.shape}")
            rows.append(pieces(leaf.shape[0], chunks))
            shapes[name] = leaf.shape
    inner = jax.tree.map(
        lambda leaf: leaf.value if _is_whole(leaf) else leaf, tree, is_leaf=_is_whole
    )
    return Split(pack(inner)[1], tuple(rows))
