"""Drawings of timelines: text, SVG, and what matplotlib makes."""

import collections
import dataclasses
import itertools
import json
import re
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fpipe.plot
from fpipe import schedules
from fpipe.schedules import (
    Action,
    Costs,
    Event,
    Schedule,
    Timeline,
    draw,
    simulate,
    svg,
)
from fpipe.schedules._action import KINDS
from fpipe.schedules._draw.picture import INK, Box, Picture, picture

SPLIT = Schedule(
    [
        [("F", 0, 0), ("F", 0, 1), ("I", 0, 0), ("W", 0, 0), ("I", 0, 1), ("W", 0, 1)],
        [("F", 1, 0), ("I", 1, 0), ("F", 1, 1), ("I", 1, 1), ("W", 1, 0), ("W", 1, 1)],
    ],
    name="split",
)
VIRTUAL = Schedule(
    [
        [
            ("F", 0, 0),
            ("F", 0, 1),
            ("F", 2, 0),
            ("F", 2, 1),
            ("B", 2, 0),
            ("B", 2, 1),
            ("B", 0, 0),
            ("B", 0, 1),
        ],
        [
            ("F", 1, 0),
            ("F", 1, 1),
            ("F", 3, 0),
            ("B", 3, 0),
            ("F", 3, 1),
            ("B", 3, 1),
            ("B", 1, 0),
            ("B", 1, 1),
        ],
    ],
    [0, 1, 0, 1],
    name="virtual",
)
FORWARDS = Schedule(
    [[("F", 0, 0), ("F", 0, 1)], [("F", 1, 0), ("F", 1, 1)]], name="forwards"
)


def measured(timeline, start, scale):
    """The timeline as a clock would tell it that did not start at 0."""
    events = (
        Event(e.device, e.action, start + e.start * scale, start + e.end * scale)
        for e in timeline.events
    )
    return Timeline(tuple(events), timeline.devices, "measured")


TIMELINES = {
    "offloaded": simulate(
        schedules.offload(schedules.zb_v(2, 4), memory=4, costs=Costs(offload=0.7)),
        Costs(offload=0.7),
    ),
    "launched": simulate(schedules.zb_v(2, 4), Costs(launch=0.4)),
    "launched by several": simulate(
        schedules.one_f_one_b(3, 4), Costs(launch=0.7, launchers="per_device")
    ),
    "recomputed": simulate(schedules.early_recompute(schedules.one_f_one_b(3, 4))),
    "1f1b": simulate(schedules.one_f_one_b(3, 4)),
    "split": simulate(SPLIT),
    "virtual": simulate(VIRTUAL),
    "forwards": simulate(FORWARDS),
    "one device": simulate(schedules.gpipe(1, 2)),
    "one event": Timeline((Event(0, Action("F", 0, 0), 7.0, 8.5),), 1, "one"),
    "uneven": simulate(
        schedules.eager_1f1b(3, 5), Costs(F=[1, 2.5, 0.3], B=[2, 5, 1], transfer=0.4)
    ),
    "no time for W": simulate(SPLIT, Costs(W=0.0)),
    "no time at all": simulate(SPLIT, Costs(F=0.0, I=0.0, W=0.0)),
    "little time for W": simulate(SPLIT, Costs(W=1e-9)),
    "measured": measured(simulate(schedules.one_f_one_b(3, 4)), 1234.5, 0.0213),
    "long": simulate(schedules.one_f_one_b(4, 200)),
    "many devices": simulate(schedules.one_f_one_b(64, 70)),
    "idle device": Timeline((Event(1, Action("F", 0, 0), 0.0, 1.0),), 3, "idle"),
}


# Text


@pytest.mark.quick
def test_text_as_drawn():
    assert draw(schedules.one_f_one_b(3, 4)) == textwrap.dedent("""\
        device 0 F0 F1 F2             B0--- F3 B1---    B2---    B3---
        device 1    F0 F1       B0--- F2 B1--- F3 B2---    B3---
        device 2       F0 B0--- F1 B1--- F2 B2--- F3 B3---
        1f1b: makespan 18, bubble 33.3%, peak live microbatches 3, 2, 1""")
    assert draw(SPLIT) == textwrap.dedent("""\
        device 0 F0 F1    I0 W0 I1 W1
        device 1    F0 I0 F1 I1 W0 W1
        split: makespan 7, bubble 14.3%, peak live microbatches 2, 2""")
    assert draw(VIRTUAL, width=60) == textwrap.dedent("""\
        device 0 0F0 0F1 2F0 2F1         2B0----     2B1---- 0B0---…
        device 1     1F0 1F1 3F0 3B0---- 3F1 3B1---- 1B0---- 1B1----
        virtual: makespan 15, bubble 20.0%, peak live microbatches
        4, 3""")


def test_copies_as_drawn():
    costs = Costs(offload=1)
    schedule = schedules.offload(schedules.eager_1f1b(2, 4), memory=2, costs=costs)
    assert draw(simulate(schedule, costs)) == textwrap.dedent("""\
        device 0  F0 F1    F2 B0--- F3       B1--- B2--- B3---
          to host       O1             O3
        from host                         L1       L3
        device 1     F0 B0--- F1 B1--- F2 B2--- F3 B3---
        eager_1f1b, offload: makespan 15, bubble 20.0%, peak live microbatches 2, 1""")


def test_launches_as_drawn():
    schedule = schedules.one_f_one_b(2, 2)
    assert draw(simulate(schedule, Costs(launch=1))) == textwrap.dedent("""\
        device 0     F0- F1-             B0-----     B1-----
        device 1             F0- B0----- F1- B1-----
        host     0F0 0F1 1F0 1B0 0B0 1F1 1B1 0B1
        1f1b: makespan 11, bubble 45.5%, peak live microbatches 2, 1""")
    # A thread waits for those of the other devices, but for no action.
    costs = Costs(launch=0.5, launchers="per_device")
    assert draw(simulate(schedule, costs)).splitlines()[2:4] == [
        "host 0   F0 F1    B0    B1",
        "host 1      F0 B0 F1 B1",
    ]


def test_actions_of_one_program_are_one_bar_with_both_names():
    timeline = simulate(schedules.one_f_one_b(2, 2))
    pairs = [(Action("F", 1, i), Action("B", 1, i)) for i in range(2)]
    fused = dataclasses.replace(timeline, fused=tuple(pairs))
    assert draw(fused).splitlines()[:2] == [
        "device 0 F0 F1       B0---    B1---",
        "device 1       F0+B0--- F1+B1---".replace("      ", "   ", 1),
    ]
    root = ET.fromstring(svg(fused))
    tag = "{http://www.w3.org/2000/svg}"
    titles = [str(title.text) for title in root.iter(f"{tag}title")]
    assert "F of stage 1 and B of stage 1, microbatch 0, device 1: 1 to 4" in titles
    assert len(titles) == len(timeline.events) - 2
    assert "F+B 1" in [label.text for label in root.iter(f"{tag}text")]
    spans = [e for e in json.loads(fused.to_trace())["traceEvents"] if e["ph"] == "X"]
    assert [e["dur"] for e in spans if e["name"] == "stage1 F mb0 + stage1 B mb0"] == [
        3e6
    ]
    # What is known of each action is known as before.
    assert fused.peak_live == timeline.peak_live
    assert fused.bubble == timeline.bubble


def test_measured_times_are_drawn_as_predicted_ones():
    for name in ("1f1b", "split", "virtual", "forwards"):
        there = draw(measured(TIMELINES[name], 1e4, 0.0213)).splitlines()
        assert (
            there[: TIMELINES[name].devices]
            == draw(TIMELINES[name]).splitlines()[: TIMELINES[name].devices]
        )


@pytest.mark.parametrize("name", TIMELINES)
@pytest.mark.parametrize("width", [1, 8, 40, 120, 1000])
def test_no_line_is_wider_than_asked_for(name, width):
    timeline = TIMELINES[name]
    lines = draw(timeline, width=width).splitlines()
    assert max(map(len, lines)) <= width
    rows = len(picture(timeline, "").rows)
    assert len(lines) > rows
    assert "".join("".join(lines[rows:]).split()) == "".join(
        picture(timeline, "").caption.split()
    )


def test_what_is_cut_says_so():
    lines = draw(TIMELINES["long"]).splitlines()[:4]
    assert [line[-1] for line in lines] == ["…"] * 4
    # Also where nothing is left of the line but time in which the device waits.
    late = Timeline(
        (Event(0, Action("F", 0, 0), 0, 1), Event(0, Action("B", 0, 0), 99, 100)), 1
    )
    assert draw(late, width=30).splitlines()[0] == "device 0 F0".ljust(29) + "…"


def test_one_short_event_does_not_stretch_the_rest():
    events = [Event(0, Action("F", 0, i), float(i), i + 1.0) for i in range(9)]
    events[4] = Event(0, Action("F", 0, 4), 4.0, 4.001)
    assert (
        draw(Timeline(tuple(events), 1)).splitlines()[0]
        == "device 0 F0 F1 F2 F3 F  F5 F6 F7 F8"
    )


def test_a_label_that_does_not_fit_is_never_cut_to_another():
    ends = [0.0, 1.0, 2.0, 2.75, 3.75]
    events = [
        Event(0, Action("F", 0, 10 + n), a, b)
        for n, (a, b) in enumerate(itertools.pairwise(ends))
    ]
    assert draw(Timeline(tuple(events), 1)).splitlines()[0] == "device 0 F10 F11 F- F13"


def test_a_very_long_timeline_is_cheap():
    long = Timeline(
        (
            Event(0, Action("F", 0, 0), 0.0, 1e-9),
            Event(0, Action("B", 0, 0), 1e-9, 1e9),
        ),
        1,
    )
    assert len(draw(long).splitlines()[0]) <= 120


ANSI = re.compile(r"\x1b\[([0-9;]*)m")


@pytest.mark.parametrize("name", TIMELINES)
def test_colour_changes_no_character(name):
    for width in (20, 120):
        assert ANSI.sub("", draw(TIMELINES[name], width, colour=True)) == draw(
            TIMELINES[name], width
        )
        assert "\x1b" not in draw(TIMELINES[name], width)


def coloured(text):
    """Each coloured box with its colour."""
    return {
        box: colour
        for colour, box in re.findall(r"\x1b\[([0-9;]+)m([^\x1b]*)\x1b\[0m", text)
    }


def test_a_colour_for_each_kind_and_a_shade_for_the_next_microbatch_or_stage():
    boxes = coloured(draw(SPLIT, colour=True))
    assert set(boxes) == {"F0", "F1", "I0", "I1", "W0", "W1"}
    assert len(set(boxes.values())) == 6
    boxes = coloured(draw(VIRTUAL, colour=True))
    assert boxes["0F0"] == boxes["0F1"] == boxes["1F0"]
    assert boxes["2F0"] == boxes["2F1"] == boxes["3F0"]
    assert len({boxes[b] for b in ("0F0", "2F0", "0B0----", "2B0----")}) == 4


@pytest.mark.parametrize(
    ("terminal", "no_colour", "expected"),
    [
        (True, None, True),
        (True, "", True),
        (True, "1", False),
        (False, None, False),
    ],
)
def test_colour_none_asks_the_terminal(monkeypatch, terminal, no_colour, expected):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_colour is not None:
        monkeypatch.setenv("NO_COLOR", no_colour)
    assert ("\x1b" in draw(SPLIT, colour=None)) == expected


RENDERERS = {"draw": draw, "svg": svg, "plot.draw": fpipe.plot.draw}


@pytest.mark.parametrize("name", RENDERERS)
def test_what_cannot_be_drawn(name):
    with pytest.raises(
        TypeError, match=f"`{name}`: a Schedule or a Timeline can be drawn, not '1f1b'"
    ):
        RENDERERS[name]("1f1b")
    with pytest.raises(
        ValueError, match=f"`{name}`: the timeline 'custom' has no events"
    ):
        RENDERERS[name](Timeline((), 2))


def test_widths_that_make_no_sense():
    with pytest.raises(
        ValueError, match=r"`draw\(width=0\)`: width must be at least 1"
    ):
        draw(SPLIT, width=0)
    with pytest.raises(
        ValueError, match=r"`svg\(width=10\)`: a width must be at least 200"
    ):
        svg(SPLIT, width=10)


# SVG

NS = "{http://www.w3.org/2000/svg}"


def told(timeline):
    """What is said of each box, in which row, and when it is."""
    engines = {"O": " to host", "L": " from host"}
    events = [
        (k, pair, f"device {d}{engines.get(k, '')}", start, end)
        for d, (k, *pair), start, end in timeline.events
    ]
    host = "host {}" if timeline.threads > 1 else "host"
    return events + [
        (f"launch of {e.action.kind}", e.action[1:], host.format(e.thread), *e[2:])
        for e in timeline.launches
    ]


def rows_of(text):
    """The boxes of an SVG by the `y` of their row: x, width, fill, title."""
    rows: dict[float, list] = {}
    for group in ET.fromstring(text).iter(f"{NS}g"):
        for rect in group.iter(f"{NS}rect"):
            title = rect.find(f"{NS}title")
            assert title is not None
            x, y, wide = (float(rect.attrib[k]) for k in ("x", "y", "width"))
            rows.setdefault(y, []).append((x, wide, group.attrib["fill"], title.text))
    return [sorted(rows[y]) for y in sorted(rows)]


@pytest.mark.parametrize("name", TIMELINES)
@pytest.mark.parametrize("width", [200, 960])
def test_svg_has_a_box_for_each_event(name, width):
    timeline = TIMELINES[name]
    text = svg(timeline, width=width)
    root = ET.fromstring(text)
    assert root.attrib["width"] == str(width)
    height = float(root.attrib["height"])
    rows = rows_of(text)
    each = collections.Counter(row for _, _, row, *_ in told(timeline))
    assert sorted(map(len, rows)) == sorted(each.values())
    start = timeline.start
    titles = sorted(title for row in rows for *_, title in row)
    assert titles == sorted(
        f"{what} of stage {s}, microbatch {i}, {row}: {a - start:g} to {b - start:g}"
        for what, (s, i), row, a, b in told(timeline)
    )
    for rect in root.iter(f"{NS}rect"):
        x, y = float(rect.get("x", 0)), float(rect.get("y", 0))
        assert x >= 0
        assert x + float(rect.attrib["width"]) <= width + 0.6
        assert y + float(rect.attrib["height"]) <= height
        assert float(rect.attrib["width"]) > 0
    if timeline.makespan:
        for row in rows:
            assert all(a[0] + a[1] <= b[0] + 0.6 for a, b in itertools.pairwise(row))


def test_svg_is_to_scale():
    (first, *_), second = rows_of(svg(FORWARDS))[0], rows_of(svg(FORWARDS))[1]
    unit = second[1][0] - second[0][0]
    assert second[0][0] - first[0] == pytest.approx(unit, abs=0.02)
    assert first[1] == pytest.approx(unit - 1, abs=0.02)


def test_svg_shows_words():
    root = ET.fromstring(svg(SPLIT))
    words = [t.text for t in root.iter(f"{NS}text")]
    assert words[0] == "split: makespan 7, bubble 14.3%, peak live microbatches 2, 2"
    assert words[1:3] == ["device 0", "device 1"]
    assert words[3:15] == [str(e.action.microbatch) for e in simulate(SPLIT).events]
    assert words[15:23] == list("01234567")
    assert words[23:] == ["forward (F)", "input gradient (I)", "weight gradient (W)"]
    assert root.attrib["aria-label"] == words[0]
    assert [t.text for t in ET.fromstring(svg(VIRTUAL)).iter(f"{NS}text")][
        -1
    ] == "lighter: later stages of the device"


def test_svg_leaves_out_labels_that_do_not_fit():
    groups = list(ET.fromstring(svg(simulate(schedules.gpipe(1, 1000)))).iter(f"{NS}g"))
    assert len(list(groups[0])) == 1000
    assert list(groups[-1]) == []


def test_svg_can_stand_beside_others():
    for timeline in TIMELINES.values():
        tags = {
            element.tag.removeprefix(NS)
            for element in ET.fromstring(svg(timeline)).iter()
        }
        assert tags <= {"svg", "g", "rect", "text", "title", "path"}
        assert not re.search(r"""\s(id|class|style|on\w+|href)=|<!""", svg(timeline))


@settings(max_examples=60)
@given(st.text())
@pytest.mark.parametrize("name", ['<b>&"quoted"</b>', "\x00\x1b[31m\ud800\ufffe"])
def test_svg_escapes_names(name, more):
    root = ET.fromstring(svg(Timeline(TIMELINES["one event"].events, 1, name + more)))
    assert {element.tag for element in root.iter()} == {
        f"{NS}{t}" for t in ("svg", "g", "rect", "text", "title", "path")
    }
    if not more:
        assert name.startswith("\x00") or root.attrib["aria-label"].startswith(name)


# In notebooks


class Page(HTMLParser):
    """The tags and the text of HTML, which closes what it opens."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = set(), [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text += data


@pytest.mark.quick
def test_a_notebook_shows_what_svg_draws():
    assert SPLIT._repr_html_() == svg(SPLIT)
    assert TIMELINES["uneven"]._repr_html_() == svg(TIMELINES["uneven"])
    assert schedules.html(SPLIT) == svg(SPLIT)


@pytest.mark.parametrize(
    "what",
    [
        TIMELINES["long"],
        TIMELINES["many devices"],
        schedules.gpipe(3, 400),
        Timeline(TIMELINES["one event"].events, 1, "<b>&" * 10_000),
        schedules.one_f_one_b(9, 55),
    ],
)
def test_what_a_notebook_shows_of_something_large_is_small(what):
    shown = what._repr_html_()
    assert len(shown.encode()) < 200_000
    page = Page(shown)
    assert page.tags in ({"pre"}, {"svg", "g", "rect", "text", "title", "path"})
    if page.tags == {"pre"}:
        first, *_ = draw(what).splitlines()
        assert page.text.splitlines()[0] == first
    assert page.text.count("\ndevice ") < 32
    assert ("and 32 more devices" in page.text) == (what.devices == 64)


def test_a_recording_is_shown_before_its_block_ends():
    shown = schedules.Recording((), 2, "<i>")._repr_html_()
    assert Page(shown).text.startswith("Recording(events=(), devices=2, name='<i>'")
    with pytest.raises(ValueError, match="has no events"):
        schedules.html(schedules.Recording((), 2))
    with pytest.raises(TypeError, match="a Schedule or a Timeline can be drawn"):
        schedules.html("1f1b")  # type: ignore[arg-type]


def test_a_simulated_timeline_in_numbers():
    timeline = TIMELINES["1f1b"]
    found = timeline.metrics()
    assert found == {"step": 18.0, "bubble": timeline.bubble, "peak_live": 3}
    assert json.loads(json.dumps(found)) == found
    with pytest.raises(ValueError, match="`metrics`: the timeline 'x' has no events"):
        Timeline((), 2, "x").metrics()


# What all drawings share


def brightness(colour):
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    r, g, b = (
        p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
    )
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
def test_dark_text_on_every_box_is_readable(chunks):
    shown = Picture((), (), 1.0, chunks, KINDS, "")
    fills = [shown.fill(kind, chunk) for kind in KINDS for chunk in range(chunks)]
    assert len(set(fills)) == len(fills)
    for fill in fills:
        assert (brightness(fill) + 0.05) / (
            brightness(INK) + 0.05
        ) >= 4.5  # the norm of the web for text
    for kind in KINDS:
        shades = [brightness(shown.fill(kind, chunk)) for chunk in range(chunks)]
        assert shades == sorted(shades)


@given(st.floats(1e-9, 1e9), st.integers(1, 20))
def test_ticks_are_few_and_round(span, most):
    ticks = Picture((), (), span, 1, ("F",), "").ticks(most)
    assert ticks[0] == 0
    assert span / 10 <= ticks[-1] * (1 + 1e-9) or most < 3
    assert ticks[-1] <= span * (1 + 1e-9)
    assert len(ticks) <= most + 2
    if len(ticks) > 1:
        assert f"{ticks[1]:e}"[0] in "1259"  # 9.99…


def test_chunks_are_counted_on_each_device():
    boxes = picture(VIRTUAL, "").boxes
    assert {(b.stage, b.chunk) for b in boxes} == {(0, 0), (1, 0), (2, 1), (3, 1)}
    assert isinstance(boxes[0], Box)


# matplotlib


@pytest.mark.parametrize("name", TIMELINES)
def test_axes_have_a_box_for_each_event(name):
    timeline = TIMELINES[name]
    ax = fpipe.plot.draw(timeline)
    rows = len(picture(timeline, "").rows)
    boxes = [path for c in ax.collections[rows:] for path in c.get_paths()]
    assert len(boxes) == len(timeline.events) + len(timeline.launches)
    start = timeline.start
    edges = sorted(
        (round(p.get_extents().x0, 6), round(p.get_extents().x1, 6)) for p in boxes
    )
    assert edges == sorted(
        (round(a - start, 6), round(b - start, 6)) for *_, a, b in told(timeline)
    )
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        *(f"device {d}" for d in range(timeline.devices)),
        *sorted({row for _, _, row, *_ in told(timeline) if row.startswith("host")}),
    ]
    assert ax.get_title(loc="left").replace("\n", " ") == picture(timeline, "").caption
    bottom, top = ax.get_ylim()
    assert bottom > top  # device 0 is above


def test_drawing_on_given_axes():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    ax, other = figure.subplots(2)
    assert fpipe.plot.draw(SPLIT, ax) is ax
    assert fpipe.plot.draw(VIRTUAL, ax=other).get_figure() is figure
    assert len(other.collections) > len(ax.collections) - 4


def test_a_name_is_no_formula(tmp_path):
    fpipe.plot.save(
        Timeline(TIMELINES["one event"].events, 1, "$\\frac{$ & <"), tmp_path / "a.png"
    )


HEADS = {
    ".svg": b"<svg xmlns=",
    ".png": b"\x89PNG",
    ".pdf": b"%PDF",
    ".PNG": b"\x89PNG",
}


@pytest.mark.parametrize("suffix", HEADS)
def test_files(tmp_path, suffix):
    path = tmp_path / f"drawn{suffix}"
    fpipe.plot.save(SPLIT, path)
    assert path.read_bytes().startswith(HEADS[suffix])
    again = tmp_path / f"again{suffix}"
    fpipe.plot.save(simulate(SPLIT), str(again))
    assert path.read_bytes() == again.read_bytes()
    assert b"Date" not in path.read_bytes()


@pytest.mark.parametrize("name", ["drawn", "drawn.jpg", "drawn.csv", ".svg"])
def test_other_files_are_refused(tmp_path, name):
    with pytest.raises(
        ValueError, match=r"drawn|svg.* ends in none of \.svg, \.png, \.pdf"
    ):
        fpipe.plot.save(SPLIT, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_no_pyplot_and_no_window(tmp_path):
    code = (
        "import sys, fpipe.plot\n"
        "from fpipe import schedules\n"
        f"fpipe.plot.save(schedules.gpipe(1, 1), r'{tmp_path / 'a.png'}')\n"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in "
        "sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib(monkeypatch, tmp_path):
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.split(".")[0] == "matplotlib":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    fpipe.plot.save(SPLIT, tmp_path / "a.svg")
    with pytest.raises(ImportError, match=r'pip install "fpipe\[plot\]"'):
        fpipe.plot.save(SPLIT, tmp_path / "a.png")
    with pytest.raises(ImportError, match=r'pip install "fpipe\[plot\]"'):
        fpipe.plot.draw(SPLIT)


def test_what_is_to_fit_is_whole_and_not_cut():
    """Uneven stages are as long as their labels ask for otherwise."""
    timeline = fpipe.schedules.simulate(
        fpipe.schedules.one_f_one_b(devices=2, microbatches=12),
        fpipe.schedules.Costs(F=[1, 30], B=[2, 60]),
    )
    cut, whole = (
        fpipe.schedules.draw(timeline, width=100, fit=fit).splitlines()
        for fit in (False, True)
    )
    assert any(line.endswith("…") for line in cut)
    assert not any("…" in line for line in whole)
    assert 95 < max(map(len, whole[:2])) <= 100
    # The last backward of the first device stands at the very end.
    assert whole[0].rstrip()[-1] in "B-"
    short = fpipe.schedules.gpipe(devices=2, microbatches=2)
    assert fpipe.schedules.draw(short, fit=True) == fpipe.schedules.draw(short)
