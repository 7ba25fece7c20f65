"""A schedule: the actions of each device in order, as frozen, validated data.

In: rows of actions and the device of each stage, in any kind of sequence. Out: a
`Schedule`, which has tuples of `Action`s and of ints, and can run. 1F1B on two devices,
as `str(schedule)` writes it, with a row for each device:

    0: F0 F1 B0 B1          Action("F", 0, 0), Action("F", 0, 1), Action("B", 0, 0), …
    1: F0 B0 F1 B1          Action("F", 1, 0), Action("B", 1, 0), Action("F", 1, 1), …

    stage_to_device == (0, 1)
"""

import contextlib
import dataclasses
import operator
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

from fpipe.schedules._action import KINDS, Action, Kind
from fpipe.schedules._checks import counted, shown
from fpipe.schedules._html import as_html
from fpipe.schedules._rules import needs
from fpipe.schedules._validation import check_complete, check_runs, shortened


@dataclasses.dataclass(frozen=True, repr=False)
class Schedule:
    """The actions of each device, in the order in which it runs them.

    The constructor validates a schedule, so an illegal schedule cannot exist.
    `str(schedule)` is one line of labels per device. `F3` is the forward of microbatch
    3. If stage `s` is not always on device `s`, the label has the stage too: `2F3` is
    on stage 2.

    Arguments:
        actions: one sequence of `Action`s per device. A plain tuple `("F", 0, 0)` is
            accepted.
        stage_to_device: the index of the device of each stage. Every device has a
            stage. Default: stage `s` is on device `s`.
        name: the name in drawings and messages.

    Raises:
        TypeError: an entry is no `Action`, an index is no int, or an argument is no
            sequence.
        ValueError: an action is missing, repeated, unknown or on the wrong device; a
            device has no stage; or the schedule has a deadlock. For a deadlock the
            message shows the shortest cycle of devices that wait for one another, and
            among several the one with the lowest device. For each device in the cycle
            it names the first action that can never run, and the action that it waits
            for.
    """

    actions: tuple[tuple[Action, ...], ...]
    stage_to_device: tuple[int, ...] = ()
    name: str = "custom"

    def __init__(
        self,
        actions: Iterable[Iterable[Action | tuple[str, int, int]]],
        stage_to_device: Iterable[int] | None = None,
        name: str = "custom",
    ) -> None:
        # Fields of a frozen dataclass are set by `object.__setattr__`. All is read
        # before anything is checked: the checks rely on tuples of ints.
        rows = _read_rows(actions)
        if stage_to_device is None:
            stage_to_device = range(len(rows))
        devices = _read_stage_to_device(stage_to_device)
        if not isinstance(name, str):
            raise TypeError(f"`Schedule(name=...)`: a str, not {shortened(name)}")
        object.__setattr__(self, "actions", rows)
        object.__setattr__(self, "stage_to_device", devices)
        object.__setattr__(self, "name", name)
        # In this order: the second check relies on each action being there once.
        check_complete(rows, devices)
        check_runs(rows, devices)

    @property
    def devices(self) -> int:
        """`D`, the number of devices."""
        return len(self.actions)

    @property
    def stages(self) -> int:
        """`S`, the number of stages."""
        return len(self.stage_to_device)

    # Derived values are computed once, on demand. They are no part of the value, so
    # copies and pickles do not have them.

    @cached_property
    def microbatches(self) -> int:
        """`m`, the number of microbatches."""
        return 1 + max(action.microbatch for action in self.actions[0])

    @cached_property
    def backwards(self) -> bool:
        """Whether the schedule has backwards, and not only forwards."""
        return any(action.kind in ("B", "I") for action in self.actions[0])

    @cached_property
    def _hash(self) -> int:
        return hash((self.actions, self.stage_to_device, self.name))

    def order(self, kind: str, stage: int) -> tuple[int, ...]:
        """The microbatches in the order in which a stage runs its actions of a kind.

        Arguments:
            kind: the kind of the actions, such as `"F"`.
            stage: the stage `s`, `0 <= s < S`.

        Raises:
            ValueError: the kind is unknown, or there is no such stage.
        """
        if kind not in KINDS or type(stage) is not int or not 0 <= stage < self.stages:
            raise ValueError(
                f"`schedule.order(kind={shown(kind)}, stage={shown(stage)})`: the "
                "kinds "
                f"are {', '.join(KINDS)}, the stages 0 to {self.stages - 1}"
            )
        row = self.actions[self.stage_to_device[stage]]
        return tuple(
            action.microbatch
            for action in row
            if action.kind == kind and action.stage == stage
        )

    def to_csv(self) -> str:
        """Write the schedule as a table.

        `from_csv` reads it, and so does `torch.distributed.pipelining` as
        `compute_only`; torch knows the kinds F, B, I and W. The table has a row for
        each device. Its columns are the steps of a clock in which every action takes
        one step. The cell `2F0` is stage 2, forward, microbatch 0. Lines end in a
        single newline character.

        Example:
            >>> schedule = fpipe.schedules.one_f_one_b(devices=2, microbatches=2)
            >>> print(schedule.to_csv(), end="")
            0F0,0F1,,0B0,,0B1
            ,1F0,1B0,1F1,1B1
        """
        # A clock in which every action takes one step. If a device cannot run its next
        # action yet, the cell is empty; torch reads such cells as waiting.
        present = {action for row in self.actions for action in row}
        done: set[Action] = set()
        cells: list[list[str]] = [[] for _ in self.actions]
        left = {d: list(reversed(row)) for d, row in enumerate(self.actions)}
        while left:
            started: list[Action] = []
            for device, row in left.items():
                action = row[-1]
                if not done.issuperset(needs(action, present)):
                    cells[device].append("")
                    continue
                kind, stage, microbatch = row.pop()
                cells[device].append(f"{stage}{kind}{microbatch}")
                started.append(action)
            # Only now: the other devices see the results of a step in the next one.
            done.update(started)
            left = {device: row for device, row in left.items() if row}
        return "".join(",".join(row) + "\n" for row in cells)

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        return {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> "Schedule":
        return self  # immutable to the last int

    def __repr__(self) -> str:
        present = {action.kind for row in self.actions for action in row}
        kinds = " ".join(kind for kind in KINDS if kind in present)
        return (
            f"<Schedule {self.name!r}: {counted(self.devices, 'device')}, "
            f"{counted(self.stages, 'stage')}, "
            f"{counted(self.microbatches, 'microbatch', 'es')}, {kinds}>"
        )

    def _repr_html_(self) -> str:
        return as_html(self)

    def __str__(self) -> str:
        plain = self.stage_to_device == tuple(range(self.devices))
        lines: list[str] = []
        for device, row in enumerate(self.actions):
            labels = [
                f"{'' if plain else stage}{kind}{microbatch}"
                for kind, stage, microbatch in row
            ]
            lines.append(f"{device}: {' '.join(labels)}")
        return "\n".join(lines)


# --- reading the arguments ---


def _read_rows(actions: Any) -> tuple[tuple[Action, ...], ...]:
    rows: list[tuple[Action, ...]] = []
    sequences = _ordered(actions, "one sequence of actions per device is")
    for device, sequence in enumerate(sequences):
        row = [
            # The generators give actions of ints, and there may be 10^5 of them.
            value
            if type(value) is Action
            and value[0] in KINDS
            and type(value[1]) is type(value[2]) is int
            and type(value[0]) is str
            else _read_action(value, device, position)
            for position, value in enumerate(
                _ordered(sequence, f"the actions of device {device} are")
            )
        ]
        rows.append(tuple(row))
    return tuple(rows)


def _read_action(value: Any, device: int, position: int) -> Action:
    where = f"`Schedule(actions=...)`: device {device}, position {position} is"
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise TypeError(
            f"{where} {shortened(value)}, no Action(kind, stage, microbatch)"
        )
    kind, stage, microbatch = value
    # Compared, not looked up: a kind may be unhashable. The plain `str` is taken, since
    # numpy has one of its own.
    known: list[Kind] = [k for k in KINDS if isinstance(kind, str) and k == kind]
    if not known:
        error = ValueError if isinstance(kind, str) else TypeError
        raise error(
            f"{where} of kind {shortened(kind)}; the kinds are {', '.join(KINDS)}"
        )
    try:
        return Action(known[0], _read_index(stage), _read_index(microbatch))
    except TypeError:
        raise TypeError(
            f"{where} {shortened(value)}; stage and microbatch must be ints"
        ) from None


def _read_stage_to_device(stage_to_device: Any) -> tuple[int, ...]:
    devices: list[int] = []
    for stage, device in enumerate(_ordered(stage_to_device, "stage_to_device is")):
        try:
            devices.append(_read_index(device))
        except TypeError:
            raise TypeError(
                f"`Schedule`: stage_to_device[{stage}] is {shortened(device)}, "
                "not a device's index (an int)"
            ) from None
    return tuple(devices)


def _ordered(value: Any, what: str) -> Iterator[Any]:
    # A set has an order too, but another one in every process; a string is a sequence
    # of strings.
    if not isinstance(value, (str, bytes, set, frozenset, dict)):
        with contextlib.suppress(TypeError):
            return iter(value)
    raise TypeError(f"`Schedule`: {what} a sequence, not {shortened(value)}")


def _read_index(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)
