"""`fpipe.optim.map`: a function of whole trees is what it is on the gathered ones, and
each leaf stays on its device.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import fpipe
import fpipe.optim
from fpipe.optim import _map
from tests.helpers import assert_same, raises
from tests.optim.test_optim import crossing

EXECUTORS = ["placed", "scan"]
FLOAT0 = jax.dtypes.float0
DEVICES = jax.devices()


def embed(params, x):
    return x @ params["w"] + params["n"].astype(x.dtype)


def tied(params, x, *, borrowed):
    return (x * params) @ borrowed["embed"]["w"].T


LAYERS = [
    fpipe.Layer(embed, name="embed"),
    fpipe.fn(jnp.sin),
    fpipe.Layer(lambda p, x: x * p["w"] + p["b"], name="dense"),
    fpipe.Layer(tied, name="tied", borrow=["embed"]),
]
WHOLE: Any = (
    {"w": np.linspace(-1, 2, 6, dtype=np.float32).reshape(3, 2), "n": np.int32(2)},
    None,
    {"w": np.array([0.5, -2], np.float32), "b": np.float32(1.5)},
    np.array([2, 3], np.float32),
)
FLOATS: Any = jax.tree.map(
    lambda a: a if a.dtype == np.float32 else np.float32(a), WHOLE
)
CALL = "`fpipe.optim.map(f, *trees)`: "
AS_ONE = "give all as one pipe has them, by `pipe.place(other.gather(params))`"


@functools.cache
def pipe_of(executor, balance=(3, 1), devices=None):
    devices = DEVICES[:2] if devices is None else [DEVICES[d] for d in devices]
    return fpipe.Pipe(LAYERS, balance, devices, chunks=2, executor=executor)


def halved(tree):
    return jax.tree.map(lambda a: a / 2, tree)


def average(old, new, decay):
    return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new)


def many(params, grads, state, decay):
    """Trees like the parameters, a state, numbers, and what is of one layer alone."""
    norm = optax.tree.norm(grads)
    return {
        "average": average(params, grads, decay),
        "clipped": (jax.tree.map(lambda g: g / norm, grads), norm),
        "state": state._replace(z=halved(state.z)),
        "eval": optax.contrib.schedule_free_eval_params(state, grads),
        "norms": jax.tree.map(jnp.linalg.norm, params),
        "one": params[3] * 2,
        "leaves": len(jax.tree.leaves(params)),
    }


TX = optax.contrib.schedule_free(optax.sgd(0.1), 0.1)


def gathered(pipe, made):
    """What `many` made, as it is of gathered trees."""
    trees = ("average", "eval")
    one = {name: pipe.gather(made[name]) for name in trees}
    clipped, norm = made["clipped"]
    rest = {k: v for k, v in made.items() if k not in (*trees, "clipped")}
    return fpipe.optim.gather(rest) | one | {"clipped": (pipe.gather(clipped), norm)}


@pytest.mark.quick
@pytest.mark.parametrize("executor", [*EXECUTORS, "scan in jit"])
def test_it_is_what_it_is_on_gathered_trees(executor):
    grads = jax.tree.map(lambda a: np.cos(a) * 3, FLOATS)
    want = jax.jit(many)(FLOATS, grads, TX.init(FLOATS), 0.75)
    pipe = pipe_of(executor.split()[0])
    params, changes = pipe.place(FLOATS), pipe.place(grads)
    state = fpipe.optim.per_stage(TX).init(params)
    call: Any = functools.partial(fpipe.optim.map, many)
    if "jit" in executor:
        call = jax.jit(call)
    got = call(params, changes, state, 0.75)
    assert_same(gathered(pipe, got), want, 1e-6)
    assert jax.tree.structure(got["average"]) == jax.tree.structure(params)
    assert jax.tree.structure(got["state"]) == jax.tree.structure(state)
    if executor == "placed":
        for tree in (got["average"], got["clipped"][0], got["eval"], got["norms"]):
            assert devices_of(tree) == devices_of(params)
        assert devices_of(got["state"].z) == devices_of(params)
        assert got["clipped"][1].devices() == {DEVICES[0]}
        assert got["one"].devices() == params[3].devices() == {DEVICES[1]}
    else:
        rows = [*got["average"].arrays, *got["state"].z.arrays, *got["norms"].arrays]
        assert {row.sharding.spec[0] for row in rows} == {"stage"}
    norm = fpipe.optim.map(optax.tree.norm, params)
    assert_same(norm, jax.jit(optax.tree.norm)(FLOATS), 1e-6)


def devices_of(tree):
    return [leaf.devices() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_frozen_leaves_none_and_integers(executor):
    """`float0` comes to the function as it is, and goes back to its place."""
    pipe, x = pipe_of(executor), jnp.ones((4, 3))

    def scaled(tree):
        return jax.tree.map(lambda a: a if a.dtype == FLOAT0 else a / 2, tree)

    def frozen(path, leaf):
        return path in ("2/w", "3")

    params = pipe.place(WHOLE)
    step = pipe.value_and_grad(jnp.mean, frozen=frozen)
    grads = step(params, x)[1]
    got, want = fpipe.optim.map(scaled, grads), scaled(pipe.gather(grads))
    assert want[0]["n"].dtype == want[2]["w"].dtype == want[3].dtype == FLOAT0
    assert want[1] is None
    assert jax.tree.structure(got) == jax.tree.structure(grads)
    assert_same(pipe.gather(got), want, 0)
    # Updates have numpy zeros where nothing changes.
    tx = fpipe.optim.per_stage(optax.sgd(1.0), frozen=frozen)
    updates, _ = tx.update(grads, tx.init(params), params)
    added = fpipe.optim.map(lambda u: jax.tree.map(jnp.negative, u), updates)
    new = pipe.gather(fpipe.optim.apply_updates(params, added))
    change = pipe.gather(grads)
    for k, name in ((0, "w"), (2, "b")):
        assert_same(new[k][name], WHOLE[k][name] + change[k][name], 1e-6)
    rest = (WHOLE[0]["n"], WHOLE[2]["w"], WHOLE[3])
    assert_same((new[0]["n"], new[2]["w"], new[3]), rest, 0)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_function_written_in_the_call_compiles_once(executor):
    params = pipe_of(executor).place(FLOATS)
    made = []
    for n in range(3):
        before = _map._plans.values()
        made.append(fpipe.optim.map(lambda p, n: jax.tree.map(jnp.tan, p), params, n))
        assert (_map._plans.values()[:-1] == before) == (n == 0)
    scales = [fpipe.optim.map(lambda p, s=s: p[3] * s, params) for s in (2.0, 3.0)]
    assert_same(scales, [FLOATS[3] * 2, FLOATS[3] * 3], 0)
    shapes = jax.eval_shape(functools.partial(fpipe.optim.map, halved), params)
    assert [a.shape for a in jax.tree.leaves(shapes)] == [
        a.shape for a in jax.tree.leaves(params)
    ]


WIDE = [np.ones((160, 160), np.float32)] * 2


@pytest.mark.parametrize("executor", EXECUTORS)
def test_only_numbers_cross(executor):
    layers = [fpipe.Layer(lambda p, x: x @ p)] * 2
    pipe = fpipe.Pipe(layers, [1, 1], DEVICES[:2], chunks=1, executor=executor)
    params = pipe.place(WIDE)
    assert fpipe.optim.map(optax.tree.norm, params) == 160 * 2**0.5
    plan = _map._plans.values()[-1]
    if executor == "placed":
        assert [move.bytes for move in plan.run.cut.moves] == [4]
    else:
        compiled = plan.program.lower(list(params.arrays), []).compile()
        assert crossing(compiled) == 2 * 4
    # Small parts of others may go to a device, but no large ones.
    sums = fpipe.optim.map(lambda p: jnp.stack([a.sum(0) for a in p]), params)
    assert_same(sums, jnp.full((2, 160), 160.0), 0)
    with raises(
        ValueError,
        f"{CALL}f combines leaves of several devices on one device: that device would "
        f"get {102400 if executor == 'placed' else 204800} bytes of other devices' "
        "leaves, and the limit is 65536. Return numbers, or trees in which each leaf "
        "is made of the given leaves in its place; for anything else write "
        "`f(pipe.gather(params))`",
    ):
        fpipe.optim.map(jnp.concatenate, params)


def test_the_norm_of_packed_leaves_is_one_program(caplog):
    """Programs that add up over one mesh at once block one another on CPU devices."""
    layers = [fpipe.Layer(lambda p, x: x)] * 3
    pipe = fpipe.Pipe(layers, [2, 1], DEVICES[:2], executor="scan")
    params = pipe.place([np.ones(n, np.float32) for n in (13, 11, 12)])
    with jax.log_compiles():
        assert_same(fpipe.optim.global_norm(params), jnp.float32(6), 0)
    assert [r.message.split()[0] for r in caplog.records].count("Compiling") == 1


def test_parameters_without_arrays():
    """What comes out is packed if what went in was."""
    for executor in EXECUTORS:
        layers = [fpipe.Layer(lambda p, x: x)] * 2
        params = fpipe.Pipe(layers, [1, 1], executor=executor).place((None, ()))
        got, norm = fpipe.optim.map(lambda p: (p, optax.tree.norm(p)), params)
        assert jax.tree.structure(got) == jax.tree.structure(params)
        assert norm == 0


@pytest.mark.parametrize("executor", EXECUTORS)
def test_trees_of_other_pipes(executor):
    pipe = pipe_of(executor)
    params = pipe.place(FLOATS)
    other = pipe_of(executor, (1, 3)).place(FLOATS)
    swapped = pipe_of(executor, (3, 1), (1, 0)).place(FLOATS)
    state = fpipe.optim.per_stage(TX).init(other)
    eval_params = optax.contrib.schedule_free_eval_params
    if executor == "placed":
        fix = (
            ": a tree of another pipe, or one that is not placed; place all trees for "
            "one pipe, by `pipe.place(params)` and `fpipe.optim.place(state, params)`"
        )
        wrong = [
            ("trees[0][2]['b'] is on cpu:0, but trees[1][2]['b'] is on cpu:1", other),
            ("trees[0][0]['n'] is on cpu:0, but trees[1][0]['n'] is on cpu:1", swapped),
            (
                "trees[0][3] is on cpu:1, but trees[1][3] is on cpu:0",
                pipe.gather(params),
            ),
        ]
        wrong = [(f"{CALL}{what}{fix}", tree) for what, tree in wrong]
        of_state = "trees[1][2]['b'] is on cpu:0, but trees[0].z[2]['b'] is on cpu:1"
        of_state = f"{CALL}{of_state}{fix}"
    else:
        of_state = (
            f"{CALL}trees are packed for different partitions; {AS_ONE} and "
            "`fpipe.optim.place(fpipe.optim.gather(state), params)`"
        )
        wrong = [
            (of_state, other),
            (
                f"{CALL}trees are packed for different devices, or for the same ones "
                f"in another order; {AS_ONE}",
                swapped,
            ),
            (
                f"{CALL}trees[1] is not packed, as the others are; write "
                "`pipe.place(tree)`, or `fpipe.optim.place(state, params)`",
                pipe.gather(params),
            ),
        ]
    for message, tree in wrong:
        with raises(ValueError, message):
            fpipe.optim.map(average, params, tree, 0.5)
    with raises(ValueError, of_state):
        fpipe.optim.map(eval_params, state, params)


def test_wrong_arguments():
    params = pipe_of("placed").place(FLOATS)
    with raises(
        TypeError,
        f"{CALL}a function of whole trees comes first, such as `optax.tree.norm`, got "
        "0.5",
    ):
        fpipe.optim.map(0.5, params)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"in `fpipe.*`: `trees\[1\]` is an object"):
        fpipe.optim.map(average, params, object())
    with pytest.raises(TypeError, match=r"in `fpipe.*`: `f\(\*trees\)` is an object"):
        fpipe.optim.map(lambda p: object(), params)
    with pytest.raises(TypeError, match=r"`fpipe.optim.map` was called inside"):
        jax.jit(functools.partial(fpipe.optim.map, halved))(params)
