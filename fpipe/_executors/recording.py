"""Recording: calls of one pipe, made in a block, and what really ran in them."""

import contextlib
import contextvars
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from fpipe.schedules import Action, Event, Recording, Schedule
from fpipe.schedules._rules import needs


class Ran(Protocol):
    """A call that was made, as an executor saw it."""

    def timeline(self) -> Recording:
        """When what ran in it."""
        ...


class Recorder:
    """Collects the calls that an executor makes.

    Arguments:
        owner: what tells one pipe's executor from others.
    """

    def __init__(self, owner: object) -> None:
        self.owner, self.calls = owner, list[Ran]()


_recorders: contextvars.ContextVar[tuple[Recorder, ...]] = contextvars.ContextVar(
    "recorders", default=()
)


def recorders_of(owner: object) -> list[Recorder]:
    """Those that want the calls of that executor."""
    return [recorder for recorder in _recorders.get() if recorder.owner is owner]


@contextlib.contextmanager
def record(pipe: Any) -> Iterator[Recording]:
    """Record the calls of a pipe: when which program ran on which device, and every
    transfer.

    `with fpipe.record(pipe) as timeline: step(params, x)`. A call in the block compiles
    what it needs before its clock starts, waits for its inputs, and returns when
    everything has run; its results are the very same. Calls of other pipes are not
    recorded, nor those that other threads make. The forward and the pull-back of a
    differentiated call are one timeline, if they are made in the same block and one
    after the other.

    Arguments:
        pipe: a `Pipe`.

    Returns:
        A context manager for the `fpipe.schedules.Recording`. It is empty until the
        block ends; then it is the last call, and its `calls` are all of them.

    Raises:
        TypeError: no `Pipe`.
        ValueError: no call of that very pipe has run in the block.

    Example:
        >>> dense = fpipe.Layer(lambda w, x: jnp.tanh(x @ w), init=lambda key, x: jnp.eye(3))
        >>> pipe = fpipe.Pipe([dense, dense], devices=[jax.devices()[0]] * 2, chunks=2)
        >>> x = jnp.ones((8, 3))
        >>> params = pipe.init(jax.random.key(0), x)
        >>> with fpipe.record(pipe) as timeline:
        ...     y = pipe(params, x)
        >>> sorted(event.action.name for event in timeline.events)
        ['stage0 F mb0', 'stage0 F mb1', 'stage1 F mb0', 'stage1 F mb1']
    """
    owner = getattr(getattr(pipe, "_executor", None), "owner", None)
    if owner is None:
        raise TypeError(f"`fpipe.record({pipe!r})`: a Pipe is needed")
    recorder, timeline = Recorder(owner), Recording((), len(pipe.devices))
    token = _recorders.set((*_recorders.get(), recorder))
    try:
        yield timeline
    finally:
        _recorders.reset(token)
        _fill(timeline, [ran.timeline() for ran in recorder.calls])
    if not recorder.calls:
        raise ValueError(
            "`fpipe.record(pipe)`: no call of this pipe has run in the block. Call the "
            "pipe, or a function that "
            "`pipe.value_and_grad` or `pipe.evaluate` made of it, in the block and in "
            "its thread; a pipe made anew "
            "(`dataclasses.replace`, `copy`) is another pipe"
        )


def completed(
    schedule: Schedule, order: Iterable[Action], found: Mapping[Action, Event]
) -> tuple[Event, ...]:
    """The events of all actions; one that had nothing to run takes no time, at the
    first moment when it may run.

    Arguments:
        order: all actions, each behind what it needs.
        found: those that ran.
    """
    out, free = dict[Action, Event](), [0.0] * schedule.devices
    for a in order:
        if a in found:
            out[a] = found[a]
        else:
            d = schedule.stage_to_device[a.stage]
            time = max([free[d], *(out[b].end for b in needs(a, out))])
            out[a] = Event(d, a, time, time)
        free[out[a].device] = max(free[out[a].device], out[a].end)
    return tuple(sorted(out.values(), key=lambda e: e.start))


def _fill(timeline: Recording, calls: list[Recording]) -> None:
    if calls:
        for name in (
            "events",
            "devices",
            "name",
            "memory",
            "programs",
            "transfers",
            "places",
        ):
            object.__setattr__(timeline, name, getattr(calls[-1], name))
        object.__setattr__(timeline, "calls", tuple(calls))
