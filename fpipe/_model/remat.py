"""Which backwards recompute their forward, and what they keep instead.

In: what `Pipe(checkpoint=...)` was given. Out: a `Remat`, which the executors ask for
each backward.

With four microbatches, of the last stage under 1F1B (its backwards are *direct*) and of
the others:

    checkpoint         last stage       other stages
    "always"           none             0 1 2 3
    "except_last"      none             0 1 2
    "never"            none             none
    a policy           none             0 1 2 3, without what it saves
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

Mode: TypeAlias = Literal["always", "except_last", "never"]
Policy: TypeAlias = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Remat:
    """A checkpoint mode, or a policy of `jax.checkpoint`. The mechanism is one:
    `jax.checkpoint` around the stage.
    """

    option: Mode | Policy

    @classmethod
    def of(cls, option: Any) -> "Remat":
        """From what `Pipe(checkpoint=...)` was given."""
        checked: Any = option
        modes = ", ".join(map(repr, get_args(Mode)))
        expected = f"one of {modes}, or a policy of `jax.checkpoint_policies`"
        if isinstance(option, str):
            if option not in get_args(Mode):
                raise ValueError(f"`Pipe(checkpoint={option!r})`: {expected}")
        elif not callable(option):
            raise TypeError(f"`Pipe(checkpoint={option!r})`: {expected}")
        return cls(checked)

    @property
    def policy(self) -> Policy | None:
        """What `jax.checkpoint(policy=...)` takes; `None` saves the inputs alone."""
        return None if isinstance(self.option, str) else self.option

    def recomputes(self, microbatch: int, count: int, direct: bool) -> bool:
        """Whether a backward recomputes its forward.

        Arguments:
            microbatch, count: which microbatch of how many were actually made.
            direct: whether the backward is the next thing that its device does after
                the forward: then keeping everything costs no memory that recomputing
                would save.
        """
        # A direct backward needs the residuals at once, so at the peak they are there
        # with and without recomputation. Recomputing would cost time and save nothing.
        if self.option == "never" or direct:
            return False
        # GPipe's choice: the backward of the last microbatch comes right after its
        # forward on the last stage, and soon after it on the others.
        return not (self.option == "except_last" and microbatch == count - 1)
