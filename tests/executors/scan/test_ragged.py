"""Microbatches of several shapes in one program: the smaller last one of a batch, and
ready-made ones.
"""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import fpipe
from fpipe._executors.scan import feeds
from fpipe._executors.scan.storage import Storage
from tests.executors.helpers import machine_of
from tests.executors.scan.poison import poison
from tests.executors.scan.test_scan import collectives, loop_body, text_of
from tests.helpers import WIDTH, assert_same, dense, mse, noise

KEY = jax.random.key


def rows(seed, *shape):
    return noise(KEY(seed), (*shape, WIDTH))


def pipe_of(layers, chunks, **options):
    return fpipe.Pipe(layers, [1, 1], chunks=chunks, executor="scan", **options)


# --- everything that a layer can need, in two layers ---


@fpipe.skippable(stash=["skip"])
def first(p, x, *, carry, key, state, side, train):
    """Drops some of `x`, and centres it by what earlier microbatches have left."""
    assert train
    h = jnp.where(noise(key, x.shape) < 0.4, x * p["a"], side["whole"])
    y = h - state["mean"] + side["mask"].T
    mean = 0.5 * (state["mean"] + x.mean(0))
    state = {"mean": mean, "count": state["count"] + 1}
    return y, fpipe.stash(carry, "skip", x[:, 0]), state


FIRST = fpipe.Layer(
    first.apply,
    stash=first.stash,
    needs=first.needs,
    name="first",
    init_state=lambda x: {"mean": jnp.zeros(WIDTH), "count": jnp.int32(0)},
    finish=lambda state: {**state, "mean": state["mean"] * 2},
)


@fpipe.skippable(pop=["skip"])
def second(p, x, *, carry, borrowed):
    skip, carry = fpipe.pop(carry, "skip")
    return jnp.tanh(x * p + borrowed["first"]["a"]) + skip[:, None], carry


SECOND = fpipe.Layer(
    second.apply,
    pop=second.pop,
    needs=second.needs,
    name="second",
    borrow=("first",),
)
LAYERS = [FIRST, SECOND]
PARAMS = ({"a": rows(0)}, rows(1))


def call(count):
    """The arguments of a call with so many rows, beside the parameters."""
    side = {"mask": fpipe.Chunk(rows(2, count).T, axis=1), "whole": rows(3)}
    return (rows(4, count), rows(5, count)), {
        "side": side | {"whole": fpipe.NoChunk(side["whole"])},
        "key": KEY(6),
        "state": ({"mean": rows(7), "count": jnp.int32(3)}, None),
        "train": True,
    }


def unequal(y, t):
    """A loss with a weight, with aux of each microbatch and of each row."""
    error = ((y - t) ** 2).mean(1)
    weight = 1 + jnp.arange(y.shape[0], dtype=jnp.float32)
    aux = {"mean": error.mean(), "row": fpipe.PerRow({"error": error})}
    return ((error * weight).sum(), weight.sum()), aux


def unweighted(y, t):
    (total, _), aux = unequal(y, t)
    return total, aux


# 3, 3, 1 rows; 3, 2: one microbatch of each shape; 2, 2, 2, 2, 1.
STEPS = {
    "mean": (7, 3, mse, {"checkpoint": "always"}),
    "weighted": (5, 2, unequal, {"has_aux": True, "schedule": "zb_h1"}),
    "sum": (9, 5, unweighted, {"has_aux": True, "schedule": "gpipe"}),
}


@pytest.mark.parametrize("reduction", STEPS)
def test_a_step_is_that_of_the_plain_composition(monkeypatch, reduction):
    """Gradients of everything, states, keys and aux, with NaN in all that nobody has
    filled.
    """
    count, chunks, loss, options = STEPS[reduction]
    options = dict(options)
    has_aux = options.pop("has_aux", False)
    filled = poison(monkeypatch)
    pipe = pipe_of(LAYERS, chunks, **options)
    given, needs = call(count)

    def run(model, params, grads):
        step = model.value_and_grad(
            loss,
            has_aux=has_aux,
            reduction=reduction,
            argnums=0 if reduction == "mean" else (0, 1, 2),
        )
        return step(params, *given, **needs, grads=grads, loss_scale=64.0)

    # Gradients that are added to are those of the parameters alone.
    old = jax.tree.map(jnp.ones_like, PARAMS) if reduction == "mean" else None
    placed = None if old is None else pipe.place(old)
    value, grads = run(pipe, pipe.place(PARAMS), placed)
    want = run(fpipe.sequential(LAYERS, chunks=chunks), PARAMS, old)
    if old is not None:
        assert_same((value, pipe.gather(grads)), want)
    else:
        assert_same((value, (pipe.gather(grads[0]), *grads[1:])), want)
    assert filled


def test_a_call_and_its_pull_back_are_those_of_the_plain_composition():
    """With outputs on several axes, one of them a mean, inside of `jax.jit`."""

    def head(p, x, *, side):
        y = x * p + side["whole"]
        out = {"y": fpipe.Chunk(y.T, axis=1), "mean": y.mean(), "kind": y.argmax(-1)}
        return out | {"side": side["mask"].T[:, 0] * y[:, 0]}

    layers = [dense(), fpipe.Layer(head)]
    reference = fpipe.sequential(layers, chunks=3)
    pipe = pipe_of(layers, 3)
    (x, t), needs = call(7)
    params = ({"w": rows(0, WIDTH), "b": rows(1)}, rows(2))

    def run(model):
        def f(params, x, side):
            out = model(params, x, side=side)
            t_mean = (out["y"] - t.T) ** 2
            return t_mean.sum() + (out["mean"] ** 3).sum() + out["side"].sum(), out

        return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))

    value, (grads, *others) = run(pipe)(pipe.place(params), x, needs["side"])
    want = run(reference)(params, x, needs["side"])
    assert_same((value, (pipe.gather(grads), *others)), want)
    (_, out), _ = want
    assert out["mean"].shape == (3,)
    got = pipe(pipe.place(params), x, side=needs["side"])
    assert_same(got, out)


def test_rows_of_states_and_what_backwards_make_of_states():
    def cached(p, x, *, state):
        return x * p + state, state + x

    @jax.custom_vjp
    def noting(x, largest):
        return x + 0 * largest

    noting.defvjp(
        lambda x, largest: (noting(x, largest), largest),
        lambda largest, g: (g, jnp.maximum(largest, jnp.abs(g).max())),
    )

    def scaled(p, x, *, state):
        return noting(x * p, state["largest"]), state

    layers = [
        fpipe.Layer(cached, state_rows=True, init_state=jnp.zeros_like),
        fpipe.Layer(
            scaled,
            overwrite=["largest"],
            init_state=lambda x: {"largest": jnp.zeros(())},
        ),
    ]
    state = (rows(0, 7), {"largest": jnp.float32(1e-3)})
    params = (rows(1), rows(2))

    def run(model, params):
        step = model.value_and_grad(mse, reduction="sum")
        return step(params, rows(3, 7), rows(4, 7), state=state)

    pipe = pipe_of(layers, 3)
    value, grads = run(pipe, pipe.place(params))
    want = run(fpipe.sequential(layers, chunks=3), params)
    assert_same((value, pipe.gather(grads)), want)


def test_bfloat16_gradients_are_summed_in_float32_and_cast_once():
    # 1 + 64 · 2⁻⁹ is 1.125; summed in bfloat16 every 2⁻⁹ would be lost beside the 1.
    scale = np.full((2 * 65 - 1, 1), 2.0**-9, np.float32)
    scale[-1] = 1
    layers = [fpipe.Layer(lambda p, x: x * p), fpipe.fn(lambda y: y.max(0))]
    pipe = pipe_of(layers, 65, checkpoint="never")
    params = pipe.place((jnp.ones((1,), jnp.bfloat16), ()))
    x = jnp.asarray(scale, jnp.bfloat16)
    _, grads = pipe.value_and_grad(jnp.sum, reduction="sum")(params, x)
    (grad,), _ = pipe.gather(grads)[0], None
    assert grad.dtype == jnp.bfloat16
    assert float(grad) == 1.125


# --- ready-made ones ---


def test_shapes_take_turns():
    """Two lengths and two numbers of rows, beside a side input that is cut."""
    shapes = [(2, 3), (2, 1), (2, 3), (1, 1)]

    def attend(p, x, *, side):
        return jnp.tanh(x * p) * side[:, None, None]

    def loss(y, t):
        return ((y - t) ** 2).sum(), {
            "most": y.max(),
            "row": fpipe.PerRow(y.sum((1, 2))),
        }

    layers = [fpipe.Layer(attend), fpipe.Layer(lambda p, x: x - x.mean(1)[:, None] * p)]
    params = (rows(0), rows(1))
    x, t = (
        fpipe.Microbatches([rows(seed + i, *s) for i, s in enumerate(shapes)])
        for seed in (2, 12)
    )
    pipe, reference = pipe_of(layers, 2), fpipe.sequential(layers, chunks=2)
    side = noise(KEY(30), (7,))

    def run(model, params):
        step = model.value_and_grad(loss, has_aux=True, argnums=(0, 1, 2))
        pulled = jax.grad(
            lambda params, side: sum(
                y.sum() for y in model(params, x, side=side).pieces
            ),
            argnums=(0, 1),
        )
        return step(params, x, t, side=side), pulled(params, side)

    (value, (grads, *others)), (pulled, into_side) = run(pipe, pipe.place(params))
    want = run(reference, params)
    got = (value, (pipe.gather(grads), *others)), (pipe.gather(pulled), into_side)
    assert_same(got, want)


def test_a_shape_that_no_layer_reads_is_one_of_its_own():
    """All compute the same, but each piece lies among those of its shape."""
    layers = [fpipe.Layer(lambda p, x: x["read"] * p), fpipe.fn(jnp.sin)]
    x = fpipe.Microbatches(
        [{"read": rows(i, 2), "unread": rows(i, 1 + i % 2)} for i in range(4)]
    )
    params = (rows(4), ())
    pipe, reference = pipe_of(layers, 1), fpipe.sequential(layers, chunks=1)
    assert_same(pipe(pipe.place(params), x), reference(params, x))


# --- how it runs ---


SIMPLE = [fpipe.Layer(lambda p, x: jnp.tanh(x * p)), fpipe.Layer(lambda p, x: x * p)]
SIMPLE_PARAMS = (rows(0), rows(1))


def test_it_is_one_program_in_the_order_of_the_schedule():
    """The smaller microbatch has its own operations in the same loop: no second pass
    that fills and drains the pipeline once more. It runs without recomputation
    (`"except_last"`), so it had operations of its own anyway.
    """
    pipe = pipe_of(SIMPLE, 4, schedule="1f1b")
    params = pipe.place(SIMPLE_PARAMS)
    counted = []
    for count in (8, 7):
        args = (params, rows(1, count), rows(2, count))
        assert pipe.compile(*args, loss_fn=mse) == 1
        (segment,) = machine_of(pipe).segments
        ops = [entry.op for phase in segment.phases for entry in phase.ops]
        counted.append((Counter(op.kind for op in ops), segment.actions))
        # No copy of the batch, cut into pieces, lies beside it.
        sliced = {leaf.port.kind for leaf in machine_of(pipe).sliced}
        assert sliced == {"x", "targets"}
    (even, actions), (ragged, same) = counted
    assert same == actions
    # The last stage recomputes nothing in any case, and has two operations more.
    assert ragged - even == {"F": 1, "B": 1}
    value, _ = pipe.value_and_grad(mse)(params, *args[1:])
    _, recorded = pipe.record(pipe.value_and_grad(mse), params, *args[1:])
    ran = {event.action for event in recorded.events}
    assert ran == {action for row in pipe.make_schedule(4).actions for action in row}
    assert np.isfinite(value)


def test_a_slot_has_room_for_the_largest():
    """In place of a slot for each shape: so memory does not grow by the last one."""
    f32 = jnp.dtype("float32")
    full = (jax.ShapeDtypeStruct((4, 3), f32), jax.ShapeDtypeStruct((), f32))
    small = (jax.ShapeDtypeStruct((2, 3), f32), jax.ShapeDtypeStruct((), f32))
    odd = (jax.ShapeDtypeStruct((1, 3), f32),)

    def shapes(*args):
        return [a.shape for a in Storage(*args).layout.shapes]

    assert shapes((full,), (4,)) == [(4, 3), ()]
    assert shapes((full, small), (4, 2)) == [(1,), (4, 3)]
    # The rows of each shard are at the beginning of what it has; those that do not
    # divide lie on each of them.
    assert shapes((full, small), (4, 2), 2) == [(1,), (2, 2, 3)]
    assert shapes((full, odd), (4, 1), 2) == [(3,), (4, 3)]
    assert Storage((full, small), (4, 2), 2).slot_bytes == 4 * (1 + 2 * 3)
    for storage, bundle in [
        (Storage((full, small), (4, 2), shards), kind)
        for shards in (1, 2)
        for kind in (full, small)
    ]:
        pool = [jnp.full((3, *a.shape), jnp.nan) for a in storage.layout.shapes]
        arrays = [noise(KEY(n), a.shape) for n, a in enumerate(bundle)]
        pool = storage.put(bundle, arrays, pool, jnp.int32(1))
        got = [storage.take(bundle, k, pool, jnp.int32(1)) for k in range(2)]
        assert_same(got, arrays)
        outbox = [jnp.zeros(a.shape) for a in storage.layout.shapes]
        sent = [a[None] for a in storage.pack(bundle, arrays, outbox)]
        assert_same([storage.take(bundle, k, sent, 0) for k in range(2)], arrays)


@pytest.mark.parametrize("count", [10, 5])
def test_over_a_data_axis_gradients_still_cross_it_once(count):
    """4, 4, 2 rows: all are shared. 2, 2, 1: the last one is whole on each device."""
    mesh = jax.make_mesh((2, 2), ("data", "stage"), axis_types=(AxisType.Auto,) * 2)
    layers = [dense(), dense()]
    pipe = fpipe.Pipe(layers, chunks=3, executor="scan", mesh=mesh, checkpoint="always")
    x, t = rows(0, count), rows(1, count)
    reference = fpipe.sequential(layers, chunks=3)
    params = reference.init(KEY(0), x)
    placed = pipe.place(params)
    run = jax.jit(pipe.value_and_grad(mse))
    value, grads = run(placed, x, t)
    want = reference.value_and_grad(mse)(params, x, t)
    assert_same((value, pipe.gather(grads)), want)
    text = text_of(run.lower(placed, x, t).compile())
    inside = collectives(loop_body(text))
    # A boundary and a cotangent for each form of array, and the losses of sharded
    # microbatches, one number each.
    assert (
        inside
        == {
            10: {"collective-permute": 2, "all-reduce": 2},
            5: {"collective-permute": 4, "all-reduce": 1},
        }[count]
    )
    for line in loop_body(text):
        assert "all-reduce(" not in line or re.search(r"= f32\[\] all-reduce\(", line)


def test_large_inputs_of_two_shapes_have_a_feed_each(monkeypatch):
    monkeypatch.setattr(feeds, "LARGE", 0)
    poison(monkeypatch)
    x, t = rows(0, 11), rows(1, 11)  # 3, 3, 3, 2
    pipe, reference = pipe_of(SIMPLE, 4), fpipe.sequential(SIMPLE, chunks=4)
    value, grads = pipe.value_and_grad(mse, argnums=(0, 1))(
        pipe.place(SIMPLE_PARAMS), x, t
    )
    want = reference.value_and_grad(mse, argnums=(0, 1))(SIMPLE_PARAMS, x, t)
    assert_same((value, (pipe.gather(grads[0]), grads[1])), want)
    spread = Counter(stack.leaf.port.kind for stack in machine_of(pipe).spread)
    assert spread == {"x": 1, "targets": 1}  # one microbatch alone is not spread
    ready = [
        fpipe.Microbatches([a[:3], a[3:4], a[4:7], a[7:8], a[8:11]]) for a in (x, t)
    ]
    got = pipe.evaluate(mse)(pipe.place(SIMPLE_PARAMS), *ready)
    assert_same(got, reference.evaluate(mse)(SIMPLE_PARAMS, *ready))
    spread = Counter(stack.leaf.port.kind for stack in machine_of(pipe).spread)
    assert spread == {"x": 2, "targets": 2}


# --- what it says ---


def test_a_plan_counts_the_smaller_microbatch():
    pipe = pipe_of(SIMPLE, 4)
    x = rows(0, 7)
    plan = pipe.plan(SIMPLE_PARAMS, x, x, loss_fn=mse)
    even = pipe.plan(SIMPLE_PARAMS, rows(0, 8), rows(0, 8), loss_fn=mse)
    assert plan.schedule == even.schedule
    (advice,) = (text for text in plan.warnings if "smaller" in text)
    assert advice.startswith("the last microbatch is smaller than the others")
    # Inputs and outputs are as many rows; of the slots each has room for the largest.
    held = [dict(p.devices[0].memory) for p in (even, plan)]
    fewer = {name: held[0][name] - held[1][name] for name in held[0]}
    assert fewer == dict.fromkeys(fewer, 0) | {"inputs": 2 * 4 * WIDTH}


def test_errors_name_the_smaller_microbatch():
    def stubborn(p, x):
        assert x.shape[0] == 2, "two rows"
        return x

    pipe = pipe_of([stubborn, stubborn], 4)
    with pytest.raises(AssertionError, match="two rows") as error:
        pipe(pipe.place(((), ())), rows(0, 7))
    assert "microbatch 3" in "".join(error.value.__notes__)

    def unlike(y):
        odd = {"odd": y} if y.shape[0] == 1 else {}
        return y.mean(), {"a": fpipe.PerRow(y), **odd}

    pipe = pipe_of([fpipe.fn(jnp.sin)] * 2, 2)
    with pytest.raises(ValueError, match=r"aux of microbatch 1 is .* are joined"):
        pipe.evaluate(unlike, has_aux=True)(pipe.place(((), ())), rows(0, 3))


@pytest.mark.parametrize("where", [6, 0])
def test_an_anomaly_is_found_in_the_microbatch_that_makes_it(where):
    layers = [fpipe.fn(jnp.log, name="log"), fpipe.Layer(lambda p, x: x * p)]
    pipe = pipe_of(layers, 4, detect_anomaly=True)
    x = jnp.ones((7, WIDTH)).at[where].set(0)
    with pytest.raises(FloatingPointError, match=rf"microbatch {where // 2}\b"):
        pipe.value_and_grad(mse)(pipe.place(((), rows(0))), x, rows(1, 7))
