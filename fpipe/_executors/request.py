"""What one call asks of an executor, as data: what kind of call it is, the shapes of
everything that it gives, how that is cut into microbatches, and which gradients it
wants.

In: the arguments of the call, for example

    Args(params=(w0, w1), x=x, targets=(t,), needs={"key": key, "train": True, …})

Out: `Inputs`, which holds shapes, and `Request`. Both are hashable values, so that two
calls that are alike have one plan:

    Inputs(params=(f32[4,4], f32[4,4]), call={"x": f32[8,4], "targets": f32[8,4], …},
           cut=8 rows in 4 pieces of 2)
    Request(CallKind.GRADIENT, loss, wanted={params 0[0], params 1[0]}, settings)

No array gets past this module: planning and tracing see shapes alone. So a plan can be
made for a batch that does not exist yet.
"""

import dataclasses
import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from fpipe._core.processes import is_ghost
from fpipe._core.pytrees import PyTree, Shape, is_inexact, is_traced, pack
from fpipe._core.statics import check_leaves
from fpipe._executors.call import Args
from fpipe._executors.scheduling import Scheduling
from fpipe._model.init import check_undeclared_rows
from fpipe._model.loss import Loss
from fpipe._model.microbatch import (
    BatchShapes,
    CallShapes,
    Cut,
    Whole,
    cut_inputs,
)
from fpipe._model.model import Model
from fpipe._model.needs import BY_NAME, DIFFERENTIABLE, INPUTS, Share
from fpipe._model.stages import TARGETS, Leaf, Port, Stage, X
from fpipe._model.state import (
    check_overwritten,
    check_pieces_of_state,
    check_state_rows,
    rows_of_state,
    state_shares,
)
from fpipe._model.wrappers import Microbatches
from fpipe.schedules import Schedule


class CallKind(enum.Enum):
    """What a call wants.

    `GRADIENT` and `PULL_BACK` both give gradients, but only the first can interleave
    forwards and backwards. In a pull-back the cotangent of `y` comes from outside, and
    exists only when all of `y` does. So its peak is GPipe's, whatever the schedule.
    """

    FORWARD = "forward"  # the output
    LOSS = "loss"  # a loss
    GRADIENT = "gradient"  # a loss and gradients, interleaved as scheduled
    # The output, and later its pull-back: all forwards, then all backwards.
    PULL_BACK = "pull-back"

    @property
    def differentiates(self) -> bool:
        """Whether there are backwards."""
        return self in (CallKind.GRADIENT, CallKind.PULL_BACK)

    @classmethod
    def of(cls, loss: Loss | None, argnums: Sequence[int]) -> "CallKind":
        """The kind of a call that is not differentiated from outside."""
        if loss is None:
            return cls.FORWARD
        return cls.GRADIENT if argnums else cls.LOSS


@dataclasses.dataclass(frozen=True)
class Request:
    """What a call asks for; with the shapes of its inputs it decides the plan.

    Attributes:
        kind: what kind of call it is.
        loss: of a call with one, the function that ends the last stage.
        wanted: input leaves (of whole inputs, before they are cut) whose gradient is
            asked for.
        donates_state: whether forwards consume the states that they are given.
        settings: those of JAX that a trace bakes in, the precision of products for
            example: calls under two settings have two plans.
    """

    kind: CallKind
    loss: Loss | None
    wanted: frozenset[Leaf]
    settings: tuple[Any, ...]
    donates_state: bool = False

    @property
    def differentiates(self) -> bool:
        """Whether there are backwards."""
        return self.kind.differentiates


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The shapes of a call's inputs, whole, and how they are cut.

    Attributes:
        params: of each layer.
        call: of what the call gives, by the names of the table of needs.
        state: of each layer; `None` if the call has none.
        shares: what a microbatch gets of each array of the states.
        cut: how the arrays are cut into microbatches.
        state_pieces: of each layer whose state comes in pieces their shapes; empty for
            the others.
    """

    params: tuple[Shape, ...]
    call: Mapping[str, Shape]
    state: tuple[Shape, ...] | None
    shares: tuple[tuple[Share, ...], ...]
    cut: Cut
    state_pieces: tuple[tuple[Shape, ...], ...]

    def of(self, port: Port) -> Shape:
        """The shape of a whole input."""
        if port.kind == "params":
            return self.params[port.of]
        if port.kind == "state":
            assert self.state is not None
            return self.state[port.of]
        return self.call[port.kind]

    @property
    def overwritten(self) -> frozenset[Leaf]:
        """The arrays of states that a backward makes."""
        return frozenset(
            Leaf(Port("state", k), n)
            for k, shares in enumerate(self.shares)
            for n, share in enumerate(shares)
            if share is Share.WHOLE
        )

    def share(self, leaf: Leaf) -> Share:
        """What a microbatch gets of an array of a state."""
        return self.shares[leaf.port.of][leaf.number]

    def piece(self, port: Port, i: int) -> Shape:
        """The shape of what microbatch `i` gets of an input of the call, or of a
        state.
        """
        if port.kind == "state":
            ready = self.state_pieces[port.of]
            if ready:
                return ready[i]
            shape = self.of(port)
            pieces = [
                rows_of_state(a, self.cut.rows, i) if share is Share.ROWS else a
                for a, share in zip(shape.leaves, self.shares[port.of], strict=True)
            ]
            return Shape(shape.spec, tuple(pieces))
        return self.cut.piece_shape(port.kind, i, self.call[port.kind].leaves)

    def whole(self, port: Port) -> frozenset[Leaf]:
        """The leaves that go whole to every microbatch."""
        return frozenset(
            Leaf(port, k)
            for k, source in enumerate(self.cut.splits[port.kind].sources)
            if isinstance(source, Whole)
        )

    def cut_leaves(self, port: Port) -> list[Leaf]:
        """The leaves of a microbatch that are its own pieces, and not whole."""
        leaves = [Leaf(port, k) for k in range(len(self.cut.splits[port.kind].sources))]
        return [leaf for leaf in leaves if leaf not in self.whole(port)]

    # A microbatch's leaves are numbered as its own pytree is flattened, those of the
    # call as the call's is. The two differ where microbatches are ready-made.

    def array(self, leaf: Leaf, i: int = 0) -> Leaf:
        """The array of the call that a leaf of microbatch `i` is, or is a part of."""
        port, k = leaf
        if port.kind == "state" and self.state_pieces[port.of]:
            return Leaf(port, i * len(self.state_pieces[port.of][0].leaves) + k)
        if port.kind not in self.call:
            return leaf
        return Leaf(port, self.cut.splits[port.kind].array(k, i))

    def place(self, array: Leaf) -> tuple[Leaf, int | None]:
        """The inverse: which leaf of a microbatch an array of the call is, or is cut
        into, and of which microbatch if it is ready-made.
        """
        k, i = self.cut.splits[array.port.kind].place(array.number)
        return Leaf(array.port, k), i

    def array_shape(self, leaf: Leaf) -> jax.ShapeDtypeStruct:
        """The shape of an array of the call."""
        return self.of(leaf.port).leaves[leaf.number]

    def stack(self, leaf: Leaf, shape: int) -> jax.ShapeDtypeStruct:
        """The shape of the pieces of all microbatches of one shape, by its number in
        `Cut.alike`, on a first axis.
        """
        alike = self.cut.alike[shape]
        a = self.piece(leaf.port, alike[0]).leaves[leaf.number]
        return a.update(shape=(len(alike), *a.shape))


def check_static(args: Args, params: Sequence[PyTree]) -> None:
    """Refuse leaves of a call that are neither arrays nor values that compare.

    Asked where a plan is made: a warm call finds its plan by the values of its static
    leaves, so there is no plan for what is refused here.

    Arguments:
        params: one entry per layer; shapes will do.

    Raises:
        TypeError: such a leaf; it says what to write.
    """
    for name, tree in args.inputs.items():
        check_leaves(tree, name)
    check_leaves(tuple(params), "params")
    check_leaves(args.state, "state")


def inputs_of(model: Model, args: Args, params: Sequence[Shape], chunks: int) -> Inputs:
    """The shapes of a call's inputs, and how they are cut.

    Raises:
        ValueError: they cannot be cut, or a state does not fit them; side inputs that
            no layer asks for, or that a layer lacks.
    """
    inputs = args.inputs
    cut = cut_inputs(inputs, chunks)
    model.check_given(args.needs)
    state = None
    shares: list[tuple[Share, ...]] = []
    pieces: list[tuple[Shape, ...]] = []
    if args.state is not None:
        check_state(model, args, [shape.tree for shape in params], chunks)
        state = tuple(map(Shape.of, args.state))
        for layer, own in zip(model.layers, args.state, strict=True):
            shares.append(state_shares(layer, own))
            ready = own if isinstance(own, Microbatches) else ()
            pieces.append(tuple(map(Shape.of, ready)))
    # Microbatches of equal shapes have the same programs, and the shapes of their
    # states count too: caches may differ in length.
    if any(pieces):
        shapes = [
            (like, [own[i].leaves for own in pieces if own])
            for i, like in enumerate(cut.like)
        ]
        cut = dataclasses.replace(cut, like=tuple(map(shapes.index, shapes)))
    return Inputs(
        params=tuple(params),
        call={name: Shape.of(inputs[name]) for name in INPUTS},
        state=state,
        shares=tuple(shares),
        cut=cut,
        state_pieces=tuple(pieces),
    )


def check_state(
    model: Model, args: Args, params: Sequence[PyTree], chunks: int
) -> None:
    """A call's states fit its rows.

    Arguments:
        params: one entry per layer; shapes will do.

    Raises:
        ValueError: they do not.
    """
    if args.state is None:
        return
    cut = cut_inputs(args.inputs, chunks)
    check_pieces_of_state(model.layers, args.state, cut.m, cut.ready)
    check_overwritten(model.layers, args.state)
    check_state_rows(model.layers, args.state, cut.row_counts)
    if cut.m == 1:
        return
    # Ready-made microbatches may have no rows in common. Two like the first show as
    # well whether a state follows the rows.
    shapes = CallShapes.of(args.x, args.needs, chunks)
    batch = shapes.whole or shapes.twice
    first = BatchShapes(*shapes.first, batch.rows[:1])
    check_undeclared_rows(model, args.state, first, batch, params)


def check_donated(kind: CallKind, args: Args, inputs: Inputs, model: Model) -> None:
    """The call can consume the states that it is to.

    Raises:
        ValueError: it cannot.
    """
    if not args.donate_state:
        return
    if args.state is None:
        raise ValueError(
            "`pipe(params, x, donate_state=True)`: the call is given no `state=`"
        )
    if kind.differentiates:
        raise ValueError(
            "`pipe(params, x, donate_state=True)`: the call is differentiated, and its "
            "backwards read the state again; leave `donate_state` out"
        )
    if inputs.cut.m == 1:
        return
    for k, shares in enumerate(inputs.shares):
        if Share.ROWS in shares:
            raise ValueError(
                "`pipe(params, x, donate_state=True)`: the state of layer "
                f"{k} {model.layers[k].name!r} is in one piece, and every microbatch "
                "reads its own rows of it; give one piece for each microbatch, as "
                "`pipe.init_state(fpipe.Microbatches([…]))` makes them"
            )


def check_consumed(args: Args) -> None:
    """The arrays of the states that a call consumes are there, and are nothing else.

    It is asked in every call, for it is about these very arrays.

    Raises:
        ValueError: an array was consumed before, or stands in another place too.
    """
    arrays = pack(args.state)[0]
    # In a program around this one XLA decides what is donated.
    if not args.donate_state or is_traced(arrays):
        return
    call = "`pipe(params, x, donate_state=True)`"
    if any(isinstance(a, jax.Array) and a.is_deleted() for a in arrays):
        raise ValueError(
            f"{call}: an array of `state` was consumed by an earlier call; take the "
            "state that that call returned"
        )
    # XLA refuses them in its own words, or ends the process.
    consumed = set(map(id, arrays))
    inputs = {"params": args.params, "x": args.x, **args.needs}
    for name, tree in inputs.items():
        if not consumed.isdisjoint(map(id, jax.tree.leaves(tree))):
            raise ValueError(
                f"{call}: an array of `state` is in `{name}` too, and donating it "
                "would delete it there; copy it"
            )
    if len(consumed) < len(arrays):
        raise ValueError(
            f"{call}: `state` has the same array in two places, and it can be donated "
            "once; make an array for each"
        )


def refuse_deleted(params: Sequence[Any]) -> None:
    """Refuse parameters that an earlier call has consumed.

    It is asked in every call: 0.04 us for each array (measured on jax 0.10.2, CPU).

    Raises:
        ValueError: an array was deleted.
    """
    try:
        deleted = [array for array in params if array.is_deleted()]
    except (AttributeError, jax.errors.ConcretizationTypeError):
        return  # what is traced, or is no array of JAX's, is not deleted
    # XLA refuses them in its own words, or ends the process. What another process has
    # is known by its shape alone, and that stays.
    if not all(map(is_ghost, deleted)):
        raise ValueError(
            "a Pipe was called with params that are deleted: an earlier call consumed "
            'them (`donate=["params"]`, `place(params, donate=True)`, or the '
            "`donate_argnums` of a `jax.jit`); take the params that it returned"
        )


def unmade_states(kind: CallKind, inputs: Inputs, model: Model) -> list[str]:
    """A warning, where backwards make states that do not come out of the call."""
    if kind is not CallKind.PULL_BACK or not inputs.overwritten:
        return []
    layers = sorted({leaf.port.of for leaf in inputs.overwritten})
    return [
        f"the layers {[model.layers[k].name for k in layers]} have state that a "
        "backward makes (`overwrite=`), but a call that is differentiated from outside "
        "returns its state before the backward, so this state stays as it was; write "
        "the step with `pipe.value_and_grad(loss_fn)`"
    ]


def schedule_of(
    scheduling: Scheduling,
    stage_to_device: tuple[int, ...],
    stages: Sequence[Stage],
    microbatches: int,
    kind: CallKind = CallKind.GRADIENT,
) -> Schedule:
    """The schedule of a call with that many microbatches.

    Raises:
        ValueError: it permutes the forwards of layers with state.
    """
    # Backwards may come in any order: no gradient goes through a state. So may forwards
    # where each microbatch has a state of its own rows.
    if kind is CallKind.PULL_BACK:
        scheduling = scheduling.with_forwards_first()
    schedule = scheduling.make(stage_to_device, microbatches)
    for stage in stages:
        order = schedule.order("F", stage.index) if stage.ordered else ()
        if list(order) != sorted(order):
            raise ValueError(
                f"the schedule {schedule.name!r} runs the forwards of stage "
                f"{stage.index} in the order {order}; layers "
                "with state need them in the order of the microbatches"
            )
    return schedule


def check_backwards(schedule: Schedule) -> None:
    """Refuse to differentiate by a schedule without backwards."""
    if not schedule.backwards:
        raise ValueError(
            f"the schedule {schedule.name!r} has forwards only, and the call computes "
            "gradients; give it a B for every F"
        )


def params_leaves(counts: Sequence[int]) -> tuple[Leaf, ...]:
    """The leaves of parameters; `counts` has the number of each layer's."""
    return tuple(
        Leaf(Port("params", k), n)
        for k, count in enumerate(counts)
        for n in range(count)
    )


def differentiable_inputs(args: Args) -> dict[str, PyTree]:
    """What of a call without a loss can be differentiated, beside the parameters: `x`
    first.
    """
    given = args.inputs
    names = [name for name in INPUTS if BY_NAME[name].differentiable]
    return {name: given[name] for name in names if name != TARGETS.kind}


def numbered_leaves(counts: Sequence[int], args: Args) -> list[tuple[Leaf, ...]]:
    """The leaves of each of `args.arguments`: `(params, x, *targets, side)`."""
    # All targets are one port, a tuple, so their leaves are numbered through:
    # `targets[0]` may be the first array of the first target, `targets[1]` that of the
    # second.
    numbered = [params_leaves(counts), input_leaves(X, args.x)]
    start = 0
    for target in args.targets:
        numbered.append(input_leaves(TARGETS, target, start))
        start += len(numbered[-1])
    needs = [input_leaves(Port(name), args.needs[name]) for name in DIFFERENTIABLE]
    return [*numbered, *needs]


def wanted_leaves(
    kind: CallKind, inputs: Inputs, leaves: Iterable[Leaf], frozen: frozenset[Leaf]
) -> frozenset[Leaf]:
    """Those that can have a gradient and are not frozen; and what backwards make of
    states, where it comes out.
    """
    made = inputs.overwritten if kind is CallKind.GRADIENT else frozenset[Leaf]()
    return made | frozenset(
        leaf
        for leaf in leaves
        if is_inexact(inputs.of(leaf.port).leaves[leaf.number]) and leaf not in frozen
    )


def input_leaves(port: Port, tree: PyTree, start: int = 0) -> tuple[Leaf, ...]:
    """The leaves of an input of the call; `start` is the number of the first."""
    return tuple(Leaf(port, start + k) for k in range(len(pack(tree)[0])))
