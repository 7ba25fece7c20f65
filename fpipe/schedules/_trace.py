"""Spans of time as a trace that Chrome (`chrome://tracing`) and Perfetto
(https://ui.perfetto.dev) show.

In: spans, by the name of their row. Out: JSON. A device is a process there, and a row
a thread; `F(1,0)` from 1 s to 2 s:

    {"ph": "X", "name": "stage1 F mb0", "cat": "F", "pid": 1, "tid": 0,
     "ts": 1000000.0, "dur": 1000000.0, "args": {"stage": 1, "microbatch": 0}}

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
    events: list[dict[str, Any]] = []
    # Metadata, `"ph": "M"`: names of the devices, and their order.
    for device, name in enumerate(processes):
        facts = {
            "process_name": {"name": name},
            "process_sort_index": {"sort_index": device},
        }
        for fact, args in facts.items():
            events.append({"ph": "M", "name": fact, "pid": device, "args": args})
    rows_used = [0] * len(processes)
    for title, spans in rows.items():
        # For each device its rows of this title, and until when each is taken.
        taken: list[dict[int, float]] = [{} for _ in processes]
        # Each span takes the first row that is free at its start, and a new one if none
        # is: as many rows as spans overlap at most. Viewers take spans of one row for
        # calls, one inside of the other.
        for span in sorted(spans, key=lambda span: (span.start, span.end)):
            device = span.device
            row = next(
                (row for row, end in taken[device].items() if end <= span.start), None
            )
            if row is None:
                row = rows_used[device]
                rows_used[device] += 1
                events.append(
                    {
                        "ph": "M",
                        "name": "thread_name",
                        "pid": device,
                        "tid": row,
                        "args": {"name": title},
                    }
                )
            taken[device][row] = span.end
            # A complete event, with a start and a length; both in microseconds.
            events.append(
                {
                    "ph": "X",
                    "name": span.name,
                    "cat": span.category,
                    "pid": device,
                    "tid": row,
                    "ts": span.start * unit,
                    "dur": (span.end - span.start) * unit,
                    "args": dict(span.args),
                }
            )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
