"""State that a loop over layers has stacked: cut by rounds, by rows, as parameters."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import fpipe
from fpipe._split.stacks import is_row_blocks
from tests.helpers import assert_same
from tests.split.models import Example, loss, plain, weights

W, LAYERS = 3, 4
EXECUTORS = ("placed", "scan")


class Block(nn.Module):
    """A layer with a batch norm, as `nn.scan` takes it."""

    train: bool

    @nn.compact
    def __call__(self, h, _):
        h = nn.Dense(W)(h)
        h = nn.BatchNorm(use_running_average=not self.train, momentum=0.9)(h)
        return nn.tanh(h), None


class Model(nn.Module):
    """A loop over layers that stacks their parameters and statistics."""

    @nn.compact
    def __call__(self, x, train=False):
        stack = nn.scan(
            Block,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        h, _ = stack(train)(nn.Dense(W)(x), None)
        return nn.Dense(2)(h)


def apply(params, x, *, state, train=False):
    variables = {"params": params, "batch_stats": state}
    y, new = Model().apply(variables, x, train, mutable=["batch_stats"])
    return y, new["batch_stats"]


@functools.cache
def example():
    x = weights(6, 4)
    made = Model().init(jax.random.key(0), x)
    state = jax.tree.map(lambda a: a + 0.5, made["batch_stats"])
    return Example(apply, made["params"], x, (), needs={"train": True}, state=state)


def owned_state(split):
    """The arrays, and rows of arrays, of the state that each piece has."""
    paths = split.cut.function.state_paths
    return [
        [rows.label(paths[rows.leaf].rpartition("/")[2]) for rows in own]
        for own in split.cut.wiring.state.owned
    ]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_loop_is_cut_between_rounds_that_write_state(executor):
    one = example()
    split = one.split()
    assert owned_state(split) == [
        [],
        *([f"mean[{r}]", f"var[{r}]"] for r in range(LAYERS)),
        [],
    ]
    assert not any(layer.borrow or layer.pop for layer in split.layers)
    pipe = fpipe.Pipe(
        split, devices=jax.devices()[:2], chunks=3, executor=executor, balance=(3, 3)
    )
    placed = pipe.place(one.params)
    step = jax.jit(jax.value_and_grad(lambda p: plain(one, p, 2), has_aux=True))
    (value, (_, state)), grads = step(one.params)
    train = pipe.value_and_grad(loss)
    (got, got_state), got_grads = train(placed, one.x, state=one.state, train=True)
    assert_same(got, value)
    assert_same(pipe.gather(got_grads), grads)
    assert_same(pipe.gather_state(got_state), state)
    # The next call takes it as it is.
    y, third = pipe(placed, one.x, state=got_state)
    want_y, _ = jax.jit(apply)(one.params, one.x, state=state)
    assert_same(jax.device_get(y), jax.device_get(want_y))
    assert_same(pipe.gather_state(third), state)
    if executor == "placed":
        mean = jax.tree.leaves(got_state, is_leaf=is_row_blocks)[0]
        first, second = pipe.devices
        where = [block.devices() for block in mean.blocks]
        assert where == [{first}, {first}, {second}, {second}]


# --- what functions do with it ---


def normed(h, p, old, train):
    """A layer, and the mean of what it normalises."""
    h = h @ p
    mean = jnp.mean(h, 0) if train else old
    return jnp.tanh(h - mean), mean


def in_the_loop(params, x, *, state, train=False, reverse=False):
    def body(h, layer):
        p, old = layer
        h, mean = normed(h, p, old, train)
        return h, 0.9 * old + 0.1 * mean

    return jax.lax.scan(body, x, (params, state), reverse=reverse)


def after_the_loop(params, x, *, state, train=False):
    def body(h, layer):
        p, old = layer
        return normed(h, p, old, train)

    h, means = jax.lax.scan(body, x, (params, state))
    return h, 0.9 * state + 0.1 * means


def written_alone(params, x, *, state, train=False):
    """Nothing reads what was there."""

    def body(h, p):
        return normed(h, p, None, True)

    return jax.lax.scan(body, x, params)


def read_as_a_whole(params, x, *, state, train=False):
    """By the last piece too, which is sent the rows of all others."""
    h, new = in_the_loop(params, x, state=state, train=train)
    return h * jnp.sum(state), new


@pytest.mark.parametrize(
    ("fn", "train"),
    [
        (in_the_loop, True),
        (in_the_loop, False),
        (functools.partial(in_the_loop, reverse=True), True),
        (after_the_loop, True),
        (written_alone, True),
        (read_as_a_whole, True),
    ],
)
def test_pieces_have_the_rows_of_their_rounds(fn, train):
    """Whichever of the two modes the function is split for."""
    one = Example(
        fn,
        weights(LAYERS, W, W),
        weights(4, W, seed=1),
        (),
        needs={"train": train},
        state=weights(LAYERS, W, seed=2),
    )
    split = one.split()
    assert [len(own) for own in split.cut.wiring.state.owned] == [1] * LAYERS
    assert_same(split.state_tree(split.state(one.state)).join(), one.state)
    reference = fpipe.sequential(split.layers, chunks=2)

    def of_pieces(params, train):
        needs = {"state": split.state(one.state), "train": train}
        y, states = reference(split.params(params), one.x, **needs)
        return loss(y), (y, split.state_tree(states).join())

    for mode in (True, False):
        here = dataclasses.replace(one, needs={"train": mode})
        of_function = functools.partial(plain, here, size=2)
        step = jax.value_and_grad(of_function, has_aux=True)
        step_of_pieces = jax.value_and_grad(of_pieces, has_aux=True)
        (_, want), want_grads = jax.jit(step)(one.params)
        (_, got), got_grads = jax.jit(step_of_pieces, static_argnums=1)(
            one.params, mode
        )
        assert_same(got, want)
        assert_same(got_grads, want_grads)


# --- caches ---


def decode(params, x, *, state):
    """Each layer adds up what it has seen: an entry for each row and layer."""

    def body(h, layer):
        p, seen = layer
        seen = seen + h @ p
        return jnp.tanh(h + seen), seen

    h, seen = jax.lax.scan(body, x, (params, jnp.moveaxis(state, 1, 0)))
    return h, jnp.moveaxis(seen, 0, 1)


def decode_by_numbers(params, x, *, state):
    """The same without a loop."""
    made, h = [], x
    for n, p in enumerate(params):
        made.append(state[:, n] + h @ p)
        h = jnp.tanh(h + made[-1])
    return h, jnp.stack(made, 1)


@pytest.mark.parametrize(
    ("executor", "fn"), [*zip(EXECUTORS, (decode, decode_by_numbers), strict=True)]
)
def test_a_cache_of_rows_may_be_stacked_after_the_rows(executor, fn):
    """Microbatches have their rows, and pieces the layers of their rounds."""
    params, x = weights(2, W, W), weights(5, W)
    cache = weights(5, 2, W, seed=1)
    layer = fpipe.Layer(fn, state_rows=True)
    split = fpipe.split(layer, params, x[:2], state=cache[:2])
    assert [[r.label("seen") for r in own] for own in split.cut.wiring.state.owned] == [
        ["seen[:, 0]"],
        ["seen[:, 1]"],
    ]
    pipe = fpipe.Pipe(split, devices=jax.devices()[:2], chunks=3, executor=executor)
    y, state = pipe(pipe.place(params), x, state=cache)
    assert state.shape == cache.shape
    assert_same((y, pipe.gather_state(state)), jax.jit(fn)(params, x, state=cache))
