"""Units: stages cut once more, so that what is alike on all stages stands alone.

A model is often a stack of equal blocks with an embedding before it and a head behind
it. Cut into stages, the first and the last one differ from the others, though most of
their work is the same. So a stage becomes a row of units: the first stage an `end` (its
input, and the embedding) and a `core`, the last a core and an `end` (the head and the
loss), the others a core. Equal cores then run by one piece of code, and their
parameters stack without padding. Where the stages have no common core each is one unit,
`whole`.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, TypeAlias

from fpipe._core.pytrees import Shape
from fpipe._model.model import Model
from fpipe._model.stages import Stage, cut_stages

Role: TypeAlias = Literal["core", "end", "whole"]


@dataclasses.dataclass(frozen=True)
class Units:
    """The units of a pipe, in the order of the layers.

    Attributes:
        stages: the units as stages of their own.
        roles: what each is.
        of_stage: for each stage of the pipe its units.
        device, position: where each unit is: its device, and its stage's number among
            those of that device.
    """

    stages: tuple[Stage, ...]
    roles: tuple[Role, ...]
    of_stage: tuple[tuple[int, ...], ...]
    device: tuple[int, ...]
    position: tuple[int, ...]

    @cached_property
    def stage_of(self) -> tuple[int, ...]:
        """The stage of each unit."""
        return tuple(s for s, units in enumerate(self.of_stage) for _ in units)

    def home(self, layer: int) -> int:
        """The unit of a layer."""
        return next(u.index for u in self.stages if layer in u.span)


def cut_units(
    model: Model,
    balance: Sequence[int],
    stage_to_device: Sequence[int],
    shapes: Sequence[Shape],
) -> Units:
    """Cut a model into units; `shapes` are those of each layer's parameters."""
    ends = _ends(model, balance, shapes)
    stages = range(len(balance))
    position = [
        sum(stage_to_device[t] == stage_to_device[s] for t in range(s)) for s in stages
    ]
    sizes: list[int] = []
    roles: list[Any] = []
    of_stage: list[tuple[int, ...]] = []
    for s in stages:
        parts: list[tuple[int, Role]] = [(balance[s], "whole")]
        if ends is not None:
            first, last = ends[0] if s == 0 else 0, ends[1] if s == stages[-1] else 0
            parts = [(balance[s] - first - last, "core")]
            parts = [
                *([(first, "end")] if s == 0 else []),
                *parts,
                *([(last, "end")] if s == stages[-1] else []),
            ]
        of_stage.append(tuple(range(len(sizes), len(sizes) + len(parts))))
        sizes += [n for n, _ in parts]
        roles += [role for _, role in parts]
    at = [s for s, units in enumerate(of_stage) for _ in units]
    return Units(
        cut_stages(model, sizes),
        tuple(roles),
        tuple(of_stage),
        tuple(stage_to_device[s] for s in at),
        tuple(position[s] for s in at),
    )


def _ends(
    model: Model, balance: Sequence[int], shapes: Sequence[Shape]
) -> tuple[int, int] | None:
    """How many layers stand before the core of the first stage and behind that of the
    last; `None` without a core.
    """
    if len(balance) < 2:
        return None
    kinds = [
        (layer.name, len(layer.stash), len(layer.pop), layer.asks("state"), shape)
        for layer, shape in zip(model.layers, shapes, strict=True)
    ]
    rows, start = [], 0
    for n in balance:
        rows.append(kinds[start : start + n])
        start += n
    first, *middle, last = rows
    if middle:
        lengths = [len(middle[0])]
        if any(row != middle[0] for row in middle):
            return None
    else:
        lengths = list(range(min(len(first), len(last)), 0, -1))
    for n in lengths:
        alike = first[len(first) - n :] == last[:n] and (
            not middle or last[:n] == middle[0]
        )
        if (
            alike
            and len(first) >= n
            and len(last) >= n
            and 2 * n >= max(balance[0], balance[-1]) - 1
        ):
            return len(first) - n, len(last) - n
    return None
