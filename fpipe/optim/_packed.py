"""Transformations of `fpipe.Packed` parameters: functions for one program, which XLA divides over the mesh."""

from typing import Any

import jax

from fpipe._scan._packing import Entry
from fpipe._tree import PyTree, is_array, numbers_as_arrays
from fpipe.optim._placed import check_state
from fpipe.optim._view import (
    Chosen,
    Frozen,
    is_packed,
    mesh_of,
    packed_like,
    packed_state,
    templates,
    unpacked,
)

FIX = "make one with `tx.init(params)`, or pack this one with `fpipe.optim.place(fpipe.optim.gather(state), params)`"


def init(tx: Any, params: PyTree, frozen: Frozen, mesh: Any) -> PyTree:
    """The initial state; what is like the parameters is packed like them."""
    full = unpacked(params)
    chosen = Chosen.of(full, frozen)
    state = numbers_as_arrays(tx.init(chosen.seen(chosen.select(jax.tree.leaves(full)))))
    # Zeros depend on nothing: without the barrier `jit` would drop the parameters, and with them the devices of the mesh.
    packed = packed_state(state, templates(params), mesh)
    return jax.lax.optimization_barrier((packed, jax.tree.leaves(params)[:1]))[0]


def update(
    tx: Any, grads: PyTree, state: PyTree, params: PyTree, extra: dict[str, Any], frozen: Frozen
) -> tuple[PyTree, PyTree]:
    """Packed updates and the next state."""
    like = grads if params is None else params
    full = unpacked(like)
    chosen = Chosen.of(full, frozen)
    leaves = jax.tree.leaves(full)
    seen = chosen.seen(chosen.select(leaves))
    old, mesh = unpacked(state), mesh_of((like, state))
    check_state(tx, seen, old, FIX)
    check_packing(like, state)
    g = chosen.select(chosen.leaves(unpacked(grads), "gradients"))
    updates, new = tx.update(chosen.seen(g), old, None if params is None else seen, **extra)
    filled = iter(zip(chosen.kept, chosen.fill(jax.tree.leaves(updates), leaves), leaves, strict=True))
    forms = templates(like)

    def repack(node: Any) -> Any:
        if not is_packed(node):
            return next(filled)[1]
        own: dict[Entry, Any] = {}
        entries = iter(node.packing.entries)
        for kept, value, leaf in (next(filled) for _ in jax.tree.leaves(unpacked(node))):
            if is_array(leaf):
                entry = next(entries)
                if kept:
                    own[entry] = value
        return packed_like(node.packing, own, mesh)

    return jax.tree.map(repack, like, is_leaf=is_packed), packed_state(numbers_as_arrays(new), forms, mesh)


def check_packing(params: PyTree, state: PyTree) -> None:
    """Refuse a state that is packed for another partition."""
    forms = templates(params)
    nodes = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_packed)[0]
    for path, node in nodes:
        fits = [t for t in forms if t.fits(unpacked(node))] if is_packed(node) else []
        if is_packed(node) and not any(t.packing_of(_shapes(node)) == node.packing for t in fits):
            raise ValueError(
                f"`per_stage(tx).update`: state{jax.tree_util.keystr(path)} is packed for another partition than the "
                f"parameters; {FIX}"
            )


def _shapes(node: Any) -> tuple[PyTree, ...]:
    return tuple(shape.tree for shape in node.packing.shapes)
