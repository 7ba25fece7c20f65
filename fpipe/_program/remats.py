"""The recomputations of a backward, inlined so that they can be split.

JAX leaves a `jax.checkpoint` of a backward as one equation, which computes the forward
again and then the backward. As a whole it can only be run as a whole. Inlined, `I` can
take the part that makes input gradients and leave the rest to `W`:

    x, w, dy = inputs                       x, w, dy = inputs
    dx, dw = checkpoint[                    x' = optimization_barrier x
        h = dot x w                         w' = optimization_barrier w
        s = cos h            becomes        h = dot x' w'      (recomputes)
        dh = mul dy s                       s = cos h          (recomputes)
        dx = dot dh w                       dh = mul dy s      (recomputes)
        dw = dot x dh                       dx = dot dh w'     (recomputes)
    ] x w dy                                dw = dot x' dh     (recomputes)

The barriers stand for what the one equation did: XLA removes a computation that it
finds equal to another one, and would keep the forward's `h` in place of computing it
again.
"""

import dataclasses
from typing import Any

import jax

from fpipe._program.control_flow import is_remat
from fpipe._program.graph import Node, inline, trace
from fpipe._program.trace import JointStage


def inline_remats(joint: JointStage) -> JointStage:
    """A joint graph with the recomputations of its backward inlined.

    A `jax.checkpoint` that depends on no cotangent is of the forward, and stays.
    """
    inliner = _Inliner(joint)
    # In order: whether an equation is of the backward depends on those before it.
    for node in joint.graph.nodes:
        inliner.add(node)
    # The results of what was inlined have other numbers now, for all who look them up.
    renamed = inliner.renamed
    outputs = tuple(renamed.get(v, v) for v in joint.graph.outputs)
    return dataclasses.replace(
        joint,
        graph=dataclasses.replace(
            joint.graph,
            outputs=outputs,
            nodes=tuple(inliner.nodes),
            consts=inliner.consts,
            avals=inliner.avals,
        ),
        outputs={leaf: renamed.get(v, v) for leaf, v in joint.outputs.items()},
        gradients={leaf: renamed.get(v, v) for leaf, v in joint.gradients.items()},
    )


class _Inliner:
    """The new graph as it grows.

    Attributes:
        renamed: results of inlined equations, with the values that they are now.
        backward: values that depend on a cotangent.
    """

    def __init__(self, joint: JointStage) -> None:
        self.nodes: list[Node] = []
        self.consts = dict(joint.graph.consts)
        self.avals = dict(joint.graph.avals)
        self.renamed: dict[int, int] = {}
        self.backward = set(joint.cotangents.values())
        # One equation for each shape and dtype: to trace one takes a while.
        self._barriers: dict[tuple[Any, Any], Any] = {}

    def add(self, node: Node) -> None:
        """Add an equation, or what is in it."""
        # Equations are never changed: they know their operands by position, so another
        # node may read other values with the same equation.
        ins = tuple(self.renamed.get(v, v) for v in node.ins)
        if ins != node.ins:
            node = dataclasses.replace(node, ins=ins)
        if self.backward.isdisjoint(ins):
            self.nodes.append(node)
        elif is_remat(node):
            self._add_body(node)
        else:
            self.nodes.append(node)
            self.backward.update(node.outs)

    def _add_body(self, node: Node) -> None:
        (body,) = node.bodies
        first = len(self.avals)  # The body's values get the numbers from here on.
        self.avals.update({first + v: aval for v, aval in body.avals.items()})
        self.consts.update({first + v: value for v, value in body.consts.items()})
        # Before each input, for what is recomputed from one without a barrier would be
        # found equal to the forward's. Cotangents could do without; it costs nothing.
        for v, outer in zip(body.inputs, node.ins, strict=True):
            barrier = self._barrier(self.avals[outer])
            self.add(Node(barrier, (outer,), (first + v,), recomputes=True))
        # By `add` again: a layer under `jax.checkpoint` in a stage under
        # `jax.checkpoint` is a recomputation in a recomputation.
        for inner in body.nodes:
            ins = tuple(first + v for v in inner.ins)
            outs = tuple(first + v for v in inner.outs)
            scope = "/".join(filter(None, (node.scope, inner.scope)))
            self.add(Node(inner.eqn, ins, outs, recomputes=True, scope=scope))
        for v, outer in zip(body.outputs, node.outs, strict=True):
            self.renamed[outer] = self.renamed.get(first + v, first + v)
            self.backward.add(self.renamed[outer])

    def _barrier(self, aval: Any) -> Any:
        """The equation that hides where a value of this type comes from."""
        key = (aval.shape, aval.dtype)
        if key not in self._barriers:
            # Equations are not constructed, for their fields change between releases:
            # one is taken out of a trace.
            shape = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
            graph = inline(trace(lambda a: [jax.lax.optimization_barrier(a)], shape))
            self._barriers[key] = graph.nodes[0].eqn
        return self._barriers[key]
