"""Schedules whose stages go round the devices: stage `c*D + d` on device `d`.

They are one family. A device warms up with some forwards, then alternates forwards and
backwards. They differ in the number of warm-up forwards, in the rounds, and in the
delay of a `W`. The words, units and drawings are those of the package.

    family          warm-up of device d       rounds         a backward is
    gpipe           all                       one            B
    1f1b            D-1-d                     one            B
    eager_1f1b      2(D-1-d)                  one            B
    interleaved     (v-1)r + 2(D-1-d)         of about D     B
    looped_bfs      all                       one            B
    zb_h1           (v-1)r + D-1-d            of about D     I, and W d later
    zb_h2           2(D-1-d)                  one            I, and W 2d later
"""

from collections.abc import Sequence

from fpipe.schedules._action import Action
from fpipe.schedules._generators.sizes import check_sizes, even_rounds, looped_stages
from fpipe.schedules._schedule import Schedule


def gpipe(devices: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards (GPipe, Huang et al., arXiv 1811.06965).

    The idle time is `(D-1)(F+B)`. With unequal stages of times `f` and `b` the makespan
    is `sum(f+b) + (m-1)(max f + max b)`. The peak is `m` live microbatches on every
    device. `gpipe(2, 4)`:

        0: F0 F1 F2 F3 .  .  .  B0--- B1--- B2--- B3---
        1: .  F0 F1 F2 F3 B0--- B1--- B2--- B3--- .  .

    Arguments:
        devices: `D`, the number of devices.
        microbatches: `m`, the number of microbatches.

    Returns:
        A `Schedule`.
    """
    check_sizes("gpipe", devices=devices, microbatches=microbatches)
    rows = _alternate(
        devices,
        virtual=1,
        rounds=[range(microbatches)],
        warm_up=[microbatches] * devices,
    )
    return Schedule(rows, looped_stages(devices, virtual=1), "gpipe")


def one_f_one_b(devices: int, microbatches: int) -> Schedule:
    """A short warm-up, then one forward and one backward in turn (1F1B).

    This is PipeDream-flush (Narayanan et al., arXiv 2006.09503). The idle time is
    `(D-1)(F+B)`. With unequal stages the makespan is no longer than that of GPipe. If
    every `b` is the same multiple of its `f`, it is at most `sum(f+b) + (m-1)
    max(f+b)`. The peak is `min(m, D-d)` live microbatches. `one_f_one_b(2, 4)`:

        0: F0 F1 .  .  B0--- F2 B1--- F3 B2--- .  B3---
        1: .  F0 B0--- F1 B1--- F2 B2--- F3 B3--- .  .

    Arguments:
        devices: `D`, the number of devices.
        microbatches: `m`, the number of microbatches.

    Returns:
        A `Schedule`.
    """
    check_sizes("1f1b", devices=devices, microbatches=microbatches)
    rows = _alternate(
        devices,
        virtual=1,
        rounds=[range(microbatches)],
        # One forward for each later device: after these the first cotangent is back.
        # More forwards would only be held longer.
        warm_up=[devices - 1 - d for d in range(devices)],
    )
    return Schedule(rows, looped_stages(devices, virtual=1), "1f1b")


def eager_1f1b(devices: int, microbatches: int) -> Schedule:
    """1F1B with twice the warm-up, which hides transfers.

    After Zhuang et al. (arXiv 2211.05322). The idle time is `(D-1)(F+B)`. Transfers of
    latency `c`, up to `(F+B)/2`, add `2(D-1)c`; in 1F1B they add `m*c` and more. The
    peak is `min(m, 2(D-1-d)+1)` live microbatches. `eager_1f1b(2, 4)`:

        0: F0 F1 F2 .  B0--- F3 B1--- .  B2--- .  B3---
        1: .  F0 B0--- F1 B1--- F2 B2--- F3 B3--- .  .

    Arguments:
        devices: `D`, the number of devices.
        microbatches: `m`, the number of microbatches.

    Returns:
        A `Schedule`.
    """
    check_sizes("eager_1f1b", devices=devices, microbatches=microbatches)
    rows = _alternate(
        devices,
        virtual=1,
        rounds=[range(microbatches)],
        # Two forwards for each later device, one for each direction. With one, a device
        # would be idle during each transfer.
        warm_up=[2 * (devices - 1 - d) for d in range(devices)],
    )
    return Schedule(rows, looped_stages(devices, virtual=1), "eager_1f1b")


def interleaved_1f1b(devices: int, microbatches: int, virtual: int = 2) -> Schedule:
    """1F1B with `v` stages per device, which divides the idle time by `v`.

    After Narayanan et al. (arXiv 2104.04473). Stage `c*D + d` is on device `d`.
    Megatron takes rounds of `D` microbatches through all stages of a device, and
    requires that `m` is a multiple of `D`. Here any `m` is cut into `max(1, m//D)`
    rounds. They are as equal as possible, with the longer ones first; the longest has
    `r = ceil(m / max(1, m//D))` microbatches. If `D` divides `m`, the order is
    Megatron's. The formula below holds for any `m`.

    The idle time is `((D-1) + (v-1) max(D-m, 0)) (F+B)/v`. The peak is `min(v*m,
    (v-1)r + 2(D-1-d) + 1)` live (stage, microbatch) pairs. With one stage per device
    this is eager 1F1B.
    `interleaved_1f1b(2, 4)`:

        0: 0F0 0F1 2F0 2F1 0F2 .   2B0---- 0F3 2B1---- 2F2 0B0---- 2F3 0B1---- .
        1: .   1F0 1F1 3F0 3B0---- 3F1 3B1---- 1F2 1B0---- 1F3 1B1---- 3F2 3B2----

        0: 2B2---- .   2B3---- 0B2---- 0B3----
        1: 3F3 3B3---- 1B2---- 1B3---- .   .

    Arguments:
        devices: `D`, the number of devices.
        microbatches: `m`, the number of microbatches.
        virtual: `v`, the number of stages per device. Default 2.

    Returns:
        A `Schedule`.
    """
    check_sizes(
        "interleaved_1f1b", devices=devices, microbatches=microbatches, virtual=virtual
    )
    rounds = even_rounds(devices, microbatches)
    # On every device, the forwards until the first of its last chunk.
    other_chunks = (virtual - 1) * len(rounds[0])
    rows = _alternate(
        devices,
        virtual,
        rounds,
        warm_up=[other_chunks + 2 * (devices - 1 - d) for d in range(devices)],
    )
    return Schedule(rows, looped_stages(devices, virtual), "interleaved_1f1b")


def looped_bfs(devices: int, microbatches: int, virtual: int = 2) -> Schedule:
    """GPipe with `v` stages per device, one stage after the other (breadth-first).

    After Lamy-Poirier (arXiv 2211.05953). Stage `c*D + d` is on device `d`. The idle
    time is `((D-1) + (v-1) max(D-m, 0)) (F+B)/v`. The peak is `v*m` live (stage,
    microbatch) pairs on every device. `looped_bfs(2, 2)`:

        0: 0F0 0F1 2F0 2F1 .   .   .   2B0---- 2B1---- 0B0---- 0B1----
        1: .   1F0 1F1 3F0 3F1 3B0---- 3B1---- 1B0---- 1B1---- .   .

    Arguments:
        devices: `D`, the number of devices.
        microbatches: `m`, the number of microbatches.
        virtual: `v`, the number of stages per device. Default 2.

    Returns:
        A `Schedule`.
    """
    check_sizes(
        "looped_bfs", devices=devices, microbatches=microbatches, virtual=virtual
    )
    rows = _alternate(
        devices,
        virtual,
        rounds=[range(microbatches)],
        warm_up=[virtual * microbatches] * devices,
    )
    return Schedule(rows, looped_stages(devices, virtual), "looped_bfs")


def zb_h1(devices: int, microbatches: int, virtual: int = 1) -> Schedule:
    """1F1B with each `W` delayed by `d` backwards: less idle time at the same peak.

    This is ZB-H1 (Qi et al., arXiv 2401.10241). `virtual > 1` gives the interleaved
    ZB-H1: stage `c*D + d` is on device `d`, and the rounds are those of
    `interleaved_1f1b`, the longest with `r` microbatches.

    The idle time is `(D-1)(F+I-min(F, I, W))/v` if `m >= D`. For any `m`, with `v = 1`
    and `W <= min(F, I)`, it is `(D-1)(F+I-W) + max(D-m, 0) W`. The peak is `min(v*m,
    (v-1)r + D)` live (stage, microbatch) pairs on every device. `zb_h1(3, 4)`:

        0: F0 F1 F2 .  .  I0 W0 F3 I1 W1 I2 W2 I3 W3
        1: .  F0 F1 .  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
        2: .  .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3

    Arguments:
        devices: `D`, the number of devices.
        microbatches: `m`, the number of microbatches.
        virtual: `v`, the number of stages per device. Default 1.

    Returns:
        A `Schedule`.
    """
    check_sizes("zb_h1", devices=devices, microbatches=microbatches, virtual=virtual)
    # With one stage per device, rounds make no difference.
    rounds = [range(microbatches)]
    if virtual > 1:
        rounds = even_rounds(devices, microbatches)
    other_chunks = (virtual - 1) * len(rounds[0])
    rows = _alternate(
        devices,
        virtual,
        rounds,
        # Device `d` holds `D-d` microbatches by its warm-up and `d` by its lag. That is
        # `D` on every device; under 1F1B only the first device holds `D`.
        warm_up=[other_chunks + devices - 1 - d for d in range(devices)],
        weight_lag=range(devices),
    )
    return Schedule(rows, looped_stages(devices, virtual), "zb_h1")


def zb_h2(devices: int, microbatches: int) -> Schedule:
    """ZB-H1 with twice the warm-up and twice the delay: no idle time except the fill.

    This is ZB-H2 (Qi et al., arXiv 2401.10241). For `m >= 2D-1` the idle time is
    `(D-1)F`, the time to fill the pipeline, if `I <= 2 min(F, W)`. For other costs it
    is `(D-1) max(F, I-F, F+I-2W)`. The peak is `min(m, 2D-1)` live microbatches on
    every device. `zb_h2(2, 4)`:

        0: F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3 .
        1: .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3

    Arguments:
        devices: `D`, the number of devices.
        microbatches: `m`, the number of microbatches.

    Returns:
        A `Schedule`.
    """
    check_sizes("zb_h2", devices=devices, microbatches=microbatches)
    rows = _alternate(
        devices,
        virtual=1,
        rounds=[range(microbatches)],
        warm_up=[2 * (devices - 1 - d) for d in range(devices)],
        # Device `d` holds `2(D-1-d) + 1` microbatches by its warm-up and `2d` by its
        # lag: `2D-1` on every device.
        weight_lag=[2 * d for d in range(devices)],
    )
    return Schedule(rows, looped_stages(devices, virtual=1), "zb_h2")


def forward_only(devices: int, microbatches: int, virtual: int = 1) -> Schedule:
    """Only the forwards, for evaluation, in the order of `interleaved_1f1b`.

    Stage `c*D + d` is on device `d`. The idle time is `((D-1) + (v-1) max(D-m, 0))
    F/v`. Nothing is kept for a backward. But `Timeline.peak_live` counts up to a
    backward, so it shows `v*m`. `forward_only(2, 4)`:

        0: F0 F1 F2 F3 .
        1: .  F0 F1 F2 F3

    Arguments:
        devices: `D`, the number of devices.
        microbatches: `m`, the number of microbatches.
        virtual: `v`, the number of stages per device. Default 1.

    Returns:
        A `Schedule`.
    """
    check_sizes(
        "forward_only", devices=devices, microbatches=microbatches, virtual=virtual
    )
    rounds = even_rounds(devices, microbatches)
    rows = [
        [
            Action("F", chunk * devices + device, microbatch)
            for one_round in rounds
            for chunk in range(virtual)
            for microbatch in one_round
        ]
        for device in range(devices)
    ]
    return Schedule(rows, looped_stages(devices, virtual), "forward_only")


def _alternate(
    devices: int,
    virtual: int,
    rounds: Sequence[range],
    warm_up: Sequence[int],
    weight_lag: Sequence[int] | None = None,
) -> list[list[Action]]:
    """The rows of devices that warm up, then alternate forwards and backwards.

    Arguments:
        devices: `D`.
        virtual: `v`.
        rounds: the microbatches. Each round passes through all chunks before the next
            begins, backwards through the chunks in reverse.
        warm_up: for each device how many forwards come before the first pair of a
            forward and a backward.
        weight_lag: left out, a backward is a `B`. Else it is an `I`, and on each device
            a `W` comes right after the `I` that is that many later than its own.
    """
    # Two rows of four microbatches, cut into warm-up, pairs and drain:
    #
    #   warm_up=2                  F0 F1 / F2 B0  F3 B1 / B2 B3
    #   warm_up=1, weight_lag=1    F0 / F1 I0  F2 I1 W0  F3 I2 W1 / I3 W2 W3
    #
    # Each generator is this loop with other numbers. So their orders, peaks and idle
    # times can be compared number by number.
    rows: list[list[Action]] = []
    for device in range(devices):
        stages = [chunk * devices + device for chunk in range(virtual)]
        forwards = [(s, i) for part in rounds for s in stages for i in part]
        backwards = [(s, i) for part in rounds for s in reversed(stages) for i in part]
        total = len(forwards)
        first = min(warm_up[device], total)
        row = [Action("F", *forward) for forward in forwards[:first]]
        for n, backward in enumerate(backwards):
            if first + n < total:
                row.append(Action("F", *forwards[first + n]))
            if weight_lag is None:
                row.append(Action("B", *backward))
                continue
            row.append(Action("I", *backward))
            if n >= weight_lag[device]:
                row.append(Action("W", *backwards[n - weight_lag[device]]))
        if weight_lag is not None:
            left = backwards[max(0, total - weight_lag[device]) :]
            row += [Action("W", *backward) for backward in left]
        rows.append(row)
    return rows
