"""Ready-made microbatches, whose shapes may differ, and aux for each row."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

import fpipe.testing
from tests.helpers import assert_same, noise, raises, shaped
from tests.model.test_microbatch import ONE_SAYS

# What a type checker would refuse is tested here.
untyped: Any = lambda value: value  # noqa: E731
both = pytest.mark.parametrize("make", [fpipe.sequential, fpipe.Pipe])
MAKE = {
    "sequential": lambda layers: fpipe.sequential(layers, chunks=5),
    "placed": lambda layers: fpipe.Pipe(layers, [1, 1], chunks=5),
    "scan": lambda layers: fpipe.Pipe(layers, [1, 1], chunks=5, executor="scan"),
}
every = pytest.mark.parametrize("executor", MAKE)
WIDTH = 3


def random(seed, *shape):
    return noise(jax.random.key(seed), shape)


Sequences: TypeAlias = Float[Array, "rows length width"]


@shaped
def attend(
    w: Float[Array, "width width"],
    x: Sequences,
    *,
    side: dict[str, Float[Array, "rows length"]],
) -> Sequences:
    h = jnp.tanh(x @ w) * side["mask"][..., None]
    return h - h.mean(1, keepdims=True)


@shaped
def score(
    w: Float[Array, "width width"], x: Float[Array, "*rows width"]
) -> Float[Array, "*rows width"]:
    return x @ w


@shaped
def weighted(y: Sequences, target: Sequences, row_weight: Float[Array, " rows"]):
    error = ((y - target) ** 2).sum((1, 2)) * row_weight
    tokens = jnp.float32(y.shape[1]) * row_weight.sum()
    return (error.sum(), tokens), {"error": fpipe.PerRow(error), "tokens": tokens}


def case():
    """Lengths and rows of microbatches."""
    shapes = [(2, 4), (2, 6), (1, 4), (2, 4)]
    params = (random(0, WIDTH, WIDTH), random(1, WIDTH, WIDTH))
    x = [random(2 + i, *s, WIDTH) for i, s in enumerate(shapes)]
    mask = [random(12 + i, *s) for i, s in enumerate(shapes)]
    target = [random(22 + i, *s, WIDTH) for i, s in enumerate(shapes)]
    weight = [jnp.arange(1.0, 1 + s[0]) for s in shapes]
    return params, x, mask, target, weight


def by_hand(params, x, mask, target, weight):
    """A plain loop: the sum of the losses over the sum of the weights."""
    totals, weights, auxes = [], [], []
    for x_i, m_i, t_i, w_i in zip(x, mask, target, weight, strict=True):
        y = score(params[1], attend(params[0], x_i, side={"mask": m_i}))
        (loss, tokens), aux = weighted(y, t_i, w_i)
        totals.append(loss)
        weights.append(jax.lax.stop_gradient(tokens))  # as `reduction` says
        auxes.append((aux["error"].value, tokens))
    return sum(totals) / sum(weights), auxes


@pytest.mark.quick(cases=1)
@every
def test_a_weighted_loss_is_exact_over_lengths_that_differ(executor):
    params, x, mask, target, weight = case()
    ready = fpipe.Microbatches
    pipe = MAKE[executor]([attend, score])
    step = pipe.value_and_grad(
        weighted, has_aux=True, reduction="weighted", argnums=(0, 1, 2, 3)
    )
    (loss, aux), (into_params, *others) = step(
        pipe.place(params),
        ready(x),
        ready(target),
        ready(weight),
        side={"mask": ready(mask)},
    )
    (want, auxes), wanted = jax.jit(
        jax.value_and_grad(by_hand, argnums=(0, 1, 3, 4), has_aux=True)
    )(params, x, mask, target, weight)
    assert_same((loss, pipe.gather(into_params)), (want, wanted[0]))
    assert_same(tuple(others), tuple(map(ready, wanted[1:])))
    errors, tokens = zip(*auxes, strict=True)
    assert_same(aux, {"error": ready(errors), "tokens": jnp.stack(tokens)})


@every
def test_a_call_returns_ready_made_outputs_and_is_differentiated(executor):
    params, x, mask, *_ = case()
    pipe = MAKE[executor]([attend, score])
    placed, ready = pipe.place(params), fpipe.Microbatches
    mask = {"mask": ready(mask)}

    def plain(params, x, mask):
        pieces = zip(x, mask["mask"], strict=True)
        return [
            score(params[1], attend(params[0], x_i, side={"mask": m}))
            for x_i, m in pieces
        ]

    assert_same(pipe(placed, ready(x), mask), ready(plain(params, x, mask)))

    def loss(run):
        def f(params, x, mask):
            y = run(params, x, mask)
            return sum((i + 1) * (y_i**2).sum() for i, y_i in enumerate(y))

        return jax.value_and_grad(f, argnums=(0, 1, 2))

    want = jax.jit(loss(plain))(params, ready(x), mask)
    value, (into_params, *others) = loss(pipe)(placed, ready(x), mask)
    assert_same((value, (pipe.gather(into_params), *others)), want)

    # Of one microbatch alone: the others are not asked for.
    def of_one(run):
        # Squared: the gradient of a plain sum is zero, up to rounding.
        return lambda x_1, p: (run(p, ready([x[0], x_1, *x[2:]]), mask)[1] ** 2).sum()

    want = jax.grad(of_one(plain))(x[1], params)
    assert_same(jax.grad(of_one(pipe))(x[1], placed), want)


@both
def test_what_is_cut_beside_ready_made_microbatches_makes_as_many(make):
    pipe = make([fpipe.fn(lambda x: x), fpipe.fn(lambda x: x)], chunks=7)
    x = fpipe.Microbatches([random(i, 3, 2 + i) for i in range(2)])
    t = fpipe.Chunk(random(5, 2, 6), axis=1)

    def loss(y, t, factor):
        return y.mean() * t.sum() * factor

    value, grad = pipe.value_and_grad(loss, argnums=2)(
        ((), ()), x, t, fpipe.NoChunk(jnp.float32(2))
    )
    want = sum(x[i].mean() * t.value[:, 3 * i : 3 * i + 3].sum() for i in range(2))
    assert_same(value, want)
    factors = jnp.repeat(jnp.stack([x[0].mean(), x[1].mean()]), 3)
    assert_same(grad, fpipe.Chunk(jnp.stack([factors, factors]), axis=1))


@both
def test_a_mean_weighs_by_the_rows_of_the_first_array_of_x(make):
    pipe = make([fpipe.fn(lambda x: x["a"])], chunks=1)
    pieces = [{"a": fpipe.Chunk(random(n, 4, n), 1), "b": jnp.ones(5)} for n in (1, 3)]
    value = pipe.evaluate(lambda y: y.mean())(((),), fpipe.Microbatches(pieces))
    first, second = (piece["a"].value.mean() for piece in pieces)
    assert_same(value, first / 4 + second * 3 / 4)


@every
def test_a_microbatch_without_rows_adds_nothing_to_a_sum(executor):
    pipe = MAKE[executor]([score, score])
    params = pipe.place((random(0, WIDTH, WIDTH), random(1, WIDTH, WIDTH)))
    step = pipe.value_and_grad(lambda y: (y**2).sum(), reduction="sum", argnums=(0, 1))
    x, empty = random(2, 2, WIDTH), jnp.ones((0, WIDTH))
    loss, (grads, into_x) = step(params, fpipe.Microbatches([x]))
    got = step(params, fpipe.Microbatches([empty, x]))
    assert_same(got, (loss, (grads, fpipe.Microbatches([empty, into_x[0]]))))


@both
def test_microbatches_may_hold_numbers_keys_and_static_leaves(make):
    def apply(x):
        noise = jax.random.normal(x["key"], x["v"].shape)
        return {"v": x["v"] * x["scale"] + noise, "tag": x["tag"], "n": x["scale"]}

    pieces = [
        {"v": random(i, 2 + i), "scale": jnp.float32(i), "tag": "a"} for i in range(2)
    ]
    pieces = [{**p, "key": jax.random.key(i)} for i, p in enumerate(pieces)]
    got = make([fpipe.fn(apply), fpipe.fn(lambda x: x)], chunks=1)(
        ((), ()), fpipe.Microbatches(pieces)
    )
    want = [apply(piece) for piece in pieces]
    assert [y.pop("tag") for y in got] == [y.pop("tag") for y in want] == ["a", "a"]
    assert_same(got, fpipe.Microbatches(want))


@both
def test_states_and_keys_go_from_one_ready_made_microbatch_to_the_next(make):
    def apply(params, x, *, state, key):
        mask = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.where(mask, x, 0) + state, state + x.sum()

    layer = fpipe.Layer(apply, init_state=lambda x: jnp.float32(0))
    pipe = make([layer, fpipe.fn(lambda x: x)], chunks=1)
    x = fpipe.Microbatches([random(n, n) for n in (3, 5, 2)])
    key, state = jax.random.key(3), pipe.init_state(x, params=((), ()))
    y, (state, _) = pipe(((), ()), x, key=key, state=state)
    before = np.cumsum([0.0, *(float(piece.sum()) for piece in x)])
    assert_same(state, jnp.float32(before[-1]))
    for i, piece in enumerate(x):
        own = jax.random.fold_in(jax.random.fold_in(key, 0), i)
        mask = jax.random.bernoulli(own, 0.5, piece.shape)
        assert_same(y[i], jnp.where(mask, piece, 0) + jnp.float32(before[i]))


@every
def test_state_that_follows_the_rows_of_ready_made_microbatches_is_refused(executor):
    def make(state_rows):
        layer = fpipe.Layer(
            lambda params, x, *, state: (x + state, x),
            init_state=jnp.zeros_like,
            name="follows",
            state_rows=state_rows,
        )
        return MAKE[executor]([layer, fpipe.fn(lambda x: x)])

    x = fpipe.Microbatches([jnp.ones((2, WIDTH)), jnp.ones((2, WIDTH))])
    state = (jnp.zeros((2, WIDTH)), None)
    params = ((), ())
    shape = f"float32[2,{WIDTH}]"
    with raises(
        ValueError,
        f"layer 0 'follows': its state follows the rows: it is {shape} for 2 rows and "
        f"float32[4,{WIDTH}] for 4, and all 2 microbatches would share its entries; "
        "write `fpipe.Layer(..., state_rows=True)`, and each microbatch gets the "
        "entries of its own rows (or `state_rows=False`, if all should share all "
        "entries)",
    ):
        pipe = make(None)
        pipe(pipe.place(params), x, state=state)
    # The second microbatch takes what the first one left.
    meant = make(False)
    y, (after, _) = meant(meant.place(params), x, state=state)
    assert_same(y, fpipe.Microbatches([x[0], 2 * x[0]]))
    assert_same(after, x[0])


def test_each_shape_is_compiled_once():
    traced = []

    def apply(w, x):
        traced.append(x.shape)
        return x * w

    pipe = fpipe.Pipe([apply, fpipe.fn(lambda x: x)], [1, 1], schedule="1f1b")
    x = fpipe.Microbatches([jnp.ones((1, n)) for n in (2, 3, 2, 3, 2)])
    params = pipe.place((jnp.float32(2), ()))
    step = pipe.value_and_grad(jnp.sum, reduction="sum")
    assert_same(step(params, x), (jnp.float32(24), (jnp.float32(12), ())))
    assert sorted(traced) == [(1, 2), (1, 3)]
    x = fpipe.Microbatches([jnp.ones((1, n)) for n in (3, 2)])
    assert_same(step(params, x)[0], jnp.float32(10))
    assert len(traced) == 2


def test_anomalies_are_found_in_ready_made_microbatches():
    def root(x):
        return jnp.sqrt(x)

    layers = [fpipe.fn(root), fpipe.fn(lambda x: 2 * x)]
    pipe = fpipe.Pipe(layers, [1, 1], detect_anomaly=True)
    params = pipe.place(((), ()))
    x = fpipe.Microbatches([jnp.ones((2, n)) for n in (3, 4)])
    step = pipe.value_and_grad(jnp.sum, reduction="sum", argnums=1)
    assert_same(step(params, x)[1], x)
    assert_same(jax.grad(lambda x: sum(y.sum() for y in pipe(params, x)))(x), x)
    bad = fpipe.Microbatches([x[0], x[1].at[1, 2].set(0)])
    for f in (
        lambda: step(params, bad),
        lambda: jax.grad(lambda x: sum(y.sum() for y in pipe(params, x)))(bad),
    ):
        with pytest.raises(FloatingPointError, match=r"'root', microbatch 1, backward"):
            f()


def test_a_plan_tells_the_shapes_of_ready_made_microbatches():
    params, x, mask, target, weight = case()
    ready = fpipe.Microbatches
    pipe = fpipe.Pipe([attend, score], [1, 1], chunks=5)
    plan = pipe.plan(
        params,
        ready(x),
        ready(target),
        ready(weight),
        loss_fn=weighted,
        has_aux=True,
        reduction="weighted",
        side={"mask": ready(mask)},
    )
    assert plan.microbatches == 4
    shapes = "float32[2,4,3], float32[2,6,3], float32[1,4,3]"
    assert (plan.inputs[0].name, plan.inputs[0].value) == ("x", shapes)
    assert [row.gets for row in plan.inputs] == ["ready"] * 4
    assert f"x             {shapes}  its own, ready-made" in str(plan).splitlines()
    assert (
        fpipe.layer_costs(
            [attend, score], ready(x), side={"mask": ready(mask)}, params=params
        ).microbatches
        == 4
    )


def test_microbatches_is_a_pytree_and_a_sequence():
    x = fpipe.Microbatches([{"a": jnp.ones(2)}, {"a": jnp.ones(3)}])
    doubled = jax.tree.map(lambda a: 2 * a, x)
    assert type(doubled) is fpipe.Microbatches
    assert len(doubled) == 2
    assert [piece["a"].shape for piece in doubled] == [(2,), (3,)]
    assert_same(doubled[1], {"a": jnp.full(3, 2.0)})


A, B = jnp.ones((2, 3)), jnp.ones((1, 3))
OF_AUX = (
    "what has an entry for each row goes in `fpipe.PerRow(leaf)`, with the rows on "
    "axis 0, and other leaves of aux are stacked over microbatches"
)
TOO_OR_WHOLE = (
    "give it as fpipe.Microbatches([…]) too, or wrap it in fpipe.NoChunk(…), if it "
    "goes whole to every microbatch"
)
WRONG = {
    "no list": (
        lambda: fpipe.Microbatches(untyped(A)),
        TypeError,
        "`fpipe.Microbatches(pieces)`: a list with what each microbatch gets is "
        "needed, got an ArrayImpl",
    ),
    "empty": (
        lambda: fpipe.Microbatches([]),
        ValueError,
        "`fpipe.Microbatches([])`: at least one microbatch is needed",
    ),
    "unequal numbers": (
        lambda: call(fpipe.Microbatches([A, A]), {"m": fpipe.Microbatches([A] * 3)}),
        ValueError,
        "`side['m']` has 3 ready-made microbatches, but `x` has 2: all "
        "`fpipe.Microbatches` of a call have equally many",
    ),
    "structure": (
        lambda: call(fpipe.Microbatches([{"a": A}, {"b": A}])),
        ValueError,
        "`x`: the ready-made microbatch 1 is {'b': float32[2,3]}, but microbatch 0 is "
        "{'a': float32[2,3]}: all need the same structure and static leaves",
    ),
    "static leaves": (
        lambda: call(fpipe.Microbatches([(A, 1), (A, 2)])),
        ValueError,
        "`x`: the ready-made microbatch 1 is (float32[2,3], 2), but microbatch 0 is "
        "(float32[2,3], 1): all need the same structure and static leaves",
    ),
    "dtypes": (
        lambda: call(fpipe.Microbatches([A, A.astype(jnp.int32)])),
        ValueError,
        "`x`: the ready-made microbatch 1 has int32[2,3] where microbatch 0 has "
        "float32[2,3]: all need the same dtype",
    ),
    "nested": (
        lambda: call({"a": fpipe.Microbatches([A, [fpipe.NoChunk(A)]])}),
        ValueError,
        "`x['a']`: the ready-made microbatch 1 is [float32[2,3]], but microbatch 0 is "
        "float32[2,3]: all need the same structure and static leaves",
    ),
    "whole inside": (
        lambda: call(fpipe.Microbatches([[fpipe.NoChunk(A)]])),
        ValueError,
        f"`x[0]`: an fpipe.NoChunk inside of an fpipe.Microbatches; {ONE_SAYS}",
    ),
    "inside": (
        lambda: call(fpipe.NoChunk(fpipe.Microbatches([A]))),
        ValueError,
        f"`x`: an fpipe.Microbatches inside of an fpipe.NoChunk; {ONE_SAYS}",
    ),
    "cut beside it": (
        lambda: call(fpipe.Microbatches([A] * 4), jnp.ones(9)),
        ValueError,
        "`side` of shape (9,) makes 3 microbatches of up to 3 rows, but `x` has 4 "
        f"ready-made ones; {TOO_OR_WHOLE}",
    ),
    "other rows beside it": (
        lambda: call(fpipe.Microbatches([A, B, A]), jnp.ones(5)),
        ValueError,
        "`side` of shape (5,) is cut into microbatches of 2, 2, 1 rows, but those of "
        f"`x` have 2, 1, 2; {TOO_OR_WHOLE}",
    ),
    "no rows in a mean": (
        lambda: aux_of(lambda y: (y.mean(), ()), x=fpipe.Microbatches([A, A[:0]])),
        ValueError,
        '`reduction="mean"`: the ready-made microbatch 1 has no rows; leave it out, or '
        'let `loss_fn` return a sum, and use `reduction="sum"`, or `"weighted"` with '
        "`(sum, weight)`",
    ),
    "per row as input": (
        lambda: call([fpipe.PerRow(A)]),
        ValueError,
        "`x[0]` is an fpipe.PerRow, which is for the aux of a loss function; give the "
        "array itself",
    ),
    "per row of a number": (
        lambda: aux_of(lambda y: (y.sum(), [fpipe.PerRow({"a": y.sum()})])),
        TypeError,
        "`loss_fn` returned an `fpipe.PerRow` in aux of float32[], which has no rows; "
        "leave the wrapper out, and aux is stacked over microbatches",
    ),
    "a chunk in aux": (
        lambda: aux_of(lambda y: (y.sum(), fpipe.Chunk(y, 1))),
        TypeError,
        f"`loss_fn` returned an fpipe.Chunk in aux: {OF_AUX}",
    ),
    "what goes whole in aux": (
        lambda: aux_of(lambda y: (y.sum(), [fpipe.NoChunk(y)])),
        TypeError,
        f"`loss_fn` returned an fpipe.NoChunk in aux: {OF_AUX}",
    ),
    "per row of per row": (
        lambda: aux_of(lambda y: (y.sum(), fpipe.PerRow([fpipe.PerRow(y)]))),
        TypeError,
        f"`loss_fn` returned an fpipe.PerRow in an fpipe.PerRow: {OF_AUX}",
    ),
    "microbatches per row": (
        lambda: aux_of(lambda y: (y.sum(), fpipe.PerRow(fpipe.Microbatches([y])))),
        TypeError,
        f"`loss_fn` returned an fpipe.Microbatches in an fpipe.PerRow: {OF_AUX}",
    ),
}


def call(x, side=None):
    return fpipe.Pipe([fpipe.fn(lambda x, *, side: x)], chunks=4)(((),), x, side)


def aux_of(loss, executor="placed", x=None):
    x = jnp.ones((4, 3)) if x is None else x
    pipe = fpipe.Pipe([fpipe.fn(lambda x: x)] * 2, chunks=2, executor=executor)
    return pipe.evaluate(loss, has_aux=True)(pipe.place(((), ())), x)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_uses_are_named(wrong):
    f, kind, text = WRONG[wrong]
    with raises(kind, text):
        f()


# --- entries for each row ---


@pytest.mark.quick
@every
def test_what_a_loss_has_for_each_row_is_concatenated(executor):
    def loss(y, t):
        rows = fpipe.PerRow({"hit": y.argmax(-1) == t, "y": y, "none": None})
        return y.mean(), {"rows": rows, "max": y.max(), "name": "a", "flag": True}

    pipe = MAKE[executor]([score, score])
    n = 7
    x, t = random(5, n, WIDTH), jnp.arange(n) % WIDTH
    params = (random(0, WIDTH, WIDTH), random(1, WIDTH, WIDTH))
    y = x @ params[0] @ params[1]
    pieces = [y[k : k + 2].max() for k in range(0, n, 2)]
    placed = pipe.place(params)
    _, aux = pipe.evaluate(loss, has_aux=True)(placed, x, t)
    (_, same), _ = pipe.value_and_grad(loss, has_aux=True)(placed, x, t)
    for got in (aux, same):
        assert got.pop("name") == "a"
        rows = {"hit": y.argmax(-1) == t, "y": y, "none": None}
        want = {"rows": rows, "max": jnp.stack(pieces), "flag": jnp.array([True] * 4)}
        assert_same(got, want)


def test_per_row_aux_keeps_its_structure_over_ragged_rows():
    def loss(y):
        odd = {"odd": y} if y.shape[0] == 1 else {}
        return y.mean(), {"a": fpipe.PerRow(y), **odd}

    pipe = fpipe.Pipe([fpipe.fn(lambda x: x)], chunks=2)
    with pytest.raises(ValueError, match=r"aux of microbatch 1 is .* are joined"):
        pipe.evaluate(loss, has_aux=True)(((),), jnp.ones((3, 2)))


# --- weights over several calls ---


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_a_weighted_loss_is_exact_over_several_calls(executor):
    params, x, mask, target, weight = case()
    ready = fpipe.Microbatches
    pipe = MAKE[executor]([attend, score])

    def summed(y, target, row_weight):
        (total, tokens), _ = weighted(y, target, row_weight)
        return total, tokens

    step = pipe.value_and_grad(summed, has_aux=True, reduction="sum")
    placed, grads, sums, weights = pipe.place(params), None, [], []
    for part in (slice(0, 2), slice(2, None)):
        (total, tokens), grads = step(
            placed,
            ready(x[part]),
            ready(target[part]),
            ready(weight[part]),
            side={"mask": ready(mask[part])},
            grads=grads,
        )
        sums.append(total)
        weights.append(tokens.sum())
    all_tokens = float(sum(weights))
    grads = jax.tree.map(lambda g: g / all_tokens, grads)
    (want, _), wanted = jax.value_and_grad(by_hand, has_aux=True)(
        params, x, mask, target, weight
    )
    assert_same((sum(sums) / all_tokens, pipe.gather(grads)), (want, wanted))
