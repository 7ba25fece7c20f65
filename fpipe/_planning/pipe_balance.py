"""What `Pipe(balance=..., sample=...)` was given, as layers per stage.

balance         sample   the layers of each stage
None            None     as even as possible in number; of the pieces of a function by
                         their estimated costs
[2, 3]          None     as given
None, "flops"   x        found by what the layers cost on the batch `x`

`Pipe(...)` asks here when it is constructed, so no parameters, side inputs or limits
are known. Who has them calls `fpipe.balance`, and gives its result.
"""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fpipe._core.errors import shown
from fpipe._core.pytrees import PyTree
from fpipe._executors.call import Args
from fpipe._executors.placement import Placement
from fpipe._executors.scheduling import MOST_FOR_A_MAP, Scheduling
from fpipe._model.model import Model
from fpipe._model.needs import call_needs, stand_ins
from fpipe._model.remat import Remat
from fpipe._planning.balance import best_balance, found_balance, stage_devices
from fpipe._planning.costs import LayerCosts
from fpipe._planning.hardware import Hardware
from fpipe._planning.layer_costs import UNITS, Gauge, costs_and_spans
from fpipe.schedules import Schedule
from fpipe.schedules._checks import counted


@dataclasses.dataclass(frozen=True)
class PipeSetup:
    """What a pipe consists of before it is cut into stages.

    Attributes:
        params: shapes of the parameters of each layer, where they are known; `None`:
            those that the layers make.
        known_costs: what the layers cost, where it is known without a batch; it is
            asked only if nobody says more.
    """

    model: Model
    scheduling: Scheduling
    remat: Remat
    placements: tuple[Placement, ...]
    chunks: int
    params: Sequence[PyTree] | None = None
    known_costs: Callable[[], LayerCosts | None] = lambda: None

    @property
    def stages(self) -> int:
        """How many it will have if nobody says."""
        layers = len(self.model.layers)
        return self.scheduling.stages(len(self.placements), self.chunks, layers)


def given_balance(
    balance: Any, sample: PyTree, sample_side: PyTree, pipe: PipeSetup
) -> tuple[int, ...]:
    """Layers per stage: those that were given, found by a sample, or as even as
    possible.

    Arguments:
        sample_side: the side inputs of the sample; `None`: none.

    Raises:
        TypeError, ValueError: they are none for this model.
    """
    if sample is not None or (isinstance(balance, str) and balance in UNITS):
        return _found(balance, sample, sample_side, pipe)
    if sample_side is not None:
        raise TypeError(
            "`Pipe(sample_side=...)`: these are the side inputs of a sample: give it "
            "too, `Pipe(..., sample=x, sample_side=side)`"
        )
    layers = len(pipe.model.layers)
    costs = pipe.known_costs() if balance is None else None
    if costs is not None:
        return _by_estimate(costs, pipe)
    if balance is None:
        # The first stages get the layers that are left over: 5 on 3 are (2, 2, 1). The
        # last stage has the loss besides.
        each, rest = divmod(layers, pipe.stages)
        return tuple(each + (s < rest) for s in range(pipe.stages))
    return _checked(balance, layers)


def _by_estimate(costs: LayerCosts, pipe: PipeSetup) -> tuple[int, ...]:
    """Layers per stage by costs that are known without a batch."""
    # The number of microbatches may not be known yet, nor whether a limit of `offload`
    # can be kept. How often a forward runs hardly depends on either.
    scheduling, devices = Scheduling.of(pipe.scheduling.option), len(pipe.placements)
    known = dataclasses.replace(
        costs, microbatches=pipe.chunks, checkpoint=pipe.remat.option
    )
    stage_to_device = stage_devices(known, scheduling, pipe.stages, devices)
    microbatches = min(pipe.chunks, MOST_FOR_A_MAP * (1 + max(stage_to_device)))
    if isinstance(scheduling.option, Schedule):
        microbatches = scheduling.option.microbatches
    known = dataclasses.replace(known, microbatches=microbatches)
    return best_balance(known, scheduling, stage_to_device, Hardware())


def _found(
    balance: Any, sample: PyTree, sample_side: PyTree, pipe: PipeSetup
) -> tuple[int, ...]:
    """Layers per stage by what a sample says that they cost."""
    # A sample alone means what needs no device, and gives the same each time: FLOPs,
    # or the estimate of a function's pieces.
    call, by = f"`Pipe(balance={shown(balance)})`", balance
    if by is not None and (not isinstance(by, str) or by not in UNITS):
        raise TypeError(
            f"{call} and `sample`: a sample is only for a balance that is computed: "
            f"{', '.join(map(repr, UNITS))}; leave one of the two out"
        )
    if sample is None:
        raise TypeError(
            f"{call}: a batch, or its shapes, is needed to find a balance: `Pipe(..., "
            "sample=x)`"
        )
    # As a step that trains is traced.
    needs = call_needs(side=sample_side, train=True)
    _check_side(needs, pipe.model)
    args = Args(pipe.params, sample, needs=needs)
    gauge = Gauge.over(by, pipe.placements)
    try:
        costs, work = costs_and_spans(pipe.model, args, pipe.chunks, pipe.remat, gauge)
    except Exception as error:
        # What goes wrong here is told in the words of a call: `x` and `side`.
        if sample_side is not None:
            error.add_note(
                "(in `Pipe(sample=..., sample_side=...)`: `x` is the sample, and "
                "`side` is `sample_side`)"
            )
        raise
    # Neither speeds nor limits: who knows them calls `fpipe.balance`.
    stage_to_device = stage_devices(
        costs, pipe.scheduling, pipe.stages, len(pipe.placements)
    )
    by_memory = by == "memory"
    return found_balance(
        costs, work, pipe.scheduling, stage_to_device, Hardware(), by_memory
    )


def _check_side(needs: Mapping[str, PyTree], model: Model) -> None:
    """Refuse a sample without the side inputs that layers ask for, and side inputs that
    none asks for, by the name of the argument.
    """
    lacking = model.requiring("side") if needs["side"] is None else ()
    if lacking:
        raise ValueError(
            f"`Pipe(sample=...)`: layer {lacking[0]} {model.layers[lacking[0]].name!r} "
            "asks for side inputs: give those of the sample, or their shapes, too: "
            "`Pipe(..., sample=x, sample_side=side)`"
        )
    try:
        model.check_given(stand_ins(**needs), making=True)
    except ValueError as error:
        raise ValueError(
            "`Pipe(sample_side=...)`: side inputs were given, but no layer asks for "
            "them: a layer asks by a keyword-only parameter, "
            "`def f(params, x, *, side)`"
        ) from error


def _checked(balance: Any, count: int) -> tuple[int, ...]:
    """Layers per stage, each at least one, all of them."""
    call = f"`Pipe(balance={shown(balance)})`"
    if isinstance(balance, (str, bytes)) or not isinstance(balance, Iterable):
        raise TypeError(
            f"{call}: a sequence of layers per stage is needed, such as [{count}]"
        )
    given = list(balance)
    # `operator.index` takes the ints of numpy, and refuses 2.0. A bool is an int for
    # Python, and no number of layers.
    try:
        counts = tuple(operator.index(b) for b in given if not isinstance(b, bool))
    except TypeError:
        counts = ()
    if len(counts) < len(given):
        raise TypeError(f"{call}: layers per stage must be ints")
    if not counts or min(counts) < 1:
        raise ValueError(f"{call}: every stage needs at least one layer")
    if sum(counts) != count:
        raise ValueError(
            f"{call}: that is {counted(sum(counts), 'layer')}, but the model has "
            f"{count}"
        )
    return counts
