"""What the actions of a schedule run, and from which values to which: the first pass
from a schedule to a plan.

A value is known by a `Slot`: what it is, and where it was made. `CallWork` goes through
the actions in the order in which they are issued. For each it finds the programs of its
stage, and the slots of what they read, wherever these are: the routes say who makes
them. It ends with a list of `Work`. For a step of two stages with one microbatch:

    work       on      reads                                      makes
    stage0_F   cpu:0   params 0[0] (cpu:0), x[0] (cpu:0)          y[0] stage0 mb0
    stage1_F   cpu:1   params 1[0] (cpu:1), y[0] stage0 mb0       loss[0] stage1 mb0,
                       (cpu:0), targets[0] (cpu:1)                residual 0 stage1 mb0
    stage1_B   cpu:1   params 1[0], y[0] stage0 mb0, …            gradient x[0] stage1
                                                                  mb0, …
    stage0_B   cpu:0   x[0], gradient x[0] stage1 mb0 (cpu:1), …  sum params 0[0] …

The next pass, in `lower.py`, moves what is read elsewhere, and gives slots numbers.

Boundaries, skips, borrowed parameters and cotangents are not told apart here. Each is a
value with a maker, so a new kind of route needs no new code in this module.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding

from fpipe._executors.placed.instructions import (
    BroughtBack,
    CallValue,
    GatheredParam,
    Number,
    OnHost,
    Slot,
    StageValue,
    StartedSum,
)
from fpipe._executors.placed.shardings import Shardings
from fpipe._executors.placement import Placement
from fpipe._executors.plan_data import Role
from fpipe._executors.programs import Layout, Programs, index
from fpipe._model.loss import sum_dtype
from fpipe._model.needs import Share
from fpipe._model.stages import FIRST, INDEX, Leaf, Port, X, Y
from fpipe._program.code import (
    Code,
    Cotangent,
    Gradient,
    GradientSum,
    Input,
    Inside,
    Output,
    Program,
    ProgramValue,
)
from fpipe._program.over_mesh import (
    GatheredArgument,
    MeshForm,
    ScatteredSum,
    row_sums,
)
from fpipe.schedules import Action
from fpipe.schedules._action import COPIES


@dataclasses.dataclass(frozen=True)
class Work:
    """A program to run, or, where there is none, values to bring.

    Attributes:
        name, call: as in `Run`; `None`: there is nothing to run.
        ins: what it reads, wherever that is.
        outs: what it makes, on its placement.
        placement: where it runs.
        brings: values that later work reads on this placement; they are moved together
            with `ins`.
        action: of the schedule; `None` for the work around the schedule, and for
            several actions in one program.
        calls_host, donates: as in `Run`.
        code: what the program of an action computes.
        parts: the actions of a program of several, in their order.
    """

    name: str
    call: Callable[..., Sequence[Any]] | None
    ins: tuple[Slot, ...]
    outs: tuple[Slot, ...]
    placement: Placement
    brings: tuple[Slot, ...] = ()
    action: Action | None = None
    calls_host: bool = False
    donates: tuple[Slot, ...] = ()
    code: Code | None = None
    parts: tuple["Work", ...] = ()

    @property
    def reads(self) -> tuple[Slot, ...]:
        """What it needs on its placement, also for later work."""
        return (*self.ins, *self.brings)


@dataclasses.dataclass(frozen=True)
class CopyWork:
    """Arrays to copy between a device and its host's memory.

    Attributes:
        action: an `O` or an `L`.
        ins: what is copied.
        outs: the copies.
        placement: the device.
    """

    action: Action
    ins: tuple[Slot, ...]
    outs: tuple[Slot, ...]
    placement: Placement

    @property
    def reads(self) -> tuple[Slot, ...]:
        """What it copies."""
        return self.ins


class CallWork:
    """The work of a call, as the actions go by.

    It is an interpreter of the schedule: `held` is what each stage has of each
    microbatch at this point. An action adds to it, and later actions look up there what
    they read. So the actions must come in an order in which every maker is earlier.

    Attributes:
        work: so far.
        feeds: the inputs of the call by the slot that they are put in; parameters
            first.
        constants: host values by slot.
        held: for each (stage, microbatch) the slots of what its programs read and made,
            on the stage's placement.
        copies: for each (stage, microbatch) the slots that were copied to the host or
            back, with the copies that its programs read in their place.
        on_host: the slots that an offloading policy has filled on the host.
        sums: the gradients accumulated so far, by stage and leaf.
        states: of each layer whose state goes from microbatch to microbatch, as they
            go by.
        gathered: the parameters that are gathered for all actions, so far.
        shardings: how arrays lie over the meshes of stages; empty where each is on one
            device.
        apart: by stage, the leaves whose gradients are kept as parts over its devices.
        scattered: by stage, those whose gradients each backward scatters.
    """

    def __init__(
        self, layout: Layout, programs: Programs, shardings: Shardings
    ) -> None:
        self.programs = programs
        self.layout = layout
        self.shardings = shardings
        self.inputs = programs.inputs
        self.microbatches = programs.inputs.cut.m
        self.work: list[Work | CopyWork] = []
        self.feeds: dict[Slot, Leaf] = {}
        self.constants: dict[Slot, Any] = {}
        self.held: dict[tuple[int, int], dict[ProgramValue, Slot]] = {}
        self.copies: dict[tuple[int, int], dict[Slot, Slot]] = {}
        self.on_host: set[Slot] = set()
        self.sums: dict[tuple[int, Leaf], Slot] = {}
        self.states: dict[int, tuple[Slot, ...]] = {}
        self.gathered: set[Slot] = set()
        self.apart: dict[int, frozenset[Leaf]] = {}
        self.scattered: dict[int, frozenset[Leaf]] = {}
        for stage in layout.stages:
            place = layout.placements[stage.index]
            if place.parts == 1:
                continue
            apart = self._summed_apart(stage.index)
            scattered = frozenset[Leaf]()
            if layout.unshard == "action":
                scattered = frozenset(
                    leaf for leaf in apart if shardings.is_cut_by_rows(leaf, place)
                )
            self.apart[stage.index] = apart - scattered
            self.scattered[stage.index] = scattered
        self._over_meshes: dict[tuple[int, MeshForm], Any] = {}
        # All parameters are feeds, also those that no program reads: so the arrays of a
        # call fill the first slots in the order in which they come.
        for layer, shape in enumerate(self.inputs.params):
            home = self.layout.home(layer)
            for k, array in enumerate(shape.leaves):
                leaf = Leaf(Port("params", layer), k)
                slot = Slot(CallValue(Input(leaf)), home, "parameters")
                self.feeds[slot] = leaf
                if layout.has_meshes:
                    shardings.add(slot, array.shape, shardings.param(leaf, home))

    def add(self, actions: Iterable[Action]) -> None:
        """Add what some actions run."""
        for action in actions:
            if action.kind == "F":
                self._forward(action)
            elif action.kind in COPIES:
                self._copy(action)
            else:
                self._backward(action)

    def add_unscheduled(
        self,
        name: str,
        call: Callable[..., Sequence[Any]],
        ins: Sequence[Slot],
        outs: Sequence[Slot],
        placement: Placement,
        lie: Sequence[tuple[tuple[int, ...], Sharding]] | None = None,
    ) -> None:
        """Add a program that belongs to no action.

        Arguments:
            lie: of a placement that is a mesh, the shapes of the results, and how each
                lies; default whole on each device.
        """
        jitted = jax.jit(call)
        if self.layout.has_meshes:
            known = lie or [((), placement.sharding)] * len(outs)
            for slot, (shape, sharding) in zip(outs, known, strict=True):
                self.shardings.add(slot, shape, sharding)
            if placement.mesh is not None:
                jitted = jax.jit(
                    call, out_shardings=[sharding for _, sharding in known]
                )
        work = Work(name, jitted, tuple(ins), tuple(outs), placement)
        self.work.append(work)

    def _forward(self, action: Action) -> None:
        """Bring all inputs of a stage for one microbatch, and run its forward."""
        _, stage, microbatch = action
        placement = self.layout.placements[stage]
        forward, *backwards = self.programs.of(stage, microbatch).values()
        # A backward may read inputs that its forward does not, and an output may be an
        # input unchanged. They come together with what the forward reads: one transfer,
        # and it is over long before the backward.
        values = list(forward.ins)
        for backward in backwards:
            values += backward.ins
        values += forward.aliases.values()
        sources: dict[ProgramValue, Slot] = {}
        for value in values:
            if isinstance(value, Input) and value not in sources:
                sources[value] = self._source(stage, microbatch, value.leaf)
        held = {value: slot.on(placement) for value, slot in sources.items()}
        self.held[stage, microbatch] = held
        ins = [sources[value] for value in forward.ins]
        self._run(action, forward, ins, tuple(sources.values()))
        # The next microbatch reads the state that this one leaves. A schedule that
        # permutes forwards was refused for a model with state (`schedule_of`).
        for layer in self.layout.stages[stage].stateful:
            port = Port("state", layer)
            if {Share.ROWS, Share.READY} & {*self.inputs.shares[layer]}:
                continue  # each microbatch has its own
            count = len(self.programs.flat(stage, microbatch).out[port].leaves)
            self.states[layer] = tuple(
                held[Output(Leaf(port, k))] for k in range(count)
            )

    def _copy(self, action: Action) -> None:
        """Copy what a forward left for its backward to the host, or back."""
        kind, stage, microbatch = action
        copies = self.copies.setdefault((stage, microbatch), {})
        # The arrays of this microbatch alone: parameters, batches and sums are one
        # array for all of them. What a policy has moved to the host is there already.
        held = self.held[stage, microbatch]
        programs = self.programs.of(stage, microbatch)
        kept = dict.fromkeys(
            held[value]
            for own, program in programs.items()
            if own != "F"
            for value in program.ins
            if value in held
        )
        slots = [
            slot
            for slot in kept
            if isinstance(slot.value, StageValue) and slot not in self.on_host
        ]
        ins, outs = [], []
        for slot in slots:
            ins.append(copies.get(slot, slot))
            copy = OnHost if kind == "O" else BroughtBack
            outs.append(slot._replace(value=copy(slot.value, stage)))
        copies.update(zip(slots, outs, strict=True))
        if slots:
            placement = self.layout.placements[stage]
            self.work.append(CopyWork(action, tuple(ins), tuple(outs), placement))

    def _backward(self, action: Action) -> None:
        """Run `R`, `B`, `I` or `W` on what the forward left and on cotangents."""
        kind, stage, microbatch = action
        program = self.programs.of(stage, microbatch).get(kind)
        if program is None:  # nothing is asked for that it would compute
            return
        placement = self.layout.placements[stage]
        last = self.layout.stages[stage].last
        held = self.held[stage, microbatch]
        copies = self.copies.get((stage, microbatch), {})
        self._start_sums(stage, program)
        ins = []
        for value in program.ins:
            if isinstance(value, Cotangent) and value.leaf.port == Y and last:
                # The cotangent of the model's `y` comes from outside, whole.
                n, _ = self.programs.output.part_of(value.leaf.number, microbatch)
                whole = Cotangent(Leaf(Y, n))
                slot = Slot(CallValue(whole), placement, "inputs")
            elif isinstance(value, Cotangent):
                # Each reader of an output has a gradient for it. The program takes them
                # all and adds them up, so no action waits for a sum made elsewhere.
                readers = self.programs.readers(stage, value.leaf, microbatch)
                reader, leaf = readers[value.number]
                slot = self.held[reader, microbatch][Gradient(leaf)]
            elif isinstance(value, GradientSum):
                slot = self.sums[stage, value.leaf]
            else:
                slot = copies.get(held[value], held[value])
            ins.append(slot)
            # A gradient may be this cotangent unchanged (of `x + f(p)` that of `x`). It
            # is not returned, only named: `jit` copies an argument that it returns.
            held[value] = slot.on(placement)
        self._run(action, program, ins)
        # The next backward of this stage adds to what this one has returned.
        for value in program.outs:
            if isinstance(value, GradientSum):
                self.sums[stage, value.leaf] = held[value]

    def _run(
        self,
        action: Action,
        program: Program,
        ins: Sequence[Slot],
        brings: tuple[Slot, ...] = (),
    ) -> None:
        """Run a stage's program, and hold what it makes."""
        _, stage, microbatch = action
        placement = self.layout.placements[stage]
        last = self.layout.stages[stage].last
        held = self.held[stage, microbatch]
        outs = []
        for value in program.outs:
            role = _role(value, stage, last)
            slot = Slot(StageValue(value, stage, microbatch), placement, role)
            outs.append(slot)
            held[value] = slot
        if program.code is not None:
            self.on_host.update(outs[n] for n in program.code.on_host)
        for value, same in program.aliases.items():
            held[value] = held[same]
        call = program.call
        if self.layout.has_meshes:
            call = self._over_mesh(stage, microbatch, program, outs)
        work = Work(
            program.name,
            call,
            tuple(ins),
            tuple(outs),
            placement,
            brings,
            action,
            program.calls_host,
            # A sum is a buffer of the plan's own that nothing else refers to, and only
            # such a buffer may be donated, or a state that the caller has handed over.
            # An input may be the caller's array, or alias it. A residual is read again
            # if a pull-back is called twice.
            tuple(
                slot
                for n, (value, slot) in enumerate(zip(program.ins, ins, strict=True))
                if isinstance(value, GradientSum)
                or (program.code is not None and n in program.code.donated)
            ),
            program.code,
        )
        self.work.append(work)

    def _over_mesh(
        self, stage: int, microbatch: int, program: Program, outs: Sequence[Slot]
    ) -> Callable[..., Sequence[Any]] | None:
        """The function of a program over the mesh of its stage, and how its results
        lie.
        """
        code, placement = program.code, self.layout.placements[stage]
        if code is None:
            return program.call
        shapes = [code.graph.avals[v].shape for v in (*code.outs, *code.sums)]
        if placement.mesh is None:
            for slot, shape in zip(outs, shapes, strict=True):
                self.shardings.add(slot, shape, placement.sharding)
            return program.call
        on_host = code.on_host
        results: list[Sharding | None] = []
        apart: set[int] = set()
        pairs = zip(outs, program.outs, shapes, strict=True)
        for n, (slot, value, shape) in enumerate(pairs):
            is_apart = self.is_apart(stage, value)
            if is_apart:
                apart.add(n - len(code.outs))
            lies = self.shardings.result(value, shape, microbatch, placement, is_apart)
            # Over other axes than those of rows, what stays on the stage lies as the
            # layers have it.
            inside = isinstance(value, Inside)
            free = inside and placement.has_other_axes and n not in on_host
            if n in on_host:
                lies = lies.with_memory_kind("pinned_host")
            self.shardings.add(slot, shape, lies)
            if free:
                self.shardings.free.add(slot)
            results.append(None if free else lies)
        form = MeshForm(
            placement.mesh,
            placement.data,
            frozenset(apart),
            tuple(results),
            self.shardings.rows(microbatch),
            frozenset(
                n
                for n, value in enumerate(program.ins)
                if isinstance(value, Input)
                and self.layout.routes.is_given(stage, value.leaf.port)
                and self.shardings.is_stacked(value.leaf, placement)
            ),
            self._gathered_in(program, placement),
            self._scattered_by(program, stage),
        )
        # The same code runs for all microbatches of one shape.
        key = (id(code), form)
        if key not in self._over_meshes:
            self._over_meshes[key] = self.programs.over_mesh(stage, code, form)
        return self._over_meshes[key]

    def _gathered_in(
        self, program: Program, placement: Placement
    ) -> tuple[GatheredArgument, ...]:
        """The parameters that a program gathers itself."""
        if self.layout.unshard == "step" or placement.parts == 1:
            return ()
        return tuple(
            GatheredArgument(n, self.shardings.gathered(value.leaf, placement))
            for n, value in enumerate(program.ins)
            if isinstance(value, Input)
            and value.leaf.port.kind == "params"
            and self.shardings.is_cut_by_rows(value.leaf, placement)
        )

    def _scattered_by(self, program: Program, stage: int) -> tuple[ScatteredSum, ...]:
        """The sums whose parts a program scatters itself."""
        scattered = self.scattered.get(stage, ())
        sums = [v.leaf for v in program.outs if isinstance(v, GradientSum)]
        found: list[ScatteredSum] = []
        for n, leaf in enumerate(sums):
            if leaf in scattered:
                lies = self.shardings.param(leaf, self.layout.placements[stage])
                assert isinstance(lies, NamedSharding)
                found.append(ScatteredSum(n, lies.spec))
        return tuple(found)

    def is_apart(self, stage: int, value: ProgramValue) -> bool:
        """Whether a value is a sum that each device has a part of."""
        return isinstance(value, GradientSum) and value.leaf in self.apart.get(
            stage, ()
        )

    def _summed_apart(self, stage: int) -> frozenset[Leaf]:
        """The leaves whose gradients a stage's programs sum apart on each device: those
        for which all of them can.
        """
        placement = self.layout.placements[stage]
        parts = placement.parts
        can: set[Leaf] = set()
        cannot: set[Leaf] = set()
        seen: set[int] = set()
        for i in range(self.microbatches):
            for program in self.programs.of(stage, i).values():
                code = program.code
                if code is None or id(code) in seen:
                    continue
                seen.add(id(code))
                found = row_sums(code, self.shardings.rows(i), parts)
                sums = [v.leaf for v in program.outs if isinstance(v, GradientSum)]
                for n, leaf in enumerate(sums):
                    # A sum of one term crosses the axes once in any case. But what is
                    # cut over them is scattered: no device needs all of it.
                    several = self.microbatches > 1
                    asked = several or self.shardings.is_cut_by_rows(leaf, placement)
                    (can if asked and n in found else cannot).add(leaf)
        return frozenset(can - cannot)

    def _source(self, stage: int, microbatch: int, leaf: Leaf) -> Slot:
        """Where an input of a stage is made, or put."""
        port, k = leaf
        placement = self.layout.placements[stage]
        maker = self.layout.routes.source(stage, port)
        if maker is not None:
            return self.held[maker.stage, microbatch][Output(Leaf(maker.port, k))]
        if port.kind == "params":
            return self._param(leaf)
        if port.kind == "state" and port.of in self.states:
            return self.states[port.of][k]
        if port in (INDEX, FIRST) or port.kind == "number":
            own = self.layout.stages[stage]
            if port == INDEX:
                number = microbatch
            elif port == FIRST:
                number = own.span.start
            else:
                number = own.model.key_number(port.of)
            slot = Slot(Number(number), placement, "inputs")
            self.constants[slot] = index(number)
            return slot
        # The whole input: the program cuts its piece out of it. Pieces that were cut
        # before would lie beside the batch, and cost a dispatch each.
        array = self.inputs.array(leaf, microbatch)
        slot = Slot(CallValue(Input(array)), placement, "inputs")
        self.feeds[slot] = array
        if self.layout.has_meshes:
            self.shardings.add_given(slot, leaf, microbatch)
        return slot

    def _param(self, leaf: Leaf) -> Slot:
        """Where an array of parameters is, for all stages that read it."""
        home = self.layout.home(leaf.port.of)
        gathered = Slot(GatheredParam(leaf), home, "parameters")
        if gathered in self.gathered:
            return gathered
        given = Slot(CallValue(Input(leaf)), home, "parameters")
        if home.parts == 1 or self.layout.unshard == "action":
            return given
        if not self.shardings.is_cut_by_rows(leaf, home):
            return given
        self._gather_params(self.layout.routes.home(leaf.port.of))
        return gathered

    def _gather_params(self, stage: int) -> None:
        """Gather the parameters of a stage that are cut over axes of rows: together,
        before the first action that reads one of them.
        """
        placement = self.layout.placements[stage]
        ins, outs = [], []
        lie: list[tuple[tuple[int, ...], Sharding]] = []
        for layer in self.layout.stages[stage].span:
            for k, array in enumerate(self.inputs.params[layer].leaves):
                leaf = Leaf(Port("params", layer), k)
                if not self.shardings.is_cut_by_rows(leaf, placement):
                    continue
                ins.append(Slot(CallValue(Input(leaf)), placement, "parameters"))
                outs.append(Slot(GatheredParam(leaf), placement, "parameters"))
                lie.append((array.shape, self.shardings.gathered(leaf, placement)))
        self.add_unscheduled(
            "gather parameters", lambda *arrays: [*arrays], ins, outs, placement, lie
        )
        self.gathered.update(outs)

    def _start_sums(self, stage: int, program: Program) -> None:
        """Zeros for the sums that a stage's program adds to, made together."""
        # Only the first backward of a stage finds some that are missing. Later ones add
        # to what the one before returned. Zeros, and not a first program that makes the
        # sum: that would be one more program to compile for each stage.
        starts = []
        outs = []
        lie: list[tuple[tuple[int, ...], Sharding]] = []
        placement = self.layout.placements[stage]
        for value in program.ins:
            if isinstance(value, GradientSum) and (stage, value.leaf) not in self.sums:
                shape = self.inputs.array_shape(self.inputs.array(value.leaf))
                sizes = shape.shape
                if self.is_apart(stage, value):
                    sizes = (placement.parts, *sizes)
                # The new value of a state is a maximum, and nothing is less than this.
                start = -jnp.inf if value.leaf.port.kind == "state" else 0
                starts.append(_Start(sizes, start, sum_dtype(shape.dtype)))
                slot = Slot(StartedSum(value.leaf, stage), placement, "gradients")
                self.sums[stage, value.leaf] = slot
                outs.append(slot)
                apart = self.is_apart(stage, value)
                lie.append(
                    (sizes, self.shardings.result(value, sizes, 0, placement, apart))
                )

        if outs:
            zeros = _zeros_of(tuple(starts))
            self.add_unscheduled("zeros", zeros, [], outs, placement, lie)


class _Start(NamedTuple):
    """What a sum starts from: an array full of one number."""

    shape: tuple[int, ...]
    number: float
    dtype: Any


@functools.lru_cache(256)
def _zeros_of(starts: tuple[_Start, ...]) -> Callable[[], list[jax.Array]]:
    """The function that makes what some sums start from."""

    # JAX compiles a function once. Stages, calls and pipes with equal parameters get
    # the same one.
    def zeros() -> list[jax.Array]:
        return [jnp.full(*start) for start in starts]

    return zeros


def _role(value: ProgramValue, stage: int, last: bool) -> Role:
    """What an array that a stage's program makes is for.

    Cotangents of boundaries count as boundaries: they too are as large as an
    activation, and cross to a neighbour.
    """
    if isinstance(value, Inside):
        return "residuals"
    port = value.leaf.port
    if port.kind == "skip":
        return "skips"
    if isinstance(value, Output):
        return "boundaries" if port == Y and not last else "outputs"
    crosses = isinstance(value, Gradient) and port == X and stage > 0
    return "boundaries" if crosses else "gradients"
