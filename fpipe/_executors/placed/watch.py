"""When the instructions of a plan run: each is stamped when it is issued, and when what
it makes is there.

Devices run behind the thread that dispatches to them. So a thread for each device, and
one for each way between devices, waits for one result after the other, in the order in
which they were issued, and looks at the clock. It holds one array until then. What a
later program consumes cannot be waited for; there a tiny program that reads it, issued
right behind, tells the end.
"""

import dataclasses
import functools
import itertools
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax

from fpipe._executors.placed.instructions import Free, Instruction, Move, Plan, Run
from fpipe._executors.placement import Placement
from fpipe._executors.recording import completed
from fpipe.schedules import Action, Event, ProgramRun, Recording, Transfer

# The halves of a differentiated call; every other call is one whole.
Half: TypeAlias = Literal["whole", "forward", "backward"]
Call: TypeAlias = Callable[..., Sequence[Any]]
Wait: TypeAlias = Callable[[int, Any, float | None], None]


class Way(NamedTuple):
    """How to learn the end of an instruction: wait for one of its results, or for what
    `mark` makes of it.
    """

    result: int
    mark: Callable[[Any], Any] | None


def ways_of(plan: Plan, shapes: Callable[[int], Sequence[Any]]) -> dict[int, Way]:
    """For each instruction that makes something how to learn its end; `shapes(n)` are
    those of a run's results.
    """
    consumed = {
        slot
        for item in plan.instructions
        if isinstance(item, Run)
        for slot in item.donates
    }
    mark = functools.cache(_mark)
    out: dict[int, Way] = {}
    for n, item in enumerate(plan.instructions):
        if isinstance(item, Free) or not item.outs:
            continue
        stays = [k for k, slot in enumerate(item.outs) if slot not in consumed]
        if stays:
            out[n] = Way(stays[0], None)
        else:
            made = shapes(n)
            k = min(range(len(made)), key=lambda k: made[k].size)
            out[n] = Way(k, mark(made[k].shape, made[k].dtype, item.placement))
    return out


def _mark(
    shape: tuple[int, ...], dtype: Any, placement: Placement
) -> Callable[[Any], Any]:
    """A compiled program that reads an array. The sum keeps it from handing on the very
    array.
    """
    array = jax.ShapeDtypeStruct(shape, dtype, sharding=placement.sharding)
    return jax.jit(lambda a: a.reshape(-1)[:1].sum()).lower(array).compile()


class Watch:
    """Watches one run of a plan; as a context, until everything has run.

    Attributes:
        issued, ended: when, by instruction.
        moved: the bytes of each array of a transfer.
        failures: what went wrong on a device, with the instruction.
    """

    def __init__(self, plan: Plan, ways: Mapping[int, Way]) -> None:
        self._plan, self._ways = plan, ways
        self.issued, self.ended, self.moved = (
            dict[int, float](),
            dict[int, float](),
            dict[int, list[int]](),
        )
        self.failures: list[tuple[int, Exception]] = []
        self._lanes = {
            key: _Lane(self._wait, f"fpipe record {n}")
            for n, key in enumerate(
                dict.fromkeys(self._lane(plan.instructions[n]) for n in ways)
            )
        }

    def through(self, n: int, call: Call) -> Call:
        """The call of an instruction, watched."""
        if n not in self._ways:
            return call
        (result, mark), moves = (
            self._ways[n],
            isinstance(self._plan.instructions[n], Move),
        )
        put = self._lanes[self._lane(self._plan.instructions[n])].queue.put

        def watched(*arrays: Any) -> Sequence[Any]:
            self.issued[n] = time.perf_counter()
            made = call(*arrays)
            array = made[result]
            # Some programs run in the thread that calls them: then nobody has to wake
            # up to see the end.
            seen = time.perf_counter() if array.is_ready() else None
            if mark is not None:
                array = mark(array) if seen is None else None
            put((n, array, seen))
            if moves:
                self.moved[n] = [a.nbytes for a in made]
            return made

        return watched

    def __enter__(self) -> "Watch":
        try:
            for lane in self._lanes.values():
                lane.thread.start()
        except (
            BaseException
        ):  # no thread to be had, or Ctrl-C: those that are there end
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for lane in self._lanes.values():
            lane.queue.put(None)
        for lane in self._lanes.values():
            if lane.thread.ident is not None:
                lane.thread.join()

    def _lane(self, item: Instruction) -> Any:
        """What runs one after the other: a device's programs, and transfers from the
        same devices to the same one.
        """
        assert not isinstance(item, Free)
        if isinstance(item, Run):
            return item.placement
        return item.placement, frozenset(
            self._plan.slots[k].placement for k in item.ins
        )

    def _wait(self, n: int, array: Any, seen: float | None) -> None:
        try:
            if array is not None:
                array.block_until_ready()
            self.ended[n] = time.perf_counter() if seen is None else seen
        except Exception as error:
            self.failures.append((n, error))


class _Lane:
    def __init__(self, wait: Wait, name: str) -> None:
        self.queue: queue.SimpleQueue[tuple[int, Any, float | None] | None] = (
            queue.SimpleQueue()
        )
        self.thread = threading.Thread(target=self._work, args=(wait,), name=name)

    def _work(self, wait: Wait) -> None:
        while (entry := self.queue.get()) is not None:
            wait(*entry)
            del entry  # the array, before the next one comes


@dataclasses.dataclass(frozen=True)
class Ran:
    """A run of a plan, or of its halves, with what was seen."""

    plan: Plan
    half: Half
    issued: Mapping[int, float]
    ended: Mapping[int, float]
    moved: Mapping[int, Sequence[int]]

    def joined(self, later: "Ran") -> "Ran":
        """A forward with its pull-back."""
        issued, ended = {**self.issued, **later.issued}, {**self.ended, **later.ended}
        return Ran(self.plan, "whole", issued, ended, {**self.moved, **later.moved})

    def timeline(self) -> Recording:
        """When everything ran, counted from the first start."""
        plan, schedule = self.plan, self.plan.schedule
        starts, ends = _times(plan, self.issued, self.ended)
        zero = min(starts.values(), default=0.0)
        number = _numbers(plan)
        events: dict[Action, Event] = {}
        programs: list[ProgramRun] = []
        transfers: list[Transfer] = []
        for n, start in starts.items():
            item, times = plan.instructions[n], (start - zero, ends[n] - zero)
            if isinstance(item, Move):
                target = number[item.placement]
                for source in dict.fromkeys(plan.slots[k].placement for k in item.ins):
                    own = [plan.slots[k].placement == source for k in item.ins]
                    what = tuple(
                        plan.slots[k].name for k in itertools.compress(item.ins, own)
                    )
                    size = sum(itertools.compress(self.moved[n], own))
                    transfers.append(
                        Transfer(number[source], target, what, size, *times)
                    )
                continue
            assert isinstance(item, Run)
            device, name = number[item.placement], item.name
            if item.action is not None:
                device, name = (
                    schedule.stage_to_device[item.action.stage],
                    item.action.name,
                )
                events[item.action] = Event(device, item.action, *times)
            programs.append(ProgramRun(device, name, *times))
        places = {number[p]: str(p.device) for p in number}
        split = plan.backward < len(plan.instructions)
        order = [
            a
            for a in plan.order
            if not split
            or self.half == "whole"
            or (a.kind == "F") == (self.half == "forward")
        ]
        return Recording(
            completed(schedule, order, events),
            schedule.devices,
            f"{schedule.name}, recorded",
            (),
            tuple(sorted(programs, key=lambda p: (p.start, p.device))),
            tuple(sorted(transfers, key=lambda t: (t.start, t.target))),
            tuple(places.get(d, "") for d in range(schedule.devices)),
        )


def _numbers(plan: Plan) -> dict[Placement, int]:
    """The device of the schedule that each placement is; one that is several of them is
    the first.
    """
    out: dict[Placement, int] = {}
    for item in plan.instructions:
        if isinstance(item, Run) and item.action is not None:
            d = plan.schedule.stage_to_device[item.action.stage]
            out[item.placement] = min(out.get(item.placement, d), d)
    return out


def _times(
    plan: Plan, issued: Mapping[int, float], ended: Mapping[int, float]
) -> tuple[dict[int, float], dict[int, float]]:
    """Starts and ends of the instructions.

    One starts when it has been issued, its device is free, and its inputs are there. An
    end is seen late at times (a thread has to wake up for it), but never later than
    that of what needs it.
    """
    code = [
        (n, item)
        for n, item in enumerate(plan.instructions)
        if n in ended and not isinstance(item, Free)
    ]
    maker = {slot: n for n, item in code for slot in item.outs}
    before: dict[int, list[int]] = {}
    last: dict[Placement, int] = {}
    for n, item in code:
        before[n] = [maker[slot] for slot in item.ins if slot in maker]
        if isinstance(item, Run):
            before[n] += [last[item.placement]] if item.placement in last else []
            last[item.placement] = n
    ends = {n: ended[n] for n, _ in code}
    for n, _ in reversed(code):
        for first in before[n]:
            ends[first] = min(ends[first], ends[n])
    return {
        n: max([issued[n], *(ends[first] for first in before[n])]) for n, _ in code
    }, ends
