"""`Prediction`: what a call will take, as numbers, as text and as JSON."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from fpipe.schedules import Schedule, Timeline, draw


class Crossing(NamedTuple):
    """A skip, or borrowed parameters, between two stages.

    Attributes:
        name: the skip's, or the owner's.
        stage: at the other end.
        bytes: for one microbatch.
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
        work: of each kind of action that it has, `"F"`, `"B"`, `"I"`, `"W"`,
            recomputation included.
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
        memory: bytes by what they are for: `parameters`, `gradients`, `optimizer`,
            `boundaries`, `skips`, `residuals`, `inputs`, `outputs`, and `temporary`,
            which is what a program needs for itself while it runs.
        doing: what runs then.
        limit: bytes that it has, if given.
    """

    device: int
    name: str
    memory: Mapping[str, int]
    doing: str
    limit: int | None = None

    @property
    def peak(self) -> int:
        """All of it, in bytes."""
        return sum(self.memory.values())

    @property
    def missing(self) -> int:
        """What it needs more than it has, in bytes."""
        return 0 if self.limit is None else max(0, self.peak - self.limit)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a call will take: `Pipe.plan` makes one.

    It prints as a table; `to_json()` has the same as data.

    Attributes:
        executor, checkpoint: as in the pipe.
        microbatches: their number.
        unit: of work and time: `"FLOP"` or `"second"`.
        stages: a row each: `stage`, `device`, `layers`, `params` (how many numbers),
            `work` (by kind of action, for one microbatch), `boundary` (bytes for one
            microbatch), `stashed` and `popped` (skips: name, other stage, bytes).
        devices: a row each: `name`, `memory` (bytes by what they are for, when it is
            fullest), `peak`, `doing` (what runs then), `limit`, `missing`.
        schedule: what runs.
        timeline: when it runs, under the work of the stages.
        compiled: whether `temporary` memory is in the devices' rows, as compiled
            programs say it.
        warnings: what could be better, and how.
    """

    executor: str
    checkpoint: str
    microbatches: int
    unit: str
    stages: tuple[StageRow, ...]
    devices: tuple[DeviceRow, ...]
    schedule: Schedule
    timeline: Timeline
    compiled: bool
    warnings: tuple[str, ...] = ()

    @property
    def step(self) -> float:
        """From the first start to the last end, in `unit`."""
        return self.timeline.makespan

    @property
    def bubble(self) -> float:
        """The idle share of device time, 0 to 1."""
        return self.timeline.bubble

    @property
    def peak(self) -> int:
        """Bytes of the fullest device."""
        return max(row.peak for row in self.devices)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""
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
            "stages": stages,
            "devices": [
                {
                    "device": d.device,
                    "name": d.name,
                    "peak": d.peak,
                    "limit": d.limit,
                    "doing": d.doing,
                    "memory": dict(d.memory),
                }
                for d in self.devices
            ],
            "warnings": list(self.warnings),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The same as JSON."""
        return json.dumps(self.as_dict(), indent=indent)

    def __str__(self) -> str:
        scale, unit = scaled(self.step, self.unit)
        events = tuple(
            e._replace(start=e.start / scale, end=e.end / scale)
            for e in self.timeline.events
        )
        timeline = dataclasses.replace(
            self.timeline, events=events, name=f"{self.timeline.name}, in {unit}"
        )
        picture = draw(timeline, fit=True)
        parts = [self._head(), self._stages(), self._memory(), picture]
        return "\n\n".join([*parts, *([self._advice()] if self.warnings else [])])

    def _head(self) -> str:
        # A place may have several devices, and a device several places.
        ideal = (
            sum(row.total for row in self.stages)
            * self.microbatches
            / len(self.schedule.actions)
        )
        return (
            f"{_count(self.stages, 'stage')} on {_count(self.devices, 'device')}, "
            f"{self.microbatches} microbatch{'' if self.microbatches == 1 else 'es'}, "
            f"{self.schedule.name}, "
            f'checkpoint "{self.checkpoint}", executor "{self.executor}"\n'
            f"step {quantity(self.step, self.unit)}, "
            f"{self.step / ideal if ideal else 1:.2f} times an even share of the work; "
            f"bubble {self.bubble:.1%}; peak {size(self.peak)}"
        )

    def _stages(self) -> str:
        kinds = [
            kind for kind in "FBIW" if any(kind in row.work for row in self.stages)
        ]
        scale, unit = scaled(
            max((row.total for row in self.stages), default=0.0), self.unit
        )
        head = [
            "stage",
            "device",
            "layers",
            "parameters",
            *(f"{kind} {unit}" for kind in kinds),
            "boundary",
            "skips out",
            "skips in",
        ]
        rows = [
            [
                str(row.stage),
                str(row.device),
                _span(row),
                f"{row.params:,}",
                *(
                    f"{row.work[kind] / scale:.2f}" if kind in row.work else ""
                    for kind in kinds
                ),
                size(row.boundary) if row.boundary else "",
                ", ".join(
                    f"{c.name} to {c.stage} ({size(c.bytes)})" for c in row.stashed
                ),
                ", ".join(f"{c.name} from {c.stage}" for c in row.popped),
            ]
            for row in self.stages
        ]
        return table(head, rows, left=(2, len(head) - 2, len(head) - 1))

    def _memory(self) -> str:
        roles = list(
            dict.fromkeys(
                role for row in self.devices for role in row.memory if row.memory[role]
            )
        )
        unit, name = byte_unit(self.peak)

        def show(count: int) -> str:
            return f"{count / unit:.2f}"

        limits = any(row.limit is not None for row in self.devices)
        head = [
            "device",
            "",
            f"peak {name}",
            *(["limit"] if limits else []),
            *roles,
            "when",
        ]
        rows = [
            [
                str(row.device),
                row.name,
                show(row.peak),
                *([show(row.limit) if row.limit is not None else ""] if limits else []),
                *(show(row.memory.get(role, 0)) for role in roles),
                row.doing,
            ]
            for row in self.devices
        ]
        note = (
            ""
            if self.compiled
            else "\nwithout what programs need for themselves: plan(..., "
            "compiled=True) has it"
        )
        return table(head, rows, left=(1, len(head) - 1)) + note

    def _advice(self) -> str:
        return "\n".join(f"- {text}" for text in self.warnings)


def _count(rows: tuple[Any, ...], what: str) -> str:
    return f"{len(rows)} {what}{'' if len(rows) == 1 else 's'}"


def _span(row: StageRow, most: int = 36) -> str:
    """The layers by number, and as many names as there is room for."""
    count = len(row.layers)
    numbers = str(row.first) if count == 1 else f"{row.first}-{row.first + count - 1}"
    names = ", ".join(dict.fromkeys(row.layers))
    return f"{numbers} {names if len(names) <= most else names[: most - 1] + '…'}"


def byte_unit(count: float) -> tuple[int, str]:
    """The unit in which so many bytes are readable."""
    units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    return next(((unit, name) for unit, name in units if count >= unit), (1, "B"))


def size(count: float) -> str:
    """Bytes with their unit."""
    unit, name = byte_unit(count)
    return f"{count / unit:.3g} {name}"


def scaled(value: float, unit: str) -> tuple[float, str]:
    """A scale in which a value is readable, and its name."""
    steps = (
        (
            (1e15, "PFLOP"),
            (1e12, "TFLOP"),
            (1e9, "GFLOP"),
            (1e6, "MFLOP"),
            (1e3, "kFLOP"),
            (1.0, "FLOP"),
        )
        if unit == "FLOP"
        else ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
    )
    return next(((size, name) for size, name in steps if value >= size), steps[-1])


def quantity(value: float, unit: str) -> str:
    """A value with its unit."""
    scale, name = scaled(value, unit)
    return f"{value / scale:.3g} {name}"


def table(head: list[str], rows: list[list[str]], left: tuple[int, ...] = ()) -> str:
    """Columns as wide as they need to be; those that are empty are left out."""
    kept = [n for n in range(len(head)) if any(row[n] for row in rows)]
    widths = {n: max(len(row[n]) for row in (head, *rows)) for n in kept}
    lines = []
    for row in (head, *rows):
        cells = [
            row[n].ljust(widths[n]) if n in left else row[n].rjust(widths[n])
            for n in kept
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
