"""Graphs of traced functions, and who reads jaxprs."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import pytest

import fpipe
from fpipe._program.control_flow import calls_host, content_dependents, has_loop
from fpipe._program.graph import (
    ancestors,
    dependents,
    evaluate,
    inline,
    is_zero,
    needed_nodes,
    trace,
)
from fpipe._program.identity import function_identity
from tests.house import imported_names, sources

HOUSE = sources(pathlib.Path(fpipe.__file__).parent)

W = jax.ShapeDtypeStruct((4, 4), jnp.float32)
X = jax.ShapeDtypeStruct((2, 4), jnp.float32)


def graph_of(f, *shapes, keep_rules=True):
    return inline(trace(f, *shapes), keep_rules)


def names(nodes):
    return [node.name for node in nodes]


def test_a_function_is_a_list_of_equations():
    graph = graph_of(lambda x, w: [jnp.tanh(x @ w) * 2.0], X, W)
    assert graph.inputs == (0, 1)
    assert [(node.name, node.ins, node.outs) for node in graph.nodes] == [
        ("dot_general", (0, 1), (2,)),
        ("tanh", (2,), (3,)),
        ("mul", (3, 4), (5,)),
    ]
    assert graph.outputs == (5,)
    assert {v: float(c) for v, c in graph.consts.items()} == {4: 2.0}


def test_calls_are_inlined_and_checkpoints_are_not():
    call = jax.jit(lambda x, w: jnp.sin(x) @ w)
    assert names(graph_of(lambda x, w: [call(x, w)], X, W).nodes) == [
        "sin",
        "dot_general",
    ]
    (node,) = graph_of(lambda x, w: [jax.checkpoint(call)(x, w)], X, W).nodes
    assert names(node.bodies[0].nodes) == ["sin", "dot_general"]


def test_rules_of_derivatives_are_kept_or_inlined():
    f = lambda x: [jax.nn.relu(x)]  # noqa: E731
    assert names(graph_of(f, X).nodes) == ["custom_jvp_call"]
    assert names(graph_of(f, X, keep_rules=False).nodes) == ["max"]


def test_slices():
    graph = graph_of(lambda x, w: [x @ w, jnp.sin(jnp.cos(x)), jnp.exp(w)], X, W)
    _, sine, exponential = graph.outputs
    assert names(needed_nodes(graph, [sine])) == ["cos", "sin"]
    (cosine,) = needed_nodes(graph, [sine])[0].outs
    assert names(needed_nodes(graph, [sine], given=[cosine])) == ["sin"]
    required = {node for node in graph.nodes if node.name == "exp"}
    assert names(needed_nodes(graph, [sine], required=required)) == [
        "cos",
        "sin",
        "exp",
    ]
    x, w = graph.inputs
    assert ancestors(graph, [sine]) == {x, cosine, sine}
    assert dependents(graph, [w]) == {w, graph.outputs[0], exponential}


def test_a_part_is_run_by_itself():
    graph = graph_of(lambda x: [jnp.sin(jnp.cos(x))], X)
    cosine, sine = (node.outs[0] for node in graph.nodes)
    nodes = needed_nodes(graph, [sine], given=[cosine])
    (got,) = evaluate(graph, nodes, {cosine: jnp.full((2, 4), 0.5)}, [sine])
    assert (got == jnp.sin(jnp.full((2, 4), 0.5))).all()


def test_zeros_are_told_by_their_making():
    graph = graph_of(
        lambda x: [jnp.zeros((3,)), jnp.zeros(()).astype(jnp.bfloat16), x * 0], X
    )
    assert [is_zero(graph, v) for v in graph.outputs] == [True, True, False]


# --- control flow ---


def scanned(ws, x):
    def body(x, w):
        cast = w.astype(jnp.bfloat16)
        return jnp.tanh(x @ w), cast

    return list(jax.lax.scan(body, x, ws))


def looped(w, x):
    """The weights are carried too, and only the third round reads `x` through `b`."""
    return list(jax.lax.fori_loop(0, 3, lambda i, c: (c[1], c[2], c[2]), (w, w, x)))


def branched(w, x):
    return list(jax.lax.cond(x.sum() > 0, lambda w: (w, w), lambda w: (w * 2, w), w))


@pytest.mark.parametrize(
    ("f", "shapes", "depends"),
    [
        (scanned, (jax.ShapeDtypeStruct((3, 4, 4), jnp.float32), X), [True, False]),
        (looped, (W, W), [True, True, True]),
        (branched, (W, X), [False, False]),
        (jax.checkpoint(lambda w, x: [w * 2, x]), (W, X), [False, True]),
        (lambda w, x: [w * 2, x], (W, X), [False, True]),
    ],
    ids=["scan", "loop", "cond", "checkpoint", "plain"],
)
def test_content_is_followed_through_control_flow(f, shapes, depends):
    graph = graph_of(f, *shapes)
    found = content_dependents(graph.nodes, [graph.inputs[1]])
    assert [v in found for v in graph.outputs] == depends


def test_what_is_inside_is_found_at_any_depth():
    def f(x):
        def body(c, _):
            jax.debug.print("{}", c.sum())
            return jax.jit(jnp.sin)(c), None

        inner = jax.checkpoint(lambda c: jax.lax.scan(body, c, length=2)[0])
        return [jax.lax.cond(x.sum() > 0, inner, jnp.cos, x)]

    graph = graph_of(f, X)
    assert calls_host(graph.nodes)
    assert [node.name for node in graph.nodes if has_loop(node)] == ["cond"]
    assert not calls_host(graph_of(lambda x: [jnp.sin(x)], X).nodes)


# --- identity ---


def test_equal_computations_have_equal_identities():
    def one(x):
        return [jnp.tanh(x) * 2.0]

    def same(y):
        return [jax.jit(lambda a: jnp.tanh(a) * 2.0)(y)]

    assert function_identity(one, X) == function_identity(same, X)
    assert hash(function_identity(one, X)) == hash(function_identity(same, X))
    assert function_identity(one, X) != function_identity(one, W)
    assert function_identity(one, X) != function_identity(lambda x: [x * 2.0], X)


def test_captured_arrays_count_as_the_objects_that_they_are():
    a, b = jnp.arange(4.0), jnp.arange(4.0)
    identities = [function_identity(lambda x, c=c: [x + c], X) for c in (a, a, b)]
    assert identities[0] == identities[1] != identities[2]


# --- the only reader ---

READS = {"eqns", "invars", "outvars", "constvars", "bind"}
"""Attributes of jaxprs, equations and primitives."""


def readers_of_jaxprs(texts):
    """The modules outside of `fpipe._program` that read jaxprs or bind equations."""
    for module, text in texts.items():
        if module.startswith("fpipe._program"):
            continue
        imports = any(name.startswith("jax.extend") for name in imported_names(text))
        attributes = {
            node.attr
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Attribute)
        }
        if imports or attributes & {"make_jaxpr", *READS}:
            yield module


# `bind` there is of signatures, or of a socket, not of primitives.
BIND_SIGNATURES = {
    "fpipe._core.addresses",
    "fpipe._model.loss",
    "fpipe._model.remat",
    "fpipe._split.loss_function",
    "fpipe.flax._batch_norm",
}


def test_only_the_program_room_reads_jaxprs():
    assert set(readers_of_jaxprs(HOUSE)) <= BIND_SIGNATURES
    assert list(readers_of_jaxprs({"fpipe._pipe": "jax.make_jaxpr(f)(x)"}))
    assert list(readers_of_jaxprs({"fpipe._pipe": "from jax.extend import core"}))
    assert list(readers_of_jaxprs({"fpipe.plot": "eqn.primitive.bind(x)"}))
