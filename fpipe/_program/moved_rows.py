"""Equations that move rows along the axis on which they lie.

In: a graph, and on which axis of its inputs rows lie. Out: the first equation that
takes some rows away, adds some, or changes their order by a fixed pattern. Of
`tanh(jnp.roll(x @ w, 1, axis=0))`, with the rows of `x` on axis 0,

    | equation    | reads | makes | rows on | moves rows              |
    | dot_general | x, w  | 2     | 0       |                         |
    | slice       | 2     | 3     | 0       | takes the last: is found |

Where devices share rows, XLA turns such an equation into exchanges between neighbours.
An index by an array, a sort, or a mean over rows becomes another collective, so these
are not looked for. If an equation is not known here, the rows of its results are not
followed: to miss an equation that moves rows is better than to name a wrong one.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from fpipe._program.control_flow import is_remat, scan_parts
from fpipe._program.graph import Graph, Node

_UNKNOWN = frozenset(
    ("gather", "scatter", "scatter-add", "while", "dynamic_update_slice", "iota")
)


def find_moved_rows(graph: Graph, rows_on: Mapping[int, int]) -> Node | None:
    """The first equation that moves rows; `None`: there is none.

    Arguments:
        rows_on: by value of the graph the axis on which its rows lie.
    """
    return _visit(graph, dict(rows_on))


def _visit(graph: Graph, axes: dict[int, int]) -> Node | None:
    """The first equation that moves rows; the axes of what is made are added."""
    for node in graph.nodes:
        for operand, v in enumerate(node.ins):
            if v in axes and _moves(node, graph.avals[v].shape, axes[v]):
                return node
            if v in axes and not node.bodies:
                _follow(graph, node, operand, axes)
        found = _inside(node, axes)
        if found is not None:
            # What is inside knows the names inside alone.
            around = "/".join(filter(None, (node.scope, found.scope)))
            return dataclasses.replace(found, scope=around)
    return None


def _moves(node: Node, shape: Sequence[int], axis: int) -> bool:
    """Whether an equation moves the rows of an operand."""
    params = node.eqn.params
    if node.name == "rev":
        return axis in params["dimensions"]
    if node.name == "slice":
        start, stop = params["start_indices"][axis], params["limit_indices"][axis]
        step = (params["strides"] or [1] * len(shape))[axis]
        return (start, stop, step) != (0, shape[axis], 1)
    if node.name == "pad":
        return any(params["padding_config"][axis])
    if node.name == "concatenate":
        return axis == params["dimension"]
    if node.name in ("split", "unstack"):
        return axis == params["axis"]
    if node.name == "tile":
        return params["reps"][axis] != 1
    return False


def _follow(graph: Graph, node: Node, operand: int, axes: dict[int, int]) -> None:
    """Note the axis of rows of what an equation makes of an operand."""
    v = node.ins[operand]
    for out in node.outs:
        axis = _axis_after(
            node, operand, graph.avals[v].shape, graph.avals[out].shape, axes[v]
        )
        if axis is not None:
            axes.setdefault(out, axis)


def _axis_after(
    node: Node, operand: int, before: Sequence[int], after: Sequence[int], axis: int
) -> int | None:
    """The axis of rows of a result, from that of an operand."""
    params = node.eqn.params
    if node.name in _UNKNOWN:
        return None
    if node.name == "transpose":
        return tuple(params["permutation"]).index(axis)
    if node.name == "broadcast_in_dim":
        return params["broadcast_dimensions"][axis]
    if node.name == "stack":
        return axis + (params["axis"] <= axis)
    if node.name == "unstack":
        return axis - (params["axis"] < axis)
    if node.name in ("reshape", "squeeze", "expand_dims"):
        # The axis of the result that has the same length, and as many numbers before
        # it.
        ahead = math.prod(before[:axis])
        for k, length in enumerate(after):
            if length == before[axis] and math.prod(after[:k]) == ahead:
                return k
        return None
    if node.name == "dot_general":
        contracted, batched = params["dimension_numbers"]
        mine, batch = contracted[operand], batched[operand]
        if axis in batch:
            return tuple(batch).index(axis)
        free = [n for n in range(len(before)) if n not in (*mine, *batch)]
        if axis not in free:
            return None
        # Batched axes first, then the free ones of the left and of the right operand.
        first = len(batch) if operand == 0 else len(after) - len(free)
        return first + free.index(axis)
    if node.name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        is_batch = operand == 0 and numbers.lhs_spec[0] == axis
        return numbers.out_spec[0] if is_batch else None
    if node.name.startswith("reduce_") or node.name in ("argmax", "argmin"):
        gone = params.get("axes", ())
        return None if axis in gone else axis - sum(n < axis for n in gone)
    if len(after) == len(before) and after[axis] == before[axis]:
        return axis
    return None


def _inside(node: Node, axes: dict[int, int]) -> Node | None:
    """The first equation that moves rows inside of another one."""
    if not node.bodies or node.name in _UNKNOWN:
        return None
    if node.name == "scan":
        first = sum(scan_parts(node))
        own = [
            axes[v] - (n >= first) if v in axes and axes[v] >= (n >= first) else None
            for n, v in enumerate(node.ins)
        ]
        carried = scan_parts(node)[1]
        return _body(node, node.bodies[0], own, axes, stacked_from=carried)
    if node.name == "cond":
        own = [axes.get(v) for v in node.ins[1:]]
        for body in node.bodies:
            found = _body(node, body, own, axes)
            if found is not None:
                return found
        return None
    one = node.bodies[0]
    called = is_remat(node) or node.name.startswith("custom_")
    if not called or len(one.inputs) != len(node.ins):
        return None
    return _body(node, one, [axes.get(v) for v in node.ins], axes)


def _body(
    node: Node,
    body: Graph,
    own: Sequence[int | None],
    axes: dict[int, int],
    stacked_from: int | None = None,
) -> Node | None:
    """The first equation that moves rows in a body; the axes of what it returns are
    noted for what its equation makes.

    Arguments:
        own: of each input the axis of its rows.
        stacked_from: the results from this one on are stacked on a first axis.
    """
    inside = {v: a for v, a in zip(body.inputs, own, strict=True) if a is not None}
    found = _visit(body, inside)
    if found is not None:
        return found
    for n, (out, inner) in enumerate(zip(node.outs, body.outputs, strict=False)):
        if inner in inside:
            stacked = stacked_from is not None and n >= stacked_from
            axes.setdefault(out, inside[inner] + stacked)
    return None
