"""Only schedules that can run exist: every other one is refused, for a reason that is
true.
"""

import collections
import copy
import dataclasses
import itertools
import pickle
import random
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpipe import schedules
from fpipe.schedules import Action, Kind, Schedule
from fpipe.schedules._action import KINDS
from fpipe.schedules._rules import (
    HELD_AFTER,
    NEEDS,
    OPTIONAL,
    Held,
    crossing_need,
    last_needs,
    needs,
)
from tests.helpers import raises

# --- the rules themselves ---

WHOLE: tuple[Kind, ...] = ("F", "B")
SPLIT: tuple[Kind, ...] = ("F", "I", "W")


def arrows(kinds):
    """`(action, what it needs)` of one microbatch on three stages, as in
    `_rules.py`.
    """
    present = {Action(k, s, 0) for k in kinds for s in range(3)}
    return {
        (f"{a.kind}{a.stage}", f"{n.kind}{n.stage}")
        for a in present
        for n in needs(a, present)
    }


@pytest.mark.parametrize("optional", ["", "R", "OL", "OLR"])
@pytest.mark.parametrize("backward", "BI")
def test_the_rules_are_those_of_the_drawing(backward, optional):
    kinds = (*(WHOLE if backward == "B" else SPLIT), *optional)
    drawn = {("F1", "F0"), ("F2", "F1")}
    drawn |= {(f"{backward}{s}", f"F{s}") for s in range(3)}
    for s in range(3):
        if "R" in optional:
            drawn |= {(f"R{s}", f"F{s}"), (f"{backward}{s}", f"R{s}")}
        if "L" in optional:
            drawn |= {(f"O{s}", f"F{s}"), (f"L{s}", f"O{s}")}
            drawn |= {(f"{backward}{s}", f"L{s}")}
        if optional == "OLR":
            drawn |= {(f"R{s}", f"L{s}")}
    drawn |= {(f"{backward}{s}", f"{backward}{s + 1}") for s in range(2)}
    if backward == "I":
        drawn |= {(f"W{s}", f"I{s}") for s in range(3)}
    assert arrows(kinds) == drawn


def test_a_stage_may_have_b_where_its_neighbour_has_i():
    b, i = Action("B", 1, 4), Action("I", 1, 4)
    for kind in ("B", "I"):
        for other in (b, i):
            assert needs(Action(kind, 0, 4), {other}) == [other]


def test_what_does_not_take_part_is_not_waited_for():
    assert needs(Action("F", 1, 0), {Action("F", 1, 0)}) == []
    backwards = {Action("B", s, 0) for s in range(2)}
    assert needs(Action("B", 0, 0), backwards) == [Action("B", 1, 0)]


def test_the_kinds_stand_in_an_order_in_which_they_may_run():
    for kind in KINDS:
        for need in NEEDS[kind]:
            if need.offset == 0:
                assert all(KINDS.index(k) < KINDS.index(kind) for k in need.kinds)
        assert crossing_need(kind) in (None, NEEDS[kind][-1])


def test_the_last_needs_are_those_of_the_docstring():
    table = {
        f"{of.kind}{of.stage}: {last and f'{last.kind}{last.stage}'}"
        for of, last in last_needs(2, SPLIT).items()
    }
    drawn = re.findall(r"[FIW]\d: \w+", last_needs.__doc__ or "")
    assert table == set(drawn)


def test_nothing_is_held_after_a_backward_and_something_after_a_forward():
    assert HELD_AFTER["F"] is not Held.NOTHING
    for kinds in (WHOLE, SPLIT):
        assert HELD_AFTER[kinds[-1]] is Held.NOTHING
    assert set(OPTIONAL) == set(KINDS) - {*WHOLE, *SPLIT}


# --- the legal schedules that are broken below: rows, and the device of each stage ---


def rows_of(schedule):
    return [list(row) for row in schedule.actions], schedule.stage_to_device


def parse(*lines):
    """`"0F1 0B1"` per device: stage, kind, microbatch."""
    return [
        [Action(t[1], int(t[0]), int(t[2])) for t in line.split()] for line in lines
    ]


LEGAL = {
    "gpipe": rows_of(schedules.gpipe(3, 3)),
    "1f1b": rows_of(schedules.one_f_one_b(3, 3)),
    "eager_1f1b": rows_of(schedules.eager_1f1b(3, 4)),
    "forwards": (parse("0F0 0F1", "1F0 1F1"), (0, 1)),
    "split": (parse("0F0 0F1 0I0 0W0 0I1 0W1", "1F0 1I0 1F1 1I1 1W0 1W1"), (0, 1)),
    "partly split": (
        parse("0F0 0F1 0B0 0I1 0W1", "1F0 1I0 1F1 1B1 1W0", "2F0 2B0 2F1 2I1 2W1"),
        (0, 1, 2),
    ),
    "looped": (
        parse("0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1", "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1"),
        (0, 1, 0, 1),
    ),
    "recomputed": (
        parse(
            "0F0 0F1 0R0 0B0 0R1 0I1 0W1",
            "1F0 1R0 1F1 1B0 1R1 1I1 1W1",
            "2F0 2B0 2F1 2R1 2I1 2W1",
        ),
        (0, 1, 2),
    ),
    "offloaded": (
        parse(
            "0F0 0F1 0O0 0F2 0O1 0L0 0B0 0L1 0I1 0W1 0B2",
            "1F0 1O0 1L0 1R0 1B0 1F1 1O1 1F2 1L1 1R1 1I1 1W1 1B2",
        ),
        (0, 1),
    ),
    "V": (
        parse(
            "0F0 0F1 3F0 3I0 3W0 3F1 3I1 0I0 0W0 0B1 3W1",
            "1F0 2F0 1F1 2F1 2B0 1B0 2I1 1I1 1W1 2W1",
        ),
        (0, 1, 1, 0),
    ),
}
each = pytest.mark.parametrize("name", LEGAL)

# --- the oracle: sweep over the devices and run whatever can run, until nothing does --


def run(rows, stages):
    """The actions that ever run, for rows that are complete."""
    everything = {tuple(a) for row in rows for a in row}
    queues, ran = [collections.deque(row) for row in rows], set()
    before = -1
    while before != len(ran):
        before = len(ran)
        for queue in queues:
            if queue and runnable(queue[0], ran, stages, everything):
                ran.add(tuple(queue.popleft()))
    return ran


def runnable(action, ran, stages, everything):
    kind, s, i = action
    if kind == "F":
        return s == 0 or ("F", s - 1, i) in ran
    if kind == "W":
        return ("I", s, i) in ran
    own = {(k, s, i) for k in before(kind)} & everything
    if kind in OPTIONAL:
        return own <= ran
    return own <= ran and (
        s + 1 == stages or ("B", s + 1, i) in ran or ("I", s + 1, i) in ran
    )


def before(kind):
    """The optional kinds, and `F`, that come before a kind on its stage."""
    order = "FOLR"
    return order[: order.index(kind)] if kind in order else order


def complete(rows, stage_to_device):
    counts = collections.Counter(tuple(a) for row in rows for a in row)
    m = 1 + max(i for _, _, i in counts)
    if (
        any(stage_to_device[a[1]] != d for d, row in enumerate(rows) for a in row)
        or max(counts.values()) > 1
    ):
        return False
    kinds = {
        "".join(k for k in KINDS if (k, s, i) in counts)
        for s in range(len(stage_to_device))
        for i in range(m)
    }
    whole = re.compile("F(OL)?R?(B|IW)")
    return kinds == {"F"} or all(whole.fullmatch(k) for k in kinds)


LABEL = r"([FOLRBIW])\((\d+),(\d+)\)"
STUCK = re.compile(rf"(?:device \d+ at|after) {LABEL}")
AWAITED = re.compile(rf"waits for {LABEL}")


def labels(pattern, text):
    return [(k, int(s), int(i)) for k, s, i in pattern.findall(text)]


def check(rows, stage_to_device):
    """Accepted if and only if the oracle finishes it; and what a deadlock names is
    stuck in the oracle.
    """
    rows = [list(row) for row in rows]
    if not complete(rows, stage_to_device):
        with pytest.raises(ValueError, match="`Schedule`") as error:
            Schedule(rows, stage_to_device)
        assert "deadlock" not in str(error.value)
        return False
    ran, everything = (
        run(rows, len(stage_to_device)),
        {tuple(a) for row in rows for a in row},
    )
    if ran == everything:
        assert Schedule(rows, stage_to_device).actions == tuple(map(tuple, rows))
        return True
    with pytest.raises(ValueError, match="`Schedule`: deadlock: ") as error:
        Schedule(rows, stage_to_device)
    told = str(error.value)
    fronts = {
        tuple(next(a for a in row if tuple(a) not in ran))
        for row in rows
        if not ran.issuperset(map(tuple, row))
    }
    stuck, awaited = labels(STUCK, told), labels(AWAITED, told)
    assert stuck, told
    assert awaited, told
    assert set(stuck) <= fronts, (
        told
    )  # each is the first of its device that can never run
    assert set(awaited) <= everything - ran, told
    assert not runnable(stuck[0], ran, len(stage_to_device), everything)
    assert (
        runnable(stuck[0], ran | {awaited[0]}, len(stage_to_device), everything)
        or stuck[0][0] in "BIRL"
    ), told
    for d, k, s, i, p in re.findall(rf"device (\d+) at {LABEL}, position (\d+)", told):
        assert rows[int(d)][int(p)] == (k, int(s), int(i))
    for k, s, i, d, p in re.findall(
        rf"waits for {LABEL}, which device (\d+) (?:has|itself has later,) at position "
        r"(\d+)",
        told,
    ):
        assert rows[int(d)][int(p)] == (k, int(s), int(i))
    return False


@pytest.mark.quick
@each
def test_legal_schedules_are_accepted(name):
    assert check(*LEGAL[name])


# --- broken systematically ---


@each
def test_without_any_one_action(name):
    rows, stage_to_device = LEGAL[name]
    for d, row in enumerate(rows):
        for p, a in enumerate(row):
            broken = [*rows[:d], row[:p] + row[p + 1 :], *rows[d + 1 :]]
            if a.kind == "R":
                assert check(broken, stage_to_device)
                continue
            if a.kind in "OL":
                other = "L" if a.kind == "O" else "O"
                with raises(
                    ValueError,
                    f"`Schedule`: stage {a.stage}, microbatch {a.microbatch} has "
                    f"{other} and no {a.kind}; each O needs an L",
                ):
                    Schedule(broken, stage_to_device)
                continue
            had = rf"stage {a.stage}, microbatch {a.microbatch} has F"
            with pytest.raises(
                ValueError,
                match=rf"{re.escape(str(a))} is missing" if a.kind == "F" else had,
            ):
                Schedule(broken, stage_to_device)


@each
def test_with_any_action_twice(name):
    rows, stage_to_device = LEGAL[name]
    for d, row in enumerate(rows):
        for a, p in itertools.product(row, range(len(row) + 1)):
            broken = [*rows[:d], [*row[:p], a, *row[p:]], *rows[d + 1 :]]
            first, second = (k for k, b in enumerate(broken[d]) if b == a)
            with raises(
                ValueError,
                f"`Schedule`: device {d}, position {second}: {a} is there twice, first "
                f"at position {first}",
            ):
                Schedule(broken, stage_to_device)


@each
def test_with_any_action_on_another_device(name):
    rows, stage_to_device = LEGAL[name]
    for d, other in itertools.permutations(range(len(rows)), 2):
        for a in rows[d]:
            p = a.microbatch
            broken = [[b for b in row if b != a] for row in rows]
            broken[other].insert(p, a)
            with raises(
                ValueError,
                f"`Schedule`: device {other}, position {p}: {a}, but stage {a.stage} "
                f"is on device {d}",
            ):
                Schedule(broken, stage_to_device)


@each
def test_with_any_two_actions_of_a_device_swapped(name):
    rows, stage_to_device = LEGAL[name]
    outcomes = set()
    for d, row in enumerate(rows):
        for p, q in itertools.combinations(range(len(row)), 2):
            swapped = list(row)
            swapped[p], swapped[q] = row[q], row[p]
            outcomes.add(check([*rows[:d], swapped, *rows[d + 1 :]], stage_to_device))
    assert outcomes == (
        {True} if name == "forwards" else {True, False}
    )  # microbatches alone may go in any order


@each
def test_with_any_kind_stage_or_microbatch_changed(name):
    rows, stage_to_device = LEGAL[name]
    for d, row in enumerate(rows):
        for p, a in enumerate(row):
            others = [a._replace(kind=k) for k in KINDS if k != a.kind]
            others += [
                a._replace(microbatch=a.microbatch + k)
                for k in (-1, 1, 7)
                if a.microbatch + k >= 0
            ]
            others += [
                a._replace(stage=s) for s in range(len(stage_to_device)) if s != a.stage
            ]
            for b in others:
                check(
                    [*rows[:d], [*row[:p], b, *row[p + 1 :]], *rows[d + 1 :]],
                    stage_to_device,
                )


@each
@pytest.mark.parametrize("kinds", ["W", "I", "B", "F", "BI", "BIW", "R", "OL", "O"])
def test_without_a_kind_altogether(name, kinds):
    rows, stage_to_device = LEGAL[name]
    left = [[a for a in row if a.kind not in kinds] for row in rows]
    if all(left):
        assert check(left, stage_to_device) == complete(left, stage_to_device)


@each
@pytest.mark.parametrize("seed", range(3))
def test_renumbered_alike_everywhere(name, seed):
    """Microbatches in another order are as good; stages in another order are another
    pipeline.
    """
    rows, stage_to_device = LEGAL[name]
    m, rng = 1 + max(a.microbatch for a in rows[0]), random.Random(seed)
    new = rng.sample(range(m), m)
    assert check(
        [[a._replace(microbatch=new[a.microbatch]) for a in row] for row in rows],
        stage_to_device,
    )
    stages = rng.sample(range(len(stage_to_device)), len(stage_to_device))
    moved = [stage_to_device[stages.index(s)] for s in range(len(stage_to_device))]
    check([[a._replace(stage=stages[a.stage]) for a in row] for row in rows], moved)


@pytest.mark.parametrize("choice", list(itertools.product("BI", repeat=6)))
def test_split_and_full_backwards_mix(choice):
    """Any backward may be split, whatever the next stage does: `I` and `B` give the
    same cotangent.
    """
    rows, stage_to_device = LEGAL["1f1b"]
    split = dict(zip(itertools.product(range(3), range(2)), choice, strict=True))
    mixed = [
        [
            Action._make((k, a.stage, a.microbatch))
            for a in row
            for k in (
                "IW"
                if a.kind == "B" and split.get((a.stage, a.microbatch)) == "I"
                else a.kind
            )
        ]
        for row in rows
    ]
    assert check(mixed, stage_to_device)
    late = [sorted(row, key=lambda a: a.kind != "W") for row in mixed]
    assert check(late, stage_to_device) == ("I" not in choice)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_order_is_accepted_exactly_when_it_runs(data):
    rows, stage_to_device = LEGAL[data.draw(st.sampled_from(sorted(LEGAL)))]
    rows = [list(row) for row in rows]
    for _ in range(
        data.draw(st.integers(0, 4))
    ):  # few moves: many of the results still run
        row = rows[data.draw(st.integers(0, len(rows) - 1))]
        a = row.pop(data.draw(st.integers(0, len(row) - 1)))
        row.insert(data.draw(st.integers(0, len(row))), a)
    check(rows, stage_to_device)
    check([data.draw(st.permutations(row)) for row in rows], stage_to_device)


# --- the reasons, word by word ---

WHOLE_OR_HALVES = "a schedule with backwards needs F with either B, or both I and W"
F_TWICE = "device 0, position 1: F(0,0) is there twice, first at position 0"
W_BEFORE_I = (
    "deadlock: device 0 at W(0,0), position 1, waits for I(0,0), which device 0 itself "
    "has later, at position 2"
)
BROKEN = {
    "missing forward": (
        [[("B", 0, 0)]],
        "F(0,0) is missing: the schedule has 1 microbatch, because device 0 has B(0,0)",
    ),
    "missing backward": (
        [[("F", 0, 0), ("B", 0, 0), ("F", 0, 1)]],
        f"stage 0, microbatch 1 has F; {WHOLE_OR_HALVES}",
    ),
    "repeated": (
        [[("F", 0, 0), ("F", 0, 0), ("B", 0, 0)]],
        F_TWICE,
    ),
    "gap": (
        [[("F", 0, 0), ("B", 0, 0), ("F", 0, 2), ("B", 0, 2)]],
        "F(0,1) is missing: the schedule has 3 microbatches, because device 0 has "
        "F(0,2)",
    ),
    "a very large gap": (
        [[("F", 0, 10**15)]],
        f"F(0,0) is missing: the schedule has {10**15 + 1} microbatches, because "
        f"device 0 has F(0,{10**15})",
    ),
    "idle device": (
        [[("F", 0, 0)], []],
        "F(1,0) is missing: stage 1 is on device 1, which has no action of it",
    ),
    "wrong device": (
        [[("F", 1, 0)], [("F", 0, 0)]],
        "device 0, position 0: F(1,0), but stage 1 is on device 1",
    ),
    "unknown stage": (
        [[("F", 3, 0)]],
        "device 0, position 0: F(3,0) is of stage 3, but the schedule has 1 stage; "
        "with several stages on a device give stage_to_device",
    ),
    "negative": (
        [[("F", 0, -1)]],
        "device 0, position 0: F(0,-1) is of a negative microbatch",
    ),
    "half split": (
        [[("F", 0, 0), ("I", 0, 0)]],
        f"stage 0, microbatch 0 has F and I; {WHOLE_OR_HALVES}",
    ),
    "twice backward": (
        [[("F", 0, 0), ("I", 0, 0), ("W", 0, 0), ("B", 0, 0)]],
        f"stage 0, microbatch 0 has F and B and I and W; {WHOLE_OR_HALVES}",
    ),
    "W before I": (
        [[("F", 0, 0), ("W", 0, 0), ("I", 0, 0)]],
        W_BEFORE_I,
    ),
    "B before F": (
        [[("B", 0, 0), ("F", 0, 0)]],
        "deadlock: device 0 at B(0,0), position 0, waits for F(0,0), which device 0 "
        "itself has later, at position 1",
    ),
    "R without a backward": (
        [[("F", 0, 0), ("R", 0, 0)]],
        f"stage 0, microbatch 0 has F and R; {WHOLE_OR_HALVES}",
    ),
    "O without L": (
        [[("F", 0, 0), ("O", 0, 0), ("B", 0, 0)]],
        "stage 0, microbatch 0 has O and no L; each O needs an L",
    ),
    "O in a schedule of forwards": (
        [[("F", 0, 0), ("O", 0, 0), ("L", 0, 0)]],
        f"stage 0, microbatch 0 has F and O and L; {WHOLE_OR_HALVES}",
    ),
    "L before O": (
        [[("F", 0, 0), ("L", 0, 0), ("O", 0, 0), ("B", 0, 0)]],
        "deadlock: device 0 at L(0,0), position 1, waits for O(0,0), which device 0 "
        "itself has later, at position 2",
    ),
    "L after R": (
        [[("F", 0, 0), ("O", 0, 0), ("R", 0, 0), ("L", 0, 0), ("B", 0, 0)]],
        "deadlock: device 0 at R(0,0), position 2, waits for L(0,0), which device 0 "
        "itself has later, at position 3",
    ),
    "L after I": (
        [[(k, 0, 0) for k in "FOILW"]],
        "deadlock: device 0 at I(0,0), position 2, waits for L(0,0), which device 0 "
        "itself has later, at position 3",
    ),
    "R before F": (
        [[("R", 0, 0), ("F", 0, 0), ("B", 0, 0)]],
        "deadlock: device 0 at R(0,0), position 0, waits for F(0,0), which device 0 "
        "itself has later, at position 1",
    ),
    "R after B": (
        [[("F", 0, 0), ("B", 0, 0), ("R", 0, 0)]],
        "deadlock: device 0 at B(0,0), position 1, waits for R(0,0), which device 0 "
        "itself has later, at position 2",
    ),
    "two devices": (
        [
            [("F", 0, 0), ("B", 0, 0), ("F", 0, 1), ("B", 0, 1)],
            [("F", 1, 1), ("F", 1, 0), ("B", 1, 0), ("B", 1, 1)],
        ],
        "deadlock: device 0 at B(0,0), position 1, waits for B(1,0), which device 1 "
        "has at position 2, after F(1,1), "
        "which waits for F(0,1), which device 0 has at position 2, after B(0,0), where "
        "this began",
    ),
    "nothing": ([[]], "1 device, 1 stage and no action: nothing to run"),
    "no device": ([], "0 devices, 0 stages and no action: nothing to run"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", BROKEN)
def test_broken_schedules_are_refused(name):
    rows, message = BROKEN[name]
    with raises(ValueError, f"`Schedule`: {message}"):
        Schedule(rows)


MAPS = {
    "too short": (
        [0],
        "device 1, position 0: F(1,0) is of stage 1, but the schedule has 1 stage",
    ),
    "too long": (
        [0, 1, 1],
        "F(2,0) is missing: stage 2 is on device 1, which has no action of it",
    ),
    "outside": ([0, 2], "stage_to_device[1] is 2, but the schedule has 2 devices"),
    "negative": ([0, -1], "stage_to_device[1] is -1, but the schedule has 2 devices"),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_that_do_not_fit(name):
    stage_to_device, message = MAPS[name]
    with raises(ValueError, f"`Schedule`: {message}"):
        Schedule([[("F", 0, 0)], [("F", 1, 0)]], stage_to_device)


def test_a_device_without_a_stage_is_refused():
    message = (
        "device 1 has no stage and nothing to run; leave it out, or give it a stage in "
        "stage_to_device, (0, 2)"
    )
    with raises(ValueError, f"`Schedule`: {message}"):
        Schedule([[("F", 0, 0)], [], [("F", 1, 0)]], [0, 2])


def test_a_deadlock_names_its_root_and_not_those_who_wait_after_it():
    rows = [list(row) for row in schedules.one_f_one_b(64, 64).actions]
    rows[63][0], rows[63][1] = rows[63][1], rows[63][0]
    with raises(
        ValueError,
        "`Schedule`: deadlock: device 63 at B(63,0), position 0, waits for F(63,0), "
        "which device 63 itself has later, "
        "at position 1; 63 more devices are stuck",
    ):
        Schedule(rows)


def test_of_two_reasons_a_deadlock_names_the_one_on_fewer_devices():
    own = (
        "waits for F({0},0), which device {0} itself has later, at position 1; 2 more "
        "devices are stuck"
    )
    two, _ = BROKEN["two devices"]
    with raises(
        ValueError,
        "`Schedule`: deadlock: device 2 at B(2,0), position 0, " + own.format(2),
    ):
        Schedule([*two, [("B", 2, 0), ("F", 2, 0), ("F", 2, 1), ("B", 2, 1)]])
    with raises(
        ValueError,
        "`Schedule`: deadlock: device 1 at B(1,0), position 0, " + own.format(1),
    ):
        Schedule(parse("0F0 0B0", "1B0 1F0", "2F0 2B0"))  # B(1,0) waits for B(2,0) too


def test_of_two_reasons_alike_a_deadlock_names_the_one_on_the_lower_device():
    with raises(
        ValueError,
        f"`Schedule`: {W_BEFORE_I}; 1 more device is stuck",
    ):
        Schedule(parse("0F0 0W0 0I0", "1F0 1W0 1I0"))


def test_a_long_cycle_is_cut_in_the_middle():
    rows = [[("F", d + 64, 0), ("F", d, 0)] for d in range(64)]
    rows[0] = [("F", 64, 0), ("F", 0, 0)]
    with raises(
        ValueError,
        "`Schedule`: deadlock: device 0 at F(64,0), position 0, waits for F(63,0), "
        "which device 63 has at position 1, "
        "after F(127,0), which waits for F(126,0), which device 62 has at position 0 "
        "and which waits for F(125,0), which "
        "device 61 has at position 0 and which waits for … (59 devices more), which "
        "waits for F(65,0), which device 1 has "
        "at position 0 and which waits for F(64,0), which device 0 has at position 0, "
        "where this began",
    ):
        Schedule(rows, [s % 64 for s in range(128)])


def test_the_table_of_torch_with_a_microbatch_that_does_not_exist():
    rows = [list(row) for row in schedules.one_f_one_b(2, 4).actions]
    rows[1].append(Action("F", 1, 4))
    with raises(
        ValueError,
        "`Schedule`: F(0,4) is missing: the schedule has 5 microbatches, because "
        "device 1 has F(1,4)",
    ):
        Schedule(rows)


def test_the_table_of_jaxpp_with_two_tasks_twice_and_fourteen_omitted():
    rows, stage_to_device = LEGAL["gpipe"]
    everything, rows = sum(map(len, rows)), parse("0F0 0F0 0F1 0F1", "1F0 1F1", "")
    assert everything - len({a for row in rows for a in row}) == 14
    with raises(
        ValueError,
        f"`Schedule`: {F_TWICE}",
    ):
        Schedule(rows, stage_to_device)


# --- what may be given ---

NO_SEQUENCE = "`Schedule`: one sequence of actions per device is a sequence, not"
WRONG = {
    "None": (
        None,
        f"{NO_SEQUENCE} None",
    ),
    "a string": (
        "F0",
        f"{NO_SEQUENCE} 'F0'",
    ),
    "a string as a row": (
        ["F0"],
        "`Schedule`: the actions of device 0 are a sequence, not 'F0'",
    ),
    "a set": (
        [{("F", 0, 0)}],
        "`Schedule`: the actions of device 0 are a sequence, not {('F', 0, 0)}",
    ),
    "a number": ([3], "`Schedule`: the actions of device 0 are a sequence, not 3"),
    "a string as an action": (
        [["F00"]],
        "position 0 is 'F00', no Action(kind, stage, microbatch)",
    ),
    "too short": (
        [[("F", 0)]],
        "position 0 is ('F', 0), no Action(kind, stage, microbatch)",
    ),
    "an action as a row": (
        [("F", 0, 0)],
        "position 0 is 'F', no Action(kind, stage, microbatch)",
    ),
    "a bool": (
        [[("F", 0, False)]],
        "position 0 is ('F', 0, False); stage and microbatch must be ints",
    ),
    "a float": (
        [[("F", 0, 0.0)]],
        "position 0 is ('F', 0, 0.0); stage and microbatch must be ints",
    ),
    "unhashable": (
        [[("F", [0], 0)]],
        "position 0 is ('F', [0], 0); stage and microbatch must be ints",
    ),
    "an unhashable kind": (
        [[(["F"], 0, 0)]],
        "position 0 is of kind ['F']; the kinds are F, O, L, R, B, I, W",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_schedule_at_all(name):
    rows, message = WRONG[name]
    message = (
        message
        if message.startswith("`")
        else f"`Schedule(actions=...)`: device 0, {message}"
    )
    with raises(TypeError, message):
        Schedule(rows)


def test_an_unknown_kind():
    with raises(
        ValueError,
        "`Schedule(actions=...)`: device 0, position 0 is of kind 'X'; the kinds are "
        "F, O, L, R, B, I, W",
    ):
        Schedule([[("X", 0, 0)]])


@pytest.mark.parametrize(
    ("stage_to_device", "message"),
    [
        (
            [True],
            "`Schedule`: stage_to_device[0] is True, not a device's index (an int)",
        ),
        (
            [0.0],
            "`Schedule`: stage_to_device[0] is 0.0, not a device's index (an int)",
        ),
        (
            [None],
            "`Schedule`: stage_to_device[0] is None, not a device's index (an int)",
        ),
        ("0", "`Schedule`: stage_to_device is a sequence, not '0'"),
        ({0}, "`Schedule`: stage_to_device is a sequence, not {0}"),
        (0, "`Schedule`: stage_to_device is a sequence, not 0"),
    ],
)
def test_what_is_no_map(stage_to_device, message):
    with raises(TypeError, message):
        Schedule([[("F", 0, 0)]], stage_to_device)


def test_a_name_is_a_string():
    with raises(TypeError, "`Schedule(name=...)`: a str, not 3"):
        Schedule([[("F", 0, 0)]], name=3)  # pyright: ignore[reportArgumentType]


def test_whatever_is_given_is_stored_as_tuples_of_ints():
    plain = Schedule([[("F", 0, 0)], [("F", 1, 0)]])
    zero, one = np.arange(2)
    rows = ([(np.str_("F"), s, zero)] for s in (zero, one))
    given = Schedule(rows, iter(np.arange(2)))  # pyright: ignore
    lists = Schedule([[["F", 0, 0]], [["F", 1, 0]]], [0, 1])  # pyright: ignore[reportArgumentType]
    for schedule in (given, lists):
        assert schedule == plain
        assert hash(schedule) == hash(plain)
        for a in itertools.chain(*schedule.actions):
            assert [type(a), *map(type, a)] == [Action, str, int, int]
        assert {type(d) for d in schedule.stage_to_device} == {int}


# --- a value ---


def test_what_is_derived_is_no_part_of_the_value():
    schedule, untouched = schedules.eager_1f1b(3, 5), schedules.eager_1f1b(3, 5)
    assert (
        schedule.devices,
        schedule.stages,
        schedule.microbatches,
        schedule.backwards,
    ) == (3, 3, 5, True)
    assert schedule == untouched
    assert hash(schedule) == hash(untouched)
    assert pickle.dumps(schedule) == pickle.dumps(untouched)
    assert [f.name for f in dataclasses.fields(schedule)] == [
        "actions",
        "stage_to_device",
        "name",
    ]
    for same in (
        pickle.loads(pickle.dumps(schedule)),
        copy.copy(schedule),
        copy.deepcopy(schedule),
    ):
        assert same == schedule
        assert (hash(same), same.microbatches, repr(same)) == (
            hash(schedule),
            5,
            repr(schedule),
        )
    assert "microbatches" not in vars(copy.copy(schedule))
    renamed = dataclasses.replace(schedule, name="other")
    assert (renamed.name, renamed.actions, renamed.microbatches) == (
        "other",
        schedule.actions,
        5,
    )
    assert renamed != schedule
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.name = "x"  # pyright: ignore[reportAttributeAccessIssue]


def test_repr_is_short_and_str_is_the_rows():
    rows, stage_to_device = LEGAL["V"]
    schedule = Schedule(rows, stage_to_device, "V")
    assert (
        repr(schedule) == "<Schedule 'V': 2 devices, 4 stages, 2 microbatches, F B I W>"
    )
    assert str(schedule) == (
        "0: 0F0 0F1 3F0 3I0 3W0 3F1 3I1 0I0 0W0 0B1 3W1\n1: 1F0 2F0 1F1 2F1 2B0 1B0 "
        "2I1 1I1 1W1 2W1"
    )
    assert str(schedules.one_f_one_b(2, 2)) == "0: F0 F1 B0 B1\n1: F0 B0 F1 B1"
    assert str(Schedule([[("F", 1, 0)], [("F", 0, 0)]], [1, 0])) == "0: 1F0\n1: 0F0"


def test_a_large_schedule_is_cheap():
    rows = [
        [
            Action._make((k, a.stage, a.microbatch))
            for a in row
            for k in ("IW" if a.kind == "B" else "F")
        ]
        for row in schedules.one_f_one_b(64, 512).actions
    ]
    start = time.process_time()
    schedule = Schedule(rows)
    assert (
        time.process_time() - start < 2.0
    )  # 0.12 s on two old cores; ten times that is a bug
    assert schedule.microbatches == 512
