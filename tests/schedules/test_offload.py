"""Copies to the host under a memory limit: it is kept, and nothing else changes."""

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpipe.schedules import (
    NAMES,
    Action,
    Costs,
    Schedule,
    early_recompute,
    from_csv,
    named,
    offload,
    simulate,
)
from tests.helpers import raises
from tests.schedules.test_early_recompute import all_named

SMALLEST = re.compile(r"all devices: (.*)$")


def smallest(schedule, costs):
    """The limits that are just in reach, as the message says them."""
    with pytest.raises(ValueError, match="whatever goes to the host") as error:
        offload(schedule, memory=0, costs=costs)
    found = SMALLEST.search(str(error.value))
    assert found
    return [float(number) for number in found[1].split(", ")]


def copies(schedule):
    """The pairs that go to the host."""
    return {a[1:] for row in schedule.actions for a in row if a.kind == "O"}


def check(schedule, limits, costs):
    found = offload(schedule, memory=limits, costs=costs)
    for row, before in zip(found.actions, schedule.actions, strict=True):
        assert tuple(a for a in row if a.kind not in "OL") == before
    assert from_csv(found.to_csv(), found.stage_to_device, found.name) == found
    # The limit is kept however slow copies are; and free ones cost no time.
    for factor in (0.0, 1.0, 7.0):
        slower = dataclasses.replace(costs, offload=factor)
        peaks = simulate(found, slower).peak_memory
        assert all(a <= b + 1e-9 for a, b in zip(peaks, limits, strict=True))
    free = dataclasses.replace(costs, offload=0.0)
    assert simulate(found, free).makespan == simulate(schedule, free).makespan
    return found


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_limit_is_kept_and_nothing_else_changes(data):
    devices, microbatches = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    schedule = data.draw(st.sampled_from(all_named(devices, microbatches)))
    if not schedule.backwards:
        return
    if data.draw(st.booleans()):
        schedule = early_recompute(schedule)
    one = st.floats(0.1, 3)
    several = st.lists(one, min_size=schedule.stages, max_size=schedule.stages)
    costs = Costs(
        F=data.draw(one),
        memory=data.draw(st.one_of(st.just(1), several)),
        memory_w=data.draw(st.one_of(st.none(), several)),
        memory_r=data.draw(st.one_of(st.none(), several)),
        offload=data.draw(st.one_of(st.just(0), several)),
    )
    share = data.draw(st.floats(0, 1))
    least = smallest(schedule, costs)
    limits = [
        # The message rounds what it says.
        a * 1.0001 + share * max(b - a, 0)
        for a, b in zip(least, simulate(schedule, costs).peak_memory, strict=True)
    ]
    check(schedule, limits, costs)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "forward_only"])
def test_every_limit_in_reach_of_any_schedule_with_a_name(name):
    schedule = named(name, 3, 6)
    costs = Costs(offload=0.5)
    least = smallest(schedule, costs)
    peaks = simulate(schedule).peak_live
    for limit in range(int(max(least)), max(peaks) + 2):
        limits = [float(limit)] * 3
        found = check(schedule, limits, costs)
        if limit >= max(peaks):
            assert found is schedule
    with pytest.raises(ValueError, match="whatever goes to the host"):
        offload(schedule, memory=max(least) - 0.5, costs=costs)


@pytest.mark.quick
def test_no_more_go_than_must():
    for m in range(1, 8):
        schedule = named("gpipe", 1, m)
        for limit in range(1, m + 2):
            go = copies(offload(schedule, memory=limit))
            # With room for one, the last to be made is not the first to be used.
            most = m if limit == 1 and m > 1 else m - limit
            assert len(go) == max(most, 0), (m, limit)


@pytest.mark.quick
def test_those_go_that_wait_longest():
    order = [("F", i) for i in range(6)] + [("B", i) for i in reversed(range(6))]
    schedule = Schedule([[(kind, 0, i) for kind, i in order]])
    assert copies(offload(schedule, memory=3)) == {(0, 0), (0, 1), (0, 2)}
    # Where all wait as long, those that were made last when there was no room.
    assert copies(offload(named("gpipe", 1, 6), memory=3)) == {(0, 2), (0, 3), (0, 4)}


# The longest copy, in forwards of a device, for which half the peak costs nothing.
FREE = {
    "gpipe": 1.0,
    "eager_1f1b": 0.5,
    "interleaved_1f1b": 1.0,
    "looped_bfs": 1.0,
    "v_half": 0.5,
}


@pytest.mark.parametrize("name", FREE)
def test_half_of_what_is_held_goes_for_nothing(name):
    """As PipeOffload claims, where a copy takes no longer than that."""
    schedule = named(name, 4, 12)
    v = schedule.stages // 4
    costs = Costs(F=1 / v, I=1 / v, W=1 / v)
    plain = simulate(schedule, costs)
    half = [(peak + 1) // 2 for peak in plain.peak_live]
    spans = {}
    for copy in (0.25, 0.5, 1.0, 4.0):
        slow = dataclasses.replace(costs, offload=copy / v)
        timeline = simulate(offload(schedule, memory=half, costs=slow), slow)
        assert all(a <= b for a, b in zip(timeline.peak_live, half, strict=True))
        spans[copy] = timeline.makespan / plain.makespan
    assert all(spans[c] == pytest.approx(1.0) for c in spans if c <= FREE[name])
    assert spans[4.0] > 1.1


@pytest.mark.quick
def test_recomputed_inputs_go_too():
    """A saved input is copied back before its recomputation, in either order."""
    schedule = named("eager_1f1b", 3, 6)
    costs = Costs(memory=1, memory_r=4, offload=0.5)
    one = offload(early_recompute(schedule, costs), memory=6, costs=costs)
    other = early_recompute(offload(schedule, memory=2, costs=costs), costs)
    for found in (one, other):
        assert copies(found)
        assert max(simulate(found, costs).peak_memory) <= 6
    for row in other.actions:
        for action in row:
            back = Action("L", action.stage, action.microbatch)
            if action.kind == "R" and back in row:
                assert row.index(back) < row.index(action)


def test_what_is_refused():
    schedule = named("1f1b", 2, 4)
    found = offload(schedule, memory=1)
    with raises(
        ValueError, "`offload(schedule)`: the schedule '1f1b, offload' has O already"
    ):
        offload(found, memory=1)
    with raises(
        ValueError,
        "`offload(memory=2)`: device 2 holds at least 3, whatever goes to the host; "
        "all devices: 1, 2, 3",
    ):
        offload(named("zb_h1", 3, 4), memory=2)
    with raises(
        ValueError,
        "`offload(memory=[1])`: a number for each device is needed, 2 in all, got 1",
    ):
        offload(schedule, memory=[1])
    with pytest.raises(ValueError, match="finite and not negative"):
        offload(schedule, memory=-1)
    with pytest.raises(TypeError, match="a Schedule is needed"):
        offload("1f1b", memory=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="each stage is needed, 2 in all, got 3"):
        offload(schedule, memory=1, costs=Costs(offload=[1, 2, 3]))
    # Forwards alone hold what they leave for good.
    forwards = named("forward_only", 2, 3)
    assert offload(forwards, memory=3) is forwards
    with pytest.raises(ValueError, match="device 0 holds at least 3"):
        offload(forwards, memory=2)
