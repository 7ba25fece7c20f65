"""Random models on random partitions and schedules: the invariant where nobody thought
of the case.
"""

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fpipe.testing
from tests.helpers import mse, noise

WIDTH = 3
SLOW = (
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
)  # every example compiles


def check(data, executor):
    """In float64: where a random model's gradients cancel, float32 leaves nothing to
    compare.
    """
    with jax.enable_x64(True):
        _check(data, executor)


def _check(data, executor):
    layers = data.draw(fpipe.testing.models(WIDTH))
    rows = data.draw(st.integers(1, 7))
    x, target, side = (noise(jax.random.key(k), (rows, WIDTH)) for k in range(3))
    if data.draw(st.booleans()):
        # Ready-made, of any number of rows.
        sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
        x, target, side = (
            fpipe.Microbatches(
                [
                    noise(jax.random.key(k + 3 * i), (n, WIDTH))
                    for i, n in enumerate(sizes)
                ]
            )
            for k in range(3)
        )
    pipe = data.draw(fpipe.testing.partitions(layers, x, executor))
    fpipe.testing.assert_equals_sequential(
        pipe,
        x,
        target,
        loss_fn=mse,
        side=side,
        key=jax.random.key(4),
        reduction=data.draw(st.sampled_from(["mean", "sum"])),
        argnums=(0, 1, 2),
    )


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(st.data())
def test_random_models_on_random_partitions(data):
    check(data, "placed")


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(st.data())
def test_random_models_in_one_program(data):
    check(data, "scan")


@pytest.mark.full
@pytest.mark.parametrize("executor", ["placed", "scan"])
@settings(max_examples=1000, deadline=None, suppress_health_check=SLOW)
@given(st.data())
def test_many_random_models_on_random_partitions(executor, data):
    check(data, executor)
