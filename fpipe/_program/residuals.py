"""What a forward keeps for its backward: the fewest bytes, as a minimum cut.

In: the joint graph of a stage, forward and backward together. Out: the equations of the
backward, and the values that it takes from outside. For `y = tanh(x @ cast(w))`:

    | equation             | made from       | kind     |
    |----------------------|-----------------|----------|
    | w' = cast w          | parameters      | forward  |
    | h = dot x w'         | the microbatch  | forward  |
    | y = tanh h           | the microbatch  | forward  |
    | r = sub 1 y          | the microbatch  | forward  |
    | a = mul dy r         | a cotangent     | backward |
    | b = mul a y          | a cotangent     | backward |
    | dh = add a b         | a cotangent     | backward |
    | dw = cast (dot dh x) | a cotangent     | backward |
    | dx = dot dh w'       | a cotangent     | backward |

The backward reads `w'`, `r`, `y` and `x`. It takes `w`, `y` and `x` from outside, and
makes `w'` and `r` again:

- *Backward* is what depends on a cotangent, and what a `jax.checkpoint` recomputes. It
  is never kept. XLA keeps a recomputation only while it is one equation (or after a
  barrier), so a checkpoint of the forward is left alone.
- What is made from *parameters* alone is made again, never kept: a copy of the weights,
  cast or transposed, would be kept once for each microbatch in flight.
- Among the values that depend on the *microbatch* it keeps a set of the fewest bytes
  from which everything else that the backward reads is cheap to make again. Changes of
  form are cheap, and so are operations that work number by number. The latter are bound
  by memory: to compute a tanh again takes less time than to write and read its result.
  Sums and products are not cheap.
- An equation with effects runs once. Those of the backward, `jax.debug.print` in a
  recomputation for example, belong to it although nothing reads them.
"""

import dataclasses
from collections.abc import Collection, Iterable, Sequence, Set

from fpipe._core.pytrees import device_bytes
from fpipe._program.graph import Graph, Node, needed_nodes
from fpipe._program.min_cut import cheapest

# fmt: off
# Equations that change the form of a value. They cost no more than to copy it.
FORM_CHANGES = {
    "broadcast_in_dim", "convert_element_type", "copy", "expand_dims",
    "optimization_barrier", "reshape", "rev", "squeeze", "transpose",
}

# Equations that work number by number, or select. This is a list of what is cheap, not
# of what is expensive. So the result of a primitive that is in no list is kept: that
# costs memory, but never a second matrix product. Random bits are not here, so a
# dropout mask is kept, not drawn again.
_ELEMENTWISE = {
    "abs", "add", "add_any", "and", "cbrt", "ceil", "clamp", "cos", "div", "eq", "erf",
    "exp", "exp2", "expm1", "floor", "ge", "gt", "imag", "integer_pow", "iota",
    "is_finite", "le", "log", "log1p", "log2", "logistic", "lt", "max", "min", "mul",
    "ne", "neg", "not", "one_minus_square", "or", "polynomial", "pow", "real", "rem",
    "round", "rsqrt", "select_n", "sign", "sin", "slice", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xor",
}
# fmt: on


@dataclasses.dataclass(frozen=True)
class BackwardPart:
    """What only a backward has: what depends on a cotangent, or is recomputed."""

    nodes: Set[Node]
    values: Set[int]

    def without(self, other: "BackwardPart") -> "BackwardPart":
        """What is not in another part."""
        return BackwardPart(self.nodes - other.nodes, self.values - other.values)


@dataclasses.dataclass(frozen=True)
class Backward:
    """A backward, cut off its forward.

    Attributes:
        nodes: its equations.
        takes: the values that it takes from outside: inputs of the graph, cotangents
            among them, and values that the forward hands over.
    """

    nodes: Sequence[Node]
    takes: Sequence[int]


def backward_part(
    graph: Graph, cotangents: Iterable[int], recomputed: bool = True
) -> BackwardPart:
    """The equations and values that only a backward has.

    Arguments:
        recomputed: whether what is recomputed is among them; else what depends on a
            cotangent alone.
    """
    nodes = set[Node]()
    values = set(cotangents)
    for node in graph.nodes:
        again = recomputed and node.recomputes
        if again or not values.isdisjoint(node.ins):
            nodes.add(node)
            values.update(node.outs)
    return BackwardPart(nodes, values)


def cut_off_backward(
    graph: Graph,
    gradients: Collection[int],
    part: BackwardPart,
    per_microbatch: Set[int],
    outputs: Set[int],
) -> Backward:
    """Decide what the forward keeps, and what the backward makes again.

    Arguments:
        graph: forward and backward together.
        gradients: the values that are asked for.
        part: the values that are never kept.
        per_microbatch: the values that depend on the microbatch.
        outputs: what the forward makes anyway, and a backward may read.
    """
    # What must be there when the backward is done: the gradients, and what its
    # equations with effects read.
    effects = [n for n in graph.nodes if n in part.nodes and n.eqn.effects]
    roots = [*gradients, *(v for node in effects for v in node.ins)]
    kept = _cheapest_to_keep(graph, roots, part, per_microbatch, outputs)
    # Go from there towards the inputs. A value that is kept, or is an input, is taken
    # from outside. Otherwise its equation is one of the backward, and the values that
    # it reads are next.
    takes = set[int]()
    makes = set[int]()
    pending = roots
    while pending:
        v = pending.pop()
        if v in makes or v in takes or v in graph.consts:
            continue
        node = graph.maker.get(v)
        # An equation of the forward with effects has run already.
        if node is None or v in kept or (node.eqn.effects and v not in part.values):
            takes.add(v)
        else:
            makes.update(node.outs)
            pending.extend(node.ins)
    nodes = [
        node
        for node in graph.nodes
        if node in effects or not makes.isdisjoint(node.outs)
    ]
    return Backward(nodes, sorted(takes))


def _cheapest_to_keep(
    graph: Graph,
    roots: Sequence[int],
    part: BackwardPart,
    per_microbatch: Set[int],
    outputs: Set[int],
) -> set[int]:
    """The values of the forward that are kept for a backward that makes `roots`."""
    candidates = per_microbatch - part.values - graph.consts.keys()
    # The values of the forward that the equations of the backward read. The roots are
    # among them, because a `print` in a recomputation may show a value of the forward.
    reads = set(roots)
    for node in needed_nodes(graph, roots):
        if node in part.nodes:
            reads.update(node.ins)
    # Values that are no candidates cost nothing when another value is made again from
    # them: parameters are there anyway, and what is made of parameters is made again
    # too.
    remade_from = {
        v: [u for u in node.ins if u in candidates]
        for node in graph.nodes
        if node.name in FORM_CHANGES or node.name in _ELEMENTWISE
        for v in node.outs
        if v in candidates and not node.eqn.effects
    }
    # At least 1: a cut through an edge of capacity 0 costs nothing, so an array without
    # elements would be kept although nobody needs it. Bytes alone decide, not FLOPs: to
    # add the two would need the speeds of the device. A value that an offloading policy
    # has moved to the host takes no memory of the device. Of sets of equal bytes it is
    # the one with more outputs: in JAX 0.12 `1 - y**2` is all that the backward of
    # `y = tanh(x)` reads, and would be a second array beside `y`.
    scale = len(outputs) + 1
    costs = {
        v: scale * max(1, device_bytes(graph.avals[v])) - (v in outputs)
        for v in candidates
    }
    needed = sorted(reads & candidates)
    return cheapest(costs.__getitem__, remade_from.get, needed)
