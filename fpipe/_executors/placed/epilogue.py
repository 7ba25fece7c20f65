"""The programs around the schedule, as pure functions of flat arrays: inputs cut,
outputs joined, sums finished.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from fpipe._core.pytrees import Shape, pack
from fpipe._model.loss import divided, sum_dtype, wide
from fpipe._model.microbatch import join
from fpipe._model.model import Model

Arrays: TypeAlias = Callable[..., list[Any]]


def joiner(leaves: int, m: int) -> Arrays:
    """Pieces, leaf by leaf, to arrays."""

    def joined(*arrays: Any) -> list[Any]:
        return [join(arrays[k * m : (k + 1) * m]) for k in range(leaves)]

    return joined


def zeros(shapes: Sequence[jax.ShapeDtypeStruct]) -> Arrays:
    """Accumulators for gradients of these shapes."""
    return lambda: [jnp.zeros(a.shape, sum_dtype(a.dtype)) for a in shapes]


def loss_reducer(scales: Sequence[float], weighted: bool, aux: int) -> Arrays:
    """Losses, weights and aux leaves of the microbatches to the loss, the total weight
    and stacked leaves.
    """
    m = len(scales)

    def reduce(*arrays: Any) -> list[Any]:
        columns = [arrays[n * m : (n + 1) * m] for n in range(1 + weighted + aux)]
        dtype = columns[0][0].dtype
        total = functools.reduce(
            operator.add, (wide(v) * w for v, w in zip(columns[0], scales, strict=True))
        )
        stacked = [jnp.stack(column) for column in columns[1 + weighted :]]
        if not weighted:
            return [total.astype(dtype), *stacked]
        weight = functools.reduce(operator.add, map(wide, columns[1]))
        return [divided(total, weight).astype(dtype), weight, *stacked]

    return reduce


def gradient_joiner(
    shapes: Sequence[Sequence[jax.ShapeDtypeStruct]], present: Sequence[Sequence[bool]]
) -> Arrays:
    """Gradients of pieces, leaf by leaf, to those of the whole; what is not `present`
    is zero.
    """

    def joined(*arrays: Any) -> list[Any]:
        rest = iter(arrays)
        return [
            join(
                [
                    next(rest) if there else jnp.zeros(a.shape, a.dtype)
                    for a, there in zip(row, have, strict=True)
                ]
            )
            for row, have in zip(shapes, present, strict=True)
        ]

    return joined


def gradient_finisher(
    shapes: Sequence[jax.ShapeDtypeStruct], counts: Sequence[int]
) -> Arrays:
    """`counts[n]` contributions to each gradient, and perhaps a weight, to the
    gradients in their own dtype.
    """

    def finish(*arrays: Any) -> list[Any]:
        rest = iter(arrays)
        totals = [[next(rest) for _ in range(n)] for n in counts]
        weight = next(rest, None)
        out = []
        for a, parts in zip(shapes, totals, strict=True):
            total = (
                functools.reduce(operator.add, parts)
                if parts
                else jnp.zeros(a.shape, a.dtype)
            )
            out.append(
                (total if weight is None else divided(wide(total), weight)).astype(
                    a.dtype
                )
            )
        return out

    return finish


class Finisher:
    """A layer's `finish` as a function of flat arrays, and the shape of what it
    returns.
    """

    def __init__(self, model: Model, layer: int, shape: Shape) -> None:
        self._model, self._layer, self._shape = model, layer, shape
        jax.eval_shape(self, *shape.leaves)

    def __call__(self, *arrays: Any) -> list[Any]:
        """The finished state's arrays."""
        state = self._model.finish({self._layer: self._shape.spec.unpack(arrays)})[
            self._layer
        ]
        self.out = Shape.of(state)
        return pack(state)[0]
