"""`O` and `L` under both executors: what goes to the host's memory, and comes back."""

import contextlib
import re

import jax
import jax.numpy as jnp
import pytest

import fpipe
from fpipe._executors.scan.machine import SavedPool
from tests.executors.helpers import machine_of, observing, plan_of
from tests.executors.placed.test_recomputation import two_products
from tests.helpers import assert_same, noise

M = 4


@contextlib.contextmanager
def watching(pipe):
    """Collects of how many microbatches each device of a placed pipe has residuals,
    after each instruction.
    """
    counts = []

    def look(item, slots):
        del item
        held = {device: set() for device in pipe.devices}
        for slot, array in zip(plan_of(pipe).slots, slots, strict=True):
            if slot.role == "residuals" and array is not None:
                (device,) = array.devices()
                if array.sharding.memory_kind == "device":
                    held[device] |= {*re.findall(r"mb\d+", slot.name)}
        counts.append([len(own) for own in held.values()])

    with observing(look):
        yield counts


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_a_pull_back_keeps_the_limit_and_may_be_called_twice(executor):
    """Under 1F1B the last stage holds one microbatch. Differentiated from outside it
    would hold all, as every other stage.
    """
    layers = [two_products()] * 2
    pipe = fpipe.Pipe(
        layers,
        chunks=M,
        checkpoint="never",
        schedule="1f1b",
        offload=1,
        executor=executor,
    )
    x = noise(jax.random.key(1), (2 * M, 8))
    params = pipe.init(jax.random.key(0), x)
    plain = fpipe.sequential(layers, chunks=M)
    _, plainly = jax.vjp(lambda params: plain(params, x), pipe.gather(params))
    with watching(pipe) as counts:
        y, pull = jax.vjp(lambda params: pipe(params, x), params)
        for cotangent in (jnp.cos(y), jnp.sin(y)):
            (got,), (want,) = pull(cotangent), plainly(jax.device_get(cotangent))
            assert_same(pipe.gather(got), want)
    if executor == "placed":
        assert [max(own) for own in zip(*counts, strict=True)] == [1, 1]
    else:
        pool = machine_of(pipe).pools[SavedPool("core", False)]
        assert (pool.slots, pool.on_host) == (1, M)
