"""What to keep and what to make again: the cheapest set of values, as a minimum cut.

A backward needs some values of its forward. Each may be kept, at the cost of its bytes,
or made again from values before it, where that is cheap. The best choice is a minimum
cut of a network in which each value is an edge of its cost (Jain et al., arXiv
1910.02653, pose the problem; PyTorch's AOTAutograd solves it so).

A product `p` of 8 bytes from which a mask `m` of 1 byte and a tanh `t` of 8 bytes can
be made, both needed, is this network, in which `=` is an edge without limit:

    source = (p)--8--(p') = (m)--1--(m') = sink
                         = (t)--8--(t') = sink

To cut `p` costs 8, to cut `m` and `t` 9: `p` is kept, and both are made again. Values
that cannot be made again hang on the source. Among cheapest cuts the one nearest to the
sink is taken: it leaves least to make again.

A greedy walk would not do: neither `m` alone nor `t` alone costs more than `p`, both
together do.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence

_NO_LIMIT = 1 << 62
_SOURCE = 0
_SINK = 1


def cheapest(
    costs: Mapping[int, int],
    remade_from: Mapping[int, Sequence[int]],
    needed: Iterable[int],
) -> set[int]:
    """The values to keep.

    Arguments:
        costs: of keeping each value.
        remade_from: for each value that can be made again, what it is made from; a
            value that is not there must be kept, or not be needed.
        needed: the values that are used.

    Returns:
        Of all cheapest sets the one with the least to make again.
    """
    needed = list(dict.fromkeys(needed))
    # Only what is needed, directly or to make it again, is part of the network.
    entrances: dict[int, int] = {}  # The other end of a value's edge is the next node.
    pending = list(needed)
    while pending:
        v = pending.pop()
        if v not in entrances:
            entrances[v] = 2 + 2 * len(entrances)
            pending.extend(remade_from.get(v, ()))
    # Each value is two nodes, its entrance and its exit, with its cost between them. A
    # path from the source to the sink is a way to do without any kept value; the cut
    # must break each, and can do so only at the edges that are values.
    network = _Network(2 + 2 * len(entrances))
    for v, entrance in entrances.items():
        network.connect(entrance, entrance + 1, costs[v])
        if v not in remade_from:
            network.connect(_SOURCE, entrance, _NO_LIMIT)
        for u in remade_from.get(v, ()):
            network.connect(entrances[u] + 1, entrance, _NO_LIMIT)
    for v in needed:
        network.connect(entrances[v] + 1, _SINK, _NO_LIMIT)
    network.fill()
    # When no more can flow, the edges that lead from the nodes cut off from the sink to
    # those that are not are a minimum cut, and it is the one nearest to the sink.
    open_to_sink = network.leads_to_sink()
    return {
        v
        for v, entrance in entrances.items()
        if entrance not in open_to_sink and entrance + 1 in open_to_sink
    }


class _Network:
    """A network, and the largest flow through it, by Dinic's algorithm.

    Round after round: find how far each node is from the source, then fill all shortest
    paths at once. Each round makes the shortest path longer, so there are few. Paths
    are lists, not recursions: a chain of cheap equations, two nodes each, may be longer
    than Python's stack.

    Attributes:
        edges_at: the edges that begin at each node.
        end: the node at which each edge ends.
        capacity: what is left of each edge's. Edge `e ^ 1` is the reverse of edge `e`:
            what flows through one can flow back through the other.
    """

    def __init__(self, nodes: int) -> None:
        self.edges_at: list[list[int]] = [[] for _ in range(nodes)]
        self.end: list[int] = []
        self.capacity: list[int] = []

    def connect(self, a: int, b: int, capacity: int) -> None:
        """Add an edge from `a` to `b`, and its reverse."""
        self.edges_at[a].append(len(self.end))
        self.edges_at[b].append(len(self.end) + 1)
        self.end += [b, a]
        self.capacity += [capacity, 0]

    def fill(self) -> None:
        """Send as much as can flow from the source to the sink."""
        while True:
            distance = self._distances()
            if distance[_SINK] < 0:
                return
            self._fill_shortest_paths(distance)

    def _distances(self) -> list[int]:
        """How far each node is from the source, in edges that are not full; -1: cut
        off.
        """
        distance = [-1] * len(self.edges_at)
        distance[_SOURCE] = 0
        queue = collections.deque([_SOURCE])
        while queue:
            a = queue.popleft()
            for edge in self.edges_at[a]:
                b = self.end[edge]
                if self.capacity[edge] and distance[b] < 0:
                    distance[b] = distance[a] + 1
                    queue.append(b)
        return distance

    def _fill_shortest_paths(self, distance: Sequence[int]) -> None:
        """Walk from the source by edges that lead one step further, and back at dead
        ends.

        Each edge is given up once only, so `tried` counts those of each node that are.
        """
        tried = [0] * len(self.edges_at)
        path: list[int] = []
        node = _SOURCE
        while True:
            if node == _SINK:
                flow = min(self.capacity[edge] for edge in path)
                for edge in path:
                    self.capacity[edge] -= flow
                    self.capacity[edge ^ 1] += flow
                # Go on from where the first full edge begins: what leads there is not
                # full, and need not be walked again.
                full = next(n for n, edge in enumerate(path) if not self.capacity[edge])
                node = self.end[
                    path[full] ^ 1
                ]  # Go on from where the first full one begins.
                del path[full:]
            edges = self.edges_at[node]
            next_distance = distance[node] + 1
            while tried[node] < len(edges):
                edge = edges[tried[node]]
                if self.capacity[edge] and distance[self.end[edge]] == next_distance:
                    break
                tried[node] += 1
            if tried[node] < len(edges):
                edge = edges[tried[node]]
                path.append(edge)
                node = self.end[edge]
            elif path:
                edge = path.pop()
                node = self.end[edge ^ 1]
                tried[node] += 1
            else:
                return

    def leads_to_sink(self) -> set[int]:
        """The nodes from which more could flow to the sink."""
        # Backwards from the sink. Of the edges at `b` the reverse ones lead to it, so
        # that it is their capacity that counts.
        found = {_SINK}
        pending = [_SINK]
        while pending:
            b = pending.pop()
            for edge in self.edges_at[b]:
                a = self.end[edge]
                if self.capacity[edge ^ 1] and a not in found:
                    found.add(a)
                    pending.append(a)
        return found
