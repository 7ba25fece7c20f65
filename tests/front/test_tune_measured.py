"""`tune(measure=k)`: the best predictions run, and the shortest step is chosen. Times
are given by the tests, so that nothing depends on the machine.
"""

import functools
import html
import weakref

import jax
import jax.numpy as jnp
import pytest

import fpipe
from fpipe import _measured_steps
from tests.helpers import assert_same, counter, dense, dropout, mse, raises

X = jax.ShapeDtypeStruct((4, 4), jnp.float32)
LAYERS = [dense()] * 2
GIVEN = {
    "devices": jax.devices()[:2],
    "chunks": 2,
    "checkpoints": "never",
    "schedules": ["gpipe", "1f1b", "zb_h1"],
}


@pytest.fixture
def clock(monkeypatch):
    """A function that sets what a step of a pipe takes, in seconds; an exception is
    raised. It returns the runs: the pipe's schedule, the steps that do not count and
    those that do, and what the step returned.
    """

    def use(seconds, launch=0.0, run=False):
        log = []

        def runs(step, arguments, warm_up, repeats):
            made = step(*arguments()) if run else None
            log.append((step.pipe.schedule, warm_up, repeats, made))
            own = seconds(step.pipe)
            if isinstance(own, Exception):
                raise own
            # A machine that is busy makes some runs longer.
            times = [own * (1 + (len(log) + n) % 3) for n in range(repeats)]
            return [_measured_steps.StepTime(time, launch * time) for time in times]

        monkeypatch.setattr(_measured_steps, "runs", runs)
        return log

    return use


@functools.cache
def predicted(speed=None):
    """The predicted step of each schedule, the best first."""
    candidates = fpipe.tune(LAYERS, X, **GIVEN, speed=speed).candidates
    return {c.schedule: c.prediction.step for c in candidates if c.prediction}


def test_without_measure_nothing_runs(clock):
    log = clock(lambda pipe: 1.0)
    tuning = fpipe.tune(LAYERS, X, **GIVEN)
    assert log == []
    assert {(c.measured, c.launched, c.ratio) for c in tuning.candidates} == {
        (None, None, None)
    }
    assert "measured" not in str(tuning)


def test_the_measured_best_is_chosen_and_the_text_says_why(clock):
    steps = predicted(speed=1e6)
    first, second, third = steps
    # The prediction is right for the second, and the first takes three times as long.
    seconds = {first: 3 * steps[first], second: steps[second]}
    log = clock(lambda pipe: seconds[pipe.schedule], launch=0.9)
    tuning = fpipe.tune(LAYERS, X, **GIVEN, speed=1e6, measure=2)
    # In turns; the first steps of the placed executor also find how it dispatches.
    assert [run[:3] for run in log] == [
        (first, 8, 3),
        (second, 8, 3),
        *[(first, 1, 3), (second, 1, 3)] * 2,
    ]
    assert tuning.pipe.schedule == second
    assert [c.schedule for c in tuning.candidates] == [second, first, third]
    a, b, rest = tuning.candidates
    assert a.measured == steps[second]
    assert a.launched == pytest.approx(0.9 * steps[second])
    assert b.ratio == pytest.approx(3)
    assert (rest.measured, rest.ratio) == (None, None)
    lines = tuning.why.split("\n- ")
    longer = seconds[first] / seconds[second] - 1
    assert f"the next best schedule ({first}) takes {longer:.1%} longer" in lines
    assert (
        f"predicted as the best was {first}, chunks=2, checkpoint='never'; measured, "
        f"it takes {longer:.1%} longer"
    ) in lines
    assert (
        f"{first}, chunks=2, checkpoint='never': measured 3.00 times the prediction"
    ) in lines
    assert any(line.startswith("the host launches for ") for line in lines)
    assert "these devices are of one CPU, and share its cores" in lines
    assert not any("FLOPs" in line for line in lines)
    head, *rows = str(tuning).splitlines()
    assert head.split()[4:7] == ["step", "measured", "ratio"]
    assert [len(row.split()) for row in rows[:3]] == [13, 13, 10]
    page = html.unescape(tuning._repr_html_())
    assert all(line in page for line in lines)


def test_a_step_as_predicted_is_no_reason(clock):
    steps = predicted(speed=1e6)
    first, *_ = steps
    clock(lambda pipe: steps[pipe.schedule] * (1.2 if pipe.schedule == first else 1))
    tuning = fpipe.tune(LAYERS, X, **GIVEN, speed=1e6, measure=3)
    assert "times the prediction" not in tuning.why
    assert "the host" not in tuning.why


def test_predictions_in_flops_are_compared_by_their_ratios(clock):
    first, *_ = predicted()
    clock(lambda pipe: 4.0 if pipe.schedule == first else 1.0)
    tuning = fpipe.tune(LAYERS, X, **GIVEN, measure=9)  # more than there are
    assert all(c.measured is not None for c in tuning.candidates)
    best, last = tuning.candidates[0], tuning.candidates[-1]
    assert best.prediction is not None
    assert last.prediction is not None
    assert (best.ratio, last.schedule) == (1.0, first)
    want = 4 * best.prediction.step / last.prediction.step
    assert last.ratio == pytest.approx(want)
    assert "predictions are in FLOPs: only their order and their ratios" in tuning.why
    assert f"measured {want:.2f} times the prediction, compared with" in tuning.why


def test_a_candidate_that_fails_is_refused_and_the_others_run(clock):
    first, second, third = predicted()
    error = MemoryError("no room for 8 bytes\nand much more")
    log = clock(lambda pipe: error if pipe.schedule == first else 1.0)
    tuning = fpipe.tune(LAYERS, X, **GIVEN, measure=2)
    assert [run[0] for run in log] == [first, second, second, second]
    assert [c.schedule for c in tuning.candidates] == [second, third, first]
    refused = "failed when it ran: MemoryError: no room for 8 bytes"
    assert tuning.candidates[-1].refused == refused
    assert f"{first}, chunks=2, checkpoint='never': {refused}" in tuning.why
    assert "do not fit" not in tuning.why
    assert str(tuning).splitlines()[3].endswith(refused)
    clock(lambda pipe: error)
    reason = "MemoryError: no room for 8 bytes"
    with raises(
        RuntimeError,
        "`fpipe.tune(measure=...)`: every candidate that was to be measured failed:"
        + "".join(
            f"\n- {name}, chunks=2, checkpoint='never': {reason}"
            for name in (first, second)
        ),
    ):
        fpipe.tune(LAYERS, X, **GIVEN, measure=2)


def test_none_that_is_too_large_runs(clock):
    log = clock(lambda pipe: 1.0)
    none = fpipe.tune(LAYERS, X, **GIVEN, memory=8, offloads=[None], measure=3)
    assert log == []
    with pytest.raises(ValueError, match="no candidate fits"):
        none.pipe  # noqa: B018


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_a_step_is_the_one_of_the_call_with_given_parameters_or_zeros(clock, executor):
    log = clock(lambda pipe: 1.0, run=True)
    x = jnp.arange(16.0).reshape(4, 4) / 16
    options = {**GIVEN, "schedules": "1f1b", "executor": executor}
    params = fpipe.sequential(LAYERS).init(jax.random.key(0), x)

    def loss(params, x):
        tuning = fpipe.tune(
            LAYERS, x, X, loss_fn=mse, params=params, measure=1, **options
        )
        assert tuning.pipe.executor == executor
        turns = [made[0] for *_, made in log]
        log.clear()
        assert len({float(turn) for turn in turns}) == 1
        return turns[0]

    def want(params, x):
        return mse(fpipe.sequential(LAYERS)(params, x), jnp.zeros((4, 4)))

    assert_same(jax.device_get(loss(params, x)), jax.device_get(want(params, x)))
    # Scaled by zero weights, the outputs are those of zeros; so is a batch of shapes.
    zeros = jax.tree.map(jnp.zeros_like, params)
    for given in (None, jax.eval_shape(lambda: params)):
        got = loss(given, x)
        assert_same(jax.device_get(got), jax.device_get(want(zeros, x)))
    got = loss(params, X)
    assert_same(jax.device_get(got), jax.device_get(want(params, jnp.zeros((4, 4)))))
    if executor == "scan":
        packed = fpipe.Pipe(LAYERS, devices=GIVEN["devices"], executor="scan").place(
            params
        )
        got = loss(packed, x)
        assert_same(jax.device_get(got), jax.device_get(want(params, x)))


def test_parameters_of_a_candidate_go_before_the_next_one(monkeypatch):
    seen = []

    def runs(step, arguments, warm_up, repeats):
        del warm_up
        assert [ref() for ref in seen] == [None] * len(seen)
        seen[:] = [weakref.ref(a) for a in jax.tree.leaves(arguments())]
        assert seen
        return [_measured_steps.StepTime(1.0, 0.0)] * repeats

    monkeypatch.setattr(_measured_steps, "runs", runs)
    fpipe.tune(LAYERS, X, **GIVEN, measure=2)


def test_states_keys_and_steps_really_run():
    """With the clock of the machine: only that all runs."""
    tuning = fpipe.tune(
        [dense(), counter(), dropout()],
        X,
        **{**GIVEN, "schedules": "1f1b"},
        key=jax.eval_shape(lambda: jax.random.key(0)),
        train=True,
        measure=1,
    )
    assert tuning.best.measured is not None
    assert tuning.best.launched is not None
    assert tuning.best.measured >= tuning.best.launched > 0


def test_of_a_function_the_steps_are_measured_too(clock):
    log = clock(lambda pipe: 1.0, run=True)

    def loss_fn(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    params, x = [jnp.eye(4)] * 2, jnp.ones((4, 4))
    step = fpipe.value_and_grad(loss_fn, devices=GIVEN["devices"], chunks=2)
    tuning = step.tune(params, x, schedules="1f1b", checkpoints="never", measure=1)
    assert step.with_pipe(tuning.pipe).pipe == tuning.pipe
    *_, made = log[0]
    assert_same(jax.device_get(made[0]), jax.device_get(loss_fn(params, x)))


def test_what_was_compiled_serves_the_chosen_pipe(clock):
    clock(lambda pipe: 1.0, run=True)
    traced = []

    def loss_fn(y):
        traced.append(y.shape)
        return jnp.mean(y**2)

    x = jnp.ones((4, 4))
    options = {**GIVEN, "schedules": "1f1b"}
    pipe = fpipe.tune(LAYERS, x, loss_fn=loss_fn, measure=1, **options).pipe
    params = pipe.init(jax.random.key(0), x)
    before = len(traced)
    pipe.value_and_grad(loss_fn)(params, x)
    assert len(traced) == before > 0


def test_wrong_numbers_of_candidates():
    with raises(ValueError, "`fpipe.tune(measure=-1)`: measure must be at least 0"):
        fpipe.tune(LAYERS, X, measure=-1)
    for wrong in (1.5, True):
        with raises(
            TypeError, f"`fpipe.tune(measure={wrong})`: measure must be an int"
        ):
            fpipe.tune(LAYERS, X, measure=wrong)  # type: ignore[arg-type]
