"""What moves in a phase of a tick: between devices, and to the host and back.

In: the carry of a device (`carry.py`), which is changed in place, and the row of the
table for the phase. In this order:

    feeds     `x` goes from device to device, towards the one that reads it
              (then operations run, and leave some of what they make in `Staged`)
    staged    what a policy offloads goes to its slot on the host
    copies    slots go to the host (`O`) and come back (`L`)
    wires     what the outboxes hold goes to the pools of the receivers

Everything on the host is moved outside of conditionals: see `interpreter.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from fpipe._core.pytrees import on_host
from fpipe._executors.scan.carry import (
    Carry,
    CopiedSlots,
    HostSlots,
    InTransit,
    Staged,
    Turn,
    after_reads,
)
from fpipe._executors.scan.machine import (
    FedPiece,
    Feed,
    Machine,
    Op,
    Outbox,
    PhaseCode,
    PoolName,
    Put,
    TableReturn,
    TableWire,
)
from fpipe._executors.scan.reading import Given
from fpipe._executors.scan.storage import Storage, empty
from fpipe._executors.stage_places import AXIS

Array: TypeAlias = jax.Array


class Mover:
    """Moves what a device holds.

    Arguments:
        storage: of each pool.
        alone: whether the mesh has only the axis of stages.
        in_turn: whether collectives in operations wait for all devices too, so that
            wires have to take their turn with them.
    """

    def __init__(
        self,
        machine: Machine,
        storage: Mapping[PoolName, Storage],
        alone: bool,
        in_turn: bool,
    ) -> None:
        self.machine = machine
        self.in_turn = in_turn
        self.storage = storage
        self.alone = alone

    # --- between devices ---

    def move_feed(self, feed: Feed, carry: Carry, row: Array, given: Given) -> None:
        """What a feed has on its way moves on by one device. What was there before is
        what the reader reads.
        """
        devices = self.machine.devices
        # All pieces go the same way round, so that each step is one `ppermute`. The
        # reader is the end of the way: it sends nothing on.
        pairs = [(d, (d - 1) % devices) for d in range(devices) if d != feed.reader]
        own = row[feed.piece]

        def move(come: list[Array]) -> tuple[list[Array], list[Array]]:
            # `own` is the piece of its own that a device puts in now. After its last
            # one it stands for none: the device passes on what has come.
            here = []
            for stack, a in zip(feed.stacks, come, strict=True):
                share = given.inputs[stack]
                puts = own < share.shape[0]
                piece = jax.lax.dynamic_index_in_dim(share, own, keepdims=False)
                here.append(jnp.where(puts, piece, a))
            return [jax.lax.ppermute(a, AXIS, pairs) for a in here], here

        name = InTransit(feed)
        carry[name], here = self._move_in_turn(
            row[feed.moves], carry, move, lambda come: (come, come), carry[name]
        )
        for stack, piece in zip(feed.stacks, here, strict=True):
            given.fed[FedPiece(stack, feed.kind)] = piece

    def deliver(self, entry: TableWire, carry: Carry, slot: Array, used: Array) -> None:
        """What the outboxes hold goes to the pools of the receivers."""
        wire = self.machine.wires[entry.wire]
        read = after_reads([entry.wire], carry)

        # The outbox is only read, so it is no part of what the conditional returns.
        def move(pool: list[Array]) -> tuple[list[Array]]:
            sent = carry[Outbox(entry.wire)]
            arrived = [jax.lax.ppermute(a, AXIS, wire.pairs) for a in sent]
            filled = [
                jax.lax.dynamic_update_index_in_dim(slots, a, slot, 0)
                for slots, a in zip(pool, arrived, strict=True)
            ]
            return (filled,)

        # Without a conditional XLA may run the transfer beside the next phase. Where
        # nothing was sent, junk goes to a slot that nobody reads.
        if wire.always and not self.in_turn:
            slot = slot + read
            (carry[entry.wire],) = move(carry[entry.wire])
        else:
            (carry[entry.wire],) = self._move_in_turn(
                used - read, carry, move, lambda pool: (pool,), carry[entry.wire]
            )

    def _move_in_turn(
        self,
        used: Array,
        carry: Carry,
        move: Callable[[list[Array]], tuple[Any, ...]],
        stay: Callable[[list[Array]], tuple[Any, ...]],
        arrays: list[Array],
    ) -> tuple[Any, ...]:
        """`move(arrays)` where the table says so, on every device or on none; else
        `stay(arrays)`.

        One after the other: each hands on a zero, the turn, that the next one needs.
        XLA would keep the order of independent conditionals too, but not on CPU in a
        program that was loaded from the compilation cache (jax 0.10.2), where devices
        then wait for each other in different ones.
        """
        turn = carry[Turn()]
        *moved, carry[Turn()] = jax.lax.cond(
            used > turn,
            lambda own: (*move(own), jnp.int32(0)),
            lambda own: (*stay(own), turn),
            arrays,
        )
        return tuple(moved)

    # --- to the host and back ---

    def nothing_staged(self, pool: PoolName) -> list[Array]:
        """What is staged where no operation runs: anything, for the last slot."""
        layout = self.storage[pool].layout
        own = layout.shapes[layout.on_device :]
        arrays = [empty(a.shape, a.dtype, jnp.bool_(False), self.alone) for a in own]
        return [*arrays, jnp.int32(self.machine.pools[pool].slots)]

    def store_on_host(self, staged: Staged, carry: Carry) -> None:
        """What is staged goes to its slot on the host."""
        *arrays, slot = carry.pop(staged)
        name = HostSlots(staged.pool)
        carry[name] = [
            jax.lax.dynamic_update_index_in_dim(
                slots, jax.device_put(a[None], jax.memory.Space.Host), slot, 0
            )
            for slots, a in zip(carry[name], arrays, strict=True)
        ]

    def copy(self, phase: PhaseCode, carry: Carry, row: Array) -> None:
        """Slots go to the host and come back, on each device as the table says."""
        # First everything is read, then written: what goes may have the slot that what
        # comes back is to have, and the other way round on the host.
        leaving = [
            [_at(slots, row[copy.slot]) for slots in carry[copy.pool]]
            for copy in phase.copies
        ]
        for back in phase.returns:
            copied = carry[CopiedSlots(back.pool)]

            def bring(
                pool: list[Array],
                back: TableReturn = back,
                copied: list[Array] = copied,
            ) -> list[Array]:
                return [
                    jax.lax.dynamic_update_index_in_dim(
                        slots,
                        jax.device_put(
                            _at(there, row[back.on_host]), jax.memory.Space.Device
                        ),
                        row[back.slot],
                        0,
                    )
                    for slots, there in zip(pool, copied, strict=True)
                ]

            read = after_reads([back.pool], carry)
            carry[back.pool] = jax.lax.cond(
                row[back.runs] > read, bring, lambda pool: pool, carry[back.pool]
            )
        # Without a conditional, which must return nothing on the host (see above).
        for copy, arrays in zip(phase.copies, leaving, strict=True):
            name = CopiedSlots(copy.pool)
            carry[name] = [
                jax.lax.dynamic_update_index_in_dim(
                    there,
                    jax.device_put(a, jax.memory.Space.Host),
                    row[copy.on_host],
                    0,
                )
                for there, a in zip(carry[name], arrays, strict=True)
            ]


def staged_by(op: Op) -> list[Staged]:
    """Where an operation leaves what goes to the host.

    No other that runs in the same phase on the same device leaves anything there: the
    units of a stage, an end and a core, have pools of their own.
    """
    return [
        Staged(target.buffer)
        for target in op.targets
        if isinstance(target, Put) and any(map(on_host, target.avals))
    ]


def _at(slots: Array, slot: Array) -> Array:
    """One slot of a pool's array, with its axis."""
    return jax.lax.dynamic_slice_in_dim(slots, slot, 1)
