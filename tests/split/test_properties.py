"""Random functions with random marks: their pieces compute what they compute."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fpipe
from tests.helpers import assert_same

WIDTH = 3
STEPS = (
    "dense",
    "tied",
    "mask",
    "drop",
    "loop",
    "integers",
    "aux",
    "penalty",
    "checkpoint",
    "branch",
    "own derivative",
    "side",
)


def random_function(seed):
    """A function of some steps, each on what any earlier one has made."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    count = rng.randint(2, 4)
    params = {
        f"l{n}": jnp.asarray(numbers.normal(size=(WIDTH, WIDTH)), "float32") / 2
        for n in range(count)
    }
    params |= {"table": jnp.ones((5, WIDTH)), "unused": jnp.ones(2)}
    steps = [
        (rng.choice(STEPS), rng.randrange(count), rng.randrange(9), rng.random() < 0.4)
        for _ in range(rng.randint(4, 8))
    ]

    def fn(params, x, *, key, side, train):
        h, ints = x["a"], x["ints"]
        made, aux = [h], []
        keys = jax.random.split(key, len(steps))
        for n, (step, layer, back, marked) in enumerate(steps):
            w, old = params[f"l{layer}"], made[back % len(made)]
            h = fpipe.cut(h) if marked else h
            match step:
                case "dense":
                    h = h + jnp.tanh(old @ w)
                case "tied":
                    h = h @ params["l0"] + params["table"][ints]
                case "mask":
                    h = jnp.where((ints > 1)[:, None], h, old)
                case "drop" if train:
                    h = jnp.where(jax.random.bernoulli(keys[n], 0.6, h.shape), h, 0.0)
                case "loop":
                    h = jax.lax.fori_loop(0, 2, lambda _, h, w=w: jnp.tanh(h @ w), h)
                case "integers":
                    ints = (ints + 1) % 5
                case "aux":
                    aux.append(jnp.sum(h, 1))
                case "penalty":
                    h = h * jnp.sum(w**2)
                case "checkpoint":
                    h = jax.checkpoint(lambda h, w=w: jnp.sin(h @ w))(h)
                case "branch":
                    positive = jnp.sum(h) > 0
                    h = jax.lax.cond(positive, lambda h: h * 2.0, lambda h: -h, h)
                case "own derivative":
                    h = jax.nn.relu(h) + old
                case "side":
                    h = h * side
            made.append(h)
        return {"h": h, "ints": ints, "aux": aux, "x": x["a"]}

    return fn, params


def loss(y):
    return sum(jnp.mean(v**2) for v in (y["h"], y["x"], *y["aux"]))


@pytest.mark.filterwarnings("ignore:`fpipe.split")
@pytest.mark.parametrize("seed", range(5))
def test_random_functions(seed):
    fn, params = random_function(seed)
    numbers = np.random.default_rng(seed)
    x = {
        "a": jnp.asarray(numbers.normal(size=(4, WIDTH)), "float32"),
        "ints": jnp.asarray(numbers.integers(0, 5, 4)),
    }
    side, key = jnp.linspace(1.0, 2.0, 4)[:, None], jax.random.key(seed)

    def rows(tree, i):
        return jax.tree.map(lambda a: a[2 * i : 2 * i + 2], tree)

    needs = {"side": rows(side, 0), "key": key, "train": True}
    split = fpipe.split(fn, params, rows(x, 0), **needs)
    reference = fpipe.sequential(split.layers, chunks=2)
    if not any("side" in (layer.needs or ()) for layer in split.layers):
        side = None

    def of_pieces(params):
        per_layer = split.params(params)
        y = reference(per_layer, x, side=side, key=key, train=True)
        return loss(y), y

    def of_function(params):
        pieces = []
        for i in range(2):
            own = jax.random.fold_in(jax.random.fold_in(key, 0), i)
            scale = None if side is None else rows(side, i)
            pieces.append(fn(params, rows(x, i), key=own, side=scale, train=True))
        y = jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)
        return loss(y), y

    got, want = (
        jax.jit(jax.value_and_grad(f, has_aux=True))(params)
        for f in (of_pieces, of_function)
    )
    assert_same(got, want)
