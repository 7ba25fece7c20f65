"""A prediction from what an executor tells of a call: the work of its programs, when
they run, and what is alive meanwhile.

In: `PlanData`, the shapes of the call's arguments, `PlanOptions`, and what the layers
cost. Out: a `Prediction`, whose rows are those of its tables.

    work of each program          counted or measured     work.py
    how long each action takes    FLOPs / speed           _work_table
    how long its launch takes     given or measured       _launch
    when each action runs         simulated               fpipe.schedules.simulate
    what each device holds        told by the executor    PlanData.devices
    what would be better          sentences               advice.py

The programs are those that the executor would run, so what they recompute is in their
work already. Only for advice, about pipes that do not exist, the costs of layers are
added up.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp

from fpipe._core.caches import Recent
from fpipe._core.pytrees import PyTree, describe, is_array, is_inexact, pack
from fpipe._executors.call import Args
from fpipe._executors.placement import over_processes
from fpipe._executors.plan_data import DeviceMemory, PlanData, Work
from fpipe._executors.request import schedule_of
from fpipe._model.microbatch import Ready, Rows, Whole, input_leaves_of
from fpipe._model.model import Model
from fpipe._model.needs import ROW_INPUTS
from fpipe._planning.advice import (
    advise_balance,
    advise_equal_pieces,
    advise_more_microbatches,
    warn_of_repeated_devices,
    warn_of_short_memory,
    warn_of_slow_launches,
)
from fpipe._planning.balance import best_balance
from fpipe._planning.costs import LayerCosts
from fpipe._planning.hardware import Hardware, PlanOptions
from fpipe._planning.layer_costs import costs_of
from fpipe._planning.prediction import (
    Crossing,
    DeviceRow,
    InputRow,
    Prediction,
    StageRow,
)
from fpipe._planning.span_tables import SpanTables
from fpipe._planning.text import option_name
from fpipe._planning.work import (
    Measured,
    count,
    measure,
    of_first_process,
    transfer_launch,
)
from fpipe.schedules import Costs, Kind, simulate
from fpipe.schedules._simulate import simulate_fused

# The work of each kind of action on each stage, for one microbatch.
WorkTable: TypeAlias = Mapping[tuple[Kind, int], float]


@dataclasses.dataclass(frozen=True, eq=False)
class KnownLayers:
    """What is known of the layers of several pipes, so that none finds it out again.

    Attributes:
        model: with the traces of its layers.
        traces: those of stages, and their programs.
        costs: by FLOPs, or estimated.
    """

    model: Model
    traces: Recent
    costs: LayerCosts


def predict(
    data: PlanData, args: Args, options: PlanOptions, costs: LayerCosts | None = None
) -> Prediction:
    """What a call will take.

    Arguments:
        data: what the executor tells of the call.
        args: the call's arguments, or their shapes; parameters as for the plain
            composition.
        costs: of the layers, if they are known.
    """
    layers = costs
    if layers is None:
        model, microbatches = data.stages[0].model, data.schedule.microbatches
        layers = costs_of(model, args, microbatches, data.remat)
    measured = _measured(data) if options.by == "time" else None
    work = _work_table(data, options, measured)
    stages = _stage_rows(data, args.params, layers, work)
    action_costs = _simulation_costs(stages, options.hardware, data.copied)
    if data.launchers is not None:
        launch = options.hardware.launch
        if launch is None:
            launch = 0.0 if measured is None else _launch(data, stages, measured)
        action_costs = dataclasses.replace(
            action_costs, launch=launch, launchers=data.launchers
        )
    unlaunched = dataclasses.replace(action_costs, launch=0.0)
    timeline = simulate_fused(data.schedule, action_costs, data.fused)
    devices = tuple(_device_row(row, options.hardware) for row in data.devices)
    advice = [
        *warn_of_slow_launches(
            timeline,
            lambda: simulate(data.schedule, unlaunched),
            {
                device.platform
                for works in data.work.values()
                for device in works[0].placement.devices
            },
        ),
        *advise_balance(
            stages,
            _work_of_stages(data, layers, stages, options),
            lambda: _best_balance(data, layers, stages, options.hardware),
        ),
        *advise_more_microbatches(
            stages,
            timeline,
            data.schedule.microbatches,
            _with_more_microbatches(data, action_costs),
        ),
        *advise_equal_pieces(data.microbatch_rows),
        *warn_of_repeated_devices(data.schedule.devices, len(devices)),
        *warn_of_short_memory(devices),
    ]
    return Prediction(
        executor=data.executor,
        checkpoint=option_name(data.remat.option),
        microbatches=data.schedule.microbatches,
        unit=options.unit,
        stages=stages,
        devices=devices,
        inputs=_input_rows(args, data.microbatch_rows),
        schedule=data.schedule,
        timeline=timeline,
        compiled=options.compiled,
        programs=data.programs,
        launches=data.launches,
        warnings=(*data.warnings, *advice),
    )


def _input_rows(args: Args, rows: tuple[int, ...]) -> tuple[InputRow, ...]:
    """What of each leaf of the inputs a microbatch gets."""
    found = []
    inputs = args.inputs
    for name in ROW_INPUTS:
        for leaf in input_leaves_of(name, inputs[name]):
            # Ready-made microbatches by their different shapes.
            shown = [
                describe(a) if is_array(a) else type(a).__name__ for a in leaf.values
            ]
            value = ", ".join(dict.fromkeys(shown))
            match leaf.source:
                case Rows(_, axis):
                    row = InputRow(leaf.name, value, "rows", axis, rows)
                case Ready():
                    row = InputRow(leaf.name, value, "ready")
                case Whole():
                    row = InputRow(leaf.name, value, "whole")
                case None:
                    row = InputRow(leaf.name, value, "static")
            # What of `x` goes straight to later layers may go to the first one too.
            if row not in found:
                found.append(row)
    return tuple(found)


def mean_square(y: PyTree) -> Any:
    """The loss of a step for which none was given."""
    # It reads every output, so that everything has a gradient, and costs next to
    # nothing beside a model. In float32, and real, as a loss has to be.
    total = 0
    for a in pack(y)[0]:
        if is_inexact(a):
            real = jnp.abs(a) if jnp.iscomplexobj(a) else a
            total = total + jnp.mean(jnp.square(real.astype(jnp.float32)))
    return total


# --- work ---


def _measured(data: PlanData) -> dict[Work, Measured]:
    """What each program takes on its device."""
    return measure([work for works in data.work.values() for work in works])


def _work_table(
    data: PlanData, options: PlanOptions, measured: Mapping[Work, Measured] | None
) -> WorkTable:
    """The work of each kind of action on each stage.

    Arguments:
        measured: the time of each program, where work is time.
    """
    if measured is not None:
        amounts = {work: measured[work].seconds for work in measured}
    else:
        every = [work for works in data.work.values() for work in works]
        # What computes the same is one function, and counted once.
        distinct = {work.function: work for work in every}
        flops = {f: count(work.code, "flops") for f, work in distinct.items()}
        amounts = {work: flops[work.function] for work in every}
    table, speed = dict[tuple[Kind, int], float](), options.hardware.speed
    for (kind, stage), works in data.work.items():
        total = sum(amounts[work] for work in works)
        if options.by == "flops" and speed is not None:
            total /= speed[data.schedule.stage_to_device[stage]]
        table[kind, stage] = total
    return table


def _launch(
    data: PlanData, stages: Sequence[StageRow], measured: Mapping[Work, Measured]
) -> float:
    """The seconds of the host for an action, in the mean: those of its program, and of
    the transfer of its boundary.
    """
    # Skips, borrowed parameters and what comes before the first action are left out:
    # most models have none of the first two, and the last is there once.
    place = {stage: works[0].placement for (_, stage), works in data.work.items()}
    times: list[float] = []
    for (kind, stage), works in data.work.items():
        # What is handed on, and to whom: the cotangent of a boundary is as large.
        target = stage + 1 if kind == "F" else stage - 1
        handed = stages[min(stage, target)].boundary if target >= 0 else 0
        time = sum(measured[work].launch for work in works)
        crosses = target in place and place[target] != place[stage]
        if kind in ("F", "B", "I") and crosses and handed:
            ends = place[stage], place[target]
            # One between two processes is not measured: both would have to issue it.
            if all(end.is_here for end in ends):
                time += transfer_launch(handed, *ends)
        times.append(time)
    launch = sum(times) / len(times) if times else 0.0
    if over_processes(place.values()):
        (launch,) = of_first_process([launch])
    return launch


def _simulation_costs(
    stages: Sequence[StageRow], hardware: Hardware, copied: Mapping[int, int]
) -> Costs:
    """What an action takes: a stage has whole backwards, or halves, or both.

    Arguments:
        copied: the bytes of a copy to the host, by stage.
    """
    # All transfers take as long as the one of the largest boundary.
    lag = hardware.latency
    if hardware.bandwidth is not None:
        lag += max((row.boundary for row in stages), default=0) / hardware.bandwidth
    work = {kind: [row.work.get(kind, 0.0) for row in stages] for kind in "FRIW"}
    # The simulation takes one cost per kind and stage. A schedule may have whole
    # backwards of some microbatches and halves of others; where a stage has no whole
    # one, its cost does not matter, and the sum is what it would be.
    halves = zip(work["I"], work["W"], strict=True)
    whole = [
        row.work.get("B", i + w) for row, (i, w) in zip(stages, halves, strict=True)
    ]
    bandwidth = hardware.host_bandwidth or math.inf
    return Costs(
        F=work["F"],
        B=whole,
        I=work["I"],
        W=work["W"],
        R=work["R"],
        transfer=lag,
        offload=[copied.get(row.stage, 0) / bandwidth for row in stages],
    )


# --- rows ---


def _stage_rows(
    data: PlanData, params: Sequence[PyTree], costs: LayerCosts, work: WorkTable
) -> tuple[StageRow, ...]:
    """What each stage is, what it takes, and what it sends."""
    model = data.stages[0].model
    # What goes past boundaries: skips, and what is borrowed.
    stage_of = {k: stage.index for stage in data.stages for k in stage.span}
    sent = [(value.name, value) for value in costs.skips]
    sent += [(costs.names[value.source], value) for value in costs.borrowed]
    # By the layer that sends, what it is called, and where it goes: several arrays that
    # a layer lends are told together.
    sizes: dict[tuple[int, str, int], int] = {}
    for name, value in sent:
        readers = {stage_of[k] for k in value.readers} - {stage_of[value.source]}
        for reader in sorted(readers):
            key = value.source, name, reader
            sizes[key] = sizes.get(key, 0) + int(value.bytes)
    rows = []
    for s, stage in enumerate(data.stages):
        arrays = [a for k in stage.span for a in pack(params[k])[0]]
        row = StageRow(
            stage=s,
            device=data.schedule.stage_to_device[s],
            first=stage.span.start,
            layers=tuple(model.layers[k].name for k in stage.span),
            params=sum(math.prod(a.shape) for a in arrays),
            work={kind: value for (kind, t), value in sorted(work.items()) if t == s},
            boundary=0 if stage.last else int(costs.boundaries[stage.span[-1]]),
            stashed=tuple(
                Crossing(name, reader, size)
                for (layer, name, reader), size in sizes.items()
                if stage_of[layer] == s
            ),
            popped=tuple(
                Crossing(name, stage_of[layer], size)
                for (layer, name, reader), size in sizes.items()
                if reader == s
            ),
        )
        rows.append(row)
    return tuple(rows)


def _device_row(row: DeviceMemory, hardware: Hardware) -> DeviceRow:
    """What a device holds, with the state of its optimizer."""
    memory: dict[str, int] = {**row.roles}
    memory["optimizer"] = int(hardware.optimizer * row.owned)
    if row.temporary is not None:
        memory["temporary"] = row.temporary
    ordered = {role: memory[role] for role in _ROLES if role in memory}
    limit = hardware.memory_of(row.device)
    return DeviceRow(row.device, row.name, ordered, row.moment, limit, row.host)


# The order of the columns.
_ROLES = (
    "parameters",
    "constants",
    "gradients",
    "optimizer",
    "boundaries",
    "skips",
    "residuals",
    "inputs",
    "outputs",
    "temporary",
)


# --- what would be better ---


def _work_of_stages(
    data: PlanData,
    costs: LayerCosts,
    stages: Sequence[StageRow],
    options: PlanOptions,
) -> list[float]:
    """What each stage takes, by what its balance was found by."""
    if not costs.estimated or options.by == "time":
        return [row.total for row in stages]
    # FLOPs would call a cut by the estimated time uneven.
    hardware, stage_to_device = options.hardware, data.schedule.stage_to_device
    tables = SpanTables(costs, stage_to_device, data.scheduling, hardware.optimizer)
    found = []
    for s, row in enumerate(stages):
        speed = hardware.speed[stage_to_device[s]] if hardware.speed else 1.0
        end = row.first + len(row.layers)
        found.append(float(tables.work(s)[row.first, end]) / speed)
    return found


def _best_balance(
    data: PlanData, costs: LayerCosts, stages: Sequence[StageRow], hardware: Hardware
) -> tuple[tuple[int, ...], float]:
    """The best balance by the costs of layers, and what is left with it of the work of
    the most expensive stage, as a share.
    """
    stage_to_device = data.schedule.stage_to_device
    # Neither limits nor links: the cut is to be better at work alone.
    only_speed = Hardware(speed=hardware.speed)
    cut = best_balance(costs, data.scheduling, stage_to_device, only_speed)
    # What is recomputed depends on the stage, so both are measured by what the balance
    # was found by.
    tables = SpanTables(costs, stage_to_device, data.scheduling, hardware.optimizer)

    def most_expensive(balance: Sequence[int]) -> float:
        most, ends = 0.0, itertools.accumulate(balance)
        for s, (layers, end) in enumerate(zip(balance, ends, strict=True)):
            speed = (
                1.0 if hardware.speed is None else hardware.speed[stage_to_device[s]]
            )
            most = max(most, float(tables.work(s)[end - layers, end]) / speed)
        return most

    now = most_expensive([len(row.layers) for row in stages])
    return cut, most_expensive(cut) / now if now else 1.0


def _with_more_microbatches(
    data: PlanData, costs: Costs
) -> Iterator[tuple[int, float]]:
    """Larger numbers of microbatches that divide the batch, with the bubble of each."""
    # With the same costs for each action: on half the rows all take about half, and the
    # bubble is a share of the step. But a launch takes as long as before, so that it
    # takes twice as long beside them.
    launch = costs.launch / data.schedule.microbatches
    rows, m = sum(data.microbatch_rows), 2 * data.schedule.microbatches
    stage_to_device = data.schedule.stage_to_device
    while m <= rows and rows % m == 0:
        try:
            schedule = schedule_of(data.scheduling, stage_to_device, data.stages, m)
        # A function of the user's that makes schedules for some numbers alone may say
        # so by any exception, an assertion or an index that is out of range too. That
        # is no fault of the call that is planned: there is only no advice to give.
        except Exception:
            return
        smaller = dataclasses.replace(costs, launch=launch * m)
        yield m, simulate(schedule, smaller).bubble
        m *= 2
