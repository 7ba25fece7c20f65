"""A graph that is made out of another one, equation by equation.

In: a graph. Out: one of the same inputs, in which other equations stand in the place of
some. A loop over two rounds of `tanh`, in place of the loop,

    | equation  | reads | makes |        | equation | reads | makes |
    |-----------|-------|-------|        |----------|-------|-------|
    | scan      | 0     | 1     |        | tanh     | 0     | 3     |
    | neg       | 1     | 2     |        | tanh     | 3     | 4     |
                                         | neg      | 4     | 5     |

Equations are never constructed, for their fields change between releases: they are
those of the graph, of its bodies, or of a small function that is traced. They know
their operands by position, so that another node may read other values with the same
equation.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from fpipe._core.pytrees import aval
from fpipe._program.graph import Graph, Node, inline, trace


class Rewriter:
    """The new graph as it grows. A subclass says in `add` what becomes of an equation.

    Attributes:
        nodes, consts, avals: of the new graph, so far.
        maker: the equation that makes each value.
        renamed: values that are others now.
    """

    def __init__(self, graph: Graph) -> None:
        self.nodes: list[Node] = []
        self.consts = dict(graph.consts)
        self.avals = dict(graph.avals)
        self.maker: dict[int, Node] = {}
        self.renamed: dict[int, int] = {}
        # One trace for each function and its shapes.
        self._traces: dict[Hashable, Graph] = {}

    def add(self, node: Node) -> None:
        """Add an equation, or what stands in its place; it reads values of the new
        graph.
        """
        self.keep(node)

    def keep(self, node: Node) -> None:
        """Add an equation as it is."""
        self.nodes.append(node)
        self.maker.update(dict.fromkeys(node.outs, node))

    def rewrite(self, graph: Graph) -> Graph:
        """The new graph, of all equations of the old one."""
        for node in graph.nodes:
            ins = self.current(node.ins)
            self.add(node if ins == node.ins else node.reading(ins))
        return dataclasses.replace(
            graph,
            outputs=self.current(graph.outputs),
            nodes=tuple(self.nodes),
            consts=self.consts,
            avals=self.avals,
        )

    def current(self, values: Iterable[int]) -> tuple[int, ...]:
        """What some values of the old graph are now."""
        return tuple(self.renamed.get(v, v) for v in values)

    def new(self, like: Any) -> int:
        """A value of a type, without a maker."""
        v = len(self.avals)
        self.avals[v] = like
        return v

    def call(
        self,
        body: Graph,
        args: Sequence[int],
        by: Node,
    ) -> list[int]:
        """Add the equations of another graph, called on some values.

        Arguments:
            by: the equation that it is called by.

        Returns:
            Its outputs.
        """
        return self._call(body, args, by.scope, (by.eqn, *by.calls), self.add)

    def _call(
        self,
        body: Graph,
        args: Sequence[int],
        scope: str,
        calls: tuple[Any, ...],
        add: Callable[[Node], None],
    ) -> list[int]:
        first = len(self.avals)  # The body's values get the numbers from here on.
        self.avals.update({first + v: of for v, of in body.avals.items()})
        self.consts.update({first + v: value for v, value in body.consts.items()})
        inputs = (first + v for v in body.inputs)
        self.renamed.update(zip(inputs, args, strict=True))
        for node in body.nodes:
            ins = self.current(first + v for v in node.ins)
            outs = tuple(first + v for v in node.outs)
            around = "/".join(filter(None, (scope, node.scope)))
            inside = (*node.calls, *calls)
            new = Node(node.eqn, ins, outs, node.recomputes, around, inside)
            # The body of a loop is read once for all rounds.
            vars(new)["bodies"] = node.bodies
            add(new)
        return list(self.current(first + v for v in body.outputs))

    def apply(
        self, f: Callable[..., Any], values: Sequence[int], key: Hashable, scope: str
    ) -> int:
        """Add the equations of a function of one result.

        Arguments:
            key: what tells functions apart; of one key and the same shapes one trace is
                made.
        """
        avals = [aval(self.avals[v]) for v in values]
        key = (key, *((a.shape, a.dtype, a.weak_type) for a in avals))
        if key not in self._traces:
            self._traces[key] = inline(trace(lambda *arrays: [f(*arrays)], *avals))
        (made,) = self._call(self._traces[key], values, scope, (), self.keep)
        return made
