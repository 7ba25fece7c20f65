"""Optimizers per stage: what plain optax computes on the gathered tree, on the devices
of the stages.
"""

import functools
import itertools
import re
import subprocess
import sys
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import Mesh, PartitionSpec

import fpipe
import fpipe.optim
from fpipe.optim._update_graph import Equation
from tests.helpers import assert_same, dense, in_turn, mse, noise, raises

pytestmark = pytest.mark.usefixtures("promotion")


STAGES = 3
WIDTH = 4


@functools.cache
def layers():
    """One parameter that is a scalar, and shapes that differ."""
    scale = fpipe.Layer(
        lambda p, x: x * p, lambda key, x: jnp.asarray(1.5, jnp.float32), name="scale"
    )
    return [dense(), dense(6), scale, dense()]


@functools.cache
def pipe_of(executor, count=STAGES):
    balance = {1: [4], 2: [2, 2], 3: [1, 2, 1]}[count]
    return fpipe.Pipe(layers(), balance, chunks=2, executor=executor)


X = noise(jax.random.key(1), (4, WIDTH))
TARGET = jnp.cos(X)
EXECUTORS = ["placed", "scan"]


@functools.cache
def made():
    """The parameters on the host."""
    params = fpipe.sequential(layers(), chunks=2).init(jax.random.key(0), X)
    return jax.tree.map(np.asarray, params)


def whole():
    """The parameters as plain optax sees them; each test may donate its own."""
    return jax.device_put(jax.tree.map(np.array, made()), jax.devices()[0])


def grads_of(params, step):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(step + 7), len(leaves))
    return treedef.unflatten(
        [
            noise(k, a.shape).astype(a.dtype) * 2
            if jnp.issubdtype(a.dtype, jnp.inexact)
            else a
            for k, a in zip(keys, leaves, strict=True)
        ]
    )


def by_rank(params):
    return jax.tree.map(lambda a: a.ndim > 1, params)


def schedule():
    return optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 6)


OPTIMIZERS = {
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, mask=by_rank),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "clip_after": lambda: optax.chain(
        optax.scale_by_adam(), optax.clip_by_global_norm(1e-2), optax.scale(-1.0)
    ),
    "adaptive": lambda: optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)),
    "lamb": lambda: optax.lamb(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "ema": lambda: optax.chain(optax.ema(0.9), optax.sgd(0.1)),
    "multi_steps": lambda: optax.MultiSteps(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)), 2
    ).gradient_transformation(),
    "masked": lambda: optax.masked(optax.adam(1e-2), by_rank),
    "multi_transform": lambda: optax.multi_transform(
        {"a": optax.adam(1e-2), "b": optax.sgd(0.1)},
        lambda p: jax.tree.map(lambda a: "a" if a.ndim > 1 else "b", p),
    ),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=schedule()),
    "schedule": lambda: optax.adam(schedule()),
    "finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 2),
    "own_mask": lambda: optax.adamw(1e-2, mask=by_rank(whole())),
}


def steps(tx, params, place, gather, count=4, jit=False, poison=None):
    """Updates and states of several steps, gathered."""
    init, update = (
        (jax.jit(tx.init), jax.jit(tx.update)) if jit else (tx.init, tx.update)
    )
    state, out = init(params), []
    for n in range(count):
        grads = grads_of(gather(params), n)
        if n == poison:
            grads = jax.tree.map(lambda g: g * jnp.nan, grads)
        updates, state = update(place(grads), state, params)
        params = optax.apply_updates(params, updates)
        out.append((gather(updates), fpipe.optim.gather(state), gather(params)))
    return out


@functools.cache
def reference(name, poison=None):
    tx = OPTIMIZERS[name]()
    # Compiled, as the programs of the stages are: `optax` run equation by equation
    # rounds otherwise.
    return steps(tx, whole(), lambda t: t, lambda t: t, jit=True, poison=poison)


# What an optimizer looks at differs between these: each leaf, all of them, their
# shapes, labels, or a counter.
IN_JIT = ["lamb", "adafactor", "multi_steps", "multi_transform"]


@pytest.mark.parametrize(
    ("name", "executor"),
    [(name, "placed") for name in OPTIMIZERS]
    + [(name, "scan in jit") for name in [*IN_JIT, "inject", "finite", "own_mask"]],
)
def test_equal_to_plain_optax(name, executor):
    pipe = pipe_of(executor.split()[0])
    tx = fpipe.optim.per_stage(OPTIMIZERS[name]())
    poison = 1 if name == "finite" else None
    got = steps(
        tx,
        pipe.place(whole()),
        pipe.place,
        pipe.gather,
        jit="jit" in executor,
        poison=poison,
    )
    want = reference(name, poison=poison)
    for (updates, state, params), (updates0, state0, params0) in zip(
        got, want, strict=True
    ):
        if poison is None:
            assert_same(updates, updates0, 2e-5)
        assert_same(state, state0, 2e-5)
        assert_same(params, params0, 1e-6)


CLIP = OPTIMIZERS["clip"]


def device(array):
    (found,) = array.devices()
    return found


def on_their_devices(state, params):
    """The leaves of a state that are not on the device of the parameter whose path
    theirs ends with, nor on the first.
    """
    homes = {
        path: device(a) for path, a in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    wrong = []
    for path, a in jax.tree_util.tree_flatten_with_path(state)[0]:
        want = next(
            (homes[path[n:]] for n in range(len(path)) if path[n:] in homes),
            jax.devices()[0],
        )
        wrong += [path] * (device(a) != want)
    return wrong


def test_scan_outside_of_jit_and_the_state_is_packed():
    pipe = pipe_of("scan")
    tx = fpipe.optim.per_stage(OPTIMIZERS["adafactor"]())
    got = steps(tx, pipe.place(whole()), pipe.place, pipe.gather, count=2)
    for step, want in zip(got, reference("adafactor"), strict=False):
        assert_same(step, want, 2e-5)
    params = pipe.place(whole())
    lamb = fpipe.optim.per_stage(optax.lamb(1e-2))
    state: Any
    for state in (lamb.init(params), jax.jit(lamb.init)(params)):
        assert all(a.sharding.spec[0] == "stage" for a in state[0].mu.arrays)
        _, state = jax.jit(lamb.update)(pipe.place(grads_of(whole(), 0)), state, params)
        mu = state[0].mu
        assert isinstance(mu, fpipe.Packed)
        assert mu.packing == params.packing
        assert all(a.sharding.spec[0] == "stage" for a in mu.arrays)
        for row, array in zip(mu.packing.rows, mu.arrays, strict=True):
            for d, entry in enumerate(row.entries):  # padding stays zero
                size = (
                    0 if entry is None else int(np.prod(mu.packing.shape(entry).shape))
                )
                assert not np.asarray(array[d]).reshape(-1)[size:].any()


def crossing(compiled):
    """The bytes of everything that devices send each other in a compiled program."""
    moves = re.findall(
        r"= (\w+)\[([\d,]*)\]\S* (?:all-|collective-|reduce-scatter)",
        compiled.as_text(),
    )
    return sum(
        4 * int(np.prod([int(n) for n in shape.split(",") if n])) for _, shape in moves
    )


@pytest.mark.parametrize(
    "widths",
    [(64,) * 5, (64, 32, 64, 64, 16)],
    ids=["equal stages", "different stages"],
)
def test_under_scan_each_device_updates_its_own_stages_and_only_numbers_cross(widths):
    weights = [fpipe.Layer(lambda w, x: x @ w, name="dense")] * 4
    pipe = fpipe.Pipe(weights, [1] * 4, chunks=2, executor="scan")
    params = pipe.place([jnp.ones(shape) for shape in itertools.pairwise(widths)])
    tx = fpipe.optim.per_stage(
        optax.chain(optax.clip_by_global_norm(1.0), optax.lamb(1e-2))
    )
    state = tx.init(params)
    compiled = (
        jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile()
    )
    assert 0 < crossing(compiled) <= 4 * 4 * 4
    # In and out are a device's own rows and no others, and in between it keeps no more
    # than a few of them.
    row = max(a.nbytes // 4 for a in params.arrays)
    memory: Any = compiled.memory_analysis()
    assert memory.argument_size_in_bytes < 4.1 * row
    assert memory.temp_size_in_bytes < 4 * row
    # Equal stages have one path where nothing is added up over stages.
    alone = fpipe.optim.per_stage(optax.lamb(1e-2))
    text = str(
        jax.jit(alone.update)
        .lower(params, alone.init(params), params)
        .compile()
        .as_text()
    )
    assert (" conditional(" in text) == (len(set(widths)) > 1)


@pytest.mark.quick
def test_every_leaf_is_on_its_device_and_only_numbers_move():
    pipe = pipe_of("placed")
    params, tx = pipe.place(whole()), fpipe.optim.per_stage(CLIP())
    state = tx.init(params)
    assert on_their_devices(state, params) == []
    updates, state = tx.update(pipe.place(grads_of(whole(), 0)), state, params)
    assert on_their_devices((updates, state), params) == []
    cut = tx.runs[-1].cut
    # Sums of squares to the first device, the norm's part and the count back: one small
    # array each.
    assert sum(move.bytes for move in cut.moves) <= 4 * 20
    assert [(part.round, part.device) for part in cut.parts] == [
        (0, 1),
        (0, 2),
        (1, 0),
        (2, 0),
        (2, 1),
        (2, 2),
    ]
    assert device(fpipe.optim.global_norm(params)) == jax.devices()[0]


def test_programs_are_compiled_once():
    pipe = pipe_of("placed")
    params, tx = (
        pipe.init(jax.random.key(0), X),
        fpipe.optim.per_stage(CLIP(), donate=["state"]),
    )
    assert not any(
        a.weak_type for a in jax.tree.leaves(params)
    )  # so that the first step is like the others
    state, grads = tx.init(params), pipe.place(grads_of(whole(), 0))
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        params = fpipe.optim.apply_updates(
            params, updates, donate=["params", "updates"]
        )
    assert len(tx.runs) == 2  # of init, of update
    calls: list[Any] = tx.runs[-1].calls
    assert [call._cache_size() for call in calls] == [1] * 6


@pytest.mark.quick
def test_a_plan_is_kept_by_the_settings_that_its_trace_was_made_under():
    def update(grads, state, params=None):
        del params
        return jax.tree.map(lambda g: g @ g, grads), state

    params = jax.device_put((jnp.ones((3, 3)),), jax.devices()[0])
    tx = fpipe.optim.per_stage(transformation(lambda params: (), update))
    for precision in ("default", "highest", "highest"):
        with jax.default_matmul_precision(precision):
            tx.update(params, (), params)
    precisions = [
        operation.node.eqn.params["precision"]
        for run in tx.runs
        for operation in run.cut.graph.operations
        if isinstance(operation, Equation)
    ]
    default, highest = jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST
    assert precisions == [(default, default), (highest, highest)]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_donation_deletes_and_nothing_else_does(executor):
    pipe = pipe_of(executor)
    params = pipe.place(whole())
    grads = [pipe.place(grads_of(whole(), n)) for n in range(2)]

    def deleted(tree):
        return [a.is_deleted() for a in jax.tree.leaves(tree)]

    tx = fpipe.optim.per_stage(CLIP())
    state = tx.init(params)
    updates, _ = tx.update(grads[0], state, params)
    new = fpipe.optim.apply_updates(params, updates)
    assert not any(deleted((state, grads[0], params, updates)))
    tx = fpipe.optim.per_stage(CLIP(), donate=["state", "grads"])
    state: Any = tx.init(params)
    got, after = tx.update(grads[0], state, params)
    assert all(deleted((state[1][0].mu, state[1][0].nu, grads[0])))
    assert not any(deleted((params, got, after)))
    assert_same(pipe.gather(got), pipe.gather(updates))
    got = fpipe.optim.apply_updates(params, got, donate=["params", "updates"])
    assert all(deleted(params))
    assert_same(pipe.gather(got), pipe.gather(new))
    tx.update(grads[1], after, got)


def transformation(init: Any, update: Any) -> optax.GradientTransformation:
    return optax.GradientTransformation(init, update)


def neighbours():
    """Every update takes the gradient of the next layer too, and the state is a number
    without a type of its own.
    """

    def update(grads, state, params=None):
        del params
        mixed = tuple(
            g + jax.nn.relu(grads[(k + 1) % len(grads)]) for k, g in enumerate(grads)
        )
        return mixed, jnp.where(state > 0, 1.0, 2.0)

    return transformation(lambda params: jnp.asarray(1.0), update)


@pytest.mark.parametrize("width", [2, 40])
def test_what_needs_large_arrays_of_two_devices_is_right_too(width):
    params = tuple(
        jax.device_put(jnp.full((width, width), float(d)), jax.devices()[d])
        for d in range(3)
    )
    tx = fpipe.optim.per_stage(neighbours())
    state, updates = tx.init(params), None
    for _ in range(2):
        updates, state = tx.update(params, state)
        assert not any(a.weak_type for a in jax.tree.leaves(state))
    assert on_their_devices(updates, params) == []
    here = jax.device_put(params, jax.devices()[0])
    assert_same(
        jax.device_put(updates, jax.devices()[0]),
        neighbours().update(here, jnp.float32(1.0))[0],
    )


def test_an_output_made_on_a_later_device_comes_back():
    def update(grads, state, params=None):
        vector, matrix = grads
        return (matrix @ vector, matrix), state

    params = (
        jax.device_put(jnp.ones(300), jax.devices()[0]),
        jax.device_put(jnp.ones((300, 300)), jax.devices()[1]),
    )
    tx = fpipe.optim.per_stage(transformation(lambda params: (), update))
    updates: Any = tx.update(params, tx.init(params))[0]
    assert on_their_devices(updates, params) == []
    assert_same(updates[0], jax.device_put(jnp.full(300, 300.0), jax.devices()[0]))
    # Handed through, as an array of its own: the user may donate either.
    assert_same(updates[1], params[1])
    assert updates[1].unsafe_buffer_pointer() != params[1].unsafe_buffer_pointer()
    assert (
        sum(move.bytes for move in tx.runs[-1].cut.moves) == 2 * 1200
    )  # the vector, not the matrix; there and back


@pytest.mark.parametrize("executor", EXECUTORS)
def test_arguments_of_update_go_through(executor):
    def make():
        return optax.chain(
            optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, factor=0.5)
        )

    pipe, tx, plain = pipe_of(executor), fpipe.optim.per_stage(make()), make()
    params = pipe.place(whole())
    state, other = tx.init(params), plain.init(whole())
    for n, value in enumerate([1.0, 2.0, 3.0, 4.0]):
        updates, state = tx.update(
            pipe.place(grads_of(whole(), n)), state, params, value=value
        )
        want, other = plain.update(grads_of(whole(), n), other, whole(), value=value)
        assert_same(pipe.gather(updates), want)
        got: Any = fpipe.optim.gather(state)
        assert_same(got[1].scale, other[1].scale)  # pyright: ignore
    assert len(tx.runs) == (2 if executor == "placed" else 0)


def test_an_array_given_twice_is_donated_once():
    params = jax.device_put((jnp.ones(3), jnp.ones(3)), jax.devices()[0])
    tx = fpipe.optim.per_stage(optax.sgd(0.1), donate=["grads"])
    one = jax.device_put(jnp.ones(3), jax.devices()[0])
    updates, _ = tx.update((one, one), tx.init(params), params)
    assert_same(updates, jax.tree.map(lambda a: a * -0.1, params))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_bfloat16_parameters_with_a_float32_state(executor):
    pipe = pipe_of(executor)
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), whole())

    def make():
        return optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(1e-2, mu_dtype=jnp.float32)
        )

    got = steps(
        fpipe.optim.per_stage(make()), pipe.place(params), pipe.place, pipe.gather, 2
    )
    want = steps(make(), params, lambda t: t, lambda t: t, 2, jit=True)
    for a, b in zip(got, want, strict=True):
        assert_same(a, b, 2e-2)
    assert want[0][1][1][0].mu[0]["w"].dtype == jnp.float32


FROZEN = {
    "prefix": (True, False, False, {"w": True, "b": False}),
    "predicate": lambda path, leaf: (
        path.startswith("0/") or (path.startswith("3/") and leaf.ndim == 2)
    ),
}


@pytest.mark.parametrize(("executor", "frozen"), in_turn(EXECUTORS, FROZEN))
def test_frozen_leaves_have_no_state_and_do_not_change(executor, frozen):
    pipe, start = pipe_of(executor), whole()
    params = pipe.place(start)
    tx = fpipe.optim.per_stage(CLIP(), frozen=FROZEN[frozen])
    state = tx.init(params)
    kept = [start[1]["b"], start[1]["w"], start[2], start[3]["b"]]
    assert_same(
        jax.tree.leaves(fpipe.optim.gather(state)[1][0].mu),
        [jnp.zeros_like(a) for a in kept],
    )
    grads = grads_of(start, 0)
    updates: Any
    updates, state = tx.update(pipe.place(grads), state, params)
    plain = CLIP()
    of = [grads[1]["b"], grads[1]["w"], grads[2], grads[3]["b"]]
    want, _ = jax.jit(plain.update)(of, plain.init(kept), kept)
    for add in (fpipe.optim.apply_updates, optax.apply_updates):
        new = pipe.gather(add(params, updates))
        assert_same(new[0], start[0], 0)
        assert_same(new[3]["w"], start[3]["w"], 0)
        assert_same(
            [new[1]["b"], new[1]["w"], new[2], new[3]["b"]],
            optax.apply_updates(kept, want),
        )
    if executor == "placed":
        assert fpipe.optim.apply_updates(params, updates)[0]["w"] is params[0]["w"]
        assert updates[0]["w"].shape == ()


def test_integers_are_passed_over_with_float0_gradients():
    def apply(p, x):
        return x * p["scale"] + p["table"].astype(x.dtype)

    layer = fpipe.Layer(
        apply, lambda key, x: {"scale": jnp.ones(WIDTH), "table": jnp.arange(WIDTH)}
    )
    for executor in EXECUTORS:
        pipe = fpipe.Pipe([layer, layer], chunks=2, balance=[1, 1], executor=executor)
        params = pipe.init(jax.random.key(0), X)
        tx = fpipe.optim.per_stage(optax.adam(1e-2))
        state = tx.init(params)
        _, grads = pipe.value_and_grad(mse)(params, X, X)
        updates, state = tx.update(grads, state, params)
        new = pipe.gather(fpipe.optim.apply_updates(params, updates))
        assert_same(new[1]["table"], jnp.arange(WIDTH))
        assert len(jax.tree.leaves(fpipe.optim.gather(state)[0].mu)) == 2
        assert not np.array_equal(new[1]["scale"], np.ones(WIDTH))
        # And frozen by the pipe's own word: no gradient at all.
        tx = fpipe.optim.per_stage(optax.adam(1e-2), frozen=True)
        none = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), params)
        updates, _ = tx.update(none, tx.init(params), params)
        assert_same(
            pipe.gather(fpipe.optim.apply_updates(params, updates)),
            pipe.gather(params),
            0,
        )


NO_GRADIENT = (
    "`per_stage(tx).update`: the parameter params[0]['b'] has no gradient: it is "
    "frozen in `pipe.value_and_grad(loss_fn, frozen=...)`, and here it is not; write "
    "`fpipe.optim.per_stage(tx, frozen=...)`, with the same `frozen`"
)


# Under `scan` the first has a part of the rows, the second whole ones.
@pytest.mark.parametrize(
    "frozen",
    [(True, False, False, False), ({"w": False, "b": True},) * 4],
    ids=["layer", "biases"],
)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_weight_decay_leaves_frozen_weights_alone(executor, frozen):
    """With the frozen weights named they stay to the last bit, placed, packed and
    gathered; without, the update is refused.
    """
    pipe = fpipe.Pipe([dense()] * 4, [2, 2], chunks=2, executor=executor)
    start = pipe.gather(pipe.init(jax.random.key(0), X))
    step = pipe.value_and_grad(mse, frozen=frozen)
    flags = jax.tree.map(
        lambda flag, part: jax.tree.map(lambda _: flag, part), frozen, start
    )
    adamw = optax.adamw(1e-2, weight_decay=0.5)
    for gathered in (False, True):
        tx = fpipe.optim.per_stage(adamw, frozen=frozen)
        params = start if gathered else pipe.place(start)
        state = tx.init(params)
        grads: Any = None
        for _ in range(3):
            at = pipe.place(params) if gathered else params
            _, grads = step(at, X, TARGET)
            grads = pipe.gather(grads) if gathered else grads
            updates, state = tx.update(grads, state, params)
            params = fpipe.optim.apply_updates(params, updates)
        end = params if gathered else pipe.gather(params)
        assert jax.tree.map(np.array_equal, end, start) == flags
        bare = fpipe.optim.per_stage(adamw)
        with raises(ValueError, NO_GRADIENT):
            bare.update(grads, bare.init(params), params)
    if executor == "scan":
        bare = fpipe.optim.per_stage(adamw)
        with raises(ValueError, NO_GRADIENT):
            jax.jit(lambda p: bare.update(step(p, X, TARGET)[1], bare.init(p), p))(
                pipe.place(start)
            )


def test_plain_optax_refuses_packed_gradients_without_the_frozen_ones():
    """Rows of frozen and trained weights together would be decayed as one."""
    pipe = fpipe.Pipe([dense()] * 4, [2, 2], chunks=2, executor="scan")
    params = pipe.init(jax.random.key(0), X)
    step = pipe.value_and_grad(mse, frozen=(True, False, False, False))
    tx = optax.adamw(1e-2)

    def update(params):
        grads = step(params, X, TARGET)[1]
        return tx.update(grads, tx.init(params), params)

    for run in (update, jax.jit(update)):
        with pytest.raises(ValueError, match=r"frozen \[0\]\['b'\], \[0\]\['w'\].*"):
            run(params)
        with pytest.raises(ValueError, match=r"per_stage\(tx, frozen=\.\.\.\)"):
            run(params)
    assert repr(step(params, X, TARGET)[1]).endswith("none of [0]['b'], [0]['w'])")


@pytest.mark.parametrize("executor", EXECUTORS)
def test_train_state(executor):
    pipe = pipe_of(executor)
    start = whole()
    state = TrainState.create(
        apply_fn=pipe, params=pipe.place(start), tx=fpipe.optim.per_stage(CLIP())
    )
    plain = TrainState.create(apply_fn=None, params=start, tx=CLIP())
    placement = jax.tree.map(
        lambda a: getattr(a, "sharding", None), (state.params, state.opt_state)
    )
    for _ in range(3):
        _, grads = pipe.value_and_grad(mse)(state.params, X, X * 0.5)
        state = state.apply_gradients(grads=grads)
        _, grads = fpipe.sequential(layers(), chunks=2).value_and_grad(mse)(
            plain.params, X, X * 0.5
        )
        plain = plain.apply_gradients(grads=grads)
    assert_same(pipe.gather(state.params), plain.params, 1e-4)
    assert state.step == 3
    if executor == "placed":
        assert (
            jax.tree.map(lambda a: a.sharding, (state.params, state.opt_state))
            == placement
        )
    else:
        moved = jax.tree.map(
            lambda a, s: a.sharding.is_equivalent_to(s, a.ndim),
            state.params,
            placement[0],
        )
        assert all(jax.tree.leaves(moved))


def test_a_mesh_of_one_device_knows_what_all_have():
    def make():
        return optax.apply_if_finite(CLIP(), 2)

    pipe, plain = pipe_of("scan", 1), make()
    tx = fpipe.optim.per_stage(make())
    grads = grads_of(whole(), 0)
    params = pipe.place(whole())
    got: Any = jax.jit(tx.update)(pipe.place(grads), tx.init(params), params)
    want: Any = jax.jit(plain.update)(grads, plain.init(whole()), whole())
    assert_same(pipe.gather(got[0]), want[0], 2e-5)
    assert_same(fpipe.optim.gather(got[1]), want[1], 2e-5)


def test_global_norm():
    want = optax.tree.norm(whole())
    for executor in EXECUTORS:
        assert_same(
            jax.device_put(
                fpipe.optim.global_norm(pipe_of(executor).place(whole())),
                jax.devices()[0],
            ),
            want,
        )


@pytest.mark.parametrize("there", EXECUTORS)
@pytest.mark.parametrize("here", EXECUTORS)
def test_a_state_goes_to_another_partition(here, there):
    one, two = pipe_of(here, 2), pipe_of(there)
    tx = fpipe.optim.per_stage(OPTIMIZERS["adam"]())
    params = one.place(whole())
    _, state = tx.update(one.place(grads_of(whole(), 0)), tx.init(params), params)
    other = two.place(whole())
    moved = fpipe.optim.place(fpipe.optim.gather(state), other)
    assert jax.tree.structure(moved) == jax.tree.structure(tx.init(other))
    updates, _ = tx.update(two.place(grads_of(whole(), 1)), moved, other)
    plain = OPTIMIZERS["adam"]()
    _, state = jax.jit(plain.update)(grads_of(whole(), 0), plain.init(whole()))
    assert_same(
        two.gather(updates), jax.jit(plain.update)(grads_of(whole(), 1), state)[0]
    )


def test_errors():
    pipe, other = pipe_of("placed"), pipe_of("placed", 2)
    params, tx = pipe.place(whole()), fpipe.optim.per_stage(optax.adam(1e-2))
    state, grads = tx.init(params), pipe.place(grads_of(whole(), 0))
    fix = (
        "make one with `tx.init(params)`, or move this one with "
        "`fpipe.optim.place(state, params)`"
    )
    cpu = jax.devices()
    with raises(
        ValueError,
        f"`per_stage(tx).update`: state[0].mu[1]['b'] is on {cpu[0]}, but its "
        f"parameter params[1]['b'] is on {cpu[1]}: a state "
        f"of another partition, or one that was not placed; {fix}",
    ):
        tx.update(grads, tx.init(other.place(whole())), params)
    with pytest.raises(
        ValueError,
        match=r"the gradient grads\[1\]\['b'\] is on .*0, "
        r"but its parameter is on .*1; ",
    ):
        tx.update(other.place(whole()), state, params)
    with pytest.raises(
        ValueError,
        match=r"params\[0\]\['b'\] is not placed: it is a "
        r"ndarray.*`pipe.place\(params\)`",
    ):
        tx.init(jax.tree.map(np.asarray, whole()))
    with pytest.raises(
        ValueError,
        match=r"\.trace.*: the optimizer state is not of this transformation",
    ):
        tx.update(
            grads,
            fpipe.optim.per_stage(optax.sgd(0.1, momentum=0.9)).init(params),
            params,
        )
    with pytest.raises(
        ValueError, match="the gradients have another structure than the parameters"
    ):
        tx.update(grads[:-1], state, params)
    with pytest.raises(
        TypeError,
        match=r"`per_stage\(tx\).update` was called inside `jax.jit`.*one program",
    ):
        jax.jit(tx.update)(whole(), fpipe.optim.gather(state), whole())
    with pytest.raises(
        TypeError, match=r"`fpipe.optim.apply_updates` was called inside `jax.jit`"
    ):
        jax.jit(fpipe.optim.apply_updates)(whole(), whole())
    with raises(
        ValueError,
        "`per_stage(donate=['params'])`: some of 'state', 'grads'; 'params' is none",
    ):
        fpipe.optim.per_stage(optax.adam(1e-2), donate=["params"])
    with pytest.raises(TypeError, match=r"an optax\.GradientTransformation"):
        fpipe.optim.per_stage(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"bools in the structure of the parameters"):
        fpipe.optim.per_stage(optax.adam(1e-2), frozen=(True,)).init(params)
    shapes = jax.eval_shape(
        tx.update, grads, state, params
    )  # nothing runs, so that is allowed
    chex.assert_trees_all_equal_shapes_and_dtypes(
        shapes, tx.update(grads, state, params)
    )


def test_errors_of_packed_states():
    pipe, other = pipe_of("scan"), pipe_of("scan", 2)
    params, tx = pipe.place(whole()), fpipe.optim.per_stage(optax.adam(1e-2))
    wrong = tx.init(other.place(whole()))
    with pytest.raises(
        ValueError,
        match=r"state\[0\].mu is packed for another partition than the parameters; "
        r"make one with",
    ):
        jax.jit(tx.update)(pipe.place(grads_of(whole(), 0)), wrong, params)


def test_the_core_does_not_know_optax():
    code = "import sys, fpipe; assert 'optax' not in sys.modules; import fpipe.optim"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- loss scale ---


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_dynamic_loss_scale_is_what_one_by_hand_is(executor):
    half = jnp.float16
    model = [dense(), dense(6), dense()]
    pipe = fpipe.Pipe(model, [1] * 3, chunks=2, executor=executor, compute_dtype=half)
    reference = fpipe.sequential(model, chunks=2, compute_dtype=half)

    def plain():
        return optax.apply_if_finite(
            optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), 50
        )

    def loss_fn(y, target):
        return 40 * mse(y, target)

    start = reference.init(jax.random.key(0), X)
    tx = fpipe.optim.per_stage(plain())
    params, want = pipe.place(start), start
    state, moments = tx.init(params), plain().init(want)
    first, period = 2.0**17, 2
    scale, by_hand, good = (
        fpipe.optim.DynamicLossScale(jnp.float32(first), period=period),
        first,
        0,
    )
    adjusted = (
        jax.jit(lambda scale, grads: scale.adjusted(grads))
        if executor == "scan"
        else None
    )
    seen = []
    for _ in range(12):
        loss, grads = pipe.value_and_grad(loss_fn)(
            params, X, TARGET, loss_scale=scale.scale
        )
        updates, state = tx.update(grads, state, params)
        params = fpipe.optim.apply_updates(params, updates)
        scale = scale.adjusted(grads) if adjusted is None else adjusted(scale, grads)

        loss0, grads = reference.value_and_grad(loss_fn)(
            want, X, TARGET, loss_scale=by_hand
        )
        updates, moments = plain().update(grads, moments, want)
        want = optax.apply_updates(want, updates)
        finite = all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
        good = good + 1 if finite else 0
        by_hand = by_hand if finite else by_hand / 2
        if good == period:
            by_hand, good = by_hand * 2, 0
        seen.append(finite)
        assert (float(scale.scale), int(scale.steps)) == (by_hand, good)
        assert_same(loss, loss0, 2e-3)
    assert_same(pipe.gather(params), want, 2e-3)
    # It overflowed at first, then did not, was doubled, and overflowed again.
    assert not seen[0]
    assert any(a and not b for a, b in itertools.pairwise(seen))


def test_a_loss_scale_stays_between_one_and_the_largest_number():
    overflow, fine = jnp.array([jnp.inf]), jnp.array([1.0])
    assert fpipe.optim.DynamicLossScale(jnp.float32(1.0)).adjusted(overflow).scale == 1
    assert (
        fpipe.optim.DynamicLossScale(jnp.float32(2.0**127), period=1)
        .adjusted(fine)
        .scale
        == 2.0**127
    )
    assert (
        fpipe.optim.DynamicLossScale(jnp.float32(2.0), period=1, factor=4.0)
        .adjusted(fine)
        .scale
        == 8
    )


@pytest.mark.parametrize("executor", EXECUTORS)
def test_gradients_whose_squares_overflow_are_finite(executor):
    pipe = fpipe.Pipe([dense()] * 2, chunks=2, executor=executor)
    scale = fpipe.optim.DynamicLossScale(2.0**10, period=1)
    for value, want in ((300, 2.0**11), (jnp.inf, 2.0**9), (jnp.nan, 2.0**9)):
        params = pipe.init(jax.random.key(0), X)
        grads = jax.tree.map(
            lambda a, v=value: jnp.full_like(a, v, jnp.float16), params
        )
        adjusted = scale.adjusted(grads)
        assert adjusted.scale == want
        # Nothing is compiled for again with the next one.
        assert not adjusted.scale.weak_type
        assert not adjusted.steps.weak_type


# --- what lies on no device, or on all ---


def test_a_model_without_parameters_has_an_empty_update():
    for executor in EXECUTORS:
        pipe = fpipe.Pipe([fpipe.fn(jnp.tanh)] * 2, [1, 1], chunks=2, executor=executor)
        params, tx = pipe.init(jax.random.key(0), X), fpipe.optim.per_stage(CLIP())
        updates, state = tx.update(params, tx.init(params), params)
        assert jax.tree.leaves(fpipe.optim.gather(state)[1][0].mu) == []
        assert pipe.gather(fpipe.optim.apply_updates(params, updates)) == ((), ())


def test_updates_that_depend_on_no_gradient_are_made_on_the_mesh():
    pipe = pipe_of("scan")
    params, tx = pipe.place(whole()), fpipe.optim.per_stage(optax.set_to_zero())
    updates: Any = jax.jit(tx.update)(params, tx.init(params))[0]
    assert_same(pipe.gather(updates), jax.tree.map(jnp.zeros_like, whole()), 0)
    assert all(a.sharding.spec[0] == "stage" for a in updates.arrays)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_key_that_is_made_from_all_gradients(executor):
    def fold(grads, state, params=None):
        total = sum(jnp.sum(g > 0) for g in jax.tree.leaves(grads))
        return grads, jax.random.fold_in(state, total)

    def make():
        return transformation(lambda params: jax.random.key(3), fold)

    pipe, tx = pipe_of(executor), fpipe.optim.per_stage(make())
    params = pipe.place(whole())
    got: Any = tx.update(params, tx.init(params))[1]
    want: Any = make().update(whole(), make().init(whole()))[1]
    assert_same(jax.random.key_data(got), jax.random.key_data(want), 0)


def test_constants_of_each_leaf_stay_apart():
    """Devices whose steps differ in a constant alone have branches of their own."""

    def update(grads, state, params=None):
        del params
        leaves, treedef = jax.tree.flatten(grads)
        return treedef.unflatten(
            [g * np.full(g.shape, n + 1, np.float32) for n, g in enumerate(leaves)]
        ), state

    pipe = fpipe.Pipe([dense()] * 4, chunks=2, executor="scan")
    params = pipe.init(jax.random.key(0), X)
    tx = fpipe.optim.per_stage(transformation(lambda params: (), update))
    updates = jax.jit(tx.update)(params, tx.init(params))[0]
    assert_same(pipe.gather(updates), update(pipe.gather(params), ())[0])


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_factored_moments_are_cut_as_their_parameters_are(executor):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("stage", "model"))
    layer = fpipe.Layer(
        lambda w, x: x + jnp.tanh(x @ w) @ w.T,
        lambda key, x: jax.random.normal(key, (4, 6)),
        spec=PartitionSpec(None, "model"),
    )
    pipe = fpipe.Pipe([layer] * 2, chunks=2, mesh=mesh, executor=executor)
    x = jnp.ones((4, 4))
    params = pipe.init(jax.random.key(0), x)
    plain = optax.adafactor(1e-2, min_dim_size_to_factor=2)
    tx = fpipe.optim.per_stage(plain)
    state = tx.init(params)
    _, grads = pipe.value_and_grad(mse)(params, x, jnp.sin(x))
    updates, after = tx.update(grads, state, params)
    whole = pipe.gather(params)
    want, _ = plain.update(pipe.gather(grads), plain.init(whole), whole)
    assert_same(pipe.gather(updates), want)
    again = fpipe.optim.place(fpipe.optim.gather(after), params)
    # Under scan a moment begins with the axis of the stages.
    stages, rows = ((2,), ("stage",)) if executor == "scan" else ((), ())
    for found in (state, after, again):
        factored = {a.shape: a for a in jax.tree.leaves(found) if a.ndim}
        assert factored[*stages, 4].sharding.spec == PartitionSpec(*rows)
        columns = factored[*stages, 6]
        assert columns.sharding.spec == PartitionSpec(*rows, "model")
        assert columns.addressable_shards[0].data.nbytes == 6 * 4 // 2
