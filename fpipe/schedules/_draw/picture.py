"""What every drawing of a timeline shows, as plain data: boxes, colours, ticks, words.

In: a `Schedule` or a `Timeline`. Out: a `Picture`, with a `Box` for each event. The
first of `one_f_one_b(2, 2)` on its second device, `F(1,0)` from 1 to 2:

    Box(row=1, start=1.0, end=2.0, kind="F", chunk=0, stage=1, microbatch=0)
"""

import dataclasses
import math
from typing import NamedTuple

from fpipe.schedules._action import COPIES, KINDS, Action, Kind
from fpipe.schedules._checks import a_type, shown
from fpipe.schedules._schedule import Schedule
from fpipe.schedules._simulate import simulate
from fpipe.schedules._timeline import Timeline

WORDS: dict[Kind, str] = {
    "F": "forward (F)",
    "O": "to the host (O)",
    "L": "from the host (L)",
    "R": "recomputation (R)",
    "B": "backward (B)",
    "I": "input gradient (I)",
    "W": "weight gradient (W)",
}
# What the copy engines are called.
ENGINES: dict[Kind, str] = {"O": "to host", "L": "from host"}
LIGHTER = "lighter: later stages of the device"
# Okabe and Ito's colours, which the colour-blind tell apart; all are light enough for
# dark text.
COLOURS: dict[Kind, str] = {
    "F": "#56b4e9",
    "R": "#f0e442",
    "B": "#e69f00",
    "I": "#d684b3",
    "W": "#19aa82",
    "O": "#b0a8a0",
    "L": "#8fa876",
}
INK = "#1a1a1a"
IDLE = "#efefef"
# How white the last of a device's stages is; the first has the plain colour.
LIGHTEST = 0.62


class Box(NamedTuple):
    """One event, drawn.

    Attributes:
        row: its number among the rows of the picture.
        start: from the start of the timeline.
        end: from the start of the timeline.
        kind: its colour.
        chunk: which of the device's stages it is of, from 0: its shade.
        stage: its stage.
        microbatch: its microbatch.
        after: what runs after it in the same program.
    """

    row: int
    start: float
    end: float
    kind: Kind
    chunk: int
    stage: int
    microbatch: int
    after: tuple[Action, ...] = ()

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of all that runs in it."""
        return [self.kind, *(action.kind for action in self.after)]

    @property
    def short_label(self) -> str:
        """Its microbatch. A box of several actions has their kinds too, because its
        colour tells only the first one.
        """
        if not self.after:
            return str(self.microbatch)
        return f"{'+'.join(self.kinds)} {self.microbatch}"


class Row(NamedTuple):
    """What boxes stand in, one below the other.

    Attributes:
        title: of a device, a copy engine or a thread of the host.
        thin: whether it is a copy engine, which is drawn thin below its device.
    """

    title: str
    thin: bool = False


@dataclasses.dataclass(frozen=True)
class Picture:
    """A timeline, ready to be drawn by anything.

    Attributes:
        boxes: in the order of the events, then of the launches.
        rows: devices, each with its copy engines after it where they copy anything,
            then threads that launch.
        span: the makespan.
        chunks: the most stages on a device.
        kinds: those that occur.
        caption: name, makespan, bubble, peak of live microbatches.
        beneath: the boxes of the timeline that this one is laid over.
        threads: the number of threads that launch.
    """

    boxes: tuple[Box, ...]
    rows: tuple[Row, ...]
    span: float
    chunks: int
    kinds: tuple[Kind, ...]
    caption: str
    beneath: tuple[Box, ...] = ()
    threads: int = 0

    def is_launch(self, box: Box) -> bool:
        """Whether a box is the launch of an action, and not the action."""
        return box.row >= len(self.rows) - self.threads

    def tooltip(self, box: Box) -> str:
        """Everything about a box."""
        launch = "launch of " if self.is_launch(box) else ""
        doing = f"{launch}{box.kind} of stage {box.stage}"
        for action in box.after:
            doing += f" and {action.kind} of stage {action.stage}"
        return (
            f"{doing}, microbatch {box.microbatch}, "
            f"{self.rows[box.row].title}: {box.start:g} to {box.end:g}"
        )

    def fill(self, kind: Kind, chunk: int) -> str:
        """The colour of a kind, the lighter the later the chunk."""
        white = LIGHTEST * chunk / max(self.chunks - 1, 1)
        colour = COLOURS[kind]
        fill = "#"
        for position in (1, 3, 5):
            part = int(colour[position : position + 2], 16)
            fill += f"{round(part + (255 - part) * white):02x}"
        return fill

    def ticks(self, most: int) -> list[float]:
        """At most `most` round times from 0 to `span`, or a few more."""
        if not self.span > 0:
            return [0.0]
        # The smallest of 1, 2, 5 and 10 times a power of ten that is not below `rough`.
        rough = self.span / max(most, 1)
        power = 10.0 ** math.floor(math.log10(rough))
        # A little less is enough: a power of ten may be rounded up.
        steps = (power * n for n in (1, 2, 5, 10))
        step = next(step for step in steps if step >= rough * (1 - 1e-9))
        return [n * step for n in range(math.floor(self.span / step * (1 + 1e-9)) + 1)]


def picture(
    what: Schedule | Timeline, call: str, over: Schedule | Timeline | None = None
) -> Picture:
    """What to draw of a schedule, under the default costs, or of a timeline.

    Arguments:
        what: the schedule or timeline.
        call: what was called, for errors.
        over: another one, which this one is laid over.
    """
    timeline = _read_timeline(what, call)
    table = _RowTable.of([timeline])
    beneath: tuple[Box, ...] = ()
    span = timeline.makespan
    caption = _caption(timeline)
    scale = 1.0
    other: Timeline | None = None
    if over is not None:
        other = _read_timeline(over, f"{call}(over=...)")
        if other.devices != timeline.devices:
            raise ValueError(
                f"`{call}(over=...)`: both need the same number of devices, but one "
                f"has {timeline.devices} and `over` has {other.devices}"
            )
        # The same work in both, so that what differs is when it is done.
        work = sum(event.end - event.start for event in timeline.events)
        other_work = sum(event.end - event.start for event in other.events)
        scale = work / other_work if min(work, other_work) > 0 else 1.0
        table = _RowTable.of([timeline, other])
        beneath = _boxes(other, scale, table)
        span = max(span, other.makespan * scale)
        numbers = _numbers(other)
        if not math.isclose(scale, 1.0):
            numbers += f"; scaled by {scale:.3g} to equal work"
        caption += f"; over {other.name} ({numbers})"
    boxes = _boxes(timeline, 1.0, table)
    # Of both timelines, so that one legend serves both.
    kinds = {box.kind for box in (*boxes, *beneath)}
    return Picture(
        boxes=boxes,
        rows=table.rows,
        span=span,
        chunks=1 + max(box.chunk for box in (*boxes, *beneath)),
        kinds=tuple(kind for kind in KINDS if kind in kinds),
        caption=caption,
        beneath=beneath,
        threads=table.threads,
    )


def _read_timeline(what: Schedule | Timeline, call: str) -> Timeline:
    timeline = simulate(what) if isinstance(what, Schedule) else what
    if not isinstance(timeline, Timeline):
        given = shown(what)
        if hasattr(what, "timeline"):
            given = f"{a_type(what)}: draw its `timeline`"
        raise TypeError(f"`{call}`: a Schedule or a Timeline can be drawn, not {given}")
    if not timeline.events:
        raise ValueError(f"`{call}`: the timeline {timeline.name!r} has no events")
    return timeline


@dataclasses.dataclass(frozen=True)
class _RowTable:
    """In which row what is drawn.

    Attributes:
        rows: all of them.
        device_rows: for each device its row.
        copy_rows: for each device that copies and each direction, `O` and `L`, its row.
        threads: the number of threads that launch, which have the last rows.
    """

    rows: tuple[Row, ...]
    device_rows: tuple[int, ...]
    copy_rows: dict[tuple[int, Kind], int]
    threads: int

    @staticmethod
    def of(timelines: list[Timeline]) -> "_RowTable":
        """The rows that these timelines need, which have the same devices."""
        copying = {
            event.device
            for timeline in timelines
            for event in timeline.events
            if event.action.kind in COPIES
        }
        threads = max(timeline.threads for timeline in timelines)
        rows: list[Row] = []
        device_rows: list[int] = []
        copy_rows: dict[tuple[int, Kind], int] = {}
        for device in range(timelines[0].devices):
            device_rows.append(len(rows))
            rows.append(Row(f"device {device}"))
            for kind in COPIES if device in copying else ():
                copy_rows[device, kind] = len(rows)
                rows.append(Row(f"device {device} {ENGINES[kind]}", thin=True))
        names = (
            f"host {thread}" if threads > 1 else "host" for thread in range(threads)
        )
        rows.extend(Row(name) for name in names)
        return _RowTable(tuple(rows), tuple(device_rows), copy_rows, threads)

    def row_of(self, device: int, kind: Kind) -> int:
        """The row of an action."""
        return self.copy_rows.get((device, kind), self.device_rows[device])


def _boxes(timeline: Timeline, scale: float, table: _RowTable) -> tuple[Box, ...]:
    # A timeline need not begin at 0.
    first = timeline.start
    # The chunks of a device are those of its stages that occur, in their order.
    stages_of: list[set[int]] = [set() for _ in range(timeline.devices)]
    for event in timeline.events:
        stages_of[event.device].add(event.action.stage)
    chunks = {
        stage: chunk
        for stages in stages_of
        for chunk, stage in enumerate(sorted(stages))
    }
    first_thread = len(table.rows) - table.threads
    rows = [
        *((table.row_of(b.device, b.actions[0].kind), *b[1:]) for b in timeline.bars()),
        *((first_thread + e.thread, (e.action,), *e[2:]) for e in timeline.launches),
    ]
    return tuple(
        Box(
            row=row,
            start=(start - first) * scale,
            end=(end - first) * scale,
            kind=actions[0].kind,
            chunk=chunks[actions[0].stage],
            stage=actions[0].stage,
            microbatch=actions[0].microbatch,
            after=actions[1:],
        )
        for row, actions, start, end in rows
    )


def _caption(timeline: Timeline) -> str:
    return f"{timeline.name}: {_numbers(timeline)}"


def _numbers(timeline: Timeline) -> str:
    makespan = timeline.makespan
    # A measured makespan has more digits than anybody reads.
    digits = f"{makespan:.5g}" if makespan < 1e4 else f"{makespan:g}"
    # Rounding may leave a bubble a little below nothing.
    bubble = max(timeline.bubble, 0.0)
    live = ", ".join(map(str, timeline.peak_live))
    return f"makespan {digits}, bubble {bubble:.1%}, peak live microbatches {live}"
