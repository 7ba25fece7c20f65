"""Timelines: what ran when, whether it was simulated or measured.

`one_f_one_b(2, 2)`, with a forward of 1 and a backward of 2:

    device 0 F0 F1    B0---    B1---        Event(0, F(0,0), 0.0, 1.0), …
    device 1    F0 B0--- F1 B1---           Event(1, F(1,0), 1.0, 2.0), …
"""

import dataclasses
import math
from typing import NamedTuple

from fpipe.schedules._action import Action
from fpipe.schedules._checks import check_int, check_positive, check_type
from fpipe.schedules._html import as_html
from fpipe.schedules._rules import HELD
from fpipe.schedules._trace import Span, trace


class Event(NamedTuple):
    """One action with its device, start and end."""

    device: int
    action: Action
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What ran when, predicted or measured.

    Arguments:
        events: in the order in which they start, ties by device; where actions take no
            time, what waits for another comes after it.
        devices: `D`.
        name: for drawings.
        memory: for each stage what a microbatch holds there from `F` to `B` or `I`, and
            from `I` to `W`; left out, 1 and 1.
    """

    events: tuple[Event, ...]
    devices: int
    name: str = "custom"
    memory: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        check_type("`Timeline(events=...)`", self.events, tuple)
        check_int("Timeline", "devices", self.devices, 1)
        check_type("`Timeline(name=...)`", self.name, str)

    @property
    def makespan(self) -> float:
        """From the first start to the last end."""
        first = min(event.start for event in self.events)
        return max(event.end for event in self.events) - first

    @property
    def idle(self) -> tuple[float, ...]:
        """For each device the makespan minus its work."""
        work = [0.0] * self.devices
        for event in self.events:
            work[event.device] += event.end - event.start
        makespan = self.makespan
        return tuple(makespan - w for w in work)

    @property
    def bubble(self) -> float:
        """The idle share of device time, 0 to 1."""
        work = sum(event.end - event.start for event in self.events)
        total = self.makespan * self.devices
        return 1.0 - work / total if total else 0.0

    @property
    def peak_live(self) -> tuple[int, ...]:
        """For each device the most (stage, microbatch) pairs held at once, from `F` to
        `B` or `W`.
        """
        live = [0] * self.devices
        peak = [0] * self.devices
        for event in self._in_order():
            held = HELD[event.action.kind]
            live[event.device] += held.full + held.weight
            peak[event.device] = max(peak[event.device], live[event.device])
        return tuple(peak)

    @property
    def peak_memory(self) -> tuple[float, ...]:
        """For each device the most memory held at once; forwards alone hold theirs to
        the end.
        """
        # Microbatches are counted and multiplied afresh each time: a running sum of
        # floats would drift.
        full: list[dict[int, int]] = [{} for _ in range(self.devices)]
        weight: list[dict[int, int]] = [{} for _ in range(self.devices)]
        peak = [0.0] * self.devices
        for event in self._in_order():
            device = event.device
            kind, stage, _ = event.action
            change = HELD[kind]
            full[device][stage] = full[device].get(stage, 0) + change.full
            weight[device][stage] = weight[device].get(stage, 0) + change.weight
            # Nothing grows where something ends altogether.
            if change.full + change.weight < 0:
                continue
            held = math.fsum(n * self._full(s) for s, n in full[device].items())
            held += math.fsum(n * self._weight(s) for s, n in weight[device].items())
            peak[device] = max(peak[device], held)
        return tuple(peak)

    def to_trace(self, unit: float = 1e6) -> str:
        """The timeline as JSON that https://ui.perfetto.dev and `chrome://tracing`
        show, a process for each device.

        Arguments:
            unit: microseconds that a unit of time takes; the default is for seconds.
        """
        check_positive("to_trace", "unit", unit)
        names = [f"device {device}" for device in range(self.devices)]
        return trace(names, {"actions": self._spans()}, unit)

    def metrics(self) -> dict[str, float]:
        """The timeline in numbers, for a logger.

        Returns:
            `step`: the makespan, in the timeline's own unit of time; `bubble`: the idle
            share of device time, 0 to 1; `peak_live`: the most microbatches that a
            device holds at once.

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

    def _spans(self) -> list[Span]:
        spans: list[Span] = []
        for device, action, start, end in self.events:
            shown = {"stage": action.stage, "microbatch": action.microbatch}
            spans.append(Span(device, action.name, action.kind, start, end, shown))
        return spans

    def _full(self, stage: int) -> float:
        return self.memory[stage][0] if self.memory else 1.0

    def _weight(self, stage: int) -> float:
        return self.memory[stage][1] if self.memory else 1.0

    def _in_order(self) -> list[Event]:
        # A device runs one action after the other, so at equal starts its events
        # already stand in their order; times alone cannot tell it where an action takes
        # none.
        return sorted(self.events, key=lambda event: event.start)
