"""Recomputations and copies to the host as actions of their own: `R`, `O` and `L`."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import fpipe
from fpipe import schedules
from fpipe.schedules import Schedule
from tests.executors.helpers import observing, products
from tests.executors.placed.test_recomputation import M, two_products
from tests.helpers import assert_same, noise

LAYERS = [two_products()] * 2


def early(name: str) -> Schedule:
    """A schedule in which every backward has an `R`."""
    return schedules.early_recompute(schedules.named(name, 2, M))


# --- what runs ---


@pytest.mark.quick
@pytest.mark.parametrize(
    ("checkpoint", "again"),
    [
        ("always", M),
        ("except_last", M - 1),
        # What recomputes nothing has nothing to run for its `R`.
        ("never", 0),
        (jax.checkpoint_policies.dots_saveable, 0),
    ],
    ids=["always", "except_last", "never", "dots"],
)
def test_r_recomputes_and_b_does_not(checkpoint, again):
    counts = products(LAYERS, checkpoint, early("gpipe"))
    # As many as `test_recomputation` counts in backwards that recompute.
    assert counts.pop(("R", 0), 0) == again
    assert counts.pop(("R", 1), 0) == 2 * again
    assert counts == products(LAYERS, "never")


def test_both_halves_take_what_r_has_made():
    counts = products(LAYERS, "always", early("zb_h1"))
    # On the last stage each backward follows its forward directly.
    assert counts == products(LAYERS, "never", "zb_h1") + Counter({("R", 0): M})


def test_effects_of_a_recomputation_are_those_of_r():
    seen = []

    def layer(p, x):
        jax.debug.callback(lambda: seen.append(1))
        return jnp.sin(x @ p)

    pipe = fpipe.Pipe(
        [layer] * 2,
        chunks=4,
        checkpoint="except_last",
        schedule="gpipe",
        recompute="early",
    )
    params = pipe.place((jnp.eye(4), jnp.eye(4)))
    jax.block_until_ready(pipe.value_and_grad(jnp.mean)(params, jnp.ones((8, 4))))
    jax.effects_barrier()
    assert len(seen) == 2 * (4 + 3)


def test_what_a_pipe_adds_to_its_schedule():
    def schedule_of(**options):
        pipe = fpipe.Pipe(LAYERS, chunks=M, **options)
        return pipe.make_schedule(M)

    gpipe = schedules.gpipe(2, M)
    found = schedule_of(schedule="gpipe", recompute="early", offload=2)
    assert schedules.simulate(found).peak_live == (2, 2)
    # By default the last microbatch recomputes nothing. The last stage waits for no
    # cotangent, so that its backwards recompute themselves.
    assert [found.order("R", stage) for stage in range(2)] == [(0, 1, 2), ()]
    assert schedule_of(schedule=gpipe, checkpoint="never", recompute="early") == gpipe
    given = early("gpipe")
    assert schedule_of(schedule=given, recompute="early") == given
    one_each = schedule_of(schedule=gpipe, offload=[3, 2])
    assert schedules.simulate(one_each).peak_live == (3, 2)
    with pytest.raises(ValueError, match="device 1 holds at least 2") as raised:
        schedule_of(schedule="zb_h1", offload=1)
    assert "for `Pipe(offload=1)`" in str(raised.value.__notes__)
    # Where the number of microbatches is known it is an error of the construction.
    x = jax.ShapeDtypeStruct((2 * M, 8), jnp.float32)
    known: list[dict[str, Any]] = [
        {"schedule": schedules.zb_h1(2, M)},
        {"schedule": "zb_h1", "sample": x},
    ]
    for options in known:
        with pytest.raises(ValueError, match="device 1 holds at least 2"):
            fpipe.Pipe(LAYERS, chunks=M, offload=1, **options)


def test_what_auto_adds():
    def added(layers=4, devices=4, m=M, **options):
        devices = jax.devices()[:devices]
        pipe = fpipe.Pipe(LAYERS * (layers // 2), devices=devices, chunks=m, **options)
        assert pipe.recompute == "auto"
        schedule = pipe.make_schedule(m)
        return [schedule.order("R", stage) for stage in range(schedule.stages)]

    # Each backward that recomputes, if its cotangent comes from another device.
    for name in ("gpipe", "1f1b", "eager_1f1b", "zb_h1"):
        assert added(schedule=name) == [(0, 1, 2)] * 3 + [()], name
    assert added(checkpoint="always") == [(0, 1, 2, 3)] * 3 + [()]
    # One microbatch has its backward right after its forward, on all stages.
    assert added(checkpoint="never") == [()] * 4
    assert added(checkpoint="always", m=1) == [()] * 4
    assert added(devices=1, schedule="gpipe") == [()]
    # Two devices, and one of them has the stages 1 and 2.
    assert added(devices=2, schedule="zb_v") == [(0, 1, 2), (), (0, 1, 2), ()]
    # What is given as data runs as it is; a function is asked for what it makes.
    assert added(schedule=schedules.gpipe(4, M)) == [()] * 4
    assert added(schedule=schedules.gpipe) == [(0, 1, 2)] * 3 + [()]
    # In lock step nothing is gained.
    assert added(executor="scan") == [()] * 4


# --- when it runs ---


@pytest.mark.parametrize("dispatch", ["one_thread", "thread_per_device"])
def test_a_recording_has_all_actions_in_the_order_of_the_schedule(dispatch):
    pipe = fpipe.Pipe(
        LAYERS,
        chunks=M,
        schedule="gpipe",
        recompute="early",
        offload=2,
        dispatch=dispatch,
    )
    x = noise(jax.random.key(1), (2 * M, 8))
    params = pipe.init(jax.random.key(0), x)
    step = pipe.value_and_grad(lambda y: jnp.mean(y**2), argnums=(0, 1))
    plain = fpipe.sequential(LAYERS, chunks=M).value_and_grad(
        lambda y: jnp.mean(y**2), argnums=(0, 1)
    )
    with fpipe.record(pipe) as recording:
        value, (grads, of_x) = step(params, x)
    want = plain(pipe.gather(params), x)
    assert_same((value, (pipe.gather(grads), of_x)), want)
    schedule = pipe.make_schedule(M)
    events = {event.action: event for event in recording.events}
    assert {action.kind for action in events} == set("FOLRB")
    for device, row in enumerate(schedule.actions):
        computed = [a for a in row if a.kind not in ("O", "L")]
        starts = [events[a].start for a in computed]
        assert starts == sorted(starts)
        assert {events[a].device for a in row} == {device}
        for action in row:
            if action.kind == "L":
                assert events[action._replace(kind="O")].end <= events[action].start
                # Stage 1 recomputes in its backwards.
                reader = action._replace(kind="B" if action.stage else "R")
                assert events[action].end <= events[reader].start
    # Copies are no transfers between devices.
    assert all(t.source != t.target for t in recording.transfers)


# --- what it holds ---


def test_a_model_trains_under_a_limit_that_it_breaks_without_copies():
    width, limit = 8, 30_000
    layers = [
        fpipe.Layer(lambda w, x: jnp.sin(x @ w), lambda key, x: noise(key, (8, 8)))
    ] * 8
    x = noise(jax.random.key(1), (256, width))

    def train(**options):
        """Three steps; and the most bytes of arrays on a device, at any instruction."""
        pipe = fpipe.Pipe(
            layers,
            [4, 4],
            chunks=8,
            checkpoint="never",
            schedule="gpipe",
            **options,
        )
        params = pipe.init(jax.random.key(0), x)
        step = pipe.value_and_grad(lambda y: jnp.mean(y**2))
        old = {id(a) for a in jax.live_arrays()} - {id(params)}
        most = 0

        def look(item, slots):
            nonlocal most
            del item, slots
            most = max(most, *on_devices(old, pipe.devices))

        for _ in range(3):
            with observing(look):
                _, grads = step(params, x)
            params = jax.tree.map(lambda p, g: p - g, params, grads)
        return most, pipe.gather(params)

    most, want = train()
    less, got = train(offload=2)
    assert less <= limit < most
    assert_same(got, want)


def on_devices(old, devices):
    """The bytes in the memory of each device, of arrays that are not old."""
    found = dict.fromkeys(devices, 0)
    for array in jax.live_arrays():
        if id(array) in old or array.sharding.memory_kind != "device":
            continue
        for device in array.devices():
            found[device] += array.nbytes
    return found.values()
