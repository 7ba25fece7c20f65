"""What a function does that is likely to be meant otherwise is told when it is split.
Nothing is compiled.
"""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fpipe

PARAMS = {"w": jnp.eye(3)}
X = jnp.ones((4, 3))


def dense(params, x):
    return x @ params["w"]


def normalized(h):
    mean = jnp.mean(h, 0)
    return (h - mean) / jnp.sqrt(jnp.mean((h - mean) ** 2, 0) + 1e-5)


def noted(fn, params: Any = PARAMS, x: Any = X, **needs):
    """The warnings of a split."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fpipe.split(fn, params, x, **needs)
    assert all(one.filename == __file__ for one in found)
    return [str(one.message).partition("`: ")[2] for one in found]


# For each function the beginning of the note, what it names, and the line that it
# points at, which is the function's own.
NOTES = {
    "a reshape to the number of rows": (
        lambda p, x: (x @ p["w"])[..., None].reshape(4, -1),
        "'<lambda>' has a number of rows written into it, `reshape` at tests/split",
    ),
    "one that was none for the first trace": (
        lambda p, x: (x @ p["w"]).reshape(4, -1),
        "'<lambda>' returns float32[4,3] of 4 rows and float32[4,6] of 8",
    ),
    "as many results for any number": (
        lambda p, x: jnp.zeros((4, 3)) + jnp.sum(x @ p["w"], 0),
        "'<lambda>' returns float32[4,3] of 4 rows and float32[4,3] of 8",
    ),
    "one that is reshaped back": (
        lambda p, x: jnp.sin((x @ p["w"]).reshape(4, -1, 1)).reshape(x.shape),
        "'<lambda>' has a number of rows written into it, `reshape` at tests/split",
    ),
    "one that does not fit": (
        lambda p, x: (x @ p["w"]).reshape(4, -1) @ p["w"],
        "'<lambda>' can be traced with 4 rows, but not with 8 at tests/split",
    ),
    "a constant of as many rows": (
        lambda p, x: x @ p["w"] * jnp.arange(4.0)[:, None],
        "'<lambda>' can be traced with 4 rows, but not with 8 at tests/split",
    ),
    "a mean by hand": (
        lambda p, x: jnp.sum(x @ p["w"]) / 4,
        "'<lambda>' divides a sum over its rows by 4 at tests/split",
    ),
    "a batch norm": (
        lambda p, x: normalized(x @ p["w"]),
        "in '<lambda>' a row depends on other rows by `reduce_sum` at tests/split",
    ),
    "each row with each": (
        lambda p, x: jnp.sum(jnp.tanh((x @ p["w"]) @ x.T), 1),
        "in '<lambda>' a row depends on other rows by `dot_general` at tests/split",
    ),
    "a running sum": (
        lambda p, x: jnp.cumsum(x @ p["w"], 0),
        "in '<lambda>' a row depends on other rows by `cumsum` at tests/split",
    ),
    "a mean of some rows": (
        lambda p, x: jnp.sum(x @ p["w"]) / jnp.sum(x > 0, dtype=jnp.float32),
        "'<lambda>' returns a number made of all its rows by `reduce_sum` at tests",
    ),
    "a function of a mean": (
        lambda p, x: jnp.exp(jnp.mean(x @ p["w"])),
        "'<lambda>' returns a number made of all its rows by `reduce_sum` at tests",
    ),
    "a maximum": (
        lambda p, x: jnp.max(x @ p["w"]),
        "'<lambda>' returns a number made of all its rows by `reduce_max` at tests",
    ),
    "layers in another order": (
        lambda p, x: jax.lax.scan(
            lambda h, w: (jnp.tanh(h * w), None), x, p["w"][jnp.array([2, 0, 1])] * 2.0
        )[0],
        "'<lambda>' runs over stacked parameters in a `scan` at tests/split",
    ),
    "layers by an index in a loop of no known length": (
        lambda p, x: jax.lax.fori_loop(
            0, jnp.sum(p["w"] > 0), lambda i, h: jnp.tanh(h * p["w"][i]), x
        ),
        "'<lambda>' takes stacked parameters by an index in a `while` at tests/split",
    ),
    "a narrow loss": (
        lambda p, x: jnp.mean((x @ p["w"]).astype(jnp.bfloat16)),
        "'<lambda>' returns a number that is bfloat16 from its last reduction on",
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", NOTES)
def test_what_is_noted(name):
    fn, beginning = NOTES[name]
    (note,) = noted(fn)
    assert note.startswith(beginning)


def _grouped(params, x):
    """Rows in groups of two: right for every even number."""
    h = (x @ params["w"]).reshape(-1, 2, 3)
    return jnp.tanh(h).reshape(x.shape)


# Nothing is said of these.
QUIET = {
    "a mean": lambda p, x: jnp.mean(x @ p["w"]) * 2.0 + 1.0,
    "a factor of a mean that is the number of rows": lambda p, x: (
        (jnp.mean(x @ p["w"]) + jnp.mean(x)) / 4
    ),
    "a mean of losses": lambda p, x: jnp.mean(
        -jax.nn.log_softmax(x @ p["w"])[jnp.arange(x.shape[0]), 0]
    ),
    "a loss and a measure": lambda p, x: {
        "loss": jnp.sum(jnp.abs(x @ p["w"])) / x.shape[0],
        "hits": jnp.mean(jnp.argmax(x @ p["w"], 1) == 0, dtype=jnp.float32),
    },
    "a penalty": lambda p, x: x @ p["w"] * jnp.sqrt(jnp.sum(p["w"] ** 2)),
    "groups": _grouped,
    "a loop over time": lambda p, x: jax.lax.scan(
        lambda h, a: (jnp.tanh(h @ p["w"] + a), None), x, p["w"] * 2.0
    )[0],
    "a layer norm": lambda p, x: normalized((x @ p["w"]).T).T,
    "a loss of bfloat16 in float32": lambda p, x: jnp.mean(
        (x @ p["w"]).astype(jnp.bfloat16).astype(jnp.float32)
    ),
    "tokens": lambda p, x: jnp.tanh((x[:, None] @ p["w"]).reshape(-1, 3)).reshape(
        x.shape[0], 1, 3
    ),
    "constants of all rows": lambda p, x: x @ p["w"] * jnp.arange(8.0)[: len(x), None],
    "a division by a number that is the number of rows": lambda p, x: x @ p["w"] / 4,
}


@pytest.mark.quick
@pytest.mark.parametrize("name", QUIET)
def test_what_is_right_is_not_noted(name):
    assert noted(QUIET[name]) == []


def test_half_a_sum_of_two_rows_is_no_mean():
    def squares(params, x):
        return jnp.sum((x @ params["w"]) ** 2)

    assert noted(lambda p, x: squares(p, x) / 2, x=X[:2]) == []
    assert noted(lambda p, x: 0.5 * squares(p, x), x=X[:2]) == []
    # There are six numbers.
    (note,) = noted(lambda p, x: squares(p, x) / 6, x=X[:2])
    assert "divides a sum over its rows by 6" in note


def test_inputs_that_go_whole_to_every_microbatch_are_no_rows():
    def fn(params, x):
        h, table = x
        return (h - jnp.mean(table, 0)) @ params["w"] + jnp.exp(jnp.sum(table))

    assert noted(fn, x=(X, fpipe.NoChunk(X))) == []
    assert len(noted(fn, x=(X, X))) == 1
    # Rows on another axis.
    turned = fpipe.Chunk(jnp.ones((3, 4)), 1)
    assert noted(lambda p, x: p["w"] @ x - jnp.mean(x, 0), x=turned) == []
    (note,) = noted(lambda p, x: p["w"] @ x - jnp.mean(x, 1, keepdims=True), x=turned)
    assert "`reduce_sum`" in note


def test_a_mean_that_becomes_state_is_a_batch_norm():
    def norm(params, x, *, state, source):
        h = x @ params["w"]
        mean = jnp.mean(h, 0)
        largest = jnp.max(jnp.abs(h))
        new = {"mean": 0.9 * state["mean"] + 0.1 * mean, "largest": largest}
        return h - (mean if source == "mean" else jnp.min(h, 0)), new

    state = {"mean": jnp.zeros(3), "largest": jnp.zeros(())}
    quiet, noisy = (functools.partial(norm, source=s) for s in ("mean", "other"))
    assert noted(quiet, state=state) == []
    (note,) = noted(noisy, state=state)
    assert note.startswith("in 'norm' a row depends on other rows by `reduce_min`")


def test_parameters_that_nothing_uses():
    more = {"b": jnp.ones(3), "head": [jnp.ones(3)] * 5, "count": jnp.ones(3, int)}
    (note,) = noted(dense, PARAMS | more)
    some = ", ".join(f"'head/{n}'" for n in range(4))
    assert note.startswith(f"nothing uses the parameters 'b', {some}, … of 'dense'")

    # What one mode uses is used.
    def fn(params, x, *, train=False):
        return x @ params["w"] + (params["b"] if train else 0.0)

    assert noted(fn, PARAMS | {"b": jnp.ones(3)}) == []


def test_closed_over_arrays_are_counted_together():
    some = [np.full((300, 300), n, np.float32) for n in range(4)]

    def fn(params, x, arrays):
        return x @ params["w"] + sum(jnp.asarray(a)[0, 0] for a in arrays)

    (note,) = noted(functools.partial(fn, arrays=some))
    assert note.startswith("'fn' closes over arrays of 1.37 MiB")
    # One array that is read several times is one.
    assert noted(functools.partial(fn, arrays=some[:1] * 4)) == []


# --- what cannot be traced ---

kept = []


def _decides(params, x):
    return dense(params, x) if x.sum() > 0 else x


UNKNOWN = {
    "if": _decides,
    "float": lambda p, x: x @ p["w"] * float(x[0, 0]),
    "int": lambda p, x: x @ p["w"] * range(9)[x[0, 0].astype(int)],
    "numpy": lambda p, x: x @ p["w"] + np.asarray(x),
    "a mask as an index": lambda p, x: x[x > 0] @ p["w"],
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_function_that_asks_for_values(name):
    with pytest.raises((TypeError, IndexError)) as caught:
        noted(UNKNOWN[name])
    (note,) = [n for n in caught.value.__notes__ if n.startswith("fpipe")]
    what = UNKNOWN[name].__name__
    assert note.startswith(
        f"fpipe: in the trace of {what!r}, which `fpipe.split` cuts: at tests/split/"
    )
    assert "Python asks for the content of an array" in note


@pytest.mark.parametrize(
    "around", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "checkpoint"]
)
def test_a_value_of_the_trace_that_is_kept(around):
    @around
    def fn(params, x):
        kept.append(jnp.tanh(x))
        return dense(params, x)

    (note,) = noted(fn)
    kept.clear()
    assert note.startswith("'fn' keeps float32[4,3] of its trace in a list")


@pytest.mark.filterwarnings("ignore:`fpipe.split")
def test_a_kept_value_that_is_used_again():
    cache = []

    def table(params, x):
        if not cache:
            cache.append(jnp.arange(3.0) * 2.0)
        return dense(params, x) * cache[0]

    with pytest.raises(ValueError, match="or of an earlier trace of its own"):
        fpipe.split(table, PARAMS, X)
    cache.clear()

    def uses(params, x):
        cache.append(jnp.tanh(x))
        return dense(params, x) + cache[0].sum()

    with pytest.raises((jax.errors.UnexpectedTracerError, ValueError)):
        fpipe.split(uses, PARAMS, X)
    cache.clear()
