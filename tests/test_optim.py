"""Optimizers per stage: what plain optax computes on the gathered tree, on the devices of the stages."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import fpipe
import fpipe.optim
from tests.helpers import assert_same, dense, mse, raises


@pytest.fixture(autouse=True)
def promotion():
    """`optax` raises floats to integer powers: it does not run under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


STAGES = 3
WIDTH = 4


def layers():
    """One parameter that is a scalar, and shapes that differ."""
    scale = fpipe.Layer(lambda p, x: x * p, lambda key, x: jnp.asarray(1.5, jnp.float32), name="scale")
    return [dense(), dense(6), scale, dense()]


def pipe_of(executor, count=STAGES):
    balance = {1: [4], 2: [2, 2], 3: [1, 2, 1]}[count]
    return fpipe.Pipe(layers(), balance, chunks=2, executor=executor)


X = jax.random.normal(jax.random.key(1), (4, WIDTH))
EXECUTORS = ["placed", "scan"]


def whole():
    """The parameters as plain optax sees them."""
    made = fpipe.sequential(layers(), chunks=2).init(jax.random.key(0), X)
    return jax.device_put(made, jax.devices()[0])


def grads_of(params, step):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(step + 7), len(leaves))
    return treedef.unflatten(
        [
            jax.random.normal(k, a.shape).astype(a.dtype) * 2 if jnp.issubdtype(a.dtype, jnp.inexact) else a
            for k, a in zip(keys, leaves, strict=True)
        ]
    )


def by_rank(params):
    return jax.tree.map(lambda a: a.ndim > 1, params)


def schedule():
    return optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 6)


OPTIMIZERS = {
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, mask=by_rank),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "clip_after": lambda: optax.chain(optax.scale_by_adam(), optax.clip_by_global_norm(1e-2), optax.scale(-1.0)),
    "adaptive": lambda: optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)),
    "lamb": lambda: optax.lamb(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "ema": lambda: optax.chain(optax.ema(0.9), optax.sgd(0.1)),
    "multi_steps": lambda: optax.MultiSteps(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)), 2
    ).gradient_transformation(),
    "masked": lambda: optax.masked(optax.adam(1e-2), by_rank),
    "multi_transform": lambda: optax.multi_transform(
        {"a": optax.adam(1e-2), "b": optax.sgd(0.1)}, lambda p: jax.tree.map(lambda a: "a" if a.ndim > 1 else "b", p)
    ),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=schedule()),
    "schedule": lambda: optax.adam(schedule()),
    "finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 2),
    "own_mask": lambda: optax.adamw(1e-2, mask=by_rank(whole())),
}


def steps(tx, params, place, gather, count=4, jit=False, poison=None):
    """Updates and states of several steps, gathered."""
    init, update = (jax.jit(tx.init), jax.jit(tx.update)) if jit else (tx.init, tx.update)
    state, out = init(params), []
    for n in range(count):
        grads = grads_of(gather(params), n)
        if n == poison:
            grads = jax.tree.map(lambda g: g * jnp.nan, grads)
        updates, state = update(place(grads), state, params)
        params = optax.apply_updates(params, updates)
        out.append((gather(updates), fpipe.optim.gather(state), gather(params)))
    return out


@functools.cache
def reference(name, poison=None):
    tx = OPTIMIZERS[name]()
    # Compiled, as the programs of the stages are: `optax` run equation by equation rounds otherwise.
    return steps(tx, whole(), lambda t: t, lambda t: t, jit=True, poison=poison)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("executor", [*EXECUTORS, "scan in jit"])
def test_equal_to_plain_optax(name, executor):
    pipe = pipe_of(executor.split()[0])
    tx = fpipe.optim.per_stage(OPTIMIZERS[name]())
    poison = 1 if name == "finite" else None
    got = steps(tx, pipe.place(whole()), pipe.place, pipe.gather, jit="jit" in executor, poison=poison)
    want = reference(name, poison=poison)
    for (updates, state, params), (updates0, state0, params0) in zip(got, want, strict=True):
        assert_same(updates, updates0, 2e-5) if poison is None else None
        assert_same(state, state0, 2e-5)
        assert_same(params, params0, 1e-6)
