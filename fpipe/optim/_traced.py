"""`init` and `update` of a transformation, traced between flat leaves.

In: a transformation and the leaves that it is given. Out: a `TracedTransformation`. The
arguments of `update` are flattened in the order gradients, state, parameters, extra
arguments; the outputs are the updates and the arrays of the new state. For
`optax.sgd(0.1, momentum=0.9)` and two parameters:

    leaves:  gradient 0, gradient 1, trace 0, trace 1, parameter 0, parameter 1
    outputs: update 0, update 1, new trace 0, new trace 1
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from fpipe._core.pytrees import PyTree, numbers_as_arrays, pack, shapes_of
from fpipe.optim._blocks import divide_leaves
from fpipe.optim._seen_leaves import SeenLeaves
from fpipe.optim._update_graph import UpdateGraph, trace_update_graph


@dataclasses.dataclass(frozen=True)
class TracedFunction:
    """A function of flat leaves, for both executors to divide.

    Attributes:
        graph: what it computes.
        leaves: its inputs: arrays, or shapes.
    """

    graph: UpdateGraph
    leaves: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class TracedTransformation(TracedFunction):
    """A transformation between flat leaves.

    Attributes:
        updates: how many outputs are updates; they come first.
        state: the shapes of the new state, whose arrays are the other outputs.
    """

    updates: int
    state: PyTree


def trace_init(
    tx: Any, seen: SeenLeaves, parameters: Sequence[Any]
) -> TracedTransformation:
    """Trace `tx.init` of the parameters that it sees."""
    # A trace returns arrays alone. The structure of the state is known when `tx.init`
    # has run, and comes out of the trace by this list.
    states: list[PyTree] = []

    def init(*leaves: Any) -> list[Any]:
        # A state may hold Python numbers, which come out of a program as arrays. They
        # are made arrays here, so that the first state has the structure of all others.
        state = numbers_as_arrays(tx.init(seen.seen_tree(leaves)))
        # Shapes, because tracers must not outlive their trace.
        states.append(shapes_of(state))
        return pack(state)[0]

    graph = divide_leaves(trace_update_graph(init, parameters))
    return TracedTransformation(graph, tuple(parameters), 0, states[-1])


def trace_update(
    tx: Any,
    seen: SeenLeaves,
    gradients: Sequence[Any],
    state: PyTree,
    parameters: Sequence[Any] | None,
    extra: dict[str, Any],
) -> TracedTransformation:
    """Trace `tx.update`.

    Arguments:
        gradients, parameters: those of the leaves that it sees.
        state: unpacked.
    """
    state_arrays, state_spec = pack(state)
    extra_arrays, extra_spec = pack(extra)
    # Static leaves (a function in a state) are set aside, and put back inside.
    sections = [gradients, state_arrays, parameters or (), extra_arrays]
    states: list[PyTree] = []

    def update(*leaves: Any) -> list[Any]:
        rest = iter(leaves)
        g, s, p, e = ([next(rest) for _ in section] for section in sections)
        updates, new = tx.update(
            seen.seen_tree(g),
            state_spec.unpack(s),
            None if parameters is None else seen.seen_tree(p),
            **extra_spec.unpack(e),
        )
        new = numbers_as_arrays(new)
        states.append(shapes_of(new))
        # Masked updates have no leaves: there are as many as gradients were given.
        return [*jax.tree.leaves(updates), *pack(new)[0]]

    leaves = [leaf for section in sections for leaf in section]
    graph = divide_leaves(trace_update_graph(update, leaves))
    return TracedTransformation(graph, tuple(leaves), len(gradients), states[-1])
