"""`balance`: how many layers go into each stage, for costs, devices, limits and a
schedule.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import jax
import numpy as np

from fpipe._core.pytrees import PyTree
from fpipe._executors.call import check_chunks
from fpipe._executors.scheduling import Generator, Scheduling
from fpipe._model.remat import Policy
from fpipe._planning.costs import LayerCosts
from fpipe._planning.layer_costs import UNITS, By, layer_costs
from fpipe._planning.partition import Short, Table, Task, best_cut
from fpipe._planning.tables import Tables
from fpipe.schedules import Schedule


def balance(
    layers: Any,
    x: PyTree = None,
    *,
    stages: int | None = None,
    devices: int | Sequence[Any] | None = None,
    by: By | None = None,
    speeds: float | Sequence[float] | None = None,
    bandwidth: float | None = None,
    memory: float | Sequence[float] | None = None,
    optimizer: float = 2.0,
    chunks: int | None = None,
    checkpoint: str | Policy | None = None,
    schedule: str | Schedule | Generator = "eager_1f1b",
    side: PyTree = None,
    params: Sequence[PyTree] | None = None,
    compute_dtype: Any = None,
) -> tuple[int, ...]:
    """Layers per stage, for `Pipe(balance=...)`: the dearest stage is as cheap as can
    be, exactly.

    From shapes alone, but for `by="time"`. A stage costs its layers' work, divided by
    the speed of its device, plus the time of what crosses its ends, if a bandwidth is
    given. Of cuts that are equal in that, the one with the least traffic in total, then
    the most even one, then the first.

    Arguments:
        layers: layers as for `Pipe`; or their costs: a `LayerCosts`, or one number for
            each.
        x: a batch, or its shapes (`jax.ShapeDtypeStruct`); none with costs.
        stages: how many; default as many as `Pipe` would make on the devices.
        devices: how many, or the devices; default one for each of `stages`, or those of
            `jax.devices()`.

    Other Arguments:
        by: what a stage costs. `"flops"` (default), `"bytes"`, `"time"`: see
            `layer_costs`; `"memory"`: the memory that it needs (over the limit, where
            there are limits). With a `LayerCosts`, what that has, or `"memory"`.
        speeds: of the devices, one number or one for each: work per second, where bytes
            are to be weighed against it (FLOP/s for `"flops"`), else relative to one
            another. Default all equal.
        bandwidth: bytes per second of a device's links, each way. Default: traffic
            decides between equal cuts only.
        memory: bytes that a device has, one number or one for each: a cut that needs
            more is none. Default no limit.
        optimizer: bytes of optimizer state for each byte of parameters: 2 for Adam (the
            default), 1 for momentum, 0 for SGD.
        chunks: as for `Pipe`; default 1, with a `LayerCosts` the number of microbatches
            that it was made for.
        checkpoint, schedule, compute_dtype: as for `Pipe`. They say which forwards run
            twice, how many microbatches a stage holds, and how many stages are on each
            device.
        side, params: as for `layer_costs`.

    A stage needs memory for its parameters, their gradients and the optimizer's state;
    for each microbatch that the schedule holds, what the backward keeps (with
    recomputation the stage's inputs, and the residuals of the microbatch at work, of
    one more with `"except_last"`); for what waits on its way; and for one array at each
    end. Borrowed parameters count again where they are borrowed, the batch on the first
    stage. Not counted: side inputs and targets, what XLA needs inside a program, and
    casts of parameters to `compute_dtype`.

    With several stages on a device each of them counts as a stage, so that *they* are
    balanced, and a skip counts as crossing also between two stages of one device.
    Memory limits hold for the sum of a device's stages; the search for a cut that keeps
    them is exact while it is small (see `fpipe/_balance.py`), and the best that was
    found otherwise.

    Returns:
        The number of layers in each stage.

    Raises:
        ValueError: no cut fits into `memory`, and by how much; more stages than layers;
            an argument that is out of range.
        TypeError: `x` missing, or given beside costs.

    Example:
        >>> fpipe.balance([3, 1, 1, 1, 2], stages=2)
        (2, 3)
        >>> dense = fpipe.Layer(lambda w, x: x @ w, init=lambda key, x: jnp.zeros((3, 3)))
        >>> fpipe.balance([dense] * 5, jax.ShapeDtypeStruct((8, 3), jnp.float32), stages=2, chunks=4)
        (2, 3)
    """
    known = _known(layers)
    if by is not None and by not in UNITS:
        raise ValueError(f"`balance(by={by!r})`: one of {', '.join(map(repr, UNITS))}")
    scheduling = Scheduling.of(schedule)
    if known is None:
        if x is None:
            raise TypeError(
                "`balance(layers, x)`: layers need a batch, or its shapes; without one "
                "give costs"
            )
        chunks = check_chunks("balance", 1 if chunks is None else chunks)
        known = layer_costs(
            layers,
            x,
            by="flops" if by is None else by,
            side=side,
            chunks=chunks,
            params=params,
            checkpoint="except_last" if checkpoint is None else checkpoint,
            compute_dtype=compute_dtype,
        )
    else:
        if any(given is not None for given in (x, side, params, compute_dtype)):
            raise TypeError(
                "`balance(costs, ...)`: x, side, params and compute_dtype go with "
                "layers, not with their costs"
            )
        if by not in (None, "memory") and UNITS[by] != known.unit:
            raise ValueError(
                f"`balance(costs, by={by!r})`: the costs are in {known.unit}"
            )
        changes = {
            "microbatches": None if chunks is None else check_chunks("balance", chunks),
            "checkpoint": checkpoint,
        }
        known = dataclasses.replace(
            known, **{name: v for name, v in changes.items() if v is not None}
        )
    return balanced(
        known,
        scheduling,
        stages,
        devices,
        by == "memory",
        speeds,
        bandwidth,
        memory,
        optimizer,
    )


def balanced(
    costs: LayerCosts,
    scheduling: Scheduling,
    stages: int | None,
    devices: int | Sequence[Any] | None,
    by_memory: bool = False,
    speeds: float | Sequence[float] | None = None,
    bandwidth: float | None = None,
    memory: float | Sequence[float] | None = None,
    optimizer: float = 2.0,
) -> tuple[int, ...]:
    """`balance` of costs."""
    places = _places(len(costs.names), scheduling, stages, devices, costs.microbatches)
    count = 1 + max(places)
    speed = _for_each("speeds", 1.0 if speeds is None else speeds, count)
    limits = _for_each("memory", math.inf if memory is None else memory, count)
    if bandwidth is not None and not (_is_number(bandwidth) and bandwidth > 0):
        raise ValueError(
            f"`balance(bandwidth={bandwidth!r})`: bytes per second, more than 0"
        )
    if not _is_number(optimizer) or optimizer < 0:
        raise ValueError(
            f"`balance(optimizer={optimizer!r})`: bytes of state for each byte of "
            "parameters, 0 or more"
        )
    if (
        bandwidth is not None
        and speeds is None
        and costs.unit in ("FLOP", "byte")
        and not by_memory
    ):
        raise ValueError(
            "`balance(bandwidth=...)`: bytes per second cannot be weighed against "
            f"{costs.unit}s: give `speeds=` too, in "
            f"{costs.unit}s per second"
        )
    tables = Tables(costs, places, scheduling, optimizer)
    if by_memory:
        share = [1.0 if math.isinf(limit) else max(limit, 1.0) for limit in limits]

        def cost(s: int) -> Table:
            return tables.memory(s) / share[places[s]]
    else:

        def cost(s: int) -> Table:
            work = tables.work(s) / speed[places[s]]
            return work if bandwidth is None else work + tables.link(s) / bandwidth

    limited = memory is not None
    cut = best_cut(
        Task(
            len(costs.names),
            places,
            cost,
            tables.received,
            tables.memory if limited else None,
            limits,
        )
    )
    if isinstance(cut, Short):
        raise ValueError(_unfit(cut, costs, scheduling))
    return cut


def _known(layers: Any) -> LayerCosts | None:
    """Costs, if they were given."""
    if isinstance(layers, LayerCosts):
        return layers
    values = layers.tolist() if isinstance(layers, np.ndarray) else layers
    if (
        not isinstance(values, (list, tuple))
        or not values
        or not any(map(_is_number, values))
    ):
        return None
    if not all(map(_is_number, values)):
        raise TypeError(
            "`balance(costs)`: one number for each layer, or layers, not both"
        )
    if not all(math.isfinite(v) and v >= 0 for v in values):
        raise ValueError(
            f"`balance({values!r})`: costs are finite numbers that are not negative"
        )
    return LayerCosts.given(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _places(
    layers: int,
    scheduling: Scheduling,
    stages: int | None,
    devices: int | Sequence[Any] | None,
    microbatches: int,
) -> tuple[int, ...]:
    """For each stage its device."""
    call = f"`balance(stages={stages!r}, devices={devices!r})`"
    available = len(devices) if isinstance(devices, Iterable) else devices
    for name, value in (("stages", stages), ("devices", available)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{call}: {name} is a number, at least 1")
    if stages is None:
        stages = scheduling.stages(
            len(jax.devices()) if available is None else available, microbatches, layers
        )
    if stages > layers:
        raise ValueError(
            f"{call}: every stage has at least one layer, but there are {layers} "
            f"layers for {stages} stages"
        )
    places = scheduling.stage_to_device(
        stages, stages if available is None else available, microbatches
    )
    if available is not None and max(places) >= available:
        raise ValueError(
            f"{call}: the schedule puts {stages} stages on {1 + max(places)} devices; "
            "give fewer stages, or more devices"
        )
    return places


def _for_each(name: str, value: Any, devices: int) -> tuple[float, ...]:
    """One number for each device."""
    values = tuple(value) if isinstance(value, Iterable) else (value,) * devices
    if not all(_is_number(v) and v > 0 for v in values):
        raise ValueError(
            f"`balance({name}={value!r})`: a number more than 0, or one for each device"
        )
    if len(values) < devices:
        raise ValueError(
            f"`balance({name}={value!r})`: {len(values)} numbers for {devices} devices"
        )
    return values[:devices]


def _unfit(short: Short, costs: LayerCosts, scheduling: Scheduling) -> str:
    where = (
        f"device {short.device}"
        if short.stage is None
        else f"stage {short.stage} (device {short.device})"
    )
    cures = ["give more devices", "more chunks"]
    if costs.checkpoint != "always":
        cures.append("checkpoint='always'")
    cures.append(
        "or a schedule that holds fewer microbatches than "
        f"{getattr(scheduling.option, 'name', scheduling.option)!r}"
    )
    found = "does not fit" if short.proven else "found no cut that fits"
    return f"`balance(...)`: {found}: short by {short.missing / 2**20:.4g} MiB on {where}; {', '.join(cures)}"
