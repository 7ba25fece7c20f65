"""Microbatches: how a batch is cut on axis 0 and how outputs are put together again.

A call with ten rows and `chunks=4` has four microbatches, the last one smaller:

    x                  float32[10,8]      rows 0-2 | 3-5 | 6-8 | 9
    side: NoChunk      float32[8]         all      | all | all | all
    y of each          float32[3,2] three times, then float32[1,2]
    y of the call      float32[10,2]

`cut_inputs` says so as a `Cut`, without cutting anything: `columns == ((3, 3, 3, 1),)`
and `m == 4`. Its `Split`s then make the pieces, of arrays or of shapes.
"""

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
        pieces = [
            a if rows is None else a.update(shape=(rows[i], *a.shape[1:]))
            for a, rows in zip(leaves, self.rows, strict=True)
        ]
        return Shape(self.piece, tuple(pieces))

    def tree(self, i: int, tree: PyTree) -> PyTree:
        """The `i`-th piece of a pytree of arrays."""
        arrays = [self.cut(k, i, a) for k, a in enumerate(pack(tree)[0])]
        return self.piece.unpack(arrays)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How all inputs of a call are cut into `m` microbatches.

    It holds numbers and no arrays, so that plans, which have shapes only, use it too.

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
        # `x` comes first, so it decides. Where nothing is cut there is one microbatch.
        rows = next(iter(self.columns), (1,))
        return tuple(n / sum(rows) for n in rows)

    def variant(self, i: int) -> tuple[int, ...]:
        """The number of rows of each array. Microbatches with equal variants have equal
        shapes, and so the same programs: of ten rows in four chunks (3,) or (1,).
        """
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
    # Without an array in `x` nothing says how many rows a microbatch has.
    if not any(map(is_array, jax.tree.leaves(inputs["x"]))):
        raise TypeError(
            "`pipe(params, x)`: x has no array; a pipeline needs at least one array to "
            "cut into microbatches"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    splits: dict[str, Split] = {}
    # In the order of the table, `x` first: errors compare the others with `x`, and so
    # do the weights of a mean.
    for name in INPUTS:
        tree = inputs.get(name)
        if BY_NAME[name].share is Share.ROWS:
            splits[name] = _split(tree, chunks, name, shapes)
        else:
            arrays, spec = pack(tree)
            splits[name] = Split(spec, (None,) * len(arrays))
    # What must agree is the number of pieces. Rows may differ, and each array is then
    # cut by its own rule: 10 and 20 rows in four chunks are 3, 3, 3, 1 and 5, 5, 5, 5.
    # Only where the rows divide by the chunks do such pieces belong together.
    counts = {name: len(pieces(shape[0], chunks)) for name, shape in shapes.items()}
    first = next(iter(counts), "")
    for name, count in counts.items():
        if count != counts[first]:
            raise ValueError(
                f"with chunks={chunks} `{first}` of shape {shapes[first]} gives "
                f"{counts[first]} pieces, but `{name}` of shape {shapes[name]} gives "
                f"{count}; give both the same number of rows, or wrap one in "
                "fpipe.NoChunk"
            )
    # Everything went whole: there is nothing to cut, and one microbatch.
    return Cut(splits, m=counts.get(first, 1))


def check_equal_pieces(cut: Cut, chunks: int) -> None:
    """Refuse pieces of different sizes, which one program cannot take.

    Raises:
        ValueError: it says which numbers of chunks would do.
    """
    # All columns have as many pieces, so the first with unequal ones says it all.
    for rows in cut.columns:
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
    # The rule of `torch.chunk`, and so of torch's `Pipe`: all pieces but the last have
    # one size, so there are at most two sets of programs.
    size = -(-rows // chunks)
    return tuple(min(size, rows - start) for start in range(0, rows, size))


def check_alike(parts: Sequence[Shape], name: str, stacked: bool) -> None:
    """What is put together again has one structure, the same static leaves, and shapes
    that fit.

    Arguments:
        parts: the shape of each microbatch's part.
        name: what it is, in errors, with the call.
        stacked: on a new axis, or concatenated on axis 0.

    Raises:
        ValueError: a part that differs from the first.
    """

    def kept(leaf: jax.ShapeDtypeStruct) -> tuple[Any, ...]:
        """What must be the same: all but the number of rows."""
        free = 0 if stacked or not leaf.shape else 1
        return (leaf.shape[free:], leaf.dtype)

    # Microbatch 0 is the measure: it always has the full number of rows.
    first = parts[0]
    for i, part in enumerate(parts[1:], 1):
        if part.spec != first.spec:
            raise ValueError(
                f"{name} of microbatch {i} is {describe(part.tree)}, that of "
                f"microbatch 0 {describe(first.tree)}: they are put together again, so "
                "structure and static leaves must not depend on the number of rows"
            )
        if [kept(a) for a in part.leaves] != [kept(a) for a in first.leaves]:
            joined = "they are concatenated on axis 0"
            if stacked:
                joined = "aux is stacked over microbatches"
            raise ValueError(
                f"{name} of microbatch {i} has the shapes "
                f"{[a.shape for a in part.leaves]}, that of microbatch 0 "
                f"{[a.shape for a in first.leaves]}; {joined}, so reduce what depends "
                "on the number of rows"
            )


def join(parts: Sequence[Any]) -> Any:
    """Outputs of the microbatches as one: concatenated on axis 0, 0-d ones stacked to
    `(m,)`.
    """
    if not parts[0].shape:
        # Such as a mean over the rows: what a mean of means would be is for the user to
        # say.
        return jnp.stack(parts)
    # One piece alone is the output already.
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _is_whole(leaf: Any) -> bool:
    return isinstance(leaf, NoChunk)


def _split(
    tree: PyTree, chunks: int, root: str, shapes: dict[str, tuple[int, ...]]
) -> Split:
    """Decide how a pytree is cut, and add the shapes of its cut arrays to `shapes`.

    Arguments:
        root: the name of the tree; an array in it is `x['image']`.
    """
    rows: list[tuple[int, ...] | None] = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_whole)[0]:
        name = root + jax.tree_util.keystr(path)
        if _is_whole(leaf):
            # Its arrays are leaves of what a microbatch gets, one entry for each.
            rows += [None for inner in jax.tree.leaves(leaf.value) if is_array(inner)]
        elif is_array(leaf):
            if not leaf.shape:
                raise ValueError(
                    f"`{name}` is a 0-d array and cannot be cut into microbatches; "
                    "wrap it in fpipe.NoChunk to send it whole to every microbatch"
                )
            if not leaf.shape[0]:
                raise ValueError(f"`{name}` has no rows: its shape is {leaf.shape}")
            rows.append(pieces(leaf.shape[0], chunks))
            shapes[name] = leaf.shape
    # Layers never see a `NoChunk`: it says how to cut and is no part of the value.
    unwrapped = jax.tree.map(
        lambda leaf: leaf.value if _is_whole(leaf) else leaf, tree, is_leaf=_is_whole
    )
    return Split(pack(unwrapped)[1], tuple(rows))
