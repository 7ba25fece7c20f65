"""Functions with state: which piece has it, and that pipes hand it on as the function
does, microbatch by microbatch.
"""

import dataclasses
import pickle
import random
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fpipe
from fpipe.testing import assert_equals_sequential
from tests.helpers import assert_same
from tests.split.models import Example, batch_norm, loss, plain, rows, weights

EXECUTORS = ("placed", "scan")


def pipe_of(split, executor, **options):
    options = {"chunks": 3, "devices": jax.devices()[:2]} | options
    return fpipe.Pipe(split, executor=executor, **options)


def owners(split):
    """The piece that has each array of the state, by its path."""
    pairs = zip(split.cut.function.state_paths, split.cut.state_owners, strict=True)
    return dict(pairs)


def trained(example):
    """What a training step of the function itself gives."""
    step = jax.jit(jax.value_and_grad(lambda p: plain(example, p, 2), has_aux=True))
    (value, (_, state)), grads = step(example.params)
    return value, state, grads


def evaluated(example):
    """The outputs of the function itself, evaluated on the whole batch."""
    return jax.jit(example.fn)(example.params, example.x, state=example.state)[0]


@pytest.mark.quick(cases=1)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_pipe_hands_state_on_as_the_function_does(executor):
    """Trained with dropout on five rows, the last microbatch smaller; then evaluated
    with what came out.
    """
    example = batch_norm()
    pipe = pipe_of(example.split(), executor)
    placed = pipe.place(example.params)
    odd = dataclasses.replace(example, x=rows(example.x, 0, 5))
    value, state, grads = trained(odd)
    step = pipe.value_and_grad(loss)
    (got, got_state), got_grads = step(
        placed, odd.x, state=example.state, **example.needs
    )
    assert_same(got, value)
    assert_same(jax.device_get(got_state), jax.device_get(state))
    assert_same(pipe.gather(got_grads), grads)
    # With the state of a call, as it is placed.
    got_y, third = pipe(placed, odd.x, state=got_state)
    want = evaluated(dataclasses.replace(odd, state=state))
    assert_same(jax.device_get(got_y), jax.device_get(want))
    assert_same(jax.device_get(third), jax.device_get(state))
    got, _ = pipe.evaluate(loss)(placed, odd.x, state=got_state)
    whole = [loss(want[a:b]) * (b - a) / 5 for a, b in ((0, 2), (2, 4), (4, 5))]
    assert_same(jax.device_get(got), jax.device_get(sum(whole)))


def test_a_flax_model_with_batch_norms():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            for _ in range(2):
                x = nn.Dense(3)(x)
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
                x = nn.Dropout(0.3, deterministic=not train)(nn.relu(x))
            return nn.Dense(2)(x)

    model = Model()

    def apply(params, x, *, state, key=None, train=False):
        variables = {"params": params, "batch_stats": state}
        rngs = None if key is None else {"dropout": key}
        y, new = model.apply(variables, x, train, rngs=rngs, mutable=["batch_stats"])
        return y, new["batch_stats"]

    x = weights(6, 4)
    made = model.init(jax.random.key(0), x, False)
    example = Example(
        apply,
        made["params"],
        x,
        (),
        needs={"key": jax.random.key(1), "train": True},
        state=made["batch_stats"],
    )
    split = example.split()
    # By itself it is not cut between statistics and what they normalise, in any mode.
    assert len(split) > 3
    pipe = pipe_of(split, "placed")
    value, state, grads = trained(example)
    (got, got_state), got_grads = pipe.value_and_grad(loss)(
        pipe.place(example.params), x, state=example.state, **example.needs
    )
    assert_same(got, value)
    assert_same(jax.device_get(got_state), jax.device_get(state))
    assert_same(pipe.gather(got_grads), grads)
    # Each array is where the piece is that reads and writes it.
    stage = dict(enumerate([0] * pipe.balance[0] + [1] * pipe.balance[1]))
    where = jax.tree.leaves(jax.tree.map(lambda a: a.devices(), got_state))
    assert where == [{pipe.devices[stage[k]]} for k in split.cut.state_owners]


def test_new_state_is_made_in_the_piece_that_reads_the_old_one():
    """The updates are written at the end of the function, after all cuts."""

    def fn(params, x, *, state):
        first = jnp.tanh(x @ params["a"]) + state["shift"]
        second = fpipe.cut(first) @ params["b"]
        new = {
            "shift": state["shift"] * 0.5 + jnp.mean(first, 0),
            "seen": jnp.mean(second, 0),
            "average": state["average"] * 0.5 + params["b"] * 0.5,
            "count": state["count"] + 1,
            "rate": state["rate"] * jnp.sum(second) / state["count"],
            "still": state["still"],
        }
        return second * state["still"], new

    params = {"a": weights(3, 4), "b": weights(4, 4)}
    state = dict.fromkeys(("shift", "seen", "rate"), jnp.ones(4))
    state |= {"average": params["b"], "count": jnp.ones(()), "still": jnp.ones(4)}
    example = Example(fn, params, weights(6, 3), (), state=state)
    split = example.split()
    assert owners(split) == {
        "shift": 0,
        "seen": 1,
        # Where the weights are.
        "average": 1,
        # What is read by a later update may come from anywhere before it.
        "count": 0,
        "rate": 1,
        "still": 1,
    }
    assert [layer.borrow for layer in split.layers] == [(), ()]
    value, new, grads = trained(example)
    reference = fpipe.sequential(split.layers, chunks=3)
    (got, states), got_grads = jax.jit(reference.value_and_grad(loss))(
        split.params(params), example.x, state=split.state(state)
    )
    assert_same(got, value)
    assert_same(split.state_tree(states), new)
    assert_same(split.tree(got_grads), grads)


def test_what_a_state_is_made_of_is_sent_as_small_as_it_gets():
    """The mean of a layer of the first piece, written after the cut, and not all of
    the layer.
    """

    def fn(params, x, *, state):
        inner = jnp.tanh(x @ params["a"])
        h = fpipe.cut(inner @ params["b"])
        return h * state, jnp.mean(inner, 0)

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 4))}
    split = fpipe.split(fn, params, jnp.ones((8, 3)), state=jnp.ones(4))
    assert owners(split) == {"": 1}
    trace = split.cut.trace(split.cut.first)
    taken = [trace.traced.graph.avals[v].shape for v in trace.pieces[1].takes]
    assert sorted(taken) == [(4,), (8, 4)]


def test_several_pieces_may_read_a_state():
    """The first one has it, and sends it; no gradient comes back."""

    def fn(params, x, *, state):
        h = fpipe.cut(x * params["a"] * state)
        return h * params["b"] * state, state + 1.0

    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    example = Example(fn, params, weights(6, 3), (), state=jnp.ones(()))
    split = example.split()
    assert owners(split) == {"": 0}
    # The tables say where it is, and that it goes to the next piece.
    pieces, crossing = str(split).split("\n\n")
    assert [line.split()[3] for line in pieces.splitlines()[:2]] == ["state", "(all)"]
    assert any(line.startswith("state ") for line in crossing.splitlines())
    value, state, grads = trained(example)
    pipe = pipe_of(split, "placed")
    (got, got_state), got_grads = pipe.value_and_grad(loss)(
        pipe.place(params), example.x, state=example.state
    )
    assert_same(got, value)
    assert_same(jax.device_get(got_state), jax.device_get(state))
    assert_same(pipe.gather(got_grads), grads)


def late_update(params, x, *, state):
    """It reads a state, and writes it with what a later layer computes."""
    h = jnp.tanh((x * state["s"]) @ params["a"])
    h = h @ params["b"] if "marked" not in state else fpipe.cut(h) @ params["b"]
    return h @ params["c"], {**state, "s": jnp.mean(h, 0)}


def test_a_cut_between_the_read_and_the_write_of_a_state():
    params = dict.fromkeys("abc", jnp.ones((3, 3)))
    x, state = jnp.ones((2, 3)), {"s": jnp.ones(3)}
    split = fpipe.split(late_update, params, x, state=state)
    # It is not cut there by itself.
    assert [len(own) for own in split.cut.wiring.owned] == [2, 1]
    with pytest.raises(ValueError, match="a state is read before each place there"):
        fpipe.split(late_update, params, x, state=state, cuts=["b"])
    marked = {**state, "marked": jnp.ones(())}
    with pytest.raises(
        ValueError,
        match="the state 's' is read in piece 0, but its new value is made of what "
        "piece 1 computes",
    ):
        fpipe.split(late_update, params, x, state=marked)


def test_whoever_takes_a_split_takes_one_with_state():
    """Costs, balances, predictions, recordings, anomalies, half precision."""
    example = batch_norm()
    split, x = example.split(cuts=["b"]), example.x
    costs = fpipe.layer_costs(split, x, by="flops", chunks=3)
    assert costs == fpipe.layer_costs(
        split.layers, x, chunks=3, params=split.params(example.params)
    )
    assert fpipe.balance(split, x, stages=2, chunks=3) == (1, 1)
    assert fpipe.Pipe(split, balance="memory", sample=x, chunks=3).balance == (1, 1)
    tuning = fpipe.tune(
        split,
        x,
        devices=jax.devices()[:2],
        schedules=["1f1b"],
        chunks=3,
        checkpoints=["never"],
        state=example.state,
    )
    assert tuning.best.pipe
    assert tuning.best.pipe.balance == (1, 1)
    needs: Any = {"state": example.state, **example.needs}
    with jax.numpy_dtype_promotion("standard"):
        half = {"compute_dtype": jnp.bfloat16, "detect_anomaly": True}
        pipe = pipe_of(split, "placed", **half)
        step, placed = pipe.value_and_grad(loss), pipe.place(example.params)
        nan = example.params | {"b": jax.tree.map(lambda a: a * jnp.nan, placed["b"])}
        ((_, state), _), recording = pipe.record(step, placed, x, **needs)
        with pytest.raises(FloatingPointError, match="layer 1 'b', microbatch 0"):
            step(pipe.place(nan), x, **needs)
    # Three microbatches on two stages; the first stage recomputes all but the last.
    assert len(recording.events) == 3 * 2 * 2 + 2
    # The state keeps its dtypes.
    shapes = [(a.shape, a.dtype) for a in jax.tree.leaves(example.state)]
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(state)] == shapes


def test_the_assertion_of_a_pipe_compares_with_the_function():
    example = batch_norm()
    split = example.split()
    pipe = pipe_of(split, "placed")
    needs: Any = {"state": example.state, "params": example.params, **example.needs}
    assert_equals_sequential(pipe, example.x, **needs)


def test_a_split_with_state_is_a_value_and_can_be_planned():
    example = batch_norm()
    split = example.split(cuts=["b"])
    assert owners(split) == {
        "a/mean": 0,
        "a/var": 0,
        "b/mean": 1,
        "b/var": 1,
        "seen": 0,
        "unused": 0,
    }
    pipe = pipe_of(split, "placed")
    again = pickle.loads(pickle.dumps(pipe))
    assert again == pipe
    assert jax.tree.structure(split.state_shapes) == jax.tree.structure(example.state)
    plan = pipe.plan(None, example.x, train=True)
    assert [stage.work["F"] > 0 for stage in plan.stages] == [True, True]
    mapped = split.state_tree(split.state(example.state))
    assert_same(mapped, example.state)


def _decode(params, x, *, state):
    """Each block attends to what it has seen in earlier calls."""
    h = params["embed"][x]
    new = []
    for p, cache in zip(params["h"], state, strict=True):
        at = cache["at"]
        seen = cache["seen"].at[jnp.arange(len(h)), at].set(h @ p)
        old = jnp.arange(seen.shape[1]) <= at[:, None]
        scores = jnp.einsum("bd,btd->bt", h, seen)
        h = h + jnp.einsum("bt,btd->bd", jnp.where(old, scores, 0.0), seen)
        new.append({"seen": seen, "at": at + 1})
    return h @ params["embed"].T, new


def _cache(x):
    rows = x.shape[0]
    cache = {"seen": jnp.zeros((rows, 3, 2)), "at": jnp.zeros(rows, jnp.int32)}
    return [cache, cache]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_state_of_rows(executor):
    """A cache of keys: each microbatch has that of its own rows, in every piece."""
    params = {"embed": weights(5, 2), "h": [weights(2, 2), weights(2, 2, seed=1)]}
    layer = fpipe.Layer(_decode, init_state=_cache, state_rows=True)
    two, x = jnp.arange(2), jnp.arange(5)
    shapes = jax.eval_shape(lambda: _cache(two))
    split = fpipe.split(layer, params, two, state=shapes, cuts=["h/1"])
    assert [layer.state_rows for layer in split.layers] == [True, True]
    pipe = pipe_of(split, executor)
    placed, state, want = pipe.place(params), pipe.init_state(x), _cache(x)
    step = jax.jit(_decode)
    for _ in range(2):
        y, state = pipe(placed, x, state=state)
        want_y, want = step(params, x, state=want)
        assert_same(jax.device_get(y), jax.device_get(want_y))
        assert_same(jax.device_get(state), jax.device_get(want))
    if executor == "placed":
        pieces = fpipe.Microbatches([two, two + 2])
        state = pipe.init_state(pieces)
        _, state = pipe(placed, pieces, state=state)
        _, want = step(params, two + 2, state=_cache(two))
        assert_same(jax.device_get(state.pieces[1]), jax.device_get(want))


def test_state_of_rows_is_declared():
    params = {"embed": weights(5, 2), "h": [weights(2, 2)] * 2}
    x = jnp.arange(2)
    with pytest.raises(ValueError, match="state follows the rows: '0/at' has an entry"):
        fpipe.split(_decode, params, x, state=_cache(x))
    shared = fpipe.Layer(_decode, state_rows=False)
    with pytest.warns(UserWarning, match="with 2 rows, but not with 4"):
        fpipe.split(shared, params, x, state=_cache(x))
    declared = fpipe.Layer(_decode, state_rows=True)
    with pytest.raises(ValueError, match=r"'0/at' is int32\[3\], but x has 2 rows"):
        fpipe.split(declared, params, x, state=_cache(jnp.arange(3)))
    # Entries that are no rows: as many channels as rows.
    example = batch_norm()
    state = example.state
    three = rows(example.x, 0, 3)
    split = fpipe.split(example.fn, example.params, three, state=state)
    assert not any(layer.state_rows for layer in split.layers)


def _random_init(key, x):
    first, second = jax.random.split(key)
    a = jax.random.normal(first, (x.shape[-1], 4))
    return {"a": a, "b": jax.random.normal(second, (4, 2))}


def _random_state(x, *, key):
    return {"m": jnp.zeros(4), "r": jax.random.normal(key, (2,))}


def _with_init(params, x, *, state):
    h = fpipe.cut(jnp.tanh(x @ params["a"]) + state["m"]) @ params["b"]
    return h * state["r"], {"m": state["m"], "r": state["r"] + jnp.mean(h, 0)}


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_pipe_makes_what_the_layer_that_was_split_makes(executor):
    """Each piece's own arrays on its device, by the functions of a single layer."""
    x, key = jnp.ones((6, 3)), jax.random.key(3)
    own = jax.random.fold_in(key, 0)
    params, state = _random_init(own, x), _random_state(x, key=own)
    layer = fpipe.Layer(_with_init, _random_init, init_state=_random_state)
    split = fpipe.split(layer, params, x[:2], state=state)
    pipe = pipe_of(split, executor)
    placed = pipe.init(key, x)
    made = pipe.init_state(x, params=placed, key=key)
    assert_same(pipe.gather(placed), params)
    assert_same(jax.device_get(made), jax.device_get(state))
    if executor == "placed":
        first, second = pipe.devices
        assert jax.tree.map(lambda a: a.devices(), (placed, made)) == (
            {"a": {first}, "b": {second}},
            {"m": {first}, "r": {second}},
        )


def test_wrong_state():
    example = batch_norm()
    fn, params, x = example.fn, example.params, example.x
    split = example.split(cuts=["b"])
    pipe = pipe_of(split, "placed")
    placed = pipe.place(params)
    with pytest.raises(TypeError, match="_batch_norm' asks for its state"):
        fpipe.split(fn, params, x)
    with pytest.raises(TypeError, match="asks for no state"):
        fpipe.split(lambda p, x: x, params, x, state=example.state)
    with pytest.raises(ValueError, match="has state: pass `state=`"):
        pipe(placed, x)
    with pytest.raises(ValueError, match="the state is a tree as the function was"):
        pipe(placed, x, state={"a": jnp.ones(3)})
    wide = {**example.state, "unused": jnp.ones(3)}
    with pytest.raises(ValueError, match="the state 'unused' is float32"):
        pipe(placed, x, state=wide)

    def grows(params, x, *, state):
        return x, jnp.concatenate([state, state])

    with pytest.raises(TypeError, match="a state keeps its structure"):
        fpipe.split(grows, params, x, state=jnp.ones(2))
    layer: Any = fpipe.Layer(fn, finish=lambda state: state)
    with pytest.raises(TypeError, match="declares finish or overwrite"):
        fpipe.split(layer, params, x, state=example.state)
    with pytest.raises(TypeError, match="split makes no state"):
        pipe.init_state(x)
    with pytest.raises(ValueError, match="make no state"):
        fpipe.sequential(split.layers).init_state(x, params=split.params(params))


STEPS = ("dense", "dense", "read", "collect", "norm", "update", "weights", "shift")


def random_function(seed):
    """A function of some steps with marks between them, which read a state, or write it
    with what earlier steps have made.
    """
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    layers = [f"l{n}" for n in range(rng.randint(2, 3))]
    arrays = [f"s{n}" for n in range(rng.randint(2, 3))]

    def normal(*shape):
        return jnp.asarray(numbers.normal(size=shape), jnp.float32) / 2

    params = {name: normal(3, 3) for name in layers}
    state = {name: normal(3) for name in arrays} | {"count": jnp.ones((), jnp.int32)}
    steps = [
        (rng.choice(STEPS), rng.choice(layers), rng.choice(arrays), rng.randrange(9))
        for _ in range(rng.randint(5, 8))
    ]
    marked = [rng.random() < 0.3 for _ in steps]

    def fn(params, x, *, state, train=False):
        h, new, made, means = x @ params["l0"], dict(state), [x], [jnp.zeros(3)]
        for (step, layer, name, back), mark in zip(steps, marked, strict=True):
            w, old, mean = params[layer], made[back % len(made)], means[back % 2 - 1]
            h = fpipe.cut(h) if mark else h
            match step:
                case "dense":
                    h = h + jnp.tanh(old @ w)
                case "read":
                    h = h * (1.0 + state[name])
                case "collect":
                    means.append(jnp.mean(old, 0))
                case "norm" if train:
                    h, new[name] = h - jnp.mean(h, 0), jnp.mean(h, 0) + state[name]
                case "norm":
                    h = h - state[name]
                case "update":
                    new[name] = 0.5 * new[name] + mean
                case "weights":
                    new[name] = 0.5 * new[name] + jnp.sum(w, 0)
                case "shift":
                    new[name] = state[arrays[back % len(arrays)]]
            made.append(h)
        return h, {**new, "count": state["count"] + 1}

    return Example(fn, params, normal(5, 3), (), state=state)


@pytest.mark.parametrize("seed", [7, 21, 27])
def test_random_functions_with_state(seed):
    """Their pieces hand on what they do, trained and evaluated."""
    example = random_function(seed)
    split = example.split()
    assert len(split) > 1
    reference = fpipe.sequential(split.layers, chunks=3)
    own = split.state(example.state)
    for train in (True, False):
        example = dataclasses.replace(example, needs={"train": train})
        value, state, grads = trained(example)
        step = reference.value_and_grad(loss)
        (got, states), got_grads = jax.jit(step, static_argnames="train")(
            split.params(example.params), example.x, state=own, train=train
        )
        assert_same(got, value)
        assert_same(split.state_tree(states), state)
        assert_same(split.tree(got_grads), grads)
