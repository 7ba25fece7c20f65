"""Units: stages cut once more, so that what is alike on all stages stands alone.

In: a model and its balance. Out: `Units`, the stages' pieces as stages of their own.

A model is often a stack of equal blocks with an embedding before it and a head after
it. Cut into stages, the first and the last one differ from the others, though most of
their work is the same. So a stage becomes a row of units: the first stage an `end` (its
input, and the embedding) and a `core`, the last a core and an `end` (the head and the
loss), the others a core. Equal cores then run by one piece of code, and their
parameters stack without padding. Where the stages have no common core each is one unit,
`whole`. An embedding, six blocks and a head on three devices:

    stage     0                       1                2
    layers    embed  block block      block block      block block  head
    unit      0      1                2                3            4
    role      end    core             core             core         end
"""

import dataclasses
from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Literal, TypeAlias

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
        return tuple(unit.pipe_stage for unit in self.stages)


def cut_units(
    model: Model,
    balance: Sequence[int],
    stage_to_device: Sequence[int],
    shapes: Sequence[Shape],
    cuts: Sequence[Hashable],
) -> Units:
    """Cut a model into units.

    Arguments:
        shapes, cuts: of each layer's parameters, and how they are cut over the mesh:
            equal for layers that are cut alike.
    """
    # How many layers do not belong to a core: `head` before that of the first stage,
    # `tail` after that of the last.
    ends = _ends(model, balance, list(zip(shapes, cuts, strict=True)))
    last = len(balance) - 1
    sizes: list[int] = []
    roles: list[Role] = []
    of_stage: list[tuple[int, ...]] = []
    devices: list[int] = []
    positions: list[int] = []
    for s, layers in enumerate(balance):
        parts: list[tuple[int, Role]] = [(layers, "whole")]
        if ends is not None:
            head = ends[0] if s == 0 else 0
            tail = ends[1] if s == last else 0
            parts = [(layers - head - tail, "core")]
            # An end may have no layers: it takes the input, or makes the loss. Without
            # it the first core alone would read the call's `x`, and the last one alone
            # would make the loss, so neither would be equal to the others.
            if s == 0:
                parts.insert(0, (head, "end"))
            if s == last:
                parts.append((tail, "end"))
        of_stage.append(tuple(range(len(sizes), len(sizes) + len(parts))))
        for size, role in parts:
            sizes.append(size)
            roles.append(role)
            devices.append(stage_to_device[s])
            positions.append(list(stage_to_device[:s]).count(stage_to_device[s]))
    pipe_stages = [s for s, units in enumerate(of_stage) for _ in units]
    return Units(
        cut_stages(model, sizes, pipe_stages),
        tuple(roles),
        tuple(of_stage),
        tuple(devices),
        tuple(positions),
    )


def _ends(
    model: Model, balance: Sequence[int], params: Sequence[Hashable]
) -> tuple[int, int] | None:
    """How many layers stand before the core of the first stage and after that of the
    last; `None` without a core.

    Arguments:
        params: equal for layers whose parameters are alike.
    """
    # One stage has nobody to be equal to.
    if len(balance) < 2:
        return None
    # Layers are taken to be alike if their names and shapes are. If they are not, two
    # cores are two operations, and nothing else is lost. The last reader of a skip may
    # pop it while others peek, but they read it alike.
    kinds = [
        (
            layer.name,
            len(layer.stash),
            len(layer.pop) + len(layer.peek),
            layer.asks("state"),
            own,
        )
        for layer, own in zip(model.layers, params, strict=True)
    ]
    rows = []
    start = 0
    for n in balance:
        rows.append(kinds[start : start + n])
        start += n
    # Between the first stage and the last a core is all of its stage, so these stages
    # must be equal. With two stages alone its length is free, and the longest is taken.
    first, *middle, last = rows
    lengths: Sequence[int] = range(min(len(first), len(last)), 0, -1)
    if middle:
        if any(row != middle[0] for row in middle):
            return None
        lengths = [len(middle[0])]
    # The longest core that first, last and all between have: the end of the first stage
    # and the beginning of the last.
    for n in lengths:
        if n > min(len(first), len(last)):
            continue
        core = last[:n]
        alike = first[len(first) - n :] == core and (not middle or core == middle[0])
        # A core that is less than half of its stage is not worth the second unit: most
        # of the work would be in ends, which share nothing.
        if alike and 2 * n >= max(balance[0], balance[-1]) - 1:
            return len(first) - n, len(last) - n
    return None
