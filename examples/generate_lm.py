"""Write text with the GPT of `train_lm.py`, whose stages keep their caches on devices.

Each sequence begins with the prompt and goes on, byte by byte, until the model's
context is full. The blocks are cut over several devices; each keeps the keys and values
of the bytes so far there, and the sequences fill the pipeline in groups. The same
layers on one device, under `jax.jit`, write the same text, and both are timed.

    python examples/train_lm.py --checkpoints lm
    python examples/generate_lm.py --checkpoints lm

Without a checkpoint the parameters are random, and so is the text. It uses the GPUs of
this machine, or else simulated CPU devices.
"""

import argparse
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import train_lm

import fpipe

# --- the model, as functions of one place or of many ----------------------------------
#
# The parameters are those of `train_lm.py`'s Flax module. A layer sees the prompt, and
# then one byte at a time; `step` is the place of the first byte that it sees.


def norm(params, x):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(variance + 1e-6)
    return x * params["scale"] + params["bias"]


def dense(params, x, axes=1):
    return jnp.tensordot(x, params["kernel"], axes) + params["bias"]


def embed(params, tokens, *, step):
    """Bytes and their places as vectors."""
    count = tokens.shape[1]
    places = jax.lax.dynamic_slice_in_dim(params["places"], step, count)
    return params["table"]["embedding"][tokens] + places


def attention(params, x, state, step):
    """Causal attention to all that the cache has seen, `x` included."""
    query, key, value = (dense(params[name], x) for name in ("query", "key", "value"))
    keys = jax.lax.dynamic_update_slice_in_dim(state["keys"], key, step, axis=1)
    values = jax.lax.dynamic_update_slice_in_dim(state["values"], value, step, axis=1)
    scores = jnp.einsum("bthd,blhd->bhtl", query, keys) / np.sqrt(query.shape[-1])
    places = step + jnp.arange(x.shape[1])[:, None]
    scores = jnp.where(jnp.arange(keys.shape[1]) <= places, scores, -jnp.inf)
    mixed = jnp.einsum("bhtl,blhd->bthd", jax.nn.softmax(scores), values)
    return dense(params["out"], mixed, axes=2), {"keys": keys, "values": values}


def block(params, x, *, state, step):
    """Attention and a perceptron, each beside a residual."""
    y = norm(params["LayerNorm_0"], x)
    y, state = attention(params["MultiHeadDotProductAttention_0"], y, state, step)
    x = x + y
    y = dense(params["Dense_0"], norm(params["LayerNorm_1"], x))
    return x + dense(params["Dense_1"], jax.nn.gelu(y)), state


def head(temperature: float) -> Callable[..., Any]:
    """The next byte of each row, drawn with the row's own key."""

    # It is chosen here, on the last device: bytes go back to the first, and not scores.
    def choose(params, x, *, borrowed, side, step):
        table = borrowed["embed"]["table"]["embedding"]
        scores = norm(params, x[:, -1]) @ table.T
        if not temperature:
            return jnp.argmax(scores, -1)[:, None].astype(jnp.int32)

        def draw(key, row):
            key = jax.random.fold_in(key, step)
            return jax.random.categorical(key, row / temperature, shape=(1,))

        return jax.vmap(draw)(side, scores).astype(jnp.int32)

    return choose


def layers_of(params: Sequence[Any], temperature: float) -> list[fpipe.Layer]:
    """The layers that these parameters are of."""
    places, width = params[0]["places"].shape
    first = params[1]["MultiHeadDotProductAttention_0"]["key"]["kernel"]
    _, heads, size = first.shape
    assert width == first.shape[0]

    def caches(x):
        # Two arrays, for each is written in its own place.
        shape = (x.shape[0], places, heads, size)
        return {name: jnp.zeros(shape, x.dtype) for name in ("keys", "values")}

    layer = fpipe.Layer(block, name="block", init_state=caches, state_rows=True)
    return [
        fpipe.Layer(embed, name="embed"),
        *[layer] * (len(params) - 2),
        fpipe.Layer(head(temperature), name="head", borrow=["embed"]),
    ]


# --- the parameters -------------------------------------------------------------------


def by_layer(params: Mapping[str, Any]) -> list[Any]:
    """The parameters of the Flax module, one entry for each layer."""
    blocks = sum(name.startswith("block_") for name in params)
    names = ["embed", *[f"block_{n}" for n in range(blocks)], "norm"]
    return [params[name] for name in names]


def load(folder: pathlib.Path) -> dict[str, Any]:
    """The parameters of the last checkpoint."""
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.CheckpointManager(folder.resolve(), item_handlers=handler) as saved:
        step = saved.latest_step()
        if step is None:
            raise SystemExit(f"--checkpoints {folder}: no checkpoint is there")
        # The optimizer's state stays on disk.
        found: Any = saved.item_metadata(step)
        wanted = {
            "params": jax.tree.map(
                lambda a: np.zeros(a.shape, a.dtype), found["params"]
            )
        }
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(wanted, as_numpy, partial_restore=True)
        return saved.restore(step, args=args)["params"]


def random_params(args: argparse.Namespace) -> dict[str, Any]:
    init = train_lm.init_of(argparse.Namespace(**vars(args), dropout=0.0))
    return jax.jit(init)(jax.random.key(args.seed))


# --- decoding -------------------------------------------------------------------------


class Written(NamedTuple):
    """What a decoder has written.

    Attributes:
        tokens: for each sequence the bytes after the prompt.
        seconds: for the bytes after the first.
        host: seconds of work of the calling thread in these.
    """

    tokens: np.ndarray
    seconds: float
    host: float


def decode(call: Callable[..., Any], x: Any, state: Any, count: int) -> Written:
    """`count` bytes after the prompt `x`.

    Arguments:
        call: `call(x, state, step) -> (x, state)`.
    """
    step = jax.tree.leaves(x)[0].shape[1]
    x, state = call(x, state, 0)
    tokens = [x]
    jax.block_until_ready((x, state))
    # Calls return before the devices have run them, until some dozens are on their way.
    # Then they wait, and that is no work: `thread_time` does not count it.
    start, worked = time.perf_counter(), time.thread_time()
    for n in range(count - 1):
        x, state = call(x, state, step + n)
        tokens.append(x)
    host = time.thread_time() - worked
    jax.block_until_ready(x)
    seconds = time.perf_counter() - start
    # Of a pipeline each is in pieces.
    rows = [np.concatenate(jax.device_get(jax.tree.leaves(x))) for x in tokens]
    return Written(np.concatenate(rows, axis=1), seconds, host)


def with_a_pipeline(
    pipe: fpipe.Pipe, params: Any, prompt: Any, keys: Any, count: int
) -> Written:
    """Sequences in groups, each with caches of its own on every stage."""
    groups = pipe.chunks
    x = fpipe.Microbatches(jnp.split(prompt, groups))
    # Where they are read: else every call would put them there.
    keys = jax.device_put(keys, pipe.devices[-1])
    side = fpipe.Microbatches(jnp.split(keys, groups))

    def call(x: Any, state: Any, step: int) -> Any:
        return pipe(params, x, side=side, state=state, step=step, donate_state=True)

    return decode(call, x, pipe.init_state(x, side=side, params=params), count)


def on_one_device(
    layers: Sequence[fpipe.Layer], params: Any, prompt: Any, keys: Any, count: int
) -> Callable[[], Written]:
    """The same layers in one jitted program for all sequences."""
    model = fpipe.sequential(layers)

    def plain(params: Any, x: Any, state: Any, keys: Any, step: Any) -> Any:
        return model(params, x, side=keys, state=state, step=step)

    jitted = jax.jit(plain, donate_argnums=2)

    def run() -> Written:
        state = model.init_state(prompt, side=keys, params=params)

        def call(x: Any, state: Any, step: int) -> Any:
            return jitted(params, x, state, keys, np.int32(step))

        return decode(call, prompt, state, count)

    return run


# --- the script -----------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(*names, **options):
        parser.add_argument(
            *names, **options | {"help": options["help"] + " (default: %(default)s)"}
        )

    add(
        "--checkpoints",
        type=pathlib.Path,
        default=None,
        help="folder in which train_lm.py has saved",
    )
    add("--prompt", default="The ", help="what every sequence begins with")
    add("--sequences", type=int, default=16, help="sequences that are written at once")
    add("--count", type=int, default=0, help="bytes to write; 0: all that fit")
    add("--temperature", type=float, default=0.8, help="of the draws; 0: the likeliest")
    add("--stages", type=int, default=2, help="stages, one device each")
    add(
        "--groups",
        type=int,
        default=0,
        help="groups of sequences, a divisor of their number; 0: one for each stage",
    )
    add("--seed", type=int, default=0, help="seed of the draws")
    add("--blocks", type=int, default=4, help="without a checkpoint: blocks")
    add("--width", type=int, default=96, help="without a checkpoint: width")
    add("--heads", type=int, default=4, help="without a checkpoint: attention heads")
    add("--context", type=int, default=64, help="without a checkpoint: most bytes")
    args = parser.parse_args()
    for name in ("sequences", "stages", "blocks", "width", "heads", "context"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: at least 1")
    for name in ("count", "groups", "temperature"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} {getattr(args, name)}: at least 0")
    if not args.prompt:
        parser.error("--prompt: at least one byte")
    args.groups = args.groups or args.stages
    if args.sequences % args.groups:
        parser.error(
            f"--groups {args.groups}: a divisor of the {args.sequences} sequences"
        )
    return args


def balance(blocks: int, stages: int) -> list[int]:
    """Blocks as even as can be; the ends cost little beside them."""
    layers = [blocks // stages + (s < blocks % stages) for s in range(stages)]
    layers[0] += 1
    layers[-1] += 1
    return layers


def bytes_to_write(args: argparse.Namespace, params: Sequence[Any]) -> int:
    """How many bytes each sequence gets, if the model allows what is asked for."""
    blocks, places = len(params) - 2, params[0]["places"].shape[0]
    if args.stages > blocks:
        number = "1 block" if blocks == 1 else f"{blocks} blocks"
        raise SystemExit(f"--stages {args.stages}: the model has only {number}")
    # The last byte that is written is not seen.
    prompt = len(args.prompt.encode())
    room = places - prompt + 1
    if not max(args.count, 1) <= room:
        raise SystemExit(
            f"--count {args.count} after a prompt of {prompt} bytes: the model sees "
            f"{places}"
        )
    return args.count or room


def main() -> None:
    args = arguments()
    jax.config.update("jax_num_cpu_devices", args.stages)
    devices = jax.devices()[: args.stages]
    if len(devices) < args.stages:
        there = "is 1 device" if len(devices) == 1 else f"are {len(devices)} devices"
        raise SystemExit(f"--stages {args.stages}: there {there}")
    whole = load(args.checkpoints) if args.checkpoints else random_params(args)
    params = by_layer(whole)
    count = bytes_to_write(args, params)

    layers = layers_of(params, args.temperature)
    prompt = np.array(list(args.prompt.encode()), np.int32)
    tokens = np.tile(prompt, (args.sequences, 1))
    keys = jax.random.split(jax.random.key(args.seed), args.sequences)
    pipe = fpipe.Pipe(
        layers,
        balance(len(params) - 2, args.stages),
        devices,
        args.groups,
        schedule="forward_only",
    )
    placed = pipe.place(params)
    plain = on_one_device(
        layers, jax.device_put(params, devices[0]), tokens, keys, count
    )
    # The first run of each compiles.
    with_a_pipeline(pipe, placed, tokens, keys, count)
    plain()
    written = with_a_pipeline(pipe, placed, tokens, keys, count)
    expected = plain()

    for row in written.tokens[:3]:
        print(args.prompt + bytes(row.tolist()).decode(errors="replace"), end="\n\n")
    same = np.mean(written.tokens == expected.tokens)
    print(
        f"{args.sequences} sequences of {count} bytes, in {args.groups} groups; layers "
        f"per stage {list(pipe.balance)}"
    )
    print(f"{same:.1%} of the bytes are those that one device writes")
    for name, run in ((f"{args.stages} devices", written), ("1 device", expected)):
        speed = args.sequences * (count - 1) / run.seconds
        host = 1e3 * run.host / max(count - 1, 1)
        print(
            f"{name:>10}: {speed:,.0f} bytes a second; the host takes {host:.2f} ms "
            "for the next byte of all sequences"
        )


if __name__ == "__main__":
    main()
