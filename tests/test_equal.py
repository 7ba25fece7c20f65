"""The one invariant: a `Pipe` computes what `fpipe.sequential` computes."""

import itertools

import jax
import numpy as np
import pytest

import fpipe
from tests.helpers import Case, assert_same, models, mse

BALANCES = {n: [b for b in itertools.product(range(1, 6), repeat=n) if sum(b) in (4, 5)] for n in range(1, 5)}
POLICY = jax.checkpoint_policies.dots_saveable
TABLE = {
    "model": list(models()),
    "cut": list(range(8)),
    "chunks": [1, 2, 3, 4, 5, 8],
    "rows": [8, 10, 3],
    "checkpoint": ["always", "except_last", "never", "policy"],
    "schedule": ["gpipe", "1f1b", "eager_1f1b"],
    "loss": ["inside", "outside"],
}


def cuts(layers: int) -> list[tuple[int, ...]]:
    """Every balance of up to four stages."""
    return [b for n in range(1, 5) for b in BALANCES[n] if sum(b) == layers]


def covering(table: dict[str, list], seed: int = 0) -> list[dict]:
    """Rows in which every pair of values of two columns occurs: greedy, the best of some random rows."""
    rng = np.random.default_rng(seed)
    names = list(table)
    pairs = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(table[a]))
        for j in range(len(table[b]))
    }
    rows = []
    while pairs:
        first = min(pairs)
        best, gain = None, -1
        for _ in range(40):
            row = {n: int(rng.integers(len(table[n]))) for n in names}
            row[first[0]], row[first[2]] = first[1], first[3]
            covered = {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)} & pairs
            if len(covered) > gain:
                best, gain = (row, covered), len(covered)
        assert best is not None
        rows.append({n: table[n][k] for n, k in best[0].items()})
        pairs -= best[1]
    return rows


def check(model, cut, chunks, rows, checkpoint, schedule, loss):
    layers = models()[model]
    balances = cuts(len(layers))
    case = Case(layers, chunks, rows)
    pipe = fpipe.Pipe(
        layers,
        balances[cut * 7 % len(balances)],
        chunks=chunks,
        checkpoint=POLICY if checkpoint == "policy" else checkpoint,
        schedule=schedule,
    )
    params, needs = case.params(), case.needs
    placed = pipe.place(params)
    if loss == "inside":
        got = pipe.value_and_grad(mse, argnums=(0, 1, 2))(placed, case.x, case.target, **needs)
        want = case.reference.value_and_grad(mse, argnums=(0, 1, 2))(params, case.x, case.target, **needs)
        assert_same(got, want)
        got = pipe.evaluate(mse)(placed, case.x, case.target, **needs)
        assert_same(got, want[0])
        return

    numbers = (0, 1) if needs["side"] is None else (0, 1, 2)

    def loss_of(run):
        def f(params, x, side):
            kwargs = {k: v for k, v in needs.items() if k != "side"}
            out = run(params, x, side=side, **kwargs)
            y, state = out if needs["state"] is not None else (out, None)
            return (y**2).mean(), (y, state)

        return jax.value_and_grad(f, argnums=numbers, has_aux=True)

    got = loss_of(pipe)(placed, case.x, needs["side"])
    want = loss_of(case.reference)(params, case.x, needs["side"])
    assert_same(got, want)
    kwargs = {k: v for k, v in needs.items() if k != "side"}
    out = pipe(placed, case.x, side=needs["side"], **kwargs)
    assert_same(out[0] if needs["state"] is not None else out, want[0][1][0])


@pytest.mark.parametrize("row", covering(TABLE), ids=lambda r: "-".join(str(v) for v in r.values()))
def test_every_pair(row):
    check(**row)
