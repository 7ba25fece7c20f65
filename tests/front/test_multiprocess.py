"""Several processes, joined by `jax.distributed`: the same numbers as without a
pipeline, and no hang when one dies.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys

import jax
import pytest
import yaml

from tests.front.multiprocess_worker import PROBLEMS
from tests.front.workers import ROOT, Workers, decoded
from tests.helpers import HANG, assert_same, mse

WORKER = "tests.front.multiprocess_worker"


def reference(problem):
    """What `fpipe.sequential` computes."""
    case = problem.case
    params, needs = case.params(), case.needs
    train = needs.pop("train")
    step = case.reference.value_and_grad(mse)

    def loss_of(params, needs):
        y = case.reference(params, case.x, train=train, **needs)
        return mse(y if needs["state"] is None else y[0], case.target)

    result = jax.jit(
        lambda p, needs: step(p, case.x, case.target, train=train, **needs)
    )(params, needs)
    return params, result, jax.jit(jax.grad(loss_of))(params, needs)


@pytest.mark.parametrize(
    ("devices", "names"),
    [
        (1, ["uniform", "different", "interleaved"]),
        (2, ["different", "shared", "across"]),
    ],
)
def test_two_processes_compute_what_one_does(tmp_path, devices, names):
    with Workers(WORKER, 2, tmp_path, "--devices", str(devices), *names) as workers:
        wanted = {name: reference(PROBLEMS[name]) for name in names}
        found = workers.all_lines()
    for n, name in enumerate(names):
        params, step, grad = wanted[name]
        both = [lines[n] for lines in found]
        for got in both:
            assert got.pop("problem") == name
            assert_same(decoded(got["params"], params), params, tolerance=0)
            assert_same(decoded(got["step"], step), step)
            if "call" in got:
                assert_same(decoded(got["call"], step), step)
                assert got["raised"] == "invalid value (nan) encountered in mul"
            if "grad" in got:
                assert_same(decoded(got["grad"], grad), grad)
        # Devices that share a layer make their parts of it, in a program.
        if PROBLEMS[name].shared:
            assert [got["made"] for got in both] == [[], []]
            continue
        balance = PROBLEMS[name].balance[2 * devices]
        owners = [
            s % (2 * devices) // devices
            for s, count in enumerate(balance)
            for _ in range(count)
        ]
        assert [got["made"] for got in both] == [
            [k for k, p in enumerate(owners) if p == q] for q in range(2)
        ]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_other(tmp_path, victim):
    with Workers(WORKER, 2, tmp_path, "--shutdown", "6", "forever") as workers:
        steps = [-1, -1]
        while min(steps) < 3:
            k, line = workers.lines.get(timeout=HANG)
            assert line is not None, workers.errors[k].read_text()
            steps[k] = line["step"]
        workers.processes[victim].send_signal(signal.SIGKILL)
        ended = workers.ends()
    assert ended[victim] == -signal.SIGKILL
    assert ended[1 - victim] != 0
    # Gloo notices at once, and so does JAX when its coordinator is gone.
    assert re.search(
        "Gloo .* (closed|reset) by peer|another task died",
        workers.errors[1 - victim].read_text(),
    )


def test_the_watchdog_ends_a_step_that_waits(tmp_path):
    """The other process has stopped, and JAX does not say so."""
    with Workers(WORKER, 2, tmp_path, "--timeout", "3", "forever") as workers:
        steps = [-1, -1]
        while min(steps) < 3:
            k, line = workers.lines.get(timeout=HANG)
            assert line is not None, workers.errors[k].read_text()
            steps[k] = line["step"]
        workers.processes[0].send_signal(signal.SIGSTOP)
        assert workers.processes[1].wait(HANG) == 1
    told = "fpipe: this process has waited 3 s for a step; it ends"
    assert told in workers.errors[1].read_text()


# --- the example ---

LAUNCH = [sys.executable, "examples/multiprocess/launch.py"]
TINY = [
    "--blocks",
    "2",
    "--width",
    "8",
    "--batch",
    "16",
    "--chunks",
    "2",
    "--every",
    "19",
    "--rate",
    "3e-2",
]


@contextlib.contextmanager
def launched(*arguments):
    """The launcher, and the numbers of the processes that it has started."""
    with subprocess.Popen(
        [*LAUNCH, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        try:
            assert launcher.stderr is not None
            found = [
                re.fullmatch(r"process \d is (\d+)\n", launcher.stderr.readline())
                for _ in range(2)
            ]
            yield launcher, [int(match[1]) for match in found if match]
        finally:
            launcher.terminate()


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def losses(text):
    return re.findall(r"^step (\d+): loss (\S+)", text, re.MULTILINE)


def test_the_example_is_preempted_and_continues(tmp_path, monkeypatch):
    """SIGTERM to one process: all save after the same step, and others continue, here
    under the other executor.
    """
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    flags = [*TINY, "--timeout", str(HANG), "--checkpoints", str(tmp_path / "run")]
    with launched(*flags, "--executor", "placed", "--steps", "1000000") as run:
        launcher, pids = run
        assert launcher.stdout is not None
        assert launcher.stderr is not None
        text = ""
        while not losses(text):
            line = launcher.stdout.readline()
            assert line, launcher.stderr.read()
            text += line
        os.kill(pids[1], signal.SIGTERM)
        rest, error = launcher.communicate(timeout=HANG)
    assert launcher.returncode == 0, error
    assert "2 processes, 2 cpu devices, layers of the stages: [2, 2]" in text
    (saved,) = re.findall(r"^preempted: saved after step (\d+)$", rest, re.MULTILINE)
    first = int(saved) + 1
    flags += ["--executor", "scan", "--steps", str(first + 20)]
    with launched(*flags) as (launcher, _):
        rest, error = launcher.communicate(timeout=HANG)
    assert launcher.returncode == 0, error
    assert f"continues with step {first}" in rest
    *_, (last, loss) = losses(rest)
    assert int(last) == first + 19
    assert float(loss) < 0.9 * float(losses(text)[0][1])
    assert re.search(
        r"^held-out accuracy \S+, norm of the parameters \S+$", rest, re.MULTILINE
    )


def ended(launcher, pids):
    """The launcher's exit status and the last line of its stderr; nothing that it
    started is left.
    """
    _, error = launcher.communicate(timeout=HANG)
    assert "Traceback" not in error
    assert len(pids) == 2
    assert not any(map(is_alive, pids))
    return launcher.returncode, error.splitlines()[-1]


def test_the_launcher_ends_all_when_one_dies():
    with launched("--timeout", str(HANG)) as (launcher, pids):
        os.kill(pids[1], signal.SIGKILL)
        assert ended(launcher, pids) == (
            1,
            "process 1 was killed by SIGKILL; all are stopped",
        )


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_launcher_ends_all_when_interrupted(how):
    with launched("--timeout", str(HANG)) as (launcher, pids):
        launcher.send_signal(how)
        assert ended(launcher, pids) == (130, "interrupted; all are stopped")


def test_the_launcher_does_not_wait_for_ever():
    with launched("--timeout", "0.2") as (launcher, pids):
        assert ended(launcher, pids) == (1, "not done in 0.2 s; all are stopped")


def test_the_job_is_consistent():
    service, job = yaml.safe_load_all(
        (ROOT / "examples/multiprocess/job.yaml").read_text()
    )
    pod = job["spec"]["template"]["spec"]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {
        "batch.kubernetes.io/job-name": job["metadata"]["name"]
    }
    (container,) = pod["containers"]
    flags = dict(arg.split("=") for arg in container["args"])
    host, port = flags["--coordinator"].split(":")
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert int(port) == container["ports"][0]["containerPort"]
    assert (
        int(flags["--processes"])
        == job["spec"]["completions"]
        == job["spec"]["parallelism"]
    )
    # Of an indexed job each container has this variable.
    assert job["spec"]["completionMode"] == "Indexed"
    assert flags["--process"] == "$(JOB_COMPLETION_INDEX)"
    text = (ROOT / container["command"][1]).read_text()
    assert all(f'"{flag}"' in text for flag in flags)
