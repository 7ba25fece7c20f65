"""What a search for schedules works on: sizes, costs and limit as tables, actions as
numbers.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from fpipe.schedules._action import KINDS, Action
from fpipe.schedules._costs import Costs
from fpipe.schedules._costs import read_numbers as checked
from fpipe.schedules._numbering import B, F, I, Numbering, Rows, play

ROUNDING = 1.0 + 1e-9


class Problem:
    """Sizes, costs and limit as tables; actions are numbers, `(kind * S + stage) * m +
    microbatch`.
    """

    def __init__(
        self, devices: int, m: int, places: tuple[int, ...], costs: Costs, memory: Any
    ) -> None:
        self.devices, self.m, self.places = devices, m, places
        self.stages = stages = len(places)
        self.size = stages * m
        self.of = [[s for s in range(stages) if places[s] == d] for d in range(devices)]
        costs.check(stages)
        self.cost = [[costs.of(Action(k, s, 0)) for s in range(stages)] for k in KINDS]
        self.first, self.second = zip(
            *(costs.holds(s) for s in range(stages)), strict=True
        )
        call = f"zero_bubble(memory={memory!r})"
        limit = math.inf if memory is None else checked(call, "device", memory)
        self.limit = limit if isinstance(limit, tuple) else (limit,) * devices
        if len(self.limit) != devices:
            raise ValueError(
                f"`{call}`: {len(self.limit)} numbers for {devices} devices"
            )
        self.whole = [math.fsum(self.first[s] for s in of) for of in self.of]
        self.slack = [limit * ROUNDING for limit in self.limit]
        for d, (whole, slack) in enumerate(zip(self.whole, self.slack, strict=True)):
            if whole > slack:
                raise ValueError(
                    f"`{call}`: device {d} needs at least {whole:g}, what one "
                    "microbatch holds on its "
                    f"stages {', '.join(map(str, self.of[d]))}; all devices: "
                    f"{', '.join(f'{w:g}' for w in self.whole)}"
                )
        self.numbering = Numbering(stages, m)
        self.took, self.lag = (
            self.numbering.durations(costs),
            self.numbering.latencies(costs, places),
        )
        self.up = [
            costs.transfer if a != b else 0.0 for a, b in itertools.pairwise(places)
        ]

    def needs(self, rows: Rows) -> list[int]:
        """For each action what it needs from another stage, or -1."""
        return self.numbering.crossing_needs(rows)

    def run(
        self, rows: Rows, need: list[int]
    ) -> tuple[list[float], list[float]] | None:
        """Starts and ends of all actions, as `simulate` has them; `None` if it is a
        deadlock.
        """
        ran = play(rows, need, self.took, self.lag)
        return None if ran is None else (ran.starts, ran.ends)

    def peak(self, row: Sequence[int]) -> float:
        """The most that a device holds, whatever the times."""
        held = peak = 0.0
        for a in row:
            kind, at = divmod(a, self.size)
            s = at // self.m
            if kind == F:
                held += self.first[s]
            elif kind == I:
                held += self.second[s] - self.first[s]
            else:
                held -= self.first[s] if kind == B else self.second[s]
            if held > peak:
                peak = held
        return peak

    def fits(self, rows: Rows) -> bool:
        return all(
            self.peak(row) <= slack for row, slack in zip(rows, self.slack, strict=True)
        )

    def bound(self) -> float:
        """No schedule with these costs ends before this, whatever its memory.

        A device cannot start before its first stage's input is there, then has all its
        work to do; and after the last of its forwards and backwards the cotangent has
        its way to stage 0 before it.
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
class Found:
    """A schedule that was found, with what it is judged by."""

    makespan: float
    peak: tuple[float, float]
    rows: Rows
    rule: Any = None

    @staticmethod
    def of(p: Problem, rows: Rows, rule: Any = None) -> "Found":
        times = p.run(rows, p.needs(rows))
        assert times is not None, "a deadlock"
        peaks = [p.peak(row) for row in rows]
        return Found(max(times[1]), (max(peaks), math.fsum(peaks)), rows, rule)


def best_first(found: list[Found]) -> list[Found]:
    """The best first: by makespan, then by peak memory; rounding does not decide."""
    found = sorted(found, key=lambda x: x.makespan)
    limit = found[0].makespan * ROUNDING
    equal = [x for x in found if x.makespan <= limit]
    return sorted(equal, key=lambda x: x.peak) + found[len(equal) :]
