"""Flax modules that stash, peek at and pop skips: against Flax itself, by hand."""

import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import fpipe
import fpipe.flax
from tests.helpers import assert_same, mse, noise, raises

X = noise(jax.random.key(1), (4, 3))
TARGET = jnp.cos(X)
CHUNKS = 2


class Down(nn.Module):
    """It stashes its output; its statistics are state beside the skip."""

    @nn.compact
    def __call__(self, x, *, carry, train=False):
        y = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
        return jnp.tanh(y), fpipe.stash(carry, "skip", y)


class Scale(nn.Module):
    """It peeks."""

    @nn.compact
    def __call__(self, x, *, carry):
        gate = nn.Dense(3)(fpipe.peek(carry, "skip"))
        return x * jnp.sin(gate), carry


class Up(nn.Module):
    """It pops, and its kernel is as wide as input and skip together."""

    @nn.compact
    def __call__(self, x, *, carry):
        skip, carry = fpipe.pop(carry, "skip")
        return nn.Dense(3)(jnp.concatenate([x, skip], -1)), carry


class NDown(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x, *, carry):
        y = self.norm(self.dense(x))
        return jnp.tanh(y), fpipe.stash(carry, "skip", y)


class NScale(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x, *, carry):
        return x * jnp.sin(self.dense(fpipe.peek(carry, "skip"))), carry


class NUp(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x, *, carry):
        skip, carry = fpipe.pop(carry, "skip")
        return self.dense(jnp.concatenate([x, skip], -1)), carry


DECLARED = ({"stash": ["skip"]}, {"peek": ["skip"]}, {"pop": ["skip"]})


@functools.cache
def layers_of(kind, sample=False):
    if kind == "nnx":
        modules: Any = [NDown, NScale, NUp]
        made = [fpipe.flax.layer(module) for module in modules]
    else:
        x = X[:2] if sample else None
        skip = {"skip": x} if sample else None
        state = None if sample else ["batch_stats"]
        made = [
            fpipe.flax.layer(Down(), x, state=state),
            fpipe.flax.layer(Scale(), x, carry_sample=skip),
            fpipe.flax.layer(Up(), x, carry_sample=skip),
        ]
    pairs = zip(DECLARED, made, strict=True)
    return [fpipe.skippable(**names)(each) for names, each in pairs]


def needs_of(layer):
    return [n for n in ("carry", "key", "state", "train") if layer.asks(n)]


def by_hand(layers, params, state, x, train):
    """The layers' own modules, called one after the other."""
    carry: dict[str, Any] = {}
    down, scale, up = layers
    needs = {"train": True} if train else {}
    x, carry, new = down.apply(params[0], x, carry=carry, state=state, **needs)
    x, carry = scale.apply(params[1], x, carry=carry)
    x, carry = up.apply(params[2], x, carry=carry)
    assert carry == {}
    return x, new


@pytest.mark.parametrize(
    "executor", ["placed", pytest.param("scan", marks=pytest.mark.full)]
)
def test_linen_modules_with_skips_and_state(executor):
    layers = layers_of("linen")
    assert list(map(needs_of, layers)) == [
        ["carry", "key", "state", "train"],
        ["carry", "key"],
        ["carry", "key"],
    ]
    pipe = fpipe.Pipe(layers, [1, 2], chunks=CHUNKS, executor=executor)
    params, state = pipe.init(jax.random.key(0), X), pipe.init_state(X)
    plain = pipe.gather(params)
    assert plain[2]["Dense_0"]["kernel"].shape == (6, 3)

    # The module, applied by Flax.
    def apply(module, k, x, carry, **given):
        variables = {"params": plain[k], **given.pop("state", {})}
        return module.apply(variables, x, carry=carry, **given)

    def forward(statistics, x):
        state = {"batch_stats": statistics}
        (x, carry), new = apply(
            Down(), 0, x, {}, state=state, train=True, mutable=["batch_stats"]
        )
        x, carry = apply(Scale(), 1, x, carry)
        return apply(Up(), 2, x, carry)[0], new["batch_stats"]

    statistics, losses = state[0]["batch_stats"], []
    for n in range(CHUNKS):
        rows = slice(2 * n, 2 * n + 2)
        y, statistics = forward(statistics, X[rows])
        losses.append(mse(y, TARGET[rows]))
    step = pipe.value_and_grad(mse)
    run = jax.jit(step, static_argnames="train") if executor == "scan" else step
    (loss, state), _ = run(params, X, TARGET, state=state, train=True)
    assert_same(loss, sum(losses) / CHUNKS)
    assert_same(state[0]["batch_stats"], statistics)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_gradients_go_through_the_skip(kind):
    layers = layers_of(kind)
    pipe = fpipe.Pipe(layers, [1, 2], chunks=CHUNKS)
    params, state = pipe.init(jax.random.key(0), X), pipe.init_state(X)
    reference = fpipe.sequential(layers, chunks=CHUNKS)
    plain = pipe.gather(params)
    got = pipe.value_and_grad(mse)(params, X, TARGET, state=state, train=True)
    call = functools.partial(reference.value_and_grad(mse), train=True)
    want = jax.jit(call)(plain, X, TARGET, state=state)
    assert_same(got, want)

    def whole(params):
        y, _ = by_hand(layers, params, state[0], X, train=False)
        return mse(y, TARGET)

    _, grads = pipe.value_and_grad(mse)(params, X, TARGET, state=state)
    assert_same(pipe.gather(grads), jax.jit(jax.grad(whole))(plain))


def test_a_sample_shows_what_a_module_with_skips_uses():
    layers = layers_of("linen", sample=True)
    assert list(map(needs_of, layers)) == [
        ["carry", "state", "train"],
        ["carry"],
        ["carry"],
    ]
    assert pickle.loads(pickle.dumps(layers)) == layers


def test_a_carry_that_is_an_input_is_none():
    cell = fpipe.flax.layer(nn.LSTMCell(3))
    assert not cell.asks("carry")

    class Named(nn.Module):
        def __call__(self, x, *, carry):
            return x + carry

    named = fpipe.flax.layer(Named(), inputs=("x", "carry"))
    assert not named.asks("carry")


def test_a_module_that_does_not_return_its_carry():
    class Forgets(nn.Module):
        def __call__(self, x, *, carry):
            return x

    pipe = fpipe.sequential(
        [
            fpipe.skippable(stash=["skip"])(fpipe.flax.layer(Forgets())),
            layers_of("linen")[2],
        ]
    )
    with raises(
        TypeError,
        "layer 'Forgets': its module takes `carry`, so it returns `(y, carry)`, got "
        "float32[4,3]",
    ):
        pipe.init(jax.random.key(0), X)


def test_deferred_batch_norm_keeps_the_skips():
    pipe = fpipe.Pipe(
        layers_of("linen"), [1, 2], chunks=CHUNKS, deferred_batch_norm=True
    )
    assert pipe.model.layers[0].stash == ("skip",)
    assert pipe.model.layers[0].asks("carry")
