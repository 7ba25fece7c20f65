"""A schedule made better by small changes: `B` for `I` and `W`, and one action moved at
a time.

The moves are those of job-shop scheduling: only what is on a critical path is worth
moving, to an end of the stretch that it is in (Nowicki and Smutnicki, 1996) or near it.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator

from fpipe.schedules._numbering import B, I, Rows, W
from fpipe.schedules._problem import Found, Problem


def _fusible(p: Problem, rows: Rows) -> list[int]:
    """The (stage, microbatch) whose `W` is right behind its `I`, where a `B` takes less
    than both.
    """
    b, i, w = p.cost[B], p.cost[I], p.cost[W]
    gains = [x < y + z for x, y, z in zip(b, i, w, strict=True)]
    return [
        x % p.size
        for row in rows
        for x, y in itertools.pairwise(row)
        if x // p.size == I and y - x == p.size and gains[x % p.size // p.m]
    ]


def cheaper(p: Problem) -> bool:
    """Whether some `B` takes less than `I` and `W`."""
    return any(
        x < y + z for x, y, z in zip(p.cost[B], p.cost[I], p.cost[W], strict=True)
    )


def promise(p: Problem, found: Found) -> float:
    """The makespan if all that could be fused were, and every device gained the same by
    it.
    """
    gain = [y + z - x for x, y, z in zip(p.cost[B], p.cost[I], p.cost[W], strict=True)]
    return (
        found.makespan
        - math.fsum(gain[at // p.m] for at in _fusible(p, found.rows)) / p.devices
    )


def toggle(p: Problem, found: Found) -> Found:
    """Fuse an `I` and the `W` right behind it to a `B`, or split a `B`, where the
    makespan gains.
    """
    size = p.size

    def fused(a: int) -> tuple[int, ...]:
        return () if a // size == W else (a - size,) if a // size == I else (a,)

    def split(a: int) -> tuple[int, ...]:
        return (a + size, a + 2 * size) if a // size == B else (a,)

    # Fusing pays in the middle of a step, splitting in its drain: there the latest
    # microbatches first. Again, since what one takes too far the other takes back.
    trials = iter(range(max(32, min(192, 100_000 // p.size))))
    before = math.inf
    while found.makespan < before:
        before = found.makespan
        found = _halving(
            p,
            found,
            sorted(_fusible(p, found.rows), key=lambda at: at % p.m),
            fused,
            trials,
        )
        whole = [a % size for row in found.rows for a in row if a // size == B]
        found = _halving(
            p, found, sorted(whole, key=lambda at: -(at % p.m)), split, trials
        )
    return found


def _halving(
    p: Problem,
    found: Found,
    which: list[int],
    change: Callable[[int], tuple[int, ...]],
    trials: Iterator[int],
) -> Found:
    """Change as many as make it better, a half at a time."""
    todo = [which] if which else []
    while todo and next(trials, None) is not None:
        some = todo.pop()
        these = set(some)
        rows = [
            [c for a in row for c in (change(a) if a % p.size in these else (a,))]
            for row in found.rows
        ]
        if p.fits(rows) and (changed := Found.of(p, rows)).makespan < found.makespan:
            found = changed
        elif len(some) > 1:
            todo += [some[len(some) // 2 :], some[: len(some) // 2]]
    return found


def anneal(p: Problem, found: Found, bound: float, seed: int) -> Found:
    """Move one action at a time on the critical path, at first also where it gets a
    little worse.
    """
    rng = random.Random(seed)
    pick = lambda n: int(rng.random() * n)  # noqa: E731 - the same in every release of Python
    rows, need = [list(row) for row in found.rows], p.needs(found.rows)
    times = p.run(rows, need)
    assert times is not None
    starts, ends = times
    now = best = found.makespan
    best_rows = found.rows
    where = {a: (d, n) for d, row in enumerate(rows) for n, a in enumerate(row)}
    trials = max(200, min(2000, 1_000_000 // len(where)))
    hot = 0.05 * math.fsum(p.took) / len(p.took)
    tried = 0
    for _ in range(10 * trials):
        if tried == trials or best <= bound:
            break
        blocks = _critical(rows, need, starts, ends, p.lag, where, pick)
        if not blocks:
            break
        d, low, high = blocks[pick(len(blocks))]
        row = rows[d]
        x = low + pick(high - low + 1)
        y = (x + 1, low, high, x - 6 + pick(13), x - 6 + pick(13), x + 1)[pick(6)]
        y = max(0, min(len(row) - 1, y))
        new = row[:x] + row[x + 1 :]
        new.insert(y, row[x])
        a, z = min(x, y), max(x, y) + 1
        if x == y or not _keeps_order(new[a:z], p) or p.peak(new) > p.slack[d]:
            continue
        tried += 1
        rows[d] = new
        times = p.run(rows, need)
        if times is None or max(times[1]) > now + hot * rng.random() * (
            1.0 - tried / trials
        ):
            rows[d] = row
            continue
        starts, ends = times
        now = max(ends)
        where.update((new[n], (d, n)) for n in range(a, z))
        if now < best:
            best, best_rows = now, [list(row) for row in rows]
    return Found.of(p, best_rows)


def _critical(
    rows: Rows,
    need: list[int],
    starts: list[float],
    ends: list[float],
    lag: list[float],
    where: dict[int, tuple[int, int]],
    pick: Callable[[int], int],
) -> list[tuple[int, int, int]]:
    """A critical path from its end, as the stretches `(device, first, last)` that it
    runs without a gap.
    """
    d = max(range(len(rows)), key=lambda d: ends[rows[d][-1]])
    n = high = len(rows[d]) - 1
    blocks = []
    while True:
        a = rows[d][n]
        in_row = n > 0 and ends[rows[d][n - 1]] == starts[a]
        from_other = need[a] >= 0 and ends[need[a]] + lag[a] == starts[a]
        if in_row and not (from_other and pick(2)):
            n -= 1
            continue
        if high > n:
            blocks.append((d, n, high))
        if not from_other:
            return blocks
        d, n = where[need[a]]
        high = n


def _keeps_order(part: list[int], p: Problem) -> bool:
    """Whether each `F` is before its `B` or `I`, each `I` before its `W`, and
    microbatches are in order.

    The last since a stage's state goes from microbatch to microbatch, in the order of
    its forwards.
    """
    of_pair: dict[int, int] = {}
    of_stage: dict[int, int] = {}
    for a in part:
        if of_pair.get(a % p.size, -1) > a or of_stage.get(a // p.m, -1) > a:
            return False
        of_pair[a % p.size] = of_stage[a // p.m] = a
    return True
