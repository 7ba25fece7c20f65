"""fpipe beside other libraries that run pipelines: what a step costs the host, how long
the first step takes, how much code a user writes, and how much memory a step needs.

The model is the same everywhere: four stages `tanh(x * sum(parameters))`, with 5 or 50
parameter arrays each, the mean squared error as the loss, 8 microbatches, 1F1B. A step
has 64 actions, each a forward or a backward of one microbatch on one stage. They
compute next to nothing, so what takes time is the host.

Each peer runs in a process of its own, in an environment of its own. The script makes
the environments that are not there, with pip, in the directory `--environments`, and
prints what pip says where a peer does not install:

    fpipe      in this environment, under the placed executor
    torch      `torch.distributed.pipelining`, `Schedule1F1B`, a process for each stage
    spectrax   SpectraX (`spectrax-lib`), `sxjit` with `Std1F1B`
    jaxpp      NVIDIA's JaxPP

Columns of the first table, medians over the repeats:

    ms/step        until the results of a step are ready
    us/action      the same for each action that one host issues: of all 64 in one
                   process, of 16 in each process of torch
    CPU us/action  CPU time of all threads and processes, for each of the 64 actions
    first step s   tracing, compiling and running, when the library is imported and its
                   arguments are made; no compilation cache

Columns of the second table:

    lines          of code that a user writes for this, without blank lines and
                   comments: model, pipeline and step
    peak MiB       how much more memory a step takes at its peak than there is between
                   steps (resident set size, summed over processes), in a larger size:
                   with 5 arrays, a boundary of one microbatch has `--rows` / 8 rows of
                   `--width` numbers
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

HERE = pathlib.Path(__file__).parent
STAGES, CHUNKS = 4, 8
ACTIONS = 2 * STAGES * CHUNKS
BEGIN, END = "# --- user code ---", "# --- end of user code ---"
# What pip is to install. fpipe is here already.
PEERS = {"fpipe": "", "torch": "torch", "spectrax": "spectrax-lib", "jaxpp": "jaxpp"}
# Nobody has measured what does not install.
MEASURED = ("fpipe", "torch", "spectrax")


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a model and its batch.

    Attributes:
        arrays: parameters of a stage.
        width: of each of them.
        rows: of the batch.
    """

    arrays: int
    width: int
    rows: int


# --- what a worker does, in any library ---


@dataclasses.dataclass
class Steps:
    """The times of one process: of a first step, and of others after it."""

    first: float
    spans: list[tuple[float, float]]
    cpu: list[float]


def timed(step: Callable[[], Any], repeats: int, meet: Callable[[], Any]) -> Steps:
    """Run a step, which waits for its results, `1 + repeats` times.

    Arguments:
        meet: waits for the other processes of this peer.
    """
    meet()
    start = time.monotonic()
    step()
    first = time.monotonic() - start
    step()  # the first one after compilation fills caches
    spans, cpu = [], []
    for _ in range(repeats):
        meet()
        start, used = time.monotonic(), time.process_time()
        step()
        cpu.append(time.process_time() - used)
        spans.append((start, time.monotonic()))
    return Steps(first, spans, cpu)


def together(processes: list[Steps]) -> dict[str, float]:
    """The times of one peer's processes as the first table has them."""
    rounds = zip(*(own.spans for own in processes), strict=True)
    walls = [max(e for _, e in spans) - min(s for s, _ in spans) for spans in rounds]
    cpu = [sum(own) for own in zip(*(p.cpu for p in processes), strict=True)]
    wall = statistics.median(walls)
    return {
        "ms": wall * 1e3,
        "us": wall * 1e6 / (ACTIONS / len(processes)),
        "cpu": statistics.median(cpu) * 1e6 / ACTIONS,
        "first": max(own.first for own in processes),
    }


def peak_bytes(step: Callable[[], Any]) -> int:
    """How many bytes more than before it are resident at the peak of a step."""
    step()
    gc.collect()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the last peak
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def check(loss: float, squares: float, want: tuple[float, float]) -> None:
    """The loss of a step and the sum of its squared gradients are the plain ones."""
    for got, expected in zip((loss, squares), want, strict=True):
        assert abs(got - expected) <= 1e-4 * abs(expected), (got, expected)


def user_lines(file: str) -> int:
    """Lines of code between the two marks in a worker's file."""
    lines = pathlib.Path(file).read_text().splitlines()
    own = [line.strip() for line in lines[lines.index(BEGIN) : lines.index(END)]]
    return sum(bool(line) and not line.startswith("#") for line in own)


def answer(
    options: dict[str, Any],
    name: str,
    file: str,
    made: Callable[[Size], Callable[[], Any]],
    compare: Callable[[Size], None],
) -> None:
    """Measure a peer that is one process, and print what the parent reads.

    Arguments:
        name, file: of the peer, and of its worker.
        made: a step of a size, which waits for its results.
        compare: checks the results of such a step.
    """
    times = {}
    for arrays in options["arrays"]:
        step = made(Size(arrays, 4, 4 * CHUNKS))
        times[arrays] = together([timed(step, options["repeats"], lambda: None)])
    compare(Size(2, 4, 4 * CHUNKS))
    step = made(Size(5, options["width"], options["rows"]))
    peak = peak_bytes(step) / 2**20
    own = {"name": name, "times": times, "lines": user_lines(file), "peak": peak}
    print(json.dumps(own))


# --- the parent's side ---


def environment(peer: str, folder: pathlib.Path) -> pathlib.Path | str:
    """The interpreter of a peer's environment, or what pip says.

    The environment is made if it is not there.
    """
    if not PEERS[peer]:
        return pathlib.Path(sys.executable)
    python = folder / peer / "bin" / "python"
    if not python.exists():
        print(f"making {folder / peer} ...", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder / peer], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", PEERS[peer], "numpy"]
    done = subprocess.run(pip, capture_output=True, text=True, env=clean(), check=False)
    errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
    if done.returncode:
        return errors[-1] if errors else f"pip ended with {done.returncode}"
    return python


def clean() -> dict[str, str]:
    """The environment variables of a worker."""
    # `PYTHONPATH` is for this environment. Large arrays go back to the system when they
    # are freed, so that the resident set shows what is alive.
    own = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return own | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def answers(peer: str, python: pathlib.Path, options: dict[str, Any]) -> Iterator[Any]:
    """What a peer's worker prints: a line of JSON for each of its variants."""
    env = clean()
    if peer == "fpipe":
        env["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    worker = subprocess.Popen(
        [python, HERE / f"_{peer}_peer.py", json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    try:
        out, error = worker.communicate(timeout=options["timeout"])
    except subprocess.TimeoutExpired:
        sys.exit(f"the worker of {peer} took more than {options['timeout']:g} s")
    finally:
        # It may have started processes of its own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
    if worker.returncode:
        sys.exit(f"the worker of {peer} failed:\n{error[-4000:]}")
    for line in out.splitlines():
        if line.startswith("{"):
            yield json.loads(line)


def run(args: argparse.Namespace) -> None:
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} cores, "
        f"S={STAGES}, m={CHUNKS}, 1F1B; medians of {args.repeats}\n"
    )
    found: list[Any] = []
    missing: list[str] = []
    for peer in args.peers:
        python = environment(peer, args.environments.expanduser())
        if isinstance(python, str):
            missing.append(f"{peer}: {python}")
        elif peer not in MEASURED:
            missing.append(f"{peer}: it installs, but nothing here measures it")
        else:
            print(f"measuring {peer} ...", file=sys.stderr, flush=True)
            options = {
                "arrays": args.arrays,
                "repeats": args.repeats,
                "width": args.width,
                "rows": args.rows,
                "timeout": args.timeout,
            }
            found += answers(peer, python, options)
    width = max(len(own["name"]) for own in found)
    head = "ms/step   us/action   CPU us/action   first step s"
    print(f"{'peer':{width}s}   arrays   {head}")
    for arrays in args.arrays:
        for own in found:
            of = own["times"][str(arrays)]
            print(
                f"{own['name']:{width}s}   {arrays:6d}   {of['ms']:7.2f}   "
                f"{of['us']:9.1f}   {of['cpu']:13.1f}   {of['first']:12.2f}"
            )
    print(f"\n{'peer':{width}s}   lines   peak MiB")
    for own in found:
        print(f"{own['name']:{width}s}   {own['lines']:5d}   {own['peak']:8.1f}")
    if missing:
        print("", *missing, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--arrays", type=int, nargs="+", default=[5, 50])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each")
    folder = pathlib.Path.home() / ".cache" / "fpipe" / "peers"
    parser.add_argument("--environments", type=pathlib.Path, default=folder)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
