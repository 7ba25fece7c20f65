"""The programs of a call: each stage traced once for each shape of microbatch, and cut
into programs.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from fpipe._core.caches import Key, Recent
from fpipe._core.pytrees import Shape, is_inexact
from fpipe._executors.placement import Placement
from fpipe._executors.request import CallKind, Inputs, Request
from fpipe._executors.routes import Routes
from fpipe._model.remat import Remat
from fpipe._model.stages import INDEX, KEY, TARGETS, Leaf, Port, Stage, X, Y
from fpipe._program.code import Code, Cotangent, Input, Program, ProgramValue, Window
from fpipe._program.stage_programs import SplitSpec, StagePrograms, split_stage
from fpipe._program.trace import (
    FlatStage,
    JointStage,
    differentiate,
    flatten,
    forward_alone,
)
from fpipe.schedules import Action, Kind


@dataclasses.dataclass(frozen=True)
class Layout:
    """The stages and the placement of each."""

    stages: tuple[Stage, ...]
    placements: tuple[Placement, ...]

    def stage_of(self, layer: int) -> Stage:
        """The stage of a layer."""
        return next(s for s in self.stages if layer in s.span)

    def home(self, layer: int) -> Placement:
        """Where a layer's parameters and state live."""
        return self.placements[self.stage_of(layer).index]

    @functools.cached_property
    def routes(self) -> Routes:
        """Who makes and who reads what goes between the stages."""
        return Routes(self.stages)

    def source_of(self, skip: Any) -> int:
        """The stage that stashes a skip for later stages."""
        source = self.routes.source(-1, Port("skip", skip))
        assert source is not None
        return source.stage


def index(i: int) -> np.uint32:
    """A number of a microbatch or of a layer, as the programs take it."""
    return np.uint32(i)


def split_pairs(order: Iterable[Action]) -> frozenset[tuple[int, int]]:
    """The (stage, microbatch) pairs whose backward is cut into `I` and `W`."""
    return frozenset((a.stage, a.microbatch) for a in order if a.kind == "I")


def direct_pairs(
    order: Iterable[Action], placements: Sequence[Hashable]
) -> frozenset[tuple[int, int]]:
    """The (stage, microbatch) pairs whose backward, or input gradient, is what their
    device runs next after the forward.
    """
    last: dict[Hashable, Action] = {}
    found = set()
    for a in order:
        place = placements[a.stage]
        if a.kind in "BI" and last.get(place) == Action("F", a.stage, a.microbatch):
            found.add((a.stage, a.microbatch))
        last[place] = a
    return frozenset(found)


class Programs:
    """The programs of a call, by stage and microbatch. Microbatches of one shape share
    them, and so do calls.

    Arguments:
        direct, split: (stage, microbatch) pairs, see `direct_pairs` and `split_pairs`.
        kept: what other calls made.
    """

    # Whether programs take the call's inputs whole and cut their piece out themselves,
    # and add to sums that come in.
    whole = True
    # Whether recomputations are inlined.
    opened = False

    def __init__(
        self,
        layout: Layout,
        direct: Set[tuple[int, int]],
        split: Set[tuple[int, int]],
        remat: Remat,
        inputs: Inputs,
        request: Request,
        kept: Recent,
    ) -> None:
        self.layout, self.inputs, self.request, self.warnings = (
            layout,
            inputs,
            request,
            dict[str, None](),
        )
        self._kept = kept
        self._remat, self._direct, self._split = remat, direct, split
        shares = inputs.cut.shares
        self._scales = (
            shares
            if request.loss and request.loss.reduction == "mean"
            else (1.0,) * len(shares)
        )
        self._flats: dict[Any, FlatStage] = {}
        self._joints: dict[Any, JointStage] = {}
        self._cut: dict[Any, StagePrograms] = {}
        reach = dict[
            tuple[int, Leaf], bool
        ]()  # of a stage's outputs: does a gradient depend on the cotangent
        for stage in layout.stages:
            for i in range(inputs.cut.m):
                self._trace(stage, i, reach)

    def scale(self, i: int) -> float:
        """The weight of a microbatch's loss."""
        return self._scales[i]

    def flat(self, s: int, i: int) -> FlatStage:
        """The stage, traced for that microbatch's shape."""
        return self._flats[s, self.inputs.cut.variant(i)]

    def joint(self, s: int, i: int) -> JointStage:
        """Forward and backward as one graph."""
        return self._joints[s, self.inputs.cut.variant(i), self.recomputes(s, i)]

    def of(self, s: int, i: int) -> Mapping[Kind, Program]:
        """The programs of a stage for that microbatch, by kind; what has nothing to
        compute is not there.
        """
        joint = self.joint(s, i)
        counts = tuple(
            (leaf, self.contributions(s, leaf, i)) for leaf in joint.cotangents
        )
        scale = self.scale(i) if self.layout.stages[s].last else 1.0
        split = (s, i) in self._split
        key = (id(joint), scale, counts, split)
        if key not in self._cut:
            windows = tuple(self._windows(s, i).items())
            spec = SplitSpec(
                cotangent_counts=counts,
                split_backward=split,
                inline_remats=self.opened,
                loss_cotangent=scale,
                returned=self._returned(s),
                windows=windows,
                accumulate=self._accumulates,
            )
            made = self._shared(
                s,
                (joint, spec),
                lambda: split_stage(joint, spec, lambda code: self._compile(s, code)),
            )
            self.warnings.update(dict.fromkeys(made.warnings))
            self._cut[key] = made
        return self._cut[key].by_kind

    def readers(self, s: int, leaf: Leaf, i: int) -> list[tuple[int, Leaf]]:
        """The stages that have a gradient for an output leaf, with their name for it."""
        readers = self.layout.routes.readers(s, leaf.port)
        names = [(reader.stage, Leaf(reader.port, leaf.k)) for reader in readers]
        return [(t, name) for t, name in names if name in self.joint(t, i).gradients]

    def contributions(self, s: int, leaf: Leaf, i: int) -> int:
        """How many cotangents an output leaf gets: one of each reader; that of the
        model's `y` comes from outside.
        """
        if leaf.port == Y and self.layout.stages[s].last:
            return 1
        return len(self.readers(s, leaf, i))

    @property
    def _accumulates(self) -> bool:
        return self.whole and self.inputs.cut.m > 1

    def recomputes(self, s: int, i: int) -> bool:
        """Whether the backward of that microbatch recomputes its forward."""
        direct = (s, i) in self._direct
        return self.request.differentiates and self._remat.recomputes(
            i, self.inputs.cut.m, direct
        )

    def _trace(self, stage: Stage, i: int, reach: dict[tuple[int, Leaf], bool]) -> None:
        s, variant, recomputes = (
            stage.index,
            self.inputs.cut.variant(i),
            self.recomputes(stage.index, i),
        )
        if (s, variant) not in self._flats:
            self._flats[s, variant] = self._flatten(stage, i)
        if (s, variant, recomputes) in self._joints:
            return
        flat = self._flats[s, variant]
        if self.request.differentiates:
            wanted, remat = (
                self._wanted(stage, flat, reach),
                self._remat if recomputes else None,
            )
            joint = self._shared(
                s, (flat, wanted, remat), lambda: differentiate(flat, wanted, remat)
            )
        else:
            joint = self._shared(s, (flat,), lambda: forward_alone(flat))
        self._joints[s, variant, recomputes] = joint
        for leaf, reached in joint.reach.items():
            reach[s, leaf] = reach.get((s, leaf), False) or reached

    def _flatten(self, stage: Stage, i: int) -> FlatStage:
        inputs, s = self.inputs, stage.index
        routes = self.layout.routes
        entering = {Port("params", k): inputs.params[k] for k in stage.params}
        whole: frozenset[Leaf] = frozenset()
        ports = [X, *(Port("skip", skip) for skip in stage.skips_in)]
        ports += [port for port in stage.call_inputs if port != X]
        if stage.last and self.request.loss is not None:
            ports.append(TARGETS)
        for port in ports:
            source = routes.source(s, port)
            if source is None:
                entering[port] = inputs.piece(port, i)
                whole |= inputs.whole(port)
            else:
                entering[port] = self.flat(source.stage, i).out[source.port]
        if inputs.state is not None:
            entering |= {Port("state", k): inputs.state[k] for k in stage.stateful}
        if KEY in entering and entering[KEY].leaves:
            entering[INDEX] = Shape.of(index(0))
            entering |= {Port("number", k): Shape.of(index(k)) for k in stage.keyed}
        where = f", stage {s}, microbatch {i}"
        loss = self.request.loss
        key = (tuple(entering.items()), whole, self.request.settings)
        return self._shared(
            s,
            key,
            lambda: flatten(stage, entering, loss=loss, whole=whole, where=where),
        )

    def _wanted(
        self, stage: Stage, flat: FlatStage, reach: Mapping[tuple[int, Leaf], bool]
    ) -> frozenset[Leaf]:
        """The input leaves whose gradient is asked for, by the call or because a
        gradient of an earlier stage depends on it.
        """

        def asked(leaf: Leaf) -> bool:
            source = self.layout.routes.source(stage.index, leaf.port)
            if source is None:
                return leaf in self.request.wanted
            return reach.get((source.stage, Leaf(source.port, leaf.k)), False)

        pairs = zip(flat.inputs, flat.shapes, strict=True)
        return frozenset(leaf for leaf, a in pairs if is_inexact(a) and asked(leaf))

    def _windows(self, s: int, i: int) -> dict[ProgramValue, Window]:
        """What a stage's programs take whole and cut themselves: the call's inputs, and
        cotangents of its `y`.
        """
        if self.inputs.cut.m == 1 or not self.whole:
            return {}
        flat, first, out = (
            self.flat(s, i),
            self.flat(s, 0),
            dict[ProgramValue, Window](),
        )
        whole = dict(zip(first.inputs, first.shapes, strict=True))
        for leaf, shape in zip(flat.inputs, flat.shapes, strict=True):
            given = self.layout.routes.is_given(s, leaf.port)
            if given and leaf not in flat.constant:
                out[Input(leaf)] = Window(whole[leaf].shape[0], shape.shape)
        if flat.stage.last and self.request.kind is CallKind.PULL_BACK:
            for k, (a, b) in enumerate(
                zip(flat.out[Y].leaves, first.out[Y].leaves, strict=True)
            ):
                out[Cotangent(Leaf(Y, k))] = Window(
                    b.shape[0] if b.shape else 1, a.shape
                )
        return out

    def _returned(self, s: int) -> frozenset[Leaf]:
        """A stage's outputs that the user gets as they are: its states, and the `y` of
        a single microbatch.
        """
        stage, outputs = self.layout.stages[s], self.flat(s, 0).outputs
        if not self.whole:
            return frozenset()
        whole = stage.last and self.inputs.cut.m == 1
        return frozenset(
            leaf
            for leaf in outputs
            if leaf.port.kind == "state" or (whole and leaf.port == Y)
        )

    def _compile(self, s: int, code: Code) -> Callable[..., Sequence[Any]]:
        """The function of a code; stages that compute the same share it, and its trace."""
        if self._loses(s):
            return code.compile()
        return self._kept.get(Key(code.identity), code.compile)

    def _loses(self, s: int) -> bool:
        """Whether a stage contains the loss: a function that may be another one in the
        next call.
        """
        return self.layout.stages[s].last and self.request.loss is not None

    def _shared(self, s: int, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What does not depend on the loss is kept for other calls, also of pipes of
        the same layers.
        """
        if self._loses(s):
            return make()
        stage = self.layout.stages[s]
        return self._kept.get(
            Key((stage.span, stage.skips_in, stage.skips_out, *key)), make
        )
