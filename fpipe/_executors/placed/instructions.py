"""A plan as data: what is issued, in which order, and from which slots to which.

A *slot* is a register for one array. It lives on one placement, it is written once, and
it is freed once. An instruction runs a program from slots to slots, moves slots to
another placement, or frees slots. Nothing in a plan depends on the values of a call, so
a plan is made once and run for every call of the same types.

A training step of two stages with one microbatch, as `str(plan)` shows it:

    cpu:0: F(0,0) (params 0[0], x[0]) -> y[0] stage0 mb0
    free params 0[0]
    cpu:0 -> cpu:1: y[0] stage0 mb0
    cpu:1: F(1,0) B(1,0) (params 1[0], y[0] stage0 mb0, targets[0])
        -> loss[0] stage1 mb0, gradient x[0] stage1 mb0, sum params 1[0] stage1 mb0
    free params 1[0], y[0] stage0 mb0, targets[0]
    cpu:1 -> cpu:0: gradient x[0] stage1 mb0
    free gradient x[0] stage1 mb0
    cpu:0: B(0,0) (x[0], gradient x[0] stage1 mb0, y[0] stage0 mb0)
        -> sum params 0[0] stage0 mb0
    free x[0], gradient x[0] stage1 mb0, y[0] stage0 mb0
    cpu:1: reduce loss (loss[0] stage1 mb0) -> loss[0]
    free loss[0] stage1 mb0

(Each instruction is one line; they are broken here.) A moved array keeps its name:
`y[0] stage0 mb0` is one slot on `cpu:0` and another one on `cpu:1`. The forward and the
backward of the last stage are one program.

In the drawing, `free params 0[0]` drops the plan's reference; the caller has another.
With one microbatch the backward *makes* `sum params 1[0]`. With several, each adds to
it, and a program `zeros` makes the sum that the first one adds to.
"""

import dataclasses
import enum
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.sharding import Sharding

from fpipe._core.pytrees import PyTree, Shape, fill_gradient
from fpipe._executors.placement import Placement
from fpipe._executors.plan_data import Role
from fpipe._executors.transfers import Sending
from fpipe._model.stages import Leaf
from fpipe._program.code import Code, ProgramValue
from fpipe.schedules import Action, Kind, Schedule


@dataclasses.dataclass(frozen=True)
class Part:
    """An action, as a part of the program that runs it.

    Attributes:
        action: of the schedule.
        code: what it computes, as data.
        call: the code under `jax.jit`, as a program of its own.
        ins, outs: the slots of what it reads and makes. What one part of a program
            makes for the next alone has slots too, and they stay empty.
    """

    action: Action
    code: Code
    call: Callable[..., Sequence[Any]]
    ins: tuple[int, ...]
    outs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """Run a program on its placement: an action of the schedule, several, or none.

    Attributes:
        name: the program's, such as `stage2_F`.
        call: a function under `jax.jit`, from arrays to arrays. Stages that compute the
            same have one function, and so share what is traced.
        ins, outs: the slots that it reads, and those that it writes, which have
            consecutive numbers.
        placement: where it runs.
        parts: the actions that it runs, in their order; none for the work around the
            schedule.
        calls_host: whether the program calls Python while it runs.
        donates: those of `ins` whose arrays it consumes.
    """

    name: str
    call: Callable[..., Sequence[Any]]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    placement: Placement
    parts: tuple[Part, ...] = ()
    calls_host: bool = False
    donates: tuple[int, ...] = ()

    @property
    def actions(self) -> tuple[Action, ...]:
        """The actions that it runs."""
        return tuple(part.action for part in self.parts)

    @property
    def doing(self) -> str:
        """What it does: its actions, or its name where it has none."""
        return " ".join(map(str, self.actions)) or self.name

    @property
    def on_host(self) -> Mapping[int, Any]:
        """The types of those results that lie in the host's memory, by number."""
        # A program of several actions has none.
        return self.parts[0].code.on_host if len(self.parts) == 1 else {}

    @property
    def inside(self) -> dict[int, jax.ShapeDtypeStruct]:
        """The shapes of what stays inside of it, by slot."""
        outs = {*self.outs}
        found: dict[int, jax.ShapeDtypeStruct] = {}
        for part in self.parts if len(self.parts) > 1 else ():
            avals = part.code.graph.avals
            values = (*part.code.outs, *part.code.sums)
            for slot, value in zip(part.outs, values, strict=True):
                if slot not in outs:
                    found[slot] = jax.ShapeDtypeStruct(
                        avals[value].shape, avals[value].dtype
                    )
        return found


@dataclasses.dataclass(frozen=True)
class Move:
    """Put the arrays of `ins`, wherever they are, on a placement.

    Attributes:
        ins: the slots that are read.
        outs: those that are written; they have consecutive numbers.
        placement: where the arrays go.
        sendings: where some placements are meshes, how each array comes there: it has
            as many of `ins` as it is sent in parts. Empty: each goes as it is.
        crosses: whether the arrays come from another process. Then they come from one
            placement, and every process issues the move.
    """

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    placement: Placement
    sendings: tuple[Sending, ...] = ()
    crosses: bool = False

    @property
    def sources(self) -> tuple[int, ...]:
        """For each of `outs` the slot that it comes from, or the first of its parts."""
        if not self.sendings:
            return self.ins
        ends = itertools.accumulate(to.parts for to in self.sendings)
        return tuple(
            self.ins[end - to.parts]
            for end, to in zip(ends, self.sendings, strict=True)
        )

    def shape(self, n: int, source: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """What comes to be in `outs[n]`, from the shape in `sources[n]`."""
        if not self.sendings:
            return source
        # What is cut for its way to another mesh is put together there.
        return source.update(shape=self.sendings[n].shape(source.shape))


@dataclasses.dataclass(frozen=True)
class Copy:
    """Copy arrays between a device and the memory of its host.

    Attributes:
        ins: the slots that are read.
        outs: those that are written; they have consecutive numbers.
        placement: the device, or the devices.
        action: an `O` of the schedule, which copies to the host, or an `L`.
    """

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    placement: Placement
    action: Action

    @property
    def to_host(self) -> bool:
        """Whether it copies to the host, and not back."""
        return self.action.kind == "O"

    def lies(self, sharding: Sharding) -> Sharding:
        """How a copy lies of what lies by some sharding."""
        kind = "pinned_host" if self.to_host else "device"
        return sharding.with_memory_kind(kind)

    def copied(self, *arrays: Any) -> list[Any]:
        """The copies."""
        # Each by its own sharding: of some arrays over a mesh XLA decides how they lie.
        targets = [self.lies(array.sharding) for array in arrays]
        return jax.device_put(list(arrays), targets)


@dataclasses.dataclass(frozen=True)
class Free:
    """Drop the references to arrays. JAX frees an array when its last use is over.

    Never `Array.delete()`: a slot may hold an array of the caller, or an alias of one
    (a `device_put` to the same device aliases), and that must outlive the call.
    """

    slots: tuple[int, ...]


Instruction: TypeAlias = Run | Move | Copy | Free


# What a slot can hold. These names are equal in every run and in every process, so that
# a value can be found again by its name: a plan has no other table of its values.


@dataclasses.dataclass(frozen=True, slots=True)
class StageValue:
    """What a stage makes of one microbatch."""

    value: ProgramValue
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.value} stage{self.stage} mb{self.microbatch}"


@dataclasses.dataclass(frozen=True, slots=True)
class StartedSum:
    """Zeros that a stage adds its gradients to.

    A sum has a new slot after each backward that adds to it (a `StageValue`), because a
    slot is written once. The memory stays the same: the array is donated.
    """

    leaf: Leaf
    stage: int

    def __str__(self) -> str:
        return f"sum {self.leaf} stage{self.stage}"


@dataclasses.dataclass(frozen=True, slots=True)
class JoinedGradient:
    """A stage's gradient of an input of the call: the pieces of all microbatches, or
    the parts of all its devices added up.
    """

    leaf: Leaf
    stage: int

    def __str__(self) -> str:
        return f"gradient {self.leaf}"


@dataclasses.dataclass(frozen=True, slots=True)
class GatheredParam:
    """A parameter that is cut over axes of rows, gathered for all actions of a step."""

    leaf: Leaf

    def __str__(self) -> str:
        return f"gathered {self.leaf}"


@dataclasses.dataclass(frozen=True, slots=True)
class CallValue:
    """What the call is given (an input or a cotangent) or returns, whole."""

    value: ProgramValue

    def __str__(self) -> str:
        return str(self.value)


@dataclasses.dataclass(frozen=True, slots=True)
class Number:
    """The number of a microbatch or of a layer."""

    number: int

    def __str__(self) -> str:
        return f"number {self.number}"


@dataclasses.dataclass(frozen=True, slots=True)
class OnHost:
    """What a stage keeps for its backward, while that waits in the host's memory."""

    of: "Value"
    stage: int

    def __str__(self) -> str:
        return f"{self.of} on the host"


@dataclasses.dataclass(frozen=True, slots=True)
class BroughtBack:
    """What a stage keeps for its backward, back from the host's memory."""

    of: "Value"
    stage: int

    def __str__(self) -> str:
        return f"{self.of} back"


@dataclasses.dataclass(frozen=True, slots=True)
class SentPart:
    """A part of a value that is cut for its way to another placement."""

    of: "Value"
    to: Sending
    number: int

    def __str__(self) -> str:
        return f"part {self.number} of {self.of}"


Value: TypeAlias = (
    StageValue
    | StartedSum
    | JoinedGradient
    | GatheredParam
    | CallValue
    | Number
    | OnHost
    | BroughtBack
    | SentPart
)


class Slot(NamedTuple):
    """A register: what it holds, where that is, and what it is for. A value that is
    moved has a slot on each placement where it is.

    While a plan is made, slots are found by these three. In the plan they are numbers,
    the indices of a list, because a run looks up each of them.
    """

    value: Value
    placement: Placement
    role: Role

    @property
    def name(self) -> str:
        """What it holds, as plans and recordings show it."""
        return str(self.value)

    def on(self, placement: Placement) -> "Slot":
        """The slot of the same value on a placement."""
        if self.placement is placement:
            return self
        return Slot(self.value, placement, self.role)


class Feed(NamedTuple):
    """An input of the call: a leaf, and the slot that it is put in."""

    leaf: Leaf
    slot: int


class OutputTree(NamedTuple):
    """A pytree that the call returns, as slots.

    Attributes:
        shape: its structure, and the shapes of its arrays.
        slots: that of each array, in the order of `shape`.
    """

    shape: Shape
    slots: tuple[int, ...]

    def read(self, values: Sequence[Any]) -> PyTree:
        """The pytree, from the values of all slots of the plan."""
        return self.shape.spec.unpack([values[slot] for slot in self.slots])


class GradientTree(NamedTuple):
    """The gradient of an argument of the call, as slots.

    Attributes:
        shape: the argument's structure, and the shapes of its arrays.
        slots: that of each array; `None` where there is no gradient.
    """

    shape: Shape
    slots: tuple[int | None, ...]

    def read(self, values: Sequence[Any]) -> PyTree:
        """The pytree, from the values of all slots of the plan."""
        found = [None if slot is None else values[slot] for slot in self.slots]
        return fill_gradient(self.shape.spec, self.shape.leaves, found)


class Half(enum.Enum):
    """What is run of a plan.

    A differentiated call (`jax.vjp`) runs the two halves of its plan, the second one
    when its pull-back is called. Every other call runs the whole plan.
    """

    WHOLE = "whole"
    FORWARD = "forward"
    BACKWARD = "backward"


# What runs in the first half, the forward: the copies of what forwards leave too.
FIRST_HALF: tuple[Kind, ...] = ("F", "O")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Instructions in order, and the slots of what comes in and goes out.

    Attributes:
        schedule: what it was made from.
        order: the actions in the order in which they are issued, also those that have
            nothing to run.
        instructions: everything, in the order in which it is issued.
        slots: what each slot holds.
        shardings: how the arrays of slots on meshes lie.
        free: the slots whose sharding XLA decides; `shardings` has a guess.
        stacks: for each slot of an input that holds its pieces as a stack, how many
            pieces these are.
        feeds: the inputs; parameters first, in the slots 0, 1, ….
        constants: slots with a value known when planning.
        backward: the number of the first instruction of the backward half (of a
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
    shardings: Mapping[int, Sharding]
    free: frozenset[int]
    stacks: Mapping[int, int]
    feeds: tuple[Feed, ...]
    constants: Mapping[int, Any]
    backward: int
    cotangents: tuple[int, ...]
    y: OutputTree | None
    loss: OutputTree | None
    aux: OutputTree | None
    state: Mapping[int, OutputTree]
    gradients: Mapping[Leaf, int]
    warnings: tuple[str, ...]

    def sharding(self, slot: int) -> Sharding:
        """How the array of a slot lies."""
        return self.shardings.get(slot, self.slots[slot].placement.sharding)

    @functools.cached_property
    def returned(self) -> tuple[int, ...]:
        """The slots of what a call returns."""
        trees = [self.y, self.loss, self.aux, *self.state.values()]
        slots = [slot for tree in trees if tree is not None for slot in tree.slots]
        return (*slots, *self.gradients.values())

    def numbers(self, half: Half) -> range:
        """The numbers of the instructions of a half, or of all."""
        start = self.backward if half is Half.BACKWARD else 0
        end = self.backward if half is Half.FORWARD else len(self.instructions)
        return range(start, end)

    def __str__(self) -> str:
        def names(slots: Iterable[int]) -> str:
            return ", ".join(self.slots[slot].name for slot in slots)

        # Actions are named by their kind, the rest by the name of its program: a reader
        # compares this with the schedule.
        lines = []
        for item in self.instructions:
            if isinstance(item, Run):
                line = f"{item.placement}: {item.doing} ({names(item.ins)}) -> "
                lines.append(line + names(item.outs))
            elif isinstance(item, Copy):
                lines.append(f"{item.placement}: {item.action} {names(item.ins)}")
            elif isinstance(item, Move):
                sources = dict.fromkeys(
                    str(self.slots[slot].placement) for slot in item.ins
                )
                line = f"{' and '.join(sources)} -> {item.placement}: "
                lines.append(line + names(item.outs))
            else:
                lines.append(f"free {names(item.slots)}")
        return "\n".join(lines)


def add_frees(
    code: Sequence[Run | Move | Copy], keep: Iterable[int]
) -> list[Instruction]:
    """Add a `Free` after the last use of each slot that is not kept.

    After each instruction, here of a forward of two stages that keeps `z`, stands:

        F: x -> y            free x
        move: y -> y'        free y
        F: y' -> z           free y'
    """
    # Read backwards, the first time that a slot appears is its last use. A slot that is
    # made and never read is freed right after what makes it.
    seen = set(keep)
    reverse: list[Instruction] = []
    for item in reversed(code):
        last_used = []
        for slot in (*item.ins, *item.outs):
            if slot not in seen:
                seen.add(slot)
                last_used.append(slot)
        if last_used:
            reverse.append(Free(tuple(last_used)))
        reverse.append(item)
    return reverse[::-1]


def read_from_outside(code: Iterable[Instruction]) -> set[int]:
    """The slots that some code reads and does not make.

    Of the backward half of a plan these are the arrays that a pull-back keeps alive.
    """
    read: set[int] = set()
    made: set[int] = set()
    for item in code:
        if not isinstance(item, Free):
            read.update(item.ins)
            made.update(item.outs)
    return read - made
