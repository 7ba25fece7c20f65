"""The drawing of a cut function: its parts, and that none hides another. Nothing is
compiled.
"""

import functools
import itertools
import re
from xml.etree import ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fpipe
from fpipe._split.cut_graph import (
    BorrowedParameter,
    CrossingValue,
    CutGraph,
    GivenInput,
    PieceNode,
    Reason,
    Value,
)
from fpipe._split.drawing import WIDTH, Way, drawing, width_of
from fpipe._split.svg import svg
from tests.split.models import EXAMPLES, batch_norm

SVG = "{http://www.w3.org/2000/svg}"


@functools.cache
def graph_of(name):
    example = batch_norm if name == "batch_norm" else EXAMPLES[name]
    return example().split()._graph


def crossing(name, source, readers, reason=Reason.LATER, count=32):
    value = Value(name, "float32[8]", count, "model.py:1")
    return CrossingValue(value, source, readers, reason)


X = GivenInput("x", 64, (0,))


def made(pieces, *values, borrowed=(), given=(X,)):
    nodes = tuple(
        PieceNode(f"h/{k}", (f"h/{k}/w",), (), (), 10.0 + k, 20.0 + k, 0)
        for k in range(pieces)
    )
    return CutGraph("model", nodes, values, (), borrowed, given)


def random_graph(pieces, skips, seed):
    """Boundaries, and skips between any pieces."""
    draw = np.random.default_rng(seed)
    found = [
        crossing("h", k, (k + 1,), Reason.NEXT, count=10**6 // 3)
        for k in range(pieces - 1)
    ]
    for n in range(skips):
        source = int(draw.integers(pieces - 1))
        count = int(draw.integers(1, 3))
        readers = draw.integers(source + 1, pieces, size=count)
        reason = Reason.KEY if n % 3 == 0 else Reason.LATER
        to = tuple(sorted(set(map(int, readers))))
        found.append(crossing(f"value {n}", source, to, reason, 10 ** int(n % 7)))
    return made(pieces, *found, given=(GivenInput("side", 9, (pieces - 1,)),))


MODELS = (*EXAMPLES, "batch_norm")
GRAPHS = {
    **{name: functools.partial(graph_of, name) for name in MODELS},
    "one piece": functools.partial(made, 1),
    **{
        f"{pieces} pieces, seed {seed}": functools.partial(
            random_graph, pieces, 20, seed
        )
        for pieces, seed in itertools.product((4, 8, 12), range(3))
    },
}


def ways_of(graph):
    """How things go to pieces, counted apart from the drawing: boundaries and arcs."""
    near = {c.source for c in graph.crossing if c.reason is Reason.NEXT}
    far = {
        (c.reason is Reason.KEY, c.source, c.readers)
        for c in graph.crossing
        if c.reason is not Reason.NEXT
    }
    lent = {(b.owner, b.readers) for b in graph.borrowed}
    given = {g.readers for g in graph.given if g.readers != (0,)}
    return len(near), len(far) + len(lent) + len(given)


def words_of(shown):
    """The labels of the arcs."""
    return [arc.label and arc.label.words for arc in shown.arcs]


@pytest.mark.quick
@pytest.mark.parametrize("name", GRAPHS)
def test_a_box_for_each_piece_and_an_arc_for_each_crossing(name):
    graph = GRAPHS[name]()
    page = ET.fromstring(svg(graph))
    assert float(page.attrib["width"]) <= WIDTH
    found = {
        kind: page.findall(f"{SVG}g[@class='{kind}']")
        for kind in ("piece", "boundary", "arc")
    }
    near, far = ways_of(graph)
    pieces = len(graph.pieces)
    assert len(found["piece"]) == pieces
    # One to each piece, and what comes out.
    assert len(found["boundary"]) == pieces + 1
    assert len(found["arc"]) == far
    titles = [str(g.findtext(f"{SVG}title")) for g in found["boundary"]]
    assert sum("boundary:" in title for title in titles) == near
    # A head for each piece that reads it.
    heads = [len(re.findall("z", g[-1].attrib["d"])) for g in found["arc"]]
    ends = [len(arc.ends) for arc in drawing(graph).arcs]
    assert sorted(heads) == sorted(ends)
    # Each piece, and each value, is told of.
    words = {text.text for text in page.iter(f"{SVG}text")}
    assert {str(k) for k in range(pieces)} <= words
    told = " ".join(str(title.text) for title in page.iter(f"{SVG}title"))
    for c in graph.crossing:
        assert c.value.name in told
    for lent in graph.borrowed:
        assert lent.path in told
    # One size of text.
    assert svg(graph).count("font-size") == 1


@pytest.mark.parametrize("name", GRAPHS)
def test_nothing_hides_another(name):
    shown = drawing(GRAPHS[name]())
    for left, right in itertools.pairwise(shown.boxes):
        assert left.x + left.width < right.x
    labels = [p.label for p in (*shown.arrows, *shown.arcs) if p.label is not None]
    for one, other in itertools.combinations([*labels, *shown.names], 2):
        on_a_line = abs(one.y - other.y) < 12
        assert not on_a_line or one.right <= other.left or other.right <= one.left
    for label in labels:
        assert label.left >= 0
        assert label.right <= shown.width
        for arc in shown.arcs:
            for x in (arc.start, *arc.ends):
                passes = arc.y < label.y - 1 <= arc.foot
                outside = arc.outside and x == arc.start
                assert outside or not passes or not label.left < x < label.right
    # No two lines of a lane overlap, and a longer arc runs above a shorter one.
    for one, other in itertools.combinations(shown.arcs, 2):
        apart = one.ends[-1] < other.start or other.ends[-1] < one.start
        assert apart or one.y != other.y
        inside = one.start < other.start and other.ends[-1] < one.ends[-1]
        assert not inside or one.y < other.y


@pytest.mark.parametrize("name", GRAPHS)
def test_each_arc_says_its_bytes_there_or_below(name):
    shown = drawing(GRAPHS[name]())
    silent = [arc.title for arc in shown.arcs if arc.label is None]
    assert list(shown.notes) == silent
    page = ET.fromstring(svg(GRAPHS[name]()))
    words = [text.text for text in page.iter(f"{SVG}text")]
    assert set(silent) <= set(words)
    # Of a tangle of random skips most have a label; of the models each.
    assert len(silent) < (1 if name in MODELS else len(shown.arcs) / 2 + 1)


def test_a_u_net_is_drawn_as_one():
    levels = [crossing(f"skip {n}", n, (4 - n,)) for n in range(2)]
    near = [crossing("h", k, (k + 1,), Reason.NEXT) for k in range(4)]
    shown = drawing(made(5, *near, *levels))
    outer, inner = shown.arcs
    assert outer.y < inner.y < shown.boxes[0].y
    assert words_of(shown) == ["skip 0 32 B", "skip 1 32 B"]
    assert [arrow.way for arrow in shown.arrows] == [Way.GIVEN] + [Way.BOUNDARY] * 5
    assert shown.boxes[4].filled == 1.0
    assert shown.boxes[0].filled == pytest.approx(20 / 24)
    assert shown.boxes[1].lines == ("1", "h/1")
    assert shown.rows[1] == ("1", "h/1", "11 FLOP", "19.1%", "h/1/w")
    assert shown.caption == "model: 5 pieces, 192 B go between them"


def test_what_goes_the_same_way_is_one_arc():
    keys = [crossing("wrap", 0, (2,), Reason.KEY) for _ in range(2)]
    lent = BorrowedParameter("embed", 60, 0, (2,))
    shown = drawing(made(3, *keys, borrowed=(lent,)))
    assert words_of(shown) == ["2 keys 64 B", "embed 60 B"]
    assert shown.arcs[0].title == "key: wrap, wrap, 64 B, from piece 0 to 2"
    assert shown.arcs[1].title == "borrowed parameters: embed, 60 B, from piece 0 to 2"
    many = [crossing(f"v{n}", 0, (2,)) for n in range(20)]
    shown = drawing(made(3, *many))
    assert words_of(shown) == ["20 arrays 640 B"]
    assert "v7 and 12 more" in shown.arcs[0].title


def test_what_a_call_gives():
    graph = graph_of("two_inputs")
    assert [(g.name, g.readers) for g in graph.given] == [
        ("x", (0,)),
        ("x[1]", (1,)),
        ("side['scale']", (0, 1)),
    ]
    assert graph_of("gpt").borrowed == (BorrowedParameter("embed", 60, 0, (3,)),)


def test_a_stacked_parameter_is_borrowed_by_rows():
    def tied(params, x):
        for w in params["w"]:
            x = jnp.tanh(x @ w)
        return x @ params["w"][0]

    params = {"w": jnp.ones((2, 3, 3))}
    split = fpipe.split(tied, params, jnp.ones((2, 3)), cuts=["w/1"])
    (lent,) = split._graph.borrowed
    assert lent == BorrowedParameter("w[0]", 36, 0, (1,))


def test_a_name_may_have_any_letters_and_length():
    split = fpipe.split(lambda p, x: x @ p, jnp.eye(3), jnp.ones((2, 3)))
    ET.fromstring(split.to_svg())
    assert "&lt;lambda&gt;: 1 piece" in split.to_svg()
    graph = made(2, crossing("v" * 300, 0, (1,)))
    assert words_of(drawing(graph)) == ["32 B"]
    assert width_of("four") < 40


def test_in_a_notebook_with_the_tables():
    split = EXAMPLES["u_net"]().split()
    page = split._repr_html_()
    assert page.startswith(split.to_svg())
    assert page.count("<table>") == 3

    def chain(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    shapes = [jax.ShapeDtypeStruct((3, 3), jnp.float32)] * 30
    x = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    long = fpipe.split(chain, shapes, x, stages=25)
    assert "<svg" not in long._repr_html_()
    assert long.to_svg().count('class="piece"') == 25
