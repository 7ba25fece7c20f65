"""When the operations of a machine run, asked of the machine itself.

In: a step's program. Out: for each of its actions a start and an end.

A machine is one program, and nobody outside can tell when its parts run. So a second
program is compiled for recording, which calls the host before and after each operation.
What the calls get and return ties them to the operation: the one before waits for what
the operation reads, the operation for that call, and the one after for what the
operation wrote.

The stamps of the forward that device 1 runs in tick 1 of the first table in `ticks.py`,
and the event that becomes of them if the first stamp of all was at 7.000:

    Stamp(tick=1, phase=0, device=1, end=0, time=7.250)    F0 on device 1,
    Stamp(tick=1, phase=0, device=1, end=1, time=7.262)    from 0.250 to 0.262

The segment says which action that was, by tick, phase and device. If an action has
several units, each has stamps, and the action lasts from the first to the last.

Over a mesh whose stages have several devices each of them makes these stamps, with the
number of its stage's place. An action starts when the first device starts it, and ends
when the last one has. Where an array is cut over these devices, they wait for each
other before a stamp, because it waits for a sum over them.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from fpipe._executors.recording import completed
from fpipe._executors.scan.machine import Segment
from fpipe.schedules import Action, Event, ProgramRun, Recording, Schedule
from fpipe.schedules._rules import needs


class Stamp(NamedTuple):
    """A call of the host: before an operation or after it (`end`), and when."""

    tick: int
    phase: int
    device: int
    end: int
    time: float


class Clock:
    """Collects stamps. Programs that are compiled for it call it while they run.

    Such a program holds on to its clock, so two calls of it at the same time would mix
    their stamps: the second waits.
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
        axes: frozenset[str],
    ) -> Any:
        """Inside a program: where it `runs`, a stamp for tick, phase and device, when
        the token and all of `after` are there.

        Arguments:
            axes: those of the mesh that devices of one stage share.

        Returns:
            The next token.
        """

        # Time first: to convert the numbers takes a while itself.
        def look(numbers: Any, *_: Any) -> Any:
            now = time.perf_counter()
            tick, phase, device, end = map(int, np.asarray(numbers))
            self._stamps.append(Stamp(tick, phase, device, end, now))
            return np.int32(0)

        # A token goes in and out, so that the calls of one device keep their order.
        def ask(token: Any) -> Any:
            probes = [_probe(a, bool(axes)) for a in after]
            numbers = jnp.stack([jnp.asarray(n, jnp.int32) for n in (*where, end)])
            return call(numbers, token, probes)

        def call(numbers: Any, token: Any, probes: Sequence[Any]) -> Any:
            return jax.pure_callback(
                look, jax.ShapeDtypeStruct((), jnp.int32), numbers, token, *probes
            )

        # JAX calls no host where XLA shards by itself, so each device calls alone.
        if axes:
            call = jax.shard_map(
                call, in_specs=P(), out_specs=P(), axis_names=axes, check_vma=False
            )

        # Devices that do not run the operation do not call: a call is slow, and idle
        # ticks are many.
        return jax.lax.cond(runs, ask, lambda token: token, token)


def _probe(a: Any, is_shared: bool) -> Any:
    """A number, or an array of one, that is there when an array is.

    Arguments:
        is_shared: whether the array may be cut over devices of one stage.
    """
    if not is_shared:
        return a.reshape(-1)[:1]
    # For one element XLA would gather the whole array. For a sum it adds up one number
    # of each device.
    return jnp.sum(jnp.real(a).astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Ran:
    """A run of a machine's segments, with the stamps of each.

    Attributes:
        step: the program that ran, by which a pull-back finds its forward.
        places: the names of the stages' places.
        peak_bytes: of the fullest device of each place, after the run.
        backward: whether this is the pull-back of an earlier run.
    """

    schedule: Schedule
    step: object
    segments: tuple[Segment, ...]
    stamps: tuple[tuple[Stamp, ...], ...]
    places: tuple[str, ...]
    backward: bool
    peak_bytes: tuple[int, ...]

    def joined(self, later: object) -> "Ran | None":
        """A forward with its pull-back, as one call; `None` if these are two calls."""
        if not isinstance(later, Ran) or later.step is not self.step:
            return None
        # Only the first pull-back: one that is called again is a call of its own.
        if self.backward or not later.backward or len(self.segments) > 1:
            return None
        return dataclasses.replace(
            self,
            segments=(*self.segments, *later.segments),
            stamps=(*self.stamps, *later.stamps),
            peak_bytes=later.peak_bytes,
        )

    def timeline(self) -> Recording:
        """When everything ran, counted from the first start."""
        times: dict[Action, list[float]] = {}
        order: list[Action] = []
        for segment, stamps in zip(self.segments, self.stamps, strict=True):
            for tick in segment.actions:
                order += [a for phase in tick for a in phase if a is not None]
            for stamp in stamps:
                action = segment.actions[stamp.tick][stamp.phase][stamp.device]
                assert action is not None
                times.setdefault(action, []).append(stamp.time)
        # An action of several units has more than two stamps.
        zero = min((min(own) for own in times.values()), default=0.0)
        start = {a: min(own) - zero for a, own in times.items()}
        end = {a: max(own) - zero for a, own in times.items()}
        # The host may be told late of an end, but the end is no later than the start of
        # what needs it.
        for a in times:
            for first in needs(a, end):
                end[first] = min(end[first], start[a])
        events: dict[Action, Event] = {}
        programs: list[ProgramRun] = []
        for a in times:
            device = self.schedule.stage_to_device[a.stage]
            events[a] = Event(device, a, start[a], end[a])
            programs.append(ProgramRun(device, a.name, start[a], end[a]))
        return Recording(
            events=completed(self.schedule, order, events),
            devices=self.schedule.devices,
            name=f"{self.schedule.name}, recorded",
            programs=tuple(sorted(programs, key=lambda p: p.start)),
            places=self.places,
            peak_bytes=self.peak_bytes,
        )
