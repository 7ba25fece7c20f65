"""A traced update as a flat list of operations, its conditionals opened.

In comes what JAX traced of an update, out goes an `UpdateGraph`: numbered values, and
the operations between them in order. An update that is skipped when a gradient is not
finite, `cond(finite, [keep, adam], gradient, moment)`, for example, is

    | operation                 | reads   | makes | guards              |
    |---------------------------|---------|-------|---------------------|
    | finite = is_finite(g)     | 0       | 2     |                     |
    | new = multiply(g, 0.1)    | 0, 2    | 3     | (conditional 0, 1)  |
    | choice: m or new          | 2, 1, 3 | 4     |                     |

where value 0 is the gradient g and value 1 the moment m.

A conditional left whole would be one operation that reads arrays of all devices, and
all of them would have to move to one device. Opened, each equation can run on a device
of its own. The *guards* of an equation say which conditionals it stood in.
`run_operations` puts whatever part of a conditional it is given into a conditional
again, so that the branch that is not taken costs nothing. (To run both branches and
select would do too, but `optax.MultiSteps` takes the expensive one once in many steps.)
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fpipe._core.meshes import no_mesh
from fpipe._core.pytrees import aval, zeros
from fpipe._program.graph import Graph, Node, bind, inline, trace


class Guard(NamedTuple):
    """One branch of one conditional: where an equation stood."""

    conditional: int
    branch: int


@dataclasses.dataclass(frozen=True)
class Conditional:
    """A `cond` of the trace.

    Attributes:
        predicate: the value that says which branch is taken.
        branches: how many there are.
    """

    predicate: int
    branches: int


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """What a device runs as a whole: an `Equation`, or a `Choice`.

    Attributes:
        reads: its inputs, and the predicates of its guards.
        makes: its results.
        guards: the conditionals that it stands in, the outermost first.
    """

    reads: tuple[int, ...]
    makes: tuple[int, ...]
    guards: tuple[Guard, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Equation(Operation):
    """An equation of the trace.

    Attributes:
        node: the equation, between values of the `UpdateGraph`.
    """

    node: Node


@dataclasses.dataclass(frozen=True, eq=False)
class Choice(Operation):
    """One output of a conditional: the value of the branch that is taken.

    Attributes:
        conditional: the conditional; its guards are those around it.
        options: the value that each branch has for this output.
    """

    conditional: int
    options: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class UpdateGraph:
    """A function of flat arrays as operations in order; those of a conditional are
    together.

    Attributes:
        inputs, outputs: the numbers of these values.
        constants: the values known when tracing.
        avals: shape and dtype of each value.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    operations: tuple[Operation, ...]
    constants: Mapping[int, Any]
    avals: Mapping[int, Any]
    conditionals: tuple[Conditional, ...]

    def select(
        self,
        wanted: Iterable[int],
        available: Set[int],
        required: Set[int] = frozenset(),
    ) -> tuple[tuple[Operation, ...], list[int]]:
        """The operations that make some values from others, and the others they read.

        Arguments:
            wanted: the values to make.
            available: the values to start from.
            required: the positions of operations that run in any case.
        """
        # Backward, from what is wanted. What is available stops the search: a norm that
        # was moved here is not computed here again.
        needed = set(wanted)
        chosen = list[Operation]()
        for position in reversed(range(len(self.operations))):
            operation = self.operations[position]
            useful = any(v in needed and v not in available for v in operation.makes)
            if useful or position in required:
                chosen.append(operation)
                needed.update(operation.reads)
        return tuple(reversed(chosen)), sorted(needed & available)


def trace_update_graph(
    f: Callable[..., Sequence[Any]], arrays: Sequence[Any]
) -> UpdateGraph:
    """Trace a function of flat arrays, without the operations that nothing needs."""
    return open_trace(trace_flat(f, arrays))


def trace_flat(f: Callable[..., Sequence[Any]], arrays: Sequence[Any]) -> Any:
    """A function of flat arrays, or of their shapes, as a closed jaxpr."""
    # Without a mesh: parts of the graph run inside of a `shard_map`, others outside.
    with no_mesh():
        return trace(f, *map(aval, arrays))


def open_trace(traced: Any) -> UpdateGraph:
    """A closed jaxpr as operations, without those that nothing needs."""
    opener = _Opener()
    # Nothing differentiates an update, so what has derivatives of its own, such as
    # `jax.nn.relu`, is opened like any other call.
    graph = inline(traced, keep_rules=False)
    inputs = [opener.new_value(graph.avals[v]) for v in graph.inputs]
    outputs = opener.add(graph, inputs, ())
    return UpdateGraph(
        tuple(inputs),
        tuple(outputs),
        live_operations(opener.operations, outputs),
        opener.constants,
        opener.avals,
        tuple(opener.conditionals),
    )


class _Opener:
    """Collects the operations of a trace and of the branches in it.

    All values get numbers of one kind: those of a branch's inputs are the numbers of
    the conditional's operands.
    """

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.constants: dict[int, Any] = {}
        self.avals: dict[int, Any] = {}
        self.conditionals: list[Conditional] = []

    def new_value(self, aval: Any) -> int:
        self.avals[len(self.avals)] = aval
        return len(self.avals) - 1

    def add(
        self, graph: Graph, inputs: Sequence[int], guards: tuple[Guard, ...]
    ) -> list[int]:
        """Add the operations of a graph that reads `inputs`; return its outputs."""
        # Numbers of a trace begin at 0 in each branch; here all values have numbers of
        # their own, except that a branch's inputs are the operands of the conditional.
        number = dict(zip(graph.inputs, inputs, strict=True))
        for value, shape in graph.avals.items():
            if value not in number:
                number[value] = self.new_value(shape)
        for value, constant in graph.consts.items():
            self.constants[number[value]] = constant
        # A guarded operation reads the predicates too: whoever runs it has to know
        # whether the branch is taken.
        predicates = [self.conditionals[g.conditional].predicate for g in guards]
        for node in graph.nodes:
            reads = tuple(number[v] for v in node.ins)
            makes = tuple(number[v] for v in node.outs)
            if node.eqn.primitive.name != "cond":
                renumbered = dataclasses.replace(node, ins=reads, outs=makes)
                self.operations.append(
                    Equation((*reads, *predicates), makes, guards, renumbered)
                )
                continue
            # A `cond`: the operations of its branches in turn, each under one guard
            # more, and then a choice for each result. `switch` is a `cond` with more
            # branches.
            conditional = len(self.conditionals)
            branches = [
                inline(branch, keep_rules=False)
                for branch in node.eqn.params["branches"]
            ]
            predicate, *operands = reads
            self.conditionals.append(Conditional(predicate, len(branches)))
            results = [
                self.add(branch, operands, (*guards, Guard(conditional, k)))
                for k, branch in enumerate(branches)
            ]
            for result, *options in zip(makes, *results, strict=True):
                read = (predicate, *options, *predicates)
                self.operations.append(
                    Choice(read, (result,), guards, conditional, tuple(options))
                )
        return [number[v] for v in graph.outputs]


def live_operations(
    operations: Sequence[Operation], outputs: Iterable[int]
) -> tuple[Operation, ...]:
    """The operations that some values need, and those with effects."""
    # A conditional was one equation, and JAX kept all its results if any was read. Now
    # that it is opened, the operations of unread results are dead. Effects
    # (`jax.debug.print`) stay.
    needed = set(outputs)
    live = list[Operation]()
    for operation in reversed(operations):
        acts = isinstance(operation, Equation) and operation.node.eqn.effects
        if acts or not needed.isdisjoint(operation.makes):
            live.append(operation)
            needed.update(operation.reads)
    return tuple(reversed(live))


def run_operations(
    graph: UpdateGraph,
    operations: Iterable[Operation],
    given: Mapping[int, Any],
    wanted: Sequence[int],
) -> list[Any]:
    """Run some of the operations, in order, and return the wanted values as arrays.

    What a branch makes that is not taken is zero.
    """
    values = {**graph.constants, **given}
    _run(graph, operations, values, frozenset(wanted), 0)
    # A constant is in numpy here, or a Python number. Programs return arrays, of the
    # dtype that the trace promised.
    return [
        values[v]
        if isinstance(values[v], jax.Array)
        else jnp.asarray(values[v], graph.avals[v].dtype)
        for v in wanted
    ]


def _run(
    graph: UpdateGraph,
    operations: Iterable[Operation],
    values: dict[int, Any],
    wanted: frozenset[int],
    depth: int,
) -> None:
    """Run operations that stand in `depth` conditionals, all in the same ones."""

    def inner_conditional(operation: Operation) -> int | None:
        if len(operation.guards) > depth:
            return operation.guards[depth].conditional
        return operation.conditional if isinstance(operation, Choice) else None

    # The operations of one conditional follow each other, and still do when some of
    # them are left out.
    for conditional, part in itertools.groupby(operations, key=inner_conditional):
        if conditional is not None:
            _run_conditional(graph, conditional, list(part), values, wanted, depth)
            continue
        for operation in part:
            assert isinstance(operation, Equation)
            results = bind(operation.node, [values[v] for v in operation.node.ins])
            values.update(zip(operation.makes, results, strict=True))


def _run_conditional(
    graph: UpdateGraph,
    conditional: int,
    operations: Sequence[Operation],
    values: dict[int, Any],
    wanted: frozenset[int],
    depth: int,
) -> None:
    """Run a part of a conditional as a conditional.

    It gives its choices, and those values of its branches that are wanted outside:
    another device may make the choice, or run the rest of the branch.
    """
    # Three things: the operations of each branch, the choices of this conditional, and
    # which branch makes each value that is read from outside.
    inside: dict[int, list[Operation]] = {}
    for operation in operations:
        if len(operation.guards) > depth:
            inside.setdefault(operation.guards[depth].branch, []).append(operation)
    choices = [
        operation
        for operation in operations
        if isinstance(operation, Choice) and len(operation.guards) == depth
    ]
    branch_of_export = {
        v: branch
        for branch, own in inside.items()
        for operation in own
        for v in operation.makes
        if v in wanted
    }

    def run_branch(branch: int) -> list[Any]:
        here = dict(values)
        options = [choice.options[branch] for choice in choices]
        _run(graph, inside.get(branch, ()), here, wanted.union(options), depth + 1)
        # All branches have the same outputs: what another branch exports is zero here.
        # Nothing reads it, for what reads it is guarded by the other branch too.
        exports = [
            here[v] if made_in == branch else zeros(graph.avals[v])
            for v, made_in in branch_of_export.items()
        ]
        return [here[v] for v in options] + exports

    branches = [
        functools.partial(run_branch, branch)
        for branch in range(graph.conditionals[conditional].branches)
    ]
    # Branches close over `values`, so that `switch` has no operands to line up: JAX
    # finds what each branch reads.
    predicate = values[graph.conditionals[conditional].predicate]
    results = jax.lax.switch(predicate, branches)
    made = [v for choice in choices for v in choice.makes]
    values.update(zip([*made, *branch_of_export], results, strict=True))
