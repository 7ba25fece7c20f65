"""Operations that work row by row: from which rows of the operands a row of the result
is made.

In: an equation, and a `Part` of its result, which is some rows on one of its axes. Out:
the parts of its operands that it is made of. With `w` of [4, 3, 5]

    equation                        part of the result     parts of the operands
    v = transpose w (1, 0, 2)       rows 2:3 on axis 1     rows 2:3 on axis 0
    u = mul v 0.5                   rows 2:3 on axis 1     rows 2:3 on axis 1, a number
    r = rev w (0,)                  rows 0:1 on axis 0     rows 3:4 on axis 0
    p = reshape w [2, 2, 3, 5]      rows 1:2 on axis 0     rows 2:4 on axis 0
    s = reduce_sum w (0,)           -                      none: it needs them all

The same equation then makes the part, with other sizes where they stand in it.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fpipe._program.graph import Node

# Operations that make each row of their result of the same row of what they read; all
# that they read has the shape of the result, or is a number.
# fmt: off
_ELEMENTWISE = frozenset((
    "abs", "add", "ceil", "convert_element_type", "copy", "div", "exp", "floor",
    "integer_pow", "log", "log2", "max", "min", "mul", "name", "neg", "polynomial",
    "pow", "reduce_precision", "round", "rsqrt", "sign", "sqrt", "square",
    "stop_gradient", "sub", "tanh",
))
# fmt: on


@dataclasses.dataclass(frozen=True, order=True)
class Part:
    """Some rows of an array: those from `start` up to `stop` on an axis."""

    axis: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        """How many rows."""
        return self.stop - self.start

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The shape of this part of an array."""
        return (*whole[: self.axis], self.count, *whole[self.axis + 1 :])

    def of(self, array: Any) -> Any:
        """The part of an array."""
        return array[(*[slice(None)] * self.axis, slice(self.start, self.stop))]


def joined_axis(node: Node) -> int | None:
    """The axis on which an equation puts its operands one after the other; `None`: it
    is no join.
    """
    params = node.eqn.params
    if node.name == "concatenate":
        return params["dimension"]
    return params["axis"] if node.name == "stack" else None


def joined_parts(node: Node, avals: Mapping[int, Any]) -> list[Part]:
    """The part of a join that each of its operands is."""
    axis = joined_axis(node)
    assert axis is not None
    stacked = node.name == "stack"
    counts = (1 if stacked else avals[v].shape[axis] for v in node.ins)
    ends = itertools.accumulate(counts, initial=0)
    return [Part(axis, a, b) for a, b in itertools.pairwise(ends)]


def goes_by_rows(node: Node, avals: Mapping[int, Any], axis: int) -> Mapping[int, Part]:
    """For each operand, by its number, the part that an equation needs for its first
    rows on an axis; none: it does not go by rows.
    """
    shape = avals[node.outs[0]].shape
    # As few rows as can be made by themselves.
    count = 1
    if node.name == "reshape" and math.prod(shape):
        old = avals[node.ins[0]].shape
        before = _same_axis(old, shape, axis)
        if before is not None:
            count = max(1, _row_size(old, before) // _row_size(shape, axis))
    return sources(node, avals, Part(axis, 0, count)) or {}


def sources(node: Node, avals: Mapping[int, Any], part: Part) -> dict[int, Part] | None:
    """For each operand, by its number, the part that a part of the result is made of;
    the others are numbers. `None`: it is made of more.
    """
    params = node.eqn.params
    shape = avals[node.outs[0]].shape
    shapes = [avals[v].shape for v in node.ins]
    axis = part.axis
    if node.name in _ELEMENTWISE:
        if any(s not in ((), shape) for s in shapes):
            return None
        return {n: part for n, s in enumerate(shapes) if s}
    if node.name == "rev":
        last = shape[axis]
        back = Part(axis, last - part.stop, last - part.start)
        return {0: back if axis in params["dimensions"] else part}
    if node.name == "reshape" and params["dimensions"] is None:
        return _sources_of_reshape(shapes[0], shape, part)
    if node.name == "transpose":
        return {0: dataclasses.replace(part, axis=params["permutation"][axis])}
    if node.name == "squeeze":
        kept = [d for d in range(len(shapes[0])) if d not in params["dimensions"]]
        return {0: dataclasses.replace(part, axis=kept[axis])}
    if node.name == "broadcast_in_dim" and len(node.ins) == 1:
        own = [d for d, to in enumerate(params["broadcast_dimensions"]) if to == axis]
        if own and shapes[0][own[0]] == shape[axis]:
            return {0: dataclasses.replace(part, axis=own[0])}
    return None


def _sources_of_reshape(
    old: Sequence[int], new: Sequence[int], part: Part
) -> dict[int, Part] | None:
    """A row is consecutive numbers, and the axes before it have the same sizes in all
    arrays.
    """
    axis = _same_axis(old, new, part.axis)
    if axis is None or not math.prod(old):
        return None
    size = _row_size(old, axis)
    first, last = (end * _row_size(new, part.axis) for end in (part.start, part.stop))
    if first % size or last % size:
        return None
    return {0: Part(axis, first // size, last // size)}


def _same_axis(old: Sequence[int], new: Sequence[int], axis: int) -> int | None:
    """The axis before a reshape that begins where one after it does."""
    outside = math.prod(new[:axis])
    found = [n for n in range(len(old)) if math.prod(old[:n]) == outside]
    # An axis of one row is none.
    return max(found, default=None)


def _row_size(shape: Sequence[int], axis: int) -> int:
    return math.prod(shape[axis + 1 :])


def changed_sizes(node: Node, part: Part) -> dict[str, Any]:
    """The parameters of an equation that are others where it makes a part of its
    result.
    """
    params = node.eqn.params
    sizes = (n for n in ("new_sizes", "shape") if n in params)
    return {name: part.shape(params[name]) for name in sizes}


def taken_parts(
    node: Node, shape: Sequence[int], known: Mapping[int, np.ndarray | None]
) -> list[Part]:
    """For each result of an equation the part of its first operand that it is; none: it
    takes no rows.

    Arguments:
        shape: of the first operand.
        known: the values of the other operands that are known, `None` of others.
    """
    params = node.eqn.params
    if node.name == "slice":
        ends = list(zip(params["start_indices"], params["limit_indices"], strict=True))
        cut = [n for n, size in enumerate(shape) if ends[n] != (0, size)]
        if len(cut) > 1 or set(params["strides"] or (1,)) != {1}:
            return []
        part = Part(cut[0] if cut else 0, *ends[cut[0] if cut else 0])
        # On another axis than the first it is an index, `w[:, 1]`: some columns of a
        # weight are no layers.
        return [part] if not part.axis or part.count == 1 else []
    if node.name == "split" and params["axis"] == 0:
        ends = np.cumsum([0, *params["sizes"]]).tolist()
        return [Part(0, a, b) for a, b in itertools.pairwise(ends)]
    # `for w in stack`, from JAX 0.12 on.
    if node.name == "unstack" and params["axis"] == 0:
        return [Part(0, n, n + 1) for n in range(shape[0])]
    axis = indexed_axis(node, shape)
    if axis is None:
        return []
    index = known[index_operand(node, axis)]
    if index is None or index.size != 1:
        return []
    start, count = int(index.reshape(())), params["slice_sizes"][axis]
    if node.name == "dynamic_slice":
        start = min(max(start, 0), shape[axis] - count)
    elif not 0 <= start < shape[axis]:
        return []
    return [Part(axis, start, start + count)]


def indexed_axis(node: Node, shape: Sequence[int]) -> int | None:
    """The axis on which an equation takes rows of its first operand by an index;
    `None`: it does not.

    Arguments:
        shape: of the first operand.
    """
    params = node.eqn.params
    if node.name not in ("dynamic_slice", "gather") or not shape:
        return None
    pairs = zip(params["slice_sizes"], shape, strict=True)
    cut = [axis for axis, (size, whole) in enumerate(pairs) if size != whole]
    # Of a stack of one row it is the first axis.
    axis = cut[0] if cut else 0
    if len(cut) > 1:
        return None
    if node.name == "gather":
        numbers = params["dimension_numbers"]
        own = (axis,) == numbers.start_index_map == numbers.collapsed_slice_dims
        # After the first axis that of the rows has to be gone.
        gone = not axis or node.rank == len(shape) - 1
        return axis if own and gone and params["slice_sizes"][axis] == 1 else None
    return axis


def index_operand(node: Node, axis: int) -> int:
    """The number of the operand that says which rows it takes."""
    return 1 if node.name == "gather" else 1 + axis
