"""What calls do over meshes, with both executors."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import fpipe
from tests.executors.cut_layers import FULLY_SHARDED, WIDE
from tests.helpers import assert_same, counter, dense, mse, noise
from tests.scripts import run

DATA = Mesh(np.array(jax.devices()).reshape(2, 2), ("stage", "data"))


def test_devices_that_share_rows_and_parameters():
    script = run(["-m", "tests.executors.eight_devices"])
    assert script.returncode == 0, script.stdout + script.stderr


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_half_precision_with_frozen_parameters(executor):
    """Each backward scatters the gradients, which are summed in float32."""
    layers, half = [FULLY_SHARDED] * 2, jnp.bfloat16
    x = noise(jax.random.key(1), (8, WIDE))
    options = {"chunks": 2, "compute_dtype": half}
    pipe = fpipe.Pipe(layers, mesh=DATA, executor=executor, unshard="action", **options)
    params = pipe.init(jax.random.key(0), x)
    frozen = ({"up": True, "down": False, "bias": False}, False)
    got = pipe.value_and_grad(mse, frozen=frozen)(params, x, x)
    plain = fpipe.sequential(layers, **options).value_and_grad(mse, frozen=frozen)
    whole = pipe.gather(params)
    assert_same((got[0], pipe.gather(got[1])), plain(whole, x, x), 2e-2)
    # What is trained lies as its parameter does.
    arrays: list[Any] = [a for a in jax.tree.leaves(got[1]) if hasattr(a, "sharding")]
    specs = {a.sharding.spec for a in arrays}
    cut = {P("data"), P(None, "data")}
    along_stages = {P("stage", *spec) for spec in cut}
    assert cut <= specs or along_stages <= specs


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_deferred_batch_norm_of_rows_that_devices_share(executor):
    """Its statistics are those of all rows of all microbatches."""
    norm = fpipe.DeferredBatchNorm()
    layers = [norm, dense(WIDE), norm]
    x = noise(jax.random.key(1), (8, WIDE))
    pipe = fpipe.Pipe(layers, [2, 1], chunks=2, mesh=DATA, executor=executor)
    plain = fpipe.sequential(layers, chunks=2)
    params, state = plain.init(jax.random.key(0), x), plain.init_state(x)
    step = pipe.value_and_grad(mse)
    needs = {"state": state, "train": True}
    (loss, after), grads = step(pipe.place(params), x, x, **needs)
    got = (loss, pipe.gather_state(after)), pipe.gather(grads)
    assert_same(got, plain.value_and_grad(mse)(params, x, x, **needs))


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_shapes_of_what_is_made_and_placed(executor):
    pipe = fpipe.Pipe([dense(), counter()], chunks=2, mesh=DATA, executor=executor)
    x, key = jnp.zeros((8, 4)), jax.random.key(0)
    params = pipe.init(key, x)
    whole = pipe.gather(params)
    for make, given, made in [
        (pipe.init, (key, x), params),
        (pipe.init_state, (x,), pipe.init_state(x)),
        (pipe.place, (whole,), params),
        (pipe.gather, (params,), whole),
    ]:
        shapes = jax.eval_shape(make, *given)
        chex.assert_trees_all_equal_shapes_and_dtypes(shapes, made)
