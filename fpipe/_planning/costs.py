"""`LayerCosts`: what each layer of a model costs, as numbers.

For `[embed, block, head]` on 32 tokens, with 1024 words, width 64, a block of two
matrices (64 to 256 and back), and a head that borrows the table of the embedding:

    names       ("embed", "block", "head")
    forward     (96.0, 2105344.0, 4194304.0)    FLOP for one microbatch
    params      (262144, 131072, 0)             bytes that the layer owns
    boundaries  (8192, 8192, 131072)            bytes after each layer
    borrowed    (Sent(source=0, readers=(2,), bytes=262144),)

A stage is a span of layers, and what it costs is found from these numbers by sums and
differences (`span_tables.py`). So each is told layer by layer, and what is not a sum,
because two layers share it, has a number of its own.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from fpipe._core.checks import as_int, is_at_least
from fpipe._core.errors import shown
from fpipe._planning.text import quantity


class Sent(NamedTuple):
    """An array that goes from one layer straight to others, not through the layers
    between them.

    Attributes:
        source: the layer that makes or owns it.
        readers: the layers that read it.
        bytes: for one microbatch.
        name: of the skip, if it is one.
    """

    source: int
    readers: tuple[int, ...]
    bytes: float
    name: str = ""


@dataclasses.dataclass(frozen=True)
class LayerCosts:
    """The costs of each layer of a model, for one microbatch.

    `fpipe.layer_costs` makes a `LayerCosts`, and `fpipe.balance` takes one. It is a
    frozen value of plain numbers: it prints and pickles, and
    `dataclasses.replace(costs, forward=...)` changes numbers. A tuple has one entry for
    each layer. Bytes are the sizes of arrays, without an allocator's padding.

    Attributes:
        names: the names of the layers.
        forward, backward: the work of each layer's forward and backward, without
            recomputation, in `unit`.
        unit: `"FLOP"`, `"byte"` (read and written), `"second"`, or any other name.
        params: bytes of the parameters that the layer owns.
        gradients: bytes of the gradients of these parameters while they are summed.
            Gradients of 16-bit floats are summed in float32.
        residuals: bytes that a microbatch keeps from the layer's forward to its
            backward, without recomputation. They are values made in the layer, and its
            inputs if the backward reads them.
        shared: bytes that are in the residuals of this layer and also in those of the
            next one. A stage with both layers keeps them once.
        saved: bytes that a recomputed stage keeps besides its inputs: states, and
            values that the checkpoint policy saves on the device.
        boundaries: bytes that the layer hands to the next one. Only what the next layer
            reads counts. For the last layer, the bytes of the model's output.
        inputs: bytes of one microbatch of the model's input.
        skips: the skips, with their ends and bytes. An array that nobody reads is not
            sent. Arrays of one skip with the same readers are one entry.
        borrowed: parameters that other layers borrow and read, as bytes of whole
            arrays. Parameters of one owner with the same readers are one entry.
        microbatches: the number of microbatches that the batch was cut into.
        checkpoint: as in `Pipe`; `saved` depends on it.
        launch: the host's seconds to launch an action, as in `Pipe.plan`. Measured with
            `by="time"`; otherwise 0.
        estimated: whether work is estimated from a trace, as by default for an
            `fpipe.Split`. `balance` then takes cuts whose most expensive stage costs up
            to 5 % more than the best, if less is sent between stages.
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
    launch: float = 0.0
    estimated: bool = False

    def __post_init__(self) -> None:
        names = self.names
        if not isinstance(names, (tuple, list)) or not all(
            isinstance(name, str) for name in names
        ):
            raise TypeError(
                f"`LayerCosts(names={shown(names)})`: a name for each layer is needed"
            )
        count = len(names)
        as_int("LayerCosts", "microbatches", self.microbatches)
        if not is_at_least(self.inputs, 0):
            raise ValueError(
                f"`LayerCosts(inputs={shown(self.inputs)})`: bytes, 0 or more"
            )
        if not is_at_least(self.launch, 0):
            raise ValueError(
                f"`LayerCosts(launch={shown(self.launch)})`: seconds, 0 or more"
            )
        if not isinstance(self.unit, str):
            raise TypeError(f"`LayerCosts(unit={shown(self.unit)})`: a string")
        for name in ("skips", "borrowed"):
            sent = getattr(self, name)
            if not isinstance(sent, (tuple, list)) or not all(
                isinstance(one, Sent) for one in sent
            ):
                raise TypeError(
                    f"`LayerCosts({name}={shown(sent)})`: entries that `layer_costs` "
                    "made are needed"
                )
        if not count:
            raise ValueError("`LayerCosts(names=())`: at least one layer is needed")
        # Lists and numpy arrays are taken, for `replace(costs, forward=measured)`, and
        # become tuples, so that the record stays a frozen value.
        for name in _PER_LAYER:
            value = getattr(self, name)
            if not isinstance(value, Iterable) or isinstance(value, str):
                raise TypeError(
                    f"`LayerCosts({name}={shown(value)})`: a number for each layer is "
                    "needed"
                )
            value = tuple(value)
            object.__setattr__(self, name, value)
            if len(value) != count:
                raise ValueError(
                    f"`LayerCosts({name}=...)`: a number for each layer is needed, "
                    f"{count} in all, got {len(value)}"
                )
            # What is shared is a difference of minimal cuts, of either sign.
            least = -math.inf if name == "shared" else 0
            if not all(is_at_least(v, least) for v in value):
                raise ValueError(
                    f"`LayerCosts({name}={shown(value)})`: finite numbers that are "
                    "not negative are needed"
                )

    @classmethod
    def given(cls, costs: Iterable[float]) -> "LayerCosts":
        """Costs from one number for each layer, its work in forward and backward.

        Arguments:
            costs: the work of each layer, in any unit, at least 0. All of it counts as
                backward, so none counts as recomputed.
        """
        # As backwards, and no forwards: nothing is known of these costs, so nothing of
        # them may count as recomputed.
        backward = tuple(map(float, costs))
        none = (0,) * len(backward)
        return cls(
            names=tuple(f"layer {k}" for k in range(len(backward))),
            forward=(0.0,) * len(backward),
            backward=backward,
            unit="given",
            params=none,
            gradients=none,
            residuals=none,
            shared=none,
            saved=none,
            boundaries=none,
        )

    def __str__(self) -> str:
        # Not all fields: what one looks at before cutting by hand.
        width = max(map(len, ("layer", *self.names))) + 3
        m = self.microbatches
        columns = ("forward", "backward", "params", "residuals", "boundary")
        lines = ["layer".ljust(width) + "".join(name.rjust(12) for name in columns)]
        for k, name in enumerate(self.names):
            cells = [f"{self.forward[k]:.4g}", f"{self.backward[k]:.4g}"]
            memory = (self.params[k], self.residuals[k], self.boundaries[k])
            cells += [f"{count / 2**20:.3f}" for count in memory]
            line = f"{k} {name}".ljust(width) + "".join(c.rjust(12) for c in cells)
            lines.append(line)
        lines.append(
            f"work in {self.unit}, memory in MiB, for "
            + ("the one microbatch" if m == 1 else f"one of {m} microbatches")
        )
        if self.launch:
            lines.append(f"launch of an action: {quantity(self.launch, 'second')}")
        return "\n".join(lines)


# The fields with an entry for each layer: made tuples and checked in one loop.
_PER_LAYER = (
    "forward",
    "backward",
    "params",
    "gradients",
    "residuals",
    "shared",
    "saved",
    "boundaries",
)
