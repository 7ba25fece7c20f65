"""The programs of a call: each stage traced once for each shape of microbatch, and
split into the programs of its actions.

In: the stages with their routes, the shapes of a call's inputs, what it asks for, and
which backwards the schedule splits. Out: for each stage and microbatch its programs by
kind of action. Microbatches of one shape share them. For two stages and a batch of 7
rows in 3 microbatches (of 3, 3 and 1 rows), everything recomputed:

                   microbatch 0   microbatch 1   microbatch 2
    stage 0        F, B of f32[3] the same       F, B of f32[1]
    stage 1        F, B of f32[3] the same       F, B of f32[1]

A forward trace of a stage needs the shapes that the stages before it return; a backward
of a stage is asked for only if a gradient of an earlier one depends on it. So stages
are traced in order.

The steps from a stage to its programs, each kept by what it depends on:

    flat      the stage as a graph from arrays to arrays       shapes, settings
    joint     forward and backward as one graph                + wanted gradients, remat
    programs  that graph cut into F and B, or F, I and W       + how the schedule splits

A smaller last microbatch repeats all three steps, another schedule the last one alone.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from fpipe._core.caches import Key, Recent
from fpipe._core.processes import first_devices
from fpipe._core.pytrees import Shape, is_inexact
from fpipe._core.settings import debugging
from fpipe._executors.placement import Placement, Unshard, over_processes
from fpipe._executors.request import CallKind, Inputs, Request
from fpipe._executors.routes import Routes
from fpipe._model.joining import Apart, Concatenated, Join, Stacked
from fpipe._model.microbatch import Rows
from fpipe._model.needs import Share
from fpipe._model.remat import Remat
from fpipe._model.stages import INDEX, KEY, TARGETS, Leaf, Port, Stage, X, Y
from fpipe._program.chain import Chain
from fpipe._program.code import Code, Cotangent, Input, Program, ProgramValue, Window
from fpipe._program.host_calls import Places
from fpipe._program.over_mesh import MeshForm, compile_over
from fpipe._program.stage_programs import SplitSpec, StagePrograms, split_stage
from fpipe._program.trace import (
    FlatStage,
    JointStage,
    differentiate,
    forward_only,
    trace_stage,
)
from fpipe.schedules import Action, Kind
from fpipe.schedules._rules import OPTIONAL


@dataclasses.dataclass(frozen=True)
class Layout:
    """The stages and the placement of each.

    Attributes:
        unshard: how often parameters are gathered that are cut over axes of rows.
    """

    stages: tuple[Stage, ...]
    placements: tuple[Placement, ...]
    unshard: Unshard = "step"

    def home(self, layer: int) -> Placement:
        """Where a layer's parameters and state live."""
        return self.placements[self.routes.home(layer)]

    @functools.cached_property
    def has_meshes(self) -> bool:
        """Whether a stage is on several devices."""
        return any(place.mesh is not None for place in self.placements)

    @functools.cached_property
    def is_over_processes(self) -> bool:
        """Whether a stage is in another process."""
        return over_processes(self.placements)

    @functools.cached_property
    def firsts(self) -> tuple[Placement, ...]:
        """For each process its first device: of the first stage that it has a part of,
        if there is one.
        """
        return tuple(
            next(
                (
                    Placement.of(device)
                    for place in self.placements
                    for device in place.devices
                    if device.process_index == first.process_index
                ),
                Placement.of(first),
            )
            for first in first_devices()
        )

    @functools.cached_property
    def first(self) -> Placement:
        """The first device of this process."""
        if not self.is_over_processes:
            return Placement.of(self.placements[0].device)
        return next(place for place in self.firsts if place.is_here)

    @functools.cached_property
    def routes(self) -> Routes:
        """Who makes and who reads what goes between the stages."""
        return Routes(self.stages)


def index(i: int) -> np.uint32:
    """A number of a microbatch or of a layer, as the programs take it."""
    # `jax.random.fold_in` takes a uint32.
    return np.uint32(i)


def split_pairs(order: Iterable[Action]) -> frozenset[tuple[int, int]]:
    """The (stage, microbatch) pairs whose backward is split into `I` and `W`."""
    return frozenset((a.stage, a.microbatch) for a in order if a.kind == "I")


def apart_pairs(order: Iterable[Action]) -> frozenset[tuple[int, int]]:
    """The (stage, microbatch) pairs whose recomputation is an action of its own."""
    return frozenset((a.stage, a.microbatch) for a in order if a.kind == "R")


def direct_pairs(
    order: Iterable[Action], placements: Sequence[Hashable]
) -> frozenset[tuple[int, int]]:
    """The (stage, microbatch) pairs whose backward, or input gradient, is what their
    device runs next after the forward, an own recomputation and copies of others aside.

    For these pairs all residuals may be kept at no cost: a recomputation would make
    them again at once. For 1F1B and ZB-H1 they are all pairs of the last stage:

        device 1 of 2, 1F1B      F0 B0 F1 B1     (1, 0) and (1, 1)
        device 1 of 2, GPipe     F0 F1 B0 B1     none
    """
    last: dict[Hashable, Action] = {}
    found = set()
    for action in order:
        placement = placements[action.stage]
        own = last.get(placement) == action._replace(kind="F")
        if action.kind in OPTIONAL and own == (action.kind == "R"):
            continue
        if action.kind in "BI" and own:
            found.add((action.stage, action.microbatch))
        last[placement] = action
    return frozenset(found)


@dataclasses.dataclass(frozen=True)
class ProgramForm:
    """In which form an executor wants its programs.

    Attributes:
        whole_inputs: programs take the call's inputs whole and slice their piece out
            themselves, and add gradients to sums that come in. So the pieces of a batch
            never lie beside it, and slicing and adding cost no program of their own.
        inline_remats: recomputations are inlined, so that their equations can be told
            apart.
        input_gradients: stages whose input gradient is always made, whether or not
            anything depends on it.
        axes: of stages on several devices, the mesh whose axes their layers may name.
    """

    whole_inputs: bool = True
    inline_remats: bool = False
    input_gradients: frozenset[int] = frozenset()
    axes: Mapping[int, AbstractMesh] = dataclasses.field(default_factory=dict)


def _where(stage: Stage, microbatch: int) -> str:
    """The words that follow the name of the layer in an error: where it was."""
    return f", stage {stage.pipe_stage}, microbatch {microbatch}"


class Programs:
    """The programs of a call, by stage and microbatch.

    Arguments:
        routes: the stages in order, and what goes between them.
        form: how the executor wants them.
        direct, split, apart: (stage, microbatch) pairs, see `direct_pairs`,
            `split_pairs` and `apart_pairs`.
        remat: which backwards recompute their forward.
        inputs: the shapes of the call's inputs, and how they are cut.
        request: what the call asks for.
        kept: what other calls have traced and split, also of other pipes of the same
            layers.
    """

    def __init__(
        self,
        routes: Routes,
        form: ProgramForm,
        direct: Set[tuple[int, int]],
        split: Set[tuple[int, int]],
        apart: Set[tuple[int, int]],
        remat: Remat,
        inputs: Inputs,
        request: Request,
        kept: Recent,
    ) -> None:
        self.routes = routes
        self.inputs = inputs
        self.request = request
        self.warnings: dict[str, None] = {}
        self._form = form
        self._direct = direct
        self._split = split
        self._apart = apart
        self._remat = remat
        self._kept = kept
        # For a mean each microbatch's loss is weighted by its share of the rows, and so
        # is its gradient: then sums over microbatches are those of the whole batch.
        mean = request.loss is not None and request.loss.reduction == "mean"
        cut = inputs.cut
        self.scales: tuple[float, ...] = cut.shares if mean else (1.0,) * cut.m
        model = routes.stages[0].model
        self._places = Places(
            tuple(layer.name for layer in model.layers),
            tuple(stage.pipe_stage for stage in routes.stages for _ in stage.span),
        )
        # By the first microbatch of the same shapes.
        self._flats: dict[tuple[int, int], FlatStage] = {}
        self._joints: dict[tuple[int, int, bool], JointStage] = {}
        self._programs: dict[Hashable, StagePrograms] = {}
        self._chains: dict[Chain, Callable[..., Sequence[Any]]] = {}
        # Whether a gradient depends on the cotangent of a stage's output. Stages with
        # frozen parameters alone, in front, have no backward at all.
        reach: dict[tuple[int, Leaf], bool] = {}
        for stage in routes.stages:
            with self._tracing(stage.index):
                for i in range(inputs.cut.m):
                    self._trace(stage, i, reach)

    def flat(self, s: int, i: int) -> FlatStage:
        """The stage, traced for that microbatch's shape."""
        return self._flats[s, self.inputs.cut.like[i]]

    def joint(self, s: int, i: int) -> JointStage:
        """Forward and backward as one graph."""
        return self._joints[s, self.inputs.cut.like[i], self.recomputes(s, i)]

    @functools.cached_property
    def output(self) -> Join:
        """How the outputs of the microbatches become `y`."""
        cut = self.inputs.cut
        last = self.routes.stages[-1].index
        return Join.of_output(self.flat(last, 0).out[Y], cut.m if cut.ready else None)

    def recomputes(self, s: int, i: int) -> bool:
        """Whether the backward of that microbatch recomputes its forward."""
        if not self.request.differentiates:
            return False
        direct = (s, i) in self._direct
        return self._remat.recomputes(i, self.inputs.cut.m, direct)

    def _keeps_many(self, s: int) -> bool:
        """Whether a stage keeps residuals that recomputation would save: some backward
        neither recomputes nor follows its forward directly.
        """
        m = self.inputs.cut.m
        return any(
            (s, i) not in self._direct and not self._remat.recomputes(i, m, False)
            for i in range(m)
        )

    def readers(self, s: int, leaf: Leaf, i: int) -> list[tuple[int, Leaf]]:
        """The stages that have a gradient for an output leaf, with their name for it:
        each sends a cotangent back. A stage that reads an array but does not
        differentiate it (a mask of integers) sends none.
        """
        found = []
        for reader in self.routes.readers(s, leaf.port):
            name = Leaf(reader.port, leaf.number)
            if name in self.joint(reader.stage, i).gradients:
                found.append((reader.stage, name))
        return found

    def of(self, s: int, i: int) -> Mapping[Kind, Program]:
        """The programs of a stage for that microbatch, by kind; what has nothing to
        compute is not there.
        """
        stage = self.routes.stages[s]
        joint = self.joint(s, i)
        # How many cotangents come for each output; that of the model's `y` comes from
        # outside.
        counts = tuple(
            (
                leaf,
                1 if leaf.port == Y and stage.last else len(self.readers(s, leaf, i)),
            )
            for leaf in joint.cotangents
        )
        # Only the last stage has the loss in it, so only its programs depend on the
        # microbatch's share.
        scale = self.scales[i] if stage.last else 1.0
        split = (s, i) in self._split
        apart = (s, i) in self._apart
        key = (id(joint), scale, counts, split, apart)
        if key in self._programs:
            return self._programs[key].by_kind
        whole = self._form.whole_inputs
        several = self.inputs.cut.m > 1
        joined = several and not self.inputs.cut.ready
        spec = SplitSpec(
            stage=stage.pipe_stage,
            cotangent_counts=counts,
            split_backward=split,
            recompute_apart=apart,
            inline_remats=self._form.inline_remats,
            loss_cotangent=scale,
            # What the user gets unchanged: states, and the `y` of a single microbatch,
            # or of ready-made ones.
            # A user may donate these, so they alias nothing that is still needed.
            returned=frozenset(
                leaf
                for leaf in self.flat(s, 0).outputs
                if whole
                and (
                    self._returned_state(leaf)
                    or (leaf.port == Y and stage.last and not joined)
                )
            ),
            donated=frozenset(
                leaf
                for leaf in self.flat(s, 0).inputs
                if self.request.donates_state
                and leaf.port.kind == "state"
                and self._returned_state(leaf)
            ),
            windows=tuple(self._windows(s, i).items()),
            accumulate=whole and several,
            keeps_many=self._keeps_many(s),
            places=self._places,
        )

        def compile_code(code: Code) -> Any:
            # The scan executor compiles no stage alone: codes become branches of its
            # one program.
            if not whole:
                return code
            if self._has_loss(s):
                return code.compile()
            # Stages that compute the same share the function, and its trace.
            # But for what they donate, which depends on whether JAX looks for NaNs.
            return self._kept.get(Key((debugging(), code.identity)), code.compile)

        with self._tracing(s):
            made = self._keep(
                s, (joint, spec), lambda: split_stage(joint, spec, compile_code)
            )
        self.warnings.update(dict.fromkeys(made.warnings))
        self._programs[key] = made
        return made.by_kind

    def over_mesh(
        self, s: int, code: Code, form: MeshForm
    ) -> Callable[..., Sequence[Any]]:
        """The function of one of a stage's codes, over a mesh."""
        if self._has_loss(s):
            return compile_over(code, form)
        key = Key((debugging(), form.identity(code)))
        return self._kept.get(key, lambda: compile_over(code, form))

    def chained(
        self, stages: Iterable[int], chain: Chain
    ) -> Callable[..., Sequence[Any]]:
        """The function of several programs of some stages that run as one."""
        if any(self._has_loss(s) for s in stages):
            if chain not in self._chains:
                self._chains[chain] = chain.compile()
            return self._chains[chain]
        return self._kept.get(Key((debugging(), chain)), chain.compile)

    # --- tracing ---

    def _tracing(self, s: int) -> AbstractContextManager[Any]:
        """The context in which a stage is traced: that of the executor, or the axes of
        the stage's own mesh.
        """
        axes = self._form.axes.get(s)
        if axes is None:
            return contextlib.nullcontext()
        return jax.sharding.use_abstract_mesh(axes)

    def _trace(self, stage: Stage, i: int, reach: dict[tuple[int, Leaf], bool]) -> None:
        """Trace and differentiate a stage for a microbatch, unless that is done."""
        s = stage.index
        # Microbatches of one shape share a trace, and those that also agree in whether
        # they recompute share a joint graph. `except_last` makes two of these.
        like = self.inputs.cut.like[i]
        recomputes = self.recomputes(s, i)
        if (s, like) not in self._flats:
            self._flats[s, like] = self._flatten(stage, i)
        if (s, like, recomputes) in self._joints:
            return
        flat = self._flats[s, like]
        if self.request.differentiates:
            wanted = self._wanted(stage, flat, reach)
            remat = self._remat if recomputes else None
            joint = self._keep(
                s,
                (flat, wanted, remat),
                lambda: differentiate(flat, wanted, remat, where=_where(stage, i)),
            )
        else:
            joint = self._keep(s, (flat,), lambda: forward_only(flat))
        self._joints[s, like, recomputes] = joint
        # A later stage asks for a gradient if any microbatch of this one needs it.
        for leaf, reached in joint.reach.items():
            reach[s, leaf] = reach.get((s, leaf), False) or reached

    def _flatten(self, stage: Stage, i: int) -> FlatStage:
        """Trace a stage, from the shapes of everything that enters it."""
        s = stage.index
        inputs = self.inputs
        loss = self.request.loss if stage.last else None
        # What enters, by port: parameters, what earlier stages make, what the call
        # gives, states, and the numbers that keys are made from.
        entering = {Port("params", k): inputs.params[k] for k in stage.param_layers}
        whole: frozenset[Leaf] = frozenset()
        ports = [X, *(Port("skip", skip) for skip in stage.skips_in)]
        ports += [port for port in stage.call_inputs if port != X]
        ports += [TARGETS] if loss is not None else []
        for port in ports:
            source = self.routes.source(s, port)
            if source is None:
                entering[port] = inputs.piece(port, i)
                whole |= inputs.whole(port)
            else:
                entering[port] = self.flat(source.stage, i).out[source.port]
        if inputs.state is not None:
            for k in stage.stateful:
                entering[Port("state", k)] = inputs.piece(Port("state", k), i)
            whole |= {leaf for leaf in inputs.overwritten if leaf.port in entering}
        if KEY in entering and entering[KEY].leaves:
            entering[INDEX] = Shape.of(index(0))
            entering |= {Port("number", k): Shape.of(index(k)) for k in stage.keyed}
        where = _where(stage, i)
        key = (tuple(entering.items()), whole, self.request.settings)
        return self._keep(
            s,
            key,
            lambda: trace_stage(stage, entering, loss=loss, whole=whole, where=where),
        )

    def _wanted(
        self, stage: Stage, flat: FlatStage, reach: Mapping[tuple[int, Leaf], bool]
    ) -> frozenset[Leaf]:
        """The input leaves whose gradient is asked for: by the call, or because a
        gradient of an earlier stage depends on it.
        """
        always = stage.index in self._form.input_gradients and self.request.wanted
        wanted = set()
        for leaf, shape in zip(flat.inputs, flat.shapes, strict=True):
            source = self.routes.source(stage.index, leaf.port)
            if source is None:
                # Ready-made microbatches are arrays of their own. They share programs,
                # so if any of them is asked for, all are.
                arrays = {self.inputs.array(leaf, i) for i in range(self.inputs.cut.m)}
                asked = not arrays.isdisjoint(self.request.wanted)
            else:
                asked = reach.get((source.stage, Leaf(source.port, leaf.number)), False)
            if is_inexact(shape) and (asked or (always and leaf.port == X)):
                wanted.add(leaf)
        return frozenset(wanted)

    def _windows(self, s: int, i: int) -> dict[ProgramValue, Window]:
        """What a stage's programs take whole and slice themselves: inputs of the call
        that are cut, and cotangents of its `y`.
        """
        windows: dict[ProgramValue, Window] = {}
        if self.inputs.cut.m == 1 or not self._form.whole_inputs:
            return windows
        flat = self.flat(s, i)
        cut = self.inputs.cut
        # All pieces but the last have as many rows as the first.
        for leaf in flat.inputs:
            axis = None
            if self.routes.is_given(s, leaf.port) and leaf not in flat.constant:
                source = cut.splits[leaf.port.kind].sources[leaf.number]
                axis = source.axis if isinstance(source, Rows) else None
            elif self._has_rows(leaf):
                axis = 0
            if axis is not None:
                windows[Input(leaf)] = Window(cut.rows[0], cut.rows[i], axis)
        if flat.stage.last and self.request.kind is CallKind.PULL_BACK:
            # Cut as `y` was put together; its rows need not be those of the inputs.
            first = self.flat(s, 0).out[Y]
            pairs = zip(flat.out[Y].leaves, first.leaves, strict=True)
            for k, (piece, first_piece) in enumerate(pairs):
                cotangent = Cotangent(Leaf(Y, k))
                match self.output.part_of(k, i)[1]:
                    case Stacked():
                        windows[cotangent] = Window(1, 1, None)
                    case Concatenated(_, axis):
                        stride, rows = first_piece.shape[axis], piece.shape[axis]
                        windows[cotangent] = Window(stride, rows, axis)
                    case Apart():
                        pass  # it is one already
        return windows

    def _returned_state(self, leaf: Leaf) -> bool:
        """Whether a leaf is of a state, and the user gets it as a stage leaves it."""
        # What is joined, or made by the backward, is put together after all stages.
        if leaf.port.kind != "state" or leaf in self.inputs.overwritten:
            return False
        return not (self._has_rows(leaf) and self.inputs.cut.m > 1)

    def _has_rows(self, leaf: Leaf) -> bool:
        """Whether a leaf is of a state that has rows, which microbatches share out."""
        return leaf.port.kind == "state" and self.inputs.share(leaf) is Share.ROWS

    # --- keeping ---

    def _has_loss(self, s: int) -> bool:
        """Whether a stage contains the loss: a function that may be another one in the
        next call.
        """
        return self.routes.stages[s].last and self.request.loss is not None

    def _keep(self, s: int, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What does not depend on the loss is kept for other calls.

        With the loss it is kept with its plan alone: a `loss_fn` that is a new function
        at each step would fill the cache with programs that nothing finds again.
        """
        if self._has_loss(s):
            return make()
        stage = self.routes.stages[s]
        axes = self._form.axes.get(s)
        whole_key = Key((stage.span, stage.skips_in, stage.skips_out, axes, *key))
        return self._kept.get(whole_key, make)
