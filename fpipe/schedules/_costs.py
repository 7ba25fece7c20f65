"""What actions cost: times and memory, for all stages alike or stage by stage.

In: numbers, or sequences of one number per stage, of any numeric type. Out: `Costs`, a
frozen value of floats and tuples of floats:

    Costs(F=1, B=[2, 3])     F == 1.0 on every stage, B == (2.0, 3.0)
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from fpipe.schedules._action import COPIES, Action
from fpipe.schedules._checks import read_numbers, shown
from fpipe.schedules._rules import Held

Cost: TypeAlias = float | Sequence[float]

# These do not differ from stage to stage.
ONE_NUMBER = ("transfer", "launch")
LAUNCHERS = ("one", "per_device")


class StageMemory(NamedTuple):
    """What one microbatch holds on one stage.

    Attributes:
        full: from the start of its `F` to the end of its `B` or `I`, or to the start of
            its `R`.
        weight: from there to the end of its `W`.
        recomputed: from the start of its `R` to the end of its `B` or `I`; `None`: as
            `full`.
    """

    full: float
    weight: float
    recomputed: float | None = None

    def of(self, held: Held) -> float:
        """What that is."""
        match held:
            case Held.NOTHING:
                return 0.0
            case Held.FORWARD:
                return self.full
            case Held.WEIGHT:
                return self.weight
            case Held.RECOMPUTED:
                return self.full if self.recomputed is None else self.recomputed


@dataclasses.dataclass(frozen=True)
class Costs:
    """The times of actions, and the memory that microbatches hold.

    Times are in any one unit, and memory in any one unit. Each cost is one number, or a
    sequence of one number per stage; `transfer` and `launch` are one number. All
    numbers are finite and not negative.

    Arguments:
        F: the time of a forward.
        B: the time of a full backward. Default: `I + W`.
        I: the time of an input gradient.
        W: the time of a weight gradient.
        transfer: the latency between two different devices. Default 0.
        memory: the memory that a microbatch holds on a stage from the start of its `F`
            to the end of its `B` or `I`. Default 1.
        memory_w: the memory that it holds from there to the end of its `W`. Default:
            `memory`.
        R: the time of a recomputation. Default: `F`. A `B` or `I` after an `R`
            recomputes nothing, so its time has no recomputation in it.
        memory_r: the memory that a microbatch holds from the start of its `R` to the
            end of its `B` or `I`. With an `R`, `memory` is the saved input, and
            `memory_r` the residuals. Default: `memory`.
        offload: the time of one copy of a microbatch's memory between a device and its
            host, an `O` or `L`. A device has one copy engine per direction, which makes
            one copy at a time. Default 0.
        launch: the host's time to launch an action. An action starts after it has been
            launched. The host does not wait for the actions that it has launched.
            Default 0.
        launchers: `"one"` (default): one thread launches the actions of all devices,
            one after the other. `"per_device"`: each device has a thread of its own. It
            launches an action when others have launched what that action needs.

    Raises:
        TypeError: a cost is neither a number nor a sequence of numbers.
        ValueError: a number is negative, infinite or NaN, or `launchers` is unknown.
    """

    F: Cost = 1.0
    B: Cost | None = None
    I: Cost = 1.0  # noqa: E741 - the letter of the literature
    W: Cost = 1.0
    transfer: float = 0.0
    memory: Cost = 1.0
    memory_w: Cost | None = None
    R: Cost | None = None
    memory_r: Cost | None = None
    offload: Cost = 0.0
    launch: float = 0.0
    launchers: str = "one"

    def __post_init__(self) -> None:
        # What is left out stays `None` and is worked out when asked for, so that
        # `dataclasses.replace(costs, W=2)` changes the backward too.
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            call = f"Costs({field.name}={shown(value)})"
            if field.name == "launchers":
                if value not in LAUNCHERS:
                    raise ValueError(
                        f"`{call}`: one of {', '.join(map(repr, LAUNCHERS))}"
                    )
                continue
            each = "" if field.name in ONE_NUMBER else "stage"
            object.__setattr__(self, field.name, read_numbers(call, each, value))

    def of(self, action: Action) -> float:
        """The time of one action.

        Arguments:
            action: the `Action`.
        """
        if action.kind == "B" and self.B is None:
            return _of_stage(self.I, action.stage) + _of_stage(self.W, action.stage)
        if action.kind in COPIES:
            return _of_stage(self.offload, action.stage)
        if action.kind == "R" and self.R is None:
            return _of_stage(self.F, action.stage)
        return _of_stage(getattr(self, action.kind), action.stage)

    def holds(self, stage: int) -> StageMemory:
        """The memory that a microbatch holds on a stage.

        Arguments:
            stage: the stage `s`.

        Returns:
            A named tuple: `full`, from the start of `F` to the end of `B` or `I`, or to
            the start of `R`; `weight`, from there to the end of `W`; `recomputed`, from
            the start of `R` to the end of `B` or `I`.
        """
        full = self.memory
        weight = full if self.memory_w is None else self.memory_w
        recomputed = full if self.memory_r is None else self.memory_r
        return StageMemory(
            _of_stage(full, stage),
            _of_stage(weight, stage),
            _of_stage(recomputed, stage),
        )

    def check(self, stages: int) -> None:
        """Check that costs per stage have one number for each of `stages` stages.

        Arguments:
            stages: the number of stages.

        Raises:
            ValueError: a cost has another number of entries.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple) and len(value) != stages:
                raise ValueError(
                    f"`Costs({field.name}={shown(value)})`: a number for each stage "
                    f"is needed, {stages} in all, got {len(value)}"
                )


def _of_stage(cost: Cost, stage: int) -> float:
    return cost[stage] if isinstance(cost, Sequence) else cost
