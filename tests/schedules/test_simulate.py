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
from fpipe.schedules._action import KINDS as ALL_KINDS
from fpipe.schedules._simulate import simulate_fused

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
    offloaded=lambda s, i: False,
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
        copied = [pair for pair in pairs if offloaded(*pair)]
        todo += [
            action for p in copied for action in (Action("O", *p), Action("L", *p))
        ]
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
    if kind in "OL":
        return [[Action("F" if kind == "O" else "O", s, i)]]
    later = [[Action("B", s + 1, i), Action("I", s + 1, i)]] if s + 1 < stages else []
    own = [[Action(k, s, i)] for k in ("F", "L", "R") if k != kind]
    own = [need for need in own if need[0] in everything]
    return own if kind == "R" else [*own, *later]


def number(cost, stage):
    return cost[stage] if isinstance(cost, tuple) else cost


def launched(schedule, costs):
    """When each action has been launched: on its thread one after the other, each when
    what it needs has been launched.
    """
    order = []
    for device, action, *_ in simulate(schedule).events:
        if action.kind not in "OL":
            row = schedule.actions[device]
            after = row[row.index(action) + 1 :]
            # A copy right after what stands before it in its row.
            copies = itertools.takewhile(lambda a: a.kind in "OL", after)
            order += [(device, a) for a in (action, *copies)]
    ends, free_at, stages = {}, {}, schedule.stages
    everything = {action for _, action in order}
    for device, action in order:
        thread = 0 if costs.launchers == "one" else device
        ways = itertools.chain(*needs(action, stages, everything))
        needed = max((ends[a] for a in ways if a in everything), default=0.0)
        # One addition after the other: a product rounds in another way, and so does
        # `sum` from Python 3.12 on.
        free_at[thread] = max(free_at.get(thread, 0.0), needed) + costs.launch
        ends[action] = free_at[thread]
    return ends


def oracle(schedule, costs):
    """Start and end of every action: raise the starts until nothing changes any
    more.
    """
    stage_to_device, stages = schedule.stage_to_device, schedule.stages
    actions = [a for row in schedule.actions for a in row]
    took = {
        a: number(getattr(costs, "offload" if a.kind in "OL" else a.kind), a.stage)
        for a in actions
        if a.kind in "OL" or getattr(costs, a.kind) is not None
    }
    took |= {
        a: number(costs.F, a.stage) for a in actions if a.kind == "R" and a not in took
    }
    took |= {
        a: number(costs.I, a.stage) + number(costs.W, a.stage)
        for a in actions
        if a not in took
    }
    arcs = [arc for row in schedule.actions for arc in arcs_of_row(row)]
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


def arcs_of_row(row):
    """What of a row waits for what: a device and its two copy engines."""
    arcs, last, device = [], {}, []
    for a in row:
        # An `O` starts whatever the device does, which then waits for it.
        if a.kind != "O":
            arcs += [(x, a, 0.0) for x in device]
        if a.kind in "OL":
            arcs += [(last[a.kind], a, 0.0)] if a.kind in last else []
            last[a.kind] = a
        device = device if a.kind == "L" else [*device, a] if a.kind == "O" else [a]
    return arcs


def peaks_in_time(schedule, costs, times):
    """As `peaks`, from when things run, where each takes some time."""
    memory, live = [], []
    for row in schedule.actions:
        held = []
        for kind, s, i in row:
            if kind != "F":
                continue
            at = {k: times[Action(k, s, i)] for k in ALL_KINDS if (k, s, i) in row}
            back = at.get("B") or at.get("I")
            used = at["R"][0] if "R" in at else back[1] if back else math.inf
            size = number(costs.memory, s)
            held.append((at["F"][0], at["O"][1] if "O" in at else used, size))
            if "L" in at:
                held.append((at["L"][0], used, size))
            again = costs.memory if costs.memory_r is None else costs.memory_r
            if "R" in at:
                assert back
                held.append((used, back[1], number(again, s)))
            later = costs.memory if costs.memory_w is None else costs.memory_w
            if "W" in at:
                held.append((at["I"][1], at["W"][1], number(later, s)))
        sums = [
            [size for start, end, size in held if start <= t < end] for t, *_ in held
        ]
        memory.append(max(map(sum, sums)))
        live.append(max(map(len, sums)))
    return memory, tuple(live)


def peaks(schedule, costs):
    """The most memory and the most pairs held on each device, replayed from the
    device's row alone.
    """
    memory, live, recomputed = [], [], []
    own = {"I": costs.memory_w, "R": costs.memory_r}
    for row in schedule.actions:
        held, most, most_live, most_sets, sets = {}, 0.0, 0, 0, set()
        for kind, s, i in row:
            if kind in "BWO":
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
    if any(a.kind == "O" for a in expected):
        # What a device holds is never more than its row says.
        assert all(a <= b for a, b in zip(timeline.peak_live, live, strict=True))
        pairs = zip(timeline.peak_memory, memory, strict=True)
        assert all(a <= b + 1e-9 for a, b in pairs)
        # At one moment, what a recomputation gives back and what a copy takes have no
        # order.
        if costs.memory_r is None and all(a < b for a, b in expected.values()):
            memory, live = peaks_in_time(schedule, costs, expected)
        else:
            memory, live = timeline.peak_memory, timeline.peak_live
    assert timeline.peak_live == live
    assert timeline.peak_recomputed == recomputed
    assert timeline.peak_memory == pytest.approx(memory)
    for d, row in enumerate(schedule.actions):
        ran = [e.action for e in timeline.events if e.device == d]
        for kinds in ("FRBIW", "O", "L"):
            assert [a for a in ran if a.kind in kinds] == [
                a for a in row if a.kind in kinds
            ]
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
        sum(
            e.end - e.start
            for e in timeline.events
            if e.device == d and e.action.kind not in "OL"
        )
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
    away = draw(st.sampled_from([0.0, 0.3, 0.8]))
    schedule = some_schedule(
        devices,
        microbatches,
        placement,
        split,
        draw(st.booleans()),
        random.randrange,
        recomputed=lambda s, i: random.random() < share,
        offloaded=lambda s, i: random.random() < away,
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
        offload=draw(cost),
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


PER_STAGE = ["F", "B", "I", "W", "memory", "memory_w", "R", "memory_r", "offload"]
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
        ValueError,
        match=rf"`Costs\({field}=.*: a number for each stage is needed, 2 in all, got "
        f"{len(numbers)}$",
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
    """24 units of work a device, in `m` pieces; 16 pieces take 64 to launch."""

    def makespan(m, launch):
        costs = Costs(F=8 / m, B=16 / m, launch=launch)
        return simulate(schedules.one_f_one_b(4, m), costs).makespan

    assert min((4, 8, 16, 32, 64), key=lambda m: makespan(m, 0.0)) == 64
    assert min((4, 8, 16, 32, 64), key=lambda m: makespan(m, 0.5)) == 8


@pytest.mark.quick
def test_copies_by_hand():
    """The first copy starts after its forward, the second after the first; the third
    forward waits for the first copy, the backward for the copy back.
    """
    row = ["F0", "F1", "O0", "F2", "O1", "L0", "B2", "B0", "L1", "B1"]
    schedule = Schedule([[(a[0], 0, int(a[1])) for a in row]])
    timeline = simulate(schedule, Costs(F=1, B=2, offload=3))
    assert {str(e.action): (e.start, e.end) for e in timeline.events} == {
        "F(0,0)": (0, 1),
        "F(0,1)": (1, 2),
        "O(0,0)": (1, 4),
        "F(0,2)": (4, 5),
        "O(0,1)": (4, 7),
        "L(0,0)": (7, 10),
        "B(0,2)": (7, 9),
        "B(0,0)": (10, 12),
        "L(0,1)": (12, 15),
        "B(0,1)": (15, 17),
    }
    assert (timeline.makespan, timeline.idle) == (17.0, (8.0,))
    # F(0,0) and F(0,1); F(0,1) and F(0,2); F(0,2) and what comes back; and so on.
    assert (timeline.peak_live, timeline.peak_memory) == ((2,), (2.0,))
    # Nothing is waited for where copies take no time.
    assert simulate(schedule, Costs(F=1, B=2)).makespan == 9.0


@pytest.mark.quick
def test_what_is_on_its_way_to_the_host_is_still_held():
    """F(0,2) starts while the first copy is under way, and before F(0,1) has ended its
    own; with fast copies the first has gone by then.
    """
    row = ["F0", "F1", "F2", "O0", "L0", "B1", "B2", "B0"]
    schedule = Schedule([[(a[0], 0, int(a[1])) for a in row]])
    for offload, live in ((3.0, 3), (0.5, 2)):
        timeline = simulate(schedule, Costs(F=1, B=2, offload=offload))
        away = next(e.end for e in timeline.events if e.action.kind == "O")
        assert away == 1.0 + offload
        # It comes back when F(0,2) has ended, and the third makes three again.
        back = next(e.start for e in timeline.events if e.action.kind == "L")
        assert back == max(3.0, away)
        assert timeline.peak_live == (3,)
        events = tuple(e for e in timeline.events if e.action.kind != "L")
        assert dataclasses.replace(timeline, events=events).peak_live == (live,)


def test_actions_of_one_program_are_launched_once():
    schedule = schedules.one_f_one_b(2, 2)
    pairs = [(Action("F", 1, i), Action("B", 1, i)) for i in range(2)]
    costs = Costs(launch=2)
    apart, fused = simulate(schedule, costs), simulate_fused(schedule, costs, pairs)
    launched = [launch.action for launch in apart.launches]
    after = [second for _, second in pairs]
    assert [launch.action for launch in fused.launches] == [
        action for action in launched if action not in after
    ]
    assert fused.launches[-1].end == apart.launches[-1].end - 4
    # A program starts when it is launched, and its second action right after.
    at = {event.action: event for event in fused.events}
    for first, second in pairs:
        assert at[second].start == at[first].end
    assert fused.makespan < apart.makespan
    # Where launches take no time, nothing changes.
    assert simulate_fused(schedule, Costs(), pairs) == simulate(schedule)
