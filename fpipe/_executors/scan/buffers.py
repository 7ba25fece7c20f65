"""Where the bundles of a call wait: wires between devices, pools, and slots in them.

In: the work of a call, and when each action runs. Out: `Buffers`, in four passes:

1. What each action sends from device to device is an edge of a graph; the edges are
   coloured into the fewest wires.
2. A bundle that comes by a wire waits in the wire's pool. One that stays on its device
   waits where the reader's like look for theirs, so that equal units take from equal
   pools.
3. A bundle has a slot from its arrival to its last use. These intervals are coloured
   into the fewest slots: memory does not grow with the number of microbatches if what
   is in flight does not.
4. What goes to another pool on one device than on another is put in both by the one
   operation that makes it (`targets`).

The pool of `WireName("forward", 0)` on device 1 of two under `"eager_1f1b"`, with the
time counted in half phases (work, then wires):

    bundle                       arrives    last use    slot
    boundary of microbatch 0           1           4       0
    boundary of microbatch 1           3           8       1
    boundary of microbatch 2           5          10       0
"""

import dataclasses
import heapq
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from fpipe._executors.scan.machine import (
    Avals,
    Direction,
    HandedPool,
    LocalPool,
    Outbox,
    PoolName,
    SavedPool,
    WireName,
)
from fpipe._executors.scan.values import (
    ActivationValue,
    Bundle,
    Group,
    HandedValue,
    SavedValue,
    SentValue,
    Value,
    Work,
)
from fpipe._model.stages import Leaf, X, Y
from fpipe._program.code import Cotangent, Input, Output
from fpipe.schedules import Action, Kind

Edge = tuple[int, int]
K = TypeVar("K", bound=Hashable)


# --- two classic colourings ---


class _End(NamedTuple):
    """An end of an edge: a device as a source, or as a target."""

    is_target: bool
    device: int


def edge_colors(edges: Sequence[Edge]) -> list[int]:
    """Colours for edges `(source, target)`, so that no two of one colour share a source
    or a target.

    A source and a target of the same number are different ends. Parallel edges may be
    there. The number of colours is the largest number of edges at one end, which is the
    fewest (König's theorem, by alternating paths). Edges take the first colour that is
    free at both ends, so that the first edges of a ring keep colour 0.
    """
    edge_at: dict[_End, dict[int, int]] = defaultdict(dict)  # by colour
    colors = [-1] * len(edges)

    def first_free(used: Iterable[int]) -> int:
        taken = set(used)
        return next(c for c in range(len(taken) + 1) if c not in taken)

    def ends(edge: int) -> tuple[_End, _End]:
        return _End(False, edges[edge][0]), _End(True, edges[edge][1])

    for e in range(len(edges)):
        source, target = ends(e)
        color = first_free([*edge_at[source], *edge_at[target]])
        if color > max(len(edge_at[source]), len(edge_at[target])):
            # No colour is free at both ends, but `color` is at the source and `other`
            # at the target. Swap the two along the path that starts at the target with
            # `color`: it never comes to the source, for the graph has two sides.
            color = first_free(edge_at[source])
            other = first_free(edge_at[target])
            path: list[int] = []
            end, along = target, color
            while along in edge_at[end]:
                path.append(edge_at[end][along])
                first, second = ends(path[-1])
                end = second if end == first else first
                along = other if along == color else color
            for edge in path:
                for end in ends(edge):
                    del edge_at[end][colors[edge]]
            for edge in path:
                colors[edge] = other if colors[edge] == color else color
                for end in ends(edge):
                    edge_at[end][colors[edge]] = edge
        colors[e] = color
        edge_at[source][color] = edge_at[target][color] = e
    return colors


def slots(intervals: Iterable[tuple[int, int, K]]) -> tuple[dict[K, int], int]:
    """Slots for intervals `(start, end, key)`, both ends included, so that no two that
    meet share one.

    Returns:
        The slot of each key, and how many there are: the most intervals that meet at
        one time, which is the fewest.
    """
    slot_of: dict[K, int] = {}
    free: list[int] = []
    busy: list[tuple[int, int]] = []  # when each ends, and its slot
    count = 0
    for start, end, key in sorted(intervals, key=lambda interval: interval[:2]):
        while busy and busy[0][0] < start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            heapq.heappush(free, count)
            count += 1
        slot_of[key] = heapq.heappop(free)
        heapq.heappush(busy, (end, slot_of[key]))
    return slot_of, count


# --- the buffers of a call ---


class Place(NamedTuple):
    """Where the bundles of a value wait: in a pool of a device."""

    pool: PoolName
    device: int
    value: Value


# Where an operation puts a bundle: into a pool of its own device, or on a wire.
Destination: TypeAlias = PoolName | Outbox


@dataclasses.dataclass
class Buffers:
    """The buffers of a call.

    Attributes:
        wire_of: the wire of each value to each other device.
        pairs: the source and target devices of each wire.
        waits: the pool in which a value waits for each unit that reads it.
        slot_of: by place the slot of each microbatch's bundle; what nobody reads has no
            place.
        counts: how many slots each pool has.
        kinds: the kinds of bundles in each pool.
        targets: where the bundles of equal units go, see `class_of`.
    """

    work: Work
    wire_of: dict[tuple[Value, int], WireName]
    pairs: dict[WireName, set[tuple[int, int]]]
    waits: dict[tuple[Value, int], PoolName]
    slot_of: dict[Place, dict[int, int]]
    counts: dict[PoolName, int]
    kinds: dict[PoolName, dict[Avals, None]]
    targets: dict[Hashable, dict[Destination, None]]
    single: set[Hashable]

    def pool_of(self, value: Value, group: Group, reader: int) -> PoolName:
        """The pool in which a value waits for a unit."""
        role = self.work.units.roles[reader]
        if isinstance(value, SavedValue):
            return SavedPool(role, group.units[reader].recomputes)
        if isinstance(value, HandedValue):
            return HandedPool(role, group.units[reader].recomputes)
        return self.waits[value, reader]

    def class_of(self, bundle: Bundle[SentValue], group: Group) -> Hashable:
        """How equal units call a bundle that they make.

        An operation that serves several units puts its bundle wherever one of them
        does, and the table tells who looks. On a wire that must not be where another
        bundle of the same action goes: units of which one would do that are `single`.
        """
        value = bundle.value
        unit = group.units[value.unit]
        return (
            type(value),
            unit.identity,
            value.unit if unit.identity in self.single else None,
            unit.relative(Output(Leaf(value.port, 0))),
            tuple(map(unit.relative, bundle.arrays)),
            bundle.avals,
        )

    def arrivals(self, bundle: Bundle[SentValue], group: Group) -> list[Place]:
        """Where a bundle arrives on other devices, if anybody reads it there."""
        devices = self.work.units.device
        there = {devices[reader.unit] for reader in bundle.readers}
        places = []
        for device in sorted(there - {devices[bundle.value.unit]}):
            wire = self.wire_of[bundle.value, device]
            places.append(Place(wire, device, bundle.value))
        return [p for p in places if group.microbatches[0] in self.slot_of.get(p, ())]


def place_bundles(work: Work, position: Mapping[Action, int]) -> Buffers:
    """Find the buffers of a call.

    Arguments:
        position: the phase in which each action runs, counted through.
    """
    buffers = Buffers(
        work,
        wire_of={},
        pairs=defaultdict(set),
        waits={},
        slot_of=defaultdict(dict),
        counts={},
        kinds=defaultdict(dict),
        targets={},
        single=set(),
    )
    _color_wires(work, buffers, "forward")
    _color_wires(work, buffers, "backward")
    _choose_pools(work, buffers)
    _fill_slots(work, buffers, position)
    _unite_targets(work, buffers)
    return buffers


def _color_wires(work: Work, buffers: Buffers, direction: Direction) -> None:
    """Colour what goes between devices in one direction into the fewest wires."""
    units = work.units
    kinds = "F" if direction == "forward" else "BI"
    # What the actions of each stage send, by the two devices.
    sent: list[dict[Edge, dict[SentValue, None]]] = []
    for of_stage in units.of_stage:
        by_pair: dict[Edge, dict[SentValue, None]] = defaultdict(dict)
        for u in of_stage:
            source = units.device[u]
            for group in work.groups:
                for kind, bundles in group.sent[u].items():
                    for bundle in bundles if kind in kinds else ():
                        targets = {units.device[r.unit] for r in bundle.readers}
                        for target in sorted(targets - {source}):
                            by_pair[source, target][bundle.value] = None
        sent.append(by_pair)
    most: dict[Edge, int] = {}
    for by_pair in sent:
        for pair, values in by_pair.items():
            most[pair] = max(most.get(pair, 0), len(values))
    # The first ones between neighbours in the schedule's direction come first: a ring
    # is one wire.
    devices = 1 + max(units.device)
    step = 1 if direction == "forward" else -1
    edges = [pair for pair, count in most.items() for _ in range(count)]
    edges.sort(key=lambda edge: step * (edge[1] - edge[0]) % devices)
    wires: dict[Edge, list[WireName]] = defaultdict(list)
    for pair, color in zip(edges, edge_colors(edges), strict=True):
        wires[pair].append(WireName(direction, color))
        buffers.pairs[WireName(direction, color)].add(pair)
    for by_pair in sent:
        for pair, values in by_pair.items():
            # Boundaries take the first ones.
            order = sorted(values, key=lambda value: value.port != Y)
            for value, wire in zip(order, wires[pair], strict=False):
                buffers.wire_of[value, pair[1]] = wire


def _choose_pools(work: Work, buffers: Buffers) -> None:
    """Where each value waits for each unit that reads it."""
    units = work.units
    remote: dict[Hashable, PoolName] = {}
    local: list[tuple[Hashable, SentValue, int]] = []
    for u in range(len(units.stages)):
        for group in work.groups:
            for bundles in group.sent[u].values():
                for bundle in bundles:
                    for t, _ in bundle.readers:
                        name = _name_at_reader(work, group, bundle.value, t)
                        wire = buffers.wire_of.get((bundle.value, units.device[t]))
                        if wire is None:
                            local.append((name, bundle.value, t))
                        else:
                            buffers.waits[bundle.value, t] = wire
                            remote.setdefault(name, wire)
    # What stays on its device waits where the reader's like look for what comes from
    # others.
    for name, value, t in local:
        forward = isinstance(value, ActivationValue)
        alone = LocalPool("forward" if forward else "backward")
        buffers.waits[value, t] = remote.get(name, alone)


def _name_at_reader(work: Work, group: Group, value: SentValue, t: int) -> Hashable:
    """How units that are equal to the reader `t` call a value."""
    reader = group.units[t]
    if isinstance(value, ActivationValue):
        port = X if value.port == Y else value.port
        return reader.identity, reader.relative(Input(Leaf(port, 0)))
    leaf = Leaf(value.port, 0)
    makers = work.programs.readers(t, leaf, group.microbatches[0])
    numbers = [n for n, (maker, _) in enumerate(makers) if maker == value.unit]
    number = numbers[0] if numbers else -1
    return reader.identity, reader.relative(Cotangent(leaf)), number


def _fill_slots(work: Work, buffers: Buffers, position: Mapping[Action, int]) -> None:
    """Slots by the intervals from a bundle's arrival to its last use."""
    units = work.units
    intervals: dict[tuple[PoolName, int], list[tuple[int, int, tuple[Value, int]]]] = (
        defaultdict(list)
    )
    for s, of_stage in enumerate(units.of_stage):
        for group in work.groups:
            for u in of_stage:
                for kind, sent in group.sent[u].items():
                    kept = group.kept[u].get(kind)
                    for bundle in sent if kept is None else (*sent, kept):
                        reads = _reads_by_pool(work, buffers, group, bundle)
                        for (name, device), actions in reads.items():
                            buffers.kinds[name][bundle.avals] = None
                            # Work is at even times, and wires carry at odd ones.
                            delay = device != units.device[u]
                            for i in group.microbatches:
                                start = 2 * position[Action(kind, s, i)] + delay
                                last = max(
                                    position[Action(k, t, i)] for k, t in actions
                                )
                                intervals[name, device].append(
                                    (start, 2 * last, (bundle.value, i))
                                )
    buffers.counts.update({name: 0 for name, _ in intervals})
    for (name, device), own in intervals.items():
        slot_of, count = slots(own)
        buffers.counts[name] = max(buffers.counts[name], count)
        for (value, i), slot in slot_of.items():
            buffers.slot_of[Place(name, device, value)][i] = slot


def _reads_by_pool(
    work: Work, buffers: Buffers, group: Group, bundle: Bundle[Any]
) -> dict[tuple[PoolName, int], list[tuple[Kind, int]]]:
    """For each pool and device where a bundle waits, the kinds and stages of the
    actions that read it there.
    """
    reads: dict[tuple[PoolName, int], list[tuple[Kind, int]]] = defaultdict(list)
    for t, kinds in bundle.readers:
        if kinds:
            name = buffers.pool_of(bundle.value, group, t)
            own = reads[name, work.units.device[t]]
            own += [(kind, work.units.stage_of[t]) for kind in kinds]
    return reads


def _unite_targets(work: Work, buffers: Buffers) -> None:
    """Where the bundles of a class go, for all its units together."""
    units = work.units
    own: list[tuple[Bundle[SentValue], Group, dict[Destination, None]]] = []
    for u, device in enumerate(units.device):
        for group in work.groups:
            first = group.microbatches[0]
            for bundles in group.sent[u].values():
                for bundle in bundles:
                    found: dict[Destination, None] = {}
                    for t, _ in bundle.readers:
                        there = units.device[t]
                        pool = buffers.pool_of(bundle.value, group, t)
                        place = Place(pool, there, bundle.value)
                        # What nobody reads has no slot, and goes nowhere.
                        if first in buffers.slot_of.get(place, ()):
                            if isinstance(pool, WireName) and there != device:
                                found[Outbox(pool)] = None
                            else:
                                found[pool] = None
                    own.append((bundle, group, found))
    while True:
        targets: dict[Hashable, dict[Destination, None]] = defaultdict(dict)
        # The wires that each stage's action really uses, and by which value.
        used: dict[tuple[int, Group, Outbox], Value] = {}
        for bundle, group, found in own:
            targets[buffers.class_of(bundle, group)] |= found
            stage = units.stage_of[bundle.value.unit]
            for destination in found:
                if isinstance(destination, Outbox):
                    used[stage, group, destination] = bundle.value
        clash: set[Hashable] = set()
        for bundle, group, _ in own:
            stage = units.stage_of[bundle.value.unit]
            for destination in targets[buffers.class_of(bundle, group)]:
                if isinstance(destination, Outbox):
                    user = used.get((stage, group, destination), bundle.value)
                    if user != bundle.value:
                        clash.add(group.units[bundle.value.unit].identity)
        if clash <= buffers.single:
            buffers.targets = targets
            return
        buffers.single |= clash
