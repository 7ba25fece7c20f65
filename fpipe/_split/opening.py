"""Loops over layers and checkpointed models, opened: what is inside can be cut.

In: a trace, and which of its inputs are parameters and state. Out: the same
computation, in which

- a `scan` over stacked parameters, or one with a mark in its body, is written out round
  by round. A round reads its own rows of what the loop runs over;
- the rows of stacked parameters and state are inputs of their own (see
  `row_rewriting.py`);
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._core.errors import at_line
from fpipe._core.pytrees import aval, nbytes
from fpipe._program.control_flow import is_remat, scan_parts, while_body
from fpipe._program.graph import Graph, Node, bind, inline, trace
from fpipe._split.by_rows import Part, goes_by_rows
from fpipe._split.loop_bodies import (
    decided_by,
    has_loop_over,
    indexed,
    numbers_of_rounds,
)
from fpipe._split.mark import Mark, mark_inside, mark_of
from fpipe._split.row_rewriting import ByRows, RowRewriter, Stacks, divided_leaf
from fpipe._split.stacks import Roots, Rows


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
        by_rows: the equations, without marks, and the rows that they read.
        marks: where `fpipe.cut` stands in it.
        rounds: the positions of the equations of each round of a loop.
        checkpoints: the checkpoints that an equation was in, the outermost first.
        whole_loops: loops over most of the parameters that are not cut by rows.
    """

    by_rows: ByRows
    marks: tuple[Mark, ...]
    rounds: tuple[range, ...]
    checkpoints: Mapping[Node, tuple[Checkpoint, ...]]
    whole_loops: tuple[WholeLoop, ...]


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
        found += divided_leaf(leaf, graph.avals[v].shape, asked.get(leaf, ()))
    if found == whole and not opener.left_out:
        return opened
    return _Opener(graph, stacks, cut_leaves, found).opened(graph)


class _Opener(RowRewriter):
    """Opens a graph.

    Arguments:
        cut_leaves: see `open_trace`; the others are those of `RowRewriter`.
    """

    def __init__(
        self,
        graph: Graph,
        stacks: Stacks,
        cut_leaves: frozenset[int],
        roots: Sequence[Rows],
        looking: bool = False,
    ) -> None:
        super().__init__(graph, stacks, roots, looking)
        self._cut_leaves = cut_leaves
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

    def opened(self, graph: Graph) -> Opened:
        """The graph, opened."""
        return Opened(
            self.by_rows(graph),
            tuple(self._marks),
            tuple(self._rounds),
            self._checkpoints,
            tuple(self._whole_loops),
        )

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
        else:
            super().add(node)

    def keep(self, node: Node) -> None:
        """Add an equation as it is."""
        super().keep(node)
        if self._inside:
            self._checkpoints[node] = self._inside

    def _is_of_parameter(self, node: Node) -> bool:
        """Whether an equation cuts a parameter, or its rows, over axes of a mesh."""
        (v,) = node.ins
        maker = self.maker.get(v)
        is_own = maker is None or maker.name in ("squeeze", "convert_element_type")
        spec = getattr(node.eqn.params["sharding"], "spec", ())
        return (
            is_own and v not in self.varying and bool(self.leaves.get(v)) and any(spec)
        )

    def _bytes_of_params(self, values: Sequence[int]) -> int:
        """The bytes of what of some values is made of parameters alone."""
        of_params = filter(self.params_of, set(values))
        return sum(nbytes(self.avals[v]) for v in of_params)

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
            v for v in node.ins[first:] if self.params_of(v) and self.is_divisible(v, 0)
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
            if self.params_of(outer)
        }
        pairs = zip(body.inputs, node.ins, strict=True)
        known = {v for v, outer in pairs if self.known(outer) is not None}
        if not stacks or not known:
            return []
        by_rows = indexed(body, set(stacks), numbers_of_rounds(node, known))
        return [
            stacks[v]
            for v, axis in by_rows.items()
            if self.is_divisible(stacks[v], axis)
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
                if self.params_of(outer)
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
            if self.params_of(v) and not self.is_divisible(v, 0)
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
                if self.params_of(u) and u in self.maker
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
        return self.squeeze(self.rows(v, Part(0, r, r + 1), scope), 0, scope)

    # --- checkpoints ---

    def _is_opened_checkpoint(self, node: Node) -> bool:
        """Whether a checkpoint spans the model, or is to be cut inside."""
        if mark_inside(node) is not None:
            return True
        (body,) = node.bodies
        pairs = list(zip(body.inputs, node.ins, strict=True))
        stacks = {v for v, outer in pairs if self.leaves.get(outer)}
        if has_loop_over(body, stacks):
            return True
        numbers = {v for v, outer in pairs if self.known(outer) is not None}
        if numbers and indexed(body, stacks, decided_by(body, numbers)):
            return True
        leaves = frozenset[int]().union(*map(self.params_of, node.ins))
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


def _is_index(a: Any) -> bool:
    """Whether a value may be the number of a layer."""
    return not a.shape and jnp.issubdtype(a.dtype, np.integer)
