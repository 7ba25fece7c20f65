"""Layers: what a signature says, what `Layer`, `fn` and `skippable` refuse, and what an
error in a layer says.
"""

import dataclasses
import functools
import pickle
import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.extend.core import Primitive

import fpipe
from tests.helpers import assert_same, raises

untyped: Any = lambda value: value  # noqa: E731 - what a type checker would refuse is tested here


both = pytest.mark.parametrize("make", [fpipe.sequential, fpipe.Pipe])


# --- needs from signatures ---


def plain(params, x):
    return x * params


def every(params, x, *, side, borrowed, train, key, state, carry):
    return x, carry, state


def trained(params, x, *, key, train):
    return x if train and key is not None else x * params


def configured(config, params, x, *, key):
    return x * params * config


def optional(params, x, scale=1.0, *, key=None, power=2):
    return x * params * scale**power


def open_ended(params, x, **rest):
    return x * params


def named(params, x, train):
    return x * params if train else x


class Unit:
    """A callable object, with a method that could be a layer too."""

    def __call__(self, params, x, *, side):
        return x * params + side

    def method(self, params, x, *, state):
        return x * params, state

    @classmethod
    def of_class(cls, params, x, *, train):
        return x * params

    @staticmethod
    def static(params, x, *, key):
        return x * params


@jax.custom_vjp
def custom(params, x):
    return x * params


custom.defvjp(
    lambda p, x: (x * p, (p, x)), lambda saved, g: (jnp.sum(g * saved[1]), g * saved[0])
)


@functools.wraps(trained)
def wrapper(*args, **kwargs):
    return trained(*args, **kwargs)


NEEDS = {
    "none": (plain, ()),
    "all, in one order": (
        every,
        ("carry", "state", "key", "train", "borrowed", "side"),
    ),
    "two": (trained, ("key", "train")),
    "with defaults": (optional, ("key",)),
    "a lambda": (lambda params, x, *, train: x, ("train",)),
    "a partial that binds a need": (functools.partial(trained, train=True), ("key",)),
    "a partial of a partial": (
        functools.partial(functools.partial(trained, train=True), key=None),
        (),
    ),
    "a partial that binds a position": (functools.partial(configured, 2.0), ("key",)),
    "a partial that binds a positional need": (
        functools.partial(named, train=True),
        (),
    ),
    "a partial that binds an extra": (functools.partial(optional, power=3), ("key",)),
    "jitted": (jax.jit(trained, static_argnames="train"), ("key", "train")),
    "a jitted partial": (jax.jit(functools.partial(trained, train=True)), ("key",)),
    "a partial of a jitted function": (
        functools.partial(jax.jit(trained, static_argnames="train"), train=False),
        ("key",),
    ),
    "a jitted partial of a jitted partial": (
        jax.jit(
            functools.partial(jax.jit(functools.partial(trained, train=True)), key=None)
        ),
        (),
    ),
    "checkpointed": (jax.checkpoint(optional), ("key",)),
    "custom derivatives": (custom, ()),
    "functools.wraps": (wrapper, ("key", "train")),
    "a callable object": (Unit(), ("side",)),
    "a method": (Unit().method, ("state",)),
    "a class method": (Unit.of_class, ("train",)),
    "a static method": (Unit.static, ("key",)),
    "only *args": (lambda *args: args[1], ()),
    "*args after one": (lambda params, *rest: rest[0], ()),
    "*args and a need": (lambda *args, key: args[1], ("key",)),
    "**kwargs names nothing": (open_ended, ()),
    "**kwargs beside a need": (lambda params, x, *, key, **rest: x, ("key",)),
    "a builtin without a signature": (max, ()),
}


@pytest.mark.quick
@pytest.mark.parametrize("case", NEEDS)
def test_the_signature_says_what_a_layer_needs(case):
    f, needs = NEEDS[case]
    assert fpipe.Layer(f).needs == needs


@pytest.mark.parametrize(
    "given", [["train", "carry"], ("carry", "train"), iter(["carry", "train"])]
)
def test_needs_override_the_signature(given):
    assert fpipe.Layer(lambda params, x, **kwargs: x, needs=given).needs == (
        "carry",
        "train",
    )


def test_needs_can_take_away_what_the_signature_names():
    layer = fpipe.Layer(optional, needs=())
    assert not layer.needs
    np.testing.assert_array_equal(
        fpipe.sequential([layer])((jnp.float32(2),), jnp.ones(3)), np.full(3, 2.0)
    )


@pytest.mark.quick
@both
def test_a_layer_gets_the_needs_that_it_names_and_no_others(make):
    seen = []

    def noted(params, x, **needs):
        seen.append(needs)
        return x

    layers = [
        fpipe.Layer(noted, needs=["train", "side"]),
        fpipe.Layer(noted),
        fpipe.Layer(noted, needs=["key"]),
    ]
    make(layers)(((), (), ()), jnp.ones((2, 1)), side=jnp.ones((2, 3)), train=True)
    assert [set(needs) for needs in seen] == [{"train", "side"}, set(), {"key"}]
    assert seen[0]["train"] is True
    assert seen[0]["side"].shape == (2, 3)
    assert seen[2]["key"] is None


RUNNABLE = [
    c
    for c, (f, needs) in NEEDS.items()
    if set(needs) <= {"key", "train"} and f is not max
]


@pytest.mark.parametrize(
    ("case", "make"),
    [
        *((case, fpipe.Pipe) for case in RUNNABLE),
        *((case, fpipe.sequential) for case in RUNNABLE[::4]),
    ],
)
def test_functions_of_every_kind_run(make, case):
    f, needs = NEEDS[case]
    pipe, x = make([f]), jnp.arange(1.0, 4).reshape(3, 1)
    params = pipe.place((jnp.float32(2),))
    assert_same(
        pipe(params, x),
        f(params[0], x, **{n: {"key": None, "train": False}[n] for n in needs}),
    )


# --- what is refused ---


def one(x):
    return x


def nothing():
    return 0


def three(params, x, scale):
    return x * scale


def positional(params, x, key):
    return x


def unknown(params, x, *, rng):
    return x


def carried(params, x, *, carry):
    return x, carry


HEAD = "the needs are carry, state, key, train, borrowed, side, step"
STRING = "where a list of names belongs: write ['skip']"
NO_STATE = (
    "layer 'plain' has init_state, finish, state_rows or overwrite but its function "
    "has no keyword-only parameter `state`"
)


def no_params(name):
    """The error of a function without parameters of its own, given as a layer."""
    return (
        f"layer {name!r} takes 1 positional parameter(s), but it is called as "
        f"`f(params, x)`; for a function without parameters write `fpipe.fn({name})`"
    )


REFUSED = {
    "no function": (
        lambda: fpipe.Layer(untyped(3)),
        "`fpipe.Layer(apply=...)`: 3 is not callable",
    ),
    "nothing": (
        lambda: fpipe.Layer(untyped(None)),
        "`fpipe.Layer(apply=...)`: None is not callable",
    ),
    "init": (
        lambda: fpipe.Layer(plain, untyped("no")),
        "`fpipe.Layer(init=...)`: 'no' is not callable",
    ),
    "init_state": (
        lambda: fpipe.Layer(plain, init_state=untyped(0)),
        "`fpipe.Layer(init_state=...)`: 0 is not callable",
    ),
    "finish": (
        lambda: fpipe.Layer(plain, finish=untyped(0)),
        "`fpipe.Layer(finish=...)`: 0 is not callable",
    ),
    "name": (
        lambda: fpipe.Layer(plain, name=untyped(3)),
        "`fpipe.Layer(name=...)`: a name must be a string, got 3",
    ),
    "stash is a string": (
        lambda: fpipe.Layer(carried, stash=untyped("skip")),
        f"`fpipe.Layer(stash=...)` of layer 'carried': got the string 'skip' {STRING}",
    ),
    "pop is a string": (
        lambda: fpipe.Layer(carried, pop=untyped("skip")),
        f"`fpipe.Layer(pop=...)` of layer 'carried': got the string 'skip' {STRING}",
    ),
    "peek is a string": (
        lambda: fpipe.Layer(carried, peek=untyped("skip")),
        f"`fpipe.Layer(peek=...)` of layer 'carried': got the string 'skip' {STRING}",
    ),
    "borrow is a string": (
        lambda: fpipe.Layer(carried, borrow=untyped("skip")),
        f"`fpipe.Layer(borrow=...)` of layer 'carried': got the string 'skip' {STRING}",
    ),
    "needs is a string": (
        lambda: fpipe.Layer(carried, needs=untyped("skip")),
        f"`fpipe.Layer(needs=...)` of layer 'carried': got the string 'skip' {STRING}",
    ),
    "skippable with a string": (
        lambda: fpipe.skippable(pop="skip"),
        f"`fpipe.skippable(pop=...)`: got the string 'skip' {STRING}",
    ),
    "a number for names": (
        lambda: fpipe.Layer(carried, stash=untyped(3)),
        "`fpipe.Layer(stash=...)` of layer 'carried': a list of names belongs here, "
        "got 3",
    ),
    "a number for a name": (
        lambda: fpipe.Layer(carried, pop=untyped([3])),
        "`fpipe.Layer(pop=...)` of layer 'carried': names must be strings, got 3",
    ),
    "needs that are none": (
        lambda: fpipe.Layer(plain, needs=["rng", "key", "mask"]),
        f"layer 'plain': ['rng', 'mask'] are no needs; {HEAD}",
    ),
    "skips without carry": (
        lambda: fpipe.skippable(stash=["a"])(plain),
        "layer 'plain' declares skips but its function has no keyword-only parameter "
        "`carry`: "
        "write `def plain(params, x, *, carry)` and return `(y, carry)`",
    ),
    "borrow without borrowed": (
        lambda: fpipe.Layer(plain, borrow=("embed",)),
        "layer 'plain' borrows ['embed'] but its function has no keyword-only "
        "parameter `borrowed`: "
        "write `def plain(params, x, *, borrowed)`",
    ),
    "init_state without state": (
        lambda: fpipe.Layer(plain, init_state=lambda x: 0),
        f"{NO_STATE}: write `def plain(params, x, *, state)` and return `(y, state)`",
    ),
    "finish without state": (
        lambda: fpipe.Layer(plain, finish=one),
        NO_STATE,
    ),
    "a positional need": (
        lambda: fpipe.Layer(positional),
        "layer 'positional': the need 'key' is a positional parameter; make it "
        "keyword-only, after a bare `*`: "
        "`def positional(params, x, *, key)`",
    ),
    "an init as layer": (
        lambda: fpipe.Layer(lambda key, x: x, plain, "dense"),
        "layer 'dense': `dense(key, x)` looks like an init: a layer is called as "
        "`f(params, x)`, and its init is the second "
        "argument, `fpipe.Layer(f, init)`",
    ),
    "an unknown keyword": (
        lambda: fpipe.Layer(unknown),
        "layer 'unknown': the keyword-only parameter 'rng' has no default and is no "
        f"need; {HEAD}. "
        "Bind it with functools.partial",
    ),
    "one parameter": (
        lambda: fpipe.Layer(one),
        no_params("one"),
    ),
    "one parameter, bare": (
        lambda: fpipe.sequential([jnp.tanh]),
        no_params("tanh"),
    ),
    "no parameter": (
        lambda: fpipe.Layer(nothing),
        "layer 'nothing' takes 0 positional parameter(s), but it is called as "
        "`f(params, x)`",
    ),
    "three parameters": (
        lambda: fpipe.Layer(three),
        "layer 'three': a layer is `f(params, x, **needs)`, but ['scale'] are required "
        "positional parameters too; "
        "bind them with functools.partial",
    ),
    "fn of a number": (
        lambda: fpipe.fn(untyped(3)),
        "`fpipe.fn(f)`: 3 is not callable",
    ),
    "fn of no parameter": (
        lambda: fpipe.fn(nothing),
        "layer 'nothing' takes 0 positional parameter(s), but it is called as `f(x)`",
    ),
    "fn of two parameters": (
        lambda: fpipe.fn(plain),
        "layer 'plain': a layer is `f(x, **needs)`, but ['x'] are required positional "
        "parameters too; "
        "bind them with functools.partial",
    ),
    "fn with a positional need": (
        lambda: fpipe.fn(lambda x, train: x, name="drop"),
        "layer 'drop': the need 'train' is a positional parameter; make it "
        "keyword-only, after a bare `*`: "
        "`def drop(x, *, train)`",
    ),
    "a number as layer": (
        lambda: fpipe.Pipe([fpipe.fn(one), [3]]),
        "a layer is a function or an fpipe.Layer, got int: 3",
    ),
    "a string as layers": (
        lambda: fpipe.sequential("abc"),
        "a layer is a function or an fpipe.Layer, got str: 'abc'",
    ),
    "a dict as layers": (
        lambda: fpipe.sequential({"a": one}),
        "a layer is a function or an fpipe.Layer, got dict: {'a': ",
    ),
    "an array as layer": (
        lambda: fpipe.sequential(untyped(np.ones(2))),
        "a layer is a function or an fpipe.Layer, got ndarray: float64[2]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_layer_is_refused_in_words(case):
    build, text = REFUSED[case]
    with pytest.raises(TypeError) as error:
        build()
    message = str(error.value)
    assert message.startswith(text)
    assert text.endswith((": ", "`state`")) or message == text


@pytest.mark.parametrize("field", ["stash", "pop", "peek", "borrow", "needs"])
def test_a_name_that_is_there_twice_is_refused(field):
    given = untyped({field: ["a", "b", "a"]})
    text = (
        f"`fpipe.Layer({field}=...)` of layer 'carried': a name occurs twice in "
        "['a', 'b', 'a']"
    )
    with raises(ValueError, text):
        fpipe.Layer(carried, **given)


@both
def test_a_model_without_layers_is_refused(make):
    with raises(ValueError, "a pipeline needs at least one layer, got none"):
        make([[], ()])


# --- fn, names, the record ---


def test_fn_makes_a_layer_without_parameters_of_any_function():
    layer = fpipe.fn(jnp.tanh)
    assert (layer.name, layer.needs) == ("tanh", ())
    model = fpipe.sequential([layer, fpipe.fn(functools.partial(jnp.clip, max=0.5))])
    x = jnp.array([[0.2], [3.0]])
    params = model.init(jax.random.key(0), x)
    assert params == ((), ())
    assert_same(model(params, x), jnp.minimum(jnp.tanh(x), 0.5))


@both
def test_fn_hands_over_the_needs(make):
    @fpipe.skippable(stash=["s"])
    @fpipe.fn
    def first(x, *, carry, key, train):
        y = jax.random.uniform(key, x.shape) if train else x
        return y, fpipe.stash(carry, "s", x)

    @fpipe.fn
    def second(x, *, state, side):
        return x * side, state + 1

    third = fpipe.skippable(pop=["s"])(
        fpipe.fn(lambda x, *, carry: (x + carry["s"], {}), name="third")
    )
    assert [layer.needs for layer in (first, second, third)] == [
        ("carry", "key", "train"),
        ("state", "side"),
        ("carry",),
    ]
    x, side = jnp.arange(1.0, 4).reshape(3, 1), jnp.full((3, 1), 3.0)
    pipe, key = make([first, second, third]), jax.random.key(5)
    args = {"side": side, "key": key, "state": (None, jnp.int32(4), None)}
    assert_same(pipe(((), (), ()), x, **args), (x * 3 + x, (None, jnp.int32(5), None)))
    random = jax.random.uniform(
        jax.random.fold_in(jax.random.fold_in(key, 0), 0), x.shape
    )
    assert_same(
        pipe(((), (), ()), x, **args, train=True),
        (random * 3 + x, (None, jnp.int32(5), None)),
    )


NAMES = {
    "a function": (plain, "plain"),
    "a lambda": (lambda params, x: x, "<lambda>"),
    "a partial": (
        functools.partial(functools.partial(configured, 2.0), key=None),
        "configured",
    ),
    "a jitted function": (jax.jit(plain), "plain"),
    "a callable object": (Unit(), "Unit"),
    "a method": (Unit().method, "method"),
    "a layer": (fpipe.Layer(plain, name="my name"), "my name"),
    "fn": (fpipe.fn(jnp.sin), "sin"),
    "fn with a name": (fpipe.fn(jnp.sin, "wave"), "wave"),
    "fn of a partial": (fpipe.fn(functools.partial(jnp.clip, max=1)), "clip"),
    "skippable": (fpipe.skippable()(plain), "plain"),
}


@pytest.mark.parametrize("case", NAMES)
def test_a_layer_is_called_what_a_person_would_call_it(case):
    value, name = NAMES[case]
    assert fpipe.Pipe([value]).layers[0].name == name


def test_nested_layers_are_flattened_and_keep_their_names():
    layers = [
        fpipe.fn(one, "a"),
        [fpipe.fn(one, "b"), (plain, [[fpipe.fn(one, "c")]])],
        iter([fpipe.fn(one, "d")]),
    ]
    assert [layer.name for layer in fpipe.Pipe(layers).layers] == [
        "a",
        "b",
        "plain",
        "c",
        "d",
    ]


def test_a_layer_can_be_called_like_its_function():
    assert float(fpipe.Layer(trained)(2.0, 3.0, key=None, train=True)) == 6.0
    assert float(fpipe.fn(optional_fn)(None, 3.0, train=True)) == 6.0


def optional_fn(x, *, train=False):
    return 2 * x if train else x


def test_a_layer_is_a_frozen_value():
    layer = fpipe.Layer(plain, name="a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.name = "b"  # pyright: ignore[reportAttributeAccessIssue]
    assert layer == fpipe.Layer(plain, name="a") != fpipe.Layer(plain, name="b")
    assert len({layer, fpipe.Layer(plain, name="a"), fpipe.fn(one), fpipe.fn(one)}) == 2
    assert pickle.loads(pickle.dumps([layer, fpipe.fn(one)])) == [layer, fpipe.fn(one)]


def test_skippable_adds_to_what_a_layer_declares():
    layer = fpipe.Layer(carried, name="x", stash=("a",), peek=("b",))
    more = fpipe.skippable(stash=["c"], pop=iter(["d"]))(layer)
    assert (more.stash, more.pop, more.peek, more.name) == (
        ("a", "c"),
        ("d",),
        ("b",),
        "x",
    )


@pytest.mark.parametrize(
    ("wrap", "call"), [(fpipe.Layer, "fpipe.Layer(f)"), (fpipe.fn, "fpipe.fn(f)")]
)
def test_a_layer_around_a_layer_would_lose_what_the_inner_one_declares(wrap, call):
    inner = fpipe.Layer(plain, lambda key, x: jnp.ones(3), "inner")
    text = (
        f"`{call}`: 'inner' is an fpipe.Layer already, and its init, state, skips and "
        "borrowed parameters would be lost: use "
        "it as it is; `dataclasses.replace(layer, name=...)` changes a part of it"
    )
    with raises(TypeError, text):
        wrap(inner)


# --- init, state, finish ---


class Stats(NamedTuple):
    total: jax.Array
    calls: jax.Array


def init_stats(x):
    return Stats(jnp.zeros(x.shape[1:], x.dtype), jnp.int32(0))


def count(params, x, *, state):
    return x + state.total, Stats(state.total + x.sum(0), state.calls + 1)


@both
def test_finish_maps_the_state_once_at_the_end_of_a_call(make):
    layers = [
        fpipe.Layer(
            count,
            init_state=init_stats,
            finish=lambda s: Stats(s.total * 10, s.calls + 100),
        ),
        plain,
    ]
    pipe, x = make(layers, chunks=4), jnp.arange(1.0, 5).reshape(4, 1)
    params, state = (
        pipe.place(((), jnp.ones(1))),
        pipe.init_state(x, params=((), jnp.ones(1))),
    )
    want = (Stats(jnp.array([100.0]), jnp.int32(104)), None)
    y, got = pipe(params, x, state=state)
    assert_same(got, want)
    assert_same(
        y, jnp.array([[1.0], [3.0], [6.0], [10.0]])
    )  # no microbatch saw what finish made
    (loss, got), _ = pipe.value_and_grad(jnp.mean)(params, x, state=state)
    assert_same((loss, got), (jnp.float32(5), want))
    loss, got = pipe.evaluate(jnp.mean)(
        params, x, state=got
    )  # the next call starts from it
    assert_same(got, (Stats(jnp.array([1100.0]), jnp.int32(208)), None))
    assert float(loss) == 105.0


@both
def test_an_error_in_finish_says_where(make):
    def finish(state):
        raise KeyError("finish me")

    pipe = make([plain, fpipe.Layer(count, finish=finish, name="norm")])
    with pytest.raises(KeyError, match="finish me") as error:
        pipe(
            pipe.place((jnp.ones(1), ())),
            jnp.ones((2, 1)),
            state=(None, init_stats(jnp.ones((2, 1)))),
        )
    assert notes(error) == ["fpipe: in the finish of layer 1 'norm'"]


@both
def test_an_init_gets_the_zeros_of_a_microbatch_and_the_needs_that_it_names(make):
    def stash(params, x, *, carry):
        return jnp.concatenate([x, x], 1), fpipe.stash(
            carry, "skip", {"half": x[:, :1], "tag": "t"}
        )

    def pop(params, x, *, carry, borrowed, side, train):
        skip, carry = fpipe.pop(carry, "skip")
        return x * borrowed["first"].sum() + skip["half"], carry

    seen = []

    def init(key, x, *, train, borrowed, carry, side):
        seen.append((key, x, train, borrowed, carry, side))
        return jax.random.normal(key, (x.shape[1], 2))

    layers = [
        fpipe.Layer(
            stash, lambda key, x: jax.random.normal(key, (3,)), "first", stash=("skip",)
        ),
        fpipe.Layer(pop, init, "second", pop=("skip",), borrow=("first",)),
    ]
    key, x = jax.random.key(7), jnp.ones((10, 2))
    params = make(layers, chunks=4).init(key, x, side=jnp.ones((10, 5), jnp.int32))
    want = tuple(
        jax.random.normal(jax.random.fold_in(key, k), shape)
        for k, shape in enumerate([(3,), (4, 2)])
    )
    assert_same(params, want)
    own, x, train, borrowed, carry, side = seen[-1]
    assert own == jax.random.fold_in(key, 1)
    assert train is False
    tag = carry["skip"].pop("tag")
    assert tag == "t"
    zeros = (
        jnp.zeros((3, 4)),
        {"first": jnp.zeros(3)},
        {"skip": {"half": jnp.zeros((3, 1))}},
    )
    assert_same((x, borrowed, carry, side), (*zeros, jnp.zeros((3, 5), jnp.int32)))


@both
def test_an_init_state_gets_the_needs_that_it_names(make):
    def apply(params, x, *, state, side):
        return x, state

    def init_state(x, *, side):
        return {"x": x + 1, "side": side + 2}

    layer = fpipe.Layer(
        apply, lambda key, x: (), init_state=init_state, state_rows=False
    )
    pipe = make([layer], chunks=2)
    (state,) = pipe.init_state(jnp.ones((4, 1)), side=jnp.ones((4, 3), jnp.int32))
    assert_same(state, {"x": jnp.ones((2, 1)), "side": jnp.full((2, 3), 2, jnp.int32)})


@both
def test_an_init_state_that_names_key_gets_that_of_its_layer(make):
    layer = fpipe.Layer(
        count,
        lambda key, x: (),
        init_state=lambda x, *, key: Stats(jax.random.normal(key, (1,)), jnp.int32(0)),
    )
    key = jax.random.key(3)
    for given, base in (({"key": key}, key), ({}, jax.random.key(0))):
        state = make([layer, layer]).init_state(jnp.ones((2, 1)), **given)
        want = tuple(
            Stats(jax.random.normal(jax.random.fold_in(base, k), (1,)), jnp.int32(0))
            for k in range(2)
        )
        assert_same(state, want, 0.0)


@both
def test_numbers_of_an_init_become_arrays(make):
    layer = fpipe.Layer(
        lambda p, x, *, state: (x * p["a"], state),
        lambda key, x: {"a": 2.0, "b": 3},
        init_state=zero,
    )
    pipe = make([layer])
    x = jnp.ones((2, 1))
    (params,), (state,) = pipe.init(jax.random.key(0), x), pipe.init_state(x)
    assert_same(
        (params, state), ({"a": jnp.float32(2), "b": jnp.int32(3)}, jnp.int32(0))
    )


def zero(x):
    return 0


def fails(*args):
    raise ZeroDivisionError("in my init")


@both
def test_errors_of_init_say_which_layer(make):
    x = jnp.ones((2, 1))
    with raises(ZeroDivisionError, "in my init") as error:
        make([fpipe.fn(one), fpipe.Layer(plain, fails)]).init(jax.random.key(0), x)
    assert notes(error) == ["fpipe: in the init of layer 1 'plain'"]
    with raises(ZeroDivisionError, "in my init") as error:
        make(
            [fpipe.fn(one), fpipe.Layer(count, lambda key, x: (), init_state=fails)]
        ).init_state(x)
    assert notes(error) == ["fpipe: in the init_state of layer 1 'count'"]
    with pytest.raises(
        TypeError, match=r"takes 1 positional argument but 2 were given"
    ) as error:
        make([fpipe.Layer(plain, untyped(lambda x: ()))]).init(jax.random.key(0), x)
    assert notes(error) == ["fpipe: in the init of layer 0 'plain'"]


@both
def test_an_error_of_a_layer_while_the_shapes_are_told_says_which(make):
    def bad(x):
        raise MyError(1, "shapes")

    with raises(MyError, "shapes") as error:
        make([fpipe.fn(one), fpipe.fn(bad), fpipe.fn(one)]).init(
            jax.random.key(0), jnp.ones((2, 1))
        )
    assert notes(error) == ["fpipe: in layer 1 'bad'"]


@both
def test_a_layer_without_init_is_told_what_to_do(make):
    x = jnp.ones((2, 1))
    text = (
        "layer 1 'plain' has no init; give it one with `fpipe.Layer(apply, init)`, "
        "write `fpipe.fn(f)` for a function "
        "without parameters, or make the parameters yourself and call `place(params)` "
        "(and `init_state(x, params=params)`)"
    )
    with raises(ValueError, text):
        make([fpipe.fn(one), plain]).init(jax.random.key(0), x)
    with raises(ValueError, text):
        make(
            [fpipe.fn(one), plain, fpipe.Layer(count, init_state=init_stats)]
        ).init_state(x)
    text = (
        "`init_state`: layer 0 'count' has state but no init_state; give it one with "
        "`fpipe.Layer(apply, init_state=...)`"
    )
    with raises(ValueError, text):
        make([fpipe.Layer(count, lambda key, x: ())]).init_state(x)


@both
def test_an_init_that_names_a_need_that_it_cannot_get_is_refused_in_words(make):
    layer = fpipe.Layer(count, lambda key, x: (), init_state=lambda x, *, state: ())
    with raises(
        TypeError,
        "the init_state of layer 0 'count' names the need 'state'; it can name "
        "borrowed, carry, side, step, train, key",
    ):
        make([layer]).init_state(jnp.ones((2, 1)))


CHANGED = {
    "shape": (lambda s: jnp.stack([s, s]), "float32[2,1]"),
    "dtype": (lambda s: s.astype(jnp.bfloat16), "bfloat16[1]"),
    "structure": (lambda s: {"s": s}, "{'s': float32[1]}"),
    "nothing": (lambda s: None, "None"),
    "static": (lambda s: 3, "3"),
}


@both
@pytest.mark.parametrize("how", CHANGED)
def test_a_state_that_changes_its_type_is_refused(make, how):
    change, got = CHANGED[how]
    pipe = make(
        [
            fpipe.fn(one),
            fpipe.Layer(lambda p, x, *, state: (x, change(state)), name="norm"),
        ]
    )
    text = (
        f"layer 1 'norm' got the state float32[1] and returned {got}; a state keeps "
        "its structure, shapes and dtypes"
    )
    with raises(TypeError, text):
        pipe(((), ()), jnp.ones((2, 1)), state=(None, jnp.zeros(1)))


@both
def test_a_state_that_changes_its_type_says_in_which_microbatch(make):
    layers = [
        fpipe.fn(one),
        fpipe.Layer(
            lambda p, x, *, state: (x, state.at[0].set(1)[: x.shape[0]]), name="norm"
        ),
    ]
    with pytest.raises(
        TypeError, match="a state keeps its structure, shapes and dtypes"
    ) as error:
        make(layers, chunks=2)(((), ()), jnp.ones((3, 1)), state=(None, jnp.zeros(2)))
    assert notes(error) == [
        f"fpipe: in layer 1 'norm'{', stage 1' if make is fpipe.Pipe else ''}, "
        "microbatch 1"
    ]


@both
def test_a_weakly_typed_state_keeps_its_type(make):
    pipe = make(
        [fpipe.Layer(lambda p, x, *, state: (x * state, jnp.asarray(3)))], chunks=3
    )
    y, (state,) = pipe(((),), jnp.ones((3, 1), jnp.int32), state=(1,))
    assert_same((y, state), (jnp.array([[1], [3], [3]]), jnp.int32(3)))
    assert not state.weak_type


@both
def test_no_gradient_goes_through_a_state(make):
    pipe, x = (
        make([fpipe.Layer(count), plain], chunks=3),
        jnp.arange(1.0, 4).reshape(3, 1),
    )
    params, state = pipe.place(((), jnp.ones(1))), (init_stats(x), None)

    def output(x):
        return (
            pipe(params, x, state=state)[0] * jnp.array([[2.0], [3.0], [4.0]])
        ).sum()

    def new_state(x):
        return pipe(params, x, state=state)[1][0].total.sum()

    assert_same(jax.grad(output)(x), jnp.array([[2.0], [3.0], [4.0]]))
    assert_same(jax.grad(new_state)(x), jnp.zeros((3, 1)))


# --- what a layer returns ---


class Pair(NamedTuple):
    y: Any
    state: Any


RETURNS = {
    "y alone": ("state", lambda x: x, "state", "(y, state)", "float32[2,1], no tuple"),
    "nothing": ("carry", lambda x: None, "carry", "(y, carry)", "None, no tuple"),
    "a list": (
        "state",
        lambda x: [x, x],
        "state",
        "(y, state)",
        "[float32[2,1], float32[2,1]], no tuple",
    ),
    "a named tuple": (
        "state",
        lambda x: Pair(x, x),
        "state",
        "(y, state)",
        "Pair(y=float32[2,1], state=float32[2,1]), no tuple",
    ),
    "three": ("carry", lambda x: (x, {}, x), "carry", "(y, carry)", "a tuple of 3"),
    "no state": (
        "carry state",
        lambda x: (x, {}),
        "carry and state",
        "(y, carry, state)",
        "a tuple of 2",
    ),
}


@both
@pytest.mark.parametrize("case", RETURNS)
def test_a_layer_that_returns_the_wrong_arity_is_refused(make, case):
    needs, result, declared, form, got = RETURNS[case]
    layer = fpipe.Layer(
        lambda p, x, **needs: result(x), name="bad", needs=needs.split()
    )
    state = (None, jnp.zeros(1)) if "state" in needs else None
    text = (
        f"layer 1 'bad' declares {declared} and must return `{form}`, but returned "
        f"{got}"
    )
    with raises(TypeError, text) as error:
        make([fpipe.fn(one), layer])(((), ()), jnp.ones((2, 1)), state=state)
    assert notes(error) == [
        f"fpipe: in layer 1 'bad'{', stage 1' if make is fpipe.Pipe else ''}, "
        "microbatch 0"
    ]


@both
def test_a_layer_without_needs_may_return_a_tuple(make):
    pipe = make(
        [
            fpipe.fn(lambda x: (x, 2 * x)),
            fpipe.fn(lambda pair: (pair[0] + pair[1], pair[1], None)),
        ]
    )
    assert_same(
        pipe(((), ()), jnp.ones((2, 1))),
        (jnp.full((2, 1), 3.0), jnp.full((2, 1), 2.0), None),
    )


# --- errors inside a layer ---


class MyError(Exception):
    """An exception of the user's, with an argument that must survive."""

    def __init__(self, number, text):
        super().__init__(text)
        self.number = number


def notes(error):
    return [
        note
        for note in getattr(error.value, "__notes__", ())
        if note.startswith("fpipe: ")
    ]


def modes(pipe, params, x):
    """Every way to run a pipe forwards."""
    return {
        "call": lambda: pipe(params, x),
        "evaluate": lambda: pipe.evaluate(jnp.mean)(params, x),
        "value_and_grad": lambda: pipe.value_and_grad(jnp.mean, argnums=1)(params, x),
        "grad": lambda: jax.grad(lambda x: pipe(params, x).mean())(x),
        "jit": lambda: jax.jit(pipe)(params, x),
    }


@pytest.mark.parametrize("microbatch", [0, 2])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_error_in_any_stage_and_microbatch_keeps_its_type_and_says_where(
    stage, microbatch
):
    armed = [True]

    def bad(x):
        # Only the last of the microbatches 2, 2, 1 has one row.
        if armed[0] and (x.shape[0] == 1) == (microbatch == 2):
            raise MyError(7, "mine")
        return x * 2

    layers: list[Any] = [fpipe.fn(one, "good")] * 6
    layers[2 * stage + 1] = fpipe.fn(bad)
    pipe, x = (
        fpipe.Pipe(layers, [2, 2, 2], chunks=3, checkpoint="always"),
        jnp.ones((5, 1)),
    )
    runs = modes(pipe, ((),) * 6, x)
    for mode in ("call", "evaluate", "value_and_grad", "grad", "call"):
        with raises(MyError, "mine") as error:
            runs[mode]()
        assert error.value.number == 7
        assert notes(error) == [
            f"fpipe: in layer {2 * stage + 1} 'bad', stage {stage}, microbatch "
            f"{microbatch}"
        ]
    armed[0] = False
    assert_same(runs["call"](), x * 2)
    assert_same(runs["value_and_grad"]()[1], jnp.full((5, 1), 0.4))


@pytest.mark.parametrize("mode", ["call", "evaluate", "value_and_grad", "grad", "jit"])
def test_an_error_in_the_reference_says_where(mode):
    def bad(x):
        if x.shape[0] == 1:
            raise MyError(7, "mine")
        return x

    model = fpipe.sequential([fpipe.fn(one), fpipe.fn(bad)], chunks=3)
    with raises(MyError, "mine") as error:
        modes(model, ((), ()), jnp.ones((5, 1)))[mode]()
    assert notes(error) == ["fpipe: in layer 1 'bad', microbatch 2"]


JAX_ERRORS = {
    "shapes": (lambda x: x @ jnp.ones((5, 5)), TypeError, "dot_general"),
    "promotion": (
        lambda x: x + jnp.ones((1,), jnp.int32),
        ValueError,
        "implicit dtype promotion",
    ),
    "a decision": (
        lambda x: x if x.sum() > 0 else -x,
        jax.errors.TracerBoolConversionError,
        "traced array",
    ),
}


@pytest.mark.parametrize("case", JAX_ERRORS)
def test_errors_of_jax_keep_type_and_message(case):
    f, kind, text = JAX_ERRORS[case]
    pipe = fpipe.Pipe([fpipe.fn(one), fpipe.fn(f, "bad")])
    with pytest.raises(kind, match=text) as error:
        pipe(((), ()), jnp.ones((2, 1)))
    assert notes(error) == ["fpipe: in layer 1 'bad', stage 1, microbatch 0"]


def test_an_error_in_a_backward_says_where():
    @jax.custom_vjp
    def f(x):
        return x

    def backward(_, g):
        raise MyError(3, "backwards")

    f.defvjp(lambda x: (x, None), backward)
    pipe = fpipe.Pipe(
        [fpipe.fn(jnp.sin, "a"), fpipe.fn(f, "b"), fpipe.fn(one, "c")], [1, 2]
    )
    with raises(MyError, "backwards") as error:
        pipe.value_and_grad(jnp.mean, argnums=1)(((),) * 3, jnp.ones((2, 1)))
    assert notes(error) == [
        "fpipe: in the backward of layers 1 'b', 2 'c', stage 1, microbatch 0"
    ]


@both
def test_an_error_in_the_loss_says_so(make):
    def loss(y, t):
        raise MyError(2, "no loss")

    stage = ", stage 1" if make is fpipe.Pipe else ""
    with raises(MyError, "no loss") as error:
        make([fpipe.fn(one), fpipe.fn(one)]).value_and_grad(loss)(
            ((), ()), jnp.ones((2, 1)), jnp.ones((2, 1))
        )
    assert notes(error) == [f"fpipe: in loss_fn{stage}, microbatch 0"]


impossible = Primitive("impossible")
impossible.def_abstract_eval(lambda x: x)


def test_an_error_of_the_compiler_says_what_was_dispatched():
    pipe = fpipe.Pipe(
        [fpipe.fn(one), fpipe.fn(impossible.bind, "bad"), fpipe.fn(one)],
        [1, 2],
        chunks=2,
    )
    with pytest.raises(NotImplementedError, match="impossible") as error:
        pipe(((),) * 3, jnp.ones((2, 1)))
    where = f"stage 1 (layers 1 'bad', 2 'one'), microbatch 0, on {pipe.devices[1]}"
    assert notes(error) == [f"fpipe: while dispatching the forward of {where}"]


@pytest.mark.parametrize("stage", [0, 2])
def test_an_error_while_running_ends_the_call_and_the_pipe_works_afterwards(stage):
    def check(x):
        if (x < 0).any():
            raise MyError(1, "negative on the host")
        return x

    def bad(x):
        return jax.pure_callback(check, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    layers: list[Any] = [fpipe.fn(one)] * 3
    layers[stage] = fpipe.fn(bad)
    pipe, x = fpipe.Pipe(layers, chunks=2), jnp.ones((4, 1))
    # The type is JAX's; it depends on whether the runtime was still in the call that
    # dispatched the program.
    with pytest.raises(
        (jax.errors.JaxRuntimeError, ValueError), match="MyError: negative on the host"
    ):
        pipe(((),) * 3, x.at[3].set(-1)).block_until_ready()
    assert_same(pipe(((),) * 3, x), x)


# --- borrowed parameters ---


def borrowing(params, x, *, borrowed):
    return x * borrowed["a"]


def lender(name):
    return fpipe.Layer(plain, lambda key, x: jnp.ones(1), name)


BORROWS = {
    "nobody": (
        [lender("b"), ("a",)],
        "layer 1 'user' borrows 'a', but no layer has that name; unique names are "
        "['b', 'user']",
    ),
    "two": (
        [lender("a"), lender("b"), lender("a"), ("a",)],
        "layer 3 'user' borrows 'a', but 2 layers have that name; unique names are "
        "['b', 'user']",
    ),
    "itself": (
        [("user",)],
        "layer 0 'user' borrows from itself; its own parameters are `params`",
    ),
}


@both
@pytest.mark.parametrize("case", BORROWS)
def test_a_borrow_that_cannot_be_is_refused(make, case):
    layers, text = BORROWS[case]
    *rest, names = layers
    with raises(ValueError, text):
        make([*rest, fpipe.Layer(borrowing, name="user", borrow=names)])


@both
def test_a_borrower_before_the_owner_needs_parameters_that_are_made_already(make):
    pipe = make(
        [fpipe.Layer(borrowing, lambda key, x: (), "user", borrow=("a",)), lender("a")],
        chunks=2,
    )
    text = (
        "`init`: layer 0 'user' borrows from ['a'], which come later; let the first "
        "user own the parameters and the "
        "later one borrow them, or make them yourself and call `place`"
    )
    x = jnp.ones((2, 1))
    with raises(ValueError, text):
        pipe.init(jax.random.key(0), x)
    params = pipe.place(((), jnp.full(1, 3.0)))
    loss, grads = pipe.value_and_grad(jnp.mean)(params, x)
    assert_same(
        (loss, grads), (jnp.float32(9), ((), jnp.array([6.0])))
    )  # of a², summed at the owner


@both
def test_a_layer_sees_only_what_it_borrows(make):
    seen = []

    def user(params, x, *, borrowed):
        seen.append(borrowed)
        return x

    owners = [lender("a"), lender("b"), lender("c")]
    pipe = make([*owners, fpipe.Layer(user, name="user", borrow=("c", "a"))])
    pipe(pipe.place((jnp.ones(1), jnp.ones(1), jnp.ones(1), ())), jnp.ones((2, 1)))
    chex.assert_trees_all_equal_structs(seen[0], {"c": 0, "a": 0})


@both
def test_a_layer_that_asks_for_borrowed_and_borrows_nothing_gets_an_empty_dict(make):
    seen = []

    def user(params, x, *, borrowed):
        seen.append(borrowed)
        return x

    make([user])(((),), jnp.ones((2, 1)))
    assert seen == [{}]


# --- callables with arrays ---


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """A module that is a pytree, as those of Equinox are."""

    w: jax.Array

    def __call__(self, x, *, key=None):
        return x @ self.w

    def twice(self, x):
        return 2 * self(x)


class LikeEquinox(Linear):
    pass


LikeEquinox.__module__ = "equinox.nn"
jax.tree_util.register_dataclass(LikeEquinox)
LINEAR = Linear(jnp.full((3, 3), 0.123))
WITH_ARRAYS = {
    "a module": (LINEAR, "a Linear is a pytree with arrays"),
    "in a partial": (functools.partial(LINEAR, key=None), "a Linear is a pytree"),
    "under vmap": (jax.vmap(LINEAR), "a Linear is a pytree"),
    "deep": (jax.jit(jax.vmap(functools.partial(LINEAR))), "a Linear is a pytree"),
    "a method": (LINEAR.twice, "a Linear is a pytree"),
    "a Partial": (jax.tree_util.Partial(jnp.matmul, jnp.eye(3)), "a Partial is a py"),
    "of Equinox": (LikeEquinox(jnp.eye(3)), "`params, static = eqx.partition("),
    "of NNX, in a partial": (
        functools.partial(nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
        "a Linear is a Flax module",
    ),
    "of linen, under jit": (jax.jit(nn.Dense(3)), "a Dense is a Flax module"),
}


@pytest.mark.quick
@pytest.mark.parametrize("case", WITH_ARRAYS)
def test_a_callable_with_arrays_is_refused(case):
    f, text = WITH_ARRAYS[case]
    wraps = (fpipe.fn, fpipe.Layer, fpipe.skippable(), lambda f: fpipe.Pipe([f]))
    for wrap in wraps:
        with pytest.raises(TypeError, match=re.escape(text)) as caught:
            wrap(f)
        assert "0.123" not in str(caught.value)


def test_what_the_refusal_says_trains():
    f, x = LINEAR, jnp.arange(12.0).reshape(4, 3)
    layer = fpipe.Layer(lambda f, x: f(x), init=lambda key, x: f)
    pipe = fpipe.Pipe([layer], chunks=2)
    params = pipe.init(jax.random.key(0), x)
    _, (grad,) = pipe.value_and_grad(jnp.mean)(params, x)
    assert_same(grad, jax.grad(lambda f: f(x).mean())(f))
    constant = fpipe.fn(lambda x: f(x))
    assert_same(fpipe.Pipe([constant], chunks=2)(((),), x), f(x))


def test_arrays_that_a_partial_binds_are_constants():
    layer = fpipe.Layer(
        functools.partial(lambda params, x, table: x @ table, table=LINEAR.w)
    )
    assert layer.needs == ()
    assert fpipe.Layer(nn.Dense(3).apply).needs == ()


class Called:
    """An object that is called."""

    def __call__(self, x, *, key=None, side):
        return x


def test_keywords_of_an_object_are_needs_only_without_a_default():
    both = lambda x, *, key=None, side: x  # noqa: E731
    for wrap in (lambda f: f, jax.vmap, jax.jit, functools.partial):
        assert fpipe.fn(wrap(Called())).needs == ("side",)
        assert fpipe.fn(wrap(both)).needs == ("key", "side")
    assert fpipe.fn(functools.partial(Called(), side=1)).needs == ()


def test_needs_override_the_signature_of_a_function_without_parameters():
    assert fpipe.fn(lambda x, *, key=None: x, needs=()).needs == ()
    assert fpipe.fn(Called(), needs=["key"]).needs == ("key",)
    with pytest.raises(TypeError, match="got the string 'key' where a list of names"):
        fpipe.fn(Called(), needs="key")
