"""A divided update as one program over a mesh, for the scan executor.

In: a traced update, rows over the mesh, and the cells of its inputs in them. Out: rows
again. All devices run one program, `jax.shard_map` over the mesh, and each works on the
leaves in its own blocks: where devices have different work to do, a `jax.lax.switch` on
the number of the device chooses it. Clipping by the global norm, over two devices, is

    switch:      device 0 computes s0 from its blocks, device 1 computes s1
    all_gather:  every device has [s0, s1]
    all:         n = sqrt(s0 + s1)
    switch:      device 0 makes its blocks of the updates from n, device 1 its own

If a device needs a value both for an exchange and after it, it computes the value
twice. To carry the value from one `switch` to the other would take a block on all
devices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from fpipe._core.meshes import AnyMesh
from fpipe._core.pytrees import PyTree, aval, strong
from fpipe._program.identity import function_identity
from fpipe.optim._packed import (
    AXIS,
    Cell,
    PackedLeaf,
    PackedOutput,
    Row,
    WholeOutput,
    as_stored,
    constrain_to_stages,
    from_stored,
    stored_shape,
)
from fpipe.optim._partition import Partition, partition
from fpipe.optim._traced import TracedFunction
from fpipe.optim._update_graph import run_operations

# What one device does, from its number and its blocks of the rows.
Task: TypeAlias = Callable[[int, Sequence[Any]], list[Any]]

# Values that cross in one round: by the dtype that they are stored in, those of each
# device.
Vectors: TypeAlias = dict[Any, dict[int, list[int]]]


class Devices(Protocol):
    """How a task is done on each device, and how results become known to all."""

    def run_each(self, task: Task) -> list[Any]:
        """Run a task on every device; each has its own results."""
        ...

    def gather(self, result: Any) -> Any:
        """The results of all devices, known to all, stacked on a first axis."""
        ...


def run_sharded(
    traced: TracedFunction,
    rows: Sequence[Any],
    outputs: PyTree,
    mesh: AnyMesh | None,
) -> PyTree:
    """Divide a traced function over a mesh, and run it.

    Arguments:
        traced: its leaves are `PackedLeaf`s, or arrays that all devices have.
        rows: what the cells of the leaves lie in.
        outputs: a pytree of `PackedOutput`s, `WholeOutput`s, and what is handed on as
            it is.
        mesh: what the rows lie on; `None` if that cannot be told, as of shapes.

    Returns:
        `outputs` with the results in place.
    """
    call = ShardedCall.of(traced, rows, outputs, mesh)
    shared = [leaf for leaf in traced.leaves if not isinstance(leaf, PackedLeaf)]
    return call.assemble(*call.run(rows, shared))


@dataclasses.dataclass(frozen=True)
class ShardedCall:
    """A traced function divided over a mesh, ready to run.

    Attributes:
        update: what the devices run.
        shared: the inputs that all devices have.
        outputs: as for `run_sharded`, flat.
        treedef: the structure of the outputs.
        mesh: what the rows lie on, if that is known.
    """

    update: "ShardedUpdate"
    shared: tuple[int, ...]
    outputs: tuple[Any, ...]
    treedef: Any
    mesh: AnyMesh | None

    @classmethod
    def of(
        cls,
        traced: TracedFunction,
        rows: Sequence[Any],
        outputs: PyTree,
        mesh: AnyMesh | None,
    ) -> "ShardedCall":
        """From what `run_sharded` is given."""
        graph = traced.graph
        count = mesh.shape[AXIS] if mesh is not None else _device_count(rows)
        asked, treedef = jax.tree.flatten(outputs)
        packed = [out for out in asked if isinstance(out, PackedOutput)]
        whole = [out for out in asked if isinstance(out, WholeOutput)]
        # If all devices must have an output, it gets one additional reader, which is no
        # device. So it is exchanged in any case, and is known outside the branches of
        # the devices.
        readers: list[Sequence[int]] = [range(count + 1) for _ in graph.outputs]
        for out in packed:
            for numbers in out.numbers:
                for device, number in enumerate(numbers):
                    if number is not None:
                        readers[number] = [device]
        # Who has each input: the device in whose block it lies, or all.
        cells: dict[int, Cell] = {}
        shared: list[int] = []
        for value, leaf in zip(graph.inputs, traced.leaves, strict=True):
            if isinstance(leaf, PackedLeaf):
                cells[value] = leaf.cell
            else:
                shared.append(value)
        owners = [cells[v].device if v in cells else None for v in graph.inputs]
        divided = partition(graph, owners, readers, meeting_device=None)
        update = ShardedUpdate(divided, cells, packed, whole)
        return cls(update, tuple(shared), tuple(asked), treedef, mesh)

    def run(
        self, rows: Sequence[Any], arrays: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """The rows and the whole arrays of the outputs, in their order; rows in which
        nothing is are not made.

        Arguments:
            arrays: the inputs that all devices have.
        """
        shared = dict(zip(self.shared, arrays, strict=True))
        rows = self._spread(rows)
        if self.mesh is None:
            devices = LoopedDevices(rows, _device_count(rows))
            made, whole = self.update.run(shared, devices)
        else:
            made, whole = _run_on_mesh(self.update, rows, shared, self.mesh)
        forms = self.update.row_forms
        laid = constrain_to_stages(made, forms, self.mesh)
        return list(laid), [strong(a) for a in whole]

    def _spread(self, rows: Sequence[Any]) -> list[Any]:
        """The rows, with a zero that stands for a whole one spread over the devices."""
        forms = {cell.row: cell.form for cell in self.update.cells.values()}
        return [
            row
            if np.ndim(row) or r not in forms
            else jnp.broadcast_to(row, (len(forms[r].entries), *forms[r].shape))
            for r, row in enumerate(rows)
        ]

    def assemble(self, made: Sequence[Any], whole: Sequence[Any]) -> PyTree:
        """The outputs, from what `run` gives."""
        rows, arrays = iter(made), iter(whole)

        def result(out: Any) -> Any:
            if isinstance(out, WholeOutput):
                return next(arrays)
            if not isinstance(out, PackedOutput):
                return out
            dtypes = self.update.row_dtypes(out)
            return out.packed([None if d is None else next(rows) for d in dtypes])

        return self.treedef.unflatten([result(out) for out in self.outputs])


@dataclasses.dataclass(frozen=True)
class ShardedUpdate:
    """What all devices run.

    Attributes:
        cells: the inputs that lie in rows.
        packed, whole: the outputs.
    """

    partition: Partition
    cells: Mapping[int, Cell]
    packed: Sequence[PackedOutput]
    whole: Sequence[WholeOutput]

    def run(
        self, shared: Mapping[int, Any], devices: Devices
    ) -> tuple[list[Any], list[Any]]:
        """The blocks of the packed outputs, and the outputs that all have.

        Arguments:
            shared: the inputs that all devices have.
        """
        # What all devices know grows round by round. Everything else is computed inside
        # of a task, from what is known and the device's own blocks, and is forgotten
        # after it.
        known = dict(shared)
        rounds: dict[int, list[int]] = {}
        for crossing in self.partition.crossings:
            rounds.setdefault(crossing.round, []).append(crossing.value)
        for _, values in sorted(rounds.items()):
            known.update(self._exchange(values, known, devices))
        # Known values alone make them, so this needs no branch for each device.
        outputs = [self._value(out.number) for out in self.whole]
        whole = self._compute(outputs, known)
        blocks = devices.run_each(
            lambda device, blocks: self._make_blocks(device, known, blocks)
        )
        return blocks, whole

    @property
    def row_forms(self) -> list[Row]:
        """The forms of the rows that are made, of all packed outputs."""
        return [
            row
            for out in self.packed
            for row, dtype in zip(out.packing.rows, self.row_dtypes(out), strict=True)
            if dtype is not None
        ]

    def row_dtypes(self, out: PackedOutput) -> list[Any]:
        """The dtype of each row; `None` for one in which nothing is."""
        found = []
        for numbers in out.numbers:
            dtypes = [
                self.partition.graph.avals[self._value(n)].dtype
                for n in numbers
                if n is not None
            ]
            # Updates of one row may differ in dtype although the parameters do not: the
            # row is of the widest.
            found.append(max(dtypes, key=lambda d: d.itemsize) if dtypes else None)
        return found

    @property
    def reads_cells(self) -> bool:
        """Whether anything depends on what lies in rows."""
        graph = self.partition.graph
        read = {v for operation in graph.operations for v in operation.reads}
        return not self.cells.keys().isdisjoint(read.union(graph.outputs))

    def _value(self, output: int) -> int:
        return self.partition.graph.outputs[output]

    def _compute(
        self,
        wanted: Sequence[int],
        known: Mapping[int, Any],
        device: int | None = None,
        blocks: Sequence[Any] = (),
    ) -> list[Any]:
        """Make values from what is known to all, and from the cells of a device."""
        graph = self.partition.graph
        # The device may start from its own cells and from what is known; `select` finds
        # the operations from there, those without owner included.
        cells = {v for v, cell in self.cells.items() if cell.device == device}
        operations, reads = graph.select(wanted, cells.union(known))
        given = {
            v: known[v] if v in known else self.cells[v].take(blocks) for v in reads
        }
        return run_operations(graph, operations, given, wanted)

    def _make_blocks(
        self, device: int, known: Mapping[int, Any], blocks: Sequence[Any]
    ) -> list[Any]:
        """A device's blocks of the packed outputs."""
        rows = [
            (row, dtype, numbers[device])
            for out in self.packed
            for row, dtype, numbers in zip(
                out.packing.rows, self.row_dtypes(out), out.numbers, strict=True
            )
            if dtype is not None
        ]
        # All devices return blocks of all rows, or they could not be branches of one
        # `switch`: zeros where a device has nothing.
        wanted = [self._value(number) for _, _, number in rows if number is not None]
        made = iter(self._compute(wanted, known, device, blocks))
        return [
            jnp.zeros(row.shape, dtype)
            if number is None
            else row.put(next(made).astype(dtype))
            for row, dtype, number in rows
        ]

    # An exchange: for each dtype a vector, in which each device has its values end to
    # end. PRNG keys cross as numbers. Device 0 with the sums a and b, device 1 with c:
    #
    #   device 0 | a b |      all_gather      every device | a b |
    #   device 1 | c 0 |                                   | c 0 |
    #
    # One collective for all values of a dtype in a round: starting it is the cost.

    def _exchange(
        self, values: Sequence[int], known: Mapping[int, Any], devices: Devices
    ) -> dict[int, Any]:
        """Values that one device each can make; afterwards every device has them."""
        vectors: Vectors = {}
        for v in values:
            of_dtype = vectors.setdefault(self._stored(v).dtype, {})
            of_dtype.setdefault(self.partition.owners[v], []).append(v)
        made = devices.run_each(
            lambda device, blocks: self._join(vectors, device, known, blocks)
        )
        exchanged: dict[int, Any] = {}
        for of_dtype, vector in zip(vectors.values(), made, strict=True):
            exchanged.update(self._split(of_dtype, devices.gather(vector)))
        return exchanged

    def _stored(self, v: int) -> jax.ShapeDtypeStruct:
        shape = self.partition.graph.avals[v]
        return stored_shape(jax.ShapeDtypeStruct(shape.shape, shape.dtype))

    def _size(self, v: int) -> int:
        return math.prod(self._stored(v).shape)

    def _join(
        self,
        vectors: Vectors,
        device: int,
        known: Mapping[int, Any],
        blocks: Sequence[Any],
    ) -> list[Any]:
        """A device's vectors, each as long as the longest of all devices."""
        wanted = [v for of_dtype in vectors.values() for v in of_dtype.get(device, ())]
        made = iter(self._compute(wanted, known, device, blocks))
        joined = []
        for dtype, of_dtype in vectors.items():
            length = max(sum(map(self._size, values)) for values in of_dtype.values())
            parts = [
                as_stored(next(made)).reshape(-1) for _ in of_dtype.get(device, ())
            ]
            vector = jnp.concatenate(parts) if parts else jnp.zeros(0, dtype)
            joined.append(jnp.pad(vector, (0, length - vector.shape[0])))
        return joined

    def _split(self, of_dtype: Mapping[int, list[int]], vectors: Any) -> dict[int, Any]:
        """The values, from the vectors of all devices."""
        values = {}
        for device, own in of_dtype.items():
            start = 0
            for v in own:
                end = start + self._size(v)
                array = vectors[device, start:end].reshape(self._stored(v).shape)
                values[v] = from_stored(array, self.partition.graph.avals[v])
                start = end
        return values


def _device_count(rows: Sequence[Any]) -> int:
    return max((row.shape[0] for row in rows if np.ndim(row)), default=0)


class LoopedDevices:
    """Runs devices one after the other, without a mesh: for shapes, or if nothing is in
    rows.

    `jax.eval_shape` of packed shapes comes here: there are no arrays that could say
    which mesh they are on. The results have the shapes that they have on a mesh.
    """

    def __init__(self, rows: Sequence[Any], count: int) -> None:
        self._rows = rows
        self._count = count

    def run_each(self, task: Task) -> list[Any]:
        """Run a task for every device; results are stacked."""
        made = [task(d, [row[d] for row in self._rows]) for d in range(self._count)]
        return [jnp.stack(column) for column in zip(*made, strict=True)]

    def gather(self, result: Any) -> Any:
        """Results are stacked already."""
        return result


class MeshDevices:
    """The devices of a mesh, inside of `jax.shard_map`.

    Arguments:
        blocks: those of the device that runs.
        count: of the devices.
    """

    def __init__(self, blocks: Sequence[Any], count: int) -> None:
        self._blocks = blocks
        self._count = count

    def run_each(self, task: Task) -> list[Any]:
        """A branch for each device; no `switch` where all branches are the same."""
        # Equal stages share one branch, so that a model of 64 equal stages compiles one
        # update and not 64.
        branch_of, branches = self._distinct_branches(task)
        if len(branches) == 1:
            return branches[0](self._blocks)
        branch = jnp.asarray(branch_of)[jax.lax.axis_index(AXIS)]
        return jax.lax.switch(branch, branches, self._blocks)

    def gather(self, result: Any) -> Any:
        """The results of all devices."""
        return jax.lax.all_gather(result, AXIS)

    def _distinct_branches(
        self, task: Task
    ) -> tuple[list[int], list[Callable[[Any], list[Any]]]]:
        """For each device the number of its branch, and the branches."""
        numbers: dict[Hashable, int] = {}
        branch_of: list[int] = []
        branches: list[Callable[[Any], list[Any]]] = []
        for device in range(self._count):
            branch = functools.partial(task, device)
            key = function_identity(lambda *b, branch=branch: branch(b), *self._blocks)
            if key not in numbers:
                numbers[key] = len(branches)
                branches.append(branch)
            branch_of.append(numbers[key])
        return branch_of, branches


def _run_on_mesh(
    update: ShardedUpdate, rows: Sequence[Any], shared: Mapping[int, Any], mesh: AnyMesh
) -> tuple[list[Any], list[Any]]:
    """Run it inside of `jax.shard_map`; PRNG keys go in and come out as numbers."""

    def local(
        rows: Sequence[Any], arrays: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        # `shard_map` gives each device its part of a row, which is one block.
        devices = MeshDevices([row[0] for row in rows], mesh.shape[AXIS])
        known = {
            v: from_stored(array, aval(given))
            for array, (v, given) in zip(arrays, shared.items(), strict=True)
        }
        made, whole = update.run(known, devices)
        return [block[None] for block in made], [as_stored(array) for array in whole]

    # Without `check_vma`: with it, JAX adds up what varies inside the branches of the
    # `switch`, where not all devices come by, and the program hangs.
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(AXIS), P()),
        out_specs=(P(AXIS), P()),
        axis_names={AXIS},
        check_vma=False,
    )
    made, whole = run(list(rows), [as_stored(jnp.asarray(a)) for a in shared.values()])
    if not update.reads_cells:
        # Otherwise `jit` would drop the rows, and with them the devices of the mesh.
        made, whole = jax.lax.optimization_barrier((made, whole, rows[:1]))[:2]
    graph = update.partition.graph
    return made, [
        from_stored(array, graph.avals[graph.outputs[out.number]])
        for array, out in zip(whole, update.whole, strict=True)
    ]
