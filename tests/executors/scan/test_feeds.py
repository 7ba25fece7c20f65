"""Large inputs of the scan executor: each device has its share of the microbatches, and
the one that reads gets them in time.
"""

import random

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fpipe
from fpipe._executors.scan import feeds
from fpipe._executors.scan.feeds import LARGE, feed_steps, is_large, share
from fpipe.schedules import Action, Kind, Schedule
from tests.executors.helpers import machine_of, scan_executor
from tests.executors.scan.poison import poison
from tests.helpers import WIDTH, Case, assert_same, dense, models, mse, noise


def brought(order, microbatches, devices, reader):
    """What the reader has in each step that reads, when every device does as it is told
    and passes on what it holds.
    """
    rows, early = feed_steps(order, microbatches, devices, reader)
    own = share(microbatches, devices)
    come, read = [None] * devices, []
    for row in rows:
        here = [d * own + n if n < own else come[d] for d, n in enumerate(row)]
        read.append(here[reader])
        come = [
            here[(d + 1) % devices] if (d + 1) % devices != reader else None
            for d in range(devices)
        ]
    return read[early:], early


@pytest.mark.quick
def test_every_microbatch_arrives_when_it_is_read():
    rng = random.Random(0)
    for _ in range(400):
        devices, m = rng.randint(2, 6), rng.randint(1, 14)
        reader, order = rng.randrange(devices), list(range(m))
        if rng.random() < 0.7:
            rng.shuffle(order)
        read, early = brought(order, m, devices, reader)
        assert read == order
        assert early < devices


def test_in_order_the_first_device_needs_no_steps_before_and_the_last_one():
    assert feed_steps(range(8), 8, 4, 0)[1] == 0
    assert feed_steps(range(8), 8, 4, 3)[1] == 1


def test_what_is_large(monkeypatch):
    assert LARGE == 16 * 2**20
    # It saves 12 MiB.
    assert not is_large(jax.ShapeDtypeStruct((2**22,), jnp.float32), 4)
    assert is_large(jax.ShapeDtypeStruct((2**23,), jnp.float32), 4)
    assert not is_large(jax.ShapeDtypeStruct((2**23,), jnp.int8), 4)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2**23))
    assert not is_large(keys, 4)
    # There is nothing to save on one device.
    assert not is_large(jax.ShapeDtypeStruct((2**30,), jnp.float32), 1)
    monkeypatch.setattr(feeds, "LARGE", -1)
    assert not is_large(jax.ShapeDtypeStruct((), jnp.float32), 4)


@pytest.fixture
def all_large(monkeypatch):
    """Every input is large."""
    monkeypatch.setattr(feeds, "LARGE", 0)


def pipe_of(layers, balance, chunks, **options):
    return fpipe.Pipe(layers, balance, chunks=chunks, executor="scan", **options)


# A model, the devices, the schedule, the checkpoint mode and the number of
# microbatches, divided by the devices or not.
CASES = [
    ("plain", 4, "eager_1f1b", "never", 6),
    ("stateful", 4, "1f1b", "except_last", 3),
    ("jump3", 2, "interleaved_1f1b", "always", 5),
    ("nested", 4, "zb_h1", "never", 4),
    ("tied", 2, "zb_v", "always", 7),
]


@pytest.mark.parametrize(
    ("model", "devices", "schedule", "checkpoint", "chunks"), CASES
)
@pytest.mark.usefixtures("all_large")
def test_nothing_changes_but_where_inputs_lie(
    monkeypatch, model, devices, schedule, checkpoint, chunks
):
    """Inside and outside of the loss, with everything that is on no way filled with
    NaN.
    """
    layers = models()[model]
    case = Case(layers, chunks, rows=2 * chunks)
    params, needs = case.params(), case.needs
    options = {
        "devices": jax.devices()[:devices],
        "schedule": schedule,
        "checkpoint": checkpoint,
    }
    filled = poison(monkeypatch)
    pipe = pipe_of(layers, (1, 1, 1, len(layers) - 3), chunks, **options)
    placed = pipe.place(params)
    value, grads = pipe.value_and_grad(mse, argnums=(0, 1))(
        placed, case.x, case.target, **needs
    )
    want = case.reference.value_and_grad(mse, argnums=(0, 1))(
        params, case.x, case.target, **needs
    )
    assert_same((value, (pipe.gather(grads[0]), grads[1])), want)
    assert filled
    fed = {
        (stack.leaf.port.kind, feed.kind)
        for phase in machine_of(pipe).segments[0].phases
        for feed in phase.feeds
        for stack in feed.stacks
    }
    # One microbatch alone is on each device anyway.
    assert ({("x", "F"), ("targets", "F")} <= fed) == (chunks > 1), fed

    def total(run):
        def f(params, x):
            out = run(params, x, **needs)
            return jnp.sum((out if needs["state"] is None else out[0]) ** 2)

        return jax.value_and_grad(f, argnums=(0, 1))

    value, grads = total(pipe)(placed, case.x)
    assert_same(
        (value, (pipe.gather(grads[0]), grads[1])),
        total(case.reference)(params, case.x),
    )


def test_only_what_is_large_lies_over_the_devices(monkeypatch):
    """Of one `x` an image does and a number per row does not; what goes whole to every
    microbatch does not either.
    """

    def mix(p, x):
        return (x["image"] @ p) * x["scale"][:, None] + x["bias"]

    layers = [
        fpipe.Layer(mix, lambda key, x: noise(key, (WIDTH, WIDTH)) * 0.3),
        *[dense()] * 3,
    ]
    rows = 8
    x = {
        "image": noise(jax.random.key(0), (rows, WIDTH)),
        "scale": jnp.linspace(0.5, 1.5, rows),
        "bias": fpipe.NoChunk(jnp.ones((64, WIDTH))[0]),
    }
    ref, pipe = fpipe.sequential(layers, chunks=4), pipe_of(layers, (1, 1, 1, 1), 4)
    monkeypatch.setattr(feeds, "LARGE", x["scale"].nbytes)
    params = ref.init(jax.random.key(1), x)
    value, grads = pipe.value_and_grad(lambda y: jnp.mean(y**2))(pipe.place(params), x)
    assert_same(
        (value, pipe.gather(grads)),
        ref.value_and_grad(lambda y: jnp.mean(y**2))(params, x),
    )
    spread = [stack.leaf for stack in machine_of(pipe).spread]
    assert [(leaf.port.kind, leaf.number) for leaf in spread] == [
        ("x", 1)
    ]  # bias, image, scale


@pytest.mark.usefixtures("all_large")
def test_side_inputs_with_one_reader_are_fed():
    """What two stages read lies on every device."""

    def add(w, x, *, side):
        return x @ w + side["one"] + side["both"]

    def scale(w, x, *, side):
        return x @ w * side["both"]

    def make(key, x):
        return noise(key, (WIDTH, WIDTH)) * 0.3

    def square(y):
        return jnp.mean(y**2)

    layers = [dense(), fpipe.Layer(scale, make), fpipe.Layer(add, make), dense()]
    keys = jax.random.split(jax.random.key(3), 3)
    x, one, both = (noise(key, (7, WIDTH)) for key in keys)
    side = {"one": one, "both": both}
    ref, pipe = fpipe.sequential(layers, chunks=4), pipe_of(layers, (1, 1, 1, 1), 4)
    params = ref.init(jax.random.key(1), x, side)
    placed = pipe.place(params)
    value, grads = pipe.value_and_grad(square)(placed, x, side=side)
    want = ref.value_and_grad(square)(params, x, side=side)
    assert_same((value, pipe.gather(grads)), want)
    fed = {str(stack.leaf) for stack in machine_of(pipe).spread}
    assert fed == {"x[0]", "side[1]"}  # both, one
    outside = jax.grad(lambda side: square(pipe(placed, x, side)))(side)
    assert_same(outside, jax.grad(lambda side: square(ref(params, x, side)))(side))


def test_a_reader_that_is_far_at_the_start_gets_ticks_before(monkeypatch):
    """Stage 0 on the last device: the first microbatch, on device 0, has one device to
    go before anything runs.
    """
    m, layers = 4, [dense()] * 2
    kinds: tuple[Kind, ...] = ("F", "B")
    rows = [[Action(kind, s, i) for kind in kinds for i in range(m)] for s in (1, 0)]
    schedule = Schedule(actions=tuple(map(tuple, rows)), stage_to_device=(1, 0))
    case = Case(layers, m, rows=8)
    params = case.params()
    monkeypatch.setattr(feeds, "LARGE", 0)
    pipe = pipe_of(
        layers, (1, 1), m, devices=jax.devices()[:2], schedule=lambda *_: schedule
    )
    value, grads = pipe.value_and_grad(mse)(pipe.place(params), case.x, case.target)
    assert_same(
        (value, pipe.gather(grads)),
        case.reference.value_and_grad(mse)(params, case.x, case.target),
    )
    table = machine_of(pipe).segments[0].table
    monkeypatch.setattr(feeds, "LARGE", LARGE)
    whole = fpipe.Pipe(
        layers,
        chunks=m,
        executor="scan",
        devices=jax.devices()[:2],
        schedule=lambda *_: schedule,
    )
    whole.value_and_grad(mse)(whole.place(params), case.x, case.target)
    assert table.shape[1] == machine_of(whole).segments[0].table.shape[1] + 1


def test_each_device_holds_its_share(monkeypatch):
    """Bytes, of what is given and of what the compiled program takes: a quarter, at any
    number of microbatches.
    """
    layers = [dense(64)] * 4
    for m in (8, 32):
        x = jnp.ones((64 * m, 64))
        held = {}
        for large in (0, LARGE):
            monkeypatch.setattr(feeds, "LARGE", large)
            pipe = pipe_of(layers, (1, 1, 1, 1), m, schedule="eager_1f1b")
            params = pipe.init(jax.random.key(0), x)
            (laid,) = scan_executor(pipe).bring([np.asarray(x)])
            assert {s.data.nbytes for s in laid.addressable_shards} == {
                x.nbytes // 4 if large == 0 else x.nbytes
            }
            analysis = (
                jax.jit(pipe.value_and_grad(mse))
                .lower(params, laid, laid)
                .compile()
                .memory_analysis()
            )
            assert analysis is not None
            held[large] = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
        assert held[LARGE][0] - held[0][0] == 2 * x.nbytes * 3 // 4
        # The loop holds what is on its way, a few microbatches, and no copy of the
        # whole.
        assert held[0][1] - held[LARGE][1] < 12 * x.nbytes // m, held


@pytest.mark.usefixtures("all_large")
def test_a_batch_over_both_axes():
    mesh = jax.make_mesh((2, 2), ("data", "stage"), axis_types=(AxisType.Auto,) * 2)
    layers = [dense()] * 4
    case = Case(layers, 4, rows=16)
    pipe, params = pipe_of(layers, [2, 2], 4, mesh=mesh), case.params()
    want = case.reference.value_and_grad(mse)(params, case.x, case.target)
    for axes in (P("data"), P("stage"), P(("stage", "data")), P()):
        given = jax.device_put((case.x, case.target), NamedSharding(mesh, axes))
        value, grads = jax.jit(pipe.value_and_grad(mse))(pipe.place(params), *given)
        assert_same((value, pipe.gather(grads)), want)


@pytest.mark.usefixtures("all_large")
def test_the_same_with_bfloat16_and_integers():
    table = noise(jax.random.key(0), (11, WIDTH)).astype(jnp.bfloat16)
    layers = [fpipe.Layer(lambda p, x: p[x], lambda key, x: table), *[dense()] * 3]
    x, target = (
        jnp.arange(8 * 7).reshape(8, 7) % 11,
        jnp.ones((8, 7, WIDTH), jnp.bfloat16),
    )
    ref, pipe = fpipe.sequential(layers, chunks=4), pipe_of(layers, (1, 1, 1, 1), 4)
    blocks = [
        made
        for made, *_ in [
            fpipe.sequential([dense()]).init(jax.random.key(1), jnp.ones((1, WIDTH)))
        ]
        * 3
    ]
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (table, *blocks))
    value, grads = pipe.value_and_grad(mse)(pipe.place(params), x, target)
    want = ref.value_and_grad(mse)(params, x, target)
    chex.assert_trees_all_equal_shapes_and_dtypes((value, pipe.gather(grads)), want)
    assert_same((value, pipe.gather(grads)), want, tolerance=1e-2)


@pytest.mark.usefixtures("all_large")
def test_a_program_from_the_compilation_cache_keeps_the_order_of_what_moves():
    """Six moves in a phase, and none needs another's result. The second program is
    loaded; without an order among them the devices then wait for each other in
    different ones (jax 0.10.2), which ends the process.
    """
    layers = models()["jump3"]
    case = Case(layers, 2, rows=4)
    params, needs = case.params(), case.needs
    want = case.reference.value_and_grad(mse, argnums=(0, 1, 2))(
        params, case.x, case.target, **needs
    )
    options = {
        "devices": jax.devices()[:3],
        "schedule": "gpipe",
        "checkpoint": jax.checkpoint_policies.dots_saveable,
    }
    for _ in range(2):
        pipe = pipe_of(layers, (1, 2, 1), 2, **options)
        value, grads = pipe.value_and_grad(mse, argnums=(0, 1, 2))(
            pipe.place(params), case.x, case.target, **needs
        )
        assert_same((value, (pipe.gather(grads[0]), *grads[1:])), want)
