"""Timelines: the actions of a run with their times, simulated or measured.

`one_f_one_b(2, 2)`, with a forward of 1 and a backward of 2:

    device 0 F0 F1    B0---    B1---        Event(0, F(0,0), 0.0, 1.0), …
    device 1    F0 B0--- F1 B1---           Event(1, F(1,0), 1.0, 2.0), …
"""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from fpipe.schedules._action import COPIES, KINDS, Action, Kind, joined_names
from fpipe.schedules._checks import check_int, check_positive, check_type
from fpipe.schedules._costs import StageMemory
from fpipe.schedules._html import as_html
from fpipe.schedules._rules import HELD_AFTER, TAKE_MEMORY, Held
from fpipe.schedules._trace import Span, trace


class Event(NamedTuple):
    """One action with its device, start and end.

    Attributes:
        device: the index of the device, `0 <= d < D`.
        action: the `Action` that ran.
        start, end: its times, in the timeline's unit.
    """

    device: int
    action: Action
    start: float
    end: float


class Launch(NamedTuple):
    """The host's work to launch one action.

    A measured action has several launches: one of its program, and one of each transfer
    of its results.

    Attributes:
        thread: the thread's number: 0, or the number of the device that it launches
            for.
        action: the action that is launched.
        start, end: the times of the launch itself, in the timeline's unit.
    """

    thread: int
    action: Action
    start: float
    end: float


class Bar(NamedTuple):
    """What drawings and traces show as one bar: an action, or several that ran as one
    program.
    """

    device: int
    actions: tuple[Action, ...]
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The actions of a run with their times, predicted or measured.

    Arguments:
        events: the actions, sorted by start and then by device. If actions take no
            time, an action comes after those that it waits for.
        devices: `D`, the number of devices.
        name: the name in drawings.
        memory: for each stage two numbers, the memory that a microbatch holds from `F`
            to `B`, `I` or `R`, and from `I` to `W`; or what `Costs.holds` returns.
            Default: 1 and 1.
        launches: the launches of the actions by the host, in order. Empty if launches
            take no time, or are not known.
        fused: the actions that ran as one program, group by group, as drawings show
            them. When one of them ends and the next one starts is not known; their
            times divide that of the program as the default `Costs` do.
    """

    events: tuple[Event, ...]
    devices: int
    name: str = "custom"
    memory: tuple[StageMemory | tuple[float, float], ...] = ()
    launches: tuple[Launch, ...] = ()
    fused: tuple[tuple[Action, ...], ...] = ()

    def __post_init__(self) -> None:
        check_type("`Timeline(events=...)`", self.events, tuple)
        check_int("Timeline", "devices", self.devices, 1)
        check_type("`Timeline(name=...)`", self.name, str)

    @property
    def start(self) -> float:
        """The first start, of an action or of its launch."""
        launched = min((launch.start for launch in self.launches), default=math.inf)
        return min(launched, min(event.start for event in self.events))

    @property
    def makespan(self) -> float:
        """The time from the first start to the last end."""
        return max(event.end for event in self.events) - self.start

    @property
    def threads(self) -> int:
        """The number of threads that launch actions; 0 if no launches are known."""
        return 1 + max((launch.thread for launch in self.launches), default=-1)

    @property
    def launch(self) -> float:
        """The host's mean time to launch an action; 0 if no launches are known.
        `Costs(launch=...)` takes it.
        """
        launched = {launch.action for launch in self.launches}
        if not launched:
            return 0.0
        total = sum(launch.end - launch.start for launch in self.launches)
        return total / len(launched)

    @property
    def busiest_thread(self) -> float:
        """The time that the busiest launching thread works; 0 if no launches are
        known.
        """
        busy = [0.0] * self.threads
        for launch in self.launches:
            busy[launch.thread] += launch.end - launch.start
        return max(busy, default=0.0)

    @property
    def idle(self) -> tuple[float, ...]:
        """For each device, the makespan minus its work. Copies do not count as work."""
        makespan = self.makespan
        return tuple(makespan - work for work in self._work)

    @property
    def bubble(self) -> float:
        """The idle share of device time, 0 to 1."""
        work = sum(self._work)
        total = self.makespan * self.devices
        return 1.0 - work / total if total else 0.0

    @property
    def _work(self) -> list[float]:
        work = [0.0] * self.devices
        for event in self.events:
            if event.action.kind not in COPIES:
                work[event.device] += event.end - event.start
        return work

    @property
    def peak_live(self) -> tuple[int, ...]:
        """For each device, the most (stage, microbatch) pairs held at once.

        A pair is held from `F` to `B` or `W`. It does not count while it is in the
        host's memory, from the end of `O` to the start of `L`.
        """
        return self._peak(set(Held) - {Held.NOTHING})

    @property
    def peak_recomputed(self) -> tuple[int, ...]:
        """For each device, the most recomputed (stage, microbatch) pairs held at once.

        Such a pair is held from `R` to `B` or `I`.
        """
        return self._peak({Held.RECOMPUTED})

    @property
    def peak_memory(self) -> tuple[float, ...]:
        """For each device, the most memory held at once.

        Without backwards, forwards hold their memory to the end.
        """
        peak = [0.0] * self.devices
        for device, changes in enumerate(held_changes(self.events, self.devices)):
            # Microbatches are counted and multiplied afresh each time: a running sum of
            # floats would drift.
            counts: dict[tuple[int, Held], int] = {}
            for change in changes:
                stage = change.stage
                counts[stage, change.before] = counts.get((stage, change.before), 0) - 1
                counts[stage, change.after] = counts.get((stage, change.after), 0) + 1
                # Nothing grows where something ends altogether.
                if change.after is Held.NOTHING:
                    continue
                held = math.fsum(n * self._holds(*of) for of, n in counts.items())
                peak[device] = max(peak[device], held)
        return tuple(peak)

    def _peak(self, which: set[Held]) -> tuple[int, ...]:
        """For each device the most pairs that hold one of these at once."""
        peak = [0] * self.devices
        for device, changes in enumerate(held_changes(self.events, self.devices)):
            live = 0
            for change in changes:
                live += (change.after in which) - (change.before in which)
                peak[device] = max(peak[device], live)
        return tuple(peak)

    def _hosts(self) -> list[str]:
        """A name for each thread that launches."""
        if self.threads == 1:
            return ["host"]
        return [f"host {thread}" for thread in range(self.threads)]

    def _launch_spans(self) -> list[Span]:
        return [
            Span(
                self.devices + thread,
                action.name,
                category="launch",
                start=start,
                end=end,
                args={"stage": action.stage, "microbatch": action.microbatch},
            )
            for thread, action, start, end in self.launches
        ]

    def _holds(self, stage: int, held: Held) -> float:
        if not self.memory:
            return 0.0 if held is Held.NOTHING else 1.0
        memory = self.memory[stage]
        if not isinstance(memory, StageMemory):
            memory = StageMemory(memory[0], memory[1])
        return memory.of(held)

    def to_trace(self, unit: float = 1e6) -> str:
        """The timeline as a JSON trace.

        [Perfetto](https://ui.perfetto.dev) and `chrome://tracing` show it. It has a
        process for each device, and for each thread that launches actions.

        Arguments:
            unit: the microseconds in a unit of time. The default is right for seconds.
        """
        check_positive("to_trace", "unit", unit)
        return trace(
            [*(f"device {device}" for device in range(self.devices)), *self._hosts()],
            {
                "actions": self._spans(set(KINDS) - set(COPIES)),
                "copies to the host": self._spans({"O"}),
                "copies back": self._spans({"L"}),
                "launches": self._launch_spans(),
            },
            unit,
        )

    def metrics(self) -> dict[str, float]:
        """The timeline as a dict of numbers, for a logger.

        Returns:
            `step`: the makespan, in the timeline's own unit of time. `bubble`: the idle
            share of device time, 0 to 1. `peak_live`: the most (stage,
            microbatch) pairs that a device holds at once.

        Raises:
            ValueError: the timeline has no events.

        Example:
            >>> schedule = fpipe.schedules.gpipe(devices=2, microbatches=3)
            >>> fpipe.schedules.simulate(schedule).metrics()
            {'step': 12.0, 'bubble': 0.25, 'peak_live': 3}
        """
        return {"step": self._step(), **self._shares()}

    def _step(self) -> float:
        if not self.events:
            raise ValueError(f"`metrics`: the timeline {self.name!r} has no events")
        return float(self.makespan)

    def _shares(self) -> dict[str, float]:
        """Those metrics that have no unit."""
        # Rounding may leave a bubble a little below nothing.
        return {"bubble": max(self.bubble, 0.0), "peak_live": max(self.peak_live)}

    def _repr_html_(self) -> str:
        return as_html(self)

    def _spans(self, kinds: Collection[Kind] = KINDS) -> list[Span]:
        spans: list[Span] = []
        for device, actions, start, end in self.bars():
            first = actions[0]
            if first.kind not in kinds:
                continue
            shown = {"stage": first.stage, "microbatch": first.microbatch}
            name = joined_names(actions)
            spans.append(Span(device, name, first.kind, start, end, shown))
        return spans

    def bars(self) -> list[Bar]:
        """What drawings and traces show as one bar each, in the order of the events: an
        event, or all events that ran as one program.
        """
        firsts = {group[0]: group for group in self.fused}
        later = {action for group in self.fused for action in group[1:]}
        ends = {e.action: e.end for e in self.events} if later else {}
        bars: list[Bar] = []
        for device, action, start, end in self.events:
            if action in later:
                continue
            actions = firsts.get(action, (action,))
            bars.append(Bar(device, actions, start, ends.get(actions[-1], end)))
        return bars


class HeldChange(NamedTuple):
    """A moment at which a microbatch holds something else on a stage.

    Attributes:
        stage: where.
        before: what it held.
        after: what it holds now.
    """

    stage: int
    before: Held
    after: Held


def held_changes(events: Sequence[Event], devices: int) -> list[list[HeldChange]]:
    """For each device what changes in what it holds, in the order of time.

    An action takes memory when it starts and gives it back when it ends. `F(0,0)`,
    `F(0,1)`, `B(0,0)`:

        NOTHING -> FORWARD, NOTHING -> FORWARD, FORWARD -> NOTHING
    """
    # A device runs one action after the other, so at equal starts its events already
    # stand in their order; times alone cannot tell it where an action takes none. An
    # action has ended when the next one starts: a clock may tell a little more.
    in_order = sorted(events, key=lambda event: event.start)
    times: list[float] = []
    next_start = [math.inf] * devices
    for event in reversed(in_order):
        kind = event.action.kind
        if kind in TAKE_MEMORY:
            times.append(event.start)
        elif kind in COPIES:
            times.append(event.end)
        else:
            times.append(min(event.end, next_start[event.device]))
        if kind not in COPIES:
            next_start[event.device] = event.start
    times.reverse()
    # By pair of stage and microbatch, which is on one device.
    held: dict[tuple[int, int], Held] = {}
    changes: list[list[HeldChange]] = [[] for _ in range(devices)]
    for n in sorted(range(len(times)), key=times.__getitem__):
        kind, stage, microbatch = in_order[n].action
        before = held.get((stage, microbatch), Held.NOTHING)
        after = held[stage, microbatch] = HELD_AFTER[kind]
        changes[in_order[n].device].append(HeldChange(stage, before, after))
    return changes
