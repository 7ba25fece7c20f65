"""The reference: what a `Pipe` must compute, as the plain composition of its layers."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fpipe._call import Call, argument_numbers, cut_inputs, fill_gradient, first_microbatch, make_loss
from fpipe._microbatch import Split, join
from fpipe._model import Model
from fpipe._stage import Loss, sum_dtype
from fpipe._tree import PyTree, is_array, is_inexact, map_arrays, pack

# Declared, because type checkers cannot follow its own type with `has_aux`.
_value_and_grad: Callable[..., Any] = jax.value_and_grad


@dataclasses.dataclass(frozen=True)
class Sequential(Call):
    """The layers one after the other, microbatch by microbatch, in plain JAX. See `fpipe.sequential`."""

    model: Model
    chunks: int

    def init(self, key: Any, x: PyTree, side: PyTree = None) -> tuple[PyTree, ...]:
        """Parameters of every layer; see `Pipe.init`."""
        x, side = first_microbatch(x, side, self.chunks)
        return self.model.init(key, x, side, lambda k, make: map_arrays_numbers(make()))

    def init_state(self, x: PyTree, side: PyTree = None, params: Sequence[PyTree] | None = None) -> tuple[PyTree, ...]:
        """State of every layer; see `Pipe.init_state`."""
        x, side = first_microbatch(x, side, self.chunks)
        return self.model.init_state(x, side, params, lambda k, make: make())

    def place(self, params: Sequence[PyTree]) -> tuple[PyTree, ...]:
        """The parameters as they are."""
        return tuple(params)

    def gather(self, params: Sequence[PyTree]) -> tuple[PyTree, ...]:
        """The parameters as they are."""
        return tuple(params)

    def _forward(self, params: PyTree, x: PyTree, side: PyTree, key: Any, state: Any, train: bool) -> Any:
        cut = cut_inputs(self.model, params, x, side, None, state, self.chunks)
        parts, state = [], _state_map(state)
        for i in range(cut.count):
            (y, _), state = self._microbatch(
                i, params, cut.piece(x, "x", i), cut.piece(side, "side", i), (), key, state, train, None
            )
            parts.append(y)
        arrays, specs = zip(*map(pack, parts), strict=True)
        y = specs[0].unpack([join(column) for column in zip(*arrays, strict=True)])
        return y, self._finish(state)

    def _loss(
        self,
        params: PyTree,
        x: PyTree,
        targets: tuple[PyTree, ...],
        side: PyTree,
        key: Any,
        state: Any,
        train: bool,
        loss: Loss,
        argnums: Any,
    ) -> Any:
        cut = cut_inputs(self.model, params, x, side, targets, state, self.chunks)
        states: Any = _state_map(state)
        wanted = [(params, x, *targets)[n] for n in argnums or ()]
        sums = [
            _Gradient(tree, None if n == 0 else cut.splits["x"] if n == 1 else cut.of_target(n - 2))
            for n, tree in zip(argnums or (), wanted, strict=True)
        ]
        total: Any = 0.0
        weights: Any = 0.0
        auxes: list[PyTree] = []
        for i in range(cut.count):
            pieces = (params, cut.piece(x, "x", i), *cut.piece(targets, "targets", i))
            scale = cut.scale(i) if loss.reduction == "mean" else 1.0

            def f(
                chosen: Sequence[Any],
                pieces: Any = pieces,
                state: Any = states,
                i: int = i,
                scale: float = scale,
            ) -> Any:
                given = list(pieces)
                for n, (arrays, g) in zip(argnums or (), zip(chosen, sums, strict=True), strict=True):
                    given[n] = g.merge(pieces[n], arrays)
                p, x, *t = given
                (result, aux), state = self._microbatch(
                    i, p, x, cut.piece(side, "side", i), tuple(t), key, state, train, loss
                )
                value, weight = result
                return value * scale, (weight, aux, state)

            chosen = [g.split(pieces[n]) for n, g in zip(argnums or (), sums, strict=True)]
            run: Any = _value_and_grad(f, has_aux=True) if argnums else _value_alone(f)
            (value, (weight, aux, states)), gradients = run(chosen)
            for g, part in zip(sums, gradients, strict=True):
                g.add(part)
            total = total + value
            weights = weights + (1.0 if weight is None else weight)
            auxes.append(aux)
        divisor = weights if loss.reduction == "weighted" else None
        total = total if divisor is None else total / divisor
        aux = jax.tree.map(lambda *a: jnp.stack(a), *auxes) if loss.has_aux else None
        return total, aux, self._finish(states), tuple(g.result(divisor) for g in sums)

    def _microbatch(
        self,
        i: int,
        params: PyTree,
        x: PyTree,
        side: PyTree,
        targets: Any,
        key: Any,
        state: Any,
        train: bool,
        loss: Loss | None,
    ) -> Any:
        layers = range(len(self.model.layers))
        given = dict(enumerate(params))
        where = f", microbatch {i}"
        y, _, state = self.model.apply(
            layers,
            given,
            x,
            skips={},
            state=state,
            side=side,
            key=key,
            microbatch=i,
            train=train,
            where=where,
        )
        if loss is None:
            return (y, None), state
        value, weight, aux = loss(y, targets)
        return ((value, weight), aux), state

    def _finish(self, state: Any) -> tuple[PyTree, ...]:
        ends = [layer.finish for layer in self.model.layers]
        return tuple(
            None if k not in state else state[k] if end is None else end(state[k]) for k, end in enumerate(ends)
        )


def _value_alone(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda chosen: (f(chosen), ())


def _state_map(state: Any) -> dict[int, PyTree]:
    return {} if state is None else {k: s for k, s in enumerate(state) if s is not None}


class _Gradient:
    """The gradient of one argument, summed over microbatches (16-bit floats in float32), or pieced together."""

    def __init__(self, tree: PyTree, split: Split | None) -> None:
        self.leaves, self.spec = pack(tree)
        self.split_ = split
        self.parts: list[list[Any]] = [[] for _ in self.leaves]

    def split(self, tree: PyTree) -> list[Any]:
        return [a for a in pack(tree)[0] if is_inexact(a)]

    def merge(self, tree: PyTree, arrays: Sequence[Any]) -> PyTree:
        mine, spec = pack(tree)
        rest = iter(arrays)
        return spec.unpack([next(rest) if is_inexact(a) else a for a in mine])

    def add(self, part: Sequence[Any]) -> None:
        rest = iter(part)
        for n, a in enumerate(self.leaves):
            if is_inexact(a):
                g = next(rest)
                whole = self.split_ is None or self.split_.whole[n]
                if not whole:
                    self.parts[n].append(g)
                elif self.parts[n]:
                    self.parts[n] = [self.parts[n][0] + g.astype(sum_dtype(g.dtype))]
                else:
                    self.parts[n] = [g.astype(sum_dtype(g.dtype))]

    def result(self, divisor: Any) -> PyTree:
        out = []
        for a, parts in zip(self.leaves, self.parts, strict=True):
            if not is_inexact(a):
                out.append(None)
                continue
            total = parts[0] if len(parts) == 1 else join(parts)
            total = total if divisor is None else total / divisor
            out.append(total.astype(a.dtype))
        return fill_gradient(self.spec, self.leaves, out)


def sequential(layers: Iterable[Any], chunks: int = 1) -> Sequential:
    """The plain composition of layers, with the calls, microbatches, keys and state order of a `Pipe`.

    It is plain JAX: `jax.jit`, `jax.grad`, `jax.vmap` and `jax.eval_shape` work on it. At equal `chunks`
    every `Pipe` over the same layers computes the same.

    Arguments:
        layers: functions, `Layer`s, or nested sequences of them.
        chunks: the number of microbatches asked for.

    Returns:
        An object with `init`, `init_state`, `place`, `gather`, a call, `value_and_grad` and `evaluate`.
    """
    from fpipe._call import check_chunks

    return Sequential(Model(layers), check_chunks("sequential", chunks))


def map_arrays_numbers(tree: PyTree) -> PyTree:
    """Python numbers among parameters as arrays."""
    return jax.tree.map(
        lambda a: a if is_array(a) or not isinstance(a, (bool, int, float, complex)) else jnp.asarray(a), tree
    )


__all__ = ["Callable", "Sequential", "argument_numbers", "make_loss", "map_arrays", "sequential"]
