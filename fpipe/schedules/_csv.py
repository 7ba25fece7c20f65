"""The table that `torch.distributed.pipelining` reads and writes.

Its `compute_only` form has a row for each device and a cell for each action, or an
empty one where the device waits. `one_f_one_b(2, 2)`:

    0F0,0F1,,0B0,,0B1
    ,1F0,1B0,1F1,1B1
"""

import csv
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fpipe.schedules._action import KINDS, Action, Kind
from fpipe.schedules._checks import shown
from fpipe.schedules._schedule import Schedule

ACTION = re.compile(rf"([0-9]+)([{''.join(KINDS)}])([0-9]+)")
# torch: "(0F3;7B1)OVERLAP_F_B", a forward and a backward that it may run at the same
# time.
OVERLAP = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")
COMMUNICATION = re.compile(
    r"[0-9]+(UNSHARD|RESHARD|REDUCE_GRAD|SEND_F|RECV_F|SEND_B|RECV_B)[0-9]*"
)
LETTERS: dict[str, Kind] = {kind: kind for kind in KINDS}


class _Row(NamedTuple):
    """The actions of a device, and their line in the text, counted from 1."""

    line: int
    actions: list[Action]


def from_csv(
    text: str, stage_to_device: Iterable[int] | None = None, name: str = "csv"
) -> Schedule:
    r"""Read a schedule from a table.

    `Schedule.to_csv` writes such tables, and so does torch's
    `_dump_csv(format="compute_only")`. The table has a row for each device. The cell
    `2F0` is stage 2, forward, microbatch 0. The letters are the kinds of `Action`;
    torch knows F, B, I and W. Only the order in a row matters: empty cells (where a
    device waits), empty lines and spaces are skipped. The cell
    `(0F3;7B1)OVERLAP_F_B` of torch's DualPipeV is read as `0F3`, then `7B1`.

    Arguments:
        text: the content of the file.
        stage_to_device: the index of the device of each stage. Default: the row that
            has the actions of the stage.
        name: the name of the schedule in drawings and messages.

    Returns:
        A `Schedule`.

    Raises:
        TypeError: `text` is no `str`.
        ValueError: a cell is no action, or is communication. The message has its row
            and column, counted from 1. Or a stage is in two rows, or the schedule
            cannot run (see `Schedule`).

    Example:
        >>> schedule = fpipe.schedules.from_csv("0F0,0F1,,0B0,,0B1\n,1F0,1B0,1F1,1B1\n")
        >>> schedule == fpipe.schedules.from_csv(schedule.to_csv())
        True
    """
    if not isinstance(text, str):
        raise TypeError(
            f"`from_csv(text)`: text is the content of a file, a str, not {shown(text)}"
        )
    # Spreadsheets put a byte-order mark in front of the text.
    rows: list[_Row] = []
    for line, cells in _read_lines(text.removeprefix("\ufeff")):
        row = _Row(line, [])
        for column, cell in enumerate(cells, 1):
            row.actions.extend(_read_cell(cell, line, column))
        rows.append(row)
    kinds = {action.kind for row in rows for action in row.actions}
    if not kinds:
        raise ValueError("`from_csv`: there is no action in the table")
    # Otherwise `Schedule` would say that `B` and `W` do not go together, but not why.
    if "W" in kinds and "I" not in kinds:
        raise ValueError(
            "`from_csv`: the table has W but no I; early releases of torch wrote the "
            "input gradient as B: write I"
        )
    if stage_to_device is None:
        stage_to_device = _find_stages(rows)
    return Schedule([row.actions for row in rows], stage_to_device, name)


def _read_lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """The number and the cells of each line that is a row."""
    reader = csv.reader(text.splitlines())
    try:
        for cells in reader:
            # A line of spaces is no row. A line of commas is the row of a device that
            # does nothing.
            if len(cells) > 1 or (cells and cells[0].strip()):
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise ValueError(f"`from_csv`: row {reader.line_num}: {error}") from None


def _read_cell(cell: str, line: int, column: int) -> Iterator[Action]:
    """The actions of a cell: none, one, or two that torch would overlap."""
    parts = [cell] if cell else []
    overlap = OVERLAP.fullmatch(cell)
    if overlap:
        parts = [part.strip() for part in overlap.groups()]
    for part in parts:
        match = ACTION.fullmatch(part)
        if match is None:
            where = f"`from_csv`: row {line}, column {column}: {cell!r} is"
            if COMMUNICATION.fullmatch(part):
                raise ValueError(
                    f"{where} communication; `from_csv` reads `_dump_csv(path, "
                    'format="compute_only")`'
                )
            raise ValueError(
                f"{where} no action; one looks like 2F0: stage, one of "
                f"{' '.join(KINDS)}, microbatch"
            )
        stage, kind, microbatch = match.groups()
        yield Action(LETTERS[kind], int(stage), int(microbatch))


def _find_stages(rows: list[_Row]) -> tuple[int, ...]:
    """The device of each stage: the row that its actions are in."""
    # torch has no map from stages to devices in its table, but its rows tell.
    device_of: dict[int, int] = {}
    for device, row in enumerate(rows):
        for action in row.actions:
            other = device_of.setdefault(action.stage, device)
            if other != device:
                raise ValueError(
                    f"`from_csv`: stage {action.stage} is in row {rows[other].line} "
                    f"and in row {row.line}"
                )
    for stage in range(len(device_of)):
        if stage not in device_of:
            raise ValueError(
                f"`from_csv`: there is stage {max(device_of)}, but no action of stage "
                f"{stage}"
            )
    return tuple(device_of[stage] for stage in range(len(device_of)))
