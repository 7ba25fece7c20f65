"""Recomputations and copies to the host, put into the schedules that a pipe is given.

In: what was given as `Pipe(schedule=...)`, with the options `recompute` and `offload`.
Out: a `Scheduling` that makes the same schedules with `R`, `O` and `L` in them. For
`Pipe(schedule="gpipe", checkpoint="except_last", recompute="early", offload=2)` on one
device, with three microbatches:

    gpipe         F0 F1 F2 B0 B1 B2
    offload       F0 F1 O1 F2 B0 L1 B1 B2           two are on the device at most
    recompute     F0 F1 O1 F2 R0 B0 L1 R1 B1 B2     the last one recomputes nothing
    and only      F0 F1 O1 F2 B0 L1 B1 B2           no backward waits for another device

In this order, because a limit that can be kept stays so: an `R` between its `L` and its
backward moves nothing else. Which backwards recompute is asked of `Remat`, as the
executors do. With a second device after this one its `R` stay: they run while the
cotangents of the second device are on their way.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

from fpipe._core.checks import as_int, is_one_of
from fpipe._core.errors import add_note, shown
from fpipe._executors.programs import direct_pairs
from fpipe._executors.scheduling import Scheduling
from fpipe._model.remat import Remat
from fpipe.schedules import Schedule, early_recompute, offload

# Whether recomputations are actions of their own. What `"auto"` is was measured, see
# `docs/benchmarks.md`. Under placed early recomputation is faster. Under scan it is not
# with the default schedule: all devices wait for the slowest one in each tick, and the
# residuals would go through one more buffer.
Recompute: TypeAlias = Literal["auto", "early", "with_backward"]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
# The two that `"auto"` chooses between.
EXPLICIT_RECOMPUTE: tuple[Recompute, ...] = ("with_backward", "early")
# How many microbatches a device holds at most, or each device.
Offload: TypeAlias = int | tuple[int, ...] | None


def as_recompute(option: Any, call: str = "Pipe") -> Recompute:
    """What `Pipe(recompute=...)`, or another call, was given, checked."""
    if not is_one_of(option, RECOMPUTE):
        raise ValueError(
            f"`{call}(recompute={shown(option)})`: one of "
            f"{', '.join(map(repr, RECOMPUTE))}"
        )
    return option


def as_offload(option: Any, call: str = "Pipe") -> Offload:
    """What `Pipe(offload=...)`, or another call, was given, checked."""
    if option is None:
        return None
    if isinstance(option, (list, tuple)):
        return tuple(as_int(call, "offload", limit) for limit in option)
    return as_int(call, "offload", option)


def with_actions(
    scheduling: Scheduling,
    remat: Remat,
    recompute: Recompute,
    limit: Offload,
    in_units: bool,
) -> Scheduling:
    """What makes the same schedules with recomputations and copies in them.

    Arguments:
        in_units: whether stages run in units, as under scan. Then only the last unit of
            a stage has its backward right after its forward, and the others recompute.
    """
    option = scheduling.option
    # Who gives a schedule as data has said what runs when.
    named = not isinstance(option, Schedule)
    early = recompute == "early" or (recompute == "auto" and named and not in_units)
    if not early and limit is None:
        return scheduling
    return _WithActions(option, scheduling, remat, early, limit, in_units)


@dataclasses.dataclass(frozen=True)
class _Rescheduling(Scheduling):
    """Schedules that are made from another's, for the same stages on the same devices.

    Attributes:
        base: what makes those.
    """

    base: Scheduling

    def stages(self, available: int, chunks: int, layers: int) -> int:
        return self.base.stages(available, chunks, layers)

    def stage_to_device(
        self, stages: int, available: int, chunks: int
    ) -> tuple[int, ...]:
        return self.base.stage_to_device(stages, available, chunks)


@dataclasses.dataclass(frozen=True)
class _WithActions(_Rescheduling):
    """The same schedules with more actions.

    Attributes:
        remat: which backwards recompute.
        early: whether recomputations are actions of their own.
        limit: the pipe's `offload`.
        in_units: as for `with_actions`.
    """

    remat: Remat
    early: bool
    limit: Offload
    in_units: bool

    def with_forwards_first(self) -> Scheduling:
        # A limit is kept by copies of microbatches that would not wait otherwise. For
        # recomputations the order of the given schedule is as good.
        if self.limit is None:
            return self
        return dataclasses.replace(self, base=_ForwardsFirst(self.option, self.base))

    def _made(self, stage_to_device: tuple[int, ...], microbatches: int) -> Schedule:
        # Checked first: what is added depends on the number of microbatches.
        schedule = self.base.make(stage_to_device, microbatches)
        if not schedule.backwards:
            return schedule
        if self.limit is not None:
            try:
                schedule = offload(schedule, memory=self.limit)
            except ValueError as error:
                add_note(error, f"for `Pipe(offload={self.limit!r})`")
                raise
        present = {action.kind for row in schedule.actions for action in row}
        if self.early and "R" not in present:
            schedule = self._with_recomputations(schedule)
        return schedule

    def _with_recomputations(self, schedule: Schedule) -> Schedule:
        """The schedule with an `R` for each backward that recomputes, where that can
        gain anything.
        """
        pairs, places = self._recomputing(schedule), schedule.stage_to_device
        if self.in_units:
            # All stages, for those that have the same actions share their code.
            return early_recompute(schedule, pairs=pairs) if pairs else schedule
        if not any(_waits(stage, places) for stage, _ in pairs):
            return schedule
        # All are put in and simulated, before some are left out.
        return _only_where_some_wait(early_recompute(schedule, pairs=pairs))

    def _recomputing(self, schedule: Schedule) -> Sequence[tuple[int, int]]:
        """The pairs of stage and microbatch whose backwards recompute."""
        direct: frozenset[tuple[int, int]] = frozenset()
        if not self.in_units:
            rows = itertools.chain(*schedule.actions)
            direct = direct_pairs(rows, schedule.stage_to_device)
        m = schedule.microbatches
        return [
            (s, i)
            for s in range(schedule.stages)
            for i in range(m)
            if self.remat.recomputes(i, m, (s, i) in direct)
        ]


class _ForwardsFirst(_Rescheduling):
    """The same schedules, in which each device runs all its forwards first."""

    def _made(self, stage_to_device: tuple[int, ...], microbatches: int) -> Schedule:
        schedule = self.base.make(stage_to_device, microbatches)
        # A stable sort: forwards stay in their order, and so does the rest.
        rows = [sorted(row, key=lambda a: a.kind != "F") for row in schedule.actions]
        return Schedule(rows, schedule.stage_to_device, schedule.name)


def _waits(stage: int, stage_to_device: Sequence[int]) -> bool:
    """Whether the cotangents of a stage come from another device."""
    after = stage_to_device[stage + 1 : stage + 2]
    return any(device != stage_to_device[stage] for device in after)


def _only_where_some_wait(schedule: Schedule) -> Schedule:
    """A schedule without the `R` that can gain nothing: right in front of a backward
    whose cotangent the device has made itself, before. Both are then ready at the same
    time, and as one program they keep what they can in registers.
    """
    places = schedule.stage_to_device
    rows = [
        [
            action
            for action, following in zip(row, [*row[1:], None], strict=True)
            if action.kind != "R"
            or _waits(action.stage, places)
            or following is None
            or following[1:] != action[1:]
        ]
        for row in schedule.actions
    ]
    return Schedule(rows, places, schedule.name)
