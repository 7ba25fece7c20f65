"""Calls under JAX's transformations: what the placed executor can do, and what it
refuses.

    pipe(params, x)                     runs
    jax.grad(f) where f calls pipe      runs: a `custom_vjp` gets concrete arrays
    jax.eval_shape(pipe, params, x)     traces the plain composition, for its shapes
    jax.jit, jax.vmap                   refused: there are no arrays to dispatch with
    jax.jvp                             refused by JAX, as of every `custom_vjp`

The refusal is an exception of its own, so that `Pipe` can tell it from a user's error
and try the way of `jax.eval_shape`.
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax

from fpipe._core.pytrees import PyTree, Tracer


class TracedCallError(TypeError):
    """A placed `Pipe` was called where it cannot dispatch."""


def only_shapes() -> bool:
    """Whether this is called by `jax.eval_shape`, which wants shapes and never runs
    anything.

    JAX offers no way to ask; a traced call from anywhere else is refused.
    """
    # So the frames of the stack are looked through. That is slow, but it is done only
    # for a call that is refused otherwise.
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "eval_shape" and frame.f_globals.get(
            "__name__", ""
        ).startswith("jax."):
            return True
        frame = frame.f_back
    return False


def refuse_tracers(tree: PyTree) -> None:
    """Raise if anything is traced: the placed executor dispatches, so it needs real
    arrays.
    """
    leaves = jax.tree.leaves(tree)
    # By their few classes first: a call asks this of all its parameters.
    if not any(issubclass(kind, Tracer) for kind in set(map(type, leaves))):
        return
    for leaf in leaves:
        if isinstance(leaf, Tracer):
            # The transformation is told by the name of its tracer's class, for the
            # message alone: JAX has no public classes for them.
            if "Jaxpr" in type(leaf).__name__:
                raise TracedCallError(
                    "a placed Pipe was called inside `jax.jit` (or another tracing "
                    "transformation): it dispatches one "
                    "program per stage to several devices, and cannot be part of one "
                    "program. Call it outside of jit "
                    "(its programs are compiled all the same), or use the executor "
                    "that is one program, "
                    '`Pipe(..., executor="scan")`, or `fpipe.sequential`'
                )
            raise TracedCallError(
                "a placed Pipe was called under a transformation that it does not "
                f"support ({type(leaf).__name__}): "
                "`jax.grad`, `jax.vjp` and `jax.value_and_grad` of a call work; higher "
                "derivatives, forward mode and "
                "`jax.vmap` do not, and neither does differentiating `value_and_grad` "
                "or `evaluate`. `fpipe.sequential` "
                'supports them all, and `executor="scan"` second derivatives'
            )


def refuse_shapes(arrays: Sequence[Any], why: str = "") -> None:
    """A call takes arrays alone, while a plan may be made from their shapes.

    Arguments:
        why: why this process needs the arrays, if others do not.
    """
    # By their few classes first: a call asks this of all its parameters.
    if not any(
        issubclass(kind, jax.ShapeDtypeStruct) for kind in set(map(type, arrays))
    ):
        return
    shape = next(a for a in arrays if isinstance(a, jax.ShapeDtypeStruct))
    raise TypeError(
        f"a Pipe was called with the shape {shape} in place of an array; "
        + (f"{why}, in this process" if why else "use `jax.eval_shape` for shapes")
    )
