"""`PlanData` of the scan executor: read off the machine of a step.

A stage is one unit of the machine or several (an embedding, and the blocks after it).
An action of the stage runs an operation of each of them; its work is their codes
together. For the model in `units.py` (an embedding, six blocks and a head on three
devices):

    ("F", 0)    the codes of units 0 and 1: the embedding, and the first core
    ("F", 1)    the code of unit 2, which is the same code as that of unit 1
    ("F", 2)    the codes of units 3 and 4: the last core, and the head with the loss
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax

from fpipe._core.pytrees import nbytes, on_host
from fpipe._executors.placement import Placement
from fpipe._executors.plan_data import DeviceMemory, PlanData, Work, closed_over
from fpipe._executors.scan.machine import Machine
from fpipe._executors.scan.memory import (
    copied_bytes,
    held,
    held_on_host,
    owned_bytes,
)
from fpipe._executors.scan.step import Step
from fpipe._executors.scheduling import Scheduling
from fpipe._executors.stage_places import columns
from fpipe._model.remat import Remat
from fpipe._model.stages import Stage
from fpipe._program.code import Code
from fpipe.schedules import Action, Kind, Schedule


def plan_data(
    step: Step,
    stages: tuple[Stage, ...],
    schedule: Schedule,
    scheduling: Scheduling,
    remat: Remat,
    compiled_bytes: int | None,
) -> PlanData:
    """What a step tells of its call.

    Arguments:
        stages: those of the pipe.
        compiled_bytes: all that the compiled step needs on each device; `None`: it was
            not compiled.
    """
    return PlanData(
        executor="scan",
        launchers=None,
        stages=stages,
        schedule=schedule,
        scheduling=scheduling,
        remat=remat,
        microbatch_rows=step.inputs.cut.rows,
        work=_work(step),
        fused=(),
        programs=1,
        launches=1,
        devices=_memory(step, compiled_bytes),
        copied=copied_bytes(step),
        warnings=tuple(step.machine.warnings),
    )


def _work(step: Step) -> dict[tuple[Kind, int], tuple[Work, ...]]:
    """The programs of each kind of action on each stage, for its first microbatch."""
    placements = [Placement.of(column[0]) for column in columns(step.mesh)]
    functions: dict[Code, Any] = {}
    found: dict[tuple[Kind, int], tuple[Work, ...]] = {}
    for action, device, codes in _first_actions(step.machine):
        # Equal units share a code. As a function of its own it can be measured, which
        # inside the step's one program it cannot.
        for code in codes:
            if code not in functions:
                functions[code] = code.compile()
        found[action.kind, action.stage] = tuple(
            Work(
                code,
                functions[code],
                _arguments(code, placements[device]),
                placements[device],
            )
            for code in codes
        )
    return found


def _first_actions(machine: Machine) -> Iterator[tuple[Action, int, list[Code]]]:
    """The first action of each kind on each stage, its device, and the codes of the
    operations that it runs. The table of a segment says which these are.
    """
    seen = set[tuple[Kind, int]]()
    for segment in machine.segments:
        for t, phases in enumerate(segment.actions):
            for (p, phase), d in itertools.product(
                enumerate(phases), range(machine.devices)
            ):
                action = phase[d]
                if action is None or (action.kind, action.stage) in seen:
                    continue
                seen.add((action.kind, action.stage))
                # An action names a stage. Which operations it comes to is only in the
                # table: units that share one have no other mark.
                runs = segment.table[d, t, p]
                ops = [e.op for e in segment.phases[p].ops if runs[e.runs]]
                codes = [op.code for op in ops if op.code is not None]
                if codes:
                    yield action, d, codes


def _arguments(code: Code, place: Placement) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes of what a unit's code takes, as arrays of their own. In the step they
    are parts of blocks and slots.
    """
    avals = [code.graph.avals[arg.value] for arg in code.args if arg.value is not None]
    return tuple(
        jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=place.host if on_host(a) else place.sharding
        )
        for a in avals
    )


def _constant_bytes(machine: Machine) -> int:
    """The bytes of the arrays that layers close over. All devices run the same program,
    and it has each of them once.
    """
    ops = [e.op for s in machine.segments for phase in s.phases for e in phase.ops]
    found: dict[int, int] = {}
    for op in ops:
        if op.code is not None:
            found |= {id(a): nbytes(a) for a in closed_over(op.code)}
    return sum(found.values())


def _memory(step: Step, compiled_bytes: int | None) -> tuple[DeviceMemory, ...]:
    """The buffers of a step. They are there all along, so no moment has the most, and
    all devices have the same.
    """
    roles = dict(held(step))
    temporary = None
    if compiled_bytes is not None:
        # XLA counts the buffers of the scan as temporary memory of the program. They
        # are told by role already, and taken off.
        temporary = max(0, compiled_bytes - sum(roles.values()))
    constants = _constant_bytes(step.machine)
    if constants:
        roles["constants"] = constants
    return tuple(
        DeviceMemory(
            device=number,
            name=str(device),
            roles=roles,
            owned=owned_bytes(step),
            temporary=temporary,
            moment="all along",
            host=held_on_host(step),
        )
        for number, column in enumerate(columns(step.mesh))
        for device in column
    )
