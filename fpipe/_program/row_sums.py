"""Weight gradients as sums over parts of the rows, so that the parts may stay where
they are.

Under a sharded batch a weight gradient is a sum over all rows, those on other devices
too. XLA adds the devices' parts up where the sum is made: in a pipeline once for each
microbatch. Here the equation that makes the sum is found, and run on each device's rows
alone; its parts are added up once, after the last microbatch. This is exact: a
contraction over rows is the sum of the contractions over parts of them, whatever the
equations before it compute.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import PartitionSpec as P

from fpipe._program.graph import Graph, Node, is_zero

# Equations of one array that commute with a sum over parts.
_LINEAR = {
    "transpose",
    "reshape",
    "convert_element_type",
    "squeeze",
    "expand_dims",
    "neg",
    "copy",
    "broadcast_in_dim",
    "rev",
}


@dataclasses.dataclass(frozen=True)
class Contraction:
    """An equation that sums over rows; `axes` has for each operand the axis of its
    rows, if it has any.
    """

    node: Node
    axes: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Linear:
    """An equation that is linear in one operand, which is a sum over rows."""

    node: Node
    operand: int
    of: "Parts"


@dataclasses.dataclass(frozen=True)
class Sum:
    """A sum of two."""

    first: "Parts"
    second: "Parts"


Parts: TypeAlias = Contraction | Linear | Sum


def parts_of(
    graph: Graph, nodes: Sequence[Node], value: int, rows: int, size: int
) -> Parts | None:
    """How a value that `nodes` make is a sum over rows that can be cut into `size`
    parts; `None` if that cannot be told.
    """
    maker = {v: node for node in nodes for v in node.outs}

    def visit(v: int) -> Parts | None:
        node = maker.get(v)
        if node is None or len(node.outs) > 1:
            return None
        name = node.eqn.primitive.name
        if name in _LINEAR:
            inner = visit(node.ins[0])
            return None if inner is None else Linear(node, 0, inner)
        if name in ("add", "add_any"):
            first, second = visit(node.ins[0]), visit(node.ins[1])
            return None if first is None or second is None else Sum(first, second)
        if name == "mul":
            for n in (0, 1):
                if graph.avals[node.ins[1 - n]].size == 1:
                    inner = visit(node.ins[n])
                    return None if inner is None else Linear(node, n, inner)
        axes = _rows(graph, node, rows, size)
        if axes is None and name == "reduce_sum":  # over other axes
            inner = visit(node.ins[0])
            return None if inner is None else Linear(node, 0, inner)
        return None if axes is None else Contraction(node, axes)

    return visit(value)


def _rows(
    graph: Graph, node: Node, rows: int, size: int
) -> tuple[int | None, ...] | None:
    """The axis of each operand over which an equation sums and along which rows lie."""
    shapes, params = [graph.avals[v].shape for v in node.ins], node.eqn.params
    name = node.eqn.primitive.name

    def fits(operand: int, axis: int) -> bool:
        n = shapes[operand][axis]
        return n % rows == 0 and n % size == 0 and n > 0

    if name == "reduce_sum":
        return next(((axis,) for axis in params["axes"] if fits(0, axis)), None)
    if name == "dot_general":
        (left, right), _ = params["dimension_numbers"]
        return next(
            ((a, b) for a, b in zip(left, right, strict=True) if fits(0, a)), None
        )
    if (
        name == "conv_general_dilated"
        and params["feature_group_count"] == params["batch_group_count"] == 1
    ):
        numbers = params["dimension_numbers"]
        a, b = numbers.lhs_spec[1], numbers.rhs_spec[1]
        return (a, b) if fits(0, a) else None
    if name in ("scatter-add", "scatter_add") and is_zero(graph, node.ins[0]):
        windows = params["dimension_numbers"].update_window_dims
        both = (
            shapes[1][:1] == shapes[2][:1]
            and 0 not in windows
            and not params["dimension_numbers"].operand_batching_dims
        )
        return (None, 0, 0) if both and len(shapes[1]) > 1 and fits(1, 0) else None
    return None


def values_of(parts: Parts) -> Iterator[int]:
    """The values of the graph that it is made of."""
    if isinstance(parts, Contraction):
        yield from parts.node.ins
    elif isinstance(parts, Sum):
        yield from values_of(parts.first)
        yield from values_of(parts.second)
    else:
        yield from (v for n, v in enumerate(parts.node.ins) if n != parts.operand)
        yield from values_of(parts.of)


def summed(parts: Parts, given: Mapping[int, Any], axis: str) -> Any:
    """The parts, on a new first axis that lies over the mesh axis."""
    if isinstance(parts, Sum):
        return summed(parts.first, given, axis) + summed(parts.second, given, axis)
    if isinstance(parts, Linear):
        inner, node = summed(parts.of, given, axis), parts.node
        operands = [
            inner if n == parts.operand else given[v] for n, v in enumerate(node.ins)
        ]
        return jax.vmap(
            _bind(node),
            [0 if n == parts.operand else None for n in range(len(operands))],
        )(*operands)
    operands = [given[v] for v in parts.node.ins]
    specs = [P(*([None] * a), axis) if a is not None else P() for a in parts.axes]
    run = _bind(parts.node)
    local = jax.shard_map(
        lambda *own: run(*own)[None],
        in_specs=tuple(specs),
        out_specs=P(axis),
        axis_names={axis},
        check_vma=False,
    )
    return local(*operands)


def _bind(node: Node) -> Any:
    eqn = node.eqn

    def run(*operands: Any) -> Any:
        with eqn.ctx.manager:
            out = eqn.primitive.bind(
                *operands, **eqn.primitive.get_bind_params(eqn.params)
            )
        return out[0] if eqn.primitive.multiple_results else out

    return run
