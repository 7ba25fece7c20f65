"""The schedules that have a name: each a pure function from sizes to a `Schedule`.

`D` devices, `v` stages on each, `m` microbatches; `F`, `B`, `I` and `W` are the times
of one microbatch on one device, all its stages together, and `B = I + W`. Idle time is
the makespan minus the work of a device, with equal stages and free transfers. Peak live
microbatches are (stage, microbatch) pairs on device `d`, as in `Timeline.peak_live`:
with `v > 1` they are chunks, each `1/v` of what a device keeps for a whole microbatch.

The drawings have one column for an `F`, `I` or `W` of a stage and two for a `B`; `.` is
idle. Where a device has several stages, the stage stands before the letter, as in
`draw`.
"""

import itertools
from collections.abc import Callable, Sequence

from fpipe.schedules._action import Action
from fpipe.schedules._schedule import Schedule


def gpipe(devices: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards (GPipe, Huang et al., arXiv 1811.06965).

    Idle time `(D-1)(F+B)`; with unequal stages of times `f` and `b` the makespan is
    `sum(f+b) + (m-1)(max f + max b)`. Peak live microbatches `m` on every device.
    `gpipe(2, 4)`:

        0: F0 F1 F2 F3 .  .  .  B0--- B1--- B2--- B3---
        1: .  F0 F1 F2 F3 B0--- B1--- B2--- B3--- .  .
    """
    check_sizes("gpipe", devices=devices, microbatches=microbatches)
    return looped("gpipe", devices, 1, [range(microbatches)], lambda d: microbatches)


def one_f_one_b(devices: int, microbatches: int) -> Schedule:
    """Few forwards to warm up, then one forward, one backward (1F1B, PipeDream-flush,
    arXiv 2006.09503).

    Idle time `(D-1)(F+B)`; with unequal stages no longer than GPipe, and at most
    `sum(f+b) + (m-1) max(f+b)` where every `b` is the same multiple of its `f`. Peak
    live microbatches `min(m, D-d)`. `one_f_one_b(2, 4)`:

        0: F0 F1 .  .  B0--- F2 B1--- F3 B2--- .  B3---
        1: .  F0 B0--- F1 B1--- F2 B2--- F3 B3--- .  .
    """
    check_sizes("1f1b", devices=devices, microbatches=microbatches)
    return looped("1f1b", devices, 1, [range(microbatches)], lambda d: devices - 1 - d)


def eager_1f1b(devices: int, microbatches: int) -> Schedule:
    """1F1B with twice the warm-up, which hides the transfers (Zhuang et al., arXiv
    2211.05322).

    Idle time `(D-1)(F+B)`, and transfers of latency `c`, up to `(F+B)/2`, add
    `2(D-1)c`, where 1F1B pays `m*c` and more. Peak live microbatches `min(m,
    2(D-1-d)+1)`. `eager_1f1b(2, 4)`:

        0: F0 F1 F2 .  B0--- F3 B1--- .  B2--- .  B3---
        1: .  F0 B0--- F1 B1--- F2 B2--- F3 B3--- .  .
    """
    check_sizes("eager_1f1b", devices=devices, microbatches=microbatches)
    return looped(
        "eager_1f1b", devices, 1, [range(microbatches)], lambda d: 2 * (devices - 1 - d)
    )


def interleaved_1f1b(devices: int, microbatches: int, virtual: int = 2) -> Schedule:
    """1F1B over `v` stages a device, which divides the idle time by `v` (Narayanan et
    al., arXiv 2104.04473).

    Stage `c*D + d` is on device `d`. Megatron takes rounds of `D` microbatches through
    all chunks and wants `m` to be a multiple of `D`. Here any `m` is cut into `max(1,
    m//D)` rounds as equal as can be, the longer ones first, the longest of `r = ceil(m
    / max(1, m//D))`: the same order where `D` divides `m`, and as little idle time
    elsewhere.

    Idle time `((D-1) + (v-1) max(D-m, 0)) (F+B)/v`; peak live chunks `min(v*m, (v-1)r +
    2(D-1-d) + 1)`. One stage a device is eager 1F1B. `interleaved_1f1b(2, 4)`:

        0: 0F0 0F1 2F0 2F1 0F2 .   2B0---- 0F3 2B1---- 2F2 0B0---- 2F3 0B1---- .
            2B2---- .   2B3---- 0B2---- 0B3----
        1: .   1F0 1F1 3F0 3B0---- 3F1 3B1---- 1F2 1B0---- 1F3 1B1---- 3F2 3B2---- 3F3
            3B3---- 1B2---- 1B3---- .   .
    """
    check_sizes(
        "interleaved_1f1b", devices=devices, microbatches=microbatches, virtual=virtual
    )
    rounds = even_rounds(devices, microbatches)
    first = (virtual - 1) * len(
        rounds[0]
    )  # forwards until the last chunk's first, on every device
    return looped(
        "interleaved_1f1b",
        devices,
        virtual,
        rounds,
        lambda d: first + 2 * (devices - 1 - d),
    )


def looped_bfs(devices: int, microbatches: int, virtual: int = 2) -> Schedule:
    """GPipe over `v` stages a device, one chunk after the other (breadth-first,
    Lamy-Poirier, arXiv 2211.05953).

    Stage `c*D + d` is on device `d`. Idle time `((D-1) + (v-1) max(D-m, 0)) (F+B)/v`;
    peak live chunks `v*m` on every device. `looped_bfs(2, 2)`:

        0: 0F0 0F1 2F0 2F1 .   .   .   2B0---- 2B1---- 0B0---- 0B1----
        1: .   1F0 1F1 3F0 3F1 3B0---- 3B1---- 1B0---- 1B1---- .   .
    """
    check_sizes(
        "looped_bfs", devices=devices, microbatches=microbatches, virtual=virtual
    )
    return looped(
        "looped_bfs",
        devices,
        virtual,
        [range(microbatches)],
        lambda d: virtual * microbatches,
    )


def forward_only(devices: int, microbatches: int, virtual: int = 1) -> Schedule:
    """The forwards alone, for evaluation, in the order of `interleaved_1f1b`.

    Stage `c*D + d` is on device `d`. Idle time `((D-1) + (v-1) max(D-m, 0)) F/v`.
    Nothing is kept for a backward, but `Timeline.peak_live`, which waits for one, says
    `v*m`. `forward_only(2, 4)`:

        0: F0 F1 F2 F3 .
        1: .  F0 F1 F2 F3
    """
    check_sizes(
        "forward_only", devices=devices, microbatches=microbatches, virtual=virtual
    )
    rounds = even_rounds(devices, microbatches)
    rows = [
        [
            Action("F", c * devices + d, i)
            for r in rounds
            for c in range(virtual)
            for i in r
        ]
        for d in range(devices)
    ]
    return Schedule(rows, looped_map(devices, virtual), "forward_only")


def check_sizes(name: str, /, **sizes: int) -> None:
    """Refuse what is no size."""
    call = (
        f"`{name}({', '.join(f'{what}={value!r}' for what, value in sizes.items())})`"
    )
    for what, value in sizes.items():
        if type(value) is not int:  # a bool is none
            raise TypeError(f"{call}: {what} is an int")
        if value < 1:
            raise ValueError(f"{call}: {what} is at least 1")


def even_rounds(devices: int, microbatches: int) -> list[range]:
    """The microbatches in as many rounds of at least `D` as there are, as equal as can
    be, longer ones first.

    A round shorter than `D` stalls: its second chunk waits on device 0 until the first
    has passed all devices. A round longer than the first deadlocks after a warm-up that
    is as long as the first.
    """
    n = max(1, microbatches // devices)
    size, longer = divmod(microbatches, n)
    ends = [size * k + min(k, longer) for k in range(n + 1)]
    return [range(a, b) for a, b in itertools.pairwise(ends)]


def looped(
    name: str,
    devices: int,
    virtual: int,
    rounds: Sequence[range],
    warm_up: Callable[[int], int],
    lag: Callable[[int], int] | None = None,
) -> Schedule:
    """Device `d` holds the stages `c*D + d`; after `warm_up(d)` forwards it alternates
    forwards and backwards.

    Each round passes through all chunks before the next begins, backwards through the
    chunks in reverse. With `lag` a backward is an `I`, and its `W` comes right after
    the `lag(d)`-th `I` from there.
    """
    rows = []
    for d in range(devices):
        forwards = [
            (c * devices + d, i) for r in rounds for c in range(virtual) for i in r
        ]
        backwards = [
            (c * devices + d, i)
            for r in rounds
            for c in reversed(range(virtual))
            for i in r
        ]
        n, w = len(forwards), min(warm_up(d), len(forwards))
        row = [Action("F", *f) for f in forwards[:w]]
        for k in range(n):
            if w + k < n:
                row.append(Action("F", *forwards[w + k]))
            row.append(Action("B" if lag is None else "I", *backwards[k]))
            if lag is not None and k >= lag(d):
                row.append(Action("W", *backwards[k - lag(d)]))
        if lag is not None:
            row.extend(Action("W", *b) for b in backwards[max(0, n - lag(d)) :])
        rows.append(row)
    return Schedule(rows, looped_map(devices, virtual), name)


def looped_map(devices: int, virtual: int) -> list[int]:
    """The device of each stage, round and round."""
    return list(range(devices)) * virtual
