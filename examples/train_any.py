"""Train a model that somebody else wrote, unchanged, cut over several devices.

The model is the vision transformer of `vision_transformer.py`, Flax modules that know
nothing of pipelines; it learns to read handwritten digits. Its training loop is a
usual one. With `--executor plain` it runs without a pipeline, on one device, by
`jax.value_and_grad(loss_fn)`. Otherwise `fpipe.value_and_grad(loss_fn, ...)` stands
there, which reads the loss function's trace and cuts it into stages. All print the same
losses.

Run it with no argument. It uses the GPUs of this machine, or else simulated CPU
devices. With `--checkpoints FOLDER` it saves as it goes and goes on from what it finds
there. A checkpoint holds what the loop without a pipeline has, so each kind of run goes
on with the checkpoints of all others.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import orbax.checkpoint as ocp
import sklearn.datasets
import sklearn.model_selection
import tqdm
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec
from vision_transformer import VisionTransformer

import fpipe
import fpipe.optim
import fpipe.plot

# --- the data -------------------------------------------------------------------------

SIZE = 8
"""Side of an image in pixels."""


class Data(NamedTuple):
    """Images, float32[N, 8, 8, 1] in 0..1, and which digit each shows."""

    images: np.ndarray
    labels: np.ndarray


def digits() -> tuple[Data, Data]:
    """What to train on, and the fifth of each digit that is held out."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = images.reshape(-1, SIZE, SIZE, 1).astype(np.float32) / 16
    parts = sklearn.model_selection.train_test_split(
        images, labels.astype(np.int32), test_size=0.2, stratify=labels, random_state=0
    )
    seen, held_out, seen_labels, held_out_labels = map(np.asarray, parts)
    return Data(seen, seen_labels), Data(held_out, held_out_labels)


def batch_of(data: Data, step: int, args: argparse.Namespace) -> Data:
    """Random images. A step's batch depends on its number alone, so that training can
    go on.
    """
    rng = np.random.default_rng((args.seed, step))
    chosen = rng.integers(len(data.images), size=args.batch)
    return Data(data.images[chosen], data.labels[chosen])


# --- the loop, without a pipeline or with one -----------------------------------------


class Loop(NamedTuple):
    """What differs between the two.

    Attributes:
        state: what training begins with.
        step: `step(state, images, labels, key) -> (state, loss)`.
        evaluate: `evaluate(params, images, labels) -> loss`.
        gather: a state as the loop without a pipeline has it.
        place: its inverse.
        pipeline: of the loss function, if there is one.
    """

    state: TrainState
    step: Callable[..., tuple[TrainState, Any]]
    evaluate: Callable[..., Any]
    gather: Callable[[TrainState], TrainState]
    place: Callable[[TrainState], TrainState]
    pipeline: fpipe.ValueAndGrad | None = None


def model_of(args: argparse.Namespace) -> VisionTransformer:
    return VisionTransformer(10, 4, args.width, args.depth, args.heads, args.dropout)


def loss_of(model: VisionTransformer) -> Callable[..., Any]:
    """The loss function that both loops differentiate."""

    def loss_fn(params, images, labels, key=None):
        rngs = None if key is None else {"dropout": key}
        logits: Any = model.apply(
            {"params": params}, images, train=key is not None, rngs=rngs
        )
        losses = optax.softmax_cross_entropy_with_integer_labels
        return losses(logits, labels).mean()

    return loss_fn


def init_of(model: VisionTransformer) -> Callable[..., Any]:
    """The function that makes the parameters."""

    def init(key):
        images = jnp.zeros((1, SIZE, SIZE, 1))
        return model.init(key, images)["params"]

    return init


def optimizer(args: argparse.Namespace) -> optax.GradientTransformation:
    """AdamW, gradients clipped by the norm of all; weights of more than one axis
    decay.
    """
    rate = optax.warmup_cosine_decay_schedule(
        0.0, args.rate, max(args.steps // 10, 1), max(args.steps, 2)
    )
    adamw = optax.adamw(
        rate, weight_decay=0.01, mask=lambda p: jax.tree.map(lambda a: a.ndim > 1, p)
    )
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def stepper(value_and_grad: Callable[..., Any]) -> Callable[..., Any]:
    """One step, the same in both loops."""

    def step(state, images, labels, key):
        loss, grads = value_and_grad(state.params, images, labels, key=key)
        return state.apply_gradients(grads=grads), loss

    return step


def plain_loop(args: argparse.Namespace) -> Loop:
    """The model's own loop, on one device."""
    model, tx = model_of(args), optimizer(args)
    loss_fn, init = loss_of(model), init_of(model)
    params = jax.jit(init)(jax.random.key(args.seed))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    step = stepper(jax.value_and_grad(loss_fn))
    return Loop(
        state,
        jax.jit(step),
        jax.jit(loss_fn),
        gather=lambda state: state,
        place=lambda state: state,
    )


def pipelined_loop(args: argparse.Namespace) -> Loop:
    """The same in stages, on a device each."""
    model, tx = model_of(args), fpipe.optim.per_stage(optimizer(args))
    pipeline = fpipe.value_and_grad(
        loss_of(model),
        devices=jax.devices()[: args.stages],
        stages=args.stages,
        chunks=args.chunks,
        schedule=args.schedule,
        checkpoint=args.checkpoint,
        executor=args.executor,
        init=init_of(model),
    )
    params = pipeline.init(jax.random.key(args.seed), *shapes(args))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    step, evaluate = stepper(pipeline), pipeline.evaluate
    mesh = pipeline.pipe.mesh
    if mesh is not None:
        # One program for a whole step.
        step, evaluate = jax.jit(step), jax.jit(evaluate)

    def gather(state):
        params = pipeline.gather(state.params)
        moments = fpipe.optim.gather(state.opt_state, params)
        return state.replace(params=params, opt_state=moments)

    def place(state):
        params = pipeline.place(state.params, *shapes(args))
        moments = fpipe.optim.place(state.opt_state, params, tx)
        return counted(state.replace(params=params, opt_state=moments, tx=tx))

    def counted(state):
        if mesh is None:
            return state
        # On the mesh, where it comes out of a step: else the second one would compile
        # again.
        place = NamedSharding(mesh, PartitionSpec())
        return state.replace(step=jax.device_put(jnp.int32(state.step), place))

    return Loop(counted(state), step, evaluate, gather, place, pipeline)


def shapes(args: argparse.Namespace) -> tuple[Any, Any]:
    """Of a batch's images and labels."""
    images = jax.ShapeDtypeStruct((args.batch, SIZE, SIZE, 1), jnp.float32)
    return images, jax.ShapeDtypeStruct((args.batch,), jnp.int32)


# --- checkpoints ----------------------------------------------------------------------


def on_disk(state: TrainState) -> dict[str, Any]:
    """What is saved of a state without a pipeline."""
    step = np.array(jax.device_get(state.step), np.int32)
    return {"params": state.params, "opt_state": state.opt_state, "step": step}


def save(saved: ocp.CheckpointManager, loop: Loop, state: TrainState) -> None:
    tree = on_disk(loop.gather(state))
    saved.save(int(tree["step"]), args=ocp.args.StandardSave(tree))


def load(saved: ocp.CheckpointManager, loop: Loop) -> TrainState:
    """The last checkpoint, whichever loop saved it."""
    plain = loop.gather(loop.state)
    like = ocp.args.StandardRestore(on_disk(plain))
    found: Any = saved.restore(saved.latest_step(), args=like)
    return loop.place(plain.replace(**found))


# --- training -------------------------------------------------------------------------


def train(
    loop: Loop, seen: Data, held_out: Data, args: argparse.Namespace
) -> TrainState:
    """The trained state; what there is of it after Ctrl-C."""
    state, key = loop.state, jax.random.key(args.seed)
    saved = None
    if args.checkpoints is not None:
        saved = ocp.CheckpointManager(args.checkpoints.resolve())
        if saved.latest_step() is not None:
            state = load(saved, loop)
            print(f"going on from step {int(state.step)} of {args.checkpoints}")
    first = int(state.step)
    bar = tqdm.tqdm(total=args.steps, initial=first, desc="training", unit="step")
    try:
        for n in range(first, args.steps):
            drops = jax.random.fold_in(key, n) if args.dropout else None
            state, loss = loop.step(state, *batch_of(seen, n, args), drops)
            bar.update()
            if (n + 1) % args.every == 0 or n + 1 == args.steps:
                other = loop.evaluate(state.params, *held_out)
                bar.write(
                    f"step {n + 1}: loss {float(loss):.4f}, held-out loss "
                    f"{float(other):.4f}"
                )
                if saved is not None:
                    save(saved, loop, state)
    except KeyboardInterrupt:
        bar.write(f"stopped after {int(state.step)} steps")
    bar.close()
    if saved is not None:
        saved.close()
    return state


# --- before and after -----------------------------------------------------------------


def describe(loop: Loop, args: argparse.Namespace) -> fpipe.Prediction | None:
    """Say what is trained and where it is cut; the plan of a step in stages."""
    params = jax.eval_shape(init_of(model_of(args)), jax.random.key(0))
    count = sum(a.size for a in jax.tree.leaves(params))
    print(f"vision transformer, depth {args.depth}, {count:,} parameters")
    if loop.pipeline is None:
        return None
    pieces, _, _ = str(loop.pipeline.split).partition("\n\n")
    print(f"\n{pieces}\n")
    plan = loop.pipeline.plan(None, *shapes(args), optimizer=2)
    print(
        f"{args.executor}, {args.schedule}, {args.chunks} microbatches; plan: bubble "
        f"{plan.bubble:.0%}, at most {plan.peak / 2**20:.1f} MiB on a device"
    )
    return plan


def read_digits(
    loop: Loop, state: TrainState, images: np.ndarray, args: argparse.Namespace
) -> np.ndarray:
    """What the trained model says, by itself, on one device."""
    model, params = model_of(args), loop.gather(state).params
    logits = jax.jit(model.apply)({"params": params}, images)
    return np.asarray(logits).argmax(-1)


def picture(
    read: np.ndarray, held_out: Data, plan: fpipe.Prediction | None
) -> matplotlib.figure.Figure:
    """Held-out digits with what is read, mistakes first and in red; the planned
    step.
    """
    rows, columns, high, wide = 3, 12, SIZE + 4, SIZE + 2
    wrong = read != held_out.labels
    shown = np.argsort(~wrong, kind="stable")[: rows * columns]
    # Above each image there is room for what is read.
    tiles = np.pad(held_out.images[shown, :, :, 0], [(0, 0), (4, 0), (1, 1)])
    tiles = tiles.reshape(rows, columns, high, wide).swapaxes(1, 2)
    figure = matplotlib.figure.Figure((10, 6))
    above = figure.add_axes((0.02, 0.45, 0.96, 0.48))
    above.set_title(
        f"held-out digits, and what is read: {wrong.sum()} mistakes of {len(wrong)}, "
        "in red",
        loc="left",
        fontsize=10,
    )
    above.imshow(tiles.reshape(rows * high, columns * wide), cmap="gray_r")
    above.set_axis_off()
    for n, own in enumerate(shown):
        row, column = divmod(n, columns)
        color = "red" if wrong[own] else "black"
        above.text(
            column * wide + 4, row * high + 3, str(read[own]), fontsize=9, color=color
        )
    if plan is not None:
        # The plan has FLOPs for time: only their ratios say something here.
        events = tuple(
            event._replace(start=event.start / 1e6, end=event.end / 1e6)
            for event in plan.timeline.events
        )
        name = f"a step as planned, in MFLOP: {plan.timeline.name}"
        timeline = dataclasses.replace(plan.timeline, events=events, name=name)
        fpipe.plot.draw(timeline, figure.add_axes((0.08, 0.12, 0.9, 0.25)))
    return figure


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(*names, **options):
        parser.add_argument(
            *names, **options | {"help": options["help"] + " (default: %(default)s)"}
        )

    add(
        "--executor",
        default="placed",
        choices=["placed", "scan", "plain"],
        help="programs for each stage, one program for all, or no pipeline",
    )
    add(
        "--schedule",
        default="eager_1f1b",
        choices=["gpipe", "1f1b", "eager_1f1b", "zb_h1"],
        help="the pipeline schedule",
    )
    add(
        "--checkpoint",
        default="never",
        choices=["always", "except_last", "never"],
        help="which microbatches recompute in the backward",
    )
    add("--stages", type=int, default=2, help="stages, a device each")
    add(
        "--chunks",
        type=int,
        default=4,
        help="microbatches that a batch is cut into, a divisor of it",
    )
    add("--depth", type=int, default=2, help="transformer blocks")
    add("--width", type=int, default=48, help="width of the model")
    add("--heads", type=int, default=4, help="attention heads, a divisor of the width")
    add(
        "--dropout",
        type=float,
        default=0.0,
        help="dropout rate; each microbatch draws masks of its own",
    )
    add("--steps", type=int, default=200, help="training steps in all")
    add("--batch", type=int, default=64, help="images per step")
    add("--rate", type=float, default=2e-3, help="peak learning rate of AdamW")
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
        default=50,
        help="steps from one held-out loss and checkpoint to the next",
    )
    add(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("digits.png"),
        help="where the picture goes",
    )
    args = parser.parse_args()
    for name in (
        "stages",
        "chunks",
        "depth",
        "width",
        "heads",
        "steps",
        "batch",
        "every",
    ):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: at least 1")
    if args.width % args.heads:
        parser.error(f"--heads {args.heads}: a divisor of the width {args.width}")
    if args.batch % args.chunks:
        parser.error(f"--chunks {args.chunks}: a divisor of the batch {args.batch}")
    if not args.out.resolve().parent.is_dir():
        parser.error(
            f"--out {args.out}: there is no folder {args.out.resolve().parent}"
        )
    return args


def main() -> None:
    args = arguments()
    jax.config.update("jax_num_cpu_devices", args.stages)
    count = len(jax.devices())
    if args.executor != "plain" and args.stages > count:
        there = "is 1 device" if count == 1 else f"are {count} devices"
        raise SystemExit(f"--stages {args.stages}: there {there}")
    seen, held_out = digits()
    try:
        loop = plain_loop(args) if args.executor == "plain" else pipelined_loop(args)
        plan = describe(loop, args)
        whole = len(held_out.images) // args.chunks * args.chunks
        state = train(loop, seen, Data(*(a[:whole] for a in held_out)), args)
        read = read_digits(loop, state, held_out.images, args)
        right = (read == held_out.labels).mean()
        print(f"held-out digits: {right:.2%} of {len(read)} are read right")
        picture(read, held_out, plan).savefig(args.out)
        print(f"what is read, and the planned step: {args.out}")
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None


if __name__ == "__main__":
    main()
