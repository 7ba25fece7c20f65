"""A fault as one number, and the sentence that is said of it.

Programs carry the first fault of a microbatch as one number, and 0 is none. It has the
layer's position in its high bits, and below it one bit for each thing that has a NaN or
an infinity. Layer 2 of a model made an infinite output of an infinite input:

    layer | state input side borrowed params | new state  stashed  output
      2   |   0     1    0      0       0    |     0         0       1

    2 * 256 + 0b01000001 = 577

One number, because it has to travel with a microbatch from stage to stage, through
every executor, and two of them must be compared on the device (the first one wins).

The backward has codes of its own, with five bits: what a layer made an infinite
gradient of. The position after the last layer is that of the loss. Decoded and
explained, 577 is

    layer 2 'dense', microbatch 1, forward (F): its output is not finite, and before
    that its input had a NaN or an infinity already: the layer only passed it on
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import jax.numpy as jnp
import numpy as np

Parts = TypeVar("Parts", bound=enum.IntFlag)


class ForwardPart(enum.IntFlag):
    """What is not finite when a layer has run: what it made, and what it was given."""

    OUTPUT = 1
    STASHED = 2
    NEW_STATE = 4
    PARAMS = 8
    BORROWED = 16
    SIDE = 32
    INPUT = 64
    STATE = 128


class BackwardPart(enum.IntFlag):
    """What has a gradient that is not finite, when a layer's backward has run.

    A layer may have an infinite derivative that nobody uses: that of the call's `x`, if
    only parameters are differentiated. So a fault of the input alone is `PENDING`,
    until an earlier layer makes from it a gradient that the call asks for.
    """

    # `PENDING` is the highest bit, so that arithmetic on arrays can test it and take it
    # off; see `confirm`.
    PARAMS = 1
    BORROWED = 2
    SIDE = 4
    INPUT = 8
    PENDING = 16


@dataclasses.dataclass(frozen=True)
class Coding(Generic[Parts]):
    """How a layer and its parts are one number, in arrays and out of them."""

    parts: type[Parts]

    @property
    def base(self) -> int:
        """The number of codes that one layer has."""
        return 2 ** len(self.parts)

    def encode(self, layer: Any, found: Mapping[Parts, Any]) -> Any:
        """A code as an int32 array.

        Arguments:
            layer: the position of the layer, an int32 array.
            found: for each part whether it is not finite, a boolean array.
        """
        bits = jnp.zeros((), jnp.int32)
        for part, flag in found.items():
            bits += flag.astype(jnp.int32) * part.value
        return layer * self.base + bits

    def decode(self, code: int) -> tuple[int, Parts]:
        """The position of the layer, and the parts."""
        layer, bits = divmod(code, self.base)
        return layer, self.parts(bits)


FORWARD = Coding(ForwardPart)
BACKWARD = Coding(BackwardPart)

# In place of a backward code: there is a fault, and it was reported already.
REPORTED = -1


def confirm(code: Any) -> Any:
    """A backward code without `PENDING`, as an array of the same type."""
    # Codes of backwards are floats (they travel as cotangents), and floats have no
    # bitwise operations. `REPORTED` is changed too, but stays negative.
    pending = BackwardPart.PENDING.value
    is_pending = code % BACKWARD.base >= pending
    return code - jnp.where(is_pending, pending, 0).astype(code.dtype)


@dataclasses.dataclass(frozen=True)
class Explainer:
    """Says what codes mean, by the names of the layers.

    Arguments:
        names: of the layers.
        balance: layers per stage; `None` without stages.
        side_inputs: what the side inputs of a layer are called.
    """

    names: tuple[str, ...]
    balance: tuple[int, ...] | None
    side_inputs: str = "its side inputs"

    def explain_forward(self, codes: np.ndarray) -> str:
        """The sentence for the forward codes of all microbatches, of shape `(m,)`, one
        at least not 0.
        """
        # The first microbatch with a fault, whatever schedule ran. The position after
        # the last layer is the loss, which has an output and two inputs of other names.
        microbatch = int(np.flatnonzero(codes)[0])
        layer, parts = FORWARD.decode(int(codes[microbatch]))
        if layer == len(self.names):
            made = "the loss"
            before = {
                ForwardPart.INPUT: "the model's output",
                ForwardPart.SIDE: "targets",
            }
        else:
            made = _name_parts(
                parts,
                {
                    ForwardPart.OUTPUT: "its output",
                    ForwardPart.STASHED: "what it stashes",
                    ForwardPart.NEW_STATE: "its new state",
                },
            )
            before = {
                ForwardPart.PARAMS: "its parameters",
                ForwardPart.BORROWED: "its borrowed parameters",
                ForwardPart.SIDE: self.side_inputs,
                ForwardPart.INPUT: "its input" if layer else "the call's x",
                ForwardPart.STATE: "its state",
            }
        given = _name_parts(parts, before)
        if given:
            cause = (
                f"and before that {given} had a NaN or an infinity already: the layer "
                "only passed it on"
            )
        else:
            cause = (
                "but its inputs are: look for a division, a logarithm or an overflow "
                "in it; `jax.debug_nans` names the operation"
            )
        return (
            f"{self._title(layer)}, microbatch {microbatch}, forward (F): {made} is "
            f"not finite, {cause}{_name_microbatches(codes)}"
        )

    def explain_backward(self, codes: np.ndarray, x_asked: bool) -> str | None:
        """The sentence for the backward codes of all microbatches, of shape `(m,)`, if
        any is a fault.

        Arguments:
            x_asked: whether the gradient of `x` was asked for: then a fault that is
                still pending is one.
        """
        # A fault is dropped if its forward was reported, or if no gradient that was
        # asked for has been made of it.
        pending = codes % BACKWARD.base >= BackwardPart.PENDING.value
        reported = codes < 0
        dropped = reported if x_asked else reported | pending
        codes = np.where(dropped, 0, codes)
        if not codes.any():
            return None
        microbatch = int(np.flatnonzero(codes)[0])
        layer, parts = BACKWARD.decode(int(codes[microbatch]))
        if layer == len(self.names):
            names = {
                BackwardPart.INPUT: "the model's output",
                BackwardPart.SIDE: "targets",
            }
        else:
            names = {
                BackwardPart.PARAMS: "its parameters",
                BackwardPart.BORROWED: "its borrowed parameters",
                BackwardPart.SIDE: self.side_inputs,
                BackwardPart.INPUT: "its input",
            }
        return (
            f"{self._title(layer)}, microbatch {microbatch}, backward (B): the "
            f"gradient of {_name_parts(parts, names)} is not finite, but the "
            "cotangents are: a derivative is infinite (sqrt, a norm or a division at "
            "0) or overflows; keep the argument of that function away from there, with "
            "`jnp.where` before the function"
            f"{_name_microbatches(codes)}"
        )

    def _title(self, layer: int) -> str:
        """A layer, or the loss, and its stage."""
        title = "the loss"
        if layer < len(self.names):
            title = f"layer {layer} {self.names[layer]!r}"
        if self.balance is None:
            return title
        ends = np.cumsum(self.balance)
        stage = int(np.searchsorted(ends, layer, side="right"))
        return f"stage {min(stage, len(ends) - 1)}, {title}"


def _name_parts(parts: enum.IntFlag, names: Mapping[Any, str]) -> str:
    return " and ".join(name for part, name in names.items() if part in parts)


def _name_microbatches(codes: np.ndarray) -> str:
    """The end of a sentence about the first microbatch with a fault, if others have
    faults too.
    """
    faulty = [int(i) for i in np.flatnonzero(codes)]
    if len(faulty) == 1:
        return ""
    listed = ", ".join(map(str, faulty[:8]))
    more = ", …" if len(faulty) > 8 else ""
    return f". Microbatches with faults: {listed}{more}"
