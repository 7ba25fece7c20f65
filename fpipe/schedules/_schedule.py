"""What runs where and in which order: the schedule as frozen, validated data."""

import contextlib
import dataclasses
import operator
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

Kind: TypeAlias = Literal["F", "B", "I", "W"]
"""What an action does: forward, whole backward, input gradient, weight gradient."""
KINDS: tuple[Kind, ...] = ("F", "B", "I", "W")


class Action(NamedTuple):
    """One piece of work on one device.

    Attributes:
        kind: `"F"` forward, `"B"` full backward, `"I"` input gradient only, `"W"`
            weight gradient only.
        stage: the stage `s`, `0 <= s < S`.
        microbatch: the microbatch `i`, `0 <= i < m`.
    """

    kind: Kind
    stage: int
    microbatch: int

    @property
    def name(self) -> str:
        """As profiles and traces call it: `stage2 F mb3`."""
        return f"stage{self.stage} {self.kind} mb{self.microbatch}"

    def __str__(self) -> str:
        return f"{self.kind}({self.stage},{self.microbatch})"


@dataclasses.dataclass(frozen=True, repr=False)
class Schedule:
    """For each device the actions that it runs, in order.

    Building one validates it, so an illegal schedule cannot exist. `str(schedule)` is
    one line of labels per device, as `F3` for the forward of microbatch 3, or `2F3` for
    that of stage 2 where stage `s` is not simply on device `s`.

    Arguments:
        actions: one sequence of `Action` per device; a plain `("F", 0, 0)` is accepted.
        stage_to_device: for each stage the index of its device; left out, stage `s` is
            on device `s`. Every device has a stage.
        name: for drawings and messages.

    Raises:
        TypeError: something that is no `Action`, no index or no sequence.
        ValueError: an action that is missing, repeated, unknown or on the wrong device,
            a device without a stage, or a deadlock. A deadlock names the shortest
            circle of devices that wait for one another (of several, the one with the
            lowest device): for each the first action that it can never run, and what
            that waits for.
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
        rows = tuple(
            tuple(
                [
                    _action(a, d, p)
                    for p, a in enumerate(
                        _ordered(row, f"the actions of device {d} are")
                    )
                ]
            )
            for d, row in enumerate(
                _ordered(actions, "one sequence of actions per device is")
            )
        )
        places = (
            tuple(range(len(rows)))
            if stage_to_device is None
            else _places(stage_to_device)
        )
        if not isinstance(name, str):
            raise TypeError(f"`Schedule(name=...)`: a str, not {_short(name)}")
        object.__setattr__(self, "actions", rows)
        object.__setattr__(self, "stage_to_device", places)
        object.__setattr__(self, "name", name)
        _check_complete(rows, places)
        _check_runs(rows, places)

    @property
    def devices(self) -> int:
        """`D`, the number of devices."""
        return len(self.actions)

    @property
    def stages(self) -> int:
        """`S`, the number of stages."""
        return len(self.stage_to_device)

    # What is derived is computed once, on demand, and is no part of the value: no copy
    # or pickle holds it.

    @cached_property
    def microbatches(self) -> int:
        """`m`, the number of microbatches."""
        return 1 + max(a.microbatch for a in self.actions[0])

    @cached_property
    def backwards(self) -> bool:
        """Whether there are backwards, or forwards alone."""
        return any(a.kind != "F" for a in self.actions[0])

    @cached_property
    def _hash(self) -> int:
        return hash((self.actions, self.stage_to_device, self.name))

    def order(self, kind: str, stage: int) -> tuple[int, ...]:
        """The microbatches in the order in which `stage` runs its actions of `kind`."""
        row = self.actions[self.stage_to_device[stage]]
        return tuple(a.microbatch for a in row if a.kind == kind and a.stage == stage)

    def to_csv(self) -> str:
        """The table that `torch.distributed.pipelining` reads as `compute_only`, and
        `from_csv` here.

        A row for each device, a column for each step of a clock in which every action
        takes one step; a cell such as `2F0` is stage 2, forward, microbatch 0. Lines
        end in a newline alone.

        >>> print(fpipe.schedules.one_f_one_b(devices=2, microbatches=2).to_csv(), end="")
        0F0,0F1,,0B0,,0B1
        ,1F0,1B0,1F1,1B1
        """
        split = {a[1:] for row in self.actions for a in row if a.kind == "I"}
        done: set[Action] = set()
        rows: list[list[str]] = [[] for _ in self.actions]
        left = {d: list(reversed(row)) for d, row in enumerate(self.actions) if row}
        while left:
            step = []
            for d, row in left.items():
                a = row[-1]
                needs = dependencies(
                    a, self.stages, (a.stage + 1, a.microbatch) in split
                )
                ready = done.issuperset(needs)
                rows[d].append(f"{a.stage}{a.kind}{a.microbatch}" if ready else "")
                if ready:
                    step.append(row.pop())
            done.update(step)
            left = {d: row for d, row in left.items() if row}
        return "".join(",".join(row) + "\n" for row in rows)

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Schedule":
        return self  # immutable to the last int

    def __repr__(self) -> str:
        kinds = {a.kind for row in self.actions for a in row}
        return (
            f"<Schedule {self.name!r}: {self.devices} devices, {self.stages} stages, "
            f"{self.microbatches} microbatches, "
            f"{' '.join(k for k in KINDS if k in kinds)}>"
        )

    def __str__(self) -> str:
        plain = self.stage_to_device == tuple(range(self.devices))
        return "\n".join(
            f"{d}: "
            + " ".join(f"{'' if plain else a.stage}{a.kind}{a.microbatch}" for a in row)
            for d, row in enumerate(self.actions)
        )


def dependencies(
    action: Action, stages: int, split: bool = False
) -> tuple[Action, ...]:
    """The actions of other stages, and earlier ones of its own, that `action` needs
    done.

    `split` says whether the microbatch's backward of the *next* stage is split into `I`
    and `W`.
    """
    kind, s, i = action
    if kind == "F":
        return () if s == 0 else (Action("F", s - 1, i),)
    if kind == "W":
        return (Action("I", s, i),)
    own = (Action("F", s, i),)
    return own if s == stages - 1 else (*own, Action("I" if split else "B", s + 1, i))


# --- what was given ---


def _ordered(value: Any, what: str) -> Iterator[Any]:
    # A set has an order too, but another one in every process; a string is a sequence
    # of strings.
    if not isinstance(value, (str, bytes, set, frozenset, dict)):
        with contextlib.suppress(TypeError):
            return iter(value)
    raise TypeError(f"`Schedule`: {what} a sequence, not {_short(value)}")


def _index(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _action(value: Any, device: int, position: int) -> Action:
    at = f"`Schedule(actions=...)`: device {device}, position {position} is"
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise TypeError(f"{at} {_short(value)}, no Action(kind, stage, microbatch)")
    kind, stage, microbatch = value
    if (
        type(kind) is str
        and kind in KINDS
        and type(stage) is int
        and type(microbatch) is int
    ):
        return value if type(value) is Action else Action._make(value)
    known: list[Kind] = [
        k for k in KINDS if isinstance(kind, str) and k == kind
    ]  # numpy's is a str too
    if not known:
        error = ValueError if isinstance(kind, str) else TypeError
        raise error(f"{at} of kind {_short(kind)}; the kinds are F, B, I, W")
    try:
        return Action(known[0], _index(stage), _index(microbatch))
    except TypeError:
        raise TypeError(
            f"{at} {_short(value)}; stage and microbatch are ints"
        ) from None


def _places(value: Any) -> tuple[int, ...]:
    places = []
    for s, d in enumerate(_ordered(value, "stage_to_device is")):
        try:
            places.append(_index(d))
        except TypeError:
            raise TypeError(
                f"`Schedule`: stage_to_device[{s}] is {_short(d)}; it is an int, a "
                "device's index"
            ) from None
    return tuple(places)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


# --- whether everything is there ---

# A cell is one (stage, microbatch), numbered `microbatch * S + stage`; what it has, or
# has done, is a sum of these.
BITS: dict[str, int] = {"F": 1, "B": 2, "I": 4, "W": 8}
WITH_BACKWARDS = (1 | 2, 1 | 4 | 8)


def _check_complete(rows: Sequence[Sequence[Action]], places: Sequence[int]) -> None:
    devices, stages = len(rows), len(places)
    if not any(rows) or not stages:
        raise ValueError(
            f"`Schedule`: {devices} devices, {stages} stages and no action: nothing to "
            "run"
        )
    for s, d in enumerate(places):
        if not 0 <= d < devices:
            raise ValueError(
                f"`Schedule`: stage_to_device[{s}] is {d}, but there are {devices} "
                "devices"
            )
    has: dict[int, int] = {}
    last, backwards = next(row[0] for row in rows if row), False
    for d, row in enumerate(rows):
        for position, a in enumerate(row):
            kind, s, i = a
            if not 0 <= s < stages or i < 0 or places[s] != d:
                raise ValueError(
                    f"`Schedule`: device {d}, position {position}: "
                    f"{a}{_misplaced(a, devices, places)}"
                )
            cell, bit = i * stages + s, BITS[kind]
            kinds = has.get(cell, 0)
            if kinds & bit:
                first = row.index(a)
                raise ValueError(
                    f"`Schedule`: device {d}, position {position}: {a} is there twice, "
                    f"first at position {first}"
                )
            has[cell] = kinds | bit
            backwards = backwards or kind != "F"
            if i > last.microbatch:
                last = a
    for cell in range(stages * (last.microbatch + 1)):
        kinds = has.get(cell, 0)
        i, s = divmod(cell, stages)
        if not kinds & BITS["F"]:
            raise ValueError(
                f"`Schedule`: {_missing(Action('F', s, i), rows, places, last)}"
            )
        if backwards and kinds not in WITH_BACKWARDS:
            got = " and ".join(k for k in KINDS if kinds & BITS[k])
            raise ValueError(
                f"`Schedule`: stage {s}, microbatch {i} has {got}; a schedule with "
                "backwards needs "
                "F with either B, or both I and W"
            )
    if not all(rows):
        raise ValueError(
            f"`Schedule`: device {rows.index(())} has no stage and nothing to run; "
            "leave it out, or give it a stage in "
            f"stage_to_device, {_short(tuple(places))}"
        )


def _misplaced(a: Action, devices: int, places: Sequence[int]) -> str:
    if a.microbatch < 0:
        return " is of a negative microbatch"
    if 0 <= a.stage < len(places):
        return f", but stage {a.stage} is on device {places[a.stage]}"
    hint = (
        "; with several stages on a device give stage_to_device"
        if list(places) == list(range(devices))
        else ""
    )
    return f" is of stage {a.stage}, but there are {len(places)} stages{hint}"


def _missing(
    a: Action, rows: Sequence[Sequence[Action]], places: Sequence[int], last: Action
) -> str:
    d = places[a.stage]
    if all(b.stage != a.stage for b in rows[d]):
        return f"{a} is missing: stage {a.stage} is on device {d}, which has no action of it"
    return f"{a} is missing: there are {last.microbatch + 1} microbatches, because device {places[last.stage]} has {last}"


# --- whether it runs ---


def _check_runs(rows: Sequence[Sequence[Action]], places: Sequence[int]) -> None:
    # Every device runs until it has to wait for a cell, and again when something of
    # that cell is done. What is left in the end does not depend on whose turn it was.
    stages = len(places)
    forward, gradient, split = BITS["F"], BITS["B"] | BITS["I"], BITS["I"]
    done = bytearray(stages * (1 + max(a.microbatch for a in rows[0])))
    waiting: dict[int, list[int]] = {}
    left = [iter(row) for row in rows]
    front: list[Action | None] = [next(row) for row in left]
    ready = list(range(len(rows)))
    while ready:
        d = ready.pop()
        a = front[d]
        while a is not None:
            kind, s, i = a
            cell = i * stages + s
            if kind == "F":
                lacks = cell - 1 if s and not done[cell - 1] & forward else None
            elif kind == "W":
                lacks = None if done[cell] & split else cell
            elif not done[cell] & forward:
                lacks = cell
            else:
                lacks = (
                    cell + 1
                    if s < stages - 1 and not done[cell + 1] & gradient
                    else None
                )
            if lacks is not None:
                waiting.setdefault(lacks, []).append(d)
                break
            done[cell] |= BITS[kind]
            if cell in waiting:
                ready += waiting.pop(cell)
            a = next(left[d], None)
        front[d] = a
    stuck = {d: a for d, a in enumerate(front) if a is not None}
    if stuck:
        raise ValueError(f"`Schedule`: deadlock: {_deadlock(rows, places, stuck)}")


def _deadlock(
    rows: Sequence[Sequence[Action]], places: Sequence[int], stuck: dict[int, Action]
) -> str:
    """The shortest circle of devices that wait for one another; `stuck` has the action
    that each is stuck at.
    """
    split = {a[1:] for row in rows for a in row if a.kind == "I"}
    done = {
        a
        for d, row in enumerate(rows)
        for a in (row[: row.index(stuck[d])] if d in stuck else row)
    }
    # the first action that each waits for; it is on a stuck device, as all that is not
    # done
    waits = {}
    for d, a in stuck.items():
        needs = dependencies(a, len(places), (a.stage + 1, a.microbatch) in split)
        waits[d] = next(n for n in needs if n not in done)
    after = {d: places[n.stage] for d, n in waits.items()}
    circle = min(
        (_circle(d, after) for d in stuck), key=lambda c: (len(c), c)
    )  # from its lowest device on
    story = []
    for d in circle:
        n, e = waits[d], places[waits[d].stage]
        itself = "itself has later," if e == d else "has"
        link = f"{n}, which device {e} {itself} at position {rows[e].index(n)}"
        if e != d:
            then = f", after {stuck[e]}" if n != stuck[e] else ""
            link += (
                f"{then}, where this began"
                if e == circle[0]
                else f"{then}, which"
                if then
                else " and which"
            )
        story.append(link)
    if len(story) > 6:
        story[3:-2] = [f"… ({len(story) - 5} devices more), which"]
    first = circle[0]
    head = (
        f"device {first} at {stuck[first]}, position {rows[first].index(stuck[first])},"
    )
    more = len(stuck) - len(circle)
    behind = (
        f"; {more} more {'device is' if more == 1 else 'devices are'} stuck"
        if more
        else ""
    )
    return " waits for ".join([head, *story]) + behind


def _circle(device: int, after: dict[int, int]) -> list[int]:
    """Where following `after` from `device` ends up going round."""
    path = [device]
    while (device := after[device]) not in path:
        path.append(device)
    return path[path.index(device) :]
