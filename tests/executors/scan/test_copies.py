"""`O` and `L` under the scan executor: slots that go to the host's memory, and back."""

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
from tests.helpers import assert_same, dense, noise

M = 4
LAYERS = [dense()] * 2
X = noise(jax.random.key(1), (2 * M, 4))
# A boundary, and what the forward of a layer keeps: 2 rows of 4 numbers each.
BUNDLE = 2 * 4 * 4


def pipe_of(**options):
    given: dict[str, Any] = {
        "schedule": "gpipe",
        "checkpoint": "never",
        "executor": "scan",
    }
    return fpipe.Pipe(LAYERS, chunks=M, **(given | options))


def loss_of(y):
    return jnp.mean(y**2)


def test_a_step_reads_back_what_it_has_copied(monkeypatch):
    """Everything that nobody has filled is NaN, on the host too."""
    filled = poison(monkeypatch)
    pipe = pipe_of(offload=2)
    params = pipe.init(jax.random.key(0), X)
    got = pipe.value_and_grad(loss_of)(params, X)
    plain = fpipe.sequential(LAYERS, chunks=M).value_and_grad(loss_of)
    own = pipe.gather(params)
    assert_same((got[0], pipe.gather(got[1])), plain(own, X))
    # Two microbatches are on each device, and the other two, and a slot for what nobody
    # reads, on the host. A wire's pool has such a slot on the device too.
    pools = machine_of(pipe).pools
    for name, spare in ((SavedPool("core", False), 0), (WireName("forward", 0), 1)):
        assert (pools[name].slots, pools[name].on_host) == (2 + spare, 2)
    assert (3, 2, 4) in filled


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
