"""The table of a loop: which operation runs on which device at which tick, and with
which numbers.

In: the operations of a call, and ticks. Out: a `Segment`, whose table `machine.py`
draws. For two devices and two phases, in one tick:

    enter         F(0,1) on device 0, B(1,0) on device 1    of the schedule
    move_feeds    the piece of microbatch 1 of `x` must be on device 0 by then
    lay_out       phase 0: columns 0-4, phase 1: columns 0-5
    fill          numbers into the columns of the tick
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fpipe._executors.scan.buffers import Trip
from fpipe._executors.scan.feeds import feed_steps
from fpipe._executors.scan.machine import (
    Feed,
    InputStack,
    Op,
    PhaseCode,
    PoolName,
    Segment,
    TableCopy,
    TableOp,
    TableReturn,
    TableWire,
    WireName,
)
from fpipe._executors.scan.operations import Operations
from fpipe._executors.scan.ticks import Phase, Ticks
from fpipe._model.stages import Port
from fpipe.schedules import Action, Kind


class _Entry(NamedTuple):
    """Numbers for a device in a tick: the arguments of an operation, or a slot."""

    tick: int
    device: int
    numbers: Sequence[int]


@dataclasses.dataclass
class _OpEntries:
    """The entries of an operation.

    Attributes:
        op: with no name yet.
        order: by which the operations of a phase are sorted: forwards first, and along
            the way of what they pass on to each other. An operation of several units
            has the place of its first one.
        stages: those that run it, for its name.
        runs: where and with which arguments it runs.
    """

    op: Op
    order: tuple[int, int]
    stages: set[int]
    runs: list[_Entry]


@dataclasses.dataclass
class _FeedEntries:
    """The entries of a feed.

    Attributes:
        reader: the device that reads.
        stacks: the inputs that it brings.
        read_in: for each tick in which something is read the place of the microbatch
            among those of its shape.
        moves: the ticks in which it moves, and what each device puts in then.
    """

    reader: int
    stacks: set[InputStack] = dataclasses.field(default_factory=set)
    read_in: dict[int, int] = dataclasses.field(default_factory=dict)
    moves: list[tuple[int, list[int]]] = dataclasses.field(default_factory=list)


class _PoolCopy(NamedTuple):
    """The copies of a pool by number: a stage of several units may copy several bundles
    of one pool.
    """

    pool: PoolName
    number: int


class _PhaseEntries:
    """What is to be in the table for one phase of each tick.

    Columns can be given out only when all operations of the phase are known. So the
    actions are entered first (`enter`), then feeds get their steps (`move_feeds`), then
    columns are given out (`lay_out`), and at last the numbers are written (`fill`).

    Attributes:
        ops: by number.
        arrivals: for each wire the slots where bundles arrive.
        feeds: by the port that they bring, the stage and the kind of action that read
            it, and the shape of the microbatches.
        copies, returns: the slots that go to the host, and those that come back.
    """

    def __init__(self, operations: Operations) -> None:
        self.operations = operations
        self.ops: dict[int, _OpEntries] = {}
        self.arrivals: dict[WireName, list[_Entry]] = defaultdict(list)
        self.feeds: dict[tuple[Port, int, int, Kind], _FeedEntries] = {}
        self.copies: dict[_PoolCopy, list[_Entry]] = defaultdict(list)
        self.returns: dict[_PoolCopy, list[_Entry]] = defaultdict(list)

    def enter(self, action: Action, tick: int, device: int) -> None:
        """Enter what a device does in a tick."""
        kind, s, i = action
        units = self.operations.work.units
        for u in units.of_stage[s]:
            found = self.operations.find(u, i, kind)
            if found is None:
                continue
            # On one device an embedding runs before the core that reads it, and its
            # backward after the core's.
            order = ("FRBIW".index(kind), -u if kind in "BIW" else u)
            own = self.ops.get(found.number)
            if own is None:
                own = self.ops[found.number] = _OpEntries(found.op, order, set(), [])
            own.order = min(own.order, order)
            own.stages.add(s)
            own.runs.append(_Entry(tick, device, found.arguments[i]))
            # What a feed must have brought by this tick. What it brings is read by one
            # stage alone.
            for stack in found.fed:
                name = (stack.leaf.port, s, stack.shape, kind)
                feed = self.feeds.setdefault(name, _FeedEntries(device))
                feed.stacks.add(stack)
                feed.read_in[tick] = self.operations.places[i]
            # The slot where a bundle arrives is told to the receiver, in the tick in
            # which it is sent.
            for place in found.arrivals:
                assert isinstance(place.pool, WireName)
                slot = self.operations.buffers.slot_of[place][i]
                entry = _Entry(tick, place.device, [slot])
                self.arrivals[place.pool].append(entry)

    def copy(self, trip: Trip, tick: int) -> None:
        """Enter that a bundle goes to the host."""
        _enter_copy(self.copies, trip, tick, [trip.slot, trip.on_host])

    def bring_back(self, trip: Trip, tick: int) -> None:
        """Enter that a bundle comes back."""
        _enter_copy(self.returns, trip, tick, [1, trip.on_host, trip.slot_again])

    def move_feeds(self, devices: int) -> int:
        """Find when feeds move: in each tick in which something is read, and in as many
        before the first of these as the farthest microbatch has to go.

        Returns:
            How many ticks that takes before tick 0. Such ticks have negative numbers.
        """
        lead = 0
        for (*_, shape, _), feed in self.feeds.items():
            count = len(self.operations.alike[shape])
            times = sorted(feed.read_in)
            order = [feed.read_in[t] for t in times]
            steps, early = feed_steps(order, count, devices, feed.reader)
            times = [*range(times[0] - early, times[0]), *times]
            feed.moves = list(zip(times, steps, strict=True))
            lead = max(lead, -times[0])
        return lead

    def lay_out(self) -> tuple[PhaseCode, int]:
        """Give out columns; also how many there are.

        In the order of the drawing in `machine.py`: for each operation whether it runs,
        then its arguments; for each wire and feed two; for each copy two or three.
        """
        column = itertools.count()
        ops = []
        # The program runs the operations in this order. The entries are sorted, and not
        # only what is made of them, so that `fill` meets them in the same order.
        self.ops = dict(sorted(self.ops.items(), key=lambda item: item[1].order))
        for own in self.ops.values():
            op = dataclasses.replace(own.op, name=_op_name(own))
            ops.append(TableOp(op, next(column), next(column)))
            # Every entry of an operation has as many numbers.
            for _ in own.runs[0].numbers[1:]:
                next(column)
        wires = [TableWire(wire, next(column), next(column)) for wire in self.arrivals]
        feeds = [
            Feed(
                kind, tuple(sorted(own.stacks)), own.reader, next(column), next(column)
            )
            for (*_, kind), own in self.feeds.items()
        ]
        copies = [
            TableCopy(own.pool, next(column), next(column)) for own in self.copies
        ]
        returns = [
            TableReturn(own.pool, next(column), next(column), next(column))
            for own in self.returns
        ]
        code = PhaseCode(
            tuple(ops), tuple(wires), tuple(feeds), tuple(copies), tuple(returns)
        )
        return code, next(column)

    def fill(self, table: np.ndarray, code: PhaseCode, lead: int) -> None:
        """Write the entries.

        Arguments:
            table: that of this phase, `(devices, ticks, columns)`.
            code: what `lay_out` returned.
            lead: how many ticks the table has before the first one.
        """
        for own, (_, runs, first) in zip(self.ops.values(), code.ops, strict=True):
            for tick, device, numbers in own.runs:
                table[device, lead + tick, runs] = 1
                table[device, lead + tick, first : first + len(numbers)] = numbers
        for wire, slot, used in code.wires:
            # Where nothing was sent junk arrives, for the slot that nobody reads.
            table[:, :, slot] = self.operations.buffers.counts[wire]
            for tick, device, (number,) in self.arrivals[wire]:
                table[device, lead + tick, slot] = number
                # A wire carries on all devices or on none: it is a collective. A device
                # to which nothing is sent gets something too, for the spare slot.
                table[:, lead + tick, used] = 1
        for copy, own in zip(code.copies, self.copies.values(), strict=True):
            # Where nothing is copied something goes to the slot that nobody reads.
            table[:, :, copy.on_host] = self.operations.buffers.host_counts[copy.pool]
            _write(table, own, copy.slot, lead)
        for back, own in zip(code.returns, self.returns.values(), strict=True):
            _write(table, own, back.runs, lead)
        for feed, own in zip(code.feeds, self.feeds.values(), strict=True):
            for tick, numbers in own.moves:
                table[:, lead + tick, feed.piece] = numbers
                table[:, lead + tick, feed.moves] = 1


def _enter_copy(
    entries: dict[_PoolCopy, list[_Entry]],
    trip: Trip,
    tick: int,
    numbers: Sequence[int],
) -> None:
    """Enter a copy of a bundle, after those of the same pool in the same tick."""
    for n in itertools.count():
        own = entries[_PoolCopy(trip.pool, n)]
        if all((e.tick, e.device) != (tick, trip.device) for e in own):
            own.append(_Entry(tick, trip.device, numbers))
            return


def _write(table: np.ndarray, entries: list[_Entry], first: int, lead: int) -> None:
    """Write entries into the columns from the first one on."""
    for tick, device, numbers in entries:
        table[device, lead + tick, first : first + len(numbers)] = numbers


def make_segment(ticks: Ticks, operations: Operations, first: int = 0) -> Segment:
    """One loop: what its phases do, and the table.

    Arguments:
        first: the number of its first phase, counted through all loops.
    """
    # First enter all actions; what a phase does is known only after the last one.
    devices = len(ticks.rows[0][0])
    phases = [_PhaseEntries(operations) for _ in ticks.phases]
    for tick, row in enumerate(ticks.rows):
        for phase, actions in zip(phases, row, strict=True):
            for device, action in enumerate(actions):
                if action is not None:
                    phase.enter(action, tick, device)
    count = len(ticks.rows) * len(phases)
    for trip in operations.buffers.trips:
        for after, enter in (
            (trip.absence.gone, _PhaseEntries.copy),
            (trip.absence.back, _PhaseEntries.bring_back),
        ):
            if first <= after < first + count:
                tick, p = divmod(after - first, len(phases))
                enter(phases[p], trip, tick)
    # All phases begin in the same tick, so the feed that needs most ticks before the
    # first action gives their number; in these nothing runs.
    lead = max(phase.move_feeds(devices) for phase in phases)
    # One array holds the numbers of all phases, as wide as the widest.
    codes = []
    width = 0
    for phase in phases:
        code, columns = phase.lay_out()
        codes.append(code)
        width = max(width, columns)
    shape = (devices, lead + len(ticks.rows), len(phases), width)
    table = np.zeros(shape, np.int32)
    for p, (phase, code) in enumerate(zip(phases, codes, strict=True)):
        phase.fill(table[:, :, p], code, lead)
    nothing: tuple[Phase, ...] = ((None,) * devices,) * len(phases)
    return Segment(tuple(codes), (nothing,) * lead + ticks.rows, table)


def _op_name(entries: _OpEntries) -> str:
    """What profiles call an operation: `stage2 F`, or, where it serves several stages,
    `stage0-3,5 F`.
    """
    runs: list[list[int]] = []
    for s in sorted(entries.stages):
        if runs and runs[-1][-1] == s - 1:
            runs[-1].append(s)
        else:
            runs.append([s])
    texts = [str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs]
    return f"stage{','.join(texts)} {entries.op.kind}"
