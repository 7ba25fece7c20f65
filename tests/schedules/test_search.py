"""The search: never worse than what it starts from, within the limit, and how far from
a lower bound.
"""

import functools
import itertools
import math
import random

import pytest

from fpipe import schedules
from fpipe.schedules import NAMES, Costs, named, simulate, zb_h1, zero_bubble
from fpipe.schedules._action import KINDS
from fpipe.schedules._search import zero_bubble as search
from fpipe.schedules._search.problem import Problem

UNEVEN = [1.0, 1.7, 1.1, 1.4, 1.2, 0.9, 1.3, 1.6]
COSTS = {
    "equal": lambda s: Costs(),
    "typical": lambda s: Costs(F=1.0, I=1.2, W=0.8, transfer=0.1),
    "slow links": lambda s: Costs(F=1.0, I=1.2, W=0.8, transfer=0.7),
    "uneven": lambda s: Costs(
        F=UNEVEN[:s],
        I=1.2,
        W=UNEVEN[:s][::-1],
        transfer=0.05,
        memory=UNEVEN[:s],
        memory_w=0.4,
    ),
    "expensive split": lambda s: Costs(F=1.0, B=1.7, I=1.2, W=0.8, transfer=0.1),
    "free": lambda s: Costs(F=0, I=0, W=0),
}


def fixed(devices, m, stage_to_device):
    """The schedules with a name on this map."""
    for name in NAMES:
        try:
            schedule = named(name, devices, m, len(stage_to_device) // devices)
        except ValueError:
            continue
        if schedule.stage_to_device == stage_to_device and schedule.backwards:
            yield schedule


def keeps(timeline, limit):
    return limit is None or max(timeline.peak_memory) <= limit * (1 + 1e-9)


def bound(devices, m, costs, stage_to_device):
    return Problem.of(devices, m, stage_to_device, costs, None).bound()


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize(("devices", "m"), [(1, 1), (4, 2), (3, 5)])
@pytest.mark.parametrize("share", [0.0, None])
def test_never_worse_and_within_the_limit(name, devices, m, share):
    costs = COSTS[name](devices)
    others = [simulate(s, costs) for s in fixed(devices, m, tuple(range(devices)))]
    peaks = [max(t.peak_memory) for t in others]
    # From what the least of them holds to what the most does, which is GPipe with all
    # microbatches.
    limit = None if share is None else min(peaks) + share * (max(peaks) - min(peaks))
    timeline = simulate(zero_bubble(devices, m, costs, memory=limit), costs)
    allowed = [t for t in others if keeps(t, limit)]
    assert allowed
    assert keeps(timeline, limit)
    assert timeline.makespan <= min(t.makespan for t in allowed) * (1 + 1e-9)
    assert timeline.makespan >= bound(devices, m, costs, tuple(range(devices))) * (
        1 - 1e-9
    )


def test_the_fixed_ones_take_part(monkeypatch):
    """With all else switched off one of them is the result."""
    monkeypatch.setattr(search, "_grid", lambda problem: [])
    monkeypatch.setattr(search, "anneal", lambda problem, found, bound, seed: found)
    assert zero_bubble(4, 8, memory=4).actions == zb_h1(4, 8).actions
    costs = Costs(B=1.0)
    assert (
        zero_bubble(4, 8, costs, memory=4).actions
        == schedules.one_f_one_b(4, 8).actions
    )


@pytest.mark.parametrize(
    ("placement", "virtual"),
    [("v", 2), ("looped", 2), ("looped", 3), ((1, 0, 1, 1, 2), 0)],
)
@pytest.mark.parametrize(
    ("name", "memory"), [("typical", None), ("uneven", 1.0), ("uneven", 1.6)]
)
def test_several_stages_on_a_device(placement, virtual, name, memory):
    devices, m = 3 if not isinstance(placement, str) or virtual == 3 else 4, 5
    stages = devices * virtual if virtual else 5
    costs = (
        COSTS[name](stages)
        if stages <= len(UNEVEN)
        else Costs(I=1.2, W=0.8, memory=[1.0, 2.0, 5.0] * 3)
    )
    ups = tuple(range(devices))
    stage_to_device = (
        {"v": ups + ups[::-1], "looped": ups * virtual}[placement]
        if isinstance(placement, str)
        else placement
    )
    # As little as one microbatch alone holds, where a scheduler that admits too early
    # is stuck.
    whole = Problem.of(devices, m, stage_to_device, costs, None).one_microbatch
    limit = None if memory is None else max(whole) * memory
    schedule = zero_bubble(
        devices, m, costs, memory=limit, placement=placement, virtual=virtual or 1
    )
    assert schedule.stage_to_device == stage_to_device
    timeline = simulate(schedule, costs)
    assert keeps(timeline, limit)
    for other in fixed(devices, m, stage_to_device):
        other = simulate(other, costs)
        assert not keeps(other, limit) or timeline.makespan <= other.makespan * (
            1 + 1e-9
        )
    for s in range(schedule.stages):
        assert schedule.order("F", s) == tuple(range(m))


def test_tight_limits_at_random():
    """Nothing gets stuck, however uneven what the stages hold."""
    rng = random.Random(0)
    for _ in range(6):
        devices, virtual, m = rng.randint(1, 2), rng.randint(2, 3), 4
        memory = [rng.choice((0.0, 1.0, 7.0)) for _ in range(devices * virtual)]
        costs = Costs(
            F=[rng.random() for _ in memory],
            transfer=rng.random(),
            memory=memory,
            memory_w=rng.random(),
        )
        whole = [sum(memory[d::devices]) for d in range(devices)]
        limit = [w * rng.choice((1.0, 1.3)) for w in whole]
        schedule = zero_bubble(
            devices, m, costs, memory=limit, placement="looped", virtual=virtual
        )
        peaks = simulate(schedule, costs).peak_memory
        assert all(
            peak <= most * (1 + 1e-9) for peak, most in zip(peaks, limit, strict=True)
        )


@pytest.mark.quick
@pytest.mark.parametrize(("devices", "m"), [(1, 3), (2, 8), (4, 8), (4, 16), (8, 16)])
def test_idle_is_the_fill_alone(devices, m):
    """Equal costs, no limit: the lower bound itself, and no more memory than ZB-H2's
    2D-1.
    """
    timeline = simulate(zero_bubble(devices, m))
    assert timeline.idle == (devices - 1.0,) * devices
    assert timeline.makespan == bound(devices, m, Costs(), tuple(range(devices)))
    assert max(timeline.peak_live) <= max(2 * devices - 1, 1)


def test_the_fill_of_a_v():
    """Half as much: a stage is half a device's work, and the bound is reached."""
    timeline = simulate(zero_bubble(4, 12, placement="v"))
    assert timeline.idle == (3.0,) * 4


# D, m, limit; F, I, W, transfer; makespan of ZB-H1 (the best fixed one within the
# limit), at most, lower bound.
BETTER = [
    (4, 16, 5, (1.0, 1.2, 0.8, 0.1), 53.4, 52.0, 51.3),
    (4, 16, 6, (1.0, 1.2, 0.8, 0.1), 53.4, 51.3, 51.3),
    (4, 16, 5, (1.0, 1.2, 0.8, 0.3), 55.8, 53.2, 51.9),
    (8, 32, 10, (1.0, 1.2, 0.8, 0.1), 108.6, 105.8, 103.7),
    (8, 32, 12, (1.0, 1.2, 0.8, 0.3), 114.2, 107.0, 105.1),
    (4, 16, 4, (UNEVEN[:4], 1.2, 0.8, 0.1), 64.0, 62.9, 60.3),
    (4, 16, 5, (UNEVEN[:4], 1.2, 0.8, 0.1), 64.0, 60.9, 60.3),
]


@pytest.mark.parametrize("case", BETTER)
def test_better_than_every_fixed_one(case):
    devices, m, limit, (f, i, w, transfer), best, reached, least = case
    costs = Costs(F=f, I=i, W=w, transfer=transfer)
    stage_to_device = tuple(range(devices))
    others = [
        t
        for s in fixed(devices, m, stage_to_device)
        if keeps(t := simulate(s, costs), limit)
    ]
    assert min(t.makespan for t in others) == pytest.approx(best)
    timeline = simulate(zero_bubble(devices, m, costs, memory=limit), costs)
    assert timeline.makespan <= reached + 1e-9
    assert reached < best
    assert bound(devices, m, costs, stage_to_device) == pytest.approx(least)


def interleavings(device, m):
    chains = [[(k, device, i) for k in "FIW"] for i in range(m)]
    for order in set(itertools.permutations([i for i in range(m) for _ in "FIW"])):
        left = [iter(c) for c in chains]
        yield [next(left[i]) for i in order]


@pytest.mark.parametrize(("devices", "seeds"), [(2, 12), (3, 2)])
def test_the_optimum_where_all_can_be_tried(devices, seeds):
    """Two microbatches, every order of every device: the bound is one, and the search
    finds the best.
    """
    m, stage_to_device = 2, tuple(range(devices))
    size = devices * m
    every = [
        [
            [(KINDS.index(k) * devices + s) * m + i for k, s, i in row]
            for row in interleavings(d, m)
        ]
        for d in range(devices)
    ]
    for seed in range(seeds):
        rng = random.Random(seed)
        draw = lambda: [rng.choice((0.5, 1.0, 1.2, 2.0)) for _ in range(devices)]  # noqa: E731, B023
        costs = Costs(
            F=draw(),
            I=draw(),
            W=draw(),
            transfer=rng.choice((0.0, 0.3)),
            memory=draw(),
            memory_w=0.3,
        )
        limit = max(costs.memory) * rng.choice((1.0, 1.5, 2.0))  # pyright: ignore
        problem = Problem.of(devices, m, stage_to_device, costs, limit)
        fit = [
            [row for row in rows if problem.fits(d, row)]
            for d, rows in enumerate(every)
        ]
        best = math.inf
        for rows in itertools.product(*fit):
            crossing = problem.numbering.crossing_needs(list(rows))
            played = problem.play(list(rows), crossing)
            best = min(best, max(played.ends) if played else math.inf)
        assert size == problem.numbering.size
        found = simulate(
            zero_bubble(devices, m, costs, memory=problem.limits), costs
        ).makespan
        assert problem.bound() <= best * (1 + 1e-9)
        assert found == pytest.approx(best)


def test_the_run_of_the_search_is_that_of_simulate():
    costs = Costs(F=UNEVEN[:4], B=1.9, I=1.2, W=0.8, transfer=0.1, memory_w=0.5)
    for schedule in fixed(4, 6, (0, 1, 2, 3)):
        problem = Problem.of(4, 6, schedule.stage_to_device, costs, None)
        rows = [
            [(KINDS.index(k) * 4 + s) * 6 + i for k, s, i in row]
            for row in schedule.actions
        ]
        assert rows == problem.numbering.rows(schedule)
        timeline = simulate(schedule, costs)
        assert problem.judge(rows).makespan == timeline.makespan
        assert [problem.peak(row) for row in rows] == pytest.approx(
            list(timeline.peak_memory)
        )


def test_a_split_that_does_not_pay_is_not_made():
    costs = Costs(F=1.0, B=1.0, I=1.0, W=1.0)
    kinds = {a.kind for row in zero_bubble(2, 8, costs).actions for a in row}
    assert kinds == {"F", "B"}
    # And where it pays in the fill and the drain alone, there alone.
    costs = Costs(F=1.0, B=1.9, I=1.0, W=1.0)
    kinds = [a.kind for row in zero_bubble(2, 16, costs, memory=2).actions for a in row]
    assert kinds.count("B") > 2 * kinds.count("I") > 0


def test_the_same_twice():
    call = functools.partial(
        zero_bubble, 4, 8, Costs(F=UNEVEN[:4], transfer=0.1), memory=5.0
    )
    assert call() == call()
    assert call().name == "zero_bubble"


ERRORS = {
    "no device": (
        ValueError,
        "`zero_bubble\\(devices=0\\)`: devices must be",
        (0, 4),
        {},
    ),
    "no microbatch": (
        ValueError,
        "`zero_bubble\\(microbatches=0\\)`: microbatches must be at least 1",
        (4, 0),
        {},
    ),
    "no int": (
        TypeError,
        "`zero_bubble\\(devices=2.0\\)`: devices must be an int",
        (2.0, 4),
        {},
    ),
    "virtual": (
        ValueError,
        "`zero_bubble\\(virtual=0\\)`: virtual must be at least 1",
        (2, 4),
        {"virtual": 0},
    ),
    "a name": (
        ValueError,
        "placement='w'\\)`: 'one', 'v', 'looped', or the device",
        (2, 4),
        {"placement": "w"},
    ),
    "no map": (
        TypeError,
        "placement=3\\)`: 'one', 'v', 'looped', or the device",
        (2, 4),
        {"placement": 3},
    ),
    "no ints": (
        TypeError,
        "'one', 'v', 'looped', or the device",
        (2, 4),
        {"placement": (0, "1")},
    ),
    "no stage": (
        ValueError,
        "each of the devices 0 to 1 must have a stage",
        (2, 4),
        {"placement": (0, 0)},
    ),
    "no such device": (
        ValueError,
        "each of the devices 0 to 1 must have a stage",
        (2, 4),
        {"placement": (0, 1, 2)},
    ),
    "costs": (
        ValueError,
        "`Costs\\(F=\\(1.0,\\)\\)`: a number for each stage is needed, 2 in all, got 1",
        (2, 4, Costs(F=[1])),
        {},
    ),
    "negative": (
        ValueError,
        "`zero_bubble\\(memory=-1\\)`: finite and not negative",
        (2, 4),
        {"memory": -1},
    ),
    "NaN": (
        ValueError,
        "`zero_bubble\\(memory=nan\\)`: finite and not negative",
        (2, 4),
        {"memory": math.nan},
    ),
    "no number": (
        TypeError,
        "a number, or one number per device",
        (2, 4),
        {"memory": "4"},
    ),
    "per device": (
        ValueError,
        "`zero_bubble\\(memory=\\[4\\]\\)`: a number for each device is needed, 2 in "
        "all, got 1",
        (2, 4),
        {"memory": [4]},
    ),
    "too little": (
        ValueError,
        "`zero_bubble\\(memory=2.5\\)`: device 1 needs at least 3, what one microbatch "
        "holds on its stages 1, 3; "
        "all devices: 2, 3",
        (2, 4, Costs(memory=[1, 1, 1, 2])),
        {"memory": 2.5, "placement": "looped"},
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    kind, message, args, kwargs = ERRORS[name]
    with pytest.raises(kind, match=message):
        zero_bubble(*args, **kwargs)


def test_a_limit_that_the_message_names_is_enough():
    costs = Costs(memory=[1.0, 1.0, 1.0, 2.0], memory_w=5.0)
    schedule = zero_bubble(2, 4, costs, memory=[2.0, 3.0], placement="looped")
    assert simulate(schedule, costs).peak_memory == (2.0, 3.0)


def test_it_is_a_schedule_for_a_pipe():
    """`f(devices, microbatches)` is what a pipe calls."""
    schedule = functools.partial(zero_bubble, costs=Costs(transfer=0.1), memory=3.0)(
        2, 4
    )
    assert isinstance(schedule, schedules.Schedule)
    assert (schedule.devices, schedule.microbatches) == (2, 4)
