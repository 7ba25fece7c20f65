"""Input gradient and weight gradient apart: nothing is computed twice, counted in the
compiled programs.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

import fpipe
import fpipe.flax
from fpipe._executors.placed.instructions import Move, Run
from fpipe.schedules import Schedule
from tests.executors.helpers import observing, plan_of, products
from tests.executors.placed.test_plan import actions, by_device
from tests.front.test_equal import pipe_of
from tests.helpers import (
    Case,
    assert_same,
    dense,
    dropout,
    models,
    mse,
    noise,
    shaped,
)

W, M = 8, 4
EVERYTHING, NOTHING = (
    jax.checkpoint_policies.everything_saveable,
    jax.checkpoint_policies.nothing_saveable,
)
MODES = [
    "never",
    "always",
    "except_last",
    EVERYTHING,
    NOTHING,
    jax.checkpoint_policies.dots_saveable,
]
IDS = ["never", "always", "except_last", "everything", "nothing", "dots"]


def chain(count):
    """`tanh(… tanh(x @ p[0]) @ p[1] …)`."""

    def init(key, x):
        del x
        return list(noise(key, (count, W, W)) * 0.3)

    def apply(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    return fpipe.Layer(apply, init)


@pytest.mark.quick(cases=4)
@pytest.mark.parametrize(
    ("checkpoint", "wrt"),
    [(mode, (0, (0, 1))[n % 2]) for n, mode in enumerate(MODES)],
    ids=IDS,
)
def test_i_and_w_together_are_b(checkpoint, wrt):
    layers = [chain(2), chain(3), chain(2)]
    whole, halves = (
        products(layers, checkpoint, schedule, wrt=wrt)
        for schedule in ("1f1b", "zb_h1")
    )
    for s in range(3):
        assert halves["F", s] == whole["F", s]
        assert halves["I", s] + halves["W", s] == whole["B", s] > 0


@pytest.mark.parametrize("checkpoint", ["never", "always"])
def test_products_in_a_row_are_not_done_twice(checkpoint):
    """Cotangents that depend on weights and a cotangent alone, not on the microbatch
    otherwise.
    """
    layers = [fpipe.Layer(lambda p, x: x @ p[0] @ p[1] @ p[2], chain(3).init)] * 3
    whole, halves = (
        products(layers, checkpoint, schedule, wrt=(0, 1))
        for schedule in ("1f1b", "zb_h1")
    )
    for s in range(3):
        assert halves["I", s] + halves["W", s] == whole["B", s]
    if checkpoint == "never":
        assert halves["I", 1] == halves["W", 1] == 3 * M


def test_without_remat_f_i_and_w_are_a_plain_step():
    layers = [chain(2), chain(3), chain(2)]
    counts = products(layers, "never", "zb_h1", wrt=(0, 1))
    x, params = (
        jnp.ones((2, W)),
        fpipe.sequential(layers, chunks=1).init(jax.random.key(0), jnp.ones((2, W))),
    )

    def loss(params, x):
        for layer, p in zip(layers, params, strict=True):
            x = layer.apply(p, x)
        return jnp.mean(x**2)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, x).compile()
    assert counts.total() == M * str(step.as_text()).count(" dot(")
    # Three products for each weight: one in each of F, I and W.
    assert counts == {
        (kind, s): M * n for kind in "FIW" for s, n in enumerate((2, 3, 2))
    }


def test_recomputation_is_done_once_and_in_i():
    counts = products(
        [chain(2), chain(3), chain(2)], "always", split_gpipe(3, M), wrt=(0, 1)
    )
    for s, n in enumerate((2, 3, 2)):
        assert (
            counts["I", s] == 2 * n * M
        )  # each product again, and the input's gradient
        assert counts["W", s] == n * M


def split_gpipe(devices, microbatches):
    """All F, all I, all W: nothing follows its forward directly but where one
    microbatch is all there is.
    """
    rows = [
        [(kind, d, i) for kind in "FIW" for i in range(microbatches)]
        for d in range(devices)
    ]
    return Schedule(rows, name="split gpipe")


def test_a_stage_in_front_has_no_input_gradient_unless_it_is_asked_for():
    counts = products([chain(2), chain(2)], "never", "zb_h1")
    assert ("I", 0) not in counts
    assert (
        counts["W", 0] == 3 * M
    )  # two weight gradients, and the gradient between the two
    assert products([chain(2), chain(2)], "never", "zb_h1", wrt=1) == {
        ("F", 0): 2 * M,
        ("F", 1): 2 * M,
        ("I", 0): 2 * M,
        ("I", 1): 2 * M,
    }


def test_a_policy_decides_what_i_recomputes():
    def layer(p, x):
        return jnp.tanh(jnp.tanh(checkpoint_name(x @ p[0], "kept")) @ p[1]) @ p[0]

    layers = [fpipe.Layer(layer, chain(2).init)] * 2
    policies = jax.checkpoint_policies
    nothing, kept = (
        products(layers, policy, split_gpipe(2, M))["W", 0]
        for policy in (
            policies.nothing_saveable,
            policies.save_only_these_names("kept"),
        )
    )
    assert kept == nothing - M


def inner(p, x):
    return jnp.tanh(jnp.tanh(x @ p[0]) @ p[1])


@pytest.mark.parametrize("outer", ["never", "always"])
def test_a_checkpoint_inside_a_layer_is_split_too(outer):
    layers = [fpipe.Layer(jax.checkpoint(inner), chain(2).init)] * 3
    whole, halves = (
        products(layers, outer, schedule) for schedule in ("1f1b", "zb_h1")
    )
    assert halves["W", 1] >= 2 * M
    assert halves["I", 1] + halves["W", 1] == whole["B", 1]


def scanned():
    def apply(ws, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    return fpipe.Layer(apply, lambda key, x: noise(key, (3, W, W)) * 0.3)


@pytest.mark.filterwarnings("default:stage . *. I makes")
def test_a_scan_gives_both_in_i_and_the_plan_says_so():
    layers = [chain(1), scanned(), chain(1)]
    pipe = fpipe.Pipe(layers, [1, 1, 1], chunks=3, checkpoint="never", schedule="zb_h1")
    x = jnp.ones((6, W))
    params = pipe.init(jax.random.key(0), x)
    with pytest.warns(
        UserWarning,
        match=r"stage 1: I makes 1 of its 1 weight gradients, and W the rest, because "
        r"one equation",
    ):
        got = pipe.value_and_grad(mse)(params, x, x)
    want = fpipe.sequential(layers, chunks=3).value_and_grad(mse)(
        pipe.gather(params), x, x
    )
    assert_same(got, want)
    plan = plan_of(pipe)
    assert plan.warnings
    kinds = {
        (action.kind, action.stage)
        for item in plan.instructions
        if isinstance(item, Run)
        for action in item.actions
    }
    assert ("I", 1) in kinds
    assert ("W", 1) not in kinds  # nothing is left for it


@shaped
def scan(
    ws: Float[Array, "layers width width"], x: Float[Array, "rows width"]
) -> Float[Array, "rows width"]:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]


@pytest.mark.filterwarnings("default:stage . *. I makes")
@pytest.mark.parametrize(
    "apply",
    [scan, lambda ws, x: scan(ws * 0.5, x), lambda ws, x: scan(ws, x) @ ws[0]],
    ids=["scan", "scaled", "used outside too"],
)
def test_no_array_of_the_weights_size_waits_for_w(apply):
    shape = (3, W, W)
    layers = [fpipe.Layer(apply, lambda key, x: noise(key, shape) * 0.3)] * 2
    pipe = fpipe.Pipe(layers, [1, 1], chunks=4, schedule="zb_h2", checkpoint="never")
    x = jnp.ones((8, W))
    params, peak = pipe.init(jax.random.key(0), x), 0

    def count(item, slots):
        nonlocal peak
        here = [
            a
            for a in slots
            if a is not None and a.shape == shape and a.devices() == {pipe.devices[1]}
        ]
        peak = max(peak, sum(not a.is_deleted() for a in here))

    with (
        observing(count),
        pytest.warns(UserWarning, match="I makes 1 of its 1 weight gradients"),
    ):
        got = pipe.value_and_grad(mse)(params, x, x)
    assert_same(
        got,
        fpipe.sequential(layers, chunks=4).value_and_grad(mse)(
            pipe.gather(params), x, x
        ),
    )
    assert peak == 2  # the weights, and the sum of their gradients


def test_effects_run_in_i_as_often_as_in_b():
    hits = []

    def layer(p, x):
        jax.debug.callback(lambda: hits.append(1))
        return jnp.sin(x @ p)

    seen = {}
    for schedule in ("gpipe", split_gpipe):
        pipe = fpipe.Pipe(
            [fpipe.Layer(layer)] * 2,
            [1, 1],
            chunks=3,
            checkpoint="always",
            schedule=schedule,
        )
        params = pipe.place((jnp.eye(4), jnp.eye(4)))
        hits.clear()
        jax.block_until_ready(
            pipe.value_and_grad(jnp.mean, argnums=(0, 1))(params, jnp.ones((6, 4)))
        )
        jax.effects_barrier()
        seen[schedule] = len(hits)
    assert seen == {"gpipe": 12, split_gpipe: 12}


MIXED = Schedule(
    [
        [("F", 0, 0), ("F", 0, 1), ("B", 0, 0), ("I", 0, 1), ("W", 0, 1)],
        [("F", 1, 0), ("F", 1, 1), ("I", 1, 0), ("B", 1, 1), ("W", 1, 0)],
    ],
    name="mixed",
)


@pytest.mark.parametrize(
    ("model", "checkpoint"),
    [
        ("branched", "always"),
        ("nested", "never"),
        ("stateful", "always"),
        ("sided", "never"),
        ("tied", "always"),
    ],
)
def test_whole_and_split_backwards_may_be_mixed(model, checkpoint):
    layers = models()[model]
    case = Case(layers, 2)
    pipe = fpipe.Pipe(
        layers, [2, len(layers) - 2], chunks=2, checkpoint=checkpoint, schedule=MIXED
    )
    params, needs = case.params(), case.needs
    got = pipe.value_and_grad(mse, argnums=(0, 1))(
        pipe.place(params), case.x, case.target, **needs
    )
    want = case.reference.value_and_grad(mse, argnums=(0, 1))(
        params, case.x, case.target, **needs
    )
    assert_same(got, want)


# --- what is issued ---


# `test_record.py` has the order of all schedules, as they ran.
@pytest.mark.parametrize("schedule", ["zb_h1", "v_half"])
def test_every_action_of_the_schedule_is_issued_in_its_order(schedule):
    layers = models()["plain"]
    case, pipe = Case(layers, 4, rows=8), pipe_of(layers, 1, 4, "never", schedule)
    assert len(pipe.balance) in (2, 4)
    params, step = pipe.place(case.params()), pipe.value_and_grad(mse, argnums=(0, 1))
    made = pipe.make_schedule(4)
    assert (
        by_device(made, actions(lambda: step(params, case.x, case.target)))
        == made.actions
    )


@pytest.mark.parametrize(
    ("schedule", "crossings"),
    [("zb_v", 2), ("v_min", 2), ("interleaved_1f1b", 3), ("looped_bfs", 3)],
)
def test_stages_on_one_device_pass_boundaries_without_a_copy(schedule, crossings):
    """Four stages on two devices: a V crosses from one device to the other twice, a
    loop three times.
    """
    layers = [dense()] * 4
    case, pipe = (
        Case(layers, 3, rows=6),
        fpipe.Pipe(layers, [1] * 4, chunks=3, schedule=schedule),
    )
    assert len(pipe.devices) == 2
    params, moves = pipe.place(case.params()), []
    with observing(
        lambda item, slots: moves.append(item) if isinstance(item, Move) else None
    ):
        pipe.value_and_grad(mse)(params, case.x, case.target)
    assert (
        sum(len(move.ins) for move in moves) == 2 * 3 * crossings
    )  # there and back, for each microbatch


# --- shared programs ---


def programs(pipe):
    """For each kind the stages that share a program."""
    calls: dict[tuple[str, int], set[int]] = {}
    for item in plan_of(pipe).instructions:
        for part in item.parts if isinstance(item, Run) else ():
            kind, stage, _ = part.action
            calls.setdefault((kind, id(part.call)), set()).add(stage)
    return sorted((kind, sorted(stages)) for (kind, _), stages in calls.items())


def test_stages_that_compute_the_same_share_their_programs():
    pipe = fpipe.Pipe(
        [dense()] * 6,
        [1] * 6,
        [jax.devices()[0]] * 6,
        chunks=2,
        checkpoint="never",
        schedule="zb_h1",
    )
    x = jnp.ones((4, 4))
    params = pipe.init(jax.random.key(0), x)
    pipe.value_and_grad(mse)(params, x, x)
    middle = [1, 2, 3, 4]
    # The first cuts its piece out of the batch, and has no input gradient; the last has
    # the loss.
    assert programs(pipe) == [
        ("F", [0]),
        ("F", middle),
        ("F", [5]),
        ("I", middle),
        ("I", [5]),
        ("W", [0]),
        ("W", middle),
        ("W", [5]),
    ]


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_equal_modules_of_flax_share_their_programs(kind):
    modules = [
        linen.Dense(3) if kind == "linen" else nnx.Linear(3, 3, rngs=nnx.Rngs(k))
        for k in range(4)
    ]
    pipe = fpipe.Pipe(fpipe.flax.layers(modules), [1] * 4, chunks=2)
    x = jnp.ones((4, 3))
    params = pipe.init(jax.random.key(0), x)
    pipe(params, x, key=jax.random.key(1), train=True)
    # The first stage cuts its microbatches out of `x` itself.
    assert programs(pipe) == [("F", [0]), ("F", [1, 2, 3])]


@pytest.mark.parametrize(
    "activation", [jax.nn.relu, jax.nn.gelu, jax.nn.softmax], ids=lambda f: f.__name__
)
def test_custom_derivatives_are_no_difference(activation):
    layers = [dense(activation=activation) for _ in range(4)]
    pipe = fpipe.Pipe(
        layers,
        [1] * 4,
        [jax.devices()[0]] * 4,
        chunks=2,
        checkpoint="never",
        schedule="gpipe",
    )
    x = jnp.ones((4, 4))
    pipe.value_and_grad(mse)(pipe.init(jax.random.key(0), x), x, x)
    assert ("F", [1, 2]) in programs(pipe)
    assert ("B", [1, 2]) in programs(pipe)


def test_shared_programs_are_compiled_once_for_each_device():
    traced = []

    def layer(p, x):
        return jnp.tanh(x @ p)

    pipe = fpipe.Pipe(
        [fpipe.Layer(layer)] * 8,
        [1] * 8,
        chunks=2,
        checkpoint="never",
        schedule="interleaved_1f1b",
    )
    params, x = pipe.place((jnp.eye(4),) * 8), jnp.ones((4, 4))
    count = pipe.compile(
        params,
        x,
        loss_fn=jnp.mean,
        progress=lambda done, total: traced.append((done, total)),
    )
    assert traced == [(k, count) for k in range(count + 1)]
    assert len(pipe.devices) == 4
    # F and B of the stages in the middle on four devices, of the first on one; those of
    # the last in one program; on every device the zeros of its accumulators, one
    # program for each stage, and the loss.
    assert count == 2 * 4 + 2 + 1 + 8 + 1


class Constant:
    def __init__(self, value):
        self.value = value

    def __call__(self, p, x):
        return jnp.tanh(x * p + self.value)


BIG = jnp.arange(4.0)
DIFFERENT = {
    "a literal": [lambda p, x: x * p * 2.0, lambda p, x: x * p * 3.0],
    "the sign of zero": [
        lambda p, x: jnp.arctan2(x * p * 0.0, -0.0),
        lambda p, x: jnp.arctan2(x * p * 0.0, 0.0),
    ],
    "an array": [Constant(BIG), Constant(BIG + 1)],
    "a parameter of an equation": [
        lambda p, x: jnp.roll(x * p, 1, 1),
        lambda p, x: jnp.roll(x * p, 2, 1),
    ],
    "an operand's place": [
        lambda p, x: x * p - jnp.sin(x),
        lambda p, x: jnp.sin(x) - x * p,
    ],
    "a scan's body": [
        lambda p, x: jax.lax.scan(lambda c, _: (c * p, None), x, None, length=2)[0],
        lambda p, x: jax.lax.scan(lambda c, _: (c + p, None), x, None, length=2)[0],
    ],
    "a callback": [
        lambda p, x: (
            jax.pure_callback(
                lambda a: a * 2, jax.ShapeDtypeStruct(x.shape, x.dtype), x
            )
            + p
        ),
        lambda p, x: (
            jax.pure_callback(
                lambda a: a * 3, jax.ShapeDtypeStruct(x.shape, x.dtype), x
            )
            + p
        ),
    ],
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_stages_that_differ_do_not_share(what):
    one, two = DIFFERENT[what]
    layers = [
        dense(),
        *(fpipe.Layer(f, lambda key, x: jnp.full((4,), 0.5)) for f in (one, two, one)),
        dense(),
    ]
    x = noise(jax.random.key(1), (4, 4))
    pipe = fpipe.Pipe(layers, [1] * 5, [jax.devices()[0]] * 5, chunks=2)
    params = pipe.init(jax.random.key(0), x)
    assert_same(pipe(params, x), fpipe.sequential(layers, chunks=2)(params, x))
    stages = [stages for kind, stages in programs(pipe) if kind == "F"]
    assert not any(2 in group and len(group) > 1 for group in stages)


def test_layers_with_keys_of_their_own_do_not_share():
    layers = [dropout()] * 4
    x = jnp.ones((4, 4))
    pipe = fpipe.Pipe(layers, [1] * 4, [jax.devices()[0]] * 4, chunks=2)
    params, key = pipe.init(jax.random.key(0), x), jax.random.key(1)
    assert_same(
        pipe(params, x, key=key), fpipe.sequential(layers, chunks=2)(params, x, key=key)
    )
