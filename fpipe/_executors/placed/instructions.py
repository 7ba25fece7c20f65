"""What a plan is made of, as data.

A *slot* is a register for one array. An instruction runs a program from slots to slots,
moves slots to another placement, or frees slots.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from fpipe._core.pytrees import PyTree, Shape
from fpipe._executors.placement import Placement
from fpipe._executors.plan_data import Role
from fpipe._model.stages import Leaf
from fpipe._program.code import Code
from fpipe.schedules import Action, Schedule


@dataclasses.dataclass(frozen=True)
class Run:
    """Run a program on its placement. `action` is `None` for the work around the
    schedule; `calls_host` and `code` as in `Program`; `donates`: those of `ins` whose
    arrays it consumes.
    """

    name: str
    call: Callable[..., Sequence[Any]]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    placement: Placement
    action: Action | None = None
    calls_host: bool = False
    donates: tuple[int, ...] = ()
    code: Code | None = None


@dataclasses.dataclass(frozen=True)
class Move:
    """Put arrays on another placement."""

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    placement: Placement


@dataclasses.dataclass(frozen=True)
class Free:
    """Drop references."""

    slots: tuple[int, ...]


Instruction: TypeAlias = Run | Move | Free


class Slot(NamedTuple):
    """What a slot holds, for what, and where."""

    name: str
    placement: Placement
    role: Role


class Feed(NamedTuple):
    """An input of the call: a leaf, and the slot that it is put in."""

    leaf: Leaf
    slot: int


class Output(NamedTuple):
    """A pytree that the call returns, as slots."""

    shape: Shape
    slots: tuple[int, ...]

    def read(self, values: Sequence[Any]) -> PyTree:
        """The pytree, from the values of all slots."""
        return self.shape.spec.unpack([values[n] for n in self.slots])


@dataclasses.dataclass(frozen=True)
class Plan:
    """Instructions in order, and the slots of what comes in and goes out.

    Attributes:
        schedule: what it was made from.
        order: the actions in the order in which they are issued, also those that have
            nothing to run.
        instructions: everything, in the order in which it is issued.
        slots: what each slot holds.
        feeds: the inputs; parameters first, in the slots 0, 1, ….
        constants: slots with a value known when planning.
        backward: the index of the first instruction of the backward half (of a
            differentiated call; else the end).
        cotangents: the slots that take the cotangents of `y` (of a differentiated
            call).
        y, loss, aux: what the call returns.
        state: for each layer with state its new state.
        gradients: for each wanted leaf the slot of its gradient.
        warnings: what the user should know.
    """

    schedule: Schedule
    order: tuple[Action, ...]
    instructions: tuple[Instruction, ...]
    slots: tuple[Slot, ...]
    feeds: tuple[Feed, ...]
    constants: Mapping[int, Any]
    backward: int
    cotangents: tuple[int, ...]
    y: Output | None
    loss: Output | None
    aux: Output | None
    state: Mapping[int, Output]
    gradients: Mapping[Leaf, int]
    warnings: tuple[str, ...]

    @property
    def actions(self) -> tuple[Action, ...]:
        """The actions in the order in which they are issued."""
        return tuple(
            r.action
            for r in self.instructions
            if isinstance(r, Run) and r.action is not None
        )

    def __str__(self) -> str:
        def show(numbers: Iterable[int]) -> str:
            return ", ".join(self.slots[n].name for n in numbers)

        lines = []
        for item in self.instructions:
            if isinstance(item, Run):
                what = item.action or item.name
                lines.append(
                    f"{item.placement.device}: {what} ({show(item.ins)}) -> "
                    f"{show(item.outs)}"
                )
            elif isinstance(item, Move):
                sources = dict.fromkeys(
                    str(self.slots[n].placement.device) for n in item.ins
                )
                lines.append(
                    f"{' and '.join(sources)} -> {item.placement.device}: "
                    f"{show(item.ins)}"
                )
            else:
                lines.append(f"free {show(item.slots)}")
        return "\n".join(lines)


def with_frees(code: Sequence[Run | Move], keep: Iterable[int]) -> list[Instruction]:
    """Add a `Free` after the last use of each slot that is not kept."""
    seen, out = set(keep), list[Instruction]()
    for item in reversed(code):
        dead = tuple(n for n in dict.fromkeys((*item.ins, *item.outs)) if n not in seen)
        seen.update(dead)
        if dead:
            out.append(Free(dead))
        out.append(item)
    return out[::-1]


def used_later(code: Sequence[Instruction]) -> set[int]:
    """The slots that `code` reads and does not make."""
    work = [item for item in code if not isinstance(item, Free)]
    return {n for item in work for n in item.ins} - {
        n for item in work for n in item.outs
    }
