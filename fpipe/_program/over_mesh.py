"""A stage's programs over a mesh: how their arrays lie, and gradients that are summed
apart on each device.

In: the code of a program, the mesh of its stage, and the axes over which the rows of a
microbatch are shared. Out: a function under `jax.jit`. The backward of a dense layer,
over two devices with two of four rows each:

    argument, result             shape     lies
    params[0]                    [3, 5]    as the parameters do: whole on each device
    x[0], of 8 microbatches      [8, 4, 3] each by rows
    cotangent y[0]               [4, 5]    by rows
    sum params[0], in and out    [2, 3, 5] one part on each device, of its own rows

If the code ran as written, XLA would add the parts up in each backward. Here they are
added up once, after the last one (`row_sums.py` says why the result is the same). Or
each backward scatters them, so that between two of them a device only has its piece of
a sum.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from fpipe._core.pytrees import on_host
from fpipe._core.settings import donated
from fpipe._program.code import Code
from fpipe._program.host_calls import Failures
from fpipe._program.row_sums import (
    RowSum,
    add_parts,
    find_row_sum,
    sum_rows_apart,
    values_read,
)


class GatheredArgument(NamedTuple):
    """An argument of a program, by its number, and how it lies when it is gathered."""

    argument: int
    lies: Sharding


class ScatteredSum(NamedTuple):
    """A sum of a program, by its number among these, and how it is cut over axes of
    rows.
    """

    sum: int
    spec: P


@dataclasses.dataclass(frozen=True)
class MeshForm:
    """How a program runs over a mesh.

    Attributes:
        mesh: that of its stage.
        data: its axes over which rows are shared.
        apart: those of the code's sums, by number, that are kept as parts.
        results: how each result lies; `None`: as XLA has it.
        rows: of the microbatch.
        stacked: those of the code's arguments, by number, that are not whole arrays but
            the pieces of all microbatches on a first axis: so a device needs no more
            than its rows of each.
        gathered: those that it gathers before it reads them.
        scattered: those of the code's sums that are scattered: each device gets its
            piece of what the program adds.
    """

    mesh: Mesh
    data: tuple[str, ...]
    apart: frozenset[int]
    results: tuple[Sharding | None, ...]
    rows: int
    stacked: frozenset[int] = frozenset()
    gathered: tuple[GatheredArgument, ...] = ()
    scattered: tuple[ScatteredSum, ...] = ()

    @property
    def parts(self) -> int:
        """Over how many devices rows are shared."""
        return devices_over(self.mesh, self.data)

    def identity(self, code: Code) -> Hashable:
        """Equal for programs that compute the same on the same devices."""
        return code.identity, self


def devices_over(mesh: Mesh, axes: Sequence[str]) -> int:
    """The number of devices along some axes of a mesh."""
    size = 1
    for name in axes:
        size *= mesh.shape[name]
    return size


def row_sums(code: Code, rows: int, parts: int) -> dict[int, RowSum]:
    """Those of the code's sums, by number, that can be kept as parts."""
    found: dict[int, RowSum] = {}
    for n, value in enumerate(code.sums):
        row_sum = find_row_sum(code.graph, code.nodes, value, rows, parts)
        if row_sum is not None and n not in code.maxima:
            found[n] = row_sum
    return found


def compile_over(code: Code, form: MeshForm) -> Callable[..., Sequence[Any]]:
    """The function under `jax.jit`, for this mesh alone."""
    pieces = dict(form.scattered)
    summed = sorted(form.apart | pieces.keys())
    found = row_sums(code, form.rows, form.parts) if summed else {}
    apart: Mapping[int, RowSum] = {n: found[n] for n in summed}
    # The program also returns the values that these sums are made of. Then nobody reads
    # the sums over all rows, so XLA leaves them out.
    terms = list(dict.fromkeys(v for s in apart.values() for v in values_read(s)))

    def cut(n: int, array: Any, index: Any) -> Any:
        window = code.args[n].window
        assert window is not None
        if n in form.stacked:
            place = index.astype(jnp.int32)
            return jax.lax.dynamic_index_in_dim(array, place, keepdims=False)
        piece = window.cut(array, index)
        if form.parts == 1 or window.axis is None:
            return piece
        by_rows = NamedSharding(form.mesh, P(*[None] * window.axis, form.data))
        return jax.lax.with_sharding_constraint(piece, by_rows)

    # If one device raised alone, the others would wait for it.
    failures = None if code.guard is None else Failures(form.mesh.size)

    def call(*given_arrays: Any) -> list[Any]:
        arrays = list(given_arrays)
        for n, lies in form.gathered:
            arrays[n] = jax.lax.with_sharding_constraint(arrays[n], lies)
        results = [*code.outs, *code.sums]
        made = code.values(
            arrays,
            [*results, *terms],
            failures,
            cut,
        )
        given = dict(zip(terms, made[len(results) :], strict=True))
        made = made[: len(results)]
        for n, own in apart.items():
            parts = sum_rows_apart(own, given, form.data, form.mesh)
            if n in pieces:
                axes = form.mesh.axis_names
                parts = add_parts(parts, pieces[n], form.data, axes, form.mesh)
            made[len(code.outs) + n] = parts
        made = code.added(made, arrays)
        return made if failures is None else _together(failures, made, form)

    call.__name__ = call.__qualname__ = f"fpipe_{code.kind}"
    return jax.jit(
        call,
        donate_argnums=donated(code.consumed),
        out_shardings=list(form.results),
    )


def _together(failures: Failures, made: list[Any], form: MeshForm) -> list[Any]:
    """The results of a program, or on all its devices what a callback has raised."""
    # Each device asks when it has its parts of the results. Some results cannot be used
    # for this: it is not known here how XLA has cut them, or they are keys and no
    # numbers.
    asked: list[int] = []
    specs: list[P] = []
    for n, (array, lies) in enumerate(zip(made, form.results, strict=True)):
        is_number = isinstance(array.dtype, np.dtype) and not on_host(array)
        if isinstance(lies, NamedSharding) and is_number:
            asked.append(n)
            specs.append(lies.spec)
    if not asked:
        return made
    axes = form.mesh.axis_names
    raised = jax.shard_map(
        lambda *own: failures.raised(own, axes),
        mesh=form.mesh,
        in_specs=tuple(specs),
        out_specs=P(),
        check_vma=False,
    )(*(made[n] for n in asked))
    # The returned arrays depend on the answer. Otherwise XLA might remove the question.
    first = made[asked[0]]
    made[asked[0]] = jnp.where(raised == 0, first, jnp.zeros_like(first))
    return made
