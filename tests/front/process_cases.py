"""What `test_processes.py` has several processes compute, and what one computes: each
case has both, side by side.

A process runs the cases that it is told, in order, and prints what it has of the
results as JSON lines; where another process has an array, it prints `None`.
"""

import argparse
import dataclasses
import faulthandler
import json
import os
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import fpipe
import fpipe.distributed
import fpipe.optim
from fpipe._core import cpu_threads, processes, watchdog
from fpipe._executors.placed import crossing
from tests.front.workers import encoded, free_port, is_taken, recording
from tests.helpers import (
    HANG,
    Case,
    add,
    borrower,
    counter,
    dense,
    dropout,
    keep,
    mse,
    owner,
    sided,
)


def shape_of(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


# --- what is run ---

# A skip over several stages, a tied weight, states, dropout, a width of its own, and a
# side input: no two stages are alike.
DIFFERENT = [
    owner(),
    keep(),
    counter(),
    dense(6),
    dense(),
    add(),
    sided(),
    dropout(),
    borrower(),
]
CASE = Case(DIFFERENT, chunks=4, rows=8)
# Of two rows a norm would leave signs alone, and gradients of rounding errors.
NORMED = Case([*DIFFERENT, fpipe.DeferredBatchNorm()], chunks=4, rows=16)
PLAIN = Case([dense()] * 4, chunks=4, rows=8)
SMALL = Case([counter(), dense()], chunks=2, rows=4)


def loss_and_rows(y, t):
    return mse(y, t), {"rows": jnp.sum(y, -1)}


def pipe_of(case, devices, **options):
    return fpipe.Pipe(case.layers, devices=devices, chunks=case.chunks, **options)


def trained(case, devices, loss=mse, given=None, **options):
    """A training step: what it returns, everything gathered.

    Arguments:
        given: of `value_and_grad`.
    """
    pipe = pipe_of(case, devices, **options)
    needs = case.needs
    params = pipe.init(jax.random.key(0), case.x, side=case.side)
    if needs["state"] is not None:
        needs["state"] = pipe.init_state(case.x, side=case.side)
    step = pipe.value_and_grad(loss, **(given or {}))
    found, grads = step(params, case.x, case.target, **needs)
    if needs["state"] is not None:
        found = (found[0], pipe.gather_state(found[1]))
    if "argnums" not in (given or {}):
        return found, told_frozen(pipe.gather(grads))
    return found, (pipe.gather(grads[0]), *grads[1:])


def told_frozen(grads):
    """Gradients with `False` in place of what is frozen, which JSON would lose."""
    return jax.tree.map(
        lambda g: np.zeros((), bool) if g.dtype == jax.dtypes.float0 else g, grads
    )


def reference(case, loss=mse, given=None):
    step = case.reference.value_and_grad(loss, **(given or {}))
    needs = case.needs
    train = needs.pop("train")
    found, grads = jax.jit(
        lambda p, needs: step(p, case.x, case.target, train=train, **needs)
    )(case.params(), needs)
    return found, told_frozen(grads)


def called(devices):
    """Calls without gradients; a process gives shapes of what it does not read. JAX
    differentiates a call, whose `y` is in every process then. Nobody places what
    another one has.
    """
    made = []
    layers = recording(PLAIN.layers, made)
    fpipe.Pipe(layers, devices=devices, chunks=4).init(jax.random.key(0), PLAIN.x)
    pipe = pipe_of(PLAIN, devices)
    params = pipe.place(PLAIN.params())
    x, t = PLAIN.x, PLAIN.target
    own = pipe.compile(params, x, t, loss_fn=mse)
    whole = pipe.plan(params, x, t, loss_fn=mse).programs
    first = jax.process_index() == devices[0].process_index
    last = jax.process_index() == devices[-1].process_index
    x = x if first else shape_of(x)
    t = t if last else shape_of(t)
    y = pipe(params, x)
    loss, aux = pipe.evaluate(loss_and_rows, has_aux=True)(params, x, t)
    turned = pipe_of(PLAIN, devices[::-1])
    told = [made, own, whole, told_of(lambda: turned.place(params))]
    outside = jax.value_and_grad(loss_outside, (1, 2))
    # What JAX compiles around the call, and what it has compiled.
    _, (value, (grads, of_x)) = [outside(pipe, params, PLAIN.x) for _ in range(2)]
    return told, (y, loss, aux, of_x, value, pipe.gather(grads))


def loss_outside(pipe, params, x):
    """The loss of a call, computed by JAX."""
    return mse(pipe(params, x), PLAIN.target)


def called_reference():
    whole, params = PLAIN.reference, PLAIN.params()
    loss, aux = jax.jit(whole.evaluate(loss_and_rows, has_aux=True))(
        params, PLAIN.x, PLAIN.target
    )
    outside = jax.value_and_grad(loss_outside, (1, 2))
    value, (grads, of_x) = outside(whole, params, PLAIN.x)
    return jax.jit(whole)(params, PLAIN.x), loss, aux, of_x, value, grads


@fpipe.skippable(stash=["key", "nothing"])
def send(params, x, *, carry):
    del params
    carry = fpipe.stash(carry, "key", jax.random.key(jnp.int32(x.shape[0])))
    return 2 * x, fpipe.stash(carry, "nothing", x[:, :0])


@fpipe.skippable(pop=["key", "nothing"])
def get(params, x, *, carry):
    del params
    key, carry = fpipe.pop(carry, "key")
    nothing, carry = fpipe.pop(carry, "nothing")
    return x * jax.random.uniform(key, x.shape) + nothing.sum(), carry


def empty(key, x):
    return ()


SEND, GET = (dataclasses.replace(layer, init=empty) for layer in (send, get))
STRANGE = Case([SEND, dense(), GET], chunks=2, rows=4)


def strange(devices):
    """What cannot be sent as it is: a typed key, and an array without elements."""
    pipe = pipe_of(STRANGE, devices, balance=[1, 2])
    params = pipe.place(STRANGE.params())
    loss, grads = pipe.value_and_grad(mse)(params, STRANGE.x, STRANGE.target)
    return loss, pipe.gather(grads)


def strange_reference():
    step = jax.jit(STRANGE.reference.value_and_grad(mse))
    return step(STRANGE.params(), STRANGE.x, STRANGE.target)


def perceptron(params, x, t):
    def block(h, w):
        return fpipe.cut(jnp.tanh(h @ w)), None

    h, _ = jax.lax.scan(block, x, params["blocks"])
    return jnp.mean((h @ params["head"] - t) ** 2)


def perceptron_params():
    w = np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)
    return {"blocks": np.stack([w, w[::-1], w.T, w / 2]), "head": w}


def split(devices):
    """A function whose layers are stacked: their rows are in all processes. What is
    spread is one array again, over all devices, and can be placed.
    """
    step = fpipe.value_and_grad(perceptron, devices=devices, chunks=2)
    batch = PLAIN.x, PLAIN.target
    placed = step.place(perceptron_params(), *batch)
    assert len(placed["blocks"].blocks) == 4
    spread = fpipe.distributed.spread(placed)
    blocks = spread["blocks"]
    assert blocks.shape == (4, 4, 4)
    assert blocks.devices() == set(jax.devices())
    assert blocks.is_fully_replicated == (len(jax.devices()) > 4)
    params = step.place(spread, *batch)
    loss, grads = step(params, *batch)
    return loss, step.gather(grads), step.gather(params)


def split_reference():
    params = perceptron_params()
    args = params, PLAIN.x, PLAIN.target
    return *jax.jit(jax.value_and_grad(perceptron))(*args), params


def optimizer():
    return optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2))


@jax.numpy_dtype_promotion("standard")  # optax needs it
def optimized(devices):
    """Two steps of an optimizer that looks at all gradients together."""
    pipe = pipe_of(PLAIN, devices)
    params, step = pipe.place(PLAIN.params()), pipe.value_and_grad(mse)
    tx = fpipe.optim.per_stage(optimizer(), donate=("grads", "state"))
    state, norms = tx.init(params), []
    scale = fpipe.optim.DynamicLossScale()
    for _ in range(2):
        loss, grads = step(params, PLAIN.x, PLAIN.target, loss_scale=scale.scale)
        scale = scale.adjusted(grads)
        norms.append(fpipe.optim.global_norm(grads))
        norms.append(fpipe.optim.map(optax.tree.norm, params))
        # The loss is an array of this process, and goes through.
        updates, state = tx.update(grads, state, params, value=loss)
        params = fpipe.optim.apply_updates(params, updates)
    whole = fpipe.optim.gather(state)
    state = fpipe.optim.place(whole, params, tx)
    return (
        norms,
        scale.steps,
        pipe.gather(params),
        fpipe.optim.gather(state),
    )


@jax.numpy_dtype_promotion("standard")
def optimized_reference():
    params, tx, norms = PLAIN.params(), optimizer(), []
    state, step = tx.init(params), jax.jit(PLAIN.reference.value_and_grad(mse))
    for _ in range(2):
        _, grads = step(params, PLAIN.x, PLAIN.target)
        norms += [optax.tree.norm(grads), optax.tree.norm(params)]
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return norms, jnp.int32(2), params, state


def recorded(devices):
    """A recording is the same in all processes, and has what happened in each."""
    pipe = pipe_of(PLAIN, devices, schedule="1f1b", balance=[2, 2])
    params = pipe.place(PLAIN.params())
    step = pipe.value_and_grad(mse)
    (loss, _), timeline = pipe.record(step, params, PLAIN.x, PLAIN.target)
    told = [
        *sorted(f"{e.action} on {e.device}" for e in timeline.events),
        *sorted(f"{t.source} to {t.target}: {t.bytes}" for t in timeline.transfers),
        # Both have all times on one clock.
        repr(sorted(event.end for event in timeline.events)),
    ]
    return told, loss


def told_of(f, notes=False):
    try:
        f()
    except (FloatingPointError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
        own = [n for n in getattr(error, "__notes__", ()) if n.startswith("fpipe: ")]
        return "\n".join([said, *own] if notes else [said])
    raise AssertionError(f)


def anomalous(devices):
    """A NaN that one process makes is an error in all, and so is one in a backward; a
    call without one is as always.
    """
    layers = [dense(), fpipe.fn(jnp.sqrt), dense()]
    pipe = fpipe.Pipe(
        layers, devices=devices, balance=[2, 1], chunks=2, detect_anomaly=True
    )
    case = Case(layers, chunks=2, rows=4)
    params, step = pipe.place(case.params()), pipe.value_and_grad(mse)
    zero = jax.tree.map(jnp.zeros_like, params)
    told = [
        told_of(lambda: step(params, -10 * jnp.abs(case.x), case.target)),
        told_of(lambda: step(zero, case.x, case.target)),
    ]
    one = fpipe.Pipe([dense()] * 2, devices=devices, chunks=2, detect_anomaly=True)
    params = one.place(Case([dense()] * 2, chunks=2, rows=4).params())
    loss, _ = one.value_and_grad(mse)(params, case.x, case.target)
    # A NaN that JAX looks for: of a stage in one process, and of one in both.
    layers = [dense(activation=jnp.positive)] * 2 + [fpipe.fn(root)]
    case = Case(layers, chunks=2, rows=4)
    pairs = np.array(jax.devices()).reshape(2, 2)
    with jax.debug_nans(True):
        for places in (devices, [Mesh(pair, "data") for pair in pairs.T]):
            pipe = fpipe.Pipe(layers, [1, 2], places, chunks=2)
            params, step = pipe.place(case.params()), pipe.value_and_grad(mse)
            step(params, case.x, case.target)
            given = params, 1000 * case.x, case.target
            told.append(told_of(lambda f=step, given=given: f(*given), notes=True))
    return told, loss


def root(x):
    """It makes a NaN of large numbers."""
    return jnp.sqrt(100 - x * x)


def anomalous_reference():
    case = Case([dense()] * 2, chunks=2, rows=4)
    return jax.jit(case.reference.evaluate(mse))(case.params(), case.x, case.target)


def without_jit(devices):
    """Each process runs all layers by itself."""
    with jax.disable_jit():
        return trained(SMALL, devices)


def misfed(devices):
    """The process that reads an input has only its shape, or a part of it."""
    pipe = pipe_of(PLAIN, devices)
    params = pipe.place(PLAIN.params())
    step = pipe.evaluate(mse)
    mesh = Mesh(np.array(devices), "data")
    spread = jax.make_array_from_process_local_data(
        NamedSharding(mesh, P("data")), np.ones((4, 4), np.float32)
    )
    told = []
    if jax.process_index() == devices[0].process_index:
        told = [
            told_of(lambda x=x: step(params, x, PLAIN.target))
            for x in (shape_of(PLAIN.x), spread)
        ]
    whole = jax.make_array_from_process_local_data(
        NamedSharding(mesh, P()), np.asarray(PLAIN.x)
    )
    return told, step(params, whole, PLAIN.target)


def misfed_reference():
    step = jax.jit(PLAIN.reference.evaluate(mse))
    return step(PLAIN.params(), PLAIN.x, PLAIN.target)


def measured(devices):
    """What is measured is one number for all processes. Each of these has another layer
    that takes long.
    """
    longest = 0 if jax.process_index() == 0 else 3

    def layer(n):
        def wait(a):
            time.sleep(0.03 if n == longest else 0.001)
            return np.asarray(a)

        return fpipe.fn(lambda x: jax.pure_callback(wait, shape_of(x), x))

    layers = [layer(n) for n in range(4)]
    pipe = fpipe.Pipe(layers, "time", devices=devices, chunks=4, sample=PLAIN.x)
    alone = fpipe.balance(layers, PLAIN.x, by="time", devices=devices, chunks=4)
    plain = pipe_of(PLAIN, devices)
    params = plain.place(PLAIN.params())
    plan = plain.plan(params, PLAIN.x, by="time", compiled=True)
    tuning = fpipe.tune(
        PLAIN.layers,
        PLAIN.x,
        PLAIN.target,
        loss_fn=mse,
        params=PLAIN.params() if jax.process_index() else None,
        devices=devices,
        chunks=4,
        schedules=["1f1b", "gpipe"],
        checkpoints="never",
        measure=2,
    )
    told = [
        pipe.balance,
        alone,
        [stage.total for stage in plan.stages],
        plan.timeline.makespan,
        [[c.schedule, c.measured, c.launched] for c in tuning.candidates],
    ]
    temporary = ["temporary" in row.memory for row in plan.devices]
    return [told, temporary], plain.evaluate(mse)(params, PLAIN.x, PLAIN.target)


def trained_on(places, balance=(5, 5), case=NORMED):
    """A pipe whose stages are on these places, its parameters, what a step gives, and
    the gradients where they are.
    """
    pipe = pipe_of(case, places, balance=list(balance))
    params = pipe.place(case.params())
    state = pipe.init_state(case.x, side=case.side, params=params)
    step = pipe.value_and_grad(mse)
    needs = case.needs | {"state": state}
    (loss, state), grads = step(params, case.x, case.target, **needs)
    return pipe, params, [loss, pipe.gather_state(state), pipe.gather(grads)], grads


def over_meshes(devices):
    """Stages on several devices: of a process each, of two sizes, and both stages in
    both processes. Of the last, the shards of a boundary go from either process to the
    other.
    """
    half = len(devices) // 2
    ends = [Mesh(np.array(devices[:half]), "data"), Mesh(devices[half:], "data")]
    both = [Mesh(devices[::2], "data"), Mesh(devices[:0:-2], "data")]
    found = [trained_on(ends)[2], trained_on([both[0], devices[-1]])[2]]
    told = []

    def expect(array, describe):
        told.append(describe())
        watchdog.expect(array, describe)

    with mock.patch.object(crossing, "expect", expect):
        pipe, params, last, grads = trained_on(both)
    # The watchdog knows the programs that both processes run.
    for stage in (0, 1):
        end = f"stage {stage} \\(.*, which other processes run too"
        assert any(re.search(end, text) for text in told), told
    tx = fpipe.optim.per_stage(optimizer())
    with jax.numpy_dtype_promotion("standard"):
        updates, state = tx.update(grads, tx.init(params), params)
    norm = fpipe.optim.global_norm(grads)
    moments = fpipe.optim.gather(state)
    return [*found, last], norm, pipe.gather(updates), moments, made_cut(both)


def made_cut(places):
    """Parameters that are cut over two processes: neither makes all of one."""

    def init(key, x):
        assert isinstance(key, Tracer)
        assert plain.init is not None
        made = plain.init(key, x)
        # It may name axes of its stage.
        cut = jax.lax.with_sharding_constraint(made["w"], P(None, "data"))
        return {**made, "w": cut}

    plain = dense()
    layer = dataclasses.replace(
        plain, init=init, spec={"w": P(None, "data"), "b": None}
    )
    pipe = fpipe.Pipe([layer] * 2, devices=places, chunks=2)
    return pipe.gather(pipe.init(jax.random.key(0), PLAIN.x))


def over_meshes_reference():
    (loss, state), grads = reference(NORMED)
    tx, params = optimizer(), NORMED.params()
    with jax.numpy_dtype_promotion("standard"):
        updates, moments = jax.jit(tx.update)(grads, tx.init(params), params)
    made = fpipe.sequential([dense()] * 2).init(jax.random.key(0), PLAIN.x)
    norm = optax.tree.norm(grads)
    return [[loss, state, grads]] * 3, norm, updates, moments, made


WIDE = np.linspace(-1, 1, 256 * 256, dtype=np.float32).reshape(1, 256, 256)


def squared(x):
    """Its program does too much to run in the thread that calls it."""
    return jnp.sum(jnp.tanh(x @ x), (0, 1))


def held(devices):
    """Two programs that both processes run. One is in both of them, with all devices
    that it has, before the other asks for the arrays that it needs for them.

    XLA has a thread for each of two devices, if they are as many as the cores. A
    process that has no more waits in both, and nobody sends the arrays.
    """
    half = len(devices) // 2
    is_first = jax.process_index() == 0
    pairs = list(zip(devices[:half], devices[half:], strict=True))
    places = [NamedSharding(Mesh(np.array(pair), "data"), P("data")) for pair in pairs]
    programs = [
        jax.jit(squared, out_shardings=NamedSharding(place.mesh, P()))
        for place in places
    ]

    def run(program, place, own):
        shape = (2, *WIDE.shape[1:])
        return program(jax.make_array_from_single_device_arrays(shape, place, [own]))

    for program, place, pair in zip(programs, places, pairs, strict=True):
        own = jax.device_put(WIDE, pair[jax.process_index()])
        run(program, place, own).block_until_ready()
    links = [(a, b) for a, (_, b) in zip(devices[:half], pairs[::-1], strict=True)]
    processes.connect(processes.Link(*link) for link in links)
    if not is_first:
        time.sleep(0.5)
    found = []
    sent = {}
    for source, target in links:
        lies = SingleDeviceSharding(source)
        array = (
            jax.device_put(WIDE, lies)
            if is_first
            else processes.ghost(WIDE.shape, WIDE.dtype, lies)
        )
        goes = [SingleDeviceSharding(target)]
        (sent[target],) = processes.put_across([array], goes, lambda: "an array")
    for program, place, (own, other) in zip(programs, places, pairs, strict=True):
        array = jax.device_put(WIDE, own) if is_first else sent[other]
        found.append(run(program, place, array))
    return found


def held_reference():
    return [jax.jit(squared)(np.concatenate([WIDE, WIDE]))] * 2


def over_pairs(devices):
    """Each stage in two of four processes, which are not those of the other stage."""
    of_stages = np.array(devices).reshape(2, 2, 2)
    meshes = [Mesh(own, ("data", "model")) for own in of_stages]
    return trained_on(meshes, (5, 4), CASE)[2]


def over_chain(devices):
    """Stages in the processes 0 and 1, in 0 alone, and in 1 and 2."""
    first, last = Mesh(devices[0:3:2], "data"), Mesh(devices[3:5], "data")
    return trained_on([first, devices[1], last], (4, 3, 2), CASE)[2]


def over_more_reference():
    (loss, state), grads = reference(CASE)
    return [loss, state, grads]


def disagreed(devices):
    """The second process has another balance, schedule, layer and version of fpipe,
    each in a call of its own; afterwards they agree.
    """
    second = jax.process_index() == 1
    another = dense(activation=jnp.sin if second else jnp.tanh)

    def loss_of(pipe):
        params = pipe.place(PLAIN.params())
        return pipe.evaluate(mse)(params, PLAIN.x, PLAIN.target)

    pipes = [
        pipe_of(PLAIN, devices, balance=[3, 1] if second else [1, 3]),
        pipe_of(PLAIN, devices, schedule="gpipe" if second else "1f1b"),
        fpipe.Pipe([another] * 4, devices=devices, chunks=4),
    ]
    told = [told_of(lambda pipe=pipe: loss_of(pipe)) for pipe in pipes]
    version = "0.2" if second else "0.1"
    with mock.patch("importlib.metadata.version", return_value=version):
        told.append(told_of(lambda: loss_of(pipe_of(PLAIN, devices))))
    return told, loss_of(pipe_of(PLAIN, devices, balance=[2, 2]))


@dataclasses.dataclass(frozen=True)
class Of:
    """A case.

    Attributes:
        run: what several processes compute, from their devices; one of each of two
            processes, unless `whole`.
        reference: what one computes.
        processes: how many at least.
    """

    run: Callable[[list[Any]], Any]
    reference: Callable[[], Any]
    whole: bool = False
    processes: int = 2


ALL = {"has_aux": True, "argnums": (0, 1)}
FROZEN = {"frozen": lambda path, leaf: path.startswith("3/") or path == "4/w"}


def by(name):
    """A step by a schedule."""
    return Of(
        lambda devices: trained(PLAIN, devices, schedule=name), lambda: reference(PLAIN)
    )


CASES = {
    "step": Of(
        lambda devices: trained(NORMED, devices, loss_and_rows, ALL, balance=[5, 5]),
        lambda: reference(NORMED, loss_and_rows, ALL),
    ),
    "threads": Of(
        lambda devices: trained(
            CASE,
            devices,
            given=FROZEN,
            dispatch="thread_per_device",
            checkpoint="always",
        ),
        lambda: reference(CASE, given=FROZEN),
    ),
    "calls": Of(called, called_reference),
    "strange": Of(strange, strange_reference),
    "split": Of(split, split_reference),
    "optimizer": Of(optimized, optimized_reference),
    "anomalies": Of(anomalous, anomalous_reference),
    "without jit": Of(without_jit, lambda: reference(SMALL)),
    "recording": Of(recorded, misfed_reference),
    "measured": Of(measured, misfed_reference),
    "inputs": Of(misfed, misfed_reference),
    "meshes": Of(over_meshes, over_meshes_reference, whole=True),
    "held": Of(held, held_reference, whole=True),
    "pairs": Of(over_pairs, over_more_reference, whole=True, processes=4),
    "chain": Of(over_chain, over_more_reference, whole=True, processes=3),
    "disagree": Of(disagreed, lambda: None),
    **{
        f"by {name}": by(name)
        for name in fpipe.schedules.NAMES
        if name != "forward_only"
    },
}


def checkpoints():
    """The module with the cases of checkpoints, by the names of its functions. Orbax
    takes two seconds to import, so the other workers do without.
    """
    from tests.front import process_checkpoints

    return process_checkpoints


CHECKPOINTS = ("continued", "loaded", "save_for_ever")
"""Cases of `process_checkpoints`, which are given the folder."""


def raising(params, x):
    """A layer that cannot be traced."""
    raise ArithmeticError("a layer that raises")


def train_for_ever(how):
    """Steps until one process dies; by itself, if it is to raise, there or while it
    traces.
    """
    layers = [dense(), dense()]
    if how == "raise early" and jax.process_index() == 1:
        layers[1] = dataclasses.replace(dense(), apply=raising)
    pipe = fpipe.Pipe(layers, devices=jax.devices(), chunks=2)
    case = Case([dense()] * 2, chunks=2, rows=4)
    params, step = pipe.place(case.params()), pipe.value_and_grad(mse)
    for n in range(10**9):
        if how == "raise" and n == 4 and jax.process_index() == 1:
            raise ArithmeticError("a script that raises")
        loss, _ = step(params, case.x, case.target)
        print(json.dumps({"step": n, "loss": float(loss)}), flush=True)
        time.sleep(0.05)


# These return what errors or recordings say, and the rest.
TELLING = {"recording", "measured", "calls", "disagree", "anomalies", "inputs"}


def parsed():
    parser = argparse.ArgumentParser()
    parser.add_argument("--coordinator")
    parser.add_argument("--process", type=int)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=HANG)
    parser.add_argument("--folder", type=pathlib.Path)
    parser.add_argument("what", nargs="+")
    return parser.parse_args()


def main():
    args = parsed()
    faulthandler.dump_traceback_later(HANG - 60, exit=True)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    jax.config.update(
        "jax_compilation_cache_dir",
        str(pathlib.Path(__file__).parents[2] / ".cache" / "jax"),
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    # As on a machine of few cores: `held` needs few threads.
    cpu_threads._by_default = lambda: 1
    # The address for transfers is given in either way, or found.
    port = free_port()
    address = f"127.0.0.1:{port}"
    if args.processes == 3:
        os.environ["FPIPE_TRANSFER_ADDRESS"] = address
    joining: tuple[Any, ...] = args.coordinator, args.processes, args.process
    if args.processes == 4:  # as under Slurm
        host, _, own = args.coordinator.rpartition(":")
        os.environ |= {
            "JAX_COORDINATOR_PORT": own,
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_NODELIST": host,
            "SLURM_NTASKS": str(args.processes),
            "SLURM_PROCID": str(args.process),
            "SLURM_LOCALID": str(args.process),
        }
        joining = ()
    fpipe.distributed.initialize(
        *joining,
        timeout=args.timeout,
        transfer_address=address if args.processes == 4 else None,
        initialization_timeout=HANG,
        heartbeat_timeout_seconds=HANG,
    )
    for name in args.what:
        if name in ("train", "raise", "raise early"):
            train_for_ever(name)
        started = time.monotonic()
        if name in CHECKPOINTS:
            found = getattr(checkpoints(), name)(args.folder)
        else:
            case = CASES[name]
            every = 1 if case.whole else args.devices
            found = case.run(jax.devices()[::every])
        seconds = time.monotonic() - started
        line = {"case": name, "seconds": seconds}
        if name in TELLING:
            line["told"], found = found
        print(json.dumps({**line, "leaves": encoded(found)}), flush=True)
    assert is_taken(port) == (args.processes > 2)
    fpipe.distributed.shutdown()


if __name__ == "__main__":
    main()
