"""What the units of a call make and read, and what therefore travels and waits.

In: units, a schedule, and a call. Out: groups of microbatches for which every unit runs
the same programs, and for each group the *bundles*: arrays that travel and wait
together. Two equal layers on two devices, whose backwards recompute, are four units
(0: input, 1 and 2: the layers, 3: loss):

    value                        made by      read by
    ActivationValue(0, y)        F of unit 0  F and B of unit 1      stays on device 0
    ActivationValue(1, y)        F of unit 1  F and B of unit 2      goes to device 1
    ActivationValue(2, y)        F of unit 2  F and B of unit 3      stays on device 1
    CotangentValue(3, y, 2)      B of unit 3  B of unit 2            stays on device 1
    CotangentValue(2, y, 1)      B of unit 2  B of unit 1            goes to device 0
    CotangentValue(1, y, 0)      B of unit 1  nobody: unit 0 has no parameters

What a forward keeps for its backward is a bundle too, and so is what `I` hands to `W`.
"""

import dataclasses
from collections.abc import Hashable, Iterator, Mapping
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar, get_args

import jax

from fpipe._core.caches import Key, Recent
from fpipe._core.pytrees import is_inexact
from fpipe._executors.programs import (
    Inputs,
    Layout,
    Programs,
    Request,
    direct_pairs,
    split_pairs,
)
from fpipe._executors.request import CallKind
from fpipe._executors.scan.machine import Avals
from fpipe._executors.scan.units import Units
from fpipe._model.remat import Remat
from fpipe._model.stages import Leaf, Port, Stage, X, Y
from fpipe._program.code import (
    Cotangent,
    Gradient,
    Handed,
    Input,
    Output,
    Program,
    ProgramValue,
    Residual,
)
from fpipe._program.trace import FlatStage, JointStage
from fpipe.schedules import Action, Kind, Schedule

KINDS: tuple[Kind, ...] = get_args(Kind)

# The programs that may have made what a program takes, itself included: an alias in one
# of them is followed.
EARLIER: Mapping[Kind, tuple[Kind, ...]] = {
    "F": ("F",),
    "B": ("F", "B"),
    "I": ("F", "I"),
    "W": ("F", "I", "W"),
}


# --- values: what travels or waits as one bundle ---


@dataclasses.dataclass(frozen=True, slots=True)
class ActivationValue:
    """A boundary or a skip that a unit's forward makes."""

    unit: int
    port: Port


@dataclasses.dataclass(frozen=True, slots=True)
class CotangentValue:
    """The cotangent that a unit's backward makes for the unit `source`, which calls
    what it is of `port`.
    """

    unit: int
    port: Port
    source: int


@dataclasses.dataclass(frozen=True, slots=True)
class SavedValue:
    """What a unit's forward keeps for its backward."""

    unit: int


@dataclasses.dataclass(frozen=True, slots=True)
class HandedValue:
    """What a unit's `I` hands to its `W`."""

    unit: int


# What goes to other units, and what stays in its own.
SentValue: TypeAlias = ActivationValue | CotangentValue
KeptValue: TypeAlias = SavedValue | HandedValue
Value: TypeAlias = SentValue | KeptValue
V = TypeVar("V", bound=Value)


class Reader(NamedTuple):
    """A unit that a bundle is made for, and the kinds of its actions that read it; it
    may have none.
    """

    unit: int
    kinds: tuple[Kind, ...]


class Bundle(NamedTuple, Generic[V]):
    """A value, as the microbatches of one group have it.

    Attributes:
        kind: of the action that makes it.
        arrays: what it consists of, as its maker calls them.
    """

    value: V
    kind: Kind
    arrays: tuple[ProgramValue, ...]
    avals: Avals
    readers: tuple[Reader, ...]


# --- programs ---


class UnitPrograms(Programs):
    """Programs as bare code, which takes pieces and adds nothing up."""

    whole = False

    def __init__(self, units: Units, opened: bool, *args: Any) -> None:
        self._roles, self.opened = units.roles, opened
        super().__init__(Layout(units.stages, ()), *args)

    def _wanted(
        self, stage: Stage, flat: FlatStage, reach: Mapping[tuple[int, Leaf], bool]
    ) -> frozenset[Leaf]:
        """A core's input gradient is always made: the first core is then the same
        program as the others, and a tick takes as long as theirs anyway.
        """
        wanted = super()._wanted(stage, flat, reach)
        if self._roles[stage.index] != "core" or not self.request.wanted:
            return wanted
        pairs = zip(flat.inputs, flat.shapes, strict=True)
        return wanted | {leaf for leaf, a in pairs if leaf.port == X and is_inexact(a)}

    def _compile(self, s: int, code: Any) -> Any:
        del s
        return code


@dataclasses.dataclass(frozen=True, eq=False)
class UnitWork:
    """What a unit does for each microbatch of a group.

    Attributes:
        programs: those that the schedule runs.
        recomputes: whether its backward recomputes its forward.
    """

    stage: Stage
    flat: FlatStage
    joint: JointStage
    programs: Mapping[Kind, Program]
    recomputes: bool

    @cached_property
    def input_shapes(self) -> Mapping[Leaf, jax.ShapeDtypeStruct]:
        """The shapes of the leaves that enter."""
        return dict(zip(self.flat.inputs, self.flat.shapes, strict=True))

    def resolve(self, kind: Kind, value: ProgramValue) -> ProgramValue:
        """What a program takes or returns; if that is another value as it is, that
        one.
        """
        for earlier in EARLIER[kind]:
            if earlier in self.programs:
                aliases = self.programs[earlier].aliases
                while value in aliases:
                    value = aliases[value]
        return value

    @cached_property
    def taken(self) -> Mapping[Kind, tuple[ProgramValue, ...]]:
        """What each program takes from outside, each once: for its code, or to pass it
        on.
        """
        taken = {}
        for kind, program in self.programs.items():
            values = [self.resolve(kind, value) for value in program.ins]
            for value in program.aliases.values():
                passed = self.resolve(kind, value)
                if passed not in program.outs:
                    values.append(passed)
            taken[kind] = tuple(dict.fromkeys(values))
        return taken

    @cached_property
    def saved(self) -> tuple[ProgramValue, ...]:
        """What the forward keeps for the backward."""
        saved: dict[ProgramValue, None] = {}
        for kind, values in self.taken.items():
            for value in values if kind != "F" else ():
                # A recomputation uses the state that its forward saw.
                state = isinstance(value, Input) and value.leaf.port.kind == "state"
                if state or isinstance(value, Residual | Output):
                    saved[value] = None
        return tuple(saved)

    @cached_property
    def handed(self) -> tuple[ProgramValue, ...]:
        """What `I` hands to `W`."""
        taken = self.taken.get("W", ())
        return tuple(v for v in taken if isinstance(v, Handed | Gradient))

    def aval(self, value: ProgramValue) -> jax.ShapeDtypeStruct:
        """The shape of what is kept. What is weak about its type is of no matter where
        it waits.
        """
        if isinstance(value, Input):
            found: Any = self.input_shapes[value.leaf]
        elif isinstance(value, Output):
            found = self.flat.out[value.leaf.port].leaves[value.leaf.k]
        else:
            program = self.programs["F" if isinstance(value, Residual) else "I"]
            assert program.code is not None
            n = program.code.outs[program.outs.index(value)]
            found = program.code.graph.avals[n]
        return jax.ShapeDtypeStruct(found.shape, found.dtype)

    @cached_property
    def identity(self) -> Hashable:
        """Equal for units whose programs compute the same, from and to the same."""
        parts = []
        for kind, program in self.programs.items():
            code = None if program.code is None else program.code.identity
            ins = tuple(map(self.relative, program.ins))
            outs = tuple(map(self.relative, program.outs))
            aliases = tuple(
                (self.relative(a), self.relative(b)) for a, b in program.aliases.items()
            )
            parts.append((kind, code, ins, outs, aliases))
        return Key(tuple(parts))

    def relative(self, value: ProgramValue) -> Hashable:
        """A value without the names of layers and skips, so that equal units call it
        the same.
        """
        if isinstance(value, Residual | Handed):
            return value
        (kind, of), k = value.leaf
        stage = self.stage
        if kind in ("params", "number"):
            of = stage.params.index(of)
        elif kind == "state":
            of = stage.stateful.index(of)
        elif kind == "skip":
            comes = of in stage.skips_in
            skips = stage.skips_in if comes else stage.skips_out
            of = (comes, skips.index(of))
        number = value.number if isinstance(value, Cotangent) else 0
        return type(value), kind, of, k, number


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Microbatches for which every unit runs the same programs.

    Attributes:
        units: what each unit does.
        sent: what each unit makes for other units, by kind of action, boundaries first.
        kept: what each unit makes for its own later actions.
        bundles: all of them by value.
    """

    microbatches: tuple[int, ...]
    units: tuple[UnitWork, ...]
    sent: tuple[Mapping[Kind, tuple[Bundle[SentValue], ...]], ...]
    kept: tuple[Mapping[Kind, Bundle[KeptValue]], ...]
    bundles: Mapping[Value, Bundle[Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """The work of a call.

    Attributes:
        group_of: the group of each microbatch.
    """

    units: Units
    programs: UnitPrograms
    groups: tuple[Group, ...]
    group_of: tuple[Group, ...]

    def sent(self) -> Iterator[tuple[Group, Bundle[SentValue]]]:
        """All bundles that go to other units, in the order of their makers."""
        for u in range(len(self.units.stages)):
            for group in self.groups:
                for bundles in group.sent[u].values():
                    yield from ((group, bundle) for bundle in bundles)

    def made(self) -> Iterator[tuple[Group, Bundle[Any]]]:
        """All bundles, in the order of their makers."""
        for u in range(len(self.units.stages)):
            for group in self.groups:
                for kind, bundles in group.sent[u].items():
                    yield from ((group, bundle) for bundle in bundles)
                    if kind in group.kept[u]:
                        yield group, group.kept[u][kind]


def find_work(
    units: Units,
    schedule: Schedule,
    actions: Mapping[Action, int],
    remat: Remat,
    inputs: Inputs,
    request: Request,
    opened: bool,
    kept: Recent,
) -> Work:
    """Trace the units, and find what they make and read.

    Arguments:
        actions: those that run.
        opened: whether recomputations are inlined.
        kept: the traces of earlier calls.
    """
    rows = schedule.actions
    if request.kind is CallKind.PULL_BACK:
        # All forwards come first.
        rows = tuple(tuple(sorted(row, key=lambda a: a.kind != "F")) for row in rows)
    order = [action for row in rows for action in row]
    # Of several units of a stage only the last one's backward follows its forward
    # directly.
    direct = {
        (units.of_stage[s][-1], i)
        for s, i in direct_pairs(order, schedule.stage_to_device)
    }
    split = {(u, i) for s, i in split_pairs(order) for u in units.of_stage[s]}
    programs = UnitPrograms(units, opened, direct, split, remat, inputs, request, kept)
    microbatches: dict[Hashable, list[int]] = {}
    for i in range(inputs.cut.m):
        key: list[Hashable] = []
        for u, s in enumerate(units.stage_of):
            key.append(id(programs.of(u, i)))
            key += [Action(kind, s, i) in actions for kind in KINDS]
        microbatches.setdefault(tuple(key), []).append(i)
    groups = [
        _group(units, programs, actions, tuple(own)) for own in microbatches.values()
    ]
    group_of = {i: group for group in groups for i in group.microbatches}
    return Work(
        units,
        programs,
        tuple(groups),
        tuple(group_of[i] for i in range(inputs.cut.m)),
    )


def _group(
    units: Units,
    programs: UnitPrograms,
    actions: Mapping[Action, int],
    microbatches: tuple[int, ...],
) -> Group:
    i = microbatches[0]
    works = []
    for u, s in enumerate(units.stage_of):
        of_unit = programs.of(u, i)
        runs: dict[Kind, Program] = {
            kind: of_unit[kind]
            for kind in KINDS
            if kind in of_unit and Action(kind, s, i) in actions
        }
        works.append(
            UnitWork(
                units.stages[u],
                programs.flat(u, i),
                programs.joint(u, i),
                runs,
                programs.recomputes(u, i),
            )
        )

    def activation(u: int, port: Port) -> Bundle[SentValue]:
        """What a unit's forward makes at a port, with those who read it."""
        shapes = works[u].flat.out[port].leaves
        arrays = tuple(Output(Leaf(port, k)) for k in range(len(shapes)))
        name = X if port == Y else port
        if port == Y:
            readers = [u + 1]
        else:
            readers = [t.index for t in units.stages if port.of in t.skips_in]
        found = []
        for t in readers:
            kinds = [
                kind
                for kind, taken in works[t].taken.items()
                if any(isinstance(v, Input) and v.leaf.port == name for v in taken)
            ]
            found.append(Reader(t, tuple(kinds)))
        avals = tuple(map(works[u].aval, arrays))
        return Bundle(ActivationValue(u, port), "F", arrays, avals, tuple(found))

    def cotangent(u: int, kind: Kind, name: Port, source: int) -> Bundle[SentValue]:
        """What a unit's backward makes for what it calls `name`."""
        port = Y if name == X else name
        own = works[u]
        leaves = [
            leaf
            for leaf in own.input_shapes
            if leaf.port == name and leaf in own.joint.gradients
        ]
        kinds = []
        for reads, taken in works[source].taken.items():
            for v in taken:
                if isinstance(v, Cotangent) and v.leaf.port == port:
                    makers = programs.readers(source, v.leaf, i)
                    if makers[v.number][0] == u:
                        kinds.append(reads)
                        break
        return Bundle(
            CotangentValue(u, port, source),
            kind,
            tuple(map(Gradient, leaves)),
            tuple(own.aval(Input(leaf)) for leaf in leaves),
            (Reader(source, tuple(kinds)),),
        )

    sent = []
    kept = []
    by_value: dict[Value, Bundle[Any]] = {}
    for u, work in enumerate(works):
        stage = work.stage
        of_kind: dict[Kind, tuple[Bundle[SentValue], ...]] = {}
        keeps: dict[Kind, Bundle[KeptValue]] = {}
        for kind in work.programs:
            bundles: list[Bundle[SentValue]] = []
            if kind == "F":
                if not stage.last:
                    bundles.append(activation(u, Y))
                bundles += [activation(u, Port("skip", s)) for s in stage.skips_out]
            elif kind in "BI":
                ports = {leaf.port for leaf in work.joint.gradients}
                if X in ports and u > 0:
                    bundles.append(cotangent(u, kind, X, u - 1))
                for skip in stage.skips_in:
                    if Port("skip", skip) in ports:
                        source = programs.layout.source_of(skip)
                        bundles.append(cotangent(u, kind, Port("skip", skip), source))
            of_kind[kind] = tuple(bundles)
            arrays: tuple[ProgramValue, ...] = ()
            value: KeptValue = SavedValue(u)
            if kind == "F":
                arrays = work.saved
            elif kind == "I":
                arrays = work.handed
                value = HandedValue(u)
            if arrays:
                reads = [
                    other
                    for other, taken in work.taken.items()
                    if any(v in arrays for v in taken)
                ]
                avals = tuple(map(work.aval, arrays))
                keeps[kind] = Bundle(
                    value, kind, arrays, avals, (Reader(u, tuple(reads)),)
                )
        sent.append(of_kind)
        kept.append(keeps)
        by_value |= {b.value: b for bundles in of_kind.values() for b in bundles}
        by_value |= {b.value: b for b in keeps.values()}
    return Group(microbatches, tuple(works), tuple(sent), tuple(kept), by_value)
