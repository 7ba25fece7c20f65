"""Forks of a process that has used JAX, which cannot use it.

In: the number of the process that asks, each time that a pipe is used. Out: nothing, or
an error in place of a call that would wait for ever:

    process 100   Pipe(...)       remembered: JAX has threads there
    fork 101      pipe(params, x) RuntimeError
"""

import os

# The process that made the first pipe, whose devices started JAX. One for all pipes: a
# pipe that a fork makes anew has no more threads of JAX than an inherited one.
_first: list[int] = []


def check_process() -> None:
    """Refuse to work in a fork; it costs 0.3 µs."""
    process = os.getpid()
    if not _first:
        _first.append(process)
    if _first[0] != process:
        raise RuntimeError(
            f"a Pipe is used in process {process}, a fork of process {_first[0]} which "
            "used JAX before: JAX's threads are not in a fork, so a call would wait "
            'for ever. Start processes with `multiprocessing.get_context("spawn")`, or '
            "fork before JAX is used"
        )
