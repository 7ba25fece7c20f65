"""What a launch costs the host, and what changes it: `accelerator.py --launch`.

Four stages on one device can gain nothing: their step does the work of the unpipelined
step with more launches. Each case is a model under a variant, in a process of its own,
because XLA reads its flags once. The process measures the step of the variant and the
unpipelined step in alternating repeats, and prints a line of JSON:

    {"machine": {"jax": "0.10.2", "platform": "gpu", "kind": "NVIDIA H200", ...},
     "plain": {"step": 0.042, "host": 0.006, "cpu": 0.007},
     "step": {"step": 0.069, "host": 0.068, "cpu": 0.071},
     "launches": 61, "peak": 812345678, "planned": 805306368, "programs": [...]}

The script that starts them prints a row for each. It asks JAX for no device itself: on
a GPU that would take most of the memory.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fpipe
from fpipe._executors.placed import dispatch, lower
from fpipe._executors.placed.instructions import Copy, Move, Plan, Run

STAGES = 4
WARM = 2  # repeats that are not looked at: the first compiles
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is different in a case.

    Attributes:
        what: the same, in words for the table.
        environment: variables that XLA for GPUs reads when it starts.
        fused: whether neighbours on a device become one program.
        pipelined: if not, the step is the unpipelined one, unrolled.
        spread: whether the stages go round over all devices.
    """

    what: str
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    fused: bool = True
    pipelined: bool = True
    spread: bool = False
    dispatch: Literal["auto", "one_thread", "thread_per_device"] = "auto"

    def why_not(self, machine: dict[str, Any]) -> str:
        """Why it does not apply on a machine; empty if it does."""
        # A CPU has no use for the variables, and XLA ends the process at a flag that it
        # does not know.
        if self.environment and machine["platform"] == "cpu":
            return "not on cpu"
        if self.spread and machine["devices"] < 2:
            return "there is only one device"
        return ""


def with_flag(flag: str, value: str) -> Variant:
    given = f"--{flag}={value}"
    return Variant(f"XLA_FLAGS={given}", {"XLA_FLAGS": given})


# In the order in which they run: the budget may not do for all.
VARIANTS = {
    "default": Variant("no option"),
    "apart": Variant("a program for each action, none of several", fused=False),
    "async": Variant(
        "PJRT_GPU_ENABLE_ASYNC_DISPATCH=1", {"PJRT_GPU_ENABLE_ASYNC_DISPATCH": "1"}
    ),
    "no_command_buffers": with_flag("xla_gpu_enable_command_buffer", ""),
    "graphs_of_one": with_flag("xla_gpu_graph_min_graph_size", "1"),
    # For the peak: to try kernels out takes memory of the same allocator.
    "no_autotuning": with_flag("xla_gpu_autotune_level", "0"),
    "plain_unrolled": Variant(
        "no pipe: the unpipelined step without a loop", pipelined=False
    ),
    "spread_one_thread": Variant(
        'stages over all devices, dispatch="one_thread"',
        spread=True,
        dispatch="one_thread",
    ),
    "spread_threads": Variant(
        'stages over all devices, dispatch="thread_per_device"',
        spread=True,
        dispatch="thread_per_device",
    ),
}


class Size(NamedTuple):
    """How large a model is.

    Attributes:
        width: of a block, or channels of the outermost level of the U-Net.
        rows: of a microbatch.
        length: tokens of a row, or the side of a picture.
        blocks: of the transformer, or levels of the U-Net.
    """

    width: int
    rows: int
    length: int
    blocks: int
    microbatches: int = 8


SIZES = {
    "full": {
        "small": Size(1024, 4, 256, 8),
        "large": Size(2048, 8, 256, 8),
        "unet": Size(64, 4, 128, 4),
    },
    "tiny": {
        "small": Size(16, 1, 8, 4, 2),
        "large": Size(32, 1, 8, 4, 2),
        "unet": Size(2, 1, 8, 2, 2),
    },
}
MODELS = tuple(SIZES["full"])
# The step over the unpipelined one, at most.
GOALS = {"small": 1.15, "large": 1.05}
PEAK_GOAL = 0.05

# --- a case, in its process -----------------------------------------------------------


class Took(NamedTuple):
    """Seconds of a step.

    Attributes:
        step: until its results are there.
        host: until its calls return.
        cpu: CPU time of all threads of the process, until its results are there.
    """

    step: float
    host: float
    cpu: float


def loss_fn(y, t):
    return jnp.mean((y - t) ** 2)


def model(name: str, size: Size) -> tuple[list[fpipe.Layer], np.ndarray]:
    """Layers, and an input for the whole batch; the U-Net runs without dropout."""
    rows = size.rows * size.microbatches
    if name == "unet":
        sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
        from train_unet import unet

        layers = unet(size.blocks, 1, size.width)
        shape: tuple[int, ...] = rows, size.length, size.length, 3
    else:
        from _jax_two_processes import apply, init

        layers = [fpipe.Layer(apply, init, name="block")] * size.blocks
        shape = rows, size.length, size.width
    return layers, np.random.default_rng(0).standard_normal(shape, np.float32)


def unpipelined(
    layers: Sequence[fpipe.Layer], microbatches: int, unrolled: bool
) -> Callable[..., Any]:
    """The step on one device: gradients added up over the microbatches, in a loop that
    XLA sees, or one after the other in the program.
    """
    whole = fpipe.sequential(layers)

    def loss_of(params, x, t):
        return loss_fn(whole(params, x), t) / microbatches

    def microbatch(params, total, piece):
        made = jax.value_and_grad(loss_of)(params, *piece)
        return jax.tree.map(jnp.add, total, made), None

    def step(params, x, t):
        pieces = jax.tree.map(
            lambda a: a.reshape(microbatches, -1, *a.shape[1:]), (x, t)
        )
        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        body = functools.partial(microbatch, params)
        return jax.lax.scan(body, zeros, pieces, unroll=unrolled)[0]

    return jax.jit(step)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Plans in which each action has a program of its own.

    There is no option for this. `fuse` is one pass of the placed executor, from work to
    work, so a pass that returns what it is given switches it off.
    """

    def unchanged(work, left, programs, shardings):
        del left, programs, shardings
        return list(work)

    with unittest.mock.patch.object(lower, "fuse", unchanged):
        yield


def plan_of(run: Callable[[], Any]) -> Plan:
    """The plan that a call runs."""
    plans: list[Plan] = []
    issue = dispatch.ReadyPlan.issue

    def seen(ready: dispatch.ReadyPlan, *given: Any) -> None:
        plans.append(ready.plan)
        issue(ready, *given)

    with unittest.mock.patch.object(dispatch.ReadyPlan, "issue", seen):
        jax.block_until_ready(run())
    return plans[0]


def arrays_of(plan: Plan) -> list[dict[str, Any]]:
    """What the programs of actions take and make, by the kinds of their actions: the
    smallest and the largest number of arrays.
    """
    runs = [item for item in plan.instructions if isinstance(item, Run) and item.parts]
    params = {slot for leaf, slot in plan.feeds if leaf.port.kind == "params"}
    readers: dict[int, list[Run]] = {}
    for run in runs:
        for slot in run.ins:
            readers.setdefault(slot, []).append(run)

    def places(run: Run) -> set[tuple[int, int]]:
        return {(action.stage, action.microbatch) for action in run.actions}

    rows: dict[str, list[tuple[int, ...]]] = {}
    for run in runs:
        kept = [
            slot
            for slot in run.outs
            if any(places(run) & places(reader) for reader in readers.get(slot, ()))
        ]
        counts = len(run.ins), len(params & {*run.ins}), len(run.outs), len(kept)
        kinds = "+".join(action.kind for action in run.actions)
        rows.setdefault(kinds, []).append(counts)
    return [
        {
            "kinds": kinds,
            "launches": len(counts),
            "arrays": [
                (min(column), max(column)) for column in zip(*counts, strict=True)
            ],
        }
        for kinds, counts in sorted(rows.items())
    ]


def planned(pipe: fpipe.Pipe, x: jax.Array, t: jax.Array, device: str) -> int:
    """Bytes that the plan of a step says for a device."""
    plan = pipe.plan(None, x, t, loss_fn=loss_fn, optimizer=0.0, compiled=True)
    return next(row.peak for row in plan.devices if row.name == device)


def alternating(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Took]:
    """Medians of each."""
    taken: dict[str, list[Took]] = {name: [] for name in runs}
    for n in range(WARM + repeats):
        for name, run in runs.items():
            start, cpu = time.perf_counter(), time.process_time()
            made = run()
            returned = time.perf_counter()
            jax.block_until_ready(made)
            end, cpu_end = time.perf_counter(), time.process_time()
            del made  # the next step has the memory to itself
            if n >= WARM:
                taken[name].append(Took(end - start, returned - start, cpu_end - cpu))
    return {
        name: Took(*map(statistics.median, zip(*own, strict=True)))
        for name, own in taken.items()
    }


def balance_of(layers: Sequence[fpipe.Layer], x: jax.ShapeDtypeStruct) -> list[int]:
    """Even by FLOPs; equal layers need no search."""
    if len({*layers}) == 1:
        return [len(layers) // STAGES] * STAGES
    return list(fpipe.balance(layers, x, stages=STAGES))


def measure(name: str, variant: Variant, size: Size, repeats: int) -> dict[str, Any]:
    """A case; see the head of this file."""
    devices = jax.devices()
    layers, values = model(name, size)
    x = jnp.asarray(values)
    t = jnp.copy(x)
    found: dict[str, Any] = {"peak": None, "planned": None, "programs": []}
    if variant.pipelined:
        microbatch = jax.ShapeDtypeStruct((size.rows, *x.shape[1:]), x.dtype)
        # On one device a schedule for four would run other stages between the forward
        # and the backward of the last one, and nothing would be fused.
        pipe = fpipe.Pipe(
            layers,
            balance_of(layers, microbatch),
            [devices[s % len(devices)] for s in range(STAGES)]
            if variant.spread
            else devices[:1],
            size.microbatches,
            checkpoint="never",
            schedule="eager_1f1b" if variant.spread else "interleaved_1f1b",
            dispatch=variant.dispatch,
        )
        placed = pipe.init(jax.random.key(0), x)
        step = functools.partial(pipe.value_and_grad(loss_fn), placed, x, t)
        plan = plan_of(step)
        found["programs"] = arrays_of(plan)
        found["launches"] = sum(
            isinstance(item, Run | Move | Copy) for item in plan.instructions
        )
        # The peak is since the process began: nothing else has run yet.
        known = devices[0].memory_stats() or {}
        if "peak_bytes_in_use" in known:
            found["peak"] = known["peak_bytes_in_use"]
            found["planned"] = planned(pipe, x, t, str(devices[0]))
        params = jax.device_put(pipe.gather(placed), devices[0])
    else:
        params = fpipe.sequential(layers).init(jax.random.key(0), x)
        unrolled = unpipelined(layers, size.microbatches, unrolled=True)
        step = functools.partial(unrolled, params, x, t)
        found["launches"] = 1
    plain = unpipelined(layers, size.microbatches, unrolled=False)
    runs = {"plain": functools.partial(plain, params, x, t), "step": step}
    losses = [float(run()[0]) for run in runs.values()]
    np.testing.assert_allclose(*losses, rtol=1e-2)  # they are the same step
    found |= {name: own._asdict() for name, own in alternating(runs, repeats).items()}
    found["machine"] = {
        "jax": jax.__version__,
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "devices": len(devices),
    }
    return found


def case() -> None:
    """Measure the case that the command line names."""
    options = json.loads(sys.argv[1])
    variant = VARIANTS[options["variant"]]
    size = SIZES[options["size"]][options["model"]]
    with contextlib.nullcontext() if variant.fused else apart():
        found = measure(options["model"], variant, size, options["repeats"])
    print(json.dumps(found))


# --- the table ------------------------------------------------------------------------


class Case(NamedTuple):
    """A model under a variant, by their names."""

    variant: str
    model: str


class Budget:
    """Seconds for all cases together, and what each is expected to take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._longest: dict[str, float] = {}

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def expected(self, case: Case) -> float:
        """As long as the longest of its model, or of all models if it is the first."""
        every = max(self._longest.values(), default=0.0)
        return self._longest.get(case.model, every)

    def add(self, case: Case, seconds: float) -> None:
        self._longest[case.model] = max(seconds, self._longest.get(case.model, 0.0))


def measured(
    case: Case, size: str, repeats: int, cache: str, seconds: float
) -> dict[str, Any] | str:
    """What a process says about a case, or why it says nothing."""
    options = {**case._asdict(), "size": size, "repeats": repeats}
    own = VARIANTS[case.variant].environment
    flags = f"{os.environ.get('XLA_FLAGS', '')} {own.get('XLA_FLAGS', '')}".strip()
    # What one case compiles, the next one reads.
    shared = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment = {**shared, **os.environ, **own, "XLA_FLAGS": flags}
    try:
        done = subprocess.run(
            [sys.executable, __file__, json.dumps(options)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s, at the end of the budget"
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr, flush=True)
        said = done.stderr.strip().rpartition("\n")[2] or "it said nothing"
        return f"FAILED with {done.returncode}: {said[:200]}"
    return json.loads(done.stdout.splitlines()[-1])


HEAD = (
    f"{'model':6} {'variant':18} {'launches':>8} {'plain ms':>9} {'step ms':>9} "
    f"{'ratio':>6} {'host us':>8} {'CPU us':>8} {'plain':>7} {'CPU':>7} "
    f"{'peak MiB':>9} {'plan/peak':>9}"
)
COLUMNS = """\
launches   programs and transfers of a step
plain ms   the unpipelined step, measured in the same process, in turn with the step
step ms    the step of the variant
ratio      the step over the unpipelined one
host us    until the calls of the step return, for each action
CPU us     CPU time of all threads of the process in the step, for each action
plain, CPU the same two of the unpipelined step, divided by as many actions
plan/peak  the peak that `plan(..., compiled=True)` says, over the allocator's peak
"""


def row(case: Case, found: dict[str, Any], actions: int) -> str:
    plain, step = Took(**found["plain"]), Took(**found["step"])
    host = [
        1e6 * seconds / actions
        for seconds in (step.host, step.cpu, plain.host, plain.cpu)
    ]
    peak, over = "-", "-"
    if found["peak"] is not None:
        peak = f"{found['peak'] / MIB:.1f}"
        over = f"{found['planned'] / found['peak']:.3f}"
    return (
        f"{case.model:6} {case.variant:18} {found['launches']:8} "
        f"{1e3 * plain.step:9.3f} {1e3 * step.step:9.3f} "
        f"{step.step / plain.step:6.3f} {host[0]:8.1f} {host[1]:8.1f} "
        f"{host[2]:7.1f} {host[3]:7.1f} {peak:>9} {over:>9}"
    )


def print_head(machine: dict[str, Any] | None, variants: Iterable[str]) -> None:
    """The environment, the variants and the columns; no machine if no case has said
    what it is.
    """
    if machine is None:
        print(f"jax {jax.__version__}")
    else:
        print(
            f"jax {machine['jax']}, {machine['devices']} x {machine['kind']} "
            f"({machine['platform']})"
        )
    for name, value in sorted(os.environ.items()):
        if name.startswith(("XLA_", "PJRT_", "JAX_")):
            print(f"  {name}={value.strip()}")
    print(
        f"{STAGES} stages on one device, interleaved_1f1b (over all devices: "
        "eager_1f1b), checkpoint='never'\n"
    )
    for name in variants:
        print(f"{name:18} {VARIANTS[name].what}")
    print()
    print(f"{COLUMNS}\n{HEAD}", flush=True)


def print_arrays(results: dict[Case, dict[str, Any]]) -> None:
    print("\nArrays of a program of actions, smallest and largest number")
    print(
        f"{'model':6} {'variant':18} {'actions':8} {'launches':>8} {'in':>9} "
        f"{'of params':>9} {'out':>9} {'residuals':>9}"
    )
    for case, found in results.items():
        if case.variant not in ("default", "apart"):
            continue
        for own in found["programs"]:
            spans = [f"{a}-{b}" if a < b else f"{a}" for a, b in own["arrays"]]
            print(
                f"{case.model:6} {case.variant:18} {own['kinds']:8} "
                f"{own['launches']:8} " + " ".join(f"{span:>9}" for span in spans)
            )


def print_goals(results: dict[Case, dict[str, Any]], size: str) -> None:
    """The goals are for GPUs, and for models whose stages are as long as they say."""
    print()
    for name, goal in GOALS.items():
        found = results.get(Case("default", name))
        if found is None or size != "full" or found["machine"]["platform"] == "cpu":
            print(f"goal of {name}, at most {goal:.2f}: not judged here")
            continue
        plain, step = Took(**found["plain"]), Took(**found["step"])
        ratio = step.step / plain.step
        action = 1e3 * plain.step / (2 * STAGES * SIZES[size][name].microbatches)
        print(
            f"goal of {name}, at most {goal:.2f}: {ratio:.3f}, "
            f"{'yes' if ratio <= goal else 'NO'}; an action is {action:.2f} ms of the "
            "unpipelined step"
        )
    # Without tuning, which takes memory too.
    peaks = [
        found["planned"] / found["peak"]
        for case, found in results.items()
        if case.variant == "no_autotuning" and found["peak"]
    ]
    if not peaks:
        print(f"goal of the peak, within {PEAK_GOAL:.0%} of the plan: not judged here")
        return
    worst = max(peaks, key=lambda ratio: abs(ratio - 1))
    met = "yes" if abs(worst - 1) <= PEAK_GOAL else "NO"
    print(
        f"goal of the peak, within {PEAK_GOAL:.0%} of the plan without autotuning: "
        f"{worst:.3f}, {met}"
    )


def compare(args: argparse.Namespace) -> int:
    """Run the cases and print the tables; returns 1 if a case failed."""
    budget = Budget(args.budget)
    results: dict[Case, dict[str, Any]] = {}
    machine: dict[str, Any] | None = None
    headed = failed = False
    with tempfile.TemporaryDirectory() as cache:
        every = cases(args.models, args.variants)
        for case in every:
            found: dict[str, Any] | str = why_not(case, machine, budget)
            if not found:
                started = time.monotonic()
                found = measured(case, args.size, args.repeats, cache, budget.left)
                budget.add(case, time.monotonic() - started)
            if isinstance(found, str):
                line = f"{case.model:6} {case.variant:18} {found}"
                failed = failed or found.startswith("FAILED")
            else:
                results[case], machine = found, found["machine"]
                actions = 2 * STAGES * SIZES[args.size][case.model].microbatches
                line = row(case, found, actions)
            if not headed:
                print_head(machine, dict.fromkeys(c.variant for c in every))
                headed = True
            print(line, flush=True)
    print_arrays(results)
    print_goals(results, args.size)
    print(f"took {args.budget - budget.left:.0f} s of {args.budget:.0f} s")
    return int(failed)


def cases(models: Sequence[str], variants: Sequence[str]) -> list[Case]:
    """The default first, which says what machine this is, and so what applies; the
    U-Net last, which compiles longest.
    """
    every = [
        Case(variant, name)
        for variant in VARIANTS
        if variant == "default" or variant in variants
        for name in models
    ]
    return sorted(every, key=lambda c: (c.variant != "default", c.model == "unet"))


def why_not(case: Case, machine: dict[str, Any] | None, budget: Budget) -> str:
    """Why a case does not run; empty if it does."""
    if machine is not None and (why := VARIANTS[case.variant].why_not(machine)):
        return why
    expected = budget.expected(case)
    if budget.left <= 0:
        return "left out: the budget is spent"
    if expected > budget.left:
        return (
            f"left out: it takes about {expected:.0f} s, and {budget.left:.0f} s of "
            "the budget are left"
        )
    if machine is None and case.variant != "default":
        return "left out: the default did not run"
    return ""


if __name__ == "__main__":
    case()
