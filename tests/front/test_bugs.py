"""Each test is the story of a bug."""

import dataclasses
import pickle

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

import fpipe
from fpipe.schedules import Schedule, one_f_one_b
from tests.executors.test_memory import counting
from tests.helpers import assert_same, mse


def scale(p, x):
    return jnp.tanh(x * p)


X = jnp.linspace(-1, 1, 28).reshape(7, 4)


@pytest.mark.parametrize(
    ("where", "checkpoint", "executor"),
    [
        (0, "never", "placed"),
        (0, "always", "placed"),
        (1, "never", "placed"),
        (1, "always", "placed"),
        (0, "never", "scan"),
        (1, "always", "scan"),
    ],
)
def test_a_gradient_that_is_zero_for_one_shape_of_microbatch_only(
    where, checkpoint, executor
):
    """The ragged last piece of one row took another way, had no gradient, and its place
    was a KeyError.
    """

    def centred(p, x):
        return jnp.tanh((x - x.mean(0)) * p) if x.shape[0] > 1 else jnp.zeros_like(x)

    layers = [centred, scale] if where == 0 else [scale, centred]
    pipe, reference = (
        fpipe.Pipe(layers, [1, 1], chunks=3, checkpoint=checkpoint, executor=executor),
        fpipe.sequential(layers, chunks=3),
    )
    params = (jnp.arange(1.0, 5), jnp.arange(1.0, 5) / 2)
    for run in (
        lambda model, p: model.value_and_grad(mse, argnums=(0, 1, 2))(p, X, X * 2),
        lambda model, p: jax.value_and_grad(
            lambda p, x: mse(model(p, x), X), argnums=(0, 1)
        )(p, X),
    ):
        value, (into_params, *others) = run(pipe, pipe.place(params))
        got = value, (pipe.gather(into_params), *others)
        assert_same(got, run(reference, params))


@pytest.mark.parametrize("checkpoint", ["never", "except_last", "always"])
def test_effects_of_a_backward_rule_are_kept(checkpoint):
    """A callback in a custom backward rule makes nothing that anyone reads, and was
    sliced away.
    """
    hits = []

    @jax.custom_vjp
    def double(x):
        return x * 2

    def backward(_, g):
        jax.debug.callback(lambda: hits.append(1))
        return (g * 2,)

    double.defvjp(lambda x: (x * 2, None), backward)
    pipe = fpipe.Pipe(
        [scale, lambda p, x: double(x * p), scale],
        [1, 1, 1],
        chunks=4,
        checkpoint=checkpoint,
    )
    params = pipe.place((jnp.ones(4),) * 3)
    jax.block_until_ready(pipe.value_and_grad(mse)(params, X[:4], X[:4]))
    jax.effects_barrier()
    assert len(hits) == 4


def test_what_depends_on_no_input_is_still_made_on_its_stages_device():
    """A program without arguments ran on the default device."""
    devices = jax.devices()[2:4]
    pipe = fpipe.Pipe([scale, lambda p, x: jnp.ones((x.shape[0], 4))], [1, 1], devices)
    params = pipe.place((jnp.ones(4), jnp.ones(4)))
    assert pipe(params, X).devices() == {devices[1]}
    assert pipe.evaluate(jnp.mean)(params, X).devices() == {devices[1]}
    pipe = fpipe.Pipe([scale, lambda p, x: x + p], [1, 1], devices)
    _, grads = pipe.value_and_grad(jnp.sum)(params, X)
    assert [g.devices() for g in grads] == [{d} for d in devices]


@pytest.mark.parametrize(
    "values", [(1, True, 1.0), (0.0, -0.0), (float("nan"), 1.0)], ids=str
)
def test_static_leaves_that_compare_equal_are_told_apart(values):
    """`1 == True == 1.0` and `0.0 == -0.0`: they shared one plan."""
    layer = fpipe.fn(
        lambda x: {
            "y": x["x"] * float(isinstance(x["s"], bool))
            + jnp.copysign(1.0, float(x["s"])),
            "s": None,
        }
    )
    pipe, reference = fpipe.Pipe([layer], [1]), fpipe.sequential([layer])
    for value in (*values, *values):
        x = {"x": X, "s": value}
        assert_same(pipe(((),), x), reference(((),), x))


@pytest.mark.parametrize(
    ("setting", "layer"),
    [
        (
            lambda: jax.threefry_partitionable(False),
            lambda p, x, *, key: (
                x * jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)
            ),
        ),
        (
            lambda: jax.default_prng_impl("rbg"),
            lambda p, x: x + jax.random.uniform(jax.random.key(1), x.shape),
        ),
    ],
    ids=["threefry_partitionable", "default_prng_impl"],
)
def test_settings_of_jax_that_a_trace_bakes_in_make_another_plan(setting, layer):
    pipe, reference = (
        fpipe.Pipe([layer], [1], chunks=2),
        fpipe.sequential([layer], chunks=2),
    )
    key = jax.random.key(3)
    before = pipe(((),), X, key=key)
    with setting():
        after = pipe(((),), X, key=key)
        assert_same(after, reference(((),), X, key=key))
    assert (np.asarray(before) != np.asarray(after)).any()


@pytest.mark.parametrize(
    "make", [fpipe.sequential, fpipe.Pipe], ids=["sequential", "Pipe"]
)
def test_losses_and_weights_are_summed_in_float32(make):
    """64 losses of 33 in bfloat16 came to 2064, and 65 weights of 1 + 2⁻⁹·64 to 1."""
    model = make([fpipe.fn(lambda x: x)], chunks=64)
    x = jnp.full((64, 1), 33.0, jnp.bfloat16)
    assert float(model.evaluate(jnp.sum, reduction="sum")(((),), x)) == 2112
    weights = jnp.full((65, 1), 2.0**-9, jnp.bfloat16).at[0].set(1)
    model = make([fpipe.fn(lambda x: x)], chunks=65)
    loss, grad = model.value_and_grad(
        lambda y, w: (y.sum(), w.sum()), reduction="weighted", argnums=1
    )(((),), weights, weights)
    assert float(loss) == 1
    assert_same(grad, jnp.full((65, 1), 1 / 1.125, jnp.bfloat16))


def test_parameters_are_made_on_their_own_device_whatever_the_keys():
    """`jax.default_device` does not move a committed key: all parameters were made
    beside it.
    """
    made = []

    def init(key, x):
        value = jax.random.normal(key, (4,))
        made.append(value.devices())
        return value

    devices = jax.devices()[1:3]
    pipe = fpipe.Pipe([fpipe.Layer(scale, init)] * 2, [1, 1], devices)
    params = pipe.init(jax.device_put(jax.random.key(0), jax.devices()[0]), X)
    assert made == [{d} for d in devices]
    assert_same(params, fpipe.sequential(pipe.layers).init(jax.random.key(0), X))


def test_keys_of_another_implementation_reach_init_as_they_are():
    seen = []
    layer = fpipe.Layer(
        lambda p, x: x["x"], lambda key, x: seen.append(x["key"].dtype) or ()
    )
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 7)
    fpipe.Pipe([layer], [1]).init(jax.random.key(0), {"x": X, "key": keys})
    assert seen == [keys.dtype]


def test_a_schedule_function_is_asked_only_for_what_the_pipe_could_have():
    """With `balance` given it was called for all devices there are, and raised the
    user's own error.
    """
    asked = []

    def schedule(devices, microbatches):
        asked.append((devices, microbatches))
        return one_f_one_b(devices, microbatches)

    fpipe.Pipe([scale, scale], [1, 1], chunks=3, schedule=schedule)
    assert set(asked) == {(2, 3)}


def test_for_its_map_a_schedule_function_is_asked_with_few_microbatches():
    """With `chunks=10**6` a pipe took 98 s to make."""
    asked = []

    def schedule(devices, microbatches):
        asked.append((devices, microbatches))
        return one_f_one_b(devices, microbatches)

    pipe = fpipe.Pipe(
        [scale, scale], devices=jax.devices()[:2], chunks=10**6, schedule=schedule
    )
    dataclasses.replace(pipe, chunks=10**7)
    pickle.dumps(fpipe.Pipe([scale, scale], [1, 1], chunks=10**6, schedule=one_f_one_b))
    assert set(asked) == {(2, 128)}
    asked.clear()
    pipe.make_schedule(130)
    assert asked == [(2, 130)]


def test_a_call_that_closes_over_everything_inside_jit_leaves_the_pipe_usable():
    """The constants of a new plan were put on their devices under the outer trace, and
    stayed there as tracers.
    """
    layer = fpipe.Layer(lambda p, x, *, key: x * p)
    pipe = fpipe.Pipe([layer], [1], chunks=2)
    params, key = pipe.place((jnp.ones(4),)), jax.random.key(0)
    with pytest.raises(TypeError, match=r"inside `jax\.jit`"):
        jax.jit(lambda: pipe(params, X, key=key))()
    assert_same(pipe(params, X, key=key), X)


def test_another_loss_compiles_the_last_stage_only():
    pipe = fpipe.Pipe([scale] * 4, [1, 1, 1, 1], chunks=2)
    params = pipe.place((jnp.ones(4),) * 4)
    traced = []

    def step(factor):
        loss = pipe.value_and_grad(lambda y: jnp.mean(y) * factor)
        events: list[str] = []
        with counting(events):
            jax.block_until_ready(loss(params, X))
        traced.append(sum("backend_compile" in e for e in events))

    step(1.0)
    step(2.0)
    first, second = traced
    # The first: F and B of four stages for two shapes of microbatch, and more. The
    # second: those of the last stage, the loss, and the zeros that gradients are summed
    # into.
    assert 0 < second <= first - 3 * 2


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
def test_an_output_is_a_buffer_of_its_own(kind):
    """With one microbatch an identity gave the user's own array back, and donating the
    output deleted it.
    """
    pipe = fpipe.Pipe([fpipe.fn(lambda x: (x, x))], [1])
    x = kind(np.arange(64.0, dtype=np.float32).reshape(8, 8))
    one, other = pipe(((),), x)
    spoil = jax.jit(lambda a, b: (a * 0, b * 0), donate_argnums=(0, 1))
    spoil(one, other)
    np.testing.assert_array_equal(x, np.arange(64.0).reshape(8, 8))


def test_a_forward_only_schedule_gives_no_gradients_of_zero():
    schedule = Schedule([[("F", 0, 0)], [("F", 1, 0)]])
    pipe = fpipe.Pipe([scale, scale], [1, 1], schedule=schedule)
    params = pipe.place((jnp.ones(4), jnp.ones(4)))
    assert float(pipe.evaluate(jnp.mean)(params, X)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(
        ValueError, match="has forwards only, and the call computes gradients"
    ):
        pipe.value_and_grad(jnp.mean)(params, X)


def test_a_plan_of_the_scan_executor_takes_parameters_in_16_bits():
    """It looked for the size of `jnp.float32`, which has none: the sums of their
    gradients are float32.
    """
    layer = fpipe.Layer(
        lambda w, x: x @ w, lambda key, x: jnp.ones((64, 64), jnp.bfloat16)
    )
    pipe = fpipe.Pipe([layer] * 2, [1, 1], chunks=2, executor="scan")
    plan = pipe.plan(None, jax.ShapeDtypeStruct((4, 64), jnp.bfloat16))
    assert plan.devices[0].memory["gradients"] == 64 * 64 * (
        4 + 2
    )  # the sum, and what is returned
