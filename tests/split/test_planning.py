"""Costs, balances and predictions of a function that was split are those of the same
layers written by hand, by each measure that layers have. By default its pieces have one
of their own, and whoever finds a balance goes by that. Nothing is compiled.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import fpipe
from tests.split.models import gpt

WIDTHS = (3, 8, 8, 2, 9, 3)
X = jax.ShapeDtypeStruct((6, WIDTHS[0]), jnp.float32)


def dense(w, x):
    return jnp.tanh(x @ w)


def stack(params, x):
    for n, w in enumerate(params):
        x = fpipe.cut(x) if n else x
        x = dense(w, x)
    return x


@pytest.fixture(scope="module")
def shapes():
    return [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in itertools.pairwise(WIDTHS)
    ]


@pytest.fixture(scope="module")
def split(shapes):
    return fpipe.split(stack, shapes, X)


@pytest.fixture(scope="module")
def layers(shapes):
    def layer(w):
        return fpipe.Layer(dense, lambda key, x: jnp.zeros(w.shape), "dense")

    return [layer(w) for w in shapes]


@pytest.mark.quick
def test_costs_are_those_of_layers(split, layers):
    own, theirs = (
        fpipe.layer_costs(given, X, chunks=3, by="bytes") for given in (split, layers)
    )
    # A piece hands on the same arrays, and is called by the path of its parameters.
    assert dataclasses.replace(own, names=theirs.names) == theirs


def test_a_balance_is_that_of_layers(split, layers):
    # The limits are such that the balance by FLOPs alone does not fit.
    loose = {"stages": 2, "by": "flops"}
    tight = {**loose, "chunks": 3, "memory": [1600, 4000]}
    found = [
        fpipe.balance(given, X, **limits)
        for limits in (loose, tight)
        for given in (layers, split)
    ]
    assert found[0] == found[1] != found[2] == found[3]
    with pytest.raises(ValueError, match="does not fit: short by"):
        fpipe.balance(split, X, stages=2, memory=100)


def test_a_pipe_finds_its_balance_by_a_sample(split, layers):
    devices = jax.devices()[:2]
    for by in ("flops", "bytes", "memory"):
        found = [
            fpipe.Pipe(given, by, devices, 3, sample=X).balance
            for given in (split, layers)
        ]
        assert found[0] == found[1]


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zb_v"])
def test_a_pipe_balances_virtual_stages(split, schedule):
    what = {"devices": jax.devices()[:2], "chunks": 4, "schedule": schedule}
    pipe = fpipe.Pipe(split, checkpoint="never", **what)
    assert pipe.balance == split.balance(4)


def alike(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return x


def test_whoever_finds_a_balance_goes_by_one_estimate():
    devices = jax.devices()[:2]
    nine = [jax.ShapeDtypeStruct((8, 8), jnp.float32)] * 9
    x = jax.ShapeDtypeStruct((6, 8), jnp.float32)
    split = fpipe.split(alike, nine, jax.ShapeDtypeStruct((2, 8), jnp.float32))
    # Where the first stage runs its forward twice, it has fewer of the equal pieces.
    for checkpoint, balance in (("never", (5, 4)), ("except_last", (4, 5))):
        what: dict[str, Any] = {"checkpoint": checkpoint, "schedule": "1f1b"}
        pipe = fpipe.Pipe(split, devices=devices, chunks=3, **what)
        assert pipe.balance == balance
        assert fpipe.balance(split, x, stages=2, chunks=3, **what) == balance
    costs = fpipe.layer_costs(split, x, chunks=3)
    assert fpipe.balance(costs, stages=2, schedule="1f1b") == balance
    sampled = fpipe.Pipe(split, devices=devices, chunks=3, sample=x, **what)
    assert sampled.balance == balance
    only: dict[str, Any] = {"checkpoints": checkpoint, "schedules": "1f1b"}
    tuning = fpipe.tune(split, x, devices=devices, chunks=3, **only)
    assert tuning.pipe.balance == balance


def test_an_estimate_is_that_of_the_batch():
    """Of one with more rows the weights count for less."""
    widths = (64, 64, 64, 256, 64)
    shapes = [
        jax.ShapeDtypeStruct(sizes, jnp.float32) for sizes in itertools.pairwise(widths)
    ]
    split = fpipe.split(alike, shapes, jax.ShapeDtypeStruct((2, 64), jnp.float32))
    few, many = (
        fpipe.layer_costs(split, jax.ShapeDtypeStruct((n, 64), jnp.float32))
        for n in (2, 512)
    )
    assert few.forward == tuple(
        work for work, _ in split.cut.trace(split.cut.first).work
    )
    assert few.estimated
    assert many.unit == "FLOP"
    assert few.forward < many.forward
    assert many.forward[2] / many.forward[0] != few.forward[2] / few.forward[0]


def test_the_best_pipe_is_that_of_layers(split, layers, shapes):
    what = {
        "devices": jax.devices()[:2],
        "chunks": [2, 6],
        "schedules": ["1f1b", "zb_v"],
        "checkpoints": "never",
        "memory": 1700,
    }
    own, theirs = (fpipe.tune(given, X, **what) for given in (split, layers))
    assert own.unit == theirs.unit
    found = []
    for tuning in (own, theirs):
        rows: list[Any] = []
        for c in tuning.candidates:
            rows.append((c.schedule, c.chunks, c.refused))
            if c.pipe is not None and c.prediction is not None:
                rows.append((c.pipe.balance, c.prediction.step, c.prediction.peak))
        found.append(rows)
    assert found[0] == found[1]
    assert any(c.refused for c in own.candidates)
    # It takes the function's own tree.
    assert own.pipe.layers == split
    assert own.pipe.plan(shapes, X).step == found[0][1][1]


def test_tuning_takes_the_functions_own_parameters():
    example = gpt()
    tuning = fpipe.tune(
        example.split(),
        example.x,
        params=example.params,
        devices=jax.devices()[:2],
        chunks=3,
        schedules="1f1b",
        checkpoints="always",
        compute_dtype=jnp.bfloat16,
        **example.needs,
    )
    assert tuning.pipe.balance == (2, 2)
    assert tuning.pipe.compute_dtype == jnp.bfloat16


def test_pieces_take_what_xla_counts():
    """By rules and by XLA, which counts an `exp` apart."""

    def attention(params, x):
        q, k, v = jnp.split(x @ params["qkv"], 3, -1)
        h = x + jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v
        return jnp.tanh(fpipe.cut(h) @ params["out"]).mean(1)

    params = {"qkv": jnp.ones((32, 96)), "out": jnp.ones((32, 64))}
    x = jax.ShapeDtypeStruct((2, 16, 32), jnp.float32)
    split = fpipe.split(attention, params, x)
    trace = split.cut.trace(split.cut.first)
    counted = fpipe.layer_costs(split, x, by="flops").forward
    assert len(counted) == 2
    for piece, flops in zip(trace.pieces, counted, strict=True):
        assert abs(piece.flops - flops) <= 0.03 * flops
