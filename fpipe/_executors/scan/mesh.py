"""The mesh of the scan executor: which devices it has, and what lies on it.

A mesh has an axis `"stage"`, whose places hold the stages, and perhaps others. With a
data axis of two and four places, place `d` has two devices, between which the rows of
each microbatch are shared:

    "stage"        0        1        2        3
    "data" 0     cuda:0   cuda:1   cuda:2   cuda:3
    "data" 1     cuda:4   cuda:5   cuda:6   cuda:7
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fpipe._core.meshes import AnyMesh, is_explicit, to_device
from fpipe._core.pytrees import Tracer
from fpipe._executors.stage_places import AXIS
from fpipe._model.specs import WHOLE
from fpipe.schedules._checks import counted


def as_mesh(devices: Sequence[Any], mesh: Mesh | None, stages: int) -> Mesh:
    """The mesh that a pipe runs on: the user's, or one of the devices that its schedule
    uses.
    """
    if mesh is None:
        if len(set(devices)) < len(devices):
            raise ValueError(
                '`Pipe(executor="scan", devices=...)`: a mesh has each device once, '
                f"got {list(devices)}; to put several "
                "stages on a device take a schedule that does, such as "
                '"interleaved_1f1b"'
            )
        return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
    check_size(mesh, len(devices), stages)
    return mesh


def check_size(mesh: Mesh, places: int, stages: int) -> None:
    """The schedule uses all places of a mesh.

    Raises:
        ValueError: it does not.
    """
    if mesh.shape[AXIS] != places:
        raise ValueError(
            f"`Pipe(mesh=...)`: the mesh has {counted(mesh.shape[AXIS], 'place')} on "
            f"its axis {AXIS!r}, but the schedule puts {counted(stages, 'stage')} on "
            f"{counted(places, 'device')}; give `balance` as many entries as the mesh "
            f"needs, or a mesh of {places}"
        )


def waits_for_all(mesh: Mesh) -> bool:
    """Whether devices of one stage that exchange parts of an array wait for those of
    other stages, see `exchanges.py`.
    """
    on_cpus = mesh.devices.flat[0].platform == "cpu"
    return on_cpus and 1 < mesh.shape[AXIS] < mesh.size


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device."""
    return NamedSharding(mesh, P())


def by_stage(mesh: AnyMesh, spec: P = WHOLE) -> NamedSharding:
    """The first axis over the places of the stages, and the others as a spec cuts
    them.
    """
    # On a mesh of one place JAX returns `P()` for what went in as `P("stage")`. The two
    # mean the same there but are different to `jit`: the parameters that a step returns
    # would compile the next step again.
    first = AXIS if mesh.shape[AXIS] > 1 else None
    return NamedSharding(mesh, P(first, *spec) if first or spec else P())


def on_device(a: Any, device: Any) -> Any:
    """An array on a device of this process. Of an array that is whole on several
    processes its own copy is taken, and what is traced lies where the program has it.
    """
    if isinstance(a, Tracer):
        return a
    if (
        isinstance(a, jax.Array)
        and a.is_fully_replicated
        and not a.is_fully_addressable
    ):
        a = a.addressable_data(0)
    return to_device([a], device)[0]


def on_mesh(
    arrays: Sequence[Any], mesh: Mesh, sharding: Callable[[Any], NamedSharding]
) -> list[Any]:
    """Arrays where the program finds them: those of other devices are copied to the
    mesh. Shapes will do.

    An array that lies on all devices of the mesh stays as it lies, however it is
    sharded: the user may have put it so, and the program takes it. But a sharding over
    explicit axes is part of a type, and goes.

    Arguments:
        sharding: how such an array is to lie.
    """
    devices = set(mesh.devices.flat)

    def put(a: Any) -> Any:
        there = isinstance(a, jax.Array) and not isinstance(a, Tracer)
        if isinstance(a, Tracer) or (there and a.sharding.device_set == devices):
            return jax.device_put(a, sharding(a)) if is_explicit(a) else a
        if isinstance(a, jax.ShapeDtypeStruct):
            if a.sharding is not None:
                return a
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding(a))
        if mesh.is_multi_process and isinstance(a, jax.Array):
            # `device_put` takes no array of one process to devices of several, but
            # takes the same numbers on each.
            if jax.numpy.issubdtype(a.dtype, jax.dtypes.prng_key):
                # Inside a trace a key from outside of it still has its numbers, but JAX
                # would trace `key_data` of it.
                with jax.ensure_compile_time_eval():
                    data = np.asarray(jax.random.key_data(a))
                data = jax.device_put(data, replicated(mesh))
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(a))
            a = np.asarray(a)
        return jax.device_put(a, sharding(a))

    return [put(a) for a in arrays]
