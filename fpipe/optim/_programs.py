"""A divided update as programs for the placed executor: plain data.

In: a `Partition`. Out: a `ProgramPlan`. The operations of a device in one round are one
compiled program. Between programs arrays move. Clipping by the global norm over three
devices becomes six programs:

    | round | device | takes                    | gives               |
    |-------|--------|--------------------------|---------------------|
    | 0     | 1      | gradients of device 1    | a sum               |
    | 0     | 2      | gradients of device 2    | a sum               |
    | 1     | 0      | its gradients, both sums | the norm            |
    | 2     | 0      | its gradients, the norm  | updates of device 0 |
    | 2     | 1      | its gradients, the norm  | updates of device 1 |
    | 2     | 2      | its gradients, the norm  | updates of device 2 |

and four moves: each sum to device 0, the norm to devices 1 and 2. A move costs the host
as much for a number as for a large array, so numbers that leave a program for other
devices are laid end to end in one array for each dtype.
"""

import dataclasses
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from fpipe._core.pytrees import nbytes
from fpipe.optim._partition import SMALL, Partition
from fpipe.optim._update_graph import Operation, UpdateGraph


@dataclasses.dataclass(frozen=True)
class Slot:
    """An array between programs.

    Attributes:
        values: the value that it is; if there are several, small ones of one dtype that
            are laid end to end.
        output: the number of the output that it is, if it is one. Outputs have arrays
            of their own, so that each may be donated by whoever gets it.
    """

    values: tuple[int, ...]
    output: int | None = None

    @property
    def bundled(self) -> bool:
        """Whether several values are laid end to end."""
        return len(self.values) > 1


class Move(NamedTuple):
    """An array that crosses devices.

    Attributes:
        round: of the programs that it moves for.
        slot: what moves: a number in `ProgramPlan.slots`.
        source: where it is; `None` for an input that is on no device of these.
        target: where it is read.
        bytes: its size.
        before: the position of the first program that reads it there.
    """

    round: int
    slot: int
    source: int | None
    target: int
    bytes: int
    before: int


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of an update that one program runs: a device's operations of a round.

    Attributes:
        takes, gives: slots.
        donates: those it takes that it may overwrite.
    """

    round: int
    device: int
    operations: tuple[Operation, ...]
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    donates: tuple[int, ...] = ()


class OutputPlace(NamedTuple):
    """Where an output is found: an array, and the device that it is wanted on."""

    slot: int
    device: int


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """An update as programs, in the order in which they are dispatched.

    Attributes:
        slots: the arrays between programs; the inputs come first, in order.
        parts: the programs.
        moves: what crosses devices, by round.
        outputs: where each is; the slot of an input, if that is handed through.
    """

    graph: UpdateGraph
    slots: tuple[Slot, ...]
    parts: tuple[Part, ...]
    moves: tuple[Move, ...]
    outputs: tuple[OutputPlace, ...]


class _Key(NamedTuple):
    """Names a program; programs are dispatched in this order."""

    round: int
    device: int


@dataclasses.dataclass
class _Draft:
    """A program that is being planned.

    Attributes:
        own_operations: the positions of the operations that are assigned to it.
        outputs: the numbers of the outputs that it gives.
        operations: what it runs: its own ones, and those that every reader runs.
        reads: the values that it takes.
        gives: slots.
    """

    own_operations: set[int] = dataclasses.field(default_factory=set)
    outputs: list[int] = dataclasses.field(default_factory=list)
    operations: tuple[Operation, ...] = ()
    reads: list[int] = dataclasses.field(default_factory=list)
    gives: list[int] = dataclasses.field(default_factory=list)


def plan_programs(
    partition: Partition,
    input_devices: Sequence[int | None],
    output_devices: Sequence[int],
    aliasing: Sequence[bool],
    donate: Sequence[bool],
) -> ProgramPlan:
    """Lower a divided update to programs.

    Arguments:
        input_devices: where each input is, whoever owns it; `None` if on no device of
            these.
        output_devices: where each output is wanted.
        aliasing: whether each output is an input that may be handed through.
        donate: whether each input may be overwritten.
    """
    graph = partition.graph
    # Where each value is: on its owner, which makes it; inputs where they came in.
    found_on: dict[int, int | None] = dict(partition.owners)
    found_on.update(zip(graph.inputs, input_devices, strict=True))
    # An output that is an input, and is there already, needs no program. One that has
    # no owner may be moved: the array that comes in stays where it is.
    handed_through = {
        k
        for k, v in enumerate(graph.outputs)
        if aliasing[k]
        and (v not in partition.owners or found_on[v] == output_devices[k])
    }
    # Slots are numbered in this order: inputs, arrays between programs, outputs. In the
    # example 0 to 2 are the gradients, 3 and 4 sums, 5 the norm, 6 to 8 the updates.
    drafts = _draft_programs(partition, output_devices, handed_through)
    slots = [Slot((v,)) for v in graph.inputs]
    for key, values in _exports(partition, drafts):
        drafts[key].gives.append(len(slots))
        slots.append(Slot(values))
    slot_of = {v: n for n, slot in enumerate(slots) for v in slot.values}
    output_slots = {k: slot_of[graph.outputs[k]] for k in handed_through}
    for draft in drafts.values():
        for k in draft.outputs:
            output_slots[k] = len(slots)
            draft.gives.append(len(slots))
            slots.append(Slot((graph.outputs[k],), output=k))

    # Values become slots. Several values of one bundle are one slot to take.
    parts = []
    for key, draft in drafts.items():
        takes = dict.fromkeys(slot_of[v] for v in draft.reads)
        gives = tuple(draft.gives)
        parts.append(Part(key.round, key.device, draft.operations, tuple(takes), gives))
    outputs = [OutputPlace(output_slots[k], d) for k, d in enumerate(output_devices)]
    moves = _moves(graph, slots, parts, outputs, found_on)
    parts = _with_donations(graph, slots, parts, moves, outputs, donate)
    return ProgramPlan(graph, tuple(slots), tuple(parts), moves, tuple(outputs))


def _draft_programs(
    partition: Partition, output_devices: Sequence[int], handed_through: Set[int]
) -> dict[_Key, _Draft]:
    """The programs in order, with what each runs, reads and makes."""
    graph = partition.graph
    drafts: dict[_Key, _Draft] = {}
    makers = _makers(partition)
    for position, assignment in enumerate(partition.assignments):
        if assignment is not None:
            key = _Key(assignment.round, assignment.owner)
            drafts.setdefault(key, _Draft()).own_operations.add(position)
    for k, (value, device) in enumerate(
        zip(graph.outputs, output_devices, strict=True)
    ):
        if k in handed_through:
            continue
        # The program that makes an output gives it. What is made elsewhere, or by every
        # reader, is given by the last program of the device.
        key = makers.get(value)
        if key is None or key.device != device:
            key = _Key(partition.last_round, device)
        drafts.setdefault(key, _Draft()).outputs.append(k)

    # What a program may read: inputs, and values with an owner. Values without one,
    # such as `1 - 0.9 ** count`, are in no slot: `select` adds the operations that make
    # them to each program that needs one.
    readable = {*partition.owners, *graph.inputs}
    for draft in drafts.values():
        made_here = {v for n in draft.own_operations for v in graph.operations[n].makes}
        wanted = [graph.outputs[k] for k in draft.outputs]
        draft.operations, draft.reads = graph.select(
            wanted, readable - made_here, draft.own_operations
        )
    return dict(sorted(drafts.items()))


def _makers(partition: Partition) -> dict[int, _Key]:
    """The program that makes each value which one device makes."""
    return {
        value: _Key(assignment.round, assignment.owner)
        for operation, assignment in zip(
            partition.graph.operations, partition.assignments, strict=True
        )
        if assignment is not None
        for value in operation.makes
    }


def _exports(
    partition: Partition, drafts: Mapping[_Key, _Draft]
) -> list[tuple[_Key, tuple[int, ...]]]:
    """The arrays that programs give to others: who gives each, and what is in it."""
    avals = partition.graph.avals
    makers = _makers(partition)
    read = {v for draft in drafts.values() for v in draft.reads if v in makers}
    # Values that stay on their device are not copied into a bundle, and neither are
    # large ones: the copy would cost more than it saves.
    crossing = {c.value for c in partition.crossings}
    single = list[tuple[_Key, tuple[int, ...]]]()
    bundles: dict[tuple[_Key, str], list[int]] = {}
    for v in sorted(read):
        # PRNG keys have a dtype that is none of numpy's, and cannot be joined.
        plain = isinstance(avals[v].dtype, np.dtype)
        if v in crossing and plain and nbytes(avals[v]) <= SMALL:
            bundles.setdefault((makers[v], str(avals[v].dtype)), []).append(v)
        else:
            single.append((makers[v], (v,)))
    return single + [(key, tuple(values)) for (key, _), values in bundles.items()]


def _moves(
    graph: UpdateGraph,
    slots: Sequence[Slot],
    parts: Sequence[Part],
    outputs: Sequence[OutputPlace],
    found_on: Mapping[int, int | None],
) -> tuple[Move, ...]:
    """One move for each device that reads an array of another."""
    moves: dict[tuple[int, int], Move] = {}

    def add(round_: int, slot: int, target: int, before: int) -> None:
        values = slots[slot].values
        source = found_on[values[0]]
        if source != target and (slot, target) not in moves:
            size = sum(nbytes(graph.avals[v]) for v in values)
            moves[slot, target] = Move(round_, slot, source, target, size, before)

    for position, part in enumerate(parts):
        for slot in part.takes:
            add(part.round, slot, part.device, position)
    # An output that a program makes is made where it is wanted. Only outputs that are
    # inputs may move.
    for slot, device in outputs:
        if slot < len(graph.inputs):
            add(0, slot, device, len(parts))
    return tuple(sorted(moves.values(), key=lambda move: move.round))


def _with_donations(
    graph: UpdateGraph,
    slots: Sequence[Slot],
    parts: Sequence[Part],
    moves: Sequence[Move],
    outputs: Sequence[OutputPlace],
    donate: Sequence[bool],
) -> list[Part]:
    """The programs, with the inputs that each may overwrite.

    It is the last to read them, and gives an array of that shape: others would be
    donated in vain, and XLA warns of that.
    """
    # JAX deletes every donated array. If a later program still reads it, that is an
    # error. Each condition below excludes one way in which an array is still read, or
    # is donated in vain. Arrays between programs are left out: most are numbers, and
    # all are freed when the call returns.
    last_reader: dict[int, int] = {}
    for position, part in enumerate(parts):
        last_reader.update(dict.fromkeys(part.takes, position))
    for move in moves:
        last_reader[move.slot] = max(last_reader.get(move.slot, 0), move.before)
    copies = {(move.slot, move.target) for move in moves}
    returned = {slot for slot, _ in outputs}

    def form(slot: int) -> tuple[Any, ...]:
        aval = graph.avals[slots[slot].values[0]]
        return aval.shape, aval.dtype

    found = []
    for position, part in enumerate(parts):
        free = [form(slot) for slot in part.gives if not slots[slot].bundled]
        donates = []
        for slot in part.takes:
            # In the order of the lines: an array that the caller gave, and allowed to
            # overwrite; itself and not a copy on another device; not an output too;
            # read by nothing later; and of the form of a result that has no memory yet.
            if (
                slot < len(graph.inputs)
                and donate[slot]
                and (slot, part.device) not in copies
                and slot not in returned
                and last_reader[slot] == position
                and form(slot) in free
            ):
                free.remove(form(slot))
                donates.append(slot)
        found.append(dataclasses.replace(part, donates=tuple(donates)))
    return found
