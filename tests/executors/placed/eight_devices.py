"""A GPT whose devices share rows and parameters, in a process of eight devices.

The tests run in processes of four, and this one beside them: `test_meshes.py`.
"""

import jax
import numpy as np
from jax.sharding import Mesh

import fpipe
from tests.executors.cut_layers import WIDE, gpt_block
from tests.executors.helpers import collectives
from tests.helpers import assert_same, mse, noise


def main() -> None:
    """Over each axis it only reduces, and its gradients cross that of data once."""
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = Mesh(np.reshape(jax.devices(), (2, 2, 2)), ("stage", "data", "model"))
    pipe = fpipe.Pipe([gpt_block()] * 2, chunks=2, mesh=mesh)
    x = noise(jax.random.key(1), (8, 3, WIDE))
    params = pipe.init(jax.random.key(0), x)
    got = pipe.value_and_grad(mse)(params, x, x)
    plain = fpipe.sequential(pipe.layers, chunks=2)
    assert_same(got, plain.value_and_grad(mse)(pipe.gather(params), x, x))
    counts = collectives(pipe)
    assert {kind for _, kind in counts} == {"all-reduce"}, counts
    assert counts["F", "all-reduce"] == 4, counts
    assert counts["FB", "all-reduce"] == 8, counts
    assert counts["add parts", "all-reduce"] == 2, counts


if __name__ == "__main__":
    main()
