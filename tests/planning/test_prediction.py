"""Predictions: against what a run really holds, against formulas, and against the
simulation.
"""

import dataclasses
import gc
import json
import time
from collections import Counter
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

import fpipe
from fpipe._planning.advice import warn_of_slow_launches
from fpipe._planning.text import Table, size
from fpipe.schedules import svg
from tests.helpers import Clock, add, counter, dense, dropout, keep, look, mse, raises
from tests.schedules.test_draw import Page

ROWS, WIDTH = 16, 4
X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)


def skips():
    """A skip over two cuts with two readers, and a random layer."""
    return [dense(), keep(), dropout(), look(), dense(6), dense(WIDTH), add()]


@pytest.mark.quick
def test_the_rows_of_the_stages():
    pipe = fpipe.Pipe(skips(), [2, 2, 3], chunks=4, schedule="1f1b", checkpoint="never")
    plan = pipe.plan(None, X)
    first, second, third = plan.stages
    assert [row.layers for row in plan.stages] == [
        ("dense", "stash"),
        ("dropout", "peek"),
        ("dense", "dense", "pop"),
    ]
    assert [row.first for row in plan.stages] == [0, 2, 4]
    assert [row.params for row in plan.stages] == [
        4 * 4 + 4 + 4,
        4 + 4,
        4 * 6 + 6 + 6 * 4 + 4 + 4,
    ]
    piece = ROWS // 4 * WIDTH * 4
    assert [row.boundary for row in plan.stages] == [piece, piece, 0]
    assert first.stashed == (("skip", 1, piece), ("skip", 2, piece))
    assert second.popped == (("skip", 0, piece),)
    assert third.popped == (("skip", 0, piece),)
    # Two products of 4 rows, and what is added to them.
    assert third.work["F"] >= 2 * 4 * (4 * 6 + 6 * 4)
    assert set(first.work) == {"F", "B"}


def test_what_crosses_is_what_a_recording_counts():
    """Stage 1 reads a part of what stage 0 makes, of the boundary and of a skip; stage
    2 reads more of the skip.
    """

    @fpipe.skippable(stash=["two"])
    def begin(w, x, *, carry):
        two = {"narrow": (x @ w)[:, :1], "unread": 3 * x, "wide": jnp.tanh(x @ w)}
        return (x @ w, 2 * x), fpipe.stash(carry, "two", two)

    @fpipe.skippable(peek=["two"])
    def some(w, x, *, carry):
        return x[0] @ w + fpipe.peek(carry, "two")["narrow"], carry

    @fpipe.skippable(pop=["two"])
    def rest(w, x, *, carry):
        two, carry = fpipe.pop(carry, "two")
        return x @ w + two["narrow"] * two["wide"], carry

    pipe = fpipe.Pipe([begin, some, rest], chunks=2)
    params, x = pipe.place([jnp.eye(WIDTH)] * 3), jnp.ones((ROWS, WIDTH))
    plan = pipe.plan(params, x, x, loss_fn=mse)
    _, recorded = pipe.record(pipe.value_and_grad(mse), params, x, x)
    wide, narrow = ROWS // 2 * WIDTH * 4, ROWS // 2 * 4
    assert [row.boundary for row in plan.stages] == [wide, wide, 0]
    assert plan.stages[0].stashed == (("two", 1, narrow), ("two", 2, narrow + wide))
    # Two microbatches, and a cotangent of all.
    moved = Counter[tuple[int, int]]()
    for transfer in recorded.transfers:
        moved[transfer.source, transfer.target] += transfer.bytes
    assert moved == {
        (0, 1): 2 * (wide + narrow),
        (0, 2): 2 * (wide + narrow),
        (1, 2): 2 * wide,
        (2, 1): 2 * wide,
        (1, 0): 2 * (wide + narrow),
        (2, 0): 2 * (wide + narrow),
    }


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_of_what_is_borrowed_the_arrays_that_are_read_count(executor):
    """The embedding has two arrays, and the head ties one of them."""
    table = (8, WIDTH)

    def embed(params, tokens):
        return params["table"][tokens] + params["bias"]

    def head(params, x, *, borrowed):
        return x @ borrowed["embed"]["table"].T

    def init(key, x):
        return {"table": jnp.zeros(table), "bias": jnp.zeros(WIDTH)}

    layers = [
        fpipe.Layer(embed, init, name="embed"),
        dense(),
        fpipe.Layer(head, lambda key, x: (), name="head", borrow=("embed",)),
    ]
    pipe = fpipe.Pipe(layers, [1, 1, 1], chunks=4, executor=executor)
    plan = pipe.plan(None, jax.ShapeDtypeStruct((ROWS,), jnp.int32))
    size_of_table = 8 * WIDTH * 4
    first, second, third = plan.stages
    assert first.stashed == (("embed", 2, size_of_table),)
    assert third.popped == (("embed", 0, size_of_table),)
    assert second.stashed == second.popped == third.stashed == first.popped == ()
    assert [row.params for row in plan.stages] == [
        8 * WIDTH + WIDTH,
        WIDTH * WIDTH + WIDTH,
        0,
    ]
    if executor == "placed":
        # Its optimizer has no state for what it borrows.
        own = size_of_table + WIDTH * 4
        assert plan.devices[0].memory["optimizer"] == 2 * own
        assert plan.devices[2].memory["optimizer"] == 0
        assert plan.devices[2].memory["parameters"] == size_of_table


def test_arrays_that_layers_close_over_count_in_each_program_that_reads_them():
    big = jnp.arange(float(64 * WIDTH)).reshape(64, WIDTH)
    size_of_big = 64 * WIDTH * 4

    def closing(w, x):
        return jnp.sin(x @ w * big.sum(0))

    layers = [dense(), fpipe.Layer(closing, lambda key, x: jnp.eye(WIDTH))]
    plan = fpipe.Pipe(layers, [1, 1], chunks=2, checkpoint="never").plan(None, X)
    # The forward reads it, and the backward for the derivative of the product.
    assert [d.memory.get("constants", 0) for d in plan.devices] == [0, 2 * size_of_big]
    assert plan.devices[1].peak > 2 * size_of_big
    assert "constants" in str(plan)
    scan = fpipe.Pipe(layers, [1, 1], chunks=2, executor="scan").plan(None, X)
    # One program, which all devices run.
    assert [d.memory["constants"] for d in scan.devices] == [size_of_big] * 2
    assert "constants" not in str(fpipe.Pipe([dense()] * 2, chunks=2).plan(None, X))


@pytest.mark.quick
def test_work_is_that_of_the_products_and_time_that_of_the_simulation():
    width, rows = 64, 32
    wide = fpipe.Layer(lambda w, x: x @ w, lambda key, x: jnp.zeros((width, width)))
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    product = 2 * (rows // 8) * width * width
    for checkpoint in ("never", "always"):
        pipe = fpipe.Pipe([wide] * 4, chunks=8, schedule="1f1b", checkpoint=checkpoint)
        plan = pipe.plan(None, x)
        assert [row.work["F"] for row in plan.stages[:3]] == [product] * 3
        # The first makes no gradient of its input, and a product alone is never run
        # again: nobody needs its result.
        assert [row.work["B"] // product for row in plan.stages] == [1, 2, 2, 2]
    costs = fpipe.schedules.Costs(
        F=[row.work["F"] for row in plan.stages],
        B=[row.work["B"] for row in plan.stages],
        R=0,
        transfer=0,
    )
    timeline = fpipe.schedules.simulate(pipe.make_schedule(8), costs)
    assert (plan.step, plan.bubble) == (timeline.makespan, timeline.bubble)
    fast = pipe.plan(
        None,
        x,
        speed=[product, product, product, 2 * product],
        latency=0.5,
        bandwidth=8 * width * 4,
    )
    assert fast.unit == "second"
    assert [row.work["F"] for row in fast.stages[:3]] == [1.0] * 3
    lag = 0.5 + (rows // 8) * width * 4 / (8 * width * 4)
    costs = dataclasses.replace(
        costs,
        F=[row.work["F"] for row in fast.stages],
        B=[row.work["B"] for row in fast.stages],
        transfer=lag,
    )
    assert fast.step == fpipe.schedules.simulate(pipe.make_schedule(8), costs).makespan


@pytest.mark.parametrize("executor", ["placed", "scan"])
@pytest.mark.usefixtures("own_heap")
def test_a_plan_from_shapes_allocates_and_compiles_nothing(executor):
    pipe = fpipe.Pipe(
        [dense(), counter(), dropout(), dense()], [1, 1, 2], chunks=4, executor=executor
    )
    events = []
    gc.collect()
    before = len(jax.live_arrays())
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: events.append(event)
    )
    try:
        plan = pipe.plan(None, X, train=True)
        str(plan)
        plan.to_json()
    finally:
        jax.monitoring.clear_event_listeners()
    compiled = [name for name in events if "backend_compile" in name]
    # A key, and the numbers of the microbatches that the programs will be given.
    assert len(jax.live_arrays()) - before <= 12
    assert len(compiled) <= 2
    assert plan.executor == executor


def test_it_is_the_same_from_arrays_shapes_and_placed_or_packed_parameters():
    for executor in ("placed", "scan"):
        pipe = fpipe.Pipe(skips(), [2, 2, 3], chunks=4, executor=executor)
        x = jnp.ones((ROWS, WIDTH))
        want = pipe.plan(None, X).as_dict()
        params = pipe.init(jax.random.key(0), x)
        assert pipe.plan(params, X).as_dict() == want
        assert pipe.plan(pipe.gather(params), X).as_dict() == want
        assert (
            dataclasses.replace(pipe, detect_anomaly=True).plan(params, X).as_dict()
            == want
        )


def test_under_scan_every_device_has_the_buffers_of_the_machine():
    pipe = fpipe.Pipe(
        [dense()] * 4, chunks=4, executor="scan", schedule="1f1b", checkpoint="never"
    )
    plan = pipe.plan(None, X, optimizer=3.0)
    each = (WIDTH * WIDTH + WIDTH) * 4
    assert [d.name for d in plan.devices] == [str(d) for d in pipe.devices]
    for row in plan.devices:
        assert row.memory["parameters"] == row.memory["gradients"] == each
        assert row.memory["optimizer"] == 3 * each
        assert row.memory["residuals"] > 0
    compiled = pipe.plan(None, X, optimizer=3.0, compiled=True)
    params = pipe.init(jax.random.key(0), X)
    x = jnp.ones((ROWS, WIDTH))

    def mean_square(y):
        return jnp.mean(jnp.square(y))

    memory = (
        jax.jit(pipe.value_and_grad(mean_square))
        .lower(params, x)
        .compile()
        .memory_analysis()
    )
    assert memory is not None
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
    )
    assert (
        abs(compiled.devices[0].peak - 3 * each - (total - memory.alias_size_in_bytes))
        <= 0.05 * total
    )


def test_over_a_data_axis_a_device_has_its_shard_of_what_has_rows():
    def planned(data, memory=None):
        auto = (jax.sharding.AxisType.Auto,) * 2
        mesh = jax.make_mesh(
            (data, 2),
            ("data", "stage"),
            axis_types=auto,
            devices=jax.devices()[: 2 * data],
        )
        pipe = fpipe.Pipe(
            [dense()] * 4, chunks=2, executor="scan", mesh=mesh, checkpoint="never"
        )
        return mesh.devices, pipe.plan(None, X, memory=memory)

    (_, one), (devices, two) = planned(1), planned(2, [1e9, 1e8])
    for role, count in one.devices[0].memory.items():
        whole = role in ("parameters", "gradients", "optimizer", "outputs")
        assert two.devices[0].memory[role] == (count if whole else count // 2), role
    # All devices of a stage's place have its number and its limit.
    rows = [
        (0, devices[0, 0], 1e9),
        (0, devices[1, 0], 1e9),
        (1, devices[0, 1], 1e8),
        (1, devices[1, 1], 1e8),
    ]
    assert [(d.device, d.name, d.limit) for d in two.devices] == [
        (d, str(device), n) for d, device, n in rows
    ]
    head = str(two).splitlines()[1]
    assert head == str(one).splitlines()[1].replace(size(one.peak), size(two.peak))


def test_compiled_programs_say_what_they_need_for_themselves():
    plain, compiled = (
        fpipe.Pipe([dense()] * 3, chunks=4).plan(None, X, compiled=compiled)
        for compiled in (False, True)
    )
    assert not any("temporary" in d.memory for d in plain.devices)
    assert all("temporary" in d.memory for d in compiled.devices)
    assert "for themselves" in str(plain)
    assert "for themselves" not in str(compiled)


def test_measured_work_is_that_of_the_stages(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)

    def sleeping(seconds):
        def wait(x):
            clock.sleep(seconds)
            return np.asarray(x)

        def apply(w, x):
            shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
            return w * x + jax.lax.stop_gradient(
                jax.pure_callback(wait, shape, jax.lax.stop_gradient(x))
            )

        return fpipe.Layer(apply, lambda key, x: jnp.float32(1), name="sleep")

    pipe = fpipe.Pipe([sleeping(0.001), sleeping(0.02)], chunks=2, checkpoint="never")
    plan = pipe.plan(None, X, by="time")
    assert plan.unit == "second"
    assert plan.stages[0].work["F"] == pytest.approx(0.001)
    assert plan.stages[1].work["F"] == pytest.approx(0.02)
    # A program that calls Python runs in the thread that launches it. Of four programs
    # two sleep, and nothing else takes time.
    assert plan.timeline.launch == pytest.approx((0.001 + 0.02) / 4)
    assert pipe.plan(None, X, by="time", launch=0.0).timeline.launches == ()


def test_what_is_drawn_of_a_plan_is_its_timeline():
    plan = fpipe.Pipe([dense()] * 2, chunks=2).plan(None, X)
    with raises(
        TypeError,
        "`draw`: a Schedule or a Timeline can be drawn, not a Prediction: draw its "
        "`timeline`",
    ):
        fpipe.schedules.draw(plan)  # type: ignore[arg-type]
    assert fpipe.schedules.draw(plan.timeline)


def test_a_notebook_shows_tables_the_timeline_and_advice():
    layers = [dense(), dense(), dense(16), dense(4)]
    plan = fpipe.Pipe(layers, [1, 3], chunks=2).plan(None, X)
    assert plan.warnings
    shown = plan._repr_html_()
    page = Page(shown)
    assert {"table", "svg", "li"} < page.tags
    assert svg(plan._readable_timeline()) in shown
    # The text has the same words in the same order; the drawing stands apart.
    words = " ".join(page.text.split())
    for line in str(plan).splitlines():
        if not line.startswith(("device 0 ", "device 1 ", "eager_1f1b, in")):
            for cell in line.removeprefix("- ").split("  "):
                assert " ".join(cell.split()) in words, cell
    assert json.loads(json.dumps(plan.metrics())) == {
        "step_flop": plan.step,
        "bubble": plan.bubble,
        "peak_live": max(plan.timeline.peak_live),
        "peak_bytes": plan.peak,
    }


def test_a_table_in_a_notebook_is_escaped_and_has_a_bound():
    table = Table(["a", "b", "c"], [["<i>", "", "x" * 1000]] * 1000, left=(0,))
    page = Page(table.html())
    assert page.tags == {"table", "tr", "th", "td", "p"}
    assert "and 936 more" in page.text
    assert "<i>" in page.text
    assert "b" not in page.text
    assert len(table.html()) < 40_000


def test_json_has_all_that_is_shown():
    plan = fpipe.Pipe(skips(), [2, 2, 3], chunks=4).plan(None, X, memory=1e9)
    data = json.loads(plan.to_json())
    assert data["stages"][0]["stashed"] == [
        {"name": "skip", "stage": 1, "bytes": 64},
        {"name": "skip", "stage": 2, "bytes": 64},
    ]
    assert [d["peak"] for d in data["devices"]] == [d.peak for d in plan.devices]
    assert data["bubble"] == plan.bubble
    text = str(plan)
    for word in (
        "0-1 dense, stash",
        "skip to 1 (64 B), skip to 2 (64 B)",
        "eager_1f1b",
        "limit",
        "residuals",
        "device 2",
    ):
        assert word in text, word


# --- advice ---


def test_an_uneven_cut_is_told_with_a_better_one():
    layers = [dense()] * 6
    uneven = fpipe.Pipe(layers, [4, 1, 1], chunks=8).plan(None, X)
    assert (
        "stage 0 takes 2.0 times the mean of the stages: balance=[2, 2, 2]"
        in "\n".join(uneven.warnings)
    )
    even = fpipe.Pipe(layers, [2, 2, 2], chunks=8).plan(None, X)
    assert not any("times the mean" in text for text in even.warnings)
    large = fpipe.Pipe([dense(), dense(400), dense()], [1, 1, 1], chunks=8).plan(
        None, X
    )
    assert any("no other balance is better" in text for text in large.warnings)


def test_a_balance_is_better_if_it_recomputes_less():
    """The last stage recomputes nothing: the place for the most expensive layer."""
    wide = fpipe.Layer(
        lambda p, x: jnp.tanh(x @ p) @ p.T,
        lambda key, x: jnp.ones((WIDTH, 400)),
        name="wide",
    )
    layers = [dense(), dense(), wide, dense()]
    told = fpipe.Pipe(layers, [1, 2, 1], chunks=8).plan(None, X).warnings
    assert any("balance=[1, 1, 2] makes the most expensive" in text for text in told), (
        told
    )
    better = fpipe.Pipe(layers, [1, 1, 2], chunks=8).plan(None, X)
    assert any("no other balance is better" in text for text in better.warnings)
    assert (
        better.step < 0.9 * fpipe.Pipe(layers, [1, 2, 1], chunks=8).plan(None, X).step
    )


def test_a_host_that_is_the_bound_is_told():
    """Two devices run eight actions each, of about 1 ms; each launch takes 3 ms. The
    second device runs two actions at a time.
    """
    pipe = fpipe.Pipe([dense()] * 2, chunks=4, checkpoint="never", schedule="1f1b")
    speed = pipe.plan(None, X).stages[0].work["F"] * 1e3
    slow = pipe.plan(None, X, speed=speed, launch=3e-3)
    (text,) = (text for text in slow.warnings if text.startswith("host-bound"))
    # The last backward is still to run; how long it takes, JAX's rules decide.
    assert f"launches for 36 ms of {1e3 * slow.step:.3g} ms" in text
    assert 36e-3 < slow.step < 39e-3
    fast = pipe.plan(None, X, speed=speed)
    assert f"would take {1e3 * fast.step:.3g} ms" in text
    # More microbatches would only be more launches.
    assert not any("are few" in text for text in slow.warnings)
    # What helps on GPUs alone.
    assert "PJRT_GPU_ENABLE_ASYNC_DISPATCH" not in text
    (told,) = warn_of_slow_launches(slow.timeline, lambda: fast.timeline, {"cuda"})
    assert told.startswith(f"{text}; ")
    assert "PJRT_GPU_ENABLE_ASYNC_DISPATCH=1, set before JAX starts" in told
    # Each device has a thread where layers call Python; a program of scan is launched
    # once.
    threads = dataclasses.replace(pipe, dispatch="thread_per_device")
    found = threads.plan(None, X, speed=speed, launch=3e-3)
    assert (slow.timeline.threads, found.timeline.threads) == (1, 2)
    assert found.step < 0.7 * slow.step
    scan = dataclasses.replace(pipe, executor="scan")
    assert scan.plan(None, X, speed=speed, launch=3e-3).timeline.launches == ()


def test_copies_to_the_host_take_their_bytes_and_time():
    pipe = fpipe.Pipe(
        [dense()] * 2, chunks=4, checkpoint="never", schedule="gpipe", offload=1
    )
    plan = pipe.plan(None, X, speed=1e6, host_bandwidth=1e6)
    copies = {e.action.kind: e for e in plan.timeline.events if e.action.stage == 0}
    copied = round(1e6 * (copies["O"].end - copies["O"].start))
    # The tanh of a microbatch of four rows, which its gradient needs.
    assert copied == (ROWS // 4) * WIDTH * 4
    assert copies["L"].end - copies["L"].start == pytest.approx(copied / 1e6)
    assert plan.devices[0].host == len(plan.schedule.order("O", 0)) * copied
    # Without a bandwidth nothing waits for them.
    assert pipe.plan(None, X, speed=1e6).step < plan.step


def test_few_microbatches_are_told_with_how_many_would_do():
    layers = [dense()] * 4
    few = fpipe.Pipe(layers, chunks=2).plan(None, X).warnings
    assert any(
        "2 microbatches are few for 4 stages; chunks=16 makes it" in text
        for text in few
    ), few
    many = fpipe.Pipe(layers[:1], chunks=2).plan(None, X).warnings
    assert not any("microbatches are few" in text for text in many)
    (ragged,) = (
        t for t in fpipe.Pipe(layers, chunks=3).plan(None, X).warnings if "smaller" in t
    )
    assert ragged.startswith("the last microbatch is smaller than the others")


def test_advice_asks_for_no_more_than_a_batch_and_a_schedule_allow():
    def strict(devices, microbatches):
        assert microbatches == 2, "two microbatches, no more"
        return fpipe.schedules.gpipe(devices, microbatches)

    for executor in ("placed", "scan"):
        pipe = fpipe.Pipe(
            [dense()] * 4, [1] * 4, chunks=2, executor=executor, schedule=strict
        )
        assert not any("few for" in text for text in pipe.plan(None, X).warnings)

    def scaled(p, x):
        return x | {"x": x["x"] * p * x["all"].sum()}

    layer = fpipe.Layer(scaled, lambda key, x: jnp.float32(1), name="scaled")
    # What goes whole to every microbatch does not say how many there can be.
    x = {"all": fpipe.NoChunk(jax.ShapeDtypeStruct((3,), jnp.float32)), "x": X}
    warnings = fpipe.Pipe([layer] * 4, chunks=2).plan(None, x).warnings
    assert any("chunks=16 makes it" in text for text in warnings), warnings


def test_devices_that_are_one_are_told():
    layers, (one, two) = [dense()] * 4, jax.devices()[:2]
    for devices, count in (([one] * 4, 1), ([one, two] * 2, 2)):
        told = fpipe.Pipe(layers, [1] * 4, devices, chunks=16).plan(None, X).warnings
        assert any(
            f"has 4 devices, and `devices=` names only {count} different" in text
            for text in told
        ), told
    apart = fpipe.Pipe(layers, [1] * 4, chunks=16).plan(None, X).warnings
    assert not any("different ones" in text for text in apart)


def test_too_little_memory_is_told_with_what_is_missing():
    pipe = fpipe.Pipe([dense()] * 3, chunks=4)
    peak = pipe.plan(None, X).devices[1].peak
    plan = pipe.plan(None, X, memory=[1e9, peak - 8, 1e9])
    (text,) = (t for t in plan.warnings if "short of" in t)
    assert text.startswith(
        "device 1 (cpu:1) is short of 8 B; most of its memory is boundaries: more "
        "chunks"
    )
    assert [d.missing for d in plan.devices] == [0, 8, 0]


def test_numbers_of_numpy_and_no_limit_at_all():
    pipe = fpipe.Pipe([dense()] * 2, chunks=2)
    want = pipe.plan(None, X, speed=3.0)
    given: dict[str, Any] = {
        "speed": np.float32(3),
        "memory": [np.int64(8), float("inf")],
    }
    plan = pipe.plan(None, X, **given)
    assert [row.work for row in plan.stages] == [row.work for row in want.stages]
    assert [row["limit"] for row in json.loads(plan.to_json())["devices"]] == [8, None]


def test_the_mean_square_of_complex_outputs():
    for executor in ("placed", "scan"):
        turn = fpipe.fn(lambda x: jax.lax.complex(x, x))
        assert (
            fpipe.Pipe([dense(), turn], chunks=2, executor=executor).plan(None, X).step
            > 0
        )


def test_what_a_plan_has_traced_the_call_finds():
    traced = []
    layer = dense()

    def apply(params, x):
        traced.append(x.shape)
        return layer.apply(params, x)

    pipe = fpipe.Pipe([dataclasses.replace(layer, apply=apply), dense()], chunks=2)
    params, x = pipe.init(jax.random.key(0), X), jnp.ones((ROWS, WIDTH))
    traced.clear()
    pipe.plan(params, X, X, loss_fn=mse)
    first = len(traced)
    pipe.value_and_grad(mse)(params, x, x)
    assert len(traced) == first


@pytest.mark.parametrize(
    ("executor", "axes"), [("placed", ()), ("scan", ()), ("scan", ("stage", "data"))]
)
def test_a_layer_runs_once_whatever_is_asked(executor, axes):
    """Its Python: for a shape and a mode, one trace serves all."""
    ran = []
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), axes, axis_types=auto) if axes else None

    def counting(name):
        def apply(w, x, *, train=False):
            ran.append((name, x.shape, train))
            return jnp.tanh(x @ w)

        return fpipe.Layer(apply, lambda key, x: jnp.eye(WIDTH), name=name)

    names = ["a", "b", "c"]
    pipe = fpipe.Pipe(
        list(map(counting, names)), [1, 2], chunks=4, executor=executor, mesh=mesh
    )
    x = jnp.ones((ROWS, WIDTH))
    for train in (False, True):
        params = pipe.init(jax.random.key(0), X)
        pipe.plan(params, X, X, loss_fn=mse, train=train)
        pipe.plan(None, X, train=train)
        pipe.compile(params, X, X, loss_fn=mse, train=train)
        for _ in range(2):
            pipe.value_and_grad(mse)(params, x, x, train=train)
        pipe(params, x, train=train)
        assert ran == [
            (name, (ROWS // 4, WIDTH), mode)
            for mode in (False, True)[: 1 + train]
            for name in names
        ]


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_a_plan_inside_jit(executor):
    pipe = fpipe.Pipe([dense()] * 2, chunks=2, executor=executor)
    message = (
        "`pipe.plan(...)` was called inside `jax.jit` (or another tracing "
        "transformation): programs traced there would not "
        "be those of a call; plan outside of it, shapes (`jax.eval_shape`, "
        "`jax.ShapeDtypeStruct`) will do"
    )
    with raises(TypeError, message):
        jax.jit(lambda x: pipe.plan(None, x))(jnp.ones((ROWS, WIDTH)))
    with raises(TypeError, message):
        jax.jit(lambda x: pipe.plan(None, X) and x)(1)


def test_wrong_arguments():
    pipe = fpipe.Pipe([dense()] * 2, chunks=2)
    with raises(ValueError, "`pipe.plan(by='flop')`: one of 'flops', 'time'"):
        pipe.plan(None, X, by="flop")  # type: ignore[arg-type]
    with raises(
        ValueError,
        "`pipe.plan(speed=[1.0])`: a number more than 0, or one for each of 2 devices",
    ):
        pipe.plan(None, X, speed=[1.0])
    with raises(
        ValueError,
        "`pipe.plan(memory=-1)`: a number more than 0, or one for each of 2 devices",
    ):
        pipe.plan(None, X, memory=-1)
    with raises(
        ValueError,
        "`pipe.plan(optimizer=-1)`: bytes of state for each byte of parameters, 0 or "
        "more",
    ):
        pipe.plan(None, X, optimizer=-1)
    text = (
        "seconds cannot be weighed against FLOPs: give `speed=` too, in FLOP/s, or "
        'by="time"'
    )
    with raises(ValueError, f"`pipe.plan(bandwidth=..., launch=...)`: {text}"):
        pipe.plan(None, X, bandwidth=1e9, launch=1e-5)
    with raises(ValueError, f"`pipe.plan(latency=...)`: {text}"):
        pipe.plan(None, X, latency=1e-6)
    with raises(ValueError, "`pipe.plan(launch=-1)`: a number, 0 or more"):
        pipe.plan(None, X, launch=-1)
    with raises(ValueError, "`pipe.plan(bandwidth=0)`: bytes per second, more than 0"):
        pipe.plan(None, X, bandwidth=0)
    with raises(
        TypeError,
        "`pipe.plan(params, x, *targets)`: targets belong to a loss: give `loss_fn=` "
        "too",
    ):
        pipe.plan(None, X, X)
