"""Stages that take time and launches that take time, both without the processor: what a
plan says of steps, and how long they take.
"""

import ctypes
import dataclasses
import itertools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import fpipe
from fpipe._executors.placed import dispatch
from fpipe._executors.placed.dispatch import Dispatch, with_calls
from fpipe._executors.placed.instructions import Run
from fpipe._executors.placed.threads import divide
from fpipe._executors.placed.watch import Span
from fpipe.schedules import Action, Costs, simulate

# The C library's `nanosleep`, as an operation of a program. A program that calls Python
# runs in the thread that launches it. One that calls C runs in a thread of its own, as
# programs do on other devices, so a launch returns at once.
jax.ffi.register_ffi_target(
    "fpipe_nanosleep",
    jax.ffi.pycapsule(ctypes.cast(ctypes.CDLL(None).nanosleep, ctypes.c_void_p)),
    platform="cpu",
    api_version=0,
)

WIDTH = 32
"""A program that XLA takes for a short one runs in the thread that launches it too."""


def after_a_sleep(seconds, *values):
    """Some arrays, so many seconds after all of them are there."""
    # XLA calls `nanosleep(result, arguments)`, and its own arguments are how long, and
    # where to write what is left of that. So the first argument lies where the result
    # does: an integer of 64 bits for seconds, and one for nanoseconds.
    whole = jnp.floor(seconds)
    nanoseconds = jnp.int32(1e9 * (seconds - whole))
    how_long = [jnp.int32(whole), jnp.int32(0), nanoseconds, jnp.int32(0)]
    call = jax.ffi.ffi_call(
        "fpipe_nanosleep",
        jax.ShapeDtypeStruct((4,), jnp.int32),
        input_output_aliases={0: 0},
        custom_call_api_version=3,
    )
    woken = call(jnp.stack(how_long), *values)
    # XLA does not know that this is always so.
    return [jnp.where(woken[1] == 0, value, -value) for value in values]


@jax.custom_vjp
def sleeping(params, x):
    w, seconds = params
    (y,) = after_a_sleep(x.shape[0] * seconds, x @ w)
    return y


def forward(params, x):
    return sleeping(params, x), (params, x)


def backward(residuals, g):
    (w, seconds), x = residuals
    # One sleep: two could be at once.
    of_w, of_x = after_a_sleep(2 * x.shape[0] * seconds, x.T @ g, g @ w.T)
    return (of_w, jnp.zeros_like(seconds)), of_x


sleeping.defvjp(forward, backward)


@dataclasses.dataclass
class Launches:
    """How many seconds the launch of an action takes, and when each was."""

    seconds: float = 0.0
    seen: dict[Action, Span] = dataclasses.field(default_factory=dict)

    def slow(self, step):
        actions = step.item.actions if isinstance(step.item, Run) else ()

        def launched(*arrays):
            started = time.perf_counter()
            if actions:
                time.sleep(self.seconds)  # without Python's lock
            made = step.call(*arrays)
            span = Span(started, time.perf_counter())
            self.seen.update(dict.fromkeys(actions, span))
            return made

        return launched


@pytest.fixture
def launches(monkeypatch):
    launches = Launches()

    def slow(*args):
        return with_calls(divide(*args), launches.slow)

    monkeypatch.setattr(dispatch, "divide", slow)
    return launches


def wait_for_each_other(seen):
    """Whether each launch begins when that of what its action needs has ended."""
    return all(
        seen[need].end <= span.start
        for (kind, stage, microbatch), span in seen.items()
        for need in [Action(kind, stage + (1 if kind == "B" else -1), microbatch)]
        if need in seen
    )


LAYERS, ROWS = 4, 32
OF_ROW, OF_LAUNCH = 0.3e-3, 10e-3
"""Seconds: the forward of a row in a layer, and a slow launch."""
APART = 1.15
"""The ratio of two plans above which their order has to be that of the steps."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a step runs.

    Attributes:
        chunks: the number of microbatches.
        launch: the seconds of a launch.
    """

    schedule: str
    chunks: int
    dispatch: Dispatch = "one_thread"
    launch: float = 0.0

    @property
    def slow(self):
        return dataclasses.replace(self, launch=OF_LAUNCH)


FEW, MANY = Setting("1f1b", 2), Setting("1f1b", 8)
INTERLEAVED = Setting("interleaved_1f1b", 2)
THREADS = Setting("1f1b", 8, "thread_per_device")
SETTINGS = [FEW, MANY, INTERLEAVED, THREADS, Setting("gpipe", 8)]


def test_steps_with_slow_launches_have_the_order_of_their_plans(launches):
    x = jnp.ones((ROWS, WIDTH))
    params = (jnp.eye(WIDTH), jnp.float32(OF_ROW))
    layer = fpipe.Layer(sleeping, lambda key, x: params, name="sleeping")
    planned: dict[Setting, float] = {}
    pipes: dict[Setting, fpipe.Pipe] = {}
    steps: dict[Setting, Any] = {}
    for one in SETTINGS:
        stages = fpipe.schedules.named(one.schedule, 2, one.chunks).stages
        pipe = pipes[one] = fpipe.Pipe(
            [layer] * LAYERS,
            [LAYERS // stages] * stages,
            chunks=one.chunks,
            checkpoint="never",
            schedule=one.schedule,
            dispatch=one.dispatch,
        )
        # A plan knows FLOPs, and not that they sleep.
        plan = pipe.plan(None, x, speed=2 * WIDTH**2 / OF_ROW, launch=OF_LAUNCH)
        assert any(text.startswith("host-bound") for text in plan.warnings)
        planned[one.slow] = plan.step
        forward = OF_ROW * ROWS / one.chunks * LAYERS / stages
        costs = Costs(F=forward, B=2 * forward)
        planned[one] = simulate(pipe.make_schedule(one.chunks), costs).makespan
        steps[one] = pipe.value_and_grad(jnp.mean)
        steps[one](pipe.place([params] * LAYERS), x)  # compiles
    # Slow launches turn these round.
    for more in (MANY, INTERLEAVED):
        assert planned[FEW] > APART * planned[more]
        assert planned[more.slow] > APART * planned[FEW.slow]
    assert planned[MANY.slow] > APART * planned[THREADS.slow]
    pairs = [
        (a, b)
        for a, b in itertools.permutations(planned, 2)
        if planned[b] > APART * planned[a]
    ]
    took = dict.fromkeys(planned, math.inf)
    # What else the machine does makes a step longer, never shorter, and by as much
    # however long the step sleeps. So the order is right when the machine is calm, and
    # also when everything sleeps longer.
    for times in (1, 1, 2, 4, 8, 16):
        slower = [(params[0], times * params[1])] * LAYERS
        for one in SETTINGS:
            placed = pipes[one].place(slower)
            for setting in (one, one.slow):
                launches.seconds = times * setting.launch
                launches.seen.clear()
                started = time.perf_counter()
                jax.block_until_ready(steps[one](placed, x))
                seconds = (time.perf_counter() - started) / times
                took[setting] = min(took[setting], seconds)
                assert wait_for_each_other(launches.seen)
        wrong = [(a, b) for a, b in pairs if took[a] >= took[b]]
        if not wrong:
            return
    raise AssertionError(wrong)
