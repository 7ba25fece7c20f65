"""A machine as it is drawn in the docstring of its module."""

import jax
import jax.numpy as jnp

import fpipe
from fpipe._executors.scan import machine as machine_module
from fpipe._executors.scan.machine import LocalPool, SavedPool, WireName
from tests.executors.helpers import machine_of
from tests.executors.placed.test_recomputation import two_products
from tests.helpers import dense


def machine_for(schedule):
    """Two equal layers on two devices, three microbatches."""
    pipe = fpipe.Pipe(
        [dense()] * 2,
        devices=jax.devices()[:2],
        chunks=3,
        executor="scan",
        checkpoint="never",
        schedule=schedule,
    )
    x = jnp.ones((6, 4))
    params = pipe.init(jax.random.key(0), x)
    pipe.compile(params, x, loss_fn=lambda y: jnp.mean(y**2))
    return machine_of(pipe)


def drawn(machine, device):
    """The rows of a device's table, without the operations that it never runs; dots
    where one does not run.
    """
    (segment,) = machine.segments
    (phase,) = segment.phases
    table = segment.table[device, :, 0]
    starts = [entry.runs for entry in phase.ops] + [wire.slot for wire in phase.wires]
    ends = [*starts[1:], table.shape[-1]]
    titles = [entry.op.name for entry in phase.ops]
    titles += [f"{wire.wire.direction} {wire.wire.color}" for wire in phase.wires]
    columns = []
    for n, (title, start, end) in enumerate(zip(titles, starts, ends, strict=True)):
        is_op = n < len(phase.ops)
        if is_op and not table[:, start].any():
            continue
        column = [title]
        for row in table[:, start:end]:
            hidden = is_op and not row[0]
            column.append(" ".join("." if hidden else str(n) for n in row))
        columns.append(column)
    actions = [phases[0][device] for phases in segment.actions]
    names = [f"{a.kind} mb{a.microbatch}" if a else "" for a in actions]
    columns.insert(0, ["action", *names])
    columns.insert(0, ["tick", *map(str, range(len(table)))])
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        for row in zip(*columns, strict=True)
    ]


def test_the_table_is_as_drawn():
    text = machine_module.__doc__
    assert text is not None
    documented = [line.strip() for line in text.splitlines()]
    for line in drawn(machine_for("1f1b"), 0):
        assert line.strip() in documented, line


def test_pools_and_wires_are_as_drawn():
    machine = machine_for("1f1b")
    forward, backward = WireName("forward", 0), WireName("backward", 0)
    assert machine.wires[forward].pairs == ((0, 1),)
    assert machine.wires[backward].pairs == ((1, 0),)
    # Two microbatches are in flight on device 0; one slot is for what nobody reads.
    assert machine.pools[forward].slots == 2 + 1
    assert machine.pools[SavedPool("core", recomputes=False)].slots == 2
    assert machine.pools[LocalPool("forward")].slots == 1 + 1
    # In the eager form three are, and every wire runs in every tick.
    machine = machine_for("eager_1f1b")
    assert machine.pools[forward].slots == 3 + 1
    assert all(wire.always for wire in machine.wires.values())


def test_a_device_has_one_set_of_residuals_more_for_recomputations():
    def residuals(m, **options):
        pipe = fpipe.Pipe(
            [dense()] * 2,
            chunks=m,
            checkpoint="always",
            schedule="eager_1f1b",
            executor="scan",
            **options,
        )
        x = jax.ShapeDtypeStruct((2 * m, 4), jnp.float32)
        (row, _) = pipe.plan(None, x, loss_fn=lambda y: jnp.mean(y**2)).devices
        return row.memory.get("residuals", 0)

    for m in (4, 8):
        more = residuals(m, recompute="early") - residuals(m)
        assert more == 2 * 4 * 4


def test_what_r_has_recomputed_b_reads():
    """Counted in the whole step: a backward that recomputes again has more products."""

    def traced(**options):
        layer = two_products()
        pipe = fpipe.Pipe(
            [layer] * 2, chunks=3, schedule="gpipe", executor="scan", **options
        )
        x = jax.ShapeDtypeStruct((6, 8), jnp.float32)
        params = pipe.init(jax.random.key(0), x)
        step = pipe.value_and_grad(lambda y: jnp.mean(y**2))
        products = str(jax.make_jaxpr(step)(params, x)).count("dot_general[")
        machine = machine_of(pipe)
        phases = [phase for segment in machine.segments for phase in segment.phases]
        return products, [op.op.name[-1] for phase in phases for op in phase.ops]

    inside, kinds = traced(checkpoint="always")
    assert "R" not in kinds
    early, with_r = traced(checkpoint="always", recompute="early")
    assert sorted(with_r) == sorted([*kinds, *"R" * with_r.count("R")]) != sorted(kinds)
    assert early == inside > traced(checkpoint="never")[0]
