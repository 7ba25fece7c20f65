"""When everything runs: a schedule under given costs becomes a timeline."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from fpipe.schedules._schedule import Action, Schedule, dependencies

Cost: TypeAlias = float | Sequence[float]


@dataclasses.dataclass(frozen=True)
class Costs:
    """What each action takes, in any unit of time: one number, or one number per stage.

    Arguments:
        F: a forward.
        B: a full backward; left out it is `I + W`.
        I: an input gradient.
        W: a weight gradient.
        transfer: latency between two different devices.
    """

    F: Cost = 1.0
    B: Cost | None = None
    I: Cost = 1.0  # noqa: E741 - the letter of the literature
    W: Cost = 1.0
    transfer: float = 0.0

    def of(self, action: Action) -> float:
        """The cost of one action."""
        if action.kind == "B" and self.B is None:
            return _at(self.I, action.stage) + _at(self.W, action.stage)
        cost = getattr(self, action.kind)
        return _at(cost, action.stage)


class Event(NamedTuple):
    """One action with its device, start and end."""

    device: int
    action: Action
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Events in the order in which they start (ties by device), predicted or measured."""

    events: tuple[Event, ...]
    devices: int
    name: str = "custom"

    @property
    def makespan(self) -> float:
        """From the first start to the last end."""
        return max(e.end for e in self.events) - min(e.start for e in self.events)

    @property
    def bubble(self) -> float:
        """The idle share of device time, 0 to 1."""
        work = sum(e.end - e.start for e in self.events)
        total = self.makespan * self.devices
        return 1.0 - work / total if total else 0.0

    @property
    def peak_live(self) -> tuple[int, ...]:
        """For each device the most (stage, microbatch) pairs held at once, from `F` to `B` or `W`."""
        live, peak = [0] * self.devices, [0] * self.devices
        for e in sorted(self.events, key=lambda e: (e.start, e.end)):
            if e.action.kind == "F":
                live[e.device] += 1
                peak[e.device] = max(peak[e.device], live[e.device])
            elif e.action.kind in "BW":
                live[e.device] -= 1
        return tuple(peak)


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Run a schedule on paper: every action starts when its device is free and its inputs are there.

    Arguments:
        schedule: any `Schedule`.
        costs: default `Costs()`, a forward of 1 and a backward of 2.

    Returns:
        The `Timeline`.
    """
    costs = Costs() if costs is None else costs
    split = {a[1:] for row in schedule.actions for a in row if a.kind == "I"}
    places = schedule.stage_to_device
    ends: dict[Action, float] = {}
    events: list[Event] = []
    free = [0.0] * schedule.devices
    next_ = [0] * schedule.devices
    waiting: dict[Action, list[int]] = {}
    ready = list(range(schedule.devices))
    while ready:
        d = ready.pop()
        row = schedule.actions[d]
        while next_[d] < len(row):
            a = row[next_[d]]
            start, missing = free[d], None
            for n in dependencies(a, schedule.stages, (a.stage + 1, a.microbatch) in split):
                if n not in ends:
                    missing = n
                    break
                start = max(start, ends[n] + (costs.transfer if places[n.stage] != d else 0.0))
            if missing is not None:
                waiting.setdefault(missing, []).append(d)
                break
            free[d] = ends[a] = start + costs.of(a)
            events.append(Event(d, a, start, free[d]))
            next_[d] += 1
            ready.extend(waiting.pop(a, ()))
    events.sort(key=lambda e: (e.start, e.device, e.end))
    return Timeline(tuple(events), schedule.devices, schedule.name)


def _at(cost: Cost, stage: int) -> float:
    return float(cost[stage]) if isinstance(cost, Sequence) else float(cost)
