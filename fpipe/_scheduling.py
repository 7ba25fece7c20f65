"""Which schedule a pipe runs: a name, a `Schedule`, or a function that makes one."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

from fpipe.schedules import Schedule, eager_1f1b, gpipe, one_f_one_b

Generator: TypeAlias = Callable[[int, int], Schedule]

NAMES: dict[str, Generator] = {"gpipe": gpipe, "1f1b": one_f_one_b, "eager_1f1b": eager_1f1b}


@dataclasses.dataclass(frozen=True)
class Scheduling:
    """What `Pipe(schedule=...)` was given."""

    option: str | Schedule | Generator

    @classmethod
    def of(cls, option: Any) -> "Scheduling":
        """Checked."""
        checked: Any = option
        expected = (
            f"one of {', '.join(map(repr, NAMES))}, a Schedule, or a function `f(devices, microbatches)` that makes one"
        )
        if isinstance(option, str):
            if option not in NAMES:
                raise ValueError(f"`Pipe(schedule={option!r})`: {expected}")
        elif not isinstance(option, Schedule) and not callable(option):
            raise TypeError(f"`Pipe(schedule={option!r})`: {expected}")
        return cls(checked)

    def stages(self, available: int, chunks: int) -> int:
        """How many stages it makes on all available devices."""
        if isinstance(self.option, str):
            return available
        schedule = self.option if isinstance(self.option, Schedule) else _called(self.option, available, chunks)
        return schedule.stages

    def stage_to_device(self, stages: int, available: int, chunks: int) -> tuple[int, ...]:
        """The map of a pipe with that many stages.

        A named schedule puts one stage on each device. A function is asked, with `chunks` microbatches, for the
        largest number of devices, up to `available`, on which it makes `stages` stages.

        Raises:
            ValueError: the schedule is for another number of stages.
        """
        if isinstance(self.option, str):
            return tuple(range(stages))
        if isinstance(self.option, Schedule):
            if self.option.stages != stages:
                raise ValueError(
                    f"`Pipe(schedule=...)`: the schedule {self.option.name!r} has {self.option.stages} stages, but the pipe "
                    f"has {stages}"
                )
            return self.option.stage_to_device
        made: dict[int, int] = {}
        for devices in (d for d in range(min(stages, available), 0, -1) if stages % d == 0):
            schedule = _called(self.option, devices, chunks)
            if schedule.stages == stages:
                return schedule.stage_to_device
            made[devices] = schedule.stages
        if available < stages:  # more devices may be what is missing
            return tuple(range(stages))
        told = ", ".join(f"{s} stages on {d} devices" for d, s in made.items())
        raise ValueError(f"`Pipe(schedule=...)`: the pipe has {stages} stages, but the function makes {told}")

    def make(self, stage_to_device: tuple[int, ...], microbatches: int) -> Schedule:
        """The schedule for that many microbatches.

        Raises:
            ValueError: it is for another number of stages or microbatches, puts a stage elsewhere, or has no backwards.
        """
        schedule = self.option
        if not isinstance(schedule, Schedule):
            f = NAMES[schedule] if isinstance(schedule, str) else schedule
            schedule = _called(f, 1 + max(stage_to_device), microbatches)
        if (schedule.stages, schedule.microbatches) != (len(stage_to_device), microbatches):
            raise ValueError(
                f"the schedule {schedule.name!r} is for {schedule.stages} stages and {schedule.microbatches} microbatches, "
                f"but the pipe has {len(stage_to_device)} stages and this batch gives {microbatches} microbatches; give a "
                "function `f(devices, microbatches)` to make one for each batch size"
            )
        if schedule.stage_to_device != stage_to_device:
            raise ValueError(
                f"the schedule {schedule.name!r} for {microbatches} microbatches puts the stages on the devices "
                f"{schedule.stage_to_device}, but the parameters are placed on {stage_to_device}"
            )
        return schedule


def _called(f: Generator, devices: int, microbatches: int) -> Schedule:
    schedule = f(devices, microbatches)
    if not isinstance(schedule, Schedule):
        raise TypeError(f"`Pipe(schedule=...)`: the function returned {schedule!r}, no fpipe.schedules.Schedule")
    return schedule
