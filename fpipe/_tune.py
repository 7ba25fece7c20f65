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

    _tuning.py             candidates, and what is found, as text
    _measured_steps.py     runs candidates
"""

import abc
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax

from fpipe._core.caches import Recent
from fpipe._core.checks import as_bool, as_compute_dtype, as_int, is_one_of
from fpipe._core.errors import shown
from fpipe._core.meshes import in_tracing_context
from fpipe._core.pytrees import PyTree
from fpipe._executors.added_actions import (
    EXPLICIT_RECOMPUTE,
    Recompute,
    as_offload,
    as_recompute,
    with_actions,
)
from fpipe._executors.call import Args, Call, check_chunks
from fpipe._executors.placement import as_placements
from fpipe._executors.scan.packing import Packed
from fpipe._executors.scheduling import Scheduling
from fpipe._executors.stage_places import stage_places
from fpipe._measured_steps import Failed, measured_steps
from fpipe._model.batch_norm import deferred
from fpipe._model.frozen import Frozen, check_frozen
from fpipe._model.function_layers import (
    FunctionLayers,
    inputs_by_layer,
    model_of,
    params_by_layer,
    state_by_layer,
)
from fpipe._model.loss import Reduction, as_loss
from fpipe._model.microbatch import cut_inputs
from fpipe._model.model import Model
from fpipe._model.needs import call_needs
from fpipe._model.remat import Remat
from fpipe._pipe import Pipe
from fpipe._pipe_arguments import EXECUTORS
from fpipe._planning.balance import DoesNotFitError, best_balance
from fpipe._planning.balance import stage_devices as balance_devices
from fpipe._planning.costs import LayerCosts
from fpipe._planning.hardware import PlanOptions
from fpipe._planning.layer_costs import costs_of
from fpipe._planning.predict import KnownLayers, mean_square
from fpipe._planning.prediction import Prediction
from fpipe._planning.step_request import StepRequest
from fpipe._planning.text import option_name, size
from fpipe._tuning import Candidate, Tuning, as_list, predicted_order

# The defaults of `schedules` and `checkpoints`.
SCHEDULES = ("gpipe", "1f1b", "eager_1f1b", "zb_h1", "interleaved_1f1b", "zb_v")
CHECKPOINTS = ("never", "except_last", "always")

# Traces that the candidates share. More than any sensible number of candidates makes:
# the limit is only there so that memory does not grow without end.
_TRACES = 4096


# What of a device's memory may wait in the memory of the host.
_COPIED = ("residuals", "boundaries", "skips")


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
            f"`fpipe.tune(measure=...)`: all {len(failed)} candidates failed that were "
            f"to be measured:{as_list(failed)}"
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
) -> tuple[list[Candidate], "_Source"]:
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
        source = _OfLayers(layers, request, devices, wanted, options)
    else:
        source = _OfFunction(layers, request, wanted, options)
    chunks, schedules = values.chunks, values.schedules
    if chunks is None:
        chunks = _divisors(request.args, len(devices))
    if schedules is SCHEDULES:
        # One that was named and does not go is told; of the others nobody asked. If
        # none goes, all are told.
        schedules = [n for n in SCHEDULES if source.has_layers_for(n)] or SCHEDULES
    # By number of microbatches first, because each number needs new traces of layers.
    every = itertools.product(
        _several(chunks), _several(values.checkpoints), _several(schedules)
    )
    tried: list[Candidate] = []
    for n, checkpoint, schedule in every:
        for recompute in source.recomputes(values.recomputes, checkpoint):
            setup = _Setup(schedule, checkpoint, n, recompute)
            for limit in _limits(values.offloads):
                given = setup._replace(offload=limit)
                tried += source.candidates(given, copies=values.offloads is None)
    return sorted(tried, key=_rank), source


@in_tracing_context
def _steps_of(
    candidates: Sequence[Candidate], source: "_Source"
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
    for number in _several(chunks) if chunks is not None else ():
        check_chunks("Pipe", number)
    for schedule in _several(schedules):
        Scheduling.of(schedule)
    for checkpoint in _several(checkpoints):
        Remat.of(checkpoint)
    for recompute in _several(recomputes) if recomputes is not None else ():
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


def _several(options: Any) -> list[Any]:
    """A list of options, from several or from one."""
    if isinstance(options, Iterable) and not isinstance(options, str):
        return list(options)
    return [options]


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


class _Setup(NamedTuple):
    """One combination to try. The names are those of the arguments of `Pipe`."""

    schedule: Any
    checkpoint: Any
    chunks: int
    recompute: Recompute = "auto"
    offload: Any = None


class _Tried(NamedTuple):
    """A candidate, and whether all that it lacks is memory."""

    candidate: Candidate
    too_large: bool


class _Source(abc.ABC):
    """The source of candidates.

    Arguments:
        step: the training step that every candidate runs.
        options: the options of the predictions.
    """

    def __init__(self, step: StepRequest, options: PlanOptions) -> None:
        self.step, self.options = step, options

    @abc.abstractmethod
    def pipe(self, setup: _Setup) -> Pipe:
        """The pipe of a combination of options."""

    def has_layers_for(self, schedule: str) -> bool:
        """Whether a schedule makes stages of so many layers on these devices."""
        del schedule  # a function makes what it makes
        return True

    def step_of(self, pipe: Pipe) -> StepRequest:
        """The step as the layers of a pipe take it."""
        frozen = pipe._layer_frozen(self.step.frozen)
        return dataclasses.replace(self.step, frozen=frozen)

    @abc.abstractmethod
    def prediction(self, pipe: Pipe, setup: _Setup) -> Prediction:
        """The predicted time and memory of the pipe."""

    def chooses(self, option: str) -> bool:
        """Whether an option of the pipe makes a difference."""
        del option
        return True

    def recomputes(self, asked: Any, checkpoint: Any) -> list[Recompute]:
        """The values of `recompute` to try.

        Arguments:
            asked: what the user asks for; `None`: nothing.
        """
        if asked is not None:
            return _several(asked)
        recomputes = Remat.of(checkpoint).option != "never"
        if recomputes and self.chooses("recompute"):
            return list(EXPLICIT_RECOMPUTE)
        return ["auto"]

    def candidates(self, setup: _Setup, copies: bool) -> list[Candidate]:
        """The candidate of a combination, also where it is refused: its reason is told.

        Arguments:
            copies: whether to add one that is too large with copies to the host.
        """
        tried = self._tried(setup)
        plain = tried.candidate
        if not (copies and tried.too_large and self.chooses("offload")):
            return [plain]
        with_copies = self._with_copies(setup, plain)
        if with_copies is not None:
            return [plain, with_copies]
        refused = f"{plain.refused}; no copies to the host make it fit"
        return [plain._replace(refused=refused)]

    def _with_copies(self, setup: _Setup, plain: Candidate) -> Candidate | None:
        """A candidate that is too large, with as few copies to the host as make it fit;
        `None`: none do.

        Arguments:
            plain: without copies.
        """
        # A device has two stages at most, under a schedule with a name.
        high = 2 * setup.chunks + 1
        if plain.prediction is not None:
            high = max(plain.prediction.timeline.peak_live)
            # What copies cannot take away must fit anyhow.
            for row in plain.prediction.devices:
                if row.missing > sum(row.memory.get(role, 0) for role in _COPIED):
                    return None
        # Fewer live microbatches take less memory, until fewer cannot be.
        found: Candidate | None = None
        low = 0
        while high - low > 1:
            middle = (low + high) // 2
            tried = self._tried(setup._replace(offload=middle))
            if tried.too_large:
                high = middle
                continue
            low = middle
            if not tried.candidate.refused:
                found = tried.candidate
        return found

    def _tried(self, setup: _Setup) -> "_Tried":
        """The pipe and its prediction, or the reason why there is none: too few layers,
        a batch that cannot be cut into these microbatches, or no cut that fits.
        """
        none = Candidate(
            option_name(setup.schedule),
            option_name(setup.checkpoint),
            setup.chunks,
            recompute=setup.recompute,
            offload=setup.offload,
        )
        # A `TypeError` is raised: it says that the arguments of `tune` are wrong, and
        # then they are wrong for all candidates.
        try:
            pipe = self.pipe(setup)
            prediction = self.prediction(pipe, setup)
        except ValueError as error:
            refused = str(error).splitlines()[0]
            too_large = isinstance(error, DoesNotFitError)
            return _Tried(none._replace(refused=refused), too_large)
        # A pipe that is too large is kept with its prediction. If no candidate fits, a
        # user needs to know how many bytes are missing.
        worst = max(prediction.devices, key=lambda row: row.missing)
        refused = ""
        if worst.missing:
            missing = size(worst.missing)
            refused = f"does not fit: short by {missing} on device {worst.device}"
        found = none._replace(pipe=pipe, prediction=prediction, refused=refused)
        return _Tried(found, too_large=bool(refused))


class _OfLayers(_Source):
    """Pipes of the same layers, balanced by what `layer_costs` finds by default. They
    share their traces.

    Arguments:
        arguments: the other arguments of `Pipe`.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        step: StepRequest,
        devices: Sequence[Any],
        options: PlanOptions,
        arguments: dict[str, Any],
    ) -> None:
        super().__init__(step, options)
        self._layers, self._devices, self._arguments = layers, devices, arguments
        dtype = as_compute_dtype("Pipe", arguments.get("compute_dtype"))
        # One model for all candidates: its layers' Python runs once for each shape.
        self._model = model_of(layers, dtype)
        self._traces = Recent(_TRACES)
        if arguments.get("deferred_batch_norm"):
            self._model = Model(deferred(self._model.layers, "Pipe"), dtype)
        # Wrong for one candidate, wrong for all.
        self._model.check_given(step.args.needs)
        self._costs: dict[Any, LayerCosts] = {}

    def pipe(self, setup: _Setup) -> Pipe:
        # The balance differs between candidates. The schedule decides the number of
        # stages; the checkpoint mode and the memory limits decide which cuts fit.
        costs = self._costs_of(setup)
        scheduling = with_actions(
            Scheduling.of(setup.schedule),
            Remat.of(setup.checkpoint),
            as_recompute(setup.recompute),
            as_offload(setup.offload),
            in_units=self._arguments.get("executor") == "scan",
        )
        stage_to_device = balance_devices(costs, scheduling, None, len(self._devices))
        # By work alone. The prediction counts the traffic between stages.
        hardware = dataclasses.replace(
            self.options.hardware, latency=0.0, bandwidth=None
        )
        balance = best_balance(costs, scheduling, stage_to_device, hardware)
        devices = None if "mesh" in self._arguments else self._devices
        return Pipe(
            self._layers,
            balance,
            devices,
            setup.chunks,
            setup.checkpoint,
            setup.schedule,
            recompute=setup.recompute,
            offload=setup.offload,
            **self._arguments,
        )

    def prediction(self, pipe: Pipe, setup: _Setup) -> Prediction:
        known = KnownLayers(self._model, self._traces, self._costs_of(setup))
        return pipe._plan(self.step_of(pipe), self.options, known)

    def has_layers_for(self, schedule: str) -> bool:
        """Whether a schedule makes stages of so many layers on these devices."""
        scheduling, devices = Scheduling.of(schedule), len(self._devices)
        try:
            stages = scheduling.stages(devices, 1, len(self._model.layers))
            used = scheduling.stage_to_device(stages, devices, 1)
        except ValueError:
            return False
        # All stages on one of several devices are no pipeline.
        return devices == 1 or max(used) > 0

    def _costs_of(self, setup: _Setup) -> LayerCosts:
        """The costs of the layers, counted once for each number of microbatches.

        Recomputation does not change them, except for the values that a policy saves.
        """
        # The modes by name save the same, so they share an entry.
        policy = setup.checkpoint if callable(setup.checkpoint) else None
        key = policy, setup.chunks
        if key not in self._costs:
            chunks = check_chunks("Pipe", setup.chunks)
            remat = Remat.of(setup.checkpoint)
            self._costs[key] = costs_of(self._model, self.step.args, chunks, remat)
        return dataclasses.replace(self._costs[key], checkpoint=setup.checkpoint)


class _OfFunction(_Source):
    """Pipes that the user's function makes, from the arguments that it names.

    Raises:
        TypeError: `f` is no function, or there are arguments of `Pipe` beside it.
    """

    def __init__(
        self,
        f: Any,
        step: StepRequest,
        options: PlanOptions,
        arguments: dict[str, Any],
    ) -> None:
        super().__init__(step, options)
        if isinstance(f, Call) or not callable(f):
            got = "a Pipe: give its `layers`" if isinstance(f, Call) else shown(f)
            raise TypeError(
                "`fpipe.tune(layers, x)`: layers, or a function that makes a Pipe, "
                f"got {got}"
            )
        if arguments:
            raise TypeError(
                "`fpipe.tune(f, x)`: the function makes the pipe, so set "
                f"{sorted(arguments)} in the function"
            )
        # A function that does not name an argument does not depend on it. It is asked
        # for each combination all the same.
        named = inspect.signature(f).parameters
        every = any(p.kind is p.VAR_KEYWORD for p in named.values())
        self._f = f
        self._names = [name for name in _Setup._fields if every or name in named]

    def chooses(self, option: str) -> bool:
        """Whether an option of the pipe makes a difference."""
        return option in self._names

    def pipe(self, setup: _Setup) -> Pipe:
        pipe = self._f(**{name: getattr(setup, name) for name in self._names})
        if not isinstance(pipe, Pipe):
            raise TypeError(
                f"`fpipe.tune(f, x)`: the function returned {shown(pipe)}, no "
                "fpipe.Pipe"
            )
        return pipe

    def prediction(self, pipe: Pipe, setup: _Setup) -> Prediction:
        del setup  # pipes may differ in anything, and share nothing
        return pipe._plan(self.step_of(pipe), self.options)

    def step_of(self, pipe: Pipe) -> StepRequest:
        """The step as the layers of a pipe take it."""
        args = self.step.args
        x, needs = pipe._trees.inputs(args.x, args.needs)
        args = args._replace(x=x, needs=needs)
        return dataclasses.replace(super().step_of(pipe), args=args)
