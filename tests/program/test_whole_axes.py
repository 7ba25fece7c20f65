"""Equations that move numbers along an axis which devices share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fpipe._program.graph import bind, evaluate, inline, trace
from fpipe._program.whole_axes import WholeAxes, moved_axes
from tests.helpers import assert_same

X = jax.ShapeDtypeStruct((2, 4), jnp.float32)
KERNEL = jnp.ones((3, 1, 1))


def convolved(x):
    return jax.lax.conv_general_dilated(
        x[..., None], KERNEL, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


def updated(x):
    return jax.lax.dynamic_update_slice(x, x[:, :1], (0, 1))


def pooled(x):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2), (1, 1), "SAME")


def loop(x):
    return jax.lax.scan(lambda h, _: (jnp.flip(h, 1), None), x, None, length=2)[0]


def until(x):
    return jax.lax.while_loop(lambda h: h[0, 0] < 8, lambda h: h[:, ::-1] + 1, x)


def branched(x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x, lambda x: x[:, ::-1], x)


@jax.custom_jvp
def ruled(x):
    return jnp.roll(x, 1, axis=1)


ruled.defjvp(lambda primals, tangents: (ruled(*primals), ruled(*tangents)))

# Functions of an array of two rows and four columns that move its columns, and the
# equation that does.
MOVES = {
    "slice": lambda x: x[:, 1:3],
    "dynamic_slice": lambda x: jax.lax.dynamic_slice(x, (0, 1), (2, 2)),
    "dynamic_update_slice": updated,
    "rev": lambda x: x[:, ::-1],
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 1))),
    "concatenate": lambda x: jnp.concatenate([x, x + 1], axis=1),
    "split": lambda x: jnp.split(x, [1], axis=1)[1],
    "stack": lambda x: jnp.stack([x, x + 1], axis=1),
    "unstack": lambda x: sum(jnp.unstack(x, axis=1)),
    "tile": lambda x: jnp.tile(x, (1, 3)),
    "cumsum": lambda x: jnp.cumsum(x, axis=1),
    "reduce_window_max": pooled,
    "conv_general_dilated": convolved,
    # Two rows of two columns of two, that are not the columns which devices hold.
    "reshape": lambda x: (x.reshape(8)[None] * 2).reshape(4, 2).T,
    # Inside of others.
    "scan": loop,
    "while": until,
    "cond": branched,
    "remat": jax.checkpoint(lambda x: jnp.tanh(x)[:, ::-1]),
    "custom_jvp_call": ruled,
}


def compiled(f, run):
    """A function whose argument and result devices share by columns, with equations run
    by `run`.
    """
    axes, auto = ("rows", "columns"), (AxisType.Auto,) * 2
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), axes, axis_types=auto)
    graph = inline(trace(lambda x: [f(x)], X))

    def call(x):
        given = {graph.inputs[0]: x}
        (y,) = evaluate(graph, graph.nodes, given, graph.outputs, run)
        shared = y.ndim == 2 and y.shape[1] % 2 == 0
        return jax.lax.with_sharding_constraint(y, by_columns) if shared else y

    by_columns = NamedSharding(mesh, P(None, "columns"))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.arange(8.0).reshape(2, 4), by_columns)
        program = jax.jit(call).lower(x).compile()
        return program.as_text() or "", program(x)


@pytest.mark.parametrize("name", MOVES)
def test_no_device_sends_its_part_to_another(name):
    f = MOVES[name]
    text, got = compiled(f, WholeAxes((2,)))
    assert "collective-permute" not in text
    assert_same(got, f(jnp.arange(8.0).reshape(2, 4)))


def test_as_written_they_do():
    names = ["rev", "split", "conv_general_dilated", "scan", "while", "cond", "remat"]
    for name in names:
        assert "collective-permute" in compiled(MOVES[name], bind)[0]


@pytest.mark.parametrize(
    ("before", "after", "axes"),
    [
        # Heads that two devices can share, and heads that they cannot.
        ((2, 8), (2, 4, 2), [(), (2,)]),
        ((2, 6), (2, 3, 2), [(1,), (1, 2)]),
        ((2, 4, 3), (8, 3), [(1,), ()]),
        ((4, 2), (1, 8), [(1,), ()]),
        ((4, 1, 2), (4, 2), None),
        ((6,), (3, 2), [(0,), (0, 1)]),
        ((0, 2), (0,), None),
    ],
)
def test_of_a_reshape_the_first_axis_may_stay_shared(before, after, axes):
    (node,) = inline(trace(lambda x: [x.reshape(after)], jnp.ones(before))).nodes
    moved = moved_axes(node, (2,))
    assert (None if moved is None else [*moved.ins, *moved.outs]) == axes


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x - x.mean(0),
        lambda x: x[np.array([1, 0])],
        lambda x: jnp.sort(x, axis=0),
        lambda x: x.T @ x,
        lambda x: x[:, None] + jnp.ones((3, 1)),
        lambda x: jax.lax.dynamic_slice(x, (0, 0), (2, 4)),
    ],
)
def test_what_moves_nothing(f):
    nodes = inline(trace(lambda x: [f(x)], X)).nodes
    assert [moved_axes(node) for node in nodes] == [None] * len(nodes)
