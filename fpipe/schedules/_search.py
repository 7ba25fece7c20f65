"""A schedule made for given costs and a memory limit.

After the automatic scheduling of Zero Bubble (Qi et al., arXiv 2401.10241), with the limit as the
knob of Controllable Memory (arXiv 2405.15362). As there: a list scheduler with a few parameters,
tried over a grid. It departs in three things: the parameters are the slope of the warm-up and how
soon a `W` is due, so that the fixed schedules lie near the grid; the fixed schedules take part, so
that the result is never worse; and a local search on the critical path has the last word, as in
job-shop scheduling (Nowicki and Smutnicki), where a `W` is what moves most freely.

Everything is decided by counts, never by the clock: the same call gives the same schedule.
"""

import dataclasses
import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from fpipe.schedules._names import NAMES
from fpipe.schedules._schedule import KINDS, Action, Schedule
from fpipe.schedules._simulate import Costs, checked

_F, _B, _I, _W = range(len(KINDS))
_ROUNDING = 1.0 + 1e-9


def zero_bubble(
    devices: int,
    microbatches: int,
    costs: Costs | None = None,
    *,
    memory: float | Sequence[float] | None = None,
    placement: str | Sequence[int] = "one",
    virtual: int = 2,
) -> Schedule:
    """The best schedule found for these costs, within a memory limit on each device.

    Never later than any schedule of `NAMES` with the same map that keeps the limit, under `simulate`
    with the same costs; of equal ones the one that holds least. `I` and `W` are split where that pays.
    With equal costs and no limit, idle time is `(D-1)F` for one stage per device, all of it the
    fill. Seconds for 16 devices and 64 microbatches.

    Arguments:
        devices: `D`.
        microbatches: `m`.
        costs: what the actions take and hold; default `Costs()`.
        memory: the most a device may hold, in the unit of `costs.memory`: one number, or one per
            device; left out, there is no limit.
        placement: `"one"` (stage `s` on device `s`), `"v"` (device `d` holds stages `d` and
            `2D-1-d`), `"looped"` (stage `s` on device `s % D`), or the device of each stage.
        virtual: `v`, the stages per device of `"looped"`.

    Returns:
        The `Schedule`, named `zero_bubble`.

    Raises:
        TypeError: something of the wrong type.
        ValueError: sizes that make no sense, or a limit under what one microbatch alone needs; the
            message says how much that is.

    Example:
        `fpipe.Pipe(..., schedule=functools.partial(zero_bubble, costs=costs, memory=6))`
    """
    for what, value in (("devices", devices), ("microbatches", microbatches), ("virtual", virtual)):
        if type(value) is not int:
            raise TypeError(f"`zero_bubble({what}={value!r})`: an int")
        if value < 1:
            raise ValueError(f"`zero_bubble({what}={value!r})`: at least 1")
    p = _Problem(devices, microbatches, _places(devices, placement, virtual), costs or Costs(), memory)
    found = [_Found.of(p, rows) for rows in _fixed(p) if p.fits(rows)]
    found += _grid(p)
    found = _best(found)
    bound = p.bound() * _ROUNDING
    for n, one in enumerate(found[:3]):
        if found[0].makespan <= bound:
            break
        found.append(_anneal(p, _toggle(p, one), bound, seed=n))
    best = _best(found)[0]
    actions = [[Action(KINDS[k], *divmod(at, p.m)) for k, at in (divmod(a, p.size) for a in row)] for row in best.rows]
    return Schedule(actions, p.places, name="zero_bubble")


def _places(devices: int, placement: Any, virtual: int) -> tuple[int, ...]:
    ups = tuple(range(devices))
    named = {"one": ups, "v": ups + ups[::-1], "looped": ups * virtual}
    call = f"`zero_bubble(placement={placement!r})`"
    if isinstance(placement, str):
        if placement not in named:
            raise ValueError(f"{call}: {', '.join(map(repr, named))}, or the device of each stage")
        return named[placement]
    places = tuple(placement) if isinstance(placement, Iterable) else (None,)
    if any(type(d) is not int for d in places):
        raise TypeError(f"{call}: {', '.join(map(repr, named))}, or the device of each stage")
    if set(places) != set(ups):
        raise ValueError(f"{call}: each of the devices 0 to {devices - 1} has a stage, and there are no others")
    return places


Rows = list[list[int]]


class _Problem:
    """Sizes, costs and limit as tables; actions are numbers, `(kind * S + stage) * m + microbatch`."""

    def __init__(self, devices: int, m: int, places: tuple[int, ...], costs: Costs, memory: Any) -> None:
        self.devices, self.m, self.places = devices, m, places
        self.stages = stages = len(places)
        self.size = size = stages * m
        self.of = [[s for s in range(stages) if places[s] == d] for d in range(devices)]
        costs.check(stages)
        self.cost = [[costs.of(Action(k, s, 0)) for s in range(stages)] for k in KINDS]
        self.first, self.second = zip(*(costs.holds(s) for s in range(stages)), strict=True)
        call = f"zero_bubble(memory={memory!r})"
        limit = math.inf if memory is None else checked(call, "device", memory)
        self.limit = limit if isinstance(limit, tuple) else (limit,) * devices
        if len(self.limit) != devices:
            raise ValueError(f"`{call}`: {len(self.limit)} numbers for {devices} devices")
        self.whole = [math.fsum(self.first[s] for s in of) for of in self.of]
        self.slack = [limit * _ROUNDING for limit in self.limit]
        for d, (whole, slack) in enumerate(zip(self.whole, self.slack, strict=True)):
            if whole > slack:
                raise ValueError(
                    f"`{call}`: device {d} needs at least {whole:g}, what one microbatch holds on its "
                    f"stages {', '.join(map(str, self.of[d]))}; all devices: {', '.join(f'{w:g}' for w in self.whole)}"
                )
        self.took = [cost for of_kind in self.cost for cost in of_kind for _ in range(m)]
        self.up = [costs.transfer if a != b else 0.0 for a, b in itertools.pairwise(places)]
        self.lag = [0.0] * (4 * size)
        for s, lag in enumerate(self.up):
            self.lag[(s + 1) * m : (s + 2) * m] = [lag] * m
            for k in (_B, _I):
                self.lag[k * size + s * m : k * size + (s + 1) * m] = [lag] * m

    def needs(self, rows: Rows) -> list[int]:
        """For each action what it needs from another stage, or -1."""
        need = [-1] * (4 * self.size)
        need[self.m : self.size] = range(self.size - self.m)
        later = [0] * self.size
        for row in rows:
            for a in row:
                if self.size <= a < _W * self.size:
                    later[a % self.size] = a
        for at in range(self.size - self.m):
            need[later[at]] = later[at + self.m]
        return need

    def run(self, rows: Rows, need: list[int]) -> tuple[list[float], list[float]] | None:
        """Starts and ends of all actions, as `simulate` has them; `None` if it is a deadlock."""
        starts, ends = [0.0] * (4 * self.size), [-1.0] * (4 * self.size)
        took, lag = self.took, self.lag
        free, next_ = [0.0] * self.devices, [0] * self.devices
        waiting: dict[int, int] = {}
        ready = list(range(self.devices))
        while ready:
            d = ready.pop()
            row, t = rows[d], free[d]
            for n in range(next_[d], len(row)):
                a = row[n]
                if need[a] >= 0:
                    there = ends[need[a]]
                    if there < 0.0:
                        waiting[need[a]], next_[d], free[d] = d, n, t
                        break
                    there += lag[a]
                    if there > t:
                        t = there
                starts[a] = t
                t += took[a]
                ends[a] = t
                if a in waiting:
                    ready.append(waiting.pop(a))
        return None if waiting else (starts, ends)

    def peak(self, row: Sequence[int]) -> float:
        """The most that a device holds, whatever the times."""
        held = peak = 0.0
        for a in row:
            kind, at = divmod(a, self.size)
            s = at // self.m
            if kind == _F:
                held += self.first[s]
            elif kind == _I:
                held += self.second[s] - self.first[s]
            else:
                held -= self.first[s] if kind == _B else self.second[s]
            if held > peak:
                peak = held
        return peak

    def fits(self, rows: Rows) -> bool:
        return all(self.peak(row) <= slack for row, slack in zip(rows, self.slack, strict=True))

    def bound(self) -> float:
        """No schedule with these costs ends before this, whatever its memory.

        A device cannot start before its first stage's input is there, then has all its work to do; and
        after the last of its forwards and backwards the cotangent has its way to stage 0 before it.
        """
        f, b, i, w = self.cost
        back = [min(x, y) for x, y in zip(b, i, strict=True)]
        most = 0.0
        for of in self.of:
            head = math.fsum(f[: of[0]]) + math.fsum(self.up[: of[0]])
            work = math.fsum(f[s] + min(b[s], i[s] + w[s]) for s in of)
            chain = math.fsum(f[s] + back[s] for s in of)
            tail = math.fsum(back[1 : of[0]]) + math.fsum(self.up[: of[0]])
            tail += min(b[0], i[0] + w[0]) if of[0] else 0.0
            most = max(most, head + self.m * work, head + self.m * chain + tail)
        return most


@dataclasses.dataclass(frozen=True)
class _Found:
    """A schedule that was found, with what it is judged by."""

    makespan: float
    peak: tuple[float, float]
    rows: Rows
    rule: "_Rule | None" = None

    @staticmethod
    def of(p: _Problem, rows: Rows, rule: "_Rule | None" = None) -> "_Found":
        times = p.run(rows, p.needs(rows))
        assert times is not None, "a deadlock"
        peaks = [p.peak(row) for row in rows]
        return _Found(max(times[1]), (max(peaks), math.fsum(peaks)), rows, rule)


def _best(found: list[_Found]) -> list[_Found]:
    """The best first: by makespan, then by peak memory; rounding does not decide."""
    found = sorted(found, key=lambda x: x.makespan)
    limit = found[0].makespan * _ROUNDING
    equal = [x for x in found if x.makespan <= limit]
    return sorted(equal, key=lambda x: x.peak) + found[len(equal) :]


def _fixed(p: _Problem) -> Iterable[Rows]:
    """The schedules with a name that have this map and these sizes."""
    per_device = len(p.of[0])
    for generator, number in NAMES.values():
        if generator is zero_bubble or number not in (None, per_device):
            continue
        try:
            more = {"virtual": per_device} if number is None else {}
            schedule = generator(p.devices, p.m, **more)
        except ValueError:  # sizes that it cannot have
            continue
        if schedule.stage_to_device == p.places:
            yield [[(KINDS.index(k) * p.stages + s) * p.m + i for k, s, i in row] for row in schedule.actions]


class _Rule(NamedTuple):
    """The parameters of the list scheduler.

    Each action has a *due time*, counted in microbatches; of those that could start, a device takes
    the one that is due first.

    Attributes:
        slope: how many microbatches a device is ahead for each stage that comes after it: 1 is
            1F1B's warm-up, 2 that of the eager one, 0 lets every input gradient go first.
        fill: a `W` that is not due fills a gap that is at least this share of it.
        patience: a device waits for an input gradient that comes within this share of a forward,
            rather than start that forward.
        due: whether a `W` is due when the memory that it frees is wanted, or never.
        groups: whether `D` microbatches at a time go through a device's stages, as in interleaved 1F1B.
        share: of the limit; under no limit, of what hides everything.
        split: `I` and `W`, or `B`.
    """

    slope: float
    fill: float = 0.0
    patience: float = 0.0
    due: bool = False
    groups: bool = False
    share: float = 1.0
    split: bool = True


def _grid(p: _Problem) -> list[_Found]:
    """The list scheduler over its parameters; the best of them again with less memory."""
    several = (False, True) if p.stages > p.devices else (False,)
    slopes, patience = (0.0, 0.5, 1.0, 1.25, 1.5, 2.0, 2.5), (0.0, 0.5)
    rules = [_Rule(*x, split=False) for x in itertools.product(slopes, (0.0,), patience, (False,), several)]
    dues = (False, True) if min(p.limit) < math.inf else (False,)
    rules += [_Rule(*x) for x in itertools.product(slopes, (0.0, 0.5, 1.0), patience, dues, several)]
    found = [x for rule in rules if (x := _try(p, rule))]
    best = [x.rule for x in _best(found)[:12] if x.rule]
    less = [rule._replace(share=share, due=True) for rule in best for share in (0.9, 0.75, 0.6, 0.5, 0.4, 0.25)]
    return found + [x for rule in less if (x := _try(p, rule))]


def _try(p: _Problem, rule: _Rule) -> _Found | None:
    first, second = p.first, p.second
    size = [max(x) for x in zip(first, second, strict=True)] if rule.split else list(first)
    caps = []
    for d, of in enumerate(p.of):
        # Without a limit the shares are of two rounds of the pipeline, which is what it takes to hide all.
        full = p.limit[d] if p.limit[d] < math.inf else 2.5 * p.devices * p.whole[d]
        caps.append(p.limit[d] if rule.share == 1.0 else full * rule.share)
        if caps[d] * _ROUNDING < math.fsum(size[s] for s in of):
            return None
    return _Found.of(p, _list(p, rule, size, caps), rule)


def _due(p: _Problem, rule: _Rule, caps: list[float]) -> list[list[float]]:
    """When each action is due, by `kind * S + stage` and microbatch, on one clock for all."""
    m, stages = p.m, p.stages
    virtual = stages / p.devices
    clock = [float(i) for i in range(m)]
    if rule.groups:
        clock = [i - i % p.devices + (i % p.devices) / virtual for i in range(m)]
    step = max(rule.slope, 2.0 if rule.groups else 0.0) / 2.0 / virtual
    due = [[0.0] * m for _ in range(4 * stages)]
    for d, of in enumerate(p.of):
        ahead = [1.0 + 2.0 * step * (stages - 1 - s) for s in of]
        room = caps[d] / p.whole[d] if p.whole[d] else math.inf
        late = room - sum(ahead) / len(ahead) - 0.2 if rule.due and room < math.inf else math.inf
        for s, lead in zip(of, ahead, strict=True):
            forward = [t + step * s for t in clock]
            # At equal dues the input gradient goes first, then what is deeper.
            due[_F * stages + s] = [t - 1e-3 * s for t in forward]
            backward = [t + lead - 0.5 - 1e-4 * s for t in forward]
            due[_B * stages + s] = due[_I * stages + s] = backward
            due[_W * stages + s] = [t + 0.5 + late for t in backward]
    return due


def _list(p: _Problem, rule: _Rule, size: list[float], caps: list[float]) -> Rows:
    """Each device, whenever it is free, takes the action that is due first of those that could start."""
    m, stages, places = p.m, p.stages, p.places
    backward = _I if rule.split else _B
    due = _due(p, rule, caps)
    due_f, due_b, due_w = (due[k * stages : (k + 1) * stages] for k in (_F, backward, _W))
    took_f, took_b, took_w = p.cost[_F], p.cost[backward], p.cost[_W]
    forward_at = [[0.0] * m, *([math.inf] * m for _ in range(stages - 1))]
    backward_at = [[math.inf] * m for _ in range(stages)]
    forwards, backwards, weights = [0] * stages, [0] * stages, [0] * stages
    done = weights if rule.split else backwards
    second = p.second if rule.split else [0.0] * stages
    free, held = [0.0] * p.devices, [0.0] * p.devices
    caps = [cap * _ROUNDING for cap in caps]
    rows: Rows = [[] for _ in range(p.devices)]

    def admits(d: int, stage: int) -> bool:
        """Whether the forward fits, and every microbatch can still be finished, the oldest first."""
        room = caps[d] - held[d] - size[stage]
        if room < 0.0 or len(p.of[d]) == 1:
            return room >= 0.0
        of, new = p.of[d], forwards[stage]
        for i in range(min(done[s] for s in of), max(forwards[s] for s in of) + 1):
            wants = has = 0.0
            for s in of:
                if forwards[s] <= i and not (s == stage and i == new):
                    wants += size[s]
                elif backwards[s] <= i:
                    has += size[s]
                elif weights[s] <= i:
                    has += second[s]
            if wants > room:
                return False
            room += has
        return True

    wakes = [(0.0, d) for d in range(p.devices)]
    while wakes:
        now, d = heapq.heappop(wakes)
        if now < free[d]:
            continue
        best, best_due = (-1, -1), math.inf
        weight, weight_due = -1, math.inf
        arrival = gradient = math.inf  # the next that is known to come
        for s in p.of[d]:
            n = backwards[s]
            if n < m:
                at = backward_at[s][n]
                if at > now:
                    gradient = min(gradient, at)
                elif due_b[s][n] < best_due:
                    best, best_due = (backward, s), due_b[s][n]
            n = forwards[s]
            if n < m and (at := forward_at[s][n]) < math.inf and (at > now or due_f[s][n] < best_due) and admits(d, s):
                if at > now:
                    arrival = min(arrival, at)
                else:
                    best, best_due = (_F, s), due_f[s][n]
            if rule.split and weights[s] < backwards[s] and (weight < 0 or due_w[s][weights[s]] < weight_due):
                weight, weight_due = s, due_w[s][weights[s]]
        arrival = min(arrival, gradient)
        if best[0] == _F and gradient < now + rule.patience * took_f[best[1]]:
            best, arrival = (-1, -1), gradient
        if weight >= 0:
            late = weight_due < best_due
            if late if best[0] >= 0 else arrival - now >= rule.fill * took_w[weight]:
                best = (_W, weight)
        kind, s = best
        if kind < 0:
            if arrival < math.inf:
                heapq.heappush(wakes, (arrival, d))
            continue
        counts, took = {_F: (forwards, took_f), backward: (backwards, took_b), _W: (weights, took_w)}[kind]
        i = counts[s]
        counts[s] += 1
        end = free[d] = now + took[s]
        rows[d].append((kind * stages + s) * m + i)
        heapq.heappush(wakes, (end, d))
        other = -1
        if kind == _F:
            held[d] += size[s]
            if s + 1 < stages:
                forward_at[s + 1][i] = at = end + p.up[s]
                other = places[s + 1]
            else:
                backward_at[s][i] = at = end
        elif kind == backward:
            held[d] += second[s] - size[s]
            at = end
            if s:
                backward_at[s - 1][i] = at = end + p.up[s - 1]
                other = places[s - 1]
        else:
            held[d] -= second[s]
            at = end
        if other >= 0:
            heapq.heappush(wakes, (max(at, free[other]), other))
    assert sum(map(len, rows)) == (2 + rule.split) * p.size, "stuck"
    return rows


def _toggle(p: _Problem, found: _Found) -> _Found:
    """Fuse each `I` and the `W` right behind it to a `B`, or split a `B`, where the makespan gains."""
    f_, b, i, w = p.cost
    cheaper = [x < y + z for x, y, z in zip(b, i, w, strict=True)]

    def pairs(rows: Rows) -> list[int]:
        together = []
        for row in rows:
            for x, y in itertools.pairwise(row):
                if x // p.size == _I and y - x == p.size and cheaper[x % p.size // p.m]:
                    together.append(x % p.size)
        return together

    def fused(rows: Rows, which: set[int]) -> Rows:
        return [
            [a - p.size if a // p.size == _I and a % p.size in which else a
             for a in row if a // p.size < _W or a % p.size not in which]
            for row in rows
        ]  # fmt: skip

    def split(rows: Rows, which: set[int]) -> Rows:
        out: Rows = []
        for row in rows:
            new: list[int] = []
            for a in row:
                new += (a + p.size, a + 2 * p.size) if a // p.size == _B and a % p.size in which else (a,)
            out.append(new)
        return out

    if any(cheaper):
        found = _halving(p, found, pairs(found.rows), fused)
    return _halving(p, found, [a % p.size for row in found.rows for a in row if a // p.size == _B], split)


def _halving(p: _Problem, found: _Found, which: list[int], change: Callable[[Rows, set[int]], Rows]) -> _Found:
    """Change as many as make it better, a half at a time."""
    todo = [which] if which else []
    trials = 0
    while todo and trials < 64:
        some = todo.pop()
        trials += 1
        rows = change(found.rows, set(some))
        if p.fits(rows) and (changed := _Found.of(p, rows)).makespan < found.makespan:
            found = changed
        elif len(some) > 1:
            todo += [some[len(some) // 2 :], some[: len(some) // 2]]
    return found


def _anneal(p: _Problem, found: _Found, bound: float, seed: int) -> _Found:
    """Move one action at a time on the critical path, at first also where it gets a little worse."""
    rng = random.Random(seed)
    pick = lambda n: int(rng.random() * n)  # noqa: E731 - the same in every release of Python
    rows, need = [list(row) for row in found.rows], p.needs(found.rows)
    times = p.run(rows, need)
    assert times is not None
    starts, ends = times
    now = best = found.makespan
    best_rows = found.rows
    where = {a: (d, n) for d, row in enumerate(rows) for n, a in enumerate(row)}
    trials = max(200, min(2000, 1_000_000 // len(where)))
    hot = 0.05 * math.fsum(p.took) / len(p.took)
    tried = 0
    for _ in range(10 * trials):
        if tried == trials or best <= bound:
            break
        blocks = _critical(rows, need, starts, ends, p.lag, where, pick)
        if not blocks:
            break
        d, low, high = blocks[pick(len(blocks))]
        row = rows[d]
        x = low + pick(high - low + 1)
        y = (x + 1, low, high, x - 6 + pick(13), x - 6 + pick(13), x + 1)[pick(6)]
        y = max(0, min(len(row) - 1, y))
        new = row[:x] + row[x + 1 :]
        new.insert(y, row[x])
        a, z = min(x, y), max(x, y) + 1
        if x == y or not _keeps_order(new[a:z], p.size) or p.peak(new) > p.slack[d]:
            continue
        tried += 1
        rows[d] = new
        times = p.run(rows, need)
        if times is None or max(times[1]) > now + hot * rng.random() * (1.0 - tried / trials):
            rows[d] = row
            continue
        starts, ends = times
        now = max(ends)
        where.update((new[n], (d, n)) for n in range(a, z))
        if now < best:
            best, best_rows = now, [list(row) for row in rows]
    return _Found.of(p, best_rows)


def _critical(
    rows: Rows,
    need: list[int],
    starts: list[float],
    ends: list[float],
    lag: list[float],
    where: dict[int, tuple[int, int]],
    pick: Callable[[int], int],
) -> list[tuple[int, int, int]]:
    """A critical path from its end, as the stretches `(device, first, last)` that it runs without a gap."""
    d = max(range(len(rows)), key=lambda d: ends[rows[d][-1]])
    n = high = len(rows[d]) - 1
    blocks = []
    while True:
        a = rows[d][n]
        in_row = n > 0 and ends[rows[d][n - 1]] == starts[a]
        from_other = need[a] >= 0 and ends[need[a]] + lag[a] == starts[a]
        if in_row and not (from_other and pick(2)):
            n -= 1
            continue
        if high > n:
            blocks.append((d, n, high))
        if not from_other:
            return blocks
        d, n = where[need[a]]
        high = n


def _keeps_order(part: list[int], size: int) -> bool:
    """Whether each `F` is before its `B` or `I`, and each `I` before its `W`, as far as they are here."""
    last: dict[int, int] = {}
    for a in part:
        if last.get(a % size, -1) > a:
            return False
        last[a % size] = a
    return True
