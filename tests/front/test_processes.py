"""The placed executor over several processes: the same numbers as one process, and an
error in place of a hang.
"""

from tests.front.process_cases import CASES, decoded
from tests.front.workers import Workers
from tests.helpers import assert_same

WORKER = "tests.front.process_cases"


def run(folder, count, devices, names):
    """What one process computes, and what each of several printed, by case."""
    flags = ("--processes", str(count), "--devices", str(devices))
    with Workers(WORKER, count, folder, *flags, *names) as workers:
        by_schedule = CASES["by gpipe"].reference()
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


def test_two_processes_compute_what_one_does(tmp_path):
    wanted, found = run(tmp_path, 2, 2, list(CASES))
    told = [lines.pop("disagree")["told"] for lines in found]
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
    assert told == [[differ], [differ]]
