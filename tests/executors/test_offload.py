"""Policies that offload: what is saved for a backward waits in the host's memory.

A CPU has that kind of memory too. Inside of one program XLA for CPUs makes no
difference between the kinds, so of the scan executor the program is looked at as JAX
made it: where its types are on the host, and what a GPU would be told.
"""

import pickle
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType

import fpipe
from fpipe._core.pytrees import HostShape, device_bytes, host_bytes, nbytes, on_host
from fpipe._executors.placed.instructions import Run
from fpipe._model.remat import MadePolicy, Remat
from fpipe._program.graph import inline
from fpipe.schedules import Action, Kind
from tests.executors.helpers import observing, plan_of
from tests.helpers import (
    Case,
    add,
    assert_same,
    counter,
    dense,
    dropout,
    in_turn,
    keep,
    mse,
    noise,
    sided,
)

POLICIES = jax.checkpoint_policies
WIDTH = 4
ROWS = 8
X = jnp.asarray(np.linspace(-2, 2, ROWS * WIDTH).reshape(ROWS, WIDTH), jnp.float32)


def dots():
    """The policy made anew: equal ones are to share what is traced and compiled."""
    return POLICIES.offload_dot_with_no_batch_dims("device", "pinned_host")


def names():
    return POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=["saved"],
        names_which_can_be_offloaded=["product"],
        offload_src="device",
        offload_dst="pinned_host",
    )


def init(key, x):
    del x
    return noise(key, (WIDTH, WIDTH))


def wave(w, x):
    """A product whose backward needs the number itself."""
    h = checkpoint_name(x @ w, "product")
    return jnp.tanh(checkpoint_name(jnp.sin(h), "saved")) + jnp.cos(h)


def own(w, x):
    return jax.checkpoint(wave, policy=names())(w, x)


def looped(ws, x):
    return jax.lax.scan(lambda x, w: (own(w, x), None), x, ws)[0]


WAVE = fpipe.Layer(wave, init, name="wave")
OWN = fpipe.Layer(own, init, name="own")
LOOPED = fpipe.Layer(
    looped, lambda key, x: jnp.stack([init(key, x)] * 2), name="looped"
)


def loss_of(y):
    return jnp.mean(y**2)


def pipe_of(layer=WAVE, checkpoint=None, executor="placed", schedule="1f1b", **options):
    checkpoint = dots() if checkpoint is None else checkpoint
    return fpipe.Pipe(
        [layer] * 4,
        [2, 2],
        chunks=4,
        checkpoint=checkpoint,
        executor=executor,
        schedule=schedule,
        **options,
    )


def check(pipe, tolerance=1e-5):
    """A step equals the one of the plain layers, and that of plain JAX."""
    params = pipe.init(jax.random.key(0), X)
    loss, grads = pipe.value_and_grad(loss_of)(params, X)
    plain = pipe.gather(params)
    got = loss, pipe.gather(grads)
    want = fpipe.sequential(pipe.layers, chunks=4).value_and_grad(loss_of)(plain, X)
    assert_same(got, want, tolerance)

    def composed(params):
        y = X
        for layer, own in zip(pipe.layers, params, strict=True):
            y = layer.apply(own, y)
        return loss_of(y)

    assert_same(got, jax.value_and_grad(composed)(plain), tolerance)
    return params


# --- the same numbers ---


WAYS = {
    "dots": (WAVE, dots(), "1f1b"),
    "names": (WAVE, names(), "zb_h1"),
    "own": (OWN, "never", "zb_h1"),
    "own in a remat": (OWN, "always", "1f1b"),
    "own in a policy": (OWN, dots(), "1f1b"),
}


@pytest.mark.quick(cases=4)
@pytest.mark.parametrize(("way", "executor"), in_turn(WAYS, ["placed", "scan"]))
def test_a_step_equals_that_of_the_plain_layers(way, executor):
    layer, checkpoint, schedule = WAYS[way]
    check(pipe_of(layer, checkpoint, executor, schedule))


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_a_loop_over_layers_that_offload(executor):
    layers = [LOOPED] * 2
    pipe = fpipe.Pipe(layers, [1, 1], chunks=4, checkpoint="never", executor=executor)
    check(pipe)
    params = pipe.init(jax.random.key(0), X)
    assert all(device.host for device in pipe.plan(params, X).devices)


@pytest.mark.parametrize(
    ("executor", "schedule"), [("placed", "zb_h1"), ("scan", "1f1b")]
)
def test_with_skips_state_side_inputs_and_keys(executor, schedule):
    layers = [keep(), counter(), dense(), dropout(), sided(), add()]
    case = Case(layers, chunks=4, rows=10)  # 3, 3, 3, 1
    pipe = fpipe.Pipe(
        layers,
        [4, 2],
        chunks=4,
        checkpoint=dots(),
        executor=executor,
        schedule=schedule,
    )
    params = case.params()
    (loss, state), grads = pipe.value_and_grad(mse)(
        pipe.place(params), case.x, case.target, **case.needs
    )
    got = (loss, state), pipe.gather(grads)
    want = case.reference.value_and_grad(mse)(params, case.x, case.target, **case.needs)
    assert_same(got, want)


def test_with_a_batch_over_several_devices():
    mesh = jax.make_mesh((2, 2), ("stage", "data"), axis_types=(AxisType.Auto,) * 2)
    pipe = pipe_of(executor="scan", mesh=mesh)
    params = check(pipe)
    # A device has one of the two rows of each microbatch.
    other = pipe_of(executor="scan").plan(params, X).devices[0]
    assert [2 * row.host for row in pipe.plan(params, X).devices] == [other.host] * 4


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_from_outside_in_16_bits_and_watched(executor):
    pipe = pipe_of(executor=executor, compute_dtype=jnp.bfloat16)
    params = pipe.init(jax.random.key(0), X)
    plain = pipe.gather(params)
    other = fpipe.sequential(pipe.layers, chunks=4, compute_dtype=jnp.bfloat16)
    got = jax.grad(lambda params: loss_of(pipe(params, X)))(params)
    want = jax.grad(lambda params: loss_of(other(params, X)))(plain)
    assert_same(pipe.gather(got), want, tolerance=2e-2)

    watched = pipe_of(executor=executor, detect_anomaly=True)
    check(watched)
    with pytest.raises(FloatingPointError, match="layer 0 'wave'"):
        watched.value_and_grad(loss_of)(params, X.at[0, 0].set(jnp.nan))


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_without_jit_and_recorded(executor):
    pipe = pipe_of(executor=executor, schedule="zb_h1")
    params = check(pipe)
    want = pipe.value_and_grad(loss_of)(params, X)
    with fpipe.record(pipe) as recording:
        assert_same(pipe.value_and_grad(loss_of)(params, X), want)
    assert {event.action.kind for event in recording.events} >= {*"FIW"}
    with jax.disable_jit():
        assert_same(pipe.value_and_grad(loss_of)(params, X), want)


# --- where it lies ---


def on_the_host():
    return [a for a in jax.live_arrays() if a.sharding.memory_kind == "pinned_host"]


def test_residuals_are_on_the_host_until_the_backward():
    # A recomputation of its own would read the first ones before the last ones come.
    pipe = pipe_of(schedule="gpipe", recompute="with_backward")
    params = pipe.init(jax.random.key(0), X)
    step = pipe.value_and_grad(loss_of)
    jax.block_until_ready(step(params, X))
    seen = []

    def look(item, slots):
        del slots
        seen.append(
            (getattr(item, "action", None), sum(a.nbytes for a in on_the_host()))
        )

    assert not on_the_host()
    with observing(look):
        step(params, X)
    assert not on_the_host()
    # Two products a stage, of two rows: all of the first stage, and of the second those
    # that its backward does not follow directly.
    piece = 2 * (ROWS // 4) * WIDTH * 4
    assert max(size for _, size in seen) == 2 * 4 * piece
    plan = pipe.plan(params, X)
    assert [device.host for device in plan.devices] == [4 * piece, 4 * piece]


def test_both_halves_of_a_backward_read_from_the_host():
    # `I` needs the cosine of the first product, `W` the product itself.
    def twice(params, x):
        h = x @ params["a"]
        return h @ params["b"] + jnp.sin(h)

    layer = fpipe.Layer(twice, lambda key, x: {"a": init(key, x), "b": init(key, x)})
    pipe = pipe_of(layer, schedule="zb_h1", recompute="with_backward")
    params = pipe.init(jax.random.key(0), X)
    step = pipe.value_and_grad(loss_of, argnums=(0, 1))
    reference = fpipe.sequential(pipe.layers, chunks=4)
    want = reference.value_and_grad(loss_of, argnums=(0, 1))(pipe.gather(params), X)
    loss, (grads, x_grad) = step(params, X)
    assert_same((loss, (pipe.gather(grads), x_grad)), want)
    plan = plan_of(pipe)
    found = {}
    kinds: tuple[Kind, Kind] = ("I", "W")
    for kind in kinds:
        read = [
            plan.slots[slot].name
            for item in plan.instructions
            if isinstance(item, Run)
            for part in item.parts
            if part.action == Action(kind, 0, 0)
            for slot in part.ins
        ]
        found[kind] = {name for name in read if name.startswith("residual")}
    # The first product of each of the two layers.
    assert len(found["I"] & found["W"]) == 2


def test_what_is_compiled_ahead_is_what_a_step_runs():
    pipe = pipe_of(checkpoint=names())
    params = pipe.init(jax.random.key(0), X)
    pipe.compile(params, X, loss_fn=loss_of)
    compiled = []
    listen = jax.monitoring.register_event_duration_secs_listener
    listen(lambda event, *_, **__: compiled.append(event))
    jax.block_until_ready(pipe.value_and_grad(loss_of)(params, X))
    assert not [event for event in compiled if "backend_compile" in event]


def test_under_scan_products_of_several_widths_lie_side_by_side():
    layers = [dense(WIDTH), dense(6), dense(WIDTH), dense(WIDTH)]
    pipe = fpipe.Pipe(
        layers, [2, 2], chunks=4, checkpoint=dots(), executor="scan", schedule="gpipe"
    )
    params = check(pipe)
    step = jax.make_jaxpr(pipe.value_and_grad(loss_of))(params, X)
    assert carried_on_host(step) == [(4 + 1, ROWS // 4, WIDTH + 6)]


def carried_on_host(jaxpr):
    """The shapes on the host that loops carry."""
    return [
        var.aval.shape
        for node in every_node(inline(jaxpr))
        if node.name == "scan"
        for var in node.eqn.outvars
        if on_host(var.aval)
    ]


def every_node(graph):
    """The equations of a graph, and all that is in them."""
    for node in graph.nodes:
        yield node
        for body in node.bodies:
            yield from every_node(body)


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
def test_under_scan_the_program_keeps_its_buffers_on_the_host(outside):
    pipe = pipe_of(executor="scan")
    params = pipe.init(jax.random.key(0), X)

    def step(params, x):
        if outside:
            return jax.grad(lambda params: loss_of(pipe(params, x)))(params)
        return pipe.value_and_grad(loss_of)(params, x)

    traced = jax.jit(step).trace(params, X)
    # Two products of two rows in each slot: for each microbatch that waits, and one
    # slot for what nobody reads.
    slots = 4 + 1 if outside else 2 + 1
    assert carried_on_host(traced.jaxpr) == [(slots, ROWS // 4, WIDTH)] * 2
    # XLA for GPUs takes no conditional that returns what is on the host.
    nodes = every_node(inline(traced.jaxpr))
    branches = [node for node in nodes if node.name == "cond"]
    assert branches
    assert not [v for node in branches for v in node.eqn.outvars if on_host(v.aval)]
    # What a GPU is told: a copy of each product to the host, and back.
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count('_xla_buffer_placement = "pinned_host"') >= 2
    assert '_xla_buffer_placement = "device"' in text


# --- what is counted ---


def test_a_plan_counts_the_memory_of_devices_and_of_the_host_apart():
    piece = ROWS // 4 * WIDTH * 4
    x = jax.ShapeDtypeStruct(X.shape, X.dtype)
    for executor in ("placed", "scan"):
        # A recomputation of its own would bring them back before the backward.
        options: dict[str, Any] = {"executor": executor}
        options["recompute"] = "with_backward"
        there = pipe_of(checkpoint=POLICIES.dots_saveable, **options)
        here = pipe_of(**options)
        kept, moved = there.plan(None, x), here.plan(None, x)
        assert "host" not in str(kept)
        assert {device.host for device in kept.devices} == {0}
        assert "  host  when" in str(moved)
        first, before = moved.devices[0], kept.devices[0]
        # Two microbatches wait on the first device under 1F1B, with two products each.
        spare = executor == "scan"
        assert first.host == (2 + spare) * 2 * piece
        residuals = first.memory.get("residuals", 0)
        assert before.memory["residuals"] - residuals == (2 - spare) * 2 * piece
        assert first.peak == sum(first.memory.values())
        assert moved.as_dict()["devices"][0]["host"] == first.host
        # Measuring runs the programs on arrays that lie where those of a step do.
    assert pipe_of().plan(None, X, by="time").step > 0


def test_balance_and_tune_count_the_memory_of_devices_alone():
    piece = ROWS // 4 * WIDTH * 4
    saved = [
        fpipe.layer_costs([WAVE] * 2, X, chunks=4, checkpoint=policy).saved
        for policy in (POLICIES.dots_saveable, dots())
    ]
    assert saved == [(piece, piece), (0, 0)]
    found = fpipe.tune(
        [WAVE] * 2,
        X,
        devices=jax.devices()[:2],
        schedules=["gpipe"],
        chunks=[4],
        checkpoints=[POLICIES.dots_saveable, dots()],
        recomputes="with_backward",
    )
    # Work and time are the same, so memory decides, and the less is better.
    better, worse = found.candidates
    assert better.pipe is not None
    assert better.prediction is not None
    assert worse.prediction is not None
    assert better.pipe.checkpoint == Remat.of(dots()).option
    # Of four microbatches one product each.
    assert better.prediction.peak == worse.prediction.peak - 4 * piece


def test_types_say_where_an_array_lies():
    shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    host = HostShape((2, 3), jnp.float32)
    array = jax.device_put(jnp.ones((2, 3)), jax.memory.Space.Host)
    for a in (host, array, jax.typeof(array)):
        assert on_host(a)
        assert (device_bytes(a), host_bytes(a), nbytes(a)) == (0, 24, 24)
    for a in (shape, jnp.ones((2, 3)), np.ones((2, 3), np.float32)):
        assert not on_host(a)
        assert (device_bytes(a), host_bytes(a), nbytes(a)) == (24, 0, 24)
    assert host == HostShape((2, 3), jnp.float32) != shape != host
    assert len({host, shape, HostShape((2, 3), jnp.float32)}) == 2


def test_inputs_on_the_host_are_brought_to_the_device():
    x = jax.device_put(X, jax.memory.Space.Host)
    pipe = pipe_of()
    params = pipe.init(jax.random.key(0), X)
    want = pipe.value_and_grad(loss_of)(params, X)
    assert_same(pipe.value_and_grad(loss_of)(params, x), want)


# --- policies are values ---


@pytest.mark.parametrize("make", [dots, names])
def test_policies_that_are_made_alike_are_equal_and_pickle(make):
    pipe = pipe_of(checkpoint=make())
    assert pipe.checkpoint == pipe_of(checkpoint=make()).checkpoint
    assert pickle.loads(pickle.dumps(pipe.checkpoint)) == pipe.checkpoint
    assert pipe.checkpoint != "never"
    assert isinstance(pipe.checkpoint, MadePolicy)
    assert f"checkpoint='{pipe.checkpoint.maker}'" in repr(pipe)
    other = POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["product"],
        offload_src="device",
        offload_dst="pinned_host",
    )
    assert pipe_of(checkpoint=other).checkpoint != pipe.checkpoint
