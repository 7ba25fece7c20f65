"""Where to cut a row of layers: the contiguous cut whose dearest stage is as cheap as
can be, by dynamic programming.

The linear partition problem (Skiena, The Algorithm Design Manual, 8.5), here with costs
that depend on the whole span of a stage, so that what crosses its ends can count too.
It is solved from the last stage to the first: `V_s[i]`, the best for stages `s, s+1, …`
on layers `i, i+1, …`, is the least over `j` of `max(cost_s[i, j], V_{s+1}[j])`. A
second pass takes, of all cuts as good as the best, the one with the least traffic. Both
take `O(S L²)`, on whole rows at a time.

Memory limits hold for devices. With one stage on each they are limits on stages, and
part of the same program. With several they bind stages that are not neighbours, which
makes the problem hard (it contains bin packing); see `best_cut`.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Value: TypeAlias = tuple[float, ...]
Branches: TypeAlias = Iterator[
    tuple[Value, int, Value]
]  # the bound, where the stage ends, and the value so far
Table: TypeAlias = (
    np.ndarray
)  # (L + 1, L + 1): at [i, j] a value of the layers i, …, j - 1 together

# Costs that differ by less than that share are equal: sums of floats have errors.
_EQUAL = 1e-9

# So many nodes of the search for several stages on a device, each in some 50
# microseconds.
_NODES = 50_000


@dataclasses.dataclass(frozen=True)
class Task:
    """What to cut, and what to look at.

    Attributes:
        layers: `L`.
        devices: for each stage its device.
        cost: for a stage the cost of every span, at `[i, j]` that of layers `i, …, j -
            1`; spans without layers are not read.
        traffic: the same for the bytes that the stage receives.
        memory: the same for the bytes that it needs; `None`: not looked at.
        limits: for each device the bytes that it has.
    """

    layers: int
    devices: tuple[int, ...]
    cost: Callable[[int], Table]
    traffic: Callable[[int], Table]
    memory: Callable[[int], Table] | None
    limits: tuple[float, ...]


class Short(NamedTuple):
    """No cut fits: what is missing in the cut that lacks least.

    Attributes:
        stage: the stage that is too large; `None` if it is the stages of the device
            together.
        device: its device.
        missing: bytes.
        proven: whether no cut fits, or the search only found none.
    """

    stage: int | None
    device: int
    missing: float
    proven: bool


def best_cut(task: Task, nodes: int = _NODES) -> tuple[int, ...] | Short:
    """The number of layers in each stage.

    The dearest stage is as cheap as can be, over all stages, several on a device or
    not. Of those cuts (costs are equal up to one part in 10⁹) the one with the least
    traffic in total, of those the most even one (the least sum of squares of the
    numbers of layers), of those the one that is largest in its first stage, then in its
    second, and so on.

    This is exact for one stage on each device, and without limits. With several stages
    on a device and limits, the cut is first sought with the limits on each stage alone:
    if the devices' sums keep them too, it is the optimum. Else by branch and bound,
    which is exact if it ends within `nodes` nodes, and otherwise gives the best cut
    that it has found.

    Arguments:
        task: at least as many layers as stages.
        nodes: at which the search ends.

    Returns:
        The layers of each stage, or what is missing.
    """
    solver = _Solver(task)
    if math.isinf(solver.best[0][0]):
        return solver.shortage()
    relaxed = solver.cheapest_way(solver.best[0][0])
    if max(solver.overs(relaxed)) <= 0:
        return _sizes(relaxed)
    return solver.search(nodes)


def total(values: Sequence[float]) -> Table:
    """The table of sums over spans."""
    ends = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    return ends[None, :] - ends[:, None]


def arriving(layers: int, sends: Sequence[tuple[int, Sequence[int], float]]) -> Table:
    """What spans receive from layers outside: once, however many layers in the span
    read it.

    Arguments:
        layers: `L`.
        sends: `(source, readers, bytes)`; readers stand before or behind the source.
    """
    table = np.zeros((layers + 1, layers + 1))
    for source, readers, size in sends:
        later = [-1, *sorted(readers)]
        for before, reader in itertools.pairwise(later):
            # The spans whose first reader this is: they begin behind the one before it.
            # Less those with the source.
            table[before + 1 : reader + 1, reader + 1 :] += size
            table[before + 1 : min(reader, source) + 1, max(reader, source) + 1 :] -= (
                size
            )
    return table


def leaving(layers: int, sends: Sequence[tuple[int, Sequence[int], float]]) -> Table:
    """What spans send to layers outside: once, however many read it."""
    table = np.zeros((layers + 1, layers + 1))
    for source, readers, size in sends:
        first, last = min(readers), max(readers)
        table[: source + 1, source + 1 :] += size
        table[: min(first, source) + 1, max(last, source) + 1 :] -= size
    return table


def _sizes(ends: Sequence[int]) -> tuple[int, ...]:
    return tuple(b - a for a, b in zip((0, *ends), ends, strict=False))


def _minmax(tables: Sequence[Table], layers: int) -> list[np.ndarray]:
    """For stages from `s` on, on layers from `i` on: the least possible largest entry.
    The last row is for no stage.
    """
    rows = [np.full(layers + 1, np.inf)]
    rows[0][layers] = 0.0
    for table in reversed(tables):
        rows.append(np.maximum(table, rows[-1][None, :]).min(1))
    return rows[::-1]


class _Solver:
    """The tables of a task, and the ways through them. A way is where each stage ends."""

    def __init__(self, task: Task) -> None:
        self.task, self.stages, count = task, len(task.devices), task.layers
        at = np.arange(count + 1)
        self.length = np.where(at[None, :] > at[:, None], at[None, :] - at[:, None], 0)
        empty = self.length == 0
        self.memory = None
        if task.memory is not None:
            self.memory = [
                np.where(empty, np.inf, task.memory(s)) for s in range(self.stages)
            ]
        self.costs = []
        for s, d in enumerate(task.devices):
            bad = (
                empty
                if self.memory is None
                else empty | (self.memory[s] > task.limits[d])
            )
            self.costs.append(np.where(bad, np.inf, task.cost(s)))
        self.traffic = [task.traffic(s) for s in range(self.stages)]
        self.best = _minmax(self.costs, count)

    def cheapest_way(self, cost: float) -> list[int]:
        """Of the ways on which no stage costs more, the one with the least traffic, the
        most even one, the first.
        """
        choice = self._least(self._allowed(cost))[2]
        ends: list[int] = []
        for row in choice:
            ends.append(int(row[ends[-1] if ends else 0]))
        return ends

    def overs(self, ends: Sequence[int]) -> list[float]:
        """For each device by how much its stages exceed its limit."""
        used = [-limit for limit in self.task.limits]
        for s, (i, j) in enumerate(zip((0, *ends), ends, strict=False)):
            used[self.task.devices[s]] += (
                0.0 if self.memory is None else float(self.memory[s][i, j])
            )
        return used

    def shortage(self) -> Short:
        """What is missing where even single stages do not fit."""
        assert self.memory is not None
        over = [
            m - self.task.limits[d]
            for m, d in zip(self.memory, self.task.devices, strict=True)
        ]
        rows = _minmax(
            over, self.task.layers
        )  # the end of the row is 0, and something is over in each cut
        i, worst = 0, (0.0, 0)
        for s, table in enumerate(over):
            j = int(np.argmin(np.maximum(table[i], rows[s + 1])))
            worst = max(worst, (float(table[i, j]), -s))
            i = j
        return Short(-worst[1], self.task.devices[-worst[1]], worst[0], True)

    def search(self, nodes: int) -> tuple[int, ...] | Short:
        """Branch and bound with the devices' limits: first the least cost, then the
        least traffic at that cost.
        """
        search = _Search(self, nodes)
        search.best, search.way = self._shared()
        best, first, ended = search.run(self._by_cost)
        if first is None:
            (missing,), ends, _ = _Search(self, nodes // 10, limited=False).run(
                self._by_shortage
            )
            overs = self.overs(ends or ())
            return Short(None, overs.index(max(overs)), missing, ended)
        allowed = self._allowed(best[0])
        traffic, even, _ = self._least(allowed)

        def by_traffic(s: int, i: int, value: Value, over: np.ndarray) -> Branches:
            del over
            for j in range(self.task.layers, i, -1):
                moved, square = (
                    value[0] + self.traffic[s][i, j],
                    value[1] + float(j - i) ** 2,
                )
                if not allowed[s][i, j]:
                    yield (
                        (moved + traffic[s + 1][j], square + even[s + 1][j]),
                        j,
                        (moved, square),
                    )

        _, second, _ = _Search(self, nodes).run(by_traffic)
        return _sizes(first if second is None else second)

    def _shared(self) -> tuple[Value | None, list[int] | None]:
        """The best of the ways on which each stage has an equal share of its device's
        limit: a good one to begin with.
        """
        assert self.memory is not None
        devices, tables = self.task.devices, list[Table]()
        for table, memory, d in zip(self.costs, self.memory, devices, strict=True):
            tables.append(
                np.where(memory > self.task.limits[d] / devices.count(d), np.inf, table)
            )
        rows = _minmax(tables, self.task.layers)
        if math.isinf(rows[0][0]):
            return None, None
        ends: list[int] = []
        for s, table in enumerate(tables):
            ends.append(
                int(np.argmin(np.maximum(table[ends[-1] if ends else 0], rows[s + 1])))
            )
        return (float(rows[0][0]),), ends

    def _by_cost(self, s: int, i: int, value: Value, over: np.ndarray) -> Branches:
        del over
        values = np.maximum(self.costs[s][i], value[0])
        bounds = np.maximum(values, self.best[s + 1])
        return (
            ((float(bounds[j]),), int(j), (float(values[j]),))
            for j in np.argsort(bounds, kind="stable")
        )

    def _by_shortage(self, s: int, i: int, value: Value, over: np.ndarray) -> Branches:
        del s, value
        order = (j for j in np.argsort(over, kind="stable") if j > i)
        return (((float(over[j]),), int(j), (float(over[j]),)) for j in order)

    def _allowed(self, cost: float) -> list[Table]:
        return [
            np.where(table <= cost * (1 + _EQUAL), 0.0, np.inf) for table in self.costs
        ]

    def _least(
        self, allowed: Sequence[Table]
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """For stages from `s` on, on layers from `i` on: traffic, sum of squares, and
        where stage `s` ends.
        """
        count, squares = self.task.layers, self.length.astype(np.float64) ** 2
        traffic, even = [np.full(count + 1, np.inf)], [np.full(count + 1, np.inf)]
        traffic[0][count] = even[0][count] = 0.0
        choice: list[np.ndarray] = []
        for table, moved in zip(reversed(allowed), reversed(self.traffic), strict=True):
            sums = table + moved + traffic[-1][None, :]
            least = sums.min(1)
            second = np.where(
                sums == least[:, None], squares + even[-1][None, :], np.inf
            )
            fewest = second.min(1)
            # The last of the ends that are as good.
            choice.append(
                count - np.argmax((second == fewest[:, None])[:, ::-1], axis=1)
            )
            traffic.append(least)
            even.append(fewest)
        return traffic[::-1], even[::-1], choice[::-1]


class _Search:
    """Depth first through the ways, at most so many nodes; `limited`: only those that
    the devices have room for.
    """

    def __init__(self, solver: _Solver, nodes: int, limited: bool = True) -> None:
        assert solver.memory is not None
        self.memory, self.devices, self.left, self.limited = (
            solver.memory,
            solver.task.devices,
            nodes,
            limited,
        )
        self.limits = np.asarray(solver.task.limits)
        # What the stages from `s` on need at least, on layers from `i` on: of each
        # device, and of all together.
        count = solver.task.layers
        self.floors = [np.zeros((len(self.limits), count + 1))]
        self.sums = [np.where(np.arange(count + 1) == count, 0.0, np.inf)]
        for table, d in zip(reversed(self.memory), reversed(self.devices), strict=True):
            least = np.minimum.accumulate(table.min(1)[::-1])[
                ::-1
            ]  # of any span that begins there or later
            row = self.floors[-1].copy()
            row[d, :-1] = np.maximum(row[d, :-1], row[d, 1:]) + least[:-1]
            row[d, -1] = np.inf
            self.floors.append(row)
            self.sums.append((table + self.sums[-1][None, :]).min(1))
        self.best: Any = None
        self.way: list[int] | None = None
        self.floors.reverse()
        self.sums.reverse()

    def run(
        self, branches: Callable[[int, int, Value, np.ndarray], Branches]
    ) -> tuple[Any, list[int] | None, bool]:
        """The least value, the first way that has it, and whether the search ended by
        itself.
        """
        self.branches = branches
        self._visit(0, [], (0.0, 0.0), np.zeros(len(self.limits)))
        return self.best, self.way, self.left > 0

    def _visit(self, s: int, ends: list[int], value: Value, used: np.ndarray) -> None:
        if s == len(self.devices):
            self.best, self.way = value, ends
            return
        i, d = ends[-1] if ends else 0, self.devices[s]
        need = used[:, None] + self.floors[s + 1]
        need[d] += self.memory[s][i]
        over = (need - self.limits[:, None]).max(0)
        together = used.sum() + self.memory[s][i] + self.sums[s + 1]
        over = np.maximum(over, (together - self.limits.sum()) / len(self.limits))
        for bound, j, new in self.branches(s, i, value, over):
            if self.left <= 0 and (self.limited or self.best is not None):
                return
            if (
                math.isinf(bound[0])
                or (self.limited and over[j] > 0)
                or (self.best is not None and bound >= self.best)
            ):
                continue
            self.left -= 1
            then = used.copy()
            then[d] += self.memory[s][i, j]
            self._visit(s + 1, [*ends, j], new, then)
