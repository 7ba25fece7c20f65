"""The table of torch.distributed.pipelining, read and written."""

import csv
import io
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpipe import schedules
from fpipe.schedules import Costs, Schedule, from_csv, simulate

SIZES = [(1, 1), (1, 3), (2, 2), (2, 6), (3, 4), (4, 8), (4, 16)]


def of_that_size(name, devices, microbatches, virtual=None):
    """The named schedule, or `None` where it refuses the sizes."""
    try:
        return schedules.named(name, devices, microbatches, virtual)
    except ValueError:
        return None


@pytest.mark.parametrize("name", schedules.NAMES)
def test_round_trip(name):
    several = [None] if schedules.NAMES[name].per_device else [None, 2, 3]
    made = [s for size in SIZES for v in several if (s := of_that_size(name, *size, v))]
    assert made
    for schedule in made:
        text = schedule.to_csv()
        assert from_csv(text, name=schedule.name) == schedule
        assert from_csv(text, schedule.stage_to_device, schedule.name) == schedule


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.randoms()
)
def test_round_trip_of_any_schedule(devices, virtual, microbatches, backwards, rng):
    schedule = shuffled(devices, virtual, microbatches, backwards, rng)
    assert from_csv(schedule.to_csv(), schedule.stage_to_device, "custom") == schedule
    assert from_csv(schedule.to_csv(), name="custom") == schedule


def shuffled(devices, virtual, microbatches, backwards, rng):
    """A schedule in any legal order, backwards split or not, stages on any devices."""
    stage_to_device = [d for d in range(devices) for _ in range(virtual)]
    rng.shuffle(stage_to_device)
    last = len(stage_to_device) - 1
    split = {
        (s, i): rng.random() < 0.5 for s in range(last + 1) for i in range(microbatches)
    }
    recomputed = {pair for pair in split if rng.random() < 0.4}
    copied = {pair for pair in split if rng.random() < 0.4 and backwards}
    waiting: dict = {("F", 0, i): None for i in range(microbatches)}
    rows: list[list[tuple[str, int, int]]] = [[] for _ in range(devices)]
    # Pairs whose cotangent is there, and what the forward left.
    cotangents, home = set(), set()
    while waiting:
        kind, s, i = action = rng.choice(sorted(waiting))
        del waiting[action]
        rows[stage_to_device[s]].append(action)
        if kind == "F" and s < last:
            waiting["F", s + 1, i] = None
        if kind in "FO" and (s, i) in copied:
            waiting["O" if kind == "F" else "L", s, i] = None
        elif kind in "FL":
            home.add((s, i))
        if kind == "I":
            waiting["W", s, i] = None
        if kind == "F" and s == last:
            cotangents.add((s, i))
        elif kind in "BI" and s:
            cotangents.add((s - 1, i))
        for pair in home & cotangents if backwards else ():
            home.discard(pair)
            kind_of_backward = "I" if split[pair] else "B"
            waiting["R" if pair in recomputed else kind_of_backward, *pair] = None
        if kind == "R":
            waiting["I" if split[s, i] else "B", s, i] = None
    return Schedule(rows, stage_to_device)


@pytest.mark.quick
def test_the_table_as_written():
    assert schedules.one_f_one_b(3, 4).to_csv().splitlines() == [
        "0F0,0F1,0F2,,,0B0,0F3,0B1,,0B2,,0B3",
        ",1F0,1F1,,1B0,1F2,1B1,1F3,1B2,,1B3",
        ",,2F0,2B0,2F1,2B1,2F2,2B2,2F3,2B3",
    ]
    split = Schedule(
        [
            [("F", 0, 0), ("I", 0, 0), ("W", 0, 0)],
            [("F", 1, 0), ("I", 1, 0), ("W", 1, 0)],
        ]
    )
    assert split.to_csv() == "0F0,,,0I0,0W0\n,1F0,1I0,1W0\n"


@pytest.mark.parametrize("name", schedules.NAMES)
def test_columns_are_the_steps_of_a_clock(name):
    schedule = schedules.named(name, 4, 16)
    steps = simulate(schedule, Costs(F=1, B=1, I=1, W=1))
    rows = list(csv.reader(io.StringIO(schedule.to_csv())))
    kept = {
        (d, t, cell) for d, row in enumerate(rows) for t, cell in enumerate(row) if cell
    }
    assert kept == {
        (d, int(start), f"{a.stage}{a.kind}{a.microbatch}")
        for d, a, start, _ in steps.events
    }


# 2 devices, 4 microbatches: the steps of torch's ScheduleDualPipeV by hand, in the
# format of its `_Action.__repr__`.
DUAL_PIPE_V = """\
0F0,0F1,0F2,3F0,3I0,3W0,3F1,(0F3;3B1)OVERLAP_F_B,(3F2;0B0)OVERLAP_F_B,3B2,(3F3;0B1)OVERLAP_F_B,3B3,0I2,0W2,0I3,0W3
1F0,2F0,1F1,2F1,1F2,2B0,(2F2;1B0)OVERLAP_F_B,(1F3;2B1)OVERLAP_F_B,(2F3;1B1)OVERLAP_F_B,2B2,1B2,2I3,1I3,2W3,1W3
"""


def test_a_table_of_torch_with_overlapped_cells():
    schedule = from_csv(DUAL_PIPE_V, name="dualpipe_v")
    assert schedule.stage_to_device == (0, 1, 1, 0)
    assert schedule.microbatches == 4
    assert schedule.actions[0][6:12] == (
        ("F", 3, 1), ("F", 0, 3), ("B", 3, 1), ("F", 3, 2), ("B", 0, 0), ("B", 3, 2)
    )  # fmt: skip
    spaced = DUAL_PIPE_V.replace("(", " ( ").replace(";", " ; ").replace(")", " )")
    assert from_csv(spaced, name="dualpipe_v") == schedule


WANT = Schedule(
    [
        [("F", 0, 0), ("F", 0, 1), ("B", 0, 0), ("B", 0, 1)],
        [("F", 1, 0), ("B", 1, 0), ("F", 1, 1), ("B", 1, 1)],
    ]
)
FORMS = {
    "clock": "0F0,0F1,,0B0,,0B1\n,1F0,1B0,1F1,1B1\n",
    "order alone": "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1",
    "Windows": "0F0,0F1,,0B0,,0B1\r\n,1F0,1B0,1F1,1B1\r\n",
    "Windows twice": "0F0,0F1,,0B0,,0B1\r\r\n,1F0,1B0,1F1,1B1\r\r\n",
    "trailing commas": "0F0,0F1,,0B0,,0B1,,,\n,1F0,1B0,1F1,1B1,,,,\n",
    "blank lines": "\n0F0,0F1,,0B0,,0B1\n\n   \n,1F0,1B0,1F1,1B1\n\n\n",
    "spaces": " 0F0, 0F1 ,  ,0B0,\t,0B1\n , 1F0,1B0 ,1F1,1B1  \n",
    "quotes": '"0F0","0F1","","0B0","","0B1"\n"","1F0","1B0","1F1","1B1"\n',
    "byte order mark": "\ufeff0F0,0F1,,0B0,,0B1\n,1F0,1B0,1F1,1B1\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_are_read(form):
    assert from_csv(FORMS[form], name="custom") == WANT


def test_where_the_stages_are():
    text = "1F0\n0F0\n"
    assert from_csv(text).stage_to_device == (1, 0)
    assert from_csv(text, [1, 0]) == from_csv(text)
    assert from_csv(text).name == "csv"
    with pytest.raises(ValueError, match="but stage 1 is on device 1"):
        from_csv(text, [0, 1])


BAD = {
    "send": (
        "0F0,0SEND_F0,0B0",
        "row 1, column 2: '0SEND_F0' is communication; .*compute_only",
    ),
    "receive": ("0F0\n1RECV_F0,1F0", "row 2, column 1: '1RECV_F0' is communication"),
    "unshard": ("\n0F0\n1UNSHARD,1F0", "row 3, column 1: '1UNSHARD' is communication"),
    "reduce": (
        "0F0,0B0,0REDUCE_GRAD",
        "row 1, column 3: '0REDUCE_GRAD' is communication",
    ),
    "no microbatch": (
        "0F0,0F",
        "row 1, column 2: '0F' is no action; one looks like 2F0",
    ),
    "something after": ("0F0x", "row 1, column 1: '0F0x' is no action"),
    "small letters": ("0f0", "row 1, column 1: '0f0' is no action"),
    "other digits": ("\u0660F\u0660", "is no action"),
    "semicolons": ("0F0;0B0", "row 1, column 1: '0F0;0B0' is no action"),
    "half an overlap": ("(0F0;)OVERLAP_F_B", "is no action"),
    "a path": ("schedule.csv", "row 1, column 1: 'schedule.csv' is no action"),
    "two rows": ("0F0\n\n0F1", "stage 0 is in row 1 and in row 3"),
    "a gap": ("0F0,2F0", "there is stage 2, but no action of stage 1"),
    "nothing": ("", "there is no action"),
    "only commas": (",,\n,\n", "there is no action"),
    "early torch": ("0F0,0B0,0W0", "W but no I; .*write I"),
    "illegal": ("0F0,0B0,0F0", "is there twice"),
    "deadlock": ("0B0,0F0", "deadlock"),
}


@pytest.mark.parametrize("name", BAD)
def test_tables_that_are_refused(name):
    text, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        from_csv(text)


def test_text_is_text():
    with pytest.raises(TypeError, match="the content of a file, a str, not b'0F0'"):
        from_csv(b"0F0")  # pyright: ignore[reportArgumentType]


def test_large_tables_are_cheap():
    schedule = schedules.one_f_one_b(64, 512)
    assert from_csv(schedule.to_csv(), name="1f1b") == schedule


def test_the_random_schedules_are_varied():
    made = [shuffled(3, 2, 3, True, random.Random(seed)) for seed in range(20)]
    assert len({s.actions for s in made}) == 20
    assert {a.kind for s in made for row in s.actions for a in row} == set("FOLRBIW")
