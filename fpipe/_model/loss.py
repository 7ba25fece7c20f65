"""The loss of one microbatch, checked.

What `loss_fn(y, *targets)` returns, by its options, and what becomes of it:

    has_aux  reduction         returned            (loss, weight, aux)
    False    "mean" or "sum"   l                   (l, None, None)
    False    "weighted"        (l, w)              (l, w, None)
    True     "weighted"        ((l, w), aux)       (l, w, aux)

A `Loss` is a value that hashes: compiled programs are kept by it, so the same function
with other options is another program.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._core.checks import is_one_of
from fpipe._core.errors import noting, shown
from fpipe._core.pytrees import PyTree, describe, is_inexact, numbers_as_arrays
from fpipe._core.statics import check_leaves
from fpipe._model.scopes import LOSS_SCOPE, scope_of
from fpipe._model.wrappers import PerRow, is_wrapper, without_chunks
from fpipe.schedules._checks import counted

Reduction: TypeAlias = Literal["mean", "sum", "weighted"]


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss on the last stage: `fn(y, *targets)`; if it is scaled, the last target is
    what it is multiplied by.
    """

    fn: Callable[..., Any]
    has_aux: bool
    reduction: Reduction
    call: str  # `value_and_grad` or `evaluate`, for errors
    scaled: bool = False

    def __call__(
        self, y: PyTree, targets: Sequence[PyTree], where: str
    ) -> tuple[jax.Array, jax.Array | None, PyTree]:
        """`(loss, weight, aux)` of one microbatch."""
        with noting(f"in loss_fn{where}"), scope_of(LOSS_SCOPE):
            scale = None
            # A scale of the loss changes from step to step (dynamic loss scaling for
            # float16). As a target it is traced, so that another scale compiles
            # nothing.
            if self.scaled:
                *targets, scale = targets
            # Of how `y` would be joined a loss knows nothing.
            y = without_chunks(y)
            try:
                result = self.fn(y, *targets)
            except TypeError as error:
                # It may be the user's own, so it is raised if the call was right.
                # Checked after the failure and not before every call: built-in
                # functions have no signature, and a call that works needs no check.
                _check_signature(self.fn, y, targets, error)
                raise
            aux = None
            if self.has_aux:
                if not isinstance(result, tuple) or len(result) != 2:
                    raise TypeError(
                        "`loss_fn` with has_aux=True returns `(loss, aux)`, got "
                        f"{describe(result)}"
                    )
                result, aux = result
                _check_aux(aux)
            weight = None
            if self.reduction == "weighted":
                if not isinstance(result, tuple) or len(result) != 2:
                    raise TypeError(
                        '`loss_fn` with reduction="weighted" returns `(sum, weight)`, '
                        f"got {describe(result)}"
                    )
                result, weight = result
                # The total weight divides once, at the end, and is not differentiated.
                weight = jax.lax.stop_gradient(_scalar(weight, "weight"))
            loss = _scalar(result, "loss")
            # In float32: scales reach 2**15 and more, and float16 ends at 65,504.
            if scale is not None:
                loss = wide(loss)
                # In its dtype: the user may have 64 bits, or a strict promotion.
                loss = loss * jnp.asarray(scale).astype(loss.dtype)
            check_leaves(aux, "aux", "`loss_fn`: ")
            return loss, weight, numbers_as_arrays(aux)


def as_loss(call: str, fn: Any, has_aux: bool, reduction: Any) -> Loss:
    """A `Loss` from the arguments of `value_and_grad` or `evaluate`.

    Arguments:
        call: the name of that method, for errors.

    Raises:
        TypeError, ValueError: before the first batch, with what would be right.
    """
    if not callable(fn):
        raise TypeError(
            f"`{call}(loss_fn)`: {shown(fn)} is not callable; write "
            f"`pipe.{call}(loss_fn)(params, x, *targets)`"
        )
    if not isinstance(has_aux, (bool, np.bool_)):
        raise TypeError(
            f"`{call}(loss_fn, has_aux)`: has_aux is a bool, got a "
            f"{type(has_aux).__name__}; parameters and inputs go to the "
            f"function that comes back: `pipe.{call}(loss_fn)(params, x, *targets)`"
        )
    if not is_one_of(reduction, get_args(Reduction)):
        raise ValueError(
            f'`{call}(reduction={shown(reduction)})`: it is "mean", "sum" or "weighted"'
        )
    try:
        # A partial over an array, for one, has no hash.
        hash(fn)
    except TypeError:
        raise TypeError(
            f"`{call}(loss_fn)`: {shown(fn)} must be hashable: compiled programs are "
            "kept "
            "for each"
        ) from None
    return Loss(fn, bool(has_aux), reduction, call)


def sum_dtype(dtype: Any) -> Any:
    """The dtype in which gradients, losses and weights are summed: float32 for the
    16-bit floats.
    """
    # bfloat16 has 8 bits of precision: adding 1 to 256 changes nothing, and a sum over
    # hundreds of microbatches would stand still.
    return jnp.float32 if dtype in (jnp.bfloat16, jnp.float16) else dtype


def wide(value: Any) -> Any:
    """A value in the dtype that it is summed in."""
    return value.astype(sum_dtype(value.dtype))


def divided(total: Any, weight: Any) -> Any:
    """A sum over a total weight, in the sum's dtype."""
    return total / weight.astype(total.dtype)


def _check_aux(aux: PyTree) -> None:
    """Refuse a `PerRow` without rows, and every other wrapper."""
    for leaf in jax.tree.leaves(aux, is_leaf=is_wrapper):
        if isinstance(leaf, PerRow):
            _check_per_row(leaf)
        elif is_wrapper(leaf):
            raise _misplaced(leaf, "aux")


def _check_per_row(wrapper: PerRow) -> None:
    for leaf in jax.tree.leaves(wrapper.value, is_leaf=is_wrapper):
        if is_wrapper(leaf):
            raise _misplaced(leaf, "an fpipe.PerRow")
        if not getattr(leaf, "shape", ()):
            raise TypeError(
                "`loss_fn` returned an `fpipe.PerRow` in aux of "
                f"{describe(leaf)}, which has no rows; leave the wrapper out, and aux "
                "is stacked over microbatches"
            )


def _misplaced(wrapper: Any, where: str) -> TypeError:
    return TypeError(
        f"`loss_fn` returned an fpipe.{type(wrapper).__name__} in {where}: what has an "
        "entry for each row goes in `fpipe.PerRow(leaf)`, with the rows on axis 0, and "
        "other leaves of aux are stacked over microbatches"
    )


def _check_signature(
    fn: Any, y: PyTree, targets: Sequence[PyTree], error: TypeError
) -> None:
    """Say how a loss is called, if it cannot be called so."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind(y, *targets)
    except TypeError:
        count = counted(len(targets), "target")
        raise TypeError(
            "`loss_fn` is called as `loss_fn(y, *targets)`, where y is the output of "
            f"the last layer, here with {count}: {error}"
        ) from None


def _scalar(value: Any, name: str) -> jax.Array:
    """A loss or a weight as a 0-d array of floats, or an error that says what it is."""
    # The most frequent mistakes each get their cure: a tuple, a loss for each row, a
    # complex number.
    if not hasattr(value, "shape") and not isinstance(value, (int, float)):
        hint = ""
        if isinstance(value, tuple):
            hint = "; with an auxiliary output say has_aux=True"
        raise TypeError(
            f"`loss_fn` must return a scalar {name}, got {describe(value)}{hint}"
        )
    value = jnp.asarray(value)
    if value.shape:
        raise TypeError(
            f"`loss_fn` must return a scalar {name}, got {describe(value)}: reduce it, "
            "with its mean for example"
        )
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise TypeError(
            f"`loss_fn` must return a real {name}, got {describe(value)}: take its "
            "absolute value"
        )
    return value if is_inexact(value) else value.astype(jnp.float32)
