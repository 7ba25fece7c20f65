"""What the units of a call make and read, and what therefore travels and waits.

In: units, a schedule, and a call. Out: groups of microbatches for which every unit runs
the same programs, and for each group the *bundles*: arrays that travel and wait
together. Two equal layers on two devices, whose backwards recompute, are four units
(0: the input, 1 and 2: the layers, 3: the loss):

    value                      made by      read by
    ActivationValue(0, y)      F of unit 0  F and B of unit 1    stays on device 0
    ActivationValue(1, y)      F of unit 1  F and B of unit 2    goes to device 1
    ActivationValue(2, y)      F of unit 2  F of unit 3          stays on device 1
    SavedValue(3)              F of unit 3  B of unit 3          stays in the unit
    CotangentValue(3, y, 2)    B of unit 3  B of unit 2          stays on device 1
    CotangentValue(2, y, 1)    B of unit 2  B of unit 1          goes to device 0
    CotangentValue(1, y, 0)    B of unit 1  nobody: unit 0 has no parameters

The loss recomputes nothing: its backward follows its forward directly. What its
forward keeps for that is a bundle too, and so is what an `R` makes again for its
backward, and what an `I` hands to its `W`.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar, get_args

import jax

from fpipe._core.caches import Key, Recent
from fpipe._core.pytrees import HostShape, on_host
from fpipe._executors.programs import (
    ProgramForm,
    Programs,
    apart_pairs,
    direct_pairs,
    split_pairs,
)
from fpipe._executors.request import CallKind, Inputs, Request
from fpipe._executors.routes import Routes
from fpipe._executors.scan.machine import Avals
from fpipe._executors.scan.units import Units
from fpipe._model.remat import Remat
from fpipe._model.stages import Leaf, Port, Stage, X, Y
from fpipe._program.code import (
    Cotangent,
    Gradient,
    Handed,
    Input,
    Inside,
    Output,
    Program,
    ProgramValue,
    Recomputed,
    Residual,
)
from fpipe._program.trace import FlatStage, JointStage
from fpipe.schedules import Action, Kind, Schedule

KINDS: tuple[Kind, ...] = get_args(Kind)

# The programs that may have made what a program takes, itself included: an alias in one
# of them is followed. If a forward returns its input as it is, its backward takes that
# input, under whichever name it asks.
EARLIER: Mapping[Kind, tuple[Kind, ...]] = {
    "F": ("F",),
    "R": ("F", "R"),
    "B": ("F", "R", "B"),
    "I": ("F", "R", "I"),
    "W": ("F", "R", "I", "W"),
}


# --- values: what travels or waits as one bundle ---


@dataclasses.dataclass(frozen=True, slots=True)
class ActivationValue:
    """A boundary or a skip that a unit's forward makes."""

    unit: int
    port: Port


@dataclasses.dataclass(frozen=True, slots=True)
class CotangentValue:
    """The cotangent that a unit's backward makes for the unit `source`.

    Attributes:
        unit: whose backward makes it.
        port: what the cotangent is of, as `source` calls it: its `y`, or a skip.
        source: the unit whose backward takes it.
    """

    unit: int
    port: Port
    source: int


@dataclasses.dataclass(frozen=True, slots=True)
class SavedValue:
    """What a unit's forward keeps for its backward."""

    unit: int


@dataclasses.dataclass(frozen=True, slots=True)
class RecomputedValue:
    """What a unit's `R` makes again for its backward."""

    unit: int


@dataclasses.dataclass(frozen=True, slots=True)
class HandedValue:
    """What a unit's `I` hands to its `W`."""

    unit: int


# What goes to other units, and what stays in its own.
SentValue: TypeAlias = ActivationValue | CotangentValue
KeptValue: TypeAlias = SavedValue | RecomputedValue | HandedValue
Value: TypeAlias = SentValue | KeptValue
V = TypeVar("V", bound=Value)


class Reader(NamedTuple):
    """A unit that a bundle is made for, and the kinds of its actions that read it.

    There may be none: equal units make the same, also where nobody needs it. The first
    core makes a cotangent for the end before it, which may have no parameters.
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


@dataclasses.dataclass(frozen=True, eq=False)
class UnitWork:
    """What a unit does for each microbatch of a group.

    Attributes:
        flat: its forward, traced, as a function of flat arrays.
        joint: its forward and backward as one graph.
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
        """The value that a program takes or returns, whatever name it has there: if it
        is an alias, what it is an alias of, back through the unit's earlier programs.
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
        # A value that goes through as it is, such as a skip that is also the boundary,
        # is no output of the program (`jit` would copy it), but the operation has to
        # have it to send it on.
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
        # Boundaries and skips that come in are not kept again: they stay in the slot
        # where they arrived until the backward has read them there.
        saved: dict[ProgramValue, None] = {}
        for kind, values in self.taken.items():
            if kind == "F":
                continue
            for value in values:
                # A recomputation uses the state that its forward saw; what is the same
                # for all microbatches is still there.
                state = (
                    isinstance(value, Input)
                    and value.leaf.port.kind == "state"
                    and value.leaf not in self.flat.constant
                )
                if state or isinstance(value, Residual | Output):
                    saved[value] = None
        return tuple(saved)

    @cached_property
    def recomputed(self) -> tuple[ProgramValue, ...]:
        """What `R` makes again for the backward."""
        program = self.programs.get("R")
        return () if program is None else program.outs

    @cached_property
    def handed(self) -> tuple[ProgramValue, ...]:
        """What `I` hands to `W`."""
        taken = self.taken.get("W", ())
        return tuple(v for v in taken if isinstance(v, Handed | Gradient))

    def aval(self, value: ProgramValue) -> jax.ShapeDtypeStruct:
        """The shape of what is kept, without weak types: whether a type is weak does
        not change what lies in a slot, but would make two kinds of bundles of one.
        """
        if isinstance(value, Input):
            found: Any = self.input_shapes[value.leaf]
        elif isinstance(value, Output):
            found = self.flat.out[value.leaf.port].leaves[value.leaf.number]
        else:
            kinds: dict[Any, Kind] = {Residual: "F", Recomputed: "R"}
            program = self.programs[kinds.get(type(value), "I")]
            assert program.code is not None
            n = program.code.outs[program.outs.index(value)]
            found = program.code.graph.avals[n]
        kind = HostShape if on_host(found) else jax.ShapeDtypeStruct
        return kind(found.shape, found.dtype)

    @cached_property
    def identity(self) -> Hashable:
        """Equal for units whose programs compute the same, and call what they read and
        make by the same names.

        This decides which units share an operation. Layers are not compared: the Python
        functions of two layers may be different objects and compute the same.
        """
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
        the same: not "array 0 of layer 5" but "array 0 of the unit's first layer".
        """
        if isinstance(value, Inside):
            return value
        (kind, of), k = value.leaf
        stage = self.stage
        if kind in ("params", "number"):
            of = stage.param_layers.index(of)
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

    There is often one group. There are more if some backwards recompute and others do
    not (`checkpoint="except_last"`, or a backward that follows its forward directly),
    if a schedule splits only some backwards into `I` and `W`, or if microbatches differ
    in shape (the last one may be smaller). Operations are made for each group, so there
    should be few.

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
        programs: those of the call, by unit and microbatch.
        groups: all of them, in the order of their first microbatches.
        group_of: the group of each microbatch.
    """

    units: Units
    programs: Programs
    groups: tuple[Group, ...]
    group_of: tuple[Group, ...]

    def sent(self) -> Iterator[tuple[Group, Bundle[SentValue]]]:
        """All bundles that go to other units, in the order of their makers."""
        for u in range(len(self.units.stages)):
            for group in self.groups:
                for bundles in group.sent[u].values():
                    for bundle in bundles:
                        yield group, bundle

    def made(self) -> Iterator[tuple[Group, Bundle[Any]]]:
        """All bundles, in the order of their makers."""
        for u in range(len(self.units.stages)):
            for group in self.groups:
                for kind, bundles in group.sent[u].items():
                    for bundle in bundles:
                        yield group, bundle
                    if kind in group.kept[u]:
                        yield group, group.kept[u][kind]


def find_work(
    units: Units,
    schedule: Schedule,
    actions: Iterable[Action],
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
    # Which backwards follow their forward directly, and so recompute nothing, depends
    # on the order in which the actions really run.
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
    apart = {(u, i) for s, i in apart_pairs(order) for u in units.of_stage[s]}
    form = ProgramForm(
        whole_inputs=False,
        inline_remats=opened,
        # A core's input gradient is always made: the first core is then the same
        # program as the others, and a tick takes as long as theirs anyway.
        input_gradients=frozenset(
            u for u, role in enumerate(units.roles) if role == "core"
        ),
    )
    programs = Programs(
        Routes(units.stages), form, direct, split, apart, remat, inputs, request, kept
    )
    # The kinds that run: a call without gradients has the forwards alone.
    kinds: dict[tuple[int, int], set[Kind]] = defaultdict(set)
    for action in actions:
        kinds[action.stage, action.microbatch].add(action.kind)
    microbatches: dict[Hashable, list[int]] = defaultdict(list)
    # Two microbatches are in one group if they agree in every unit. What units make for
    # each other then fits together, and no pair of groups has to be compared.
    # `programs.of` returns the same object for equal programs.
    for i in range(inputs.cut.m):
        ran = [frozenset(kinds[s, i]) for s in range(len(units.of_stage))]
        traced = [id(programs.of(u, i)) for u in range(len(units.stages))]
        # All are of one shape, because pieces of inputs are stacked by shape.
        microbatches[inputs.cut.like[i], *ran, *traced].append(i)
    groups = []
    for own in microbatches.values():
        ran = [kinds[s, own[0]] for s in units.stage_of]
        groups.append(_group(units, programs, ran, tuple(own)))
    group_of = {i: group for group in groups for i in group.microbatches}
    return Work(
        units,
        programs,
        tuple(groups),
        tuple(group_of[i] for i in range(inputs.cut.m)),
    )


def _group(
    units: Units,
    programs: Programs,
    kinds: Sequence[Set[Kind]],
    microbatches: tuple[int, ...],
) -> Group:
    """What the units do, make and read for a group of microbatches.

    Arguments:
        kinds: of the actions of each unit.
    """
    # The first microbatch stands for all.
    i = microbatches[0]
    # What each unit runs,
    works = []
    for u, ran in enumerate(kinds):
        of_unit = programs.of(u, i)
        runs: dict[Kind, Program] = {
            kind: of_unit[kind] for kind in KINDS if kind in ran and kind in of_unit
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
    # and only then what it makes: who reads it is known from the programs of others.
    sent = []
    kept = []
    by_value: dict[Value, Bundle[Any]] = {}
    for u, unit in enumerate(works):
        of_kind: dict[Kind, tuple[Bundle[SentValue], ...]] = {}
        keeps: dict[Kind, Bundle[KeptValue]] = {}
        for kind in unit.programs:
            if kind == "F":
                of_kind[kind] = _activations(programs, works, u)
                keeps |= _kept(kind, SavedValue(u), unit, unit.saved)
            else:
                of_kind[kind] = ()
            if kind in "BI":
                of_kind[kind] = _cotangents(programs, works, u, kind, i)
            if kind == "R":
                keeps |= _kept(kind, RecomputedValue(u), unit, unit.recomputed)
            if kind == "I":
                keeps |= _kept(kind, HandedValue(u), unit, unit.handed)
        sent.append(of_kind)
        kept.append(keeps)
        by_value |= {b.value: b for bundles in of_kind.values() for b in bundles}
        by_value |= {b.value: b for b in keeps.values()}
    return Group(microbatches, tuple(works), tuple(sent), tuple(kept), by_value)


def _activations(
    programs: Programs, works: Sequence[UnitWork], u: int
) -> tuple[Bundle[SentValue], ...]:
    """What a unit's forward makes for others: its boundary, and the skips."""
    unit = works[u]
    ports = [] if unit.stage.last else [Y]
    ports += [Port("skip", skip) for skip in unit.stage.skips_out]
    bundles = []
    for port in ports:
        leaves = range(len(unit.flat.out[port].leaves))
        arrays = tuple(Output(Leaf(port, k)) for k in leaves)
        readers = []
        for reader, name in programs.routes.readers(u, port):
            kinds: list[Kind] = [
                kind
                for kind, taken in works[reader].taken.items()
                if any(isinstance(v, Input) and v.leaf.port == name for v in taken)
            ]
            readers.append(Reader(reader, tuple(kinds)))
        avals = tuple(map(unit.aval, arrays))
        value = ActivationValue(u, port)
        bundles.append(Bundle(value, "F", arrays, avals, tuple(readers)))
    return tuple(bundles)


def _cotangents(
    programs: Programs, works: Sequence[UnitWork], u: int, kind: Kind, i: int
) -> tuple[Bundle[SentValue], ...]:
    """What a unit's backward makes for the makers of its boundary and its skips."""
    unit = works[u]
    bundles = []
    for name in (X, *(Port("skip", skip) for skip in unit.stage.skips_in)):
        maker = programs.routes.source(u, name)
        leaves = [
            leaf
            for leaf in unit.flat.inputs
            if leaf.port == name and leaf in unit.joint.gradients
        ]
        # The gradient of what the call gives is an output, and goes to nobody.
        if maker is None or not leaves:
            continue
        # Of several units that read a skip, the maker takes a cotangent of each.
        kinds = []
        for reads, taken in works[maker.stage].taken.items():
            own = [
                programs.readers(maker.stage, v.leaf, i)[v.number][0]
                for v in taken
                if isinstance(v, Cotangent) and v.leaf.port == maker.port
            ]
            if u in own:
                kinds.append(reads)
        arrays = tuple(map(Gradient, leaves))
        avals = tuple(unit.aval(Input(leaf)) for leaf in leaves)
        value = CotangentValue(u, maker.port, maker.stage)
        readers = (Reader(maker.stage, tuple(kinds)),)
        bundles.append(Bundle(value, kind, arrays, avals, readers))
    return tuple(bundles)


def _kept(
    kind: Kind, value: KeptValue, unit: UnitWork, arrays: tuple[ProgramValue, ...]
) -> dict[Kind, Bundle[KeptValue]]:
    """What an action keeps for later ones of its unit, if it is anything."""
    if not arrays:
        return {}
    reads: list[Kind] = [
        other for other, taken in unit.taken.items() if any(v in arrays for v in taken)
    ]
    avals = tuple(map(unit.aval, arrays))
    readers = (Reader(value.unit, tuple(reads)),)
    return {kind: Bundle(value, kind, arrays, avals, readers)}
