"""What depends on what: a traced function as a flat graph of equations, sliced and run in parts.

Jaxprs are only read here (through `jax.make_jaxpr` and `jax.extend.core`), never constructed: a part
of a graph is run by binding its equations one after the other under a new trace.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from fpipe._mincut import cheapest

# Calls that are inlined, so that what is inside can be sliced. A `jax.checkpoint` is not: XLA keeps
# its recomputation only while it stays one equation.
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}

# Equations that are redone in the backward instead of keeping their result, if their operand is no larger.
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

# Equations that are redone in the backward where that keeps fewer bytes: changes of form, and what works number by number,
# for that is bound by memory (a tanh takes less time than writing and reading its result). Sums and products are not.
_AGAIN = _CHEAP | {
    *("abs", "add", "add_any", "and", "ceil", "clamp", "div", "eq", "floor", "ge", "gt", "imag", "integer_pow", "iota"),
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


@dataclasses.dataclass(frozen=True)
class Node:
    """One equation between numbered values; `again` if it recomputes what the forward has computed."""

    eqn: Any
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    again: bool = False


@dataclasses.dataclass(frozen=True)
class Graph:
    """A function as equations in order. Values are numbers; `consts` has those known when tracing."""

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
    """A closed jaxpr as a function again: it can be differentiated without calling the original once more."""
    return jaxpr_as_fun(closed)


def inline(closed: Any) -> Graph:
    """A closed jaxpr as a `Graph`, nested calls inlined."""
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
            return constant(atom.val, atom.aval) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            ins = [read(v) for v in eqn.invars]
            inner = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
            if inner is not None:
                outs = visit(getattr(inner, "jaxpr", inner), ins, getattr(inner, "consts", ()))
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
    """The values that only a backward has: they depend on a cotangent, or are recomputed."""
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
    """The equations, in order, that make `wanted` from `given`; with `effects`, those it accepts too."""
    live, have, out = set(wanted), set(given), list[Node]()
    for node in reversed(graph.nodes):
        useful = any(v in live and v not in have for v in node.outs)
        if useful or (effects is not None and node.eqn.effects and effects(node)):
            out.append(node)
            live.update(node.ins)
    return out[::-1]


def evaluate(graph: Graph, nodes: Iterable[Node], given: Mapping[int, Any], wanted: Iterable[int]) -> list[Any]:
    """Bind equations one after the other and return the wanted values."""
    env = dict(graph.consts)
    env.update(given)
    for node in nodes:
        eqn = node.eqn
        params = eqn.primitive.get_bind_params(eqn.params)
        with eqn.ctx.manager:
            result = eqn.primitive.bind(*(env[v] for v in node.ins), **params)
        env.update(zip(node.outs, result if eqn.primitive.multiple_results else (result,), strict=True))
    return [env[v] for v in wanted]


def is_zero(graph: Graph, value: int) -> bool:
    """Whether a value is zero by its making: how a vector-Jacobian product says "no gradient"."""
    maker = graph.maker
    while value in maker and maker[value].eqn.primitive.name in (
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
    ):
        value = maker[value].ins[0]
    const = graph.consts.get(value)
    return const is not None and np.ndim(const) == 0 and not np.any(np.asarray(const))


def residuals(
    graph: Graph, wanted: Sequence[int], late: Set[int], micro: Mapping[int, int]
) -> tuple[list[Node], list[int]]:
    """Cut a joint forward and backward in two.

    Arguments:
        wanted: the gradients.
        late: `late_values`: they are made in the backward.
        micro: values that depend on the microbatch.

    Returns:
        The backward's equations, and the values that it takes from outside: inputs of the graph, or values
        that the forward must hand over. Handed over is only what depends on the microbatch, and of that the fewest
        bytes from which all else is cheap to make again (`_AGAIN`). What is made from parameters alone is made again;
        an equation with effects runs once. Effects that are late are the backward's.
    """
    maker = graph.maker
    effects = [n for n in graph.nodes if n.eqn.effects and is_late(n, late)]
    first = [*wanted, *(v for node in effects for v in node.ins)]

    def early(v: int) -> bool:
        return v not in late and bool(micro.get(v)) and v not in graph.consts

    ends = {v for node in needed(graph, first) if is_late(node, late) for v in node.ins} | set(first)
    again = {
        v: [u for u in node.ins if early(u)]
        for node in graph.nodes
        if node.eqn.primitive.name in _AGAIN and not node.eqn.effects
        for v in node.outs
        if early(v)
    }
    costs = {v: max(1, _bytes(graph.avals[v])) for v in micro if early(v)}
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
    """Cut a backward in two, so that nothing is computed twice: `I` makes `first`, `W` makes `second` from what is left.

    Arguments:
        nodes: the backward's equations, as `residuals` gives them.
        first, second: gradients of the inputs, and of the weights.
        given: what the backward takes from outside; whether `W` can take it from there too.
        micro: values that depend on the microbatch, its cotangents included.

    Returns:
        The equations of both; the values that `I` hands to `W`; and those of `second` that `I` makes all the same, for
        an equation gives both (a `scan`, a custom call). Effects are `I`'s.
    """
    part = dataclasses.replace(graph, nodes=tuple(nodes))
    maker = part.maker

    def halve(also: Sequence[int]) -> tuple[list[Node], Callable[[Iterable[int]], tuple[set[int], list[int]]]]:
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
                if v in inside or v in handed or v in graph.consts or (v in given and (given[v] or v not in used)):
                    continue
                node = maker.get(v)
                if node is None or (v in made and (node.eqn.effects or (micro.get(v) and not _redo(graph, node)))):
                    handed[v] = None
                else:
                    inside.update(node.outs)
                    stack.extend(node.ins)
            return inside, sorted(handed)

        return early, rest

    early, rest = halve([])
    # A gradient that is such an equation's result, or as large a value made from it: `I` makes it, lest an array of the
    # weights' size wait for `W` for each microbatch.
    several = {v for node in early if len(node.outs) > 1 and _is_opaque(node.eqn) for v in node.outs}
    sizes = {v: _size(graph.avals[v]) for v in (*second, *several)}
    both = [v for v in second if several and any(h in several and sizes[h] == sizes[v] for h in rest([v])[1])]
    if both:
        early, rest = halve(both)
    inside, handed = rest(v for v in second if v not in both)
    return early, [n for n in nodes if not inside.isdisjoint(n.outs)], handed, both


def _is_opaque(eqn: Any) -> bool:
    """Whether an equation is more than one operation: control flow, or a call of something foreign."""
    return "call" in eqn.primitive.name or any(True for _ in _bodies(eqn.params.values()))


def _bodies(values: Iterable[Any]) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation."""
    for value in values:
        if isinstance(value, (Jaxpr, ClosedJaxpr)):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _bodies(value)


def _size(aval: Any) -> int:
    return int(np.prod(aval.shape, dtype=np.int64))


def opened(graph: Graph, cotangents: Iterable[int]) -> tuple[Graph, dict[int, int]]:
    """A graph with the recomputations in it inlined, so that they can be sliced.

    A `jax.checkpoint` of the backward is one equation: recomputation and backward together. Its inputs go through
    barriers, so that XLA does not find the recomputation equal to the forward of another. A `jax.checkpoint` that
    depends on no cotangent is of the forward, and stays.

    Returns:
        The graph, and what its values are called that have another number now.
    """
    late, new = set(cotangents), dict[int, int]()
    avals, consts = dict(graph.avals), dict(graph.consts)
    nodes: list[Node] = []

    def visit(node: Node) -> None:
        ins = tuple(new.get(v, v) for v in node.ins)
        body = _recomputation(node.eqn) if not late.isdisjoint(ins) else None
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
            visit(Node(n.eqn, tuple(base + v for v in n.ins), tuple(base + v for v in n.outs), again=True))
        for v, outer in zip(body.outputs, node.outs, strict=True):
            new[outer] = new.get(base + v, base + v)
            late.add(new[outer])

    for node in graph.nodes:
        visit(node)
    outputs = tuple(new.get(v, v) for v in graph.outputs)
    return Graph(graph.inputs, outputs, tuple(nodes), consts, avals), new


def _recomputation(eqn: Any) -> Graph | None:
    """The body of a `jax.checkpoint`, whatever this release calls it."""
    return inline(eqn.params["jaxpr"]) if {"jaxpr", "policy", "prevent_cse"} <= set(eqn.params) else None


def _barrier(aval: Any) -> Any:
    closed = trace(lambda a: [jax.lax.optimization_barrier(a)], jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    (eqn,) = getattr(closed, "jaxpr", closed).eqns
    return eqn


def _redo(graph: Graph, node: Node) -> bool:
    if node.eqn.primitive.name not in _CHEAP:
        return False
    ins, outs = (sum(_bytes(graph.avals[v]) for v in values) for values in (node.ins, node.outs))
    return ins <= outs


def _bytes(aval: Any) -> int:
    return _size(aval) * getattr(aval.dtype, "itemsize", 8)


def sources(graph: Graph, seeds: Mapping[int, int]) -> dict[int, int]:
    """`masks`, seen through control flow: what a value's *content* depends on, which branch was taken aside."""
    mask = dict(seeds)
    for node in graph.nodes:
        ins = [mask.get(v, 0) for v in node.ins]
        mask.update(zip(node.outs, _through(node.eqn, ins, len(node.outs)), strict=True))
    return mask


def _through(eqn: Any, ins: Sequence[int], outs: int) -> list[int]:
    """The masks of an equation's outputs from those of its inputs."""
    p = eqn.params
    if eqn.primitive.name == "cond":
        branches = [_body(inline(branch), ins[1:]) for branch in p["branches"]]
        return [functools.reduce(operator.or_, column) for column in zip(*branches, strict=True)]
    if eqn.primitive.name == "scan":
        # Told from the shapes, for the names of a scan's parameters are not stable: what is scanned over, or stacked,
        # has one axis more outside than inside.
        body = inline(p["jaxpr"])
        ndim = [body.avals[v].ndim for v in (*body.inputs, *body.outputs)]
        same = [v.aval.ndim == n for v, n in zip((*eqn.invars, *eqn.outvars), ndim, strict=True)]
        xs, carry = len(ins) - sum(same[: len(ins)]), sum(same[len(ins) :])
        consts = len(ins) - xs - carry
        return _loop(body, ins[:consts], ins[consts : consts + carry], ins[consts + carry :])
    if eqn.primitive.name == "while":
        body = inline(p["body_jaxpr"])
        carry, consts = (
            len(ins) - outs,
            len(body.inputs) - outs,
        )  # where the carry begins; the condition's consts are first
        return _loop(body, ins[carry - consts : carry], ins[carry:], [])
    body = _recomputation(eqn)
    if body is not None:
        return _body(body, ins)
    return [functools.reduce(operator.or_, ins, 0)] * outs


def _body(graph: Graph, ins: Sequence[int]) -> list[int]:
    mask = sources(graph, dict(zip(graph.inputs, ins, strict=True)))
    return [mask.get(v, 0) for v in graph.outputs]


def _loop(body: Graph, consts: Sequence[int], carry: Sequence[int], xs: Sequence[int]) -> list[int]:
    """Once round after round, until the masks of the carry grow no more."""
    while True:
        out = _body(body, [*consts, *carry, *xs])
        grown = [a | b for a, b in zip(carry, out, strict=False)]
        if grown == list(carry):
            return out
        carry = grown


def calls_host(nodes: Iterable[Node]) -> bool:
    """Whether an equation, at any depth, calls Python while it runs."""
    return any(_calls_host(node.eqn) for node in nodes)


def _calls_host(eqn: Any) -> bool:
    name, bodies = eqn.primitive.name, _bodies(eqn.params.values())
    return "callback" in name or name == "debug_print" or any(_calls_host(e) for body in bodies for e in _eqns(body))


def _eqns(body: Any) -> Sequence[Any]:
    return getattr(body, "jaxpr", body).eqns


def loops(node: Node) -> bool:
    """Whether an equation is a loop, or has one in it, at any depth."""
    return _loops(node.eqn)


def _loops(eqn: Any) -> bool:
    bodies = _bodies(eqn.params.values())
    return eqn.primitive.name in ("scan", "while") or any(_loops(e) for body in bodies for e in _eqns(body))


def bodies(node: Node) -> list[Graph]:
    """What an equation runs: a loop's body, the branches of a `cond`, the function of a call."""
    return [inline(body) for body in _bodies(node.eqn.params.values())]


def rounds(node: Node) -> int:
    """How often an equation runs its body; a `while`, of which nobody knows, counts as once."""
    return node.eqn.params["length"] if node.eqn.primitive.name == "scan" else 1


# How to differentiate a custom function: made anew by each trace, and of no use in programs that are only run.
_RULES = ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd")


class _Same:
    """An object that is equal to itself alone."""

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    def __hash__(self) -> int:
        return id(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value


def identity(graph: Graph, nodes: Iterable[Node], given: Sequence[int], wanted: Sequence[int]) -> Hashable:
    """What `nodes` compute, from values `given` in order to values `wanted` in order: equal for equal computations."""
    number: dict[int, int] = {}
    consts: list[Hashable] = []

    def of(v: int) -> int:
        if v not in number:
            number[v] = len(number)
            if v in graph.consts:
                consts.append((number[v], _type(graph.avals[v]), _content(graph.consts[v])))
        return number[v]

    ins = tuple((of(v), _type(graph.avals[v])) for v in given)
    code = tuple(
        (
            node.eqn.primitive,
            node.eqn.ctx,
            tuple((name, _content(value)) for name, value in sorted(node.eqn.params.items()) if name not in _RULES),
            tuple(map(of, node.ins)),
            tuple(map(of, node.outs)),
        )
        for node in nodes
    )
    return ins, code, tuple(map(of, wanted)), tuple(consts)


def _type(aval: Any) -> Hashable:
    return getattr(aval, "shape", None), str(getattr(aval, "dtype", aval)), getattr(aval, "weak_type", False)


def _content(value: Any) -> Hashable:
    """A value by what it is, as far as that can be told; else the very object."""
    if isinstance(value, (Jaxpr, ClosedJaxpr)) and (hasattr(value, "consts") or not value.constvars):
        graph = inline(value)
        return identity(graph, graph.nodes, graph.inputs, graph.outputs)
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_content, value))
    if isinstance(value, dict):
        return tuple((_content(k), _content(v)) for k, v in value.items())
    if isinstance(value, (np.ndarray, np.generic)) and value.size <= 1024 and value.dtype != object:
        return value.shape, str(value.dtype), value.tobytes()
    if isinstance(value, (float, complex)):
        return type(value), repr(value)  # 0.0 == -0.0, and nan is not nan
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return type(value), value
