"""Records the run that recorded.svg shows: `python docs/pictures/record.py`.

Two stages of a small transformer train on two simulated devices, a core for each. The
last step goes to recorded.csv, with the plan's prediction, which knows measured times
of layers. `make.py` draws both from there.
"""

import csv
import os
import pathlib

import jax
import jax.numpy as jnp

import fpipe
from fpipe.schedules import Timeline

DEVICES, MICROBATCHES, STEPS = 2, 8, 5
WIDTH, TOKENS, ROWS, BLOCKS = 384, 128, 32, 4
COLUMNS = ("timeline", "device", "kind", "stage", "microbatch", "start", "end")
# One thread for each device, so that two devices have a core each.
FLAGS = (
    f"--xla_force_host_platform_device_count={DEVICES} "
    "--xla_cpu_multi_thread_eigen=false"
)


def block(params, x):
    """One transformer block with a single head."""
    query, key, value = jnp.split(normal(x) @ params["qkv"], 3, axis=-1)
    scores = jax.nn.softmax(query @ key.swapaxes(-1, -2) / WIDTH**0.5)
    x = x + scores @ value
    return x + jax.nn.gelu(normal(x) @ params["up"]) @ params["down"]


def normal(x):
    """Layer norm without parameters."""
    return (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-5)


def init(key, x):
    """The weights of a block."""
    width = x.shape[-1]
    shapes = {"qkv": (width, 3 * width), "up": (width, 4 * width)}
    shapes["down"] = (4 * width, width)
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(k, shape) / shape[0] ** 0.5
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def mse(y, target):
    """The loss."""
    return jnp.mean((y - target) ** 2)


def recorded() -> dict[str, Timeline]:
    """The last of some steps, and what the plan predicts of it."""
    pipe = fpipe.Pipe(
        [fpipe.Layer(block, init, name="block")] * BLOCKS,
        devices=jax.devices(),
        balance=[BLOCKS // DEVICES] * DEVICES,
        chunks=MICROBATCHES,
        schedule="1f1b",
        dispatch="thread_per_device",
    )
    x = jax.random.normal(jax.random.key(0), (ROWS, TOKENS, WIDTH))
    params = pipe.init(jax.random.key(1), x)
    step = pipe.value_and_grad(mse)
    plan = pipe.plan(params, x, x, loss_fn=mse, by="time")
    for _ in range(STEPS - 1):
        step(params, x, x)
    _, timeline = pipe.record(step, params, x, x)
    return {"recorded": timeline, "predicted": plan.timeline}


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = FLAGS  # read when JAX makes its devices
    path = pathlib.Path(__file__).with_name("recorded.csv")
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        for name, timeline in recorded().items():
            for device, action, start, end in timeline.events:
                times = (f"{time:.6f}" for time in (start, end))
                rows.writerow([name, device, *action, *times])
