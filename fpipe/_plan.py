"""The plan: a schedule, stages and routes lowered to one ordered list of instructions.

A *slot* is a register for one array. An instruction runs a program from slots to slots, moves slots to
another place, or frees slots. Arrays are moved when their consumer is about to run: straight from the
place that made them, once per place that reads them, and never where they are already.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from fpipe._microbatch import Split, join
from fpipe._placement import Placement
from fpipe._stage import (
    AUX,
    INDEX,
    KEY,
    LOSS,
    SIDE,
    TARGETS,
    WEIGHT,
    Leaf,
    Loss,
    Port,
    Program,
    Ref,
    Shape,
    Stage,
    Traced,
    X,
    Y,
    forward_and_backward,
    sum_dtype,
    trace_stage,
)
from fpipe._tree import aval, is_inexact
from fpipe.schedules import Action, Schedule, simulate


@dataclasses.dataclass(frozen=True)
class Run:
    """Run a program on its place. `action` is `None` for the work around the schedule."""

    name: str
    call: Callable[..., Sequence[Any]]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    place: Placement
    action: Action | None = None


@dataclasses.dataclass(frozen=True)
class Move:
    """Put arrays on another place."""

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    place: Placement


@dataclasses.dataclass(frozen=True)
class Free:
    """Drop references."""

    slots: tuple[int, ...]


Instruction: TypeAlias = Run | Move | Free


class Slot(NamedTuple):
    """What a slot holds, and where."""

    name: str
    place: Placement


class Feed(NamedTuple):
    """An input of the call: a leaf, and the slot that it is put in."""

    leaf: Leaf
    slot: int


@dataclasses.dataclass(frozen=True)
class Request:
    """What a call asks for; with the shapes of its inputs it decides the plan.

    Attributes:
        mode: `"forward"`, `"loss"`, `"grad"` (both of a loss, interleaved as the schedule says) or `"vjp"`
            (all forwards, then all backwards from given cotangents of `y`).
        wanted: input leaves (of whole inputs, before they are cut) whose gradient is asked for.
    """

    mode: str
    train: bool
    loss: Loss | None
    wanted: frozenset[Leaf]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The shapes of a call's inputs: whole ports, and how they are cut."""

    params: tuple[Shape, ...]
    cut: Mapping[Port, tuple[Shape, Split]]  # x, side, targets
    state: tuple[Shape, ...] | None
    key: Shape | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Instructions in order, and the slots of what comes in and goes out.

    Attributes:
        instructions: everything, in the order in which it is issued.
        slots: what each slot holds.
        feeds: the inputs.
        constants: slots with a value known when planning.
        backward: the index of the first instruction of the backward half (`"vjp"`).
        cotangents: the slots that take the cotangents of `y` (`"vjp"`).
        y, state, loss, aux: slots of the outputs, with their structure.
        gradients: for each wanted leaf the slot of its gradient.
        warnings: what the user should know.
    """

    instructions: tuple[Instruction, ...]
    slots: tuple[Slot, ...]
    feeds: tuple[Feed, ...]
    constants: Mapping[int, Any]
    backward: int
    cotangents: tuple[int, ...]
    y: tuple[Shape, tuple[int, ...]] | None
    state: tuple[tuple[Shape, tuple[int, ...]] | None, ...]
    loss: int | None
    aux: tuple[Shape, tuple[int, ...]] | None
    gradients: Mapping[Leaf, int]
    warnings: tuple[str, ...]

    def actions(self) -> list[Action]:
        """The actions in the order in which they are issued."""
        return [r.action for r in self.instructions if isinstance(r, Run) and r.action is not None]

    def __str__(self) -> str:
        def show(numbers: Iterable[int]) -> str:
            return ", ".join(self.slots[n].name for n in numbers)

        lines = []
        for item in self.instructions:
            if isinstance(item, Run):
                lines.append(f"{item.place.device}: {item.action or item.name} ({show(item.ins)}) -> {show(item.outs)}")
            elif isinstance(item, Move):
                lines.append(f"{self.slots[item.ins[0]].place.device} -> {item.place.device}: {show(item.ins)}")
            else:
                lines.append(f"free {show(item.slots)}")
        return "\n".join(lines)


def issue_order(schedule: Schedule, mode: str) -> list[Action]:
    """One order for all devices: the clock order of the schedule at a forward of 1 and a backward of 2."""
    if mode in ("forward", "loss"):
        rows = [[a for a in row if a.kind == "F"] for row in schedule.actions]
        return [e.action for e in simulate(Schedule(rows, schedule.stage_to_device)).events]
    if mode == "vjp":
        rows = [sorted(row, key=lambda a: a.kind != "F") for row in schedule.actions]
        events = simulate(Schedule(rows, schedule.stage_to_device)).events
        return [e.action for e in sorted(events, key=lambda e: e.action.kind != "F")]
    return [e.action for e in simulate(schedule).events]


def adjacent(order: Sequence[Action], places: Sequence[Any]) -> set[tuple[int, int]]:
    """The (stage, microbatch) pairs whose backward is the next thing that its device runs after the forward."""
    last: dict[Any, Action] = {}
    found = set()
    for a in order:
        before = last.get(places[a.stage])
        if a.kind == "B" and before == Action("F", a.stage, a.microbatch):
            found.add((a.stage, a.microbatch))
        last[places[a.stage]] = a
    return found


def build(
    stages: Sequence[Stage],
    places: Sequence[Placement],
    schedule: Schedule,
    checkpoint: Any,
    inputs: Inputs,
    request: Request,
) -> Plan:
    """Lower a call to a plan."""
    return _Builder(stages, places, schedule, checkpoint, inputs, request).plan()


class _Builder:
    def __init__(
        self,
        stages: Sequence[Stage],
        places: Sequence[Placement],
        schedule: Schedule,
        checkpoint: Any,
        inputs: Inputs,
        request: Request,
    ) -> None:
        self.stages, self.places, self.inputs, self.request = stages, places, inputs, request
        self.checkpoint = checkpoint
        self.m = schedule.microbatches
        self.order = issue_order(schedule, request.mode)
        self.direct = adjacent(self.order, schedule.stage_to_device)
        self.home = {k: places[s.index] for s in stages for k in s.span}  # owner of each layer's parameters
        self.slots: list[Slot] = []
        self.code: list[Instruction] = []
        self.feeds: list[Feed] = []
        self.constants: dict[int, Any] = {}
        self.copies: dict[tuple[int, Placement], int] = {}
        self.cuts: dict[tuple[Port, int], list[list[int]]] = {}
        self.made: dict[tuple[int, int], dict[Ref, int]] = {}  # (stage, microbatch): what it read and made
        self.sums: dict[tuple[int, Leaf], int] = {}
        self.pieces: dict[tuple[int, Leaf], dict[int, int]] = {}
        self.fed: dict[tuple[Leaf, Placement], int] = {}
        self.states: dict[int, list[int]] = {}
        self.warnings: dict[str, None] = {}
        self.outside: list[int] = []  # the cotangents of y, given from outside
        self.outside_pieces: list[dict[int, int]] = []
        self.programs: dict[Any, tuple[Program, Program | None]] = {}
        self.traced = self._trace()

    # --- tracing ---

    def variant(self, i: int) -> tuple[Any, ...]:
        """Microbatches with equal variants have equal shapes."""
        return tuple(tuple(rows[i] if rows else None for rows in cut.rows) for _, cut in self.inputs.cut.values())

    def remat(self, s: int, i: int) -> bool:
        """Whether the backward of `(s, i)` recomputes."""
        if self.request.mode not in ("grad", "vjp") or self.checkpoint == "never" or (s, i) in self.direct:
            return False
        return not (self.checkpoint == "except_last" and i == self.m - 1)

    def _trace(self) -> dict[tuple[Any, ...], Traced]:
        """Every stage, traced once for each variant and each way to keep residuals that is used."""
        policy: Any = True if isinstance(self.checkpoint, str) else self.checkpoint
        traced: dict[tuple[Any, ...], Traced] = {}
        reach: dict[Leaf, bool] = {}  # of what earlier stages made: does any gradient depend on it
        for stage in self.stages:
            ports: dict[Any, dict[Port, Shape]] = {}
            for i in range(self.m):
                v, remat = self.variant(i), self.remat(stage.index, i)
                if (stage.index, v, remat) in traced:
                    continue
                given = self._given(stage, i, traced)
                ports[v] = given
                traced[stage.index, v, remat] = trace_stage(
                    stage,
                    given,
                    train=self.request.train,
                    loss=self.request.loss,
                    where=f", stage {stage.index}, microbatch {i}",
                    wanted=self._wanted(stage, given, reach) if self.request.mode in ("grad", "vjp") else None,
                    whole=frozenset(leaf for leaf in self._whole(given) if leaf.port != X or stage.index == 0),
                    remat=policy if remat else False,
                )
            for (s, _, _), t in list(traced.items()):
                if s == stage.index:
                    for leaf, r in t.reach.items():
                        reach[self._consumed(leaf)] = reach.get(self._consumed(leaf), False) or r
        return traced

    def _consumed(self, leaf: Leaf) -> Leaf:
        return Leaf(X, leaf.k) if leaf.port == Y else leaf

    def _find(self, s: int, i: int) -> Traced:
        return self.traced[s, self.variant(i), self.remat(s, i)]

    def _given(self, stage: Stage, i: int, traced: Mapping[tuple[Any, ...], Traced]) -> dict[Port, Shape]:
        v = self.variant(i)
        piece = {
            port: Shape(cut.piece, tuple(cut.shape(k, i, a) for k, a in enumerate(shape.leaves)))
            for port, (shape, cut) in self.inputs.cut.items()
        }

        def out(s: int) -> Mapping[Port, Shape]:
            return next(t.out for (u, w, _), t in traced.items() if u == s and w == v)

        given = {Port("params", k): self.inputs.params[k] for k in stage.params}
        given[X] = piece[X] if stage.index == 0 else out(stage.index - 1)[Y]
        for skip in stage.skips_in:
            owner = next(s.index for s in self.stages if skip in s.skips_out)
            given[Port("skip", skip)] = out(owner)[Port("skip", skip)]
        if stage.asks("side"):
            given[SIDE] = piece[SIDE]
        if self.inputs.state is not None:
            given |= {Port("state", k): self.inputs.state[k] for k in stage.stateful}
        if stage.asks("key") and self.inputs.key is not None:
            given[KEY] = self.inputs.key
            given[INDEX] = Shape.of(_index(0))
        if stage.last and self.request.loss is not None:
            given[TARGETS] = piece[TARGETS]
        return given

    def _whole(self, given: Mapping[Port, Shape]) -> list[Leaf]:
        return [
            Leaf(port, k)
            for port in given
            if port in self.inputs.cut
            for k, whole in enumerate(self.inputs.cut[port][1].whole)
            if whole
        ]

    def _wanted(self, stage: Stage, given: Mapping[Port, Shape], reach: Mapping[Leaf, bool]) -> frozenset[Leaf]:
        wanted = set()
        for port, shape in given.items():
            for k, a in enumerate(shape.leaves):
                leaf = Leaf(port, k)
                inner = port.kind == "skip" or (port == X and stage.index > 0)
                if is_inexact(a) and (reach.get(leaf, False) if inner else leaf in self.request.wanted):
                    wanted.add(leaf)
        return frozenset(wanted)

    def _program(self, s: int, i: int) -> tuple[Program, Program | None]:
        key = (s, self.variant(i), self.remat(s, i))
        scale = self._scale(i)
        if (*key, scale) not in self.programs:
            forward, backward, warnings = forward_and_backward(
                self.traced[key],
                scale=scale,
                contributions={leaf: len(self._readers(s, leaf, i)) for leaf in self.traced[key].cotangents},
                accumulate=self.m > 1,
            )
            self.warnings.update(dict.fromkeys(warnings))
            self.programs[*key, scale] = forward, backward
        return self.programs[*key, scale]

    def _scale(self, i: int) -> float:
        """The weight of a microbatch in the loss."""
        if self.request.loss is None or self.request.loss.reduction != "mean":
            return 1.0
        rows = next((r for _, cut in self.inputs.cut.values() for r in cut.rows if r), (1,))
        return rows[i] / sum(rows)

    def _readers(self, s: int, leaf: Leaf, i: int) -> list[tuple[int, Leaf]]:
        """The stages that have a gradient for an output leaf, with their name for it."""
        if leaf.port == Y:
            if self.stages[s].last:
                return [(s, leaf)]
            readers = [(s + 1, Leaf(X, leaf.k))]
        else:
            readers = [(t.index, leaf) for t in self.stages if leaf.port.of in t.skips_in]
        return [(t, name) for t, name in readers if name in self._find(t, i).gradients]

    # --- slots ---

    def new(self, name: str, place: Placement) -> int:
        self.slots.append(Slot(name, place))
        return len(self.slots) - 1

    def bring(self, slots: Sequence[int], place: Placement) -> list[int]:
        """The slots on a place; those elsewhere are moved together, once."""
        away = [n for n in dict.fromkeys(slots) if self.slots[n].place != place and (n, place) not in self.copies]
        away = [n for n in away if n not in self.constants]
        if away:
            new = [self.new(self.slots[n].name, place) for n in away]
            self.code.append(Move(tuple(away), tuple(new), place))
            self.copies.update({(n, place): k for n, k in zip(away, new, strict=True)})
        return [self.copies.get((n, place), n) for n in slots]

    def run(
        self,
        name: str,
        call: Any,
        ins: Sequence[int],
        outs: Sequence[str],
        place: Placement,
        action: Action | None = None,
    ) -> list[int]:
        made = [self.new(o, place) for o in outs]
        self.code.append(Run(name, call, tuple(self.bring(ins, place)), tuple(made), place, action))
        return made

    def feed(self, leaf: Leaf, place: Placement) -> int:
        if (leaf, place) not in self.fed:
            slot = self.new(f"{leaf.port}[{leaf.k}]", place)
            self.fed[leaf, place] = slot
            self.feeds.append(Feed(leaf, slot))
        return self.fed[leaf, place]

    def cut(self, port: Port, s: int) -> list[list[int]]:
        """The pieces of an input on a stage's place: `[microbatch][leaf]`."""
        place = self.places[s]
        known = next((c for (p, t), c in self.cuts.items() if p == port and self.places[t] == place), None)
        if known is None:
            shape, how = self.inputs.cut[port]
            whole = [self.feed(Leaf(port, k), place) for k in range(len(shape.leaves))]
            chosen = [k for k in range(len(whole)) if not how.whole[k]]
            known = [list(whole) for _ in range(self.m)]
            if chosen and self.m > 1:
                made = iter(self._cut_run(how, chosen, whole, str(port), place))
                for i in range(self.m):
                    for k in chosen:
                        known[i][k] = next(made)
            self.cuts[port, s] = known
        return known

    def _cut_run(
        self, how: Split, chosen: Sequence[int], whole: Sequence[int], name: str, place: Placement
    ) -> list[int]:
        def split(*arrays: Any) -> list[Any]:
            return [how.cut(k, i, a) for i in range(self.m) for k, a in zip(chosen, arrays, strict=True)]

        names = [f"{name}[{k}] mb{i}" for i in range(self.m) for k in chosen]
        return self.run(f"split {name}", jax.jit(split), [whole[k] for k in chosen], names, place)

    # --- actions ---

    def plan(self) -> Plan:
        # Parameters are slots from the start, the owner's place each.
        for k, shape in enumerate(self.inputs.params):
            for n in range(len(shape.leaves)):
                self.feed(Leaf(Port("params", k), n), self.home[k])
        half = None
        for action in self.order:
            if action.kind == "F":
                self._forward(action)
            else:
                if half is None and self.request.mode == "vjp":
                    half = self._half()
                self._backward(action)
        if half is None and self.request.mode == "vjp":
            half = self._half()
        state = self._states()
        y = loss = aux = None
        if self.request.loss is not None:
            loss, weight, aux = self._loss()
        else:
            weight, y = None, self._y()
        gradients = self._gradients(weight) if self.request.mode in ("grad", "vjp") else {}
        keep = set(gradients.values()) | {n for entry in (y, aux, *state) if entry for n in entry[1]}
        keep |= {n for n in (loss,) if n is not None}
        if self.request.mode == "vjp":
            code, half = _vjp_frees(self.code, half or 0, keep, self.constants)
        else:
            code = _frees(self.code, keep, self.constants)
        return Plan(
            tuple(code),
            tuple(self.slots),
            tuple(self.feeds),
            self.constants,
            half or 0,
            tuple(self.outside),
            y,
            state,
            loss,
            aux,
            gradients,
            tuple(self.warnings),
        )

    def _half(self) -> int:
        """The forward's outputs, then the mark where the backward begins, then the cotangents of `y`."""
        self.y_entry = self._y()
        self.state_entry = self._states()
        mark = len(self.code)
        last = self.stages[-1]
        place = self.places[-1]
        shape, _ = self.y_entry
        wanted = [k for k, a in enumerate(shape.leaves) if is_inexact(a)]
        whole = [self.new(f"cotangent of y[{k}]", place) for k in wanted]
        self.outside = whole
        per = [self._find(last.index, i).out[Y] for i in range(self.m)]
        rows = [[p.leaves[k].shape[0] if p.leaves[k].shape else 0 for p in per] for k in range(len(shape.leaves))]

        def split(*cotangents: Any) -> list[Any]:
            out = []
            for i in range(self.m):
                for k, c in zip(wanted, cotangents, strict=True):
                    start = sum(rows[k][:i])
                    scalar = not per[i].leaves[k].shape
                    out.append(c[i] if scalar else jax.lax.slice_in_dim(c, start, start + rows[k][i]))
            return out

        names = [f"cotangent of y[{k}] mb{i}" for i in range(self.m) for k in wanted]
        made = self.run("split cotangent", jax.jit(split), whole, names, place) if wanted else []
        self.outside_pieces = [dict(zip(wanted, made[i * len(wanted) :], strict=False)) for i in range(self.m)]
        return mark

    def _forward(self, action: Action) -> None:
        _, s, i = action
        stage, place = self.stages[s], self.places[s]
        program, _ = self._program(s, i)
        given: dict[Ref, int] = {}
        for ref in program.ins:
            assert ref.leaf is not None
            given[ref] = self._input(stage, ref.leaf, i)
        # A backward may read inputs that its forward does not.
        backward = self._program(s, i)[1]
        for ref in backward.ins if backward else ():
            if ref.what == "in":
                assert ref.leaf is not None
                given[ref] = self._input(stage, ref.leaf, i)
        local = dict(zip(given, self.bring(list(given.values()), place), strict=True))
        names = [
            f"{ref.leaf.port if ref.leaf else 'residual'}[{ref.leaf.k if ref.leaf else ref.n}] stage{s} mb{i}"
            for ref in program.outs
        ]
        made = self.run(program.name, program.call, [local[r] for r in program.ins], names, place, action)
        local |= dict(zip(program.outs, made, strict=True))
        self.made[s, i] = local
        for k in stage.stateful:
            port = Port("state", k)
            self.states[k] = [local[Ref("out", Leaf(port, n))] for n in range(len(self._find(s, i).out[port].leaves))]

    def _input(self, stage: Stage, leaf: Leaf, i: int) -> int:
        port, k = leaf
        s = stage.index
        if port.kind == "params":
            return self.fed[leaf, self.home[port.of]]
        if port == X and s > 0:
            return self.made[s - 1, i][Ref("out", Leaf(Y, k))]
        if port.kind == "skip":
            owner = next(t.index for t in self.stages if port.of in t.skips_out)
            return self.made[owner, i][Ref("out", leaf)]
        if port.kind == "state":
            return self.states[port.of][k] if port.of in self.states else self.feed(leaf, self.places[s])
        if port == KEY:
            return self.feed(leaf, self.places[s])
        if port == INDEX:
            known = next((n for n, v in self.constants.items() if v == i), None)
            if known is None:
                known = self.new(f"index {i}", self.places[s])
                self.constants[known] = _index(i)
            return known
        return self.cut(port, s)[i][k]

    def _backward(self, action: Action) -> None:
        _, s, i = action
        _, program = self._program(s, i)
        if program is None:
            return
        place, local = self.places[s], self.made[s, i]
        ins = []
        for ref in program.ins:
            if ref.what == "cotangent":
                assert ref.leaf is not None
                reader, name = self._readers(s, ref.leaf, i)[ref.n]
                if ref.leaf.port == Y and self.stages[s].last:
                    ins.append(self.outside_pieces[i][ref.leaf.k])
                else:
                    ins.append(self.made[reader, i][Ref("gradient", name)])
            elif ref.what == "sum":
                ins.append(self._sum(s, ref, program))
            else:
                ins.append(local[ref])
        names = [f"{ref.what} of {ref.leaf.port if ref.leaf else ''} stage{s} mb{i}" for ref in program.outs]
        made = self.run(program.name, program.call, ins, names, place, action)
        for ref, slot in zip(program.outs, made, strict=True):
            assert ref.leaf is not None
            if ref.what == "sum":
                self.sums[s, ref.leaf] = slot
            else:
                local[ref] = slot
                if ref.leaf in self.request.wanted and (ref.leaf.port != X or s == 0):
                    self.pieces.setdefault((s, ref.leaf), {})[i] = slot

    def _sum(self, s: int, ref: Ref, program: Program) -> int:
        """The slot of an accumulator; the stage's are made together, before its first backward."""
        assert ref.leaf is not None
        if (s, ref.leaf) not in self.sums:
            leaves = [r.leaf for r in program.ins if r.what == "sum" and r.leaf and (s, r.leaf) not in self.sums]
            shapes = [self._leaf_shape(leaf) for leaf in leaves]

            def zeros() -> list[Any]:
                return [jnp.zeros(a.shape, sum_dtype(a.dtype)) for a in shapes]

            call = jax.jit(zeros, out_shardings=self.places[s].sharding)
            made = self.run("zeros", call, [], [f"sum of {leaf.port}" for leaf in leaves], self.places[s])
            self.sums.update({(s, leaf): slot for leaf, slot in zip(leaves, made, strict=True)})
        return self.sums[s, ref.leaf]

    def _leaf_shape(self, leaf: Leaf) -> jax.ShapeDtypeStruct:
        if leaf.port.kind == "params":
            return self.inputs.params[leaf.port.of].leaves[leaf.k]
        return self.inputs.cut[leaf.port][0].leaves[leaf.k]

    # --- outputs ---

    def _states(self) -> tuple[tuple[Shape, tuple[int, ...]] | None, ...]:
        if self.inputs.state is None:
            return ()
        if hasattr(self, "state_entry"):
            return self.state_entry
        out: list[tuple[Shape, tuple[int, ...]] | None] = []
        for k, shape in enumerate(self.inputs.state):
            stage = next(s for s in self.stages if k in s.span)
            if k not in stage.stateful:
                out.append(None)
                continue
            slots, shape = self.states[k], self._find(stage.index, self.m - 1).out[Port("state", k)]
            finish = stage.model.layers[k].finish
            if finish is not None:
                ends: list[Shape] = []
                spec = shape.spec

                def end(*arrays: Any, finish: Any = finish, spec: Any = spec, ends: Any = ends) -> list[Any]:
                    from fpipe._tree import pack

                    made, made_spec = pack(finish(spec.unpack(arrays)))
                    ends.append(Shape(made_spec, tuple(map(aval, made))))
                    return made

                count = len(jax.eval_shape(end, *shape.leaves))
                names = [f"state {k}[{n}]" for n in range(count)]
                slots = self.run(f"finish state {k}", jax.jit(end), slots, names, self.places[stage.index])
                shape = ends[0]
            out.append((shape, tuple(slots)))
        return tuple(out)

    def _y(self) -> tuple[Shape, tuple[int, ...]]:
        if hasattr(self, "y_entry"):
            return self.y_entry
        last, place = self.stages[-1], self.places[-1]
        shape = self._find(last.index, 0).out[Y]
        parts = [
            [self.made[last.index, i][Ref("out", Leaf(Y, k))] for i in range(self.m)] for k in range(len(shape.leaves))
        ]
        leaf_shapes = [[self._find(last.index, i).out[Y].leaves[k] for i in range(self.m)] for k in range(len(parts))]

        def concatenate(*arrays: Any) -> list[Any]:
            return [join(arrays[k * self.m : (k + 1) * self.m]) for k in range(len(parts))]

        flat = [n for p in parts for n in p]
        shapes = jax.eval_shape(concatenate, *(a for row in leaf_shapes for a in row))
        if self.m == 1 and all(a.shape for row in leaf_shapes for a in row):
            slots = flat
        else:
            slots = self.run("join y", jax.jit(concatenate), flat, [f"y[{k}]" for k in range(len(parts))], place)
        return Shape(shape.spec, tuple(map(aval, shapes))), tuple(slots)

    def _loss(self) -> tuple[int, int | None, tuple[Shape, tuple[int, ...]] | None]:
        """Loss, total weight and stacked aux, in one program on the last stage."""
        loss = self.request.loss
        assert loss is not None
        last, place = self.stages[-1], self.places[-1]
        weighted = loss.reduction == "weighted"
        scales = [self._scale(i) for i in range(self.m)]
        aux = self._find(last.index, 0).out[AUX]
        for i in range(1, self.m):
            other = self._find(last.index, i).out[AUX]
            if (other.spec, [a.shape for a in other.leaves]) != (aux.spec, [a.shape for a in aux.leaves]):
                raise ValueError(
                    f"`value_and_grad(has_aux=True)`: aux of microbatch {i} has the shapes {[a.shape for a in other.leaves]}, that of "
                    f"microbatch 0 {[a.shape for a in aux.leaves]}; aux is stacked over microbatches, so reduce what "
                    "depends on the number of rows"
                )
        ports = [
            Leaf(LOSS, 0),
            *([Leaf(WEIGHT, 0)] if weighted else []),
            *(Leaf(AUX, k) for k in range(len(aux.leaves))),
        ]

        def reduce(*arrays: Any) -> list[Any]:
            columns = [arrays[n * self.m : (n + 1) * self.m] for n in range(len(ports))]
            total = sum(v * w if loss.reduction == "mean" else v for v, w in zip(columns[0], scales, strict=True))
            rest = columns[1:]
            if not weighted:
                return [total, *map(jnp.stack, rest)]
            weight = sum(rest[0])
            return [total / weight, weight, *map(jnp.stack, rest[1:])]

        ins = [self.made[last.index, i][Ref("out", leaf)] for leaf in ports for i in range(self.m)]
        made = self.run("reduce", jax.jit(reduce), ins, [str(leaf.port) for leaf in ports], place)
        stacked = Shape(aux.spec, tuple(jax.ShapeDtypeStruct((self.m, *a.shape), a.dtype) for a in aux.leaves))
        rest = made[2:] if weighted else made[1:]
        return made[0], made[1] if weighted else None, (stacked, tuple(rest)) if loss.has_aux else None

    def _gradients(self, weight: int | None) -> dict[Leaf, int]:
        """Every wanted gradient at its owner: contributions summed, divided, cast once."""
        by_place: dict[Placement, list[tuple[Leaf, list[int]]]] = {}
        for leaf in sorted(
            self.request.wanted, key=lambda f: (f.port.kind, -1 if f.port.of is None else f.port.of, f.k)
        ):
            stages = [s.index for s in self.stages if (s.index, leaf) in self.sums or (s.index, leaf) in self.pieces]
            parts = []
            for s in stages:
                if (s, leaf) in self.sums:
                    parts.append(self.sums[s, leaf])
                else:
                    slots = [self.pieces[s, leaf][i] for i in range(self.m)]
                    join_all = jax.jit(lambda *p: [join(p)])
                    name = f"gradient of {leaf.port}[{leaf.k}]"
                    parts += self.run("join gradient", join_all, slots, [name], self.places[s]) if self.m > 1 else slots
            by_place.setdefault(self._owner(leaf, stages), []).append((leaf, parts))
        out: dict[Leaf, int] = {}
        for place, entries in by_place.items():
            done = [(leaf, parts) for leaf, parts in entries if self._final(leaf, parts, weight, place)]
            out |= {leaf: parts[0] for leaf, parts in done}
            rest = [(leaf, parts) for leaf, parts in entries if leaf not in out]
            if rest:
                out |= self._finish(rest, weight, place)
        return out

    def _owner(self, leaf: Leaf, stages: Sequence[int]) -> Placement:
        if leaf.port.kind == "params":
            return self.home[leaf.port.of]
        if leaf.port == TARGETS:
            return self.places[-1]
        if leaf.port == SIDE:
            asking = [s.index for s in self.stages if s.asks("side")]
            return self.places[(stages or asking or [0])[0]]
        return self.places[0]

    def _final(self, leaf: Leaf, parts: Sequence[int], weight: int | None, place: Placement) -> bool:
        """Whether a gradient is finished as it is."""
        dtype = self._leaf_shape(leaf).dtype
        summed = self.m == 1 or sum_dtype(dtype) == dtype or not self._is_sum(leaf)
        return len(parts) == 1 and weight is None and summed and self.slots[parts[0]].place == place

    def _is_sum(self, leaf: Leaf) -> bool:
        return any(n == leaf for _, n in self.sums)

    def _finish(
        self, entries: Sequence[tuple[Leaf, list[int]]], weight: int | None, place: Placement
    ) -> dict[Leaf, int]:
        shapes = [self._leaf_shape(leaf) for leaf, _ in entries]
        counts = [len(parts) for _, parts in entries]

        def finish(*arrays: Any) -> list[Any]:
            rest = iter(arrays)
            divisor = next(rest) if weight is not None else None
            out = []
            for a, n in zip(shapes, counts, strict=True):
                parts = [next(rest) for _ in range(n)]
                total = functools.reduce(operator.add, parts) if parts else jnp.zeros(a.shape, a.dtype)
                total = total if divisor is None else total / divisor
                out.append(total.astype(a.dtype))
            return out

        ins = ([] if weight is None else [weight]) + [n for _, parts in entries for n in parts]
        names = [f"gradient of {leaf.port}[{leaf.k}]" for leaf, _ in entries]
        made = self.run("finish gradients", jax.jit(finish, out_shardings=place.sharding), ins, names, place)
        return {leaf: slot for (leaf, _), slot in zip(entries, made, strict=True)}


def _index(i: int) -> Any:
    import numpy as np

    return np.uint32(i)


def _frees(code: Sequence[Instruction], keep: set[int], constants: Mapping[int, Any]) -> list[Instruction]:
    """Add a `Free` after the last use of each slot."""
    seen = set(keep) | set(constants)
    out: list[Instruction] = []
    for item in reversed(code):
        assert not isinstance(item, Free)
        dead = tuple(n for n in dict.fromkeys((*item.ins, *item.outs)) if n not in seen)
        seen.update(dead)
        if dead:
            out.append(Free(dead))
        out.append(item)
    return out[::-1]


def _vjp_frees(
    code: Sequence[Instruction], half: int, keep: set[int], constants: Mapping[int, Any]
) -> tuple[list[Instruction], int]:
    """Frees of both halves: what the backward reads outlives the forward."""
    read = {n for item in code[half:] if not isinstance(item, Free) for n in item.ins}
    made = {n for item in code[half:] if not isinstance(item, Free) for n in item.outs}
    first = _frees(code[:half], keep | (read - made), constants)
    return [*first, *_frees(code[half:], keep, constants)], len(first)
