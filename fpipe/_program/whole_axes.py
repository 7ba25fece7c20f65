"""Equations that move numbers along an axis, run where that axis is whole.

In: an equation, and its operands, which XLA may have cut over devices along any axis.
Out: its results. Of `h[:, :3]`, where devices share the columns of `h`:

    h = with_sharding_constraint(h, P(UNCONSTRAINED, None))     an all-gather
    y = slice(h)
    y = with_sharding_constraint(y, P(UNCONSTRAINED, None))

As written, XLA would have neighbours exchange the columns that change their device. On
CPUs such an exchange (a `collective-permute`) waits for all devices of the program. In
the scan executor those of other stages do something else, and never come. An all-gather
waits for the devices that share the axis alone.

An index by an array, a sort, a mean or a product along a shared axis becomes another
collective, so these run as they are written.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from fpipe._model.specs import axes_in
from fpipe._program.graph import Node, bind
from fpipe._program.retracing import function_of, retrace

Axes: TypeAlias = tuple[int, ...]


class MovedAxes(NamedTuple):
    """The axes along which an equation moves numbers, of each operand and result."""

    ins: tuple[Axes, ...]
    outs: tuple[Axes, ...]


@dataclasses.dataclass(frozen=True)
class WholeAxes:
    """Runs equations; see above.

    Attributes:
        sizes: of the axes of the mesh that are left to XLA.
        taken: axes of the mesh that a `shard_map` around the equations has taken. What
            a layer says of these says nothing here: each device has all of an array.
    """

    sizes: tuple[int, ...]
    taken: frozenset[str] = frozenset()

    def __call__(self, node: Node, inputs: Sequence[Any]) -> Sequence[Any]:
        """The results of an equation."""
        if self.taken:
            # A literal of a jaxpr knows the mesh that it was traced under.
            inputs = [a if isinstance(a, jax.Array) else np.asarray(a) for a in inputs]
        if node.name == "sharding_constraint" and self.taken:
            return [self._constrained(node, inputs[0])]
        if node.bodies and any(map(self._is_changed, _inner_nodes(node))):
            return retrace(node, inputs, lambda body: function_of(body, self))
        # Some equations that make an array of nothing know the mesh as well.
        changed = {}
        if self.taken and node.eqn.params.get("sharding") is not None:
            changed["sharding"] = None
        moved = moved_axes(node, self.sizes)
        if moved is None:
            return bind(node, inputs, **changed)
        whole = list(map(_made_whole, inputs, moved.ins))
        return list(map(_made_whole, bind(node, whole, **changed), moved.outs))

    def _is_changed(self, node: Node) -> bool:
        """Whether an equation is not run as it is written."""
        # What is inside of others knows the mesh too, so it is traced anew.
        return bool(self.taken) or moved_axes(node, self.sizes) is not None

    def _left(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in names if name not in self.taken)

    def _constrained(self, node: Node, array: Any) -> Any:
        """An array as a layer wants it, over the axes that are left."""
        said = node.eqn.params["sharding"].spec
        free = P.UNCONSTRAINED
        left = [free if part is free else self._left(axes_in(part)) for part in said]
        return jax.lax.with_sharding_constraint(array, P(*left))


def moved_axes(node: Node, sizes: Collection[int] = ()) -> MovedAxes | None:
    """The axes along which an equation moves numbers; `None`: it moves none.

    Arguments:
        sizes: of the axes of the mesh. If one divides what a reshape merges or splits,
            devices keep their parts.
    """
    before = [v.aval.shape for v in node.eqn.invars]
    after = [v.aval.shape for v in node.eqn.outvars]
    if node.name == "reshape":
        moved = _reshape(before[0], after[0], sizes)
    elif node.name in _MOVES:
        moved = _MOVES[node.name](node.eqn.params, before, after)
    else:
        return None
    return moved if any((*moved.ins, *moved.outs)) else None


def exchanges_nothing(nodes: Iterable[Node]) -> bool:
    """Whether devices that share one axis exchange nothing by a `collective-permute`,
    if these equations run as in `WholeAxes`. An equation that is not known may exchange
    something.
    """
    return all(
        exchanges_nothing(inner for body in node.bodies for inner in body.nodes)
        if node.bodies and node.name not in _KNOWN
        else node.name in _KNOWN
        for node in nodes
    )


def _made_whole(array: Any, axes: Axes) -> Any:
    """An array that is cut along other axes alone."""
    # Constants are whole. Keys are no arrays of numbers, and XLA cuts none.
    if not axes or not isinstance(array, jax.Array):
        return array
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return array
    free = P.UNCONSTRAINED
    spec = P(*(None if n in axes else free for n in range(array.ndim)))
    return jax.lax.with_sharding_constraint(array, spec)


def _inner_nodes(node: Node) -> Iterator[Node]:
    """The equations in the bodies of one, at any depth."""
    for body in node.bodies:
        for inner in body.nodes:
            yield inner
            yield from _inner_nodes(inner)


# --- the axes of each kind of equation ---

Params: TypeAlias = Mapping[str, Any]
Shapes: TypeAlias = Sequence[tuple[int, ...]]


def _everywhere(axes: Iterable[int], before: Shapes, after: Shapes) -> MovedAxes:
    """The same axes of each operand and result that has any."""
    found = tuple(axes)
    return MovedAxes(
        tuple(found if shape else () for shape in before),
        tuple(found if shape else () for shape in after),
    )


def _changed(whole: Sequence[int], part: Sequence[int]) -> list[int]:
    """The axes along which a part of an array is shorter."""
    return [n for n, (a, b) in enumerate(zip(whole, part, strict=True)) if a != b]


def _slice(params: Params, before: Shapes, after: Shapes) -> MovedAxes:
    return _everywhere(_changed(before[0], after[0]), before, after)


def _pad(params: Params, before: Shapes, after: Shapes) -> MovedAxes:
    config = params["padding_config"]
    return _everywhere((n for n, p in enumerate(config) if any(p)), before, after)


def _update_slice(params: Params, before: Shapes, after: Shapes) -> MovedAxes:
    return _everywhere(_changed(before[0], before[1]), before, after)


def _along(name: str) -> Callable[[Params, Shapes, Shapes], MovedAxes]:
    """The axes that a parameter of the equation names."""

    def find(params: Params, before: Shapes, after: Shapes) -> MovedAxes:
        axes = params[name]
        own = axes if isinstance(axes, tuple) else (int(axes),)
        return _everywhere(own, before, after)

    return find


def _tile(params: Params, before: Shapes, after: Shapes) -> MovedAxes:
    reps = params["reps"]
    return _everywhere((n for n, r in enumerate(reps) if r != 1), before, after)


def _stack(params: Params, before: Shapes, after: Shapes) -> MovedAxes:
    return MovedAxes(((),) * len(before), ((params["axis"],),))


def _unstack(params: Params, before: Shapes, after: Shapes) -> MovedAxes:
    return MovedAxes(((params["axis"],),), ((),) * len(after))


def _window(params: Params, before: Shapes, after: Shapes) -> MovedAxes:
    window = params["window_dimensions"]
    strides = params.get("window_strides") or (1,) * len(window)
    sizes = zip(window, strides, strict=True)
    return _everywhere(
        (n for n, own in enumerate(sizes) if own != (1, 1)), before, after
    )


def _convolution(params: Params, before: Shapes, after: Shapes) -> MovedAxes:
    numbers = params["dimension_numbers"]
    specs = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
    # Each begins with two axes of batch and features.
    grouped = params["feature_group_count"] * params["batch_group_count"] > 1
    lhs, rhs, out = (tuple(spec if grouped else spec[2:]) for spec in specs)
    return MovedAxes((lhs, rhs), (out,))


def _reshape(
    before: Sequence[int], after: Sequence[int], sizes: Collection[int]
) -> MovedAxes:
    """The axes that are merged or split.

    Of several that are merged devices can keep their parts of the first one, if its
    length and that of the result are multiples of the number of devices.
    """
    ins: list[int] = []
    outs: list[int] = []
    for group in _groups(before, after):
        lengths = [
            [(n, shape[n]) for n in axes if shape[n] != 1]
            for axes, shape in zip(group, (before, after), strict=True)
        ]
        if max(map(len, lengths)) < 2:
            continue
        firsts = [own[0][1] for own in lengths]
        kept = any(math.gcd(*firsts) % size == 0 for size in sizes)
        for own, found in zip(lengths, (ins, outs), strict=True):
            found += [n for n, _ in own[kept:]]
    return MovedAxes((tuple(ins),), (tuple(outs),))


def _groups(
    before: Sequence[int], after: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Which axes of a reshaped array become which: `[2, 3, 4] -> [6, 4]` gives
    `([0, 1], [0]), ([2], [1])`.
    """
    if 0 in before:
        return []
    found: list[tuple[list[int], list[int]]] = []
    old, new = list(range(len(before))), list(range(len(after)))
    while old and new:
        ins, outs = [old.pop(0)], [new.pop(0)]
        while (a := _size(before, ins)) != (b := _size(after, outs)):
            if a < b:
                ins.append(old.pop(0))
            else:
                outs.append(new.pop(0))
        found.append((ins, outs))
    return found


def _size(shape: Sequence[int], axes: Iterable[int]) -> int:
    return math.prod(shape[n] for n in axes)


_CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
_WINDOWED = (
    "reduce_window",
    "reduce_window_sum",
    "reduce_window_max",
    "reduce_window_min",
    "select_and_scatter",
    "select_and_scatter_add",
    "select_and_gather_add",
)
_MOVES: Mapping[str, Callable[[Params, Shapes, Shapes], MovedAxes]] = {
    "slice": _slice,
    "dynamic_slice": _slice,
    "dynamic_update_slice": _update_slice,
    "pad": _pad,
    "concatenate": _along("dimension"),
    "split": _along("axis"),
    "rev": _along("dimensions"),
    "tile": _tile,
    "stack": _stack,
    "unstack": _unstack,
    "conv_general_dilated": _convolution,
    **dict.fromkeys(_CUMULATIVE, _along("axis")),
    **dict.fromkeys(_WINDOWED, _window),
}

# Devices compute these from their own parts, or by the collectives that name groups.
# fmt: off
_OF_PARTS = (
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2",
    "atanh", "bitcast_convert_type", "cbrt", "ceil", "clamp", "complex", "conj",
    "convert_element_type", "cos", "cosh", "div", "eq", "erf", "erf_inv", "erfc", "exp",
    "exp2", "expm1", "floor", "ge", "gt", "imag", "integer_pow", "is_finite", "le",
    "log", "log1p", "log2", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not",
    "one_minus_square", "or", "polynomial", "pow", "real", "reduce_precision", "rem",
    "round", "rsqrt", "select_n", "sign", "sin", "sinh", "sqrt", "square", "sub", "tan",
    "tanh", "xor",
    "argmax", "argmin", "broadcast_in_dim", "copy", "dot_general", "expand_dims",
    "gather", "iota", "name", "optimization_barrier", "reduce_and", "reduce_max",
    "reduce_min", "reduce_or", "reduce_prod", "reduce_sum", "scatter", "scatter-add",
    "sort", "squeeze", "stop_gradient", "top_k", "transpose",
)
# fmt: on
_KNOWN = frozenset((*_MOVES, "reshape", *_OF_PARTS))
