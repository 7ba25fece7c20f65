"""Schedules as data: order, validation, simulated time."""

import pytest

from fpipe import schedules
from fpipe.schedules import Costs, simulate

GENERATORS = {"gpipe": schedules.gpipe, "1f1b": schedules.one_f_one_b, "eager_1f1b": schedules.eager_1f1b}


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize(("devices", "microbatches"), [(1, 1), (1, 3), (2, 8), (4, 8), (4, 2), (8, 16)])
def test_idle_time_and_peak(name, devices, microbatches):
    timeline = simulate(GENERATORS[name](devices, microbatches), Costs(F=1.0, B=2.0))
    d, m = devices, microbatches
    assert timeline.makespan == 3 * m + 3 * (d - 1)
    assert timeline.bubble == pytest.approx(3 * (d - 1) / timeline.makespan)
    peak = {
        "gpipe": [m] * d,
        "1f1b": [min(m, d - k) for k in range(d)],
        "eager_1f1b": [min(m, 2 * (d - 1 - k) + 1) for k in range(d)],
    }
    assert list(timeline.peak_live) == peak[name]


def test_order_of_1f1b_as_drawn():
    rows = [" ".join(f"{a.kind}{a.microbatch}" for a in row) for row in schedules.one_f_one_b(3, 4).actions]
    assert rows == ["F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"]


def test_order_of_gpipe_and_eager_as_drawn():
    rows = [" ".join(f"{a.kind}{a.microbatch}" for a in row) for row in schedules.gpipe(2, 3).actions]
    assert rows == ["F0 F1 F2 B0 B1 B2"] * 2
    rows = [" ".join(f"{a.kind}{a.microbatch}" for a in row) for row in schedules.eager_1f1b(3, 6).actions]
    assert rows == [
        "F0 F1 F2 F3 F4 B0 F5 B1 B2 B3 B4 B5",
        "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 B4 B5",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5",
    ]


@pytest.mark.parametrize("bad", [(0, 4), (4, 0), (-1, 2)])
def test_sizes_that_make_no_sense(bad):
    with pytest.raises(ValueError, match="is at least 1"):
        schedules.gpipe(*bad)


def test_large_schedules_are_cheap():
    timeline = simulate(schedules.one_f_one_b(64, 512))
    assert len(timeline.events) == 2 * 64 * 512
