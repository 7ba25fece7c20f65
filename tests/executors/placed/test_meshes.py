"""Stages on several devices: the same numbers, what crosses devices and how often, what
each device holds, and that the host waits for nothing.
"""

import dataclasses
import functools
import pickle
import threading
from collections import Counter
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import fpipe
import fpipe.optim
from tests.executors.cut_layers import (
    COLUMNS,
    FULLY_SHARDED,
    ROWS,
    WIDE,
    gpt_block,
    multiplied,
)
from tests.executors.helpers import collectives, placed_executor, plan_of
from tests.helpers import (
    Case,
    assert_same,
    dense,
    eventually,
    models,
    mse,
    noise,
    raises,
)

DEVICES = np.array(jax.devices())
DATA = Mesh(DEVICES.reshape(2, 2), ("stage", "data"))
MODEL = Mesh(DEVICES.reshape(2, 2).T, ("model", "stage"))
PAIR = Mesh(DEVICES[:2], ("data",))
PLACES = {
    "data": {"mesh": DATA},
    "model": {"mesh": MODEL},
    # A mesh of two, and one device; the other way round; and twice one mesh.
    "to one": {"devices": [PAIR, DEVICES[2]]},
    "from one": {"devices": [DEVICES[3], PAIR]},
    "same": {"devices": [Mesh(DEVICES.reshape(2, 2), ("data", "model"))] * 2},
}


# --- the numbers ---


@pytest.mark.parametrize(
    ("model", "place", "options"),
    [
        ("tied", "to one", {"schedule": "zb_v", "checkpoint": "always"}),
        ("jump3", "from one", {"schedule": "gpipe", "checkpoint": "never"}),
        pytest.param("tied", "same", {}, marks=pytest.mark.quick),
    ],
)
def test_a_mesh_changes_no_number(model, place, options):
    case = Case(models()[model], chunks=2, rows=8)
    balance = [1, 1, 1, 1] if options.get("schedule") == "zb_v" else [2, 2]
    pipe = fpipe.Pipe(case.layers, balance, chunks=2, **options, **PLACES[place])
    params = case.params()
    placed = pipe.place(params)
    assert_same(pipe.gather(placed), params)
    got = pipe.value_and_grad(mse, argnums=(0, 1, 2))(
        placed, case.x, case.target, **case.needs
    )
    want = case.reference.value_and_grad(mse, argnums=(0, 1, 2))(
        params, case.x, case.target, **case.needs
    )
    assert_same(got, want)
    # Each gradient lies as its parameter does.
    for a, b in zip(jax.tree.leaves(got[1][0]), jax.tree.leaves(placed), strict=True):
        assert a.sharding == b.sharding


def test_outputs_and_gradients_from_outside():
    case = Case(models()["jump2"], chunks=2, rows=8)
    pipe = fpipe.Pipe(case.layers, [2, 2], chunks=2, mesh=DATA)
    params = case.params()

    def loss_of(run):
        return lambda params, x: mse(run(params, x), jnp.ones_like(x))

    placed = pipe.place(params)
    assert_same(pipe(placed, case.x), case.reference(params, case.x))
    got = jax.value_and_grad(loss_of(pipe), argnums=(0, 1))(placed, case.x)
    want = jax.value_and_grad(loss_of(case.reference), argnums=(0, 1))(params, case.x)
    assert_same(got, want)
    assert pipe(placed, case.x).sharding.spec == P(("data",))


def test_batches_from_anywhere():
    layers = [dense(), dense()]
    pipe = fpipe.Pipe(layers, chunks=2, mesh=DATA)
    x = np.asarray(noise(jax.random.key(1), (8, 4)))
    params = pipe.init(jax.random.key(0), x)
    want = pipe(params, x)
    explicit = jax.make_mesh((4,), ("rows",))
    for given in (
        jax.device_put(x, DEVICES[3]),
        jax.device_put(x, NamedSharding(DATA, P(("stage", "data")))),
        jax.device_put(x, NamedSharding(explicit, P("rows"))),
    ):
        with jax.set_mesh(explicit):
            assert_same(pipe(params, given), want)
    # A device of the first stage has its two rows of each of the two microbatches.
    plan = plan_of(pipe)
    (slot,) = plan.stacks
    assert plan.slots[slot].name == "x[0]"
    assert plan.sharding(slot).shard_shape((2, 4, 4)) == (2, 2, 4)


def test_layers_name_the_axes_of_their_stage():
    seen = []

    def layer(w, x):
        seen.append(jax.sharding.get_abstract_mesh().axis_names)
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), P("data", "model"))

    mesh = Mesh(DEVICES.reshape(1, 2, 2), ("stage", "data", "model"))
    w, x = noise(jax.random.key(0), (4, 4)), noise(jax.random.key(1), (8, 4))
    pipe = fpipe.Pipe([layer], chunks=2, mesh=mesh)
    step = pipe.value_and_grad(jnp.mean)
    with jax.set_mesh(DATA):
        got = step(pipe.place((w,)), x)
    want = jax.value_and_grad(lambda w: jnp.mean(jnp.tanh(x @ w[0])))((w,))
    assert_same(got, want)
    assert set(seen) == {("data", "model")}


# --- what crosses devices ---


def test_gradients_cross_the_data_axis_once_per_step():
    layers = [dense(), normed(), dense(), dense()]
    x = noise(jax.random.key(1), (16, 4))
    pipe = fpipe.Pipe(layers, [2, 2], chunks=4, mesh=DATA, checkpoint="always")
    params = pipe.init(jax.random.key(0), x)
    step = pipe.value_and_grad(mse)
    want = fpipe.sequential(layers, chunks=4).value_and_grad(mse)(
        pipe.gather(params), x, x
    )
    assert_same(step(params, x, x), want)
    counts = collectives(pipe)
    # XLA joins those of a stage's gradients. The layer's own means, of its forward, its
    # recomputation and its backward, cross in each microbatch.
    assert counts["add parts", "all-reduce"] == 2
    assert counts["F", "all-reduce"] <= 2 * 4
    assert counts["B", "all-reduce"] <= 4 * 4  # the first stage has the layer


def normed():
    """A layer with the statistics of a batch."""

    def apply(scale, x):
        mean, square = x.mean(0), (x**2).mean(0)
        return scale * (x - mean) / jnp.sqrt(square - mean**2 + 1e-3)

    return fpipe.Layer(apply, lambda key, x: jnp.full(x.shape[-1], 0.5), name="normed")


def test_tensor_parallel_blocks_reduce_twice_in_each_direction():
    blocks = [gpt_block()] * 2
    x = noise(jax.random.key(1), (4, 3, WIDE))
    pipe = fpipe.Pipe(blocks, chunks=2, mesh=MODEL, checkpoint="never")
    params = pipe.init(jax.random.key(0), x)
    assert params[0]["up"].sharding.spec == COLUMNS
    step = pipe.value_and_grad(mse, argnums=(0, 1))
    got = step(params, x, x)
    assert got[1][0][1]["down"].sharding.spec == ROWS
    whole = pipe.gather(params)
    want = fpipe.sequential(blocks, chunks=2).value_and_grad(mse, argnums=(0, 1))
    assert_same(got, want(whole, x, x))
    # Two blocks, two microbatches; nothing else crosses the axis.
    counts = collectives(pipe)
    assert counts == {
        ("F", "all-reduce"): 4,
        ("B", "all-reduce"): 4,
        ("FB", "all-reduce"): 8,
    }
    # A compiled call finds the programs that compiling ahead has made.
    plans = placed_executor(pipe)._plans.values()
    step(params, x, x)
    assert len(placed_executor(pipe)._plans.values()) == len(plans)


@pytest.mark.parametrize(
    ("unshard", "chunks", "crossing"),
    [
        # Two layers with two of such parameters.
        (
            "step",
            4,
            {
                ("gather parameters", "all-gather"): 4,
                ("add parts", "reduce-scatter"): 4,
            },
        ),
        (
            "step",
            1,
            {
                ("gather parameters", "all-gather"): 4,
                ("add parts", "reduce-scatter"): 4,
            },
        ),
        (
            "action",
            4,
            {
                ("F", "all-gather"): 8,
                ("B", "all-gather"): 4,
                ("R", "all-gather"): 4,
                ("B", "reduce-scatter"): 8,
                # One program gathers once for both.
                ("FB", "all-gather"): 8,
                ("FB", "reduce-scatter"): 8,
            },
        ),
    ],
)
def test_sharded_parameters_are_gathered_and_their_gradients_scattered(
    unshard, chunks, crossing
):
    layers = [FULLY_SHARDED] * 2
    x = noise(jax.random.key(1), (8, WIDE))
    pipe = fpipe.Pipe(
        layers, chunks=chunks, mesh=DATA, unshard=unshard, checkpoint="always"
    )
    params = pipe.init(jax.random.key(0), x)
    got = pipe.value_and_grad(mse)(params, x, x)
    want = fpipe.sequential(layers, chunks=chunks).value_and_grad(mse)
    assert_same(got, want(pipe.gather(params), x, x))
    for tree in (params, got[1]):
        assert [a.sharding.spec for a in jax.tree.leaves(tree)] == [
            P(),
            P("data"),
            P(None, "data"),
        ] * 2
    counts = collectives(pipe)
    # The gradients of what is whole on each device are added up, those of a stage
    # together.
    added = {"add parts": 2} if chunks > 1 else {"B": 1, "FB": 1}
    assert counts == crossing | {(k, "all-reduce"): n for k, n in added.items()}


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        (("data", "model"), P(("model", "data"))),
        (("data", "model"), P(("data", "model"))),
        (("data", "rows"), P(("rows", "data"))),
    ],
)
def test_pieces_of_pieces_are_scattered_where_they_belong(axes, spec):
    mesh = Mesh(DEVICES.reshape(1, 2, 2), ("stage", *axes))
    data = tuple(name for name in axes if name != "model")
    x = noise(jax.random.key(1), (8, WIDE))
    layer = fpipe.Layer(multiplied, lambda key, x: noise(key, (WIDE, WIDE)), spec=spec)
    pipe = fpipe.Pipe([layer], chunks=2, mesh=mesh, data_axes=data)
    params = pipe.init(jax.random.key(0), x)
    got = pipe.value_and_grad(mse)(params, x, x)
    assert got[1][0].sharding == params[0].sharding
    want = fpipe.sequential([layer], chunks=2).value_and_grad(mse)
    assert_same(got, want(pipe.gather(params), x, x))


def test_arrays_say_how_they_are_cut():
    x = noise(jax.random.key(1), (4, WIDE))
    whole = [noise(jax.random.key(n), (WIDE, WIDE)) for n in (2, 3)]
    whole[1] = jax.device_put(whole[1], NamedSharding(MODEL, COLUMNS))
    layers = [multiplied, multiplied]
    pipe = fpipe.Pipe(layers, mesh=MODEL)
    params = pipe.place(tuple(whole))
    assert [a.sharding.spec for a in params] == [P(), COLUMNS]
    got = pipe.value_and_grad(mse)(params, x, x)
    assert [a.sharding.spec for a in got[1]] == [P(), COLUMNS]
    assert_same(
        got,
        fpipe.sequential(layers).value_and_grad(mse)(
            tuple(map(np.asarray, whole)), x, x
        ),
    )


# --- transfers ---


@pytest.mark.parametrize("target", [DEVICES[2], Mesh(DEVICES[2:], ("model",)), PAIR])
def test_issuing_waits_for_no_stage(target):
    """A stage on two devices waits, and its result goes to a place of another size, or
    of other axes.
    """
    source = Mesh(DEVICES[2:] if target is PAIR else DEVICES[:2], ("data",))
    go = threading.Event()

    def wait(value):
        go.wait()
        return np.asarray(value)

    @fpipe.skippable(stash=["skip"])
    def slow(params, x, *, carry):
        late = jax.pure_callback(wait, jax.ShapeDtypeStruct((), x.dtype), params)
        return x * late, fpipe.stash(carry, "skip", (x + late)[0])

    @fpipe.skippable(pop=["skip"])
    def last(params, x, *, carry):
        skip, carry = fpipe.pop(carry, "skip")
        return x * params + skip, carry

    pipe = fpipe.Pipe(
        [slow, last], devices=[source, target], chunks=2, dispatch="one_thread"
    )
    x = noise(jax.random.key(1), (8, 4))
    params = pipe.place((jnp.float32(2), jnp.float32(3)))
    go.set()
    want = jax.block_until_ready(pipe(params, x))
    go.clear()
    made = []
    thread = threading.Thread(target=lambda: made.append(pipe(params, x)))
    thread.start()
    try:
        assert eventually(lambda: not thread.is_alive())
        assert not made[0].is_ready()
    finally:
        go.set()
        thread.join()
    assert_same(made[0], want)
    per = 4
    rows = [x[n : n + per] * 2 * 3 + (x[n : n + per] + 2)[0] for n in (0, per)]
    assert_same(made[0], jnp.concatenate(rows))


@pytest.mark.parametrize("place", ["data", "model"])
def test_what_a_callback_raises_is_raised_by_all_devices(place):
    def raising(params, x):
        def callback(total):
            raise ZeroDivisionError(f"of {total.dtype}")

        jax.debug.callback(callback, x.sum())
        return x * params

    params = jnp.float32(2), jnp.float32(3)
    x = noise(jax.random.key(1), (8, 4))
    bad = fpipe.Pipe([double, raising], chunks=2, **PLACES[place])
    good = fpipe.Pipe([double, double], chunks=2, **PLACES[place])
    placed = good.place(params)
    want = good(placed, x)
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(bad(placed, x))
    assert "ZeroDivisionError: of float32" in str(caught.value)
    assert "fpipe: in layer 1 'raising', stage 1, microbatch" in str(caught.value)
    # No device waits for another one, so the next call runs.
    assert_same(good(placed, x), want)


# --- memory, recordings, optimizers ---


@pytest.mark.parametrize(
    ("mesh", "spec"), [(MODEL, COLUMNS), (DATA, P("data"))], ids=["model", "data"]
)
def test_optimizers_keep_what_is_cut(promotion, mesh, spec):
    layer = fpipe.Layer(multiplied, lambda key, x: noise(key, (WIDE, WIDE)), spec=spec)
    layers = [layer, dataclasses.replace(layer, spec=None)]
    x = noise(jax.random.key(1), (4, WIDE))
    pipe = fpipe.Pipe(layers, chunks=2, mesh=mesh)
    params = pipe.init(jax.random.key(0), x)
    whole = jax.tree.map(np.asarray, params)
    plain = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))
    tx = fpipe.optim.per_stage(plain)
    state = tx.init(params)
    moments = [a for a in jax.tree.leaves(state) if a.ndim]
    assert [a.sharding.spec for a in moments] == [spec, P()] * 2
    grads = pipe.value_and_grad(mse)(params, x, x)[1]
    updates, state = tx.update(grads, state, params)
    assert [a.sharding.spec for a in jax.tree.leaves(updates)] == [spec, P()]
    moments = [a for a in jax.tree.leaves(state) if a.ndim]
    assert [a.sharding.spec for a in moments] == [spec, P()] * 2
    _, gradients = fpipe.sequential(layers, chunks=2).value_and_grad(mse)(whole, x, x)
    want, after = plain.update(gradients, plain.init(whole), whole)
    assert_same(updates, want)
    assert_same(fpipe.optim.gather(state), after)
    again = fpipe.optim.place(fpipe.optim.gather(state), params)
    assert [a.sharding for a in jax.tree.leaves(again) if a.ndim] == [
        a.sharding for a in moments
    ]


def test_a_plan_counts_what_each_device_holds():
    layer = fpipe.Layer(
        lambda w, x: jnp.tanh(x @ w), lambda key, x: noise(key, (8, 8)), spec=COLUMNS
    )
    pipe = fpipe.Pipe([layer, layer], chunks=2, mesh=MODEL)
    x = noise(jax.random.key(1), (8, 8))
    params = pipe.init(jax.random.key(0), x)
    plan = pipe.plan(None, jax.ShapeDtypeStruct(x.shape, x.dtype), compiled=True)
    assert [row.memory["parameters"] for row in plan.devices] == [128, 128]
    held = [a.addressable_data(0).nbytes for a in params]
    assert held == [128, 128]
    assert plan.devices[0].name == "model=2 (cpu:0, cpu:1)"
    # Of the sums too a device has its pieces alone, if each action gathers.
    cut = [dataclasses.replace(layer, spec=P("data"))] * 2
    step = fpipe.Pipe(cut, chunks=2, mesh=DATA)
    action = fpipe.Pipe(cut, chunks=2, mesh=DATA, unshard="action")
    for fully, size in ((step, 256), (action, 128)):
        row = fully.plan(None, jax.ShapeDtypeStruct((8, 8), x.dtype)).devices[0]
        assert row.memory["gradients"] == size


def test_pipes_over_meshes_are_tuned_and_their_programs_timed():
    x = jax.ShapeDtypeStruct((8, WIDE), jnp.float32)
    layers = [dataclasses.replace(FULLY_SHARDED, name=name) for name in "abcd"]
    tuning = fpipe.tune(
        layers,
        x,
        mesh=DATA,
        unshard="action",
        chunks=[2, 3],
        schedules=["gpipe", "zb_v"],
        checkpoints=["never"],
    )
    pipe = tuning.pipe
    assert (pipe.mesh, pipe.unshard, pipe.data_axes) == (DATA, "action", ("data",))
    refused = {c.chunks: c.refused for c in tuning.candidates if c.refused}
    assert [*refused] == [3]
    assert "2 devices share the rows of each microbatch" in refused[3]
    small = fpipe.Pipe(layers[:2], chunks=2, mesh=DATA)
    plan = small.plan(None, noise(jax.random.key(1), (8, WIDE)), by="time")
    assert plan.unit == "second"
    assert all(seconds > 0 for row in plan.stages for seconds in row.work.values())


def test_a_recording_names_meshes():
    pipe = fpipe.Pipe([dense(), dense()], chunks=2, devices=[PAIR, DEVICES[2]])
    x = noise(jax.random.key(1), (8, 4))
    params = pipe.init(jax.random.key(0), x)
    _, recording = pipe.record(pipe.value_and_grad(mse), params, x, x)
    assert recording.places == ("data=2 (cpu:0, cpu:1)", "cpu:2")
    # The first stage recomputes one of its two microbatches.
    assert len(recording.events) == 8 + 1
    moved = Counter((t.source, t.target) for t in recording.transfers)
    assert moved == {(0, 1): 2, (1, 0): 2}


# --- what a pipe is ---


@functools.cache
def small():
    return fpipe.Pipe([double, double], chunks=2, mesh=DATA)


def double(params, x):
    return x * params


def test_a_pipe_over_meshes_is_a_value():
    pipe = small()
    assert pipe == pickle.loads(pickle.dumps(pipe))
    assert dataclasses.replace(pipe, chunks=4).devices == pipe.devices
    assert pipe.data_axes == ("data",)
    assert "devices=[data=2 (cpu:0, cpu:1), data=2 (cpu:2, cpu:3)]" in repr(pipe)
    other = fpipe.Pipe([double, double], chunks=2, devices=list(pipe.devices))
    assert other.devices == pipe.devices
    alone = Mesh(DEVICES[:2], ("stage",))
    devices = fpipe.Pipe([double, double], mesh=alone).devices
    assert devices == tuple(DEVICES[:2])
    scan = dataclasses.replace(pipe, executor="scan")
    assert dataclasses.replace(scan, executor="placed") == pipe


# --- errors ---


def test_wrong_meshes_are_refused():
    layers = [double, double]
    with raises(
        ValueError,
        "`Pipe(mesh=...)`: the mesh has the axes ('data',), and none is called "
        "'stage'; make one with `jax.make_mesh((2,), ('stage',), "
        "axis_types=(jax.sharding.AxisType.Auto,) * 1)`",
    ):
        fpipe.Pipe(layers, mesh=PAIR)
    with raises(
        ValueError,
        "`Pipe(devices=[mesh, ...])`: the axes ['data'] are explicit; make the mesh "
        "with `axis_types=(jax.sharding.AxisType.Auto,) * 1`",
    ):
        fpipe.Pipe(
            layers,
            devices=[Mesh(DEVICES[:2], ("data",), axis_types=(AxisType.Explicit,))] * 2,
        )
    with raises(
        ValueError,
        "`Pipe(devices=...)`: cpu:1 is in two places, data=2 (cpu:0, cpu:1) and "
        "data=2 (cpu:1, cpu:2); a device belongs to one of them, which may be given "
        "several times",
    ):
        fpipe.Pipe(layers, devices=[PAIR, Mesh(DEVICES[1:3], ("data",))])
    with raises(
        ValueError,
        f"`devices`: the sharding {P('data')} says how arrays are cut, but a stage "
        "needs only a mesh: give the mesh, and shard parameters by "
        "`fpipe.Layer(spec=...)`",
    ):
        fpipe.Pipe(layers, devices=[NamedSharding(PAIR, P("data"))] * 2)
    with raises(
        ValueError,
        "`Pipe(data_axes=('rows',))`: no mesh has an axis 'rows' beside that of "
        "stages; the axes are ['data']",
    ):
        fpipe.Pipe(layers, mesh=DATA, data_axes=("rows",))
    with raises(
        TypeError,
        "`Pipe(data_axes='data')`: a sequence of names of axes, such as (\"data\",)",
    ):
        fpipe.Pipe(layers, mesh=DATA, data_axes="data")
    with raises(ValueError, "`Pipe(unshard='layer')`: one of 'step', 'action'"):
        fpipe.Pipe(layers, mesh=DATA, unshard=cast("Any", "layer"))
    with raises(
        ValueError,
        "`Pipe(mesh=...)`: the mesh has 2 places on its axis 'stage', but the schedule "
        "puts 1 stage on 1 device; give `balance` as many entries as the mesh needs, "
        "or a mesh of 1",
    ):
        fpipe.Pipe(layers, [2], mesh=DATA)
    with raises(
        ValueError,
        '`Pipe(executor="scan", devices=...)`: several devices for each stage are '
        'given as one mesh with an axis "stage", `mesh=`',
    ):
        fpipe.Pipe(layers, devices=[PAIR] * 2, executor="scan")


def test_rows_that_devices_cannot_share_are_refused():
    params = small().place((jnp.float32(2), jnp.float32(3)))
    with raises(
        ValueError,
        "`Pipe(data_axes=('data',))`: 2 devices share the rows of each microbatch, and "
        "one has 3; of 6 rows in all, `chunks` can be 1, 3",
    ):
        small()(params, jnp.ones((6, 4)))
    with raises(
        ValueError,
        "`Pipe(data_axes=('data',))`: 2 devices share the rows of each microbatch, and "
        "one has 3; of 5 rows in all, give a batch of a multiple of 2 rows",
    ):
        small()(params, jnp.ones((5, 4)))
    pieces = fpipe.Microbatches([jnp.ones((2, 4)), jnp.ones((1, 4))])
    with raises(
        ValueError,
        "`Pipe(data_axes=('data',))`: 2 devices share the rows of each microbatch, and "
        "one has 1; of 3 rows in all, each needs a multiple of 2",
    ):
        small()(params, pieces)


def test_specs_that_do_not_fit_are_refused():
    def pipe_of(spec):
        layer = fpipe.Layer(lambda p, x: x @ p["w"], name="mlp", spec=spec)
        return fpipe.Pipe([layer, double], mesh=MODEL)

    params = {"w": jnp.ones((4, 3))}, jnp.float32(1)
    with raises(
        ValueError,
        f"layer 0 'mlp': its `spec` {P('columns')} of params['w'] names the axis "
        "'columns', but the mesh of its stage has ('model',)",
    ):
        pipe_of(P("columns")).place(params)
    with raises(
        ValueError,
        f"layer 0 'mlp': its `spec` {COLUMNS} of params['w'] does not "
        "divide its shape (4, 3) over the mesh {'model': 2}",
    ):
        pipe_of({"w": COLUMNS}).place(params)
    with raises(
        ValueError,
        f"layer 0 'mlp': its `spec` {P('model', 'model')} of params['w'] names the "
        "axis 'model' twice; it can shard one axis of the array",
    ):
        pipe_of(P("model", "model")).place(params)
    with raises(
        ValueError,
        f"layer 0 'mlp': its `spec` {P(None, None, 'model')} of params['w'] has 3 "
        "entries, but the array's `ndim` is 2",
    ):
        pipe_of(P(None, None, "model")).place(params)
    with raises(
        ValueError,
        f"layer 0 'mlp': its `spec` {P(P.UNCONSTRAINED)} of params['w'] leaves an axis "
        "unconstrained, but a parameter needs a fixed sharding: write `None`, or the "
        "name of an axis",
    ):
        pipe_of(P(P.UNCONSTRAINED)).place(params)
    with raises(
        ValueError,
        "layer 0 'mlp': its `spec` has another form than its parameters, "
        "{'w': float32[4,3]}",
    ):
        pipe_of({"v": COLUMNS}).place(params)
    with raises(
        TypeError,
        "`fpipe.Layer(spec=...)` of layer 'mlp': 'model' is no "
        "jax.sharding.PartitionSpec",
    ):
        pipe_of({"w": "model"})
