"""Exceptions in layers, in every executor and dispatch mode: the error that arrives is
the user's, says where, and leaves nothing behind.
"""

import _thread
import contextlib
import faulthandler
import gc
import logging
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import fpipe
from tests.executors.placed.test_dispatch import ERRORS, Host
from tests.front.test_calls import BoomError, Trigger, notes
from tests.helpers import assert_same, in_turn

ROWS, M = 8, 4
X = jnp.arange(ROWS, dtype=jnp.float32)[:, None] + jnp.zeros((1, 2))


# --- while tracing ---


def tracing(k, trigger):
    """A layer that raises while its forward, or its backward, is traced."""

    @jax.custom_vjp
    def scaled(p, x):
        return p * x

    def forward(p, x):
        return scaled(p, x), (p, x)

    def backward(kept, g):
        trigger("B", k)
        p, x = kept
        return jnp.sum(g * x), p * g

    scaled.defvjp(forward, backward)

    def apply(p, x):
        trigger("F", k)
        return scaled(p, x)

    return fpipe.Layer(apply, lambda key, x: jnp.float32(k + 1), "tracing")


BALANCES = {"cores": [2, 2], "two on the last": [1, 1, 2], "no core": [3, 1]}


@pytest.mark.parametrize("executor", ["placed", "scan"])
@pytest.mark.parametrize(("balance", "kind"), in_turn(BALANCES, ["F", "B"]))
def test_a_note_names_the_stage_of_the_pipe(executor, balance, kind):
    """Not the unit that the scan executor makes of a part of a stage."""
    trigger: Any = Trigger()
    counts = BALANCES[balance]
    layers = [tracing(k, trigger) for k in range(4)]
    stage_of = [s for s, count in enumerate(counts) for _ in range(count)]
    for k in range(4):
        pipe = fpipe.Pipe(layers, counts, chunks=M, executor=executor)
        params = pipe.place((jnp.ones(()),) * 4)
        trigger.at = (kind, k)
        with pytest.raises(BoomError) as caught:
            pipe.value_and_grad(jnp.mean)(params, X)
        trigger.at = None
        (note,) = notes(caught.value)
        assert f"layer {k} 'tracing'" in note or kind == "B"
        assert note.endswith(f", stage {stage_of[k]}, microbatch 0")


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_a_note_on_the_loss_names_the_last_stage(executor):
    def loss(y):
        raise BoomError("here")

    pipe = fpipe.Pipe([tracing(0, Trigger())] * 4, [2, 2], chunks=M, executor=executor)
    with pytest.raises(BoomError) as caught:
        pipe.value_and_grad(loss)(pipe.place((jnp.ones(()),) * 4), X)
    assert notes(caught.value) == ["fpipe: in loss_fn, stage 1, microbatch 0"]


@pytest.mark.parametrize("executor", ["placed", "scan"])
@pytest.mark.filterwarnings("default:stage . keeps")
def test_a_warning_names_the_stage_of_the_pipe(executor):
    """Of three units of the scan executor this is the last."""

    def scanned(ws, x):
        def body(x, w):
            return jnp.tanh(x @ w.astype(jnp.bfloat16).astype(jnp.float32)), None

        return jax.lax.scan(body, x, ws)[0]

    plain = fpipe.Layer(lambda p, x: jnp.tanh(p * x), name="plain")
    layers = [plain, plain, plain, fpipe.Layer(scanned)]
    options: dict[str, Any] = {"checkpoint": "never", "schedule": "gpipe"}
    pipe = fpipe.Pipe(layers, [2, 2], chunks=M, executor=executor, **options)
    params = pipe.place((jnp.ones(()),) * 3 + (jnp.ones((3, 2, 2)),))
    with pytest.warns(UserWarning, match="keeps") as caught:
        pipe.value_and_grad(jnp.mean)(params, X)
    assert {str(w.message).split()[1] for w in caught} == {"1"}


# --- while running ---

# Two stages of two layers, and three microbatches; a row holds its microbatch's number.
STAGE_OF = (0, 0, 1, 1)
NUMBERED = jnp.arange(3.0)[:, None] + jnp.zeros((1, 2))
MODES: dict[str, dict[str, Any]] = {
    "one thread": {"dispatch": "one_thread"},
    "threads": {"dispatch": "thread_per_device"},
    "scan": {"executor": "scan"},
}
DOING = {
    "F": "in",
    "B": "in the backward of",
    "I": "in the input gradient of",
    "W": "in the weight gradient of",
}


@pytest.fixture
def watchdog():
    """Ends the process if a test hangs, and nothing else takes so long."""
    faulthandler.dump_traceback_later(300, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def unlogged(caplog):
    """A record would keep the traceback of a callback, and that its arrays."""
    caplog.set_level(logging.CRITICAL + 1, "jax._src.callback")


def asking(mode, schedule="zb_h1", **options):
    """A pipe whose layers tell the host what they do, its parameters, and the host."""
    host = Host()
    pipe = fpipe.Pipe(
        [host.layer(k) for k in range(4)],
        [2, 2],
        chunks=3,
        checkpoint="never",
        schedule=schedule,
        **MODES[mode],
        **options,
    )
    return host, pipe, pipe.init(jax.random.key(0), NUMBERED)


def left():
    """What a call may not leave: threads, and arrays."""
    gc.collect()
    names = [t.name for t in threading.enumerate() if t.name.startswith("fpipe")]
    return names, len(jax.live_arrays())


@pytest.mark.quick(cases=2)
@pytest.mark.usefixtures("watchdog", "unlogged")
@pytest.mark.parametrize(("mode", "schedule"), in_turn(MODES, ["zb_h1", "1f1b"]))
@pytest.mark.usefixtures("own_heap")
def test_an_exception_anywhere_is_the_users_and_says_where(mode, schedule):
    """In every layer, microbatch and kind of action. Under scan on CPU the other
    devices waited for 40 s, and the process was ended.
    """
    host, pipe, params = asking(mode, schedule)
    step = pipe.value_and_grad(jnp.mean, argnums=(0, 1))

    def run():
        return jax.tree.map(np.asarray, jax.block_until_ready(step(params, NUMBERED)))

    want, before = run(), []
    for kind in "FIW":
        action = "B" if schedule == "1f1b" and kind in "IW" else kind
        for layer, stage in enumerate(STAGE_OF):
            for i in range(3):
                host.trigger.at = (kind, layer, i)
                with pytest.raises(ERRORS, match=r"BoomError: at") as caught:
                    run()
                assert f"BoomError: at ({kind!r}, {layer}, {i})" in str(caught.value)
                assert notes(caught.value) == [
                    f"fpipe: {DOING[action]} layer {layer} 'host{layer}', stage "
                    f"{stage}, microbatch {i}"
                ]
                del caught
                host.trigger.at = None
                before = before or [left()]
            assert_same(run(), want)
    assert [left()] == before
    assert before[0][0] == []


CALLS = {
    "call": lambda pipe: pipe,
    "evaluate": lambda pipe: pipe.evaluate(jnp.mean),
    "grad": lambda pipe: jax.grad(lambda p, x: jnp.mean(pipe(p, x))),
    "jit": lambda pipe: jax.jit(
        lambda p, x: jax.tree.map(jnp.sum, pipe.value_and_grad(jnp.mean)(p, x))
    ),
}


@pytest.mark.usefixtures("watchdog", "unlogged")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", CALLS)
def test_an_exception_in_every_call_says_where(mode, call):
    if call == "jit" and mode != "scan":
        return  # refused
    host, pipe, params = asking(mode)
    run = CALLS[call](pipe)
    want = jax.tree.map(np.asarray, run(params, NUMBERED))
    places = {("F", 1, 2): "in layer 1 'host1', stage 0, microbatch 2"}
    if call in ("grad", "jit"):
        where = "in the input gradient of layer 2 'host2', stage 1, microbatch 0"
        places["I", 2, 0] = where
    for at, place in places.items():
        host.trigger.at = at
        with pytest.raises(ERRORS, match="BoomError: at") as caught:
            jax.block_until_ready(run(params, NUMBERED))
        assert notes(caught.value) == [f"fpipe: {place}"]
        host.trigger.at = None
        assert_same(run(params, NUMBERED), want)


def scanned(tell):
    return lambda x: jax.lax.scan(lambda x, _: (tell(x), None), x, None, length=2)[0]


def looped(tell):
    loop = lambda x: jax.lax.fori_loop(0, 2, lambda _, x: tell(x), x)  # noqa: E731
    return lambda x: jax.lax.stop_gradient(loop(x)) + x


def branched(tell):
    return lambda x: jax.lax.cond(x[0, 0] < 9, tell, jnp.sin, x)


def recomputed(tell):
    return jax.checkpoint(lambda x: jnp.sin(tell(x)))


def jitted(tell):
    return jax.jit(lambda x: jnp.cos(tell(x)))


def nested(tell):
    return scanned(branched(jax.checkpoint(tell)))


def alone(tell):
    return tell


def returned(host, x):
    """A callback whose result is used."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    seen = jax.lax.stop_gradient(x)
    return x + jax.pure_callback(lambda x: host(x[0, 0]) or x * 0, shape, seen)


def debugged(host, x):
    jax.debug.callback(lambda x: host(x[0, 0]), x)
    return x


def unordered(host, x):
    seen = jax.lax.stop_gradient(x)
    io_callback(lambda x: host(x[0, 0]), None, seen)
    return x


# Eight ways to call Python, one for each layer of two models.
INSIDE = {
    "loops": [(scanned, returned), (looped, returned), (branched, returned)],
    "calls": [(recomputed, returned), (jitted, debugged), (nested, returned)],
    "effects": [(scanned, debugged), (alone, unordered), (alone, debugged)],
}


@pytest.mark.usefixtures("watchdog", "unlogged")
@pytest.mark.parametrize(("inside", "mode"), in_turn(INSIDE, ["threads", "scan"]))
def test_an_exception_inside_of_control_flow_says_where(mode, inside):
    trigger: Any = Trigger()

    def layer(k, around, ask):
        def host(number):
            trigger(k, int(number) % 10)

        def apply(p, x):
            return x + 0 * around(lambda x: ask(host, x))(x) * p

        return fpipe.Layer(apply, name=f"inside{k}")

    layers = [layer(k, *how) for k, how in enumerate(INSIDE[inside])]
    params = (jnp.ones(()),) * 3
    # JAX does not recompute effects.
    checkpoint = "never" if inside == "effects" else "always"
    pipe = fpipe.Pipe(layers, [2, 1], chunks=3, checkpoint=checkpoint, **MODES[mode])
    placed, step = pipe.place(params), pipe.value_and_grad(jnp.mean)
    plain = fpipe.sequential(layers, chunks=3).value_and_grad(jnp.mean)

    def run():
        loss, grads = jax.block_until_ready(step(placed, NUMBERED))
        jax.effects_barrier()
        return loss, pipe.gather(grads)

    want = plain(params, NUMBERED)
    assert_same(run(), want)
    for k, i in ((0, 1), (1, 0), (2, 2)):
        trigger.at = (k, i)
        with pytest.raises(ERRORS, match="BoomError: at") as caught:
            run()
        (said,) = notes(caught.value)
        name = f"layer {k} 'inside{k}', stage {(0, 0, 1)[k]}, microbatch {i}"
        assert said in (f"fpipe: in {name}", f"fpipe: in the backward of {name}")
        trigger.at = None
        with contextlib.suppress(*ERRORS):
            jax.effects_barrier()
        assert_same(run(), want)


@pytest.mark.usefixtures("watchdog", "unlogged")
@pytest.mark.parametrize("mode", MODES)
def test_a_format_that_does_not_fit_is_an_error_and_says_where(mode, capfd):
    """JAX formats while the program runs."""

    def layer(text):
        def apply(x):
            jax.debug.print(text, x[0, 0])
            return x

        return fpipe.fn(apply)

    right, wrong = layer("seen {:.1f}"), layer("seen {:d}")
    pipes = [
        fpipe.Pipe([right, last], [1, 1], chunks=3, **MODES[mode])
        for last in (right, wrong)
    ]

    def run(pipe):
        y = jax.block_until_ready(pipe(pipe.place(((), ())), NUMBERED))
        jax.effects_barrier()
        return y

    assert_same(run(pipes[0]), NUMBERED)
    lines = capfd.readouterr().out.split("\n")[:-1]
    assert sorted(lines) == [f"seen {i}.0" for i in range(3) for _ in range(2)]
    with pytest.raises(ERRORS, match="Unknown format code 'd'") as caught:
        run(pipes[1])
    (said,) = notes(caught.value)
    assert "layer 1 'apply', stage 1, microbatch " in said
    with contextlib.suppress(*ERRORS):
        jax.effects_barrier()


@pytest.mark.usefixtures("watchdog", "unlogged")
@pytest.mark.parametrize("mode", MODES)
def test_an_exception_in_a_callback_of_the_loss_says_so(mode):
    trigger: Any = Trigger()

    def loss(y):
        jax.debug.callback(lambda y: trigger(int(y[0, 0])), y)
        return jnp.mean(y)

    _, pipe, params = asking(mode)
    step = pipe.value_and_grad(loss)
    want = jax.tree.map(np.asarray, step(params, NUMBERED))
    trigger.at = (1,)

    def run():
        out = jax.block_until_ready(step(params, NUMBERED))
        jax.effects_barrier()
        return out

    with pytest.raises(ERRORS, match=r"BoomError: at \(1,\)") as caught:
        run()
    assert notes(caught.value) == ["fpipe: in loss_fn, stage 1, microbatch 1"]
    trigger.at = None
    with contextlib.suppress(*ERRORS):
        jax.effects_barrier()
    assert_same(step(params, NUMBERED), want)


@pytest.mark.usefixtures("watchdog", "unlogged", "interruptible")
def test_ctrl_c_under_scan_ends_the_call_and_the_pipe_works():
    host, pipe, params = asking("scan")
    step = pipe.value_and_grad(jnp.mean)
    want = jax.tree.map(np.asarray, step(params, NUMBERED))

    def interrupt(*where):
        if where == ("F", 1, 1):
            _thread.interrupt_main()
            time.sleep(0.3)  # still at it when the main thread is interrupted

    host.trigger = interrupt
    with pytest.raises((KeyboardInterrupt, *ERRORS)) as caught:
        jax.block_until_ready(step(params, NUMBERED))
    assert "KeyboardInterrupt" in f"{caught.type} {caught.value}"
    host.trigger = Trigger()
    assert_same(step(params, NUMBERED), want)
