"""The placed executor over several processes: the same numbers as one process, and an
error in place of a hang.
"""

from tests.front.process_cases import CASES, decoded
from tests.front.workers import Workers
from tests.helpers import assert_same

CASES_OF_PAIR = [name for name in CASES if name != "disagree"]


def arguments(count, devices):
    return "tests.front.process_cases", count, devices


def run(folder, count, devices, names):
    """What each process printed, by case."""
    flags = ("--processes", str(count), "--devices", str(devices))
    with Workers("tests.front.process_cases", count, folder, *flags, *names) as workers:
        wanted = {
            name: CASES[name].reference() for name in names if CASES[name].reference
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


def test_two_processes_compute_what_one_does(tmp_path):
    wanted, found = run(tmp_path, 2, 2, list(CASES))
    assert_computed(wanted, found)
    # The loss is in both, `y` and the gradient of `x` where they are made.
    for process, lines in enumerate(found):
        y, *rest = lines["calls"]["leaves"]
        assert (y is None) == (process == 0)
        assert None not in rest
        assert (lines["step"]["leaves"][-1] is None) == (process == 1)
