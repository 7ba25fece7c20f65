"""How the arrays of a call lie over the meshes of its stages.

In: what a slot holds, its shape, and the placement that it is on. Out: a sharding. Over
two meshes with the axes data=2 and model=2, with four rows a microbatch:

    slot                            shape      lies by
    params 0['up']                  [8, 32]    P(None, "model"), as the caller has it
    x[0], of all microbatches       [4, 4, 8]  P(None, "data")
    y[0] stage0 mb0                 [4, 8]     P("data")
    residual 0 stage0 mb0           [4, 32]    what XLA finds best
    sum params 0['up'] stage0       [2, 8, 32] P("data", None, "model"), a part each
    gradient params 0['up']         [8, 32]    P(None, "model")

A parameter that is itself cut over an axis of rows, `P("data", "model")`, is gathered
over that axis where actions read it: `P(None, "model")`.

What crosses stages has a sharding that is known before anything is compiled, so that a
transfer can be planned. A batch of several microbatches is stacked, so that each device
has its rows of each of them. Cut by rows as a whole, a piece of consecutive rows would
lie on few devices, and would have to be sent to the others.
"""

from collections.abc import Iterable, Mapping

from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from fpipe._executors.parameter_cuts import axes_of
from fpipe._executors.placed.instructions import (
    CallValue,
    GatheredParam,
    JoinedGradient,
    OnHost,
    SentPart,
    Slot,
    StageValue,
)
from fpipe._executors.placement import Placement
from fpipe._executors.programs import Layout
from fpipe._executors.request import Inputs
from fpipe._executors.transfers import Sending, sending
from fpipe._model.microbatch import Rows
from fpipe._model.needs import Share
from fpipe._model.stages import Leaf
from fpipe._program.code import GradientSum, Input, Inside, ProgramValue

Shape = tuple[int, ...]


class Shardings:
    """How the arrays of a call lie.

    Arguments:
        params: for each array of parameters on a mesh how the caller has it.

    Attributes:
        known: by slot, of those on meshes.
        free: the slots whose sharding XLA decides; `known` has a guess.
        stacks: for each slot of a stacked input the number of microbatches.
    """

    def __init__(
        self, layout: Layout, inputs: Inputs, params: Mapping[Leaf, NamedSharding]
    ) -> None:
        self.known: dict[Slot, Sharding] = {}
        self.free: set[Slot] = set()
        self.stacks: dict[Slot, int] = {}
        self._layout = layout
        self._inputs = inputs
        self._params = params
        self._shapes: dict[Slot, Shape] = {}

    def add(self, slot: Slot, shape: Shape, sharding: Sharding) -> None:
        """Note how an array lies."""
        self._shapes[slot] = shape
        if slot.placement.mesh is not None:
            self.known[slot] = sharding

    def add_copies(self, slots: Iterable[Slot], copies: Iterable[Slot]) -> None:
        """Note that arrays on a mesh are copied to the host's memory or back."""
        for slot, copy in zip(slots, copies, strict=True):
            host = isinstance(copy.value, OnHost)
            lies = self.known[slot].with_memory_kind(
                "pinned_host" if host else "device"
            )
            self.add(copy, self._shapes[slot], lies)

    def rows(self, microbatch: int) -> int:
        """The rows of a microbatch; 0: it has none."""
        cut = self._inputs.cut
        counts = cut.rows or cut.row_counts
        return counts[microbatch] if counts else 0

    def param(self, leaf: Leaf, placement: Placement) -> Sharding:
        """How an array of parameters lies on a placement, its own or a borrower's."""
        own = self._params.get(leaf)
        if own is None or placement.mesh is None:
            return placement.sharding
        if own.mesh.shape == placement.mesh.shape:
            return placement.cut_by(own.spec)
        return placement.sharding

    def is_cut_by_rows(self, leaf: Leaf, placement: Placement) -> bool:
        """Whether an array of parameters is cut over the axes of rows itself."""
        lies = self.param(leaf, placement)
        if not isinstance(lies, NamedSharding):
            return False
        return not {*placement.data}.isdisjoint(axes_of(lies.spec))

    def gathered(self, leaf: Leaf, placement: Placement) -> Sharding:
        """How an array of parameters lies on a placement while actions read it."""
        return placement.gathered(self.param(leaf, placement))

    def is_stacked(self, leaf: Leaf, placement: Placement) -> bool:
        """Whether the pieces of an input of the call lie stacked on a placement."""
        cut = self._inputs.cut
        if leaf.port.kind not in self._inputs.call:
            return False
        source = cut.splits[leaf.port.kind].sources[leaf.number]
        return (
            placement.parts > 1
            and cut.m > 1
            and len({*cut.rows}) == 1
            and isinstance(source, Rows)
            and source.axis == 0
        )

    def add_given(self, slot: Slot, leaf: Leaf, microbatch: int) -> None:
        """Note how an input of the call lies that a stage reads."""
        inputs, placement = self._inputs, slot.placement
        shape = inputs.array_shape(inputs.array(leaf, microbatch)).shape
        if self.is_stacked(leaf, placement):
            m = self.stacks[slot] = inputs.cut.m
            shape = (m, shape[0] // m, *shape[1:])
            self.add(slot, shape, placement.by_rows(1))
            return
        apart = inputs.cut.m == 1 or inputs.cut.ready
        if leaf.port.kind == "state" and not _has_rows(inputs, leaf):
            apart = False
        lies = self.by_rows(shape, microbatch if apart else None, placement)
        self.add(slot, shape, lies)

    def by_rows(
        self, shape: Shape, microbatch: int | None, placement: Placement
    ) -> Sharding:
        """How an array lies that may have the rows of a microbatch.

        Rows are told by their number. An axis that happens to be as long is shared in
        their place, which is right too, and slower.
        """
        rows = 0 if microbatch is None else self.rows(microbatch)
        axes = [n for n, length in enumerate(shape) if rows and length == rows]
        # Rows and tokens may have been merged.
        if not axes and rows and shape and shape[0] and shape[0] % rows == 0:
            axes = [0]
        return placement.by_rows(axes[0] if axes else None)

    def result(
        self,
        value: ProgramValue,
        shape: Shape,
        microbatch: int,
        placement: Placement,
        apart: bool,
    ) -> Sharding:
        """How a result of a stage's program lies.

        Arguments:
            apart: whether it is a sum that is kept as parts.
        """
        if isinstance(value, GradientSum):
            if not apart:
                return self.param(value.leaf, placement)
            total = self.gathered(value.leaf, placement)
            assert isinstance(total, NamedSharding)
            return placement.cut_by(P(placement.data, *total.spec))
        if not isinstance(value, Inside) and (
            value.leaf.port.kind == "state" and not _has_rows(self._inputs, value.leaf)
        ):
            return placement.sharding
        return self.by_rows(shape, microbatch, placement)

    def sent(self, slot: Slot, placement: Placement) -> Sending:
        """How the array of a slot comes to another placement."""
        assert slot not in self.free, f"{slot.name} stays where it is"
        source = self.known.get(slot, slot.placement.sharding)
        target = placement.sharding
        shape = self._shapes.get(slot, ())
        match slot.value:
            case CallValue(Input(leaf)) if leaf.port.kind == "params":
                target = self.param(leaf, placement)
            case GatheredParam(leaf):
                target = self.gathered(leaf, placement)
            case JoinedGradient(leaf) if leaf.port.kind == "params":
                target = self.param(leaf, placement)
            case StageValue(GradientSum(leaf)):
                target = self.param(leaf, placement)
            case StageValue(_, _, microbatch):
                target = self.by_rows(shape, microbatch, placement)
        self.add(slot.on(placement), shape, target)
        to = sending(shape, source, target)
        for n, cut in enumerate(to.cuts):
            part = Slot(SentPart(slot.value, to, n), slot.placement, slot.role)
            self.add(part, tuple(b - a for a, b in cut), to.made)
        return to


def _has_rows(inputs: Inputs, leaf: Leaf) -> bool:
    """Whether an array of a state has an entry for each row."""
    return inputs.share(leaf) in (Share.ROWS, Share.READY)
