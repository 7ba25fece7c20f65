"""How an update is divided over devices, as data: the tables of the docstrings."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpipe.optim._partition import Crossing, partition
from fpipe.optim._programs import plan_programs
from fpipe.optim._update_graph import (
    Choice,
    Equation,
    run_operations,
    trace_update_graph,
)

LARGE = jax.ShapeDtypeStruct((40, 40), jnp.float32)
NUMBER = jax.ShapeDtypeStruct((), jnp.float32)


def clip(g0: Any, g1: Any):
    """Clipping by the global norm."""
    norm = jnp.sqrt(jnp.sum(g0 * g0) + jnp.sum(g1 * g1))
    return [g0 / norm, g1 / norm]


def table(divided):
    """Each operation's name, owner and round."""
    rows = []
    for operation, assignment in zip(
        divided.graph.operations, divided.assignments, strict=True
    ):
        name = "choice"
        if isinstance(operation, Equation):
            name = operation.node.eqn.primitive.name
        rows.append((name, *(assignment or (None, None))))
    return rows


def test_values_of_two_devices_meet_on_one():
    graph = trace_update_graph(clip, [LARGE, LARGE])
    divided = partition(graph, [0, 1], [[0], [1]], meeting_device=0)
    # s0 = sum(g0 * g0), s1 = sum(g1 * g1), n = sqrt(s0 + s1), u0 = g0 / n, u1 = g1 / n
    assert table(divided) == [
        ("mul", 0, 1),  # Late: device 1 waits for nothing that device 0 has before.
        ("reduce_sum", 0, 1),
        ("mul", 1, 0),
        ("reduce_sum", 1, 0),
        ("add", 0, 1),
        ("sqrt", 0, 1),
        ("div", 0, 2),
        ("div", 1, 2),
    ]
    _, s1, norm = (graph.operations[n].makes[0] for n in (1, 3, 5))
    assert divided.crossings == (Crossing(s1, 1, (0,), 0), Crossing(norm, 0, (1,), 1))
    plan = plan_programs(divided, [0, 1], [0, 1], [False] * 2, [False] * 2)
    assert [(part.round, part.device) for part in plan.parts] == [
        (0, 1),
        (1, 0),
        (2, 0),
        (2, 1),
    ]
    assert [(m.source, m.target, m.bytes) for m in plan.moves] == [(1, 0, 4), (0, 1, 4)]


def test_on_a_mesh_every_device_does_what_values_of_several_are_needed_for():
    graph = trace_update_graph(clip, [LARGE, LARGE])
    divided = partition(graph, [0, 1], [[0], [1]], meeting_device=None)
    assert table(divided)[4:] == [
        ("add", None, None),
        ("sqrt", None, None),
        ("div", 0, 1),
        ("div", 1, 1),
    ]
    s0, s1 = (graph.operations[n].makes[0] for n in (1, 3))
    assert divided.crossings == (Crossing(s0, 0, (1,), 0), Crossing(s1, 1, (0,), 0))


def test_what_needs_numbers_that_all_share_has_no_owner():
    def correct(count, g):
        return [count + 1.0, g / (1.0 - 0.9**count)]

    graph = trace_update_graph(correct, [NUMBER, LARGE])
    divided = partition(graph, [None, 1], [[0], [1]], meeting_device=0)
    owner = {name: owner for name, owner, _ in table(divided)}
    assert owner.pop("div") == 1
    assert set(owner.values()) == {None}
    assert divided.crossings == ()


@pytest.mark.parametrize("meeting_device", [0, None])
def test_a_number_that_is_spread_over_an_array_crosses_as_a_number(meeting_device):
    def scale(g0, g1):
        spread = jnp.broadcast_to(g0[0, 0] + 1.0, (40, 40))
        return [g0 * spread, g1 * spread]

    graph = trace_update_graph(scale, [LARGE, LARGE])
    divided = partition(graph, [0, 1], [[0], [1]], meeting_device)
    (crossing,) = divided.crossings
    assert graph.avals[crossing.value].shape == ()


def test_large_arrays_meet_where_most_bytes_are():
    row = jax.ShapeDtypeStruct((1, 400), jnp.float32)
    square = jax.ShapeDtypeStruct((400, 400), jnp.float32)
    graph = trace_update_graph(lambda a, b: [a @ b], [row, square])
    divided = partition(graph, [0, 1], [[0]], meeting_device=0)
    assert [owner for _, owner, _ in table(divided)] == [1]
    # The row goes to the matrix, and the product comes back.
    assert [(c.source, c.targets) for c in divided.crossings] == [(0, (1,)), (1, (0,))]


def skip(flag: Any, g0: Any, g1: Any):
    """A nested conditional over arrays of two devices."""

    def inner(a, b):
        total = jnp.sum(a) + jnp.sum(b)
        return jax.lax.cond(total > 0, lambda: (a * total, b), lambda: (-a, b / 2.0))

    return list(jax.lax.cond(flag > 0, inner, lambda a, b: (a, b), g0, g1))


def test_a_conditional_over_two_devices_is_opened():
    graph = trace_update_graph(skip, [NUMBER, LARGE, LARGE])
    divided = partition(graph, [None, 0, 1], [[0], [1]], meeting_device=0)
    assert sum(isinstance(operation, Choice) for operation in graph.operations) == 4
    assert divided.crossings
    assert all(graph.avals[c.value].shape == () for c in divided.crossings)
    plan = plan_programs(divided, [0, 0, 1], [0, 1], [False] * 2, [False] * 3)
    assert max(move.bytes for move in plan.moves) <= 8


@pytest.mark.parametrize("flag", [1.0, -1.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_opened_conditional_computes_what_it_did(flag, sign):
    given = [jnp.float32(flag), sign * jnp.ones((40, 40)), jnp.full((40, 40), 3.0)]
    graph = trace_update_graph(skip, given)
    values = dict(zip(graph.inputs, given, strict=True))
    got = run_operations(graph, graph.operations, values, graph.outputs)
    for a, b in zip(got, skip(*given), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_what_a_branch_makes_that_is_not_taken_is_zero():
    given = [jnp.float32(-1.0), jnp.ones((40, 40)), jnp.ones((40, 40))]
    graph = trace_update_graph(skip, given)
    values = dict(zip(graph.inputs, given, strict=True))
    inside = next(
        operation
        for operation in graph.operations
        if isinstance(operation, Equation)
        and operation.guards
        and operation.node.eqn.primitive.name == "reduce_sum"
    )
    operations, _ = graph.select(inside.makes, set(graph.inputs))
    (total,) = run_operations(graph, operations, values, inside.makes)
    assert total == 0
    values[graph.inputs[0]] = jnp.float32(1.0)
    (total,) = run_operations(graph, operations, values, inside.makes)
    assert total == 1600
