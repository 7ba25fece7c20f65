"""What forwards leave goes to the host's memory and comes back, under a memory limit.

In: a `Schedule`, a limit and `Costs`. Out: the same schedule with an `O` and an `L` for
some pairs of stage and microbatch. PipeOffload does it for interleaved schedules (Wan
et al., arXiv 2503.01328), and takes those that wait longest; so does this, for any
schedule. The first device of `eager_1f1b(2, 4)` with room for two, and copies as long
as a forward:

     device 0   F0 F1    F2 B0--- F3       B1--- B2--- B3---
      to host         O1             O3
    from host                            L1       L3

    the row     F0 F1 O1 F2 B0 F3 O3 L1 B1 L3 B2 B3

First it is decided which pairs go, then where their `O` and `L` stand: an `O` before
what needs its room, an `L` as long before its backward as its copy takes. That is done
in several ways, and the fastest is taken.
"""

import bisect
import dataclasses
import heapq
import itertools
import math
from collections.abc import Sequence
from typing import Any

from fpipe.schedules._action import COPIES, Action
from fpipe.schedules._checks import check_type, shown
from fpipe.schedules._costs import Costs, read_numbers
from fpipe.schedules._rules import HELD_AFTER, Held
from fpipe.schedules._schedule import Schedule
from fpipe.schedules._simulate import simulate

# Rounding breaks no limit.
ROUNDING = 1.0 + 1e-9
# How many microbatches more than necessary may go, so that there is room for those that
# are on their way.
RESERVES = range(5)


def offload(
    schedule: Schedule,
    *,
    memory: float | Sequence[float],
    costs: Costs | None = None,
) -> Schedule:
    """Keep a schedule within a memory limit, by copies to the host's memory.

    The residuals of some forwards, or their saved inputs, go to the host by an `O`.
    They come back by an `L` before their backward. Those that wait longest for their
    backward go. The limit holds for any time of a copy, but slow copies make the step
    longer. After PipeOffload (Wan et al., arXiv 2503.01328).

    Arguments:
        schedule: any `Schedule` without `O` and `L`.
        memory: the memory limit of a device, in the unit of `costs.memory`: one number,
            or one per device. With the default costs the unit is one (stage,
            microbatch) pair.
        costs: the costs of the actions; `costs.offload` is the time of a copy. Default
            `Costs()`.

    Returns:
        A `Schedule` whose `Timeline.peak_memory` is at most `memory`. It is the given
        schedule if that keeps the limit already.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: the schedule has `O` already, `costs` or `memory` has a wrong number
            of entries, or the limit is too low; the message gives the lowest possible
            limit.

    Example:
        >>> schedule = fpipe.schedules.gpipe(devices=1, microbatches=4)
        >>> print(fpipe.schedules.offload(schedule, memory=2))
        0: F0 F1 O1 F2 O2 F3 B0 L1 B1 L2 B2 B3
    """
    check_type("`offload(schedule)`", schedule, Schedule)
    costs = Costs() if costs is None else costs
    check_type("`offload(schedule, costs=...)`", costs, Costs)
    costs.check(schedule.stages)
    limits = _read_limits(schedule.devices, memory)
    if any(action.kind in COPIES for row in schedule.actions for action in row):
        raise ValueError(
            f"`offload(schedule)`: the schedule {schedule.name!r} has O already"
        )
    rows = _timed_rows(schedule, costs)
    smallest = [row.smallest_limit() for row in rows]
    for device, least in enumerate(smallest):
        if least > limits[device] * ROUNDING:
            every = ", ".join(f"{least:g}" for least in smallest)
            raise ValueError(
                f"`offload(memory={shown(memory)})`: device {device} holds at least "
                f"{least:g}, whatever goes to the host; all devices: {every}"
            )

    found: Schedule | None = None
    makespan = math.inf
    shortest = simulate(schedule, costs).makespan * ROUNDING
    for reserve in RESERVES:
        for way in WAYS:
            made = [
                row.within(limit, reserve, way)
                for row, limit in zip(rows, limits, strict=True)
            ]
            if tuple(map(tuple, made)) == schedule.actions:
                return schedule
            tried = Schedule(
                made, schedule.stage_to_device, f"{schedule.name}, offload"
            )
            ends_at = simulate(tried, costs).makespan
            if ends_at < makespan / ROUNDING:
                found, makespan = tried, ends_at
            if makespan <= shortest:
                break
        if makespan <= shortest:
            break
    assert found is not None
    return found


def _read_limits(devices: int, memory: Any) -> tuple[float, ...]:
    call = f"offload(memory={shown(memory)})"
    limits = read_numbers(call, "device", memory)
    if not isinstance(limits, tuple):
        return (limits,) * devices
    if len(limits) != devices:
        raise ValueError(f"`{call}`: {len(limits)} numbers for {devices} devices")
    return limits


@dataclasses.dataclass(frozen=True)
class _Way:
    """How places for `O` and `L` are found.

    Attributes:
        back_first: whether the `L` get the room that there is before the `O` do.
        early: whether an `L` stands as early as there is room, and not only as early as
            its copy takes.
    """

    back_first: bool
    early: bool


WAYS = (
    _Way(back_first=True, early=False),
    _Way(back_first=False, early=False),
    _Way(back_first=True, early=True),
)


@dataclasses.dataclass(frozen=True)
class _Stay:
    """What a forward leaves, from there to what needs it first.

    Attributes:
        stage, microbatch: whose.
        made: the place of the `F` in its row.
        used: that of the `R`, `B` or `I`.
        size: what it holds.
        copying: the time of a copy.
    """

    stage: int
    microbatch: int
    made: int
    used: int
    size: float
    copying: float


def _timed_rows(schedule: Schedule, costs: Costs) -> list["_TimedRow"]:
    events = {event.action: event for event in simulate(schedule, costs).events}
    rows: list[_TimedRow] = []
    for row in schedule.actions:
        place = {action: n for n, action in enumerate(row)}
        stays: list[_Stay] = []
        for action, made in place.items():
            if action.kind != "F":
                continue
            uses = [place.get(action._replace(kind=kind)) for kind in ("R", "B", "I")]
            used = next((use for use in uses if use is not None), None)
            if used is not None:
                stays.append(
                    _Stay(
                        action.stage,
                        action.microbatch,
                        made,
                        used,
                        size=costs.holds(action.stage).of(Held.FORWARD),
                        copying=costs.of(action._replace(kind="O")),
                    )
                )
        rows.append(
            _TimedRow(
                row,
                schedule.stages,
                stays,
                costs,
                starts=[events[action].start for action in row],
                ends=[events[action].end for action in row],
            )
        )
    return rows


@dataclasses.dataclass(frozen=True)
class _TimedRow:
    """The actions of a device, and when they run without copies.

    Attributes:
        actions: in order.
        stages: of the schedule.
        stays: what its forwards leave, in the order of the forwards.
        costs: what it all holds.
        starts, ends: of the actions.
    """

    actions: tuple[Action, ...]
    stages: int
    stays: list[_Stay]
    costs: Costs
    starts: list[float]
    ends: list[float]

    def within(self, limit: float, reserve: int, way: _Way) -> list[Action]:
        """The row with `O` and `L` that keep the limit."""
        largest = max((stay.size for stay in self.stays), default=0.0)
        least = self.smallest_limit()
        gone = self._choose(max(limit - reserve * largest, least))
        if not gone:
            return list(self.actions)
        return self._place(gone, limit, way)

    def smallest_limit(self) -> float:
        """The least that the device holds at some time, with all gone that can be."""
        return max(self._held(self.stays))

    def _held(self, gone: Sequence[_Stay]) -> list[float]:
        """What is held while each action runs.

        Arguments:
            gone: what is there only while its `F` runs, and what needs it.
        """
        # Between two actions of a pair it holds what the first of them left, and while
        # one runs the larger of before and after.
        memory = [self.costs.holds(stage) for stage in range(self.stages)]
        # By how much more is held at a place than at the one before.
        more = [0.0] * (len(self.actions) + 1)
        held: dict[tuple[int, int], float] = {}
        for place, (kind, stage, microbatch) in enumerate(self.actions):
            last = held.get((stage, microbatch), 0.0)
            now = memory[stage].of(HELD_AFTER[kind])
            most = max(last, now)
            more[place] += most - last
            more[place + 1] += now - most
            held[stage, microbatch] = now
        for stay in gone:
            more[stay.made + 1] -= stay.size
            more[stay.used] += stay.size
        return list(itertools.accumulate(more[:-1]))

    def _choose(self, limit: float) -> list[_Stay]:
        """What goes: whenever something has no room, what is needed last."""
        # As a cache that knows the future (Belady, 1966). Each stay has one use, so
        # what has gone comes back only for that.
        held = self._held(())
        excess = [amount - limit * ROUNDING for amount in held]
        by_made = {stay.made: stay for stay in self.stays}
        waiting: list[tuple[int, int]] = []
        gone: list[_Stay] = []
        freed = [0.0] * (len(held) + 1)
        freed_now = 0.0
        for place in range(len(held)):
            freed_now += freed[place]
            while excess[place] > freed_now and waiting:
                _, made = heapq.heappop(waiting)
                stay = by_made[made]
                if stay.used <= place:
                    # It is needed now, or was before, and so are all that are left.
                    continue
                gone.append(stay)
                freed_now += stay.size
                freed[stay.used] -= stay.size
            if place in by_made:
                heapq.heappush(waiting, (-by_made[place].used, place))
        return sorted(gone, key=lambda stay: stay.made)

    def _place(self, gone: list[_Stay], limit: float, way: _Way) -> list[Action]:
        """The row with an `O` and an `L` for what goes."""
        room = [limit * ROUNDING - amount for amount in self._held(gone)]
        # For each stay the place before which its `O` stands, and its `L`.
        out = {stay.made: stay.made + 1 for stay in gone}
        back = {stay.made: stay.used for stay in gone}

        def put_back() -> None:
            for stay, wanted in self._wanted_back(gone, way.early):
                while back[stay.made] > max(wanted, out[stay.made]):
                    if room[back[stay.made] - 1] < stay.size:
                        break
                    back[stay.made] -= 1
                    room[back[stay.made]] -= stay.size

        def put_out() -> None:
            for stay, wanted in self._wanted_out(gone):
                while out[stay.made] < min(wanted, back[stay.made]):
                    if room[out[stay.made]] < stay.size:
                        break
                    room[out[stay.made]] -= stay.size
                    out[stay.made] += 1

        for put in (put_back, put_out) if way.back_first else (put_out, put_back):
            put()
        # What would go and come back at one place stays, if there is room.
        stays = {stay.made for stay in gone if out[stay.made] >= back[stay.made]}
        before: list[list[Action]] = [[] for _ in self.actions]
        moving = [stay for stay in gone if stay.made not in stays]
        for stay in moving:
            before[out[stay.made]].append(Action("O", stay.stage, stay.microbatch))
        for stay in sorted(moving, key=lambda stay: stay.used):
            before[back[stay.made]].append(Action("L", stay.stage, stay.microbatch))
        new: list[Action] = []
        for copies, action in zip(before, self.actions, strict=True):
            new += [*copies, action]
        return new

    def _wanted_out(self, gone: list[_Stay]) -> list[tuple[_Stay, int]]:
        """For each stay the place at which its copy to the host has ended."""
        wanted: list[tuple[_Stay, int]] = []
        free_at = 0.0
        for stay in gone:
            free_at = max(free_at, self.ends[stay.made]) + stay.copying
            wanted.append((stay, bisect.bisect_left(self.starts, free_at)))
        return wanted

    def _wanted_back(self, gone: list[_Stay], early: bool) -> list[tuple[_Stay, int]]:
        """For each stay the place at which its copy back has to start, the first use
        first.
        """
        wanted: list[tuple[_Stay, int]] = []
        needed_at = math.inf
        for stay in sorted(gone, key=lambda stay: -stay.used):
            needed_at = min(needed_at, self.starts[stay.used]) - stay.copying
            # The last place that is reached by then; an action before it has ended.
            place = bisect.bisect_right(self.ends, needed_at)
            wanted.append((stay, 0 if early else place))
        return wanted[::-1]
