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
again. Where the recomputation is a program of its own, `R`, there is no forward beside
it, so it needs no barriers.
"""

import dataclasses

import jax

from fpipe._program.control_flow import is_remat
from fpipe._program.graph import Node
from fpipe._program.rewriting import Rewriter
from fpipe._program.trace import JointStage


def inline_remats(joint: JointStage, barriers: bool = True) -> JointStage:
    """A joint graph with the recomputations of its backward inlined.

    A `jax.checkpoint` that depends on no cotangent is of the forward, and stays.

    Arguments:
        barriers: whether XLA must not see that a recomputation is one.
    """
    inliner = _Inliner(joint, barriers)
    graph = inliner.rewrite(joint.graph)
    # The results of inlined equations have new numbers. Every place that looks them up
    # needs these.
    renamed = inliner.renamed
    return dataclasses.replace(
        joint,
        graph=graph,
        outputs={leaf: renamed.get(v, v) for leaf, v in joint.outputs.items()},
        gradients={leaf: renamed.get(v, v) for leaf, v in joint.gradients.items()},
    )


class _Inliner(Rewriter):
    """The new graph as it grows.

    Attributes:
        backward: values that depend on a cotangent.
    """

    def __init__(self, joint: JointStage, barriers: bool) -> None:
        super().__init__(joint.graph)
        self.backward = set(joint.cotangents.values())
        self._barriers = barriers
        self._recomputing = False

    def add(self, node: Node) -> None:
        """Add an equation, or what is in it."""
        # Whether an equation is of the backward depends on those before it.
        if is_remat(node) and not self.backward.isdisjoint(node.ins):
            self._add_body(node)
        else:
            self.keep(node)

    def keep(self, node: Node) -> None:
        """Add an equation as it is."""
        if self._recomputing:
            node = dataclasses.replace(node, recomputes=True)
        super().keep(node)
        if not self.backward.isdisjoint(node.ins):
            self.backward.update(node.outs)

    def _add_body(self, node: Node) -> None:
        (body,) = node.bodies
        around, self._recomputing = self._recomputing, True
        # A barrier stands before each input: without it XLA would find that a
        # recomputed value equals that of the forward. Cotangents need no barrier, but
        # one costs nothing.
        args = list(node.ins)
        if self._barriers:
            args = [self._after_barrier(v) for v in node.ins]
        # A layer under `jax.checkpoint` in a stage under `jax.checkpoint` is a
        # recomputation in a recomputation: the body is added by `add` again.
        outs = self.call(body, args, node)
        self._recomputing = around
        self.renamed.update(zip(node.outs, outs, strict=True))
        self.backward.update(outs)

    def _after_barrier(self, v: int) -> int:
        """The same value, but XLA does not see where it comes from."""
        made = self.apply(jax.lax.optimization_barrier, [v], "barrier", "")
        self.avals[made] = self.avals[v]
        return made
