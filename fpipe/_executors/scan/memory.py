"""What a call holds on each device under the scan executor, read off the machine: its
buffers are there from start to end.

In: a `Step`. Out: bytes by role. For the machine that `machine.py` draws (two layers of
width 4, microbatches of 2 rows in float32, so that a boundary has 32 bytes):

    parameters    80     a bias and a weight, 4 + 16 numbers
    gradients     80     their sums
    boundaries   288     3 + 2 + 2 slots of forward 0, the loss's pool and backward 0,
                         and an outbox for each of the two wires
    residuals     96     2 slots of the cores, 1 of the loss
    inputs        96     `x`, all 6 rows on each device
    outputs       12     3 losses

What XLA needs beside these, for values inside an operation, only the compiled program
tells (`plan_data.py`).
"""

import itertools
from collections.abc import Mapping

import jax
import numpy as np

from fpipe._core.pytrees import nbytes
from fpipe._executors.parameter_cuts import axes_of
from fpipe._executors.plan_data import Role
from fpipe._executors.scan.machine import (
    Avals,
    HandedPool,
    InputStack,
    RecomputedPool,
    SavedPool,
)
from fpipe._executors.scan.packing import Row
from fpipe._executors.scan.step import Step
from fpipe._executors.scan.storage import Storage, is_key
from fpipe._executors.stage_places import AXIS
from fpipe._model.loss import sum_dtype
from fpipe._model.needs import ROW_INPUTS
from fpipe._model.specs import without_axes
from fpipe._model.stages import Port
from fpipe._program.over_mesh import devices_over


def held(step: Step) -> Mapping[Role, int]:
    """The bytes on each device, by what they are for; all devices have the same."""
    machine = step.machine
    inputs = step.inputs
    devices = step.mesh.shape[AXIS]
    shards = step.shards

    def storage(kinds: tuple[Avals, ...]) -> Storage:
        return Storage(kinds, machine.rows, shards)

    rows = machine.params.rows

    # Bytes of what is cut as a row is, and of that gathered over the axes of data.
    def cut(row: Row, size: int) -> int:
        return size // devices_over(step.mesh, axes_of(row.spec))

    def gathered(row: Row, size: int) -> int:
        spec = without_axes(row.spec, step.data)
        return size // devices_over(step.mesh, axes_of(spec))

    by_rows = [row for row in rows if without_axes(row.spec, step.data) != row.spec]
    at_once = step.unshard == "step"
    # All devices run the same program, so all have an array for what one borrows.
    lent = sum(
        (gathered if at_once else cut)(rows[loan.row], nbytes(loan.aval))
        for loan in machine.loans
    )
    whole = sum(gathered(row, nbytes(row)) for row in by_rows if at_once)
    roles: dict[Role, int] = {
        "parameters": owned_bytes(step) + whole + lent,
        "boundaries": 0,
        "residuals": 0,
    }
    # Sums of gradients: of each row, of each loan at its borrower, of whole inputs.
    # What is gathered once is scattered once, and what each action gathers each
    # backward scatters.
    if step.request.differentiates:
        summed = gathered if at_once else cut
        returned = [rows[n] for n in step.gradient_names if isinstance(n, int)]
        roles["gradients"] = sum(
            summed(rows[loan.row], _bytes_of_sum(loan.aval)) for loan in machine.loans
        )
        for row in returned:
            roles["gradients"] += summed(row, _bytes_of_sum(row))
            # The sum of a device's own rows is still there when its piece of the whole
            # sum is made, and one in float32 when the 16-bit gradient is.
            if (row in by_rows and at_once) or sum_dtype(row.dtype) != row.dtype:
                roles["gradients"] += cut(row, nbytes(row))
        for a in machine.inputs.values():
            roles["gradients"] += _bytes_of_sum(a)
            if sum_dtype(a.dtype) != a.dtype:
                roles["gradients"] += nbytes(a)
    # Pools are there from the first tick to the last, filled or not. Skips wait in the
    # same pools as boundaries, and are counted among them.
    for name, pool in machine.pools.items():
        saved = isinstance(name, SavedPool | RecomputedPool | HandedPool)
        of = storage(pool.avals)
        # What goes to the host is on the device until the end of its phase.
        size = pool.slots * of.slot_bytes + of.slot_host_bytes
        roles["residuals" if saved else "boundaries"] += size
    # An outbox for each wire, as large as one slot.
    for wire in machine.wires.values():
        roles["boundaries"] += storage(wire.avals).slot_bytes
    # A call takes and returns states whole, on every device. While it runs each device
    # has its blocks of them.
    state = machine.state
    roles["inputs"] = 0
    roles["outputs"] = sum(
        machine.counts[buffer.shape] * storage(((a,),)).slot_bytes
        for buffer, a in machine.outputs.items()
    )
    if state is not None and step.state_shape is not None:
        roles["inputs"] += sum(nbytes(state.shape(entry)) for entry in state.entries)
        roles["outputs"] += sum(map(nbytes, [*state.rows, *step.state_shape.leaves]))
    # The inputs that have rows: whole on each device, or its share of them.
    for port in map(Port, ROW_INPUTS):
        for leaf in inputs.whole(port):
            roles["inputs"] += nbytes(inputs.array_shape(inputs.array(leaf)))
        for leaf, (shape, rows) in itertools.product(
            inputs.cut_leaves(port), enumerate(machine.rows)
        ):
            a = inputs.stack(leaf, shape)
            parts = devices if InputStack(leaf, shape) in machine.spread else 1
            if rows % shards == 0 and not is_key(a.dtype):
                parts *= shards
            roles["inputs"] += nbytes(a) // parts
    # Beside its share each device has a microbatch on its way.
    for segment in machine.segments:
        for phase in segment.phases:
            for stack in (stack for feed in phase.feeds for stack in feed.stacks):
                a = inputs.stack(stack.leaf, stack.shape)
                roles["inputs"] += nbytes(a) // machine.counts[stack.shape]
    return roles


def owned_bytes(step: Step) -> int:
    """The bytes of parameters on each device, as they lie between steps."""
    return sum(
        nbytes(row) // devices_over(step.mesh, axes_of(row.spec))
        for row in step.machine.params.rows
    )


def held_on_host(step: Step) -> int:
    """The bytes of buffers in the host's memory, for each device."""
    shards = step.shards
    # One slot more than the pool has: for what nobody reads.
    total = 0
    for pool in step.machine.pools.values():
        storage = Storage(pool.avals, step.machine.rows, shards)
        total += (pool.slots + 1) * storage.slot_host_bytes
        if pool.on_host:
            total += (pool.on_host + 1) * storage.slot_bytes
    return total


def copied_bytes(step: Step) -> Mapping[int, int]:
    """For each stage that copies to the host, the bytes of one copy."""
    pools = step.machine.pools
    return {
        stage: sum(
            Storage(pools[name].avals, step.machine.rows, step.shards).slot_bytes
            for name in names
        )
        for stage, names in step.machine.copied.items()
    }


def _bytes_of_sum(a: jax.ShapeDtypeStruct | Row) -> int:
    """The bytes of a sum of gradients."""
    return nbytes(a) // a.dtype.itemsize * np.dtype(sum_dtype(a.dtype)).itemsize
