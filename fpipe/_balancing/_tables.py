"""What every span of layers costs as one of the stages: tables of work, traffic and memory."""

import itertools
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fpipe._balance import Table, arriving, leaving, total
from fpipe._costs import LayerCosts
from fpipe._plan import direct_pairs
from fpipe._remat import Remat
from fpipe._scheduling import Scheduling
from fpipe.schedules import Schedule, simulate


class Waits(NamedTuple):
    """How many microbatches a stage holds something of, at most, where a forward takes 1 and a backward 2.

    Attributes:
        live: from the stage's forward to the end of its backward.
        x, skips: from the forward of the stage before, or of any before, to there: what has come waits.
        cotangent, cotangents: from the backward of the stage behind, or of any behind, to there.
    """

    live: int
    x: int
    skips: int
    cotangent: int
    cotangents: int


class Tables:
    """What each span of layers costs as one of the stages."""

    def __init__(self, costs: LayerCosts, places: tuple[int, ...], scheduling: Scheduling, optimizer: float) -> None:
        self.costs, self.places, self.scheduling, self.optimizer = costs, places, scheduling, optimizer
        self.remat, self.layers, self.m = Remat.of(costs.checkpoint), len(costs.names), costs.microbatches
        sends = [*costs.skips, *(b._replace(bytes=b.bytes / self.m) for b in costs.borrowed)]
        self.skips_in, self.skips_out = arriving(self.layers, costs.skips), leaving(self.layers, costs.skips)
        self.sent_in, self.sent_out = arriving(self.layers, sends), leaving(self.layers, sends)
        # What the layer before a span hands to it, and what its last layer hands on.
        self.before = np.array([0, *costs.boundaries])[:, None] * np.ones(self.layers + 1)[None, :]
        self.behind = np.array([0, *costs.boundaries[:-1], 0])[None, :] * np.ones(self.layers + 1)[:, None]
        self.before[-1] = 0

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule, made when it is first looked at: a large one takes its time."""
        return self.scheduling.make(self.places, self.m)

    def work(self, s: int) -> Table:
        """Forward, backward, and the forward again where it is recomputed, of a microbatch in the mean."""
        forward, backward = total(self.costs.forward), total(self.costs.backward)
        if not any(self.costs.forward):
            return backward
        if not self.schedule.backwards:
            return forward
        direct = direct_pairs(itertools.chain(*self.schedule.actions), self.places)
        again = sum(self.remat.recomputes(i, self.m, (s, i) in direct) for i in range(self.m)) / self.m
        return forward * (1 + again) + backward

    def received(self, s: int) -> Table:
        """Bytes that come in from other devices in a microbatch's forward; as many go back in its backward."""
        apart = s > 0 and self.places[s - 1] != self.places[s]
        return self.sent_in + self.before * apart

    def link(self, s: int) -> Table:
        """Bytes that go in and out in a microbatch's forward: each way as many as that, with the backward."""
        apart = s + 1 < len(self.places) and self.places[s + 1] != self.places[s]
        return self.received(s) + self.sent_out + self.behind * apart

    def memory(self, s: int) -> Table:
        """Bytes that the stage needs on its device."""
        costs, borrowed = self.costs, arriving(self.layers, self.costs.borrowed)
        params, batch = total(costs.params), np.zeros_like(borrowed)
        batch[0] = self.m * costs.inputs
        # The batch, and one of each array that comes and goes.
        ends = batch + self.before + self.behind + self.skips_in + self.skips_out
        if not self.schedule.backwards:
            return params + borrowed + ends + self.skips_in * len(self.places)
        fixed = params * (1 + self.optimizer) + total(costs.gradients) + 2 * borrowed
        residuals = total(costs.residuals)
        residuals[:, 1:] -= total(costs.shared)[:, :-1]
        waits = self.waits(s)
        if self.remat.option == "never":
            held, working = residuals, 0
        else:
            held = self.before + self.skips_in + total(costs.saved)
            working = residuals * (min(2, waits.live) if self.remat.option == "except_last" else 1)
        forth = self.before * (waits.x - waits.live) + self.skips_in * (waits.skips - waits.live)
        back = self.behind * waits.cotangent + self.skips_out * waits.cotangents
        return fixed + held * waits.live + working + forth + back + ends

    def waits(self, s: int) -> Waits:
        """What a stage holds while the schedule runs."""
        made, begun, done = self._times

        def most(starts: np.ndarray, least: int) -> int:
            return max([least, *(_most(start, done[s]) for start in starts)])

        live = _most(begun[s], done[s])
        far = None if self.costs.skips else 0  # without skips nobody looks that far
        return Waits(
            live,
            most(made[max(0, s - 1) : s], live),
            most(made[:s][:far], live),
            most(done[s + 1 : s + 2], 0),
            most(done[s + 1 :][:far], 0),
        )

    @cached_property
    def _times(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each stage and microbatch: when its forward ends and starts, and when its backward has ended."""
        made, begun, done = (np.zeros((len(self.places), self.m)) for _ in range(3))
        for _, (kind, s, i), start, end in simulate(self.schedule).events:
            if kind == "F":
                made[s, i], begun[s, i] = end, start
            else:
                done[s, i] = max(done[s, i], end)
        return made, begun, done


def _most(starts: np.ndarray, ends: np.ndarray) -> int:
    """The most intervals that are open at once; where one ends, another may start."""
    starts, ends = np.sort(starts), np.sort(ends)
    return int(np.max(np.arange(1, len(starts) + 1) - np.searchsorted(ends, starts, side="right")))
