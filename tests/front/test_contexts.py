"""JAX's own settings and contexts, which hold in a pipe as they do in plain JAX."""

import contextlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.core import Tracer

import fpipe
import fpipe.optim
from tests.helpers import assert_same, eventually, in_turn, raises

EXECUTORS = ("placed", "scan")

X = jnp.arange(8.0).reshape(4, 2)


def pipe_of(layers, executor, **options):
    return fpipe.Pipe(layers, executor=executor, chunks=2, **options)


# --- what a trace depends on ---


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_layer_that_makes_a_key_follows_the_offset_of_seeds(executor):
    """A changed `jax_random_seed_offset` was ignored by a warm pipe."""
    layers = [lambda p, x: x + jax.random.uniform(jax.random.key(1), x.shape)]
    pipe, reference = pipe_of(layers, executor), fpipe.sequential(layers, chunks=2)
    params = pipe.place(((),))
    before = pipe(params, X)
    jax.config.update("jax_random_seed_offset", 7)
    try:
        after = pipe(params, X)
        assert_same(after, reference(((),), X))
    finally:
        jax.config.update("jax_random_seed_offset", 0)
    assert (np.asarray(before) != np.asarray(after)).any()
    assert_same(pipe(params, X), before)


# --- without jit ---


def make_rich_layers(seen):
    """Layers with a key, state, integers and a borrower, which tell what they see."""

    def noisy(params, x, *, key, state):
        seen.append(x)
        keep = jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)
        return x * keep + params["w"], state + x.mean()

    def embed(params, x):
        return x @ params["table"] + params["number"].astype(x.dtype)

    def tied(params, x, *, borrowed):
        return jnp.tanh(x * params @ borrowed["embed"]["table"])

    return [
        fpipe.Layer(embed, name="embed"),
        fpipe.Layer(noisy, name="noisy"),
        fpipe.Layer(tied, borrow=["embed"]),
    ]


RICH_PARAMS = (
    {"table": jnp.arange(4.0).reshape(2, 2) / 3, "number": jnp.int32(1)},
    {"w": jnp.full(2, 0.5)},
    jnp.full(2, 0.7),
)


def weighted(y, target):
    weight = (target > 2).sum().astype(y.dtype)
    return (((y - target) ** 2).sum(), weight), {"y": y}


def is_first_layer(path, array):
    del array
    return path.startswith("0/")


@pytest.mark.parametrize("executor", EXECUTORS)
def test_without_jit_a_layer_sees_values_and_nothing_else_changes(executor):
    """A warm pipe ignored `jax.disable_jit`: no `print` and no debugger worked."""
    seen = []
    layers = make_rich_layers(seen)
    pipe = pipe_of(layers, executor)
    params, key = pipe.place(RICH_PARAMS), jax.random.key(2)
    state = (None, jnp.zeros(()), None)
    step = pipe.value_and_grad(
        weighted, True, "weighted", argnums=(0, 1, 2), frozen=is_first_layer
    )

    def calls():
        y, _ = pipe(params, X, key=key, state=state)
        outer = jax.grad(
            lambda p: pipe(p, X, key=key, state=state)[0].sum(), allow_int=True
        )(params)
        return step(params, X, X, key=key, state=state), y, outer

    def place_of(array):
        return getattr(array, "sharding", None)

    warm = calls()
    seen.clear()
    with jax.disable_jit():
        got = calls()
        evaluated = pipe.evaluate(weighted, True, "weighted")(
            params, X, X, key=key, state=state
        )
    # A forward and an evaluation of two microbatches each see plain arrays. Under a
    # gradient JAX's tracers hold values, as in plain JAX.
    assert sum(not isinstance(x, Tracer) for x in seen) == 4
    assert_same(got, warm)
    assert_same(evaluated, warm[0][0])
    # Results are where a call leaves them: a step after it compiles nothing new.
    (_, (grads, *_)), y, _ = got
    (_, (warm_grads, *_)), warm_y, _ = warm
    for array, like in zip(
        jax.tree.leaves((grads, y)), jax.tree.leaves((warm_grads, warm_y)), strict=True
    ):
        assert place_of(array) == place_of(like)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_without_jit_a_call_is_not_recorded_and_compiling_serves_later_calls(executor):
    pipe = pipe_of([fpipe.fn(jnp.sin)] * 2, executor, balance=[1, 1])
    params = pipe.place(((), ()))
    with jax.disable_jit():
        assert pipe.compile(params, X) >= 1
        with raises(
            ValueError,
            "`fpipe.record(pipe)`: the call is under `jax.disable_jit`, where the "
            "layers run one by one and no program is dispatched; record it outside",
        ):
            pipe.record(pipe, params, X)
    assert_same(pipe(params, X), jnp.sin(jnp.sin(X)))


# --- NaNs ---


def globally(name):
    """A setting for all threads, as `jax.config.update` sets it."""

    @contextlib.contextmanager
    def context():
        jax.config.update(name, True)
        try:
            yield
        finally:
            jax.config.update(name, False)

    return context


SENSES = {
    "nans": lambda: jax.debug_nans(True),
    "nans everywhere": globally("jax_debug_nans"),
    "infs everywhere": globally("jax_debug_infs"),
}


@pytest.mark.parametrize(
    ("dispatch", "sense"), in_turn(["one_thread", "thread_per_device", "scan"], SENSES)
)
def test_an_operation_that_makes_a_nan_is_named(dispatch, sense):
    """In threads nothing was looked for, or an exception of JAX's own came out."""
    value = -1.0 if sense.startswith("nans") else 0.0
    pipe = pipe_of(
        [lambda p, x: x * p, fpipe.fn(lambda x: jnp.log(x))],
        "scan" if dispatch == "scan" else "placed",
        balance=[1, 1],
        dispatch="auto" if dispatch == "scan" else dispatch,
    )
    params = pipe.place((jnp.ones(()), ()))
    step = pipe.value_and_grad(jnp.mean)
    x = jnp.ones((4, 2))
    warm = step(params, x)
    with SENSES[sense]():
        # Programs that have run without a NaN are looked at again.
        assert_same(step(params, x), warm)
        pipe.plan(params, x, loss_fn=jnp.mean)
        assert_same(step(params, x), warm)
        for call in (step, pipe, lambda p, x: jax.grad(lambda q: pipe(q, x).sum())(p)):
            with pytest.raises(FloatingPointError) as info:
                call(params, x * value)
            assert type(info.value) is FloatingPointError
            assert "encountered in log" in str(info.value)
        notes = "".join(info.value.__notes__)
        assert "layer 1" in notes or "layers 1" in notes
        # Sums are not donated, for JAX runs a program again. What is finite passes.
        assert_same(step(params, x), warm)
    assert_same(step(params, x), warm)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_nan_of_a_backward_is_found(executor):
    pipe = pipe_of([lambda p, x: jnp.sqrt(x * p)], executor, balance=[1])
    params = pipe.place((jnp.zeros(()),))
    x = jnp.ones((4, 2))
    step = pipe.value_and_grad(jnp.sum, reduction="sum")
    with jax.debug_infs(True):
        with pytest.raises(FloatingPointError, match="invalid value"):
            step(params, x)
        y, pull_back = jax.vjp(pipe, params, x)
        with pytest.raises(FloatingPointError, match="invalid value"):
            pull_back(y + 1)


# --- forks ---


@pytest.mark.filterwarnings("ignore")
def test_a_pipe_in_a_fork_is_an_error_and_does_not_hang():
    pipe = pipe_of([fpipe.fn(jnp.sin)], "placed", balance=[1])
    params = pipe.place(((),))
    child = os.fork()
    if not child:
        # Nothing of pytest may run here: the process ends in this block.
        status = 0
        try:
            for call in (
                lambda: pipe(params, X),
                lambda: pipe.place(((),)),
                lambda: fpipe.Pipe([fpipe.fn(jnp.sin)], devices=pipe.devices),
            ):
                try:
                    call()
                except RuntimeError as error:
                    text = f"a Pipe is used in process {os.getpid()}, a fork of process"
                    status |= not str(error).startswith(text)
                else:
                    status |= 2
        finally:
            os._exit(status)

    ended = []

    def has_ended():
        ended.append(os.waitpid(child, os.WNOHANG))
        return ended[-1][0] == child

    try:
        assert eventually(has_ended)
    except BaseException:
        os.kill(child, 9)
        raise
    assert ended[-1][1] == 0


# --- every call under every context ---


def noise_layer(params, x, *, key, state):
    keep = jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)
    return x * keep + params, state + x.sum().astype(state.dtype)


CALLED = [
    fpipe.Layer(
        lambda w, x: jnp.tanh(x @ w),
        lambda key, x: jax.random.normal(key, (2, 2), x.dtype),
    ),
    fpipe.Layer(
        noise_layer,
        lambda key, x: jnp.full((1, *x.shape[1:]), 0.5, x.dtype),
        init_state=lambda x: jnp.zeros((), x.dtype),
    ),
]


def square(y, target):
    return ((y - target) ** 2).sum()


def plan_everything(x, key):
    """A balance and a tuning, which know no executor."""
    state = fpipe.sequential(CALLED, chunks=2).init_state(x)
    devices = jax.devices()[:2]
    tuning = fpipe.tune(
        CALLED,
        x,
        key=key,
        state=state,
        devices=devices,
        chunks=[1, 2],
        schedules=["1f1b"],
        checkpoints=["never"],
    )
    # Not its figures: without jit a loop of a random generator counts as often as it
    # runs, and under `debug_nans` no buffer is donated.
    assert tuning.best.prediction is not None
    cut = fpipe.balance(CALLED, x, devices=devices, chunks=2)
    return [*cut, tuning.best.chunks]


def call_everything(model, x, key, cotangent):
    """What every public call gives, in a form that all models share."""
    params, state = model.init(key, x), model.init_state(x)
    needs = {"key": key, "state": state}
    whole = model.gather(params)
    out = {"init": whole, "state": state, "place": model.gather(model.place(whole))}
    out["call"] = model(params, x, **needs)
    out["evaluate"] = model.evaluate(square)(params, x, x, **needs)
    step = model.value_and_grad(square, argnums=(0, 1))
    first, (grads, of_x) = step(params, x, x, **needs)
    _, (scaled, _) = step(params, x, x, **needs, loss_scale=2.0, grads=(grads, of_x))
    out["value_and_grad"] = (first, model.gather(grads), of_x, model.gather(scaled))
    _, pull_back = jax.vjp(lambda p: model(p, x, **needs)[0], params)
    out["vjp"] = model.gather(*pull_back(cotangent))
    if isinstance(model, fpipe.Pipe):
        model.compile(params, x, x, **needs, loss_fn=square, progress=None)
        model.plan(params, x, x, **needs, loss_fn=square)
        if not jax.config.values["jax_disable_jit"]:  # nothing is dispatched then
            with fpipe.record(model) as timeline:
                recorded, _ = step(params, x, x, **needs)
            assert_same(recorded, first)
            # Two stages, and at least a forward and a backward of each microbatch.
            assert len(timeline.events) >= 2 * 2 * model.chunks
        tx = fpipe.optim.per_stage(optax.sgd(0.1, momentum=0.9))
        moments = tx.init(params)
        moments = fpipe.optim.place(fpipe.optim.gather(moments), params, tx)
        updates, moments = tx.update(grads, moments, params)
        out["optimizer"] = (
            model.gather(fpipe.optim.apply_updates(params, updates)),
            fpipe.optim.global_norm(grads),
            fpipe.optim.gather(moments),
        )
        fpipe.optim.DynamicLossScale().adjusted(grads)
    else:
        tx = optax.sgd(0.1, momentum=0.9)
        updates, moments = tx.update(grads, tx.init(params), params)
        out["optimizer"] = (
            optax.apply_updates(params, updates),
            optax.tree.norm(grads),
            moments,
        )
    return out


@contextlib.contextmanager
def other_numbers():
    """Under these the plain composition gives other numbers than without."""
    with jax.enable_x64(True), jax.threefry_partitionable(False):
        yield


@contextlib.contextmanager
def traced_otherwise():
    """Settings that change what is traced, or what may be done, and no result."""
    with (
        jax.default_matmul_precision("highest"),
        jax.default_device(jax.devices()[3]),
        jax.numpy_rank_promotion("raise"),
        jax.debug_key_reuse(True),
        jax.transfer_guard("disallow"),
    ):
        yield


@contextlib.contextmanager
def checked():
    """JAX looks for mistakes of its users."""
    with (
        jax.checking_leaks(),
        jax.enable_checks(True),
        jax.debug_nans(True),
        jax.debug_infs(True),
    ):
        yield


# Each makes all programs anew, so what goes together is tried together.
QUIET = {
    "traced_otherwise": traced_otherwise,
    "checked": checked,
    "disable_jit": jax.disable_jit,
}


@pytest.fixture(scope="module")
def plain_results():
    """What the plain composition gives under no context."""
    return call_everything(fpipe.sequential(CALLED, chunks=2), *arguments())


@pytest.fixture(scope="module")
def plain_plan():
    """What is planned under no context."""
    return plan_everything(*arguments()[:2])


def arguments():
    x = jnp.linspace(0.1, 0.9, 8, dtype=float).reshape(4, 2)
    return x, jax.random.key(5), jnp.ones_like(x)


@pytest.mark.parametrize("name", QUIET)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_every_call_holds_under_every_context(executor, name, plain_results):
    pipe, given = pipe_of(CALLED, executor, balance=[1, 1]), arguments()
    with QUIET[name]():
        got = call_everything(pipe, *given)
    for call, result in plain_results.items():
        assert_same(got[call], result)


@pytest.mark.parametrize("name", QUIET)
def test_a_balance_and_a_tuning_hold_under_every_context(name, plain_plan):
    given = arguments()[:2]
    with QUIET[name]():
        assert plan_everything(*given) == plain_plan


def test_every_call_holds_under_contexts_that_change_numbers(plain_plan):
    with other_numbers():
        want = call_everything(fpipe.sequential(CALLED, chunks=2), *arguments())
        assert plan_everything(*arguments()[:2]) == plain_plan
        for executor in EXECUTORS:
            pipe = pipe_of(CALLED, executor, balance=[1, 1])
            got = call_everything(pipe, *arguments())
            for call, result in want.items():
                assert_same(got[call], result)
