"""FLOPs and bytes of a part of a graph, as XLA's cost analysis counts them in the
lowered program.

Lowering needs no device and compiles nothing. XLA counts the body of a loop once, and
gives up on calls of Python, so those equations are taken out and counted by themselves:
a `scan` as often as it runs, a `cond` by its dearest branch, a `while` once (nobody
knows), a callback not at all.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import jax

from fpipe._program.code import Code
from fpipe._program.control_flow import bodies, calls_host, loops, rounds
from fpipe._program.graph import Graph, Node, evaluate

What: TypeAlias = Literal["flops", "bytes accessed"]


def count(code: Code, what: What) -> float:
    """What a program takes."""
    return _count(code.graph, code.nodes, (*code.outs, *code.sums), what)


def _count(
    graph: Graph, nodes: Sequence[Node], wanted: Iterable[int], what: What
) -> float:
    apart = [node for node in nodes if loops(node) or calls_host([node])]
    inside = [node for node in nodes if node not in apart]
    total = sum(_apart(node, what) for node in apart)
    made = {v for node in inside for v in node.outs}
    outs = [
        v
        for v in dict.fromkeys([*wanted, *(v for node in apart for v in node.ins)])
        if v in made
    ]
    if not outs:
        return total
    ins = sorted({v for node in inside for v in node.ins} - made - set(graph.consts))

    def call(*arrays: Any) -> list[Any]:
        return evaluate(graph, inside, dict(zip(ins, arrays, strict=True)), outs)

    shapes = [
        jax.ShapeDtypeStruct(graph.avals[v].shape, graph.avals[v].dtype) for v in ins
    ]
    return total + _lowered(call, shapes, what)


def _lowered(call: Any, shapes: Sequence[jax.ShapeDtypeStruct], what: What) -> float:
    """XLA's count; what it knows nothing of, a program that only returns constants for
    example, takes nothing.
    """
    lowered = jax.jit(call).lower(*shapes)
    found: Any = lowered.cost_analysis()
    if found is None:  # a backend that counts compiled programs only
        found = lowered.compile().cost_analysis()
    # Some backends give one count for each of several programs.
    counts = found if isinstance(found, (list, tuple)) else [found or {}]
    return max(0.0, sum(float(c.get(what, 0.0)) for c in counts))


def _apart(node: Node, what: What) -> float:
    parts = [_count(body, body.nodes, body.outputs, what) for body in bodies(node)]
    if not parts:
        return 0.0
    if node.eqn.primitive.name == "cond":
        return max(parts)
    return rounds(node) * sum(parts)
