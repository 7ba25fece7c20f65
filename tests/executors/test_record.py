"""Recording: what ran when, as it was and as it is drawn, and names in profiles."""

import _thread
import dataclasses
import functools
import gc
import itertools
import json
import math
import threading
import time
import weakref
import xml.etree.ElementTree as ET
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import fpipe
import fpipe.plot
from fpipe._executors.placed.dispatch import ReadyPlan
from fpipe._executors.placed.instructions import Half, Move, Run
from fpipe._executors.placed.watch import Lane, Seen, Span, Watch, WatchedCall
from fpipe._executors.scan import clock as _clock
from fpipe._executors.scan import executor as _executor
from fpipe._executors.scan.machine import Segment
from fpipe.schedules import Action, Costs, Event, Timeline, draw, simulate, svg
from tests.executors.cut_layers import COLUMNS, FULLY_SHARDED, ROWS, WIDE
from tests.executors.helpers import observing, placed_executor, plan_of
from tests.executors.placed.test_dispatch import ERRORS, Host
from tests.executors.scan.test_scan import collectives
from tests.front.test_calls import BoomError, Trigger, notes
from tests.helpers import (
    Case,
    Clock,
    assert_same,
    dense,
    eventually,
    models,
    mse,
    noise,
    raises,
)

M = 4
X = jnp.arange(M, dtype=jnp.float32)[:, None] + jnp.zeros(
    (1, 2)
)  # a row for each microbatch: its number
TIMES: dict[str, Any] = {"F": 0.004, "I": 0.006, "W": 0.005}
LEAST: dict[str, Any] = {**TIMES, "B": 0.006}  # its two callbacks may run at once


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("fpipe")] == []


def sleepers(stages):
    """Layers that sleep: in a forward, in an input gradient, in a weight gradient."""
    host = Host()
    host.trigger = lambda kind, stage, microbatch: time.sleep(TIMES[kind])
    return [host.layer(s) for s in range(stages)]


@functools.cache
def slept(schedule, executor="placed"):
    """A recorded step of layers that sleep, the pipe, and the step's results, recorded
    and not.
    """
    stages = (
        fpipe.schedules.named(schedule, 2, M).stages if executor == "scan" else None
    )
    stages = (
        stages
        or fpipe.schedules.named(
            schedule, 2 if fpipe.schedules.NAMES[schedule].per_device != 1 else 3, M
        ).stages
    )
    pipe = fpipe.Pipe(
        sleepers(stages),
        chunks=M,
        checkpoint="never",
        schedule=schedule,
        executor=executor,
    )
    params = pipe.init(jax.random.key(0), X)
    step = (
        (lambda p, x: pipe(p, x))
        if schedule == "forward_only"
        else pipe.value_and_grad(jnp.mean, argnums=(0, 1))
    )
    want = jax.tree.map(np.asarray, step(params, X))
    got, timeline = pipe.record(step, params, X)
    return timeline, pipe, got, want


def rows(timeline):
    """The actions of each device in the order in which they ran."""
    out: Any = [[] for _ in range(timeline.devices)]
    assert sorted(timeline.events, key=lambda e: e.start) == list(timeline.events)
    for e in timeline.events:
        out[e.device].append(e.action)
    return tuple(map(tuple, out))


def check_dependencies(timeline, stages):
    at = {e.action: e for e in timeline.events}
    for (kind, s, i), e in at.items():
        if kind == "F":
            needs = [Action("F", s - 1, i)]
        elif kind == "W":
            needs = [Action("I", s, i)]
        elif kind == "R":
            needs = [Action("F", s, i)]
        else:
            needs = [
                Action("F", s, i),
                *(
                    [Action("B", s + 1, i), Action("I", s + 1, i)]
                    if s + 1 < stages
                    else []
                ),
            ]
        for need in needs:
            assert need not in at or at[need].end <= e.start, (need, e.action)


def check_devices(timeline):
    """On each device one program after the other."""
    for d in range(timeline.devices):
        own = [p for p in timeline.programs if p.device == d]
        assert all(a.end <= b.start for a, b in itertools.pairwise(own))
        assert all(p.start <= p.end for p in own)


def bar_name(bar):
    return " + ".join(action.name for action in bar.actions)


def neighbours(schedule):
    """The actions of one microbatch that follow each other on a device."""
    rows = schedule.actions
    pairs = {pair for row in rows for pair in itertools.pairwise(row)}
    return {(a, b) for a, b in pairs if a.microbatch == b.microbatch}


# --- what is recorded ---


@pytest.mark.quick(cases=4)
@pytest.mark.parametrize("schedule", fpipe.schedules.NAMES)
def test_a_recorded_step_is_the_schedule(schedule):
    timeline, pipe, got, want = slept(schedule)
    made = pipe.make_schedule(M)
    assert isinstance(timeline, Timeline)
    assert timeline.devices == made.devices
    assert rows(timeline) == made.actions
    check_dependencies(timeline, made.stages)
    check_devices(timeline)
    assert (
        timeline.makespan >= 0.95 * simulate(made, Costs(**LEAST)).makespan
    )  # nothing is shorter than it slept
    assert min(p.start for p in timeline.programs) == 0.0
    assert timeline.peak_live == simulate(made).peak_live
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert {bar_name(bar) for bar in timeline.bars()} <= {
        p.name for p in timeline.programs
    }
    # Of the last stage's actions that follow each other two are one program.
    assert all(group in neighbours(made) for group in timeline.fused)
    direct = sum(pair[0][:2] == ("F", made.stages - 1) for pair in neighbours(made))
    lasts = sum(group[0][:2] == ("F", made.stages - 1) for group in timeline.fused)
    assert lasts == (direct if 2 * direct >= M else 0)
    assert timeline.places == tuple(str(d) for d in pipe.devices)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
def test_the_idle_time_is_near_the_simulated_one(schedule):
    timeline, pipe, _, _ = slept(schedule)
    predicted = simulate(pipe.make_schedule(M), Costs(**TIMES)).bubble
    params, step = pipe.init(jax.random.key(0), X), pipe.value_and_grad(jnp.mean)
    bubbles = [timeline.bubble]

    def near():
        """On a busy machine a thread may wake up late: then another call is asked."""
        if predicted - 0.25 < bubbles[-1] < predicted + 0.4:
            return True
        bubbles.append(pipe.record(step, params, X)[1].bubble)
        return False

    assert eventually(near), bubbles


@pytest.mark.parametrize("schedule", ["zb_h1", "interleaved_1f1b"])
def test_the_scan_executor_is_recorded_in_its_ticks(schedule):
    timeline, pipe, got, want = slept(schedule, "scan")
    made = pipe.make_schedule(M)
    assert rows(timeline) == made.actions
    check_dependencies(timeline, made.stages)
    check_devices(timeline)
    # Nothing is shorter than it slept: the clock is asked before an action starts, with
    # its inputs there, and after it.
    assert all(e.end - e.start >= 0.95 * LEAST[e.action.kind] for e in timeline.events)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert timeline.transfers == ()


def test_the_clock_is_asked_when_the_inputs_of_an_operation_are_there(monkeypatch):
    """Which other devices send: without that, waiting for them would count as work."""
    pipe, params, x = small(executor="scan")
    seen, stamp = [], _clock.Clock.stamp

    def looked(self, runs, where, end, token, after, axes):
        seen.append((end, len(after)))
        return stamp(self, runs, where, end, token, after, axes)

    monkeypatch.setattr(_clock.Clock, "stamp", looked)
    pipe.record(pipe.evaluate(jnp.mean), params, x)
    starts, ends = ([n for end, n in seen if end == which] for which in (0, 1))
    assert ends == [1] * len(ends)
    assert max(starts) > 0


MEGATRON = dataclasses.replace(
    FULLY_SHARDED, spec={"up": COLUMNS, "down": ROWS, "bias": P("model")}
)
MESHES: dict[str, Any] = {
    "rows": (("stage", "data"), FULLY_SHARDED, {"spec": None}, "step"),
    "parameters": (("model", "stage"), MEGATRON, {}, "step"),
    "both, by step": (("stage", "data"), FULLY_SHARDED, {}, "step"),
    "both, by action": (("data", "stage"), FULLY_SHARDED, {}, "action"),
}


@functools.cache
def step_of_perceptrons():
    """What all of these pipes compute."""
    plain = fpipe.sequential([FULLY_SHARDED] * 2, chunks=2)
    x = noise(jax.random.key(1), (8, WIDE))
    params = plain.init(jax.random.key(0), x)
    return plain.value_and_grad(mse, argnums=(0, 1))(params, x, x)


@pytest.mark.parametrize("kind", MESHES)
def test_the_scan_executor_is_recorded_over_meshes(kind, monkeypatch):
    names, layer, changes, unshard = MESHES[kind]
    layers = [dataclasses.replace(layer, **changes)] * 2
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), names)
    pipe = fpipe.Pipe(layers, chunks=2, mesh=mesh, unshard=unshard, executor="scan")
    x = noise(jax.random.key(1), (8, WIDE))
    params = pipe.init(jax.random.key(0), x)
    checked, check = [], _executor.refuse_exchanges

    def noted(text, mesh, together):
        checked.append(text)
        check(text, mesh, together)

    monkeypatch.setattr(_executor, "refuse_exchanges", noted)
    monkeypatch.setattr(
        "fpipe._executors.recording._memory_stats",
        lambda device: {"peak_bytes_in_use": 100 + device.id},
    )
    step = pipe.value_and_grad(mse, argnums=(0, 1))
    want = step(params, x, x)
    got, timeline = pipe.record(step, params, x, x)
    # The same arrays, which lie in the same way.
    jax.tree.map(np.testing.assert_array_equal, got, want)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    assert all(
        a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim)
        for a, b in pairs
    )
    loss, (of_params, of_x) = got
    assert_same((loss, (pipe.gather(of_params), of_x)), step_of_perceptrons())
    # A row for each stage, and each action once.
    assert timeline.devices == 2
    assert rows(timeline) == pipe.make_schedule(2).actions
    ran = sorted(program.name for program in timeline.programs)
    assert ran == sorted(event.action.name for event in timeline.events)
    check_dependencies(timeline, 2)
    check_devices(timeline)
    assert all(event.start < event.end for event in timeline.events)
    # Stages have the fullest of their devices.
    along = names.index("stage")
    other = names[1 - along]
    first, last = np.moveaxis(mesh.devices, along, 0)
    assert timeline.places == tuple(
        f"{other}=2 ({devices[0]}, {devices[1]})" for devices in (first, last)
    )
    assert timeline.peak_bytes == (100 + first[1].id, 103)
    # The program with the clock is another one, and was looked at too.
    # For its clock devices of a stage add up numbers, and gather nothing.
    without, told = (collectives(text.splitlines()) for text in checked)
    assert without <= told
    assert {*(told - without)} == {"all-reduce"}


def test_an_action_on_several_devices_lasts_from_the_first_start_to_the_last_end():
    schedule = fpipe.schedules.named("gpipe", 1, 2)
    f0, f1 = (Action("F", 0, i) for i in range(2))
    segment = Segment((), (((f0,),), ((f1,),)), np.zeros(0))
    # Of two devices; the second starts later, and ends later.
    times = {(0, 0): (7.0, 7.25), (0, 1): (8.0, 8.5), (1, 0): (9.0, 9.25)}
    times[1, 1] = (9.5, 9.75)
    stamps = [
        _clock.Stamp(tick, 0, 0, end, time)
        for (tick, end), own in times.items()
        for time in own
    ]
    ran = _clock.Ran(schedule, None, (segment,), (tuple(stamps),), (), False, ())
    found = [(e.action, e.start, e.end) for e in ran.timeline().events]
    assert found[:2] == [(f0, 0.0, 1.5), (f1, 2.0, 2.75)]


def test_transfers_are_those_of_the_plan_and_stand_between_what_makes_and_reads_them():
    timeline, pipe, _, _ = slept("1f1b")
    at = {e.action: e for e in timeline.events}
    assert len(timeline.transfers) == 2 * M * (len(pipe.devices) - 1)
    for t in timeline.transfers:
        assert t.bytes == 2 * 4  # a row of a microbatch
        (what,) = t.what
        i = int(what.split("mb")[1])
        kind = "F" if t.target > t.source else "B"
        assert (
            at[Action(kind, t.source, i)].end
            <= t.start
            <= t.end
            <= at[Action(kind, t.target, i)].start
        )


def test_an_action_with_nothing_to_run_takes_no_time():
    """Nobody asks for the input gradient of the first stage."""
    case = Case(models()["plain"], 3)
    pipe = fpipe.Pipe(
        case.layers, [1, 1, 2], chunks=3, checkpoint="never", schedule="zb_h1"
    )
    step = pipe.value_and_grad(mse)
    _, timeline = pipe.record(step, pipe.place(case.params()), case.x, case.target)
    made = pipe.make_schedule(3)
    assert {e.action for e in timeline.events} == {
        a for row in made.actions for a in row
    }
    none = [e for e in timeline.events if e.action.kind == "I" and e.action.stage == 0]
    assert len(none) == 3
    assert all(e.start == e.end for e in none)
    assert {e.action.name for e in none} & {p.name for p in timeline.programs} == set()
    check_dependencies(timeline, 3)
    assert {"zeros", "reduce loss"} <= {p.name for p in timeline.programs}


# Weight gradients and the first stage's backwards make nothing but sums, which the next
# one consumes.
@pytest.mark.parametrize(
    ("model", "schedule", "dispatch"),
    [
        ("plain", "1f1b", "one_thread"),
        ("tied", "zb_h1", "thread_per_device"),
        ("jump3", "zb_v", "one_thread"),
    ],
)
def test_what_is_donated_is_recorded_too_and_results_are_the_same(
    model, schedule, dispatch
):
    case = Case(models()[model], 3)
    devices = jax.devices()[: 2 if schedule == "zb_v" else 4]
    pipe = fpipe.Pipe(
        case.layers, [1] * 4, devices, 3, "never", schedule, dispatch=dispatch
    )
    step, params = pipe.value_and_grad(mse), pipe.place(case.params())
    with fpipe.record(pipe) as timeline:
        got = step(params, case.x, case.target, **case.needs)
    (bound,) = placed_executor(pipe)._plans.values()
    marks = [way for way in bound.probes.values() if way.mark is not None]
    assert len(marks) >= 3
    assert {e.action for e in timeline.events} == {
        a for row in pipe.make_schedule(3).actions for a in row
    }
    assert len(timeline.programs) == sum(
        hasattr(item, "name") for item in bound.plan.instructions
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        got,
        step(params, case.x, case.target, **case.needs),
    )
    check_devices(timeline)


def test_a_device_that_is_several_runs_one_program_after_the_other():
    case = Case(models()["plain"], 3)
    pipe = fpipe.Pipe(
        case.layers,
        [1] * 4,
        [jax.devices()[d] for d in (0, 1, 0, 1)],
        3,
        schedule="1f1b",
    )
    _, timeline = pipe.record(
        pipe.value_and_grad(mse), pipe.place(case.params()), case.x, case.target
    )
    assert {e.action for e in timeline.events} == {
        a for row in pipe.make_schedule(3).actions for a in row
    }
    for real in (0, 1):
        own = sorted((e.start, e.end) for e in timeline.events if e.device % 2 == real)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(own))


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_a_forward_and_its_pull_back_are_one_timeline(executor):
    pipe = fpipe.Pipe([dense()] * 2, chunks=2, executor=executor)
    x = jnp.ones((4, 4))
    params = pipe.init(jax.random.key(0), x)
    with fpipe.record(pipe) as timeline:
        y, pull = jax.vjp(lambda p: pipe(p, x), params)
        first, again = pull(y), pull(y)
    # Of the first stage and the first microbatch `"placed"` recomputes apart.
    apart = executor == "placed"
    assert [len(call.events) for call in timeline.calls] == [8 + apart, 4 + apart]
    assert [e.action.kind for e in timeline.calls[0].events].count("F") == 4
    # The last call.
    assert {e.action.kind for e in timeline.events} == {"B", *"R" * apart}
    jax.tree.map(np.testing.assert_array_equal, first, again)
    check_dependencies(timeline.calls[0], 2)


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_forwards_alone(executor):
    pipe = fpipe.Pipe([dense()] * 2, chunks=2, executor=executor)
    x = jnp.ones((4, 4))
    params = pipe.init(jax.random.key(0), x)
    with fpipe.record(pipe) as timeline:
        pipe(params, x)
        pipe.evaluate(jnp.mean)(params, x)
    for call in timeline.calls:
        assert sorted(e.action for e in call.events) == [
            ("F", s, i) for s in range(2) for i in range(2)
        ]


# --- the block ---


def small(**kwargs):
    pipe = fpipe.Pipe([dense()] * 2, chunks=2, **kwargs)
    return pipe, pipe.init(jax.random.key(0), jnp.ones((4, 4))), jnp.ones((4, 4))


def test_a_timeline_is_empty_until_the_block_ends_and_then_the_last_of_all_calls():
    pipe, params, x = small()
    other, _, _ = small()
    with fpipe.record(pipe) as timeline:
        for _ in range(3):
            pipe(params, x)
        pipe.value_and_grad(jnp.mean)(params, x)
        other(params, x)
        assert timeline.events == ()
    # One of four backwards recomputes, in an action of its own.
    assert [len(call.events) for call in timeline.calls] == [4, 4, 4, 8 + 1]
    assert timeline.events == timeline.calls[-1].events
    assert timeline.name == "eager_1f1b, early recomputation, recorded"
    pipe(params, x)
    assert len(timeline.calls) == 4


def test_blocks_may_be_nested():
    pipe, params, x = small()
    other, _, _ = small()
    with fpipe.record(pipe) as outer, fpipe.record(other) as beside:
        pipe(params, x)
        with fpipe.record(pipe) as inner:
            other(params, x)
            pipe(params, x)
    assert [len(t.calls) for t in (outer, inner, beside)] == [2, 1, 1]
    assert outer.events == inner.events


def test_another_threads_calls_are_its_own():
    pipe, params, x = small()
    thread = threading.Thread(target=lambda: pipe(params, x))
    with fpipe.record(pipe) as timeline:
        thread.start()
        thread.join()
        pipe(params, x)
    assert len(timeline.calls) == 1


NONE = (
    "`fpipe.record(pipe)`: no call of this pipe has run in the block. Call the pipe, "
    "or a function that "
    "`pipe.value_and_grad` or `pipe.evaluate` made of it, in the block and in its "
    "thread; a copy of it "
    "(`dataclasses.replace`, `copy`) is another pipe"
)


def test_a_block_without_a_call_is_an_error():
    pipe, params, x = small()
    with raises(ValueError, NONE), fpipe.record(pipe):
        dataclasses.replace(pipe)(params, x)
    with raises(ValueError, NONE):
        pipe.record(lambda: None)


def test_what_is_no_pipe_is_an_error():
    with raises(TypeError, "`fpipe.record(3)`: a Pipe is needed"), fpipe.record(3):
        pass


def test_what_the_scan_executor_cannot_record_says_so():
    pipe, params, x = small(executor="scan")
    text = (
        '`fpipe.record(pipe)` of a Pipe with executor="scan": the call is inside '
        "`jax.jit`, or under another transformation; make it outside. "
        "`jax.profiler.trace` works there: its operations are named `stage2 F`"
    )
    with raises(ValueError, text), fpipe.record(pipe):
        jax.jit(pipe.__call__)(params, x)


def test_an_exception_in_a_layer_ends_the_call_and_is_not_recorded():
    host = Host()
    layers = [host.layer(s) for s in range(3)]
    pipe = fpipe.Pipe(layers, chunks=M, checkpoint="never", schedule="1f1b")
    params, step = (
        pipe.init(jax.random.key(0), X),
        pipe.value_and_grad(jnp.mean, argnums=(0, 1)),
    )
    seen = []

    def twice():
        with fpipe.record(pipe) as timeline:
            seen.append(timeline)
            step(params, X)
            host.trigger.at = ("F", 1, 2)
            step(params, X)

    with pytest.raises(ERRORS, match="BoomError: at") as caught:
        twice()
    (timeline,) = seen
    assert len(timeline.calls) == 1
    assert len(timeline.events) == 2 * 3 * M
    (note,) = notes(caught.value)
    assert note == "fpipe: in layer 1 'host1', stage 1, microbatch 2"
    host.trigger.at = None
    _, timeline = pipe.record(step, params, X)
    assert len(timeline.events) == 2 * 3 * M


def test_an_exception_on_a_device_says_where(monkeypatch):
    """One that shows only where a result is waited for."""
    pipe, params, x = small()
    step, wait = pipe.value_and_grad(jnp.mean), Watch.wait

    class Bad:
        def block_until_ready(self):
            raise BoomError("on the device")

    def broken(self, seen):
        plan = plan_of(pipe)
        actions = getattr(plan.instructions[seen.number], "actions", ())
        wait(self, seen._replace(array=Bad()) if ("F", 1, 1) in actions else seen)

    with monkeypatch.context() as patch, raises(BoomError, "on the device") as caught:
        patch.setattr(Watch, "wait", broken)
        pipe.record(step, params, x)
    (note,) = notes(caught.value)
    assert note.startswith(
        "fpipe: while running the forward and backward of stage 1 (layer 1 'dense'), "
        "microbatch 1, on"
    )
    assert pipe.record(step, params, x)[1].events


def test_without_threads_to_be_had_none_is_left(monkeypatch):
    pipe, params, x = small()
    pipe(params, x)
    start, started = threading.Thread.start, []

    def few(self):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    with monkeypatch.context() as patch, raises(RuntimeError, "can't start new thread"):
        patch.setattr(threading.Thread, "start", few)
        pipe.record(pipe, params, x)
    assert not any(thread.is_alive() for thread in started)
    assert pipe.record(pipe, params, x)[1].events


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_a_recorded_call_ends_it_and_no_thread_is_left():
    host = Host()
    pipe = fpipe.Pipe(
        [host.layer(s) for s in range(3)], chunks=M, checkpoint="never", schedule="1f1b"
    )
    params, step = pipe.init(jax.random.key(0), X), pipe.value_and_grad(jnp.mean)
    jax.block_until_ready(step(params, X))

    def interrupt(*where):
        if where == ("F", 1, 1):
            _thread.interrupt_main()
            time.sleep(0.3)

    host.trigger = interrupt
    with pytest.raises(KeyboardInterrupt):
        pipe.record(step, params, X)
    host.trigger = Trigger()
    assert len(pipe.record(step, params, X)[1].events) == 2 * 3 * M


@pytest.mark.usefixtures("own_heap")
def test_nothing_is_kept_alive():
    case = Case(models()["nested"], 3)
    pipe = fpipe.Pipe(case.layers, [1, 1, 3], chunks=3, schedule="1f1b")
    params, x, target, step = (
        pipe.place(case.params()),
        case.x,
        case.target,
        pipe.value_and_grad(mse),
    )

    def recorded():
        out, timeline = pipe.record(step, params, x, target)
        return [weakref.ref(a) for a in jax.tree.leaves(out)], timeline

    recorded()
    gc.collect()
    before = len(jax.live_arrays())
    refs, timeline = recorded()
    assert timeline.events
    assert [r() for r in refs if r() is not None] == []  # without the garbage collector
    assert len(jax.live_arrays()) == before


def test_a_thread_that_waits_for_nothing_holds_nothing():
    seen = threading.Event()

    class Thing:
        pass

    lane = Lane(lambda _: seen.set(), "fpipe record")
    lane.thread.start()
    thing = Thing()
    ref = weakref.ref(thing)
    lane.queue.put(Seen(0, thing, None))
    del thing
    seen.wait()
    gone = eventually(lambda: ref() is None)
    lane.queue.put(None)
    lane.thread.join()
    assert gone


def test_during_a_recorded_call_no_more_is_alive_than_otherwise():
    """An array that a thread waits for is one that has not been made: what is dropped
    meanwhile goes when it is there.
    """
    plain, seen = [], []
    case = Case([dense()] * 3, 4)
    pipe = fpipe.Pipe(case.layers, [1] * 3, chunks=4, schedule="1f1b")
    params, x, target, step = (
        pipe.place(case.params()),
        case.x,
        case.target,
        pipe.value_and_grad(mse),
    )

    def count(item, slots):
        del item
        jax.block_until_ready(slots)
        plain.append(len(jax.live_arrays()))

    def wait(item, slots):
        """Until those that wait have seen it."""
        del item
        jax.block_until_ready(slots)
        most = max(plain) + 4  # a sum's mark on each device
        seen.append(eventually(lambda: len(jax.live_arrays()) <= most))

    with observing(count):
        step(params, x, target)
    with observing(wait):
        pipe.record(step, params, x, target)
    assert all(seen)
    assert len(seen) == len(plain)


def test_everything_is_compiled_before_the_clock_starts(caplog):
    pipe, params, x = small()
    issued = []
    watch = Watch.__enter__

    def enter(self):
        caplog.clear()
        return watch(self)

    with (
        pytest.MonkeyPatch.context() as patch,
        jax.log_compiles(),
        caplog.at_level("WARNING"),
    ):
        patch.setattr(Watch, "__enter__", enter)
        pipe.record(pipe.value_and_grad(jnp.mean), params, x)
        issued += [
            r.getMessage()
            for r in caplog.records
            if "Compiling" in r.getMessage() or "XLA" in r.getMessage()
        ]
    assert issued == []


# --- times ---


def test_what_is_seen_late_is_put_right():
    """An end is no later than that of what needs it; a start is when a program is
    issued, its device free, its inputs there.
    """
    pipe, params, x = small(schedule="gpipe")
    pipe(params, x)
    (bound,) = placed_executor(pipe)._plans.values()
    plan = bound.plan
    of: Any = {
        action: n
        for n, item in enumerate(plan.instructions)
        if isinstance(item, Run)
        for action in item.actions
    }
    numbers = sorted(bound.probes)
    issued = {n: Span(0.1 * k, 0.1 * k + 0.05) for k, n in enumerate(numbers)}
    ended = {n: 10.0 + k for k, n in enumerate(numbers)}
    ended[of["F", 0, 0]] = 99.0  # its thread overslept
    moves = [n for n in numbers if isinstance(plan.instructions[n], Move)]
    ended[moves[1]] = 99.0
    ran = WatchedCall(
        plan,
        Half.WHOLE,
        issued,
        ended,
        frozenset(),
        {n: [1] * len(plan.instructions[n].outs) for n in numbers},
        host=0.0,
        peak_bytes=(),
        threaded=False,
    )
    timeline = ran.timeline()
    # The host launched a program, and after a forward of the first stage a transfer.
    for event in timeline.events:
        own = [la for la in timeline.launches if la.action == event.action]
        assert len(own) == 2 - event.action.stage
        assert all(la.end - la.start == pytest.approx(0.05) for la in own)
        assert own[0].end <= event.end
    assert timeline.launch == pytest.approx(0.075)
    assert timeline.busiest_thread == pytest.approx(0.05 * len(timeline.launches))
    # Where devices have threads, that of the target issues a transfer.
    threads = dataclasses.replace(ran, threaded=True).timeline()
    assert {(la.thread, la.action.stage) for la in threads.launches} == {
        (0, 0),
        (1, 0),
        (1, 1),
    }
    check_devices(timeline)
    check_dependencies(timeline, 2)
    at: Any = {e.action: e for e in timeline.events}
    assert at["F", 0, 0].end == at["F", 0, 1].start
    (first, *_) = [t for t in timeline.transfers if "mb0" in t.what[0]]
    assert first.start == at["F", 0, 0].end
    assert first.end == at["F", 1, 0].start
    # What was seen late in succession: a transfer takes no time, programs share it.
    (second, *_) = [t for t in timeline.transfers if "mb1" in t.what[0]]
    assert second.start == second.end == at["F", 0, 1].end
    assert at["F", 1, 1].start < at["F", 1, 1].end
    ended[of["F", 0, 1]] = 99.0
    at = {e.action: e for e in dataclasses.replace(ran, ended=ended).timeline().events}
    one, other = at["F", 0, 1], at["F", 1, 1]
    assert one.start < one.end <= other.start < other.end
    # The end of a transfer was seen while the program that reads it ran already, so it
    # looks as if that had taken no time. But the program was issued with its inputs
    # there.
    reads = of["F", 1, 0]
    late = {**ended, moves[0]: ended[reads] - 0.001}
    for fed, takes in ((frozenset(), 0.001), (frozenset({reads}), 2.0)):
        seen = {**issued, reads: Span(ended[reads] - 2, ended[reads] - 1)}
        own = dataclasses.replace(ran, issued=seen, ended=late, fed=fed).timeline()
        (event,) = [e for e in own.events if e.action == ("F", 1, 0)]
        assert event.end - event.start == pytest.approx(takes)


@pytest.mark.parametrize("dispatch", ["one_thread", "thread_per_device"])
def test_threads_of_simulated_devices_wait_themselves(dispatch, monkeypatch):
    pipe, params, x = small(dispatch=dispatch)
    calls, timeline = [], WatchedCall.timeline
    monkeypatch.setattr(
        WatchedCall, "timeline", lambda self: calls.append(self) or timeline(self)
    )
    pipe.record(pipe.value_and_grad(jnp.mean), params, x)
    (call,) = calls
    items = enumerate(call.plan.instructions)
    runs = {n for n, item in items if isinstance(item, Run) and n in call.ended}
    assert call.fed == (runs if dispatch == "thread_per_device" else set())


def test_where_the_host_is_the_bound_predictions_have_the_order_of_recordings(
    monkeypatch,
):
    """More microbatches mean less idle time, and more launches, here slow ones, on a
    clock that nothing else moves.
    """
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)

    def slow(call):
        def sleeping(*arrays):
            clock.sleep(0.003)
            return call(*arrays)

        return sleeping

    watched = Watch.watched
    monkeypatch.setattr(
        Watch,
        "watched",
        lambda self, step: watched(self, step.with_call(slow(step.call))),
    )
    x = jnp.ones((16, 4))
    recorded, predicted, without = [], [], []
    launch = None
    for m in (2, 4, 8, 16):
        pipe = fpipe.Pipe([dense()] * 2, chunks=m, schedule="1f1b", checkpoint="never")
        params = pipe.init(jax.random.key(0), x)
        _, timeline = pipe.record(pipe.value_and_grad(jnp.mean), params, x)
        launch = timeline.launch if launch is None else launch
        # A program, and half of the time a transfer of what it made.
        assert timeline.launch >= 1.5 * 0.003
        recorded.append(timeline.makespan)
        # The work is little beside the launches, as it is in truth.
        predicted.append(pipe.plan(None, x, speed=1e6, launch=launch).step)
        batch = Costs(F=1 / m, B=2 / m)
        without.append(simulate(pipe.make_schedule(m), batch).makespan)
    assert recorded == sorted(recorded)
    assert predicted == sorted(predicted)
    assert without == sorted(without, reverse=True)


# --- numbers for a logger ---


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_a_recorded_step_in_numbers(executor, monkeypatch):
    pipe, params, x = small(executor=executor)
    step = pipe.value_and_grad(jnp.mean)
    _, timeline = pipe.record(step, params, x)
    found = timeline.metrics()
    assert found["step_seconds"] == timeline.makespan > 0
    assert found["bubble"] == max(timeline.bubble, 0)
    assert found["peak_live"] == max(timeline.peak_live)
    assert json.loads(json.dumps(found)) == found
    # What stands there is known, and what is not known does not stand there.
    names = {"step_seconds", "bubble", "peak_live"}
    if executor == "placed":
        names |= {"transfer_bytes", "host_seconds", "launch_seconds"}
        launched = {launch.action for launch in timeline.launches}
        launches = found["launch_seconds"] * len(launched)
        assert 0.0 < launches < found["host_seconds"]
        # Two microbatches of two rows go over, and their cotangents come back.
        assert found["transfer_bytes"] == (2 + 2) * 2 * 4 * 4
        assert found["host_seconds"] > 0
    assert set(found) == names
    # CPUs do not tell what is in use; others do.
    peaks = dict(zip(pipe.devices, (100, 101), strict=True))
    monkeypatch.setattr(
        "fpipe._executors.recording._memory_stats",
        lambda device: {"peak_bytes_in_use": peaks[device]},
    )
    _, timeline = pipe.record(step, params, x)
    assert timeline.peak_bytes == (100, 101)
    assert timeline.metrics()["peak_bytes"] == 101


def test_the_host_time_of_a_pull_back_counts_too():
    pipe, params, x = small()
    with fpipe.record(pipe) as timeline:
        y, pull_back = jax.vjp(lambda p: pipe(p, x), params)
        pull_back(y)
    assert len(timeline.calls) == 1
    (bound,) = placed_executor(pipe)._plans.values()
    halves = [
        WatchedCall(
            bound.plan, half, {}, {}, frozenset(), {}, host, (n,), threaded=False
        )
        for half, host, n in [(Half.FORWARD, 0.5, 3), (Half.BACKWARD, 0.25, 4)]
    ]
    whole = halves[0].joined(halves[1])
    assert whole is not None
    assert (whole.host, whole.peak_bytes) == (0.75, (4,))


# --- drawings ---

MEASURED = Timeline(
    tuple(
        Event(d, action, 7 + 0.01 * start, 7 + 0.01 * end)
        for d, action, start, end in simulate(
            fpipe.schedules.one_f_one_b(2, 2), Costs(F=1.4, transfer=0.5)
        ).events
    ),
    2,
    "measured",
)


def test_drawn_over_the_simulated_one_as_text():
    assert draw(MEASURED, over=fpipe.schedules.one_f_one_b(2, 2)) == (
        "device 0 F0- F1         B0---    B1---\n"
        "    over F0 F1       B0---    B1---\n"
        "device 1      F0- B0-- F1- B1--\n"
        "    over    F0 B0--- F1 B1---\n"
        "measured: makespan 0.112, bubble 39.3%, peak live microbatches 2, 1; over "
        "1f1b (makespan 9, bubble 33.3%, peak live\n"
        "microbatches 2, 1; scaled by 0.0113 to equal work)"
    )


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
def test_a_recording_is_drawn_with_all_its_events(schedule, tmp_path):
    timeline, pipe, _, _ = slept(schedule)
    made = pipe.make_schedule(M)
    n, beneath = len(timeline.bars()), len(timeline.events)
    text = draw(timeline, width=1000, over=made).splitlines()
    labels = [
        f"{s if made.stages > made.devices else ''}{k}{i}"
        for k, s, i in (e.action for e in timeline.events)
    ]
    for d in range(made.devices):
        own = [
            label
            for label, e in zip(labels, timeline.events, strict=True)
            if e.device == d
        ]
        assert [w.rstrip("-") for w in text[2 * d + 1].split()[1:]] == own or set(
            own
        ) == {w.rstrip("-") for w in text[2 * d + 1].split()[1:]}
    # The launches of the recording are drawn too, in rows of their own.
    launches = len(timeline.launches)
    both = n + beneath
    for drawing, events in ((svg(timeline), n), (svg(timeline, over=made), both)):
        root = ET.fromstring(drawing)
        titles = len(list(root.iter("{http://www.w3.org/2000/svg}title")))
        assert titles == events + launches
    axes = fpipe.plot.draw(timeline, over=made)
    rows = made.devices + timeline.threads
    drawn = sum(len(c.get_paths()) for c in axes.collections) - rows
    assert drawn == both + launches
    fpipe.plot.save(timeline, tmp_path / "a.svg", over=made)
    assert (tmp_path / "a.svg").read_text() == svg(timeline, over=made)


def test_over_as_many_devices_and_the_same_work():
    with raises(
        ValueError,
        "`draw(over=...)`: both need the same number of devices, but one has 2 and "
        "`over` has 3",
    ):
        draw(MEASURED, over=fpipe.schedules.gpipe(3, 2))
    with raises(
        TypeError, "`svg(over=...)`: a Schedule or a Timeline can be drawn, not 'gpipe'"
    ):
        svg(MEASURED, over="gpipe")  # type: ignore[arg-type]


# --- traces ---


def test_a_trace_has_every_program_and_every_transfer():
    timeline, pipe, _, _ = slept("1f1b")
    found = json.loads(timeline.to_trace())["traceEvents"]
    spans = [e for e in found if e["ph"] == "X"]
    names = {e["pid"]: e["args"]["name"] for e in found if e["name"] == "process_name"}
    assert names == {
        **{d: f"device {d} ({device})" for d, device in enumerate(pipe.devices)},
        **{3 + d: f"host {d}" for d in range(3)},
    }
    launches = [(e["pid"], e["name"]) for e in spans if e["cat"] == "launch"]
    assert sorted(launches) == sorted(
        (3 + launch.thread, launch.action.name) for launch in timeline.launches
    )
    bars = timeline.bars()
    assert {name for _, name in launches} == {bar.actions[0].name for bar in bars}
    actions = {(e["name"], e["cat"], e["pid"]): e for e in spans if e["cat"] in "FBIW"}
    assert set(actions) == {(bar_name(e), e.actions[0].kind, e.device) for e in bars}
    for e in bars:
        first = e.actions[0]
        shown = actions[bar_name(e), first.kind, e.device]
        assert shown["args"] == {"stage": first.stage, "microbatch": first.microbatch}
        assert math.isclose(shown["ts"], e.start * 1e6)
        assert math.isclose(shown["dur"], (e.end - e.start) * 1e6)
    assert sum(e["cat"] == "transfer" for e in spans) == len(timeline.transfers)
    assert (
        sum(e["cat"] == "around" for e in spans)
        == len(timeline.programs) - len(bars)
        > 0
    )
    for _, row in itertools.groupby(
        sorted(spans, key=lambda e: (e["pid"], e["tid"], e["ts"])),
        lambda e: (e["pid"], e["tid"]),
    ):
        assert all(
            a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in itertools.pairwise(row)
        )  # a viewer nests what overlaps


def test_a_simulated_timeline_has_a_trace_too():
    made = simulate(fpipe.schedules.zb_h1(2, 2))
    spans = [
        e
        for e in json.loads(made.to_trace(unit=1000.0))["traceEvents"]
        if e["ph"] == "X"
    ]
    assert [(e["name"], e["ts"], e["dur"]) for e in spans[:2]] == [
        ("stage0 F mb0", 0.0, 1000.0),
        ("stage0 F mb1", 1000.0, 1000.0),
    ]
    assert len(spans) == len(made.events)


# --- names in profiles ---


@pytest.mark.parametrize("dispatch", ["one_thread", "thread_per_device"])
def test_a_profile_of_the_placed_executor_has_the_names_of_the_actions(
    dispatch, tmp_path
):
    pipe, params, x = small(dispatch=dispatch)
    step = pipe.value_and_grad(jnp.mean)
    jax.block_until_ready(step(params, x))
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(step(params, x))
    (path,) = tmp_path.rglob("*.xplane.pb")
    found = path.read_bytes()
    for row in pipe.make_schedule(2).actions:
        for action in row:
            assert action.name.encode() in found, action
    assert b"reduce loss on" in found
    assert b"transfer to" in found


def test_a_profile_of_the_scan_executor_has_stages_and_kinds(tmp_path):
    pipe, params, x = small(executor="scan")
    step = pipe.value_and_grad(jnp.mean)
    jax.block_until_ready(step(params, x))
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(step(params, x))
    (path,) = tmp_path.rglob("*.xplane.pb")
    found = path.read_bytes()
    assert b"stage0-1 F" in found or (b"stage0 F" in found and b"stage1 F" in found)
    assert b"stage0-1 B" in found or (b"stage0 B" in found and b"stage1 B" in found)


def test_nothing_is_wrapped_where_nobody_looks(monkeypatch):
    # The first calls with "auto" are looked at.
    pipe, params, x = small(dispatch="one_thread")
    pipe(params, x)
    called = []
    issue = ReadyPlan.issue

    def noted(plan, shares, slots):
        called.extend((step.call, step.item) for s in shares for step in s.steps)
        issue(plan, shares, slots)

    monkeypatch.setattr(ReadyPlan, "issue", noted)
    pipe(params, x)
    programs = [(call, item) for call, item in called if isinstance(item, Run)]
    assert programs
    assert all(call is item.call for call, item in programs)
