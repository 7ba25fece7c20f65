"""From a schedule to a machine: ticks, wires, pools, operations and the table."""

import collections
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fpipe._plan import Inputs, Layout, Programs, Request, direct_pairs, split_pairs
from fpipe._program import Code, Flat, Program, Ref
from fpipe._recent import Recent
from fpipe._remat import Remat
from fpipe._scan._coloring import edge_colors, slots
from fpipe._scan._machine import (
    Add,
    Arrival,
    Avals,
    Held,
    Loan,
    Machine,
    Number,
    Op,
    Param,
    Piece,
    Pool,
    PoolName,
    Put,
    Segment,
    Send,
    SetState,
    Slotted,
    Source,
    StateLeaf,
    Target,
    Wire,
    Write,
)
from fpipe._scan._packing import Packing
from fpipe._scan._ticks import Ticks, cheaper
from fpipe._scan._units import Units
from fpipe._stage import INDEX, KEY, SIDE, TARGETS, Leaf, Port, Stage, X, Y
from fpipe._tree import Shape, is_inexact
from fpipe.schedules import Action, Costs, Schedule

# What a bundle is: its direction, the unit that makes it, the port as its maker calls it, and the unit that it is a gradient
# for (of a backward bundle).
Value = tuple[Any, ...]


class UnitPrograms(Programs):
    """Programs as bare code, which takes pieces and adds nothing up."""

    whole = False

    def __init__(self, units: Units, opened: bool, *args: Any) -> None:
        self._roles, self.opened = units.roles, opened
        super().__init__(Layout(units.stages, ()), *args)

    def _wanted(self, stage: Stage, flat: Flat, reach: Mapping[tuple[int, Leaf], bool]) -> frozenset[Leaf]:
        """A core's input gradient is always made: the first core is then the same program as the others, and a tick takes
        as long as theirs anyway.
        """
        wanted = super()._wanted(stage, flat, reach)
        if self._roles[stage.index] != "core" or not self.request.wanted:
            return wanted
        pairs = zip(flat.inputs, flat.shapes, strict=True)
        return wanted | {leaf for leaf, a in pairs if leaf.port == X and is_inexact(a)}

    def _compile(self, s: int, code: Code) -> Any:
        del s
        return code


class Message(NamedTuple):
    """A bundle that goes to another device."""

    value: Value
    target: int


@dataclasses.dataclass
class _Ready:
    """An operation of a unit, with the slots that its arguments stand for: values, or `None` for the microbatch."""

    op: Op
    args: tuple[tuple[PoolName, Value] | int | None, ...]


def lower(
    units: Units,
    schedule: Schedule,
    remat: Remat,
    inputs: Inputs,
    request: Request,
    params: Packing,
    state: Packing | None,
    opened: bool,
    kept: Recent,
) -> tuple[Machine, Mapping[Port, Shape]]:
    """Lower a call. Also what the last unit returns for one microbatch.

    Arguments:
        opened: whether recomputations are inlined.
        kept: the traces of earlier calls.
    """
    lowering = _Lowering(units, schedule, remat, inputs, request, params, state, opened, kept)
    return lowering.machine(), lowering.programs.flat(len(units.stages) - 1, 0).out


def segments_of(schedule: Schedule, mode: str, recomputes: bool) -> list[Ticks]:
    """The ticks of a call: all of it, its forwards, or its forwards and then its backwards."""
    rows = schedule.actions
    # Recomputing takes another forward.
    costs = Costs(F=1.0, B=3.0, I=2.0, W=1.0) if recomputes else Costs(F=1.0, B=2.0, I=1.0, W=1.0)
    if mode == "grad":
        return [cheaper(rows, schedule.stages, costs)]
    forwards = [[a for a in row if a.kind == "F"] for row in rows]
    first = cheaper(forwards, schedule.stages, costs)
    if mode != "vjp":
        return [first]
    backwards = [[a for a in row if a.kind != "F"] for row in rows]
    return [first, cheaper(backwards, schedule.stages, costs)]


class _Lowering:
    def __init__(
        self,
        units: Units,
        schedule: Schedule,
        remat: Remat,
        inputs: Inputs,
        request: Request,
        params: Packing,
        state: Packing | None,
        opened: bool,
        kept: Recent,
    ) -> None:
        self.units, self.inputs, self.request = units, inputs, request
        self.params, self.state, self.m = params, state, inputs.cut.m
        self.devices = schedule.devices
        self.ticks = segments_of(schedule, request.mode, remat.recomputes(0, max(2, self.m), direct=False))
        self.position: dict[Action, int] = {}
        self.starts: list[int] = []
        for ticks in self.ticks:
            self.starts.append(self.starts[-1] + self._length(self.ticks[len(self.starts) - 1]) if self.starts else 0)
            self.position.update(ticks.positions(self.starts[-1]))
        rows = schedule.actions
        if request.mode == "vjp":
            rows = tuple(tuple(sorted(row, key=lambda a: a.kind != "F")) for row in rows)
        order = [a for row in rows for a in row]
        direct = direct_pairs(order, schedule.stage_to_device)
        # Of several units of a stage only the last one's backward follows its forward.
        direct_units = {(units.of_stage[s][-1], i) for s, i in direct}
        split = {(u, i) for s, i in split_pairs(order) for u in units.of_stage[s]}
        self.programs = UnitPrograms(units, opened, direct_units, split, remat, inputs, request, kept)
        self.kinds = {
            (s, i): tuple(k for k in "FBIW" if Action(k, s, i) in self.position)  # type: ignore[arg-type]
            for s in range(len(units.of_stage))
            for i in range(self.m)
        }
        self.groups = self._groups()
        self.identities: dict[int, Hashable] = {}
        self.loans: dict[tuple[tuple[int, int], int], int] = {}
        self.outputs: dict[Any, tuple[jax.ShapeDtypeStruct, set[int]]] = {}

    @staticmethod
    def _length(ticks: Ticks) -> int:
        return len(ticks.rows) * len(ticks.phases)

    # --- what the programs say ---

    def of(self, u: int, i: int) -> Mapping[Any, Program]:
        """The programs of a unit that the schedule runs, by kind."""
        programs = self.programs.of(u, i)
        return {k: programs[k] for k in self.kinds[self.units.stage_of[u], i] if k in programs}

    def _groups(self) -> list[list[int]]:
        """Microbatches for which every unit runs the same programs."""
        out: dict[Hashable, list[int]] = {}
        for i in range(self.m):
            programs = [id(self.programs.of(u, i)) for u in range(len(self.units.stages))]
            kinds = [self.kinds[s, i] for s in range(len(self.units.of_stage))]
            out.setdefault((*programs, *kinds), []).append(i)
        return list(out.values())

    def resolved(self, u: int, i: int, kind: str, ref: Ref) -> Ref:
        """What a reference stands for that is another value as it is."""
        programs = self.of(u, i)
        for k in {"F": "F", "B": "FB", "I": "FI", "W": "FIW"}[kind]:
            same = programs[k].same if k in programs else {}
            while ref in same:
                ref = same[ref]
        return ref

    def fetched(self, u: int, i: int, kind: str) -> list[Ref]:
        """What a program takes from outside, each once."""
        program = self.of(u, i)[kind]
        passed = [
            r for r in (self.resolved(u, i, kind, v) for v in program.same.values()) if r not in program.outs
        ]
        taken = [self.resolved(u, i, kind, ref) for ref in program.ins if ref.what != "sum"]
        return list(dict.fromkeys([*taken, *passed]))

    def saved(self, u: int, i: int) -> tuple[list[Ref], list[Ref]]:
        """What the forward keeps for the backward, and `I` for `W`."""
        first: dict[Ref, None] = {}
        second: dict[Ref, None] = {}
        for kind in self.of(u, i):
            for ref in self.fetched(u, i, kind) if kind != "F" else ():
                state = ref.what == "in" and ref.leaf is not None and ref.leaf.port.kind == "state"
                if ref.what in ("residual", "out") or state:
                    first[ref] = None
                elif ref.what in ("shared", "gradient"):
                    second[ref] = None
        return list(first), list(second)

    def bundle(self, value: Value, i: int) -> tuple[list[Ref], Avals]:
        """What a value consists of, as its maker calls it."""
        direction, u, port, *_ = value
        if direction == "f":
            shapes = self.programs.flat(u, i).out[port].leaves
            return [Ref("out", Leaf(port, k)) for k in range(len(shapes))], tuple(shapes)
        if direction == "b":
            name = X if port == Y else port
            flat = self.programs.flat(u, i)
            known = dict(zip(flat.inputs, flat.shapes, strict=True))
            leaves = [leaf for leaf in known if leaf.port == name and leaf in self.programs.joint(u, i).gradients]
            return [Ref("gradient", leaf) for leaf in leaves], tuple(known[leaf] for leaf in leaves)
        refs = self.saved(u, i)[direction == "shared"]
        return refs, tuple(self.aval(u, i, ref) for ref in refs)

    def aval(self, u: int, i: int, ref: Ref) -> jax.ShapeDtypeStruct:
        """The shape of what is kept."""
        flat = self.programs.flat(u, i)
        if ref.what == "in" and ref.leaf is not None:
            return dict(zip(flat.inputs, flat.shapes, strict=True))[ref.leaf]
        if ref.what == "out" and ref.leaf is not None:
            return flat.out[ref.leaf.port].leaves[ref.leaf.k]
        program = self.of(u, i)["F" if ref.what == "residual" else "I"]
        code = program.call
        assert isinstance(code, Code)
        a = code.graph.avals[code.outs[program.outs.index(ref)]]
        return jax.ShapeDtypeStruct(a.shape, a.dtype)

    # --- who reads what ---

    def readers(self, value: Value, i: int) -> list[int]:
        """The units that read a value."""
        direction, u, port, *rest = value
        if direction == "f":
            if port == Y:
                return [] if self.units.stages[u].last else [u + 1]
            return [t.index for t in self.units.stages if port.of in t.skips_in]
        return [rest[0]] if direction == "b" else [u]

    def made(self, u: int, i: int, kind: str) -> list[Value]:
        """The boundaries, skips and cotangents that a unit's program makes for other units, boundaries first."""
        stage = self.units.stages[u]
        if kind == "F":
            ports = [*([] if stage.last else [Y]), *(Port("skip", s) for s in stage.skips_out)]
            return [("f", u, port) for port in ports]
        out = []
        if kind in "BI" and kind in self.of(u, i):
            ports = {leaf.port for leaf in self.programs.joint(u, i).gradients}
            if X in ports and u > 0:
                out.append(("b", u, Y, u - 1))
            skips = [skip for skip in stage.skips_in if Port("skip", skip) in ports]
            out += [("b", u, Port("skip", skip), self.programs.layout.source_of(skip)) for skip in skips]
        return out

    def reads(self, t: int, i: int, kind: str, value: Value) -> bool:
        """Whether a unit's program reads a value that was made for it."""
        if kind not in self.of(t, i):
            return False
        direction, u, port, *_ = value
        for ref in self.fetched(t, i, kind):
            if direction == "f" and ref.what == "in" and ref.leaf is not None:
                if ref.leaf.port == (X if port == Y else port):
                    return True
            elif direction == "b" and ref.what == "cotangent" and ref.leaf is not None:
                if ref.leaf.port == port and self.programs.readers(t, ref.leaf, i)[ref.n][0] == u:
                    return True
            elif direction in ("saved", "shared") and ref in self.saved(t, i)[direction == "shared"]:
                return True
        return False

    # --- wires ---

    def messages(self, s: int, i: int, kind: str) -> dict[int, list[Value]]:
        """What an action sends to each other device, in order."""
        out: dict[int, list[Value]] = {}
        for u in self.units.of_stage[s]:
            for value in self.made(u, i, kind):
                for d in sorted({self.units.device[t] for t in self.readers(value, i)} - {self.units.device[u]}):
                    out.setdefault(d, []).append(value)
        return {d: sorted(values, key=lambda v: v[2] != Y) for d, values in out.items()}

    def wire(self) -> None:
        """Colour what goes between devices into the fewest wires."""
        self.route: dict[tuple[Value, int], PoolName] = {}
        self.pairs: dict[PoolName, set[tuple[int, int]]] = collections.defaultdict(set)
        for direction, kinds in (("forward", "F"), ("backward", "BI")):
            sent = [
                (self.units.device[self.units.of_stage[s][0]], d, values)
                for s in range(len(self.units.of_stage))
                for i, *_ in self.groups
                for kind in kinds
                if kind in self.kinds[s, i]
                for d, values in self.messages(s, i, kind).items()
            ]
            most: dict[tuple[int, int], int] = {}
            for a, b, values in sent:
                most[a, b] = max(most.get((a, b), 0), len(values))
            edges = [
                (n, (b - a if direction == "forward" else a - b) % self.devices, a, b)
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

    # --- classes: units whose code is the same ---

    def relative(self, u: int, ref: Ref) -> Hashable:
        """A reference without the names of layers and skips."""
        if ref.leaf is None:
            return ref
        (kind, of), k = ref.leaf
        stage = self.units.stages[u]
        if kind in ("params", "number"):
            of = stage.params.index(of)
        elif kind == "state":
            of = stage.stateful.index(of)
        elif kind == "skip":
            of = (of in stage.skips_in, (stage.skips_in if of in stage.skips_in else stage.skips_out).index(of))
        return ref.what, kind, of, k, ref.n

    def identity(self, u: int, i: int) -> Hashable:
        """Equal for units and microbatches whose programs compute the same."""
        programs = self.of(u, i)
        key = hash(id(self.programs.of(u, i)))
        if key not in self.identities:
            parts = []
            for kind, p in programs.items():
                name = lambda refs: tuple(self.relative(u, r) for r in refs)  # noqa: E731
                code = p.call.identity if isinstance(p.call, Code) else None
                same = tuple((self.relative(u, a), self.relative(u, b)) for a, b in p.same.items())
                parts.append((kind, code, name(p.ins), name(p.outs), same))
            self.identities[key] = _Once(tuple(parts))
        return self.identities[key]

    # --- pools ---

    def place(self) -> None:
        """Where each value waits for each unit that reads it, and the slots of each pool."""
        self.waits: dict[tuple[Value, int], PoolName] = {}
        groups = [(u, i) for u in range(len(self.units.stages)) for i, *_ in self.groups]
        remote: dict[Hashable, PoolName] = {}
        local: list[tuple[Hashable, Value, int]] = []
        for u, i in groups:
            for kind in self.of(u, i):
                for value in self.made(u, i, kind):
                    for t in self.readers(value, i):
                        role = self._role(value, t, i)
                        if (value, self.units.device[t]) in self.route:
                            self.waits[value, t] = self.route[value, self.units.device[t]]
                            remote.setdefault(role, self.waits[value, t])
                        else:
                            local.append((role, value, t))
            for n, direction in enumerate(("saved", "shared")):
                if self.saved(u, i)[n]:
                    of = (self.units.roles[u], self.programs.recomputes(u, i))
                    self.waits[(direction, u), u, i] = PoolName(direction, of)  # type: ignore[index, arg-type]
        for role, value, t in local:
            kind = "forward" if value[0] == "f" else "backward"
            self.waits[value, t] = remote.get(role, PoolName(kind, -1))

    def pool_of(self, value: Value, t: int, i: int) -> PoolName:
        """The pool in which a value waits for a unit."""
        if value[0] in ("saved", "shared"):
            return PoolName(value[0], (self.units.roles[t], self.programs.recomputes(t, i)))
        return self.waits[value, t]

    def _role(self, value: Value, t: int, i: int) -> Hashable:
        """How the class of the reader calls a value."""
        direction, u, port, *_ = value
        if direction == "f":
            leaf = Leaf(X if port == Y else port, 0)
            return self.identity(t, i), self.relative(t, Ref("in", leaf))
        index = [r for r, _ in self.programs.readers(t, Leaf(port, 0), i)]
        return (
            self.identity(t, i),
            self.relative(t, Ref("cotangent", Leaf(port, 0))),
            index.index(u) if u in index else -1,
        )

    def fill(self) -> None:
        """Slots by the intervals from a value's arrival to its last use."""
        intervals: dict[tuple[PoolName, int], list[tuple[int, int, Any]]] = collections.defaultdict(list)
        self.shapes: dict[PoolName, dict[Avals, None]] = collections.defaultdict(dict)
        for s in range(len(self.units.of_stage)):
            for microbatches in self.groups:
                self._intervals(s, microbatches, intervals)
        self.slot: dict[tuple[PoolName, int, Value, int], int] = {}
        self.count: dict[PoolName, int] = {name: 0 for name, _ in intervals}
        for (name, d), own in intervals.items():
            where, count = slots(own)
            self.count[name] = max(self.count[name], count)
            self.slot.update({(name, d, *key): n for key, n in where.items()})

    def _intervals(self, s: int, microbatches: Sequence[int], intervals: Any) -> None:
        first = microbatches[0]
        for u in self.units.of_stage[s]:
            d = self.units.device[u]
            for kind in self.of(u, first):
                values = self.made(u, first, kind)
                kept = {"F": "saved", "I": "shared"}.get(kind)
                if kept and self.saved(u, first)[kept == "shared"]:
                    values = [*values, (kept, u, None)]
                for value in values:
                    avals = self.bundle(value, first)[1]
                    last: dict[tuple[PoolName, int], list[tuple[str, int]]] = {}
                    for t in self.readers(value, first):
                        name = self.pool_of(value, t, first)
                        uses = [(k, t) for k in "FBIW" if self.reads(t, first, k, value)]
                        last.setdefault((name, self.units.device[t]), []).extend(uses)
                    for (name, e), uses in last.items():
                        if not uses:
                            continue
                        self.shapes[name][avals] = None
                        for i in microbatches:
                            start = 2 * self.position[Action(kind, s, i)] + (d != e)
                            end = max(
                                2 * self.position[Action(k, self.units.stage_of[t], i)]  # type: ignore[arg-type]
                                for k, t in uses
                            )
                            intervals[name, e].append((start, end, (value, i)))

    # --- operations ---

    def unite(self) -> None:
        """Where the values of a class go, for all its units together: an operation that serves several sends everywhere, and
        the table tells who looks.
        """
        self.targets: dict[Hashable, dict[PoolName, bool]] = collections.defaultdict(dict)
        for u in range(len(self.units.stages)):
            for i, *_ in self.groups:
                for kind in self.of(u, i):
                    for value in self.made(u, i, kind):
                        role = self._maker_role(value, i)
                        for t in self.readers(value, i):
                            away = self.units.device[t] != self.units.device[u]
                            name = self.route[value, self.units.device[t]] if away else self.pool_of(value, t, i)
                            if self._stored(value, t, i):
                                self.targets[role, self._bundle_key(value, i)][name, away] = True  # type: ignore[index]

    def _stored(self, value: Value, t: int, i: int) -> bool:
        return (self.pool_of(value, t, i), self.units.device[t], value, i) in self.slot

    def _maker_role(self, value: Value, i: int) -> Hashable:
        direction, u, port, *_ = value
        return self.identity(u, i), self.relative(u, Ref("in" if direction == "b" else "out", Leaf(port, 0)))

    def _bundle_key(self, value: Value, i: int) -> Hashable:
        refs, avals = self.bundle(value, i)
        return tuple(self.relative(value[1], r) for r in refs), avals

    def ready(self, u: int, i: int, kind: str) -> _Ready:
        """The operation of a unit's program."""
        program = self.of(u, i)[kind]
        args: list[Any] = [None]

        def arg(what: Any) -> int:
            if what not in args:
                args.append(what)
            return args.index(what)

        fetched = self.fetched(u, i, kind)
        sources = tuple(self._source(u, i, kind, ref, arg) for ref in fetched)
        where = {ref: n for n, ref in enumerate(fetched)}
        where |= {ref: len(fetched) + n for n, ref in enumerate(program.outs)}
        code = program.call
        assert code is None or isinstance(code, Code)

        def value_of(ref: Ref) -> int:
            return where[ref] if ref in where else where[self.resolved(u, i, kind, ref)]

        targets: list[Target] = []
        kept = {"F": "saved", "I": "shared"}.get(kind)
        if kept and self.saved(u, i)[kept == "shared"]:
            value = (kept, u, None)
            refs, avals = self.bundle(value, i)
            name = self.pool_of(value, u, i)
            targets.append(Put(name, arg((name, value)), avals, tuple(map(value_of, refs))))
        for value in self.made(u, i, kind):
            refs, avals = self.bundle(value, i)
            values = tuple(map(value_of, refs))
            for name, away in self.targets[self._maker_role(value, i), self._bundle_key(value, i)]:  # type: ignore[misc]
                if away:
                    targets.append(Send(name, avals, values))
                else:
                    targets.append(Put(name, arg((name, value)), avals, values))
        targets += self._results(u, i, kind, program, value_of)
        ins = tuple(where[self.resolved(u, i, kind, ref)] for ref in program.ins if ref.what != "sum")
        op = Op(
            kind,
            sources,
            code,
            ins,
            tuple(targets),
            self.identity(u, i),
            f"{kind} {self.units.stages[u].described}",
        )
        return _Ready(op, tuple(args))

    def _source(self, u: int, i: int, kind: str, ref: Ref, arg: Callable[[Any], int]) -> Source:
        earlier = {"F": (), "W": ("saved", "shared")}.get(kind, ("saved",))
        for kept in earlier:
            if ref in self.saved(u, i)[kept == "shared"]:
                return self._held((kept, u, None), ref, u, i, arg)
        assert ref.leaf is not None, ref
        port, k = ref.leaf
        flat, stage = self.programs.flat(u, i), self.units.stages[u]
        if ref.what == "cotangent":
            if port == Y and stage.last:
                return Piece(Port("y"), k, whole=False)
            reader, leaf = self.programs.readers(u, ref.leaf, i)[ref.n]
            return self._held(("b", reader, port, u), Ref("gradient", leaf), u, i, arg)
        assert ref.what == "in", ref
        if port.kind == "params":
            return self._param(u, (port.of, k))
        if port.kind == "state":
            assert self.state is not None
            return StateLeaf(self.state.where[port.of, k][0], self.state.shape((port.of, k)))
        if port == INDEX:
            return Number(0)
        if port.kind == "number":
            return Number(arg(("number", stage.keyed.index(port.of), port.of)))
        if port.kind == "skip" or (port == X and u > 0):
            value = ("f", u - 1, Y) if port == X else ("f", self.programs.layout.source_of(port.of), port)
            return self._held(value, Ref("out", Leaf(Y if port == X else port, k)), u, i, arg)
        return Piece(port, k, whole=port == KEY or ref.leaf in flat.constant)

    def _held(self, value: Value, ref: Ref, u: int, i: int, arg: Callable[[Any], int]) -> Held:
        refs, avals = self.bundle(value, i)
        name = self.pool_of(value, u, i)
        return Held(name, arg((name, value)), avals, refs.index(ref))

    def _param(self, u: int, entry: tuple[int, int]) -> Param:
        row, owner = self.params.where[entry]
        if owner == self.units.device[u]:
            return Param(row, self.params.shape(entry))
        return Param(self._loan(entry, self.units.device[u]), self.params.shape(entry), borrowed=True)

    def _loan(self, entry: tuple[int, int], borrower: int) -> int:
        return self.loans.setdefault((entry, borrower), len(self.loans))

    def _results(self, u: int, i: int, kind: str, program: Program, value_of: Callable[[Ref], int]) -> Iterable[Target]:
        """What goes to the user, and what is summed."""
        flat, d = self.programs.flat(u, i), self.units.device[u]

        def output(name: Any, aval: jax.ShapeDtypeStruct) -> Any:
            self.outputs.setdefault(name, (aval, set()))[1].add(d)
            return name

        if kind == "F":
            for port, shape in flat.out.items():
                for k, aval in enumerate(shape.leaves):
                    leaf = Leaf(port, k)
                    if port.kind in ("loss", "weight", "aux") or (port == Y and flat.stage.last):
                        yield Write(output(leaf, aval), value_of(Ref("out", leaf)))
                    elif port.kind == "state":
                        assert self.state is not None
                        yield SetState(self.state.where[port.of, k][0], value_of(Ref("out", leaf)))
            return
        gradients = self.programs.joint(u, i).gradients
        if kind in "BI":
            known = dict(zip(flat.inputs, flat.shapes, strict=True))
            for leaf in gradients:
                outside = leaf.port in (SIDE, TARGETS) or (leaf.port == X and u == 0)
                if outside and leaf not in flat.constant:
                    name = output(Leaf(Port("x" if leaf.port == X else leaf.port.kind), leaf.k), known[leaf])
                    yield Write(name, value_of(Ref("gradient", leaf)), add=leaf.port == SIDE)
        for ref in program.outs:
            if ref.what == "sum" and ref.leaf is not None:
                if ref.leaf.port.kind == "params":
                    source = self._param(u, (ref.leaf.port.of, ref.leaf.k))
                    yield Add("borrowed" if source.borrowed else "row", source.row, value_of(ref))
                else:
                    yield Add("input", (ref.leaf.port, ref.leaf.k), value_of(ref))

    # --- the table ---

    def segment(self, ticks: Ticks, start: int) -> Segment:
        """The table of a scan."""
        ops: list[dict[Op, tuple[int, int]]] = [{} for _ in ticks.phases]  # with where they sort
        filled: list[dict[Op, list[tuple[int, int, list[int]]]]] = [{} for _ in ticks.phases]
        arriving: list[dict[PoolName, list[tuple[int, int, int]]]] = [{} for _ in ticks.phases]
        for t, row in enumerate(ticks.rows):
            for p, phase in enumerate(row):
                for d, action in enumerate(phase):
                    if action is not None:
                        self._enter(action, t, p, d, ops, filled, arriving)
        tables: list[tuple[tuple[Slotted, ...], tuple[Arrival, ...]]] = []
        width = 0
        for p in range(len(ticks.phases)):
            column, slotted, arrivals = 0, [], []
            for op in sorted(ops[p], key=lambda op: ops[p][op]):
                count = max(len(args) for _, _, args in filled[p][op])
                slotted.append(Slotted(op, column, column + 1))
                column += 1 + count
            for name in arriving[p]:
                arrivals.append(Arrival(name, column, column + 1))
                column += 2
            tables.append((tuple(slotted), tuple(arrivals)))
            width = max(width, column)
        table = np.zeros((self.devices, len(ticks.rows), len(ticks.phases), width), np.int32)
        for p, (slotted, arrivals) in enumerate(tables):
            for op, column, first in slotted:
                for t, d, args in filled[p][op]:
                    table[d, t, p, column] = 1
                    table[d, t, p, first : first + len(args)] = args
            for name, column, used in arrivals:
                table[:, :, p, column] = self.count[name]
                for t, d, n in arriving[p][name]:
                    table[d, t, p, column] = n
                    table[:, t, p, used] = 1
        return Segment(tuple(s for s, _ in tables), tuple(a for _, a in tables), table)

    def _enter(self, action: Action, t: int, p: int, d: int, ops: Any, filled: Any, arriving: Any) -> None:
        kind, s, i = action
        for u in self.units.of_stage[s]:
            programs = self.of(u, i)
            if kind not in programs:
                continue
            key = (u, id(self.programs.of(u, i)), kind)
            if key not in self._ready:
                self._ready[key] = self.ready(u, i, kind)
            op, args = self._ready[key].op, self._ready[key].args
            if op.code is not None or op.targets:
                at = ("FBIW".index(kind), u if kind == "F" else -u)
                ops[p][op] = min(ops[p].get(op, at), at)
                filled[p].setdefault(op, []).append((t, d, [self._number(a, d, i) for a in args]))
            for value in self.made(u, i, kind):
                for e in {self.units.device[r] for r in self.readers(value, i)} - {d}:
                    name = self.route[value, e]
                    if (name, e, value, i) in self.slot:
                        arriving[p].setdefault(name, []).append((t, e, self.slot[name, e, value, i]))

    def _number(self, arg: Any, d: int, i: int) -> int:
        if arg is None:
            return i
        if arg[0] == "number":
            return arg[2]
        name, value = arg
        return self.slot.get((name, d, value, i), self.count[name])

    def machine(self) -> Machine:
        """All of it."""
        self.wire()
        self.place()
        self.fill()
        self.unite()
        self._ready: dict[Any, _Ready] = {}
        segments = tuple(self.segment(ticks, start) for ticks, start in zip(self.ticks, self.starts, strict=True))
        pools = {name: Pool(n + 1, tuple(self.shapes[name])) for name, n in self.count.items()}
        wires = {
            name: Wire(tuple(sorted(self.pairs[name])), pools[name].avals, self._often(name, segments))
            for name in self.pairs
            if name in pools
        }
        adds = [t for segment in segments for phase in segment.ops for op, *_ in phase for t in op.targets]
        found = {t.of for t in adds if isinstance(t, Add) and t.to == "input"}
        loans = [
            Loan(self.params.where[entry][0], self.params.where[entry][1], borrower, self.params.shape(entry))
            for entry, borrower in self.loans
        ]
        return Machine(
            self.devices,
            self.m,
            segments,
            pools,
            wires,
            self.params,
            self.state,
            tuple(loans),
            {name: (aval, frozenset(devices)) for name, (aval, devices) in self.outputs.items()},
            {of: self.inputs.of(of[0]).leaves[of[1]] for of in sorted(found, key=str)},
            tuple(self.programs.warnings),
        )

    @staticmethod
    def _often(name: PoolName, segments: Sequence[Segment]) -> bool:
        """Whether a wire carries something in more than half of the phases in which it may."""
        used = [
            s.table[0, :, p, a.used]
            for s in segments
            for p, arrivals in enumerate(s.wires)
            for a in arrivals
            if a.wire == name
        ]
        return bool(np.mean(np.concatenate(used)) > 0.5) if used else False


class _Once:
    """A key that is hashed once."""

    def __init__(self, value: Hashable) -> None:
        self._value, self._hash = value, hash(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Once) and (
            self is other or (self._hash == other._hash and self._value == other._value)
        )
