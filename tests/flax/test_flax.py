"""Flax modules as layers: against Flax itself, called by hand."""

import copy
import functools
import pickle
import re
import subprocess
import sys
import zlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.linen.fp8_ops import (
    OVERWRITE_WITH_GRADIENT,
    Fp8DirectDotGeneralOp,
    fp32_max_grad,
    in_qdq,
)
from flax.training.train_state import TrainState
from jax.core import Tracer

import fpipe
import fpipe.flax
import fpipe.optim
from tests.helpers import assert_same, in_turn, mse, noise, raises

EXECUTORS = ["placed", "scan"]
# What the modules of a layer compute does not depend on the executor: such tests run
# one of them, and the full run both.
PLACED = ["placed", pytest.param("scan", marks=pytest.mark.full)]
SCAN = ["scan", pytest.param("placed", marks=pytest.mark.full)]
CHUNKS = 2
X = noise(jax.random.key(1), (8, 3))
TARGET = jnp.cos(X)
KEY = jax.random.key(7)

# What a type checker would refuse is tested here.
untyped: Any = lambda value: value  # noqa: E731


def no_key(layer, stream):
    """The error of a module whose call was given no key."""
    return (
        f"layer {layer!r}: its module draws from the random stream {stream!r}, but the "
        "call was given no key: pass `key=`, or `train=False`"
    )


class Block(nn.Module):
    """A compact module with all of it: parameters, batch statistics, a stream."""

    width: int = 3
    rate: float = 0.5
    stream: str = "dropout"

    @nn.compact
    def __call__(self, x, train):
        y = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        y = nn.Dense(self.width)(y)
        y = nn.Dropout(self.rate, rng_collection=self.stream)(
            jnp.tanh(y), deterministic=not train
        )
        self.sow("intermediates", "seen", y)
        return x + y


class Remembering(nn.Module):
    """A module whose variable has an entry for each row: its last input."""

    @nn.compact
    def __call__(self, x):
        last = self.variable("cache", "last", lambda: jnp.zeros_like(x))
        y = nn.Dense(3)(x) + last.value
        if not self.is_initializing():
            last.value = x
        return y


class Mixed(nn.Module):
    """Two inputs, two outputs."""

    @nn.compact
    def __call__(self, a, b):
        shared = nn.Dense(3)
        return shared(a) + b, jnp.sin(shared(b))


class Scanned(nn.Module):
    """Equal layers in a `lax.scan`, each rematerialised, their dropout masks split."""

    @nn.compact
    def __call__(self, x, train):
        def body(block, x, _):
            return block(x), None

        block = nn.remat(Deep)(train)
        axes: Any = {"params": 0}
        split: Any = {"params": True, "dropout": True}
        return nn.scan(body, variable_axes=axes, split_rngs=split, length=3)(
            block, x, None
        )[0]


class Deep(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.3, deterministic=not self.train)(jnp.sin(nn.Dense(3)(x)))


class NBlock(nnx.Module):
    """The same as `Block`, in NNX, with a layer that is used twice."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.again = self.dense
        self.norm = nnx.BatchNorm(3, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        y = self.dropout(jnp.tanh(self.again(self.dense(self.norm(x)))))
        self.seen = nnx.Intermediate(y)
        return x + y


class NMixed(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, a, b):
        return self.dense(a) + b, jnp.sin(self.dense(b))


def pipe_of(layers, executor, chunks=CHUNKS, stages=2):
    n = len(layers)
    balance = [n // stages] * (stages - 1) + [n - n // stages * (stages - 1)]
    return fpipe.Pipe(layers, balance, chunks=chunks, executor=executor)


def trained(
    layers, executor, params, x, target, state=None, key=None, train=False, loss=mse
):
    """Loss, gradients by layer and states of one step."""
    pipe = pipe_of(layers, executor)
    placed = pipe.place(params)
    result, grads = pipe.value_and_grad(loss)(
        placed, x, target, state=state, key=key, train=train
    )
    grads = pipe.gather(grads) if executor == "scan" else grads
    return result, grads


def layer_key(layer, microbatch):
    return jax.random.fold_in(jax.random.fold_in(KEY, layer), microbatch)


def stream_key(layer, microbatch, stream):
    return jax.random.fold_in(layer_key(layer, microbatch), zlib.crc32(stream.encode()))


def by_hand(call, params, state, x, target):
    """A step of the plain model, microbatch by microbatch: `call(params, state, x,
    microbatch) -> y, state`.
    """

    def loss(params):
        total, now = 0.0, state
        for i, (a, b) in enumerate(
            zip(jnp.split(x, CHUNKS), jnp.split(target, CHUNKS), strict=True)
        ):
            y, now = call(params, now, a, i)
            total += mse(y, b) / CHUNKS
            now = jax.lax.stop_gradient(now)
        return total, now

    (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return (value, state), grads


# --- linen ---


def sequential():
    return nn.Sequential(
        [nn.Dense(5), nn.relu, nn.Dense(4, name="middle"), nn.LayerNorm(), nn.Dense(3)]
    )


@pytest.mark.quick(cases=1)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_linen_sequential_is_what_it_is_without_a_pipeline(executor):
    model = sequential()
    variables = model.init(jax.random.key(0), X)
    layers = fpipe.flax.layers(model)
    params, state = fpipe.flax.split_variables(model, variables)
    assert state == (None,) * 5
    assert [layer.name for layer in layers] == [
        "layers_0",
        "relu",
        "layers_2",
        "layers_3",
        "layers_4",
    ]
    pipe = pipe_of(layers, executor)
    made = pipe.gather(pipe.init(jax.random.key(0), X))
    chex.assert_trees_all_equal_shapes_and_dtypes(made, params)

    assert_same(pipe(pipe.place(params), X), model.apply(variables, X))
    got, grads = trained(layers, executor, params, X, TARGET)

    def loss(variables: Any) -> Any:
        y: Any = model.apply(variables, X)
        return mse(y, TARGET)

    want = jax.value_and_grad(loss)(variables)
    assert_same((got, fpipe.flax.merge_variables(model, grads)), want)


def test_init_is_what_flax_makes_with_the_key_of_the_layer():
    layers = fpipe.flax.layers(sequential())
    params = fpipe.sequential(layers).init(KEY, X)
    want = nn.Dense(5).init(jax.random.fold_in(KEY, 0), X)["params"]
    jax.tree.map(np.testing.assert_array_equal, params[0], want)


@pytest.mark.parametrize(
    ("stream", "executor"), in_turn(["dropout", "noise"], EXECUTORS)
)
def test_batch_statistics_and_dropout_of_linen(executor, stream):
    """State goes from microbatch to microbatch, a mask comes from call, layer,
    microbatch and stream.
    """
    modules = [Block(stream=stream), nn.Dense(3), Block(stream=stream)]
    layers = fpipe.flax.layers(modules, X)
    assert [layer.needs for layer in layers] == [
        ("state", "key", "train"),
        (),
        ("state", "key", "train"),
    ]
    pipe = pipe_of(layers, executor)
    params = pipe.gather(pipe.init(jax.random.key(0), X))
    state = pipe.init_state(X)
    assert jax.tree.map(jnp.shape, jax.device_get(state[0])) == {
        "batch_stats": {"BatchNorm_0": {"mean": (3,), "var": (3,)}}
    }
    assert state[1] is None

    def call(params, state, x, i):
        new = list(state)
        for n, module in enumerate(modules):
            if n == 1:
                x = module.apply({"params": params[n]}, x)
            else:
                rngs = {stream: stream_key(n, i, stream)}
                x, new[n] = module.apply(
                    {"params": params[n], **state[n]},
                    x,
                    True,
                    rngs=rngs,
                    mutable=["batch_stats"],
                )
        return x, tuple(new)

    (value, now), grads = trained(layers, executor, params, X, TARGET, state, KEY, True)
    assert_same(
        ((value, now), grads), by_hand(call, params, jax.device_get(state), X, TARGET)
    )

    placed = pipe.place(params)
    y, same = pipe(placed, X, state=now)
    now = jax.device_get(now)
    want = X
    for n, module in enumerate(modules):
        extra = () if n == 1 else (False,)
        want = module.apply({"params": params[n], **(now[n] or {})}, want, *extra)
    assert_same((y, same), (want, now))


@pytest.mark.parametrize("executor", SCAN)
def test_masks_differ_between_layers_and_microbatches(executor):
    layers = fpipe.flax.layers([nn.Dropout(0.5), nn.Dropout(0.5)])
    pipe = pipe_of([layers[0]], executor, stages=1)
    x = jnp.ones((4, 16))
    got = pipe(pipe.place([{}]), x, key=KEY, train=True)
    want: list[Any] = [
        nn.Dropout(0.5).apply(
            {},
            x[:2],
            deterministic=False,
            rngs={"dropout": stream_key(0, i, "dropout")},
        )
        for i in range(2)
    ]
    np.testing.assert_array_equal(got, jnp.concatenate(want))
    assert not np.array_equal(want[0], want[1])
    assert fpipe.flax.stream_key(KEY, "dropout") == jax.random.fold_in(KEY, 0x9289EFC9)


@pytest.mark.parametrize(("kind", "executor"), in_turn(["linen", "nnx"], EXECUTORS))
def test_two_inputs_and_two_outputs(kind, executor):
    pair = (X, 2 * X + 1)
    modules: list[Any] = (
        [Mixed(), Mixed()]
        if kind == "linen"
        else [NMixed(nnx.Rngs(0)), NMixed(nnx.Rngs(1))]
    )
    layers = fpipe.flax.layers(modules, pair)

    def loss(y, target):
        return mse(y[0], target) + mse(y[1], target)

    params = fpipe.sequential(layers).init(KEY, pair)

    def plain(params):
        y = pair
        for module, p in zip(modules, params, strict=True):
            y = (
                module.apply({"params": p}, *y)
                if kind == "linen"
                else nnx.merge(nnx.split(module)[0], p)(*y)
            )
        return loss(y, TARGET)

    got = trained(layers, executor, params, pair, TARGET, loss=loss)
    assert_same(got, jax.value_and_grad(plain)(params))


def test_a_class_is_no_module():
    with raises(
        TypeError,
        "`fpipe.flax.layers(model)`: got the class Dense; make a module of it, "
        "`Dense(...)`",
    ):
        fpipe.flax.layers([nn.Dense, nn.relu])


def test_in_a_sequential_tuples_and_dicts_are_arguments_as_in_flax():
    class Named(nn.Module):
        @nn.compact
        def __call__(self, b, a=None, scale=1.0):
            return {"x": nn.Dense(3)(a) * scale + b}

    class Take(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x, x + 1

    model = nn.Sequential(
        [Take(), lambda a, b: {"a": a, "b": b}, Named(), lambda x: x * 2]
    )
    variables = model.init(KEY, X)
    params, _ = fpipe.flax.split_variables(model, variables)
    assert_same(
        fpipe.sequential(fpipe.flax.layers(model, X))(params, X),
        model.apply(variables, X),
    )


def test_a_sample_goes_through_layers_with_needs_of_the_call():
    def warm(params, x, *, step, key):
        return x * step.astype(x.dtype)

    warming = fpipe.Layer(warm, lambda key, x: ())
    layers = fpipe.flax.layers([nn.Dense(4), warming, nn.BatchNorm()], X)
    assert [layer.needs for layer in layers] == [
        (),
        ("key", "step"),
        ("state", "train"),
    ]


def test_a_method_may_be_given_by_name_as_a_function_or_bound():
    class Several(nn.Module):
        @nn.compact
        def both(self, a, b, train=False):
            return nn.Dense(3)(a) + b, jnp.float32(train)

    module = Several()
    layers = [
        fpipe.flax.layer(module, method=method)
        for method in ("both", Several.both, module.both)
    ]
    params = fpipe.sequential(layers[:1]).init(KEY, (X, X))[0]
    for layer in layers:
        y = layer(params, (X, 2 * X), key=None, train=True)
        assert_same(y, module.apply({"params": params}, X, 2 * X, True, method="both"))
    assert layers[1] == layers[2]


def test_nested_lists_are_flat():
    layers = fpipe.flax.layers([nn.Dense(4), [nn.relu, (nn.Dense(3),)]], X)
    assert [layer.name for layer in layers] == ["layers_0", "relu", "layers_2"]


def test_a_tuple_or_dict_is_one_input_of_a_module_with_one():
    class One(nn.Module):
        @nn.compact
        def __call__(self, pair, mask=None):
            assert mask is None
            return jax.tree.map(jnp.sin, pair)

    sequential = fpipe.sequential([fpipe.flax.layer(One())])
    for x in ((X, X), {"a": X, "b": X}):
        assert_same(sequential(({},), x), jax.tree.map(jnp.sin, x))


@pytest.mark.parametrize("executor", PLACED)
def test_scanned_rematerialised_and_shared_modules_inside_a_layer(executor):
    module = Scanned()
    layers = fpipe.flax.layers([module, nn.Dense(3)], X)
    assert layers[0].needs == ("key", "train")
    params = fpipe.sequential(layers).init(KEY, X)
    assert jax.tree.leaves(params[0])[0].shape == (3, 3)

    def call(params, state, x, i):
        y = module.apply(
            {"params": params[0]},
            x,
            True,
            rngs={"dropout": stream_key(0, i, "dropout")},
        )
        return nn.Dense(3).apply({"params": params[1]}, y), state

    (want, _), grads = by_hand(call, params, (), X, TARGET)
    assert_same(
        trained(layers, executor, params, X, TARGET, key=KEY, train=True), (want, grads)
    )


def test_the_argument_that_says_whether_it_trains():
    class Says(nn.Module):
        @nn.compact
        def __call__(self, x, mask=None, *, frozen=True, train=None):
            return x * (0.0 if frozen else 1.0), train

    def outputs(layer):
        return [
            layer(({}), 1.0, **({"train": t} if layer.asks("train") else {}))
            for t in (False, True)
        ]

    assert outputs(fpipe.flax.layer(Says())) == [(0.0, False), (0.0, True)]
    assert outputs(fpipe.flax.layer(Says(), train="not frozen")) == [
        (0.0, None),
        (1.0, None),
    ]
    assert outputs(fpipe.flax.layer(Says(), train=True)) == [(0.0, True), (0.0, True)]
    assert not fpipe.flax.layer(Says(), train=True).asks("train")
    # Set among the fields: Flax refuses it as an argument too.
    assert not fpipe.flax.layer(nn.Dropout(0.5, deterministic=True)).asks("train")
    with raises(
        ValueError,
        "`fpipe.flax.layer(module)` of layer 'Says': train='training', but the "
        "arguments are ['x', 'mask', 'frozen', "
        "'train']",
    ):
        fpipe.flax.layer(Says(), train="training")


def test_static_arguments_of_remat_are_positions():
    block = nn.remat(Block, static_argnums=(2,))(rate=0.0)
    layer = fpipe.flax.layer(block, X)
    model = fpipe.sequential([layer])
    params, state = model.init(KEY, X), model.init_state(X)
    (got, _), _ = model.value_and_grad(mse)(
        params, X, TARGET, state=state, key=KEY, train=True
    )
    y, _ = Block(rate=0.0).apply(
        {"params": params[0], **state[0]}, X, True, mutable=["batch_stats"]
    )
    assert_same(got, mse(y, TARGET))


def test_a_collection_of_any_name_is_state():
    class Counts(nn.Module):
        @nn.compact
        def __call__(self, x):
            count = self.variable("mine", "count", lambda: jnp.zeros((), jnp.int32))
            if not self.is_initializing():
                count.value += 1
            self.sow("losses", "norm", jnp.sum(x))
            return nn.Dense(3)(x) + count.value.astype(x.dtype)

    for layer in (
        fpipe.flax.layer(Counts(), X),
        fpipe.flax.layer(Counts(), state=["mine"], rngs=[]),
    ):
        assert layer.needs == ("state",)
        pipe = pipe_of([layer, layer], "placed")
        state = pipe.init_state(X)
        assert state == ({"mine": {"count": 0}},) * 2
        (_, state), _ = pipe.value_and_grad(mse)(
            pipe.init(KEY, X), X, TARGET, state=state
        )
        assert state == ({"mine": {"count": CHUNKS}},) * 2


class Noise(nn.Module):
    @nn.compact
    def __call__(self, x):
        return (
            x
            + self.variable(
                "noise",
                "table",
                lambda: jax.random.normal(self.make_rng("params"), (3,)),
            ).value
        )


class NNoise(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.BatchStat(jax.random.normal(rngs.params(), (3,)))

    def __call__(self, x):
        return x + self.table[...]


def test_random_state_is_what_flax_makes_with_the_key_of_each_layer():
    model = fpipe.sequential(fpipe.flax.layers([Noise(), Noise(), NNoise, NNoise], X))
    state = model.init_state(X, key=KEY)
    for k in range(4):
        own = jax.random.fold_in(KEY, k)
        want = (
            {"noise": Noise().init(own, X)["noise"]}
            if k < 2
            else {"table": NNoise(nnx.Rngs(own)).table[...]}
        )
        assert_same(state[k], want, 0.0)
    assert not np.array_equal(state[0]["noise"]["table"], state[1]["noise"]["table"])
    assert not np.array_equal(state[2]["table"], state[3]["table"])


# --- NNX ---


def nnx_model():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 3, rngs=rngs), NBlock(rngs)
    )


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_nnx_sequential_is_what_it_is_without_a_pipeline(executor):
    model = nnx_model()
    model.eval()
    layers = fpipe.flax.layers(model)
    assert [layer.needs for layer in layers] == [(), (), (), ("state", "key", "train")]
    pipe = pipe_of(layers, executor)
    params, state = fpipe.flax.split_variables(model, nnx.state(model))
    made = pipe.gather(pipe.init(KEY, X)), pipe.init_state(X)
    assert_same(jax.device_get(made), jax.device_get((params, state)), 0.0)

    def loss(model):
        return mse(model(X), TARGET)

    want, want_grads = nnx.value_and_grad(loss)(model)
    (got, same), grads = trained(layers, executor, params, X, TARGET, state)
    want_grads = nnx.to_pure_dict(nnx.state(want_grads, nnx.Param))
    assert_same((got, fpipe.flax.merge_variables(model, grads)), (want, want_grads))
    assert_same(same, state, 0.0)


@pytest.mark.parametrize("executor", SCAN)
def test_batch_statistics_and_dropout_of_nnx(executor):
    modules = [NBlock(nnx.Rngs(0)), NBlock(nnx.Rngs(1))]
    layers = fpipe.flax.layers(modules)
    sequential = fpipe.sequential(layers)
    params, state = sequential.init(KEY, X), sequential.init_state(X)
    assert jax.tree.map(jnp.shape, state[0]) == {"norm": {"mean": (3,), "var": (3,)}}
    assert set(params[0]) == {"again", "norm"}  # `dense` and `again` are one module

    def call(params, state, x, i):
        out = []
        for n, module in enumerate(modules):
            key = stream_key(n, i, "dropout/rngs")
            random = {"dropout": {"rngs": {"key": key, "count": jnp.uint32(0)}}}
            made = nnx.merge(nnx.split(module)[0], params[n], state[n], random)
            made.train()
            x = made(x)
            out.append(nnx.to_pure_dict(nnx.state(made, nnx.BatchStat)))
        return x, tuple(out)

    got = trained(layers, executor, params, X, TARGET, state, KEY, True)
    assert_same(got, by_hand(call, params, state, X, TARGET))
    assert not np.array_equal(got[0][1][0]["norm"]["mean"], state[0]["norm"]["mean"])
    # The module itself is as it was.
    assert_same(nnx.to_pure_dict(nnx.state(modules[0], nnx.Param)), params[0], 0.0)
    assert "seen" not in vars(modules[0])


def test_an_nnx_module_that_is_made_where_it_belongs():
    make = functools.partial(NBlock)
    model = fpipe.sequential(
        [fpipe.flax.layer(make), fpipe.flax.layer(NBlock, name="second")]
    )
    assert [layer.name for layer in model.model.layers] == ["NBlock", "second"]
    params = model.init(KEY, X)
    want = nnx.to_pure_dict(
        nnx.state(NBlock(nnx.Rngs(jax.random.fold_in(KEY, 1))), nnx.Param)
    )
    assert_same(params[1], want, 0.0)
    y, _ = model(params, X, state=model.init_state(X))
    assert y.shape == X.shape
    many = fpipe.sequential(fpipe.flax.layers([make] * 2)).init(KEY, X)
    assert_same(many[1], want, 0.0)  # each makes its own


def test_an_nnx_module_of_shapes_has_no_values_to_begin_with():
    shapes = nnx.eval_shape(lambda: nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    layer = fpipe.flax.layer(shapes)
    assert layer.init is None
    own = nnx.to_pure_dict(nnx.state(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.Param))
    assert_same(
        fpipe.sequential([layer])((own,), X), nnx.Linear(3, 3, rngs=nnx.Rngs(0))(X)
    )


def test_streams_that_an_nnx_module_takes_in_its_call():
    class Takes(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.5)

        def __call__(self, x, rngs):
            return self.dropout(x, rngs=rngs)

    layer = fpipe.flax.layer(Takes)
    assert layer.needs == ("key", "train")
    x = jnp.ones((2, 16))
    got = layer({}, x, key=layer_key(0, 0), train=True)
    want = nnx.Dropout(0.5)(x, rngs=nnx.Rngs(stream_key(0, 0, "rngs")))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(layer({}, x, key=None, train=False), x)
    with raises(
        ValueError,
        no_key("Takes", "default"),
    ):
        layer({}, x, key=None, train=True)


def test_transforms_inside_an_nnx_layer_run_without_a_key():
    class Remat(nnx.Module):
        def __init__(self, rngs):
            self.block = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return nnx.remat(lambda block, x: block(x))(self.block, x)

    layer = fpipe.flax.layer(Remat)
    assert_same(layer({}, X, key=None, train=False), X)
    assert not np.array_equal(layer({}, X, key=KEY, train=True), X)
    with pytest.raises(ValueError, match="draws from the random stream 'default'"):
        layer({}, X, key=None, train=True)


# --- tied weights ---


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Embed(6, 3, name="table")(tokens) + nn.Embed(2, 3, name="place")(
            jnp.arange(2)
        )


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Embed(6, 3, name="table").attend(nn.Dense(3)(x))


TOKENS = jnp.array([[0, 1], [2, 5], [4, 4], [3, 0]])


def token_loss(y, target):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(y), target[..., None], -1))


@pytest.mark.parametrize(
    ("kind", "executor"),
    [
        ("whole", "placed"),
        ("whole", "scan"),
        ("part", "placed"),
        ("beside", "scan"),
        ("nnx", "placed"),
    ],
)
def test_tied_embeddings(kind, executor):
    embed, head = nn.Embed(6, 3), Head()
    first: Any = {"whole": embed, "nnx": nnx.Embed(6, 3, rngs=nnx.Rngs(0))}.get(
        kind, Tokens()
    )
    last = {
        "whole": lambda: fpipe.flax.tied(embed, "embed", method="attend"),
        "part": lambda: fpipe.flax.tied(embed, "embed/table", method=nn.Embed.attend),
        "beside": lambda: fpipe.flax.layer(head, borrow={"table": "embed/table"}),
        "nnx": lambda: fpipe.flax.tied(first, "embed", method="attend"),
    }[kind]()
    layers = [
        fpipe.flax.layer(first, name="embed"),
        fpipe.flax.layer(nn.Dense(3)),
        last,
    ]
    params = fpipe.sequential(layers).init(KEY, TOKENS)
    assert set(params[2]) == ({"Dense_0"} if kind == "beside" else set())

    def plain(params):
        x = (
            first.apply({"params": params[0]}, TOKENS)
            if kind != "nnx"
            else params[0]["embedding"][TOKENS]
        )
        x = nn.Dense(3).apply({"params": params[1]}, x)
        table = params[0]["table"] if kind in ("part", "beside") else params[0]
        if kind == "beside":
            y = head.apply({"params": {**params[2], "table": table}}, x)
        else:
            y = embed.apply({"params": table}, x, method="attend")
        return token_loss(y, TOKENS)

    got = trained(layers, executor, params, TOKENS, TOKENS, loss=token_loss)
    assert_same(got, jax.value_and_grad(plain)(params))


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_module_that_is_there_twice_is_tied(kind):
    dense: Any = nn.Dense(3) if kind == "linen" else nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    model: Any = (
        nn.Sequential([dense, nn.relu, dense])
        if kind == "linen"
        else nnx.Sequential(dense, nnx.relu, dense)
    )
    layers = fpipe.flax.layers(model, X)
    variables: Any = model.init(KEY, X) if kind == "linen" else nnx.state(model)
    params, _ = fpipe.flax.split_variables(model, variables)
    assert params[1:] == ((), {})

    def loss(variables):
        y = (
            model.apply(variables, X)
            if kind == "linen"
            else nnx.merge(nnx.split(model)[0], variables)(X)
        )
        return mse(y, TARGET)

    want = jax.value_and_grad(loss)(
        variables if kind == "linen" else nnx.to_pure_dict(variables)
    )
    got, grads = trained(layers, "placed", params, X, TARGET)
    assert_same((got, fpipe.flax.merge_variables(model, grads)), want)


def test_parts_of_lists_of_nnx_are_borrowed_by_number():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.each = nnx.List(
                [nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)]
            )

        def __call__(self, x):
            return self.each[1](jnp.sin(self.each[0](x)))

    first = fpipe.flax.layer(Two, name="first")
    model = fpipe.sequential(
        [first, fpipe.flax.layer(Two, borrow={"each/0": "first/each/1"})]
    )
    params = model.init(KEY, X)
    assert list(params[1]["each"]) == [1]
    whole = params[0], {"each": {0: params[0]["each"][1], 1: params[1]["each"][1]}}
    assert_same(
        model(params, X), fpipe.sequential([first, fpipe.flax.layer(Two)])(whole, X)
    )
    with pytest.raises(
        ValueError,
        match="layer 'Two' borrows 'each/7' from layer 'first/each/1', but its module "
        "has no such",
    ):
        fpipe.sequential(
            [first, fpipe.flax.layer(Two, borrow={"each/7": "first/each/1"})]
        )(params, X)


def test_a_tied_layer_makes_no_parameters():
    def ones(key, shape, dtype):
        assert isinstance(key, Tracer)  # shapes may be looked at
        return jnp.ones(shape, dtype)

    layer = fpipe.flax.tied(nn.Dense(3, kernel_init=ones), "dense")
    assert layer.init is not None
    assert layer.init(KEY, X, borrowed={"dense": {"kernel": X[:3], "bias": X[0]}}) == {}


@pytest.mark.parametrize(
    "module", [nn.Embed(6, 5), nnx.Embed(6, 5, rngs=nnx.Rngs(0))], ids=["linen", "nnx"]
)
def test_an_owner_that_does_not_fit(module):
    kind = "linen" if isinstance(module, nn.Module) else "nnx"
    small = nn.Embed(6, 3) if kind == "linen" else nnx.Embed(6, 3, rngs=nnx.Rngs(0))
    why = {
        "linen": 'For parameter "embedding" in "/", the given initializer is expected '
        "to generate shape (6, 3), but the "
        "existing parameter it received has shape (6, 5)",
        "nnx": "its module needs {'embedding': float32[6,3]}",
    }[kind]
    message = (
        "layer 'head' borrows its parameters from layer 'embed', but the owner has "
        "{'embedding': float32[6,5]}, which does "
        f"not fit: {why}"
    )
    model = [
        fpipe.flax.layer(module, name="embed"),
        fpipe.flax.tied(small, "embed", method="attend", name="head"),
    ]
    sequential = fpipe.sequential(model)
    with raises(ValueError, message):
        sequential.init(KEY, TOKENS)
    with raises(ValueError, message):
        sequential(({"embedding": jnp.ones((6, 5))}, {}), TOKENS)
    missing = [
        model[0],
        fpipe.flax.tied(small, "embed/nowhere", method="attend", name="head"),
    ]
    with pytest.raises(
        ValueError,
        match="from layer 'embed/nowhere', but the owner has None, which does not "
        "fit: ",
    ):
        fpipe.sequential(missing)(({"embedding": jnp.ones((6, 5))}, {}), TOKENS)


# --- checkpoints ---


def stateful(kind) -> tuple[Any, Any]:
    """A model with statistics, and a variable tree of it."""
    if kind == "nnx":
        rngs = nnx.Rngs(0)
        norm = nnx.BatchNorm(4, rngs=rngs)
        model = nnx.Sequential(
            nnx.Linear(3, 4, rngs=rngs), norm, nnx.relu, nnx.Linear(4, 3, rngs=rngs)
        )
        return model, nnx.state(model)
    norm = nn.BatchNorm(use_running_average=True, name="norm")
    model = nn.Sequential(
        [nn.Dense(4), norm, nn.relu, nn.Dropout(0.1, deterministic=True), nn.Dense(3)]
    )
    return model, model.init(KEY, X)


# --- NNX's optimizer ---


@pytest.fixture
def standard_promotion():
    """optax does not run under strict dtype promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("standard_promotion")
def test_an_nnx_optimizer_over_placed_stages():
    """The model's own variables lie on the stages' devices, and what the optimizer
    makes stays there.
    """

    def made():
        blocks = [NNormed(nnx.Rngs(k)) for k in range(3)]
        for block in blocks:
            # Not zero: what has no gradient would then be compared with nothing.
            for bias in (block.dense.bias, block.norm.bias):
                assert bias is not None
                bias[...] = jnp.ones(3)
        return nnx.Sequential(*blocks)

    def tx():
        # Biases before a norm have no gradient but rounding, which Adam would make
        # large.
        return optax.chain(
            optax.clip_by_global_norm(0.1), optax.sgd(1e-2, momentum=0.9)
        )

    model = made()
    layers = fpipe.flax.layers(model)
    pipe = fpipe.Pipe(layers, [1, 1, 1], chunks=1)
    params, state = fpipe.flax.split_variables(layers, nnx.state(model))
    nnx.update(model, fpipe.flax.merge_variables(layers, pipe.place(params)))
    optimizer = nnx.Optimizer(model, fpipe.optim.per_stage(tx()), wrt=nnx.Param)
    step = pipe.value_and_grad(mse)

    plain = made()
    whole = nnx.Optimizer(plain, tx(), wrt=nnx.Param)

    @nnx.jit
    def plain_step(model, whole):
        loss, grads = nnx.value_and_grad(lambda model: mse(model(X), TARGET))(model)
        whole.update(model, grads)
        return loss

    for _ in range(3):
        params, _ = fpipe.flax.split_variables(layers, nnx.state(model))
        (loss, state), grads = step(params, X, TARGET, state=state, train=True)
        of = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(of, fpipe.flax.merge_variables(layers, grads))
        optimizer.update(model, of)
        assert_same(loss, plain_step(plain, whole))
    got, want = (nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (model, plain))
    assert_same(got, want, 1e-4)
    for k in range(3):
        assert {d for a in jax.tree.leaves(got["layers"][k]) for d in a.devices()} == {
            pipe.devices[k]
        }


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_nnx_optimizer_over_the_parameters_of_a_pipe(executor):
    """Under both executors it is plain optax on the whole leaves, and state and
    parameters stay where they were.
    """
    scale = fpipe.Layer(
        lambda n, x: x * n, init=lambda key, x: jnp.int32(2), name="scale"
    )
    layers = [*fpipe.flax.layers([NNormed(nnx.Rngs(k)) for k in range(3)]), scale]
    pipe = fpipe.Pipe(layers, [1, 1, 1, 1], chunks=CHUNKS, executor=executor)
    reference = fpipe.sequential(layers, chunks=CHUNKS)
    # Not zero, as biases are: what has no gradient would be compared with nothing.
    params = jax.tree.map(
        lambda a: a + 1 if a.dtype == jnp.float32 else a, pipe.init(KEY, X)
    )
    state = pipe.init_state(X)

    def tx():
        # A decay for matrices alone asks for leaves as the layer knows them: packed
        # ones have an axis more.
        matrices = optax.add_decayed_weights(
            0.1, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
        )
        return optax.chain(
            optax.clip_by_global_norm(0.1), matrices, optax.sgd(1e-2, momentum=0.9)
        )

    model = fpipe.flax.Parameters(params)
    optimizer = nnx.Optimizer(
        model, model.transformation(fpipe.optim.per_stage(tx())), wrt=nnx.Param
    )

    def step(model, optimizer, state):
        (loss, state), grads = pipe.value_and_grad(mse)(
            model.params, X, TARGET, state=state, train=True
        )
        optimizer.update(model, model.gradients(grads))
        return loss, state

    plain, plain_state = pipe.gather(params), reference.init_state(X)
    frozen = plain[3]
    moments = tx().init(plain[:3])

    @jax.jit
    def plain_step(plain, moments, plain_state):
        both = reference.value_and_grad(mse)(
            (*plain, frozen), X, TARGET, state=plain_state, train=True
        )
        (loss, plain_state), grads = both
        updates, moments = tx().update(grads[:3], moments, plain)
        return optax.apply_updates(plain, updates), moments, loss, plain_state

    step = nnx.jit(step) if executor == "scan" else step
    whole = plain[:3]
    for _ in range(3):
        loss, state = step(model, optimizer, state)
        whole, moments, want, plain_state = plain_step(whole, moments, plain_state)
        assert_same(loss, want)
    assert_same(pipe.gather(model.params), (*whole, frozen), 1e-4)
    assert int(optimizer.step[...]) == 3
    assert [a.sharding for a in jax.tree.leaves(model.params)] == [
        a.sharding for a in jax.tree.leaves(params)
    ]
    trained = {a.sharding for a in jax.tree.leaves(params) if a.dtype == jnp.float32}
    kept = [
        a
        for a in jax.tree.leaves(nnx.as_pure(nnx.state(optimizer)))
        if a.dtype == jnp.float32
    ]
    assert len(kept) == len(
        [a for a in jax.tree.leaves(params) if a.dtype == jnp.float32]
    )
    assert {a.sharding for a in kept} == trained


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_nnx_optimizer_where_nothing_is_trained(executor):
    scale = fpipe.Layer(
        lambda n, x: x * n.astype(x.dtype),
        init=lambda key, x: jnp.int32(2),
        name="scale",
    )
    pipe = fpipe.Pipe([scale, fpipe.fn(jnp.tanh)], chunks=CHUNKS, executor=executor)
    model = fpipe.flax.Parameters(pipe.init(KEY, X))
    optimizer = nnx.Optimizer(
        model,
        model.transformation(fpipe.optim.per_stage(optax.adam(0.1))),
        wrt=nnx.Param,
    )
    _, grads = pipe.value_and_grad(mse)(model.params, X, TARGET)
    optimizer.update(model, model.gradients(grads))
    assert_same(pipe.gather(model.params), (jnp.int32(2), ()), 0)


def test_gradients_of_another_model_for_an_nnx_optimizer():
    model = fpipe.flax.Parameters(({"kernel": jnp.ones((2, 2))}, ()))
    message = (
        "`fpipe.flax.Parameters.gradients(grads)`: gradients and parameters differ in "
        "[\"[0]['bias']\", \"[0]['kernel']\"]; give it what `pipe.value_and_grad` "
        "returns for `model.params`"
    )
    with raises(ValueError, message):
        model.gradients(({"bias": jnp.ones(2)}, ()))


# --- deferred batch norms ---


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(
            nn.BatchNorm(
                use_running_average=not train, momentum=0.9, use_fast_variance=False
            )(x)
        )


class NNormed(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, momentum=0.9, use_fast_variance=False, rngs=rngs)
        self.dense = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.norm(x))


NORMED = {
    "linen": lambda: [Normed(), nn.Dense(3)],
    "nnx": lambda: [NNormed(nnx.Rngs(0)), nnx.Linear(3, 3, rngs=nnx.Rngs(1))],
    "nnx factory": lambda: [NNormed, functools.partial(nnx.Linear, 3, 3)],
}


@pytest.mark.parametrize(("kind", "executor"), in_turn(NORMED, EXECUTORS))
def test_deferred_statistics_are_those_of_the_whole_batch(kind, executor):
    """As Flax has them after one call with all rows; outputs and gradients are those of
    the plain composition.
    """
    checkpoint = {"placed": "always", "scan": "never"}[executor]
    layers = fpipe.flax.layers(NORMED[kind](), None if kind != "linen" else X)
    options: dict[str, Any] = {"chunks": 4, "deferred_batch_norm": True}
    pipe = fpipe.Pipe(
        layers, [1, 1], executor=executor, checkpoint=checkpoint, **options
    )
    params, state = pipe.init(jax.random.key(0), X), pipe.init_state(X)
    (loss, new), grads = pipe.value_and_grad(mse)(
        params, X, TARGET, state=state, train=True
    )
    ref = fpipe.sequential(layers, **options)
    want = ref.value_and_grad(mse)(
        pipe.gather(params), X, TARGET, state=ref.init_state(X), train=True
    )
    assert_same(((loss, new), pipe.gather(grads)), want)

    # Momentum 0.9, from mean 0 and variance 1.
    if kind == "linen":
        found = fpipe.flax.merge_variables(layers, pipe.gather(params), new)[
            "batch_stats"
        ]["layers_0"]["BatchNorm_0"]
    else:
        found = fpipe.flax.merge_variables(layers, pipe.gather(params), new)["layers"][
            0
        ]["norm"]
        found = {name: found[name] for name in ("mean", "var")}
    assert_same(found, {"mean": 0.1 * X.mean(0), "var": 0.9 + 0.1 * X.var(0)})
    # Nothing is left of the call, and without training nothing changes.
    again = pipe(params, X, state=new, train=False)[1]
    assert_same(again, new)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_checkpoints_of_plain_statistics_load_into_deferred_ones(kind):
    layers = fpipe.flax.layers(NORMED[kind](), None if kind != "linen" else X)
    options: dict[str, Any] = {"chunks": 4, "deferred_batch_norm": True}
    ref = fpipe.sequential(layers, **options)
    params, state = ref.init(jax.random.key(0), X), ref.init_state(X)
    _, state = ref(params, X, state=state, train=True)
    plain = fpipe.flax.merge_variables(layers, params, state)
    loaded = fpipe.flax.split_variables(layers, plain, deferred_batch_norm=True)
    assert_same(loaded, (params, state))
    assert_same(
        fpipe.flax.split_variables(layers, plain)[1], (layers_state(plain, kind), None)
    )


def layers_state(plain, kind):
    if kind == "linen":
        return {"batch_stats": plain["batch_stats"]["layers_0"]}
    return {
        "norm": {name: plain["layers"][0]["norm"][name] for name in ("mean", "var")}
    }


def test_layers_without_batch_norms_have_nothing_to_defer():
    layers = fpipe.flax.layers([nn.Dense(3), nn.Dense(3)])
    with pytest.raises(ValueError, match="no layer can defer its batch norms"):
        fpipe.Pipe(layers, [1, 1], deferred_batch_norm=True)
    assert all(layer.defer is None for layer in layers)


def test_deferred_layers_are_values_too():
    for made in (
        lambda: fpipe.flax.layers(NORMED["linen"](), X),
        lambda: fpipe.flax.layers(NORMED["nnx"]()),
    ):
        one, two = (
            fpipe.Pipe(made(), [1, 1], deferred_batch_norm=True) for _ in range(2)
        )
        assert one == two
        assert one.model == two.model


@pytest.mark.parametrize(("kind", "executor"), in_turn(["linen", "nnx"], EXECUTORS))
def test_a_checkpoint_goes_both_ways(kind, executor):
    model, variables = stateful(kind)
    layers = fpipe.flax.layers(model, X)
    params, state = fpipe.flax.split_variables(layers, variables)
    assert [s is not None for s in state] == [layer.asks("state") for layer in layers]
    pipe = pipe_of(layers, executor)
    placed = pipe.place(params)
    y, _ = pipe(placed, X, state=state)
    if kind == "nnx":
        model.eval()
    assert_same(y, model.apply(variables, X) if kind == "linen" else model(X))
    again = fpipe.flax.merge_variables(layers, pipe.gather(placed), state)
    pure = variables if kind == "linen" else nnx.to_pure_dict(variables)
    assert_same(jax.device_get(again), jax.device_get(pure), 0.0)
    assert_same(fpipe.flax.split_variables(model, again), (params, state), 0.0)
    if kind == "nnx":
        nnx.update(model, jax.tree.map(jnp.zeros_like, again))
        assert_same(model(X), jnp.zeros_like(X))


def test_variables_that_do_not_fit_the_layers():
    model, variables = stateful("linen")
    other = {**variables, "params": {**variables["params"], "layers_9": {}}}
    names = ["layers_0", "layers_1", "relu", "layers_3", "layers_4"]
    with raises(
        ValueError,
        "`fpipe.flax.split_variables`: no layer owns ['params/layers_9']; the layers "
        f"are {names}",
    ):
        fpipe.flax.split_variables(model, other)
    with raises(
        ValueError,
        "`fpipe.flax.split_variables`: layer 1 'layers_1' has state, but the variables "
        "have none; give the other collections too, or `state=False` for variables "
        "without state, such as gradients and moments",
    ):
        fpipe.flax.split_variables(model, {"params": variables["params"]})
    params, state = fpipe.flax.split_variables(
        model, {"params": variables["params"]}, state=False
    )
    assert_same(
        (params, state),
        (fpipe.flax.split_variables(model, variables)[0], (None,) * 5),
        0.0,
    )
    wrong = {**variables, "params": {**variables["params"], "layers_2": {}}}
    with raises(
        ValueError,
        "`fpipe.flax.split_variables`: no layer owns ['params/layers_2']; the layers "
        f"are {names}",
    ):
        fpipe.flax.split_variables(model, wrong)
    with raises(
        ValueError,
        "`fpipe.flax.merge_variables`: params is a tuple with one entry per layer, 5 "
        "in all, got 1",
    ):
        fpipe.flax.merge_variables(model, ({},))
    with pytest.raises(
        TypeError,
        match=r"got a Packed; what is packed is `pipe\.gather\(params\)` first",
    ):
        fpipe.flax.merge_variables(
            model, fpipe.Pipe([fpipe.fn(double)], [1], executor="scan").place(((),))
        )
    model, variables = stateful("nnx")
    params, state = fpipe.flax.split_variables(
        model, nnx.state(model, nnx.Param), state=False
    )
    assert_same(
        (params, state),
        (fpipe.flax.split_variables(model, variables)[0], (None,) * 4),
        0.0,
    )
    with raises(
        TypeError,
        "`fpipe.flax.split_variables(model, variables)`: the variables are nested "
        "dicts or an nnx.State, "
        "got a Sequential; of an NNX model they are `nnx.state(model)`",
    ):
        fpipe.flax.split_variables(model, model)
    pure = nnx.to_pure_dict(variables)
    names = ["layers_0", "layers_1", "relu", "layers_3"]
    for k in (2, 4):
        with raises(
            ValueError,
            f"`fpipe.flax.split_variables`: no layer owns ['layers/{k}']; the layers "
            f"are {names}",
        ):
            fpipe.flax.split_variables(
                model, {"layers": {**pure["layers"], k: {"kernel": X}}}
            )
    with raises(
        ValueError,
        "`fpipe.flax.split_variables`: layer 0 'layers_0' has ['bias', 'kernel'], "
        "which the variables lack",
    ):
        fpipe.flax.split_variables(model, {"layers": {}})


class Listed(nnx.Module):
    def __init__(self, rngs):
        self.each = nnx.List([nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)])

    def __call__(self, x):
        return self.each[1](self.each[0](x))


def scaled(params, x, *, state):
    return x * params, state + 1


@pytest.mark.parametrize("kinds", ["linen", "nnx", "both"])
def test_layers_of_every_kind_go_into_one_checkpoint_and_back(kinds):
    """Hand-written layers, and linen and NNX modules in one list; numbers may come back
    as strings.
    """
    own = fpipe.Layer(
        scaled, lambda key, x: noise(key, (3,)), init_state=lambda x: jnp.int32(0)
    )
    modules: list[Any] = [own, nn.relu, fpipe.DeferredBatchNorm()]
    modules += [Normed(), nn.Dropout(0.1)] if kinds != "nnx" else []
    modules += (
        [Listed(nnx.Rngs(0)), nnx.Dropout(0.1, rngs=nnx.Rngs(0))]
        if kinds != "linen"
        else []
    )
    layers = fpipe.flax.layers(modules, X)
    for deferred in (False, True):
        model = fpipe.sequential(layers, deferred_batch_norm=deferred)
        params = model.init(KEY, X)
        state = model(params, X, state=model.init_state(X), train=True, key=KEY)[1]
        state = (jnp.zeros(3), *state[1:])
        merged = fpipe.flax.merge_variables(layers, params, state)
        for again in (merged, strings(merged)):
            got = fpipe.flax.split_variables(
                layers, again, deferred_batch_norm=deferred
            )
            assert_same(got, (params, state), 0.0)
        assert_same(
            fpipe.flax.merge_variables(layers, params),
            fpipe.flax.merge_variables(layers, params, (None,) * len(layers)),
        )
    with pytest.raises(
        ValueError, match="layer 0 'scaled' has state, but the variables have none"
    ):
        fpipe.flax.split_variables(
            layers, {name: tree for name, tree in merged.items() if name != "state"}
        )


def strings(tree):
    return (
        {str(name): strings(value) for name, value in tree.items()}
        if isinstance(tree, dict)
        else tree
    )


# --- errors ---


def test_a_random_stream_without_a_key():
    message = no_key("layers_1", "dropout")
    layers = fpipe.flax.layers([nn.Dense(3), nn.Dropout(0.5)])
    pipe = pipe_of(layers, "placed")
    params = pipe.init(KEY, X)
    with raises(ValueError, message) as error:
        pipe(params, X, train=True)
    place = "fpipe: in layer 1 'layers_1', stage 1, microbatch 0; "
    assert place in "\n".join(error.value.__notes__)
    assert_same(pipe(params, X), pipe(params, X, key=KEY))
    layer = fpipe.flax.layer(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), name="layers_1")
    with raises(ValueError, message.replace("'dropout'", "'default'")):
        layer({}, X, key=None, train=True)
    layer = fpipe.flax.layer(nn.Dropout(0.5, deterministic=False), rngs=["noise"])
    with raises(
        ValueError,
        "layer 'Dropout': its module draws from the random stream 'dropout', but its "
        "streams are ['noise']: write "
        "`fpipe.flax.layer(module, rngs=['noise', 'dropout'])`",
    ):
        layer({}, X, key=KEY)


def test_a_collection_that_is_not_the_state():
    message = (
        "layer 'Block': its module uses ['batch_stats'], which the layer does not keep "
        "as its state: give a "
        "sample input, `fpipe.flax.layer(module, x)`, or write "
        "`fpipe.flax.layer(module, state=['batch_stats'])` if it is not only "
        "sown"
    )
    layer = fpipe.flax.layer(Block())
    with raises(ValueError, message):
        fpipe.sequential([layer]).init(KEY, X)
    params = Block().init(KEY, X, False)["params"]
    for train in (False, True):
        with raises(ValueError, message):
            fpipe.sequential([layer])((params,), X, train=train, key=KEY)

    class Late(nnx.Module):
        def __call__(self, x):
            self.late = nnx.BatchStat(x)
            return x

    with raises(
        ValueError,
        "layer 'Late': its module made the variables ['late'] while it ran, which the "
        "layer does not keep as its state: "
        "make them in `__init__`, or as `nnx.Intermediate`",
    ):
        fpipe.flax.layer(Late())({}, X)

    class LateParameter(nnx.Module):
        def __call__(self, x):
            self.late = nnx.Param(x)
            return x

    with pytest.raises(
        ValueError,
        match=r"layer 'LateParameter': its module made the variables \['late'\] while "
        r"it ran",
    ):
        fpipe.flax.layer(LateParameter())({}, X)


def test_what_is_no_module_or_does_not_belong_together():
    with raises(
        TypeError,
        "`fpipe.flax.layer(module)`: a linen or NNX module belongs here, got 3; a "
        "function without parameters is "
        "`fpipe.fn(f)`",
    ):
        fpipe.flax.layer(3, name="three")
    with pytest.raises(
        TypeError, match="rngs=, state= and a function as method= are for linen modules"
    ):
        fpipe.flax.layer(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), state=["a"])
    with pytest.raises(TypeError, match=r"for one module use `fpipe\.flax\.layer"):
        fpipe.flax.layers(nn.Dense(3))
    with pytest.raises(TypeError, match="the owner is the name of a layer, got None"):
        fpipe.flax.tied(nn.Dense(3), None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"use `fpipe\.flax\.tied"):
        fpipe.flax.layer(nn.Dense(3), borrow=untyped("embed"))
    with pytest.raises(TypeError, match="train= is the name of an argument"):
        fpipe.flax.layer(nn.Dense(3), train=3)  # pyright: ignore[reportArgumentType]
    for module in (
        nn.Dense(3),
        nnx.Linear(3, 3, rngs=nnx.Rngs(0)),
        functools.partial(nnx.Linear, 3, 3),
    ):
        with pytest.raises(
            TypeError,
            match=r"of layer 'a': (Dense|Linear) has no method 'atend'; name the one "
            r"to call",
        ):
            fpipe.flax.layer(module, name="a", method="atend")
        with pytest.raises(
            TypeError,
            match="of layer 'a': method= is the name of a method, or of a linen module "
            "a function",
        ):
            fpipe.flax.layer(module, name="a", method=untyped(3))
    for module in (type("Bare", (nn.Module,), {})(), type("Bare", (nnx.Module,), {})()):
        with pytest.raises(
            TypeError, match="of layer 'Bare': Bare has no method '__call__'"
        ):
            fpipe.flax.layer(module)
    norm = nn.BatchNorm()
    with pytest.raises(
        ValueError, match="layer 'layers_0' is there again as layer 1, but it has state"
    ):
        fpipe.flax.layers([norm, norm])
    one, two = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    two.kernel = one.kernel
    with pytest.raises(ValueError, match="layers 0 and 1 share 'kernel' of layer 1"):
        fpipe.flax.layers([one, two])
    dense, dropout = nn.Dense(3), nn.Dropout(0.5)
    within = (
        "layers 0 and 1 share 'layers/0' of layer 1; make layer 1 with "
        "`fpipe.flax.layer(module, borrow=...)`, so that one"
    )
    for first in (dense, nn.Sequential([nn.relu, dense])):
        with pytest.raises(ValueError, match=re.escape(within)):
            fpipe.flax.layers(nn.Sequential([first, nn.Sequential([dense])]))
    with pytest.raises(
        ValueError, match="layers 0 and 1 share all of layer 1; make layer 1 with"
    ):
        fpipe.flax.layers([nn.Sequential([dense]), dense])
    fpipe.flax.layers([nn.Sequential([dropout]), nn.Sequential([dropout])])
    stash = fpipe.skippable(stash=["a"])(
        fpipe.fn(lambda x, *, carry: (x, fpipe.stash(carry, "a", x)), "stash")
    )
    with pytest.raises(
        ValueError,
        match="layer 0 'stash' asks for 'carry', so the shapes of its output are not",
    ):
        fpipe.flax.layers([stash, nn.Dense(3)], X)
    with pytest.raises(
        ValueError,
        match="'Dense_of_typo' borrows from 'typo', which is no earlier layer, so "
        "the shapes",
    ):
        fpipe.flax.layers([nn.Dense(3), fpipe.flax.tied(nn.Dense(3), "typo")], X)
    bare = fpipe.Layer(lambda params, x, *, state: (x, state), name="bare")
    with pytest.raises(
        ValueError,
        match="layer 0 'bare' has no init and has no init_state, so the shapes",
    ):
        fpipe.flax.layers([bare, nn.Dense(3)], X)
    for module in (nn.Dense(3), one, nn.Sequential([nn.Dense(3)])):
        for make in (fpipe.Layer, fpipe.fn, lambda module: fpipe.Pipe([module])):
            with pytest.raises(
                TypeError,
                match=r"is a Flax module, whose parameters would not be seen: write "
                r"`fpipe\.flax",
            ):
                make(module)
    assert fpipe.fn(nnx.jit(double), "double").needs == ()


# --- values ---


def plain_dense(width=3):
    """A module that pickles: Flax's own initializers are local functions."""
    return nn.Dense(width, kernel_init=nn.initializers.ones)


def double(x):
    return 2 * x


def some_layers():
    return [
        fpipe.flax.layer(plain_dense(), name="dense"),
        fpipe.flax.layer(Block(), X, rngs=["dropout"]),
        fpipe.flax.tied(plain_dense(), "dense"),
        fpipe.flax.layer(nn.Sequential([plain_dense(), double])),
        fpipe.flax.layer(NBlock(nnx.Rngs(0))),
        fpipe.flax.layer(functools.partial(NBlock)),
        *fpipe.flax.layers(nn.Sequential([double, plain_dense()])),
    ]


def test_layers_are_values():
    one, two = some_layers(), some_layers()
    assert one[-4] == two[-4]
    for n in (0, 1, 2, 3, 4, 6, 7):  # two `functools.partial`s are never equal
        a, b = one[n], two[n]
        assert a == b
        assert hash(a) == hash(b)
        assert pickle.loads(pickle.dumps(a)) == a
        assert copy.deepcopy(a) == a
    assert fpipe.flax.layer(plain_dense(4), name="dense") != one[0]
    assert fpipe.flax.layer(plain_dense(), name="dense", train=True) != one[0]
    assert fpipe.flax.layer(NBlock(nnx.Rngs(1))) != one[4]
    pipe = pipe_of(one[:4], "placed")
    assert pickle.loads(pickle.dumps(pipe)) == pipe


def test_the_core_does_not_know_flax():
    code = (
        "import sys, fpipe, fpipe.plot, fpipe.__main__; "
        "assert 'flax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- state of rows ---


@pytest.mark.parametrize("executor", PLACED)
def test_a_collection_may_have_an_entry_for_each_row(executor):
    module = Remembering()
    layers = [fpipe.flax.layer(module, X, state_rows=True, name=name) for name in "ab"]
    pipe = fpipe.Pipe(layers, [1, 1], chunks=4, executor=executor)
    params, state = pipe.init(KEY, X), pipe.init_state(X)
    first, second = jax.device_get(pipe.gather(params))
    assert state[0]["cache"]["last"].shape == X.shape
    y, state = pipe(params, X, state=state)
    y, state = pipe(params, TARGET, state=state)

    def plain(params, last, x):
        variables = {"params": params, "cache": {"last": last}}
        return module.apply(variables, x, mutable=["cache"])[0]

    hidden = [plain(first, 0 * X, X), plain(first, X, TARGET)]
    assert_same(jax.device_get(y), plain(second, hidden[0], hidden[1]))
    assert_same(jax.device_get(state[1]["cache"]["last"]), hidden[1])
    undeclared = [fpipe.flax.layer(module, X, name=name) for name in "ab"]
    pipe = fpipe.Pipe(undeclared, [1, 1], chunks=4, executor=executor)
    with pytest.raises(ValueError, match="layer 0 'a': its state follows the rows"):
        pipe.init_state(X)


def test_a_module_without_state_has_none_with_rows():
    with pytest.raises(TypeError, match="layer 'Dense' has no state that could have"):
        fpipe.flax.layer(nn.Dense(3), X, state_rows=True)


# --- fp8 ---


def fp8_loop(model, variables, x, target, steps):
    """Plain Flax: the whole batch, and the "gradients" of scales as their values."""
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=optax.sgd(0.1))
    step = jax.jit(jax.value_and_grad(lambda v: mse(model.apply(v, x), target)))
    losses = []
    for _ in range(steps):
        loss, grads = step(state.params)
        state = state.apply_gradients(grads=grads)
        losses.append(loss)
    return losses, state.params


@pytest.mark.quick(cases=1)
@pytest.mark.parametrize("executor", [*EXECUTORS, "sequential"])
def test_fp8_scales_move_as_in_plain_flax(executor):
    op = functools.partial(Fp8DirectDotGeneralOp, amax_history_length=4)
    fp8 = functools.partial(nn.Dense, dot_general_cls=op)
    model = nn.Sequential([fp8(4), nn.tanh, fp8(4)])
    x = noise(KEY, (8, 4), -3.0, 3.0)
    variables = model.init(KEY, x)
    losses, want = fp8_loop(model, variables, x, jnp.cos(x), 4)

    layers = fpipe.flax.layers(model, x)
    assert layers[0].overwrite == (OVERWRITE_WITH_GRADIENT,)
    if executor == "sequential":
        pipe = fpipe.sequential(layers, chunks=4)
        step = jax.jit(pipe.value_and_grad(mse))
    else:
        pipe = fpipe.Pipe(layers, [1, 2], chunks=4, executor=executor)
        step = pipe.value_and_grad(mse)
    params, state = fpipe.flax.split_variables(layers, variables)
    params = pipe.place(params)
    for loss in losses:
        (got, state), grads = step(params, x, jnp.cos(x), state=state)
        assert_same(jax.device_get(got), loss, 1e-4)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    own = jax.device_get((pipe.gather(params), state))
    found = fpipe.flax.merge_variables(layers, *own)
    scales = found[OVERWRITE_WITH_GRADIENT]
    assert_same(scales, jax.device_get(want[OVERWRITE_WITH_GRADIENT]))
    # What is only evaluated leaves them.
    _, new = pipe.evaluate(mse)(params, x, jnp.cos(x), state=state)
    assert_same(jax.device_get(new), own[1])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_scale_that_a_loop_uses_again_is_a_maximum_too(executor):
    """`fp32_max_grad`: JAX adds up the uses of such a number by their maximum."""
    as_max = functools.partial(jax.lax.convert_element_type, new_dtype=fp32_max_grad)
    e4m3 = jnp.float8_e4m3fn

    def apply(params, x, *, state):
        scale, history = as_max(state["scale"]), as_max(state["history"])

        def body(h, _):
            return jnp.tanh(in_qdq(jnp.float32, e4m3, h, scale, history) @ params), None

        return jax.lax.scan(body, x, None, length=3)[0], state

    layer = fpipe.Layer(
        apply,
        lambda key, x: noise(key, (3, 3)),
        init_state=lambda x: {"scale": jnp.ones(1), "history": jnp.zeros(4)},
        overwrite=True,
    )
    pipe = fpipe.Pipe([layer, layer], [1, 1], chunks=4, executor=executor)
    params, state = pipe.init(KEY, X), pipe.init_state(X)
    (_, new), _ = pipe.value_and_grad(mse)(params, X, TARGET, state=state)
    own, first = jax.device_get((pipe.gather(params), state))

    def plain(state):
        h, _ = apply(own[0], X, state=state[0])
        return mse(apply(own[1], h, state=state[1])[0], TARGET)

    assert_same(jax.device_get(new), jax.device_get(jax.jit(jax.grad(plain))(first)))
