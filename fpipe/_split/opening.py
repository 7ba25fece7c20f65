"""Loops over layers and checkpointed models, opened: what is inside can be cut.

In: a trace, and which of its inputs are parameters and state. Out: the same
computation, in which

- a `scan` over stacked parameters, or one with a mark in its body, is written out round
  by round. A round reads its own rows of what the loop runs over;
- rows of a stacked parameter are inputs of their own, wherever they come from: a round
  of a loop, a slice, an index that the trace knows, also after a cast;
- so are rows of a stacked state, and the rows that the function returns for them;
- a `jax.checkpoint` that spans the model, or in which there is a mark, is written out,
  and remembered: what of it is in one piece is checkpointed there by itself.

So of `jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params)[0]` with two layers

    | equation     | reads    | makes |     inputs     params[0:1], params[1:2], x
    | squeeze      | params 0 | 3     |
    | dot_general  | x, 3     | 4     |     rounds     equations 0 to 2, 3 to 5
    | tanh         | 4        | 5     |
    | squeeze      | params 1 | 6     |
    | dot_general  | 5, 6     | 7     |
    | tanh         | 7        | 8     |

Pieces of several rounds are written out too. If they stayed loops, the loop would make
the rows of their weights, and each microbatch would keep these for its backward, in
addition to the weights. A piece of one round would be no loop, and so have another
program.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._core.errors import at_line
from fpipe._core.pytrees import aval, is_traced, nbytes
from fpipe._program.control_flow import is_remat, scan_parts, while_body
from fpipe._program.graph import Graph, Node, bind, inline, trace
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
from fpipe._split.loop_bodies import (
    decided_by,
    has_loop_over,
    indexed,
    numbers_of_rounds,
)
from fpipe._split.mark import Mark, mark_inside, mark_of
from fpipe._split.stacks import Roots, Rows, divided

# Numbers that are known while tracing are indices of layers: larger arrays are not
# looked at.
_LARGEST_KNOWN = 1024


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A `jax.checkpoint` that was written out.

    Attributes:
        number: which one of the trace.
        policy, prevent_cse: as it was given them.
    """

    number: int
    policy: Any
    prevent_cse: Any

    def __call__(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """A function, checkpointed as it was."""
        return jax.checkpoint(f, policy=self.policy, prevent_cse=self.prevent_cse)


@dataclasses.dataclass(frozen=True, eq=False)
class WholeLoop:
    """A loop over stacked parameters that cannot be cut by rows.

    Attributes:
        node: its equation.
        rows_by: what makes the rows that it runs over, and needs all of the stack for
            each; `None`: it is a `while`, which takes them by an index.
    """

    node: Node
    rows_by: Node | None


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """A trace with its loops over layers opened.

    Attributes:
        graph: the equations, without marks. Of its inputs those that are parameters
            or state are others now.
        roots: the parameters, the state, and the rows of them, that it reads.
        params, state: the value of each.
        new_state: for each root of the state the value that it has afterwards.
        marks: where `fpipe.cut` stands in it.
        rounds: the positions of the equations of each round of a loop.
        checkpoints: the checkpoints that an equation was in, the outermost first.
        whole_loops: loops over most of the parameters that are not cut by rows.
    """

    graph: Graph
    roots: Roots
    params: tuple[int, ...]
    state: tuple[int, ...]
    new_state: tuple[int, ...]
    marks: tuple[Mark, ...]
    rounds: tuple[range, ...]
    checkpoints: Mapping[Node, tuple[Checkpoint, ...]]
    whole_loops: tuple[WholeLoop, ...]


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


def open_trace(
    graph: Graph,
    stacks: Stacks,
    cut_leaves: frozenset[int],
    roots: Roots | None,
) -> Opened:
    """Open the loops and the checkpoints of a trace.

    Arguments:
        cut_leaves: the parameters before which the user cuts, or before rows of them.
        roots: the rows that the first trace reads; `None`: this is it.

    Raises:
        ValueError: a mark in a loop that does not mark what the loop's body returns.
    """
    if roots is not None:
        return _Opener(graph, stacks, cut_leaves, stacks.together(roots)).opened(graph)
    whole = [Rows(leaf) for leaf in range(len(stacks.values))]
    opener = _Opener(graph, stacks, cut_leaves, whole, looking=True)
    opened = opener.opened(graph)
    # What it reads by rows is known when all has been read.
    asked = opener.asked_rows()
    found = list[Rows]()
    for leaf, v in enumerate(stacks.values):
        found += _divided(leaf, graph.avals[v].shape, asked.get(leaf, ()))
    if found == whole and not opener.left_out:
        return opened
    return _Opener(graph, stacks, cut_leaves, found).opened(graph)


def _divided(leaf: int, shape: Sequence[int], asked: Iterable[Part]) -> list[Rows]:
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


class _Opener(Rewriter):
    """Opens a graph.

    Arguments:
        looking: whether it only looks for the rows that are read: it leaves out slices,
            which are many, and take long to trace.

    Attributes:
        left_out: whether there was a slice to leave out.
    """

    def __init__(
        self,
        graph: Graph,
        stacks: Stacks,
        cut_leaves: frozenset[int],
        roots: Sequence[Rows],
        looking: bool = False,
    ) -> None:
        super().__init__(graph)
        self.left_out = False
        self._looking = looking
        self._stacks = stacks
        # For each leaf the rows that are read by themselves.
        self._asked: dict[int, set[Part]] = {}
        self._cut_leaves = cut_leaves
        self._roots = tuple(roots)
        self._leaf_of = {v: leaf for leaf, v in enumerate(stacks.values)}
        self._bytes = sum(nbytes(graph.avals[v]) for v in stacks.params)
        self._rounds: list[range] = []
        self._checkpoints: dict[Node, tuple[Checkpoint, ...]] = {}
        self._whole_loops: list[WholeLoop] = []
        self._inside: tuple[Checkpoint, ...] = ()
        self._count = 0
        self._marks: list[Mark] = []
        # Those of the round that is being written out, with the values that they mark.
        self._unchecked: list[tuple[Node, int]] = []
        self._in_loop = 0
        self._apart: dict[int, Any] = {}
        # For each value of parameters and state alone, or of nothing, the leaves that
        # it is made of.
        self._leaves: dict[int, frozenset[int]] = {
            v: frozenset((leaf,)) for v, leaf in self._leaf_of.items()
        }
        self._varying = set(graph.inputs) - set(stacks.values)
        self._rows: dict[tuple[int, Part], int] = {}
        self._divisible: dict[tuple[int, int], bool] = {}
        self._by_rows: dict[tuple[int, int], bool] = {}
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
                self._leaves[block] = frozenset((root.leaf,))

    def opened(self, graph: Graph) -> Opened:
        """The graph, opened."""
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
        return Opened(
            new,
            roots,
            values[: len(roots.params)],
            values[len(roots.params) :],
            new_state,
            tuple(self._marks),
            tuple(self._rounds),
            self._checkpoints,
            tuple(self._whole_loops),
        )

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

    def _join(self, values: Sequence[int], axis: int, scope: str) -> int:
        """Some values one after the other."""

        def join(*arrays: Any) -> Any:
            return jnp.concatenate(arrays, axis)

        return self.apply(join, values, ("join", axis), scope)

    def _squeeze(self, v: int, axis: int, scope: str) -> int:
        """A value without an axis of one row."""

        def squeeze(a: Any) -> Any:
            return jax.lax.squeeze(a, [axis])

        return self.apply(squeeze, [v], ("squeeze", axis), scope)

    # --- equations ---

    def add(self, node: Node) -> None:
        """Add an equation, or what it is opened to."""
        if node.name in ("scan", "while"):
            self._look_at_rows(node)
        if (name := mark_of(node)) is not None:
            # A mark is left out. As an equation it would make a second value, equal to
            # the first, and a backward would keep both.
            self.renamed[node.outs[0]] = node.ins[0]
            self._marks.append(Mark(len(self.nodes), name))
            self._unchecked.append((node, node.ins[0]))
        elif node.name == "sharding_constraint" and self._is_of_parameter(node):
            # Flax puts a sharding constraint on annotated parameters where they are
            # used. It is left out: they have this sharding already, or were gathered on
            # purpose.
            self.renamed[node.outs[0]] = node.ins[0]
        elif node.name == "scan" and self._is_opened_loop(node):
            self._open_loop(node)
        elif is_remat(node) and self._is_opened_checkpoint(node):
            self._open_checkpoint(node)
        elif is_remat(node) and self._in_loop and not node.eqn.params["prevent_cse"]:
            # The loop kept the recomputation apart. Without it XLA would find that it
            # equals the forward's computation, and keep the result of that.
            self.keep(dataclasses.replace(node, eqn=self._kept_apart(node)))
        elif not self._takes_rows(node):
            self.keep(node)

    def keep(self, node: Node) -> None:
        """Add an equation as it is."""
        super().keep(node)
        if self._inside:
            self._checkpoints[node] = self._inside
        if self._varying.isdisjoint(node.ins):
            read = (self._leaves[v] for v in node.ins if v in self._leaves)
            self._leaves.update(dict.fromkeys(node.outs, frozenset().union(*read)))
        else:
            self._varying.update(node.outs)

    def _is_of_parameter(self, node: Node) -> bool:
        """Whether an equation cuts a parameter, or its rows, over axes of a mesh."""
        (v,) = node.ins
        maker = self.maker.get(v)
        is_own = maker is None or maker.name in ("squeeze", "convert_element_type")
        spec = getattr(node.eqn.params["sharding"], "spec", ())
        return (
            is_own
            and v not in self._varying
            and bool(self._leaves.get(v))
            and any(spec)
        )

    def _bytes_of_params(self, values: Sequence[int]) -> int:
        """The bytes of what of some values is made of parameters alone."""
        of_params = filter(self._params_of, set(values))
        return sum(nbytes(self.avals[v]) for v in of_params)

    def _params_of(self, v: int) -> frozenset[int]:
        """The parameters that a value is made of, if of no data."""
        first = len(self._stacks.params)
        return frozenset(n for n in self._leaves.get(v, ()) if n < first)

    # --- loops ---

    def _is_opened_loop(self, node: Node) -> bool:
        """Whether it is a loop over layers, or over what a mark tells apart."""
        if mark_inside(node) is not None:
            return True
        # A loop over time may read a table of positions by rows, and all its weights in
        # every round: nothing is gained by cutting that. In one over layers a round
        # reads no more of what all share than of its own.
        first = sum(scan_parts(node))
        stacked = [
            v
            for v in node.ins[first:]
            if self._params_of(v) and self._is_divisible(v, 0)
        ]
        by_index = self._read_by_index(node)
        stacked += by_index
        shared = self._bytes_of_params(
            [v for v in node.ins[:first] if v not in by_index]
        )
        return bool(stacked) and self._bytes_of_params(stacked) >= (
            shared * node.body_runs
        )

    def _read_by_index(self, node: Node) -> list[int]:
        """The stacks of parameters that a loop reads by the number of its round, as a
        `fori_loop` does.
        """
        constants, _ = scan_parts(node)
        (body,) = node.bodies
        stacks = {
            v: outer
            for v, outer in zip(body.inputs, node.ins[:constants], strict=False)
            if self._params_of(outer)
        }
        pairs = zip(body.inputs, node.ins, strict=True)
        known = {v for v, outer in pairs if self._known(outer) is not None}
        if not stacks or not known:
            return []
        by_rows = indexed(body, set(stacks), numbers_of_rounds(node, known))
        return [
            stacks[v]
            for v, axis in by_rows.items()
            if self._is_divisible(stacks[v], axis)
        ]

    def _look_at_rows(self, node: Node) -> None:
        """Note a loop over most of the parameters that needs all of them in each round,
        or takes them in an unknown way.
        """
        if node.name == "while":
            body, ins = while_body(node)
            stacks = {
                v: outer
                for v, outer in zip(body.inputs, ins, strict=True)
                if self._params_of(outer)
            }
            numbers = {v for v, a in body.avals.items() if _is_index(a)}
            taken = [stacks[v] for v in indexed(body, set(stacks), numbers)]
            if 2 * self._bytes_of_params(taken) > self._bytes:
                self._whole_loops.append(WholeLoop(node, None))
            return
        first = sum(scan_parts(node))
        mixed = [
            v
            for v in node.ins[first:]
            if self._params_of(v) and not self._is_divisible(v, 0)
        ]
        if 2 * self._bytes_of_params(mixed) > self._bytes:
            largest = max(mixed, key=lambda v: nbytes(self.avals[v]))
            self._whole_loops.append(WholeLoop(node, self._mixing(largest)))

    def _mixing(self, v: int) -> Node:
        """The operation on the way to rows of a value that needs more than rows."""
        node, axis = self.maker[v], 0
        while parts := goes_by_rows(node, self.avals, axis):
            made = [
                (self.maker[u], part.axis)
                for u, part in ((node.ins[n], part) for n, part in parts.items())
                if self._params_of(u) and u in self.maker
            ]
            if not made:
                break
            node, axis = made[0]
        return node

    def _open_loop(self, node: Node) -> None:
        """Write a loop out."""
        (body,) = node.bodies
        constants, carried = scan_parts(node)
        first = constants + carried
        carry = node.ins[constants:first]
        count = node.body_runs
        stacks: list[list[int]] = [[0] * count for _ in node.outs[carried:]]
        order = range(count)
        for r in reversed(order) if node.eqn.params["reverse"] else order:
            start, before, self._unchecked = len(self.nodes), self._unchecked, []
            rows = [self._row(v, r, node.scope) for v in node.ins[first:]]
            self._in_loop += 1
            outs = self.call(body, [*node.ins[:constants], *carry, *rows], node)
            carry = outs[:carried]
            for stack, v in zip(stacks, outs[carried:], strict=True):
                stack[r] = v
            self._in_loop -= 1
            self._check_marks(node, carry)
            self._unchecked = before
            self._rounds.append(range(start, len(self.nodes)))
        self.renamed.update(zip(node.outs, carry, strict=False))
        for v, stack in zip(node.outs[carried:], stacks, strict=True):
            pile = lambda *rows: jnp.stack(rows)  # noqa: E731
            self.renamed[v] = self.apply(pile, stack, "stack", node.scope)

    def _check_marks(self, node: Node, carry: Sequence[int]) -> None:
        """Refuse a mark in the middle of a round."""
        # Loops inside have looked at their own.
        for mark, v in self._unchecked:
            if v not in carry:
                raise ValueError(
                    f"`fpipe.cut(h)`{at_line(mark.where)} stands in the middle of a "
                    f"round of a `scan`{at_line(node.where)}, which is cut between its "
                    "rounds only: mark the carry that its body returns, `return "
                    "fpipe.cut(h), y`"
                )

    def _row(self, v: int, r: int, scope: str) -> int:
        """The row `r` of what a loop runs over."""
        return self._squeeze(self.rows(v, Part(0, r, r + 1), scope), 0, scope)

    # --- checkpoints ---

    def _is_opened_checkpoint(self, node: Node) -> bool:
        """Whether a checkpoint spans the model, or is to be cut inside."""
        if mark_inside(node) is not None:
            return True
        (body,) = node.bodies
        pairs = list(zip(body.inputs, node.ins, strict=True))
        stacks = {v for v, outer in pairs if self._leaves.get(outer)}
        if has_loop_over(body, stacks):
            return True
        numbers = {v for v, outer in pairs if self._known(outer) is not None}
        if numbers and indexed(body, stacks, decided_by(body, numbers)):
            return True
        leaves = frozenset[int]().union(*map(self._params_of, node.ins))
        if leaves & self._cut_leaves and leaves - self._cut_leaves:
            return True
        # More than half of all parameters: it is no layer among others.
        return 2 * self._bytes_of_params(node.ins) > self._bytes

    def _open_checkpoint(self, node: Node) -> None:
        """Write a checkpoint out."""
        (body,) = node.bodies
        params = node.eqn.params
        apart = params["prevent_cse"] or self._in_loop > 0
        here = Checkpoint(self._count, params["policy"], apart)
        self._count += 1
        with self._in_checkpoint(here):
            outs = self.call(body, node.ins, node)
        self.renamed.update(zip(node.outs, outs, strict=True))

    def _kept_apart(self, node: Node) -> Any:
        """The equation of a checkpoint, with what XLA cannot see through around it."""
        # One for all rounds: by the equation, which is the same in each.
        if id(node.eqn) not in self._apart:

            def run(*arrays: Any) -> Sequence[Any]:
                return bind(node, arrays, prevent_cse=True)

            shapes = [aval(self.avals[v]) for v in node.ins]
            (kept,) = inline(trace(run, *shapes)).nodes
            self._apart[id(node.eqn)] = kept.eqn
        return self._apart[id(node.eqn)]

    @contextmanager
    def _in_checkpoint(self, here: Checkpoint) -> Iterator[None]:
        around = self._inside
        self._inside = (*around, here)
        yield
        self._inside = around

    # --- rows ---

    def _takes_rows(self, node: Node) -> bool:
        """Whether an equation takes rows of a stacked parameter: then they stand in the
        place of what it makes.
        """
        parts = self._parts_taken(node)
        if not parts or not self._is_divisible(node.ins[0], parts[0].axis):
            return False
        for v, part in zip(node.outs, parts, strict=True):
            made = self.rows(node.ins[0], part, node.scope)
            if self.avals[v].ndim < self.avals[made].ndim:
                made = self._squeeze(made, part.axis, node.scope)
            self.renamed[v] = made
        return True

    def _parts_taken(self, node: Node) -> list[Part]:
        """The part of its first operand that each result of an equation is."""
        shape = self.avals[node.ins[0]].shape if node.ins else ()
        if not shape:
            return []
        axis = indexed_axis(node, shape)
        read = [] if axis is None else [index_operand(node, axis)]
        return taken_parts(node, shape, {n: self._known(node.ins[n]) for n in read})

    def _known(self, v: int) -> np.ndarray | None:
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
        read = [self._known(u) for u in node.ins]
        if any(value is None for value in read):
            return None
        with jax.ensure_compile_time_eval():
            (made,) = bind(node, read)
        self.consts[v] = known = np.asarray(made)
        return known

    def _is_divisible(self, v: int, axis: int) -> bool:
        """Whether rows of a value without data are made of rows of parameters or
        state.
        """
        if (v, axis) not in self._divisible:
            self._divisible[v, axis] = self._finds_divisible(v, axis)
        return self._divisible[v, axis]

    def _finds_divisible(self, v: int, axis: int) -> bool:
        if not self._leaves.get(v) or self.avals[v].ndim <= axis:
            return False
        node = self.maker.get(v)
        if v in self._leaf_of or node is None:
            return True
        return joined_axis(node) == axis or any(
            self._is_divisible(node.ins[n], part.axis)
            for n, part in goes_by_rows(node, self.avals, axis).items()
        )

    def _goes_by_rows(self, v: int, axis: int) -> bool:
        """Whether rows of a value, of data too, are made of rows of others."""
        if (v, axis) not in self._by_rows:
            node = self.maker.get(v)
            self._by_rows[v, axis] = self._is_divisible(v, axis) or (
                node is not None
                and (
                    joined_axis(node) == axis
                    or any(
                        self._goes_by_rows(node.ins[n], part.axis)
                        for n, part in goes_by_rows(node, self.avals, axis).items()
                    )
                )
            )
        return self._by_rows[v, axis]

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
            numbers = self._known(v)
            if numbers is not None:
                self.consts[left] = part.of(numbers)
            if v in self._varying:
                self._varying.add(left)
            elif v in self._leaves:
                self._leaves[left] = self._leaves[v]
            return left

        def take(a: Any) -> Any:
            return jax.lax.slice_in_dim(a, part.start, part.stop, axis=part.axis)

        return self.apply(take, [v], ("slice", part), scope)


def _is_index(a: Any) -> bool:
    """Whether a value may be the number of a layer."""
    return not a.shape and jnp.issubdtype(a.dtype, np.integer)
