"""`specs=`: how a function's own parameters are cut over the meshes of its stages."""

import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import fpipe
from tests.helpers import assert_same, noise, raises

DEVICES = np.array(jax.devices())
MODEL = Mesh(DEVICES.reshape(2, 2).T, ("model", "stage"))
WIDTH, HIDDEN = 4, 8


def loss_fn(params, x, y):
    def block(h, w):
        return h + jnp.tanh(h @ w["up"]) @ w["down"], None

    h, _ = jax.lax.scan(block, x, params["blocks"])
    return jnp.mean((h @ params["out"]["w"] + params["out"]["b"] - y) ** 2)


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


KEY = jax.random.key(0)
PARAMS: Any = {
    "blocks": {
        "up": noise(KEY, (2, WIDTH, HIDDEN)),
        "down": noise(KEY, (2, HIDDEN, WIDTH)),
    },
    "out": {"w": noise(KEY, (WIDTH, 2)), "b": jnp.ones(2)},
    "unused": None,
}
COLUMNS, ROWS = P(None, None, "model"), P(None, "model")
SPECS: Any = {
    "blocks": {"up": COLUMNS, "down": ROWS},
    "out": P("model"),
    "unused": None,
}
X, Y = noise(KEY, (4, WIDTH)), noise(KEY, (4, 2))


@functools.cache
def step_of(placed_by):
    specs = SPECS if placed_by == "specs" else None
    return fpipe.value_and_grad(loss_fn, mesh=MODEL, chunks=2, specs=specs)


def arrays_over_the_mesh():
    """The parameters as their arrays' own shardings have them."""
    specs = SPECS | {"out": {"w": P("model"), "b": P("model")}}
    return jax.tree.map(
        lambda spec, a: jax.device_put(a, NamedSharding(MODEL, spec)), specs, PARAMS
    )


@pytest.mark.parametrize("placed_by", ["specs", "arrays"])
def test_parameters_and_gradients_lie_as_they_are_told(placed_by):
    step = step_of(placed_by)
    params = PARAMS if placed_by == "specs" else arrays_over_the_mesh()
    placed = step.place(params, X, Y)
    loss, grads = step(placed, X, Y)
    for tree in (placed, grads):
        specs = jax.tree.map(lambda a: a.sharding.spec, tree)
        assert specs["blocks"]["up"].blocks == (COLUMNS, COLUMNS)
        assert specs["blocks"]["down"].blocks == (ROWS, ROWS)
        assert specs["out"] == {"w": P("model"), "b": P("model")}
    homes = jax.tree.map(lambda a: a.sharding.device_set, placed)
    assert homes["blocks"]["up"].blocks == (
        {*DEVICES[:2]},
        {*DEVICES[2:]},
    )
    want = jax.value_and_grad(loss_fn)(PARAMS, X, Y)
    assert_same((loss, step.gather(grads)), want)
    assert_same(step.gather(placed), PARAMS)


def test_packed_parameters_lie_as_they_are_told():
    step = fpipe.value_and_grad(
        loss_fn, mesh=MODEL, chunks=2, specs=SPECS, executor="scan"
    )
    placed = step.place(PARAMS, X, Y)
    loss, grads = step(placed, X, Y)
    for packed in (placed, grads):
        specs = [P(*a.sharding.spec[1:]) for a in packed.arrays]
        assert sorted(map(str, specs)) == sorted(
            map(str, [COLUMNS, ROWS, P("model"), P("model")])
        )
    want = jax.value_and_grad(loss_fn)(PARAMS, X, Y)
    assert_same((loss, step.gather(grads)), want)
    assert_same(step.gather(placed), PARAMS)


def test_what_a_function_says_of_a_parameter_is_no_equation():
    """Flax constrains annotated parameters wherever they are used, also in loops. That
    would cut again what has been gathered for a program.
    """

    def loss_fn(params, x):
        def layer(h, w):
            w = jax.lax.with_sharding_constraint(w, P("model"))
            return jnp.tanh(h @ w), None

        h, _ = jax.lax.scan(layer, x, params["blocks"])
        # A constraint of other values is one.
        h = jax.lax.with_sharding_constraint(h, P(None, "model"))
        out = jax.lax.with_sharding_constraint(params["out"], P("model"))
        return jnp.mean(h @ out)

    params = {
        "blocks": noise(KEY, (2, WIDTH, WIDTH)),
        "out": noise(KEY, (WIDTH, 2)),
    }
    step = fpipe.value_and_grad(loss_fn, mesh=MODEL, chunks=2)
    step.place(params, X)
    (trace,) = step.split.cut._traces.values()
    names = [node.name for node in trace.traced.graph.nodes]
    assert names.count("sharding_constraint") == 1


def test_one_spec_says_it_of_all():
    params = {"a": noise(KEY, (WIDTH, WIDTH)), "b": noise(KEY, (WIDTH, WIDTH))}
    split = fpipe.split(mlp, params, X, cuts=["b"], specs=P(None, "model"))
    assert [layer.spec for layer in split] == [(P(None, "model"),)] * 2
    again = pickle.loads(pickle.dumps(split))
    assert [layer.spec for layer in again] == [(P(None, "model"),)] * 2
    whole = fpipe.split(mlp, params, X, cuts=["b"])
    assert [layer.spec for layer in whole] == [None] * 2
    # Where a stage is on one device nobody looks at them.
    pipe = fpipe.Pipe(split, devices=DEVICES[:2], chunks=2)
    assert_same(pipe(pipe.place(params), X), mlp(params, X))


def test_specs_that_do_not_fit_are_refused():
    def place(specs, mesh=MODEL):
        step = fpipe.value_and_grad(loss_fn, chunks=2, specs=specs, mesh=mesh)
        return step.place(PARAMS, X, Y)

    shapes = (
        "{'blocks': {'down': float32[2,8,4], 'up': float32[2,4,8]}, 'out': {'b': "
        "float32[2], 'w': float32[4,2]}, 'unused': None}"
    )
    with raises(
        ValueError,
        "`fpipe.split(specs=...)`: they have another form than the parameters, "
        f"{shapes}; write `None` for an array without a spec",
    ):
        place({"blocks": COLUMNS})
    with raises(
        TypeError,
        "`fpipe.split(specs=...)`: 'model' is no jax.sharding.PartitionSpec",
    ):
        place("model")
    with raises(
        ValueError,
        f"`fpipe.split(specs=...)`: the spec {P('model', 'data')} of 'blocks/down' "
        "cuts axis 0, on which layers are stacked, and these belong to "
        f"several stages: write {P(None, 'data')}",
    ):
        place(SPECS | {"blocks": P("model", "data")})
    with raises(
        ValueError,
        f"`fpipe.split(specs=...)`: the spec {P('columns')} of 'out/w' names the axis "
        "'columns', but the mesh of its stage has ('model',)",
    ):
        place(SPECS | {"out": P("columns")})
    three = Mesh(DEVICES[:3].reshape(1, 3), ("stage", "model"))
    with raises(
        ValueError,
        f"`fpipe.split(specs=...)`: the spec {ROWS} of 'blocks/down' does not "
        "divide its shape (1, 8, 4) over the mesh {'model': 3}",
    ):
        place(SPECS, mesh=three)
