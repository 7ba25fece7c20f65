"""`fpipe.value_and_grad` computes what `jax.value_and_grad` computes: on the whole
batch where the function is a mean over rows, and microbatch by microbatch else.
"""

import collections
import gc
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import Primitive
from jax.sharding import PartitionSpec

import fpipe
import fpipe.optim
from fpipe._split.init import Init
from tests.helpers import assert_same, noise

EXECUTORS = ("placed", "scan")
WIDTH = 3

# How often the Python of each loss function ran.
traces = collections.Counter[str]()


def blocks(params, h):
    h = h @ params["embed"]
    for block in params["blocks"]:
        h = h + jnp.tanh(h @ block["w"] + block["b"])
    return h


def loss_fn(params, batch, weight, scale=1.0, *, key=None, causal=False):
    """A mean over rows, with an auxiliary output for all rows and one for each."""
    traces["loss_fn"] += 1
    h = blocks(params, batch["x"])
    if key is not None:
        h = jnp.where(noise(key, h.shape) < 0.0, h, 0.0)
    if causal:
        h = jnp.cumsum(h, 1)
    error = ((h @ params["embed"].T - batch["y"]) ** 2).mean(1) * weight
    return scale * error.mean(), {"rows": fpipe.PerRow(error), "largest": error.max()}


def init(key):
    embed, *others = jax.random.split(key, 5)
    return {
        "embed": jax.random.normal(embed, (WIDTH, WIDTH)),
        "blocks": [
            {
                "w": jax.random.truncated_normal(k, -1.0, 1.0, (WIDTH, WIDTH)),
                "b": jnp.full(WIDTH, 0.1),
            }
            for k in others
        ],
    }


def params_of():
    return init(jax.random.key(0))


def batch_of(count=6):
    x = noise(jax.random.key(1), (count, WIDTH))
    return {"x": x, "y": jnp.sin(x)}, noise(jax.random.key(2), (count,))


def step_of(executor="placed", fn=loss_fn, **options):
    options = {"devices": jax.devices()[:2], "chunks": 3, "has_aux": True} | options
    return fpipe.value_and_grad(fn, executor=executor, **options)


def rows(tree, start, stop):
    return jax.tree.map(lambda a: a[start:stop], tree)


@pytest.fixture(scope="module", params=EXECUTORS)
def step(request):
    """A step of each executor that several tests use, and placed parameters."""
    made = step_of(request.param, init=init)
    batch, weight = batch_of()
    return made, made.place(params_of(), batch, weight)


def in_plain_jax(function, params, *args, **kwargs):
    """`jax.value_and_grad` of the whole batch; the loss is a mean over rows."""
    return jax.jit(
        jax.value_and_grad(lambda p: function(p, *args, **kwargs), has_aux=True)
    )(params)


@pytest.mark.quick
def test_it_computes_what_jax_computes(step):
    """Also of five rows in three microbatches, with a number, and without a key."""
    step, params = step
    assert_same(step.gather(params), params_of())
    for count in (6, 5):
        batch, weight = batch_of(count)
        (value, aux), grads = step(params, batch, weight, 0.5)
        (want, want_aux), want_grads = in_plain_jax(
            loss_fn, params_of(), batch, weight, 0.5
        )
        assert_same(value, want)
        assert_same(step.gather(grads), want_grads)
        assert_same(aux["rows"], want_aux["rows"].value)
        assert aux["largest"].shape == (3,)
        assert_same(aux["largest"].max(), want_aux["largest"])
        assert_same(step.evaluate(params, batch, weight, scale=0.5)[0], want)


def test_each_microbatch_has_its_own_key(step):
    step, params = step
    (batch, weight), key = batch_of(), jax.random.key(3)
    (value, _), grads = step(params, batch, weight, key=key)

    def plain(p):
        own = [jax.random.fold_in(jax.random.fold_in(key, 0), i) for i in range(3)]
        return sum(
            loss_fn(p, *rows((batch, weight), 2 * i, 2 * i + 2), key=own[i])[0]
            for i in range(3)
        ) / len(own)

    want, want_grads = jax.jit(jax.value_and_grad(plain))(params_of())
    assert_same(value, want)
    assert_same(step.gather(grads), want_grads)


def test_what_is_static_is_traced_for_each_value_and_cut_alike(step):
    """Placed parameters fit all of them; numbers and arrays are traced once."""
    step, params = step
    batch, weight = batch_of()
    (value, _), _ = step(params, batch, weight, causal=True)
    (want, _), _ = in_plain_jax(loss_fn, params_of(), batch, weight, causal=True)
    assert_same(value, want)
    step(params, batch, weight, 2.0)
    before = traces["loss_fn"]
    for scale in (3.0, np.float32(4.0)):
        step(params, rows(batch, 0, 6), weight + 1.0, scale)
    assert traces["loss_fn"] - before <= 1  # a number of numpy is of another type
    step(params, batch, weight, 5.0, causal=True)


def noisy(params, x, train=False, key: Any = None):
    first, *others = params["blocks"]
    middle = blocks(params | {"blocks": [first]}, x)
    h = middle
    for n, block in enumerate(others):
        h = h + jnp.tanh(h @ block["w"] + block["b"])
        if train:
            h = h + noise(jax.random.fold_in(key, n), h.shape) + middle
    return jnp.mean(h**2)


def test_a_call_may_read_more_than_the_one_that_it_was_built_by():
    """Where only training draws, and hands the middle of the model to the end."""
    step, x = step_of(fn=noisy, has_aux=False), batch_of()[0]["x"]
    params = step.place(params_of(), x)
    first = step.pipe
    assert_same(
        jax.device_get(step.evaluate(params, x)),
        jax.device_get(jax.jit(noisy)(params_of(), x)),
    )
    assert step.pipe is first
    key = jax.random.key(3)
    value, grads = step(params, x, train=True, key=key)
    assert step.pipe is not first
    assert step.pipe.balance == first.balance

    def plain(p):
        own = [jax.random.fold_in(jax.random.fold_in(key, 0), i) for i in range(3)]
        parts = [noisy(p, x[2 * i : 2 * i + 2], True, own[i]) for i in range(3)]
        return sum(parts) / 3

    want, want_grads = jax.jit(jax.value_and_grad(plain))(params_of())
    assert_same(value, want)
    assert_same(step.gather(grads), want_grads)
    last = step.pipe
    step(params, x)
    assert step.pipe is last


def test_parameters_stay_where_they_were_placed():
    """A call that uses one in an earlier piece would have it elsewhere; one that hands
    on more may need stages of another form.
    """

    def moving(params, x, early=False):
        h = jnp.tanh(x @ params["a"])
        if early:
            h = h @ params["b"]
        return jnp.mean(fpipe.cut(h) @ params["b"])

    params = dict.fromkeys("ab", jnp.eye(WIDTH))
    step, x = step_of(fn=moving, has_aux=False), batch_of()[0]["x"]
    placed = step.place(params, x)
    with pytest.raises(ValueError, match="uses values in other pieces"):
        step(placed, x, early=True)
    step(placed, x)
    step = step_of("scan", noisy, has_aux=False)
    packed = step.place(params_of(), x)
    with pytest.raises(ValueError, match="uses values in other pieces"):
        step(packed, x, train=True, key=jax.random.key(0))


def test_named_static_arguments_are_values():
    def power(params, x, n, how):
        traces["power"] += 1
        assert (type(n), how) == (int, ("sum", 2))
        return jnp.mean((x @ params["a"] @ params["b"]) ** n)

    params = {"a": jnp.eye(WIDTH), "b": jnp.eye(WIDTH)}
    step = step_of(fn=power, has_aux=False, static_argnames=("n", "how"))
    x = batch_of()[0]["x"]
    placed = step.place(params, x, 2, ("sum", 2))
    for n in (2, 3, 2, 3):
        value, _ = step(placed, x, n, how=("sum", 2))
        assert_same(jax.device_get(value), jax.device_get(jnp.mean(x**n)))
    # One for each value, and one that looks at what a function does with rows.
    assert traces["power"] == 3


def test_under_scan_it_stands_in_the_users_own_jit():
    step = step_of("scan")
    batch, weight = batch_of()
    params = step.place(params_of(), batch, weight)

    @jax.jit
    def sgd(params, batch, weight):
        (value, _), grads = step(params, batch, weight)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    value, updated = sgd(params, batch, weight)
    (want, _), grads = in_plain_jax(loss_fn, params_of(), batch, weight)
    assert_same(value, want)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params_of(), grads)
    assert_same(step.gather(updated), expected)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_state_goes_from_microbatch_to_microbatch(executor):
    def centred(params, x, state):
        h = x @ params["embed"] - state["mean"]
        mean = 0.9 * state["mean"] + 0.1 * x.mean(0)
        new = {"mean": mean, "count": state["count"] + 1}
        h = blocks(params | {"embed": jnp.eye(WIDTH)}, h)
        return (jnp.mean(h**2), {"largest": h.max()}), new

    x = batch_of()[0]["x"]
    start = {"mean": jnp.full(WIDTH, 0.5), "count": jnp.int32(3)}
    step = step_of(executor, centred)
    params = step.place(params_of(), x, start)
    ((value, aux), state), grads = step(params, x, start)

    def plain(p):
        total, own = 0.0, start
        for i in range(3):
            (part, _), new = centred(p, x[2 * i : 2 * i + 2], own)
            total, own = total + part / 3, jax.lax.stop_gradient(new)
        return total, own

    (want, want_state), want_grads = jax.jit(jax.value_and_grad(plain, has_aux=True))(
        params_of()
    )
    assert_same(value, want)
    assert_same(jax.device_get(state), jax.device_get(want_state))
    assert_same(step.gather(grads), want_grads)
    assert aux["largest"].shape == (3,)
    if executor == "placed":
        (value, _), state = step.evaluate(params, x, state=start)
        assert_same(jax.device_get(value), jax.device_get(want))
        assert step.compile(params, x, start) == step.compile(params, x, start)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_weights_of_tokens_and_ready_made_microbatches(executor):
    """The sum over all tokens by their number, of sequences of two lengths under the
    placed executor; gradients of two calls are added up.
    """

    def tokens(params, batch, ends):
        h = blocks(params, batch["x"]).sum(-1)
        return (h * batch["mask"]).sum() + 0.0 * ends, batch["mask"].sum()

    lengths = (2, 4) if executor == "placed" else (3, 3)
    pieces = [
        {
            "x": noise(jax.random.key(length), (2, length, WIDTH)),
            "mask": (noise(jax.random.key(n), (2, length)) < 0.5).astype(jnp.float32),
        }
        for n, length in enumerate(lengths)
    ]
    step = step_of(executor, tokens, has_aux=False, reduction="weighted")
    batch = fpipe.Microbatches(pieces)
    params = step.place(params_of(), batch, 1)
    value, grads = step(params, batch, 1)

    def plain(p):
        sums, counts = zip(*(tokens(p, piece, 1) for piece in pieces), strict=True)
        return sum(sums) / sum(counts)

    want, want_grads = jax.jit(jax.value_and_grad(plain))(params_of())
    assert_same(value, want)
    assert_same(step.gather(grads), want_grads)
    _, twice = step(params, batch, 1, grads=grads, loss_scale=8.0)
    assert_same(step.gather(twice), jax.tree.map(lambda g: 2 * g, want_grads))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_parameters_are_made_where_they_live(executor):
    """The numbers are those of the user's function; each stage draws its own alone."""
    drawn = []

    def watched(key):
        assert "Tracer" in type(key).__name__  # no array is made in it
        drawn.append(key)
        return init(key)

    step = step_of(executor, init=watched)
    batch, weight = jax.eval_shape(batch_of)
    params = step.init(jax.random.key(0), batch, weight)
    assert len(drawn) == 2  # for the shapes, and for the programs
    for got, want in zip(
        jax.tree.leaves(step.gather(params)), jax.tree.leaves(params_of()), strict=True
    ):
        np.testing.assert_array_equal(got, want, strict=True)
    if executor == "placed":
        placed = step.pipe.place(params_of())
        assert jax.tree.map(lambda a: a.devices(), params) == jax.tree.map(
            lambda a: a.devices(), placed
        )


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.usefixtures("own_heap")
def test_no_device_holds_more_than_its_own_parameters(executor):
    """Not while they are made either: each array looks at what is alive by then."""
    held = []

    def bytes_by_device():
        found = collections.Counter[jax.Device]()
        for array in jax.live_arrays():
            share = math.prod(array.sharding.shard_shape(array.shape))
            for device in array.devices():
                found[device] += share * array.dtype.itemsize
        return found

    def look(a):
        held.append(bytes_by_device() - before)
        return a

    looking = Primitive("looking")
    looking.def_impl(look)
    looking.def_abstract_eval(lambda a: a)

    def init(key):
        keys = jax.random.split(key, 6)
        return [looking.bind(jax.random.normal(k, (32, 32))) for k in keys]

    def chain(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    step = step_of(executor, chain, has_aux=False, init=init)
    gc.collect()
    before = bytes_by_device()
    params = step.init(jax.random.key(0), jax.ShapeDtypeStruct((6, 32), jnp.float32))
    one = 32 * 32 * 4
    for now in (*held, bytes_by_device() - before):
        assert max(now.values()) < 3 * one + one / 2  # with keys
    assert [sum(now.values()) // one for now in held] == [1, 2, 3, 4, 5, 6]
    assert_same(step.gather(params), jax.device_get(init(jax.random.key(0))), 0.0)


def test_a_piece_makes_its_own_parameters_alone():
    step = step_of(init=init)
    batch, weight = jax.eval_shape(batch_of)
    step.plan(None, batch, weight)
    traced = Init.of(init, jax.random.key(0), (), {}).traced(step.split.params)
    drawn = []
    for k, own in enumerate(step.split.params(params_of())):
        nodes, _ = traced.needed(k)
        names = [str(node.eqn.params.get("name")) for node in nodes]
        drawn.append(sum("normal" in name for name in names))
        assert drawn[-1] == sum(a.ndim == 2 for a in jax.tree.leaves(own))
    assert sum(drawn) == 5


def test_an_init_function_that_is_jitted_is_opened_up():
    """A piece runs its own part of the one program, not all of it."""
    step = step_of(init=jax.jit(init))
    params = step.init(jax.random.key(0), *batch_of())
    assert_same(step.gather(params), params_of())
    assert len({a.device for a in jax.tree.leaves(params)}) == 2
    traced = Init.of(jax.jit(init), jax.random.key(0), (), {})
    traced = traced.traced(step.split.params)
    for k, own in enumerate(step.split.params(params_of())):
        nodes, _ = traced.needed(k)
        drawn = sum(node.name == "random_bits" for node in nodes)
        assert drawn == sum(a.ndim == 2 for a in jax.tree.leaves(own))


def test_an_init_function_gets_the_batch_if_it_requires_it():
    def of_batch(key, batch, weight):
        made = init(key)
        return made | {"embed": made["embed"] + batch["x"].mean() + weight.sum()}

    step = step_of(init=of_batch)
    batch, weight = batch_of()
    params = step.init(jax.random.key(0), batch, weight)
    want = jax.jit(of_batch)(jax.random.key(0), batch, weight)
    assert_same(step.gather(params), jax.device_get(want))
    # Of shapes it gets zeros.
    made = step.init(jax.random.key(0), *jax.eval_shape(batch_of))
    assert_same(step.gather(made)["embed"], params_of()["embed"])


def test_one_trace_is_enough_for_the_plan_the_programs_and_the_step():
    def once(params, x):
        traces["once"] += 1
        return jnp.mean(blocks(params, x) ** 2)

    step = step_of(fn=once, has_aux=False)
    x = batch_of()[0]["x"]
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    step.plan(jax.eval_shape(params_of), shape)
    # One to be cut and run, and one that looks at what it does with rows.
    assert traces["once"] == 2
    assert step.compile(jax.eval_shape(params_of), shape) > 0
    params = step.place(params_of(), x)
    step(params, x)
    assert traces["once"] == 2


@pytest.mark.parametrize("executor", EXECUTORS)
def test_nothing_but_the_loss_leaves_the_last_piece(executor):
    """Of a head that is many times wider than the model."""

    def wide(params, x):
        h = x @ params["a"]
        return jnp.mean(jax.nn.logsumexp(h @ params["head"], -1))

    params = {"a": jnp.eye(WIDTH), "head": jnp.ones((WIDTH, 1000))}
    shapes = jax.eval_shape(lambda: (params, batch_of()[0]["x"]))
    step = step_of(executor, wide, has_aux=False, cuts=["head"])
    plan = step.plan(*shapes)
    assert [row.params for row in plan.stages] == [WIDTH * WIDTH, WIDTH * 1000]
    trace = step.split.cut.trace(step.split.cut.first)
    graph = trace.traced.graph
    assert [graph.avals[v].shape for v in graph.outputs] == [()]
    # A float32 for each microbatch at most, and one for their sum.
    outputs = [row.memory.get("outputs", 0) for row in plan.devices]
    assert max(outputs) <= 4 * (3 + 1)


def test_options_of_a_pipe():
    """Frozen parameters by path, another schedule, bfloat16, parameters that come
    second; an optimizer sees the function's own tree.
    """

    def second(batch, params):
        return loss_fn(params, *batch)[0]

    tx = fpipe.optim.per_stage(optax.sgd(0.1, 0.9))
    step = step_of(
        fn=second,
        has_aux=False,
        argnums=1,
        schedule="zb_h1",
        checkpoint="never",
        frozen=lambda path, a: path == "blocks/0/w",
        cuts=["blocks/2"],
    )
    batch = batch_of()
    params = step.place(batch, params_of())
    assert (len(step.split), step.pipe.schedule) == (2, "zb_h1")
    _, grads = step(batch, params)
    assert grads["blocks"][0]["w"].dtype == jax.dtypes.float0
    _, want = in_plain_jax(loss_fn, params_of(), *batch)
    assert_same(step.gather(grads)["blocks"][1:], want["blocks"][1:])
    grads["blocks"][0]["w"] = jnp.zeros_like(params["blocks"][0]["w"])
    updates, _ = tx.update(grads, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params_of())


def test_arguments_of_the_function_come_before_those_of_the_step():
    def decoder(params, x, memory):
        return jnp.mean(x @ params["a"] + memory @ params["b"])

    params = dict.fromkeys("ab", jnp.eye(WIDTH))
    step, x = step_of(fn=decoder, has_aux=False), batch_of()[0]["x"]
    plan = step.plan(params, x, memory=x)
    assert [row.name for row in plan.inputs] == ["x['memory']", "x['x']"]
    assert all(row.limit is None for row in plan.devices)
    placed = step.place(params, x, x, donate=True)
    assert_same(step.gather(placed), dict.fromkeys("ab", jnp.eye(WIDTH)))


def test_tuning_finds_another_pipe_of_the_same_pieces():
    step = step_of(init=init, chunks=2)
    batch, weight = jax.eval_shape(batch_of)
    tuning = step.tune(None, batch, weight, chunks=[3], schedules=["gpipe", "zb_h1"])
    assert {c.schedule for c in tuning.candidates} == {"gpipe", "zb_h1"}
    tuned = step.with_pipe(tuning.pipe)
    assert tuned.pipe == tuning.pipe
    # A candidate is predicted as the step is, with all its gradients.
    every = step_of(
        init=init, chunks=2, argnums=(0, 2), frozen=lambda path, array: path == "embed"
    )
    (found,) = every.tune(
        None, batch, weight, chunks=3, schedules="gpipe", checkpoints="never"
    ).candidates
    assert found.prediction is not None
    assert found.pipe is not None
    plan = every.with_pipe(found.pipe).plan(None, batch, weight)
    assert found.prediction.as_dict() == plan.as_dict()
    batch, weight = batch_of()
    params = tuned.place(params_of(), batch, weight)
    (value, aux), _ = tuned(params, batch, weight)
    want, _ = in_plain_jax(loss_fn, params_of(), batch, weight)
    assert_same(value, want[0])
    assert aux["largest"].shape == (3,)
    other: Any = step
    with pytest.raises(TypeError, match="a pipe of this step's pieces"):
        step.with_pipe(other)


def test_what_a_microbatch_changes_is_told_of_the_loss_and_not_of_aux():
    """The aux of `loss_fn` has a maximum over rows, and is silent in all tests here."""

    def bent(params, x):
        return jnp.sqrt(jnp.mean(blocks(params, x) ** 2))

    with pytest.warns(UserWarning, match="which is no sum or mean over them"):
        step_of(fn=bent, has_aux=False).place(params_of(), batch_of()[0]["x"])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_stage_on_several_devices(executor):
    """Rows are shared by the two devices of a stage, whose axis the function names."""

    def constrained(params, batch, weight):
        shared = jax.lax.with_sharding_constraint(batch["x"], PartitionSpec("data"))
        return loss_fn(params, batch | {"x": shared}, weight)[0]

    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("stage", "data"))
    step = step_of(executor, constrained, devices=None, mesh=mesh, has_aux=False)
    batch, weight = batch_of()
    params = step.place(params_of(), batch, weight)
    value, grads = step(params, batch, weight)
    (want, _), want_grads = in_plain_jax(loss_fn, params_of(), batch, weight)
    assert_same(jax.device_get(value), jax.device_get(want))
    assert_same(jax.device_get(step.gather(grads)), jax.device_get(want_grads))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_gradients_of_the_batch(executor):
    """Of arrays cut by rows, of a number, and in the order that is asked."""
    batch, weight = batch_of()
    step = step_of(executor, argnums=(0, 3, 1), cuts=["blocks/2"])
    placed = step.place(params_of(), batch, weight, 0.5)
    run = jax.jit(step) if executor == "scan" else step
    (value, _), grads = run(placed, batch, weight, 0.5)
    plain = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 3, 1), has_aux=True))
    (want, _), want_grads = plain(params_of(), batch, weight, 0.5)
    assert_same(value, want)
    assert_same((step.gather(grads[0]), *grads[1:]), want_grads)
    if executor == "placed":
        # Added to those of an earlier call; an argument may be given by name.
        _, twice = step(placed, weight=weight, batch=batch, scale=0.5, grads=grads)
        assert_same(twice[1:], jax.tree.map(lambda g: 2 * g, grads[1:]))
        assert step.compile(placed, batch, weight, 0.5) > 0
        # One, as a sequence.
        _, one = step_of(argnums=[0], cuts=["blocks/2"])(placed, batch, weight)
        assert_same(one, (in_plain_jax(loss_fn, params_of(), batch, weight)[1],))
        with pytest.raises(TypeError, match="gives no 'scale', and"):
            step(placed, batch, weight)


# --- errors ---


def test_arguments_that_are_wrong():
    def refused(text, kind: Any = TypeError, fn: Any = loss_fn, **options):
        with pytest.raises(kind, match=text):
            step_of(fn=fn, **options)

    refused("is not callable", fn=params_of())
    refused("has_aux is a bool", has_aux=1.0)
    refused("reduction='median'", ValueError, reduction="median")
    refused("one pytree. Put several trees", argnums=(0, 0))
    refused("one pytree. Put several trees", argnums=())
    refused("no such positional parameter", argnums=(0, 7))
    static: Any = {"argnums": (0, 3), "static_argnames": "scale"}
    refused("'scale' of 'loss_fn' has no gradient", **static)
    refused("no such positional parameter", argnums=7)
    refused("names of arguments", static_argnames=3)
    refused("'causl' is no argument", ValueError, static_argnames="causl")
    refused("'params' is no argument", ValueError, static_argnames="params")
    refused("a function that makes the parameters", init=params_of())
    refused("no layers of batch norm", ValueError, deferred_batch_norm=True)
    refused("chunks must be at least 1", ValueError, chunks=0)
    refused("would be constants", fn=jax.tree_util.Partial(loss_fn, params_of()))
    refused("has no signature", fn=min)


def test_calls_that_are_wrong():
    step = step_of()
    batch, weight = batch_of()
    params = params_of()
    with pytest.raises(ValueError, match="before the shapes are known"):
        _ = step.pipe
    with pytest.raises(TypeError, match=r"takes what 'loss_fn' does, .*'weight'"):
        step.place(params, batch)
    with pytest.raises(TypeError, match="has no array with rows"):
        step.place(params, {"x": 1.0}, None)
    with pytest.raises(TypeError, match="a PRNG key, with which all microbatches"):
        step.place(params, batch | {"rng": jax.random.key(0)}, weight)
    with pytest.raises(TypeError, match="give the parameters, or their shapes"):
        step.plan(None, batch, weight)
    with pytest.raises(TypeError, match="the function that makes the parameters"):
        step.init(jax.random.key(0), batch, weight)
    with pytest.raises(ValueError, match="on the wrong device") as caught:
        step(params, batch, weight)
    place = "put them there with `params = step.place(params, batch)`"
    assert str(caught.value).endswith(place)
    placed = step.place(params, batch, weight)
    with pytest.raises(ValueError, match=r"`x.*` of shape .* has") as caught:
        step(placed, batch, weight[:3])
    assert "the batch's arguments by name" in caught.value.__notes__[-1]
    packed = step_of("scan").place(params, batch, weight)
    with pytest.raises(ValueError, match="packed already"):
        step_of("scan")(packed, batch, weight)


def test_functions_that_are_wrong():
    batch = batch_of()
    cases = [
        ("must return a scalar loss", lambda p, b: blocks(p, b[0]["x"])),
        ("say has_aux=True", lambda p, b: loss_fn(p, *b)),
    ]
    for text, fn in cases:
        with pytest.raises(TypeError, match=text):
            step_of(fn=fn, has_aux=False).place(params_of(), batch)

    def stateful(params, x, state):
        return jnp.mean(blocks(params, x)), state

    x = batch[0]["x"]
    with pytest.raises(TypeError, match="a new state alone is no aux"):
        step_of(fn=stateful).place(params_of(), x, jnp.ones(2))
    with pytest.raises(TypeError, match="which every microbatch gets"):
        step_of(fn=stateful, has_aux=False).place(params_of(), x, None)

    def forgetful(params, x, state):
        return stateful(params, x, state)[0]

    with pytest.raises(TypeError, match=r"and returns `\(loss, state\)`, got float32"):
        step_of(fn=forgetful, has_aux=False).place(params_of(), x, jnp.ones(2))

    def decides(params, x):
        return jnp.mean(blocks(params, x)) if x.sum() > 0 else 0.0

    with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
        step_of(fn=decides, has_aux=False).place(params_of(), batch[0]["x"])
    (note,) = [n for n in caught.value.__notes__ if "static_argnames" in n]
    assert "at tests/front/test_value_and_grad.py:" in note
    static = step_of(static_argnames="causal")
    with pytest.raises(TypeError, match="'causal' holds an array"):
        static.place(params_of(), *batch, causal=jnp.ones(2))


def test_it_has_every_option_of_a_pipe():
    """With the same default, and none that neither a pipe nor a split has."""

    def options(f, *without):
        parameters = inspect.signature(f).parameters.items()
        return {name: p.default for name, p in parameters if name not in without}

    own = options(fpipe.value_and_grad, "loss_fn")
    of_pipe = options(fpipe.Pipe, "layers", "sample", "sample_side")
    of_step = options(fpipe.Pipe.value_and_grad, "self", "loss_fn")
    of_call = ("fn", "params", "x", "side", "key", "state", "train", "step")
    of_split = options(fpipe.split, *of_call)
    known = {**of_pipe, **of_step, **of_split}
    assert {name: own.get(name, "missing") for name in known} == known
    assert own.keys() - known.keys() == {"static_argnames", "init"}
