"""`init` and `update` for the scan executor: parameters are `fpipe.Packed`.

In: a transformation and packed trees. Out: packed trees. Everything is traced, inside
the user's `jax.jit` or one of our own, and becomes one program. For two layers with a
weight each, Adam's state goes in and comes out as

    ScaleByAdamState(count=int32[], mu=Packed(float32[2, 16]), nu=Packed(...))

and Adam itself is shown `mu=(float32[4, 4], float32[4, 2])`.
"""

from typing import Any

import jax

from fpipe._core.meshes import AnyMesh
from fpipe._core.pytrees import PyTree
from fpipe._model.frozen import Frozen
from fpipe.optim._packed import (
    Rows,
    check_packing,
    mesh_of,
    state_outputs,
    templates_of,
    update_outputs,
)
from fpipe.optim._seen_leaves import SeenLeaves, check_state
from fpipe.optim._sharded import run_sharded
from fpipe.optim._traced import trace_init, trace_update

_FIX = (
    "make one with `tx.init(params)`, or pack this one with "
    "`fpipe.optim.place(fpipe.optim.gather(state), params)`"
)


def init(
    tx: Any, params: PyTree, frozen: Frozen | None, mesh: AnyMesh | None
) -> PyTree:
    """The initial state; what is like the parameters is packed like them."""
    # Rows go in as they are. The transformation is shown shapes. Inside the program,
    # the device that has a leaf cuts it out of its row.
    rows = Rows()
    leaves = rows.add(params)
    seen = SeenLeaves.of(leaves, frozen)
    traced = trace_init(tx, seen, seen.select(jax.tree.leaves(leaves)))
    outputs = state_outputs(traced.state, templates_of(params), first=0)
    return run_sharded(traced, rows.arrays, outputs, mesh)


def update(
    tx: Any,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    extra: dict[str, Any],
    frozen: Frozen | None,
) -> tuple[PyTree, PyTree]:
    """Packed updates and the next state."""
    # Without parameters the gradients say how updates are packed.
    like = grads if params is None else params
    rows = Rows()
    leaves = rows.add(like)
    old_state = rows.add(state)
    gradients = rows.add(grads)
    seen = SeenLeaves.of(leaves, frozen)
    shown = seen.select(jax.tree.leaves(leaves))
    trained = seen.select_gradients(gradients)
    seen.check_gradients(trained)
    templates = templates_of(like)
    # First the leaves (another model or transformation), then their places (another
    # partition): each has an error of its own.
    check_state(tx, seen.seen_tree(shown), old_state, _FIX)
    check_packing(templates, state, _FIX)
    traced = trace_update(
        tx,
        seen,
        trained,
        old_state,
        None if params is None else shown,
        extra,
    )
    # Updates are packed like the parameters, so that adding them is row plus row. The
    # numbers of the outputs go on from one tree to the next.
    outputs = (
        update_outputs(like, seen),
        state_outputs(traced.state, templates, first=traced.updates),
    )
    return run_sharded(traced, rows.arrays, outputs, mesh_of((like, state)))
