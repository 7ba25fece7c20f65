"""Which device computes what of an update, and which values cross: plain data.

In comes a traced update and the *owner* of each input: the device that holds the leaf,
or `None` for a value that all devices have (the count of steps, a learning rate). Out
comes a `Partition`: the owner of each step, and the values that other devices read.
Clipping by the global norm, over two devices with a gradient each:

    | step              | reads     | owner  | round |
    |-------------------|-----------|--------|-------|
    | s0 = sum(g0 * g0) | g0        | 0      | 1     |
    | s1 = sum(g1 * g1) | g1        | 1      | 0     |
    | n = sqrt(s0 + s1) | s0, s1    | 0      | 1     |
    | u0 = g0 / n       | g0, n     | 0      | 2     |
    | u1 = g1 / n       | g1, n     | 1      | 2     |

Crossings: `s1` from 1 to 0, `n` from 0 to 1. The rule is about size: a step runs where
its large inputs are, so that only numbers cross. Steps between numbers that all devices
have, such as `1 - 0.9 ** count`, belong to no device: whoever reads the result computes
it too, which is cheaper than a crossing.

Both executors lower this: `_programs.py` into compiled programs for each device, with
transfers between; `_sharded.py` into one program for a mesh. They differ in one point,
where values of several devices *meet*. A transfer reaches one device, so the step runs
on one, and its result is transferred in turn. What crosses a mesh is gathered on every
device, so that every device can do the step itself, without a second crossing.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from fpipe._program.control_flow import value_bytes
from fpipe.optim._update_graph import Step, UpdateGraph

# Bytes up to which a value counts as a number, which may cross. Adafactor's factors and
# a bias may be as small; then it does not matter where they are.
SMALL = 1024


class Assignment(NamedTuple):
    """Where and when a step runs.

    Attributes:
        owner: its device.
        round: values cross between rounds. As late as can be, so that what other
            devices wait for is not behind other work.
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
        assignments: one for each step; `None` if every device that reads a result
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
    """An input of a step that belongs to one device."""

    owner: int
    bytes: int


# The devices that read a value; and for each how many rounds follow the first step
# there that reads it.
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
            crosses reaches every device, so that each does such a step for itself.
    """
    # Who reads a result in the end decides where a step between small values runs, and
    # is known before any step has an owner.
    no_owners = [None] * len(graph.steps)
    demand = _readers(graph, output_readers, no_owners)
    owners = {
        v: d for v, d in zip(graph.inputs, input_owners, strict=True) if d is not None
    }
    step_owners = list[int | None]()
    for step in graph.steps:
        owner = _step_owner(graph, step, owners, demand, meeting_device)
        step_owners.append(owner)
        if owner is not None:
            owners.update(dict.fromkeys(step.makes, owner))

    readers = _readers(graph, output_readers, step_owners)
    rounds_left = {v: _rounds_left(readers.get(v, {}), d) for v, d in owners.items()}
    step_rounds_left = [
        max((rounds_left.get(v, 0) for v in step.makes), default=0)
        for step in graph.steps
    ]
    last = max(step_rounds_left, default=0)
    assignments = [
        None if owner is None else Assignment(owner, last - left)
        for owner, left in zip(step_owners, step_rounds_left, strict=True)
    ]
    crossings = list[Crossing]()
    for value, owner in sorted(owners.items()):
        targets = tuple(sorted(readers.get(value, {}).keys() - {owner}))
        if targets:
            round_ = last - rounds_left[value]
            crossings.append(Crossing(value, owner, targets, round_))
    return Partition(graph, owners, tuple(assignments), tuple(crossings), last)


def _step_owner(
    graph: UpdateGraph,
    step: Step,
    owners: Mapping[int, int],
    demand: Mapping[int, _Readers],
    meeting_device: int | None,
) -> int | None:
    """The device that runs a step; `None` for all that read its result."""
    held = [
        _Held(owners[v], value_bytes(graph.avals[v]))
        for v in dict.fromkeys(step.reads)
        if v in owners
    ]
    holders = {h.owner for h in held}
    large_holders = {h.owner for h in held if h.bytes > SMALL}
    if not holders:
        return None
    if large_holders:
        if len(large_holders) == 1:
            return large_holders.pop()
        # Large arrays of several devices: one of them has to cross, whatever is done.
        if meeting_device is None:
            return None
        return _heaviest(held)

    wanted_by = {device for v in step.makes for device in demand.get(v, {})}
    if len(wanted_by) == 1:
        return wanted_by.pop()
    if any(value_bytes(graph.avals[v]) > SMALL for v in step.makes):
        return None  # A number spread over an array: the number crosses.
    return holders.pop() if len(holders) == 1 else meeting_device


def _heaviest(held: Sequence[_Held]) -> int:
    """The device with the largest value; of several, the one that has most bytes."""
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
    step_owners: Sequence[int | None],
) -> dict[int, _Readers]:
    """Who reads each value, directly or through steps without an owner."""
    readers: dict[int, _Readers] = {}
    for value, devices in zip(graph.outputs, output_readers, strict=True):
        _add_readers(readers.setdefault(value, {}), dict.fromkeys(devices, 0))
    for step, owner in zip(reversed(graph.steps), reversed(step_owners), strict=True):
        reading: _Readers = {}
        for value in step.makes:
            _add_readers(reading, readers.get(value, {}))
        if owner is not None:
            reading = {owner: _rounds_left(reading, owner)}
        for value in step.reads:
            _add_readers(readers.setdefault(value, {}), reading)
    return readers


def _add_readers(readers: _Readers, more: Mapping[int, int]) -> None:
    for device, left in more.items():
        readers[device] = max(left, readers.get(device, 0))


def _rounds_left(readers: Mapping[int, int], owner: int) -> int:
    """How many rounds follow the one in which a value is made on `owner`."""
    return max((left + (d != owner) for d, left in readers.items()), default=0)
