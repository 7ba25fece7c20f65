"""FLOPs of equations, estimated by rules: what decides is the products.

In: a node of a graph. Out: a number, for example

    dot_general  f32[8,4] @ f32[4,16]    2 * 8 * 16 * 4 = 1024
    tanh         f32[8,16]               128, one for each number that it makes
    scan         of 10 rounds            10 times what its body takes

XLA counts a whole program more exactly (`fpipe._planning.work`), but to lower each
equation of a large function by itself would take minutes. Where stages are cut, matrix
products and convolutions decide.
"""

import math
from typing import Any

from fpipe._program.graph import Node


def flops(node: Node) -> float:
    """What an equation takes, its bodies included."""
    made = sum(math.prod(atom.aval.shape) for atom in node.eqn.outvars)
    if node.name == "dot_general":
        (contracted, _), _ = node.eqn.params["dimension_numbers"]
        left = node.eqn.invars[0].aval.shape
        return 2.0 * made * math.prod(left[axis] for axis in contracted)
    if node.name == "conv_general_dilated":
        kernel: Any = node.eqn.invars[1].aval.shape
        outputs = kernel[node.eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * made * math.prod(kernel) / outputs
    parts = [sum(map(flops, body.nodes)) for body in node.bodies]
    if not parts:
        return float(made)
    # Of the branches of a `cond` the most expensive one; a `while` counts as one round.
    return max(parts) if node.name == "cond" else node.body_runs * sum(parts)
