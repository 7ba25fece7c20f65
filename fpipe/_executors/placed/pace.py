"""Who dispatches a plan, decided by how long its launches take.

One thread launches the programs of all devices in turn, and as a rule runs ahead of
them: when it launches a program, the device still works at the one before. Where
launches take longer than programs, each launch finds its device idle, and the host is
what a step waits for. Then a thread for each device may help, because JAX releases
Python's lock while it launches.

What is seen of a few calls, and what is decided:

    call  threads  seconds  launches  idle    then
    0     one      -        -         -       compiles, not looked at
    1-3   one      0.012    10        9       1.2 ms a launch, most find an idle device:
                                              threads are tried
    4     each     -        -         -       starts, not looked at
    5-7   each     0.005    -         -       shorter: they stay

If threads had taken as long, one thread would dispatch again. Either way nothing is
looked at from then on, so a plan changes twice at most. Results do not depend on it.
"""

import dataclasses
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fpipe._executors.placed.instructions import Run
from fpipe._executors.placed.threads import Call, Step
from fpipe._executors.placement import Placement

# How many calls are looked at under each choice, after one that is not.
LOOKED_AT = 3
# The shortest launch, in seconds, for which threads are tried. They hand arrays to each
# other and share Python's lock, which costs tens of microseconds for each launch.
SLOW = 0.5e-3
# The share of launches that find their device idle, above which the host is the bound.
MOSTLY = 0.5
# Threads stay if a call takes at most this share of the time that one thread took.
SHORTER = 0.9


class Seen(NamedTuple):
    """What was seen of a call.

    Attributes:
        seconds: until everything was launched.
        launches: those on a device whose program before can be asked.
        idle: how many of these found that one done.
    """

    seconds: float
    launches: int
    idle: int


@dataclasses.dataclass
class Pace:
    """Who dispatches, and what is known about it so far.

    Attributes:
        threaded: whether each device has a thread.
        is_open: whether calls are still looked at.
    """

    threaded: bool
    is_open: bool
    _calls: int = 0
    _seen: list[Seen] = dataclasses.field(default_factory=list)
    _of_one: float = 0.0

    def look(
        self, issue: Callable[[Callable[[Step], Call]], None], now: Callable[[], float]
    ) -> None:
        """Make a call and look at it.

        Arguments:
            issue: makes the call, with what its argument makes of each step.
            now: the clock, in seconds.
        """
        watch = _Watch()
        started = now()
        issue(watch.watched)
        self._add(Seen(now() - started, watch.launches, watch.idle))

    def _add(self, seen: Seen) -> None:
        self._calls += 1
        if self._calls == 1:
            return  # it may have compiled, or started what is kept
        self._seen.append(seen)
        if len(self._seen) < LOOKED_AT:
            return
        # The shortest: whatever else the machine does only adds to a call.
        shortest = min(one.seconds for one in self._seen)
        if self.threaded:
            self.threaded = shortest <= SHORTER * self._of_one
            self.is_open = False
            return
        launches = sum(one.launches for one in self._seen)
        idle = sum(one.idle for one in self._seen)
        slow = shortest * LOOKED_AT >= SLOW * launches > 0
        self.threaded = self.is_open = slow and idle > MOSTLY * launches
        self._of_one, self._calls, self._seen = shortest, 0, []


class _Watch:
    """Asks at each launch whether the device has done what it was given before."""

    def __init__(self) -> None:
        self.launches = 0
        self.idle = 0
        self._last: dict[Placement, Any] = {}

    def watched(self, step: Step) -> Call:
        """The call of a step, watched."""
        item, call = step.item, step.call
        if not isinstance(item, Run):
            return call

        def watched(*arrays: Any) -> Sequence[Any]:
            # Only as long as the plan itself keeps it: to look must take no memory.
            before: Any = self._last.get(item.placement, _nothing)()
            # Keys cannot be asked, and what was consumed is not there.
            if hasattr(before, "is_ready") and not before.is_deleted():
                self.launches += 1
                self.idle += before.is_ready()
            made = call(*arrays)
            # The last result: a sum is kept longest.
            self._last[item.placement] = weakref.ref(made[-1]) if made else _nothing
            return made

        return watched


def _nothing() -> None:
    return None


def clock() -> float:
    """Seconds, for differences."""
    return time.perf_counter()
