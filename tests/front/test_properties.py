"""Random models on random partitions and schedules: the invariant where nobody thought
of the case.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import fpipe.testing
from tests.helpers import noise, turned

WIDTH = 4
SLOW = (
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
)  # every example compiles
# How the batch is given: cut by rows; with its rows on another axis; as ready-made
# microbatches; or cut, beside states of rows in pieces, which a second call goes on
# with, as decoding does.
FORMS = ["cut", "turned", "ready", "pieces"]
AXES = [None, "data", "model"]
"""That of a mesh of two stages on two devices each; `None`: no mesh."""


def has_all(layers):
    """Whether a model has a layer without parameters, and state of rows."""
    bare = [layer.init(jax.random.key(0), None) is None for layer in layers]
    return any(bare) and any(layer.state_rows for layer in layers)


def all_of(_):
    return True


def cuts(pipe):
    """Whether a pipe has several stages and microbatches."""
    return pipe.chunks > 1 and len(pipe.balance) > 1


def offloads(pipe):
    return "offload" in str(pipe.checkpoint) and cuts(pipe)


def adds(pipe):
    """Whether a pipe adds actions to its schedule."""
    return (pipe.recompute == "early" or pipe.offload is not None) and cuts(pipe)


def sharded(layers, axis, data):
    """Random layers whose weights are sharded over an axis."""
    spec = data.draw(st.sampled_from([P(axis), P(None, axis)]))
    return [
        dataclasses.replace(layer, spec={"w": spec, "b": None})
        if layer.init(jax.random.key(0), None)
        else layer
        for layer in layers
    ]


def check(data, executor, form, axis, wanted=all_of, pipes=all_of, most=6):
    """In float64: where a random model's gradients cancel, float32 leaves nothing to
    compare.
    """
    with jax.enable_x64(True):
        _check(data, executor, form, axis, wanted, pipes, most)


def _check(data, executor, form, axis, wanted, pipes, most):
    layers = data.draw(fpipe.testing.models(WIDTH, most).filter(wanted))
    mesh = None
    if axis is not None:
        mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("stage", axis))
        layers = sharded(layers, axis, data)
    shared = 2 if axis == "data" else 1
    rows = shared * data.draw(st.integers(1, 7 // shared))
    x, target, side = (noise(jax.random.key(k), (rows, WIDTH)) for k in range(3))
    if form == "turned":
        layers = turned(layers)
        x, target = (fpipe.Chunk(a.T, axis=1) for a in (x, target))
    elif form == "ready":
        # Of any number of rows.
        drawn = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
        sizes = [shared * size for size in drawn]
        x, target, side = (
            fpipe.Microbatches(
                [
                    noise(jax.random.key(k + 3 * i), (n, WIDTH))
                    for i, n in enumerate(sizes)
                ]
            )
            for k in range(3)
        )
    partitions = fpipe.testing.partitions(layers, x, executor, mesh=mesh)
    pipe = data.draw(partitions.filter(pipes))
    reduction = data.draw(st.sampled_from(["mean", "sum", "weighted"]))
    needs = {"side": side, "key": jax.random.key(4)}

    def check_step(state):
        fpipe.testing.assert_equals_sequential(
            pipe,
            x,
            target,
            loss_fn=functools.partial(errors, form == "turned", reduction),
            state=state,
            reduction=reduction,
            has_aux=True,
            argnums=(0, 1, 2),
            **needs,
        )

    if form != "pieces":
        check_step(None)
        return
    reference = fpipe.sequential(layers, chunks=pipe.chunks)
    state = in_pieces(pipe, reference.init_state(x, side))
    if any(layer.state_rows for layer in layers):
        check_step(state)
        params = pipe.init(jax.random.key(0), x, side)
        _, state = pipe(params, x, state=state, **needs)
        state = jax.device_get(state)  # it is where its stages are
    check_step(state)


def errors(turned, reduction, y, target):
    """A loss, and beside it the errors of each row."""
    squares = (y - target) ** 2
    rows = squares.sum(0 if turned else 1)
    aux = {"rows": fpipe.PerRow(rows), "largest": rows.max()}
    if reduction == "weighted":
        return (rows.sum(), (target > 0).sum().astype(y.dtype) + 1), aux
    return squares.mean(), aux


def in_pieces(pipe, state):
    """States of rows cut by hand, as a call with as many microbatches gives them."""

    def cut(one):
        rows = len(one["seen"])
        size = -(-rows // pipe.chunks)
        return fpipe.Microbatches(
            [
                jax.tree.map(lambda a, n=n: a[n : n + size], one)
                for n in range(0, rows, size)
            ]
        )

    return tuple(
        cut(one) if layer.state_rows else one
        for layer, one in zip(pipe.layers, state, strict=True)
    )


# Of "cut" alone the table of `test_equal.py` has most rows.
@pytest.mark.parametrize(
    ("executor", "form", "axis"),
    [
        ("placed", "turned", "data"),
        ("placed", "ready", "model"),
        ("placed", "pieces", None),
        ("scan", "turned", None),
        ("scan", "ready", "data"),
        ("scan", "pieces", "model"),
    ],
)
@settings(
    max_examples=1,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # to shrink takes minutes
    suppress_health_check=SLOW,
)
@given(st.data())
def test_a_random_model_on_a_random_partition(executor, form, axis, data):
    pipes = {"pieces": offloads, "ready": adds}.get(form, cuts)
    check(data, executor, form, axis, has_all, pipes, most=4)


@pytest.mark.full
@pytest.mark.parametrize("executor", ["placed", "scan"])
@settings(max_examples=1000, deadline=None, suppress_health_check=SLOW)
@given(st.data())
def test_many_random_models_on_random_partitions(executor, data):
    form, axis = data.draw(st.sampled_from(FORMS)), data.draw(st.sampled_from(AXES))
    check(data, executor, form, axis)
