"""A dispatching thread for each device, for programs whose dispatch blocks the thread
that calls them.

Each thread issues its device's share of the plan, in the plan's order, and has slots of
its own. What another device's thread needs is posted to that thread's inbox. A thread
waits only for what stands earlier in the plan, so none can wait in a circle.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from fpipe._executors.placed.instructions import Free, Instruction, Plan
from fpipe._executors.placement import Placement

# Slots and what to put in them; `None`: stop.
Message: TypeAlias = tuple[tuple[int, ...], list[Any]] | None


class Step(NamedTuple):
    """A step of one thread.

    Attributes:
        at: the instruction.
        get, call, outs: read slots, call, write slots.
        waits: slots that another thread posts.
        posts: which slots go to which other threads.
        frees: slots that this thread reads no more.
    """

    at: int
    get: Callable[[list[Any]], Sequence[Any]]
    call: Callable[..., Sequence[Any]]
    outs: tuple[int, ...]
    waits: tuple[int, ...]
    posts: tuple[tuple[int, tuple[int, ...]], ...]
    frees: tuple[int, ...]


class Part(NamedTuple):
    """A thread's share of a plan.

    Attributes:
        placement: the device.
        steps: what it does.
        starts: the slots that it starts with.
        ends: those of them that nobody reads afterwards.
        leaves: the slots that it makes and leaves.
    """

    placement: Placement
    steps: tuple[Step, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    leaves: tuple[int, ...]


def divide(
    plan: Plan,
    start: int,
    stop: int,
    step: Callable[
        [int, Instruction],
        tuple[Callable[[list[Any]], Sequence[Any]], Callable[..., Sequence[Any]]],
    ],
) -> list[Part]:
    """Divide instructions `start` to `stop` among threads; `step` is how to read the
    slots of one, and its call.
    """
    work = [
        (n, item)
        for n, item in enumerate(plan.instructions[start:stop], start)
        if not isinstance(item, Free)
    ]
    number: dict[Placement, int] = {}  # of the thread of each placement
    for _, item in work:
        number.setdefault(item.placement, len(number))
    dead = {
        k
        for item in plan.instructions[start:stop]
        if isinstance(item, Free)
        for k in item.slots
    }
    maker = {k: number[item.placement] for _, item in work for k in item.outs}
    readers: dict[int, set[int]] = {}
    last: dict[tuple[int, int], int] = {}  # a slot's last use by each thread
    for n, item in work:
        t = number[item.placement]
        for k in item.ins:
            readers.setdefault(k, set()).add(t)
        for k in (*item.ins, *item.outs):
            last[t, k] = n
    ends: dict[int, list[int]] = {}
    for (t, k), n in last.items():
        if k in dead or maker.get(k) != t:
            ends.setdefault(n, []).append(k)
    steps: list[list[Step]] = [[] for _ in number]
    have: list[set[int]] = [set() for _ in number]
    for n, item in work:
        t = number[item.placement]
        waits = tuple(
            k
            for k in dict.fromkeys(item.ins)
            if k not in have[t] and maker.get(k, t) != t
        )
        have[t].update(waits)
        others = sorted({r for k in item.outs for r in readers.get(k, ()) if r != t})
        posts = tuple(
            (r, tuple(k for k in item.outs if r in readers.get(k, ()))) for r in others
        )
        steps[t].append(
            Step(n, *step(n, item), item.outs, waits, posts, tuple(ends.get(n, ())))
        )
    starts = [
        sorted(k for k, users in readers.items() if t in users and k not in maker)
        for t in number.values()
    ]
    return [
        Part(
            place,
            tuple(steps[t]),
            tuple(starts[t]),
            tuple(k for k in starts[t] if k in dead),
            tuple(sorted(k for k, by in maker.items() if by == t and k not in dead)),
        )
        for place, t in number.items()
    ]


class Failure(NamedTuple):
    """An exception, and the instruction that raised it."""

    at: int
    error: BaseException


class Crew:
    """The threads of one run. None is alive when `run` returns or raises."""

    def __init__(
        self, parts: Sequence[Part], observe: Callable[[int, list[Any]], None] | None
    ) -> None:
        self._parts, self._observe = parts, observe
        self._inboxes: list[queue.SimpleQueue[Message]] = [
            queue.SimpleQueue() for _ in parts
        ]
        self._lock, self._stopped = threading.Lock(), False
        self._failures: list[Failure] = []
        self._ended: list[int] = []
        self._bell: queue.SimpleQueue[None] = (
            queue.SimpleQueue()
        )  # rung when a thread ends
        self._x64 = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]

    def run(self, slots: list[Any]) -> Failure | None:
        """Run all parts, from `slots` and back into them; returns what went wrong
        first, in the plan's order.
        """
        own = [[None] * len(slots) for _ in self._parts]
        for mine, part in zip(own, self._parts, strict=True):
            for k in part.starts:
                mine[k] = slots[k]
        for k in {k for part in self._parts for k in part.ends}:
            slots[k] = None
        threads = [
            threading.Thread(
                target=self._work, args=(t, mine), name=f"fpipe {part.placement.device}"
            )
            for t, (part, mine) in enumerate(zip(self._parts, own, strict=True))
        ]
        try:
            for thread in threads:
                thread.start()
            self._wait(threads)
        except (
            BaseException
        ):  # Ctrl-C, or no thread to be had: what is being dispatched is let through
            self._stop()
            while True:
                with contextlib.suppress(KeyboardInterrupt):  # once is enough
                    self._wait(threads)
                    break
            raise
        for mine, part in zip(own, self._parts, strict=True):
            for k in part.leaves:
                slots[k] = mine[k]
        # What reads the result of a program that failed may fail too, and earlier.
        return min(self._failures, key=lambda failure: failure.at, default=None)

    def _wait(self, threads: Sequence[threading.Thread]) -> None:
        """Until all threads that were started are at their end.

        Not by `join` alone: one that a signal interrupts takes the thread for ended
        (CPython 3.11, bpo-45274).
        """
        started = [thread for thread in threads if thread.ident is not None]
        while len(self._ended) < len(started):
            with contextlib.suppress(queue.Empty):
                self._bell.get(timeout=1.0)
        for thread in started:
            thread.join()

    def _stop(self) -> None:
        self._stopped = True
        for inbox in self._inboxes:
            inbox.put(None)

    def _work(self, t: int, slots: list[Any]) -> None:
        try:
            with jax.enable_x64(
                self._x64
            ):  # a thread's own; transfers and callbacks look at it
                self._dispatch(t, slots)
        finally:
            self._ended.append(t)
            self._bell.put(None)

    def _dispatch(self, t: int, slots: list[Any]) -> None:
        inbox, at = self._inboxes[t], self._parts[t].steps[0].at
        try:
            for at, get, call, outs, waits, posts, frees in self._parts[t].steps:
                for k in waits:
                    while slots[k] is None:
                        message = inbox.get()
                        if message is None:
                            return
                        for n, array in zip(*message):  # noqa: B905 - strict costs time here
                            slots[n] = array
                if self._stopped:
                    return
                for out, array in zip(outs, call(*get(slots))):  # noqa: B905
                    slots[out] = array
                for other, numbers in posts:
                    self._inboxes[other].put((numbers, [slots[k] for k in numbers]))
                for dead in frees:
                    slots[dead] = None
                if self._observe is not None:
                    with self._lock:
                        self._observe(at, slots)
        except BaseException as error:
            self._failures.append(Failure(at, error))
            self._stop()
