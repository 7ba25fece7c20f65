"""A dispatching thread for each device, and compiling ahead: what they compute, count,
and leave behind.
"""

import _thread
import contextvars
import copy
import dataclasses
import gc
import logging
import pickle
import threading
import time
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import fpipe
from fpipe._executors.placed.dispatch import DISPATCH
from fpipe._executors.placed.instructions import Free, Half
from fpipe._executors.placed.threads import Crew, divide
from tests.executors.helpers import observing, placed_executor, plan_of
from tests.executors.placed.test_interruptions import wait
from tests.executors.placed.test_plan import STAGES, bare, by_device, widening
from tests.executors.test_memory import counting
from tests.front.test_calls import BoomError, Trigger, notes
from tests.front.test_equal import check
from tests.helpers import Case, assert_same, dense, in_turn, models, mse, raises

M = 4
NUMBERED = jnp.arange(M, dtype=jnp.float32)[:, None] + jnp.zeros(
    (1, 2)
)  # a row for each microbatch: its number
ERRORS = (jax.errors.JaxRuntimeError, ValueError)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    left = [
        t.name
        for t in set(threading.enumerate()) - before
        if t.name.startswith("fpipe")
    ]
    assert left == []


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("fpipe")]


def threaded(pipe):
    (bound,) = placed_executor(pipe)._plans.values()
    return bound.threaded


# --- what is computed ---

# Each need and kind of skip once; what each has in itself is the executor's.
CASES = [
    ("nested", [1, 1, 1, 2], "eager_1f1b", "except_last"),
    ("jump3", [1, 1, 1, 1], "zb_v", "never"),
    ("dropout", [1, 1, 1, 1], "interleaved_1f1b", "always"),
    ("stateful", [1, 2, 1], "eager_1f1b", "except_last"),
    ("sided", [1, 1, 1, 1], "zb_h1", "never"),
    ("tied", [1, 1, 1, 1], "dualpipe_v", "except_last"),
]


def in_threads(
    layers, balance, schedule, checkpoint="except_last", chunks=3, devices=None
):
    several = fpipe.schedules.NAMES[schedule].per_device != 1
    devices = devices or jax.devices()[: len(balance) // 2 if several else len(balance)]
    return fpipe.Pipe(
        layers,
        balance,
        devices,
        chunks,
        checkpoint,
        schedule,
        dispatch="thread_per_device",
    )


@pytest.mark.parametrize(
    ("model", "balance", "schedule", "checkpoint", "loss"),
    [(*case, ("inside", "outside")[n % 2]) for n, case in enumerate(CASES)],
)
def test_threads_compute_what_the_plain_composition_computes(
    model, balance, schedule, checkpoint, loss
):
    layers = models()[model]
    pipe = in_threads(layers, balance, schedule, checkpoint)
    check(Case(layers, 3), pipe, loss)
    assert {bound.threaded for bound in placed_executor(pipe)._plans.values()} == {True}


@pytest.mark.parametrize(
    ("balance", "chunks", "devices", "loss"),
    [
        ([1, 1, 1, 1], 1, [0, 1, 2, 3], "inside"),
        ([4], 3, [1], "outside"),
        ([1, 1, 2], 3, [1, 0, 1], "outside"),
    ],
)
def test_one_microbatch_one_stage_and_repeated_devices(balance, chunks, devices, loss):
    layers = models()["jump2"]
    pipe = in_threads(
        layers,
        balance,
        "1f1b",
        chunks=chunks,
        devices=[jax.devices()[d] for d in devices],
    )
    check(Case(layers, chunks), pipe, loss)
    assert {bound.threaded for bound in placed_executor(pipe)._plans.values()} == {
        len(set(devices)) > 1
    }


def test_a_pull_back_in_threads_may_be_called_twice():
    case = Case(models()["nested"], 3)
    pipe = in_threads(case.layers, [1, 2, 2], "1f1b")
    params = case.params()
    y, pull = jax.vjp(lambda p: pipe(p, case.x), pipe.place(params))
    _, want = jax.vjp(lambda p: case.reference(p, case.x), params)
    for scale in (1.0, 2.0):
        assert_same(pull(jnp.full_like(y, scale)), want(jnp.full_like(y, scale)))


def test_two_hundred_calls_give_the_same_result_each_time():
    case = Case(models()["nested"], 3)
    pipe = in_threads(case.layers, [1, 1, 1, 2], "eager_1f1b")
    step, params, needs = (
        pipe.value_and_grad(mse, argnums=(0, 1)),
        pipe.place(case.params()),
        case.needs,
    )
    first = jax.tree.map(np.asarray, step(params, case.x, case.target, **needs))
    for _ in range(200):
        again = step(params, case.x, case.target, **needs)
        jax.tree.map(np.testing.assert_array_equal, again, first)


def test_a_plan_is_divided_as_it_is_drawn_in_the_module():
    x = jnp.ones((8, 3))
    pipe, params = bare(x)
    pipe(params, x)
    plan = plan_of(pipe)
    shares = divide(plan, Half.WHOLE, True, {}, {})
    issued = [item for item in plan.instructions if not isinstance(item, Free)]
    made, moved, left = (plan.slots[item.outs[0]] for item in issued)
    w0, w1, x0 = plan.slots[:3]

    def named(numbers):
        return {plan.slots[n] for n in numbers}

    rows = [
        (
            step.number,
            thread,
            named(step.waits),
            [(post.thread, named(post.slots)) for post in step.posts],
            named(step.frees),
        )
        for thread, share in enumerate(shares)
        for step in share.steps
    ]
    assert rows == [
        (0, 0, set(), [(1, {made})], {w0, x0, made}),
        (2, 1, {made}, [], {made}),
        (4, 1, set(), [], {w1, moved}),
    ]
    assert [named(share.leaves) for share in shares] == [set(), {left}]
    (whole,) = divide(plan, Half.WHOLE, False, {}, {})
    assert [(step.number, step.waits, step.posts) for step in whole.steps] == [
        (number, (), ()) for number in (0, 2, 4)
    ]


# --- layers that call Python ---


class Host:
    """Layers `x * p` that tell the host what they do: kind, stage and microbatch."""

    def __init__(self):
        self.trigger: Any = Trigger()
        self.seen: list[tuple[str, int, int]] = []

    def tell(self, kind, stage, value, x):
        def host(value, number):
            where = kind, stage, int(number)
            self.seen.append(where)
            self.trigger(*where)
            return value

        return jax.pure_callback(
            host, jax.ShapeDtypeStruct(value.shape, value.dtype), value, x[0, 0]
        )

    def layer(self, stage):
        @jax.custom_vjp
        def times(p, x):
            return self.tell("F", stage, x * p, x)

        def backward(residuals, g):
            p, x = residuals
            return self.tell("W", stage, (g * x).sum(0), x), self.tell(
                "I", stage, g * p, x
            )

        times.defvjp(lambda p, x: (times(p, x), (p, x)), backward)
        return fpipe.Layer(times, lambda key, x: jnp.ones(x.shape[-1]), f"host{stage}")

    def pipe(self, schedule, stages=STAGES):
        layers = [self.layer(s) for s in range(stages)]
        return fpipe.Pipe(
            layers, [1] * stages, chunks=M, checkpoint="never", schedule=schedule
        )


def started(seen, schedule):
    """The actions in the order in which their first callback started; a full backward
    is `I` and `W` at once.
    """
    whole = {
        (a.stage, a.microbatch)
        for row in schedule.actions
        for a in row
        if a.kind == "B"
    }
    names: list[Any] = [
        ("B" if k in "IW" and (s, i) in whole else k, s, i) for k, s, i in seen
    ]
    return list(dict.fromkeys(fpipe.schedules.Action(*name) for name in names))


@pytest.mark.quick(cases=3)
# `test_record.py` has all schedules.
@pytest.mark.parametrize(
    "schedule", ["eager_1f1b", "interleaved_1f1b", "zb_h1", "dualpipe_v"]
)
def test_each_device_starts_its_actions_in_the_schedules_order(schedule):
    host = Host()
    stages = fpipe.schedules.named(schedule, STAGES // 2, M).stages
    pipe = host.pipe(schedule, stages)
    params = pipe.init(jax.random.key(0), NUMBERED)
    jax.block_until_ready(
        pipe.value_and_grad(jnp.mean, argnums=(0, 1))(params, NUMBERED)
    )
    assert threaded(pipe)
    made = pipe.make_schedule(M)
    assert by_device(made, started(host.seen, made)) == made.actions
    assert len(host.seen) == 3 * stages * M


def test_callbacks_compute_what_the_plain_composition_computes():
    host = Host()
    pipe = host.pipe("zb_h1")
    params = tuple(jnp.full(2, 0.5 + s) for s in range(STAGES))
    x = NUMBERED + 0.25  # the host reads whole numbers
    want = fpipe.sequential(pipe.layers, chunks=M)
    placed = pipe.place(params)
    assert_same(
        pipe.value_and_grad(mse, argnums=(0, 1))(placed, x, x),
        want.value_and_grad(mse, argnums=(0, 1))(params, x, x),
    )
    assert_same(pipe.evaluate(mse)(placed, x, x), want.evaluate(mse)(params, x, x))
    assert_same(pipe(placed, x), want(params, x))
    grads = [
        jax.grad(lambda p, run=run: mse(run(p, x), x))(p)
        for run, p in ((pipe, placed), (want, params))
    ]
    assert_same(*grads)
    assert {bound.threaded for bound in placed_executor(pipe)._plans.values()} == {True}


def identity(x):
    return np.asarray(x)


def ignore(x):
    del x


def shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def pure(x):
    return jax.pure_callback(identity, shape(x), x)


CALLING = {
    "pure_callback": pure,
    "io_callback": lambda x: io_callback(identity, shape(x), x),
    "debug": lambda x: jax.debug.callback(ignore, x) or x,
    "jit": jax.jit(pure),
    "scan": lambda x: jax.lax.scan(lambda x, _: (pure(x), None), x, None, 2)[0],
    "cond": lambda x: jax.lax.cond(x[0, 0] > 0, pure, jnp.sin, x),
    "while": lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 0, pure, x),
    "checkpoint": jax.checkpoint(
        lambda x: jax.lax.cond(x[0, 0] > 0, jax.jit(pure), jnp.sin, x)
    ),
}
SILENT = {
    "plain": jnp.sin,
    "scan": lambda x: jax.lax.scan(lambda x, _: (jnp.sin(x), None), x, None, 2)[0],
    "cond": lambda x: jax.lax.cond(x[0, 0] > 0, jnp.cos, jnp.sin, x),
    "jit": jax.jit(jnp.sin),
}


@pytest.mark.parametrize(
    ("which", "devices"),
    [
        *((which, [0, 1]) for which in CALLING),
        *((f"silent {name}", [0, 1]) for name in SILENT),
        ("io_callback", [0, 0]),
        ("checkpoint", [0, 0]),
        ("silent plain", [0, 0]),
    ],
)
def test_auto_takes_threads_where_a_layer_calls_python_and_there_are_devices(
    which, devices
):
    f = SILENT[which.split()[1]] if which.startswith("silent") else CALLING[which]
    pipe = fpipe.Pipe(
        [fpipe.fn(jnp.cos), fpipe.fn(f)],
        [1, 1],
        [jax.devices()[d] for d in devices],
        chunks=2,
    )
    x = jnp.ones((4, 1))
    assert_same(pipe(((), ()), x), fpipe.sequential(pipe.layers, chunks=2)(((), ()), x))
    assert threaded(pipe) == (which in CALLING and devices == [0, 1])


def test_a_debug_print_makes_threads_and_prints_once_for_each_microbatch(capfd):
    def layer(x):
        jax.debug.print("seen {}", x[0, 0])
        return x

    pipe = fpipe.Pipe([fpipe.fn(layer), fpipe.fn(jnp.sin)], [1, 1], chunks=M)
    jax.block_until_ready(pipe(((), ()), NUMBERED))
    jax.effects_barrier()
    assert threaded(pipe)
    assert sorted(capfd.readouterr().out.split("\n")[:-1]) == [
        f"seen {i}.0" for i in range(M)
    ]


@pytest.mark.parametrize("dispatch", ["one_thread", "thread_per_device"])
def test_who_dispatches_may_be_chosen(dispatch):
    host = Host()
    for layers in (host.pipe("1f1b").layers, [fpipe.fn(jnp.sin)] * 4):
        pipe = fpipe.Pipe(layers, [1] * 4, chunks=M, dispatch=dispatch)
        params = (
            pipe.init(jax.random.key(0), NUMBERED)
            if layers[0].name == "host0"
            else ((),) * 4
        )
        jax.block_until_ready(pipe(params, NUMBERED))
        assert threaded(pipe) == (dispatch == "thread_per_device")


# --- errors ---


@pytest.mark.parametrize(
    ("kind", "place", "stage", "microbatch"),
    [
        ("F", "in", 0, 0),
        ("F", "in", 3, 3),
        ("I", "in the input gradient of", 1, 2),
        ("W", "in the weight gradient of", 3, 3),
    ],
)
def test_an_exception_in_a_callback_ends_the_call_says_where_and_the_pipe_works(
    kind, place, stage, microbatch
):
    host = Host()
    pipe = host.pipe("zb_h1")
    params = pipe.init(jax.random.key(0), NUMBERED)
    step = pipe.value_and_grad(jnp.mean, argnums=(0, 1))
    want = jax.tree.map(np.asarray, step(params, NUMBERED))
    host.trigger.at = (kind, stage, microbatch)
    with (
        pytest.raises(
            ERRORS, match=rf"BoomError: at \('{kind}', {stage}, {microbatch}\)"
        ) as caught,
        observing(wait),
    ):
        jax.block_until_ready(step(params, NUMBERED))
    assert threads() == []
    said = [
        f"fpipe: {place} layer {stage} 'host{stage}', stage {stage}, microbatch "
        f"{microbatch}"
    ]
    assert notes(caught.value) == said
    # Not waiting, the error comes at the call, or when its result is waited for.
    with pytest.raises(
        ERRORS, match=rf"BoomError: at \('{kind}', {stage}, {microbatch}\)"
    ) as caught:
        jax.block_until_ready(step(params, NUMBERED))
    assert notes(caught.value) == said
    assert threads() == []
    host.trigger.at = None
    assert_same(step(params, NUMBERED), want)


def test_an_exception_at_dispatch_stops_all_threads():
    """The observer raises in the middle of one device's share."""
    case = Case(models()["plain"], M)
    pipe = in_threads(case.layers, [1, 1, 1, 1], "1f1b", chunks=M)
    params, step = pipe.place(case.params()), pipe.value_and_grad(mse)
    want = jax.tree.map(np.asarray, step(params, case.x, case.target))

    def observer(item, slots):
        del slots
        if at in getattr(item, "actions", ()):
            raise BoomError("here")

    # The last stage runs both in one program.
    for at, said in (
        (("B", 2, 1), "the backward of stage 2"),
        (("B", 3, 1), "the forward and backward of stage 3"),
    ):
        with raises(BoomError, "here") as caught, observing(observer):
            step(params, case.x, case.target)
        assert threads() == []
        (note,) = notes(caught.value)
        assert f"{said} (layer {at[1]} 'dense'), microbatch 1, on" in note
    assert_same(step(params, case.x, case.target), want)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_a_layer_sleeps_ends_the_call_and_the_pipe_works():
    host = Host()
    pipe = host.pipe("1f1b")
    params, step = pipe.init(jax.random.key(0), NUMBERED), pipe.value_and_grad(jnp.mean)
    want = jax.tree.map(np.asarray, step(params, NUMBERED))
    host.seen.clear()

    def interrupt(*where):
        if where == ("F", 1, 1):
            _thread.interrupt_main()
            time.sleep(0.3)  # still at it when the main thread is interrupted

    host.trigger = interrupt
    with pytest.raises(KeyboardInterrupt) as caught:
        jax.block_until_ready(step(params, NUMBERED))
    assert threads() == []
    assert notes(caught.value) == []
    host.trigger = Trigger()
    assert_same(step(params, NUMBERED), want)


def test_no_thread_outlives_a_call_and_there_is_one_for_each_device_meanwhile():
    seen = set()
    case = Case(models()["plain"], M)
    pipe = in_threads(case.layers, [1, 1, 1, 1], "1f1b", chunks=M)
    params = pipe.place(case.params())

    def observer(item, slots):
        del slots
        seen.add((threading.current_thread().name, str(item.placement)))

    with observing(observer):
        pipe.value_and_grad(mse)(params, case.x, case.target)
        assert threads() == []
    assert seen == {(f"fpipe {d}", str(d)) for d in pipe.devices}


# --- what is left, and what is alive ---


@pytest.mark.parametrize("model", ["nested", "stateful", "tied"])
@pytest.mark.usefixtures("own_heap")
def test_after_twenty_steps_as_many_arrays_are_alive_as_after_two(model):
    case = Case(models()[model], 3)
    pipe = in_threads(case.layers, [1, 1, len(case.layers) - 2], "eager_1f1b")
    params, needs, x, target = (
        pipe.place(case.params()),
        case.needs,
        case.x,
        case.target,
    )
    step = pipe.value_and_grad(mse, argnums=(0, 1))

    def train(steps):
        for _ in range(steps):
            jax.block_until_ready(step(params, x, target, **needs))
        gc.collect()
        return len(jax.live_arrays())

    assert train(2) == train(20)


@pytest.mark.usefixtures("own_heap")
def test_after_an_exception_nothing_of_the_call_is_alive(caplog):
    caplog.set_level(
        logging.CRITICAL + 1, "jax._src.callback"
    )  # a record would keep the traceback, and that the arrays
    host = Host()
    pipe = host.pipe("1f1b")
    params, step = pipe.init(jax.random.key(0), NUMBERED), pipe.value_and_grad(jnp.mean)

    def fail(where):
        host.trigger.at = where
        with pytest.raises(ERRORS):
            jax.block_until_ready(step(params, NUMBERED))
        gc.collect()
        return len(jax.live_arrays())

    first = fail(("F", 2, 1))
    assert [fail(("F", 2, 1)), fail(("W", 1, 2)), fail(("F", 2, 1))] == [first] * 3


@pytest.mark.usefixtures("own_heap")
def test_a_dropped_pipe_and_its_parameters_are_collected():
    host = Host()
    pipe = host.pipe("1f1b")
    params = pipe.init(jax.random.key(0), NUMBERED)
    jax.block_until_ready(pipe.value_and_grad(jnp.mean)(params, NUMBERED))
    alive = weakref.ref(pipe), weakref.ref(params[0])
    del pipe, params
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "eager_1f1b", "zb_h1"])
def test_each_device_holds_no_more_inputs_than_the_schedule_and_those_on_their_way(
    schedule,
):
    """Slots of each thread are its own: what they hold is what its device holds."""
    m = 8
    pipe = fpipe.Pipe(
        widening(),
        [1] * STAGES,
        chunks=m,
        schedule=schedule,
        checkpoint="never",
        dispatch="thread_per_device",
    )
    x = jnp.ones((3 * m, 5))
    params = pipe.init(jax.random.key(0), x)
    step = pipe.value_and_grad(lambda y: jnp.mean(y**2))
    jax.block_until_ready(step(params, x))
    plan, peak = plan_of(pipe), [0] * STAGES
    names = [str(device) for device in pipe.devices]

    def count(item, slots):
        s = names.index(str(item.placement))
        held = [
            a
            for a, slot in zip(slots, plan.slots, strict=True)
            if a is not None and slot.name[0] == "y"
        ]
        peak[s] = max(
            peak[s],
            sum(a.shape == (3, 5 + s) and a.device == pipe.devices[s] for a in held),
        )

    with observing(count):
        jax.block_until_ready(step(params, x))
    formula = fpipe.schedules.simulate(pipe.make_schedule(m)).peak_live
    assert all(0 < p <= f + 1 for p, f in zip(peak[1:], formula[1:], strict=True)), (
        peak,
        formula,
    )


# --- settings of the calling thread ---


def test_the_matmul_precision_of_the_calling_thread_is_kept():
    pipe = in_threads([dense(), dense()], [1, 1], "1f1b")
    case = Case([dense(), dense()], 3)
    params = pipe.place(case.params())
    with jax.default_matmul_precision("highest"):
        got = pipe.value_and_grad(mse)(params, case.x, case.target)
    texts = {
        str(jax.make_jaxpr(item.call)(*args))
        for bound in placed_executor(pipe)._plans.values()
        for item, args in runs(bound)
        if item.parts
    }
    assert texts
    assert all("Precision.HIGHEST" in text for text in texts)
    assert_same(
        got, case.reference.value_and_grad(mse)(case.params(), case.x, case.target)
    )


def runs(bound):
    """The runs of a plan with the shapes that they are given."""
    shapes = dict(bound.shapes)
    for item in bound.plan.instructions:
        if hasattr(item, "call"):
            args = tuple(shapes[n] for n in item.ins)
            yield item, args
            shapes |= dict(
                zip(item.outs, jax.eval_shape(item.call, *args), strict=True)
            )
        elif hasattr(item, "placement"):
            shapes |= {
                out: shapes[k] for k, out in zip(item.ins, item.outs, strict=True)
            }


@pytest.mark.parametrize("dispatch", ["one_thread", "thread_per_device"])
def test_64_bits_of_the_calling_thread_are_kept(dispatch):
    with jax.enable_x64(True):
        pipe = fpipe.Pipe(
            [fpipe.Layer(lambda p, x: x * p)] * 3,
            [1, 1, 1],
            chunks=2,
            dispatch=dispatch,
        )
        params = pipe.place((jnp.asarray(1.0 + 2.0**-40, jnp.float64),) * 3)
        x = jnp.ones((4, 1), jnp.float64)
        y = pipe(params, x)
        assert y.dtype == jnp.float64
        np.testing.assert_array_equal(y, np.full((4, 1), (1.0 + 2.0**-40) ** 3))
        loss, grads = pipe.value_and_grad(jnp.mean)(params, x)
        assert (loss.dtype, grads[0].dtype) == (jnp.float64, jnp.float64)


# --- the option ---


@pytest.mark.parametrize("wrong", ["threads", None, 1, True, ""])
def test_a_wrong_dispatch_is_refused(wrong):
    with raises(
        ValueError,
        f"`Pipe(dispatch={wrong!r})`: one of 'auto', 'one_thread', 'thread_per_device'",
    ):
        fpipe.Pipe([fpipe.fn(jnp.sin)], dispatch=wrong)


@pytest.mark.parametrize("dispatch", DISPATCH)
def test_dispatch_is_part_of_the_value(dispatch):
    pipe = fpipe.Pipe([dataclass_layer()] * 2, [1, 1], dispatch=dispatch)
    others = [d for d in DISPATCH if d != dispatch]
    for same in (
        pickle.loads(pickle.dumps(pipe)),
        copy.copy(pipe),
        dataclasses.replace(pipe),
    ):
        assert (same.dispatch, same, hash(same)) == (dispatch, pipe, hash(pipe))
    assert all(dataclasses.replace(pipe, dispatch=other) != pipe for other in others)
    assert f"dispatch='{dispatch}'" in repr(pipe)


def scaled(params, x):
    return x * params


def dataclass_layer():
    return fpipe.Layer(scaled, name="scaled")


def test_the_default_is_auto():
    assert fpipe.Pipe([fpipe.fn(jnp.sin)]).dispatch == "auto"


# --- compiling ahead ---


def backend(events):
    """Compilations by XLA; traces of small eager operations are not counted."""
    return [e for e in events if "backend_compile" in e]


def fresh(model="nested", chunks=3, **options):
    case = Case(models()[model], chunks)
    pipe = fpipe.Pipe(
        case.layers, [1, 1, len(case.layers) - 2], chunks=chunks, **options
    )
    return case, pipe, pipe.place(case.params())


@pytest.mark.parametrize(
    ("model", "dispatch"),
    in_turn(["nested", "stateful", "tied"], ["one_thread", "thread_per_device"]),
)
def test_after_compile_the_first_step_compiles_nothing(model, dispatch):
    shapes = dispatch == "one_thread"
    case, pipe, params = fresh(model, dispatch=dispatch)
    x, target, needs = case.x, case.target, case.needs
    given: Any = (params, x, target)
    if shapes:
        given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), given)
    count = pipe.compile(*given, loss_fn=mse, argnums=(0, 1), **needs)
    # How many XLA programs a call asks for: none for what compile made, whatever the
    # persistent cache holds.
    events: list[str] = []
    with counting(events):
        got = pipe.value_and_grad(mse, argnums=(0, 1))(params, x, target, **needs)
    assert backend(events) == []
    assert count > 3
    want = case.reference.value_and_grad(mse, argnums=(0, 1))(
        case.params(), x, target, **needs
    )
    assert_same(got, want)


def test_the_count_of_compilations_can_count():
    case, pipe, params = fresh()
    events: list[str] = []
    with counting(events):
        pipe.value_and_grad(mse)(params, case.x, case.target)
    assert len(backend(events)) > 3


def test_compile_without_a_loss_is_for_a_call():
    case, pipe, params = fresh()
    assert pipe.compile(params, case.x) > 0
    events: list[str] = []
    with counting(events):
        got = pipe(params, case.x)
    assert backend(events) == []
    assert_same(got, case.reference(case.params(), case.x))


def test_a_second_compile_compiles_nothing_and_counts_the_same():
    case, pipe, params = fresh()
    first = pipe.compile(params, case.x, case.target, loss_fn=mse)
    events: list[str] = []
    with counting(events):
        assert pipe.compile(params, case.x, case.target, loss_fn=mse) == first
    assert backend(events) == []


@pytest.mark.parametrize("threads_", [None, 1, 3])
def test_progress_counts_from_nothing_to_all(threads_):
    case, pipe, params = fresh()
    seen = []
    count = pipe.compile(
        params,
        case.x,
        case.target,
        loss_fn=mse,
        threads=threads_,
        progress=lambda *done: seen.append(done),
    )
    assert seen == [(k, count) for k in range(count + 1)]


def test_the_bar_is_on_stderr_and_only_if_asked_for(capfd):
    case, pipe, params = fresh()
    count = pipe.compile(params, case.x, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    first, *_, last = err.rstrip("\n").split("\r")[1:]
    assert first == f"compiling [{'.' * 30}] 0/{count}"
    assert last == f"compiling [{'#' * 30}] {count}/{count}"
    for quiet in (False, None):  # stderr is no terminal here
        pipe.compile(params, case.x, progress=quiet)
        assert capfd.readouterr() == ("", "")


def test_what_compile_refuses():
    case, pipe, params = fresh()
    with pytest.raises(TypeError, match=r"`pipe\.compile.*targets belong to a loss"):
        pipe.compile(params, case.x, case.target)
    with pytest.raises(ValueError, match="argnums"):
        pipe.compile(params, case.x, case.target, loss_fn=mse, argnums=7)
    with pytest.raises(ValueError, match="has forwards only"):
        dataclasses.replace(pipe, schedule="forward_only").compile(
            params, case.x, case.target, loss_fn=mse
        )


def test_an_error_in_a_layer_is_raised_by_compile_with_its_note():
    def bad(x):
        raise BoomError("no")

    pipe = fpipe.Pipe([fpipe.fn(jnp.sin), fpipe.fn(bad, "bad")], [1, 1], chunks=2)
    with raises(BoomError, "no") as caught:
        pipe.compile(((), ()), jnp.ones((4, 1)))
    assert notes(caught.value) == ["fpipe: in layer 1 'bad', stage 1, microbatch 0"]


def test_compile_runs_nothing():
    host = Host()
    pipe = host.pipe("1f1b")
    params = pipe.init(jax.random.key(0), NUMBERED)
    host.seen.clear()
    assert pipe.compile(params, NUMBERED, loss_fn=jnp.mean) > 0
    assert host.seen == []
    jax.block_until_ready(pipe.value_and_grad(jnp.mean)(params, NUMBERED))
    assert len(host.seen) == 3 * STAGES * M - M  # the first stage has no input gradient


# --- what a thread has of its caller ---

VARIABLE = contextvars.ContextVar("of a user", default="unset")


def test_dispatching_threads_have_the_settings_and_variables_of_the_caller(monkeypatch):
    seen = []

    def issue(crew, step, slots):
        config: Any = jax.config
        seen.append(
            (
                threading.current_thread().name,
                config.jax_default_matmul_precision,
                config.jax_numpy_rank_promotion,
                config.jax_default_device,
                config.jax_transfer_guard_device_to_host,
                VARIABLE.get(),
            )
        )
        original(crew, step, slots)

    original = Crew.issue
    pipe = fpipe.Pipe(
        [fpipe.fn(jnp.sin)] * 2,
        [1, 1],
        chunks=2,
        dispatch="thread_per_device",
    )
    monkeypatch.setattr(Crew, "issue", issue)
    device, x = jax.devices()[3], jnp.arange(8.0).reshape(4, 2)
    token = VARIABLE.set("of the caller")
    with (
        jax.default_matmul_precision("highest"),
        jax.numpy_rank_promotion("raise"),
        jax.default_device(device),
        jax.transfer_guard_device_to_host("disallow"),
    ):
        y = pipe(((), ()), x)
    VARIABLE.reset(token)
    assert {name for name, *_ in seen} == {f"fpipe {d}" for d in jax.devices()[:2]}
    assert {tuple(values) for _, *values in seen} == {
        ("highest", "raise", device, "disallow", "of the caller")
    }
    assert_same(y, jnp.sin(jnp.sin(x)))
