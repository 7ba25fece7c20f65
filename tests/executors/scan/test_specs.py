"""Parameters that are cut over the other axes of a mesh: the same numbers, what crosses
devices and how often, and what each device holds.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.tree_utils import tree_get

import fpipe
import fpipe.optim
from fpipe._executors.scan import parameters
from fpipe._executors.scan.exchanges import find_exchanges
from tests.executors.cut_layers import (
    COLUMNS,
    FULLY_SHARDED,
    ROWS,
    WIDE,
    gpt_block,
    multiplied,
)
from tests.executors.helpers import scan_executor
from tests.executors.scan.test_scan import collectives, loop_body, text_of
from tests.helpers import assert_same, dense, mse, noise, raises

DEVICES = np.array(jax.devices())
DATA = Mesh(DEVICES.reshape(2, 2), ("stage", "data"))
MODEL = Mesh(DEVICES.reshape(2, 2).T, ("model", "stage"))


def square(spec=None, name="square"):
    return fpipe.Layer(
        multiplied, lambda key, x: noise(key, (WIDE, WIDE)), name=name, spec=spec
    )


def specs_of(packed):
    """How the rows lie, without the axis of stages."""
    specs = [a.sharding.spec for a in packed.arrays]
    assert all(spec[0] == "stage" for spec in specs)
    return [P(*spec[1:]) for spec in specs]


def step_of(pipe, x, argnums=(0, 1)):
    """The parameters of a step and its text, when it gives what `sequential` gives and
    its gradients lie as the parameters do.
    """
    params = pipe.init(jax.random.key(0), x)
    step = jax.jit(pipe.value_and_grad(mse, argnums=argnums))
    program = step.lower(params, x, x).compile()
    loss, (grads, *others) = step(params, x, x)
    assert specs_of(grads) == specs_of(params)
    plain = fpipe.sequential(pipe.layers, chunks=pipe.chunks)
    want = plain.value_and_grad(mse, argnums=argnums)(pipe.gather(params), x, x)
    assert_same((loss, (pipe.gather(grads), *others)), want)
    return params, text_of(program)


# --- what crosses, and how often ---


@pytest.mark.quick
def test_tensor_parallel_blocks_reduce_twice_in_each_direction():
    pipe = fpipe.Pipe(
        [gpt_block()] * 4,
        [2, 2],
        chunks=2,
        mesh=MODEL,
        executor="scan",
        checkpoint="always",
    )
    x = noise(jax.random.key(1), (4, 3, WIDE))
    params, text = step_of(pipe, x)
    assert params.padding == 0
    assert specs_of(params).count(COLUMNS) == 8
    assert specs_of(params).count(ROWS) == 4
    # Two blocks on each stage, whose forward and backward stand in the loop once: two
    # each of a block, and once more in a recomputation, but for the last, which makes
    # the output. The boundaries move from stage to stage, and back.
    assert collectives(loop_body(text)) == {
        "all-reduce": 4 + 4 + 3,
        "collective-permute": 2,
    }


@pytest.mark.parametrize(
    ("unshard", "in_loop", "outside"), [("step", 0, 4), ("action", 8, 0)]
)
def test_sharded_parameters_are_gathered_and_their_gradients_scattered(
    unshard, in_loop, outside
):
    pipe = fpipe.Pipe(
        [FULLY_SHARDED] * 4,
        [2, 2],
        chunks=4,
        mesh=DATA,
        executor="scan",
        unshard=unshard,
        checkpoint="always",
    )
    params, text = step_of(pipe, noise(jax.random.key(1), (8, WIDE)), (0,))
    assert specs_of(params) == [P(), P("data"), P(None, "data")] * 2
    # Two layers on each stage, with two such parameters each. The forward and the
    # backward stand in the loop once.
    inside, all_ = collectives(loop_body(text)), collectives(text.splitlines())
    assert inside["all-gather"] == in_loop
    assert all_["all-gather"] == in_loop + outside
    # They are scattered where they are gathered, and the backward alone scatters.
    assert all_["reduce-scatter"] == 4
    assert inside["reduce-scatter"] == (4 if unshard == "action" else 0)
    assert inside["all-reduce"] == 1  # the loss of a microbatch
    sums = [line for line in text.splitlines() if " while(" in line]
    # What the loop carries: sums whose parts lie apart, and sums that lie in pieces.
    whole, piece = f"f32[1,{WIDE},{2 * WIDE}]", f"f32[{WIDE},{WIDE}]"
    assert any(piece in line for line in sums) == (unshard == "action")
    assert any(whole in line for line in sums) == (unshard == "step")
    # In the pieces of the parameters, and of no other axis.
    assert not any(f"f32[{WIDE // 2},{2 * WIDE}]" in line for line in sums)


@pytest.mark.parametrize("spec", [P(("model", "data")), P(("data", "model"))])
def test_pieces_of_pieces_are_gathered_and_scattered_where_they_belong(spec):
    mesh = Mesh(DEVICES.reshape(1, 2, 2), ("stage", "data", "model"))
    pipe = fpipe.Pipe(
        [square(spec)], chunks=2, mesh=mesh, executor="scan", unshard="action"
    )
    x = noise(jax.random.key(1), (8, WIDE))
    params = pipe.init(jax.random.key(0), x)
    assert params.arrays[0].sharding.spec == P(None, *spec)
    got = pipe.value_and_grad(mse)(params, x, x)
    assert got[1].arrays[0].sharding == params.arrays[0].sharding
    want = fpipe.sequential(pipe.layers, chunks=2).value_and_grad(mse)
    whole = pipe.gather(params)
    assert_same((got[0], pipe.gather(got[1])), want(whole, x, x))


def test_rows_that_the_axis_does_not_divide():
    """Each device has them all. The gradients are cut when the step ends, and nothing
    that they are made of is.
    """
    layers = [square(P(None, "data")), square(P("data"), "other")]
    pipe = fpipe.Pipe(layers, chunks=3, mesh=DATA, executor="scan")
    _, text = step_of(pipe, noise(jax.random.key(1), (3, WIDE)), (0,))
    assert collectives(loop_body(text)) == {"collective-permute": 2}


# --- stages that differ ---


def reading(spec):
    """A layer that borrows what another one owns and cuts."""

    def apply(w, x, *, borrowed):
        return jnp.tanh(x @ borrowed["embed"].T) @ w

    init = square().init
    return fpipe.Layer(apply, init, name="reading", spec=spec, borrow=("embed",))


def kept(params, x, *, carry):
    return x, fpipe.stash(carry, "x", x)


def added(params, x, *, carry):
    found, carry = fpipe.pop(carry, "x")
    return x + found, carry


def test_different_stages_share_no_row_of_what_is_cut():
    first = fpipe.Layer(kept, lambda key, x: None, stash=("x",))
    last = fpipe.Layer(added, lambda key, x: None, pop=("x",))
    layers = [square(COLUMNS, "embed"), first, dense(WIDE), reading(ROWS), last]
    # The last microbatch is smaller.
    x = noise(jax.random.key(1), (5, WIDE))
    pipe = fpipe.Pipe(layers, [2, 3], chunks=2, mesh=MODEL, executor="scan")
    params, _ = step_of(pipe, x)
    assert specs_of(params) == [COLUMNS, ROWS, P(), P()]
    assert params.padding == 4 * (2 * WIDE * WIDE + WIDE * WIDE + WIDE)


# --- all else that a pipe does ---


def test_calls_from_outside():
    layers = [square(P("data")), square()]
    x = noise(jax.random.key(1), (4, WIDE))
    pipe = fpipe.Pipe(layers, chunks=2, mesh=DATA, executor="scan")
    params = pipe.init(jax.random.key(0), x)
    whole = pipe.gather(params)
    plain = fpipe.sequential(layers, chunks=2)
    # Placed inside of a program too.
    again = jax.jit(pipe.place)(tuple(map(np.asarray, whole)))
    assert [a.sharding for a in again.arrays] == [a.sharding for a in params.arrays]
    assert_same(pipe.evaluate(mse)(again, x, x), plain.evaluate(mse)(whole, x, x))

    def loss_of(run):
        return lambda params: mse(run(params, x), jnp.ones_like(x))

    got, want = jax.grad(loss_of(pipe))(params), jax.grad(loss_of(plain))(whole)
    assert specs_of(got) == specs_of(params) == [P("data"), P()]
    assert_same(pipe.gather(got), want)


def test_arrays_say_how_they_are_cut():
    whole = [noise(jax.random.key(n), (WIDE, WIDE)) for n in (2, 3)]
    whole[1] = jax.device_put(whole[1], NamedSharding(MODEL, COLUMNS))
    pipe = fpipe.Pipe([multiplied] * 2, mesh=MODEL, executor="scan")
    params = pipe.place(tuple(whole))
    assert specs_of(params) == [COLUMNS, P()]
    # A device of the second stage holds its columns alone.
    for device, columns in zip(
        MODEL.devices[:, 1], (slice(4), slice(4, 8)), strict=True
    ):
        (part,) = [s for s in params.arrays[0].addressable_shards if s.device == device]
        assert_same(part.data[0], np.asarray(whole[1])[:, columns])
    assert_same(pipe.gather(params), tuple(map(np.asarray, whole)))
    # What JAX shows of two trees that are cut otherwise tells them apart.
    assert repr(params.form) == (
        f"a packing with the rows - | [1] cut by {COLUMNS}, [0] | -"
    )


def test_no_device_has_all_of_what_is_cut(monkeypatch):
    wide, seen = 56, set()
    made_part = parameters._part

    def looked(*args):
        arrays = [a for a in jax.live_arrays() if a.dtype == jnp.float32]
        seen.update(s.data.shape for a in arrays for s in a.addressable_shards)
        return made_part(*args)

    monkeypatch.setattr(parameters, "_part", looked)
    layer = dataclasses.replace(
        square(COLUMNS), init=lambda key, x: noise(key, (wide, wide))
    )
    pipe = fpipe.Pipe([layer] * 2, mesh=MODEL, executor="scan")
    key, x = jax.random.key(0), jnp.ones((1, wide))
    params = pipe.init(key, x)
    # Halves, and no whole ones.
    assert (wide, wide // 2) in seen
    assert (wide, wide) not in seen
    want = fpipe.sequential(pipe.layers).init(key, x)
    whole = pipe.gather(params)
    assert_same(whole, want)
    given = tuple(map(np.array, whole))
    del want, whole
    pipe.place(given)
    assert (wide, wide) not in seen
    # An `init` that cannot be traced runs as it is, and what it makes is cut then.
    concrete = dataclasses.replace(
        layer, init=lambda key, x: jnp.eye(wide) * float(jax.random.normal(key))
    )
    pipe = dataclasses.replace(pipe, layers=[concrete] * 2)
    assert specs_of(pipe.init(key, x)) == [COLUMNS]


def test_optimizers_keep_what_is_cut(promotion):
    layers = [square(COLUMNS), square()]
    x = noise(jax.random.key(1), (4, WIDE))
    pipe = fpipe.Pipe(layers, chunks=2, mesh=MODEL, executor="scan")
    params = pipe.init(jax.random.key(0), x)
    whole = pipe.gather(params)
    plain = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))
    tx = fpipe.optim.per_stage(plain)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = pipe.value_and_grad(mse)(params, x, x)[1]
        return tx.update(grads, state, params)

    updates, after = step(params, state)
    for tree in (updates, tree_get(state, "mu"), tree_get(after, "nu")):
        assert specs_of(tree) == [COLUMNS, P()]
    # What a step returns does not compile it again.
    step(jax.tree.map(jnp.add, params, updates), after)
    assert cast("Any", step)._cache_size() == 1
    _, gradients = fpipe.sequential(layers, chunks=2).value_and_grad(mse)(whole, x, x)
    want, state = plain.update(gradients, plain.init(whole), whole)
    assert_same(pipe.gather(updates), want)
    assert_same(fpipe.optim.gather(after), state)
    again = fpipe.optim.place(fpipe.optim.gather(after), params)
    assert specs_of(tree_get(again, "mu")) == [COLUMNS, P()]


def test_a_plan_counts_what_each_device_holds():
    x = jax.ShapeDtypeStruct((8, WIDE), jnp.float32)
    size = 4 * WIDE * WIDE

    def row_of(spec, mesh, **options):
        pipe = fpipe.Pipe([square(spec)] * 2, mesh=mesh, executor="scan", **options)
        return pipe.plan(None, x, optimizer=2).devices[0].memory

    cut = row_of(COLUMNS, MODEL)
    assert (cut["parameters"], cut["optimizer"]) == (size // 2, size)
    assert cut["gradients"] == size // 2
    gathered = row_of(P("data"), DATA)
    assert (gathered["parameters"], gathered["optimizer"]) == (size * 3 // 2, size)
    assert gathered["gradients"] == size * 3 // 2
    each = row_of(P("data"), DATA, unshard="action")
    assert (each["parameters"], each["gradients"]) == (size // 2, size // 2)


def test_what_does_not_fit_is_refused():
    def pipe_of(mesh, spec):
        return fpipe.Pipe([square(spec), square()], mesh=mesh, executor="scan")

    whole = (jnp.eye(WIDE), jnp.eye(WIDE))
    with raises(
        ValueError,
        f"layer 0 'square': its `spec` {P('columns')} of params names the axis "
        "'columns', but the mesh of its stage has ('model',)",
    ):
        pipe_of(MODEL, P("columns")).place(whole)
    # Over one device of each stage nothing is cut.
    alone = pipe_of(Mesh(DEVICES[:2], ("stage",)), COLUMNS)
    assert specs_of(alone.place(whole)) == [P()]
    # Parameters that are cut over axes that another pipe's mesh lacks.
    other = pipe_of(Mesh(MODEL.devices, ("columns", "stage")), None)
    with raises(
        ValueError,
        "a call's params: these parameters are packed for another "
        "partition; write `pipe.place(other.gather(params))`, where `other` is the "
        "pipe that placed them",
    ):
        other.evaluate(mse)(pipe_of(MODEL, COLUMNS).place(whole), whole[0], whole[0])


# --- what would hang on CPUs ---


def fused(split):
    """A layer whose product with columns has three parts. These do not lie where the
    columns of the product do.
    """

    def apply(p, x):
        a, b, c = split(x, p["columns"])
        return jnp.tanh(a * b + c) @ p["rows"]

    def init(key, x):
        columns, rows = noise(key, (WIDE, 3 * WIDE)), noise(key, (WIDE, WIDE))
        return {"columns": columns, "rows": rows}

    spec = {"columns": COLUMNS, "rows": ROWS}
    return fpipe.Layer(apply, init, name="fused", spec=spec)


def test_devices_of_a_stage_exchange_nothing():
    """As XLA does it by itself, it would hang on CPUs."""
    x = noise(jax.random.key(1), (4, WIDE))
    layer = fused(lambda x, w: jnp.split(x @ w, 3, axis=-1))
    pipe = fpipe.Pipe([layer] * 2, chunks=2, mesh=MODEL, executor="scan")
    _, text = step_of(pipe, x, (0,))
    assert find_exchanges(text, MODEL) == []


def sent_on(w, x):
    """What a layer sends by itself from one device of its stage to another."""
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.roll(x @ w, WIDE // 2, axis=1)
    send = jax.shard_map(
        lambda own: jax.lax.ppermute(own, "model", [(0, 1), (1, 0)]),
        in_specs=P(None, "model"),
        out_specs=P(None, "model"),
        axis_names={"model"},
    )
    return send(x @ w)


@pytest.mark.parametrize("schedule", ["eager_1f1b", "gpipe"])
def test_a_layer_may_send_to_another_device_of_its_stage(schedule):
    """Stages that differ, so that at one tick each runs something else."""
    layer = fpipe.Layer(sent_on, square().init, name="sent", spec=COLUMNS)
    layers, x = [layer, square()], noise(jax.random.key(1), (5, WIDE))
    pipe = fpipe.Pipe(layers, chunks=3, mesh=MODEL, executor="scan", schedule=schedule)
    _, text = step_of(pipe, x)
    # In operations that all devices run together.
    sent = {"`ppermute` in stage0 F", "`ppermute` in stage0 B"}
    assert {*find_exchanges(text, MODEL)} == sent
    together = {op.name for op in scan_executor(pipe)._steps.values()[-1].together}
    assert find_exchanges(text, MODEL, together) == []


def told(x):
    jax.debug.callback(lambda total: None, x.sum())
    return x


# What other devices cannot run along, on numbers that mean nothing.
@pytest.mark.parametrize(
    "before",
    [
        told,
        lambda x: jax.lax.while_loop(lambda h: h.max() > 1, lambda h: h / 2, x),
        lambda x: jax.lax.cond(x.sum() > 0, jnp.negative, jnp.tanh, x),
    ],
    ids=["callback", "while", "cond"],
)
def test_a_layer_that_exchanges_is_refused_where_others_cannot_run_it(before):
    def exchanging(w, x):
        return sent_on(w, before(x))

    x = noise(jax.random.key(1), (4, WIDE))
    layer = fpipe.Layer(exchanging, square().init, name="sent", spec=COLUMNS)
    pipe = fpipe.Pipe([layer] * 2, chunks=2, mesh=MODEL, executor="scan")
    params = pipe.init(jax.random.key(0), x)
    for evaluate in (pipe.evaluate(mse), jax.jit(pipe.evaluate(mse))):
        with raises(
            NotImplementedError,
            '`Pipe(executor="scan", mesh=...)`: `ppermute` in stage0-1 F: devices of '
            "one stage would exchange parts of an array. With "
            'executor="scan" the devices of a CPU would wait for each other for ever, '
            "because the layers also call Python, or have a `while` or a `cond`. Make "
            "the array whole before, by `jax.lax.with_sharding_constraint(h, "
            'jax.sharding.PartitionSpec())`; or take executor="placed"',
        ):
            evaluate(params, x, x)
