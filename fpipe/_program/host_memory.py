"""Codes that leave on the device what they would move to the host.

In: a `Code`, some of whose results an offloading policy of `jax.checkpoint` puts into
the host's memory. Out: one that returns the same values from the device, for whoever
moves them to the host itself. The forward of `y = tanh(x @ w)`, whose product is
offloaded:

    h = dot x w                             h = dot x w
    r = device_put[Host] h      becomes     y = tanh h
    y = tanh h
    returns y, r                            returns y, h
"""

import dataclasses
from typing import Any

import jax

from fpipe._core.pytrees import on_host
from fpipe._program.code import Code
from fpipe._program.control_flow import is_remat
from fpipe._program.graph import Node, inline, trace


def kept_on_device(code: Code) -> Code:
    """The same code, with all of its results on the device."""
    return _Keeper(code).keep() if code.on_host else code


class _Keeper:
    """A code that is changed.

    Attributes:
        moved: the values on the host that are results, or become results.
        renamed: values, with those that stand for them now.
    """

    def __init__(self, code: Code) -> None:
        self.code = code
        self.nodes: list[Node] = []
        self.avals = dict(code.graph.avals)
        self.consts = dict(code.graph.consts)
        self.moved = {v for v in code.outs if on_host(self.avals[v])}
        self.renamed: dict[int, int] = {}

    def keep(self) -> Code:
        """The changed code."""
        for node in self.code.nodes:
            self._add(node)
        outs = tuple(map(self._kept, self.code.outs))
        graph = dataclasses.replace(
            self.code.graph,
            nodes=tuple(self.nodes),
            avals=self.avals,
            consts=self.consts,
        )
        return dataclasses.replace(self.code, graph=graph, nodes=graph.nodes, outs=outs)

    def _add(self, node: Node) -> None:
        ins = tuple(self.renamed.get(v, v) for v in node.ins)
        makes_moved = not self.moved.isdisjoint(node.outs)
        if makes_moved and node.name == "device_put":
            self.renamed |= dict(zip(node.outs, ins, strict=True))
        elif makes_moved and is_remat(node):
            # A checkpoint in a checkpoint. Of the forward, so that nothing in it is a
            # recomputation that has to stay one equation.
            self._add_body(dataclasses.replace(node, ins=ins))
        else:
            self.nodes.append(dataclasses.replace(node, ins=ins))

    def _add_body(self, node: Node) -> None:
        (body,) = node.bodies
        first = len(self.avals)  # the body's values get the numbers from here on
        self.avals |= {first + v: aval for v, aval in body.avals.items()}
        self.consts |= {first + v: value for v, value in body.consts.items()}
        self.renamed |= {
            first + v: outer for v, outer in zip(body.inputs, node.ins, strict=True)
        }
        results = list(zip(body.outputs, node.outs, strict=True))
        self.moved |= {first + v for v, outer in results if outer in self.moved}
        for inner in body.nodes:
            ins = tuple(first + v for v in inner.ins)
            outs = tuple(first + v for v in inner.outs)
            scope = "/".join(filter(None, (node.scope, inner.scope)))
            self._add(Node(inner.eqn, ins, outs, scope=scope))
        for v, outer in results:
            self.renamed[outer] = self.renamed.get(first + v, first + v)

    def _kept(self, value: int) -> int:
        """A result on the device. What was moved inside of a loop comes back from the
        host here.
        """
        value = self.renamed.get(value, value)
        aval = self.avals[value]
        if not on_host(aval):
            return value
        back = inline(trace(_to_device, aval))
        (node,) = back.nodes
        made = len(self.avals)
        self.avals[made] = back.avals[node.outs[0]]
        self.nodes.append(Node(node.eqn, (value,), (made,)))
        return made


def _to_device(array: Any) -> list[Any]:
    return [jax.device_put(array, jax.memory.Space.Device)]
