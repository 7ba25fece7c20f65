"""A run may go on without the pipeline that it began with, and the other way round: the
losses are those of a run without a break.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn

import fpipe
import fpipe.optim
from tests.helpers import assert_same

WIDTH = 4
ADAMW = optax.adamw(
    1e-2,
    weight_decay=0.1,
    mask=lambda params: jax.tree.map(lambda a: a.ndim > 1, params),
)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = x + nn.tanh(nn.Dense(WIDTH)(x))
        return nn.Dense(1)(x)[:, 0]


def init(key):
    return Model().init(key, jnp.ones((1, WIDTH)))["params"]


def loss_fn(params, x, y):
    return jnp.mean((Model().apply({"params": params}, x) - y) ** 2)


def batch_of(step):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(8, WIDTH)).astype(np.float32)
    return x, np.sin(x.sum(1))


SHAPES = jax.eval_shape(lambda: batch_of(0))


class Plain:
    """The model's own loop, with plain optax."""

    def __init__(self):
        self.step = jax.jit(jax.value_and_grad(loss_fn))

    def start(self):
        params = jax.jit(init)(jax.random.key(0))
        return params, ADAMW.init(params)

    def run(self, now, steps):
        params, moments = now
        losses = []
        for n in steps:
            loss, grads = self.step(params, *batch_of(n))
            updates, moments = ADAMW.update(grads, moments, params)
            params = optax.apply_updates(params, updates)
            losses.append(float(loss))
        return losses, (params, moments)

    def on_disk(self, now):
        return now

    def place(self, saved):
        return saved


class Pipelined:
    """The same loop with the changed lines."""

    def __init__(self, executor):
        self.tx = fpipe.optim.per_stage(ADAMW)
        self.step = fpipe.value_and_grad(
            loss_fn,
            devices=jax.devices()[:2],
            chunks=2,
            checkpoint="never",
            executor=executor,
            init=init,
        )

    def start(self):
        params = self.step.init(jax.random.key(0), *SHAPES)
        return params, self.tx.init(params)

    def run(self, now, steps):
        params, moments = now
        losses = []
        for n in steps:
            loss, grads = self.step(params, *batch_of(n))
            updates, moments = self.tx.update(grads, moments, params)
            params = fpipe.optim.apply_updates(params, updates)
            losses.append(float(loss))
        return losses, (params, moments)

    def on_disk(self, now):
        return self.step.gather(now[0]), fpipe.optim.gather(now[1])

    def place(self, saved):
        params = self.step.place(saved[0], *SHAPES)
        return params, fpipe.optim.place(saved[1], params, self.tx)


def through_disk(tree, like, folder):
    """A tree as orbax saves it, read as another loop has it."""
    with ocp.CheckpointManager(folder) as manager:
        manager.save(2, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
        return manager.restore(2, args=ocp.args.StandardRestore(like))


@pytest.fixture(autouse=True, scope="module")
def promotion():
    """The bias correction of optax's Adam needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def plain(promotion):
    """The loop without a pipeline, its state after two steps, and four losses."""
    loop = Plain()
    first, half = loop.run(loop.start(), range(2))
    second, _ = loop.run(half, range(2, 4))
    return loop, half, [*first, *second]


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_a_checkpoint_goes_on_with_and_without_a_pipeline(executor, plain, tmp_path):
    loop, half, losses = plain
    piped = Pipelined(executor)
    begun = piped.start()
    like = piped.on_disk(begun)
    # What orbax is told to read is what the plain loop has.
    chex.assert_trees_all_equal_structs(like, half)
    chex.assert_trees_all_equal_shapes_and_dtypes(like, half)

    saved = through_disk(loop.on_disk(half), like, tmp_path / "plain")
    got, _ = piped.run(piped.place(saved), range(2, 4))
    np.testing.assert_allclose(got, losses[2:], rtol=1e-5)

    first, there = piped.run(begun, range(2))
    np.testing.assert_allclose(first, losses[:2], rtol=1e-5)
    saved = through_disk(piped.on_disk(there), half, tmp_path / "piped")
    assert_same(saved, half)
    got, _ = loop.run(loop.place(saved), range(2, 4))
    np.testing.assert_allclose(got, losses[2:], rtol=1e-5)


def test_other_parameters_and_moments_have_other_losses(plain):
    """Or the test above could not tell."""
    loop, (params, moments), losses = plain
    started, fresh = loop.start()
    for now in ((params, fresh), (started, moments)):
        got, _ = loop.run(now, range(2, 4))
        assert abs(got[1] / losses[3] - 1) > 1e-4
