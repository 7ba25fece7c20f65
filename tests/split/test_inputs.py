"""Inputs of the model and its key go from the call to the pieces that read them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import fpipe
from tests.helpers import assert_same
from tests.split.models import weights

EXECUTORS = ("placed", "scan")
W = 3


def model(params, x, *, side=None):
    """The loss of each row. The first array of `x` is not for the first piece."""
    h = jnp.tanh(x["image"] @ params["a"])
    h = fpipe.cut(h)
    h = jnp.tanh(h @ params["b"]) * x["scale"]
    h = fpipe.cut(h)
    h = h @ params["c"] + x["image"]
    hit = jnp.take_along_axis(h, x["label"][:, None], 1)[:, 0]
    weight = 1.0 if side is None else side
    return {"loss": ((h - x["target"].T) ** 2).mean(1) - hit, "weight": weight * hit}


def params_of():
    return {name: weights(W, W, seed=n) for n, name in enumerate("abc")}


def batch_of(rows):
    return {
        "image": weights(rows, W, seed=4),
        "label": jnp.arange(rows) % W,
        "scale": fpipe.NoChunk(jnp.float32(1.5)),
        "target": fpipe.Chunk(weights(W, rows, seed=5), axis=1),
    }


def split_of(**needs: Any):
    return fpipe.split(model, params_of(), batch_of(2), **needs)


def loss(y):
    return jnp.mean(y["loss"]) + jnp.mean(jnp.sin(y["weight"]))


def pipe_of(layers, executor="placed", **options):
    options = {"chunks": 3, "devices": jax.devices()[:3]} | options
    return fpipe.Pipe(layers, executor=executor, **options)


def of_function(split, x, **needs: Any):
    """Loss and gradients of parameters and of `x`, of the function in one piece."""
    whole = fpipe.sequential([split.function], chunks=3)
    step = whole.value_and_grad(loss, argnums=(0, 1))
    run = jax.jit(lambda params: step((params,), x, **needs))
    value, ((grads,), of_x) = run(params_of())
    return value, grads, of_x


@pytest.mark.quick
def test_what_goes_straight():
    """What pieces after the first one read, but no floats that the first one reads
    too; of the plain layers nothing does.
    """
    split = split_of()
    # The first piece looks at all that the call gives, to know the trace.
    assert [layer.needs for layer in split.layers] == [
        ("carry", "side"),
        (),
        ("carry",),
    ]
    first, second, last = split.layers_in(None)
    assert [first.needs, second.needs, last.needs] == [
        ("carry", "side"),
        ("side",),
        ("carry", "side"),
    ]
    trace = split.cut.trace(split.cut.first)
    image, label, scale, target = trace.traced.x
    assert trace.straight == {1, 2, 3}
    assert [own.given for own in trace.pieces] == [(image,), (scale,), (label, target)]
    assert trace.stashes == ((image,), (), ())


@functools.cache
def wanted(rows, sided):
    needs = {"side": weights(rows, seed=6)} if sided else {}
    own = {"side": weights(2, seed=6)} if sided else {}
    split = split_of(**own)
    return split, needs, of_function(split, batch_of(rows), **needs)


@pytest.mark.parametrize("rows", [6, 7], ids=["even", "ragged"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_gradients_of_inputs(executor, rows):
    """By `value_and_grad` and from outside, whole and ragged, with wrappers."""
    split, needs, (value, grads, of_x) = wanted(rows, rows == 6)
    x = batch_of(rows)
    pipe = pipe_of(split, executor)
    params = pipe.place(params_of())
    got, (own, got_x) = pipe.value_and_grad(loss, argnums=(0, 1))(params, x, **needs)
    assert_same(jax.device_get(got), jax.device_get(value))
    assert_same(jax.device_get(pipe.gather(own)), jax.device_get(grads))
    assert_same(jax.device_get(got_x), jax.device_get(of_x))
    outside = jax.grad(lambda x: loss(pipe(params, x, **needs)), allow_int=True)(x)
    if rows == 6:
        # The mean over rows is the mean of that of microbatches.
        assert_same(jax.device_get(outside), jax.device_get(of_x))


def test_the_first_array_may_be_for_a_later_piece():
    """By its rows a mean is weighed, and its gradient is there."""

    def fn(params, x):
        h = fpipe.cut(x["b"] @ params["w"])
        return ((h @ params["v"] - x["a"]) ** 2).mean(1)

    params = {"w": weights(W, W), "v": weights(W, W, seed=1)}
    pieces = [{"a": weights(n, W, seed=n), "b": weights(n, W)} for n in (2, 3)]
    x = fpipe.Microbatches(pieces)
    split = fpipe.split(fn, params, pieces[0])
    whole = fpipe.sequential([split.function])
    step = whole.value_and_grad(jnp.mean, argnums=(1, 0))
    value, (of_x, (grads,)) = step((params,), x)
    for executor in EXECUTORS:
        pipe = fpipe.Pipe(split, devices=jax.devices()[:2], executor=executor)
        placed = pipe.place(params)
        step = pipe.value_and_grad(jnp.mean, argnums=(1, 0))
        got, (got_x, own) = step(placed, x)
        assert_same(jax.device_get(got), jax.device_get(value))
        assert_same(jax.device_get(got_x), jax.device_get(of_x))
        assert_same(jax.device_get(pipe.gather(own)), jax.device_get(grads))
        inputs = [row.name for row in pipe.plan(None, pieces[0]).inputs]
        assert inputs == ["x['a']", "x['b']"]


def test_errors_name_inputs_as_the_user_has_them():
    split = split_of()
    pipe = pipe_of(split)
    params, x = pipe.place(params_of()), batch_of(6)
    with pytest.raises(ValueError, match=r"`x\['label'\]` of shape \(4,\) has 4 rows"):
        pipe(params, x | {"label": jnp.arange(4)})
    with pytest.raises(ValueError, match="`side=` was given, but no layer asks"):
        pipe_of(fpipe.split(plain_model, params_of(), batch_of(2)))(
            params, x, side=x["image"]
        )
    # And again, when the others are known.
    pipe(params, x)
    with pytest.raises(ValueError, match=r"`x\['label'\]` of shape \(4,\) has 4 rows"):
        pipe(params, x | {"label": jnp.arange(4)})
    with pytest.raises(TypeError, match=r"x\['label'\]"):
        pipe(params, x | {"label": object()})


def plain_model(params, x):
    return model(params, x)


def test_whoever_plans_takes_the_functions_own_inputs():
    split, x = split_of(side=weights(2)), batch_of(6)
    side = weights(6)
    costs = fpipe.layer_costs(split, x, side=side, chunks=3)
    assert len(costs.forward) == 3
    pipe = fpipe.Pipe(split, "flops", jax.devices()[:2], 3, sample=x, sample_side=side)
    assert sum(pipe.balance) == 3
    plan = pipe.plan(None, x, loss_fn=loss, side=side, argnums=(0, 1))
    names = ["x['image']", "side", "x['label']", "x['scale']", "x['target']"]
    assert [row.name for row in plan.inputs] == names
    found = fpipe.tune(
        split,
        x,
        loss_fn=loss,
        side=side,
        devices=jax.devices()[:2],
        chunks=3,
        schedules="1f1b",
        checkpoints="never",
    )
    assert found.pipe.layers == split


def test_a_value_that_is_static_is_another_way():
    """Of `{"mode": "label"}` the last piece reads another array than it was split for;
    of both the layers know.
    """

    def fn(params, batch):
        h = fpipe.cut(jnp.tanh(batch["x"] @ params["a"]))
        other = batch["p"] if batch["mode"] == "p" else batch["q"]
        return jnp.mean((h @ params["b"] - other) ** 2)

    step = fpipe.value_and_grad(fn, devices=jax.devices()[:2], chunks=2)
    params = {"a": weights(W, W), "b": weights(W, W, seed=1)}
    x, p, q = (weights(4, W, seed=n) for n in range(3))
    batches = [{"x": x, "p": p, "q": q, "mode": mode} for mode in "pq"]
    placed = step.place(params, batches[0])
    for batch in batches:
        value, grads = step(placed, batch)
        want = jax.value_and_grad(fn)(params, batch)
        assert_same(jax.device_get(value), jax.device_get(want[0]))
        assert_same(jax.device_get(step.gather(grads)), jax.device_get(want[1]))


# --- the key ---


def noisy(params, x, *, key):
    """Draws from the key itself, and from keys that are made of it."""
    own = jax.random.fold_in(key, 1)
    h = fpipe.cut(jnp.tanh(x @ params["a"]) + jax.random.uniform(own, x.shape))
    h = jnp.tanh(h @ params["b"]) + jax.random.uniform(own, x.shape)
    h = fpipe.cut(h * jax.random.uniform(key, x.shape))
    return h @ params["c"] + jax.random.uniform(key, x.shape)


def test_masks_are_the_same_for_every_cut():
    """The key goes to the pieces that draw from it; what is made of it is made once,
    in the first piece, and sent.
    """
    params, x, key = params_of(), weights(6, W), jax.random.key(3)
    keys = [jax.random.fold_in(jax.random.fold_in(key, 0), i) for i in range(3)]
    pieces = [noisy(params, x[2 * i : 2 * i + 2], key=k) for i, k in enumerate(keys)]
    want = jax.device_get(jnp.concatenate(pieces))
    cut = functools.partial(fpipe.split, noisy, params, x[:2], key=key)
    split = cut()
    trace = split.cut.trace(split.cut.first)
    assert all("key" in own.needs for own in trace.pieces)
    (made,) = trace.stashes[0]
    assert trace.traced.graph.maker[made].name == "random_fold_in"
    other = cut(cuts=["c"])
    for one, executor in ((split, "placed"), (split, "scan"), (other, "placed")):
        pipe = pipe_of(one, executor, devices=jax.devices()[: len(one)])
        assert_same(jax.device_get(pipe(pipe.place(params), x, key=key)), want)


def test_a_fault_in_an_input_that_goes_straight():
    pipe = pipe_of(split_of(), detect_anomaly=True)
    params, x = pipe.place(params_of()), batch_of(6)
    bad = x | {"target": fpipe.Chunk(x["target"].value.at[0, 3].set(jnp.nan), 1)}
    step = pipe.value_and_grad(loss, argnums=(0, 1))
    text = r"stage 2, .* microbatch 1, .* what the call gives it, of `x` or"
    with pytest.raises(FloatingPointError, match=text):
        step(params, bad)
    _, (_, of_x) = step(params, x)
    assert jax.tree.map(jnp.shape, of_x) == jax.tree.map(jnp.shape, x)
