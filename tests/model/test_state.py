"""State of rows: each microbatch has that of its own rows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fpipe
from fpipe.schedules import Action, Schedule
from tests.helpers import WIDTH, assert_same, dense, mse, noise
from tests.model.test_needs import every, make_placed, make_scan, make_sequential, pipes

KEY = jax.random.key
# What a type checker would refuse is tested here.
untyped: Any = lambda value: value  # noqa: E731
X = noise(KEY(0), (12, WIDTH))
T = noise(KEY(1), (12, WIDTH))
LENGTH = 3


def attention(width: int = WIDTH, state_rows: bool | None = True) -> fpipe.Layer:
    """One step of decoding: each row looks at what it was given before.

    Its state is a cache of the rows' inputs, and how many each has had.
    """

    def apply(params, x, *, state):
        length = state["length"][:, None]
        now = jnp.arange(LENGTH) == length
        cache = jnp.where(now[..., None], x[:, None], state["cache"])
        scores = jnp.where(jnp.arange(LENGTH) <= length, cache @ params, 0.0)
        y = x + jnp.einsum("bt,btd->bd", scores, cache)
        return y, {"cache": cache, "length": state["length"] + 1}

    def init_state(x):
        rows = x.shape[0]
        cache = jnp.zeros((rows, LENGTH, width), x.dtype)
        return {"cache": cache, "length": jnp.zeros(rows, jnp.int32)}

    return fpipe.Layer(
        apply,
        lambda key, x: noise(key, (width,), 0.5),
        "attention",
        init_state=init_state,
        state_rows=state_rows,
    )


def used(state):
    """A state with something in it, another in each row."""
    return tuple(
        one
        and {
            **one,
            "cache": noise(KEY(2), one["cache"].shape),
            "length": jnp.arange(len(one["length"]), dtype=jnp.int32) % LENGTH,
        }
        for one in jax.device_get(state)
    )


MODEL = [dense(), attention(), dense(), attention()]


def compiled(make, f):
    """A function of a model; what is no pipe already is compiled as a whole."""
    return jax.jit(f) if make is make_sequential else f


def step_of(layers, params, x, t, state, chunks=1):
    """A training step of the plain composition."""
    plain = fpipe.sequential(layers, chunks=chunks)
    own = jax.device_get(params)
    return jax.jit(plain.value_and_grad(mse))(own, x, t, state=state)


def assert_steps_alike(pipe, layers, x, t, state, chunks=1):
    """A step gives what it does without microbatches, or with as many as given."""
    params = pipe.init(KEY(3), x)
    step = pipe.value_and_grad(mse)
    step = jax.jit(step) if isinstance(pipe, type(fpipe.sequential(layers))) else step
    loss, grads = step(params, x, t, state=state)
    want = step_of(layers, pipe.gather(params), x, t, state, chunks)
    assert_same((loss, pipe.gather(grads)), want)


@pytest.mark.quick(cases=2)
@every
@pytest.mark.parametrize("chunks", [1, 4])
def test_rows_are_decoded_as_without_microbatches(make, chunks):
    pipe, plain = make(MODEL, chunks=chunks), fpipe.sequential(MODEL)
    params, state = pipe.init(KEY(3), X), pipe.init_state(X)
    own, want = pipe.gather(params), plain.init_state(X)
    assert_same(state, want)
    decode, expected = compiled(make, pipe.__call__), jax.jit(plain.__call__)
    for k in range(LENGTH):
        x = jnp.roll(X, k)
        y, state = decode(params, x, state=state)
        want_y, want = expected(own, x, state=want)
        assert_same(y, want_y)
        assert_same(state, want)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (make_sequential, {}),
        (make_placed, {"checkpoint": "always"}),
        (make_placed, {"checkpoint": "never"}),
        (make_scan, {"checkpoint": "always"}),
        (make_scan, {"checkpoint": "never"}),
    ],
)
def test_losses_and_gradients_are_those_of_the_whole_batch(make, options):
    pipe = make(MODEL, chunks=3, **options)
    params, state = pipe.init(KEY(3), X), used(pipe.init_state(X))
    want, want_grads = step_of(MODEL, pipe.gather(params), X, T, state)
    step = compiled(make, pipe.value_and_grad(mse))
    result, grads = step(params, X, T, state=state)
    assert_same((result, pipe.gather(grads)), (want, want_grads))
    evaluate = compiled(make, pipe.evaluate(mse))
    assert_same(evaluate(params, X, T, state=state), want)

    # A gradient from outside has all forwards first, and the states come with them.
    def pulled(params):
        y, pull, new = jax.vjp(lambda p: pipe(p, X, state=state), params, has_aux=True)
        return pull(2 * (y - jax.device_put(T, y.sharding)) / y.size)[0], new

    if make is not make_sequential:
        grads, new = pulled(params)
        assert_same(new, want[1])
        assert_same(pipe.gather(grads), want_grads)


@every
def test_a_smaller_last_microbatch_has_fewer_rows_of_the_state(make):
    x, t = X[:10], T[:10]
    pipe = make(MODEL, chunks=4)
    assert_steps_alike(pipe, MODEL, x, t, used(pipe.init_state(x)))


def test_states_of_several_shapes_share_what_a_device_holds():
    """Under scan, rows of states that differ are padded."""
    layers = [dense(), attention(), dense(6), attention(6), counting(), dense()]
    schedule = {"balance": [2, 1, 1, 2], "schedule": "interleaved_1f1b"}
    pipe = make_scan(layers, chunks=4, **schedule)
    state = (*used(pipe.init_state(X)[:4]), jnp.int32(3), None)
    assert_steps_alike(pipe, layers, X, T, state, chunks=4)


def counting():
    """A layer with one state for all microbatches."""

    def apply(params, x, *, state):
        return x * jnp.cos(state), state + 1

    return fpipe.Layer(
        apply,
        lambda key, x: (),
        "counting",
        init_state=lambda x: jnp.int32(0),
    )


def test_rows_lie_over_a_data_axis():
    mesh = jax.make_mesh(
        (2, 2), ("data", "stage"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    pipe = fpipe.Pipe(MODEL, [2, 2], executor="scan", mesh=mesh, chunks=3)
    state = used(pipe.init_state(X))
    assert_steps_alike(pipe, MODEL, X, T, state)


def backwards(devices, microbatches):
    """All forwards, the last microbatch first, then all backwards."""
    order = range(microbatches)[::-1]
    rows = [
        [*(Action("F", s, i) for i in order), *(Action("B", s, i) for i in order)]
        for s in range(devices)
    ]
    return Schedule(rows, tuple(range(devices)))


def test_states_that_share_a_block_stay_within_their_stage():
    # A state of columns and one of rows: XLA sharded the block that both lie in over
    # "data", and moved pieces of it by a permutation that waits for all stages.
    def following(params, x, *, state):
        return x - state, state

    columns = fpipe.Layer(
        following,
        lambda key, x: (),
        "columns",
        init_state=lambda x: jnp.ones(WIDTH - 1),
    )
    rows = dataclasses.replace(
        columns, name="rows", init_state=jnp.ones_like, state_rows=True
    )
    mesh = jax.make_mesh(
        (2, 2), ("data", "stage"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    layers = [columns, rows, columns, fpipe.fn(jnp.sin)]
    pipe = fpipe.Pipe(layers, [2, 2], executor="scan", mesh=mesh)
    x = X[:8, 1:]
    params, state = pipe.place([()] * 4), pipe.init_state(x)
    step = jax.jit(lambda x: pipe.evaluate(mse)(params, x, 0 * x, state=state))
    moves = [
        line
        for line in (step.lower(x).compile().as_text() or "").splitlines()
        if " collective-permute(" in line and "/cond/" in line
    ]
    assert all('/ppermute"' in line for line in moves)
    assert moves
    plain = fpipe.sequential(layers)
    want = plain.evaluate(mse)([()] * 4, x, 0 * x, state=state)
    assert_same(jax.device_get(step(x)), jax.device_get(want))


@pipes
def test_forwards_may_come_in_any_order(make):
    pipe = make(MODEL, chunks=3, schedule=backwards)
    state = used(pipe.init_state(X))
    assert_steps_alike(pipe, MODEL, X, T, state)
    pipe = make([*MODEL, counting()], chunks=3, schedule=backwards)
    params = pipe.init(KEY(3), X)
    with pytest.raises(ValueError, match="runs the forwards of stage 1 in the order"):
        pipe(params, X, state=(*state, 0))


@every
def test_what_is_drawn_for_each_row_does_not_depend_on_chunks(make):
    def init_state(x, *, key):
        return noise(key, x.shape)

    def apply(params, x, *, state):
        return x + state, state * 2

    layer = fpipe.Layer(
        apply,
        lambda key, x: (),
        init_state=init_state,
        finish=lambda state: state + jnp.arange(12.0)[:, None],
        state_rows=True,
    )
    pipe = make([dense(), layer], chunks=4)
    state = pipe.init_state(jax.ShapeDtypeStruct(X.shape, X.dtype), key=KEY(5))
    want = fpipe.sequential([dense(), layer]).init_state(X, key=KEY(5))
    assert_same(state, want)
    # `finish` sees all rows.
    _, (_, new) = pipe(pipe.init(KEY(3), X), X, state=state)
    assert_same(new, want[1] * 2 + np.arange(12, dtype=np.float32)[:, None])


@pipes
def test_plans_and_compilations_take_states_of_rows(make):
    pipe = make(MODEL, chunks=3)
    params, state = pipe.init(KEY(3), X), used(pipe.init_state(X))
    assert pipe.plan(params, X, T, loss_fn=mse).microbatches == 3
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
    assert pipe.plan(None, X, T, loss_fn=mse, state=shapes).microbatches == 3
    pipe.compile(params, X, T, loss_fn=mse, state=shapes)
    step = pipe.value_and_grad(mse)
    step(params, X, T, state=state)
    with jax.no_tracing():
        step(params, X, T, state=state)


def test_other_layers_of_it_keep_what_they_say_of_their_state():
    layer = attention().isolate(fpipe.Namespace())
    assert layer.state_rows
    assert fpipe.skippable(stash=["a"])(
        fpipe.Layer(skipping, state_rows=True)
    ).state_rows


def skipping(params, x, *, carry, state):
    return x, fpipe.stash(carry, "a", x), state


# --- state that a backward makes ---


@jax.custom_vjp
def watched(x, largest):
    """`x`; the "gradient" of `largest` is the largest cotangent that comes back."""
    del largest
    return x


def watched_forward(x, largest):
    return x, largest


def watched_backward(largest, cotangent):
    return cotangent, jnp.max(cotangent)[None] - 0 * largest


watched.defvjp(watched_forward, watched_backward)


def watching(overwrite: Any = ("largest",)) -> fpipe.Layer:
    """A layer that keeps the largest cotangent of its output, and counts."""

    def apply(params, x, *, state):
        y = watched(x * params, state["largest"])
        return y, {**state, "seen": state["seen"] + 1}

    return fpipe.Layer(
        apply,
        lambda key, x: noise(key, (WIDTH,), 0.5),
        "watching",
        init_state=lambda x: {"largest": jnp.zeros(1), "seen": jnp.int32(0)},
        state_rows=False,
        overwrite=overwrite,
    )


WATCHING = [watching(), dense(), watching(), dense()]


@every
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_backward_makes_the_maximum_over_microbatches(make, reduction):
    pipe = make(WATCHING, chunks=3)
    params, state = pipe.init(KEY(3), X), pipe.init_state(X)
    own = jax.device_get(pipe.gather(params))
    step = compiled(make, pipe.value_and_grad(mse, reduction=reduction))
    (_, new), _ = step(params, X, T, state=state)

    # By hand: the cotangents of both outputs, as gradients of what is added to them.
    def loss(added):
        h = X * own[0] + added[0]
        h = jnp.tanh(h @ own[1]["w"] + own[1]["b"]) * own[2] + added[1]
        y = jnp.tanh(h @ own[3]["w"] + own[3]["b"])
        return mse(y, T) * (3 if reduction == "sum" else 1)

    want = jax.grad(loss)((0 * X, 0 * X))
    got = [new[0]["largest"], new[2]["largest"]]
    assert_same(jax.device_get(got), [a.max()[None] for a in want])
    assert [int(new[k]["seen"]) for k in (0, 2)] == [3, 3]
    y = compiled(make, pipe.__call__)(params, X, state=new)[1]
    assert_same(jax.device_get(y[0]["largest"]), jax.device_get(got[0]))


@pipes
def test_split_backwards_make_it_too(make):
    pipe = make(WATCHING, chunks=3, schedule="zb_h1")
    state = jax.device_get(pipe.init_state(X))
    assert_steps_alike(pipe, WATCHING, X, T, state, chunks=3)


@pipes
def test_a_gradient_from_outside_says_that_it_does_not(make):
    pipe = make(WATCHING, chunks=3)
    params, state = pipe.init(KEY(3), X), pipe.init_state(X)
    with pytest.warns(UserWarning, match=r"'watching'.*have state that a backward"):
        jax.vjp(lambda p: pipe(p, X, state=state), params, has_aux=True)


@every
@pytest.mark.parametrize(
    ("overwrite", "message"),
    [
        (True, r"`overwrite=True`, but `state\[0\]\['seen'\]` is int32"),
        (["scale"], r"`overwrite=\['scale'\]`, but .* no arrays under \['scale'\]"),
    ],
)
def test_what_a_backward_cannot_make_is_refused(make, overwrite, message):
    pipe = make([watching(overwrite=overwrite), dense()], chunks=3)
    params, state = pipe.init(KEY(3), X), pipe.init_state(X)
    with pytest.raises(ValueError, match=message):
        pipe(params, X, state=state)


# --- what is refused ---


@every
def test_a_state_that_follows_the_rows_says_so(make):
    layers = [dense(), attention(state_rows=None)]
    refused = pytest.raises(
        ValueError,
        match=r"layer 1 'attention'.*\[3\]\} for 3 rows and .*\[12\]\} for 12, "
        r".*4 microbatches .*state_rows=True\)`",
    )
    pipe = make(layers, chunks=4)
    with refused:
        pipe.init_state(X)
    params = pipe.init(KEY(3), X)
    for rows in (3, 12):  # made by hand: as many as a microbatch has, or the batch
        (state,) = used(make_sequential([attention()]).init_state(X[:rows]))
        with refused:
            pipe(params, X, state=(None, state))
        with refused:
            pipe.value_and_grad(mse)(params, X, T, state=(None, state))
    # One microbatch has all rows, and nothing to share.
    pipe = make(layers)
    pipe(params, X, state=pipe.init_state(X))


@every
def test_a_state_may_be_meant_to_be_shared(make):
    pipe = make([dense(), attention(state_rows=False)], chunks=4)
    params, state = pipe.init(KEY(3), X), pipe.init_state(X)
    assert state[1]["cache"].shape == (3, LENGTH, WIDTH)
    _, (_, new) = pipe(params, X, state=state)
    assert new["length"].tolist() == [4, 4, 4]


@every
def test_channels_are_no_rows(make):
    """Also if there are as many as rows, in a microbatch or in all."""
    layer = fpipe.Layer(
        lambda params, x, *, state: (x + state, state + x.mean(0)),
        lambda key, x: (),
        init_state=lambda x: jnp.zeros(x.shape[1]),
    )
    for rows in (WIDTH, 2 * WIDTH):
        pipe = make([dense(), layer], chunks=2)
        x = X[:rows]
        params, state = pipe.init(KEY(3), x), pipe.init_state(x)
        pipe(params, x, state=state)


@every
def test_layers_that_know_the_size_of_their_microbatches_are_left_alone(make):
    """How their states follow the rows cannot be told."""
    fixed = fpipe.fn(lambda x: x.reshape(3, 2, 2).reshape(x.shape))
    pipe = make([fixed, attention(state_rows=None)], chunks=4)
    params, state = pipe.init(KEY(3), X), pipe.init_state(X)
    assert state[1]["length"].shape == (3,)
    pipe(params, X, state=state)


@every
def test_a_state_of_other_rows_is_refused(make):
    pipe = make(MODEL, chunks=4)
    params, state = pipe.init(KEY(3), X), pipe.init_state(X[:8])
    refused = pytest.raises(
        ValueError, match=r"layer 1 'attention'.*`state\[1\]\['cache'\]` has 8 .* 12;"
    )
    with refused:
        pipe(params, X, state=state)
    with refused:
        pipe.value_and_grad(mse)(params, X, T, state=state)
    state = pipe.init_state(X)
    state = (*state[:3], {**state[3], "length": jnp.int32(0)})
    with pytest.raises(
        ValueError, match=r"`state\[3\]\['length'\]` has no rows, it is"
    ):
        pipe(params, X, state=state)


def test_what_is_said_of_rows_is_checked():
    with pytest.raises(TypeError, match="True, False or None"):
        fpipe.Layer(skipping, state_rows=untyped(2))
    with pytest.raises(TypeError, match="has init_state, finish, state_rows or"):
        fpipe.Layer(lambda params, x: x, state_rows=True)


# --- static leaves ---


@every
def test_a_state_may_hold_static_leaves(make):
    def counting(params, x, *, state):
        assert state["mode"] == "sum"
        return x, {**state, "total": state["total"] + x.sum(0)}

    def finish(state):
        return {**state, "total": 2 * state["total"]}

    def init_state(x):
        return {"mode": "sum", "total": jnp.zeros(WIDTH)}

    layer = fpipe.Layer(
        counting, lambda key, x: (), "counting", init_state=init_state, finish=finish
    )
    pipe = make([layer, layer], chunks=4)
    params, state = pipe.init(KEY(0), X), pipe.init_state(X)
    _, new = pipe(params, X, state=state)
    want = {"mode": "sum", "total": 2 * X.sum(0)}
    assert [one.pop("mode") for one in new] == [want.pop("mode")] * 2
    assert_same(new, (want, want))
