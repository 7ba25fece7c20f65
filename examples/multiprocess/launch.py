"""Start several processes of `train.py` on this machine, and end all of them when one
fails.

What is not a flag of the launcher goes to `train.py`: `python
examples/multiprocess/launch.py -n 2 --steps 100`.
"""

import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

TRAIN = pathlib.Path(__file__).parent / "train.py"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def prefixed(k: int, lines: Any) -> None:
    """Pass on what a process writes to stderr."""
    for line in lines:
        sys.stderr.write(f"[process {k}] {line}")
        sys.stderr.flush()


def how(status: int) -> str:
    return (
        f"was killed by {signal.Signals(-status).name}"
        if status < 0
        else f"ended with status {status}"
    )


def start(
    args: argparse.Namespace, rest: list[str], started: list[subprocess.Popen[str]]
) -> list[threading.Thread]:
    """Start the processes, each put into the list at once; returns the threads that
    pass on their stderr.
    """
    coordinator, readers = f"127.0.0.1:{free_port()}", []
    for k in range(args.n):
        env = os.environ | {"JAX_PLATFORMS": args.platform}
        if args.platform == "cuda":
            env["CUDA_VISIBLE_DEVICES"] = str(k)  # one GPU each
        joining = [
            "--coordinator",
            coordinator,
            "--processes",
            str(args.n),
            "--process",
            str(k),
        ]
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), *joining, *rest],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=env,
            start_new_session=True,  # Ctrl-C is the launcher's alone
        )
        started.append(process)
        readers.append(
            threading.Thread(target=prefixed, args=(k, process.stderr), daemon=True)
        )
        readers[-1].start()
        print(f"process {k} is {process.pid}", file=sys.stderr, flush=True)
    return readers


def watch(processes: list[subprocess.Popen[str]], timeout: float) -> str | None:
    """Wait until all have ended well, or say what went wrong first."""
    until = time.monotonic() + timeout
    while True:
        statuses = [process.poll() for process in processes]
        failed = [
            f"process {k} {how(status)}" for k, status in enumerate(statuses) if status
        ]
        if failed:
            return ", ".join(failed)
        if all(status == 0 for status in statuses):
            return None
        if time.monotonic() > until:
            return f"not done in {timeout:g} s"
        time.sleep(0.05)


def run(args: argparse.Namespace, rest: list[str]) -> int:
    processes: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    try:
        readers = start(args, rest, processes)
        wrong = watch(processes, args.timeout)
    finally:
        # SIGKILL, for a process that waits for a dead one does not listen.
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
        for reader in readers:
            reader.join(timeout=5)
    if wrong:
        print(f"{wrong}; all are stopped", file=sys.stderr)
    return 1 if wrong else 0


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-n", type=int, default=2, metavar="N", help="processes (default: %(default)s)"
    )
    parser.add_argument(
        "--platform",
        choices=["cpu", "cuda"],
        default="cpu",
        help='"cpu": one CPU device for each process; "cuda": process k has the k-th '
        "GPU (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=600,
        metavar="S",
        help="seconds for everything (default: %(default)s)",
    )
    args, rest = parser.parse_known_args()
    if args.n < 1:
        parser.error(f"-n {args.n}: at least 1")
    signal.signal(signal.SIGTERM, stop)
    try:
        return run(args, rest)
    except KeyboardInterrupt:
        print("interrupted; all are stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
