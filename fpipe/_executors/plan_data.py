"""What an executor tells of a call, so that its time and memory can be predicted.

The placed executor reads it off its plan, the scan executor off its machine. A
prediction knows nothing else of either. For two stages on two devices, `1f1b`, two
microbatches:

    executor           "placed"
    launchers          "one"
    stages             stage 0 (layers 0, 1), stage 1 (layers 2, 3)
    schedule           F 0 0, F 0 1, B 0 0, B 0 1 on device 0; …
    microbatch_rows    (8, 8)
    work               F, stage 0 -> one program        B, stage 0 -> one program
                       F, stage 1 -> one program        B, stage 1 -> one program
    devices            device 0: parameters 80 B, boundaries 128 B, … while B 0 0 runs
                       device 1: …
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
import numpy as np

from fpipe._executors.placement import Placement
from fpipe._executors.scheduling import Scheduling
from fpipe._model.remat import Remat
from fpipe._model.stages import Stage
from fpipe._program.code import Code
from fpipe.schedules import Action, Kind, Schedule

# What an array is for. `boundaries` and `skips` cross stages, cotangents included;
# `outputs` are states, losses and `y`; `constants` are arrays that layers close over.
Role: TypeAlias = Literal[
    "parameters",
    "constants",
    "gradients",
    "boundaries",
    "skips",
    "residuals",
    "inputs",
    "outputs",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """A program that an action runs.

    Attributes:
        code: what it computes: its equations can be counted.
        function: the code under `jax.jit`; one function for codes that compute the
            same. Where the executor itself calls one it is that one, so that a step
            finds what was compiled to measure it.
        arguments: the shapes of what it takes, and where that lies.
        placement: where it runs.
    """

    code: Code
    function: Any  # `jax.jit` declares no type for what it returns
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    placement: Placement


def closed_over(code: Code) -> list[Any]:
    """The arrays that a program closes over: they are part of what is compiled. Scalars
    are not among them.
    """
    used = {v for node in code.nodes for v in node.ins} | {*code.outs, *code.sums}
    constants = [a for v, a in code.graph.consts.items() if v in used and np.ndim(a)]
    # One array may stand in several places.
    return list({id(a): a for a in constants}.values())


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """What a device holds when it is fullest.

    Attributes:
        device: its number in the schedule. Several devices have one number where a
            stage lives on several.
        name: what JAX calls it.
        roles: bytes of the arrays that are there, by what they are for.
        owned: bytes of the parameters that live there: an optimizer's state is a
            multiple of them.
        temporary: bytes that a program needs for itself; `None`: nothing was compiled,
            or another process compiles it.
        moment: what runs then.
        host: the most bytes of residuals that wait in the host's memory, where an
            offloading policy or an `O` moves them. No part of what the device holds.
    """

    device: int
    name: str
    roles: Mapping[Role, int]
    owned: int
    temporary: int | None
    moment: str
    host: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class PlanData:
    """A call as an executor will run it.

    Attributes:
        executor: its name, as in `Pipe(executor=...)`.
        launchers: whether one thread launches all actions, or one for each device, as
            in `fpipe.schedules.Costs`; `None`: the call is one program.
        stages: those of the pipe.
        schedule: for this number of microbatches.
        scheduling: what makes it for other numbers.
        remat: what the backwards recompute.
        microbatch_rows: rows of each microbatch, of the first array that is cut; empty
            if everything goes whole to every microbatch.
        work: for each kind of action and stage the programs that its first microbatch
            runs. What has nothing to compute is not there.
        fused: the actions that run as one program, program by program. They are
            launched together.
        programs: how many different programs the call compiles.
        launches: how many programs and transfers it launches.
        devices: a row for each device.
        copied: for each stage that copies what a forward left to the host, the bytes of
            one copy.
        warnings: what the user should know.
    """

    executor: Literal["placed", "scan"]
    launchers: Literal["one", "per_device"] | None
    stages: tuple[Stage, ...]
    schedule: Schedule
    scheduling: Scheduling
    remat: Remat
    microbatch_rows: tuple[int, ...]
    work: Mapping[tuple[Kind, int], tuple[Work, ...]]
    fused: tuple[tuple[Action, ...], ...]
    programs: int
    launches: int
    devices: tuple[DeviceMemory, ...]
    copied: Mapping[int, int]
    warnings: tuple[str, ...]
