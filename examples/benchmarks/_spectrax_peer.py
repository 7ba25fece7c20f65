"""The worker of `peers.py` for SpectraX, in an environment with `spectrax-lib`."""

# pyright: reportMissingImports=false

import json
import sys

import jax
import jax.numpy as jnp
import peers

# --- user code ---
import spectrax as spx
from peers import CHUNKS, STAGES, Size
from spectrax.runtime.mpmd import sxjit, sxstage_iter, sxvalue_and_grad
from spectrax.runtime.schedules import Std1F1B


class Stage(spx.Module):
    def __init__(self, arrays, width, number):
        super().__init__()
        keys = jax.random.split(jax.random.key(number), arrays)
        device = jax.devices()[number]
        with spx.assign_stage(total=STAGES, current=number):
            for k, key in enumerate(keys):
                array = jax.device_put(jax.random.normal(key, (width,)), device)
                setattr(self, f"w{k}", spx.Parameter(array))
        self.arrays = arrays

    def forward(self, x):
        return jnp.tanh(
            x * sum(getattr(self, f"w{k}").value for k in range(self.arrays))
        )


class Model(spx.Module):
    def __init__(self, arrays, width):
        super().__init__()
        for s in range(STAGES):
            setattr(self, f"stage{s}", Stage(arrays, width, s))


def loss_fn(y, t):
    return jnp.mean((y - t) ** 2)


def pipeline(arrays, width):
    mesh = spx.create_mesh(axis_dims=(STAGES, 1, -1, 1, 1, 1), mpmd_axis="pp")

    @sxjit(
        mesh=mesh,
        schedule=Std1F1B(microbatches=CHUNKS),
        static_argnums=(),
        batch_argnums=(1, 2),
    )
    def forward(model, x, t):
        for s in range(STAGES):
            x = getattr(model, f"stage{s}")(x)
            if s < STAGES - 1:
                x = sxstage_iter(x)
        return loss_fn(x, t)

    return Model(arrays, width), sxvalue_and_grad(forward)


# --- end of user code ---


def made(size: Size):
    """A step that waits for its results."""
    x, t = jnp.ones((size.rows, size.width)), jnp.zeros((size.rows, size.width))
    t = jax.device_put(t, jax.devices()[STAGES - 1])
    model, step = pipeline(size.arrays, size.width)
    jax.block_until_ready((jax.tree.leaves(model), x, t))
    return lambda: jax.block_until_ready(step(model, x, t)), (model, x, t)


def compare(size: Size) -> None:
    step, given = made(size)
    model, x, t = jax.device_put(given, jax.devices()[0])

    def plain(model):
        y = x
        for s in range(STAGES):
            y = getattr(model, f"stage{s}")(y)
        return loss_fn(y, t)

    loss, grads = step()
    want, expected = jax.value_and_grad(plain)(model)
    peers.check(float(loss), squares(grads), (float(want), squares(expected)))


def squares(grads) -> float:
    return sum(
        float((a * a).sum()) for a in map(jax.device_get, jax.tree.leaves(grads))
    )


def main() -> None:
    options = json.loads(sys.argv[1])
    jax.config.update("jax_num_cpu_devices", STAGES)
    name = f"SpectraX {spx.__version__}, jax {jax.__version__}"
    peers.answer(options, name, __file__, lambda size: made(size)[0], compare)


if __name__ == "__main__":
    main()
