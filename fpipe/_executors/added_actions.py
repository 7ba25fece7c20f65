"""Recomputations and copies to the host, put into the schedules that a pipe is given.

In: what was given as `Pipe(schedule=...)`, with the options `recompute` and `offload`.
Out: a `Scheduling` that makes the same schedules with `R`, `O` and `L` in them. For
`Pipe(schedule="gpipe", checkpoint="except_last", recompute="early", offload=2)` on one
device, with three microbatches:

    gpipe         F0 F1 F2 B0 B1 B2
    offload       F0 F1 O1 F2 B0 L1 B1 B2           two are on the device at most
    recompute     F0 F1 O1 F2 R0 B0 L1 R1 B1 B2     the last one recomputes nothing

In this order, because a limit that can be kept stays so: an `R` between its `L` and its
backward moves nothing else. Which backwards recompute is asked of `Remat`, as the
executors do.
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

# Whether recomputations are actions of their own.
Recompute: TypeAlias = Literal["with_backward", "early"]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
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
            a stage has its backward right behind its forward, and the others recompute.
    """
    if recompute == "with_backward" and limit is None:
        return scheduling
    option = scheduling.option
    return _WithActions(option, scheduling, remat, recompute, limit, in_units)


@dataclasses.dataclass(frozen=True)
class _WithActions(Scheduling):
    """Schedules with more actions.

    Attributes:
        base: what makes them without.
        remat: which backwards recompute.
        recompute, limit: the pipe's options.
        in_units: as for `with_actions`.
    """

    base: Scheduling
    remat: Remat
    recompute: Recompute
    limit: Offload
    in_units: bool

    def stages(self, available: int, chunks: int, layers: int) -> int:
        return self.base.stages(available, chunks, layers)

    def stage_to_device(
        self, stages: int, available: int, chunks: int
    ) -> tuple[int, ...]:
        return self.base.stage_to_device(stages, available, chunks)

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
        if self.recompute == "early" and "R" not in present:
            pairs = self._recomputing(schedule)
            schedule = early_recompute(schedule, pairs=pairs) if pairs else schedule
        return schedule

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
