"""A traced function as steps that can be cut anywhere: calls and conditionals are
opened.

A conditional would tie together what all devices do in it. Each of its equations
becomes a step with a *guard*: the conditional and the branch. A *choice* step for each
output takes it from the branch that was taken. A program with some of these steps runs
them in a conditional of its own, so that what is not taken is not computed.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from fpipe._core.pytrees import zeros
from fpipe._program.graph import Graph, inline

Guard = tuple[int, int]  # a conditional, and one of its branches

# Calls with rules for derivatives, which nothing asks for here.
_CUSTOM = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """An equation, or the choice of a conditional (`eqn` is `None`): `ins` are the
    index and the value of each branch.

    Attributes:
        guards: the conditionals around it, the outermost first.
        cond: the conditional whose choice it is.
    """

    eqn: Any
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    guards: tuple[Guard, ...] = ()
    cond: int | None = None

    def block(self, depth: int) -> int | None:
        """The conditional at this depth that the step is part of."""
        return self.guards[depth][0] if len(self.guards) > depth else self.cond


@dataclasses.dataclass(frozen=True)
class Steps:
    """A function as steps in order, between numbered values; those of one conditional
    follow each other.

    Attributes:
        consts: the values known when tracing.
        index: the value that says which branch of a conditional is taken.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    steps: tuple[Step, ...]
    consts: Mapping[int, Any]
    avals: Mapping[int, Any]
    index: Mapping[int, int]

    def needs(self, step: Step) -> tuple[int, ...]:
        """What a step takes, the indices of its conditionals included."""
        return (*step.ins, *(self.index[c] for c, _ in step.guards))


def opened(closed: Any) -> Steps:
    """A closed jaxpr as steps."""
    avals: dict[int, Any] = {}
    consts: dict[int, Any] = {}
    index: dict[int, int] = {}
    steps: list[Step] = []

    def visit(
        graph: Graph, given: Sequence[int] | None, guards: tuple[Guard, ...]
    ) -> tuple[list[int], list[int]]:
        """Add a graph's steps; `given` are the values that its inputs are, or `None`
        for new ones.
        """
        number: dict[int, int] = {}

        def of(v: int) -> int:
            if v not in number:
                number[v] = len(avals)
                avals[number[v]] = graph.avals[v]
                if v in graph.consts:
                    consts[number[v]] = graph.consts[v]
            return number[v]

        if given is not None:
            number.update(zip(graph.inputs, given, strict=True))
        for node in graph.nodes:
            ins, name = [of(v) for v in node.ins], node.eqn.primitive.name
            body = node.eqn.params.get(_CUSTOM.get(name, ""))
            if name == "cond":
                c = len(index)
                index[c] = ins[0]
                results = [
                    visit(inline(branch), ins[1:], (*guards, (c, b)))[1]
                    for b, branch in enumerate(node.eqn.params["branches"])
                ]
                for v, values in zip(
                    node.outs, zip(*results, strict=True), strict=True
                ):
                    steps.append(Step(None, (ins[0], *values), (of(v),), guards, c))
            elif body is not None:
                number.update(
                    zip(node.outs, visit(inline(body), ins, guards)[1], strict=True)
                )
            else:
                steps.append(
                    Step(node.eqn, tuple(ins), tuple(map(of, node.outs)), guards)
                )
        return [of(v) for v in graph.inputs], [of(v) for v in graph.outputs]

    inputs, outputs = visit(inline(closed), None, ())
    return Steps(
        tuple(inputs),
        tuple(outputs),
        _live(steps, outputs, index),
        consts,
        avals,
        index,
    )


def _live(
    steps: Sequence[Step], outputs: Iterable[int], index: Mapping[int, int]
) -> tuple[Step, ...]:
    """Without the steps that nothing needs."""
    needed, kept = set(outputs), list[Step]()
    for step in reversed(steps):
        if (step.eqn is not None and step.eqn.effects) or not needed.isdisjoint(
            step.outs
        ):
            kept.append(step)
            needed.update(step.ins)
            needed.update(index[c] for c, _ in step.guards)
    return tuple(kept[::-1])


def evaluate(
    graph: Steps, steps: Sequence[Step], given: Mapping[int, Any], wanted: Sequence[int]
) -> list[Any]:
    """Run some of the steps, in order; what a conditional did not compute is zero."""
    env = {**graph.consts, **given}
    _run(graph, steps, env, frozenset(wanted), 0)
    return [env[v] for v in wanted]


def _run(
    graph: Steps,
    steps: Sequence[Step],
    env: dict[int, Any],
    wanted: frozenset[int],
    depth: int,
) -> None:
    n = 0
    while n < len(steps):
        c = steps[n].block(depth)
        if c is None:
            eqn = steps[n].eqn
            with eqn.ctx.manager:
                result = eqn.primitive.bind(
                    *(env[v] for v in steps[n].ins),
                    **eqn.primitive.get_bind_params(eqn.params),
                )
            env.update(
                zip(
                    steps[n].outs,
                    result if eqn.primitive.multiple_results else (result,),
                    strict=True,
                )
            )
            n += 1
            continue
        end = n
        while end < len(steps) and steps[end].block(depth) == c:
            end += 1
        _branch(graph, c, steps[n:end], env, wanted, depth)
        n = end


def _branch(
    graph: Steps,
    c: int,
    steps: Sequence[Step],
    env: dict[int, Any],
    wanted: frozenset[int],
    depth: int,
) -> None:
    """A part of a conditional, as a conditional."""
    choices = [s for s in steps if len(s.guards) == depth]
    inner: dict[int, list[Step]] = {}
    for s in steps:
        if len(s.guards) > depth:
            inner.setdefault(s.guards[depth][1], []).append(s)
    owner = {
        v: b for b, own in inner.items() for s in own for v in s.outs if v in wanted
    }
    count = 1 + max([len(s.ins) - 2 for s in choices] + list(inner))

    def run(b: int) -> list[Any]:
        own = dict(env)
        chosen = [s.ins[1 + b] for s in choices]
        _run(graph, inner.get(b, ()), own, wanted | set(chosen), depth + 1)
        return [own[v] for v in chosen] + [
            own[v] if owner[v] == b else zeros(graph.avals[v]) for v in owner
        ]

    # Where only the first branches have steps here, the others have nothing to give.
    branches = [
        *(lambda b=b: run(b) for b in range(count)),
        *([] if choices else [lambda: run(count)]),
    ]
    made = jax.lax.switch(env[graph.index[c]], branches)
    env.update(zip([s.outs[0] for s in choices] + list(owner), made, strict=True))
