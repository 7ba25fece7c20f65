"""What calls issue: nothing for shapes; and what is left where an instruction raises,
or Ctrl-C comes between two.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fpipe
from tests.executors.helpers import observing
from tests.front.test_calls import (
    CALLS,
    SHAPES,
    Trigger,
    X,
    assert_works,
    notes,
    warm,
    with_params,
)
from tests.helpers import assert_same, in_turn


@pytest.mark.parametrize("given", ["arrays", "shapes"])
@pytest.mark.parametrize("name", SHAPES)
def test_eval_shape_equals_that_of_sequential_and_runs_nothing(name, given):
    pipe, placed, reference, params = with_params()
    x = X
    if given == "shapes":
        placed, params, x = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (placed, params, x)
        )
    issued = []
    with observing(lambda item, slots: issued.append(item)):
        got = jax.eval_shape(SHAPES[name](pipe), placed, x)
    want = jax.eval_shape(SHAPES[name](reference), params, x)
    assert jax.tree.leaves(want)
    assert got == want
    assert issued == []


STAGES = MICROBATCHES = 3


NUMBERED = jnp.repeat(jnp.arange(MICROBATCHES, dtype=jnp.float32), 2)[
    :, None
]  # each row holds its microbatch's number


@functools.cache
def watched(way):
    """A pipe whose layers ask the host, in the forward or the backward, on which
    microbatch they are.
    """
    trigger = Trigger()

    def layer(k):
        def host(x, *_):
            trigger(k, int(np.asarray(x)[0, 0]))
            return np.zeros((), np.float32)

        def ask(*args):
            return jax.pure_callback(
                host,
                jax.ShapeDtypeStruct((), jnp.float32),
                *map(jax.lax.stop_gradient, args),
            )

        @jax.custom_vjp
        def asked_backward(x):
            return x

        asked_backward.defvjp(lambda x: (x, x), lambda x, g: (g + ask(x, g),))

        def apply(p, x):
            y = x * p
            return y + ask(y) if way == "forward" else asked_backward(y)

        return fpipe.Layer(apply, name=f"watched{k}")

    pipe = fpipe.Pipe(
        [layer(k) for k in range(STAGES)],
        [1] * STAGES,
        chunks=MICROBATCHES,
        checkpoint="never",
    )
    params = (jnp.float32(1),) * STAGES
    return (
        trigger,
        pipe,
        pipe.place(params),
        fpipe.sequential(pipe.layers, chunks=MICROBATCHES),
        params,
    )


def wait(item, slots):
    """Each instruction is done before the next: an error on the device shows at the one
    that made it.
    """
    del item
    jax.block_until_ready(slots)


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize(
    ("microbatch", "stage"), in_turn(range(MICROBATCHES), range(STAGES))
)
def test_an_exception_while_running_keeps_its_text_and_says_where(
    way, stage, microbatch
):
    trigger, pipe, placed, reference, params = watched(way)
    trigger.at = (stage, microbatch)
    step = pipe.value_and_grad(jnp.mean)
    with (
        pytest.raises((jax.errors.JaxRuntimeError, ValueError)) as caught,
        observing(wait),
    ):
        step(placed, NUMBERED)
    assert f"BoomError: at ({stage}, {microbatch})" in str(caught.value)
    place = "in" if way == "forward" else "in the backward of"
    said = [
        f"fpipe: {place} layer {stage} 'watched{stage}', stage {stage}, microbatch "
        f"{microbatch}"
    ]
    assert notes(caught.value) == said
    # Not waiting, the error comes at the call, or when its result is waited for.
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError)) as caught:
        jax.block_until_ready(step(placed, NUMBERED))
    assert f"BoomError: at ({stage}, {microbatch})" in str(caught.value)
    assert notes(caught.value) == said
    trigger.at = None
    assert_same(
        step(placed, NUMBERED), reference.value_and_grad(jnp.mean)(params, NUMBERED)
    )


def test_an_exception_in_a_pull_back_leaves_it_usable():
    trigger, pipe, placed, reference, params = watched("backward")
    y, pull = jax.vjp(lambda p: pipe(p, NUMBERED), placed)
    trigger.at = (1, 1)
    with pytest.raises(
        (jax.errors.JaxRuntimeError, ValueError), match=r"BoomError: at \(1, 1\)"
    ):
        jax.block_until_ready(pull(jnp.ones_like(y)))
    trigger.at = None
    _, want = jax.vjp(lambda p: reference(p, NUMBERED), params)
    assert_same(pull(jnp.ones_like(y)), want(jnp.ones_like(NUMBERED)))


class Interrupt:
    """Ctrl-C after the `n`-th instruction."""

    def __init__(self, n):
        self.n, self.seen = n, 0

    def __call__(self, item, slots):
        del item, slots
        self.seen += 1
        if self.seen == self.n:
            raise KeyboardInterrupt


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
def test_ctrl_c_inside_a_step_leaves_the_pipe_usable(call, share):
    pipe, placed, _, _ = warm()
    count = Interrupt(0)
    with observing(count):
        CALLS[call](pipe, placed)
    with (
        pytest.raises(KeyboardInterrupt) as caught,
        observing(Interrupt(max(1, round(share * count.seen)))),
    ):
        CALLS[call](pipe, placed)
    assert notes(caught.value) == []
    assert_works(pipe, placed)
