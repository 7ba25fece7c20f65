"""A forward and its backward as one graph, cut in two; a backward, cut into `I` and
`W`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import jax

from fpipe._program.control_flow import (
    bodies_of,
    recomputation,
    value_bytes,
    value_size,
)
from fpipe._program.graph import Graph, Node, is_late, needed, trace
from fpipe._program.min_cut import cheapest

# Equations that are redone in the backward instead of keeping their result, if their
# operand is no larger.
_CHEAP = {
    "broadcast_in_dim",
    "reshape",
    "squeeze",
    "expand_dims",
    "transpose",
    "convert_element_type",
    "copy",
    "rev",
    "optimization_barrier",
}


# Equations that are redone in the backward where that keeps fewer bytes: changes of
# form, and what works number by number, for that is bound by memory (a tanh takes less
# time than writing and reading its result). Sums and products are not.
_AGAIN = _CHEAP | {
    *(
        "abs",
        "add",
        "add_any",
        "and",
        "ceil",
        "clamp",
        "div",
        "eq",
        "floor",
        "ge",
        "gt",
        "imag",
        "integer_pow",
        "iota",
    ),
    *(
        "is_finite",
        "le",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "not",
        "or",
        "real",
        "rem",
        "round",
        "select_n",
        "sign",
    ),
    *("slice", "square", "stop_gradient", "sub", "xor"),
    *(
        "cbrt",
        "cos",
        "erf",
        "exp",
        "exp2",
        "expm1",
        "log",
        "log1p",
        "logistic",
        "pow",
        "rsqrt",
        "sin",
        "sqrt",
        "tan",
        "tanh",
    ),
}


def residuals(
    graph: Graph, wanted: Sequence[int], late: Set[int], micro: Mapping[int, int]
) -> tuple[list[Node], list[int]]:
    """Cut a joint forward and backward in two.

    Arguments:
        wanted: the gradients.
        late: `late_values`: they are made in the backward.
        micro: values that depend on the microbatch.

    Returns:
        The backward's equations, and the values that it takes from outside: inputs of
        the graph, or values that the forward must hand over. Handed over is only what
        depends on the microbatch, and of that the fewest bytes from which all else is
        cheap to make again (`_AGAIN`). What is made from parameters alone is made
        again; an equation with effects runs once. Effects that are late are the
        backward's.
    """
    maker = graph.maker
    effects = [n for n in graph.nodes if n.eqn.effects and is_late(n, late)]
    first = [*wanted, *(v for node in effects for v in node.ins)]

    def early(v: int) -> bool:
        return v not in late and bool(micro.get(v)) and v not in graph.consts

    ends = {
        v for node in needed(graph, first) if is_late(node, late) for v in node.ins
    } | set(first)
    again = {
        v: [u for u in node.ins if early(u)]
        for node in graph.nodes
        if node.eqn.primitive.name in _AGAIN and not node.eqn.effects
        for v in node.outs
        if early(v)
    }
    costs = {v: max(1, value_bytes(graph.avals[v])) for v in micro if early(v)}
    keep = cheapest(costs, again, [v for v in sorted(ends) if early(v)])
    take: dict[int, None] = {}
    inside: set[int] = set()  # values made inside the backward
    stack = first
    while stack:
        v = stack.pop()
        if v in inside or v in take or v in graph.consts:
            continue
        node = maker.get(v)
        if node is not None and v not in keep and (v in late or not node.eqn.effects):
            inside.update(node.outs)
            stack.extend(node.ins)
        else:
            take[v] = None
    kept = set(map(id, effects))
    nodes = [n for n in graph.nodes if id(n) in kept or not inside.isdisjoint(n.outs)]
    return nodes, sorted(take)


def halves(
    graph: Graph,
    nodes: Sequence[Node],
    first: Sequence[int],
    second: Sequence[int],
    given: Mapping[int, bool],
    micro: Mapping[int, int],
) -> tuple[list[Node], list[Node], list[int], list[int]]:
    """Cut a backward in two, so that nothing is computed twice: `I` makes `first`, `W`
    makes `second` from what is left.

    Arguments:
        nodes: the backward's equations, as `residuals` gives them.
        first, second: gradients of the inputs, and of the weights.
        given: what the backward takes from outside; whether `W` can take it from there
            too.
        micro: values that depend on the microbatch, its cotangents included.

    Returns:
        The equations of both; the values that `I` hands to `W`; and those of `second`
        that `I` makes all the same, for an equation gives both (a `scan`, a custom
        call). Effects are `I`'s.
    """
    part = dataclasses.replace(graph, nodes=tuple(nodes))
    maker = part.maker

    def halve(
        also: Sequence[int],
    ) -> tuple[list[Node], Callable[[Iterable[int]], tuple[set[int], list[int]]]]:
        early = needed(part, [*first, *also], given, effects=lambda node: True)
        made = {v for node in early for v in node.outs}
        used = {v for node in early for v in node.ins} | set(first) | set(also)

        def rest(wanted: Iterable[int]) -> tuple[set[int], list[int]]:
            """What `W` makes for `wanted`, and what it is handed."""
            handed: dict[int, None] = {}
            inside: set[int] = set()
            stack = list(wanted)
            while stack:
                v = stack.pop()
                if (
                    v in inside
                    or v in handed
                    or v in graph.consts
                    or (v in given and (given[v] or v not in used))
                ):
                    continue
                node = maker.get(v)
                if node is None or (
                    v in made
                    and (node.eqn.effects or (micro.get(v) and not _redo(graph, node)))
                ):
                    handed[v] = None
                else:
                    inside.update(node.outs)
                    stack.extend(node.ins)
            return inside, sorted(handed)

        return early, rest

    early, rest = halve([])
    # A gradient that is such an equation's result, or as large a value made from it:
    # `I` makes it, lest an array of the weights' size wait for `W` for each microbatch.
    several = {
        v
        for node in early
        if len(node.outs) > 1 and _is_opaque(node.eqn)
        for v in node.outs
    }
    sizes = {v: value_size(graph.avals[v]) for v in (*second, *several)}
    both = [
        v
        for v in second
        if several and any(h in several and sizes[h] == sizes[v] for h in rest([v])[1])
    ]
    if both:
        early, rest = halve(both)
    inside, handed = rest(v for v in second if v not in both)
    return early, [n for n in nodes if not inside.isdisjoint(n.outs)], handed, both


def _is_opaque(eqn: Any) -> bool:
    """Whether an equation is more than one operation: control flow, or a call of
    something foreign.
    """
    return "call" in eqn.primitive.name or any(
        True for _ in bodies_of(eqn.params.values())
    )


def opened(graph: Graph, cotangents: Iterable[int]) -> tuple[Graph, dict[int, int]]:
    """A graph with the recomputations in it inlined, so that they can be sliced.

    A `jax.checkpoint` of the backward is one equation: recomputation and backward
    together. Its inputs go through barriers, so that XLA does not find the
    recomputation equal to the forward of another. A `jax.checkpoint` that depends on no
    cotangent is of the forward, and stays.

    Returns:
        The graph, and what its values are called that have another number now.
    """
    late, new = set(cotangents), dict[int, int]()
    avals, consts = dict(graph.avals), dict(graph.consts)
    nodes: list[Node] = []

    def visit(node: Node) -> None:
        ins = tuple(new.get(v, v) for v in node.ins)
        body = recomputation(node.eqn) if not late.isdisjoint(ins) else None
        if body is None:
            nodes.append(dataclasses.replace(node, ins=ins))
            if not late.isdisjoint(ins):
                late.update(node.outs)
            return
        base = max(avals) + 1
        avals.update({base + v: aval for v, aval in body.avals.items()})
        consts.update({base + v: value for v, value in body.consts.items()})
        for v, outer in zip(body.inputs, ins, strict=True):
            visit(Node(_barrier(avals[outer]), (outer,), (base + v,), again=True))
        for n in body.nodes:
            visit(
                Node(
                    n.eqn,
                    tuple(base + v for v in n.ins),
                    tuple(base + v for v in n.outs),
                    again=True,
                )
            )
        for v, outer in zip(body.outputs, node.outs, strict=True):
            new[outer] = new.get(base + v, base + v)
            late.add(new[outer])

    for node in graph.nodes:
        visit(node)
    outputs = tuple(new.get(v, v) for v in graph.outputs)
    return Graph(graph.inputs, outputs, tuple(nodes), consts, avals), new


def _barrier(aval: Any) -> Any:
    closed = trace(
        lambda a: [jax.lax.optimization_barrier(a)],
        jax.ShapeDtypeStruct(aval.shape, aval.dtype),
    )
    (eqn,) = getattr(closed, "jaxpr", closed).eqns
    return eqn


def _redo(graph: Graph, node: Node) -> bool:
    if node.eqn.primitive.name not in _CHEAP:
        return False
    ins, outs = (
        sum(value_bytes(graph.avals[v]) for v in values)
        for values in (node.ins, node.outs)
    )
    return ins <= outs
