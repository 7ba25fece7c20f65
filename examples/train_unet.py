"""Train a U-Net with long skips, cut over several devices, to remove noise from photographs.

The network is the one of torchgpipe's U-Net benchmark: at every level conv blocks (3x3 convolution
without bias, dropout 0.1, instance norm, leaky ReLU 0.01), a stashed skip, a pooling; then the way back up,
each level popping its skip. The widest skip is the outermost: it crosses the whole pipeline, and goes
straight from the device that stashes it to the one that pops it.

Run it with no argument. It uses the GPUs of this machine, or else simulated CPU devices.
"""

import argparse
import itertools
import pathlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import sklearn.datasets
import tqdm

import fpipe

# --- the model -------------------------------------------------------------------------------------


def conv_block(channels: int, rate: float = 0.1) -> fpipe.Layer:
    """A 3x3 convolution without bias, dropout, instance norm, leaky ReLU."""

    def init(key, x):
        scale = (2 / (9 * x.shape[-1])) ** 0.5
        return {
            "kernel": scale * jax.random.normal(key, (3, 3, x.shape[-1], channels)),
            "scale": jnp.ones(channels),
            "shift": jnp.zeros(channels),
        }

    def conv(params, x, *, key, train):
        x = convolve(x, params["kernel"])
        if train and key is not None:
            x = jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)
        mean = x.mean((1, 2), keepdims=True)
        variance = jnp.square(x - mean).mean((1, 2), keepdims=True)
        x = (x - mean) * jax.lax.rsqrt(variance + 1e-5) * params["scale"] + params["shift"]
        return jax.nn.leaky_relu(x, 0.01)

    return fpipe.Layer(conv, init)


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@fpipe.skippable(stash=["skip"])
def down(params, x, *, carry):
    """Stash the level's features, then halve the resolution by max pooling."""
    del params
    pooled = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return pooled, fpipe.stash(carry, "skip", x)


@fpipe.skippable(pop=["skip"])
def up(params, x, *, carry):
    """Double the resolution and put the level's features beside it."""
    del params
    skip, carry = fpipe.pop(carry, "skip")
    return jnp.concatenate([x.repeat(2, 1).repeat(2, 2), skip], -1), carry


def head(channels: int) -> fpipe.Layer:
    """A 1x1 convolution, zero at first: the network starts by predicting no noise."""

    def init(key, x):
        del key
        return jnp.zeros((1, 1, x.shape[-1], channels))

    return fpipe.Layer(lambda params, x: convolve(x, params), init, name="head")


def unet(depth: int, blocks: int, channels: int) -> list[fpipe.Layer]:
    """The layers, in order. Level `d` has `channels * 2**d` channels."""

    def without(layer):
        return fpipe.Layer(layer.apply, lambda key, x: (), layer.name, layer.stash, layer.pop)

    down_, up_ = without(down), without(up)
    spaces = [fpipe.Namespace() for _ in range(depth)]
    layers: list[fpipe.Layer] = []
    for d in range(depth):
        layers += [conv_block(channels * 2**d)] * blocks + [down_.isolate(spaces[d])]
    layers += [conv_block(channels * 2**depth)] * blocks
    for d in reversed(range(depth)):
        layers += [up_.isolate(spaces[d])] + [conv_block(channels * 2**d)] * blocks
    return [*layers, head(3)]


def balance_of(layers: list[fpipe.Layer], stages: int, channels: int) -> list[int]:
    """Cut where the work of the convolutions is about even: level `d` costs the same at each `d`, halved once going up."""
    size, cost = 1.0, []
    for layer in layers:
        size *= {"down": 0.5, "up": 2.0}.get(layer.name, 1.0)
        cost.append({"conv": 1.0, "up": 0.5, "down": 0.2, "head": 0.1}[layer.name] * (1 + 0.5 * (size == 1)))
    total, ends, run = sum(cost), [], 0.0
    for k, c in enumerate(cost):
        run += c
        if len(ends) < stages - 1 and run >= total * (len(ends) + 1) / stages:
            ends.append(k + 1)
    ends = [0, *ends, len(layers)]
    return [b - a for a, b in itertools.pairwise(ends)]


# --- the data --------------------------------------------------------------------------------------


def photographs() -> list[np.ndarray]:
    """The two photographs that ship with scikit-learn, 427x640, in [0, 1]."""
    return [np.asarray(p, np.float32) / 255 for p in sklearn.datasets.load_sample_images().images]


def batches(rng: np.random.Generator, batch: int, size: int, noise: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Noisy patches of the left three quarters of the photographs, flipped at random, and their noise."""
    images = [p[:, :480] for p in photographs()]
    while True:
        patches = np.stack([crop(rng, images[rng.integers(2)], size) for _ in range(batch)])
        grain = rng.normal(0, noise, patches.shape).astype(np.float32)
        yield patches + grain, grain


def crop(rng: np.random.Generator, image: np.ndarray, size: int) -> np.ndarray:
    y, x = rng.integers(image.shape[0] - size), rng.integers(image.shape[1] - size)
    return image[y : y + size, x : x + size][:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]


def held_out(size: int) -> np.ndarray:
    """Patches of the right quarter, which training never sees."""
    tiles = [
        p[y : y + size, x : x + size]
        for p in photographs()
        for y in range(0, 427 - size, size)
        for x in range(480, 640 - size + 1, size)
    ]
    return np.stack(tiles)


def psnr(image: np.ndarray, clean: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB."""
    return float(-10 * np.log10(np.mean((np.clip(image, 0, 1) - clean) ** 2)))


# --- the run ---------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(*names, **options):
        return parser.add_argument(*names, **options | {"help": options["help"] + " (default: %(default)s)"})

    add("--depth", type=int, default=5, help="levels of the U-Net, one long skip each")
    add("--blocks", type=int, default=1, help="conv blocks per level, B")
    add("--channels", type=int, default=8, help="channels of the outermost level, C")
    add(
        "--stages",
        type=int,
        default=4,
        help="stages that the model is cut into, one device each (repeated if there are fewer)",
    )
    add("--chunks", type=int, default=4, help="microbatches that a batch is cut into")
    add(
        "--schedule",
        default="eager_1f1b",
        choices=["gpipe", "1f1b", "eager_1f1b"],
        help="the pipeline schedule",
    )
    add(
        "--checkpoint",
        default="except_last",
        choices=["always", "except_last", "never"],
        help="which microbatches recompute in the backward",
    )
    add("--steps", type=int, default=200, help="training steps")
    add("--batch", type=int, default=16, help="patches per step")
    add("--size", type=int, default=64, help="side of a patch in pixels, a multiple of 2**depth")
    add("--noise", type=float, default=0.1, help="standard deviation of the noise, for colours in [0, 1]")
    add("--rate", type=float, default=4e-3, help="peak learning rate of Adam")
    add("--seed", type=int, default=0, help="seed of everything random")
    add("--out", type=pathlib.Path, default=pathlib.Path("unet.png"), help="where the picture goes")
    args = parser.parse_args()
    if args.size % 2**args.depth:
        parser.error(f"--size {args.size} is no multiple of 2**depth = {2**args.depth}")
    return args


def main() -> None:
    args = arguments()
    jax.config.update("jax_num_cpu_devices", args.stages)  # counts only where there is no GPU
    devices = [jax.devices()[s % len(jax.devices())] for s in range(args.stages)]
    layers = unet(args.depth, args.blocks, args.channels)
    pipe = fpipe.Pipe(
        layers,
        balance=balance_of(layers, args.stages, args.channels),
        devices=devices,
        chunks=args.chunks,
        checkpoint=args.checkpoint,
        schedule=args.schedule,
    )
    key = jax.random.key(args.seed)
    data = batches(np.random.default_rng(args.seed), args.batch, args.size, args.noise)
    params = pipe.init(key, next(data)[0])
    count = sum(p.size for p in jax.tree.leaves(params))
    print(
        f"U-Net of {len(layers)} layers, {count:,} parameters, {args.depth} long skips; layers per stage {list(pipe.balance)}"
    )
    print("devices:", ", ".join(map(str, pipe.devices)))

    # One optimizer per stage: each update is one program on the stage's own device.
    rate = optax.warmup_cosine_decay_schedule(0.0, args.rate, max(args.steps // 10, 1), max(args.steps, 2))
    adam = optax.adam(rate)
    ends = np.cumsum([0, *pipe.balance])
    spans = list(itertools.pairwise(ends))
    moments = [adam.init(params[a:b]) for a, b in spans]

    @jax.jit
    def update(grads, state, params):
        updates, state = adam.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = pipe.value_and_grad(lambda y, noise: jnp.mean((y - noise) ** 2))
    started = time.perf_counter()
    done = 0
    bar = tqdm.trange(args.steps, desc="training", unit="step", smoothing=0.1)
    try:
        for n in bar:
            noisy, grain = next(data)
            loss, grads = step(params, noisy, grain, key=jax.random.fold_in(key, n), train=True)
            new = [update(grads[a:b], m, params[a:b]) for (a, b), m in zip(spans, moments, strict=True)]
            params, moments = tuple(p for ps, _ in new for p in ps), [m for _, m in new]
            done = n + 1
            if n % 10 == 0 or done == args.steps:
                bar.set_postfix(
                    loss=f"{float(loss):.5f}",
                    patches_per_s=f"{done * args.batch / (time.perf_counter() - started):.0f}",
                )
    except KeyboardInterrupt:
        bar.close()
        print(f"stopped after {done} steps")
        if not done:
            return
    bar.close()
    report(pipe, params, args)


def report(pipe: fpipe.Pipe, params, args: argparse.Namespace) -> None:
    """Held-out quality, the picture, and the schedule."""
    clean = held_out(args.size)
    noisy = clean + np.random.default_rng(args.seed + 1).normal(0, args.noise, clean.shape).astype(np.float32)
    denoised = noisy - np.asarray(pipe(params, noisy))
    before, after = psnr(noisy, clean), psnr(denoised, clean)
    print(f"held-out patches: {before:.2f} dB noisy, {after:.2f} dB denoised: {after - before:+.2f} dB")
    chosen = np.linspace(0, len(clean) - 1, 4).astype(int)
    columns = [np.concatenate(list(images[chosen])) for images in (noisy, denoised, clean)]
    picture = np.clip(np.concatenate(columns, 1), 0, 1).repeat(3, 0).repeat(3, 1)
    matplotlib.image.imsave(args.out, picture)
    print(f"noisy | denoised | clean: {args.out}\n")
    microbatches = -(-args.batch // -(-args.batch // args.chunks))
    print(fpipe.schedules.draw(pipe.make_schedule(microbatches)))


if __name__ == "__main__":
    main()
