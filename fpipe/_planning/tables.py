"""What every span of layers costs as one of the stages: tables of work, traffic and
memory.
"""

import itertools
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fpipe._executors.programs import direct_pairs
from fpipe._executors.scheduling import Scheduling
from fpipe._model.remat import Remat
from fpipe._planning.costs import LayerCosts
from fpipe._planning.partition import Table, arriving, leaving, total
from fpipe.schedules import Schedule, simulate


class Waits(NamedTuple):
    """How many microbatches a stage holds something of, at most, where a forward takes
    1 and a backward 2.

    What goes from stage to stage waits somewhere for its turn: where it was made (so
    does the placed executor, which sends it when it is asked for), or where it goes (so
    does the scan executor).

    Attributes:
        live: from the stage's forward to the end of its backward.
        there, here: how many wait where they go, or where they were made, besides those
            that are live: of the boundary before the stage, of skips that it takes, of
            the boundary behind it, and of skips that it sends; forth and back.
    """

    live: int
    there: tuple[int, ...]
    here: tuple[int, ...]


class Tables:
    """What each span of layers costs as one of the stages."""

    def __init__(
        self,
        costs: LayerCosts,
        places: tuple[int, ...],
        scheduling: Scheduling,
        optimizer: float,
    ) -> None:
        self.costs, self.places, self.scheduling, self.optimizer = (
            costs,
            places,
            scheduling,
            optimizer,
        )
        self.remat, self.layers, self.m = (
            Remat.of(costs.checkpoint),
            len(costs.names),
            costs.microbatches,
        )
        sends = [
            *costs.skips,
            *(b._replace(bytes=b.bytes / self.m) for b in costs.borrowed),
        ]
        self.skips_in, self.skips_out = (
            arriving(self.layers, costs.skips),
            leaving(self.layers, costs.skips),
        )
        self.sent_in, self.sent_out = (
            arriving(self.layers, sends),
            leaving(self.layers, sends),
        )
        # What the layer before a span hands to it, and what its last layer hands on.
        self.before = (
            np.array([0, *costs.boundaries])[:, None]
            * np.ones(self.layers + 1)[None, :]
        )
        self.behind = (
            np.array([0, *costs.boundaries[:-1], 0])[None, :]
            * np.ones(self.layers + 1)[:, None]
        )
        self.before[-1] = 0

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule, made when it is first looked at: a large one takes its time."""
        return self.scheduling.make(self.places, self.m)

    def work(self, s: int) -> Table:
        """Forward, backward, and the forward again where it is recomputed, of a
        microbatch in the mean.
        """
        forward, backward = total(self.costs.forward), total(self.costs.backward)
        if not any(self.costs.forward):
            return backward
        if not self.schedule.backwards:
            return forward
        direct = direct_pairs(itertools.chain(*self.schedule.actions), self.places)
        again = (
            sum(
                self.remat.recomputes(i, self.m, (s, i) in direct)
                for i in range(self.m)
            )
            / self.m
        )
        return forward * (1 + again) + backward

    def received(self, s: int) -> Table:
        """Bytes that come in from other devices in a microbatch's forward; as many go
        back in its backward.
        """
        apart = s > 0 and self.places[s - 1] != self.places[s]
        return self.sent_in + self.before * apart

    def link(self, s: int) -> Table:
        """Bytes that go in and out in a microbatch's forward: each way as many as that,
        with the backward.
        """
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
            working = residuals * (
                min(2, waits.live) if self.remat.option == "except_last" else 1
            )
        moved = (self.before, self.skips_in, self.behind, self.skips_out)
        there, here = (
            sum(table * n for table, n in zip(moved, counts, strict=True))
            for counts in (waits.there, waits.here)
        )
        return fixed + held * waits.live + working + np.maximum(there, here) + ends

    def waits(self, s: int) -> Waits:
        """What a stage holds while the schedule runs."""
        begun, made, back, done = self._times
        last = len(self.places) - 1
        live = _most(begun[[s]], done[[s]])
        near = slice(max(0, s - 1), s), slice(s + 1, min(last, s + 1) + 1)
        far = (
            (slice(0, s), slice(s + 1, last + 1))
            if self.costs.skips
            else (slice(0), slice(0))
        )
        there, here = list[int](), list[int]()
        for before, behind in (near, far):
            there += [
                max(live, _most(made[before], done[[s]])) - live,
                _most(done[behind], done[[s]]),
            ]
            here += [_most(done[[s]], back[before]), _most(made[[s]], begun[behind])]
        order = (0, 2, 1, 3)
        return Waits(
            live, *(tuple(counts[n] for n in order) for counts in (there, here))
        )

    @cached_property
    def _times(self) -> np.ndarray:
        """For each stage and microbatch: when its forward begins and ends, and when its
        backward does.
        """
        times = np.zeros((4, len(self.places), self.m))
        times[2] = np.inf
        for _, (kind, s, i), start, end in simulate(self.schedule).events:
            if kind == "F":
                times[:2, s, i] = start, end
            else:
                times[2, s, i] = min(times[2, s, i], start)
                times[3, s, i] = max(times[3, s, i], end)
        return times


def _most(starts: np.ndarray, ends: np.ndarray) -> int:
    """The most microbatches between a start and an end, for the worst of several
    stages.

    Arguments:
        starts, ends: by stage and microbatch; one of them is of one stage. Where one
            ends, another may start.
    """
    counts = [0]
    for start, end in itertools.product(np.sort(starts, 1), np.sort(ends, 1)):
        started = np.arange(1, len(start) + 1)
        counts.append(int(np.max(started - np.searchsorted(end, start, side="right"))))
    return max(counts)
