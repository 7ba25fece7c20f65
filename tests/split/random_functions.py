"""Random functions, and whether a pipe computes what they compute.

A function is drawn as a list of steps, each on what any earlier one has made:

    Step(kind="dense", layer=1, back=3, marked=True)

`check(seed)` draws a function, cuts, and options of a pipe, and compares. By hand, over
many seeds:

    python -m tests.split.random_functions 0 200
"""

import dataclasses
import functools
import random
import sys
import traceback
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import fpipe
from fpipe._split.stacks import joined
from tests.helpers import assert_same
from tests.split.models import rows

WIDTH = 3
KINDS = (
    "attention",
    "aux",
    "branch",
    "cast weights",
    "checkpoint",
    "counts",
    "dense",
    "derived key",
    "dict",
    "drop",
    "integers",
    "jit",
    "long skip",
    "loop",
    "mask",
    "norm",
    "numbers of rows",
    "own derivative",
    "own gradient",
    "own tangent",
    "penalty",
    "positions",
    "scan",
    "side",
    "sort",
    "stack",
    "step",
    "stopped",
    "table",
    "tied",
    "while",
)


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a function.

    Attributes:
        layer: the number of the weight that it uses.
        back: how far back the other value is that it reads.
        marked: whether a mark stands before it.
    """

    kind: str
    layer: int
    back: int
    marked: bool


@jax.custom_vjp
def _clipped(h):
    return h * 1.5


_clipped.defvjp(lambda h: (h * 1.5, h), lambda h, g: (jnp.clip(g * h, -1.0, 1.0),))


@jax.custom_jvp
def _softened(h):
    return jnp.abs(h)


@_softened.defjvp
def _(primals, tangents):
    (h,), (t,) = primals, tangents
    return jnp.abs(h), jnp.tanh(h) * t


@dataclasses.dataclass(frozen=True)
class RandomFunction:
    """A function of some steps; `params` and `x` are drawn with it."""

    steps: tuple[Step, ...]

    def __call__(self, params, x, *, key, side, step, train):
        h, ints = x["a"], x["more"][0]
        carry = {"key": key, "ints": ints, "aux": []}
        made = [h]
        for n, drawn in enumerate(self.steps):
            if drawn.marked:
                # A pytree, in which the integers come first.
                h = fpipe.cut({"ints": carry["ints"], "z": h}, f"mark {n}")["z"]
            old = made[drawn.back % len(made)]
            h = _apply(drawn, n, params, h, old, carry, (x, side, step, train))
            made.append(h)
        first = made[len(made) // 2]
        mean = jnp.mean(h**2)
        return {
            "h": h,
            "some": (first * 0.5, carry["ints"], h > 0),
            "aux": carry["aux"],
            "mean": mean,
            "x": x["a"],
            "name": "static",
        }


def _apply(drawn, n, params, h, old, carry, given):
    x, side, step, train = given
    w, b = (params["layers"][drawn.layer][k] for k in "wb")
    ints = carry["ints"]
    match drawn.kind:
        case "dense":
            return h + jnp.tanh(old @ w + b)
        case "attention":
            q, k = (h @ w)[:, :, None], old[:, None, :]
            return jnp.squeeze(jax.nn.softmax(q @ k, -1) @ h[:, :, None], -1)
        case "aux":
            carry["aux"].append(jnp.sum(old, 1))
            return h
        case "branch":
            # By a number of the parameters, and by one of the step.
            yes = (jnp.sum(w) > 0) & (step >= 0)
            return jax.lax.cond(yes, lambda h: h * 2.0, lambda h: h @ w, h)
        case "cast weights":
            half = w.astype(jnp.bfloat16).astype(w.dtype)
            return jnp.sin(h @ half) + old
        case "checkpoint":
            return jax.checkpoint(lambda h: jnp.sin(jnp.cos(h @ w)))(h) + old
        case "counts":
            carry["ints"] = jnp.sum(old > 0, 1).astype(ints.dtype) + ints
            return h * ints[:, None].astype(h.dtype)
        case "derived key" if carry["key"] is not None and train:
            carry["key"], own = jax.random.split(carry["key"])
            return h + jax.random.uniform(own, h.shape, h.dtype)
        case "dict":
            parts = {"one": h, "two": (old, ints > 1)}
            parts = jax.tree.map(lambda a: a[::1], parts)
            return jnp.where(parts["two"][1][:, None], parts["one"], parts["two"][0])
        case "drop" if carry["key"] is not None and train:
            own = jax.random.fold_in(carry["key"], n)
            kept = jax.random.bernoulli(own, 0.6, h.shape)
            return jnp.where(kept, h / 0.6, 0.0)
        case "integers":
            carry["ints"] = (ints + 1 + x["more"][0]) % 5
            return h
        case "jit":

            @jax.jit
            def inner(h, old):
                h = fpipe.cut(h + old) if drawn.marked else h + old
                return jax.jit(jnp.tanh)(h @ w)

            return inner(h, old)
        case "long skip":
            return (h + x["a"]) / 2.0
        case "loop":
            return jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ w), h)
        case "mask":
            return jnp.where((ints > 1)[:, None] & (old > -0.5), h, old)
        case "norm":
            h = h - jnp.mean(h, 1, keepdims=True)
            return h / jnp.sqrt(jnp.mean(h**2, 1, keepdims=True) + 0.1) * b
        case "numbers of rows":
            return h * jnp.linspace(1.0, 2.0, h.shape[0], dtype=h.dtype)[:, None]
        case "own derivative":
            return jax.nn.relu(h) + old
        case "own gradient":
            return _clipped(h @ w) + old
        case "own tangent":
            return _softened(h) + jax.nn.silu(old)
        case "penalty":
            return h * jnp.tanh(jnp.sum(w**2)) + b
        case "positions":
            places = jnp.arange(WIDTH, dtype=h.dtype)
            return h + jnp.sin(places) * jnp.eye(WIDTH, dtype=h.dtype)[0]
        case "scan":
            stack = params["stack"]
            match drawn.back % 4:
                case 1:
                    stack = jax.tree.map(lambda a: a[::-1], stack)
                case 2:
                    # As if they were stacked on another axis.
                    turned = stack["w"].swapaxes(0, 1)
                    stack = {"w": jnp.moveaxis(turned * 0.5, 1, 0), "b": stack["b"]}
                case 3:

                    def counted(i, h):
                        return jnp.tanh(h @ stack["w"][i] + stack["b"][i])

                    return jax.lax.fori_loop(0, 3, counted, h)

            def round_of(h, one):
                own, bias = one
                h = jnp.tanh(h @ own + bias)
                return h, jnp.sum(h, 1)

            h, sums = jax.lax.scan(round_of, h, (stack["w"], stack["b"]))
            carry["aux"].append(sums.T)
            return h
        case "side":
            return h * side["scale"] + side["more"]
        case "sort":
            return jnp.sort(h, 1) + jnp.argsort(old, 1).astype(h.dtype) * 0.1
        case "stack":
            both = jnp.stack([h, old])
            return jax.vmap(lambda a: jnp.tanh(a @ w))(both).sum(0)
        case "step":
            return h / (1.0 + step.astype(h.dtype))
        case "stopped":
            return h + jax.lax.stop_gradient(old)
        case "table":
            return h + params["table"][ints % 5]
        case "tied":
            return h @ params["layers"][0]["w"].T
        case "while":
            _, h = jax.lax.stop_gradient(
                jax.lax.while_loop(
                    lambda at: at[0] < 2, lambda at: (at[0] + 1, at[1] @ w), (0, h)
                )
            )
            return h + old
    return jnp.tanh(h) + old


@dataclasses.dataclass(frozen=True)
class Case:
    """A function with what it is called with, and how it is cut and run."""

    fn: RandomFunction
    params: Any
    x: Any
    needs: dict[str, Any]
    how: dict[str, Any]
    options: dict[str, Any]


def draw(seed: int, executor: str | None = None) -> Case:
    """Draw a case; its batch has six rows or five in microbatches of two."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(numbers.normal(size=shape) / 2)

    count = rng.randint(1, 3)
    params = {
        "layers": [{"w": array(WIDTH, WIDTH), "b": array(WIDTH)} for _ in range(count)],
        "stack": {"w": array(3, WIDTH, WIDTH), "b": array(3, WIDTH)},
        "table": array(5, WIDTH),
    }
    steps = tuple(
        Step(
            rng.choice(KINDS), rng.randrange(count), rng.randrange(9), rng.random() < p
        )
        for p in [rng.choice([0.0, 0.3, 0.6])]
        for _ in range(rng.randint(3, 9))
    )
    size = rng.choice([5, 6])
    x = {"a": array(size, WIDTH), "more": (jnp.asarray(numbers.integers(0, 5, size)),)}
    needs = {
        "side": {"scale": array(size, 1), "more": fpipe.NoChunk(array(WIDTH))},
        "key": jax.random.key(seed),
        "step": jnp.asarray(2, jnp.int32),
        "train": rng.random() < 0.8,
    }
    how: dict[str, Any] = rng.choice([{}, {}, {"stages": 2}, {"cuts": None}])
    if how == {"cuts": None}:
        paths = [*(f"layers/{n}" for n in range(count)), "table", "stack"]
        how = {"cuts": rng.sample(paths, rng.randint(1, len(paths)))}
    options: dict[str, Any] = {
        "executor": executor or rng.choice(["placed", "scan"]),
        "schedule": rng.choice(["eager_1f1b", "gpipe", "1f1b", "zb_h1"]),
        "checkpoint": rng.choice(["except_last", "never", "always"]),
    }
    return Case(RandomFunction(steps), params, x, needs, how, options)


def split_of(case: Case) -> fpipe.Split | None:
    """The function cut; `None` if it cannot be cut like this."""
    needs = dict(case.needs)
    needs["side"] = needs["side"] | {"scale": rows(needs["side"]["scale"], 0, 2)}
    how = dict(case.how)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`fpipe.split")
        while True:
            x = rows(case.x, 0, 2)
            try:
                return fpipe.split(case.fn, case.params, x, **needs, **how)
            except ValueError as error:
                # Not all parameters are used, and few places are there at times.
                if "no parameter with that path is used" in str(error):
                    path = str(error).partition("cuts=['")[2].partition("'")[0]
                    how["cuts"] = [other for other in how["cuts"] if other != path]
                elif " to cut at, " in str(error):
                    how = {}
                else:
                    raise


def loss(y: Any) -> Any:
    """A mean over rows of all that has gradients."""
    parts = (y["h"], y["some"][0], *y["aux"], y["x"])
    return sum(jnp.mean(jnp.tanh(a)) for a in parts) + y["mean"]


def of_function(case: Case) -> Any:
    """Loss, outputs and gradients of the function itself, by microbatches."""

    def run(params):
        total, outputs = 0.0, []
        size = case.x["a"].shape[0]
        for i, start in enumerate(range(0, size, 2)):
            stop = min(start + 2, size)
            side = case.needs["side"]
            side = {
                "scale": rows(side["scale"], start, stop),
                "more": side["more"].value,
            }
            key = jax.random.fold_in(jax.random.fold_in(case.needs["key"], 0), i)
            needs = case.needs | {"side": side, "key": key}
            y = case.fn(params, rows(case.x, start, stop), **needs)
            total += loss(y) * ((stop - start) / size)
            del y["name"]
            outputs.append(y)
        return total, jax.tree.map(
            lambda *a: jnp.concatenate(a) if a[0].ndim else jnp.stack(a), *outputs
        )

    (value, y), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(case.params)
    return value, y, grads


def of_pieces(case: Case, split: fpipe.Split) -> Any:
    """The same of the pieces, run one after the other."""
    reference = fpipe.sequential(split.layers, chunks=3)
    needs = asked(case, split)

    def run(per_layer):
        y = reference(per_layer, case.x, **needs)
        value, grads = reference.value_and_grad(loss)(per_layer, case.x, **needs)
        del y["name"]
        return value, y, grads

    value, y, grads = jax.jit(run)(split.params(case.params))
    return value, y, joined(split.tree(grads))


def of_pipe(case: Case, split: fpipe.Split, axis: str | None = None) -> Any:
    """The same of a pipe on two devices, or on two meshes with an axis."""
    places: dict[str, Any] = {"devices": jax.devices()[: min(2, len(split))]}
    if axis is not None:
        four = np.array(jax.devices()[:4]).reshape(2, 2)
        places = {"mesh": Mesh(four, ("stage", axis))}
    pipe = fpipe.Pipe(split, chunks=3, **places, **case.options)
    placed, needs = pipe.place(case.params), asked(case, split)
    value, grads = pipe.value_and_grad(loss)(placed, case.x, **needs)
    y = pipe(placed, case.x, **needs)
    del y["name"]
    return value, jax.device_get(y), pipe.gather(grads)


def asked(case: Case, split: fpipe.Split) -> dict[str, Any]:
    """What a call gives: side inputs that no layer asks for are refused."""
    needs = dict(case.needs)
    if not any(layer.asks("side") for layer in split):
        del needs["side"]
    return needs


def check(seed: int, run: Any = of_pipe, executor: str | None = None) -> None:
    """Compare in 64 bits, where rounding is no matter."""
    with jax.enable_x64(True):
        case = draw(seed, executor)
        split = split_of(case)
        assert split is not None
        got, want = run(case, split), of_function(case)
        assert_same(jax.device_get(got), jax.device_get(want), 1e-9)


if __name__ == "__main__":
    start, stop = map(int, sys.argv[1:3])
    warnings.simplefilter("ignore")
    runs = {
        "pieces": functools.partial(check, run=of_pieces),
        "placed": functools.partial(check, executor="placed"),
        "scan": functools.partial(check, executor="scan"),
    }
    for seed in range(start, stop):
        for name, run in runs.items():
            try:
                run(seed)
            except Exception as error:
                print(f"seed {seed}, {name}: {type(error).__name__}: {error}")
                traceback.print_exc(limit=-4)
        print(seed, end=" ", flush=True)
        jax.clear_caches()
