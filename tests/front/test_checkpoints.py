"""Checkpoints with orbax: training that goes on under another partition, executor or
number of processes is the same.
"""

import argparse
import dataclasses
import faulthandler
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.training.train_state import TrainState
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import fpipe
import fpipe.flax
import fpipe.optim
from tests.front.workers import ROOT, Workers
from tests.helpers import (
    HANG,
    WIDTH,
    assert_same,
    counter,
    dense,
    dropout,
    mse,
    raises,
)

ROWS = 8


def times() -> fpipe.Layer:
    """A parameter that is an integer, one in bfloat16."""

    def init(key, x):
        return {
            "n": jnp.full(3, 1, jnp.int32),
            "scale": jax.random.uniform(key, x.shape[-1:], jnp.bfloat16, 0.5),
        }

    def apply(params, x):
        return x * (params["scale"] * params["n"][0].astype(jnp.bfloat16)).astype(
            x.dtype
        )

    return fpipe.Layer(apply, init, name="times")


# Parameters that are `None` are a part of a checkpoint too.
tanh = fpipe.Layer(lambda params, x: jnp.tanh(x), lambda key, x: None, name="tanh")
LAYERS = [dense(), counter(), dense(6), tanh, dense(), times(), dropout()]
PARTITIONS = {
    "placed": {"balance": [2, 1, 1, 3]},
    "scan": {"balance": [1, 3, 3], "executor": "scan"},
    "placed on other devices": {"balance": [3, 4], "devices": (3, 1)},
    "scan on other devices": {"balance": [5, 2], "executor": "scan", "devices": (2, 0)},
}


@functools.cache
def pipe_of(name):
    """The pipe of a partition. All tests share it, and what it has compiled."""
    options = dict(PARTITIONS[name])
    devices = [
        jax.devices()[n] for n in options.pop("devices", range(len(options["balance"])))
    ]
    return fpipe.Pipe(LAYERS, devices=devices, chunks=4, **options)


@functools.cache
def transformation():
    """Frozen parameters, the norm of all gradients, two moments."""
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2))
    return fpipe.optim.per_stage(tx, frozen=lambda path, leaf: path.startswith("2/"))


def start(pipe):
    x = jnp.zeros((ROWS, WIDTH))
    params = pipe.init(jax.random.key(0), x)
    return (
        params,
        pipe.init_state(x),
        transformation().init(params),
        jax.random.key(5),
        0,
    )


def train(pipe, now, steps=2):
    params, state, moments, key, step = now
    tx = transformation()
    for _ in range(steps):
        x = np.random.default_rng(step).normal(size=(ROWS, WIDTH)).astype(np.float32)
        key, own = jax.random.split(key)
        (_, state), grads = pipe.value_and_grad(mse)(
            params, x, np.sin(x), state=state, key=own, train=True
        )
        updates, moments = tx.update(grads, moments, params)
        params, step = fpipe.optim.apply_updates(params, updates), step + 1
    return params, state, moments, key, step


@functools.cache
def trained(name):
    """The pipe of a partition, and what there is after two steps."""
    pipe = pipe_of(name)
    return pipe, train(pipe, start(pipe))


def canonical(pipe, now):
    params, state, moments, key, step = now
    tree = {
        "params": pipe.gather(params),
        "state": state,
        "moments": fpipe.optim.gather(moments),
    }
    return jax.device_get(
        {**tree, "key": jax.random.key_data(key), "step": np.int32(step)}
    )


def save(manager, pipe, now):
    manager.save(now[-1], args=ocp.args.StandardSave(canonical(pipe, now)))
    manager.wait_until_finished()


def load(manager, pipe):
    new = start(pipe)
    saved = manager.restore(
        manager.latest_step(), args=ocp.args.StandardRestore(canonical(pipe, new))
    )
    moments = fpipe.optim.place(saved["moments"], new[0], transformation())
    params, key = pipe.place(saved["params"]), jax.random.wrap_key_data(saved["key"])
    return params, saved["state"], moments, key, int(saved["step"])


@pytest.fixture(scope="module", autouse=True)
def promotion():
    """The bias correction of optax's Adam needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def uninterrupted(promotion):
    """Four steps, and what is after two."""
    pipe, half = trained("placed")
    return canonical(pipe, half), canonical(pipe, train(pipe, half))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("placed", "scan"),
        ("scan", "placed"),
        ("placed", "placed on other devices"),
        ("scan", "scan on other devices"),
    ],
)
def test_training_goes_on_in_another_form(before, after, uninterrupted, tmp_path):
    (one, half), other = trained(before), pipe_of(after)
    with ocp.CheckpointManager(tmp_path) as manager:
        save(manager, one, half)
        loaded = load(manager, other)
    exact = before == after == "placed"
    assert_same(
        canonical(other, loaded), uninterrupted[0], 0 if before == "placed" else 1e-4
    )
    # In the very form that the pipe itself makes, so that nothing compiles anew for it.
    assert jax.tree.structure(loaded[2]) == jax.tree.structure(
        transformation().init(loaded[0])
    )
    assert_same(
        canonical(other, train(other, loaded)), uninterrupted[1], 0 if exact else 1e-4
    )


def test_the_numbers_change_in_every_part(uninterrupted):
    """Or the test above could not tell."""
    half, full = uninterrupted
    for name in ("params", "state", "moments", "key", "step"):
        with pytest.raises(AssertionError):
            assert_same(half[name], full[name], 1e-2)
    assert [a.dtype for a in jax.tree.leaves(full["moments"])].count(jnp.bfloat16) == 2
    assert isinstance(full["moments"][1][0].mu[2]["w"], optax.MaskedNode)


def test_inside_jit(tmp_path):
    """Loaded states and keys stand beside parameters on a mesh; plain optax as it
    is.
    """
    pipe, tx = pipe_of("scan on other devices"), optax.sgd(1e-2, momentum=0.9)
    x = jnp.ones((ROWS, WIDTH))
    layers = [
        layer for layer in LAYERS if layer.name != "times"
    ]  # plain optax wants no integers
    pipe = fpipe.Pipe(layers, [4, 2], pipe.devices, chunks=4, executor="scan")

    @jax.jit
    def step(params, state, moments, key):
        (_, state), grads = pipe.value_and_grad(mse)(
            params, x, x, state=state, key=key, train=True
        )
        updates, moments = tx.update(grads, moments, params)
        return (
            optax.apply_updates(params, updates),
            state,
            moments,
            jax.random.fold_in(key, 1),
        )

    params = pipe.init(jax.random.key(0), x)
    now = step(params, pipe.init_state(x), jax.jit(tx.init)(params), jax.random.key(1))
    tree = canonical(pipe, (*now, 1))
    assert jax.tree.structure(tree["moments"]) == jax.tree.structure(
        tx.init(tree["params"])
    )
    with ocp.CheckpointManager(tmp_path) as manager:
        save(manager, pipe, (*now, 1))
        saved = manager.restore(1, args=ocp.args.StandardRestore(tree))
    params = pipe.place(saved["params"])
    moments = fpipe.optim.place(saved["moments"], params, tx)
    again = step(
        params, saved["state"], moments, jax.random.wrap_key_data(saved["key"])
    )
    assert_same(canonical(pipe, (*again, 2)), canonical(pipe, (*step(*now), 2)), 0)


def test_a_train_state_whose_parameters_are_cut(tmp_path):
    layer = dataclasses.replace(dense(), spec={"w": P(None, "model"), "b": None})
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("stage", "model"))
    pipe = fpipe.Pipe([layer] * 2, chunks=4, executor="scan", mesh=mesh)
    x = jnp.ones((ROWS, WIDTH))
    tx = fpipe.optim.per_stage(optax.adam(1e-2))
    state = TrainState.create(
        apply_fn=pipe, params=pipe.init(jax.random.key(0), x), tx=tx
    )

    @jax.jit
    def step(state):
        _, grads = pipe.value_and_grad(mse)(state.params, x, jnp.sin(x))
        return state.apply_gradients(grads=grads)

    half = step(state)
    tree = {
        "params": pipe.gather(half.params),
        "moments": fpipe.optim.gather(half.opt_state),
    }
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.StandardSave(tree))
        saved = manager.restore(1, args=ocp.args.StandardRestore(tree))
    params = pipe.place(saved["params"])
    moments = fpipe.optim.place(saved["moments"], params, tx)
    loaded = half.replace(params=params, opt_state=moments)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(half), strict=True):
        assert np.ndim(a) == 0 or a.sharding == b.sharding
    assert_same(step(loaded), step(half), 0)


@pytest.mark.parametrize("name", PARTITIONS)
def test_all_is_gathered_on_one_device(name):
    """So that plain optax goes on with it."""
    pipe = pipe_of(name)
    params, _, moments, _, _ = start(pipe)
    trees = pipe.gather(params), fpipe.optim.gather(moments)
    assert {device for a in jax.tree.leaves(trees) for device in a.devices()} == {
        pipe.devices[0]
    }


def test_on_disk_is_one_entry_per_layer(tmp_path):
    found = []
    for name in ("placed", "scan"):
        pipe = pipe_of(name)
        with ocp.CheckpointManager(tmp_path / name) as manager:
            save(manager, pipe, start(pipe))
        with ocp.CheckpointManager(tmp_path / name) as manager:
            found.append(
                manager.restore(0, args=ocp.args.StandardRestore())
            )  # as it is there, without a target
    assert_same(found[1], found[0], 0)
    x = jnp.zeros((ROWS, WIDTH))
    plain = fpipe.sequential(LAYERS, chunks=4).init(jax.random.key(0), x)
    kept = jax.tree.leaves(plain)
    assert_same(jax.tree.leaves(found[0]["params"]), kept, 0)
    assert (
        len(found[0]["params"])
        == len(found[0]["state"])
        == len(found[0]["moments"][1][0]["mu"])
        == len(LAYERS)
    )


# --- of something else ---

CALL = "`fpipe.optim.place(state, params, tx)`: "
FIX = (
    "; load it with the model and the transformation that it was saved with, or start "
    "again with `tx.init(params)`"
)


OTHER = (
    "the optimizer state is not of this transformation, these parameters and "
    "`frozen`: 9 leaves, and `init(params)` gives"
)


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_a_state_of_something_else(executor):
    pipe = fpipe.Pipe([dense(), dense()], [1, 1], chunks=2, executor=executor)
    x = jnp.zeros((4, WIDTH))
    params = pipe.init(jax.random.key(0), x)
    adam, sgd = optax.adam(1e-2), optax.sgd(1e-2)
    state = jax.device_get(fpipe.optim.gather(fpipe.optim.per_stage(adam).init(params)))
    for tx in (adam, fpipe.optim.per_stage(adam)):
        assert_same(fpipe.optim.gather(fpipe.optim.place(state, params, tx)), state, 0)
    for tx in (sgd, fpipe.optim.per_stage(sgd)):
        with raises(
            ValueError,
            f"{CALL}state[0].count: {OTHER} 0{FIX}",
        ):
            fpipe.optim.place(state, params, tx)
    with raises(
        ValueError,
        f"{CALL}state[0].mu[0]['b']: {OTHER} 1{FIX}",
    ):
        fpipe.optim.place(
            state, params, fpipe.optim.per_stage(adam, frozen=lambda path, leaf: True)
        )
    longer = fpipe.Pipe([dense()] * 3, [1, 2], chunks=2, executor=executor).init(
        jax.random.key(0), x
    )
    with raises(
        ValueError,
        f"{CALL}state[0].mu[2]['b']: {OTHER} 13{FIX}",
    ):
        fpipe.optim.place(state, longer, adam)
    wider = fpipe.Pipe([dense(6), dense()], [1, 1], chunks=2, executor=executor).init(
        jax.random.key(0), x
    )
    with raises(
        ValueError,
        f"{CALL}state[0].mu[0]['b'] has the shape (4,), and `init(params)` gives (6,): "
        f"a state of other parameters{FIX}",
    ):
        fpipe.optim.place(state, wider, adam)
    with raises(
        TypeError,
        f"{CALL}an optax.GradientTransformation, such as `optax.adam(1e-3)`, got 0.1",
    ):
        fpipe.optim.place(state, params, 0.1)


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_a_checkpoint_of_a_model_of_another_width(executor, tmp_path):
    """Orbax does not look at shapes where numpy arrays are asked for."""
    x, tx = jnp.zeros((4, WIDTH)), fpipe.optim.per_stage(optax.adam(1e-2))
    with ocp.CheckpointManager(tmp_path) as manager:
        for width in (4, 6):
            pipe = fpipe.Pipe(
                [dense(width), dense()], [1, 1], chunks=2, executor=executor
            )
            params = pipe.init(jax.random.key(0), x)
            tree = canonical(
                pipe, (params, None, tx.init(params), jax.random.key(0), 0)
            )
            if width == 4:
                manager.save(0, args=ocp.args.StandardSave(tree))
                manager.wait_until_finished()
        saved = manager.restore(0, args=ocp.args.StandardRestore(tree))
    with pytest.raises(
        ValueError,
        match=r"state\[0\].mu\[0\]\['b'\] has the shape \(4,\), and .* gives \(6,\)",
    ):
        fpipe.optim.place(saved["moments"], params, tx)


def test_orbax_refuses_another_structure(tmp_path):
    pipe = pipe_of("placed")
    now = start(pipe)
    like = canonical(pipe, now)
    with ocp.CheckpointManager(tmp_path) as manager:
        save(manager, pipe, now)
        for part, other in (
            ("moments", optax.sgd(1e-2).init(like["params"])),
            ("params", like["params"][:-1]),
        ):
            with pytest.raises(
                ValueError, match=rf"(?sm)tree structures do not match.*^{part}"
            ):
                manager.restore(0, args=ocp.args.StandardRestore({**like, part: other}))


# --- packed ---

# Rows of both partitions have one first array and one shape: `[2]['w']` is on the
# second device, or on the third.
ALIKE = ([1, 2, 1], [1, 1, 2])
SIZES: Any = (10, 10, 5, 10)


def alike(balance, executor="scan"):
    """A pipe of four layers, the parameters, and a state that is made for them."""
    layers = [fpipe.Layer(lambda p, x: x * p["w"].sum())] * len(SIZES)
    pipe = fpipe.Pipe(layers, balance, executor=executor)
    whole = tuple({"w": jnp.arange(n, dtype=jnp.float32) + n} for n in SIZES)
    params = pipe.place(whole)
    return pipe, params, momentum().init(params)


def momentum():
    return fpipe.optim.per_stage(
        optax.sgd(0.1, momentum=0.9), frozen=lambda path, leaf: path.startswith("1/")
    )


def test_orbax_takes_rows_of_the_same_partition_alone(tmp_path):
    """Not those of another one in silence, where their names and shapes are equal."""
    saver = ocp.StandardCheckpointer()
    trees = {}
    for n, balance in enumerate(ALIKE):
        _, params, moments = alike(balance)
        moments = jax.tree.map(lambda a, n=n: a + n + 1, moments)
        trees[n] = {"params": params, "moments": moments}
        saver.save(tmp_path / str(n), trees[n])
        saver.wait_until_finished()
        assert_same(saver.restore(tmp_path / str(n), trees[n]), trees[n], 0)
    assert [a.shape for a in jax.tree.leaves(trees[0])] == [
        a.shape for a in jax.tree.leaves(trees[1])
    ]
    for n, other in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match=r"params.2\['w'\] \(3 devices, \w{8}\)"):
            saver.restore(tmp_path / str(n), trees[other])
    saver.close()


@pytest.mark.parametrize("before", ALIKE, ids=str)
def test_flax_saves_packed_trees_by_layer(before):
    """Into another partition, the other executor and the plain composition."""
    pipe, params, moments = alike(before)
    moments = jax.tree.map(jnp.cos, moments)
    saved = serialization.to_bytes({"params": params, "moments": moments})
    plain = {"params": pipe.gather(params), "moments": fpipe.optim.gather(moments)}
    assert_same(serialization.from_bytes(plain, saved), jax.device_get(plain), 0)
    for balance, executor in ((ALIKE[0], "scan"), (ALIKE[1], "scan"), ([4], "placed")):
        other, like, state = alike(balance, executor)
        target = jax.tree.map(jnp.zeros_like, {"params": like, "moments": state})
        got = serialization.from_bytes(target, saved)
        if executor == "placed":  # where Flax returns the host's arrays
            got["params"] = other.place(got["params"])
            got["moments"] = fpipe.optim.place(got["moments"], like)
        assert jax.tree.structure(got) == jax.tree.structure(target)
        assert_same(other.gather(got["params"]), plain["params"], 0)
        assert_same(fpipe.optim.gather(got["moments"]), plain["moments"], 0)
        for a, b in zip(*map(jax.tree.leaves, (got, target)), strict=True):
            assert isinstance(a, np.ndarray) or a.sharding == b.sharding
    # A target of shapes, as `jax.eval_shape` makes one, gives the host's arrays.
    shapes = jax.eval_shape(lambda tree: tree, params)
    got = serialization.from_state_dict(shapes, serialization.to_state_dict(params))
    assert_same(got, jax.device_get(params), 0)


def test_a_train_state_goes_through_flax(uninterrupted):
    """Under another partition it is the state that it was, dtypes and frozen too."""
    one, other = pipe_of("scan"), pipe_of("scan on other devices")
    states = []
    for pipe in (one, other):
        params, _, moments, _, _ = start(pipe)
        states.append(TrainState(0, pipe, params, transformation(), opt_state=moments))
    saved = serialization.to_bytes(states[0].replace(step=3))
    got: Any = serialization.from_bytes(states[1].replace(step=0), saved)
    assert got.step == 3
    assert_same(other.gather(got.params), one.gather(states[0].params), 0)
    want = fpipe.optim.gather(states[0].opt_state)
    assert_same(fpipe.optim.gather(got.opt_state), want, 0)


def test_what_flax_restores_is_of_the_same_model():
    _, params, _ = alike(ALIKE[0])
    state = serialization.to_state_dict(params)
    call = "`flax.serialization.from_state_dict(...)`: at ./params: "
    for wrong, message in (
        (
            {**state, "1": {"w": np.zeros(5, np.float32)}},
            "[1]['w'] is float32[5], and the target has the shape (10,) there; it is "
            "a state of another model",
        ),
        (
            {**state, "2": {"w": np.zeros(5, np.float16)}},
            "[2]['w'] is float16[5], and the target has float32 there: cast what is "
            "restored, or give a target of its dtype",
        ),
        (
            np.zeros(3),
            "an fpipe.Packed is restored from a state dict with one entry per layer, "
            "got a ndarray",
        ),
    ):
        with raises(ValueError, f"{call}{message}"):
            serialization.from_state_dict({"params": params}, {"params": wrong})
    with pytest.raises(ValueError, match=r"got 4 and 3 at path \./params"):
        serialization.from_state_dict(
            {"params": params}, {"params": {k: state[k] for k in "012"}}
        )


# --- several processes ---


def main():
    """One of two processes: two more steps from what is there, saved."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--coordinator")
    parser.add_argument("--process", type=int)
    parser.add_argument("folder", type=pathlib.Path)
    args = parser.parse_args()
    faulthandler.dump_traceback_later(HANG - 60)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(args.coordinator, 2, args.process)
    pipe = fpipe.Pipe(LAYERS, [4, 3], jax.devices(), chunks=4, executor="scan")
    with ocp.CheckpointManager(args.folder) as manager:
        save(manager, pipe, train(pipe, load(manager, pipe)))


def test_two_processes_load_and_save(uninterrupted, tmp_path):
    (pipe, half), folder = trained("placed"), tmp_path / "run"
    with ocp.CheckpointManager(folder) as manager:
        save(manager, pipe, half)
    with Workers("tests.front.test_checkpoints", 2, tmp_path, str(folder)) as workers:
        workers.all_lines()
    with ocp.CheckpointManager(folder) as manager:
        loaded = load(manager, pipe)
    assert_same(canonical(pipe, loaded), uninterrupted[1], 1e-4)
