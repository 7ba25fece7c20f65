"""Every schedule as it runs beside what the simulation says, and who should dispatch.

Four simulated CPU devices and stages that sleep in their forward, input gradient and
weight gradient, so that devices work side by side however few cores there are. Four
tables:

1. Time: each schedule with F = I = W = one unit of sleep for each device (half a unit
   for each stage where a device has two), and 1F1B and eager 1F1B with uneven stages.
   The ratio is measured over simulated; `order` counts the runs in which every device
   started its actions in the schedule's order, and `global` those in which all devices
   together started them in the simulated order. Two actions are compared only if the
   simulation starts them more than half a unit apart.
2. Memory: the peak of live stage inputs on each device, counted among all live arrays
   (`jax.live_arrays()`) right after each forward is dispatched, in a model without
   sleep. Counted are the inputs of stages that get them from another device; the first
   stage cuts its own out of the batch, and a stage after one on the same device reads
   that one's output. Gradients of inputs are not counted (one waits where it was made
   until the other device takes it). The formula is the simulated timeline's peak for
   the same stages, from the start of `F` to the end of `B` or `W`.
3. Dispatch: one thread beside a thread for each device.
"""

import argparse
import bisect
import dataclasses
import statistics
import time
import unittest.mock

import jax
import jax.numpy as jnp

import fpipe
from fpipe import schedules
from fpipe._executors.placed import dispatch
from fpipe._executors.placed.executor import Placed
from fpipe._executors.placed.instructions import Run

DEVICES = 4
UNEVEN = (1.0, 2.0, 1.5, 0.5)
WIDTH, ROWS = 64, 16
NAMES = [name for name in schedules.NAMES if name != "forward_only"]


# --- stages that sleep ---


class Recorder:
    """When each part of each action ran, by (kind, stage, microbatch); `unit` is read
    at each call.
    """

    def __init__(self) -> None:
        self.unit = 0.0
        self.times: dict[tuple[str, int, int], tuple[float, float]] = {}

    def nap(self, kind: str, stage: int, units: float):
        """A function for `jax.pure_callback` that sleeps and returns its argument."""

        def sleep(value, microbatch):
            start = time.perf_counter()
            time.sleep(units * self.unit)
            self.times[kind, stage, int(microbatch)] = start, time.perf_counter()
            return value

        return sleep

    def timeline(self, schedule: schedules.Schedule) -> schedules.Timeline:
        """What was recorded. A full backward is the sleeps of `I` and of `W`."""
        events = []
        for d, row in enumerate(schedule.actions):
            for action in row:
                parts = [
                    self.times[k, action.stage, action.microbatch]
                    for k in ("IW" if action.kind == "B" else action.kind)
                ]
                events.append(
                    schedules.Event(
                        d, action, min(a for a, _ in parts), max(b for _, b in parts)
                    )
                )
        return schedules.Timeline(
            tuple(sorted(events, key=lambda e: e.start)),
            schedule.devices,
            schedule.name,
        )


def sleeping(recorder: Recorder, stage: int, units: float) -> fpipe.Layer:
    """`x * p`, asleep for so many units in each of F, I and W. The entries of `x` are
    the microbatch's number.
    """

    def call(kind, value, x):
        shape = jax.ShapeDtypeStruct(value.shape, value.dtype)
        return jax.pure_callback(
            recorder.nap(kind, stage, units), shape, value, x[0, 0]
        )

    @jax.custom_vjp
    def times(p, x):
        return call("F", x * p, x)

    def forward(p, x):
        return times(p, x), (p, x)

    def backward(residuals, g):
        p, x = residuals
        return call("W", (g * x).sum(0), x), call("I", g * p, x)

    times.defvjp(forward, backward)
    return fpipe.Layer(times, lambda key, x: jnp.ones(x.shape[-1]))


def batch(microbatches: int) -> jax.Array:
    """One row for each microbatch, with its number."""
    return jnp.broadcast_to(
        jnp.arange(microbatches, dtype=jnp.float32)[:, None], (microbatches, 2)
    )


def stages_of(name: str) -> int:
    return schedules.named(name, DEVICES, 8).stages


def agrees(
    measured: schedules.Timeline, simulated: schedules.Timeline, apart: float
) -> bool:
    """Whether actions that start at least so far apart on paper started in that
    order.
    """
    started = {e.action: e.start for e in measured.events}
    paper = [e.start for e in simulated.events]
    earliest = [started[e.action] for e in simulated.events]
    for k in reversed(range(len(earliest) - 1)):
        earliest[k] = min(earliest[k], earliest[k + 1])
    for e in simulated.events:
        later = bisect.bisect_right(paper, e.start + apart)
        if later < len(paper) and earliest[later] < started[e.action]:
            return False
    return True


def time_table(names: list[str], sizes: list[int], unit: float, repeats: int) -> None:
    print(
        f"F = I = W = {unit * 1e3:g} ms for each device; 'uneven': "
        f"{', '.join(f'{u:g}' for u in UNEVEN)} units"
    )
    print(
        "schedule             m   simulated ms   measured ms   ratio   order   global"
    )
    rows = [(name, stages_of(name), None) for name in names]
    rows += [(name, DEVICES, UNEVEN) for name in ("1f1b", "eager_1f1b")]
    for name, stages, uneven in rows:
        units = uneven or [DEVICES / stages] * stages
        recorder = Recorder()
        layers = [sleeping(recorder, s, u) for s, u in enumerate(units)]
        # One row for each microbatch: fewer rows are fewer microbatches, of the same
        # shape.
        pipe = fpipe.Pipe(
            layers,
            [1] * stages,
            jax.devices(),
            chunks=max(sizes),
            checkpoint="never",
            schedule=name,
        )
        # With the gradient of `x`: else the first stage would have no input gradient to
        # compute.
        step = pipe.value_and_grad(jnp.mean, argnums=(0, 1))
        for m in sizes:
            schedule, x = pipe.make_schedule(m), batch(m)
            cost = tuple(u * unit for u in units)
            simulated = schedules.simulate(
                schedule, schedules.Costs(F=cost, I=cost, W=cost)
            )
            params = pipe.init(jax.random.key(0), x)
            recorder.unit = 0.0
            jax.block_until_ready(step(params, x))
            recorder.unit = unit
            took, order, order_of_all = [], 0, 0
            for _ in range(repeats):
                recorder.times.clear()
                start = time.perf_counter()
                jax.block_until_ready(step(params, x))
                took.append(time.perf_counter() - start)
                assert (
                    len(recorder.times) == 3 * stages * m
                )  # what is simulated is what ran
                measured = recorder.timeline(schedule)
                mine = [
                    tuple(e.action for e in measured.events if e.device == d)
                    for d in range(DEVICES)
                ]
                order += tuple(mine) == schedule.actions
                order_of_all += agrees(measured, simulated, unit / 2)
            median = statistics.median(took)
            print(
                f"{name + ', uneven' * bool(uneven):18s} {m:3d}   "
                f"{simulated.makespan * 1e3:12.0f}   {median * 1e3:11.0f}   "
                f"{median / simulated.makespan:5.2f}   {order:3d}/{repeats}   "
                f"{order_of_all:4d}/{repeats}",
                flush=True,
            )


# --- what is alive ---


def matmul(width: int) -> fpipe.Layer:
    """A layer that changes the width: a shape tells which stage's input an array is."""
    return fpipe.Layer(
        lambda p, x: jnp.tanh(x @ p),
        lambda key, x: jnp.full((x.shape[-1], width), 0.01),
    )


def memory_table(m: int) -> None:
    print(
        f"\nBytes of live stage inputs, peak for each device: m={m}, "
        f"checkpoint='never', {ROWS} rows of {WIDTH} or more"
    )
    columns = "".join(
        f"{text:>28s}" for text in ("measured KiB, by device", "formula KiB, by device")
    )
    print(f"{'schedule':18s}{columns}   equal")
    for name in NAMES:
        stages = stages_of(name)
        pipe = fpipe.Pipe(
            [matmul(WIDTH + s + 1) for s in range(stages)],
            [1] * stages,
            jax.devices(),
            chunks=m,
            checkpoint="never",
            schedule=name,
        )
        schedule, x = pipe.make_schedule(m), jnp.ones((ROWS * m, WIDTH))
        places = schedule.stage_to_device
        counted = [s for s in range(1, stages) if places[s] != places[s - 1]]
        size = [ROWS * (WIDTH + s) * x.dtype.itemsize for s in range(stages)]
        params = pipe.init(jax.random.key(0), x)
        step = pipe.value_and_grad(lambda y: jnp.mean(y**2), argnums=(0, 1))
        jax.block_until_ready(step(params, x))
        peak = [0] * DEVICES

        assert isinstance(pipe._executor, Placed)
        plan = pipe._executor._plans.values()[0].plan

        issue = dispatch.ReadyPlan.issue

        def counting(
            issued,
            slots,
            peak=peak,
            counted=counted,
            size=size,
            places=places,
            pipe=pipe,
            plan=plan,
        ):
            item = issued.item
            if not isinstance(item, Run):
                return
            if all(action.kind != "F" for action in item.actions):
                return
            # The gradient of an input has its shape, and waits where it was made until
            # the other device takes it.
            gradients = {
                id(a)
                for a, slot in zip(slots, plan.slots, strict=True)
                if slot.name.startswith("gradient")
            }
            alive = [
                (a.shape, a.device) for a in jax.live_arrays() if id(a) not in gradients
            ]
            now = [0] * DEVICES
            for s in counted:
                now[places[s]] += size[s] * alive.count(
                    ((ROWS, WIDTH + s), pipe.devices[places[s]])
                )
            peak[:] = map(max, peak, now)

        def observed(ready, shares, slots, issue=issue, counting=counting):
            for share in shares:
                for step in share.steps:
                    # Before it runs: one program may be a forward and its backward,
                    # and nothing that a forward reads comes or goes with it.
                    counting(step, slots)
                    issue(ready, [share._replace(steps=(step,))], slots)

        with unittest.mock.patch.object(dispatch.ReadyPlan, "issue", observed):
            jax.block_until_ready(step(params, x))
        simulated = schedules.simulate(schedule, schedules.Costs(memory=size))
        events = tuple(e for e in simulated.events if e.action.stage in counted)
        formula = dataclasses.replace(simulated, events=events).peak_memory
        columns = [" ".join(f"{b / 1024:5.1f}" for b in row) for row in (peak, formula)]
        equal = "yes" if peak == list(formula) else "no"
        print(
            f"{name:18s}" + "".join(f"{text:>28s}" for text in columns) + f"   {equal}",
            flush=True,
        )


# --- who dispatches ---


def tiny() -> fpipe.Layer:
    return fpipe.Layer(
        lambda p, x: jnp.tanh(x * p), lambda key, x: jnp.ones(x.shape[-1])
    )


def medium(width: int) -> fpipe.Layer:
    """Four products with square matrices."""

    def apply(p, x):
        for _ in range(4):
            x = jnp.tanh(x @ p)
        return x

    return fpipe.Layer(
        apply, lambda key, x: jax.random.normal(key, (width, width)) / width**0.5
    )


def dispatch_table(unit: float, repeats: int, width: int) -> None:
    recorder, m = Recorder(), 8
    actions = 2 * DEVICES * m
    times = (
        f"medians over {repeats} (sleep), {10 * repeats} or {3 * repeats} (last) "
        "alternating repeats"
    )
    print(f"\nWho dispatches: 1F1B, S={DEVICES}, m={m}, {times}")
    print(
        "                                            one thread   thread per device   "
        "ratio"
    )
    sleep = [sleeping(recorder, s, 1.0) for s in range(DEVICES)]
    products = [medium(width)] * DEVICES
    many = (
        8 * m
        # more programs than a device's queue takes (32) before it makes the thread wait
        # that hands them over
    )
    rows = [
        ("sleeping stages, ms a step", m, sleep, batch(m), repeats, 1e3),
        (
            "tiny stages, host us an action",
            m,
            [tiny()] * DEVICES,
            jnp.ones((4 * m, 4)),
            10 * repeats,
            1e6 / actions,
        ),
        (
            f"{width}x{width} products, ms a step",
            m,
            products,
            jnp.ones((width * m, width)),
            10 * repeats,
            1e3,
        ),
        (
            f"the same, m={many}, ms a step",
            many,
            products,
            jnp.ones((width * many, width)),
            3 * repeats,
            1e3,
        ),
    ]
    for label, chunks, layers, x, times, scale in rows:
        runs, took = {}, {}
        recorder.unit = 0.0
        for who in ("one_thread", "thread_per_device"):
            stages = [1] * DEVICES
            pipe = fpipe.Pipe(
                layers,
                stages,
                chunks=chunks,
                checkpoint="never",
                schedule="1f1b",
                dispatch=who,
            )
            runs[who] = (
                pipe.value_and_grad(jnp.mean, argnums=(0, 1)),
                pipe.init(jax.random.key(0), x),
            )
            took[who] = []
            jax.block_until_ready(runs[who][0](runs[who][1], x))
        recorder.unit = unit
        for _ in range(times):
            for who, (step, params) in runs.items():
                start = time.perf_counter()
                out = step(params, x)
                if "host" not in label:
                    jax.block_until_ready(out)
                took[who].append(time.perf_counter() - start)
                jax.block_until_ready(out)
        one, several = (statistics.median(t) * scale for t in took.values())
        print(
            f"{label:42s}  {one:10.1f}   {several:17.1f}   {several / one:5.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="timed steps of each (default: %(default)s)",
    )
    parser.add_argument(
        "--unit",
        type=float,
        default=40.0,
        help="milliseconds of sleep (default: %(default)s)",
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[8, 16],
        help="microbatches (default: 8 16)",
    )
    parser.add_argument(
        "--width",
        type=int,
        default=256,
        help="of the products in the last table (default: %(default)s)",
    )
    parser.add_argument(
        "--timed",
        nargs="+",
        choices=NAMES,
        default=NAMES,
        help="schedules of the first table (default: all)",
    )
    args = parser.parse_args()
    if args.repeats < 1:
        parser.exit(2, f"--repeats {args.repeats}: at least 1\n")
    if not 0 < args.unit < 10_000:
        parser.exit(
            2, f"--unit {args.unit:g}: milliseconds, more than 0 and less than 10000\n"
        )
    for flag, least in {"sizes": min(args.sizes), "width": args.width}.items():
        if least < 1:
            parser.exit(2, f"--{flag} {least}: at least 1\n")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {DEVICES} devices, "
        f"medians of {args.repeats}"
    )
    time_table(args.timed, args.sizes, args.unit / 1e3, args.repeats)
    memory_table(max(args.sizes))
    dispatch_table(args.unit / 1e3, args.repeats, args.width)


if __name__ == "__main__":
    main()
