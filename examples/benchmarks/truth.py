"""What `Pipe.plan` says before a step runs, beside what is measured when it does.

The models are those of the three examples (`train_unet.py`, `train_lm.py`,
`train_resnet.py`), made small, over four devices. The script ends with 1 if it misses a
goal. Five parts:

1. Peak bytes under the placed executor. While a step runs, all live arrays
   (`jax.live_arrays()`) are counted after each program and each transfer, when what it
   makes is there and nothing has been dropped yet: that is when most is alive. An array
   that several objects share, or that is deleted, counts once, or not at all. The
   maximum of each device is set beside the `peak` of its row in the plan. The goal is a
   ratio within 5 % for every device. What a program needs for itself while it runs is
   no array, and a CPU device does not tell it; on GPUs `peak_bytes_in_use` of the whole
   step is measured too, each case in a process of its own, beside the plan with
   `compiled=True`.
2. Peak bytes under the scan executor: what the compiled program of the user's own
   jitted step needs on each device (`memory_analysis()`: what goes in and out, and
   temporary memory), beside the plan with `compiled=True`, which compiles the step
   itself, and beside the plan from shapes alone, which has the buffers and not what an
   operation needs for itself. The goal, within 5 %, is for the former.
3. The order of schedules by time: stages that sleep, of unequal lengths, planned with
   `by="time"` and run alternately. Of all pairs of cases whose plans differ by more
   than 3 %, all must be in the right order.
4. The same where launches take time: the host sleeps before each program. A part of the
   steps is planned to be bound by that. Of all pairs whose plans differ by more than
   10 %, all must be in the right order.
5. Seconds of the example models, planned with `by="time"` and measured. On CPUs without
   a goal: simulated devices share cores, and the plan does not know that.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import gc
import importlib
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _asleep import asleep
from flax import linen as nn

import fpipe
import fpipe.flax
from fpipe._executors.placed import dispatch
from fpipe._executors.placed.instructions import Run

DEVICES, CHUNKS = 4, 8
CHECKPOINTS = ("always", "except_last", "never")
MODELS = ("unet", "lm", "resnet")
SCHEDULES = ("gpipe", "1f1b", "eager_1f1b", "zb_h1", "interleaved_1f1b")
SOME = ("gpipe", "eager_1f1b")
ORDERED = [
    (name, "never")
    for name in ("gpipe", "1f1b", "eager_1f1b", "interleaved_1f1b", "zb_h1", "zb_v")
]
ORDERED += [(name, "always") for name in ("gpipe", "1f1b")]
PARTS = ("arrays", "scan", "allocator", "order", "launches", "seconds")
NEAR = 0.05
MIB = 2**20

# --- the models -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Example:
    """A model with what a training step of it needs.

    Attributes:
        train, keyed, stateful: which further arguments a step takes.
    """

    layers: list[fpipe.Layer]
    x: np.ndarray
    target: np.ndarray
    loss_fn: Callable[..., Any]
    train: bool = True
    keyed: bool = True
    stateful: bool = False

    @property
    def needs(self) -> dict[str, Any]:
        """Keyword arguments of the step, but for the state."""
        return {"train": self.train} | (
            {"key": jax.random.key(0)} if self.keyed else {}
        )

    def pipe(
        self, schedule: str, checkpoint: str, executor: Any = "placed"
    ) -> fpipe.Pipe:
        """Cut evenly by FLOPs."""
        stages = fpipe.schedules.named(schedule, DEVICES, CHUNKS).stages
        balance = fpipe.balance(
            self.layers,
            jax.ShapeDtypeStruct(self.x.shape, self.x.dtype),
            stages=stages,
            chunks=CHUNKS,
        )
        devices = [jax.devices()[d % len(jax.devices())] for d in range(DEVICES)]
        return fpipe.Pipe(
            self.layers,
            balance,
            devices,
            CHUNKS,
            checkpoint=checkpoint,
            schedule=schedule,
            executor=executor,
        )

    def given(self, pipe: fpipe.Pipe) -> tuple[Any, dict[str, Any]]:
        """Parameters, and the keyword arguments of a step."""
        state = {"state": pipe.init_state(self.x)} if self.stateful else {}
        return pipe.init(jax.random.key(0), self.x), {**self.needs, **state}

    def plan(self, pipe: fpipe.Pipe, **options: Any) -> fpipe.Prediction:
        """Of one step, without the optimizer's state."""
        return pipe.plan(
            None,
            self.x,
            self.target,
            loss_fn=self.loss_fn,
            optimizer=0.0,
            **self.needs,
            **options,
        )


class Head(nn.Module):
    """A score for each byte, by the embedding's table."""

    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Embed(256, self.width, name="table").attend(nn.LayerNorm()(x))


def gpt(module: Any, sizes: argparse.Namespace) -> list[fpipe.Layer]:
    """The modules of the language model as layers; the head borrows the table."""
    tokens = jax.ShapeDtypeStruct((1, sizes.context), jnp.int32)
    hidden = jax.ShapeDtypeStruct((1, sizes.context, sizes.width), jnp.float32)
    embed = module.Embed(sizes.width, sizes.context, sizes.dropout)
    block = fpipe.flax.layer(module.Block(sizes.heads, sizes.dropout), hidden)
    head = fpipe.flax.layer(
        Head(sizes.width), name="head", rngs=(), borrow={"table": "embed/table"}
    )
    return [
        fpipe.flax.layer(embed, tokens, name="embed"),
        *[block] * sizes.blocks,
        head,
    ]


def cross_entropy(scores, targets):
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(scores, targets).mean()


def example(name: str, scale: int) -> Example:
    """The model of an example file; `scale` makes it and its batch larger. "dense" is a
    tiny one, in no file.
    """
    rng = np.random.default_rng(0)
    if name == "dense":
        layer = fpipe.Layer(
            lambda w, x: jnp.tanh(x @ w),
            lambda key, x: jax.random.normal(key, (32, 32)) / 6,
        )
        x = rng.normal(size=(2 * CHUNKS, 32)).astype(np.float32)
        return Example(
            [layer] * 8,
            x,
            x,
            lambda y, target: jnp.mean((y - target) ** 2),
            train=False,
            keyed=False,
        )
    folder = str(pathlib.Path(__file__).parent.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = importlib.import_module(f"train_{name}")
    if name == "unet":
        x = rng.normal(size=(2 * CHUNKS * scale, 16, 16, 3)).astype(np.float32)
        return Example(
            module.unet(2, 1, 4 * scale),
            x,
            x,
            lambda y, noise: jnp.mean((y - noise) ** 2),
        )
    if name == "lm":
        sizes = argparse.Namespace(
            blocks=6, width=32 * scale, heads=2, context=32 * scale, dropout=0.05
        )
        x = rng.integers(256, size=(2 * CHUNKS, sizes.context + 1)).astype(np.int32)
        return Example(gpt(module, sizes), x[:, :-1], x[:, 1:], cross_entropy)
    x = rng.normal(size=(4 * CHUNKS * scale, module.SIZE, module.SIZE, 1)).astype(
        np.float32
    )
    labels = rng.integers(10, size=len(x)).astype(np.int32)
    layers = module.resnet(module.FORMS[8], 4 * scale)
    return Example(layers, x, labels, module.cross_entropy, keyed=False, stateful=True)


# --- the placed executor's arrays -----------------------------------------------------


@contextlib.contextmanager
def looking(look: Callable[[], None]) -> Iterator[None]:
    """Call `look()` after each program and each transfer, before what is not needed any
    more is dropped.
    """
    issue = dispatch.ReadyPlan.issue

    def looking(step: Any) -> Any:
        def looked_at(*arrays: Any) -> Any:
            out = step.call(*arrays)
            look()
            return out

        return looked_at

    def watched(plan: Any, shares: Any, slots: Any) -> None:
        issue(plan, dispatch.with_calls(shares, looking), slots)

    with unittest.mock.patch.object(dispatch.ReadyPlan, "issue", watched):
        yield


def alive() -> dict[str, int]:
    """The bytes of live arrays on each device, each buffer once."""
    sizes = {
        (str(part.device), part.data.unsafe_buffer_pointer()): part.data.nbytes
        for a in jax.live_arrays()
        if a.size and not a.is_deleted()
        for part in a.addressable_shards
    }
    total = collections.Counter[str]()
    for (device, _), size in sizes.items():
        total[device] += size
    return total


def live_peaks(pipe: fpipe.Pipe, model: Example) -> dict[str, int]:
    """The most that is alive on each device while a step runs."""
    gc.collect()
    others, before = jax.live_arrays(), alive()  # held, so that they stay
    params, needs = model.given(pipe)
    peak = collections.Counter[str]()

    def look() -> None:
        now = alive()
        for device in now:
            peak[device] = max(peak[device], now[device] - before.get(device, 0))

    with looking(look):
        jax.block_until_ready(
            pipe.value_and_grad(model.loss_fn)(params, model.x, model.target, **needs)
        )
    del others
    return peak


def placed_table(
    names: Sequence[str], schedules: Sequence[str], checkpoints: Sequence[str]
) -> bool:
    """Whether all ratios are near 1."""
    print(
        "\nPeak bytes of live arrays, placed executor: KiB of the fullest device as "
        "planned, and planned over measured"
    )
    print("of the device where that is farthest from 1")
    print(f"{'model':7s} {'schedule':17s}" + "".join(f"{c:>20s}" for c in checkpoints))
    ratios = []
    jax.config.update(
        "jax_disable_most_optimizations", True
    )  # they change no array, and take time
    for name in names:
        model = example(name, 1)
        for schedule in schedules:
            cells = []
            for checkpoint in checkpoints:
                pipe = model.pipe(schedule, checkpoint)
                plan, measured = model.plan(pipe), live_peaks(pipe, model)
                assert set(measured) == {row.name for row in plan.devices}, measured
                own = [row.peak / measured[row.name] for row in plan.devices]
                ratios += own
                cells.append(f"{plan.peak / 1024:11.1f} {farthest(own):8.4f}")
            print(f"{name:7s} {schedule:17s}" + "".join(cells), flush=True)
    jax.config.update("jax_disable_most_optimizations", False)
    return verdict(ratios)


def farthest(ratios: Sequence[float]) -> float:
    """The one that is farthest from 1."""
    return max(ratios, key=lambda r: abs(r - 1))


def verdict(ratios: Sequence[float]) -> bool:
    """Print the worst ratio; whether it is near 1."""
    near = abs(farthest(ratios) - 1) <= NEAR
    print(
        f"worst of {len(ratios)} ratios: {farthest(ratios):.4f}, goal within "
        f"{NEAR:.0%}: {'yes' if near else 'no'}",
        flush=True,
    )
    return near


# --- the scan executor's program ------------------------------------------------------


def scan_table(
    names: Sequence[str], schedules: Sequence[str], checkpoints: Sequence[str]
) -> bool:
    """Whether all ratios of plans with `compiled=True` are near 1."""
    print(
        "\nPeak bytes, scan executor: KiB of each device, of the user's own jitted "
        "step; planned over that"
    )
    print(
        "model   schedule     checkpoint    measured   planned, compiled   planned "
        "from shapes"
    )
    ratios = []
    for name, schedule, checkpoint in itertools.product(names, schedules, checkpoints):
        model = example(name, 1)
        pipe = model.pipe(schedule, checkpoint, "scan")
        params, needs = model.given(pipe)
        step = pipe.value_and_grad(model.loss_fn)
        static = {"train": needs.pop("train")}

        def call(
            params: Any,
            x: Any,
            target: Any,
            needs: Any,
            step: Any = step,
            static: Any = static,
        ) -> Any:
            return step(params, x, target, **needs, **static)

        used: Any = (
            jax.jit(call)
            .lower(params, model.x, model.target, needs)
            .compile()
            .memory_analysis()
        )
        measured = (
            used.argument_size_in_bytes
            + used.output_size_in_bytes
            + used.temp_size_in_bytes
        )
        measured -= used.alias_size_in_bytes
        compiled, shapes = (
            model.plan(pipe, compiled=c).peak / measured for c in (True, False)
        )
        ratios.append(compiled)
        print(
            f"{name:7s} {schedule:12s} {checkpoint:11s} {measured / 1024:10.1f} "
            f"{compiled:19.4f} {shapes:21.3f}",
            flush=True,
        )
    return verdict(ratios)


# --- a GPU's allocator ----------------------------------------------------------------


def allocator_table(
    names: Sequence[str],
    schedules: Sequence[str],
    checkpoints: Sequence[str],
    scale: int,
) -> bool:
    """Whether all ratios are near 1."""
    print(
        "\nPeak bytes in use of a step, placed executor, each in a process of its "
        f"own: MiB; models times {scale}"
    )
    print(
        "model   schedule          checkpoint    planned, compiled   measured   ratio"
    )
    ratios = []
    for case in itertools.product(names, schedules, checkpoints):
        command = [sys.executable, __file__, "--one", *case, "--scale", str(scale)]
        done = subprocess.run(
            command, env=os.environ | SPARE, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        planned, measured = json.loads(done.stdout.splitlines()[-1])
        ratios.append(planned / measured)
        print(
            f"{case[0]:7s} {case[1]:17s} {case[2]:11s} {planned / MIB:18.2f} "
            f"{measured / MIB:12.2f} {ratios[-1]:9.4f}",
            flush=True,
        )
    return verdict(ratios)


# Trying kernels out takes memory too.
SPARE = {"XLA_FLAGS": "--xla_gpu_autotune_level=0"}


def one(name: str, schedule: str, checkpoint: str, scale: int) -> None:
    """Print the planned and the measured peak of the first device."""
    model = example(name, scale)
    pipe = model.pipe(schedule, checkpoint)
    params, needs = model.given(pipe)
    jax.block_until_ready(
        pipe.value_and_grad(model.loss_fn)(params, model.x, model.target, **needs)
    )
    measured = pipe.devices[0].memory_stats()["peak_bytes_in_use"]
    plan = model.plan(pipe, compiled=True)
    print(
        json.dumps(
            [
                next(
                    row.peak for row in plan.devices if row.name == str(pipe.devices[0])
                ),
                measured,
            ]
        )
    )


# --- time -----------------------------------------------------------------------------


def sleeping(seconds: float) -> fpipe.Layer:
    """`x * p`, asleep for so long a row in its forward, in its input gradient, and in
    its weight gradient.
    """

    @jax.custom_vjp
    def times(p, x):
        return asleep(seconds * len(x), x * p)

    def forward(p, x):
        return times(p, x), (p, x)

    def backward(residuals, g):
        p, x = residuals
        of_x = asleep(seconds * len(x), g * p)
        # One after the other: two could sleep at once.
        return asleep(seconds * len(x), (g * x).sum(0), of_x), of_x

    times.defvjp(forward, backward)
    return fpipe.Layer(times, lambda key, x: jnp.ones(x.shape[-1]))


# So many FLOPs at least, for XLA not to take a program for a short one.
WIDE = 1024


# Two layers a stage, or one where a device has two stages. With these nearly every
# schedule takes a time of its own.
UNITS = (2.0, 2.0, 2.0, 1.0, 0.5, 0.5, 1.0, 1.5)


def sleeping_pipe(
    layers: Sequence[fpipe.Layer], schedule: str, chunks: int, **options: Any
) -> fpipe.Pipe:
    """A pipe over four devices."""
    stages = fpipe.schedules.named(schedule, DEVICES, chunks).stages
    balance = [len(layers) // stages] * stages
    devices = jax.devices()
    return fpipe.Pipe(layers, balance, devices, chunks, schedule=schedule, **options)


def timed(run: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """The median seconds of some runs of each, in turn."""
    took = collections.defaultdict[Any, list[float]](list)
    for case in [*run] * repeats:
        start = time.perf_counter()
        jax.block_until_ready(run[case]())
        took[case].append(time.perf_counter() - start)
    return {case: statistics.median(took[case]) for case in took}


def in_order(
    planned: dict[Any, float], measured: dict[Any, float], apart: float
) -> bool:
    """Print how many pairs are in the right order; whether all are.

    Arguments:
        apart: by what share plans differ that are compared.
    """
    pairs = [
        (a, b)
        for a, b in itertools.permutations(planned, 2)
        if planned[b] > (1 + apart) * planned[a]
    ]
    wrong = [(a, b) for a, b in pairs if measured[a] >= measured[b]]
    for a, b in wrong:
        print("wrong:", *a, "before", *b)
    print(
        f"pairs in the right order: {len(pairs) - len(wrong)} of {len(pairs)}, goal "
        f"all: {'no' if wrong else 'yes'}",
        flush=True,
    )
    return not wrong


def order_table(cases: Sequence[tuple[str, str]], unit: float, repeats: int) -> bool:
    """Whether all pairs are in the right order."""
    print(
        "\nTime, stages that sleep: eight layers of "
        f"{', '.join(f'{u:g}' for u in UNITS)} times {unit * 1e3:g} ms, m={CHUNKS};"
    )
    print(f"medians of {repeats} alternating runs")
    print("schedule           checkpoint    planned ms   measured ms   ratio")
    layers, x = [sleeping(u * unit) for u in UNITS], jnp.ones((CHUNKS, WIDE))
    planned, run = {}, {}
    for case in cases:
        pipe = sleeping_pipe(layers, case[0], CHUNKS, checkpoint=case[1])
        # With the gradient of `x`: else the first stage would have no input gradient to
        # compute.
        planned[case] = pipe.plan(
            None, x, loss_fn=jnp.mean, argnums=(0, 1), by="time"
        ).step
        step, params = (
            pipe.value_and_grad(jnp.mean, argnums=(0, 1)),
            pipe.init(jax.random.key(0), x),
        )
        run[case] = functools.partial(step, params, x)
        jax.block_until_ready(run[case]())
    measured = timed(run, repeats)
    for case in sorted(planned, key=planned.__getitem__):
        ms, real = planned[case] * 1e3, measured[case] * 1e3
        print(f"{case[0]:18s} {case[1]:11s} {ms:12.0f} {real:13.0f} {ms / real:7.2f}")
    return in_order(planned, measured, apart=0.03)


@contextlib.contextmanager
def slow_launches(seconds: float) -> Iterator[None]:
    """The host sleeps so long before it launches an action."""
    issue = dispatch.ReadyPlan.issue

    def slow(step: Any) -> Any:
        def launched(*arrays: Any) -> Any:
            if isinstance(step.item, Run) and step.item.actions:
                time.sleep(seconds)
            return step.call(*arrays)

        return launched

    def slowed(plan: Any, shares: Any, slots: Any) -> None:
        issue(plan, dispatch.with_calls(shares, slow), slots)

    with unittest.mock.patch.object(dispatch.ReadyPlan, "issue", slowed):
        yield


def launched(seconds: float, step: Callable[..., Any], *args: Any) -> Any:
    """A step with slow launches."""
    with slow_launches(seconds):
        return step(*args)


class Launching(NamedTuple):
    """A step, who launches its programs, and how many seconds a launch takes."""

    schedule: str
    chunks: int
    dispatch: str
    launch: float = 0.0


LAUNCHING = [
    Launching(name, m, who)
    for name in ("gpipe", "1f1b", "zb_h1", "interleaved_1f1b")
    for m, who in ((4, "one_thread"), (16, "one_thread"), (16, "thread_per_device"))
]


def launch_table(cases: Sequence[Launching], unit: float, repeats: int) -> bool:
    """Whether all pairs are in the right order."""
    rows = max(case.chunks for case in cases)
    of_row = unit / 4
    print(
        f"\nTime, stages that sleep, launches of {unit * 1e3:g} ms: these layers times "
        f"{of_row * 1e3:g} ms a row, {rows} rows;"
    )
    print(f"medians of {repeats} alternating runs")
    print(
        "schedule           m   launched by         launch ms   planned ms   "
        "measured ms   ratio   bound"
    )
    layers, x = [sleeping(u * of_row) for u in UNITS], jnp.ones((rows, WIDE))
    planned, run, bound = {}, {}, set()
    for case in cases:
        name, m, who, _ = case
        slow = case._replace(launch=unit)
        pipe = sleeping_pipe(layers, name, m, checkpoint="never", dispatch=who)
        plan = pipe.plan(
            None, x, loss_fn=jnp.mean, argnums=(0, 1), by="time", launch=unit
        )
        if any(text.startswith("host-bound") for text in plan.warnings):
            bound.add(slow)
        # Without launches what each action takes is known.
        each = np.array(UNITS).reshape(len(pipe.balance), -1).sum(1)
        piece = tuple(each * of_row * rows / m)
        costs = fpipe.schedules.Costs(F=piece, I=piece, W=piece)
        free = fpipe.schedules.simulate(pipe.make_schedule(m), costs)
        step = pipe.value_and_grad(jnp.mean, argnums=(0, 1))
        params = pipe.init(jax.random.key(0), x)
        planned |= {case: free.makespan, slow: plan.step}
        run |= {
            which: functools.partial(launched, which.launch, step, params, x)
            for which in (case, slow)
        }
        jax.block_until_ready(step(params, x))
    measured = timed(run, repeats)
    for case in sorted(planned, key=planned.__getitem__):
        name, m, who, launch = case
        ms, real = planned[case] * 1e3, measured[case] * 1e3
        print(
            f"{name:17s} {m:2d}   {who:17s} {launch * 1e3:11.0f} {ms:12.0f} "
            f"{real:13.0f} {ms / real:7.2f}   "
            f"{'host' if case in bound else 'devices'}"
        )
    return in_order(planned, measured, apart=0.1)


def seconds_table(
    names: Sequence[str], schedules: Sequence[str], repeats: int, scale: int
) -> None:
    """Predicted and measured seconds of the example models."""
    print(
        f"\nTime of the examples, placed executor, models times {scale}: medians of "
        f"{repeats} alternating runs"
    )
    print("model   schedule     planned ms   measured ms   ratio")
    run, planned = {}, {}
    for name in names:
        model = example(name, scale)
        for schedule in schedules:
            pipe = model.pipe(schedule, "never")
            planned[name, schedule] = model.plan(pipe, by="time").step
            params, needs = model.given(pipe)
            step = pipe.value_and_grad(model.loss_fn)
            run[name, schedule] = functools.partial(
                step, params, model.x, model.target, **needs
            )
            jax.block_until_ready(run[name, schedule]())
    measured = timed(run, repeats)
    for case, seconds in planned.items():
        real = measured[case]
        print(
            f"{case[0]:7s} {case[1]:12s} {seconds * 1e3:10.1f} {real * 1e3:13.1f} "
            f"{seconds / real:7.2f}",
            flush=True,
        )


# --- the run --------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a few cases of a tiny model, in seconds")
    add(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="default: all; 'allocator' on GPUs alone",
    )
    add(
        "--models", nargs="+", choices=MODELS, default=MODELS, help="default: all three"
    )
    add(
        "--schedules",
        nargs="+",
        default=SCHEDULES,
        help="of the placed executor's tables (default: %(default)s)",
    )
    add(
        "--unit",
        type=float,
        default=15.0,
        help="milliseconds of sleep (default: %(default)s)",
    )
    add(
        "--repeats",
        type=int,
        default=3,
        help="timed steps of each (default: %(default)s)",
    )
    add(
        "--scale",
        type=int,
        default=8,
        help="how much larger models are on a GPU (default: %(default)s)",
    )
    add("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.repeats < 1:
        parser.exit(2, f"--repeats {args.repeats}: at least 1\n")
    if not 0 < args.unit < 10_000:
        parser.exit(
            2, f"--unit {args.unit:g}: milliseconds, more than 0 and less than 10000\n"
        )
    for schedule in args.schedules:
        if schedule not in fpipe.schedules.NAMES:
            parser.exit(
                2,
                f"--schedules {schedule}: one of {', '.join(fpipe.schedules.NAMES)}\n",
            )
    if args.one:
        name, schedule, checkpoint = args.one
        return one(name, schedule, checkpoint, args.scale)
    jax.config.update("jax_num_cpu_devices", DEVICES)
    os.environ.setdefault(
        "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
    )  # leave a GPU's memory to the processes of the cases
    first = jax.devices()[0]
    on_gpu = first.memory_stats() is not None
    print(f"jax {jax.__version__}, {first.device_kind}, {DEVICES} devices, m={CHUNKS}")
    with tempfile.TemporaryDirectory() as folder:
        if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
            # Pipes share no programs; those of two schedules are often the same.
            jax.config.update("jax_compilation_cache_dir", folder)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        good = parts(args, len(jax.devices()) >= DEVICES, on_gpu)
    raise SystemExit(not all(good))


def parts(args: argparse.Namespace, simulated: bool, on_gpu: bool) -> list[bool]:
    """Whether each part that was asked for, and can run here, has reached its goal."""
    unit, good = args.unit / 1e3, []
    if args.quick:
        return [
            placed_table(["dense"], ["zb_h1"], ["except_last"]),
            scan_table(["dense"], ["eager_1f1b"], ["always"]),
            order_table(
                [("gpipe", "always"), ("eager_1f1b", "never")], unit, args.repeats
            ),
            launch_table([Launching("1f1b", 4, "one_thread")], unit, args.repeats),
        ]
    if "arrays" in args.parts and simulated:
        good.append(placed_table(args.models, args.schedules, CHECKPOINTS))
    if "scan" in args.parts and simulated:
        good.append(scan_table(args.models, SOME[1:], ("always", "never")))
    if "allocator" in args.parts and on_gpu:
        good.append(
            allocator_table(args.models, args.schedules, CHECKPOINTS, args.scale)
        )
    if "order" in args.parts and simulated:
        good.append(order_table(ORDERED, unit, args.repeats))
    if "launches" in args.parts and simulated:
        good.append(launch_table(LAUNCHING, unit, args.repeats))
    if "seconds" in args.parts:
        seconds_table(args.models, SOME, args.repeats, args.scale if on_gpu else 2)
    return good


if __name__ == "__main__":
    main()
