"""What fits, and how fast is it? Two tables from shapes alone: nothing runs.

1. The largest transformer that trains on so many devices of 16 GiB, with AdamW and
   bfloat16 arithmetic, as in Table 1 of GPipe (Huang et al., arXiv 1811.06965). Each
   row is one way to save memory. Two plans of small models say what each device holds
   with so many blocks, to the byte; with that the largest number is found by bisection.
2. The speed-up of U-Net and ResNet-101 with the settings of torchgpipe's benchmarks
   (Kim et al., arXiv 2004.09910): predicted from the FLOPs of the layers, beside what
   was measured there on Tesla P40 GPUs.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from train_resnet import FORMS, Conv, block, norm, relu
from train_unet import conv_block, down, up

import fpipe
from fpipe.schedules import Costs, early_recompute, gpipe, simulate

# --- the transformer ------------------------------------------------------------------


def embedding(words: int, width: int) -> fpipe.Layer:
    """Vectors of tokens."""

    def init(key, x):
        del x
        return jax.random.normal(key, (words, width)) * 0.02

    return fpipe.Layer(lambda table, x: table[x], init, name="embed")


def transformer_block(heads: int) -> fpipe.Layer:
    """Causal attention and a perceptron, each after a norm and beside a residual."""

    def init(key, x):
        width = x.shape[-1]
        shapes = {
            "in": (width, 3 * width),
            "out": (width, width),
            "up": (width, 4 * width),
            "down": (4 * width, width),
        }
        keys = jax.random.split(key, len(shapes))
        return {
            name: jax.random.normal(k, shape) * 0.02
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def apply(params, x):
        rows, length, width = x.shape
        joint = normed(x) @ params["in"]
        q, k, v = jnp.split(joint.reshape(rows, length, heads, -1), 3, -1)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (width // heads) ** 0.5
        mask = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e4), -1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = x + mixed @ params["out"]
        return x + jax.nn.gelu(normed(x) @ params["up"]) @ params["down"]

    return fpipe.Layer(apply, init, name="block")


def normed(x):
    """Layer norm without parameters."""
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def scores(words: int) -> fpipe.Layer:
    """A score for each token that may follow."""

    def init(key, x):
        return jax.random.normal(key, (x.shape[-1], words)) * 0.02

    return fpipe.Layer(lambda table, x: normed(x) @ table, init, name="head")


def next_token(y, tokens):
    """The mean loss of the tokens themselves: what counts is their shape."""
    logits = jax.nn.log_softmax(y.astype(jnp.float32))
    return -jnp.take_along_axis(logits, tokens[..., None], -1).mean()


class Transformer(NamedTuple):
    """The sizes of the model but its number of layers, and of a microbatch."""

    width: int = 2048
    heads: int = 16
    words: int = 32768
    length: int = 1024
    rows: int = 4


class Way(NamedTuple):
    """A way to save memory: options of `Pipe`, by the number of devices."""

    name: str
    options: Callable[[int], dict[str, Any]]
    per_device: int = 1


WAYS = (
    Way("nothing", lambda d: {"schedule": "1f1b", "checkpoint": "never"}),
    Way(
        "recomputation",
        lambda d: {
            "schedule": "1f1b",
            "checkpoint": "always",
            "recompute": "with_backward",
        },
    ),
    Way(
        "early recomputation",
        lambda d: {
            "schedule": "1f1b",
            "checkpoint": "always",
            "recompute": "early",
        },
    ),
    Way("V-Half", lambda d: {"schedule": "v_half", "checkpoint": "never"}, 2),
    Way("V-Min", lambda d: {"schedule": "v_min", "checkpoint": "never"}, 2),
    Way(
        "copies to the host",
        lambda d: {"schedule": "1f1b", "checkpoint": "never", "offload": 1},
    ),
)


class Found(NamedTuple):
    """The largest model that fits.

    Attributes:
        layers: the blocks of each stage.
        parameters: how many numbers the model has; 0: none fits.
        peak: bytes of the fullest device.
        bubble: the idle share of a step, of the smallest model of this kind.
    """

    layers: tuple[int, ...]
    parameters: int
    peak: int
    bubble: float


def plan_of(
    sizes: Transformer,
    way: Way,
    devices: int,
    blocks: Sequence[int],
    microbatches: int,
) -> fpipe.Prediction:
    """The plan of a training step.

    Arguments:
        blocks: of each stage.
    """
    rows = microbatches * sizes.rows
    tokens = jax.ShapeDtypeStruct((rows, sizes.length), jnp.int32)
    block = transformer_block(sizes.heads)
    balance = list(blocks)
    balance[0] += 1
    balance[-1] += 1
    pipe = fpipe.Pipe(
        [
            embedding(sizes.words, sizes.width),
            *[block] * sum(blocks),
            scores(sizes.words),
        ],
        balance,
        devices=jax.devices()[:devices],
        chunks=microbatches,
        compute_dtype="bfloat16",
        **way.options(devices),
    )
    return pipe.plan(None, tokens, tokens, loss_fn=next_token)


def largest(
    sizes: Transformer, way: Way, devices: int, microbatches: int, memory: float
) -> Found:
    """The most blocks with which a step fits into the memory of each device."""
    one, two = (
        plan_of(sizes, way, devices, [n] * stages, microbatches)
        for stages in [devices * way.per_device]
        for n in (1, 2)
    )
    # All blocks are equal: each adds the same to what its device holds.
    blocks: dict[int, int] = {}
    peak = 0
    for small, large in zip(one.devices, two.devices, strict=True):
        each = large.peak - small.peak

        def held(n: int, small=small, each=each) -> int:
            return small.peak + (n - 1) * each

        low, high = 0, 1
        while held(high) <= memory:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if held(middle) <= memory else (low, middle)
        blocks[small.device] = low
        peak = max(peak, held(low))
    layers = tuple(blocks[row.device] for row in one.stages)
    if min(layers) < 1:
        return Found(layers, 0, 0, one.bubble)
    each = sum(row.params for row in two.stages) - sum(row.params for row in one.stages)
    each //= len(layers)
    ends = sum(row.params for row in one.stages) - each * len(layers)
    return Found(layers, ends + each * sum(layers), peak, one.bubble)


def print_largest(
    sizes: Transformer, ways: Sequence[Way], counts: Sequence[int], memory: float
) -> None:
    """The first table."""
    print(
        f"Largest transformer of width {sizes.width} on devices of "
        f"{size(memory)}, {sizes.rows} x {sizes.length} tokens in a "
        "microbatch, 2 microbatches for each device"
    )
    is_large = memory >= 2**30
    head = [f"{d} device{'s' * (d > 1)}" for d in counts]
    print(f"{'':20s}" + "".join(f"{title:>20s}" for title in head))
    for way in ways:
        cells = []
        for d in counts:
            found = largest(sizes, way, d, 2 * d, memory)
            text = "-"
            if found.parameters:
                count = found.parameters
                text = f"{count / 1e9:.2f} B" if is_large else f"{count:,}"
                text = f"{sum(found.layers)} ({text})"
            cells.append(f"{text:>20s}")
        print(f"{way.name:20s}" + "".join(cells), flush=True)
    print("blocks, and parameters" + " in billions" * is_large)


def size(memory: float) -> str:
    """Bytes as a text."""
    return f"{memory / 2**30:g} GiB" if memory >= 2**30 else f"{memory / 2**10:g} KiB"


def check(sizes: Transformer, way: Way, devices: int, memory: float) -> None:
    """Plan the largest model, and one with a block more on its first device."""
    found = largest(sizes, way, devices, 2 * devices, memory)
    first, *others = found.layers
    for layers in (found.layers, (first + 1, *others)):
        plan = plan_of(sizes, way, devices, layers, 2 * devices)
        fits = "fits" if plan.peak <= memory else "does not fit"
        print(f"{list(layers)}: {fits}, peak {plan.peak} bytes; found {found.peak}")


# --- the benchmarks of torchgpipe -----------------------------------------------------


class Setting(NamedTuple):
    """A row of a benchmark.

    Attributes:
        batch, chunks, balance: its setting; balance in modules of torchgpipe's model.
        measured: the speed-up over one GPU without a pipeline, where one was measured.
    """

    batch: int
    chunks: int
    balance: tuple[int, ...]
    measured: float | None


# The settings stand in `benchmarks/unet-speed/main.py` and
# `benchmarks/resnet101-speed/main.py` of https://github.com/kakaobrain/torchgpipe, the
# speed-ups in its `docs/benchmarks.rst`, all at commit fe52c4d.
U_NET = (
    Setting(80, 2, (241,), 0.858),
    Setting(512, 32, (104, 137), 1.246),
    Setting(512, 16, (30, 66, 84, 61), 2.352),
    Setting(640, 40, (16, 27, 31, 44, 22, 57, 27, 17), 3.105),
)
RESNET = (
    Setting(220, 2, (370,), 0.853),
    Setting(25000, 1667, (135, 235), 1.414),
    Setting(5632, 256, (44, 92, 124, 110), 2.774),
    Setting(5400, 150, (26, 22, 33, 44, 44, 66, 66, 69), 4.294),
)


class Counted(NamedTuple):
    """A layer, and how many modules it is there."""

    layer: fpipe.Layer
    modules: int


def u_net(channels: int, blocks: int = 5, depth: int = 5) -> list[Counted]:
    """Torchgpipe's U-Net (5, 64): a convolution, dropout, norm and ReLU are one layer
    here.
    """
    spaces = [fpipe.Namespace() for _ in range(depth)]

    def convs(inside: int, last: int) -> list[Counted]:
        made = [conv_block(inside)] * (blocks - 1) + [conv_block(last)]
        return [Counted(layer, 4) for layer in made]

    layers: list[Counted] = []
    for d in range(depth):
        layers += convs(channels * 2**d, channels * 2**d)
        layers.append(Counted(down.isolate(spaces[d]), 2))
    layers += convs(channels * 2**depth, channels * 2 ** (depth - 1))
    for d in reversed(range(depth)):
        layers.append(Counted(up.isolate(spaces[d]), 2))
        layers += convs(channels * 2**d // 2, channels * 2**d // 2)
    return [*layers, Counted(Conv(1, 1).layer(), 1)]


def head(classes: int) -> fpipe.Layer:
    """The mean over all pixels, then a dense layer."""

    def init(key, x):
        return jax.random.normal(key, (x.shape[-1], classes)) * 0.01

    return fpipe.Layer(lambda w, x: x.mean((1, 2)) @ w, init, name="head")


@fpipe.fn
def pool(x):
    """Max pooling over 3x3 pixels, every second one."""
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME"
    )


def resnet(width: int, blocks: Sequence[int] = FORMS[101]) -> list[Counted]:
    """ResNet-101 for images of 224 pixels and 1000 classes."""
    layers = [Conv(width, 7, 2).layer(), norm, relu, pool]
    counted = [Counted(layer, 1) for layer in layers]
    for d, count in enumerate(blocks):
        for n in range(count):
            made = block(
                width * 2**d,
                4 * width * 2**d,
                stride=2 if d and not n else 1,
                project=not n,
            )
            # The sum and its ReLU are one layer here.
            counted += [Counted(layer, 1) for layer in made[:-1]]
            counted.append(Counted(made[-1], 2))
    return [*counted, Counted(head(1000), 3)]


def cut(counted: Sequence[Counted], balance: Sequence[int]) -> list[int]:
    """For each stage its last layer, plus one; a cut inside of a layer is moved to its
    end.
    """
    ends = list(itertools.accumulate(one.modules for one in counted))
    return [
        1 + next(n for n, end in enumerate(ends) if end >= wanted)
        for wanted in itertools.accumulate(balance)
    ]


def speed_up(costs: fpipe.LayerCosts, cuts: Sequence[int], microbatches: int) -> float:
    """Of GPipe with early recomputation, which the last microbatch has not, over one
    device that recomputes nothing.
    """
    spans = list(itertools.pairwise([0, *cuts]))
    forward = [sum(costs.forward[a:b]) for a, b in spans]
    backward = [sum(costs.backward[a:b]) for a, b in spans]
    schedule = gpipe(len(spans), microbatches)
    pairs = itertools.product(range(len(spans)), range(microbatches - 1))
    times = Costs(F=forward, B=backward)
    step = simulate(early_recompute(schedule, times, pairs=list(pairs)), times)
    return microbatches * (sum(forward) + sum(backward)) / step.makespan


def print_speed_ups(
    name: str,
    counted: Sequence[Counted],
    image: int,
    settings: Sequence[Setting],
) -> None:
    """The second table, for one model."""
    x = jax.ShapeDtypeStruct((1, image, image, 3), jnp.float32)
    costs = fpipe.layer_costs([one.layer for one in counted], x)
    print(f"\n{name}, speed-up over one device without a pipeline")
    print("devices  microbatches   predicted    measured   balanced by fpipe")
    for setting in settings:
        cuts = cut(counted, setting.balance)
        devices = len(cuts)
        predicted = speed_up(costs, cuts, setting.chunks)
        best = fpipe.balance(costs, stages=devices, chunks=setting.chunks)
        ours = speed_up(costs, list(itertools.accumulate(best)), setting.chunks)
        known = setting.measured is not None
        measured = f"{setting.measured:.3f}" if known else "-"
        print(
            f"{devices:7d}{setting.chunks:14d}{predicted:12.3f}"
            f"{measured:>12s}{ours:20.3f}",
            flush=True,
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description="What fits into memory, and how fast it is, from shapes alone."
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="toy sizes, in seconds (default: the sizes of the tables)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="plan the first model of the first table, and one with a block more on "
        "its first device (default: neither)",
    )
    arguments = parser.parse_args()
    small = arguments.small
    counts = (2,) if small else (1, 2, 4, 8)
    jax.config.update("jax_num_cpu_devices", max(counts))
    sizes = Transformer(16, 2, 32, 8, 4) if small else Transformer()
    memory = 2**18 if small else 2**34
    print_largest(sizes, WAYS[:1] if small else WAYS, counts, memory)
    if arguments.check:
        check(sizes, WAYS[0], counts[0], memory)
    channels, image = (4, 32) if small else (64, 192)
    model = u_net(channels, blocks=1, depth=1) if small else u_net(channels)
    settings = (Setting(8, 4, (6, 11), None),) if small else U_NET
    name = "A small U-Net" if small else "U-Net (5, 64)"
    print_speed_ups(name, model, image, settings)
    if not small:
        print_speed_ups("ResNet-101", resnet(64), 224, RESNET)


if __name__ == "__main__":
    main()
