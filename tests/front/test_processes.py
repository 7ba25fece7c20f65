"""The placed executor over several processes: the same numbers as one process, and an
error in place of a hang.
"""

import re
import signal

import pytest

import fpipe
from tests.front.process_cases import CASES, TELLING, decoded
from tests.front.workers import Workers
from tests.helpers import HANG, assert_same

WORKER = "tests.front.process_cases"


def run(folder, count, devices, names):
    """What one process computes, and what each of several printed, by case."""
    flags = ("--processes", str(count), "--devices", str(devices))
    with Workers(WORKER, count, folder, *flags, *names) as workers:
        by_schedule = CASES["by 1f1b"].reference()
        wanted = {
            name: by_schedule if name.startswith("by ") else CASES[name].reference()
            for name in names
        }
        found = workers.all_lines()
    return wanted, [{line["case"]: line for line in lines} for lines in found]


def assert_computed(wanted, found):
    """All that a case returns is in one of the processes at least, and the same in all
    that have it.
    """
    for name, want in wanted.items():
        leaves = [lines[name]["leaves"] for lines in found]
        whole = [
            next(leaf for leaf in of_all if leaf is not None)
            for of_all in zip(*leaves, strict=True)
        ]
        assert_same(decoded(whole, want), want)
        for own in leaves:
            filled = [a or b for a, b in zip(own, whole, strict=True)]
            assert filled == whole, name


@pytest.mark.parametrize(
    "schedules",
    [
        pytest.param(["1f1b", "interleaved_1f1b", "zb_v"], id="some"),
        pytest.param(fpipe.schedules.NAMES, id="all", marks=pytest.mark.full),
    ],
)
def test_two_processes_compute_what_one_does(tmp_path, schedules):
    names = [
        name
        for name in CASES
        if not name.startswith("by ") or name.removeprefix("by ") in schedules
    ]
    wanted, found = run(tmp_path, 2, 2, names)
    told = {name: [lines[name]["told"] for lines in found] for name in TELLING}
    del wanted["disagree"]
    assert_computed(wanted, found)
    # The loss is in both, `y` and the gradient of `x` where they are made.
    for process, lines in enumerate(found):
        y, *rest = lines["calls"]["leaves"]
        assert (y is None) == (process == 0)
        assert None not in rest
        assert (lines["step"]["leaves"][-1] is None) == (process == 1)
    differ = (
        "the processes have made different calls: in process 1 the stages, the "
        "instructions of the plan, what the layers compute differ from process 0; all "
        "processes run the same script, with the same pipe, and make the same calls in "
        "the same order"
    )
    assert told["disagree"] == [[differ], [differ]]
    (refused,) = told["calls"][0]
    assert told["calls"][1] == [refused]
    assert "over several processes was called under `jax.grad`" in refused
    # All say the same, the first one because its layers made it, the other because it
    # was told.
    made, in_backward = told["anomalies"][0]
    assert told["anomalies"][1] == [made, in_backward]
    assert "layer 1 'sqrt'" in made
    assert "stage 0" in made
    assert "microbatch 0" in made
    assert "backward" in in_backward
    # A microbatch's boundary and its cotangent are 2 x 4 floats; the loss is one.
    assert told["recording"][0] == told["recording"][1]
    assert told["recording"][0][:-1] == [
        *sorted(
            f"{kind}({s},{i}) on {s}" for kind in "BF" for s in (0, 1) for i in range(4)
        ),
        *["0 to 1: 32"] * 4,
        *["1 to 0: 32"] * 4,
        "1 to 0: 4",
    ]
    # Process 0 has decided: its first layer is the one that takes long.
    (same, first), (as_well, second) = told["measured"]
    assert same == as_well
    assert same[:2] == [[1, 3], [1, 3]]
    assert min(same[2]) > 0
    # Each knows what XLA needs on its own device.
    assert (first, second) == ([True, False], [False, True])
    # Only the process that reads it has to have it.
    of_shape, of_part = told["inputs"][0]
    assert told["inputs"][1] == []
    assert "TypeError: a Pipe was called with the shape" in of_shape
    assert "x[0] is read on" in of_shape
    assert "ValueError: a Pipe was called with x[0] over devices of several" in of_part


@pytest.mark.parametrize("count", [3, 4])
def test_more_processes_compute_what_one_does(tmp_path, count):
    names = ["by 1f1b", "split"]
    assert_computed(*run(tmp_path, count, 1, names))


# What the process that is left prints. A stopped one is ended by nobody but the
# watchdog of the other; it names what did not come.
ENDS = {
    "killed": "JaxRuntimeError|another task died",
    "raises": "JaxRuntimeError|another task died",
    "stopped": r"fpipe: this process has waited 3 s for the transfer of y\[0\] stage0 "
    r"mb[01] from cpu:0 \(process 0\) to cpu:\d+; it ends",
}


@pytest.mark.parametrize("how", ENDS)
def test_a_process_that_is_no_more_ends_the_other(tmp_path, how):
    victim = 0 if how == "stopped" else 1
    timeout = "3" if how == "stopped" else str(HANG)
    flags = ("--processes", "2", "--timeout", timeout)
    what = "raise" if how == "raises" else "train"
    with Workers(WORKER, 2, tmp_path, *flags, what) as workers:
        steps = [-1, -1]
        while min(steps) < 3:
            k, line = workers.lines.get(timeout=HANG)
            assert line is not None, workers.errors[k].read_text()
            steps[k] = line["step"]
        dead, left = workers.processes[victim], workers.processes[1 - victim]
        if how != "raises":
            sent = signal.SIGKILL if how == "killed" else signal.SIGSTOP
            dead.send_signal(sent)
        assert left.wait(HANG) != 0
        if how == "raises":
            assert dead.wait(HANG) == 1
            told = workers.errors[victim].read_text()
            assert "ArithmeticError: a script that raises" in told
    assert re.search(ENDS[how], workers.errors[1 - victim].read_text())
