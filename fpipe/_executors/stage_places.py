"""Where the stages of a pipe may live, and the context in which they are traced.

In: arguments of `Pipe`, for example `executor="placed", devices=jax.devices()[:2]`, or
`mesh=` with an axis of stages. Out: a placement for each device of the schedule, and
the axes over which rows are shared:

    (Placement(cpu:0), Placement(cpu:1)), ()
    (Placement(data=2 (cpu:0, cpu:1)), Placement(data=2 (cpu:2, cpu:3))), ("data",)

A mesh means another thing to each executor: the placed one has a mesh of the other axes
for each stage, the scan one runs one program over the whole mesh.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from fpipe._core.errors import shown
from fpipe._core.meshes import no_mesh
from fpipe._executors.placement import (
    Place,
    Placement,
    as_data_axes,
    as_placements,
    as_places,
    refuse_explicit,
    sub_meshes,
)

# The axis of a mesh whose places hold the stages.
AXIS = "stage"


def stage_placements(
    executor: str,
    devices: Iterable[Place] | None,
    mesh: Mesh | None,
    data_axes: Sequence[str] | None,
) -> tuple[tuple[Placement, ...], tuple[str, ...]]:
    """Where stages may live, and the axes over which rows are shared there, from
    arguments of `Pipe`.

    Raises:
        TypeError, ValueError: no such places or axes.
    """
    places = as_places(devices) if mesh is None else None
    if places is None:
        places = stage_places(mesh, devices, executor)
    elif executor == "scan" and any(isinstance(place, Mesh) for place in places):
        raise ValueError(
            '`Pipe(executor="scan", devices=...)`: several devices for each stage '
            'are given as one mesh with an axis "stage", `mesh=`'
        )
    axes = as_data_axes(data_axes, places if mesh is None else [mesh])
    return as_placements(places, axes), axes


def stage_tracing(
    executor: str, placements: Sequence[Placement], mesh: Mesh | None
) -> AbstractContextManager[Any]:
    """The context of JAX in which the stages of a pipe are traced."""
    if executor == "scan" and mesh is not None:
        return stage_context(mesh)
    return placements[0].tracing()


def stage_places(mesh: Any, devices: Any, executor: str) -> list[Any]:
    """What a pipe has for each place on the mesh's axis of stages: for the scan
    executor its first device, for the placed one the mesh of the other axes.

    Arguments:
        mesh: the user's, checked here.
        devices: what else the user gave.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"`Pipe(mesh={shown(mesh)})`: a jax.sharding.Mesh, such as "
            "`jax.make_mesh((4,), "
            f"({AXIS!r},))`"
        )
    if AXIS not in mesh.axis_names:
        auto = f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}"
        raise ValueError(
            f"`Pipe(mesh=...)`: the mesh has the axes {mesh.axis_names}, and none is "
            f"called {AXIS!r}; make one with "
            f"`jax.make_mesh({tuple(mesh.shape.values())}, "
            f"{(*mesh.axis_names[:-1], AXIS)}, {auto})`"
        )
    refuse_explicit(mesh, "mesh=...")
    firsts = [column[0] for column in columns(mesh)]
    places = sub_meshes(mesh, AXIS)
    # Either, for `dataclasses.replace` may change the executor.
    if devices is not None and list(devices) not in (firsts, places):
        raise ValueError(
            "`Pipe(mesh=..., devices=...)`: the devices are those of the mesh; leave "
            "one of the two out"
        )
    return firsts if executor == "scan" else places


def columns(mesh: Mesh) -> list[list[Any]]:
    """The devices of each stage's place, one for each combination of the other axes."""
    # The axis "stage" may stand anywhere among the mesh's axes.
    moved = np.moveaxis(mesh.devices, mesh.axis_names.index(AXIS), 0)
    return [list(row) for row in moved.reshape(moved.shape[0], -1)]


def stage_context(mesh: Mesh) -> AbstractContextManager[Any]:
    """The context in which a stage is traced: that inside of the program's `shard_map`.

    So a layer may use the axes of its stage, as in
    `jax.lax.with_sharding_constraint(h, P("data"))`; that of the stages is taken.
    """
    # A stage on one device has no axes, and shares its traces with the other executor.
    if len(mesh.axis_names) == 1:
        return no_mesh()
    inside = mesh.abstract_mesh.update_axis_types({AXIS: AxisType.Manual})
    return jax.sharding.use_abstract_mesh(inside)
