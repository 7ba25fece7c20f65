"""The one invariant: a `Pipe` computes what `fpipe.sequential` computes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import fpipe
from fpipe.schedules import NAMES
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
    turned,
)

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
}


def repeats(row: dict) -> bool:
    """Whether a smaller cut gives the same balance: a schedule with several stages on
    a device has one of the four even balances.
    """
    several = "schedule" in row and NAMES[row["schedule"]].per_device != 1
    return several and row.get("cut", 0) > 3


def covering(table: dict[str, list], seed: int = 0) -> list[dict]:
    """Rows in which every pair of values of two columns occurs, but for those that
    repeat another: greedy, the best of some random rows.
    """
    rng = np.random.default_rng(seed)
    names = list(table)
    pairs = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(table[a]))
        for j in range(len(table[b]))
        if not repeats({a: table[a][i], b: table[b][j]})
    }
    rows = []
    while pairs:
        first = min(pairs)
        best, gain = None, -1
        for _ in range(150):
            row = {n: int(rng.integers(len(table[n]))) for n in names}
            row[first[0]], row[first[2]] = first[1], first[3]
            covered = {
                (a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)
            } & pairs
            if len(covered) > gain:
                best, gain = (row, covered), len(covered)
        assert best is not None
        rows.append({n: table[n][k] for n, k in best[0].items()})
        pairs -= best[1]
    return rows


def pipe_of(layers, cut, chunks, checkpoint, schedule, executor="placed"):
    """A pipe with that cut; where a device has several stages, one with an even number
    of them.
    """
    balances, several = BALANCES[len(layers)], NAMES[schedule].per_device != 1
    if several:
        balances = [b for b in balances if len(b) % 2 == 0]
    balance = balances[cut * 7 % len(balances)]
    return fpipe.Pipe(
        layers,
        balance,
        jax.devices()[: len(balance) // 2 if several else len(balance)],
        chunks=chunks,
        checkpoint=POLICIES.get(checkpoint, checkpoint),
        schedule=schedule,
        executor=executor,
    )


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
    model, cut, chunks, rows, checkpoint, schedule, executor, loss, inputs="cut"
):
    layers = MODELS[model]
    layers = turned(layers) if inputs == "turned" else layers
    check(
        Case(layers, chunks, rows, inputs=inputs),
        pipe_of(layers, cut, chunks, checkpoint, schedule, executor),
        loss,
    )


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


@pytest.mark.parametrize(
    "row", covering(TABLE, seed=7), ids=lambda r: "-".join(str(v) for v in r.values())
)
def test_every_pair(row):
    check_row(**row)


def a_mesh(axis):
    """Two stages on two devices each."""
    return Mesh(np.array(jax.devices()).reshape(2, 2), ("stage", axis))


OVER_MESHES = {
    "model": list(models()),
    "axis": ["data", "model"],
    "schedule": TABLE["schedule"],
    "checkpoint": TABLE["checkpoint"],
    "loss": TABLE["loss"],
    "inputs": TABLE["inputs"],
}


def each_once(table):
    """Rows in which every value occurs."""
    for n in range(max(map(len, table.values()))):
        yield {name: values[n % len(values)] for name, values in table.items()}


def check_over_mesh(model, axis, schedule, checkpoint, loss, inputs):
    layers = models()[model]
    layers = turned(layers) if inputs == "turned" else layers
    several = NAMES[schedule].per_device != 1
    pipe = fpipe.Pipe(
        layers,
        [1, 1, 1, len(layers) - 3] if several else [2, len(layers) - 2],
        chunks=2,
        checkpoint=POLICIES.get(checkpoint, checkpoint),
        schedule=schedule,
        mesh=a_mesh(axis),
    )
    check(Case(layers, chunks=2, rows=8, inputs=inputs), pipe, loss)


@pytest.mark.parametrize(
    "row",
    [[*each_once(OVER_MESHES)][n] for n in (2, 5, 7, 8)],
    ids=lambda r: "-".join(r.values()),
)
def test_stages_on_two_devices(row):
    check_over_mesh(**row)


@pytest.mark.full
@pytest.mark.parametrize(
    "row", covering(OVER_MESHES), ids=lambda r: "-".join(r.values())
)
def test_every_pair_over_meshes(row):
    check_over_mesh(**row)


def product(model):
    names = [n for n in TABLE if n != "model"]
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
