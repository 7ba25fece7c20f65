"""Calls under JAX's transformations: what the placed executor can do, and what it
refuses.
"""

import sys

import jax

from fpipe._core.pytrees import PyTree, Tracer


class TracedCallError(TypeError):
    """A placed `Pipe` was called where it cannot dispatch."""


def only_shapes() -> bool:
    """Whether this is called by `jax.eval_shape`, which wants shapes and never runs
    anything.

    JAX offers no way to ask; a traced call from anywhere else is refused.
    """
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
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, Tracer):
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
                "supports them all"
            )
