"""One step in plain JAX, microbatch by microbatch, and how far another is from it.

In: a loss function, and what a call of it gets by name. Out: what the call of a
pipeline has to return:

    step = PlainStep(loss_fn, chunks=4)
    want, want_grads = step(params, {"x": x, "labels": labels, "key": key})
    difference(grads, want_grads)  ->  1.3e-07
"""

# pyright: basic

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fpipe


def microbatches(batch: Mapping[str, Any], chunks: int) -> Iterator[dict[str, Any]]:
    """The arguments of each microbatch: arrays cut by rows, numbers whole, and a key of
    its own.
    """
    for i in range(chunks):

        def piece(a: Any, i: int = i) -> Any:
            return jnp.split(a, chunks)[i] if np.ndim(a) else a

        given = dict(batch)
        for name, value in batch.items():
            if name == "key":
                given[name] = jax.random.fold_in(jax.random.fold_in(value, 0), i)
            elif name != "state":
                given[name] = jax.tree.map(piece, value)
        yield given


class PlainStep:
    """A loss function and its gradients, in place of `fpipe.value_and_grad`.

    Arguments:
        loss_fn: `loss_fn(params, **batch)`. With an argument `state` it returns
            `(loss, state)`.
        chunks: the number of microbatches, which have equally many rows.
        has_aux, reduction: as for `fpipe.value_and_grad`; `"mean"` or `"weighted"`.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        chunks: int,
        has_aux: bool = False,
        reduction: str = "mean",
    ) -> None:
        self.chunks, self.has_aux = chunks, has_aux

        def one(fixed: tuple[tuple[str, Any], ...], params: Any, given: Any) -> Any:
            loss = loss_fn(params, **dict(fixed), **given)
            loss, more = loss if has_aux or "state" in given else (loss, None)
            loss, weight = loss if reduction == "weighted" else (loss, 1.0)
            return loss, (weight, more)

        self.one = jax.jit(
            jax.value_and_grad(one, argnums=1, has_aux=True), static_argnums=0
        )

    def __call__(self, params: Any, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        """The loss, with the new state or the aux if there is one, and gradients."""
        static = bool | str | None
        fixed = tuple((k, v) for k, v in batch.items() if isinstance(v, static))
        batch = {k: v for k, v in batch.items() if not isinstance(v, static)}
        losses, weights, mores, grads = [], [], [], []
        for given in microbatches(batch, self.chunks):
            if "state" in batch and mores:  # from microbatch to microbatch
                given["state"] = mores[-1]
            (loss, (weight, more)), own = self.one(fixed, params, given)
            losses.append(loss)
            weights.append(weight)
            mores.append(more)
            grads.append(own)
        loss = sum(losses) / sum(weights)
        if "state" in batch:
            loss = loss, mores[-1]
        elif self.has_aux:
            loss = loss, joined(mores)
        return loss, jax.tree.map(lambda *a: sum(a) / sum(weights), *grads)


def joined(mores: list[Any]) -> Any:
    """The aux of all microbatches: rows one after the other, all else stacked."""

    def are_rows(a: Any) -> bool:
        return isinstance(a, fpipe.PerRow)

    def join(*pieces: Any) -> Any:
        if are_rows(pieces[0]):
            return jnp.concatenate([rows.value for rows in pieces])
        return jnp.stack(pieces)

    return jax.tree.map(join, *mores, is_leaf=are_rows)


def as_numpy(tree: Any) -> Any:
    """Arrays of the host."""
    return jax.tree.map(np.asarray, tree)


def difference(got, want) -> float:
    """The largest `max|a-b| / max|b|` of a leaf.

    Raises:
        AssertionError: other structures, shapes or dtypes; numbers that are none.
    """
    got, want = as_numpy(got), as_numpy(want)
    if jax.tree.structure(got) != jax.tree.structure(want):
        raise AssertionError("structures differ")
    scale = max(np.abs(b).max(initial=0) for b in jax.tree.leaves(want))
    worst, zeros = 0.0, 0
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(want)]
    leaves = zip(paths, jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    for path, a, b in leaves:
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise AssertionError(f"{a.dtype}{a.shape} and {b.dtype}{b.shape}")
        if not np.isfinite(a).all():
            raise AssertionError("not finite")
        largest = np.abs(b).max(initial=0)
        # What is zero but for rounding, such as the gradient of the bias of an
        # attention's keys, has no digits to compare.
        if largest < 1e-5 * scale:
            largest, zeros = 1e-2 * scale, zeros + 1
        error = np.abs(a - b).max(initial=0) / max(largest, 1e-30)
        if error > 1e-5:
            print(f"    {jax.tree_util.keystr(path)}: {error:.1e} of {largest:.1e}")
        worst = max(worst, error)
    if zeros > len(jax.tree.leaves(want)) // 5:
        raise AssertionError(f"{zeros} arrays are zero: there is nothing to compare")
    return float(worst)
