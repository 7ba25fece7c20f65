"""Models, tables and comparisons that the tests share."""

import contextlib
import dataclasses
import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import beartype
import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jaxtyping import Array, Float

import fpipe
from fpipe._executors.placed.compile import compile_plan
from fpipe._executors.placed.dispatch import ReadyPlan
from fpipe._executors.placed.executor import Placed
from fpipe._executors.placed.instructions import Run
from fpipe._executors.placed.threads import Crew
from fpipe._executors.scan.executor import Scan

WIDTH = 4

shaped = jaxtyping.jaxtyped(typechecker=beartype.beartype)
"""Checks the types and the shapes that a function of the tests names."""

HANG = 600
"""Seconds that only something that hangs takes, however busy the machine is."""


def placed_executor(pipe: fpipe.Pipe) -> Placed:
    """The placed executor of a pipe, for tests of its own room."""
    assert isinstance(pipe._executor, Placed)
    return pipe._executor


def scan_executor(pipe: fpipe.Pipe) -> Scan:
    """The scan executor of a pipe, for tests of its own room."""
    assert isinstance(pipe._executor, Scan)
    return pipe._executor


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


def dense(width: int = WIDTH, activation: Callable[..., Any] = jnp.tanh) -> fpipe.Layer:
    def init(key, x):
        return {"w": noise(key, (x.shape[-1], width)), "b": jnp.full((width,), 0.1)}

    @shaped
    def apply(params, x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
        return activation(x @ params["w"] + params["b"])

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
        return jnp.sin(x) * params, fpipe.stash(carry, name, x)

    return dataclasses.replace(stash, init=scale_init)


def add(name: str = "skip") -> fpipe.Layer:
    """Pop a skip and add it."""

    @fpipe.skippable(pop=[name])
    def pop(params, x, *, carry):
        skip, carry = fpipe.pop(carry, name)
        return x * params + skip, carry

    return dataclasses.replace(pop, init=scale_init)


def look(name: str = "skip") -> fpipe.Layer:
    """Peek at a skip and multiply with it."""

    @fpipe.skippable(peek=[name])
    def peek(params, x, *, carry):
        return x * params + jnp.cos(fpipe.peek(carry, name)), carry

    return dataclasses.replace(peek, init=scale_init)


def dropout() -> fpipe.Layer:
    def apply(params, x, *, key):
        y = x * params
        return y if key is None else jnp.where(noise(key, x.shape) < 0.4, y, 0)

    return fpipe.Layer(apply, scale_init, name="dropout")


def counter() -> fpipe.Layer:
    """A running mean: what comes out depends on the order of the microbatches."""

    def apply(params, x, *, state, train):
        mean = x.mean(0)
        y = (x - state["mean"]) * params
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
            "a": x * params,
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
        return y * params + jax.nn.one_hot(x["kind"], WIDTH, dtype=y.dtype)

    return fpipe.Layer(apply, scale_init, name="merge")


def sided() -> fpipe.Layer:
    def apply(params, x, *, side):
        return x * params + side

    return fpipe.Layer(apply, scale_init, name="sided")


def owner() -> fpipe.Layer:
    return dataclasses.replace(dense(), name="embed")


def borrower() -> fpipe.Layer:
    def apply(params, x, *, borrowed):
        return (x * params) @ borrowed["embed"]["w"].T

    return fpipe.Layer(apply, scale_init, name="head", borrow=("embed",))


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


def mse(y, t):
    return jnp.mean((y - t) ** 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with everything that a call of it needs."""

    layers: list[fpipe.Layer]
    chunks: int
    rows: int = 10
    dtype: Any = jnp.float32
    ready: bool = False  # its microbatches are ready-made

    def given(self, seed) -> Any:
        """An input of the call."""
        array = noise(jax.random.key(seed), (self.rows, WIDTH), -2.0, 2.0)
        array = array.astype(self.dtype)
        if not self.ready:
            return array
        size = -(-self.rows // self.chunks)
        starts = range(0, self.rows, size)
        return fpipe.Microbatches([array[n : n + size] for n in starts])

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
        inputs = [
            jax.tree.map(lambda a: jnp.zeros(a.shape), tree)
            for tree in (self.x, self.side)
        ]  # made in float32
        made = self.reference.init(jax.random.key(0), *inputs)
        return jax.tree.map(lambda a: a.astype(self.dtype), made)

    @property
    def side(self):
        needed = any(layer.asks("side") for layer in self.layers)
        return self.given(3) if needed else None

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


@contextlib.contextmanager
def observing(look: Callable[[Any, list[Any]], None]) -> Iterator[None]:
    """Call `look(instruction, slots)` after each step that placed pipes issue
    meanwhile, with the slots of the thread that issues it; one call at a time.
    """
    one_at_a_time = threading.Lock()
    issue_all, issue_in_thread = ReadyPlan.issue, Crew.issue

    def observed(plan, shares, slots):
        if plan.threaded:
            issue_all(plan, shares, slots)
            return
        for share in shares:
            for step in share.steps:
                issue_all(plan, [share._replace(steps=(step,))], slots)
                look(step.item, slots)

    def observed_in_thread(crew, step, slots):
        issue_in_thread(crew, step, slots)
        with one_at_a_time:
            look(step.item, slots)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReadyPlan, "issue", observed)
        patch.setattr(Crew, "issue", observed_in_thread)
        yield


def products(
    layers: Any,
    checkpoint: Any,
    schedule: Any = "gpipe",
    balance: Any = None,
    chunks: int = 4,
    wrt: Any = 0,
    width: int = 8,
) -> Counter[tuple[str, int]]:
    """Matrix products of a training step by (kind, stage), in the compiled programs
    that it runs.
    """
    balance = [1] * len(layers) if balance is None else balance
    pipe = fpipe.Pipe(
        layers, balance, chunks=chunks, checkpoint=checkpoint, schedule=schedule
    )
    x = jnp.ones((2 * chunks, width))
    params = pipe.init(jax.random.key(0), x)
    pipe.compile(params, x, loss_fn=lambda y: jnp.mean(y**2), argnums=wrt)
    bound = placed_executor(pipe)._plans.values()[0]
    counts: Counter[tuple[str, int]] = Counter()
    for n, program in compile_plan(bound.plan, bound.shapes).items():
        item = bound.plan.instructions[n]
        assert isinstance(item, Run)
        if item.action is not None:
            counts[item.action.kind, item.action.stage] += program.as_text().count(
                " dot("
            )
    return counts
