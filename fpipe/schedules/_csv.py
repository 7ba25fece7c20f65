"""The table that `torch.distributed.pipelining` reads and writes in its `compute_only`
form.
"""

import csv
import re
from collections.abc import Iterable, Iterator

from fpipe.schedules._action import Action
from fpipe.schedules._schedule import Schedule

ACTION = re.compile(r"([0-9]+)([FBIW])([0-9]+)")
# torch: "(0F3;7B1)OVERLAP_F_B", a forward and a backward that it may run at the same
# time.
OVERLAP = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")
COMMUNICATION = re.compile(
    r"[0-9]+(UNSHARD|RESHARD|REDUCE_GRAD|SEND_F|RECV_F|SEND_B|RECV_B)[0-9]*"
)


def from_csv(
    text: str, stage_to_device: Iterable[int] | None = None, name: str = "csv"
) -> Schedule:
    r"""The schedule in a table: what `Schedule.to_csv` and torch's
    `_dump_csv(format="compute_only")` write.

    A row for each device; a cell such as `2F0` is stage 2, forward, microbatch 0, with
    the kinds of `Action`. Empty cells, where a device waits, are skipped: only the
    order in a row matters. So are empty lines, and spaces. A cell
    `(0F3;7B1)OVERLAP_F_B` (torch's DualPipeV) is read as `0F3`, then `7B1`.

    Arguments:
        text: the content of the file.
        stage_to_device: for each stage the index of its device; left out, the row that
            its actions are in.
        name: for drawings and messages.

    Raises:
        TypeError: `text` is no `str`.
        ValueError: a cell that is no action, or is communication, with its row and
            column, which count from 1; a stage in two rows; or what `Schedule` refuses.

    Example:
        >>> schedule = fpipe.schedules.from_csv("0F0,0F1,,0B0,,0B1\n,1F0,1B0,1F1,1B1\n")
        >>> schedule == fpipe.schedules.from_csv(schedule.to_csv())
        True
    """
    if not isinstance(text, str):
        raise TypeError(
            f"`from_csv(text)`: text is the content of a file, a str, not {text!r}"
        )
    rows: list[list[Action]] = []
    lines: list[int] = []
    for line, cells in _lines(text.removeprefix("\ufeff")):
        rows.append(
            [
                a
                for column, cell in enumerate(cells, 1)
                for a in _actions(cell, line, column)
            ]
        )
        lines.append(line)
    kinds = {a.kind for row in rows for a in row}
    if not kinds:
        raise ValueError("`from_csv`: there is no action in the table")
    if "W" in kinds and "I" not in kinds:
        raise ValueError(
            "`from_csv`: the table has W but no I; early releases of torch wrote the "
            "input gradient as B: write I"
        )
    places = _places(rows, lines) if stage_to_device is None else tuple(stage_to_device)
    return Schedule(rows, places, name)


def _lines(text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(text.splitlines())
    try:
        for cells in reader:
            # A line of spaces is no row; one of commas is, of a device that does
            # nothing.
            if len(cells) > 1 or (cells and cells[0].strip()):
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise ValueError(f"`from_csv`: row {reader.line_num}: {error}") from None


def _actions(cell: str, line: int, column: int) -> Iterator[Action]:
    both = OVERLAP.fullmatch(cell)
    for part in [p.strip() for p in both.groups()] if both else [cell] if cell else []:
        match = ACTION.fullmatch(part)
        if match is None:
            at = f"`from_csv`: row {line}, column {column}: {cell!r} is"
            if COMMUNICATION.fullmatch(part):
                raise ValueError(
                    f"{at} communication; `from_csv` reads `_dump_csv(path, "
                    'format="compute_only")`'
                )
            raise ValueError(
                f"{at} no action; one looks like 2F0: stage, one of F B I W, microbatch"
            )
        stage, kind, microbatch = match.groups()
        yield Action(kind, int(stage), int(microbatch))  # pyright: ignore[reportArgumentType]


def _places(rows: list[list[Action]], lines: list[int]) -> tuple[int, ...]:
    places: dict[int, int] = {}
    for d, row in enumerate(rows):
        for a in row:
            other = places.setdefault(a.stage, d)
            if other != d:
                raise ValueError(
                    f"`from_csv`: stage {a.stage} is in row {lines[other]} and in row "
                    f"{lines[d]}"
                )
    for stage in range(len(places)):
        if stage not in places:
            raise ValueError(
                f"`from_csv`: there is stage {max(places)}, but no action of stage "
                f"{stage}"
            )
    return tuple(places[s] for s in range(len(places)))
