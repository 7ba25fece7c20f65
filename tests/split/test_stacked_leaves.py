"""Stacked leaves whose rows lie on several devices are one leaf to `fpipe.optim`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization

import fpipe
import fpipe.flax
import fpipe.optim
from tests.helpers import assert_same
from tests.split.models import weights
from tests.split.test_scans import STACK, W, loss, scan_of

X = weights(4, W)


def model(params, x):
    """The biases of its layers are stacked on the first axis, the weights on the
    second.
    """
    blocks = params["blocks"]
    rows = {"b": blocks["b"], "w": jnp.moveaxis(blocks["w"], 1, 0)}
    return scan_of(rows, x) @ params["out"]


BLOCKS = {"b": STACK["b"], "w": STACK["w"].swapaxes(0, 1)}
PARAMS = {"blocks": BLOCKS, "out": weights(W, W, seed=2)}


@functools.cache
def pipe_of(executor):
    split = fpipe.split(model, PARAMS, X[:2], cuts=["blocks/1"])
    devices = jax.devices()[:2]
    return fpipe.Pipe(split, devices=devices, chunks=2, executor=executor)


@functools.cache
def placed_step(executor):
    """Placed parameters with their gradients."""
    pipe = pipe_of(executor)
    placed = pipe.place(PARAMS)
    return placed, pipe.value_and_grad(loss)(placed, X)[1]


WANT_GRADS = jax.grad(lambda p: loss(model(p, X)))

TRANSFORMATIONS = {
    "lamb": optax.lamb(0.1, weight_decay=0.01),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "adaptive clip": optax.adaptive_grad_clip(0.01),
    "block clip": optax.clip_by_block_rms(0.001),
    "sorted": optax.stateless(
        lambda g, p: jax.tree.map(lambda a: jnp.sort(a, axis=0), g)
    ),
    "skips": optax.apply_if_finite(optax.adam(0.1, mu_dtype=jnp.bfloat16), 2),
    "labels": optax.multi_transform(
        {"all": optax.sgd(0.1, 0.9), "bias": optax.lamb(0.1)},
        {"blocks": {"w": "all", "b": "bias"}, "out": "all"},
    ),
}


@pytest.mark.parametrize(
    ("executor", "name"),
    [
        ("scan", "lamb"),
        *((("placed", "scan")[n % 2], name) for n, name in enumerate(TRANSFORMATIONS)),
    ],
)
def test_a_transformation_sees_whole_leaves(executor, name):
    own = TRANSFORMATIONS[name]
    placed, grads = placed_step(executor)
    pipe = pipe_of(executor)
    with jax.numpy_dtype_promotion("standard"):
        tx = fpipe.optim.per_stage(own)
        state = tx.init(placed)
        updates, state = tx.update(grads, state, placed)
        updates, state = tx.update(grads, state, placed)
        want_grads = pipe.gather(grads)
        want = own.init(PARAMS)
        step = jax.jit(own.update)
        _, want = step(want_grads, want, PARAMS)
        want_updates, want = step(want_grads, want, PARAMS)
    assert_same(pipe.gather(updates), want_updates)
    gathered = fpipe.optim.gather(state)
    assert_same(gathered, jax.tree.map(jnp.asarray, want))
    again = fpipe.optim.place(gathered, placed, tx)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert_same(fpipe.optim.gather(again), gathered)


def test_only_numbers_cross_devices():
    """LAMB's norm of a leaf is one of its blocks' norms."""
    params = {"w": jnp.ones((4, 32, 32)), "v": jnp.ones((32, 4, 32))}

    def fn(p, x):
        rows = p["w"], jnp.moveaxis(p["v"], 1, 0)
        return jax.lax.scan(lambda h, row: (h @ row[0] @ row[1], None), x, rows)[0]

    split = fpipe.split(fn, params, jnp.ones((2, 32)), stages=2)
    pipe = fpipe.Pipe(split, devices=jax.devices()[:2], chunks=2)
    placed = pipe.place(params)
    with jax.numpy_dtype_promotion("standard"):
        tx = fpipe.optim.per_stage(optax.lamb(0.1))
        tx.update(placed, tx.init(placed), placed)
    moves = [move for run in tx.runs for move in run.cut.moves]
    assert moves
    assert max(move.bytes for move in moves) <= 64


def average(old, new, decay):
    return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new)


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_a_function_of_whole_trees_sees_whole_leaves(executor):
    placed, grads = placed_step(executor)
    pipe = pipe_of(executor)
    mixed = fpipe.optim.map(average, placed, grads, 0.75)
    assert jax.tree.structure(mixed) == jax.tree.structure(placed)
    want = pipe.gather(grads)
    assert_same(pipe.gather(mixed), average(PARAMS, want, 0.75))
    shapes = []
    norms = fpipe.optim.map(
        lambda p: shapes.append(p["blocks"]["w"].shape) or optax.tree.norm(p), grads
    )
    assert shapes == [(W, 4, W)]
    assert_same(norms, optax.tree.norm(want))


def test_frozen_by_the_path_of_the_whole_leaf():
    placed, grads = placed_step("placed")
    seen = []

    def frozen(path, shape):
        seen.append((path, shape.shape))
        return path == "blocks/w"

    tx = fpipe.optim.per_stage(optax.lamb(0.1), frozen=frozen)
    with jax.numpy_dtype_promotion("standard"):
        made: Any = tx.update(grads, tx.init(placed), placed)
    updates = made[0]
    assert ("blocks/w", (W, 4, W)) in seen
    assert [u.shape for u in updates["blocks"]["w"].blocks] == [(), ()]
    assert updates["blocks"]["b"].shape == (4, W)
    assert pipe_of("placed").gather(updates)["blocks"]["w"].shape == ()


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_flax_saves_whole_leaves(executor):
    """What a pipe has loads in the plain model, and the other way round."""
    pipe, (placed, _) = pipe_of(executor), placed_step(executor)
    plain = jax.tree.map(jnp.zeros_like, PARAMS)
    saved = serialization.to_bytes(placed)
    assert_same(serialization.from_bytes(plain, saved), jax.device_get(PARAMS))
    other = pipe.place(plain)
    back = serialization.from_bytes(other, serialization.to_bytes(PARAMS))
    assert jax.tree.structure(back) == jax.tree.structure(placed)
    assert_same(pipe.gather(back), PARAMS)
    if executor == "placed":
        with pytest.raises(ValueError, match=r"an fpipe.RowBlocks of the shape \(4, 3"):
            serialization.from_state_dict(
                placed["blocks"], {"b": plain["out"]} | {"w": plain["out"]}
            )


def test_orbax_saves_blocks_as_they_lie_and_whole_leaves_of_what_is_gathered(tmp_path):
    pipe, (placed, grads) = pipe_of("placed"), placed_step("placed")
    own = optax.adam(0.1)
    tx = fpipe.optim.per_stage(own)
    with jax.numpy_dtype_promotion("standard"):
        _, moments = tx.update(grads, tx.init(placed), placed)
    here = {"params": placed, "moments": moments}
    whole = {"params": pipe.gather(placed), "moments": fpipe.optim.gather(moments)}
    plain = {"params": PARAMS, "moments": own.init(PARAMS)}
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, plain)
    with ocp.StandardCheckpointer() as files:
        files.save(tmp_path / "blocks", here)
        files.save(tmp_path / "whole", whole)
        files.wait_until_finished()
        again = files.restore(tmp_path / "blocks", here)
        of_plain = files.restore(tmp_path / "whole", shapes)
    # Each block on its device.
    assert_same(jax.device_get(again), jax.device_get(here))
    devices = [[a.devices() for a in jax.tree.leaves(tree)] for tree in (again, here)]
    assert devices[0] == devices[1]
    # The plain model loads the other one, and a pipe what the plain model has.
    assert jax.tree.structure(of_plain) == jax.tree.structure(plain)
    assert_same(of_plain, whole)
    back = pipe.place(of_plain["params"])
    moved = fpipe.optim.place(of_plain["moments"], back, tx)
    assert_same(jax.device_get((back, moved)), jax.device_get((placed, moments)))


def test_numpy_takes_no_blocks_for_an_array():
    blocks = pipe_of("placed").place(PARAMS)["blocks"]["b"]
    with pytest.raises(TypeError, match=r"a `RowBlocks` is no array: .*`step.gather"):
        np.asarray(blocks)
