"""What a call holds on each device under the scan executor, read off the machine: its
buffers are there from start to end.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from fpipe._core.pytrees import nbytes
from fpipe._executors.plan_data import Role
from fpipe._executors.scan.machine import Wire
from fpipe._executors.scan.mesh import AXIS, DATA
from fpipe._executors.scan.packing import Row
from fpipe._executors.scan.step import Step
from fpipe._executors.scan.storage import Storage, is_key, raw
from fpipe._model.loss import sum_dtype
from fpipe._model.stages import SIDE, TARGETS, Leaf, X


def held(step: Step) -> Mapping[Role, int]:
    """The bytes on each device, by what they are for; all devices have the same.

    What has a microbatch's rows is sharded over the mesh's data axis, if that divides
    them.
    """
    machine, inputs, shards = step.machine, step.inputs, step.mesh.shape.get(DATA, 1)

    def shard(a: jax.ShapeDtypeStruct) -> int:
        has_rows = a.shape and a.shape[0] == step.rows and step.rows % shards == 0
        return nbytes(a) // (shards if has_rows else 1)

    # What one device lends, all have: every device runs the same program.
    lent = sum(nbytes(loan.aval) for loan in machine.loans)
    roles: dict[Role, int] = {
        "parameters": sum(nbytes(row) for row in machine.params.rows) + lent
    }
    if step.request.differentiates:
        rows = [
            machine.params.rows[name]
            for name in step.gradient_names
            if isinstance(name, int)
        ]
        summed = [
            *rows,
            *(loan.aval for loan in machine.loans),
            *machine.inputs.values(),
        ]
        # Sums in another dtype than their own are there beside what is made of them in
        # the end.
        returned = [
            a
            for a in (*rows, *machine.inputs.values())
            if sum_dtype(a.dtype) != a.dtype
        ]
        roles["gradients"] = sum(map(_summed, summed)) + sum(map(nbytes, returned))
    slots = {
        name: sum(map(shard, Storage(pool.avals, step.rows).shapes)) * pool.slots
        for name, pool in machine.pools.items()
    }
    wires = sum(
        sum(map(shard, _slot(wire, step.rows))) for wire in machine.wires.values()
    )
    roles["boundaries"] = wires + sum(
        size for name, size in slots.items() if name.kind in ("forward", "backward")
    )
    roles["residuals"] = sum(
        size for name, size in slots.items() if name.kind in ("saved", "shared")
    )
    devices = step.mesh.shape[AXIS]
    given = sum(
        nbytes(a)
        // (
            (devices if Leaf(port, k) in machine.spread else 1)
            * _shards(rows, a, shards)
        )
        for port in (X, SIDE, TARGETS)
        for k, (a, rows) in enumerate(
            zip(
                inputs.of(port).leaves, getattr(inputs.cut, port.kind).rows, strict=True
            )
        )
    )
    feeds = [
        feed for segment in machine.segments for own in segment.feeds for feed in own
    ]
    moving = sum(
        nbytes(inputs.of(feed.port).leaves[k]) // step.m
        for feed in feeds
        for k in feed.arrays
    )
    # States come and go whole, on every device; between, each device has its own.
    state, left = machine.state, step.state_shape
    states = [] if state is None else [state.shape(entry) for entry in state.entries]
    roles["inputs"] = given + moving + sum(map(nbytes, states))
    outputs = (
        sum(shard(raw(a)) for a, _ in machine.outputs.values()) * machine.microbatches
    )
    own = [] if state is None or left is None else [*state.rows, *left.leaves]
    roles["outputs"] = outputs + sum(map(nbytes, own))
    return roles


def _summed(a: jax.ShapeDtypeStruct | Row) -> int:
    """The bytes of a sum of gradients."""
    return nbytes(a) // a.dtype.itemsize * np.dtype(sum_dtype(a.dtype)).itemsize


def _shards(rows: Sequence[int] | None, a: jax.ShapeDtypeStruct, shards: int) -> int:
    """Into how many pieces each microbatch of an input is cut."""
    return 1 if rows is None or rows[0] % shards or is_key(a.dtype) else shards


def _slot(wire: Wire, rows: int) -> list:
    return Storage(wire.avals, rows).shapes
