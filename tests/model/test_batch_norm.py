"""Deferred batch normalisation: running statistics are the whole batch's, once per
call, wherever and however it runs.
"""

import dataclasses
import functools
import math
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import fpipe
from fpipe._model.batch_norm import Moments, merge, moments, no_moments, variance
from tests.helpers import WIDTH, assert_same, dense, mse, raises

KEY = jax.random.key
STAT = ("mean", "var")


def data(rows, *shape, mean=0.5, std=2.0, seed=1):
    return jnp.asarray(
        np.random.default_rng(seed).normal(mean, std, (rows, *(shape or (WIDTH,)))),
        jnp.float32,
    )


def shaken(tree, seed=1):
    """Every array plus numbers from 0 to 1."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: jnp.asarray(
            np.asarray(a, np.float32) + random.random(a.shape), a.dtype
        ),
        tree,
    )


# --- moments, against numpy in float64 ---


def whole(x, axes):
    """Moments by numpy, in float64."""
    x = np.asarray(x, np.float64)
    return Moments(
        math.prod(x.shape[a] for a in axes),
        x.mean(axes),
        x.var(axes) * math.prod(x.shape[a] for a in axes),
    )


def assert_moments(got, want, tolerance=1e-5):
    assert {leaf.dtype for leaf in got} == {jnp.dtype(jnp.float32)}
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(
            a, b, rtol=tolerance, atol=tolerance * np.abs(b).max()
        )


PARTS = {
    "one": [7],
    "even": [4, 4],
    "ragged": [3, 3, 3, 1],
    "single rows": [1] * 9,
    "one large": [1, 50, 2],
    "empty in between": [0, 3, 0, 2, 0],
}


@pytest.mark.quick(cases=4)
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(
    ("shape", "axes"), [((4,), (0,)), ((3, 4), (0, 1)), ((4, 3), (0, 2))]
)
def test_merged_moments_are_those_of_the_whole(parts, shape, axes):
    x = data(sum(PARTS[parts]), *shape)
    pieces = jnp.split(x, np.cumsum(PARTS[parts])[:-1])
    feature = whole(x, axes).mean.shape
    each = [
        moments(piece, axes) if piece.shape[0] else no_moments(feature)
        for piece in pieces
    ]
    for order in (each, each[::-1]):
        assert_moments(
            functools.reduce(merge, order, no_moments(feature)), whole(x, axes)
        )
    assert_moments(
        functools.reduce(lambda a, b: merge(b, a), each), whole(x, axes)
    )  # pairs the other way round


def test_no_moments_change_nothing_bit_for_bit():
    some = Moments(
        jnp.float32(3), jnp.array([1e30, -0.1]), jnp.array([1e-20, 7.0])
    )  # 1e30 squared would be inf
    none = no_moments((2,))
    assert_same(merge(none, some), some, 0)
    assert_same(merge(some, none), some, 0)
    assert_same(merge(none, none), none, 0)


@pytest.mark.parametrize("parts", [1, 4, 64])
def test_a_large_mean_cancels_nothing(parts):
    """The mean of squares less the square of the mean has no correct digit here."""
    x = data(4096, mean=1000.0, std=0.01)
    got = functools.reduce(
        merge,
        (moments(piece, (0,)) for piece in jnp.split(x, parts)),
        no_moments((WIDTH,)),
    )
    want = whole(x, (0,))
    np.testing.assert_allclose(variance(got), want.m2 / 4096, rtol=1e-3)
    np.testing.assert_allclose(got.mean, want.mean, rtol=2e-7)
    naive = np.asarray(jnp.mean(x * x, 0) - jnp.mean(x, 0) ** 2)
    assert np.abs(naive / (want.m2 / 4096) - 1).min() > 0.99


def test_what_the_first_mean_was_off_by_is_put_right():
    """Without that the variance is off by 6e-5 here."""
    x = data(20_000, mean=1000.0, std=0.01, seed=0)
    np.testing.assert_allclose(moments(x, (0,)).m2, whole(x, (0,)).m2, rtol=1e-6)


def test_low_precision_inputs_have_moments_in_float32():
    x = data(32, mean=10.0, std=0.1).astype(jnp.bfloat16)
    assert_moments(moments(x, (0,)), whole(x.astype(jnp.float32), (0,)))
    with jax.enable_x64(True):
        assert moments(jnp.ones((2, 2), jnp.float64), (0,)).m2.dtype == jnp.float64


# --- one layer, against Flax ---

SHAPES = {
    "rows": ((), {}),
    "images": ((3, 5, 4), {}),
    "channels first": ((4, 3), {"axis": 1}),
    "two axes": ((4, 3), {"axis": (1, -1)}),
    "no bias": ((), {"use_bias": False}),
    "no scale": ((), {"use_scale": False}),
    "neither": ((), {"use_bias": False, "use_scale": False}),
    "epsilon": ((), {"epsilon": 0.3, "momentum": 0.5}),
}
DTYPES = {
    "float32": (jnp.float32, {}, 1e-5),
    "bfloat16 in": (jnp.bfloat16, {}, 1e-5),
    "bfloat16 all": (jnp.bfloat16, {"param_dtype": jnp.bfloat16}, 1e-2),
    "bfloat16 out": (jnp.float32, {"dtype": jnp.bfloat16}, 2e-2),
}


def flax_norm(options, params, stats, x, average=False, **more):
    norm = linen.BatchNorm(
        use_running_average=average, use_fast_variance=False, **options
    )
    with jax.numpy_dtype_promotion("standard"):
        y, new = norm.apply(
            {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"], **more
        )
    return y, new["batch_stats"]


@pytest.mark.quick(cases=3)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(s, "float32") for s in SHAPES] + [("rows", d) for d in DTYPES if d != "float32"],
)
def test_one_microbatch_is_flax(shape, dtype):
    dims, options = SHAPES[shape]
    kind, more, tolerance = DTYPES[dtype]
    options = options | more
    x = data(6, *dims).astype(kind)
    model = fpipe.sequential([fpipe.DeferredBatchNorm(**options)])
    params, state = model.init(KEY(0), x), model.init_state(x)
    with jax.numpy_dtype_promotion("standard"):
        flax = linen.BatchNorm(use_running_average=False, **options).init(KEY(0), x)
    assert_same(params[0], flax.get("params", {}), 0)
    assert_same({n: state[0][n] for n in STAT}, flax["batch_stats"], 0)
    params = shaken(params, 5)
    target = data(6, *dims, seed=9)

    def loss(y, t):
        return mse(y.astype(jnp.float32), t)

    def plain(params, x, state):
        y, new = flax_norm(options, params, {n: state[n] for n in STAT}, x)
        return loss(y, target), (y, new)

    (_, (y, stats)), grads = jax.jit(jax.value_and_grad(plain, (0, 1), has_aux=True))(
        params[0], x, state[0]
    )
    got, new = jax.jit(functools.partial(model, train=True))(params, x, state=state)
    assert_same(got, y, tolerance)
    assert_same({n: new[0][n] for n in STAT}, dict(stats), 1e-5)
    step = jax.jit(
        functools.partial(model.value_and_grad(loss, argnums=(0, 1)), train=True)
    )
    _, mine = step(params, x, target, state=state)
    assert_same((mine[0][0], mine[1]), grads, max(tolerance, 1e-4))
    # Running statistics normalise, and stay.
    got, same = model(params, x, state=new, train=False)
    assert_same(
        got, flax_norm(options, params[0], stats, x, average=True)[0], tolerance
    )
    assert_same(same, new, 0)


def test_the_variance_of_a_large_mean_comes_out_right():
    x = data(64, mean=1000.0, std=0.01, seed=2)
    model = fpipe.sequential([fpipe.DeferredBatchNorm(momentum=0.0)], chunks=5)
    _, state = model(model.init(KEY(0), x), x, state=model.init_state(x), train=True)
    want = np.asarray(x, np.float64)
    np.testing.assert_allclose(state[0]["var"], want.var(0), rtol=1e-3)
    np.testing.assert_allclose(state[0]["mean"], want.mean(0), rtol=2e-7)


def run(options, xs, chunks=3):
    model = fpipe.sequential([fpipe.DeferredBatchNorm(**options)], chunks=chunks)
    state = model.init_state(xs[0])
    for x in xs:
        _, state = model(model.init(KEY(0), x), x, state=state, train=True)
    return jax.device_get(state[0])


@pytest.mark.parametrize("unbiased", [False, True])
def test_the_average_over_all_calls(unbiased):
    xs = [data(rows, seed=rows) for rows in (7, 4, 9)]
    state = run({"momentum": None, "unbiased": unbiased}, xs)
    assert state["calls"] == 3
    each = [np.asarray(x, np.float64) for x in xs]
    np.testing.assert_allclose(
        state["mean"], np.mean([x.mean(0) for x in each], 0), rtol=1e-5
    )
    np.testing.assert_allclose(
        state["var"], np.mean([x.var(0, ddof=unbiased) for x in each], 0), rtol=1e-5
    )


def test_the_unbiased_variance_and_a_single_value():
    x = data(10)
    want = np.asarray(x, np.float64).var(0, ddof=1)
    np.testing.assert_allclose(
        run({"momentum": 0.0, "unbiased": True}, [x])["var"], want, rtol=1e-5
    )
    np.testing.assert_array_equal(
        run({"momentum": 0.0, "unbiased": True}, [x[:1]])["var"], 0
    )


# --- in a pipeline, against numpy and the plain composition ---

NORM = functools.partial(fpipe.DeferredBatchNorm, momentum=0.75)


def layers():
    return [dense(), NORM(name="one"), dense(), NORM(name="two", unbiased=True)]


def pieces(x, chunks):
    size = -(-x.shape[0] // chunks)
    return [x[k : k + size] for k in range(0, x.shape[0], size)]


def by_numpy(params, x, chunks, steps=1):
    """The running statistics of `layers()` in float64."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    seen: dict[str, list] = {"one": [], "two": []}

    def norm(name, p, x):
        seen[name].append(x)
        return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * p["scale"] + p["bias"]

    def line(p, x):
        return np.tanh(x @ p["w"] + p["b"])

    for piece in pieces(np.asarray(x, np.float64), chunks):
        norm(
            "two",
            params[3],
            line(params[2], norm("one", params[1], line(params[0], piece))),
        )
    out = []
    for name, ddof in (("one", 0), ("two", 1)):
        all_ = np.concatenate(seen[name])
        mean, var = np.zeros(WIDTH), np.ones(WIDTH)
        for _ in range(steps):
            mean, var = (
                0.75 * mean + 0.25 * all_.mean(0),
                0.75 * var + 0.25 * all_.var(0, ddof=ddof),
            )
        out.append({"mean": mean, "var": var})
    return out


def assert_statistics(state, want, calls=1):
    for got, numbers in zip((state[1], state[3]), want, strict=True):
        for name in STAT:
            np.testing.assert_allclose(got[name], numbers[name], rtol=1e-4, atol=1e-5)
        assert got["calls"] == calls
        for leaf in got["moments"]:
            np.testing.assert_array_equal(leaf, 0)


PLACED = [
    (10, 4, "gpipe", "always"),
    (10, 4, "gpipe", "never"),
    (10, 4, "1f1b", "except_last"),
    (2, 4, "1f1b", "always"),
    (12, 4, "eager_1f1b", "always"),
    (12, 1, "1f1b", "always"),
]


@functools.cache
def expected(rows, chunks):
    """Two training steps and a call in between, in the plain composition."""
    model, x, target = (
        fpipe.sequential(layers(), chunks),
        data(rows, seed=2),
        data(rows, seed=3),
    )
    params, state = model.init(KEY(0), x), model.init_state(x)
    step = jax.jit(functools.partial(model.value_and_grad(mse), train=True))
    out = [state]
    for _ in range(2):
        (loss, state), grads = step(params, x, target, state=state)
        out.append((loss, state, grads))
    return params, out, jax.jit(model)(params, x, state=state)[0]


def check(pipe, rows, chunks):
    params, (first, *steps), y = expected(rows, chunks)
    x, target = data(rows, seed=2), data(rows, seed=3)
    placed, state, step = (
        pipe.place(params),
        pipe.init_state(x),
        pipe.value_and_grad(mse),
    )
    assert_same(state, first, 0)
    for n, want in enumerate(steps, 1):
        (loss, state), grads = step(placed, x, target, state=state, train=True)
        assert_same(
            jax.device_get((loss, state, pipe.gather(grads))),
            jax.device_get(want),
            1e-4,
        )
        assert_statistics(jax.device_get(state), by_numpy(params, x, chunks, n), n)
    got, after = pipe(placed, x, state=state, train=False)
    assert_same(jax.device_get((got, after)), jax.device_get((y, state)), 1e-4)
    assert_same(jax.device_get(after), jax.device_get(state), 0)


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_a_forward_alone_in_training(executor):
    params, x = expected(12, 4)[0], data(12, seed=2)
    pipe = fpipe.Pipe(layers(), [2, 2], chunks=4, executor=executor)
    _, state = pipe(pipe.place(params), x, state=pipe.init_state(x), train=True)
    assert_statistics(jax.device_get(state), by_numpy(params, x, 4))


@pytest.mark.parametrize(("rows", "chunks", "schedule", "checkpoint"), PLACED)
def test_placed(rows, chunks, schedule, checkpoint):
    balance = [1, 2, 1] if schedule == "gpipe" else [2, 2]
    check(
        fpipe.Pipe(
            layers(), balance, chunks=chunks, schedule=schedule, checkpoint=checkpoint
        ),
        rows,
        chunks,
    )


@pytest.mark.parametrize(
    ("schedule", "checkpoint"),
    [("gpipe", "always"), ("1f1b", "never"), ("1f1b", "always")],
)
def test_scan(schedule, checkpoint):
    check(
        fpipe.Pipe(
            layers(),
            [2, 2],
            chunks=4,
            schedule=schedule,
            checkpoint=checkpoint,
            executor="scan",
        ),
        10,
        4,
    )


@pytest.mark.parametrize(("rows", "chunks"), [(12, 1), (12, 4), (10, 4), (2, 4)])
def test_the_statistics_of_flax_for_the_batch_in_one_piece(rows, chunks):
    x = data(rows)
    model = fpipe.sequential([NORM()], chunks=chunks)
    params, state = model.init(KEY(0), x), model.init_state(x)
    want = {n: state[0][n] for n in STAT}
    for seed in (1, 2):
        x = data(rows, seed=seed)
        _, state = model(params, x, state=state, train=True)
        want = flax_norm({"momentum": 0.75}, params[0], want, x)[1]
    assert_same({n: state[0][n] for n in STAT}, dict(want))


# --- the layer as a value ---


def test_equal_options_are_equal_layers_and_pickle():
    one, other = (
        fpipe.DeferredBatchNorm(axis=[1], dtype="bfloat16"),
        fpipe.DeferredBatchNorm(1, dtype=jnp.bfloat16),
    )
    assert one == other == pickle.loads(pickle.dumps(one))
    assert hash(one) == hash(other)
    assert one.name == "batch_norm"
    others: Any = (
        {"momentum": 0.5},
        {"epsilon": 1.0},
        {"unbiased": True},
        {"use_bias": False},
        {"axis": 0},
    )
    for option in others:
        assert fpipe.DeferredBatchNorm(**option) != fpipe.DeferredBatchNorm()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "momentum": (
        {"momentum": 1.5},
        "`fpipe.DeferredBatchNorm(momentum=1.5)`: from 0 to 1, or None for the average",
    ),
    "nan": (
        {"momentum": math.nan},
        "`fpipe.DeferredBatchNorm(momentum=nan)`: from 0 to 1",
    ),
    "epsilon": (
        {"epsilon": -1e-5},
        "`fpipe.DeferredBatchNorm(epsilon=-1e-05)`: at least 0",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option(name):
    options, text = WRONG[name]
    with pytest.raises(ValueError, match="DeferredBatchNorm") as caught:
        fpipe.DeferredBatchNorm(**options)
    assert text in str(caught.value)


TWO_AXES = "got an array of shape (2, 3); its axes go from -2 to 1"


@pytest.mark.parametrize(
    ("x", "axis", "kind", "text"),
    [
        (
            jnp.ones((2, 3)),
            2,
            ValueError,
            TWO_AXES,
        ),
        (
            jnp.ones((2, 3)),
            -3,
            ValueError,
            TWO_AXES,
        ),
        (
            jnp.ones((2, 3), jnp.int32),
            -1,
            TypeError,
            "normalises an array of real floats, got int32",
        ),
        (
            jnp.ones((2, 3), jnp.complex64),
            -1,
            TypeError,
            "normalises an array of real floats, got complex64",
        ),
        (
            (jnp.ones((2, 3)),),
            -1,
            TypeError,
            "normalises an array of real floats, got tuple",
        ),
    ],
)
def test_a_wrong_input(x, axis, kind, text):
    with pytest.raises(kind) as caught:
        fpipe.sequential([fpipe.DeferredBatchNorm(axis)]).init(KEY(0), x)
    assert text in str(caught.value)


# --- Pipe(deferred_batch_norm=True) ---


def centre(params, x, *, state, train):
    """A norm that updates with each microbatch."""
    mean = x.mean(0)
    if not train:
        return x - state["mean"], state
    return (x - mean) * params, {"mean": 0.5 * state["mean"] + 0.5 * mean}


def own_init(key, x):
    return jnp.full(x.shape[-1:], 2.0)


def own_state(x):
    return {"mean": jnp.zeros(x.shape[-1:])}


def centre_later(params, x, *, state, train):
    """The same norm, deferred."""
    if not train:
        return x - state["mean"], state
    mean = x.mean(0)
    return (x - mean) * params, {
        **state,
        "sum": state["sum"] + x.sum(0),
        "rows": state["rows"] + x.shape[0],
    }


def later_state(x):
    return {**own_state(x), "sum": jnp.zeros(x.shape[-1:]), "rows": jnp.float32(0)}


def later_finish(state):
    mean = jnp.where(
        state["rows"] > 0,
        0.5 * state["mean"] + 0.5 * state["sum"] / state["rows"],
        state["mean"],
    )
    return {"mean": mean, "sum": jnp.zeros_like(mean), "rows": jnp.float32(0)}


def defer():
    return fpipe.Layer(centre_later, init_state=later_state, finish=later_finish)


CENTRE = fpipe.Layer(centre, own_init, "centre", init_state=own_state, defer=defer)


def double(x):
    return 2 * x


SCALE = fpipe.Layer(lambda params, x: x * params, own_init, "scale")
DOUBLE = fpipe.fn(double)


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_the_option_defers_layers_that_can(executor):
    x = data(8)
    pipe = fpipe.Pipe(
        [SCALE, CENTRE], [1, 1], chunks=4, executor=executor, deferred_batch_norm=True
    )
    reference = fpipe.sequential([SCALE, CENTRE], 4, deferred_batch_norm=True)
    plain = fpipe.sequential([SCALE, CENTRE], 4)
    params = reference.init(KEY(0), x)
    assert_same(params, plain.init(KEY(0), x), 0)  # parameters of one fit the other
    ys = []
    for model in (pipe, reference):
        y, state = model(model.place(params), x, state=model.init_state(x), train=True)
        ys.append(jax.device_get((y, state)))
        np.testing.assert_allclose(
            state[1]["mean"], 0.5 * np.asarray(x * 2).mean(0), rtol=1e-5
        )
    assert_same(*ys)
    _, state = plain(params, x, state=plain.init_state(x), train=True)
    assert set(state[1]) == {"mean"}
    assert np.abs(np.asarray(state[1]["mean"]) - np.asarray(x).mean(0)).max() > 0.1


def test_the_option_is_part_of_the_pipe_as_a_value():
    pipe = fpipe.Pipe([CENTRE, DOUBLE], [1, 1], chunks=2, deferred_batch_norm=True)
    plain = fpipe.Pipe([CENTRE, DOUBLE], [1, 1], chunks=2)
    assert "deferred_batch_norm=True" in repr(pipe)
    assert pipe != plain
    assert pipe.layers == plain.layers
    for same in (
        pickle.loads(pickle.dumps(pipe)),
        dataclasses.replace(plain, deferred_batch_norm=True),
    ):
        assert same == pipe
        assert hash(same) == hash(pipe)
        assert same.model == pipe.model != plain.model
    more = dataclasses.replace(pipe, chunks=4)
    assert (more.chunks, more.deferred_batch_norm, more.model) == (4, True, pipe.model)
    assert dataclasses.replace(pipe, deferred_batch_norm=False) == plain


def test_what_the_layer_declares_stays():
    """It may have been renamed, isolated and decorated since its hook was made."""

    def stashing(params, x, *, carry, state):
        return x, fpipe.stash(carry, "skip", x), state

    def deferred_hook():
        return fpipe.Layer(stashing, init_state=later_state, needs=["carry", "state"])

    layer = fpipe.Layer(stashing, own_init, init_state=own_state, defer=deferred_hook)
    layer = fpipe.skippable(stash=["skip"])(layer)
    layer = dataclasses.replace(
        layer.isolate(space := fpipe.Namespace()), name="renamed"
    )

    @fpipe.skippable(pop=["skip"])
    @fpipe.fn
    def pop(x, *, carry):
        skip, carry = fpipe.pop(carry, "skip")
        return x + skip, carry

    model = fpipe.sequential([layer, pop.isolate(space)], 2, deferred_batch_norm=True)
    assert model.model.layers[0].name == "renamed"
    x = data(4)
    y, state = model(model.init(KEY(0), x), x, state=model.init_state(x), train=True)
    assert_same(y, 2 * x)
    assert set(state[0]) == {"mean", "sum", "rows"}


@pytest.mark.parametrize("make", [fpipe.Pipe, fpipe.sequential])
def test_no_layer_that_can(make):
    with raises(
        ValueError,
        f"`{make.__name__}(deferred_batch_norm=True)`: no layer can defer its batch "
        "norms. `fpipe.DeferredBatchNorm` does so "
        "by itself, without the option; a layer of your own does if it is made with "
        "`fpipe.Layer(..., defer=...)`. Otherwise "
        "leave the option out",
    ):
        make([DOUBLE, fpipe.DeferredBatchNorm()], deferred_batch_norm=True)


def test_a_hook_that_is_none():
    with raises(TypeError, "`fpipe.Layer(defer=...)`: 3 is not callable"):
        fpipe.Layer(jnp.multiply, needs=(), defer=3)  # type: ignore[arg-type]
    no_layer: Any = lambda: 3  # noqa: E731
    bad = fpipe.Layer(centre, name="bad", defer=no_layer)
    with raises(
        TypeError,
        "`Pipe(deferred_batch_norm=True)`: the defer of layer 1 'bad' returns an "
        "fpipe.Layer, got 3",
    ):
        fpipe.Pipe([DOUBLE, bad], [1, 1], deferred_batch_norm=True)
