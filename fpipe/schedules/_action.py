"""Actions: the words that a schedule is made of.

An action is one kind of work for one stage and one microbatch:

    Action("F", stage=2, microbatch=3)      in messages `F(2,3)`, in drawings `2F3`

A backward is either one whole, `B`, or two halves: `I` makes the gradient of the
stage's input, which the stage before waits for, and `W` makes the gradient of its
weights, which nobody waits for. A backward that needs its forward's residuals again
makes them itself, or has them made by an action of its own before it, `R`. What a
forward left may wait for its backward in the memory of the host: `O` copies it there
and `L` back.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias

Kind: TypeAlias = Literal["F", "O", "L", "R", "B", "I", "W"]
"""What an action does: forward, copy to the host, copy back, recomputation, whole
backward, input gradient, weight gradient."""

# In an order in which the actions of one stage and one microbatch may run.
KINDS: tuple[Kind, ...] = ("F", "O", "L", "R", "B", "I", "W")
# What copy engines do, while the device does something else.
COPIES: tuple[Kind, ...] = ("O", "L")


class Action(NamedTuple):
    """One piece of work on one device.

    Attributes:
        kind: `"F"` forward, `"O"` copy of the forward's residuals to the host, `"L"`
            copy of these back to the device, `"R"` recomputation of a forward for its
            backward, `"B"` full backward, `"I"` input gradient only, `"W"` weight
            gradient only.
        stage: the stage `s`, `0 <= s < S`.
        microbatch: the microbatch `i`, `0 <= i < m`.
    """

    # A `NamedTuple` and not a dataclass: a large schedule has 10^5 of them, and a plain
    # `("F", 2, 3)` is equal to one.

    kind: Kind
    stage: int
    microbatch: int

    @property
    def name(self) -> str:
        """As profiles and traces call it: `stage2 F mb3`."""
        return f"stage{self.stage} {self.kind} mb{self.microbatch}"

    def __str__(self) -> str:
        return f"{self.kind}({self.stage},{self.microbatch})"


def joined_names(actions: Iterable[Action]) -> str:
    """The name of a program of several actions: `stage2 F mb3 + stage2 B mb3`."""
    return " + ".join(action.name for action in actions)
