"""A traced update as a flat list of steps, its conditionals opened.

In comes what JAX traced of an update, out goes an `UpdateGraph`: numbered values, and
the steps between them in order. An update that is skipped when a gradient is not
finite, `cond(finite, [keep, adam], gradient, moment)`, for example, is

    | step                      | reads   | makes | guards              |
    |---------------------------|---------|-------|---------------------|
    | finite = is_finite(g)     | 0       | 2     |                     |
    | new = multiply(g, 0.1)    | 0, 2    | 3     | (conditional 0, 1)  |
    | choice: m or new          | 2, 1, 3 | 4     |                     |

A conditional left whole would be one step that reads arrays of all devices, and all of
them would have to move to one device. Opened, each equation can run on a device of its
own. The *guards* of an equation say which conditionals it stood in. `run_steps` puts
whatever part of a conditional it is given into a conditional again, so that the branch
that is not taken costs nothing.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

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
class Equation:
    """An equation of the trace.

    Attributes:
        node: the equation, between values of the `UpdateGraph`.
        guards: the conditionals that it stands in, the outermost first.
        reads: its inputs, and the predicates of its guards.
    """

    node: Node
    guards: tuple[Guard, ...]
    reads: tuple[int, ...]

    @property
    def makes(self) -> tuple[int, ...]:
        """Its results."""
        return self.node.outs

    def conditional_at(self, depth: int) -> int | None:
        """The conditional that it is part of, inside of `depth` others."""
        return self.guards[depth].conditional if len(self.guards) > depth else None


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """One output of a conditional: the value of the branch that is taken.

    Attributes:
        conditional: the conditional.
        options: the value that each branch has for this output.
        result: the value that is chosen.
        guards: the other conditionals that this one stands in, the outermost first.
        reads: the predicate, the options, and the predicates of the guards.
    """

    conditional: int
    options: tuple[int, ...]
    result: int
    guards: tuple[Guard, ...]
    reads: tuple[int, ...]

    @property
    def makes(self) -> tuple[int, ...]:
        """Its result."""
        return (self.result,)

    def conditional_at(self, depth: int) -> int | None:
        """The conditional that it is part of, inside of `depth` others."""
        if len(self.guards) > depth:
            return self.guards[depth].conditional
        return self.conditional


Step: TypeAlias = Equation | Choice


@dataclasses.dataclass(frozen=True)
class UpdateGraph:
    """A function of flat arrays as steps in order; those of a conditional are together.

    Attributes:
        inputs, outputs: the numbers of these values.
        constants: the values known when tracing.
        avals: shape and dtype of each value.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    steps: tuple[Step, ...]
    constants: Mapping[int, Any]
    avals: Mapping[int, Any]
    conditionals: tuple[Conditional, ...]

    def select(
        self,
        wanted: Iterable[int],
        available: Set[int],
        required: Set[int] = frozenset(),
    ) -> tuple[tuple[Step, ...], list[int]]:
        """The steps that make some values from others, and which others they read.

        Arguments:
            wanted: the values to make.
            available: the values to start from.
            required: the positions of steps that run in any case.
        """
        needed = set(wanted)
        chosen = list[Step]()
        for position in reversed(range(len(self.steps))):
            step = self.steps[position]
            useful = any(v in needed and v not in available for v in step.makes)
            if useful or position in required:
                chosen.append(step)
                needed.update(step.reads)
        return tuple(reversed(chosen)), sorted(needed & available)


def trace_update_graph(
    f: Callable[..., Sequence[Any]], arrays: Sequence[Any]
) -> UpdateGraph:
    """Trace a function of flat arrays, without the steps that nothing needs."""
    opener = _Opener()
    graph = inline(trace(f, *map(aval, arrays)), keep_rules=False)
    inputs = [opener.new_value(graph.avals[v]) for v in graph.inputs]
    outputs = opener.add(graph, inputs, ())
    return UpdateGraph(
        tuple(inputs),
        tuple(outputs),
        _without_dead_steps(opener.steps, outputs),
        opener.constants,
        opener.avals,
        tuple(opener.conditionals),
    )


class _Opener:
    """Collects the steps of a trace and of the branches in it, under one numbering."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.constants: dict[int, Any] = {}
        self.avals: dict[int, Any] = {}
        self.conditionals: list[Conditional] = []

    def new_value(self, aval: Any) -> int:
        self.avals[len(self.avals)] = aval
        return len(self.avals) - 1

    def add(
        self, graph: Graph, inputs: Sequence[int], guards: tuple[Guard, ...]
    ) -> list[int]:
        """Add the steps of a graph that reads `inputs`; its outputs are returned."""
        number = dict(zip(graph.inputs, inputs, strict=True))
        for value, shape in graph.avals.items():
            if value not in number:
                number[value] = self.new_value(shape)
        for value, constant in graph.consts.items():
            self.constants[number[value]] = constant
        predicates = [self.conditionals[g.conditional].predicate for g in guards]
        for node in graph.nodes:
            reads = tuple(number[v] for v in node.ins)
            makes = tuple(number[v] for v in node.outs)
            if node.eqn.primitive.name == "cond":
                self._open(node, reads, makes, guards)
            else:
                renumbered = dataclasses.replace(node, ins=reads, outs=makes)
                self.steps.append(Equation(renumbered, guards, (*reads, *predicates)))
        return [number[v] for v in graph.outputs]

    def _open(
        self,
        node: Node,
        reads: Sequence[int],
        makes: Sequence[int],
        guards: tuple[Guard, ...],
    ) -> None:
        """Add the branches of a `cond`, and a choice for each of its outputs."""
        predicate, *operands = reads
        branches = node.eqn.params["branches"]
        conditional = len(self.conditionals)
        self.conditionals.append(Conditional(predicate, len(branches)))
        results = []
        for k, branch in enumerate(branches):
            inside = (*guards, Guard(conditional, k))
            results.append(self.add(inline(branch, keep_rules=False), operands, inside))
        predicates = [self.conditionals[g.conditional].predicate for g in guards]
        for result, *options in zip(makes, *results, strict=True):
            read = (predicate, *options, *predicates)
            self.steps.append(Choice(conditional, tuple(options), result, guards, read))


def _without_dead_steps(
    steps: Sequence[Step], outputs: Iterable[int]
) -> tuple[Step, ...]:
    needed = set(outputs)
    live = list[Step]()
    for step in reversed(steps):
        acts = isinstance(step, Equation) and step.node.eqn.effects
        if acts or not needed.isdisjoint(step.makes):
            live.append(step)
            needed.update(step.reads)
    return tuple(reversed(live))


def run_steps(
    graph: UpdateGraph,
    steps: Iterable[Step],
    given: Mapping[int, Any],
    wanted: Sequence[int],
) -> list[Any]:
    """Run some of the steps, in order, and return the wanted values as arrays.

    What a branch makes that is not taken is zero.
    """
    values = {**graph.constants, **given}
    _run(graph, steps, values, frozenset(wanted), 0)
    return [
        values[v]
        if isinstance(values[v], jax.Array)
        else jnp.asarray(values[v], graph.avals[v].dtype)
        for v in wanted
    ]


def _run(
    graph: UpdateGraph,
    steps: Iterable[Step],
    values: dict[int, Any],
    wanted: frozenset[int],
    depth: int,
) -> None:
    """Run steps that stand in `depth` conditionals, all the same."""
    parts = itertools.groupby(steps, key=lambda step: step.conditional_at(depth))
    for conditional, part in parts:
        if conditional is not None:
            _run_conditional(graph, conditional, list(part), values, wanted, depth)
            continue
        for step in part:
            assert isinstance(step, Equation)
            results = bind(step.node, [values[v] for v in step.node.ins])
            values.update(zip(step.node.outs, results, strict=True))


def _run_conditional(
    graph: UpdateGraph,
    conditional: int,
    steps: Sequence[Step],
    values: dict[int, Any],
    wanted: frozenset[int],
    depth: int,
) -> None:
    """Run a part of a conditional as a conditional.

    It gives its choices, and those values of its branches that are wanted outside:
    another device may hold the choice, or the rest of the branch.
    """
    choices = list[Choice]()
    inside: dict[int, list[Step]] = {}
    for step in steps:
        if len(step.guards) > depth:
            inside.setdefault(step.guards[depth].branch, []).append(step)
        else:
            assert isinstance(step, Choice)
            choices.append(step)
    exported = {
        v: branch
        for branch, own in inside.items()
        for step in own
        for v in step.makes
        if v in wanted
    }

    def run_branch(branch: int) -> list[Any]:
        here = dict(values)
        options = [choice.options[branch] for choice in choices]
        _run(graph, inside.get(branch, ()), here, wanted.union(options), depth + 1)
        kept = [
            here[v] if made_in == branch else zeros(graph.avals[v])
            for v, made_in in exported.items()
        ]
        return [here[v] for v in options] + kept

    which = graph.conditionals[conditional]
    branches = [
        lambda branch=branch: run_branch(branch) for branch in range(which.branches)
    ]
    results = jax.lax.switch(values[which.predicate], branches)
    names = [choice.result for choice in choices] + list(exported)
    values.update(zip(names, results, strict=True))
