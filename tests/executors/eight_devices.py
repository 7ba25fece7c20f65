"""Devices that share rows and parameters, in a process of eight devices.

The tests run in processes of four, and this one beside them: `test_meshes.py`.
"""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import fpipe
from fpipe._executors.scan.exchanges import find_exchanges
from tests.executors.cut_layers import WIDE, gpt_block, multiplied
from tests.executors.helpers import collectives
from tests.executors.scan.poison import poison
from tests.helpers import assert_same, counted, mse, noise


def main() -> None:
    """Both executors over three axes."""
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = Mesh(np.reshape(jax.devices(), (2, 2, 2)), ("stage", "data", "model"))
    check_crossing(mesh)
    check_exchanges(mesh)


def check_crossing(mesh: Mesh) -> None:
    """Over each axis a GPT only reduces, and its gradients cross that of data once."""
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


def over_models(w, x):
    """Rows that go from the devices along one axis to those along another."""
    h = multiplied(w, x)
    if jax.sharding.get_abstract_mesh().empty:
        return h
    return jax.lax.with_sharding_constraint(h, P("model"))


def check_exchanges(mesh: Mesh) -> None:
    """Stages that differ, and whose devices exchange parts of arrays, in one program
    that is compiled once. What a device computes for others alone is NaN.
    """

    def init(key, x):
        return noise(key, (WIDE, WIDE))

    first = fpipe.Layer(over_models, init, name="over models")
    last = fpipe.Layer(multiplied, init, name="columns", spec=P(None, "model"))
    pipe = fpipe.Pipe([first, last], chunks=2, mesh=mesh, executor="scan")
    x = noise(jax.random.key(1), (8, WIDE))
    params = pipe.init(jax.random.key(0), x)
    step = jax.jit(pipe.value_and_grad(mse))
    with pytest.MonkeyPatch.context() as patch:
        assert poison(patch) == []
        with counted("backend_compile") as compiled:
            loss, grads = step(params, x, x)
    assert compiled.count == 1, compiled.count
    plain = fpipe.sequential(pipe.layers, chunks=2).value_and_grad(mse)
    assert_same((loss, pipe.gather(grads)), plain(pipe.gather(params), x, x))
    # If devices ran these as their own stages do, they would wait for each other.
    text = step.lower(params, x, x).compile().as_text()
    assert find_exchanges(text or "", mesh)


if __name__ == "__main__":
    main()
