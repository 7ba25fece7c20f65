"""Spans of time as events of a trace."""

import json

from fpipe.schedules import Costs, one_f_one_b, simulate
from fpipe.schedules._trace import Span, trace


def test_what_overlaps_in_a_trace_has_a_row_of_its_own():
    spans = [
        Span(0, name, "F", a, b, {})
        for name, a, b in (("a", 0, 2), ("b", 1, 3), ("c", 2, 4), ("d", 0, 1))
    ]
    found = json.loads(trace(["one"], {"x": spans, "y": spans[:1]}, 1.0))["traceEvents"]
    assert {e["name"]: e["tid"] for e in found if e["ph"] == "X" and e["tid"] < 2} == {
        "a": 1,
        "b": 0,
        "c": 1,
        "d": 0,
    }
    assert [
        (e["tid"], e["args"]["name"]) for e in found if e["name"] == "thread_name"
    ] == [
        (0, "x"),
        (1, "x"),
        (2, "y"),
    ]


def test_threads_that_launch_are_processes_of_a_trace():
    timeline = simulate(one_f_one_b(2, 1), Costs(launch=1.0))
    found = json.loads(timeline.to_trace())["traceEvents"]
    names = [e["args"]["name"] for e in found if e["name"] == "process_name"]
    assert names == ["device 0", "device 1", "host"]
    launches = [e for e in found if e.get("cat") == "launch"]
    assert [(e["pid"], e["name"], e["ts"]) for e in launches] == [
        (2, "stage0 F mb0", 0.0),
        (2, "stage1 F mb0", 1e6),
        (2, "stage1 B mb0", 2e6),
        (2, "stage0 B mb0", 3e6),
    ]
