"""Weight gradients as sums over parts of the rows, so that the parts may stay where
they are.

Under a sharded batch a weight gradient is a sum over all rows, those on other devices
too. XLA adds the devices' parts up where the sum is made: in a pipeline once for each
microbatch. Here the equation that makes the sum is found, and run on each device's rows
alone; its parts are added up once, after the last microbatch. This is exact: a
contraction over rows is the sum of the contractions over parts of them, whatever the
equations before it compute.

For a dense layer's gradient, `2 * transpose(dot_general(dy, x))` with the rows on axis
0 of both, `find_row_sum` gives

    LinearMap(
        mul,
        operand=1,
        argument=Contraction(dot_general, row_axes=(0, 0), exchanged=True),
    )

and `sum_rows_apart` of it, on 4 devices with 2 rows each, an array with one axis more,
of 4 parts: `2 * dot_general(x[0:2], dy[0:2])`, and so on.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fpipe._model.specs import axes_in, without_axes
from fpipe._program.graph import Graph, Node, bind, is_zero
from fpipe._program.products import bind_exchanged, is_exchange

# Equations of one array that commute with a sum over parts. (A cast to fewer bits does
# so up to rounding: the parts are rounded, not their sum.)
_LINEAR = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "expand_dims",
    "neg",
    "reshape",
    "rev",
    "squeeze",
    "transpose",
}


@dataclasses.dataclass(frozen=True)
class Contraction:
    """An equation that sums over rows.

    Attributes:
        row_axes: the axis of each operand's rows, `None` if it has none.
        exchanged: whether it is a product whose operands are exchanged (`products.py`).
    """

    node: Node
    row_axes: tuple[int | None, ...]
    exchanged: bool = False


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """An equation that is linear in one operand: `argument`, a sum over rows."""

    node: Node
    operand: int
    argument: "RowSum"


@dataclasses.dataclass(frozen=True)
class Addition:
    """A sum of two sums over rows."""

    first: "RowSum"
    second: "RowSum"


RowSum: TypeAlias = Contraction | LinearMap | Addition


def find_row_sum(
    graph: Graph, nodes: Sequence[Node], value: int, rows: int, parts: int
) -> RowSum | None:
    """How a value is a sum over rows that can be cut into `parts`.

    Arguments:
        nodes: the equations that make it.
        rows: the number of rows; an axis that is a multiple of it holds rows too.

    Returns:
        `None` if that cannot be told.
    """
    # From the gradient backwards through linear equations, until an equation that sums
    # over rows is found. Any equation that is not known ends the search. The value is
    # then summed as written, which is right too, but slower.
    maker = {v: node for node in nodes for v in node.outs}

    def linear(node: Node, operand: int) -> RowSum | None:
        argument = visit(node.ins[operand])
        if (
            isinstance(argument, Contraction)
            and not argument.exchanged
            and is_exchange(argument.node, node)
        ):
            return dataclasses.replace(argument, exchanged=True)
        return None if argument is None else LinearMap(node, operand, argument)

    def visit(v: int) -> RowSum | None:
        node = maker.get(v)
        if node is None or len(node.outs) > 1:
            return None
        if node.name in _LINEAR:
            return linear(node, 0)
        if node.name in ("add", "add_any"):
            first, second = visit(node.ins[0]), visit(node.ins[1])
            return None if first is None or second is None else Addition(first, second)
        if node.name == "mul":
            # By a scalar: a loss scale, or one over the number of rows. With an array
            # the product may be linear too, but then either factor may hold rows.
            for operand in (0, 1):
                if graph.avals[node.ins[1 - operand]].size == 1:
                    return linear(node, operand)
        row_axes = _row_axes(graph, node, rows, parts)
        if row_axes is not None:
            return Contraction(node, row_axes)
        if node.name == "reduce_sum":  # over other axes
            return linear(node, 0)
        return None

    return visit(value)


def _row_axes(
    graph: Graph, node: Node, rows: int, parts: int
) -> tuple[int | None, ...] | None:
    """The axis of each operand over which an equation sums and along which rows lie.

    An axis of rows is recognised by its length alone: `rows`, or a multiple of it where
    a reshape has merged rows and tokens. If another axis happens to be as long, the
    result is still right, because a sum over any axis can be cut into parts. But those
    parts are on other devices, so XLA moves them first.
    """
    shapes = [graph.avals[v].shape for v in node.ins]
    params = node.eqn.params

    def has_rows(operand: int, axis: int) -> bool:
        length = shapes[operand][axis]
        return length > 0 and length % rows == 0 and length % parts == 0

    if node.name == "reduce_sum":
        found = (axis for axis in params["axes"] if has_rows(0, axis))
        return next(((axis,) for axis in found), None)
    if node.name == "dot_general":
        (left, right), _ = params["dimension_numbers"]
        pairs = zip(left, right, strict=True)
        return next(((a, b) for a, b in pairs if has_rows(0, a)), None)
    if node.name == "conv_general_dilated":
        if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
            return None
        numbers = params["dimension_numbers"]
        # A convolution sums over its features. In a weight gradient these are the rows.
        a, b = numbers.lhs_spec[1], numbers.rhs_spec[1]
        return (a, b) if has_rows(0, a) else None
    if node.name in ("scatter-add", "scatter_add") and is_zero(graph, node.ins[0]):
        numbers = params["dimension_numbers"]
        # The gradient of an embedding: rows of `updates` are added into zeros. Into
        # other numbers it would add these once for each part.
        _, indices, updates = shapes
        row_by_row = (
            indices[:1] == updates[:1]
            and 0 not in numbers.update_window_dims
            and not numbers.operand_batching_dims
        )
        if row_by_row and len(indices) > 1 and has_rows(1, 0):
            return None, 0, 0
    return None


def values_read(row_sum: RowSum) -> Iterator[int]:
    """The values of the graph that a sum over rows is made from."""
    match row_sum:
        case Contraction(node):
            yield from node.ins
        case LinearMap(node, operand, argument):
            yield from (v for n, v in enumerate(node.ins) if n != operand)
            yield from values_read(argument)
        case Addition(first, second):
            yield from values_read(first)
            yield from values_read(second)


def sum_rows_apart(
    row_sum: RowSum,
    values: Mapping[int, Any],
    axes: str | tuple[str, ...],
    mesh: Mesh | None = None,
) -> Any:
    """The sums over the rows of each device, on a new first axis.

    Arguments:
        values: those of `values_read`.
        axes: the mesh axes over which the rows lie, and the new axis will.
        mesh: that of the axes; default the one in the context.
    """
    match row_sum:
        case Addition(first, second):
            return sum_rows_apart(first, values, axes, mesh) + sum_rows_apart(
                second, values, axes, mesh
            )
        case LinearMap(node, operand, argument):
            operands = [
                sum_rows_apart(argument, values, axes, mesh)
                if n == operand
                else values[v]
                for n, v in enumerate(node.ins)
            ]
            # The parts are a new axis, which the equation does not know. JAX's batching
            # rule, by `vmap`, changes its axes.
            mapped = [0 if n == operand else None for n in range(len(operands))]
            return jax.vmap(lambda *arrays: bind(node, arrays)[0], mapped)(*operands)
        case Contraction(node, row_axes, exchanged):
            run = bind_exchanged if exchanged else bind
            # Only this equation runs device by device. The whole backward under
            # `shard_map` would make every mean over the batch (batch norm) a mean over
            # the rows of one device.
            over_devices = jax.shard_map(
                lambda *own: run(node, own)[0][None],
                mesh=mesh,
                in_specs=tuple(
                    P() if a is None else P(*[None] * a, axes) for a in row_axes
                ),
                out_specs=P(axes),
                axis_names={axes} if isinstance(axes, str) else set(axes),
                check_vma=False,
            )
            return over_devices(*(values[v] for v in node.ins))


def add_parts(
    parts: Any,
    total: P,
    data: Sequence[str],
    axes: Collection[str],
    mesh: Mesh | None = None,
) -> Any:
    """The parts that devices have of the gradient of a parameter, added up.

    If a parameter is cut over an axis of rows, each device gets its own piece of the
    gradient's sum. XLA on CPUs would give each device the whole sum, and then cut it.
    So the collective is named.

    Arguments:
        parts: on a first axis, which lies over the axes of rows `data`.
        total: how the parameter is cut.
        axes: of the mesh of its stage.
        mesh: default the one in the context.
    """
    rows = {*data}
    cut = [n for n, part in enumerate(total) if not rows.isdisjoint(axes_in(part))]
    if len(cut) != 1:
        return parts.sum(0)
    (axis,) = cut
    along = axes_in(total[axis])
    names = tuple(name for name in along if name in rows)
    # If the axes of rows come first, pieces of pieces lie in another order.
    if along[-len(names) :] != names:
        return parts.sum(0)
    others = tuple(name for name in data if name not in names)

    def own_piece(part: Any) -> Any:
        mine = part[0] if not others else jax.lax.psum(part[0], others)
        return jax.lax.psum_scatter(mine, names, scatter_dimension=axis, tiled=True)

    return jax.shard_map(
        own_piece,
        mesh=mesh,
        in_specs=P(tuple(data), *without_axes(total, data)),
        out_specs=total,
        axis_names={*axes},
        check_vma=False,
    )(parts)
