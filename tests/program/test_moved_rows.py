"""Equations that move rows, in graphs of small functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpipe._program.graph import inline, trace
from fpipe._program.moved_rows import find_moved_rows

X = jax.ShapeDtypeStruct((4, 4), jnp.float32)


def loop(x):
    return jax.lax.scan(lambda h, _: (jnp.flip(h, 0), None), x, None, length=2)[0]


def stacked(x):
    """Rows on the second axis of what a loop runs over, and of what it stacks."""
    rows = jnp.stack([x, x + 1])
    return jax.lax.scan(lambda h, r: (h + r, jnp.tanh(r)), x, rows)[1][:, 1:]


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (lambda x: x[::-1], "rev"),
        (lambda x: jnp.roll(x, 1, axis=0), "slice"),
        (lambda x: x - x[:1], "slice"),
        (lambda x: jnp.pad(x, ((1, 0), (0, 0))), "pad"),
        (lambda x: jnp.concatenate([x, x]), "concatenate"),
        (lambda x: jnp.split(x, 2)[0], "split"),
        (lambda x: jnp.unstack(x)[0], "unstack"),
        (lambda x: jnp.tile(x, (2, 1)), "tile"),
        # Behind equations that put rows on other axes.
        (lambda x: x.T[:, ::-1], "rev"),
        (lambda x: (x @ jnp.ones((4, 4)))[::-1], "rev"),
        (lambda x: (jnp.ones((3, 4)) @ x.T)[:, 1:], "slice"),
        (lambda x: jnp.einsum("ab,abc->abc", x, jnp.ones((4, 4, 2)))[1:], "slice"),
        (lambda x: x.reshape(4, 2, 2).sum(1)[1:], "slice"),
        (lambda x: x.reshape(2, 2, 4).sum(1)[1:], None),
        (lambda x: jnp.unstack(x, axis=1)[0][1:], "slice"),
        # Inside of others.
        (jax.checkpoint(lambda x: jnp.tanh(x)[::-1]), "rev"),
        (lambda x: jax.lax.cond(x.sum() > 0, lambda x: x, lambda x: x[::-1], x), "rev"),
        (loop, "rev"),
        (stacked, "slice"),
        # Other axes, and other ways.
        (lambda x: x[:, ::-1] + jnp.roll(x, 1, axis=1), None),
        (lambda x: x - x.mean(0), None),
        (lambda x: x[np.array([2, 0, 1, 3])], None),
        (lambda x: jnp.sort(x, axis=0), None),
        (lambda x: x.T[::-1].T, None),
        (lambda x: jnp.ones((4, 4))[1:].sum() + x, None),
    ],
)
def test_moved_rows_are_found(f, name):
    graph = inline(trace(lambda x: [f(x)], X))
    found = find_moved_rows(graph, {graph.inputs[0]: 0})
    assert (None if found is None else found.name) == name
