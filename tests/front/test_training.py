"""What training asks of gradients: mixed precision, frozen parameters, scaled losses,
sums over calls.
"""

import dataclasses
import pickle
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fpipe
from tests.helpers import (
    WIDTH,
    Case,
    add,
    assert_same,
    borrower,
    dense,
    in_turn,
    keep,
    models,
    mse,
    noise,
    owner,
    raises,
)

EXECUTORS = ["sequential", "placed", "scan"]


def made(executor, layers, balance=(1, 1, 1, 1), chunks=4, **options) -> Any:
    if executor == "sequential":
        return fpipe.sequential(layers, chunks=chunks, **options)
    return fpipe.Pipe(
        layers,
        balance,
        jax.devices()[: len(balance)],
        chunks=chunks,
        executor=executor,
        **options,
    )


def gathered(pipe, tree):
    """Gradients of parameters, one entry per layer."""
    return pipe.gather(tree)


# --- mixed precision ---


def shifted(params, x):
    del params
    return x + 1


def low(tree):
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_layers_compute_in_the_dtype_and_parameters_keep_theirs(executor):
    """By hand in plain JAX: every cast is in the graph, so gradients are those of the
    float32 parameters.
    """
    seen = []

    def layer(params, x):
        seen.append((params["w"].dtype, x.dtype))
        return jnp.tanh(x @ params["w"] + params["b"])

    def init(key, x):
        assert x.dtype == jnp.float32
        return {"w": noise(key, (WIDTH, WIDTH)) * 0.5, "b": jnp.zeros(WIDTH)}

    layers, chunks = [fpipe.Layer(layer, init)] * 4, 4
    x, target = noise(jax.random.key(0), (8, WIDTH)), jnp.ones((8, WIDTH))
    pipe = made(executor, layers, compute_dtype=jnp.bfloat16)
    params = pipe.init(jax.random.key(1), x)
    plain = pipe.gather(params)
    assert {a.dtype for a in jax.tree.leaves(plain)} == {jnp.dtype(jnp.float32)}
    seen.clear()
    value, grads = pipe.value_and_grad(mse)(params, x, target)
    assert set(seen) == {(jnp.dtype(jnp.bfloat16),) * 2}

    def by_hand(params, x, target):
        for own in params:
            own, x = low((own, x))
            x = jnp.tanh(x @ own["w"] + own["b"])
        return mse(x.astype(jnp.float32), target)

    pieces = [(x[i : i + 2], target[i : i + 2]) for i in range(0, 8, 2)]
    parts = [jax.value_and_grad(by_hand)(plain, *piece) for piece in pieces]
    want = jax.tree.map(lambda *a: sum(a) / chunks, *parts)
    assert_same((value, pipe.gather(grads)), want, tolerance=2e-2)
    assert pipe(params, x).dtype == jnp.float32


def statistics():
    """A running mean in float32, whatever the layer computes in."""

    def apply(params, x, *, state):
        y = (x - state.astype(x.dtype)) * params
        return y, 0.5 * (state + x.astype(jnp.float32).mean(0))

    return fpipe.Layer(
        apply,
        lambda key, x: jnp.ones(x.shape[-1]),
        init_state=lambda x: jnp.zeros(x.shape[-1]),
        name="statistics",
    )


MIXED = {**models(), "statistics": [dense(), statistics(), dense(), dense()]}


@pytest.mark.parametrize("model", ["nested", "statistics", "tied", "jump3"])
def test_mixed_precision_is_the_same_everywhere(model):
    layers = MIXED[model]
    case = Case(layers, 4, rows=8)
    params, needs = case.params(), case.needs
    balance = (1, 1, 1, len(layers) - 3)
    ref = made("sequential", layers, compute_dtype=jnp.bfloat16)
    want = ref.value_and_grad(mse, argnums=(0, 1))(params, case.x, case.target, **needs)
    for executor in ("placed", "scan"):
        pipe = made(executor, layers, balance, compute_dtype=jnp.bfloat16)
        value, grads = pipe.value_and_grad(mse, argnums=(0, 1))(
            pipe.place(params), case.x, case.target, **needs
        )
        assert_same((value, (pipe.gather(grads[0]), grads[1])), want, tolerance=2e-2)


def test_boundaries_have_the_dtype(monkeypatch):
    """What crosses from stage to stage is half as large."""
    layers = [dense()] * 4
    pipe = made("placed", layers, compute_dtype=jnp.bfloat16)
    first, *_, last = pipe.devices
    x, target = (jax.device_put(jnp.ones((8, WIDTH)), d) for d in (first, last))
    params, put = pipe.init(jax.random.key(0), x), []
    step, device_put = pipe.value_and_grad(mse), jax.device_put
    step(params, x, target)

    def seen(arrays, device):
        put.extend(array.dtype for array in arrays)
        return device_put(arrays, device)

    monkeypatch.setattr(jax, "device_put", seen)
    step(params, x, target)
    # Each microbatch goes over three cuts, and its cotangent comes back.
    assert put == [jnp.bfloat16] * (2 * 3 * pipe.chunks)


def test_what_is_no_float_stays():
    def embed(params, x):
        assert x["tokens"].dtype == jnp.int32
        return params[x["tokens"]] * x["mask"].astype(params.dtype)[:, None]

    layers = [
        fpipe.Layer(embed, lambda key, x: noise(key, (11, WIDTH))),
        dense(),
        dense(),
        dense(),
    ]
    x = {"tokens": jnp.arange(8, dtype=jnp.int32), "mask": jnp.arange(8) % 2 == 0}
    ref = made("sequential", layers, compute_dtype=jnp.bfloat16)
    params = ref.init(jax.random.key(0), x)
    want = ref.value_and_grad(mse)(params, x, jnp.ones((8, WIDTH)))
    for executor in ("placed", "scan"):
        pipe = made(executor, layers, compute_dtype=jnp.bfloat16)
        value, grads = pipe.value_and_grad(mse)(
            pipe.place(params), x, jnp.ones((8, WIDTH))
        )
        assert_same((value, pipe.gather(grads)), want, tolerance=2e-2)


def test_it_is_part_of_the_value():
    pipe = made("placed", [shifted] * 4, compute_dtype="bfloat16")
    assert pipe.compute_dtype == jnp.bfloat16
    assert pickle.loads(pickle.dumps(pipe)) == pipe
    other = dataclasses.replace(pipe, compute_dtype=None)
    assert other != pipe
    assert other.compute_dtype is None


@pytest.mark.parametrize("dtype", [jnp.int32, "half of it", jnp.complex64])
def test_a_dtype_that_is_no_float(dtype):
    for executor in EXECUTORS:
        with pytest.raises(
            TypeError,
            match=r"compute_dtype=.*a floating dtype is needed, such as jnp.bfloat16",
        ):
            made(executor, [dense()] * 4, compute_dtype=dtype)


# --- scaled losses ---


@pytest.mark.parametrize(
    ("executor", "reduction"),
    [
        ("sequential", "mean"),
        ("placed", "sum"),
        ("placed", "weighted"),
        ("scan", "mean"),
        ("scan", "weighted"),
    ],
)
def test_a_scale_changes_nothing_that_does_not_vanish(executor, reduction):
    def loss_fn(y, target):
        value = jnp.sum((y - target) ** 2)
        return (
            (value, jnp.sum(target > 0).astype(jnp.float32))
            if reduction == "weighted"
            else value
        )

    case = Case([dense()] * 4, 4, rows=8)
    pipe = made(executor, case.layers)
    params = pipe.place(case.params())
    run = pipe.value_and_grad(loss_fn, reduction=reduction, argnums=(0, 1))
    want = run(params, case.x, case.target)
    for scale in (1024.0, jnp.float32(1024)):
        assert_same(run(params, case.x, case.target, loss_scale=scale), want)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_it_saves_small_gradients_of_float16(executor):
    """A gradient of 1e-9 is zero in float16; scaled by 2**16 it is a number."""
    layers = [dense()] * 4
    x = noise(jax.random.key(0), (8, WIDTH))
    pipe = made(executor, layers, compute_dtype=jnp.float16)
    params = pipe.init(jax.random.key(2), x)
    run = pipe.value_and_grad(lambda y: jnp.mean(y) * 1e-8)
    exact = made("sequential", layers).value_and_grad(lambda y: jnp.mean(y) * 1e-8)(
        pipe.gather(params), x
    )[1]
    lost, kept = (
        pipe.gather(run(params, x, loss_scale=scale)[1]) for scale in (None, 2.0**20)
    )
    first = lambda grads: np.asarray(jax.tree.leaves(grads[0])[-1])  # noqa: E731
    assert not first(lost).any()
    chex.assert_trees_all_close(first(kept), first(exact), rtol=2e-2)


def test_a_scale_that_is_none():
    pipe = made("placed", [dense()] * 4)
    params = pipe.init(jax.random.key(0), jnp.ones((8, WIDTH)))
    for scale in (jnp.ones(3), "much", jnp.int32(3)):
        with pytest.raises(
            TypeError, match="a number or a 0-d array of floats is needed"
        ):
            pipe.value_and_grad(lambda y: jnp.mean(y))(
                params, jnp.ones((8, WIDTH)), loss_scale=scale
            )


def test_another_scale_compiles_nothing(caplog):
    pipe = made("placed", [dense()] * 4)
    x = jnp.ones((8, WIDTH))
    params = pipe.init(jax.random.key(0), x)
    run = pipe.value_and_grad(lambda y: jnp.mean(y))
    # A number and an array on a device are two kinds, and each compiles once.
    for scale in (2.0, jnp.float32(2)):
        run(params, x, loss_scale=scale)
    other = jnp.float32(8)
    with jax.log_compiles():
        for scale in (4.0, other):
            run(params, x, loss_scale=scale)
        assert not caplog.records
        # Compilations are in the log, if there are any.
        run(params, x[:4], loss_scale=other)
        assert caplog.records


# --- sums over calls ---


@pytest.mark.quick(cases=1)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_gradients_add_up_over_calls(executor):
    case = Case([dense()] * 4, 4, rows=8)
    pipe = made(executor, case.layers)
    params = pipe.place(case.params())
    run = pipe.value_and_grad(mse, argnums=(0, 1))
    _, first = run(params, case.x, case.target)
    value, both = run(params, case.x + 1, case.target, grads=first)
    _, second = run(params, case.x + 1, case.target)
    assert_same((value, both), (value, jax.tree.map(jnp.add, first, second)))
    chex.assert_trees_all_equal(
        first, run(params, case.x, case.target)[1]
    )  # not consumed
    for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(first), strict=True):
        assert a.sharding == b.sharding
    scaled = run(params, case.x + 1, case.target, grads=first, loss_scale=512.0)
    assert_same(scaled, (value, both))


def test_inside_jit_too():
    case = Case([dense()] * 4, 4, rows=8)
    pipe = made("scan", case.layers)
    params = pipe.place(case.params())
    run = pipe.value_and_grad(mse)

    @jax.jit
    def two(params, x, target):
        _, grads = run(params, x, target, loss_scale=8.0)
        return run(params, x + 1, target, grads=grads, loss_scale=8.0)

    _, first = run(params, case.x, case.target)
    assert_same(
        two(params, case.x, case.target),
        run(params, case.x + 1, case.target, grads=first),
    )


def test_gradients_that_do_not_fit():
    case = Case([dense()] * 4, 4, rows=8)
    pipe = made("placed", case.layers)
    params = pipe.place(case.params())
    run = pipe.value_and_grad(mse)
    _, grads = run(params, case.x, case.target)
    with pytest.raises(
        ValueError, match="`grads=`: they must have the structure of the gradients"
    ):
        run(params, case.x, case.target, grads=grads[:3])
    with pytest.raises(ValueError, match=r"`grads=`: at \[0\].* they are bfloat16"):
        run(params, case.x, case.target, grads=low(grads))
    with pytest.raises(ValueError, match=r"`grads=`: at \[0\].* they are 0, but the"):
        run(params, case.x, case.target, grads=jax.tree.map(lambda a: 0, grads))
    with pytest.raises(
        ValueError, match=r"`grads=`: at \[1\].* they are on .* but the gradient is on "
    ):
        run(params, case.x, case.target, grads=jax.device_put(grads, jax.devices()[0]))


# --- frozen parameters ---


def lora(rank=2):
    """A dense layer that is fine-tuned by a product of two thin matrices (Hu et al.,
    arXiv 2106.09685).
    """

    def init(key, x):
        width = x.shape[-1]
        return {
            "a": noise(jax.random.fold_in(key, 1), (width, rank)),
            "b": noise(jax.random.fold_in(key, 2), (rank, width)) * 0.1,
            "w": noise(key, (width, width)) * 0.3,
        }

    return fpipe.Layer(
        lambda p, x: jnp.tanh(x @ p["w"] + (x @ p["a"]) @ p["b"]), init, name="lora"
    )


def is_base(path, array):
    return path.endswith("/w") and array.ndim == 2


FROZEN = {"function": is_base, "tree": ({"a": False, "b": False, "w": True},) * 4}


@pytest.mark.parametrize(("executor", "frozen"), in_turn(EXECUTORS, FROZEN))
def test_frozen_weights_get_no_gradient_and_the_others_the_same(executor, frozen):
    frozen = FROZEN[frozen]
    layers = [lora()] * 4
    x, target = noise(jax.random.key(0), (8, WIDTH)), jnp.ones((8, WIDTH))
    pipe = made(executor, layers)
    params = pipe.init(jax.random.key(1), x)
    value, full = pipe.value_and_grad(mse)(params, x, target)
    got, grads = pipe.value_and_grad(mse, frozen=frozen)(params, x, target)
    dtypes = [a.dtype for a in jax.tree.leaves(grads)]
    assert dtypes.count(jax.dtypes.float0) == (1 if executor == "scan" else 4)
    assert (
        sum(a.nbytes for a in jax.tree.leaves(grads))
        == sum(a.nbytes for a in jax.tree.leaves(full)) * 16 // 32
    )
    kept = [
        (a, b)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(full), strict=True)
        if a.dtype == b.dtype
    ]
    assert_same((got, [a for a, _ in kept]), (value, [b for _, b in kept]))


def products(text):
    return len(re.findall(r" dot\(", text))


@pytest.mark.parametrize("checkpoint", ["always", "never"])
def test_frozen_weights_cost_no_product(checkpoint):
    """Each layer has three products, with an input and a weight gradient each; freezing
    `w` saves one.
    """
    layers, x = [lora()] * 4, jnp.ones((8, WIDTH))
    counts = []
    for frozen in (None, is_base):
        pipe = made("scan", layers, balance=(4,), chunks=2, checkpoint=checkpoint)
        params = pipe.init(jax.random.key(0), x)
        run = jax.jit(pipe.value_and_grad(lambda y: jnp.mean(y**2), frozen=frozen))
        counts.append(products(run.lower(params, x).compile().as_text() or ""))
    assert counts[0] - counts[1] == 4


def counted(width):
    """A dense layer with integers beside its weights."""

    def init(key, x):
        return {"w": noise(key, (x.shape[-1], width)), "n": jnp.arange(width)}

    return fpipe.Layer(lambda p, x: jnp.tanh(x @ p["w"]), init, name="counted")


# Stages whose arrays share rows under `scan`: all alike, each its own, with integers.
SHARED_ROWS = {
    "alike": lambda: [dense()] * 4,
    "unlike": lambda: [dense(6), dense(5), dense(7), dense()],
    "integers": lambda: [counted(6), dense(5), counted(7), counted(WIDTH)],
}


@pytest.mark.parametrize(
    ("executor", "rows"),
    [
        ("placed", "integers"),
        ("scan", "alike"),
        pytest.param("scan", "unlike", marks=pytest.mark.quick),
        ("scan", "integers"),
    ],
)
def test_what_is_frozen_has_no_gradient_in_a_row_with_others(executor, rows):
    """Gathered gradients are those of the plain composition: `float0` where the
    parameter is frozen, as where it is an integer.
    """
    layers = SHARED_ROWS[rows]()
    case = Case([dense()] * 4, 4, rows=8)
    params = made("sequential", layers).init(jax.random.key(0), case.x)
    plain, pipe = made("sequential", layers), made(executor, layers)
    placed = pipe.place(params)

    def frozen(path, array):
        return path.startswith("1/") or path in ("0/w", "2/b")

    want = plain.value_and_grad(mse, frozen=frozen)(params, case.x, case.target)
    run = pipe.value_and_grad(mse, frozen=frozen)
    value, grads = run(placed, case.x, case.target)
    assert_same((value, pipe.gather(grads)), want)
    # Nor has it one on the way: a copy, a trip through the gathered tree, a sum with
    # others, a scaled loss.
    assert_same(pipe.gather(pickle.loads(pickle.dumps(grads))), want[1])
    assert_same(pipe.gather(pipe.place(pipe.gather(grads))), want[1])
    _, twice = run(placed, case.x, case.target, grads=grads, loss_scale=8.0)
    doubled = jax.tree.map(
        lambda g: g if g.dtype == jax.dtypes.float0 else 2 * g, want[1]
    )
    assert_same(pipe.gather(twice), doubled)
    if executor == "scan":
        traced = jax.jit(lambda g: pipe.gather(g))(grads)
        assert_same(traced, want[1])


def test_all_of_a_packed_row_is_frozen():
    pipe = made("scan", [dense()] * 4)
    case = Case([dense()] * 4, 4, rows=8)
    _, none = pipe.value_and_grad(mse, frozen=lambda *_: True)(
        pipe.place(case.params()), case.x, case.target
    )
    assert {a.dtype for a in jax.tree.leaves(none)} == {np.dtype(jax.dtypes.float0)}


def test_a_frozen_owner_of_tied_weights():
    layers = [owner(), dense(), dense(), borrower()]
    case = Case(layers, 4, rows=8)
    params = case.params()
    want = case.reference.value_and_grad(mse, frozen=(True, False, False, False))(
        params, case.x, case.target
    )
    for executor in ("placed", "scan"):
        pipe = made(executor, layers)
        value, grads = pipe.value_and_grad(mse, frozen=(True, False, False, False))(
            pipe.place(params), case.x, case.target
        )
        assert_same((value, pipe.gather(grads)), want)


def test_skips_beside_frozen_layers():
    layers = [keep(), dense(), dense(), add()]
    case = Case(layers, 4, rows=8)
    params = case.params()
    frozen = (True, True, False, True)
    want = case.reference.value_and_grad(mse, frozen=frozen, argnums=(0, 1))(
        params, case.x, case.target
    )
    pipe = made("placed", layers)
    value, grads = pipe.value_and_grad(mse, frozen=frozen, argnums=(0, 1))(
        pipe.place(params), case.x, case.target
    )
    assert_same((value, (pipe.gather(grads[0]), grads[1])), want)


def test_frozen_that_does_not_fit():
    case = Case([dense()] * 4, 4, rows=8)
    for executor in EXECUTORS:
        pipe = made(executor, case.layers)
        params = pipe.place(case.params())
        with pytest.raises(
            ValueError,
            match="a pytree of bools with one entry per layer that the parameters "
            "begin with",
        ):
            pipe.value_and_grad(mse, frozen=(True, False))(params, case.x, case.target)
        with raises(
            TypeError, "`value_and_grad(frozen=...)`: bools are needed, got 'yes'"
        ):
            pipe.value_and_grad(mse, frozen=(False, False, False, "yes"))(
                params, case.x, case.target
            )


def test_a_path_in_brackets_freezes_nothing_and_is_refused():
    case = Case([dense()] * 4, 4, rows=8)
    pipe = made("placed", case.layers)
    params = pipe.place(case.params())

    def step(frozen):
        return pipe.value_and_grad(mse, frozen=frozen)(params, case.x, case.target)

    with raises(
        ValueError,
        "`frozen(path, array)`: it freezes \"[0]['b']\", but that path is written "
        '"0/b", as by `jax.tree_util.keystr(path, simple=True, separator="/")`, so the '
        "function would freeze nothing",
    ):
        step(lambda path, array: path.startswith("[0]"))
    # One that takes paths apart cannot read brackets, and need not.
    step(lambda path, array: int(path.partition("/")[0]) > 3)
