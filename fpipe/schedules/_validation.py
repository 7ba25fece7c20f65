"""Whether a schedule can run: every action is there, and no device waits for ever.

In: the rows of a schedule and the device of each stage. Out: nothing, or a `ValueError`
that says what is wrong. Both checks take a fraction of a second for 64 stages and
thousands of microbatches, so their loops see a pair of stage and microbatch as one
number, its *cell*, and the kinds of it as bits. With three stages:

                     stage 0   stage 1   stage 2
    microbatch 0        0         1         2           bits: F 1, O 2, L 4, R 8,
    microbatch 1        3         4         5                 B 16, I 32, W 64
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

from fpipe.schedules._action import COPIES, KINDS, Action, Kind
from fpipe.schedules._checks import counted, shown
from fpipe.schedules._rules import NEEDS, OPTIONAL, crossing_need, needs

Rows: TypeAlias = Sequence[Sequence[Action]]

BITS: dict[Kind, int] = {kind: 1 << k for k, kind in enumerate(KINDS)}
WITH_BACKWARDS = (
    BITS["F"] | BITS["B"],
    BITS["F"] | BITS["I"] | BITS["W"],
)
_OPTIONAL_BITS = sum(BITS[kind] for kind in OPTIONAL)


def shortened(value: Any) -> str:
    """What was given, for a message."""
    text = shown(value)
    return text if len(text) <= 80 else text[:79] + "…"


# --- whether everything is there ---


def check_complete(rows: Rows, stage_to_device: Sequence[int]) -> None:
    """Refuse rows in which an action is missing, repeated or on the wrong device."""
    devices = len(rows)
    stages = len(stage_to_device)
    if not any(rows) or not stages:
        raise ValueError(
            f"`Schedule`: {counted(devices, 'device')}, {counted(stages, 'stage')} and "
            "no action: nothing to run"
        )
    for stage, device in enumerate(stage_to_device):
        if not 0 <= device < devices:
            raise ValueError(
                f"`Schedule`: stage_to_device[{stage}] is {device}, but the schedule "
                f"has {counted(devices, 'device')}"
            )

    # First every action by itself: is it on the right device, and there once? Then
    # every cell: has it the kinds that it needs?
    # By cell; a dict, since a wrong microbatch may be a very large number.
    kinds_of: dict[int, int] = {}
    last = next(row[0] for row in rows if row)
    backwards = copies = False
    for device, row in enumerate(rows):
        for position, action in enumerate(row):
            kind, stage, microbatch = action
            if (
                microbatch < 0
                or not 0 <= stage < stages
                or stage_to_device[stage] != device
            ):
                raise ValueError(
                    f"`Schedule`: device {device}, position {position}: "
                    f"{action}{_why_misplaced(action, devices, stage_to_device)}"
                )
            cell = microbatch * stages + stage
            bit = BITS[kind]
            kinds = kinds_of.get(cell, 0)
            if kinds & bit:
                raise ValueError(
                    f"`Schedule`: device {device}, position {position}: {action} is "
                    f"there twice, first at position {row.index(action)}"
                )
            kinds_of[cell] = kinds | bit
            if kind != "F":
                backwards = True
            if kind in COPIES:
                copies = True
            if microbatch > last.microbatch:
                last = action

    # A microbatch number that is far too large makes this range long, but then an
    # action is missing among the first cells.
    for cell in range(stages * (last.microbatch + 1)):
        kinds = kinds_of.get(cell, 0)
        if not kinds & BITS["F"]:
            microbatch, stage = divmod(cell, stages)
            missing = Action("F", stage, microbatch)
            raise ValueError(
                f"`Schedule`: {missing} is missing: "
                f"{_why_missing(missing, rows, stage_to_device, last)}"
            )
        if backwards and kinds & ~_OPTIONAL_BITS not in WITH_BACKWARDS:
            microbatch, stage = divmod(cell, stages)
            present = " and ".join(kind for kind in KINDS if kinds & BITS[kind])
            raise ValueError(
                f"`Schedule`: stage {stage}, microbatch {microbatch} has {present}; a "
                "schedule with backwards needs F with either B, or both I and W"
            )
        if copies and bool(kinds & BITS["O"]) != bool(kinds & BITS["L"]):
            microbatch, stage = divmod(cell, stages)
            here, lacks = ("O", "L") if kinds & BITS["O"] else ("L", "O")
            raise ValueError(
                f"`Schedule`: stage {stage}, microbatch {microbatch} has {here} and no "
                f"{lacks}; each O needs an L"
            )
    if not all(rows):
        raise ValueError(
            f"`Schedule`: device {rows.index(())} has no stage and nothing to run; "
            "leave it out, or give it a stage in "
            f"stage_to_device, {shortened(tuple(stage_to_device))}"
        )


def _why_misplaced(action: Action, devices: int, stage_to_device: Sequence[int]) -> str:
    if action.microbatch < 0:
        return " is of a negative microbatch"
    stages = len(stage_to_device)
    if 0 <= action.stage < stages:
        device = stage_to_device[action.stage]
        return f", but stage {action.stage} is on device {device}"
    hint = ""
    if list(stage_to_device) == list(range(devices)):
        hint = "; with several stages on a device give stage_to_device"
    number = counted(stages, "stage")
    return f" is of stage {action.stage}, but the schedule has {number}{hint}"


def _why_missing(
    missing: Action, rows: Rows, stage_to_device: Sequence[int], last: Action
) -> str:
    stage = missing.stage
    device = stage_to_device[stage]
    if all(action.stage != stage for action in rows[device]):
        return f"stage {stage} is on device {device}, which has no action of it"
    return (
        f"the schedule has {counted(last.microbatch + 1, 'microbatch', 'es')}, because "
        f"device {stage_to_device[last.stage]} has {last}"
    )


# --- whether it runs ---

# The bit of a need that is always met.
_ALWAYS = 128
assert max(BITS.values()) < _ALWAYS

# What an action needs: bits that its own cell must have, all of them; the offset of
# another cell, and bits that this must have, any of them.
_CodedNeeds: TypeAlias = tuple[int, int, int]


def _coded_needs(stages: int) -> dict[Kind, list[_CodedNeeds]]:
    """The rules as numbers, for each kind and stage.

    For three stages:

        F   stage 0: own cell has nothing      and own cell has 128
            stage 1: own cell has nothing      and cell - 1 has 1
        I   stage 1: own cell has 1, 4, 8      and cell + 1 has 16 or 32
            stage 2: own cell has 1, 4, 8      and own cell has 128

    Where there is no other stage to wait for, the need is one that is always met, so
    that the loop that reads them has no branch for less.
    """
    coded: dict[Kind, list[_CodedNeeds]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        own = 0
        for need in NEEDS[kind]:
            if not need.offset:
                # Of several kinds any one would do, and `own` asks for all its bits.
                assert len(need.kinds) == 1, need
                own |= BITS[need.kinds[0]]
        crossing = crossing_need(kind)
        for stage in range(stages):
            offset, bits = 0, _ALWAYS
            if crossing is not None and 0 <= stage + crossing.offset < stages:
                offset = crossing.offset
                bits = sum(BITS[other] for other in crossing.kinds)
            coded[kind].append((own, offset, bits))
    return coded


def _done_at_first(rows: Rows, stages: int) -> bytearray:
    """For each cell the bits that count as done before anything runs: those of optional
    actions that the schedule has not.
    """
    microbatches = 1 + max(action.microbatch for action in rows[0])
    done = bytearray([_ALWAYS | _OPTIONAL_BITS]) * (stages * microbatches)
    for row in rows:
        for kind, stage, microbatch in row:
            if kind in OPTIONAL:
                done[microbatch * stages + stage] ^= BITS[kind]
    return done


def check_runs(rows: Rows, stage_to_device: Sequence[int]) -> None:
    """Refuse rows, complete ones, in which a device waits for ever.

    Every device runs until it has to wait for a cell, and again when something of that
    cell is done. What is left in the end does not depend on whose turn it was.
    """
    # `needs` of `_rules.py` would do, but it makes actions and looks them up, which is
    # slower, and every schedule pays for it. It is used for the message alone.
    stages = len(stage_to_device)
    coded = _coded_needs(stages)
    done = _done_at_first(rows, stages)
    waiting: dict[int, list[int]] = {}
    left = [iter(row) for row in rows]
    current: list[Action | None] = [next(row) for row in left]
    ready = list(range(len(rows)))
    while ready:
        device = ready.pop()
        action = current[device]
        while action is not None:
            kind, stage, microbatch = action
            cell = microbatch * stages + stage
            own, offset, bits = coded[kind][stage]
            # A device waits for a cell and not for one action: a need may be met by `B`
            # or by `I`. Woken too early, it waits again.
            if done[cell] & own != own:
                waiting.setdefault(cell, []).append(device)
                break
            if not done[cell + offset] & bits:
                waiting.setdefault(cell + offset, []).append(device)
                break
            done[cell] |= BITS[kind]
            if cell in waiting:
                ready += waiting.pop(cell)
            action = next(left[device], None)
        current[device] = action
    stuck = {d: action for d, action in enumerate(current) if action is not None}
    if stuck:
        waits = _find_waits(rows, stage_to_device, stuck)
        raise ValueError(f"`Schedule`: deadlock: {_tell_deadlock(rows, waits)}")


@dataclasses.dataclass(frozen=True)
class _Wait:
    """A device that can never go on.

    Attributes:
        device: its index.
        action: the first action that it can never run.
        need: the first thing that the action waits for.
        holder: the device that has `need`, in its row after what it is stuck at.
    """

    device: int
    action: Action
    need: Action
    holder: int


def _find_waits(
    rows: Rows, stage_to_device: Sequence[int], stuck: dict[int, Action]
) -> dict[int, _Wait]:
    """What each device waits for that is stuck at an action."""
    # Only when a schedule is refused, so this may take its time.
    present = {action for row in rows for action in row}
    done: set[Action] = set()
    for device, row in enumerate(rows):
        ran = row[: row.index(stuck[device])] if device in stuck else row
        done.update(ran)
    waits: dict[int, _Wait] = {}
    for device, action in stuck.items():
        need = next(n for n in needs(action, present) if n not in done)
        holder = stage_to_device[need.stage]
        waits[device] = _Wait(device, action, need, holder)
    return waits


def _shortest_cycle(waits: dict[int, _Wait]) -> list[_Wait]:
    """The devices that wait for one another, from the lowest of them on."""
    # Most stuck devices wait for a device of a cycle, and are not in the cycle: to name
    # one of those would send the reader to the wrong row. Two cycles may be there at
    # once; the shortest is the easiest to understand.
    cycles: list[list[int]] = []
    for device in waits:
        path = [device]
        # What a stuck device waits for is on a stuck device, so this ends in a cycle.
        while (device := waits[device].holder) not in path:
            path.append(device)
        cycles.append(path[path.index(device) :])
    shortest = min(cycles, key=lambda cycle: (len(cycle), cycle))
    return [waits[device] for device in shortest]


def _tell_deadlock(rows: Rows, waits: dict[int, _Wait]) -> str:
    """The message: who waits for whom, round to where it began."""
    # For a device 1 that runs both forwards first:
    #
    #   deadlock: device 0 at B(0,0), position 1, waits for B(1,0), which device 1
    #   has at position 2, after F(1,1), which waits for F(0,1), which device 0 has
    #   at position 2, after B(0,0), where this began
    #
    # Each link names the need and what stands before it. A long cycle is cut in the
    # middle.
    cycle = _shortest_cycle(waits)
    first = cycle[0]
    story = [
        f"device {first.device} at {first.action}, position "
        f"{rows[first.device].index(first.action)},"
    ]
    for wait in cycle:
        position = rows[wait.holder].index(wait.need)
        if wait.holder == wait.device:
            story.append(
                f"{wait.need}, which device {wait.holder} itself has later, at "
                f"position {position}"
            )
            continue
        link = f"{wait.need}, which device {wait.holder} has at position {position}"
        front = waits[wait.holder].action
        after = f", after {front}" if front != wait.need else ""
        if wait.holder == first.device:
            link += f"{after}, where this began"
        elif after:
            link += f"{after}, which"
        else:
            link += " and which"
        story.append(link)
    if len(cycle) > 6:
        story[4:-2] = [f"… ({len(cycle) - 5} devices more), which"]

    others = len(waits) - len(cycle)
    if others == 1:
        story[-1] += "; 1 more device is stuck"
    elif others:
        story[-1] += f"; {others} more devices are stuck"
    return " waits for ".join(story)
