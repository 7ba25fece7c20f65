"""What a user calls: `pipe(…)`, `value_and_grad`, `evaluate` and JAX's own
transformations; what they return and refuse.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fpipe
import fpipe.optim
from tests.helpers import (
    WIDTH,
    Case,
    assert_same,
    dense,
    models,
    mse,
    noise,
    raises,
    sided,
)

DEVICES = jax.devices()
LAYERS = [dense(), dense()]
CHUNKS = 3  # of 10 rows: 4, 4, 2
CASE = Case(LAYERS, CHUNKS)
X, TARGET = CASE.x, CASE.target
REFERENCE, PARAMS = CASE.reference, CASE.params()


PER_LAYER = "a tuple with one entry per layer is needed, 2 in all, got"
DELETED = (
    "a Pipe was called with params that are deleted: an earlier call consumed them "
    '(`donate=["params"]`, `place(params, donate=True)`, or the `donate_argnums` of a '
    "`jax.jit`); take the params that it returned"
)
NO_PAIR = 'with reduction="weighted" returns `(sum, weight)`, got float32[]'


def fresh(layers=None, **options):
    """A pipe of two stages on devices 3 and 1, that nobody has called."""
    layers = LAYERS if layers is None else layers
    options = {
        "balance": [1, len(layers) - 1],
        "devices": [DEVICES[3], DEVICES[1]],
        "chunks": CHUNKS,
    } | options
    return fpipe.Pipe(layers, **options)


def with_params(layers=None, **options):
    """A fresh pipe, its placed parameters, the reference, its parameters."""
    pipe = fresh(layers, **options)
    case = Case(list(pipe.layers), pipe.chunks)
    params = PARAMS if layers is None else case.params()
    return pipe, pipe.place(params), case.reference, params


def plain(params, x):
    """The model `LAYERS` written by hand, over the whole batch at once."""
    for p in params:
        x = jnp.tanh(jnp.dot(x, p["w"]) + p["b"])
    return x


def devices_of(tree):
    return [leaf.devices() for leaf in jax.tree.leaves(tree)]


def said(error):
    """The text of an error and of its notes."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def notes(error):
    """What the library says of an error: its notes, and where JAX has made a text of
    what a callback raised, the lines in it.
    """
    lines = [*str(error).splitlines(), *getattr(error, "__notes__", ())]
    return [line for line in lines if line.startswith("fpipe: ")]


@functools.cache
def wanted():
    return plain(PARAMS, X), REFERENCE.value_and_grad(mse)(PARAMS, X, TARGET)


def assert_works(pipe, params):
    """A pipe of `LAYERS`, called again, computes what the reference computes."""
    assert_same(
        (pipe(params, X), pipe.value_and_grad(mse)(params, X, TARGET)), wanted()
    )


@functools.cache
def warm():
    """A pipe that many tests share, and that ran."""
    pipe, placed, reference, params = with_params()
    assert_works(pipe, placed)
    return pipe, placed, reference, params


SIDED = [dense(), sided()]
SIDE = Case(SIDED, CHUNKS).side


@functools.cache
def warm_sided():
    return with_params(SIDED)


# --- reductions ---

MASK = jnp.asarray(
    [1, 0, 0, 0, 1, 1, 1, 0, 0, 1], jnp.float32
)  # sums of the microbatches: 1, 3, 1


def masked(y, t, mask):
    return jnp.sum(mask[:, None] * (y - t) ** 2), jnp.sum(mask)


def masked_mean(y, t, mask):
    total, weight = masked(y, t, mask)
    return total / weight


REDUCTIONS = {
    "mean": (mse, mse, (TARGET,)),
    "sum": (
        lambda y, t: jnp.sum((y - t) ** 2),
        lambda y, t: jnp.sum((y - t) ** 2),
        (TARGET,),
    ),
    "weighted": (masked, masked_mean, (TARGET, MASK)),
}


@pytest.mark.quick(cases=2)
@pytest.mark.parametrize(
    ("reduction", "chunks"),
    [("mean", 3), ("mean", 4), ("sum", 3), ("weighted", 3), ("weighted", 1)],
)
def test_loss_and_gradients_equal_those_of_plain_jax_over_the_whole_batch(
    reduction, chunks
):
    loss_fn, whole, targets = REDUCTIONS[reduction]
    pipe, placed, reference, params = with_params(chunks=chunks)
    numbers = (0, 1, 2)
    want = jax.value_and_grad(lambda p, x, *t: whole(plain(p, x), *t), numbers)(
        params, X, *targets
    )
    options = {"reduction": reduction, "argnums": numbers}
    assert_same(pipe.value_and_grad(loss_fn, **options)(placed, X, *targets), want)
    assert_same(reference.value_and_grad(loss_fn, **options)(params, X, *targets), want)
    assert_same(
        pipe.evaluate(loss_fn, reduction=reduction)(placed, X, *targets), want[0]
    )


def test_a_weighted_loss_is_not_the_mean_of_means():
    pipe, placed, _, params = with_params()
    got = float(pipe.evaluate(masked, reduction="weighted")(placed, X, TARGET, MASK))
    means = pipe.evaluate(masked_mean)(placed, X, TARGET, MASK)
    assert abs(got - float(means)) > 1e-3
    assert got == pytest.approx(
        float(masked_mean(plain(params, X), TARGET, MASK)), rel=1e-5
    )


def test_the_weight_carries_no_gradient():
    """`(sum, weight)`, which both depend on y: the weight counts, and is not
    differentiated.
    """
    pipe = fresh([fpipe.Layer(lambda p, x: x * p), fpipe.Layer(lambda p, x: x + p)])
    params = pipe.place((jnp.float32(2), jnp.float32(1)))
    x = jnp.arange(10.0)[:, None]
    step = pipe.value_and_grad(lambda y: (y.sum(), y.max()), reduction="weighted")
    loss, grads = step(params, x)
    total, weight = float((2 * x + 1).sum()), 7 + 15 + 19.0
    assert float(loss) == pytest.approx(total / weight)
    assert float(grads[0]) == pytest.approx(float(x.sum()) / weight)
    assert float(grads[1]) == pytest.approx(10 / weight)


def test_a_mean_weighs_microbatches_by_the_rows_of_the_first_array_of_x():
    """Only `b` is cut: `a` goes whole to every microbatch and has no rows to count."""
    pipe = fpipe.Pipe([fpipe.fn(lambda x: x["a"].sum() * x["b"])], chunks=4)
    x = {"a": fpipe.NoChunk(jnp.ones(3)), "b": jnp.arange(10.0)}
    assert float(pipe.evaluate(jnp.mean)(((),), x)) == pytest.approx(
        13.5
    )  # 3, 3, 3 and 1 rows of 3 * mean(0..9)
    assert float(pipe.evaluate(lambda y: y[-1])(((),), x)) == pytest.approx(
        3 * (0.3 * (2 + 5 + 8) + 0.1 * 9)
    )


@pytest.mark.parametrize(
    ("value", "loss"),
    [(3, 3.0), (True, 1.0), (jnp.int32(2), 2.0)],
    ids=["int", "bool", "int32"],
)
def test_a_loss_without_fraction_becomes_a_float(value, loss):
    pipe, placed, _, _ = with_params()
    got, grads = pipe.value_and_grad(lambda y: value)(placed, X)
    assert (got.shape, got.dtype) == ((), jnp.float32)
    assert float(got) == pytest.approx(loss)
    assert_same(grads, jax.tree.map(jnp.zeros_like, placed))


# --- auxiliary output ---


def with_aux(y, t):
    aux = {
        "rows": y.shape[0],
        "half": 0.5,
        "flag": True,
        "max": y.max(),
        "sum": y.sum(0),
        "none": None,
        "tag": "left",
    }
    return mse(y, t), aux


@pytest.mark.parametrize("call", ["value_and_grad", "evaluate"])
def test_aux_is_stacked_on_a_new_axis_of_microbatches(call):
    pipe, placed, reference, params = with_params()
    got = getattr(pipe, call)(with_aux, has_aux=True)(placed, X, TARGET)
    want = getattr(reference, call)(with_aux, has_aux=True)(params, X, TARGET)
    if call == "value_and_grad":
        assert_same(got[1], want[1])
        got, want = got[0], want[0]
    assert_same(got[0], want[0])
    aux, expected = got[1], want[1]
    assert aux.pop("tag") == expected.pop("tag") == "left"
    assert_same(aux, expected)
    pieces = [
        plain(params, X)[rows] for rows in (slice(0, 4), slice(4, 8), slice(8, 10))
    ]
    assert_same(
        aux,
        {
            "rows": np.asarray([4, 4, 2], np.int32),
            "half": np.full(3, 0.5, np.float32),
            "flag": np.asarray([True] * 3),
            "max": jnp.stack([y.max() for y in pieces]),
            "sum": jnp.stack([y.sum(0) for y in pieces]),
            "none": None,
        },
    )


def test_a_weighted_loss_may_have_aux():
    pipe, placed, _, params = with_params()
    step = pipe.value_and_grad(
        lambda *a: (masked(*a), a[2].sum()), has_aux=True, reduction="weighted"
    )
    (loss, aux), grads = step(placed, X, TARGET, MASK)
    want = jax.value_and_grad(lambda p: masked_mean(plain(p, X), TARGET, MASK))(params)
    assert_same((loss, grads), want)
    np.testing.assert_array_equal(aux, [1, 3, 1])


def test_aux_of_one_microbatch_has_an_axis_too():
    pipe, placed, _, params = with_params(chunks=1)
    _, aux = pipe.evaluate(lambda y: (y.sum(), y), has_aux=True)(placed, X)
    assert_same(aux, plain(params, X)[None])


@pytest.mark.parametrize("call", ["value_and_grad", "evaluate"])
def test_aux_whose_shape_differs_between_microbatches_is_refused(call):
    pipe, placed, _, _ = with_params()
    with pytest.raises(
        ValueError,
        match="they are stacked over microbatches, so reduce what depends on",
    ) as caught:
        getattr(pipe, call)(lambda y: (y.sum(), y), has_aux=True)(placed, X)
    assert (
        "aux of microbatch 2 has the shapes [(2, 4)], that of microbatch 0 [(4, 4)]"
        in str(caught.value)
    )
    assert str(caught.value).startswith(f"`{call}(has_aux=True)`")


@pytest.mark.parametrize(
    ("small", "large", "differ"),
    [
        ("few", "many", ["'few'", "'many'"]),
        (1.0, (1.0, 2.0), ["float32[]", "(float32[], float32[])"]),
    ],
    ids=["static", "structure"],
)
def test_aux_that_differs_otherwise_is_refused_and_says_how(small, large, differ):
    pipe, placed, _, _ = with_params()
    with pytest.raises(ValueError, match="aux of microbatch 2") as caught:
        pipe.evaluate(
            lambda y: (y.sum(), small if y.shape[0] == 2 else large), has_aux=True
        )(placed, X)
    assert [text for text in differ if text not in str(caught.value)] == []


# --- argnums ---


@pytest.mark.parametrize("argnums", [0, 2, (1,), (1, 0), [3, 0], (0, 1, 2, 3)], ids=str)
def test_argnums_choose_among_params_x_and_targets(argnums):
    pipe, placed, reference, params = with_params()
    options = {"argnums": argnums, "reduction": "weighted"}
    got = pipe.value_and_grad(masked, **options)(placed, X, TARGET, MASK)
    numbers = argnums if isinstance(argnums, int) else tuple(argnums)
    want = jax.value_and_grad(
        lambda p, x, t, m: masked(plain(p, x), t, m)[0] / MASK.sum(), numbers
    )(params, X, TARGET, MASK)
    assert_same(got, want)
    assert_same(
        reference.value_and_grad(masked, **options)(params, X, TARGET, MASK), want
    )


def test_integer_leaves_give_float0_and_static_leaves_none():
    def embed(p, x):
        return p["table"][x["word"]] * x["scale"]

    layers = [
        fpipe.Layer(embed),
        fpipe.Layer(lambda p, x: x * p[0] + p[1].astype(x.dtype)),
    ]
    params = (
        {"table": jnp.linspace(0, 1, 6), "size": jnp.int32(6)},
        (jnp.float32(2), jnp.asarray([1])),
    )
    x = {
        "word": jnp.arange(10) % 6,
        "scale": jnp.linspace(1, 2, 10),
        "tag": "left",
        "none": None,
    }
    target = jnp.arange(10)
    pipe = fresh(layers)

    def loss_fn(y, t):
        return jnp.mean((y - t.astype(y.dtype)) ** 2)

    loss, (grads, gx, gt) = pipe.value_and_grad(loss_fn, argnums=(0, 1, 2))(
        pipe.place(params), x, target
    )
    want = fpipe.sequential(layers, chunks=CHUNKS).value_and_grad(
        loss_fn, argnums=(0, 1, 2)
    )(params, x, target)
    assert_same((loss, (grads, gx, gt)), want)
    float0 = jax.dtypes.float0
    assert (
        grads[0]["size"].dtype
        == grads[1][1].dtype
        == gx["word"].dtype
        == gt.dtype
        == float0
    )
    assert (grads[1][1].shape, gx["word"].shape, gt.shape) == ((1,), (10,), (10,))
    assert gx["tag"] is gx["none"] is None

    def whole(table, scale):
        return loss_fn(table[x["word"]] * scale * 2 + 1, target)

    want = jax.value_and_grad(whole, (0, 1))(params[0]["table"], x["scale"])
    assert_same((loss, (grads[0]["table"], gx["scale"])), want)


WRONG_NUMBERS = {
    "float": (2.0, TypeError, "must be ints"),
    "string": ("0", TypeError, "must be ints"),
    "in a list": ([0, 1.0], TypeError, "must be ints"),
    "bool": (True, TypeError, "must be ints"),
    "none": (None, TypeError, "must be ints"),
    "a set": ({0}, TypeError, "must be ints"),
    "negative": (-1, ValueError, "counted from 0, each once, and at least one"),
    "negative among": (
        (0, -1),
        ValueError,
        "counted from 0, each once, and at least one",
    ),
    "repeated": ((0, 1, 0), ValueError, "counted from 0, each once, and at least one"),
    "empty": ((), ValueError, "counted from 0, each once, and at least one"),
}


@pytest.mark.parametrize("name", WRONG_NUMBERS)
def test_wrong_argnums_are_refused_at_once(name):
    argnums, kind, text = WRONG_NUMBERS[name]
    with pytest.raises(kind) as caught:
        fresh().value_and_grad(mse, argnums=argnums)
    assert text in str(caught.value)
    assert str(caught.value).startswith(
        f"`value_and_grad(argnums={argnums!r})`: numbers of (params, x, *targets)"
    )


@pytest.mark.parametrize("argnums", [3, (0, 3), 7])
def test_argnums_out_of_range_say_what_the_range_is(argnums):
    pipe, placed, _, _ = with_params()
    with pytest.raises(ValueError, match="the call has 3 arguments") as caught:
        pipe.value_and_grad(mse, argnums=argnums)(placed, X, TARGET)
    assert str(caught.value) == (
        f"`value_and_grad(argnums={argnums!r})`: the call has 3 arguments (params, x, "
        "*targets), so numbers go from 0 to 2"
    )


# --- what a loss may not be ---

WRONG_LOSSES = {
    "vector": (
        lambda y, t: y[:, 0],
        {},
        "must return a scalar loss, got float32[4]: reduce it, with its mean",
    ),
    "one element": (
        lambda y, t: mse(y, t)[None],
        {},
        "must return a scalar loss, got float32[1]: reduce it",
    ),
    "tuple": (
        lambda y, t: (mse(y, t), 1),
        {},
        "must return a scalar loss, got (float32[], 1); with an auxiliary output say "
        "has_aux=True",
    ),
    "complex": (
        lambda y, t: mse(y, t).astype(jnp.complex64),
        {},
        "must return a real loss, got complex64[]: take its absolute",
    ),
    "none": (lambda y, t: None, {}, "must return a scalar loss, got None"),
    "string": (lambda y, t: "low", {}, "must return a scalar loss, got 'low'"),
    "list": (
        lambda y, t: [mse(y, t)],
        {},
        "must return a scalar loss, got [float32[]]",
    ),
    "no aux": (
        mse,
        {"has_aux": True},
        "with has_aux=True returns `(loss, aux)`, got float32[]",
    ),
    "aux of two": (
        lambda y, t: (mse(y, t), 1, 2),
        {"has_aux": True},
        "with has_aux=True returns `(loss, aux)`, got (float32[], 1, 2)",
    ),
    "no weight": (
        mse,
        {"reduction": "weighted"},
        NO_PAIR,
    ),
    "vector weight": (
        lambda y, t: (mse(y, t), y[:, 0]),
        {"reduction": "weighted"},
        "must return a scalar weight, got float32[4]: reduce it",
    ),
    "aux before weight": (
        lambda y, t: (mse(y, t), y.size),
        {"reduction": "weighted", "has_aux": True},
        NO_PAIR,
    ),
}


@pytest.mark.parametrize("call", ["value_and_grad", "evaluate"])
@pytest.mark.parametrize("name", WRONG_LOSSES)
def test_a_loss_of_the_wrong_kind_is_refused(name, call):
    loss_fn, options, text = WRONG_LOSSES[name]
    pipe, placed, _, _ = with_params()
    with pytest.raises(TypeError) as caught:
        getattr(pipe, call)(loss_fn, **options)(placed, X, TARGET)
    assert str(caught.value).startswith(f"`loss_fn` {text}")
    assert notes(caught.value) == ["fpipe: in loss_fn, stage 1, microbatch 0"]


@pytest.mark.parametrize("call", ["value_and_grad", "evaluate"])
def test_a_loss_with_other_parameters_is_told_how_it_is_called(call):
    """One that is written as for `jax.grad`, a target that is left out; an error inside
    of it stays as it is.
    """
    pipe, placed, _, _ = with_params()
    head = (
        "`loss_fn` is called as `loss_fn(y, *targets)`, where y is the output of the "
        "last layer, here with "
    )

    def error(y, t):
        return jnp.mean((y - t) ** 2)

    def as_for_grad(params, x, target):
        return error(x, target)

    def inside(y, target):
        return error(y)  # type: ignore[call-arg]

    run = getattr(pipe, call)
    for fn, targets, text in (
        (as_for_grad, [TARGET], "1 target: "),
        (error, [], "0 targets: "),
    ):
        with pytest.raises(TypeError) as caught:
            run(fn)(placed, X, *targets)
        assert str(caught.value).startswith(head + text)
        assert "missing 1 required positional argument" in str(caught.value)
        assert notes(caught.value) == ["fpipe: in loss_fn, stage 1, microbatch 0"]
    with pytest.raises(TypeError, match=r"^test_a_loss\S+error\(\) missing 1 required"):
        run(inside)(placed, X, TARGET)


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, y, t):
        return mse(y, t)

    def __repr__(self):
        return "Unhashable()"


@pytest.mark.parametrize("call", ["value_and_grad", "evaluate"])
@pytest.mark.parametrize("make", [fresh, lambda: REFERENCE], ids=["pipe", "sequential"])
def test_a_loss_that_is_no_function_and_an_unknown_reduction_are_refused_at_once(
    call, make
):
    run = getattr(make(), call)
    with pytest.raises(TypeError) as caught:
        run(3.0)
    assert str(caught.value) == (
        f"`{call}(loss_fn)`: 3.0 is not callable; write `pipe.{call}(loss_fn)(params, "
        "x, *targets)`"
    )
    with pytest.raises(TypeError) as caught:
        run(Unhashable())
    assert str(caught.value) == (
        f"`{call}(loss_fn)`: an Unhashable must be hashable: compiled programs are "
        "kept "
        "for each"
    )
    with raises(
        TypeError,
        f"`{call}(loss_fn, has_aux)`: has_aux is a bool, got a tuple; parameters and "
        "inputs go to the function that comes "
        f"back: `pipe.{call}(loss_fn)(params, x, *targets)`",
    ):
        run(mse, (), X)
    for reduction in ("max", None, ["mean"]):
        with pytest.raises(ValueError, match="reduction") as caught:
            run(mse, reduction=reduction)
        assert (
            str(caught.value)
            == f'`{call}(reduction={reduction!r})`: it is "mean", "sum" or "weighted"'
        )


# --- where things are ---


@pytest.mark.parametrize(
    "put",
    [
        np.asarray,
        lambda a: jax.device_put(a, DEVICES[0]),
        lambda a: jax.device_put(a, DEVICES[1]),
        lambda a: jax.device_put(a, DEVICES[2]),
    ],
    ids=["numpy", "first", "last stage", "none of the pipe"],
)
def test_inputs_come_from_anywhere_and_results_are_where_they_belong(put):
    pipe, placed, reference, params = warm_sided()
    side = SIDE
    first, last = {DEVICES[3]}, {DEVICES[1]}
    options = {"argnums": (0, 1, 2, 3), "reduction": "weighted"}
    got = pipe.value_and_grad(masked, **options)(
        placed, put(X), put(TARGET), put(MASK), side=put(side)
    )
    assert_same(
        got,
        reference.value_and_grad(masked, **options)(params, X, TARGET, MASK, side=side),
    )
    loss, (grads, gx, gt, gm) = got
    assert loss.devices() == last
    assert devices_of(grads) == devices_of(placed) == [first] * 2 + [last]
    assert [gx.devices(), gt.devices(), gm.devices()] == [first, last, last]
    y = pipe(placed, put(X), side=put(side))
    assert y.devices() == last
    assert jax.device_put(TARGET, y.sharding).devices() == last
    evaluated = pipe.evaluate(masked, reduction="weighted")(
        placed, put(X), put(TARGET), put(MASK), side=put(side)
    )
    assert evaluated.devices() == last


def test_aux_and_state_are_where_they_were_made():
    layers = models()["stateful"]
    pipe = fresh(layers, balance=[1, 3])
    case = Case(layers, CHUNKS)
    step = pipe.value_and_grad(lambda y: (y.sum(), y.max()), has_aux=True)
    ((_, aux), state), _ = step(
        pipe.place(case.params()),
        X,
        state=pipe.init_state(X),
        key=jax.random.key(0),
        train=True,
    )
    assert aux.devices() == {DEVICES[1]}
    assert devices_of(state) == [{DEVICES[3]}] * 2 + [{DEVICES[1]}] * 2


# --- jax.grad, jax.vjp, jax.value_and_grad ---

TRANSFORMS = {
    "grad": lambda f: jax.grad(f, argnums=(0, 1, 2)),
    "value_and_grad": lambda f: jax.value_and_grad(f, argnums=(0, 1, 2)),
    "value_and_grad of side alone": lambda f: jax.value_and_grad(f, argnums=2),
    "grad with aux": lambda f: jax.grad(
        lambda *a: (f(*a), f(*a)), argnums=(0, 2), has_aux=True
    ),
    "vjp": lambda f: (
        lambda *a: (lambda y, pull: (y, pull(jnp.float32(2))))(*jax.vjp(f, *a))
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_call_is_differentiated_by_params_x_and_side(name):
    pipe, placed, _, params = warm_sided()

    def through(run):
        return TRANSFORMS[name](lambda p, x, side: mse(run(p, x, side), TARGET))

    def by_hand(p, x, side):
        return jnp.tanh(x @ p[0]["w"] + p[0]["b"]) * p[1] + side

    got = through(lambda p, x, side: pipe(p, x, side=side))(placed, X, SIDE)
    assert_same(got, through(by_hand)(params, X, SIDE))


def test_gradients_through_a_call_are_on_the_parameters_devices():
    pipe, placed, _, _ = with_params()
    assert devices_of(
        jax.grad(lambda p: mse(pipe(p, X), TARGET))(placed)
    ) == devices_of(placed)


def test_a_pull_back_may_be_called_twice():
    pipe, placed, _, params = with_params()
    y, pull = jax.vjp(pipe, placed, X)
    _, want = jax.vjp(plain, params, X)
    other = jnp.cos(jnp.arange(40.0)).reshape(10, 4)
    for cotangent in (TARGET, other, TARGET):
        assert_same(pull(jax.device_put(cotangent, y.sharding)), want(cotangent))


def test_a_pull_back_outlives_later_calls():
    pipe, placed, _, params = with_params()
    _, pull = jax.vjp(lambda x: pipe(placed, x), X)
    pipe.value_and_grad(mse)(placed, 2 * X, TARGET)
    jax.grad(lambda x: pipe(placed, x).sum())(3 * X)
    _, want = jax.vjp(lambda x: plain(params, x), X)
    assert_same(pull(TARGET), want(TARGET))


def test_a_call_is_part_of_a_larger_function():
    """Work before, between and after two calls of one pipe."""
    pipe, _, _, params = with_params()

    def larger(run):
        def f(p, scale, x):
            first = run(p, x * scale)
            second = run(p, jnp.sin(first) + x)
            return jnp.mean(first * second)

        return jax.value_and_grad(f, argnums=(0, 1, 2))

    devices = [DEVICES[1]] * 2
    pipe = dataclasses.replace(pipe, devices=devices)
    x, scale = jax.device_put((X, jnp.float32(0.7)), DEVICES[1])
    assert_same(
        larger(pipe)(pipe.place(params), scale, x),
        larger(plain)(params, jnp.float32(0.7), X),
    )


def test_one_pipe_feeds_another():
    one, placed, _, params = with_params()
    two = fresh(devices=[DEVICES[0], DEVICES[2]], balance=[1, 1], chunks=2)
    placed = placed, two.place(params)
    got = jax.grad(lambda p, x: jnp.sum(two(p[1], one(p[0], x)) ** 2), argnums=(0, 1))(
        placed, X
    )
    want = jax.grad(
        lambda p, x: jnp.sum(plain(p[1], plain(p[0], x)) ** 2), argnums=(0, 1)
    )((params, params), X)
    assert_same(got, want)
    assert devices_of(got[0]) == devices_of(placed)


@pytest.mark.parametrize("part", ["a", "b", "neither", "integer"])
def test_outputs_that_the_loss_does_not_use_have_no_cotangent(part):
    def last(p, x):
        return {"a": x * p[0], "b": jnp.sin(x) * p[1], "kind": jnp.argmax(x, -1)}

    def outside(y):
        found = {
            "a": lambda: y["a"].sum(),
            "b": lambda: y["b"].sum(),
            "integer": lambda: y["kind"].sum() * 1.0,
        }
        return found.get(part, lambda: jnp.float32(0))()

    layers = [dense(), fpipe.Layer(last, lambda key, x: noise(key, (2, x.shape[-1])))]
    pipe, placed, _, params = with_params(layers)
    with jax.numpy_dtype_promotion("standard"):
        got = jax.value_and_grad(lambda p, x: outside(pipe(p, x)), (0, 1))(placed, X)
        want = jax.value_and_grad(
            lambda p, x: outside(last(p[1], plain(p[:1], x))), (0, 1)
        )(params, X)
    assert_same(got, want)


def test_integer_parameters_need_allow_int():
    layers = [fpipe.Layer(lambda p, x: x * p["w"] + p["n"].astype(x.dtype)), dense()]
    pipe = fresh(layers)
    params = ({"w": jnp.float32(0.5), "n": jnp.int32(2)}, PARAMS[0])

    def through(run):
        return lambda p, x: mse(run(p, x), TARGET)

    def by_hand(p, x):
        return plain(p[1:], x * p[0]["w"] + p[0]["n"].astype(x.dtype))

    got = jax.grad(through(pipe), allow_int=True)(pipe.place(params), X)
    assert got[0]["n"].dtype == jax.dtypes.float0
    assert_same(got, jax.grad(through(by_hand), allow_int=True)(params, X))
    with pytest.raises(TypeError, match="allow_int"):
        jax.grad(through(pipe))(pipe.place(params), X)
    # Of x alone, integers among the parameters are nobody's business.
    placed = pipe.place(params)
    assert_same(
        jax.grad(lambda x: through(pipe)(placed, x))(X),
        jax.grad(lambda x: through(by_hand)(params, x))(X),
    )


# --- gradients that are zero, and gradients of the user's own ---


@pytest.mark.parametrize("argnums", [0, (0, 1, 2)], ids=str)
def test_parameters_that_nothing_uses_get_zeros(argnums):
    def wasteful(p, x):
        return jnp.tanh(x @ p["w"])

    layers = [fpipe.Layer(wasteful), dense(), fpipe.Layer(lambda p, x: x)]
    given = {
        "w": jnp.eye(WIDTH),
        "unused": jnp.ones((2, 3)),
        "half": jnp.ones(2, jnp.bfloat16),
    }
    params = (given, PARAMS[0], (jnp.ones(3),))
    pipe = fresh(layers, balance=[1, 2])
    placed = pipe.place(params)
    _, grads = pipe.value_and_grad(lambda y, t: jnp.mean(y**2), argnums=argnums)(
        placed, X, TARGET
    )
    want = jax.grad(
        lambda p, x, t: jnp.mean(plain(p[1:2], wasteful(p[0], x)) ** 2), argnums
    )(params, X, TARGET)
    assert_same(grads, want)
    assert devices_of(grads)[: len(jax.tree.leaves(placed))] == devices_of(placed)
    if argnums == 0:
        assert_same(jax.grad(lambda p: jnp.mean(pipe(p, X) ** 2))(placed), want)


@pytest.mark.parametrize("checkpoint", ["always", "never"])
def test_parameters_under_stop_gradient_get_zeros(checkpoint):
    frozen = fpipe.Layer(
        lambda p, x: jnp.tanh(x @ jax.lax.stop_gradient(p["w"]) + p["b"]), dense().init
    )
    pipe, placed, _, params = with_params(
        [frozen, dense(), frozen], balance=[1, 2], checkpoint=checkpoint
    )

    def by_hand(p, x):
        still = jax.lax.stop_gradient
        p = [{**p[0], "w": still(p[0]["w"])}, p[1], {**p[2], "w": still(p[2]["w"])}]
        return plain(p, x)

    want = jax.value_and_grad(lambda p: mse(by_hand(p, X), TARGET))(params)
    np.testing.assert_array_equal(want[1][0]["w"], 0)
    assert_same(pipe.value_and_grad(mse)(placed, X, TARGET), want)
    assert_same(jax.value_and_grad(lambda p: mse(pipe(p, X), TARGET))(placed), want)


@jax.custom_vjp
def tenfold(x, scale):
    """Its pull-back is ten times too large, and that of `scale` a constant."""
    return jnp.sin(x) * scale


tenfold.defvjp(
    lambda x, s: (tenfold(x, s), (x, s)),
    lambda kept, g: (10 * g * jnp.cos(kept[0]) * kept[1], jnp.float32(7)),
)


@jax.custom_jvp
def threefold(x):
    return jnp.sin(x)


threefold.defjvp(
    lambda primals, tangents: (
        threefold(*primals),
        3 * tangents[0] * jnp.cos(primals[0]),
    )
)


@pytest.mark.parametrize(
    "checkpoint", ["always", "never", jax.checkpoint_policies.dots_saveable]
)
def test_custom_derivatives_are_used(checkpoint):
    layers = [
        fpipe.Layer(lambda p, x: tenfold(x, p)),
        fpipe.Layer(lambda p, x: threefold(x * p)),
        fpipe.Layer(lambda p, x: jax.nn.relu(x - p)),  # a custom_jvp of JAX's own
    ]
    params = (jnp.float32(2), jnp.float32(0.5), jnp.float32(-0.1))
    pipe = fresh(layers, balance=[1, 2], checkpoint=checkpoint, chunks=2)

    def by_hand(p, x):
        return jnp.sum(jax.nn.relu(threefold(tenfold(x, p[0]) * p[1]) - p[2]))

    def halves(p, x):  # the constant 7 comes once for each microbatch
        return by_hand(p, x[:5]) + by_hand(p, x[5:])

    want = jax.value_and_grad(halves, (0, 1))(params, X)
    assert float(want[1][0][0]) == 14
    placed = pipe.place(params)
    assert_same(
        pipe.value_and_grad(jnp.sum, reduction="sum", argnums=(0, 1))(placed, X), want
    )
    assert_same(
        jax.value_and_grad(lambda p, x: jnp.sum(pipe(p, x)), (0, 1))(placed, X), want
    )


# --- state, key, train ---


def count_layer():
    """Adds how many rows came before, and counts on."""

    def apply(p, x, *, state):
        return x * p + state["seen"].astype(x.dtype), {
            "seen": state["seen"] + x.shape[0],
            "calls": state["calls"],
        }

    def finish(state):
        return {**state, "calls": state["calls"] + 1}

    return fpipe.Layer(
        apply,
        lambda key, x: jnp.float32(1),
        "count",
        init_state=lambda x: {"seen": 0, "calls": 0},
        finish=finish,
    )


COUNTING = [count_layer(), fpipe.fn(lambda x: 2 * x)]


def test_state_goes_from_microbatch_to_microbatch_and_comes_back():
    pipe = fresh(COUNTING)
    params, state = pipe.init(jax.random.key(0), X), pipe.init_state(X)
    for before in (0, 10):
        y, state = pipe(params, jnp.zeros((10, 1)), state=state)
        np.testing.assert_array_equal(
            y[:, 0], 2 * (before + np.repeat([0.0, 4.0, 8.0], [4, 4, 2]))
        )
    assert jax.tree.map(int, state) == ({"seen": 20, "calls": 2}, None)


def test_the_forms_of_results_with_state():
    pipe = fresh(COUNTING)
    params, state = pipe.init(jax.random.key(0), X), pipe.init_state(X)
    new = ({"seen": np.int32(10), "calls": np.int32(1)}, None)
    y, out = pipe(params, X, state=state)
    assert y.shape == X.shape
    assert_same(out, new)
    (loss, out), grads = pipe.value_and_grad(mse)(params, X, TARGET, state=state)
    assert_same(out, new)
    assert loss.shape == ()
    assert jax.tree.map(jnp.shape, grads) == ((), ())
    ((loss, aux), out), grads = pipe.value_and_grad(
        lambda y: (y.sum(), y.max()), has_aux=True
    )(params, X, state=state)
    assert_same(out, new)
    assert (loss.shape, aux.shape, jax.tree.map(jnp.shape, grads)) == (
        (),
        (3,),
        ((), ()),
    )
    loss, out = pipe.evaluate(mse)(params, X, TARGET, state=state)
    assert_same(out, new)
    (loss, aux), out = pipe.evaluate(lambda y: (y.sum(), y.max()), has_aux=True)(
        params, X, state=state
    )
    assert_same(out, new)
    assert (loss.shape, aux.shape) == ((), (3,))


def test_state_may_be_given_to_a_model_without():
    pipe, placed, _, params = with_params()
    y, state = pipe(placed, X, state=(None, None))
    assert state == (None, None)
    assert_same(y, plain(params, X))
    (_, state), _ = pipe.value_and_grad(mse)(placed, X, TARGET, state=(None, ()))
    assert state == (None, None)


def test_state_may_be_python_numbers_and_a_list():
    pipe = fresh(COUNTING)
    params = pipe.init(jax.random.key(0), X)
    y, state = pipe(params, jnp.zeros((10, 1)), state=[{"seen": 100, "calls": 0}, None])
    assert float(y[0, 0]) == 200
    assert_same(state, ({"seen": np.int32(110), "calls": np.int32(1)}, None))


CALLS = {
    "call": lambda pipe, params, **needs: pipe(params, X, **needs),
    "value_and_grad": lambda pipe, params, **needs: pipe.value_and_grad(mse)(
        params, X, TARGET, **needs
    ),
    "evaluate": lambda pipe, params, **needs: pipe.evaluate(mse)(
        params, X, TARGET, **needs
    ),
    "grad": lambda pipe, params, **needs: jax.grad(
        lambda p: jnp.sum(jax.tree.leaves(pipe(p, X, **needs))[0])
    )(params),
}


@pytest.mark.parametrize("call", CALLS)
def test_missing_and_wrong_state_is_refused(call):
    pipe = fresh(COUNTING)
    params, state = pipe.init(jax.random.key(0), X), pipe.init_state(X)
    run = functools.partial(CALLS[call], pipe, params)
    with pytest.raises(
        ValueError,
        match=r"the layers \['count'\] have state: pass `state=pipe.init_state\(x\)`",
    ):
        run()
    with pytest.raises(
        ValueError,
        match=f"state: {PER_LAYER} 1 entry",
    ):
        run(state=state[:1])
    with pytest.raises(
        ValueError,
        match=f"state: {PER_LAYER} a dict",
    ):
        run(state=state[0])
    with pytest.raises(
        ValueError,
        match=r"state: entry 1 is float32\[\], but layer '<lambda>' has no state",
    ):
        run(state=(state[0], jnp.float32(1)))


def needy(p, x, *, key, train):
    noise = 0 if key is None else jax.random.normal(key, x.shape)
    return x * p * (2.0 if train else 1.0) + noise


NEEDY = [fpipe.Layer(needy, lambda key, x: jnp.float32(0.5))] * 2


@pytest.mark.parametrize("train", [False, True])
def test_without_a_key_layers_get_none(train):
    pipe, placed, _, params = with_params(NEEDY)
    y = pipe(placed, X, train=train)
    assert_same(y, X * (1.0 if train else 0.25))
    got = pipe.value_and_grad(mse)(placed, X, TARGET, train=train)
    scale = 4.0 if train else 1.0
    assert_same(
        got, jax.value_and_grad(lambda p: mse(X * p[0] * p[1] * scale, TARGET))(params)
    )


@pytest.mark.parametrize(
    ("key", "train"),
    [(jax.random.key(3), True), (jax.random.PRNGKey(3), False)],
    ids=["key", "raw"],
)
def test_key_and_train_reach_the_layers(key, train):
    pipe, placed, reference, params = with_params(NEEDY)
    step, evaluate = pipe.value_and_grad(mse), pipe.evaluate(mse)
    needs = {"key": key, "train": train}
    want = reference.value_and_grad(mse)(params, X, TARGET, **needs)
    assert_same(step(placed, X, TARGET, **needs), want)
    assert_same(evaluate(placed, X, TARGET, **needs), want[0])
    # Another value of either, on the same compiled programs or not, is another result.
    other = {
        float(evaluate(placed, X, TARGET, key=k, train=t))
        for k in (key, None)
        for t in (True, False)
    }
    assert len(other) == 4
    assert float(want[0]) in other
    assert (
        float(
            evaluate(
                placed,
                X,
                TARGET,
                key=key + 1 if train is False else jax.random.key(4),
                train=train,
            )
        )
        not in other
    )


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("key", [3, "seed"])
def test_a_key_that_is_none_is_refused(key, call):
    pipe, placed, _, _ = warm()
    with pytest.raises(TypeError) as caught:
        CALLS[call](pipe, placed, key=key)
    assert f"`key={key!r}`: a PRNG key is needed" in str(caught.value)


@pytest.mark.parametrize("make", [fresh, lambda: REFERENCE], ids=["pipe", "sequential"])
def test_parameters_are_made_with_a_key(make):
    with raises(TypeError, "`key=0`: a PRNG key is needed; write `jax.random.key(0)`"):
        make().init(0, X)
    with raises(
        TypeError,
        f"`key=float32[{X.shape[0]},{X.shape[1]}]`: a PRNG key is needed, such as "
        "`jax.random.key(0)`",
    ):
        make().init(X, jax.random.key(0))
    assert_same(
        make().init(jax.random.PRNGKey(0), X),
        make().init(jax.random.PRNGKey(0), np.asarray(X)),
    )


# --- what is refused, and what it points to ---


def of_x(run):
    """A function of `x` alone: everything else is closed over."""
    return lambda pipe, params: run(lambda x: pipe(params, x))


def loss_of_x(run):
    return lambda pipe, params: run(
        lambda x: pipe.value_and_grad(mse)(params, x, TARGET)[0]
    )


SCAN, SEQUENTIAL = '`Pipe(..., executor="scan")`', "`fpipe.sequential`"
REFUSED = {
    "jit of params": (lambda pipe, params: jax.jit(lambda p: pipe(p, X))(params), SCAN),
    "jit of x": (of_x(lambda f: jax.jit(f)(X)), SCAN),
    "jit of nothing": (lambda pipe, params: jax.jit(lambda: pipe(params, X))(), SCAN),
    "jit of another": (
        lambda pipe, params: jax.jit(lambda a: pipe(params, X) * a)(2.0),
        SCAN,
    ),
    "jit of a key": (
        lambda pipe, params: jax.jit(lambda k: pipe(params, X, key=k))(
            jax.random.key(0)
        ),
        SCAN,
    ),
    "jit of value_and_grad": (
        lambda pipe, params: jax.jit(pipe.value_and_grad(mse))(params, X, TARGET),
        SCAN,
    ),
    "jit of value_and_grad of nothing": (
        lambda pipe, params: jax.jit(
            lambda: pipe.value_and_grad(mse)(params, X, TARGET)
        )(),
        SCAN,
    ),
    "jit of a target": (
        lambda pipe, params: jax.jit(lambda t: pipe.value_and_grad(mse)(params, X, t))(
            TARGET
        ),
        SCAN,
    ),
    "jit of evaluate": (
        lambda pipe, params: jax.jit(pipe.evaluate(mse))(params, X, TARGET),
        SCAN,
    ),
    "jit of evaluate of nothing": (
        lambda pipe, params: jax.jit(lambda: pipe.evaluate(mse)(params, X, TARGET))(),
        SCAN,
    ),
    "jit of grad": (
        lambda pipe, params: jax.jit(jax.grad(lambda p: mse(pipe(p, X), TARGET)))(
            params
        ),
        SCAN,
    ),
    "jit of grad of nothing": (
        lambda pipe, params: jax.jit(
            lambda: jax.grad(lambda p: mse(pipe(p, X), TARGET))(params)
        )(),
        SCAN,
    ),
    "make_jaxpr": (of_x(lambda f: jax.make_jaxpr(f)(X)), SCAN),
    "scan": (
        of_x(lambda f: jax.lax.scan(lambda c, _: (f(c), None), X, None, length=2)),
        SCAN,
    ),
    "checkpoint": (
        of_x(lambda f: jax.grad(jax.checkpoint(lambda x: f(x).sum()))(X)),
        SCAN,
    ),
    "vmap": (of_x(lambda f: jax.vmap(f)(X[None])), SEQUENTIAL),
    "vmap of params": (
        lambda pipe, params: jax.vmap(lambda p: pipe((p, params[1]), X))(
            jax.tree.map(lambda a: a[None], params[0])
        ),
        SEQUENTIAL,
    ),
    "vmap of value_and_grad": (loss_of_x(lambda f: jax.vmap(f)(X[None])), SEQUENTIAL),
    "vmap of grad": (
        of_x(lambda f: jax.vmap(jax.grad(lambda x: f(x).sum()))(X[None])),
        SEQUENTIAL,
    ),
    "vmap of a pull-back": (
        of_x(lambda f: jax.vmap(jax.vjp(f, X)[1])(X[None])),
        SEQUENTIAL,
    ),
    "grad of grad": (
        of_x(lambda f: jax.grad(lambda x: jax.grad(lambda x: f(x).sum())(x).sum())(X)),
        SEQUENTIAL,
    ),
    "hessian": (of_x(lambda f: jax.hessian(lambda x: f(x).sum())(X)), SEQUENTIAL),
    "grad of value_and_grad": (loss_of_x(lambda f: jax.grad(f)(X)), SEQUENTIAL),
    "grad of evaluate": (
        lambda pipe, params: jax.grad(lambda p: pipe.evaluate(mse)(p, X, TARGET))(
            params
        ),
        SEQUENTIAL,
    ),
    "jvp": (of_x(lambda f: jax.jvp(f, (X,), (X,))), SEQUENTIAL),
    "jvp of value_and_grad": (loss_of_x(lambda f: jax.jvp(f, (X,), (X,))), SEQUENTIAL),
    "jacrev": (of_x(lambda f: jax.jacrev(f)(X)), SEQUENTIAL),
    "jacfwd": (of_x(lambda f: jax.jacfwd(f)(X)), SEQUENTIAL),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_placed_executor_cannot_do_is_refused_and_points_to_what_can(name):
    run, pointer = REFUSED[name]
    pipe, placed, _, _ = with_params()
    with pytest.raises(TypeError) as caught:
        run(pipe, placed)
    assert pointer in said(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "jit of x",
        "jit of a key",
        *(n for n in REFUSED if n.endswith(("of nothing", "of another"))),
    ],
)
def test_a_pipe_that_was_refused_at_its_first_call_works_afterwards(name):
    pipe, placed, _, _ = with_params()
    with pytest.raises(TypeError):
        REFUSED[name][0](pipe, placed)
    assert_works(pipe, placed)


@pytest.mark.parametrize("name", REFUSED)
def test_a_pipe_that_ran_before_works_after_a_refusal(name):
    pipe, placed, _, _ = warm()
    with pytest.raises(TypeError):
        REFUSED[name][0](pipe, placed)
    assert_works(pipe, placed)


@pytest.mark.parametrize(
    "name", [name for name, (_, pointer) in REFUSED.items() if pointer == SEQUENTIAL]
)
def test_sequential_does_what_it_is_recommended_for(name):
    shapes = jax.eval_shape(lambda params: REFUSED[name][0](REFERENCE, params), PARAMS)
    assert jax.tree.leaves(shapes)


# --- shapes alone ---


def vjp_shapes(run):
    def f(p, x, t):
        y, pull = jax.vjp(run, p, x)
        return y, pull(t)

    return f


SHAPES = {
    "call": lambda m: m,
    "value_and_grad": lambda m: (
        lambda p, x: m.value_and_grad(mse, argnums=(0, 1, 2))(p, x, TARGET)
    ),
    "value_and_grad with aux": lambda m: (
        lambda p, x: m.value_and_grad(
            lambda y: ((y.sum(), y.size), (y.max(), y.shape[0], True)),
            has_aux=True,
            reduction="weighted",
            argnums=1,
        )(p, x)
    ),
    "evaluate": lambda m: lambda p, x: m.evaluate(mse)(p, x, TARGET),
    "grad": lambda m: jax.grad(lambda p, x: mse(m(p, x), TARGET), argnums=(0, 1)),
    "value_and_grad outside": lambda m: jax.value_and_grad(
        lambda p, x: mse(m(p, x), TARGET)
    ),
    "vjp": lambda m: lambda p, x: vjp_shapes(m)(p, x, TARGET),
    "of x alone": lambda m: lambda p, x: jax.grad(lambda x: m(PARAMS, x).sum())(x),
}


@pytest.mark.parametrize("call", CALLS)
def test_eval_shape_of_a_function_that_closes_over_everything(call):
    pipe, placed, reference, params = with_params()
    got = jax.eval_shape(lambda: CALLS[call](pipe, placed))
    assert got == jax.eval_shape(lambda: CALLS[call](reference, params))


def test_eval_shape_with_state_key_and_side():
    layers = [*models()["sided"][:2], *models()["stateful"][:1], models()["dropout"][1]]
    pipe, reference = (
        fresh(layers, balance=[2, 2]),
        fpipe.sequential(layers, chunks=CHUNKS),
    )

    def run(model):
        def f(key, x, side):
            params, state = (
                model.init(key, x, side=side),
                model.init_state(x, side=side),
            )
            needs = {"side": side, "key": key, "state": state, "train": True}
            return model(params, x, **needs), model.value_and_grad(mse)(
                params, x, x, **needs
            )

        return f

    shapes = jax.eval_shape(lambda: (jax.random.key(0), X, SIDE))
    assert jax.eval_shape(run(pipe), *shapes) == jax.eval_shape(run(reference), *shapes)


def shape_of(a):
    return jax.ShapeDtypeStruct(a.shape, a.dtype)


@pytest.mark.parametrize(
    "run",
    [
        lambda pipe, params: pipe(params, shape_of(X)),
        lambda pipe, params: pipe((params[0], jax.tree.map(shape_of, params[1])), X),
        lambda pipe, params: pipe(params, X, key=shape_of(jax.random.key(0))),
        lambda pipe, params: pipe.value_and_grad(mse)(params, X, shape_of(TARGET)),
        lambda pipe, params: pipe.evaluate(mse)(params, shape_of(X), TARGET),
        lambda pipe, params: jax.grad(lambda p: pipe(p, shape_of(X)).sum())(params),
    ],
    ids=["x", "params", "key", "target", "evaluate", "grad"],
)
def test_a_shape_in_place_of_an_array_is_refused(run):
    pipe, placed, _, _ = warm()
    with pytest.raises(
        TypeError,
        match=r"a Pipe was called with the shape ShapeDtypeStruct\(.*; use "
        r"`jax.eval_shape`",
    ):
        run(pipe, placed)
    assert_works(pipe, placed)


# --- parameters as they must be ---


def replicated(tree):
    mesh = jax.make_mesh(
        (2,),
        ("a",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=[DEVICES[3], DEVICES[2]],
    )
    return jax.device_put(
        tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )


WRONG_PARAMS = {
    "not placed": (
        lambda p: jax.device_put(p, DEVICES[0]),
        ValueError,
        "params of layer 0 'dense' are on the wrong device: cpu:0, but stage 0 is on "
        "cpu:3; put them there with "
        "`params = pipe.place(params)`",
    ),
    "one layer": (
        lambda p: (p[0], jax.device_put(p[1], DEVICES[3])),
        ValueError,
        "params of layer 1 'dense' are on the wrong device: cpu:3, but stage 1 is on "
        "cpu:1; put them there with",
    ),
    "one leaf": (
        lambda p: ({**p[0], "w": jax.device_put(p[0]["w"], DEVICES[1])}, p[1]),
        ValueError,
        "params of layer 0 'dense' are on the wrong device: cpu:1, but stage 0 is on "
        "cpu:3",
    ),
    "swapped": (
        lambda p: p[::-1],
        ValueError,
        "params of layer 0 'dense' are on the wrong device: cpu:1",
    ),
    "replicated": (
        lambda p: (replicated(p[0]), p[1]),
        ValueError,
        "params of layer 0 'dense' are on the wrong device: ",
    ),
    "numpy": (
        lambda p: jax.tree.map(np.asarray, p),
        ValueError,
        "params of layer 0 'dense' are on the wrong device: the host (<class "
        "'numpy.ndarray'>), but stage 0 is on",
    ),
    "string": (
        lambda p: ({**p[0], "tag": "left"}, p[1]),
        TypeError,
        "params of layer 0 'dense' hold 'left', no array; `params = "
        "pipe.place(params)` makes arrays of numbers; bind other constants to the "
        "layer's function (functools.partial)",
    ),
    "number": (
        lambda p: (p[0], {**p[1], "scale": 1.0}),
        TypeError,
        "params of layer 1 'dense' hold 1.0, no array; ",
    ),
    "too short": (
        lambda p: p[:1],
        ValueError,
        f"params: {PER_LAYER} 1 entry",
    ),
    "too long": (
        lambda p: (*p, ()),
        ValueError,
        f"params: {PER_LAYER} 3 entries",
    ),
    "a dict": (
        lambda p: {"layers": p},
        ValueError,
        f"params: {PER_LAYER} a dict",
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("make", [with_params, warm], ids=["first call", "later call"])
@pytest.mark.parametrize("name", WRONG_PARAMS)
def test_parameters_in_the_wrong_form_or_place_are_refused(name, make, call):
    change, kind, text = WRONG_PARAMS[name]
    pipe, placed, _, _ = make()
    if call == "grad" and name in ("numpy", "string", "number"):
        with pytest.raises(
            (TypeError, ValueError)
        ):  # `jax.grad` has its own opinion of these
            CALLS[call](pipe, change(placed))
        return
    with pytest.raises(kind) as caught:
        CALLS[call](pipe, change(placed))
    assert text in str(caught.value)


def test_none_and_empty_nodes_in_parameters_are_no_leaves():
    pipe, placed, _, params = with_params()
    odd = ({**placed[0], "none": None, "empty": {}}, placed[1])
    _, grads = pipe.value_and_grad(mse)(odd, X, TARGET)
    _, want = jax.value_and_grad(lambda p: mse(plain(p, X), TARGET))(params)
    assert_same(grads, ({**want[0], "none": None, "empty": {}}, want[1]))


def test_parameters_in_a_list_give_gradients_in_a_list():
    pipe, placed, _, params = with_params()
    _, want = jax.value_and_grad(lambda p: mse(plain(p, X), TARGET))(list(params))
    _, grads = pipe.value_and_grad(mse)(list(placed), X, TARGET)
    assert_same(grads, want)


def test_x_without_an_array_is_refused():
    pipe, placed, _, _ = with_params()
    for x in (None, "left", (1, 2)):
        with pytest.raises(
            TypeError,
            match=r"`pipe\(params, x\)`: x has no array;",
        ):
            pipe(placed, x)


@pytest.mark.parametrize("value", [None, "tag", (), {"a": None}, 3], ids=repr)
def test_a_boundary_without_arrays_is_refused(value):
    nothing = fpipe.Layer(lambda p, x: value, lambda key, x: (), "nothing")
    text = (
        r"stage 0 ends with layer 0 'nothing', which returned .*: a boundary needs at "
        r"least one array"
    )
    for layers, balance in (
        ([nothing, dense()], [1, 1]),
        ([nothing], [1]),
    ):  # between stages, and at the end
        pipe = fresh(layers, balance=balance)
        params = pipe.place(((), PARAMS[0])[: len(layers)])
        for call in ("call", "grad"):
            with pytest.raises(TypeError, match=text):
                CALLS[call](pipe, params)
    # Inside a stage there is no boundary.
    something = fpipe.Layer(lambda p, x: p)
    pipe = fpipe.Pipe([nothing, something], [2])
    assert_same(pipe(pipe.place(((), X)), X), X)


# --- exceptions ---


class BoomError(Exception):
    """An exception that only this file knows."""


class Trigger:
    """Raises where it is told to, while it is told to."""

    def __init__(self):
        self.at: tuple[int, ...] | None = None

    def __call__(self, *where):
        if self.at == where:
            raise BoomError(f"at {where}")


def exploding(k, trigger):
    """Raises while it is traced: on microbatches of that many rows."""

    def apply(p, x):
        trigger(k, x.shape[0])
        return jnp.tanh(x @ p["w"] + p["b"])

    return fpipe.Layer(apply, dense().init, name=f"exploding{k}")


EVERYWHERE = [(layer, rows, "value_and_grad") for layer in range(3) for rows in (4, 2)]


@pytest.mark.parametrize(
    ("layer", "rows", "call"),
    [*EVERYWHERE, (2, 2, "call"), (2, 2, "evaluate"), (2, 2, "grad")],
)
def test_an_exception_while_tracing_keeps_its_type_and_says_where(layer, rows, call):
    stage, microbatch = (0, 1, 1)[layer], {4: 0, 2: 2}[rows]
    trigger = Trigger()
    pipe, placed, reference, params = with_params(
        [exploding(k, trigger) for k in range(3)], balance=[1, 2]
    )
    trigger.at = (layer, rows)
    with pytest.raises(BoomError) as caught:
        CALLS[call](pipe, placed)
    assert str(caught.value) == f"at ({layer}, {rows})"
    assert notes(caught.value) == [
        f"fpipe: in layer {layer} 'exploding{layer}', stage {stage}, microbatch "
        f"{microbatch}"
    ]
    trigger.at = None
    assert_same(CALLS[call](pipe, placed), CALLS[call](reference, params))


@pytest.mark.parametrize("call", ["value_and_grad", "evaluate"])
def test_an_exception_in_the_loss_says_where(call):
    trigger = Trigger()
    pipe, placed, reference, params = with_params()

    def loss_fn(y, t):
        trigger(y.shape[0])
        return mse(y, t)

    run = getattr(pipe, call)(loss_fn)
    trigger.at = (2,)
    with pytest.raises(BoomError) as caught:
        run(placed, X, TARGET)
    assert notes(caught.value) == ["fpipe: in loss_fn, stage 1, microbatch 2"]
    trigger.at = None
    assert_same(
        run(placed, X, TARGET), getattr(reference, call)(mse)(params, X, TARGET)
    )


@pytest.mark.parametrize("call", ["value_and_grad", "grad"])
def test_an_exception_in_a_backward_says_where(call):
    trigger = Trigger()

    @jax.custom_vjp
    def through(x):
        return x

    def backward(kept, g):
        del kept
        trigger(g.shape[0])
        return (g,)

    through.defvjp(lambda x: (x, None), backward)
    layers = [dense(), dense(activation=lambda x: through(jnp.tanh(x)))]
    pipe, placed, reference, params = with_params(layers)
    trigger.at = (2,)
    with pytest.raises(BoomError) as caught:
        CALLS[call](pipe, placed)
    assert notes(caught.value) == [
        "fpipe: in the backward of layer 1 'dense', stage 1, microbatch 2"
    ]
    trigger.at = None
    assert_same(CALLS[call](pipe, placed), CALLS[call](reference, params))


def fails(*args, **needs):
    raise BoomError("no")


@pytest.mark.parametrize("part", ["init", "init_state", "finish"])
def test_an_exception_around_a_layer_says_where(part):
    counting = dataclasses.replace(count_layer(), **{part: fails})
    pipe = fresh([fpipe.fn(jnp.sin), counting])

    def everything():
        params, state = pipe.init(jax.random.key(0), X), pipe.init_state(X)
        pipe(params, X, state=state)

    with pytest.raises(BoomError) as caught:
        everything()
    assert notes(caught.value) == [f"fpipe: in the {part} of layer 1 'count'"]


# --- the user's arrays ---

PASS = fpipe.Layer(lambda p, x: x, lambda key, x: (), "pass")
SPOIL = jax.jit(lambda a: a * 0, donate_argnums=0)
PASSING = {
    "one stage": ([PASS], [1], [0]),
    "one stage of two": ([PASS, PASS], [2], [0]),
    "repeated device": ([PASS, PASS], [1, 1], [0, 0]),
    "there and back": ([PASS, PASS, PASS], [1, 1, 1], [0, 1, 0]),
    "two devices": ([PASS, PASS], [1, 1], [0, 1]),
}


def donate(tree):
    """The user gives away everything that came back, each array once."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            SPOIL(leaf)


def cotangents(y):
    return jax.tree.map(jnp.ones_like, y)


DONATED = {
    "call": lambda pipe, p, x: pipe(p, x),
    "call of a dict": lambda pipe, p, x: pipe(p, {"a": x, "b": x}),
    "value_and_grad": lambda pipe, p, x: pipe.value_and_grad(
        jnp.sum, reduction="sum", argnums=1
    )(p, x),
    "value_and_grad of a target": lambda pipe, p, x: pipe.value_and_grad(
        lambda y, t: jnp.sum(y * t), reduction="sum", argnums=(1, 2)
    )(p, x, x),
    "aux": lambda pipe, p, x: pipe.evaluate(lambda y: (y.sum(), (y, y)), has_aux=True)(
        p, x
    ),
    "vjp": lambda pipe, p, x: (lambda y, pull: (pull(cotangents(y)), y))(
        *jax.vjp(lambda x: pipe(p, x), x)
    ),
}


@pytest.mark.parametrize("way", DONATED)
@pytest.mark.parametrize("name", PASSING)
def test_what_came_back_can_be_donated_without_loss_of_what_was_given(name, way):
    """Layers that pass on their input, one microbatch: nothing is cut, joined or
    computed on the way.
    """
    layers, balance, devices = PASSING[name]
    pipe = fpipe.Pipe(layers, balance, [DEVICES[d] for d in devices])
    params, x = ((),) * len(layers), jnp.arange(8.0).reshape(4, 2)
    donate(DONATED[way](pipe, params, x))
    assert not x.is_deleted()
    np.testing.assert_array_equal(x, np.arange(8.0).reshape(4, 2))


def test_a_cotangent_outlives_the_gradients_that_it_becomes():
    pipe = fpipe.Pipe([PASS, fpipe.Layer(lambda p, x: x + p)], [1, 1], [DEVICES[0]] * 2)
    params, x, cotangent = (
        pipe.place(((), jnp.ones((4, 2)))),
        jnp.ones((4, 2)),
        jnp.full((4, 2), 3.0),
    )
    _, pull = jax.vjp(pipe, params, x)
    for _ in range(2):
        grads = pull(cotangent)
        np.testing.assert_array_equal(grads[1], 3)
        donate(grads)
    np.testing.assert_array_equal(cotangent, 3)


@pytest.mark.parametrize("chunks", [1, 2])
def test_parameters_that_are_an_output_outlive_it(chunks):
    pipe = fpipe.Pipe(
        [fpipe.Layer(lambda p, x: {"p": p, "x": x * p})], [1], chunks=chunks
    )
    params = pipe.place((jnp.arange(2.0),))
    donate(pipe(params, jnp.ones((4, 2))))
    donate(jax.vjp(lambda p: pipe(p, jnp.ones((4, 2))), params)[0])
    np.testing.assert_array_equal(params[0], np.arange(2.0))


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize(
    "finish", [None, lambda state: state], ids=["no finish", "finish"]
)
def test_a_state_that_does_not_change_outlives_the_new_one(chunks, finish):
    layer = fpipe.Layer(
        lambda p, x, *, state: (x * state, state),
        init_state=lambda x: jnp.ones(2),
        finish=finish,
    )
    pipe = fpipe.Pipe([layer], [1], chunks=chunks)
    state, x = (jnp.arange(2.0),), jnp.ones((4, 2))
    donate(pipe(((),), x, state=state))
    donate(pipe.value_and_grad(jnp.mean, argnums=1)(((),), x, state=state))
    np.testing.assert_array_equal(state[0], np.arange(2.0))


def aligned(values):
    """Numpy memory that JAX takes as it is."""
    raw = np.zeros(values.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    out[:] = values
    return out


@pytest.mark.parametrize("name", ["one stage", "repeated device"])
def test_numpy_arrays_keep_their_values(name):
    layers, balance, devices = PASSING[name]
    pipe = fpipe.Pipe(layers, balance, [DEVICES[d] for d in devices])
    values = np.arange(8, dtype=np.float32).reshape(4, 2)
    x, target = aligned(values), aligned(values + 1)
    for _ in range(2):
        donate(pipe(((),) * len(layers), x))
        donate(pipe.value_and_grad(mse, argnums=(1, 2))(((),) * len(layers), x, target))
    np.testing.assert_array_equal(x, values)
    np.testing.assert_array_equal(target, values + 1)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("devices", [[0], [0, 0], [0, 1]], ids=str)
def test_a_user_may_donate_the_parameters_of_each_step_to_the_next(devices, chunks):
    """The training loop with an update that takes over parameters and gradients."""
    layers = LAYERS[: len(devices)]
    case = Case(layers, chunks)
    pipe = fpipe.Pipe(
        layers, [1] * len(devices), [DEVICES[d] for d in devices], chunks=chunks
    )
    params = pipe.place(jax.tree.map(np.asarray, case.params()))
    update = jax.jit(
        lambda p, g: jax.tree.map(lambda a, b: a - 0.1 * b, p, g), donate_argnums=0
    )
    want = case.params()
    x, target = jnp.array(case.x), jnp.array(case.target)
    for _ in range(3):
        _, grads = pipe.value_and_grad(mse)(params, x, target)
        params = tuple(update(p, g) for p, g in zip(params, grads, strict=True))
        _, grads = jax.value_and_grad(lambda p: mse(plain(p, case.x), case.target))(
            want
        )
        want = jax.tree.map(lambda a, b: a - 0.1 * b, want, grads)
    assert_same(params, want)
    np.testing.assert_array_equal(x, case.x)
    np.testing.assert_array_equal(target, case.target)


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_parameters_that_were_donated_are_refused(executor):
    pipe = fresh(executor=executor)
    step = pipe.value_and_grad(mse)
    params = pipe.place(PARAMS)
    _, grads = step(params, X, TARGET)
    after = fpipe.optim.apply_updates(params, grads, donate=["params"])
    for call in [
        lambda: pipe(params, X),
        lambda: step(params, X, TARGET),
        lambda: jax.grad(lambda x: pipe(params, x).sum())(X),
    ]:
        with raises(ValueError, DELETED):
            call()
    # The new ones are as good as before, and a trace has nothing that is deleted.
    assert np.isfinite(step(after, X, TARGET)[0])
    jax.eval_shape(step, after, X, TARGET)
