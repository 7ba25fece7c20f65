"""Whoever takes trees of parameters gets the function's own one: optimizers, training
states, modules and checkpoints, under both executors.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState

import fpipe
import fpipe.flax
import fpipe.optim
from tests.helpers import assert_same
from tests.split.models import loss, residual_mlp, weights

EXECUTORS = ("placed", "scan")


pytestmark = pytest.mark.usefixtures("promotion")


def placed_step(executor):
    """A pipe of a small function, its parameters there, and a step's gradients."""
    example = residual_mlp()
    devices = jax.devices()[:2]
    pipe = fpipe.Pipe(example.split(), devices=devices, chunks=3, executor=executor)
    placed = pipe.place(example.params)
    _, grads = pipe.value_and_grad(loss)(placed, example.x)
    return pipe, example.params, placed, grads


@pytest.mark.parametrize("executor", EXECUTORS)
def test_optimizers_see_the_functions_own_leaves_and_paths(executor):
    """Labels by path, what looks at whole leaves, and what looks at all of them."""
    pipe, params, placed, grads = placed_step(executor)
    labels = {"in": "large", "blocks": [{"w": "large", "b": "small"}, "factored"]}

    def blocks(tree):
        names = jax.tree_util.tree_map_with_path
        return names(lambda path, _: path[0].key == "blocks", tree)

    own = optax.chain(
        optax.adaptive_grad_clip(0.1),
        optax.clip_by_global_norm(0.5),
        optax.masked(optax.add_decayed_weights(0.1), blocks),
        optax.multi_transform(
            {
                "large": optax.lamb(0.1),
                "small": optax.sgd(0.1, 0.9),
                "factored": optax.adafactor(0.1, min_dim_size_to_factor=2),
            },
            labels,
        ),
    )
    tx = fpipe.optim.per_stage(own)
    state = tx.init(placed)
    updates, new = tx.update(grads, state, placed)
    want_state = own.init(params)
    want, want_new = jax.jit(own.update)(pipe.gather(grads), want_state, params)
    assert_same(pipe.gather(updates), want)
    # A state of plain optax on the function's tree, and back.
    gathered = fpipe.optim.gather(new)
    assert_same(gathered, want_new)
    again = fpipe.optim.place(gathered, placed, tx)
    assert jax.tree.structure(again) == jax.tree.structure(new)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_training_states_and_what_is_saved_of_them(executor):
    """What a pipe saves the plain function loads, and the other way round."""
    pipe, params, placed, grads = placed_step(executor)
    frozen: Any = {"in": True, "blocks": False}
    tx = fpipe.optim.per_stage(optax.sgd(0.1), frozen=frozen)
    state = TrainState.create(apply_fn=pipe, params=placed, tx=tx)
    state = state.apply_gradients(grads=grads)
    trained = pipe.gather(state.params)
    assert_same(trained["in"], params["in"])
    want = jax.tree.map(lambda p, g: p - 0.1 * g, params, pipe.gather(grads))
    assert_same(trained["blocks"], want["blocks"])
    saved = serialization.to_bytes(state.params)
    assert_same(serialization.from_bytes(params, saved), jax.device_get(trained))
    back = serialization.from_bytes(placed, serialization.to_bytes(params))
    assert_same(jax.device_get(pipe.gather(back)), jax.device_get(params))
    norm = fpipe.optim.map(lambda p: optax.tree.norm(p["blocks"]), placed)
    assert_same(jax.device_get(norm), jax.device_get(optax.tree.norm(params["blocks"])))


def test_checkpoints_of_orbax(tmp_path):
    pipe, params, placed, _ = placed_step("placed")
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, params)
    with ocp.StandardCheckpointer() as files:
        files.save(tmp_path / "of the pipe", placed)
        files.save(tmp_path / "plain", params)
        files.wait_until_finished()
        assert_same(files.restore(tmp_path / "of the pipe", like), params)
        back = files.restore(tmp_path / "plain", placed)
    assert_same(pipe.gather(back), params)
    where = jax.tree.map(lambda a: a.devices(), placed)
    assert jax.tree.map(lambda a: a.devices(), back) == where


class _Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.last = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        h = self.dropout(jax.nn.relu(self.norm(self.first(x))))
        return self.last(h)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_modules_and_optimizers_of_nnx(executor):
    """Parameters are a state of NNX, and so is what a microbatch changes: statistics
    and the counters of random streams.
    """
    model = _Model(nnx.Rngs(0))
    definition, params, rest = nnx.split(model, nnx.Param, ...)
    # A state of NNX shares its variables with the module, which is trained below.
    params = jax.tree.map(jnp.copy, params)

    def fn(params, x, *, state, train=False):
        model = nnx.merge(definition, params, state)
        model.set_attributes(deterministic=not train, use_running_average=not train)
        y = model(x)
        return y, nnx.split(model, nnx.Param, ...)[2]

    x = weights(4, 3)
    split = fpipe.split(fn, params, x[:2], state=rest)
    # Weights and biases of a module stay together, though their paths end in `value`.
    assert [len(owned) for owned in split.cut.wiring.owned] == [1, 2, 2]

    def plain(params):
        state, total = rest, 0.0
        for rows in (x[:2], x[2:]):
            y, state = fn(params, rows, state=jax.lax.stop_gradient(state), train=True)
            total = total + loss(y) / 2
        return total, state

    pipe = fpipe.Pipe(split, devices=jax.devices()[:2], chunks=2, executor=executor)
    placed = pipe.place(params)
    (value, state), grads = pipe.value_and_grad(loss)(placed, x, state=rest, train=True)
    step = jax.jit(jax.value_and_grad(plain, has_aux=True))
    (want, want_state), want_grads = step(params)
    assert_same(value, want)
    assert_same(_numbers(state), _numbers(want_state))
    assert_same(pipe.gather(grads), want_grads)
    own = optax.adam(0.1)
    tx = fpipe.optim.per_stage(own)
    if executor == "placed":
        nnx.update(model, placed)
        nnx.Optimizer(model, tx, wrt=nnx.Param).update(model, grads)
        trained = nnx.state(model, nnx.Param)
    else:
        module = fpipe.flax.Parameters(placed)
        optimizer = nnx.Optimizer(module, module.transformation(tx), wrt=nnx.Param)
        optimizer.update(module, module.gradients(grads))
        trained = module.params
    updates, _ = jax.jit(own.update)(want_grads, own.init(params), params)
    assert_same(pipe.gather(trained), optax.apply_updates(params, updates))


@pytest.mark.quick
def test_a_gathered_state_comes_to_its_parameters():
    """The first array of the state need not be on the first device of the pipe."""

    def loss_fn(params, x):
        return jnp.mean((jnp.tanh(x @ params["z_first"]) @ params["a_last"]) ** 2)

    x = jnp.ones((4, 3))
    devices = jax.devices()[:2]
    step = fpipe.value_and_grad(loss_fn, devices=devices, chunks=2)
    params = step.place({"z_first": jnp.eye(3), "a_last": jnp.ones((3, 2))}, x)
    assert params["a_last"].devices() == {devices[1]}
    adam = optax.adam(1e-2)
    state = fpipe.optim.per_stage(adam).init(params)
    whole = step.gather(params)
    moments = fpipe.optim.gather(state, whole)
    places = {d for a in jax.tree.leaves((whole, moments)) for d in a.devices()}
    assert places == {devices[0]}
    assert_same(moments, adam.init(whole))


def _numbers(state):
    """A state on the host, with numbers for its keys."""
    keys = jax.dtypes.prng_key
    return jax.tree.map(
        lambda a: jax.device_get(
            jax.random.key_data(a) if jnp.issubdtype(a.dtype, keys) else a
        ),
        state,
    )
