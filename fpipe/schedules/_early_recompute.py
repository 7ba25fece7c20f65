"""Recomputations as actions of their own, put where a device would wait.

In: a `Schedule` whose backwards recompute, and `Costs`. Out: the same schedule with an
`R` for each of these backwards. Torchgpipe does it for GPipe (Kim et al., arXiv
2004.09910), Mario for other schedules (Liu et al., PPoPP 2025). `one_f_one_b(2, 2)`,
with a recomputation of 1 inside the backward and before it:

    device 0 F0 F1          B0------ B1------      F0 F1    R0    B0--- R1 B1---
    device 1    F0 B0------ F1 …                      F0 R0 B0--- F1 R1 B1---

An `R` right before its backward can only help: the two together end no later than a
backward that starts when its cotangent is there and recomputes first. From there an `R`
moves into an earlier gap if it fits into it as a whole. Then everything else runs when
it would run otherwise, or earlier; so no step makes the schedule slower, whatever the
costs are.
"""

import bisect
import math
from collections.abc import Collection, Sequence

from fpipe.schedules._checks import check_int, check_type, shown
from fpipe.schedules._clock import Clock, Run
from fpipe.schedules._costs import Costs
from fpipe.schedules._numbering import B, L, O, R, Rows, W
from fpipe.schedules._schedule import Schedule

# Passes over a schedule. What moves into a gap lets others start earlier, which opens
# and closes gaps. Over random costs the first pass makes a step 1.0 % shorter, the
# second 0.1 %, and eight passes 0.02 % more.
PASSES = 2
# How many recomputations are tried for a gap, the nearest first.
TRIED = 4


def early_recompute(
    schedule: Schedule,
    costs: Costs | None = None,
    *,
    pairs: Collection[tuple[int, int]] | None = None,
    ahead: int = 1,
) -> Schedule:
    """Make the recomputations of backwards actions of their own, `R`.

    A backward needs its cotangent only after its recomputation. So an `R` can run while
    the cotangent is on its way. Under the same costs the result is never slower than
    the given schedule with recomputation inside `B` or `I`. Under 1F1B the idle time is
    `(D-1)(F+B)`, where `B` is the time of a backward without recomputation.

    Arguments:
        schedule: any `Schedule` without `R`.
        costs: the costs of the actions, where `B` and `I` recompute nothing. Default
            `Costs()`, where an `R` takes as long as an `F`.
        pairs: the (stage, microbatch) pairs whose backwards recompute. Default: all.
        ahead: the number of recomputed microbatches that a device may hold besides the
            microbatch of the running backward. It holds them only if the step is then
            shorter. With 0 every `R` is right before its backward. Default 1.

    Returns:
        A `Schedule`. Its `Timeline.peak_recomputed` is at most `1 + ahead`.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: the schedule has `R` already, `costs` are for another number of
            stages, or a pair is not in the schedule.

    Example:
        >>> schedule = fpipe.schedules.one_f_one_b(devices=2, microbatches=2)
        >>> print(fpipe.schedules.early_recompute(schedule))
        0: F0 F1 R0 B0 R1 B1
        1: F0 R0 B0 F1 R1 B1
    """
    check_type("`early_recompute(schedule)`", schedule, Schedule)
    costs = Costs() if costs is None else costs
    check_type("`early_recompute(schedule, costs)`", costs, Costs)
    costs.check(schedule.stages)
    check_int("early_recompute", "ahead", ahead, 0)
    if any(action.kind == "R" for row in schedule.actions for action in row):
        raise ValueError(
            f"`early_recompute(schedule)`: the schedule {schedule.name!r} has R already"
        )
    # In numbers, and only what is found in the end as a schedule, which is checked.
    clock = Clock(schedule, costs)
    size = clock.numbering.size
    backwards = {
        R * size + number % size
        for row in clock.rows
        for number in row
        if B * size <= number < W * size
    }
    recomputed = backwards
    if pairs is not None:
        recomputed = _read_pairs(schedule, pairs, backwards, clock)
    found = clock.run(
        [_with_recomputations(row, recomputed, size) for row in clock.rows]
    )
    # What is recomputed long before its backward takes memory, so it has to pay.
    for more in range(1, ahead + 1):
        moved = _fill_all_gaps(found, clock, more)
        if moved.makespan < found.makespan:
            found = moved
    name = f"{schedule.name}, early recomputation"
    return Schedule(clock.actions(found.rows), schedule.stage_to_device, name)


def _read_pairs(
    schedule: Schedule,
    pairs: Collection[tuple[int, int]],
    backwards: set[int],
    clock: Clock,
) -> set[int]:
    """The recomputations that are asked for."""
    chosen: set[int] = set()
    microbatches = clock.numbering.microbatches
    first = R * clock.numbering.size
    for pair in pairs:
        number = None
        if isinstance(pair, (tuple, list)) and [type(n) for n in pair] == [int, int]:
            stage, microbatch = pair
            if 0 <= microbatch < microbatches and stage >= 0:
                number = first + stage * microbatches + microbatch
        if number not in backwards:
            raise ValueError(
                f"`early_recompute(pairs=...)`: the schedule {schedule.name!r} has no "
                f"backward of a stage and microbatch {shown(pair)}"
            )
        chosen.add(number)
    return chosen


def _fill_all_gaps(run: Run, clock: Clock, ahead: int) -> Run:
    """The rows with recomputations moved into gaps, also into those that open."""
    for _ in range(PASSES):
        moved = _fill_gaps(run, clock, ahead)
        if moved == run.rows:
            break
        run = clock.run(moved)
    return run


def _with_recomputations(
    row: Sequence[int], recomputed: set[int], size: int
) -> list[int]:
    """A row with each `R` right before its backward."""
    new: list[int] = []
    for number in row:
        # A `B` or an `I`: their numbers follow each other.
        if B * size <= number < W * size:
            recomputation = R * size + number % size
            if recomputation in recomputed:
                new.append(recomputation)
        new.append(number)
    return new


def _fill_gaps(run: Run, clock: Clock, ahead: int) -> Rows:
    """The rows with recomputations moved into the gaps that they have now."""
    size = clock.numbering.size
    return [_GapFiller(row, run, clock, ahead, size).filled() for row in run.rows]


class _GapFiller:
    """Moves recomputations of a device into its gaps.

    Arguments:
        row: the device's actions, in order.
        run: when they run.
        clock: knows what they take.
        ahead: as for `early_recompute`.
        size: the number of pairs of stage and microbatch.
    """

    def __init__(
        self, row: Sequence[int], run: Run, clock: Clock, ahead: int, size: int
    ) -> None:
        self.row, self.ahead, self.size = row, ahead, size
        self.starts, self.ends = run.played.starts, run.played.ends
        self.durations = clock.durations
        # For each place how many recomputed microbatches are held there.
        self.held = _recomputed_at(row, size)
        # The places of the recomputations, and of those that have moved.
        self.places = [
            n for n, number in enumerate(row) if R * size <= number < (R + 1) * size
        ]
        self.moved: set[int] = set()
        # By pair of stage and microbatch, from when on it can be recomputed.
        self.ready_at: dict[int, float] = {}

    def filled(self) -> list[int]:
        """The actions in their new order."""
        # Gap by gap, from the left. What moves keeps its place in `row` until the end,
        # so that all gaps are those of the same timeline.
        size = self.size
        copied = {n % size for n in self.row if L * size <= n < R * size}
        new: list[int] = []
        free_at = 0.0
        for place, number in enumerate(self.row):
            start, end = self.starts[number], self.ends[number]
            if L * size <= number < R * size:
                # The device goes on while it is copied back.
                new.append(number)
                self.ready_at[number % size] = end
                continue
            if O * size <= number < L * size:
                # The device waits for its end.
                start = end
            if start > free_at:
                new += self.fill(place, free_at, start)
                free_at = start
            if place not in self.moved:
                new.append(number)
            # An `F` has the number of its pair.
            if number < size and number not in copied:
                self.ready_at[number] = end
            if end > free_at:
                free_at = end
        return new

    def fill(self, place: int, start: float, end: float) -> list[int]:
        """The recomputations that move into the gap before a place."""
        new: list[int] = []
        for after in self._next(place):
            number = self.row[after]
            # From here to its own place there is one more.
            if max(self.held[place:after]) > self.ahead:
                break
            ready_at = self.ready_at.get(number % self.size, math.inf)
            done_at = max(start, ready_at) + self.durations[number]
            if done_at > end:
                continue
            new.append(number)
            start = done_at
            self.moved.add(after)
            self.held[place:after] = [n + 1 for n in self.held[place:after]]
        return new

    def _next(self, place: int) -> list[int]:
        """The places of the next few recomputations that have not moved."""
        few: list[int] = []
        for n in range(bisect.bisect_right(self.places, place), len(self.places)):
            if self.places[n] not in self.moved:
                few.append(self.places[n])
                if len(few) == TRIED:
                    break
        return few


def _recomputed_at(row: Sequence[int], size: int) -> list[int]:
    """For each place of a row how many recomputed microbatches are held there."""
    counts: list[int] = []
    held = 0
    recomputed: set[int] = set()
    for number in row:
        # Until its backward ends, which is still of that place.
        ends = False
        if R * size <= number < B * size:
            recomputed.add(number % size)
            held += 1
        elif B * size <= number < W * size:
            ends = number % size in recomputed
        counts.append(held)
        held -= ends
    return counts
