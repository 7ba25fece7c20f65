"""fpipe on accelerators: that every way of running is right there, and what it costs
beside the unpipelined step.

1. Equality: a small transformer with a skip and dropout, for every schedule, against
   the plain composition (`fpipe.testing.assert_equals_sequential`), in float32 with the
   highest precision of matrix products and in bfloat16. Stages go round over the
   devices that there are, so one GPU will do; then every other stage is on the host's
   CPU.
2. Time: a step of the transformer of `two_processes.py` in four stages on one device,
   beside the unpipelined jitted step that adds up gradients over the microbatches:
   medians over alternating repeats.
3. Dispatch: how long the host is busy with a step, while the device works.

`--launch` runs a comparison in place of these: what a launch costs, and which flags and
ways to dispatch change that (`_launch.py`).
"""

import argparse
import dataclasses
import functools
import statistics
import time

import _launch
import jax
import jax.numpy as jnp
import numpy as np
from _jax_two_processes import BLOCKS, apply, init, loss_fn, unpipelined

import fpipe
import fpipe.testing

# Schedules that put two stages on each device, there and back; and any number of them.
# These alone the scan executor runs on one device.
FOLDED = ("zb_v", "v_half", "v_min", "dualpipe_v")
SEVERAL = (*FOLDED, "interleaved_1f1b", "looped_bfs")
SCAN = ("interleaved_1f1b", "looped_bfs", "zb_v", "dualpipe_v")
MODES = ("always", "except_last", "never")


def model() -> list[fpipe.Layer]:
    """Blocks with a skip around the middle ones and dropout between."""

    def drop(x, *, key, train):
        return (
            x
            if key is None or not train
            else jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x / 0.9, 0)
        )

    @fpipe.skippable(stash=["skip"])
    def first(params, x, *, carry):
        return apply(params, x), fpipe.stash(carry, "skip", jnp.tanh(x))

    @fpipe.skippable(pop=["skip"])
    def last(params, x, *, carry):
        skip, carry = fpipe.pop(carry, "skip")
        return apply(params, x + skip.astype(x.dtype)), carry

    begin, end = (dataclasses.replace(layer, init=init) for layer in (first, last))
    return [
        begin,
        fpipe.fn(drop),
        fpipe.Layer(apply, init, name="block"),
        fpipe.fn(drop),
        end,
        fpipe.fn(drop),
    ]


def check(pipe: fpipe.Pipe, x: jax.Array, t: jax.Array, tolerance: float | None) -> str:
    """`ok`, or what is wrong."""
    try:
        fpipe.testing.assert_equals_sequential(
            pipe,
            x,
            t,
            loss_fn=loss_fn,
            key=jax.random.key(3),
            train=True,
            tolerance=tolerance,
        )
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "ok"


def equality(
    devices: list, dtype, tolerance: float | None, every: int = 1, rows: int = 8
) -> None:
    """Every schedule, or each `every`th, with one of the checkpoint modes, in turn."""
    x, t = map(
        jnp.asarray,
        np.random.default_rng(0).standard_normal((2, rows, 16, 64), np.float32),
    )
    cases = [
        ("placed", name) for name in fpipe.schedules.NAMES if name != "forward_only"
    ] + [("scan", name) for name in SCAN]
    cases = cases[::every]
    wrong, started = [], time.perf_counter()
    for n, (executor, name) in enumerate(cases):
        several = name in SEVERAL
        here = (
            devices[:1] if executor == "scan" else devices[:2] if several else devices
        )
        balance = [3, 3] if executor == "scan" and name in FOLDED else [1, 2, 2, 1]
        pipe = fpipe.Pipe(
            model(), balance, here, 4, MODES[n % 3], name, executor, compute_dtype=dtype
        )
        said = check(pipe, x, t, tolerance)
        if said != "ok":
            wrong.append(f"  {executor} {name} {MODES[n % 3]}: {said}")
    kind, took = jnp.dtype(dtype or jnp.float32).name, time.perf_counter() - started
    print(
        "\n".join(
            [
                f"{kind}: {len(cases) - len(wrong)} of {len(cases)} ok, {took:.0f} s",
                *wrong,
            ]
        ),
        flush=True,
    )


def times(width: int, tokens: int, m: int, repeats: int) -> None:
    x, t = map(
        jnp.asarray,
        np.random.default_rng(0).standard_normal((2, 32, tokens, width), np.float32),
    )
    params = [
        init(jax.random.fold_in(jax.random.key(0), k), x[:1]) for k in range(BLOCKS)
    ]
    layers = [fpipe.Layer(apply, init, name="block")] * BLOCKS
    print(
        f"\nwidth {width}, 32 x {tokens} tokens, m={m}: medians of {repeats} "
        "alternating runs, four stages on one device"
    )
    print("checkpoint  step                        seconds   over plain   host busy")
    for checkpoint in ("never", "always"):
        runs = {
            "plain": functools.partial(
                unpipelined(checkpoint == "always", m), params, x, t
            )
        }
        for executor, schedule in (
            ("placed", "eager_1f1b"),
            ("placed", "zb_h1"),
            ("scan", "interleaved_1f1b"),
        ):
            here = jax.devices()[:1] * (4 if executor == "placed" else 1)
            pipe = fpipe.Pipe(layers, [2] * 4, here, m, checkpoint, schedule, executor)
            step = pipe.value_and_grad(loss_fn)
            step = jax.jit(step) if executor == "scan" else step
            runs[f"{executor} {schedule}"] = functools.partial(
                step, pipe.place(params), x, t
            )
        taken: dict[str, list[float]] = {name: [] for name in runs}
        host: dict[str, list[float]] = {name: [] for name in runs}
        for n in range(repeats + 2):
            for name, run in runs.items():
                start = time.perf_counter()
                made = run()
                handed = time.perf_counter()
                jax.block_until_ready(made)
                if n > 1:  # the first compile
                    host[name].append(handed - start)
                    taken[name].append(time.perf_counter() - start)
        base = statistics.median(taken["plain"])
        for name in runs:
            took, busy = statistics.median(taken[name]), statistics.median(host[name])
            print(
                f"{checkpoint:11} {name:25} {took:9.4f} {took / base:12.3f} "
                f"{busy:11.4f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", choices=["equality", "time"])
    launch = parser.add_argument_group("--launch, and what it takes")
    launch.add_argument(
        "--launch", action="store_true", help="compare variants of launching"
    )
    launch.add_argument(
        "--budget", type=float, default=360, help="seconds for all cases together"
    )
    launch.add_argument("--size", choices=_launch.SIZES, default="full")
    for name, known in (("models", _launch.MODELS), ("variants", _launch.VARIANTS)):
        launch.add_argument(f"--{name}", nargs="+", choices=known, default=list(known))
    options = parser.parse_args()
    if options.launch:
        raise SystemExit(_launch.compare(options))
    devices = jax.devices()
    print(
        f"jax {jax.__version__}, {len(devices)} x {devices[0].device_kind} "
        f"({devices[0].platform})"
    )
    if options.only != "time":
        with jax.default_matmul_precision("highest"):
            print("\nEquality, stages on the devices in turn")
            turns = [devices[s % len(devices)] for s in range(4)]
            equality(turns, None, 2e-5)
            equality(turns, jnp.bfloat16, None, 4)
            if devices[0].platform != "cpu":
                print("\nEquality, every other stage on the host's CPU")
                host = jax.devices("cpu")[0]
                equality([devices[0], host, devices[-1], host], None, 2e-5, 4)
    if options.only != "equality":
        times(options.width, options.tokens, options.microbatches, options.repeats)


if __name__ == "__main__":
    main()
