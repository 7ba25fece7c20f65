"""Train a ResNet with batch norm, cut over several devices, to read handwritten digits.

The network is made of bottleneck blocks: three convolutions, each with a batch norm,
and around them a residual. A block is ten layers, so that a stage may end inside it:
the first stashes the block's input, the last pops and adds it. Every residual is a skip
in its own namespace, 33 of them with `--layers 101`. Batch norms are deferred: their
running statistics, which the held-out digits are normalised with, are those of whole
batches, however these are cut.

Run it with no argument. It uses the GPUs of this machine, or else simulated CPU
devices.
"""

import argparse
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
import sklearn.model_selection
import tqdm

import fpipe
import fpipe.optim

# --- the model ------------------------------------------------------------------------

# The blocks of each level, by the number of layers with weights: three in each block, a
# convolution before the blocks and a dense layer after them.
FORMS = {
    8: (1, 1),
    14: (1, 1, 1, 1),
    20: (1, 2, 2, 1),
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
}


class Conv(NamedTuple):
    """A convolution without bias: the norm after it would take that away."""

    channels: int
    side: int
    stride: int = 1

    def init(self, key, x):
        """A kernel of variance 2 / inputs."""
        shape = (self.side, self.side, x.shape[-1], self.channels)
        return jax.random.normal(key, shape) * (2 / np.prod(shape[:3])) ** 0.5

    def apply(self, kernel, x):
        """Convolve."""
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (self.stride, self.stride), "SAME", dimension_numbers=numbers
        )

    def layer(self) -> fpipe.Layer:
        """A layer that does this and no more."""
        return fpipe.Layer(
            self.apply, self.init, name="halve" if self.stride == 2 else "conv"
        )


norm = fpipe.DeferredBatchNorm(momentum=0.9)
relu = fpipe.fn(jax.nn.relu)


@fpipe.skippable(stash=["input"])
@fpipe.fn
def enter(x, *, carry):
    """Stash the block's input."""
    return x, fpipe.stash(carry, "input", x)


@fpipe.skippable(pop=["input"])
@fpipe.fn
def leave(x, *, carry):
    """Add the block's input."""
    shortcut, carry = fpipe.pop(carry, "input")
    return jax.nn.relu(x + shortcut), carry


def project_and_leave(channels: int, stride: int) -> fpipe.Layer:
    """Add the block's input after a 1x1 convolution and a norm, where a block changes
    the shape.

    The norm is a layer within this layer: its state and what finishes it are this
    layer's.
    """
    conv, init_norm = Conv(channels, 1, stride), norm.init
    assert init_norm is not None

    def init(key, x, *, carry):
        return {"conv": conv.init(key, carry["input"]), "norm": init_norm(key, x)}

    def project(params, x, *, carry, state, train):
        shortcut, carry = fpipe.pop(carry, "input")
        shortcut, state = norm(
            params["norm"],
            conv.apply(params["conv"], shortcut),
            state=state,
            train=train,
        )
        return jax.nn.relu(x + shortcut), carry, state

    return fpipe.Layer(
        project, init, pop=["input"], init_state=norm.init_state, finish=norm.finish
    )


def block(inside: int, channels: int, stride: int, project: bool) -> list[fpipe.Layer]:
    """A bottleneck block: 1x1, 3x3 and 1x1 convolutions. The last one's ReLU comes
    after the addition.
    """
    space = fpipe.Namespace()
    last = project_and_leave(channels, stride) if project else leave
    return [
        enter.isolate(space),
        *[Conv(inside, 1).layer(), norm, relu],
        *[Conv(inside, 3, stride).layer(), norm, relu],
        *[Conv(channels, 1).layer(), norm],
        last.isolate(space),
    ]


def head(classes: int) -> fpipe.Layer:
    """The mean over all pixels, then a dense layer."""

    def init(key, x):
        return {
            "kernel": jax.random.normal(key, (x.shape[-1], classes)) * 0.01,
            "bias": jnp.zeros(classes),
        }

    return fpipe.Layer(
        lambda params, x: x.mean((1, 2)) @ params["kernel"] + params["bias"],
        init,
        name="head",
    )


def resnet(blocks: tuple[int, ...], width: int) -> list[fpipe.Layer]:
    """The layers, in order. Level `d` has `width * 2**d` channels inside its blocks,
    four times as many between them.
    """
    layers = [Conv(width, 3).layer(), norm, relu]
    for d, count in enumerate(blocks):
        for n in range(count):
            layers += block(
                width * 2**d,
                4 * width * 2**d,
                stride=2 if d and not n else 1,
                project=not n,
            )
    return [*layers, head(10)]


# --- the data -------------------------------------------------------------------------

SIZE = 8


def digits() -> list[np.ndarray]:
    """Images to train on, held-out ones, and the labels of both. A fifth of each digit
    is held out, always the same.
    """
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = images.reshape(-1, SIZE, SIZE, 1).astype(np.float32) / 16
    parts = sklearn.model_selection.train_test_split(
        images, labels.astype(np.int32), test_size=0.2, stratify=labels, random_state=0
    )
    return [np.asarray(part) for part in parts]


def batches(
    rng: np.random.Generator, images: np.ndarray, labels: np.ndarray, batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and labels in a new order each time round, each image moved by up to a
    pixel.
    """
    wide = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)])
    while True:
        order = rng.permutation(len(images))
        for first in range(0, len(order) - batch + 1, batch):
            chosen = order[first : first + batch]
            corners = rng.integers(3, size=(batch, 2))
            moved = [
                wide[n, y : y + SIZE, x : x + SIZE]
                for n, (y, x) in zip(chosen, corners, strict=True)
            ]
            yield np.stack(moved), labels[chosen]


def shape_of_images(count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, SIZE, SIZE, 1), jnp.float32)


# --- the run --------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(*names, **options):
        return parser.add_argument(
            *names, **options | {"help": options["help"] + " (default: %(default)s)"}
        )

    add(
        "--layers",
        type=int,
        default=14,
        choices=list(FORMS),
        help="which ResNet, by its layers with weights",
    )
    add(
        "--width",
        type=int,
        default=16,
        help="channels inside the blocks of the first level",
    )
    add(
        "--stages",
        type=int,
        default=4,
        help="stages that the model is cut into, one device each (repeated if there "
        "are fewer)",
    )
    add("--chunks", type=int, default=4, help="microbatches that a batch is cut into")
    add(
        "--executor",
        default="placed",
        choices=["placed", "scan"],
        help="a program for each stage and action, or one for all (then XLA is slow at "
        "convolutions on CPUs)",
    )
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
    add(
        "--steps",
        type=int,
        default=200,
        help="training steps; 0 describes the model and ends",
    )
    add("--batch", type=int, default=128, help="images per step")
    add(
        "--rate",
        type=float,
        default=0.1,
        help="peak learning rate of SGD with momentum 0.9",
    )
    add("--decay", type=float, default=5e-4, help="weight decay of the kernels")
    add(
        "--seed",
        type=int,
        default=0,
        help="seed of everything random but the held-out split",
    )
    args = parser.parse_args()
    for name, least in {
        "width": 1,
        "stages": 1,
        "chunks": 1,
        "batch": 1,
        "steps": 0,
    }.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: at least {least}")
    layers = len(resnet(FORMS[args.layers], args.width))
    if args.stages > layers:
        parser.error(f"--stages {args.stages}: the model has only {layers} layers")
    images = len(digits()[0])
    if args.batch > images:
        parser.error(
            f"--batch {args.batch}: there are only {images} images to train on"
        )
    jax.config.update("jax_num_cpu_devices", args.stages)
    if args.executor == "scan" and args.stages > len(jax.devices()):
        parser.error(
            f"--stages {args.stages}: --executor scan needs a device for each, "
            f"here are {len(jax.devices())}"
        )
    return args


def build(args: argparse.Namespace) -> fpipe.Pipe:
    """The ResNet, cut over GPUs if there are some, else over simulated CPU devices."""
    layers = resnet(FORMS[args.layers], args.width)
    return fpipe.Pipe(
        layers,
        balance=fpipe.balance(
            layers,
            shape_of_images(args.batch),
            stages=args.stages,
            chunks=args.chunks,
            checkpoint=args.checkpoint,
            schedule=args.schedule,
        ),
        devices=[jax.devices()[s % len(jax.devices())] for s in range(args.stages)],
        chunks=args.chunks,
        checkpoint=args.checkpoint,
        schedule=args.schedule,
        executor=args.executor,
    )


def describe(pipe: fpipe.Pipe, args: argparse.Namespace) -> None:
    """What is trained, and where it is cut."""
    shapes = jax.eval_shape(
        fpipe.sequential(pipe.layers).init, jax.random.key(0), shape_of_images(1)
    )
    count = sum(p.size for p in jax.tree.leaves(shapes))
    stage = np.repeat(range(len(pipe.balance)), pipe.balance)
    ways = [
        [s for s, layer in zip(stage, pipe.layers, strict=True) if getattr(layer, end)]
        for end in ("stash", "pop")
    ]
    across = sum(
        a != b for a, b in zip(*ways, strict=True)
    )  # blocks do not overlap, so the orders agree
    print(
        f"ResNet-{args.layers}: {len(pipe.layers)} layers in {len(pipe.balance)} "
        f"stages, {count:,} parameters"
    )
    print(f"{len(ways[0])} skips, {across} of them from one stage to another")
    print(
        f"layers per stage {list(pipe.balance)} on {', '.join(map(str, pipe.devices))}"
    )


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def optimizer(args: argparse.Namespace) -> fpipe.optim.PerStage:
    """SGD with momentum, each stage's update on its own device; the decay is for what
    has more than one axis.
    """
    rate = optax.warmup_cosine_decay_schedule(
        0.0, args.rate, max(args.steps // 10, 1), max(args.steps, 2)
    )
    decay = optax.add_decayed_weights(
        args.decay, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    )
    return fpipe.optim.per_stage(
        optax.chain(decay, optax.sgd(rate, momentum=0.9, nesterov=True))
    )


def train(
    pipe: fpipe.Pipe, images: np.ndarray, labels: np.ndarray, args: argparse.Namespace
):
    """The trained parameters and the state of the norms; what there is of them after
    Ctrl-C.
    """
    data = batches(np.random.default_rng(args.seed), images, labels, args.batch)
    params = pipe.init(jax.random.key(args.seed), shape_of_images(args.batch))
    state = pipe.init_state(shape_of_images(args.batch))
    tx = optimizer(args)
    moments = tx.init(params)
    pipe.compile(params, *next(data), loss_fn=cross_entropy, state=state, train=True)

    step = pipe.value_and_grad(cross_entropy)
    bar = tqdm.tqdm(total=args.steps, desc="training", unit="step")
    started = time.perf_counter()
    try:
        for n in range(args.steps):
            (loss, new), grads = step(params, *next(data), state=state, train=True)
            updates, moments = tx.update(grads, moments, params)
            # Nothing is donated, so that Ctrl-C finds parameters at any time.
            params, state = fpipe.optim.apply_updates(params, updates), new
            if n == 0:
                jax.block_until_ready(params)
                started = (
                    time.perf_counter()
                )  # what was compiled is no part of the rate
            elif n % 10 == 0 or n == args.steps - 1:
                value = float(loss)  # waits, so that the clock counts finished steps
                rate = n * args.batch / (time.perf_counter() - started)
                bar.set_postfix(
                    loss=f"{value:.4f}", images_per_s=f"{rate:.0f}", refresh=False
                )
            bar.update()
    except KeyboardInterrupt:
        if not bar.n:
            raise
        bar.write(f"stopped after {bar.n} steps")
    bar.close()
    return params, state


def read_digits(pipe: fpipe.Pipe, params, state, images: np.ndarray) -> np.ndarray:
    """What is read in the images, with the norms' running statistics."""
    more = (
        -len(images) % pipe.chunks
    )  # blank images: the scan executor's microbatches have equal size
    logits, _ = pipe(
        params,
        np.pad(images, [(0, more), (0, 0), (0, 0), (0, 0)]),
        state=state,
        train=False,
    )
    return np.asarray(logits)[: len(images)].argmax(-1)


def main() -> None:
    args = arguments()
    try:
        pipe = build(args)
        describe(pipe, args)
        if args.steps:
            images, held_out, labels, held_out_labels = digits()
            params, state = train(pipe, images, labels, args)
            read = read_digits(pipe, params, state, held_out)
            right = np.mean(read == held_out_labels)
            print(f"held-out digits: {right:.2%} of {len(held_out)} are read right")
            print("the first of them", *held_out_labels[:20])
            print("are read as      ", *read[:20])
        microbatches = -(-args.batch // -(-args.batch // args.chunks))
        print(f"\n{fpipe.schedules.draw(pipe.make_schedule(microbatches))}")
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None


if __name__ == "__main__":
    main()
