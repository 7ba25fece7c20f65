"""What is inside of an equation: the bodies of loops, branches and calls, and what goes
through them.
"""

import functools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from fpipe._program.graph import Graph, Node, inline


def bodies_of(values: Iterable[Any]) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation."""
    for value in values:
        if isinstance(value, (Jaxpr, ClosedJaxpr)):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from bodies_of(value)


def value_size(aval: Any) -> int:
    return int(np.prod(aval.shape, dtype=np.int64))


def recomputation(eqn: Any) -> Graph | None:
    """The body of a `jax.checkpoint`, whatever this release calls it."""
    return (
        inline(eqn.params["jaxpr"])
        if {"jaxpr", "policy", "prevent_cse"} <= set(eqn.params)
        else None
    )


def value_bytes(aval: Any) -> int:
    return value_size(aval) * getattr(aval.dtype, "itemsize", 8)


def sources(graph: Graph, seeds: Mapping[int, int]) -> dict[int, int]:
    """`masks`, seen through control flow: what a value's *content* depends on, which
    branch was taken aside.
    """
    mask = dict(seeds)
    for node in graph.nodes:
        ins = [mask.get(v, 0) for v in node.ins]
        mask.update(
            zip(node.outs, _through(node.eqn, ins, len(node.outs)), strict=True)
        )
    return mask


def _through(eqn: Any, ins: Sequence[int], outs: int) -> list[int]:
    """The masks of an equation's outputs from those of its inputs."""
    p = eqn.params
    if eqn.primitive.name == "cond":
        branches = [_body(inline(branch), ins[1:]) for branch in p["branches"]]
        return [
            functools.reduce(operator.or_, column)
            for column in zip(*branches, strict=True)
        ]
    if eqn.primitive.name == "scan":
        # Told from the shapes, for the names of a scan's parameters are not stable:
        # what is scanned over, or stacked, has one axis more outside than inside.
        body = inline(p["jaxpr"])
        ndim = [body.avals[v].ndim for v in (*body.inputs, *body.outputs)]
        same = [
            v.aval.ndim == n
            for v, n in zip((*eqn.invars, *eqn.outvars), ndim, strict=True)
        ]
        xs, carry = len(ins) - sum(same[: len(ins)]), sum(same[len(ins) :])
        consts = len(ins) - xs - carry
        return _loop(
            body, ins[:consts], ins[consts : consts + carry], ins[consts + carry :]
        )
    if eqn.primitive.name == "while":
        body = inline(p["body_jaxpr"])
        carry, consts = (
            len(ins) - outs,
            len(body.inputs) - outs,
        )  # where the carry begins; the condition's consts are first
        return _loop(body, ins[carry - consts : carry], ins[carry:], [])
    body = recomputation(eqn)
    if body is not None:
        return _body(body, ins)
    return [functools.reduce(operator.or_, ins, 0)] * outs


def _body(graph: Graph, ins: Sequence[int]) -> list[int]:
    mask = sources(graph, dict(zip(graph.inputs, ins, strict=True)))
    return [mask.get(v, 0) for v in graph.outputs]


def _loop(
    body: Graph, consts: Sequence[int], carry: Sequence[int], xs: Sequence[int]
) -> list[int]:
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
    name, bodies = eqn.primitive.name, bodies_of(eqn.params.values())
    return (
        "callback" in name
        or name == "debug_print"
        or any(_calls_host(e) for body in bodies for e in _eqns(body))
    )


def _eqns(body: Any) -> Sequence[Any]:
    return getattr(body, "jaxpr", body).eqns


def loops(node: Node) -> bool:
    """Whether an equation is a loop, or has one in it, at any depth."""
    return _loops(node.eqn)


def _loops(eqn: Any) -> bool:
    bodies = bodies_of(eqn.params.values())
    return eqn.primitive.name in ("scan", "while") or any(
        _loops(e) for body in bodies for e in _eqns(body)
    )


def bodies(node: Node) -> list[Graph]:
    """What an equation runs: a loop's body, the branches of a `cond`, the function of a
    call.
    """
    return [inline(body) for body in bodies_of(node.eqn.params.values())]


def rounds(node: Node) -> int:
    """How often an equation runs its body; a `while`, of which nobody knows, counts as
    once.
    """
    return node.eqn.params["length"] if node.eqn.primitive.name == "scan" else 1
