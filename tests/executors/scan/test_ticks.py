"""Ticks, wires and slots: pure data."""

import itertools
import random
from collections import Counter

import pytest

from fpipe._executors.scan.buffers import edge_colors, slots
from fpipe._executors.scan.ticks import (
    FORWARD_THEN_BACKWARD,
    ONE_ACTION,
    cheapest,
    lock_step,
)
from fpipe.schedules import NAMES, Action, Costs, early_recompute, named


def schedule_of(name, devices, m):
    return named(name, devices, m, None)


# D=4, m=16, F=1, B=2, I=W=1; interleaved with two stages per device and these costs per
# stage.
LOCK_STEP = {
    "gpipe": (57, 57),
    "1f1b": (72, 90),
    "eager_1f1b": (72, 57),
    "zb_h1": (51, 69),
    "interleaved_1f1b": (132, 105),
}


@pytest.mark.parametrize("name", LOCK_STEP)
def test_what_both_forms_cost(name):
    schedule = schedule_of(name, 4, 16)
    costs = Costs(F=1, B=2, I=1, W=1)
    both = tuple(
        lock_step(schedule.actions, form).cost(costs)
        for form in (ONE_ACTION, FORWARD_THEN_BACKWARD)
    )
    assert both == LOCK_STEP[name]
    assert cheapest(schedule.actions, costs).cost(costs) == min(both)


def test_a_recomputation_has_a_phase_between_forwards_and_backwards():
    schedule = early_recompute(schedule_of("eager_1f1b", 2, 3))
    ticks = cheapest(schedule.actions, Costs())
    drawn = [
        [" ".join(str(a or "-") for a in phase) for phase in row] for row in ticks.rows
    ]
    assert ticks.phases == ("F", "R", "BIW")
    # Of each phase devices 0 and 1.
    assert drawn == [
        ["F(0,0) -", "- -", "- -"],
        ["F(0,1) F(1,0)", "- R(1,0)", "- B(1,0)"],
        ["F(0,2) F(1,1)", "R(0,0) R(1,1)", "B(0,0) B(1,1)"],
        ["- F(1,2)", "R(0,1) R(1,2)", "B(0,1) B(1,2)"],
        ["- -", "R(0,2) -", "B(0,2) -"],
    ]


@pytest.mark.quick
@pytest.mark.parametrize("form", [ONE_ACTION, FORWARD_THEN_BACKWARD])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "forward_only"])
def test_every_action_runs_once_in_order_after_what_it_needs(name, form):
    for devices, m in [(1, 1), (2, 4), (3, 7), (4, 8)]:
        schedule = schedule_of(name, devices, m)
        ticks = lock_step(schedule.actions, form)
        for d, row in enumerate(schedule.actions):
            ran = [phase[d] for tick in ticks.rows for phase in tick if phase[d]]
            assert ran == list(row)
        where = ticks.positions()
        for tick in ticks.rows:
            for kinds, phase in zip(form, tick, strict=True):
                assert all(a.kind in kinds for a in phase if a)
        split = {
            a.microbatch
            for row in schedule.actions
            for a in row
            if a.kind == "I" and a.stage == 0
        }
        for (kind, s, i), at in where.items():
            if kind == "F" and s:
                assert where[Action("F", s - 1, i)] < at
            if kind in "BI" and s + 1 < schedule.stages:
                later = [
                    at
                    for a, at in where.items()
                    if a.kind in "BI" and a[1:] == (s + 1, i)
                ]
                assert later[0] < at
            if kind in "BI":
                assert where[Action("F", s, i)] < at
            if kind == "W":
                assert where[Action("I", s, i)] < at
        assert split or not any(
            a.kind == "W" and a.stage == 0 for row in schedule.actions for a in row
        )


def test_backwards_alone_follow_what_is_done():
    schedule = named("gpipe", 3, 4)
    rows = [[a for a in row if a.kind == "B"] for row in schedule.actions]
    ticks = cheapest(rows, Costs())
    assert ticks.phases == ONE_ACTION
    assert len(ticks.rows) == 4 + 2
    assert (
        ticks.positions(10)[Action("B", 2, 0)]
        == min(ticks.positions(10).values())
        == 10
    )


def test_edges_get_the_fewest_colors():
    rng = random.Random(0)
    for _ in range(500):
        n = rng.randint(1, 6)
        edges = [
            (rng.randrange(n), rng.randrange(n)) for _ in range(rng.randint(0, 15))
        ]
        colors = edge_colors(edges)
        sources = {(a, c) for (a, _), c in zip(edges, colors, strict=True)}
        targets = {(b, c) for (_, b), c in zip(edges, colors, strict=True)}
        assert len(sources) == len(targets) == len(edges)
        degree = max(
            [
                *Counter(a for a, _ in edges).values(),
                *Counter(b for _, b in edges).values(),
            ],
            default=0,
        )
        assert max(colors, default=-1) + 1 == degree


def test_a_ring_has_one_color():
    assert edge_colors([(d, (d + 1) % 5) for d in range(5)]) == [0] * 5


def test_slots_are_the_fewest():
    rng = random.Random(1)
    for _ in range(300):
        intervals = [
            (a, a + rng.randrange(6), n)
            for n in range(rng.randint(0, 12))
            for a in [rng.randrange(20)]
        ]
        where, count = slots(intervals)
        for (a, b, k), (c, d, n) in itertools.combinations(intervals, 2):
            assert where[k] != where[n] or b < c or d < a
        assert count == max(
            (sum(a <= t <= b for a, b, _ in intervals) for t in range(30)), default=0
        )
