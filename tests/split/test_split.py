"""A pipe of a function that was split computes what the function computes, microbatch
by microbatch.
"""

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import fpipe
import fpipe.optim
from fpipe.testing import assert_equals_sequential
from tests.helpers import assert_same, in_turn
from tests.split.models import EXAMPLES, gpt, loss, plain, residual_mlp, rows

EXECUTORS = ("placed", "scan")


def pipe_of(split, executor, **options):
    options = {"chunks": 3, "devices": jax.devices()[:2]} | options
    return fpipe.Pipe(split, executor=executor, **options)


def step_of(pipe, example, placed, x=None):
    """Loss and gradients, in the function's own tree on one device."""
    step = pipe.value_and_grad(loss)
    value, grads = step(placed, example.x if x is None else x, **example.needs)
    return value, pipe.gather(grads)


# Each model is cut in another way, by marks, by paths, or by itself, and runs by
# another schedule. `python -m tests.split.table` runs all.
WAYS = {
    "residual_mlp": ({"stages": 2}, ("zb_h1", "1f1b")),
    "u_net": ({}, ("zb_v", "zb_v")),
    "gpt": ({}, ("interleaved_1f1b", "1f1b")),
    "two_inputs": ({"cuts": ["b"]}, ("1f1b", "zb_h1")),
    "scanned": ({"cuts": ["blocks/2"]}, ("eager_1f1b", "gpipe")),
    "encoder_decoder": ({"cuts": ["decoder/0"]}, ("1f1b", "1f1b")),
    "integers": ({}, ("gpipe", "1f1b")),
}


@pytest.mark.parametrize(("name", "executor"), in_turn(WAYS, EXECUTORS))
def test_a_pipe_computes_what_the_function_computes(name, executor):
    example = EXAMPLES[name]()
    how, schedules = WAYS[name]
    schedule = schedules[EXECUTORS.index(executor)]
    pipe = pipe_of(example.split(**how), executor, schedule=schedule)
    assert len(pipe.balance) == (4 if schedule in ("zb_v", "interleaved_1f1b") else 2)
    placed = pipe.place(example.params)
    assert_same(pipe.gather(placed), example.params)
    reference = jax.jit(
        jax.value_and_grad(lambda p: plain(example, p, 2), has_aux=True)
    )
    (want, y), want_grads = reference(example.params)
    value, grads = step_of(pipe, example, placed)
    assert_same(value, want)
    assert_same(grads, want_grads)
    assert_same(pipe(placed, example.x, **example.needs), y)


def test_every_model_is_run():
    assert set(WAYS) == set(EXAMPLES)


def test_what_it_computes_in_is_cast_before_the_function():
    """In bfloat16, cut in the middle: as the function on cast parameters and input."""
    example = residual_mlp()
    pipe = pipe_of(example.split(), "placed", compute_dtype=jnp.bfloat16)
    placed = pipe.place(example.params)
    layer: Any = pipe.model.layers[0].apply
    trace = layer.cut.trace(layer.cut.first)
    crossing = [str(trace.traced.graph.avals[v]) for v in trace.boundaries[0]]
    assert crossing == ["bfloat16[2,3]"]

    def cast(tree):
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)

    def want(params):
        return example.fn(cast(params), cast(example.x)).astype(jnp.float32)

    y = pipe(placed, example.x)
    assert_same(jax.device_get(y), jax.device_get(jax.jit(want)(example.params)), 2e-2)
    _, grads = pipe.value_and_grad(loss)(placed, example.x)
    wanted = jax.jit(jax.grad(lambda p: loss(want(p))))(example.params)
    assert_same(pipe.gather(grads), wanted, 2e-2)


def test_the_assertion_of_a_pipe_takes_a_split():
    example = residual_mlp()
    pipe = pipe_of(example.split(), "placed")
    assert_equals_sequential(pipe, example.x, loss_fn=loss, params=example.params)


def test_settings_make_other_traces():
    """What is traced in 64 bits is no trace for 32 bits, whichever comes first."""

    def fn(params, x):
        return fpipe.cut(x @ params["w"]) * jnp.ones(3, float).astype(x.dtype)

    params, x = {"w": jnp.eye(3)}, jnp.ones((2, 3))
    split = fpipe.split(fn, params, x)
    kinds = [split.cut.trace(split.cut.first)]
    with jax.enable_x64(True):
        kinds.append(split.cut.trace(split.cut.first))
    dtypes = [
        {str(a.dtype) for a in kind.traced.graph.avals.values()} for kind in kinds
    ]
    assert [("float64" in found) for found in dtypes] == [False, True]


def test_placed_parameters_and_gradients_are_the_functions_own_tree():
    example = gpt()
    pipe = pipe_of(example.split(cuts=["h/1"]), "placed")
    placed = pipe.place(example.params)
    first, second = pipe.devices
    want = {
        "embed": {first},
        "h": [{key: {d} for key in ("out", "qkv")} for d in (first, second)],
    }
    assert jax.tree.map(lambda a: a.devices(), placed) == want
    _, grads = pipe.value_and_grad(loss)(placed, example.x, **example.needs)
    assert jax.tree.map(lambda a: a.devices(), grads) == want


@pytest.mark.parametrize("executor", EXECUTORS)
def test_evaluation_and_a_smaller_last_microbatch_are_cut_at_the_same_places(executor):
    example = gpt()
    pipe = pipe_of(example.split(), executor)
    placed, x = pipe.place(example.params), rows(example.x, 0, 5)
    y = pipe(placed, x)
    want = jax.jit(example.fn)(example.params, x)
    assert_same(jax.device_get(y), jax.device_get(want))


def test_gradients_from_outside_have_the_functions_own_tree():
    example = residual_mlp()
    pipe = pipe_of(example.split(), "placed")
    placed = pipe.place(example.params)
    grads = jax.grad(lambda p: loss(pipe(p, example.x)))(placed)
    want = jax.jit(jax.grad(lambda p: loss(example.fn(p, example.x))))(example.params)
    assert_same(pipe.gather(grads), want)


def test_frozen_parameters_go_by_the_functions_own_paths():
    example = residual_mlp()
    pipe = pipe_of(example.split(), "placed")
    placed = pipe.place(example.params)
    flags = {"in": True, "blocks": False}
    for frozen in (flags, lambda path, a: path == "in"):
        step = pipe.value_and_grad(loss, frozen=frozen)
        _, grads = step(placed, example.x)
        assert grads["in"].dtype == jax.dtypes.float0
        assert grads["blocks"][1]["w"].dtype == jnp.float32
    with pytest.raises(ValueError, match="a pytree of bools that the parameters begin"):
        pipe.value_and_grad(loss, frozen={"in": True})


def test_an_optimizer_sees_the_functions_own_tree():
    example = residual_mlp()
    pipe = pipe_of(example.split(), "placed")
    own = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, 0.9))
    tx = fpipe.optim.per_stage(own)
    placed = pipe.place(example.params)
    state = tx.init(placed)
    _, grads = pipe.value_and_grad(loss)(placed, example.x)
    updates, _ = tx.update(grads, state, placed)
    _, want_grads = jax.jit(
        jax.value_and_grad(lambda p: plain(example, p, 2), has_aux=True)
    )(example.params)
    want, _ = jax.jit(own.update)(want_grads, own.init(example.params))
    assert_same(pipe.gather(updates), want)


@pytest.mark.quick
def test_a_split_and_its_pipe_are_values():
    example = residual_mlp()
    split = example.split()
    pipe = pipe_of(split, "placed")
    again = pickle.loads(pickle.dumps(pipe))
    assert again == pipe
    assert again.layers == split
    assert example.split() == split
    assert example.split(cuts=["blocks/1"]) != split
    placed = again.place(example.params)
    assert_same(again.gather(placed), example.params)


def test_equal_blocks_are_one_core_under_scan():
    """Their arrays are stacked without padding, although a mask goes to each, and the
    matrix of the embedding is the head's too.
    """
    block = {"w": jnp.eye(2), "b": jnp.ones(2)}

    def blocks(params, x):
        h = x["a"] @ params["embed"]
        for p in params["h"]:
            h = fpipe.cut(h)
            h = jnp.where(x["mask"], h + jnp.tanh(h @ p["w"] + p["b"]), h)
        return fpipe.cut(h) @ params["embed"].T

    params = {"embed": jnp.ones((3, 2)), "h": [block] * 3}
    x = {"a": jnp.ones((4, 3)), "mask": jnp.ones((4, 1), bool)}
    split = fpipe.split(blocks, params, x)
    assert [layer.name for layer in split.layers[1:4]] == ["h/*"] * 3
    pipe = fpipe.Pipe(split, balance=[2, 1, 2], chunks=2, executor="scan")
    shapes = sorted(a.shape for a in jax.tree.leaves(pipe.place(params)))
    # The embedding is the first device's alone: there are zeros on the others.
    assert shapes == [(3, 2), (3, 2, 2), (3, 3, 2)]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_side_effects_run_where_they_stand(executor):
    """Once for each microbatch, also where they read parameters or nothing."""
    log = []

    def told(name, *values):
        jax.debug.callback(lambda *a: log.append((name, *map(float, a))), *values)

    def fn(params, x):
        told("begin")
        h = x @ params["a"]
        told("first", h[0, 0])
        h = fpipe.cut(h)
        told("weight", params["b"][0, 0])
        h = h @ params["b"]
        told("second", h[0, 0])
        return h

    params = {"a": jnp.eye(2), "b": 3.0 * jnp.eye(2)}
    x = jnp.arange(8.0).reshape(4, 2)
    split = fpipe.split(fn, params, x)
    trace = split.cut.trace(split.cut.first)
    kinds = [[node.name for node in piece.nodes] for piece in trace.pieces]
    assert [names.count("debug_callback") for names in kinds] == [2, 2]
    pipe = pipe_of(split, executor, chunks=2)
    jax.block_until_ready(pipe(pipe.place(params), x))
    jax.effects_barrier()
    # JAX does not say in which order those of one program run.
    of_microbatches = [("first", 0.0), ("first", 4.0), ("second", 0.0), ("second", 12)]
    assert sorted(log) == [*[("begin",)] * 2, *of_microbatches, *[("weight", 3.0)] * 2]


def attend(p, h, mask, key):
    """A block with a mask, and dropout where there is a key."""
    h = jnp.where(mask, h + jnp.tanh(h @ p["w"]), h)
    if key is None:
        return h
    return jnp.where(jax.random.bits(key, h.shape) % 2 == 0, h, 0.0)


def language_model(params, x, *, key: Any = None, train=False):
    h = params["embed"][x["tokens"]]
    keys = jax.random.split(key, 3) if train else [None] * 3
    for p, own in zip(params["h"], keys, strict=True):
        h = attend(p, fpipe.cut(h), x["mask"], own)
    return fpipe.cut(h) @ params["embed"].T


def layers_by_hand():
    """The same: the mask is a skip, and each layer has a key of its own."""

    def embed(table, x, *, carry):
        return table[x["tokens"]], fpipe.stash(carry, "mask", x["mask"])

    def block(p, h, *, carry, key=None, train=False):
        return attend(p, h, fpipe.peek(carry, "mask"), key if train else None), carry

    def last(p, h, *, carry, key=None, train=False):
        mask, carry = fpipe.pop(carry, "mask")
        return attend(p, h, mask, key if train else None), carry

    def head(p, h, *, borrowed):
        return h @ borrowed["embed"].T

    return [
        fpipe.Layer(embed, name="embed", stash=["mask"]),
        *[fpipe.Layer(block, name="block", peek=["mask"])] * 2,
        fpipe.Layer(last, name="block", pop=["mask"]),
        fpipe.Layer(head, name="head", borrow=["embed"]),
    ]


def test_as_many_programs_and_arrays_as_layers_by_hand():
    """With an embedding in front that is the head's too, a mask and dropout."""
    params = {"embed": jnp.ones((5, 2)), "h": [{"w": jnp.eye(2)}] * 3}
    x = {"tokens": jnp.zeros(4, int), "mask": jnp.ones((4, 1), bool)}
    needs = {"key": jax.random.key(0), "train": True}
    split = fpipe.split(language_model, params, rows(x, 0, 2), **needs)
    by_hand = (params["embed"], *params["h"], ())
    programs, arrays = [], []
    for layers, own in ((split, params), (layers_by_hand(), by_hand)):
        # The second stage and the third are equal, and on the same device.
        first, second = jax.devices()[:2]
        devices = [first, second, second, first]
        pipe = fpipe.Pipe(layers, [1, 1, 1, 2], devices, 2, checkpoint="always")
        programs.append(pipe.compile(pipe.place(own), x, loss_fn=loss, **needs))
        pipe = fpipe.Pipe(layers, [2, 1, 2], chunks=2, executor="scan")
        arrays.append(sorted(a.shape for a in jax.tree.leaves(pipe.place(own))))
    assert programs[0] == programs[1]
    assert arrays[0] == arrays[1]
    # One array for the blocks of three stages, and the embedding's.
    assert arrays[0] == [(3, 2, 2), (3, 5, 2)]


def test_pipes_refuse_what_a_split_function_has_not():
    example = residual_mlp()
    split = example.split()
    with pytest.raises(ValueError, match="deferred_batch_norm"):
        fpipe.Pipe(split, deferred_batch_norm=True)
    with pytest.raises(TypeError, match="takes the place of all layers"):
        fpipe.Pipe([split, fpipe.fn(jnp.tanh)])
    pipe = pipe_of(split, "placed")
    with pytest.raises(TypeError, match="shapes have nothing that can be placed"):
        pipe.place(split.param_shapes)
    with pytest.raises(TypeError, match="makes no parameters"):
        pipe.init(jax.random.key(0), example.x)
    with pytest.raises(ValueError, match="a tree as the function was split with"):
        pipe.place({"in": example.params["in"]})
    wrong = jax.tree.map(lambda a: a.astype(jnp.bfloat16), example.params)
    with pytest.raises(ValueError, match="the parameter 'in' is bfloat16"):
        pipe(pipe.place(wrong), example.x)
