"""Ticks: a schedule in lock step, for a program that runs the same on every device.

A tick has one phase or two. In each phase a device runs at most one action, and what an
action sends arrives at the end of its phase. Two forms come from the same `Schedule`,
the order of every device kept:

- one action in each tick;
- at most one forward and then one backward (or half of one) in each tick, which lets a
  forward on one device run beside a backward on another without either waiting for the
  other's kind.

A tick lasts as long as its dearest device, so which form is cheaper depends on the
schedule and the costs.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

from fpipe.schedules import Action, Costs

# Action or nothing, for each device.
Phase: TypeAlias = tuple[Action | None, ...]

# The kinds that may run in each phase of a tick.
ONE, TWO = ("FBIW",), ("F", "BIW")


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
        """The time that all ticks take, each as long as its dearest device."""
        return sum(
            max(sum(costs.of(a) for a in own if a) for own in zip(*row, strict=True))
            for row in self.rows
        )

    def positions(self, start: int = 0) -> dict[Action, int]:
        """The phase in which each action runs, counted through."""
        out: dict[Action, int] = {}
        for phase in (phase for row in self.rows for phase in row):
            out.update({a: start for a in phase if a})
            start += 1
        return out


def cheaper(actions: Sequence[Sequence[Action]], stages: int, costs: Costs) -> Ticks:
    """The cheaper of the two forms; of equal ones the one with a single phase.

    Arguments:
        actions: of each device, in order.
    """
    kinds = {a.kind for row in actions for a in row}
    forms = [ONE] if kinds == {"F"} or "F" not in kinds else [ONE, TWO]
    return min(
        (lock_step(actions, stages, form) for form in forms),
        key=lambda t: t.cost(costs),
    )


def lock_step(
    actions: Sequence[Sequence[Action]], stages: int, phases: tuple[str, ...]
) -> Ticks:
    """Every action in the first phase in which its turn has come and what it needs is
    there.
    """
    ready: set[tuple[bool, int, int]] = set()
    next_ = [0] * len(actions)
    rows: list[tuple[Phase, ...]] = []
    while any(n < len(row) for n, row in zip(next_, actions, strict=True)):
        tick: list[Phase] = []
        for kinds in phases:
            phase: list[Action | None] = []
            for d, row in enumerate(actions):
                a = row[next_[d]] if next_[d] < len(row) else None
                phase.append(
                    a if a and a.kind in kinds and _may_run(a, stages, ready) else None
                )
            for d, a in enumerate(phase):
                if a:
                    next_[d] += 1
                    if a.kind != "W":
                        ready.add((a.kind == "F", a.stage, a.microbatch))
            tick.append(tuple(phase))
        assert any(a for phase in tick for a in phase), (
            "a deadlock, which `Schedule` refuses"
        )
        rows.append(tuple(tick))
    return Ticks(phases, tuple(rows))


def _may_run(a: Action, stages: int, ready: set[tuple[bool, int, int]]) -> bool:
    """Whether the neighbour's part is done; a device's own earlier actions are, by the
    order.
    """
    if a.kind == "F":
        return a.stage == 0 or (True, a.stage - 1, a.microbatch) in ready
    return (
        a.kind == "W"
        or a.stage == stages - 1
        or (False, a.stage + 1, a.microbatch) in ready
    )
