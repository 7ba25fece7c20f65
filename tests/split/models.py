"""Functions that are split, and the same computed microbatch by microbatch."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import fpipe
from tests.helpers import noise

WIDTH = 3


@dataclasses.dataclass(frozen=True)
class Example:
    """A function with its parameters and a batch of six rows.

    Attributes:
        paths: where it is cut by parameters.
        marks: how many marks it has.
        needs: what a call gives besides.
        state: what it begins with, if it has state.
    """

    fn: Callable[..., Any]
    params: Any
    x: Any
    paths: tuple[str, ...]
    marks: int = 1
    needs: dict[str, Any] = dataclasses.field(default_factory=dict)
    state: Any = None

    def split(self, **how: Any) -> fpipe.Split:
        """Cut, by an example of two rows."""
        x = rows(self.x, 0, 2)
        needs = dict(self.needs)
        if "side" in needs:
            needs["side"] = rows(needs["side"], 0, 2)
        if self.state is not None:
            needs["state"] = self.state
        with warnings.catch_warnings():
            # What nothing uses, and rows that read others, are what a test is about.
            warnings.filterwarnings("ignore", "`fpipe.split")
            return fpipe.split(self.fn, self.params, x, **needs, **how)


def rows(tree: Any, start: int, stop: int) -> Any:
    return jax.tree.map(lambda a: a[start:stop], tree)


def weights(*shape: int, seed: int = 0) -> Any:
    return noise(jax.random.key(seed), shape)


def loss(y: Any) -> Any:
    """The mean of the squares of all outputs of floats, which have the same rows."""
    floats = [a for a in jax.tree.leaves(y) if jnp.issubdtype(a.dtype, jnp.floating)]
    return sum(jnp.mean(a**2) for a in floats)


def plain(example: Example, params: Any, size: int) -> tuple[Any, Any]:
    """The loss and the outputs of the function itself, on microbatches of so many
    rows. With state the outputs are a pair with that after the last one.
    """
    state = example.state
    count = jax.tree.leaves(example.x)[0].shape[0]
    total, pieces = 0.0, []
    for i, start in enumerate(range(0, count, size)):
        stop = min(start + size, count)
        needs = dict(example.needs)
        if "key" in needs:
            needs["key"] = jax.random.fold_in(jax.random.fold_in(needs["key"], 0), i)
        if "side" in needs:
            needs["side"] = rows(needs["side"], start, stop)
        if state is None:
            y = example.fn(params, rows(example.x, start, stop), **needs)
        else:
            needs["state"] = jax.lax.stop_gradient(state)
            y, state = example.fn(params, rows(example.x, start, stop), **needs)
        pieces.append(y)
        total = total + loss(y) * ((stop - start) / count)
    y = jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)
    return total, y if state is None else (y, state)


def _residual_mlp(params, x):
    h = jnp.tanh(x @ params["in"])
    for n, block in enumerate(params["blocks"]):
        h = h + jnp.tanh(h @ block["w"] + block["b"])
        h = fpipe.cut(h) if n == 0 else h
    return h


def residual_mlp() -> Example:
    """Two blocks with a residual, a mark between them."""
    block = {"w": weights(WIDTH, WIDTH), "b": weights(WIDTH, seed=1)}
    params = {"in": weights(WIDTH, WIDTH, seed=2), "blocks": [block, block]}
    return Example(_residual_mlp, params, weights(6, WIDTH, seed=3), ("blocks/1",))


def _u_net(params, x):
    skips, h = [], x
    for w in params["down"]:
        h = jnp.tanh(h @ w)
        skips.append(h)

    @jax.jit
    def middle(h):
        return fpipe.cut(h * 0.5, "up")

    h = middle(h)
    for w, skip in zip(params["up"], reversed(skips), strict=True):
        h = jnp.tanh(jnp.concatenate([h, skip], 1) @ w)
        h = fpipe.cut(h)
    return h


def u_net() -> Example:
    """Two levels down and up, with a mark in a jitted function."""
    params = {
        "down": [weights(WIDTH, WIDTH, seed=n) for n in range(2)],
        "up": [weights(2 * WIDTH, WIDTH, seed=n) for n in range(2)],
    }
    return Example(
        _u_net, params, weights(6, WIDTH), ("down/1", "up/0", "up/1"), marks=3
    )


def _gpt(params, x, *, key=None, train=False):
    h = params["embed"][x["tokens"]]
    length = h.shape[1]
    seen = jnp.tril(jnp.ones((length, length), bool)) & x["mask"][:, None, :]
    bias = jnp.where(seen, 0.0, -1e9)
    keys = jax.random.split(jax.random.key(0) if key is None else key, 2)
    for n, block in enumerate(params["h"]):
        h = fpipe.cut(h, f"block {n}")
        q, k, v = jnp.split(h @ block["qkv"], 3, -1)
        a = jax.nn.softmax(q @ k.swapaxes(1, 2) + bias) @ v
        if train:
            a = jnp.where(noise(keys[n], a.shape) < 0.0, a, 0.0)
        h = h + a @ block["out"]
    return fpipe.cut(h) @ params["embed"].T


def gpt() -> Example:
    """Two blocks with a mask and dropout; the embedding is the head too."""
    block = {"qkv": weights(WIDTH, 3 * WIDTH), "out": weights(WIDTH, WIDTH)}
    params = {"embed": weights(5, WIDTH), "h": [block, block]}
    tokens = jnp.arange(24).reshape(6, 4) % 5
    x = {"tokens": tokens, "mask": tokens != 1}
    needs = {"key": jax.random.key(7), "train": True}
    return Example(_gpt, params, x, ("h/0", "h/1"), 3, needs)


def _two_inputs(params, x, *, side, step=2):
    a, b = x
    h = jnp.sin(a @ params["a"]) * side["scale"]
    penalty = jnp.sum(params["a"] ** 2)
    h = fpipe.cut({"h": h})["h"]
    out = jnp.cos(h @ params["b"]) + b * step
    aux = out[:, :1] * penalty + side["scale"]
    return {"out": out, "aux": aux, "rest": (b * 2.0,)}


def two_inputs() -> Example:
    """A tuple goes in, a dict comes out; side inputs, and a penalty on a weight."""
    params = {
        "a": weights(WIDTH, 4 * WIDTH),
        "b": weights(4 * WIDTH, WIDTH),
        "unused": weights(2),
    }
    x = (weights(6, WIDTH), weights(6, WIDTH, seed=1))
    side = {"scale": weights(6, 1)}
    return Example(_two_inputs, params, x, ("b",), 1, {"side": side})


def _scanned(params, x, *, key=None, train=False):
    scale = 1.0 + jnp.mean(x**2, 1, keepdims=True)
    keys = jax.random.split(jax.random.key(0) if key is None else key, 4)

    @jax.checkpoint
    def block(h, layer):
        a = jnp.tanh(h @ layer["w"] + layer["b"]) * scale
        if train:
            a = jnp.where(noise(layer["key"], a.shape) < 0.5, a, 0.0)
        h = fpipe.cut(h + a)
        return h, jnp.sum(h, 1)

    layers = params["blocks"] | {"key": keys}
    h, sums = jax.lax.scan(block, x @ params["in"], layers)
    return {"y": h @ params["out"], "sums": sums.T}


def scanned() -> Example:
    """A loop over four stacked blocks, each checkpointed, with a mark after each."""
    params = {
        "in": weights(WIDTH, WIDTH),
        "blocks": {"w": weights(4, WIDTH, WIDTH), "b": weights(4, WIDTH, seed=1)},
        "out": weights(WIDTH, WIDTH, seed=2),
    }
    needs = {"key": jax.random.key(7), "train": True}
    paths = ("blocks/2", "out")
    return Example(_scanned, params, weights(6, WIDTH, seed=3), paths, 4, needs)


def _batch_norm(params, x, *, state, key=None, train=False):
    h, new = x, {}
    for n, (name, p) in enumerate(sorted(params.items())):
        h = h @ p["w"]
        h = h if n else fpipe.cut(h)
        old = state[name]
        if train:
            mean, var = jnp.mean(h, 0), jnp.var(h, 0)
            new[name] = {
                "mean": 0.9 * old["mean"] + 0.1 * mean,
                "var": 0.9 * old["var"] + 0.1 * var,
            }
        else:
            mean, var = old["mean"], old["var"]
            new[name] = old
        h = (h - mean) * jax.lax.rsqrt(var + 0.1) * p["scale"]
        if key is not None:
            kept = jax.random.bernoulli(jax.random.fold_in(key, n), 0.7, h.shape)
            h = jnp.where(kept, h, 0.0)
        h = jnp.tanh(h)
    seen = state["seen"] + (1 if train else 0)
    return h, {**new, "seen": seen, "unused": state["unused"]}


def batch_norm() -> Example:
    """Two batch norms with dropout, a mark before the first one's statistics."""
    layer = {"w": weights(WIDTH, WIDTH), "scale": weights(WIDTH, seed=1)}
    statistics = {"mean": jnp.zeros(WIDTH), "var": jnp.ones(WIDTH)}
    state = {"a": statistics, "b": statistics}
    state |= {"seen": jnp.zeros((), jnp.int32), "unused": jnp.ones(2)}
    return Example(
        _batch_norm,
        {"a": layer, "b": layer},
        weights(6, WIDTH, seed=3),
        ("b",),
        needs={"key": jax.random.key(7), "train": True},
        state=state,
    )


def _stacked_norms(params, x, *, state, train=False):
    def layer(h, own):
        p, old = own
        h = h @ p["w"]
        mean = jnp.mean(h, 0) if train else old
        h = h + jnp.tanh((h - mean) * p["scale"])
        return h, 0.9 * old + 0.1 * mean if train else old

    return jax.lax.scan(layer, x, (params, state))


def stacked_norms() -> Example:
    """A loop over four stacked layers, each with a running mean in a stacked state."""
    params = {"w": weights(4, WIDTH, WIDTH), "scale": weights(4, WIDTH, seed=1)}
    return Example(
        _stacked_norms,
        params,
        weights(6, WIDTH, seed=3),
        ("w/2",),
        marks=3,
        needs={"train": True},
        state=weights(4, WIDTH, seed=2),
    )


def _encoder_decoder(params, x):
    bias = jnp.tanh(params["bias"])

    def attend(block, h, memory):
        scores = (h @ block["q"]) @ memory.swapaxes(1, 2) + bias
        return h + jax.nn.softmax(scores) @ memory @ block["v"]

    memory = params["embed"][x["source"]]
    for block in params["encoder"]:
        memory = attend(block, memory, memory)
        memory = fpipe.cut(memory)
    h = params["embed"][x["target"]]
    for block in params["decoder"]:
        h = attend(block, h, memory)
        h = fpipe.cut(h)
    return h @ params["embed"].T


def encoder_decoder() -> Example:
    """Two blocks each, with one bias of all of them; what the encoder gives goes to
    both blocks of the decoder.
    """
    block = {"q": weights(WIDTH, WIDTH), "v": weights(WIDTH, WIDTH, seed=1)}
    params = {
        "embed": weights(5, WIDTH),
        "bias": weights(4, 4, seed=2),
        "encoder": [block, block],
        "decoder": [block, block],
    }
    tokens = jnp.arange(24).reshape(6, 4)
    x = {"source": tokens % 5, "target": tokens % 3}
    return Example(_encoder_decoder, params, x, ("decoder/0", "decoder/1"), 4)


def _integers(params, x):
    """Tokens that are made of what was computed, and counted."""
    h, counts = params["embed"][x], jnp.zeros((x.shape[0], 5), jnp.int32)
    for w in params["rounds"]:
        h = fpipe.cut(h)
        scores = h @ w
        tokens = jnp.argmax(scores, -1)
        counts = counts + jax.nn.one_hot(tokens, 5, dtype=jnp.int32)
        chosen = jnp.take_along_axis(scores, tokens[:, None], 1)
        h = jnp.tanh(h) + params["embed"][tokens] * jax.nn.sigmoid(chosen)
    return {"h": h, "seen": counts > 1, "counts": counts}


def integers() -> Example:
    """Integers go from piece to piece beside floats."""
    params = {
        "embed": weights(5, WIDTH),
        "rounds": [weights(WIDTH, 5, seed=n) for n in range(3)],
    }
    return Example(_integers, params, jnp.arange(6) % 5, ("rounds/1",), 3)


EXAMPLES = {
    f.__name__: f
    for f in (
        residual_mlp,
        u_net,
        gpt,
        two_inputs,
        scanned,
        encoder_decoder,
        integers,
    )
}
