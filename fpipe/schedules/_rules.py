"""The dependency rules: what must be done before an action may run.

They are stated here and nowhere else. Validation, simulation, search, the generators
and the executors read `NEEDS`, or a table that is made from it.

One microbatch on three stages; an arrow goes from an action to one that needs it:

    stage 0      stage 1      stage 2

      F -----------> F -----------> F       the boundary
      |              |              |       the residuals
      v              v              v
      I <----------- I <----------- I       the cotangent of the boundary
      |              |              |       the cotangents inside the stage
      v              v              v
      W              W              W

`B` is `I` and `W` in one and stands where `I` stands. It gives the stage before the
same cotangent as `I` does, so a stage may have `B` where its neighbour has `I`.

A backward that recomputes may have its recomputation before it, as an `R`. That needs
no cotangent, so it runs while the cotangent is still on its way:

    stage 1      F ----> R ----> B <---- the cotangent, from stage 2
                the saved   the
                 input   residuals

What a forward left may wait in the host's memory, `O` and `L` copy it there and back:

    stage 1      F ----> O ----> L ----> R or B

A device has a copy engine for each direction, and computes meanwhile. The places of
`O` and `L` in its row say when its memory is free and when it is taken. The copy of an
`O` starts when its forward has ended, and at the place of the `O` the device waits for
its end. The copy of an `L` starts at its place, and the device waits for its end at the
`R`, `B` or `I`. So what a device holds follows from its row, however fast it copies.

Two things are not rules. A device runs its actions in the order of its row, but that
order is the choice of a schedule. And microbatches do not need each other: a model with
state needs its forwards in order, which only such a model asks for.
"""

import dataclasses
import enum
from collections.abc import Collection, Container
from typing import NamedTuple

from fpipe.schedules._action import Action, Kind


@dataclasses.dataclass(frozen=True)
class Need:
    """One thing that an action waits for, of the same microbatch.

    Attributes:
        kinds: an action of any one of these kinds meets the need. Where there is none
            of them there is no need: not every backward has an `R`.
        offset: the stage of that action minus the stage of the one that waits. Where
            there is no such stage there is no need.
    """

    kinds: tuple[Kind, ...]
    offset: int


# The needs of an action stand in the order in which a pipeline meets them.
_BACKWARD = (
    Need(kinds=("F",), offset=0),
    Need(kinds=("L",), offset=0),
    Need(kinds=("R",), offset=0),
    Need(kinds=("B", "I"), offset=+1),
)
NEEDS: dict[Kind, tuple[Need, ...]] = {
    "F": (Need(kinds=("F",), offset=-1),),
    "O": (Need(kinds=("F",), offset=0),),
    "L": (Need(kinds=("O",), offset=0),),
    "R": (Need(kinds=("F",), offset=0), Need(kinds=("L",), offset=0)),
    "B": _BACKWARD,
    "I": _BACKWARD,
    "W": (Need(kinds=("I",), offset=0),),
}


# The kinds that a stage and microbatch may have or lack, in a schedule with backwards.
OPTIONAL: tuple[Kind, ...] = ("O", "L", "R")


class Held(enum.Enum):
    """What a microbatch holds on a stage, between its actions there."""

    NOTHING = enum.auto()
    FORWARD = enum.auto()
    """What the forward left: its residuals, or its input if they are recomputed."""
    RECOMPUTED = enum.auto()
    """The residuals, made again."""
    WEIGHT = enum.auto()
    """What the weight gradient needs."""


# What a device holds follows from the rules: a forward's residuals are kept until
# nothing waits for them any more.
HELD_AFTER: dict[Kind, Held] = {
    "F": Held.FORWARD,
    "O": Held.NOTHING,
    "L": Held.FORWARD,
    "R": Held.RECOMPUTED,
    "B": Held.NOTHING,
    "I": Held.WEIGHT,
    "W": Held.NOTHING,
}
# These take memory when they start. The others give it back, when they end.
TAKE_MEMORY: tuple[Kind, ...] = ("F", "L", "R")


def needs(action: Action, present: Container[Action]) -> list[Action]:
    """The actions that must be done before `action` may run.

    Arguments:
        action: any action.
        present: the actions that take part. They decide whether a neighbour has `B` or
            `I`, and which stages there are. Where only a part of a schedule runs, such
            as its backwards alone, what the others have done counts as done.
    """
    found: list[Action] = []
    for need in NEEDS[action.kind]:
        for kind in need.kinds:
            other = Action(kind, action.stage + need.offset, action.microbatch)
            if other in present:
                found.append(other)
    return found


def crossing_need(kind: Kind) -> Need | None:
    """The need of an action of this kind that another stage meets, if it has one."""
    crossing = [need for need in NEEDS[kind] if need.offset]
    # The clock of `_numbering.py` waits for one other device at a time.
    assert len(crossing) <= 1, kind
    return crossing[0] if crossing else None


class StageKind(NamedTuple):
    """All actions of one kind on one stage, for every microbatch."""

    kind: Kind
    stage: int


def last_needs(
    stages: int, kinds: Collection[Kind]
) -> dict[StageKind, StageKind | None]:
    """For the actions of each kind and stage those that they wait for longest.

    Where every microbatch has the same kinds, one need decides when an action may run:
    a cotangent comes from the next stage, so that stage's forward is done, and this
    stage's before it. `last_needs(2, ("F", "I", "W"))`:

        F0: None   I0: I1   W0: I0
        F1: F0     I1: F1   W1: I1
    """
    last: dict[StageKind, StageKind | None] = {}
    for kind in kinds:
        for stage in range(stages):
            last[StageKind(kind, stage)] = None
            # Later needs in `NEEDS` are met later.
            for need in NEEDS[kind]:
                for other in need.kinds:
                    source = StageKind(other, stage + need.offset)
                    if other in kinds and 0 <= source.stage < stages:
                        last[StageKind(kind, stage)] = source
    return last
