"""The arguments of `Pipe` as checked values, and the cut that they lead to.

In: what a user gives to `Pipe`. Out: `PipeOptions`, which hold for any layers and
devices, and a `PipeCut`, which says what the stages are and where they live. For
`Pipe(layers, devices=jax.devices(), balance=[2, 3], chunks=8)`, with five layers and
eight devices:

    PipeOptions    chunks             8
                   executor           "placed"
                   …
    PipeCut        balance            (2, 3)            layers 0-1, layers 2-4
                   stage_to_device    (0, 1)            the schedule decides it
                   placements         the first two     as many as the schedule uses

Wrong values are refused here, at the user's line, and not in the first call.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from jax.sharding import Mesh

from fpipe._core.checks import as_bool, as_compute_dtype, is_one_of
from fpipe._core.errors import shown
from fpipe._core.meshes import set_aside
from fpipe._core.pytrees import PyTree
from fpipe._executors.added_actions import (
    Offload,
    Recompute,
    as_offload,
    as_recompute,
    with_actions,
)
from fpipe._executors.call import check_chunks
from fpipe._executors.placed.dispatch import DISPATCH, Dispatch
from fpipe._executors.placement import (
    UNSHARD,
    Device,
    Place,
    Placement,
    Unshard,
    first_placements,
    sub_meshes,
)
from fpipe._executors.scan.mesh import as_mesh, check_size
from fpipe._executors.scheduling import Scheduling
from fpipe._executors.stage_places import AXIS, stage_placements, stage_tracing
from fpipe._model.microbatch import cut_inputs
from fpipe._model.remat import Policy, Remat
from fpipe._planning.layer_costs import BalanceBy
from fpipe._planning.pipe_balance import PipeSetup, given_balance
from fpipe._split.user_trees import UserTrees
from fpipe.schedules import Schedule

EXECUTORS = ("placed", "scan")

AnySchedule: TypeAlias = str | Schedule | Callable[[int, int], Schedule]
"""What `Pipe(schedule=...)` takes."""


@dataclasses.dataclass(frozen=True)
class PipeOptions:
    """The options of a pipe that hold for any layers and devices, checked.

    Attributes:
        remat: what was given as `checkpoint`.
        schedule: as it was given.
    """

    chunks: int
    remat: Remat
    schedule: AnySchedule
    executor: str
    dispatch: Dispatch
    unshard: Unshard
    compute_dtype: Any
    deferred_batch_norm: bool
    detect_anomaly: bool
    recompute: Recompute
    offload: Offload

    @classmethod
    def checked(
        cls,
        *,
        chunks: Any,
        checkpoint: str | Policy,
        schedule: AnySchedule,
        executor: Any,
        dispatch: Any,
        unshard: Any,
        compute_dtype: Any,
        deferred_batch_norm: Any,
        detect_anomaly: Any,
        recompute: Any,
        offload: Any,
    ) -> "PipeOptions":
        """From the arguments of `Pipe`.

        Raises:
            TypeError, ValueError: one of them is wrong.
        """
        if not is_one_of(executor, EXECUTORS):
            raise ValueError(
                f'`Pipe(executor={shown(executor)})`: the executor is "placed" or '
                '"scan"'
            )
        if not is_one_of(dispatch, DISPATCH):
            raise ValueError(
                f"`Pipe(dispatch={shown(dispatch)})`: one of "
                f"{', '.join(map(repr, DISPATCH))}"
            )
        if not is_one_of(unshard, UNSHARD):
            raise ValueError(
                f"`Pipe(unshard={shown(unshard)})`: one of "
                f"{', '.join(map(repr, UNSHARD))}"
            )
        Scheduling.of(schedule)
        return cls(
            compute_dtype=as_compute_dtype("Pipe", compute_dtype),
            chunks=check_chunks("Pipe", chunks),
            deferred_batch_norm=as_bool(
                "Pipe", "deferred_batch_norm", deferred_batch_norm
            ),
            detect_anomaly=as_bool("Pipe", "detect_anomaly", detect_anomaly),
            recompute=as_recompute(recompute),
            offload=as_offload(offload),
            remat=Remat.of(checkpoint),
            schedule=schedule,
            executor=executor,
            dispatch=dispatch,
            unshard=unshard,
        )

    @property
    def scheduling(self) -> Scheduling:
        """What makes the schedules, with the actions that options add to them."""
        return with_actions(
            Scheduling.of(self.schedule),
            self.remat,
            self.recompute,
            self.offload,
            in_units=self.executor == "scan",
        )


@dataclasses.dataclass(frozen=True)
class PipeCut:
    """The stages of a pipe, and where they live.

    Attributes:
        balance: layers per stage.
        stage_to_device: for each stage the number of its device.
        placements: one for each device of the schedule.
        mesh: the mesh over all stages. The scan executor always has one.
        data_axes: the axes of a mesh that share out the rows of a microbatch.
    """

    balance: tuple[int, ...]
    stage_to_device: tuple[int, ...]
    placements: tuple[Placement, ...]
    mesh: Mesh | None
    data_axes: tuple[str, ...]

    @property
    def devices(self) -> tuple[Device, ...]:
        """A device or a mesh for each device of the schedule."""
        return tuple(p.place for p in self.placements)


def cut_pipe(
    trees: UserTrees,
    options: PipeOptions,
    *,
    devices: Iterable[Place] | None,
    mesh: Mesh | None,
    data_axes: Sequence[str] | None,
    balance: Sequence[int] | BalanceBy | None,
    sample: PyTree,
    sample_side: PyTree,
) -> PipeCut:
    """Cut the layers into stages and give each stage a place.

    The order matters. The schedule and the devices decide the number of stages. That
    number decides the device of each stage, and so the number of devices in use.

    Arguments:
        devices, mesh, data_axes, balance, sample, sample_side: as for `Pipe`, not
            checked yet.

    Raises:
        TypeError, ValueError: one of them is wrong, or they do not fit the layers or
            the schedule.
    """
    executor, chunks, scheduling = options.executor, options.chunks, options.scheduling
    placements, axes = stage_placements(executor, devices, mesh, data_axes)
    uncut = PipeSetup(
        trees.model,
        scheduling,
        options.remat,
        placements,
        chunks,
        trees.known_params,
        trees.known_costs,
    )
    with set_aside(), stage_tracing(executor, placements, mesh):
        sample, sample_side = trees.sample(sample, sample_side)
        counts = given_balance(balance, sample, sample_side, uncut)
    stage_to_device = scheduling.stage_to_device(len(counts), len(placements), chunks)
    placements = first_placements(placements, 1 + max(stage_to_device))
    limit = options.offload
    if isinstance(limit, tuple) and len(limit) != len(placements):
        raise ValueError(
            f"`Pipe(offload={shown(list(limit))})`: a number for each device is "
            f"needed, {len(placements)} in all, got {len(limit)}"
        )
    # A limit that no schedule keeps is an error here, if the number of microbatches is
    # known. Otherwise it is one in the first call.
    m = _known_microbatches(options, sample)
    if limit is not None and m is not None:
        scheduling.make(stage_to_device, m)
    homes = placements
    if executor == "scan":
        # It always runs on a mesh. Plain devices become a mesh.
        own = tuple(p.place for p in placements)
        mesh = as_mesh(own, mesh, len(counts))
        homes = tuple(map(Placement.of, sub_meshes(mesh, AXIS)))
    elif mesh is not None:
        check_size(mesh, len(placements), len(counts))
    pairs = zip(stage_to_device, counts, strict=True)
    trees.check_places([homes[d] for d, n in pairs for _ in range(n)])
    return PipeCut(counts, stage_to_device, placements, mesh, axes)


def _known_microbatches(options: PipeOptions, sample: PyTree) -> int | None:
    """The number of microbatches of every call, or of the sample; `None`: only a batch
    gives it.
    """
    if isinstance(options.schedule, Schedule):
        return options.schedule.microbatches
    if sample is not None:
        return cut_inputs({"x": sample}, options.chunks).m
    return 1 if options.chunks == 1 else None
