"""Joining the processes of one pipeline.

In: what `jax.distributed.initialize` takes. Out: JAX joined to the other processes, and
set up so that arrays can go from one to another:

    import fpipe.distributed

    fpipe.distributed.initialize("10.0.0.1:5700", num_processes=2, process_id=0)
    jax.devices()          those of both processes, in the same order in both

Between GPUs JAX needs nothing else. Between CPUs its collectives are gloo's, and a
transfer needs a port in each process that the others can reach.
"""

import atexit
import math
import os
import sys
import threading
import traceback
from types import TracebackType
from typing import Any, TypeVar

import jax

from fpipe._core import cpu_threads, heap, watchdog
from fpipe._core.addresses import free_address
from fpipe._core.checks import is_number
from fpipe._core.errors import PREFIX, shown
from fpipe._core.processes import arrive, greet
from fpipe._core.pytrees import PyTree, is_traced, pack
from fpipe._core.settings import explicit_transfers
from fpipe._executors.scan.packing import Packed
from fpipe._executors.transfers import evenly, spread_evenly
from fpipe._split.stacks import RowBlocks, joined

_ADDRESS = "FPIPE_TRANSFER_ADDRESS"

# The seconds that a process which has raised waits for the others, to tell them.
_PATIENCE = 30.0


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float | None = 300.0,
    transfer_address: str | None = None,
    **options: Any,
) -> None:
    """Join the other processes: `jax.distributed.initialize`, and what a pipe needs.

    Call it before anything uses a device, and after `jax_num_cpu_devices` is set.
    Besides joining, it does seven things:

    - It makes CPUs use gloo for collectives.
    - It gives this process an address for transfers between CPUs.
    - It lets XLA have enough threads for the work of CPU devices: three for each device
      and one more. With fewer, processes with stages in common may wait for each other
      for ever. It sets the environment variable `PJRT_NPROC`, if you have not set it
      and the process has fewer cores.
    - It lets glibc keep the memory of freed arrays for new ones, if JAX is told that
      there are CPUs alone (`JAX_PLATFORMS=cpu`) and you have set nothing of glibc's
      memory (`MALLOC_...`, `GLIBC_TUNABLES`) in the environment. The process then keeps
      the most memory that it has ever used.
    - It gives this thread the policy `SCHED_BATCH` of Linux, if JAX is told that there
      are CPUs alone, and the thread has the usual policy: a thread that wakes up does
      not take the core from another one of this process. Threads and processes that
      this thread starts have it too.
    - It starts a watchdog, which ends this process if another process does not send
      what a placed pipe waits for, or what `watched` is told of.
    - If the script raises an exception, it ends this process. An ordinary exit would
      wait for the others, which wait for this process. If they have not met yet, it
      first tells them what it has raised, and waits for them for up to 30 s.

    Arguments:
        coordinator_address: `"host:port"` of process 0. Default: JAX finds it, for
            example under Slurm.
        num_processes: the number of processes. Default: JAX finds it.
        process_id: the number of this process, from 0. Default: JAX finds it.

    Other Arguments:
        timeout: the seconds that this process waits for another one before the watchdog
            ends it. Default 300. The wait includes all that the other process does
            before its next call, such as compiling or writing a checkpoint. `None`: no
            watchdog.
        transfer_address: `"host:port"` at which other processes reach this one, for
            transfers between CPUs. Default: the environment variable
            `FPIPE_TRANSFER_ADDRESS`. If that is not set: a free port of the address
            from which this machine reaches the coordinator, or, if JAX has found the
            coordinator, of the address that this machine's name has.
        options: further arguments of `jax.distributed.initialize`, such as
            `heartbeat_timeout_seconds`.

    Raises:
        TypeError, ValueError: `timeout` or `transfer_address` is wrong.
        RuntimeError: JAX has been used before.
    """
    if timeout is not None and not (is_number(timeout) and timeout > 0):
        raise ValueError(
            f"`distributed.initialize(timeout={shown(timeout)})`: seconds, more than "
            "0, or None for no watchdog"
        )
    given = transfer_address or os.environ.get(_ADDRESS)
    address = None if given is None else _checked(given)
    settings: Any = jax.config
    if settings.jax_platforms == "cpu":
        # Before there are the threads of `jax.distributed`.
        heap.keep_freed()
        cpu_threads.run_without_preemption()
    jax.distributed.initialize(
        coordinator_address, num_processes, process_id, **options
    )
    # Not before: a cluster may know the coordinator's name only when it is there.
    if address is None:
        address = free_address(
            coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX publishes what is configured here, so a port of 0 would be found by nobody.
    jax.config.update("jax_cross_host_transfer_socket_address", address)
    cpu_threads.ensure_enough()
    host = address.rpartition(":")[0]
    jax.config.update("jax_cross_host_transport_addresses", ",".join([f"{host}:0"] * 4))
    watchdog.start(math.inf if timeout is None else float(timeout))
    sys.excepthook = _end
    # Before JAX's own: what is registered last is called first.
    atexit.register(shutdown)


_T = TypeVar("_T")


def watched(tree: _T, what: str = "the results of a step") -> _T:
    """Tell the watchdog of arrays that other processes have a part in.

    A placed pipe tells it of all that it waits for. The programs of a scan pipe are
    the script's own, so the script tells it, once a step:

        loss = fpipe.distributed.watched(loss, f"step {n}")

    The watchdog prints `what` and ends this process if the arrays do not come in time:
    within `timeout` seconds (see `initialize`) of this call, or of the arrays of the
    call before, whichever is later. `watched` itself does not wait. Without a watchdog
    nothing happens.

    Arguments:
        tree: what a program of all processes returns; the loss will do.
        what: the words that are printed.

    Returns:
        The same tree.

    Raises:
        TypeError: it was called inside `jax.jit`, where nothing runs yet.
    """
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    if is_traced(arrays):
        raise TypeError(
            "`fpipe.distributed.watched(tree)`: it was called inside `jax.jit` or "
            "another transformation, where there are no arrays yet; call it with what "
            "the program returns"
        )
    for array in arrays:
        watchdog.expect(array, lambda: what)
    return tree


def spread(tree: PyTree) -> PyTree:
    """The arrays of a placed pipe, each over all devices of all processes.

    It is for checkpoints of a model that is too large to be gathered. A library that
    saves arrays over several processes, such as orbax, then has every process write
    its parts. Such a library refuses arrays that lie as in a placed pipe. All processes
    call `spread`. No device holds a whole array, unless no axis of it can be divided.

    `pipe.place` and `fpipe.optim.place` take such arrays, of any number of processes.

    Arguments:
        tree: parameters, states or gradients of a placed pipe, or a state of
            `per_stage`.

    Returns:
        The same tree, with whole leaves in place of `fpipe.RowBlocks`. An array is cut
        along its longest axis that the number of devices divides, and is whole on each
        device if there is none.

    Raises:
        TypeError: an `fpipe.Packed` is given, or it was called inside `jax.jit`.
    """
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Packed))
    if is_traced(tree) or any(isinstance(node, Packed) for node in nodes):
        raise TypeError(
            "`fpipe.distributed.spread(tree)`: it is for arrays of a placed pipe, "
            "outside of `jax.jit`. An `fpipe.Packed` lies over all devices already; "
            "save it as it is, or save `pipe.gather(params)`"
        )
    arrays, spec = pack(tree)
    with explicit_transfers():
        made = spread_evenly(arrays)
        if jax.process_count() > 1:
            arrive(made, lambda: "all processes to have what is spread")
        return joined(spec.unpack(made), _whole)


def _whole(blocks: RowBlocks) -> Any:
    """A stacked leaf, whose blocks lie over all devices, as one array that does too."""
    if not all(isinstance(block, jax.Array) for block in blocks.blocks):
        return blocks.join()
    return jax.jit(RowBlocks.join, out_shardings=evenly(blocks.shape))(blocks)


def shutdown() -> None:
    """Leave the other processes. Every process calls it, at the end of the script.

    It waits until all transfers between the processes have arrived. Then it calls
    `jax.distributed.shutdown`. That function alone would not wait for a transfer, and
    the exit of a process would hang. An ordinary exit of Python calls `shutdown` too.
    """
    if not jax.distributed.is_initialized():
        return
    arrive((), lambda: "all processes to reach the end of the script")
    jax.distributed.shutdown()


def _checked(address: Any) -> str:
    """An address that a user gives."""
    host, colon, port = str(address).rpartition(":")
    if not (isinstance(address, str) and host and colon and port.isdigit()):
        raise ValueError(
            f"`distributed.initialize(transfer_address={shown(address)})`: an address "
            'such as "10.0.0.2:5701" is needed'
        )
    if int(port) == 0:
        raise ValueError(
            f"`distributed.initialize(transfer_address={shown(address)})`: the others "
            "are told this port, so it cannot be 0"
        )
    return address


def _end(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    """Show an exception that nobody caught, and end the process.

    At an ordinary exit JAX waits for the other processes, and these wait for this one
    in the middle of a step.
    """
    traceback.print_exception(kind, error, where)
    sys.stdout.flush()
    sys.stderr.flush()
    if issubclass(kind, KeyboardInterrupt):
        os._exit(130)
    # In a thread of its own, which the process does not wait for longer: the others may
    # be anywhere.
    notes = [n for n in getattr(error, "__notes__", ()) if n.startswith(PREFIX)]
    text = ", ".join([f"{kind.__name__}: {error}", *notes])
    telling = threading.Thread(target=greet, args=(text,), daemon=True)
    telling.start()
    telling.join(min(_PATIENCE, watchdog.timeout()))
    os._exit(1)
