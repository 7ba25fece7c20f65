"""Spans of time as a trace that Chrome (`chrome://tracing`) and Perfetto
(https://ui.perfetto.dev) show.

The format: "Trace Event Format", Google,
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Span(NamedTuple):
    """What a trace shows as one bar.

    Attributes:
        device: whose.
        name: what it says.
        category: what it can be filtered by.
        start: in any unit.
        end: in the same unit.
        args: what a click on it shows.
    """

    device: int
    name: str
    category: str
    start: float
    end: float
    args: Mapping[str, Any]


def trace(
    processes: Sequence[str], rows: Mapping[str, Sequence[Span]], unit: float
) -> str:
    """The trace as JSON.

    Arguments:
        processes: a name for each device.
        rows: spans by the name of what they are; what overlaps on a device gets a row
            of its own.
        unit: microseconds that a unit of time takes.
    """
    out: list[dict[str, Any]] = []
    for d, name in enumerate(processes):
        out.append(
            {"ph": "M", "name": "process_name", "pid": d, "args": {"name": name}}
        )
        out.append(
            {
                "ph": "M",
                "name": "process_sort_index",
                "pid": d,
                "args": {"sort_index": d},
            }
        )
    used = [0] * len(processes)
    for title, spans in rows.items():
        free: list[dict[int, float]] = [
            {} for _ in processes
        ]  # of each device, until when its rows are taken
        for span in sorted(spans, key=lambda s: (s.start, s.end)):
            own = free[span.device]
            row = next((n for n, end in own.items() if end <= span.start), None)
            if row is None:
                row, used[span.device] = used[span.device], used[span.device] + 1
                head = {"pid": span.device, "tid": row}
                out.append(
                    {"ph": "M", "name": "thread_name", **head, "args": {"name": title}}
                )
            own[row] = span.end
            out.append(
                {
                    "ph": "X",
                    "name": span.name,
                    "cat": span.category,
                    "pid": span.device,
                    "tid": row,
                    "ts": span.start * unit,
                    "dur": (span.end - span.start) * unit,
                    "args": dict(span.args),
                }
            )
    return json.dumps({"traceEvents": out, "displayTimeUnit": "ms"})
