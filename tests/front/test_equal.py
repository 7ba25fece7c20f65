"""The one invariant: a `Pipe` computes what `fpipe.sequential` computes."""

import contextlib
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import fpipe
from fpipe.schedules import NAMES, named, offload
from tests.helpers import (
    Case,
    assert_same,
    bare,
    cached,
    cast_weights,
    dense,
    models,
    mse,
    noise,
    sharded,
    turned,
)
from tests.scripts import run

# Every balance of up to four stages: 8 for four layers, 15 for five. 7 is coprime to
# both, so that neighbours differ. The table has 8 cuts; the one model of five layers
# has a test of all 15.
BALANCES = {
    n: [
        b
        for k in range(1, 5)
        for b in itertools.product(range(1, n + 1), repeat=k)
        if sum(b) == n
    ]
    for n in (4, 5)
}
POLICIES = {
    "policy": jax.checkpoint_policies.dots_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims(
        "device", "pinned_host"
    ),
}
MODELS = models() | {"cached": [dense(6), bare(), cached(), dense()]}
# The axes of each of two stages, and how many devices share them.
MESHES = {
    "no mesh": {},
    "data": {"data": 2},
    "model": {"model": 2},
    "data x model": {"data": 2, "model": 2},
}
TABLE = {
    # Each row compiles a model anew. "cached" has all that "plain" has, "stateful" has
    # a dropout too, "jump1" and "jump3" are as "jump2", and "nested" is cut in all ways
    # in a test of its own.
    "model": [n for n in MODELS if n not in ("plain", "dropout", "jump2", "nested")],
    "cut": list(range(8)),
    "chunks": [1, 2, 3, 4, 5, 8],  # 6 and 7 cut these rows as 5 does
    "rows": [8, 10, 3],
    "checkpoint": ["always", "except_last", "never", *POLICIES],
    "schedule": [
        name for name in NAMES if name != "forward_only"
    ],  # that one has a test of its own
    "executor": ["placed", "scan"],
    "loss": ["inside", "outside", "per row"],
    "inputs": ["cut", "ready", "turned"],
    "mesh": list(MESHES),
    # What `recompute` and `offload` add to the schedule.
    "actions": ["none", "early", "offload", "both"],
}


@functools.cache
def balances_of(layers: int, schedule: str, mesh: str = "no mesh") -> list[tuple]:
    """The balances that a schedule can have: even ones where a device has several
    stages. A mesh is one of two stages, or of two devices' stages.
    """
    several = NAMES[schedule].per_device != 1
    counts = range(2, 5, 2) if several else range(1, 5)
    if mesh != "no mesh":
        counts = [4 if several else 2]
    return [b for b in BALANCES[layers] if len(b) in counts]


def differs(row: dict) -> bool:
    """Whether no smaller cut gives the same pipe. Columns may be missing."""
    schedule, mesh = row.get("schedule", "gpipe"), row.get("mesh", "no mesh")
    return row.get("cut", 0) < len(balances_of(4, schedule, mesh))


def runs(row: dict) -> bool:
    """Whether devices can share the rows of each microbatch. Under the scan executor
    each has all of those that do not divide.
    """
    if "data" not in row["mesh"] or row["executor"] == "scan":
        return True
    each = -(-row["rows"] // row["chunks"])
    return each % 2 == row["rows"] % 2 == 0


def covering(table: dict[str, list], seed: int = 0) -> list[dict]:
    """Rows in which every pair of values of two columns occurs that makes a difference:
    greedy. A row starts from a pair that is missing, and each of its other values is
    changed as long as that brings more missing pairs; the best of three is taken.
    """
    rng = np.random.default_rng(seed)
    names, sizes = list(table), [len(values) for values in table.values()]
    pairs = list(itertools.combinations(range(len(names)), 2))
    # For two columns, in both orders, which pairs of their values are missing.
    missing = {}
    for a, b in pairs:
        of_both = itertools.product(table[names[a]], table[names[b]])
        needed = [differs({names[a]: i, names[b]: j}) for i, j in of_both]
        missing[a, b] = np.reshape(needed, (sizes[a], sizes[b]))
        missing[b, a] = missing[a, b].T  # a view

    def named(row):
        return {name: table[name][k] for name, k in zip(names, row, strict=True)}

    @functools.cache
    def is_row(*row):
        return runs(named(row)) and differs(named(row))

    def gains(row, column):
        """How many missing pairs each value of a column is in, beside the others."""
        others = [other for other in range(len(names)) if other != column]
        return np.sum([missing[column, c][:, row[c]] for c in others], axis=0)

    def improved(row, column):
        """The row with the value in one column that gains most, if any gains more."""
        gained = gains(row, column)
        for value in np.argsort(-gained, kind="stable"):
            if gained[value] <= gained[row[column]]:
                break
            other = [*row[:column], int(value), *row[column + 1 :]]
            if is_row(*other):
                return other
        return row

    def climbed(row, fixed):
        """The row, changed as long as that brings more."""
        before = None
        while row != before:
            before = row
            for column in rng.permutation(len(names)):
                if column not in fixed:
                    row = improved(row, column)
        return row

    rows = []
    for a, b in pairs:
        for i, j in itertools.product(range(sizes[a]), range(sizes[b])):
            found = []
            while missing[a, b][i, j] and len(found) < 3:
                row = [int(rng.integers(size)) for size in sizes]
                row[a], row[b] = i, j
                if is_row(*row):
                    row = climbed(row, (a, b))
                    found.append(
                        (sum(missing[c, d][row[c], row[d]] for c, d in pairs), row)
                    )
            if found:
                _, row = max(found)
                rows.append(named(row))
                for c, d in pairs:
                    missing[c, d][row[c], row[d]] = False
    return rows


def mesh_size(axes: dict[str, int]) -> int:
    """The number of devices of a mesh of two stages."""
    return 2 * math.prod(axes.values())


def mesh_of(axes: dict[str, int]) -> Mesh:
    """A mesh of two stages."""
    devices = np.array(jax.devices()[: mesh_size(axes)])
    return Mesh(devices.reshape(2, *axes.values()), ("stage", *axes))


def pipe_of(
    layers,
    cut,
    chunks,
    checkpoint,
    schedule,
    executor="placed",
    mesh="no mesh",
    actions="none",
):
    """A pipe with that cut, on one device for each stage or on a mesh."""
    balances = balances_of(len(layers), schedule, mesh)
    balance = balances[cut * 7 % len(balances)]
    several = NAMES[schedule].per_device != 1
    places: dict[str, Any] = {
        "devices": jax.devices()[: len(balance) // 2 if several else len(balance)]
    }
    if MESHES[mesh]:
        unshard = "action" if chunks % 2 else "step"
        places = {"mesh": mesh_of(MESHES[mesh]), "unshard": unshard}
        layers = sharded(layers, MESHES[mesh])
    if actions in ("early", "both"):
        places["recompute"] = "early"
    if actions in ("offload", "both"):
        each = NAMES[schedule].per_device or len(balance) // 2
        devices = len(balance) // each
        places["offload"] = least_limit(schedule, devices, each, chunks)
    return fpipe.Pipe(
        layers,
        balance,
        chunks=chunks,
        checkpoint=POLICIES.get(checkpoint, checkpoint),
        schedule=schedule,
        executor=executor,
        **places,
    )


@functools.cache
def least_limit(schedule, devices, each, chunks):
    """The smallest limit that all batches of at most so many microbatches keep."""
    for limit in itertools.count(1):
        with contextlib.suppress(ValueError):
            for m in range(1, chunks + 1):
                offload(named(schedule, devices, m, each), memory=limit)
            return limit
    raise AssertionError("all microbatches are within some limit")


def errors_of_rows(y, t):
    """A sum and its weight, and beside it what each row has to do with it."""
    errors = ((y - t) ** 2).sum(-1)
    weight = (t > 0).sum().astype(y.dtype)
    aux = {"rows": fpipe.PerRow((errors, t > 0)), "largest": errors.max()}
    return (errors.sum(), weight), aux


def errors_of_turned(y, t):
    return errors_of_rows(y.T, t.T)


def check(case, pipe, loss, tolerance=1e-5):
    """One model, one pipe: loss, gradients of everything, states, outputs,
    evaluation.
    """
    params, needs = case.params(), case.needs
    placed = pipe.place(params)
    if loss != "outside":
        rows = errors_of_turned if case.inputs == "turned" else errors_of_rows
        given = (mse,) if loss == "inside" else (rows, True, "weighted")
        arguments = case.x, case.target
        got = pipe.value_and_grad(*given, argnums=(0, 1, 2))(
            placed, *arguments, **needs
        )
        want = case.reference.value_and_grad(*given, argnums=(0, 1, 2))(
            params, *arguments, **needs
        )
        assert_same(gathered(pipe, got), want, tolerance)
        got = pipe.evaluate(*given)(placed, *arguments, **needs)
        assert_same(got, want[0], tolerance)
        return

    side = needs.pop("side")
    numbers = (0, 1) if side is None else (0, 1, 2)

    def loss_of(run):
        def f(params, x, side):
            out = run(params, x, side=side, **needs)
            y, state = out if needs["state"] is not None else (out, None)
            # On one side of the outputs: gradients that cancel over the rows are little
            # but rounding in bfloat16.
            rows = y if isinstance(y, jax.Array) else jnp.concatenate(y.pieces)
            return mse(rows, jnp.full_like(rows, 3)), (y, state)

        return jax.value_and_grad(f, argnums=numbers, has_aux=True)

    got = loss_of(pipe)(placed, case.x, side)
    want = loss_of(case.reference)(params, case.x, side)
    assert_same(gathered(pipe, got), want, tolerance)
    out = pipe(placed, case.x, side=side, **needs)
    (_, (y, state)), _ = want
    assert_same(out, y if needs["state"] is None else (y, state), tolerance)


def gathered(pipe, got):
    """A loss and its gradients, those of the parameters layer by layer."""
    value, (params, *others) = got
    return value, (
        params if pipe.executor == "placed" else pipe.gather(params),
        *others,
    )


def check_row(
    model,
    cut,
    chunks,
    rows,
    checkpoint,
    schedule,
    executor,
    loss,
    inputs="cut",
    mesh="no mesh",
    actions="none",
):
    layers = MODELS[model]
    layers = turned(layers) if inputs == "turned" else layers
    pipe = pipe_of(layers, cut, chunks, checkpoint, schedule, executor, mesh, actions)
    check(Case(layers, chunks, rows, inputs=inputs), pipe, loss)


def test_the_balances_are_all_there():
    assert {
        n: len({b[c * 7 % n_of] for c in range(n_of)})
        for n, b in BALANCES.items()
        for n_of in [len(b)]
    } == {
        4: 8,
        5: 15,
    }
    assert len(TABLE["cut"]) == 8


@pytest.mark.quick(cases=4)
@pytest.mark.parametrize("cut", range(15))
def test_every_balance_of_five_layers(cut):
    schedule = ["eager_1f1b", "zb_h1"][cut % 2]
    checkpoint, executor, loss = (
        TABLE["checkpoint"][cut % 4],
        TABLE["executor"][cut // 4 % 2],
        TABLE["loss"][cut // 2 % 2],
    )
    check_row("nested", cut, 1 + cut % 4, 8, checkpoint, schedule, executor, loss)


@pytest.mark.quick(cases=4)
@pytest.mark.parametrize("model", models())
def test_forwards_alone(model):
    layers = models()[model]
    case = Case(layers, 3)
    pipe = pipe_of(layers, 7, 3, "never", "forward_only")
    params, needs = case.params(), case.needs
    placed = pipe.place(params)
    assert_same(
        pipe.evaluate(mse)(placed, case.x, case.target, **needs),
        case.reference.evaluate(mse)(params, case.x, case.target, **needs),
    )
    assert_same(pipe(placed, case.x, **needs), case.reference(params, case.x, **needs))
    with pytest.raises(
        ValueError, match="has forwards only, and the call computes gradients"
    ):
        pipe.value_and_grad(mse)(placed, case.x, case.target, **needs)


# Of some seeds the one with the fewest rows.
ROWS = covering(TABLE, seed=10)


def needs_eight_devices(row: dict) -> bool:
    """Whether the mesh of a row has more devices than there are in this process."""
    return mesh_size(MESHES[row["mesh"]]) > 4


def test_the_rows_have_every_pair_of_options():
    seen = {
        pair for row in ROWS for pair in itertools.combinations(sorted(row.items()), 2)
    }
    for name, options in TABLE.items():
        for mesh in MESHES:
            for option in options:
                row = {name: option, "mesh": mesh}
                if name != "mesh" and differs(row):
                    assert tuple(sorted(row.items())) in seen
    assert {needs_eight_devices(row) for row in ROWS} == {False, True}


@pytest.mark.parametrize(
    "row",
    [row for row in ROWS if not needs_eight_devices(row)],
    ids=lambda r: "-".join(str(v) for v in r.values()),
)
def test_every_pair(row):
    check_row(**row)


def test_every_pair_over_eight_devices():
    """The other rows, in a process that has as many."""
    script = run(["-m", "tests.front.eight_devices"])
    assert script.returncode == 0, script.stdout + script.stderr


def product(model):
    names = [n for n in TABLE if n not in ("model", "mesh", "actions")]
    for values in itertools.product(*(TABLE[n] for n in names)):
        yield {"model": model} | dict(zip(names, values, strict=True))


# The pairs have all other models.
@pytest.mark.parametrize("model", [n for n in models() if n not in TABLE["model"]])
def test_a_share_of_the_full_product(model):
    for row in itertools.islice(product(model), 99_997, None, 168_962):
        check_row(**row)


@pytest.mark.full
@pytest.mark.parametrize("model", models())
def test_the_full_product(model):
    for row in product(model):
        check_row(**row)


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        ("branched", "inside"),
        ("nested", "outside"),
        ("tied", "inside"),
    ],
)
def test_bfloat16_models(model, loss):
    layers = models()[model]
    case = Case(layers, chunks=3, dtype=jnp.bfloat16)
    check(case, pipe_of(layers, 5, 3, "except_last", "1f1b"), loss, tolerance=2e-2)


@pytest.mark.parametrize(
    "checkpoint",
    [
        "except_last",
        "policy",
        *(pytest.param(n, marks=pytest.mark.full) for n in ("always", "never")),
        pytest.param("offload", marks=pytest.mark.full),
    ],
)
def test_bfloat16_compute_on_float32_parameters(checkpoint):
    layers = [cast_weights(layer) for layer in models()["plain"]]
    check(
        Case(layers, chunks=3),
        pipe_of(layers, 7, 3, checkpoint, "eager_1f1b"),
        "inside",
        tolerance=2e-2,
    )


def test_bfloat16_gradients_are_summed_in_float32_and_cast_once():
    # 1 + 64 · 2⁻⁹ is 1.125; summed in bfloat16 every 2⁻⁹ would be lost beside the 1.
    scale = np.full((65, 1), 2.0**-9, np.float32)
    scale[0] = 1
    layer = fpipe.Layer(lambda p, x: x * p)
    pipe = fpipe.Pipe([layer], [1], chunks=65, checkpoint="never")
    x = jnp.asarray(scale, jnp.bfloat16)
    params = pipe.place((jnp.ones((1,), jnp.bfloat16),))
    _, (grad,) = pipe.value_and_grad(jnp.sum, reduction="sum")(params, x)
    assert grad.dtype == jnp.bfloat16
    assert float(grad[0]) == 1.125


@pytest.mark.parametrize(
    ("model", "devices"),
    [
        ("nested", [0, 0, 0, 0]),
        ("jump3", [3, 1, 0, 2]),
        ("tied", [1, 0, 1, 0]),
        ("sided", [3, 1, 0, 2]),
        ("stateful", [1, 0, 1, 0]),
    ],
)
def test_devices_may_repeat_and_come_in_any_order(model, devices):
    layers = models()[model]
    balance = [1, 1, 1, len(layers) - 3]
    pipe = fpipe.Pipe(layers, balance, [jax.devices()[d] for d in devices], chunks=3)
    check(Case(layers, 3), pipe, "inside")


@pytest.mark.parametrize(
    ("schedule", "cut", "checkpoint"),
    [
        ("gpipe", 7, "always"),
        ("eager_1f1b", 1, "except_last"),
        ("interleaved_1f1b", 7, "always"),
        ("zb_h1", 1, "always"),
        ("v_min", 1, "except_last"),
    ],
)
def test_dropout_masks_are_equal_whatever_the_partition(schedule, cut, checkpoint):
    """The very same masks, not only close values: a product of masks is exact."""
    layers = [
        fpipe.Layer(
            lambda p, x, *, key: x * p * (noise(key, x.shape) > 0).astype(x.dtype)
        )
    ] * 4
    x, params = jnp.ones((6, 8)), (jnp.float32(1),) * 4
    key = jax.random.key(3)
    want = fpipe.sequential(layers, chunks=3)(params, x, key=key)
    assert set(np.unique(want)) == {0.0, 1.0}
    pipe = pipe_of(layers, cut, 3, checkpoint, schedule)
    np.testing.assert_array_equal(pipe(pipe.place(params), x, key=key), want)
    # The gradient of the sum with respect to x is the product of the masks too.
    _, grad = pipe.value_and_grad(jnp.sum, reduction="sum", argnums=1)(
        pipe.place(params), x, key=key
    )
    np.testing.assert_array_equal(grad, want)


def test_rank_promotion_is_never_needed():
    layers = [fpipe.Layer(lambda p, x: x * p)] * 3
    pipe, x = fpipe.Pipe(layers, [1, 1, 1], chunks=3), jnp.ones((7, 1))
    params = pipe.place((jnp.ones((1, 1)),) * 3)
    with jax.numpy_rank_promotion("raise"):
        loss = pipe.value_and_grad(
            lambda y: (y.sum(), y.size), reduction="weighted", argnums=(0, 1)
        )
        assert float(loss(params, x)[0]) == 1.0
        assert float(pipe.value_and_grad(jnp.mean)(params, x)[0]) == 1.0
