"""What a search for schedules works on: sizes, costs and limits as tables.

In: sizes, `Costs` and a memory limit, as `zero_bubble` gets them. Out: a `Problem`,
which judges rows of numbered actions (`_numbering.py` has the numbers), and `Found`,
rows with that judgement. For two devices, four microbatches and the default costs:

    one_microbatch    (1.0, 1.0)
    held_change       F: 1, 1   B: -1, -1   I: 0, 0   W: -1, -1      by stage
    bound()           13.0, the fill of 1 and the work of the last device
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from fpipe.schedules._action import KINDS, Action, Kind
from fpipe.schedules._checks import read_limits, shown
from fpipe.schedules._costs import Costs, StageMemory
from fpipe.schedules._numbering import Numbering, Played, Rows, play
from fpipe.schedules._rules import HELD_AFTER, Held

# The kinds of action that a search deals in, in the order of `StageCosts`.
SEARCHED: tuple[Kind, ...] = ("F", "B", "I", "W")
# What a microbatch holds on a stage before an action of each kind.
HELD_BEFORE: dict[Kind, Held] = {
    "F": Held.NOTHING,
    "B": Held.FORWARD,
    "I": Held.FORWARD,
    "W": Held.WEIGHT,
}

# Rounding neither breaks a limit nor makes a schedule better.
ROUNDING = 1.0 + 1e-9


class Policy(NamedTuple):
    """The parameters of the list scheduler.

    Each action has a *due time*, counted in microbatches; of those that could start, a
    device takes the one that is due first.

    Attributes:
        slope: how many microbatches a device is ahead for each stage that comes after
            it: 1 is 1F1B's warm-up, 2 that of the eager one, 0 lets every input
            gradient go first.
        fill: a `W` that is not due fills a gap that is at least this share of it.
        patience: a device waits for an input gradient that comes within this share of a
            forward, rather than start that forward.
        due: whether a `W` is due when the memory that it frees is wanted, or never.
        groups: whether `D` microbatches at a time go through a device's stages, as in
            interleaved 1F1B.
        share: of the limit; under no limit, of what hides everything.
        split: `I` and `W`, or `B`.
    """

    slope: float
    fill: float = 0.0
    patience: float = 0.0
    due: bool = False
    groups: bool = False
    share: float = 1.0
    split: bool = True


@dataclasses.dataclass(frozen=True)
class StageCosts:
    """The times of one microbatch on one stage."""

    forward: float
    whole: float
    input: float
    weight: float

    @property
    def backward(self) -> float:
        """The least time from a cotangent to that of the stage before."""
        return min(self.whole, self.input)

    @property
    def all_backward(self) -> float:
        """The least work of a backward."""
        return min(self.whole, self.input + self.weight)

    @property
    def gain(self) -> float:
        """What a `B` saves, compared with its `I` and `W`."""
        return self.input + self.weight - self.whole


@dataclasses.dataclass(frozen=True)
class Found:
    """A schedule that was found, with what it is judged by.

    Attributes:
        makespan: under the problem's costs.
        peak: what is held at most, by the device that holds most, and by all together.
        rows: the actions of each device, as numbers.
        policy: that of the list scheduler, where it was made by one.
    """

    makespan: float
    peak: tuple[float, float]
    rows: Rows
    policy: Policy | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes, costs and limits as tables.

    Attributes:
        devices: `D`.
        numbering: of the actions.
        stage_to_device: for each stage the index of its device.
        stages_of: for each device its stages.
        costs: for each stage.
        memory: for each stage what a microbatch holds there.
        one_microbatch: for each device what one microbatch holds on all its stages.
        limits: for each device the most that it may hold, infinite without a limit.
        durations: of each action.
        latencies: for each action how long what it needs of another stage is under way.
        held_change: for each kind and stage, `kind * S + stage`, how an action changes
            what its device holds.
    """

    devices: int
    numbering: Numbering
    stage_to_device: tuple[int, ...]
    stages_of: tuple[tuple[int, ...], ...]
    costs: tuple[StageCosts, ...]
    memory: tuple[StageMemory, ...]
    one_microbatch: tuple[float, ...]
    limits: tuple[float, ...]
    durations: list[float]
    latencies: list[float]
    held_change: list[float]

    @staticmethod
    def of(
        devices: int,
        microbatches: int,
        stage_to_device: tuple[int, ...],
        costs: Costs,
        memory: Any,
    ) -> "Problem":
        """The problem for these sizes, costs and `memory=` of `zero_bubble`.

        Raises:
            TypeError: a limit that is no number.
            ValueError: costs or limits of another length, or a limit under what one
                microbatch needs.
        """
        stages = len(stage_to_device)
        costs.check(stages)
        stages_of = tuple(
            tuple(s for s in range(stages) if stage_to_device[s] == device)
            for device in range(devices)
        )
        times = tuple(
            StageCosts(*(costs.of(Action(kind, stage, 0)) for kind in SEARCHED))
            for stage in range(stages)
        )
        held = tuple(costs.holds(stage) for stage in range(stages))
        one_microbatch = tuple(
            math.fsum(held[s].full for s in of_device) for of_device in stages_of
        )
        numbering = Numbering(stages, microbatches)
        # Tables and not methods: each play of a schedule reads them for each action.
        problem = Problem(
            devices=devices,
            numbering=numbering,
            stage_to_device=stage_to_device,
            stages_of=stages_of,
            costs=times,
            memory=held,
            one_microbatch=one_microbatch,
            limits=(math.inf,) * devices
            if memory is None
            else read_limits("zero_bubble", devices, memory),
            durations=numbering.durations(costs),
            latencies=numbering.latencies(costs, stage_to_device),
            held_change=[
                _held_change(kind, held[s]) for kind in KINDS for s in range(stages)
            ],
        )
        problem._check_limits(memory)
        return problem

    def _check_limits(self, memory: Any) -> None:
        for device, needed in enumerate(self.one_microbatch):
            if needed > self.limits[device] * ROUNDING:
                stages = ", ".join(map(str, self.stages_of[device]))
                every = ", ".join(f"{needed:g}" for needed in self.one_microbatch)
                raise ValueError(
                    f"`zero_bubble(memory={shown(memory)})`: device {device} needs at "
                    "least "
                    f"{needed:g}, what one microbatch holds on its stages {stages}; "
                    f"all devices: {every}"
                )

    def play(self, rows: Rows, crossing: Sequence[int]) -> Played | None:
        """When all actions run, as `simulate` has them; `None` if it is a deadlock.

        Arguments:
            rows: the actions of each device, as numbers.
            crossing: `numbering.crossing_needs(rows)`, which stays the same while
                actions only move.
        """
        return play(rows, crossing, self.durations, self.latencies)

    def judge(self, rows: Rows, policy: Policy | None = None) -> Found:
        """The rows with what they are judged by; they are no deadlock."""
        # Of schedules that end together the one that holds least is better, first on
        # the fullest device, then on all.
        played = self.play(rows, self.numbering.crossing_needs(rows))
        assert played is not None, "a deadlock"
        peaks = [self.peak(row) for row in rows]
        peak = (max(peaks), math.fsum(peaks))
        return Found(max(played.ends), peak, rows, policy)

    def peak(self, row: Sequence[int]) -> float:
        """The most that a device holds, whatever the times."""
        # A device runs one action after the other, so what it holds follows from the
        # order of its row: when the actions run does not matter.
        microbatches = self.numbering.microbatches
        held_change = self.held_change
        held = peak = 0.0
        for action in row:
            held += held_change[action // microbatches]
            if held > peak:
                peak = held
        return peak

    def fits(self, device: int, row: Sequence[int]) -> bool:
        """Whether a row keeps the limit of its device."""
        return self.peak(row) <= self.limits[device] * ROUNDING

    def all_fit(self, rows: Rows) -> bool:
        """Whether all rows keep their limits."""
        return all(self.fits(device, row) for device, row in enumerate(rows))

    def bound(self) -> float:
        """No schedule with these costs ends before this, whatever its memory.

        A device cannot start before its first stage's input is there, then has all its
        work to do; and after the last of its forwards and backwards the cotangent has
        its way to stage 0 before it.
        """
        microbatches = self.numbering.microbatches
        # The latency of what each stage gets from the one before: that of its forward.
        arriving = self.latencies[: self.numbering.size : microbatches]
        most = 0.0
        # Two bounds for each device, and the larger counts. It starts after `head` and
        # has all its work to do (`W` too, which may be the last). Or: it starts after
        # `head`, has its forwards and the cotangents of all microbatches to make, and
        # then the last cotangent goes on to stage 0, whose whole backward ends the step
        # (`tail`).
        for stages in self.stages_of:
            first = stages[0]
            before = self.costs[:first]
            own = [self.costs[stage] for stage in stages]
            way = math.fsum(arriving[1 : first + 1])
            head = math.fsum(stage.forward for stage in before) + way
            work = math.fsum(stage.forward + stage.all_backward for stage in own)
            chain = math.fsum(stage.forward + stage.backward for stage in own)
            tail = math.fsum(stage.backward for stage in before[1:]) + way
            tail += self.costs[0].all_backward if first else 0.0
            most = max(
                most, head + microbatches * work, head + microbatches * chain + tail
            )
        return most


def _held_change(kind: Kind, memory: StageMemory) -> float:
    """How an action changes what its device holds."""
    if kind not in HELD_BEFORE:
        return 0.0
    return memory.of(HELD_AFTER[kind]) - memory.of(HELD_BEFORE[kind])


def best_first(found: list[Found]) -> list[Found]:
    """The best first: by makespan, then by peak memory; rounding does not decide."""
    # Makespans that differ by rounding are equal: first all that are as short as the
    # shortest, by memory, then the others.
    ordered = sorted(found, key=lambda one: one.makespan)
    limit = ordered[0].makespan * ROUNDING
    equal = [one for one in ordered if one.makespan <= limit]
    return sorted(equal, key=lambda one: one.peak) + ordered[len(equal) :]
