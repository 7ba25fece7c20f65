"""`tune`: choose balance, chunks, schedule and checkpoint mode by prediction, or among
the best predictions by measured steps.

Every combination of schedule, checkpoint mode and number of microbatches is a
`Candidate`: a pipe and its prediction, or the reason why there is none. Six equal
layers on three devices of 10,000 bytes:

    schedule  chunks  checkpoint  balance          step  bubble      peak
    1f1b           8  never       [2, 2, 2]  25.4 kFLOP   24.3%  7.93 KiB
    1f1b           4  never       [2, 2, 2]    30 kFLOP   35.9%  9.03 KiB
    gpipe          8  never       [2, 2, 2]  25.4 kFLOP   24.3%  10.9 KiB  does not …

All combinations are tried, because a search could miss the best one. They share the
expensive parts of a prediction: the traces of the layers, and the counts of their work.

    _candidates.py         makes candidates, of layers or of a function
    _tuning.py             candidates, and what is found, as text
    _measured_steps.py     runs candidates
"""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax

from fpipe._candidates import OfFunction, OfLayers, Setup, Source, several
from fpipe._core.checks import as_bool, as_compute_dtype, as_int, is_one_of
from fpipe._core.errors import shown
from fpipe._core.meshes import in_tracing_context
from fpipe._core.pytrees import PyTree
from fpipe._executors.added_actions import as_offload, as_recompute
from fpipe._executors.call import Args, check_chunks
from fpipe._executors.placement import as_placements
from fpipe._executors.scan.packing import Packed
from fpipe._executors.scheduling import Scheduling
from fpipe._executors.stage_places import stage_places
from fpipe._measured_steps import Failed, measured_steps
from fpipe._model.frozen import Frozen, check_frozen
from fpipe._model.function_layers import (
    FunctionLayers,
    inputs_by_layer,
    params_by_layer,
    state_by_layer,
)
from fpipe._model.loss import Reduction, as_loss
from fpipe._model.microbatch import cut_inputs
from fpipe._model.needs import call_needs
from fpipe._model.remat import Remat
from fpipe._pipe import Pipe
from fpipe._pipe_arguments import EXECUTORS
from fpipe._planning.hardware import PlanOptions
from fpipe._planning.predict import mean_square
from fpipe._planning.step_request import StepRequest
from fpipe._tuning import Candidate, Tuning, as_list, predicted_order

# The defaults of `schedules` and `checkpoints`.
SCHEDULES = ("gpipe", "1f1b", "eager_1f1b", "zb_h1", "interleaved_1f1b", "zb_v")
CHECKPOINTS = ("never", "except_last", "always")


def tune(
    layers: Iterable[Any] | Callable[..., Pipe],
    x: PyTree,
    *targets: PyTree,
    loss_fn: Callable[..., Any] | None = None,
    memory: float | Sequence[float] | None = None,
    devices: Iterable[Any] | None = None,
    chunks: int | Iterable[int] | None = None,
    schedules: Any = SCHEDULES,
    checkpoints: Any = CHECKPOINTS,
    recomputes: Any = None,
    offloads: Any = None,
    by: Literal["flops", "time"] = "flops",
    speed: float | Sequence[float] | None = None,
    latency: float = 0.0,
    bandwidth: float | None = None,
    launch: float | None = None,
    host_bandwidth: float | None = None,
    optimizer: float = 2.0,
    compiled: bool = False,
    measure: int = 0,
    has_aux: bool = False,
    reduction: Reduction = "mean",
    argnums: int | Sequence[int] = 0,
    frozen: Frozen | None = None,
    side: PyTree = None,
    key: Any = None,
    state: PyTree = None,
    train: bool = False,
    step: Any = None,
    params: PyTree | None = None,
    **options: Any,
) -> Tuning:
    """Choose balance, chunks, schedule and checkpoint mode by prediction.

    With `measure=k` it runs the best `k`, and chooses by their measured steps.

    Every combination of chunks, schedule and checkpoint mode is a candidate, with the
    best balance for it. `tune` predicts a training step for each candidate, as
    `Pipe.plan` does. It sorts the candidates that fit into `memory` by the time of a
    step. If two take the same time, the one with less memory is first. Predictions come
    from shapes alone; only `by="time"` and `measure` run programs.

    A prediction does not know that small microbatches keep a device less busy;
    `by="time"` measures this. It does not know the memory that programs need for
    themselves; `compiled=True` adds it.

    Arguments:
        layers: layers or an `fpipe.Split`, as for `Pipe`. Each balance is then found by
            FLOPs, or by the estimated time of a split, under the memory limit. Or a
            function `f(schedule=, checkpoint=, chunks=, recompute=, offload=) -> Pipe`,
            with any of these parameters. It may choose the balance itself.
        x, targets, side, key, state, train, step, params: as for `Pipe.plan`, as arrays
            or as shapes.
        loss_fn, has_aux, reduction, argnums, frozen: as for `Pipe.plan`.

    Other Arguments:
        memory: bytes that a device has, one number or one for each device. Default: no
            limit.
        devices: the devices. Default: those of `mesh=` if it is given, otherwise
            `jax.devices()`.
        chunks: the numbers of microbatches to try, one or several. Default: the
            divisors of the number of rows, from the number of devices to eight times
            that number.
        schedules, checkpoints: the schedules and checkpoint modes to try, one or
            several. Default: `"gpipe"`, `"1f1b"`, `"eager_1f1b"`, `"zb_h1"`, and
            `"interleaved_1f1b"` and `"zb_v"` if there are enough layers for several
            stages on each device; `"never"`, `"except_last"` and `"always"`.
        recomputes: the values of `recompute` to try, one or several. Default:
            `"with_backward"` and `"early"`, if the checkpoint mode recomputes anything.
        offloads: the values of `offload` to try, one or several. Default: `None`; and
            for a candidate that does not fit into `memory`, the largest number of live
            microbatches with which it fits.
        by, speed, latency, bandwidth, launch, host_bandwidth, optimizer, compiled: as
            for `Pipe.plan`.
        measure: the number of candidates to run. The first ones by prediction, of those
            that fit, are compiled and run some training steps each, in turns. The one
            with the shortest step is the best. They run with `params`, `x` and the
            other inputs if these are arrays, otherwise with zeros. One candidate's
            parameters are on the devices at a time, without an optimizer's state. A
            candidate that fails is refused with the first line of its error. Over
            several processes an error in a step is raised. Default 0: nothing runs.
        options: other arguments of `Pipe`, such as `executor="scan"` or
            `compute_dtype=`, except `balance`, `sample` and `sample_side`.

    Returns:
        A `Tuning`. `tuning.pipe` is the best pipe, and `print(tuning)` shows the table
        of candidates and the reasons for the best. With `measure` it shows predicted
        and measured steps, and says where they differ by more than 25 %. Predictions in
        FLOPs are compared by their order and ratios alone.

    Raises:
        TypeError, ValueError: there is nothing to try, or an argument is wrong.
        RuntimeError: all candidates that were measured failed; the message has the
            first line of each error.

    Example:
        >>> make = lambda key, x: jnp.eye(3)
        >>> dense = fpipe.Layer(lambda w, x: jnp.tanh(x @ w), init=make)
        >>> x = jax.ShapeDtypeStruct((8, 3), jnp.float32)
        >>> two = [jax.devices()[0]] * 2
        >>> names = ["gpipe", "zb_h1"]
        >>> tuning = fpipe.tune([dense] * 4, x, devices=two, schedules=names)
        >>> tuning.pipe.schedule, tuning.pipe.chunks
        ('zb_h1', 8)
    """
    mesh = options.get("mesh")
    if mesh is not None:
        devices = stage_places(mesh, devices, options.get("executor", "placed"))
    own = {"balance", "schedule", "checkpoint", "sample", "sample_side"}
    own |= {"recompute", "offload"}
    chosen = sorted(own & set(options))
    if chosen:
        raise TypeError(
            f"`fpipe.tune(..., {chosen[0]}=...)`: tune chooses it. Limit the choice by "
            "`schedules=`, `checkpoints=`, `recomputes=`, `offloads=` and `chunks=`, "
            "or give a function that makes the pipe in place of layers"
        )
    known = inspect.signature(Pipe).parameters
    strange = [name for name in options if name not in known]
    if strange and isinstance(layers, Iterable):
        raise TypeError(
            f"`fpipe.tune(..., {strange[0]}=...)`: neither an argument of tune nor of "
            "Pipe"
        )
    if not is_one_of(options.get("executor", "placed"), EXECUTORS):
        raise ValueError(
            f"`fpipe.tune(executor={shown(options['executor'])})`: one of "
            f"{', '.join(map(repr, EXECUTORS))}"
        )
    for name in ("deferred_batch_norm", "detect_anomaly"):
        as_bool("fpipe.tune", name, options.get(name, False))
    measure = as_int("fpipe.tune", "measure", measure, least=0)
    devices = jax.devices() if devices is None else devices
    as_placements(devices)
    devices = list(devices)
    wanted = PlanOptions.checked(
        "fpipe.tune",
        len(devices),
        by,
        compiled,
        speed=speed,
        latency=latency,
        bandwidth=bandwidth,
        launch=launch,
        host_bandwidth=host_bandwidth,
        memory=memory,
        optimizer=optimizer,
    )
    _check_candidates(chunks, schedules, checkpoints, recomputes, offloads)
    check_frozen("fpipe.tune", frozen)
    # Every candidate runs one training step, as shapes.
    fn = mean_square if loss_fn is None else loss_fn
    loss = as_loss("tune", fn, has_aux, reduction)
    needs = call_needs(side=side, key=key, train=train, step=step)
    args = Args(params, x, targets, needs, state)
    request = StepRequest(args, loss, argnums, frozen)
    values = _Values(chunks, schedules, checkpoints, recomputes, offloads)
    tried, source = _search(layers, request, devices, wanted, values, options)
    if not tried:
        raise ValueError(
            "`fpipe.tune(...)`: nothing to try: schedules, checkpoints, chunks, "
            "recomputes and offloads need an entry each"
        )
    given = params if isinstance(params, Packed) else source.step.args.params
    # Those that fit are the first ones.
    fitting = [c for c in tried[:measure] if not c.refused]
    times = measured_steps(_steps_of(fitting, source), given)
    failed = [
        f"{c.options}: {time.error}"
        for c, time in zip(fitting, times, strict=True)
        if isinstance(time, Failed)
    ]
    if failed and len(failed) == len(times):
        raise RuntimeError(
            "`fpipe.tune(measure=...)`: every candidate that was to be measured failed:"
            + as_list(failed)
        )
    return Tuning.of(tried, wanted.unit, times)


class _Values(NamedTuple):
    """The values to try; `None` stands for the default. The names are those of the
    arguments of `tune`.
    """

    chunks: Any
    schedules: Any
    checkpoints: Any
    recomputes: Any
    offloads: Any


# Steps are not measured in this context: a pipe would compile once more outside of it.
@in_tracing_context
def _search(
    layers: Any,
    step: StepRequest,
    devices: Sequence[Any],
    wanted: PlanOptions,
    values: _Values,
    options: dict[str, Any],
) -> tuple[list[Candidate], Source]:
    """All candidates, in the order of their predictions, and what they come from.

    Arguments:
        layers, options: as for `tune`.
        step: what the user gave.
    """
    args = step.args
    if isinstance(args.params, Packed):
        args = args._replace(params=args.params.packing.whole)
    elif isinstance(layers, Iterable):
        params = params_by_layer(layers, args.params)
        args = args._replace(params=params, state=state_by_layer(layers, args.state))
    if isinstance(layers, Iterable):
        dtype = as_compute_dtype("Pipe", options.get("compute_dtype"))
        x, needs = inputs_by_layer(layers, args.x, args.needs, 1, dtype)
        args = args._replace(x=x, needs=needs)
    request = dataclasses.replace(step, args=args)
    if isinstance(layers, Iterable):
        # An iterator could be read once only; a function's pieces stay what they are.
        if not isinstance(layers, FunctionLayers):
            layers = list(layers)
        source = OfLayers(layers, request, devices, wanted, options)
    else:
        source = OfFunction(layers, request, wanted, options)
    chunks, schedules = values.chunks, values.schedules
    if chunks is None:
        chunks = _divisors(request.args, len(devices))
    if schedules is SCHEDULES:
        # One that was named and does not go is told; of the others nobody asked. If
        # none goes, all are told.
        schedules = [n for n in SCHEDULES if source.has_layers_for(n)] or SCHEDULES
    # By number of microbatches first, because each number needs new traces of layers.
    every = itertools.product(
        several(chunks), several(values.checkpoints), several(schedules)
    )
    tried: list[Candidate] = []
    for n, checkpoint, schedule in every:
        for recompute in source.recomputes(values.recomputes, checkpoint):
            setup = Setup(schedule, checkpoint, n, recompute)
            for limit in _limits(values.offloads):
                given = setup._replace(offload=limit)
                tried += source.candidates(given, copies=values.offloads is None)
    return sorted(tried, key=_rank), source


@in_tracing_context
def _steps_of(
    candidates: Sequence[Candidate], source: Source
) -> list[tuple[Pipe, StepRequest]]:
    """The steps of candidates that are not refused."""
    pipes = [c.pipe for c in candidates if c.pipe is not None]
    return [(pipe, source.step_of(pipe)) for pipe in pipes]


def _limits(offloads: Any) -> list[Any]:
    """The values of `offload` that are tried in any case."""
    # A list of limits, and not one limit for each device.
    return list(offloads) if isinstance(offloads, (list, tuple)) else [offloads]


def _check_candidates(
    chunks: Any, schedules: Any, checkpoints: Any, recomputes: Any, offloads: Any
) -> None:
    """Refuse options that no pipe takes. Without this check they would come back as
    candidates that do not fit.
    """
    for number in several(chunks) if chunks is not None else ():
        check_chunks("Pipe", number)
    for schedule in several(schedules):
        Scheduling.of(schedule)
    for checkpoint in several(checkpoints):
        Remat.of(checkpoint)
    for recompute in several(recomputes) if recomputes is not None else ():
        as_recompute(recompute)
    for limit in _limits(offloads):
        as_offload(limit)


def _rank(c: Candidate) -> tuple[int, float, int]:
    """The order of candidates: first those that fit, by time and then memory; then
    those that are too large, by the bytes that they lack; then those without a
    prediction.
    """
    if c.prediction is None:
        return 2, 0.0, 0
    if c.refused:
        return 1, max(d.missing for d in c.prediction.devices), 0
    return 0, *predicted_order(c)


def _divisors(args: Args, devices: int) -> list[int]:
    """The default numbers of microbatches."""
    # Fewer microbatches than devices leave devices idle. More than eight times as many
    # gain next to nothing. Only divisors, because a smaller last microbatch compiles
    # everything twice.
    cut = cut_inputs(args.inputs, 1)
    if cut.ready:
        return [cut.m]
    rows = sum(cut.rows) or 1
    return [n for n in range(devices, 8 * devices + 1) if rows % n == 0] or [rows]
