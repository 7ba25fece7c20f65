"""The worker of `peers.py` for fpipe."""

import importlib.metadata
import json
import sys

import jax
import jax.numpy as jnp
import peers
from peers import CHUNKS, STAGES, Size

# --- user code ---
import fpipe


def init(key, x, arrays):
    keys = jax.random.split(key, arrays)
    return [jax.random.normal(key, x.shape[-1:]) for key in keys]


def stage(params, x):
    return jnp.tanh(x * sum(params))


def loss_fn(y, t):
    return jnp.mean((y - t) ** 2)


def pipeline(arrays, checkpoint, x):
    layer = fpipe.Layer(stage, lambda key, x: init(key, x, arrays))
    pipe = fpipe.Pipe(
        [layer] * STAGES, chunks=CHUNKS, checkpoint=checkpoint, schedule="1f1b"
    )
    return pipe.init(jax.random.key(0), x), pipe.value_and_grad(loss_fn)


# --- end of user code ---


def made(size: Size, checkpoint: str):
    """A step that waits for its results."""
    x, t = jnp.ones((size.rows, size.width)), jnp.zeros((size.rows, size.width))
    params, step = pipeline(size.arrays, checkpoint, x)
    t = jax.device_put(t, jax.devices()[STAGES - 1])
    jax.block_until_ready((params, x, t))
    return lambda: jax.block_until_ready(step(params, x, t)), (params, x, t)


def compare(size: Size, checkpoint: str) -> None:
    step, given = made(size, checkpoint)
    params, x, t = jax.device_get(given)

    def plain(params):
        y = x
        for own in params:
            y = stage(own, y)
        return loss_fn(y, t)

    loss, grads = step()
    want, expected = jax.value_and_grad(plain)(params)
    peers.check(float(loss), squares(grads), (float(want), squares(expected)))


def squares(grads) -> float:
    return sum(float((a * a).sum()) for a in jax.tree.leaves(jax.device_get(grads)))


def main() -> None:
    options = json.loads(sys.argv[1])
    jax.config.update("jax_num_cpu_devices", STAGES)
    version = importlib.metadata.version("fpipe")
    for checkpoint in ("never", "always"):
        peers.answer(
            options,
            f"fpipe {version}, jax {jax.__version__}, {checkpoint}",
            __file__,
            lambda size, checkpoint=checkpoint: made(size, checkpoint)[0],
            lambda size, checkpoint=checkpoint: compare(size, checkpoint),
        )


if __name__ == "__main__":
    main()
