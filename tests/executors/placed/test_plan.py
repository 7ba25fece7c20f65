"""What is issued, in which order, where it goes, and how much is alive meanwhile."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

import fpipe
from fpipe._executors.placed import instructions, lower
from fpipe._executors.placed.instructions import Free, Move, Run
from fpipe.schedules import Costs, simulate
from tests.executors.helpers import observing, plan_of
from tests.helpers import Case, add, assert_same, keep, look, models, mse

SCHEDULES = ["gpipe", "1f1b", "eager_1f1b"]
STAGES = 4


def record(run):
    """The instructions that a call issues, each with the live arrays of all slots right
    after it.
    """
    seen = []
    with observing(
        lambda item, slots: seen.append((item, [a for a in slots if a is not None]))
    ):
        run()
    return seen


def actions(run):
    return [
        action
        for item, _ in record(run)
        if isinstance(item, Run)
        for action in item.actions
    ]


def by_device(schedule, issued):
    return tuple(
        tuple(a for a in issued if schedule.stage_to_device[a.stage] == d)
        for d in range(schedule.devices)
    )


def call(layers, balance, chunks, rows=8, **options):
    """A pipe and its training step as a function of nothing."""
    case = Case(layers, chunks, rows)
    pipe = fpipe.Pipe(layers, balance, chunks=chunks, **options)
    params = pipe.place(case.params())
    step = pipe.value_and_grad(mse)
    return pipe, lambda: step(params, case.x, case.target, **case.needs)


@pytest.mark.quick
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_value_and_grad_issues_what_the_schedule_says(schedule):
    pipe, step = call(models()["plain"], [1, 1, 1, 1], 8, schedule=schedule)
    assert (
        by_device(pipe.make_schedule(8), actions(step)) == pipe.make_schedule(8).actions
    )


@pytest.mark.parametrize("model", ["plain", "jump2"])
def test_what_goes_to_another_process_goes_when_it_is_made(monkeypatch, model):
    """Each device as a process of its own: nothing runs between a program and the moves
    of what it makes.
    """
    plans = []
    for crosses in (False, True):
        with monkeypatch.context() as patch:
            if crosses:
                patch.setattr(lower, "_crosses", lambda source, target: True)
            case = Case(models()[model], 8)
            pipe = fpipe.Pipe(models()[model], [1, 1, 1, 1], chunks=8)
            pipe.plan(case.params(), case.x, case.target, loss_fn=mse)
        plans.append(plan_of(pipe))
    late, early = plans
    # The same programs, in one order, and the same moves.
    actions = [
        [item.actions for item in plan.instructions if isinstance(item, Run)]
        for plan in plans
    ]
    assert actions[0] == actions[1]
    moved = [
        {
            plan.slots[slot]
            for item in plan.instructions
            if isinstance(item, Move)
            for slot in item.outs
        }
        for plan in plans
    ]
    assert moved[0] == moved[1] != set()

    def programs_between(plan):
        """How many run between the program that makes an array and its move."""
        counts, made = [], {}
        ran = 0
        for item in plan.instructions:
            if isinstance(item, Run):
                ran += 1
                made.update(dict.fromkeys(item.outs, ran))
            elif isinstance(item, Move):
                counts.append(ran - max(made[slot] for slot in item.ins))
        return counts

    assert set(programs_between(early)) == {0}
    assert max(programs_between(late)) > 0


def test_a_hand_written_schedule_is_obeyed():
    rows = [
        [("F", 0, 1), ("F", 0, 0), ("B", 0, 1), ("B", 0, 0)],
        [("F", 1, 1), ("B", 1, 1), ("F", 1, 0), ("B", 1, 0)],
    ]
    schedule = fpipe.schedules.Schedule(rows)
    _, step = call(models()["plain"], [2, 2], 2, schedule=schedule)
    assert by_device(schedule, actions(step)) == schedule.actions


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_differentiated_call_runs_all_forwards_then_all_backwards(schedule):
    layers = models()["plain"]
    case, pipe = (
        Case(layers, 4),
        fpipe.Pipe(layers, [1, 1, 1, 1], chunks=4, schedule=schedule),
    )
    params = pipe.place(case.params())
    issued = actions(lambda: jax.grad(lambda p: jnp.mean(pipe(p, case.x) ** 2))(params))
    kinds = "".join(a.kind for a in issued)
    assert kinds[:16] == "F" * 16
    # The last microbatch recomputes nothing, and the last stage does so in `B`.
    assert Counter(kinds[16:]) == {"B": 16, "R": 3 * 3}
    for kind in "FRB":
        for s in range(STAGES):
            mine = tuple(a.microbatch for a in issued if (a.kind, a.stage) == (kind, s))
            assert mine == pipe.make_schedule(4).order(kind, s)


def test_evaluate_and_a_plain_call_run_forwards_only():
    layers = models()["plain"]
    case, pipe = Case(layers, 4), fpipe.Pipe(layers, [2, 2], chunks=4)
    params = pipe.place(case.params())
    for run in (
        lambda: pipe(params, case.x),
        lambda: pipe.evaluate(mse)(params, case.x, case.target),
    ):
        assert {(a.kind, a.stage, a.microbatch) for a in actions(run)} == {
            ("F", s, i) for s in (0, 1) for i in range(4)
        }


def test_a_skip_and_its_gradient_go_straight_between_stash_and_pop():
    middle = models()["plain"][0]
    pipe, step = call([middle, keep(), middle, middle, add()], [2, 1, 1, 1], 2)
    routes = set()
    for item, _ in record(step):
        plan = plan_of(pipe)
        if isinstance(item, Move):
            skips = [plan.slots[n] for n in item.ins if "skip" in plan.slots[n].name]
            routes |= {(str(slot.placement), str(item.placement)) for slot in skips}
    first, *_, last = map(str, pipe.devices)
    assert routes == {(first, last), (last, first)}


def test_no_other_device_ever_holds_a_skip():
    """Told from the arrays themselves: the skip is the only array with 5 columns."""

    @fpipe.skippable(stash=["wide"])
    @fpipe.fn
    def widen(x, *, carry):
        return x, fpipe.stash(carry, "wide", jnp.concatenate([x, x[:, :1]], 1))

    @fpipe.skippable(pop=["wide"])
    @fpipe.fn
    def narrow(x, *, carry):
        wide, carry = fpipe.pop(carry, "wide")
        return x * wide[:, 4:] + wide[:, :4], carry

    middle = models()["plain"][0]
    layers = [middle, widen, middle, narrow]
    case, pipe = (
        Case(layers, 2),
        fpipe.Pipe(layers, [1, 1, 1, 1], chunks=2, checkpoint="never"),
    )
    params = pipe.place(case.params())
    step = pipe.value_and_grad(mse)
    holders = set()
    for _, alive in record(lambda: step(params, case.x, case.target)):
        holders |= {d for a in alive if a.shape == (5, 5) for d in a.devices()}
    assert holders == {pipe.devices[1], pipe.devices[3]}


def test_readers_of_one_skip_each_get_it_once():
    layers = [keep(), look(), look(), add()]
    pipe, step = call(layers, [1, 1, 1, 1], 2, checkpoint="always")
    step()
    plan = plan_of(pipe)
    moved = [
        (plan.slots[n].name, str(item.placement))
        for item in plan.instructions
        if isinstance(item, Move)
        for n in item.ins
    ]
    assert len(set(moved)) == len(moved)
    assert {d for name, d in moved if name == "skip skip[0] stage0 mb0"} == set(
        map(str, pipe.devices[1:])
    )


def test_nothing_moves_between_stages_on_one_device():
    layers = models()["nested"]
    devices = [jax.devices()[0]] * 3
    _, step = call(layers, [2, 1, 2], 3, devices=devices)
    assert not [item for item, _ in record(step) if isinstance(item, Move)]


def test_each_slot_is_made_once_and_freed_once_after_its_last_use():
    for name, layers in models().items():
        case, pipe = (
            Case(layers, 3),
            fpipe.Pipe(layers, [1, 1, 1, len(layers) - 3], chunks=3),
        )
        params, needs = pipe.place(case.params()), case.needs
        pipe.value_and_grad(mse)(params, case.x, case.target, **needs)
        plan = plan_of(pipe)
        made = [feed.slot for feed in plan.feeds] + list(plan.constants)
        dead: set[int] = set()
        inside: set[int] = set()
        for item in plan.instructions:
            if isinstance(item, Free):
                assert not dead.intersection(item.slots), name
                dead.update(item.slots)
                continue
            assert not dead.intersection(item.ins), name
            assert set(item.ins) <= set(made), name
            made += item.outs
            if isinstance(item, Run):
                # What stays inside a program is in no slot.
                inside.update(item.inside)
        assert len(set(made)) == len(made), name
        assert not inside & set(made), name
        outputs = {
            n for out in (plan.loss, *plan.state.values()) if out for n in out.slots
        } | set(plan.gradients.values())
        held = dead | outputs | set(plan.constants)
        assert set(range(len(plan.slots))) == held | inside, name
        assert not dead & outputs, name


def widening():
    """Four layers whose inputs have 5, 6, 7, 8 columns: a shape tells whose input an
    array is.
    """

    def layer(width):
        return fpipe.Layer(
            lambda p, x: jnp.tanh(x @ p),
            lambda key, x: jnp.full((x.shape[-1], width), 0.1),
        )

    return [layer(width) for width in (6, 7, 8, 9)]


def peak_alive(schedule, microbatches, checkpoint):
    """The most microbatch inputs alive at once on each stage, counted among all arrays
    there are.
    """
    pipe = fpipe.Pipe(
        widening(),
        [1] * STAGES,
        chunks=microbatches,
        schedule=schedule,
        checkpoint=checkpoint,
    )
    rows = 3
    x = jnp.ones((rows * microbatches, 5))
    params = pipe.init(jax.random.key(0), x)
    step = pipe.value_and_grad(lambda y: jnp.mean(y**2))
    jax.block_until_ready(step(params, x))
    peak = [0] * STAGES

    def count(item, slots):
        del item, slots
        arrays = jax.live_arrays()
        for s in range(1, STAGES):
            boundaries = [a for a in arrays if a.shape == (rows, 5 + s)]
            here = [a for a in boundaries if a.devices() == {pipe.devices[s]}]
            peak[s] = max(peak[s], len(here))

    with observing(count):
        step(params, x)
    return peak[1:]


# The last stage recomputes nothing under 1F1B, and all others do, in an action of their
# own. So it runs ahead, and cotangents that it has made wait there until they are read.
# They have the shapes of its inputs.


def test_1f1b_holds_at_most_s_minus_s_microbatches():
    assert peak_alive("1f1b", 8, "always") == [3, 2, 1 + waiting("1f1b", 8)]
    assert waiting("1f1b", 8) == 1


def test_gpipe_holds_all_microbatches():
    assert peak_alive("gpipe", 8, "always") == [8, 8, 8]


def test_eager_1f1b_holds_twice_as_many_as_1f1b_less_one():
    assert peak_alive("eager_1f1b", 8, "always") == [5, 3, 1 + waiting("eager_1f1b", 8)]
    assert waiting("eager_1f1b", 8) == 2


def waiting(schedule, microbatches):
    """The most cotangents that the last stage has made, and the one before has not read
    when the last stage starts another forward; in the order of launches.
    """
    options = {"schedule": schedule, "checkpoint": "always"}
    pipe = fpipe.Pipe(widening(), chunks=microbatches, **options)
    last = STAGES - 1
    most = made = read = 0
    timeline = simulate(pipe.make_schedule(microbatches), Costs(launch=1e-9))
    for kind, stage, _ in [launch.action for launch in timeline.launches]:
        if (kind, stage) == ("F", last):
            most = max(most, made - read)
        made += (kind, stage) == ("B", last)
        read += (kind, stage) == ("B", last - 1)
    return most


def test_without_remat_1f1b_still_holds_the_schedules_peak():
    # The residuals are the output tanh(x @ w), of the next stage's width, and the
    # input: no more microbatches.
    assert peak_alive("1f1b", 8, "never") == [3, 2, 1]


def test_a_forward_keeps_nothing():
    """However many microbatches there are, a stage holds no more inputs than it is
    working on.
    """
    pipe = fpipe.Pipe(widening(), [1] * STAGES, chunks=16)
    x = jnp.ones((48, 5))
    params = pipe.init(jax.random.key(0), x)
    pipe(params, x)
    for run in (
        lambda: pipe(params, x),
        lambda: pipe.evaluate(lambda y: jnp.mean(y))(params, x),
    ):
        run()
        peak = 0
        for _, alive in record(run):
            inner = [a for a in alive if a.shape in {(3, 6), (3, 7), (3, 8)}]
            peak = max(peak, len(inner))
        assert 0 < peak <= 2 * (STAGES - 1)  # one per stage, and one on its way


def test_outputs_that_are_inputs_cost_no_copy():
    """A layer that stashes what it passes on: one array, not two."""

    @fpipe.skippable(stash=["same"])
    def fork(params, x, *, carry):
        y = jnp.tanh(x * params)
        return y, fpipe.stash(carry, "same", y)

    @fpipe.skippable(pop=["same"])
    def join(params, x, *, carry):
        same, carry = fpipe.pop(carry, "same")
        return x * params + same, carry

    pipe = fpipe.Pipe([fork, join], [1, 1], chunks=2)
    params = pipe.place((jnp.ones(4), jnp.ones(4)))
    pipe(params, jnp.ones((4, 4)))
    plan = plan_of(pipe)
    forwards = [
        item
        for item in plan.instructions
        if isinstance(item, Run) and item.name == "stage0_F"
    ]
    assert [len(item.outs) for item in forwards] == [1, 1]
    assert [len(item.ins) for item in plan.instructions if isinstance(item, Move)] == [
        1,
        1,
    ]


def test_borrowed_parameters_are_moved_once_per_call():
    layers = models()["tied"]
    pipe, step = call(layers, [1, 1, 1, 1], 4)
    step()
    plan = plan_of(pipe)
    moved = [
        plan.slots[n].name
        for item in plan.instructions
        if isinstance(item, Move)
        for n in item.ins
    ]
    assert [name for name in moved if name.startswith("params")] == [
        "params 0[1]"
    ]  # of bias and weight, the weight


def test_inputs_go_straight_to_the_pieces_of_a_function_that_read_them():
    """No program of the first stage takes them, and fewer arrays move than where they
    go by way of it.
    """

    def fn(params, x):
        h = fpipe.cut(jnp.tanh(x["image"] @ params["a"]))
        h = fpipe.cut(jnp.tanh(h @ params["b"]) * x["scale"])
        picked = jnp.take_along_axis(h @ params["c"], x["label"], 1)
        return (picked - x["target"]) ** 2 + x["image"]

    params = {name: jnp.eye(3) for name in "abc"}
    x = {
        "image": jnp.ones((6, 3)),
        "label": jnp.zeros((6, 1), int),
        "scale": fpipe.NoChunk(jnp.float32(2.0)),
        "target": jnp.ones((6, 1)),
    }
    row = {name: a if name == "scale" else a[:2] for name, a in x.items()}
    split, moved = fpipe.split(fn, params, row), []
    for layers, own in (
        (split, params),
        (split.layers, split.params(params)),
    ):
        pipe = fpipe.Pipe(layers, devices=jax.devices()[:3], chunks=3)
        pipe.value_and_grad(jnp.mean)(pipe.place(own), x)
        plan = plan_of(pipe)
        runs = [item for item in plan.instructions if isinstance(item, Run)]
        taken = [
            {
                plan.slots[n].name
                for item in runs
                if item.name.startswith(f"stage{stage}_")
                for n in item.ins
            }
            for stage in range(3)
        ]
        moves = [item for item in plan.instructions if isinstance(item, Move)]
        moved.append(sum(len(item.ins) for item in moves))
        if layers is split:
            inputs = [{n for n in own if n[:2] in ("x[", "si")} for own in taken]
            assert [len(own) for own in inputs] == [1, 1, 2]
            assert inputs[0] == {"x[0]"}
    # Three labels and three targets, and the scale once. The image stays a skip.
    assert moved[1] - moved[0] == 7


def test_a_plan_reads_as_text():
    pipe, step = call([keep(), add()], [1, 1], 1)
    step()
    text = str(plan_of(pipe))
    for line in (
        f"{pipe.devices[0]}: F(0,0) (",
        f"{pipe.devices[0]} -> {pipe.devices[1]}: ",
        "free ",
    ):
        assert line in text


def bare(x, **options):
    """A pipe of two stages with one parameter array each, and its parameters."""
    layer = fpipe.Layer(
        lambda w, x: jnp.tanh(x @ w), lambda key, x: jnp.eye(x.shape[-1])
    )
    pipe = fpipe.Pipe([layer, layer], [1, 1], chunks=1, **options)
    return pipe, pipe.init(jax.random.key(0), x)


def test_the_plan_that_is_drawn_in_the_module_is_the_plan():
    x = jnp.ones((8, 3))
    pipe, params = bare(x)
    pipe.value_and_grad(lambda y, t: jnp.mean(y - t))(params, x, x)
    text = str(plan_of(pipe))
    for number, device in enumerate(pipe.devices):
        text = text.replace(str(device), f"cpu:{number}")
    drawing = str(instructions.__doc__).split("\n\n")[3]
    assert drawing.replace("\n        ->", " ->").split("\n") == [
        f"    {line}" for line in text.split("\n")
    ]


def test_what_is_still_on_a_device_is_not_moved_back_to_it():
    """A value that a later stage passes on as it is."""

    @fpipe.skippable(stash=["same"])
    @fpipe.fn
    def fork(x, *, carry):
        return jnp.sin(x), fpipe.stash(carry, "same", x)

    @fpipe.skippable(pop=["same"])
    @fpipe.fn
    def join(x, *, carry):
        same, carry = fpipe.pop(carry, "same")
        return x * same, carry

    first, second = jax.devices()[:2]
    layers = [fpipe.fn(jnp.tanh), fork, join]
    pipe = fpipe.Pipe(layers, [1, 1, 1], [first, second, first], chunks=2)
    x = jnp.ones((4, 4))
    got = pipe(((),) * 3, x)
    assert_same(got, fpipe.sequential(layers, chunks=2)(((),) * 3, x))
    plan = plan_of(pipe)
    moved = [
        plan.slots[n].name
        for item in plan.instructions
        if isinstance(item, Move)
        for n in item.ins
    ]
    assert sorted(moved) == [f"y[0] stage{s} mb{i}" for s in range(2) for i in range(2)]


def test_orders_are_the_same_in_every_run():
    layers = [dataclasses.replace(layer) for layer in models()["nested"]]
    texts = []
    for _ in range(2):
        pipe, step = call(layers, [2, 1, 2], 3)
        step()
        texts.append(str(plan_of(pipe)))
    assert texts[0] == texts[1]
