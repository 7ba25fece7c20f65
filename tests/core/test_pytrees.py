"""The bytes of arrays."""

import jax
import pytest

from fpipe._core.pytrees import nbytes


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_the_bytes_of_a_key_are_those_of_its_data(impl):
    keys = jax.random.split(jax.random.key(0, impl=impl), 3)
    want = jax.random.key_data(keys).nbytes
    assert nbytes(keys) == nbytes(jax.eval_shape(lambda: keys)) == want
    assert nbytes(jax.typeof(keys)) == want
