"""A schedule made for given costs and a memory limit.

After the automatic scheduling of Zero Bubble (Qi et al., arXiv 2401.10241), with the
limit as the knob of Controllable Memory (arXiv 2405.15362). As there: a list scheduler
with a few parameters, tried over a grid. It departs in three things: the parameters are
the slope of the warm-up and how soon a `W` is due, so that the fixed schedules lie near
the grid; the fixed schedules take part, so that the result is never worse; and a local
search on the critical path has the last word, as in job-shop scheduling (Nowicki and
Smutnicki), where a `W` is what moves most freely.

Everything is decided by counts, never by the clock: the same call gives the same
schedule.
"""

import heapq
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fpipe.schedules._action import KINDS, Action
from fpipe.schedules._costs import Costs
from fpipe.schedules._generators.sizes import looped_stages as looped_map
from fpipe.schedules._generators.sizes import v_shaped_stages as v_map
from fpipe.schedules._improve import anneal, cheaper, promise, toggle
from fpipe.schedules._names import NAMES, named
from fpipe.schedules._numbering import B, F, I, Rows, W
from fpipe.schedules._problem import ROUNDING, Found, Problem, best_first
from fpipe.schedules._schedule import Schedule


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

    Never later than any schedule of `NAMES` with the same map that keeps the limit,
    under `simulate` with the same costs; of equal ones the one that holds least. `I`
    and `W` are split where that pays. With equal costs and no limit, idle time is
    `(D-1)F` for one stage per device, all of it the fill. Seconds for 16 devices and 64
    microbatches.

    Arguments:
        devices: `D`.
        microbatches: `m`.
        costs: what the actions take and hold; default `Costs()`.
        memory: the most a device may hold, in the unit of `costs.memory`: one number,
            or one per device; left out, there is no limit.
        placement: `"one"` (stage `s` on device `s`), `"v"` (device `d` holds stages `d`
            and `2D-1-d`), `"looped"` (stage `s` on device `s % D`), or the device of
            each stage.
        virtual: `v`, the stages per device of `"looped"`.

    Returns:
        The `Schedule`, named `zero_bubble`.

    Raises:
        TypeError: something of the wrong type.
        ValueError: sizes that make no sense, or a limit under what one microbatch alone
            needs; the message says how much that is.

    Example:
        `fpipe.Pipe(..., schedule=functools.partial(zero_bubble, costs=costs,
        memory=6))`
    """
    for what, value in (
        ("devices", devices),
        ("microbatches", microbatches),
        ("virtual", virtual),
    ):
        if type(value) is not int:
            raise TypeError(f"`zero_bubble({what}={value!r})`: an int")
        if value < 1:
            raise ValueError(f"`zero_bubble({what}={value!r})`: at least 1")
    p = Problem(
        devices,
        microbatches,
        _places(devices, placement, virtual),
        costs or Costs(),
        memory,
    )
    found = [Found.of(p, rows) for rows in _fixed(p) if p.fits(rows)]
    found += _grid(p)
    found = best_first(found)
    bound = p.bound() * ROUNDING
    if found[0].makespan > bound:
        finalists = found[:3]
        if cheaper(p):
            whole = [x for x in found if x.rule and not x.rule.split]
            finalists = [
                found[0],
                *sorted(found, key=lambda x: promise(p, x))[:2],
                *whole[:1],
            ]
        found += [
            anneal(p, toggle(p, x), bound, seed) for seed, x in enumerate(finalists)
        ]
    best = best_first(found)[0]
    actions = [
        [
            Action(KINDS[k], *divmod(at, p.m))
            for k, at in (divmod(a, p.size) for a in row)
        ]
        for row in best.rows
    ]
    return Schedule(actions, p.places, name="zero_bubble")


def _places(devices: int, placement: Any, virtual: int) -> tuple[int, ...]:
    known = {
        "one": looped_map(devices, 1),
        "v": v_map(devices),
        "looped": looped_map(devices, virtual),
    }
    call = f"`zero_bubble(placement={placement!r})`"
    if isinstance(placement, str):
        if placement not in known:
            raise ValueError(
                f"{call}: {', '.join(map(repr, known))}, or the device of each stage"
            )
        return tuple(known[placement])
    places: tuple[Any, ...] = (
        tuple(placement) if isinstance(placement, Iterable) else (None,)
    )
    if any(type(d) is not int for d in places):
        raise TypeError(
            f"{call}: {', '.join(map(repr, known))}, or the device of each stage"
        )
    if set(places) != set(range(devices)):
        raise ValueError(
            f"{call}: each of the devices 0 to {devices - 1} has a stage, and there "
            "are no others"
        )
    return places


def _fixed(p: Problem) -> Iterable[Rows]:
    """The schedules with a name that have this map and these sizes."""
    per_device = len(p.of[0])
    for name in NAMES:
        try:
            schedule = named(name, p.devices, p.m, per_device)
        except ValueError:  # sizes that it cannot have
            continue
        if schedule.stage_to_device == p.places and schedule.backwards:
            yield p.numbering.rows(schedule)


class _Rule(NamedTuple):
    """The parameters of the list scheduler.

    Each action has a *due time*, counted in microbatches; of those that could start, a
    device takes the one that is due first.

    Attributes:
        slope: how many microbatches a device is ahead for each stage that comes after
            it: 1 is 1F1B's warm-up, 2 that of the eager one, 0 lets every input
            gradient go first.
        fill: a `W` that is not due fills a gap that is at least this share of it.
        patience: a device waits for an input gradient that comes within this share of a
            forward, rather than start that forward.
        due: whether a `W` is due when the memory that it frees is wanted, or never.
        groups: whether `D` microbatches at a time go through a device's stages, as in
            interleaved 1F1B.
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


def _grid(p: Problem) -> list[Found]:
    """The list scheduler over its parameters; the best of them again with less memory."""
    slopes, patience = (0.0, 0.5, 1.0, 1.25, 1.5, 2.0, 2.5), (0.0, 0.5)
    dues = (False, True) if min(p.limit) < math.inf else (False,)
    orders = [(slope, False) for slope in slopes]
    if p.stages > p.devices:
        orders += [(2.0, True), (2.5, True)]
    rules = [
        _Rule(slope, 0.0, x, False, groups, split=False)
        for (slope, groups), x in itertools.product(orders, patience)
    ]
    rules += [
        _Rule(slope, fill, x, due, groups)
        for (slope, groups), fill, x, due in itertools.product(
            orders, (0.0, 0.5, 1.0), patience, dues
        )
    ]
    found = [x for rule in rules if (x := _try(p, rule))]
    best = [x.rule for x in best_first(found)[:8] if x.rule]
    less = [
        rule._replace(share=share, due=True)
        for rule in best
        for share in (0.9, 0.75, 0.6, 0.5, 0.35)
    ]
    return found + [x for rule in less if (x := _try(p, rule))]


def _try(p: Problem, rule: _Rule) -> Found | None:
    first, second = p.first, p.second
    size = (
        [max(x) for x in zip(first, second, strict=True)] if rule.split else list(first)
    )
    caps = []
    for d, of in enumerate(p.of):
        # Without a limit the shares are of two rounds of the pipeline, which is what it
        # takes to hide all.
        full = p.limit[d] if p.limit[d] < math.inf else 2.5 * p.devices * p.whole[d]
        caps.append(p.limit[d] if rule.share == 1.0 else full * rule.share)
        if caps[d] * ROUNDING < math.fsum(size[s] for s in of):
            return None
    return Found.of(p, _list(p, rule, size, caps), rule)


def _due(p: Problem, rule: _Rule, caps: list[float]) -> list[list[float]]:
    """When each action is due, by `kind * S + stage` and microbatch, on one clock for
    all.
    """
    m, stages = p.m, p.stages
    virtual = stages / p.devices
    clock = [float(i) for i in range(m)]
    if rule.groups:
        clock = [i - i % p.devices + (i % p.devices) / virtual for i in range(m)]
    step = rule.slope / 2.0 / virtual
    due = [[0.0] * m for _ in range(4 * stages)]
    for d, of in enumerate(p.of):
        ahead = [1.0 + 2.0 * step * (stages - 1 - s) for s in of]
        room = caps[d] / p.whole[d] if p.whole[d] else math.inf
        late = (
            room - sum(ahead) / len(ahead) - 0.2
            if rule.due and room < math.inf
            else math.inf
        )
        for s, lead in zip(of, ahead, strict=True):
            forward = [t + step * s for t in clock]
            # At equal dues the input gradient goes first, then what is deeper.
            due[F * stages + s] = [t - 1e-3 * s for t in forward]
            backward = [t + lead - 0.5 - 1e-4 * s for t in forward]
            due[B * stages + s] = due[I * stages + s] = backward
            due[W * stages + s] = [t + 0.5 + late for t in backward]
    return due


def _list(p: Problem, rule: _Rule, size: list[float], caps: list[float]) -> Rows:
    """Each device, whenever it is free, takes the action that is due first of those
    that could start.
    """
    m, stages, places = p.m, p.stages, p.places
    backward = I if rule.split else B
    due = _due(p, rule, caps)
    due_f, due_b, due_w = (due[k * stages : (k + 1) * stages] for k in (F, backward, W))
    took_f, took_b, took_w = p.cost[F], p.cost[backward], p.cost[W]
    forward_at = [[0.0] * m, *([math.inf] * m for _ in range(stages - 1))]
    backward_at = [[math.inf] * m for _ in range(stages)]
    forwards, backwards, weights = [0] * stages, [0] * stages, [0] * stages
    done = weights if rule.split else backwards
    second = p.second if rule.split else [0.0] * stages
    free, held = [0.0] * p.devices, [0.0] * p.devices
    caps = [cap * ROUNDING for cap in caps]
    rows: Rows = [[] for _ in range(p.devices)]

    def admits(d: int, stage: int) -> bool:
        """Whether the forward fits, and every microbatch can still be finished, the
        oldest first.
        """
        room = caps[d] - held[d] - size[stage]
        if room < 0.0 or room == math.inf or len(p.of[d]) == 1:
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
            if (
                n < m
                and (at := forward_at[s][n]) < math.inf
                and (at > now or due_f[s][n] < best_due)
                and admits(d, s)
            ):
                if at > now:
                    arrival = min(arrival, at)
                else:
                    best, best_due = (F, s), due_f[s][n]
            if (
                rule.split
                and weights[s] < backwards[s]
                and (weight < 0 or due_w[s][weights[s]] < weight_due)
            ):
                weight, weight_due = s, due_w[s][weights[s]]
        arrival = min(arrival, gradient)
        if best[0] == F and gradient < now + rule.patience * took_f[best[1]]:
            best, arrival = (-1, -1), gradient
        if weight >= 0:
            late = weight_due < best_due
            if late if best[0] >= 0 else arrival - now >= rule.fill * took_w[weight]:
                best = (W, weight)
        kind, s = best
        if kind < 0:
            if arrival < math.inf:
                heapq.heappush(wakes, (arrival, d))
            continue
        counts, took = {
            F: (forwards, took_f),
            backward: (backwards, took_b),
            W: (weights, took_w),
        }[kind]
        i = counts[s]
        counts[s] += 1
        end = free[d] = now + took[s]
        rows[d].append((kind * stages + s) * m + i)
        heapq.heappush(wakes, (end, d))
        other = -1
        if kind == F:
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
