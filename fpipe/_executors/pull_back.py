"""A call that is differentiated from outside, by `jax.grad` or `jax.vjp`.

JAX must not look into a call, which dispatches programs or is one with a schedule of
its own. So the call is a `jax.custom_vjp`: its forward rule runs all forwards in the
schedule's order (`Executor.first_half`), its backward rule all backwards. In: the
arguments of the call. Out: `(y, state)`.

The arrays of a call, as the rules see them, in this order:

    parameters (placed: each array; packed: each row) | x | side | key, state, …
    |-------------- can be differentiated --------------------| |---- never ----|

The forward rule gets concrete arrays although the caller sees tracers: JAX calls the
rules of a `custom_vjp` with values under an eager `grad`, `vjp` and `value_and_grad`.
That is what lets a call dispatch to devices and still be differentiated.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fpipe._core.pytrees import PyTree, Spec, float0_like, is_inexact, pack
from fpipe._executors.call import Args
from fpipe._executors.protocol import Executor, SecondHalf
from fpipe._executors.request import differentiable_inputs, input_leaves
from fpipe._model.stages import Port

_NO_FORWARD_MODE = (
    "fpipe: over a call of a Pipe `jax.grad`, `jax.vjp` and `jax.value_and_grad` work, "
    "and forward mode (`jax.jvp`, `jax.jacfwd`) does not, because the call has a "
    "backward of its own; `fpipe.sequential` supports both"
)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _PullBack:
    """What the forward rule hands to the backward rule, other than arrays.

    Residuals are a pytree of arrays, so this is one without leaves. It compares by
    identity, because arrays among `zeros` cannot be compared as one truth value.

    Attributes:
        second: the backward half.
        zeros: for each array of the call what its cotangent is if there is no gradient:
            a `float0` array for integers, `None` for floats.
    """

    second: SecondHalf
    zeros: tuple[Any, ...]


def differentiable_call(
    executor: Executor, args: Args
) -> tuple[PyTree, tuple[PyTree, ...]]:
    """`(y, state)` of a call, which `jax.grad` and `jax.vjp` can differentiate.

    Arguments:
        args: the call's; some of it may be traced.
    """
    differentiable = differentiable_inputs(args)
    # A tuple: JAX would sort the keys of a dict.
    varied = (args.params, tuple(differentiable.values()))
    fixed = (args.needs, args.state)
    leaves = executor.param_leaves(args.params)
    for name, tree in differentiable.items():
        leaves += [(leaf,) for leaf in input_leaves(Port(name), tree)]
    arrays, spec = pack((varied, fixed))
    # The structure of what a rule returned last: `custom_vjp` hands on arrays alone,
    # and an output may have static leaves. It is known when one of the two functions
    # has run. JAX decides which one runs: `primal`, if nothing is differentiated after
    # all.
    returned: list[Spec] = []

    # From JAX 0.12 on the rules live as long as the trace. What they close over holds
    # no arrays: `jax.checking_leaks()` would find the tracers among them.
    names = tuple(differentiable)
    others = args._replace(params=None, x=None, needs={}, state=None)

    def args_of(values: Sequence[Any]) -> Args:
        (params, inputs), (needs, state) = spec.unpack(values)
        call = others._replace(params=params, state=state, needs=needs)
        return call.with_inputs(dict(zip(names, inputs, strict=True)))

    def primal(*values: Any) -> list[Any]:
        with executor.context():
            flat, structure = pack(executor.forward(args_of(values)))
        returned.append(structure)
        return flat

    def forward(*primals: Any) -> tuple[list[Any], Any]:
        # With symbolic zeros JAX tells which arrays are differentiated. For the others
        # no gradient is computed, as if they stood in no `argnums`.
        values = [p.value for p in primals]
        asked = [
            bool(p.perturbed) and is_inexact(p.value) for p in primals[: len(leaves)]
        ]
        # A rule runs outside of the trace of an eager `jax.grad`: only here can the
        # caller's mesh be set aside.
        with executor.context():
            half = executor.first_half(args_of(values), leaves, asked)
            flat, structure = pack((half.y, half.state))
        returned.append(structure)
        zeros = tuple(None if is_inexact(v) else float0_like(v) for v in values)
        return flat, (list(half.residuals), _PullBack(half.second, zeros))

    def backward(residuals: Any, cotangents: Sequence[Any]) -> tuple[Any, ...]:
        arrays, pull_back = residuals
        with executor.context():
            gradients = list(pull_back.second(arrays, cotangents))
        gradients += [None] * (len(pull_back.zeros) - len(gradients))
        # `None` is a zero that JAX does not have to make.
        return tuple(
            zero if gradient is None else gradient
            for gradient, zero in zip(gradients, pull_back.zeros, strict=True)
        )

    f = jax.custom_vjp(primal)
    f.defvjp(forward, backward, symbolic_zeros=True)
    try:
        flat = f(*executor.bring(arrays))
    except TypeError as error:
        if "custom_vjp" in str(error):  # JAX's own refusal of forward mode
            error.add_note(_NO_FORWARD_MODE)
        raise
    return returned[-1].unpack(flat)


def whole_cotangent(cotangent: Any, shape: jax.ShapeDtypeStruct) -> Any:
    """A cotangent as an array: JAX leaves out zeros."""
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros(shape.shape, shape.dtype)
    return cotangent
