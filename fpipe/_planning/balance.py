"""`balance`: how many layers go into each stage, for costs, devices, limits and a
schedule.

In: what layers cost (`LayerCosts`), the device of each stage, and `Hardware`. Out: the
layers of each stage, such as `(2, 3)`. `span_tables.py` has what each span of layers
costs as a stage, `partition.py` finds the best cut through these tables.

Work and traffic are added up only where both are in seconds: a guessed weight between
FLOPs and bytes makes cuts that are neither even nor narrow. Otherwise the most
expensive stage is made as cheap as can be, and traffic decides among equals.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from fpipe._core.checks import is_number, is_one_of
from fpipe._core.errors import shown
from fpipe._core.meshes import in_tracing_context
from fpipe._core.pytrees import PyTree
from fpipe._executors.added_actions import (
    Recompute,
    as_offload,
    as_recompute,
    with_actions,
)
from fpipe._executors.call import check_chunks
from fpipe._executors.placement import Placement
from fpipe._executors.scheduling import Generator, Scheduling
from fpipe._model.remat import Policy, Remat
from fpipe._planning.costs import LayerCosts
from fpipe._planning.hardware import Hardware
from fpipe._planning.layer_costs import (
    UNITS,
    BalanceBy,
    Gauge,
    Span,
    SpanWork,
    cost_request,
    costs_and_spans,
)
from fpipe._planning.partition import (
    SLACK,
    PartitionTask,
    Shortage,
    Table,
    best_cut,
)
from fpipe._planning.span_tables import MeasuredSpans, SpanTables
from fpipe._planning.text import option_name
from fpipe.schedules import Schedule
from fpipe.schedules._checks import counted

# Of so many cuts at most `found_balance` measures the stages: each has to be
# compiled.
_ROUNDS = 8


class DoesNotFitError(ValueError):
    """No cut fits into the memory of the devices."""


@in_tracing_context
def balance(
    layers: Any,
    x: PyTree = None,
    *,
    stages: int | None = None,
    devices: int | Sequence[Any] | None = None,
    by: BalanceBy | None = None,
    speeds: float | Sequence[float] | None = None,
    bandwidth: float | None = None,
    memory: float | Sequence[float] | None = None,
    optimizer: float = 2.0,
    chunks: int | None = None,
    checkpoint: str | Policy | None = None,
    schedule: str | Schedule | Generator = "eager_1f1b",
    recompute: Recompute = "auto",
    offload: int | Sequence[int] | None = None,
    host_bandwidth: float | None = None,
    side: PyTree = None,
    params: Sequence[PyTree] | None = None,
    compute_dtype: Any = None,
) -> tuple[int, ...]:
    """The number of layers in each stage, for `Pipe(balance=...)`.

    The cut makes the most expensive stage as cheap as possible. Without memory limits
    the search is exact. Costs come from shapes alone; only `by="time"` runs programs:
    the layers, and then the stages of the best cuts.

    The cost of a stage is the work of its layers divided by the speed of its device.
    With `bandwidth`, the transfer time at both ends of the stage is added. Among cuts
    of equal cost, the cut with the least total traffic is taken, then the most even
    one, then the first.

    Arguments:
        layers: layers, or an `fpipe.Split`, as for `Pipe`. Or the costs of the layers:
            a `LayerCosts`, or one number for each layer.
        x: a batch, or its shapes (`jax.ShapeDtypeStruct`). Leave it out if `layers` are
            costs.
        stages: the number of stages. Default: the number that `Pipe` makes on the
            devices.
        devices: the number of devices, or the devices. Default: one for each of
            `stages`, or `jax.devices()` without `stages`.

    Other Arguments:
        by: the measure of a stage's cost. `"flops"`, `"bytes"` and `"time"` are those
            of `layer_costs`. `"memory"` is the memory that the stage needs, as a share
            of its limit if `memory` is given. Default: `"flops"`; for an `fpipe.Split`
            the estimated time, as for a `Pipe`; for a `LayerCosts` the measure that it
            was made with, and then only `"memory"` may be given in its place.
        speeds: the speeds of the devices, one number or one for each. With `bandwidth`
            they are work per second (FLOP/s for `"flops"`). Otherwise only their ratios
            count. Default: all equal.
        bandwidth: bytes per second of a device's links, in each direction. Costs that
            are plain numbers then count as seconds. Default: traffic only decides
            between cuts of equal cost.
        memory: bytes that a device has, one number or one for each device. A cut that
            needs more is not taken. Default: no limit.
        optimizer: bytes of optimizer state for each byte of parameters: 2 for Adam (the
            default), 1 for momentum, 0 for SGD.
        chunks: as for `Pipe`. Default: 1; for a `LayerCosts`, the number of
            microbatches that it was made for.
        checkpoint, schedule, compute_dtype: as for `Pipe`. They determine which
            forwards run twice, how many microbatches a stage holds, and how many stages
            each device has.
        recompute, offload: as for `Pipe` with `executor="placed"`. Microbatches in the
            memory of the host take no memory of the device. Each recomputation that
            runs early holds the residuals of a microbatch.
        host_bandwidth: bytes per second between a device and its host, in each
            direction. With `offload` a stage then takes at least as long as its copies.
            Default: copies take no time.
        side, params: as for `layer_costs`.

    These count as the memory of a stage:

    - its parameters, their gradients and the optimizer's state;
    - borrowed parameters, in each stage that borrows them;
    - the values that the backward needs, for each microbatch that the schedule holds.
      With recomputation these are the stage's inputs, and the residuals of one
      microbatch (of two with `"except_last"`);
    - arrays that wait to be sent or used, and one microbatch more of each boundary and
      skip that comes or goes, for what is on its way;
    - the batch, on the first stage.

    Side inputs, targets, XLA's memory inside a program, and casts of parameters to
    `compute_dtype` are not counted.

    If a device has several stages, the stages are balanced, not the devices. A skip
    between two stages of one device counts as traffic too. A memory limit holds for the
    sum of a device's stages. A search under memory limits is exact for small problems.
    For large ones it stops after 50,000 steps, and the best cut that it has found is
    taken.

    Returns:
        The number of layers in each stage.

    Raises:
        ValueError: no cut fits into `memory`; the message says by how much. There are
            more stages than layers. An argument is out of range.
        TypeError: `x` is missing, or is given together with costs.

    Example:
        >>> fpipe.balance([3, 1, 1, 1, 2], stages=2)
        (2, 3)
        >>> make = lambda key, x: jnp.zeros((3, 3))
        >>> dense = fpipe.Layer(lambda w, x: x @ w, init=make)
        >>> x = jax.ShapeDtypeStruct((8, 3), jnp.float32)
        >>> fpipe.balance([dense] * 5, x, stages=2, chunks=4)
        (2, 3)
    """
    # First the costs: given ones, or those of the layers.
    known, work = _known_costs(layers), None
    if by is not None and not is_one_of(by, UNITS):
        raise ValueError(
            f"`balance(by={shown(by)})`: one of {', '.join(map(repr, UNITS))}"
        )
    recompute, limit = (
        as_recompute(recompute, "balance"),
        as_offload(offload, "balance"),
    )
    if chunks is not None:
        chunks = check_chunks("balance", chunks)
    if known is None:
        if x is None:
            raise TypeError(
                "`balance(layers, x)`: layers need a batch `x`, or its shapes; or give "
                "costs in place of layers"
            )
        request = cost_request(
            layers,
            x,
            by=by,
            side=side,
            chunks=1 if chunks is None else chunks,
            params=params,
            checkpoint="except_last" if checkpoint is None else checkpoint,
            compute_dtype=compute_dtype,
        )
        if isinstance(devices, Iterable) and request.gauge.by == "time":
            places = [Placement.of(device) for device in devices]
            request = request._replace(gauge=Gauge.over("time", places))
        known, work = costs_and_spans(*request)
    else:
        if any(given is not None for given in (x, side, params, compute_dtype)):
            raise TypeError(
                "`balance(costs, ...)`: x, side, params and compute_dtype are only for "
                "layers; leave them out with costs"
            )
        if by not in (None, "memory") and UNITS[by] != known.unit:
            raise ValueError(
                f"`balance(costs, by={shown(by)})`: the costs are in {known.unit}"
            )
        if chunks is not None:
            known = dataclasses.replace(known, microbatches=chunks)
        if checkpoint is not None:
            known = dataclasses.replace(known, checkpoint=checkpoint)
    # As under the placed executor: which executor will run is not known here.
    scheduling = with_actions(
        Scheduling.of(schedule),
        Remat.of(known.checkpoint),
        recompute,
        limit,
        in_units=False,
    )
    # Then the hardware. The schedule says which device a stage runs on.
    stage_to_device = stage_devices(known, scheduling, stages, devices)
    hardware = Hardware.checked(
        "balance",
        1 + max(stage_to_device),
        speed=speeds,
        bandwidth=bandwidth,
        memory=memory,
        optimizer=optimizer,
        host_bandwidth=host_bandwidth,
        speed_name="speeds",
    )
    by_memory = by == "memory"
    # Transfers take seconds. FLOPs or bytes need a speed before they can be added to
    # seconds. Costs that the user gave count as seconds.
    counted = known.unit in ("FLOP", "byte") and not by_memory
    links = {"bandwidth": bandwidth, "host_bandwidth": host_bandwidth}
    given = [f"{name}=..." for name, value in links.items() if value is not None]
    if given and speeds is None and counted:
        raise ValueError(
            f"`balance({', '.join(given)})`: bytes per second cannot be weighed "
            f"against {known.unit}s: give `speeds=` too, in {known.unit}s per second"
        )
    return found_balance(known, work, scheduling, stage_to_device, hardware, by_memory)


def found_balance(
    costs: LayerCosts,
    work: SpanWork | None,
    scheduling: Scheduling,
    stage_to_device: tuple[int, ...],
    hardware: Hardware,
    by_memory: bool = False,
) -> tuple[int, ...]:
    """The best balance, by the times of whole stages if these can be measured.

    Without `work` it is the one that the costs of layers give. With it, the stages of
    the best cut are measured, and the search begins again with what is known now, until
    the best cut has been measured altogether. Equal stages are measured once for all.

    One wrong time is enough to lose the best cut: what else the machine does makes a
    stage look slow. So before a cut is taken, the stages of all cuts that were tried
    are measured once more, at another moment. If one was faster than it looked, the
    search goes on.

    Arguments:
        work: measures layers that follow each other; `None`: nothing does.
        stage_to_device, by_memory: as for `best_balance`.

    Raises:
        ValueError: no cut fits into the memory.
    """
    if work is None:
        return best_balance(costs, scheduling, stage_to_device, hardware, by_memory)
    layers = range(len(costs.names))
    found = {(k, k + 1): (costs.forward[k], costs.backward[k]) for k in layers}
    tried, compared, again = 0, dict[Span, None](), set[Span]()

    def measure(spans: Sequence[Span]) -> None:
        for span, measured in work.measure(spans).items():
            found[span] = measured.forward, measured.backward

    only = False
    while True:
        # A layer may have been measured again too, as a stage.
        each = [found[k, k + 1] for k in layers]
        known = dataclasses.replace(
            costs,
            forward=[forward for forward, _ in each],
            backward=[backward for _, backward in each],
        )
        spans = MeasuredSpans(found, only)
        cut = best_balance(known, scheduling, stage_to_device, hardware, spans=spans)
        stages = [*itertools.pairwise(itertools.accumulate(cut, initial=0))]
        unknown = [span for span in stages if span not in found]
        if unknown and tried == _ROUNDS and not only:
            only = True
            continue
        compared.update(dict.fromkeys(stages))
        if unknown:
            measure(unknown)
            tried += 1
            continue
        doubted = [span for span in compared if span not in again]
        if not doubted:
            return cut
        measure(doubted)
        again.update(doubted)


def best_balance(
    costs: LayerCosts,
    scheduling: Scheduling,
    stage_to_device: tuple[int, ...],
    hardware: Hardware,
    by_memory: bool = False,
    spans: MeasuredSpans | None = None,
) -> tuple[int, ...]:
    """`balance` of checked arguments.

    Arguments:
        stage_to_device: the device of each stage.
        by_memory: whether a stage costs the memory that it needs, not its work.
        spans: what was measured of stages, beside the layers.

    Raises:
        ValueError: no cut fits into the memory.
    """
    optimizer = hardware.optimizer
    tables = SpanTables(costs, stage_to_device, scheduling, optimizer, spans)
    devices = 1 + max(stage_to_device)
    limits = hardware.memory or (math.inf,) * devices

    # A device with more memory, or a faster one, may have a larger stage. So both costs
    # are shares of the device's memory or speed, and can be compared between devices.

    def memory_cost(s: int) -> Table:
        """As a share of the limit, where there is one."""
        # Without limits bytes themselves, which is the same for all devices.
        limit = limits[stage_to_device[s]]
        return tables.memory(s) / (1.0 if math.isinf(limit) else max(limit, 1.0))

    def time_cost(s: int) -> Table:
        """Work by speed, and the time of what crosses the ends."""
        speed = 1.0 if hardware.speed is None else hardware.speed[stage_to_device[s]]
        time = tables.work(s) / speed
        if hardware.bandwidth is not None:
            time = time + tables.link(s) / hardware.bandwidth
        if hardware.host_bandwidth is not None:
            # Copies run beside the work. A device waits for them if they take longer.
            time = np.maximum(time, tables.copied(s) / hardware.host_bandwidth)
        return time

    # Without limits the memory tables are not even made: they need the schedule.
    task = PartitionTask(
        layers=len(costs.names),
        devices=stage_to_device,
        cost=memory_cost if by_memory else time_cost,
        traffic=tables.received,
        memory=None if hardware.memory is None else tables.memory,
        limits=limits,
        slack=SLACK if costs.estimated else 0.0,
    )
    cut = best_cut(task)
    # The error names the cut that lacks least, and how many bytes it lacks.
    if isinstance(cut, Shortage):
        raise DoesNotFitError(_does_not_fit(cut, costs, scheduling))
    return cut


def stage_devices(
    costs: LayerCosts,
    scheduling: Scheduling,
    stages: int | None,
    devices: int | Sequence[Any] | None,
) -> tuple[int, ...]:
    """For each stage its device.

    Arguments:
        stages, devices: as for `balance`.

    Raises:
        ValueError: more stages than layers, or than the devices can have.
    """
    call = f"`balance(stages={shown(stages)}, devices={shown(devices)})`"
    layers, microbatches = len(costs.names), costs.microbatches
    available = len(devices) if isinstance(devices, Iterable) else devices
    for name, value in (("stages", stages), ("devices", available)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{call}: {name} must be an int of at least 1")
    # As `Pipe` does, so that its stages are as many as those of the balance.
    if stages is None:
        there = len(jax.devices()) if available is None else available
        stages = scheduling.stages(there, microbatches, layers)
    if stages > layers:
        raise ValueError(
            f"{call}: every stage needs at least one layer, but there "
            f"{'is' if layers == 1 else 'are'} {counted(layers, 'layer')} "
            f"for {stages} stages"
        )
    # Stages without devices: as many devices as the schedule has use for.
    most = stages if available is None else available
    stage_to_device = scheduling.stage_to_device(stages, most, microbatches)
    if available is not None and max(stage_to_device) >= available:
        raise ValueError(
            f"{call}: the schedule puts {stages} stages on "
            f"{1 + max(stage_to_device)} devices; give fewer stages, or more devices"
        )
    return stage_to_device


def _known_costs(layers: Any) -> LayerCosts | None:
    """Costs, if they were given in place of layers."""
    if isinstance(layers, LayerCosts):
        return layers
    # Layers are callables or nested sequences of them, so one number among the entries
    # is enough to tell that costs are meant.
    values = layers.tolist() if isinstance(layers, np.ndarray) else layers
    if not isinstance(values, (list, tuple)) or not any(map(is_number, values)):
        return None
    if not all(map(is_number, values)):
        raise TypeError(
            "`balance(costs)`: one number for each layer, or layers, not both"
        )
    if not all(math.isfinite(v) and v >= 0 for v in values):
        raise ValueError(
            f"`balance({shown(values)})`: costs are finite numbers that are not "
            "negative"
        )
    return LayerCosts.given(values)


def _does_not_fit(shortage: Shortage, costs: LayerCosts, scheduling: Scheduling) -> str:
    """What is missing, and what would help."""
    where = f"device {shortage.device}"
    if shortage.stage is not None:
        where = f"stage {shortage.stage} (device {shortage.device})"
    cures = ["give more devices", "more chunks"]
    if costs.checkpoint != "always":
        cures.append("checkpoint='always'")
    schedule = option_name(scheduling.option)
    cures.append(f"or a schedule that holds fewer microbatches than {schedule!r}")
    found = "does not fit" if shortage.proven else "found no cut that fits"
    missing = f"{shortage.missing / 2**20:.4g} MiB"
    return f"`balance(...)`: {found}: short by {missing} on {where}; {', '.join(cures)}"
