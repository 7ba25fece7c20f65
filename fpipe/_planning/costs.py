"""`LayerCosts`: what each layer of a model costs, as numbers."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Sent(NamedTuple):
    """An array that goes from one layer straight to others, not through the layers
    between them.

    Attributes:
        source: the layer that makes or owns it.
        readers: the layers that read it.
        bytes: for one microbatch.
    """

    source: int
    readers: tuple[int, ...]
    bytes: float


@dataclasses.dataclass(frozen=True)
class LayerCosts:
    """What each layer of a model costs for one microbatch. `fpipe.layer_costs` makes
    one, `fpipe.balance` cuts by it.

    A frozen value of plain numbers: it prints, pickles, and `dataclasses.replace(costs,
    forward=...)` puts other numbers in. All tuples have one entry for each layer. Bytes
    are those of arrays, without what an allocator adds.

    Attributes:
        names: of the layers.
        forward, backward: the work of each, without recomputation, in `unit`.
        unit: `"FLOP"`, `"byte"` (read and written), `"second"`, or anything else.
        params: bytes of the parameters that the layer owns.
        gradients: bytes of their gradients as they are summed: 16-bit floats in
            float32.
        residuals: bytes that a microbatch keeps from the layer's forward to its
            backward if nothing is recomputed: values made in the layer, and its inputs
            if the backward reads them.
        shared: bytes that are in the residuals of this layer and of the next one, and
            are kept once where both are in one stage.
        saved: bytes that are kept besides a stage's inputs where it is recomputed:
            states, and what the policy saves.
        boundaries: bytes of what the layer hands to the next one; of the last one, the
            model's output.
        inputs: bytes of one microbatch of the model's input.
        skips: the skips.
        borrowed: parameters that other layers borrow; whole, not for one microbatch.
        microbatches: into how many the batch was cut.
        checkpoint: as in `Pipe`: it says what `saved` is.
    """

    names: tuple[str, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    unit: str
    params: tuple[int, ...]
    gradients: tuple[int, ...]
    residuals: tuple[int, ...]
    shared: tuple[int, ...]
    saved: tuple[int, ...]
    boundaries: tuple[int, ...]
    inputs: int = 0
    skips: tuple[Sent, ...] = ()
    borrowed: tuple[Sent, ...] = ()
    microbatches: int = 1
    checkpoint: str | Callable[..., Any] = "except_last"

    def __post_init__(self) -> None:
        count = len(self.names)
        if not count:
            raise ValueError("`LayerCosts(names=())`: at least one layer is needed")
        for field in dataclasses.fields(self)[1:10]:
            if field.name == "unit":
                continue
            value = tuple(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            if len(value) != count:
                raise ValueError(
                    f"`LayerCosts({field.name}=...)`: {len(value)} numbers for {count} "
                    "layers"
                )
            if field.name != "shared" and not all(
                math.isfinite(v) and v >= 0 for v in value
            ):
                raise ValueError(
                    f"`LayerCosts({field.name}={value!r})`: finite numbers that are "
                    "not negative are needed"
                )

    @classmethod
    def given(cls, costs: Any) -> "LayerCosts":
        """From one number for each layer, of all that it does."""
        costs, count = tuple(map(float, costs)), len(costs)
        none = (0,) * count
        names = tuple(f"layer {k}" for k in range(count))
        return cls(
            names, (0.0,) * count, costs, "given", none, none, none, none, none, none
        )

    def __str__(self) -> str:
        width = max(map(len, ("layer", *self.names))) + 3
        head = [
            "layer".ljust(width),
            "forward",
            "backward",
            "params",
            "residuals",
            "boundary",
        ]
        rows = [
            [
                f"{k} {name}".ljust(width),
                *(f"{v:.4g}" for v in (self.forward[k], self.backward[k])),
            ]
            + [
                f"{v / 2**20:.3f}"
                for v in (self.params[k], self.residuals[k], self.boundaries[k])
            ]
            for k, name in enumerate(self.names)
        ]
        lines = [
            "".join([row[0], *(cell.rjust(12) for cell in row[1:])]).rstrip()
            for row in (head, *rows)
        ]
        return "\n".join(
            [
                *lines,
                f"work in {self.unit}, memory in MiB, for one of {self.microbatches} "
                "microbatches",
            ]
        )
