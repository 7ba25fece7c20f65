"""Microbatches: how inputs of every kind are cut, sent through stages, and put together
again.
"""

import dataclasses
import functools
import random
import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Array, Float

import fpipe.testing
from fpipe._model.microbatch import cut_inputs, pieces
from tests.helpers import assert_same, mse, raises, shaped
from tests.model.test_needs import every

# What a type checker would refuse is tested here.
untyped: Any = lambda value: value  # noqa: E731
both = pytest.mark.parametrize("make", [fpipe.sequential, fpipe.Pipe])


def rows(n, width=2, start=1.0):
    return jnp.arange(start, start + n * width).reshape(n, width) / 8


def scale(params, x):
    return x * params


same = fpipe.fn(lambda x: x, name="same")


def cut_by_hand(array, chunks):
    """The pieces of an array, with numpy's own arithmetic."""
    size = int(np.ceil(array.shape[0] / chunks))
    return [array[start : start + size] for start in range(0, array.shape[0], size)]


# --- the rule ---


RULE = [
    (10, 4, (3, 3, 3, 1)),
    (2, 4, (1, 1)),
    (8, 4, (2, 2, 2, 2)),
    (9, 4, (3, 3, 3)),
    (5, 4, (2, 2, 1)),
    (1, 1, (1,)),
    (1, 100, (1,)),
    (7, 1, (7,)),
    (4, 3, (2, 2)),
]


@pytest.mark.quick
@pytest.mark.parametrize(("n", "chunks", "expected"), RULE)
def test_the_pieces_are_those_of_the_design(n, chunks, expected):
    assert pieces(n, chunks) == expected


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 3000), st.integers(1, 400))
def test_pieces_sum_up_are_of_ceil_size_and_number_at_most_chunks(n, chunks):
    sizes = pieces(n, chunks)
    size = int(np.ceil(n / chunks))
    assert sum(sizes) == n
    assert set(sizes[:-1]) <= {size}
    assert 1 <= sizes[-1] <= size
    assert len(sizes) <= chunks
    assert [len(piece) for piece in cut_by_hand(np.zeros(n), chunks)] == list(sizes)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=3),
    st.integers(1, 6),
)
def test_the_pieces_of_a_pytree_put_together_are_the_pytree(shapes, chunks):
    x = [
        np.arange(n * 2.0**k).reshape(n, *(2,) * k).astype(np.float32)
        for n, k in shapes
    ]
    unequal = [k for k, (n, _) in enumerate(shapes) if n != shapes[0][0]]
    if unequal:
        with pytest.raises(ValueError, match=rf"^`x\[{unequal[0]}\]` of shape .* has"):
            cut_inputs({"x": x}, chunks)
        return
    cut = cut_inputs({"x": x}, chunks)
    parts = [cut.piece("x", i, x) for i in range(cut.m)]
    assert cut.rows == pieces(shapes[0][0], chunks)
    for k, leaf in enumerate(x):
        np.testing.assert_array_equal(np.concatenate([part[k] for part in parts]), leaf)
        for part, piece in zip(parts, cut_by_hand(leaf, chunks), strict=True):
            np.testing.assert_array_equal(part[k], piece)


@pytest.mark.quick(cases=2)
@both
@pytest.mark.parametrize(("n", "chunks", "expected"), RULE[:3])
def test_a_loss_sees_each_piece_and_weighs_it_by_its_rows(make, n, chunks, expected):
    def loss(y, t):
        return (y * t).sum() ** 2, (jnp.float32(y.shape[0]), y[0], t[-1])

    pipe, x, t = make([scale, same], chunks=chunks), rows(n), rows(n, start=3.0)
    params, p = pipe.place((jnp.float32(2), ())), jnp.float32(2)
    got = pipe.value_and_grad(loss, has_aux=True, argnums=(0, 1, 2))(params, x, t)

    def by_hand(p, x, t):
        parts = zip(cut_by_hand(x, chunks), cut_by_hand(t, chunks), strict=True)
        made = [
            (len(x) / n * ((x * p) * t).sum() ** 2, (x.shape[0], (x * p)[0], t[-1]))
            for x, t in parts
        ]
        return sum(value for value, _ in made), [aux for _, aux in made]

    (want, aux), (wp, wx, wt) = jax.value_and_grad(
        by_hand, argnums=(0, 1, 2), has_aux=True
    )(p, x, t)
    first, second, third = (
        jnp.stack([jnp.float32(a[k]) for a in aux]) for k in range(3)
    )
    assert first.tolist() == list(expected)
    assert_same(got, ((want, (first, second, third)), ((wp, ()), wx, wt)))


@both
@pytest.mark.parametrize(
    ("chunks", "kind", "text"),
    [
        (0, ValueError, "(chunks=0)`: chunks must be at least 1"),
        (-3, ValueError, "(chunks=-3)`: chunks must be at least 1"),
        (2.0, TypeError, "(chunks=2.0)`: chunks must be an int"),
        (True, TypeError, "(chunks=True)`: chunks must be an int"),
        ("2", TypeError, "(chunks='2')`: chunks must be an int"),
    ],
)
def test_chunks_that_are_no_positive_int_are_refused(make, chunks, kind, text):
    with raises(kind, f"`{make.__name__}{text}"):
        make([same], chunks=untyped(chunks))


# --- NoChunk ---


@both
def test_a_whole_pytree_goes_to_every_microbatch_and_its_gradient_is_the_sum(make):
    def apply(p, x):
        assert set(x) == {"rows", "whole", "note"}
        assert set(x["whole"]) == {"t", "w", "tag", "none"}
        assert x["whole"]["tag"] == "a"
        assert x["whole"]["w"].shape == (2, 3)
        return jnp.sin(x["rows"] @ x["whole"]["w"] * p) / x["whole"]["t"]

    whole = {"t": jnp.float32(0.7), "w": rows(2, 3), "tag": "a", "none": None}
    x = {"rows": rows(5), "whole": fpipe.NoChunk(whole), "note": 3}
    target, offset = rows(5, 3, start=2.0), jnp.float32(0.25)

    def loss(y, t, offset):
        return ((y - t) ** 2).sum() + y.shape[0] * offset**2

    pipe = make([apply, scale], chunks=3)
    params = pipe.place((jnp.float32(0.5), jnp.full(3, 1.5)))
    grad = pipe.value_and_grad(loss, reduction="sum", argnums=(0, 1, 2, 3))
    value, (gp, gx, gt, go) = grad(params, x, target, fpipe.NoChunk(offset))

    def by_hand(p, q, v, t, w, target, offset):
        total = jnp.float32(0)
        for v_i, target_i in zip(
            cut_by_hand(v, 3), cut_by_hand(target, 3), strict=True
        ):
            total += loss(jnp.sin(v_i @ w * p) / t * q, target_i, offset)
        return total

    arguments = (
        jnp.float32(0.5),
        jnp.full(3, 1.5),
        x["rows"],
        whole["t"],
        whole["w"],
        target,
        offset,
    )
    want, (wp, wq, wv, wt, ww, wtarget, woffset) = jax.value_and_grad(
        by_hand, argnums=range(7)
    )(*arguments)
    whole = fpipe.NoChunk({"t": wt, "w": ww, "tag": None, "none": None})
    assert_same((value, gp, gt, go), (want, (wp, wq), wtarget, fpipe.NoChunk(woffset)))
    assert_same(gx, {"rows": wv, "whole": whole, "note": None})


@both
def test_a_gradient_outside_sums_what_goes_whole_too(make):
    layers = [
        fpipe.fn(lambda x: x["v"] * x["w"]),
        fpipe.fn(lambda x, *, side: x * side),
    ]
    pipe, v = make(layers, chunks=3), rows(5)

    def run(v, w, side):
        return (
            pipe(((), ()), {"v": v, "w": fpipe.NoChunk(w)}, side=fpipe.NoChunk(side))
            ** 2
        ).sum()

    def by_hand(v, w, side):
        return ((v * w * side) ** 2).sum()

    arguments = (v, jnp.array([0.5, 2.0]), jnp.float32(3))
    want = jax.value_and_grad(by_hand, argnums=(0, 1, 2))(*arguments)
    assert_same(jax.value_and_grad(run, argnums=(0, 1, 2))(*arguments), want)


@both
def test_what_is_whole_alone_makes_one_microbatch_and_targets_may_make_more(make):
    pipe, x = make([scale], chunks=4), fpipe.NoChunk(rows(3))
    params = pipe.place((jnp.float32(2),))
    assert_same(pipe(params, x), 2 * rows(3))
    target = jnp.array([1.0, 2.0, 6.0])
    loss, grads = pipe.value_and_grad(lambda y, t: y.sum() * t.mean())(
        params, x, target
    )
    assert_same((loss, grads), (6 * rows(3).sum(), (3 * rows(3).sum(),)))


def test_no_chunk_is_a_pytree():
    whole = fpipe.NoChunk({"a": rows(2), "b": None})
    doubled = jax.tree.map(lambda a: 2 * a, whole)
    assert type(doubled) is fpipe.NoChunk
    assert_same(doubled.value, {"a": 2 * rows(2), "b": None})


# --- what cannot be cut ---


ONE_SAYS = "one of the two says how it is cut"
SCALAR = (
    "is a 0-d array and cannot be cut into microbatches; wrap it in fpipe.NoChunk to "
    "send it whole to every microbatch"
)
NO_ARRAY = (
    "`pipe(params, x)`: x has no array; a pipeline needs at least one array to cut "
    "into microbatches"
)
Z, V, W = jnp.float32(1), rows(4), rows(3)
FIX = (
    "the rows of all arrays are cut together, so give both equally many, or wrap one "
    "in fpipe.NoChunk(…), if it goes whole to every microbatch, or in "
    "fpipe.Chunk(…, axis=…), if its rows are on another axis"
)
# x, side, targets, what is raised
REFUSED = {
    "0-d": ({"a": V, "b": Z}, None, (), ValueError, f"`x['b']` {SCALAR}"),
    "0-d alone": (Z, None, (), ValueError, f"`x` {SCALAR}"),
    "0-d of numpy": ([V, np.float32(1)], None, (), ValueError, f"`x[1]` {SCALAR}"),
    "0-d side": (V, {"t": Z}, (), ValueError, f"`side['t']` {SCALAR}"),
    "0-d target": (V, None, (V, Z), ValueError, f"`targets[1]` {SCALAR}"),
    "0-d side of what is whole": (
        fpipe.NoChunk(V),
        Z,
        (),
        ValueError,
        f"`side` {SCALAR}",
    ),
    "no rows": (
        {"a": V[:0]},
        None,
        (),
        ValueError,
        "`x['a']` has no rows: its shape is (0, 2)",
    ),
    "no rows in side": (
        V,
        [V, V[:0]],
        (),
        ValueError,
        "`side[1]` has no rows: its shape is (0, 2)",
    ),
    "no rows in targets": (
        V,
        None,
        (V[:0],),
        ValueError,
        "`targets[0]` has no rows: its shape is (0, 2)",
    ),
    "None": (None, None, (), TypeError, NO_ARRAY),
    "no array": ({"a": 3, "b": None, "c": 1.5}, V, (V,), TypeError, NO_ARRAY),
    "whole without array": (fpipe.NoChunk(3), None, (), TypeError, NO_ARRAY),
    "unequal in x": (
        {"a": V, "b": [W]},
        None,
        (),
        ValueError,
        "`x['b'][0]` of shape (3, 2) has 3 rows, but `x['a']` of shape (4, 2) has 4: "
        f"{FIX}",
    ),
    "unequal side": (
        V,
        {"mask": rows(9)},
        (),
        ValueError,
        "`side['mask']` of shape (9, 2) has 9 rows, but `x` of shape (4, 2) has 4: "
        f"{FIX}",
    ),
    "list of microbatches": (
        [V, W],
        None,
        (),
        ValueError,
        f"`x[1]` of shape (3, 2) has 3 rows, but `x[0]` of shape (4, 2) has 4: {FIX}; "
        "if `x` is a list of ready-made microbatches, pass `fpipe.Microbatches(x)`",
    ),
    "as many pieces": (
        rows(8),
        {"mask": rows(7)},
        (),
        ValueError,
        "`side['mask']` of shape (7, 2) has 7 rows, but `x` of shape (8, 2) has 8: "
        f"{FIX}",
    ),
    "as many pieces of a target": (
        rows(8, 1),
        None,
        (rows(7, 1),),
        ValueError,
        "`targets[0]` of shape (7, 1) has 7 rows, but `x` of shape (8, 1) has 8: "
        f"{FIX}",
    ),
    "half as many targets": (
        rows(8, 3),
        None,
        (V,),
        ValueError,
        "`targets[0]` of shape (4, 2) has 4 rows, but `x` of shape (8, 3) has 8: "
        f"{FIX}; rows in groups of 2 are reshaped, `x.reshape(4, 2, 3)`",
    ),
    "targets in groups": (
        V,
        None,
        (rows(12)[:, 0],),
        ValueError,
        "`targets[0]` of shape (12,) has 12 rows, but `x` of shape (4, 2) has 4: "
        f"{FIX}; rows in groups of 3 are reshaped, `targets[0].reshape(4, 3)`",
    ),
    "positions": (
        rows(8, 5),
        {"ids": jnp.zeros((3, 8, 5), jnp.int32)},
        (),
        ValueError,
        "`side['ids']` of shape (3, 8, 5) has 3 rows, but `x` of shape (8, 5) has 8: "
        f"{FIX}; `fpipe.Chunk(side['ids'], axis=1)` has 8",
    ),
    "sequence first": (
        jnp.zeros((4, 8, 3)),
        None,
        (rows(8),),
        ValueError,
        "`targets[0]` of shape (8, 2) has 8 rows, but `x` of shape (4, 8, 3) has 4: "
        f"{FIX}; `fpipe.Chunk(x, axis=1)` has 8",
    ),
    "one row": (
        V,
        V[:1],
        (),
        ValueError,
        f"`side` of shape (1, 2) has 1 row, but `x` of shape (4, 2) has 4: {FIX}",
    ),
    "0-d in a Chunk": (
        fpipe.Chunk({"a": V, "b": Z}, 1),
        None,
        (),
        ValueError,
        f"`x['b']` {SCALAR}",
    ),
    "no such axis": (
        V,
        [fpipe.Chunk({"a": V}, axis=2)],
        (),
        ValueError,
        "`side[0]['a']` in `fpipe.Chunk(…, axis=2)` has the shape (4, 2): its axes are "
        "0 to 1",
    ),
    "no such negative axis": (
        fpipe.Chunk(V[:, 0], axis=-2),
        None,
        (),
        ValueError,
        "`x` in `fpipe.Chunk(…, axis=-2)` has the shape (4,): its axes are 0 alone",
    ),
    "no rows on an axis": (
        V,
        fpipe.Chunk(V[:, :0], axis=1),
        (),
        ValueError,
        "`side` has no rows on axis 1: its shape is (4, 0)",
    ),
    "unequal on an axis": (
        V,
        {"ids": fpipe.Chunk(jnp.zeros((3, 5, 4)), axis=1)},
        (),
        ValueError,
        "`side['ids']` of shape (3, 5, 4) has 5 rows, but `x` of shape (4, 2) has 4: "
        f"{FIX}",
    ),
    "one in the other": (
        {"a": fpipe.NoChunk([V, fpipe.Chunk(V, 1)])},
        None,
        (),
        ValueError,
        f"`x['a'][1]`: an fpipe.Chunk inside of an fpipe.NoChunk; {ONE_SAYS}",
    ),
    "unequal target": (
        (fpipe.NoChunk(V), W),
        W,
        (W, {"t": V[:, 0]}),
        ValueError,
        "`targets[1]['t']` of shape (4,) has 4 rows, but `x[1]` of shape (3, 2) has 3: "
        f"{FIX}",
    ),
}


@both
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_is_refused_with_its_name(make, case):
    x, side, targets, kind, text = REFUSED[case]
    pipe = make([fpipe.fn(lambda x, *, side: x), same], chunks=4)
    with raises(kind, text):
        pipe.value_and_grad(lambda y, *t: 1.0)(((), ()), x, *targets, side=side)
    if not targets:
        with raises(kind, text):
            pipe(((), ()), x, side=side)
        with raises(kind, text):
            pipe.init(jax.random.key(0), x, side=side)


@pytest.mark.parametrize("axis", [True, 1.0, "1", None])
def test_the_axis_of_a_chunk_is_an_int(axis):
    text = f"`fpipe.Chunk(…, axis={axis!r})`: axis must be an int, such as 1"
    with raises(TypeError, text):
        fpipe.Chunk(V, axis=untyped(axis))


def test_a_chunk_is_a_pytree():
    chunk = fpipe.Chunk({"a": rows(2), "b": None}, axis=untyped(np.int64(-1)))
    doubled = jax.jit(lambda c: jax.tree.map(lambda a: 2 * a, c))(chunk)
    assert type(doubled) is fpipe.Chunk
    assert type(doubled.axis) is int
    assert doubled.axis == -1
    assert_same(doubled.value, {"a": 2 * rows(2), "b": None})


# --- rows on other axes ---


EXECUTORS = {
    "sequential": fpipe.sequential,
    "placed": lambda layers, chunks: fpipe.Pipe(layers, [2, 1], chunks=chunks),
    "scan": lambda layers, chunks: fpipe.Pipe(
        layers, [2, 1], chunks=chunks, executor="scan"
    ),
}
SEQUENCE_ROWS = 7
executors = pytest.mark.parametrize("executor", EXECUTORS)


def sequence_layer(w, x, *, side):
    return shifted_sequence(w, x, side["deep"]["position"], side["bias"])


@shaped
def shifted_sequence(
    w: Float[Array, "width width"],
    x: Float[Array, "length rows width"],
    position: Float[Array, "2 rows length"],
    bias: Float[Array, " rows"],
) -> Float[Array, "length rows width"]:
    return jnp.tanh(x @ w + position.sum(0).T[..., None] * bias[:, None])


def sequence_head(w, x, *, side):
    y = x @ w
    return {
        "y": fpipe.Chunk(y, axis=1),
        "pair": fpipe.Chunk((y[..., 0], y.sum(-1)), axis=-1),
        "rows": y.mean((0, 2)) * side["bias"],
        "mean": y.mean(),
    }


def sequence_case(n):
    keys = iter(jax.random.split(jax.random.key(0), 8))
    noise = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    params = tuple(noise(4, 4) for _ in range(3))
    x = fpipe.Chunk(noise(3, n, 4), axis=-2)
    position = jnp.sin(jnp.arange(6.0 * n)).reshape(2, n, 3)
    side = {"deep": fpipe.Chunk({"position": position}, 1), "bias": noise(n)}
    target = {"t": fpipe.Chunk(noise(3, n, 4), axis=1)}
    return params, x, side, target


def sequence_loss(y, target):
    error = ((y["y"] - target["t"]) ** 2).mean()
    return error + (y["rows"] * y["pair"][0].sum(0)).mean() + y["mean"]


def sequence_by_hand(params, x, side, target, bounds):
    """The loss and outputs of pieces that numpy's own indices cut."""
    total, outs = 0.0, []
    n = x.shape[1]
    for start, stop in bounds:
        own = {
            "deep": {"position": side["deep"].value["position"][:, start:stop]},
            "bias": side["bias"][start:stop],
        }
        h = x[:, start:stop]
        for w in params[:-1]:
            h = sequence_layer(w, h, side=own)
        y = sequence_head(params[-1], h, side=own)
        y = {name: getattr(v, "value", v) for name, v in y.items()}
        outs.append(y)
        loss = sequence_loss(y, {"t": target[:, start:stop]})
        total += (stop - start) / n * loss
    return total, outs


LAYERS = [sequence_layer, sequence_layer, sequence_head]


@pytest.mark.quick(cases=1)
@executors
def test_rows_lie_on_the_axis_of_a_chunk(executor):
    make, n = EXECUTORS[executor], SEQUENCE_ROWS
    params, x, side, target = sequence_case(n)
    bounds = [(start, min(start + 2, n)) for start in range(0, n, 2)]
    pipe = make(LAYERS, 4)
    placed = pipe.place(params)
    by_hand = functools.partial(sequence_by_hand, bounds=bounds)
    (want, outs), wanted = jax.jit(
        jax.value_and_grad(by_hand, argnums=(0, 1, 3), has_aux=True)
    )(params, x.value, side, target["t"].value)
    y = pipe(placed, x, side)
    join = lambda *parts: jnp.concatenate(parts, -1)  # noqa: E731
    assert_same(
        y,
        {
            "y": jnp.concatenate([out["y"] for out in outs], 1),
            "pair": jax.tree.map(join, *(out["pair"] for out in outs)),
            "rows": jnp.concatenate([out["rows"] for out in outs]),
            "mean": jnp.stack([out["mean"] for out in outs]),
        },
    )
    loss, grads = pipe.value_and_grad(sequence_loss, argnums=(0, 1, 2))(
        placed, x, target, side=side
    )
    assert_same((loss, pipe.gather(grads[0])), (want, wanted[0]))
    assert_same(grads[1], fpipe.Chunk(wanted[1], axis=-2))
    assert_same(grads[2], {"t": fpipe.Chunk(wanted[2], axis=1)})
    assert_same(pipe.evaluate(sequence_loss)(placed, x, target, side=side), want)


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_a_gradient_outside_goes_through_rows_on_other_axes(executor):
    make, n = EXECUTORS[executor], SEQUENCE_ROWS
    params, x, side, _ = sequence_case(n)
    pipe = make(LAYERS, 4)
    placed = pipe.place(params)

    def loss(run):
        def f(params, x, side):
            y = run(params, x, side)
            factor = jnp.cos(jnp.arange(y["y"].size)).reshape(y["y"].shape)
            return (y["y"] * factor).sum() + (y["pair"][1] ** 2).sum() - y["mean"][1]

        return jax.value_and_grad(f, argnums=(0, 1, 2))

    want = jax.jit(loss(fpipe.sequential(LAYERS, 4)))(params, x, side)
    got, (into_params, *others) = loss(pipe)(placed, x, side)
    assert type(others[0]) is fpipe.Chunk
    assert_same((got, (pipe.gather(into_params), *others)), want)


@executors
def test_init_and_states_see_the_first_rows_of_a_chunk(executor):
    make, n = EXECUTORS[executor], SEQUENCE_ROWS
    size = 2

    def init(key, x, *, side):
        assert x.shape == (3, size, 4)
        assert side.shape == (2, size)
        return jnp.eye(4)

    def init_state(x, *, side):
        return jnp.zeros(x.shape[0]) + side.shape[0]

    def apply(w, x, *, side, state):
        return x @ w + side.sum(), state + x.sum((1, 2))

    layer = fpipe.Layer(apply, init, init_state=init_state)
    last = fpipe.Layer(lambda w, x: fpipe.Chunk(x @ w, 1), lambda key, x: jnp.eye(4))
    x = fpipe.Chunk(jnp.ones((3, n, 4)), 1)
    side = fpipe.Chunk(jnp.zeros((2, n)), -1)
    pipe = make([layer, layer, last], 4)
    params = pipe.init(jax.random.key(0), x, side)
    state = pipe.init_state(x, side)
    y, (new, *_) = pipe(params, x, side, state=state)
    assert_same(y, jnp.ones((3, n, 4)))
    assert_same(new, jnp.full(3, 2 + 4.0 * n))


@both
def test_a_layer_that_returns_a_wrapper_is_named(make):
    text = (
        "layers return and stash the arrays themselves; only the last layer may return "
        "an `fpipe.Chunk`, which says how outputs are joined"
    )
    wrap = fpipe.fn(lambda x: [fpipe.Chunk(x, 1)], name="wrap")
    with raises(
        TypeError, f"layer 0 'wrap' returned or stashed an fpipe.Chunk: {text}"
    ):
        make([wrap, same], chunks=2)(((), ()), rows(4))

    for wrapper in (fpipe.NoChunk, fpipe.PerRow, lambda x: fpipe.Microbatches([x])):
        last = fpipe.fn(lambda x, wrapper=wrapper: {"y": wrapper(x)}, name="last")
        name = type(wrapper(0)).__name__
        with raises(
            TypeError, f"layer 1 'last' returned or stashed an fpipe.{name}: {text}"
        ):
            make([same, last], chunks=2)(((), ()), rows(4))

    @fpipe.skippable(stash=["a"])
    def stashing(params, x, *, carry):
        return x, fpipe.stash(carry, "a", fpipe.Chunk(x, 1))

    @fpipe.skippable(pop=["a"])
    def popping(params, x, *, carry):
        return fpipe.pop(carry, "a")

    with raises(
        TypeError,
        f"layer 0 'stashing' returned or stashed an fpipe.Chunk: {text}",
    ):
        make([stashing, popping], chunks=2)(((), ()), rows(4))


@both
@pytest.mark.parametrize(
    ("returns", "text"),
    [
        (
            lambda x: fpipe.Chunk(x, 2),
            "returned `fpipe.Chunk(…, axis=2)` of float32[2,2]: its axes are 0 to 1",
        ),
        (
            lambda x: [fpipe.Chunk({"a": x.sum()}, 0)],
            "returned `fpipe.Chunk(…, axis=0)` of a 0-d array, which has no rows; "
            "return the array itself",
        ),
        (
            lambda x: fpipe.Chunk([fpipe.Chunk(x, 0)], 1),
            "returned an fpipe.Chunk inside of an fpipe.Chunk; one wrapper says how it "
            "is joined",
        ),
        (
            lambda x: fpipe.Chunk([fpipe.PerRow(x)], 1),
            "returned an fpipe.PerRow inside of an fpipe.Chunk; one wrapper says how "
            "it is joined",
        ),
    ],
)
def test_the_last_layer_joins_on_an_axis_that_is_there(make, returns, text):
    pipe = make([same, fpipe.fn(returns, name="last")], chunks=2)
    with raises(ValueError, f"layer 1 'last' {text}"):
        pipe(((), ()), rows(4))
    with raises(ValueError, f"layer 1 'last' {text}"):
        pipe.value_and_grad(lambda y: 0.0)(((), ()), rows(4))


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_anomalies_are_found_in_rows_on_other_axes(executor):
    def root(x):
        return jnp.sqrt(x)

    layers = [fpipe.fn(root), fpipe.fn(lambda x: fpipe.Chunk(x, 1))]
    pipe = fpipe.Pipe(layers, [1, 1], chunks=2, executor=executor, detect_anomaly=True)
    x = jnp.ones((3, 6, 2))
    step = pipe.value_and_grad(jnp.sum, reduction="sum", argnums=1)
    params = pipe.place(((), ()))
    _, grad = step(params, fpipe.Chunk(x, 1))
    assert_same(grad, fpipe.Chunk(x / 2, 1))
    # Finite forward, infinite backward, in the second microbatch alone.
    bad = fpipe.Chunk(x.at[0, 4].set(0), 1)
    with pytest.raises(FloatingPointError, match=r"'root', microbatch 1, backward"):
        step(params, bad)
    with pytest.raises(FloatingPointError, match=r"'root', microbatch 1, backward"):
        jax.grad(lambda x: pipe(params, x).sum())(bad)


def test_a_plan_says_how_every_leaf_is_cut():
    params, x, side, target = sequence_case(7)
    side = side | {"scale": fpipe.NoChunk(jnp.float32(2)), "mode": "a"}
    plan = fpipe.Pipe(LAYERS, [2, 1], chunks=4).plan(
        params, x, target, loss_fn=sequence_loss, side=side
    )
    assert [(r.name, r.value, r.gets, r.axis, r.rows) for r in plan.inputs] == [
        ("x", "float32[3,7,4]", "rows", 1, (2, 2, 2, 1)),
        ("side['bias']", "float32[7]", "rows", 0, (2, 2, 2, 1)),
        ("side['deep']['position']", "float32[2,7,3]", "rows", 1, (2, 2, 2, 1)),
        ("side['mode']", "str", "static", None, ()),
        ("side['scale']", "float32[]", "whole", None, ()),
        ("targets[0]['t']", "float32[3,7,4]", "rows", 1, (2, 2, 2, 1)),
    ]
    printed = str(plan)
    for words in (
        "x                         float32[3,7,4]  2 rows (the last 1) on axis 1",
        "side['mode']              str             all of it, static",
        "side['scale']             float32[]       all of it",
    ):
        assert words in printed.splitlines()
    assert plan.as_dict()["inputs"][4] == {
        "name": "side['scale']",
        "value": "float32[]",
        "gets": "whole",
        "axis": None,
        "rows": [],
    }


def test_a_plan_of_many_leaves_stays_short():
    x = {f"leaf {k}": rows(2) for k in range(30)}
    plan = fpipe.Pipe([fpipe.fn(lambda x: x["leaf 0"])]).plan(None, x)
    assert len(plan.inputs) == 30
    assert "and 23 more in `plan.inputs`" in str(plan).splitlines()


def test_balance_counts_a_chunk_by_its_rows():
    params, x, side, _ = sequence_case(8)
    costs = fpipe.layer_costs(LAYERS, x, params=params, side=side, chunks=4)
    assert costs.microbatches == 4
    assert costs.inputs == 3 * 2 * 4 * 4


def test_testing_takes_chunks():
    params, x, side, target = sequence_case(7)
    fpipe.testing.assert_equals_sequential(
        fpipe.Pipe(LAYERS, [1, 2], chunks=3, schedule="zb_h1"),
        x,
        target,
        params=params,
        side=side,
        loss_fn=sequence_loss,
        argnums=(0, 1, 2),
    )


@both
def test_a_list_of_microbatches_is_told_what_a_list_is(make):
    def dense(w, x):
        return x @ w

    pipe = make([dense, same], chunks=2)
    params = pipe.place((jnp.eye(2), ()))
    with pytest.raises(TypeError) as caught:
        pipe(params, [rows(4)] * 3)
    (note,) = (n for n in caught.value.__notes__ if n.startswith("fpipe: "))
    assert "in layer 0 'dense'" in note
    assert note.endswith(
        ": `x` is a list of 3 arrays, so every microbatch is a list of 3 arrays too, "
        "with some rows of each; if they are ready-made microbatches, pass "
        "`fpipe.Microbatches(x)`"
    )


@both
def test_outputs_whose_dtype_depends_on_the_rows_are_refused(make):
    def outputs(x):
        return x.astype(jnp.float16) if x.shape[0] == 1 else x

    with raises(
        ValueError,
        "`pipe(params, x)`: y of microbatch 1 has float16[1,2] where that of "
        "microbatch 0 has float32[2,2]: they are joined, so the dtype must not "
        "depend on the number of rows",
    ):
        make([same, fpipe.fn(outputs)], chunks=2)(((), ()), rows(3))


# --- inputs of any rows, axes and dtypes ---


@dataclasses.dataclass(frozen=True)
class Given:
    """A leaf of an input: an array, or something static."""

    shape: tuple[int, ...]
    axis: int | None  # of its rows; `None`: it goes whole
    dtype: str = "float32"
    static: int | str | None = None

    def value(self):
        if not self.shape:
            return self.static
        array = (np.arange(np.prod(self.shape)) % 7).reshape(self.shape)
        array = array.astype(self.dtype)
        if self.axis is None:
            return fpipe.NoChunk(array)
        return fpipe.Chunk(array, self.axis) if self.axis else array

    def piece(self, start, stop):
        """What a microbatch gets of it, by numpy's own indices."""
        value: Any = self.value()
        array = getattr(value, "value", value)
        if not self.shape or self.axis is None:
            return array
        return array[(slice(None),) * self.axis + (slice(start, stop),)]


def random_leaf(rng, n, unequal):
    """A leaf beside others of `n` rows; with as many, or with one more."""
    if not unequal and rng.random() < 0.2:
        return Given((), None, static=rng.choice([3, "ab", None]))
    rank = rng.randint(1, 3)
    axis = rng.randrange(rank)
    if not unequal and rng.random() < 0.2:
        axis = None
    shape = [rng.randint(1, 4) for _ in range(rank)]
    if axis is not None:
        shape[axis] = n + unequal
    dtype = rng.choice(["float32", "float16", "int32", "bool"])
    return Given(tuple(shape), axis, dtype)


def fingerprint(tree):
    """A number that depends on every number of a pytree, and on where it is."""
    total = jnp.float32(0)
    for k, leaf in enumerate(jax.tree.leaves(tree)):
        if hasattr(leaf, "shape"):
            where = jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32) + k)
            total += (where * jnp.asarray(leaf).ravel().astype(jnp.float32)).sum()
        else:
            total += np.float32(leaf if isinstance(leaf, int) else len(leaf))
    return total


@executors
@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full)])
def test_every_leaf_is_cut_as_it_says_or_named(executor, unequal, seed):
    rng = random.Random(f"{executor} {seed}")
    n, chunks = rng.randint(2, 7), rng.randint(2, 4)
    inputs = {
        name: [random_leaf(rng, n, False) for _ in range(3)]
        for name in ("x", "side", "targets[0]")
    }
    inputs["x"][0] = Given((n, 2), 0)
    name, k = rng.choice(list(inputs)), rng.randint(1, 2)
    if unequal:
        inputs[name][k] = random_leaf(rng, n, True)
    x, side, target = ([leaf.value() for leaf in tree] for tree in inputs.values())
    layers = [
        fpipe.fn(lambda x, *, side: {"x": x, "side": fingerprint(side)}),
        fpipe.fn(lambda h: h),
        fpipe.fn(lambda h: (fingerprint(h["x"]), h["side"])),
    ]
    pipe = EXECUTORS[executor](layers, chunks)
    params = pipe.place([()] * 3)

    def loss(y, t):
        return y[0] + 2 * y[1] + 3 * fingerprint(t)

    def call():
        run = pipe.evaluate(loss, reduction="sum")
        return pipe(params, x, side=side), run(params, x, target, side=side)

    if unequal:
        named = f"`{name}[{k}]` of shape {inputs[name][k].shape} has {n + 1} rows, but "
        with pytest.raises(ValueError, match=re.escape(named)):
            call()
        return
    size = -(-n // chunks)
    cuts = [
        [[leaf.piece(start, start + size) for leaf in tree] for tree in inputs.values()]
        for start in range(0, n, size)
    ]
    outs = [(fingerprint(x), fingerprint(side)) for x, side, _ in cuts]
    want = sum(loss(y, cut[2]) for y, cut in zip(outs, cuts, strict=True))
    y = jax.tree.map(lambda *parts: jnp.stack(parts), *outs)
    assert_same(call(), (y, want))


# --- structures in and out ---


class Pair(NamedTuple):
    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    value: Any
    tag: str = dataclasses.field(metadata={"static": True})


STRUCTURES = {
    "dict": lambda a, b: {"b": a, "a": {"deep": b}},
    "list and tuple": lambda a, b: [a, (b,), ()],
    "named tuple": Pair,
    "dataclass": lambda a, b: Record({"a": a, "b": b}, "kept"),
    "None and static leaves": lambda a, b: [
        None,
        a,
        "text",
        3,
        b,
        {"none": None},
        2.5,
        False,
    ],
    "nested": lambda a, b: Pair(Record((a, None), "kept"), {"b": Pair(b, 1)}),
}


@both
@pytest.mark.parametrize("case", STRUCTURES)
def test_structures_go_in_through_stages_and_out(make, case):
    build = STRUCTURES[case]

    def arrays(tree):
        return jax.tree.map(
            lambda leaf: jnp.sin(leaf) if isinstance(leaf, jax.Array) else leaf, tree
        )

    pipe, a, b = (
        make([fpipe.fn(arrays), fpipe.fn(arrays)], chunks=2),
        rows(3),
        rows(3, 1),
    )
    got, want = (
        pipe(((), ()), build(a, b)),
        build(jnp.sin(jnp.sin(a)), jnp.sin(jnp.sin(b))),
    )
    chex.assert_trees_all_equal_structs(got, want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if isinstance(w, jax.Array):
            assert_same(g, w)
        else:
            assert (type(g), g) == (type(w), w)


@both
@pytest.mark.parametrize("case", STRUCTURES)
def test_gradients_have_the_structure_of_their_argument(make, case):
    build = STRUCTURES[case]

    def first(x):
        a, b = (leaf for leaf in jax.tree.leaves(x) if isinstance(leaf, jax.Array))
        return a * b

    pipe, a, b = make([fpipe.fn(first), same], chunks=2), rows(3), rows(3, 1)
    _, grads = pipe.value_and_grad(
        lambda y, t: (y * first(t)).sum(), reduction="sum", argnums=(1, 2)
    )(((), ()), build(a, b), build(a, b))
    ga, gb = jax.grad(
        lambda a, b: (a * b * rows(3) * rows(3, 1)).sum(), argnums=(0, 1)
    )(a, b)
    static = jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, jax.Array) else None, build(ga, gb)
    )
    assert_same(grads, (static, static))


@both
def test_outputs_are_joined_and_scalars_stacked(make):
    def outputs(x):
        return {
            "rows": x,
            "mean": x.mean(),
            "count": jnp.int32(x.shape[0]),
            "summed": x.sum(0, keepdims=True),
            "vector": x.sum(0),
            "keys": jax.random.split(jax.random.key(2), x.shape[0]),
            "key": jax.random.key(x.shape[0]),
            "static": ("a", 1, None),
        }

    x = rows(5)
    got = make([same, fpipe.fn(outputs)], chunks=3)(((), ()), x)
    parts = [outputs(part) for part in cut_by_hand(x, 3)]
    static = got.pop("static")
    want = {
        name: (jnp.concatenate if parts[0][name].shape else jnp.stack)(
            [part[name] for part in parts]
        )
        for name in got
    }
    assert static == ("a", 1, None)
    assert got["mean"].shape == got["count"].shape == got["key"].shape == (3,)
    assert got["vector"].shape == (6,)
    chex.assert_trees_all_equal_dtypes(got, want)
    assert_same(jax.tree.map(raw, got), jax.tree.map(raw, want))


@both
def test_one_microbatch_stacks_its_scalars_too(make):
    got = make([fpipe.fn(lambda x: (x, x.sum()))], chunks=1)(((),), rows(2))
    assert_same(got, (rows(2), rows(2).sum()[None]))


@both
def test_outputs_of_different_structures_are_refused(make):
    def outputs(x):
        return {"x": x, **({"last": x} if x.shape[0] == 1 else {})}

    with pytest.raises((TypeError, ValueError), match="microbatch"):
        make([same, fpipe.fn(outputs)], chunks=2)(((), ()), rows(3))


@both
def test_static_outputs_that_differ_between_microbatches_are_refused(make):
    with pytest.raises((TypeError, ValueError), match="microbatch"):
        make([same, fpipe.fn(lambda x: {"x": x, "rows": x.shape[0]})], chunks=2)(
            ((), ()), rows(3)
        )


@both
def test_aux_whose_static_leaves_differ_is_refused_with_both(make):
    grad = make([same, same], chunks=2).value_and_grad(
        lambda y: (y.sum(), {"a": f"{y.shape[0]} rows"}), has_aux=True
    )
    with pytest.raises(
        (TypeError, ValueError), match=r"(?s)2 rows.*1 rows|1 rows.*2 rows"
    ):
        grad(((), ()), rows(3))


@both
def test_a_boundary_may_hold_what_depends_on_the_number_of_rows(make):
    layers = [
        fpipe.fn(lambda x: {"x": x, "rows": x.shape[0]}),
        fpipe.fn(lambda x: x["x"] * x["rows"]),
    ]
    pipe, x = make(layers, chunks=2), rows(3)
    factor = jnp.array([[2.0], [2.0], [1.0]])
    assert_same(pipe(((), ()), x), x * factor)
    _, grad = pipe.value_and_grad(jnp.sum, reduction="sum", argnums=1)(((), ()), x)
    assert_same(grad, jnp.broadcast_to(factor, (3, 2)))


# --- static leaves ---


def by_type(x):
    """Tells static leaves apart as a program must."""
    return (
        x["v"]
        * {int: 1.0, float: 2.0, bool: 3.0, str: 4.0, type(None): 5.0}[type(x["s"])]
    )


@both
def test_static_leaves_of_different_types_are_different(make):
    pipe, v = make([fpipe.fn(by_type), same], chunks=2), rows(3)
    for static, factor in [
        (1, 1),
        (1.0, 2),
        (True, 3),
        ("1", 4),
        (None, 5),
        (1, 1),
        (True, 3),
        (1.0, 2),
    ]:
        assert_same(pipe(((), ()), {"v": v, "s": static}), v * factor)


@both
def test_static_targets_and_side_of_different_types_are_different(make):
    pipe, v = (
        make([fpipe.fn(lambda x, *, side: by_type({"v": x, "s": side}))], chunks=2),
        rows(3),
    )

    def loss(y, t):
        return by_type({"v": y.sum(), "s": t})

    run = pipe.evaluate(loss, reduction="sum")
    for side, a in [(1, 1), (1.0, 2), (True, 3)]:
        for target, b in [(0, 1), (0.0, 2), (False, 3)]:
            assert_same(run(((),), v, target, side=side), v.sum() * (a * b))


@both
def test_a_zero_and_its_negative_are_different_static_leaves(make):
    pipe, v = (
        make(
            [fpipe.fn(lambda x: x["v"] * np.float32(np.copysign(1.0, x["s"])))],
            chunks=2,
        ),
        rows(2),
    )
    for zero in (0.0, -0.0, 0.0, -0.0):
        assert_same(pipe(((),), {"v": v, "s": zero}), v * float(np.copysign(1.0, zero)))


def test_equal_static_leaves_compile_once():
    @chex.assert_max_traces(n=1)
    def apply(x):
        return x["v"]

    pipe = fpipe.Pipe([fpipe.fn(apply, "apply")], chunks=2)
    for nan in (float("nan"), float("nan"), np.nan):
        pipe(((),), {"v": rows(2), "s": ("a", nan, 1)})


# --- numpy, integers, booleans, keys ---


@both
def test_numpy_inputs_are_arrays_and_are_left_alone(make):
    x = {
        "f32": np.arange(6, dtype=np.float32).reshape(3, 2),
        "f64": np.arange(3.0).reshape(3, 1),
        "i64": np.arange(3),
        "bool": np.array([True, False, True]),
        "whole": fpipe.NoChunk(np.float32(3)),
    }
    before = jax.tree.map(np.copy, x)

    def apply(p, x):
        assert {name: a.dtype.name for name, a in x.items()} == {
            "f32": "float32",
            "f64": "float32",
            "i64": "int32",
            "bool": "bool",
            "whole": "float32",
        }
        y = x["f32"] * p + x["f64"] * x["whole"] + x["i64"][:, None].astype(jnp.float32)
        return jnp.where(x["bool"][:, None], y, -y)

    pipe, target = make([apply, same], chunks=2), np.ones((3, 2), np.float32)
    params = pipe.place((np.float32(2), ()))
    want = np.array([[1], [-1], [1]]) * (
        2 * x["f32"] + x["f64"] * 3 + np.arange(3)[:, None]
    )
    assert_same(pipe(params, x), jnp.asarray(want, jnp.float32))
    loss, grads = pipe.value_and_grad(
        lambda y, t: (y * t).sum(), reduction="sum", argnums=2
    )(params, x, target)
    assert_same(
        (loss, grads), (jnp.float32(want.sum()), jnp.asarray(want, jnp.float32))
    )
    jax.tree.map(np.testing.assert_array_equal, x, before)


@both
def test_integers_booleans_and_keys_cross_stages(make):
    keys = jax.random.split(jax.random.key(3), 5)
    x = {
        "v": rows(5),
        "id": jnp.arange(5) % 3,
        "on": jnp.arange(5) % 2 == 0,
        "key": keys,
        "legacy": rows(5),
    }
    x["legacy"] = jax.vmap(jax.random.key_data)(keys)

    def move(p, x):
        return {**x, "v": jnp.sin(x["v"]) * p, "id": (x["id"] + 1) % 3, "on": ~x["on"]}

    def end(table, x):
        noise = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(x["key"])
        assert x["legacy"].dtype == jnp.uint32
        return jnp.where(x["on"][:, None], x["v"] * table[x["id"]], noise)

    table, p = rows(3), jnp.array([0.5, 2.0])
    pipe = make([move, move, end], chunks=3)
    run = pipe.value_and_grad(lambda y: (y**2).sum(), reduction="sum", argnums=(0, 1))
    loss, (into_params, into_x) = run(pipe.place((p, p, table)), x)

    def by_hand(params, v):
        p, q, table = params
        noise = jnp.stack(
            [jax.random.uniform(key, (2,)) for key in (keys[k] for k in range(5))]
        )
        y = jnp.sin(jnp.sin(v) * p) * q * table[(x["id"] + 2) % 3]
        return (jnp.where(x["on"][:, None], y, noise) ** 2).sum()

    want, (wp, wv) = jax.jit(jax.value_and_grad(by_hand, argnums=(0, 1)))(
        (p, p, table), x["v"]
    )
    assert into_x.keys() == x.keys()
    for name in ("id", "on", "key", "legacy"):
        assert into_x[name].dtype == jax.dtypes.float0
        assert into_x[name].shape == x[name].shape
    assert_same((loss, into_params, into_x["v"]), (want, wp, wv))


@both
def test_integers_booleans_and_keys_come_out(make):
    x = {
        "id": jnp.arange(5),
        "on": jnp.arange(5) % 2 == 0,
        "key": jax.random.split(jax.random.key(3), 5),
    }
    move = fpipe.fn(lambda x: {"id": x["id"] + 1, "on": ~x["on"], "key": x["key"]})
    out = make([move, move], chunks=3)(((), ()), x)
    want = {"id": jnp.arange(2, 7), "on": x["on"], "key": x["key"]}
    chex.assert_trees_all_equal_dtypes(out, want)
    assert_same(jax.tree.map(raw, out), jax.tree.map(raw, want))


def raw(array):
    return (
        jax.random.key_data(array)
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        else array
    )


@both
def test_a_model_of_integers_alone_has_no_gradient_and_runs(make):
    pipe = make([fpipe.fn(lambda x: x + 1), fpipe.fn(lambda x: x * 2)], chunks=2)
    x = jnp.arange(3)
    assert_same(pipe(((), ()), x), (x + 1) * 2)
    loss, grad = pipe.value_and_grad(lambda y: y.sum(), reduction="sum", argnums=1)(
        ((), ()), x
    )
    assert_same((loss, grad), (jnp.float32(12), np.zeros(3, jax.dtypes.float0)))


# --- side and targets ---


@both
def test_targets_and_side_are_cut_like_x(make):
    seen = []

    def apply(x, *, side):
        return x + side["a"] * side["b"][0]

    def loss(y, t, u):
        seen.append((y.shape, t["t"].shape, u))
        return ((y - t["t"]) ** 2).mean() * (2 if u == "twice" else 1)

    pipe = make([same, fpipe.fn(apply)], chunks=4)
    x, side, t = (
        rows(10),
        {"a": rows(10, start=2.0), "b": (rows(10, 1), None, "text")},
        {"t": rows(10, start=5.0)},
    )
    run = pipe.value_and_grad(loss, argnums=(1, 2))
    value, grads = run(((), ()), x, t, "twice", side=side)
    assert set(seen) == {((3, 2), (3, 2), "twice"), ((1, 2), (1, 2), "twice")}

    def by_hand(x, target):
        cut = [cut_by_hand(a, 4) for a in (x, target, side["a"], side["b"][0])]
        return sum(
            len(x) / 10 * 2 * ((x + a * b - t) ** 2).mean()
            for x, t, a, b in zip(*cut, strict=True)
        )

    want, (wx, wt) = jax.value_and_grad(by_hand, argnums=(0, 1))(x, t["t"])
    assert_same((value, grads), (want, (wx, {"t": wt})))


@both
def test_weights_of_a_loss_are_summed_over_ragged_pieces(make):
    def loss(y, mask):
        return (y[:, 0] * mask).sum(), mask.sum()

    pipe, x, mask = (
        make([scale], chunks=4),
        rows(10),
        (jnp.arange(10) % 4 != 1).astype(jnp.float32),
    )
    got = pipe.value_and_grad(loss, reduction="weighted", argnums=(0, 1))(
        pipe.place((jnp.float32(3),)), x, mask
    )

    def by_hand(p, x):
        return ((x * p)[:, 0] * mask).sum() / mask.sum()

    want, (wp, wx) = jax.value_and_grad(by_hand, argnums=(0, 1))(jnp.float32(3), x)
    assert_same(got, (want, ((wp,), wx)))


@every
def test_gradients_of_numpys_float64_are_float32(make):
    def scaled(w, x):
        return x * w

    x, w = np.arange(12.0).reshape(4, 3), np.ones(3)
    model = make([scaled, scaled], chunks=2)
    step = model.value_and_grad(mse, argnums=(0, 1))
    _, (grads, grad) = step(model.place((w, w)), x, x + 1)
    low = x.astype(np.float32)
    want = jax.grad(lambda w, v, x: mse(x * w * v, low + 1), (0, 1, 2))(
        *[jnp.float32(a) for a in (w, w, low)]
    )
    assert_same((*model.gather(grads), grad), want)
