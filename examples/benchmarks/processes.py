"""The placed executor over two processes, beside scan and torch: a training step, the
transfer of a boundary, and the time of the host per action.

Model, sizes and clock are those of `two_processes.py`: 8 transformer blocks in float32,
the loss and all gradients of a step, two processes that are each pinned to one core. In
alternating rounds of one run:

1. `fpipe.Pipe(executor="placed")` over both processes, for each schedule.
2. The same pipe under `"scan"`.
3. `torch.distributed.pipelining` on the same cores, without remat.
4. The unpipelined steps of both libraries on the first core alone.
5. The unpipelined step of JAX in both processes at once, each with the whole batch.
6. The stages alone, of each of them: both processes run what their stage computes, at
   the same time, and send nothing. Of placed these are the very programs, issued in the
   order of the plan; of scan a pipeline of one stage; of torch a loop.

`share` is the share of the ideal speed-up, `2 m / (m + 1)`, that a pipe has over the
unpipelined step of its library. The ideal knows nothing of what two busy cores lose to
each other (memory, clock rate, threads of one core); the share of 5 shows that. The
bound of a pipe is the time of its stages alone, 6, times `(m + 1) / m`: at the start
and at the end of a step one of the two waits. `of bound` is this over the time of the
pipe. `over torch` is the time over that of torch's fastest pipeline. `CPU s` is the CPU
time of all threads of both processes, and `faults` are their page faults.

The processes of JAX have a thread for their one core (`PJRT_NPROC=1`), and keep the
memory of freed arrays, as `fpipe.distributed.initialize` sets it. Then come, for each
`m`:

- the time of one transfer of a boundary, from its start to its arrival, while nothing
  else runs;
- the time that a process takes to issue a step, per action that it issues, of a model
  whose programs take next to none, beside a pipe of two devices in one process.

`--quick` only shows that everything runs.
"""

import argparse
import os
import pathlib
import platform
import statistics
import sys

from two_processes import (
    ALONE,
    IN_BOTH,
    QUICK,
    TORCH_SCHEDULES,
    Row,
    Took,
    Workers,
    cpu_model,
    ideal,
    main,
    measure,
    torch_python,
    warm_up,
)

SCHEDULES = ("eager_1f1b", "1f1b", "interleaved_1f1b")
# What the stages run that run alone.
APART = "eager_1f1b"


def step_rows(args: argparse.Namespace, m: int) -> list[Row]:
    """The steps with so many microbatches that are compared."""
    rows: list[Row] = []
    for checkpoint in args.checkpoints:
        rows += [("jax", "", checkpoint, m), ("jax", IN_BOTH, checkpoint, m)]
        for schedule in args.schedules:
            rows += [
                (library, schedule, checkpoint, m) for library in ("jax", "placed")
            ]
        rows += [("jax", ALONE + APART, checkpoint, m)]
        rows += [("placed", ALONE + APART, checkpoint, m)]
    if not args.no_torch:
        of_torch = ("", *args.torch_schedules, ALONE + APART)
        rows += [("torch", schedule, "never", m) for schedule in of_torch]
    return rows


def label_of(row: Row) -> str:
    library, schedule, checkpoint, _ = row
    is_pipe = library == "jax" and schedule not in ("", IN_BOTH)
    name = schedule.replace(IN_BOTH, "in both") or "unpipelined"
    if schedule.startswith(ALONE):
        name = "stages alone"
    text = f"{'scan' if is_pipe else library} {name}"
    return text + ", remat" * (checkpoint == "always")


def print_steps(found: dict[Row, Took], m: int) -> None:
    """A table of the steps with so many microbatches."""
    seconds = {row: took.seconds for row, took in found.items()}
    pipes = [
        row for row in seconds if row[1] and row[1] not in (IN_BOTH, ALONE + APART)
    ]
    torch = [seconds[row] for row in pipes if row[0] == "torch"]
    columns = "seconds  speed-up  ideal  share  of bound  over scan  over torch"
    print(f"{'':36s} {columns}     CPU s   faults")
    for row, took in seconds.items():
        library, schedule, checkpoint, _ = row
        line = f"{label_of(row):36s} {took:7.3f}"
        base = seconds["torch" if library == "torch" else "jax", "", checkpoint, m]
        if row in pipes:
            top = ideal(schedule, m)
            bound = seconds[library, ALONE + APART, checkpoint, m] * 2 / top
            line += f"  {base / took:8.2f}  {top:5.2f}  {base / took / top:5.0%}"
            line += f"  {bound / took:8.0%}"
            scan = seconds.get(("jax", schedule, checkpoint, m))
            line += f"  {took / scan:9.2f}" if scan else " " * 11
            if torch and checkpoint == "never":
                line += f"  {took / min(torch):10.2f}"
        elif schedule == IN_BOTH:
            line += f"  {'':8s}  {'':5s}  {base / took:5.0%}"
        own = found[row]
        print(f"{line:102s} {sum(own.cpu):9.3f}  {sum(own.faults):7d}")


def spans(workers: Workers, name: str, repeats: int) -> list[list[tuple[float, float]]]:
    """From when to when each process took, for each repeat."""
    workers.ask(f"warm {name}")
    found = []
    for _ in range(repeats):
        answers = workers.ask(f"run {name}")
        found.append([(float(start), float(end)) for start, end in answers])
    return found


def print_costs(workers: Workers, args: argparse.Namespace, m: int) -> None:
    """The cost of a transfer and of the host, with so many microbatches."""
    repeats = 10 * args.repeats
    sent = spans(workers, f"transfer,never,{m}", repeats)
    took = statistics.median(
        max(end for _, end in both) - min(start for start, _ in both) for both in sent
    )
    size = args.batch // m * args.tokens * args.width * 4
    print(f"a transfer of {size / 2**20:.2f} MiB: {1e3 * took:.2f} ms")
    # A process issues F and B of each microbatch for each stage that it has.
    for name, stages in (("host_of_two", 1), ("host_of_one", 2)):
        of_first = [both[0] for both in spans(workers, f"{name},never,{m}", repeats)]
        each = statistics.median(end - start for start, end in of_first)
        actions = 2 * m * stages
        where = "two processes" if stages == 1 else "one process"
        print(f"host time in {where}: {1e6 * each / actions:.0f} us an action")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    show = "(default: %(default)s)"
    parser.add_argument("--width", type=int, default=512, help=f"by 8 {show}")
    parser.add_argument("--batch", type=int, default=32, help=f"sequences {show}")
    parser.add_argument("--tokens", type=int, default=128, help=f"of each {show}")
    parser.add_argument(
        "--microbatches", type=int, nargs="+", default=[8, 16], help="(default: 8 16)"
    )
    parser.add_argument("--repeats", type=int, default=5, help=f"rounds {show}")
    parser.add_argument(
        "--schedules",
        nargs="+",
        choices=SCHEDULES,
        default=["eager_1f1b"],
        help="(default: eager_1f1b)",
    )
    modes = ("never", "always")
    parser.add_argument(
        "--checkpoints", nargs="+", choices=modes, default=["never"], help=show
    )
    venv = pathlib.Path.home() / ".cache" / "fpipe" / "torch-venv"
    parser.add_argument(
        "--torch-schedules",
        nargs="+",
        choices=TORCH_SCHEDULES,
        default=TORCH_SCHEDULES,
        help="(default: all)",
    )
    parser.add_argument("--torch-venv", type=pathlib.Path, default=venv, help=show)
    parser.add_argument("--no-torch", action="store_true", help="leave torch out")
    parser.add_argument(
        "--timeout", type=float, default=600, help=f"seconds for a worker {show}"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)  # what is given on the command line still counts
    args = parser.parse_args()
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        parser.exit(2, "this needs Linux and two cores, to pin processes to cores\n")
    if args.width < 8 or args.width % 8:
        parser.exit(2, f"--width {args.width}: a multiple of 8\n")
    for m in args.microbatches:
        if m < 2 or m % 2 or args.batch % m:
            parser.exit(
                2, f"--microbatches {m}: even, and a divisor of --batch {args.batch}\n"
            )
    return args


def run(args: argparse.Namespace) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    options = {key: getattr(args, key) for key in ("width", "batch", "tokens")}
    # The placed steps have one device in each process, and the costs of a pipe in one
    # process need two.
    given = {
        "jax": options,
        "placed": options | {"devices": 1},
        "costs": options | {"devices": 2},
    }
    scripts = {"costs": "placed"}
    pythons: dict[str, str] = dict.fromkeys(given, sys.executable)
    if not args.no_torch:
        given["torch"] = options
        pythons["torch"] = torch_python(args.torch_venv.expanduser(), args.timeout)
    workers: dict[str, Workers] = {}
    try:
        versions = {}
        for name, python in pythons.items():
            script = scripts.get(name, name)
            workers[name] = Workers(script, python, cores, given[name], args.timeout)
            versions[" ".join(workers[name].ask()[0])] = None
        print(
            f"{', '.join(versions)}, Python {platform.python_version()}, "
            f"{cpu_model()}, {os.cpu_count()} cores, workers on "
            f"cores {cores[0]} and {cores[1]}\n8 blocks, width {args.width}, "
            f"{args.batch} x {args.tokens} tokens, "
            f"float32; medians of {args.repeats} alternating rounds",
            flush=True,
        )
        for m in args.microbatches:
            rows = step_rows(args, m)
            warm_up(rows, workers)
            found = measure(rows, workers, args.repeats)
            print(f"\nm={m}, microbatches of {args.batch // m} x {args.tokens} tokens")
            print_steps(found, m)
            print_costs(workers["costs"], args, m)
            sys.stdout.flush()
    finally:
        for pair in workers.values():
            pair.close()


if __name__ == "__main__":
    main(run, parsed())
