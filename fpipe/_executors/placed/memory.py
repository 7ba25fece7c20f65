"""What is alive while a plan runs, read off the plan.

The instructions are gone through with the sizes of their slots. An array is alive from
the instruction that makes it to the `Free` after its last use. That is also when
memory is taken and given back: an allocator works in the order of dispatch. A donated
array gives its place to what is made.

For the plan of two stages in `instructions.py`, with parameters of 36 bytes and rows
that make 96, what is alive on cpu:0 after each of the first instructions is

    number  instruction                        parameters  inputs  boundaries
    -1      (the inputs)                       36          96      0
    0       cpu:0: F(0,0) (params 0[0], x[0])  36          96      96
    1       free params 0[0]                   36          96      96

because the caller keeps the parameters.

This needs no device, and counts arrays alone. Two things are not in it: what a program
needs for itself (`peaks` takes that from XLA's analysis, if there is one), and the gaps
that an allocator leaves.
"""

from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.sharding import Sharding, SingleDeviceSharding

from fpipe._core.pytrees import device_bytes, host_bytes
from fpipe._executors.placed.compile import traced_runs
from fpipe._executors.placed.instructions import (
    Copy,
    Free,
    Instruction,
    Move,
    Plan,
    Run,
)
from fpipe._executors.placement import Placement
from fpipe._executors.plan_data import Role

# The bytes that are alive, by placement and role.
Level: TypeAlias = Mapping[Placement, Mapping[Role, int]]


def on_one_device(
    shape: jax.ShapeDtypeStruct, sharding: Sharding
) -> jax.ShapeDtypeStruct:
    """What each device of a placement has of an array."""
    if isinstance(sharding, SingleDeviceSharding):
        return shape
    return shape.update(
        shape=sharding.shard_shape(shape.shape), sharding=shape.sharding
    )


class Peak(NamedTuple):
    """The fullest moment of a placement, in bytes.

    Attributes:
        roles: the arrays that are alive, by what they are for.
        temporary: what the program that runs needs for itself.
        doing: what runs.
    """

    roles: Mapping[Role, int]
    temporary: int
    doing: str

    @property
    def total(self) -> int:
        """The bytes of arrays, and what the program needs for itself."""
        return sum(self.roles.values()) + self.temporary


def levels(
    plan: Plan,
    shapes: Mapping[int, jax.ShapeDtypeStruct],
    kept: Set[int],
    count: Callable[[Any], int] = device_bytes,
) -> Iterator[tuple[int, Level]]:
    """What is alive after each instruction, with its number; first after none, as
    number -1. The level is the same object each time, because a plan has thousands of
    instructions: copy what you keep.

    Arguments:
        shapes: those of the plan's inputs, by slot.
        kept: those of them that are the caller's own arrays, which stay.
        count: the bytes that an array takes: in the memory of its device, or of the
            host.
    """
    level: dict[Placement, dict[Role, int]] = {}
    sizes: dict[int, int] = {}
    held: dict[int, jax.ShapeDtypeStruct] = {}

    def take(slot: int, shape: jax.ShapeDtypeStruct) -> None:
        held[slot] = shape
        size = sizes[slot] = count(on_one_device(shape, plan.sharding(slot)))
        _, placement, role = plan.slots[slot]
        roles = level.setdefault(placement, {})
        roles[role] = roles.get(role, 0) + size

    def drop(slot: int) -> None:
        if slot in sizes and slot not in kept:
            _, placement, role = plan.slots[slot]
            level[placement][role] -= sizes.pop(slot)

    # Inputs are put where they are read before the first instruction is issued, also
    # those of the last stage: they lie there while the pipeline fills.
    for slot, shape in shapes.items():
        take(slot, shape)
    yield -1, level
    traces = {run.number: run for run in traced_runs(plan, shapes)}
    for number, item in enumerate(plan.instructions):
        if isinstance(item, Free):
            for slot in item.slots:
                drop(slot)
        elif isinstance(item, Move):
            for n, (source, target) in enumerate(
                zip(item.sources, item.outs, strict=True)
            ):
                take(target, item.shape(n, held[source]))
        elif isinstance(item, Copy):
            for source, target in zip(item.ins, item.outs, strict=True):
                shape = held[source]
                lies = item.lies(shape.sharding or plan.sharding(source))
                take(target, shape.update(sharding=lies))
        else:
            # What a program consumes is gone before its results are there.
            run = traces[number]
            for slot, info in zip(item.ins, run.traced.args_info[0], strict=True):
                if info.donated:
                    drop(slot)
            for slot, shape in zip(item.outs, run.made, strict=True):
                take(slot, shape)
        yield number, level


def peaks(
    plan: Plan,
    shapes: Mapping[int, jax.ShapeDtypeStruct],
    kept: Set[int],
    temporary: Callable[[int], int] = lambda number: 0,
    inside: bool = True,
) -> dict[Placement, Peak]:
    """The peak of each placement.

    Arguments:
        shapes, kept: as for `levels`.
        temporary: what a run needs for itself, by the number of its instruction.
        inside: whether what one action of a program leaves for the next one there
            counts as an array; if not, it is in `temporary`.
    """
    # Only the placement of an instruction can have become fuller by it.
    found: dict[Placement, Peak] = {}
    for number, level in levels(plan, shapes, kept):
        if number < 0:
            for placement, roles in level.items():
                found[placement] = Peak(dict(roles), 0, "the start")
            continue
        item = plan.instructions[number]
        if isinstance(item, Free):
            continue
        own = 0
        doing = "a transfer"
        roles = dict(level[item.placement])
        if isinstance(item, Run):
            own = temporary(number)
            doing = item.doing
            for slot, shape in item.inside.items() if inside else ():
                role = plan.slots[slot].role
                size = device_bytes(on_one_device(shape, plan.sharding(slot)))
                roles[role] = roles.get(role, 0) + size
        elif isinstance(item, Copy):
            doing = str(item.action)
        now = Peak(roles, own, doing)
        if item.placement not in found or now.total > found[item.placement].total:
            found[item.placement] = now
    return found


def _uses_host(item: Instruction) -> bool:
    """Whether an instruction puts something into the host's memory."""
    if isinstance(item, Run):
        return bool(item.on_host)
    return isinstance(item, Copy) and item.to_host


def most_on_host(
    plan: Plan, shapes: Mapping[int, jax.ShapeDtypeStruct]
) -> dict[Placement, int]:
    """The most bytes that each placement has in its host's memory: what a policy or an
    `O` moves there. It waits for its backwards, and is not at the moment of a device's
    peak alone.
    """
    found: dict[Placement, int] = {}
    if not any(_uses_host(item) for item in plan.instructions):
        return found
    for _, level in levels(plan, shapes, frozenset(), host_bytes):
        for placement, roles in level.items():
            found[placement] = max(found.get(placement, 0), sum(roles.values()))
    return found


def copied_bytes(
    plan: Plan, shapes: Mapping[int, jax.ShapeDtypeStruct]
) -> dict[int, int]:
    """For each stage with an `O` the bytes of its first copy, on one device."""
    first: dict[int, Copy] = {}
    for item in plan.instructions:
        if isinstance(item, Copy) and item.to_host:
            first.setdefault(item.action.stage, item)
    wanted = {slot for item in first.values() for slot in item.ins}
    sizes: dict[int, int] = {}
    for run in traced_runs(plan, shapes) if wanted else ():
        item = plan.instructions[run.number]
        assert isinstance(item, Run)
        for slot, shape in zip(item.outs, run.made, strict=True):
            if slot in wanted:
                own = on_one_device(shape, plan.sharding(slot))
                sizes[slot] = device_bytes(own)
    return {
        stage: sum(sizes.get(slot, 0) for slot in item.ins)
        for stage, item in first.items()
    }
