"""Stacked leaves whose rows lie on several devices, as a transformation sees them.

In: a transformation, and trees with an `fpipe.RowBlocks` in the place of a leaf. The
transformation is shown the whole leaf, so that LAMB, Adafactor and block clipping do
what they do on `pipe.gather(params)`. What it keeps for the leaf is in blocks again. In
the trace these are joins and slices, which would bring the leaf to one device. So each
operation is divided. For a leaf in two blocks that is clipped by its norm:

    | operation          |     becomes     | of block 0         | of block 1         |
    |--------------------|                 |--------------------|--------------------|
    | g = join(g0, g1)   |                 |                    |                    |
    | s = sum(g * g)     |                 | s0 = sum(g0 * g0)  | s1 = sum(g1 * g1)  |
    |                    |                 | s = s0 + s1        |                    |
    | u = g / sqrt(s)    |                 | u0 = g0 / sqrt(s)  | u1 = g1 / sqrt(s)  |
    | u0, u1 = slices(u) |                 |                    |                    |

and only numbers cross devices. An operation that mixes rows (a sort, a cumulative sum)
reads the joined leaf, on one device.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fpipe._core.pytrees import PyTree, aval, is_array, shapes_of
from fpipe._program.graph import Node, bind, inline, trace
from fpipe._split.stacks import RowBlocks, is_row_blocks, joined
from fpipe.optim._seen_leaves import parameters_of_state
from fpipe.optim._update_graph import (
    Choice,
    Conditional,
    Equation,
    Guard,
    Operation,
    UpdateGraph,
    live_operations,
)

# Operations that work number by number: each number of the result comes from the
# numbers in the same place, and from scalars.
# fmt: off
_ELEMENTWISE = frozenset((
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2",
    "atanh", "cbrt", "ceil", "clamp", "conj", "convert_element_type", "copy", "cos",
    "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
    "floor", "ge", "gt", "imag", "integer_pow", "is_finite", "le", "lgamma", "log",
    "log1p", "log2", "logistic", "lt", "max", "min", "mul", "name", "ne", "neg",
    "nextafter", "not", "one_minus_square", "or", "polynomial", "pow", "real",
    "reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt",
    "square", "stop_gradient", "sub", "tan", "tanh", "xor",
))
# fmt: on

# Reductions, each with what puts the results of blocks together.
_REDUCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "reduce_sum": jnp.add,
    "reduce_max": jnp.maximum,
    "reduce_min": jnp.minimum,
    "reduce_prod": jnp.multiply,
    "reduce_and": jnp.logical_and,
    "reduce_or": jnp.logical_or,
}


# --- trees ---


def _split_like(node: Any, like: Any) -> Any:
    """A whole leaf in the blocks of another one, if it has as many rows."""
    if not isinstance(like, RowBlocks):
        return node
    if not is_array(node):  # a `MaskedNode`
        return like.with_blocks(node for _ in like.blocks)
    return like.of_whole(node)


def _same_rows(whole: Any, like: RowBlocks) -> bool:
    """Whether an array has the rows of a leaf in blocks."""
    return whole.shape[: like.axis + 1] == like.shape[: like.axis + 1]


def split_updates(updates: PyTree, like: PyTree) -> PyTree:
    """Whole updates, in blocks where `like` is."""
    return jax.tree.map(
        lambda old, new: _split_like(new, old), like, updates, is_leaf=is_row_blocks
    )


def split_state(state: PyTree, params: PyTree) -> PyTree:
    """The parts of a state that belong to the rows of a leaf, in blocks if the
    parameters are.
    """
    named = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_row_blocks)[0]
    if not any(isinstance(leaf, RowBlocks) for _, leaf in named):
        return state
    paths = [path for path, _ in named]
    leaves, treedef = jax.tree.flatten(state)
    for n, parameter in enumerate(parameters_of_state(paths, state)):
        like = None if parameter is None else named[parameter][1]
        if (
            isinstance(like, RowBlocks)
            and all(map(is_array, like.blocks))
            and is_array(leaves[n])
            and _same_rows(leaves[n], like)
        ):
            leaves[n] = _split_like(leaves[n], like)
    return treedef.unflatten(leaves)


def on_whole_leaves(tx: Any) -> optax.GradientTransformationExtraArgs:
    """A transformation that is shown whole leaves."""

    def init(params: PyTree) -> PyTree:
        return split_state(tx.init(joined(params)), params)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        like = updates if params is None else params
        whole = None if params is None else joined(params)
        made, new = tx.update(joined(updates), joined(state), whole, **extra)
        return split_updates(made, like), split_state(new, like)

    return optax.GradientTransformationExtraArgs(init, update)


def split_result(result: PyTree, given: PyTree) -> PyTree:
    """The result of a function of whole leaves. If the result, or a part of it, has the
    structure of a part of the arguments, it is in blocks like that part.
    """
    known: dict[Any, PyTree] = {}

    def look(node: Any) -> None:
        leaves = jax.tree.leaves(node, is_leaf=is_row_blocks)
        if not is_row_blocks(node) and any(map(is_row_blocks, leaves)):
            known.setdefault(jax.tree.structure(joined(shapes_of(node))), node)
            for child in jax.tree.leaves(node, is_leaf=lambda part: part is not node):
                look(child)

    look(given)

    def split(node: Any) -> Any:
        like = known.get(jax.tree.structure(node))
        return node if like is None else _split_alike(node, like)

    if not known:
        return result
    return jax.tree.map(
        split, result, is_leaf=lambda node: jax.tree.structure(node) in known
    )


def _split_alike(node: PyTree, like: PyTree) -> PyTree:
    """A tree of whole leaves in the blocks of a tree of the same structure; those that
    have other rows stay whole.
    """
    return jax.tree.map(
        lambda old, new: (
            _split_like(new, old)
            if not is_array(new) or not is_row_blocks(old) or _same_rows(new, old)
            else new
        ),
        like,
        node,
        is_leaf=is_row_blocks,
    )


# --- traces ---


def divide_leaves(graph: UpdateGraph) -> UpdateGraph:
    """A trace in which leaves are joined, with the operations on each block apart."""
    inputs = set(graph.inputs)
    if not any(_is_join(op) and inputs.issuperset(op.reads) for op in graph.operations):
        return graph
    divider = _Divider(graph)
    for operation in graph.operations:
        divider.add(operation)
    outputs = tuple(divider.whole(v, ()) for v in graph.outputs)
    return dataclasses.replace(
        graph,
        outputs=outputs,
        operations=live_operations(divider.operations, outputs),
        constants=divider.constants,
        avals=divider.avals,
        conditionals=divider.conditionals,
    )


def _is_join(operation: Operation) -> bool:
    return isinstance(operation, Equation) and operation.node.name == "concatenate"


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """A value that is there in blocks.

    Attributes:
        values: the value of each block.
        axis: on which they are one after the other.
    """

    values: tuple[int, ...]
    axis: int


class _Divider:
    """The new operations as they grow.

    Attributes:
        blocks: for each value that is there in blocks the value of each.
    """

    def __init__(self, graph: UpdateGraph) -> None:
        self.operations: list[Operation] = []
        self.constants = dict(graph.constants)
        self.avals = dict(graph.avals)
        self.blocks: dict[int, _Blocks] = {}
        self._conditionals = graph.conditionals
        self._inputs = set(graph.inputs)
        self._renamed: dict[int, int] = {}
        self._joined: dict[Any, int] = {}

    def add(self, operation: Operation) -> None:
        """Add an operation, in blocks if it can be."""
        if isinstance(operation, Choice):
            self._add_choice(operation)
            return
        assert isinstance(operation, Equation)
        node = operation.node
        ins = tuple(self._renamed.get(v, v) for v in node.ins)
        guards = operation.guards
        if _is_join(operation) and self._inputs.issuperset(ins):
            axis = node.eqn.params["dimension"]
            self.blocks[node.outs[0]] = _Blocks(ins, axis)
        elif any(v in self.blocks for v in ins) and len(node.outs) == 1:
            if not self._add_in_blocks(node, ins, guards):
                self._keep(node, ins, guards)
        else:
            self._keep(node, ins, guards)

    @property
    def conditionals(self) -> tuple[Conditional, ...]:
        """Those of the graph; a predicate may be another value now."""
        return tuple(
            dataclasses.replace(one, predicate=self._predicate(Guard(n, 0)))
            for n, one in enumerate(self._conditionals)
        )

    def whole(self, v: int, guards: tuple[Guard, ...]) -> int:
        """A value as one array."""
        v = self._renamed.get(v, v)
        if v not in self.blocks:
            return v
        if (v, guards) not in self._joined:
            own = self.blocks[v]
            self._joined[v, guards] = self._apply(
                lambda *blocks: jnp.concatenate(blocks, own.axis), own.values, guards
            )
        return self._joined[v, guards]

    # --- equations ---

    def _keep(self, node: Node, ins: Sequence[int], guards: tuple[Guard, ...]) -> None:
        """Add an equation that reads whole arrays."""
        read = tuple(self.whole(v, guards) for v in ins)
        self._emit(dataclasses.replace(node, ins=read), guards)

    def _emit(self, node: Node, guards: tuple[Guard, ...]) -> None:
        reads = (*node.ins, *map(self._predicate, guards))
        self.operations.append(Equation(reads, node.outs, guards, node))

    def _predicate(self, guard: Guard) -> int:
        predicate = self._conditionals[guard.conditional].predicate
        return self._renamed.get(predicate, predicate)

    def _apply(
        self, f: Callable[..., Any], values: Sequence[int], guards: tuple[Guard, ...]
    ) -> int:
        """Add the equations of a function of one result."""
        graph = inline(
            trace(lambda *a: [f(*a)], *(aval(self.avals[v]) for v in values))
        )
        number = dict(zip(graph.inputs, values, strict=True))
        for v, shape in graph.avals.items():
            if v not in number:
                number[v] = len(self.avals)
                self.avals[number[v]] = shape
        self.constants.update({number[v]: c for v, c in graph.consts.items()})
        for node in graph.nodes:
            ins, outs = (tuple(number[v] for v in vs) for vs in (node.ins, node.outs))
            self._emit(dataclasses.replace(node, ins=ins, outs=outs), guards)
        return number[graph.outputs[0]]

    def _rows(self, v: int) -> list[int]:
        """The rows of each block of a value."""
        own = self.blocks[v]
        return [self.avals[block].shape[own.axis] for block in own.values]

    def _part(
        self,
        v: int,
        rows: Sequence[int],
        axis: int,
        k: int,
        guards: tuple[Guard, ...],
    ) -> int:
        """The block `k` of a value on an axis, or a number as it is."""
        if not self.avals[v].shape:
            return v
        if v in self.blocks and self.blocks[v].axis == axis and self._rows(v) == rows:
            return self.blocks[v].values[k]
        start = sum(rows[:k])
        return self._apply(
            lambda a: jax.lax.slice_in_dim(a, start, start + rows[k], axis=axis),
            [self.whole(v, guards)],
            guards,
        )

    def _add_in_blocks(
        self, node: Node, ins: tuple[int, ...], guards: tuple[Guard, ...]
    ) -> bool:
        """Add an equation block by block, if that is how it goes."""
        first = next(v for v in ins if v in self.blocks)
        rows, axis, params = self._rows(first), self.blocks[first].axis, node.eqn.params
        (out,) = node.outs
        shape = self.avals[out].shape
        old = self.avals[first].shape

        def each() -> tuple[int, ...]:
            """The same equation of the blocks of all operands."""
            parts = [
                [self._part(v, rows, axis, k, guards) for v in ins]
                for k in range(len(rows))
            ]
            return tuple(self._bind(node, own, guards) for own in parts)

        def resized(name: str, to: int, sizes: Sequence[int]) -> tuple[int, ...]:
            """The same of each block, with results of these sizes on an axis."""
            changed = [{name: (*shape[:to], n, *shape[to + 1 :])} for n in sizes]
            blocks = zip(self.blocks[first].values, changed, strict=True)
            return tuple(self._bind(node, [v], guards, **own) for v, own in blocks)

        if node.name in _ELEMENTWISE:
            if any(self.avals[v].shape not in ((), shape) for v in ins):
                return False
            self.blocks[out] = _Blocks(each(), axis)
        elif node.name in _REDUCTIONS:
            made = each()
            if axis in params["axes"]:
                add = _REDUCTIONS[node.name]
                self._renamed[out] = self._together(add, made, guards)
            else:
                before = sum(a < axis for a in params["axes"])
                self.blocks[out] = _Blocks(made, axis - before)
        elif node.name == "reshape":
            # Blocks of rows are blocks of numbers, one after the other.
            outside, width = math.prod(old[:axis]), math.prod(old[axis + 1 :])
            ends = [n for n in range(len(shape)) if math.prod(shape[:n]) == outside]
            to = max(ends, default=0)
            inner = math.prod(shape[to + 1 :])
            if not ends or not inner or any(n * width % inner for n in rows):
                return False
            sizes = [n * width // inner for n in rows]
            self.blocks[out] = _Blocks(resized("new_sizes", to, sizes), to)
        elif node.name == "broadcast_in_dim":
            to = params["broadcast_dimensions"][axis]
            if old[axis] != shape[to]:
                return False
            self.blocks[out] = _Blocks(resized("shape", to, rows), to)
        elif node.name == "transpose":
            to = params["permutation"].index(axis)
            self.blocks[out] = _Blocks(each(), to)
        elif node.name == "squeeze" and axis not in params["dimensions"]:
            before = sum(a < axis for a in params["dimensions"])
            self.blocks[out] = _Blocks(each(), axis - before)
        elif node.name == "slice":
            return self._add_slice(out, first, rows, params)
        elif node.name == "dot_general":
            return self._add_product(node, ins, first, guards)
        else:
            return False
        return True

    def _bind(
        self, node: Node, ins: Sequence[int], guards: tuple[Guard, ...], **changed: Any
    ) -> int:
        """Add an equation on other values."""
        return self._apply(lambda *a: bind(node, a, **changed)[0], ins, guards)

    def _together(
        self,
        add: Callable[[Any, Any], Any],
        made: Sequence[int],
        guards: tuple[Guard, ...],
    ) -> int:
        """What was made of each block, as one."""
        total = made[0]
        for part in made[1:]:
            total = self._apply(add, [total, part], guards)
        return total

    def _add_slice(
        self, out: int, v: int, rows: Sequence[int], params: dict[str, Any]
    ) -> bool:
        """A slice that is a block."""
        shape, axis = self.avals[v].shape, self.blocks[v].axis
        pairs = zip(params["start_indices"], params["limit_indices"], strict=True)
        ends = list(itertools.accumulate(rows, initial=0))
        expected: list[tuple[int, int]] = [(0, n) for n in shape]
        taken = list(pairs)
        expected[axis] = taken[axis]
        steps = set(params["strides"] or (1,))
        if taken != expected or steps != {1}:
            return False
        if taken[axis] not in itertools.pairwise(ends):
            return False
        self._renamed[out] = self.blocks[v].values[ends.index(taken[axis][0])]
        return True

    def _add_product(
        self, node: Node, ins: tuple[int, ...], v: int, guards: tuple[Guard, ...]
    ) -> bool:
        """A product of matrices. If the rows are contracted it is a sum over blocks,
        and otherwise its result is in blocks.

        Arguments:
            v: an operand that is in blocks.
        """
        contracted, batch = node.eqn.params["dimension_numbers"]
        (out,) = node.outs
        rows, axis, own = self._rows(v), self.blocks[v].axis, ins.index(v)

        def each(axes: Sequence[int | None]) -> tuple[int, ...]:
            """Of the blocks on an axis of each operand; `None`: of all of it."""
            parts = [
                [
                    self.whole(u, guards)
                    if cut is None
                    else self._part(u, rows, cut, k, guards)
                    for u, cut in zip(ins, axes, strict=True)
                ]
                for k in range(len(rows))
            ]
            return tuple(self._bind(node, p, guards) for p in parts)

        if axis in contracted[own]:
            n = contracted[own].index(axis)
            axes = [numbers[n] for numbers in contracted]
            self._renamed[out] = self._together(jnp.add, each(axes), guards)
        elif axis in batch[own]:
            n = batch[own].index(axis)
            self.blocks[out] = _Blocks(each([numbers[n] for numbers in batch]), n)
        else:
            # After the axes of the batch come those of the left, then of the right.
            free = [
                (side, a)
                for side, u in enumerate(ins)
                for a in range(self.avals[u].ndim)
                if a not in contracted[side] and a not in batch[side]
            ]
            to = len(batch[0]) + free.index((own, axis))
            axes = [axis if side == own else None for side in range(2)]
            self.blocks[out] = _Blocks(each(axes), to)
        return True

    # --- conditionals ---

    def _add_choice(self, choice: Choice) -> None:
        options = [self._renamed.get(v, v) for v in choice.options]
        own = self._predicate(Guard(choice.conditional, 0))

        def add(made: int, of: Sequence[int]) -> None:
            reads = (own, *of, *map(self._predicate, choice.guards))
            self.operations.append(
                dataclasses.replace(
                    choice, reads=reads, makes=(made,), options=tuple(of)
                )
            )

        def inside(branch: int) -> tuple[Guard, ...]:
            return (*choice.guards, Guard(choice.conditional, branch))

        (out,) = choice.makes
        in_blocks = [v for v in options if v in self.blocks]
        if not in_blocks:
            add(out, options)
            return
        rows, like = self._rows(in_blocks[0]), self.blocks[in_blocks[0]]
        blocks = []
        for k in range(len(rows)):
            parts = [
                self._part(v, rows, like.axis, k, inside(b))
                for b, v in enumerate(options)
            ]
            made = len(self.avals)
            self.avals[made] = self.avals[like.values[k]]
            add(made, parts)
            blocks.append(made)
        self.blocks[out] = _Blocks(tuple(blocks), like.axis)
