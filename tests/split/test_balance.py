"""The best balance, beside all others."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fpipe
from fpipe._split.balance import SLACK, Sent, best_balance
from fpipe._split.crossing import Crossing
from fpipe._split.cuts import work_at_places
from fpipe._split.pieces import cut_trace


def received(sizes, sent):
    """The bytes that go between stages."""
    stage = [s for s, count in enumerate(sizes) for _ in range(count)]
    return sum(
        size * len({stage[reader] for reader in readers} - {stage[source]})
        for source, readers, size, _ in sent
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


def costs_without_again(cut):
    """What pieces cost; what several make counts where it is made first."""
    costs, seen = [], set()
    for piece in cut.pieces:
        own = set(piece.nodes) - seen
        seen |= own
        costs.append(sum(cut.traced.costs[node] for node in own))
    return costs


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
            costs = costs_without_again(cut)
            bytes_between = sum(cut.bytes_of(list(p.takes)) for p in cut.pieces)
            tried[places] = max(costs), bytes_between
        own = fpipe.split(run, params, x, stages=stages).cut.cuts.places
        limit = min(most for most, _ in tried.values()) * (1 + SLACK)
        most, bytes_between = tried[own]
        assert most <= limit
        assert bytes_between == min(b for m, b in tried.values() if m <= limit)


def levels(params, x):
    """Convolutions with 16 channels, then as many FLOPs with 64."""
    h = x
    for n, kernel in enumerate(params):
        if n == 2:
            h = jnp.tile(h[:, ::4, ::4], 4)
        numbers = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(
            h, kernel, (1, 1), "SAME", dimension_numbers=numbers
        )
    return h


def test_few_channels_take_longer_than_their_flops():
    def kernel(channels):
        return jax.ShapeDtypeStruct((3, 3, channels, channels), jnp.float32)

    params = [kernel(16)] * 2 + [kernel(64)] * 4
    x = jax.ShapeDtypeStruct((4, 32, 32, 16), jnp.float32)
    split = fpipe.split(levels, params, x)
    trace = split.cut.trace(split.cut.first)
    flops = [piece.flops for piece in trace.pieces]
    assert max(flops) <= 1.01 * min(flops)
    assert best_balance(flops, trace.sent, 2) == (3, 3)
    # Two of them take as long as four others.
    assert split.balance(2) == (2, 4)
    assert fpipe.Pipe(split, devices=[jax.devices()[0]] * 2).balance == (2, 4)
    # A plan counts FLOPs, and does not call this cut uneven.
    plan = fpipe.Pipe(split, devices=jax.devices()[:2]).plan(None, x)
    assert plan.stages[1].total > 1.25 * plan.stages[0].total
    assert not any("times the mean of the stages" in w for w in plan.warnings)
    in_two = fpipe.split(levels, params, x, stages=2)
    assert in_two.cut.cuts.places == (split.cut.cuts.places[1],)


def test_cuts_follow_the_kind_of_device(monkeypatch):
    """On a GPU a product is faster beside the memory, so that others weigh more."""

    def run(params, x):
        for w in params[:2]:
            x = x @ w
        for scale in params[2:]:
            x = jnp.sin(x * scale)
        return x

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    params = [shape(512, 512)] * 2 + [shape(1, 512)] * 6
    found = {}
    for kind in ("cpu", "gpu", "tpu", "a new kind"):
        monkeypatch.setattr(jax, "default_backend", lambda kind=kind: kind)
        split = fpipe.split(run, params, shape(1024, 512))
        found[kind] = split.balance(2)
    assert found["cpu"] == (1, 7)
    assert found["gpu"] == found["a new kind"]
    assert found["gpu"][0] > 1


def test_a_value_in_two_forms_is_sent_once():
    """A level of a U-Net reads in rows of two what another one reads as it is."""

    def run(params, x):
        h = jnp.tanh(x @ params["a"])
        low = h.reshape(len(x), -1, 2, 4).sum(2)
        low = jnp.tanh(jnp.tanh(low @ params["b"]) @ params["c"])
        return jnp.concatenate([jnp.repeat(low, 2, 1), h], -1) @ params["d"]

    params = {name: jnp.ones((4, 4)) for name in "abc"} | {"d": jnp.ones((8, 4))}
    split = fpipe.split(run, params, jnp.ones((2, 8, 4)), cuts=["b", "c", "d"])
    trace = split.cut.trace(split.cut.first)
    low, high = 4 * 2 * 4 * 4, 4 * 2 * 8 * 4
    assert sorted(trace.sent) == [
        Sent(0, (1, 3), high),
        Sent(1, (2,), low),
        Sent(2, (3,), low),
    ]
    # This is known before it is cut: what is joined again runs where it is read.
    places, crossing = split.cut.cuts.places, Crossing(trace.traced)
    assert sorted(crossing.sent(places)) == sorted(trace.sent)
    work = [part.sum() for part in np.split(work_at_places(crossing), places)]
    np.testing.assert_allclose(work, trace.costs, rtol=1e-12)
