"""Where to cut a row of layers: the cut into stages whose most expensive stage is as
cheap as can be.

This is the linear partition problem (Skiena, The Algorithm Design Manual, 8.5), here
with costs that depend on the whole span of a stage, so that what crosses its ends can
count too. It is solved exactly, by dynamic programming from the last stage to the
first. Let `cost_s[i, j]` be the cost of the layers `i` to `j - 1` as stage `s`, and
`best_s[i]` the least possible cost of the most expensive one of the stages `s`, `s + 1`
and so on, on the layers `i`, `i + 1` and so on. Stage `s` ends somewhere:

    best_s[i] = min over j of max(cost_s[i, j], best_{s+1}[j])

Five layers that cost 3, 1, 1, 1 and 2, on two stages. For the last stage there is no
choice; for the first, each possible end is tried:

    layers from i      0  1  2  3  4      the first stage ends at j   1  2  3  4
    best_1[i]          8  5  4  3  2      max(cost_0[0, j], best_1[j])  5  4  5  6

so `best_0[0]` is 4, and the cut is (2, 3). Many cuts may be as good as the best. A
second pass of the same kind takes the one with the least traffic among them. Both take
`O(S L²)` steps, done on whole rows at a time.

Memory limits hold for devices. With one stage on each they are limits on stages, and
part of the same program: a span that does not fit costs infinity. With several stages
on a device they bind stages that are not neighbours, which makes the problem hard (it
contains bin packing); see `best_cut`.

Two usual heuristics were not taken. Bisecting the cost, and filling stages greedily up
to it, is only exact if a longer span never costs less: with what crosses its ends it
may. And a balancer that starts from some cut and moves layers to and fro, as that of
torchgpipe, may stop before the best one.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

# (L + 1, L + 1): at [i, j] a value of the layers i, …, j - 1 together.
Table: TypeAlias = np.ndarray

# Costs that differ by less than that share are equal: sums of floats have errors. Else
# the last digit of a sum, and not traffic, would decide between equal cuts.
_EQUAL = 1e-9

# Where costs are estimates, cuts whose most expensive stage costs at most this share
# more than the best count as equal. Without this slack, to gain a little, a block would
# be cut in its middle, which several arrays cross.
SLACK = 0.05

# So many nodes of the search for several stages on a device, each in some 50
# microseconds.
_NODES = 50_000


@dataclasses.dataclass(frozen=True)
class PartitionTask:
    """What to cut, and what to look at.

    Attributes:
        layers: `L`.
        devices: for each stage its device.
        cost: for a stage the cost of every span, at `[i, j]` that of layers `i, …, j -
            1`; spans without layers are not read.
        traffic: the same for the bytes that the stage receives.
        memory: the same for the bytes that it needs; `None`: not looked at.
        limits: for each device the bytes that it has.
        slack: the share by which costs may exceed the best for less traffic. With it
            evenness is that of costs, and not that of numbers of layers.
    """

    layers: int
    devices: tuple[int, ...]
    cost: Callable[[int], Table]
    traffic: Callable[[int], Table]
    memory: Callable[[int], Table] | None
    limits: tuple[float, ...]
    slack: float = 0.0


class Shortage(NamedTuple):
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


def best_cut(task: PartitionTask, nodes: int = _NODES) -> tuple[int, ...] | Shortage:
    """The number of layers in each stage.

    The most expensive stage is as cheap as can be, over all stages, several on a device
    or not. Of those cuts (costs are equal up to one part in 10⁹) the one with the least
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
    partition = _Partition(task)
    if math.isinf(partition.best[0][0]):
        return partition.shortage()
    # With the limits on each stage alone fewer cuts are ruled out than should be. So if
    # the best of them keeps the devices' limits too, no other can be better.
    least = partition.best[0][0]
    relaxed = partition.cheapest_ends(least * (1 + task.slack))
    # With slack only if the least cost can be reached: from that it is counted.
    reached = relaxed if not task.slack else partition.cheapest_ends(least)
    if max(*partition.excess(relaxed), *partition.excess(reached)) <= 0:
        return _sizes(relaxed)
    return _search(partition, nodes)


def _sizes(ends: Sequence[int]) -> tuple[int, ...]:
    """The layers of each stage, from where each ends."""
    return tuple(end - start for start, end in itertools.pairwise((0, *ends)))


def _min_max(tables: Sequence[Table], layers: int) -> list[np.ndarray]:
    """The rows `best_s` of the recurrence above; the last row is for no stage."""
    # For no stage: no layers cost nothing, and any layers that are left are no cut.
    rows = [np.full(layers + 1, np.inf)]
    rows[0][layers] = 0.0
    for table in reversed(tables):
        rows.append(np.maximum(table, rows[-1][None, :]).min(1))
    return rows[::-1]


def _min_max_ends(tables: Sequence[Table], rows: Sequence[np.ndarray]) -> list[int]:
    """Where each stage ends in a cut that has the least largest entry."""
    ends: list[int] = []
    for table, after in zip(tables, rows[1:], strict=True):
        start = ends[-1] if ends else 0
        ends.append(int(np.argmin(np.maximum(table[start], after))))
    return ends


class _Least(NamedTuple):
    """The second pass: for stages from `s` on, on layers from `i` on.

    Attributes:
        traffic: the least traffic.
        squares: with it the least sum of squares of the numbers of layers.
        end: where stage `s` ends then.
    """

    traffic: list[np.ndarray]
    squares: list[np.ndarray]
    end: list[np.ndarray]


class _Partition:
    """The tables of a task, and the cuts through them, as where each stage ends.

    Attributes:
        memory, costs, traffic: the tables of each stage. Spans without layers cost
            infinity, and so do those that do not fit into their device.
        squares: tables whose sum is the least for the most even cut.
        best: the rows of the recurrence.
    """

    def __init__(self, task: PartitionTask) -> None:
        self.task = task
        stages, at = range(len(task.devices)), np.arange(task.layers + 1)
        lengths = np.maximum(at[None, :] - at[:, None], 0)
        empty = lengths == 0
        self.memory: list[Table] | None = None
        if task.memory is not None:
            self.memory = [np.where(empty, np.inf, task.memory(s)) for s in stages]
        self.costs: list[Table] = []
        # A span that does not fit costs infinity, so that no cut goes through it. With
        # one stage on each device this is all that limits need.
        for s, device in enumerate(task.devices):
            refused = empty
            if self.memory is not None:
                refused = empty | (self.memory[s] > task.limits[device])
            self.costs.append(np.where(refused, np.inf, task.cost(s)))
        self.traffic = [task.traffic(s) for s in stages]
        self.squares = [lengths.astype(float) ** 2 for _ in stages]
        if task.slack:
            self.squares = [np.where(np.isinf(c), 0.0, c) ** 2 for c in self.costs]
        self.best = _min_max(self.costs, task.layers)

    def cheapest_ends(self, cost: float) -> list[int]:
        """Of the cuts in which no stage costs more, the one with the least traffic, the
        most even one, the first.
        """
        ends: list[int] = []
        for end in self.least(self.allowed(cost)).end:
            ends.append(int(end[ends[-1] if ends else 0]))
        return ends

    def excess(self, ends: Sequence[int]) -> list[float]:
        """For each device by how much its stages exceed its limit."""
        over = [-limit for limit in self.task.limits]
        if self.memory is None:
            return over
        for s, (start, end) in enumerate(itertools.pairwise((0, *ends))):
            over[self.task.devices[s]] += float(self.memory[s][start, end])
        return over

    def shortage(self) -> Shortage:
        """What is missing where even single stages do not fit: in the cut whose worst
        stage lacks least.
        """
        assert self.memory is not None
        # The same recurrence, on what is missing in place of what a span costs.
        devices, limits = self.task.devices, self.task.limits
        over = [m - limits[d] for m, d in zip(self.memory, devices, strict=True)]
        ends = _min_max_ends(over, _min_max(over, self.task.layers))
        missing = [
            float(over[s][start, end])
            for s, (start, end) in enumerate(itertools.pairwise((0, *ends)))
        ]
        worst = missing.index(max(missing))
        return Shortage(worst, devices[worst], missing[worst], True)

    def allowed(self, cost: float) -> list[Table]:
        """For each stage 0 at the spans that cost no more, infinity at others."""
        most = cost * (1 + _EQUAL)
        return [np.where(table <= most, 0.0, np.inf) for table in self.costs]

    def least(self, allowed: Sequence[Table]) -> _Least:
        """The second pass, over the spans that are allowed."""
        # Traffic first, then squares among the ends that have the least traffic: as one
        # number they would have to be weighed against each other.
        count = self.task.layers
        nothing = np.full(count + 1, np.inf)
        nothing[count] = 0.0
        found = _Least([nothing], [nothing], [])
        tables = zip(allowed, self.traffic, self.squares, strict=True)
        for table, moved, uneven in reversed([*tables]):
            traffic = table + moved + found.traffic[-1][None, :]
            least = traffic.min(1)
            squares = uneven + found.squares[-1][None, :]
            squares = np.where(traffic == least[:, None], squares, np.inf)
            fewest = squares.min(1)
            # Of the ends that are as good the last: argmax of the reversed row.
            as_good = squares <= fewest[:, None] * (1 + _EQUAL)
            found.end.append(count - np.argmax(as_good[:, ::-1], axis=1))
            found.traffic.append(least)
            found.squares.append(fewest)
        return _Least(*(rows[::-1] for rows in found))

    def with_equal_shares(self) -> list[int] | None:
        """The best of the cuts in which each stage has an equal share of its device's
        limit, if there is one: a good one for the search to begin with.
        """
        assert self.memory is not None
        devices, tables = self.task.devices, list[Table]()
        for table, memory, d in zip(self.costs, self.memory, devices, strict=True):
            share = self.task.limits[d] / devices.count(d)
            tables.append(np.where(memory > share, np.inf, table))
        rows = _min_max(tables, self.task.layers)
        return None if math.isinf(rows[0][0]) else _min_max_ends(tables, rows)

    def cost_of(self, ends: Sequence[int]) -> float:
        """The cost of the most expensive stage of a cut."""
        spans = enumerate(itertools.pairwise((0, *ends)))
        return max(float(self.costs[s][start, end]) for s, (start, end) in spans)


# --- the search for several stages on a device ---


# What is minimized: a cost, or traffic and then evenness; compared as tuples.
Value: TypeAlias = tuple[float, ...]


class _Branch(NamedTuple):
    """A way to end a stage.

    Attributes:
        bound: no cut that goes on from here has a lesser value.
        end: where the stage ends.
        value: of the stages so far.
    """

    bound: Value
    end: int
    value: Value


class _Node(NamedTuple):
    """Some first stages have been cut.

    Attributes:
        stage: the next one.
        start: where it begins.
        value: of the stages so far.
        excess: for each end of the next stage by how much memory will be exceeded at
            least.
    """

    stage: int
    start: int
    value: Value
    excess: np.ndarray


class _Found(NamedTuple):
    """The best cut, if any, and whether all others have been ruled out."""

    value: Value | None
    ends: list[int] | None
    complete: bool


def _search(partition: _Partition, nodes: int) -> tuple[int, ...] | Shortage:
    """Branch and bound with the devices' limits: first the least cost, then the least
    traffic at that cost.
    """
    layers, costs, best = partition.task.layers, partition.costs, partition.best

    # Three ways to lead the search. The bound of a branch is exact for the stages
    # after it, limits on devices left out, which makes it a good one. Branches come
    # in the order of their bounds, so that the first cut found is a good one too.

    def by_cost(node: _Node) -> Iterator[_Branch]:
        values = np.maximum(costs[node.stage][node.start], node.value[0])
        bounds = np.maximum(values, best[node.stage + 1])
        for end in np.argsort(bounds, kind="stable"):
            yield _Branch((float(bounds[end]),), int(end), (float(values[end]),))

    def by_shortage(node: _Node) -> Iterator[_Branch]:
        for end in np.argsort(node.excess, kind="stable"):
            if end > node.start:
                value = (float(node.excess[end]),)
                yield _Branch(value, int(end), value)

    nothing = _Found(None, None, False)
    start = partition.with_equal_shares()
    known = nothing
    if start is not None:
        known = _Found((partition.cost_of(start),), start, False)
    cheapest = _Search(partition, nodes).run(by_cost, known)
    if cheapest.value is None or cheapest.ends is None:
        # Which cut lacks least, in fewer nodes: it is only for the message.
        nearest = _Search(partition, nodes // 10, limited=False).run(
            by_shortage, nothing
        )
        assert nearest.value is not None
        excess = partition.excess(nearest.ends or ())
        device = excess.index(max(excess))
        return Shortage(None, device, nearest.value[0], cheapest.complete)
    # Only now traffic: both at once would need a bound on pairs, and if this second
    # search runs out of nodes, a cut that is as cheap is known already.
    allowed = partition.allowed(cheapest.value[0] * (1 + partition.task.slack))
    least = partition.least(allowed)

    def by_traffic(node: _Node) -> Iterator[_Branch]:
        s = node.stage
        for end in range(layers, node.start, -1):
            if allowed[s][node.start, end]:
                continue
            moved = node.value[0] + partition.traffic[s][node.start, end]
            uneven = float(partition.squares[s][node.start, end])
            squares = node.value[1] + uneven
            bound = (
                moved + least.traffic[s + 1][end],
                squares + least.squares[s + 1][end],
            )
            yield _Branch(bound, end, (moved, squares))

    leanest = _Search(partition, nodes).run(by_traffic, nothing)
    return _sizes(cheapest.ends if leanest.ends is None else leanest.ends)


class _Search:
    """Depth first through the cuts.

    Arguments:
        nodes: how many are visited at most.
        limited: only those that the devices have room for.
    """

    def __init__(self, partition: _Partition, nodes: int, limited: bool = True) -> None:
        assert partition.memory is not None
        self._memory, self._devices = partition.memory, partition.task.devices
        self._limits = np.asarray(partition.task.limits)
        self._nodes_left, self._limited = nodes, limited
        # What the stages from `s` on need at least, on layers from `i` on: of each
        # device, and of all together. The first looks at each stage alone, as if it
        # could have its cheapest span, and so knows which device it burdens; the second
        # knows that the spans must cover all layers, and not who has them. Neither
        # bound is always the better one, so that both are asked.
        count = partition.task.layers
        self._least_of_each = [np.zeros((len(self._limits), count + 1))]
        self._least_of_all = [np.where(np.arange(count + 1) == count, 0.0, np.inf)]
        for table, d in zip(
            reversed(self._memory), reversed(self._devices), strict=True
        ):
            # Of any span that begins at `i` or later.
            least = np.minimum.accumulate(table.min(1)[::-1])[::-1]
            each = self._least_of_each[-1].copy()
            # A stage has at least one layer, so the stages after it begin at the next.
            each[d, :-1] = np.maximum(each[d, :-1], each[d, 1:]) + least[:-1]
            each[d, -1] = np.inf
            self._least_of_each.append(each)
            together = table + self._least_of_all[-1][None, :]
            self._least_of_all.append(together.min(1))
        self._least_of_each.reverse()
        self._least_of_all.reverse()

    def run(
        self,
        branches: Callable[[_Node], Iterator[_Branch]],
        known: _Found,
    ) -> _Found:
        """The least value, and the first cut that has it.

        Arguments:
            branches: the ways to go on, by which the search is led.
            known: a cut to begin with; only better ones are looked for.
        """
        # A value is a tuple of one or of two numbers. Which it is, `branches` knows; it
        # reads of the first value here as many as it needs.
        self._branches, self._best = branches, known
        self._visit(0, [], (0.0, 0.0), np.zeros(len(self._limits)))
        return self._best._replace(complete=self._nodes_left > 0)

    def _visit(self, s: int, ends: list[int], value: Value, used: np.ndarray) -> None:
        """Cut the stages from `s` on; `used` is what each device holds so far."""
        if s == len(self._devices):
            self._best = _Found(value, ends, False)
            return
        start, device = ends[-1] if ends else 0, self._devices[s]
        excess = self._excess(s, start, used)
        for bound, end, new in self._branches(_Node(s, start, value, excess)):
            # Asked anew for each branch: an earlier one may have found a better cut.
            # For a message, where limits do not bind, the search goes on until it has
            # one.
            best = self._best.value
            if self._nodes_left <= 0 and (self._limited or best is not None):
                return
            too_large = self._limited and excess[end] > 0
            no_better = best is not None and bound >= best
            if too_large or no_better or math.isinf(bound[0]):
                continue
            self._nodes_left -= 1
            # A copy, because the other branches of this node start from `used` again.
            then = used.copy()
            then[device] += self._memory[s][start, end]
            self._visit(s + 1, [*ends, end], new, then)

    def _excess(self, s: int, start: int, used: np.ndarray) -> np.ndarray:
        """For each end of stage `s` by how much memory will be exceeded at least: on
        one of the devices, or in the mean of all.
        """
        # More than 0 says that no way to go on can fit, so the branch is not followed.
        stage = self._memory[s][start]
        need = used[:, None] + self._least_of_each[s + 1]
        need[self._devices[s]] += stage
        on_one = (need - self._limits[:, None]).max(0)
        together = used.sum() + stage + self._least_of_all[s + 1]
        return np.maximum(on_one, (together - self._limits.sum()) / len(self._limits))
