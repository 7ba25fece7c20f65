"""Train a U-Net with long skips, cut over several devices, to remove noise from
photographs.

The network is the one of torchgpipe's U-Net benchmark. On the way down each level has
conv blocks (3x3 convolution without bias, dropout 0.1, instance norm, leaky ReLU 0.01),
stashes a skip, and pools. On the way up each level pops its skip. The outermost skip is
the widest. It goes straight from the device that stashes it to the one that pops it,
past the whole pipeline.

Run it with no argument. It uses the GPUs of this machine, or else simulated CPU
devices. It ends with two pictures: patches before and after, and the recorded timeline
of the last step over its simulation at the same speed.
"""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import sklearn.datasets
import tqdm

import fpipe
import fpipe.optim
import fpipe.plot

# --- the model ------------------------------------------------------------------------


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
            x = jnp.where(
                jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0
            )
        mean = x.mean((1, 2), keepdims=True)
        variance = jnp.square(x - mean).mean((1, 2), keepdims=True)
        x = (x - mean) * jax.lax.rsqrt(variance + 1e-5) * params["scale"] + params[
            "shift"
        ]
        return jax.nn.leaky_relu(x, 0.01)

    return fpipe.Layer(conv, init)


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@fpipe.skippable(stash=["skip"])
@fpipe.fn
def down(x, *, carry):
    """Stash the level's features, then halve the resolution by max pooling."""
    pooled = jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    )
    return pooled, fpipe.stash(carry, "skip", x)


@fpipe.skippable(pop=["skip"])
@fpipe.fn
def up(x, *, carry):
    """Double the resolution and put the level's features beside it."""
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
    spaces = [fpipe.Namespace() for _ in range(depth)]
    layers: list[fpipe.Layer] = []
    for d in range(depth):
        layers += [conv_block(channels * 2**d)] * blocks + [down.isolate(spaces[d])]
    layers += [conv_block(channels * 2**depth)] * blocks
    for d in reversed(range(depth)):
        layers += [up.isolate(spaces[d])] + [conv_block(channels * 2**d)] * blocks
    return [*layers, head(3)]


# --- the data -------------------------------------------------------------------------


def photographs() -> list[np.ndarray]:
    """The two photographs that ship with scikit-learn, 427x640, in [0, 1]."""
    return [
        np.asarray(p, np.float32) / 255
        for p in sklearn.datasets.load_sample_images().images
    ]


def batches(
    rng: np.random.Generator, batch: int, size: int, noise: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Noisy patches of the left three quarters of the photographs, flipped at random,
    and their noise.
    """
    images = [p[:, :480] for p in photographs()]
    while True:
        patches = np.stack(
            [crop(rng, images[rng.integers(2)], size) for _ in range(batch)]
        )
        grain = rng.normal(0, noise, patches.shape).astype(np.float32)
        yield patches + grain, grain


def crop(rng: np.random.Generator, image: np.ndarray, size: int) -> np.ndarray:
    y, x = rng.integers(image.shape[0] - size), rng.integers(image.shape[1] - size)
    return image[y : y + size, x : x + size][
        :: rng.choice([-1, 1]), :: rng.choice([-1, 1])
    ]


def held_out(size: int) -> np.ndarray:
    """Patches of the right quarter, which training never sees."""
    tiles = [
        p[y : y + size, x : x + size]
        for p in photographs()
        for y in range(0, 427 - size, size)
        for x in range(480, 640 - size + 1, size)
    ]
    return np.stack(tiles)


def detail(patches: np.ndarray) -> np.ndarray:
    """How much of a patch is edges and texture: its mean absolute gradient."""
    down, right = np.diff(patches, axis=1), np.diff(patches, axis=2)
    return np.abs(down).mean((1, 2, 3)) + np.abs(right).mean((1, 2, 3))


def psnr(image: np.ndarray, clean: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB."""
    return float(-10 * np.log10(np.mean((np.clip(image, 0, 1) - clean) ** 2)))


# --- the run --------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(*names, **options):
        return parser.add_argument(
            *names, **options | {"help": options["help"] + " (default: %(default)s)"}
        )

    add("--depth", type=int, default=5, help="levels of the U-Net, one long skip each")
    add("--blocks", type=int, default=1, help="conv blocks per level, B")
    add("--channels", type=int, default=8, help="channels of the outermost level, C")
    add(
        "--stages",
        type=int,
        default=4,
        help="stages that the model is cut into, one device each (repeated if there "
        "are fewer)",
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
    add("--steps", type=int, default=150, help="training steps")
    add("--batch", type=int, default=16, help="patches per step")
    add(
        "--size",
        type=int,
        default=64,
        help="side of a patch in pixels, a multiple of 2**depth",
    )
    add(
        "--noise",
        type=float,
        default=0.1,
        help="standard deviation of the noise, for colours in [0, 1]",
    )
    add("--rate", type=float, default=4e-3, help="peak learning rate of Adam")
    add("--seed", type=int, default=0, help="seed of everything random")
    add(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("unet.png"),
        help="where the picture goes",
    )
    args = parser.parse_args()
    for name in ("depth", "blocks", "channels", "stages", "chunks", "batch", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: at least 1")
    layers = len(unet(args.depth, args.blocks, args.channels))
    if args.stages > layers:
        parser.error(f"--stages {args.stages}: the model has only {layers} layers")
    if args.size % 2**args.depth or not 0 < args.size <= 160:
        parser.error(
            f"--size {args.size}: a multiple of 2**depth = {2**args.depth}, up to the "
            "held-out strip's 160"
        )
    if not args.out.resolve().parent.is_dir():
        parser.error(
            f"--out {args.out}: there is no folder {args.out.resolve().parent}"
        )
    return args


def build(args: argparse.Namespace) -> fpipe.Pipe:
    """The U-Net, cut over GPUs if there are some, else over simulated CPU devices."""
    jax.config.update("jax_num_cpu_devices", args.stages)
    # Simulated devices share the cores of the machine. So a thread for each of them
    # runs its programs itself: then the recording sees each program end when it ends.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    simulated = jax.default_backend() == "cpu"
    layers = unet(args.depth, args.blocks, args.channels)
    return fpipe.Pipe(
        layers,
        balance=fpipe.balance(
            layers,
            jax.ShapeDtypeStruct((args.batch, args.size, args.size, 3), jnp.float32),
            stages=args.stages,
            chunks=args.chunks,
            checkpoint=args.checkpoint,
            schedule=args.schedule,
        ),
        devices=[jax.devices()[s % len(jax.devices())] for s in range(args.stages)],
        chunks=args.chunks,
        checkpoint=args.checkpoint,
        schedule=args.schedule,
        dispatch="thread_per_device" if simulated else "auto",
    )


def mse(y, noise):
    return jnp.mean((y - noise) ** 2)


def train(pipe: fpipe.Pipe, args: argparse.Namespace):
    """The trained parameters, and the timeline of the last step. Ctrl-C ends the
    training early, and leaves no timeline.
    """
    timeline = None
    key = jax.random.key(args.seed)
    data = batches(np.random.default_rng(args.seed), args.batch, args.size, args.noise)
    params = pipe.init(key, next(data)[0])
    count = sum(p.size for p in jax.tree.leaves(params))
    print(
        f"U-Net of {len(pipe.layers)} layers, {count:,} parameters, {args.depth} long "
        "skips"
    )
    print(
        f"layers per stage {list(pipe.balance)} on {', '.join(map(str, pipe.devices))}"
    )

    # Each stage's update is one program on the stage's own device.
    adam = optax.adam(
        optax.warmup_cosine_decay_schedule(
            0.0, args.rate, max(args.steps // 10, 1), max(args.steps, 2)
        )
    )
    tx = fpipe.optim.per_stage(adam, donate=["state", "grads"])
    moments = tx.init(params)
    step = pipe.value_and_grad(mse)
    bar = tqdm.tqdm(total=args.steps, desc="training", unit="step")
    started = time.perf_counter()
    try:
        for n in range(args.steps):
            noisy, noise = next(data)
            options = {"key": jax.random.fold_in(key, n), "train": True}
            if n < args.steps - 1:
                loss, grads = step(params, noisy, noise, **options)
            else:
                (loss, grads), timeline = pipe.record(
                    step, params, noisy, noise, **options
                )
            updates, moments = tx.update(grads, moments, params)
            params = fpipe.optim.apply_updates(params, updates, donate=["params"])
            if n == 0:
                jax.block_until_ready(params)
                started = (
                    time.perf_counter()
                )  # what was compiled is no part of the rate
            elif n % 10 == 0 or n == args.steps - 1:
                value = float(loss)  # waits, so that the clock counts finished steps
                rate = n * args.batch / (time.perf_counter() - started)
                bar.set_postfix(
                    loss=f"{value:.5f}", patches_per_s=f"{rate:.0f}", refresh=False
                )
            bar.update()
    except KeyboardInterrupt:
        if not bar.n:
            raise
        bar.write(f"stopped after {bar.n} steps")
    bar.close()
    return params, timeline


def draw_patches(images: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """A column for each kind of image, and a row for each of the four patches with the
    most detail.
    """
    clean = images["clean"]
    chosen = np.argsort(-detail(clean))[:4]
    figure = matplotlib.figure.Figure(
        figsize=(2 * len(images), 2.3 * len(chosen)), layout="constrained"
    )
    grid = figure.subplots(len(chosen), len(images), squeeze=False)
    for row, n in zip(grid, chosen, strict=True):
        for ax, (name, patches) in zip(row, images.items(), strict=True):
            ax.imshow(np.clip(patches[n], 0, 1))
            ax.set_xticks([])
            ax.set_yticks([])
            if name != "clean":
                ax.set_xlabel(f"PSNR {psnr(patches[n], clean[n]):.1f} dB")
    for ax, name in zip(grid[0], images, strict=True):
        ax.set_title(name)
    figure.savefig(path, dpi=150)


def predict(pipe: fpipe.Pipe, params, timeline, args: argparse.Namespace):
    """The simulated step. The speed of its devices is the mean of the recorded step, so
    that the two pictures differ only in when each action runs, and how long it takes
    beside the others.
    """
    batch = jax.ShapeDtypeStruct((args.batch, args.size, args.size, 3), jnp.float32)
    key = jax.random.key(args.seed)

    def simulated(speed):
        return pipe.plan(
            params, batch, batch, loss_fn=mse, key=key, train=True, speed=speed
        ).timeline

    def work(timeline):
        return sum(event.end - event.start for event in timeline.events)

    speed = work(simulated(1.0)) / work(timeline)
    name = f"{args.schedule}, predicted for {speed / 1e9:.3g} GFLOP/s a device"
    return dataclasses.replace(simulated(speed), name=name)


def report(pipe: fpipe.Pipe, params, timeline, args: argparse.Namespace) -> None:
    """Held-out quality, the pictures, and the schedule."""
    clean = held_out(args.size)
    noisy = clean + np.random.default_rng(args.seed + 1).normal(
        0, args.noise, clean.shape
    ).astype(np.float32)
    denoised = noisy - np.asarray(pipe(params, noisy))
    before, after = psnr(noisy, clean), psnr(denoised, clean)
    print(
        f"held-out patches: {before:.2f} dB noisy, {after:.2f} dB denoised: "
        f"{after - before:+.2f} dB"
    )
    draw_patches({"noisy": noisy, "denoised": denoised, "clean": clean}, args.out)
    print(f"noisy, denoised and clean patches: {args.out}")
    if timeline is not None:
        path = args.out.with_name(f"{args.out.stem}_timeline.png")
        # Without the rows of the host: a thread for each device, in place of one.
        shown = dataclasses.replace(timeline, launches=())
        fpipe.plot.save(shown, path, over=predict(pipe, params, timeline, args))
        print(f"the last step over its simulation: {path}\n")
    microbatches = -(-args.batch // -(-args.batch // args.chunks))
    print(fpipe.schedules.draw(pipe.make_schedule(microbatches)))


def main() -> None:
    args = arguments()
    try:
        pipe = build(args)
        params, timeline = train(pipe, args)
        report(pipe, params, timeline, args)
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None


if __name__ == "__main__":
    main()
