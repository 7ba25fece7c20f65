"""Equations with others inside of them, written once more.

In: an equation that is a loop, a branch or a call, and what becomes of the equations in
its bodies. Out: its results. Of a loop over `h = tanh(h[:, :4])`, for a `function` that
runs every slice in another way,

    retrace(scan, inputs, function)  ->  jax.lax.scan(function(body), ...)

Jaxprs are not constructed, because their form changes between releases: JAX traces the
bodies anew.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax

from fpipe._program.control_flow import is_remat, scan_parts
from fpipe._program.graph import Bind, Graph, Node, bind, evaluate, inline

Function: TypeAlias = Callable[..., Sequence[Any]]

_CALLS_WITH_RULES = ("custom_jvp_call", "custom_vjp_call")


def retrace(
    node: Node, inputs: Sequence[Any], function: Callable[[Graph], Function]
) -> Sequence[Any]:
    """Run an equation with bodies.

    Arguments:
        function: a body as a function of its inputs. It may use values of the trace
            outside, which JAX finds by itself.
    """
    if node.name == "scan":
        return _scan(node, inputs, function)
    if node.name == "while":
        return _while(node, inputs, function)
    if node.name == "cond":
        number, *rest = inputs
        return jax.lax.switch(number, [function(body) for body in node.bodies], *rest)
    if is_remat(node):
        # The barrier is what keeps a recomputation from being found equal to what the
        # forward has computed. A checkpoint of a forward recomputes nothing.
        params = node.eqn.params
        if params["prevent_cse"] and params.get("differentiated", True):
            inputs = jax.lax.optimization_barrier(list(inputs))
        return function(node.bodies[0])(*inputs)
    if node.name in _CALLS_WITH_RULES:
        # Nothing is differentiated any more.
        return function(node.bodies[0])(*inputs)
    # Anything else that has a body: a `shard_map`, a kernel.
    return bind(node, inputs)


def function_of(body: Graph, bind: Bind) -> Function:
    """A body as a function, whose equations are run by `bind`."""

    def run(*values: Any) -> list[Any]:
        given = dict(zip(body.inputs, values, strict=True))
        return evaluate(body, body.nodes, given, body.outputs, bind)

    return run


def is_retraced(node: Node) -> bool:
    """Whether the bodies of an equation are traced anew."""
    return node.name in ("scan", "while", "cond", *_CALLS_WITH_RULES) or is_remat(node)


def _scan(
    node: Node, inputs: Sequence[Any], function: Callable[[Graph], Function]
) -> Sequence[Any]:
    params = node.eqn.params
    constants, carried = scan_parts(node)
    step = function(node.bodies[0])
    fixed = inputs[:constants]

    def body(carry: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
        results = list(step(*fixed, *carry, *rows))
        return results[:carried], results[carried:]

    carry, rows = jax.lax.scan(
        body,
        list(inputs[constants : constants + carried]),
        list(inputs[constants + carried :]),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params.get("unroll", 1),
    )
    return [*carry, *rows]


def _while(
    node: Node, inputs: Sequence[Any], function: Callable[[Graph], Function]
) -> Sequence[Any]:
    # Its operands: the constants of the condition, those of the body, the carry.
    params = node.eqn.params
    test, step = (inline(params[name]) for name in ("cond_jaxpr", "body_jaxpr"))
    carried = len(node.outs)
    of_test = inputs[: len(test.inputs) - carried]
    of_step = inputs[len(of_test) : len(inputs) - carried]
    goes_on, body = function(test), function(step)
    return jax.lax.while_loop(
        lambda carry: goes_on(*of_test, *carry)[0],
        lambda carry: list(body(*of_step, *carry)),
        list(inputs[len(inputs) - carried :]),
    )
