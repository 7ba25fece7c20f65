"""The placed executor's loop: a plan's instructions, dispatched asynchronously one after the other."""

import contextlib
import contextvars
import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from fpipe._errors import add_note
from fpipe._placement import Placement
from fpipe._plan import Free, Instruction, Layout, Move, Plan, Run, used_later
from fpipe._stage import Leaf, Port

# Read slots, call, write slots, drop slots.
Step: TypeAlias = tuple[
    Callable[[list[Any]], Sequence[Any]], Callable[..., Sequence[Any]], tuple[int, ...], tuple[int, ...]
]

Observer: TypeAlias = Callable[[Instruction, Sequence[Any]], None]
_observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar("observer", default=None)


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Call `observer(instruction, slots)` after each instruction that is issued meanwhile."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


@dataclasses.dataclass(frozen=True)
class Bound:
    """A plan ready to run: its instructions as steps, with the frees that follow folded in.

    Attributes:
        at: the instruction of each step.
        half: the first step of the backward half.
        params: how many parameters there are; they fill the first slots.
        feeds: what else is put where, in one transfer for each placement.
        later: the slots that the backward half reads and does not make.
        blank: the slots before a call.
    """

    plan: Plan
    layout: Layout
    steps: tuple[Step, ...]
    at: tuple[int, ...]
    half: int
    params: tuple[Placement, ...]
    feeds: tuple[tuple[Placement, tuple[Leaf, ...], tuple[int, ...]], ...]
    later: tuple[int, ...]
    blank: tuple[Any, ...]

    def slots(self, params: Sequence[Any], others: Mapping[Port, Sequence[Any]]) -> list[Any]:
        """Fresh slots with the inputs in them, each put where it is read."""
        slots = list(self.blank)
        slots[: len(params)] = params
        for placement, leaves, numbers in self.feeds:
            for n, array in zip(numbers, placement.put([others[port][k] for port, k in leaves]), strict=True):
                slots[n] = array
        return slots

    def run(self, slots: list[Any], start: int = 0, stop: int | None = None) -> list[Any]:
        """Issue the steps in order; returns the slots."""
        observer, n = _observer.get(), start
        try:
            for n, (get, call, outs, frees) in enumerate(self.steps[start:stop], start):
                for out, array in zip(outs, call(*get(slots))):  # noqa: B905 - strict costs time here
                    slots[out] = array
                for dead in frees:
                    slots[dead] = None
                if observer is not None:
                    observer(self.plan.instructions[self.at[n]], slots)
        except Exception as error:
            add_note(error, f"while dispatching {self._described(self.plan.instructions[self.at[n]])}")
            raise
        return slots

    def _described(self, item: Instruction) -> str:
        if not isinstance(item, Run):
            return "a transfer"
        if item.action is None:
            return f"{item.name!r} on {item.placement.device}"
        kind, s, i = item.action
        doing = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}[kind]
        layers = self.layout.stages[s].described
        return f"the {doing} of stage {s} ({layers}), microbatch {i}, on {item.placement.device}"


def bind(plan: Plan, layout: Layout, constant: Callable[[Any, Placement], Any]) -> Bound:
    """Turn a plan into steps; `constant(value, placement)` is a value that stays where it is read."""
    constants = {n: constant(value, plan.slots[n].placement) for n, value in plan.constants.items()}
    steps: list[Step] = []
    at: list[int] = []
    half = None
    for n, item in enumerate(plan.instructions):
        if n == plan.backward:
            half = len(steps)
        if isinstance(item, Free):
            get, call, outs, frees = steps[-1]
            steps[-1] = (get, call, outs, (*frees, *item.slots))
        else:
            steps.append((_getter(item.ins), item.call if isinstance(item, Run) else _mover(item), item.outs, ()))
            at.append(n)
    params = [feed for feed in plan.feeds if feed.leaf.port.kind == "params"]
    assert [feed.slot for feed in params] == list(range(len(params))), "parameters fill the first slots, in order"
    feeds: dict[Placement, list[tuple[Leaf, int]]] = {}
    for leaf, slot in plan.feeds[len(params) :]:
        feeds.setdefault(plan.slots[slot].placement, []).append((leaf, slot))
    return Bound(
        plan,
        layout,
        tuple(steps),
        tuple(at),
        len(steps) if half is None else half,
        tuple(plan.slots[feed.slot].placement for feed in params),
        tuple((place, tuple(leaf for leaf, _ in e), tuple(n for _, n in e)) for place, e in feeds.items()),
        tuple(sorted(used_later(plan.instructions[plan.backward :]) - set(plan.constants) - set(plan.cotangents))),
        tuple(constants.get(n) for n in range(len(plan.slots))),
    )


def _getter(slots: Sequence[int]) -> Callable[[list[Any]], Sequence[Any]]:
    if len(slots) == 0:
        return lambda _: ()
    if len(slots) == 1:
        (n,) = slots
        return lambda values: (values[n],)
    return operator.itemgetter(*slots)


def _mover(item: Move) -> Callable[..., Sequence[Any]]:
    put = item.placement.put
    return lambda *arrays: put(arrays)
