"""Several processes, joined by `jax.distributed`: the same numbers as without a pipeline, and no hang when one dies."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from queue import Queue

import jax
import pytest

from tests.helpers import assert_same, mse
from tests.multiprocess_worker import PROBLEMS, decoded

ROOT = pathlib.Path(__file__).parent.parent


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Workers:
    """Two worker processes, which are gone when the `with` block ends."""

    def __init__(self, folder, *arguments):
        address = f"127.0.0.1:{free_port()}"
        self.errors = [folder / f"stderr{k}" for k in range(2)]
        self.lines, self.processes = Queue(), []
        for k, path in enumerate(self.errors):
            command = [sys.executable, "-m", "tests.multiprocess_worker", "--coordinator", address, "--process", str(k)]
            with path.open("w") as file:
                process = subprocess.Popen(
                    [*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True
                )
            self.processes.append(process)
            threading.Thread(target=self._read, args=(k, process.stdout), daemon=True).start()

    def _read(self, k, file):
        with file:
            for line in file:
                if line.startswith("{"):  # gloo prints too
                    self.lines.put((k, json.loads(line)))
        self.lines.put((k, None))

    def ends(self, timeout):
        """The exit status of each."""
        until = time.monotonic() + timeout
        return [process.wait(max(0.0, until - time.monotonic())) for process in self.processes]

    def all_lines(self, timeout):
        """What each printed, at its end."""
        until, found, open_ = time.monotonic() + timeout, ([], []), 2
        while open_:
            k, line = self.lines.get(timeout=max(0.0, until - time.monotonic()))
            open_ -= line is None
            if line is not None:
                found[k].append(line)
        assert self.ends(10) == [0, 0], "\n".join(path.read_text() for path in self.errors)
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def reference(problem):
    """What `fpipe.sequential` computes."""
    case = problem.case
    params, needs = case.params(), case.needs
    train = needs.pop("train")
    step = case.reference.value_and_grad(mse)

    def loss_of(params, needs):
        y = case.reference(params, case.x, train=train, **needs)
        return mse(y if needs["state"] is None else y[0], case.target)

    result = jax.jit(lambda p, needs: step(p, case.x, case.target, train=train, **needs))(params, needs)
    return params, result, jax.jit(jax.grad(loss_of))(params, needs)


@pytest.mark.parametrize(("devices", "names"), [(1, ["uniform", "different", "interleaved"]), (2, ["different"])])
def test_two_processes_compute_what_one_does(tmp_path, devices, names):
    with Workers(tmp_path, "--devices", str(devices), *names) as workers:
        wanted = {name: reference(PROBLEMS[name]) for name in names}
        found = workers.all_lines(timeout=120)
    for n, name in enumerate(names):
        params, step, grad = wanted[name]
        both = [lines[n] for lines in found]
        for got in both:
            assert got.pop("problem") == name
            assert_same(decoded(got["params"], params), params, tolerance=0)
            assert_same(decoded(got["step"], step), step)
            if "call" in got:
                assert_same(decoded(got["call"], step), step)
            if "grad" in got:
                assert_same(decoded(got["grad"], grad), grad)
        balance = PROBLEMS[name].balance[2 * devices]
        owners = [s % (2 * devices) // devices for s, count in enumerate(balance) for _ in range(count)]
        assert [got["made"] for got in both] == [[k for k, p in enumerate(owners) if p == q] for q in range(2)]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_other(tmp_path, victim):
    with Workers(tmp_path, "--heartbeat", "10", "forever") as workers:
        steps = [-1, -1]
        while min(steps) < 3:
            k, line = workers.lines.get(timeout=60)
            assert line is not None, workers.errors[k].read_text()
            steps[k] = line["step"]
        workers.processes[victim].send_signal(signal.SIGKILL)
        ended = workers.ends(timeout=30)
    assert ended[victim] == -signal.SIGKILL
    assert ended[1 - victim] != 0
    assert workers.errors[1 - victim].read_text()
