"""The instructions of a plan divided among dispatching threads, and these threads.

One thread is enough where a dispatch returns at once: then one share has everything.
Where a program calls Python while it runs, its dispatch may block the thread that calls
it. Then each device has a thread, so that the others do not stand idle meanwhile.

Each thread issues its share of the plan, in the plan's order, and has slots of its own.
What another thread needs is posted to that thread's inbox. A thread waits only for what
stands earlier in the plan, so the threads can never wait for each other in a cycle.

Two stages on two devices, forward only, divided between two threads. The thread of the
target issues a move:

    number  instruction                       thread  waits  posts   frees
    0       cpu:0: F(0,0) (w0, x) -> y        0              y to 1  w0, x, y
    2       cpu:0 -> cpu:1: y -> y'           1       y              y
    4       cpu:1: F(1,0) (w1, y') -> z       1                      w1, y'

The numbers between them are those of `Free`s, which are part of the steps. `z` is left
for the caller.

The thread of the target, and not that of the source, issues a move. So a `device_put`
that has to wait holds up the device that needs the array, and no other.
"""

import contextlib
import functools
import operator
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from fpipe._core.settings import CallerContext
from fpipe._executors.placed.instructions import Copy, Free, Half, Move, Plan, Run
from fpipe._executors.placement import Placement
from fpipe._executors.transfers import Sending, receive

# From arrays to arrays: a compiled program, or a transfer.
Call: TypeAlias = Callable[..., Sequence[Any]]


class Message(NamedTuple):
    """Arrays for another thread, and the slots that they belong in."""

    slots: tuple[int, ...]
    arrays: list[Any]


# `None` in it tells a thread to stop.
Inbox: TypeAlias = "queue.SimpleQueue[Message | None]"


class Post(NamedTuple):
    """What a step makes for another thread."""

    thread: int
    slots: tuple[int, ...]


# How a step is issued: what reads its slots, what to call on them, the slots to write,
# and those to drop afterwards. The loop over these is the host time of a pipeline. So
# it is a plain tuple, which Python unpacks three times as fast as a named one, and the
# slots to write are a slice: one assignment, however many there are.
Issue: TypeAlias = tuple[
    Callable[[list[Any]], Sequence[Any]], Call, slice, tuple[int, ...]
]


class Step(NamedTuple):
    """An instruction as a thread issues it.

    Attributes:
        number: of the instruction in the plan.
        item: the instruction.
        issue: how it is issued. It drops what this thread does not read any more.
        waits: slots that other threads post.
        posts: what goes to other threads.
    """

    number: int
    item: Run | Move | Copy
    issue: Issue
    waits: tuple[int, ...]
    posts: tuple[Post, ...]

    @property
    def call(self) -> Call:
        """What is called."""
        return self.issue[1]

    @property
    def frees(self) -> tuple[int, ...]:
        """The slots that are dropped afterwards."""
        return self.issue[3]

    def with_call(self, call: Call) -> "Step":
        """The same step with another call."""
        read, _, outs, frees = self.issue
        return self._replace(issue=(read, call, outs, frees))


class Share(NamedTuple):
    """What one thread does of a plan.

    Attributes:
        name: of the thread.
        steps: what it issues, in order.
        starts: the slots that it reads and no thread makes.
        consumed: those of them that nobody reads afterwards.
        leaves: the slots that it makes and that are left at the end.
    """

    name: str
    steps: tuple[Step, ...]
    starts: tuple[int, ...]
    consumed: tuple[int, ...]
    leaves: tuple[int, ...]


def divide(
    plan: Plan,
    half: Half,
    threaded: bool,
    compiled: Mapping[int, Call],
    crossings: Mapping[int, Call],
) -> tuple[Share, ...]:
    """Divide what this process does of a plan, or of a half of it, among threads.

    Arguments:
        threaded: whether each placement has a thread; else there is one for all.
        compiled: what to call in place of the call of a run, by the number of its
            instruction.
        crossings: the calls of the moves between processes. One thread makes them all,
            for every process makes them in one order.

    Returns:
        The share of each thread that has something to do.
    """
    # Who makes each slot, who reads it, where each thread uses it last, and whether
    # the plan frees it.
    thread_of: dict[Placement | None, int] = {}
    work: list[tuple[int, int, Run | Move | Copy]] = []
    maker: dict[int, int] = {}
    readers: dict[int, set[int]] = defaultdict(set)
    last_use: dict[tuple[int, int], int] = {}
    freed: set[int] = set()
    for number in plan.numbers(half):
        item = plan.instructions[number]
        if isinstance(item, Free):
            freed.update(item.slots)
            continue
        crosses = number in crossings
        if not crosses and not item.placement.is_here:
            continue
        thread = 0
        if threaded:
            place = None if crosses else item.placement
            thread = thread_of.setdefault(place, len(thread_of))
        work.append((number, thread, item))
        for slot in item.ins:
            readers[slot].add(thread)
            last_use[thread, slot] = number
        for slot in item.outs:
            maker[slot] = thread
            last_use[thread, slot] = number

    # A `Free` of the plan stands after the last use of all threads. Each thread frees
    # its own reference after its own last use, and also that to an array of another
    # thread that the plan keeps. What no thread makes and the plan does not free is the
    # caller's, and stays.
    frees: dict[int, list[int]] = defaultdict(list)
    for (thread, slot), number in last_use.items():
        if slot in freed or maker.get(slot, thread) != thread:
            frees[number].append(slot)

    # The steps. A thread waits for a slot before the first step that reads it. From
    # then on it has the array, and later steps need not wait.
    steps: dict[int, list[Step]] = defaultdict(list)
    arrived: set[tuple[int, int]] = set()
    for number, thread, item in work:
        waits = []
        for slot in item.ins:
            from_another = maker.get(slot, thread) != thread
            if from_another and (thread, slot) not in arrived:
                arrived.add((thread, slot))
                waits.append(slot)
        posted: dict[int, list[int]] = defaultdict(list)
        for slot in item.outs:
            for reader in readers[slot] - {thread}:
                posted[reader].append(slot)
        posts = [Post(reader, tuple(posted[reader])) for reader in sorted(posted)]
        if isinstance(item, Run):
            call = compiled.get(number, item.call)
        else:
            call = crossings.get(number) or _mover(item)
        issue = (_reader(item.ins), call, _span(item.outs), tuple(frees[number]))
        steps[thread].append(Step(number, item, issue, tuple(waits), tuple(posts)))

    # What each thread starts from, and what it leaves. Inputs that several threads read
    # are given to each of them.
    shares = []
    for thread, own in sorted(steps.items()):
        starts = [
            slot
            for slot in sorted(readers)
            if thread in readers[slot] and slot not in maker
        ]
        leaves = [
            slot
            for slot in sorted(maker)
            if maker[slot] == thread and slot not in freed
        ]
        crosses = own[0].number in crossings
        share = Share(
            "fpipe transfers" if crosses else f"fpipe {own[0].item.placement}",
            tuple(own),
            tuple(starts),
            tuple(slot for slot in starts if slot in freed),
            tuple(leaves),
        )
        shares.append(share)
    return tuple(shares)


def _reader(slots: Sequence[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """A function that reads some slots, the fastest that there is."""
    # Of one slot, and of none, `itemgetter` makes no sequence; of a slice it does.
    if len(slots) > 1:
        return operator.itemgetter(*slots)
    return operator.itemgetter(_span(slots))


def _span(slots: Sequence[int]) -> slice:
    """Consecutive slots, as the outputs of an instruction are."""
    start = slots[0] if slots else 0
    span = slice(start, start + len(slots))
    assert list(slots) == list(range(span.start, span.stop)), slots
    return span


def _mover(move: Move | Copy) -> Call:
    """The call of a move, or of a copy."""
    if isinstance(move, Copy):
        return move.copied
    if move.sendings:
        return functools.partial(_received, move.sendings)
    put = move.placement.put
    return lambda *arrays: put(arrays)


def _received(sendings: Sequence[Sending], *arrays: Any) -> list[Any]:
    return receive(sendings, arrays)


class Failure(NamedTuple):
    """An exception, and the step that raised it."""

    step: Step
    error: BaseException


class Crew:
    """The threads of one run. None is alive when `run` returns or raises."""

    def __init__(self, shares: Sequence[Share]) -> None:
        self._shares = shares
        self._inboxes: list[Inbox] = [queue.SimpleQueue() for _ in shares]
        self._stopped = False
        self._failures: list[Failure] = []
        # The threads that have ended. The bell is rung when one does.
        self._ended: list[int] = []
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        # Transfers and host callbacks look at settings and context variables.
        self._context = CallerContext.here()

    def run(self, slots: list[Any]) -> Failure | None:
        """Run all shares, from `slots` and back into them; returns what went wrong
        first, in the plan's order.
        """
        # Slots of its own for each thread: so a thread drops an array by its own last
        # use, without a lock, and a device's memory follows its own progress.
        own_slots: list[list[Any]] = []
        threads: list[threading.Thread] = []
        for number, share in enumerate(self._shares):
            own: list[Any] = [None] * len(slots)
            for slot in share.starts:
                own[slot] = slots[slot]
            own_slots.append(own)
            threads.append(
                threading.Thread(
                    target=self._start, args=(number, own), name=share.name
                )
            )
        # The caller's list must not keep alive what the threads drop.
        for share in self._shares:
            for slot in share.consumed:
                slots[slot] = None
        try:
            for thread in threads:
                thread.start()
            self._wait(threads)
        except BaseException:
            # Ctrl-C, or no thread to be had. What is being dispatched is let through,
            # and a second Ctrl-C does not help.
            self._stop()
            while True:
                with contextlib.suppress(KeyboardInterrupt):
                    self._wait(threads)
                    break
            raise
        for share, own in zip(self._shares, own_slots, strict=True):
            for slot in share.leaves:
                slots[slot] = own[slot]
        # What reads the result of a program that failed may fail too, and earlier in
        # time.
        return min(
            self._failures, key=lambda failure: failure.step.number, default=None
        )

    def issue(self, step: Step, slots: list[Any]) -> None:
        """Issue one step of a thread, whose own slots these are."""
        read, call, outs, frees = step.issue
        slots[outs] = call(*read(slots))
        for thread, posted in step.posts:
            arrays = [slots[slot] for slot in posted]
            self._inboxes[thread].put(Message(posted, arrays))
        for slot in frees:
            slots[slot] = None

    def _wait(self, threads: Sequence[threading.Thread]) -> None:
        """Wait until all threads that were started have ended.

        Not by `join` alone: one that a signal interrupts takes the thread for ended
        (CPython 3.11, bpo-45274). Nor by counting the bell: a signal between a ring and
        its count would lose it.
        """
        started = [thread for thread in threads if thread.ident is not None]
        while len(self._ended) < len(started):
            with contextlib.suppress(queue.Empty):
                self._bell.get(timeout=1.0)
        for thread in started:
            thread.join()

    def _stop(self) -> None:
        """Have all threads end before their next step. A thread that waits for its
        inbox is woken by a `None`; one that dispatches sees the flag.
        """
        self._stopped = True
        for inbox in self._inboxes:
            inbox.put(None)

    def _start(self, number: int, slots: list[Any]) -> None:
        """What a thread runs: its share, as if it were the caller."""
        try:
            self._context.run(self._work, number, slots)
        except BaseException as error:
            self._fail(self._shares[number].steps[0], error)
        finally:
            self._ended.append(number)
            self._bell.put(None)

    def _fail(self, step: Step, error: BaseException) -> None:
        # `BaseException`: a thread that ended without a word would leave the others
        # waiting for its arrays for ever.
        self._failures.append(Failure(step, error))
        self._stop()

    def _work(self, number: int, slots: list[Any]) -> None:
        """Issue the steps of a thread, each when what it waits for is there."""
        inbox = self._inboxes[number]
        step = self._shares[number].steps[0]
        try:
            for step in self._shares[number].steps:
                for slot in step.waits:
                    # Other threads run at their own pace, so messages for later steps
                    # may come first. Their arrays are put in their slots.
                    while slots[slot] is None:
                        message = inbox.get()
                        if message is None:
                            return
                        for k, array in zip(*message, strict=True):
                            slots[k] = array
                if self._stopped:
                    return
                self.issue(step, slots)
            # JAX keeps for each thread what `jax.effects_barrier` waits for. That would
            # end with the thread, and with it what a `jax.debug.callback` has raised in
            # a program that makes no array.
            jax.effects_barrier()
        except BaseException as error:
            self._fail(step, error)
