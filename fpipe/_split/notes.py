"""Finds what a function does that is probably not meant in a pipeline.

In: a cut function. Out: warnings, at the line of the user's that splits it:

    note_kept          values of the trace that it has put where they stay
    note_constants     large arrays that it closes over
    note_unused        parameters that nothing uses
    note_narrow_loss   a loss of less than 32 bits
    note_whole_loops   loops over layers that are not cut between their rounds

What it does with rows is in `rows.py`.
"""

from collections.abc import Collection

import jax.numpy as jnp

from fpipe._core.errors import at_line, warn
from fpipe._core.pytrees import is_array, is_inexact, nbytes
from fpipe._program.graph import Node
from fpipe._split.trace import Function, Traced

# Closed-over arrays of more bytes get a warning, because they are constants of the
# programs.
_LARGE_CONSTANTS = 2**20

# Operations of one array of the data that change neither what it says nor, much, its
# size: what is after the last reduction of a loss.
# fmt: off
_SCALINGS = frozenset((
    "broadcast_in_dim", "convert_element_type", "copy", "div", "mul", "neg", "reshape",
    "squeeze", "stop_gradient",
))

# Operations that make less of an array.
REDUCTIONS = frozenset((
    "argmax", "argmin", "dot_general", "reduce_and", "reduce_max", "reduce_min",
    "reduce_or", "reduce_prod", "reduce_sum",
))
# fmt: on


def note_kept(name: str, traced: Traced) -> None:
    """Warn of values of the trace that the function has kept."""
    if traced.kept:
        warn(
            f"`fpipe.split(fn)`: {name!r} keeps {traced.kept} of its trace in a list, "
            "an attribute or a cache. An array of a trace has no value, and cannot be "
            "used after the trace: return it"
        )


def note_constants(name: str, traced: Traced) -> None:
    """Warn of large arrays that the function closes over."""
    # One array may be read in several places.
    arrays = {id(a): a for a in traced.graph.consts.values() if is_array(a)}
    total = sum(map(nbytes, arrays.values()))
    if total > _LARGE_CONSTANTS:
        warn(
            f"`fpipe.split(fn)`: {name!r} closes over arrays of {total / 2**20:.3g} "
            "MiB, which become constants of the pieces that use them and do not train: "
            "give them as parameters (frozen ones need no gradient)"
        )


def note_unused(function: Function, used: Collection[int]) -> None:
    """Warn of parameters that nothing uses.

    Arguments:
        used: the leaves that some piece reads, in any mode.
    """
    # Integers and keys have no gradient in any case.
    unused = [
        function.paths[leaf] or "(all)"
        for leaf, shape in enumerate(function.params.leaves)
        if leaf not in used and is_inexact(shape)
    ]
    if unused:
        some = ", ".join(map(repr, unused[:5])) + ", …" * (len(unused) > 5)
        warn(
            f"`fpipe.split(fn)`: nothing uses the parameters {some} of "
            f"{function.layer.name!r}: their gradients are zeros, and piece 0 holds "
            "them"
        )


def note_whole_loops(name: str, traced: Traced) -> None:
    """Warn of loops over stacked parameters that are not cut by their rows."""
    for loop in traced.whole_loops:
        where = f"`{loop.node.name}`{at_line(loop.node.where)}"
        if loop.rows_by is None:
            warn(
                f"`fpipe.split(fn)`: {name!r} takes stacked parameters by an index in "
                f"a {where}. The trace does not know the number of its rounds, so the "
                "loop is one operation, in one piece: write `jax.lax.fori_loop` with "
                "Python numbers as bounds, or `jax.lax.scan` over the parameters"
            )
        else:
            by = f"`{loop.rows_by.name}`{at_line(loop.rows_by.where)}"
            warn(
                f"`fpipe.split(fn)`: {name!r} runs over stacked parameters in a "
                f"{where}, but {by} makes each row from all rows. So pieces "
                "cannot have rows of their own: give the function the parameters in "
                "the order and the form in which the loop takes them"
            )


def note_narrow_loss(name: str, traced: Traced) -> None:
    """Warn of a number that is returned, such as a loss, if it is narrower than
    float32 from its last reduction on.
    """
    for v in traced.outputs:
        if traced.graph.avals[v].shape or v not in traced.of_data:
            continue
        node, width = _last_reduction(traced, v)
        if node is not None and width is not None:
            warn(
                f"`fpipe.split(fn)`: {name!r} returns a number that is {width} from "
                f"its last reduction on, `{node.name}`{at_line(node.where)}, so it has "
                "only two or three digits: before the reduction cast the values, such "
                "as the logits, by `.astype(jnp.float32)`"
            )
            return


def _last_reduction(traced: Traced, v: int) -> tuple[Node | None, str | None]:
    """The last reduction that a number comes from, and the dtype of less than 32 bits
    that it has there or later.
    """
    graph, width = traced.graph, None
    while True:
        dtype = graph.avals[v].dtype
        if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
            width = str(dtype)
        node = graph.maker.get(v)
        if node is None or node.name in REDUCTIONS:
            return node, width
        data = [u for u in node.ins if u in traced.of_data]
        if node.name not in _SCALINGS or len(data) != 1:
            return None, None
        (v,) = data
