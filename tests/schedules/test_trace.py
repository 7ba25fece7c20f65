"""Spans of time as events of a trace."""

import json

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
