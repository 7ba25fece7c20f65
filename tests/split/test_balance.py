"""The best balance, beside all others."""

import itertools
import random

import jax
import jax.numpy as jnp
import pytest

import fpipe
from fpipe._split.balance import SLACK, Sent, best_balance
from fpipe._split.pieces import cut_trace


def received(sizes, sent):
    """The bytes that go between stages."""
    stage = [s for s, count in enumerate(sizes) for _ in range(count)]
    return sum(
        size * len({stage[reader] for reader in readers} - {stage[source]})
        for source, readers, size in sent
    )


def every_balance(units, stages):
    for ends in itertools.combinations(range(1, units), stages - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *ends, units)))


def best_of_all(work, sent, stages, slack):
    """The same by trying all."""
    tried = []
    for sizes in every_balance(len(work), stages):
        ends = (0, *itertools.accumulate(sizes))
        costs = [sum(work[a:b]) for a, b in itertools.pairwise(ends)]
        even = sum(cost**2 for cost in costs)
        tried.append((max(costs), received(sizes, sent), even, sizes))
    least = min(most for most, *_ in tried)
    tried = [rest for most, *rest in tried if most <= least * (1 + slack)]
    best = min((leanest, even) for leanest, even, _ in tried)
    return max(sizes for leanest, even, sizes in tried if (leanest, even) == best)


def test_no_balance_is_better():
    for seed in range(300):
        rng = random.Random(seed)
        units = rng.randint(1, 9)
        stages = rng.randint(1, units)
        work = [rng.randint(0, 9) for _ in range(units)]
        sent = []
        for source in rng.choices(range(units), k=rng.randint(0, 8)):
            readers = tuple(r for r in range(source + 1, units) if rng.random() < 0.5)
            sent.append(Sent(source, readers, rng.randint(1, 5)))
        slack = rng.choice([0.0, SLACK, 0.3])
        found = best_balance(work, sent, stages, slack)
        assert found == best_of_all(work, sent, stages, slack), seed


@pytest.mark.quick
def test_the_fewest_bytes_among_the_cheapest():
    def neighbours(*sizes):
        return [Sent(k, (k + 1,), size) for k, size in enumerate(sizes)]

    assert best_balance([2, 2, 2, 2], neighbours(9, 9, 9), 2) == (2, 2)
    assert best_balance([40, 1, 40], neighbours(1, 9), 2) == (1, 2)
    assert best_balance([40, 1, 40], neighbours(9, 1), 2) == (2, 1)
    # A long skip goes over the middle stage, and counts once.
    skip = Sent(0, (5,), 100)
    assert best_balance([1] * 6, [skip, *neighbours(1, 1, 1, 1, 1)], 3) == (2, 2, 2)


def random_layers(seed):
    """A function of layers with residuals and skips."""
    rng = random.Random(seed)
    count = rng.randint(3, 8)
    widths = [rng.choice([2, 3, 4, 8]) for _ in range(count + 1)]
    residual = [rng.random() < 0.4 for _ in range(count)]
    reads = [rng.choice([None, *range(n + 1)]) for n in range(count)]

    def run(params, x):
        made = [x]
        for n, layer in enumerate(params):
            h = jnp.tanh(made[-1] @ layer["w"] + layer["b"])
            read = reads[n]
            if read is not None:
                h = h + jnp.tile(made[read], widths[n + 1])[:, : widths[n + 1]]
            if residual[n] and widths[n] == widths[n + 1]:
                h = h + made[-1]
            made.append(h)
        return made[-1]

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    params = [{"w": shape(a, b), "b": shape(b)} for a, b in itertools.pairwise(widths)]
    return run, params, shape(2, widths[0])


@pytest.mark.parametrize("seed", range(25))
def test_no_cut_of_a_function_is_better(seed):
    """By what pieces take and receive, which is found when they are cut."""
    run, params, x = random_layers(seed)
    modules = [str(n) for n in range(len(params))]
    whole = fpipe.split(run, params, x, cuts=modules)
    traced = whole.cut.trace(whole.cut.first).traced
    for stages in (2, 3):
        tried = {}
        for places in itertools.combinations(whole.cut.cuts.places, stages - 1):
            cut = cut_trace(traced, places)
            costs = [piece.flops for piece in cut.pieces]
            bytes_between = sum(cut.bytes_of(list(p.takes)) for p in cut.pieces)
            tried[places] = max(costs), bytes_between
        own = fpipe.split(run, params, x, stages=stages).cut.cuts.places
        limit = min(most for most, _ in tried.values()) * (1 + SLACK)
        most, bytes_between = tried[own]
        assert most <= limit
        assert bytes_between == min(b for m, b in tried.values() if m <= limit)
