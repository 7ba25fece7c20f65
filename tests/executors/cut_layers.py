"""Layers whose parameters are cut over a mesh, for both executors."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import fpipe
from tests.helpers import noise

WIDE = 8
COLUMNS, ROWS = P(None, "model"), P("model")


def gpt_block():
    """A transformer's block with Megatron's sharding: columns of what goes in, rows of
    what comes out of attention and of the perceptron.
    """

    def normalized(scale, x):
        centred = x - x.mean(-1, keepdims=True)
        return scale * centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)

    def apply(p, x):
        h = normalized(p["before"], x)
        q, k, v = (jnp.einsum("btd,dhk->bthk", h, p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k), axis=-1)
        mixed = jnp.einsum("bhts,bshk->bthk", weights, v)
        x = x + jnp.einsum("bthk,hkd->btd", mixed, p["out"])
        return x + jax.nn.relu(normalized(p["between"], x) @ p["up"]) @ p["down"]

    shapes = {"q": (WIDE, 4, 2), "k": (WIDE, 4, 2), "v": (WIDE, 4, 2)}
    shapes |= {"out": (4, 2, WIDE), "up": (WIDE, 2 * WIDE), "down": (2 * WIDE, WIDE)}

    def init(key, x):
        keys = jax.random.split(key, len(shapes))
        made = {
            name: noise(own, shape)
            for own, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        return made | {"before": jnp.ones(WIDE), "between": jnp.ones(WIDE)}

    spec = {**dict.fromkeys(["q", "k", "v", "up"], COLUMNS), "out": ROWS, "down": ROWS}
    spec |= {"before": None, "between": None}
    return fpipe.Layer(apply, init, name="block", spec=spec)


SHARDED = {"up": P(None, "data"), "down": P("data"), "bias": None}


def perceptron(params, x):
    return x + jnp.tanh(x @ params["up"] + params["bias"]) @ params["down"]


def init_perceptron(key, x):
    up, down = noise(key, (WIDE, 2 * WIDE)), noise(key, (2 * WIDE, WIDE))
    return {"up": up, "down": down, "bias": jnp.ones(2 * WIDE)}


FULLY_SHARDED = fpipe.Layer(perceptron, init_perceptron, name="mlp", spec=SHARDED)


def multiplied(w, x):
    return jnp.tanh(x @ w)
