"""Which device computes which operation of an update, and which values cross: plain
data.

In: a traced update and the *owner* of each input: the device that holds the leaf, or
`None` for a value that all devices have (the count of steps, a learning rate). Out: a
`Partition`: the owner of each operation, and the values that other devices read.
Clipping by the global norm, over two devices with a gradient each:

    | operation         | reads     | owner  | round |
    |-------------------|-----------|--------|-------|
    | s0 = sum(g0 * g0) | g0        | 0      | 1     |
    | s1 = sum(g1 * g1) | g1        | 1      | 0     |
    | n = sqrt(s0 + s1) | s0, s1    | 0      | 1     |
    | u0 = g0 / n       | g0, n     | 0      | 2     |
    | u1 = g1 / n       | g1, n     | 1      | 2     |

Crossings: `s1` from 1 to 0, `n` from 0 to 1. The rule is about size: an operation runs
where its large inputs are, so that only numbers cross. Operations between numbers that
all devices have, such as `1 - 0.9 ** count`, belong to no device: whoever reads the
result computes it too, which is cheaper than a crossing.

Both executors lower this: `_programs.py` into compiled programs for each device, with
transfers between; `_sharded.py` into one program for a mesh. They differ in one point,
where values of several devices *meet*. A transfer reaches one device, so the operation
runs on one, and its result is transferred in turn. What crosses a mesh is gathered on
every device, so that every device can do the operation itself, without a second
crossing.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from fpipe._core.pytrees import nbytes
from fpipe.optim._update_graph import Operation, UpdateGraph

# Bytes up to which a value counts as a number, which may cross. Adafactor's factors and
# a bias may be as small; then it does not matter where they are.
SMALL = 1024


class Assignment(NamedTuple):
    """Where and when an operation runs.

    Attributes:
        owner: its device.
        round: values cross between rounds. As late as can be: what other devices wait
            for is in an early program of its own, and not after other work.
    """

    owner: int
    round: int


class Crossing(NamedTuple):
    """A value that other devices than its owner read.

    Attributes:
        value: a number in the graph.
        source: its owner.
        targets: the devices that read it.
        round: after which it crosses; -1 for an input that crosses at first.
    """

    value: int
    source: int
    targets: tuple[int, ...]
    round: int


@dataclasses.dataclass(frozen=True)
class Partition:
    """An update, divided over devices.

    Attributes:
        owners: the device of each value that belongs to one.
        assignments: one for each operation; `None` if every device that reads a result
            runs it.
        crossings: one for each value that crosses, in the order of the values.
        last_round: the round in which outputs are read.
    """

    graph: UpdateGraph
    owners: Mapping[int, int]
    assignments: tuple[Assignment | None, ...]
    crossings: tuple[Crossing, ...]
    last_round: int


class _Held(NamedTuple):
    """An input of an operation that belongs to one device."""

    owner: int
    bytes: int


# The devices that read a value; and for each how many rounds follow the first
# operation there that reads it.
_Readers: TypeAlias = dict[int, int]


def partition(
    graph: UpdateGraph,
    input_owners: Sequence[int | None],
    output_readers: Sequence[Iterable[int]],
    meeting_device: int | None,
) -> Partition:
    """Divide an update over devices.

    Arguments:
        input_owners: the device of each input; `None` for one that all devices have.
        output_readers: the devices that each output is for.
        meeting_device: where small values of several devices meet; `None` if what
            crosses reaches every device, so that each does such an operation itself.
    """
    # Three passes over the graph. Backward: which devices each value is for in the end.
    # Forward: where each operation runs; small ones run where they are for. Backward
    # again: who reads each value, now that the operations between have owners, and how
    # many rounds follow.
    # For the norm above, the passes find:
    #
    #   demand    s0, s1 and n are for devices 0 and 1, u0 is for 0, u1 for 1
    #   owners    s0: 0 and s1: 1, like their gradients; n: the meeting device, 0
    #   readers   s1: {0: 1}, one round follows; n: {0: 0, 1: 0}, none follows
    no_owners = [None] * len(graph.operations)
    demand = _readers(graph, output_readers, no_owners)
    owners = {
        v: d for v, d in zip(graph.inputs, input_owners, strict=True) if d is not None
    }
    operation_owners = list[int | None]()
    for operation in graph.operations:
        owner = _operation_owner(graph, operation, owners, demand, meeting_device)
        operation_owners.append(owner)
        if owner is not None:
            owners.update(dict.fromkeys(operation.makes, owner))

    readers = _readers(graph, output_readers, operation_owners)
    # Rounds are counted from the end and turned around: `last - left`. If operations
    # ran as early as they can, `s0` would be a program of its own before that of `n`:
    # one more to dispatch on device 0, for nothing that anyone waits for.
    rounds_left = {v: _rounds_left(readers.get(v, {}), d) for v, d in owners.items()}
    operation_rounds_left = [
        max((rounds_left.get(v, 0) for v in operation.makes), default=0)
        for operation in graph.operations
    ]
    last = max(operation_rounds_left, default=0)
    assignments = [
        None if owner is None else Assignment(owner, last - left)
        for owner, left in zip(operation_owners, operation_rounds_left, strict=True)
    ]
    crossings = list[Crossing]()
    for value, owner in sorted(owners.items()):
        targets = tuple(sorted(readers.get(value, {}).keys() - {owner}))
        if targets:
            round_ = last - rounds_left[value]
            crossings.append(Crossing(value, owner, targets, round_))
    return Partition(graph, owners, tuple(assignments), tuple(crossings), last)


def _operation_owner(
    graph: UpdateGraph,
    operation: Operation,
    owners: Mapping[int, int],
    demand: Mapping[int, _Readers],
    meeting_device: int | None,
) -> int | None:
    """The device that runs an operation; `None` for all that read its result."""
    # The cases are in order of cost: move no large array if possible, then make as few
    # crossings as possible, then as few programs as possible.
    held = [
        _Held(owners[v], nbytes(graph.avals[v]))
        for v in dict.fromkeys(operation.reads)
        if v in owners
    ]
    holders = {h.owner for h in held}
    large_holders = {h.owner for h in held if h.bytes > SMALL}
    if not holders:
        return None
    if large_holders:
        if len(large_holders) == 1:
            return large_holders.pop()
        # Large arrays of several devices (`optax.flatten` joins all of them): some have
        # to cross, whatever is done.
        return None if meeting_device is None else _heaviest(held)

    # All inputs are small. If the result is for one device alone, the operation runs
    # there: of a chain of operations only the first inputs cross, once.
    wanted_by = {device for v in operation.makes for device in demand.get(v, {})}
    if len(wanted_by) == 1:
        return wanted_by.pop()
    if any(nbytes(graph.avals[v]) > SMALL for v in operation.makes):
        # A number that is spread over an array: the number crosses, and not the array.
        return None
    return holders.pop() if len(holders) == 1 else meeting_device


def _heaviest(held: Sequence[_Held]) -> int:
    """The device with the largest value; of several, the one that has most bytes.

    `a[1, 400] @ b[400, 400]` runs where `b` is. For equal arrays, the device with most
    of them moves none of its own.
    """
    largest = max(h.bytes for h in held)
    holders = {h.owner for h in held if h.bytes == largest}
    if len(holders) == 1:
        return holders.pop()
    weight = dict.fromkeys(sorted(h.owner for h in held), 0)
    for h in held:
        weight[h.owner] += h.bytes
    return max(weight, key=lambda device: weight[device])


def _readers(
    graph: UpdateGraph,
    output_readers: Sequence[Iterable[int]],
    operation_owners: Sequence[int | None],
) -> dict[int, _Readers]:
    """Who reads each value, directly or through operations without an owner."""
    readers: dict[int, _Readers] = {}
    for value, devices in zip(graph.outputs, output_readers, strict=True):
        _add_readers(readers.setdefault(value, {}), dict.fromkeys(devices, 0))
    for operation, owner in zip(
        reversed(graph.operations), reversed(operation_owners), strict=True
    ):
        # Who reads a result of an operation without owner reads its inputs too. With an
        # owner, the owner alone reads them.
        reading: _Readers = {}
        for value in operation.makes:
            _add_readers(reading, readers.get(value, {}))
        if owner is not None:
            reading = {owner: _rounds_left(reading, owner)}
        for value in operation.reads:
            _add_readers(readers.setdefault(value, {}), reading)
    return readers


def _add_readers(readers: _Readers, more: Mapping[int, int]) -> None:
    for device, left in more.items():
        readers[device] = max(left, readers.get(device, 0))


def _rounds_left(readers: Mapping[int, int], owner: int) -> int:
    """How many rounds follow the one in which a value is made on `owner`.

    A reader on the same device adds none: it may be in the same program. Any other adds
    one, because values cross between rounds only.
    """
    return max((left + (d != owner) for d, left in readers.items()), default=0)
