"""Where the bundles of a call wait: wires between devices, pools, and slots in them.

In: the work of a call, and when each action runs. Out: `Buffers`, in four passes:

1. `_color_wires`: what each action sends from device to device is an edge of a graph;
   the edges are coloured into the fewest wires.
2. `_choose_pools`: what comes by a wire waits in the wire's pool. What stays on its
   device waits where units that are equal to the reader look for theirs.
3. `_fill_slots`: a bundle has a slot from its arrival to its last use. These intervals
   are coloured into the fewest slots, so that memory does not grow with the number of
   microbatches if what is in flight does not. A bundle that is on the host meanwhile
   has a slot until it goes there, one on the host, and one from when it is back.
4. `_unite_destinations`: an operation that serves several units puts its bundle
   wherever one of them does.

For the second of two equal layers on two devices under `"eager_1f1b"`, the slots of
`WireName("forward", 0)` come from these intervals (time counts two for each phase: one
for the work, one for the wires):

    boundary of      sent in             read last in           interval     slot
    microbatch 0     tick 0, forward     tick 1, backward         1 to 6        0
    microbatch 1     tick 1, forward     tick 2, backward        5 to 10        1
    microbatch 2     tick 2, forward     tick 3, backward        9 to 14        0

If the schedule copies microbatch 0 of that layer to the host, the bundle leaves after
the phase that reads it forward, and is back before the one that reads it backward:

    microbatch 0     in its slot 1 to 4, on the host 5 to 4
"""

import dataclasses
import heapq
import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar, get_args

from fpipe._core.pytrees import on_host
from fpipe._executors.scan.machine import (
    Avals,
    Direction,
    HandedPool,
    LocalPool,
    Outbox,
    PoolName,
    RecomputedPool,
    SavedPool,
    WireName,
)
from fpipe._executors.scan.values import (
    ActivationValue,
    Group,
    HandedValue,
    RecomputedValue,
    SavedValue,
    SentValue,
    Value,
    Work,
)
from fpipe._model.stages import Leaf, X, Y
from fpipe._program.code import Cotangent, Input, Output
from fpipe.schedules import Action, Kind, Schedule

# The kinds of actions that read what was on the host.
BACK: tuple[Kind, ...] = ("R", "B", "I")
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
    # Greedy colouring alone may need nearly twice as many colours. A wire costs a
    # `ppermute` in each tick and a pool on each device, so the fewest are worth it.
    #
    # `edge_at[end][color]` is the edge of that colour there.
    edge_at: dict[_End, dict[int, int]] = defaultdict(dict)
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
            # `color`. It never reaches the source, because the graph is bipartite.
            color = first_free(edge_at[source])
            other = first_free(edge_at[target])
            path: list[int] = []
            end, along = target, color
            while along in edge_at[end]:
                path.append(edge_at[end][along])
                first, second = ends(path[-1])
                end = second if end == first else first
                along = other if along == color else color
            # Take all of the path out before any of it goes back: neighbours on it swap
            # colours, and would overwrite each other's entries.
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
    busy: list[tuple[int, int]] = []  # when each interval ends, and its slot
    count = 0
    # In the order of their starts each takes the lowest slot that is free. There is a
    # new one only where all are busy, so at that time so many intervals meet. (Of
    # graphs in general this would not be the fewest; of intervals it is.)
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
    """Where the bundles of a value wait: in a pool of a device. Each microbatch's
    bundle has a slot of its own there, while it waits.

    Attributes:
        returned: whether it has been on the host, and is back in another slot.
    """

    pool: PoolName
    device: int
    value: Value
    returned: bool = False


class Absence(NamedTuple):
    """When what a microbatch holds on a stage is on the host: from the end of the phase
    `gone` to the end of the phase `back`.
    """

    gone: int
    back: int


class Trip(NamedTuple):
    """A bundle that goes to the host and comes back.

    Attributes:
        stage: the one whose schedule says so.
        slot, on_host, slot_again: of the pool, on the host, and of the pool again.
    """

    stage: int
    pool: PoolName
    device: int
    absence: Absence
    slot: int
    on_host: int
    slot_again: int


# Where an operation puts a bundle: into a pool of its own device, or on a wire.
Destination: TypeAlias = PoolName | Outbox


@dataclasses.dataclass(frozen=True)
class Buffers:
    """The buffers of a call.

    Attributes:
        pairs: the source and target devices of each wire.
        pool_of: the pool in which a group's bundle waits for a unit that reads it.
        slot_of: by place the slot of each microbatch's bundle. What nobody reads has
            none.
        counts: how many slots each pool has.
        kinds: the kinds of bundles in each pool, in the order in which they were
            found. It is a mapping to `None`, because a set has no order, and all
            processes must lay out their slots alike.
        destinations: where the operation that makes a group's bundle puts it, which may
            be in more places than it is read (see `_unite_destinations`).
        arrivals: where it really waits on other devices.
        trips: all bundles that are on the host meanwhile.
        host_counts: how many slots each pool has on the host.
    """

    pairs: Mapping[WireName, set[Edge]]
    pool_of: Mapping[tuple[Group, Value, int], PoolName]
    slot_of: Mapping[Place, Mapping[int, int]]
    counts: Mapping[PoolName, int]
    kinds: Mapping[PoolName, Mapping[Avals, None]]
    destinations: Mapping[tuple[Group, Value], tuple[Destination, ...]]
    arrivals: Mapping[tuple[Group, Value], tuple[Place, ...]]
    trips: tuple[Trip, ...]
    host_counts: Mapping[PoolName, int]


def absences(
    schedule: Schedule, position: Mapping[Action, int]
) -> dict[tuple[int, int], Absence]:
    """When what a microbatch holds on a stage is on the host, by stage and microbatch.

    A copy runs after the operations of a phase. A copy to the host follows the forward.
    A copy back is as late as it can be: right before the phase that reads it. So a
    device makes at most one copy in each direction after a phase, and holds no more
    than the schedule says.
    """
    found: dict[tuple[int, int], Absence] = {}
    for kind, s, i in itertools.chain(*schedule.actions):
        backwards = [Action(k, s, i) for k in BACK if Action(k, s, i) in position]
        if kind != "O" or not backwards:
            continue
        absence = Absence(
            position[Action("F", s, i)], min(map(position.__getitem__, backwards)) - 1
        )
        # Between phases that follow each other a device runs nothing else, so nothing
        # could use the room.
        if absence.gone < absence.back:
            found[s, i] = absence
    return found


def place_bundles(
    work: Work,
    position: Mapping[Action, int],
    away: Mapping[tuple[int, int], Absence],
) -> Buffers:
    """Find the buffers of a call.

    Arguments:
        position: the phase in which each action runs, counted through.
        away: what `absences` finds.
    """
    # Activations and cotangents are coloured apart. In ticks of two phases each
    # direction has its own phase, and one wire for both would have to run in both.
    wire_of: dict[tuple[Value, int], WireName] = {}
    pairs: dict[WireName, set[Edge]] = defaultdict(set)
    for direction in get_args(Direction):
        _color_wires(work, direction, wire_of, pairs)
    pool_of = _choose_pools(work, wire_of)
    # Each device's slots are found by themselves.
    slot_of: dict[Place, dict[int, int]] = defaultdict(dict)
    counts: dict[PoolName, int] = {}
    kinds: dict[PoolName, dict[Avals, None]] = defaultdict(dict)
    intervals, absent = _find_intervals(work, position, pool_of, kinds, away)
    for (pool, device), own in intervals.items():
        found, count = slots(own)
        # Every device runs the same program, so all have as many slots as the one that
        # needs most.
        counts[pool] = max(counts.get(pool, 0), count)
        for stay, slot in found.items():
            place = Place(pool, device, stay.value, stay.returned)
            slot_of[place][stay.microbatch] = slot
    trips, host_counts = _find_trips(absent, slot_of)
    destinations, arrivals = _unite_destinations(work, pool_of, slot_of)
    return Buffers(
        pairs,
        pool_of,
        slot_of,
        counts,
        kinds,
        destinations,
        arrivals,
        trips,
        host_counts,
    )


def _color_wires(
    work: Work,
    direction: Direction,
    wire_of: dict[tuple[Value, int], WireName],
    pairs: dict[WireName, set[Edge]],
) -> None:
    """Colour what goes between devices in one direction into the fewest wires.

    Arguments:
        wire_of: gets the wire of each value to each other device.
        pairs: gets the source and target devices of each wire.
    """
    units = work.units
    kinds = "F" if direction == "forward" else "BI"
    # What the actions of each stage send, by the two devices. All of it goes in one
    # phase, so each needs a wire of its own; what different stages send may share one.
    sent: dict[int, dict[Edge, dict[SentValue, None]]] = {}
    for _, bundle in work.sent():
        if bundle.kind in kinds:
            source = units.device[bundle.value.unit]
            of_stage = sent.setdefault(units.stage_of[bundle.value.unit], {})
            for target in sorted({units.device[r.unit] for r in bundle.readers}):
                if target != source:
                    of_stage.setdefault((source, target), {})[bundle.value] = None
    # A pair of devices gets as many parallel edges as its stage that sends most needs.
    # That of a stage with a skip has two, one for the skip and one for the boundary.
    most: dict[Edge, int] = {}
    for of_stage in sent.values():
        for pair, values in of_stage.items():
            most[pair] = max(most.get(pair, 0), len(values))
    edges = [pair for pair, count in most.items() for _ in range(count)]
    # Edges between neighbours in the schedule's direction come first: a ring is then
    # one wire, and boundaries, which run in every tick, all take it.
    devices = 1 + max(units.device)
    step = 1 if direction == "forward" else -1
    edges.sort(key=lambda edge: step * (edge[1] - edge[0]) % devices)
    wires: dict[Edge, list[WireName]] = defaultdict(list)
    for pair, color in zip(edges, edge_colors(edges), strict=True):
        wires[pair].append(WireName(direction, color))
        pairs[WireName(direction, color)].add(pair)
    # Boundaries take the first wire of their pair, which is the ring's. A value has the
    # same wire in every group of microbatches, or groups would share no operation.
    for of_stage in sent.values():
        for pair, values in of_stage.items():
            order = sorted(values, key=lambda value: value.port != Y)
            for value, wire in zip(order, wires[pair], strict=False):
                wire_of[value, pair[1]] = wire


def _choose_pools(
    work: Work, wire_of: Mapping[tuple[Value, int], WireName]
) -> dict[tuple[Group, Value, int], PoolName]:
    """The pool in which each group's bundle waits for each unit that reads it.

    Equal units are to run one operation, which takes from one pool. So what stays on
    its device (the input of the first core, made by the end before it) waits where
    units that are equal to the reader look for what comes by a wire.

    In the machine that `machine.py` draws both cores read from one pool, although
    nothing comes to the first of them by a wire:

        reader            its `x` is made by    comes            waits in
        unit 1, a core    unit 0                on its device    WireName("forward", 0)
        unit 2, a core    unit 1                by the wire      WireName("forward", 0)
        unit 3, the loss  unit 2                on its device    LocalPool("forward")

    No unit that is equal to the loss reads from a wire, so what the loss reads has a
    pool of its own.
    """
    pool_of: dict[tuple[Group, Value, int], PoolName] = {}
    pool_of_like: dict[Hashable, PoolName] = {}
    for group, bundle in work.sent():
        for t, _ in bundle.readers:
            wire = wire_of.get((bundle.value, work.units.device[t]))
            if wire is not None:
                pool_of[group, bundle.value, t] = wire
                name = _name_at_reader(work, group, bundle.value, t)
                pool_of_like.setdefault(name, wire)
    # Only now is it known where the others look.
    for group, bundle in work.sent():
        forward = isinstance(bundle.value, ActivationValue)
        alone = LocalPool("forward" if forward else "backward")
        for t, _ in bundle.readers:
            if (group, bundle.value, t) not in pool_of:
                name = _name_at_reader(work, group, bundle.value, t)
                pool_of[group, bundle.value, t] = pool_of_like.get(name, alone)
    for group in work.groups:
        for u, unit in enumerate(group.units):
            role = work.units.roles[u]
            # Ends and cores keep different things, and so do backwards that recompute:
            # bundles of one form share a pool without padding.
            saved = SavedPool(role, unit.recomputes)
            pool_of[group, SavedValue(u), u] = saved
            pool_of[group, RecomputedValue(u), u] = RecomputedPool(role)
            pool_of[group, HandedValue(u), u] = HandedPool(role, unit.recomputes)
    return pool_of


def _name_at_reader(work: Work, group: Group, value: SentValue, t: int) -> Hashable:
    """How units that are equal to the reader `t` call a value.

    A cotangent's name needs a number too: what a unit sent to two readers comes back as
    two cotangents, and each waits in a pool of its own choice.
    """
    reader = group.units[t]
    if isinstance(value, ActivationValue):
        port = X if value.port == Y else value.port
        return reader.identity, reader.relative(Input(Leaf(port, 0)))
    leaf = Leaf(value.port, 0)
    makers = work.programs.readers(t, leaf, group.microbatches[0])
    numbers = [n for n, (maker, _) in enumerate(makers) if maker == value.unit]
    number = numbers[0] if numbers else -1
    return reader.identity, reader.relative(Cotangent(leaf)), number


class _Stay(NamedTuple):
    """A microbatch's bundle in a pool."""

    value: Value
    microbatch: int
    returned: bool


class _Absent(NamedTuple):
    """A microbatch's bundle on the host, and the stage whose schedule says so."""

    value: Value
    microbatch: int
    stage: int
    absence: Absence


# By pool and device from when to when something is there.
_Stays: TypeAlias = dict[tuple[PoolName, int], list[tuple[int, int, _Stay]]]
_Absents: TypeAlias = dict[tuple[PoolName, int], list[tuple[int, int, _Absent]]]


def _find_intervals(
    work: Work,
    position: Mapping[Action, int],
    pool_of: Mapping[tuple[Group, Value, int], PoolName],
    kinds: dict[PoolName, dict[Avals, None]],
    away: Mapping[tuple[int, int], Absence],
) -> tuple[_Stays, _Absents]:
    """For each pool and device from when to when each microbatch's bundle is there, and
    from when to when it is on the host.

    Time counts two for each phase: `2p` is the work of phase `p`, `2p + 1` are its
    wires. So a slot that is read for the last time in the work of a phase can be filled
    again by a wire at the end of that phase, but not by another operation in it, which
    might run before the one that reads. A copy to the host reads in the work of its
    phase, and one back arrives like what comes by a wire.

    Arguments:
        kinds: gets the kinds of bundles in each pool.
    """
    units = work.units
    intervals: _Stays = defaultdict(list)
    absent: _Absents = defaultdict(list)
    for group, bundle in work.made():
        value = bundle.value
        stage = units.stage_of[value.unit]
        # Several units of a device may read it from one pool. Then it waits there once,
        # until the last of them has read it.
        reads_at: dict[tuple[PoolName, int], list[tuple[Kind, int]]] = defaultdict(list)
        for t, reads in bundle.readers:
            place = pool_of[group, value, t], units.device[t]
            for kind in reads:
                reads_at[place].append((kind, units.stage_of[t]))
        for (pool, device), actions in reads_at.items():
            kinds[pool][bundle.avals] = None
            arrives_later = device != units.device[value.unit]
            for i in group.microbatches:
                start = 2 * position[Action(bundle.kind, stage, i)] + arrives_later
                uses = [Action(kind, s, i) for kind, s in actions]
                end = 2 * max(position[use] for use in uses)
                own = intervals[pool, device]
                found = _absence(start, uses, position, away)
                # What a policy moves to the host is there already, in the same slot.
                if found is None or any(map(on_host, bundle.avals)):
                    own.append((start, end, _Stay(value, i, False)))
                    continue
                s, (gone, back) = found
                own.append((start, 2 * gone, _Stay(value, i, False)))
                own.append((2 * back + 1, end, _Stay(value, i, True)))
                whose = _Absent(value, i, s, Absence(gone, back))
                absent[pool, device].append((2 * gone + 1, 2 * back, whose))
    return intervals, absent


def _absence(
    start: int,
    uses: Sequence[Action],
    position: Mapping[Action, int],
    away: Mapping[tuple[int, int], Absence],
) -> tuple[int, Absence] | None:
    """The stage that has a bundle on the host for a while, and when; `None`: none has.

    Forwards must read it before, and everything else after. Another stage of the same
    device may read the same skip in between: then it stays.

    Arguments:
        start: when it is made, or arrives.
    """
    for use in uses:
        absence = away.get((use.stage, use.microbatch))
        if absence is None or use.kind == "F" or start > 2 * absence.gone:
            continue
        if all(
            position[other] <= absence.gone
            if other.kind == "F"
            else position[other] > absence.back
            for other in uses
        ):
            return use.stage, absence
    return None


def _find_trips(
    absent: _Absents, slot_of: Mapping[Place, Mapping[int, int]]
) -> tuple[tuple[Trip, ...], dict[PoolName, int]]:
    """What goes to the host, with slots there, and how many slots each pool has."""
    trips: list[Trip] = []
    counts: dict[PoolName, int] = {}
    for (pool, device), own in absent.items():
        found, count = slots(own)
        counts[pool] = max(counts.get(pool, 0), count)
        for (value, i, stage, absence), slot in found.items():
            place = Place(pool, device, value)
            again = place._replace(returned=True)
            trips.append(
                Trip(
                    stage,
                    pool,
                    device,
                    absence,
                    slot_of[place][i],
                    slot,
                    slot_of[again][i],
                )
            )
    return tuple(trips), counts


def _unite_destinations(
    work: Work,
    pool_of: Mapping[tuple[Group, Value, int], PoolName],
    slot_of: Mapping[Place, Mapping[int, int]],
) -> tuple[
    dict[tuple[Group, Value], tuple[Destination, ...]],
    dict[tuple[Group, Value], tuple[Place, ...]],
]:
    """Where each group's bundle goes, and where it waits on other devices.

    An operation that serves several units puts its bundle wherever one of them needs
    it, and the table tells who looks: the last core's `y` goes on the wire of the other
    cores' too, where nobody takes it. On a wire that must not be where another bundle
    of the same action goes. Equal units that would do that are taken apart, and each is
    an operation of its own:

                  boundary            skip
        unit 1    goes by wire 0      goes by wire 1
        unit 2    goes by wire 1      stays on its device
        as one    wires 0 and 1       wire 1, and the device's pool

    As one operation unit 1 would send its boundary by wire 1 too, over its skip.
    """
    units = work.units
    own: dict[tuple[Group, Value], dict[Destination, None]] = {}
    arrivals: dict[tuple[Group, Value], tuple[Place, ...]] = {}
    for group, bundle in work.sent():
        value = bundle.value
        destinations: dict[Destination, None] = {}
        places: dict[Place, None] = {}
        for t, _ in bundle.readers:
            pool = pool_of[group, value, t]
            place = Place(pool, units.device[t], value)
            if group.microbatches[0] not in slot_of.get(place, ()):
                continue  # nobody reads it there
            if isinstance(pool, WireName) and place.device != units.device[value.unit]:
                destinations[Outbox(pool)] = None
                places[place] = None
            else:
                destinations[pool] = None
        own[group, value] = destinations
        by_device = sorted(places, key=lambda place: place.device)
        arrivals[group, value] = tuple(by_device)
    # Whether units clash is seen only when the destinations of all are united. Then
    # those that clash are taken apart, and what is left is united anew.
    apart: set[Hashable] = set()
    while True:
        # Bundles with the same name here are made by the same operation.
        class_of: dict[tuple[Group, Value], Hashable] = {}
        united: dict[Hashable, dict[Destination, None]] = defaultdict(dict)
        sender: dict[tuple[int, Group, Outbox], Value] = {}
        for group, bundle in work.sent():
            value = bundle.value
            unit = group.units[value.unit]
            class_of[group, value] = (
                type(value),
                unit.identity,
                value.unit if unit.identity in apart else None,
                unit.relative(Output(Leaf(value.port, 0))),
                tuple(map(unit.relative, bundle.arrays)),
                bundle.avals,
            )
            united[class_of[group, value]] |= own[group, value]
            for destination in own[group, value]:
                if isinstance(destination, Outbox):
                    stage = units.stage_of[value.unit]
                    sender[stage, group, destination] = value
        clashing: set[Hashable] = set()
        for (group, value), name in class_of.items():
            stage = units.stage_of[value.unit]
            for destination in united[name]:
                if not isinstance(destination, Outbox):
                    continue
                if sender.get((stage, group, destination), value) != value:
                    clashing.add(group.units[value.unit].identity)
        if clashing <= apart:
            return {key: tuple(united[class_of[key]]) for key in own}, arrivals
        apart |= clashing
