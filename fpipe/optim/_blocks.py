"""Stacked leaves whose rows lie on several devices, as a transformation sees them.

In comes a transformation, and trees with an `fpipe.RowBlocks` in the place of a leaf.
It is shown the whole leaf, so that LAMB, Adafactor and block clipping do what they do
on `pipe.gather(params)`; what it keeps for the leaf is in blocks again. In the trace
that are joins and slices, and the leaf would go to one device. So the trace is divided:
of a leaf in two blocks, clipped by its norm,

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

# Operations that make each number of their result of the numbers in its place, and of
# single ones.
# fmt: off
_ELEMENTWISE = frozenset((
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2",
    "atanh", "cbrt", "ceil", "clamp", "conj", "convert_element_type", "copy", "cos",
    "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
    "floor", "ge", "gt", "imag", "integer_pow", "is_finite", "le", "lgamma", "log",
    "log1p", "logistic", "lt", "max", "min", "mul", "name", "ne", "neg", "nextafter",
    "not", "or", "pow", "real", "reduce_precision", "rem", "round", "rsqrt",
    "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign",
    "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
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
        return RowBlocks(tuple(node for _ in like.blocks))
    return RowBlocks(tuple(_slices(node, [b.shape[0] for b in like.blocks])))


def _slices(array: Any, sizes: Sequence[int]) -> list[Any]:
    ends = list(itertools.accumulate(sizes, initial=0))
    if isinstance(array, jax.ShapeDtypeStruct):
        return [array.update(shape=(n, *array.shape[1:])) for n in sizes]
    return [array[a:b] for a, b in itertools.pairwise(ends)]


def split_updates(updates: PyTree, like: PyTree) -> PyTree:
    """Whole updates, in blocks where `like` is."""
    return jax.tree.map(
        lambda old, new: _split_like(new, old), like, updates, is_leaf=is_row_blocks
    )


def split_state(state: PyTree, params: PyTree) -> PyTree:
    """What a state keeps for the rows of a leaf, in blocks where the parameters are."""
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
            and leaves[n].shape[:1] == like.shape[:1]
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
    """What a function made of whole leaves, in blocks wherever it, or a part of it, has
    the structure of a part of what it was given.
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
            if not is_array(new) or new.shape[:1] == old.shape[:1]
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
    return (
        isinstance(operation, Equation)
        and operation.node.name == "concatenate"
        and operation.node.eqn.params["dimension"] == 0
    )


class _Divider:
    """The new operations as they grow.

    Attributes:
        blocks: for each value that is there in blocks the value of each.
    """

    def __init__(self, graph: UpdateGraph) -> None:
        self.operations: list[Operation] = []
        self.constants = dict(graph.constants)
        self.avals = dict(graph.avals)
        self.blocks: dict[int, tuple[int, ...]] = {}
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
            self.blocks[node.outs[0]] = ins
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
            self._joined[v, guards] = self._apply(
                lambda *blocks: jnp.concatenate(blocks), self.blocks[v], guards
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
        return [self.avals[block].shape[0] for block in self.blocks[v]]

    def _part(
        self, v: int, rows: Sequence[int], k: int, guards: tuple[Guard, ...]
    ) -> int:
        """The block `k` of a value, or a number as it is."""
        if not self.avals[v].shape:
            return v
        if v in self.blocks and self._rows(v) == rows:
            return self.blocks[v][k]
        start = sum(rows[:k])
        return self._apply(
            lambda a: jax.lax.slice_in_dim(a, start, start + rows[k]),
            [self.whole(v, guards)],
            guards,
        )

    def _add_in_blocks(
        self, node: Node, ins: tuple[int, ...], guards: tuple[Guard, ...]
    ) -> bool:
        """Add an equation block by block, if that is how it goes."""
        first = next(v for v in ins if v in self.blocks)
        rows, params = self._rows(first), node.eqn.params
        (out,) = node.outs
        shape = self.avals[out].shape
        shapes = [self.avals[v].shape for v in ins]
        old = self.avals[first].shape

        def each(f: Callable[..., Any]) -> tuple[int, ...]:
            """A function of the blocks of all operands."""
            return tuple(
                self._apply(f, [self._part(v, rows, k, guards) for v in ins], guards)
                for k in range(len(rows))
            )

        def equation(**changed: Any) -> Callable[..., Any]:
            return lambda *arrays: bind(node, arrays, **changed)[0]

        if node.name in _ELEMENTWISE:
            if any(s not in ((), shape) for s in shapes):
                return False
            self.blocks[out] = each(equation())
        elif node.name in _REDUCTIONS:
            made = each(equation())
            if 0 in params["axes"]:
                self._renamed[out] = self._together(
                    _REDUCTIONS[node.name], made, guards
                )
            else:
                self.blocks[out] = made
        elif node.name == "reshape":
            # Blocks of rows are blocks of numbers, one behind the other.
            width, inner = math.prod(old[1:]), math.prod(shape[1:])
            if not shape or not inner or any(n * width % inner for n in rows):
                return False
            self.blocks[out] = tuple(
                self._apply(
                    equation(new_sizes=(n * width // inner, *shape[1:])),
                    [block],
                    guards,
                )
                for n, block in zip(rows, self.blocks[first], strict=True)
            )
        elif node.name == "broadcast_in_dim":
            if params["broadcast_dimensions"][:1] != (0,) or old[0] != shape[0]:
                return False
            self.blocks[out] = tuple(
                self._apply(equation(shape=(n, *shape[1:])), [block], guards)
                for n, block in zip(rows, self.blocks[first], strict=True)
            )
        elif (node.name == "transpose" and params["permutation"][0] == 0) or (
            node.name == "squeeze" and 0 not in params["dimensions"]
        ):
            self.blocks[out] = each(equation())
        elif node.name == "slice":
            return self._add_slice(out, first, rows, params, guards)
        elif node.name == "dot_general":
            return self._add_product(node, ins, guards)
        else:
            return False
        return True

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
        self,
        out: int,
        v: int,
        rows: Sequence[int],
        params: dict[str, Any],
        guards: tuple[Guard, ...],
    ) -> bool:
        """A slice that is a block."""
        shape = self.avals[v].shape
        starts, stops = params["start_indices"], params["limit_indices"]
        ends = list(itertools.accumulate(rows, initial=0))
        block = (starts[0], stops[0])
        whole = not any(starts[1:]) and tuple(stops[1:]) == tuple(shape[1:])
        steps = set(params["strides"] or (1,))
        if not whole or steps != {1} or block not in itertools.pairwise(ends):
            return False
        self._renamed[out] = self.blocks[v][ends.index(block[0])]
        return True

    def _add_product(
        self, node: Node, ins: tuple[int, ...], guards: tuple[Guard, ...]
    ) -> bool:
        """A product of matrices: over rows it is a sum, of rows it is in blocks."""
        (left, right), (left_batch, right_batch) = node.eqn.params["dimension_numbers"]
        (out,) = node.outs
        a, b = ins
        rows = self._rows(a if a in self.blocks else b)
        pairs = list(zip(left, right, strict=True))
        batch = list(zip(left_batch, right_batch, strict=True))

        def each(which: Sequence[bool]) -> tuple[int, ...]:
            return tuple(
                self._apply(
                    lambda *arrays: bind(node, arrays)[0],
                    [
                        self._part(v, rows, k, guards) if cut else self.whole(v, guards)
                        for v, cut in zip(ins, which, strict=True)
                    ],
                    guards,
                )
                for k in range(len(rows))
            )

        if (0, 0) in pairs:
            self._renamed[out] = self._together(jnp.add, each((True, True)), guards)
        elif batch[:1] == [(0, 0)]:
            self.blocks[out] = each((True, True))
        elif not batch and a in self.blocks and 0 not in left:
            self.blocks[out] = each((True, False))
        else:
            return False
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
        rows = self._rows(in_blocks[0])
        blocks = []
        for k in range(len(rows)):
            parts = [self._part(v, rows, k, inside(b)) for b, v in enumerate(options)]
            made = len(self.avals)
            self.avals[made] = self.avals[self.blocks[in_blocks[0]][k]]
            add(made, parts)
            blocks.append(made)
        self.blocks[out] = tuple(blocks)
