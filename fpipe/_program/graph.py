"""A traced function as a flat graph of equations: sliced, and run in parts.

Jaxprs are only read here (through `jax.make_jaxpr` and `jax.extend.core`), never
constructed: a part of a graph is run by binding its equations one after the other under
a new trace.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal, jaxpr_as_fun

# Calls that are inlined, so that what is inside can be sliced. A `jax.checkpoint` is
# not: XLA keeps its recomputation only while it stays one equation.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
}

# Calls with their own rules for derivatives. Inlined only where nothing will be
# differentiated any more, because the rules are lost.
_CALLS_WITH_RULES = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


@dataclasses.dataclass(frozen=True)
class Node:
    """One equation between numbered values; `again` if it recomputes what the forward
    has computed.
    """

    eqn: Any
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    again: bool = False


@dataclasses.dataclass(frozen=True)
class Graph:
    """A function as equations in order. Values are numbers; `consts` has those known
    when tracing.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    nodes: tuple[Node, ...]
    consts: Mapping[int, Any]
    avals: Mapping[int, Any]

    @property
    def maker(self) -> dict[int, Node]:
        """The equation that makes each value."""
        return {v: node for node in self.nodes for v in node.outs}


def trace(f: Callable[..., Sequence[Any]], *shapes: jax.ShapeDtypeStruct) -> Any:
    """Trace a function of flat arrays into a closed jaxpr."""
    return jax.make_jaxpr(f)(*shapes)


def function(closed: Any) -> Callable[..., list[Any]]:
    """A closed jaxpr as a function again: it can be differentiated without calling the
    original once more.
    """
    return jaxpr_as_fun(closed)


def inline(closed: Any, keep_rules: bool = True) -> Graph:
    """A closed jaxpr as a `Graph`, nested calls inlined.

    Arguments:
        keep_rules: whether functions with their own derivatives (`jax.custom_jvp`,
            `jax.custom_vjp`) stay one equation, so that they can be differentiated.
    """
    calls = _CALLS if keep_rules else _CALLS | _CALLS_WITH_RULES
    jaxpr, values = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
    nodes: list[Node] = []
    consts: dict[int, Any] = {}
    avals: dict[int, Any] = {}

    def new(aval: Any) -> int:
        avals[len(avals)] = aval
        return len(avals) - 1

    def constant(value: Any, aval: Any) -> int:
        number = new(aval)
        consts[number] = value
        return number

    def visit(jaxpr: Any, args: Sequence[int], known: Sequence[Any]) -> list[int]:
        env = dict(zip(jaxpr.invars, args, strict=True))
        for var, value in zip(jaxpr.constvars, known, strict=True):
            env[var] = constant(value, var.aval)

        def read(atom: Any) -> int:
            return (
                constant(atom.val, atom.aval)
                if isinstance(atom, Literal)
                else env[atom]
            )

        for eqn in jaxpr.eqns:
            ins = [read(v) for v in eqn.invars]
            inner = eqn.params.get(calls.get(eqn.primitive.name, ""))
            if inner is not None:
                outs = visit(
                    getattr(inner, "jaxpr", inner), ins, getattr(inner, "consts", ())
                )
            else:
                outs = [new(v.aval) for v in eqn.outvars]
                nodes.append(Node(eqn, tuple(ins), tuple(outs)))
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    inputs = tuple(new(v.aval) for v in jaxpr.invars)
    outputs = tuple(visit(jaxpr, inputs, values))
    return Graph(inputs, outputs, tuple(nodes), consts, avals)


def masks(graph: Graph, seeds: Mapping[int, int]) -> dict[int, int]:
    """For each value the union of the bit masks of the seeds that it depends on."""
    mask = dict(seeds)
    for node in graph.nodes:
        union = 0
        for v in node.ins:
            union |= mask.get(v, 0)
        if union:
            for v in node.outs:
                mask[v] = mask.get(v, 0) | union
    return mask


def late_values(graph: Graph, cotangents: Iterable[int]) -> set[int]:
    """The values that only a backward has: they depend on a cotangent, or are
    recomputed.
    """
    late = set(cotangents)
    for node in graph.nodes:
        if is_late(node, late):
            late.update(node.outs)
    return late


def is_late(node: Node, late: Set[int]) -> bool:
    """Whether an equation belongs to the backward."""
    return node.again or not late.isdisjoint(node.ins)


def needed(
    graph: Graph,
    wanted: Iterable[int],
    given: Iterable[int] = (),
    effects: Callable[[Node], bool] | None = None,
) -> list[Node]:
    """The equations, in order, that make `wanted` from `given`; with `effects`, those
    it accepts too.
    """
    live, have, out = set(wanted), set(given), list[Node]()
    for node in reversed(graph.nodes):
        useful = any(v in live and v not in have for v in node.outs)
        if useful or (effects is not None and node.eqn.effects and effects(node)):
            out.append(node)
            live.update(node.ins)
    return out[::-1]


def bind(node: Node, inputs: Sequence[Any]) -> Sequence[Any]:
    """Run one equation, or trace it again where an input is traced."""
    eqn = node.eqn
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        result = eqn.primitive.bind(*inputs, **params)
    return result if eqn.primitive.multiple_results else (result,)


def evaluate(
    graph: Graph, nodes: Iterable[Node], given: Mapping[int, Any], wanted: Iterable[int]
) -> list[Any]:
    """Bind equations one after the other and return the wanted values."""
    env = dict(graph.consts)
    env.update(given)
    for node in nodes:
        outputs = bind(node, [env[v] for v in node.ins])
        env.update(zip(node.outs, outputs, strict=True))
    return [env[v] for v in wanted]


def is_zero(graph: Graph, value: int) -> bool:
    """Whether a value is zero by its making: how a vector-Jacobian product says "no
    gradient".
    """
    maker = graph.maker
    while value in maker and maker[value].eqn.primitive.name in (
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
    ):
        value = maker[value].ins[0]
    const = graph.consts.get(value)
    return const is not None and np.ndim(const) == 0 and not np.any(np.asarray(const))
