"""`detect_anomaly`: the first stage, layer and microbatch that made a NaN or an
infinity, forward or backward.
"""

import dataclasses
import logging
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fpipe
import fpipe._executors.anomaly
from fpipe._executors.faults import FORWARD, Explainer, ForwardPart
from fpipe._executors.placed.compile import compile_plan
from fpipe._executors.placed.instructions import Run
from tests.executors.helpers import placed_executor, unfused
from tests.helpers import WIDTH, add, dense, in_turn, keep, models, noise, scale_init

CALL = r"^`Pipe\(detect_anomaly=True\)`: "
ROWS, CHUNKS, ROW, BAD = 8, 4, 5, 2  # row 5 is in microbatch 2


def steep(here, x):
    """A square root whose derivative is infinite where `here`."""
    return jnp.sqrt(jnp.where(here, x - jax.lax.stop_gradient(x), 1.0))


def fragile(params, x, *, side):
    """1 in `side` makes an infinity of the output, 2 of the input's cotangent, 3 of the
    parameters' gradient.
    """
    how = side[:, None]
    return (
        x * params
        + jnp.where(how == 1, jnp.inf, 0.0)
        + steep(how == 2, x)
        + steep(how == 3, params)
    )


def loss_fn(y, target):
    """A target of 7 makes an infinity of the loss, 8 of its gradient."""
    value = jnp.mean((y - target) ** 2) + jnp.where(target == 7, jnp.inf, 0.0).sum()
    return value + steep(target == 8, y).sum()


def weighted(y, target):
    return loss_fn(y, target) * 3.0, jnp.float32(3.0)


LOSSES: dict[Any, Any] = {"mean": loss_fn, "weighted": weighted}
LAYERS = [dense(), keep(), fpipe.Layer(fragile, scale_init, "fragile"), add()]
FRAGILE = r"stage 2, layer 2 'fragile', microbatch 2, "
FINE = "fine"

# What is put into row 5 of x, side and target, or into the parameters of which layer;
# and what is said of it.
CASES = {
    FINE: ({}, None),
    "output": (
        {"side": 1},
        FRAGILE + r"forward \(F\): its output is not finite, but its inputs are",
    ),
    "input": (
        {"side": 2},
        FRAGILE + r"backward \(B\): the gradient of its input is not finite",
    ),
    "parameters": (
        {"side": 3},
        FRAGILE + r"backward \(B\): the gradient of its parameters is not finite",
    ),
    "loss": (
        {"target": 7},
        r"stage 3, the loss, microbatch 2, forward \(F\): the loss is not finite, but "
        r"its inputs are",
    ),
    "loss_backward": (
        {"target": 8},
        r"stage 3, the loss, microbatch 2, backward \(B\): the gradient of the model's "
        r"output",
    ),
    "target": (
        {"target": jnp.nan},
        "stage 3, the loss, microbatch 2, .* before that targets had",
    ),
    "x": (
        {"x": jnp.nan},
        "stage 0, layer 0 'dense', microbatch 2, .* before that the call's x had",
    ),
    "given": (
        {"params": 1},
        "stage 1, layer 1 'stash', microbatch 0, .* before that its parameters had",
    ),
}


def inputs(pipe, case):
    put = CASES[case][0]
    x = np.array(noise(jax.random.key(1), (ROWS, WIDTH)))
    side, target = np.zeros(ROWS, np.int32), np.zeros((ROWS, WIDTH), np.float32)
    arrays = {"x": x, "side": side, "target": target}
    params = list(fpipe.sequential(LAYERS).init(jax.random.key(0), x, side))
    for name, value in put.items():
        if name == "params":
            params[value] = params[value].at[0].set(jnp.nan)
        else:
            arrays[name][ROW] = value
    return pipe.place(tuple(params)), arrays["x"], arrays["target"], arrays["side"]


def says(case):
    return pytest.raises(FloatingPointError, match=CALL + CASES[case][1])


SETTINGS: dict[str, Any] = {
    "eager_1f1b": {},
    "zb_h1": {"schedule": "zb_h1", "checkpoint": "never"},
    "interleaved_1f1b": {
        "schedule": "interleaved_1f1b",
        "checkpoint": "always",
        "devices": jax.devices()[:2],
    },
}


@pytest.fixture(scope="module")
def plain():
    """Loss and gradients of the plain composition, with both losses."""
    model = fpipe.sequential(LAYERS, chunks=CHUNKS)
    params, x, target, side = inputs(model, FINE)
    return {
        reduction: jax.jit(model.value_and_grad(loss, reduction=reduction))(
            params, x, target, side=side
        )
        for reduction, loss in LOSSES.items()
    }


@pytest.mark.parametrize(("setting", "executor"), in_turn(SETTINGS, ["placed", "scan"]))
def test_the_first_fault_is_named(setting, executor, plain):
    pipe = fpipe.Pipe(
        LAYERS,
        chunks=CHUNKS,
        executor=executor,
        detect_anomaly=True,
        **SETTINGS[setting],
    )
    reduction = "weighted" if setting == "zb_h1" else "mean"
    step = pipe.value_and_grad(LOSSES[reduction], reduction=reduction)
    for case in CASES:
        params, x, target, side = inputs(pipe, case)
        if case != FINE:
            with says(case):
                step(params, x, target, side=side)
            continue
        value, grads = step(params, x, target, side=side)
        assert all(
            g.sharding == p.sharding
            for g, p in zip(
                jax.tree.leaves(grads), jax.tree.leaves(params), strict=True
            )
        )
        got, want = (value, pipe.gather(grads)), plain[reduction]
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_calls_without_a_loss(executor):
    pipe = fpipe.Pipe(LAYERS, chunks=CHUNKS, executor=executor, detect_anomaly=True)
    forward = lambda params, x, target, side: pipe(params, x, side=side)  # noqa: E731
    outside = jax.grad(
        lambda params, x, target, side: loss_fn(pipe(params, x, side=side), target)
    )
    for case in (FINE, "output", "input", "parameters", "target"):
        args = inputs(pipe, case)
        if case == "output":
            with says(case):
                forward(*args)
        if case == "target":
            with pytest.raises(
                FloatingPointError,
                match="was given a cotangent of the output that has a NaN",
            ):
                outside(*args)
        elif case != FINE:
            with says(case):
                outside(*args)
        else:
            assert np.isfinite(forward(*args)).all()
            outside(*args)


def test_a_fault_is_one_number_and_one_sentence():
    """The example at the top of `fpipe._executors.faults`."""
    found = {part: jnp.array(False) for part in ForwardPart}
    found |= dict.fromkeys((ForwardPart.OUTPUT, ForwardPart.INPUT), jnp.array(True))
    code = int(FORWARD.encode(jnp.int32(2), found))
    assert code == 577
    assert FORWARD.decode(code) == (2, ForwardPart.OUTPUT | ForwardPart.INPUT)
    explainer = Explainer(("embed", "dense", "dense"), None)
    assert explainer.explain_forward(np.array([0, code])) == (
        "layer 2 'dense', microbatch 1, forward (F): its output is not finite, and "
        "before that its input had a NaN or an infinity already: the layer only passed "
        "it on"
    )


def test_evaluate():
    pipe = fpipe.Pipe(LAYERS, chunks=CHUNKS, detect_anomaly=True)
    for case in (FINE, "output", "loss", "parameters"):
        params, x, target, side = inputs(pipe, case)
        call = lambda: pipe.evaluate(loss_fn)(params, x, target, side=side)  # noqa: E731, B023
        if case in ("output", "loss"):
            with says(case):
                call()
        else:  # there is no backward
            assert np.isfinite(call())


def test_traced_calls_note_what_they_find(caplog, monkeypatch):
    verdicts, verdict = [], fpipe._executors.anomaly.Detector._verdict

    def kept(*args):
        verdicts.append(verdict(*args))
        return verdicts[-1]

    monkeypatch.setattr(fpipe._executors.anomaly.Detector, "_verdict", kept)
    pipe = fpipe.Pipe(LAYERS, chunks=CHUNKS, executor="scan", detect_anomaly=True)
    step = jax.jit(pipe.value_and_grad(loss_fn))
    outside = jax.jit(
        jax.grad(
            lambda params, x, target, side: loss_fn(pipe(params, x, side=side), target)
        )
    )
    for case in (FINE, "output", "parameters", "input", "target"):
        params, x, target, side = inputs(pipe, case)
        for call in (
            lambda: step(params, x, target, side=side),  # noqa: B023
            lambda: outside(params, x, target, side),  # noqa: B023
        ):
            caplog.clear()
            verdicts.clear()
            with caplog.at_level(logging.ERROR, "fpipe"):
                jax.block_until_ready(call())
                if case != FINE:
                    with pytest.raises(
                        FloatingPointError,
                        match=f"{CASES[case][1]}|was given a cotangent",
                    ):
                        pipe.raise_anomaly()
            pipe.raise_anomaly()  # it says so once, and of one thing
            assert (
                len(caplog.records)
                == len([text for text in verdicts if text])
                == (case != FINE)
            )


def test_off_is_as_if_it_were_not_there(monkeypatch):
    def traced(pipe):
        params, x, target, side = inputs(pipe, FINE)
        return str(
            jax.make_jaxpr(pipe.value_and_grad(loss_fn))(params, x, target, side=side)
        )

    assert "is_finite" in traced(
        fpipe.Pipe(LAYERS, chunks=CHUNKS, executor="scan", detect_anomaly=True)
    )
    monkeypatch.setattr(
        fpipe._executors.anomaly.Detector, "__init__", None
    )  # it cannot be made
    scan, placed = (
        fpipe.Pipe(LAYERS, chunks=CHUNKS, executor=executor)
        for executor in ("scan", "placed")
    )
    assert "is_finite" not in traced(scan)
    assert all(
        stage.model is placed.model for stage in placed_executor(placed).layout.stages
    )
    assert fpipe.sequential(LAYERS).detector is None
    placed.raise_anomaly()


def test_programs_do_no_more_products_and_are_shared():
    """Of x the tap alone is differentiated; no program has the number of its layer in
    it.
    """
    x, found = jnp.ones((4, WIDTH)), {}
    for detect in (False, True):
        pipe = fpipe.Pipe(
            [dense()] * 4, chunks=2, checkpoint="never", detect_anomaly=detect
        )
        with unfused():
            pipe.compile(pipe.init(jax.random.key(0), x), x, x, loss_fn=loss_fn)
        (bound,) = placed_executor(pipe)._plans.values()
        for n, program in compile_plan(bound.plan, bound.shapes).items():
            item = bound.plan.instructions[n]
            for action in item.actions if isinstance(item, Run) else ():
                found[detect, action.kind, action.stage] = (
                    item.call,
                    program.as_text().count(" dot("),
                )
    count = {key: products for key, (_, products) in found.items()}
    for kind in "FB":
        assert [count[True, kind, s] for s in range(4)] == [
            count[False, kind, s] for s in range(4)
        ], kind
        assert found[True, kind, 1][0] is found[True, kind, 2][0], kind
    assert count[True, "B", 1] > count[True, "B", 0] > 0


def double(x):
    return 2 * x


def spike(x):
    """An infinite derivative at 10."""
    return steep(x == 10, x) + x


def scale(params, x):
    return x * params


@pytest.mark.parametrize("make", [fpipe.Pipe, fpipe.sequential])
def test_a_gradient_that_nobody_asks_for_is_no_fault(make):
    x = jnp.ones((4, WIDTH)).at[3].set(5)
    fault = r"layer 1 'spike', microbatch 1, backward \(B\): the gradient of its input"
    pipe = make(
        [fpipe.fn(double), fpipe.fn(spike), dense(), dense()],
        chunks=2,
        detect_anomaly=True,
    )
    params = pipe.init(jax.random.key(0), x)
    pipe.value_and_grad(loss_fn)(params, x, x)
    jax.grad(lambda params: pipe(params, x).sum())(params)
    with pytest.raises(FloatingPointError, match=fault):
        pipe.value_and_grad(loss_fn, argnums=(0, 1))(params, x, x)
    with pytest.raises(FloatingPointError, match=fault):
        jax.grad(lambda x: pipe(params, x).sum())(x)

    layers = [
        fpipe.Layer(scale, lambda key, x: jnp.full(WIDTH, 2.0)),
        fpipe.fn(spike),
        dense(),
        dense(),
    ]
    pipe = make(layers, chunks=2, detect_anomaly=True)
    params = pipe.init(jax.random.key(0), x)
    pipe.value_and_grad(loss_fn, frozen=lambda path, a: path == "0")(params, x, x)
    with pytest.raises(FloatingPointError, match=fault):
        pipe.value_and_grad(loss_fn)(params, x, x)


def test_an_infinity_that_does_not_leave_a_layer_is_no_fault():
    """A mask of -inf in `side`; a state that starts with an infinity."""

    def attend(params, x, *, side, state):
        low, never = state
        low = jnp.minimum(low, x.min(0))
        return jax.nn.softmax(x * params + side) + low, (low, never)

    layer = fpipe.Layer(
        attend,
        scale_init,
        "attend",
        init_state=lambda x: (jnp.full(WIDTH, jnp.inf), jnp.inf),
    )
    pipe = fpipe.Pipe([layer, dense()], chunks=2, detect_anomaly=True)
    x = jnp.ones((4, WIDTH))
    mask = x.at[:, 1].set(-jnp.inf)
    params, state = pipe.init(jax.random.key(0), x, mask), pipe.init_state(x, mask)
    (_, new), _ = pipe.value_and_grad(loss_fn)(params, x, x, side=mask, state=state)
    assert (new[0][0] == 1).all()
    with pytest.raises(
        FloatingPointError,
        match=r"layer 0 'attend', microbatch 1, forward \(F\): its output and its new",
    ):
        pipe(params, x.at[3].set(-jnp.inf), side=x, state=((x[0], jnp.ones(())), None))


def test_skips_and_borrowed_parameters():
    @fpipe.skippable(stash=["skip"])
    def stash(params, x, *, carry):
        return x * params, fpipe.stash(carry, "skip", jnp.log(x))

    @fpipe.skippable(pop=["skip"])
    def pop(params, x, *, carry, borrowed):
        skip, carry = fpipe.pop(carry, "skip")
        return x + skip + steep(x == 3, borrowed["stash"] * x), carry

    pop = dataclasses.replace(
        pop, needs=("carry", "borrowed"), borrow=["stash"], init=lambda key, x, **_: ()
    )
    ones = lambda key, x: jnp.ones(())  # noqa: E731
    model = fpipe.sequential(
        [dataclasses.replace(stash, init=ones), pop], chunks=2, detect_anomaly=True
    )
    x = jnp.ones((4, 1))
    params = (jnp.ones(()), ())
    assert model(params, x).shape == (4, 1)
    with pytest.raises(
        FloatingPointError,
        match=r"layer 0 'stash', microbatch 1, forward \(F\): what it stashes is",
    ):
        model(params, x.at[2].set(0.0))
    with pytest.raises(
        FloatingPointError,
        match=r"layer 1 'pop', microbatch 1, backward \(B\): the gradient of its "
        r"borrowed",
    ):
        model.value_and_grad(loss_fn)(params, x.at[2].set(3.0), x)


def test_codes_of_late_layers_in_bfloat16():
    layers = [fpipe.fn(jnp.tanh)] * 40 + [fpipe.Layer(fragile, scale_init, "fragile")]
    model = fpipe.sequential(layers, compute_dtype=jnp.bfloat16, detect_anomaly=True)
    x, side = jnp.ones((1, WIDTH)), jnp.array([3])
    params = model.init(jax.random.key(0), x, side)
    jax.jit(model.value_and_grad(loss_fn))(params, x, x, side=side)
    with pytest.raises(
        FloatingPointError,
        match=r"layer 40 'fragile', microbatch 0, backward \(B\): .* its parameters",
    ):
        model.raise_anomaly()


def test_a_sum_that_overflows():
    model = fpipe.sequential([fpipe.fn(double)], chunks=2, detect_anomaly=True)
    x, t = jnp.full((4, WIDTH), 1e38), fpipe.NoChunk(jnp.ones(()))
    with pytest.raises(
        FloatingPointError,
        match="the loss is not finite, though that of every microbatch is",
    ):
        model.evaluate(lambda y: y.max(), reduction="sum")(((),), x)
    with pytest.raises(
        FloatingPointError,
        match=r"the gradient of argument 2.* is not finite, though that of every",
    ):
        model.value_and_grad(lambda y, t: 3e38 * (t - 1), argnums=2, reduction="sum")(
            ((),), x / 10, t
        )
    with pytest.raises(FloatingPointError, match="the total weight"):
        model.value_and_grad(lambda y: (y.sum(), 0.0), argnums=1, reduction="weighted")(
            ((),), x / 100
        )


@pytest.mark.parametrize("name", ["nested", "jump3", "stateful", "branched", "tied"])
def test_every_kind_of_model_runs_as_before(name):
    layers = models()[name]
    x = noise(jax.random.key(1), (4, WIDTH))
    side = x if any(layer.asks("side") for layer in layers) else None
    outs = []
    for detect in (False, True):
        model = fpipe.sequential(layers, chunks=2, detect_anomaly=detect)
        params = model.init(jax.random.key(0), x, side)
        state = model.init_state(x, side)
        state = {"state": state} if model.model.stateful else {}
        outs.append(
            model.value_and_grad(loss_fn, argnums=(0, 1))(
                params, x, x, side=side, key=jax.random.key(2), **state
            )
        )
    assert jax.tree.structure(outs[0]) == jax.tree.structure(outs[1])
    for a, b in zip(*map(jax.tree.leaves, outs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_wrong_is_said_as_before():
    def messages(detect):
        wrong = fpipe.Layer(lambda params, x, *, carry: x, stash=["a"], name="wrong")
        late = fpipe.Layer(lambda params, x, *, carry: (x, 3), stash=["a"], name="late")
        end = fpipe.Layer(lambda params, x, *, carry: (x, {}), pop=["a"], name="end")
        fails = fpipe.Layer(lambda params, x: x @ x, name="fails")
        x = jnp.ones((4, 3))
        for layers in ([wrong, end], [late, end], [fails]):
            with pytest.raises((TypeError, ValueError)) as caught:
                fpipe.sequential(layers, detect_anomaly=detect)(((),) * len(layers), x)
            yield str(caught.value), caught.value.__notes__
        model = fpipe.sequential([fpipe.fn(double)], detect_anomaly=detect)
        for call in (
            model.evaluate(lambda y: (y,), has_aux=True),
            model.evaluate(lambda y: (y,), reduction="weighted"),
            model.evaluate(lambda y: y),
        ):
            with pytest.raises(TypeError) as caught:
                call(((),), x)
            yield str(caught.value), caught.value.__notes__

    assert list(messages(True)) == list(messages(False))


def test_it_is_part_of_the_value():
    pipe = fpipe.Pipe([fpipe.fn(double)], detect_anomaly=True)
    assert (
        pickle.loads(pickle.dumps(pipe)) == pipe == dataclasses.replace(pipe, chunks=1)
    )
    assert pipe != dataclasses.replace(pipe, detect_anomaly=False)
