"""Ticks: a schedule in lock step, for a program that runs the same on every device.

In: the actions of each device, in order. Out: `Ticks`, a table with a row for each tick
and an entry for each of its phases and each device.

A tick has one phase, or two, or three. In each phase a device runs at most one action,
and what an action sends arrives at the end of its phase. Two forms come from the same
`Schedule`, the order of every device kept:

- one action in each tick;
- at most one forward and then one backward (or half of one) in each tick, which lets a
  forward on one device run beside a backward on another without either waiting for the
  other's kind. Recomputations that are actions have a phase between the two.

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
the schedule and the costs. Four devices, 16 microbatches, F = 1, B = 2, I = W = 1, and
for `interleaved_1f1b` two stages on each device with these costs each:

                         one action    a forward, then a backward
    gpipe                    57                   57
    1f1b                     72                   90
    eager_1f1b               72                   57
    zb_h1                    51                   69
    interleaved_1f1b        132                  105
"""

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

from fpipe.schedules import Action, Costs, Schedule
from fpipe.schedules._action import COPIES, KINDS
from fpipe.schedules._rules import crossing_need

# Action or nothing, for each device.
Phase: TypeAlias = tuple[Action | None, ...]

# The kinds that may run in each phase of a tick.
ONE_ACTION = ("FRBIW",)
FORWARD_THEN_BACKWARD = ("F", "BIW")
FORWARD_RECOMPUTATION_BACKWARD = ("F", "R", "BIW")


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
    # What the stages really cost is not known here, so these are the usual ratios.
    # Recomputing takes another forward.
    costs = Costs(F=1.0, B=2.0, I=1.0, W=1.0)
    # Copies to the host take no turn: a device makes them between two phases.
    rows = [[a for a in row if a.kind not in COPIES] for row in schedule.actions]
    apart = any(action.kind == "R" for row in rows for action in row)
    if recomputes and not apart:
        costs = Costs(F=1.0, B=3.0, I=2.0, W=1.0)
    loops: list[Sequence[Sequence[Action]]] = [rows]
    if forwards_alone:
        loops = [[[a for a in row if a.kind == "F"] for row in rows]]
        if backwards:
            loops.append([[a for a in row if a.kind != "F"] for row in rows])
    return [cheapest(actions, costs) for actions in loops]


def cheapest(actions: Sequence[Sequence[Action]], costs: Costs) -> Ticks:
    """The cheaper of the two forms; of equal ones the one with a single phase.

    Arguments:
        actions: of each device, in order.
    """
    best = lock_step(actions, ONE_ACTION)
    # Forwards alone, or backwards alone, have nothing to put into the other phase.
    kinds = {a.kind for row in actions for a in row}
    phases = FORWARD_RECOMPUTATION_BACKWARD if "R" in kinds else FORWARD_THEN_BACKWARD
    if len(kinds & set("FR")) and len(kinds) > 1:
        other = lock_step(actions, phases)
        if other.cost(costs) < best.cost(costs):
            return other
    return best


def lock_step(actions: Sequence[Sequence[Action]], phases: tuple[str, ...]) -> Ticks:
    """Every action in the first phase in which its turn has come and what it needs is
    there.

    The order of a device's row is never changed: its memory depends on it, and a model
    with states needs its forwards in order. An action that cannot run yet holds up all
    after it.
    """
    # A need that is not among these actions was met in an earlier loop: backwards alone
    # need forwards that have all run.
    present = {action for row in actions for action in row}
    crossing = {kind: crossing_need(kind) for kind in KINDS}

    def wait(row: Sequence[Action]) -> Action | None:
        """What the next action of a row waits for. Only what another stage does: its
        own stage's actions are earlier in the same row.
        """
        if not row:
            return None
        kind, stage, microbatch = row[-1]
        need = crossing[kind]
        if need is not None:
            for other_kind in need.kinds:
                other = Action(other_kind, stage + need.offset, microbatch)
                if other in present:
                    return other
        return None

    done: set[Action | None] = {None}
    # For each device what it has still to run, the next action last, and what that
    # waits for: looked up once, not in every tick that it waits.
    left = [list(reversed(row)) for row in actions]
    waits = [wait(row) for row in left]
    rows: list[tuple[Phase, ...]] = []
    while any(left):
        before = len(done)
        tick: list[Phase] = []
        for kinds in phases:
            phase = tuple(
                [
                    row[-1]
                    if row and waits[d] in done and row[-1].kind in kinds
                    else None
                    for d, row in enumerate(left)
                ]
            )
            # Only now, when all devices have chosen: what an action makes is there when
            # its phase has ended. In the second phase of a tick it is there.
            for d, action in enumerate(phase):
                if action is None:
                    continue
                done.add(action)
                left[d].pop()
                waits[d] = wait(left[d])
            tick.append(phase)
        assert len(done) > before, "a deadlock, which `Schedule` refuses"
        rows.append(tuple(tick))
    return Ticks(phases, tuple(rows))
