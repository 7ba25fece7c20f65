"""What runs after the actions of a schedule: the outputs of all microbatches joined,
the loss reduced, states finished, and gradients summed at their owners.

Each function adds its programs to the work of the call, and returns the slots of what
they make. For a step of two stages with two microbatches, whose loss divides by a
weight, they add

    reduce loss         loss[0] stage1 mb0, loss[0] stage1 mb1, weight[0] stage1 mb0, …
                            -> loss[0], weight[0]
    join gradients      gradient x[0] stage0 mb0, gradient x[0] stage0 mb1
                            -> gradient x[0]
    finish gradients    gradient x[0], sum params 0[0] stage0 mb1, weight[0]
                            -> gradient x[0], gradient params 0[0]

and the last one a second time on the second device, for the parameters that are there.

They could be part of the last backward of each stage. But then the last backward would
be another program than the others, and a stage's backward is the most expensive one to
compile.
"""

import functools
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding

from fpipe._core.pytrees import PyTree, Shape, Spec, aval, eval_shape, pack
from fpipe._executors.placed.instructions import CallValue, JoinedGradient, Slot
from fpipe._executors.placed.work import CallWork, Work
from fpipe._executors.placement import Placement
from fpipe._executors.request import CallKind
from fpipe._model.joining import Apart, Concatenated, Join, check_alike
from fpipe._model.loss import Loss, divided, sum_dtype, wide
from fpipe._model.microbatch import Rows
from fpipe._model.needs import Share
from fpipe._model.stages import AUX, LOSS, WEIGHT, Leaf, Port, Stage, Y
from fpipe._model.wrappers import Microbatches
from fpipe._program.code import Gradient, Output
from fpipe._program.row_sums import add_parts


class SlotTree(NamedTuple):
    """A pytree whose arrays are in slots."""

    shape: Shape
    slots: tuple[Slot, ...]


class ReducedLoss(NamedTuple):
    """What becomes of a loss; the gradients need its total weight."""

    loss: SlotTree
    weight: Slot | None
    aux: SlotTree | None


def join_outputs(call: CallWork) -> SlotTree:
    """Join the `y` of all microbatches."""
    # The shapes say what comes, and whether it fits together, before anything runs.
    stage = call.layout.stages[-1].index
    placement = call.layout.placements[stage]
    m = call.microbatches
    pieces = [call.programs.flat(stage, i).out[Y] for i in range(m)]
    first = pieces[0]
    how = call.programs.output
    check_alike(pieces, "`pipe(params, x)`: y", how)
    leaves = [Leaf(Y, k) for k in range(len(first.leaves))]
    ins = _of_all_microbatches(call, stage, leaves)
    # One piece is the whole, except that 0-d pieces become arrays of one element. So is
    # each of those that are ready-made.
    if call.inputs.cut.ready:
        parts = [part for part in how.parts if isinstance(part, Apart)]
        return SlotTree(
            Shape(
                how.whole,
                tuple(pieces[p.microbatch].leaves[p.number] for p in parts),
            ),
            tuple(ins[p.number * m + p.microbatch] for p in parts),
        )
    if m == 1 and all(isinstance(part, Concatenated) for part in how.parts):
        return SlotTree(Shape(how.whole, first.leaves), tuple(ins))

    def joined(*arrays: Any) -> list[Any]:
        # The pieces of one array stand together.
        return how.arrays([arrays[n : n + m] for n in range(0, len(arrays), m)])

    shapes = [piece.leaves[leaf.number] for leaf in leaves for piece in pieces]
    outs = [Slot(CallValue(Output(leaf)), placement, "outputs") for leaf in leaves]
    whole = jax.eval_shape(joined, *shapes)
    lie = [
        (a.shape, placement.by_rows(_shared_axis(a.shape, placement))) for a in whole
    ]
    call.add_unscheduled("join y", joined, ins, outs, placement, lie)
    return SlotTree(Shape(how.whole, tuple(whole)), tuple(outs))


def reduce_loss(call: CallWork, loss: Loss) -> ReducedLoss:
    """Reduce the losses of all microbatches: loss, total weight and stacked aux in one
    program, on the last stage.
    """
    stage = call.layout.stages[-1].index
    placement = call.layout.placements[stage]
    m = call.microbatches
    pieces = [call.programs.flat(stage, i).out for i in range(m)]
    first = pieces[0]
    ready = m if call.inputs.cut.ready else None
    join = Join.of_aux(first[AUX], ready)
    check_alike(
        [piece[AUX] for piece in pieces],
        f"`{loss.call}(has_aux=True)`: aux",
        join,
    )
    weighted = WEIGHT in first
    scales = [call.programs.scales[i] for i in range(m)]

    def reduce(*arrays: Any) -> list[Any]:
        # The values of one leaf stand together: losses, weights if there are any, and
        # the leaves of aux.
        columns = [arrays[n : n + m] for n in range(0, len(arrays), m)]
        losses = columns.pop(0)
        weights = columns.pop(0) if weighted else None
        # Added one after the other, as `fpipe.sequential` does. `jnp.sum` of a stack
        # would round in another order.
        scaled = [wide(a) * scale for a, scale in zip(losses, scales, strict=True)]
        total = functools.reduce(operator.add, scaled)
        joined = join.arrays(columns)
        dtype = losses[0].dtype
        if weights is None:
            return [total.astype(dtype), *joined]
        # Divided once, by the total weight. A mean of the microbatches' own means would
        # give the rows of a light microbatch more weight.
        weight = functools.reduce(operator.add, [wide(a) for a in weights])
        return [divided(total, weight).astype(dtype), weight, *joined]

    leaves = [Leaf(LOSS, 0)]
    if weighted:
        leaves.append(Leaf(WEIGHT, 0))
    leaves += [Leaf(AUX, k) for k in range(len(first[AUX].leaves))]
    ins = _of_all_microbatches(call, stage, leaves)
    made = [leaf for leaf in leaves if leaf.port != AUX]
    made += [Leaf(AUX, n) for n in range(len(join.parts))]
    outs = [Slot(CallValue(Output(leaf)), placement, "outputs") for leaf in made]
    call.add_unscheduled("reduce loss", reduce, ins, outs, placement)
    shapes = [
        piece[leaf.port].leaves[leaf.number] for leaf in leaves for piece in pieces
    ]
    whole = tuple(jax.eval_shape(reduce, *shapes))
    total = outs.pop(0)
    weight = outs.pop(0) if weighted else None
    aux = None
    if loss.has_aux:
        found = whole[len(whole) - len(outs) :]
        aux = SlotTree(Shape(join.whole, found), tuple(outs))
    return ReducedLoss(SlotTree(first[LOSS], (total,)), weight, aux)


def deliver(call: CallWork, *trees: SlotTree) -> list[Slot]:
    """Copies of what the last stage makes in every process; returns their slots.

    Of the loss and of aux: they are small, and a user looks at them wherever the script
    runs. And of the `y` of a call that is differentiated from outside: what follows it
    runs in every process. In one that has no part of `y`, JAX would end the process: of
    an array that it does not have, and one that is not committed (a cotangent of 1), it
    makes a program that crashes when it is called again (jax 0.10.2).
    """
    layout = call.layout
    if not layout.is_over_processes:
        return []
    slots = tuple(slot for tree in trees for slot in tree.slots)
    copies: list[Slot] = []
    for first in layout.firsts:
        if first.processes <= layout.placements[-1].processes:
            continue
        call.work.append(Work("tell every process", None, (), (), first, slots))
        copies += [slot.on(first) for slot in slots]
    return copies


def finish_states(call: CallWork) -> dict[int, SlotTree]:
    """Finish the state of each layer with state: what the last microbatch left, the
    rows of all joined, and what the backwards have made. It is mapped once, where the
    layer has a `finish`.
    """
    states: dict[int, SlotTree] = {}
    for stage in call.layout.stages:
        for layer in stage.stateful:
            states[layer] = _finish_state(call, stage, layer)
    return states


class _StateArray(NamedTuple):
    """An array of a state as it leaves the call.

    Attributes:
        share: `ROWS`: the rows of all microbatches, joined. `WHOLE`: the sum that the
            backwards have made, if they made one. Otherwise what the last microbatch
            left.
        slots: what it is made of.
        shapes: the shapes in these slots.
        left: its shape as the last microbatch left it.
    """

    share: Share
    slots: Sequence[Slot]
    shapes: Sequence[jax.ShapeDtypeStruct]
    left: jax.ShapeDtypeStruct

    @property
    def is_held(self) -> bool:
        """Whether it is in a slot already.

        The array that a call was given (`WHOLE`) is no array that it returns: the user
        may donate the one, and read the other.
        """
        return len(self.slots) == 1 and self.share is not Share.WHOLE

    def made_of(self, pieces: Sequence[Any]) -> Any:
        """The array, of the arrays in the slots."""
        if not pieces:
            return jnp.zeros(self.left.shape, self.left.dtype)
        if self.share is Share.WHOLE:
            return pieces[0].astype(self.left.dtype)
        return jnp.concatenate(pieces) if len(pieces) > 1 else pieces[0]


def _finish_state(call: CallWork, stage: Stage, layer: int) -> SlotTree:
    """The state of a layer as it leaves the call."""
    port = Port("state", layer)
    m = call.microbatches
    left = [call.programs.flat(stage.index, i).out[port] for i in range(m)]
    if call.inputs.state_pieces[layer]:
        return _finish_pieces(call, stage, layer, left)
    makes = call.programs.request.kind is CallKind.GRADIENT
    arrays: list[_StateArray] = []
    for k, share in enumerate(call.inputs.shares[layer]):
        leaf = Leaf(port, k)
        last = left[-1].leaves[k]
        if share is Share.ROWS:
            slots = _of_all_microbatches(call, stage.index, [leaf])
            shapes = [piece.leaves[k] for piece in left]
        elif share is Share.WHOLE and makes:
            # Nothing at all, where no gradient depends on it.
            slot = call.sums.get((stage.index, leaf))
            slots = [] if slot is None else [slot]
            wide = last.update(dtype=sum_dtype(last.dtype)) if m > 1 else last
            shapes = [wide] * len(slots)
        else:
            slots, shapes = [call.held[stage.index, m - 1][Output(leaf)]], [last]
        arrays.append(_StateArray(share, slots, shapes, last))
    ins = [slot for array in arrays for slot in array.slots]
    if stage.model.layers[layer].finish is None and all(a.is_held for a in arrays):
        return SlotTree(left[-1], tuple(ins))
    placement = call.layout.home(layer)
    finished: list[Spec] = []

    def finish(*values: Any) -> list[Any]:
        rest = iter(values)
        whole = [a.made_of([next(rest) for _ in a.slots]) for a in arrays]
        state = left[-1].spec.unpack(whole)
        flat, spec = pack(stage.model.finish({layer: state})[layer])
        finished.append(spec)
        return flat

    made = jax.eval_shape(
        finish, *(shape for array in arrays for shape in array.shapes)
    )
    shape = Shape(finished[-1], tuple(map(aval, made)))
    outs = [
        Slot(CallValue(Output(Leaf(port, k))), placement, "outputs")
        for k in range(len(shape.leaves))
    ]
    call.add_unscheduled(f"finish state {layer}", finish, ins, outs, placement)
    return SlotTree(shape, tuple(outs))


def _finish_pieces(
    call: CallWork, stage: Stage, layer: int, left: Sequence[Shape]
) -> SlotTree:
    """The state of a layer that came in pieces: each as its microbatch left it, or
    finished in a program of its own, so that it waits for no other.
    """
    port = Port("state", layer)
    pieces: list[PyTree] = []
    slots: list[Slot] = []
    for i, shape in enumerate(left):
        leaves = [Leaf(port, k) for k in range(len(shape.leaves))]
        ins = [call.held[stage.index, i][Output(leaf)] for leaf in leaves]
        if stage.model.layers[layer].finish is None:
            pieces.append(shape.tree)
            slots += ins
            continue

        def finish(*arrays: Any, spec: Spec = shape.spec) -> list[Any]:
            state = {layer: spec.unpack(arrays)}
            return pack(stage.model.finish(state)[layer])[0]

        given = {layer: shape.tree}
        made = Shape.of(eval_shape(stage.model.finish, given)[layer])
        placement = call.layout.home(layer)
        # Numbered as the arrays of all pieces are.
        outs = [
            Slot(CallValue(Output(Leaf(port, len(slots) + k))), placement, "outputs")
            for k in range(len(made.leaves))
        ]
        call.add_unscheduled(f"finish state {layer}", finish, ins, outs, placement)
        pieces.append(made.tree)
        slots += outs
    return SlotTree(Shape.of(Microbatches(pieces)), tuple(slots))


def finish_gradients(call: CallWork, weight: Slot | None) -> dict[Leaf, Slot]:
    """Finish every wanted gradient at its owner: summed over stages, divided by the
    weight, and cast once.
    """
    # What the stages have of each gradient, in an order that is the same in every
    # process: sums are added in it.
    terms: dict[Leaf, list[Slot]] = {}
    wanted = call.programs.request.wanted - call.inputs.overwritten
    for leaf in sorted(wanted, key=_order):
        terms[leaf] = []
    for stage in call.layout.stages:
        for leaf, slot in _join_gradients(call, stage.index).items():
            terms[leaf].append(slot)
    summed: set[Leaf] = set()
    sums = _add_parts(call)
    for (_, leaf), slot in sorted(sums.items(), key=lambda entry: entry[0][0]):
        array = call.inputs.array(leaf)
        if array not in terms:  # the new value of a state
            continue
        terms[array].append(slot)
        summed.add(array)

    # Most gradients are finished: one sum of one stage, where the parameters are. The
    # others have terms of several stages (borrowed parameters, inputs that several
    # read), are summed in a wider dtype, or must be divided by a weight.
    gradients: dict[Leaf, Slot] = {}
    unfinished: dict[Placement, list[Leaf]] = defaultdict(list)
    for leaf, slots in terms.items():
        owner = call.layout.placements[call.layout.routes.owner(leaf.port)]
        dtype = call.inputs.array_shape(leaf).dtype
        # Several microbatches are summed in float32 at least.
        wider = leaf in summed and call.microbatches > 1 and sum_dtype(dtype) != dtype
        as_it_is = len(slots) == 1 and weight is None and not wider
        if as_it_is and slots[0].placement == owner and _is_final(call, leaf, slots[0]):
            gradients[leaf] = slots[0]
        else:
            unfinished[owner].append(leaf)

    # One program for each owner: one for each gradient would cost a dispatch each. The
    # next pass moves the terms of other stages there.
    for owner, leaves in unfinished.items():
        shapes = []
        counts = []
        ins = []
        outs = []
        for leaf in leaves:
            shapes.append(call.inputs.array_shape(leaf))
            counts.append(len(terms[leaf]))
            ins += terms[leaf]
            outs.append(Slot(CallValue(Gradient(leaf)), owner, "gradients"))
        if weight is not None:
            ins.append(weight)
        finish = _gradient_finisher(shapes, counts)
        lie = [
            (shape.shape, _final(call, leaf))
            for leaf, shape in zip(leaves, shapes, strict=True)
        ]
        call.add_unscheduled("finish gradients", finish, ins, outs, owner, lie)
        gradients.update(zip(leaves, outs, strict=True))
    return gradients


def _final(call: CallWork, leaf: Leaf) -> Sharding:
    """How a gradient lies in the end: as its parameter does."""
    owner = call.layout.placements[call.layout.routes.owner(leaf.port)]
    if leaf.port.kind == "params":
        return call.shardings.param(leaf, owner)
    shape = call.inputs.array_shape(leaf).shape
    return owner.by_rows(_shared_axis(shape, owner))


def _is_final(call: CallWork, leaf: Leaf, slot: Slot) -> bool:
    """Whether a gradient lies as it does in the end."""
    if leaf.port.kind != "params":
        return True
    known = call.shardings.known.get(slot)
    return known is None or known == _final(call, leaf)


def _add_parts(call: CallWork) -> dict[tuple[int, Leaf], Slot]:
    """The sums of each stage, those that each device has a part of added up: the one
    time in a step that gradients cross the axes of rows.
    """
    sums = dict(call.sums)
    for stage, apart in call.apart.items():
        placement = call.layout.placements[stage]
        leaves = [leaf for leaf in sorted(apart, key=_order) if (stage, leaf) in sums]
        if not leaves:
            continue

        add = _parts_adder(
            [call.shardings.param(leaf, placement) for leaf in leaves], placement
        )

        ins = [sums[stage, leaf] for leaf in leaves]
        outs = [
            Slot(JoinedGradient(leaf, stage), placement, "gradients") for leaf in leaves
        ]
        lie = [
            (
                call.inputs.array_shape(call.inputs.array(leaf)).shape,
                call.shardings.param(leaf, placement),
            )
            for leaf in leaves
        ]
        call.add_unscheduled("add parts", add, ins, outs, placement, lie)
        sums.update(zip([(stage, leaf) for leaf in leaves], outs, strict=True))
    return sums


def _parts_adder(
    totals: Sequence[Sharding], placement: Placement
) -> Callable[..., list[Any]]:
    """A function that adds up the parts that devices have of sums.

    Arguments:
        totals: how each sum is to lie.
    """
    mesh = placement.mesh
    assert mesh is not None
    specs = [total.spec for total in totals if isinstance(total, NamedSharding)]
    axes = {*mesh.axis_names}

    def add_each(*parts: Any) -> list[Any]:
        return [
            add_parts(part, spec, placement.data, axes, mesh)
            for part, spec in zip(parts, specs, strict=True)
        ]

    return add_each


def _gradient_finisher(
    shapes: Sequence[jax.ShapeDtypeStruct], counts: Sequence[int]
) -> Callable[..., list[Any]]:
    """A function of `counts[n]` terms of each gradient, and perhaps a weight after
    them, that returns the gradients in their own dtype.
    """

    def finish(*arrays: Any) -> list[Any]:
        rest = iter(arrays)
        terms = [[next(rest) for _ in range(count)] for count in counts]
        weight = next(rest, None)
        gradients = []
        for shape, parts in zip(shapes, terms, strict=True):
            if parts:
                total = functools.reduce(operator.add, parts)
            else:  # nothing that is computed depends on this leaf
                total = jnp.zeros(shape.shape, shape.dtype)
            if weight is not None:
                total = divided(wide(total), weight)
            gradients.append(total.astype(shape.dtype))
        return gradients

    return finish


def _join_gradients(call: CallWork, stage: int) -> dict[Leaf, Slot]:
    """Join the gradients of the call's own inputs that a stage makes for each
    microbatch.
    """
    m = call.microbatches
    inputs, wanted = call.inputs, call.programs.request.wanted
    held = [call.held[stage, i] for i in range(m)]
    values = dict.fromkeys(value for slots in held for value in slots)
    # A later stage calls its boundary `x` too, like the input of the call.
    leaves = [
        value.leaf
        for value in values
        if isinstance(value, Gradient)
        and call.layout.routes.source(stage, value.leaf.port) is None
    ]
    gradients: dict[Leaf, Slot] = {}
    pieces: list[Leaf] = []
    for leaf in leaves:
        if leaf.port.kind not in inputs.call:
            continue
        source = inputs.cut.splits[leaf.port.kind].sources[leaf.number]
        if isinstance(source, Rows) and m > 1:
            if inputs.array(leaf) in wanted:
                pieces.append(leaf)
            continue
        # A ready-made microbatch is an array of its own, and so is its gradient.
        for i in range(m):
            slot = held[i].get(Gradient(leaf))
            if slot is not None and inputs.array(leaf, i) in wanted:
                gradients[inputs.array(leaf, i)] = slot
    if not pieces:
        return gradients

    # A piece without gradient is zero: a layer may do something else with a microbatch
    # of another shape (the smaller last one), and not use this input there.
    ins: list[Slot] = []
    zeros: dict[tuple[Leaf, int], jax.ShapeDtypeStruct] = {}
    for leaf in pieces:
        for i in range(m):
            slot = held[i].get(Gradient(leaf))
            if slot is None:
                zeros[leaf, i] = inputs.piece(leaf.port, i).leaves[leaf.number]
            else:
                ins.append(slot)

    def joined(*arrays: Any) -> list[Any]:
        rest = iter(arrays)
        out = []
        for leaf in pieces:
            parts = []
            for i in range(m):
                shape = zeros.get((leaf, i))
                if shape is None:
                    parts.append(next(rest))
                else:
                    parts.append(jnp.zeros(shape.shape, shape.dtype))
            source = inputs.cut.splits[leaf.port.kind].sources[leaf.number]
            assert isinstance(source, Rows)
            out.append(jnp.concatenate(parts, source.axis))
        return out

    placement = call.layout.placements[stage]
    arrays = [inputs.array(leaf) for leaf in pieces]
    outs = [
        Slot(JoinedGradient(array, stage), placement, "gradients") for array in arrays
    ]
    shapes = [inputs.array_shape(array).shape for array in arrays]
    lie = [(a, placement.by_rows(_shared_axis(a, placement))) for a in shapes]
    call.add_unscheduled("join gradients", joined, ins, outs, placement, lie)
    return gradients | dict(zip(arrays, outs, strict=True))


def _shared_axis(shape: Sequence[int], placement: Placement) -> int | None:
    """The axis of a whole array that is shared over a mesh: the first, if it can be."""
    return 0 if shape and shape[0] % placement.parts == 0 else None


def _of_all_microbatches(
    call: CallWork, stage: int, leaves: Sequence[Leaf]
) -> list[Slot]:
    """The slots of some outputs of a stage: leaf by leaf those of all microbatches."""
    return [
        call.held[stage, i][Output(leaf)]
        for leaf in leaves
        for i in range(call.microbatches)
    ]


def _order(leaf: Leaf) -> tuple[str, int, int]:
    """The place of a leaf in an order of all leaves: a set has none of its own."""
    layer = -1 if leaf.port.of is None else leaf.port.of
    return leaf.port.kind, layer, leaf.number
