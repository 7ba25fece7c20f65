"""What Flax's annotations say of how parameters are cut over the mesh of a stage."""

import dataclasses
import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.linen.spmd import logical_to_mesh
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import fpipe
import fpipe.flax
from tests.helpers import assert_same, mse, noise, raises

MODEL = Mesh(np.array(jax.devices()).reshape(2, 2).T, ("model", "stage"))
WIDTH, HIDDEN = 4, 8
COLUMNS, ROWS = (None, "model"), ("model", None)
BOTH = Counter({P(): 4, P(None, "model"): 2, P("model"): 2})
"""How the arrays of two blocks lie."""

KEY = jax.random.key(0)
X = noise(KEY, (4, WIDTH))


def kernel(key, shape, dtype=jnp.float32):
    return noise(key, shape).astype(dtype)


class Block(nn.Module):
    """A perceptron with Megatron's sharding."""

    annotate: Any = nn.with_partitioning
    columns: Any = COLUMNS
    rows: Any = ROWS
    names_axes: bool = False
    normed: bool = False

    @nn.compact
    def __call__(self, x):
        columns = self.annotate(kernel, self.columns)
        rows = self.annotate(kernel, self.rows)
        h = nn.Dense(HIDDEN, kernel_init=columns)(x)
        if self.names_axes:
            h = jax.lax.with_sharding_constraint(h, P(*COLUMNS))
        if self.normed:
            h = nn.BatchNorm(use_running_average=False)(h)
        return x + nn.Dense(WIDTH, kernel_init=rows)(jnp.tanh(h))


class Net(nn.Module):
    block: Any = Block

    @nn.compact
    def __call__(self, x):
        return self.block()(self.block()(x))


class Stack(nn.Module):
    """Two blocks whose parameters are stacked."""

    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            lambda block, h, _: (block(h), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: None},
        )
        return blocks(Block(), x, None)[0]


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        columns = nnx.with_partitioning(kernel, COLUMNS)
        rows = nnx.with_partitioning(kernel, ROWS)
        self.up = nnx.Linear(WIDTH, HIDDEN, kernel_init=columns, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, kernel_init=rows, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


def specs_in(tree):
    return Counter(a.sharding.spec for a in jax.tree.leaves(tree))


@pytest.mark.parametrize("module", [Block(), NNXBlock])
def test_layers_lie_as_their_modules_say(module):
    layers = [fpipe.flax.layer(module)] * 2
    pipe = fpipe.Pipe(layers, mesh=MODEL, chunks=2)
    params = pipe.init(KEY, X)
    got = pipe.value_and_grad(mse)(params, X, X)
    assert specs_in(params) == specs_in(got[1]) == BOTH
    want = fpipe.sequential(layers, chunks=2).value_and_grad(mse)
    assert_same(got, want(pipe.gather(params), X, X))
    # Packed arrays have those of both blocks.
    packed = dataclasses.replace(pipe, executor="scan").init(KEY, X)
    assert specs_in(packed) == {P("stage", *spec): n // 2 for spec, n in BOTH.items()}


def linen_loss(model, params, x):
    return mse(model.apply({"params": params}, x), x)


def test_a_function_of_linen_parameters():
    for model in (Net(), Stack()):
        params = model.init(KEY, X)["params"]
        loss_fn = functools.partial(linen_loss, model)
        step = fpipe.value_and_grad(loss_fn, mesh=MODEL, chunks=2, stages=2)
        placed = step.place(params, X)
        loss, grads = step(placed, X)
        specs = specs_in(grads)
        if isinstance(model, Stack):
            specs = Counter({P(*spec[1:]): n for spec, n in specs.items()})
        assert specs == BOTH
        assert jax.tree.structure(step.gather(grads)) == jax.tree.structure(params)
        assert_same((loss, step.gather(grads)), jax.value_and_grad(loss_fn)(params, X))


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_what_makes_parameters_sees_no_mesh_unless_it_asks_for_one(executor):
    model, options = Net(), {"mesh": MODEL, "chunks": 2, "executor": executor}
    annotated = model.init(KEY, X)["params"]
    want = nn.unbox(annotated)

    def step(model=model, **also):
        # In `unbox` Flax fixes how an array lies, over the mesh of the context.
        def init(key):
            return nn.unbox(model.init(key, X)["params"])

        also = {"stages": 2, "init": init} | options | also
        return fpipe.value_and_grad(functools.partial(linen_loss, model), **also)

    spec = nn.get_partition_spec(annotated)
    steps = [step(specs=specs) for specs in (spec, None)]
    # It runs the call of the module too, which names axes.
    steps.append(step(Net(functools.partial(Block, names_axes=True))))
    if executor == "placed":
        # The meshes of two stages have other numbers of devices.
        devices = [Mesh(MODEL.devices[:, 0], "model"), MODEL.devices[0, 1]]
        steps.append(step(mesh=None, devices=devices))
    for own in steps:
        assert_same(own.gather(own.init(KEY, X)), want)
    # The `init` of a module runs its call, which may name axes; one layer is not cut.
    blocks = Block(normed=True), Block(lambda f, _: f, normed=True)
    layer = functools.partial(fpipe.flax.layer, state=["batch_stats"])
    plain = fpipe.sequential(list(map(layer, blocks)), chunks=2)
    named = [layer(block.clone(names_axes=True)) for block in blocks]
    pipe = fpipe.Pipe(named, **options)
    assert_same(nn.unbox(pipe.gather(pipe.init(KEY, X))), nn.unbox(plain.init(KEY, X)))
    assert_same(pipe.gather_state(pipe.init_state(X)), plain.init_state(X))


def test_a_function_of_nnx_variables():
    with nnx.use_eager_sharding(False):
        blocks = nnx.List([NNXBlock(nnx.Rngs(seed)) for seed in (0, 1)])
    graph, state = nnx.split(blocks)

    def loss_fn(state, x):
        h = x
        for block in nnx.merge(graph, state):
            h = block(h)
        return mse(h, x)

    step = fpipe.value_and_grad(loss_fn, mesh=MODEL, chunks=2, stages=2)
    placed = step.place(state, X)
    loss, grads = step(placed, X)
    assert specs_in(placed) == specs_in(grads) == BOTH
    assert_same((loss, step.gather(grads)), jax.value_and_grad(loss_fn)(state, X))

    # Flax asks an `init` for a mesh, and needs none of the caller's.
    def init(key):
        return nnx.state(nnx.List([NNXBlock(nnx.Rngs(key)) for _ in blocks]))

    step = fpipe.value_and_grad(loss_fn, mesh=MODEL, chunks=2, stages=2, init=init)
    made = step.init(KEY, X)
    with jax.set_mesh(Mesh(MODEL.devices[:, 0], "model")):
        want = init(KEY)
    assert specs_in(made) == BOTH
    assert_same(step.gather(made), want)


def test_logical_names_are_translated_by_flax():
    block = functools.partial(
        Block,
        annotate=nn.with_logical_partitioning,
        columns=("embed", "hidden"),
        rows=("hidden", "embed"),
    )
    model = Net(block)
    params = model.init(KEY, X)["params"]
    loss_fn = functools.partial(linen_loss, model)
    with raises(
        ValueError,
        f"`fpipe.split(specs=...)`: the spec {P('embed', 'hidden')} of "
        "'Block_1/Dense_0/kernel/value' names the axis 'embed', but the mesh of its "
        "stage has ('model',)",
    ):
        step = fpipe.value_and_grad(loss_fn, mesh=MODEL, chunks=2, stages=2)
        step.place(params, X)
    rules = [("embed", None), ("hidden", "model")]
    specs = logical_to_mesh(nn.get_partition_spec(params), rules)
    step = fpipe.value_and_grad(loss_fn, mesh=MODEL, chunks=2, stages=2, specs=specs)
    assert specs_in(step.place(params, X)) == BOTH
    # By the rules around the call, or, which goes before them, those of the module.
    step = fpipe.value_and_grad(loss_fn, mesh=MODEL, chunks=2, stages=2)
    with nn.logical_axis_rules(rules):
        placed = step.place(params, X)
    assert specs_in(placed) == BOTH
    loss, grads = step(placed, X)
    assert specs_in(grads) == BOTH
    assert_same((loss, step.gather(grads)), jax.value_and_grad(loss_fn)(params, X))
    ruled = fpipe.flax.layer(
        block(annotate=functools.partial(nn.with_logical_partitioning, rules=rules))
    )
    pipe = fpipe.Pipe([ruled] * 2, mesh=MODEL, chunks=2)
    with nn.logical_axis_rules([("hidden", None)]):
        assert specs_in(pipe.init(KEY, X)) == BOTH
