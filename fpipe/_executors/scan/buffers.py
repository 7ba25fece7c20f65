"""Where the values of a call wait: wires between devices, pools, and the slots in them."""

import collections
from collections.abc import Hashable, Sequence
from typing import Any, Literal

from fpipe._executors.scan.coloring import edge_colors, slots
from fpipe._executors.scan.machine import Avals, PoolName
from fpipe._executors.scan.values import Value, Values
from fpipe._model.stages import Leaf, X, Y
from fpipe._program.code import Cotangent, Input
from fpipe.schedules import Action


class Places:
    """The places of a call's values.

    Attributes:
        route: the wire of each value to each other device.
        pairs: the source and target devices of each wire.
        waits: the pool in which a value waits for each unit that reads it.
        slot: of each value in a pool of a device, by microbatch; what nobody reads has
            none.
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

    def _wire(self) -> None:
        """Colour what goes between devices into the fewest wires."""
        directions: tuple[tuple[Literal["forward", "backward"], str], ...] = (
            ("forward", "F"),
            ("backward", "BI"),
        )
        for direction, kinds in directions:
            sent = [
                self._sent(s, kinds) for s in range(len(self.values.units.of_stage))
            ]
            most: dict[tuple[int, int], int] = {}
            for pair, values in (entry for own in sent for entry in own.items()):
                most[pair] = max(most.get(pair, 0), len(values))
            # The first ones between neighbours in the schedule's direction come first:
            # a ring is one wire.
            step = 1 if direction == "forward" else -1
            edges = sorted(
                ((a, b) for (a, b), count in most.items() for _ in range(count)),
                key=lambda edge: step * (edge[1] - edge[0]) % self.values.devices,
            )
            wires: dict[tuple[int, int], list[PoolName]] = {}
            for pair, color in zip(edges, edge_colors(edges), strict=True):
                wires.setdefault(pair, []).append(PoolName(direction, color))
                self.pairs[PoolName(direction, color)].add(pair)
            for (a, b), values in (entry for own in sent for entry in own.items()):
                self.route.update(
                    {
                        (value, b): name
                        for value, name in zip(values, wires[a, b], strict=False)
                    }
                )

    def _sent(self, s: int, kinds: str) -> dict[tuple[int, int], list[Value]]:
        """What a stage's actions of these kinds send, by the two devices; boundaries
        first.
        """
        units, found = self.values.units, dict[tuple[int, int], dict[Value, None]]()
        for u in units.of_stage[s]:
            for i, *_ in self.values.groups:
                for value in (
                    v
                    for kind in self.values.of(u, i)
                    if kind in kinds
                    for v in self.values.made(u, i, kind)
                ):
                    for d in sorted(
                        {units.device[t] for t in self.values.readers(value, i)}
                        - {units.device[u]}
                    ):
                        found.setdefault((units.device[u], d), {})[value] = None
        return {
            pair: sorted(values, key=lambda v: v[2] != Y)
            for pair, values in found.items()
        }

    # --- pools ---

    def _place(self) -> None:
        """Where each value waits for each unit that reads it."""
        values, remote, local = (
            self.values,
            dict[Hashable, PoolName](),
            list[tuple[Hashable, Value, int]](),
        )
        for u in range(len(values.units.stages)):
            for i, *_ in values.groups:
                for value in (
                    value
                    for kind in values.of(u, i)
                    for value in values.made(u, i, kind)
                ):
                    for t in values.readers(value, i):
                        role, away = (
                            self._role(value, t, i),
                            (value, values.units.device[t]),
                        )
                        if away in self.route:
                            self.waits[value, t] = self.route[away]
                            remote.setdefault(role, self.route[away])
                        else:
                            local.append((role, value, t))
        # What stays on its device waits where the reader's class looks for what comes
        # from others.
        for role, value, t in local:
            self.waits[value, t] = remote.get(
                role, PoolName("forward" if value[0] == "f" else "backward", -1)
            )

    def pool_of(self, value: Value, t: int, i: int) -> PoolName:
        """The pool in which a value waits for a unit."""
        if value[0] in ("saved", "shared"):
            return PoolName(
                value[0],
                (self.values.units.roles[t], self.values.programs.recomputes(t, i)),
            )
        return self.waits[value, t]

    def _role(self, value: Value, t: int, i: int) -> Hashable:
        """How the class of the reader calls a value."""
        direction, u, port, *_ = value
        if direction == "f":
            leaf = Leaf(X if port == Y else port, 0)
            return self.values.identity(t, i), self.values.relative(t, Input(leaf))
        index = [r for r, _ in self.values.programs.readers(t, Leaf(port, 0), i)]
        return (
            self.values.identity(t, i),
            self.values.relative(t, Cotangent(Leaf(port, 0))),
            index.index(u) if u in index else -1,
        )

    def _fill(self) -> None:
        """Slots by the intervals from a value's arrival to its last use."""
        intervals: dict[tuple[PoolName, int], list[tuple[int, int, Any]]] = (
            collections.defaultdict(list)
        )
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
                        uses = [
                            (k, t)
                            for k in "FBIW"
                            if self.values.reads(t, first, k, value)
                        ]
                        last.setdefault((name, self.values.units.device[t]), []).extend(
                            uses
                        )
                    for (name, e), uses in last.items():
                        if not uses:
                            continue
                        self.shapes[name][avals] = None
                        for i in microbatches:
                            start = 2 * self.values.position[Action(kind, s, i)] + (
                                d != e
                            )
                            end = max(
                                2
                                * self.values.position[
                                    Action(k, self.values.units.stage_of[t], i)  # type: ignore[arg-type]
                                ]
                                for k, t in uses
                            )
                            intervals[name, e].append((start, end, (value, i)))
