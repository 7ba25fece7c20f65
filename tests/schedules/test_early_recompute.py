"""Recomputations as actions of their own: never slower, and exact for 1F1B."""

import dataclasses
import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpipe import schedules
from fpipe.schedules import (
    NAMES,
    Action,
    Costs,
    Schedule,
    early_recompute,
    from_csv,
    named,
    simulate,
    zero_bubble,
)
from tests.helpers import raises


@functools.cache
def all_named(devices, microbatches):
    """The schedules with a name that can have these sizes."""
    found = []
    for name in NAMES:
        for virtual in (1, 2, 3):
            try:
                found.append(named(name, devices, microbatches, virtual))
            except ValueError:
                continue
    return found


def recomputing(costs, stages):
    """The costs of backwards that recompute, themselves."""
    of = lambda kind: [costs.of(Action(kind, s, 0)) for s in range(stages)]  # noqa: E731
    plus = {k: [a + b for a, b in zip(of(k), of("R"), strict=True)] for k in "BI"}
    return dataclasses.replace(costs, **plus)


def check(schedule, costs, ahead):
    """Never slower, the same order of everything else, no more sets than allowed."""
    found = early_recompute(schedule, costs, ahead=ahead)
    timeline = simulate(found, costs)
    late = simulate(schedule, recomputing(costs, schedule.stages))
    assert timeline.makespan <= late.makespan * (1 + 1e-9)
    for row, before in zip(found.actions, schedule.actions, strict=True):
        assert tuple(a for a in row if a.kind != "R") == before
        again = [a for a in row if a.kind == "R"]
        assert sorted(a[1:] for a in again) == sorted(
            a[1:] for a in before if a.kind in "BI"
        )
    assert max(timeline.peak_recomputed) <= 1 + ahead
    assert timeline.peak_live == simulate(schedule).peak_live
    assert from_csv(found.to_csv(), found.stage_to_device, found.name) == found
    return timeline


@pytest.mark.quick
@pytest.mark.parametrize("devices", range(1, 6))
@pytest.mark.parametrize("name", ["1f1b", "eager_1f1b", "gpipe"])
def test_the_idle_time_is_that_without_recomputation(name, devices):
    for microbatches in (1, 2, 5, 8):
        for f, r, b in ((1, 1, 2), (1, 2, 2), (2, 1, 3), (1, 0.5, 2)):
            costs = Costs(F=f, B=b, R=r)
            schedule = named(name, devices, microbatches)
            idle = simulate(early_recompute(schedule, costs), costs).idle
            assert idle == (pytest.approx((devices - 1) * (f + b)),) * devices
            late = dataclasses.replace(costs, B=b + r)
            assert simulate(schedule, late).idle[0] == pytest.approx(
                (devices - 1) * (f + b + r)
            )


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_never_slower_whatever_the_costs(data):
    devices, microbatches = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    schedule = data.draw(st.sampled_from(all_named(devices, microbatches)))
    one = st.one_of(st.integers(0, 4), st.floats(0, 5))
    several = st.lists(one, min_size=schedule.stages, max_size=schedule.stages)
    cost = st.one_of(one, several)
    costs = Costs(
        F=data.draw(cost),
        B=data.draw(st.one_of(st.none(), cost)),
        I=data.draw(cost),
        W=data.draw(cost),
        R=data.draw(st.one_of(st.none(), cost)),
        transfer=data.draw(one),
    )
    check(schedule, costs, data.draw(st.integers(0, 3)))


@pytest.mark.parametrize("name", NAMES)
def test_never_slower_for_any_schedule_with_a_name(name):
    for schedule in all_named(4, 9):
        if schedule.name == name:
            check(schedule, Costs(F=1.0, I=1.2, W=0.9, R=0.8, transfer=0.3), ahead=1)


def test_what_is_recomputed_in_a_gap_must_pay():
    """After a last stage that recomputes nothing there are gaps for others."""
    schedule = named("1f1b", 4, 8)
    some = [(s, i) for s in range(3) for i in range(8)]
    makespans = {}
    for ahead in (0, 1, 3):
        found = early_recompute(schedule, pairs=some, ahead=ahead)
        timeline = simulate(found)
        makespans[ahead] = timeline.makespan
        assert {a[1:] for row in found.actions for a in row if a.kind == "R"} == {*some}
        assert max(timeline.peak_recomputed) == (2 if ahead else 1), ahead
    assert makespans == {0: 39.0, 1: 38.0, 3: 38.0}
    # Where all recompute, no gap helps, and one set of residuals is enough.
    assert simulate(early_recompute(schedule)).peak_recomputed == (1, 1, 1, 1)


def test_a_search_for_given_costs():
    costs = Costs(F=1, I=1.1, W=0.8, transfer=0.2)
    check(zero_bubble(3, 5, costs, memory=2), costs, ahead=1)


@pytest.mark.quick
def test_residuals_are_held_from_their_recomputation_on():
    """A saved input of 1, residuals of 10."""
    row = ["F", "F", "R", "B", "R", "B"]
    rows = [[(kind, 0, i) for kind, i in zip(row, (0, 1, 0, 0, 1, 1), strict=True)]]
    costs = Costs(memory=1, memory_r=10)
    timeline = simulate(Schedule(rows), costs)
    assert timeline.peak_memory == (11.0,)
    assert (timeline.peak_live, timeline.peak_recomputed) == ((2,), (1,))
    assert simulate(Schedule(rows), Costs(memory=3)).peak_memory == (6.0,)
    both = [[*rows[0][:3], rows[0][4], rows[0][3], rows[0][5]]]
    timeline = simulate(Schedule(both), costs)
    assert (timeline.peak_memory, timeline.peak_recomputed) == ((20.0,), (2,))


def test_what_is_refused():
    schedule = named("1f1b", 2, 2)
    early = early_recompute(schedule)
    with raises(
        ValueError,
        "`early_recompute(schedule)`: the schedule '1f1b, early recomputation' has R "
        "already",
    ):
        early_recompute(early)
    for wrong, told in (((2, 0), "(2, 0)"), (0, "0"), ((0, 2), "(0, 2)")):
        with raises(
            ValueError,
            "`early_recompute(pairs=...)`: the schedule '1f1b' has no backward of a "
            f"stage and microbatch {told}",
        ):
            early_recompute(schedule, pairs=[wrong])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="ahead must be at least 0"):
        early_recompute(schedule, ahead=-1)
    with pytest.raises(TypeError, match="a Schedule is needed, got '1f1b'"):
        early_recompute("1f1b")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="each stage is needed, 2 in all, got 3"):
        early_recompute(schedule, Costs(F=[1, 2, 3]))


def test_where_there_is_nothing_to_recompute():
    schedule = schedules.forward_only(2, 3)
    assert early_recompute(schedule).actions == schedule.actions
    assert (
        early_recompute(named("zb_v", 2, 4), pairs=[]).actions
        == named("zb_v", 2, 4).actions
    )
