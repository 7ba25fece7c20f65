"""What a graph computes, as a value that is equal for equal computations.

Two stages of equal layers have equal identities, and share their compiled programs. An
identity is the list of equations in a numbering of its own: for `tanh(x @ w)`

    inputs     (0, f32[4,8]), (1, f32[8,8])
    equations  (dot_general, its parameters, reads 0 1, makes 2)
               (tanh, its parameters, reads 2, makes 3)
    wanted     3
    constants  none

Constants and parameters are compared by content where that is possible, and otherwise
as objects. If equal things are taken for different ones, a program is compiled once too
often. If different things were taken for equal ones, the wrong program would run. So in
doubt two things differ.

The text of a jaxpr would not do: it leaves out the content of constants, and prints
functions by their addresses.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from fpipe._core.pytrees import on_host
from fpipe._program.graph import Graph, Node, inline, trace

# Parameters that say how to differentiate a custom function. Each trace makes new ones,
# and a program that is only run does not need them.
_RULES = ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd")

# Types whose equal values are the same, and quick to tell.
_PLAIN = (int, bool, str, type(None))

# Larger constants are compared as objects: to compare their content would take longer
# than to compile a program once more.
_LARGEST_CONSTANT = 1024


class _Same:
    """An object that is equal to itself alone.

    It holds the object, so that no other one gets its `id` while identities are kept.
    """

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    def __hash__(self) -> int:
        return id(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value


def function_identity(f: Callable[..., Sequence[Any]], *arrays: Any) -> Hashable:
    """What a function of flat arrays computes on arrays of these shapes."""
    return traced_identity(trace(f, *arrays))


def traced_identity(traced: Any) -> Hashable:
    """What a closed jaxpr computes."""
    graph = inline(traced)
    return identity(graph, graph.nodes, graph.inputs, graph.outputs)


def identity(
    graph: Graph, nodes: Iterable[Node], given: Sequence[int], wanted: Sequence[int]
) -> Hashable:
    """What `nodes` compute, from values `given` to values `wanted`, in order."""
    numbers: dict[int, int] = {}
    constants: list[Hashable] = []

    # In the order of first use, so that the numbers say nothing of where in a larger
    # graph the equations stand.
    def renumbered(values: Iterable[int]) -> tuple[int, ...]:
        for v in values:
            if v not in numbers:
                numbers[v] = len(numbers)
                if v in graph.consts:
                    content = _content(graph.consts[v])
                    constants.append((numbers[v], _type(graph.avals[v]), content))
        return tuple(numbers[v] for v in values)

    inputs = renumbered(given), tuple(_type(graph.avals[v]) for v in given)
    equations = []
    for node in nodes:
        params = tuple(
            (name, _content(value))
            for name, value in sorted(node.eqn.params.items())
            if name not in _RULES
        )
        ins = renumbered(node.ins)
        outs = renumbered(node.outs)
        # `ctx` is what held when it was traced, such as the mesh of a stage.
        equations.append((node.eqn.primitive, node.eqn.ctx, params, ins, outs))
    return inputs, tuple(equations), renumbered(wanted), tuple(constants)


def _type(aval: Any) -> Hashable:
    """Shape, dtype, whether the dtype is weak (then it gives way in a promotion), and
    whether it lies on the host.
    """
    return (
        getattr(aval, "shape", None),
        str(getattr(aval, "dtype", aval)),
        getattr(aval, "weak_type", False),
        on_host(aval),
    )


def _content(value: Any) -> Hashable:
    """A value by what it is, as far as that can be told; else the very object."""
    # The type goes with the value, for `1 == True`.
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_content, value))
    if isinstance(value, (Jaxpr, ClosedJaxpr)):
        # What an open jaxpr captures has no value here, so it cannot be compared.
        if hasattr(value, "consts") or not value.constvars:
            graph = inline(value)
            return identity(graph, graph.nodes, graph.inputs, graph.outputs)
        return _Same(value)
    if isinstance(value, dict):
        return tuple((_content(k), _content(v)) for k, v in value.items())
    if isinstance(value, (np.ndarray, np.generic)):
        small = value.size <= _LARGEST_CONSTANT and value.dtype != object
        return (
            (value.shape, str(value.dtype), value.tobytes()) if small else _Same(value)
        )
    if isinstance(value, (float, complex)):
        return type(value), repr(value)  # 0.0 == -0.0, and nan is not nan
    # To read an array would wait for its device.
    if isinstance(value, jax.Array):
        return _Same(value)
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return type(value), value
