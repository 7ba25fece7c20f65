"""What runs where and in which order: the schedule as frozen, validated data."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

Kind: TypeAlias = Literal["F", "B", "I", "W"]
KINDS: tuple[Kind, ...] = ("F", "B", "I", "W")


class Action(NamedTuple):
    """One piece of work on one device.

    Attributes:
        kind: `"F"` forward, `"B"` full backward, `"I"` input gradient only, `"W"` weight gradient only.
        stage: the stage `s`, `0 <= s < S`.
        microbatch: the microbatch `i`, `0 <= i < m`.
    """

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}({self.stage},{self.microbatch})"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """For each device the actions that it runs, in order.

    Building one validates it, so an illegal schedule cannot exist.

    Arguments:
        actions: one sequence of `Action` per device; a plain `("F", 0, 0)` is accepted.
        stage_to_device: for each stage the index of its device; left out, stage `s` is on device `s`.
        name: for drawings and messages.

    Raises:
        TypeError: something that is no `Action`.
        ValueError: an action that is missing, repeated, unknown or on the wrong device, or a
            deadlock; the message names the first action that can never run and what it waits for.
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
        rows = tuple(tuple(_action(a) for a in row) for row in actions)
        places = tuple(range(len(rows))) if stage_to_device is None else tuple(stage_to_device)
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

    @property
    def microbatches(self) -> int:
        """`m`, the number of microbatches."""
        return 1 + max(a.microbatch for row in self.actions for a in row)

    @property
    def backwards(self) -> bool:
        """Whether there are backwards, or forwards alone."""
        return any(a.kind != "F" for row in self.actions for a in row)

    def order(self, kind: str, stage: int) -> tuple[int, ...]:
        """The microbatches in the order in which `stage` runs its actions of `kind`."""
        row = self.actions[self.stage_to_device[stage]]
        return tuple(a.microbatch for a in row if a.kind == kind and a.stage == stage)


def dependencies(action: Action, stages: int, split: bool = False) -> tuple[Action, ...]:
    """The actions of other stages, and earlier ones of its own, that `action` needs done.

    `split` says whether the microbatch's backward of the *next* stage is split into `I` and `W`.
    """
    kind, s, i = action
    if kind == "F":
        return () if s == 0 else (Action("F", s - 1, i),)
    if kind == "W":
        return (Action("I", s, i),)
    own = (Action("F", s, i),)
    return own if s == stages - 1 else (*own, Action("I" if split else "B", s + 1, i))


def _action(value: Any) -> Action:
    if not isinstance(value, tuple) or len(value) != 3:
        raise TypeError(f"`Schedule(actions=...)`: {value!r} is no Action(kind, stage, microbatch)")
    kind, stage, microbatch = value
    if kind not in KINDS:
        raise ValueError(f"`Schedule(actions=...)`: kind {kind!r} in {value!r}; the kinds are F, B, I, W")
    if type(stage) is not int or type(microbatch) is not int:
        raise TypeError(f"`Schedule(actions=...)`: stage and microbatch are ints, got {value!r}")
    return Action(kind, stage, microbatch)


def _check_complete(rows: Sequence[Sequence[Action]], places: Sequence[int]) -> None:
    stages = len(places)
    if not rows or not stages or not any(rows):
        raise ValueError(f"`Schedule`: {len(rows)} devices, {stages} stages and no action: nothing to run")
    for s, d in enumerate(places):
        if not 0 <= d < len(rows):
            raise ValueError(f"`Schedule`: stage_to_device[{s}] is {d}, but there are {len(rows)} devices")
    seen: set[Action] = set()
    for d, row in enumerate(rows):
        for position, a in enumerate(row):
            at = f"device {d}, position {position}: {a}"
            if not 0 <= a.stage < stages:
                raise ValueError(f"`Schedule`: {at} is of stage {a.stage}, but there are {stages} stages")
            if a.microbatch < 0:
                raise ValueError(f"`Schedule`: {at} is of a negative microbatch")
            if places[a.stage] != d:
                raise ValueError(f"`Schedule`: {at}, but stage {a.stage} is on device {places[a.stage]}")
            if a in seen:
                raise ValueError(f"`Schedule`: {at} is there twice")
            seen.add(a)
    microbatches = 1 + max(a.microbatch for a in seen)
    backward = any(a.kind != "F" for a in seen)
    for i in range(microbatches):
        for s in range(stages):
            kinds = {k for k in KINDS if Action(k, s, i) in seen}
            if "F" not in kinds:
                raise ValueError(f"`Schedule`: {Action('F', s, i)} is missing")
            if backward and kinds not in ({"F", "B"}, {"F", "I", "W"}):
                got = " and ".join(sorted(kinds))
                raise ValueError(
                    f"`Schedule`: stage {s}, microbatch {i} has {got}; a schedule with backwards needs "
                    "F with either B, or both I and W"
                )


def _check_runs(rows: Sequence[Sequence[Action]], places: Sequence[int]) -> None:
    split = {a[1:] for row in rows for a in row if a.kind == "I"}
    where = {a: (d, p) for d, row in enumerate(rows) for p, a in enumerate(row)}
    stages = len(places)

    def needs(a: Action) -> tuple[Action, ...]:
        return dependencies(a, stages, (a.stage + 1, a.microbatch) in split)

    next_ = [0] * len(rows)
    done: set[Action] = set()
    waiting: dict[Action, list[int]] = {}
    ready = list(range(len(rows)))
    while ready:
        d = ready.pop()
        while next_[d] < len(rows[d]):
            a = rows[d][next_[d]]
            missing = next((n for n in needs(a) if n not in done), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(d)
                break
            done.add(a)
            next_[d] += 1
            ready.extend(waiting.pop(a, ()))
    stuck = [d for d in range(len(rows)) if next_[d] < len(rows[d])]
    if not stuck:
        return
    # Follow "waits for" from the first stuck device until a device comes round again.
    d, seen, story = stuck[0], set[int](), ""
    while d not in seen:
        seen.add(d)
        a = rows[d][next_[d]]
        missing = next(n for n in needs(a) if n not in done)
        other, position = where[missing]
        front = rows[other][next_[other]]
        head = f"device {d} at {a}, position {next_[d]}, waits for {missing}, which device {other}"
        if other == d:
            story += f"{head} itself has later, at position {position}"
            break
        after = "" if front == missing else f", after {front}, which it cannot run either"
        story += f"{head} has at position {position}{after}; "
        d = other
    raise ValueError(f"`Schedule`: deadlock: {story.removesuffix('; ')}")
