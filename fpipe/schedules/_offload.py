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
from functools import cached_property

from fpipe.schedules._action import COPIES, KINDS
from fpipe.schedules._checks import check_type, read_limits, shown
from fpipe.schedules._clock import Clock, Run
from fpipe.schedules._costs import Costs
from fpipe.schedules._numbering import B, F, I, L, O, R, Rows
from fpipe.schedules._rules import HELD_AFTER, Held
from fpipe.schedules._schedule import Schedule

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
    They come back by an `L` before their backward. The residuals that wait longest for
    their backward are copied. The limit holds for any time of a copy, but slow copies
    make the step longer. After PipeOffload (Wan et al., arXiv 2503.01328).

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
    limits = read_limits("offload", schedule.devices, memory)
    if any(action.kind in COPIES for row in schedule.actions for action in row):
        raise ValueError(
            f"`offload(schedule)`: the schedule {schedule.name!r} has O already"
        )
    # In numbers, and only what is found in the end as a schedule, which is checked.
    clock = Clock(schedule, costs)
    free = clock.run(clock.rows)
    rows = _timed_rows(free, clock, costs)
    smallest = [row.smallest_limit for row in rows]
    for device, least in enumerate(smallest):
        if least > limits[device] * ROUNDING:
            every = ", ".join(f"{least:g}" for least in smallest)
            raise ValueError(
                f"`offload(memory={shown(memory)})`: device {device} holds at least "
                f"{least:g}, whatever goes to the host; all devices: {every}"
            )

    shortest = free.makespan * ROUNDING
    found: Rows | None = None
    makespan = math.inf
    tried: set[tuple[int, ...]] = set()
    for reserve in RESERVES:
        gone = [
            row.choose(limit, reserve) for row, limit in zip(rows, limits, strict=True)
        ]
        if not any(gone):
            return schedule
        # More room for those that are on their way may be more than there is.
        key = tuple(stay.made for stays in gone for stay in stays)
        if key in tried:
            continue
        tried.add(key)
        for way in WAYS:
            made = [
                row.place(stays, limit, way)
                for row, stays, limit in zip(rows, gone, limits, strict=True)
            ]
            if made == clock.rows:
                return schedule
            ends_at = clock.run(made).makespan
            if ends_at < makespan / ROUNDING:
                found, makespan = made, ends_at
            if makespan <= shortest:
                break
        if makespan <= shortest:
            break
    assert found is not None
    name = f"{schedule.name}, offload"
    return Schedule(clock.actions(found), schedule.stage_to_device, name)


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
        pair: the number of its stage and microbatch.
        made: the place of the `F` in its row.
        used: that of the `R`, `B` or `I`.
        size: what it holds.
        copying: the time of a copy.
    """

    pair: int
    made: int
    used: int
    size: float
    copying: float


def _timed_rows(run: Run, clock: Clock, costs: Costs) -> list["_TimedRow"]:
    """The rows of a schedule without copies, with the times of a run."""
    numbering = clock.numbering
    size, microbatches = numbering.size, numbering.microbatches
    memory = [costs.holds(stage) for stage in range(numbering.stages)]
    # What a stage holds after each kind of action.
    held_after = [[m.of(HELD_AFTER[kind]) for m in memory] for kind in KINDS]
    forward = [m.of(Held.FORWARD) for m in memory]
    starts, ends = run.played.starts, run.played.ends
    rows: list[_TimedRow] = []
    for row in run.rows:
        # Between two actions of a pair it holds what the first of them left, and while
        # one runs the larger of before and after. `more` is by how much more is held at
        # a place than at the one before.
        more = [0.0] * (len(row) + 1)
        held: dict[int, float] = {}
        made: dict[int, int] = {}
        used: dict[int, int] = {}
        for place, number in enumerate(row):
            kind, pair = divmod(number, size)
            last = held.get(pair, 0.0)
            now = held_after[kind][pair // microbatches]
            most = max(last, now)
            more[place] += most - last
            more[place + 1] += now - most
            held[pair] = now
            if kind == F:
                made[pair] = place
            elif kind in (R, B, I):
                used.setdefault(pair, place)
        stays = [
            _Stay(
                pair,
                place,
                used[pair],
                size=forward[pair // microbatches],
                copying=clock.durations[O * size + pair],
            )
            for pair, place in made.items()
            if pair in used
        ]
        rows.append(
            _TimedRow(
                row,
                stays,
                more,
                O * size,
                L * size,
                starts=[starts[number] for number in row],
                ends=[ends[number] for number in row],
            )
        )
    return rows


@dataclasses.dataclass(frozen=True)
class _TimedRow:
    """The actions of a device, and when they run without copies.

    Attributes:
        actions: in order.
        stays: what its forwards leave, in the order of the forwards.
        more: by how much more is held while an action runs than while the one before
            does.
        first_out, first_back: the number of the `O` and of the `L` of pair 0.
        starts, ends: of the actions.
    """

    actions: list[int]
    stays: list[_Stay]
    more: list[float]
    first_out: int
    first_back: int
    starts: list[float]
    ends: list[float]

    @cached_property
    def smallest_limit(self) -> float:
        """The least that the device holds at some time, with all gone that can be."""
        return max(self._held(self.stays))

    def _held(self, gone: Sequence[_Stay]) -> list[float]:
        """What is held while each action runs.

        Arguments:
            gone: what is there only while its `F` runs, and what needs it.
        """
        more = list(self.more)
        for stay in gone:
            more[stay.made + 1] -= stay.size
            more[stay.used] += stay.size
        return list(itertools.accumulate(more[:-1]))

    @cached_property
    def _held_by_all(self) -> list[float]:
        return self._held(())

    def choose(self, limit: float, reserve: int) -> list[_Stay]:
        """What goes, so that as many more as `reserve` have room."""
        largest = max((stay.size for stay in self.stays), default=0.0)
        return self._choose(max(limit - reserve * largest, self.smallest_limit))

    def _choose(self, limit: float) -> list[_Stay]:
        """What goes: whenever something has no room, what is needed last."""
        # As a cache that knows the future (Belady, 1966). Each stay has one use, so
        # what has gone comes back only for that.
        held = self._held_by_all
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

    def place(self, gone: list[_Stay], limit: float, way: _Way) -> list[int]:
        """The row with an `O` and an `L` for what goes."""
        if not gone:
            return self.actions
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
        before: list[list[int]] = [[] for _ in self.actions]
        moving = [stay for stay in gone if stay.made not in stays]
        for stay in moving:
            before[out[stay.made]].append(self.first_out + stay.pair)
        for stay in sorted(moving, key=lambda stay: stay.used):
            before[back[stay.made]].append(self.first_back + stay.pair)
        new: list[int] = []
        for copies, number in zip(before, self.actions, strict=True):
            new += copies
            new.append(number)
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
