"""What the operations of a segment read, on one device.

In: a `Source` of an operation, and the table's numbers for it. Out: its array:

    Parameter(row, aval)       out of the device's block of the row
    State(row, aval)           out of the block that the device carries
    Held(pool, argument, …)    out of a slot of a pool
    InputPiece(stack, …)       out of the call's inputs

A block that stages of several shapes share is flat: what is read is cut out of it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fpipe._executors.placement import Unshard
from fpipe._executors.scan.carry import Carry, pool_arrays
from fpipe._executors.scan.machine import (
    BorrowedParameter,
    FedPiece,
    Held,
    InputPiece,
    InputRows,
    InputStack,
    Machine,
    Number,
    Parameter,
    Part,
    PoolName,
    Source,
    State,
    StateBlock,
    StatePart,
    WholeInput,
)
from fpipe._executors.scan.packing import Row
from fpipe._executors.scan.storage import Storage, is_key
from fpipe._model.specs import axes_in, without_axes
from fpipe._model.stages import Leaf

Array: TypeAlias = jax.Array


# What a call gives: inputs as they are, and pieces of those that are cut.
GivenInputs: TypeAlias = Mapping[Leaf | InputStack, Array]


class Given(NamedTuple):
    """What the operations of a phase take from outside.

    Attributes:
        params: the device's block of each row.
        loans: the parameters that are lent.
        inputs: the call's inputs.
        fed: what feeds have brought.
    """

    params: Sequence[Array]
    loans: Sequence[Array]
    inputs: GivenInputs
    fed: dict[FedPiece, Array]


class Reader:
    """Reads the sources of operations.

    Arguments:
        data: the axes of the mesh over which rows are shared.
        unshard: how often parameters are gathered that are cut over these.
        storage: of each pool.
    """

    def __init__(
        self,
        machine: Machine,
        mesh: Mesh,
        data: tuple[str, ...],
        unshard: Unshard,
        storage: Mapping[PoolName, Storage],
    ) -> None:
        self.machine = machine
        self.mesh = mesh
        self.data = data
        self.unshard = unshard
        self.storage = storage

    def fetch(
        self, source: Source, carry: Carry, arguments: Array, given: Given
    ) -> Array:
        """The value of a source.

        Called inside the operation's conditional, so that a device that does not run
        the operation does not read its slots either.
        """
        match source:
            case Parameter(row, aval):
                packed = self.machine.params.rows[row]
                own = self.taken(packed, given.params[row], aval.shape)
                return self.gathered(row, self._each_tick(row, own, arguments))
            case BorrowedParameter(loan):
                row = self.machine.loans[loan].row
                own = self._each_tick(row, given.loans[loan], arguments)
                return self.gathered(row, own)
            case State(row, aval):
                return self.state(row, aval.shape, carry)
            case StatePart(row, aval, part, shape):
                state = self.state(row, aval.shape, carry)
                place = beginning(part, arguments[0])
                own = jax.lax.dynamic_slice(state, place, part.sizes)
                return own.reshape(shape)
            case Number(argument):
                # As `jax.random.fold_in` takes it.
                return arguments[argument].astype(jnp.uint32)
            case Held(pool, argument, avals, k):
                slot = arguments[argument]
                return self.storage[pool].take(avals, k, pool_arrays(pool, carry), slot)
            case FedPiece():
                return given.fed[source]
            case WholeInput(leaf):
                return given.inputs[leaf]
            case InputRows(leaf, axis, stride, count):
                start = arguments[0] * stride
                whole = given.inputs[leaf]
                return jax.lax.dynamic_slice_in_dim(whole, start, count, axis)
            case InputPiece(stack, argument):
                pieces = given.inputs[stack]
                place = arguments[argument]
                return jax.lax.dynamic_index_in_dim(pieces, place, keepdims=False)

    def state(self, row: int, shape: tuple[int, ...], carry: Carry) -> Array:
        """A state, out of its block."""
        assert self.machine.state is not None
        packed = self.machine.state.rows[row]
        return self.taken(packed, carry[StateBlock(row)], shape)

    def taken(self, row: Row, block: Array, shape: tuple[int, ...]) -> Array:
        """An array out of its block."""
        if block.shape == shape:
            return block
        flat = row.take(unsharded(block, self.mesh), (math.prod(shape),))
        return unsharded(flat, self.mesh).reshape(shape)

    def _each_tick(self, row: int, block: Array, arguments: Array) -> Array:
        """A block of parameters that XLA takes for another one at each tick, if actions
        gather it.
        """
        # What an action gathers is to be freed after it. XLA of JAX 0.12 would gather
        # it before the loop, once, and keep it: parameters are the same at each tick.
        spec = self.machine.params.rows[row].spec
        if self.unshard == "step" or not spec:
            return block
        return jax.lax.optimization_barrier((block, arguments))[0]

    def gathered(self, row: int, block: Array) -> Array:
        """A block of parameters as operations read it: whole over the axes of rows."""
        spec = self.machine.params.rows[row].spec
        if not spec:
            return block
        # To put pieces together that do not lie side by side XLA would exchange some,
        # see `exchanges.py`; of the whole array each device takes its own.
        apart = cut_apart(spec, self.data)
        if apart != spec:
            block = jax.lax.with_sharding_constraint(block, apart)
        whole = without_axes(spec, self.data)
        return jax.lax.with_sharding_constraint(block, whole)


def unsharded(block: Array, mesh: Mesh) -> Array:
    """A flat block, whole on each device of the other axes.

    XLA would shard it as the rows of a batch are, or as some parameter is, and
    shift its ends between devices where an array is cut out. On CPUs such a
    `collective-permute` waits for all devices of the mesh, those of other stages
    too, which do something else: a deadlock. A gather waits for the devices of its
    own stage alone.
    """
    if len(mesh.axis_names) == 1 or block.ndim != 1 or is_key(block.dtype):
        return block
    return jax.lax.with_sharding_constraint(block, P())


def cut_apart(spec: P, data: tuple[str, ...]) -> P:
    """A spec without the entries in which the axes of rows come before others:
    there a device's piece does not lie within what it has of the array that is
    whole over these axes.
    """
    parts = [None if _comes_first(part, data) else part for part in spec]
    return without_axes(P(*parts), ())


def _comes_first(part: Any, data: tuple[str, ...]) -> bool:
    """Whether an entry of a spec names an axis of rows before another one."""
    of_rows = [name in data for name in axes_in(part)]
    return of_rows != sorted(of_rows)


def beginning(part: Part, microbatch: Array) -> list[Array]:
    """Where a microbatch's part of an array begins, on each axis."""
    first = microbatch * part.stride
    return [first, *[jnp.zeros_like(first)] * (len(part.sizes) - 1)]
