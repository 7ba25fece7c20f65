"""Checkpoints of orbax that several processes save and load: what the workers of
`test_processes.py` do with them, and what one process does.

In the folder are two runs, which continue one another under other partitions:

    one    saved by one process, after a step
    two    saved by two processes, after another step
"""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import fpipe
import fpipe.distributed
import fpipe.optim
from tests.helpers import WIDTH, counter, dense, mse

ROWS = 8


def times() -> fpipe.Layer:
    """A parameter that is an integer, one in bfloat16."""

    def init(key, x):
        del key
        scale = jnp.linspace(0.5, 1.0, x.shape[-1], dtype=jnp.bfloat16)
        return {"n": jnp.full(3, 1, jnp.int32), "scale": scale}

    def apply(params, x):
        n = params["n"][0].astype(jnp.bfloat16)
        return x * (params["scale"] * n).astype(x.dtype)

    return fpipe.Layer(apply, init, name="times")


LAYERS = [dense(), counter(), times(), dense()]


def optimizer():
    """The norm of all gradients, two moments, a frozen layer."""
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2))
    return fpipe.optim.per_stage(tx, frozen=lambda path, leaf: path.startswith("3/b"))


class Run:
    """Training with a pipe: parameters, states of layers, moments and a key."""

    def __init__(self, devices, balance, **options):
        self.pipe = fpipe.Pipe(LAYERS, balance, devices, chunks=4, **options)
        self.tx = optimizer()
        x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
        self.params = self.pipe.init(jax.random.key(0), x)
        self.state = self.pipe.init_state(x)
        self.moments = self.tx.init(self.params)
        self.key = jax.random.key(5)

    @property
    def canonical(self):
        """All of it as plain optax has it, in every process."""
        tree = {
            "params": self.pipe.gather(self.params),
            "state": self.pipe.gather_state(self.state),
            "moments": fpipe.optim.gather(self.moments),
        }
        return jax.device_get({**tree, "key": jax.random.key_data(self.key)})

    def train(self, step):
        x = np.linspace(-step, step, ROWS * WIDTH, dtype=np.float32)
        x = np.cos(7 * x).reshape(ROWS, WIDTH)
        self.key, own = jax.random.split(self.key)
        (_, self.state), grads = self.pipe.value_and_grad(mse)(
            self.params, x, np.sin(x), state=self.state, key=own, train=True
        )
        with jax.numpy_dtype_promotion("standard"):  # optax needs it
            updates, self.moments = self.tx.update(grads, self.moments, self.params)
        self.params = fpipe.optim.apply_updates(self.params, updates)

    def save(self, folder: pathlib.Path, step: int):
        with ocp.CheckpointManager(folder.absolute()) as manager:
            manager.save(step, args=ocp.args.StandardSave(self.canonical))

    @property
    def spread(self):
        """The same, and no device or process has all of it."""
        tree = {
            "params": self.params,
            "state": self.state,
            "moments": self.moments,
            "key": np.asarray(jax.random.key_data(self.key)),
        }
        return fpipe.distributed.spread(tree)

    def save_spread(self, folder: pathlib.Path, step: int):
        with ocp.CheckpointManager(folder.absolute()) as manager:
            manager.save(step, args=ocp.args.StandardSave(self.spread))

    def load(self, folder: pathlib.Path, step: int, spread: bool = False):
        like = self.spread if spread else self.canonical
        with ocp.CheckpointManager(folder.absolute()) as manager:
            saved = manager.restore(step, args=ocp.args.StandardRestore(like))
        if spread:
            saved["state"] = self.pipe.gather_state(saved["state"])
        self.params = self.pipe.place(saved["params"])
        self.state = saved["state"]
        self.moments = fpipe.optim.place(saved["moments"], self.params, self.tx)
        self.key = jax.random.wrap_key_data(saved["key"])


def continued(folder: pathlib.Path):
    """Two processes continue what one has saved, and save; what they have loaded, and
    saved, and what the scan executor loads of that.
    """
    devices = jax.devices()
    run = Run(devices[:: len(devices) // 2], [1, 3])
    run.load(folder / "one", 1)
    found = [run.canonical]
    run.train(2)
    run.save(folder / "two", 2)
    found.append(run.canonical)
    run.save_spread(folder / "spread", 2)
    scan = Run(devices[:: len(devices) // 2], [3, 1], executor="scan")
    scan.load(folder / "two", 2)
    return [*found, scan.canonical]


def loaded(folder: pathlib.Path):
    """What any number of processes loads, each a stage."""
    devices = jax.devices()
    count = jax.process_count()
    run = Run(devices[:: len(devices) // count], [1] * (count - 1) + [5 - count])
    run.load(folder / "two", 2)
    found = [run.canonical]
    run.load(folder / "spread", 2, spread=True)
    found.append(run.canonical)
    run.train(3)
    return [*found, run.canonical]


def save_for_ever(folder: pathlib.Path):
    """Saves of parameters that are the number of the checkpoint, until one process is
    killed.
    """
    layer = fpipe.Layer(
        lambda params, x: x @ params, lambda key, x: jnp.zeros((256, 256))
    )
    pipe = fpipe.Pipe([layer] * 2, devices=jax.devices(), chunks=1)
    params = pipe.init(jax.random.key(0), jnp.zeros((4, 256)))
    whole = jax.device_get(pipe.gather(params))
    with ocp.CheckpointManager(folder.absolute()) as manager:
        for step in itertools.count():
            tree = tuple(array + step for array in whole)
            manager.save(step, args=ocp.args.StandardSave(tree))
            manager.wait_until_finished()
