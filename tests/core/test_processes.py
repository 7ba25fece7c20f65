"""Several processes, as far as one process can tell."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fpipe
import fpipe.distributed
from fpipe._core import processes, watchdog
from fpipe._executors.placed.crossing import Together
from fpipe._executors.placed.instructions import Run
from fpipe._executors.placement import Placement
from tests.helpers import dense


def test_who_waits_for_one_that_has_ended_is_told(monkeypatch):
    def failing(mesh):
        def call(array):
            raise jax.errors.JaxRuntimeError("Gloo context initialization failed")

        return call

    monkeypatch.setattr(processes, "_everywhere", failing)
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        processes.meet([0], lambda: "all processes to connect")
    (note,) = caught.value.__notes__
    assert note == (
        "fpipe: this process has waited for all processes to connect; another one has "
        "ended or does not answer, and what it printed says why"
    )


def test_the_watchdog_knows_who_waits_in_a_program_of_several_processes(monkeypatch):
    log = []

    class Told:
        @contextlib.contextmanager
        def waiting(self, describe):
            log.append(f"in {describe()}")
            yield
            log.append("out")

        def expect(self, array, describe):
            log.append(f"{array} of {describe()}")

    def call(*arrays):
        log.append(f"called with {arrays}")
        return ["large", "small", "empty"]

    monkeypatch.setattr(watchdog, "_watchdogs", [Told()])
    placement = Placement.of(jax.devices()[0])
    run = Run("stage0_F", call, (0,), (1, 2, 3), placement)
    shapes = dict(enumerate(jax.ShapeDtypeStruct((n,), "f4") for n in (9, 9, 1, 0)))
    program = Together.of(call, run, "the forward", shapes)
    assert program("x") == ["large", "small", "empty"]
    what = "the forward, which other processes run too"
    assert log == [f"in {what}", "called with ('x',)", "out", f"small of {what}"]


def test_what_is_spread_lies_over_all_devices_and_is_the_same():
    pipe = fpipe.Pipe([dense(8), dense(3)], devices=jax.devices()[:2], chunks=2)
    params = pipe.init(jax.random.key(0), jnp.zeros((4, 8)))
    spread = fpipe.distributed.spread(params)
    devices = set(jax.devices())
    assert all(a.devices() == devices for a in jax.tree.leaves(spread))
    # Half of the devices of this suite divide neither axis of the last layer.
    assert not spread[0]["w"].is_fully_replicated
    assert spread[1]["b"].is_fully_replicated
    for a, b in zip(*map(jax.tree.leaves, (spread, params)), strict=True):
        np.testing.assert_array_equal(a, b)
    again = pipe.place(spread)
    for a, b in zip(*map(jax.tree.leaves, (again, params)), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)


def test_inside_a_program_nothing_is_spread_or_watched():
    for call in (fpipe.distributed.spread, fpipe.distributed.watched):
        with pytest.raises(TypeError, match=r"inside|outside"):
            jax.jit(call)(jnp.ones(3))
    pipe = fpipe.Pipe([dense()], devices=jax.devices()[:1], executor="scan")
    packed = pipe.init(jax.random.key(0), jnp.zeros((4, 4)))
    with pytest.raises(TypeError, match="lies over all devices already"):
        fpipe.distributed.spread(packed)
