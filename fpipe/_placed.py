"""The placed executor: a short loop over a plan's instructions, dispatched asynchronously."""

import contextlib
import contextvars
import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from fpipe._placement import Placement
from fpipe._plan import Free, Instruction, Move, Plan, Run
from fpipe._stage import Leaf

# One step of the loop: read slots, call, write slots, drop slots.
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
    """A plan ready to run: its instructions as steps, with the frees that follow folded in."""

    plan: Plan
    steps: tuple[Step, ...]
    at: tuple[int, ...]  # the instruction of each step
    split: int  # the first step of the backward half
    params: int  # parameters fill the first slots
    feeds: tuple[tuple[Placement, tuple[Leaf, ...], tuple[int, ...]], ...]
    blank: tuple[Any, ...]

    def slots(self, params: Sequence[Any], others: Mapping[Any, Sequence[Any]]) -> list[Any]:
        """Fresh slots with the inputs in them, each put where it is read."""
        slots = list(self.blank)
        slots[: self.params] = params
        for place, leaves, numbers in self.feeds:
            for n, array in zip(numbers, place.put([others[port][k] for port, k in leaves]), strict=True):
                slots[n] = array
        return slots

    def run(self, slots: list[Any], start: int = 0, stop: int | None = None) -> list[Any]:
        """Issue the steps in order; returns the slots."""
        observer = _observer.get()
        if observer is not None:
            return self._observed(slots, start, stop, observer)
        n = start
        try:
            for n, (get, call, outs, frees) in enumerate(self.steps[start:stop], start):  # noqa: B007
                for out, array in zip(outs, call(*get(slots))):  # noqa: B905 - strict costs time here
                    slots[out] = array
                for dead in frees:
                    slots[dead] = None
        except Exception as error:
            self._note(error, n)
            raise
        return slots

    def _observed(self, slots: list[Any], start: int, stop: int | None, observer: Observer) -> list[Any]:
        for n in range(start, len(self.steps) if stop is None else stop):
            get, call, outs, frees = self.steps[n]
            for out, array in zip(outs, call(*get(slots)), strict=True):
                slots[out] = array
            for dead in frees:
                slots[dead] = None
            observer(self.plan.instructions[self.at[n]], slots)
        return slots

    def _note(self, error: Exception, n: int) -> None:
        item = self.plan.instructions[self.at[n]]
        if isinstance(item, Run) and item.action is not None:
            kind, s, i = item.action
            doing = {
                "F": "the forward",
                "B": "the backward",
                "I": "the input gradient",
                "W": "the weight gradient",
            }[kind]
            error.add_note(f"fpipe: while dispatching {doing} of stage {s}, microbatch {i}, on {item.place.device}")
        else:
            what = item.name if isinstance(item, Run) else "a transfer"
            error.add_note(f"fpipe: while dispatching {what}")


def bind(plan: Plan) -> Bound:
    """Turn a plan into steps."""
    steps: list[Step] = []
    at: list[int] = []
    split = 0
    for n, item in enumerate(plan.instructions):
        if n == plan.backward:
            split = len(steps)
        if isinstance(item, Free):
            get, call, outs, frees = steps[-1]
            steps[-1] = (get, call, outs, (*frees, *item.slots))
            continue
        call = item.call if isinstance(item, Run) else _mover(item)
        steps.append((_getter(item.ins), call, item.outs, ()))
        at.append(n)
    if plan.backward >= len(plan.instructions):
        split = len(steps)
    feeds: dict[Placement, list[tuple[Leaf, int]]] = {}
    params = 0
    for leaf, slot in plan.feeds:
        if leaf.port.kind == "params":
            assert slot == params, "parameters fill the first slots, in order"
            params += 1
        else:
            feeds.setdefault(plan.slots[slot].place, []).append((leaf, slot))
    blank: list[Any] = [None] * len(plan.slots)
    for slot, value in plan.constants.items():
        blank[slot] = value
    grouped = tuple((p, tuple(f for f, _ in e), tuple(n for _, n in e)) for p, e in feeds.items())
    return Bound(plan, tuple(steps), tuple(at), split, params, grouped, tuple(blank))


def _getter(slots: Sequence[int]) -> Callable[[list[Any]], Sequence[Any]]:
    if len(slots) == 0:
        return lambda _: ()
    if len(slots) == 1:
        (n,) = slots
        return lambda values: (values[n],)
    return operator.itemgetter(*slots)


def _mover(item: Move) -> Callable[..., Sequence[Any]]:
    put = item.place.put
    return lambda *arrays: put(arrays)
