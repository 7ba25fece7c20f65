"""A machine as one program: `lax.scan` over its ticks inside `jax.shard_map` over the
mesh axis `"stage"`.

Every operation is a `lax.cond` whose other branch passes its buffers on. XLA then
updates them in place; a `lax.switch` over several operations would copy every buffer at
each tick (measured on jax 0.10.2, CPU).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fpipe._executors.scan.clock import Clock
from fpipe._executors.scan.machine import (
    Add,
    Feed,
    Held,
    Machine,
    Number,
    Op,
    Param,
    PoolName,
    Put,
    Segment,
    Send,
    Slotted,
    Source,
    StateLeaf,
    Write,
)
from fpipe._executors.scan.mesh import AXIS, DATA
from fpipe._executors.scan.packing import Row
from fpipe._executors.scan.storage import Storage, raw, unwrapped, wrapped
from fpipe._model.loss import sum_dtype
from fpipe._model.stages import Leaf, Port
from fpipe._program.row_sums import Parts, parts_of, summed, values_of

# What a segment carries from tick to tick, and its parts by name.
Name: TypeAlias = tuple[str, Any]

_TURN: Name = ("turn", None)
_TOKEN: Name = ("token", None)  # goes from one call of the clock to the next


@dataclasses.dataclass(frozen=True)
class Runner:
    """Runs a machine on a mesh.

    Attributes:
        rows: of a microbatch.
        idle: what fills everything that nothing has been put in.
        clock: who is told when each operation starts and ends.
    """

    machine: Machine
    mesh: Mesh
    rows: int
    idle: float = 0.0
    clock: Clock | None = None

    @property
    def left(self) -> list[Name]:
        """What a segment leaves for the next."""
        state = self.machine.state
        rows = () if state is None else range(len(state.rows))
        return [
            *(("pool", name) for name in self.machine.pools),
            *(("state", r) for r in rows),
        ]

    def __call__(
        self,
        n: int,
        params: Sequence[Any],
        state: Sequence[Any] | None,
        inputs: Mapping[Port, Sequence[Any]],
        carried: Mapping[Name, Any] | None = None,
    ) -> tuple[dict[Any, Any], dict[Name, Any], list[Any], dict[Name, Any]]:
        """Run the `n`-th segment.

        Arguments:
            params, state: rows.
            inputs: arrays by port; those that are cut have a first axis of
                microbatches, those that lie over the devices one that the devices
                divide.
            carried: what the segment before left.

        Returns:
            Outputs by name, with a first axis of microbatches; gradients by name
            (`("row", r)` has an axis of devices); the state's rows; and what the next
            segment needs.
        """
        segment = _Segment(
            self, self.machine.segments[n], last=n == len(self.machine.segments) - 1
        )
        return segment.run(params, state, inputs, carried)


class _Segment:
    def __init__(self, runner: Runner, segment: Segment, last: bool) -> None:
        self.machine, self.mesh, self.rows = runner.machine, runner.mesh, runner.rows
        self.segment, self.idle, self.last, self.left = (
            segment,
            runner.idle,
            last,
            runner.left,
        )
        self.clock = runner.clock
        machine = self.machine
        ops = [s.op for phase in segment.ops for s in phase]
        targets = [t for op in ops for t in op.targets]
        self.storage = {
            name: Storage(pool.avals, self.rows) for name, pool in machine.pools.items()
        }
        self.outputs = [
            n
            for n in machine.outputs
            if any(isinstance(t, Write) and t.output == n for t in targets)
        ]
        wires = {a.wire for phase in segment.wires for a in phase}
        self.names: list[Name] = [("pool", name) for name in machine.pools]
        self.names += [("outbox", name) for name in machine.wires if name in wires]
        self.names += [("feed", feed) for own in segment.feeds for feed in own]
        self.names += [_TURN] if self.clock is None else [_TURN, _TOKEN]
        self.names += [("output", name) for name in self.outputs]
        adds = dict.fromkeys((t.to, t.of) for t in targets if isinstance(t, Add))
        self.grads: list[Name] = list(adds)
        self.names += self.grads
        if machine.state is not None:
            self.names += [("state", r) for r in range(len(machine.state.rows))]
        self.at = {name: n for n, name in enumerate(self.names)}
        self.parts = self._find_parts(ops)

    # --- outside the mesh ---

    def run(self, params: Any, state: Any, inputs: Any, carried: Any) -> Any:
        """Under `shard_map`."""
        table = jnp.asarray(self.segment.table)
        ports = list(inputs)
        flat = [list(inputs[port]) for port in ports]
        # PRNG keys cross the boundary as numbers, and are written so.
        avals = [
            [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays] for arrays in flat
        ]
        flat = [[unwrapped(a) for a in arrays] for arrays in flat]
        # Keys do not lie over the devices, so what does is what it was.
        lie = [
            [
                P(AXIS) if Leaf(port, k) in self.machine.spread else P()
                for k in range(len(inputs[port]))
            ]
            for port in ports
        ]
        left = list(carried or ())
        kept = [] if self.last else self.left

        def local(table: Any, params: Any, state: Any, flat: Any, before: Any) -> Any:
            arrays = {
                port: [wrapped(a, aval) for a, aval in zip(own, of, strict=True)]
                for port, own, of in zip(ports, flat, avals, strict=True)
            }
            first: dict[Name, Any] = {
                name: [a[0] for a in value]
                for name, value in zip(left, before, strict=True)
            }
            params, state = (
                [a[0] for a in params],
                None if state is None else [a[0] for a in state],
            )
            out = self._scan(table[0], params, state, arrays, first)
            outputs = [self._everywhere(out["output", name]) for name in self.outputs]
            grads = self._gradients(out)
            rows = (
                []
                if self.machine.state is None
                else [out["state", r] for r in range(len(self.machine.state.rows))]
            )
            after = [
                [a[None] for a in (out[n] if isinstance(out[n], list) else [out[n]])]
                for n in kept
            ]
            return (
                outputs,
                [grads[n] for n in grads if n[0] != "row"],
                [grads[n][None] for n in grads if n[0] == "row"],
                [a[None] for a in rows],
                after,
            )

        split = P(AXIS)
        run = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(split, split, split, lie, split),
            out_specs=(P(), P(), split, split, split),
            axis_names={AXIS},
            check_vma=False,
        )
        before = [carried[name] for name in left] if carried else []
        outputs, whole, rows, new_state, after = run(
            table, list(params), state, flat, before
        )
        names = self._gradient_names()
        grads = dict(zip([n for n in names if n[0] != "row"], whole, strict=True))
        grads |= dict(zip([n for n in names if n[0] == "row"], rows, strict=True))
        return (
            {
                n: wrapped(a, self.machine.outputs[n][0])
                for n, a in zip(self.outputs, outputs, strict=True)
            },
            grads,
            new_state,
            dict(zip(kept, after, strict=True)),
        )

    # --- on one device ---

    def _scan(
        self,
        table: Any,
        params: Any,
        state: Any,
        arrays: Any,
        first: Mapping[Name, Any],
    ) -> dict[Name, Any]:
        loans = [self._lend(params, n) for n in range(len(self.machine.loans))]
        start = [
            first[name]
            if name[0] == "pool" and name in first
            else self._start(name, state, arrays, first)
            for name in self.names
        ]

        def tick(carry: list[Any], now: Any) -> tuple[list[Any], None]:
            t, row = now
            for p, ops in enumerate(self.segment.ops):
                fed: dict[tuple[str, Port, int], Any] = {}
                for feed in self.segment.feeds[p]:
                    carry, pieces = self._move(feed, carry, row[p], arrays)
                    fed |= {
                        (feed.kind, feed.port, k): a
                        for k, a in zip(feed.arrays, pieces, strict=True)
                    }
                given = _Given(params, loans, arrays, fed)
                if self.idle:
                    for name in self.names:
                        if name[0] == "outbox":
                            carry[self.at[name]] = self._blank(name[1], ())
                for slotted in ops:
                    carry = self._timed(slotted, carry, row[p], given, (t, p))
                for wire, column, used in self.segment.wires[p]:
                    carry = self._carry(wire, carry, row[p, column], row[p, used])
            return carry, None

        carry, _ = jax.lax.scan(tick, start, (jnp.arange(table.shape[0]), table))
        if self.clock is not None:
            # What is returned needs the last call of the clock too, or XLA might drop
            # it.
            told = carry[self.at[_TOKEN]] >= 0
            carry = jax.tree.map(lambda a: jnp.where(told, a, jnp.zeros_like(a)), carry)
        return dict(zip(self.names, carry, strict=True))

    def _start(
        self, name: Name, state: Any, arrays: Any, first: Mapping[Name, Any]
    ) -> Any:
        what, of = name
        if what == "pool":
            return self._blank(of, (self.machine.pools[of].slots,))
        if what == "outbox":
            return self._blank(of, ())
        if what in ("turn", "token"):
            return jnp.int32(0)
        if what == "feed":
            return [
                self._filled(a.shape[1:], a.dtype)
                for a in (arrays[of.port][k] for k in of.arrays)
            ]
        if what == "output":
            aval = raw(self.machine.outputs[of][0])
            return jnp.zeros((self.machine.microbatches, *aval.shape), aval.dtype)
        if what == "state":
            return first[name][0] if name in first else state[of]
        shape, dtype = self._gradient_shape(name)
        if name not in self.parts:
            return jnp.zeros(shape, sum_dtype(dtype))
        # One part for each shard of the batch, added up at the end.
        zeros = jnp.zeros((self.mesh.shape[DATA], *shape), sum_dtype(dtype))
        return jax.lax.with_sharding_constraint(zeros, P(DATA))

    def _find_parts(self, ops: Sequence[Op]) -> dict[Name, dict[int, Parts]]:
        """The gradients that are kept as parts over the mesh's data axis, with how each
        operation makes them.
        """
        size = self.mesh.shape.get(DATA, 1)
        found: dict[Name, dict[int, Parts | None]] = {}
        for op in ops:
            for target in op.targets:
                if size > 1 and isinstance(target, Add) and op.code is not None:
                    n = target.value - len(op.fetch)
                    code, value = op.code, (*op.code.outs, *op.code.sums)[n]
                    parts = parts_of(code.graph, code.nodes, value, self.rows, size)
                    found.setdefault((target.to, target.of), {})[id(op)] = parts
        return {
            name: {n: parts for n, parts in of.items() if parts is not None}
            for name, of in found.items()
            if all(parts is not None for parts in of.values())
        }

    def _blank(self, pool: PoolName, slots: tuple[int, ...]) -> list[Any]:
        return [
            self._filled((*slots, *a.shape), a.dtype) for a in self.storage[pool].shapes
        ]

    def _filled(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """What nothing has been put in."""
        if not self.idle:
            return jnp.empty(shape, dtype)
        return jnp.full(
            shape, self.idle if jnp.issubdtype(dtype, jnp.inexact) else 1, dtype
        )

    def _gradient_shape(self, name: Name) -> tuple[tuple[int, ...], Any]:
        to, of = name
        if to == "row":
            return self.machine.params.rows[of].shape, self.machine.params.rows[
                of
            ].dtype
        if to == "borrowed":
            return self.machine.loans[of].aval.shape, self.machine.loans[of].aval.dtype
        aval = self.machine.inputs[of]
        return aval.shape, aval.dtype

    def _lend(self, params: Sequence[Any], n: int) -> Any:
        row, owner, borrower, aval = self.machine.loans[n]
        own = self.machine.params.rows[row].take(params[row], aval.shape)
        return jax.lax.ppermute(own, AXIS, [(owner, borrower)])

    def _move(
        self, feed: Feed, carry: list[Any], row: Any, arrays: Any
    ) -> tuple[list[Any], list[Any]]:
        """What a feed brings moves on by one device. Also what is there before: for the
        reader, what it reads.
        """
        n, turn, devices = self.at["feed", feed], self.at[_TURN], self.machine.devices
        pairs = [(d, (d - 1) % devices) for d in range(devices) if d != feed.reader]
        own = row[feed.column]

        def move(come: list[Any]) -> tuple[list[Any], list[Any]]:
            here = []
            for k, a in zip(feed.arrays, come, strict=True):
                whole = arrays[feed.port][k]
                here.append(jnp.where(own < whole.shape[0], _piece(whole, own), a))
            return [jax.lax.ppermute(a, AXIS, pairs) for a in here], here

        out = list(carry)
        out[n], here, out[turn] = self._together(
            row[feed.used], carry, move, lambda come: (come, come), carry[n]
        )
        return out, here

    def _together(
        self, used: Any, carry: list[Any], move: Any, rest: Any, own: Any
    ) -> Any:
        """What moves where the table says so: on every device or on none.

        One after the other: each hands on a zero that the next one needs. XLA would
        keep the order of independent conditionals too, but not on CPU in a program that
        was loaded from the compilation cache (jax 0.10.2), where devices then wait for
        each other in different ones.
        """
        turn = carry[self.at[_TURN]]
        return jax.lax.cond(
            used > turn,
            lambda own: (*move(own), jnp.int32(0)),
            lambda own: (*rest(own), turn),
            own,
        )

    def _timed(
        self,
        slotted: Slotted,
        carry: list[Any],
        row: Any,
        given: "_Given",
        when: tuple[Any, int],
    ) -> list[Any]:
        """An operation, between two calls of the clock if there is one."""
        op, column, _ = slotted
        runs, written = (
            row[column] > 0,
            [self.at[name] for name in map(_written, op.targets) if name in self.at],
        )
        if self.clock is None or not written:
            return self._operate(slotted, carry, row, given, runs)
        n, where = self.at[_TOKEN], (*when, jax.lax.axis_index(AXIS))
        pools = dict.fromkeys(
            self.at["pool", source.pool]
            for source in op.fetch
            if isinstance(source, Held)
        )
        reads = [a for pool in pools for a in carry[pool]] + list(
            map(unwrapped, given.fed.values())
        )
        token = self.clock.stamp(runs, where, 0, carry[n], reads)
        out = self._operate(slotted, carry, row, given, runs & (token >= 0))
        made = out[written[0]]
        out[n] = self.clock.stamp(
            runs, where, 1, token, made[:1] if isinstance(made, list) else [made]
        )
        return out

    def _operate(
        self, slotted: Slotted, carry: list[Any], row: Any, given: "_Given", runs: Any
    ) -> list[Any]:
        """An operation, where it runs."""
        op, _, first = slotted
        written = sorted(
            {self.at[name] for name in map(_written, op.targets) if name in self.at}
        )

        def run(own: list[Any]) -> list[Any]:
            view = list(carry)
            for n, value in zip(written, own, strict=True):
                view[n] = value
            with jax.named_scope(op.name):
                self._apply(op, view, row[first:], given)
            return [view[n] for n in written]

        new = jax.lax.cond(runs, run, lambda own: own, [carry[n] for n in written])
        out = list(carry)
        for n, value in zip(written, new, strict=True):
            out[n] = value
        return out

    def _apply(self, op: Op, view: list[Any], args: Any, given: "_Given") -> None:
        values = [
            self._fetch(op.kind, source, view, args, given) for source in op.fetch
        ]
        if op.code is not None:
            values += self._compute(op, [values[n] for n in op.ins])
        for target in op.targets:
            if isinstance(target, Put):
                n = self.at["pool", target.pool]
                own = [values[v] for v in target.values]
                view[n] = self.storage[target.pool].put(
                    target.avals, own, view[n], args[target.arg]
                )
            elif isinstance(target, Send):
                n = self.at["outbox", target.wire]
                view[n] = self.storage[target.wire].pack(
                    target.avals, [values[v] for v in target.values], view[n]
                )
            elif isinstance(target, Add):
                n = self.at[target.to, target.of]
                add = (
                    jax.vmap(_added) if (target.to, target.of) in self.parts else _added
                )
                view[n] = add(view[n], values[target.value])
            elif isinstance(target, Write):
                n = self.at["output", target.output]
                value = unwrapped(values[target.value])
                if target.add:
                    value = value + _piece(view[n], args[0])
                view[n] = jax.lax.dynamic_update_index_in_dim(
                    view[n], value, args[0], 0
                )
            else:
                assert self.machine.state is not None
                row = self.machine.state.rows[target.row]
                view[self.at["state", target.row]] = _into(
                    row, view[self.at["state", target.row]], values[target.value]
                )

    def _compute(self, op: Op, arrays: Sequence[Any]) -> list[Any]:
        """What an operation's code makes; a gradient that is kept as parts, as parts."""
        code = op.code
        assert code is not None
        wanted: list[int] = [*code.outs, *code.sums]
        parts = {
            t.value - len(op.fetch): self.parts[t.to, t.of][id(op)]
            for t in op.targets
            if isinstance(t, Add) and (t.to, t.of) in self.parts
        }
        if not parts:
            return code(*arrays)
        inner = list(dict.fromkeys(v for p in parts.values() for v in values_of(p)))
        made = code.values(arrays, [*wanted, *inner])
        env = dict(zip(inner, made[len(wanted) :], strict=True))
        return [
            summed(parts[n], env, DATA) if n in parts else made[n]
            for n in range(len(wanted))
        ]

    def _fetch(
        self, kind: str, source: Source, view: list[Any], args: Any, given: "_Given"
    ) -> Any:
        if isinstance(source, Param):
            if source.borrowed:
                return given.loans[source.row]
            return self.machine.params.rows[source.row].take(
                given.params[source.row], source.aval.shape
            )
        if isinstance(source, StateLeaf):
            assert self.machine.state is not None
            return self.machine.state.rows[source.row].take(
                view[self.at["state", source.row]], source.aval.shape
            )
        if isinstance(source, Number):
            return args[source.arg].astype(jnp.uint32)
        if isinstance(source, Held):
            pool = view[self.at["pool", source.pool]]
            return self.storage[source.pool].take(
                source.avals, source.k, pool, args[source.arg]
            )
        if Leaf(source.port, source.k) in self.machine.spread:
            return given.fed[kind, source.port, source.k]
        whole = given.arrays[source.port][source.k]
        return whole if source.whole else _piece(whole, args[0])

    def _carry(
        self, wire: PoolName, carry: list[Any], slot: Any, used: Any
    ) -> list[Any]:
        """What the outboxes hold goes to the pools of the receivers."""
        box, pool = self.at["outbox", wire], self.at["pool", wire]
        pairs = self.machine.wires[wire].pairs

        def move(own: list[Any]) -> tuple[list[Any]]:
            arrived = [jax.lax.ppermute(a, AXIS, pairs) for a in carry[box]]
            return (
                [
                    jax.lax.dynamic_update_index_in_dim(p, a, slot, 0)
                    for p, a in zip(own, arrived, strict=True)
                ],
            )

        out, turn = list(carry), self.at[_TURN]
        if self.machine.wires[wire].always:
            (out[pool],) = move(carry[pool])
        else:
            out[pool], out[turn] = self._together(
                used, carry, move, lambda own: (own,), carry[pool]
            )
        return out

    # --- afterwards ---

    def _everywhere(self, value: Any) -> Any:
        """What some devices wrote, on all of them."""
        if self.machine.devices == 1:
            return value
        if value.dtype == jnp.bool_:
            return jax.lax.psum(value.astype(jnp.uint8), AXIS) > 0
        return jax.lax.psum(value, AXIS)

    def _gradient_names(self) -> list[Name]:
        """The gradients that leave: rows, those to which lent parameters add included,
        and whole inputs.
        """
        rows = {of for to, of in self.grads if to == "row"}
        rows |= {
            self.machine.loans[of].row for to, of in self.grads if to == "borrowed"
        }
        return [("row", r) for r in sorted(rows)] + [
            n for n in self.grads if n[0] == "input"
        ]

    def _gradients(self, out: Mapping[Name, Any]) -> dict[Name, Any]:
        grads = {}
        out = {
            name: value.sum(0) if name in self.parts else value
            for name, value in out.items()
        }
        for name in self._gradient_names():
            if name in out:
                grads[name] = (
                    out[name] if name[0] == "row" else self._everywhere(out[name])
                )
            else:
                shape, dtype = self._gradient_shape(name)
                grads[name] = jnp.zeros(shape, sum_dtype(dtype))
        for to, of in self.grads:
            if to == "borrowed":
                row, owner, borrower, _ = self.machine.loans[of]
                back = jax.lax.ppermute(out[to, of], AXIS, [(borrower, owner)])
                grads["row", row] = _added(grads["row", row], back)
        return grads


class _Given(NamedTuple):
    """What the operations of a phase take from outside: rows, what is lent, inputs, and
    what feeds have brought to the actions of a kind.
    """

    params: Any
    loans: Any
    arrays: Any
    fed: Mapping[tuple[str, Port, int], Any]


def _piece(whole: Any, i: Any) -> Any:
    return jax.lax.dynamic_index_in_dim(whole, i, keepdims=False)


def _written(target: Any) -> Name:
    """The part of the carry that a target writes."""
    if isinstance(target, Put):
        return "pool", target.pool
    if isinstance(target, Send):
        return "outbox", target.wire
    if isinstance(target, Add):
        return target.to, target.of
    if isinstance(target, Write):
        return "output", target.output
    return "state", target.row


def _added(total: Any, value: Any) -> Any:
    """A sum in a row's block, which may be longer and flat."""
    value = value.astype(total.dtype)
    if value.shape == total.shape:
        return total + value
    flat = value.reshape(-1)
    return (
        total + flat
        if flat.shape == total.shape
        else total.at[: flat.shape[0]].add(flat)
    )


def _into(row: Row, block: Any, value: Any) -> Any:
    """A value in a row's block."""
    if value.shape == row.shape:
        return value
    return jax.lax.dynamic_update_slice_in_dim(block, value.reshape(-1), 0, 0)
