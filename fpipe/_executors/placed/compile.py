"""Compiling ahead: every program of a plan, before it runs, several at once.

A plan runs few programs many times. Equal ones are found by their key, so that each is
traced, lowered and compiled once:

    number  instruction     key
    0       cpu:0: F(0,0)   (stage0_F, cpu:0, (f32[3,3], f32[4,3]))    compiled
    1       cpu:0: F(0,1)   (stage0_F, cpu:0, (f32[3,3], f32[4,3]))    the same
    4       cpu:1: F(1,0)   (stage1_F, cpu:1, (f32[3,3], f32[4,3]))    compiled

The numbers between them are those of moves and frees, which need no program of ours.
"""

import concurrent.futures
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Sharding

from fpipe._core.errors import add_note
from fpipe._core.pytrees import on_host
from fpipe._executors.placed.instructions import Copy, Free, Move, Plan
from fpipe._executors.placement import Placement, as_argument
from fpipe._executors.progress import Progress


def compile_plan(
    plan: Plan,
    shapes: Mapping[int, jax.ShapeDtypeStruct],
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[int, Any]:
    """Compile what a plan runs in this process.

    Tracing and lowering are Python and done here, one after the other; XLA's part runs
    in threads. `jax.jit` finds the results when the plan is run.

    Arguments:
        shapes: those of the plan's inputs, by slot.
        threads: at most so many; default one for each core.
        progress: called from this thread, first with 0.

    Returns:
        For each instruction that is a run its compiled program. Equal programs are one.
    """
    # Lowering is one after the other: it is Python, which threads do not speed up, and
    # it reads settings of JAX that belong to this thread (`jax.enable_x64`, the matmul
    # precision). The part in threads is XLA's, which releases the GIL.
    key_of: dict[int, ProgramKey] = {}
    lowered: dict[ProgramKey, Any] = {}
    names: dict[ProgramKey, str] = {}
    futures: dict[ProgramKey, concurrent.futures.Future[Any]] = {}
    compiled: dict[ProgramKey, Any] = {}

    def results_of(key: ProgramKey) -> Sequence[Sharding]:
        try:
            return futures[key].result().output_shardings
        except Exception as error:
            add_note(error, f"while compiling {names[key]}")
            raise

    with concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        try:
            for run in traced_runs(plan, shapes, results_of):
                if not run.key.placement.is_here:
                    continue
                key_of[run.number] = run.key
                if run.key in lowered:
                    continue
                traced = run.traced
                if any(map(on_host, run.key.shapes)):
                    traced = run.call.trace(*map(as_argument, run.key.shapes))
                lowered[run.key] = traced.lower()
                names[run.key] = run.name
                # How its results lie is known when it is compiled, and programs that
                # read them are lowered for that.
                if run.free:
                    futures[run.key] = pool.submit(lowered[run.key].compile)
            # Results are taken as they come, not in order, so that progress is seen
            # although a large stage takes long.
            if progress is not None:
                progress(0, len(lowered))
            for key, program in lowered.items():
                if key not in futures:
                    futures[key] = pool.submit(program.compile)
            key_for = {future: key for key, future in futures.items()}
            for future in concurrent.futures.as_completed(key_for):
                key = key_for[future]
                try:
                    compiled[key] = future.result()
                except Exception as error:
                    add_note(error, f"while compiling {names[key]}")
                    raise
                if progress is not None:
                    progress(len(compiled), len(lowered))
        except BaseException:
            # Ctrl-C too: what has not begun is not compiled.
            pool.shutdown(cancel_futures=True)
            raise
    return {number: compiled[key] for number, key in key_of.items()}


def slot_shapes(
    plan: Plan, shapes: Mapping[int, jax.ShapeDtypeStruct]
) -> dict[int, jax.ShapeDtypeStruct]:
    """The shapes of what is in all slots of a plan, from those of its inputs."""
    found = dict(shapes)
    made = {run.number: run.made for run in traced_runs(plan, shapes)}
    for number, item in enumerate(plan.instructions):
        if isinstance(item, Move):
            for n, (here, there) in enumerate(
                zip(item.sources, item.outs, strict=True)
            ):
                found[there] = item.shape(n, found[here])
        elif isinstance(item, Copy):
            found.update(
                zip(item.outs, [found[slot] for slot in item.ins], strict=True)
            )
        elif not isinstance(item, Free):
            found.update(zip(item.outs, made[number], strict=True))
    return found


class ProgramKey(NamedTuple):
    """What tells the programs of a plan apart: the function, where it runs, and on
    what.

    The placement is in it because JAX compiles the same function anew for another
    device. The function is its `id`: equal stages share one function, although their
    runs have names of their own.
    """

    function: int
    placement: Placement
    shapes: tuple[jax.ShapeDtypeStruct, ...]


class TracedRun(NamedTuple):
    """A run of a plan, traced and not compiled.

    Attributes:
        number: of its instruction.
        key: runs with equal keys share a program.
        call: the function under `jax.jit`.
        traced: what its `trace` returns.
        made: the shapes of its results, those on the host with their sharding.
        name: for errors.
        free: whether XLA decides how some of its results lie.
    """

    number: int
    key: ProgramKey
    call: Any
    traced: Any
    made: tuple[jax.ShapeDtypeStruct, ...]
    name: str
    free: bool


def traced_runs(
    plan: Plan,
    shapes: Mapping[int, jax.ShapeDtypeStruct],
    results_of: Callable[[ProgramKey], Sequence[Sharding]] | None = None,
) -> Iterator[TracedRun]:
    """The runs of a plan in order, each traced on the shapes of what its slots hold.

    The plan itself has no shapes: they follow from those of its inputs. Compiling,
    memory and predictions all take them from here.

    Arguments:
        shapes: those of the plan's inputs, by slot.
        results_of: how those results of a program lie for which XLA decides. It is
            called after the program was yielded. Default the plan's guess.
    """

    # The very arguments that a call will have, weak types too. If they differed in
    # anything, `jit` would compile once more in the first step.
    def placed(
        shape: jax.ShapeDtypeStruct, slot: int, host: bool = False
    ) -> jax.ShapeDtypeStruct:
        sharding = plan.sharding(slot)
        return jax.ShapeDtypeStruct(
            shape.shape,
            shape.dtype,
            sharding=sharding.with_memory_kind("pinned_host") if host else sharding,
            weak_type=shape.weak_type,
        )

    # Slots are followed as when the plan runs, with shapes in place of arrays.
    held = {slot: placed(shape, slot) for slot, shape in shapes.items()}
    # Of what XLA decides: the program that makes it, and the number of the result.
    makers: dict[int, tuple[ProgramKey, int]] = {}

    def argument(slot: int) -> jax.ShapeDtypeStruct:
        # Of a program that another process compiles the guess has to do.
        if results_of is not None and slot in makers:
            key, n = makers.pop(slot)
            if not key.placement.is_here:
                return held[slot]
            held[slot] = held[slot].update(sharding=results_of(key)[n])
        return held[slot]

    # What a trace takes for those on the host: the types that their program gave them.
    types: dict[int, Any] = {}
    traces: dict[ProgramKey, Any] = {}
    for number, item in enumerate(plan.instructions):
        if isinstance(item, Free):
            for slot in item.slots:
                held.pop(slot, None)
                types.pop(slot, None)
            continue
        if isinstance(item, Move):
            # Nothing on the host is sent: what crosses stages is on devices.
            for n, (source, target) in enumerate(
                zip(item.sources, item.outs, strict=True)
            ):
                held[target] = placed(item.shape(n, held[source]), target)
            continue
        if isinstance(item, Copy):
            for source, target in zip(item.ins, item.outs, strict=True):
                shape = argument(source)
                held[target] = shape.update(sharding=item.lies(shape.sharding))
            continue
        call: Any = item.call
        args = tuple(argument(slot) for slot in item.ins)
        key = ProgramKey(id(call), item.placement, args)
        if key not in traces:
            traces[key] = call.trace(
                *(types.get(slot, held[slot]) for slot in item.ins)
            )
        # The results of a trace do not say where they are, but their values do.
        moved = item.on_host
        for n, (slot, shape) in enumerate(
            zip(item.outs, traces[key].out_info, strict=True)
        ):
            held[slot] = placed(shape, slot, n in moved)
            if n in moved:
                types[slot] = moved[n]
            if slot in plan.free:
                makers[slot] = key, n
        made = tuple(held[slot] for slot in item.outs)
        name = f"{item.name} for {item.placement}"
        free = not plan.free.isdisjoint(item.outs)
        yield TracedRun(number, key, call, traces[key], made, name, free)
