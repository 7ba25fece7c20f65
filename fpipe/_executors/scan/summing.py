"""The sums of gradients that a segment makes, and what becomes of them after its last
tick.

In: the operations of a segment. Out: the gradients that they add to, and how each sum
lies. Over a data axis of two, and with a weight that two stages read, one of them by a
loan:

    in the loop     RowGradient(0)     float32[2, 3, 3], a part for each shard
                    LoanGradient(0)    the same on the borrower's device
    after it        both added up over the axis; the loan's goes to the owner of row 0,
                    where it is added
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fpipe._executors.placement import Unshard
from fpipe._executors.scan.carry import Carry
from fpipe._executors.scan.machine import (
    Add,
    InputGradient,
    LoanGradient,
    Machine,
    Op,
    RowGradient,
    SummedGradient,
)
from fpipe._executors.scan.reading import unsharded
from fpipe._executors.stage_places import AXIS
from fpipe._model.loss import sum_dtype
from fpipe._model.specs import axes_in, without_axes
from fpipe._program.over_mesh import devices_over
from fpipe._program.row_sums import RowSum, add_parts, find_row_sum

Array: TypeAlias = jax.Array


class GradientSums:
    """The sums of gradients of one segment.

    Arguments:
        data: the axes of the mesh over which rows are shared.
        unshard: as for `Interpreter`.
        ops: the operations of the segment.
    """

    def __init__(
        self,
        machine: Machine,
        mesh: Mesh,
        data: tuple[str, ...],
        unshard: Unshard,
        ops: Sequence[Op],
    ) -> None:
        self.machine = machine
        self.mesh = mesh
        self.data = data
        self.unshard = unshard
        self.shards = devices_over(mesh, data)
        changed = dict.fromkeys(t.buffer for op in ops for t in op.targets)
        self.gradients: list[SummedGradient] = [
            buffer
            for buffer in changed
            if isinstance(buffer, RowGradient | LoanGradient | InputGradient)
        ]
        self.parts = self._find_row_sums(ops)

    def _find_row_sums(
        self, ops: Sequence[Op]
    ) -> dict[SummedGradient, dict[Op, RowSum]]:
        """The gradients that are kept as parts over the mesh's data axis, with how each
        operation makes them.

        A weight's gradient is a sum over rows, and the rows lie on several devices of
        the data axis. As written XLA adds up over that axis in each operation, once for
        each microbatch. With parts the sum has one more axis, which is sharded like the
        rows, and is added up once, after the last tick. `row_sums.py` finds the
        equation that can be cut so. If it finds none in one of the operations that add
        to a gradient, the gradient is kept whole in all of them. (Not if that one is
        for a smaller microbatch whose rows the axis does not divide: it adds what it
        makes to the first part.)
        """
        size = self.shards
        if size == 1:
            return {}
        found: dict[SummedGradient, dict[Op, RowSum]] = {}
        as_one = set[SummedGradient]()
        for op in ops:
            for target in op.targets:
                if not isinstance(target, Add) or op.code is None:
                    continue
                # Targets count the sources first, so this is the code's own value.
                code = op.code
                value = (*code.outs, *code.sums)[target.value - len(op.sources)]
                parts = find_row_sum(code.graph, code.nodes, value, op.rows, size)
                if parts is None and op.rows % size == 0:
                    as_one.add(target.buffer)
                elif parts is not None:
                    found.setdefault(target.buffer, {})[op] = parts
        return {name: of for name, of in found.items() if name not in as_one}

    def shape_of(self, gradient: SummedGradient) -> Any:
        """What a gradient is the gradient of: a row, a lent array or an input. Callers
        take its shape and dtype.
        """
        match gradient:
            case RowGradient(row):
                return self.machine.params.rows[row]
            case LoanGradient(loan):
                return self.machine.loans[loan].aval
            case InputGradient(leaf):
                return self.machine.inputs[leaf]

    def as_summed(self, gradient: SummedGradient, total: Array) -> Array:
        """A sum as it lies during a step: whole over the axes of rows, if it is not
        scattered.

        Left to itself XLA would cut each summand as the finished gradient is cut, and
        also the values that the summand is computed from.
        """
        spec = self.spec_of(gradient)
        if self.is_scattered(gradient):
            return jax.lax.with_sharding_constraint(total, spec)
        if gradient in self.parts:
            spec = P(self.data, *without_axes(spec, self.data))
        elif spec:
            spec = without_axes(spec, self.data)
        else:
            return unsharded(total, self.mesh)
        return jax.lax.with_sharding_constraint(total, spec)

    def add(self, gradient: SummedGradient, total: Array, value: Array) -> Array:
        """A sum with what an operation has made added."""
        # Parts have one more axis, that of the shards.
        apart = self.has_parts(gradient)
        if total.shape != value.shape:
            # Flat, and whole before it goes to its place in the block.
            parts = value.shape[:1] if apart else ()
            value = self.as_summed(gradient, value.reshape(*parts, -1))
        total = (jax.vmap(_added) if apart else _added)(total, value)
        if self.is_scattered(gradient):
            total = self.as_summed(gradient, total)
        return total

    def spec_of(self, gradient: SummedGradient) -> P:
        """The spec of the row, the loan or the input that a gradient belongs to."""
        match gradient:
            case RowGradient(row):
                return self.machine.params.rows[row].spec
            case LoanGradient(loan):
                return self.machine.params.rows[self.machine.loans[loan].row].spec
            case InputGradient():
                return P()

    def add_up(
        self, carry: Carry, returned: Sequence[SummedGradient]
    ) -> dict[SummedGradient, Array]:
        """The gradients to return: parts are added up, those of loans go back to their
        owners, and those of inputs are summed over the devices.
        """
        # The one sum over the data axis of the whole step.
        own = {g: self._total(g, carry[g]) for g in self.gradients}
        out: dict[SummedGradient, Array] = {}
        for gradient in returned:
            # Only borrowers have a gradient for this row. It begins with zeros, and
            # theirs are added below.
            if gradient not in own:
                of = self.shape_of(gradient)
                out[gradient] = jnp.zeros(of.shape, sum_dtype(of.dtype))
            elif isinstance(gradient, InputGradient):
                out[gradient] = everywhere(own[gradient], self.machine.devices)
            else:
                out[gradient] = own[gradient]
        # On all devices but the owner a returned loan is zeros, which change nothing.
        for gradient in self.gradients:
            if isinstance(gradient, LoanGradient):
                row, owner, borrower, _ = self.machine.loans[gradient.loan]
                back = jax.lax.ppermute(own[gradient], AXIS, [(borrower, owner)])
                out[RowGradient(row)] = _added(out[RowGradient(row)], back)
        return out

    def _total(self, gradient: SummedGradient, parts: Array) -> Array:
        """A gradient with its parts added up, cut as its parameter is."""
        # This cuts what leaves the loop. Without `as_summed` XLA would also cut what
        # is summed inside of it.
        spec, parts = self.spec_of(gradient), self.as_summed(gradient, parts)
        if self.has_parts(gradient):
            parts = self.added_up(gradient, parts)
        return jax.lax.with_sharding_constraint(parts, spec) if spec else parts

    def is_scattered(self, gradient: SummedGradient) -> bool:
        """Whether each backward scatters what it adds, so that a device never has more
        than its piece of the sum.
        """
        named = {name for part in self.spec_of(gradient) for name in axes_in(part)}
        return self.unshard == "action" and not named.isdisjoint(self.data)

    def has_parts(self, gradient: SummedGradient) -> bool:
        """Whether the sum of a gradient is kept as parts, one for each shard."""
        return gradient in self.parts and not self.is_scattered(gradient)

    def added_up(self, gradient: SummedGradient, parts: Array) -> Array:
        """The parts of a gradient added up: of what is cut over the axes of rows each
        device gets its piece.
        """
        spec, axes = self.spec_of(gradient), {*self.mesh.axis_names} - {AXIS}
        # Of 16 bits the parts are added up in 32, as all else.
        wide = parts.astype(sum_dtype(parts.dtype))
        return add_parts(wide, spec, self.data, axes)


def everywhere(value: Array, devices: int) -> Array:
    """What some devices wrote, on all of them; the others have zeros."""
    if devices == 1:
        return value
    # A `psum` is exact here, for all but one add zero; of booleans there is none.
    if value.dtype == jnp.bool_:
        return jax.lax.psum(value.astype(jnp.uint8), AXIS) > 0
    return jax.lax.psum(value, AXIS)


def _added(total: Array, value: Array) -> Array:
    """A sum in a row's block."""
    return combined(jnp.add, total, value)


def combined(f: Callable[[Array, Array], Array], total: Array, value: Array) -> Array:
    """A block of a row with a value added, or whatever `f` does.

    The block may be longer and flat: where the stages' arrays differ in shape,
    `packing.py` flattens them and pads to the longest.
    """
    value = value.astype(total.dtype)
    if value.shape == total.shape:
        return f(total, value)
    flat = value.reshape(-1)
    if flat.shape == total.shape:
        return f(total, flat)
    size = flat.shape[0]
    return total.at[:size].set(f(total[:size], flat))
