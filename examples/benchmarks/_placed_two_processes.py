"""A worker of `processes.py` that runs the placed executor. There are two of them.

A pipe over both processes uses the first device of each.
"""

import json
import sys
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
from _jax_two_processes import BALANCE, BLOCKS, apply, barrier_over, init, loss_fn
from jax.sharding import SingleDeviceSharding
from two_processes import ALONE, replies, serve

import fpipe
import fpipe.distributed
import fpipe.optim
from fpipe._executors.placed.dispatch import ReadyPlan, with_calls
from fpipe._executors.placed.instructions import Move

# A model whose programs take no time, for the time of the host.
TINY = (8, 1, 8)


class Maker:
    """Makes the steps, with their arguments."""

    def __init__(
        self, rank: int, devices: int, width: int, batch: int, tokens: int
    ) -> None:
        self.rank, self.key = rank, jax.random.key(0)
        self.shape = batch, tokens, width
        self.layers = [fpipe.Layer(apply, init, name="block")] * BLOCKS
        self.both = jax.devices()[::devices]
        self.params = {}

    def __call__(self, schedule: str, checkpoint: str, m: int):
        """A step, and the loss and the sum of the squared gradients that it
        computes.
        """
        if schedule == "transfer":
            return self.transfer(m), 0, 0
        if schedule in ("host_of_two", "host_of_one"):
            return self.host(schedule == "host_of_two", m), 0, 0
        if schedule == "unpipelined":
            raise ValueError("the scan worker has the unpipelined step")
        alone = schedule.startswith(ALONE)
        schedule = schedule.removeprefix(ALONE)
        step = self.step(self.both, self.shape, schedule, checkpoint, m)
        if alone:
            return alone_of(step), 0, 0
        loss, grads = step()
        squares = fpipe.optim.global_norm(grads) ** 2
        return lambda: jax.block_until_ready(step()), loss, squares

    def step(self, devices, shape, schedule, checkpoint, m):
        """A step of a pipe, whose inputs are where they are read."""
        pipe = fpipe.Pipe(
            self.layers,
            balance=BALANCE[schedule],
            devices=devices,
            chunks=m,
            checkpoint=checkpoint,
            schedule=schedule,
        )
        given = jax.ShapeDtypeStruct(shape, jnp.float32)
        key = devices[-1], schedule, shape
        if key not in self.params:
            self.params[key] = pipe.init(self.key, given)
        params = self.params[key]
        # The same in both processes, and as the other worker has them.
        arrays = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
        places = devices[0], devices[(len(BALANCE[schedule]) - 1) % len(devices)]
        x, t = (
            jax.device_put(array, place)
            if place.process_index == jax.process_index()
            else given
            for array, place in zip(arrays, places, strict=True)
        )
        call = pipe.value_and_grad(loss_fn)
        return lambda: call(params, x, t)

    def transfer(self, m: int):
        """A boundary goes to the other process, as a pipe sends it."""
        shape = self.shape[0] // m, *self.shape[1:]
        source, target = map(SingleDeviceSharding, self.both)
        if self.rank:
            array = jax.make_array_from_single_device_arrays(
                shape, source, [], dtype=np.float32
            )
        else:
            array = jax.device_put(np.ones(shape, np.float32), source)
        return lambda: jax.block_until_ready(jax.device_put(array, target))

    def host(self, several: bool, m: int):
        """A step whose programs take no time; `run` answers when it has been issued.
        The barrier before the next one waits for what it issued.
        """
        devices = self.both if several else jax.local_devices()
        if self.rank and not several:
            return lambda: None
        return self.step(devices, (m, *TINY[1:]), "eager_1f1b", "never", m)


def alone_of(step):
    """A step in which a process runs what it runs of the plan of another one, but sends
    nothing: what it would get it has already.
    """
    jax.block_until_ready(step())  # compiles
    issue, seen, brought = ReadyPlan.issue, [], {}

    def crosses(item):
        return isinstance(item, Move) and item.crosses

    def noted(ready, shares, slots):
        seen.append((ready, shares, list(slots)))

        def note(item):
            if not crosses(item.item):
                return item.call

            def call(*arrays):
                brought[item.number] = item.call(*arrays)
                return brought[item.number]

            return call

        issue(ready, with_calls(shares, note), slots)

    with unittest.mock.patch.object(ReadyPlan, "issue", noted):
        jax.block_until_ready(step())
    ((ready, shares, given),) = seen
    jax.block_until_ready(brought)

    def without(item):
        if not crosses(item.item):
            return item.call
        return lambda *arrays: brought[item.number]

    shares = with_calls(shares, without)

    def run():
        slots = list(given)
        ready.issue(shares, slots)
        jax.block_until_ready([array for array in slots if array is not None])

    return run


def main() -> None:
    options = json.loads(sys.argv[1])
    reply = replies()
    jax.config.update("jax_num_cpu_devices", options["devices"])
    rank, address = options.pop("rank"), f"127.0.0.1:{options.pop('port')}"
    fpipe.distributed.initialize(address, 2, rank, initialization_timeout=120)
    barrier = barrier_over(jax.devices()[:: options["devices"]])
    reply("jax", jax.__version__)
    serve(reply, Maker(rank, **options), barrier)


if __name__ == "__main__":
    main()
