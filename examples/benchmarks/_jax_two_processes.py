"""The JAX worker of `two_processes.py`, which starts two of these and tells them what
to run.
"""

import functools
import json
import sys
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from two_processes import (
    ALONE,
    HALF_IN_ONE,
    HALVES,
    IN_BOTH,
    ONE_STAGE,
    UNSENT,
    replies,
    serve,
)

import fpipe
import fpipe.distributed

BLOCKS, HEADS = 8, 8
BALANCE = {
    "gpipe": [4, 4],
    "1f1b": [4, 4],
    "eager_1f1b": [4, 4],
    "interleaved_1f1b": [2, 2, 2, 2],
}


def init(key, x):
    width = x.shape[-1]
    shapes = {
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    params = {}
    for k, (name, shape) in enumerate(shapes.items()):
        weights = jax.random.normal(jax.random.fold_in(key, k), shape) / shape[0] ** 0.5
        params[name] = weights, jnp.zeros(shape[1])
    return params | {
        name: (jnp.ones(width), jnp.zeros(width)) for name in ("norm1", "norm2")
    }


def dense(params, x):
    weights, bias = params
    return x @ weights + bias


def norm(params, x):
    scale, bias = params
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale + bias


def apply(params, x):
    batch, tokens, width = x.shape
    qkv = dense(params["qkv"], norm(params["norm1"], x))
    q, k, v = jnp.moveaxis(qkv.reshape(batch, tokens, 3, HEADS, width // HEADS), 2, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (width // HEADS) ** 0.5
    scores = jnp.where(jnp.tri(tokens, dtype=bool), scores, -jnp.inf)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    x = x + dense(params["out"], mixed.reshape(x.shape))
    return x + dense(
        params["down"], jax.nn.gelu(dense(params["up"], norm(params["norm2"], x)))
    )


def loss_fn(y, t):
    return jnp.mean((y - t) ** 2)


def unpipelined(remat: bool, m: int):
    """The same step on one device: one microbatch after the other.

    It takes the parameters of any number of blocks.
    """

    def half(params, x):
        for p in params:
            x = apply(p, x)
        return x

    if remat:
        half = jax.checkpoint(half)

    def loss_of(params, x, t):
        middle = len(params) // 2
        return loss_fn(half(params[middle:], half(params[:middle], x)), t) / m

    def step(params, x, t):
        def microbatch(total, piece):
            return jax.tree.map(
                jnp.add, total, jax.value_and_grad(loss_of)(params, *piece)
            ), None

        pieces = jax.tree.map(lambda a: a.reshape(m, -1, *a.shape[1:]), (x, t))
        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(microbatch, zeros, pieces)[0]

    return jax.jit(step)


def without_transfers(call):
    """A function that traces `call` as if each device received what it sends."""

    def traced(*arrays):
        with unittest.mock.patch.object(jax.lax, "ppermute", lambda a, *_: a):
            return call(*arrays)

    return traced


@jax.jit
def squares(grads):
    return sum(jnp.sum(g * g) for g in jax.tree.leaves(grads))


class Maker:
    """Makes the steps, with their arguments."""

    def __init__(self, rank: int, width: int, batch: int, tokens: int) -> None:
        self.rank, self.key = rank, jax.random.key(0)
        self.layers = [fpipe.Layer(apply, init, name="block")] * BLOCKS
        # The same in both processes.
        self.arrays = np.random.default_rng(0).standard_normal(
            (2, batch, tokens, width), np.float32
        )
        self.params = {}

    def __call__(self, schedule: str, checkpoint: str, m: int):
        """A step, and the loss and the sum of the squared gradients that it
        computes.
        """
        # What runs on both cores shows what they do for each other's speed.
        if self.rank and schedule in ("unpipelined", HALF_IN_ONE, ONE_STAGE):
            return lambda: None, 0, 0
        shape = jax.ShapeDtypeStruct(self.arrays.shape[1:], jnp.float32)
        if schedule in ("unpipelined", IN_BOTH, *HALVES):
            if schedule not in self.params:
                count = BLOCKS // 2 if schedule in HALVES else BLOCKS
                keys = [jax.random.fold_in(self.key, k) for k in range(count)]
                self.params[schedule] = [init(key, shape) for key in keys]
            call = unpipelined(checkpoint == "always", m)
            x, t = map(jnp.asarray, self.arrays)
        elif schedule == ONE_STAGE or schedule.startswith(ALONE):
            count = BLOCKS if schedule == ONE_STAGE else BLOCKS // 2
            pipe = fpipe.Pipe(
                self.layers[:count],
                devices=jax.local_devices(),
                balance=[count],
                chunks=m,
                checkpoint=checkpoint,
                schedule="1f1b" if schedule == ONE_STAGE else schedule[len(ALONE) :],
                executor="scan",
            )
            self.params[schedule] = pipe.init(self.key, shape)
            call = jax.jit(pipe.value_and_grad(loss_fn))
            x, t = map(jnp.asarray, self.arrays)
        else:
            sends = not schedule.startswith(UNSENT)
            schedule = schedule.removeprefix(UNSENT)
            pipe = fpipe.Pipe(
                self.layers,
                balance=BALANCE[schedule],
                devices=jax.devices(),
                chunks=m,
                checkpoint=checkpoint,
                schedule=schedule,
                executor="scan",
            )
            if schedule not in self.params:
                self.params[schedule] = pipe.init(self.key, shape)
            call = jax.jit(pipe.value_and_grad(loss_fn))
            if not sends:
                call = without_transfers(call)
            assert pipe.mesh is not None
            everywhere = NamedSharding(pipe.mesh, P())
            x, t = (
                jax.make_array_from_process_local_data(everywhere, a)
                for a in self.arrays
            )
        step = functools.partial(call, self.params[schedule], x, t)
        loss, grads = step()
        return lambda: jax.block_until_ready(step()), loss, squares(grads)


def barrier_over(devices):
    """A function that waits for all processes.

    Arguments:
        devices: one of each process.
    """
    mesh = Mesh(np.array(devices), ("process",), axis_types=(AxisType.Auto,))
    one = jax.make_array_from_process_local_data(
        NamedSharding(mesh, P("process")), np.ones(1, np.float32)
    )
    total = jax.jit(jnp.sum)

    def barrier() -> None:
        jax.block_until_ready(total(one))

    # The first one compiles.
    barrier()
    return barrier


def main() -> None:
    options = json.loads(sys.argv[1])
    reply = replies()
    rank, address = options.pop("rank"), f"127.0.0.1:{options.pop('port')}"
    fpipe.distributed.initialize(address, 2, rank, initialization_timeout=120)
    assert len(jax.devices()) == 2, jax.devices()
    barrier = barrier_over(jax.devices())
    reply("jax", jax.__version__)
    serve(reply, Maker(rank, **options), barrier)


if __name__ == "__main__":
    main()
