"""Stacked parameters and state, read by rows.

In: the equations of a trace, one after the other, and the rows of which its parameters
and its state consist (`Rows`). Out: the same computation with these rows as inputs.
Where an equation takes rows of a stack, they stand in the place of what it makes. Of
`w` with two rows

    | equation        | reads     | makes |     inputs     w[0:1], w[1:2]
    | mul 0.5         | w         | 3     |
    | slice 1:2       | 3         | 4     |     4 becomes  mul 0.5 of w[1:2]

Rows are inputs of their own wherever they are taken: in a round of a loop, by a slice,
or by an index that the trace knows, also after a cast. So are rows of a stacked state,
and the rows that the function returns for them. They are made of as little as can be:
of rows of what the value is made of, if the operations on the way work row by row
(`by_rows.py`).
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._core.pytrees import is_traced
from fpipe._program.graph import Graph, Node, bind
from fpipe._program.rewriting import Rewriter
from fpipe._split.by_rows import (
    Part,
    changed_sizes,
    goes_by_rows,
    index_operand,
    indexed_axis,
    joined_axis,
    joined_parts,
    sources,
    taken_parts,
)
from fpipe._split.stacks import Roots, Rows, divided

# Numbers that are known while tracing are indices of layers: larger arrays are not
# looked at.
_LARGEST_KNOWN = 1024


@dataclasses.dataclass(frozen=True)
class Stacks:
    """Inputs of a trace whose rows may be read one by one.

    Attributes:
        params, state: the values of these arrays.
        new_state: for each array of the state the value that is returned for it.
        rows_of_batch: whether the first axis of the state has the rows of a batch, so
            that no layers are stacked there.
    """

    params: tuple[int, ...]
    state: tuple[int, ...]
    new_state: tuple[int, ...]
    rows_of_batch: bool

    @property
    def values(self) -> tuple[int, ...]:
        """All of them: here a state is a leaf after those of the parameters."""
        return (*self.params, *self.state)

    def separate(self, leaves: Iterable[Rows]) -> Roots:
        """Leaves that are numbered so, as those of parameters and of state."""
        first = len(self.params)
        leaves = tuple(leaves)
        return Roots(
            tuple(rows for rows in leaves if rows.leaf < first),
            tuple(
                dataclasses.replace(rows, leaf=rows.leaf - first)
                for rows in leaves
                if rows.leaf >= first
            ),
        )

    def together(self, roots: Roots) -> list[Rows]:
        """The inverse of `separate`."""
        first = len(self.params)
        state = (dataclasses.replace(r, leaf=r.leaf + first) for r in roots.state)
        return [*roots.params, *state]


@dataclasses.dataclass(frozen=True, eq=False)
class ByRows:
    """A graph that reads its parameters and its state by rows.

    Attributes:
        graph: its equations. Of its inputs those that are parameters or state are
            others now.
        roots: the parameters, the state, and the rows of them, that it reads.
        params, state: the value of each.
        new_state: for each root of the state the value that it has afterwards.
    """

    graph: Graph
    roots: Roots
    params: tuple[int, ...]
    state: tuple[int, ...]
    new_state: tuple[int, ...]


def divided_leaf(leaf: int, shape: Sequence[int], asked: Iterable[Part]) -> list[Rows]:
    """A leaf in the parts of it that are read by themselves, or as a whole.

    Arguments:
        asked: these parts.
    """
    # One that is read on several axes is divided on that with the most parts.
    by_axis: dict[int, set[tuple[int, int]]] = {}
    for part in asked:
        by_axis.setdefault(part.axis, set()).add((part.start, part.stop))
    found: list[Rows] = []
    for axis, spans in sorted(by_axis.items()):
        parts = divided(shape[axis], spans)
        if len(parts) > len(found):
            found = [Rows(leaf, start, stop, axis) for start, stop in parts]
    return found or [Rows(leaf)]


class RowRewriter(Rewriter):
    """Rewrites a graph so that it reads its stacks by rows.

    Arguments:
        roots: the rows that are inputs.
        looking: whether it only looks for the rows that are read: it leaves out slices,
            which are many, and take long to trace.

    Attributes:
        left_out: whether there was a slice to leave out.
        leaves: for each value of parameters and state alone, or of nothing, the leaves
            that it is made of.
        varying: the values that depend on other inputs.
    """

    def __init__(
        self, graph: Graph, stacks: Stacks, roots: Sequence[Rows], looking: bool
    ) -> None:
        super().__init__(graph)
        self.left_out = False
        self._looking = looking
        self._stacks = stacks
        # For each leaf the rows that are read by themselves.
        self._asked: dict[int, set[Part]] = {}
        self._roots = tuple(roots)
        self._leaf_of = {v: leaf for leaf, v in enumerate(stacks.values)}
        self.leaves: dict[int, frozenset[int]] = {
            v: frozenset((leaf,)) for v, leaf in self._leaf_of.items()
        }
        self.varying = set(graph.inputs) - set(stacks.values)
        # What was found out of values: their rows, and by axis whether they are
        # divisible, or made row by row.
        self._rows: dict[tuple[int, Part], int] = {}
        self._divisible: dict[tuple[int, int], bool] = {}
        self._row_by_row: dict[tuple[int, int], bool] = {}
        # What slices that are left out are parts of.
        self._left: dict[int, tuple[int, Part]] = {}
        self._values: dict[Rows, int] = {}
        self._parts: dict[int, list[Rows]] = {}
        for root in self._roots:
            v = stacks.values[root.leaf]
            self._values[root] = v
            self._parts.setdefault(root.leaf, []).append(root)
            if not root.whole:
                whole = graph.avals[v]
                shape = root.part.shape(whole.shape)
                self._values[root] = block = self.new(whole.update(shape=shape))
                self.leaves[block] = frozenset((root.leaf,))

    def by_rows(self, graph: Graph) -> ByRows:
        """The graph, rewritten."""
        self._join_leaves()
        new = self.rewrite(graph)
        values = tuple(self._values[root] for root in self._roots)
        inputs = tuple(v for v in graph.inputs if v not in self._leaf_of)
        new_state = self._new_state()
        count = len(graph.outputs) - len(self._stacks.state)
        new = dataclasses.replace(
            new,
            inputs=(*values, *inputs),
            outputs=(*new.outputs[:count], *new_state),
            nodes=tuple(self.nodes),
        )
        roots = self._stacks.separate(self._roots)
        first = len(roots.params)
        return ByRows(new, roots, values[:first], values[first:], new_state)

    def asked_rows(self) -> dict[int, set[Part]]:
        """For each leaf the rows that are read by themselves; of a state that is not,
        those that are written so.
        """
        found = dict(self._asked)
        first = len(self._stacks.params)
        for leaf, v in enumerate(self.current(self._stacks.new_state), first):
            if leaf not in found:
                found[leaf] = self._written_parts(v)
        if self._stacks.rows_of_batch:
            # No layers are stacked where the rows of the batch are.
            for leaf in range(first, len(self._stacks.values)):
                found[leaf] = {part for part in found[leaf] if part.axis}
        return found

    def _written_parts(self, v: int) -> set[Part]:
        """The parts that a value is joined of."""
        node = self.maker.get(v)
        if node is None:
            return set()
        if joined_axis(node) is not None:
            return set(joined_parts(node, self.avals))
        if node.name != "transpose":
            return set()
        to = node.eqn.params["permutation"]
        return {
            dataclasses.replace(part, axis=to.index(part.axis))
            for part in self._written_parts(node.ins[0])
        }

    def _new_state(self) -> tuple[int, ...]:
        """For each root of the state the value that is returned for it."""
        first = len(self._stacks.params)
        made = self.current(self._stacks.new_state)
        return tuple(
            made[root.leaf - first]
            if root.whole
            else self.rows(made[root.leaf - first], root.part, "")
            for root in self._roots
            if root.leaf >= first
        )

    def _join_leaves(self) -> None:
        """Leaves that are divided are made of their rows, for whoever reads all."""
        for v, leaf in list(self._leaf_of.items()):
            parts = [root for root in self._parts[leaf] if not root.whole]
            if parts:
                blocks = [self._values[root] for root in parts]
                self.renamed[v] = self._join(blocks, parts[0].axis, "")
                self._leaf_of[self.renamed[v]] = leaf

    # --- equations ---

    def add(self, node: Node) -> None:
        """Add an equation, or the rows that it takes."""
        if not self._takes_rows(node):
            self.keep(node)

    def keep(self, node: Node) -> None:
        """Add an equation as it is."""
        super().keep(node)
        if self.varying.isdisjoint(node.ins):
            read = (self.leaves[v] for v in node.ins if v in self.leaves)
            self.leaves.update(dict.fromkeys(node.outs, frozenset().union(*read)))
        else:
            self.varying.update(node.outs)

    def _takes_rows(self, node: Node) -> bool:
        """Whether an equation takes rows of a stacked parameter: then they stand in the
        place of what it makes.
        """
        parts = self._parts_taken(node)
        if not parts or not self.is_divisible(node.ins[0], parts[0].axis):
            return False
        for v, part in zip(node.outs, parts, strict=True):
            made = self.rows(node.ins[0], part, node.scope)
            if self.avals[v].ndim < self.avals[made].ndim:
                made = self.squeeze(made, part.axis, node.scope)
            self.renamed[v] = made
        return True

    def _parts_taken(self, node: Node) -> list[Part]:
        """The part of its first operand that each result of an equation is."""
        shape = self.avals[node.ins[0]].shape if node.ins else ()
        if not shape:
            return []
        axis = indexed_axis(node, shape)
        read = [] if axis is None else [index_operand(node, axis)]
        return taken_parts(node, shape, {n: self.known(node.ins[n]) for n in read})

    def params_of(self, v: int) -> frozenset[int]:
        """The parameters that a value is made of, if of no data."""
        first = len(self._stacks.params)
        return frozenset(n for n in self.leaves.get(v, ()) if n < first)

    # --- values ---

    def known(self, v: int) -> np.ndarray | None:
        """A value of few numbers that the trace alone decides; `None`: it is none."""
        if math.prod(self.avals[v].shape) > _LARGEST_KNOWN:
            return None
        dtype = self.avals[v].dtype
        if not any(jnp.issubdtype(dtype, kind) for kind in (np.integer, np.bool_)):
            return None
        if v in self.consts:
            value = self.consts[v]
            return None if is_traced(value) else np.asarray(value)
        node = self.maker.get(v)
        if node is None or node.bodies or node.eqn.effects or len(node.outs) != 1:
            return None
        read = [self.known(u) for u in node.ins]
        if any(value is None for value in read):
            return None
        with jax.ensure_compile_time_eval():
            (made,) = bind(node, read)
        self.consts[v] = known = np.asarray(made)
        return known

    def is_divisible(self, v: int, axis: int) -> bool:
        """Whether rows of a value without data are made of rows of parameters or
        state.
        """
        if (v, axis) not in self._divisible:
            self._divisible[v, axis] = self._finds_divisible(v, axis)
        return self._divisible[v, axis]

    def _finds_divisible(self, v: int, axis: int) -> bool:
        if not self.leaves.get(v) or self.avals[v].ndim <= axis:
            return False
        node = self.maker.get(v)
        if v in self._leaf_of or node is None:
            return True
        return joined_axis(node) == axis or any(
            self.is_divisible(node.ins[n], part.axis)
            for n, part in goes_by_rows(node, self.avals, axis).items()
        )

    def _goes_by_rows(self, v: int, axis: int) -> bool:
        """Whether rows of a value, of data too, are made of rows of others."""
        if (v, axis) not in self._row_by_row:
            node = self.maker.get(v)
            self._row_by_row[v, axis] = self.is_divisible(v, axis) or (
                node is not None
                and (
                    joined_axis(node) == axis
                    or any(
                        self._goes_by_rows(node.ins[n], part.axis)
                        for n, part in goes_by_rows(node, self.avals, axis).items()
                    )
                )
            )
        return self._row_by_row[v, axis]

    # --- their rows ---

    def rows(self, v: int, part: Part, scope: str) -> int:
        """Some rows of a value, made of as little as can be."""
        if (v, part) not in self._rows:
            self._rows[v, part] = self._make_rows(v, part, scope)
        return self._rows[v, part]

    def _make_rows(self, v: int, part: Part, scope: str) -> int:
        if part.count == self.avals[v].shape[part.axis]:
            return v
        if v in self._leaf_of:
            return self._rows_of_leaf(v, part, scope)
        source, own = self._left.get(v, (v, part))
        if source != v and own.axis == part.axis:
            first, last = (own.start + end for end in (part.start, part.stop))
            return self.rows(source, Part(part.axis, first, last), scope)
        node = self.maker.get(v)
        if node is not None and self._goes_by_rows(v, part.axis):
            if joined_axis(node) == part.axis:
                return self._rows_of_join(node, part, scope)
            read = sources(node, self.avals, part)
            if read is not None:
                return self._rows_of_each(node, part, read, scope)
        return self._slice(v, part, scope)

    def _rows_of_leaf(self, v: int, part: Part, scope: str) -> int:
        """Rows of a parameter: a root, or a part of one."""
        leaf = self._leaf_of[v]
        self._asked.setdefault(leaf, set()).add(part)
        whole = Rows(leaf, part.start, part.stop, part.axis)
        if whole in self._values:
            return self._values[whole]
        for root in self._parts[leaf]:
            if not root.whole and root.has(whole):
                start = part.start - root.start
                inside = Part(part.axis, start, start + part.count)
                return self.rows(self._values[root], inside, scope)
        inner = [root for root in self._parts[leaf] if whole.has(root)]
        if sum(root.count for root in inner) == part.count:
            blocks = [self._values[root] for root in inner]
            return self._join(blocks, part.axis, scope)
        return self._slice(v, part, scope)

    def _rows_of_join(self, node: Node, part: Part, scope: str) -> int:
        """Rows of what was stacked or concatenated."""
        found = []
        for v, own in zip(node.ins, joined_parts(node, self.avals), strict=True):
            start, stop = max(part.start, own.start), min(part.stop, own.stop)
            if start >= stop:
                continue
            if node.name == "stack":
                found.append(self._expand(v, part.axis, scope))
            else:
                inside = Part(part.axis, start - own.start, stop - own.start)
                found.append(self.rows(v, inside, scope))
        return found[0] if len(found) == 1 else self._join(found, part.axis, scope)

    def _expand(self, v: int, axis: int, scope: str) -> int:
        """A value as one row on a new axis."""

        def expand(a: Any) -> Any:
            return jnp.expand_dims(a, axis)

        return self.apply(expand, [v], ("expand", axis), scope)

    def _rows_of_each(
        self, node: Node, part: Part, read: Mapping[int, Part], scope: str
    ) -> int:
        """Rows of what an operation makes of rows.

        Arguments:
            read: the parts of its operands that it makes them of.
        """
        values = [
            self.rows(v, read[n], scope) if n in read else v
            for n, v in enumerate(node.ins)
        ]
        turned = node.eqn.params["dimensions"] if node.name == "rev" else ()
        if turned == (part.axis,) and part.count == 1:
            return values[0]

        def run(*arrays: Any) -> Any:
            return bind(node, arrays, **changed_sizes(node, part))[0]

        return self.apply(run, values, (id(node), part.axis, part.count), scope)

    def _slice(self, v: int, part: Part, scope: str) -> int:
        if self._looking:
            self.left_out = True
            like = self.avals[v]
            left = self.new(like.update(shape=part.shape(like.shape)))
            self._left[left] = v, part
            numbers = self.known(v)
            if numbers is not None:
                self.consts[left] = part.of(numbers)
            if v in self.varying:
                self.varying.add(left)
            elif v in self.leaves:
                self.leaves[left] = self.leaves[v]
            return left

        def take(a: Any) -> Any:
            return jax.lax.slice_in_dim(a, part.start, part.stop, axis=part.axis)

        return self.apply(take, [v], ("slice", part), scope)

    def _join(self, values: Sequence[int], axis: int, scope: str) -> int:
        """Some values one after the other."""

        def join(*arrays: Any) -> Any:
            return jnp.concatenate(arrays, axis)

        return self.apply(join, values, ("join", axis), scope)

    def squeeze(self, v: int, axis: int, scope: str) -> int:
        """A value without an axis of one row."""

        def squeeze(a: Any) -> Any:
            return jax.lax.squeeze(a, [axis])

        return self.apply(squeeze, [v], ("squeeze", axis), scope)
