"""The command line: what it prints, writes and refuses."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import pytest

from fpipe import schedules
from fpipe.__main__ import main
from fpipe.schedules import Costs, draw, simulate

ROOT = pathlib.Path(schedules.__file__).parent.parent.parent
SIZES = ["--devices", "4", "--microbatches", "8"]


def printed(capsys, *argv):
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys, *argv):
    """The one line that is said of wrong arguments."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert err.startswith("python -m fpipe")
    return err


def process(*argv, **variables):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "fpipe", *argv],
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


@pytest.mark.parametrize("name", schedules.NAMES)
def test_schedule_prints_the_drawing(capsys, name):
    out = printed(capsys, "schedule", name, *SIZES)
    assert out == draw(schedules.named(name, 4, 8)) + "\n"
    assert re.search(
        r"makespan [0-9.]+, bubble "
        r"[0-9.]+%,\s+peak\s+live\s+microbatches(\s+\d+,?){4}\n$",
        out,
    )


def test_virtual_stages(capsys):
    for name in [
        name for name in schedules.NAMES if schedules.NAMES[name].per_device is None
    ]:
        out = printed(capsys, "schedule", name, *SIZES, "--virtual", "3")
        assert out == draw(schedules.named(name, 4, 8, virtual=3)) + "\n"


COSTS = {
    "F=1.5,B=3": Costs(F=1.5, B=3, I=1.5, W=1.5),
    "B=3,I=2": Costs(B=3, I=2, W=1),
    "W=0, B=3": Costs(B=3, I=3, W=0),
    "I=2,W=3,transfer=.25": Costs(I=2, W=3, transfer=0.25),
    "B=1,I=2,W=3": Costs(B=1, I=2, W=3),
    "F=0,I=0,W=0": Costs(F=0, I=0, W=0),
    "F=1e-3": Costs(F=0.001),
    "launch=.5,launchers=per_device": Costs(launch=0.5, launchers="per_device"),
    "launchers=one, launch=2": Costs(launch=2),
}


@pytest.mark.parametrize("text", COSTS)
def test_costs(capsys, text):
    schedule = schedules.one_f_one_b(4, 8)
    assert printed(capsys, "schedule", "1f1b", *SIZES, "--costs", text) == (
        draw(simulate(schedule, COSTS[text])) + "\n"
    )


def test_recomputations_and_copies(capsys):
    """As the functions make them; `half` is of what the schedule would hold."""
    schedule, costs = schedules.one_f_one_b(4, 8), Costs(B=2, R=1.5, offload=0.5)
    given = ["schedule", "1f1b", *SIZES, "--costs", "B=2,R=1.5,offload=.5"]
    early = schedules.early_recompute(schedule, costs)
    halved = schedules.offload(schedule, memory=2, costs=costs)
    both = schedules.early_recompute(halved, costs)
    inside = Costs(I=2.5, B=3.5)
    for options, made, taken in [
        (["--recompute", "early"], early, costs),
        (["--recompute", "with_backward"], schedule, inside),
        (["--offload", "2"], halved, costs),
        (["--offload", "half"], halved, costs),
        (["--offload", "half", "--recompute", "early"], both, costs),
    ]:
        out = printed(capsys, *given, *options)
        assert out == draw(simulate(made, taken)) + "\n"
    # One stage of two counts half, and what takes no copies is left out with a reason.
    costs = ["--costs", "offload=1"]
    text = printed(capsys, "compare", *SIZES, *costs, "--offload", "half")
    rows = table(text)
    for name in ("gpipe", "1f1b", "interleaved_1f1b"):
        made = schedules.named(name, 4, 8)
        plain = max(simulate(made).peak_live) * made.devices / made.stages
        assert float(rows[name][-1]) <= plain / 2
    assert "\nzb_h1: `offload(memory=" in text


FORWARDS = schedules.Schedule([[("F", 0, 0)]])


def table(text):
    """The rows of the comparison by name, in order."""
    lines = text.splitlines()
    assert lines[0].split() == [
        "schedule",
        "stages",
        "per",
        "device",
        "makespan",
        "idle",
        "bubble",
        "peak",
        "live",
    ]
    body = lines[1 : lines.index("")]
    assert len({len(line) for line in lines[: len(body) + 1]}) == 1
    return {name: cells for name, *cells in map(str.split, body)}


def test_compare_all_schedules(capsys):
    out = printed(capsys, "compare", "--devices", "4", "--microbatches", "16")
    rows = table(out)
    assert list(rows) == sorted(
        rows, key=lambda name: (float(rows[name][1]), list(schedules.NAMES).index(name))
    )
    assert rows["gpipe"] == ["1", "57", "9", "15.8%", "16"]
    assert rows["1f1b"] == ["1", "57", "9", "15.8%", "4"]
    assert rows["eager_1f1b"] == ["1", "57", "9", "15.8%", "7"]
    for name, (v, makespan, idle, bubble, peak) in rows.items():
        schedule = schedules.named(name, 4, 16)
        v = int(v)
        timeline = simulate(schedule, Costs(F=1 / v, I=1 / v, W=1 / v))
        assert schedule.stages == 4 * v
        # Every device has 16 microbatches of work 3, whatever the schedule.
        assert float(makespan) - float(idle) == pytest.approx(48, abs=1e-3)
        assert float(makespan) == pytest.approx(timeline.makespan, rel=1e-5)
        assert bubble == f"{max(timeline.bubble, 0):.1%}"
        assert float(peak) == pytest.approx(max(timeline.peak_live) / v, rel=1e-5)
    assert all(f"\n{name}: " in out for name in set(schedules.NAMES) - set(rows))


def test_compare_under_costs(capsys):
    rows = table(printed(capsys, "compare", *SIZES, "--costs", "F=2,B=6,transfer=1"))
    for name, (v, makespan, *_) in rows.items():
        n = int(v)
        timeline = simulate(
            schedules.named(name, 4, 8),
            Costs(F=2 / n, B=6 / n, I=3 / n, W=3 / n, transfer=1),
        )
        assert float(makespan) == pytest.approx(timeline.makespan, rel=1e-5)
    assert float(rows["eager_1f1b"][1]) < float(rows["1f1b"][1])


def test_schedules_that_refuse_the_sizes_are_named_with_the_reason(capsys, monkeypatch):
    def picky(devices, microbatches):
        raise ValueError(
            f"`picky(devices={devices}, microbatches={microbatches})`:\n  not these"
        )

    def several(name, devices, microbatches, virtual):
        if name != "several":
            return schedules.named(name, devices, microbatches)
        s, m = devices * virtual, range(microbatches)
        rows = [
            [
                (k, j, i)
                for k in "FB"
                for j in range(d, s, devices)[:: 1 if k == "F" else -1]
                for i in m
            ]
            for d in range(devices)
        ]
        return schedules.Schedule(rows, [j % devices for j in range(s)])

    one = schedules.NAMES["gpipe"]
    monkeypatch.setitem(schedules.NAMES, "picky", one._replace(generator=picky))
    monkeypatch.setitem(schedules.NAMES, "several", one._replace(per_device=None))
    monkeypatch.setitem(
        schedules.NAMES,
        "half",
        one._replace(generator=lambda devices, microbatches: FORWARDS),
    )
    monkeypatch.setattr("fpipe.__main__.named", several)
    out = printed(
        capsys,
        "compare",
        "--devices",
        "2",
        "--microbatches",
        "6",
        "--virtual",
        "3",
        "--costs",
        "transfer=9",
    )
    assert "\nleft out:\n" in out
    assert "\nhalf: forwards alone\n" in out
    assert "half" not in table(out)
    assert "\npicky: `picky(devices=2, microbatches=6)`: not these\n" in out
    # Thirds of 1 and 2, in lots of 6: of 6 stages the last starts after 5 first
    # forwards and 5 transfers, and after its 6 the backwards come down in the same way.
    assert table(out)["several"][:2] == [
        "3",
        f"{(5 + 6) * 1 / 3 + (5 + 6) * 2 / 3 + 10 * 9:g}",
    ]
    assert table(out)["several"][4] == "6"
    assert "picky" not in table(out)
    assert (
        printed(capsys, "schedule", "several", *SIZES, "--virtual", "2").count("\n")
        == 5
    )
    assert "not these" in refused(capsys, "schedule", "picky", *SIZES)


def test_files(capsys, tmp_path):
    schedule = schedules.one_f_one_b(4, 8)
    costs = ["--costs", "F=2"]
    for suffix, head in {
        ".svg": b"<svg",
        ".png": b"\x89PNG",
        ".pdf": b"%PDF",
        ".csv": b"0F0,0F1,0F2,0F3,,",
        ".json": b"{",
    }.items():
        path = tmp_path / f"out{suffix}"
        out = printed(capsys, "schedule", "1f1b", *SIZES, *costs, "--out", str(path))
        assert out == draw(simulate(schedule, Costs(F=2))) + "\n"
        assert path.read_bytes().startswith(head)
    assert (tmp_path / "out.svg").read_text() == schedules.svg(
        simulate(schedule, Costs(F=2))
    )
    assert (tmp_path / "out.json").read_text() == simulate(
        schedule, Costs(F=2)
    ).to_trace(unit=1000.0)
    assert (
        schedules.from_csv((tmp_path / "out.csv").read_text(), name="1f1b") == schedule
    )


WRONG = {
    "unknown command": (["draw"], "invalid choice: 'draw'"),
    "unknown name": (
        ["schedule", "2f2b", *SIZES],
        "no schedule is named '2f2b'; there are gpipe, 1f1b",
    ),
    "no name": (["schedule", *SIZES], "required: name"),
    "no devices": (["schedule", "1f1b", "--microbatches", "8"], "required: --devices"),
    "no microbatches": (["compare", "--devices", "8"], "required: --microbatches"),
    "zero devices": (
        ["schedule", "1f1b", "--devices", "0", "--microbatches", "8"],
        "--devices: .*at least 1.*'0'",
    ),
    "zero devices compared": (
        ["compare", "--devices", "0", "--microbatches", "8"],
        "--devices: .*at least 1.*'0'",
    ),
    "negative": (
        ["compare", "--devices", "2", "--microbatches=-1"],
        "--microbatches: .*at least 1.*'-1'",
    ),
    "no number": (
        ["compare", "--devices", "two", "--microbatches", "8"],
        "--devices: .*'two'",
    ),
    "a fraction": (
        ["compare", "--devices", "2.0", "--microbatches", "8"],
        "--devices: .*'2.0'",
    ),
    "zero virtual": (
        ["compare", *SIZES, "--virtual", "0"],
        "--virtual: .*at least 1.*'0'",
    ),
    "virtual refused": (
        ["schedule", "1f1b", *SIZES, "--virtual", "2"],
        "puts one stage on each device, not 2",
    ),
    "cost no number": (
        ["compare", *SIZES, "--costs", "F=x"],
        "--costs: 'x' in 'F=x' is no number",
    ),
    "cost unknown": (
        ["compare", *SIZES, "--costs", "Q=1"],
        "--costs: 'Q=1' is not one of F=number",
    ),
    "cost negative": (
        ["schedule", "1f1b", *SIZES, "--costs", "F=-1"],
        "--costs: 'F=-1': .*not negative",
    ),
    "cost infinite": (
        ["compare", *SIZES, "--costs", "F=inf"],
        "--costs: 'F=inf': .*finite",
    ),
    "cost nan": (["compare", *SIZES, "--costs", "B=nan"], "--costs: 'B=nan': .*finite"),
    "cost twice": (
        ["compare", *SIZES, "--costs", "F=1,F=2"],
        "--costs: F is there twice",
    ),
    "launchers": (
        ["compare", *SIZES, "--costs", "launchers=two"],
        "--costs: 'launchers=two': launchers must be one or per_device",
    ),
    "limit": (
        ["compare", *SIZES, "--offload", "0"],
        "--offload: a number above 0, or the word half, is needed, not '0'",
    ),
    "cost empty": (["compare", *SIZES, "--costs", ""], "--costs: '' is not one of"),
    "cost trailing": (
        ["compare", *SIZES, "--costs", "F=1,"],
        "--costs: '' is not one of",
    ),
    "cost too large": (
        ["compare", *SIZES, "--costs", "B=1,W=2"],
        "--costs: .*W is larger than B",
    ),
    "suffix": (
        ["schedule", "1f1b", *SIZES, "--out", "a.jpg"],
        "--out: 'a.jpg' ends in none of .svg, .png, .pdf, .csv, .json",
    ),
    "no suffix": (
        ["schedule", "1f1b", *SIZES, "--out", "a"],
        "--out: 'a' ends in none of",
    ),
    "unknown flag": (
        ["compare", *SIZES, "--colour"],
        "unrecognized arguments: --colour",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_one_line(capsys, name):
    argv, message = WRONG[name]
    assert re.search(message, refused(capsys, *argv))


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf", ".csv", ".json"])
def test_files_that_cannot_be_written(capsys, tmp_path, suffix):
    path = tmp_path / "absent" / f"a{suffix}"
    message = refused(capsys, "schedule", "1f1b", *SIZES, "--out", str(path))
    assert f"--out: cannot write {str(path)!r}: No such file or directory" in message


def test_without_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [n for n in sys.modules if n.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    message = refused(
        capsys, "schedule", "1f1b", *SIZES, "--out", str(tmp_path / "a.png")
    )
    assert 'pip install "fpipe[plot]"' in message


@pytest.mark.parametrize("command", ["schedule", "compare"])
def test_help_tells_each_default(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flags = re.split(r"\n  (?=-|name)", text)[1:]
    assert {re.split(r"[ ,]", flag)[0] for flag in flags if "--help" not in flag} == (
        {"--devices", "--microbatches", "--virtual", "--costs"}
        | {"--recompute", "--offload"}
        | ({"name", "--out"} if command == "schedule" else set())
    )
    for flag in flags:
        assert "--help" in flag or "(default" in flag or "(required)" in flag, flag
    # A line for each cost, or for several, with the default.
    told = re.findall(r"^  (\S+(?:, \S+)*)  .*\(default: ", text, re.MULTILINE)
    costs = {field.name for field in dataclasses.fields(Costs)}
    assert set(", ".join(told).split(", ")) == {
        name for name in costs if not name.startswith("memory")
    }


def test_nothing_asked_for(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "schedule" in err
    assert "compare" in err


def test_the_width_of_the_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "50")
    schedule = schedules.gpipe(4, 20)
    out = printed(capsys, "schedule", "gpipe", "--devices", "4", "--microbatches", "20")
    assert out == draw(schedule, width=50) + "\n"
    monkeypatch.delenv("NO_COLOR")
    assert printed(
        capsys, "schedule", "gpipe", "--devices", "4", "--microbatches", "20"
    ) == (draw(schedule, width=50, colour=True) + "\n")


def test_as_a_process_without_devices():
    """No device of JAX is touched: a platform that does not exist goes unnoticed."""
    done = process("schedule", "gpipe", *SIZES, JAX_PLATFORMS="nonsense")
    assert done.returncode == 0, done.stderr
    assert done.stdout == draw(schedules.gpipe(4, 8)) + "\n"
    assert done.stderr == ""


def test_as_a_process_that_is_wrong():
    done = process("compare", *SIZES, "--costs", "F=x")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "python -m fpipe compare: argument --costs: 'x' in 'F=x' is no number\n"
    )
    assert process().returncode == 2


def test_where_the_terminal_knows_ascii_alone():
    done = process(
        "schedule",
        "gpipe",
        "--devices",
        "2",
        "--microbatches",
        "99",
        PYTHONIOENCODING="ascii",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0][-1] == ">"


@pytest.mark.parametrize("argv", [["schedule", "gpipe", *SIZES], ["--help"]])
def test_a_closed_pipe_is_no_error(argv):
    """As in `python -m fpipe ... | head`, where head is gone before anything is
    written.
    """
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "fpipe", *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 1
