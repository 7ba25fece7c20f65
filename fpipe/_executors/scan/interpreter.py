"""A machine as one program: `lax.scan` over its ticks, inside `jax.shard_map` over the
mesh axis `"stage"`.

In: a `Machine`, and the arrays of a call. Out: outputs, gradients and states. In each
phase of a tick a device does this, as its row of the table says:

    feeds         what an operation reads of large inputs comes to this device
    operations    each runs, or passes its buffers on
    wires         `ppermute`: what was made goes to the device that reads it

What a device holds from tick to tick is its *carry*, see `carry.py`.

Every operation is a `lax.cond` whose other branch passes its buffers on. XLA then
updates them in place; a `lax.switch` over several operations would copy every buffer at
each tick (measured on jax 0.10.2, CPU).

On CPUs some operations run on all devices together, if any device is to run them: those
that may exchange parts of arrays between the devices of a stage, see `exchanges.py`.
What the others make of whatever they have in their slots is thrown away.

What a policy offloads leaves an operation on the device, and goes to a slot on the host
after the operations of the phase, so that no conditional returns anything on the host.
XLA for GPUs refuses to compile one that does, or copies the whole pool from host to
host at each tick. Like this it copies one slot, and the pool is nowhere but on the host
(read off what it compiles for an H200, jax 0.10.2).

Nothing here asks which device it is on: that is in the table alone. Python runs over a
phase's operations once, while JAX traces the body of the scan, and the numbers of the
table are traced arrays by then. So the `carry` that the methods change in place is a
dictionary of tracers, and the program holds what they leave in it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fpipe._core.pytrees import on_host
from fpipe._executors.placement import Unshard
from fpipe._executors.scan.carry import (
    Buffer,
    Carry,
    ClockToken,
    CopiedSlots,
    HostSlots,
    InTransit,
    Reads,
    Staged,
    Turn,
    after_reads,
    pool_arrays,
)
from fpipe._executors.scan.clock import Clock
from fpipe._executors.scan.computing import Computer
from fpipe._executors.scan.machine import (
    Add,
    Held,
    InputGradient,
    LoanGradient,
    Machine,
    Maximise,
    Op,
    Outbox,
    OutputBuffer,
    Put,
    RowGradient,
    Send,
    SetState,
    SetStatePart,
    StateBlock,
    StateMaximum,
    SummedGradient,
    TableOp,
    Write,
)
from fpipe._executors.scan.moving import Mover, staged_by
from fpipe._executors.scan.reading import (
    Given,
    GivenInputs,
    Reader,
    beginning,
    unsharded,
)
from fpipe._executors.scan.storage import (
    Storage,
    as_stored,
    empty,
    empty_on_host,
    filled,
    from_stored,
    own_zeros,
    stored_shape,
)
from fpipe._executors.scan.summing import GradientSums, combined, everywhere
from fpipe._executors.stage_places import AXIS
from fpipe._model.loss import sum_dtype
from fpipe._program.host_calls import Failures, Logged
from fpipe._program.over_mesh import devices_over

Array: TypeAlias = jax.Array


class Runs(NamedTuple):
    """Where an operation runs in a phase.

    Attributes:
        here: whether this device is to run it.
        anywhere: whether any device is.
    """

    here: Array
    anywhere: Array


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


class Interpreter:
    """Runs one segment of a machine on a mesh.

    Arguments:
        number: which of the machine's segments.
        data: the axes of the mesh over which rows are shared.
        unshard: how often parameters are gathered that are cut over these.
        clock: who is told when each operation starts and ends.
        together: the operations that all devices run if any of them does.
    """

    def __init__(
        self,
        machine: Machine,
        number: int,
        mesh: Mesh,
        data: tuple[str, ...],
        unshard: Unshard,
        clock: Clock | None,
        together: frozenset[Op] = frozenset(),
    ) -> None:
        self.machine = machine
        self.together = together
        self.segment = machine.segments[number]
        self.last = number == len(machine.segments) - 1
        self.mesh = mesh
        self.clock = clock
        self.data = data
        self.unshard = unshard
        self.alone = mesh.size == mesh.shape[AXIS]
        # The axes that devices of one stage share.
        self.shared = frozenset(mesh.axis_names) - {AXIS}
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
        self.sums = GradientSums(machine, mesh, data, unshard, ops)
        self.outputs = [buffer for buffer in machine.outputs if buffer in changed]
        self.states: list[StateBlock] = []
        if machine.state is not None:
            self.states = [StateBlock(r) for r in range(len(machine.state.rows))]
        self.maxima = [buffer for buffer in changed if isinstance(buffer, StateMaximum)]
        # An exception in a layer's callback waits until all devices can raise it. To
        # ask whether there was one takes a callback that returns something, and JAX
        # refuses such callbacks over a mesh that has other axes too.
        self.failures: Failures | Logged | None = None
        if any(op.code is not None and op.code.guard is not None for op in ops):
            count = len(mesh.local_devices)
            self.failures = Failures(count) if self.alone else Logged()
        self.reader = Reader(machine, mesh, data, unshard, self.storage)
        self.computer = Computer(self.sums, self.failures)
        self.mover = Mover(machine, self.storage, self.alone, bool(together))

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
        for gradient in self.sums.gradients:
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
            # After the loop the devices bring together what they have made.
            outputs = [
                everywhere(carry[buffer], self.machine.devices)
                for buffer in self.outputs
            ]
            gradients = self.sums.add_up(carry, [*of_rows, *whole])
            after: list[list[Array]] = []
            if not self.last:
                after = [
                    [a[None] for a in pool_arrays(name, carry)]
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
            own = self.reader.taken(packed, params[row], aval.shape)
            loans.append(jax.lax.ppermute(own, AXIS, [(owner, borrower)]))
        if self.unshard == "step":
            params = [self.reader.gathered(r, block) for r, block in enumerate(params)]
            loans = [
                self.reader.gathered(loan.row, array)
                for loan, array in zip(self.machine.loans, loans, strict=True)
            ]
        start = self._start(state, inputs, left)
        # `lax.scan` carries a list: a dictionary would have to have sortable keys.
        names = list(start)
        # What runs anywhere is the same on all devices.
        most = jnp.asarray(self.segment.table.max(0)) if self.together else table

        def tick(
            values: list[Any], now: tuple[Array, Array, Array]
        ) -> tuple[list[Any], None]:
            # Feeds fill `fed` anew in each phase: what they brought is read at once.
            number, row, most = now
            carry = dict(zip(names, values, strict=True))
            for p in range(len(self.segment.phases)):
                given = Given(params, loans, inputs, {})
                self._run_phase(p, number, row, most, carry, given)
            return [carry[name] for name in names], None

        values, _ = jax.lax.scan(
            tick, list(start.values()), (jnp.arange(table.shape[0]), table, most)
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
        for gradient in self.sums.gradients:
            of = self.sums.shape_of(gradient)
            # One part for each shard of the batch, added up at the end.
            parts = (self.shards,) if self.sums.has_parts(gradient) else ()
            # Gradients in 16 bits are summed in 32, and cast once, in the end.
            shape, dtype = (*parts, *of.shape), sum_dtype(of.dtype)
            total = filled(shape, dtype, next(zeros))
            carry[gradient] = self.sums.as_summed(gradient, total)
        for maximum in self.maxima:
            assert machine.state is not None
            of = machine.state.rows[maximum.row]
            carry[maximum] = jnp.full(of.shape, -jnp.inf, sum_dtype(of.dtype))
        for n, block in enumerate(self.states):
            if left:
                (carry[block],) = left[len(machine.pools) + n]
            else:
                assert state is not None
                carry[block] = unsharded(state[n], self.mesh)
        return carry

    def _run_phase(
        self,
        p: int,
        tick: Array,
        row: Array,
        most: Array,
        carry: Carry,
        given: Given,
    ) -> None:
        """One phase of a tick: feeds move, operations run, wires carry.

        Arguments:
            row: of the table, for all phases of the tick.
            most: of each number in such a row the largest that any device has.
        """
        # Feeds before operations: what is read now has to be here. Wires after them:
        # what an action sends is there in the next phase, as `ticks.py` counts on.
        phase = self.segment.phases[p]
        for feed in phase.feeds:
            self.mover.move_feed(feed, carry, row[p], given)
        # In each phase one slot goes to the host, and not one for each operation,
        # because most operations do not run.
        staged = dict.fromkeys(s for entry in phase.ops for s in staged_by(entry.op))
        for name in staged:
            carry[name] = self.mover.nothing_staged(name.pool)
        for entry in phase.ops:
            own = row[p]
            runs = Runs(own[entry.runs] > 0, most[p, entry.runs] > 0)
            if self.clock is None:
                self._operate(entry, carry, own, given, runs)
            else:
                when = (tick, p)
                self._operate_timed(self.clock, entry, carry, own, given, runs, when)
        for name in staged:
            self.mover.store_on_host(name, carry)
        self.mover.copy(phase, carry, row[p])
        for wire in phase.wires:
            self.mover.deliver(wire, carry, row[p, wire.slot], row[p, wire.carries])

    def _operate_timed(
        self,
        clock: Clock,
        entry: TableOp,
        carry: Carry,
        row: Array,
        given: Given,
        runs: Runs,
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
        # A slot of a pool will do.
        reads = [a[:1] for pool in pools for a in carry[pool]]
        reads += [as_stored(a) for a in given.fed.values()]
        here = runs.here
        token = clock.stamp(here, where, 0, carry[ClockToken()], reads, self.shared)
        told = token >= 0
        self._operate(entry, carry, row, given, Runs(here & told, runs.anywhere & told))
        # One array that it writes is enough: a conditional ends as a whole.
        written = [carry[target.buffer] for target in op.targets]
        written += [carry[staged] for staged in staged_by(op)]
        made = jax.tree.leaves(written)[:1]
        carry[ClockToken()] = clock.stamp(here, where, 1, token, made, self.shared)

    def _operate(
        self, entry: TableOp, carry: Carry, row: Array, given: Given, runs: Runs
    ) -> None:
        """An operation, where it `runs`, or on all devices together."""
        op = entry.op
        # The conditional carries what the operation changes, and nothing else: XLA
        # updates that in place, and would copy what only passes through.
        changed: set[Buffer] = {target.buffer for target in op.targets}
        changed.update(staged_by(op))
        names = [name for name in carry if name in changed]
        is_joint, turn = op in self.together, carry[Turn()]
        asked = runs.anywhere if is_joint else runs.here
        waits = after_reads(names, carry)
        if self.together:
            # All devices exchange parts of arrays in one order, see `moving.py`.
            waits += turn

        def run(arrays: list[Any]) -> tuple[list[Any], Array]:
            own = carry | dict(zip(names, arrays, strict=True))
            with jax.named_scope(op.name):
                self._apply(op, own, row[entry.arguments :], given)
                made = [own[name] for name in names]
                if is_joint:
                    made = _chosen(runs.here, made, arrays)
            return made, jnp.int32(0)

        new, read = jax.lax.cond(
            asked & (waits == 0),
            run,
            lambda arrays: (arrays, turn),
            [carry[name] for name in names],
        )
        if self.together:
            carry[Turn()] = read
        carry.update(zip(names, new, strict=True))
        for pool in dict.fromkeys(s.pool for s in op.sources if isinstance(s, Held)):
            if pool not in changed:
                carry[Reads(pool)] = carry.get(Reads(pool), jnp.int32(0)) + read

    def _apply(self, op: Op, carry: Carry, arguments: Array, given: Given) -> None:
        """What an operation does, once it runs: take values, compute, and put them into
        the buffers in `carry`.
        """
        # Values by number, as targets count them: sources, then what the code makes.
        values = self._read(op, carry, arguments, given)
        if op.code is not None:
            values += self.computer.compute(op, [values[n] for n in op.code_inputs])
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
                    carry[buffer] = self.sums.add(gradient, carry[buffer], values[n])
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
                        flat = unsharded(value.reshape(-1), self.mesh)
                        value = jax.lax.dynamic_update_slice_in_dim(block, flat, 0, 0)
                    carry[buffer] = unsharded(value, self.mesh)
                case Maximise(_, n):
                    carry[buffer] = combined(jnp.maximum, carry[buffer], values[n])
                case SetStatePart(block, n, whole, part):
                    # Only this part is written, in place: the others are those of
                    # microbatches that may not have been here yet.
                    assert self.machine.state is not None
                    row = self.machine.state.rows[block.row]
                    state = row.take(carry[buffer], whole.shape)
                    value = values[n].reshape(part.sizes)
                    place = beginning(part, arguments[0])
                    state = jax.lax.dynamic_update_slice(state, value, place)
                    carry[buffer] = unsharded(row.put(state), self.mesh)

    def _read(
        self, op: Op, carry: Carry, arguments: Array, given: Given
    ) -> list[Array]:
        """The sources of an operation."""
        values = [self.reader.fetch(s, carry, arguments, given) for s in op.sources]
        # What comes out of a pool that the operation also puts something into is read
        # once, before that. XLA of JAX 0.12 would read it again in each fusion that
        # needs it, some of them after the update, and copy the whole pool for these.
        changed = {target.buffer for target in op.targets}
        first = [
            n
            for n, s in enumerate(op.sources)
            if isinstance(s, Held) and s.pool in changed and not on_host(s.avals[s.k])
        ]
        taken = jax.lax.optimization_barrier([values[n] for n in first])
        for n, value in zip(first, taken, strict=True):
            values[n] = value
        return values


def _chosen(condition: Array, new: list[Any], old: list[Any]) -> list[Any]:
    """The new buffers where a condition holds, and else the old ones."""

    def choose(a: Array, b: Array) -> Array:
        # XLA may cut the two in other ways. In the branch of a conditional that not all
        # devices take it must not exchange anything, and of these scales it cuts none.
        if jnp.issubdtype(a.dtype, jax.dtypes.extended):
            return jax.lax.cond(condition, lambda a, _: a, lambda _, b: b, a, b)
        return jnp.where(condition, a, b)

    return jax.tree.map(choose, new, old)


def _where(condition: Array, values: list[Any]) -> list[Any]:
    """The buffers, zeros unless a condition holds, so that they wait for it. What is
    on the host stays as it is, because nothing is computed there.
    """
    return jax.tree.map(
        lambda a: a if on_host(a) else jnp.where(condition, a, jnp.zeros_like(a)),
        values,
    )
