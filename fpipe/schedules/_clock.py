"""When the actions of rows run, in numbers: what `simulate` and the passes share.

In: a schedule, its costs, and rows of numbers, as in `_numbering.py`. Out: when each
action starts and ends. The passes (`early_recompute`, `offload`) try many rows of one
schedule, and only the last of them becomes a `Schedule` again. `one_f_one_b(2, 2)`:

    rows           [[0, 1, 16, 17], [2, 18, 3, 19]]
    starts         0: 0.0, 1: 1.0, 2: 1.0, 18: 2.0, …
    order of all   0, 1, 2, 18, 16, 3, …
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

from fpipe.schedules._action import Action
from fpipe.schedules._costs import Costs
from fpipe.schedules._numbering import Copies, Numbering, Played, Rows, play
from fpipe.schedules._schedule import Schedule


class NumberLaunch(NamedTuple):
    """The launch of an action, by its number; as `Launch` otherwise."""

    thread: int
    number: int
    start: float
    end: float


class Launched(NamedTuple):
    """What the host launches.

    Attributes:
        launches: in order.
        ends: by action, when it has been launched.
    """

    launches: list[NumberLaunch]
    ends: list[float]


@dataclasses.dataclass(frozen=True)
class Run:
    """Rows that were played.

    Attributes:
        rows: by device.
        played: when everything ran.
        launches: in order; empty if they take no time.
    """

    rows: Rows
    crossing: list[int]
    copies: Copies | None
    played: Played
    launches: list[NumberLaunch]

    @property
    def makespan(self) -> float:
        """From the first start, which is at 0, to the last end."""
        return max(self.played.ends)

    def order(self) -> list[int]:
        """All actions by their start. Ties go by device, except that what waits for an
        action that takes no time is after it.
        """
        # Row by row, so that a stable sort keeps devices and positions in order.
        numbers = [number for row in self.rows for number in row]
        starts, rank = self.played.starts, self._rank_at_equal_starts()
        if rank is None:
            return sorted(numbers, key=starts.__getitem__)
        return sorted(numbers, key=lambda number: (starts[number], rank[number]))

    def launch_order(self) -> list[int]:
        """All actions in an order in which one thread can launch them.

        A copy is launched right after what stands before it in its row: by then its
        device has room for what comes back, or needs the room of what goes.
        """
        copies = self.copies
        if copies is None:
            return self.order()
        after = {
            before: number
            for row in self.rows
            for before, number in itertools.pairwise(row)
            if number in copies.out or number in copies.back
        }
        order: list[int] = []
        for number in self.order():
            if number in copies.out or number in copies.back:
                continue
            order.append(number)
            while order[-1] in after:
                order.append(after[order[-1]])
        return order

    def _rank_at_equal_starts(self) -> list[int] | None:
        """For each action how many of those that start with it are before it; `None`:
        none at all.

        Only an action that takes no time is before another that starts with it.
        """
        # With `Costs(W=0)`, W(0,0) and what comes after it start at one moment. The
        # order of starts cannot tell them apart, and `peak_live` would count the wrong
        # one first.
        starts, ends = self.played.starts, self.played.ends
        # As a rule everything takes time.
        if all(starts[number] < ends[number] for number in self.played.order):
            return None
        rank = [0] * len(starts)
        before = self._waited_for_in_row()
        # In the order of play, what an action waits for has its rank already.
        for number in self.played.order:
            for first in (self.crossing[number], *before[number]):
                if first >= 0 and starts[first] == starts[number]:
                    rank[number] = max(rank[number], rank[first] + 1)
        return rank

    def _waited_for_in_row(self) -> dict[int, list[int]]:
        """For each action those of its device that it waits for directly."""
        copies = self.copies
        before: dict[int, list[int]] = {}
        for row in self.rows:
            computed = copied_out = copied_back = -1
            for number in row:
                if copies is None:
                    before[number] = [computed]
                    computed = number
                    continue
                waits = before[number] = [copies.needs[number], copied_out]
                if number in copies.out:
                    copied_out = number
                elif number in copies.back:
                    waits += [computed, copied_back]
                    copied_back = number
                else:
                    waits.append(computed)
                    computed = number
        return before


class Clock:
    """Plays rows of one schedule under given costs.

    Arguments:
        schedule: says the stages, their devices, and the kinds that each pair has. Rows
            may have more `R`, `O` and `L`.
        costs: of the actions.
        fused: the actions that are launched together, group by group.

    Attributes:
        numbering: of the actions.
        rows: those of the schedule.
        durations: of each action.
    """

    def __init__(
        self,
        schedule: Schedule,
        costs: Costs,
        fused: Iterable[Sequence[Action]] = (),
    ) -> None:
        self.numbering = Numbering(schedule.stages, schedule.microbatches)
        self.rows = self.numbering.rows(schedule)
        self.durations = self.numbering.durations(costs)
        self._schedule, self._costs = schedule, costs
        number = self.numbering.number
        # Of each action after the first of its group, the first.
        self._launched_with = {
            number(action): number(group[0]) for group in fused for action in group[1:]
        }
        self._stage_to_device = schedule.stage_to_device
        self._crossing = self.numbering.crossing_needs(self.rows)
        self._latencies = self.numbering.latencies(costs, schedule.stage_to_device)

    def run(self, rows: Rows) -> Run:
        """When everything in some rows runs."""
        copies = self.numbering.copies(rows)
        launches: list[NumberLaunch] = []
        launched: list[float] | None = None
        if self._costs.launch:
            launches, launched = self._launch(rows, copies)
        played = play(
            rows, self._crossing, self.durations, self._latencies, launched, copies
        )
        assert played is not None, "a deadlock, which `Schedule` refuses"
        return Run(rows, self._crossing, copies, played, launches)

    def actions(self, rows: Rows) -> list[list[Action]]:
        """The actions of each device."""
        # Those of the schedule are there already: only new ones are made.
        known = self.action_of
        action = self.numbering.action
        return [[known[n] if n in known else action(n) for n in row] for row in rows]

    @cached_property
    def action_of(self) -> dict[int, Action]:
        """The actions of the schedule, by their numbers."""
        found: dict[int, Action] = {}
        for numbers, actions in zip(self.rows, self._schedule.actions, strict=True):
            found.update(zip(numbers, actions, strict=True))
        return found

    def _launch(self, rows: Rows, copies: Copies | None) -> Launched:
        """When the host launches each action.

        A launch waits for the launch before it on its thread, and for that of what its
        action needs: an array that nobody has asked for yet cannot be handed over.
        Nothing waits for an action to run. `one_f_one_b(2, 2)`, with a launch of 1 and
        one thread, then a thread for each device:

            host     F(0,0) F(0,1) F(1,0) B(1,0) B(0,0) F(1,1) B(1,1) B(0,1)
                     0      1      2      3      4      5      6      7      8

            host 0   F(0,0) F(0,1)        B(0,0)        B(0,1)
            host 1          F(1,0) B(1,0) F(1,1) B(1,1)
                     0      1      2      3      4      5      6
        """
        # The order in which the placed executor dispatches: that of the simulation
        # under the default costs, whatever the costs are here.
        played = play(rows, self._crossing, *self._default_costs, None, copies)
        assert played is not None, "a deadlock, which `Schedule` refuses"
        order = Run(rows, self._crossing, copies, played, []).launch_order()
        of_devices = self._costs.launchers == "per_device"
        free_at = [0.0] * len(rows)
        ends = [0.0] * len(self._crossing)
        launches: list[NumberLaunch] = []
        for number in order:
            if number in self._launched_with:
                ends[number] = ends[self._launched_with[number]]
                continue
            stage = number % self.numbering.size // self.numbering.microbatches
            thread = self._stage_to_device[stage] if of_devices else 0
            start, need = free_at[thread], self._crossing[number]
            if need >= 0:
                start = max(start, ends[need])
            free_at[thread] = ends[number] = start + self._costs.launch
            launches.append(NumberLaunch(thread, number, start, ends[number]))
        return Launched(launches, ends)

    @cached_property
    def _default_costs(self) -> tuple[Sequence[float], Sequence[float]]:
        """What actions take, and what is under way, under the default costs."""
        costs = Costs()
        return (
            self.numbering.durations(costs),
            self.numbering.latencies(costs, self._stage_to_device),
        )
