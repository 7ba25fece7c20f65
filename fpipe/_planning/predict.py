"""A prediction from the plan of a call: the work of its programs, when they run, and
what is alive meanwhile.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from fpipe._core.pytrees import PyTree, Shape, is_inexact, nbytes, pack, zeros
from fpipe._executors.call import Args
from fpipe._executors.placed.compile import compile_plan, traced_runs
from fpipe._executors.placed.dispatch import Bound
from fpipe._executors.placed.executor import Placed
from fpipe._executors.placed.instructions import Plan, Run
from fpipe._executors.placed.memory import peaks
from fpipe._executors.placement import Placement
from fpipe._executors.programs import Inputs
from fpipe._executors.request import inputs_of
from fpipe._executors.scan.executor import Scan
from fpipe._executors.scan.memory import held
from fpipe._executors.scan.mesh import columns
from fpipe._model.loss import Loss
from fpipe._model.remat import Remat
from fpipe._model.stages import TARGETS, Leaf, Port, Stage, X
from fpipe._planning.advice import few, ragged, repeated, short, uneven
from fpipe._planning.balance import balanced
from fpipe._planning.costs import LayerCosts
from fpipe._planning.flops import count
from fpipe._planning.layer_costs import costs_of
from fpipe._planning.prediction import Crossing, DeviceRow, Prediction, StageRow
from fpipe._planning.tables import Tables
from fpipe.schedules import Costs, simulate

By: TypeAlias = Literal["flops", "time"]

# How often a program is run for its time, after one time that is not counted.
_REPEATS = 7


@dataclasses.dataclass(frozen=True)
class Options:
    """What a prediction is asked for: see `Pipe.plan`."""

    by: By = "flops"
    speed: tuple[float, ...] | None = None
    latency: float = 0.0
    bandwidth: float | None = None
    optimizer: float = 2.0
    memory: tuple[float, ...] | None = None
    compiled: bool = False

    @classmethod
    def of(cls, call: str, devices: int, **given: Any) -> "Options":
        """Checked; `speed` and `memory` for each device."""
        if given["by"] not in get_args(By):
            raise ValueError(
                f"`{call}(by={given['by']!r})`: one of "
                f"{', '.join(map(repr, get_args(By)))}"
            )
        for name in ("speed", "memory"):
            value = given[name]
            if value is not None:
                several = isinstance(value, Iterable) and getattr(value, "ndim", 1)
                each: tuple[Any, ...] = tuple(value) if several else (value,) * devices
                if len(each) < devices or not all(
                    _is_number(v) and v > 0 for v in each
                ):
                    raise ValueError(
                        f"`{call}({name}={value!r})`: a number more than 0, or one for "
                        f"each of {devices} devices"
                    )
                given[name] = tuple(float(v) for v in each[:devices])
        for name in ("latency", "optimizer"):
            if not _is_number(given[name]) or given[name] < 0:
                raise ValueError(
                    f"`{call}({name}={given[name]!r})`: a number, 0 or more"
                )
        width = given["bandwidth"]
        if width is not None and not (_is_number(width) and width > 0):
            raise ValueError(
                f"`{call}(bandwidth={width!r})`: bytes per second, more than 0"
            )
        options = cls(**given)
        if options.unit == "FLOP" and (
            options.latency or options.bandwidth is not None
        ):
            raise ValueError(
                f"`{call}(latency=..., bandwidth=...)`: seconds cannot be weighed "
                "against FLOPs: give `speed=` too, in FLOP/s, "
                'or by="time"'
            )
        return options

    @property
    def unit(self) -> str:
        """What work is counted in."""
        return "second" if self.by == "time" or self.speed is not None else "FLOP"


def predict(
    placed: Placed,
    scan: tuple[Scan, Args] | None,
    args: Args,
    loss: Loss,
    argnums: tuple[int, ...],
    remat: Remat,
    options: Options,
    known: LayerCosts | None = None,
) -> Prediction:
    """What a call will take.

    Arguments:
        placed: the pipe's executor; for the scan executor one for the same stages,
            whose programs its ticks run.
        scan: the scan executor, and the call's arguments as it takes them.
        args: the call's arguments, or their shapes.
        known: what the layers cost in FLOPs, if somebody has counted.
    """
    bound = placed.bound(args, loss, argnums)
    plan, stages_of, places = bound.plan, bound.layout.stages, placed.stage_to_device
    inputs = inputs_of(args, [Shape.of(p) for p in args.params], placed.chunks)
    schedule = placed.schedule(inputs.cut.m)
    # The scan executor's memory is that of its own program.
    needed = options.by == "time" or (options.compiled and scan is None)
    compiled = compile_plan(plan, bound.shapes) if needed else {}
    work = _work(bound, places, compiled, options)
    model = stages_of[0].model
    layers = known or costs_of(
        model,
        args.x,
        "flops",
        args.needs["side"],
        placed.chunks,
        args.params,
        remat,
        args.needs["train"],
    )
    stages = _stages(stages_of, places, args.params, layers, work)
    costs = _costs(stages, options)
    timeline = simulate(schedule, costs)
    devices = (
        _devices(bound, args, places, options, compiled)
        if scan is None
        else _on_mesh(*scan, loss, argnums, options)
    )
    words = [
        *uneven(stages, lambda: _best(placed, layers, stages, options)),
        *few(stages, timeline, inputs.cut.m, _more(placed, inputs, costs)),
        *ragged(inputs.cut.shares),
        *repeated(1 + max(places), len(devices)),
        *short(devices),
    ]
    return Prediction(
        executor="placed" if scan is None else "scan",
        checkpoint=str(getattr(remat.option, "__name__", remat.option)),
        microbatches=inputs.cut.m,
        unit=options.unit,
        stages=stages,
        devices=devices,
        schedule=schedule,
        timeline=timeline,
        compiled=options.compiled,
        warnings=(*plan.warnings, *words),
    )


def mean_square(y: PyTree) -> Any:
    """The loss of a step for which none was given."""
    arrays = [
        jnp.abs(a) if jnp.iscomplexobj(a) else a for a in pack(y)[0] if is_inexact(a)
    ]
    return sum(jnp.mean(jnp.square(a.astype(jnp.float32))) for a in arrays)


# --- work ---


def _work(
    bound: Bound, places: Sequence[int], compiled: Mapping[int, Any], options: Options
) -> dict[tuple[str, int], float]:
    """The work of each kind of action on each stage: that of its first microbatch. What
    is equal is looked at once.
    """
    traces = (
        {run.number: run.traced for run in traced_runs(bound.plan, bound.shapes)}
        if options.by == "time"
        else {}
    )
    found: dict[tuple[str, int], float] = {}
    seen: dict[int, float] = {}
    for n, item in enumerate(bound.plan.instructions):
        if (
            not isinstance(item, Run)
            or item.action is None
            or item.code is None
            or (item.action.kind, item.action.stage) in found
        ):
            continue
        kind, s, _ = item.action
        key = id(compiled[n]) if options.by == "time" else id(item.call)
        if key not in seen:
            timed = options.by == "time"
            seen[key] = (
                _seconds(compiled[n], traces[n], item.placement)
                if timed
                else count(item.code, "flops")
            )
        found[kind, s] = seen[key]
    if options.by == "flops" and options.speed is not None:
        return {
            (kind, s): value / options.speed[places[s]]
            for (kind, s), value in found.items()
        }
    return found


def _seconds(compiled: Any, traced: Any, place: Placement) -> float:
    """The shortest of some runs, on zeros; what a run consumes is made anew.

    What else the machine does only adds to a run. The shortest ones of two programs can
    be compared, wherever they were measured.
    """
    infos = traced.args_info[0]
    arrays = place.put([zeros(info) for info in infos])
    taken = []
    for _ in range(1 + _REPEATS):
        given = [
            place.put([zeros(i)])[0] if i.donated else a
            for i, a in zip(infos, arrays, strict=True)
        ]
        jax.block_until_ready(given)
        started = time.perf_counter()
        jax.block_until_ready(compiled(*given))
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def _costs(stages: Sequence[StageRow], options: Options) -> Costs:
    """Of the simulation: a stage has whole backwards, or such that are cut, or both."""
    each = {kind: [row.work.get(kind, 0.0) for row in stages] for kind in "FIW"}
    whole = [
        row.work.get("B", row.work.get("I", 0.0) + row.work.get("W", 0.0))
        for row in stages
    ]
    size = max((row.boundary for row in stages), default=0)
    lag = options.latency + (size / options.bandwidth if options.bandwidth else 0.0)
    return Costs(
        F=each["F"],
        B=whole,
        I=each["I"],
        W=each["W"],
        transfer=lag if options.unit == "second" else 0.0,
    )


# --- stages ---


def _stages(
    stages: Sequence[Stage],
    places: Sequence[int],
    params: Sequence[PyTree],
    costs: LayerCosts,
    work: Mapping[tuple[str, int], float],
) -> tuple[StageRow, ...]:
    at, model = (
        {k: stage.index for stage in stages for k in stage.span},
        stages[0].model,
    )
    sent = [
        (str(skip), own) for skip, own in zip(model.routes, costs.skips, strict=True)
    ]
    sent += [(costs.names[lent.source], lent) for lent in costs.borrowed]
    crossings = [
        (name, at[own.source], reader, int(own.bytes))
        for name, own in sent
        for reader in sorted({at[r] for r in own.readers} - {at[own.source]})
    ]
    return tuple(
        StageRow(
            stage=s,
            device=places[s],
            first=stage.span.start,
            layers=tuple(model.layers[k].name for k in stage.span),
            params=sum(
                math.prod(a.shape) for k in stage.span for a in pack(params[k])[0]
            ),
            work={
                kind: value for (kind, own), value in sorted(work.items()) if own == s
            },
            boundary=0 if stage.last else int(costs.boundaries[stage.span[-1]]),
            stashed=tuple(
                Crossing(name, b, size) for name, a, b, size in crossings if a == s
            ),
            popped=tuple(
                Crossing(name, a, size) for name, a, b, size in crossings if b == s
            ),
        )
        for s, stage in enumerate(stages)
    )


# --- memory ---


def _devices(
    bound: Bound,
    args: Args,
    places: Sequence[int],
    options: Options,
    compiled: Mapping[int, Any],
) -> tuple[DeviceRow, ...]:
    def temporary(n: int) -> int:
        analysis = compiled[n].memory_analysis() if options.compiled else None
        return 0 if analysis is None else analysis.temp_size_in_bytes

    plan, layout = bound.plan, bound.layout
    found = peaks(plan, bound.shapes, _kept(bound, args), temporary)
    rows = []
    for place in dict.fromkeys(layout.placements):
        d = min(d for s, d in enumerate(places) if layout.placements[s] == place)
        peak = found[place]
        own = sum(
            nbytes(bound.shapes[f.slot]) for f in plan.feeds if _is_own(f, plan, place)
        )
        memory: dict[str, int] = {
            **peak.roles,
            "optimizer": int(options.optimizer * own),
        }
        memory["inputs"] = memory.get("inputs", 0) + _unread(bound, args, place)
        if options.compiled:
            memory["temporary"] = peak.temporary
        rows.append(
            DeviceRow(
                d, str(place.device), _ordered(memory), peak.doing, _limit(options, d)
            )
        )
    return tuple(sorted(rows, key=lambda row: row.device))


def _is_own(feed: Any, plan: Plan, place: Placement) -> bool:
    return feed.leaf.port.kind == "params" and plan.slots[feed.slot].placement == place


def _unread(bound: Bound, args: Args, place: Placement) -> int:
    """The bytes of inputs that the caller has on a device where nothing reads them."""
    read = {
        f.leaf for f in bound.plan.feeds if bound.plan.slots[f.slot].placement == place
    }
    here = [
        (a, Leaf(port, k) in read)
        for port, own in _inputs(args).items()
        for k, a in enumerate(own)
        if place.holds(a)
    ]
    counted = {id(a) for a, is_read in here if is_read}
    return sum(
        nbytes(a) for n, a in {id(a): a for a, _ in here}.items() if n not in counted
    )


def _inputs(args: Args) -> dict[Port, list[Any]]:
    return {
        X: pack(args.x)[0],
        Port("side"): pack(args.needs["side"])[0],
        TARGETS: pack(args.targets)[0],
    }


def _kept(bound: Bound, args: Args) -> set[int]:
    """The slots of what stays: parameters, constants, and inputs that the caller has
    where they are read.
    """
    given = _inputs(args)

    def stays(leaf: Leaf, place: Placement) -> bool:
        if leaf.port not in given:
            return True
        array = given[leaf.port][leaf.k]
        return isinstance(array, jax.ShapeDtypeStruct) or place.holds(array)

    plan = bound.plan
    return set(plan.constants) | {
        f.slot for f in plan.feeds if stays(f.leaf, plan.slots[f.slot].placement)
    }


def _on_mesh(
    scan: Scan, args: Args, loss: Loss, argnums: tuple[int, ...], options: Options
) -> tuple[DeviceRow, ...]:
    step = scan.step(args, loss, argnums)
    memory: dict[str, int] = {**held(step)}
    memory["optimizer"] = int(options.optimizer * memory["parameters"])
    if options.compiled:
        memory["temporary"] = max(
            0,
            scan.compiled_bytes(step, args)
            - sum(memory.values())
            + memory["optimizer"],
        )
    return tuple(
        DeviceRow(d, str(device), _ordered(memory), "all along", _limit(options, d))
        for d, column in enumerate(columns(scan.mesh))
        for device in column
    )


_ORDER = (
    "parameters",
    "gradients",
    "optimizer",
    "boundaries",
    "skips",
    "residuals",
    "inputs",
    "outputs",
    "temporary",
)


def _ordered(memory: Mapping[str, int]) -> dict[str, int]:
    return {role: memory[role] for role in _ORDER if role in memory}


def _limit(options: Options, device: int) -> int | None:
    return (
        None
        if options.memory is None or math.isinf(options.memory[device])
        else int(options.memory[device])
    )


# --- what would be better ---


def _best(
    placed: Placed, costs: LayerCosts, stages: Sequence[StageRow], options: Options
) -> tuple[tuple[int, ...], float]:
    """The best balance by FLOPs, and what is left of the dearest stage's work with it,
    as a share.
    """
    speeds, places = options.speed, placed.stage_to_device
    cut = balanced(
        costs, placed.scheduling, len(stages), 1 + max(places), speeds=speeds
    )
    # What is recomputed depends on the stage, so both are measured by what the balance
    # was found by.
    tables = Tables(costs, tuple(places), placed.scheduling, options.optimizer)
    work = [
        tables.work(s) / (speeds[d] if speeds else 1.0) for s, d in enumerate(places)
    ]

    def dearest(balance: Sequence[int]) -> float:
        ends = itertools.accumulate(balance)
        return max(
            float(work[s][end - n, end])
            for s, (n, end) in enumerate(zip(balance, ends, strict=True))
        )

    now = dearest([len(row.layers) for row in stages])
    return cut, dearest(cut) / now if now else 1.0


def _more(placed: Placed, inputs: Inputs, costs: Costs) -> Iterator[tuple[int, float]]:
    """Larger numbers of microbatches that divide the batch, and the bubble with each."""
    rows = sum(next(iter(inputs.cut.columns), ()))
    m = 2 * inputs.cut.m
    while m <= rows and rows % m == 0:
        try:
            bubble = simulate(placed.schedule(m), costs).bubble
        # a schedule for one number of microbatches alone: a function of the user's may
        # say so in any way
        except Exception:
            return
        yield m, bubble
        m *= 2


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
