"""The candidates of `tune`: a pipe and its prediction for each combination of options.

In: a combination, and what pipes are made of. Out: its `Candidate`, or two, if it fits
into the devices' memory only with copies to the host's. Of layers, or of a function:

    Setup("1f1b", "never", chunks=8)  ->  schedule  chunks  offload      peak
                                          1f1b           8           10.9 KiB  refused
                                          1f1b           8        2  7.93 KiB

`OfLayers` balances the same layers for each combination, and `OfFunction` calls a
function of the user's. A combination that is refused is a candidate too: it has the
reason in place of a prediction.
"""

import abc
import dataclasses
import inspect
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fpipe._core.caches import Recent
from fpipe._core.checks import as_compute_dtype
from fpipe._core.errors import shown
from fpipe._executors.added_actions import (
    EXPLICIT_RECOMPUTE,
    Recompute,
    as_offload,
    as_recompute,
    with_actions,
)
from fpipe._executors.call import Call, check_chunks
from fpipe._executors.scheduling import Scheduling
from fpipe._model.batch_norm import deferred
from fpipe._model.function_layers import model_of
from fpipe._model.model import Model
from fpipe._model.remat import Remat
from fpipe._pipe import Pipe
from fpipe._planning.balance import DoesNotFitError, best_balance
from fpipe._planning.balance import stage_devices as balance_devices
from fpipe._planning.costs import LayerCosts
from fpipe._planning.hardware import PlanOptions
from fpipe._planning.layer_costs import costs_of
from fpipe._planning.predict import KnownLayers
from fpipe._planning.prediction import Prediction
from fpipe._planning.step_request import StepRequest
from fpipe._planning.text import option_name, size
from fpipe._tuning import Candidate

# Traces that the candidates share. More than any sensible number of candidates makes:
# the limit is only there so that memory does not grow without end.
_TRACES = 4096

# What of a device's memory may wait in the memory of the host.
_COPIED = ("residuals", "boundaries", "skips")


def several(options: Any) -> list[Any]:
    """A list of options, from several or from one."""
    if isinstance(options, Iterable) and not isinstance(options, str):
        return list(options)
    return [options]


class Setup(NamedTuple):
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


class Source(abc.ABC):
    """The source of candidates.

    Arguments:
        step: the training step that every candidate runs.
        options: the options of the predictions.
    """

    def __init__(self, step: StepRequest, options: PlanOptions) -> None:
        self.step, self.options = step, options

    @abc.abstractmethod
    def pipe(self, setup: Setup) -> Pipe:
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
    def prediction(self, pipe: Pipe, setup: Setup) -> Prediction:
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
            return several(asked)
        recomputes = Remat.of(checkpoint).option != "never"
        if recomputes and self.chooses("recompute"):
            return list(EXPLICIT_RECOMPUTE)
        return ["auto"]

    def candidates(self, setup: Setup, copies: bool) -> list[Candidate]:
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

    def _with_copies(self, setup: Setup, plain: Candidate) -> Candidate | None:
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

    def _tried(self, setup: Setup) -> _Tried:
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


class OfLayers(Source):
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

    def pipe(self, setup: Setup) -> Pipe:
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

    def prediction(self, pipe: Pipe, setup: Setup) -> Prediction:
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

    def _costs_of(self, setup: Setup) -> LayerCosts:
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


class OfFunction(Source):
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
        self._names = [name for name in Setup._fields if every or name in named]

    def chooses(self, option: str) -> bool:
        """Whether an option of the pipe makes a difference."""
        return option in self._names

    def pipe(self, setup: Setup) -> Pipe:
        pipe = self._f(**{name: getattr(setup, name) for name in self._names})
        if not isinstance(pipe, Pipe):
            raise TypeError(
                f"`fpipe.tune(f, x)`: the function returned {shown(pipe)}, no "
                "fpipe.Pipe"
            )
        return pipe

    def prediction(self, pipe: Pipe, setup: Setup) -> Prediction:
        del setup  # pipes may differ in anything, and share nothing
        return pipe._plan(self.step_of(pipe), self.options)

    def step_of(self, pipe: Pipe) -> StepRequest:
        """The step as the layers of a pipe take it."""
        args = self.step.args
        x, needs = pipe._trees.inputs(args.x, args.needs)
        args = args._replace(x=x, needs=needs)
        return dataclasses.replace(super().step_of(pipe), args=args)
