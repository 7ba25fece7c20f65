"""A function of leaves that lie in rows over a mesh: one program, in which each device
works on what it holds.

Each device takes its leaves out of its blocks of the rows, and puts into blocks what it
makes of them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from fpipe._core.pytrees import PyTree, aval, strong
from fpipe._executors.scan.mesh import AXIS
from fpipe._executors.scan.packing import Entry, Packed, Packing, Row
from fpipe._executors.scan.storage import raw, unwrapped, wrapped
from fpipe.optim._share import Shares, share
from fpipe.optim._steps import Steps, evaluate
from fpipe.optim._view import lay, zero

# What a device does, from its number and its blocks; how it is done on each device; how
# what each has made is known to all, on a first axis.
Task: TypeAlias = Callable[[int, Sequence[Any]], list[Any]]
Each: TypeAlias = Callable[[Task], list[Any]]
Every: TypeAlias = Callable[[Any], Any]

# Values that are exchanged, by the dtype in which they are stored, and device.
Vectors: TypeAlias = dict[Any, dict[int, list[int]]]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A leaf in a row: what a device has in its block of it."""

    row: int
    device: int
    form: Row
    shape: tuple[int, ...]

    def take(self, blocks: Sequence[Any]) -> Any:
        """The leaf, from the device's blocks."""
        return self.form.take(blocks[self.row], self.shape)


@dataclasses.dataclass(frozen=True)
class Out:
    """A `Packed` to be made: for each row the output that each device has in it."""

    packing: Packing
    numbers: tuple[tuple[int | None, ...], ...]

    @classmethod
    def of(cls, packing: Packing, number: Mapping[Entry, int]) -> "Out":
        """From the outputs by entry."""
        return cls(
            packing,
            tuple(
                tuple(number.get(e) if e else None for e in row.entries)
                for row in packing.rows
            ),
        )


def run(
    graph: Steps, given: Sequence[Any], rows: Sequence[Any], outs: PyTree, mesh: Any
) -> PyTree:
    """Share steps out, run them, and give what `outs` asks for.

    Arguments:
        given: for each input its cell, or an array that all devices have.
        rows: what the cells lie in.
        outs: a pytree of `Out`s, numbers of outputs that all devices are to have, and
            what is handed on as it is.
        mesh: what the rows lie on, `None` if that cannot be told, as of shapes.
    """
    found, treedef = jax.tree.flatten(outs)
    packs = [out for out in found if isinstance(out, Out)]
    whole = [out for out in found if isinstance(out, int)]
    wanted: list[int | None] = [None] * len(graph.outputs)
    for d, n in (
        (d, n)
        for out in packs
        for numbers in out.numbers
        for d, n in enumerate(numbers)
    ):
        if n is not None:
            wanted[n] = d
    cells = {
        v: a for v, a in zip(graph.inputs, given, strict=True) if isinstance(a, Cell)
    }
    shared = {v: a for v, a in zip(graph.inputs, given, strict=True) if v not in cells}
    homes = [cells[v].device if v in cells else None for v in graph.inputs]
    program = Program(share(graph, homes, wanted), cells, packs, whole)
    blocks, others = map(
        iter,
        _looped(program, rows, shared)
        if mesh is None
        else _spread(program, rows, shared, mesh),
    )

    def result(out: Any) -> Any:
        if isinstance(out, Out):
            forms = zip(program.forms(out), out.packing.rows, strict=True)
            made = [
                zero(jax.ShapeDtypeStruct((), row.dtype))
                if dtype is None
                else next(blocks)
                for dtype, row in forms
            ]
            return Packed(lay(made, mesh), out.packing)
        return strong(next(others)) if isinstance(out, int) else out

    return treedef.unflatten([result(out) for out in found])


@dataclasses.dataclass(frozen=True)
class Program:
    """What all devices run.

    Attributes:
        cells: the inputs that lie in rows.
        packs: the outputs that are packed.
        whole: the outputs that all devices have.
    """

    shares: Shares
    cells: Mapping[int, Cell]
    packs: Sequence[Out]
    whole: Sequence[int]

    @property
    def reads_cells(self) -> bool:
        """Whether anything depends on what lies in rows."""
        graph = self.shares.steps
        read = {v for step in graph.steps for v in graph.needs(step)}
        return not self.cells.keys().isdisjoint(read | set(graph.outputs))

    def run(
        self, shared: Mapping[int, Any], each: Each, every: Every
    ) -> tuple[list[Any], list[Any]]:
        """The blocks of the packed outputs, and the outputs that all have, from the
        inputs that all have.
        """
        known = dict(shared)
        for values in self.shares.exchanges:
            known |= self._exchanged(self._vectors(values), known, each, every)
        whole = self._evaluate([self._value(n) for n in self.whole], known, {})
        return each(lambda d, blocks: self._blocks(d, known, blocks)), whole

    def forms(self, out: Out) -> list[Any]:
        """The dtype of each row; `None` for one in which nothing is."""
        avals = self.shares.steps.avals
        found = []
        for numbers in out.numbers:
            dtypes = [avals[self._value(n)].dtype for n in numbers if n is not None]
            found.append(max(dtypes, key=lambda d: d.itemsize) if dtypes else None)
        return found

    def _value(self, number: int) -> int:
        return self.shares.steps.outputs[number]

    def _evaluate(
        self, wanted: Sequence[int], known: Mapping[int, Any], own: Mapping[int, Any]
    ) -> list[Any]:
        graph = self.shares.steps
        made = evaluate(
            graph, self.shares.body(wanted, known), {**known, **own}, wanted
        )
        return [
            a if isinstance(a, jax.Array) else jnp.asarray(a, graph.avals[v].dtype)
            for v, a in zip(wanted, made, strict=True)
        ]

    def _own(self, d: int, blocks: Sequence[Any]) -> dict[int, Any]:
        return {
            v: cell.take(blocks) for v, cell in self.cells.items() if cell.device == d
        }

    def _blocks(
        self, d: int, known: Mapping[int, Any], blocks: Sequence[Any]
    ) -> list[Any]:
        """A device's blocks of the packed outputs."""
        places = [
            (row, dtype, numbers[d])
            for out in self.packs
            for row, dtype, numbers in zip(
                out.packing.rows, self.forms(out), out.numbers, strict=True
            )
            if dtype is not None
        ]
        wanted = [self._value(n) for _, _, n in places if n is not None]
        made = iter(self._evaluate(wanted, known, self._own(d, blocks)))
        return [
            jnp.zeros(row.shape, dtype)
            if n is None
            else row.put(next(made).astype(dtype))
            for row, dtype, n in places
        ]

    # --- exchanges: a vector of each dtype, in which each device has its values end to end ---

    def _vectors(self, values: Sequence[int]) -> Vectors:
        found: Vectors = {}
        for v in values:
            own = found.setdefault(self._raw(v).dtype, {})
            own.setdefault(self.shares.owner[v], []).append(v)
        return found

    def _exchanged(
        self, vectors: Vectors, known: Mapping[int, Any], each: Each, every: Every
    ) -> dict[int, Any]:
        """The values, which every device then has."""
        made = each(lambda d, blocks: self._joined(vectors, d, known, blocks))
        out: dict[int, Any] = {}
        for own, array in zip(vectors.values(), map(every, made), strict=True):
            out |= self._split(own, array)
        return out

    def _raw(self, v: int) -> Any:
        """The form of a value as it is exchanged: PRNG keys as numbers."""
        aval = self.shares.steps.avals[v]
        return raw(jax.ShapeDtypeStruct(aval.shape, aval.dtype))

    def _size(self, v: int) -> int:
        return math.prod(self._raw(v).shape)

    def _joined(
        self, vectors: Vectors, d: int, known: Mapping[int, Any], blocks: Sequence[Any]
    ) -> list[Any]:
        """A device's vectors, as long as the longest."""
        wanted = [v for own in vectors.values() for v in own.get(d, ())]
        made = dict(
            zip(
                wanted, self._evaluate(wanted, known, self._own(d, blocks)), strict=True
            )
        )
        out = []
        for dtype, own in vectors.items():
            length = max(sum(map(self._size, values)) for values in own.values())
            parts = [unwrapped(made[v]).reshape(-1) for v in own.get(d, ())]
            vector = jnp.concatenate(parts) if parts else jnp.zeros(0, dtype)
            out.append(jnp.pad(vector, (0, length - vector.shape[0])))
        return out

    def _split(self, own: Mapping[int, list[int]], vectors: Any) -> dict[int, Any]:
        """The values, from the vectors of all devices."""
        out = {}
        for d, values in own.items():
            ends = np.cumsum([self._size(v) for v in values]).tolist()
            for v, a, b in zip(values, [0, *ends], ends, strict=False):
                out[v] = wrapped(
                    vectors[d, a:b].reshape(self._raw(v).shape),
                    self.shares.steps.avals[v],
                )
        return out


def _spread(
    program: Program, rows: Sequence[Any], shared: Mapping[int, Any], mesh: Any
) -> tuple[list[Any], list[Any]]:
    """On a mesh: each device runs its own branch; one for all, where the branches are
    the same.
    """

    def local(
        rows: Sequence[Any], arrays: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        blocks = [row[0] for row in rows]

        def each(task: Task) -> list[Any]:
            which, branches = _distinct(task, blocks, mesh.shape[AXIS])
            if len(branches) == 1:
                return branches[0](blocks)
            return jax.lax.switch(
                jnp.asarray(which)[jax.lax.axis_index(AXIS)], branches, blocks
            )

        known = {
            v: wrapped(a, aval(b))
            for a, (v, b) in zip(arrays, shared.items(), strict=True)
        }
        made, whole = program.run(known, each, lambda a: jax.lax.all_gather(a, AXIS))
        return [a[None] for a in made], [unwrapped(a) for a in whole]

    # PRNG keys cross the boundary as numbers.
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(AXIS), P()),
        out_specs=(P(AXIS), P()),
        axis_names={AXIS},
        check_vma=False,
    )
    made, whole = run(list(rows), [unwrapped(jnp.asarray(a)) for a in shared.values()])
    if not program.reads_cells:
        # Otherwise `jit` would drop the rows, and with them the devices of the mesh.
        made, whole = jax.lax.optimization_barrier((made, whole, rows[:1]))[:2]
    graph = program.shares.steps
    return made, [
        wrapped(a, graph.avals[graph.outputs[n]])
        for a, n in zip(whole, program.whole, strict=True)
    ]


def _distinct(
    task: Task, blocks: Sequence[Any], devices: int
) -> tuple[list[int], list[Callable[[Any], list[Any]]]]:
    """For each device the number of its branch, and the branches."""
    numbers: dict[Any, int] = {}
    which, branches = [], []
    traced = []  # kept: the id of a constant that is gone may be that of another
    for d in range(devices):
        branch = functools.partial(task, d)
        jaxpr = jax.make_jaxpr(branch)(blocks)
        traced.append(jaxpr)
        key = str(jaxpr.jaxpr), tuple(map(id, jaxpr.consts))
        if key not in numbers:
            numbers[key] = len(branches)
            branches.append(branch)
        which.append(numbers[key])
    return which, branches


def _looped(
    program: Program, rows: Sequence[Any], shared: Mapping[int, Any]
) -> tuple[list[Any], list[Any]]:
    """Without a mesh, as for shapes, or where there are no rows: one device after the
    other.
    """
    devices = max((row.shape[0] for row in rows), default=0)

    def each(task: Task) -> list[Any]:
        made = [task(d, [row[d] for row in rows]) for d in range(devices)]
        return [jnp.stack(column) for column in zip(*made, strict=True)]

    return program.run(shared, each, lambda a: a)
