"""What to keep and what to make again: the cheapest set of values, as a minimum cut.

A backward needs some values of its forward. Each may be kept, at the cost of its bytes,
or made again from values before it, where that is cheap. The best choice is a minimum
cut of a network in which each value is an edge of its cost (Jain et al., arXiv
1910.02653, pose the problem; PyTorch's AOTAutograd solves it so). Solved with Dinic's
algorithm.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence

_INFINITE = 1 << 62


def cheapest(
    costs: Mapping[int, int], again: Mapping[int, Sequence[int]], needed: Iterable[int]
) -> set[int]:
    """The values to keep.

    Arguments:
        costs: of keeping each value.
        again: for each value that can be made again, what it is made from; a value that
            is not there must be kept, or not be needed.
        needed: the values that are used.

    Returns:
        Of all cheapest sets the one with the least to make again.
    """
    # Only what is needed, directly or to make it again, is part of the network.
    part: dict[int, None] = {}
    stack = list(needed)
    while stack:
        v = stack.pop()
        if v not in part:
            part[v] = None
            stack.extend(again.get(v, ()))
    number = {
        v: 2 * n + 2 for n, v in enumerate(part)
    }  # and the next one is its other end; 0 is the source, 1 the sink
    network = _Network(2 * len(part) + 2)
    for v, n in number.items():
        network.edge(n, n + 1, costs[v])
        if v not in again:
            network.edge(0, n, _INFINITE)
        for u in again.get(v, ()):
            network.edge(number[u] + 1, n, _INFINITE)
    for v in dict.fromkeys(needed):
        network.edge(number[v] + 1, 1, _INFINITE)
    network.fill()
    after = network.leads_to_sink()
    return {v for v, n in number.items() if n not in after and n + 1 in after}


class _Network:
    """Nodes, and edges with what is left of their capacity; edge `e ^ 1` is the reverse
    of edge `e`.
    """

    def __init__(self, nodes: int) -> None:
        self.at: list[list[int]] = [[] for _ in range(nodes)]
        self.to: list[int] = []
        self.left: list[int] = []

    def edge(self, a: int, b: int, capacity: int) -> None:
        self.at[a].append(len(self.to))
        self.at[b].append(len(self.to) + 1)
        self.to += [b, a]
        self.left += [capacity, 0]

    def fill(self) -> None:
        """Send as much as can go from node 0 to node 1."""
        while True:
            level = [-1] * len(self.at)
            level[0] = 0
            queue = collections.deque([0])
            while queue:
                a = queue.popleft()
                for e in self.at[a]:
                    if self.left[e] and level[self.to[e]] < 0:
                        level[self.to[e]] = level[a] + 1
                        queue.append(self.to[e])
            if level[1] < 0:
                return
            self._block(level)

    def _block(self, level: Sequence[int]) -> None:
        """Fill every shortest way."""
        next_ = [0] * len(self.at)
        path: list[int] = []
        a = 0
        while True:
            if a == 1:
                least = min(self.left[e] for e in path)
                for e in path:
                    self.left[e] -= least
                    self.left[e ^ 1] += least
                first = next(n for n, e in enumerate(path) if not self.left[e])
                a = self.to[path[first] ^ 1]
                del path[first:]
            while next_[a] < len(self.at[a]):
                e = self.at[a][next_[a]]
                if self.left[e] and level[self.to[e]] == level[a] + 1:
                    break
                next_[a] += 1
            if next_[a] < len(self.at[a]):
                path.append(self.at[a][next_[a]])
                a = self.to[path[-1]]
            elif path:
                e = path.pop()
                a = self.to[e ^ 1]
                next_[a] += 1
            else:
                return

    def leads_to_sink(self) -> set[int]:
        """The nodes from which more could go to node 1."""
        seen, stack = {1}, [1]
        while stack:
            b = stack.pop()
            for e in self.at[b]:
                if self.left[e ^ 1] and self.to[e] not in seen:
                    seen.add(self.to[e])
                    stack.append(self.to[e])
        return seen
