"""Recording: calls of one pipe, made in a block, and what really ran in them.

`fpipe.record(pipe)` puts a `Recorder` up for its block. An executor that makes a call
asks `recorders_of` who wants it. If there are recorders, it runs the call in a way that
shows when each program ran, and adds the result, a `RecordedCall`, to each of them.
When the block ends, each of them becomes a `fpipe.schedules.Recording`.

    with fpipe.record(pipe) as timeline:    Recorder(owner, calls=[])
        step(params, x)                         calls=[whole]
        y, pull_back = jax.vjp(f, params)       calls=[whole, forward]
        pull_back(y)                            calls=[whole, forward and backward]
    timeline.calls                          both recordings; timeline is the last one

Where nobody records, a call asks one context variable and nothing is wrapped: an
observer that stays in the executor would cost time in every step.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax

from fpipe._core.errors import shown
from fpipe._executors.call import Call
from fpipe._executors.placement import Placement
from fpipe.schedules import Action, Event, Recording, Schedule
from fpipe.schedules._rules import needs


class RecordedCall(Protocol):
    """A call that was made, or a half of a differentiated one, as its executor saw
    it.
    """

    def joined(self, later: object) -> "RecordedCall | None":
        """A forward with its pull-back, as one call; `None` if these are two calls."""
        ...

    def timeline(self) -> Recording:
        """When what ran in it."""
        ...


@dataclasses.dataclass(eq=False)
class Recorder:
    """Collects the calls that an executor makes.

    Attributes:
        owner: what tells one pipe's executor from others.
        calls: so far.
    """

    owner: object
    calls: list[RecordedCall] = dataclasses.field(default_factory=list)

    def add(self, call: RecordedCall) -> None:
        """Add a call. A pull-back is one call with the forward right before it."""
        whole = self.calls[-1].joined(call) if self.calls else None
        if whole is None:
            self.calls.append(call)
        else:
            self.calls[-1] = whole


# A context variable and no global: calls that other threads make in the meantime are
# not recorded. A tuple, so that a nested block can put back what was before.
_recorders: contextvars.ContextVar[tuple[Recorder, ...]] = contextvars.ContextVar(
    "recorders", default=()
)


def recorders_of(owner: object) -> list[Recorder]:
    """Those that want the calls of that executor."""
    return [recorder for recorder in _recorders.get() if recorder.owner is owner]


@contextlib.contextmanager
def record(pipe: Any) -> Iterator[Recording]:
    """Record the calls of a pipe: every program run and every transfer, with its times.

    Use it as `with fpipe.record(pipe) as timeline: step(params, x)`. A call in the
    block compiles its programs and waits for its inputs before its clock starts. It
    returns when everything has run. Its results are the same as without a recording.
    Calls of other pipes, and calls in other threads, are not recorded. The forward and
    the pull-back of a differentiated call are one timeline if they run in the same
    block, one directly after the other. If a placed pipe runs on several processes,
    each of them gets the same timeline.

    A stage on several devices is one row of the timeline. An action ends there when the
    last of these devices has ended it. With `executor="scan"` it starts when the first
    of them starts it, otherwise when all of them have its inputs and are free.

    Arguments:
        pipe: a `Pipe`.

    Returns:
        A context manager, which gives a `fpipe.schedules.Recording`. The recording is
        empty until the block ends. After that it is the last call in the block, and its
        `calls` are all calls.

    Raises:
        TypeError: `pipe` is no `Pipe`.
        ValueError: no call of this pipe has run in the block. Or, with
            `executor="scan"`, the call is inside `jax.jit`, or there are several
            processes.
        NotImplementedError: with `executor="scan"` devices of one stage would wait for
            each other for ever, see the page on troubleshooting.

    Example:
        >>> def init(key, x):
        ...     return jnp.eye(3)
        >>> dense = fpipe.Layer(lambda w, x: jnp.tanh(x @ w), init)
        >>> pipe = fpipe.Pipe([dense, dense], devices=[jax.devices()[0]] * 2, chunks=2)
        >>> x = jnp.ones((8, 3))
        >>> params = pipe.init(jax.random.key(0), x)
        >>> with fpipe.record(pipe) as timeline:
        ...     y = pipe(params, x)
        >>> sorted(event.action.name for event in timeline.events)
        ['stage0 F mb0', 'stage0 F mb1', 'stage1 F mb0', 'stage1 F mb1']
    """
    front: Any = pipe  # what has an owner has devices too
    owner = front._recording_owner() if isinstance(front, Call) else None
    if owner is None:
        raise TypeError(f"`fpipe.record({shown(pipe)})`: a Pipe is needed")
    recorder = Recorder(owner)
    timeline = Recording((), len(pipe.devices))
    token = _recorders.set((*_recorders.get(), recorder))
    try:
        yield timeline
    finally:
        _recorders.reset(token)
        recordings = [call.timeline() for call in recorder.calls]
        if recordings:
            # The caller has had this object since the block began: now it becomes the
            # last recording. A `Recording` is frozen, as all timelines are; this is the
            # one moment when that does not hold, and nobody has read it before.
            for field in dataclasses.fields(Recording):
                value = getattr(recordings[-1], field.name)
                object.__setattr__(timeline, field.name, value)
            object.__setattr__(timeline, "calls", tuple(recordings))
    if not recorder.calls:
        raise ValueError(
            "`fpipe.record(pipe)`: no call of this pipe has run in the block. Call the "
            "pipe, or a function that "
            "`pipe.value_and_grad` or `pipe.evaluate` made of it, in the block and in "
            "its thread; a copy of it "
            "(`dataclasses.replace`, `copy`) is another pipe"
        )


def peak_bytes(places: Iterable[Placement]) -> tuple[int, ...]:
    """For each placement the most bytes in use on one of its devices since the process
    began; empty if a device does not tell.
    """
    found: list[int] = []
    for place in places:
        known = [_memory_stats(device) for device in place.devices]
        if not all("peak_bytes_in_use" in stats for stats in known):
            return ()
        found.append(max(int(stats["peak_bytes_in_use"]) for stats in known))
    return tuple(found)


def _memory_stats(device: Any) -> Mapping[str, int]:
    """What a device tells of its memory."""
    # A device of another process cannot be asked, and a CPU answers `None`.
    if device.process_index != jax.process_index():
        return {}
    return device.memory_stats() or {}


def completed(
    schedule: Schedule, order: Iterable[Action], found: Mapping[Action, Event]
) -> tuple[Event, ...]:
    """The events of all actions; one that had nothing to run takes no time, at the
    first moment when it may run.

    Arguments:
        order: all actions, each after what it needs.
        found: those that ran.
    """
    # A recording has an event for every action of its schedule, so that it can be drawn
    # and compared with a simulated timeline. The order makes each need known in time.
    done: dict[Action, Event] = {}
    free = [0.0] * schedule.devices
    for action in order:
        event = found.get(action)
        if event is None:
            device = schedule.stage_to_device[action.stage]
            waits_for = [done[need].end for need in needs(action, done)]
            time = max([free[device], *waits_for])
            event = Event(device, action, time, time)
        done[action] = event
        free[event.device] = max(free[event.device], event.end)
    return tuple(sorted(done.values(), key=lambda event: event.start))
