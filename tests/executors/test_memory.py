"""What is alive, what is copied and what compiles, measured on arrays and events rather
than read off the plan.
"""

import gc
import weakref

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

import fpipe
from tests.executors.helpers import observing, plan_of
from tests.helpers import Case, cast_weights, dense, models, mse, noise

W = 16


def square(compute=None):
    """A layer whose weights are the only arrays of shape (W, W), and whose casts and
    transposes would be too.
    """

    def init(key, x):
        del x
        return noise(key, (W, W))

    def apply(w, x):
        w = w if compute is None else w.astype(compute)
        y = jnp.tanh(x.astype(w.dtype) @ w)
        return (y @ w.T).astype(
            x.dtype
        )  # a transpose of the weights, and the weights themselves twice

    return fpipe.Layer(apply, init)


def weight_bytes(microbatches, compute, checkpoint, schedule):
    """The most bytes in arrays of the weights' shape, at any time during a step."""
    pipe = fpipe.Pipe(
        [square(compute)] * 3,
        [1, 1, 1],
        chunks=microbatches,
        checkpoint=checkpoint,
        schedule=schedule,
    )
    x = jnp.ones((2 * microbatches, W))
    params = pipe.init(jax.random.key(0), x)
    step = pipe.value_and_grad(lambda y: jnp.mean(y**2))
    jax.block_until_ready(step(params, x))
    peak = 0

    def measure(item, slots):
        nonlocal peak
        del item, slots
        peak = max(peak, sum(a.nbytes for a in jax.live_arrays() if a.shape == (W, W)))

    with observing(measure):
        step(params, x)
    return peak


@pytest.mark.parametrize("compute", [None, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("checkpoint", "schedule"),
    [
        ("always", "gpipe"),
        ("except_last", "1f1b"),
        ("never", "gpipe"),
        (jax.checkpoint_policies.everything_saveable, "1f1b"),
    ],
)
def test_weights_and_values_made_from_weights_are_not_kept_per_microbatch(
    checkpoint, compute, schedule
):
    few, many = (weight_bytes(m, compute, checkpoint, schedule) for m in (2, 16))
    # 3 stages: a weight and its gradient's sum each, and one more while a sum goes from
    # program to program.
    assert 3 * W * W * 4 < few <= 3 * 3 * W * W * 4
    assert many == few


@pytest.mark.filterwarnings("default:stage 0 keeps")
@pytest.mark.parametrize(
    ("cast", "checkpoint", "schedule"),
    [
        (True, "never", "gpipe"),
        (False, "never", "gpipe"),
        # The residuals of one microbatch at a time: recomputing would save nothing.
        (True, "never", "1f1b"),
        (True, "always", "gpipe"),
    ],
)
def test_a_cast_inside_a_scan_is_the_exception_and_a_warning_names_the_cure(
    cast, checkpoint, schedule
):
    def layer(ws, x):
        def body(x, w):
            return jnp.tanh(x @ w.astype(jnp.bfloat16)) if cast else jnp.tanh(
                x @ w
            ), None

        x = x.astype(jnp.bfloat16)
        return jax.lax.scan(body, x, ws if cast else ws.astype(jnp.bfloat16))[0].astype(
            jnp.float32
        )

    pipe = fpipe.Pipe(
        [fpipe.Layer(layer)], [1], chunks=2, checkpoint=checkpoint, schedule=schedule
    )
    params = pipe.place((jnp.ones((3, W, W)),))
    step = pipe.value_and_grad(jnp.mean)
    if (cast, checkpoint, schedule) == (True, "never", "gpipe"):
        with pytest.warns(
            UserWarning,
            match=r"stage 0 keeps bfloat16\[3,16,16\] per microbatch.*cast the stacked",
        ):
            step(params, jnp.ones((4, W)))
    else:
        step(params, jnp.ones((4, W)))  # warnings are errors


def test_a_branch_that_keeps_weights_is_warned_about_too():
    def layer(w, x):
        return jax.lax.cond(
            x[0, 0] > 0, lambda x: jnp.sin(x @ jnp.cos(w)), lambda x: x, x
        )

    pipe = fpipe.Pipe(
        [fpipe.Layer(layer)], [1], chunks=2, checkpoint="never", schedule="gpipe"
    )
    with pytest.warns(
        UserWarning, match=r"keeps float32\[16,16\] per microbatch.*lax.cond"
    ):
        pipe.value_and_grad(jnp.mean, argnums=(0, 1))(
            pipe.place((jnp.ones((W, W)),)), jnp.ones((4, W))
        )


def step_of(name):
    layers = models()[name]
    case = Case(layers, chunks=3)
    pipe = fpipe.Pipe(layers, [1, 1, len(layers) - 2], chunks=3)
    params = pipe.place(case.params())
    run, needs = pipe.value_and_grad(mse, argnums=(0, 1)), case.needs
    x, target = case.x, case.target
    return pipe, params, lambda: run(params, x, target, **needs)


@pytest.mark.parametrize("name", ["nested", "stateful", "dropout", "tied"])
@pytest.mark.usefixtures("own_heap")
def test_after_fifty_steps_as_many_arrays_are_alive_as_after_two(name):
    pipe, params, step = step_of(name)

    def train(steps):
        for _ in range(steps):
            jax.block_until_ready(step())
        gc.collect()
        return len(jax.live_arrays())

    assert train(2) == train(48)
    assert pipe.devices
    assert params


@pytest.mark.parametrize("name", ["branched", "nested", "stateful", "sided", "tied"])
def test_nothing_compiles_after_the_first_step(name):
    layers = models()[name]
    case, needs = Case(layers, chunks=3), Case(layers, chunks=3).needs
    pipe = fpipe.Pipe(layers, [1, 1, len(layers) - 2], chunks=3)
    params, x, target = pipe.place(case.params()), case.x, case.target
    side = needs.pop("side")
    step, evaluate = pipe.value_and_grad(mse), pipe.evaluate(mse)

    def outside(params):
        out = pipe(params, x, side=side, **needs)
        return mse(out if needs["state"] is None else out[0], target)

    def everything():
        step(params, x, target, side=side, **needs)
        evaluate(params, x, target, side=side, **needs)
        jax.grad(outside)(params)
        pipe(params, x, side=side, **needs)

    events: list[str] = []
    everything()
    everything()  # the eager operations of the loss outside
    with counting(events):
        everything()
    assert events == []


def test_the_count_of_compilations_can_count():
    events: list[str] = []
    with counting(events):
        jax.jit(lambda x: x * 3.25)(jnp.ones(3))
    assert events


class counting:  # noqa: N801 - reads as a function
    """Collect the names of JAX's tracing and compilation events."""

    def __init__(self, events):
        self.events = events

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self.listen)

    def __exit__(self, *error):
        jax.monitoring.unregister_event_duration_listener(self.listen)

    def listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        if "compile" in event or "trace" in event:
            self.events.append(event)


@pytest.mark.quick
def test_each_layer_is_traced_once_per_shape():
    traces = []

    def layer(p, x):
        traces.append(x.shape)
        return jnp.tanh(x * p)

    pipe = fpipe.Pipe([layer, layer], [1, 1], chunks=3, checkpoint="except_last")
    params = pipe.place((jnp.ones(2), jnp.ones(2)))
    step = pipe.value_and_grad(jnp.mean)
    for _ in range(2):
        step(params, jnp.ones((7, 2)))
    # One trace for both layers, which are equal: forward and backward, with and without
    # recomputation.
    assert traces == [(3, 2), (1, 2)]


@pytest.mark.usefixtures("own_heap")
def test_a_new_loss_function_at_each_step_costs_bounded_memory(monkeypatch):
    monkeypatch.setattr("fpipe._executors.placed.executor._PLANS", 3)
    pipe = fpipe.Pipe([fpipe.fn(jnp.sin)], [1])
    held = []
    for k in range(6):
        scale = jnp.float32(k)
        held.append(weakref.ref(scale))
        pipe.value_and_grad(lambda y, scale=scale: jnp.mean(y * scale), argnums=1)(
            ((),), jnp.ones((2, 2))
        )
        del scale
    gc.collect()
    assert [ref() is not None for ref in held] == [False] * 3 + [True] * 3


def test_the_plan_in_use_outlives_a_stream_of_others(monkeypatch):
    """First in, first out threw away the plan of every step."""
    monkeypatch.setattr("fpipe._executors.placed.executor._PLANS", 3)
    traces = []

    def layer(p, x):
        return x * p

    def loss(y):
        traces.append(1)
        return y.sum()

    pipe = fpipe.Pipe([layer], [1])
    params, step = pipe.place((jnp.ones(4),)), pipe.value_and_grad(loss)
    x = jnp.ones((4, 4))
    for k in range(8):
        step(params, x)
        pipe.evaluate(lambda y, k=k: y.sum() * k)(params, x)
    assert len(traces) == 1


@pytest.mark.usefixtures("own_heap")
def test_a_dropped_pipe_and_its_parameters_are_collected():
    pipe, params, step = step_of("nested")
    step()
    alive = weakref.ref(pipe), weakref.ref(jax.tree.leaves(params)[0])
    del pipe, params, step
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


@pytest.mark.usefixtures("own_heap")
def test_a_pull_back_keeps_only_what_it_reads():
    """The output is dropped by the caller, and then it is gone."""
    pipe = fpipe.Pipe(
        [dense(), dense(activation=lambda y: y)], [1, 1], chunks=1, checkpoint="always"
    )
    x = jnp.ones((4, 4))
    params = pipe.init(jax.random.key(0), x)
    y, pull = jax.vjp(lambda p: pipe(p, x), params)
    cotangent, gone = jnp.ones_like(y), weakref.ref(y)
    del y
    gc.collect()
    assert gone() is None
    pull(cotangent)


# Each two of them meet.
@pytest.mark.parametrize(
    ("kind", "chunks", "devices"),
    [
        (jnp.asarray, 1, [0]),
        (jnp.asarray, 2, [0, 0]),
        (jnp.asarray, 1, [0, 1]),
        (np.asarray, 2, [0]),
        (np.asarray, 1, [0, 0]),
        (np.asarray, 2, [0, 1]),
    ],
)
def test_no_array_of_the_users_is_deleted_or_changed(kind, chunks, devices):
    identity = fpipe.Layer(lambda p, x, *, side=None: x)
    layers = [dense(), identity, *([cast_weights(dense())] * (len(devices) - 1))]
    pipe = fpipe.Pipe(
        layers,
        [2, 1][: len(devices)],
        [jax.devices()[d] for d in devices],
        chunks=chunks,
    )
    case = Case([dense()], chunks)
    given = [*case.params(), (), *case.params()][: len(layers)]
    x, target = kind(np.asarray(case.x)), kind(np.asarray(case.target))
    side, key = kind(np.ones((10, 4), np.float32)), jax.random.key(0)
    params = pipe.place(given)
    before = jax.tree.map(np.array, (params, x, target, side))
    # What comes back is donated: that must not reach back to what was given.
    spoil = jax.jit(lambda tree: jax.tree.map(lambda a: a * 0, tree), donate_argnums=0)
    for _ in range(2):
        loss, grads = pipe.value_and_grad(mse, argnums=(0, 1, 2))(
            params, x, target, side=side, key=key
        )
        assert float(loss) > 0
        for leaf in jax.tree.leaves(grads):
            spoil(leaf)
        jax.block_until_ready(pipe(params, x))
    after = jax.tree.map(np.array, (params, x, target, side))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_only_sums_are_donated():
    """The one buffer that a program may overwrite is the accumulator that the plan
    itself made.
    """
    case = Case(models()["nested"], 3)
    pipe = fpipe.Pipe(case.layers, [2, 1, 2], chunks=3)
    params = pipe.place(case.params())
    step = pipe.value_and_grad(mse)
    deleted, seen = set(), {}

    def watch(item, slots):
        del item
        plan = plan_of(pipe)
        seen.update(
            {n: (plan.slots[n].name, a) for n, a in enumerate(slots) if a is not None}
        )
        deleted.update(
            name
            for name, a in seen.values()
            if isinstance(a, jax.Array) and a.is_deleted()
        )

    with observing(watch):
        step(params, case.x, case.target)
    assert deleted
    assert {name.split()[0] for name in deleted} == {"sum"}


@pytest.mark.parametrize("tied", [False, True])
def test_where_weights_are_all_a_plan_of_scan_is_near_the_compiled_one(
    tied,
):
    def init(key, x):
        return jnp.ones((x.shape[-1], 256))

    layers = [fpipe.Layer(lambda w, x: jnp.tanh(x @ w), init, name="owner")] * 2
    if tied:  # a second weight on every device, and its gradient
        borrower = fpipe.Layer(
            lambda _, x, *, borrowed: x @ borrowed["owner"].T,
            lambda key, x: (),
            borrow=("owner",),
        )
        layers = [layers[0], borrower]
    pipe = fpipe.Pipe(layers, [1, 1], chunks=4, checkpoint="always", executor="scan")
    x = jax.ShapeDtypeStruct((4, 256), jnp.float32)
    shapes, compiled = (
        pipe.plan(None, x, optimizer=0.0, compiled=c).peak for c in (False, True)
    )
    assert 4 * 256 * 256 * (4 if tied else 2) < shapes <= compiled < 1.05 * shapes


def test_a_plan_counts_inputs_where_the_caller_has_them_and_nothing_reads_them():
    pipe = fpipe.Pipe([dense()] * 2, [1, 1], chunks=2)

    def inputs(x, *targets):
        plan = pipe.plan(None, x, *targets, loss_fn=mse)
        return [row.memory["inputs"] for row in plan.devices]

    x = np.ones((4, 4), np.float32)
    here, there = (jax.device_put(x, device) for device in pipe.devices)
    (read, _), size = inputs(x, x), x.nbytes
    assert inputs(there, x)[1] == inputs(x, x)[1] + size
    assert inputs(there, here) == [read + size, inputs(here, there)[1] + size]
    assert inputs(there, there)[1] == inputs(here, there)[1]  # one array
