"""`Pipe` itself: what it refuses and how it says so, what it is as a value, where it
puts things, which schedules it takes.
"""

import copy
import dataclasses
import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import fpipe
import fpipe.optim
from fpipe.schedules import Schedule
from tests.helpers import Case, assert_same, dense, models, mse, raises

DEVICES = jax.devices()
SIN = fpipe.fn(jnp.sin)


def scaled(params, x):
    return jnp.sin(x * params)


def scaled_init(key, x):
    return jax.random.uniform(key, x.shape[-1:])


SCALED = fpipe.Layer(scaled, scaled_init)


def mesh_of(*devices):
    return jax.make_mesh(
        (len(devices),), ("a",), axis_types=(AxisType.Auto,), devices=devices
    )


def devices_of(tree):
    return [leaf.devices() for leaf in jax.tree.leaves(tree)]


def assert_equal(got, want):
    """Leaf for leaf, bit for bit."""
    assert_same(got, want, tolerance=0)


# --- what is refused ---

WRONG = {
    "sum": (
        {"balance": [1, 1]},
        ValueError,
        "`Pipe(balance=[1, 1])`: that is 2 layers, but the model has 4",
    ),
    "sum, more": (
        {"balance": (4, 1)},
        ValueError,
        "`Pipe(balance=(4, 1))`: that is 5 layers, but the model has 4",
    ),
    "zero": (
        {"balance": [0, 4]},
        ValueError,
        "`Pipe(balance=[0, 4])`: every stage needs at least one layer",
    ),
    "negative": (
        {"balance": [-1, 5]},
        ValueError,
        "`Pipe(balance=[-1, 5])`: every stage needs at least one layer",
    ),
    "empty": (
        {"balance": []},
        ValueError,
        "`Pipe(balance=[])`: every stage needs at least one layer",
    ),
    "float": (
        {"balance": [2.0, 2]},
        TypeError,
        "`Pipe(balance=[2.0, 2])`: layers per stage must be ints",
    ),
    "bool": (
        {"balance": [True, 3]},
        TypeError,
        "`Pipe(balance=[True, 3])`: layers per stage must be ints",
    ),
    "none in it": (
        {"balance": [4, None]},
        TypeError,
        "`Pipe(balance=[4, None])`: layers per stage must be ints",
    ),
    "string": (
        {"balance": "22"},
        TypeError,
        "`Pipe(balance='22')`: a sequence of layers per stage is needed",
    ),
    "bytes": (
        {"balance": b"\2\2"},
        TypeError,
        "a sequence of layers per stage is needed, such as [4]",
    ),
    "number": (
        {"balance": 4},
        TypeError,
        "`Pipe(balance=4)`: a sequence of layers per stage is needed, such as [4]",
    ),
    "chunks 0": (
        {"chunks": 0},
        ValueError,
        "`Pipe(chunks=0)`: chunks must be at least 1",
    ),
    "chunks -1": (
        {"chunks": -1},
        ValueError,
        "`Pipe(chunks=-1)`: chunks must be at least 1",
    ),
    "chunks 2.5": (
        {"chunks": 2.5},
        TypeError,
        "`Pipe(chunks=2.5)`: chunks must be an int",
    ),
    "chunks True": (
        {"chunks": True},
        TypeError,
        "`Pipe(chunks=True)`: chunks must be an int",
    ),
    "chunks string": (
        {"chunks": "2"},
        TypeError,
        "`Pipe(chunks='2')`: chunks must be an int",
    ),
    "checkpoint": (
        {"checkpoint": "sometimes"},
        ValueError,
        "`Pipe(checkpoint='sometimes')`: one of 'always', 'except_last', 'never', or a "
        "policy of",
    ),
    "checkpoint type": (
        {"checkpoint": True},
        TypeError,
        "`Pipe(checkpoint=True)`: one of 'always', 'except_last'",
    ),
    "schedule": (
        {"schedule": "zigzag"},
        ValueError,
        "`Pipe(schedule='zigzag')`: one of 'gpipe', '1f1b', 'eager_1f1b', "
        "'interleaved_1f1b', 'looped_bfs', 'zb_h1', "
        "'zb_h2', 'zb_v', 'v_half', 'v_min', 'dualpipe_v', 'forward_only', a Schedule, "
        "or a function `f(devices, "
        "microbatches)` that makes one",
    ),
    "schedule type": (
        {"schedule": 3},
        TypeError,
        "`Pipe(schedule=3)`: one of 'gpipe', '1f1b', 'eager_1f1b'",
    ),
    "recompute": (
        {"recompute": "late"},
        ValueError,
        "`Pipe(recompute='late')`: one of 'auto', 'early', 'with_backward'",
    ),
    "offload": (
        {"offload": 0},
        ValueError,
        "`Pipe(offload=0)`: offload must be at least 1",
    ),
    "offload type": (
        {"offload": 1.5},
        TypeError,
        "`Pipe(offload=1.5)`: offload must be an int",
    ),
    "offload of other devices": (
        {"offload": [1, 2, 3]},
        ValueError,
        "`Pipe(offload=[1, 2, 3])`: a number for each device is needed, 4 in all, got "
        "3",
    ),
    "schedule made": (
        {"schedule": lambda d, m: d * m},
        TypeError,
        "the function returned 4, no fpipe.schedules.Schedule",
    ),
    "executor": (
        {"executor": "gpu"},
        ValueError,
        '`Pipe(executor=\'gpu\')`: the executor is "placed" or "scan"',
    ),
    "no device": (
        {"devices": []},
        ValueError,
        "`Pipe(devices=[])`: at least one device is needed",
    ),
    "one device": (
        {"devices": DEVICES[0]},
        TypeError,
        f"a sequence of jax.Device, Mesh or Sharding, got {DEVICES[0]!r} alone; write "
        "[device]",
    ),
    "devices string": (
        {"devices": "cpu"},
        TypeError,
        "a sequence of jax.Device, Mesh or Sharding, got 'cpu'",
    ),
    "devices number": (
        {"devices": 2},
        TypeError,
        "a sequence of jax.Device, Mesh or Sharding, got 2",
    ),
    "device number": (
        {"devices": [0, 1, 2, 3]},
        TypeError,
        "`devices`: 0 is neither a jax.Device nor a Mesh or Sharding; take them from "
        "`jax.devices()`",
    ),
    "device mesh": (
        {
            "devices": [NamedSharding(mesh_of(*DEVICES[:2]), PartitionSpec("a"))],
            "balance": [4],
        },
        ValueError,
        "says how arrays are cut, but a stage needs only a mesh",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_says_what_was_given_and_what_would_be_right(name):
    options, kind, text = WRONG[name]
    with pytest.raises(kind) as caught:
        fpipe.Pipe([SIN] * 4, **options)
    assert type(caught.value) is kind
    assert text in str(caught.value)


@pytest.mark.parametrize("given", ["cpu", 2])
def test_what_an_error_about_devices_suggests_to_write_is_accepted(given):
    with pytest.raises(
        TypeError, match=r"a sequence of jax\.Device, Mesh or Sharding"
    ) as caught:
        fpipe.Pipe([SIN], devices=given)
    assert f"write [{given!r}]" not in str(caught.value)  # that would be an error too


@pytest.mark.parametrize("devices", [None, DEVICES[:2]])
def test_too_few_devices_says_how_to_simulate_more(devices):
    with pytest.raises(
        ValueError, match="5 devices are needed but there are"
    ) as caught:
        fpipe.Pipe([SIN] * 5, [1] * 5, devices)
    text = str(caught.value)
    assert f"there are {4 if devices is None else 2}." in text
    assert 'jax.config.update("jax_num_cpu_devices", 5)' in text
    assert "before the first use of JAX" in text
    assert "`devices=[jax.devices()[0]] * 5`" in text
    assert fpipe.Pipe([SIN] * 5, [1] * 5, [jax.devices()[0]] * 5).balance == (1,) * 5


def test_no_layer_is_an_error():
    with pytest.raises(
        ValueError, match="a pipeline needs at least one layer, got none"
    ):
        fpipe.Pipe([])


def test_a_mismatch_of_skips_is_found_when_the_pipe_is_made():
    with pytest.raises(
        ValueError,
        match="'skip' is stashed by layer 1 'stash', but no later layer pops it",
    ):
        fpipe.Pipe([SIN, models()["nested"][0]])


# --- balance and devices ---


@pytest.mark.quick
@pytest.mark.parametrize(
    ("layers", "balance"),
    [
        (1, (1,)),
        (3, (1, 1, 1)),
        (4, (1, 1, 1, 1)),
        (5, (2, 1, 1, 1)),
        (7, (2, 2, 2, 1)),
        (9, (3, 2, 2, 2)),
    ],
)
def test_the_default_balance_is_as_even_as_possible(layers, balance):
    assert fpipe.Pipe([SIN] * layers).balance == balance


def test_the_default_balance_is_over_the_devices_given():
    assert fpipe.Pipe([SIN] * 5, devices=DEVICES[:2]).balance == (3, 2)
    assert fpipe.Pipe([SIN] * 5, devices=[DEVICES[3]]).balance == (5,)


def test_balance_and_chunks_may_be_numpy_integers():
    given: dict[str, Any] = {"balance": np.array([3, 1]), "chunks": np.int64(2)}
    pipe = fpipe.Pipe([SIN] * 4, **given)
    assert pipe == fpipe.Pipe([SIN] * 4, [3, 1], chunks=2)
    assert {type(n) for n in (*pipe.balance, pipe.chunks)} == {int}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("given", "used"),
    [
        ([2, 0], [2, 0]),
        ([1, 1], [1, 1]),
        ([3, 2, 1, 0], [3, 2]),
        (None, [0, 1]),
    ],
    ids=["any order", "repeated", "extra ones ignored", "default"],
)
def test_parameters_outputs_and_gradients_are_on_the_devices_given(given, used):
    devices = None if given is None else [DEVICES[d] for d in given]
    pipe = fpipe.Pipe([SCALED, SCALED], [1, 1], devices, chunks=2)
    assert pipe.devices == tuple(DEVICES[d] for d in used)
    x = jnp.ones((4, 3))
    params = pipe.init(jax.random.key(0), x)
    places = [{DEVICES[d]} for d in used]
    assert devices_of(params) == places
    _, grads = pipe.value_and_grad(jnp.mean)(params, x)
    assert devices_of(grads) == places
    assert pipe(params, x).devices() == places[-1]


def test_a_sharding_of_one_device_stands_for_the_device():
    shardings = [
        SingleDeviceSharding(DEVICES[3]),
        NamedSharding(mesh_of(DEVICES[2]), PartitionSpec()),
    ]
    pipe = fpipe.Pipe([SCALED, SCALED], [1, 1], shardings)
    assert pipe.devices == (DEVICES[3], DEVICES[2])
    assert pipe == fpipe.Pipe([SCALED, SCALED], [1, 1], [DEVICES[3], DEVICES[2]])
    x = jnp.ones((2, 3))
    assert devices_of(pipe.init(jax.random.key(0), x)) == [{DEVICES[3]}, {DEVICES[2]}]


def test_devices_may_come_from_a_generator_as_layers_may():
    pipe = fpipe.Pipe((layer for layer in [SIN, SIN]), devices=iter(DEVICES))
    assert pipe.devices == tuple(DEVICES[:2])


# --- a value ---


def permuted(devices, microbatches):
    """Microbatches last to first."""
    order = range(microbatches - 1, -1, -1)
    rows = [
        [(kind, d, i) for i in order for kind in "F"] + [("B", d, i) for i in order]
        for d in range(devices)
    ]
    return Schedule(rows, name="permuted")


def looped(devices, microbatches):
    """Two stages on each device: `d` and `d + D`. All forwards, then all backwards."""
    rows = [
        [("F", s, i) for s in (d, d + devices) for i in range(microbatches)]
        + [("B", s, i) for s in (d + devices, d) for i in range(microbatches)]
        for d in range(devices)
    ]
    return Schedule(rows, [s % devices for s in range(2 * devices)], "looped")


VALUES = {
    "default": {},
    "named": {
        "balance": [1, 2],
        "devices": [DEVICES[3], DEVICES[1]],
        "chunks": 3,
        "schedule": "gpipe",
    },
    "sharding": {"devices": [SingleDeviceSharding(DEVICES[2])], "checkpoint": "never"},
    "policy": {"balance": [2, 1], "checkpoint": jax.checkpoint_policies.dots_saveable},
    "schedule": {
        "balance": [2, 1],
        "chunks": 2,
        "schedule": fpipe.schedules.gpipe(2, 2),
    },
    "function": {"balance": [1, 1, 1], "chunks": 2, "schedule": permuted},
}
COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda pipe: pickle.loads(pickle.dumps(pipe)),
    "replace": dataclasses.replace,
}


@pytest.mark.parametrize("name", VALUES)
def test_a_pipe_equals_another_one_made_of_the_same(name):
    one, other = (fpipe.Pipe([SCALED] * 3, **VALUES[name]) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert {one: 1}[other] == 1


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", VALUES)
def test_a_copy_of_a_pipe_equals_it(name, how):
    pipe = fpipe.Pipe([SCALED] * 3, **VALUES[name])
    other = COPIES[how](pipe)
    assert other is not pipe
    assert other == pipe
    assert hash(other) == hash(pipe)
    assert all(a is b for a, b in zip(other.devices, pipe.devices, strict=True))


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_pipe_that_ran_computes_the_same(how):
    pipe = fpipe.Pipe([SCALED] * 3, **VALUES["named"])
    x = jnp.linspace(0, 1, 15).reshape(5, 3)
    params = pipe.init(jax.random.key(0), x)
    want = pipe.value_and_grad(jnp.mean)(params, x)
    assert_equal(COPIES[how](pipe).value_and_grad(jnp.mean)(params, x), want)


@pytest.mark.parametrize(
    "change",
    [
        {"chunks": 2},
        {"balance": (2, 1)},
        {"devices": DEVICES[1:3]},
        {"checkpoint": "never"},
        {"schedule": "gpipe"},
        {"layers": [SCALED, SCALED, SIN]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_replaced_field_makes_another_pipe(change):
    pipe = fpipe.Pipe([SCALED] * 3, [1, 2], DEVICES[:2])
    other = dataclasses.replace(pipe, **change)
    assert other != pipe
    assert other == fpipe.Pipe(
        **{"layers": [SCALED] * 3, "balance": [1, 2], "devices": DEVICES[:2]} | change
    )
    kept = [f.name for f in dataclasses.fields(pipe) if f.name not in change]
    assert [getattr(other, n) for n in kept] == [getattr(pipe, n) for n in kept]


def test_a_replaced_field_is_checked():
    with pytest.raises(ValueError, match="that is 2 layers, but the model has 3"):
        dataclasses.replace(fpipe.Pipe([SCALED] * 3), balance=(1, 1))


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(fpipe.Pipe)])
def test_a_pipe_is_frozen(field):
    pipe = fpipe.Pipe([SCALED])
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(pipe, field, getattr(pipe, field))
    with pytest.raises(dataclasses.FrozenInstanceError):
        delattr(pipe, field)


def test_a_pipe_with_skips_in_namespaces_pickles():
    pair = [fpipe.Layer(stash_it, stash=["s"]), fpipe.Layer(pop_it, pop=["s"])]
    spaces = fpipe.Namespace(), fpipe.Namespace()
    layers = [
        pair[0].isolate(spaces[0]),
        pair[0].isolate(spaces[1]),
        pair[1].isolate(spaces[0]),
        pair[1].isolate(spaces[1]),
    ]
    pipe = fpipe.Pipe(layers, [1, 1, 1, 1])
    again = pickle.loads(pickle.dumps(pipe))
    assert again == pipe
    x = jnp.linspace(0, 1, 6).reshape(2, 3)
    assert_equal(again(((),) * 4, x), pipe(((),) * 4, x))


def stash_it(params, x, *, carry):
    del params
    return 2 * x + 1, fpipe.stash(carry, "s", x)


def pop_it(params, x, *, carry):
    del params
    s, carry = fpipe.pop(carry, "s")
    return x * s, carry


def test_a_pipe_unpickled_where_a_device_is_missing_says_which(monkeypatch):
    data = pickle.dumps(fpipe.Pipe([SCALED], devices=[DEVICES[3]]))
    monkeypatch.setattr(jax, "devices", lambda platform=None: DEVICES[:2])
    with pytest.raises(
        ValueError, match=r"unpickling a Pipe: there is no device cpu:3 here"
    ):
        pickle.loads(data)


def test_layers_are_flattened_and_keep_their_names():
    pipe = fpipe.Pipe(
        [
            dataclasses.replace(SCALED, name="a"),
            [SIN, (scaled, [dataclasses.replace(SIN, name="d")])],
        ]
    )
    assert [layer.name for layer in pipe.layers] == ["a", "sin", "scaled", "d"]


# --- parameters and state ---


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        *((model, False) for model in models()),
        *((model, True) for model in ("nested", "tied", "stateful", "sided")),
    ],
)
def test_init_equals_that_of_sequential_and_lives_on_each_layers_device(model, shapes):
    layers = models()[model]
    case = Case(layers, chunks=3)
    balance = [1, 1, len(layers) - 2]
    devices = [DEVICES[d] for d in (2, 3, 1)]
    pipe = fpipe.Pipe(layers, balance, devices, chunks=3)
    inputs = (case.x, case.side)
    if shapes:
        inputs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), inputs)
    x, side = inputs
    made = pipe.init(jax.random.key(7), x, side=side)
    assert isinstance(made, tuple)
    assert_equal(made, case.reference.init(jax.random.key(7), case.x, side=case.side))
    where = [
        device
        for device, count in zip(devices, balance, strict=True)
        for _ in range(count)
    ]
    for params, device in zip(made, where, strict=True):
        assert devices_of(params) == [{device}] * len(devices_of(params))


@pytest.mark.parametrize("shapes", [False, True], ids=["arrays", "shapes"])
def test_init_state_equals_that_of_sequential_and_lives_on_each_layers_device(shapes):
    layers = models()["stateful"]
    case = Case(layers, chunks=3)
    pipe = fpipe.Pipe(layers, [1, 1, 2], [DEVICES[d] for d in (2, 3, 1)], chunks=3)
    x = jax.ShapeDtypeStruct(case.x.shape, case.x.dtype) if shapes else case.x
    made = pipe.init_state(x)
    assert_equal(made, case.reference.init_state(case.x))
    assert [s is None for s in made] == [False, True, False, True]
    assert devices_of(made) == [{DEVICES[2]}] * 2 + [{DEVICES[1]}] * 2


def test_init_state_of_a_model_without_init_needs_the_parameters():
    layers = [dataclasses.replace(layer, init=None) for layer in models()["stateful"]]
    case = Case(models()["stateful"], chunks=3)
    pipe = fpipe.Pipe(layers, [2, 2], chunks=3)
    with pytest.raises(
        ValueError,
        match=r"layer 0 'counter' has no init.*`init_state\(x, params=params\)`",
    ):
        pipe.init_state(case.x)
    wrong: Any = 3
    with pytest.raises(ValueError, match=r"`init_state\(params=...\)`.*got an int"):
        pipe.init_state(case.x, params=wrong)
    params = pipe.place(case.params())
    assert_equal(
        pipe.init_state(case.x, params=params), case.reference.init_state(case.x)
    )


def test_init_of_a_layer_without_init_says_what_to_do():
    with pytest.raises(
        ValueError,
        match=r"layer 1 'scaled' has no init; give it one with `fpipe.Layer\(apply, "
        r"init\)`",
    ):
        fpipe.Pipe([SCALED, scaled]).init(jax.random.key(0), jnp.ones((2, 3)))


def test_init_sees_the_shapes_of_one_microbatch():
    seen = []

    def init(key, x):
        del key
        seen.append(x.shape)
        return jnp.zeros(x.shape[0])

    layer = fpipe.Layer(lambda p, x: x * p.sum(), init)
    params = fpipe.Pipe([layer], chunks=4).init(
        jax.random.key(0), jax.ShapeDtypeStruct((10, 2), jnp.float32)
    )
    assert seen == [(3, 2)]
    assert params[0].shape == (3,)


def test_gather_is_the_inverse_of_place():
    params = (
        {
            "w": jnp.linspace(0, 1, 6).reshape(2, 3),
            "none": None,
            "n": np.arange(3, dtype=np.int32),
        },
        [jnp.ones(2, jnp.bfloat16), (jax.random.key(3),), jnp.array(True)],
        (),
        jnp.float32(2),
    )
    layers = [fpipe.Layer(lambda p, x: x)] * 4
    pipe = fpipe.Pipe(layers, [1, 1, 1, 1], DEVICES[::-1])
    placed = pipe.place(params)
    assert jax.tree.structure(placed) == jax.tree.structure(params)
    assert devices_of(placed) == [{DEVICES[3]}] * 2 + [{DEVICES[2]}] * 3 + [
        {DEVICES[0]}
    ]
    back = pipe.gather(placed)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert devices_of(back) == [{DEVICES[3]}] * 6
    for a, b, c in zip(*map(jax.tree.leaves, (params, placed, back)), strict=True):
        assert a.dtype == b.dtype == c.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b, c = map(jax.random.key_data, (a, b, c))
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


def test_placing_what_is_placed_changes_nothing():
    pipe = fpipe.Pipe([dense(), dense()])
    params = pipe.init(jax.random.key(0), jnp.ones((2, 4)))
    again = pipe.place(params)
    assert_equal(again, params)
    assert devices_of(again) == devices_of(params)


def test_place_makes_arrays_of_python_numbers():
    pipe = fpipe.Pipe([fpipe.Layer(lambda p, x: x * p["scale"])] * 2, [1, 1], chunks=2)
    placed = pipe.place(({"scale": 1.5}, {"scale": 2.0}))
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(placed)] == [
        ((), jnp.float32)
    ] * 2
    assert devices_of(placed) == [{DEVICES[0]}, {DEVICES[1]}]
    _, grads = pipe.value_and_grad(jnp.sum, reduction="sum")(placed, jnp.ones((4, 1)))
    assert_equal(
        pipe.gather(grads), ({"scale": jnp.float32(8)}, {"scale": jnp.float32(6)})
    )
    placed = pipe.place(({"scale": 2}, {"scale": True}))
    assert [a.dtype for a in jax.tree.leaves(placed)] == [jnp.int32, jnp.bool_]


def test_the_parameters_of_a_layer_may_be_none():
    """In every place that parameters have: calls, gradients, frozen, optimizers."""

    def bare(params, x):
        assert params is None
        return jnp.sin(x)

    none = fpipe.Layer(bare, lambda key, x: None)
    layers, x = [none, SCALED, none], jnp.linspace(0, 1, 12).reshape(4, 3)
    plain, tx = fpipe.sequential(layers, chunks=2), optax.sgd(0.1, momentum=0.9)
    params: Any = (None, scaled_init(jax.random.key(0), x), None)
    want = plain.value_and_grad(jnp.mean)(params, x)
    assert want[1][0] is want[1][2] is None
    updates, state = tx.update(want[1], tx.init(params), params)
    for executor in ("placed", "scan"):
        pipe = fpipe.Pipe(layers, [1, 2], chunks=2, executor=executor)
        made = pipe.gather(pipe.init(jax.random.key(1), x))
        assert_same(made, plain.init(jax.random.key(1), x))
        placed = pipe.place(params)
        assert_equal(pipe.gather(placed), params)
        assert_same(pipe(placed, x), plain(params, x))
        loss, grads = pipe.value_and_grad(jnp.mean)(placed, x)
        assert_same((loss, pipe.gather(grads)), want)
        for frozen in ((None, True, None), (False, True, False)):
            step = pipe.value_and_grad(jnp.mean, frozen=frozen)
            got = pipe.gather(step(placed, x)[1])
            assert [g if g is None else g.dtype for g in got] == [
                None,
                jax.dtypes.float0,
                None,
            ]
        own = fpipe.optim.per_stage(tx)
        changes, moments = own.update(grads, own.init(placed), placed)
        assert_same(pipe.gather(changes), updates)
        saved = fpipe.optim.gather(moments)
        assert_same(saved, state)
        again = fpipe.optim.place(saved, placed, tx)
        assert jax.tree.structure(again) == jax.tree.structure(moments)
        new = pipe.gather(fpipe.optim.apply_updates(placed, changes))
        assert_same(new, optax.apply_updates(params, updates))
        # None of the parameters is one: there is nothing to differentiate by.
        empty = fpipe.Pipe([none, none], chunks=2, executor=executor)
        nothing = empty.place((None, None))
        both = empty.value_and_grad(jnp.mean, argnums=(0, 1))
        by_params, by_x = both(nothing, x)[1]
        assert empty.gather(by_params) == (None, None)
        bare_mean = jax.grad(lambda x: jnp.mean(jnp.sin(jnp.sin(x))))
        assert_same(by_x, bare_mean(x))


@pytest.mark.parametrize(
    ("params", "got"),
    [
        (((),), "1 entry"),
        (((),) * 3, "3 entries"),
        ({"a": 1}, "a dict"),
        (3.0, "a float"),
        (None, "a NoneType"),
    ],
)
@pytest.mark.parametrize("method", ["place", "gather"])
def test_parameters_with_another_number_of_entries_are_refused(method, params, got):
    pipe = fpipe.Pipe([SIN, SIN])
    with pytest.raises(
        ValueError, match="a tuple with one entry per layer is needed"
    ) as caught:
        getattr(pipe, method)(params)
    assert (
        str(caught.value)
        == f"`{method}(params)`: a tuple with one entry per layer is needed, 2 in all, "
        f"got {got}"
    )


def test_a_checkpoint_of_one_partition_loads_in_another():
    layers = models()["plain"]
    case = Case(layers, chunks=3)
    one = fpipe.Pipe(layers, [1, 1, 2], DEVICES[:3], chunks=3)
    other = fpipe.Pipe(
        layers, [3, 1], [DEVICES[3], DEVICES[1]], chunks=3, schedule="gpipe"
    )
    params = one.place(case.params())
    _, grads = one.value_and_grad(mse)(params, case.x, case.target)
    params = jax.tree.map(
        lambda p, g: p - 0.1 * g, params, grads
    )  # a step on each device

    stored = pickle.dumps(jax.tree.map(np.asarray, one.gather(params)))
    loaded = other.place(pickle.loads(stored))
    assert devices_of(loaded) == [{DEVICES[3]}] * 6 + [{DEVICES[1]}] * 2
    assert_equal(other.gather(loaded), other.gather(params))
    want = one.value_and_grad(mse)(params, case.x, case.target)
    assert_same(other.value_and_grad(mse)(loaded, case.x, case.target), want)


# --- schedules ---


def check_schedule(pipe, microbatches, layers=None, rows=6):
    """The pipe computes what `sequential` computes, inside and outside."""
    layers = layers or list(pipe.layers)
    case = Case(layers, pipe.chunks, rows)
    params, placed = case.params(), pipe.place(case.params())
    got = pipe.value_and_grad(mse, argnums=(0, 1))(placed, case.x, case.target)
    assert_same(
        got,
        case.reference.value_and_grad(mse, argnums=(0, 1))(params, case.x, case.target),
    )
    got = jax.grad(lambda p: jnp.mean(pipe(p, case.x) ** 2))(placed)
    assert_same(
        got, jax.grad(lambda p: jnp.mean(case.reference(p, case.x) ** 2))(params)
    )
    assert pipe.make_schedule(microbatches).microbatches == microbatches


SCHEDULES = {
    "name": "1f1b",
    "Schedule": fpipe.schedules.one_f_one_b(2, 3),
    "function": fpipe.schedules.gpipe,
    "partial": functools.partial(lambda f, d, m: f(d, m), fpipe.schedules.eager_1f1b),
    "permuted microbatches": permuted,
    "permuted map": Schedule(
        [
            [(k, 1, i) for k in "FB" for i in range(3)],
            [(k, 0, i) for k in "FB" for i in range(3)],
        ],
        stage_to_device=[1, 0],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_a_name_a_schedule_or_a_function(name):
    pipe = fpipe.Pipe(
        [dense(), dense()], [1, 1], DEVICES[2:], chunks=3, schedule=SCHEDULES[name]
    )
    check_schedule(pipe, 3)


def test_a_permuted_map_puts_each_stage_where_it_says():
    pipe = fpipe.Pipe(
        [SCALED, SCALED],
        [1, 1],
        DEVICES[2:],
        chunks=3,
        schedule=SCHEDULES["permuted map"],
    )
    x = jnp.ones((3, 2))
    params = pipe.init(jax.random.key(0), x)
    assert devices_of(params) == [{DEVICES[3]}, {DEVICES[2]}]
    assert pipe(params, x).devices() == {DEVICES[2]}
    assert devices_of(pipe.value_and_grad(jnp.mean)(params, x)) == [
        {DEVICES[2]},
        {DEVICES[3]},
        {DEVICES[2]},
    ]


@pytest.mark.parametrize(
    "schedule", [looped, looped(2, 3)], ids=["function", "Schedule"]
)
def test_several_stages_per_device(schedule):
    pipe = fpipe.Pipe(
        [dense()] * 4, [1, 1, 1, 1], DEVICES[1:3], chunks=3, schedule=schedule
    )
    assert pipe.devices == tuple(DEVICES[1:3])
    placed = pipe.init(jax.random.key(0), jnp.ones((3, 4)))
    assert devices_of(placed) == [{DEVICES[d]} for d in (1, 1, 2, 2, 1, 1, 2, 2)]
    check_schedule(pipe, 3)


def test_the_default_balance_is_over_the_stages_of_the_schedule():
    assert fpipe.Pipe([SIN] * 9, devices=DEVICES[:2], schedule=looped).balance == (
        3,
        2,
        2,
        2,
    )
    assert fpipe.Pipe(
        [SIN] * 5, chunks=2, schedule=fpipe.schedules.gpipe(2, 2)
    ).balance == (3, 2)


def test_a_function_is_called_again_for_another_number_of_microbatches():
    asked = []

    def schedule(devices, microbatches):
        asked.append((devices, microbatches))
        return fpipe.schedules.gpipe(devices, microbatches)

    pipe = fpipe.Pipe([SCALED, SCALED], [1, 1], chunks=4, schedule=schedule)
    params = pipe.init(jax.random.key(0), jnp.ones((4, 2)))
    asked.clear()
    for rows, m in ((8, 4), (3, 3), (10, 4), (1, 1)):
        assert_same(
            pipe(params, jnp.ones((rows, 2))),
            fpipe.sequential([SCALED, SCALED], chunks=4)(
                pipe.gather(params), jnp.ones((rows, 2))
            ),
        )
        assert asked.pop() == (2, m)


def elsewhere(devices, microbatches):
    """The stages change places with an odd number of microbatches."""
    places = list(range(devices))[:: -1 if microbatches % 2 else 1]
    rows = [
        [(k, places[d], i) for k in "FB" for i in range(microbatches)]
        for d in range(devices)
    ]
    return Schedule(rows, [places.index(s) for s in range(devices)], "elsewhere")


def test_a_schedule_for_another_number_of_stages_is_refused():
    with pytest.raises(
        ValueError, match=r"the schedule 'gpipe' has 3 stages, but the pipe has 2"
    ):
        fpipe.Pipe([SIN] * 4, [2, 2], schedule=fpipe.schedules.gpipe(3, 2))
    with pytest.raises(
        ValueError,
        match=r"the pipe has 3 stages, but the function makes 6 stages on 3 devices, 2 "
        r"stages on 1 device$",
    ):
        fpipe.Pipe([SIN] * 4, [1, 1, 2], schedule=looped)


def test_a_schedule_for_another_number_of_microbatches_is_refused():
    pipe = fpipe.Pipe([SIN] * 2, [1, 1], chunks=3, schedule=fpipe.schedules.gpipe(2, 3))
    params, x = ((),) * 2, jnp.ones((3, 2))
    assert pipe(params, x).shape == (3, 2)
    expected = (
        "the schedule 'gpipe' is for 2 stages and 3 microbatches, but the pipe has 2 "
        "stages and this batch gives "
        r"2 microbatches; give a function `f\(devices, microbatches\)`"
    )
    with pytest.raises(ValueError, match=expected):
        pipe(params, x[:2])
    with pytest.raises(ValueError, match=expected):
        pipe.make_schedule(2)
    one = fpipe.Pipe([SIN] * 2, [1, 1], schedule=fpipe.schedules.gpipe(2, 1))
    with pytest.raises(ValueError, match="for 2 stages and 1 microbatch, but"):
        one.make_schedule(2)


def test_a_schedule_that_moves_stages_with_the_batch_is_refused():
    pipe = fpipe.Pipe([SCALED] * 2, [1, 1], chunks=2, schedule=elsewhere)
    params = pipe.init(jax.random.key(0), jnp.ones((2, 2)))
    pipe(params, jnp.ones((2, 2)))
    with pytest.raises(
        ValueError,
        match=r"'elsewhere' for 1 microbatch puts the stages on the devices \(1, "
        r"0\), but the parameters are placed on "
        r"\(0, 1\)",
    ):
        pipe(params, jnp.ones((1, 2)))


def test_too_few_devices_for_a_schedule_are_counted_by_its_devices():
    schedule = looped(2, 2)
    assert (
        len(
            fpipe.Pipe(
                [SIN] * 4, [1] * 4, DEVICES[:2], chunks=2, schedule=schedule
            ).devices
        )
        == 2
    )
    with pytest.raises(ValueError, match="2 devices are needed but there are 1"):
        fpipe.Pipe([SIN] * 4, [1] * 4, DEVICES[:1], chunks=2, schedule=schedule)


def forwards_only(devices, microbatches):
    rows = [[("F", d, i) for i in range(microbatches)] for d in range(devices)]
    return Schedule(rows, name="forwards")


def test_a_schedule_of_forwards_evaluates_and_refuses_gradients():
    layers = [dense(), dense()]
    case = Case(layers, 3)
    pipe = fpipe.Pipe(layers, [1, 1], chunks=3, schedule=forwards_only)
    params = case.params()
    placed = pipe.place(params)
    assert_same(pipe(placed, case.x), case.reference(params, case.x))
    assert_same(
        pipe.evaluate(mse)(placed, case.x, case.target),
        case.reference.evaluate(mse)(params, case.x, case.target),
    )
    text = (
        "the schedule 'forwards' has forwards only, and the call computes gradients; "
        "give it a B for every F"
    )
    with pytest.raises(ValueError, match=text):
        pipe.value_and_grad(mse)(placed, case.x, case.target)
    with pytest.raises(ValueError, match=text):
        jax.grad(lambda p: jnp.mean(pipe(p, case.x)))(placed)


def test_forwards_out_of_order_are_refused_where_layers_have_state():
    layers = models()["stateful"]
    case = Case(layers, 2)
    pipe = fpipe.Pipe(layers, [1, 3], chunks=2, schedule=permuted)
    text = (
        r"the schedule 'permuted, early recomputation' runs the forwards of stage 0 "
        r"in the order \(1, 0\); layers with state need them in the "
        "order of the microbatches"
    )
    with pytest.raises(ValueError, match=text):
        pipe.make_schedule(2)
    with pytest.raises(ValueError, match=text):
        pipe.value_and_grad(mse)(
            pipe.place(case.params()), case.x, case.target, **case.needs
        )
    assert pipe.make_schedule(1).microbatches == 1  # one forward is in order


def test_a_stage_without_state_may_have_its_forwards_out_of_order():
    """Only the stages with state need the order: here the second one has none."""
    rows = [
        [("F", 0, 0), ("F", 0, 1), ("B", 0, 0), ("B", 0, 1)],
        [("F", 1, 1), ("F", 1, 0), ("B", 1, 0), ("B", 1, 1)],
    ]
    layers = [models()["stateful"][0], dense()]
    case = Case(layers, 2)
    pipe = fpipe.Pipe(layers, [1, 1], chunks=2, schedule=Schedule(rows))
    got = pipe.value_and_grad(mse)(
        pipe.place(case.params()), case.x, case.target, **case.needs
    )
    assert_same(
        got,
        case.reference.value_and_grad(mse)(
            case.params(), case.x, case.target, **case.needs
        ),
    )


# --- several stages on a device ---


@pytest.mark.parametrize(
    ("schedule", "balance", "devices", "text"),
    [
        (
            "zb_v",
            [1, 1, 2],
            4,
            "puts 2 stages on each device, but the pipe has 3: give `balance` 4 "
            "entries",
        ),
        (
            "dualpipe_v",
            [4],
            4,
            "puts 2 stages on each device, but the pipe has 1: give `balance` 2 "
            "entries",
        ),
        (
            "interleaved_1f1b",
            [1, 1, 2],
            4,
            "puts at least 2 stages on each device, the same number on all, but the "
            "pipe has 3 stages and 4 devices: give "
            "`balance` 4 entries, or another multiple of the number of devices",
        ),
    ],
)
def test_a_number_of_stages_that_a_named_schedule_cannot_have(
    schedule, balance, devices, text
):
    with raises(ValueError, f"`Pipe(schedule={schedule!r})` {text}"):
        fpipe.Pipe([dense()] * 4, balance, jax.devices()[:devices], schedule=schedule)


@pytest.mark.parametrize(
    ("schedule", "devices", "layers", "stages", "used"),
    [
        ("1f1b", 4, 8, 4, 4),
        ("interleaved_1f1b", 4, 8, 8, 4),
        ("interleaved_1f1b", 4, 6, 6, 3),
        ("interleaved_1f1b", 1, 3, 2, 1),
        ("zb_v", 4, 5, 4, 2),
        ("zb_v", 2, 9, 4, 2),
    ],
)
def test_without_a_balance_as_many_devices_as_can_be_used(
    schedule, devices, layers, stages, used
):
    pipe = fpipe.Pipe(
        [dense()] * layers, None, jax.devices()[:devices], schedule=schedule, chunks=2
    )
    assert (len(pipe.balance), len(pipe.devices)) == (stages, used)


def test_a_layer_too_few_for_two_stages():
    with raises(
        ValueError,
        "`Pipe(schedule='zb_v')` puts 2 stages on each device, but the model has 1 "
        "layer",
    ):
        fpipe.Pipe([dense()], schedule="zb_v")


def test_the_map_follows_from_balance_and_devices():
    pipe = fpipe.Pipe(
        [dense()] * 6, [1] * 6, jax.devices()[:2], schedule="interleaved_1f1b", chunks=2
    )
    assert pipe.make_schedule(2).stage_to_device == (0, 1) * 3
    pipe = fpipe.Pipe([dense()] * 6, [1] * 6, schedule="zb_v", chunks=2)
    assert pipe.make_schedule(2).stage_to_device == (0, 1, 2, 2, 1, 0)


@pytest.mark.parametrize("layers", [1, 8, 200])
def test_a_pipe_prints_on_one_screen(layers):
    pipe = fpipe.Pipe(
        [dense()] * layers,
        devices=[jax.devices()[0]] * layers,
        chunks=4,
        schedule=fpipe.schedules.eager_1f1b,
        checkpoint="never",
    )
    lines = str(pipe).splitlines()
    assert len(lines) <= 8
    assert max(map(len, lines)) <= 100
    noun = "layer" if layers == 1 else "layers"
    assert f"{layers} {noun} (dense" in lines[1]
    assert "schedule='eager_1f1b', checkpoint='never'" in lines[3]
    different = dataclasses.replace(pipe, compute_dtype=jnp.bfloat16)
    assert "compute_dtype=" in str(different)
    assert "compute_dtype" not in str(pipe)
