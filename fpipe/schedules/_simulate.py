"""When everything runs: a schedule under given costs becomes a timeline."""

import dataclasses
import itertools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple, TypeAlias

from fpipe.schedules._schedule import KINDS, Action, Schedule
from fpipe.schedules._trace import Span, trace

Cost: TypeAlias = float | Sequence[float]

F, B, I, W = range(len(KINDS))  # noqa: E741 - the letter of the literature

Rows: TypeAlias = list[list[int]]


@dataclasses.dataclass(frozen=True)
class Costs:
    """What each action takes, in any unit of time, and what it holds, in any unit of
    memory.

    Each is one number, or one number per stage; `transfer` is one number. All are
    finite and not negative.

    Arguments:
        F: a forward.
        B: a full backward; left out it is `I + W`.
        I: an input gradient.
        W: a weight gradient.
        transfer: latency between two different devices.
        memory: what a microbatch holds on a stage from the start of its `F` to the end
            of its `B` or `I`.
        memory_w: what it holds from there to the end of its `W`; left out, all of
            `memory`.

    Raises:
        TypeError: something that is neither a number nor a sequence of numbers.
        ValueError: a number that is negative, infinite or NaN.
    """

    F: Cost = 1.0
    B: Cost | None = None
    I: Cost = 1.0  # noqa: E741 - the letter of the literature
    W: Cost = 1.0
    transfer: float = 0.0
    memory: Cost = 1.0
    memory_w: Cost | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            each = "" if field.name == "transfer" else "stage"
            object.__setattr__(
                self, field.name, checked(f"Costs({field.name}={value!r})", each, value)
            )

    def of(self, action: Action) -> float:
        """The cost of one action."""
        if action.kind == "B" and self.B is None:
            return _at(self.I, action.stage) + _at(self.W, action.stage)
        return _at(getattr(self, action.kind), action.stage)

    def holds(self, stage: int) -> tuple[float, float]:
        """What a microbatch holds on a stage from `F` to `B` or `I`, and from `I` to
        `W`.
        """
        memory = _at(self.memory, stage)
        return memory, memory if self.memory_w is None else _at(self.memory_w, stage)

    def check(self, stages: int) -> None:
        """Refuse costs per stage that are not those of `stages` stages, with a
        `ValueError`.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple) and len(value) != stages:
                raise ValueError(
                    f"`Costs({field.name}={value!r})`: {len(value)} numbers for "
                    f"{stages} stages"
                )


class Event(NamedTuple):
    """One action with its device, start and end."""

    device: int
    action: Action
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What ran when, predicted or measured.

    Arguments:
        events: in the order in which they start, ties by device; where actions take no
            time, what waits for another comes after it.
        devices: `D`.
        name: for drawings.
        memory: for each stage what a microbatch holds there from `F` to `B` or `I`, and
            from `I` to `W`; left out, 1 and 1.
    """

    events: tuple[Event, ...]
    devices: int
    name: str = "custom"
    memory: tuple[tuple[float, float], ...] = ()

    @property
    def makespan(self) -> float:
        """From the first start to the last end."""
        return max(e.end for e in self.events) - min(e.start for e in self.events)

    @property
    def idle(self) -> tuple[float, ...]:
        """For each device the makespan minus its work."""
        work = [0.0] * self.devices
        for e in self.events:
            work[e.device] += e.end - e.start
        makespan = self.makespan
        return tuple(makespan - w for w in work)

    @property
    def bubble(self) -> float:
        """The idle share of device time, 0 to 1."""
        work = sum(e.end - e.start for e in self.events)
        total = self.makespan * self.devices
        return 1.0 - work / total if total else 0.0

    @property
    def peak_live(self) -> tuple[int, ...]:
        """For each device the most (stage, microbatch) pairs held at once, from `F` to
        `B` or `W`.
        """
        live, peak = [0] * self.devices, [0] * self.devices
        for e in self._in_order():
            if e.action.kind == "F":
                live[e.device] += 1
                peak[e.device] = max(peak[e.device], live[e.device])
            elif e.action.kind in "BW":
                live[e.device] -= 1
        return tuple(peak)

    @property
    def peak_memory(self) -> tuple[float, ...]:
        """For each device the most memory held at once; forwards alone hold theirs to
        the end.
        """
        # Counted, and multiplied afresh each time: a running sum of floats would drift.
        first: list[dict[int, int]] = [{} for _ in range(self.devices)]
        second: list[dict[int, int]] = [{} for _ in range(self.devices)]
        peak = [0.0] * self.devices
        for d, (kind, s, _), _, _ in self._in_order():
            before, after = first[d], second[d]
            if kind == "F":
                before[s] = before.get(s, 0) + 1
            elif kind == "W":
                after[s] -= 1
            else:
                before[s] -= 1
                if kind == "I":
                    after[s] = after.get(s, 0) + 1
            if kind in "FI":
                held = math.fsum(n * self._holds(s)[0] for s, n in before.items())
                held += math.fsum(n * self._holds(s)[1] for s, n in after.items())
                peak[d] = max(peak[d], held)
        return tuple(peak)

    def to_trace(self, unit: float = 1e6) -> str:
        """The timeline as JSON that https://ui.perfetto.dev and `chrome://tracing`
        show, a process for each device.

        Arguments:
            unit: microseconds that a unit of time takes; the default is for seconds.
        """
        return trace(
            [f"device {d}" for d in range(self.devices)],
            {"actions": self._spans()},
            unit,
        )

    def _spans(self) -> list[Span]:
        return [
            Span(
                d,
                a.name,
                a.kind,
                start,
                end,
                {"stage": a.stage, "microbatch": a.microbatch},
            )
            for d, a, start, end in self.events
        ]

    def _holds(self, stage: int) -> tuple[float, float]:
        return self.memory[stage] if self.memory else (1.0, 1.0)

    def _in_order(self) -> list[Event]:
        # A device runs one action after the other, so at equal starts its events
        # already stand in their order; times alone cannot tell it where an action takes
        # none.
        return sorted(self.events, key=lambda e: e.start)


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Run a schedule on paper: every action starts when its device is free and its
    inputs are there.

    Arguments:
        schedule: any `Schedule`.
        costs: default `Costs()`, a forward of 1 and a backward of 2.

    Returns:
        The `Timeline`.

    Raises:
        ValueError: costs per stage, but not as many as there are stages.
    """
    costs = Costs() if costs is None else costs
    stages, m, places = schedule.stages, schedule.microbatches, schedule.stage_to_device
    costs.check(stages)
    rows = numbered(schedule)
    need = needs(rows, stages, m)
    ran = play(rows, need, durations(costs, stages, m), lags(costs, places, m))
    assert ran is not None, "a deadlock"
    done, starts, ends = ran
    # At equal starts by device, except that what waits for an action that takes no time
    # is behind it.
    level = [0] * len(starts)
    before = {b: a for row in rows for a, b in itertools.pairwise(row)}
    for a in done:
        for first in (need[a], before.get(a, -1)):
            if first >= 0 and starts[first] == starts[a]:
                level[a] = max(level[a], level[first] + 1)
    order = sorted(
        (starts[a], level[a], d, n, a)
        for d, row in enumerate(rows)
        for n, a in enumerate(row)
    )
    events = tuple(
        Event(d, schedule.actions[d][n], start, ends[a]) for start, _, d, n, a in order
    )
    return Timeline(
        events,
        schedule.devices,
        schedule.name,
        tuple(costs.holds(s) for s in range(stages)),
    )


# --- the clock, on actions as numbers, `(kind * S + stage) * m + microbatch`: a large schedule has 10^5 of them ---


def numbered(schedule: Schedule) -> Rows:
    """The actions of each device as numbers."""
    stages, m = schedule.stages, schedule.microbatches
    base = {
        (k, s): (n * stages + s) * m for n, k in enumerate(KINDS) for s in range(stages)
    }
    return [[base[k, s] + i for k, s, i in row] for row in schedule.actions]


def needs(rows: Rows, stages: int, m: int) -> list[int]:
    """For each action what it needs from another stage, or -1; its own forward, or `I`,
    is earlier in its very row.
    """
    size = stages * m
    need = [-1] * (4 * size)
    need[m:size] = range(size - m)
    backward = [0] * size
    for row in rows:
        for a in row:
            if size <= a < W * size:
                backward[a % size] = a
    if any(backward):  # else forwards alone
        for at in range(size - m):
            need[backward[at]] = backward[at + m]
    return need


def durations(costs: Costs, stages: int, m: int) -> list[float]:
    """What each action takes."""
    return [
        took
        for k in KINDS
        for s in range(stages)
        for took in [costs.of(Action(k, s, 0))] * m
    ]


def lags(costs: Costs, places: Sequence[int], m: int) -> list[float]:
    """The latency of what each action needs from another stage."""
    up = [costs.transfer if a != b else 0.0 for a, b in itertools.pairwise(places)]
    down = [lag for lag in (*up, 0.0) for _ in range(m)]
    return [
        *(lag for lag in (0.0, *up) for _ in range(m)),
        *down,
        *down,
        *([0.0] * len(down)),
    ]


def play(
    rows: Rows, need: Sequence[int], took: Sequence[float], lag: Sequence[float]
) -> tuple[list[int], list[float], list[float]] | None:
    """Every action as soon as its device is free and what it needs is there.

    Returns:
        The actions in an order in which each is behind what it waits for, and all
        starts and ends by action; `None` if it is a deadlock.
    """
    starts, ends, done = [0.0] * len(need), [-1.0] * len(need), list[int]()
    free, next_ = [0.0] * len(rows), [0] * len(rows)
    waiting: dict[int, int] = {}
    ready = list(range(len(rows)))
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
            done.append(a)
            if a in waiting:
                ready.append(waiting.pop(a))
    return None if waiting else (done, starts, ends)


def checked(call: str, each: str, value: Any) -> float | tuple[float, ...]:
    """A number as a float, or numbers, one per `each`, as a tuple of floats; `call` is
    for the message.
    """
    several = isinstance(value, Iterable) and not isinstance(
        value, (str, bytes, Mapping, Set)
    )
    if several and each and getattr(value, "ndim", 1):
        return tuple(_number(call, each, v) for v in value)
    return _number(call, each, value)


def _number(call: str, each: str, value: Any) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(
            f"`{call}`: a number{f', or one number per {each}' if each else ''}"
        )
    if not 0.0 <= float(value) < math.inf:
        raise ValueError(f"`{call}`: finite and not negative")
    return float(value)


def _at(cost: Cost, stage: int) -> float:
    return cost[stage] if isinstance(cost, Sequence) else cost
