"""Compiling ahead: every program of a plan, before it runs, several at once."""

import concurrent.futures
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax

from fpipe._core.errors import add_note
from fpipe._executors.placed.instructions import Free, Move, Plan
from fpipe._executors.placement import Placement

# How many programs are compiled, of how many.
Progress: TypeAlias = Callable[[int, int], None]


def as_progress(progress: bool | Progress | None) -> Progress | None:
    """What `Pipe.compile(progress=...)` was given."""
    if progress is None:
        progress = sys.stderr.isatty()
    return (_bar if progress else None) if isinstance(progress, bool) else progress


def _bar(done: int, total: int) -> None:
    full = 30 * done // max(total, 1)
    end = "\n" if done == total else ""
    print(
        f"\rcompiling [{'#' * full}{'.' * (30 - full)}] {done}/{total}",
        end=end,
        file=sys.stderr,
        flush=True,
    )


def compile_plan(
    plan: Plan,
    given: Mapping[int, jax.ShapeDtypeStruct],
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[int, Any]:
    """Compile what a plan runs.

    Tracing and lowering are Python and done here, one after the other; XLA's part runs
    in threads. `jax.jit` finds the results when the plan is run.

    Arguments:
        given: the shapes of the plan's inputs, by slot.
        threads: at most so many; default one for each core.
        progress: called from this thread, first with 0.

    Returns:
        For each instruction that is a run its compiled program. Equal programs are one.
    """
    lowered: dict[Any, tuple[Any, str]] = {}
    keys = dict[int, Any]()
    for n, key, traced, name in runs(plan, given):
        keys[n] = key
        if key not in lowered:
            lowered[key] = traced.lower(), name
    done: dict[Any, Any] = {}
    workers = min(threads or os.cpu_count() or 1, len(lowered))
    if progress is not None:
        progress(0, len(lowered))
    with concurrent.futures.ThreadPoolExecutor(max(workers, 1)) as pool:
        futures = {
            pool.submit(program.compile): (key, name)
            for key, (program, name) in lowered.items()
        }
        try:
            for future in concurrent.futures.as_completed(futures):
                key, name = futures[future]
                try:
                    done[key] = future.result()
                except Exception as error:
                    add_note(error, f"while compiling {name}")
                    raise
                if progress is not None:
                    progress(len(done), len(lowered))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {n: done[key] for n, key in keys.items()}


def runs(
    plan: Plan, given: Mapping[int, jax.ShapeDtypeStruct]
) -> Iterator[tuple[int, Any, Any, str]]:
    """For each run its number, what tells it from others, its trace, and a name for it.
    Nothing is compiled.
    """
    shapes = {n: _at(a, plan.slots[n].placement) for n, a in given.items()}
    results: dict[Any, Any] = {}
    for n, item in enumerate(plan.instructions):
        if isinstance(item, Free):
            for slot in item.slots:
                shapes.pop(slot, None)
        elif isinstance(item, Move):
            shapes |= {
                out: _at(shapes[k], item.placement)
                for k, out in zip(item.ins, item.outs, strict=True)
            }
        else:
            call: Any = item.call
            args = tuple(shapes[k] for k in item.ins)
            key = (id(call), item.placement, args)
            if key not in results:
                results[key] = call.trace(*args)
            traced = results[key]
            yield n, key, traced, f"{item.name} for {item.placement.device}"
            shapes |= {
                k: _at(a, item.placement)
                for k, a in zip(item.outs, traced.out_info, strict=True)
            }


def _at(a: jax.ShapeDtypeStruct, placement: Placement) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        a.shape, a.dtype, sharding=placement.sharding, weak_type=a.weak_type
    )
