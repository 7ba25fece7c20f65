"""Ticks: a schedule in lock step, for a program that runs the same on every device.

In: the actions of each device, in order. Out: `Ticks`, a table with a row for each tick
and an entry for each of its phases and each device.

A tick has one phase or two. In each phase a device runs at most one action, and what an
action sends arrives at the end of its phase. Two forms come from the same `Schedule`,
the order of every device kept:

- one action in each tick;
- at most one forward and then one backward (or half of one) in each tick, which lets a
  forward on one device run beside a backward on another without either waiting for the
  other's kind.

`eager_1f1b` on two devices with three microbatches, in both forms:

                  one action            a forward, then a backward
    tick      device 0   device 1       device 0       device 1
    0         F0                        F0
    1         F1         F0             F1             F0  B0
    2         F2         B0             F2  B0         F1  B1
    3         B0         F1                 B1         F2  B2
    4                    B1                 B2
    5         B1         F2
    6                    B2
    7         B2

A tick lasts as long as its most expensive device, so which form is cheaper depends on
the schedule and the costs.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

from fpipe.schedules import Action, Costs, Schedule

# Action or nothing, for each device.
Phase: TypeAlias = tuple[Action | None, ...]

# The kinds that may run in each phase of a tick.
ONE_ACTION = ("FBIW",)
FORWARD_THEN_BACKWARD = ("F", "BIW")


@dataclasses.dataclass(frozen=True)
class Ticks:
    """Actions in lock step.

    Attributes:
        phases: the kinds of each phase of a tick.
        rows: for each tick its phases.
    """

    phases: tuple[str, ...]
    rows: tuple[tuple[Phase, ...], ...]

    def cost(self, costs: Costs) -> float:
        """The time that all ticks take, each as long as its most expensive device."""
        total = 0.0
        for row in self.rows:
            devices = [0.0] * len(row[0])
            for phase in row:
                for d, action in enumerate(phase):
                    if action is not None:
                        devices[d] += costs.of(action)
            total += max(devices)
        return total

    def positions(self, start: int = 0) -> dict[Action, int]:
        """The phase in which each action runs, counted from `start`."""
        out: dict[Action, int] = {}
        for row in self.rows:
            for phase in row:
                for action in phase:
                    if action is not None:
                        out[action] = start
                start += 1
        return out


def ticks_of(
    schedule: Schedule, forwards_alone: bool, backwards: bool, recomputes: bool
) -> list[Ticks]:
    """The ticks of a call, one entry for each loop.

    Arguments:
        forwards_alone: whether all forwards come before all backwards, in a loop of
            their own.
        backwards: whether there are backwards.
        recomputes: whether backwards recompute their forwards.
    """
    # Recomputing takes another forward.
    costs = Costs(F=1.0, B=2.0, I=1.0, W=1.0)
    if recomputes:
        costs = Costs(F=1.0, B=3.0, I=2.0, W=1.0)
    rows = schedule.actions
    loops: list[Sequence[Sequence[Action]]] = [rows]
    if forwards_alone:
        loops = [[[a for a in row if a.kind == "F"] for row in rows]]
        if backwards:
            loops.append([[a for a in row if a.kind != "F"] for row in rows])
    return [cheapest(actions, schedule.stages, costs) for actions in loops]


def cheapest(actions: Sequence[Sequence[Action]], stages: int, costs: Costs) -> Ticks:
    """The cheaper of the two forms; of equal ones the one with a single phase.

    Arguments:
        actions: of each device, in order.
    """
    best = lock_step(actions, stages, ONE_ACTION)
    kinds = {a.kind for row in actions for a in row}
    if "F" in kinds and len(kinds) > 1:
        other = lock_step(actions, stages, FORWARD_THEN_BACKWARD)
        if other.cost(costs) < best.cost(costs):
            return other
    return best


def lock_step(
    actions: Sequence[Sequence[Action]], stages: int, phases: tuple[str, ...]
) -> Ticks:
    """Every action in the first phase in which its turn has come and what it needs from
    its neighbour is there. What it needs from its own device is, by the order.
    """
    forwards = set[tuple[int, int]]()
    backwards = set[tuple[int, int]]()
    position = [0] * len(actions)
    left = sum(map(len, actions))
    rows: list[tuple[Phase, ...]] = []
    while left:
        before = left
        tick: list[Phase] = []
        for kinds in phases:
            phase: list[Action | None] = [None] * len(actions)
            for d, row in enumerate(actions):
                if position[d] == len(row) or row[position[d]].kind not in kinds:
                    continue
                kind, s, i = action = row[position[d]]
                if kind == "F":
                    may_run = s == 0 or (s - 1, i) in forwards
                elif kind == "W":
                    may_run = True
                else:
                    may_run = s == stages - 1 or (s + 1, i) in backwards
                if may_run:
                    phase[d] = action
            for d, action in enumerate(phase):
                if action is None:
                    continue
                position[d] += 1
                left -= 1
                if action.kind == "F":
                    forwards.add((action.stage, action.microbatch))
                elif action.kind != "W":
                    backwards.add((action.stage, action.microbatch))
            tick.append(tuple(phase))
        assert left < before, "a deadlock, which `Schedule` refuses"
        rows.append(tuple(tick))
    return Ticks(phases, tuple(rows))
