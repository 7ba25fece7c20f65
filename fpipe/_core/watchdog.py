"""The watchdog: it ends a process that waits too long for another one.

A process whose peer has stopped would wait for ever, and nothing would say for what. In
come the arrays that other processes send, each with a text, and blocks that wait:

    expect(array, describe)     y[0] stage0 mb1, from process 0
    expect(array, describe)     y[0] stage0 mb2, from process 0
    with waiting(describe):     for all processes to have compiled

They arrive in order, so the clock runs for the first one alone, and starts anew when
that has come. Out comes nothing, or the end of the process, with a line on stderr.

One thread looks at what is expected. It asks, and does not block: a thread of Python
that is blocked in JAX cannot be ended when the interpreter is.
"""

import contextlib
import dataclasses
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

from fpipe._core.errors import PREFIX

Describe: TypeAlias = Callable[[], str]
"""Says what is waited for; called only when it did not come."""

# How often the thread looks while something is expected. An array that has come is held
# no longer than this.
_INTERVAL = 0.005


class Expected(NamedTuple):
    """An array that another process sends.

    Attributes:
        issued: when this process has asked for it, of `time.monotonic`.
    """

    array: Any
    describe: Describe
    issued: float


@dataclasses.dataclass(eq=False)
class Wait:
    """A block that waits, from `since` on."""

    describe: Describe
    since: float


class Watchdog:
    """Looks at what is expected, in a thread of its own.

    Arguments:
        timeout: seconds that the first one may take; infinity: any number.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._new: queue.SimpleQueue[Expected | Wait] = queue.SimpleQueue()
        self._arrays: deque[Expected] = deque()
        self._waits: list[Wait] = []
        self._asked = 0
        self._come = 0
        threading.Thread(target=self._work, name="fpipe watchdog", daemon=True).start()

    def expect(self, array: Any, describe: Describe) -> None:
        """An array is to come."""
        self._asked += 1
        self._new.put(Expected(array, describe, time.monotonic()))

    @contextlib.contextmanager
    def waiting(self, describe: Describe) -> Iterator[None]:
        """A block that waits for other processes."""
        wait = Wait(describe, time.monotonic())
        self._new.put(wait)
        try:
            yield
        finally:
            wait.since = float("inf")  # it is over

    def drain(self) -> None:
        """Wait until all arrays have come."""
        while self._come < self._asked:
            time.sleep(_INTERVAL)

    def _work(self) -> None:
        arrived = 0.0  # when the last array came
        while True:
            if self._arrays or self._waits:
                time.sleep(_INTERVAL)
                with contextlib.suppress(queue.Empty):
                    while True:
                        self._add(self._new.get_nowait())
            else:
                self._add(self._new.get())
            while self._arrays and _has_come(self._arrays[0]):
                self._arrays.popleft()
                self._come += 1
                arrived = time.monotonic()
            self._waits = [w for w in self._waits if w.since < float("inf")]
            late = [(w.describe, w.since) for w in self._waits]
            if self._arrays:
                first = self._arrays[0]
                late.append((first.describe, max(first.issued, arrived)))
            for describe, since in late:
                if time.monotonic() - since > self.timeout:
                    _end(describe(), self.timeout)

    def _add(self, new: Expected | Wait) -> None:
        if isinstance(new, Wait):
            self._waits.append(new)
        else:
            self._arrays.append(new)


def _has_come(expected: Expected) -> bool:
    """Whether an array is there, or never will be."""
    array = expected.array
    try:
        # A deleted one was donated to a program, which waits for it now.
        if not (array.is_deleted() or array.is_ready()):
            return False
        if not array.is_deleted():
            array.block_until_ready()
    except Exception as error:
        if array.is_deleted():
            return True
        # JAX raises it where the array is used, without saying what it was.
        text = str(error).partition("\n")[0]
        print(f"{PREFIX}{expected.describe()} failed: {text}", file=sys.stderr)
    return True


def _end(what: str, timeout: float) -> None:
    """End the process: it hangs in JAX, where no exception reaches it."""
    print(
        f"{PREFIX}this process has waited {timeout:g} s for {what}; it ends. The other "
        "process has stopped, or has made another call",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


# One for the process: transfers of all pipes stand in one order. `None` until
# `fpipe.distributed.initialize` starts it.
_watchdogs: list[Watchdog] = []


def start(timeout: float) -> None:
    """Start the watchdog, or give it another timeout."""
    if _watchdogs:
        _watchdogs[0].timeout = timeout
    else:
        _watchdogs.append(Watchdog(timeout))


def timeout() -> float:
    """The seconds after which it ends the process; infinity if there is none."""
    return _watchdogs[0].timeout if _watchdogs else float("inf")


def drain() -> None:
    """Wait until everything has come that other processes have sent."""
    if _watchdogs:
        _watchdogs[0].drain()


def expect(array: Any, describe: Describe) -> None:
    """Another process sends an array."""
    if _watchdogs:
        _watchdogs[0].expect(array, describe)


def waiting(describe: Describe) -> contextlib.AbstractContextManager[None]:
    """A block that waits for other processes."""
    if _watchdogs:
        return _watchdogs[0].waiting(describe)
    return contextlib.nullcontext()
