"""A backward in two halves: `I` makes input gradients, `W` the weight gradients.

A schedule can run `I` early, because the stage before waits for it, and fill idle time
with `W` later (zero bubble, Qi et al., arXiv 2401.10241). Nothing is computed twice:
what both need, `I` hands over. For `y = tanh(x @ w1) @ w2`, where the backward takes
`x`, `h = tanh(x @ w1)`, both weights and `dy`:

    | equation           | half | why                                             |
    |--------------------|------|-------------------------------------------------|
    | dh = dot dy w2     | I    | on the way to dx                                |
    | ds = dh * (1-h*h)  | I    | on the way to dx, and handed to W               |
    | dx = dot ds w1     | I    | the input gradient                              |
    | dw2 = dot h dy     | W    | takes h from the forward, dy from outside       |
    | dw1 = dot x ds     | W    | takes x from outside, ds from I                 |

An equation that gives input and weight gradients together, a `scan` for example, cannot
be halved. `I` runs it and makes these weight gradients too. If `I` handed them to `W`,
an array as large as the weights would wait for each microbatch.

The halves are slices of one traced backward: `I` is what the input gradients are made
from, `W` the rest. Differentiating twice, once for each half, would compute much twice.
On a stage of four layers, whose backward has 8 matrix products, `VJP.with_refs` did 4
in `I` and 7 in `W`, the slices 4 and 4 (measured on jax 0.10.2, CPU).
"""

import dataclasses
from collections.abc import Collection, Iterable, Sequence, Set

from fpipe._core.pytrees import device_bytes
from fpipe._program.graph import Graph, Node, needed_nodes
from fpipe._program.residuals import FORM_CHANGES, Backward


@dataclasses.dataclass(frozen=True)
class Halves:
    """A backward in two halves.

    Attributes:
        input_nodes, weight_nodes: the equations of `I` and of `W`.
        handed: the values that `I` hands to `W`.
        made_early: the weight gradients that `I` makes.
    """

    input_nodes: Sequence[Node]
    weight_nodes: Sequence[Node]
    handed: Sequence[int]
    made_early: Set[int]


def halve_backward(
    graph: Graph,
    backward: Backward,
    input_gradients: Sequence[int],
    weight_gradients: Sequence[int],
    summed: Set[int],
    per_microbatch: Set[int],
) -> Halves:
    """Halve a backward. Its effects are `I`'s.

    Arguments:
        graph: the graph that the backward was cut off from.
        summed: those of the values that the backward takes that are sums, made by the
            program that takes them: `W` does not add up again what `I` has added up.
        per_microbatch: the values that depend on the microbatch or on a cotangent.
    """
    part = dataclasses.replace(graph, nodes=tuple(backward.nodes))
    # First assume that nothing is made early: only this shows what `I` would hand to
    # `W`.
    first = _InputHalf(part, input_gradients, backward, summed, per_microbatch)
    # Results of equations that are more than one operation: control flow, and calls of
    # something foreign. `I` makes a weight gradient early if `W` would be handed such a
    # result of the gradient's size: for each microbatch an array as large as the
    # weights would wait for `W`.
    together = {
        v
        for node in first.nodes
        if len(node.outs) > 1 and ("call" in node.name or node.bodies)
        for v in node.outs
    }
    sizes = {v: graph.avals[v].size for v in together}
    early = {
        v
        for v in weight_gradients
        if together
        and any(
            u in together and sizes[u] == graph.avals[v].size
            for u in first.rest([v]).handed
        )
    }
    # `I` has to make these gradients too, so it is sliced again.
    if early:
        targets = [*input_gradients, *(v for v in weight_gradients if v in early)]
        first = _InputHalf(part, targets, backward, summed, per_microbatch)
    rest = first.rest(v for v in weight_gradients if v not in early)
    return Halves(first.nodes, rest.nodes, rest.handed, early)


@dataclasses.dataclass(frozen=True)
class _Rest:
    """What `W` does after `I`, and the values that it is handed."""

    nodes: Sequence[Node]
    handed: Sequence[int]


class _InputHalf:
    """The half of a backward that makes `targets`.

    Arguments:
        part: the equations of the whole backward.
    """

    def __init__(
        self,
        part: Graph,
        targets: Collection[int],
        backward: Backward,
        summed: Set[int],
        per_microbatch: Set[int],
    ) -> None:
        takes = set(backward.takes)
        effects = {node for node in part.nodes if node.eqn.effects}
        self._part = part
        self._per_microbatch = per_microbatch
        self.nodes = needed_nodes(part, targets, takes, effects)
        self._made = {v for node in self.nodes for v in node.outs}
        read = {v for node in self.nodes for v in node.ins}.union(targets)
        self._free = takes - (summed & read)  # `W` takes these from where `I` did.

    def rest(self, wanted: Iterable[int]) -> _Rest:
        """What `W` does to make `wanted`, and what it is handed."""
        part = self._part
        handed = set[int]()
        makes = set[int]()
        # From the gradients backwards, as far as `W` makes the values itself. It stops
        # at what `I` has made, and at what `W` takes from where `I` took it.
        pending = list(wanted)
        while pending:
            v = pending.pop()
            if v in makes or v in handed or v in part.consts or v in self._free:
                continue
            node = part.maker.get(v)
            if node is None or (v in self._made and not self._may_redo(node, v)):
                handed.add(v)
            else:
                makes.update(node.outs)
                pending.extend(node.ins)
        nodes = [node for node in part.nodes if not makes.isdisjoint(node.outs)]
        return _Rest(nodes, sorted(handed))

    def _may_redo(self, node: Node, value: int) -> bool:
        """Whether `W` makes again what `I` has made, in place of being handed it."""
        if node.eqn.effects:
            return False
        if value not in self._per_microbatch:
            return True  # Made from weights alone: not kept for each microbatch.
        # A change of form is made again if that keeps fewer bytes: a cotangent is
        # handed as the row that it was, not as the matrix that it was broadcast to, but
        # as the bfloat16 that it was cast to, not as the float32. A value that `I` has
        # copied from the host's memory is copied once more by `W`: until then only the
        # host keeps it.
        if node.name not in FORM_CHANGES and node.name != "device_put":
            return False
        avals = self._part.avals
        read = sum(device_bytes(avals[v]) for v in node.ins)
        return read <= sum(device_bytes(avals[v]) for v in node.outs)
