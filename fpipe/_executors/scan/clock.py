"""When the operations of a machine run, asked of the machine itself.

A machine is one program, and nobody outside can tell when its parts run. So a second
program is compiled for recording, which calls the host before and after each operation.
What the calls get and return ties them to the operation: the one before waits for what
the operation reads, the operation for that call, and the one behind for what the
operation wrote.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._executors.recording import completed, needs
from fpipe._executors.scan.machine import Segment
from fpipe.schedules import Action, Event, ProgramRun, Recording, Schedule

# Tick, phase, device, whether it is the end; and when.
Stamp: TypeAlias = tuple[int, int, int, int, float]


class Clock:
    """Collects stamps. Programs that are compiled for it call it while they run: one
    call at a time.
    """

    def __init__(self) -> None:
        self._stamps: list[Stamp] = []
        self._lock = threading.Lock()

    def run(self, f: Callable[..., Any], *args: Any) -> tuple[Any, list[Stamp]]:
        """Call `f`, and wait for it; what it returns, and the stamps."""
        with self._lock:
            self._stamps.clear()
            out = jax.block_until_ready(f(*args))
            return out, list(self._stamps)

    def stamp(
        self,
        runs: Any,
        where: Sequence[Any],
        end: int,
        token: Any,
        after: Sequence[Any],
    ) -> Any:
        """Inside a program: where it `runs`, a stamp for tick, phase and device, when
        the token and all of `after` are there.

        Returns:
            The next token.
        """

        def ask(token: Any) -> Any:
            probes = [a.reshape(-1)[:1] for a in after]
            number = jnp.stack(
                [*(jnp.asarray(n, jnp.int32) for n in where), jnp.int32(end)]
            )
            return jax.pure_callback(
                self._look, jax.ShapeDtypeStruct((), jnp.int32), number, token, *probes
            )

        return jax.lax.cond(runs, ask, lambda token: token, token)

    def _look(self, number: Any, *_: Any) -> Any:
        now = time.perf_counter()
        tick, phase, device, end = map(int, np.asarray(number))
        self._stamps.append((tick, phase, device, end, now))
        return np.int32(0)


@dataclasses.dataclass(frozen=True)
class Ran:
    """A run of a machine's segments, with the stamps of each."""

    schedule: Schedule
    step: object
    segments: tuple[Segment, ...]
    stamps: tuple[tuple[Stamp, ...], ...]
    places: tuple[str, ...]
    backward: bool

    def joined(self, later: object) -> "Ran | None":
        """A forward with its pull-back, as one call; `None` if these are two calls."""
        if not isinstance(later, Ran) or later.step is not self.step:
            return None
        if self.backward or not later.backward or len(self.segments) > 1:
            return None
        return dataclasses.replace(
            self,
            segments=(*self.segments, *later.segments),
            stamps=(*self.stamps, *later.stamps),
        )

    def timeline(self) -> Recording:
        """When everything ran, counted from the first start."""
        times: dict[Action, list[float]] = {}
        for segment, stamps in zip(self.segments, self.stamps, strict=True):
            for tick, phase, device, _, now in stamps:
                action = segment.actions[tick][phase][device]
                assert action is not None
                times.setdefault(action, []).append(now)
        zero = min((min(t) for t in times.values()), default=0.0)
        start, end = ({a: f(t) - zero for a, t in times.items()} for f in (min, max))
        for a in (
            times
        ):  # an end may be told late, but is no later than the start of what needs it
            for first in needs(a):
                if first in end:
                    end[first] = min(end[first], start[a])
        found = {
            a: Event(self.schedule.stage_to_device[a.stage], a, start[a], end[a])
            for a in times
        }
        order = [
            a
            for s in self.segments
            for tick in s.actions
            for phase in tick
            for a in phase
            if a is not None
        ]
        programs = sorted(
            (ProgramRun(e.device, a.name, e.start, e.end) for a, e in found.items()),
            key=lambda p: p.start,
        )
        return Recording(
            completed(self.schedule, order, found),
            self.schedule.devices,
            f"{self.schedule.name}, recorded",
            (),
            tuple(programs),
            (),
            self.places,
        )
