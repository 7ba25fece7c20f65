"""Actions as numbers, and the clock that plays rows of them.

The simulator and the search run through 10^5 actions, thousands of times. There an
action is a number, `(kind * S + stage) * m + microbatch`, and everything about actions
is a list with that index. With two stages and three microbatches:

              stage 0      stage 1
    F        0   1   2    3   4   5
    O        6   7   8    9  10  11
    L       12  13  14   15  16  17
    R       18  19  20   21  22  23
    B       24  25  26   27  28  29
    I       30  31  32   33  34  35
    W       36  37  38   39  40  41

The numbers of one kind follow each other, and so do those of one kind and stage. `size`
is the number of pairs of stage and microbatch, here 6: adding it leads to the next kind
of the same pair.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from fpipe.schedules._action import KINDS, Action, Kind
from fpipe.schedules._costs import Costs
from fpipe.schedules._rules import Need, crossing_need
from fpipe.schedules._schedule import Schedule

# For each device the numbers of its actions, in order.
Rows: TypeAlias = list[list[int]]

F, O, L, R, B, I, W = range(len(KINDS))  # noqa: E741 - the letter of the literature


@dataclasses.dataclass(frozen=True)
class Copies:
    """What the copy engines of the devices do.

    Attributes:
        needs: for each action the one of its own stage that may still run when the
            device comes to it, or -1: the `F` of an `O`, the `O` of an `L`, the `L` of
            an `R`, `B` or `I`.
        out: the numbers of the `O`.
        back: the numbers of the `L`.
    """

    needs: list[int]
    out: range
    back: range


@dataclasses.dataclass(frozen=True)
class Numbering:
    """How the actions of a schedule of this size are numbered."""

    stages: int
    microbatches: int

    @property
    def size(self) -> int:
        """The number of pairs of stage and microbatch."""
        return self.stages * self.microbatches

    def rows(self, schedule: Schedule) -> Rows:
        """The actions of each device as numbers."""
        first: dict[Kind, list[int]] = {
            kind: [
                (k * self.stages + stage) * self.microbatches
                for stage in range(self.stages)
            ]
            for k, kind in enumerate(KINDS)
        }
        return [
            [first[kind][stage] + microbatch for kind, stage, microbatch in row]
            for row in schedule.actions
        ]

    def number(self, action: Action) -> int:
        """The number of an action."""
        kind, stage, microbatch = action
        return (
            KINDS.index(kind) * self.stages + stage
        ) * self.microbatches + microbatch

    def action(self, number: int) -> Action:
        """The action of a number."""
        kind, pair = divmod(number, self.size)
        stage, microbatch = divmod(pair, self.microbatches)
        return Action(KINDS[kind], stage, microbatch)

    def crossing_needs(self, rows: Rows) -> list[int]:
        """For each action the one of another stage that it needs, or -1.

        What it needs of its own stage is earlier in its very row, so the clock need not
        look for it.
        """
        crossing = [-1] * (len(KINDS) * self.size)
        meets: dict[Need, Sequence[int]] = {}
        for k, kind in enumerate(KINDS):
            need = crossing_need(kind)
            if need is None:
                continue
            if need not in meets:
                meets[need] = self._meeting(need, rows)
            # The search asks for this once for each schedule that it judges, so it is
            # done by slices and not action by action.
            # Pairs stand in the order of their stages: those of a neighbouring stage
            # are the same list, shifted.
            shift = need.offset * self.microbatches
            first = max(0, -shift)
            end = self.size - max(0, shift)
            shifted = meets[need][first + shift : end + shift]
            crossing[k * self.size + first : k * self.size + end] = shifted
        return crossing

    def _meeting(self, need: Need, rows: Rows) -> Sequence[int]:
        """For each pair its action that meets the need, or -1."""
        # Where one kind alone meets the need, its numbers are known. Of `B` and `I`
        # each pair has one, and the rows tell which.
        kinds = [KINDS.index(kind) for kind in need.kinds]
        if len(kinds) == 1:
            return range(kinds[0] * self.size, (kinds[0] + 1) * self.size)
        meeting = [-1] * self.size
        # `B` and `I` are neighbours in `KINDS`: one comparison for both.
        assert max(kinds) - min(kinds) == len(kinds) - 1, need
        first = min(kinds) * self.size
        end = (max(kinds) + 1) * self.size
        for row in rows:
            for number in row:
                if first <= number < end:
                    meeting[number % self.size] = number
        return meeting

    def copies(self, rows: Rows) -> Copies | None:
        """What the copy engines do; `None` where there is nothing for them."""
        size = self.size
        out = range(O * size, (O + 1) * size)
        back = range(L * size, (L + 1) * size)
        needs = [-1] * (len(KINDS) * size)
        for row in rows:
            for number in row:
                if number in out:
                    pair = number % size
                    needs[number] = F * size + pair
                    needs[L * size + pair] = number
                    for kind in (R, B, I):
                        needs[kind * size + pair] = L * size + pair
        return Copies(needs, out, back) if max(needs) >= 0 else None

    def durations(self, costs: Costs) -> list[float]:
        """How long each action takes, by its number."""
        durations: list[float] = []
        for kind in KINDS:
            for stage in range(self.stages):
                durations += [costs.of(Action(kind, stage, 0))] * self.microbatches
        return durations

    def latencies(self, costs: Costs, stage_to_device: Sequence[int]) -> list[float]:
        """How long what each action needs of another stage is under way."""
        # Kept by the action that waits: it has at most one need of another stage, while
        # a transfer has no number of its own.
        latencies: list[float] = []
        for kind in KINDS:
            need = crossing_need(kind)
            for stage, device in enumerate(stage_to_device):
                source = stage + need.offset if need else stage
                moves = 0 <= source < self.stages and stage_to_device[source] != device
                latencies += [costs.transfer if moves else 0.0] * self.microbatches
        return latencies


class Played(NamedTuple):
    """When everything ran.

    Attributes:
        order: the actions, each after what it waits for.
        starts: by action.
        ends: by action.
    """

    order: list[int]
    starts: list[float]
    ends: list[float]


def play(
    rows: Rows,
    crossing: Sequence[int],
    durations: Sequence[float],
    latencies: Sequence[float],
    launched: Sequence[float] | None = None,
    copies: Copies | None = None,
) -> Played | None:
    """Run every action as soon as its device is free and what it needs is there.

    A device runs through its row until something is missing; whoever makes that wakes
    it up again.

    Arguments:
        rows: the actions of each device.
        crossing: `Numbering.crossing_needs(rows)`.
        durations: of each action.
        latencies: of what each action needs of another stage.
        launched: for each action when the host has launched it; left out, at once.
        copies: what the copy engines do, where they do something.

    Returns:
        When everything ran; `None` if it is a deadlock.
    """
    # There is no queue of events by time. An action starts at the larger of two ends,
    # that of its device's last action and that of its need, and both are known when it
    # is reached, in whatever order devices have their turns. So one pass is enough.
    #
    # For `one_f_one_b(2, 2)`: device 1 stops at F(1,0); device 0 runs F(0,0), which
    # wakes device 1, runs F(0,1) and stops at B(0,0); device 1 runs to its end; device
    # 0 too.
    order: list[int] = []
    starts = [0.0] * len(crossing)
    # Below zero: has not run. An action may take no time, so zero is an end too.
    ends = [-1.0] * len(crossing)
    position = [0] * len(rows)
    free_at = [0.0] * len(rows)
    # By the action that is missing, the device that waits. There is one at most: an
    # action meets the need of one other stage.
    waiting: dict[int, int] = {}
    out_free_at = [0.0] * len(rows)
    back_free_at = [0.0] * len(rows)
    ready = list(range(len(rows)))
    while ready:
        device = ready.pop()
        row = rows[device]
        time = free_at[device]
        for n in range(position[device], len(row)):
            action = row[n]
            source = crossing[action]
            if source >= 0:
                arrival = ends[source]
                if arrival < 0.0:
                    waiting[source] = device
                    position[device] = n
                    free_at[device] = time
                    break
                arrival += latencies[action]
                if arrival > time:
                    time = arrival
            if copies is not None:
                need = copies.needs[action]
                launch = launched[action] if launched is not None else 0.0
                if action in copies.out:
                    # From the end of its forward on; here the device waits for it.
                    start = max(ends[need], out_free_at[device], launch)
                    end = out_free_at[device] = start + durations[action]
                    starts[action], ends[action] = start, end
                    order.append(action)
                    time = max(time, end)
                    continue
                if action in copies.back:
                    # From here on; the device goes on.
                    start = max(time, back_free_at[device], launch)
                    end = back_free_at[device] = start + durations[action]
                    starts[action], ends[action] = start, end
                    order.append(action)
                    continue
                if need >= 0 and ends[need] > time:
                    time = ends[need]
            if launched is not None and launched[action] > time:
                time = launched[action]
            starts[action] = time
            time += durations[action]
            ends[action] = time
            order.append(action)
            if action in waiting:
                ready.append(waiting.pop(action))
    return None if waiting else Played(order, starts, ends)
