"""The threads that XLA's CPU client runs programs and sends arrays with.

In: the environment, before JAX starts. Out: enough threads for processes that have
stages in common, or an error that says so; and how they share a core. With two
processes of one core each:

    devices of a process    threads by default    threads that are enough
    1                       1                     4
    2                       2                     7

More threads than cores cost time, because XLA divides a large operation among all of
them. Stages of small transformer blocks took a third to a half longer on one core with
seven threads than with one (measured on jax 0.10.2).
"""

import contextlib
import os
import re
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Sharding

from fpipe._core.processes import is_shared

# If the first is not set XLA looks at the second, and if neither is, at the cores.
_SETTINGS = "PJRT_NPROC", "NPROC"


def ensure_enough() -> None:
    """Let XLA have enough threads, if the user has not said how many."""
    if _set_by_user() is None and _by_default() < _enough(_devices()):
        os.environ[_SETTINGS[0]] = str(_enough(_devices()))


def run_without_preemption() -> None:
    """A thread of this process that wakes up waits until another one of its core waits,
    or has had its turn. For this thread, and for the threads and processes that it
    starts from now on.

    The thread of gloo that has woken up asks for news of a connection again and again
    while another thread holds its lock. If it has taken the core from that thread, it
    does so for the whole of its turn: a fifth of a step of small stages, with one core
    for a process (measured on jax 0.10.2).

    Nothing is done on systems without such a policy, or if the user has chosen one.
    """
    with contextlib.suppress(AttributeError, OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def check_enough(shardings: Iterable[Sharding]) -> None:
    """There are enough threads for stages with such shardings.

    Raises:
        ValueError: there are not.
    """
    if not any(is_shared(each) and _is_of_cpus(each) for each in shardings):
        return
    devices = jax.local_device_count("cpu")
    threads = max(_set_by_user() or _by_default(), devices)
    if threads < _enough(devices):
        raise ValueError(
            "a stage has CPU devices of several processes, and XLA has fewer than "
            f"{_enough(devices)} threads for the devices of this one: it could wait "
            "for another process for ever. Call `fpipe.distributed.initialize` instead "
            "of `jax.distributed.initialize`, or set the environment variable "
            f"PJRT_NPROC to {_enough(devices)} or more before JAX starts"
        )


def _enough(devices: int) -> int:
    """How many threads so many devices of a process need to never wait for one.

    A program whose devices are in several processes holds a thread until the others
    have run it too, and to send an array takes a thread as well. Two devices, two
    threads:

        process 0                                 process 1
        a thread runs P on cpu:0, waits for P     P waits for an array of cpu:1
        a thread runs Q on cpu:1, waits for Q     Q waits for an array of cpu:0
        no thread is left to send the arrays

    Three threads may wait for each device: for a program of it, for one of several
    devices of the process, and for the next of these, which is dispatched there. One
    more sends. (Found with a debugger on jax 0.10.2.)
    """
    return 3 * devices + 1


def _set_by_user() -> int | None:
    found = (os.environ.get(name, "") for name in _SETTINGS)
    return next((int(number) for number in found if number.isdigit()), None)


def _by_default() -> int:
    """As many threads as XLA has if nobody says how many, for one device."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _devices() -> int:
    """How many CPU devices this process will have, when JAX starts."""
    settings: Any = jax.config
    if settings.jax_num_cpu_devices > 0:
        return int(settings.jax_num_cpu_devices)
    flag = r"--xla_force_host_platform_device_count=(\d+)"
    flags = re.findall(flag, os.environ.get("XLA_FLAGS", ""))
    return int(flags[-1]) if flags else 1


def _is_of_cpus(sharding: Sharding) -> bool:
    return next(iter(sharding.device_set)).platform == "cpu"
