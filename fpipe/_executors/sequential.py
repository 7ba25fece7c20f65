"""The reference: what a `Pipe` must compute, as the plain composition of its layers.

In: the same `Args` as an executor takes. Out: the same outputs, loss, states and
gradients, by a loop over microbatches. With four rows in two microbatches:

    microbatch 0    rows 0-1    state 0 -> state 1    value 0, gradient 0
    microbatch 1    rows 2-3    state 1 -> state 2    value 1, gradient 1
    result                      state 2               weighted sums of both

It is what tests compare with, so it is as simple as can be. It shares with the
executors what defines the result (how a batch is cut, keys, `Loss`, dtypes of sums),
and nothing of what can go wrong in a pipeline (routes, graphs, plans).
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fpipe._core.checks import as_bool, as_compute_dtype
from fpipe._core.pytrees import (
    PyTree,
    Shape,
    aval,
    copied,
    fill_gradient,
    is_inexact,
    map_arrays,
    numbers_as_arrays,
    pack,
)
from fpipe._core.settings import explicit_transfers
from fpipe._core.statics import check_leaves
from fpipe._executors.anomaly import Detector
from fpipe._executors.call import (
    Args,
    Call,
    Result,
    check_chunks,
    check_params,
)
from fpipe._executors.request import check_state, check_static, numbered_leaves
from fpipe._model.batch_norm import deferred
from fpipe._model.function_layers import FunctionLayers
from fpipe._model.init import init_params, init_state
from fpipe._model.joining import Join, check_alike
from fpipe._model.loss import Loss, divided, sum_dtype, wide
from fpipe._model.microbatch import (
    CallShapes,
    Cut,
    cut_inputs,
)
from fpipe._model.model import Model
from fpipe._model.needs import Share, call_needs, check_key
from fpipe._model.state import (
    map_state,
    overwritten,
    rows_of_state,
    state_shares,
    with_overwritten,
)
from fpipe._model.wrappers import Microbatches

_OF_SPLIT = (
    "; `split.params(params)` makes it of the function's own tree (for a state, "
    "`split.state(state)`). Or write `fpipe.sequential([split.function])`, whose "
    "parameters are `(params,)`"
)


def sequential(
    layers: Iterable[Any],
    chunks: int = 1,
    compute_dtype: Any = None,
    deferred_batch_norm: bool = False,
    detect_anomaly: bool = False,
) -> "Sequential":
    """The plain composition of layers, with the calls of a `Pipe`.

    Microbatches, keys and the order of states are those of a `Pipe`. At equal `chunks`
    every `Pipe` over the same layers computes the same. A sequential model is plain
    JAX: `jax.jit`, `jax.grad`, `jax.vmap` and `jax.eval_shape` work on it.

    Arguments:
        layers: functions, `Layer`s, or nested sequences of them.
        chunks: the number of microbatches asked for. A batch with few rows may make
            fewer.
        compute_dtype, deferred_batch_norm, detect_anomaly: as for `Pipe`.

    Returns:
        A callable object with the methods `init`, `init_state`, `place`, `gather`,
        `value_and_grad` and `evaluate`. They take the arguments of the methods of
        `Pipe`.

    Example:
        >>> model = fpipe.sequential([fpipe.fn(jnp.sin), fpipe.fn(jnp.cos)], chunks=2)
        >>> params = model.init(jax.random.key(0), jnp.ones((4, 3)))
        >>> model(params, jnp.zeros((4, 3))).shape
        (4, 3)
    """
    model = Model(layers, as_compute_dtype("sequential", compute_dtype))
    deferred_batch_norm = as_bool(
        "sequential", "deferred_batch_norm", deferred_batch_norm
    )
    detect_anomaly = as_bool("sequential", "detect_anomaly", detect_anomaly)
    if deferred_batch_norm:
        model = Model(deferred(model.layers, "sequential"), model.compute_dtype)
    chunks = check_chunks("sequential", chunks)
    return Sequential(
        model,
        chunks,
        Detector("fpipe.sequential", model, None, chunks) if detect_anomaly else None,
        _OF_SPLIT if isinstance(layers, FunctionLayers) else "",
    )


@dataclasses.dataclass(frozen=True)
class Sequential(Call):
    """The layers one after the other, microbatch by microbatch, in plain JAX. See
    `fpipe.sequential`.
    """

    model: Model
    chunks: int
    detector: Detector | None = None
    # What an error about parameters adds.
    hint: str = ""

    @property
    def _executor(self) -> "PlainExecutor":
        """What runs the layers: with a detector, the watched ones."""
        model = self.model if self.detector is None else self.detector.watched
        return PlainExecutor(model, self.chunks)

    def init(self, key: Any, x: PyTree, side: PyTree = None) -> tuple[PyTree, ...]:
        """Parameters of every layer; see `Pipe.init`."""
        check_key(key)
        first = CallShapes.of(x, call_needs(side=side), self.chunks).first
        with explicit_transfers():
            return init_params(self.model, key, *first, self._executor.make_params)

    def init_state(
        self,
        x: PyTree,
        side: PyTree = None,
        params: Sequence[PyTree] | None = None,
        key: Any = None,
    ) -> tuple[PyTree, ...]:
        """State of every layer; see `Pipe.init_state`."""
        if key is not None:
            check_key(key)
        if params is not None:
            check_params(self.model, params, "`init_state(params=...)`")
        shapes = CallShapes.of(x, call_needs(side=side), self.chunks)
        put = self._executor.make_state
        with explicit_transfers():
            return init_state(
                self.model, *shapes.first, params, key, put, shapes.whole, shapes.ready
            )

    def place(
        self, params: Sequence[PyTree], donate: bool = False
    ) -> tuple[PyTree, ...]:
        """A copy of the parameters where they are, with Python numbers turned into
        arrays: there is one device. See `Pipe.place`.
        """
        with explicit_transfers():
            return self._executor.place(params, donate)

    def gather(self, params: Sequence[PyTree]) -> tuple[PyTree, ...]:
        """A copy of the parameters: nothing was packed or moved, as by a `Pipe`."""
        return self._executor.gather(params)

    def raise_anomaly(self) -> None:
        """Raise what calls inside `jax.jit` have found; see `Pipe.raise_anomaly`."""
        if self.detector is not None:
            self.detector.raise_found()

    def _checked(self, args: Args) -> Args:
        check_params(self.model, args.params, "a call's params", self.hint)
        return super()._checked(args)

    def _forward(self, args: Args) -> tuple[PyTree, tuple[PyTree, ...]]:
        if self.detector is not None:
            return self.detector.forward(self._executor.forward, args)
        return self._executor.forward(args)

    def _loss(self, args: Args, loss: Loss, argnums: tuple[int, ...]) -> Result:
        if self.detector is not None:
            return self.detector.loss(self._executor.loss, args, loss, argnums)
        return self._executor.loss(args, loss, argnums)


@dataclasses.dataclass(frozen=True)
class PlainExecutor:
    """Runs layers in plain JAX, as far as `fpipe._executors.protocol.Executor` makes
    sense without devices: there is nothing to schedule, to compile ahead, or to plan.
    """

    model: Model
    chunks: int

    def make_params(
        self, layer: int, make: Callable[[Any], PyTree], key: Any
    ) -> PyTree:
        """Run `make(key)` here."""
        del layer
        # A user's `init` may return an array that the user keeps.
        return copied(make(key))

    def make_state(self, layer: int, make: Callable[[Any], PyTree], key: Any) -> PyTree:
        """Run `make(key)` here."""
        del layer
        # A user's `init` may return an array that the user keeps.
        return copied(make(key))

    def place(self, params: Sequence[PyTree], donate: bool) -> tuple[PyTree, ...]:
        """Parameters where they are, with Python numbers turned into arrays."""
        as_bool("place", "donate", donate)
        check_params(self.model, params, "`place(params)`")
        check_leaves(tuple(params), "params")
        placed = tuple(numbers_as_arrays(p) for p in params)
        return placed if donate else copied(placed)

    def gather(self, params: Any) -> tuple[PyTree, ...]:
        """The exact inverse of `place`."""
        check_params(self.model, params, "`gather(params)`")
        return copied(tuple(params))

    def check_params(self, params: Any, call: str) -> None:
        """Refuse parameters that do not have one entry per layer."""
        check_params(self.model, params, call)

    def forward(self, args: Args) -> tuple[PyTree, tuple[PyTree, ...]]:
        """`(y, state)`, which JAX can transform in any way."""
        check_static(args, args.params)
        cut = cut_inputs(args.inputs, self.chunks)
        self.model.check_given(args.needs)
        states, parts = self._states(args, cut), []
        for i in range(cut.m):
            y, left = self._microbatch(args, cut, i, states.given(i))
            states.take(left)
            parts.append(y)
        y = _together(parts, cut, "`pipe(params, x)`: y", Join.of_output)
        return y, states.finished()

    def loss(self, args: Args, loss: Loss, argnums: tuple[int, ...]) -> Result:
        """The loss, and the gradients of the numbered arguments."""
        check_static(args, args.params)
        cut = cut_inputs(args.inputs, self.chunks)
        self.model.check_given(args.needs)
        scales = cut.shares if loss.reduction == "mean" else (1.0,) * cut.m
        # The arrays that are differentiated: of the numbered arguments what can have a
        # gradient (`jax.grad` refuses integers) and is not frozen.
        arrays, spec = pack(tuple(args.arguments[n] for n in argnums))
        counts = [len(pack(params)[0]) for params in args.params]
        numbered = numbered_leaves(counts, args)
        leaves = [leaf for n in argnums for leaf in numbered[n]]
        asked = [
            is_inexact(a) and leaf not in args.frozen
            for a, leaf in zip(arrays, leaves, strict=True)
        ]
        chosen = [a for a, take in zip(arrays, asked, strict=True) if take]

        # One microbatch as a function of the differentiated arrays. It returns the loss
        # times its share, whose gradients may be added as they come, and beside it
        # what is not differentiated.
        def microbatch(
            differentiated: tuple[Sequence[Any], Mapping[int, Sequence[Any]]],
            i: int,
            state: Mapping[int, PyTree],
        ) -> Any:
            chosen, made = differentiated
            layers = self.model.layers
            state = dict(state) | {
                k: with_overwritten(layers[k], state[k], a) for k, a in made.items()
            }
            # The whole arguments again, with the differentiated arrays in their places.
            rest = iter(chosen)
            given = spec.unpack(
                [
                    next(rest) if take else a
                    for a, take in zip(arrays, asked, strict=True)
                ]
            )
            arguments = dict(enumerate(args.arguments)) | dict(
                zip(argnums, given, strict=True)
            )
            own = args.with_arguments(list(arguments.values()))
            y, left = self._microbatch(own, cut, i, state)
            value, weight, aux = loss(
                y, cut.piece("targets", i, own.targets), f", microbatch {i}"
            )
            return value * scales[i], (value, weight, aux, left)

        # Gradients of whole arguments: each microbatch adds to its own rows, and to all
        # of what goes whole. One `grad` of the sum of all losses would be shorter, but
        # it adds bfloat16 gradients in bfloat16, and keeps the residuals of all.
        states, auxes, values, weights = self._states(args, cut), [], [], []
        dtype: Any = None
        # numpy's float64 is JAX's float32, and so are its gradients.
        types = [aval(a) for a in chosen]
        sums: list[Any] = [jnp.zeros(a.shape, sum_dtype(a.dtype)) for a in types]
        differentiated = jax.value_and_grad(microbatch, has_aux=True)
        own_states = states.overwritten if argnums else {}
        for i in range(cut.m):
            if chosen or own_states:
                (_, (value, weight, aux, left)), (parts, made) = differentiated(
                    (chosen, own_states), i, states.given(i)
                )
                sums = [a + b.astype(a.dtype) for a, b in zip(sums, parts, strict=True)]
                states.make(made)
            else:
                _, (value, weight, aux, left) = microbatch(
                    (chosen, {}), i, states.given(i)
                )
            states.take(left)
            # The loss again times its share, now in the dtype of sums.
            dtype = value.dtype
            values.append(wide(value) * scales[i])
            weights.append(weight)
            auxes.append(aux)
        # Divided and cast once, at the end, as the executors do.
        total = functools.reduce(operator.add, values)
        if loss.reduction == "weighted":
            weight = functools.reduce(operator.add, map(wide, weights))
            total, sums = divided(total, weight), [divided(g, weight) for g in sums]
        found = iter(g.astype(a.dtype) for g, a in zip(sums, types, strict=True))
        gradients = fill_gradient(
            spec, arrays, [next(found) if take else None for take in asked]
        )
        return Result(
            total.astype(dtype),
            _together(auxes, cut, f"`{loss.call}(has_aux=True)`: aux", Join.of_aux),
            states.finished(),
            gradients,
        )

    def _microbatch(
        self, args: Args, cut: Cut, i: int, state: Any
    ) -> tuple[PyTree, Any]:
        """All layers on one microbatch: `y`, and the states that it leaves."""
        y, _, state = self.model.apply(
            range(len(self.model.layers)),
            dict(enumerate(args.params)),
            cut.piece("x", i, args.x),
            skips={},
            state=state,
            needs=cut.pieces(i, args.needs),
            microbatch=i,
            where=f", microbatch {i}",
        )
        return y, state

    def _states(self, args: Args, cut: Cut) -> "_States":
        check_state(self.model, args, args.params, self.chunks)
        given = {} if args.state is None else dict(enumerate(args.state))
        return _States(self.model, {k: given[k] for k in self.model.stateful}, cut)


class _States:
    """The states of the layers, as the microbatches go by.

    Attributes:
        whole: what the call gave, and what the last microbatch left in its place.
        pieces: of each layer with state of rows what each microbatch left.
        made: what backwards have made, by layer: the maximum so far.
    """

    def __init__(self, model: Model, whole: dict[int, PyTree], cut: Cut) -> None:
        self.model = model
        self.rows = cut.rows
        # Through what a backward makes there is no gradient from outside.
        self.whole = {
            k: map_arrays(jax.lax.stop_gradient, state) for k, state in whole.items()
        }
        self.pieces: dict[int, list[PyTree]] = {
            k: [] for k in whole if model.layers[k].state_rows
        }
        self.made: dict[int, list[Any]] = {}

    @property
    def overwritten(self) -> dict[int, list[Any]]:
        """The arrays that a backward makes, by layer, as the call gave them."""
        layers = self.model.layers
        found = {
            k: overwritten(layers[k], state)
            for k, state in self.whole.items()
            if not isinstance(state, Microbatches)
        }
        return {k: arrays for k, arrays in found.items() if arrays}

    def given(self, i: int) -> dict[int, PyTree]:
        """What microbatch `i` gets."""

        def piece(share: Share, a: Any) -> Any:
            return rows_of_state(a, self.rows, i) if share is Share.ROWS else a

        layers = self.model.layers
        return {
            k: s[i] if isinstance(s, Microbatches) else map_state(layers[k], piece, s)
            for k, s in self.whole.items()
        }

    def take(self, left: Mapping[int, PyTree]) -> None:
        """Keep what a microbatch has left."""
        for k, state in left.items():
            if k in self.pieces:
                self.pieces[k].append(state)
            else:
                self.whole[k] = state

    def make(self, made: Mapping[int, Sequence[Any]]) -> None:
        """Keep what the backward of a microbatch has made."""
        for k, arrays in made.items():
            pairs = zip(self.made.get(k, arrays), arrays, strict=True)
            self.made[k] = [jnp.maximum(a, b) for a, b in pairs]

    def finished(self) -> tuple[PyTree, ...]:
        """The states as they leave the call, one entry per layer."""
        layers = self.model.layers
        for k, pieces in self.pieces.items():
            if isinstance(self.whole[k], Microbatches):
                self.whole[k] = Microbatches(pieces)
                continue
            columns: Iterable[Sequence[Any]]
            columns = zip(*(pack(piece)[0] for piece in pieces), strict=True)
            shares = state_shares(layers[k], pieces[0])
            arrays = [
                jnp.concatenate(column)
                if share is Share.ROWS and len(pieces) > 1
                else column[0]
                for share, column in zip(shares, columns, strict=True)
            ]
            self.whole[k] = pack(pieces[0])[1].unpack(arrays)
        for k, arrays in self.made.items():
            self.whole[k] = with_overwritten(layers[k], self.whole[k], arrays)
        ended = self.model.finish(self.whole)
        return tuple(ended.get(k) for k in range(len(layers)))


def _together(
    parts: Sequence[PyTree],
    cut: Cut,
    what: str,
    join_of: Callable[[Shape, int | None], Join],
) -> PyTree:
    """What all microbatches returned as one pytree."""
    shapes = [Shape.of(part) for part in parts]
    join = join_of(shapes[0], cut.m if cut.ready else None)
    check_alike(shapes, what, join)
    columns = list(zip(*(pack(part)[0] for part in parts), strict=True))
    return join.whole.unpack(join.arrays(columns))
