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
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from fpipe._core.errors import add_note
from fpipe._executors.placed.instructions import Free, Move, Plan
from fpipe._executors.placement import Placement
from fpipe._executors.progress import Progress


def compile_plan(
    plan: Plan,
    shapes: Mapping[int, jax.ShapeDtypeStruct],
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[int, Any]:
    """Compile what a plan runs.

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
    for run in traced_runs(plan, shapes):
        key_of[run.number] = run.key
        if run.key not in lowered:
            lowered[run.key] = run.traced.lower()
            names[run.key] = run.name
    # Results are taken as they come, not in order, so that progress is seen although a
    # large stage takes long.
    compiled: dict[ProgramKey, Any] = {}
    workers = min(threads or os.cpu_count() or 1, len(lowered))
    if progress is not None:
        progress(0, len(lowered))
    with concurrent.futures.ThreadPoolExecutor(max(workers, 1)) as pool:
        futures = {
            pool.submit(program.compile): key for key, program in lowered.items()
        }
        try:
            for future in concurrent.futures.as_completed(futures):
                key = futures[future]
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
        traced: what `jax.jit(f).trace(...)` returns.
        name: for errors.
    """

    number: int
    key: ProgramKey
    traced: Any
    name: str


def traced_runs(
    plan: Plan, shapes: Mapping[int, jax.ShapeDtypeStruct]
) -> Iterator[TracedRun]:
    """The runs of a plan in order, each traced on the shapes of what its slots hold.

    The plan itself has no shapes: they follow from those of its inputs. Compiling,
    memory and predictions all take them from here.

    Arguments:
        shapes: those of the plan's inputs, by slot.
    """

    # The very arguments that a call will have, weak types too. If they differed in
    # anything, `jit` would compile once more in the first step.
    def placed(shape: jax.ShapeDtypeStruct, slot: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            shape.shape,
            shape.dtype,
            sharding=plan.slots[slot].placement.sharding,
            weak_type=shape.weak_type,
        )

    # Slots are followed as when the plan runs, with shapes in place of arrays.
    held = {slot: placed(shape, slot) for slot, shape in shapes.items()}
    traces: dict[ProgramKey, Any] = {}
    for number, item in enumerate(plan.instructions):
        if isinstance(item, Free):
            for slot in item.slots:
                held.pop(slot, None)
            continue
        if isinstance(item, Move):
            made = [held[slot] for slot in item.ins]
        else:
            call: Any = item.call
            args = tuple(held[slot] for slot in item.ins)
            key = ProgramKey(id(call), item.placement, args)
            if key not in traces:
                traces[key] = call.trace(*args)
            made = traces[key].out_info
            name = f"{item.name} for {item.placement}"
            yield TracedRun(number, key, traces[key], name)
        for slot, shape in zip(item.outs, made, strict=True):
            held[slot] = placed(shape, slot)
