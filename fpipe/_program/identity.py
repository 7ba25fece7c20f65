"""What a graph computes, as a value that is equal for equal computations."""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from fpipe._program.graph import Graph, Node, inline

# How to differentiate a custom function: made anew by each trace, and of no use in
# programs that are only run.
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


def identity(
    graph: Graph, nodes: Iterable[Node], given: Sequence[int], wanted: Sequence[int]
) -> Hashable:
    """What `nodes` compute, from values `given` in order to values `wanted` in order:
    equal for equal computations.
    """
    number: dict[int, int] = {}
    consts: list[Hashable] = []

    def of(v: int) -> int:
        if v not in number:
            number[v] = len(number)
            if v in graph.consts:
                consts.append(
                    (number[v], _type(graph.avals[v]), _content(graph.consts[v]))
                )
        return number[v]

    ins = tuple((of(v), _type(graph.avals[v])) for v in given)
    code = tuple(
        (
            node.eqn.primitive,
            node.eqn.ctx,
            tuple(
                (name, _content(value))
                for name, value in sorted(node.eqn.params.items())
                if name not in _RULES
            ),
            tuple(map(of, node.ins)),
            tuple(map(of, node.outs)),
        )
        for node in nodes
    )
    return ins, code, tuple(map(of, wanted)), tuple(consts)


def _type(aval: Any) -> Hashable:
    return (
        getattr(aval, "shape", None),
        str(getattr(aval, "dtype", aval)),
        getattr(aval, "weak_type", False),
    )


def _content(value: Any) -> Hashable:
    """A value by what it is, as far as that can be told; else the very object."""
    if isinstance(value, (Jaxpr, ClosedJaxpr)) and (
        hasattr(value, "consts") or not value.constvars
    ):
        graph = inline(value)
        return identity(graph, graph.nodes, graph.inputs, graph.outputs)
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_content, value))
    if isinstance(value, dict):
        return tuple((_content(k), _content(v)) for k, v in value.items())
    if (
        isinstance(value, (np.ndarray, np.generic))
        and value.size <= 1024
        and value.dtype != object
    ):
        return value.shape, str(value.dtype), value.tobytes()
    if isinstance(value, (float, complex)):
        return type(value), repr(value)  # 0.0 == -0.0, and nan is not nan
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return type(value), value
