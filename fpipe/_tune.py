"""`tune`: a pipe's balance, number of microbatches, schedule and checkpoint mode,
chosen by predictions.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax

from fpipe._core.caches import Recent
from fpipe._core.pytrees import PyTree
from fpipe._executors.call import Args, Call
from fpipe._executors.scan.mesh import stage_devices
from fpipe._executors.scan.packing import Packed
from fpipe._model.loss import Loss, Reduction, as_loss
from fpipe._model.microbatch import cut_inputs
from fpipe._model.needs import call_needs
from fpipe._pipe import Pipe, predicted
from fpipe._planning.balance import balance
from fpipe._planning.costs import LayerCosts
from fpipe._planning.layer_costs import layer_costs
from fpipe._planning.predict import Options, mean_square
from fpipe._planning.prediction import Prediction, quantity, size, table

# What is tried if nothing is said.
SCHEDULES = ("gpipe", "1f1b", "eager_1f1b", "zb_h1", "interleaved_1f1b", "zb_v")
CHECKPOINTS = ("never", "except_last", "always")

# Traces that the candidates share.
_TRACES = 4096


class Candidate(NamedTuple):
    """A way to set up a pipe, and what it is predicted to take.

    Attributes:
        pipe: ready to use; `None` where there is none.
        prediction: of a training step.
        refused: why it is none, if it is none.
    """

    schedule: Any
    checkpoint: Any
    chunks: int
    pipe: Pipe | None = None
    prediction: Prediction | None = None
    refused: str = ""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """All candidates, the best first; it prints as a table.

    Attributes:
        candidates: those that fit, by the time of a step per row of the batch, then
            those that do not.
        unit: of times: `"FLOP"` or `"second"`.
    """

    candidates: tuple[Candidate, ...]
    unit: str

    @property
    def best(self) -> Candidate:
        """The fastest that fits.

        Raises:
            ValueError: none fits.
        """
        first = self.candidates[0]
        if first.pipe is None or first.refused:
            raise ValueError(
                f"`fpipe.tune(...)`: no candidate fits; the nearest: {first.refused}"
            )
        return first

    @property
    def pipe(self) -> Pipe:
        """The fastest that fits."""
        found = self.best.pipe
        assert found is not None
        return found

    @property
    def why(self) -> str:
        """What speaks for the best."""
        best, others = (
            self.best,
            [
                c
                for c in self.candidates[1:]
                if c.prediction is not None and not c.refused
            ],
        )
        own = best.prediction
        assert own is not None
        text = (
            f"{best.schedule}, chunks={best.chunks}, checkpoint={best.checkpoint!r}: "
            f"step {quantity(own.step, self.unit)}, "
            f"bubble {own.bubble:.0%}, peak {size(own.peak)}"
        )
        reasons = []
        for field, what in (
            ("schedule", "schedule"),
            ("chunks", "number of microbatches"),
            ("checkpoint", "checkpoint mode"),
        ):
            same = [f for f in ("schedule", "chunks", "checkpoint") if f != field]
            rest = [
                c
                for c in others
                if all(getattr(c, f) == getattr(best, f) for f in same)
            ]
            if rest:
                next_ = rest[0]
                assert next_.prediction is not None
                longer = next_.prediction.step / own.step - 1 if own.step else 0.0
                reasons.append(
                    f"the next best {what} ({getattr(next_, field)}) takes "
                    f"{longer:.1%} longer"
                    if longer > 0.0005
                    else f"the {what} {getattr(next_, field)} takes as long, and needs "
                    f"{size(next_.prediction.peak)}"
                )
        short = [c for c in self.candidates if c.refused and c.prediction is not None]
        if short:
            reasons.append(f"{len(short)} candidates do not fit")
        return "\n- ".join([text, *reasons])

    def __str__(self) -> str:
        head = [
            "schedule",
            "chunks",
            "checkpoint",
            "balance",
            "step",
            "bubble",
            "peak",
            "",
        ]
        rows = []
        for c in self.candidates:
            own = c.prediction
            said = (
                ["", "", ""]
                if own is None
                else [
                    quantity(own.step, self.unit),
                    f"{own.bubble:.1%}",
                    size(own.peak),
                ]
            )
            balance = "" if c.pipe is None else str(list(c.pipe.balance))
            rows.append(
                [
                    str(c.schedule),
                    str(c.chunks),
                    str(c.checkpoint),
                    balance,
                    *said,
                    c.refused,
                ]
            )
        lines = table(head, rows, left=(0, 2, 3, 7))
        return f"{lines}\n\n{self.why}" if not self.candidates[0].refused else lines


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
    by: Literal["flops", "time"] = "flops",
    speed: float | Sequence[float] | None = None,
    latency: float = 0.0,
    bandwidth: float | None = None,
    optimizer: float = 2.0,
    compiled: bool = False,
    has_aux: bool = False,
    reduction: Reduction = "mean",
    side: PyTree = None,
    key: Any = None,
    state: Sequence[PyTree] | None = None,
    train: bool = False,
    step: Any = None,
    params: Sequence[PyTree] | None = None,
    **options: Any,
) -> Tuning:
    """Choose balance, number of microbatches, schedule and checkpoint mode by what
    `Pipe.plan` predicts, and say why.

    All combinations are predicted, and those that fit into `memory` are put in the
    order of the time of a step; where two take as long, the one that needs less memory
    is first. From shapes alone, but for `by="time"`. What a prediction does not see,
    tuning does not see either: that smaller microbatches keep a device less busy (but
    for `by="time"`, which measures the programs of each), and what programs need for
    themselves (but for `compiled=True`).

    Arguments:
        layers: as for `Pipe`; each balance is then found by FLOPs, under the memory
            limit. Or a function `f(schedule=, checkpoint=, chunks=) -> Pipe`, which may
            choose a balance itself, or look at fewer of these.
        x, targets, side, key, state, train, step, params, loss_fn, has_aux, reduction: as for
            `Pipe.plan`; shapes will do.

    Other Arguments:
        memory: bytes that a device has, one number or one for each. Default no limit.
        devices: default those of `mesh=`, if that is given, else `jax.devices()`.
        chunks: the numbers of microbatches to try, one or several; default the divisors
            of the batch from the number of devices to eight times that.
        schedules, checkpoints: what to try, one or several.
        by, speed, latency, bandwidth, optimizer, compiled: as for `Pipe.plan`.
        options: further arguments of `Pipe`, but for `balance` and `sample`:
            `executor="scan"`, `compute_dtype=`, ….

    Returns:
        A `Tuning`: `tuning.pipe` is the best, `print(tuning)` has the table of the
        candidates and the reasons.

    Raises:
        TypeError, ValueError: nothing to try, or an argument is wrong.

    Example:
        >>> dense = fpipe.Layer(lambda w, x: jnp.tanh(x @ w), init=lambda key, x: jnp.eye(3))
        >>> x = jax.ShapeDtypeStruct((8, 3), jnp.float32)
        >>> tuning = fpipe.tune([dense] * 4, x, devices=[jax.devices()[0]] * 2, schedules=["gpipe", "zb_h1"])
        >>> tuning.pipe.schedule, tuning.pipe.chunks
        ('zb_h1', 8)
    """
    mesh = options.get("mesh")
    if mesh is not None:
        devices = stage_devices(mesh, devices)
    chosen = sorted({"balance", "schedule", "checkpoint", "sample"} & set(options))
    if chosen:
        raise TypeError(
            f"`fpipe.tune(..., {chosen[0]}=...)`: tune chooses it; what it may choose "
            "from are `schedules=`, `checkpoints=` and "
            "`chunks=`, and a function in place of layers makes pipes as it likes"
        )
    places = jax.devices() if devices is None else list(devices)
    if isinstance(params, Packed):
        params = params.packing.whole
    given = {
        "by": by,
        "speed": speed,
        "latency": latency,
        "bandwidth": bandwidth,
        "optimizer": optimizer,
    }
    wanted = Options.of(
        "fpipe.tune", len(places), **given, memory=memory, compiled=compiled
    )
    loss = as_loss(
        "tune", mean_square if loss_fn is None else loss_fn, has_aux, reduction
    )
    needs = call_needs(side=side, key=key, train=train, step=step)
    args = Args(params, x, targets, needs, state)
    make = (
        _Layers(list(layers), args, places, wanted, options)
        if isinstance(layers, Iterable)
        else _Factory(layers, options)
    )
    numbers = _divisors(args, len(places)) if chunks is None else _several(chunks)
    every = itertools.product(numbers, _several(checkpoints), _several(schedules))
    tried = [_candidate(make, s, c, n, args, loss, wanted) for n, c, s in every]
    if not tried:
        raise ValueError(
            "`fpipe.tune(...)`: nothing to try: schedules, checkpoints and chunks need "
            "an entry each"
        )
    return Tuning(tuple(sorted(tried, key=_rank)), wanted.unit)


def _rank(c: Candidate) -> tuple[Any, ...]:
    """Those that fit, fastest first; then those that are too large, nearest first; then
    those that are none.
    """
    if c.prediction is None:
        return 2, 0.0, 0
    own = c.prediction
    if c.refused:
        return 1, max(d.missing for d in own.devices), 0
    # Sums of floats differ in their last digits.
    return 0, float(f"{own.step:.9e}"), own.peak


def _several(options: Any) -> list[Any]:
    """What is to be tried: one is enough."""
    return (
        list(options)
        if isinstance(options, Iterable) and not isinstance(options, str)
        else [options]
    )


def _divisors(args: Args, devices: int) -> list[int]:
    rows = sum(next(iter(cut_inputs(args.inputs, 1).columns), (1,)))
    return [n for n in range(devices, 8 * devices + 1) if rows % n == 0] or [rows]


class _Layers:
    """Pipes of the same layers, balanced by FLOPs; what one has traced the others find."""

    def __init__(
        self,
        layers: Sequence[Any],
        args: Args,
        devices: Sequence[Any],
        wanted: Options,
        options: dict[str, Any],
    ) -> None:
        self.layers, self.args, self.devices, self.wanted, self.options = (
            layers,
            args,
            devices,
            wanted,
            options,
        )
        self.kept = Recent(_TRACES)
        self._costs: dict[Any, LayerCosts] = {}

    def __call__(self, schedule: Any, checkpoint: Any, chunks: int) -> Pipe:
        known, wanted = self.costs(checkpoint, chunks), self.wanted
        cut = balance(
            known,
            devices=len(self.devices),
            speeds=wanted.speed,
            memory=wanted.memory,
            optimizer=wanted.optimizer,
            schedule=schedule,
        )
        devices = None if "mesh" in self.options else self.devices
        return Pipe(
            self.layers, cut, devices, chunks, checkpoint, schedule, **self.options
        )

    def costs(self, checkpoint: Any, chunks: int) -> LayerCosts:
        """Of the layers. They are counted once for a number of microbatches:
        recomputation is no part of them.
        """
        kind = checkpoint if callable(checkpoint) else None
        if (kind, chunks) not in self._costs:
            args = self.args
            self._costs[kind, chunks] = layer_costs(
                self.layers,
                args.x,
                side=args.needs["side"],
                chunks=chunks,
                params=args.params,
                checkpoint=checkpoint,
                compute_dtype=self.options.get("compute_dtype"),
                train=args.needs["train"],
            )
        return dataclasses.replace(self._costs[kind, chunks], checkpoint=checkpoint)


class _Factory:
    """Pipes that the user's function makes, of the arguments that it names."""

    kept = None

    def __init__(self, f: Any, options: dict[str, Any]) -> None:
        if isinstance(f, Call) or not callable(f):
            got = "a Pipe: give its `layers`" if isinstance(f, Call) else repr(f)
            raise TypeError(
                "`fpipe.tune(layers, x)`: layers, or a function that makes a Pipe, "
                f"got {got}"
            )
        if options:
            raise TypeError(
                "`fpipe.tune(f, x)`: the function makes the pipe, so "
                f"{sorted(options)} belong into it"
            )
        named = inspect.signature(f).parameters.values()
        every = any(p.kind is p.VAR_KEYWORD for p in named)
        self.f, self.names = (
            f,
            [n for n in _NAMES if every or n in {p.name for p in named}],
        )

    def __call__(self, schedule: Any, checkpoint: Any, chunks: int) -> Pipe:
        given: dict[str, Any] = dict(
            zip(_NAMES, (schedule, checkpoint, chunks), strict=True)
        )
        pipe = self.f(**{name: given[name] for name in self.names})
        if not isinstance(pipe, Pipe):
            raise TypeError(
                f"`fpipe.tune(f, x)`: the function returned {pipe!r}, no fpipe.Pipe"
            )
        return pipe

    def costs(self, checkpoint: Any, chunks: int) -> None:
        """Not known: each pipe may have other layers."""


_NAMES = ("schedule", "checkpoint", "chunks")


def _candidate(
    make: _Layers | _Factory,
    schedule: Any,
    checkpoint: Any,
    chunks: int,
    args: Args,
    loss: Loss,
    wanted: Options,
) -> Candidate:
    label = (_name(schedule), _name(checkpoint))
    try:
        pipe = make(schedule, checkpoint, chunks)
        own = predicted(
            pipe, args, loss, 0, None, wanted, make.kept, make.costs(checkpoint, chunks)
        )
    except (
        ValueError
    ) as error:  # too few layers, a batch that cannot be cut so, no cut that fits
        return Candidate(*label, chunks, refused=str(error).splitlines()[0])
    worst = max(
        (d for d in own.devices if d.missing), key=lambda d: d.missing, default=None
    )
    refused = (
        ""
        if worst is None
        else f"does not fit: short by {size(worst.missing)} on device {worst.device}"
    )
    return Candidate(*label, chunks, pipe, own, refused)


def _name(option: Any) -> str:
    return (
        option
        if isinstance(option, str)
        else str(getattr(option, "name", getattr(option, "__name__", option)))
    )
