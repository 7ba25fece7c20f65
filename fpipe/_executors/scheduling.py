"""Which schedule a pipe runs: a name, a `Schedule`, or a function that makes one."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

from fpipe.schedules import NAMES, Schedule, named

Generator: TypeAlias = Callable[[int, int], Schedule]


@dataclasses.dataclass(frozen=True)
class Scheduling:
    """What `Pipe(schedule=...)` was given."""

    option: str | Schedule | Generator

    @classmethod
    def of(cls, option: Any) -> "Scheduling":
        """Checked."""
        checked: Any = option
        expected = f"one of {', '.join(map(repr, NAMES))}, a Schedule, or a function `f(devices, microbatches)` that makes one"
        if isinstance(option, str):
            if option not in NAMES:
                raise ValueError(f"`Pipe(schedule={option!r})`: {expected}")
        elif not isinstance(option, Schedule) and not callable(option):
            raise TypeError(f"`Pipe(schedule={option!r})`: {expected}")
        return cls(checked)

    def stages(self, available: int, chunks: int, layers: int) -> int:
        """How many stages it makes of that many layers, on as many of the available
        devices as it can use.
        """
        if isinstance(self.option, str):
            each = NAMES[self.option].per_device or 2
            if layers < each:
                raise ValueError(
                    f"`Pipe(schedule={self.option!r})` puts {each} stages on each "
                    f"device, but the model has {layers} layer"
                )
            return each * min(available, layers // each)
        schedule = (
            self.option
            if isinstance(self.option, Schedule)
            else _called(self.option, available, chunks)
        )
        return min(schedule.stages, layers)

    def stage_to_device(
        self, stages: int, available: int, chunks: int
    ) -> tuple[int, ...]:
        """The map of a pipe with that many stages.

        A named schedule puts one stage on each device, or two, or, where it takes any
        number, at least two on as many devices as that allows. A function is asked,
        with `chunks` microbatches, for the largest number of devices, up to
        `available`, on which it makes `stages` stages.

        Raises:
            ValueError: the schedule is for another number of stages.
        """
        if isinstance(self.option, str):
            devices = _devices_of(self.option, stages, available)
            # The map is the same for any number of microbatches, and one is the
            # cheapest to make.
            return named(self.option, devices, 1, stages // devices).stage_to_device
        if isinstance(self.option, Schedule):
            if self.option.stages != stages:
                raise ValueError(
                    f"`Pipe(schedule=...)`: the schedule {self.option.name!r} has "
                    f"{self.option.stages} stages, but the pipe "
                    f"has {stages}"
                )
            return self.option.stage_to_device
        made: dict[int, int] = {}
        for devices in (
            d for d in range(min(stages, available), 0, -1) if stages % d == 0
        ):
            schedule = _called(self.option, devices, chunks)
            if schedule.stages == stages:
                return schedule.stage_to_device
            made[devices] = schedule.stages
        if available < stages:  # more devices may be what is missing
            return tuple(range(stages))
        told = ", ".join(f"{s} stages on {d} devices" for d, s in made.items())
        raise ValueError(
            f"`Pipe(schedule=...)`: the pipe has {stages} stages, but the function "
            f"makes {told}"
        )

    def make(self, stage_to_device: tuple[int, ...], microbatches: int) -> Schedule:
        """The schedule for that many microbatches.

        Raises:
            ValueError: it is for another number of stages or microbatches, puts a stage
                elsewhere, or has no backwards.
        """
        schedule = self.option
        if isinstance(schedule, str):
            devices = 1 + max(stage_to_device)
            return named(
                schedule, devices, microbatches, len(stage_to_device) // devices
            )
        if not isinstance(schedule, Schedule):
            schedule = _called(schedule, 1 + max(stage_to_device), microbatches)
        if (schedule.stages, schedule.microbatches) != (
            len(stage_to_device),
            microbatches,
        ):
            raise ValueError(
                f"the schedule {schedule.name!r} is for {schedule.stages} stages and "
                f"{schedule.microbatches} microbatches, "
                f"but the pipe has {len(stage_to_device)} stages and this batch gives "
                f"{microbatches} microbatches; give a "
                "function `f(devices, microbatches)` to make one for each batch size"
            )
        if schedule.stage_to_device != stage_to_device:
            raise ValueError(
                f"the schedule {schedule.name!r} for {microbatches} microbatches puts "
                "the stages on the devices "
                f"{schedule.stage_to_device}, but the parameters are placed on "
                f"{stage_to_device}"
            )
        return schedule


def _called(f: Generator, devices: int, microbatches: int) -> Schedule:
    schedule = f(devices, microbatches)
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"`Pipe(schedule=...)`: the function returned {schedule!r}, no "
            "fpipe.schedules.Schedule"
        )
    return schedule


def _devices_of(name: str, stages: int, available: int) -> int:
    """On how many devices a named schedule puts that many stages."""
    each, call = NAMES[name].per_device, f"`Pipe(schedule={name!r})`"
    if each is not None:
        if stages % each:
            raise ValueError(
                f"{call} puts {each} stages on each device, but the pipe has {stages}: "
                f"give `balance` {stages + 1} entries"
            )
        return stages // each
    if available == 1:
        return 1
    for devices in range(min(available, stages // 2), 1, -1):
        if stages % devices == 0:
            return devices
    raise ValueError(
        f"{call} puts at least 2 stages on each device, the same number on all, but "
        f"the pipe has {stages} stages and "
        f"{available} devices: give `balance` 4 entries, or another multiple of the "
        "number of devices"
    )
