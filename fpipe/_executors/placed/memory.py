"""What is alive while a plan runs, read off the plan: its instructions are gone through
with the sizes of their slots.

An array is alive from the instruction that makes it to the `Free` behind its last use.
That is also when memory is taken and given back: an allocator works in the order of
dispatch. A donated array gives its place to what is made.
"""

from collections.abc import Callable, Iterator, Mapping, Set
from typing import NamedTuple

import jax

from fpipe._core.pytrees import nbytes
from fpipe._executors.placed.compile import runs
from fpipe._executors.placed.instructions import Free, Move, Plan, Run
from fpipe._executors.placement import Placement
from fpipe._executors.plan_data import Role


class Peak(NamedTuple):
    """The fullest moment of a place, in bytes.

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
        """All of it."""
        return sum(self.roles.values()) + self.temporary


def levels(
    plan: Plan, given: Mapping[int, jax.ShapeDtypeStruct], kept: Set[int]
) -> Iterator[tuple[int, Mapping[Placement, Mapping[Role, int]]]]:
    """The bytes that are alive after each instruction (first after none, as number -1),
    by place and role.

    Arguments:
        given: the shapes of the plan's inputs, by slot.
        kept: those of them that are the caller's own arrays, which stay.
    """
    now: dict[Placement, dict[Role, int]] = {}
    sizes: dict[int, int] = {}

    def take(n: int, size: int) -> None:
        sizes[n] = size
        roles = now.setdefault(plan.slots[n].placement, {})
        roles[plan.slots[n].role] = roles.get(plan.slots[n].role, 0) + size

    def drop(n: int) -> None:
        if n in sizes and n not in kept:
            now[plan.slots[n].placement][plan.slots[n].role] -= sizes.pop(n)

    for n, shape in given.items():
        take(n, nbytes(shape))
    yield -1, now
    traces = {n: traced for n, _, traced, _ in runs(plan, given)}
    for number, item in enumerate(plan.instructions):
        if isinstance(item, Free):
            for n in item.slots:
                drop(n)
        elif isinstance(item, Move):
            for n, out in zip(item.ins, item.outs, strict=True):
                take(out, sizes[n])
        else:
            traced = traces[number]
            for n, info in zip(item.ins, traced.args_info[0], strict=True):
                if info.donated:
                    drop(n)
            for out, shape in zip(item.outs, traced.out_info, strict=True):
                take(out, nbytes(shape))
        yield number, now


def peaks(
    plan: Plan,
    given: Mapping[int, jax.ShapeDtypeStruct],
    kept: Set[int],
    temporary: Callable[[int], int] = lambda n: 0,
) -> dict[Placement, Peak]:
    """The peak of each place; `temporary` is what a run needs for itself, by the number
    of its instruction.
    """
    found: dict[Placement, Peak] = {}
    for n, now in levels(plan, given, kept):
        if n < 0:
            found |= {
                place: Peak(dict(roles), 0, "the start") for place, roles in now.items()
            }
            continue
        item = plan.instructions[n]
        if isinstance(item, Free):
            continue
        running = isinstance(item, Run)
        place, extra = item.placement, temporary(n) if running else 0
        if place not in found or sum(now[place].values()) + extra > found[place].total:
            doing = str(item.action or item.name) if running else "a transfer"
            found[place] = Peak(dict(now[place]), extra, doing)
    return found
