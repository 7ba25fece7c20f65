"""How many consecutive units make a stage. A unit is a piece, or the equations between
two places.

In: what each unit costs, and the values that units hand on to others. Out: how many
units each stage has. Four units, on two stages:

    work   [2, 2, 2, 2]
    sent   Sent(source=0, readers=(1, 3), bytes=8)
           Sent(source=1, readers=(2,), bytes=4)

    balance   most expensive   bytes between stages
    (1, 3)    6                8
    (2, 2)    4                8 + 4     this one: costs and bytes are not added up
    (3, 1)    6                8

A value goes straight to each stage that reads it, and it goes there once, however many
units of the stage read it. It costs nothing in the stages between. So the cost of a cut
depends on both ends of a stage, and not on the place alone.

`fpipe.balance` (`fpipe._planning.partition`) solves the same problem for stages of any
cost, by tables of all spans. A function may have thousands of places, and tables of
their squares; but its costs are sums, and few places come into question for each cut.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from fpipe._planning.costs import Sent
from fpipe._planning.partition import SLACK

# Sums of floats that differ by less than that share are equal.
_EQUAL = 1e-9


def best_balance(
    work: Sequence[float], sent: Sequence[Sent], stages: int, slack: float = SLACK
) -> tuple[int, ...]:
    """The number of units in each stage.

    The most expensive stage is as cheap as can be; of all balances in which it costs at
    most `slack` more, the one with the fewest bytes between stages; of these the most
    even one (the least sum of squares of what stages cost); of these the one whose
    first stage is largest, and so on.

    Arguments:
        work: what each unit costs.
        sent: values that units hand to later ones.
        stages: as many as units at most.
    """
    ends = np.concatenate([[0.0], np.cumsum(np.asarray(work, np.float64))])
    limit = _least_most(ends, stages) * (1 + slack) * (1 + _EQUAL)
    starts = _possible_starts(ends, stages, limit)
    return _Leanest(ends, sent, starts, limit).sizes()


def _least_most(ends: np.ndarray, stages: int) -> float:
    """The least possible cost of the most expensive stage.

    Arguments:
        ends: what the units before each place cost together.
    """
    # From the last stage to the first: `best[i]` is the cost of the most expensive of
    # the stages from some one on, on the units from `i` on. It falls with `i`, and what
    # the stage itself costs grows with its end, so the best end is where the two meet.
    units = len(ends) - 1
    best = ends[-1] - ends[:units]
    for left in range(1, stages):
        last = units - left  # Each stage after has a unit.
        start, end = np.arange(last), np.arange(1, last + 1)
        after = best[1 : last + 1]
        meet = np.searchsorted(ends[end] - after, ends[start])
        found = np.full(last, np.inf)
        for at in (meet - 1, meet):
            # Its own unit at least, and not those that others need.
            at = np.clip(at, start, last - 1)
            own = ends[end[at]] - ends[start]
            found = np.minimum(found, np.maximum(own, after[at]))
        best = found
    return float(best[0])


@dataclasses.dataclass(frozen=True)
class _Range:
    """The places from `first` to `last`, both included."""

    first: int
    last: int

    def __contains__(self, place: int) -> bool:
        return self.first <= place <= self.last


def _possible_starts(ends: np.ndarray, stages: int, limit: float) -> list[_Range]:
    """Where each stage may begin, if no stage costs more than the limit; and where the
    last one ends.
    """
    units = len(ends) - 1
    firsts, lasts = [units], [0]
    for left in range(1, stages + 1):
        # As early as the later stages allow. Each earlier stage has at least one unit.
        earliest = int(np.searchsorted(ends, ends[firsts[-1]] - limit))
        firsts.append(max(earliest, stages - left))
        # As late as the earlier stages allow. Each later stage has at least one unit.
        latest = int(np.searchsorted(ends, ends[lasts[-1]] + limit, "right")) - 1
        lasts.append(min(latest, units - stages + left))
    ranges = map(_Range, reversed(firsts), lasts)
    return list(ranges)


class _Leanest:
    """The best of the balances in which no stage costs more than a limit.

    From the last place to the first: the fewest bytes between the stages from `s` on,
    if `s` begins there, and with them the least sum of squares. What a stage receives
    depends on both of its ends: going to an earlier start, some values are now made
    inside of it, and others are first read at another unit. `arriving[r]` is what comes
    from before the start and is first read by unit `r`, and a stage that ends at `j`
    receives the sum of it up to there.
    """

    def __init__(
        self,
        ends: np.ndarray,
        sent: Sequence[Sent],
        starts: Sequence[_Range],
        limit: float,
    ) -> None:
        self._ends, self._starts, self._limit = ends, starts, limit
        units = len(ends) - 1
        # What happens to `arriving` when the start moves to before a unit.
        self._made: list[list[tuple[int, float]]] = [[] for _ in range(units)]
        self._read: list[list[tuple[int | None, float]]] = [[] for _ in range(units)]
        for source, readers, size, _ in sent:
            later: int | None = None
            for reader in sorted(set(readers), reverse=True):
                self._read[reader].append((later, size))
                later = reader
            if later is not None:
                self._made[source].append((later, size))
        self._arriving = np.zeros(units)
        # For each stage and start; `_end` is where the stage ends then.
        shape = (len(starts), units + 1)
        self._bytes = np.full(shape, np.inf)
        self._squares = np.full(shape, np.inf)
        self._end = np.zeros(shape, int)
        self._bytes[-1, units] = self._squares[-1, units] = 0.0

    def sizes(self) -> tuple[int, ...]:
        """The number of units in each stage."""
        stages = range(len(self._starts) - 1)
        for start in reversed(range(len(self._ends) - 1)):
            self._move_to(start)
            for s in stages:
                if start in self._starts[s]:
                    self._best_end(s, start)
        found, place = list[int](), 0
        for s in stages:
            end = int(self._end[s, place])
            found.append(end - place)
            place = end
        return tuple(found)

    def _move_to(self, start: int) -> None:
        """Go from the place after a unit to the one before it."""
        for reader, size in self._made[start]:
            self._arriving[reader] -= size
        for later, size in self._read[start]:
            self._arriving[start] += size
            if later is not None:
                self._arriving[later] -= size

    def _best_end(self, s: int, start: int) -> None:
        """The best end of a stage that begins there."""
        ends = self._ends
        furthest = int(np.searchsorted(ends, ends[start] + self._limit, "right")) - 1
        first = max(start + 1, self._starts[s + 1].first)
        last = min(furthest, self._starts[s + 1].last)
        if first > last:
            return
        # Nothing arrives at the first stage but the batch.
        received = np.cumsum(self._arriving[start:last])[first - start - 1 :]
        total = self._bytes[s + 1, first : last + 1] + received * (start > 0)
        least = total.min()
        if np.isinf(least):
            return
        squares = self._squares[s + 1, first : last + 1]
        squares = squares + (ends[first : last + 1] - ends[start]) ** 2
        squares = np.where(total == least, squares, np.inf)
        fewest = squares.min()
        # Of the ends that are as good the last.
        as_good = np.flatnonzero(squares <= fewest * (1 + _EQUAL))
        self._bytes[s, start], self._squares[s, start] = least, fewest
        self._end[s, start] = first + int(as_good[-1])
