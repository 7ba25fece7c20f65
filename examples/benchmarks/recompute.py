"""What recomputations as actions of their own gain, and what copies to the host cost.

1. Sleeping stages, on four simulated CPU devices: each action sleeps a unit (a backward
   two), so that devices work side by side however few cores there are. The time that a
   recording of a step tells, beside the simulated one, with the recomputation inside of
   the backward and as an action of its own.
2. A transformer of four stages on the devices of the machine (on a CPU, simulated ones,
   where only the sum of all work can be seen): seconds of a step, for each option in
   turn, over those of `recompute="with_backward"`. `--executor scan` times the other
   executor.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _asleep import asleep
from _jax_two_processes import apply, init, loss_fn

import fpipe
from fpipe import schedules

DEVICES = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "with_backward": {"recompute": "with_backward"},
    "early": {"recompute": "early"},
    "offload": {"offload": 2},
    "never, offload": {"checkpoint": "never", "offload": 2},
}


# --- stages that sleep ---


# So many FLOPs at least, for XLA not to take a program for a short one.
WIDE = 1024


def sleeping(seconds: float) -> fpipe.Layer:
    """`x * p`, asleep in forward, input gradient and weight gradient. The backward
    waits for the result of the forward, so that a recomputation sleeps too.
    """

    @jax.custom_vjp
    def times(p: jax.Array, x: jax.Array) -> jax.Array:
        return asleep(seconds, x * p)

    def forward(p: jax.Array, x: jax.Array) -> Any:
        y = times(p, x)
        return y, (p, x, y)

    def backward(residuals: Any, g: jax.Array) -> Any:
        p, x, y = residuals
        of_x = asleep(seconds, g * p, y)
        # One after the other: two could sleep at once.
        return asleep(seconds, (g * x).sum(0), of_x), of_x

    times.defvjp(forward, backward)
    return fpipe.Layer(times, lambda key, x: jnp.ones(x.shape[-1]))


def time_sleeping(names: list[str], m: int, unit: float, repeats: int) -> None:
    print(f"F = R = I = W = {unit * 1e3:g} ms, m={m}: medians of {repeats} recordings")
    print("schedule      recompute       simulated ms   recorded ms   ratio")
    x = jnp.ones((m, WIDE))
    for name in names:
        for recompute in ("with_backward", "early"):
            pipe = fpipe.Pipe(
                [sleeping(unit)] * DEVICES,
                chunks=m,
                checkpoint="always",
                schedule=name,
                recompute=recompute,
            )
            schedule = pipe.make_schedule(m)
            # The last stage has no `R`: its backwards wait for no cotangent. Those that
            # follow their forward directly recompute nothing.
            apart = [recompute == "early"] * (DEVICES - 1) + [name != "gpipe"]
            inside = [0.0 if n else 1.0 for n in apart]
            costs = schedules.Costs(
                F=unit,
                I=[unit * (1 + n) for n in inside],
                W=unit,
                R=unit,
            )
            simulated = schedules.simulate(schedule, costs).makespan
            params = pipe.init(jax.random.key(0), x)
            # With the gradient of `x`: else the first stage would have no input
            # gradient to compute.
            step = pipe.value_and_grad(jnp.mean, argnums=(0, 1))
            jax.block_until_ready(step(params, x))
            taken: list[float] = []
            for _ in range(repeats):
                with fpipe.record(pipe) as recording:
                    step(params, x)
                taken.append(recording.makespan)
            took = statistics.median(taken)
            print(
                f"{name:12s}  {recompute:14s} {simulated * 1e3:13.0f} "
                f"{took * 1e3:13.0f} {took / simulated:7.2f}",
                flush=True,
            )


# --- a transformer ---


def time_transformer(
    schedule: str,
    names: list[str],
    blocks: int,
    width: int,
    tokens: int,
    m: int,
    repeats: int,
    executor: str,
) -> None:
    rows = np.random.default_rng(0).standard_normal((2, 4 * m, tokens, width))
    x, t = map(jnp.asarray, rows.astype(np.float32))
    layers = [fpipe.Layer(apply, init, name="block")] * (blocks * DEVICES)
    steps: dict[str, Any] = {}
    params: Any = None
    for name in names:
        pipe = fpipe.Pipe(
            layers,
            [blocks] * DEVICES,
            chunks=m,
            schedule=schedule,
            executor=executor,
            **{"checkpoint": "always", **OPTIONS[name]},
        )
        if params is None:
            params = pipe.init(jax.random.key(0), x)
        step = pipe.value_and_grad(loss_fn)
        steps[name] = jax.jit(step) if executor == "scan" else step
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for n in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(params, x, t))
            if n:  # the first compiles
                taken[name].append(time.perf_counter() - start)
    print(
        f"{executor}, {schedule}, {blocks} blocks of width {width} a stage, m={m} of "
        f"4 x {tokens} tokens: medians of {repeats} alternating runs"
    )
    print("option            seconds   over with_backward")
    base = statistics.median(taken["with_backward"])
    for name, own in taken.items():
        took = statistics.median(own)
        print(f"{name:16s} {took:8.3f} {took / base:20.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--unit", type=float, default=20.0, help="of sleep, in ms")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=2, help="for each stage")
    parser.add_argument(
        "--schedules", nargs="*", default=["gpipe", "1f1b", "eager_1f1b", "zb_h1"]
    )
    others = [name for name in OPTIONS if name != "with_backward"]
    parser.add_argument("--options", nargs="*", default=others, choices=others)
    parser.add_argument("--transformer", nargs="*", default=["1f1b", "eager_1f1b"])
    parser.add_argument("--executor", choices=["placed", "scan"], default="placed")
    arguments = parser.parse_args()
    m, repeats = arguments.microbatches, arguments.repeats
    if len(jax.devices()) < DEVICES:
        jax.config.update("jax_platforms", "cpu")
    if arguments.schedules:
        time_sleeping(arguments.schedules, m, arguments.unit / 1e3, repeats)
    for schedule in arguments.transformer:
        print()
        time_transformer(
            schedule,
            ["with_backward", *arguments.options],
            arguments.blocks,
            arguments.width,
            arguments.tokens,
            m,
            repeats,
            arguments.executor,
        )


if __name__ == "__main__":
    # Before the first use of JAX. On other platforms it changes nothing.
    jax.config.update("jax_num_cpu_devices", DEVICES)
    main()
