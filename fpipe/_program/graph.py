"""A traced function as a flat graph of equations, and how parts of it are run.

In: a function of flat arrays. Out: a `Graph`, which is numbered values and the
equations between them, in order. `lambda x, w: [jnp.tanh(x @ w) * 2.0]` becomes

    | equation          | reads | makes |
    |-------------------|-------|-------|      inputs   0, 1
    | dot_general       | 0, 1  | 2     |      outputs  5
    | tanh              | 2     | 3     |      consts   {4: 2.0}
    | mul               | 3, 4  | 5     |

A graph can be cut anywhere: a part of it is run by binding its equations one after the
other under a new trace. Jaxprs are never constructed, so nothing here depends on how a
release of JAX builds them.

This module is the only one that reads jaxprs or binds equations. It offers the others:

    trace, inline               a function as a closed jaxpr, and that as a graph
    needed_nodes, ancestors     slices
    bind, evaluate              run one equation, or several
    replay                      the same, with the names around them
    given_name                  the name that `checkpoint_name` gave a value
    node.bodies, body_runs      what is inside of an equation, and how often it runs
    node.where                  the line of the user's that made an equation
    identity.identity           a value that is equal for equal computations
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from fpipe._core.errors import user_line
from fpipe._core.pytrees import in_context

# Calls that are inlined, so that what is inside can be sliced. A `jax.checkpoint` is
# not: XLA keeps its recomputation only while it stays one equation.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    # JAX 0.12: the two above, and the forward of a `jax.checkpoint`.
    "eval_jaxpr": "call_jaxpr",
}

# Calls with their own rules for derivatives. Inlined only where nothing will be
# differentiated any more, because the rules are lost.
_CALLS_WITH_RULES = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}

# Equations that change the form of a value, not what it says.
_FORM_CHANGES = ("broadcast_in_dim", "convert_element_type", "copy")


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One equation between numbered values. Nodes are compared by identity: where a
    function is called twice, both have the same `eqn`, and other values.

    Attributes:
        eqn: the equation, as JAX made it.
        ins, outs: the values that it reads and makes.
        recomputes: whether it makes again, in a backward, what the forward has made.
        scope: the names of `jax.named_scope` that it was traced in, such as
            `fpipe_layer_3/attention`.
        calls: the calls that it stands in and that are inlined, the innermost first.
    """

    eqn: Any
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    recomputes: bool = False
    scope: str = ""
    calls: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """The name of its primitive."""
        return self.eqn.primitive.name

    @property
    def told_name(self) -> str:
        """What a user knows it by: a function with its own derivative, such as `relu`,
        by the function's name, all else by the primitive's.
        """
        if not self.name.startswith(("custom_jvp_call", "custom_vjp_call")):
            return self.name
        # JAX promises no such field of a jaxpr.
        for jaxpr in jaxprs_among(self.eqn.params.values()):
            called = getattr(getattr(jaxpr, "debug_info", None), "func_name", "")
            if called and called.isidentifier():
                return called
        return self.name

    def reading(self, ins: tuple[int, ...]) -> "Node":
        """The same equation on other values."""
        new = dataclasses.replace(self, ins=ins)
        # What is inside is read once.
        if "bodies" in vars(self):
            vars(new)["bodies"] = self.bodies
        return new

    @functools.cached_property
    def bodies(self) -> tuple["Graph", ...]:
        """What it runs: a loop's body, the branches of a `cond`, a call's function."""
        return tuple(map(inline, jaxprs_among(self.eqn.params.values())))

    @functools.cached_property
    def where(self) -> str:
        """The line of the user's that made it, such as `model.py:12 (attention)`; `""`
        if the trace does not know.
        """
        # An equation inside a call knows only its line in the called function, because
        # JAX reuses the trace for other calls.
        for eqn in (self.eqn, *self.calls):
            traceback = getattr(eqn.source_info, "traceback", None)
            frames = getattr(traceback, "frames", ())
            line = user_line((f.file_name, f.line_num, f.function_name) for f in frames)
            if line:
                return line
        return ""

    @property
    def rank(self) -> int:
        """The number of axes of its first result."""
        return self.eqn.outvars[0].aval.ndim

    @property
    def body_runs(self) -> int:
        """How often it runs its bodies. A `while` counts as once: nobody knows."""
        # For work that is counted: a lower bound for a `while` is better than none.
        return self.eqn.params["length"] if self.name == "scan" else 1


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A function as equations in order.

    Attributes:
        inputs, outputs: the numbers of these values.
        nodes: the equations.
        consts: the values that are known when tracing.
        avals: shape and dtype of each value.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    nodes: tuple[Node, ...]
    consts: Mapping[int, Any]
    avals: Mapping[int, Any]

    @functools.cached_property
    def maker(self) -> dict[int, Node]:
        """The equation that makes each value."""
        return {v: node for node in self.nodes for v in node.outs}


# --- from a function to a graph ---


def trace(f: Callable[..., Sequence[Any]], *shapes: Any) -> Any:
    """Trace a function of flat arrays into a closed jaxpr."""
    return jax.make_jaxpr(f)(*map(in_context, shapes))


def as_function(closed: Any) -> Callable[..., list[Any]]:
    """A closed jaxpr as a function again.

    It can be differentiated without calling the original function once more. Nested
    calls are gone: inside a `jax.checkpoint` they would stay calls to the end, for a
    remat is lowered as the one equation that it is.
    """
    graph = inline(closed)

    def run(*values: Any) -> list[Any]:
        given = dict(zip(graph.inputs, values, strict=True))
        return replay(graph, graph.nodes, given, graph.outputs)

    return run


def inline(
    closed: Any, keep_rules: bool = True, keep_calls: Collection[str] = ()
) -> Graph:
    """A jaxpr as a `Graph`, nested calls inlined.

    Arguments:
        keep_rules: whether functions with their own derivatives (`jax.custom_jvp`,
            `jax.custom_vjp`) stay one equation, so that they can be differentiated.
        keep_calls: names of calls that stay one equation, such as `"jit"`.
    """
    calls = _CALLS if keep_rules else _CALLS | _CALLS_WITH_RULES
    calls = {name: of for name, of in calls.items() if name not in keep_calls}
    nodes: list[Node] = []
    consts: dict[int, Any] = {}
    avals: dict[int, Any] = {}

    def number(atoms: Sequence[Any]) -> tuple[int, ...]:
        """New numbers for variables or literals."""
        # Without gaps: `len(avals)` is always the next free number, for `inline_remats`
        # too.
        first = len(avals)
        numbers = tuple(range(first, first + len(atoms)))
        for n, atom in zip(numbers, atoms, strict=True):
            avals[n] = atom.aval
        return numbers

    def visit(
        closed: Any, args: Sequence[int], around: str, within: tuple[Any, ...]
    ) -> list[int]:
        """Add the equations of a jaxpr that is called on `args`.

        Arguments:
            around: the names around the call.
            within: this call and those around it.
        """
        # Some calls hold an open jaxpr, and from jax 0.12 on `Jaxpr` is both. What an
        # open one captures has no value here: `consts` is empty then, so the `zip` is
        # not strict.
        jaxpr = getattr(closed, "jaxpr", closed)
        captured = number(jaxpr.constvars)
        consts.update(zip(captured, getattr(closed, "consts", ()), strict=False))
        # A table of its own for each call: the same jaxpr may be called several times,
        # and its variables are other values each time.
        numbers = dict(zip(jaxpr.constvars, captured, strict=True))
        numbers.update(zip(jaxpr.invars, args, strict=True))

        def read(atoms: Iterable[Any]) -> list[int]:
            values = []
            for atom in atoms:
                if isinstance(atom, Literal):
                    (v,) = number([atom])
                    # JAX writes a bool as Python has it, and other numbers with their
                    # dtype. Values have a dtype everywhere else.
                    known = isinstance(atom.val, bool)
                    consts[v] = np.bool_(atom.val) if known else atom.val
                    values.append(v)
                else:
                    values.append(numbers[atom])
            return values

        for eqn in jaxpr.eqns:
            ins = read(eqn.invars)
            scope = "/".join(filter(None, (around, str(eqn.source_info.name_stack))))
            called = eqn.params.get(calls.get(eqn.primitive.name, ""))
            if called is None:
                outs: Sequence[int] = number(eqn.outvars)
                nodes.append(
                    Node(eqn, tuple(ins), tuple(outs), scope=scope, calls=within)
                )
            else:
                outs = visit(called, ins, scope, (eqn, *within))
            numbers.update(zip(eqn.outvars, outs, strict=True))
        return read(jaxpr.outvars)

    inputs = number(getattr(closed, "jaxpr", closed).invars)
    outputs = visit(closed, inputs, "", ())
    return Graph(inputs, tuple(outputs), tuple(nodes), consts, avals)


def called(closed: Any, name: str) -> list[Graph]:
    """The jitted functions of a name that a jaxpr calls itself, in order."""
    jaxpr = getattr(closed, "jaxpr", closed)
    return [
        inline(eqn.params[_CALLS[eqn.primitive.name]])
        for eqn in jaxpr.eqns
        if eqn.primitive.name in _CALLS and eqn.params.get("name") == name
    ]


def jaxprs_among(values: Iterable[Any]) -> list[Any]:
    """The jaxprs among the parameters of an equation, in order."""
    found = []
    pending = list(values)[::-1]
    while pending:
        value = pending.pop()
        if isinstance(value, (tuple, list)):
            pending.extend(reversed(value))
        elif isinstance(value, (Jaxpr, ClosedJaxpr)):
            found.append(value)
    return found


# --- slices ---


def ancestors(graph: Graph, values: Iterable[int]) -> set[int]:
    """The values that some values are made from, themselves included."""
    found = set(values)
    for node in reversed(graph.nodes):
        if not found.isdisjoint(node.outs):
            found.update(node.ins)
    return found


def dependents(graph: Graph, values: Iterable[int]) -> set[int]:
    """The values that depend on some values, themselves included."""
    found = set(values)
    for node in graph.nodes:
        if not found.isdisjoint(node.ins):
            found.update(node.outs)
    return found


def needed_nodes(
    graph: Graph,
    wanted: Iterable[int],
    given: Collection[int] = (),
    required: Collection[Node] = (),
) -> list[Node]:
    """The equations, in order, that make `wanted` from `given` and the inputs.

    Arguments:
        given: values that are there already.
        required: equations that run in any case: those with effects.
    """
    # Backwards: when an equation is looked at, all that could read it has been.
    live = set(wanted).difference(given)
    nodes = list[Node]()
    for node in reversed(graph.nodes):
        if not live.isdisjoint(node.outs) or node in required:
            nodes.append(node)
            live.update(v for v in node.ins if v not in given)
    return nodes[::-1]


# --- running ---


def bind(node: Node, inputs: Sequence[Any], **changed: Any) -> Sequence[Any]:
    """Run one equation, or trace it again where an input is traced.

    Arguments:
        changed: parameters of the equation that are to be others.
    """
    eqn = node.eqn
    # Some primitives (calls with their own derivatives) are bound to functions, not to
    # the jaxprs that their equations hold; `get_bind_params` makes them again.
    params = {**eqn.primitive.get_bind_params(eqn.params), **changed}
    # An equation is traced again under the settings of the layer's first trace. That
    # includes the mesh, except axes that a `shard_map` around it has taken since.
    here = jax.sharding.get_abstract_mesh()
    with eqn.ctx.manager:
        there = jax.sharding.get_abstract_mesh()
        taken = set(here.manual_axes) - set(there.manual_axes)
        with jax.sharding.use_abstract_mesh(here if taken else there):
            result = eqn.primitive.bind(*inputs, **params)
    return result if eqn.primitive.multiple_results else (result,)


# How one equation is run: `bind`, or what does something more.
Bind: TypeAlias = Callable[[Node, Sequence[Any]], Sequence[Any]]


def evaluate(
    graph: Graph,
    nodes: Iterable[Node],
    given: Mapping[int, Any],
    wanted: Iterable[int],
    bind: Bind = bind,
) -> list[Any]:
    """Run equations one after the other and return the wanted values."""
    # Values are not dropped when they are last read: this runs under a trace, where
    # they are names, and XLA finds out what lives how long.
    values = {**graph.consts, **given}
    for node in nodes:
        results = bind(node, [values[v] for v in node.ins])
        values.update(zip(node.outs, results, strict=True))
    return [values[v] for v in wanted]


def replay(
    graph: Graph, nodes: Iterable[Node], given: Mapping[int, Any], wanted: Iterable[int]
) -> list[Any]:
    """`evaluate` for equations that stand for the user's function: the names around an
    equation go with it, so that its derivative has them too.
    """
    made = {**graph.consts, **given}
    for node in nodes:
        inputs = [made[v] for v in node.ins]
        if node.scope:
            with jax.named_scope(node.scope):
                results = bind(node, inputs)
        else:
            results = bind(node, inputs)
        made.update(zip(node.outs, results, strict=True))
    return [made[v] for v in wanted]


def given_name(node: Node) -> str | None:
    """The name that `jax.ad_checkpoint.checkpoint_name` gives, if it is that."""
    return node.eqn.params["name"] if node.name == "name" else None


def is_zero(graph: Graph, value: int) -> bool:
    """Whether a value is zero by its making.

    So a vector-Jacobian product says that there is no gradient: for an input that is
    never used, `jax.vjp` returns `broadcast_in_dim 0.0`. Such a gradient is not made,
    sent or added. A zero that is only computed, `0 * x`, is not found, and is a
    gradient as any other.
    """
    while value in graph.maker and graph.maker[value].name in _FORM_CHANGES:
        value = graph.maker[value].ins[0]
    # Only scalars are looked at: a larger constant may be on a device, and would have
    # to be fetched.
    const = graph.consts.get(value)
    return const is not None and np.ndim(const) == 0 and not np.any(np.asarray(const))
