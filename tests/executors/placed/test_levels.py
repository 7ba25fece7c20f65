"""What is alive at each instruction of a plan, as it is predicted and as it is."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import fpipe
from fpipe._core.pytrees import Shape, device_bytes, host_bytes
from fpipe._executors.call import Args
from fpipe._executors.placed.dispatch import with_calls
from fpipe._executors.placed.instructions import Free, Half, Run
from fpipe._executors.placed.memory import levels
from fpipe._executors.placed.plan_data import kept_slots
from fpipe._model.loss import as_loss
from fpipe._model.stages import TARGETS
from fpipe._model.stages import X as XPORT
from tests.executors.helpers import placed_executor, plan_of
from tests.helpers import dense, mse
from tests.planning.test_prediction import ROWS, WIDTH, X, skips


def held(old):
    """The bytes on each device and in its host's memory, each buffer once, without
    those of arrays of before.

    Other tests have left thousands, and to ask each takes long.
    """
    found, seen = {}, set()
    before = set(map(id, old))
    for array in jax.live_arrays():
        if id(array) in before:
            continue
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            continue
        for a in (shard.data for shard in array.addressable_shards):
            (device,) = a.devices()
            # Numpy's memory may be that of several CPU devices.
            if (device, a.unsafe_buffer_pointer()) not in seen:
                seen.add((device, a.unsafe_buffer_pointer()))
                here, there = found.get(device, (0, 0))
                # Of a shard JAX tells it by the sharding, and not always by the type.
                on_host = array.sharding.memory_kind == "pinned_host"
                size = (0, a.nbytes) if on_host else (a.nbytes, 0)
                found[device] = here + size[0], there + size[1]
    return found


def alive(pipe, params, x, target, devices, old):
    """What is alive on some devices, and on their hosts, after each instruction of a
    step: as predicted, and as it is; and the arrays that it begins with.
    """
    loss = as_loss("value_and_grad", mse, False, "mean")
    bound = placed_executor(pipe).ready_plan(Args(params, x, (target,)), loss, (0,))
    plan = bound.plan
    kept = {f.slot for f in plan.feeds} | set(plan.constants)
    want = [{} for item in plan.instructions if not isinstance(item, Free)]
    for count in (device_bytes, host_bytes):
        after = iter(want)
        for n, now in levels(plan, bound.shapes, kept, count):
            if n >= 0 and not isinstance(plan.instructions[n], Free):
                found = next(after)
                for place, roles in now.items():
                    before = found.get(place.device, ())
                    found[place.device] = (*before, sum(roles.values()))

    got = []

    def watched(step):
        def run(*arrays):
            # What is dropped after it is still there, what it consumes is not.
            made = step.call(*arrays)
            got.append(held(old))
            return made

        return run

    slots = bound.slots(
        jax.tree.leaves(params),
        {port: [a] for port, a in ((XPORT, x), (TARGETS, target))},
    )
    given = [a for a in slots if a is not None]
    gc.collect()
    before = held(old)
    others = {
        d: before.get(d, (0, 0))[0] - sum(bytes_on(a, d) for a in given)
        for d in devices
    }
    bound.issue(with_calls(bound.shares[Half.WHOLE], watched), slots)
    nothing = (0, 0)
    got = [
        {
            d: (now.get(d, nothing)[0] - others[d], now.get(d, nothing)[1])
            for d in devices
        }
        for now in got
    ]
    return want, got, given


def bytes_on(array, device):
    """What a device has of an array."""
    shards = array.addressable_shards
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


@pytest.mark.parametrize(
    ("schedule", "checkpoint", "options"),
    [
        ("gpipe", "always", {}),
        ("gpipe", "never", {}),
        ("eager_1f1b", "except_last", {}),
        ("zb_h1", "always", {}),
        ("zb_h1", "never", {}),
        ("interleaved_1f1b", "except_last", {}),
        ("interleaved_1f1b", "never", {}),
        ("dualpipe_v", "always", {}),
        ("gpipe", "never", {"offload": 2}),
        ("eager_1f1b", "except_last", {"recompute": "early", "offload": 2}),
        ("zb_h1", "always", {"recompute": "early"}),
        ("interleaved_1f1b", "never", {"offload": 3}),
    ],
)
@pytest.mark.usefixtures("own_heap")
def test_what_is_alive_is_predicted_to_the_byte_at_every_instruction(
    schedule, checkpoint, options
):
    old = jax.live_arrays()
    several = schedule in ("interleaved_1f1b", "dualpipe_v")
    balance = [2, 2, 2, 1] if several else [2, 2, 3]
    pipe = fpipe.Pipe(
        skips(),
        balance,
        jax.devices()[: 2 if several else 3],
        4,
        checkpoint,
        schedule,
        **options,
    )
    x = jnp.ones((ROWS, WIDTH))
    target = jax.device_put(
        jnp.ones((ROWS, WIDTH)), pipe.devices[pipe.make_schedule(4).stage_to_device[-1]]
    )
    params, step = pipe.init(jax.random.key(0), x), pipe.value_and_grad(mse)
    jax.block_until_ready(step(params, x, target))

    want, got, given = alive(pipe, params, x, target, pipe.devices, old)
    assert got == want
    rows = {
        row.name: row
        for row in pipe.plan(params, x, target, loss_fn=mse, optimizer=0).devices
    }
    start = {
        d: sum(a.nbytes for a in given if a.devices() == {d}) for d in pipe.devices
    }
    # What stays inside of a program is counted as long as XLA has not.
    steps = [i for i in plan_of(pipe).instructions if not isinstance(i, Free)]
    for now, item in zip(want, steps, strict=True):
        inside = item.inside.values() if isinstance(item, Run) else ()
        here, there = now[item.placement.device]
        now[item.placement.device] = here + sum(map(device_bytes, inside)), there
    for d in pipe.devices:
        assert rows[str(d)].peak == max(start[d], *(now[d][0] for now in want))
        assert rows[str(d)].host == max(now[d][1] for now in want)
    assert any(row.host for row in rows.values()) == ("offload" in options)


@pytest.mark.parametrize(
    ("axis", "checkpoint", "spec", "unshard", "options"),
    [
        ("data", "never", None, "step", {}),
        ("model", "always", None, "step", {}),
        ("data", "except_last", P("data"), "step", {}),
        ("data", "except_last", P("data"), "action", {}),
        ("data", "always", None, "step", {"recompute": "early", "offload": 1}),
    ],
)
@pytest.mark.usefixtures("own_heap")
def test_what_a_device_of_a_mesh_holds_is_predicted_to_the_byte(
    axis, checkpoint, spec, unshard, options
):
    old = jax.live_arrays()
    devices = np.array(jax.devices()).reshape(2, 2)
    pipe = fpipe.Pipe(
        [dataclasses.replace(dense(WIDTH), spec=spec)] * 4,
        [2, 2],
        chunks=4,
        checkpoint=checkpoint,
        unshard=unshard,
        mesh=Mesh(devices, ("stage", axis)),
        **options,
    )
    # On a device that is not looked at.
    x = jax.device_put(np.ones((ROWS, WIDTH), np.float32), devices[1, 1])
    params = pipe.init(jax.random.key(0), x)
    jax.block_until_ready(pipe.value_and_grad(mse)(params, x, x))
    want, got, _ = alive(pipe, params, x, x, devices[:, 0], old)
    assert got == want


def test_inputs_that_lie_elsewhere_are_copied_and_freed():
    pipe = fpipe.Pipe([dense()] * 3, chunks=4)
    here, there = (
        jax.device_put(jnp.ones((ROWS, WIDTH)), pipe.devices[d]) for d in (0, 2)
    )
    loss = as_loss("value_and_grad", mse, False, "mean")
    params = tuple(map(Shape.of, pipe.gather(pipe.init(jax.random.key(0), X))))
    left = []
    for x, target in ((here, there), (here, here), (here.__array__(), there), (X, X)):
        args = Args(tuple(p.tree for p in params), x, (target,))
        bound = placed_executor(pipe).ready_plan(args, loss, (0,))
        *_, (_, now) = levels(bound.plan, bound.shapes, kept_slots(bound, args))
        inputs = {place.device: roles.get("inputs", 0) for place, roles in now.items()}
        left.append([inputs[d] >= ROWS * WIDTH * 4 for d in pipe.devices])
    assert left == [
        [True, False, True],
        [True, False, False],
        [False, False, True],
        [True, False, True],
    ]
