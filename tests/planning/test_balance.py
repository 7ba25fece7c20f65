"""The balance is the optimum, its costs are what layers cost, and what it says of
memory is what a pipe holds.
"""

import dataclasses
import itertools
import math
import pickle
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fpipe
from fpipe._executors.added_actions import RECOMPUTE
from fpipe._executors.scheduling import Scheduling
from fpipe._planning.balance import DoesNotFitError, found_balance
from fpipe._planning.costs import Sent
from fpipe._planning.hardware import Hardware
from fpipe._planning.layer_costs import LayerWork
from fpipe._planning.partition import PartitionTask, Shortage, best_cut
from fpipe._planning.span_tables import SpanTables, arriving, leaving, summed
from fpipe.schedules import offload, one_f_one_b, simulate
from tests.helpers import (
    Case,
    Clock,
    add,
    counted,
    dense,
    keep,
    models,
    mse,
    noise,
    raises,
)

W = 8
MIB = 2**20


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def linear(width=W):
    return fpipe.Layer(
        lambda w, x: x @ w,
        lambda key, x: noise(key, (x.shape[-1], width)),
        name="linear",
    )


def costs(forward, **fields):
    """Costs with that work, and what else is given."""
    return dataclasses.replace(
        fpipe.LayerCosts.given([0] * len(forward)),
        forward=forward,
        unit="second",
        **fields,
    )


# --- the optimum ---


def spans(sizes):
    return list(itertools.pairwise((0, *itertools.accumulate(sizes))))


def cuts(layers, stages):
    """All of them."""
    for ends in itertools.combinations(range(1, layers), stages - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *ends, layers)))


@dataclasses.dataclass(frozen=True)
class Puzzle:
    """A small task, as lists."""

    times: list[int]
    sends: list[Sent]
    places: list[int]
    speeds: list[int]
    bytes: list[int]
    limits: list[int] | None
    slack: float = 0.0

    @property
    def task(self):
        count = len(self.times)
        received, sent = arriving(count, self.sends), leaving(count, self.sends)
        memory = summed(self.bytes) + received
        return PartitionTask(
            count,
            tuple(self.places),
            lambda s: (
                summed(self.times) / self.speeds[self.places[s]] + received + sent
            ),
            lambda s: received * (1 + s),
            None if self.limits is None else lambda s: memory * (1 + s % 2),
            tuple(self.limits or [math.inf] * len(self.speeds)),
            self.slack,
        )

    def best(self, sizes):
        """The best of some cuts."""
        keys = {own: self.key(own)[0] for own in sizes}
        if not self.slack:
            return min(keys, key=lambda own: keys[own])
        most = min(key[0] for key in keys.values()) * (1 + self.slack)
        # What is even is told by what stages cost, not by how many layers they have.
        near = [own for own, key in keys.items() if key[0] <= most]
        return min(near, key=lambda own: (keys[own][1], self.uneven(own), keys[own][3]))

    def uneven(self, sizes):
        costs = (self.task.cost(s)[span] for s, span in enumerate(spans(sizes)))
        return sum(cost**2 for cost in costs)

    def key(self, sizes):
        """What the best cut has least of, summed anew for each cut; and by how much a
        device is too full.
        """
        dearest, traffic = 0.0, 0
        over = [-limit for limit in self.limits or [math.inf] * len(self.speeds)]
        for s, (i, j) in enumerate(spans(sizes)):
            inside = range(i, j)
            into = sum(
                b
                for a, readers, b, _ in self.sends
                if a not in inside and set(readers) & set(inside)
            )
            out = sum(
                b
                for a, readers, b, _ in self.sends
                if a in inside and set(readers) - set(inside)
            )
            dearest = max(
                dearest, sum(self.times[i:j]) / self.speeds[self.places[s]] + into + out
            )
            traffic += into * (1 + s)
            over[self.places[s]] += (sum(self.bytes[i:j]) + into) * (1 + s % 2)
        return (dearest, traffic, sum(n * n for n in sizes), [-n for n in sizes]), max(
            over
        )


@st.composite
def puzzles(draw):
    layers = draw(st.integers(1, 8))
    stages = draw(st.integers(1, min(layers, 5)))
    devices = draw(st.integers(1, stages))

    def some(low, high, n):
        return draw(st.lists(st.integers(low, high), min_size=n, max_size=n))

    places = draw(
        st.permutations([*range(devices), *some(0, devices - 1, stages - devices)])
    )
    sends = [Sent(k, (k + 1,), b) for k, b in enumerate(some(0, 3, layers - 1))]
    for _ in range(draw(st.integers(0, 3)) if layers > 1 else 0):
        ends = draw(
            st.lists(st.integers(0, layers - 1), min_size=2, max_size=4, unique=True)
        )
        sends.append(Sent(ends[0], tuple(ends[1:]), draw(st.integers(0, 5))))
    times = [6 * t for t in some(0, 4, layers)]  # divided by speeds they stay whole
    limits = some(3, 40, devices) if draw(st.booleans()) else None
    speeds, sizes = some(1, 3, devices), some(0, 9, layers)
    slack = draw(st.sampled_from([0.0, 0.3]))
    return Puzzle(times, sends, list(places), speeds, sizes, limits, slack)


@pytest.mark.quick
@settings(max_examples=300, deadline=None)
@given(puzzles())
def test_the_cut_is_the_one_that_brute_force_finds(puzzle):
    found = best_cut(puzzle.task)
    keys = {
        sizes: puzzle.key(sizes)
        for sizes in cuts(len(puzzle.times), len(puzzle.places))
    }
    fitting = [sizes for sizes, (_, over) in keys.items() if over <= 0]
    if fitting:
        assert found == puzzle.best(fitting)
        return
    assert isinstance(found, Shortage)
    assert found.proven
    if found.stage is None or len(set(puzzle.places)) == len(puzzle.places):
        assert found.missing == min(over for _, over in keys.values())


def test_a_search_that_is_cut_short_says_so():
    puzzle = Puzzle(
        [6] * 8, [], [0, 1, 0, 1], [1, 1], [2, 9, 3, 8, 4, 7, 5, 6], [30, 36]
    )
    found = best_cut(puzzle.task)
    assert isinstance(found, tuple)
    assert puzzle.key(found)[1] <= 0
    given_up = best_cut(puzzle.task, nodes=1)
    assert isinstance(given_up, Shortage)
    assert not given_up.proven


def test_many_layers():
    times = np.random.default_rng(0).integers(1, 100, 200).tolist()
    sizes = fpipe.balance(times, stages=16)
    dearest = max(sum(times[i:j]) for i, j in spans(sizes))
    assert (sum(sizes), len(sizes)) == (200, 16)

    def greedy(
        limit,
    ):  # as few stages as possible: the textbook's other way to the optimum
        stages, load = 1, 0
        for t in times:
            stages, load = (stages, load + t) if load + t <= limit else (stages + 1, t)
        return stages

    assert greedy(dearest) <= 16 < greedy(dearest - 1)


@pytest.mark.parametrize("layers", [1, 3, 7, 8])
@pytest.mark.parametrize("cost", [1, 0.1])
def test_equal_layers_are_cut_as_evenly_as_a_pipe_does_by_default(layers, cost):
    for stages in range(1, min(layers, 4) + 1):
        pipe = fpipe.Pipe([fpipe.fn(jnp.tanh)] * layers, devices=jax.devices()[:stages])
        assert fpipe.balance([cost] * layers, stages=stages) == pipe.balance


def test_ties_go_to_less_traffic_then_to_the_most_even_cut_then_to_the_first():
    assert fpipe.balance([2, 0, 2], stages=2) == (2, 1)
    assert fpipe.balance(
        costs([2, 0, 2], boundaries=[1, 8, 0]), stages=2, checkpoint="never"
    ) == (1, 2)
    assert fpipe.balance([4, 0, 0, 0, 4], stages=2) == (3, 2)
    assert fpipe.balance([4, 0, 0, 0, 0, 4], stages=2) == (3, 3)


def test_traffic_counts_where_there_is_a_bandwidth():
    known = costs([3, 1, 1, 3], boundaries=[0, 10, 0, 0], checkpoint="never")
    assert fpipe.balance(known, stages=2) == (2, 2)
    assert fpipe.balance(known, stages=2, bandwidth=20.0) == (2, 2)  # 4.5 against 5
    assert fpipe.balance(known, stages=2, bandwidth=10.0) == (
        3,
        1,
    )  # 5 against 5, and no traffic
    assert fpipe.balance(known, stages=2, bandwidth=10.0, speeds=0.1) == (
        2,
        2,
    )  # 41 against 50
    skips = (Sent(0, (1,), 1), Sent(1, (2, 3), 10))
    skipping = dataclasses.replace(known, boundaries=(0,) * 4, skips=skips)
    assert fpipe.balance(skipping, stages=2, bandwidth=1.0) == (
        1,
        3,
    )  # 6 against 14 and 15


def test_stages_of_one_device_send_each_other_nothing():
    known = costs([1, 1, 1, 1], boundaries=[8, 4, 8, 0], checkpoint="never")
    tables = SpanTables(known, (0, 1, 1, 0), Scheduling.of("gpipe"), 0.0)
    assert [tables.received(s)[s, s + 1] for s in range(4)] == [0, 8, 0, 8]
    assert [tables.link(s)[s, s + 1] for s in range(4)] == [8, 8, 8, 8]


def test_devices_of_different_speeds():
    assert fpipe.balance([1] * 6, devices=2, speeds=[2, 1]) == (4, 2)
    assert fpipe.balance([1] * 6, devices=2, speeds=[1, 2]) == (2, 4)
    assert fpipe.balance([1] * 6, devices=2, speeds=3.0) == (3, 3)
    assert fpipe.balance(
        [1] * 9, stages=4, devices=2, schedule="zb_v", speeds=[1, 3]
    ) == (1, 4, 3, 1)


@pytest.mark.parametrize(
    ("schedule", "stages"), [("interleaved_1f1b", 4), ("zb_v", 4), ("looped_bfs", 6)]
)
def test_virtual_stages_are_balanced(schedule, stages):
    sizes = fpipe.balance(
        [3, 3, 1, 1, 1, 3, 3, 3], devices=2, stages=stages, schedule=schedule
    )
    assert len(sizes) == stages
    assert (
        max(sum([3, 3, 1, 1, 1, 3, 3, 3][i:j]) for i, j in spans(sizes))
        == {4: 6, 6: 3}[stages]
    )


# --- limits ---


def test_a_limit_moves_layers():
    known = costs([1, 1, 1, 1], params=[3 * MIB, 3 * MIB, MIB, MIB], checkpoint="never")
    assert fpipe.balance(known, stages=2) == (2, 2)
    assert fpipe.balance(known, stages=2, memory=6 * MIB, optimizer=0) == (2, 2)
    assert fpipe.balance(known, stages=2, memory=5 * MIB, optimizer=0) == (1, 3)
    assert fpipe.balance(known, stages=2, memory=[9 * MIB, 18 * MIB], optimizer=2) == (
        1,
        3,
    )


def test_what_does_not_fit_says_how_much_is_missing_and_what_to_do():
    known = costs([1, 1, 1], params=[MIB, 4 * MIB, MIB], checkpoint="never")
    with raises(
        DoesNotFitError,
        "`balance(...)`: does not fit: short by 3.5 MiB on stage 1 (device 1); give "
        "more devices, more chunks, "
        "checkpoint='always', or a schedule that holds fewer microbatches than "
        "'eager_1f1b'",
    ):
        fpipe.balance(known, stages=3, memory=0.5 * MIB, optimizer=0)
    with raises(
        DoesNotFitError,
        "`balance(...)`: does not fit: short by 1 MiB on device 1; give more devices, "
        "more chunks, or a schedule that holds "
        "fewer microbatches than 'interleaved_1f1b'",
    ):
        known = dataclasses.replace(
            costs([1] * 4, params=[MIB, MIB, MIB, MIB]),
            checkpoint="always",
            microbatches=2,
        )
        fpipe.balance(
            known,
            devices=2,
            memory=[2 * MIB, MIB],
            schedule="interleaved_1f1b",
            optimizer=0,
        )


def test_a_limit_on_a_device_holds_for_all_its_stages():
    known = costs(
        [1] * 6, params=[4, 1, 1, 4, 1, 1], microbatches=2, checkpoint="never"
    )

    def cut(**options):
        return fpipe.balance(
            known,
            stages=4,
            devices=2,
            schedule="interleaved_1f1b",
            optimizer=0,
            **options,
        )

    assert cut() == (2, 2, 1, 1)  # 6 on device 0, 6 on device 1
    assert cut(memory=[5, 7]) == (1, 2, 1, 2) or cut(memory=[5, 7])
    for limits in ([5, 7], [9, 3], [10, 2]):
        sizes = cut(memory=limits)
        used = [0, 0]
        for s, (i, j) in enumerate(spans(sizes)):
            used[s % 2] += sum(known.params[i:j])
        assert used[0] <= limits[0]
        assert used[1] <= limits[1]


# --- costs ---


def test_from_shapes_alone_nothing_is_allocated_or_compiled():
    layers = [dense(4), *models()["stateful"]]
    before = {id(a) for a in jax.live_arrays()}
    seen = []

    def spy(w, x):
        seen.extend(a for a in jax.live_arrays() if id(a) not in before)
        return x @ w

    layers.append(fpipe.Layer(spy, lambda key, x: noise(key, (4, W))))
    with counted("backend_compile") as compiled:
        sizes = fpipe.balance(
            layers, shape(6, 4), stages=3, chunks=3, memory=1e9, schedule="1f1b"
        )
    assert sum(sizes) == len(layers)
    assert seen == []
    assert {id(a) for a in jax.live_arrays()} <= before
    assert compiled.count == 0


@pytest.mark.parametrize("same", ["object", "code"])
def test_equal_layers_are_traced_and_lowered_once(same):
    traces = []

    def make():
        def apply(w, x):
            traces.append(x.shape)
            return jnp.tanh(x @ w)

        return fpipe.Layer(apply, linear().init)

    one = make()
    with counted("jaxpr_to_mlir") as lowered:
        known = fpipe.layer_costs(
            [one if same == "object" else make() for _ in range(6)], shape(4, W)
        )
    assert known.forward == known.forward[:1] * 6
    assert known.backward == (known.backward[0], *known.backward[1:2] * 5)
    # The first layer has another backward: its input gets no gradient.
    assert lowered.count == 4
    if same == "object":
        # Once for all: `init`, both kinds and their pairs share a trace.
        assert len(traces) == 1


def test_flops_of_dense_layers_are_the_formula():
    known = fpipe.layer_costs(
        [linear(16), linear(4), linear(8)], shape(12, W), chunks=3
    )
    products = [2 * 4 * a * b for a, b in itertools.pairwise([W, 16, 4, 8])]
    assert known.unit == "FLOP"
    assert known.forward == tuple(products)
    assert known.backward == (products[0], 2 * products[1], 2 * products[2])
    assert known.params == tuple(
        4 * a * b for a, b in itertools.pairwise([W, 16, 4, 8])
    )
    assert known.gradients == known.params
    assert known.boundaries == (4 * 4 * 16, 4 * 4 * 4, 4 * 4 * 8)
    assert (known.inputs, known.microbatches) == (4 * 4 * W, 3)


def test_bytes_are_read_and_written_ones():
    known = fpipe.layer_costs([linear(16)], shape(4, W), by="bytes")
    assert known.unit == "byte"
    assert known.forward == (4 * (4 * W + W * 16 + 4 * 16),)


def conv(channels, size):
    def init(key, x):
        return noise(key, (size, size, x.shape[-1], channels))

    def apply(kernel, x):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    return fpipe.Layer(apply, init, name="conv")


def test_unequal_convolutions():
    layers = [conv(4, 3), conv(4, 1), conv(16, 1), conv(2, 1)]
    known = fpipe.layer_costs(layers, shape(4, 10, 10, 2), chunks=2)
    pixels = 2 * 8 * 8
    assert known.forward == (
        2 * pixels * 9 * 2 * 4,
        2 * pixels * 4 * 4,
        2 * pixels * 4 * 16,
        2 * pixels * 16 * 2,
    )
    # In units of 2 * pixels: 72 + 72 (the input gets no gradient), then 3 * 16, 3 * 64,
    # 3 * 32.
    assert fpipe.balance(known, stages=3, checkpoint="never") == (2, 1, 1)
    assert fpipe.balance(
        layers, shape(4, 10, 10, 2), chunks=2, stages=2, checkpoint="never"
    ) == (2, 2)


def test_a_loop_counts_as_often_as_it_runs_and_a_branch_by_its_dearest():
    def loop(w, x):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=7)[0]

    def nested(w, x):
        return jax.checkpoint(lambda x: loop(w, x))(x) @ w

    def branch(w, x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    def looping_branch(w, x):
        return jax.lax.cond(x[0, 0] > 0, lambda: loop(w, x) @ w @ w, lambda: loop(w, x))

    init = linear().init
    layers = [fpipe.Layer(f, init) for f in (loop, nested, branch, looping_branch)]
    known = fpipe.layer_costs(layers, shape(4, W))
    product = 2 * 4 * W * W
    assert [round(f / product) for f in known.forward] == [7, 8, 2, 9]
    assert known.backward[0] // product == 14


def test_a_callback_counts_nothing_and_does_not_hide_the_rest():
    def apply(w, x):
        return (
            jax.pure_callback(lambda a: a, shape(4, W), jax.lax.stop_gradient(x))
            + x @ w
        )

    assert fpipe.layer_costs(
        [fpipe.Layer(apply, linear().init)], shape(4, W)
    ).forward == (2 * 4 * W * W + 4 * W,)


def test_time_is_measured(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)

    def sleeping(seconds):
        def wait(a):
            clock.sleep(seconds)
            return np.asarray(a)

        return fpipe.fn(lambda x: jax.pure_callback(wait, shape(2, 3), x))

    layers = [sleeping(s) for s in (0.03, 0.01, 0.01, 0.01, 0.01)]
    known = fpipe.layer_costs(layers, shape(2, 3), by="time", repeats=3)
    assert known.unit == "second"
    assert known.forward == pytest.approx((0.03, 0.01, 0.01, 0.01, 0.01))
    assert known.backward == (0.0,) * 5  # no parameters, so nothing to differentiate
    # A program that calls Python runs in the thread that launches it: here the mean of
    # five forwards and as many backwards.
    assert known.launch == pytest.approx(0.07 / 10)
    assert "launch of an action: 7 ms" in str(known)
    assert fpipe.balance(layers, shape(2, 3), by="time", stages=2) in [(1, 4), (2, 3)]


class Stages:
    """Stages whose times are no sums of those of their layers."""

    def __init__(self, time):
        self.time, self.asked = time, []

    def measure(self, spans):
        self.asked += spans
        return {span: LayerWork(self.time(*span), 0.0) for span in spans}


def measured(layers, stages, count):
    known = costs(layers, checkpoint="never")
    places = tuple(range(count))
    return found_balance(known, stages, Scheduling.of("1f1b"), places, Hardware())


def test_stages_of_the_best_cut_are_measured_until_none_can_be_better():
    times = {(0, 2): 3.1, (2, 4): 5.0, (0, 3): 3.9, (1, 4): 4.5, (3, 4): 2.0}
    stages = Stages(lambda *span: times[span])
    # By the sums (2, 2) is the best, 3 and 3.
    assert measured((2.0, 1.0, 1.0, 2.0), stages, 2) == (3, 1)
    assert stages.asked[:3] == [(0, 2), (2, 4), (0, 3)]
    # Each stage of both cuts once more before the end; the last layer was known.
    assert stages.asked[3:] == [(0, 2), (2, 4), (0, 3), (3, 4)]


def test_a_stage_that_was_measured_wrongly_is_measured_again_before_it_decides():
    """What else a machine does only adds to a time."""
    asked = list[tuple[int, int]]()

    def time(start, end):
        asked.append((start, end))
        busy = (start, end) == (2, 4) and asked.count((2, 4)) == 1
        return end - start + 5.0 * busy

    assert measured((1.0,) * 4, Stages(time), 2) == (2, 2)
    assert asked.count((2, 4)) == 2
    # A layer that is a stage, too: it was measured with the others.
    stages = Stages(lambda start, end: float(end - start))
    assert measured((1.0, 1.0, 9.0), stages, 2) == (2, 1)
    assert measured((1.0, 1.0, 1.0, 3.0), stages, 2) == (2, 2)


def test_when_cuts_have_been_measured_often_enough_the_best_of_them_is_taken():
    # Each stage takes longer than its sum, so that the next cut always looks better.
    stages = Stages(lambda start, end: 50.0 + start + end)
    first, second = measured((1.0,) * 30, stages, 2)
    assert len({*stages.asked}) == 16
    assert sorted(stages.asked[16:]) == sorted(stages.asked[:16])
    ends = [end for start, end in stages.asked if start == 0]
    assert (first, second) == (min(ends), 30 - min(ends))


def test_time_of_layers_of_every_kind():
    """What a backward takes from its forward, keys, states and borrowed parameters are
    all there.
    """
    tied, dropped, counts = (
        models()["tied"],
        models()["dropout"][1],
        models()["stateful"][0],
    )
    layers = [
        tied[0],
        keep(),
        counts,
        dropped,
        add(),
        *models()["branched"][1:3],
        tied[3],
    ]
    for params in (None, fpipe.sequential(layers).init(jax.random.key(0), shape(2, 4))):
        known = fpipe.layer_costs(
            layers, shape(2, 4), by="time", repeats=1, params=params
        )
        assert min(known.forward) > 0
        assert min(known.backward) > 0


def test_forwards_that_run_twice_count_twice():
    known = fpipe.LayerCosts.given([2.0] * 7)
    known = dataclasses.replace(known, forward=[1.0] * 7, microbatches=8)
    cut = {
        c: fpipe.balance(known, stages=2, checkpoint=c, schedule="1f1b")
        for c in ("never", "always", "except_last")
    }
    # The last stage goes back at once, and keeps what it has: 3 for each layer, against
    # 4.
    assert cut == {"never": (4, 3), "always": (3, 4), "except_last": (3, 4)}
    assert fpipe.balance(known, stages=2, checkpoint="always", schedule="gpipe") == (
        4,
        3,
    )
    assert fpipe.balance(
        known, stages=2, checkpoint="always", schedule="1f1b", chunks=1
    ) == (4, 3)
    assert fpipe.balance(
        dataclasses.replace(known, backward=range(7)), stages=2, schedule="forward_only"
    ) == (4, 3)
    assert fpipe.balance([4, 1, 1], stages=2, schedule="forward_only") == (
        1,
        2,
    )  # given numbers are all of the work


def test_skips_of_a_u_net_and_borrowed_weights():
    one, two = fpipe.Namespace(), fpipe.Namespace()
    layers = [
        keep().isolate(one),
        dense(),
        keep().isolate(two),
        dense(),
        add().isolate(two),
        add().isolate(one),
    ]
    known = fpipe.layer_costs(layers, shape(6, 4), chunks=2)
    assert known.skips == (
        Sent(0, (5,), 3 * 4 * 4, "skip#0"),
        Sent(2, (4,), 3 * 4 * 4, "skip#1"),
    )
    assert known.borrowed == ()
    tied = fpipe.layer_costs(models()["tied"], shape(6, 4))
    # Of two arrays one is read.
    assert tied.borrowed == (Sent(0, (3,), 4 * 16),)
    # The inner pair stays together where bytes are expensive.
    expensive = dataclasses.replace(
        known,
        forward=(1.0,) * 6,
        backward=(0.0,) * 6,
        unit="second",
        checkpoint="never",
    )
    assert fpipe.balance(expensive, stages=2, bandwidth=40.0) == (2, 4)
    assert fpipe.balance(
        dataclasses.replace(expensive, skips=()), stages=2, bandwidth=40.0
    ) == (3, 3)


def test_mixed_precision_halves_what_crosses_and_sums_gradients_in_float32():
    known = fpipe.layer_costs([dense(W)] * 2, shape(4, W), compute_dtype=jnp.bfloat16)
    assert known.boundaries == (2 * 4 * W, 4 * 4 * W)
    assert known.gradients == known.params
    half = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16),
        ({"w": jnp.ones((W, W)), "b": jnp.ones(W)},) * 2,
    )
    known = fpipe.layer_costs(
        [dense(W)] * 2, shape(4, W, dtype=jnp.bfloat16), params=half
    )
    assert known.gradients == tuple(2 * p for p in known.params)


def test_a_policy_saves_what_it_says():
    def mixed(w, x):
        return jnp.sin(jnp.tanh(x @ w))

    layers = [fpipe.Layer(mixed, linear().init)] * 3
    saved = {
        policy: fpipe.layer_costs(layers, shape(4, W), checkpoint=policy).saved
        for policy in ("always", jax.checkpoint_policies.dots_saveable)
    }
    assert saved == {
        "always": (0, 0, 0),
        jax.checkpoint_policies.dots_saveable: (4 * 4 * W,) * 3,
    }


# --- what a pipe keeps ---


def test_microbatches_that_a_stage_holds_are_the_schedules():
    known = costs([1] * 4, microbatches=8)
    live = {
        name: tuple(
            SpanTables(known, (0, 1, 2, 3), Scheduling.of(name), 0.0).holding(s).live
            for s in range(4)
        )
        for name in ("gpipe", "1f1b", "eager_1f1b", "zb_h1")
    }
    assert live == {
        "gpipe": (8,) * 4,
        "1f1b": (4, 3, 2, 1),
        "eager_1f1b": (7, 5, 3, 1),
        "zb_h1": (4,) * 4,
    }


def test_what_goes_from_stage_to_stage_waits_where_it_goes_or_where_it_was_made():
    known = costs([1] * 4, microbatches=8, skips=(Sent(0, (3,), 1),))

    def waits(name):
        tables = SpanTables(known, (0, 1, 2, 3), Scheduling.of(name), 0.0)
        return [tables.holding(s) for s in range(4)]

    # What a stage before holds and this one does not yet: boundaries of the one before,
    # skips of the first.
    assert [w.arrived[:2] for w in waits("1f1b")] == [(0, 0), (1, 1), (1, 2), (1, 3)]
    # A skip of microbatch i is made at i + 1 and read by stage 3 at i + 3; backwards
    # take 2.
    assert [w.made[1] for w in waits("gpipe")] == [0, 0, 1, 2]
    assert [w.made[3] for w in waits("gpipe")] == [2, 1, 0, 0]


def test_by_memory_stages_need_about_the_same():
    layers, x = [linear(64), linear(4), linear(4), linear(4)], shape(512, 4)
    known = fpipe.layer_costs(layers, x, by="memory")
    assert known.forward == known.backward == (0.0,) * 4

    def most(sizes):
        tables = SpanTables(known, (0, 1), Scheduling.of("eager_1f1b"), 2.0)
        return max(tables.memory(s)[i, j] for s, (i, j) in enumerate(spans(sizes)))

    best = min(cuts(4, 2), key=most)
    assert (
        best
        == fpipe.balance(known, stages=2, by="memory")
        == fpipe.balance(layers, x, stages=2, by="memory")
    )
    assert most(best) < most((2, 2)) or best == (2, 2)
    uneven = costs([1, 1, 1, 1], params=[1, 1, 1, 9])
    assert fpipe.balance(uneven, stages=2, by="memory") == (3, 1)
    assert fpipe.balance(uneven, stages=2, by="memory", memory=[100, 1000]) == (1, 3)


# --- the front ---


def test_a_pipe_finds_its_balance_by_a_sample():
    layers, x = [linear(32), linear(32), linear(W), linear(W), linear(W)], shape(8, W)
    plain = fpipe.Pipe(layers, devices=jax.devices()[:2], chunks=2)
    assert plain.balance == (3, 2)
    for by in (None, "flops"):
        pipe = fpipe.Pipe(layers, by, jax.devices()[:2], chunks=2, sample=x)
        assert pipe.balance == (2, 3) == fpipe.balance(layers, x, devices=2, chunks=2)
        assert dataclasses.replace(pipe, chunks=4).balance == (2, 3)
    assert "sample" not in {field.name for field in dataclasses.fields(pipe)}
    virtual = fpipe.Pipe(
        layers, None, jax.devices()[:2], chunks=2, schedule="zb_v", sample=x
    )
    assert virtual.balance == fpipe.balance(
        layers, x, stages=4, devices=2, chunks=2, schedule="zb_v"
    )
    assert len(virtual.balance) == 4
    wide = [linear()] * 4 + [linear(64)]
    assert fpipe.Pipe(
        wide, "memory", jax.devices()[:2], sample=shape(1, W)
    ).balance == (4, 1)
    many = fpipe.Layer(
        lambda w, x: jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0],
        linear().init,
    )
    mixed, two = [many, *[linear()] * 5], jax.devices()[:2]
    assert fpipe.Pipe(mixed, "flops", two, sample=shape(1, W)).balance == (1, 5)
    assert fpipe.Pipe(mixed, "memory", two, sample=shape(1, W)).balance == (3, 3)
    scan = fpipe.Pipe(
        layers, None, jax.devices()[:2], chunks=2, executor="scan", sample=x
    )
    assert scan.balance == (2, 3)


def test_a_sample_has_what_layers_ask_for():
    def heavy(w, x, *, side, step, train):
        y = x @ side @ side.T if train else x
        return y[:, :W] * w * step.astype(x.dtype)

    def light(w, x, *, side=None):
        return x * w if side is None else x * w * side.sum()

    def init(key, x, *, side=None):
        return jnp.ones(W)

    two, x, side = jax.devices()[:2], shape(4, W), shape(W, 64)
    layers = [fpipe.Layer(heavy, init), *[fpipe.Layer(light, init)] * 2]
    side = fpipe.NoChunk(side)
    pipe = fpipe.Pipe(layers, devices=two, chunks=2, sample=x, sample_side=side)
    assert pipe.balance == (1, 2)
    assert pipe.balance == fpipe.balance(layers, x, side=side, devices=2, chunks=2)
    assert "sample_side" not in {field.name for field in dataclasses.fields(pipe)}
    # A default holds where nothing is given.
    assert fpipe.Pipe(layers[1:], devices=two, sample=x).balance == (1, 1)
    with pytest.raises(ValueError, match="layer 0 'heavy' asks for the need 'step'"):
        fpipe.tune(layers, x, side=side, devices=two)


def test_a_pipe_with_a_found_balance_trains():
    layers, x = models()["tied"], Case(models()["tied"], 2).x
    pipe = fpipe.Pipe(layers, "time", jax.devices()[:2], chunks=2, sample=x)
    assert sum(pipe.balance) == 4
    params = pipe.init(jax.random.key(0), x)
    got, _ = pipe.value_and_grad(mse)(params, x, x)
    want = mse(fpipe.sequential(layers)(pipe.gather(params), x), x)
    assert np.allclose(got, want, rtol=1e-5)


def test_costs_are_values():
    layers, x = [dense(W), dense(4)], shape(4, W)
    known = fpipe.layer_costs(layers, x)
    assert pickle.loads(pickle.dumps(known)) == known == fpipe.layer_costs(layers, x)
    assert hash(known) == hash(dataclasses.replace(known))
    assert fpipe.balance(known, stages=2) == fpipe.balance(layers, x, stages=2)
    head, first, *_, last = str(known).splitlines()
    assert head.split() == [
        "layer",
        "forward",
        "backward",
        "params",
        "residuals",
        "boundary",
    ]
    assert first.split() == [
        "0",
        "dense",
        f"{known.forward[0]:g}",
        f"{known.backward[0]:g}",
        "0.000",
        "0.000",
        "0.000",
    ]
    assert last == "work in FLOP, memory in MiB, for the one microbatch"


WRONG = [
    ({"layers": [], "x": shape(2, 2)}, ValueError, "at least one layer"),
    ({"layers": [linear()]}, TypeError, r"`balance\(layers, x\)`: layers need a batch"),
    (
        {"layers": [1, linear()]},
        TypeError,
        "one number for each layer, or layers, not both",
    ),
    ({"layers": [1, -1]}, ValueError, "finite numbers that are not negative"),
    ({"layers": [1, math.nan]}, ValueError, "finite numbers that are not negative"),
    (
        {"layers": [1, 1], "x": shape(2, 2)},
        TypeError,
        "are only for layers; leave them out with costs",
    ),
    ({"layers": [1, 1], "stages": 3}, ValueError, "there are 2 layers for 3 stages"),
    (
        {"layers": [1, 1], "stages": 0},
        ValueError,
        "stages must be an int of at least 1",
    ),
    (
        {"layers": [1, 1], "devices": 2.0},
        ValueError,
        "devices must be an int of at least 1",
    ),
    (
        {"layers": [1] * 4, "stages": 4, "devices": 2},
        ValueError,
        "puts 4 stages on 4 devices; give fewer stages",
    ),
    (
        {"layers": [1] * 4, "stages": 2, "by": "weight"},
        ValueError,
        r"`balance\(by='weight'\)`: one of 'flops'",
    ),
    (
        {"layers": [1] * 4, "stages": 2, "by": "flops"},
        ValueError,
        "the costs are in given",
    ),
    (
        {"layers": [1] * 4, "stages": 2, "speeds": [1]},
        ValueError,
        "a number more than 0, or one for each of 2 devices",
    ),
    (
        {"layers": [1] * 4, "stages": 2, "speeds": [1, 0]},
        ValueError,
        "a number more than 0, or one for each",
    ),
    (
        {"layers": [1] * 4, "stages": 2, "memory": "10 GB"},
        ValueError,
        "a number more than 0, or one for each",
    ),
    (
        {"layers": [1] * 4, "stages": 2, "bandwidth": 0},
        ValueError,
        "bytes per second, more than 0",
    ),
    (
        {"layers": [1] * 4, "stages": 2, "optimizer": -1},
        ValueError,
        "bytes of state for each byte",
    ),
    (
        {"layers": [1] * 4, "stages": 2, "chunks": 0},
        ValueError,
        "chunks must be at least 1",
    ),
    (
        {"layers": [1] * 4, "stages": 3, "schedule": "zb_v"},
        ValueError,
        "puts 2 stages on each device",
    ),
    (
        {"layers": [linear()] * 2, "x": shape(2, W), "stages": 2, "bandwidth": 1e9},
        ValueError,
        "against FLOPs: give `speeds=`",
    ),
    (
        {"layers": [lambda p, x: x], "x": shape(2, W), "stages": 1},
        ValueError,
        "has no init",
    ),
]


@pytest.mark.parametrize(
    ("given", "error", "text"), WRONG, ids=[text for _, _, text in WRONG]
)
def test_wrong_arguments(given, error, text):
    with pytest.raises(error, match=text):
        fpipe.balance(given.pop("layers"), given.pop("x", None), **given)


def test_wrong_costs():
    with raises(
        ValueError,
        "`layer_costs(by='weight')`: one of 'flops', 'bytes', 'time', 'memory'",
    ):
        fpipe.layer_costs(
            [linear()],
            shape(2, W),
            by="weight",  # pyright: ignore[reportArgumentType]
        )
    with raises(ValueError, "`layer_costs(repeats=0)`: an int, at least 1"):
        fpipe.layer_costs([linear()], shape(2, W), repeats=0)
    known = fpipe.LayerCosts.given([1, 2])
    with raises(
        ValueError,
        "`LayerCosts(params=...)`: a number for each layer is needed, 2 in all, got 1",
    ):
        dataclasses.replace(known, params=(1,))
    with raises(
        ValueError,
        "`LayerCosts(forward=(-1, 0))`: finite numbers that are not negative are "
        "needed",
    ):
        dataclasses.replace(known, forward=(-1, 0))


def test_wrong_samples():
    layers = [linear()] * 2
    with raises(
        TypeError,
        "`Pipe(balance='flops')`: a batch, or its shapes, is needed to find a balance: "
        "`Pipe(..., sample=x)`",
    ):
        fpipe.Pipe(layers, "flops")
    with pytest.raises(
        TypeError,
        match=r"`Pipe\(balance=\[1, 1\]\)` and `sample`: a sample is only for a "
        r"balance that is computed",
    ):
        fpipe.Pipe(layers, [1, 1], sample=shape(2, W))
    with pytest.raises(
        TypeError, match=r"`Pipe\(balance='even'\)`: a sequence of layers per stage"
    ):
        fpipe.Pipe(layers, "even")  # pyright: ignore[reportArgumentType]
    sided = models()["sided"]
    with raises(
        ValueError,
        "`Pipe(sample=...)`: layer 1 'sided' asks for side inputs: give those of the "
        "sample, or their shapes, too: `Pipe(..., sample=x, sample_side=side)`",
    ):
        fpipe.Pipe(sided, sample=shape(2, 4))
    with raises(
        TypeError,
        "`Pipe(sample_side=...)`: these are the side inputs of a sample: give it too, "
        "`Pipe(..., sample=x, sample_side=side)`",
    ):
        fpipe.Pipe(sided, [2, 2], sample_side=shape(2, 4))
    with raises(
        ValueError,
        "`Pipe(sample_side=...)`: side inputs were given, but no layer asks for them: "
        "a layer asks by a keyword-only parameter, `def f(params, x, *, side)`",
    ):
        fpipe.Pipe(layers, sample=shape(2, W), sample_side=shape(2, W))
    with pytest.raises(ValueError, match="`side` of shape") as caught:
        fpipe.Pipe(sided, sample=shape(2, 4), sample_side=shape(3, 4))
    assert caught.value.__notes__ == [
        "(in `Pipe(sample=..., sample_side=...)`: `x` is the sample, and `side` is "
        "`sample_side`)"
    ]


# --- copies to the host, and recomputations that run early ---

THREE = (0, 1, 2)


def test_what_is_on_the_host_or_recomputed_early_counts_as_long_as_it_is_there():
    known = fpipe.LayerCosts.given([1.0] * 4)
    known = dataclasses.replace(known, microbatches=8, checkpoint="always")
    for name in ("gpipe", "1f1b", "eager_1f1b"):
        for recompute in RECOMPUTE:
            for limit in (None, 1, 3):
                pipe = fpipe.Pipe(
                    [fpipe.fn(jnp.tanh)] * 3,
                    devices=jax.devices()[:3],
                    checkpoint="always",
                    schedule=name,
                    recompute=recompute,
                    offload=limit,
                )
                made = pipe.make_schedule(8)
                timeline = simulate(made)
                tables = SpanTables(known, THREE, Scheduling.of(made), 0.0)
                holding = [tables.holding(s) for s in THREE]
                assert tuple(h.live for h in holding) == timeline.peak_live
                assert [h.recomputed for h in holding] == [
                    max(1, peak) for peak in timeline.peak_recomputed
                ]


def test_with_copies_the_cut_is_the_one_that_brute_force_finds():
    """Six layers on three devices, each with residuals that take more than its work."""
    work, residuals, params = [4, 1, 2, 1, 3, 1], [5, 9, 2, 7, 1, 4], [3, 1, 2, 1, 1, 2]
    none = (0,) * 6
    known = dataclasses.replace(
        fpipe.LayerCosts.given(work),
        params=params,
        gradients=none,
        residuals=residuals,
        microbatches=6,
        checkpoint="never",
    )
    plain = one_f_one_b(3, 6)
    limit, bandwidth = 34.0, 1.0
    for live in (None, 2, 1):
        made = plain if live is None else offload(plain, memory=live)
        peaks = simulate(made).peak_live
        shares = [len(made.order("O", s)) / 6 for s in THREE]

        def cost(sizes, shares=shares):
            return max(
                max(sum(work[i:j]), share * sum(residuals[i:j]) / bandwidth)
                for share, (i, j) in zip(shares, spans(sizes), strict=True)
            )

        def fits(sizes, peaks=peaks):
            return all(
                sum(params[i:j]) + peak * sum(residuals[i:j]) <= limit
                for peak, (i, j) in zip(peaks, spans(sizes), strict=True)
            )

        fitting = [sizes for sizes in cuts(6, 3) if fits(sizes)]

        def found(live=live):
            return fpipe.balance(
                known,
                stages=3,
                schedule="1f1b",
                offload=live,
                memory=limit,
                optimizer=0.0,
                host_bandwidth=bandwidth,
            )

        if not fitting:
            assert live is None
            with pytest.raises(ValueError, match="does not fit"):
                found()
            continue
        cut = found()
        assert cut in fitting
        assert cost(cut) == min(map(cost, fitting))
        # Without the time of copies another cut would be the best.
        assert live != 1 or cost(cut) > max(sum(work[i:j]) for i, j in spans(cut))
