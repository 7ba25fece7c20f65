"""Warnings point at the line of the user's code, whichever way it calls the package."""

import warnings

import jax
import jax.numpy as jnp
import pytest

import fpipe

W = 16
X = jnp.ones((4, W))


def scanned(weights, x):
    """A layer whose casts of weights stay among the residuals: it is warned about."""

    def product(x, w):
        return jnp.tanh(x @ w.astype(jnp.bfloat16)), None

    y, _ = jax.lax.scan(product, x.astype(jnp.bfloat16), weights)
    return y.astype(jnp.float32)


def tune_options(pipe, params):
    """What `tune` may try, so that it tries one candidate."""
    return {
        "params": params,
        "chunks": 2,
        "checkpoints": "never",
        "schedules": "gpipe",
        "devices": jax.devices()[:1],
        "executor": pipe.executor,
    }


LAYERS = [fpipe.Layer(scanned)]

# Each call is one line, so that the line of its code is the line of the warning.
# fmt: off
WARNING_CALLS = {
    "value_and_grad": lambda pipe, ws: pipe.value_and_grad(jnp.mean)(ws, X),
    "grad": lambda pipe, ws: jax.grad(lambda ws: pipe(ws, X).mean())(ws),
    "vjp": lambda pipe, ws: jax.vjp(pipe, ws, X)[1](X),
    "compile": lambda pipe, ws: pipe.compile(ws, X, loss_fn=jnp.mean),
    "record": lambda pipe, ws: pipe.record(pipe.value_and_grad(jnp.mean), ws, X),
    "plan": lambda pipe, ws: pipe.plan(ws, X, loss_fn=jnp.mean),
    "timed plan": lambda pipe, ws: pipe.plan(ws, X, loss_fn=jnp.mean, by="time"),
    "tune": lambda pipe, ws: fpipe.tune(LAYERS, X, **tune_options(pipe, ws)),
}
SCAN_CALLS = {
    "jit": lambda pipe, ws: jax.jit(pipe.value_and_grad(jnp.mean))(ws, X),
    "grad in jit": lambda pipe, ws: jax.jit(jax.grad(lambda ws: pipe(ws, X).sum()))(ws),
}
# fmt: on


def warnings_of(call, executor):
    # Under other schedules one stage has one microbatch's residuals at a time.
    options = {"chunks": 2, "checkpoint": "never", "schedule": "gpipe"}
    pipe = fpipe.Pipe(LAYERS, [1], executor=executor, **options)
    params = pipe.place((jnp.ones((3, W, W)),))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(pipe, params)
    return caught


@pytest.mark.parametrize(
    ("call", "executor"),
    [
        *(
            (call, executor)
            for call in WARNING_CALLS
            for executor in ("placed", "scan")
        ),
        *((call, "scan") for call in SCAN_CALLS),
    ],
)
def test_a_warning_points_at_the_line_that_called(call, executor):
    run = (WARNING_CALLS | SCAN_CALLS)[call]
    caught = warnings_of(run, executor)
    assert caught
    for warning in caught:
        assert "keeps bfloat16[3,16,16]" in str(warning.message)
        assert warning.filename == __file__
        assert warning.lineno == run.__code__.co_firstlineno


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_a_forward_has_nothing_to_warn_of(executor):
    assert not warnings_of(lambda pipe, params: pipe(params, X), executor)
