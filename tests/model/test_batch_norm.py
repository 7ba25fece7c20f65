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
from flax import linen, nnx

import fpipe
from fpipe._model.batch_norm import Moments, merge, moments, no_moments, variance
from fpipe.flax import _batch_norm as fb
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


@pytest.mark.quick
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


@pytest.mark.quick
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
    (10, 4, s, c) for s in ("gpipe", "1f1b") for c in ("always", "except_last", "never")
]
PLACED += [(2, 4, s, "always") for s in ("gpipe", "1f1b")] + [
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


@pytest.mark.parametrize(
    ("x", "axis", "kind", "text"),
    [
        (
            jnp.ones((2, 3)),
            2,
            ValueError,
            "got an array of shape (2, 3); its axes go from -2 to 1",
        ),
        (
            jnp.ones((2, 3)),
            -3,
            ValueError,
            "got an array of shape (2, 3); its axes go from -2 to 1",
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


# --- Flax ---


class Net(linen.Module):
    """Norms in every place that Flax has for them."""

    kind: str
    fast: bool = False

    @linen.compact
    def __call__(self, x, train=True):
        def make(cls=linen.BatchNorm, **options):
            options = {"momentum": 0.75, "use_fast_variance": self.fast} | options
            return cls(use_running_average=not train, **options)

        match self.kind:
            case "one":
                return make()(x)
            case "first of two":
                return make(momentum=0.5)(make()(x))
            case "remat":
                return make(linen.remat(linen.BatchNorm))(x)
            case "jit":
                return make(linen.jit(linen.BatchNorm))(x)
            case "vmap":
                apart = linen.vmap(
                    linen.BatchNorm,
                    in_axes=2,
                    out_axes=2,
                    variable_axes={"params": 0, "batch_stats": 0},
                    split_rngs={"params": True},
                )
                return make(apart)(x.reshape(-1, 2, 2)).reshape(-1, 4)
            case "scan":
                axes: Any = {"params": 0, "batch_stats": 0}
                body = linen.scan(
                    lambda norm, c, _: (norm(c), None),
                    variable_axes=axes,
                    split_rngs={"params": True},
                    length=2,
                )
                return body(make(), x, None)[0]
            case "axis":
                return make(axis=(1, 2))(x.reshape(-1, 2, 2)).reshape(-1, 4)
            case "frozen":
                frozen = linen.BatchNorm(use_running_average=True, name="frozen")
                return make()(frozen(x))
            case "bfloat16":
                return make(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(
                    x.astype(jnp.bfloat16)
                )
        raise AssertionError(self.kind)


NETS = [
    "one",
    "first of two",
    "remat",
    "jit",
    "vmap",
    "scan",
    "axis",
    "frozen",
    "bfloat16",
]
# In the others a norm stands behind another, whose microbatches are not the whole
# batch.
ALONE = [kind for kind in NETS if kind not in ("first of two", "scan")]


def start(module, x):
    """Parameters that are not 1 and 0, running statistics that are not 0 and 1."""
    variables = module.init(KEY(0), x)
    return shaken(variables)


def linen_run(module, variables, x, chunks):
    """A call by microbatches: the outputs and Flax's own statistics at the end."""

    @jax.jit
    def microbatch(stats, piece):
        return fb.deferred_apply(module, {**variables, "batch_stats": stats}, piece)

    stats, ys = fb.defer_stats(variables["batch_stats"]), []
    for piece in pieces(x, chunks):
        y, new = microbatch(stats, piece)
        assert_same(
            fb.plain_stats(new["batch_stats"]), variables["batch_stats"], 0
        )  # nothing before the end
        assert jax.tree.structure(new["batch_stats"]) == jax.tree.structure(stats)
        stats = new["batch_stats"]
        ys.append(y)
    ended = fb.finish_stats(stats)
    assert_same(fb.finish_stats(ended), ended, 0)  # nothing was counted since
    return jnp.concatenate(ys), fb.plain_stats(ended)


@pytest.fixture
def promoting():
    """Flax promotes types by itself."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("promoting")
@pytest.mark.parametrize("kind", NETS)
def test_linen_in_one_microbatch_is_plain_flax(kind):
    module, x = Net(kind), data(6)
    variables = start(module, x)
    want, new = jax.jit(functools.partial(module.apply, mutable=["batch_stats"]))(
        variables, x
    )
    y, stats = linen_run(Net(kind, fast=True), variables, x, 1)
    assert_same(y, want)
    assert_same(stats, new["batch_stats"])


@pytest.mark.usefixtures("promoting")
@pytest.mark.parametrize("kind", ALONE)
def test_linen_in_several_microbatches_has_the_statistics_of_the_whole_batch(kind):
    module, x = Net(kind), data(10)
    variables = start(module, x)
    _, new = module.apply(variables, x, mutable=["batch_stats"])
    y, stats = linen_run(module, variables, x, 4)
    assert_same(stats, new["batch_stats"])
    each = [
        module.apply(variables, piece, mutable=["batch_stats"])[0]
        for piece in pieces(x, 4)
    ]
    assert_same(y, jnp.concatenate(each))


def test_linen_gradients():
    module, x = Net("first of two"), data(6)
    variables = start(module, x)
    stats = {"batch_stats": fb.defer_stats(variables["batch_stats"])}

    def loss(apply, more, params, x):
        return jnp.sum(jnp.sin(apply({**variables, **more, "params": params}, x)[0]))

    plain = functools.partial(
        loss, functools.partial(module.apply, mutable=["batch_stats"]), {}
    )
    deferred = functools.partial(
        loss, functools.partial(fb.deferred_apply, module), stats
    )
    got, want = (
        jax.jit(jax.grad(f, (0, 1)))(variables["params"], x) for f in (deferred, plain)
    )
    assert_same(got, want)


def test_a_large_mean_in_flax():
    x = data(64, mean=1000.0, std=0.01, seed=2)
    want = np.asarray(x, np.float64).var(0)
    module = linen.BatchNorm(use_running_average=False, momentum=0.0)
    _, stats = linen_run(module, module.init(KEY(0), x), x, 3)
    norm = fb.defer_module(nnx.BatchNorm(WIDTH, momentum=0.0, rngs=nnx.Rngs(0)))
    for piece in pieces(x, 3):
        norm(piece)
    fb.finish_module(norm)
    for var in (stats["var"], norm.var[...]):
        np.testing.assert_allclose(var, want, rtol=1e-2)


def test_linen_modules_that_are_called_mean_and_var():
    stats = {
        "mean": {"norm": {"mean": jnp.zeros(2), "var": jnp.ones(2)}},
        "var": {"sigma": jnp.ones(())},
    }
    deferred = fb.defer_stats(stats)
    assert set(deferred["mean"]["norm"]) == {"mean", "var", "deferred"}
    assert_same(fb.plain_stats(fb.finish_stats(deferred)), stats, 0)


class Twice(linen.Module):
    """One norm on two inputs."""

    def setup(self):
        self.norm = linen.BatchNorm(momentum=0.75)

    def __call__(self, x, mask=None, train=True):
        y = self.norm(x, not train, mask=mask)
        self.sow("losses", "sum", y.sum())
        return y, self.norm(3 * x[:2], use_running_average=not train)


def test_a_linen_norm_that_is_called_twice_counts_both():
    x, mask = data(6), jnp.arange(24).reshape(6, 4) % 5 != 0
    module = Twice()
    variables = module.init(KEY(0), x)
    deferred = {**variables, "batch_stats": fb.defer_stats(variables["batch_stats"])}
    for given in (None, mask, mask[:, :1], jnp.zeros((6, 4), bool)):
        _, new = fb.deferred_apply(
            module, deferred, x, given, mutable=["batch_stats", "losses"]
        )
        assert set(new) == {"batch_stats", "losses"}
        kept = (
            np.ones((6, 4), bool) if given is None else np.broadcast_to(given, (6, 4))
        )
        got = fb.plain_stats(fb.finish_stats(new["batch_stats"]))["norm"]
        for k in range(4):
            column = np.concatenate(
                [np.asarray(x)[kept[:, k], k], 3 * np.asarray(x)[:2, k]]
            ).astype(np.float64)
            np.testing.assert_allclose(got["mean"][k], 0.25 * column.mean(), rtol=1e-5)
            np.testing.assert_allclose(
                got["var"][k], 0.75 + 0.25 * column.var(), rtol=1e-5
            )
    y, new = fb.deferred_apply(module, deferred, x, train=False)
    assert_same(new["batch_stats"], deferred["batch_stats"], 0)
    assert_same(y, module.apply(variables, x, train=False, mutable=["losses"])[0])


class Scaled(linen.BatchNorm):
    """A subclass that is called in its own way."""

    def __call__(self, x, train, *, scale):  # pyright: ignore[reportIncompatibleMethodOverride]
        return scale * super().__call__(x + 1, use_running_average=not train)


class Replaced(linen.BatchNorm):
    """A subclass that is no batch norm any more."""

    @linen.compact
    def __call__(self, x, train):  # pyright: ignore[reportIncompatibleMethodOverride]
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(WIDTH))
        self.variable("batch_stats", "var", lambda: jnp.ones(WIDTH))
        mean.value = mean.value + x.sum(0)
        return x


def test_a_subclass_of_a_linen_norm_is_deferred_where_it_calls_flax():
    x = data(6)
    module = Scaled(momentum=0.75)
    variables = module.init(KEY(0), x, True, scale=3.0)
    stats, ys = fb.defer_stats(variables["batch_stats"]), []
    for piece in pieces(x, 2):
        given = {**variables, "batch_stats": stats}
        y, new = fb.deferred_apply(module, given, piece, True, scale=3.0)
        ys.append(y)
        stats = new["batch_stats"]
        assert_same(
            y,
            module.apply(variables, piece, True, scale=3.0, mutable=["batch_stats"])[0],
        )
    got = fb.plain_stats(fb.finish_stats(stats))
    assert_same(got, {"mean": 0.25 * (x + 1).mean(0), "var": 0.75 + 0.25 * x.var(0)})

    module = Replaced()
    variables = module.init(KEY(0), x, True)
    given = {**variables, "batch_stats": fb.defer_stats(variables["batch_stats"])}
    stats = fb.deferred_apply(module, given, x, True)[1]["batch_stats"]
    want = module.apply(variables, x, True, mutable=["batch_stats"])[1]["batch_stats"]
    assert_same(fb.plain_stats(fb.finish_stats(stats)), want)


def test_what_linen_cannot_defer():
    x = data(4)
    variables = start(Net("one"), x)
    with pytest.raises(
        ValueError,
        match=r"linen\.BatchNorm 'BatchNorm_0' is in training, but its statistics have "
        r"no room",
    ):
        fb.deferred_apply(Net("one"), variables, x)
    norm = linen.BatchNorm(use_running_average=False, axis_name="rows")
    stats = fb.defer_stats(norm.init(KEY(0), x)["batch_stats"])
    with pytest.raises(
        ValueError, match=r"the linen\.BatchNorm '' has axis_name='rows'"
    ):
        fb.deferred_apply(norm, {"params": {}, "batch_stats": stats}, x)


class NNX(nnx.Module):
    """The same in nnx."""

    def __init__(self, kind):
        axis = 1 if kind == "axis" else -1
        dtypes = (
            {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
            if kind == "bfloat16"
            else {}
        )
        norm = nnx.BatchNorm(
            WIDTH, axis=axis, momentum=0.75, epsilon=1e-3, rngs=nnx.Rngs(0), **dtypes
        )
        self.frozen = nnx.BatchNorm(
            WIDTH, use_running_average=True, rngs=nnx.Rngs(0), use_scale=False
        )
        self.norms, self.again, self.kind = (
            nnx.List([norm]),
            norm,
            kind,
        )  # one norm in two places

    def __call__(self, x):
        norm = self.norms[0]
        if self.kind == "axis":
            return norm(x.reshape(-1, WIDTH, 1)).reshape(-1, WIDTH)
        if self.kind == "remat":
            return nnx.remat(lambda norm, x: norm(x))(norm, x)
        return self.again(self.frozen(x))


def nnx_start(kind):
    module = NNX(kind)
    state = nnx.state(module)
    nnx.update(module, shaken(state))
    return module


def stats_of(module):
    """Running statistics by path."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.BatchStat))
    return {"/".join(map(str, path)): v[...] for path, v in flat if path[-1] in STAT}


@pytest.mark.usefixtures("promoting")
@pytest.mark.parametrize("kind", ["one", "axis", "remat", "bfloat16"])
@pytest.mark.parametrize(("rows", "chunks"), [(6, 1), (10, 4)])
def test_nnx(kind, rows, chunks):
    x = data(rows)
    plain, deferred = nnx_start(kind), fb.defer_module(nnx_start(kind))
    for node in (plain.norms[0], plain.frozen):
        node.use_fast_variance = False
    assert deferred.again is deferred.norms[0]
    assert_same(
        nnx.to_pure_dict(nnx.state(deferred, nnx.Param)),
        nnx.to_pure_dict(nnx.state(plain, nnx.Param)),
        0,
    )
    graph, params, state = nnx.split(deferred, nnx.Param, ...)
    before, ys = stats_of(deferred), []

    @jax.jit
    def microbatch(params, state, piece):
        module = nnx.merge(graph, params, state)
        y = module(piece)
        return y, nnx.state(module, nnx.Not(nnx.Param))

    for piece in pieces(x, chunks):
        y, new = microbatch(params, state, piece)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        ys.append(y)
        state = new
    module = nnx.merge(graph, params, state)
    assert_same(stats_of(module), before, 0)
    fb.finish_module(module)
    each = [nnx_start(kind) for _ in pieces(x, chunks)]
    assert_same(
        jnp.concatenate(ys),
        jnp.concatenate([m(p) for m, p in zip(each, pieces(x, chunks), strict=True)]),
    )
    plain(x)
    assert_same(stats_of(module), stats_of(plain))
    ended = stats_of(module)
    fb.finish_module(module)
    assert_same(stats_of(module), ended, 0)
    if kind == "one":
        module.eval()
        plain.eval()
        assert_same(module(x), plain(x))
        fb.finish_module(module)
        assert_same(stats_of(module), ended, 0)


def test_an_nnx_norm_alone_with_a_mask():
    x, mask = data(6), jnp.arange(24).reshape(6, 4) % 5 != 0
    norm = fb.defer_module(nnx.BatchNorm(4, momentum=0.0, rngs=nnx.Rngs(0)))
    for part in (slice(0, 4), slice(4, 6)):
        norm(x[part], mask=mask[part])
    fb.finish_module(norm)
    want = [np.asarray(x, np.float64)[np.asarray(mask)[:, k], k] for k in range(4)]
    np.testing.assert_allclose(norm.mean[...], [w.mean() for w in want], rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], [w.var() for w in want], rtol=1e-5)
    assert fb.defer_module(norm).deferred_momentum == 0.0  # once more is as once


def test_what_nnx_cannot_defer():
    class Own(nnx.BatchNorm):
        pass

    holder = nnx.List([Own(4, rngs=nnx.Rngs(0))])
    with pytest.raises(
        TypeError,
        match=r"`defer_module`: '0' is a Own, a subclass of nnx\.BatchNorm that may do "
        r"anything",
    ):
        fb.defer_module(holder)
    with pytest.raises(ValueError, match=r"the nnx\.BatchNorm '' has axis_name='rows'"):
        fb.defer_module(nnx.BatchNorm(4, axis_name="rows", rngs=nnx.Rngs(0)))
