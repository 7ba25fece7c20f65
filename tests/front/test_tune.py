"""Tuning: the best of all candidates, by the same predictions as `Pipe.plan` makes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import fpipe
from fpipe import _tuning
from fpipe.schedules import one_f_one_b
from tests.executors.cut_layers import COLUMNS, FULLY_SHARDED, ROWS, WIDE
from tests.helpers import add, assert_same, dense, keep, mse, noise, raises
from tests.schedules.test_draw import Page

X = jax.ShapeDtypeStruct((16, 4), jnp.float32)
LAYERS = [dense(), keep(), dense(), dense(12), dense(4), add()]
TWO = {
    "schedules": ["gpipe", "1f1b"],
    "checkpoints": ["never", "always"],
    "chunks": [2, 8],
    "recomputes": "with_backward",
}


def test_the_candidates_are_all_combinations_and_the_best_is_first():
    tuning = fpipe.tune(LAYERS, X, devices=jax.devices()[:3], **TWO)
    assert {(c.schedule, c.checkpoint, c.chunks) for c in tuning.candidates} == {
        (s, k, n)
        for s in TWO["schedules"]
        for k in TWO["checkpoints"]
        for n in TWO["chunks"]
    }
    steps = [c.prediction.step for c in tuning.candidates if c.prediction is not None]
    assert len(steps) == 8
    assert steps == sorted(steps)
    assert tuning.best is tuning.candidates[0]
    assert tuning.pipe is tuning.best.pipe
    for c in tuning.candidates[::3]:
        # Each is what its own pipe's plan says, and its balance that of
        # `fpipe.balance`.
        assert c.pipe is not None
        assert c.prediction is not None
        assert c.pipe.plan(None, X).as_dict() == c.prediction.as_dict()
        cut = fpipe.balance(
            LAYERS,
            X,
            devices=3,
            chunks=c.chunks,
            schedule=c.schedule,
            checkpoint=c.checkpoint,
        )
        assert c.pipe.balance == cut


def test_a_notebook_shows_the_candidates_and_the_reasons():
    for memory in (None, 1.0):
        tuning = fpipe.tune(
            [dense()] * 2, X, schedules=["gpipe", "1f1b"], chunks=[2], memory=memory
        )
        page = Page(tuning._repr_html_())
        words = " ".join(page.text.split())
        assert page.tags == {"table", "tr", "th", "td"} | (
            set() if memory else {"p", "ul", "li"}
        )
        for line in str(tuning).splitlines():
            for cell in line.removeprefix("- ").split("  "):
                assert " ".join(cell.split()) in words, cell


def test_of_those_that_take_as_long_the_one_that_needs_less_memory_is_first():
    tuning = fpipe.tune(
        [dense()] * 4, X, schedules=["gpipe", "1f1b"], checkpoints=["never"], chunks=[8]
    )
    a, b = (c.prediction for c in tuning.candidates)
    assert a is not None
    assert b is not None
    assert a.step == pytest.approx(b.step)
    assert a.peak < b.peak
    assert tuning.best.schedule == "1f1b"


def test_slow_launches_set_a_limit_to_microbatches():
    def chosen(**hardware):
        tuning = fpipe.tune(
            [dense()] * 2,
            X,
            devices=jax.devices()[:2],
            speed=1e6,
            schedules="1f1b",
            checkpoints="never",
            **hardware,
        )
        return tuning.best.chunks

    assert (chosen(), chosen(launch=1e-4)) == (16, 4)


def test_schedules_that_nobody_asked_for_need_layers_enough():
    """Two layers make no two stages on each of two devices."""
    devices = jax.devices()[:2]
    few = fpipe.tune([dense()] * 2, X, devices=devices, chunks=2, checkpoints="never")
    names = {c.schedule for c in few.candidates}
    assert names == {"gpipe", "1f1b", "eager_1f1b", "zb_h1"}
    assert not any(c.refused for c in few.candidates)
    (asked,) = fpipe.tune(
        [dense()] * 2,
        X,
        devices=devices,
        chunks=2,
        schedules="interleaved_1f1b",
        checkpoints="never",
    ).candidates
    assert "at least 2 stages on each device" in asked.refused
    # If none goes, each says why.
    one = fpipe.tune([dense()], X, devices=devices, chunks=2, checkpoints="never")
    refused = {c.schedule: c.refused for c in one.candidates}
    assert refused.pop("zb_v").endswith("but the model has 1 layer")
    assert refused.pop("interleaved_1f1b").endswith("but the model has 1 layer")
    assert refused == dict.fromkeys(names, "")


def test_copies_to_the_host_are_as_few_as_keep_the_limit():
    """Against the plans of all limits; the balance is fixed."""

    def make(schedule, checkpoint, chunks, offload=None):
        return fpipe.Pipe(
            [dense()] * 4,
            [2, 2],
            devices=jax.devices()[:2],
            chunks=chunks,
            checkpoint=checkpoint,
            schedule=schedule,
            offload=offload,
        )

    peaks = {k: make("gpipe", "never", 4, k).plan(None, X).peak for k in range(1, 5)}
    assert len(set(peaks.values())) > 2
    for k in (1, 2):
        limit = peaks[k]
        (plain, copied) = sorted(
            fpipe.tune(
                make, X, memory=limit, schedules="gpipe", checkpoints="never", chunks=4
            ).candidates,
            key=lambda c: c.offload is not None,
        )
        assert "short by" in plain.refused
        assert copied.refused == ""
        assert copied.offload == max(n for n in peaks if peaks[n] <= limit)
    # Where not even all copies would do the candidate says so, and none of those that
    # fit anyway is tried with copies.
    for limit, reason in (
        (peaks[1] // 2, "; no copies to the host make it fit"),
        (peaks[1] - 1, "; no copies to the host make it fit"),
        (peaks[4], ""),
    ):
        (only,) = fpipe.tune(
            make, X, memory=limit, schedules="gpipe", checkpoints="never", chunks=4
        ).candidates
        assert only.offload is None
        assert only.refused.partition(" on device 0")[2] == reason


def test_recomputation_is_tried_early_where_there_is_any():
    tuning = fpipe.tune(
        [dense()] * 2, X, schedules="1f1b", checkpoints=["never", "always"], chunks=4
    )
    steps = {
        (c.checkpoint, c.recompute): c.prediction.step
        for c in tuning.candidates
        if c.prediction is not None
    }
    assert set(steps) == {
        ("never", "auto"),
        ("always", "with_backward"),
        ("always", "early"),
    }
    assert steps["always", "early"] < steps["always", "with_backward"]
    assert "early" in str(tuning)
    (asked,) = fpipe.tune(
        [dense()] * 2,
        X,
        schedules="1f1b",
        checkpoints="always",
        chunks=4,
        recomputes="early",
        offloads=[1],
    ).candidates
    assert asked.pipe is not None
    assert (asked.pipe.recompute, asked.pipe.offload) == ("early", 1)


def test_nothing_that_was_asked_for_is_left_out_without_a_word():
    options = {"devices": jax.devices()[:2], "checkpoints": "always", "chunks": 3}
    tuning = fpipe.tune(
        [dense()] * 4,
        X,
        schedules=["1f1b", "zb_h1", in_pairs],
        recomputes=["early", "with_backward"],
        offloads=[None, 1],
        **options,
    )
    refused = {
        (c.schedule, c.recompute, c.offload): c.refused for c in tuning.candidates
    }
    assert len(refused) == 3 * 2 * 2
    for (schedule, _, limit), reason in refused.items():
        if schedule == "zb_h1" and limit == 1:
            assert reason.startswith("`offload(memory=1)`: device 1 holds at least 2")
        else:
            assert reason == (
                "" if schedule in ("1f1b", "zb_h1") else "3 microbatches are no pairs"
            )
        assert reason in str(tuning)
    none = "6 candidates have no prediction, the table has the reasons"
    assert tuning.why.endswith(f"\n- {none}")
    # Also where nobody asked for several: each combination has a row.
    default = fpipe.tune([dense()] * 4, X, schedules=in_pairs, **options)
    assert [c.recompute for c in default.candidates] == ["with_backward", "early"]
    with raises(
        ValueError,
        "`fpipe.tune(...)`: no candidate fits; why not, the nearest first:"
        + "".join(f"\n- {c.options}: {c.refused}" for c in default.candidates),
    ):
        default.best  # noqa: B018


def test_a_memory_limit_rules_out_and_says_how_much_is_missing(monkeypatch):
    free = fpipe.tune(LAYERS, X, devices=jax.devices()[:3], **TWO)
    peaks = sorted(
        c.prediction.peak for c in free.candidates if c.prediction is not None
    )
    limit = peaks[3]
    tuning = fpipe.tune(
        LAYERS, X, devices=jax.devices()[:3], memory=limit, offloads=[None], **TWO
    )
    fitting = [c for c in tuning.candidates if not c.refused]
    assert fitting
    assert all(c.prediction is not None and c.prediction.peak <= limit for c in fitting)
    refused = [c for c in tuning.candidates if c.refused]
    assert refused == list(tuning.candidates[len(fitting) :])
    assert all("short by" in c.refused for c in refused)
    none = fpipe.tune(
        LAYERS, X, devices=jax.devices()[:3], memory=100, offloads=[None], **TWO
    )
    with pytest.raises(
        ValueError,
        match=r"`fpipe.tune\(\.\.\.\)`: no candidate fits; why not, the nearest first:",
    ) as error:
        none.pipe  # noqa: B018
    (_, *lines), reasons = str(error.value).splitlines(), str(none)
    assert [line.startswith("- ") for line in lines] == [True] * len(none.candidates)
    assert all(line.partition(": ")[2] in reasons for line in lines)
    # Of many only the nearest are told.
    monkeypatch.setattr(_tuning, "_SHOWN", 3)
    with pytest.raises(ValueError, match=r"\n- 5 more, which `print\(tuning\)` shows$"):
        none.best  # noqa: B018


def test_it_says_why():
    tuning = fpipe.tune(LAYERS, X, devices=jax.devices()[:3], **TWO)
    text = str(tuning)
    assert text.startswith("schedule  chunks  checkpoint  recompute      balance")
    assert len(text.splitlines()) == (1 + 8) + 1 + len(tuning.why.splitlines())
    best, why = tuning.best, tuning.why
    assert why.startswith(
        f"{best.schedule}, chunks={best.chunks}, checkpoint={best.checkpoint!r}: step "
    )
    reasons = why.splitlines()[1:]
    for what, reason in zip(
        ("schedule", "number of microbatches", "checkpoint mode"), reasons, strict=True
    ):
        assert what in reason


def test_a_function_that_makes_the_pipe_is_asked_for_what_it_names():
    def f(schedule, chunks):
        return fpipe.Pipe(
            LAYERS, [2, 2, 2], chunks=chunks, schedule=schedule, checkpoint="never"
        )

    tuning = fpipe.tune(f, X, X, loss_fn=mse, **TWO)
    assert tuning.pipe.balance == (2, 2, 2)
    assert tuning.best.prediction is not None
    assert (
        tuning.best.prediction.as_dict()
        == tuning.pipe.plan(None, X, X, loss_fn=mse).as_dict()
    )


def in_pairs(devices, microbatches):
    """A schedule that takes microbatches two by two."""
    if microbatches % 2:
        raise ValueError(f"{microbatches} microbatches are no pairs")
    return one_f_one_b(devices, microbatches)


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_what_a_schedule_does_not_allow_is_a_reason_and_no_error(executor):
    tuning = fpipe.tune(
        LAYERS,
        X,
        devices=jax.devices()[:2],
        schedules=[in_pairs, "1f1b"],
        checkpoints="always",
        chunks=[2, 3],
        executor=executor,
    )
    # The batch of 16 rows does not divide by 3, and no executor minds.
    refused = {(c.schedule, c.chunks): c.refused for c in tuning.candidates}
    (name,) = {schedule for schedule, _ in refused} - {"1f1b"}
    assert refused.pop((name, 3)) == "3 microbatches are no pairs"
    assert refused == {("1f1b", 2): "", ("1f1b", 3): "", (name, 2): ""}
    assert tuning.pipe.executor == executor


def test_the_default_numbers_of_microbatches_divide_the_batch():
    tuning = fpipe.tune(
        [dense()] * 2,
        X,
        devices=jax.devices()[:2],
        schedules=["1f1b"],
        checkpoints=["always"],
    )
    assert {c.chunks for c in tuning.candidates} == {2, 4, 8, 16}


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_all_candidates_share_the_traces_of_the_layers(executor):
    ran = []

    def counting(name):
        def apply(w, x):
            ran.append((name, x.shape))
            return jnp.tanh(x @ w)

        return fpipe.Layer(apply, lambda key, x: jnp.eye(4), name=name)

    layers = list(map(counting, "abc"))
    tuning = fpipe.tune(layers, X, devices=jax.devices()[:2], executor=executor, **TWO)
    assert len([c for c in tuning.candidates if c.prediction is not None]) == 8
    assert sorted(ran) == [(name, (rows, 4)) for name in "abc" for rows in (2, 8)]


def test_wrong_arguments():
    with raises(
        ValueError,
        "`fpipe.tune(...)`: nothing to try: schedules, checkpoints, chunks, recomputes "
        "and offloads need an entry each",
    ):
        fpipe.tune(LAYERS, X, schedules=[])
    with raises(ValueError, "`fpipe.tune(by='flop')`: one of 'flops', 'time'"):
        fpipe.tune(LAYERS, X, by="flop")  # type: ignore[arg-type]
    given = "`fpipe.tune(layers, x)`: layers, or a function that makes a Pipe, got"
    with raises(
        TypeError,
        f"{given} 3",
    ):
        fpipe.tune(3, X)  # type: ignore[arg-type]
    with raises(
        TypeError,
        f"{given} a Pipe: give its `layers`",
    ):
        fpipe.tune(fpipe.Pipe(LAYERS), X)  # type: ignore[arg-type]
    with raises(
        TypeError,
        "`fpipe.tune(f, x)`: the function makes the pipe, so set ['executor'] in the "
        "function",
    ):
        fpipe.tune(lambda: None, X, executor="scan")  # type: ignore[arg-type,return-value]
    with raises(
        TypeError, "`fpipe.tune(f, x)`: the function returned None, no fpipe.Pipe"
    ):
        fpipe.tune(lambda: None, X)  # type: ignore[arg-type,return-value]


def test_devices_are_those_of_a_mesh():
    mesh = jax.make_mesh(
        (2,),
        ("stage",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:2],
    )
    tuning = fpipe.tune(LAYERS, X, executor="scan", mesh=mesh, memory=1e9, **TWO)
    assert tuning.pipe.mesh == mesh
    assert not any(c.refused for c in tuning.candidates)


MESHES = {
    # Rows and parameters over an axis of data; parameters over another one.
    "data": FULLY_SHARDED,
    "model": dataclasses.replace(
        FULLY_SHARDED, spec={"up": COLUMNS, "down": ROWS, "bias": P("model")}
    ),
}


def held(tree, device):
    """The bytes that a device has of arrays."""
    return sum(
        shard.data.nbytes
        for a in jax.tree.leaves(tree)
        for shard in a.addressable_shards
        if shard.device == device
    )


@functools.cache
def step_of_perceptrons():
    """What all pipes over these meshes compute."""
    plain = fpipe.sequential([FULLY_SHARDED] * 2, chunks=2)
    x = noise(jax.random.key(1), (8, WIDE))
    params = plain.init(jax.random.key(0), x)
    return plain.value_and_grad(mse)(params, x, x)


@pytest.mark.parametrize("executor", ["placed", "scan"])
@pytest.mark.parametrize("axis", MESHES)
def test_candidates_over_meshes_run_and_need_what_was_predicted(axis, executor):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("stage", axis))
    layers = [MESHES[axis]] * 2
    x = noise(jax.random.key(1), (8, WIDE))
    tuning = fpipe.tune(
        layers,
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        mesh=mesh,
        executor=executor,
        unshard="action",
        chunks=2,
        schedules=["1f1b"],
        checkpoints=["never", "always"],
        recomputes="with_backward",
    )
    assert [c.refused for c in tuning.candidates] == ["", ""]
    for candidate in tuning.candidates:
        pipe, predicted = candidate.pipe, candidate.prediction
        assert pipe is not None
        assert predicted is not None
        assert pipe.plan(None, x).as_dict() == predicted.as_dict()
        params = pipe.init(jax.random.key(0), x)
        step = pipe.value_and_grad(mse)
        # What XLA says of the best program as a whole.
        if executor == "scan" and candidate is tuning.best:
            step = jax.jit(step).lower(params, x, x).compile()
            sizes = step.memory_analysis()
            assert sizes is not None
            total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
            total += sizes.temp_size_in_bytes - sizes.alias_size_in_bytes
            compiled = pipe.plan(None, x, x, loss_fn=mse, compiled=True, optimizer=0)
            assert [row.peak for row in compiled.devices] == [total] * 4
        loss, grads = step(params, x, x)
        assert_same((loss, pipe.gather(grads)), step_of_perceptrons())
        # Under scan there is a row for each device of a stage.
        assert {row.device for row in predicted.devices} == {0, 1}
        for row in predicted.devices:
            for device in mesh.devices[row.device]:
                assert row.memory["parameters"] == held(params, device)
                assert row.memory["gradients"] == held(grads, device)


def test_parameters_may_be_packed():
    params = fpipe.Pipe(LAYERS, devices=jax.devices()[:3], executor="scan").init(
        jax.random.key(0), X
    )
    given = {
        "devices": jax.devices()[:3],
        "schedules": "1f1b",
        "checkpoints": "always",
        "recomputes": "with_backward",
        "chunks": 4,
    }
    (got,), (want,) = (
        fpipe.tune(LAYERS, X, params=p, **given).candidates for p in (params, None)
    )
    assert got.prediction == want.prediction
    assert got.prediction is not None
    assert (got.schedule, got.checkpoint, got.chunks) == (
        "1f1b",
        "always",
        4,
    )  # one of each is enough


def test_what_goes_whole_to_every_microbatch_does_not_say_how_many_to_try():
    def scaled(p, x):
        return x | {"x": x["x"] * p * x["all"].sum()}

    layer = fpipe.Layer(scaled, lambda key, x: jnp.float32(1), name="scaled")
    x = {"all": fpipe.NoChunk(jax.ShapeDtypeStruct((3,), jnp.float32)), "x": X}
    tuning = fpipe.tune(
        [layer] * 2,
        x,
        devices=jax.devices()[:2],
        schedules="1f1b",
        checkpoints="always",
    )
    assert {c.chunks for c in tuning.candidates} == {2, 4, 8, 16}
