"""What the units of a call make and read: their programs, and the values that go
between them.
"""

from collections.abc import Hashable, Mapping
from typing import Any, TypeAlias, get_args

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
from fpipe._executors.scan.machine import Avals
from fpipe._executors.scan.units import Units
from fpipe._model.remat import Remat
from fpipe._model.stages import Leaf, Port, Stage, X, Y
from fpipe._program.code import (
    Code,
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
from fpipe._program.trace import FlatStage
from fpipe.schedules import Action, Kind, Schedule

# A bundle of arrays by name: `("f", unit, port)` is a boundary or a skip that a unit
# makes, `("b", unit, port, source)` the cotangent that it makes for `source`, which
# calls the port so; `("saved", unit, None)` is what a forward keeps for its backward,
# and `("shared", unit, None)` what an `I` keeps for its `W`.
Value: TypeAlias = tuple[Any, ...]


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

    def _compile(self, s: int, code: Code) -> Any:
        del s
        return code


class Values:
    """The programs of a call's units, and what goes between them.

    Attributes:
        position: when each action runs, counted in phases.
        kinds: of actions, for each stage and microbatch.
        groups: microbatches for which every unit runs the same programs.
    """

    def __init__(
        self,
        units: Units,
        schedule: Schedule,
        remat: Remat,
        inputs: Inputs,
        request: Request,
        position: Mapping[Action, int],
        opened: bool,
        kept: Recent,
    ) -> None:
        self.units, self.inputs, self.request, self.m = (
            units,
            inputs,
            request,
            inputs.cut.m,
        )
        self.devices, self.position = schedule.devices, position
        rows = schedule.actions
        if request.mode == "vjp":
            rows = tuple(
                tuple(sorted(row, key=lambda a: a.kind != "F")) for row in rows
            )
        order = [a for row in rows for a in row]
        # Of several units of a stage only the last one's backward follows its forward
        # directly.
        direct = {
            (units.of_stage[s][-1], i)
            for s, i in direct_pairs(order, schedule.stage_to_device)
        }
        split = {(u, i) for s, i in split_pairs(order) for u in units.of_stage[s]}
        self.programs = UnitPrograms(
            units, opened, direct, split, remat, inputs, request, kept
        )
        self.kinds: dict[tuple[int, int], tuple[Kind, ...]] = {
            (s, i): tuple(k for k in get_args(Kind) if Action(k, s, i) in position)
            for s in range(len(units.of_stage))
            for i in range(self.m)
        }
        self._identities: dict[int, Hashable] = {}
        self._of: dict[tuple[int, int], Mapping[Any, Program]] = {}
        self.groups = self._groups()

    def of(self, u: int, i: int) -> Mapping[Any, Program]:
        """The programs of a unit that the schedule runs, by kind."""
        if (u, i) not in self._of:
            programs = self.programs.of(u, i)
            self._of[u, i] = {
                k: programs[k]
                for k in self.kinds[self.units.stage_of[u], i]
                if k in programs
            }
        return self._of[u, i]

    def _groups(self) -> list[list[int]]:
        """Microbatches for which every unit runs the same programs."""
        out: dict[Hashable, list[int]] = {}
        for i in range(self.m):
            programs = [
                id(self.programs.of(u, i)) for u in range(len(self.units.stages))
            ]
            kinds = [self.kinds[s, i] for s in range(len(self.units.of_stage))]
            out.setdefault((*programs, *kinds), []).append(i)
        return list(out.values())

    def resolved(self, u: int, i: int, kind: str, ref: ProgramValue) -> ProgramValue:
        """What a reference stands for that is another value as it is."""
        programs = self.of(u, i)
        for k in {"F": "F", "B": "FB", "I": "FI", "W": "FIW"}[kind]:
            same = programs[k].aliases if k in programs else {}
            while ref in same:
                ref = same[ref]
        return ref

    def fetched(self, u: int, i: int, kind: str) -> list[ProgramValue]:
        """What a program takes from outside, each once."""
        program = self.of(u, i)[kind]
        passed = [
            r
            for r in (self.resolved(u, i, kind, v) for v in program.aliases.values())
            if r not in program.outs
        ]
        taken = [
            self.resolved(u, i, kind, ref)
            for ref in program.ins
            if not isinstance(ref, GradientSum)
        ]
        return list(dict.fromkeys([*taken, *passed]))

    def saved(self, u: int, i: int) -> tuple[list[ProgramValue], list[ProgramValue]]:
        """What the forward keeps for the backward, and `I` for `W`."""
        first: dict[ProgramValue, None] = {}
        second: dict[ProgramValue, None] = {}
        for kind in self.of(u, i):
            for ref in self.fetched(u, i, kind) if kind != "F" else ():
                state = isinstance(ref, Input) and ref.leaf.port.kind == "state"
                if isinstance(ref, Residual | Output) or state:
                    first[ref] = None
                elif isinstance(ref, Handed | Gradient):
                    second[ref] = None
        return list(first), list(second)

    def bundle(self, value: Value, i: int) -> tuple[list[ProgramValue], Avals]:
        """What a value consists of, as its maker calls it."""
        direction, u, port, *_ = value
        if direction == "f":
            shapes = self.programs.flat(u, i).out[port].leaves
            return [Output(Leaf(port, k)) for k in range(len(shapes))], tuple(
                map(_plain, shapes)
            )
        if direction == "b":
            name = X if port == Y else port
            flat = self.programs.flat(u, i)
            known = dict(zip(flat.inputs, flat.shapes, strict=True))
            leaves = [
                leaf
                for leaf in known
                if leaf.port == name and leaf in self.programs.joint(u, i).gradients
            ]
            return [Gradient(leaf) for leaf in leaves], tuple(
                _plain(known[leaf]) for leaf in leaves
            )
        refs = self.saved(u, i)[direction == "shared"]
        return refs, tuple(self.aval(u, i, ref) for ref in refs)

    def aval(self, u: int, i: int, ref: ProgramValue) -> jax.ShapeDtypeStruct:
        """The shape of what is kept."""
        flat = self.programs.flat(u, i)
        if isinstance(ref, Input):
            return _plain(dict(zip(flat.inputs, flat.shapes, strict=True))[ref.leaf])
        if isinstance(ref, Output):
            return _plain(flat.out[ref.leaf.port].leaves[ref.leaf.k])
        program = self.of(u, i)["F" if isinstance(ref, Residual) else "I"]
        code = program.code
        assert code is not None
        return _plain(code.graph.avals[code.outs[program.outs.index(ref)]])

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
        """The boundaries, skips and cotangents that a unit's program makes for other
        units, boundaries first.
        """
        stage = self.units.stages[u]
        if kind == "F":
            ports = [
                *([] if stage.last else [Y]),
                *(Port("skip", s) for s in stage.skips_out),
            ]
            return [("f", u, port) for port in ports]
        out = []
        if kind in "BI" and kind in self.of(u, i):
            ports = {leaf.port for leaf in self.programs.joint(u, i).gradients}
            if X in ports and u > 0:
                out.append(("b", u, Y, u - 1))
            skips = [skip for skip in stage.skips_in if Port("skip", skip) in ports]
            out += [
                ("b", u, Port("skip", skip), self.programs.layout.source_of(skip))
                for skip in skips
            ]
        return out

    def reads(self, t: int, i: int, kind: str, value: Value) -> bool:
        """Whether a unit's program reads a value that was made for it."""
        if kind not in self.of(t, i):
            return False
        direction, u, port, *_ = value
        for ref in self.fetched(t, i, kind):
            if direction == "f" and isinstance(ref, Input):
                if ref.leaf.port == (X if port == Y else port):
                    return True
            elif direction == "b" and isinstance(ref, Cotangent):
                if (
                    ref.leaf.port == port
                    and self.programs.readers(t, ref.leaf, i)[ref.number][0] == u
                ):
                    return True
            elif (
                direction in ("saved", "shared")
                and ref in self.saved(t, i)[direction == "shared"]
            ):
                return True
        return False

    def relative(self, u: int, ref: ProgramValue) -> Hashable:
        """A reference without the names of layers and skips."""
        if isinstance(ref, Residual | Handed):
            return ref
        (kind, of), k = ref.leaf
        stage = self.units.stages[u]
        if kind in ("params", "number"):
            of = stage.params.index(of)
        elif kind == "state":
            of = stage.stateful.index(of)
        elif kind == "skip":
            of = (
                of in stage.skips_in,
                (stage.skips_in if of in stage.skips_in else stage.skips_out).index(of),
            )
        number = ref.number if isinstance(ref, Cotangent) else 0
        return type(ref), kind, of, k, number

    def identity(self, u: int, i: int) -> Hashable:
        """Equal for units and microbatches whose programs compute the same."""
        programs = self.of(u, i)
        key = id(self.programs.of(u, i))
        if key not in self._identities:
            parts = []
            for kind, p in programs.items():
                name = lambda refs: tuple(self.relative(u, r) for r in refs)  # noqa: E731
                code = None if p.code is None else p.code.identity
                same = tuple(
                    (self.relative(u, a), self.relative(u, b))
                    for a, b in p.aliases.items()
                )
                parts.append((kind, code, name(p.ins), name(p.outs), same))
            self._identities[key] = Key(tuple(parts))
        return self._identities[key]


def _plain(a: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype: what is weak about a type is of no matter where it waits."""
    return jax.ShapeDtypeStruct(a.shape, a.dtype)
