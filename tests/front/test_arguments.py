"""Every public function with wrong arguments: a `TypeError` or `ValueError` of this
package, which names the argument, and shows no foreign object and no array.

`CASES` has for each function how it is called rightly, and for each argument wrong
values: strings for bools, bools and floats for ints, what is negative or not a number,
wrong containers.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import fpipe
import fpipe.flax
import fpipe.optim
import fpipe.plot
import fpipe.testing
from fpipe import schedules

# What a type checker would refuse is tested here.
untyped: Any = lambda value: value  # noqa: E731
nan, inf = float("nan"), float("inf")


class Foreign:
    """An object whose text no message may show."""

    def __repr__(self):
        return "SECRET"


F = Foreign()
BOOL = ["no", 2, 0.5, [True], F, np.ones(2)]
INT = ["2", 2.5, True, -1, nan, [1], F, np.ones(2)]
NUMBER = ["1", True, -1.0, nan, [F], F]
SIZE = ["2", 2.5, True, -1, 0, F]

X, W = jnp.ones((4, 3)), jnp.eye(3)
KEY = jax.random.key(0)
dense = fpipe.Layer(lambda w, x: x @ w, lambda key, x: jnp.eye(3), "dense")
LAYERS = [dense, dense]
POLICIES = jax.checkpoint_policies
SKIPS = fpipe.skippable(stash=["a"])(lambda params, x, *, carry: (x, carry))
GPIPE = schedules.gpipe(2, 2)
TIMELINE = schedules.simulate(GPIPE)
MODULE = nn.Dense(3)


def total(y, *targets):
    return y.sum()


@functools.cache
def made(kind):
    """A pipe, or the reference, and its parameters."""
    make = {
        "placed": lambda: fpipe.Pipe(LAYERS, devices=jax.devices()[:2], chunks=2),
        "scan": lambda: fpipe.Pipe(
            LAYERS, devices=jax.devices()[:2], chunks=2, executor="scan"
        ),
        "sequential": lambda: fpipe.sequential(LAYERS, chunks=2),
    }
    pipe = make[kind]()
    return pipe, pipe.place((W, W))


@functools.cache
def optimizer():
    """A transformation, and its state."""
    tx = fpipe.optim.per_stage(optax.sgd(0.1))
    return tx, tx.init(made("placed")[1])


class Case(NamedTuple):
    """A function, how it is called rightly, and what is wrong with each argument."""

    call: Callable[..., Any]
    right: Callable[[], dict[str, Any]]
    wrong: dict[str, list[Any]]


def case(call: Any, right: Any = dict, **wrong: list[Any]) -> Case:
    rightly: Any = right if callable(right) else lambda: right
    return Case(call, rightly, wrong)


COSTS = {
    "names": ("a",),
    "unit": "FLOP",
    **dict.fromkeys(("forward", "backward"), (1.0,)),
    **dict.fromkeys(
        ("params", "gradients", "residuals", "shared", "saved", "boundaries"), (1,)
    ),
}

CASES = {
    "Pipe": case(
        lambda **k: fpipe.Pipe(**k),
        lambda: {"layers": LAYERS, "devices": jax.devices()[:2], "chunks": 2},
        layers=[1, F, {"a": dense}, "ab", [F], [None], np.ones(3)],
        balance=["x", 1, [1.0, 1], [True, 1], [-1, 3], F, [F], {1: 1}],
        devices=["cpu", 3, [1], ["cpu:0"], F, [F]],
        chunks=INT,
        checkpoint=[
            *("x", 1, F, None, True),
            POLICIES.save_only_these_names,
            POLICIES.save_and_offload_only_these_names,
            POLICIES.save_from_both_policies,
            lambda: 1,
        ],
        schedule=["x", 1, F, None, schedules.gpipe(3, 2), ["gpipe"]],
        executor=["x", 1, F, None, ["scan"], np.ones(2)],
        dispatch=["x", 1, F, True, ["auto"]],
        mesh=["x", 1, F],
        compute_dtype=["x", 1, F, jnp.int32, int],
        deferred_batch_norm=BOOL,
        detect_anomaly=BOOL,
    ),
    "Pipe with scan": case(
        lambda **k: fpipe.Pipe(LAYERS, executor="scan", **k),
        mesh=["x", 1, F],
        devices=["cpu", F],
    ),
    "sequential": case(
        fpipe.sequential,
        {"layers": LAYERS},
        layers=[1, F, []],
        chunks=INT,
        compute_dtype=["x", 1, F],
        deferred_batch_norm=BOOL,
        detect_anomaly=BOOL,
    ),
    "Layer": case(
        fpipe.Layer,
        {"apply": lambda params, x: x},
        apply=[1, F, None, "f"],
        init=[1, F, "f"],
        name=[1, F, ["a"]],
        stash=["a", 1, [1], F, ["a", "a"]],
        pop=["a", [1], F],
        peek=["a", [1], F],
        needs=["key", [1], F, ["foo"], 1],
        borrow=["a", [1], F],
        init_state=[1, F],
        finish=[1, F],
        defer=[1, F],
        namespaces=[1, F, "a", [("a", 1)]],
    ),
    "fn": case(
        fpipe.fn,
        {"f": jnp.sin},
        f=[1, F, None],
        name=[1, F],
        needs=["key", [1], F, ["foo"]],
    ),
    "skippable": case(
        fpipe.skippable, stash=["a", 1, [1], F], pop=["a", [F]], peek=["a", F]
    ),
    "isolate": case(
        SKIPS.isolate,
        {"namespace": fpipe.Namespace()},
        namespace=[1, F, None, fpipe.Namespace],
        only=["a", [1], F, ["b"]],
    ),
    "stash": case(
        fpipe.stash,
        {"carry": {}, "name": "a", "value": 1},
        carry=[1, F, None],
        name=[1, F],
    ),
    "pop": case(
        fpipe.pop, {"carry": {"a": 1}, "name": "a"}, carry=[1, F, None], name=[1, F]
    ),
    "peek": case(
        fpipe.peek, {"carry": {"a": 1}, "name": "a"}, carry=[1, F, None], name=[1, F]
    ),
    "record": case(
        lambda pipe: fpipe.record(pipe).__enter__(), pipe=[1, F, None, GPIPE]
    ),
    "balance": case(
        fpipe.balance,
        {"layers": LAYERS, "x": X, "stages": 2},
        layers=[F, 1, [F], "ab", []],
        x=[F, "a", 1],
        by=["x", 1, F],
        chunks=INT,
        checkpoint=["x", 1, F],
        schedule=["x", 1, F],
        params=[1, F, (W,)],
        compute_dtype=["x", F],
        side=[F],
    ),
    "balance of costs": case(
        fpipe.balance,
        {"layers": [1.0, 2.0], "stages": 2},
        layers=[[1.0, -1.0], [nan, 1.0], [1.0, dense], [1.0, F]],
        stages=[*INT, 0, 5],
        devices=["x", 1.5, F, -1, True],
        speeds=[*NUMBER, 0],
        bandwidth=[*NUMBER, 0],
        memory=[*NUMBER, 0],
        optimizer=NUMBER,
    ),
    "layer_costs": case(
        fpipe.layer_costs,
        {"layers": LAYERS, "x": X},
        layers=[F, [], 1],
        x=[F, None],
        by=["x", 1, F],
        chunks=INT,
        params=[1, F, (W,)],
        checkpoint=["x", F, 1],
        compute_dtype=["x"],
        train=["no", F],
        device=["cpu", 1, F],
        repeats=[*INT, 0],
        side=[F],
    ),
    "LayerCosts": case(
        fpipe.LayerCosts,
        COSTS,
        names=[1, F, (1,), "a"],
        forward=[1, F, ("a",), (nan,), (-1,)],
        unit=[1, F],
        inputs=["a", -1, nan, F],
        microbatches=["a", 0, F, True, 1.5],
        skips=[1, F, (1,)],
        shared=[("a",)],
        params=[("a",), (nan,)],
    ),
    "tune": case(
        fpipe.tune,
        lambda: {
            "layers": LAYERS,
            "x": X,
            "devices": jax.devices()[:2],
            "chunks": [2],
            "schedules": ["gpipe"],
            "checkpoints": ["never"],
        },
        layers=[F, 1, "ab", [F]],
        x=[F, None],
        loss_fn=[1, F],
        memory=[*NUMBER, 0],
        devices=["x", 1, F, [F], []],
        chunks=["2", 2.5, True, -1, F, ["a"], []],
        schedules=[1, F, ["x"], "x", []],
        checkpoints=[1, F, ["x"], "x", []],
        recomputes=[1, F, ["x"], "x", []],
        offloads=["x", 1.5, F, ["x"], []],
        by=["x", F],
        speed=[*NUMBER, 0],
        latency=NUMBER,
        bandwidth=NUMBER,
        launch=NUMBER,
        host_bandwidth=NUMBER,
        argnums=[F, "0"],
        frozen=[1, F],
        optimizer=NUMBER,
        compiled=BOOL,
        has_aux=["no"],
        reduction=["x"],
        key=[0],
        train=["no"],
        step=["1"],
        foo=[1],
        executor=["x", F],
        detect_anomaly=["x"],
    ),
    "DeferredBatchNorm": case(
        fpipe.DeferredBatchNorm,
        axis=["x", 1.5, F, True, (True,)],
        momentum=["x", True, nan, -1, 2, F],
        epsilon=["x", True, nan, -1, F, inf],
        use_bias=BOOL,
        use_scale=BOOL,
        unbiased=BOOL,
        dtype=["x", 1, F],
        param_dtype=["x", 1, F],
        scale_init=[1, F],
        bias_init=[1, F],
        name=[1, F],
    ),
    "flax.layer": case(
        fpipe.flax.layer,
        {"module": MODULE},
        module=[1, F, None, jnp.sin, "a", nn.Dense],
        x=["a", F, 1],
        name=[1, F],
        rngs=["dropout", 1, [1], F],
        state=["batch_stats", 1, [1], F],
        train=[1, F, "foo", 0.5],
        method=[1, F, "foo"],
        borrow=["a", 1, F, {1: "a"}, {"a": 1}, ["a"]],
    ),
    "flax.layers": case(
        fpipe.flax.layers,
        {"model": [MODULE]},
        model=[1, F, None, MODULE, [1], [F], "ab"],
        x=["a", F],
        train=[1, F, 0.5],
    ),
    "flax.tied": case(
        fpipe.flax.tied,
        {"module": MODULE, "owner": "a"},
        module=[1, F],
        owner=[1, F, ""],
        method=[1, F, "foo"],
        name=[1, F],
        train=[1, F],
    ),
    "flax.stream_key": case(
        fpipe.flax.stream_key,
        {"key": KEY, "stream": "a"},
        key=[1, F, None, "a"],
        stream=[1, F],
    ),
    "flax.split_variables": case(
        fpipe.flax.split_variables,
        {
            "model": [MODULE],
            "variables": {"params": {"layers_0": {"kernel": W, "bias": W[0]}}},
        },
        model=[1, F],
        variables=[1, F],
        deferred_batch_norm=BOOL,
        state=BOOL,
    ),
    "flax.merge_variables": case(
        fpipe.flax.merge_variables,
        {"model": [MODULE], "params": ({"kernel": W, "bias": W[0]},)},
        model=[1, F],
        params=[1, F, (1, 2)],
        state=[1, F, (1, 2)],
    ),
    "optim.per_stage": case(
        fpipe.optim.per_stage,
        {"tx": optax.sgd(0.1)},
        tx=[1, F, optax.sgd, optax],
        frozen=["x", 1, F],
        donate=["params", ["x"], 1, F, ["params"]],
    ),
    "optim.apply_updates": case(
        fpipe.optim.apply_updates,
        lambda: {"params": made("placed")[1], "updates": made("placed")[1]},
        updates=[1, (W,)],
        donate=[["x"], 1, F],
    ),
    "optim.DynamicLossScale": case(
        fpipe.optim.DynamicLossScale,
        period=[*INT, 0],
        factor=["2", True, 0, 1, 0.5, nan, inf, F],
    ),
    "Costs": case(
        schedules.Costs,
        F=[*NUMBER, "a"],
        B=NUMBER,
        I=NUMBER,
        W=NUMBER,
        transfer=NUMBER,
        memory=NUMBER,
        memory_w=NUMBER,
    ),
    "named": case(
        schedules.named,
        {"name": "gpipe", "devices": 2, "microbatches": 2},
        name=[1, F, "x", None],
        devices=SIZE,
        virtual=["2", 2.5, True, 0, F],
    ),
    "zero_bubble": case(
        schedules.zero_bubble,
        {"devices": 2, "microbatches": 2},
        devices=["2", 0],
        costs=[1, F, "a"],
        memory=["a", -1, nan, F, [1]],
        placement=["x", 1, F, [5, 6], [0.5]],
        virtual=["2", 0, 2.5, True],
    ),
    "Schedule": case(
        schedules.Schedule,
        {"actions": [[("F", 0, 0)]]},
        actions=[1, F, "a", [1], [[1]], [[("X", 0, 0)]], [[("F", "0", 0)]], [[F]]],
        stage_to_device=[1, F, ["a"], [0.5], [True], [3], [F]],
        name=[1, F, None],
    ),
    "Schedule.order": case(
        GPIPE.order,
        {"kind": "F", "stage": 0},
        kind=["X", 1, F],
        stage=["a", 9, -1, 1.5, F],
    ),
    "simulate": case(
        schedules.simulate,
        {"schedule": GPIPE},
        schedule=[1, F, "gpipe", None],
        costs=[1, F, "a", {}],
    ),
    "draw": case(
        schedules.draw,
        {"what": GPIPE},
        what=[1, F, None, "gpipe"],
        width=["a", 1.5, True, -1, 0, F],
        colour=["x", 2, F],
        over=[1, F],
        fit=BOOL,
    ),
    "svg": case(
        schedules.svg,
        {"what": GPIPE},
        what=[1, F],
        width=["a", True, -1, F, nan],
        over=[1, F],
    ),
    "from_csv": case(
        schedules.from_csv,
        {"text": GPIPE.to_csv()},
        text=[1, F, None, b"a"],
        stage_to_device=[1, F, ["a"]],
        name=[1, F],
    ),
    "Timeline": case(
        schedules.Timeline,
        {"events": TIMELINE.events, "devices": 2},
        events=[1, F],
        devices=["a", 0, -1, 1.5, F, True],
        name=[1, F],
    ),
    "to_trace": case(TIMELINE.to_trace, unit=["a", 0, -1, nan, True, F]),
    "plot.save": case(
        fpipe.plot.save,
        {"what": GPIPE, "path": "never-written.svg"},
        what=[1, F],
        path=["a.foo"],
        over=[1, F],
    ),
    "testing.assert_equals_sequential": case(
        fpipe.testing.assert_equals_sequential,
        lambda: {"pipe": made("placed")[0], "x": X},
        pipe=[1, F, GPIPE],
        x=[F, None],
        loss_fn=[1, F],
        params=[1, F, (W,)],
        key=[0],
        train=["no"],
        has_aux=["no"],
        reduction=["x"],
        argnums=["0"],
        tolerance=["a", -1, nan, True, F],
    ),
    "testing.models": case(
        fpipe.testing.models,
        width=["a", 0, -1, 1.5, True, F],
        most=["a", 0, 1, 1.5, True, F],
    ),
    "testing.schedules": case(
        fpipe.testing.schedules,
        {"stage_to_device": [0, 1], "microbatches": 2},
        stage_to_device=[1, F, "a", [0.5]],
        microbatches=["a", 0, -1, 1.5, True, F],
        split=BOOL,
        in_order=BOOL,
    ),
    "testing.partitions": case(
        fpipe.testing.partitions,
        {"layers": LAYERS, "x": X},
        layers=[[], [F]],
        x=[F, None],
        executor=["x", 1, F],
        devices=["x", 1, F],
    ),
}
for name in ("gpipe", "one_f_one_b", "eager_1f1b", "zb_h1", "zb_h2", "dualpipe_v"):
    CASES[name] = case(
        getattr(schedules, name),
        {"devices": 2, "microbatches": 2},
        devices=SIZE,
        microbatches=SIZE,
    )
for name in ("interleaved_1f1b", "looped_bfs", "zb_h1", "forward_only"):
    CASES[f"virtual {name}"] = case(
        getattr(schedules, name), {"devices": 2, "microbatches": 2}, virtual=SIZE
    )


def calls(kind):
    """The cases of a pipe's methods."""

    def of(method, right, **wrong):
        def call(**k):
            pipe, params = made(kind)
            given = {"params": params, **right, **k} if right else k
            return getattr(pipe, method)(**given)

        return case(call, **wrong)

    def step(**k):
        pipe, params = made(kind)
        f = pipe.value_and_grad(total, frozen=k.pop("frozen", None))
        return f(params, X, **k)

    yield (
        "init",
        Case(
            lambda **k: made(kind)[0].init(**k),
            lambda: {"key": KEY, "x": X},
            {"key": [0, F, None, "a", X], "x": [F, 1, None, "a"], "side": [F]},
        ),
    )
    yield (
        "init_state",
        Case(
            lambda **k: made(kind)[0].init_state(**k),
            lambda: {"x": X},
            {"x": [F, 1, None], "params": [1, F, (W,), "ab"], "key": [0, F, "a"]},
        ),
    )
    yield "place", of("place", {}, params=[1, F, (W,), "ab", W, None, (W, F)])
    yield (
        "place with donate",
        case(lambda **k: made(kind)[0].place((W, W), **k), donate=BOOL),
    )
    yield "gather", of("gather", {}, params=[1, F, (W,), "a", None])
    yield (
        "call",
        of(
            "__call__",
            {"x": X},
            params=[1, F, (W,), None, (F, F)],
            x=[F, 1, None, "a"],
            side=[F, X],
            key=[0, F, "a", X],
            state=[1, F, (1,), "ab", (1, 2)],
            train=["no", F, 2, 0.5, np.ones(2)],
            step=["1", 1.5, True, F, X],
        ),
    )
    yield (
        "value_and_grad",
        case(
            lambda **k: made(kind)[0].value_and_grad(**{"loss_fn": total, **k}),
            loss_fn=[1, F, None, X],
            has_aux=["no", 2, F, X],
            reduction=["x", 1, F, None, ["mean"]],
            argnums=["0", 1.5, True, -1, F, [], [0, 0], X, None],
            frozen=["x", 1, F],
        ),
    )
    yield (
        "step",
        case(
            step,
            loss_scale=["1", True, 0, 0.0, -1.0, nan, inf, F, X, np.float32(0)],
            grads=[1, F, "a", (W,)],
            train=["no", F],
            step=["1", F],
            key=[0, F],
            frozen=[
                (True,),
                ("yes", True),
                *(lambda p, a, v=v: v for v in ("yes", 1, F)),
            ],
        ),
    )
    yield (
        "evaluate",
        case(
            lambda **k: made(kind)[0].evaluate(**{"loss_fn": total, **k}),
            loss_fn=[1, F, None],
            has_aux=["no", F],
            reduction=["x", F],
        ),
    )
    if kind == "sequential":
        return
    options = {"x": X, "loss_fn": total}
    both = {
        "loss_fn": [1, F],
        "has_aux": ["no", F],
        "reduction": ["x"],
        "argnums": ["0", -1, 9],
        "frozen": ["x", 1],
        "train": ["no"],
        "x": [F, None],
    }
    yield (
        "compile",
        of(
            "compile",
            options,
            threads=[0, -1, "2", 1.5, True, F],
            progress=["x", 1, F],
            loss_scale=["1", 0, nan],
            params=[1, F, None],
            **both,
        ),
    )
    yield (
        "plan",
        of(
            "plan",
            options,
            params=[1, F, (W,)],
            by=["x", 1, F],
            speed=[*NUMBER, 0],
            latency=NUMBER,
            bandwidth=[*NUMBER, 0],
            launch=NUMBER,
            host_bandwidth=[*NUMBER, 0],
            optimizer=NUMBER,
            memory=[*NUMBER, 0],
            compiled=BOOL,
            **both,
        ),
    )
    yield (
        "make_schedule",
        case(lambda **k: made(kind)[0].make_schedule(**k), microbatches=[*INT, 0]),
    )
    yield "record", case(lambda **k: made(kind)[0].record(**k), f=[1, F, None])


for kind in ("placed", "scan", "sequential"):
    CASES |= {f"{kind} {name}": one for name, one in calls(kind)}


def attempts(one: Case) -> Iterator[tuple[str, Any, Callable[[], Any]]]:
    for argument, values in one.wrong.items():
        for value in values:
            given = one.right() | {argument: value}
            yield argument, value, functools.partial(one.call, **given)


def what_is_wrong(attempt: Callable[[], Any]) -> str:
    """What is wrong with how a wrong call is refused."""
    try:
        attempt()
    except (TypeError, ValueError) as error:
        text = " ".join([str(error), *getattr(error, "__notes__", ())])
        if "SECRET" in text:
            return f"it shows an object: {text}"
        if len(str(error)) > 900:
            return f"it is long: {text}"
        own = "`" in text or "layer" in text or "schedule" in text
        return "" if own else f"a foreign message: {text}"
    except Exception as error:
        return repr(error)
    return "it is accepted"


@pytest.mark.parametrize("name", CASES)
def test_wrong_arguments_are_refused_in_words_of_this_package(name):
    faults = []
    for argument, value, attempt in attempts(CASES[name]):
        fault = what_is_wrong(attempt)
        if fault:
            given = f"{name}({argument}={type(value).__name__} {str(value)[:30]})"
            faults.append(f"{given}: {fault}")
    assert faults == []


def test_numbers_of_numpy_and_switches_that_are_numbers_are_taken():
    options = untyped({"chunks": np.int32(2), "detect_anomaly": 0})
    pipe = fpipe.Pipe(LAYERS, untyped([np.int64(1), 1]), **options)
    assert (pipe.chunks, pipe.detect_anomaly) == (2, False)
    params = pipe.place((W, W))
    for train in (True, 1, np.bool_(1), jnp.bool_(1)):
        pipe(params, X, train=untyped(train))
    step = pipe.value_and_grad(total, frozen=lambda path, array: np.bool_(0))
    for scale in (2, 2.0, np.float32(2), jnp.float32(2)):
        step(params, X, loss_scale=scale)


def test_a_scale_inside_of_jit_is_taken_as_it_is():
    pipe, params = made("scan")
    step = jax.jit(lambda p, s: pipe.value_and_grad(total)(p, X, loss_scale=s)[0])
    np.testing.assert_allclose(step(params, jnp.float32(4)), 6.0)


@pytest.mark.quick
@pytest.mark.parametrize(
    "policy",
    [
        POLICIES.dots_saveable,
        POLICIES.nothing_saveable,
        POLICIES.save_only_these_names("a"),
        POLICIES.save_from_both_policies(
            POLICIES.dots_saveable, POLICIES.everything_saveable
        ),
        lambda prim, *avals, **params: prim.name == "dot_general",
    ],
)
def test_policies_are_taken(policy):
    pipe = fpipe.Pipe(LAYERS, [1, 1], checkpoint=policy)
    assert pipe == fpipe.Pipe(LAYERS, [1, 1], checkpoint=policy)
    # It may be an equal one that compares and pickles.
    assert callable(pipe.checkpoint)
    question = jax.lax.sin_p, jax.typeof(jnp.float32(0.0))
    assert pipe.checkpoint(*question) == policy(*question)


@pytest.mark.parametrize("kind", ["placed", "scan"])
def test_a_policy_that_saves_a_complex_value_is_named(kind):
    def spectrum(w, x):
        return jnp.abs(jnp.fft.fft(x @ w) @ w.astype(jnp.complex64))

    pipe = fpipe.Pipe(
        [spectrum, spectrum],
        devices=jax.devices()[:2],
        chunks=2,
        executor=kind,
        checkpoint=POLICIES.dots_saveable,
    )
    with pytest.raises(TypeError, match="reduce_precision") as caught:
        pipe.value_and_grad(total)(pipe.place((W, W)), X)
    notes = " ".join(caught.value.__notes__)
    assert "saves a complex value" in notes
    assert "checkpoint=jax.checkpoint_policies.dots_saveable" in notes
    assert "checkpoint='always'" in notes


def test_packed_parameters_of_other_devices_are_refused():
    devices = jax.devices()
    one = fpipe.Pipe(LAYERS, devices=devices[:2], chunks=2, executor="scan")
    params = one.place((W, W))
    for others in (devices[2:4], devices[1::-1]):
        other = fpipe.Pipe(LAYERS, devices=others, chunks=2, executor="scan")
        for call in (
            lambda pipe: pipe(params, X),
            lambda pipe: pipe.value_and_grad(total)(params, X),
            lambda pipe: pipe.gather(params),
        ):
            with pytest.raises(ValueError, match="are packed for the devices") as told:
                call(other)
            assert "pipe.place(other.gather(params))" in str(told.value)
        moved = other.place(one.gather(params))
        np.testing.assert_allclose(np.asarray(other(moved, X)), np.ones((4, 3)))
