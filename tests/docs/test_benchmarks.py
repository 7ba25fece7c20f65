"""The benchmarks run, at sizes that take seconds, and print the tables they should.

No test reads a time. They are no part of the whole suite: `.ci/run` runs them after it,
and `python -m pytest -m benchmark` does.
"""

import re

import pytest

import fpipe
from tests.docs.test_examples import run

pytestmark = pytest.mark.benchmark


def test_the_overhead_benchmark_runs():
    done = run("examples/benchmarks/overhead.py", "--repeats", 2, "--rounds", 1)
    assert done.returncode == 0, done.stderr
    assert (
        len(
            re.findall(
                r"^ +(5|50|zb_h1 5|zb_h1 50) .*\d\.\d\d$", done.stdout, re.MULTILINE
            )
        )
        == 4
    )


def test_the_benchmark_of_splits_runs():
    done = run("examples/benchmarks/split.py", "--blocks", 9, "--tables", "seconds")
    assert done.returncode == 0, done.stderr
    row = r"^ +9 +\d+ .* (\d+)(?: +[\d.]+){4}$"
    # Into as many stages as asked for, and between the blocks.
    assert re.findall(row, done.stdout, re.MULTILINE) == ["8", "10"]


# Each schedule compiles programs of its own to be timed. These have one stage a device
# and two, whole backwards and split ones.
TIMED = ["eager_1f1b", "v_half"]


@pytest.mark.parametrize(
    "timed",
    [
        pytest.param(TIMED, id="some"),
        pytest.param(
            [n for n in fpipe.schedules.NAMES if n not in (*TIMED, "forward_only")],
            id="others",
            marks=pytest.mark.full,
        ),
    ],
)
def test_the_benchmark_of_schedules_runs(timed):
    small = ["--repeats", 1, "--unit", 4, "--sizes", 4, "--width", 8]
    done = run("examples/benchmarks/schedules.py", *small, "--timed", *timed)
    assert done.returncode == 0, done.stderr
    for name in timed:  # started in its order
        row = rf"^{name} +4 .* 1/1 +[01]/1$"
        assert re.search(row, done.stdout, re.MULTILINE), name
    for name in set(fpipe.schedules.NAMES) - {"forward_only"}:
        # holds what the formula says
        assert re.search(rf"^{name} .* yes$", done.stdout, re.MULTILINE), name
    assert re.search(r"^tiny stages, host us an action +\d", done.stdout, re.MULTILINE)


# To compile all steps takes a minute.
@pytest.mark.full
def test_the_benchmark_of_processes_runs():
    small = ["--width", 8, "--batch", 2, "--tokens", 4, "--microbatches", 2]
    done = run("examples/benchmarks/processes.py", *small, "--repeats", 1, "--no-torch")
    assert done.returncode == 0, done.stderr
    used = r" +\d\S+ +\d+$"
    rows = r"^(scan|placed) eager_1f1b +\d\S+ +\d\S+ +1\.33 +\d+% +\d+% +\d+\.\d\d"
    assert re.findall(rows + used, done.stdout, re.MULTILINE) == ["scan", "placed"]
    alone = r"^(scan|placed) stages alone +\d\S+"
    assert re.findall(alone + used, done.stdout, re.MULTILINE) == ["scan", "placed"]
    assert re.search(r"^a transfer of 0\.00 MiB: \d", done.stdout, re.MULTILINE)
    for where in ("two processes", "one process"):
        row = rf"^host time in {where}: \d+ us an action$"
        assert re.search(row, done.stdout, re.MULTILINE), where


def test_the_benchmark_of_two_processes_runs():
    flags = [
        "--quick",
        "--no-torch",
        "--microbatches",
        4,
        "--repeats",
        1,
        "--schedules",
        "eager_1f1b",
        "--checkpoints",
        "never",
        "--alone",
    ]
    done = run("examples/benchmarks/two_processes.py", *flags)
    assert done.returncode == 0, done.stderr
    of_alone = {"eager_1f1b": r" +\d+%"}
    alone = "in_both", "half_in_both", "stage_alone_gpipe", "unsent_eager_1f1b"
    for row in ("eager_1f1b", *alone):
        # Then its share, CPU seconds, page faults and the share of a stage alone.
        line = rf"^jax {row} +\d\S+ +\d\S+ +1\.60 +\d+% +\d\S+ +\d+"
        line += of_alone.get(row, "") + "$"
        assert re.search(line, done.stdout, re.MULTILINE), done.stdout


def test_the_benchmark_of_peers_runs():
    """With fpipe alone: the others would have to be installed."""
    small = ["--arrays", 2, "--repeats", 1, "--width", 4, "--rows", 8]
    done = run("examples/benchmarks/peers.py", "--peers", "fpipe", *small)
    assert done.returncode == 0, done.stderr
    for checkpoint in ("never", "always"):
        name = rf"^fpipe \S+ jax \S+ {checkpoint}"
        times = rf"{name} +2( +\d+\.\d+){{4}}$"
        assert re.search(times, done.stdout, re.MULTILINE), done.stdout
        size = rf"{name} +\d+ +\d+\.\d$"
        assert re.search(size, done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize(
    "checkpoint", ["always", pytest.param("never", marks=pytest.mark.full)]
)
def test_the_benchmark_of_one_device_runs(checkpoint):
    small = ["--width", 16, "--tokens", 8, "--repeats", 1, "--microbatches", 2]
    small += ["--stages", 2, "--checkpoints", checkpoint]
    done = run("examples/benchmarks/one_device.py", *small)
    assert done.returncode == 0, done.stderr
    rows = rf"^{checkpoint} +(plain|2) +\d\S+ +\d\.\d\d$"
    assert re.findall(rows, done.stdout, re.MULTILINE) == ["plain", "2"]


@pytest.mark.parametrize(
    ("variant", "row"),
    [
        pytest.param("async", "not on cpu", id="async"),
        # Each is a process more.
        *(
            pytest.param(
                variant,
                rf"{launches}( +\d\S+){{7}} +- +-",
                id=variant,
                marks=pytest.mark.full,
            )
            for variant, launches in (("apart", 21), ("plain_unrolled", 1))
        ),
    ],
)
def test_the_benchmark_of_launches_runs(variant, row):
    small = ["--launch", "--size", "tiny", "--models", "small", "--repeats", 1]
    done = run("examples/benchmarks/accelerator.py", *small, "--variants", variant)
    assert done.returncode == 0, done.stderr
    # Of the 16 actions of a step, ten run in two programs.
    default = r"^small  default +13( +\d\S+){7} +- +-$"
    assert re.search(default, done.stdout, re.MULTILINE), done.stdout
    assert re.search(rf"^small  {variant} +{row}$", done.stdout, re.MULTILINE)
    counts = r"^small  default +(\S+) +(\d+)( +\d\S*){4}$"
    found = re.findall(counts, done.stdout, re.MULTILINE)
    assert sum((kinds.count("+") + 1) * int(n) for kinds, n, _ in found) == 16
    assert done.stdout.count("not judged here") == 3


def test_the_benchmark_of_launches_names_what_the_budget_leaves_out():
    small = ["--launch", "--size", "tiny", "--models", "small", "unet"]
    done = run("examples/benchmarks/accelerator.py", *small, "--budget", 0)
    assert done.returncode == 0, done.stderr
    left = r"^(small|unet) +(\w+) +left out: the budget is spent$"
    found = re.findall(left, done.stdout, re.MULTILINE)
    assert len(found) == len({*found}) == 18


def test_the_benchmark_of_recomputations_runs():
    small = ["--width", 8, "--tokens", 4, "--blocks", 1, "--microbatches", 3]
    small += ["--repeats", 1, "--unit", 2, "--schedules", "1f1b", "--options", "early"]
    done = run("examples/benchmarks/recompute.py", *small, "--transformer", "1f1b")
    assert done.returncode == 0, done.stderr
    slept = r"^1f1b +(\w+) +\d+ +\d+ +\d+\.\d\d$"
    found = re.findall(slept, done.stdout, re.MULTILINE)
    assert found == ["with_backward", "early"]
    steps = r"^([a-z, _]+\w) +\d+\.\d{3} +\d+\.\d\d$"
    assert re.findall(steps, done.stdout, re.MULTILINE) == found


def test_plans_say_what_is_measured():
    done = run("examples/benchmarks/truth.py", "--quick", "--unit", 6)
    assert done.returncode == 0, done.stdout + done.stderr
    arrays, scan = re.findall(
        r"^worst of (\d+) ratios: (\S+), goal within 5%: yes$",
        done.stdout,
        re.MULTILINE,
    )
    assert (arrays[0], scan[0]) == ("4", "1")  # four devices; a program
    assert abs(float(arrays[1]) - 1) <= 0.05
    assert abs(float(scan[1]) - 1) <= 0.05
    # Of two schedules, and of a step with launches that take time and without.
    assert done.stdout.count("pairs in the right order: 1 of 1, goal all: yes") == 2
