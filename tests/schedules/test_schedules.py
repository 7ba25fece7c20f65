"""Schedules as data: order, validation, simulated time."""

import itertools
import random
import re

import pytest

from fpipe import schedules
from fpipe.schedules import NAMES, Costs, Schedule, named, simulate

# Every D, m and v of a small grid, m < D and no multiple of D included.
SIZES = [(d, m) for d in range(1, 7) for m in range(1, 18)]
UNIT = Costs(F=1, I=1, W=1)


def idle(schedule, costs=UNIT):
    """The makespan minus the work of one device, with equal stages; exact for costs
    that are ints.
    """
    work = sum(costs.of(a) for a in schedule.actions[0])
    timeline = simulate(schedule, costs)
    assert timeline.bubble == pytest.approx(1 - work / timeline.makespan, abs=1e-12)
    return timeline.makespan - work


def several(name):
    """The stages per device to try."""
    return (1, 2, 3) if NAMES[name].virtual else (NAMES[name].per_device or 1,)


def longest_round(d, m):
    return -(-m // max(1, m // d))


# Idle time in units of a stage: `d`, `m`, `v`, then F, I and W of one stage, of which a
# device has `v`. Each with the costs that it holds for; `None` where it says nothing.
IDLE = {
    "gpipe": lambda d, m, v, f, i, w: (d - 1) * (f + i + w),
    "1f1b": lambda d, m, v, f, i, w: (d - 1) * (f + i + w),
    "eager_1f1b": lambda d, m, v, f, i, w: (d - 1) * (f + i + w),
    "interleaved_1f1b": lambda d, m, v, f, i, w: (
        (d - 1 + (v - 1) * max(d - m, 0)) * (f + i + w)
    ),
    "looped_bfs": lambda d, m, v, f, i, w: (
        (d - 1 + (v - 1) * max(d - m, 0)) * (f + i + w)
    ),
    "forward_only": lambda d, m, v, f, i, w: (d - 1 + (v - 1) * max(d - m, 0)) * f,
    "zb_h1": lambda d, m, v, f, i, w: (
        (d - 1) * (f + i - min(f, i, w))
        if m >= d
        else (d - 1) * (f + i - w) + (d - m) * w
        if v == 1 and w <= min(f, i)
        else None
    ),
    "zb_h2": lambda d, m, v, f, i, w: (
        (d - 1) * max(f, i - f, f + i - 2 * w) if m >= 2 * d - 1 else None
    ),
    "zb_v": lambda d, m, v, f, i, w: (
        max(d - 1, 4 * (d - 1) - 2 * (m - 1)) * f
        if f == i == w
        else (d - 1) * f
        if m >= 2 * d - 1 and w <= f == i
        else None
    ),
    "dualpipe_v": lambda d, m, v, f, i, w: (
        (d - 1) * (f + i - w) if m >= 2 * d and w <= i <= f <= i + w else None
    ),
    "v_half": lambda d, m, v, f, i, w: (
        (3 * (d - 1) - (d % 2 if d > 1 else 0)) * f
        if f == i == w and m >= (d + 2) // 2
        else None
    ),
    "v_min": lambda d, m, v, f, i, w: (
        (4 * (d - 1) - 1 + (2 if d % 3 == 0 and m > 1 else 0)) * f
        if f == i == w and d > 1
        else None
    ),
}
COSTS = [
    (1, 1, 1),
    (2, 2, 1),
    (3, 2, 1),
    (1, 2, 3),
    (1, 5, 2),
    (5, 1, 3),
    (3, 3, 2),
    (1, 3, 2),
]

# Peak live chunks on device `k`; for V-Half and V-Min the highest of all devices.
PEAK = {
    "gpipe": lambda d, m, v, k: m,
    "1f1b": lambda d, m, v, k: min(m, d - k),
    "eager_1f1b": lambda d, m, v, k: min(m, 2 * (d - 1 - k) + 1),
    "interleaved_1f1b": lambda d, m, v, k: min(
        v * m, (v - 1) * longest_round(d, m) + 2 * (d - 1 - k) + 1
    ),
    "looped_bfs": lambda d, m, v, k: v * m,
    "forward_only": lambda d, m, v, k: v * m,
    "zb_h1": lambda d, m, v, k: min(v * m, (v - 1) * longest_round(d, m) + d),
    "zb_h2": lambda d, m, v, k: min(m, 2 * d - 1),
    "zb_v": lambda d, m, v, k: min(2 * m, m + 1 + k, 2 * d),
    "dualpipe_v": lambda d, m, v, k: min(2 * m, m + 1 + k, 2 * d + 1),
    "v_half": lambda d, m, v, k: min(2 * m, 2 * ((d + 2) // 2)),
    "v_min": lambda d, m, v, k: min(2 * m, 2 * ((d + 4) // 3)),
}


@pytest.mark.parametrize("name", NAMES)
def test_idle_time(name):
    checked = set()
    for v, (d, m) in itertools.product(several(name), SIZES):
        schedule = (
            NAMES[name].generator(d, m, virtual=v)
            if NAMES[name].virtual
            else NAMES[name].generator(d, m)
        )
        # All costs for the smaller ones, which is where formulas bend.
        for f, i, w in COSTS if d <= 4 and m <= 10 else COSTS[:2]:
            expected = IDLE[name](d, m, v, f, i, w)
            if expected is not None:
                assert idle(schedule, Costs(F=f, I=i, W=w)) == expected, (
                    d,
                    m,
                    v,
                    f,
                    i,
                    w,
                )
                checked.add((d, m))
    assert len(checked) >= len(SIZES) / 2  # the formula says something


@pytest.mark.parametrize("name", NAMES)
def test_peak(name):
    for v, (d, m) in itertools.product(several(name), SIZES):
        schedule = named(name, d, m, None if v == NAMES[name].per_device else v)
        assert (schedule.devices, schedule.stages, schedule.microbatches) == (
            d,
            v * d,
            m,
        )
        got, formula = (
            simulate(schedule).peak_live,
            [PEAK[name](d, m, v, k) for k in range(d)],
        )
        assert max(got) == max(formula), (d, m, v)
        if name not in ("v_half", "v_min"):
            assert list(got) == formula, (d, m, v)


@pytest.mark.parametrize("name", ["v_half", "v_min"])
def test_v_half_and_v_min_beside_1f1b(name):
    share, peak = {"v_half": (1 / 2, 1 / 2), "v_min": (2 / 3, 1 / 3)}[name]
    for d, rounds in itertools.product(range(2, 13), (1, 2, 4)):
        m = rounds * d
        schedule = named(name, d, m)
        base = 2 * idle(schedules.one_f_one_b(d, m))  # a stage of a V is half as long
        assert abs(idle(schedule) - share * base) <= 1
        assert max(simulate(schedule).peak_live) / 2 <= peak * d + 4 / 3


def test_interleaved_never_pays_for_a_last_round_that_is_not_full():
    for v, (d, m) in itertools.product((2, 3), SIZES):
        whole = schedules.interleaved_1f1b(d, d * -(-m // d), v)
        rows = [
            [a for a in row if a.microbatch < m] for row in whole.actions
        ]  # Megatron's order, cut off
        cut = Schedule(rows, whole.stage_to_device)
        assert idle(schedules.interleaved_1f1b(d, m, v)) <= idle(cut)
        if m % d == 0:
            assert schedules.interleaved_1f1b(d, m, v).actions == cut.actions


def test_one_stage_each_of_those_for_several():
    for d, m in SIZES:
        assert (
            schedules.interleaved_1f1b(d, m, 1).actions
            == schedules.eager_1f1b(d, m).actions
        )
        assert schedules.looped_bfs(d, m, 1).actions == schedules.gpipe(d, m).actions


def test_unequal_stages():
    rng = random.Random(0)
    for _ in range(300):
        d, m = rng.randint(1, 6), rng.randint(1, 12)
        f, b = (
            [rng.randint(1, 9) for _ in range(d)],
            [rng.randint(1, 9) for _ in range(d)],
        )
        costs = Costs(F=f, B=b)
        gpipe = sum(f) + sum(b) + (m - 1) * (max(f) + max(b))
        assert simulate(schedules.gpipe(d, m), costs).makespan == gpipe
        assert simulate(schedules.one_f_one_b(d, m), costs).makespan <= gpipe
        for k in (1, 2, 3):  # backwards in proportion to forwards
            costs = Costs(F=f, B=[k * x for x in f])
            most = (sum(f) + (m - 1) * max(f)) * (1 + k)
            assert simulate(schedules.one_f_one_b(d, m), costs).makespan <= most


def test_unequal_stages_out_of_proportion():
    """`sum(f+b) + (m-1) max(f+b)` is no bound where the slowest forward and the slowest
    backward are apart.
    """
    f, b = [1, 6, 8, 7, 1], [9, 2, 2, 7, 1]
    makespan = simulate(schedules.one_f_one_b(5, 4), Costs(F=f, B=b)).makespan
    assert (
        makespan
        == 87
        > sum(f) + sum(b) + 3 * max(x + y for x, y in zip(f, b, strict=True))
    )


def test_latency():
    for d, m in [(d, m) for d, m in SIZES if d > 1 and m > 1]:
        for c in (0.25, 0.5, 1.0, 1.5):  # up to (F + B) / 2
            costs = Costs(F=1, B=2, transfer=c)
            late = {
                f: idle(f(d, m), costs) - 3 * (d - 1)
                for f in (schedules.one_f_one_b, schedules.eager_1f1b)
            }
            assert late[schedules.one_f_one_b] >= m * c
            assert late[schedules.eager_1f1b] == 2 * (d - 1) * c
            assert idle(schedules.gpipe(d, m), costs) - 3 * (d - 1) == 2 * (d - 1) * c


def test_how_dear_a_split_may_be():
    """ZB-H1 gains on 1F1B while `I + W = (1+x) B` with `x < 2(D-1) / (2m+D-1)`."""
    for d, m in [(2, 8), (8, 64), (8, 16), (4, 16)]:
        x = 2 * (d - 1) / (2 * m + d - 1)
        whole = simulate(schedules.one_f_one_b(d, m), Costs(F=1, B=2)).makespan
        half = [
            simulate(schedules.zb_h1(d, m), Costs(F=1, I=y, W=y)).makespan
            for y in (1 + 0.99 * x, 1 + 1.01 * x)
        ]
        assert half[0] < whole < half[1]


# Four devices, eight microbatches: a line per device, chunk 1 in small letters.
ORDERS = {
    "gpipe": ["F0 F1 F2 F3 F4 F5 F6 F7 B0 B1 B2 B3 B4 B5 B6 B7"] * 4,
    "1f1b": [
        "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7",
        "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7",
    ],
    "eager_1f1b": [
        "F0 F1 F2 F3 F4 F5 F6 B0 F7 B1 B2 B3 B4 B5 B6 B7",
        "F0 F1 F2 F3 F4 B0 F5 B1 F6 B2 F7 B3 B4 B5 B6 B7",
        "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7",
    ],
    "interleaved_1f1b": [
        "F0 F1 F2 F3 f0 f1 f2 f3 F4 F5 F6 b0 F7 b1 f4 b2 f5 b3 f6 B0 f7 B1 B2 B3 b4 b5 "
        "b6 b7 B4 B5 B6 B7",
        "F0 F1 F2 F3 f0 f1 f2 f3 F4 b0 F5 b1 F6 b2 F7 b3 f4 B0 f5 B1 f6 B2 f7 B3 b4 b5 "
        "b6 b7 B4 B5 B6 B7",
        "F0 F1 F2 F3 f0 f1 f2 b0 f3 b1 F4 b2 F5 b3 F6 B0 F7 B1 f4 B2 f5 B3 f6 b4 f7 b5 "
        "b6 b7 B4 B5 B6 B7",
        "F0 F1 F2 F3 f0 b0 f1 b1 f2 b2 f3 b3 F4 B0 F5 B1 F6 B2 F7 B3 f4 b4 f5 b5 f6 b6 "
        "f7 b7 B4 B5 B6 B7",
    ],
    "looped_bfs": [
        "F0 F1 F2 F3 F4 F5 F6 F7 f0 f1 f2 f3 f4 f5 f6 f7 b0 b1 b2 b3 b4 b5 b6 b7 B0 B1 "
        "B2 B3 B4 B5 B6 B7"
    ]
    * 4,
    "zb_h1": [
        "F0 F1 F2 F3 I0 W0 F4 I1 W1 F5 I2 W2 F6 I3 W3 F7 I4 W4 I5 W5 I6 W6 I7 W7",
        "F0 F1 F2 I0 F3 I1 W0 F4 I2 W1 F5 I3 W2 F6 I4 W3 F7 I5 W4 I6 W5 I7 W6 W7",
        "F0 F1 I0 F2 I1 F3 I2 W0 F4 I3 W1 F5 I4 W2 F6 I5 W3 F7 I6 W4 I7 W5 W6 W7",
        "F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 F6 I6 W3 F7 I7 W4 W5 W6 W7",
    ],
    "zb_h2": [
        "F0 F1 F2 F3 F4 F5 F6 I0 W0 F7 I1 W1 I2 W2 I3 W3 I4 W4 I5 W5 I6 W6 I7 W7",
        "F0 F1 F2 F3 F4 I0 F5 I1 F6 I2 W0 F7 I3 W1 I4 W2 I5 W3 I6 W4 I7 W5 W6 W7",
        "F0 F1 F2 I0 F3 I1 F4 I2 F5 I3 F6 I4 W0 F7 I5 W1 I6 W2 I7 W3 W4 W5 W6 W7",
        "F0 I0 F1 I1 F2 I2 F3 I3 F4 I4 F5 I5 F6 I6 W0 F7 I7 W1 W2 W3 W4 W5 W6 W7",
    ],
    "zb_v": [
        "F0 F1 F2 F3 F4 F5 F6 f0 i0 w0 f1 i1 w1 f2 i2 w2 f3 i3 w3 F7 I0 W0 f4 i4 w4 I1 "
        "W1 f5 i5 w5 I2 W2 f6 i6 w6 "
        "I3 W3 f7 i7 w7 I4 W4 I5 W5 I6 W6 I7 W7",
        "F0 F1 F2 F3 F4 f0 F5 f1 i0 w0 f2 i1 w1 f3 i2 w2 F6 I0 W0 f4 i3 w3 F7 I1 W1 f5 "
        "i4 w4 I2 W2 f6 i5 w5 I3 W3 "
        "f7 i6 w6 I4 i7 I5 W4 I6 W5 I7 W6 w7 W7",
        "F0 F1 F2 f0 F3 f1 F4 f2 i0 w0 f3 i1 w1 F5 I0 W0 f4 i2 w2 F6 I1 W1 f5 i3 w3 F7 "
        "I2 W2 f6 i4 w4 I3 W3 f7 i5 "
        "w5 I4 i6 I5 i7 I6 W4 I7 W5 w6 w7 W6 W7",
        "F0 f0 F1 f1 F2 f2 F3 f3 i0 w0 F4 I0 W0 f4 i1 w1 F5 I1 W1 f5 i2 w2 F6 I2 W2 f6 "
        "i3 w3 F7 I3 W3 f7 i4 w4 I4 "
        "i5 I5 i6 I6 i7 I7 W4 w5 w6 w7 W5 W6 W7",
    ],
    "v_half": [
        "F0 F1 f0 F2 i0 w0 f1 F3 i1 w1 f2 F4 I0 i2 W0 f3 w2 F5 I1 i3 W1 f4 w3 F6 I2 i4 "
        "W2 f5 w4 F7 I3 i5 W3 f6 w5 "
        "I4 i6 W4 f7 w6 I5 i7 W5 w7 I6 W6 I7 W7",
        "F0 F1 f0 F2 f1 i0 w0 F3 f2 i1 w1 I0 F4 W0 f3 i2 w2 I1 F5 W1 f4 i3 w3 I2 F6 W2 "
        "f5 i4 w4 I3 F7 W3 f6 i5 w5 "
        "I4 W4 f7 i6 I5 w6 W5 i7 I6 w7 W6 I7 W7",
        "F0 f0 F1 f1 F2 i0 f2 w0 F3 I0 i1 W0 f3 w1 F4 I1 i2 W1 f4 w2 F5 I2 i3 W2 f5 w3 "
        "F6 I3 i4 W3 f6 w4 F7 I4 i5 "
        "W4 f7 w5 I5 i6 W5 w6 I6 i7 W6 w7 I7 W7",
        "F0 f0 F1 f1 F2 f2 i0 I0 w0 F3 W0 f3 i1 I1 w1 F4 W1 f4 i2 I2 w2 F5 W2 f5 i3 I3 "
        "w3 F6 W3 f6 i4 I4 w4 F7 W4 "
        "f7 i5 I5 w5 W5 i6 I6 w6 W6 i7 I7 w7 W7",
    ],
    "v_min": [
        "F0 F1 f0 i0 F2 w0 f1 i1 I0 w1 F3 W0 f2 i2 I1 w2 F4 W1 f3 i3 I2 w3 F5 W2 f4 i4 "
        "I3 w4 F6 W3 f5 i5 I4 w5 F7 "
        "W4 f6 i6 I5 w6 W5 f7 i7 I6 w7 W6 I7 W7",
        "F0 f0 F1 i0 w0 f1 F2 I0 i1 W0 w1 f2 F3 I1 i2 W1 w2 f3 F4 I2 i3 W2 w3 f4 F5 I3 "
        "i4 W3 w4 f5 F6 I4 i5 W4 w5 "
        "f6 F7 I5 i6 W5 w6 f7 I6 i7 W6 w7 I7 W7",
        "F0 f0 F1 i0 f1 w0 I0 F2 W0 i1 f2 w1 I1 F3 W1 i2 f3 w2 I2 F4 W2 i3 f4 w3 I3 F5 "
        "W3 i4 f5 w4 I4 F6 W4 i5 f6 "
        "w5 I5 F7 W5 i6 f7 w6 I6 W6 i7 w7 I7 W7",
        "F0 f0 F1 f1 i0 I0 w0 W0 F2 f2 i1 I1 w1 W1 F3 f3 i2 I2 w2 W2 F4 f4 i3 I3 w3 W3 "
        "F5 f5 i4 I4 w4 W4 F6 f6 i5 "
        "I5 w5 W5 F7 f7 i6 I6 w6 W6 i7 I7 w7 W7",
    ],
    "dualpipe_v": [
        "F0 F1 F2 F3 F4 F5 F6 f0 i0 w0 f1 i1 w1 f2 i2 w2 f3 F7 b3 f4 B0 b4 f5 B1 b5 f6 "
        "B2 b6 f7 B3 b7 I4 W4 I5 W5 "
        "I6 W6 I7 W7",
        "F0 F1 F2 F3 F4 f0 F5 f1 i0 w0 f2 i1 w1 f3 F6 b2 f4 B0 F7 b3 f5 B1 b4 f6 B2 b5 "
        "f7 B3 b6 B4 i7 I5 w7 I6 W5 "
        "I7 W6 W7",
        "F0 F1 F2 f0 F3 f1 F4 f2 i0 w0 f3 F5 b1 f4 B0 F6 b2 f5 B1 F7 b3 f6 B2 b4 f7 B3 "
        "b5 B4 b6 I5 i7 I6 W5 I7 w7 "
        "W6 W7",
        "F0 f0 F1 f1 F2 f2 F3 f3 F4 b0 f4 B0 F5 b1 f5 B1 F6 b2 f6 B2 F7 b3 f7 B3 b4 B4 "
        "b5 B5 i6 I6 i7 I7 w6 W6 w7 W7",
    ],
    "forward_only": ["F0 F1 F2 F3 F4 F5 F6 F7"] * 4,
}


@pytest.mark.quick
@pytest.mark.parametrize("name", ORDERS)
def test_order(name):
    rows = named(name, 4, 8).actions
    letters = [[a.kind if a.stage < 4 else a.kind.lower() for a in row] for row in rows]
    got = [
        " ".join(f"{x}{a.microbatch}" for x, a in zip(*both, strict=True))
        for both in zip(letters, rows, strict=True)
    ]
    assert got == ORDERS[name]
    assert set(ORDERS) == set(NAMES)


LOOPED = [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("name", NAMES)
def test_stage_to_device(name):
    v_shaped = name in ("zb_v", "v_half", "v_min", "dualpipe_v")
    stage_to_device = (
        [0, 1, 2, 3, 3, 2, 1, 0]
        if v_shaped
        else LOOPED
        if NAMES[name].per_device is None
        else [0, 1, 2, 3]
    )
    assert list(named(name, 4, 8).stage_to_device) == stage_to_device
    if NAMES[name].virtual:
        assert list(named(name, 4, 8, virtual=2).stage_to_device) == LOOPED


@pytest.mark.quick
@pytest.mark.parametrize("name", NAMES)
def test_kinds(name):
    kinds = {a.kind for row in named(name, 3, 7).actions for a in row}
    split = name.startswith(("zb", "v_"))
    expected = (
        "F"
        if name == "forward_only"
        else "FBIW"
        if name == "dualpipe_v"
        else "FIW"
        if split
        else "FB"
    )
    assert kinds == set(expected)


def drawn(schedule):
    """The table of a docstring: a column for an F, I or W, two for a B, `.` where
    idle.
    """
    timeline = simulate(schedule)
    prefix = schedule.stages > schedule.devices
    boxes = [
        (e, f"{e.action.stage if prefix else ''}{e.action.kind}{e.action.microbatch}")
        for e in timeline.events
    ]
    width = 1 + max(len(label) for _, label in boxes)
    table = [".".ljust(width) * int(timeline.makespan) for _ in range(timeline.devices)]
    for e, label in boxes:
        a, b = int(e.start) * width, int(e.end) * width
        box = label if b - a == width else label.ljust(b - a - 1, "-")
        table[e.device] = table[e.device][:a] + box.ljust(b - a) + table[e.device][b:]
    return [f"{d}: {line.rstrip()}" for d, line in enumerate(table)]


@pytest.mark.quick
@pytest.mark.parametrize("name", NAMES)
def test_drawn_as_in_the_docstring(name):
    generator = NAMES[name].generator
    doc = generator.__doc__ or ""
    (call,) = re.findall(r"`(\w+)\((\d+), (\d+)\)`:\n\n", doc)
    assert call[0] == generator.__name__
    rows = drawn(generator(int(call[1]), int(call[2])))
    # What is too wide goes on in a second block of rows.
    table = dict.fromkeys(range(len(rows)), "")
    for device, cells in re.findall(r"^ +(\d): (.+)$", doc, flags=re.MULTILINE):
        table[int(device)] += f"{cells} "
    assert [f"{device}: {cells}".split() for device, cells in table.items()] == [
        row.split() for row in rows
    ]


def test_names():
    for name, (_, per_device, virtual) in NAMES.items():
        assert named(name, 3, 5).name == name
        assert named(name, 3, 5).stages == 3 * (per_device or 2)
        assert named(name, 3, 5, virtual=per_device or 2) == named(name, 3, 5)
        if virtual:
            assert named(name, 3, 5, virtual=3).stages == 9
        else:
            with pytest.raises(
                ValueError,
                match=rf"`{name}` puts (one stage|2 stages) on each device, not 3",
            ):
                named(name, 3, 5, virtual=3)
    with pytest.raises(
        ValueError,
        match="no schedule is named 'pipedream'; there are gpipe, 1f1b, eager_1f1b, ",
    ):
        named("pipedream", 3, 5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [(0, 4), (4, 0), (-1, 2)])
def test_sizes_that_make_no_sense(name, bad):
    with pytest.raises(
        ValueError,
        match=rf"`{name}\(devices=.*\)`: (devices|microbatches) must be at least 1",
    ):
        named(name, *bad)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "bad", [(2.0, 4), (2, "4"), (True, 4), (2, True), (2, 4, 2.0), (2, 4, True)]
)
def test_sizes_of_the_wrong_type(name, bad):
    with pytest.raises(
        TypeError, match=rf"`{name}.*: (devices|microbatches|virtual) must be an int"
    ):
        named(name, *bad)


@pytest.mark.parametrize("name", [n for n in NAMES if NAMES[n].virtual])
def test_no_stage_on_a_device(name):
    with pytest.raises(ValueError, match=r"virtual=0\)`: virtual must be at least 1"):
        named(name, 2, 4, virtual=0)


def test_large_schedules_are_cheap():
    timeline = simulate(schedules.one_f_one_b(64, 512))
    assert len(timeline.events) == 2 * 64 * 512
