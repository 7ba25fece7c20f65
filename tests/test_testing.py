"""`fpipe.testing`: it says nothing when all is well, and where the first difference is
when not.
"""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import fpipe
import fpipe.testing
from tests.helpers import WIDTH, Case, counter, dense, dropout, models, mse

KEY = jax.random.key(0)


def pipe_of(layers, executor="placed", **options):
    return fpipe.Pipe(
        layers, [1, 1, 1, len(layers) - 3], chunks=4, executor=executor, **options
    )


@pytest.mark.parametrize(
    ("model", "executor"),
    [
        ("plain", "placed"),
        ("stateful", "scan"),
        ("stateful", "placed"),
        ("tied", "scan"),
        ("sided", "placed"),
        ("sided", "scan"),
    ],
)
def test_equal_pipes_are_equal(model, executor):
    layers = models()[model]
    case = Case(layers, 4, rows=8)
    fpipe.testing.assert_equals_sequential(
        pipe_of(layers, executor),
        case.x,
        case.target,
        loss_fn=mse,
        side=case.side,
        key=jax.random.key(3),
        train=True,
    )


def test_aux_and_numbers_of_one_argument():
    case = Case([dense()] * 4, 4, rows=8)
    fpipe.testing.assert_equals_sequential(
        pipe_of(case.layers),
        case.x,
        case.target,
        loss_fn=lambda y, t: (mse(y, t), {"y": y}),
        has_aux=True,
        argnums=2,
    )


def test_mixed_precision_has_its_own_tolerance():
    case = Case([dense()] * 4, 4, rows=8)
    pipe = pipe_of(case.layers, compute_dtype=jnp.bfloat16)
    fpipe.testing.assert_equals_sequential(pipe, case.x, case.target, loss_fn=mse)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_gradient_that_is_nothing_but_rounding_is_no_difference(dtype):
    """A bias before a batch norm, for one: the pipe and the plain composition round it
    in their own ways.
    """
    layers = [
        dense(activation=lambda x: x),
        fpipe.DeferredBatchNorm(),
        dense(),
        dense(),
    ]
    pipe, case = pipe_of(layers, compute_dtype=dtype), Case([dense()] * 4, 4, rows=16)
    params, state = (
        fpipe.sequential(layers, 4).init(jax.random.key(0), case.x),
        pipe.init_state(case.x),
    )

    def off(share):
        def loss(result):
            b = result.gradients[0][0]["b"]
            b = b.at[0].set(share * jnp.abs(result.gradients[0][0]["w"]).max())
            return result._replace(
                gradients=(
                    ({**result.gradients[0][0], "b": b}, *result.gradients[0][1:]),
                    *result.gradients[1:],
                )
            )

        return changed(pipe_of(layers, compute_dtype=dtype), loss=loss)

    given = {"loss_fn": mse, "params": params, "train": True, "state": state}
    fpipe.testing.assert_equals_sequential(
        off(1e-2 if dtype else 1e-6), case.x, case.target, **given
    )
    with pytest.raises(
        AssertionError, match=r"the gradient of params, layer 0 .* at \['b'\]"
    ):
        fpipe.testing.assert_equals_sequential(
            off(5e-2 if dtype else 3e-6), case.x, case.target, **given
        )


def changed(pipe, **change):
    """The pipe with something wrong in what it computes."""
    executor = pipe._executor

    class Wrong(type(executor)):
        def loss(self, *args):
            return change["loss"](executor.loss(*args))

        def forward(self, *args):
            return change.get("forward", lambda out: out)(executor.forward(*args))

    executor_copy = object.__new__(Wrong)
    executor_copy.__dict__.update(executor.__dict__)
    runner = dataclasses.replace(pipe._runner, executor=executor_copy)
    object.__setattr__(pipe, "_executor", executor_copy)
    object.__setattr__(pipe, "_runner", runner)
    return pipe


def off_by(layer, name, f):
    def loss(result):
        params = list(result.gradients[0])
        params[layer] = {**params[layer], name: f(params[layer][name])}
        return result._replace(gradients=(tuple(params), *result.gradients[1:]))

    return loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            off_by(2, "w", lambda a: a.at[1, 3].add(1.0)),
            r"the gradient of params, layer 2 'dense' \(stage 2 on .*2.*\) at \['w'\]: "
            r"1 of 16 numbers differ; at \(1, 3\) the "
            r"pipe gives \S+, the plain composition \S+; the largest difference is 1, "
            r"allowed is \S+$",
        ),
        (
            off_by(3, "b", lambda a: a.at[0].set(jnp.nan)),
            r"layer 3 .* at \['b'\]: 1 of 4 .* at \(0,\) the pipe gives nan",
        ),
        (
            off_by(1, "b", lambda a: a.astype(jnp.bfloat16)),
            r"layer 1 .*: the pipe gives bfloat16\[4\], the plain composition "
            r"float32\[4\]",
        ),
        (
            off_by(0, "b", lambda a: (a, a)),
            r"layer 0 .*: the pipe gives \{.*\(float32\[4\], float32\[4\]\).*\}, the "
            r"plain composition",
        ),
        (
            lambda result: result._replace(loss=result.loss * 1.01),
            r"^the loss: 1 of 1 numbers differ; at \(\) the pipe gives",
        ),
        (
            lambda result: result._replace(
                gradients=(result.gradients[0], result.gradients[1] * 2)
            ),
            r"^the gradient of x: 32 of 32 numbers differ",
        ),
    ],
)
def test_the_first_difference_is_named(change, message):
    case = Case([dense()] * 4, 4, rows=8)
    pipe = changed(pipe_of(case.layers), loss=change)
    with pytest.raises(AssertionError, match=message):
        fpipe.testing.assert_equals_sequential(pipe, case.x, case.target, loss_fn=mse)


def test_a_wrong_state_is_named():
    case = Case([dense(), counter(), dense(), dense()], 4, rows=8)

    def forward(out):
        y, state = out
        return y, (None, {**state[1], "count": state[1]["count"] + 1}, None, None)

    pipe = changed(pipe_of(case.layers), loss=lambda out: out, forward=forward)
    with pytest.raises(
        AssertionError,
        match=r"^the state, layer 1 'counter' \(stage 1 on .*\) at \['count'\]: 1 of 1",
    ):
        fpipe.testing.assert_equals_sequential(pipe, case.x, train=True)


def test_a_layer_that_is_not_pure_is_found():
    """What a user looks for: here a mask that is drawn anew at each trace."""
    drawn = iter(range(1000))

    def impure(params, x):
        return x * jax.random.uniform(jax.random.key(next(drawn)), x.shape) + params

    layers = [
        fpipe.Layer(impure, lambda key, x: jnp.zeros(x.shape[-1])),
        *[dense()] * 3,
    ]
    with pytest.raises(AssertionError, match=r"^y: \d+ of 32 numbers differ"):
        fpipe.testing.assert_equals_sequential(pipe_of(layers), jnp.ones((8, WIDTH)))


FEW = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=(HealthCheck.too_slow,),
)


def test_random_schedules_are_valid_and_of_every_kind():
    """`Schedule` refuses invalid ones; forwards keep their order where asked; orders no
    generator makes are among them.
    """
    seen, permuted, added = set(), False, set()

    @FEW
    @given(st.data())
    def draw(data):
        nonlocal permuted
        where = data.draw(st.sampled_from([(0, 1, 2), (0, 1, 0), (0, 1, 1, 0)]))
        split, in_order, more = (data.draw(st.booleans()) for _ in range(3))
        schedule = data.draw(
            fpipe.testing.schedules(
                where, 3, split, in_order, recompute=more, offload=more
            )
        )
        assert schedule.stage_to_device == where
        assert schedule.microbatches == 3
        kinds = {a.kind for row in schedule.actions for a in row}
        backwards = {"F", "I", "W"} if split else {"F", "B"}
        # Which pairs have more is drawn too.
        assert backwards <= kinds <= backwards | (set("ROL") if more else set())
        added.update(kinds - backwards)
        orders = [schedule.order("F", s) for s in range(len(where))]
        ordered = all(list(o) == sorted(o) for o in orders)
        assert ordered or not in_order
        permuted = permuted or not ordered
        seen.add(schedule.actions)

    draw()
    assert permuted
    assert added == set("ROL")
    assert len(seen) > 30


@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_random_partitions_fit_the_executor(executor):
    layers, x = (
        [dense(), dropout(), dense(), dense()],
        jax.ShapeDtypeStruct((6, WIDTH), jnp.float32),
    )
    pipes = []

    @FEW
    @given(st.data())
    def draw(data):
        pipes.append(data.draw(fpipe.testing.partitions(layers, x, executor)))

    draw()
    assert {p.executor for p in pipes} == {executor}
    assert {sum(p.balance) for p in pipes} == {4}
    assert len({p.balance for p in pipes}) > 3
    assert len({p.chunks for p in pipes}) > 2
    assert any(isinstance(p.schedule, fpipe.schedules.Schedule) for p in pipes)
    assert any(6 % p.chunks for p in pipes)
    assert any("offload" in str(p.checkpoint) for p in pipes)


def test_random_models_have_skips_states_keys_and_ties():
    seen, rows, bare = set(), set(), set()

    @FEW
    @given(st.data())
    def draw(data):
        layers = data.draw(fpipe.testing.models(4, most=5))
        assert 2 <= len(layers) <= 5
        fpipe.verify_skippables(layers)
        for layer in layers:
            seen.update(layer.needs or ())
            seen.update(f for f in ("stash", "pop", "peek") if getattr(layer, f))
            if layer.init_state is not None:
                rows.add(layer.state_rows)
            bare.add(layer.init(KEY, None) is None)

    draw()
    assert rows == bare == {True, False}
    assert seen == {"carry", "key", "side", "state", "borrowed", "stash", "pop", "peek"}


def test_the_assertion_needs_no_hypothesis():
    code = (
        "import sys; sys.modules['hypothesis'] = None; import fpipe.testing; "
        "fpipe.testing.assert_equals_sequential"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
