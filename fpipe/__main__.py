"""Schedules from the command line, drawn or compared.

$ python -m fpipe schedule gpipe --devices 2 --microbatches 2
device 0 F0 F1          B0--- B1---
device 1    F0 F1 B0--- B1---
gpipe: makespan 9, bubble 33.3%, peak live microbatches 2, 2

$ python -m fpipe compare --devices 2 --microbatches 2
schedule          stages per device  makespan  idle  bubble  peak live
zb_h1                             1         7     1   14.3%          2
…
"""

import argparse
import dataclasses
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from fpipe.plot import SUFFIXES, save
from fpipe.schedules import (
    NAMES,
    Costs,
    Schedule,
    Timeline,
    draw,
    early_recompute,
    named,
    offload,
    simulate,
)
from fpipe.schedules._costs import LAUNCHERS

WIDTH = 120
# The costs of the actions of a stage. Others are of a device or of the host.
OF_STAGES = ("F", "B", "I", "W", "R", "offload")
# Half of what a device would hold, as a limit: no number of microbatches is below 0.
HALF = -1.0
# Microseconds of a trace for a unit of time: viewers show milliseconds.
UNIT = 1000.0
# Below the options, where the lines of a table are kept.
EPILOG = """\
{what}
  F, I, W    a forward, and the two halves of a backward (default: 1 each)
  B          a whole backward (default: I + W; I and W are half of a given B)
  R          a recomputation (default: F)
  transfer   of an array to another device (default: 0)
  offload    one copy of a microbatch to the host, or back (default: 0)
  launch     the host's time to launch an action (default: 0)
  launchers  one thread launches for all devices, or per_device (default: one)
"""


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
    one = _add_command(
        commands,
        "schedule",
        _draw_schedule,
        "draw one schedule, with its makespan, bubble and live microbatches",
    )
    one.add_argument("name", help=f"one of {', '.join(NAMES)} (required)")
    _add_sizes(
        one,
        "stages per device (default: the schedule's own number, or 2 if it takes "
        "several)",
    )
    _add_costs(one, "Costs, in any unit of time; those of actions are of one stage:")
    one.add_argument(
        "--out",
        type=_read_out,
        metavar="FILE",
        help=f"also write a file, by its suffix: {', '.join(SUFFIXES)}, .csv, or .json "
        "for a trace (default: none)",
    )
    many = _add_command(
        commands,
        "compare",
        _compare_schedules,
        "a table of all schedules with backwards, the shortest first",
    )
    _add_sizes(
        many, "stages per device of the schedules that take several (default: 2)"
    )
    _add_costs(
        many,
        "Costs, in any unit of time; those of actions are of all the stages of a\n"
        "device together, so that each schedule has the same work:",
    )
    return parser


def _add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], str], what: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_sizes(parser: argparse.ArgumentParser, virtual: str) -> None:
    parser.add_argument(
        "--devices",
        type=_read_count,
        required=True,
        metavar="D",
        help="number of devices (required)",
    )
    parser.add_argument(
        "--microbatches",
        type=_read_count,
        required=True,
        metavar="M",
        help="number of microbatches (required)",
    )
    parser.add_argument("--virtual", type=_read_count, metavar="V", help=virtual)


def _add_costs(parser: argparse.ArgumentParser, what: str) -> None:
    parser.epilog = EPILOG.format(what=what)
    parser.add_argument(
        "--costs",
        type=_read_costs,
        default={},
        metavar="NAME=NUMBER,...",
        help="what things take, such as F=1,I=1.2,W=0.9,transfer=0.1: see the list "
        "below (default: that of each)",
    )
    parser.add_argument(
        "--recompute",
        choices=("early", "with_backward"),
        help="backwards recompute: early, as actions of their own, or with_backward, "
        "as a part of the backward (default: they recompute nothing)",
    )
    parser.add_argument(
        "--offload",
        type=_read_limit,
        metavar="N",
        help="the most microbatches that a device holds, each on all its stages; or "
        "the word half, for half of the number without copies; others are copied to "
        "the host (default: nothing is copied)",
    )


def _draw_schedule(arguments: argparse.Namespace) -> str:
    schedule = named(
        arguments.name, arguments.devices, arguments.microbatches, arguments.virtual
    )
    schedule, costs = _with_actions(schedule, Costs(**arguments.costs), arguments)
    timeline = simulate(schedule, costs)
    if arguments.out is not None:
        _write(arguments.out, schedule, timeline)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    return draw(timeline, width=max(width, 1), colour=None)


def _with_actions(
    schedule: Schedule, costs: Costs, arguments: argparse.Namespace
) -> tuple[Schedule, Costs]:
    """The schedule with the recomputations and copies that are asked for, and what its
    actions take then.
    """
    if not schedule.backwards:
        return schedule, costs
    if arguments.offload is not None:
        per_device = schedule.stages // schedule.devices
        limit = arguments.offload * per_device
        if arguments.offload == HALF:
            limit = max(simulate(schedule, costs).peak_live) // 2
        schedule = offload(schedule, memory=limit, costs=costs)
    if arguments.recompute == "early":
        schedule = early_recompute(schedule, costs)
    if arguments.recompute == "with_backward":
        longer = {
            kind: getattr(costs, kind) + (costs.F if costs.R is None else costs.R)
            for kind in ("I", "B")
            if getattr(costs, kind) is not None
        }
        if "B" not in longer:
            longer["B"] = longer["I"] + costs.W
        costs = dataclasses.replace(costs, **longer)
    return schedule, costs


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


class _Row(NamedTuple):
    """A schedule in the table of `compare`, in the words of its header."""

    schedule: str
    per_device: str
    makespan: str
    idle: str
    bubble: str
    peak: str


HEADER = _Row(
    "schedule", "stages per device", "makespan", "idle", "bubble", "peak live"
)


def _compare_schedules(arguments: argparse.Namespace) -> str:
    costs = {"F": 1.0, "I": 1.0, "W": 1.0, **arguments.costs}
    rows: list[tuple[float, _Row]] = []
    left_out: list[str] = []
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
        try:
            makespan, row = _measure(name, schedule, costs, arguments)
        except ValueError as error:
            left_out.append(f"{name}: {' '.join(str(error).split())}")
            continue
        rows.append((makespan, row))
    # Where makespans are equal but for rounding, the order of the names.
    rows.sort(key=lambda row: float(f"{row[0]:.9g}"))
    table = [HEADER, *(row for _, row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines: list[str] = []
    for row in table:
        cells = [row.schedule.ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width))
        lines.append("  ".join(cells))
    if left_out:
        lines += ["", "left out:", *left_out]
    lines += [
        "",
        "idle: how long a device does nothing, the mean over all devices",
        "peak live: microbatches that the fullest device holds; one that it holds on "
        "one of its two stages counts half",
    ]
    return "\n".join(lines)


def _measure(
    name: str,
    schedule: Schedule,
    costs: dict[str, Any],
    arguments: argparse.Namespace,
) -> tuple[float, _Row]:
    """The makespan of a schedule, and its row of the table.

    Arguments:
        name: of the schedule.
        schedule: itself.
        costs: of all the stages of a device together.
        arguments: of the command.
    """
    per_device = schedule.stages // schedule.devices
    of_stage = {
        cost: value / per_device if cost in OF_STAGES else value
        for cost, value in costs.items()
    }
    timeline = simulate(*_with_actions(schedule, Costs(**of_stage), arguments))
    makespan = timeline.makespan
    peak = max(timeline.peak_live) / per_device
    # Thirds do not add up to the last digit: no idle time must not read as 1e-14.
    bubble = timeline.bubble if timeline.bubble > 1e-12 else 0.0
    row = _Row(
        schedule=name,
        per_device=str(per_device),
        makespan=f"{makespan:g}",
        idle=f"{makespan * bubble:g}",
        bubble=f"{bubble:.1%}",
        peak=f"{peak:g}",
    )
    return makespan, row


def _read_count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(
            f"a whole number of at least 1 is needed, not {text!r}"
        )
    return value


def _read_limit(text: str) -> float:
    """The most microbatches that a device holds."""
    if text == "half":
        return HALF
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(
            f"a number above 0, or the word half, is needed, not {text!r}"
        )
    return value


def _read_costs(text: str) -> dict[str, Any]:
    """`F=1,B=2` as keywords of `Costs`."""
    known = (*OF_STAGES, "transfer", "launch")
    costs: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        if name == "launchers" and name not in costs:
            if number not in LAUNCHERS:
                raise argparse.ArgumentTypeError(
                    f"{part!r}: launchers must be {' or '.join(LAUNCHERS)}"
                )
            costs[name] = number
            continue
        if not equals or name not in (*known, "launchers"):
            forms = ", ".join(f"{cost}=number" for cost in known)
            forms += f", launchers={'|'.join(LAUNCHERS)}"
            raise argparse.ArgumentTypeError(f"{part!r} is not one of {forms}")
        if name in costs:
            raise argparse.ArgumentTypeError(f"{name} is there twice in {text!r}")
        try:
            value = float(number)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{number!r} in {part!r} is no number"
            ) from None
        if not (math.isfinite(value) and value >= 0):
            raise argparse.ArgumentTypeError(
                f"{part!r}: a cost must be finite and not negative"
            )
        costs[name] = value
    if "B" in costs:
        # A schedule that splits the backward has the same work to do as one that does
        # not.
        for half, other in (("I", "W"), ("W", "I")):
            if half not in costs:
                rest = costs["B"] / 2
                if other in costs:
                    rest = costs["B"] - costs[other]
                costs[half] = rest
            if costs[half] < 0:
                raise argparse.ArgumentTypeError(
                    f"{text!r}: {other} is larger than B, which is I and W together"
                )
    return costs


def _read_out(text: str) -> pathlib.Path:
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
