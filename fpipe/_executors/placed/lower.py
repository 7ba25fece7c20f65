"""From a schedule to a plan.

Every action becomes the run of a program. Its inputs are moved when it is about to run:
straight from the placement that made them, once per placement that reads them, and
never where they are already. Around the schedule stand programs of their own: inputs
are cut, outputs joined, losses and gradients reduced.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from fpipe._core.caches import Recent
from fpipe._core.pytrees import Shape, is_inexact
from fpipe._executors.placed import epilogue as around
from fpipe._executors.placed.instructions import (
    Feed,
    Instruction,
    Move,
    Output,
    Plan,
    Run,
    Slot,
    read_from_outside,
    with_frees,
)
from fpipe._executors.placement import Placement
from fpipe._executors.plan_data import Role
from fpipe._executors.programs import (
    Inputs,
    Layout,
    Programs,
    Request,
    direct_pairs,
    index,
    split_pairs,
)
from fpipe._executors.request import CallKind
from fpipe._model.loss import sum_dtype
from fpipe._model.microbatch import check_alike
from fpipe._model.remat import Remat
from fpipe._model.stages import (
    AUX,
    INDEX,
    LOSS,
    WEIGHT,
    Leaf,
    Port,
    Stage,
    X,
    Y,
)
from fpipe._program.code import (
    Code,
    Cotangent,
    Gradient,
    GradientSum,
    Handed,
    Input,
    Program,
    ProgramValue,
    Residual,
)
from fpipe._program.code import Output as OutputLeaf
from fpipe.schedules import Action, Schedule, simulate


def lower(
    layout: Layout,
    schedule: Schedule,
    remat: Remat,
    inputs: Inputs,
    request: Request,
    kept: Recent,
) -> Plan:
    """Lower a call to a plan; `kept` has the programs of earlier calls."""
    order = issue_order(schedule, request.kind)
    direct, split = direct_pairs(order, layout.placements), split_pairs(order)
    return _Lowering(
        layout,
        schedule,
        order,
        Programs(layout, direct, split, remat, inputs, request, kept),
    ).plan()


def issue_order(schedule: Schedule, kind: CallKind) -> list[Action]:
    """One order for all devices: the clock order of the schedule at a forward of 1 and
    a backward of 2.

    A thread that dispatches asynchronously must never enqueue one stage's whole work
    first: a device's queue is finite.
    """
    rows = schedule.actions
    if not kind.differentiates:
        rows = [[a for a in row if a.kind == "F"] for row in rows]
    elif kind is CallKind.PULL_BACK:
        rows = [sorted(row, key=lambda a: a.kind != "F") for row in rows]
    if rows is not schedule.actions:
        schedule = Schedule(rows, schedule.stage_to_device)
    order = [event.action for event in simulate(schedule).events]
    return (
        sorted(order, key=lambda a: a.kind != "F")
        if kind is CallKind.PULL_BACK
        else order
    )


class _Emitter:
    """Slots and instructions as they come."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.code: list[Run | Move] = []
        self.feeds: list[Feed] = []
        self.constants: dict[int, Any] = {}
        self._copies: dict[tuple[int, Placement], int] = {}
        self._fed: dict[tuple[Leaf, Placement], int] = {}

    def new(self, name: str, placement: Placement, role: Role) -> int:
        self.slots.append(Slot(name, placement, role))
        return len(self.slots) - 1

    def bring(self, slots: Sequence[int], placement: Placement) -> list[int]:
        """The slots on a placement; those elsewhere are moved together, once."""
        away = [
            n
            for n in dict.fromkeys(slots)
            if self.slots[n].placement != placement
            and (n, placement) not in self._copies
        ]
        if away:
            copies = [
                self.new(self.slots[n].name, placement, self.slots[n].role)
                for n in away
            ]
            self.code.append(Move(tuple(away), tuple(copies), placement))
            self._copies.update(
                {(n, placement): copy for n, copy in zip(away, copies, strict=True)}
            )
        return [self._copies.get((n, placement), n) for n in slots]

    def run(
        self,
        name: str,
        call: Callable[..., Sequence[Any]],
        ins: Sequence[int],
        outs: Sequence[tuple[str, Role]],
        placement: Placement,
        action: Action | None = None,
        calls_host: bool = False,
        donates: Sequence[int] = (),
        code: Code | None = None,
    ) -> list[int]:
        """Run a program on a placement; returns the slots of what it makes."""
        here = self.bring(ins, placement)
        if not here:  # no argument says where it runs
            call = jax.jit(call, out_shardings=placement.sharding)
        made = [self.new(name, placement, role) for name, role in outs]
        self.code.append(
            Run(
                name,
                call,
                tuple(here),
                tuple(made),
                placement,
                action,
                calls_host,
                tuple(donates),
                code,
            )
        )
        return made

    def feed(self, leaf: Leaf, placement: Placement) -> int:
        """The slot of an input of the call, put on a placement."""
        if (leaf, placement) not in self._fed:
            slot = self._fed[leaf, placement] = self.new(
                str(leaf),
                placement,
                "parameters" if leaf.port.kind == "params" else "inputs",
            )
            self.feeds.append(Feed(leaf, slot))
        return self._fed[leaf, placement]

    def constant(self, value: Any, name: str, placement: Placement) -> int:
        """A slot that holds a host value."""
        slot = self.new(name, placement, "inputs")
        self.constants[slot] = value
        return slot


class _Lowering:
    def __init__(
        self,
        layout: Layout,
        schedule: Schedule,
        order: Sequence[Action],
        programs: Programs,
    ) -> None:
        self.layout, self.schedule, self.order, self.programs = (
            layout,
            schedule,
            order,
            programs,
        )
        self.inputs, self.request, self.m = (
            programs.inputs,
            programs.request,
            programs.inputs.cut.m,
        )
        self.emit = _Emitter()
        self.values: dict[
            tuple[int, int], dict[ProgramValue, int]
        ] = {}  # (stage, microbatch): what it read and made, here
        self.sums: dict[tuple[int, Leaf], int] = {}  # accumulated gradients by stage
        self.states: dict[
            int, tuple[int, ...]
        ] = {}  # by layer, as the microbatches go by
        self.indices: dict[tuple[int, Placement], int] = {}
        self.y_cotangents: dict[int, int] = {}  # by leaf, from outside

    def plan(self) -> Plan:
        emit, request = self.emit, self.request
        for k, shape in enumerate(
            self.inputs.params
        ):  # first, so that parameters fill the first slots
            for n in range(len(shape.leaves)):
                emit.feed(Leaf(Port("params", k), n), self.layout.home(k))
        y = loss = aux = weight = None
        cotangents: tuple[int, ...] = ()
        if request.kind is CallKind.PULL_BACK:
            self._actions(a for a in self.order if a.kind == "F")
            y, state = self._y(), self._state()
            half = len(emit.code)
            cotangents = self._cotangents(y)
            self._actions(a for a in self.order if a.kind != "F")
        else:
            self._actions(self.order)
            if request.loss is None:
                y = self._y()
            else:
                loss, weight, aux = self._loss()
            state, half = self._state(), None
        gradients = self._gradients(weight) if request.differentiates else {}
        half = len(emit.code) if half is None else half
        outputs = [
            entry for entry in (y, loss, aux, *state.values()) if entry is not None
        ]
        keep = {
            *gradients.values(),
            *emit.constants,
            *(n for entry in outputs for n in entry.slots),
        }
        first: list[Instruction] = with_frees(
            emit.code[:half], keep | read_from_outside(emit.code[half:])
        )
        return Plan(
            schedule=self.schedule,
            order=tuple(self.order),
            instructions=(*first, *with_frees(emit.code[half:], keep)),
            slots=tuple(emit.slots),
            feeds=tuple(emit.feeds),
            constants=emit.constants,
            backward=len(first),
            cotangents=cotangents,
            y=y,
            loss=loss,
            aux=aux,
            state=state,
            gradients=gradients,
            warnings=tuple(self.programs.warnings),
        )

    # --- the schedule ---

    def _actions(self, actions: Any) -> None:
        for action in actions:
            if action.kind == "F":
                self._forward(action)
            else:
                self._backward(action)

    def _forward(self, action: Action) -> None:
        _, s, i = action
        stage, placement = self.layout.stages[s], self.layout.placements[s]
        program, *backwards = self.programs.of(s, i).values()
        # A backward may read inputs that its forward does not, and an output may be an
        # input as it is.
        refs = [
            *program.ins,
            *(
                r
                for backward in backwards
                for r in backward.ins
                if isinstance(r, Input)
            ),
        ]
        refs += [r for r in program.aliases.values() if isinstance(r, Input)]
        slots: dict[ProgramValue, int] = {
            ref: self._input(stage, ref.leaf, i)
            for ref in dict.fromkeys(refs)
            if isinstance(ref, Input)
        }
        local = dict(
            zip(slots, self.emit.bring(list(slots.values()), placement), strict=True)
        )
        self._run(program, local, s, i, [local[ref] for ref in program.ins], action)
        self.values[s, i] = local
        for k in stage.stateful:
            port = Port("state", k)
            count = len(self.programs.flat(s, i).out[port].leaves)
            self.states[k] = tuple(
                local[OutputLeaf(Leaf(port, n))] for n in range(count)
            )

    def _backward(self, action: Action) -> None:
        kind, s, i = action
        program = self.programs.of(s, i).get(kind)
        if program is None:
            return
        local = self.values[s, i]
        self._start_sums(s, program)
        slots = []
        for ref in program.ins:
            if isinstance(ref, Cotangent):
                slots.append(self._cotangent(s, i, ref.leaf, ref.number))
            elif isinstance(ref, GradientSum):
                slots.append(self.sums[s, ref.leaf])
            else:
                slots.append(local[ref])
        # What a gradient that is a cotangent as it is refers to.
        here = self.emit.bring(slots, self.layout.placements[s])
        local |= dict(zip(program.ins, here, strict=True))
        self._run(program, local, s, i, here, action)
        for ref in program.outs:
            if isinstance(ref, GradientSum):
                self.sums[s, ref.leaf] = local[ref]

    def _run(
        self,
        program: Program,
        local: dict[ProgramValue, int],
        s: int,
        i: int,
        ins: Sequence[int],
        action: Action,
    ) -> None:
        """Run a stage's program and add what it makes to `local`."""
        if program.call is not None:
            last, place = self.layout.stages[s].last, self.layout.placements[s]
            outs: list[tuple[str, Role]] = [
                (f"{ref} stage{s} mb{i}", _role(ref, s, last)) for ref in program.outs
            ]
            sums = [
                slot
                for ref, slot in zip(program.ins, ins, strict=True)
                if isinstance(ref, GradientSum)
            ]
            made = self.emit.run(
                program.name,
                program.call,
                ins,
                outs,
                place,
                action,
                program.calls_host,
                sums,
                program.code,
            )
            local |= dict(zip(program.outs, made, strict=True))
        local |= {ref: local[other] for ref, other in program.aliases.items()}

    def _input(self, stage: Stage, leaf: Leaf, i: int) -> int:
        """The slot of an input leaf, wherever it is."""
        (port, k), s = leaf, stage.index
        placement = self.layout.placements[s]
        if port.kind == "params":
            return self.emit.feed(leaf, self.layout.home(port.of))
        if port == X and s > 0:
            return self.values[s - 1, i][OutputLeaf(Leaf(Y, k))]
        if port.kind == "skip":
            return self.values[self.layout.source_of(port.of), i][OutputLeaf(leaf)]
        if port.kind == "state" and port.of in self.states:
            return self.states[port.of][k]
        if port == INDEX or port.kind == "number":
            n = i if port == INDEX else port.of
            if (n, placement) not in self.indices:
                self.indices[n, placement] = self.emit.constant(
                    index(n), f"number {n}", placement
                )
            return self.indices[n, placement]
        return self.emit.feed(
            leaf, placement
        )  # whole: the program cuts its piece out of it

    def _cotangent(self, s: int, i: int, leaf: Leaf, n: int) -> int:
        """The slot of the `n`-th cotangent of an output leaf."""
        if leaf.port == Y and self.layout.stages[s].last:
            return self.y_cotangents[leaf.k]
        reader, name = self.programs.readers(s, leaf, i)[n]
        return self.values[reader, i][Gradient(name)]

    def _start_sums(self, s: int, program: Program) -> None:
        """Zeros for the stage's accumulators, made together."""
        new = [
            r.leaf
            for r in program.ins
            if isinstance(r, GradientSum) and (s, r.leaf) not in self.sums
        ]
        if new:
            placement = self.layout.placements[s]
            call = around.zeros([self._shape(leaf) for leaf in new])
            made = self.emit.run(
                "zeros",
                call,
                [],
                [(f"sum {leaf} stage{s}", "gradients") for leaf in new],
                placement,
            )
            self.sums.update(
                {(s, leaf): slot for leaf, slot in zip(new, made, strict=True)}
            )

    def _shape(self, leaf: Leaf) -> jax.ShapeDtypeStruct:
        return self.inputs.of(leaf.port).leaves[leaf.k]

    # --- around the schedule ---

    def _y(self) -> Output:
        last, placement = self.layout.stages[-1].index, self.layout.placements[-1]
        parts = [self.programs.flat(last, i).out[Y] for i in range(self.m)]
        check_alike(parts, "`pipe(params, x)`: y", stacked=False)
        count = len(parts[0].leaves)
        slots = [
            self.values[last, i][OutputLeaf(Leaf(Y, k))]
            for k in range(count)
            for i in range(self.m)
        ]
        if self.m == 1 and all(a.shape for a in parts[0].leaves):
            return Output(parts[0], tuple(slots))
        join = around.joiner(count, self.m)
        leaves = tuple(
            jax.eval_shape(join, *(p.leaves[k] for k in range(count) for p in parts))
        )
        made = self.emit.run(
            "join y",
            jax.jit(join),
            slots,
            [(f"y[{k}]", "outputs") for k in range(count)],
            placement,
        )
        return Output(Shape(parts[0].spec, leaves), tuple(made))

    def _cotangents(self, y: Output) -> tuple[int, ...]:
        """Slots for the cotangents of `y`."""
        placement = self.layout.placements[-1]
        carrying = [k for k, a in enumerate(y.shape.leaves) if is_inexact(a)]
        self.y_cotangents = {
            k: self.emit.new(f"cotangent y[{k}]", placement, "inputs") for k in carrying
        }
        return tuple(self.y_cotangents.values())

    def _loss(self) -> tuple[Output, int | None, Output | None]:
        """Loss, total weight and stacked aux, in one program on the last stage."""
        loss, last, placement = (
            self.request.loss,
            self.layout.stages[-1].index,
            self.layout.placements[-1],
        )
        assert loss is not None
        outs = [self.programs.flat(last, i).out for i in range(self.m)]
        check_alike(
            [out[AUX] for out in outs],
            f"`{loss.call}(has_aux=True)`: aux",
            stacked=True,
        )
        weighted, aux = WEIGHT in outs[0], outs[0][AUX]
        leaves = [
            Leaf(LOSS, 0),
            *([Leaf(WEIGHT, 0)] if weighted else []),
            *(Leaf(AUX, k) for k in range(len(aux.leaves))),
        ]
        ins = [
            self.values[last, i][OutputLeaf(leaf)]
            for leaf in leaves
            for i in range(self.m)
        ]
        call = jax.jit(
            around.loss_reducer(
                [self.programs.scale(i) for i in range(self.m)],
                weighted,
                len(aux.leaves),
            )
        )
        total, *rest = self.emit.run(
            "reduce loss",
            call,
            ins,
            [(str(leaf), "outputs") for leaf in leaves],
            placement,
        )
        weight = rest.pop(0) if weighted else None
        return (
            Output(outs[0][LOSS], (total,)),
            weight,
            Output(aux, tuple(rest)) if loss.has_aux else None,
        )

    def _state(self) -> dict[int, Output]:
        out = {}
        for k, slots in sorted(self.states.items()):
            stage = self.layout.stage_of(k)
            shape = self.programs.flat(stage.index, self.m - 1).out[Port("state", k)]
            if stage.model.layers[k].finish is None:
                out[k] = Output(shape, slots)
                continue
            finish = around.Finisher(stage.model, k, shape)
            outs: list[tuple[str, Role]] = [
                (f"state {k}[{n}]", "outputs") for n in range(len(finish.out.leaves))
            ]
            made = self.emit.run(
                f"finish state {k}", jax.jit(finish), slots, outs, self.layout.home(k)
            )
            out[k] = Output(finish.out, tuple(made))
        return out

    def _gradients(self, weight: int | None) -> dict[Leaf, int]:
        """Every wanted gradient at its owner: summed over stages, divided by the
        weight, cast once.
        """
        parts: dict[Leaf, list[int]] = {
            leaf: [] for leaf in sorted(self.request.wanted, key=_leaf_order)
        }
        for s in range(len(self.layout.stages)):
            for leaf, slot in self._joined(s).items():
                parts[leaf].append(slot)
        for (_, leaf), slot in sorted(self.sums.items(), key=lambda entry: entry[0][0]):
            parts[leaf].append(slot)
        uncast = {
            leaf
            for _, leaf in self.sums
            if self.m > 1
            and sum_dtype(self._shape(leaf).dtype) != self._shape(leaf).dtype
        }
        found: dict[Leaf, int] = {}
        rest: dict[Placement, dict[Leaf, list[int]]] = {}
        for leaf, slots in parts.items():
            owner = self._owner(leaf)
            done = len(slots) == 1 and weight is None and leaf not in uncast
            if done and self.emit.slots[slots[0]].placement == owner:
                found[leaf] = slots[0]
            else:
                rest.setdefault(owner, {})[leaf] = slots
        for owner, entries in rest.items():
            finish = around.gradient_finisher(
                [self._shape(leaf) for leaf in entries], [*map(len, entries.values())]
            )
            ins = [
                *(n for slots in entries.values() for n in slots),
                *(() if weight is None else (weight,)),
            ]
            outs: list[tuple[str, Role]] = [
                (f"gradient {leaf}", "gradients") for leaf in entries
            ]
            made = self.emit.run("finish gradients", jax.jit(finish), ins, outs, owner)
            found |= dict(zip(entries, made, strict=True))
        return found

    def _joined(self, s: int) -> dict[Leaf, int]:
        """Gradients of the call's own inputs that a stage gives piece by piece, joined."""
        per = [self.values[s, i] for i in range(self.m)]
        leaves = list(
            dict.fromkeys(
                value.leaf
                for values in per
                for value in values
                if isinstance(value, Gradient)
                and value.leaf in self.request.wanted
                and (s == 0 or value.leaf.port != X)
            )
        )
        if self.m == 1 or not leaves:
            return {leaf: per[0][Gradient(leaf)] for leaf in leaves}
        # A piece without gradient (its shape led another way through the layers) is
        # zero.
        present = [[Gradient(leaf) in values for values in per] for leaf in leaves]
        shapes = [
            [self.inputs.piece(leaf.port, i).leaves[leaf.k] for i in range(self.m)]
            for leaf in leaves
        ]
        ins = [
            values[Gradient(leaf)]
            for leaf in leaves
            for values in per
            if Gradient(leaf) in values
        ]
        call = jax.jit(around.gradient_joiner(shapes, present))
        outs: list[tuple[str, Role]] = [(f"gradient {n}", "gradients") for n in leaves]
        made = self.emit.run(
            "join gradients", call, ins, outs, self.layout.placements[s]
        )
        return dict(zip(leaves, made, strict=True))

    def _owner(self, leaf: Leaf) -> Placement:
        """Where a gradient goes: to its parameters; `x`, `side` and `targets` to the
        first stage that reads them.
        """
        return self.layout.placements[self.layout.routes.owner(leaf.port)]


def _role(ref: ProgramValue, stage: int, last: bool) -> Role:
    """What an array that a stage's program makes is for."""
    if isinstance(ref, Residual | Handed):
        return "residuals"
    if ref.leaf.port.kind == "skip":
        return "skips"
    if isinstance(ref, OutputLeaf):
        return "boundaries" if ref.leaf.port == Y and not last else "outputs"
    inner = isinstance(ref, Gradient) and ref.leaf.port == X and stage > 0
    return "boundaries" if inner else "gradients"


def _leaf_order(leaf: Leaf) -> tuple[str, int, int]:
    return leaf.port.kind, -1 if leaf.port.of is None else leaf.port.of, leaf.k
