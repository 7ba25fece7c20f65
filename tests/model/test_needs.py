"""The table of needs, and the need `step`: a row of it, and nothing else."""

import ast
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fpipe
import fpipe.testing
from fpipe._model.needs import BY_NAME, INPUTS, NEEDS, OF_CALL, TABLE, Giver, call_needs
from tests.helpers import WIDTH, assert_same, dense, mse, noise, raises
from tests.house import sources

# The modules that name a need by a string, and why. All others ask the table.
NAMED = {
    "train": {
        "_model.needs": "its row",
        "_split.split": "messages name the argument",
        "testing": "messages name the argument",
        "flax._calling": "what modules call it",
        "flax._function": "what modules call it",
    },
    "side": {
        "_model.needs": "its row",
        "_model.stages": "its port",
        "_split.split": "what goes straight to a piece comes with it",
        "_split.layers": "what goes straight to a piece comes with it",
        "_split.user_trees": "what goes straight to a piece comes with it",
        "_planning.pipe_balance": "`Pipe(sample_side=...)`",
        "_executors.anomaly": "the tap of a loss, whose targets take its place",
        "testing": "messages name the argument",
        "flax._calling": "what modules call it",
        "flax._function": "what modules call it",
        "flax._layers": "what modules call it",
    },
}

X = noise(jax.random.key(0), (8, WIDTH))


def warmed(default=None):
    """A layer that scales its output up over the first four steps."""

    def required(params, x, *, step):
        assert step.dtype == jnp.int32
        assert step.shape == ()
        return x * params * jnp.minimum(1.0, (step.astype(x.dtype) + 1) / 4)

    def optional(params, x, *, step=default):
        return required(params, x, step=jnp.int32(step))

    apply = required if default is None else optional
    return fpipe.Layer(apply, lambda key, x: jnp.ones(x.shape[-1]), name="warmed")


def make_sequential(layers, **options):
    return fpipe.sequential(layers, **options)


def make_placed(layers, **options):
    return fpipe.Pipe(layers, devices=jax.devices()[:2], **options)


def make_scan(layers, **options):
    return fpipe.Pipe(layers, devices=jax.devices()[:2], executor="scan", **options)


every = pytest.mark.parametrize("make", [make_sequential, make_placed, make_scan])
pipes = pytest.mark.parametrize("make", [make_placed, make_scan])


def test_every_keyword_of_a_call_is_a_need_of_the_table():
    without_loss = [fpipe.Pipe.__call__, fpipe.split]
    with_loss = [
        fpipe.Pipe.compile,
        fpipe.Pipe.plan,
        fpipe.tune,
        fpipe.testing.assert_equals_sequential,
    ]
    for call in (*without_loss, *with_loss):
        named = [n for n in inspect.signature(call).parameters if n in BY_NAME]
        rest = {need.name for need in OF_CALL} | {"state", "params", "x", "targets"}
        assert set(named) == rest - ({"targets"} if call in without_loss else set())


def test_what_a_call_gives_is_in_the_order_of_the_table_and_complete():
    assert list(call_needs()) == [need.name for need in OF_CALL]
    assert set(INPUTS) == {n.name for n in TABLE if n.giver is Giver.CALL}
    assert set(NEEDS) == {need.name for need in TABLE if need.keyword}


@pytest.mark.parametrize("need", NAMED)
def test_a_need_is_named_in_the_table_and_where_it_means_more(need: str):
    package = pathlib.Path(fpipe.__file__).parent
    texts = {k: text for k, text in sources(package).items() if f'"{need}"' in text}
    found = {name for name, text in texts.items() if need in strings(text)}
    assert found == {f"fpipe.{module}" for module in NAMED[need]}


def strings(source):
    """The strings of a source, without documentation."""
    nodes = list(ast.walk(ast.parse(source)))
    alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    found = (node for node in nodes if isinstance(node, ast.Constant))
    return {node.value for node in found if id(node) not in alone}


@every
@pytest.mark.parametrize("step", [0, 2, np.int64(2), jnp.uint8(9)])
def test_layers_get_the_step(make, step):
    layers = [dense(), warmed(), dense()]
    pipe = make(layers, chunks=4)
    params = pipe.init(jax.random.key(0), X)
    scale = min(1.0, (int(step) + 1) / 4)
    plain = fpipe.sequential([dense(), fpipe.fn(lambda x: x * scale), dense()])
    own = pipe.gather(params)
    want = plain((own[0], (), own[2]), X)
    assert_same(pipe(params, X, step=step), want)
    loss, grads = pipe.value_and_grad(mse)(params, X, X, step=step)
    reference = fpipe.sequential(layers, chunks=4)
    want_loss, want_grads = reference.value_and_grad(mse)(own, X, X, step=step)
    assert_same(loss, want_loss)
    assert_same(pipe.gather(grads), want_grads)
    assert_same(pipe.evaluate(mse)(params, X, X, step=step), want_loss)


@pipes
def test_a_step_is_no_constant_of_a_program(make):
    pipe = make([dense(), warmed()], chunks=2)
    params = pipe.init(jax.random.key(0), X)
    step = pipe.value_and_grad(mse)
    step(params, X, X, step=0)
    with jax.no_tracing():
        losses = [float(step(params, X, X, step=n)[0]) for n in (1, 2, 3)]
    assert len(set(losses)) == 3


def test_a_traced_step_under_jit():
    layers = [dense(), warmed()]
    pipe = make_scan(layers, chunks=2)
    params = pipe.init(jax.random.key(0), X)
    run = jax.jit(lambda p, n: pipe.value_and_grad(mse)(p, X, X, step=n))
    loss, grads = run(params, jnp.int32(1))
    want = fpipe.sequential(layers, chunks=2).value_and_grad(mse)(
        pipe.gather(params), X, X, step=1
    )
    assert_same((loss, pipe.gather(grads)), want)


@every
def test_a_gradient_outside_passes_a_step_on(make):
    layers = [dense(), warmed()]
    pipe = make(layers, chunks=2)
    params = pipe.init(jax.random.key(0), X)
    grads = jax.grad(lambda p: jnp.sum(pipe(p, X, step=1) ** 2))(params)
    own = pipe.gather(params)
    plain = fpipe.sequential(layers, chunks=2)
    want = jax.grad(lambda p: jnp.sum(plain(p, X, step=1) ** 2))(own)
    assert_same(pipe.gather(grads), want)


@every
def test_a_default_stands_in_for_a_step_that_is_not_given(make):
    pipe = make([dense(), warmed(default=3)], chunks=2)
    params = pipe.init(jax.random.key(0), X)
    assert_same(pipe(params, X), pipe(params, X, step=3))
    assert not np.allclose(pipe(params, X), pipe(params, X, step=0))


@every
@pytest.mark.parametrize("options", [{}, {"detect_anomaly": True}])
def test_so_it_does_in_a_layer_without_parameters(make, options):
    layers = [
        dense(),
        fpipe.fn(lambda x, *, step=2: x * jnp.asarray(step, x.dtype), name="times"),
    ]
    pipe = make(layers, chunks=2, **options)
    params = pipe.init(jax.random.key(0), X)
    assert_same(pipe(params, X), pipe(params, X, step=2))
    required = make([dense(), fpipe.fn(lambda x, *, step: x * step)], chunks=2)
    with pytest.raises(ValueError, match="asks for the need 'step'"):
        required(params, X)


@every
def test_a_required_step_that_is_not_given_is_an_error(make):
    pipe = make([dense(), warmed()], chunks=2)
    params = pipe.init(jax.random.key(0), X)
    message = (
        "layer 1 'warmed' asks for the need 'step', which this call was not given: "
        "pass "
        "`step=...`, or give the parameter a default: `def warmed(params, x, *, "
        "step=0)`"
    )
    with raises(ValueError, message):
        pipe(params, X)


@pytest.mark.parametrize("wrong", [1.0, True, "1", np.float32(1), np.zeros(2, int)])
def test_what_is_no_step_is_refused(wrong):
    pipe = make_placed([dense(), warmed()], chunks=2)
    params = pipe.init(jax.random.key(0), X)
    with pytest.raises(TypeError, match="the number of a training step is an int"):
        pipe(params, X, step=wrong)


@pipes
def test_plans_and_compilations_take_a_step(make):
    pipe = make([dense(), warmed()], chunks=2)
    params = pipe.init(jax.random.key(0), X)
    shape = jax.ShapeDtypeStruct((), jnp.int32)
    assert pipe.plan(params, X, step=shape).microbatches == 2
    pipe.compile(params, X, X, loss_fn=mse, step=shape)
    loss, _ = pipe.value_and_grad(mse)(params, X, X, step=jnp.int32(5))
    assert_same(loss, pipe.evaluate(mse)(params, X, X, step=5))


@pipes
def test_a_comparison_with_the_sequential_takes_a_step(make):
    pipe = make([dense(), warmed(), dense()], chunks=2)
    fpipe.testing.assert_equals_sequential(pipe, X, X, loss_fn=mse, step=2)


@pipes
def test_an_anomaly_in_a_layer_with_a_step_is_found(make):
    divide = fpipe.fn(lambda x, *, step: x / step.astype(x.dtype), name="divide")
    layers = [dense(), divide]
    pipe = make(layers, chunks=2, detect_anomaly=True)
    params = pipe.init(jax.random.key(0), X)
    pipe(params, X, step=1)
    with pytest.raises(FloatingPointError, match="layer 1"):
        pipe(params, X, step=0)


@pipes
@pytest.mark.parametrize("option", [{}, {"checkpoint": "always"}])
def test_the_python_of_a_layer_runs_once(make, option):
    """Over `init`, `plan`, `compile`, steps and gradients from outside."""
    calls = []

    def counting(k):
        def apply(w, x):
            calls.append(k)
            return jnp.tanh(x @ w)

        return fpipe.Layer(apply, lambda key, x: noise(key, (WIDTH, WIDTH)), name="c")

    pipe = make([counting(k) for k in range(3)], chunks=4, **option)
    params = pipe.init(jax.random.key(0), X)
    pipe.plan(params, X, X, loss_fn=mse)
    pipe.plan(None, X)
    pipe.compile(params, X, X, loss_fn=mse)
    step = pipe.value_and_grad(mse)
    step(params, X, X)
    step(params, X, X)
    pipe(params, X)
    jax.grad(lambda p: pipe(p, X).sum())(params)
    assert sorted(calls) == [0, 1, 2]
    pipe(params, X[:4])  # microbatches of one row
    assert sorted(calls) == [0, 0, 1, 1, 2, 2]


@pipes
def test_an_error_in_one_of_equal_layers_names_that_one(make):
    def odd(params, x, *, state):
        return (x, state) if x.shape[-1] == WIDTH else x

    layer = fpipe.Layer(odd, lambda key, x: (), "odd", init_state=lambda x: ())
    pipe = make([layer, fpipe.fn(lambda x: x[:, 1:], "cut"), layer], chunks=2)
    with pytest.raises(TypeError, match="layer 2 'odd' declares state"):
        pipe(pipe.place([(), (), ()]), X, state=((), None, ()))


# --- what is not given, and what nobody asks for ---


def masked(x, *, side):
    return x * side["mask"]


def optional(x, *, side=None, key=3):
    return x * key if side is None else x * side["mask"]


def made_of_side(key, x, *, side):
    del key, x
    return side["mask"][0]


SIDE = {"mask": jnp.full_like(X, 2.0)}
plain = fpipe.fn(jnp.sin, "plain")


def every_call(pipe, count):
    """The calls that take `side`, by name."""
    params = pipe.place([()] * count)
    step = pipe.value_and_grad(lambda y: y.sum())
    key = jax.random.key(0)
    calls = {
        "call": lambda **side: pipe(params, X, **side),
        "evaluate": lambda **side: pipe.evaluate(jnp.sum)(params, X, **side),
        "value_and_grad": lambda **side: step(params, X, **side),
        "grad": lambda **side: jax.grad(lambda x: pipe(params, x, **side).sum())(X),
        "eval_shape": lambda **side: jax.eval_shape(
            lambda p, x: pipe(p, x, **side), params, X
        ),
        "init": lambda **side: pipe.init(key, X, **side),
        "init_state": lambda **side: pipe.init_state(X, **side),
    }
    if isinstance(pipe, fpipe.Pipe):
        calls["plan"] = lambda **side: pipe.plan(None, X, **side)
        calls["compile"] = lambda **side: pipe.compile(params, X, **side)
    return calls


@pytest.mark.quick(cases=2)
@every
@pytest.mark.parametrize("options", [{}, {"detect_anomaly": True}])
def test_side_inputs_that_are_required_and_missing_are_an_error(make, options):
    pipe = make([plain, fpipe.fn(masked)], chunks=2, **options)
    for name, call in every_call(pipe, 2).items():
        with pytest.raises(ValueError, match=r"layer 1 .masked. asks .* .side."):
            call()
        assert name
    pipe(pipe.place([(), ()]), X, side=SIDE)


@every
def test_side_inputs_that_no_layer_asks_for_are_an_error(make):
    pipe = make([plain, plain], chunks=2)
    calls = every_call(pipe, 2)
    for call in calls.values():
        with pytest.raises(ValueError, match="`side=` was given, but no layer asks"):
            call(side=SIDE)
    # A training loop gives these to every model.
    pipe(pipe.place([(), ()]), X, key=jax.random.key(0), train=True, step=3)


@every
def test_a_need_that_is_not_given_has_its_own_default(make):
    pipe = make([plain, fpipe.fn(optional)], chunks=2)
    params = pipe.place([(), ()])
    assert_same(pipe(params, X), jnp.sin(X) * 3)
    assert_same(pipe(params, X, side=SIDE), jnp.sin(X) * 2)


@every
def test_an_init_may_ask_for_side_inputs(make):
    layer = fpipe.Layer(lambda params, x: x * params, made_of_side, "scaled")
    pipe = make([layer], chunks=2)
    with pytest.raises(ValueError, match="the init of layer 0 'scaled' asks"):
        pipe.init(jax.random.key(0), X)
    params = pipe.gather(pipe.init(jax.random.key(0), X, side=SIDE))
    assert params[0].shape == (WIDTH,)


@every
def test_a_layer_that_has_no_key_says_so(make):
    drop = fpipe.fn(lambda x, *, key: x * jax.random.uniform(key, x.shape), "drop")
    pipe = make([drop], chunks=2)
    with pytest.raises(TypeError) as caught:
        pipe(pipe.place([()]), X)
    notes = " ".join(caught.value.__notes__)
    assert "this call was given no `key=`, so its key is None" in notes


def test_planning_refuses_what_a_call_refuses():
    asking = [plain, fpipe.fn(masked)]
    for f in (
        lambda layers, **side: fpipe.balance(layers, X, stages=2, **side),
        lambda layers, **side: fpipe.layer_costs(layers, X, **side),
        lambda layers, **side: fpipe.tune(layers, X, **side),
    ):
        with pytest.raises(ValueError, match="asks for the need 'side'"):
            f(asking)
        with pytest.raises(ValueError, match="no layer asks for it"):
            f([plain, plain], side=SIDE)
