"""What `Pipe(balance=..., sample=...)` was given, as layers per stage."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from fpipe._core.pytrees import PyTree
from fpipe._executors.placement import Placement
from fpipe._executors.scheduling import Scheduling
from fpipe._model.model import Model
from fpipe._model.remat import Remat
from fpipe._planning.balance import balanced
from fpipe._planning.layer_costs import UNITS, costs_of


def given_balance(
    balance: Any,
    sample: PyTree,
    model: Model,
    scheduling: Scheduling,
    remat: Remat,
    places: Sequence[Placement],
    chunks: int,
) -> tuple[int, ...]:
    """Layers per stage: those that were given, found by a sample, or as even as
    possible.

    Raises:
        TypeError, ValueError: they are none for this model.
    """
    if sample is not None or (isinstance(balance, str) and balance in UNITS):
        return _found(balance, sample, model, scheduling, remat, places, chunks)
    count = len(model.layers)
    if balance is None:
        several = scheduling.stages(len(places), chunks, count)
        return tuple(count // several + (s < count % several) for s in range(several))
    return _checked(balance, count)


def _found(
    balance: Any,
    sample: PyTree,
    model: Model,
    scheduling: Scheduling,
    remat: Remat,
    places: Sequence[Placement],
    chunks: int,
) -> tuple[int, ...]:
    """Layers per stage by what a sample says that they cost."""
    call, by = f"`Pipe(balance={balance!r})`", "flops" if balance is None else balance
    if not isinstance(by, str) or by not in UNITS:
        raise TypeError(
            f"{call} and `sample`: a sample is there to find a balance by: "
            f"{', '.join(map(repr, UNITS))}"
        )
    if sample is None:
        raise TypeError(
            f"{call}: a batch, or its shapes, is needed to find a balance: `Pipe(..., "
            "sample=x)`"
        )
    if model.needing("side"):
        raise ValueError(
            f"{call} and `sample`: layers ask for side inputs; write "
            "`balance=fpipe.balance(layers, x, side=side, ...)`"
        )
    costs = costs_of(
        model, sample, by, None, chunks, None, remat, device=places[0].device
    )
    stages = scheduling.stages(len(places), chunks, len(model.layers))
    return balanced(costs, scheduling, stages, len(places), by == "memory")


def _checked(balance: Any, count: int) -> tuple[int, ...]:
    """Layers per stage, each at least one, all of them."""
    call = f"`Pipe(balance={balance!r})`"
    if isinstance(balance, (str, bytes)) or not isinstance(balance, Iterable):
        raise TypeError(
            f"{call}: a sequence of layers per stage is needed, such as [{count}]"
        )
    given = list(balance)
    try:
        counts = tuple(operator.index(b) for b in given if not isinstance(b, bool))
    except TypeError:
        counts = ()
    if len(counts) < len(given):
        raise TypeError(f"{call}: layers per stage are ints")
    if not counts or min(counts) < 1:
        raise ValueError(f"{call}: every stage has at least one layer")
    if sum(counts) != count:
        raise ValueError(
            f"{call}: that is {sum(counts)} layers, but the model has {count}"
        )
    return counts
