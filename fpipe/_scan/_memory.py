"""What a call holds on each device under the scan executor, read off the machine: its buffers are there from start to end."""

from collections.abc import Mapping

from fpipe._loss import sum_dtype
from fpipe._plan import Role
from fpipe._scan._machine import Wire
from fpipe._scan._mesh import AXIS
from fpipe._scan._step import Step
from fpipe._scan._storage import Storage, raw
from fpipe._stage import SIDE, TARGETS, Leaf, X
from fpipe._tree import nbytes


def held(step: Step) -> Mapping[Role, int]:
    """The bytes on each device, by what they are for; all devices have the same."""
    machine, inputs = step.machine, step.inputs
    roles: dict[Role, int] = {"parameters": sum(nbytes(row) for row in machine.params.rows)}
    if step.request.differentiates:
        rows = [machine.params.rows[name] for name in step.gradient_names if isinstance(name, int)]
        summed = [*rows, *(loan.aval for loan in machine.loans), *machine.inputs.values()]
        roles["gradients"] = sum(nbytes(a) // a.dtype.itemsize * sum_dtype(a.dtype).itemsize for a in summed)
    slots = {
        name: sum(map(nbytes, Storage(pool.avals, step.rows).shapes)) * pool.slots
        for name, pool in machine.pools.items()
    }
    wires = sum(sum(map(nbytes, _slot(wire, step.rows))) for wire in machine.wires.values())
    roles["boundaries"] = wires + sum(size for name, size in slots.items() if name.kind in ("forward", "backward"))
    roles["residuals"] = sum(size for name, size in slots.items() if name.kind in ("saved", "shared"))
    devices = step.mesh.shape[AXIS]
    roles["inputs"] = sum(
        nbytes(a) // (devices if Leaf(port, k) in machine.spread else 1)
        for port in (X, SIDE, TARGETS)
        for k, a in enumerate(inputs.of(port).leaves)
    )
    states = () if machine.state is None else machine.state.rows
    outputs = sum(nbytes(raw(a)) for a, _ in machine.outputs.values()) * machine.microbatches
    roles["outputs"] = outputs + sum(map(nbytes, states))
    return roles


def _slot(wire: Wire, rows: int) -> list:
    return Storage(wire.avals, rows).shapes
