"""The placed executor over several processes: the same numbers as one process, and an
error in place of a hang.
"""

import re
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import fpipe
from tests.front.process_cases import CASES, CHECKPOINTS, TELLING
from tests.front.process_checkpoints import Run
from tests.front.workers import Workers, decoded
from tests.helpers import HANG, assert_same, eventually

WORKER = "tests.front.process_cases"


def run(folder, count, devices, names):
    """What one process computes, and what each of several printed, by case."""
    flags = ("--processes", str(count), "--devices", str(devices))
    flags = (*flags, "--folder", str(folder))
    with Workers(WORKER, count, folder, *flags, *names) as workers:
        by_schedule = CASES["by 1f1b"].reference()
        wanted = {
            name: by_schedule if name.startswith("by ") else CASES[name].reference()
            for name in names
            if name not in CHECKPOINTS
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
def test_processes_compute_what_one_does(tmp_path, schedules):
    names = [
        name
        for name, case in CASES.items()
        if case.processes == 2
        and (not name.startswith("by ") or name.removeprefix("by ") in schedules)
    ]
    # A checkpoint of one process, which two continue and save, and then three.
    alone = Run(jax.devices()[:3], [1, 1, 2])
    alone.train(1)
    alone.save(tmp_path / "one", 1)
    one = alone.canonical
    wanted, found = run(tmp_path, 2, 2, [*names, "continued"])
    told = {name: [lines[name]["told"] for lines in found] for name in TELLING}
    del wanted["disagree"]
    assert_computed(wanted, found)
    # The loss is in both, `y` and the gradient of `x` where they are made.
    for process, lines in enumerate(found):
        y, loss, aux, of_x, *rest = lines["calls"]["leaves"]
        assert (y is None) == (process == 0)
        assert (of_x is None) == (process == 1)
        assert None not in [loss, aux, *rest]
        # Norms, and all that is gathered.
        assert None not in lines["optimizer"]["leaves"]
        assert (lines["step"]["leaves"][-1] is None) == (process == 1)
    assert told["disagree"][0] == told["disagree"][1]
    for text, differing in zip(told["disagree"][0], DIFFERING, strict=True):
        assert text == (
            "ValueError: the processes have made different calls: in process 1 "
            f"{differing} differ from process 0; all processes run the same script, "
            "with the same pipe, and make the same calls in the same order"
        )
    # Each makes its own parameters, and compiles its own programs.
    (made, own, whole, first), (rest, others, as_well, second) = told["calls"]
    assert (made, rest) == ([0, 1], [2, 3])
    assert own + others == whole == as_well
    elsewhere = "ValueError: `place(params)`: params of layer {} 'dense' are in another"
    assert elsewhere.format(2) in first
    assert elsewhere.format(0) in second
    # All say the same, the first one because its layers made it, the other because it
    # was told.
    made, in_backward, named, shared = told["anomalies"][0]
    assert told["anomalies"][1][:2] == [made, in_backward]
    assert "layer 1 'sqrt'" in made
    assert "stage 0" in made
    assert "microbatch 0" in made
    assert "backward" in in_backward
    # JAX's own search finds the operation where one process made it, and both name it.
    running = (
        "fpipe: while running the forward and backward of stage 1 (layers 1 'dense', 2 "
        "'root'), microbatch 0, on "
    )
    sqrt = f"FloatingPointError: invalid value (nan) encountered in sqrt\n{running}"
    several = "(nan) in the result of a program of several processes. `Pipe(..., detect"
    assert told["anomalies"][1][2].startswith(sqrt)
    assert named == told["anomalies"][1][2] + " (process 1)"
    assert several in shared
    assert running in shared
    assert told["anomalies"][1][3] == f"{shared} (process 0)"
    # A microbatch's boundary and its cotangent are 2 x 4 floats; the loss is one.
    assert told["recording"][0] == told["recording"][1]
    assert told["recording"][0][:-1] == [
        *sorted(
            f"{kind}({s},{i}) on {s}" for kind in "BF" for s in (0, 1) for i in range(4)
        ),
        *[f"R(0,{i}) on 0" for i in range(3)],
        *["0 to 1: 32"] * 4,
        *["1 to 0: 32"] * 4,
        "1 to 0: 4",
    ]
    # Process 0 has decided: its first layer is the one that takes long.
    (same, first), (as_well, second) = told["measured"]
    assert same == as_well
    assert same[:2] == [[1, 3], [1, 3]]
    assert min(same[2]) > 0
    (_, *shortest), (_, *longest) = same[4]
    assert longest[0] >= shortest[0] >= shortest[1] > 0
    # Each knows what XLA needs on its own device.
    assert (first, second) == ([True, False], [False, True])
    # Only the process that reads it has to have it.
    of_shape, of_part = told["inputs"][0]
    assert told["inputs"][1] == []
    assert "TypeError: a Pipe was called with the shape" in of_shape
    assert "x[0] is read on" in of_shape
    assert "ValueError: a Pipe was called with x[0] over devices of several" in of_part
    of_three = run(tmp_path, 3, 2, [*MORE, "chain", "loaded"])
    assert_computed(*of_three)
    assert_continued(alone, tmp_path, one, found, of_three[1])


# What differs with another balance, schedule, layer and version.
DIFFERING = [
    "the stages, the instructions of the plan, what the layers compute",
    "the schedule",
    "what the layers compute",
    "the versions of jax and fpipe",
]


def assert_continued(alone, folder, first, of_two, of_three):
    """Every byte that processes have saved is what others load, in each of them.

    Arguments:
        alone: of one process.
        first: what it has saved.
        of_two, of_three: what the processes have printed.
    """
    alone.load(folder / "two", 2)
    saved = alone.canonical
    alone.load(folder / "spread", 2)
    assert_same(alone.canonical, saved, 0)
    for lines in of_two:
        loaded, *both = decoded(lines["continued"]["leaves"], [first] * 3)
        assert_same(loaded, first, 0)
        assert_same(both, [saved] * 2, 0)
    alone.train(3)
    for lines in of_three:
        *both, trained = decoded(lines["loaded"]["leaves"], [first] * 3)
        assert_same(both, [saved] * 2, 0)
        assert_same(trained, alone.canonical)


MORE = ["by 1f1b", "split"]


def test_four_processes_compute_what_one_does(tmp_path):
    assert_computed(*run(tmp_path, 4, 2, [*MORE, "pairs"]))


def is_unfinished(folder):
    """Whether a save is under way."""
    return any("tmp" in path.name for path in folder.iterdir())


def is_caught(process, folder):
    """Whether the process stands still within a save, the third or a later one."""
    assert process.poll() is None
    names = {path.name for path in folder.iterdir()}
    if not names >= {"1", "2"} or not is_unfinished(folder):
        return False
    process.send_signal(signal.SIGSTOP)  # to look at it in peace
    assert eventually(process.is_stopped)
    if is_unfinished(folder):
        return True
    process.send_signal(signal.SIGCONT)
    return False


def test_one_is_killed_while_all_save(tmp_path):
    """The last whole checkpoint is there, and loads; the next one is saved beside what
    is left.
    """
    folder = tmp_path / "run"
    folder.mkdir()
    flags = ("--processes", "2", "--folder", str(folder), "save_for_ever")
    with Workers(WORKER, 2, tmp_path, *flags) as workers:
        saving, other = workers.processes
        caught = eventually(lambda: is_caught(saving, folder))
        assert caught, workers.errors[0].read_text()
        saving.kill()
        assert saving.wait(HANG) == -signal.SIGKILL
        assert other.wait(HANG) != 0
    assert is_unfinished(folder)
    like = (np.zeros((256, 256), np.float32),) * 2
    with ocp.CheckpointManager(folder) as manager:
        step = manager.latest_step()
        assert step is not None
        assert step >= 2
        saved = manager.restore(step, args=ocp.args.StandardRestore(like))
        assert_same(saved, tuple(a + step for a in like), 0)
        manager.save(step + 1, args=ocp.args.StandardSave(like))
        manager.wait_until_finished()
        assert manager.latest_step() == step + 1
        again = manager.restore(step + 1, args=ocp.args.StandardRestore(like))
        assert_same(again, like, 0)


# What the process that is left prints. A stopped one is ended by nobody but the
# watchdog of the other; it names what did not come.
ENDS = {
    "raises early": "RuntimeError: process 1 has raised before its first call with the "
    "others: ArithmeticError: a layer that raises, fpipe: in layer 1 'dense', stage 1, "
    "microbatch 0. Its own output has the traceback",
    "killed": "JaxRuntimeError|another task died",
    "raises": "JaxRuntimeError|another task died",
    "stopped": r"fpipe: this process has waited 3 s for the transfer of y\[0\] stage0 "
    r"mb[01] from cpu:0 \(process 0\) to cpu:\d+; it ends",
}


RAISED = {
    "raises": "ArithmeticError: a script that raises",
    "raises early": "ArithmeticError: a layer that raises",
}


@pytest.mark.parametrize("how", ENDS)
def test_a_process_that_is_no_more_ends_the_other(tmp_path, how):
    victim = 0 if how == "stopped" else 1
    timeout = "3" if how == "stopped" else str(HANG)
    flags = ("--processes", "2", "--timeout", timeout)
    what = how.replace("raises", "raise") if how in RAISED else "train"
    with Workers(WORKER, 2, tmp_path, *flags, what) as workers:
        steps = [-1, -1]
        while min(steps) < 3 and how != "raises early":
            k, line = workers.lines.get(timeout=HANG)
            assert line is not None, workers.errors[k].read_text()
            steps[k] = line["step"]
        dead, left = workers.processes[victim], workers.processes[1 - victim]
        if how not in RAISED:
            sent = signal.SIGKILL if how == "killed" else signal.SIGSTOP
            dead.send_signal(sent)
        assert left.wait(HANG) != 0
        if how in RAISED:
            assert dead.wait(HANG) == 1
            assert RAISED[how] in workers.errors[victim].read_text()
    assert re.search(ENDS[how], workers.errors[1 - victim].read_text())
