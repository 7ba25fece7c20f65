"""Skips: what is refused while tracing, what `verify_skippables` finds, namespaces, and
values of every kind.
"""

import dataclasses
import functools
import pickle
import re
import subprocess
import sys
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fpipe
from tests.helpers import add, assert_same, dense, keep, look, mse, noise, raises

# What a type checker would refuse is tested here.
untyped: Any = lambda value: value  # noqa: E731
both = pytest.mark.parametrize("make", [fpipe.sequential, fpipe.Pipe])
X = jnp.arange(1.0, 7).reshape(3, 2)


# --- what is refused while tracing ---


@fpipe.skippable(stash=["a"])
@fpipe.fn
def first(x, *, carry):
    return x, fpipe.stash(carry, "a", 2 * x)


@fpipe.skippable(pop=["a"])
@fpipe.fn
def last(x, *, carry):
    value, carry = fpipe.pop(carry, "a")
    return x + value, carry


def stashing(f, *names):
    """A model whose layer 1 stashes `names` with `f`."""
    bad = fpipe.Layer(
        lambda p, x, *, carry: f(x, carry), name="bad", stash=names or ("b",)
    )
    end = fpipe.Layer(lambda p, x, *, carry: (x, {}), name="end", pop=names or ("b",))
    return [first, bad, end, last]


def popping(f):
    """A model whose layer 1 pops "a" with `f`."""
    return [
        first,
        fpipe.Layer(lambda p, x, *, carry: f(x, carry), name="bad", pop=("a",)),
    ]


def peeking(f):
    """A model whose layer 1 peeks at "a" with `f`."""
    return [
        first,
        fpipe.Layer(lambda p, x, *, carry: f(x, carry), name="bad", peek=("a",)),
        last,
    ]


def with_neither(f):
    """A model whose layer 1 has a carry and declares no skip."""
    return [first, fpipe.Layer(lambda p, x, *, carry: f(x, carry), name="bad"), last]


BAD = "layer 1 'bad'"
UNPOPPED = (
    f"{BAD} declares pop=['a'] but never popped 'a': it is still in the carry that it "
    "returned. Write `a, carry = fpipe.pop(carry, 'a')`, or declare it as peek"
)
REPLACED = f"{BAD} declares peek=['a'] but returned another value of 'a'"
NO_PAIR = f"{BAD} declares carry and must return `(y, carry)`, but returned"
WRONG_VALUES = {
    "undeclared stash": (
        stashing(lambda x, c: (x, fpipe.stash(c, "c", x))),
        f"`fpipe.stash(carry, 'c', ...)` in {BAD}: 'c' is not declared as stash there; "
        "add it: `@fpipe.skippable(stash=['b', 'c'])`",
    ),
    "undeclared pop": (
        popping(lambda x, c: fpipe.pop(c, "skip")),
        f"`fpipe.pop(carry, 'skip')` in {BAD}: 'skip' is not declared as pop there; "
        "add it: `@fpipe.skippable(pop=['a', 'skip'])`",
    ),
    "undeclared peek": (
        with_neither(lambda x, c: (fpipe.peek(c, "a"), c)),
        f"`fpipe.peek(carry, 'a')` in {BAD}: 'a' is not declared as peek there; add "
        "it: `@fpipe.skippable(peek=['a'])`",
    ),
    "a pop of what is declared as stash": (
        stashing(lambda x, c: fpipe.pop(c, "b")),
        f"`fpipe.pop(carry, 'b')` in {BAD}: 'b' is not declared as pop there; "
        "it is declared as stash, so call `fpipe.stash`, or "
        "`@fpipe.skippable(pop=['b'])`",
    ),
    "a peek at what is declared as pop": (
        popping(lambda x, c: (x + fpipe.peek(c, "a"), {})),
        f"`fpipe.peek(carry, 'a')` in {BAD}: 'a' is not declared as peek there; "
        "it is declared as pop, so call `fpipe.pop`, or `@fpipe.skippable(peek=['a'])`",
    ),
    "a pop of what is declared as peek": (
        peeking(lambda x, c: fpipe.pop(c, "a")),
        f"`fpipe.pop(carry, 'a')` in {BAD}: 'a' is not declared as pop there; "
        "it is declared as peek, so call `fpipe.peek`, or "
        "`@fpipe.skippable(pop=['a'])`",
    ),
    "a stash of what is declared as pop": (
        popping(lambda x, c: (x, fpipe.stash({}, "a", x))),
        f"`fpipe.stash(carry, 'a', ...)` in {BAD}: 'a' is not declared as stash there; "
        "it is declared as pop, so call `fpipe.pop`, or "
        "`@fpipe.skippable(stash=['a'])`",
    ),
    "missing stash": (
        stashing(lambda x, c: (x, fpipe.stash(c, "b", x)), "b", "c"),
        f"{BAD} declares stash=['b', 'c'] but did not stash 'c': `return y, "
        "fpipe.stash(carry, 'c', value)`",
    ),
    "a stash whose carry is dropped": (
        stashing(lambda x, c: (x, [fpipe.stash(c, "b", x), c][1])),
        f"{BAD} declares stash=['b'] but did not stash 'b': `return y, "
        "fpipe.stash(carry, 'b', value)`",
    ),
    "double stash": (
        stashing(lambda x, c: (x, fpipe.stash(fpipe.stash(c, "b", x), "b", x))),
        f"`fpipe.stash(carry, 'b', ...)` in {BAD}: 'b' is in the carry already; stash "
        "it once",
    ),
    "double pop": (
        popping(lambda x, c: fpipe.pop(fpipe.pop(c, "a")[1], "a")),
        f"`fpipe.pop(carry, 'a')` in {BAD}: the carry holds []; 'a' was popped before. "
        "Pop it once, and go on with the carry that `pop` returns",
    ),
    "missing pop": (
        popping(lambda x, c: (x, c)),
        UNPOPPED,
    ),
    "a pop whose carry is dropped": (
        popping(lambda x, c: (x + fpipe.pop(c, "a")[0], c)),
        UNPOPPED,
    ),
    "a popped value left in": (
        popping(lambda x, c: (x, {**fpipe.pop(c, "a")[1], "a": x})),
        UNPOPPED,
    ),
    "a peeked value replaced": (
        peeking(lambda x, c: (x, {"a": x + fpipe.peek(c, "a")})),
        REPLACED,
    ),
    "a peeked value replaced in place": (
        peeking(lambda x, c: (x, [c.update(a=x + 1), c][1])),
        REPLACED,
    ),
    "a peek at what was taken out by hand": (
        peeking(lambda x, c: (fpipe.peek({}, "a"), c)),
        f"`fpipe.peek(carry, 'a')` in {BAD}: the carry holds only []",
    ),
    "undeclared skips in the carry": (
        with_neither(lambda x, c: (x, {"z": x, "c": x})),
        f"{BAD} returned the undeclared skips ['c', 'z']; it declares stash=[]: "
        "add them to `@fpipe.skippable(stash=...)`",
    ),
    "names that are no strings": (
        stashing(lambda x, c: (x, {"b": x, 7: x})),
        f"{BAD} returned the undeclared skips ['7']; it declares stash=['b']: "
        "add them to `@fpipe.skippable(stash=...)`",
    ),
}
WRONG_TYPES = {
    "no dict returned": (
        with_neither(lambda x, c: (x, [x])),
        f"{BAD} must return `(y, carry)`, but its carry is [float32[3,2]], no dict",
    ),
    "nothing returned": (
        stashing(lambda x, c: (x, None)),
        f"{BAD} must return `(y, carry)`, but its carry is None, no dict",
    ),
    "a stash in None": (
        stashing(lambda x, c: (x, fpipe.stash(untyped(None), "b", x))),
        f"`fpipe.stash(carry, 'b', ...)` in {BAD}: the carry is a NoneType, no dict",
    ),
    "a pop from a list": (
        popping(lambda x, c: fpipe.pop(untyped([]), "a")),
        f"`fpipe.pop(carry, 'a')` in {BAD}: the carry is a list, no dict",
    ),
    "a peek at a tuple": (
        peeking(lambda x, c: (fpipe.peek(untyped(()), "a"), c)),
        f"`fpipe.peek(carry, 'a')` in {BAD}: the carry is a tuple, no dict",
    ),
    "y alone": (
        with_neither(lambda x, c: x),
        f"{NO_PAIR} float32[3,2], no tuple",
    ),
    "the carry alone": (
        with_neither(lambda x, c: c),
        f"{NO_PAIR} {{}}, no tuple",
    ),
    "three": (
        popping(lambda x, c: (x, *fpipe.pop(c, "a"))),
        f"{NO_PAIR} a tuple of 3",
    ),
}


@both
@pytest.mark.parametrize("case", [*WRONG_VALUES, *WRONG_TYPES])
def test_a_misused_carry_is_refused_while_tracing_and_says_how_to_put_it_right(
    make, case
):
    layers, text = (WRONG_VALUES | WRONG_TYPES)[case]
    pipe, params = make(layers), ((),) * len(layers)
    stage = ", stage 1" if make is fpipe.Pipe else ""
    kind = ValueError if case in WRONG_VALUES else TypeError
    runs = [
        lambda: pipe(params, X),
        lambda: pipe.value_and_grad(jnp.mean, argnums=1)(params, X),
    ]
    for run in runs:
        with raises(kind, text) as error:
            run()
        assert error.value.__notes__[0] == f"fpipe: in {BAD}{stage}, microbatch 0"
    with raises(kind, text) as error:
        jax.eval_shape(pipe, params, X)
    assert error.value.__notes__[0] == f"fpipe: in {BAD}, microbatch 0"
    with raises(kind, text):
        make(
            [dataclasses.replace(layer, init=lambda key, x: ()) for layer in layers]
        ).init(jax.random.key(0), X)


def test_outside_a_pipeline_a_carry_is_a_plain_dict():
    carry = {"a": 1}
    assert fpipe.stash(carry, "b", None) == {"a": 1, "b": None}
    assert fpipe.pop(carry, "a") == (1, {})
    assert fpipe.peek(carry, "a") == 1
    assert carry == {"a": 1}
    who = "in a function outside a pipeline"
    with raises(
        ValueError,
        f"`fpipe.stash(carry, 'a', ...)` {who}: 'a' is in the carry already; stash it "
        "once",
    ):
        fpipe.stash(carry, "a", 2)
    with raises(
        TypeError, f"`fpipe.peek(carry, 'a')` {who}: the carry is a list, no dict"
    ):
        fpipe.peek(untyped([]), "a")


def test_after_a_refusal_plain_functions_are_free_again():
    layers, text = WRONG_VALUES["undeclared pop"]
    with raises(ValueError, text):
        fpipe.sequential(layers)(((), ()), X)
    assert fpipe.pop({"skip": 1}, "skip") == (1, {})


@both
def test_a_layer_sees_what_it_declared_and_nothing_else(make):
    seen = []

    def spy(stash=(), pop=(), peek=()):
        def apply(params, x, *, carry):
            seen.append(dict(carry))
            carry = {name: value for name, value in carry.items() if name not in pop}
            return x, {**carry, **dict.fromkeys(stash, len(seen))}

        return fpipe.Layer(apply, stash=stash, pop=pop, peek=peek)

    layers = [
        spy(("a", "b")),
        spy(("c",), peek=("b",)),
        spy(),
        spy(pop=("a", "c"), peek=("b",)),
        spy(pop=("b",)),
    ]
    make(layers)(((),) * 5, X)
    assert seen == [{}, {"b": 1}, {}, {"a": 1, "c": 2, "b": 1}, {"b": 1}]


@both
def test_a_layer_may_leave_a_peeked_skip_out_of_its_carry_or_change_its_own_dict(make):
    def careless(params, x, *, carry):
        x = x * carry.pop("a")
        return x, carry

    layers = [first, fpipe.Layer(careless, peek=("a",)), last]
    assert_same(make(layers)(((),) * 3, X), X * X * 2 + 2 * X)


# --- verify_skippables ---


def layer(name, stash=(), pop=(), peek=()):
    return fpipe.Layer(
        lambda p, x, *, carry: (x, carry), name=name, stash=stash, pop=pop, peek=peek
    )


ONE, TWO = fpipe.Namespace(), fpipe.Namespace()
STASHED_TWICE = (
    "'a' is stashed by layer 0 'x' and again by layer 1 'x'; isolate the pairs with "
    "namespaces: `layer.isolate(fpipe.Namespace())`"
)
STASHED_IN_VAIN = (
    "'a' is stashed by layer 0 'x', but no later layer pops it or peeks at it"
)
ONE_READER = (
    "isolate the pairs with namespaces, or let all readers but the last one peek"
)
ELSEWHERE = (
    "declares pop=['a'], but it is stashed only in another namespace: isolate both "
    "ends with the same one"
)
MISMATCHES = {
    "stash and pop": (
        [layer("x", stash=["a"], pop=["a"])],
        ["layer 0 'x' declares 'a' both as stash and as pop; keep one"],
    ),
    "stash and peek": (
        [layer("x", stash=["a"], peek=["a"]), layer("y", pop=["a"])],
        ["layer 0 'x' declares 'a' both as stash and as peek; keep one"],
    ),
    "pop and peek": (
        [layer("x", stash=["a"]), layer("y", pop=["a"], peek=["a"])],
        ["layer 1 'y' declares 'a' both as pop and as peek; keep one"],
    ),
    "stashed twice": (
        [layer("x", stash=["a"]), layer("x", stash=["a"]), layer("y", pop=["a"])],
        [STASHED_TWICE],
    ),
    "popped twice": (
        [layer("x", stash=["a"]), layer("y", pop=["a"]), layer("z", pop=["a"])],
        [f"'a' is popped by layer 1 'y' and layer 2 'z' pops it again; {ONE_READER}"],
    ),
    "peeked after its pop": (
        [layer("x", stash=["a"]), layer("y", pop=["a"]), layer("z", peek=["a"])],
        [
            "'a' is popped by layer 1 'y' and layer 2 'z' peeks at it after that; "
            f"{ONE_READER}"
        ],
    ),
    "popped, never stashed": (
        [layer("x", pop=["a"])],
        ["layer 0 'x' declares pop=['a'], but it is never stashed"],
    ),
    "peeked, never stashed": (
        [layer("x", peek=["a"])],
        ["layer 0 'x' declares peek=['a'], but it is never stashed"],
    ),
    "stashed only later": (
        [layer("x", peek=["a"]), layer("y", stash=["a"]), layer("z", pop=["a"])],
        [
            "layer 0 'x' declares peek=['a'], but it is stashed only later, by layer 1 "
            "'y'"
        ],
    ),
    "popped before it is stashed": (
        [layer("x", pop=["a"]), layer("y", stash=["a"])],
        [
            "layer 0 'x' declares pop=['a'], but it is stashed only later, by layer 1 "
            "'y'"
        ],
    ),
    "in another namespace": (
        [
            layer("x", stash=["a"]).isolate(ONE),
            layer("y", pop=["a"]).isolate(ONE),
            layer("z", pop=["a"]).isolate(TWO),
        ],
        [f"layer 2 'z' {ELSEWHERE}"],
    ),
    "stashed, never read": (
        [layer("x", stash=["a"]), layer("y")],
        [STASHED_IN_VAIN],
    ),
    "stashed twice in one namespace": (
        [
            *[layer("x", stash=["a"]).isolate(ONE)] * 2,
            layer("y", pop=["a"]).isolate(ONE),
        ],
        [STASHED_TWICE],
    ),
    "one end isolated": (
        [layer("x", stash=["a"]).isolate(ONE), layer("y", pop=["a"])],
        [
            f"layer 1 'y' {ELSEWHERE}",
            STASHED_IN_VAIN,
        ],
    ),
}


def report(wrong):
    return "`verify_skippables`: " + "".join(f"\n  - {line}" for line in wrong)


@pytest.mark.quick
@pytest.mark.parametrize(
    "check", [fpipe.verify_skippables, fpipe.sequential, fpipe.Pipe]
)
@pytest.mark.parametrize("case", MISMATCHES)
def test_each_mismatch_of_skips_is_found(check, case):
    layers, wrong = MISMATCHES[case]
    with raises(ValueError, report(wrong)):
        check(layers)


@pytest.mark.parametrize(
    "check", [fpipe.verify_skippables, fpipe.sequential, fpipe.Pipe]
)
def test_all_mismatches_are_reported_at_once_at_any_depth(check):
    layers = [
        layer("never", pop=["n"]),
        [
            layer("early", pop=["late"]),
            (layer("both", stash=["b"], pop=["b"]), [[layer("twice", stash=["t"])]]),
        ],
        iter([layer("again", stash=["t"]), layer("late", stash=["late"])]),
        (
            layer("pop", pop=["t"]),
            [layer("repop", pop=["t"]), [layer("peek", peek=["t"])]],
        ),
        [[[layer("lost", stash=["lost"])]]],
    ]
    isolate = "isolate the pairs with namespaces"
    others = f"{isolate}, or let all readers but the last one peek"
    wrong = [
        "layer 0 'never' declares pop=['n'], but it is never stashed",
        "layer 1 'early' declares pop=['late'], but it is stashed only later, by layer "
        "5 'late'",
        "layer 2 'both' declares 'b' both as stash and as pop; keep one",
        f"'t' is stashed by layer 3 'twice' and again by layer 4 'again'; {isolate}: "
        "`layer.isolate(fpipe.Namespace())`",
        f"'t' is popped by layer 6 'pop' and layer 7 'repop' pops it again; {others}",
        "'t' is popped by layer 6 'pop' and layer 8 'peek' peeks at it after that; "
        f"{others}",
        "'lost' is stashed by layer 9 'lost', but no later layer pops it or peeks at "
        "it",
    ]
    with raises(ValueError, report(wrong)):
        check(layers)


@pytest.mark.quick
def test_models_that_fit_pass():
    fpipe.verify_skippables([])
    fpipe.verify_skippables([first, [[last]], (fpipe.fn(jnp.tanh), [keep()]), add()])
    isolated = [[first.isolate(space), last.isolate(space)] for space in (ONE, TWO)]
    fpipe.verify_skippables([first, isolated, last])
    fpipe.verify_skippables(
        [layer("x", stash=["a"]), *[layer("y", peek=["a"])] * 3, layer("z", pop=["a"])]
    )
    fpipe.verify_skippables([layer("x", stash=["a"]), *[layer("y", peek=["a"])] * 3])


@pytest.mark.parametrize("field", ["stash", "pop", "peek"])
def test_a_string_in_place_of_a_list_is_refused(field):
    given = untyped({field: "skip"})
    text = (
        f"`fpipe.skippable({field}=...)`: got the string 'skip' where a list of names "
        "belongs: write ['skip']"
    )
    with raises(TypeError, text):
        fpipe.skippable(**given)


# --- namespaces ---


ISOLATIONS = {
    "no namespace": (
        lambda: first.isolate(untyped("one")),
        TypeError,
        "`isolate(namespace)` of layer 'first': 'one' is no fpipe.Namespace",
    ),
    "the class": (
        lambda: first.isolate(untyped(fpipe.Namespace)),
        TypeError,
        "`isolate(namespace)` of layer 'first': the class Namespace "
        "is no fpipe.Namespace",
    ),
    "a string": (
        lambda: first.isolate(ONE, only="a"),
        TypeError,
        "`isolate(only=...)` of layer 'first': got the string 'a' where a list of "
        "names belongs: write ['a']",
    ),
    "unknown": (
        lambda: first.isolate(ONE, only=["a", "b"]),
        ValueError,
        "`isolate(only=['b'])`: layer 'first' declares no such skip, only ['a']",
    ),
    "twice": (
        lambda: first.isolate(ONE, only=["a", "a"]),
        ValueError,
        "`isolate(only=...)` of layer 'first': a name occurs twice in ['a', 'a']",
    ),
}


@pytest.mark.parametrize("case", ISOLATIONS)
def test_what_cannot_be_isolated_is_refused(case):
    build, kind, text = ISOLATIONS[case]
    with raises(kind, text):
        build()


def skips(layers):
    return [str(skip) for skip in fpipe.Pipe(layers).model.routes]


def test_isolate_takes_some_of_the_skips_only():
    stash, pop = layer("x", stash=["a", "b", "c"]), layer("y", pop=["b", "a", "c"])
    assert skips([stash, pop]) == ["a", "b", "c"]
    assert skips([f.isolate(ONE) for f in (stash, pop)]) == ["a#0", "b#0", "c#0"]
    assert skips([f.isolate(ONE, only=["b"]) for f in (stash, pop)]) == [
        "a",
        "b#0",
        "c",
    ]
    assert skips(
        [f.isolate(ONE, only=["b"]).isolate(TWO, only=["a"]) for f in (stash, pop)]
    ) == ["a#1", "b#0", "c"]
    assert skips(
        [f.isolate(ONE).isolate(TWO, only=iter(["a"])) for f in (stash, pop)]
    ) == ["a#0", "b#1", "c#1"]
    assert skips([f.isolate(ONE, only=[]) for f in (stash, pop)]) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="stashed only in another namespace"):
        fpipe.Pipe([stash.isolate(ONE, only=["b"]), pop.isolate(ONE, only=["a", "b"])])


def test_isolate_makes_a_new_layer():
    assert first.isolate(ONE) != first
    assert first.namespaces == ()
    assert first.isolate(ONE) == first.isolate(ONE) != first.isolate(TWO)


def test_namespaces_are_equal_only_if_they_are_the_same():
    assert ONE == ONE != TWO
    assert len({ONE, TWO, ONE}) == 2
    assert repr(ONE) == "Namespace()"


def uses(order):
    """A model that uses `first` and `last` under three namespaces, made in that order
    and used as 2, 0, 1.
    """
    made = {k: fpipe.Namespace() for k in order}
    return [
        *(first.isolate(made[k]) for k in (2, 0, 1)),
        *(last.isolate(made[k]) for k in (0, 2, 1)),
    ]


def test_namespaces_are_numbered_by_first_use_and_not_by_their_making():
    for order in [(0, 1, 2), (2, 1, 0), (1, 2, 0)]:
        layers = fpipe.Pipe(uses(order)).layers
        assert [str(layer.namespaces) for layer in layers] == [
            f"(('a', Namespace(#{k})),)" for k in (0, 1, 2, 1, 0, 2)
        ]
        assert skips(uses(order)) == ["a#0", "a#1", "a#2"]


def test_pipes_that_differ_only_in_namespace_objects_are_equal():
    pipe = fpipe.Pipe(uses((0, 1, 2)))
    for other in (fpipe.Pipe(uses((2, 0, 1))), fpipe.Pipe(pipe.layers)):
        assert other == pipe
        assert hash(other) == hash(pipe)
    nested = [
        first.isolate(ONE),
        first.isolate(TWO),
        last.isolate(TWO),
        last.isolate(ONE),
    ]
    crossed = [
        first.isolate(ONE),
        first.isolate(TWO),
        last.isolate(ONE),
        last.isolate(TWO),
    ]
    for make in (fpipe.Pipe, fpipe.sequential):
        assert make(nested) != make(crossed)


def stash_plainly(params, x, *, carry):
    return x, fpipe.stash(carry, "a", 2 * x)


def pop_plainly(params, x, *, carry):
    value, carry = fpipe.pop(carry, "a")
    return x + value, carry


def test_a_pipe_with_namespaces_pickles():
    space = fpipe.Namespace()
    layers = [
        fpipe.Layer(stash_plainly, stash=("a",)),
        fpipe.Layer(pop_plainly, pop=("a",)),
    ]
    pipe = fpipe.Pipe([layer.isolate(space) for layer in layers])
    again = pickle.loads(pickle.dumps(pipe))
    assert again == pipe
    assert_same(again(((), ()), X), 3 * X)


def test_a_pipe_of_layers_made_by_decorators_pickles():
    pipe = fpipe.Pipe([first, last])
    again = pickle.loads(pickle.dumps(pipe))
    assert again == pipe
    assert_same(again(((), ()), X), 3 * X)


def test_layers_of_a_pipe_can_be_used_in_another_beside_new_ones():
    space = fpipe.Namespace()
    inner = fpipe.Pipe([first.isolate(space), last.isolate(space)]).layers
    outer = [first.isolate(space), *inner, last.isolate(space)]
    assert skips(outer) == ["a#0", "a#1"]
    assert_same(fpipe.sequential(outer)(((),) * 4, X), 3 * X + 2 * X)


SCRIPT = """
import fpipe, jax
from tests.model.test_skips import uses
pipe = fpipe.Pipe(uses((1, 0, 2)), [1, 2, 3], chunks=2)
for stage in pipe.plan(None, jax.ShapeDtypeStruct((2, 2), "float32")).stages:
    print(stage.stashed, stage.popped)
"""


def test_every_process_gives_skips_the_same_names_in_the_same_order():
    printed = [
        subprocess.run(
            [sys.executable, "-c", f"import tests.conftest{SCRIPT}"],
            env={"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu", "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "7")
    ]
    assert printed[0] == printed[1]
    assert re.findall("a#.", printed[0]) == [f"a#{k}" for k in (0, 1, 2) * 2]


# --- values of every kind ---


class Pair(NamedTuple):
    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    value: Any
    tag: str = dataclasses.field(metadata={"static": True})


def is_none(value):
    assert value is None
    return 1.0


def is_int(value):
    assert type(value) is int
    return float(value)


def of_everything(value):
    assert value["none"] is None
    assert value["static"] == (3, "left")
    assert value["record"].tag == "t"
    pair = value["pair"]
    return value["record"].value * pair.left + pair.right.astype(jnp.float32)[:, None]


def from_key(key):
    return jax.random.uniform(key, (2,))


# What is stashed, from the parameters and the input, and what its reader makes of it.
VALUES = {
    "None": (lambda p, x: None, is_none),
    "an int": (lambda p, x: 3, is_int),
    "integers": (lambda p, x: jnp.argmax(x * p, -1), lambda i: jax.nn.one_hot(i, 2)),
    "booleans": (lambda p, x: x > 2.5, lambda b: jnp.where(b, 1.0, 0.5)),
    "a key": (lambda p, x: jax.random.key(x.shape[0]), from_key),
    "keys": (
        lambda p, x: jax.random.split(jax.random.key(1), x.shape[0]),
        jax.vmap(from_key),
    ),
    "0-d": (lambda p, x: (x * p).sum(), jnp.sin),
    "no rows": (lambda p, x: x[:0] * p, lambda a: 1.0 + a.sum()),
    "bfloat16": (
        lambda p, x: (x * p).astype(jnp.bfloat16),
        lambda a: a.astype(jnp.float32),
    ),
    "the parameters": (lambda p, x: p, jnp.cos),
    "the input": (lambda p, x: x, jnp.sin),
    "the output": (lambda p, x: x * p, jnp.sin),
    "unused": (lambda p, x: jnp.sin(x * p), lambda value: 1.0),
    "a pytree": (
        lambda p, x: {
            "none": None,
            "static": (3, "left"),
            "record": Record(jnp.sin(p) * x, "t"),
            "pair": Pair(x[:, :1], jnp.argmax(x, -1)),
        },
        of_everything,
    ),
}


def model(case, last_peeks=False):
    """One layer stashes it, the next peeks at it, the last pops it, or peeks too."""
    made, read = VALUES[case]

    def stash(p, x, *, carry):
        return x * p, fpipe.stash(carry, "value", made(p, x))

    def peek(p, x, *, carry):
        return jnp.sin(x * p) * read(fpipe.peek(carry, "value")), carry

    def pop(p, x, *, carry):
        value, carry = fpipe.pop(carry, "value")
        return x * p + read(value), carry

    def peek_last(p, x, *, carry):
        return x * p + read(fpipe.peek(carry, "value")), carry

    return [
        fpipe.Layer(stash, stash=("value",)),
        fpipe.Layer(peek, peek=("value",)),
        fpipe.Layer(peek_last, peek=("value",))
        if last_peeks
        else fpipe.Layer(pop, pop=("value",)),
    ]


PARAMS = tuple(jnp.array([0.5 + k, 1.5 - k]) for k in range(3))


def inside(pipe, params, x):
    return pipe.value_and_grad(mse, argnums=(0, 1))(params, x, jnp.cos(X))


def outside(pipe, params, x):
    return jax.value_and_grad(lambda p, x: mse(pipe(p, x), jnp.cos(X)), argnums=(0, 1))(
        params, x
    )


def check(case, run, balance=None, tolerance=1e-5):
    reference, pipe = (
        fpipe.sequential(model(case), chunks=3),
        fpipe.Pipe(model(case), balance, chunks=3),
    )
    want = jax.jit(functools.partial(run, reference))(PARAMS, X / 4)
    assert_same(run(pipe, pipe.place(PARAMS), X / 4), want, tolerance)


@pytest.mark.parametrize("case", VALUES)
def test_any_value_can_be_a_skip(case):
    check(case, inside, tolerance=2e-2 if case == "bfloat16" else 1e-5)


@pytest.mark.parametrize(
    ("run", "balance"), [(inside, [3]), (inside, [1, 2]), (outside, [2, 1])]
)
def test_the_ends_of_a_skip_may_share_a_stage(run, balance):
    check("a pytree", run, balance)


@pytest.mark.parametrize(
    "executor", ["placed", pytest.param("scan", marks=pytest.mark.full)]
)
def test_the_last_reader_may_peek(executor):
    popping, peeking = (
        fpipe.Pipe(model("the output", last_peeks), chunks=3, executor=executor)
        for last_peeks in (False, True)
    )
    placed = popping.place(PARAMS)
    run = functools.partial(inside, x=X / 4)
    if executor == "scan":
        run = jax.jit(run, static_argnums=0)
    assert_same(run(peeking, placed), run(popping, placed))
    # After its last reader it is freed, as if that had popped it.
    held = [
        pipe.plan(PARAMS, X, jnp.cos(X), loss_fn=mse).devices
        for pipe in (popping, peeking)
    ]
    assert held[0] == held[1]


@both
def test_a_skip_that_nobody_uses_gets_a_zero_gradient(make):
    @fpipe.skippable(stash=["a"])
    def stash(p, x, *, carry):
        return x, fpipe.stash(carry, "a", x * p)

    @fpipe.skippable(pop=["a"])
    def pop(p, x, *, carry):
        return x * p, fpipe.pop(carry, "a")[1]

    pipe = make([stash, fpipe.fn(jnp.sin), pop], chunks=2)
    params = pipe.place((jnp.ones(2), (), jnp.ones(2)))
    _, grads = pipe.value_and_grad(jnp.sum, reduction="sum", argnums=(0, 1))(params, X)
    assert_same(grads, ((jnp.zeros(2), (), jnp.sin(X).sum(0)), jnp.cos(X)))


@both
def test_a_gradient_can_go_through_the_skip_alone(make):
    @fpipe.skippable(stash=["a"])
    def stash(p, x, *, carry):
        return jax.lax.stop_gradient(x), fpipe.stash(carry, "a", x * p)

    @fpipe.skippable(pop=["a"])
    def pop(p, x, *, carry):
        value, carry = fpipe.pop(carry, "a")
        return jnp.sin(value) * p, carry

    pipe = make([stash, fpipe.Layer(lambda p, x: x * p), pop], chunks=2)
    p = jnp.array([0.5, 2.0])
    _, grads = pipe.value_and_grad(jnp.sum, reduction="sum", argnums=(0, 1))(
        pipe.place((p, p, p)), X
    )
    own = (jnp.cos(X * p) * X * p).sum(0)
    assert_same(
        grads, ((own, jnp.zeros(2), jnp.sin(X * p).sum(0)), jnp.cos(X * p) * p * p)
    )


@both
def test_integer_inputs_that_skip_stages_have_float0_gradients(make):
    @fpipe.skippable(stash=["ids", "mask"])
    @fpipe.fn
    def stash(x, *, carry):
        carry = fpipe.stash(carry, "ids", x["ids"])
        return x["v"], fpipe.stash(carry, "mask", x["mask"])

    @fpipe.skippable(pop=["ids"], peek=["mask"])
    def embed(table, x, *, carry):
        ids, carry = fpipe.pop(carry, "ids")
        return x * table[ids] * jnp.where(fpipe.peek(carry, "mask"), 1.0, 0.0), carry

    @fpipe.skippable(pop=["mask"])
    @fpipe.fn
    def mask(x, *, carry):
        where, carry = fpipe.pop(carry, "mask")
        return jnp.where(where, x, 1.0), carry

    x = {
        "v": X,
        "ids": jnp.array([2, 0, 2]),
        "mask": jnp.array([[True, False], [True, True], [False, True]]),
    }
    table = jnp.arange(1.0, 7).reshape(3, 2)
    pipe = make([stash, fpipe.fn(jnp.sin), embed, mask], chunks=2)
    params = pipe.place(((), (), table, ()))
    grad = pipe.value_and_grad(jnp.sum, reduction="sum", argnums=(0, 1))
    loss, ((_, _, into_table, _), into_x) = grad(params, x)

    def by_hand(table, v):
        return jnp.where(x["mask"], jnp.sin(v) * table[x["ids"]], 1.0).sum()

    want, (want_table, want_v) = jax.value_and_grad(by_hand, argnums=(0, 1))(table, X)
    none = {
        name: np.zeros(x[name].shape, jax.dtypes.float0) for name in ("ids", "mask")
    }
    assert_same((loss, into_table, into_x), (want, want_table, {"v": want_v, **none}))


# --- many uses ---


def nested(depth):
    """`keep` and `add` nested `depth` deep under namespaces, with one reader of each in
    the middle.
    """
    spaces = [fpipe.Namespace() for _ in range(depth)]
    return [
        *(keep().isolate(space) for space in spaces),
        *(look().isolate(space) for space in spaces),
        *(look().isolate(space) for space in spaces),
        *(add().isolate(space) for space in reversed(spaces)),
    ]


def nested_by_hand(depth, params, x):
    params, kept = iter(params), []
    for _ in range(depth):
        kept.append(x)
        x = jnp.sin(x) * next(params)
    for value in [*kept, *kept]:
        x = x * next(params) + jnp.cos(value)
    for value in reversed(kept):
        x = x * next(params) + value
    return x


@pytest.mark.parametrize(
    ("balance", "schedule"),
    [([2, 6], "eager_1f1b"), ([2, 2, 2, 2], "1f1b"), ([1, 3, 3, 1], "gpipe")],
)
def test_layers_used_many_times_under_namespaces_compute_what_is_written_by_hand(
    balance, schedule
):
    layers, x = nested(2), noise(jax.random.key(1), (6, 4))
    pipe = fpipe.Pipe(layers, balance, chunks=3, schedule=schedule)
    params = tuple(jnp.linspace(0.5, 1.5, 4) + 0.1 * k for k in range(8))
    got = pipe.value_and_grad(mse, argnums=(0, 1, 2))(pipe.place(params), x, jnp.cos(x))

    def by_hand(params, x, target):
        return mse(nested_by_hand(2, params, x), target)

    want = jax.jit(jax.value_and_grad(by_hand, argnums=(0, 1, 2)))(
        params, x, jnp.cos(x)
    )
    assert_same(got, want)


def test_a_block_is_used_again_and_again_with_a_namespace_each():
    def block(space):
        return [keep().isolate(space), dense(), add().isolate(space)]

    layers = [block(fpipe.Namespace()) for _ in range(3)]
    pipe, x = fpipe.Pipe(layers, [2, 3, 4], chunks=2), noise(jax.random.key(1), (4, 4))
    assert skips(layers) == ["skip#0", "skip#1", "skip#2"]

    def by_hand(params, x):
        for k in range(0, 9, 3):
            (p, d, q), skip = params[k : k + 3], x
            x = jnp.tanh((jnp.sin(x) * p) @ d["w"] + d["b"]) * q + skip
        return x

    scale, weights = (
        jnp.linspace(0.5, 1.5, 4),
        {"w": jnp.eye(4) + 0.1, "b": jnp.linspace(0.0, 1.0, 4)},
    )
    params = (scale, weights, scale) * 3
    got = pipe.value_and_grad(mse, argnums=(0, 1))(pipe.place(params), x, jnp.cos(x))
    want = jax.value_and_grad(lambda p, x, t: mse(by_hand(p, x), t), argnums=(0, 1))
    assert_same(got, jax.jit(want)(params, x, jnp.cos(x)))


@both
def test_two_skips_of_one_layer_go_different_ways(make):
    @fpipe.skippable(stash=["a", "b"])
    @fpipe.fn
    def stash(x, *, carry):
        return x, fpipe.stash(fpipe.stash(carry, "b", 2 * x), "a", 3 * x)

    @fpipe.skippable(pop=["b"], stash=["c"])
    @fpipe.fn
    def turn(x, *, carry):
        b, carry = fpipe.pop(carry, "b")
        return x * b, fpipe.stash(carry, "c", b + 1)

    @fpipe.skippable(pop=["a", "c"])
    @fpipe.fn
    def end(x, *, carry):
        c, carry = fpipe.pop(carry, "c")
        a, carry = fpipe.pop(carry, "a")
        return x + a * c, carry

    pipe = make([stash, fpipe.fn(jnp.sin), turn, end], chunks=3)
    loss, grad = pipe.value_and_grad(jnp.sum, reduction="sum", argnums=1)(((),) * 4, X)

    def by_hand(x):
        return (jnp.sin(x) * (2 * x) + 3 * x * (2 * x + 1)).sum()

    assert_same((loss, grad), jax.value_and_grad(by_hand)(X))


@both
def test_a_layer_with_a_carry_and_a_state_returns_both(make):
    def stash(p, x, *, carry, state):
        return x * p, fpipe.stash(carry, "a", x + state), state + x.sum()

    def pop(p, x, *, carry, state):
        value, carry = fpipe.pop(carry, "a")
        return x * value, carry, state * 2

    pipe = make(
        [fpipe.Layer(stash, stash=("a",)), fpipe.Layer(pop, pop=("a",))], chunks=3
    )
    params, state = pipe.place((jnp.float32(2), ())), (jnp.float32(1), jnp.int32(1))
    seen = jnp.array([1.0, 4.0, 11.0]).reshape(
        3, 1
    )  # 1, then the sums of the rows (1 2) and (3 4) on top
    assert_same(
        pipe(params, X, state=state),
        (X * 2 * (X + seen), (jnp.float32(22), jnp.int32(8))),
    )


def test_a_carry_keeps_its_structure():
    seen = []

    @fpipe.skippable(pop=["a"])
    @fpipe.fn
    def pop(x, *, carry):
        value, carry = fpipe.pop(carry, "a")
        seen.append(value)
        return x, carry

    made = {"list": [X, None], "pair": Pair(X, 3), "record": Record(X, "t")}
    stash = fpipe.skippable(stash=["a"])(
        fpipe.fn(lambda x, *, carry: (x, fpipe.stash(carry, "a", made)))
    )
    fpipe.Pipe([stash, pop])(((), ()), X)
    chex.assert_trees_all_equal_structs(seen[0], made)
    assert seen[0]["pair"].right == 3
