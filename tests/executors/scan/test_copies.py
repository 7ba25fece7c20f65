"""`O` and `L` under the scan executor: slots that go to the host's memory, and back."""

import dataclasses
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fpipe
from fpipe._executors.scan.machine import SavedPool, WireName
from fpipe.schedules import Schedule
from tests.executors.helpers import machine_of
from tests.executors.scan.poison import poison
from tests.helpers import add, assert_same, dense, keep, noise

M = 4
LAYERS = [dense()] * 2
X = noise(jax.random.key(1), (2 * M, 4))
# A boundary, and what the forward of a layer keeps: 2 rows of 4 numbers each.
BUNDLE = 2 * 4 * 4


def pipe_of(layers=LAYERS, **options):
    given: dict[str, Any] = {
        "schedule": "gpipe",
        "checkpoint": "never",
        "executor": "scan",
        "chunks": M,
    }
    return fpipe.Pipe(layers, **(given | options))


def loss_of(y):
    return jnp.mean(y**2)


def check_step(layers, chunks, **options):
    """A step equals that of the plain layers. Returns the machine."""
    pipe = pipe_of(layers, chunks=chunks, **options)
    x = noise(jax.random.key(1), (2 * chunks, 4))
    params = pipe.init(jax.random.key(0), x)
    got = pipe.value_and_grad(loss_of)(params, x)
    plain = fpipe.sequential(layers, chunks=chunks).value_and_grad(loss_of)
    assert_same((got[0], pipe.gather(got[1])), plain(pipe.gather(params), x))
    return machine_of(pipe)


def test_a_step_reads_back_what_it_has_copied(monkeypatch):
    """Everything that nobody has filled is NaN, on the host too."""
    filled = poison(monkeypatch)
    machine = check_step(LAYERS, M, offload=2)
    # Two microbatches are on each device, and the other two, and a slot for what nobody
    # reads, on the host. A wire's pool has such a slot on the device too.
    pools = machine.pools
    for name, spare in ((SavedPool("core", False), 0), (WireName("forward", 0), 1)):
        assert (pools[name].slots, pools[name].on_host) == (2 + spare, 2)
    assert (3, 2, 4) in filled


def copies_of(machine):
    """The slots that are copied and brought back after each phase, as the table has
    them: by tick, phase and device, for each pool.
    """
    found = defaultdict(lambda: ([], []))
    (segment,) = machine.segments
    for p, phase in enumerate(segment.phases):
        for d, t in np.ndindex(segment.table.shape[:2]):
            row = segment.table[d, t, p]
            for c in phase.copies:
                if row[c.on_host] < machine.pools[c.pool].on_host:
                    found[t, p, d, c.pool][0].append((row[c.slot], row[c.on_host]))
            for c in phase.returns:
                if row[c.runs]:
                    found[t, p, d, c.pool][1].append((row[c.slot], row[c.on_host]))
    return found.values()


def test_what_goes_may_leave_its_slot_to_what_comes_back(monkeypatch):
    """On the device and on the host, after the very same phase."""
    poison(monkeypatch)
    machine = check_step(LAYERS, 6, schedule="eager_1f1b", offload=2)
    swaps = [(out[0], back[0]) for out, back in copies_of(machine) if out and back]
    assert swaps
    assert all(there[0] == here[0] for there, here in swaps)
    assert all(there[1] == here[1] for there, here in swaps)


def test_two_bundles_of_a_pool_go_at_once(monkeypatch):
    """A boundary and a skip that the same stage reads, from a stage of its device."""
    poison(monkeypatch)
    layers = [keep(), dense(), dense(), add()]
    options: dict[str, Any] = {"schedule": "looped_bfs", "devices": jax.devices()[:1]}
    machine = check_step(layers, M, offload=3, balance=[2, 2], **options)
    assert any(len(out) == 2 for out, _ in copies_of(machine))
    assert any(len(back) == 2 for _, back in copies_of(machine))


def test_a_skip_stays_until_all_stages_of_its_device_have_read_it(monkeypatch):
    """The backward of the stage that reads it first could do without it meanwhile."""
    poison(monkeypatch)

    @fpipe.skippable(peek=["skip"])
    def times(params, x, *, carry):
        return jnp.sin(x) * fpipe.peek(carry, "skip"), carry

    options: dict[str, Any] = {"schedule": "looped_bfs", "devices": jax.devices()[:1]}
    layers = [keep(), dataclasses.replace(times, init=lambda key, x: ()), add()]
    check_step(layers, 3, offload=1, balance=[1, 1, 1], **options)


@pytest.mark.parametrize("checkpoint", ["never", "always"])
def test_a_plan_has_less_on_the_device_and_the_rest_on_the_host(checkpoint):
    x = jax.ShapeDtypeStruct(X.shape, X.dtype)
    rows = {}
    for limit in (None, 2):
        pipe = pipe_of(offload=limit, checkpoint=checkpoint)
        plan = pipe.plan(None, x, loss_fn=loss_of)
        rows[limit] = plan.devices[0]
    kept, moved = rows[None], rows[2]
    # Of each pool that waits two slots of four go. With residuals these are the inputs
    # of both layers and what they keep, else the inputs.
    pools = 3 if checkpoint == "never" else 2
    assert kept.peak - moved.peak == pools * 2 * BUNDLE
    assert (kept.host, moved.host) == (0, pools * (2 + 1) * BUNDLE)


def test_what_has_no_time_to_leave_stays():
    """`B` follows its `F` in the next tick: nothing else could use the room."""
    row = [(kind, 0, i) for i in range(M) for kind in "FOLB"]
    pipe = fpipe.Pipe(LAYERS, [2], chunks=M, schedule=Schedule([row]), executor="scan")
    params = pipe.init(jax.random.key(0), X)
    pipe.compile(params, X, loss_fn=loss_of)
    machine = machine_of(pipe)
    assert not any(pool.on_host for pool in machine.pools.values())
    (segment,) = machine.segments
    assert np.all([not phase.copies for phase in segment.phases])


def test_pools_have_as_many_slots_as_the_limit_says():
    """Also where a backward comes in the phase after its forward, and stays."""
    forms = set()
    for schedule, limit in [
        ("gpipe", 1),
        ("gpipe", 3),
        ("1f1b", 1),
        ("eager_1f1b", 1),
        ("eager_1f1b", 2),
        ("zb_h1", 2),
        ("interleaved_1f1b", 3),
        ("v_half", 2),
    ]:
        options: dict[str, Any] = {"schedule": schedule, "offload": limit}
        pipe = pipe_of([dense()] * 4, devices=jax.devices()[:2], **options)
        pipe.plan(None, jax.ShapeDtypeStruct(X.shape, X.dtype), loss_fn=loss_of)
        machine = machine_of(pipe)
        pools = machine.pools.items()
        slots = [pool.slots for name, pool in pools if isinstance(name, SavedPool)]
        forms.add(len(machine.segments[0].phases))
        assert max(slots) == limit, (schedule, limit)
    assert forms == {1, 2}
