"""Two classic colourings: edges of a bipartite graph, for messages, and intervals, for
the slots that they wait in.
"""

import heapq
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

Edge = tuple[int, int]
K = TypeVar("K", bound=Hashable)


def edge_colors(edges: Sequence[Edge]) -> list[int]:
    """Colours for edges `(source, target)`, so that no two of one colour share a source
    or a target.

    A source and a target of the same number are different ends. Parallel edges may be
    there. The number of colours is the largest number of edges at one end, which is the
    fewest (König's theorem, by alternating paths). Edges take the first colour that is
    free at both ends, so that the first edges of a ring keep colour 0.
    """
    at: dict[
        tuple[bool, int], dict[int, int]
    ] = {}  # (is target, number) → colour → edge
    colors = [-1] * len(edges)

    def free(end: tuple[bool, int]) -> int:
        used = at.setdefault(end, {})
        return next(c for c in range(len(used) + 1) if c not in used)

    for e, (source, target) in enumerate(edges):
        left, right = (False, source), (True, target)
        a, b = free(left), free(right)
        both = at[left].keys() | at[right].keys()
        limit = max(len(at[left]), len(at[right])) + 1
        common = next((c for c in range(limit) if c not in both), None)
        if common is not None:
            a = b = common
        # `a` is free at the source and `b` at the target: swap the two along the path
        # that starts at the target with `a`.
        end, color, path = right, a, list[int]()
        while a != b and color in at[end]:
            edge = at[end][color]
            path.append(edge)
            end = (False, edges[edge][0]) if end[0] else (True, edges[edge][1])
            color = b if color == a else a
        for edge in path:
            for end in ((False, edges[edge][0]), (True, edges[edge][1])):
                if at[end].get(colors[edge]) == edge:
                    del at[end][colors[edge]]
        for edge in path:
            colors[edge] = b if colors[edge] == a else a
            for end in ((False, edges[edge][0]), (True, edges[edge][1])):
                at[end][colors[edge]] = edge
        colors[e] = a
        at[left][a] = at[right][a] = e
    return colors


def slots(intervals: Iterable[tuple[int, int, K]]) -> tuple[dict[K, int], int]:
    """Slots for intervals `(start, end, key)`, both ends included, so that no two that
    meet share one.

    Returns:
        The slot of each key, and how many there are: the most intervals that meet at
        one time, which is the fewest.
    """
    where: dict[K, int] = {}
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    count = 0
    for start, end, key in sorted(intervals, key=lambda entry: entry[:2]):
        while busy and busy[0][0] < start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            slot = heapq.heappop(free)
        else:
            slot, count = count, count + 1
        where[key] = slot
        heapq.heappush(busy, (end, slot))
    return where, count
