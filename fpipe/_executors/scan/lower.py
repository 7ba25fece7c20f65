"""From a schedule to a machine: ticks, wires, pools, operations and the table."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fpipe._core.caches import Recent
from fpipe._core.pytrees import Shape
from fpipe._executors.programs import Inputs, Request
from fpipe._executors.scan.buffers import Places
from fpipe._executors.scan.feeds import is_large, steps
from fpipe._executors.scan.machine import (
    Add,
    Arrival,
    Feed,
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
from fpipe._executors.scan.packing import Packing
from fpipe._executors.scan.ticks import Ticks, cheaper
from fpipe._executors.scan.units import Units
from fpipe._executors.scan.values import Value, Values
from fpipe._model.remat import Remat
from fpipe._model.stages import INDEX, KEY, SIDE, TARGETS, Leaf, Port, X, Y
from fpipe._program.code import (
    Cotangent,
    Gradient,
    GradientSum,
    Handed,
    Input,
    Output,
    Program,
    ProgramValue,
    Residual,
)
from fpipe.schedules import Action, Costs, Kind, Schedule


@dataclasses.dataclass(frozen=True)
class _Ready:
    """An operation of a unit, its number among all, and what its arguments are: `None`
    for the microbatch, `("number", position, layer)`, or a pool and the value whose
    slot it is. `spread`: what it reads that a feed brings.
    """

    op: Op
    number: int
    args: tuple[Any, ...]
    spread: tuple[Leaf, ...]


@dataclasses.dataclass
class _Entries:
    """What is to be in the table for one phase of each tick.

    Attributes:
        ops: by number, for an operation is dear to hash; with where they sort.
        filled: for each, ticks, devices and arguments.
        arriving: for each wire, ticks, devices and slots.
        stages: whose they are.
        read: for each feed, the microbatch that is read in a tick.
        arrays: for each feed, which of the port's.
    """

    ops: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    filled: dict[int, list[tuple[int, int, list[int]]]] = dataclasses.field(
        default_factory=lambda: defaultdict(list)
    )
    arriving: dict[PoolName, list[tuple[int, int, int]]] = dataclasses.field(
        default_factory=lambda: defaultdict(list)
    )
    stages: dict[int, set[int]] = dataclasses.field(
        default_factory=lambda: defaultdict(set)
    )
    read: dict[tuple[Port, str], dict[int, int]] = dataclasses.field(
        default_factory=lambda: defaultdict(dict)
    )
    arrays: dict[tuple[Port, str], set[int]] = dataclasses.field(
        default_factory=lambda: defaultdict(set)
    )


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
    large: int,
) -> tuple[Machine, Mapping[Port, Shape]]:
    """Lower a call. Also what the last unit returns for one microbatch.

    Arguments:
        opened: whether recomputations are inlined.
        kept: the traces of earlier calls.
        large: the bytes that an input must take on every device before it lies over
            them.
    """
    ticks = ticks_of(schedule, request.mode, remat.recomputes(0, 2, direct=False))
    position: dict[Action, int] = {}
    for t in ticks:
        position |= t.positions(1 + max(position.values(), default=-1))
    values = Values(units, schedule, remat, inputs, request, position, opened, kept)
    return _Lowering(
        values, ticks, params, state, large
    ).machine(), values.programs.flat(len(units.stages) - 1, 0).out


def ticks_of(schedule: Schedule, mode: str, recomputes: bool) -> list[Ticks]:
    """The ticks of a call: all of it, its forwards, or its forwards and then its
    backwards.
    """
    rows = schedule.actions
    # Recomputing takes another forward.
    costs = (
        Costs(F=1.0, B=3.0, I=2.0, W=1.0)
        if recomputes
        else Costs(F=1.0, B=2.0, I=1.0, W=1.0)
    )
    if mode == "grad":
        return [cheaper(rows, schedule.stages, costs)]
    forwards = [[a for a in row if a.kind == "F"] for row in rows]
    first = cheaper(forwards, schedule.stages, costs)
    if mode != "vjp":
        return [first]
    backwards = [[a for a in row if a.kind != "F"] for row in rows]
    return [first, cheaper(backwards, schedule.stages, costs)]


class _Lowering:
    """A call while it is lowered."""

    def __init__(
        self,
        values: Values,
        ticks: Sequence[Ticks],
        params: Packing,
        state: Packing | None,
        large: int,
    ) -> None:
        self.values, self.places, self.ticks = values, Places(values), ticks
        self.spread = frozenset(
            Leaf(port, k)
            for port in (X, TARGETS)
            for k, a in enumerate(values.inputs.of(port).leaves)
            if Leaf(port, k) not in values.inputs.whole(port)
            and is_large(a, values.devices, large)
        )
        self.params, self.state = params, state
        self.loans: dict[tuple[tuple[int, int], int], int] = {}
        self.outputs: dict[Any, tuple[jax.ShapeDtypeStruct, set[int]]] = {}
        self._ready: dict[Any, _Ready] = {}
        self._ops: dict[Op, int] = {}
        self._targets = self._united()

    # --- operations ---

    def _united(self) -> dict[Hashable, dict[tuple[PoolName, bool], None]]:
        """Where the values of a class go, for all its units together, and whether that
        is away.

        An operation that serves several units puts its values wherever one of them
        does, and the table tells who looks. That must not be where another value of the
        same action goes: a class in which it would be is no class.
        """
        values, places = self.values, self.places
        own: dict[tuple[Value, int], dict[tuple[PoolName, bool], None]] = {}
        for u, d in enumerate(values.units.device):
            for i, *_ in values.groups:
                for value in (
                    value
                    for kind in values.of(u, i)
                    for value in values.made(u, i, kind)
                ):
                    own[value, i] = {
                        (name, values.units.device[t] != d): None
                        for t in values.readers(value, i)
                        for name in [places.pool_of(value, t, i)]
                        if (name, values.units.device[t], value, i) in places.slot
                    }
        self._alone: set[Hashable] = set()
        while True:
            out: dict[Hashable, dict[tuple[PoolName, bool], None]] = defaultdict(dict)
            for (value, i), targets in own.items():
                out[self._target_key(value, i)] |= targets
            # The wires that each stage's action really uses, and by which value.
            used = {
                (values.units.stage_of[value[1]], i, name): value
                for (value, i), targets in own.items()
                for name, away in targets
                if away
            }
            clash = {
                values.identity(value[1], i)
                for value, i in own
                for name, away in out[self._target_key(value, i)]
                if away
                and used.get((values.units.stage_of[value[1]], i, name), value) != value
            }
            if clash <= self._alone:
                return out
            self._alone |= clash

    def _target_key(self, value: Value, i: int) -> Hashable:
        """How the class of its maker calls a value."""
        direction, u, port, *_ = value
        refs, avals = self.values.bundle(value, i)
        names, identity = (
            tuple(self.values.relative(u, ref) for ref in refs),
            self.values.identity(u, i),
        )
        only = u if identity in self._alone else None
        return (
            direction,
            identity,
            only,
            self.values.relative(u, Output(Leaf(port, 0))),
            names,
            avals,
        )

    def _make_ready(self, u: int, i: int, kind: Kind) -> _Ready:
        """The operation of a unit's program."""
        program = self.values.of(u, i)[kind]
        args: list[Any] = [None]

        def arg(what: Any) -> int:
            if what not in args:
                args.append(what)
            return args.index(what)

        fetched = self.values.fetched(u, i, kind)
        sources = tuple(self._source(u, i, kind, ref, arg) for ref in fetched)
        where = {ref: n for n, ref in enumerate(fetched)}
        where |= {ref: len(fetched) + n for n, ref in enumerate(program.outs)}
        code = program.code

        def value_of(ref: ProgramValue) -> int:
            return (
                where[ref]
                if ref in where
                else where[self.values.resolved(u, i, kind, ref)]
            )

        targets: list[Target] = []
        kept = {"F": "saved", "I": "shared"}.get(kind)
        if kept and self.values.saved(u, i)[kept == "shared"]:
            value = (kept, u, None)
            refs, avals = self.values.bundle(value, i)
            name = self.places.pool_of(value, u, i)
            targets.append(
                Put(name, arg((name, value)), avals, tuple(map(value_of, refs)))
            )
        for value in self.values.made(u, i, kind):
            refs, avals = self.values.bundle(value, i)
            values = tuple(map(value_of, refs))
            for name, away in self._targets[self._target_key(value, i)]:
                if away:
                    targets.append(Send(name, avals, values))
                else:
                    targets.append(Put(name, arg((name, value)), avals, values))
        targets += self._results(u, i, kind, program, value_of)
        ins = tuple(
            where[self.values.resolved(u, i, kind, ref)]
            for ref in program.ins
            if not isinstance(ref, GradientSum)
        )
        op = Op(
            kind,
            sources,
            code,
            ins,
            tuple(targets),
            self.values.identity(u, i),
            kind,
        )
        fed = tuple(
            Leaf(a.port, a.k)
            for a in sources
            if isinstance(a, Piece) and Leaf(a.port, a.k) in self.spread
        )
        return _Ready(op, self._ops.setdefault(op, len(self._ops)), tuple(args), fed)

    def _source(
        self, u: int, i: int, kind: str, ref: ProgramValue, arg: Callable[[Any], int]
    ) -> Source:
        earlier = {"F": (), "W": ("saved", "shared")}.get(kind, ("saved",))
        for kept in earlier:
            if ref in self.values.saved(u, i)[kept == "shared"]:
                return self._held((kept, u, None), ref, u, i, arg)
        assert not isinstance(ref, Residual | Handed), ref
        port, k = ref.leaf
        flat, stage = self.values.programs.flat(u, i), self.values.units.stages[u]
        if isinstance(ref, Cotangent):
            if port == Y and stage.last:
                return Piece(Port("y"), k, whole=False)
            reader, leaf = self.values.programs.readers(u, ref.leaf, i)[ref.number]
            return self._held(("b", reader, port, u), Gradient(leaf), u, i, arg)
        assert isinstance(ref, Input), ref
        if port.kind == "params":
            return self._param(u, (port.of, k))
        if port.kind == "state":
            assert self.state is not None
            return StateLeaf(
                self.state.where[port.of, k][0], self.state.shape((port.of, k))
            )
        if port == INDEX:
            return Number(0)
        if port.kind == "number":
            return Number(arg(("number", stage.keyed.index(port.of), port.of)))
        if port.kind == "skip" or (port == X and u > 0):
            value = (
                ("f", u - 1, Y)
                if port == X
                else ("f", self.values.programs.layout.source_of(port.of), port)
            )
            return self._held(
                value, Output(Leaf(Y if port == X else port, k)), u, i, arg
            )
        return Piece(port, k, whole=port == KEY or ref.leaf in flat.constant)

    def _held(
        self, value: Value, ref: ProgramValue, u: int, i: int, arg: Callable[[Any], int]
    ) -> Held:
        refs, avals = self.values.bundle(value, i)
        name = self.places.pool_of(value, u, i)
        return Held(name, arg((name, value)), avals, refs.index(ref))

    def _param(self, u: int, entry: tuple[int, int]) -> Param:
        row, owner = self.params.where[entry]
        if owner == self.values.units.device[u]:
            return Param(row, self.params.shape(entry))
        return Param(
            self._loan(entry, self.values.units.device[u]),
            self.params.shape(entry),
            borrowed=True,
        )

    def _loan(self, entry: tuple[int, int], borrower: int) -> int:
        return self.loans.setdefault((entry, borrower), len(self.loans))

    def _results(
        self,
        u: int,
        i: int,
        kind: str,
        program: Program,
        value_of: Callable[[ProgramValue], int],
    ) -> Iterable[Target]:
        """What goes to the user, and what is summed."""
        flat, d = self.values.programs.flat(u, i), self.values.units.device[u]
        # Equal stages share one trace, which knows the place of the first of them
        # alone.
        last = self.values.units.stages[u].last

        def output(name: Any, aval: jax.ShapeDtypeStruct) -> Any:
            self.outputs.setdefault(name, (aval, set()))[1].add(d)
            return name

        if kind == "F":
            for port, shape in flat.out.items():
                for k, aval in enumerate(shape.leaves):
                    leaf = Leaf(port, k)
                    if port.kind in ("loss", "weight", "aux") or (port == Y and last):
                        yield Write(output(leaf, aval), value_of(Output(leaf)))
                    elif port.kind == "state":
                        assert self.state is not None
                        yield SetState(
                            self.state.where[port.of, k][0], value_of(Output(leaf))
                        )
            return
        gradients = self.values.programs.joint(u, i).gradients
        if kind in "BI":
            known = dict(zip(flat.inputs, flat.shapes, strict=True))
            for leaf in gradients:
                outside = leaf.port in (SIDE, TARGETS) or (leaf.port == X and u == 0)
                if outside and leaf not in flat.constant:
                    name = output(
                        Leaf(Port("x" if leaf.port == X else leaf.port.kind), leaf.k),
                        known[leaf],
                    )
                    yield Write(name, value_of(Gradient(leaf)), add=leaf.port == SIDE)
        for ref in program.outs:
            if isinstance(ref, GradientSum):
                if ref.leaf.port.kind == "params":
                    source = self._param(u, (ref.leaf.port.of, ref.leaf.k))
                    yield Add(
                        "borrowed" if source.borrowed else "row",
                        source.row,
                        value_of(ref),
                    )
                else:
                    yield Add("input", (ref.leaf.port, ref.leaf.k), value_of(ref))

    # --- the table ---

    def _segment(self, ticks: Ticks) -> Segment:
        """The table of a scan."""
        entries = [_Entries() for _ in ticks.phases]
        for t, row in enumerate(ticks.rows):
            for p, phase in enumerate(row):
                for d, action in enumerate(phase):
                    if action is not None:
                        self._enter(action, t, d, entries[p])
        moves = [
            {key: self._moves(key[0], reads) for key, reads in own.read.items()}
            for own in entries
        ]
        # What is on its way before the first tick needs ticks of its own.
        lead = max(
            [0, *(-t for own in moves for feed in own.values() for t, _ in feed)]
        )
        every, width, slotted, arrivals, feeds = list(self._ops), 0, [], [], []
        for p, own in enumerate(entries):
            columns = itertools.count()
            slotted.append([])
            for n in sorted(own.ops, key=lambda n: own.ops[n]):
                op = dataclasses.replace(
                    every[n], name=_name(own.stages[n], every[n].kind)
                )
                slotted[p].append(Slotted(op, next(columns), next(columns)))
                for _ in range(max(len(args) for _, _, args in own.filled[n]) - 1):
                    next(columns)
            arrivals.append(
                [Arrival(name, next(columns), next(columns)) for name in own.arriving]
            )
            feeds.append(
                [
                    Feed(
                        *key,
                        tuple(sorted(own.arrays[key])),
                        self._reader(key[0]),
                        next(columns),
                        next(columns),
                    )
                    for key in moves[p]
                ]
            )
            width = max(width, next(columns))
        table = np.zeros(
            (self.values.devices, lead + len(ticks.rows), len(ticks.phases), width),
            np.int32,
        )
        for p, own in enumerate(entries):
            for op, column, first in slotted[p]:
                for t, d, args in own.filled[self._ops[op]]:
                    table[d, lead + t, p, column] = 1
                    table[d, lead + t, p, first : first + len(args)] = args
            for name, column, used in arrivals[p]:
                table[:, :, p, column] = self.places.count[name]
                for t, d, n in own.arriving[name]:
                    table[d, lead + t, p, column] = n
                    table[:, lead + t, p, used] = 1
            for feed in feeds[p]:
                for t, row in moves[p][feed.port, feed.kind]:
                    table[:, lead + t, p, feed.column] = row
                    table[:, lead + t, p, feed.used] = 1
        actions = (
            ((None,) * self.values.devices,) * len(ticks.phases),
        ) * lead + ticks.rows
        return Segment(
            tuple(map(tuple, slotted)),
            tuple(map(tuple, arrivals)),
            tuple(map(tuple, feeds)),
            actions,
            table,
        )

    def _enter(self, action: Action, t: int, d: int, own: "_Entries") -> None:
        kind, s, i = action
        for u in self.values.units.of_stage[s]:
            programs = self.values.of(u, i)
            if kind not in programs:
                continue
            key = (u, id(self.values.programs.of(u, i)), kind)
            if key not in self._ready:
                self._ready[key] = self._make_ready(u, i, kind)
            ready = self._ready[key]
            if ready.op.code is not None or ready.op.targets:
                at = ("FBIW".index(kind), u if kind == "F" else -u)
                own.ops[ready.number] = min(own.ops.get(ready.number, at), at)
                own.stages[ready.number].add(s)
                own.filled[ready.number].append(
                    (t, d, [self._number(a, d, i) for a in ready.args])
                )
                for port, k in ready.spread:
                    own.read[port, kind][t] = i
                    own.arrays[port, kind].add(k)
            for value in self.values.made(u, i, kind):
                for e in {
                    self.values.units.device[r] for r in self.values.readers(value, i)
                } - {d}:
                    name = self.places.route[value, e]
                    if (name, e, value, i) in self.places.slot:
                        own.arriving[name].append(
                            (t, e, self.places.slot[name, e, value, i])
                        )

    def _reader(self, port: Port) -> int:
        """The device that reads `x` or the targets."""
        return self.values.units.device[0 if port == X else -1]

    def _moves(
        self, port: Port, reads: Mapping[int, int]
    ) -> list[tuple[int, list[int]]]:
        """When a feed moves, and what each device puts in: ticks before the first are
        negative.
        """
        times = sorted(reads)
        rows, early = steps(
            [reads[t] for t in times],
            self.values.m,
            self.values.devices,
            self._reader(port),
        )
        return list(
            zip([*range(times[0] - early, times[0]), *times], rows, strict=True)
        )

    def _number(self, arg: Any, d: int, i: int) -> int:
        if arg is None:
            return i
        if arg[0] == "number":
            return arg[2]
        name, value = arg
        return self.places.slot.get((name, d, value, i), self.places.count[name])

    def machine(self) -> Machine:
        """All of it."""
        segments = tuple(self._segment(ticks) for ticks in self.ticks)
        pools = {
            # What stays in its unit is always read; for the rest there is a slot of
            # what nobody reads.
            name: Pool(
                n + (name.kind in ("forward", "backward")),
                tuple(self.places.shapes[name]),
            )
            for name, n in self.places.count.items()
        }
        # With a phase for each direction every wire carries something in nearly every
        # tick. It then runs unasked, which lets XLA move it beside the other phase.
        always = all(len(ticks.phases) == 2 for ticks in self.ticks)
        wires = {
            name: Wire(
                tuple(sorted(self.places.pairs[name])), pools[name].avals, always
            )
            for name in self.places.pairs
            if name in pools
        }
        adds = [
            t
            for segment in segments
            for phase in segment.ops
            for op, *_ in phase
            for t in op.targets
        ]
        found = {t.of for t in adds if isinstance(t, Add) and t.to == "input"}
        loans = [
            Loan(
                self.params.where[entry][0],
                self.params.where[entry][1],
                borrower,
                self.params.shape(entry),
            )
            for entry, borrower in self.loans
        ]
        return Machine(
            self.values.devices,
            self.values.m,
            segments,
            pools,
            wires,
            self.params,
            self.state,
            tuple(loans),
            {
                name: (aval, frozenset(devices))
                for name, (aval, devices) in self.outputs.items()
            },
            {
                of: self.values.inputs.of(of[0]).leaves[of[1]]
                for of in sorted(found, key=str)
            },
            self.spread,
            tuple(self.values.programs.warnings),
        )


def _name(stages: Iterable[int], kind: str) -> str:
    """What profiles call an operation: `stage2 F`, or, where it serves several stages,
    `stage0-3 F`.
    """
    runs: list[list[int]] = []
    for s in sorted(stages):
        if runs and runs[-1][-1] == s - 1:
            runs[-1].append(s)
        else:
            runs.append([s])
    return f"stage{','.join(str(r[0]) if len(r) == 1 else f'{r[0]}-{r[-1]}' for r in runs)} {kind}"
