"""Train a classifier of handwritten digits, cut over the devices of several processes.

Run this same script once for every process, with the same flags but for `--process`.
`launch.py` does so on one machine; the README beside it has the lines for Slurm and
Kubernetes. Under Slurm and Open MPI the flags for joining may be left out.

With `--executor placed` each process compiles and runs the programs of its own stages,
and updates its own parameters. With `--executor scan` the whole training step,
optimizer included, is one program: the pipeline runs inside `jax.jit`, and adam updates
the packed parameters where they lie.
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import sklearn.datasets
from jax.experimental.multihost_utils import reached_preemption_sync_point
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fpipe
import fpipe.distributed
import fpipe.optim

# --- the model ------------------------------------------------------------------------


def dense_init(key, fan_in: int, fan_out: int):
    return jax.random.normal(key, (fan_in, fan_out)) / fan_in**0.5, jnp.zeros(fan_out)


def dense(params, x):
    weights, bias = params
    return x @ weights + bias


def linear(width: int, name: str) -> fpipe.Layer:
    return fpipe.Layer(
        dense, lambda key, x: dense_init(key, x.shape[-1], width), name=name
    )


def block_init(key, x):
    up, down = jax.random.split(key)
    width = x.shape[-1]
    return {
        "scale": jnp.ones(width),
        "up": dense_init(up, width, 4 * width),
        "down": dense_init(down, 4 * width, width),
    }


def block(params, x):
    """Add a two-layer perceptron of the normalised input."""
    h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * params["scale"]
    return x + dense(params["down"], jax.nn.gelu(dense(params["up"], h)))


def classifier(args: argparse.Namespace) -> list[fpipe.Layer]:
    # Blocks that are equal on all devices run by one piece of code; the two ends may
    # differ.
    blocks = [fpipe.Layer(block, block_init, name="block")] * args.blocks
    return [linear(args.width, "embed"), *blocks, linear(10, "head")]


def cross_entropy(logits, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


# --- the processes --------------------------------------------------------------------


def join(args: argparse.Namespace) -> None:
    """Join the other processes. Nothing before this may use a device."""
    # JAX's preemption service catches SIGTERM, for scripts that then save a checkpoint.
    # Without checkpoints this one simply ends.
    preemption = args.checkpoints is not None
    jax.config.update("jax_enable_preemption_service", preemption)
    # Who is told everything need not look for a cluster. In Kubernetes JAX would warn
    # that it cannot ask the cluster without a package.
    known = None not in (args.coordinator, args.processes, args.process)
    # From now on a script that raises ends, and the others with it.
    fpipe.distributed.initialize(
        args.coordinator,
        args.processes,
        args.process,
        timeout=args.patience,
        heartbeat_timeout_seconds=args.patience,
        shutdown_timeout_seconds=args.patience,
        cluster_detection_method="deactivate" if known else None,
    )


def on_all(pipe: fpipe.Pipe, a: np.ndarray) -> jax.Array:
    """An array that every process has, as one array on all devices."""
    assert pipe.mesh is not None
    return jax.make_array_from_process_local_data(NamedSharding(pipe.mesh, P()), a)


def say(text: str) -> None:
    """Print, in one process."""
    if jax.process_index() == 0:
        print(text, flush=True)


# --- checkpoints ----------------------------------------------------------------------


def canonical(pipe: fpipe.Pipe, params: Any, moments: Any) -> Any:
    """What a checkpoint holds, in every process: any number of them can load it."""
    tree = {"params": pipe.gather(params), "moments": fpipe.optim.gather(moments)}
    return jax.device_get(tree)


def save(
    saved: ocp.CheckpointManager, step: int, pipe: fpipe.Pipe, params: Any, moments: Any
) -> None:
    """All processes call it; the first one writes."""
    tree = canonical(pipe, params, moments)
    saved.save(step, args=ocp.args.StandardSave(tree))
    saved.wait_until_finished()


def load(
    saved: ocp.CheckpointManager, pipe: fpipe.Pipe, params: Any, moments: Any
) -> tuple[Any, Any, int]:
    """Parameters, moments and the number of the next step, of the last checkpoint if
    there is one.
    """
    step = saved.latest_step()
    if step is None:
        return params, moments, 0
    like = ocp.args.StandardRestore(canonical(pipe, params, moments))
    tree = saved.restore(step, args=like)
    say(f"continues with step {step}")
    params = pipe.place(tree["params"])
    return params, fpipe.optim.place(tree["moments"], params), step


# --- training -------------------------------------------------------------------------


Step: TypeAlias = Callable[[Any, Any, np.ndarray, np.ndarray], tuple[Any, Any, Any]]
"""From parameters, moments, images and labels to new parameters and moments, and the
loss.
"""


def placed_step(pipe: fpipe.Pipe, params: Any, rate: float) -> tuple[Any, Step]:
    """The moments of adam, and a step: the pipe's own programs, and those of adam on
    each device.
    """
    adam = fpipe.optim.per_stage(optax.adam(rate), donate=("grads", "state"))
    loss_and_gradients = pipe.value_and_grad(cross_entropy)

    def step(params: Any, moments: Any, x: Any, labels: Any) -> tuple[Any, Any, Any]:
        loss, gradients = loss_and_gradients(params, x, labels)
        updates, moments = adam.update(gradients, moments, params)
        params = fpipe.optim.apply_updates(params, updates, donate=("params",))
        return params, moments, loss

    return adam.init(params), step


def scan_step(pipe: fpipe.Pipe, params: Any, rate: float) -> tuple[Any, Step]:
    """The moments of adam, and a step that is one program of all processes."""
    adam = optax.adam(rate)
    # The moments lie beside their parameters. Adam's counter has no device yet.
    moments = jax.tree.map(
        lambda a: (
            a if isinstance(a.sharding, NamedSharding) else on_all(pipe, np.asarray(a))
        ),
        adam.init(params),
    )
    loss_and_gradients = pipe.value_and_grad(cross_entropy)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def program(params: Any, moments: Any, x: Any, labels: Any) -> Any:
        loss, gradients = loss_and_gradients(params, x, labels)
        updates, moments = adam.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    def step(params: Any, moments: Any, x: Any, labels: Any) -> tuple[Any, Any, Any]:
        made = program(params, moments, on_all(pipe, x), on_all(pipe, labels))
        # A placed pipe tells the watchdog by itself.
        return fpipe.distributed.watched(made, "a training step")

    return moments, step


def train(args: argparse.Namespace) -> None:
    pipe = fpipe.Pipe(
        classifier(args),
        devices=jax.devices(),
        chunks=args.chunks,
        schedule=args.schedule,
        executor=args.executor,
    )
    say(
        f"{jax.process_count()} processes, {len(pipe.devices)} {jax.default_backend()} "
        "devices, "
        f"layers of the stages: {list(pipe.balance)}"
    )
    images, labels = map(np.asarray, sklearn.datasets.load_digits(return_X_y=True))
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    count = len(images) * 4 // 5  # the others are held out

    # Every process makes the parameters of its own stages, and no others.
    params = pipe.init(
        jax.random.key(args.seed),
        jax.ShapeDtypeStruct((args.batch, images.shape[1]), jnp.float32),
    )
    make_step = placed_step if args.executor == "placed" else scan_step
    moments, step = make_step(pipe, params, args.rate)
    saved, first = None, 0
    if args.checkpoints is not None:
        saved = ocp.CheckpointManager(args.checkpoints.resolve())
        params, moments, first = load(saved, pipe, params, moments)

    started = time.monotonic()
    for n in range(first, args.steps):
        # The same seed in every process, so the same batches.
        random = np.random.default_rng((args.seed, n))
        rows = random.choice(count, args.batch, replace=False)
        params, moments, loss = step(params, moments, images[rows], labels[rows])
        if n % args.every == 0 or n == args.steps - 1:
            # Every process waits here, so none runs far ahead of the others.
            say(
                f"step {n}: loss {float(loss):.4f} after "
                f"{time.monotonic() - started:.1f} s"
            )
        # True in all processes after the same step, when one of them has got SIGTERM.
        if saved is not None and reached_preemption_sync_point(n):
            save(saved, n + 1, pipe, params, moments)
            say(f"preempted: saved after step {n}")
            return
    if saved is not None:
        save(saved, args.steps, pipe, params, moments)

    # All parameters in every process: for a checkpoint, or to go on without a pipeline.
    whole = jax.tree.map(np.asarray, pipe.gather(params))
    if jax.process_index() == 0:
        logits = jax.jit(fpipe.sequential(classifier(args)))(whole, images[count:])
        accuracy = float(np.mean(np.argmax(logits, -1) == labels[count:]))
        norm = float(
            np.sqrt(
                sum(
                    np.sum(np.square(a, dtype=np.float64))
                    for a in jax.tree.leaves(whole)
                )
            )
        )
        say(f"held-out accuracy {accuracy:.3f}, norm of the parameters {norm:.4f}")


def parsed() -> argparse.Namespace:
    show = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n\n")[0], formatter_class=show
    )
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where process 0 listens; left out: detected",
    )
    parser.add_argument(
        "--processes", type=int, help="how many there are; left out: detected"
    )
    parser.add_argument(
        "--process", type=int, help="the number of this one, from 0; left out: detected"
    )
    parser.add_argument(
        "--executor",
        default="placed",
        choices=["placed", "scan"],
        help="what runs the pipeline",
    )
    parser.add_argument(
        "--patience",
        type=int,
        default=60,
        help="seconds until a silent process counts as dead",
    )
    parser.add_argument(
        "--blocks", type=int, default=8, help="equal blocks between the two ends"
    )
    parser.add_argument("--width", type=int, default=128, help="of the blocks")
    parser.add_argument("--batch", type=int, default=256, help="images in a step")
    parser.add_argument("--chunks", type=int, default=8, help="microbatches in a step")
    parser.add_argument(
        "--schedule",
        default="eager_1f1b",
        choices=fpipe.schedules.NAMES,
        help="order of the work",
    )
    parser.add_argument("--steps", type=int, default=100, help="training steps")
    parser.add_argument(
        "--every", type=int, default=20, help="steps between two lines of output"
    )
    parser.add_argument(
        "--checkpoints",
        type=pathlib.Path,
        metavar="FOLDER",
        help="save here at the end and on SIGTERM, and continue from what is here; "
        "a folder that all processes see",
    )
    parser.add_argument(
        "--rate", type=float, default=1e-3, help="learning rate of adam"
    )
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches")
    args = parser.parse_args()
    for flag in ("patience", "blocks", "width", "batch", "chunks", "steps", "every"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: at least 1")
    if args.batch % args.chunks:
        parser.error(
            f"--batch {args.batch}: a multiple of --chunks {args.chunks}, for "
            "microbatches have equal size"
        )
    return args


def main() -> None:
    args = parsed()
    join(args)
    train(args)
    fpipe.distributed.shutdown()  # waits until all are here


if __name__ == "__main__":
    main()
