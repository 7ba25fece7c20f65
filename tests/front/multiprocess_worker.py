"""One of the processes that `test_multiprocess.py` starts: it joins the others and
prints what it computed as JSON lines.
"""

import argparse
import dataclasses
import faulthandler
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import fpipe
import fpipe.distributed
from tests.front.workers import encoded, recording
from tests.helpers import (
    HANG,
    Case,
    add,
    borrower,
    counter,
    dense,
    dropout,
    keep,
    mse,
    owner,
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, how it is cut over 2 or over 4 devices, and the schedule.

    Attributes:
        shared: whether each stage has two devices, over which parameters are cut.
        across: whether these are of two processes.
    """

    layers: list[fpipe.Layer]
    balance: dict[int, list[int]]
    schedule: str = "eager_1f1b"
    shared: bool = False
    across: bool = False

    @property
    def case(self) -> Case:
        return Case(self.layers, chunks=4, rows=8)


# A skip over several stages, a tied weight, states, dropout, and a width of its own: no
# two stages are alike.
DIFFERENT = [
    owner(),
    keep(),
    counter(),
    dense(6),
    dense(),
    add(),
    dropout(),
    borrower(),
]
BY_COLUMNS = dataclasses.replace(dense(), spec={"w": P(None, "model"), "b": None})
PROBLEMS = {
    "shared": Problem([BY_COLUMNS] * 4, {4: [2, 2]}, shared=True),
    "across": Problem([BY_COLUMNS] * 4, {4: [2, 2]}, shared=True, across=True),
    "uniform": Problem([dense()] * 4, {2: [2, 2], 4: [1, 1, 1, 1]}),
    "different": Problem(DIFFERENT, {2: [4, 4], 4: [2, 2, 2, 2]}),
    "interleaved": Problem([dense()] * 8, {2: [2] * 4, 4: [1] * 8}, "interleaved_1f1b"),
}


def solve(name):
    """Parameters, loss, gradients and states of a problem, each gathered."""
    problem, made = PROBLEMS[name], []
    case = problem.case
    devices = jax.devices()
    over: dict[str, Any] = {"devices": devices}
    if problem.shared:
        grid = np.array(devices).reshape(-1, 2)
        grid = grid.T if problem.across else grid
        over = {"mesh": Mesh(grid, ("stage", "model"))}
    pipe = fpipe.Pipe(
        recording(case.layers, made),
        problem.balance[len(devices)],
        **over,
        chunks=case.chunks,
        schedule=problem.schedule,
        executor="scan",
    )
    params = pipe.init(jax.random.key(0), case.x)
    gathered = pipe.gather(params)
    placed = pipe.place(gathered)
    for a, b in zip(params.arrays, placed.arrays, strict=True):
        assert a.sharding == b.sharding
        for own, again in zip(a.addressable_shards, b.addressable_shards, strict=True):
            assert own.device == again.device
            np.testing.assert_array_equal(own.data, again.data)

    stateful = any(layer.asks("state") for layer in case.layers)
    needs = {
        "key": jax.random.key(4),
        "state": pipe.init_state(case.x) if stateful else None,
    }
    step = pipe.value_and_grad(mse)
    x, target = on_all(pipe.mesh, case.x, case.target)

    def train(params, x, target, needs):
        return step(params, x, target, train=True, **needs)

    def loss_of(params, x, target):  # closes over the key and the states
        y = pipe(params, x, train=True, **needs)
        return mse(y[0] if stateful else y, target)

    result, grads = jax.jit(train)(placed, x, target, needs)
    found = {
        "made": sorted(set(made)),
        "params": encoded(gathered),
        "step": encoded((result, pipe.gather(grads))),
    }
    if (
        name == "uniform"
    ):  # calls that are no part of a program, with arrays of this process
        result, grads = train(placed, case.x, case.target, needs)
        found["call"] = encoded((result, pipe.gather(grads)))
        found["grad"] = encoded(pipe.gather(jax.grad(loss_of)(placed, x, target)))
        found["raised"] = bad_gradient()
    if name == "different" and len(devices) == 4:
        found["grad"] = encoded(
            pipe.gather(jax.jit(jax.grad(loss_of))(placed, x, target))
        )
    return found


def bad_gradient():
    """What is raised of a NaN that is in a gradient of one process alone."""
    root = fpipe.Layer(lambda p, x: jnp.sqrt(x * p), lambda key, x: jnp.zeros(4))
    devices = jax.devices()
    pipe = fpipe.Pipe([root, fpipe.fn(jnp.sin)], [1, 1], devices, 2, executor="scan")
    x = on_all(pipe.mesh, np.zeros((4, 4), np.float32))[0]
    params = pipe.init(jax.random.key(0), x)
    with jax.debug_nans(True):
        try:
            pipe.value_and_grad(jnp.mean)(params, x)
        except FloatingPointError as error:
            return str(error)


def on_all(mesh, *arrays):
    """Arrays that every process has, on every device."""
    everywhere = NamedSharding(mesh, P())
    return [
        jax.make_array_from_process_local_data(everywhere, np.asarray(a))
        for a in arrays
    ]


def train_for_ever():
    """Steps until somebody dies."""
    case = PROBLEMS["uniform"].case
    pipe = fpipe.Pipe(
        case.layers, devices=jax.devices(), chunks=case.chunks, executor="scan"
    )
    params, step = (
        pipe.init(jax.random.key(0), case.x),
        jax.jit(pipe.value_and_grad(mse)),
    )
    x, target = on_all(pipe.mesh, case.x, case.target)
    for n in range(10**9):
        loss, grads = fpipe.distributed.watched(step(params, x, target), "a step")
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)
        print(json.dumps({"step": n, "loss": float(loss)}), flush=True)
        time.sleep(0.05)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--coordinator")
    parser.add_argument("--process", type=int)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--shutdown", type=int, default=HANG)
    parser.add_argument("--timeout", type=float, default=HANG)
    parser.add_argument("what", nargs="+")
    args = parser.parse_args()
    faulthandler.dump_traceback_later(HANG - 60)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    jax.config.update(
        "jax_compilation_cache_dir",
        str(pathlib.Path(__file__).parents[2] / ".cache" / "jax"),
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    fpipe.distributed.initialize(
        args.coordinator,
        2,
        args.process,
        timeout=args.timeout,
        initialization_timeout=HANG,
        heartbeat_timeout_seconds=HANG,
        shutdown_timeout_seconds=args.shutdown,
    )
    for what in args.what:
        if what == "forever":
            train_for_ever()
        started = time.monotonic()
        result = solve(what)
        print(
            json.dumps(
                {"problem": what, "seconds": time.monotonic() - started, **result}
            ),
            flush=True,
        )
    fpipe.distributed.shutdown()


if __name__ == "__main__":
    main()
