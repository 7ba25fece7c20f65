"""Simulated time and memory: against a naive oracle, and by hand."""

import dataclasses
import itertools
import math
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpipe import schedules
from fpipe.schedules import Action, Costs, Event, Kind, Schedule, Timeline, simulate

PLACEMENTS = {
    "one": lambda d: range(d),
    "looped": lambda d: [*range(d)] * 2,
    "v": lambda d: [*range(d), *range(d)[::-1]],
}


KINDS: dict[bool, tuple[Kind, ...]] = {False: ("B",), True: ("I", "W")}


def some_schedule(
    devices,
    microbatches,
    placement="one",
    split="none",
    backwards=True,
    choose=lambda n: 0,
    recomputed=lambda s, i: False,
):
    """A valid schedule: of the actions that could run next, `choose` picks one until
    none is left.
    """
    stage_to_device = tuple(PLACEMENTS[placement](devices))
    stages = len(stage_to_device)
    is_split = {
        "none": lambda s, i: False,
        "all": lambda s, i: True,
        "some": lambda s, i: (s + i) % 3 == 0,
    }[split]
    pairs = list(itertools.product(range(stages), range(microbatches)))
    todo = [Action("F", s, i) for s, i in pairs]
    if backwards:
        todo += [Action(k, s, i) for s, i in pairs for k in KINDS[is_split(s, i)]]
        todo += [Action("R", s, i) for s, i in pairs if recomputed(s, i)]
    everything = set(todo)
    rows, done = [[] for _ in range(devices)], set()
    while todo:
        runnable = [
            a
            for a in todo
            if all(any(n in done for n in ns) for ns in needs(a, stages, everything))
        ]
        a = runnable[choose(len(runnable))]
        rows[stage_to_device[a.stage]].append(a)
        todo.remove(a)
        done.add(a)
    return Schedule(rows, stage_to_device)


def needs(a, stages, everything):
    """For each thing that `a` waits for, the actions that would provide it."""
    kind, s, i = a
    if kind == "W":
        return [[Action("I", s, i)]]
    if kind == "F":
        return [[Action("F", s - 1, i)]] if s else []
    if kind == "R":
        return [[Action("F", s, i)]]
    later = [[Action("B", s + 1, i), Action("I", s + 1, i)]] if s + 1 < stages else []
    own = [[Action("F", s, i)], [Action("R", s, i)]]
    return [*(need for need in own if need[0] in everything), *later]


def number(cost, stage):
    return cost[stage] if isinstance(cost, tuple) else cost


def launched(schedule, costs):
    """When each action has been launched: on its thread one after the other."""
    order = [(e.device, e.action) for e in simulate(schedule).events]
    ends, counts = {}, {}
    for device, action in order:
        thread = 0 if costs.launchers == "one" else device
        counts[thread] = counts.get(thread, 0) + 1
        # A sum and no product: it rounds in the same way.
        ends[action] = sum([costs.launch] * counts[thread])
    return ends


def oracle(schedule, costs):
    """Start and end of every action: raise the starts until nothing changes any
    more.
    """
    stage_to_device, stages = schedule.stage_to_device, schedule.stages
    actions = [a for row in schedule.actions for a in row]
    took = {
        a: number(getattr(costs, a.kind), a.stage)
        for a in actions
        if getattr(costs, a.kind) is not None
    }
    took |= {
        a: number(costs.F, a.stage) for a in actions if a.kind == "R" and a not in took
    }
    took |= {
        a: number(costs.I, a.stage) + number(costs.W, a.stage)
        for a in actions
        if a not in took
    }
    arcs = [(x, y, 0.0) for row in schedule.actions for x, y in itertools.pairwise(row)]
    for y in actions:
        others = [x for x in itertools.chain(*needs(y, stages, took)) if x in took]
        arcs += [
            (
                x,
                y,
                costs.transfer
                if stage_to_device[x.stage] != stage_to_device[y.stage]
                else 0.0,
            )
            for x in others
        ]
    start = launched(schedule, costs)
    changed = True
    while changed:
        changed = False
        for x, y, lag in arcs:
            if start[x] + took[x] + lag > start[y]:
                start[y] = start[x] + took[x] + lag
                changed = True
    return {a: (start[a], start[a] + took[a]) for a in actions}


def peaks(schedule, costs):
    """The most memory and the most pairs held on each device, replayed from the
    device's row alone.
    """
    memory, live, recomputed = [], [], []
    own = {"I": costs.memory_w, "R": costs.memory_r}
    for row in schedule.actions:
        held, most, most_live, most_sets, sets = {}, 0.0, 0, 0, set()
        for kind, s, i in row:
            if kind in "BW":
                del held[s, i]
            else:
                cost = own.get(kind)
                held[s, i] = number(costs.memory if cost is None else cost, s)
            sets = sets | {(s, i)} if kind == "R" else sets - {(s, i)}
            most, most_live = max(most, sum(held.values())), max(most_live, len(held))
            most_sets = max(most_sets, len(sets))
        memory.append(most)
        live.append(most_live)
        recomputed.append(most_sets)
    return memory, tuple(live), tuple(recomputed)


def check(schedule, costs):
    timeline = simulate(schedule, costs)
    expected = oracle(schedule, costs)
    assert {e.action: (e.start, e.end) for e in timeline.events} == expected
    assert len(timeline.events) == len(expected)
    assert timeline.makespan == max(end for _, end in expected.values())
    memory, live, recomputed = peaks(schedule, costs)
    assert timeline.peak_live == live
    assert timeline.peak_recomputed == recomputed
    assert timeline.peak_memory == pytest.approx(memory)
    for d, row in enumerate(schedule.actions):
        assert tuple(e.action for e in timeline.events if e.device == d) == row
    # In an order in which they can run, whatever takes no time.
    done = set()
    for e in timeline.events:
        assert all(
            any(n in done for n in ns)
            for ns in needs(e.action, schedule.stages, expected)
        )
        done.add(e.action)
    assert [e.start for e in timeline.events] == sorted(
        e.start for e in timeline.events
    )
    work = [
        sum(e.end - e.start for e in timeline.events if e.device == d)
        for d in range(schedule.devices)
    ]
    assert timeline.idle == pytest.approx([timeline.makespan - w for w in work])
    assert timeline.bubble == pytest.approx(
        1 - sum(work) / (timeline.makespan * schedule.devices or 1), abs=1e-9
    ) or (timeline.makespan == 0)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("split", ["none", "all", "some"])
@pytest.mark.parametrize("transfer", [0.0, 0.3])
def test_agrees_with_the_oracle_on_a_grid(placement, split, transfer):
    for devices, microbatches, backwards in itertools.product(
        (1, 2, 3), (1, 2, 4), (False, True)
    ):
        for choose in (lambda n: 0, lambda n: n - 1, lambda n: n // 2):
            schedule = some_schedule(
                devices, microbatches, placement, split, backwards, choose
            )
            stages = range(schedule.stages)
            check(schedule, Costs(transfer=transfer))
            check(
                schedule,
                Costs(
                    F=[1.0 + s for s in stages],
                    B=1.7,
                    I=0.7,
                    W=[0.4 * s for s in stages],
                    memory=0.1,
                ),
            )
            check(
                schedule,
                Costs(
                    F=0.0,
                    B=0.0,
                    I=0.0,
                    W=0.0,
                    transfer=transfer,
                    memory_w=[0.5 + s for s in stages],
                ),
            )


@st.composite
def schedules_and_costs(draw):
    devices, microbatches = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    placement, split = (
        draw(st.sampled_from(list(PLACEMENTS))),
        draw(st.sampled_from(["none", "all", "some"])),
    )
    random = draw(st.randoms(use_true_random=False))
    share = draw(st.sampled_from([0.0, 0.5, 1.0]))
    schedule = some_schedule(
        devices,
        microbatches,
        placement,
        split,
        draw(st.booleans()),
        random.randrange,
        recomputed=lambda s, i: random.random() < share,
    )
    one = st.one_of(st.just(0.0), st.integers(0, 3), st.floats(0, 5))
    cost = st.one_of(
        one, st.lists(one, min_size=schedule.stages, max_size=schedule.stages)
    )
    optional = st.one_of(st.none(), cost)
    return schedule, Costs(
        draw(cost),
        draw(optional),
        draw(cost),
        draw(cost),
        draw(one),
        draw(cost),
        draw(optional),
        R=draw(optional),
        memory_r=draw(optional),
        launch=draw(st.one_of(st.just(0.0), st.integers(1, 3), st.floats(0, 2))),
        launchers=draw(st.sampled_from(["one", "per_device"])),
    )


@settings(max_examples=150, deadline=None)
@given(schedules_and_costs())
def test_agrees_with_the_oracle_at_random(case):
    check(*case)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "eager_1f1b"])
def test_named_schedules_agree_with_the_oracle(name):
    for devices, microbatches in [(1, 3), (2, 5), (4, 6), (3, 2)]:
        check(
            schedules.named(name, devices, microbatches),
            Costs(F=[1.0 + d for d in range(devices)], transfer=0.25),
        )


@pytest.mark.quick
def test_memory_by_hand():
    # Held after each: F0 3, F1 6, I0 3 + 1, F2 7, W0 6, I1 3 + 1 (F2 and I1), ...
    row = [
        ("F", 0, 0),
        ("F", 0, 1),
        ("I", 0, 0),
        ("F", 0, 2),
        ("W", 0, 0),
        ("B", 0, 1),
        ("I", 0, 2),
        ("W", 0, 2),
    ]
    schedule = Schedule([row])
    assert simulate(schedule, Costs(memory=3.0, memory_w=1.0)).peak_memory == (7.0,)
    assert simulate(schedule, Costs(memory=3.0)).peak_memory == (9.0,)
    assert simulate(schedule, Costs(memory=3.0, memory_w=8.0)).peak_memory == (14.0,)
    assert simulate(schedule).peak_memory == simulate(schedule).peak_live == (3,)


def test_memory_does_not_drift():
    schedule = schedules.one_f_one_b(1, 1000)
    assert simulate(schedule, Costs(memory=0.1)).peak_memory == (0.1,)


def test_memory_of_a_recorded_run():
    """A timeline built from events: the memory is left out, or given."""
    events = (
        Event(0, Action("F", 0, 0), 5.0, 6.0),
        Event(0, Action("I", 0, 0), 6.0, 8.0),
    )
    events = (*events, Event(0, Action("W", 0, 0), 8.5, 9.0))
    assert Timeline(events, 1).peak_memory == (1.0,)
    timeline = Timeline(events, 1, memory=((2.0, 3.0),))
    assert (timeline.peak_memory, timeline.makespan, timeline.idle) == (
        (3.0,),
        4.0,
        (0.5,),
    )


def test_a_timeline_that_takes_no_time():
    """At one instant only the order of the events says what was held at once."""
    schedule = Schedule([[a for i in range(5) for a in (("F", 0, i), ("B", 0, i))]])
    timeline = simulate(schedule, Costs(F=0, B=0))
    assert (timeline.makespan, timeline.bubble, timeline.idle) == (0.0, 0.0, (0.0,))
    assert (timeline.peak_live, timeline.peak_memory) == ((1,), (1.0,))
    # Stage 0 on device 1: its forward comes first though device 0 has the lower number.
    schedule = Schedule(
        [[("F", 1, 0), ("B", 1, 0)], [("F", 0, 0), ("B", 0, 0)]], (1, 0)
    )
    events = simulate(schedule, Costs(F=0, B=0)).events
    assert [str(e.action) for e in events] == ["F(0,0)", "F(1,0)", "B(1,0)", "B(0,0)"]


def test_costs_are_values():
    given: Any = {
        "F": [1, 2],
        "memory": np.array([1, 2], np.int32),
        "W": np.float32(0.5),
    }
    costs = Costs(**given)
    assert costs.F == costs.memory == (1.0, 2.0)
    assert hash(costs) == hash(Costs(F=(1.0, 2.0), W=0.5, memory=(1, 2)))
    assert costs.of(Action("B", 1, 0)) == 1.5
    assert Costs(B=[5, 6]).of(Action("B", 1, 0)) == 6.0


PER_STAGE = ["F", "B", "I", "W", "memory", "memory_w", "R", "memory_r"]
FIELDS = [*PER_STAGE, "transfer", "launch"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("bad", [-1, -0.5, math.nan, math.inf, -math.inf])
def test_numbers_that_are_no_cost(field, bad):
    with pytest.raises(
        ValueError, match=rf"`Costs\({field}={bad}\)`: finite and not negative"
    ):
        Costs(**{field: bad})
    several: Any = {field: [1.0, bad]}
    if field in PER_STAGE:
        with pytest.raises(
            ValueError,
            match=rf"`Costs\({field}=\[1.0, {bad}\]\)`: finite and not negative",
        ):
            Costs(**several)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    "bad",
    ["1.0", True, {0: 1.0}, {1.0}, [[1.0]], ["1"], 1j, np.zeros(()), np.zeros((2, 2))],
)
def test_what_is_no_number(field, bad):
    with pytest.raises(TypeError, match=rf"(?s)`Costs\({field}=.*a number"):
        Costs(**{field: bad})


def test_one_number_where_none_or_several_may_not_be():
    with pytest.raises(TypeError, match=r"`Costs\(transfer=\[1.0, 1.0\]\)`: a number$"):
        Costs(transfer=[1.0, 1.0])  # pyright: ignore
    with pytest.raises(
        ValueError, match=r"`Costs\(launchers='two'\)`: one of .one., .per"
    ):
        Costs(launchers="two")
    with pytest.raises(TypeError, match=r"`Costs\(F=None\)`"):
        Costs(F=None)  # pyright: ignore


@pytest.mark.parametrize("field", PER_STAGE)
@pytest.mark.parametrize("numbers", [(), (1.0,), (1.0, 1.0, 1.0)])
def test_one_number_per_stage_exactly(field, numbers):
    with pytest.raises(
        ValueError, match=rf"`Costs\({field}=.*: {len(numbers)} numbers for 2 stages"
    ):
        simulate(schedules.gpipe(2, 2), Costs(**{field: numbers}))


def one_by_one(devices, m, kinds):
    """A long schedule: `devices` forwards, then a backward and a forward in turn."""
    return Schedule(
        [
            [("F", d, i) for i in range(devices)]
            + [
                a
                for i in range(m)
                for a in (*((k, d, i) for k in kinds), ("F", d, i + devices))
                if a[2] < m
            ]
            for d in range(devices)
        ]
    )


@pytest.mark.parametrize("kinds", ["B", "IW"])
def test_many_devices_and_microbatches(kinds):
    devices, m = 64, 512
    costs = Costs(F=1.0, W=[1.0] * devices, transfer=0.1)
    timeline = simulate(one_by_one(devices, m, kinds), costs)
    assert len(timeline.events) == (1 + len(kinds)) * devices * m
    assert max(timeline.peak_memory) == devices


@pytest.mark.parametrize("kinds", ["B", "IW"])
def test_work_grows_with_the_actions(kinds):
    """As many microbatches again run as many lines of Python again, and few more."""

    def lines(m):
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            count += event == "line"
            return trace

        schedule = one_by_one(16, m, kinds)
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            simulate(schedule, Costs(F=1.0, W=[1.0] * 16, transfer=0.1))
        finally:
            sys.settrace(before)
        return count

    more, as_many_again = lines(64) - lines(32), lines(96) - lines(64)
    assert as_many_again < 1.2 * more


SOME_NAMES = ["gpipe", "1f1b", "eager_1f1b", "zb_h1", "zb_v", "interleaved_1f1b"]


@pytest.mark.quick
@pytest.mark.parametrize("name", SOME_NAMES)
def test_where_the_host_is_the_bound_the_step_takes_as_long_as_its_launches(name):
    """Actions are short beside launches: each has ended before the next is launched."""
    schedule = schedules.named(name, 3, 6)
    actions = sum(map(len, schedule.actions))
    longest = max(map(len, schedule.actions))
    costs = {k: Costs(launch=10.0, launchers=k) for k in ("one", "per_device")}
    one, each = (simulate(schedule, costs[k]) for k in ("one", "per_device"))
    last = one.launches[-1].action
    assert one.makespan == actions * 10.0 + costs["one"].of(last)
    assert [launch.end for launch in one.launches] == [
        10.0 * (n + 1) for n in range(actions)
    ]
    assert one.threads == 1
    assert longest * 10.0 < each.makespan <= one.makespan
    assert each.threads == 3
    for timeline in (one, each):
        ends = {launch.action: launch.end for launch in timeline.launches}
        assert all(ends[event.action] <= event.start for event in timeline.events)


@pytest.mark.parametrize("name", SOME_NAMES)
def test_launches_that_cost_nothing_change_nothing(name):
    schedule = schedules.named(name, 3, 6)
    costs = Costs(F=1.0, I=1.2, W=0.7, transfer=0.2)
    plain = simulate(schedule, costs)
    for launchers in ("one", "per_device"):
        free = dataclasses.replace(costs, launch=0.0, launchers=launchers)
        assert simulate(schedule, free) == plain
        # And a longer launch never makes a step shorter.
        spans = [
            simulate(schedule, dataclasses.replace(free, launch=launch)).makespan
            for launch in (0.0, 0.05, 0.2, 0.5, 1.0, 3.0)
        ]
        assert spans == sorted(spans)
        assert spans[0] == plain.makespan


@pytest.mark.quick
def test_one_device_is_bound_by_its_host_or_by_its_work():
    """Of launches and actions one after the other, the longer ones are the sum."""
    schedule = schedules.one_f_one_b(1, 5)
    for launch in (0.25, 1.0, 4.0):
        costs = Costs(F=2.0, B=2.0, launch=launch)
        longer, shorter = max(launch, 2.0), min(launch, 2.0)
        assert simulate(schedule, costs).makespan == 10 * longer + shorter


def test_more_microbatches_do_not_help_where_the_host_is_the_bound():
    """24 units of work a device, in `m` pieces, of which 16 take 64 to launch."""

    def makespan(m, launch):
        costs = Costs(F=8 / m, B=16 / m, launch=launch)
        return simulate(schedules.one_f_one_b(4, m), costs).makespan

    assert min((4, 8, 16, 32, 64), key=lambda m: makespan(m, 0.0)) == 64
    assert min((4, 8, 16, 32, 64), key=lambda m: makespan(m, 0.5)) == 8
