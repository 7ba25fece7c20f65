"""What `Pipe` and `sequential` share: the calls that a user makes, their arguments and
their checks.

In: what a user writes, for example

    pipe.value_and_grad(mse, argnums=(0, 1))(params, x, t, key=key)

Out: `Args` and what is asked for, which `Call._loss` (or `_forward`) then runs:

    Args(params, x, targets=(t,), needs={"key": key, "train": False, …})
    Loss(mse, has_aux=False, reduction="mean")
    argnums (0, 1)

`Call` alone knows the forms of the public calls (pairs with a state, `grads=`,
`loss_scale=`), so that a pipe and the reference cannot differ in them.
"""

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax

from fpipe._core.checks import as_bool, as_int
from fpipe._core.errors import entries, shown
from fpipe._core.pytrees import PyTree, describe, numbers_as_arrays
from fpipe._executors.gradients import as_scale, unscale_and_add
from fpipe._model.frozen import Frozen, FrozenLeaves, check_frozen
from fpipe._model.loss import Loss, Reduction, as_loss
from fpipe._model.model import Model
from fpipe._model.needs import call_needs
from fpipe._model.stages import Leaf
from fpipe._model.wrappers import NoChunk


class Args(NamedTuple):
    """What a call was given.

    Attributes:
        params: one entry per layer, or packed.
        x: the batch, whole.
        targets: what the loss takes after `y`; none for a call without a loss.
        needs: what it gives of the needs of the table beside `x` and targets, by name.
        state: one entry per layer, if the call was given state; of a function that was
            split its own tree, until the pipe takes that apart.
        frozen: the leaves of parameters and of `x` that get no gradient.
        donate_state: whether the call may consume the arrays of `state`.
    """

    params: Any
    x: PyTree
    targets: tuple[PyTree, ...] = ()
    needs: Mapping[str, PyTree] = call_needs()
    state: PyTree = None
    frozen: frozenset[Leaf] = frozenset()
    donate_state: bool = False

    @property
    def numbered(self) -> tuple[PyTree, ...]:
        """The arguments that `argnums` counts: `(params, x, *targets)`."""
        return (self.params, self.x, *self.targets)

    @property
    def inputs(self) -> dict[str, PyTree]:
        """Everything that the call gives, by the names of the table of needs."""
        return {"x": self.x, **self.needs, "targets": self.targets}

    def with_inputs(self, inputs: Mapping[str, PyTree]) -> "Args":
        """The same call with other values of some inputs."""
        merged = self.inputs | dict(inputs)
        x = merged.pop("x")
        targets = merged.pop("targets")
        return self._replace(x=x, targets=targets, needs=merged)


class Result(NamedTuple):
    """What a call with a loss gives; `gradients` has one entry per argument number."""

    loss: Any
    aux: PyTree
    state: PyTree
    gradients: tuple[PyTree, ...]


class Call(abc.ABC):
    """The front of a pipeline: a call, `value_and_grad` and `evaluate`."""

    model: Model
    chunks: int

    @abc.abstractmethod
    def _forward(self, args: Args) -> tuple[PyTree, PyTree]:
        """`(y, state)`."""

    @abc.abstractmethod
    def _loss(self, args: Args, loss: Loss, argnums: tuple[int, ...]) -> Result:
        """The loss, and the gradients of the numbered arguments."""

    def _param_shapes(self, params: Any) -> tuple[PyTree, ...]:
        """Parameters, placed, as the layers know them; shapes will do."""
        return tuple(params)

    def _layer_frozen(self, frozen: Frozen | None) -> Frozen | None:
        """What a user says is frozen, by layer."""
        return frozen

    def _context(self) -> AbstractContextManager[Any]:
        """The context of JAX that a call runs in: the caller's, if it has no other."""
        return contextlib.nullcontext()

    def _recording_owner(self) -> Any:
        """What tells its calls from others in a recording; `None`: none is made."""
        return None

    def _checked(self, args: Args) -> Args:
        """The arguments, or an error that says which is wrong."""
        # By structure alone: a look at every array would cost time in every step.
        check_params(self.model, args.params, "a call's params")
        return checked(self.model, args)

    def __call__(
        self,
        params: PyTree,
        x: PyTree,
        side: PyTree = None,
        key: Any = None,
        state: PyTree = None,
        train: bool = False,
        step: Any = None,
        donate_state: bool = False,
    ) -> Any:
        """The model's output.

        Arguments:
            params: one entry per layer, placed.
            x: a pytree; every array is cut on axis 0 into microbatches of `ceil(rows /
                chunks)` rows, the last one smaller (10 rows, 4 chunks: 3, 3, 3, 1),
                unless it stands in an `fpipe.Chunk` or `fpipe.NoChunk`. Leaves that are
                no arrays, and `None`, go to every microbatch and are static. A numpy
                array is read while the call runs, after it has returned, as by
                `jax.jit`: before you change one wait for the result, or give a copy.
            side: side inputs for the layers that ask for them, cut like `x`.
            key: a PRNG key; without one, layers that ask for a key get `None`.
            state: the layers' state, one entry per layer, or, of a function that was
                split, its own tree; needed if any layer has state.
            train: handed to the layers that ask.
            step: the number of the training step, an int or a 0-d array of integers:
                an int32 scalar for the layers that ask, the same for all microbatches.
            donate_state: whether the arrays of `state` are handed over: the new state
                takes their place in memory, and they are deleted, as by
                `jax.jit(donate_argnums=...)`. `fpipe.sequential` leaves that to the
                `jax.jit` around it.

        Returns:
            `y`, or `(y, state)` if state was given. Pieces of `y` are concatenated on
            axis 0, or on that of the `fpipe.Chunk` that the last layer returns; 0-d
            ones are stacked to `(m,)`.

        Raises:
            TypeError: no array in `x`; a traced call, where the executor cannot be part
                of a trace.
            ValueError: arrays with unequal numbers of rows;
                parameters or state that do not have one entry per layer; parameters on
                the wrong device; state that is to be donated and is cut by rows.
        """
        donate_state = as_bool("pipe", "donate_state", donate_state)
        with self._context():
            needs = call_needs(side=side, key=key, train=train, step=step)
            args = self._checked(Args(params, x, (), needs, state))
            args = args._replace(donate_state=donate_state)
            y, new = self._forward(args)
        return y if state is None else (y, new)

    def value_and_grad(
        self,
        loss_fn: Callable[..., Any],
        has_aux: bool = False,
        reduction: Reduction = "mean",
        argnums: int | Sequence[int] = 0,
        frozen: Frozen | None = None,
    ) -> Callable[..., Any]:
        """A function that computes a loss and its gradients, forwards and backwards
        interleaved as scheduled.

        Make it once, outside the training loop: compiled programs are kept for each
        `loss_fn` object. Inputs are as for a call without a loss: numpy arrays are not
        to change before the result is there.

        Arguments:
            loss_fn: `loss_fn(y, *targets)`, a scalar, on the last stage for each
                microbatch.
            has_aux: whether it returns `(loss, aux)`; aux comes back stacked on a new
                axis of `m`.
            reduction: `"mean"` weighs microbatches by their rows, `"sum"` adds,
                `"weighted"` takes `(sum, weight)` from `loss_fn` and divides by the
                total weight once.
            argnums: which of `(params, x, *targets)` to differentiate; the rest is not
                computed.
            frozen: the parameters that get no gradient, as `frozen(path, array)` with a
                path such as `"0/w"` (layer 0; of a function that was split a path in
                its own tree, such as `"h/1/w"`; `jax.tree_util.keystr(path,
                simple=True, separator="/")` writes it), or as a pytree of bools that
                the parameters begin with (`(True, False, {"w": True, "b": False})`).
                Nothing is computed for them; their gradients are `float0`, as those of
                integers are. (In an `fpipe.Packed` they share arrays with others and
                are zero there: `pipe.gather` gives `float0`.)

        Returns:
            `f(params, x, *targets, side=None, key=None, state=None, train=False,
            step=None, grads=None, loss_scale=None)`, which returns `loss, grads` (of a
            total weight of 0: nan, as the formula says; mask with
            `jnp.maximum(weight, 1)`); with `has_aux` `(loss, aux), grads`; and with
            `state` given the first of the two becomes a pair with the new state:
            `(loss, state), grads`, or `((loss, aux), state), grads`. With `grads` (what
            an earlier call returned, which is not consumed) the gradients are added to
            those. With `loss_scale`, a number or a 0-d array, the loss is multiplied by
            it before the backward, and gradients are divided by it when they have been
            summed (Micikevicius et al., arXiv 1710.03740): for float16, whose small
            gradients would vanish.

        Raises:
            TypeError: `loss_fn` is no function, or returns no scalar; `argnums` are no
                ints.
            ValueError: an unknown reduction; argument numbers that are negative,
                repeated or too large.
        """
        loss = as_loss("value_and_grad", loss_fn, has_aux, reduction)
        check_frozen("value_and_grad", frozen)
        numbers = as_argnums(argnums)
        which = FrozenLeaves(self._layer_frozen(frozen))

        def value_and_grad(
            params: PyTree,
            x: PyTree,
            *targets: PyTree,
            side: PyTree = None,
            key: Any = None,
            state: PyTree = None,
            train: bool = False,
            step: Any = None,
            grads: Any = None,
            loss_scale: Any = None,
        ) -> Any:
            with self._context():
                needs = call_needs(side=side, key=key, train=train, step=step)
                args = self._checked(Args(params, x, targets, needs, state))
                check_argnums(argnums, numbers, args)
                if frozen is not None:
                    # Not otherwise: to look at the shapes of all parameters takes as
                    # long as all else that a call does before it dispatches.
                    shapes = self._param_shapes(args.params)
                    args = args._replace(frozen=which.of(shapes))
                # The executor knows nothing of `loss_scale` and `grads`: the scale is a
                # target of a changed loss, and both are undone or added behind the
                # call.
                args, own = scaled(args, loss, loss_scale)
                result = self._loss(args, own, numbers)
                # As in `jax.grad`: an int gives a gradient, a tuple a tuple of them.
                new = result.gradients
                new = new[0] if isinstance(argnums, int) else new
                value = unscale_and_add(result.loss, loss_scale, None, "")
                gradients = unscale_and_add(new, loss_scale, grads, "`grads=`")
                return _value(result._replace(loss=value), loss, state), gradients

        return value_and_grad

    def evaluate(
        self,
        loss_fn: Callable[..., Any],
        has_aux: bool = False,
        reduction: Reduction = "mean",
    ) -> Callable[..., Any]:
        """The loss alone: forward only, nothing is kept.

        Arguments:
            loss_fn, has_aux, reduction: as for `value_and_grad`.

        Returns:
            `f(params, x, *targets, side=None, key=None, state=None, train=False,
            step=None)`, which returns what `value_and_grad`'s function returns first.
        """
        loss = as_loss("evaluate", loss_fn, has_aux, reduction)

        def evaluate(
            params: PyTree,
            x: PyTree,
            *targets: PyTree,
            side: PyTree = None,
            key: Any = None,
            state: PyTree = None,
            train: bool = False,
            step: Any = None,
        ) -> Any:
            with self._context():
                needs = call_needs(side=side, key=key, train=train, step=step)
                args = self._checked(Args(params, x, targets, needs, state))
                return _value(self._loss(args, loss, ()), loss, state)

        return evaluate


def scaled(args: Args, loss: Loss, scale: Any) -> tuple[Args, Loss]:
    """A call whose loss is multiplied by a last target, if there is a scale."""
    if scale is None:
        return args, loss
    # A target, because those reach the last stage already, and because its value is no
    # part of what is compiled: a dynamic scale changes often.
    return args._replace(
        targets=(*args.targets, NoChunk(as_scale(scale)))
    ), dataclasses.replace(loss, scaled=True)


def _value(result: Result, loss: Loss, state: Any) -> Any:
    """What a call with a loss returns first: `loss`, `(loss, aux)`, or one of them with
    the new state.
    """
    value = (result.loss, result.aux) if loss.has_aux else result.loss
    return value if state is None else (value, result.state)


def check_argnums(argnums: Any, numbers: tuple[int, ...], args: Args) -> None:
    """Every argument that is numbered was given.

    Arguments:
        argnums: as the user gave it, for the message.
        numbers: the same as a tuple.
    """
    if max(numbers) >= len(args.numbered):
        raise ValueError(
            f"`value_and_grad(argnums={shown(argnums)})`: the call has "
            f"{len(args.numbered)} "
            "arguments (params, x, *targets), so "
            f"numbers go from 0 to {len(args.numbered) - 1}"
        )


def as_argnums(argnums: Any) -> tuple[int, ...]:
    """Argument numbers as a checked tuple."""
    numbers = tuple(argnums) if isinstance(argnums, Sequence) else (argnums,)
    call = (
        f"`value_and_grad(argnums={shown(argnums)})`: numbers of (params, x, *targets)"
    )
    # Not `isinstance`: `True` is an int too, and `argnums=True` is a mistake.
    if any(type(n) is not int for n in numbers):
        raise TypeError(f"{call} are ints")
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise ValueError(f"{call}, counted from 0, each once, and at least one")
    return numbers


def check_chunks(call: str, chunks: Any) -> int:
    """The number of chunks, checked."""
    return as_int(call, "chunks", chunks)


def check_params(model: Model, params: Any, call: str) -> None:
    """Parameters have one entry per layer."""
    count = len(model.layers)
    if not isinstance(params, (tuple, list)) or len(params) != count:
        raise ValueError(
            f"{call}: a tuple with one entry per layer is needed, {count} in all, got "
            f"{entries(params)}"
        )


def checked(model: Model, args: Args) -> Args:
    """The call's state checked: given if a layer has state, with one entry per layer,
    and empty for the layers without.
    """
    count = len(model.layers)
    if args.state is None:
        if model.stateful:
            names = [model.layers[k].name for k in model.stateful]
            raise ValueError(
                f"the layers {names} have state: pass `state=pipe.init_state(x)` and "
                "take the new state back"
            )
        return args
    if not isinstance(args.state, (tuple, list)) or len(args.state) != count:
        raise ValueError(
            f"state: a tuple with one entry per layer is needed, {count} in all, got "
            f"{entries(args.state)}"
        )
    for k in set(range(count)) - set(model.stateful):
        if jax.tree.leaves(args.state[k]):
            raise ValueError(
                f"state: entry {k} is {describe(args.state[k])}, but layer "
                f"{model.layers[k].name!r} has none"
            )
    return args._replace(state=tuple(numbers_as_arrays(s) for s in args.state))
