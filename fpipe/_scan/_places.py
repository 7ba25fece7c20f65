"""Where the values of a call wait: wires between devices, pools, and the slots in them."""

import collections
from collections.abc import Hashable, Sequence
from typing import Any

from fpipe._program import Ref
from fpipe._scan._coloring import edge_colors, slots
from fpipe._scan._machine import Avals, PoolName
from fpipe._scan._values import Value, Values
from fpipe._stage import Leaf, X, Y
from fpipe.schedules import Action


class Places:
    """The places of a call's values.

    Attributes:
        route: the wire of each value to each other device.
        pairs: the source and target devices of each wire.
        waits: the pool in which a value waits for each unit that reads it.
        slot: of each value in a pool of a device, by microbatch; what nobody reads has none.
        count: of slots.
        shapes: the kinds of bundles in each pool.
    """

    def __init__(self, values: Values) -> None:
        self.values = values
        self.route: dict[tuple[Value, int], PoolName] = {}
        self.pairs: dict[PoolName, set[tuple[int, int]]] = collections.defaultdict(set)
        self.waits: dict[tuple[Value, int], PoolName] = {}
        self.shapes: dict[PoolName, dict[Avals, None]] = collections.defaultdict(dict)
        self.slot: dict[tuple[PoolName, int, Value, int], int] = {}
        self.count: dict[PoolName, int] = {}
        self._wire()
        self._place()
        self._fill()

    # --- wires ---

    def _messages(self, s: int, i: int, kind: str) -> dict[int, list[Value]]:
        """What an action sends to each other device, in order."""
        out: dict[int, list[Value]] = {}
        for u in self.values.units.of_stage[s]:
            for value in self.values.made(u, i, kind):
                for d in sorted(
                    {self.values.units.device[t] for t in self.values.readers(value, i)} - {self.values.units.device[u]}
                ):
                    out.setdefault(d, []).append(value)
        return {d: sorted(values, key=lambda v: v[2] != Y) for d, values in out.items()}

    def _wire(self) -> None:
        """Colour what goes between devices into the fewest wires."""
        for direction, kinds in (("forward", "F"), ("backward", "BI")):
            sent = [
                (self.values.units.device[self.values.units.of_stage[s][0]], d, values)
                for s in range(len(self.values.units.of_stage))
                for i, *_ in self.values.groups
                for kind in kinds
                if kind in self.values.kinds[s, i]
                for d, values in self._messages(s, i, kind).items()
            ]
            most: dict[tuple[int, int], int] = {}
            for a, b, values in sent:
                most[a, b] = max(most.get((a, b), 0), len(values))
            edges = [
                (n, (b - a if direction == "forward" else a - b) % self.values.devices, a, b)
                for (a, b), count in most.items()
                for n in range(count)
            ]
            edges.sort()
            colors = edge_colors([(a, b) for *_, a, b in edges])
            of: dict[tuple[int, int], list[int]] = {}
            for (*_, a, b), color in zip(edges, colors, strict=True):
                of.setdefault((a, b), []).append(color)
                self.pairs[PoolName(direction, color)].add((a, b))  # type: ignore[arg-type]
            for a, b, values in sent:
                for value, color in zip(values, of[a, b], strict=False):
                    self.route[value, b] = PoolName(direction, color)  # type: ignore[arg-type]

    # --- pools ---

    def _place(self) -> None:
        """Where each value waits for each unit that reads it, and the slots of each pool."""
        groups = [(u, i) for u in range(len(self.values.units.stages)) for i, *_ in self.values.groups]
        remote: dict[Hashable, PoolName] = {}
        local: list[tuple[Hashable, Value, int]] = []
        for u, i in groups:
            for kind in self.values.of(u, i):
                for value in self.values.made(u, i, kind):
                    for t in self.values.readers(value, i):
                        role = self._role(value, t, i)
                        if (value, self.values.units.device[t]) in self.route:
                            self.waits[value, t] = self.route[value, self.values.units.device[t]]
                            remote.setdefault(role, self.waits[value, t])
                        else:
                            local.append((role, value, t))
            for n, direction in enumerate(("saved", "shared")):
                if self.values.saved(u, i)[n]:
                    of = (self.values.units.roles[u], self.values.programs.recomputes(u, i))
                    self.waits[(direction, u), u, i] = PoolName(direction, of)  # type: ignore[index, arg-type]
        for role, value, t in local:
            kind = "forward" if value[0] == "f" else "backward"
            self.waits[value, t] = remote.get(role, PoolName(kind, -1))

    def pool_of(self, value: Value, t: int, i: int) -> PoolName:
        """The pool in which a value waits for a unit."""
        if value[0] in ("saved", "shared"):
            return PoolName(value[0], (self.values.units.roles[t], self.values.programs.recomputes(t, i)))
        return self.waits[value, t]

    def _role(self, value: Value, t: int, i: int) -> Hashable:
        """How the class of the reader calls a value."""
        direction, u, port, *_ = value
        if direction == "f":
            leaf = Leaf(X if port == Y else port, 0)
            return self.values.identity(t, i), self.values.relative(t, Ref("in", leaf))
        index = [r for r, _ in self.values.programs.readers(t, Leaf(port, 0), i)]
        return (
            self.values.identity(t, i),
            self.values.relative(t, Ref("cotangent", Leaf(port, 0))),
            index.index(u) if u in index else -1,
        )

    def _fill(self) -> None:
        """Slots by the intervals from a value's arrival to its last use."""
        intervals: dict[tuple[PoolName, int], list[tuple[int, int, Any]]] = collections.defaultdict(list)
        for s in range(len(self.values.units.of_stage)):
            for microbatches in self.values.groups:
                self._intervals(s, microbatches, intervals)
        self.count = {name: 0 for name, _ in intervals}
        for (name, d), own in intervals.items():
            where, count = slots(own)
            self.count[name] = max(self.count[name], count)
            self.slot.update({(name, d, *key): n for key, n in where.items()})

    def _intervals(self, s: int, microbatches: Sequence[int], intervals: Any) -> None:
        first = microbatches[0]
        for u in self.values.units.of_stage[s]:
            d = self.values.units.device[u]
            for kind in self.values.of(u, first):
                values = self.values.made(u, first, kind)
                kept = {"F": "saved", "I": "shared"}.get(kind)
                if kept and self.values.saved(u, first)[kept == "shared"]:
                    values = [*values, (kept, u, None)]
                for value in values:
                    avals = self.values.bundle(value, first)[1]
                    last: dict[tuple[PoolName, int], list[tuple[str, int]]] = {}
                    for t in self.values.readers(value, first):
                        name = self.pool_of(value, t, first)
                        uses = [(k, t) for k in "FBIW" if self.values.reads(t, first, k, value)]
                        last.setdefault((name, self.values.units.device[t]), []).extend(uses)
                    for (name, e), uses in last.items():
                        if not uses:
                            continue
                        self.shapes[name][avals] = None
                        for i in microbatches:
                            start = 2 * self.values.position[Action(kind, s, i)] + (d != e)
                            end = max(
                                2 * self.values.position[Action(k, self.values.units.stage_of[t], i)]  # type: ignore[arg-type]
                                for k, t in uses
                            )
                            intervals[name, e].append((start, end, (value, i)))
