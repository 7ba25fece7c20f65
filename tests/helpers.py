"""Models, tables and comparisons that the tests share."""

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import beartype
import chex
import jax
import jax.monitoring
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Inexact

import fpipe

WIDTH = 4

shaped = jaxtyping.jaxtyped(typechecker=beartype.beartype)
"""Checks the types and the shapes that a function of the tests names.

For functions of a module: to wrap one takes longer than to trace it, so none is wrapped
each time that a layer is made.
"""

AnyArray: TypeAlias = Array | np.ndarray

HANG = 600
"""Seconds that only something that hangs takes, however busy the machine is."""


class counted:  # noqa: N801
    """Counts events of JAX while it is open, such as `"backend_compile"`."""

    def __init__(self, event: str) -> None:
        self.event, self.count = event, 0

    def __enter__(self) -> "counted":
        jax.monitoring.register_event_duration_secs_listener(self.listen)
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self.listen)

    def listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        self.count += self.event in event


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
@shaped
def noise(
    key, shape: tuple[int, ...], low: float = -1.0, high: float = 1.0
) -> Float[Array, "..."]:
    """Numbers from `low` to `high` by a hash. `jax.random.normal` compiles five times
    as long, for each shape and device.
    """
    seed = jax.random.key_data(key).sum(dtype=jnp.uint32)
    n = jnp.arange(1, 1 + np.prod(shape, dtype=int), dtype=jnp.uint32).reshape(
        shape
    ) + seed * np.uint32(0x9E3779B9)
    for shift in (16, 15):
        n = (n ^ (n >> shift)) * np.uint32(0x2C1B3C6D)
    unit = (n >> 8).astype(jax.dtypes.canonicalize_dtype(float)) / 2.0**24
    return low + (high - low) * unit


@shaped
def affine(
    x: Float[AnyArray, "*rows in"],
    w: Float[AnyArray, "in out"],
    b: Float[AnyArray, " out"],
) -> Float[AnyArray, "*rows out"]:
    return x @ w + b


@shaped
def scaled(
    x: Float[AnyArray, "*rows width"], by: Float[AnyArray, " width"]
) -> Float[AnyArray, "*rows width"]:
    """Rows times one number for each column."""
    return x * by


@shaped
def plus(
    x: Float[AnyArray, "*rows width"], y: Float[AnyArray, "*rows width"]
) -> Float[AnyArray, "*rows width"]:
    """Rows and as many others: neither is repeated for the other."""
    return x + y


def dense(width: int = WIDTH, activation: Callable[..., Any] = jnp.tanh) -> fpipe.Layer:
    def init(key, x):
        return {"w": noise(key, (x.shape[-1], width)), "b": jnp.full((width,), 0.1)}

    def apply(params, x):
        return activation(affine(x, params["w"], params["b"]))

    return fpipe.Layer(apply, init, name="dense")


def cast_weights(layer: fpipe.Layer) -> fpipe.Layer:
    """The same layer on float32 parameters, computed in bfloat16."""

    def apply(params, x):
        return layer.apply(
            jax.tree.map(lambda a: a.astype(jnp.bfloat16), params),
            x.astype(jnp.bfloat16),
        ).astype(x.dtype)

    return dataclasses.replace(layer, apply=apply)


def scale_init(key, x):
    del x
    return noise(key, (WIDTH,), 0.5)


def keep(name: str = "skip") -> fpipe.Layer:
    """Stash the input, pass on a product."""

    @fpipe.skippable(stash=[name])
    def stash(params, x, *, carry):
        return scaled(jnp.sin(x), params), fpipe.stash(carry, name, x)

    return dataclasses.replace(stash, init=scale_init)


def add(name: str = "skip") -> fpipe.Layer:
    """Pop a skip and add it."""

    @fpipe.skippable(pop=[name])
    def pop(params, x, *, carry):
        skip, carry = fpipe.pop(carry, name)
        return plus(scaled(x, params), skip), carry

    return dataclasses.replace(pop, init=scale_init)


def look(name: str = "skip") -> fpipe.Layer:
    """Peek at a skip and multiply with it."""

    @fpipe.skippable(peek=[name])
    def peek(params, x, *, carry):
        return plus(scaled(x, params), jnp.cos(fpipe.peek(carry, name))), carry

    return dataclasses.replace(peek, init=scale_init)


def dropout() -> fpipe.Layer:
    def apply(params, x, *, key):
        y = scaled(x, params)
        return y if key is None else jnp.where(noise(key, x.shape) < 0.4, y, 0)

    return fpipe.Layer(apply, scale_init, name="dropout")


def counter() -> fpipe.Layer:
    """A running mean: what comes out depends on the order of the microbatches."""

    def apply(params, x, *, state, train):
        mean = x.mean(0)
        y = scaled(x - state["mean"], params)
        return y, {
            "mean": 0.5 * (state["mean"] + mean),
            "count": state["count"] + 1,
        } if train else state

    def init_state(x):
        return {"mean": jnp.zeros(x.shape[-1], x.dtype), "count": jnp.int32(0)}

    def finish(state):
        return {**state, "mean": state["mean"] * 2}

    return fpipe.Layer(
        apply, scale_init, name="counter", init_state=init_state, finish=finish
    )


def split_layer() -> fpipe.Layer:
    """One array in, a pytree out: with an integer, a boolean, a key, a static leaf."""

    def apply(params, x):
        kind = jnp.argmax(x, -1)
        return {
            "a": scaled(x, params),
            "b": (x[:, :2] + 1, None),
            "kind": kind,
            "sign": x > 0,
            "tag": "left",
        }

    return fpipe.Layer(apply, scale_init, name="split")


def merge_layer() -> fpipe.Layer:
    def apply(params, x):
        assert x["tag"] == "left"
        y = jnp.where(x["sign"], x["a"], 0.1 * x["a"]) + x["b"][0].sum(
            -1, keepdims=True
        )
        return plus(scaled(y, params), jax.nn.one_hot(x["kind"], WIDTH, dtype=y.dtype))

    return fpipe.Layer(apply, scale_init, name="merge")


def sided() -> fpipe.Layer:
    def apply(params, x, *, side):
        return plus(scaled(x, params), side)

    return fpipe.Layer(apply, scale_init, name="sided")


def owner() -> fpipe.Layer:
    return dataclasses.replace(dense(), name="embed")


def borrower() -> fpipe.Layer:
    def apply(params, x, *, borrowed):
        return scaled(x, params) @ borrowed["embed"]["w"].T

    return fpipe.Layer(apply, scale_init, name="head", borrow=("embed",))


def bare() -> fpipe.Layer:
    """A layer whose parameters are `None`: the first columns, squeezed."""

    def apply(params, x):
        assert params is None
        return jnp.tanh(x[:, :WIDTH])

    return fpipe.Layer(apply, lambda key, x: None, name="bare")


def cached() -> fpipe.Layer:
    """State of rows: what each row was given last, another array for each row."""

    def apply(params, x, *, state):
        y = plus(scaled(x, params), jnp.sin(state["last"]))
        return y, {"last": x, "seen": state["seen"] + 1}

    def init_state(x):
        last = noise(jax.random.key(5), x.shape).astype(x.dtype)
        return {"last": last, "seen": jnp.arange(x.shape[0], dtype=jnp.int32)}

    return fpipe.Layer(
        apply, scale_init, name="cached", init_state=init_state, state_rows=True
    )


def sharded(
    layers: list[fpipe.Layer], axes: Iterable[str] = ("data", "model")
) -> list[fpipe.Layer]:
    """The same model with its parameters sharded over some axes of 2 devices: over
    those of the model by columns and by rows in turn, over those of data where it is by
    columns, and a scale over both.
    """
    data = "data" if "data" in axes else None
    model = "model" if "model" in axes else None
    both = tuple(axis for axis in (data, model) if axis is not None)

    def spec_of(n, layer):
        if layer.name == "bare":
            return None
        if layer.name not in ("dense", "embed"):
            return P(both) if n % 2 else P(model)
        columns = {"w": P(data, model), "b": P(model)}
        return {"w": P(model), "b": None} if n % 2 else columns

    return [
        dataclasses.replace(layer, spec=spec_of(n, layer))
        for n, layer in enumerate(layers)
    ]


def turned(layers: list[fpipe.Layer]) -> list[fpipe.Layer]:
    """The same model with its rows on the last axis, of what goes in and comes out."""
    first, last = layers[0], layers[-1]

    def enter(params, x, **needs):
        return first.apply(params, x.T, **needs)

    def leave(params, x, **needs):
        returned = last.apply(params, x, **needs)
        if {"carry", "state"}.isdisjoint(last.needs or ()):
            return fpipe.Chunk(returned.T, axis=1)
        y, *others = returned
        return fpipe.Chunk(y.T, axis=1), *others

    def of_turned(f):
        return f and (lambda *args: f(*args[:-1], args[-1].T))

    return [
        dataclasses.replace(
            first,
            apply=enter,
            init=of_turned(first.init),
            init_state=of_turned(first.init_state),
        ),
        *layers[1:-1],
        dataclasses.replace(last, apply=leave),
    ]


def models() -> dict[str, list[fpipe.Layer]]:
    """Every kind of model, four layers at least, so that each can be cut into four
    stages.
    """
    one, two = fpipe.Namespace(), fpipe.Namespace()
    return {
        "plain": [dense(), dense(6), dense(), dense()],
        "branched": [dense(), split_layer(), merge_layer(), dense()],
        "nested": [
            keep().isolate(one),
            keep().isolate(two),
            dense(),
            add().isolate(two),
            add().isolate(one),
        ],
        "jump1": [dense(), keep(), add(), dense()],
        "jump2": [keep(), dense(), add(), dense()],
        "jump3": [keep(), look(), dense(), add()],
        "dropout": [dense(), dropout(), dense(), dropout()],
        "stateful": [counter(), dense(), counter(), dropout()],
        "sided": [dense(), sided(), dense(), sided()],
        "tied": [owner(), dense(), dense(), borrower()],
    }


@shaped
def mse(
    y: Inexact[AnyArray, "*shape"], t: Inexact[AnyArray, "*shape"]
) -> Float[Array, ""]:
    """The mean over all numbers. A target of another shape would be repeated."""
    return jnp.mean((y - t) ** 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with everything that a call of it needs."""

    layers: list[fpipe.Layer]
    chunks: int
    rows: int = 10
    dtype: Any = jnp.float32
    # "cut" by rows; "turned": rows on the last axis, of all but `side`; or "ready"-made
    inputs: str = "cut"

    def given(self, seed, turned: bool = True) -> Any:
        """An input of the call."""
        array = noise(jax.random.key(seed), (self.rows, WIDTH), -2.0, 2.0)
        array = array.astype(self.dtype)
        if self.inputs == "turned" and turned:
            return fpipe.Chunk(array.T, axis=-1)
        if self.inputs != "ready":
            return array
        size = -(-self.rows // self.chunks)
        pieces = [array[n : n + size] for n in range(0, self.rows, size)]
        pieces.insert(1, pieces.pop())  # the smaller one, if any, is not the last
        return fpipe.Microbatches(pieces)

    @property
    def x(self) -> Any:
        return self.given(1)

    @property
    def target(self) -> Any:
        return self.given(2)

    @property
    def reference(self):
        return fpipe.sequential(self.layers, chunks=self.chunks)

    def params(self):
        return self._params

    @functools.cached_property
    def _params(self):
        inputs = [
            jax.tree.map(lambda a: jnp.zeros(a.shape), tree)
            for tree in (self.x, self.side)
        ]  # made in float32
        made = self.reference.init(jax.random.key(0), *inputs)
        return jax.tree.map(lambda a: a.astype(self.dtype), made)

    @property
    def side(self):
        needed = any(layer.asks("side") for layer in self.layers)
        return self.given(3, turned=False) if needed else None

    @property
    def needs(self) -> dict[str, Any]:
        state = any(layer.asks("state") for layer in self.layers)
        return {
            "key": jax.random.key(4),
            "train": True,
            "side": self.side,
            "state": self.reference.init_state(
                self.x, side=self.side, params=self.params()
            )
            if state
            else None,
        }


def in_turn(*columns: Iterable[Any]) -> list[Any]:
    """Rows of a product for `parametrize`: those in which every value of each column
    occurs, beside the values of the others in turn. `-m full` runs all rows.
    """
    numbers = [range(len(list(column))) for column in columns]
    most = max(map(len, numbers))
    once = {tuple(row[n % len(row)] for row in numbers) for n in range(most)}
    rows = zip(itertools.product(*numbers), itertools.product(*columns), strict=True)
    return [
        pytest.param(*row, marks=() if which in once else pytest.mark.full)
        for which, row in rows
    ]


def eventually(condition: Callable[[], bool]) -> bool:
    """Wait until a condition holds; `False` if it never does."""
    until = time.monotonic() + HANG
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return True


class Clock:
    """A clock that only sleeping moves, in place of `time.perf_counter`."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@contextlib.contextmanager
def raises(kind, text):
    """Exactly that type and that message; `match` would search in the notes too."""
    with pytest.raises(kind) as error:
        yield error
    assert type(error.value) is kind
    assert str(error.value) == text


def assert_same(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """The invariant: structure, shape and dtype equal, and `max|a-b| <= tolerance *
    max|b|` per leaf.
    """
    chex.assert_trees_all_equal_structs(got, want)
    for (path, a), (_, b) in zip(
        jax.tree_util.tree_leaves_with_path(got),
        jax.tree_util.tree_leaves_with_path(want),
        strict=True,
    ):
        where = jax.tree_util.keystr(path)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), (
            where,
            a.shape,
            a.dtype,
            b.shape,
            b.dtype,
        )
        if a.dtype == jax.dtypes.float0:
            continue
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all(), where
        limit = tolerance * np.abs(b).max(initial=0)
        assert np.abs(a - b).max(initial=0) <= limit, (
            where,
            np.abs(a - b).max(),
            limit,
        )
