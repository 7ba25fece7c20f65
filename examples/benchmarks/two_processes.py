"""How much faster two cores are than one: a pipelined training step beside an
unpipelined one, in JAX and in torch.

Measured is one step, the loss and all gradients (no optimizer), of 8 pre-norm
transformer blocks in float32: causal attention with 8 heads, an MLP of four times the
width with GELU, mean squared error. Two processes, each pinned to one core, are joined
by gloo; a device of one process may use every core, so two devices of one process would
show nothing. Side by side, in alternating rounds:

1. `fpipe.Pipe(executor="scan")`, for each schedule with and without remat (`checkpoint`
   "always" and "never").
2. The unpipelined step in JAX on the first core alone: `lax.scan` over the same
   microbatches, gradients summed in the carry. With remat, each half of the blocks is a
   `jax.checkpoint`.
3. `torch.distributed.pipelining` on the same cores, without remat, and torch's own
   unpipelined step on the first core. torch lives in a virtual environment of its own,
   which the script makes if it is not there.

A time is from the first process that leaves a barrier to the last one that has its
results. The speed-up is over the same library's unpipelined step with the same remat
and microbatches. The ideal is that of stages that take equal time and backwards that
are not cut: `2 m / (m + 1)`, and `4 m / (2 m + 1)` with two stages for each process.
ScheduleInterleavedZeroBubble does cut its backwards, so it may pass the latter. `over
torch` is the time over that of torch's fastest pipeline at the same `m`: below 1 is
faster than torch.

`CPU s` is the CPU time of the process that took more of it. What is missing to
`seconds` is time in which it waited for the other one. `faults` are its page faults.

`--alone` shows what bounds the pipeline. `in_both` is the unpipelined step on both
cores at the same time: what they share (caches, memory) makes each slower. `one_stage`
is the whole model as one stage on the first core: what fpipe's programs gain by
themselves. `half_in_one` is the unpipelined step of half of the model on the first core
alone, `half_in_both` on both cores at the same time: what XLA makes of a stage.
`stage_alone_gpipe` is half of the model on each core at the same time, as a pipeline of
one stage: the programs of a stage, with residuals that wait in pools, and nothing that
is sent. `unsent_gpipe` is the pipeline itself without its transfers: each process goes
on with what it has, so its results are wrong, but its work is the same. The speed-up of
these rows is what a pipeline of two such stages would reach if sending cost nothing.
`of alone` is the share of the stage's that the pipeline reaches.

The defaults are the large size; the small one is `--width 128 --tokens 64`; `--quick`
only shows that everything runs.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import platform
import queue
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

HERE = pathlib.Path(__file__).parent
TORCH = "2.13.0"
SCHEDULES = ("gpipe", "eager_1f1b", "interleaved_1f1b")
TORCH_SCHEDULES = ("ScheduleGPipe", "Schedule1F1B", "ScheduleInterleavedZeroBubble")
# Rows of what runs without a pipeline. The unpipelined step on both cores at the same
# time; the whole model as one stage on one core; the unpipelined step of half of the
# model, on one core and on both; one stage on both, with its residuals in pools as a
# schedule of one device has them; and a pipeline on both that sends nothing.
IN_BOTH, ONE_STAGE, ALONE, UNSENT = "in_both", "one_stage", "stage_alone_", "unsent_"
HALF_IN_ONE, HALF_IN_BOTH = "half_in_one", "half_in_both"
HALVES = (HALF_IN_ONE, HALF_IN_BOTH)
INTERLEAVED = ("interleaved_1f1b", "ScheduleInterleavedZeroBubble")
QUICK = {"width": 32, "batch": 8, "tokens": 16, "microbatches": [4], "repeats": 1}


# --- what a worker does, in either library ---


def replies() -> Callable[..., None]:
    """A function that writes a line to the parent. What libraries print to stdout goes
    to stderr from here on.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(*words: Any) -> None:
        print(*words, file=out, flush=True)

    return reply


def serve(
    reply: Callable[..., None],
    make: Callable[..., tuple[Callable[[], Any], Any, Any]],
    barrier: Callable[[], Any],
) -> None:
    """Answer the parent's lines, until it closes the pipe.

    `warm NAME` is answered by the loss and the sum of the squared gradients, `run NAME`
    by start and end of a step. The clock is the same in all processes of a machine.
    `spent NAME` is answered by the CPU seconds and the page faults of the step that ran
    last. Between the lines the process is asleep.
    """
    steps: dict[str, Callable[[], Any]] = {}
    spent = 0.0, 0
    for line in sys.stdin:
        verb, name = line.split()
        if verb == "warm":
            schedule, checkpoint, m = name.split(",")
            steps[name], loss, squares = make(schedule, checkpoint, int(m))
            steps[name]()
            reply(float(loss), float(squares))
        elif verb == "spent":
            reply(*spent)
        else:
            barrier()
            before = resource.getrusage(resource.RUSAGE_SELF)
            start = time.monotonic()
            steps[name]()
            end = time.monotonic()
            after = resource.getrusage(resource.RUSAGE_SELF)
            busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            spent = busy, after.ru_minflt - before.ru_minflt
            reply(start, end)


# --- the parent's side ---


class WorkerError(Exception):
    """A worker that died, or took too long."""


class Workers:
    """Two processes of one library, each pinned to one core from its first instruction
    on.
    """

    def __init__(
        self,
        library: str,
        python: str,
        cores: list[int],
        options: dict[str, Any],
        timeout: float,
    ) -> None:
        self.library, self.timeout = library, timeout
        self.lines: queue.Queue[tuple[int, str]] = queue.Queue()
        self.processes: list[subprocess.Popen[str]] = []
        self.errors = [tempfile.TemporaryFile() for _ in cores]  # noqa: SIM115
        everywhere = os.sched_getaffinity(0)
        # As many threads as the process has cores. No stage is in both processes.
        threads = {"OMP_NUM_THREADS": "1", "PJRT_NPROC": "1"}
        env = os.environ | threads | {"JAX_PLATFORMS": "cpu"}
        if library == "torch":
            env.pop("PYTHONPATH", None)  # that is for the other environment
            # A host's name may lead to an address that does not answer.
            env["GLOO_SOCKET_IFNAME"] = "lo"
        port = free_port()
        for rank, core in enumerate(cores):
            given = json.dumps(options | {"rank": rank, "port": port})
            os.sched_setaffinity(0, {core})  # what is started inherits it
            try:
                process = subprocess.Popen(
                    [python, str(HERE / f"_{library}_two_processes.py"), given],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self.errors[rank],
                    text=True,
                    env=env,
                    start_new_session=True,  # Ctrl-C is the parent's alone
                )
            finally:
                os.sched_setaffinity(0, everywhere)
            self.processes.append(process)
            threading.Thread(
                target=self._read, args=(rank, process.stdout), daemon=True
            ).start()

    def _read(self, rank: int, lines: Any) -> None:
        for line in lines:
            self.lines.put((rank, line))
        self.lines.put((rank, ""))

    def ask(self, line: str = "") -> list[list[str]]:
        """Send both a line, and wait for the answer of each."""
        for rank, process in enumerate(self.processes):
            if line:
                assert process.stdin is not None
                try:
                    process.stdin.write(line + "\n")
                    process.stdin.flush()
                except BrokenPipeError:
                    raise WorkerError(self._report(rank, "died", line)) from None
        answers: dict[int, list[str]] = {}
        until = time.monotonic() + self.timeout
        while len(answers) < len(self.processes):
            try:
                rank, answer = self.lines.get(
                    timeout=max(0.0, until - time.monotonic())
                )
            except queue.Empty:
                late = min(set(range(len(self.processes))) - set(answers))
                raise WorkerError(
                    self._report(late, f"gave no answer in {self.timeout:g} s", line)
                ) from None
            if not answer:
                raise WorkerError(self._report(rank, "died", line))
            answers[rank] = answer.split()
        return [answers[rank] for rank in sorted(answers)]

    def _report(self, rank: int, what: str, line: str) -> str:
        file = self.errors[rank].fileno()
        # `pread`, for the worker writes at the position that `seek` would move.
        tail = os.pread(file, 4000, max(0, os.fstat(file).st_size - 4000)).decode(
            errors="replace"
        )
        return (
            f"the {self.library} worker {rank} {what} at {line or 'its start'!r}; the "
            f"end of its stderr:\n{tail}"
        )

    def close(self) -> None:
        """End both, whatever they are doing."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torch_python(venv: pathlib.Path, timeout: float) -> str:
    """The interpreter of the virtual environment with torch, which is made if it is not
    there.
    """
    python = venv / "bin" / "python"
    if not python.exists():
        print(f"making {venv} ...", file=sys.stderr, flush=True)
        subprocess.run(
            [sys.executable, "-m", "venv", str(venv)], check=True, timeout=timeout
        )
    ask = [
        str(python),
        "-c",
        "from importlib.metadata import version as v; print(v('torch'))",
    ]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = subprocess.run(
        ask, capture_output=True, text=True, check=False, env=env, timeout=timeout
    ).stdout.strip()
    if found and found.split("+")[0] != TORCH:
        raise WorkerError(
            f"{venv} has torch {found}, not {TORCH}: name another directory with "
            "--torch-venv"
        )
    if not found:
        print(f"installing torch {TORCH} in {venv} ...", file=sys.stderr, flush=True)
        install = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            f"torch=={TORCH}",
            "numpy",
        ]
        subprocess.run(install, check=True, env=env, timeout=3 * timeout)
    return str(python)


def cpu_model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


# --- rows of the table ---

Row = tuple[
    str, str, str, int
]  # library, schedule ("" for unpipelined), checkpoint, microbatches


@dataclasses.dataclass(frozen=True)
class Took:
    """What a step takes.

    Attributes:
        seconds: from its first process's start to its last one's end.
        cpu: the CPU seconds of each process, of all its threads.
        faults: the page faults of each process.
    """

    seconds: float
    cpu: tuple[float, ...]
    faults: tuple[int, ...]


def all_rows(args: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    of_one_stage = [f"{ALONE}gpipe", f"{ALONE}eager_1f1b"]
    # With two stages for each process half of the model is not one stage.
    of_halves = [name for name in args.schedules if name not in INTERLEAVED]
    of_no_transfers = [UNSENT + name for name in of_halves]
    for m in args.microbatches:
        for checkpoint in args.checkpoints:
            alone = (
                (IN_BOTH, ONE_STAGE, *HALVES, *of_one_stage, *of_no_transfers)
                if args.alone
                else ()
            )
            rows += [
                ("jax", schedule, checkpoint, m)
                for schedule in ("", *args.schedules, *alone)
            ]
        if not args.no_torch:
            rows += [
                ("torch", schedule, "never", m) for schedule in ("", *TORCH_SCHEDULES)
            ]
    return rows


def sends_nothing(schedule: str) -> bool:
    """Whether what a row runs is half of a model in each process, by itself."""
    return schedule in HALVES or schedule.startswith((ALONE, UNSENT))


def name_of(row: Row) -> str:
    _, schedule, checkpoint, m = row
    return f"{schedule or 'unpipelined'},{checkpoint},{m}"


def ideal(schedule: str, m: int) -> float:
    each = 2 if schedule in INTERLEAVED else 1
    return 2 * each * m / (each * m + 1)


def without_a_pipe(schedule: str, m: int) -> float:
    """By what the speed-up of a step without a pipeline is multiplied: as if a pipeline
    with such stages could send for nothing.
    """
    if schedule in (IN_BOTH, ONE_STAGE):
        return ideal(schedule, m)
    # Half of the model takes half of the time.
    return ideal(schedule, m) / 2 if sends_nothing(schedule) else 1.0


def of_alone(own: Took, alone: Took | None, top: float) -> str:
    """The share of a pipeline beside one stage alone.

    Arguments:
        top: the ideal speed-up. Two devices would reach 2 if the pipeline were full
            from the first to the last moment.
    """
    return f"{2 / top * alone.seconds / own.seconds:.0%}" if alone else ""


def warm_up(rows: list[Row], workers: dict[str, Workers]) -> None:
    """Compile and run each once; pipelined and unpipelined steps of a library must
    compute the same. All workers but torch's have the same model.
    """
    want: dict[str, list[float]] = {}
    for k, row in enumerate(rows):
        library = row[0]
        print(
            f"warming up {k + 1}/{len(rows)}: {library} {name_of(row)}",
            file=sys.stderr,
            flush=True,
        )
        got = [float(word) for word in workers[library].ask(f"warm {name_of(row)}")[0]]
        if sends_nothing(row[1]):
            continue  # half of the model
        model = "torch" if library == "torch" else "jax"
        expected = want.setdefault(model, got)
        if not all(
            math.isclose(a, b, rel_tol=1e-3) for a, b in zip(got, expected, strict=True)
        ):
            raise WorkerError(
                f"{library} {name_of(row)}: loss and squared gradients {got}, but "
                f"unpipelined they are {expected}"
            )


def measure(
    rows: list[Row], workers: dict[str, Workers], repeats: int
) -> dict[Row, Took]:
    """The medians of a step of each, over alternating rounds."""
    took: dict[Row, list[Took]] = {row: [] for row in rows}
    for k in range(repeats):
        print(f"round {k + 1}/{repeats}", file=sys.stderr, flush=True)
        for row in rows:
            spans = [
                [float(word) for word in answer]
                for answer in workers[row[0]].ask(f"run {name_of(row)}")
            ]
            seconds = max(end for _, end in spans) - min(start for start, _ in spans)
            spent = workers[row[0]].ask(f"spent {name_of(row)}")
            cpu = tuple(float(cpu) for cpu, _ in spent)
            faults = tuple(int(faults) for _, faults in spent)
            took[row].append(Took(seconds, cpu, faults))
    return {row: medians_of(rounds) for row, rounds in took.items()}


def medians_of(rounds: list[Took]) -> Took:
    """What a step takes, of what it took in some rounds."""
    cpu = zip(*(own.cpu for own in rounds), strict=True)
    faults = zip(*(own.faults for own in rounds), strict=True)
    return Took(
        statistics.median(own.seconds for own in rounds),
        tuple(map(statistics.median, cpu)),
        tuple(map(statistics.median_low, faults)),
    )


def print_tables(took: dict[Row, Took], args: argparse.Namespace) -> None:
    """A table for each number of microbatches."""
    for m in args.microbatches:
        rows = [row for row in took if row[-1] == m]
        torch = [took[row].seconds for row in rows if row[0] == "torch" and row[1]]
        print(f"\nm={m}, microbatches of {args.batch // m} x {args.tokens} tokens")
        columns = "seconds  speed-up  ideal  share  CPU s  faults"
        columns += "  of alone" * args.alone + "  over torch" * bool(torch)
        print(f"{'configuration':36s} {columns}")
        for row in rows:
            library, schedule, checkpoint, _ = row
            own = took[row]
            text = f"{library} {schedule or 'unpipelined'}"
            text = f"{text + ', remat' * (checkpoint == 'always'):36s}"
            text += f" {own.seconds:7.3f}"
            top = ideal(schedule, m)
            speed_up = took[library, "", checkpoint, m].seconds / own.seconds
            speed_up *= without_a_pipe(schedule, m)
            text += (
                f"  {speed_up:8.2f}  {top:5.2f}  {speed_up / top:5.0%}"
                if schedule
                else " " * 24
            )
            text += f"  {max(own.cpu):5.3f}  {max(own.faults):6d}"
            if args.alone:
                alone = took.get((library, ALONE + schedule, checkpoint, m))
                text += f"  {of_alone(own, alone, top):>8s}"
            if torch:
                text += f"  {own.seconds / min(torch):10.2f}"
            print(text.rstrip())


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--width", type=int, default=512, help="a multiple of 8 (default: %(default)s)"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=32,
        help="sequences in a step (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=128,
        help="length of a sequence (default: %(default)s)",
    )
    parser.add_argument(
        "--microbatches",
        type=int,
        nargs="+",
        default=[4, 8, 16],
        help="(default: 4 8 16)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="alternating rounds (default: %(default)s)",
    )
    schedules = " ".join(SCHEDULES)
    parser.add_argument(
        "--schedules",
        nargs="+",
        choices=SCHEDULES,
        default=SCHEDULES,
        help=f"of fpipe (default: {schedules})",
    )
    modes = ("never", "always")
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        choices=modes,
        default=modes,
        help="(default: never always)",
    )
    venv = pathlib.Path.home() / ".cache" / "fpipe" / "torch-venv"
    parser.add_argument(
        "--torch-venv",
        type=pathlib.Path,
        default=venv,
        metavar="PATH",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="also what bounds a pipeline (default: %(default)s)",
    )
    parser.add_argument(
        "--no-torch", action="store_true", help="leave torch out (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=600,
        help="seconds to wait for a worker each time (default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes and one round (default: %(default)s)",
    )
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)  # what is given on the command line still counts
    args = parser.parse_args()
    if not hasattr(os, "sched_setaffinity"):
        parser.exit(2, "this needs Linux, to pin processes to cores\n")
    if len(os.sched_getaffinity(0)) < 2:
        parser.exit(2, "this needs two cores\n")
    if args.width < 8 or args.width % 8:
        parser.exit(2, f"--width {args.width}: a multiple of 8\n")
    for flag in ("batch", "tokens", "repeats"):
        if getattr(args, flag) < 1:
            parser.exit(2, f"--{flag} {getattr(args, flag)}: at least 1\n")
    for m in args.microbatches:
        if m < 2 or m % 2 or args.batch % m:
            parser.exit(
                2, f"--microbatches {m}: even, and a divisor of --batch {args.batch}\n"
            )
    if not args.timeout > 0:
        parser.exit(2, f"--timeout {args.timeout:g}: more than 0\n")
    return args


def run(args: argparse.Namespace) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    pythons = {"jax": sys.executable}
    if not args.no_torch:
        pythons["torch"] = torch_python(args.torch_venv.expanduser(), args.timeout)
    options = {key: getattr(args, key) for key in ("width", "batch", "tokens")}
    workers: dict[str, Workers] = {}
    try:
        versions = []
        for library, python in pythons.items():
            workers[library] = Workers(library, python, cores, options, args.timeout)
            versions.append(" ".join(workers[library].ask()[0]))
        print(
            f"{', '.join(versions)}, Python {platform.python_version()}, "
            f"{cpu_model()}, {os.cpu_count()} cores, workers on "
            f"cores {cores[0]} and {cores[1]}\n8 blocks, width {args.width}, "
            f"{args.batch} x {args.tokens} tokens, "
            f"float32; medians of {args.repeats} alternating rounds",
            flush=True,
        )
        rows = all_rows(args)
        warm_up(rows, workers)
        print_tables(measure(rows, workers, args.repeats), args)
    finally:
        for pair in workers.values():
            pair.close()


def main(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a benchmark; whatever ends it ends its processes too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (WorkerError, subprocess.SubprocessError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(run, parsed())
