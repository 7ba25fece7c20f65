"""Transformations of `fpipe.Packed` parameters: one program, in which each device works
on what it holds.

A transformation is traced on whole leaves, its steps are shared out over the devices
(`_share.py`), and run in one program (`_devices.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fpipe._core.pytrees import PyTree, aval, numbers_as_arrays, pack, shapes_of
from fpipe._executors.scan.packing import Packed
from fpipe._program.graph import trace
from fpipe.optim._devices import Cell, Out, run
from fpipe.optim._placed import check_state
from fpipe.optim._steps import opened
from fpipe.optim._view import (
    Chosen,
    Frozen,
    Template,
    is_empty,
    is_packed,
    mesh_of,
    templates,
    zero,
)

FIX = "make one with `tx.init(params)`, or pack this one with `fpipe.optim.place(fpipe.optim.gather(state), params)`"


def init(tx: Any, params: PyTree, frozen: Frozen, mesh: Any) -> PyTree:
    """The initial state; what is like the parameters is packed like them."""
    rows = _Rows()
    cells = rows.cells(params)
    chosen = Chosen.of(cells, frozen)
    made: list[PyTree] = []

    def f(*leaves: Any) -> list[Any]:
        made.append(numbers_as_arrays(tx.init(chosen.seen(leaves))))
        return pack(made[-1])[0]

    graph, given = _traced(f, chosen.select(jax.tree.leaves(cells)))
    outs = _state_outs(made[-1], templates(params))
    return run(graph, given, rows.arrays, outs, mesh)


def update(
    tx: Any,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    extra: dict[str, Any],
    frozen: Frozen,
) -> tuple[PyTree, PyTree]:
    """Packed updates and the next state."""
    like = grads if params is None else params
    rows, forms, mesh = _Rows(), templates(like), mesh_of((like, state))
    cells, old = rows.cells(like), rows.cells(state)
    chosen = Chosen.of(cells, frozen)
    leaves = jax.tree.leaves(cells)
    check_state(tx, chosen.seen(chosen.select(leaves)), old, FIX)
    check_packing(forms, state)
    g = chosen.select(chosen.leaves(rows.cells(grads), "gradients"))
    p = [] if params is None else chosen.select(leaves)
    (s, s_spec), (e, e_spec) = pack(old), pack(extra)
    ends = np.cumsum([len(g), len(s), len(p)])
    made: list[PyTree] = []

    def f(*arrays: Any) -> list[Any]:
        g, s, p, e = (
            list(arrays[a:b])
            for a, b in zip([0, *ends], [*ends, len(arrays)], strict=True)
        )
        seen = None if params is None else chosen.seen(p)
        updates, new = tx.update(
            chosen.seen(g), s_spec.unpack(s), seen, **e_spec.unpack(e)
        )
        made.append(numbers_as_arrays(new))
        return [*jax.tree.leaves(updates), *pack(made[-1])[0]]

    graph, given = _traced(f, [*g, *s, *p, *e])
    outs = _update_outs(like, chosen), _state_outs(made[-1], forms, len(g))
    return run(graph, given, rows.arrays, outs, mesh)


def check_packing(forms: Sequence[Template], state: PyTree) -> None:
    """Refuse a state that is packed for another partition."""
    for path, node in jax.tree_util.tree_flatten_with_path(state, is_leaf=is_packed)[0]:
        if is_packed(node) and not any(
            t.fits(s) and t.packing_of(s) == node.packing
            for s in [node.packing.whole]
            for t in forms
        ):
            raise ValueError(
                f"`per_stage(tx).update`: state{jax.tree_util.keystr(path)} is packed "
                "for another partition than the "
                f"parameters; {FIX}"
            )


# --- what goes in: leaves by where they are ---


class _Rows:
    """The rows of some trees, in which each leaf of a `Packed` is a cell."""

    def __init__(self) -> None:
        self.arrays: list[Any] = []

    def cells(self, tree: PyTree) -> PyTree:
        """The tree with one pytree of shapes per layer in the place of every `Packed`;
        a shape knows its cell.
        """
        return jax.tree.map(
            lambda node: self._layers(node) if is_packed(node) else node,
            tree,
            is_leaf=is_packed,
        )

    def _layers(self, node: Packed) -> tuple[PyTree, ...]:
        packing, number = node.packing, dict[int, int]()
        for r, array in enumerate(node.arrays):
            if not is_empty(array):
                number[r] = len(self.arrays)
                self.arrays.append(array)

        def leaf(r: int, d: int, shape: tuple[int, ...]) -> Any:
            array = node.arrays[r]
            if r not in number:
                return array  # of what is not trained
            return _Leaf(shape, array.dtype, Cell(number[r], d, packing.rows[r], shape))

        return packing.trees(
            [leaf(*packing.where[e], packing.shape(e).shape) for e in packing.entries]
        )


class _Leaf(jax.ShapeDtypeStruct):
    """The shape of a leaf that lies in a cell."""

    def __init__(self, shape: Any, dtype: Any, cell: Cell) -> None:
        super().__init__(shape, dtype)
        self.cell = cell


def _traced(
    f: Callable[..., Sequence[Any]], leaves: Sequence[Any]
) -> tuple[Any, list[Any]]:
    """The steps of a function of leaves, and the cell or the array that each of its
    inputs is.
    """
    return opened(trace(f, *map(aval, leaves))), [getattr(a, "cell", a) for a in leaves]


# --- what comes out: rows by whose they are ---


def _update_outs(like: PyTree, chosen: Chosen) -> PyTree:
    """Updates are packed like the parameters; what is not trained has none."""
    count, kept = iter(range(sum(chosen.kept))), iter(chosen.kept)

    def out(node: Any) -> Any:
        if not is_packed(node):
            return next(count) if next(kept) else zero(node)
        number = {}
        for k, shape in enumerate(node.packing.shapes):
            # Static leaves have no number, and are not kept.
            number |= {
                (k, n): next(count)
                for n in jax.tree.leaves(shape.spec.fill(range(len(shape.leaves)), -1))
                if next(kept)
            }
        return Out.of(node.packing, number)

    return jax.tree.map(out, like, is_leaf=is_packed)


def _state_outs(state: PyTree, forms: Sequence[Template], first: int = 0) -> PyTree:
    """What of a state is like the parameters is packed like them; the rest all devices
    have.
    """
    shapes = shapes_of(state)
    arrays, spec = pack(shapes)
    numbers = spec.unpack(range(first, first + len(arrays)))

    def form(node: Any) -> Template | None:
        return next((t for t in forms if t.fits(node)), None)

    def out(node: Any, number: Any) -> Any:
        fit = form(node)
        if fit is None:
            return number
        each = {
            (k, n): leaf
            for k, layer in enumerate(number)
            for n, leaf in enumerate(jax.tree.leaves(layer))
        }
        return Out.of(fit.packing_of(node), each)

    return jax.tree.map(
        out, shapes, numbers, is_leaf=lambda node: form(node) is not None
    )
