"""Train a small GPT on English text, byte by byte, cut over several devices.

The model is a Flax module: an embedding, blocks of causal attention, and a head that
uses the embedding's table again, from another device. `fpipe.value_and_grad` cuts its
loss function into stages. The text is the language reference of Python, which every
Python brings along (`pydoc_data.topics`). With `--executor scan` (default) the whole
training step, optimizer included, is one jitted program; with `--executor placed` each
stage has programs of its own. Both print the same losses.

Run it with no argument. It uses the GPUs of this machine, or else simulated CPU
devices. With `--mesh 2,2,2` each of two stages has four devices: two share the rows of
a microbatch, and two the heads and hidden units of each block. With
`--checkpoints FOLDER` it saves as it goes and goes on from what it finds there,
whatever executor, mesh and number of stages made it.
"""

import argparse
import math
import pathlib
import pydoc_data.topics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tqdm
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import fpipe
import fpipe.optim

# --- the model ------------------------------------------------------------------------

BYTES = 256


class Embed(nn.Module):
    """Bytes and their places as vectors, and the table's score for each byte."""

    width: int
    context: int
    rate: float

    def setup(self):
        self.table = nn.Embed(BYTES, self.width)
        self.places = self.param(
            "places", nn.initializers.normal(0.02), (self.context, self.width)
        )
        self.drop = nn.Dropout(self.rate)

    def __call__(self, tokens, train):
        x = self.table(tokens) + self.places[: tokens.shape[1]]
        return self.drop(x, deterministic=not train)

    def scores(self, x):
        return self.table.attend(x)


KERNEL, BIAS = nn.initializers.lecun_normal(), nn.initializers.zeros


class Block(nn.Module):
    """Causal attention and a perceptron, each beside a residual.

    The first matrix of a pair is cut by columns, the second one by rows (Shoeybi et
    al., arXiv 1909.08053). So devices share the heads of attention. A parameter whose
    initializer names no axis is whole on each device.
    """

    heads: int
    rate: float

    @nn.compact
    def __call__(self, x, train):
        drop = nn.Dropout(self.rate, deterministic=not train)
        mask = nn.make_causal_mask(x[:, :, 0])
        y = nn.LayerNorm()(x)
        columns = nn.with_partitioning(KERNEL, (None, "model"))
        rows = nn.with_partitioning(KERNEL, ("model", None))
        bias = nn.with_partitioning(BIAS, ("model",))
        # Flax makes the kernels of attention as matrices: all heads side by side.
        attention = nn.MultiHeadDotProductAttention(
            self.heads,
            kernel_init=columns,
            bias_init=bias,
            out_kernel_init=rows,
            out_bias_init=BIAS,
        )
        up = nn.Dense(4 * x.shape[-1], kernel_init=columns, bias_init=bias)
        down = nn.Dense(x.shape[-1], kernel_init=rows)
        x = x + drop(attention(y, y, mask=mask))
        y = nn.gelu(up(nn.LayerNorm()(x)))
        return x + drop(down(y))


class GPT(nn.Module):
    """A score for each byte that may follow, at each place."""

    blocks: int
    width: int
    heads: int
    context: int
    rate: float

    @nn.compact
    def __call__(self, tokens, train=False):
        embed = Embed(self.width, self.context, self.rate, name="embed")
        x = embed(tokens, train)
        for n in range(self.blocks):
            x = Block(self.heads, self.rate, name=f"block_{n}")(x, train)
        return embed.scores(nn.LayerNorm(name="norm")(x))


def model_of(args: argparse.Namespace) -> GPT:
    return GPT(args.blocks, args.width, args.heads, args.context, args.dropout)


def annotated_init_of(args: argparse.Namespace) -> Callable[..., Any]:
    """The function that makes the parameters, with the axes that each is cut over."""

    def init(key):
        tokens = jnp.zeros((1, args.context), jnp.int32)
        return model_of(args).init(key, tokens)["params"]

    return init


def init_of(args: argparse.Namespace) -> Callable[..., Any]:
    """The function that makes the parameters."""
    # Without annotations a checkpoint has the names that any other GPT has.
    return lambda key: nn.unbox(annotated_init_of(args)(key))


def specs_of(args: argparse.Namespace) -> Any:
    """How each parameter lies over the axis `"model"`."""
    annotated = jax.eval_shape(annotated_init_of(args), jax.random.key(0))
    return nn.get_partition_spec(annotated)


def loss_of(args: argparse.Namespace) -> Callable[..., Any]:
    """The mean loss of the next byte; with a key there is dropout."""
    model = model_of(args)

    def loss_fn(params, tokens, targets, key=None):
        rngs = None if key is None else {"dropout": key}
        scores: Any = model.apply(
            {"params": params}, tokens, train=key is not None, rngs=rngs
        )
        losses = optax.softmax_cross_entropy_with_integer_labels
        return losses(scores, targets).mean()

    return loss_fn


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


def sizes(text: str) -> tuple[int, int, int]:
    """Of the axes of a mesh."""
    stage, data, model = map(int, text.split(","))
    if min(stage, data, model) < 1:
        raise ValueError(text)
    return stage, data, model


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
    add(
        "--mesh",
        type=sizes,
        default=None,
        help="stages, devices that share rows, devices that share parameters: 2,2,2",
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
    if args.mesh is not None:
        args.stages = args.mesh[0]
    if args.stages > args.blocks:
        number = "1 block" if args.blocks == 1 else f"{args.blocks} blocks"
        parser.error(f"--stages {args.stages}: the model has {number}")
    if args.width % args.heads:
        parser.error(f"--heads {args.heads}: a divisor of the width {args.width}")
    if args.batch % args.chunks:
        parser.error(f"--chunks {args.chunks}: a divisor of the batch {args.batch}")
    _, data, model = args.mesh or (0, 1, 1)
    if args.batch // args.chunks % data:
        parser.error(
            f"--mesh: {data} devices share the {args.batch // args.chunks} rows of a "
            "microbatch: a divisor of them is needed"
        )
    if args.heads % model:
        parser.error(
            f"--mesh: {model} devices share the {args.heads} heads: a divisor of them "
            "is needed"
        )
    return args


def build(args: argparse.Namespace) -> fpipe.ValueAndGrad:
    """The loss function in stages, over GPUs if there are some, else over simulated CPU
    devices.
    """
    wanted = args.stages if args.mesh is None else math.prod(args.mesh)
    jax.config.update("jax_num_cpu_devices", wanted)
    devices = jax.devices()[:wanted]
    mesh = None if args.mesh is None else mesh_of(devices, args)
    if mesh is None and args.stages % len(devices):
        raise SystemExit(
            f"--stages {args.stages}: a multiple of the {len(devices)} devices is "
            "needed"
        )
    # On fewer devices than stages each has several of them.
    several = mesh is None and args.stages > len(devices)
    return fpipe.value_and_grad(
        loss_of(args),
        devices=devices if mesh is None else None,
        mesh=mesh,
        specs=None if mesh is None else specs_of(args),
        stages=args.stages,
        balance=[1] * args.stages,
        chunks=args.chunks,
        schedule="interleaved_1f1b" if several else "eager_1f1b",
        executor=args.executor,
        init=init_of(args),
    )


def mesh_of(devices: Sequence[Any], args: argparse.Namespace) -> Mesh:
    wanted = math.prod(args.mesh)
    if len(devices) < wanted:
        raise SystemExit(f"--mesh: {wanted} devices, here are {len(devices)}")
    return Mesh(np.reshape(np.asarray(devices), args.mesh), ("stage", "data", "model"))


def start(pipeline: fpipe.ValueAndGrad, args: argparse.Namespace) -> TrainState:
    """Parameters and optimizer; weights of more than one axis decay."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, args.rate, max(args.steps // 10, 1), max(args.steps, 2)
    )
    adamw = optax.adamw(
        rate, weight_decay=0.01, mask=lambda p: jax.tree.map(lambda a: a.ndim > 1, p)
    )
    tx = fpipe.optim.per_stage(optax.chain(optax.clip_by_global_norm(1.0), adamw))
    params = pipeline.init(jax.random.key(args.seed), *shapes(args))
    state = TrainState.create(apply_fn=model_of(args).apply, params=params, tx=tx)
    return counted(pipeline, state, 0)


def shapes(args: argparse.Namespace) -> tuple[Any, Any]:
    """Of a batch's windows, and of what follows each byte."""
    tokens = jax.ShapeDtypeStruct((args.batch, args.context), jnp.int32)
    return tokens, tokens


def counted(pipeline: fpipe.ValueAndGrad, state: TrainState, step: int) -> TrainState:
    """A state after so many steps."""
    mesh = pipeline.pipe.mesh
    if mesh is None or pipeline.pipe.executor != "scan":
        return state.replace(step=step)
    # It comes out of a step on the mesh: going in elsewhere the step would be compiled
    # twice.
    place = NamedSharding(mesh, PartitionSpec())
    return state.replace(step=jax.device_put(jnp.int32(step), place))


def stepper(pipeline: fpipe.ValueAndGrad) -> Callable[..., Any]:
    """`step(state, tokens, targets, key) -> (state, loss)`: one program, or the stages'
    programs.
    """

    def step(
        state: TrainState, tokens: Any, targets: Any, key: Any
    ) -> tuple[TrainState, Any]:
        loss, grads = pipeline(state.params, tokens, targets, key=key)
        return state.apply_gradients(grads=grads), loss

    one = pipeline.pipe.executor == "scan"
    return jax.jit(step, donate_argnums=0) if one else step


def train(pipeline: fpipe.ValueAndGrad, args: argparse.Namespace) -> TrainState:
    """The trained state; what there is of it after Ctrl-C."""
    state, key = start(pipeline, args), jax.random.key(args.seed)
    data, held_out = text()
    saved = (
        None
        if args.checkpoints is None
        else ocp.CheckpointManager(args.checkpoints.resolve())
    )
    if saved is not None and saved.latest_step() is not None:
        state = load(saved, pipeline, state, args)
        print(f"going on from step {int(state.step)} of {args.checkpoints}")
    count = sum(a.size for a in jax.tree.leaves(pipeline.split.param_shapes))
    devices = {d for a in jax.tree.leaves(state.params) for d in a.devices()}
    print(
        f"GPT of {args.blocks} blocks, {count:,} parameters; {args.stages} stages, "
        f"{len(devices)} devices, {args.executor}"
    )

    step, evaluate = stepper(pipeline), pipeline.evaluate
    evaluate = jax.jit(evaluate) if args.executor == "scan" else evaluate
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
                    save(saved, pipeline, state)
    except KeyboardInterrupt:
        bar.write(f"stopped after {int(state.step)} steps")
    bar.close()
    if saved is not None:
        saved.close()
    return state


# --- checkpoints, as of the model without a pipeline ----------------------------------


def save(
    saved: ocp.CheckpointManager, pipeline: fpipe.ValueAndGrad, state: TrainState
) -> None:
    saved.save(int(state.step), args=ocp.args.StandardSave(plain(pipeline, state)))


def plain(pipeline: fpipe.ValueAndGrad, state: TrainState) -> dict[str, Any]:
    """What goes on disk."""
    moments = fpipe.optim.gather(state.opt_state)
    return {
        "params": pipeline.gather(state.params),
        "optimizer": moments,
        "step": jnp.asarray(state.step),
    }


def load(
    saved: ocp.CheckpointManager,
    pipeline: fpipe.ValueAndGrad,
    state: TrainState,
    args: argparse.Namespace,
) -> TrainState:
    """The last checkpoint, in the place of a state that has just been made."""
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, plain(pipeline, state))
    found: Any = saved.restore(saved.latest_step(), args=ocp.args.StandardRestore(like))
    params = pipeline.place(found["params"], *shapes(args))
    moments = fpipe.optim.place(found["optimizer"], params)
    state = state.replace(params=params, opt_state=moments)
    return counted(pipeline, state, int(found["step"]))


# --- the end --------------------------------------------------------------------------


def written(
    pipeline: fpipe.ValueAndGrad, state: TrainState, args: argparse.Namespace
) -> str:
    """What the model writes, byte by byte, on one device."""
    model, params = model_of(args), pipeline.gather(state.params)

    @jax.jit
    def following(window, length, key):
        scores: Any = model.apply({"params": params}, window[None])
        scores = scores[0, length - 1]
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
        pipeline = build(args)
        state = train(pipeline, args)
        print(f"\nwhat the model writes:\n\n{written(pipeline, state, args)}")
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None


if __name__ == "__main__":
    main()
