"""What may enter a program: arrays, and static leaves that compare by value."""

import collections
import dataclasses
import enum
import fractions
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import fpipe
from fpipe._core.errors import shown
from fpipe._core.pytrees import Shape, describe
from fpipe._core.statics import find_fault

X = jnp.arange(8.0).reshape(4, 2)
MARK = "0.123"  # in each array of what is refused: no message may show it


def scan(layers, **options):
    return fpipe.Pipe(layers, executor="scan", **options)


every = pytest.mark.parametrize("make", [fpipe.sequential, fpipe.Pipe, scan])


class Batch:
    """An object that compares by identity."""

    def __init__(self, t=None):
        self.t = jnp.full(4, 0.123) if t is None else t

    def loss(self, y):
        return y.sum()

    def __repr__(self):
        return f"Batch({self.t})"


@dataclasses.dataclass
class Output:
    """A plain dataclass: it has no hash."""

    hidden: object


@dataclasses.dataclass(frozen=True)
class Config:
    scale: object = 1


@dataclasses.dataclass(frozen=True, eq=False)
class ById:
    scale: int = 1


class Foreign:
    """An array of another library: `==` is by element, the hash is the identity."""

    def __init__(self):
        self.values = np.full(3, 0.123)

    def __array__(self):
        return self.values

    def __eq__(self, other):
        return self.values == other

    def __hash__(self):
        return id(self)


class Mode(enum.Enum):
    A = 1


STATIC = {
    "a number": 1,
    "a string": "a",
    "a function": jnp.tanh,
    "a lambda": lambda y: y,
    "a ufunc": np.sin,
    "a custom derivative": jax.nn.relu,
    "a function under vmap": jax.vmap(jnp.sin),
    "a builtin": abs,
    "a method of a string": "a".upper,
    "a method of a class": dict.fromkeys,
    "a partial of values": functools.partial(jnp.sum, axis=1),
    "a method of a value": Config().__eq__,
    "a dtype": np.dtype("float32"),
    "a scalar type": jnp.float32,
    "an enum": Mode.A,
    "a range": range(3),
    "a spec": jax.P("data"),
    "a fraction": fractions.Fraction(1, 3),
    "a frozen dataclass": Config((1, "a", Config())),
    "a frozen set": frozenset({"a"}),
    "a linen module": nn.Dense(3, kernel_init=nn.initializers.ones),
    "a class": Config,
    "...": ...,
}

# what it is, and words of the message
REFUSED = {
    "an object": (Batch(), "is a Batch, no pytree of arrays"),
    "a plain dataclass": (
        Output(X + 0.123),
        "`jax.tree_util.register_dataclass(Output)`",
    ),
    "a UserDict": (collections.UserDict(a=X + 0.123), "`dict(...)` of it"),
    "a foreign array": (Foreign(), "`numpy.asarray(...)`"),
    "a set": ({1}, "a tuple or a frozenset"),
    "a dataclass by identity": (ById(), "it compares by identity"),
    "a dataclass of an array": (Config(X + 0.123), "register_dataclass(Config)"),
    "a dataclass of an object": (Config((1, Batch())), "Config that holds a Batch"),
    "a frozen set of objects": (frozenset({Batch()}), "that holds a Batch"),
    "a partial of an array": (functools.partial(jnp.add, X), "that binds an array"),
    "a partial of an object": (
        functools.partial(dict, a=Batch()),
        "that binds a Batch",
    ),
    "a method of an object": (Batch().loss, "a method that binds a Batch"),
    "a method under jit": (jax.jit(Batch().loss), "around a Batch"),
    "a method of a list": ([1].append, "that binds a list"),
    "a generator of numbers": (np.random.default_rng(0), "is a Generator"),
    "an array of strings": (np.array(["a", "b", "c", "d"]), "an array of <U1"),
    "an array of objects": (np.array([None] * 4), "an array of object"),
}


@pytest.mark.parametrize("case", STATIC)
def test_values_are_static(case):
    assert find_fault(STATIC[case]) is None


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_value_is_refused(case):
    value, text = REFUSED[case]
    for make in (fpipe.sequential, fpipe.Pipe, scan):
        pipe = make([fpipe.fn(lambda x: x["v"])], chunks=2)
        with pytest.raises(TypeError, match=r"`x\['s'\]` is ") as caught:
            pipe(pipe.place([()]), {"v": X, "s": value})
        assert text in str(caught.value)
        assert MARK not in str(caught.value)


@pytest.mark.quick
@every
def test_an_object_is_refused_wherever_it_enters(make):
    batch, taking = Batch(), fpipe.fn(lambda x, *, side: x, "taking")
    pipe = make([taking, taking], chunks=2)
    params = pipe.place([(), ()])
    step = pipe.value_and_grad(lambda y, *targets: y.sum())
    wrong = {
        "side": lambda: pipe(params, X, side=batch),
        "side['b']": lambda: step(params, X, X, side={"b": batch}),
        "targets[1]": lambda: step(params, X, X, batch, side=X),
        "targets[0][0]": lambda: pipe.evaluate(lambda y, t: y.sum())(
            params, X, (batch, X), side=X
        ),
        "x[1]": lambda: jax.grad(lambda x: pipe(params, (x, batch), side=X).sum())(X),
        "params[1]": lambda: pipe.place([(), batch]),
    }
    if make is not fpipe.sequential:
        wrong |= {
            "targets[0]": lambda: pipe.plan(
                params, X, batch, loss_fn=lambda y, t: y.sum(), side=X
            ),
            "side[0]": lambda: pipe.compile(params, X, side=(batch,)),
        }
    for name, call in wrong.items():
        with pytest.raises(TypeError, match="register_pytree_node") as caught:
            call()
        assert f"`{name}` is a Batch" in str(caught.value)
    with pytest.raises(TypeError, match="`side` is a Batch"):
        pipe.init(jax.random.key(0), X, side=batch)


@every
@pytest.mark.parametrize("value", [Batch, Output, lambda x: collections.UserDict(a=x)])
def test_an_object_that_a_layer_returns_is_refused(make, value):
    layers = [fpipe.fn(lambda x: {"h": value(x)}, "wraps"), fpipe.fn(lambda x: x)]
    pipe = make(layers, chunks=2)
    with pytest.raises(TypeError, match=r"layer 0 'wraps': `y\['h'\]` is an? "):
        pipe(pipe.place([(), ()]), X)


@every
def test_an_object_in_skips_state_and_aux_is_refused(make):
    @fpipe.skippable(stash=["s"])
    def stash(params, x, *, carry):
        return x, fpipe.stash(carry, "s", Batch(x))

    @fpipe.skippable(pop=["s"])
    def pop(params, x, *, carry):
        return x, fpipe.pop(carry, "s")[1]

    pipe = make([stash, pop], chunks=2)
    with pytest.raises(TypeError, match=r"layer 0 'stash': `carry\['s'\]` is a Batch"):
        pipe(pipe.place([(), ()]), X)

    def count(params, x, *, state):
        return x, Batch(state)

    layer = fpipe.Layer(count, init_state=lambda x: jnp.zeros(()))
    pipe = make([layer], chunks=2)
    with pytest.raises(TypeError, match="layer 0 'count': `state` is a Batch"):
        pipe(pipe.place([()]), X, state=(jnp.zeros(()),))
    pipe = make([fpipe.fn(jnp.sin)], chunks=2)
    step = pipe.value_and_grad(lambda y: (y.sum(), {"m": Batch()}), has_aux=True)
    with pytest.raises(TypeError, match=r"`loss_fn`: `aux\['m'\]` is a Batch"):
        step(pipe.place([()]), X)


@every
def test_a_registered_class_is_a_pytree_like_any_other(make):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Registered:
        hidden: jax.Array

    layers = [fpipe.fn(Registered), fpipe.fn(lambda r: r.hidden * 2)]
    pipe = make(layers, chunks=2)
    np.testing.assert_array_equal(pipe(pipe.place([(), ()]), X), X * 2)


@every
def test_equal_dataclasses_of_different_numbers_are_different_leaves(make):
    pipe = make([fpipe.fn(lambda x: x["v"] * len(repr(x["s"].scale)))], chunks=2)
    for scale, factor in [(1, 1), (1.0, 3), (True, 4), (-0.0, 4), (0.0, 3)]:
        for value in (Config(scale), Config((scale,))):
            extra = len(repr(value.scale)) if isinstance(value.scale, tuple) else factor
            y = pipe(pipe.place([()]), {"v": X, "s": value})
            np.testing.assert_array_equal(y, X * extra)
    assert Shape.of(Config((0.0,))) != Shape.of(Config((-0.0,)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1, 2.5, "a", None], "[1, 2.5, 'a', None]"),
        ((1,), "(1,)"),
        ({"a": X, "b": Batch()}, "{'a': float32[4,2], 'b': a Batch}"),
        (np.float32(2), "np.float32(2.0)"),
        (list(range(40)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, …]"),
        ("x" * 300, "'" + "x" * 198 + "…"),
        (functools.partial(jnp.add, X), "functools.partial(the function add, ...)"),
        (Batch, "the class Batch"),
        (jnp.float32, "float32"),
        (Output(X), "an Output"),
    ],
)
def test_a_value_in_an_error_is_short(value, text):
    assert shown(value) == text


def test_a_pytree_in_an_error_shows_no_foreign_repr():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Node:
        a: object
        b: object

        def __repr__(self):
            raise AssertionError

    tree = {"n": Node(X, Batch()), "t": (X, None), "p": collections.OrderedDict(k=1)}
    text = "{'n': Node(a=float32[4,2], b=a Batch), 't': (float32[4,2], None), 'p': "
    assert describe(tree) == text + "OrderedDict(1)}"
