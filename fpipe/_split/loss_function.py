"""A user's loss function as a function that can be split, and its calls.

In: the function and how it is called, for example

    def loss_fn(params, tokens, temperature, *, key): ...
    loss_fn(params, tokens, 0.7, key=key)          tokens int32[8,16]

Out: what `fpipe.split` takes, `f(params, x, *, key)`, and for each call a `LossCall`:

    params    as it was given
    x         {"tokens": tokens, "temperature": NoChunk(0.7)}
    key       key

All arguments but the parameters, the key and the state are `x`, by name. Numbers become
arrays that go whole to every microbatch. What is static stays as it is: another value
is another trace, cut at the same places.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fpipe._core.errors import a_type, add_note, at_line, line_of, shown
from fpipe._core.pytrees import PyTree, describe, is_array
from fpipe._model.layer import Layer
from fpipe._model.loss import Loss
from fpipe._model.needs import BY_NAME
from fpipe._model.signatures import function_name, has_floats, inside_of
from fpipe._model.wrappers import Microbatches, NoChunk, PerRow, is_wrapper
from fpipe._split.mark import as_aux
from fpipe._split.trace import UNKNOWN_VALUES

KEY = "key"
STATE = "state"


@dataclasses.dataclass(frozen=True)
class LossCall:
    """What a loss function is called with.

    Attributes:
        params: the parameters.
        x: the other arguments by name, without the key and the state.
        key: the key; `None`: the call gives none.
        state: the state; `None`: the function has none.
        of_batch: the arguments of the batch whose gradients are asked for, as they were
            given, by name.
    """

    params: PyTree
    x: dict[str, PyTree]
    key: Any
    state: PyTree
    of_batch: dict[str, PyTree]


@dataclasses.dataclass(frozen=True)
class LossFunction:
    """A loss function whose arguments are `(params, x, key)`.

    Attributes:
        loss: the function, and what it returns.
        argnums: the positional parameters whose gradients are asked for. The first one
            is the model's parameters, all others are arguments of the batch.
        as_tuple: whether the gradients are a tuple, as `jax.grad` has it for `argnums`
            that are a sequence.
        static: the names of arguments that are not traced.
    """

    loss: Loss
    argnums: tuple[int, ...]
    as_tuple: bool
    static: frozenset[str]

    @classmethod
    def checked(
        cls, loss: Loss, argnums: Any, static_argnames: str | Sequence[str]
    ) -> "LossFunction":
        """From the arguments of `fpipe.value_and_grad`.

        Raises:
            TypeError: the function has no such parameters, or arrays of its own; there
                is no gradient of one of them.
            ValueError: a static argument that it has not.
        """
        _check_arrays(loss.fn)
        as_tuple = isinstance(argnums, Sequence) and not isinstance(argnums, str)
        numbers: tuple[Any, ...] = tuple(argnums) if as_tuple else (argnums,)
        are_numbers = all(type(n) is int and n >= 0 for n in numbers)
        if not numbers or not are_numbers or len(set(numbers)) < len(numbers):
            raise TypeError(
                f"`fpipe.value_and_grad(argnums={shown(argnums)})`: give the number of "
                "the argument that is the model's parameters, one pytree. Put several "
                "trees into one, such as `(encoder, decoder)`. For gradients of "
                "arguments of the batch too, give several numbers, first that of the "
                "parameters"
            )
        names = (
            (static_argnames,) if isinstance(static_argnames, str) else static_argnames
        )
        if not isinstance(names, Sequence) or not all(
            isinstance(name, str) for name in names
        ):
            raise TypeError(
                f"`fpipe.value_and_grad(static_argnames={shown(static_argnames)})`: "
                'names of arguments, such as ("causal",)'
            )
        made = cls(loss, numbers, as_tuple, frozenset(names))
        try:
            parameters = made.signature.parameters
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"`fpipe.value_and_grad(loss_fn)`: {shown(loss.fn)} has no signature "
                f"that says how it is called ({error}): wrap it, "
                "`lambda params, batch: loss_fn(params, batch)`"
            ) from None
        if max(numbers) >= len(made._positional):
            raise TypeError(
                f"`fpipe.value_and_grad(loss_fn, argnums={shown(argnums)})`: "
                f"{made.name!r} takes {made.signature}, which has no such positional "
                "parameter: it is called as `loss_fn(params, *batch)`"
            )
        for name in made.of_batch:
            if name in made.static or (made._has(name) and name in (KEY, STATE)):
                raise TypeError(
                    f"`fpipe.value_and_grad(loss_fn, argnums={shown(argnums)})`: "
                    f"{name!r} of {made.name!r} has no gradient: it is static, a key, "
                    "or the state"
                )
        unknown = sorted(made.static - set(parameters) | made.static & {made.of_params})
        if unknown:
            raise ValueError(
                f"`fpipe.value_and_grad(static_argnames={shown(static_argnames)})`: "
                f"{made.name!r} takes {made.signature}, where {unknown[0]!r} is no "
                "argument of the batch"
            )
        return made

    # --- its signature ---

    @property
    def name(self) -> str:
        return function_name(self.loss.fn)

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.loss.fn)

    @functools.cached_property
    def _positional(self) -> list[str]:
        """The names of its positional parameters."""
        kinds = (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        )
        return [n for n, p in self.signature.parameters.items() if p.kind in kinds]

    @property
    def argnum(self) -> int:
        """Which of the positional parameters is the model's parameters."""
        return self.argnums[0]

    @property
    def of_params(self) -> str:
        """The name of the argument that is the model's parameters."""
        return self._positional[self.argnum]

    @functools.cached_property
    def of_batch(self) -> tuple[str, ...]:
        """The names of the arguments of the batch whose gradients are asked for."""
        return tuple(self._positional[n] for n in self.argnums[1:])

    @functools.cached_property
    def draws(self) -> bool:
        """Whether it has an argument for a key."""
        return self._has(KEY)

    @functools.cached_property
    def stateful(self) -> bool:
        """Whether it has an argument for a state, and returns the new one."""
        return self._has(STATE)

    def _has(self, need: str) -> bool:
        named = need in self.signature.parameters and need not in self.static
        return named and need != self.of_params

    def names(self, name: str) -> bool:
        """Whether it has an argument of that name."""
        return name in self.signature.parameters

    # --- as a layer ---

    @property
    def layer(self) -> Layer:
        """It as a function that can be split."""
        needs = ((KEY, self.draws), (STATE, self.stateful))
        return Layer(
            self, name=self.name, needs=[need for need, asked in needs if asked]
        )

    def __call__(
        self,
        params: PyTree,
        x: Mapping[str, PyTree],
        *,
        key: Any = None,
        state: PyTree = None,
    ) -> Any:
        """Run it on a microbatch, and check what it returns."""
        if self.of_batch:
            # The pipe differentiates all of `x`. What nobody asks for is cut off.
            x = {n: a if n in self.of_batch else _constant(a) for n, a in x.items()}
        arguments = {**x, self.of_params: params}
        if key is not None:
            arguments[KEY] = key
        if self.stateful:
            arguments[STATE] = state
        # It looks arguments up by name, so that any dict will do.
        ordered: Any = arguments
        bound = inspect.BoundArguments(self.signature, ordered)
        try:
            result = self.loss.fn(*bound.args, **bound.kwargs)
        except UNKNOWN_VALUES as error:
            add_note(
                error,
                f"in the trace of {self.name!r}{at_line(line_of(error))}, where the "
                "arrays and the numbers of the batch have no values. If the value of "
                "an argument decides what is computed, name the argument in "
                "`fpipe.value_and_grad(static_argnames=...)`",
            )
            raise
        new = None
        if self.stateful:
            result, new = self._result_and_state(result)
        y = self._checked(result)
        return (y, new) if self.stateful else y

    def _result_and_state(self, result: Any) -> tuple[Any, PyTree]:
        """What a function with a state returns."""
        form = "((loss, aux), state)" if self.loss.has_aux else "(loss, state)"
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"`fpipe.value_and_grad(loss_fn)`: {self.name!r} has an argument "
                f"`state`, and returns `{form}`, got {describe(result)}"
            )
        inner = result[0]
        if self.loss.has_aux and not (isinstance(inner, tuple) and len(inner) == 2):
            raise TypeError(
                f"`fpipe.value_and_grad(loss_fn, has_aux=True)`: {self.name!r} has an "
                f"argument `state`, and returns `{form}`, got {describe(result)}: a "
                "new state alone is no aux, and needs no `has_aux=True`"
            )
        return result[0], result[1]

    def _checked(self, result: Any) -> PyTree:
        """What the last piece returns."""
        # Here, and not only in the call: a mistake is told at the first trace.
        own = dataclasses.replace(self.loss, fn=_unchanged)
        loss, weight, aux = own(result, (), f" {self.name!r}")
        value = loss if weight is None else (loss, weight)
        if not self.loss.has_aux:
            return value
        return value, jax.tree.map(
            lambda leaf: _Rows(leaf.value) if is_wrapper(leaf) else leaf,
            as_aux(aux),
            is_leaf=is_wrapper,
        )

    def __reduce__(self) -> Any:
        # A signature may hold what does not pickle.
        return LossFunction, (self.loss, self.argnums, self.as_tuple, self.static)

    # --- its calls ---

    def call(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], name: str, shapes: bool
    ) -> LossCall:
        """A call, with its arguments sorted by their kind.

        Arguments:
            name: what was called, such as `step`, for errors.
            shapes: whether a key that is not given stands in, for only shapes matter.

        Raises:
            TypeError: it cannot be called so.
        """
        bound = self._bound(args, kwargs, name, shapes)
        arguments = dict(bound.arguments)
        params = arguments.pop(self.of_params)
        key = None
        # A `None` that is given stays: it need not be the default.
        if self.draws and arguments.get(KEY) is not None:
            key = arguments.pop(KEY)
        state = arguments.pop(STATE, None) if self.stateful else None
        if self.stateful and state is None:
            raise TypeError(
                f"`{name}(...)`: {self.name!r} has an argument `state`, which every "
                "microbatch gets from the one before it: give it, or rename the "
                "argument"
            )
        x = {
            at: self._static(at, value) if at in self.static else _as_data(at, value)
            for at, value in arguments.items()
        }
        if not any(is_array(leaf) and leaf.shape for leaf in jax.tree.leaves(x)):
            raise TypeError(
                f"`{name}(params, *batch)`: the batch of {self.name!r} has no array "
                "with rows; a pipeline needs one, to cut it into microbatches"
            )
        missing = [at for at in self.of_batch if at not in arguments]
        if missing:
            raise TypeError(
                f"`{name}(...)`: the call gives no {missing[0]!r}, and "
                "`fpipe.value_and_grad(argnums=...)` asks for its gradient"
            )
        given = {at: arguments[at] for at in self.of_batch}
        return LossCall(params, x, key, state, given)

    def gradients(self, call: LossCall, found: PyTree) -> PyTree:
        """The gradients as the user asked for them.

        Arguments:
            found: those of the parameters, or with gradients of the batch a pair of
                that and those of `x`.
        """
        if not self.as_tuple:
            return found
        if not self.of_batch:
            return (found,)
        of_params, of_x = found
        of_batch = [
            jax.tree.map(_own_gradient, call.of_batch[at], of_x[at], is_leaf=is_wrapper)
            for at in self.of_batch
        ]
        return (of_params, *of_batch)

    def _bound(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], name: str, shapes: bool
    ) -> inspect.BoundArguments:
        """The arguments by their names."""
        try:
            return self.signature.bind(*args, **kwargs)
        except TypeError as error:
            stand_in = BY_NAME[KEY].stand_in
            if shapes and self.draws and KEY not in kwargs and stand_in is not None:
                try:
                    return self.signature.bind(*args, **{**kwargs, KEY: stand_in()})
                except TypeError:
                    pass
            raise TypeError(
                f"`{name}(...)` takes what {self.name!r} does, {self.signature}: "
                f"{error}"
            ) from None

    def _static(self, name: str, value: Any) -> Any:
        """A static argument."""
        if any(map(is_array, jax.tree.leaves(value))):
            raise TypeError(
                f"`fpipe.value_and_grad(static_argnames={sorted(self.static)})`: "
                f"{name!r} holds an array, whose values are no part of what is "
                "compiled: give it as an argument that is not static"
            )
        return value


def _unchanged(result: Any) -> Any:
    return result


def _constant(tree: PyTree) -> PyTree:
    """An argument that has no gradient."""
    return jax.tree.map(
        lambda leaf: jax.lax.stop_gradient(leaf) if is_array(leaf) else leaf, tree
    )


def _own_gradient(given: Any, gradient: Any) -> Any:
    """The gradient of a leaf of the batch. A number was wrapped for the pipe."""
    if isinstance(gradient, NoChunk) and not is_wrapper(given):
        return gradient.value
    return gradient


# A layer returns no `PerRow`, which is for the aux of a loss.
@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class _Rows:
    """A `PerRow` on its way from the last piece to the loss."""

    value: PyTree

    def tree_flatten(self) -> tuple[tuple[PyTree], None]:
        """For JAX."""
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[PyTree]) -> "_Rows":
        """For JAX."""
        del aux
        return cls(children[0])


def as_returned(y: Any) -> Any:
    """The loss of a pipe whose last piece returns the loss already."""
    return jax.tree.map(
        lambda leaf: PerRow(leaf.value) if isinstance(leaf, _Rows) else leaf,
        y,
        is_leaf=lambda leaf: isinstance(leaf, _Rows),
    )


def _as_data(name: str, tree: PyTree) -> PyTree:
    """An argument of the batch, whose numbers are arrays that go whole to every
    microbatch.
    """

    def wrapped(leaf: Any) -> Any:
        if isinstance(leaf, Microbatches):
            return Microbatches([_numbers_as_arrays(piece) for piece in leaf])
        if is_wrapper(leaf):
            return _numbers_as_arrays(leaf)
        leaf = _numbers_as_arrays(leaf)
        if not is_array(leaf) or leaf.shape:
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"`step(...)`: {name!r} has a PRNG key, with which all microbatches "
                "would draw the same numbers. Name the argument `key`, and each "
                "microbatch gets a key of its own; or give `fpipe.NoChunk(key)`, if "
                "all should share it"
            )
        return NoChunk(leaf)

    return jax.tree.map(wrapped, tree, is_leaf=is_wrapper)


def _numbers_as_arrays(tree: PyTree) -> PyTree:
    """Numbers among the leaves as arrays. A bool is none: what it switches is another
    computation.
    """

    def converted(leaf: Any) -> Any:
        number = isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool)
        return jnp.asarray(leaf) if number else leaf

    return jax.tree.map(converted, tree)


def _check_arrays(f: Callable[..., Any]) -> None:
    """Refuse a function that is a pytree with arrays: they would not train."""
    for inner in inside_of(f):
        if has_floats(inner):
            raise TypeError(
                f"`fpipe.value_and_grad(loss_fn)`: {a_type(inner)} is a pytree with "
                "arrays, which would be constants and not train: give it as the "
                "parameters, `lambda f, *batch: f(*batch)`; of an Equinox module "
                "`params, static = eqx.partition(f, eqx.is_inexact_array)`"
            )
