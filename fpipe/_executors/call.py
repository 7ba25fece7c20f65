"""The base class of `Pipe` and `sequential`: the user's calls, their arguments and the
checks.

In: a user's call, for example

    pipe.value_and_grad(mse, argnums=(0, 1))(params, x, t, key=key)

Out: `Args` and the requested results. `Call._loss` (or `_forward`) then runs them:

    Args(params, x, targets=(t,), needs={"key": key, "train": False, …})
    Loss(mse, has_aux=False, reduction="mean")
    argnums (0, 1)

Only `Call` knows the forms of the public calls (pairs with a state, `grads=`,
`loss_scale=`). So a pipe and the reference cannot differ in them.
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
from fpipe._model.needs import DIFFERENTIABLE, call_needs
from fpipe._model.stages import Leaf
from fpipe._model.wrappers import NoChunk


class Args(NamedTuple):
    """The arguments of a call.

    Attributes:
        params: one entry per layer, or packed.
        x: the batch, whole.
        targets: the arguments of the loss after `y`; none for a call without a loss.
        needs: the values of the table's other needs, by name.
        state: one entry per layer, if the call has state. For a function that was split
            it is the function's own tree, until the pipe converts it.
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
    def arguments(self) -> tuple[PyTree, ...]:
        """All that gradients are found for: those of `numbered`, and after them the
        differentiable needs (side inputs), which `argnums` cannot name.
        """
        return (*self.numbered, *(self.needs[name] for name in DIFFERENTIABLE))

    def with_arguments(self, arguments: Sequence[PyTree]) -> "Args":
        """The same call with other values of `arguments`."""
        params, x, *rest = arguments
        count = len(self.targets)
        needs = zip(DIFFERENTIABLE, rest[count:], strict=True)
        return self._replace(
            params=params,
            x=x,
            targets=tuple(rest[:count]),
            needs={**self.needs, **dict(needs)},
        )

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
    """The results of a call with a loss; `gradients` has one entry for each number in
    `argnums`.
    """

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
        """The user's `frozen`, by layer."""
        return frozen

    def _context(self) -> AbstractContextManager[Any]:
        """The context of JAX that a call runs in: the caller's, if it has no other."""
        return contextlib.nullcontext()

    def _recording_owner(self) -> Any:
        """The mark of its calls in a recording; `None` if calls are not recorded."""
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
        """Compute the model's output.

        Arguments:
            params: the parameters, one entry per layer, placed.
            x: a pytree. Every array in it is cut on axis 0 into microbatches of
                `ceil(rows / chunks)` rows; the last one may be smaller (10 rows, 4
                chunks: 3, 3, 3, 1). An `fpipe.Chunk` or `fpipe.NoChunk` around an array
                changes that. `None` and leaves that are no arrays are static, and go to
                every microbatch. As with `jax.jit`, a numpy array may still be read
                after the call has returned. Wait for the result before you change the
                array, or give a copy.
            side: side inputs for the layers that ask for them, cut like `x`.
            key: a PRNG key. Without one, layers that ask for a key get `None`.
            state: the state of the layers, one entry per layer. For a function that was
                split, its own tree. It is required if a layer has state.
            train: the value for layers that ask for `train`. Default `False`.
            step: the number of the training step, an int or a 0-d array of integers.
                Layers that ask for it get an int32 scalar, the same for all
                microbatches.
            donate_state: whether the new state may reuse the memory of `state`. Its
                arrays are then deleted, as by `jax.jit(donate_argnums=...)`. In
                `fpipe.sequential` it has no effect: donate in the `jax.jit` around it.

        Returns:
            `y`, or `(y, state)` if `state` was given. The outputs of the microbatches
            are concatenated on axis 0, or on the axis of an `fpipe.Chunk` that the last
            layer returns. 0-d outputs are stacked to `(m,)`, for `m` microbatches.

        Raises:
            TypeError: `x` has no array. Or the call is traced, and the executor cannot
                be part of a trace.
            ValueError: arrays have different numbers of rows. Parameters or state do
                not have one entry per layer. Parameters are on a wrong device. `state`
                is to be donated, but it is cut by rows.
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
        """Make a function that computes a loss and its gradients.

        Its forwards and backwards are interleaved by the schedule. Make the function
        once, outside the training loop: compiled programs are kept for each `loss_fn`
        object. As in a call without a loss, do not change numpy arrays before the
        result is there.

        Arguments:
            loss_fn: `loss_fn(y, *targets)`, which returns a scalar. It runs on the last
                stage, for each microbatch.
            has_aux: whether `loss_fn` returns `(loss, aux)`. The `aux` of the
                microbatches is stacked on a new first axis, with one entry for each
                microbatch.
            reduction: how the losses of the microbatches are combined. `"mean"` weighs
                them by their rows, and `"sum"` adds them. For `"weighted"` `loss_fn`
                returns `(sum, weight)`; the total sum is divided by the total weight
                once.
            argnums: the positions in `(params, x, *targets)` to differentiate. Other
                gradients are not computed. Default 0, the parameters.
            frozen: the parameters that get no gradient. It is a function `frozen(path,
                array)`, with a path such as `"0/w"` in layer 0, or `"h/1/w"` in the own
                tree of a function that was split. (`jax.tree_util.keystr(path,
                simple=True, separator="/")` writes such a path.) Or it is a pytree of
                bools in the structure of the parameters: `(True, False, {"w": True,
                "b": False})`. A bool in place of a whole subtree holds for all
                parameters in it. A frozen parameter has `float0` in place of a
                gradient, as an integer has. In an `fpipe.Packed` frozen parameters may
                share an array with other parameters; their gradients are then zeros,
                and `pipe.gather` returns `float0`. Default: none.

        Returns:
            `f(params, x, *targets, side=None, key=None, state=None, train=False,
            step=None, grads=None, loss_scale=None)`. It returns `loss, grads`; with
            `has_aux` `(loss, aux), grads`. With `state` it returns `(loss, state),
            grads` or `((loss, aux), state), grads`, with the new state.

            `grads` are gradients of an earlier call. The new gradients are added to
            them. The arrays of the earlier call stay valid. `loss_scale` is a number or
            a 0-d array. The loss is multiplied by it before the backward, and the
            summed gradients are divided by it (Micikevicius et al., arXiv 1710.03740).
            It keeps small float16 gradients from vanishing. If the total weight of
            `"weighted"` is 0, the loss is NaN; return `jnp.maximum(weight, 1)` to avoid
            that.

        Raises:
            TypeError: `loss_fn` is no function, or returns no scalar. `argnums` are no
                ints.
            ValueError: `reduction` is unknown. A number in `argnums` is negative,
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
                    # Only then: to find the shapes of all parameters takes as long as
                    # everything else that a call does before it dispatches.
                    shapes = self._param_shapes(args.params)
                    args = args._replace(frozen=which.of(shapes))
                # The executor does not know `loss_scale` and `grads`. The scale is a
                # target of a changed loss. The gradients are divided by the scale and
                # added to `grads` after the call.
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
        """Make a function that computes the loss alone, without gradients.

        It runs forwards only, and keeps no residuals.

        Arguments:
            loss_fn, has_aux, reduction: as for `value_and_grad`.

        Returns:
            `f(params, x, *targets, side=None, key=None, state=None, train=False,
            step=None)`. It returns `loss` or `(loss, aux)`; with `state`, a pair of
            that and the new state.

        Raises:
            TypeError, ValueError: an argument is wrong, as for `value_and_grad`.
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
    # The scale is a target, because targets reach the last stage already, and because
    # its value is then no constant of the program. A dynamic scale changes often.
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
        raise TypeError(f"{call} must be ints")
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise ValueError(f"{call}, counted from 0, each once, and at least one")
    return numbers


def check_chunks(call: str, chunks: Any) -> int:
    """The number of chunks, checked."""
    return as_int(call, "chunks", chunks)


def check_params(model: Model, params: Any, call: str, hint: str = "") -> None:
    """Parameters have one entry per layer.

    Arguments:
        hint: ends the message.
    """
    count = len(model.layers)
    if not isinstance(params, (tuple, list)) or len(params) != count:
        raise ValueError(
            f"{call}: a tuple with one entry per layer is needed, {count} in all, got "
            f"{entries(params)}{hint}"
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
                f"{model.layers[k].name!r} has no state; give None there"
            )
    return args._replace(state=tuple(numbers_as_arrays(s) for s in args.state))
