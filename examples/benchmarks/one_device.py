"""What the scan executor costs on one device, where a pipeline can gain nothing, and
what it holds.

1. Time: the transformer of `two_processes.py` in several stages on one device
   (`"interleaved_1f1b"` puts them there) beside the unpipelined jitted
   gradient-accumulation step, pinned to one core. The goal is at most 5 % more.
2. Memory: the temporary memory and the compile time (median of three) of a step over
   four devices, as the number of microbatches of one size grows; and the inputs in what
   a device holds: they are on every device, or lie over them if they are large.
"""

import argparse
import functools
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from _jax_two_processes import BLOCKS, apply, init, loss_fn, unpipelined
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fpipe

CHECKPOINTS = ("never", "always")


def times(
    width: int,
    tokens: int,
    m: int,
    repeats: int,
    counts: list[int],
    checkpoints: list[str],
) -> None:
    x, t = map(
        jnp.asarray,
        np.random.default_rng(0).standard_normal((2, 32, tokens, width), np.float32),
    )
    params = [
        init(jax.random.fold_in(jax.random.key(0), k), x[:1]) for k in range(BLOCKS)
    ]
    layers = [fpipe.Layer(apply, init, name="block")] * BLOCKS
    print(
        f"width {width}, 32 x {tokens} tokens, m={m}: medians of {repeats} alternating "
        "runs on one core"
    )
    print("checkpoint   stages   seconds   over plain")
    for checkpoint in checkpoints:
        plain = unpipelined(checkpoint == "always", m)
        runs = {0: functools.partial(plain, params, x, t)}
        for stages in counts:
            pipe = fpipe.Pipe(
                layers,
                [BLOCKS // stages] * stages,
                jax.devices()[:1],
                chunks=m,
                checkpoint=checkpoint,
                schedule="interleaved_1f1b",
                executor="scan",
            )
            step, placed = jax.jit(pipe.value_and_grad(loss_fn)), pipe.place(params)
            runs[stages] = functools.partial(step, placed, x, t)
        taken: dict[int, list[float]] = {n: [] for n in runs}
        for n in range(repeats + 1):
            for stages, run in runs.items():
                start = time.perf_counter()
                jax.block_until_ready(run())
                if n:  # the first compiles
                    taken[stages].append(time.perf_counter() - start)
        base = statistics.median(taken[0])
        for stages, own in taken.items():
            took = statistics.median(own)
            print(
                f"{checkpoint:10} {stages or 'plain':>8} {took:9.3f} "
                f"{took / base:12.2f}",
                flush=True,
            )


def memory(width: int, tokens: int, rows: int) -> None:
    layers = [fpipe.Layer(apply, init, name="block")] * BLOCKS
    print(
        f"\nwidth {width}, microbatches of {rows} x {tokens} tokens, four devices, "
        "eager_1f1b; MiB of one device"
    )
    print("checkpoint     m   temporary   compile s   parameters   inputs and targets")
    for checkpoint in CHECKPOINTS:
        for m in (8, 32, 128, 512):
            pipe = fpipe.Pipe(
                layers, [2] * 4, chunks=m, checkpoint=checkpoint, executor="scan"
            )
            placed = pipe.init(jax.random.key(0), jnp.zeros((rows, tokens, width)))
            # As a call outside of `jit` lays it: over the stages where that saves more
            # than 16 MiB, else on all of them.
            assert pipe.mesh is not None
            lie = NamedSharding(pipe.mesh, P("stage") if m > 128 else P())
            x = jax.ShapeDtypeStruct(
                (rows * m, tokens, width), jnp.float32, sharding=lie
            )
            taken, analysis = [], None
            for _ in range(3):
                start = time.perf_counter()
                step = jax.jit(
                    pipe.value_and_grad(lambda y, t: loss_fn(y, t))
                )  # a function that nobody has traced
                analysis = step.lower(placed, x, x).compile().memory_analysis()
                taken.append(time.perf_counter() - start)
            took = statistics.median(taken)
            held = sum(a.nbytes for a in placed.arrays) / 4
            assert analysis is not None
            parts = [
                analysis.temp_size_in_bytes,
                held,
                analysis.argument_size_in_bytes - held,
            ]
            temporary, own, inputs = (n / 2**20 for n in parts)
            print(
                f"{checkpoint:10} {m:5} {temporary:11.2f} {took:11.2f} {own:12.2f} "
                f"{inputs:20.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--checkpoints", nargs="+", choices=CHECKPOINTS, default=CHECKPOINTS
    )
    parser.add_argument(
        "--memory", action="store_true", help="the second table, with all cores"
    )
    options = parser.parse_args()
    if not options.memory:  # before JAX starts its threads
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    jax.config.update("jax_num_cpu_devices", 4)
    print(f"jax {jax.__version__}, {jax.devices()[0].platform}")
    if options.memory:
        memory(options.width, options.tokens, rows=4)
    else:
        times(
            options.width,
            options.tokens,
            options.microbatches,
            options.repeats,
            options.stages,
            options.checkpoints,
        )


if __name__ == "__main__":
    main()
