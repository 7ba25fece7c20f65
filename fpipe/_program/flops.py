"""FLOPs of equations, counted by rules. In most models matrix products are nearly all
of them.

In: a node of a graph. Out: a number, for example

    dot_general  f32[8,4] @ f32[4,16]    2 * 8 * 16 * 4 = 1024
    tanh         f32[8,16]               128, one for each number that it makes
    reduce_sum   f32[8,16] to f32[8]     128, one for each number that it reads
    reshape      f32[8,16] to f32[128]   0, it moves what is there
    scan         of 10 rounds            10 times what its body takes

This counts the forward of one equation. `roofline.py` makes a cost of it, by which a
function can be cut at any of its thousands of equations. `fpipe.balance`, plans and
tuning use XLA's count of whole programs, forward and backward (`fpipe._planning.work`).
To lower each equation of a large function by itself would take minutes. The two agree
in matrix products and convolutions, and nearly in the rest (XLA counts an `exp` apart).
"""

import math
from typing import Any

from fpipe._program.graph import Node

# Operations that move numbers, or say something about them.
# fmt: off
_MOVES = frozenset((
    "bitcast_convert_type", "broadcast_in_dim", "concatenate", "copy", "copy_p",
    "device_put", "dynamic_slice", "dynamic_update_slice", "expand_dims", "gather",
    "iota", "name", "pad", "random_unwrap", "random_wrap", "reshape", "rev",
    "sharding_constraint", "slice", "split", "squeeze", "stop_gradient", "transpose",
))
# fmt: on


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
    if node.name in _MOVES:
        return 0.0
    if node.name.startswith("reduce_") or node.name in ("argmax", "argmin"):
        return float(math.prod(node.eqn.invars[0].aval.shape))
    parts = [sum(map(flops, body.nodes)) for body in node.bodies]
    if not parts:
        return float(made)
    # Of the branches of a `cond` the most expensive one; a `while` counts as one round.
    return max(parts) if node.name == "cond" else node.body_runs * sum(parts)
