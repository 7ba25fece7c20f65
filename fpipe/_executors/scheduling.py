"""Which schedule a pipe runs, before it is known for how many microbatches.

`Pipe(schedule=...)` takes a name, a `Schedule`, or a function that makes schedules.
Each is asked three things. For two stages on two devices, and four microbatches:

    given         stages of 5 layers    stage_to_device of 2 stages   make
    "1f1b"        one a device: 2       (0, 1)                        one_f_one_b(2, 4)
    a Schedule    those that it has     its own                       itself, if it fits
    f             those of f(2, 4)      of f(2, 4), or of f(1, 4)     f(2, 4)

The map has to be known when a pipe is made, because parameters are placed by it. The
number of microbatches is known when a call comes. So `make` checks that the schedule
for that number has the map that the parameters have. A map does not grow with the
number of microbatches, and a schedule does: for its map a function is asked with a
limited number of them.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

from fpipe._core.errors import shown
from fpipe.schedules import NAMES, Schedule, named
from fpipe.schedules._checks import counted

Generator: TypeAlias = Callable[[int, int], Schedule]

# For its map a function is asked with this number of microbatches per device at most.
# `chunks=10**6` says that a batch may be cut so far; a schedule of so many takes
# minutes to make.
MOST_FOR_A_MAP = 64


@dataclasses.dataclass(frozen=True)
class Scheduling(abc.ABC):
    """What `Pipe(schedule=...)` was given.

    Attributes:
        option: as it was given.
    """

    option: str | Schedule | Generator

    @staticmethod
    def of(option: Any) -> "Scheduling":
        """From what a user gave.

        Raises:
            ValueError: no such name.
            TypeError: none of the three.
        """
        expected = (
            f"one of {', '.join(map(repr, NAMES))}, a Schedule, or a function "
            "`f(devices, microbatches)` that makes one"
        )
        if isinstance(option, str):
            if option not in NAMES:
                raise ValueError(f"`Pipe(schedule={shown(option)})`: {expected}")
            return _ByName(option)
        if isinstance(option, Schedule):
            return _Fixed(option)
        if not callable(option):
            raise TypeError(f"`Pipe(schedule={shown(option)})`: {expected}")
        # A function may be slow, so it is not called to see whether it is a good one.
        generator: Any = option  # what it returns is checked when it is called
        return _ByFunction(generator)

    @abc.abstractmethod
    def stages(self, available: int, chunks: int, layers: int) -> int:
        """How many stages it makes of that many layers, on as many of the available
        devices as it can use.

        Raises:
            ValueError: too few layers.
        """

    @abc.abstractmethod
    def stage_to_device(
        self, stages: int, available: int, chunks: int
    ) -> tuple[int, ...]:
        """The device of each stage of a pipe with that many stages.

        Arguments:
            available: how many devices there are. The map may need more.
            chunks: the number of microbatches asked for.

        Raises:
            ValueError: the schedule is for another number of stages.
        """

    @abc.abstractmethod
    def _made(self, stage_to_device: tuple[int, ...], microbatches: int) -> Schedule:
        """The schedule, which may not fit."""

    def with_forwards_first(self) -> "Scheduling":
        """What makes schedules for a call that is differentiated from outside. There
        all forwards come before all backwards, whatever a schedule says.
        """
        # The executors see to that. Only what is added to a schedule may depend on it.
        return self

    def make(self, stage_to_device: tuple[int, ...], microbatches: int) -> Schedule:
        """The schedule for that many microbatches.

        Raises:
            ValueError: it is for another number of stages or microbatches, or puts a
                stage elsewhere.
        """
        # A user's schedule or function may give anything, so this is checked for all.
        schedule, stages = (
            self._made(stage_to_device, microbatches),
            len(stage_to_device),
        )
        if (schedule.stages, schedule.microbatches) != (stages, microbatches):
            raise ValueError(
                f"the schedule {schedule.name!r} is for "
                f"{counted(schedule.stages, 'stage')} and "
                f"{counted(schedule.microbatches, 'microbatch', 'es')}, "
                f"but the pipe has {counted(stages, 'stage')} and this batch gives "
                f"{counted(microbatches, 'microbatch', 'es')}; give a "
                "function `f(devices, microbatches)` to make one for each batch size"
            )
        if schedule.stage_to_device != stage_to_device:
            raise ValueError(
                f"the schedule {schedule.name!r} for "
                f"{counted(microbatches, 'microbatch', 'es')} puts the stages on the "
                "devices "
                f"{schedule.stage_to_device}, but the parameters are placed on "
                f"{stage_to_device}"
            )
        return schedule


@dataclasses.dataclass(frozen=True)
class _ByName(Scheduling):
    """A named schedule puts one stage on each device, or two, or, where it takes any
    number, at least two on as many devices as that allows.
    """

    option: str

    def stages(self, available: int, chunks: int, layers: int) -> int:
        each = NAMES[self.option].per_device or 2
        if layers < each:
            raise ValueError(
                f"`Pipe(schedule={shown(self.option)})` puts {each} stages on each "
                f"device, but the model has {layers} layer"
            )
        return each * min(available, layers // each)

    def stage_to_device(
        self, stages: int, available: int, chunks: int
    ) -> tuple[int, ...]:
        devices = self._devices(stages, available)
        # The map is the same for any number of microbatches, and one is the cheapest to
        # make.
        return named(self.option, devices, 1, stages // devices).stage_to_device

    def _made(self, stage_to_device: tuple[int, ...], microbatches: int) -> Schedule:
        # Back from the map to what it was made of.
        devices = 1 + max(stage_to_device)
        each = len(stage_to_device) // devices
        return named(self.option, devices, microbatches, each)

    def _devices(self, stages: int, available: int) -> int:
        """On how many devices it puts that many stages."""
        call, each = (
            f"`Pipe(schedule={shown(self.option)})`",
            NAMES[self.option].per_device,
        )
        if each is not None:
            if stages % each:
                raise ValueError(
                    f"{call} puts {each} stages on each device, but the pipe has "
                    f"{stages}: give `balance` {stages + 1} entries"
                )
            return stages // each
        if available == 1:
            return 1
        # As many devices as divide the stages evenly, with at least two stages on each.
        for devices in range(min(available, stages // 2), 1, -1):
            if stages % devices == 0:
                return devices
        raise ValueError(
            f"{call} puts at least 2 stages on each device, the same number on all, "
            f"but the pipe has {counted(stages, 'stage')} and "
            f"{available} devices: give `balance` 4 entries, or another multiple of "
            "the number of devices"
        )


@dataclasses.dataclass(frozen=True)
class _Fixed(Scheduling):
    """A schedule for one number of stages and microbatches. A batch that gives another
    number of microbatches is an error of `make`.
    """

    option: Schedule

    def stages(self, available: int, chunks: int, layers: int) -> int:
        return min(self.option.stages, layers)

    def stage_to_device(
        self, stages: int, available: int, chunks: int
    ) -> tuple[int, ...]:
        if self.option.stages != stages:
            raise ValueError(
                f"`Pipe(schedule=...)`: the schedule {self.option.name!r} has "
                f"{counted(self.option.stages, 'stage')}, but the pipe "
                f"has {stages}"
            )
        return self.option.stage_to_device

    def _made(self, stage_to_device: tuple[int, ...], microbatches: int) -> Schedule:
        return self.option


@dataclasses.dataclass(frozen=True)
class _ByFunction(Scheduling):
    """A function of the user's. For a map it is asked for the largest number of devices
    on which it makes as many stages as there are.
    """

    option: Generator

    def stages(self, available: int, chunks: int, layers: int) -> int:
        return min(self._for_map(available, chunks).stages, layers)

    def stage_to_device(
        self, stages: int, available: int, chunks: int
    ) -> tuple[int, ...]:
        # A function says how many stages it makes of some devices, not the reverse. So
        # it is asked about every number of devices that divides the stages evenly.
        made: dict[int, int] = {}
        for devices in range(min(stages, available), 0, -1):
            if stages % devices:
                continue
            schedule = self._for_map(devices, chunks)
            if schedule.stages == stages:
                return schedule.stage_to_device
            made[devices] = schedule.stages
        if available < stages:
            # More devices may be what is missing. A map that needs too many makes
            # `first_placements`, or `balance`, say how many there are.
            return tuple(range(stages))
        told = ", ".join(
            f"{counted(s, 'stage')} on {counted(d, 'device')}" for d, s in made.items()
        )
        raise ValueError(
            f"`Pipe(schedule=...)`: the pipe has {counted(stages, 'stage')}, but the "
            f"function makes {told}"
        )

    def _made(self, stage_to_device: tuple[int, ...], microbatches: int) -> Schedule:
        return self._called(1 + max(stage_to_device), microbatches)

    def _for_map(self, devices: int, chunks: int) -> Schedule:
        """A schedule that is looked at for its stages and its map alone."""
        return self._called(devices, min(chunks, MOST_FOR_A_MAP * devices))

    def _called(self, devices: int, microbatches: int) -> Schedule:
        schedule = self.option(devices, microbatches)
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"`Pipe(schedule=...)`: the function returned {shown(schedule)}, no "
                "fpipe.schedules.Schedule"
            )
        return schedule
