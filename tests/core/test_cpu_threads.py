"""The threads of XLA's CPU client."""

import os
import threading
import types

import jax
import pytest

from fpipe._core import cpu_threads


@pytest.fixture
def machine(monkeypatch):
    """A function that says how many cores and devices this process has."""
    for name in ("PJRT_NPROC", "NPROC"):
        monkeypatch.setenv(name, "")  # and what the code sets is taken back
        monkeypatch.delenv(name)

    def has(cores, devices, **settings):
        monkeypatch.setattr(cpu_threads, "_by_default", lambda: cores)
        monkeypatch.setattr(cpu_threads, "_devices", lambda: devices)
        monkeypatch.setattr(jax, "local_device_count", lambda kind: devices)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)

    return has


@pytest.mark.parametrize(
    ("cores", "devices", "settings", "threads"),
    [
        (1, 1, {}, "4"),
        (1, 2, {}, "7"),
        (3, 1, {}, "4"),
        (4, 1, {}, None),
        (16, 4, {}, None),
        (16, 8, {}, "25"),
        (1, 2, {"PJRT_NPROC": "1"}, "1"),
        (1, 2, {"NPROC": "3"}, None),
        (1, 2, {"PJRT_NPROC": "many"}, "7"),
    ],
)
def test_there_are_enough_unless_the_user_says_how_many(
    machine, cores, devices, settings, threads
):
    machine(cores, devices, **settings)
    cpu_threads.ensure_enough()
    assert os.environ.get("PJRT_NPROC") == threads


@pytest.mark.parametrize(
    ("setting", "flags", "devices"), [(6, "", 6), (-1, "2 {}5", 5), (-1, "", 1)]
)
def test_devices_are_counted_before_jax_starts(monkeypatch, setting, flags, devices):
    config = types.SimpleNamespace(jax_num_cpu_devices=setting)
    monkeypatch.setattr(cpu_threads, "jax", types.SimpleNamespace(config=config))
    flag = "--xla_force_host_platform_device_count="
    monkeypatch.setenv("XLA_FLAGS", flags and flag + flags.format(flag))
    assert cpu_threads._devices() == devices


def policies(first):
    """The policies of a thread that begins with one, after it does not want to be
    preempted, and of one that it starts then.
    """
    found = []

    def look():
        found.append(os.sched_getscheduler(0))

    def work():
        os.sched_setscheduler(0, first, os.sched_param(0))
        cpu_threads.run_without_preemption()
        look()
        other = threading.Thread(target=look)
        other.start()
        other.join()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found


def test_a_thread_that_wakes_up_waits_for_the_one_that_runs(monkeypatch):
    own = os.sched_getscheduler(0)
    assert policies(os.SCHED_OTHER) == [os.SCHED_BATCH] * 2
    # What a user has chosen stays, and other threads are as they were.
    assert policies(os.SCHED_IDLE) == [os.SCHED_IDLE] * 2
    assert os.sched_getscheduler(0) == own
    monkeypatch.delattr(os, "sched_getscheduler")
    cpu_threads.run_without_preemption()  # another system


def test_stages_in_several_processes_need_enough(machine, monkeypatch):
    shardings = [jax.sharding.SingleDeviceSharding(jax.devices()[0])]
    machine(1, 2)
    cpu_threads.check_enough(shardings)  # none is in several processes
    monkeypatch.setattr(cpu_threads, "is_shared", lambda sharding: True)
    with pytest.raises(ValueError, match="a stage has CPU devices of") as caught:
        cpu_threads.check_enough(shardings)
    assert str(caught.value) == (
        "a stage has CPU devices of several processes, and XLA has fewer than 7 "
        "threads for the devices of this one: it could wait for another process for "
        "ever. Call `fpipe.distributed.initialize` instead of "
        "`jax.distributed.initialize`, or set the environment variable PJRT_NPROC to 7 "
        "or more before JAX starts"
    )
    for cores, settings in [(1, {"PJRT_NPROC": "7"}), (7, {})]:
        machine(cores, 2, **settings)
        cpu_threads.check_enough(shardings)
    machine(16, 2, PJRT_NPROC="6")
    with pytest.raises(ValueError, match="fewer than 7 threads"):
        cpu_threads.check_enough(shardings)
