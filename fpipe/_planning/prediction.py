"""`Prediction`: what a call will take, as numbers, as text and as JSON.

It has a `StageRow` for each stage, a `DeviceRow` for each device, an `InputRow` for
each leaf of the inputs, a schedule and a timeline, and prints as

    3 stages on 3 devices, 4 microbatches, eager_1f1b, …   a line or two of totals
    stage  device  layers      parameters  F kFLOP …       a row for each stage
    device         peak KiB    parameters  gradients …     a row for each device
    input  array           a microbatch gets               a row for each input leaf
    …                                                      the timeline, drawn
    - stage 0 takes 2.0 times …                            advice
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from fpipe._planning.text import Table, byte_unit, quantity, scaled, size
from fpipe.schedules import Schedule, Timeline, draw
from fpipe.schedules._checks import counted
from fpipe.schedules._html import as_html, escape


class Crossing(NamedTuple):
    """A skip, or borrowed parameters, between two stages. One thing with two readers is
    two of these.

    Attributes:
        name: the skip's, or the owner's.
        stage: at the other end.
        bytes: for one microbatch, of the arrays that the later stage reads.
    """

    name: str
    stage: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class StageRow:
    """What a stage is, and what it takes for one microbatch.

    Attributes:
        device: the number of its device.
        first: its first layer.
        layers: their names.
        params: how many numbers the parameters that it owns have.
        work: of each kind of action that it has, `"F"`, `"R"`, `"B"`,
            `"I"`, `"W"`. Where there is no `"R"`, backwards include recomputation.
        boundary: bytes that it hands to the next stage.
        stashed, popped: what leaves for later stages past the boundary, and what comes
            from earlier ones.
    """

    stage: int
    device: int
    first: int
    layers: tuple[str, ...]
    params: int
    work: Mapping[str, float]
    boundary: int
    stashed: tuple[Crossing, ...]
    popped: tuple[Crossing, ...]

    @property
    def total(self) -> float:
        """Forward and backward together."""
        return sum(self.work.values())


@dataclasses.dataclass(frozen=True)
class DeviceRow:
    """What a device holds when it is fullest.

    Attributes:
        name: of the device.
        memory: bytes by what they are for: `parameters`, `constants` (arrays that
            layers close over), `gradients`, `optimizer`, `boundaries`, `skips`,
            `residuals`, `inputs`, `outputs`, and `temporary`, which is what a program
            needs for itself while it runs.
        doing: what runs then.
        limit: bytes that it has, if given.
        host: the most bytes of residuals that wait in the host's memory, where an
            offloading policy or an `O` moves them. No part of `memory` and `peak`.
    """

    device: int
    name: str
    memory: Mapping[str, int]
    doing: str
    limit: int | None = None
    host: int = 0

    @property
    def peak(self) -> int:
        """All of it, in bytes."""
        return sum(self.memory.values())

    @property
    def missing(self) -> int:
        """By how many bytes it needs more than it has; 0 if there is no limit."""
        return 0 if self.limit is None else max(0, self.peak - self.limit)


@dataclasses.dataclass(frozen=True)
class InputRow:
    """A leaf of `x`, `side` or the targets, and a microbatch's share of it.

    Attributes:
        name: such as `x`, `side['mask']` or `targets[0]`.
        value: an array's dtype and shape, or the type of a static leaf.
        gets: the share of a microbatch: its `"rows"`, the `"whole"` leaf, the leaf as a
            constant of the programs (`"static"`), or one of several ready-made
            microbatches (`"ready"`).
        axis: the axis of its rows, if it is cut.
        rows: the number of rows of each microbatch, if it is cut.
    """

    name: str
    value: str
    gets: Literal["rows", "whole", "static", "ready"]
    axis: int | None = None
    rows: tuple[int, ...] = ()

    @property
    def share(self) -> str:
        """The share of a microbatch, in words."""
        if self.gets == "static":
            return "all of it, static"
        if self.gets == "whole":
            return "all of it"
        if self.gets == "ready":
            return "its own, ready-made"
        text = counted(self.rows[0], "row")
        if self.rows[-1] != self.rows[0]:
            text += f" (the last {self.rows[-1]})"
        return f"{text} on axis {self.axis}"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The predicted time and memory of a call. `Pipe.plan` makes one.

    It prints as a table, and `to_json()` returns the same data as JSON.

    Attributes:
        executor, checkpoint: as in the pipe.
        microbatches: the number of microbatches.
        unit: the unit of work and time, `"FLOP"` or `"second"`.
        stages: a row for each stage: `stage`, `device`, `layers`, `params` (the number
            of values), `work` (of one microbatch, by kind of action), `boundary` (bytes
            of one microbatch), `stashed` and `popped` (for each skip: name, other
            stage, bytes).
        devices: a row for each device, at the moment when its memory is fullest:
            `name`, `memory` (bytes by purpose), `peak` (their sum), `doing` (what runs
            then), `limit` (bytes), `missing` (bytes over the limit) and `host` (bytes
            of residuals that a checkpoint policy, or an `O` of the schedule, moves to
            the host's memory; `peak` does not count them).
        inputs: a row for each leaf of `x`, `side` and targets: `name`, `value` (dtype
            and shape), `gets` (`"rows"`, `"whole"`, `"static"` or `"ready"`), `axis`
            (the axis of its rows) and `rows` (of each microbatch).
        schedule: the schedule that runs.
        timeline: the simulated timeline, from the work of the stages.
        compiled: whether the devices' rows count `temporary` memory, the memory that
            compiled programs need for themselves.
        programs: how many different programs a step compiles.
        launches: how many programs and transfers a step launches, optimizer aside. It
            is 1 where a step is one program. Actions that run as one program are
            launched once.
        warnings: sentences about possible improvements, each with its cure.
    """

    executor: str
    checkpoint: str
    microbatches: int
    unit: str
    stages: tuple[StageRow, ...]
    devices: tuple[DeviceRow, ...]
    inputs: tuple[InputRow, ...]
    schedule: Schedule
    timeline: Timeline
    compiled: bool
    programs: int = 1
    launches: int = 1
    warnings: tuple[str, ...] = ()

    @property
    def step(self) -> float:
        """The time of a step, from the first start to the last end, in `unit`."""
        return self.timeline.makespan

    @property
    def bubble(self) -> float:
        """The idle share of device time, 0 to 1."""
        return self.timeline.bubble

    @property
    def peak(self) -> int:
        """The peak memory of the fullest device, in bytes."""
        return max(row.peak for row in self.devices)

    def as_dict(self) -> dict[str, Any]:
        """The prediction as plain data: dicts, lists, numbers and strings."""
        # `asdict` leaves named tuples as they are, and JSON would write them as lists
        # without names.
        stages = [
            dataclasses.asdict(row)
            | {
                "stashed": [c._asdict() for c in row.stashed],
                "popped": [c._asdict() for c in row.popped],
            }
            for row in self.stages
        ]
        return {
            "executor": self.executor,
            "checkpoint": self.checkpoint,
            "schedule": self.schedule.name,
            "microbatches": self.microbatches,
            "unit": self.unit,
            "step": self.step,
            "bubble": self.bubble,
            "peak_live": list(self.timeline.peak_live),
            "compiled": self.compiled,
            "programs": self.programs,
            "launches": self.launches,
            "stages": stages,
            "devices": [
                {
                    "device": d.device,
                    "name": d.name,
                    "peak": d.peak,
                    "limit": d.limit,
                    "doing": d.doing,
                    "memory": dict(d.memory),
                    "host": d.host,
                }
                for d in self.devices
            ],
            "inputs": [
                dataclasses.asdict(row) | {"rows": list(row.rows)}
                for row in self.inputs
            ],
            "warnings": list(self.warnings),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The prediction as JSON.

        Arguments:
            indent: the spaces of an indentation, as for `json.dumps`. `None`: one line.
                Default 2.
        """
        return json.dumps(self.as_dict(), indent=indent)

    def metrics(self) -> dict[str, float]:
        """The totals as a dict of numbers, for a logger.

        The names are those of `Recording.metrics`.

        Returns:
            `step_seconds` or `step_flop`: the time of a step, by the unit. `bubble`:
            the idle share of device time, 0 to 1. `peak_live`: the most (stage,
            microbatch) pairs that a device holds at once. `peak_bytes`: the peak memory
            of the fullest device.
        """
        found = self.timeline.metrics()
        step = "step_flop" if self.unit == "FLOP" else "step_seconds"
        return {
            step: found.pop("step"),
            **found,
            "peak_bytes": self.peak,
        }

    def _readable_timeline(self) -> Timeline:
        """The timeline, with times in a unit of readable size."""
        scale, unit = scaled(self.step, self.unit)
        events = tuple(
            event._replace(start=event.start / scale, end=event.end / scale)
            for event in self.timeline.events
        )
        launches = tuple(
            launch._replace(start=launch.start / scale, end=launch.end / scale)
            for launch in self.timeline.launches
        )
        # The picture has whole numbers of columns, so times in a readable unit.
        name = f"{self.timeline.name}, in {unit}"
        return dataclasses.replace(
            self.timeline, events=events, launches=launches, name=name
        )

    def __str__(self) -> str:
        parts = [_head(self)]
        for table, more in _tables(self):
            parts.append(f"{table}\n{more}" if more else str(table))
        parts.append(draw(self._readable_timeline(), fit=True))
        if self.warnings:
            parts.append("\n".join(f"- {text}" for text in self.warnings))
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        parts = [f"<p>{escape(_head(self))}</p>"]
        for table, more in _tables(self):
            parts.append(table.html())
            if more:
                parts.append(f"<p>{escape(more)}</p>")
        parts.append(as_html(self._readable_timeline()))
        if self.warnings:
            items = [f"<li>{escape(text)}</li>" for text in self.warnings]
            parts.append("\n".join(["<ul>", *items, "</ul>"]))
        return "\n".join(parts)


def _tables(prediction: Prediction) -> list[tuple[Table, str]]:
    """The tables, each with what is said below it."""
    return [
        (_stage_table(prediction), ""),
        _device_table(prediction),
        _input_table(prediction),
    ]


def _head(prediction: Prediction) -> str:
    """What runs, and its totals."""
    work = sum(row.total for row in prediction.stages) * prediction.microbatches
    # By the devices of the schedule: a stage may live on several of the real ones.
    even_share = work / prediction.schedule.devices
    times = prediction.step / even_share if even_share else 1
    return (
        f"{counted(len(prediction.stages), 'stage')} on "
        f"{counted(len(prediction.devices), 'device')}, "
        f"{counted(prediction.microbatches, 'microbatch', 'es')}, "
        f"{prediction.schedule.name}, checkpoint "
        f'"{prediction.checkpoint}", executor "{prediction.executor}"\n'
        f"step {quantity(prediction.step, prediction.unit)}, "
        f"{times:.2f} times an even share of the work; "
        f"bubble {prediction.bubble:.1%}; peak {size(prediction.peak)}"
    )


def _stage_table(prediction: Prediction) -> Table:
    """A line for each stage."""
    stages = prediction.stages
    # Only the kinds that the schedule has: B, or I and W.
    kinds = [kind for kind in "FRBIW" if any(kind in row.work for row in stages)]
    most = max((row.total for row in stages), default=0.0)
    scale, unit = scaled(most, prediction.unit)
    head = ["stage", "device", "layers", "parameters"]
    head += [f"{kind} {unit}" for kind in kinds]
    head += ["boundary", "skips out", "skips in"]
    rows = []
    for row in stages:
        cells = [str(row.stage), str(row.device), _layers(row), f"{row.params:,}"]
        for kind in kinds:
            known = kind in row.work
            cells.append(f"{row.work[kind] / scale:.2f}" if known else "")
        out = [f"{c.name} to {c.stage} ({size(c.bytes)})" for c in row.stashed]
        into = [f"{c.name} from {c.stage}" for c in row.popped]
        cells.append(size(row.boundary) if row.boundary else "")
        cells += [", ".join(out), ", ".join(into)]
        rows.append(cells)
    return Table(head, rows, left=(2, len(head) - 2, len(head) - 1))


def _layers(row: StageRow, most: int = 36) -> str:
    """The layers by number, and as many names as there is room for."""
    # Equal blocks have equal names: "1-12 block", not twelve times "block".
    count = len(row.layers)
    numbers = str(row.first) if count == 1 else f"{row.first}-{row.first + count - 1}"
    names = ", ".join(dict.fromkeys(row.layers))
    return f"{numbers} {names if len(names) <= most else names[: most - 1] + '…'}"


def _device_table(prediction: Prediction) -> tuple[Table, str]:
    """A line for each device."""
    devices = prediction.devices
    # Columns that are 0 for all devices are left out.
    roles = list(
        dict.fromkeys(
            role for row in devices for role in row.memory if row.memory[role]
        )
    )
    # One unit for the whole table, so that numbers can be compared by their lengths.
    unit, name = byte_unit(prediction.peak)
    head = ["device", "", f"peak {name}", "limit", *roles, "host", "when"]
    rows = []
    for row in devices:
        limit = "" if row.limit is None else f"{row.limit / unit:.2f}"
        cells = [str(row.device), row.name, f"{row.peak / unit:.2f}", limit]
        cells += [f"{row.memory.get(role, 0) / unit:.2f}" for role in roles]
        # Of a column where no device has any, nothing is shown.
        cells.append(f"{row.host / unit:.2f}" if row.host else "")
        rows.append([*cells, row.doing])
    more = "without what programs need for themselves: plan(..., compiled=True) has it"
    table = Table(head, rows, left=(1, len(head) - 1))
    return table, "" if prediction.compiled else more


def _input_table(prediction: Prediction, most: int = 8) -> tuple[Table, str]:
    """A line for each leaf of the inputs, as many as there is room for."""
    rows = prediction.inputs
    shown = rows if len(rows) <= most else rows[: most - 1]
    lines = [[row.name, row.value, row.share] for row in shown]
    table = Table(["input", "", "a microbatch gets"], lines, left=(0, 1, 2))
    left = len(rows) - len(shown)
    return table, f"and {left} more in `plan.inputs`" if left else ""
