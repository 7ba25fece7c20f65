"""A schedule made better by small changes.

In: a `Problem` and a `Found`. Out: a `Found` that is no worse. There are two changes:
`toggle` puts `B` for `I` and `W` or the other way, `anneal` moves one action at a time.

The moves are those of job-shop scheduling: only what is on a critical path is worth
moving, to an end of the stretch that it is in (Nowicki and Smutnicki, 1996) or near it.
With the critical path in capitals, a stretch of it on each of two devices:

    device 0   F0 F1 f2 . . .  b0 b1 b2
    device 1   .  .  F0 F1 B0 B1 ...        F1 may move before F0, or after B0 or B1
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable
from typing import NamedTuple

from fpipe.schedules._numbering import B, I, Played, Rows, W
from fpipe.schedules._search.problem import Found, Problem


def _fusible(problem: Problem, rows: Rows) -> list[int]:
    """The pairs of stage and microbatch whose `W` is right after their `I`, where a
    `B` takes less than both.
    """
    size = problem.numbering.size
    microbatches = problem.numbering.microbatches
    pairs: list[int] = []
    for row in rows:
        # The number of a pair's `W` is `size` more than that of its `I`.
        for action, following in itertools.pairwise(row):
            if action // size == I and following == action + size:
                pair = action % size
                if problem.costs[pair // microbatches].gain > 0.0:
                    pairs.append(pair)
    return pairs


def promise(problem: Problem, found: Found) -> float:
    """The makespan if all that could be fused were, and every device gained the same by
    it.
    """
    microbatches = problem.numbering.microbatches
    gained = math.fsum(
        problem.costs[pair // microbatches].gain
        for pair in _fusible(problem, found.rows)
    )
    return found.makespan - gained / problem.devices


@dataclasses.dataclass
class _Budget:
    """How many more changes may be tried; counts, not a clock, so that the same call
    gives the same schedule.
    """

    left: int

    def spend(self) -> bool:
        """Whether there was one left."""
        self.left -= 1
        return self.left >= 0


def toggle(problem: Problem, found: Found) -> Found:
    """Fuse an `I` and the `W` right after it to a `B`, or split a `B`, where the
    makespan gains.
    """
    size = problem.numbering.size
    microbatches = problem.numbering.microbatches

    # In the order of the kinds, B I W: from `I` it is one `size` down to `B`, from
    # `B` one up to `I` and two to `W`.
    def fuse(action: int) -> list[int]:
        if action // size == W:
            return []
        return [action - size] if action // size == I else [action]

    def split(action: int) -> list[int]:
        if action // size == B:
            return [action + size, action + 2 * size]
        return [action]

    # Fusing pays in the middle of a step, splitting in its drain: there the latest
    # microbatches first. Again, since what one takes too far the other takes back.
    budget = _Budget(max(32, min(192, 100_000 // size)))
    before = math.inf
    while found.makespan < before:
        before = found.makespan
        pairs = _fusible(problem, found.rows)
        pairs.sort(key=lambda pair: pair % microbatches)
        found = _change_some(problem, found, pairs, fuse, budget)
        pairs = [a % size for row in found.rows for a in row if a // size == B]
        pairs.sort(key=lambda pair: -(pair % microbatches))
        found = _change_some(problem, found, pairs, split, budget)
    return found


def _change_some(
    problem: Problem,
    found: Found,
    pairs: list[int],
    change: Callable[[int], list[int]],
    budget: _Budget,
) -> Found:
    """Change as many pairs as make it better: all of them, else each half by itself.

    Arguments:
        problem: what judges.
        found: where it starts.
        pairs: of stage and microbatch, in the order of their promise.
        change: what comes in the place of an action of such a pair.
        budget: of changes to try.
    """
    # Halves and not one by one: one pair alone seldom changes the makespan, which is
    # the longest of many paths, and each try is a play of all actions.
    size = problem.numbering.size
    todo = [pairs] if pairs else []
    while todo and budget.spend():
        some = todo.pop()
        chosen = set(some)
        rows = [
            [new for a in row for new in (change(a) if a % size in chosen else [a])]
            for row in found.rows
        ]
        if problem.all_fit(rows):
            changed = problem.judge(rows)
            if changed.makespan < found.makespan:
                found = changed
                continue
        if len(some) > 1:
            middle = len(some) // 2
            todo.append(some[middle:])
            todo.append(some[:middle])
    return found


class _Stretch(NamedTuple):
    """Actions of a device, by position, that a critical path runs without a gap."""

    device: int
    first: int
    last: int


class _Position(NamedTuple):
    """Where an action is."""

    device: int
    place: int


class _Dice:
    """Random numbers that are the same in every release of Python.

    `random.Random.randrange` is not; `random` itself is.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random

    def below(self, n: int) -> int:
        """A number from 0 to `n - 1`."""
        return int(self.random() * n)


def anneal(problem: Problem, found: Found, bound: float, seed: int) -> Found:
    """Move one action at a time on the critical path, at first also where it gets a
    little worse.

    Arguments:
        problem: what judges.
        found: where it starts.
        bound: a makespan at which to stop, since none is shorter.
        seed: of the random numbers.
    """
    # `crossing` is made once: moves within a row change no need. Each step is a play of
    # the whole schedule, which bounds how many steps there can be.
    dice = _Dice(seed)
    rows = [list(row) for row in found.rows]
    crossing = problem.numbering.crossing_needs(rows)
    played = problem.play(rows, crossing)
    assert played is not None
    makespan = best = found.makespan
    best_rows = found.rows
    positions = {
        action: _Position(device, index)
        for device, row in enumerate(rows)
        for index, action in enumerate(row)
    }
    trials = max(200, min(2000, 1_000_000 // len(positions)))
    durations = [
        duration
        for stage in problem.costs
        for duration in (stage.forward, stage.whole, stage.input, stage.weight)
    ]
    # How much worse a move may make it: a share of an action, less and less of it.
    heat = 0.05 * math.fsum(durations) / len(durations)
    tried = 0
    # Not every move is a trial: some break an order or a limit.
    for _ in range(10 * trials):
        if tried == trials or best <= bound:
            break
        # Choose an action on a critical path. No other move can make the schedule
        # shorter.
        stretches = _critical_path(problem, rows, crossing, played, positions, dice)
        if not stretches:
            break
        device, first, last = stretches[dice.below(len(stretches))]
        row = rows[device]
        source = first + dice.below(last - first + 1)
        # Choose where it goes: one place on, an end of its stretch, or within six
        # places, each in two of six cases.
        near = source - 6 + dice.below(13)
        also_near = source - 6 + dice.below(13)
        targets = (source + 1, first, last, near, also_near, source + 1)
        target = targets[dice.below(6)]
        target = max(0, min(len(row) - 1, target))
        if source == target:
            continue
        # Cheap checks first: the order of what it passes, then memory, then a play,
        # which also finds deadlocks.
        moved = row[:source] + row[source + 1 :]
        moved.insert(target, row[source])
        start = min(source, target)
        end = max(source, target) + 1
        if not _keeps_order(problem, moved[start:end]):
            continue
        if not problem.fits(device, moved):
            continue
        tried += 1
        rows[device] = moved
        after = problem.play(rows, crossing)
        if after is None:
            rows[device] = row
            continue
        # Worse is allowed at first, to leave a local optimum; the best rows are kept
        # aside.
        allowed = heat * dice.random() * (1.0 - tried / trials)
        if max(after.ends) > makespan + allowed:
            rows[device] = row
            continue
        played = after
        makespan = max(played.ends)
        for index in range(start, end):
            positions[moved[index]] = _Position(device, index)
        if makespan < best:
            best = makespan
            best_rows = [list(row) for row in rows]
    return problem.judge(best_rows)


def _critical_path(
    problem: Problem,
    rows: Rows,
    crossing: list[int],
    played: Played,
    positions: dict[int, _Position],
    dice: _Dice,
) -> list[_Stretch]:
    """A critical path from its end, as stretches of more than one action.

    From each action it goes back to what the action waited for: the one before it in
    its row, or the one of another stage that it needs. Where it waited for both, the
    dice decide.
    """
    # Floats are compared with `==`: `play` sets a start to the very end that it waited
    # for.
    starts, ends, latencies = played.starts, played.ends, problem.latencies
    device = max(range(len(rows)), key=lambda d: ends[rows[d][-1]])
    index = last = len(rows[device]) - 1
    stretches: list[_Stretch] = []
    while True:
        action = rows[device][index]
        start = starts[action]
        after_row = index > 0 and ends[rows[device][index - 1]] == start
        source = crossing[action]
        after_source = source >= 0 and ends[source] + latencies[action] == start
        # Along the row; or a stretch ends here, and the path goes on at the source; or
        # nothing was waited for, and this is the start of the schedule.
        if after_row and not (after_source and dice.below(2)):
            index -= 1
            continue
        if last > index:
            stretches.append(_Stretch(device, index, last))
        if not after_source:
            return stretches
        device, index = positions[source]
        last = index


def _keeps_order(problem: Problem, part: list[int]) -> bool:
    """Whether a part of a row has each `F` before its `B` or `I`, each `I` before its
    `W`, and microbatches in order.

    The kinds are numbered in the order in which a stage's own rules let them run. And a
    stage's state goes from microbatch to microbatch, in the order of its forwards.
    """
    size = problem.numbering.size
    microbatches = problem.numbering.microbatches
    last_of_pair: dict[int, int] = {}
    last_of_queue: dict[int, int] = {}
    for action in part:
        pair = action % size
        queue = action // microbatches
        if last_of_pair.get(pair, -1) > action or last_of_queue.get(queue, -1) > action:
            return False
        last_of_pair[pair] = action
        last_of_queue[queue] = action
    return True
