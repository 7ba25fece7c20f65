"""Who dispatches: `dispatch="auto"` looks at what launches take."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fpipe
from fpipe._executors.placed import dispatch
from fpipe._executors.placed.dispatch import with_calls
from fpipe._executors.placed.instructions import Run
from fpipe._executors.placed.pace import LOOKED_AT, SLOW, Pace
from fpipe._executors.placed.threads import divide
from tests.executors.helpers import placed_executor
from tests.helpers import Case, assert_same, dense, mse

LAUNCHES = 10


class Watched:
    """In place of the watch: what it would count."""

    idle = 0
    launches = LAUNCHES

    def watched(self, step):
        return step.call


@pytest.fixture
def counted(monkeypatch):
    """How many launches find an idle device."""
    watched = Watched()
    monkeypatch.setattr("fpipe._executors.placed.pace._Watch", lambda: watched)
    return watched


def choices(seconds):
    """The choice after each of some calls, by the seconds that they take."""
    pace, found = Pace(threaded=False, is_open=True), []
    for took in seconds:
        if pace.is_open:
            times = iter([0.0, took])
            pace.look(lambda watched: None, lambda times=times: next(times))
        found.append("threads" if pace.threaded else "one")
    return found, pace.is_open


CALL = LAUNCHES * SLOW
"""The seconds of a call whose launches are just slow enough."""


@pytest.mark.quick
def test_threads_are_tried_where_launches_are_slow_and_devices_wait_and_stay_if_faster(
    counted,
):
    counted.idle = LAUNCHES
    slow = [9.0, 2 * CALL, CALL, 2 * CALL]
    # The first call of each choice is not looked at, and the shortest counts.
    one, each = ["one"] * LOOKED_AT, ["threads"] * (LOOKED_AT + 1)
    faster = [9.0, CALL, 0.9 * CALL, CALL]
    assert choices([*slow, *faster, 9.0]) == (
        [*one, *each, "threads", "threads"],
        False,
    )
    no_faster = [9.0, CALL, 0.95 * CALL, CALL]
    assert choices([*slow, *no_faster, 9.0]) == ([*one, *each, "one", "one"], False)


def test_one_thread_stays_where_launches_are_fast_or_devices_are_busy(counted):
    counted.idle = LAUNCHES
    fast = [9.0, *[0.9 * CALL] * LOOKED_AT]
    assert choices([*fast, 9.0]) == (["one"] * 5, False)
    counted.idle = LAUNCHES // 2
    assert choices([9.0, *[9 * CALL] * LOOKED_AT, 9.0]) == (["one"] * 5, False)


@pytest.fixture
def slow_launches(monkeypatch):
    """Launches that sleep, without Python's lock, until their program is done."""

    def slow(step):
        def launched(*arrays):
            if isinstance(step.item, Run):
                time.sleep(4 * SLOW)
            return jax.block_until_ready(step.call(*arrays))

        return launched

    monkeypatch.setattr(
        dispatch, "divide", lambda *args: with_calls(divide(*args), slow)
    )


@pytest.mark.usefixtures("slow_launches")
def test_slow_launches_get_a_thread_for_each_device_and_results_do_not_change():
    case = Case([dense()] * 4, 4)
    want = case.reference.value_and_grad(mse)(case.params(), case.x, case.target)
    threaded = {}
    for choice in ("auto", "one_thread"):
        pipe = fpipe.Pipe(case.layers, chunks=4, dispatch=choice)
        params, step = pipe.place(case.params()), pipe.value_and_grad(mse)
        results = []
        for _ in range(2 * LOOKED_AT + 3):
            results.append(jax.tree.map(np.asarray, step(params, case.x, case.target)))
            (bound,) = placed_executor(pipe)._plans.values()
            threaded.setdefault(choice, []).append(bound.threaded)
        (bound,) = placed_executor(pipe)._plans.values()
        assert not bound.pace.is_open
        assert_same(results[0], want)
        for again in results[1:]:
            jax.tree.map(np.testing.assert_array_equal, again, results[0])
    switch = LOOKED_AT
    assert threaded["auto"] == [False] * switch + [True] * (LOOKED_AT + 3)
    assert not any(threaded["one_thread"])


@pytest.mark.usefixtures("slow_launches")
def test_a_recorded_call_and_halves_of_a_call_decide_nothing():
    pipe = fpipe.Pipe([dense()] * 2, chunks=2)
    x = jnp.ones((4, 4))
    params = pipe.init(jax.random.key(0), x)
    for _ in range(LOOKED_AT + 2):
        with fpipe.record(pipe):
            pipe(params, x)
    (bound,) = placed_executor(pipe)._plans.values()
    assert bound.pace == Pace(threaded=False, is_open=True)
