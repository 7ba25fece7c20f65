"""What every drawing of a timeline shows, as plain data: boxes, colours, ticks, words."""

import dataclasses
import math
from typing import NamedTuple

from fpipe.schedules._action import KINDS, Kind
from fpipe.schedules._schedule import Schedule
from fpipe.schedules._simulate import simulate
from fpipe.schedules._timeline import Timeline

WORDS: dict[Kind, str] = {
    "F": "forward (F)",
    "B": "backward (B)",
    "I": "input gradient (I)",
    "W": "weight gradient (W)",
}
LIGHTER = "lighter: later stages of the device"
# Okabe and Ito's colours, which the colour-blind tell apart; all are light enough for
# dark text.
COLOURS: dict[Kind, str] = {
    "F": "#56b4e9",
    "B": "#e69f00",
    "I": "#d684b3",
    "W": "#19aa82",
}
INK, IDLE = "#1a1a1a", "#efefef"
# How white the last of a device's stages is; the first has the plain colour.
LIGHTEST = 0.62


class Box(NamedTuple):
    """One event, drawn.

    Attributes:
        device: its row.
        start: from the start of the timeline.
        end: from the start of the timeline.
        kind: its colour.
        chunk: which of the device's stages it is of, from 0: its shade.
        stage: its stage.
        microbatch: its label.
    """

    device: int
    start: float
    end: float
    kind: Kind
    chunk: int
    stage: int
    microbatch: int

    @property
    def title(self) -> str:
        """Everything about it, for a tooltip."""
        return (
            f"{self.kind} of stage {self.stage}, microbatch {self.microbatch}, "
            f"device {self.device}: {self.start:g} to {self.end:g}"
        )


@dataclasses.dataclass(frozen=True)
class Picture:
    """A timeline, ready to be drawn by anything.

    Attributes:
        boxes: in the order of the events.
        devices: the number of rows.
        span: the makespan.
        chunks: the most stages on a device.
        kinds: those that occur.
        caption: name, makespan, bubble, peak of live microbatches.
        beneath: the boxes of the timeline that this one is laid over.
    """

    boxes: tuple[Box, ...]
    devices: int
    span: float
    chunks: int
    kinds: tuple[Kind, ...]
    caption: str
    beneath: tuple[Box, ...] = ()

    def fill(self, kind: Kind, chunk: int) -> str:
        """The colour of a kind, the lighter the later the chunk."""
        white = LIGHTEST * chunk / max(self.chunks - 1, 1)
        parts = (int(COLOURS[kind][n : n + 2], 16) for n in (1, 3, 5))
        return "#" + "".join(f"{round(p + (255 - p) * white):02x}" for p in parts)

    def ticks(self, most: int) -> list[float]:
        """At most `most` round times from 0 to `span`, or a few more."""
        if not self.span > 0:
            return [0.0]
        rough = self.span / max(most, 1)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough * (1 - 1e-9))
        return [n * step for n in range(math.floor(self.span / step * (1 + 1e-9)) + 1)]


def picture(
    what: Schedule | Timeline, call: str, over: Schedule | Timeline | None = None
) -> Picture:
    """What to draw of a schedule, under the default costs, or of a timeline, over
    another; `call` is for errors.
    """
    timeline = _timeline(what, call)
    boxes, span, caption = _boxes(timeline, 1.0), timeline.makespan, _caption(timeline)
    beneath: tuple[Box, ...] = ()
    if over is not None:
        other = _timeline(over, f"{call}(over=...)")
        if other.devices != timeline.devices:
            raise ValueError(
                f"`{call}(over=...)`: a timeline of {timeline.devices} devices lies "
                f"over one of as many, not {other.devices}"
            )
        # The same work in both, so that what differs is when it is done.
        work = [sum(e.end - e.start for e in t.events) for t in (timeline, other)]
        scale = work[0] / work[1] if min(work) > 0 else 1.0
        beneath, span = _boxes(other, scale), max(span, other.makespan * scale)
        caption += f"; over {_caption(other)}"
        if not math.isclose(scale, 1.0):
            caption += f"; 1 there is {scale:.3g} here"
    kinds = {b.kind for b in (*boxes, *beneath)}
    chunks = max(b.chunk for b in (*boxes, *beneath)) + 1
    return Picture(
        boxes,
        timeline.devices,
        span,
        chunks,
        tuple(k for k in KINDS if k in kinds),
        caption,
        beneath,
    )


def _timeline(what: Schedule | Timeline, call: str) -> Timeline:
    timeline = simulate(what) if isinstance(what, Schedule) else what
    if not isinstance(timeline, Timeline):
        got = (
            f"a {type(what).__name__}: draw its `timeline`"
            if hasattr(what, "timeline")
            else repr(what)
        )
        raise TypeError(f"`{call}`: a Schedule or a Timeline can be drawn, not {got}")
    if not timeline.events:
        raise ValueError(f"`{call}`: the timeline {timeline.name!r} has no events")
    return timeline


def _boxes(timeline: Timeline, scale: float) -> tuple[Box, ...]:
    start = min(e.start for e in timeline.events)
    stages = [
        sorted({e.action.stage for e in timeline.events if e.device == d})
        for d in range(timeline.devices)
    ]
    chunk = {(d, s): n for d, row in enumerate(stages) for n, s in enumerate(row)}
    return tuple(
        Box(
            d,
            (a - start) * scale,
            (b - start) * scale,
            kind,
            chunk[d, stage],
            stage,
            microbatch,
        )
        for d, (kind, stage, microbatch), a, b in timeline.events
    )


def _caption(timeline: Timeline) -> str:
    return (
        f"{timeline.name}: makespan {timeline.makespan:g}, bubble "
        f"{max(timeline.bubble, 0.0):.1%}, "
        f"peak live microbatches {', '.join(map(str, timeline.peak_live))}"
    )
