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

To decide about one value at a time would not do: neither `m` nor `t` alone costs more
than `p`, but both together do.

The network is searched from the sink, and made where the search comes to. In a long
function the search often ends early: `h = g + f(...)` is not made again from `g`,
because `f(...)` would have to be kept, so nothing before `h` is looked at.
"""

import collections
from collections.abc import Callable, Iterable, Sequence

_NO_LIMIT = 1 << 62
_SOURCE = 0
_SINK = 1


def cheapest(
    cost: Callable[[int], int],
    remade_from: Callable[[int], Sequence[int] | None],
    needed: Iterable[int],
) -> set[int]:
    """The values to keep.

    Arguments:
        cost: of keeping a value.
        remade_from: what a value can be made again from; `None`: it must be kept, or
            not be needed.
        needed: the values that are used.

    Returns:
        Of all cheapest sets the one with the least to make again.
    """
    # When no more can flow, the edges that lead to the nodes that are still open to the
    # sink are a minimum cut, and it is the one nearest to the sink.
    network = _Network(cost, remade_from, list(dict.fromkeys(needed)))
    return network.values_around(network.fill())


class _Network:
    """A network of values, and the largest flow through it, by Dinic's algorithm.

    Each value is two nodes, its entrance and its exit, with its cost between them. A
    path from the source to the sink is a way to do without any kept value; the cut must
    break each, and can do so only at the edges that are values.

    Round after round: find how far each node is from the sink, as far as the source,
    then fill all shortest paths at once. Each round makes the shortest path longer, so
    there are few. Paths are lists, not recursions: a chain of cheap equations, two
    nodes each, may be longer than Python's stack.

    Attributes:
        edges_at: the edges that begin at each node; `None`: nobody has come there.
        end: the node at which each edge ends.
        capacity: what is left of each edge's. Edge `e ^ 1` is the reverse of edge `e`:
            what flows through one can flow back through the other.
    """

    def __init__(
        self,
        cost: Callable[[int], int],
        remade_from: Callable[[int], Sequence[int] | None],
        needed: Sequence[int],
    ) -> None:
        self._cost, self._remade_from = cost, remade_from
        self._values: list[int] = []  # Node `2 + 2 * n` is the entrance of the n-th.
        self._number: dict[int, int] = {}
        self._reached = [True, True]
        self.edges_at: list[list[int]] = [[], []]
        self.end: list[int] = []
        self.capacity: list[int] = []
        for v in needed:
            self._connect(self._entrance(v) + 1, _SINK, _NO_LIMIT)

    def _entrance(self, v: int) -> int:
        """The node of a value, made when it is first asked for."""
        if v not in self._number:
            self._number[v] = len(self._values)
            self._values.append(v)
            self.edges_at += [[], []]
            self._reached += [False, False]
        return 2 + 2 * self._number[v]

    def _connect(self, a: int, b: int, capacity: int) -> None:
        """Add an edge from `a` to `b`, and its reverse."""
        self.edges_at[a].append(len(self.end))
        self.edges_at[b].append(len(self.end) + 1)
        self.end += [b, a]
        self.capacity += [capacity, 0]

    def _edges_to(self, b: int) -> Sequence[int]:
        """The edges that begin at a node, with those that lead to it made."""
        if not self._reached[b]:
            self._reached[b] = True
            v = self._values[b // 2 - 1]
            if b % 2:
                self._connect(b - 1, b, self._cost(v))
            else:
                sources = self._remade_from(v)
                if sources is None:
                    self._connect(_SOURCE, b, _NO_LIMIT)
                for u in sources or ():
                    self._connect(self._entrance(u) + 1, b, _NO_LIMIT)
        return self.edges_at[b]

    def fill(self) -> set[int]:
        """Send as much as can flow from the source to the sink.

        Returns:
            The nodes from which more could flow to the sink.
        """
        while True:
            distance = self._distances()
            if _SOURCE not in distance:
                return set(distance)
            self._fill_shortest_paths(distance)

    def values_around(self, open_to_sink: set[int]) -> set[int]:
        """The values whose exits are among some nodes, and whose entrances are not."""
        return {
            self._values[node // 2 - 1]
            for node in open_to_sink
            if node > _SINK and node % 2 and node - 1 not in open_to_sink
        }

    def _distances(self) -> dict[int, int]:
        """How far nodes are from the sink, in edges that are not full; of those that
        are no nearer than the source.
        """
        # Backwards from the sink. Of the edges at `b` the reverse ones lead to it, so
        # that it is their capacity that counts.
        distance = {_SINK: 0}
        queue = collections.deque([_SINK])
        while queue:
            b = queue.popleft()
            if distance[b] == distance.get(_SOURCE):
                break
            for edge in self._edges_to(b):
                a = self.end[edge]
                if self.capacity[edge ^ 1] and a not in distance:
                    distance[a] = distance[b] + 1
                    queue.append(a)
        return distance

    def _fill_shortest_paths(self, distance: dict[int, int]) -> None:
        """Walk from the sink by edges that come from one step further, and back at dead
        ends.

        Each edge is given up once only, so `tried` counts those of each node that are.
        """
        tried = dict.fromkeys(distance, 0)
        path: list[int] = []
        node = _SINK
        while True:
            if node == _SOURCE:
                flow = min(self.capacity[edge ^ 1] for edge in path)
                for edge in path:
                    self.capacity[edge ^ 1] -= flow
                    self.capacity[edge] += flow
                # Go on from where the first full edge ends: what leads from there to
                # the sink is not full, and need not be walked again.
                full = next(
                    n for n, edge in enumerate(path) if not self.capacity[edge ^ 1]
                )
                node = self.end[path[full] ^ 1]
                del path[full:]
            edges = self.edges_at[node]
            next_distance = distance[node] + 1
            while tried[node] < len(edges):
                edge = edges[tried[node]]
                if (
                    self.capacity[edge ^ 1]
                    and distance.get(self.end[edge]) == next_distance
                ):
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
