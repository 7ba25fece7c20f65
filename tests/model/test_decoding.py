"""Decoding with caches: state of rows in pieces, handed over from call to call."""

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, Int

import fpipe
from tests.helpers import assert_same, dense, mse, noise, raises, shaped
from tests.model.test_needs import every, make_placed, make_scan, make_sequential, pipes

VOCABULARY, WIDTH, LENGTH, ROWS, PROMPT = 11, 8, 7, 4, 3
TOKENS = jax.random.randint(jax.random.key(1), (ROWS, PROMPT), 0, VOCABULARY, jnp.int32)
KEYS = jax.random.split(jax.random.key(2), ROWS)


Tokens: TypeAlias = Int[Array, "rows time"]
Values: TypeAlias = Float[Array, "rows time width"]
Caches: TypeAlias = dict[str, Float[Array, "rows length width"]]


@shaped
def embed(
    params: dict[str, Float[Array, "_ width"]], tokens: Tokens, *, step
) -> Values:
    """Tokens and their places; `step` is the place of the first."""
    count = tokens.shape[1]
    places = jax.lax.dynamic_slice_in_dim(params["places"], step, count)
    return params["tokens"][tokens] + places


def init_embed(key, x):
    return {
        "tokens": noise(key, (VOCABULARY, WIDTH)),
        "places": noise(jax.random.fold_in(key, 1), (LENGTH, WIDTH)),
    }


@shaped
def attend(
    params: Float[Array, "width 3*width"], x: Values, *, state: Caches, step
) -> tuple[Values, Caches]:
    """Causal attention to all that the cache has seen, by one head."""
    query, key, value = jnp.split(x @ params, 3, -1)
    keys = jax.lax.dynamic_update_slice_in_dim(state["keys"], key, step, 1)
    values = jax.lax.dynamic_update_slice_in_dim(state["values"], value, step, 1)
    place = step + jnp.arange(x.shape[1])[:, None]
    seen = jnp.arange(keys.shape[1]) <= place
    scores = jnp.where(seen, jnp.einsum("btd,bld->btl", query, keys), -1e9)
    y = x + jax.nn.softmax(scores, -1) @ values
    return y, {"keys": keys, "values": values}


def caches(x):
    return {
        name: jnp.zeros((x.shape[0], LENGTH, WIDTH), x.dtype)
        for name in ("keys", "values")
    }


@shaped
def choose(
    params: Float[Array, "width words"], x: Values, *, step, side=None
) -> Int[Array, "rows 1"]:
    """The next token of each row: the likeliest, or drawn with the row's own key."""
    scores = x[:, -1] @ params
    if side is None:
        return jnp.argmax(scores, -1)[:, None].astype(jnp.int32)
    draw = lambda key, row: jax.random.categorical(  # noqa: E731
        jax.random.fold_in(key, step), row, shape=(1,)
    )
    return jax.vmap(draw)(side, scores).astype(jnp.int32)


BLOCK = fpipe.Layer(
    attend,
    lambda key, x: noise(key, (WIDTH, 3 * WIDTH)),
    "block",
    init_state=caches,
    state_rows=True,
)
GPT = [
    fpipe.Layer(embed, init_embed, "embed"),
    BLOCK,
    BLOCK,
    fpipe.Layer(choose, lambda key, x: noise(key, (WIDTH, VOCABULARY)), "choose"),
]


def in_pieces(x):
    return fpipe.Microbatches([x[:2], x[2:]])


def whole(tree):
    """A pytree with its pieces joined, if it is in pieces."""
    if not isinstance(tree, fpipe.Microbatches):
        return tree
    return jax.tree.map(lambda *a: np.concatenate(jax.device_get(a)), *tree)


def decode(call, params, x, state, side=None, count=4, **options):
    """`count` tokens after the prompt, one array for each, and the last state."""
    tokens, step = [], 0
    for _ in range(count):
        new, state = call(params, x, state=state, side=side, step=step, **options)
        step += jax.tree.leaves(x)[0].shape[1]
        tokens.append(np.asarray(whole(new)))
        x = new
    return tokens, state


@functools.cache
def whole_batch_decoded(drawn):
    """The same without a pipeline, and without microbatches."""
    plain = fpipe.sequential(GPT)
    call = jax.jit(plain.__call__)
    params, state = plain.init(jax.random.key(0), TOKENS), plain.init_state(TOKENS)
    return decode(call, params, TOKENS, state, KEYS if drawn else None)


@pytest.mark.quick(cases=4)
@every
@pytest.mark.parametrize(
    ("pieces", "drawn", "donate"),
    [(False, False, False), (True, True, False), (True, False, True)],
)
def test_tokens_are_those_of_the_whole_batch(make, pieces, drawn, donate):
    plain = make is make_sequential
    pipe = make(GPT, chunks=2, **({} if plain else {"schedule": "forward_only"}))
    params = pipe.init(jax.random.key(0), TOKENS)
    call, options = pipe, {"donate_state": True} if donate else {}
    if plain:
        call, options = jax.jit(pipe.__call__), {}
    cut = in_pieces if pieces else lambda x: x
    x, side = cut(TOKENS), cut(KEYS) if drawn else None
    given = pipe.init_state(x)
    got, state = decode(call, params, x, given, side, **options)
    want, want_state = whole_batch_decoded(drawn)
    assert_same(got, want)
    # Greedy and drawn tokens differ, so the keys do something.
    other, _ = whole_batch_decoded(not drawn)
    assert not np.array_equal(np.stack(got), np.stack(other))
    assert state[0] is state[3] is None
    for k in (1, 2):
        assert isinstance(state[k], fpipe.Microbatches) == pieces
        assert_same(whole(state[k]), want_state[k])
    assert {a.is_deleted() for a in jax.tree.leaves(given)} == {bool(options)}


def decoder():
    """A pipe of two stages, its parameters, a batch in pieces, and their states."""
    pipe = make_placed(GPT, chunks=2, schedule="forward_only")
    params, x = pipe.init(jax.random.key(0), TOKENS), in_pieces(TOKENS)
    return pipe, params, x, pipe.init_state(x)


def test_each_shape_of_a_step_is_compiled_once():
    traced = []

    def counted(params, x, *, state, step):
        traced.append(x.shape)
        return attend(params, x, state=state, step=step)

    block = fpipe.Layer(
        counted, BLOCK.init, "block", init_state=caches, state_rows=True
    )
    pipe = make_placed([GPT[0], block, GPT[3]], balance=[1, 2], chunks=2)
    x = in_pieces(TOKENS)
    params, state = pipe.init(jax.random.key(0), x), pipe.init_state(x)
    traced.clear()
    decode(pipe, params, x, state, donate_state=True)
    # The shape of the prompt is known from `init`.
    assert traced == [(2, 1, WIDTH)]


def test_microbatches_may_have_caches_of_different_lengths():
    """A short and a long sequence: each has the room that it needs."""

    def init_state(x):
        return jnp.zeros((x.shape[0], x.shape[1] + 2, WIDTH))

    def apply(params, x, *, state, step):
        state = jax.lax.dynamic_update_slice_in_dim(state, x, step, 1)
        return x + state.sum(1, keepdims=True), state

    layer = fpipe.Layer(apply, init_state=init_state, state_rows=True)
    layers = [layer, fpipe.fn(lambda x: x * 2)]
    x = fpipe.Microbatches([noise(jax.random.key(n), (2, n, WIDTH)) for n in (1, 3)])
    params = ((), ())
    plain = fpipe.sequential(layers)
    pipe = make_placed(layers)
    state = pipe.init_state(x, params=params)
    assert [a.shape for a in state[0]] == [(2, 3, WIDTH), (2, 5, WIDTH)]
    y, state = pipe(params, x, state=state, step=0)
    want = plain(params, x, state=plain.init_state(x, params=params), step=0)
    assert_same((y, state), want)
    # `x` has one shape now, and the caches still have two.
    x = fpipe.Microbatches([piece[:, :1] for piece in y])
    want = plain(params, *jax.device_get((x,)), state=jax.device_get(state), step=3)
    assert_same(pipe(params, x, state=state, step=3), want)
    # In one program each slot of them has the room of the largest.
    x, state = jax.device_get((x, state))
    scan = make_scan(layers, chunks=2)
    assert_same(scan(scan.place(params), x, state=state, step=3), want)
    got = scan(scan.place(params), jnp.concatenate(x.pieces), state=state, step=3)
    assert_same(got, (jnp.concatenate(want[0].pieces), want[1]))


def remembering(**options):
    """A layer whose state of rows is the input that it had before."""

    def apply(params, x, *, state):
        return x + params * state, x

    return fpipe.Layer(
        apply,
        lambda key, x: noise(key, (x.shape[-1],)),
        "remembering",
        init_state=options.pop("init_state", jnp.zeros_like),
        state_rows=True,
        **options,
    )


@pipes
def test_a_step_of_training_takes_and_returns_pieces(make):
    layers = [dense(), remembering(finish=lambda state: 2 * state), dense()]
    x = fpipe.Microbatches([noise(jax.random.key(n), (2, 4)) for n in range(3)])
    t = jax.tree.map(jnp.cos, x)
    pipe, plain = make(layers), fpipe.sequential(layers)
    params = pipe.init(jax.random.key(0), x)
    own = pipe.gather(params)
    state = jax.tree.map(lambda a: a + 1, pipe.init_state(x))
    loss, grads = pipe.value_and_grad(mse)(params, x, t, state=state)
    want, want_grads = jax.jit(plain.value_and_grad(mse))(own, x, t, state=state)
    assert isinstance(loss[1][1], fpipe.Microbatches)
    assert_same((loss, pipe.gather(grads)), (want, want_grads))
    # Of arrays in one piece it is the same, cut by rows; and pieces beside arrays.
    one, targets, memory = map(whole, (x, t, state[1]))
    pipe = make(layers, chunks=3)
    step = pipe.value_and_grad(mse)
    (value, (_, left, _)), _ = step(params, one, targets, state=(None, state[1], None))
    assert_same((value, left), (want[0], want[1][1]))
    (value, (_, left, _)), _ = step(params, one, targets, state=(None, memory, None))
    assert_same(value, want[0])
    assert_same(left, whole(want[1][1]))


@every
def test_each_piece_of_a_random_state_is_drawn_anew(make):
    layers = [remembering(init_state=lambda x, *, key: noise(key, x.shape)), dense()]
    x = fpipe.Microbatches([jnp.ones((2, 4)), jnp.ones((2, 4))])
    state = make(layers).init_state(x, key=jax.random.key(3))
    want = fpipe.sequential(layers).init_state(x, key=jax.random.key(3))
    assert_same(state, want)
    one, other = jax.device_get(state[0]).pieces
    assert not np.array_equal(one, other)


def test_a_state_that_goes_on_to_a_later_stage_is_not_consumed():
    """It is a part of the boundary as it is, and read there when the stage has run."""

    def handing_on(params, x, *, state):
        return (state, x + state), x

    layer = fpipe.Layer(handing_on, init_state=jnp.ones_like, state_rows=True)
    pipe = make_placed([layer, fpipe.fn(lambda pair: pair[0] + 10 * pair[1])])
    x = fpipe.Microbatches([jnp.full((2, 4), 3.0), jnp.full((2, 4), 4.0)])
    params = ((), ())
    state = pipe.init_state(x, params=params)
    for want in ([41.0, 51.0], [63.0, 84.0]):
        y, state = pipe(params, x, state=state, donate_state=True)
        assert_same(y, fpipe.Microbatches([jnp.full((2, 4), n) for n in want]))


def test_only_a_call_that_is_told_so_consumes_its_state():
    """Calls that do and calls that do not have programs of their own."""
    pipe, params, x, state = decoder()
    tokens = []
    for donate in (False, True, False):
        y, new = pipe(params, x, state=state, step=0, donate_state=donate)
        assert {a.is_deleted() for a in jax.tree.leaves(state)} == {donate}
        tokens.append(jax.device_get(y))
        state = new if donate else state
    assert_same(tokens[1:], tokens[:1] * 2)


def test_a_state_of_all_microbatches_may_be_donated_too():
    def counting(params, x, *, state):
        return x * state, state + 1

    layer = fpipe.Layer(counting, init_state=lambda x: jnp.ones(4))
    pipe = make_placed([layer, fpipe.fn(lambda x: x)], chunks=2)
    x, params = jnp.ones((4, 4)), ((), ())
    state = pipe.init_state(x, params=params)
    y, new = pipe(params, x, state=state, donate_state=True)
    assert state[0].is_deleted()
    assert_same(new[0], jnp.full(4, 3.0))
    assert_same(y, jnp.repeat(jnp.array([1.0, 2.0]), 2)[:, None] * jnp.ones((1, 4)))


# --- errors ---


@every
def test_states_that_do_not_fit_are_refused(make):
    pipe = make([remembering(), dense()], chunks=2)
    x = jnp.ones((4, 4))
    params, state = pipe.init(jax.random.key(0), x), pipe.init_state(x)
    ready = in_pieces(x)
    pieces = pipe.init_state(ready)

    def refused(message, x, state):
        for f in (pipe, pipe.value_and_grad(jnp.mean)):
            with raises(ValueError, message):
                f(params, x, state=state)

    refused(
        "state: layer 0 'remembering' has state of rows (`state_rows=True`), and the "
        "call is given ready-made microbatches: its state is an `fpipe.Microbatches` "
        "too, as `pipe.init_state(x)` makes it for such an `x`",
        ready,
        state,
    )
    three = fpipe.Microbatches([jnp.ones((2, 4))] * 3)
    refused(
        "state: layer 0 'remembering' has 3 pieces of state (`fpipe.Microbatches`), "
        "but the call has 2 microbatches; give one for each",
        ready,
        (three, None),
    )
    long = fpipe.Microbatches([jnp.ones((2, 4)), jnp.ones((3, 4))])
    refused(
        "state: layer 0 'remembering' has state of rows (`state_rows=True`), and "
        "`state[0][1]` has 3 rows, but microbatch 1 has 2; give each array of it one "
        "entry for each row on its first axis, as `pipe.init_state(x)` does for an `x` "
        "of as many rows",
        ready,
        (long, None),
    )
    refused(
        "state: layer 0 'remembering': the state of microbatch 1 is int32[2,4], but "
        "that of microbatch 0 is float32[2,4]: all need the same structure, static "
        "leaves and dtypes",
        ready,
        (fpipe.Microbatches([pieces[0][0], jnp.ones((2, 4), jnp.int32)]), None),
    )

    def counting(params, x, *, state):
        return x, state

    counter = fpipe.Layer(counting, name="counter", init_state=lambda x: jnp.zeros(2))
    pipe = make([counter, dense()], chunks=2)
    params = pipe.place(((), params_of_dense(x)))
    refused(
        "state: layer 0 'counter' is given an `fpipe.Microbatches`, but all "
        "microbatches share its state; only state of rows (`state_rows=True`) has a "
        "piece for each microbatch",
        x,
        (fpipe.Microbatches([jnp.zeros(2), jnp.zeros(2)]), None),
    )


def params_of_dense(x):
    (params,) = fpipe.sequential([dense()]).init(jax.random.key(0), x)
    return params


def test_what_cannot_be_donated_is_refused():
    pipe = make_placed([remembering(), dense()], chunks=2)
    x = jnp.ones((4, 4))
    params, state = pipe.init(jax.random.key(0), x), pipe.init_state(x)
    call = "`pipe(params, x, donate_state=True)`: "
    with raises(
        ValueError,
        f"{call}the state of layer 0 'remembering' is in one piece, and every "
        "microbatch reads its own rows of it; give one piece for each microbatch, as "
        "`pipe.init_state(fpipe.Microbatches([…]))` makes them",
    ):
        pipe(params, x, state=state, donate_state=True)
    piece = jnp.zeros((2, 4))
    with raises(
        ValueError,
        f"{call}`state` has the same array in two places, and it can be donated once; "
        "make an array for each",
    ):
        twice = (fpipe.Microbatches([piece, piece]), None)
        pipe(params, x, state=twice, donate_state=True)
    for each in (pipe, make_scan([remembering(), dense()], chunks=2)):
        own, pieces = each.place(pipe.gather(params)), in_pieces(x)
        # XLA has words of its own for this, or ends the process.
        with raises(
            ValueError,
            f"{call}an array of `state` is in `x` too, and donating it would delete "
            "it there; copy it",
        ):
            each(own, pieces, state=(pieces, None), donate_state=True)
        with raises(
            ValueError,
            f"{call}an array of `state` was consumed by an earlier call; take the "
            "state that that call returned",
        ):
            gone = each.init_state(pieces)
            jax.tree.map(lambda a: a.delete(), gone)
            each(own, pieces, state=gone, donate_state=True)
    pieces = pipe.init_state(in_pieces(x))
    with raises(
        ValueError,
        f"{call}the call is differentiated, and its backwards read the state again; "
        "leave `donate_state` out",
    ):
        jax.grad(lambda p: pipe(p, x, state=pieces, donate_state=True)[0].sum())(params)
    with raises(ValueError, f"{call}the call is given no `state=`"):
        plain = make_placed([dense(), dense()])
        plain(plain.init(jax.random.key(0), x), x, donate_state=True)
    wrong: Any = "no"
    with pytest.raises(TypeError, match="donate_state='no'"):
        pipe(params, x, state=pieces, donate_state=wrong)
    # Nothing was consumed.
    y, _ = pipe(params, x, state=pieces)
    assert_same(y, pipe(params, x, state=state)[0])


def test_a_plan_of_ready_made_microbatches_makes_their_states():
    pipe = make_placed([remembering(), dense()])
    x = in_pieces(jnp.ones((4, 4)))
    params, state = pipe.init(jax.random.key(0), x), pipe.init_state(x)
    plan = pipe.plan(None, x)
    assert plan.as_dict() == pipe.plan(params, x, state=state).as_dict()
    assert plan.microbatches == 2
