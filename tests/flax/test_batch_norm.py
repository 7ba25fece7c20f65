"""Deferred batch normalisation in Flax's own modules, against plain Flax."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from fpipe.flax import _batch_norm as fb
from tests.helpers import WIDTH, assert_same, in_turn
from tests.model.test_batch_norm import KEY, STAT, data, pieces, shaken


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
# In the others a norm stands after another, whose microbatches are not the whole
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
@pytest.mark.parametrize(
    ("kind", "cut"),
    in_turn(["one", "axis", "remat", "bfloat16"], ["in one piece", "ragged"]),
)
def test_nnx(kind, cut):
    rows, chunks = {"in one piece": (6, 1), "ragged": (10, 4)}[cut]
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
        match=r"`defer_module`: '0' is an Own, a subclass of nnx\.BatchNorm that may "
        r"do anything",
    ):
        fb.defer_module(holder)
    with pytest.raises(ValueError, match=r"the nnx\.BatchNorm '' has axis_name='rows'"):
        fb.defer_module(nnx.BatchNorm(4, axis_name="rows", rngs=nnx.Rngs(0)))
