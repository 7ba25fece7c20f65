"""Steps cut into programs for devices: plain data.

Every step has a home. What depends on arrays of one device runs there. What depends on
small values of several devices (the sum of the squares of all gradients) runs on the
*hub*, the device of the first parameter. What depends on nothing of any device but on
numbers that all share (the count of steps, a learning rate) is small work, and runs
wherever it is needed. A program is a device's steps of one *round*; between rounds
values move.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fpipe.optim._steps import Step, Steps

# Bytes up to which a value may be moved freely.
SMALL = 1024


class Move(NamedTuple):
    """An array that crosses devices before a round.

    Attributes:
        slot: what moves: a number in `Cut.slots`.
        bytes: its size; of a bundle, of all that is in it.
    """

    round: int
    slot: int
    source: int | None
    target: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Slot:
    """An array between programs: a value, several small ones of a dtype end to end, or
    an output.

    Attributes:
        output: the number of the output that it is; outputs have arrays of their own,
            so that each may be donated.
    """

    values: tuple[int, ...]
    bundle: bool = False
    output: int | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """A program: a device's steps of a round.

    Attributes:
        takes, gives: slots.
    """

    round: int
    device: int
    steps: tuple[Step, ...]
    takes: tuple[int, ...]
    gives: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Cut:
    """A function over several devices as programs, in the order in which they are
    dispatched.

    Attributes:
        inputs: the slot of each input; those of inputs that nothing reads are there
            too.
        outputs: the slot of each output, which is an input's if it is handed through,
            and its device.
    """

    steps: Steps
    slots: tuple[Slot, ...]
    parts: tuple[Part, ...]
    moves: tuple[Move, ...]
    inputs: tuple[int, ...]
    outputs: tuple[tuple[int, int], ...]


def size(aval: Any) -> int:
    """The bytes of a value."""
    return int(np.prod(aval.shape, dtype=np.int64)) * getattr(aval.dtype, "itemsize", 8)


def homes(
    graph: Steps, given: Sequence[int | None], wanted: Sequence[int], hub: int
) -> tuple[dict[int, int], dict[int, int | None]]:
    """The device of each value, without those that are made wherever they are needed;
    and of each step by its number.
    """
    demand: dict[int, int] = {}
    for v, d in zip(graph.outputs, wanted, strict=True):
        demand[v] = demand.get(v, 0) | 1 << d
    for step in reversed(graph.steps):
        mask = 0
        for v in step.outs:
            mask |= demand.get(v, 0)
        for v in graph.needs(step):
            demand[v] = demand.get(v, 0) | mask
    home = {v: d for v, d in zip(graph.inputs, given, strict=True) if d is not None}
    places: dict[int, int | None] = {}
    for n, step in enumerate(graph.steps):
        mask = demand.get(step.outs[0], 0) if step.outs else 0
        place = _place(graph, step, home, mask, hub)
        places[n] = place
        if place is not None:
            home.update(dict.fromkeys(step.outs, place))
    return home, places


def _place(
    graph: Steps, step: Step, home: Mapping[int, int], demand: int, hub: int
) -> int | None:
    held = [
        (size(graph.avals[v]), home[v])
        for v in dict.fromkeys(graph.needs(step))
        if v in home
    ]
    if not held:
        return None
    biggest = max(b for b, _ in held)
    largest = {d for b, d in held if b == biggest}
    if biggest > SMALL:
        # The rest comes to where most bytes are.
        weight = {
            d: sum(b for b, e in held if e == d) for d in sorted({d for _, d in held})
        }
        return (
            largest.pop() if len(largest) == 1 else max(weight, key=lambda d: weight[d])
        )
    if demand and demand & (demand - 1) == 0:
        return demand.bit_length() - 1  # for one device alone
    if any(size(graph.avals[v]) > SMALL for v in step.outs):
        return None  # a number spread over an array: the number moves
    return largest.pop() if len({d for _, d in held}) == 1 else hub


def cut(
    graph: Steps,
    given: Sequence[int | None],
    lies: Sequence[int | None],
    wanted: Sequence[int],
    hub: int,
    through: Sequence[bool],
) -> Cut:
    """Cut a function.

    Arguments:
        given: the device that each input belongs to, `None` for numbers that all share.
        lies: where it really is, `None` if on no device of these.
        wanted: the device of each output.
        hub: where small values of several devices meet.
        through: for each output, whether it may be the very array that is an input.
    """
    home, places = homes(graph, given, wanted, hub)
    rounds = _rounds(graph, home, places)
    return _Cutter(graph, home, places, rounds, given, lies, wanted, through).cut()


def _rounds(
    graph: Steps, home: Mapping[int, int], places: Mapping[int, int | None]
) -> dict[int, int]:
    """The round of each step that has a home: as late as it may be, so that what others
    wait for goes first.
    """
    # For a value without a home, the rounds are those of the values with one that it is
    # made from.
    roots: dict[int, frozenset[int]] = {
        v: frozenset([v]) for v in graph.inputs if v in home
    }

    def takes(step: Step) -> frozenset[int]:
        return frozenset().union(
            *(roots.get(v, frozenset()) for v in graph.needs(step))
        )

    taken: dict[int, frozenset[int]] = {}
    early: dict[int, int] = {}
    for n, step in enumerate(graph.steps):
        taken[n] = takes(step)
        if places[n] is None:
            roots.update(dict.fromkeys(step.outs, taken[n]))
            continue
        roots.update({v: frozenset([v]) for v in step.outs})
        first = max(
            (early.get(v, 0) + (v in early and home[v] != places[n]) for v in taken[n]),
            default=0,
        )
        early.update(dict.fromkeys(step.outs, first))
    last = max(early.values(), default=0)
    late: dict[int, int] = {}
    rounds: dict[int, int] = {}
    for n in reversed(range(len(graph.steps))):
        if places[n] is None:
            continue
        rounds[n] = min((late.get(v, last) for v in graph.steps[n].outs), default=last)
        for v in taken[n]:
            late[v] = min(late.get(v, last), rounds[n] - (home[v] != places[n]))
    return rounds


class _Cutter:
    """Builds a `Cut`: which steps each program has, what it takes and gives, and what
    moves.
    """

    def __init__(
        self,
        graph: Steps,
        home: Mapping[int, int],
        places: Mapping[int, int | None],
        rounds: Mapping[int, int],
        given: Sequence[int | None],
        lies: Sequence[int | None],
        wanted: Sequence[int],
        through: Sequence[bool],
    ) -> None:
        self.graph, self.home, self.places, self.rounds = graph, home, places, rounds
        self.wanted = wanted
        self.maker = {v: n for n, s in enumerate(graph.steps) for v in s.outs}
        self.last = max(rounds.values(), default=0)
        self.source = dict(zip(graph.inputs, lies, strict=True))
        shared = {v for v, d in zip(graph.inputs, given, strict=True) if d is None}
        self.handed = {  # outputs that are an input as it is
            k
            for k, v in enumerate(graph.outputs)
            if v in self.source
            and through[k]
            and (v in shared or self.source[v] == wanted[k])
        }
        self.slots: list[Slot] = [Slot((v,)) for v in graph.inputs]
        self.where = {v: n for n, v in enumerate(graph.inputs)}

    def when(self, v: int) -> int:
        """The round that makes a value which has a home."""
        return self.rounds[self.maker[v]]

    def cut(self) -> Cut:
        """The programs and moves."""
        graph = self.graph
        own: dict[tuple[int, int], list[int]] = {}
        for n, r in self.rounds.items():
            place = self.places[n]
            assert place is not None
            own.setdefault((r, place), []).append(n)
        finals: dict[
            tuple[int, int], list[int]
        ] = {}  # outputs by the program that gives them
        for k, v in enumerate(graph.outputs):
            if k in self.handed:
                continue
            # What is made elsewhere, and what many make, is given by the last program
            # of its device.
            here = v in self.maker and self.home.get(v) == self.wanted[k]
            finals.setdefault(
                (
                    self.when(v) if here else self.after(v, self.wanted[k]),
                    self.wanted[k],
                ),
                [],
            ).append(k)
        keys = sorted({*own, *finals})
        bodies = {
            key: self.body(
                own.get(key, []), [graph.outputs[k] for k in finals.get(key, [])]
            )
            for key in keys
        }
        sent = self.exports(bodies)
        parts, moves = [], dict[tuple[int, int], Move]()
        for key in keys:
            r, d = key
            steps, takes = bodies[key]
            gives = [*sent.get(key, ())]
            for k in finals.get(key, ()):
                gives.append(len(self.slots))
                self.slots.append(Slot((graph.outputs[k],), output=k))
            slots = list(dict.fromkeys(self.where[v] for v in takes))
            for slot in slots:
                values = self.slots[slot].values
                source = self.source.get(values[0], self.home.get(values[0]))
                if source != d and (slot, d) not in moves:
                    nbytes = sum(size(graph.avals[v]) for v in values)
                    moves[slot, d] = Move(r, slot, source, d, nbytes)
            parts.append(Part(r, d, steps, tuple(slots), tuple(gives)))
        outputs = {
            slot.output: n
            for n, slot in enumerate(self.slots)
            if slot.output is not None
        }
        outputs |= {k: self.where[graph.outputs[k]] for k in self.handed}
        for k in self.handed:
            slot, v, d = outputs[k], graph.outputs[k], self.wanted[k]
            if self.source[v] != d and (slot, d) not in moves:
                moves[slot, d] = Move(0, slot, self.source[v], d, size(graph.avals[v]))
        return Cut(
            graph,
            tuple(self.slots),
            tuple(parts),
            tuple(sorted(moves.values(), key=lambda m: m.round)),
            tuple(range(len(graph.inputs))),
            tuple((outputs[k], d) for k, d in enumerate(self.wanted)),
        )

    def after(self, v: int, device: int) -> int:
        """The first round in which a device can have a value."""
        if v in self.graph.consts or v in self.source:
            return self.last
        if v in self.home:
            return self.when(v) + (self.home[v] != device)
        step = self.graph.steps[self.maker[v]]
        return max(self.last, *(self.after(u, device) for u in self.graph.needs(step)))

    def body(
        self, own: Sequence[int], outputs: Sequence[int]
    ) -> tuple[tuple[Step, ...], list[int]]:
        """A program's steps, those that are made wherever needed included; and the
        values that it takes.
        """
        numbers, takes = set(own), dict[int, None]()
        stack = [v for n in own for v in self.graph.needs(self.graph.steps[n])] + list(
            outputs
        )
        while stack:
            v = stack.pop()
            n = self.maker.get(v)
            if v in self.graph.consts or n in numbers:
                continue
            if n is None or v in self.home:
                takes[v] = None
            else:
                numbers.add(n)
                stack += self.graph.needs(self.graph.steps[n])
        return tuple(self.graph.steps[n] for n in sorted(numbers)), sorted(takes)

    def exports(
        self, bodies: Mapping[tuple[int, int], tuple[Any, list[int]]]
    ) -> dict[tuple[int, int], list[int]]:
        """The slots that each program gives for others, small values that leave the
        device bundled.
        """
        leaving: dict[int, bool] = {}
        for (_, d), (_, takes) in bodies.items():
            for v in takes:
                if v in self.maker:
                    leaving[v] = leaving.get(v, False) or self.home[v] != d
        sent: dict[tuple[int, int], list[int]] = {}
        bundles: dict[tuple[int, int, str], list[int]] = {}
        for v in sorted(leaving):
            key = (self.when(v), self.home[v])
            if (
                leaving[v]
                and size(self.graph.avals[v]) <= SMALL
                and isinstance(self.graph.avals[v].dtype, np.dtype)
            ):
                bundles.setdefault((*key, str(self.graph.avals[v].dtype)), []).append(v)
            else:
                sent.setdefault(key, []).append(self.slot((v,), False))
        for (r, d, _), values in bundles.items():
            sent.setdefault((r, d), []).append(self.slot(tuple(values), True))
        return sent

    def slot(self, values: tuple[int, ...], bundle: bool) -> int:
        self.slots.append(Slot(values, bundle))
        self.where.update(dict.fromkeys(values, len(self.slots) - 1))
        return len(self.slots) - 1
