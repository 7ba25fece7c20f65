"""A machine as one program: `lax.scan` over its ticks, inside `jax.shard_map` over the
mesh axis `"stage"`.

In: a `Machine`, and the arrays of a call. Out: outputs, gradients and states.

What a device holds from tick to tick is its *carry*, a dictionary from the names of
buffers (see `machine.py`) to their arrays:

    WireName("forward", 0)    a pool          arrays with an axis of slots
    SavedPool("core", True)   a pool          arrays with an axis of slots
    HostSlots(SavedPool(...)) of a pool       its arrays that are on the host
    CopiedSlots(SavedPool())  of a pool       what an `O` has copied to the host
    Outbox(WireName(...))     an outbox       the arrays of one bundle
    InTransit(feed)           a feed          the arrays of one microbatch
    Turn()                    see `_move_in_turn` a number
    Reads(SavedPool(...))     in a tick       a number, see `_after_reads`
    ClockToken()              for a clock     a number
    OutputBuffer(loss[0])     an output       an array with an axis of microbatches
    RowGradient(0)            a gradient      an array, the sum so far
    StateBlock(0)             a state         an array
    StateMaximum(0)           a state         an array, the maximum so far

Every operation is a `lax.cond` whose other branch passes its buffers on. XLA then
updates them in place; a `lax.switch` over several operations would copy every buffer at
each tick (measured on jax 0.10.2, CPU).

What a policy offloads leaves an operation on the device, and goes to a slot on the host
behind the operations of the phase, so that no conditional returns anything on the host.
XLA for GPUs refuses to compile one that does, or copies the whole pool from host to
host at each tick. Like this it copies one slot, and the pool is nowhere but on the host
(read off what it compiles for an H200, jax 0.10.2).

Nothing here asks which device it is on: that is in the table alone. Python runs over a
phase's operations once, while JAX traces the body of the scan, and the numbers of the
table are traced arrays by then. So the `carry` that the methods change in place is a
dictionary of tracers, and the program holds what they leave in it.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fpipe._core.pytrees import on_host
from fpipe._executors.placement import Unshard
from fpipe._executors.scan.clock import Clock
from fpipe._executors.scan.machine import (
    Add,
    BorrowedParameter,
    FedPiece,
    Feed,
    Held,
    InputGradient,
    InputPiece,
    InputRows,
    InputStack,
    LoanGradient,
    Machine,
    Maximise,
    Number,
    Op,
    Outbox,
    OutputBuffer,
    Parameter,
    Part,
    PhaseCode,
    PoolName,
    Put,
    RowGradient,
    Send,
    SetState,
    SetStatePart,
    Source,
    State,
    StateBlock,
    StateMaximum,
    StatePart,
    SummedGradient,
    TableOp,
    TableReturn,
    TableWire,
    WholeInput,
    Write,
)
from fpipe._executors.scan.mesh import waits_for_all
from fpipe._executors.scan.packing import Row
from fpipe._executors.scan.storage import (
    Storage,
    as_stored,
    from_stored,
    is_key,
    stored_shape,
)
from fpipe._executors.stage_places import AXIS
from fpipe._model.loss import sum_dtype
from fpipe._model.specs import axes_in, without_axes
from fpipe._model.stages import Leaf
from fpipe._program.control_flow import has_own_devices
from fpipe._program.graph import Bind, bind
from fpipe._program.host_calls import Failures, Logged
from fpipe._program.over_mesh import devices_over
from fpipe._program.row_sums import (
    RowSum,
    add_parts,
    find_row_sum,
    sum_rows_apart,
    values_read,
)
from fpipe._program.whole_axes import WholeAxes

Array: TypeAlias = jax.Array


@dataclasses.dataclass(frozen=True, slots=True)
class InTransit:
    """What a feed has on its way."""

    feed: Feed


@dataclasses.dataclass(frozen=True, slots=True)
class HostSlots:
    """Those arrays of a pool that are in the host's memory."""

    pool: PoolName


@dataclasses.dataclass(frozen=True, slots=True)
class CopiedSlots:
    """The slots of a pool in the host's memory, for bundles that wait there."""

    pool: PoolName


@dataclasses.dataclass(frozen=True, slots=True)
class Staged:
    """What goes to a slot on the host at the end of the phase: arrays, still on the
    device, and behind them the number of the slot.
    """

    pool: PoolName


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """A number that keeps the collectives of a tick in one order, see
    `_move_in_turn`. It is always zero, which XLA cannot know.
    """


@dataclasses.dataclass(frozen=True, slots=True)
class Reads:
    """A number from the operations that have read a pool since it was changed last, in
    the same tick: see `_after_reads`. It is always zero, too.
    """

    pool: PoolName


@dataclasses.dataclass(frozen=True, slots=True)
class ClockToken:
    """What goes from one call of the clock to the next, to keep their order."""


Buffer: TypeAlias = (
    PoolName
    | HostSlots
    | CopiedSlots
    | Staged
    | Outbox
    | InTransit
    | Turn
    | Reads
    | ClockToken
    | OutputBuffer
    | SummedGradient
    | StateBlock
    | StateMaximum
)
Carry: TypeAlias = dict[Buffer, Any]


# What a call gives: inputs as they are, and pieces of those that are cut.
GivenInputs: TypeAlias = Mapping[Leaf | InputStack, Array]


class SegmentResult(NamedTuple):
    """What a segment gives.

    Attributes:
        outputs: each with a first axis of the microbatches of one shape.
        gradients: of rows, with a first axis of devices, and of whole inputs.
        state: rows.
        made: the rows of states that backwards make, by number.
        left: what the next segment needs: the arrays of each pool, then each block of
            states, all with a first axis of devices. After the last segment nothing.
    """

    outputs: dict[OutputBuffer, Array]
    gradients: dict[SummedGradient, Array]
    state: list[Array]
    made: dict[int, Array]
    left: list[list[Array]]


class _Given(NamedTuple):
    """What the operations of a phase take from outside.

    Attributes:
        params: the device's block of each row.
        loans: the parameters that are lent.
        inputs: the call's inputs.
        fed: what feeds have brought.
    """

    params: Sequence[Array]
    loans: Sequence[Array]
    inputs: GivenInputs
    fed: dict[FedPiece, Array]


def own_zeros() -> Iterator[Array]:
    """Zeros that XLA takes for different numbers.

    It makes one array of all that are filled with the same number, and copies it into
    each buffer before a loop starts. A buffer that is filled with a zero of its own is
    filled where it lies.
    """
    zero = jax.lax.optimization_barrier(jnp.int32(0))
    return (zero < -n for n in itertools.count())


def filled(shape: tuple[int, ...], dtype: Any, zero: Array) -> Array:
    """A buffer of zeros, all of them the one that is given."""
    return jnp.full(shape, zero.astype(dtype))


def empty(shape: tuple[int, ...], dtype: Any, zero: Array, alone: bool) -> Array:
    """What lies in a buffer before anything is put there. No result depends on it:
    tests put NaN here.

    Arguments:
        zero: see `own_zeros`.
        alone: whether the mesh has only the axis of stages.
    """
    # Over a data axis XLA would allocate it for all rows, and then cut out those of the
    # device.
    if not alone:
        return filled(shape, dtype, zero)
    # Accelerators leave it as it is. XLA for CPUs can only fill.
    return jax.lax.platform_dependent(
        zero,
        cpu=lambda zero: filled(shape, dtype, zero),
        default=lambda _: jax.lax.empty(shape, dtype),
    )


def empty_on_host(shape: tuple[int, ...], dtype: Any) -> Array:
    """The same in the host's memory."""
    # XLA would fill `jnp.empty` on the device, all slots at once, and copy it.
    return jax.device_put(jax.lax.empty(shape, dtype), jax.memory.Space.Host)


class Interpreter:
    """Runs one segment of a machine on a mesh.

    Arguments:
        number: which of the machine's segments.
        data: the axes of the mesh over which rows are shared.
        unshard: how often parameters are gathered that are cut over these.
        clock: who is told when each operation starts and ends.
    """

    def __init__(
        self,
        machine: Machine,
        number: int,
        mesh: Mesh,
        data: tuple[str, ...],
        unshard: Unshard,
        clock: Clock | None,
    ) -> None:
        self.machine = machine
        self.segment = machine.segments[number]
        self.last = number == len(machine.segments) - 1
        self.mesh = mesh
        self.clock = clock
        self.data = data
        self.unshard = unshard
        self.alone = mesh.size == mesh.shape[AXIS]
        self.shards = devices_over(mesh, data)
        self.storage = {
            name: Storage(pool.avals, machine.rows, self.shards)
            for name, pool in machine.pools.items()
        }
        # Each segment carries only the sums and outputs that its own operations change.
        # The first one of a call that is differentiated from outside has no gradients,
        # and would carry zeros.
        ops = [entry.op for phase in self.segment.phases for entry in phase.ops]
        changed = dict.fromkeys(t.buffer for op in ops for t in op.targets)
        self.gradients: list[SummedGradient] = [
            buffer
            for buffer in changed
            if isinstance(buffer, RowGradient | LoanGradient | InputGradient)
        ]
        self.outputs = [buffer for buffer in machine.outputs if buffer in changed]
        self.states: list[StateBlock] = []
        if machine.state is not None:
            self.states = [StateBlock(r) for r in range(len(machine.state.rows))]
        self.maxima = [buffer for buffer in changed if isinstance(buffer, StateMaximum)]
        self.parts = self._find_row_sums(ops)
        # The axes that are left to XLA.
        self._free = {n: s for n, s in mesh.shape.items() if n != AXIS}
        # An exception in a layer's callback waits until all devices can raise it. To
        # ask whether there was one takes a callback that returns something, and JAX
        # refuses such callbacks over a mesh that has other axes too.
        self.failures: Failures | Logged | None = None
        if any(op.code is not None and op.code.guard is not None for op in ops):
            count = len(mesh.local_devices)
            self.failures = Failures(count) if self.alone else Logged()

    # --- outside the mesh ---

    def __call__(
        self,
        params: Sequence[Array],
        state: Sequence[Array] | None,
        inputs: GivenInputs,
        left: Sequence[Sequence[Array]] | None = None,
    ) -> SegmentResult:
        """Run the segment: on arrays over the whole mesh, outside of `shard_map`.

        Arguments:
            params, state: rows.
            inputs: the pieces of those that are cut have a first axis of the
                microbatches of one shape. Where one lies over the devices, their number
                divides this axis.
            left: what the segment before left.
        """
        # A row's gradient is returned if its own device has a sum for it or a borrower
        # has: that goes back to the owner's block before it leaves the mesh.
        whole: list[SummedGradient] = []
        rows = set[int]()
        for gradient in self.gradients:
            if isinstance(gradient, InputGradient):
                whole.append(gradient)
            elif isinstance(gradient, LoanGradient):
                rows.add(self.machine.loans[gradient.loan].row)
            else:
                rows.add(gradient.row)
        of_rows: list[SummedGradient] = [RowGradient(r) for r in sorted(rows)]

        def on_device(
            table: Array,
            params: Sequence[Array],
            state: Sequence[Array] | None,
            numbers: Sequence[Array],
            left: Sequence[Sequence[Array]],
        ) -> Any:
            # PRNG keys cross the border of the mesh as numbers. A device's block has an
            # axis of one device, which goes here and comes back at the end.
            arrays = {
                name: from_stored(a, inputs[name])
                for name, a in zip(inputs, numbers, strict=True)
            }
            before = [[a[0] for a in arrays] for arrays in left]
            blocks = [a[0] for a in params]
            states = None if state is None else [a[0] for a in state]
            carry = self._scan(table[0], blocks, states, arrays, before)
            # Behind the loop the devices bring together what they have made.
            outputs = [self._everywhere(carry[buffer]) for buffer in self.outputs]
            gradients = self._add_up(carry, [*of_rows, *whole])
            after: list[list[Array]] = []
            if not self.last:
                after = [
                    [a[None] for a in self._pool(name, carry)]
                    for name in self.machine.pools
                ]
                after += [[carry[block][None]] for block in self.states]
            return (
                outputs,
                [gradients[g] for g in whole],
                [gradients[g][None] for g in of_rows],
                [carry[block][None] for block in self.states],
                [carry[block][None] for block in self.maxima],
                after,
            )

        # Everything has an axis of devices, the call's inputs apart: every device has
        # them whole, but for those that lie over the devices (no keys among them, so
        # that such an array is the same as numbers). Only the axis of stages is manual:
        # over a data axis XLA shards by itself. `check_vma` would put a `psum` into a
        # branch of a conditional that not all devices take: a deadlock.
        spread = [P(AXIS) if name in self.machine.spread else P() for name in inputs]
        run = jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(P(AXIS), P(AXIS), P(AXIS), spread, P(AXIS)),
            out_specs=(P(), P(), P(AXIS), P(AXIS), P(AXIS), P(AXIS)),
            axis_names={AXIS},
            check_vma=False,
        )
        outputs, whole_arrays, row_arrays, new_state, maxima, after = run(
            jnp.asarray(self.segment.table),
            list(params),
            state,
            [as_stored(a) for a in inputs.values()],
            list(left or ()),
        )
        named = {
            buffer: from_stored(a, self.machine.outputs[buffer])
            for buffer, a in zip(self.outputs, outputs, strict=True)
        }
        arrays = [*whole_arrays, *row_arrays]
        gradients = dict(zip([*whole, *of_rows], arrays, strict=True))
        made = {b.row: a for b, a in zip(self.maxima, maxima, strict=True)}
        return SegmentResult(named, gradients, new_state, made, after)

    # --- on one device ---

    def _unsharded(self, block: Array) -> Array:
        """A flat block, whole on each device of the other axes.

        XLA would shard it as the rows of a batch are, or as some parameter is, and
        shift its ends between devices where an array is cut out. On CPUs such a
        `collective-permute` waits for all devices of the mesh, those of other stages
        too, which do something else: a deadlock. A gather waits for the devices of its
        own stage alone.
        """
        if len(self.mesh.axis_names) == 1 or block.ndim != 1 or is_key(block.dtype):
            return block
        return jax.lax.with_sharding_constraint(block, P())

    def _state(self, row: int, shape: tuple[int, ...], carry: Carry) -> Array:
        """A state, out of its block."""
        assert self.machine.state is not None
        packed = self.machine.state.rows[row]
        return self._taken(packed, carry[StateBlock(row)], shape)

    def _taken(self, row: Row, block: Array, shape: tuple[int, ...]) -> Array:
        """An array out of its block."""
        if block.shape == shape:
            return block
        flat = row.take(self._unsharded(block), (math.prod(shape),))
        return self._unsharded(flat).reshape(shape)

    def _scan(
        self,
        table: Array,
        params: Sequence[Array],
        state: Sequence[Array] | None,
        inputs: GivenInputs,
        left: Sequence[Sequence[Array]],
    ) -> Carry:
        """Run all ticks.

        Returns:
            What the buffers hold after the last one.
        """
        # A parameter does not change during a step, so what is lent is sent once. All
        # devices get an array for it, of zeros if they borrow nothing.
        loans = []
        for row, owner, borrower, aval in self.machine.loans:
            packed = self.machine.params.rows[row]
            own = self._taken(packed, params[row], aval.shape)
            loans.append(jax.lax.ppermute(own, AXIS, [(owner, borrower)]))
        if self.unshard == "step":
            params = [self._gathered(r, block) for r, block in enumerate(params)]
            loans = [
                self._gathered(loan.row, array)
                for loan, array in zip(self.machine.loans, loans, strict=True)
            ]
        start = self._start(state, inputs, left)
        # `lax.scan` carries a list: a dictionary would have to have sortable keys.
        names = list(start)

        def tick(values: list[Any], now: tuple[Array, Array]) -> tuple[list[Any], None]:
            # Feeds fill `fed` anew in each phase: what they brought is read at once.
            number, row = now
            carry = dict(zip(names, values, strict=True))
            for p in range(len(self.segment.phases)):
                given = _Given(params, loans, inputs, {})
                self._run_phase(p, number, row, carry, given)
            return [carry[name] for name in names], None

        values, _ = jax.lax.scan(
            tick, list(start.values()), (jnp.arange(table.shape[0]), table)
        )
        if self.clock is not None:
            # What is returned needs the last call of the clock too, or XLA might drop
            # it.
            told = values[names.index(ClockToken())] >= 0
            values = _where(told, values)
        if isinstance(self.failures, Failures):
            # What is returned needs the answer, or XLA might drop the question.
            made = [a for a in jax.tree.leaves(values) if not on_host(a)]
            raised = self.failures.raised(made, AXIS)
            values = _where(raised == 0, values)
        return dict(zip(names, values, strict=True))

    def _start(
        self,
        state: Sequence[Array] | None,
        inputs: GivenInputs,
        left: Sequence[Sequence[Array]],
    ) -> Carry:
        """The buffers before the first tick, `left` if a segment was before this."""
        # Slots that nobody has filled yet may hold anything. Outputs and sums must
        # begin with zeros, also on devices that write none: devices are added up.
        zeros = own_zeros()

        def own_empty(shape: tuple[int, ...], dtype: Any) -> Array:
            return empty(shape, dtype, next(zeros), self.alone)

        machine = self.machine
        carry: Carry = {}
        for n, (name, pool) in enumerate(machine.pools.items()):
            layout = self.storage[name].layout
            device, host = (
                layout.shapes[: layout.on_device],
                layout.shapes[layout.on_device :],
            )
            if left:
                copied = len(device) + len(host)
                carry[name] = list(left[n][: len(device)])
                carry[HostSlots(name)] = list(left[n][len(device) : copied])
                if pool.on_host:
                    carry[CopiedSlots(name)] = list(left[n][copied:])
                continue
            carry[name] = [own_empty((pool.slots, *a.shape), a.dtype) for a in device]
            # One slot more, for the junk of the phases in which nothing is staged.
            carry[HostSlots(name)] = [
                empty_on_host((pool.slots + 1, *a.shape), a.dtype) for a in host
            ]
            if pool.on_host:
                carry[CopiedSlots(name)] = [
                    empty_on_host((pool.on_host + 1, *a.shape), a.dtype) for a in device
                ]
        used = {entry.wire for phase in self.segment.phases for entry in phase.wires}
        for name in machine.wires:
            if name in used:
                bundle = self.storage[name].layout.shapes
                carry[Outbox(name)] = [own_empty(a.shape, a.dtype) for a in bundle]
        for phase in self.segment.phases:
            for feed in phase.feeds:
                given = [inputs[stack] for stack in feed.stacks]
                pieces = [own_empty(a.shape[1:], a.dtype) for a in given]
                carry[InTransit(feed)] = pieces
        carry[Turn()] = jnp.int32(0)
        if self.clock is not None:
            carry[ClockToken()] = jnp.int32(0)
        for buffer in self.outputs:
            piece = stored_shape(machine.outputs[buffer])
            shape = (machine.counts[buffer.shape], *piece.shape)
            carry[buffer] = filled(shape, piece.dtype, next(zeros))
        for gradient in self.gradients:
            of = self._shape_of(gradient)
            # One part for each shard of the batch, added up at the end.
            parts = (self.shards,) if self._has_parts(gradient) else ()
            # Gradients in 16 bits are summed in 32, and cast once, in the end.
            shape, dtype = (*parts, *of.shape), sum_dtype(of.dtype)
            total = filled(shape, dtype, next(zeros))
            carry[gradient] = self._as_summed(gradient, total)
        for maximum in self.maxima:
            assert machine.state is not None
            of = machine.state.rows[maximum.row]
            carry[maximum] = jnp.full(of.shape, -jnp.inf, sum_dtype(of.dtype))
        for n, block in enumerate(self.states):
            if left:
                (carry[block],) = left[len(machine.pools) + n]
            else:
                assert state is not None
                carry[block] = self._unsharded(state[n])
        return carry

    def _run_phase(
        self, p: int, tick: Array, row: Array, carry: Carry, given: _Given
    ) -> None:
        """One phase of a tick: feeds move, operations run, wires carry.

        Arguments:
            row: of the table, for all phases of the tick.
        """
        # Feeds before operations: what is read now has to be here. Wires behind them:
        # what an action sends is there in the next phase, as `ticks.py` counts on.
        phase = self.segment.phases[p]
        for feed in phase.feeds:
            self._move_feed(feed, carry, row[p], given)
        # In each phase one slot goes to the host, and not one for each operation,
        # because most operations do not run.
        staged = dict.fromkeys(s for entry in phase.ops for s in _staged(entry.op))
        for name in staged:
            carry[name] = self._nothing_staged(name.pool)
        for entry in phase.ops:
            own = row[p]
            runs = own[entry.runs] > 0
            if self.clock is None:
                self._operate(entry, carry, own, given, runs)
            else:
                when = (tick, p)
                self._operate_timed(self.clock, entry, carry, own, given, runs, when)
        for name in staged:
            self._store_on_host(name, carry)
        self._copy(phase, carry, row[p])
        for wire in phase.wires:
            self._deliver(wire, carry, row[p, wire.slot], row[p, wire.carries])

    # --- what moves ---

    def _move_in_turn(
        self,
        used: Array,
        carry: Carry,
        move: Callable[[list[Array]], tuple[Any, ...]],
        stay: Callable[[list[Array]], tuple[Any, ...]],
        arrays: list[Array],
    ) -> tuple[Any, ...]:
        """`move(arrays)` where the table says so, on every device or on none; else
        `stay(arrays)`.

        One after the other: each hands on a zero, the turn, that the next one needs.
        XLA would keep the order of independent conditionals too, but not on CPU in a
        program that was loaded from the compilation cache (jax 0.10.2), where devices
        then wait for each other in different ones.
        """
        turn = carry[Turn()]
        *moved, carry[Turn()] = jax.lax.cond(
            used > turn,
            lambda own: (*move(own), jnp.int32(0)),
            lambda own: (*stay(own), turn),
            arrays,
        )
        return tuple(moved)

    def _move_feed(self, feed: Feed, carry: Carry, row: Array, given: _Given) -> None:
        """What a feed has on its way moves on by one device. What was there before is
        what the reader reads.
        """
        devices = self.machine.devices
        # All pieces go the same way round, so that each step is one `ppermute`. The
        # reader is the end of the way: it sends nothing on.
        pairs = [(d, (d - 1) % devices) for d in range(devices) if d != feed.reader]
        own = row[feed.piece]

        def move(come: list[Array]) -> tuple[list[Array], list[Array]]:
            # `own` is the piece of its own that a device puts in now. Behind its last
            # one it stands for none: the device passes on what has come.
            here = []
            for stack, a in zip(feed.stacks, come, strict=True):
                share = given.inputs[stack]
                puts = own < share.shape[0]
                piece = jax.lax.dynamic_index_in_dim(share, own, keepdims=False)
                here.append(jnp.where(puts, piece, a))
            return [jax.lax.ppermute(a, AXIS, pairs) for a in here], here

        name = InTransit(feed)
        carry[name], here = self._move_in_turn(
            row[feed.moves], carry, move, lambda come: (come, come), carry[name]
        )
        for stack, piece in zip(feed.stacks, here, strict=True):
            given.fed[FedPiece(stack, feed.kind)] = piece

    def _deliver(
        self, entry: TableWire, carry: Carry, slot: Array, used: Array
    ) -> None:
        """What the outboxes hold goes to the pools of the receivers."""
        wire = self.machine.wires[entry.wire]
        read = self._after_reads([entry.wire], carry)

        # The outbox is only read, so it is no part of what the conditional returns.
        def move(pool: list[Array]) -> tuple[list[Array]]:
            sent = carry[Outbox(entry.wire)]
            arrived = [jax.lax.ppermute(a, AXIS, wire.pairs) for a in sent]
            filled = [
                jax.lax.dynamic_update_index_in_dim(slots, a, slot, 0)
                for slots, a in zip(pool, arrived, strict=True)
            ]
            return (filled,)

        # Without a conditional XLA may run the transfer beside the next phase. Where
        # nothing was sent, junk goes to a slot that nobody reads.
        if wire.always:
            slot = slot + read
            (carry[entry.wire],) = move(carry[entry.wire])
        else:
            (carry[entry.wire],) = self._move_in_turn(
                used - read, carry, move, lambda pool: (pool,), carry[entry.wire]
            )

    # --- what goes to the host ---

    def _nothing_staged(self, pool: PoolName) -> list[Array]:
        """What is staged where no operation runs: anything, for the last slot."""
        layout = self.storage[pool].layout
        own = layout.shapes[layout.on_device :]
        arrays = [empty(a.shape, a.dtype, jnp.bool_(False), self.alone) for a in own]
        return [*arrays, jnp.int32(self.machine.pools[pool].slots)]

    def _store_on_host(self, staged: Staged, carry: Carry) -> None:
        """What is staged goes to its slot on the host."""
        *arrays, slot = carry.pop(staged)
        name = HostSlots(staged.pool)
        carry[name] = [
            jax.lax.dynamic_update_index_in_dim(
                slots, jax.device_put(a[None], jax.memory.Space.Host), slot, 0
            )
            for slots, a in zip(carry[name], arrays, strict=True)
        ]

    def _copy(self, phase: PhaseCode, carry: Carry, row: Array) -> None:
        """Slots go to the host and come back, on each device as the table says."""
        # First everything is read, then written: what goes may have the slot that what
        # comes back is to have, and the other way round on the host.
        leaving = [
            [_at(slots, row[copy.slot]) for slots in carry[copy.pool]]
            for copy in phase.copies
        ]
        for back in phase.returns:
            copied = carry[CopiedSlots(back.pool)]

            def bring(
                pool: list[Array],
                back: TableReturn = back,
                copied: list[Array] = copied,
            ) -> list[Array]:
                return [
                    jax.lax.dynamic_update_index_in_dim(
                        slots,
                        jax.device_put(
                            _at(there, row[back.on_host]), jax.memory.Space.Device
                        ),
                        row[back.slot],
                        0,
                    )
                    for slots, there in zip(pool, copied, strict=True)
                ]

            carry[back.pool] = jax.lax.cond(
                row[back.runs] > 0, bring, lambda pool: pool, carry[back.pool]
            )
        # Without a conditional, which must return nothing on the host (see above).
        for copy, arrays in zip(phase.copies, leaving, strict=True):
            name = CopiedSlots(copy.pool)
            carry[name] = [
                jax.lax.dynamic_update_index_in_dim(
                    there,
                    jax.device_put(a, jax.memory.Space.Host),
                    row[copy.on_host],
                    0,
                )
                for there, a in zip(carry[name], arrays, strict=True)
            ]

    def _pool(self, name: PoolName, carry: Carry) -> list[Array]:
        """All arrays of a pool, in the order of its layout; behind them those that are
        copied to the host.
        """
        copied = carry.get(CopiedSlots(name), [])
        return [*carry[name], *carry[HostSlots(name)], *copied]

    # --- what is computed ---

    def _operate_timed(
        self,
        clock: Clock,
        entry: TableOp,
        carry: Carry,
        row: Array,
        given: _Given,
        runs: Array,
        when: tuple[Array, int],
    ) -> None:
        """An operation between two calls of the clock: one when what it reads is there,
        one when what it writes is.
        """
        # What the host is told depends on arrays, and the operation on what it answers:
        #
        #     what is read -> stamp 0 -> token -> operation -> what is made -> stamp 1
        #
        # Without these dependencies XLA would be free to call at any time.
        op = entry.op
        if not op.targets:
            self._operate(entry, carry, row, given, runs)
            return
        where = (*when, jax.lax.axis_index(AXIS))
        pools = dict.fromkeys(s.pool for s in op.sources if isinstance(s, Held))
        reads = [a for pool in pools for a in carry[pool]]
        reads += [as_stored(a) for a in given.fed.values()]
        token = clock.stamp(runs, where, 0, carry[ClockToken()], reads)
        self._operate(entry, carry, row, given, runs & (token >= 0))
        # One array that it writes is enough: a conditional ends as a whole.
        written = [carry[target.buffer] for target in op.targets]
        written += [carry[staged] for staged in _staged(op)]
        made = jax.tree.leaves(written)[:1]
        carry[ClockToken()] = clock.stamp(runs, where, 1, token, made)

    def _operate(
        self, entry: TableOp, carry: Carry, row: Array, given: _Given, runs: Array
    ) -> None:
        """An operation, where it `runs`."""
        op = entry.op
        # The conditional carries what the operation changes, and nothing else: XLA
        # updates that in place, and would copy what only passes through.
        changed: set[Buffer] = {target.buffer for target in op.targets}
        changed.update(_staged(op))
        names = [name for name in carry if name in changed]
        runs &= self._after_reads(names, carry) == 0
        zero = carry[Turn()]

        def run(arrays: list[Any]) -> tuple[list[Any], Array]:
            own = carry | dict(zip(names, arrays, strict=True))
            with jax.named_scope(op.name):
                self._apply(op, own, row[entry.arguments :], given)
            return [own[name] for name in names], jnp.int32(0)

        new, read = jax.lax.cond(
            runs,
            run,
            lambda arrays: (arrays, zero),
            [carry[name] for name in names],
        )
        carry.update(zip(names, new, strict=True))
        for pool in dict.fromkeys(s.pool for s in op.sources if isinstance(s, Held)):
            if pool not in changed:
                carry[Reads(pool)] = carry.get(Reads(pool), jnp.int32(0)) + read

    def _after_reads(self, changed: Sequence[Buffer], carry: Carry) -> Array:
        """A zero that is there when all operations that have read these pools are done.

        What changes a pool has to need it. XLA updates a pool in place only if it knows
        that nobody reads the old one afterwards, and by itself it knows no order of two
        conditionals of which neither needs what the other makes. Without this zero a
        wire whose pool backwards read copied it at each tick, whole.
        """
        reads = [carry.pop(Reads(name), None) for name in changed]
        return sum((a for a in reads if a is not None), jnp.int32(0))

    def _apply(self, op: Op, carry: Carry, arguments: Array, given: _Given) -> None:
        """What an operation does, once it runs: take values, compute, and put them into
        the buffers in `carry`.
        """
        # Values by number, as targets count them: sources, then what the code makes.
        values = [self._fetch(s, carry, arguments, given) for s in op.sources]
        if op.code is not None:
            values += self._compute(op, [values[n] for n in op.code_inputs])
        for target in op.targets:
            buffer = target.buffer
            match target:
                case Put(name, argument, avals, numbers):
                    bundle = [values[n] for n in numbers]
                    slot = arguments[argument]
                    storage = self.storage[name]
                    carry[buffer] = storage.put(avals, bundle, carry[buffer], slot)
                    if any(map(on_host, avals)):
                        staged = carry[Staged(name)]
                        arrays = storage.stage(avals, bundle, staged[:-1])
                        carry[Staged(name)] = [*arrays, slot]
                case Send(Outbox(wire), avals, numbers):
                    bundle = [values[n] for n in numbers]
                    carry[buffer] = self.storage[wire].pack(
                        avals, bundle, carry[buffer]
                    )
                case Add(gradient, n):
                    # Parts have one more axis, that of the shards.
                    apart = self._has_parts(gradient)
                    total, value = carry[buffer], values[n]
                    if total.shape != value.shape:
                        # Flat, and whole before it goes to its place in the block.
                        parts = value.shape[:1] if apart else ()
                        value = self._as_summed(gradient, value.reshape(*parts, -1))
                    add = jax.vmap(_added) if apart else _added
                    carry[buffer] = add(total, value)
                    if self._is_scattered(gradient):
                        carry[buffer] = self._as_summed(gradient, carry[buffer])
                case Write(_, n, argument, adds):
                    value = as_stored(values[n])
                    place = arguments[argument]
                    # Side inputs have several readers, whose gradients add up.
                    if adds:
                        value += jax.lax.dynamic_index_in_dim(
                            carry[buffer], place, keepdims=False
                        )
                    carry[buffer] = jax.lax.dynamic_update_index_in_dim(
                        carry[buffer], value, place, 0
                    )
                case SetState(_, n):
                    value, block = values[n], carry[buffer]
                    # A block that layers of several shapes share is longer and flat.
                    if value.shape != block.shape:
                        flat = self._unsharded(value.reshape(-1))
                        value = jax.lax.dynamic_update_slice_in_dim(block, flat, 0, 0)
                    carry[buffer] = self._unsharded(value)
                case Maximise(_, n):
                    carry[buffer] = _combined(jnp.maximum, carry[buffer], values[n])
                case SetStatePart(block, n, whole, part):
                    # Only this part is written, in place: the others are those of
                    # microbatches that may not have been here yet.
                    assert self.machine.state is not None
                    row = self.machine.state.rows[block.row]
                    state = row.take(carry[buffer], whole.shape)
                    value = values[n].reshape(part.sizes)
                    place = _beginning(part, arguments[0])
                    state = jax.lax.dynamic_update_slice(state, value, place)
                    carry[buffer] = self._unsharded(row.put(state))

    def _fetch(
        self, source: Source, carry: Carry, arguments: Array, given: _Given
    ) -> Array:
        """The value of a source.

        Called inside the operation's conditional, so that a device that does not run
        the operation does not read its slots either.
        """
        match source:
            case Parameter(row, aval):
                packed = self.machine.params.rows[row]
                own = self._taken(packed, given.params[row], aval.shape)
                return self._gathered(row, own)
            case BorrowedParameter(loan):
                row = self.machine.loans[loan].row
                return self._gathered(row, given.loans[loan])
            case State(row, aval):
                return self._state(row, aval.shape, carry)
            case StatePart(row, aval, part, shape):
                state = self._state(row, aval.shape, carry)
                place = _beginning(part, arguments[0])
                own = jax.lax.dynamic_slice(state, place, part.sizes)
                return own.reshape(shape)
            case Number(argument):
                # As `jax.random.fold_in` takes it.
                return arguments[argument].astype(jnp.uint32)
            case Held(pool, argument, avals, k):
                slot = arguments[argument]
                return self.storage[pool].take(avals, k, self._pool(pool, carry), slot)
            case FedPiece():
                return given.fed[source]
            case WholeInput(leaf):
                return given.inputs[leaf]
            case InputRows(leaf, axis, stride, count):
                start = arguments[0] * stride
                whole = given.inputs[leaf]
                return jax.lax.dynamic_slice_in_dim(whole, start, count, axis)
            case InputPiece(stack, argument):
                pieces = given.inputs[stack]
                place = arguments[argument]
                return jax.lax.dynamic_index_in_dim(pieces, place, keepdims=False)

    def _gathered(self, row: int, block: Array) -> Array:
        """A block of parameters as operations read it: whole over the axes of rows."""
        spec = self.machine.params.rows[row].spec
        if not spec:
            return block
        # To put pieces together that do not lie side by side XLA would exchange some,
        # see `exchanges.py`; of the whole array each device takes its own.
        apart = self._cut_apart(spec)
        if apart != spec:
            block = jax.lax.with_sharding_constraint(block, apart)
        whole = without_axes(spec, self.data)
        return jax.lax.with_sharding_constraint(block, whole)

    def _cut_apart(self, spec: P) -> P:
        """A spec without the entries in which the axes of rows come before others:
        there a device's piece does not lie within what it has of the array that is
        whole over these axes.
        """
        parts = [None if _comes_first(part, self.data) else part for part in spec]
        return without_axes(P(*parts), ())

    # --- gradients ---

    def _find_row_sums(
        self, ops: Sequence[Op]
    ) -> dict[SummedGradient, dict[Op, RowSum]]:
        """The gradients that are kept as parts over the mesh's data axis, with how each
        operation makes them.

        A weight's gradient is a sum over rows, and the rows lie on several devices of
        the data axis. As written XLA adds up over that axis in each operation, once for
        each microbatch. With parts the sum has one more axis, which is sharded like the
        rows, and is added up once, behind the last tick. `row_sums.py` finds the
        equation that can be cut so. If it finds none in one of the operations that add
        to a gradient, the gradient is kept whole in all of them. (Not if that one is
        for a smaller microbatch whose rows the axis does not divide: it adds what it
        makes to the first part.)
        """
        size = self.shards
        if size == 1:
            return {}
        found: dict[SummedGradient, dict[Op, RowSum]] = {}
        as_one = set[SummedGradient]()
        for op in ops:
            for target in op.targets:
                if not isinstance(target, Add) or op.code is None:
                    continue
                # Targets count the sources first, so this is the code's own value.
                code = op.code
                value = (*code.outs, *code.sums)[target.value - len(op.sources)]
                parts = find_row_sum(code.graph, code.nodes, value, op.rows, size)
                if parts is None and op.rows % size == 0:
                    as_one.add(target.buffer)
                elif parts is not None:
                    found.setdefault(target.buffer, {})[op] = parts
        return {name: of for name, of in found.items() if name not in as_one}

    def _compute(self, op: Op, arrays: Sequence[Array]) -> list[Any]:
        """What an operation's code makes: arrays, or constants of Python. Of a gradient
        that is kept as parts, instead of the sum over rows, the parts; of one that is
        scattered its piece on each device.
        """
        code = op.code
        assert code is not None
        parts: dict[int, RowSum] = {}
        alone: list[int] = []
        scattered: dict[int, SummedGradient] = {}
        for target in op.targets:
            if not isinstance(target, Add):
                continue
            gradient, n = target.buffer, target.value - len(op.sources)
            if self._is_scattered(gradient):
                scattered[n] = gradient
            if op in self.parts.get(gradient, {}):
                parts[n] = self.parts[gradient][op]
            elif self._has_parts(gradient):
                alone.append(n)
        # `terms` are the values that the sums are made of. They are asked for beside
        # the outputs. Nobody reads the sums over all rows then, so XLA leaves them out.
        wanted = [*code.outs, *code.sums]
        terms = list(dict.fromkeys(v for p in parts.values() for v in values_read(p)))
        made = self._values(op, arrays, [*wanted, *terms])
        given = dict(zip(terms, made[len(wanted) :], strict=True))
        values = made[: len(wanted)]
        for n, own in parts.items():
            values[n] = sum_rows_apart(own, given, self.data)
            if n in scattered:
                values[n] = self._added_up(scattered[n], values[n])
        for n in alone:
            values[n] = _first_part(values[n], self.shards)
        for n, gradient in scattered.items():
            spec = self._spec_of(gradient)
            apart = self._cut_apart(spec)
            if n not in parts or apart != spec:
                # Each device has the sum over all rows, and adds its piece of it.
                whole = without_axes(apart, self.data)
                values[n] = jax.lax.with_sharding_constraint(values[n], whole)
        return values

    def _values(
        self, op: Op, arrays: Sequence[Array], wanted: Sequence[int]
    ) -> list[Any]:
        """Values of an operation's code.

        If devices cannot share the rows of its microbatch, each computes all of it.
        XLA would use the idle axes to cut other axes of arrays, in several ways, and
        exchange parts between these.
        """
        code, taken = op.code, frozenset(self.data)
        assert code is not None
        is_idle = (
            op.rows % self.shards > 0
            and self._free.keys() > taken
            and not code.on_host
            and not has_own_devices(code.nodes)
        )
        if not is_idle:
            return code.values(arrays, wanted, self.failures, bind=self._bind())

        def alone(numbers: Sequence[Array]) -> list[Array]:
            own = [
                from_stored(a, like) for a, like in zip(numbers, arrays, strict=True)
            ]
            made = code.values(own, wanted, self.failures, bind=self._bind(taken))
            return [as_stored(jnp.asarray(a)) for a in made]

        run = jax.shard_map(
            alone, in_specs=P(), out_specs=P(), axis_names=taken, check_vma=False
        )
        made = run([as_stored(a) for a in arrays])
        avals = [code.graph.avals[v] for v in wanted]
        return [from_stored(a, like) for a, like in zip(made, avals, strict=True)]

    def _bind(self, taken: frozenset[str] = frozenset()) -> Bind:
        """How equations are run.

        Arguments:
            taken: axes that a `shard_map` around them has taken.
        """
        if not taken and not waits_for_all(self.mesh):
            return bind
        left = self._free.keys() - taken
        return WholeAxes(tuple(self._free[name] for name in sorted(left)), taken)

    def _shape_of(self, gradient: SummedGradient) -> Any:
        """What a gradient is the gradient of: a row, a lent array or an input. Callers
        take its shape and dtype.
        """
        match gradient:
            case RowGradient(row):
                return self.machine.params.rows[row]
            case LoanGradient(loan):
                return self.machine.loans[loan].aval
            case InputGradient(leaf):
                return self.machine.inputs[leaf]

    def _as_summed(self, gradient: SummedGradient, total: Array) -> Array:
        """A sum as it lies during a step: whole over the axes of rows, if it is not
        scattered.

        Left to itself XLA would cut each summand as the finished gradient is cut, and
        also the values that the summand is computed from.
        """
        spec = self._spec_of(gradient)
        if self._is_scattered(gradient):
            return jax.lax.with_sharding_constraint(total, spec)
        if gradient in self.parts:
            spec = P(self.data, *without_axes(spec, self.data))
        elif spec:
            spec = without_axes(spec, self.data)
        else:
            return self._unsharded(total)
        return jax.lax.with_sharding_constraint(total, spec)

    def _is_scattered(self, gradient: SummedGradient) -> bool:
        """Whether each backward scatters what it adds, so that a device never has more
        than its piece of the sum.
        """
        named = {name for part in self._spec_of(gradient) for name in axes_in(part)}
        return self.unshard == "action" and not named.isdisjoint(self.data)

    def _has_parts(self, gradient: SummedGradient) -> bool:
        """Whether the sum of a gradient is kept as parts, one for each shard."""
        return gradient in self.parts and not self._is_scattered(gradient)

    def _spec_of(self, gradient: SummedGradient) -> P:
        """The spec of the row, the loan or the input that a gradient belongs to."""
        match gradient:
            case RowGradient(row):
                return self.machine.params.rows[row].spec
            case LoanGradient(loan):
                return self.machine.params.rows[self.machine.loans[loan].row].spec
            case InputGradient():
                return P()

    def _add_up(
        self, carry: Carry, returned: Sequence[SummedGradient]
    ) -> dict[SummedGradient, Array]:
        """The gradients to return: parts are added up, those of loans go back to their
        owners, and those of inputs are summed over the devices.
        """
        # The one sum over the data axis of the whole step.
        own = {g: self._total(g, carry[g]) for g in self.gradients}
        out: dict[SummedGradient, Array] = {}
        for gradient in returned:
            # Only borrowers have a gradient for this row. It begins with zeros, and
            # theirs are added below.
            if gradient not in own:
                of = self._shape_of(gradient)
                out[gradient] = jnp.zeros(of.shape, sum_dtype(of.dtype))
            elif isinstance(gradient, InputGradient):
                out[gradient] = self._everywhere(own[gradient])
            else:
                out[gradient] = own[gradient]
        # On all devices but the owner a returned loan is zeros, which change nothing.
        for gradient in self.gradients:
            if isinstance(gradient, LoanGradient):
                row, owner, borrower, _ = self.machine.loans[gradient.loan]
                back = jax.lax.ppermute(own[gradient], AXIS, [(borrower, owner)])
                out[RowGradient(row)] = _added(out[RowGradient(row)], back)
        return out

    def _total(self, gradient: SummedGradient, parts: Array) -> Array:
        """A gradient with its parts added up, cut as its parameter is."""
        # This cuts what leaves the loop. Without `_as_summed` XLA would also cut what
        # is summed inside of it.
        spec, parts = self._spec_of(gradient), self._as_summed(gradient, parts)
        if self._has_parts(gradient):
            parts = self._added_up(gradient, parts)
        return jax.lax.with_sharding_constraint(parts, spec) if spec else parts

    def _added_up(self, gradient: SummedGradient, parts: Array) -> Array:
        """The parts of a gradient added up: of what is cut over the axes of rows each
        device gets its piece.
        """
        spec, axes = self._spec_of(gradient), {*self.mesh.axis_names} - {AXIS}
        # Of 16 bits the parts are added up in 32, as all else.
        wide = parts.astype(sum_dtype(parts.dtype))
        return add_parts(wide, spec, self.data, axes)

    def _everywhere(self, value: Array) -> Array:
        """What some devices wrote, on all of them; the others have zeros."""
        if self.machine.devices == 1:
            return value
        # A `psum` is exact here, for all but one add zero; of booleans there is none.
        if value.dtype == jnp.bool_:
            return jax.lax.psum(value.astype(jnp.uint8), AXIS) > 0
        return jax.lax.psum(value, AXIS)


def _comes_first(part: Any, data: tuple[str, ...]) -> bool:
    """Whether an entry of a spec names an axis of rows before another one."""
    of_rows = [name in data for name in axes_in(part)]
    return of_rows != sorted(of_rows)


def _beginning(part: Part, microbatch: Array) -> list[Array]:
    """Where a microbatch's part of an array begins, on each axis."""
    first = microbatch * part.stride
    return [first, *[jnp.zeros_like(first)] * (len(part.sizes) - 1)]


def _first_part(value: Array, parts: int) -> Array:
    """A sum as parts of which all but the first are zero."""
    first = jax.lax.broadcasted_iota(jnp.int32, (parts, *value.shape), 0) == 0
    return jnp.where(first, value[None], jnp.zeros_like(value))


def _staged(op: Op) -> list[Staged]:
    """Where an operation leaves what goes to the host.

    No other that runs in the same phase on the same device leaves anything there: the
    units of a stage, an end and a core, have pools of their own.
    """
    return [
        Staged(target.buffer)
        for target in op.targets
        if isinstance(target, Put) and any(map(on_host, target.avals))
    ]


def _at(slots: Array, slot: Array) -> Array:
    """One slot of a pool's array, with its axis."""
    return jax.lax.dynamic_slice_in_dim(slots, slot, 1)


def _where(condition: Array, values: list[Any]) -> list[Any]:
    """The buffers, zeros unless a condition holds, so that they wait for it. What is
    on the host stays as it is, because nothing is computed there.
    """
    return jax.tree.map(
        lambda a: a if on_host(a) else jnp.where(condition, a, jnp.zeros_like(a)),
        values,
    )


def _added(total: Array, value: Array) -> Array:
    """A sum in a row's block."""
    return _combined(jnp.add, total, value)


def _combined(f: Callable[[Array, Array], Array], total: Array, value: Array) -> Array:
    """A block of a row with a value added, or whatever `f` does.

    The block may be longer and flat: where the stages' arrays differ in shape,
    `packing.py` flattens them and pads to the longest.
    """
    value = value.astype(total.dtype)
    if value.shape == total.shape:
        return f(total, value)
    flat = value.reshape(-1)
    if flat.shape == total.shape:
        return f(total, flat)
    size = flat.shape[0]
    return total.at[:size].set(f(total[:size], flat))
