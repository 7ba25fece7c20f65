"""Train a small GPT on English text, byte by byte, cut over several devices.

The model is made of Flax modules: an embedding, blocks of causal attention, and a head
that uses the embedding's table again, from another device. The text is the language
reference of Python, which every Python brings along (`pydoc_data.topics`). With
`--executor scan` (default) the whole training step, optimizer included, is one jitted
program; with `--executor placed` each stage has programs of its own. Both print the
same losses.

Run it with no argument. It uses the GPUs of this machine, or else simulated CPU
devices. With `--checkpoints FOLDER` it saves as it goes and goes on from what it finds
there, whatever executor and number of stages made it.
"""

import argparse
import pathlib
import pydoc_data.topics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tqdm
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

import fpipe
import fpipe.flax
import fpipe.optim

# --- the model ------------------------------------------------------------------------

BYTES = 256


class Embed(nn.Module):
    """Bytes and their places as vectors."""

    width: int
    context: int
    rate: float

    @nn.compact
    def __call__(self, tokens, train):
        places = self.param(
            "places", nn.initializers.normal(0.02), (self.context, self.width)
        )
        x = (
            nn.Embed(BYTES, self.width, name="table")(tokens)
            + places[: tokens.shape[1]]
        )
        return nn.Dropout(self.rate)(x, deterministic=not train)


class Block(nn.Module):
    """Causal attention and a perceptron, each beside a residual."""

    heads: int
    rate: float

    @nn.compact
    def __call__(self, x, train):
        drop = nn.Dropout(self.rate, deterministic=not train)
        mask = nn.make_causal_mask(x[:, :, 0])
        y = nn.LayerNorm()(x)
        x = x + drop(nn.MultiHeadDotProductAttention(self.heads)(y, y, mask=mask))
        y = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + drop(nn.Dense(x.shape[-1])(y))


class Head(nn.Module):
    """A score for each byte, by the embedding's table."""

    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Embed(BYTES, self.width, name="table").attend(nn.LayerNorm()(x))


def gpt(args: argparse.Namespace) -> list[fpipe.Layer]:
    """The layers, in order. The head owns its norm and borrows the table."""
    tokens = jax.ShapeDtypeStruct((1, args.context), jnp.int32)
    hidden = jax.ShapeDtypeStruct((1, args.context, args.width), jnp.float32)
    block = fpipe.flax.layer(Block(args.heads, args.dropout), hidden)
    return [
        fpipe.flax.layer(
            Embed(args.width, args.context, args.dropout), tokens, name="embed"
        ),
        *[block] * args.blocks,
        fpipe.flax.layer(
            Head(args.width), name="head", rngs=(), borrow={"table": "embed/table"}
        ),
    ]


def cross_entropy(scores, targets):
    return optax.softmax_cross_entropy_with_integer_labels(scores, targets).mean()


# --- the data -------------------------------------------------------------------------


def text() -> tuple[np.ndarray, np.ndarray]:
    """The language reference as bytes: nine tenths to train on, and the rest."""
    topics = pydoc_data.topics.topics
    whole = np.frombuffer(
        "\n\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8
    ).astype(np.int32)
    cut = len(whole) * 9 // 10
    return whole[:cut], whole[cut:]


def batch_of(
    data: np.ndarray, step: int, args: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray]:
    """Random windows and what follows each byte. A step's batch depends on its number
    alone, so that training can go on.
    """
    rng = np.random.default_rng((args.seed, step))
    starts = rng.integers(len(data) - args.context - 1, size=args.batch)
    windows = np.stack([data[n : n + args.context + 1] for n in starts])
    return windows[:, :-1], windows[:, 1:]


# --- training -------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(*names, **options):
        return parser.add_argument(
            *names, **options | {"help": options["help"] + " (default: %(default)s)"}
        )

    add(
        "--executor",
        default="scan",
        choices=["scan", "placed"],
        help="one program, or programs for each stage",
    )
    add("--blocks", type=int, default=4, help="transformer blocks")
    add("--width", type=int, default=96, help="width of the model")
    add("--heads", type=int, default=4, help="attention heads, a divisor of the width")
    add("--context", type=int, default=64, help="bytes that the model sees")
    add("--dropout", type=float, default=0.05, help="dropout rate")
    add(
        "--stages",
        type=int,
        default=2,
        help="stages that the model is cut into, one device each if there are so many",
    )
    add(
        "--chunks",
        type=int,
        default=4,
        help="microbatches that a batch is cut into, a divisor of it",
    )
    add("--steps", type=int, default=400, help="training steps in all")
    add("--batch", type=int, default=32, help="windows per step")
    add("--rate", type=float, default=3e-3, help="peak learning rate of AdamW")
    add("--seed", type=int, default=0, help="seed of everything random")
    add(
        "--checkpoints",
        type=pathlib.Path,
        default=None,
        help="folder to save in and to go on from",
    )
    add(
        "--every",
        type=int,
        default=100,
        help="steps from one held-out loss and checkpoint to the next",
    )
    add("--sample", type=int, default=200, help="bytes to write at the end")
    args = parser.parse_args()
    for name in (
        "blocks",
        "width",
        "heads",
        "context",
        "stages",
        "chunks",
        "steps",
        "batch",
        "every",
    ):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: at least 1")
    if args.stages > args.blocks + 2:
        parser.error(
            f"--stages {args.stages}: the model has only {args.blocks + 2} layers"
        )
    if args.width % args.heads:
        parser.error(f"--heads {args.heads}: a divisor of the width {args.width}")
    if args.batch % args.chunks:
        parser.error(f"--chunks {args.chunks}: a divisor of the batch {args.batch}")
    return args


def build(args: argparse.Namespace) -> fpipe.Pipe:
    """The model over GPUs if there are some, else over simulated CPU devices; blocks as
    even as can be.
    """
    jax.config.update("jax_num_cpu_devices", args.stages)
    layers, devices = gpt(args), jax.devices()[: args.stages]
    rest = len(layers) % args.stages
    balance = [len(layers) // args.stages + (s < rest) for s in range(args.stages)]
    if args.stages % len(devices):
        raise SystemExit(
            f"--stages {args.stages}: a multiple of the {len(devices)} devices is "
            "needed"
        )
    # On fewer devices than stages each has several of them.
    schedule = "eager_1f1b" if args.stages == len(devices) else "interleaved_1f1b"
    return fpipe.Pipe(
        layers, balance, devices, args.chunks, schedule=schedule, executor=args.executor
    )


def start(pipe: fpipe.Pipe, args: argparse.Namespace) -> TrainState:
    """Parameters and optimizer; weights of more than one axis decay."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, args.rate, max(args.steps // 10, 1), max(args.steps, 2)
    )
    adamw = optax.adamw(
        rate, weight_decay=0.01, mask=lambda p: jax.tree.map(lambda a: a.ndim > 1, p)
    )
    tx = fpipe.optim.per_stage(optax.chain(optax.clip_by_global_norm(1.0), adamw))
    params = pipe.init(
        jax.random.key(args.seed),
        jax.ShapeDtypeStruct((args.batch, args.context), jnp.int32),
    )
    state = TrainState.create(apply_fn=pipe, params=params, tx=tx)
    if pipe.mesh is not None:
        # It comes out of the first step on the mesh: going in elsewhere the step would
        # be compiled twice.
        state = state.replace(
            step=jax.device_put(jnp.int32(0), NamedSharding(pipe.mesh, PartitionSpec()))
        )
    return state


def stepper(pipe: fpipe.Pipe):
    """`step(state, x, target, key) -> (state, loss)`: one program, or the stages'
    programs.
    """
    value_and_grad = pipe.value_and_grad(cross_entropy)

    def step(
        state: TrainState, x: Any, target: Any, key: Any
    ) -> tuple[TrainState, Any]:
        loss, grads = value_and_grad(state.params, x, target, key=key, train=True)
        return state.apply_gradients(grads=grads), loss

    return jax.jit(step, donate_argnums=0) if pipe.executor == "scan" else step


def train(pipe: fpipe.Pipe, args: argparse.Namespace) -> TrainState:
    """The trained state; what there is of it after Ctrl-C."""
    state, key = start(pipe, args), jax.random.key(args.seed)
    data, held_out = text()
    saved = (
        None
        if args.checkpoints is None
        else ocp.CheckpointManager(args.checkpoints.resolve())
    )
    if saved is not None and saved.latest_step() is not None:
        state = load(saved, pipe, state)
        print(f"going on from step {int(state.step)} of {args.checkpoints}")
    count = sum(
        a.size for layer in pipe.gather(state.params) for a in jax.tree.leaves(layer)
    )
    print(
        f"GPT of {args.blocks} blocks, {count:,} parameters; layers per stage "
        f"{list(pipe.balance)}, {args.executor}"
    )

    step, evaluate = stepper(pipe), pipe.evaluate(cross_entropy)
    evaluate = jax.jit(evaluate) if pipe.executor == "scan" else evaluate
    others = [batch_of(held_out, n, args) for n in range(4)]
    first = int(state.step)
    bar = tqdm.tqdm(total=args.steps, initial=first, desc="training", unit="step")
    started = time.perf_counter()
    try:
        for n in range(first, args.steps):
            state, loss = step(
                state, *batch_of(data, n, args), jax.random.fold_in(key, n)
            )
            if n == first:
                jax.block_until_ready(loss)
                started = (
                    time.perf_counter()
                )  # what was compiled is no part of the rate
            bar.update()
            if (n + 1) % args.every == 0 or n + 1 == args.steps:
                other = np.mean([float(evaluate(state.params, *own)) for own in others])
                bar.write(
                    f"step {n + 1}: loss {float(loss):.4f}, held-out loss {other:.4f}"
                )
                bar.set_postfix(
                    steps_per_s=f"{(n - first) / (time.perf_counter() - started):.1f}"
                )
                if saved is not None:
                    save(saved, pipe, state)
    except KeyboardInterrupt:
        bar.write(f"stopped after {int(state.step)} steps")
    bar.close()
    if saved is not None:
        saved.close()
    return state


# --- checkpoints, as for the plain composition: one entry per layer -------------------


def save(saved: ocp.CheckpointManager, pipe: fpipe.Pipe, state: TrainState) -> None:
    saved.save(int(state.step), args=ocp.args.StandardSave(plain(pipe, state)))


def plain(pipe: fpipe.Pipe, state: TrainState) -> dict[str, Any]:
    """What goes on disk."""
    moments = fpipe.optim.gather(state.opt_state)
    return {
        "params": pipe.gather(state.params),
        "optimizer": moments,
        "step": jnp.asarray(state.step),
    }


def load(
    saved: ocp.CheckpointManager, pipe: fpipe.Pipe, state: TrainState
) -> TrainState:
    """The last checkpoint, in the place of a state that has just been made."""
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, plain(pipe, state))
    found: Any = saved.restore(
        saved.latest_step(), args=ocp.args.StandardRestore(shapes)
    )
    params = pipe.place(found["params"])
    moments = fpipe.optim.place(found["optimizer"], params)
    return state.replace(params=params, opt_state=moments, step=int(found["step"]))


# --- the end --------------------------------------------------------------------------


def written(pipe: fpipe.Pipe, state: TrainState, args: argparse.Namespace) -> str:
    """What the model writes, byte by byte, by the plain composition of its layers."""
    model, params = fpipe.sequential(pipe.layers), pipe.gather(state.params)

    @jax.jit
    def following(window, length, key):
        scores = model(params, window[None])[0, length - 1]
        return jax.random.categorical(key, scores / 0.8)

    out = list(b"The ")
    for n in range(args.sample):
        window = np.zeros(args.context, np.int32)
        seen = out[-args.context :]
        window[: len(seen)] = seen
        key = jax.random.fold_in(jax.random.key(args.seed + 1), n)
        out.append(int(following(window, min(len(out), args.context), key)))
    return bytes(out).decode(errors="replace")


def main() -> None:
    args = arguments()
    try:
        pipe = build(args)
        state = train(pipe, args)
        print(f"\n{written(pipe, state, args)}")
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None


if __name__ == "__main__":
    main()
