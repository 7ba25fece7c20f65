"""Exceptions in layers, in every executor and dispatch mode: the error that arrives is
the user's, says where, and leaves nothing behind.
"""

import jax
import jax.numpy as jnp
import pytest

import fpipe
from tests.front.test_calls import BoomError, Trigger, notes

ROWS, M = 8, 4
X = jnp.arange(ROWS, dtype=jnp.float32)[:, None] + jnp.zeros((1, 2))


# --- while tracing ---


def tracing(k, trigger):
    """A layer that raises while its forward, or its backward, is traced."""

    @jax.custom_vjp
    def scaled(p, x):
        return p * x

    def forward(p, x):
        return scaled(p, x), (p, x)

    def backward(kept, g):
        trigger("B", k)
        p, x = kept
        return jnp.sum(g * x), p * g

    scaled.defvjp(forward, backward)

    def apply(p, x):
        trigger("F", k)
        return scaled(p, x)

    return fpipe.Layer(apply, lambda key, x: jnp.float32(k + 1), "tracing")


BALANCES = {"cores": [2, 2], "two on the last": [1, 1, 2], "no core": [3, 1]}


@pytest.mark.parametrize("executor", ["placed", "scan"])
@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("kind", ["F", "B"])
def test_a_note_names_the_stage_of_the_pipe(executor, balance, kind):
    """Not the unit that the scan executor makes of a part of a stage."""
    trigger, counts = Trigger(), BALANCES[balance]
    layers = [tracing(k, trigger) for k in range(4)]
    stage_of = [s for s, count in enumerate(counts) for _ in range(count)]
    for k in range(4):
        pipe = fpipe.Pipe(layers, counts, chunks=M, executor=executor)
        params = pipe.place((jnp.ones(()),) * 4)
        trigger.at = (kind, k)
        with pytest.raises(BoomError) as caught:
            pipe.value_and_grad(jnp.mean)(params, X)
        trigger.at = None
        (note,) = notes(caught.value)
        assert f"layer {k} 'tracing'" in note or kind == "B"
        assert note.endswith(f", stage {stage_of[k]}, microbatch 0")


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_a_note_on_the_loss_names_the_last_stage(executor):
    def loss(y):
        raise BoomError("here")

    pipe = fpipe.Pipe([tracing(0, Trigger())] * 4, [2, 2], chunks=M, executor=executor)
    with pytest.raises(BoomError) as caught:
        pipe.value_and_grad(loss)(pipe.place((jnp.ones(()),) * 4), X)
    assert notes(caught.value) == ["fpipe: in loss_fn, stage 1, microbatch 0"]


@pytest.mark.parametrize("executor", ["placed", "scan"])
@pytest.mark.filterwarnings("default:stage . keeps")
def test_a_warning_names_the_stage_of_the_pipe(executor):
    """Of three units of the scan executor this is the last."""

    def scanned(ws, x):
        def body(x, w):
            return jnp.tanh(x @ w.astype(jnp.bfloat16).astype(jnp.float32)), None

        return jax.lax.scan(body, x, ws)[0]

    plain = fpipe.Layer(lambda p, x: jnp.tanh(p * x), name="plain")
    layers = [plain, plain, plain, fpipe.Layer(scanned)]
    pipe = fpipe.Pipe(layers, [2, 2], chunks=M, checkpoint="never", executor=executor)
    params = pipe.place((jnp.ones(()),) * 3 + (jnp.ones((3, 2, 2)),))
    with pytest.warns(UserWarning, match="keeps") as caught:
        pipe.value_and_grad(jnp.mean)(params, X)
    assert {str(w.message).split()[1] for w in caught} == {"1"}
