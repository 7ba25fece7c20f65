"""What a device holds from tick to tick.

The *carry* is a dictionary from the names of buffers (see `machine.py`) to their
arrays:

    WireName("forward", 0)    a pool          arrays with an axis of slots
    SavedPool("core", True)   a pool          arrays with an axis of slots
    HostSlots(SavedPool(...)) of a pool       its arrays that are on the host
    CopiedSlots(SavedPool())  of a pool       what an `O` has copied to the host
    Outbox(WireName(...))     an outbox       the arrays of one bundle
    InTransit(feed)           a feed          the arrays of one microbatch
    Turn()                    for collectives a number
    Reads(SavedPool(...))     in a tick       a number, see `after_reads`
    ClockToken()              for a clock     a number
    OutputBuffer(loss[0])     an output       an array with an axis of microbatches
    RowGradient(0)            a gradient      an array, the sum so far
    StateBlock(0)             a state         an array
    StateMaximum(0)           a state         an array, the maximum so far
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from fpipe._executors.scan.machine import (
    Feed,
    Outbox,
    OutputBuffer,
    PoolName,
    StateBlock,
    StateMaximum,
    SummedGradient,
)

Array: TypeAlias = jax.Array


@dataclasses.dataclass(frozen=True, slots=True)
class InTransit:
    """What a feed has on its way."""

    feed: Feed


@dataclasses.dataclass(frozen=True, slots=True)
class HostSlots:
    """Those arrays of a pool that are in the host's memory."""

    pool: PoolName


@dataclasses.dataclass(frozen=True, slots=True)
class CopiedSlots:
    """The slots of a pool in the host's memory, for bundles that wait there."""

    pool: PoolName


@dataclasses.dataclass(frozen=True, slots=True)
class Staged:
    """What goes to a slot on the host at the end of the phase: arrays, still on the
    device, and after them the number of the slot.
    """

    pool: PoolName


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """A number that keeps the collectives of a tick in one order, see
    `_move_in_turn` in `moving.py`. It is always zero, which XLA cannot know.
    """


@dataclasses.dataclass(frozen=True, slots=True)
class Reads:
    """A number from the operations that have read a pool since it was changed last, in
    the same tick: see `after_reads`. It is always zero, too.
    """

    pool: PoolName


@dataclasses.dataclass(frozen=True, slots=True)
class ClockToken:
    """What goes from one call of the clock to the next, to keep their order."""


Buffer: TypeAlias = (
    PoolName
    | HostSlots
    | CopiedSlots
    | Staged
    | Outbox
    | InTransit
    | Turn
    | Reads
    | ClockToken
    | OutputBuffer
    | SummedGradient
    | StateBlock
    | StateMaximum
)
Carry: TypeAlias = dict[Buffer, Any]


def pool_arrays(name: PoolName, carry: Carry) -> list[Array]:
    """All arrays of a pool, in the order of its layout; after them those that are
    copied to the host.
    """
    copied = carry.get(CopiedSlots(name), [])
    return [*carry[name], *carry[HostSlots(name)], *copied]


def after_reads(changed: Sequence[Buffer], carry: Carry) -> Array:
    """A zero that is there when all operations that have read these pools are done.

    What changes a pool has to need it. XLA updates a pool in place only if it knows
    that nobody reads the old one afterwards. By itself it knows no order of two
    conditionals if neither needs what the other makes. Without this zero a
    wire whose pool backwards read copied it at each tick, whole.
    """
    read = jnp.int32(0)
    for name in changed:
        if isinstance(name, PoolName):
            read += carry.pop(Reads(name), 0)
    return read
