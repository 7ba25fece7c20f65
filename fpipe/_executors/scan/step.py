"""One kind of call as functions of flat arrays.

In: a `Machine`. Out: three functions to put under `jax.jit`. Each lays out the inputs
and packs the states, runs a segment of the machine, and puts together what
comes out:

    outputs    y: f32[4, 8, 3]  ->  f32[32, 3]     four microbatches of eight rows
    inputs     x: f32[32, 8]  ->  f32[4, 8, 8]     where it has to be cut before; else
                                                   the machine slices it

Microbatches of another shape are apart. Of 30 rows in four microbatches:

    outputs    y: f32[3, 8, 3], f32[1, 6, 3]  ->  f32[30, 3]
    inputs     x: f32[30, 8]  ->  f32[3, 8, 8], f32[1, 6, 8]

They know nothing of the user's pytrees, which the executor takes apart and puts
together. A call with a loss is one program (`loss`). One that is differentiated from
outside is two (`forward`, then `backward`), because JAX asks for the second half later,
if at all.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fpipe._core.pytrees import Shape, Spec, eval_shape, is_inexact, pack
from fpipe._executors.placement import Unshard
from fpipe._executors.request import Inputs, Request
from fpipe._executors.scan.clock import Clock
from fpipe._executors.scan.feeds import share
from fpipe._executors.scan.interpreter import Interpreter, SegmentResult
from fpipe._executors.scan.machine import (
    InputGradient,
    InputStack,
    Machine,
    Op,
    OutputBuffer,
    RowGradient,
)
from fpipe._executors.scan.mesh import by_stage, waits_for_all
from fpipe._executors.scan.packing import Entry
from fpipe._executors.scan.reading import GivenInputs
from fpipe._executors.scan.storage import is_key
from fpipe._executors.stage_places import AXIS
from fpipe._model.joining import (
    Alike,
    Join,
    check_alike,
    in_order,
    joined_stacks,
    piece_of,
    stacked_pieces,
)
from fpipe._model.loss import divided, wide
from fpipe._model.microbatch import Ready, Rows, Whole
from fpipe._model.model import Model
from fpipe._model.stages import AUX, LOSS, WEIGHT, Leaf, Port, Y
from fpipe._model.state import stacked_state, unstacked_state
from fpipe._program.control_flow import runs_on_anything
from fpipe._program.over_mesh import devices_over
from fpipe._program.whole_axes import exchanges_nothing

Array: TypeAlias = jax.Array

# The arrays of a call's inputs, by port.
Given: TypeAlias = Mapping[Port, Sequence[Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A call's program.

    Attributes:
        data: the axes of the mesh over which rows are shared.
        unshard: how often parameters are gathered that are cut over these.
        outs: the shapes of what the last unit returns, for a microbatch of each shape.
        state_given: the structure of the states that the call is given.
        donates_state: whether a forward consumes the given states.
        clock: who is told when each operation starts and ends.
        checked: those of its functions that have been compiled and would not hang.
    """

    machine: Machine
    mesh: Mesh
    data: tuple[str, ...]
    unshard: Unshard
    inputs: Inputs
    request: Request
    model: Model
    outs: tuple[Mapping[Port, Shape], ...]
    state_given: Spec | None = None
    donates_state: bool = False
    clock: Clock | None = None
    checked: set[str] = dataclasses.field(default_factory=set)

    @cached_property
    def clocked(self) -> "Step":
        """The same, telling a clock."""
        # Its functions are other programs, which nobody has checked.
        return dataclasses.replace(self, clock=Clock(), checked=set())

    @property
    def shards(self) -> int:
        """Over how many devices the rows of a microbatch are shared."""
        return devices_over(self.mesh, self.data)

    @cached_property
    def exchanges_nothing(self) -> bool:
        """Whether it is known, before XLA compiles it, that the devices of one stage
        exchange no parts of arrays (see `exchanges.py`).

        They share one axis, every equation is known, and bundles of several kinds do
        not lie side by side in an array, where XLA may cut these in other places.
        """
        return (
            len(self.mesh.axis_names) == 2
            and all(len({*pool.avals}) == 1 for pool in self.machine.pools.values())
            and all(
                op.code is None or exchanges_nothing(op.code.nodes)
                for op in self._operations
            )
        )

    @property
    def _operations(self) -> list[Op]:
        return [
            entry.op
            for segment in self.machine.segments
            for phase in segment.phases
            for entry in phase.ops
        ]

    @cached_property
    def together(self) -> frozenset[Op]:
        """The operations that all devices run if any of them does: those that may
        exchange parts of arrays where such an exchange waits for all devices.
        """
        if not waits_for_all(self.mesh) or self.exchanges_nothing:
            return frozenset()
        return frozenset(
            op
            for op in self._operations
            if op.code is None or runs_on_anything(op.code.nodes)
        )

    @cached_property
    def cannot_hang(self) -> bool:
        """Whether that is known before XLA compiles it."""
        return (
            not waits_for_all(self.mesh)
            or self.exchanges_nothing
            or self.together.issuperset(self._operations)
        )

    @property
    def m(self) -> int:
        """The number of microbatches."""
        return self.machine.microbatches

    @property
    def out(self) -> Mapping[Port, Shape]:
        """The shapes of what the last unit returns for the first microbatch."""
        return self.outs[0]

    @property
    def alike(self) -> Alike:
        """The microbatches of each shape."""
        return self.inputs.cut.alike

    @property
    def _ready(self) -> int | None:
        """How many ready-made microbatches there are."""
        return self.m if self.inputs.cut.ready else None

    @cached_property
    def output(self) -> Join:
        """How the outputs of the microbatches become `y`."""
        join = Join.of_output(self.out[Y], self._ready)
        self._check_alike(Y, "`pipe(params, x)`: y", join)
        return join

    @cached_property
    def aux(self) -> Join:
        """How those of a loss become `aux`."""
        join = Join.of_aux(self.out[AUX], self._ready)
        assert self.request.loss is not None
        call = self.request.loss.call
        self._check_alike(AUX, f"`{call}(has_aux=True)`: aux", join)
        return join

    def _check_alike(self, port: Port, what: str, join: Join) -> None:
        pieces = {
            i: out[port]
            for own, out in zip(self.alike, self.outs, strict=True)
            for i in own
        }
        if len(self.outs) > 1:
            check_alike([pieces[i] for i in sorted(pieces)], what, join)

    # --- what is jitted ---
    #
    # Cached properties: a function that is made again would be compiled again.

    @cached_property
    def forward(self) -> Any:
        """`f(params, state, given) -> (y, state, left)`: arrays of `y` and of the
        states; `left` is for the backward.
        """

        def forward(
            params: Sequence[Array], state: Sequence[Array], given: Given
        ) -> Any:
            made = self._run(0, params, state, self._cut(given))
            y = self.output.of_stacks(self._columns(made, Y), self.alike)
            return y, self._finished_states(made), made.left

        return jax.jit(forward, donate_argnums=(1,) if self.donates_state else ())

    @cached_property
    def backward(self) -> Any:
        """`f(params, state, given, left, cotangents) -> gradients`."""

        def backward(
            params: Sequence[Array],
            state: Sequence[Array],
            given: Given,
            left: Sequence[Sequence[Array]],
            cotangents: Sequence[Array],
        ) -> list[Array]:
            # Cotangents are cut as `y` was joined. Those of integers are not cut,
            # because nothing reads them.
            inputs = self._cut(given)
            for k, a in enumerate(self.out[Y].leaves):
                if is_inexact(a):
                    shapes = [out[Y].leaves[k] for out in self.outs]
                    stacks = self.output.stacks(k, cotangents, shapes, self.alike)
                else:
                    n, _ = self.output.part_of(k, 0)
                    stacks = [cotangents[n]] * len(self.outs)
                for shape, stack in enumerate(stacks):
                    inputs[InputStack(Leaf(Y, k), shape)] = stack
            made = self._run(1, params, state, inputs, left)
            return self._finished_gradients(made, None)

        return jax.jit(backward)

    @cached_property
    def loss(self) -> Any:
        """`f(params, state, given) -> (loss, aux, state, gradients)`."""

        def loss(params: Sequence[Array], state: Sequence[Array], given: Given) -> Any:
            made = self._run(0, params, state, self._cut(given))
            assert self.request.loss is not None
            reduction = self.request.loss.reduction
            values = self._losses(made, LOSS)
            # The machine writes the loss of each microbatch as it is. The gradients of
            # a mean are scaled already (`Programs.scales`), those of a weighted loss
            # are not: the total weight is known only now.
            weight = None
            total = wide(values)
            if reduction == "mean":
                total = total * jnp.asarray(self.inputs.cut.shares, total.dtype)
            total = jnp.sum(total, 0)
            if reduction == "weighted":
                weight = jnp.sum(wide(self._losses(made, WEIGHT)), 0)
                total = divided(total, weight)
            aux = self.aux.of_stacks(self._columns(made, AUX), self.alike)
            return (
                total.astype(values.dtype),
                aux,
                self._finished_states(made),
                self._finished_gradients(made, weight),
            )

        return jax.jit(loss)

    def _run(
        self,
        segment: int,
        params: Sequence[Array],
        state: Sequence[Array],
        inputs: GivenInputs,
        left: Sequence[Sequence[Array]] | None = None,
    ) -> SegmentResult:
        """Run a segment; `state` are the arrays of the states, which it packs."""
        packing = self.machine.state
        rows = None
        if packing is not None:
            # The packing is that of whole states; of those in pieces, of the stacks.
            assert self.state_given is not None
            trees = self.state_given.unpack(state)
            rows = list(packing.pack([stacked_state(tree) for tree in trees]))
        run = Interpreter(
            self.machine,
            segment,
            self.mesh,
            self.data,
            self.unshard,
            self.clock,
            self.together,
        )
        return run(params, rows, inputs, left)

    # --- what goes in ---

    def _cut(self, given: Given) -> dict[Leaf | InputStack, Array]:
        """The call's inputs as the machine takes them.

        What is cut here gets a first axis of microbatches, for each shape of these.
        Where such a stack lies over the devices this axis is padded to a multiple of
        their number. What goes whole to every microbatch stays as it is. So does an
        array whose rows are sliced by operations.
        """
        cut = self.inputs.cut
        out: dict[Leaf | InputStack, Array] = {}
        for port, arrays in given.items():
            for k, source in enumerate(cut.splits[port.kind].sources):
                leaf = Leaf(port, k)
                if isinstance(source, Whole) or leaf in self.machine.sliced:
                    assert not isinstance(source, Ready)
                    out[leaf] = arrays[source.array]
                    continue
                for shape, own in enumerate(self.alike):
                    match source:
                        case Rows(n, axis):
                            stride, size = cut.rows[0], cut.rows[own[0]]
                            stack = stacked_pieces(arrays[n], axis, own, stride, size)
                        case Ready(numbers, _):
                            stack = jnp.stack([arrays[numbers[i]] for i in own])
                    name = InputStack(leaf, shape)
                    out[name] = self._laid(stack, source.axis, name)
        return out

    def _laid(self, stack: Array, axis: int | None, name: InputStack) -> Array:
        """Microbatches as they lie on the mesh.

        Every microbatch's rows are sharded over the mesh's data axes, if there are any.
        A microbatch is consecutive rows: in a batch that is sharded as it comes, it
        would lie on one shard alone, and the others would have nothing to do.

        Arguments:
            stack: on a first axis.
            axis: of the rows of one, if they have any.
        """
        shards = self.shards
        spread = name in self.machine.spread
        spec: list[Any] = [AXIS if spread else None]
        spec += [None] * (stack.ndim - 1)
        if axis is not None and shards > 1 and not is_key(stack.dtype):
            rows_axis = 1 + axis % (stack.ndim - 1)
            if stack.shape[rows_axis] % shards == 0:
                spec[rows_axis] = self.data
        # Devices hold equally many microbatches, so some after the last one are
        # padding. No feed brings them.
        devices, count = self.machine.devices, stack.shape[0]
        missing = share(count, devices) * devices - count
        if spread and missing:
            stack = jnp.pad(stack, [(0, missing)] + [(0, 0)] * (stack.ndim - 1))
        if not any(spec):
            return stack
        sharding = NamedSharding(self.mesh, P(*spec))
        return jax.lax.with_sharding_constraint(stack, sharding)

    # --- what comes out ---

    def _columns(self, made: SegmentResult, port: Port) -> list[list[Array]]:
        """What the last unit returned: for each array those of each shape of
        microbatch.
        """
        return [
            [
                made.outputs[OutputBuffer(Leaf(port, k), shape)]
                for shape in range(len(self.alike))
            ]
            for k in range(len(self.out[port].leaves))
        ]

    def _losses(self, made: SegmentResult, port: Port) -> Array:
        """The losses of all microbatches, or their weights."""
        (stacks,) = self._columns(made, port)
        return in_order(stacks, self.alike)

    def _input_gradient(self, made: SegmentResult, leaf: Leaf) -> list[Array]:
        """The gradients of a piece of an input, for each shape of microbatch."""
        stacks = []
        for shape in range(len(self.alike)):
            a = self.inputs.stack(leaf, shape)
            found = made.outputs.get(OutputBuffer(leaf, shape))
            # In microbatches of one shape nothing may depend on it.
            stacks.append(jnp.zeros(a.shape, a.dtype) if found is None else found)
        return stacks

    def _finished_states(self, made: SegmentResult) -> list[Array]:
        """The arrays of the states, finished by their layers: from the rows of states,
        and of what backwards have made.
        """
        packing = self.machine.state
        if packing is None:
            return []
        arrays = []
        for k, n in packing.entries:
            leaf = Leaf(Port("state", k), n)
            of = packing.shape((k, n))
            if leaf not in self.request.wanted:
                arrays.append(packing.take(made.state, (k, n)))
            elif (k, n) in self.machine.overwritten:
                arrays.append(packing.take(made.made, (k, n)).astype(of.dtype))
            else:  # no gradient depends on it
                arrays.append(jnp.zeros(of.shape, of.dtype))
        return pack(self._finish(packing.trees(arrays)))[0]

    def _finish(self, states: Sequence[Any]) -> tuple[Any, ...]:
        given = {k: states[k] for k in self.model.stateful}
        for k, pieces in enumerate(self.inputs.state_pieces):
            if pieces:
                given[k] = unstacked_state(given[k], pieces)
        own = self.model.finish(given)
        return tuple(own.get(k) for k in range(len(states)))

    @cached_property
    def state_shape(self) -> Shape | None:
        """The shapes of the states that a call returns. A layer's `finish` may give its
        state another shape than it has between microbatches.
        """
        packing = self.machine.state
        if packing is None:
            return None
        shapes = packing.trees([packing.shape(entry) for entry in packing.entries])
        return Shape.of(eval_shape(self._finish, shapes))

    @cached_property
    def gradient_names(self) -> list[int | Leaf]:
        """What a backward returns: rows, and leaves of inputs. A leaf that nothing
        depends on is not there.
        """
        machine = self.machine
        # A row is asked for as a whole if any of its arrays is. The order is that of
        # sorted numbers and names, so that all processes agree.
        rows = set[int]()
        made: list[Leaf] = []
        written = {buffer.leaf for buffer in machine.outputs}
        for leaf in sorted(self.request.wanted, key=str):
            if leaf.port.kind == "params":
                rows.add(machine.params.where[leaf.port.of, leaf.number].row)
                continue
            if leaf.port.kind == "state":
                continue  # it is a new state, and no gradient
            piece, _ = self.inputs.place(leaf)
            if piece in machine.inputs or piece in written:
                made.append(leaf)
        return [*sorted(rows), *made]

    @cached_property
    def absent(self) -> frozenset[Entry]:
        """The parameters without a gradient, in rows in which others have one: frozen
        ones.
        """
        rows = set(self.gradient_names)
        return frozenset(
            (layer, n)
            for (layer, n), (row, _) in self.machine.params.where.items()
            if row in rows and Leaf(Port("params", layer), n) not in self.request.wanted
        )

    def _finished_gradients(
        self, made: SegmentResult, weight: Array | None
    ) -> list[Array]:
        """Gradients in the order of `gradient_names`, in their own dtype, and divided
        by the total weight if there is one.
        """
        machine = self.machine
        out = []
        for name in self.gradient_names:
            if isinstance(name, Leaf):
                of = self.inputs.array_shape(name)
                piece, i = self.inputs.place(name)
                source = self.inputs.cut.splits[name.port.kind].sources[piece.number]
                match source:
                    case Whole():
                        gradient = made.gradients[InputGradient(piece)]
                    case Rows(_, axis):
                        stacks = self._input_gradient(made, piece)
                        gradient = joined_stacks(stacks, self.alike, axis)
                    case Ready():
                        stacks = self._input_gradient(made, piece)
                        assert i is not None
                        gradient = piece_of(stacks, self.alike, i)
            else:
                of = machine.params.rows[name]
                gradient = made.gradients.get(RowGradient(name))
                if gradient is None:
                    # Asked for, but nothing depends on it.
                    gradient = jnp.zeros((self.mesh.shape[AXIS], *of.shape))
                gradient = jax.lax.with_sharding_constraint(
                    gradient, by_stage(self.mesh, of.spec)
                )
            if weight is not None:
                gradient = divided(wide(gradient), weight)
            out.append(gradient.astype(of.dtype))
        return out
