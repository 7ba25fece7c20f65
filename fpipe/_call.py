"""What `Pipe` and `sequential` share: the calls a user makes, their arguments and their checks."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fpipe._microbatch import Split, split
from fpipe._model import Model
from fpipe._stage import Loss, Reduction
from fpipe._tree import PyTree, Spec, float0_like, is_array, is_inexact, map_arrays, pack


class Call(abc.ABC):
    """The front of a pipeline: a call, `value_and_grad` and `evaluate`."""

    model: Model
    chunks: int

    @abc.abstractmethod
    def _forward(self, params: PyTree, x: PyTree, side: PyTree, key: Any, state: Any, train: bool) -> Any:
        """`(y, state)`."""

    @abc.abstractmethod
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
        argnums: tuple[int, ...] | None,
    ) -> Any:
        """`(loss, aux, state, gradients)`."""

    def __call__(
        self,
        params: PyTree,
        x: PyTree,
        side: PyTree = None,
        key: Any = None,
        state: Any = None,
        train: bool = False,
    ) -> Any:
        """The model's output.

        Arguments:
            params: one entry per layer, placed.
            x: a pytree; every array is cut on axis 0 into microbatches.
            side: side inputs for the layers that ask for them, cut like `x`.
            key: a PRNG key; without one, layers that ask for a key get `None`.
            state: the layers' state, needed if any layer has state.
            train: handed to the layers that ask.

        Returns:
            `y`, or `(y, state)` if state was given.
        """
        check_call(self.model, params, state)
        y, new = self._forward(params, x, side, key, state, bool(train))
        return y if state is None else (y, new)

    def value_and_grad(
        self,
        loss_fn: Callable[..., Any],
        has_aux: bool = False,
        reduction: Reduction = "mean",
        argnums: int | Sequence[int] = 0,
    ) -> Callable[..., Any]:
        """A function that computes a loss and its gradients, forwards and backwards interleaved as scheduled.

        Arguments:
            loss_fn: `loss_fn(y, *targets)`, a scalar, on the last stage for each microbatch.
            has_aux: whether it returns `(loss, aux)`; aux comes back stacked on a new axis of `m`.
            reduction: `"mean"` weighs microbatches by their rows (of the first array of `x`), `"sum"` adds,
                `"weighted"` takes `(sum, weight)` from `loss_fn` and divides by the total weight once.
            argnums: which of `(params, x, *targets)` to differentiate; the rest is not computed.

        Returns:
            `f(params, x, *targets, side=None, key=None, state=None, train=False)`, which returns
            `loss, grads`; with `has_aux` `(loss, aux), grads`; and with `state` given the first of the
            two becomes a pair with the new state: `(loss, state), grads`.
        """
        loss = make_loss("value_and_grad", loss_fn, has_aux, reduction)
        numbers = argument_numbers(argnums)

        def value_and_grad(
            params: PyTree,
            x: PyTree,
            *targets: PyTree,
            side: PyTree = None,
            key: Any = None,
            state: Any = None,
            train: bool = False,
        ) -> Any:
            check_call(self.model, params, state)
            if max(numbers) >= 2 + len(targets):
                raise ValueError(
                    f"`value_and_grad(argnums={argnums!r})`: there are only {2 + len(targets)} arguments (params, x, *targets)"
                )
            value, aux, new, gradients = self._loss(params, x, targets, side, key, state, bool(train), loss, numbers)
            value = (value, aux) if has_aux else value
            value = value if state is None else (value, new)
            return value, gradients[0] if isinstance(argnums, int) else gradients

        return value_and_grad

    def evaluate(
        self, loss_fn: Callable[..., Any], has_aux: bool = False, reduction: Reduction = "mean"
    ) -> Callable[..., Any]:
        """The loss alone: forward only, nothing is kept. Arguments as for `value_and_grad`."""
        loss = make_loss("evaluate", loss_fn, has_aux, reduction)

        def evaluate(
            params: PyTree,
            x: PyTree,
            *targets: PyTree,
            side: PyTree = None,
            key: Any = None,
            state: Any = None,
            train: bool = False,
        ) -> Any:
            check_call(self.model, params, state)
            value, aux, new, _ = self._loss(params, x, targets, side, key, state, bool(train), loss, None)
            value = (value, aux) if has_aux else value
            return value if state is None else (value, new)

        return evaluate


def make_loss(call: str, fn: Callable[..., Any], has_aux: bool, reduction: str) -> Loss:
    """A checked `Loss`."""
    if not callable(fn):
        raise TypeError(f"`{call}(loss_fn)`: {fn!r} is not callable; write `pipe.{call}(loss_fn)(params, x, *targets)`")
    if reduction not in ("mean", "sum", "weighted"):
        raise ValueError(f'`{call}(reduction={reduction!r})`: it is "mean", "sum" or "weighted"')
    return Loss(fn, bool(has_aux), reduction)  # type: ignore[arg-type]


def argument_numbers(argnums: int | Sequence[int]) -> tuple[int, ...]:
    """Argument numbers as a checked tuple."""
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if not numbers or any(type(n) is not int or n < 0 for n in numbers) or len(set(numbers)) < len(numbers):
        raise ValueError(f"`value_and_grad(argnums={argnums!r})`: numbers of (params, x, *targets), from 0, each once")
    return numbers


def check_chunks(call: str, chunks: Any) -> int:
    """The number of chunks, checked."""
    if type(chunks) is not int:
        raise TypeError(f"`{call}(chunks={chunks!r})`: chunks is an int")
    if chunks < 1:
        raise ValueError(f"`{call}(chunks={chunks})`: chunks is at least 1")
    return chunks


def check_call(model: Model, params: Any, state: Any) -> None:
    """Parameters and state have one entry per layer, and state is there if it is needed."""
    count = len(model.layers)
    if not isinstance(params, (tuple, list)) or len(params) != count:
        got = f"{len(params)} entries" if isinstance(params, (tuple, list)) else type(params).__name__
        raise ValueError(f"params: a tuple with one entry per layer is needed, {count} in all, got {got}")
    if state is None:
        if model.stateful:
            names = [model.layers[k].name for k in model.stateful]
            raise ValueError(
                f"the layers {names} have state: pass `state=pipe.init_state(x)` and take the new state back"
            )
    elif not isinstance(state, (tuple, list)) or len(state) != count:
        got = f"{len(state)} entries" if isinstance(state, (tuple, list)) else type(state).__name__
        raise ValueError(f"state: a tuple with one entry per layer is needed, {count} in all, got {got}")


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the inputs of a call are cut into `count` microbatches."""

    splits: Mapping[str, Split]
    count: int

    def piece(self, tree: PyTree, name: str, i: int) -> PyTree:
        """The `i`-th piece of an input."""
        how = self.splits[name]
        return how.piece.unpack([how.cut(k, i, a) for k, a in enumerate(pack(tree)[0])])

    def rows(self) -> tuple[int, ...]:
        """The rows of each microbatch, by the first array that is cut."""
        return next((r for s in self.splits.values() for r in s.rows if r), (1,))

    def scale(self, i: int) -> float:
        """The weight of a microbatch in a mean over rows."""
        rows = self.rows()
        return rows[i] / sum(rows)

    def of_target(self, n: int) -> Split:
        """The split of one target."""
        return self.target_splits[n]

    target_splits: tuple[Split, ...] = ()


def cut_inputs(model: Model, params: PyTree, x: PyTree, side: PyTree, targets: Any, state: Any, chunks: int) -> Cut:
    """Decide the microbatches of a call.

    Raises:
        TypeError: no array in `x`.
        ValueError: unequal numbers of pieces.
    """
    del model, params, state
    if not any(map(is_array, _leaves(x))):
        raise TypeError(
            "`pipe(params, x)`: x has no array; a pipeline needs at least one array to cut into microbatches"
        )
    splits = {"x": split(x, chunks, "x"), "side": split(side, chunks, "side")}
    if targets is not None:
        splits["targets"] = split(targets, chunks, "targets")
    counts = {name: s.count for name, s in splits.items() if s.count is not None}
    if len(set(counts.values())) > 1:
        trees = {"x": x, "side": side, "targets": targets}
        told = ", ".join(f"`{name}` gives {n} pieces (rows {_rows(trees[name])})" for name, n in counts.items())
        raise ValueError(
            f"with chunks={chunks}, {told}; give them the same number of rows, or wrap one in fpipe.NoChunk"
        )
    each = tuple(split(t, chunks, f"targets[{n}]") for n, t in enumerate(targets or ()))
    return Cut(splits, next(iter(counts.values()), 1), each)


def _leaves(tree: PyTree) -> list[Any]:
    import jax

    return jax.tree.leaves(tree)


def _rows(tree: PyTree) -> str:
    return ", ".join(str(a.shape[0]) for a in pack(tree)[0] if a.shape)


def first_microbatch(x: PyTree, side: PyTree, chunks: int) -> tuple[PyTree, PyTree]:
    """The shapes of the first microbatch."""
    from fpipe._tree import aval

    cut = cut_inputs(None, None, x, side, None, None, chunks)  # type: ignore[arg-type]
    out = []
    for name, tree in (("x", x), ("side", side)):
        how = cut.splits[name]
        out.append(how.piece.unpack([how.shape(k, 0, aval(a)) for k, a in enumerate(pack(tree)[0])]))
    return out[0], out[1]


def fill_gradient(spec: Spec, leaves: Sequence[Any], gradients: Sequence[Any]) -> PyTree:
    """A gradient in the structure of its argument: `float0` for integers, `None` for static leaves."""
    filled = [g if is_inexact(a) else float0_like(a) for a, g in zip(leaves, gradients, strict=True)]
    return spec.fill(filled, None)


__all__ = ["Call", "Cut", "cut_inputs", "map_arrays"]
