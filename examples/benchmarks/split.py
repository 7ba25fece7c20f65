"""Functions that `fpipe.split` cuts, beside the same models cut by hand.

Three tables. How long it takes to trace a function and to cut it. How expensive the
most expensive stage is, measured, of an automatic cut and of the best cut that one
would write by hand. And how many programs a split pipe has, and how much time its
actions take on the host, beside the same model as layers written by hand.

    python examples/benchmarks/split.py [--blocks 364]
"""

import argparse
import functools
import itertools
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp

import fpipe
from fpipe._split import layers as split_layers
from fpipe._split.cuts import find_cuts

STAGES, CHUNKS = 4, 8


# --- models ---


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def zeros(tree):
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)


def norm(p, h):
    h = h - jnp.mean(h, -1, keepdims=True)
    return h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-5) * p["g"]


def block(p, h, mask):
    q, k, v = jnp.split(norm(p, h) @ p["qkv"], 3, -1)
    scores = jnp.where(mask[:, None, :], q @ k.swapaxes(1, 2), -1e9)
    h = h + jax.nn.softmax(scores) @ v @ p["out"]
    return h + jax.nn.gelu(norm(p, h) @ p["up"]) @ p["down"]


def gpt(params, x):
    """Tokens with a mask; the embedding is the head too."""
    h = params["embed"][x["tokens"]]
    for p in params["h"]:
        h = block(p, h, x["mask"])
    return h @ params["embed"].T


def gpt_params(blocks, width, words):
    own = {
        "qkv": shape(width, 3 * width),
        "out": shape(width, width),
        "g": shape(width),
        "up": shape(width, 4 * width),
        "down": shape(4 * width, width),
    }
    return {"embed": shape(words, width), "h": [own] * blocks}


def gpt_batch(rows, length):
    return {
        "tokens": jax.ShapeDtypeStruct((rows, length), jnp.int32),
        "mask": jax.ShapeDtypeStruct((rows, length), jnp.bool_),
    }


def convolve(p, h):
    for w in (p["a"], p["b"]):
        numbers = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(
            h, w, (1, 1), "SAME", dimension_numbers=numbers
        )
        h = jax.nn.relu(h)
    return h


def u_net(params, x):
    """Each level is read again on the way up."""
    h, skips = x, []
    for p in params["encode"]:
        h = convolve(p, h)
        skips.append(h)
        b, height, width, c = h.shape
        h = h.reshape(b, height // 2, 2, width // 2, 2, c).mean((2, 4))
    h = convolve(params["middle"], h)
    for p, skip in zip(params["decode"], reversed(skips), strict=True):
        h = jnp.repeat(jnp.repeat(h, 2, 1), 2, 2)
        h = convolve(p, jnp.concatenate([h, skip], -1))
    return h @ params["head"]


def u_net_params(levels, width):
    def pair(given, made):
        return {"a": shape(3, 3, given, made), "b": shape(3, 3, made, made)}

    widths = [width * 2**n for n in range(levels + 1)]
    return {
        "encode": [pair(a, b) for a, b in itertools.pairwise([3, *widths[:-1]])],
        "middle": pair(*widths[-2:]),
        "decode": [
            pair(a + b, b) for b, a in reversed(list(itertools.pairwise(widths)))
        ],
        "head": shape(width, 3),
    }


def residual_net(params, x):
    """Levels of residual blocks; each level has half the rows and columns."""
    numbers = ("NHWC", "HWIO", "NHWC")

    def conv(h, w, stride=1):
        strides = (stride, stride)
        return jax.lax.conv_general_dilated(
            h, w, strides, "SAME", dimension_numbers=numbers
        )

    h = jax.nn.relu(conv(x, params["stem"]))
    for p in params["h"]:
        stride = 2 if "short" in p else 1
        f = conv(jax.nn.relu(conv(h, p["a"], stride) * p["g"]), p["b"])
        h = jax.nn.relu(f + (conv(h, p["short"], stride) if "short" in p else h))
    return h.mean((1, 2)) @ params["head"]


def residual_net_params(levels, blocks, width):
    def own(given, made):
        p = {
            "a": shape(3, 3, given, made),
            "g": shape(made),
            "b": shape(3, 3, made, made),
        }
        return p if given == made else p | {"short": shape(1, 1, given, made)}

    widths = [width * 2**n for n in range(levels)]
    before = [widths[0], *widths[:-1]]
    h = [
        own(given if n == 0 else made, made)
        for given, made in zip(before, widths, strict=True)
        for n in range(blocks)
    ]
    return {"stem": shape(3, 3, 3, width), "h": h, "head": shape(widths[-1], 10)}


def mixer(params, x):
    """Mixes positions, then channels. Each level has a fourth of the positions."""
    h = x @ params["embed"]
    for p in params["h"]:
        if "join" in p:
            rows, positions, width = h.shape
            h = h.reshape(rows, positions // 4, 4 * width) @ p["join"]
        f = norm(p, h).swapaxes(1, 2) @ p["down"]
        h = h + (jax.nn.gelu(f) @ p["up"]).swapaxes(1, 2)
        h = h + jax.nn.gelu(norm(p, h) @ p["wide"]) @ p["narrow"]
    return norm(params, h).mean(1) @ params["head"]


def mixer_params(levels, blocks, positions, width):
    found = []
    for n in range(levels):
        own = {
            "g": shape(width),
            "down": shape(positions, positions),
            "up": shape(positions, positions),
            "wide": shape(width, 4 * width),
            "narrow": shape(4 * width, width),
        }
        first = {"join": shape(2 * width, width)} if n else {}
        found += [own | first, *[own] * (blocks - 1)]
        positions, width = positions // 4, 2 * width
    last = width // 2
    first = last // 2 ** (levels - 1)
    return {
        "embed": shape(48, first),
        "h": found,
        "g": shape(last),
        "head": shape(last, 10),
    }


def small_models():
    """Each with its parameters, a microbatch, and where one would cut it by hand."""
    blocks, levels = 8, 3
    mixers, residuals = (mixer_params(3, 3, 256, 64), residual_net_params(4, 2, 16))
    return {
        "GPT": (
            gpt,
            gpt_params(blocks, 128, 512),
            gpt_batch(4, 64),
            [f"h/{n}" for n in range(blocks)],
        ),
        "U-Net": (
            u_net,
            u_net_params(levels, 16),
            shape(4, 32, 32, 3),
            [
                *[f"encode/{n}" for n in range(1, levels)],
                "middle",
                *[f"decode/{n}" for n in range(levels)],
                "head",
            ],
        ),
        "ResNet": (
            residual_net,
            residuals,
            shape(4, 32, 32, 3),
            [*[f"h/{n}" for n in range(len(residuals["h"]))], "head"],
        ),
        "Mixer": (
            mixer,
            mixers,
            shape(4, 256, 48),
            [*[f"h/{n}" for n in range(len(mixers["h"]))], "head"],
        ),
    }


# --- 1. how long it takes ---


def seconds_to_split(blocks):
    """What its own Python takes is told apart: it runs twice, for microbatches of
    another number of rows show what is written for this one. So is the choice of the
    cuts, the part that has to look at all places together.
    """
    params, x = gpt_params(blocks, 16, 64), gpt_batch(2, 8)
    equations = len(jax.make_jaxpr(gpt)(params, x).jaxpr.eqns)
    for stages in (8, None):
        traced = chosen = 0.0

        def choose(*args):
            nonlocal chosen
            started = time.process_time()
            cuts = find_cuts(*args)
            chosen += time.process_time() - started
            return cuts

        split_layers.find_cuts = choose

        def timed(params, x):
            nonlocal traced
            started = time.process_time()
            y = gpt(params, x)
            traced += time.process_time() - started
            return y

        started = time.process_time()
        split = fpipe.split(timed, params, x, stages=stages)
        cut = time.process_time() - started - traced
        split_layers.find_cuts = find_cuts
        started = time.process_time()
        split.balance(min(8, len(split)))
        balance = time.process_time() - started
        print(
            f"{blocks:6} {equations:9} {'stages=8' if stages else '':9}"
            f"{len(split):7} {traced:8.2f} {cut:8.2f} {chosen:8.2f} {balance:8.2f}"
        )


# --- 2. the most expensive stage ---


def stage_seconds(pipe, params, x):
    """What a microbatch takes on each stage, forward and backward."""
    plan = pipe.plan(params, x, by="time")
    return [stage.total for stage in plan.stages]


def stage_contents(pipe, params, x):
    """What tells the stages of one function apart: stages that agree in all of it run
    the same operations, whoever cut them. What they hand on is not a part of it: where
    pieces are joined, the same array may be a skip in place of a boundary.
    """
    return [
        (stage.params, tuple(sorted(stage.work.items())))
        for stage in pipe.plan(params, x).stages
    ]


def cuts_by_hand(pieces, params, x, most):
    """The balances of the pieces whose most expensive stage takes the least by the sums
    of what the pieces take alone, and the one that `split.balance` finds.
    """
    times = fpipe.layer_costs(pieces, x, by="time")
    work = [f + b for f, b in zip(times.forward, times.backward, strict=True)]

    def most_expensive(ends):
        return max(sum(work[a:b]) for a, b in itertools.pairwise(ends))

    every = [
        (0, *inner, len(work))
        for inner in itertools.combinations(range(1, len(work)), STAGES - 1)
    ]
    best = sorted(every, key=most_expensive)[:most]
    balances = [tuple(b - a for a, b in itertools.pairwise(ends)) for ends in best]
    return list(dict.fromkeys([tuple(pieces.balance(STAGES)), *balances]))


def with_all_stages(stages):
    """A few pipes that have every stage of all pipes."""
    left, chosen = set(itertools.chain(*stages.values())), []
    while left:
        chosen.append(max(stages, key=lambda how: len(left.intersection(stages[how]))))
        left.difference_update(stages[chosen[-1]])
    return chosen


def most_expensive_stage(name, fn, params, x, cuts, rounds):
    devices = jax.devices()[:STAGES]
    what = {"devices": devices, "checkpoint": "never", "chunks": 1}
    automatic = fpipe.split(fn, params, x)
    pieces = fpipe.split(fn, params, x, cuts=cuts)
    pipes = {
        "itself": fpipe.Pipe(automatic, **what),
        f"stages={STAGES}": fpipe.Pipe(
            fpipe.split(fn, params, x, stages=STAGES), **what
        ),
    }
    for by in ("flops", "time"):
        pipes[f'itself, balance="{by}"'] = fpipe.Pipe(
            automatic, balance=by, sample=x, **what
        )
    for balance in cuts_by_hand(pieces, params, x, most=5):
        pipes[f"by hand {list(balance)}"] = fpipe.Pipe(pieces, balance, **what)
    stages = {how: stage_contents(pipe, params, x) for how, pipe in pipes.items()}
    # What else the machine does only adds to a run. A stage counts with its shortest
    # time, and a stage that several cuts have is one stage: it has one time. The rounds
    # are told apart by halves too: what differs between them is noise.
    shortest = [{}, {}]
    measured = with_all_stages(stages)
    for n in range(2 * rounds):
        for how in measured:
            times = stage_seconds(pipes[how], params, x)
            half = shortest[n % 2]
            for stage, seconds in zip(stages[how], times, strict=True):
                half[stage] = min(seconds, half.get(stage, seconds))
    whole = {stage: min(half[stage] for half in shortest) for stage in shortest[0]}
    most = [
        {how: max(times[stage] for stage in stages[how]) for how in pipes}
        for times in (whole, *shortest)
    ]
    best = [min(v for how, v in times.items() if "hand" in how) for times in most]
    for how, pipe in pipes.items():
        ratios = [times[how] / least for times, least in zip(most, best, strict=True)]
        print(
            f"{name:6} {how:24} {list(pipe.balance)!s:16} {1e3 * most[0][how]:9.2f} "
            f"{ratios[0]:6.2f}   {ratios[1]:.2f} {ratios[2]:.2f}"
        )


# --- 3. programs and host time ---


def layers_by_hand(blocks):
    """The GPT as layers: the mask is a skip, the head borrows the embedding."""

    def embed(table, x, *, carry):
        return table[x["tokens"]], fpipe.stash(carry, "mask", x["mask"])

    def middle(p, h, *, carry):
        return block(p, h, fpipe.peek(carry, "mask")), carry

    def last(p, h, *, carry):
        mask, carry = fpipe.pop(carry, "mask")
        return block(p, h, mask), carry

    def head(p, h, *, borrowed):
        return h @ borrowed["embed"].T

    return [
        fpipe.Layer(embed, name="embed", stash=["mask"]),
        *[fpipe.Layer(middle, name="block", peek=["mask"])] * (blocks - 1),
        fpipe.Layer(last, name="block", pop=["mask"]),
        fpipe.Layer(head, name="head", borrow=["embed"]),
    ]


def masked_side(params, tokens, *, side):
    """The same function with its mask as a side input."""
    return gpt(params, {"tokens": tokens, "mask": side})


def host_time(repeats):
    blocks, width = 4, 4
    params = zeros(gpt_params(blocks, width, 8))
    x = zeros(gpt_batch(CHUNKS, 4))
    row = jax.tree.map(lambda a: a[:1], x)
    cuts = [f"h/{n}" for n in range(blocks)]
    split = functools.partial(fpipe.split, cuts=cuts)
    ends = [2, *[1] * (STAGES - 2)]
    # By hand the head is a layer of its own.
    by_hand = (params["embed"], *params["h"], ())
    side = {"side": x["mask"]}
    kinds = {
        "by hand": (layers_by_hand(blocks), [*ends, 2], by_hand, x, {}),
        "split": (split(gpt, params, row), [*ends, 1], params, x, {}),
        "split, mask in side": (
            split(masked_side, params, row["tokens"], side=row["mask"]),
            [*ends, 1],
            params,
            x["tokens"],
            side,
        ),
    }
    runs = {}
    for name, (layers, balance, own, batch, needs) in kinds.items():
        pipe = fpipe.Pipe(
            layers, balance, jax.devices()[:STAGES], CHUNKS, "always", "1f1b"
        )
        step = pipe.value_and_grad(lambda y: jnp.mean(y**2))
        placed = pipe.place(own)
        count = pipe.compile(
            placed, batch, loss_fn=lambda y: jnp.mean(y**2), progress=False, **needs
        )
        runs[name] = count, functools.partial(step, placed, batch, **needs), []
        jax.block_until_ready(runs[name][1]())
    for _ in range(repeats):
        for _, step, times in runs.values():
            # Of the calling thread, which hands over the programs.
            started = time.thread_time()
            jax.block_until_ready(step())
            times.append(time.thread_time() - started)
    first = statistics.median(runs["by hand"][2])
    for name, (count, _, times) in runs.items():
        median = statistics.median(times)
        action = 1e6 * median / (2 * STAGES * CHUNKS)
        print(f"{name:20} {count:8} {action:10.1f} {median / first:6.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=364, help="of the large GPT")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=4, help="of each half")
    tables = ("seconds", "stages", "host")
    models = small_models()
    parser.add_argument("--models", nargs="+", choices=models, default=list(models))
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    args = parser.parse_args()
    # Before anything asks for devices.
    jax.config.update("jax_num_cpu_devices", STAGES)
    # A stage that is measured again is compiled once.
    folder = tempfile.TemporaryDirectory()
    jax.config.update("jax_compilation_cache_dir", folder.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    print(f"jax {jax.__version__}, {jax.devices()[0].platform}")
    if "seconds" in args.tables:
        print("\nCPU seconds")
        print("blocks equations how       pieces    trace    split   choose  balance")
        for blocks in (args.blocks // 4, args.blocks):
            seconds_to_split(blocks)
    if "stages" in args.tables:
        print(f"\nS={STAGES}, milliseconds of the most expensive stage")
        print(
            "model  cut                      balance                 ms  ratio  halves"
        )
        for name in args.models:
            most_expensive_stage(name, *models[name], rounds=args.rounds)
    if "host" in args.tables:
        print(f"\nS={STAGES}, m={CHUNKS}")
        print("layers               programs  us/action  ratio")
        host_time(args.repeats)


if __name__ == "__main__":
    main()
