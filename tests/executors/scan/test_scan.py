"""The scan executor: what is in its one program, where its arrays are, and what it
refuses.
"""

import collections
import copy
import dataclasses
import pickle
import random
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import fpipe
import fpipe.testing
from fpipe._executors.scan.exchanges import find_exchanges
from fpipe.schedules import NAMES, named
from tests.executors.helpers import machine_of, scan_executor
from tests.executors.scan.poison import poison
from tests.helpers import (
    WIDTH,
    Case,
    add,
    assert_same,
    dense,
    dropout,
    keep,
    models,
    mse,
    noise,
    owner,
)


def twice(params, x):
    return 2 * x * params


def made_by(layer, x):
    return fpipe.sequential([layer]).init(jax.random.key(0), x)[0]


def pipe_of(layers, balance=(1, 1, 1, 1), chunks=4, **options):
    options.setdefault("devices", jax.devices()[: len(balance)])
    return fpipe.Pipe(layers, list(balance), chunks=chunks, executor="scan", **options)


def compiled(pipe, loss, params, x, *targets, **options):
    return (
        jax.jit(pipe.value_and_grad(loss, **options))
        .lower(params, x, *targets)
        .compile()
    )


def text_of(program) -> str:
    text = program.as_text()
    assert text is not None
    return text


def temporary_memory(program) -> int:
    analysis = program.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def computations(text):
    """The lines of each computation of a compiled program, and its entry's name."""
    out, name, entry = {}, "", ""
    for line in text.splitlines():
        match = re.match(r"^(ENTRY )?%?([\w.\-]+) \(", line)
        if match and line.rstrip().endswith("{"):
            name = match.group(2)
            entry = name if match.group(1) else entry
            out[name] = []
        elif name:
            out[name].append(line)
    return out, entry


def reached(text, start):
    """The lines of a computation and of all that it calls."""
    all_, _ = computations(text)
    seen, stack = {}, [start]
    while stack:
        name = stack.pop()
        if name in seen or name not in all_:
            continue
        seen[name] = all_[name]
        for line in all_[name]:
            stack += re.findall(r"%([\w.\-]+)", line)
    return [line for lines in seen.values() for line in lines]


def loop_body(text):
    """The lines of the scan's body, with all that it calls."""
    bodies = re.findall(r"body=%?([\w.\-]+)", text)
    assert bodies
    return [line for body in set(bodies) for line in reached(text, body)]


def collectives(lines):
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return collections.Counter(
        m.group(1)
        for line in lines
        if (m := re.search(rf" ({names})(?:-start)?\(", line))
    )


def ops_of(pipe):
    machine = machine_of(pipe)
    return [
        [entry.op for entry in phase.ops]
        for segment in machine.segments
        for phase in segment.phases
    ]


# --- the same as the placed executor, directly ---


@pytest.mark.quick
@pytest.mark.parametrize("model", ["plain", "jump3", "stateful", "tied"])
def test_placed_and_scan_give_the_same(model):
    layers, chunks = models()[model], 4
    case = Case(layers, chunks, rows=8)
    params, needs = case.params(), case.needs
    out = []
    for executor in ("placed", "scan"):
        pipe = fpipe.Pipe(layers, [1, 1, 1, 1], chunks=chunks, executor=executor)
        value, grads = pipe.value_and_grad(mse)(
            pipe.place(params), case.x, case.target, **needs
        )
        out.append((value, pipe.gather(grads)))
    assert_same(*out)


@pytest.mark.parametrize(
    ("balance", "chunks"),
    [((4,), 1), ((4,), 3), ((2, 2), 1), ((1, 1, 1, 1), 1), ((1, 2, 1), 2)],
)
def test_one_microbatch_and_one_stage(balance, chunks):
    case = Case(models()["plain"], chunks, rows=2 * chunks)
    pipe, params = pipe_of(case.layers, balance, chunks), case.params()
    value, grads = pipe.value_and_grad(mse)(pipe.place(params), case.x, case.target)
    want = case.reference.value_and_grad(mse)(params, case.x, case.target)
    assert_same((value, pipe.gather(grads)), want)


def test_several_stages_on_one_device():
    case = Case(models()["dropout"], 4, rows=8)
    pipe, params = (
        pipe_of(case.layers, devices=jax.devices()[:1], schedule="interleaved_1f1b"),
        case.params(),
    )
    value, grads = pipe.value_and_grad(mse)(
        pipe.place(params), case.x, case.target, key=jax.random.key(1)
    )
    want = case.reference.value_and_grad(mse)(
        params, case.x, case.target, key=jax.random.key(1)
    )
    assert_same((value, pipe.gather(grads)), want)
    assert pipe.devices == (jax.devices()[0],)


def test_sizes_of_all_reductions_and_aux():
    case = Case(models()["plain"], 4, rows=8)
    pipe, params = pipe_of(case.layers), case.params()
    placed = pipe.place(params)

    def weighted(y, t):
        return jnp.sum((y - t) ** 2 * (t > 0).astype(y.dtype)), jnp.sum(
            (t > 0).astype(y.dtype)
        )

    for loss, options in [
        (lambda y, t: (mse(y, t), {"last": y, "n": 3}), {"has_aux": True}),
        (lambda y, t: jnp.sum(y * t), {"reduction": "sum"}),
        (weighted, {"reduction": "weighted"}),
    ]:
        value, grads = pipe.value_and_grad(loss, **options)(placed, case.x, case.target)
        want = case.reference.value_and_grad(loss, **options)(
            params, case.x, case.target
        )
        assert_same((value, pipe.gather(grads)), want)


def test_inputs_that_go_whole_keys_and_integers():
    def apply(params, x):
        scaled = x["a"] * params["w"] * x["t"]
        return (
            scaled
            + jax.random.normal(x["key"], scaled.shape) * 0.1
            + params["n"].astype(scaled.dtype)
        )

    first = fpipe.Layer(apply)
    layers = [first, dense(), dense()]
    params = (
        {"w": jnp.ones(4), "n": jnp.int32(2)},
        *fpipe.sequential(layers[1:]).init(jax.random.key(0), jnp.ones((2, 4))),
    )
    x = {
        "a": jnp.ones((8, 4)),
        "t": fpipe.NoChunk(jnp.float32(0.7)),
        "key": fpipe.NoChunk(jax.random.key(5)),
        "s": "text",
    }
    pipe, ref = pipe_of(layers, (1, 1, 1)), fpipe.sequential(layers, chunks=4)
    loss = lambda y: jnp.mean(y**2)  # noqa: E731
    value, (grads, dx) = pipe.value_and_grad(loss, argnums=(0, 1))(
        pipe.place(params), x
    )
    want, (dparams, wx) = ref.value_and_grad(loss, argnums=(0, 1))(params, x)
    assert_same((value, pipe.gather(grads)), (want, dparams))
    assert_same(dx["a"], wx["a"])
    assert_same(dx["t"].value, wx["t"].value)
    assert dx["key"].value.dtype == jax.dtypes.float0
    assert dx["s"] is None


def test_keys_and_booleans_come_out():
    def apply(params, x, *, key):
        return {
            "y": x * params,
            "key": jax.random.split(key, x.shape[0]),
            "up": x > 0,
            "n": jnp.argmax(x, -1),
        }

    layers, x = [dense(), fpipe.Layer(apply)], noise(jax.random.key(1), (6, WIDTH))
    ref = fpipe.sequential(layers, chunks=3)
    params = (made_by(dense(), x), jnp.ones(WIDTH))
    pipe = pipe_of(layers, (1, 1), 3)
    got, want = (
        run(p, x, key=jax.random.key(2))
        for run, p in ((pipe, pipe.place(params)), (ref, params))
    )
    got["key"], want["key"] = (
        jax.random.key_data(got["key"]),
        jax.random.key_data(want["key"]),
    )
    assert_same(got, want)


def test_a_state_may_hold_a_key():
    def apply(params, x, *, state):
        new, use = jax.random.split(state["key"])
        return x * params + jax.random.normal(use, x.shape), {"key": new}

    noise = fpipe.Layer(apply, init_state=lambda x: {"key": jax.random.key(7)})
    layers, x = [noise, noise, dense()], jnp.ones((6, WIDTH))
    params = (jnp.ones(WIDTH), jnp.ones(WIDTH), made_by(dense(), x))
    pipe, ref = (
        pipe_of(layers, (1, 1, 1), 3, checkpoint="always"),
        fpipe.sequential(layers, chunks=3),
    )
    state = ref.init_state(x, params=params)
    loss = lambda y: jnp.mean(y**2)  # noqa: E731
    (value, new), grads = pipe.value_and_grad(loss)(pipe.place(params), x, state=state)
    (want, old), expected = ref.value_and_grad(loss)(params, x, state=state)
    assert_same((value, pipe.gather(grads)), (want, expected))
    data = lambda states: [jax.random.key_data(s["key"]) for s in states[:2]]  # noqa: E731
    chex.assert_trees_all_equal(data(new), data(old))


def test_a_u_net_of_convolutions():
    """Stages of different shapes and two skips, each straight to the other side."""
    outer, inner = fpipe.Namespace(), fpipe.Namespace()

    @fpipe.skippable(stash=["skip"])
    @fpipe.fn
    def down(x, *, carry):
        return x[:, ::2, ::2], fpipe.stash(carry, "skip", x)

    @fpipe.skippable(pop=["skip"])
    @fpipe.fn
    def up(x, *, carry):
        skip, carry = fpipe.pop(carry, "skip")
        return jnp.concatenate([x.repeat(2, 1).repeat(2, 2), skip], axis=-1), carry

    layers = [
        convolution(3),
        down.isolate(outer),
        convolution(4),
        down.isolate(inner),
        convolution(6),
    ]
    layers += [up.isolate(inner), convolution(4), up.isolate(outer), convolution(2)]
    x = noise(jax.random.key(1), (4, 8, 8, 2))
    pipe, ref = pipe_of(layers, (2, 2, 3, 2), 2), fpipe.sequential(layers, chunks=2)
    params = ref.init(jax.random.key(0), x)
    value, grads = pipe.value_and_grad(mse)(pipe.place(params), x, x)
    assert_same((value, pipe.gather(grads)), ref.value_and_grad(mse)(params, x, x))
    wires = machine_of(pipe).wires
    assert sorted(
        wire.pairs for name, wire in wires.items() if name.direction == "forward"
    ) == [
        ((0, 1), (1, 2), (2, 3)),
        ((0, 3), (1, 2)),
    ]


def test_a_pull_back_may_run_twice():
    case = Case(models()["jump2"], 2, rows=4)
    pipe, params = pipe_of(case.layers, chunks=2), case.params()
    placed = pipe.place(params)
    y, pull = jax.vjp(lambda p, x: pipe(p, x), placed, case.x)
    want, ref = jax.vjp(lambda p, x: case.reference(p, x), params, case.x)
    assert_same(y, want)
    for cotangent in (jnp.ones_like(y), 2 * y):
        got = pull(cotangent)
        assert_same((pipe.gather(got[0]), got[1]), ref(cotangent))


# --- inside a user's jit ---


def test_a_training_step_inside_jit_with_donation():
    case = Case([dense()] * 4, 4, rows=8)
    pipe, params = pipe_of(case.layers), case.params()
    tx = optax.adam(1e-2)

    def make(run):
        @jax.jit
        def step(params, opt, x, t):
            loss, grads = run.value_and_grad(mse)(params, x, t)
            updates, opt = tx.update(grads, opt, params)
            return optax.apply_updates(params, updates), opt, loss

        return step

    placed = pipe.place(params)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by counts
        train(case, pipe, params, placed, tx, make)


def train(case, pipe, params, placed, tx, make):
    step = jax.jit(make(pipe), donate_argnums=(0, 1))
    state = placed, tx.init(placed)
    want = params, tx.init(params)
    plain = make(case.reference)
    for _ in range(3):
        *state, loss = step(*state, case.x, case.target)
        *want, expected = plain(*want, case.x, case.target)
        assert_same(loss, expected)
    assert_same(pipe.gather(state[0]), want[0], tolerance=1e-4)
    assert all(a.is_deleted() for a in jax.tree.leaves(placed))
    assert {a.sharding.spec for a in jax.tree.leaves(state[0])} == {P("stage")}


def test_one_trace_for_many_calls():
    case = Case(models()["plain"], 4, rows=8)
    pipe = pipe_of(case.layers)
    placed = pipe.place(case.params())
    count = chex.assert_max_traces(mse, n=1)
    run = pipe.value_and_grad(count)
    for _ in range(3):
        run(placed, case.x, case.target)
    assert len(scan_executor(pipe)._steps.values()) == 1


def test_shapes_alone():
    case = Case(models()["stateful"], 4, rows=8)
    pipe, needs = pipe_of(case.layers), case.needs
    placed = pipe.place(case.params())
    out = jax.eval_shape(
        lambda p, x, t: pipe.value_and_grad(mse)(p, x, t, **needs),
        placed,
        case.x,
        case.target,
    )
    got = pipe.value_and_grad(mse)(placed, case.x, case.target, **needs)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, jax.eval_shape(lambda: got))
    assert pipe.compile(placed, case.x, case.target, loss_fn=mse, **needs) == 1


def test_place_and_gather_inside_a_trace():
    case = Case(models()["plain"], 2, rows=4)
    pipe, params = pipe_of(case.layers, chunks=2), case.params()

    @jax.jit
    def grad(params):
        def loss(params):
            return mse(pipe(pipe.place(params), case.x), case.target)

        return jax.grad(loss)(params), pipe.gather(pipe.place(params))

    got, same = grad(params)
    assert_same(
        got, jax.grad(lambda p: mse(case.reference(p, case.x), case.target))(params)
    )
    chex.assert_trees_all_equal(same, params)


def test_init_and_place_of_what_a_trace_has_from_outside():
    case = Case(models()["plain"], 2, rows=4)
    pipe, params = pipe_of(case.layers, chunks=2), case.params()
    key = jax.random.key(3)
    want = pipe.init(key, case.x)
    shapes = jax.eval_shape(lambda key: pipe.init(key, case.x), key)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, want)

    @jax.jit
    def made(key):
        return pipe.init(key, case.x), pipe.gather(pipe.place(params))

    with pytest.raises(TypeError, match=r"called with the shape .*`jax.eval_shape`"):
        pipe(want, jax.eval_shape(lambda: case.x))
    inside, same = made(key)
    assert_same(pipe.gather(inside), pipe.gather(want))
    chex.assert_trees_all_equal(same, params)


# --- parameters ---


@pytest.mark.parametrize("model", models())
def test_gather_is_the_exact_inverse_of_place(model):
    case = Case(models()[model], 2)
    balance = (1, 1, 1, len(case.layers) - 3)
    params = case.params()
    pipe = pipe_of(case.layers, balance)
    chex.assert_trees_all_equal(pipe.gather(pipe.place(params)), params)
    made = pipe.init(jax.random.key(0), case.x, case.side)
    chex.assert_trees_all_equal(
        pipe.gather(made), case.reference.init(jax.random.key(0), case.x, case.side)
    )


def test_each_device_holds_its_own_stages_and_equal_ones_have_no_padding():
    params = fpipe.sequential([dense()] * 4).init(
        jax.random.key(0), jnp.ones((2, WIDTH))
    )
    placed = pipe_of([dense()] * 4).place(params)
    assert placed.padding == 0
    for array, name in zip(placed.arrays, ("b", "w"), strict=True):
        assert array.sharding.spec == P("stage")
        for shard in array.addressable_shards:
            d = jax.devices().index(shard.device)
            np.testing.assert_array_equal(shard.data[0], params[d][name])


def test_one_layer_in_all_stages():
    """Equal stages share their traces; the output is the last one's all the same."""
    pipe, x = (
        fpipe.Pipe([dense()] * 3, chunks=2, executor="scan"),
        jnp.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH),
    )
    fpipe.testing.assert_equals_sequential(pipe, x)
    params = pipe.init(jax.random.key(0), x)
    got = jax.grad(lambda p: jnp.sum(pipe(p, x) ** 2))(params)
    plain = fpipe.sequential(pipe.layers, chunks=2)
    assert_same(
        pipe.gather(got),
        jax.grad(lambda p: jnp.sum(plain(p, x) ** 2))(pipe.gather(params)),
    )


def test_what_is_packed_is_not_placed_again():
    params = fpipe.sequential([dense()] * 4).init(
        jax.random.key(0), jnp.ones((2, WIDTH))
    )
    packed = pipe_of([dense()] * 4).place(params)
    for other in (pipe_of([dense()] * 4, (2, 2)), fpipe.Pipe([dense()] * 4)):
        with pytest.raises(
            TypeError,
            match=r"packed already; for another pipe write "
            r"`pipe.place\(other.gather\(params\)\)`",
        ):
            other.place(packed)


def test_ends_share_an_array_and_padding_is_reported():
    # An embedding of 40 rows before the blocks and a head of 12 columns after them:
    # 160 and 48 numbers share a row.
    embed, head = (
        fpipe.Layer(lambda p, x: p[x], name="embed"),
        fpipe.Layer(lambda p, x: x @ p, name="head"),
    )
    layers = [embed, *[dense()] * 4, head]
    blocks = fpipe.sequential([dense()] * 4).init(
        jax.random.key(0), jnp.ones((2, WIDTH))
    )
    params = (jnp.ones((40, WIDTH)), *blocks, jnp.full((WIDTH, 12), 2.0))
    placed = pipe_of(layers, (2, 1, 1, 2)).place(params)
    shapes = sorted(a.shape for a in placed.arrays)
    assert shapes == [(4, 4), (4, 4, 4), (4, 160)]
    assert placed.padding == 4 * (4 * 160 - 160 - 48)
    assert f"{placed.padding} bytes of padding" in repr(placed)
    chex.assert_trees_all_equal(pipe_of(layers, (2, 1, 1, 2)).gather(placed), params)


def test_named_leaves_and_copies():
    placed = pipe_of([dense()] * 4).init(jax.random.key(0), jnp.ones((4, WIDTH)))
    names = [
        jax.tree_util.keystr(path, simple=True)
        for path, _ in jax.tree_util.tree_leaves_with_path(placed)
    ]
    # The first entry of the row, and in which partition it is one.
    assert [name.partition(", ")[0] for name in names] == [
        "0['b'] (4 devices",
        "0['w'] (4 devices",
    ]
    again = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, placed)))
    chex.assert_trees_all_equal(again.arrays, placed.arrays)
    assert jax.tree.structure(again) == jax.tree.structure(placed)


# --- equal stages ---


def test_equal_stages_run_one_piece_of_code():
    """One forward and one backward for all cores, and the loss; with an embedding and a
    head too.
    """
    embed = fpipe.Layer(
        lambda p, x: p[x], lambda key, x: noise(key, (9, WIDTH)), name="embed"
    )
    head = fpipe.Layer(
        lambda p, x: x @ p, lambda key, x: noise(key, (WIDTH, 3)), name="head"
    )
    block = [dense(), dropout()]
    layers = [embed, *block * 4, head]
    x = jax.random.randint(jax.random.key(1), (8, 5), 0, 9)
    pipe, ref = (
        pipe_of(layers, (3, 2, 2, 3), checkpoint="always"),
        fpipe.sequential(layers, chunks=4),
    )
    params = ref.init(jax.random.key(0), x)
    key, loss = jax.random.key(2), lambda y: jnp.mean(y**2)
    value, grads = pipe.value_and_grad(loss)(pipe.place(params), x, key=key)
    assert_same(
        (value, pipe.gather(grads)), ref.value_and_grad(loss)(params, x, key=key)
    )
    kinds = [[op.kind for op in phase] for phase in ops_of(pipe)]
    assert kinds == [
        ["F", "F", "F"],
        ["B", "B", "B"],
    ]  # first end, core, last end; and back


def test_no_conditional_has_more_than_two_branches():
    """With three XLA copies every buffer that they share, at each tick."""
    for layers in ([dense()] * 4, models()["plain"]):
        pipe = pipe_of(layers)
        placed = pipe.init(jax.random.key(0), jnp.ones((8, WIDTH)))
        text = text_of(
            compiled(pipe, lambda y: jnp.mean(y**2), placed, jnp.ones((8, WIDTH)))
        )
        conditionals = re.findall(r" conditional\(.*", text)
        assert conditionals
        assert not any(
            "branch_computations={" in c
            and c.split("branch_computations={")[1].count("%") > 2
            for c in conditionals
        )


# Those with operations and phases like another one's are left to `-m full`.
ALIKE = ("1f1b", "zb_h2", "v_half", "v_min")
IN_PLACE = [
    pytest.param(name, "never", marks=[pytest.mark.full] * (name in ALIKE))
    for name in NAMES
    if name != "forward_only"
]
IN_PLACE.append(pytest.param("interleaved_1f1b", "always"))


@pytest.mark.parametrize(("schedule", "checkpoint"), IN_PLACE)
def test_buffers_are_updated_in_place(schedule, checkpoint):
    """No parameter, gradient or pool is copied, in the loop or before it; nor is a
    parameter cut out of a stack of them in the loop.
    """
    width, rows = 24, 6  # sizes that nothing else has
    stages = len(named(schedule, 2, 4).stage_to_device)
    layers = [dense(width)] * 4
    pipe = pipe_of(
        layers,
        [4 // stages] * stages,
        devices=jax.devices()[:2],
        schedule=schedule,
        checkpoint=checkpoint,
    )
    x = jax.ShapeDtypeStruct((4 * rows, width), jnp.float32)
    placed = pipe.init(jax.random.key(0), x)
    text = text_of(compiled(pipe, lambda y: jnp.mean(y**2), placed, x))
    body = loop_body(text)
    weights = rf"f32\[(?:\d+,)*{width},{width}\]"
    assert any(re.search(weights, line) for line in body)
    assert not [
        line
        for line in body
        if re.search(rf"= {weights}\S* (copy|dynamic-slice)\(", line)
    ]
    slots = {pool.slots for pool in machine_of(pipe).pools.values()}
    pools = "|".join(rf"f32\[{n},{rows},{width}\]" for n in slots)
    assert any(re.search(pools, line) for line in body)
    copies = rf"= (?:{weights}|{pools})\S* copy\("
    assert not [line for line in text.splitlines() if re.search(copies, line)]


def test_accelerators_fill_no_pool():
    """They leave what nobody has put there as it is."""
    pipe = pipe_of([dense()] * 4)
    x = jax.ShapeDtypeStruct((8, WIDTH), jnp.float32)
    step = jax.jit(pipe.value_and_grad(lambda y: jnp.mean(y**2)))
    traced = step.trace(pipe.init(jax.random.key(0), x), x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    pools = machine_of(pipe).pools.values()
    for pool in pools:
        for a in pool.avals[0]:
            slots = "x".join(map(str, (pool.slots, *a.shape)))
            assert f"@AllocateBuffer() : () -> tensor<{slots}xf32>" in text
            filled = rf"broadcast_in_dim.*\(tensor<f32>\) -> tensor<{slots}xf32>"
            assert not re.search(filled, text)


# --- idle ticks ---


@pytest.mark.parametrize(
    ("model", "schedule"),
    [
        ("plain", "gpipe"),
        ("plain", "interleaved_1f1b"),
        ("nested", "zb_h1"),
        ("stateful", "gpipe"),
        ("tied", "eager_1f1b"),
    ],
)
def test_idle_ticks_are_harmless(monkeypatch, model, schedule):
    """Everything that is not filled, and everything that an idle device sends, is NaN;
    nothing changes.
    """
    layers = models()[model]
    case, needs = Case(layers, 3, rows=6), {}
    params, needs = case.params(), case.needs
    balance = (1, 1, 1, len(layers) - 3)
    out = []
    for poisoned in (False, True):
        filled = poison(monkeypatch) if poisoned else []
        devices = jax.devices()[: 2 if schedule == "interleaved_1f1b" else 4]
        pipe = pipe_of(
            layers, balance, 3, devices=devices, schedule=schedule, checkpoint="never"
        )
        out.append(
            pipe.value_and_grad(mse, argnums=(0, 1))(
                pipe.place(params), case.x, case.target, **needs
            )
        )
    chex.assert_trees_all_equal(*jax.tree.map(np.asarray, out))
    assert filled
    assert all(
        np.isfinite(a).all()
        for a in jax.tree.leaves(out[1])
        if a.dtype != jax.dtypes.float0
    )


# --- memory ---


def test_memory_and_program_size_do_not_grow_with_the_microbatches():
    layers = [dense(64)] * 4
    # A program from the compilation cache has a shorter text than a new one; with a
    # number of its own each is new.
    own = random.random()
    for checkpoint in ("always", "never"):
        memory, size = [], []
        for m in (8, 128):
            pipe = pipe_of(layers, chunks=m, checkpoint=checkpoint)
            x = jnp.ones((64 * m, 64))
            program = compiled(
                pipe, lambda y: jnp.mean(y**2) * own, pipe.init(jax.random.key(0), x), x
            )
            memory.append(temporary_memory(program))
            size.append(sum("=" in line for line in text_of(program).splitlines()))
        assert max(memory) <= 1.05 * min(memory), memory
        assert max(size) <= 1.05 * min(size), size


def test_skips_wait_in_as_many_slots_as_the_schedule_needs():
    layers = [keep(), dense(), dense(), add()]
    pipe = pipe_of(layers, chunks=8, schedule="eager_1f1b", checkpoint="never")
    x = jnp.ones((8, WIDTH))
    pipe.compile(pipe.init(jax.random.key(0), x), x, loss_fn=lambda y: jnp.mean(y**2))
    machine = machine_of(pipe)
    forward = {
        name: wire.pairs
        for name, wire in machine.wires.items()
        if name.direction == "forward"
    }
    # Straight from the first device to the last, beside the ring; two are the fewest,
    # for device 0 sends to two.
    assert sorted(forward.values()) == [((0, 1), (1, 2), (2, 3)), ((0, 3),)]
    (skip,) = [name for name, pairs in forward.items() if pairs == ((0, 3),)]
    # It arrives three ticks before it is read, so at most three wait there, and one
    # slot is for what nobody reads.
    assert machine.pools[skip].slots == 3 + 1


# --- other axes of the mesh ---


def data_mesh():
    return jax.make_mesh((2, 2), ("data", "stage"), axis_types=(AxisType.Auto,) * 2)


def convolution(features=WIDTH):
    def init(key, x):
        return {
            "w": noise(key, (3, 3, x.shape[-1], features)) * 0.3,
            "b": jnp.zeros(features),
        }

    def apply(p, x):
        layout = ("NHWC", "HWIO", "NHWC")
        return jnp.tanh(
            jax.lax.conv_general_dilated(
                x, p["w"], (1, 1), "SAME", dimension_numbers=layout
            )
            + p["b"]
        )

    return fpipe.Layer(apply, init, name="convolution")


def embedding():
    return fpipe.Layer(
        lambda p, x: p[x], lambda key, x: noise(key, (11, WIDTH)), name="embedding"
    )


SHARDED = {
    "equal": ([dense()] * 4, (8, WIDTH)),
    "different": ([dense(6), dense(), dense(5), dense()], (8, WIDTH)),
    "convolutions": (
        [convolution(), dense(), convolution(5), dense()],
        (8, 5, 5, WIDTH),
    ),
    "embedding": ([embedding(), dense(), dense(), dense(3)], (8, 7)),
}


@pytest.mark.parametrize(
    ("model", "checkpoint"),
    [(model, ("always", "never")[n % 2]) for n, model in enumerate(SHARDED)],
)
def test_a_sharded_batch_is_data_parallelism_around_the_pipeline(model, checkpoint):
    layers, shape = SHARDED[model]
    x = noise(jax.random.key(1), shape)
    x = (
        jax.random.randint(jax.random.key(1), shape, 0, 11)
        if model == "embedding"
        else x
    )
    mesh, ref = data_mesh(), fpipe.sequential(layers, chunks=4)
    axis = "data"
    if model == "different":  # any name will do
        axis, mesh = "rows", Mesh(mesh.devices, ("rows", "stage"))
    pipe = fpipe.Pipe(
        layers,
        [2, 2],
        chunks=4,
        executor="scan",
        mesh=mesh,
        data_axes=(axis,),
        checkpoint=checkpoint,
    )
    params = ref.init(jax.random.key(0), x)
    placed, sharded = (
        pipe.place(params),
        jax.device_put(x, NamedSharding(mesh, P(axis))),
    )
    run = jax.jit(pipe.value_and_grad(lambda y: jnp.mean(y**2)))
    value, grads = run(placed, sharded)
    assert_same(
        (value, pipe.gather(grads)),
        ref.value_and_grad(lambda y: jnp.mean(y**2))(params, x),
    )
    text = text_of(run.lower(placed, sharded).compile())
    inside, all_ = collectives(loop_body(text)), collectives(text.splitlines())
    # In the loop only boundaries and cotangents move, and the loss of a microbatch, one
    # number, is added up.
    assert inside == {"collective-permute": 2, "all-reduce": 1}, inside
    assert any(re.search(r"= f32\[\] all-reduce\(", line) for line in loop_body(text))
    assert (
        all_["all-reduce"] == 3
    )  # that one, the losses over the stages, and all gradients together


def test_rows_move_between_devices():
    """As XLA does it by itself the step would hang on CPUs."""

    def moved(w, x):
        return jnp.roll(x @ w, 1, axis=0) * jnp.cumsum(x, 0)

    layer = fpipe.Layer(moved, lambda key, x: jnp.eye(x.shape[-1]), name="moved")
    x = noise(jax.random.key(0), (8, WIDTH))
    mesh = data_mesh()
    pipe = fpipe.Pipe([dense(), layer], chunks=2, executor="scan", mesh=mesh)
    params = pipe.init(jax.random.key(0), x)
    step = jax.jit(pipe.value_and_grad(mse))
    assert find_exchanges(text_of(step.lower(params, x, x).compile()), mesh) == []
    got = step(params, x, x)
    want = fpipe.sequential([dense(), layer], chunks=2).value_and_grad(mse)
    assert_same((got[0], pipe.gather(got[1])), want(pipe.gather(params), x, x))


def test_a_batch_of_another_size_than_the_data_axis_still_works():
    mesh, layers = data_mesh(), [dense()] * 2
    pipe, ref = (
        fpipe.Pipe(layers, chunks=3, executor="scan", mesh=mesh),
        fpipe.sequential(layers, chunks=3),
    )
    x = noise(jax.random.key(0), (9, WIDTH))
    params = ref.init(jax.random.key(0), x)
    value, grads = pipe.value_and_grad(lambda y: jnp.mean(y**2))(pipe.place(params), x)
    assert_same(
        (value, pipe.gather(grads)),
        ref.value_and_grad(lambda y: jnp.mean(y**2))(params, x),
    )


# --- errors and the value ---


def test_meshes_that_do_not_fit():
    layers, auto = [dense()] * 4, (AxisType.Auto,)
    other = jax.make_mesh((4,), ("data",), axis_types=auto)
    with pytest.raises(
        ValueError,
        match=r"none is called 'stage'; make one with `jax.make_mesh\(\(4,\), "
        r"\('stage',\), ",
    ):
        fpipe.Pipe(layers, executor="scan", mesh=other)
    with pytest.raises(
        ValueError,
        match=r"has 4 places on its axis 'stage', but the schedule puts 2 stages on 2 "
        r"devices",
    ):
        fpipe.Pipe(
            layers,
            [2, 2],
            executor="scan",
            mesh=jax.make_mesh((4,), ("stage",), axis_types=auto),
        )
    with pytest.raises(ValueError, match=r"the axes \['stage'\] are explicit"):
        fpipe.Pipe(
            layers,
            executor="scan",
            mesh=jax.make_mesh((4,), ("stage",), axis_types=(AxisType.Explicit,)),
        )
    with pytest.raises(TypeError, match=r"a jax\.sharding\.Mesh"):
        fpipe.Pipe(layers, executor="scan", mesh=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a mesh has each device once"):
        fpipe.Pipe(layers, [2, 2], [jax.devices()[0]] * 2, executor="scan")
    with pytest.raises(ValueError, match="leave one of the two out"):
        fpipe.Pipe(
            layers,
            [2, 2],
            jax.devices()[2:],
            executor="scan",
            mesh=jax.make_mesh(
                (2,), ("stage",), axis_types=auto, devices=jax.devices()[:2]
            ),
        )


def test_schedules_that_cannot_run():
    x = jnp.ones((4, WIDTH))
    pipe = pipe_of([dense()] * 4, schedule="forward_only")
    placed = pipe.init(jax.random.key(0), x)
    with pytest.raises(
        ValueError, match="has forwards only, and the call computes gradients"
    ):
        pipe.value_and_grad(lambda y: jnp.mean(y))(placed, x)
    assert pipe(placed, x).shape == (4, WIDTH)


def test_parameters_that_are_not_packed_for_this_pipe():
    layers, x = [dense()] * 4, jnp.ones((4, WIDTH))
    pipe = pipe_of(layers)
    with pytest.raises(
        TypeError,
        match=r"takes packed parameters, got tuple; make them with `params = "
        r"pipe.place\(params\)`",
    ):
        pipe(fpipe.sequential(layers).init(jax.random.key(0), x), x)
    other = pipe_of(layers, (2, 2))
    placed = other.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="packed for another partition"):
        pipe.value_and_grad(lambda y: jnp.mean(y))(placed, x)
    moved = pipe.place(other.gather(placed))
    assert_same(pipe(moved, x), other(placed, x))
    with pytest.raises(ValueError, match="of 4 layers, but the model has 2"):
        pipe_of([dense()] * 2, (1, 1))(placed, x)


def test_an_error_in_a_layer_names_it():
    def broken(params, x):
        raise RuntimeError("no")

    pipe = pipe_of(
        [
            dense(),
            fpipe.Layer(broken, lambda key, x: None, name="broken"),
            dense(),
            dense(),
        ]
    )
    params = fpipe.sequential([dense()] * 4).init(
        jax.random.key(0), jnp.ones((2, WIDTH))
    )
    with pytest.raises(RuntimeError, match="no") as error:
        pipe(pipe.place((params[0], None, *params[2:])), jnp.ones((4, WIDTH)))
    assert any("layer 1 'broken'" in note for note in error.value.__notes__)


def test_it_is_a_value():
    mesh = data_mesh()
    for pipe in (
        pipe_of([dense()] * 4),
        fpipe.Pipe([owner()] * 2, executor="scan", mesh=mesh, chunks=2),
    ):
        assert pipe == copy.deepcopy(pipe)
        assert dataclasses.replace(pipe, chunks=8).chunks == 8
        assert dataclasses.replace(pipe, chunks=8).mesh == pipe.mesh
        assert hash(pipe) == hash(copy.copy(pipe))
    pipe = fpipe.Pipe([fpipe.Layer(twice)] * 2, executor="scan", mesh=mesh)
    assert pickle.loads(pickle.dumps(pipe)) == pipe


def test_stages_that_send_different_values_on_one_wire():
    """Two equal stages. One sends its boundary where the other sends its skip:
    they do not share an operation.
    """
    layers = models()["nested"]
    case = Case(layers, 1, rows=8)
    pipe, params = (
        pipe_of(layers, (1, 1, 1, 2), 1, devices=jax.devices()[:2], schedule="zb_v"),
        case.params(),
    )
    assert_same(pipe(pipe.place(params), case.x), case.reference(params, case.x))
    value, grads = pipe.value_and_grad(mse)(pipe.place(params), case.x, case.target)
    assert_same(
        (value, pipe.gather(grads)),
        case.reference.value_and_grad(mse)(params, case.x, case.target),
    )


@pytest.mark.parametrize(
    "schedule", ["1f1b", pytest.param("zb_h1", marks=pytest.mark.full)]
)
def test_second_derivatives_in_jit(schedule):
    """Of a step, in a direction and backwards, and of a call, backwards twice."""

    def layer(w, x):
        return jnp.tanh(x @ w)

    def second(pipe, params, direction, x):
        step = pipe.value_and_grad(mse)
        grads = lambda params: step(params, x, jnp.cos(x))[1]  # noqa: E731

        def norm(params):
            return sum(jnp.sum(g**2) for g in jax.tree.leaves(grads(params)))

        def penalty(params):
            return jnp.sum(jax.grad(lambda x: pipe(params, x).sum())(x) ** 2)

        product = jax.jvp(grads, (params,), (direction,))[1]
        return product, jax.grad(norm)(params), jax.grad(penalty)(params)

    params, direction = (
        tuple(noise(jax.random.key(seed + k), (3, 3)) for k in range(2))
        for seed in (0, 7)
    )
    x = noise(jax.random.key(3), (4, 3))
    plain = fpipe.sequential([layer] * 2, chunks=2)
    pipe = pipe_of([layer] * 2, (1, 1), chunks=2, schedule=schedule)
    run = jax.jit(second, static_argnums=0)
    placed = pipe.place(params)
    got = run(pipe, placed, pipe.place(direction), x)
    want = run(plain, params, direction, x)
    assert_same(tuple(map(pipe.gather, got)), want)
    # Forward mode over the call itself is JAX's refusal, with a note of what works.
    with pytest.raises(TypeError, match="custom_vjp") as caught:
        jax.jvp(lambda x: pipe(placed, x), (x,), (x,))
    assert "`fpipe.sequential` supports both" in caught.value.__notes__[0]
