"""Schedules from the command line: `python -m fpipe schedule 1f1b --devices 4
--microbatches 8`.
"""

import argparse
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fpipe.plot import SUFFIXES, save
from fpipe.schedules import NAMES, Costs, Schedule, Timeline, draw, named, simulate

WIDTH = 120
UNIT = 1000.0  # microseconds of a trace for a unit of time: viewers show milliseconds


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, print what it has to say, and return the exit status.

    Raises:
        SystemExit: help was asked for (status 0), or an argument is wrong (2).
    """
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has closed, as `head` does. What is left must not be flushed at
        # exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        text = arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    print(text if _encodes(text) else text.replace("…", ">"))
    return 0


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m fpipe", description="Draw and compare pipeline schedules."
    )
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="{schedule,compare}"
    )
    one = _command(
        commands,
        "schedule",
        _schedule,
        "draw one schedule, with its makespan, bubble and live microbatches",
    )
    one.add_argument("name", help=f"one of {', '.join(NAMES)} (required)")
    _sizes(
        one,
        "stages per device (default: what the schedule prescribes, 2 where it takes "
        "several)",
    )
    _times(one, "times of the actions of a stage, and of a transfer between devices")
    one.add_argument(
        "--out",
        type=_out,
        metavar="FILE",
        help=f"also write a file, by its suffix: {', '.join(SUFFIXES)}, .csv, or .json "
        "for a trace (default: none)",
    )
    many = _command(
        commands,
        "compare",
        _compare,
        "a table of all schedules with backwards, the shortest first",
    )
    _sizes(many, "stages per device of the schedules that take several (default: 2)")
    _times(
        many,
        "times of the actions of all the stages of a device together, so that each "
        "schedule has the same work, and of a "
        "transfer between devices",
    )
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], str], what: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=what, description=f"{what[0].upper()}{what[1:]}."
    )
    parser.set_defaults(run=run)
    return parser


def _sizes(parser: argparse.ArgumentParser, virtual: str) -> None:
    parser.add_argument(
        "--devices",
        type=_count,
        required=True,
        metavar="D",
        help="number of devices (required)",
    )
    parser.add_argument(
        "--microbatches",
        type=_count,
        required=True,
        metavar="M",
        help="number of microbatches (required)",
    )
    parser.add_argument("--virtual", type=_count, metavar="V", help=virtual)


def _times(parser: argparse.ArgumentParser, what: str) -> None:
    default = "F=1,I=1,W=1,transfer=0, and B is I + W; where B is given alone, I and W are halves of it"
    parser.add_argument(
        "--costs", type=_costs, default={}, help=f"{what} (default: {default})"
    )


def _schedule(arguments: argparse.Namespace) -> str:
    schedule = named(
        arguments.name, arguments.devices, arguments.microbatches, arguments.virtual
    )
    timeline = simulate(schedule, Costs(**arguments.costs))
    if arguments.out is not None:
        _write(arguments.out, schedule, timeline)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    return draw(timeline, width=max(width, 1), colour=None)


def _write(path: pathlib.Path, schedule: Schedule, timeline: Timeline) -> None:
    try:
        if path.suffix.lower() == ".csv":
            path.write_text(schedule.to_csv(), encoding="utf-8")
        elif path.suffix.lower() == ".json":
            path.write_text(timeline.to_trace(unit=UNIT), encoding="utf-8")
        else:
            save(timeline, path)
    except OSError as error:
        raise OSError(
            f"argument --out: cannot write {str(path)!r}: {error.strerror or error}"
        ) from error


def _compare(arguments: argparse.Namespace) -> str:
    costs = {"F": 1.0, "I": 1.0, "W": 1.0, **arguments.costs}
    rows, left_out = [], []
    for name in NAMES:
        virtual = arguments.virtual if NAMES[name].per_device is None else None
        try:
            schedule = named(name, arguments.devices, arguments.microbatches, virtual)
        except ValueError as error:
            left_out.append(f"{name}: {' '.join(str(error).split())}")
            continue
        if not schedule.backwards:
            left_out.append(f"{name}: forwards alone")
            continue
        v = schedule.stages // schedule.devices
        timeline = simulate(
            schedule,
            Costs(**{k: c if k == "transfer" else c / v for k, c in costs.items()}),
        )
        span, peak = timeline.makespan, max(timeline.peak_live) / v
        # Thirds do not add up to the last digit: no idle time must not read as 1e-14.
        bubble = timeline.bubble if timeline.bubble > 1e-12 else 0.0
        rows.append(
            (
                span,
                name,
                (
                    str(v),
                    f"{span:g}",
                    f"{span * bubble:g}",
                    f"{bubble:.1%}",
                    f"{peak:g}",
                ),
            )
        )
    rows.sort(
        key=lambda row: float(f"{row[0]:.9g}")
    )  # where these are equal, the order of the names
    head = ("schedule", "stages per device", "makespan", "idle", "bubble", "peak live")
    table = [head, *((name, *cells) for _, name, cells in rows)]
    sizes = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for name, *cells in table:
        right = (cell.rjust(size) for cell, size in zip(cells, sizes[1:], strict=True))
        lines.append("  ".join([name.ljust(sizes[0]), *right]))
    if left_out:
        lines += ["", "left out:", *left_out]
    lines += [
        "",
        "idle: time of a device, on average",
        "peak live: microbatches held, each on all the stages of a device, where there "
        "are most of them",
    ]
    return "\n".join(lines)


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(
            f"a whole number of at least 1 is needed, not {text!r}"
        )
    return value


def _costs(text: str) -> dict[str, float]:
    known = ("F", "B", "I", "W", "transfer")
    given: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (p.strip() for p in part.partition("="))
        if not equals or name not in known:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not one of {', '.join(f'{k}=number' for k in known)}"
            )
        if name in given:
            raise argparse.ArgumentTypeError(f"{name} is there twice in {text!r}")
        try:
            given[name] = float(number)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{number!r} in {part!r} is no number"
            ) from None
        if not (math.isfinite(given[name]) and given[name] >= 0):
            raise argparse.ArgumentTypeError(
                f"{part!r}: a cost is finite and not negative"
            )
    if "B" in given:
        # A schedule that splits the backward has the same work to do as one that does
        # not.
        for a, b in (("I", "W"), ("W", "I")):
            given.setdefault(a, given["B"] - given[b] if b in given else given["B"] / 2)
            if given[a] < 0:
                raise argparse.ArgumentTypeError(
                    f"{text!r}: {b} is larger than B, which is I and W together"
                )
    return given


def _out(text: str) -> pathlib.Path:
    path = pathlib.Path(text)
    if path.suffix.lower() not in (*SUFFIXES, ".csv", ".json"):
        raise argparse.ArgumentTypeError(
            f"{text!r} ends in none of {', '.join(SUFFIXES)}, .csv, .json"
        )
    return path


def _encodes(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
