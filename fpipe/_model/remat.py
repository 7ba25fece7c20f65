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
import inspect
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import jax
import numpy as np

from fpipe._core.errors import shown

Mode: TypeAlias = Literal["always", "except_last", "never"]
Policy: TypeAlias = Callable[..., Any]


def _check_policy(policy: Policy) -> None:
    """Refuse what makes a policy where a policy belongs, such as
    `save_only_these_names` without its call: `jax.checkpoint` would take the policy
    that it makes for a "yes, save it".
    """
    # A policy is asked about an operation and the shapes of what it takes.
    question = (jax.lax.sin_p, jax.typeof(np.float32(0.0)))
    try:
        makes = callable(policy(*question))
    except Exception:
        # It may be about certain operations. But what cannot even be called with
        # positional arguments is none.
        try:
            inspect.signature(policy).bind(*question)
            makes = False
        except ValueError:  # a builtin without signature
            makes = False
        except TypeError:
            makes = True
    if makes:
        name = getattr(policy, "__name__", type(policy).__name__)
        raise TypeError(
            f"`Pipe(checkpoint={name})`: it makes a policy and is none: call it, for "
            f"example `jax.checkpoint_policies.{name}(...)`"
        )


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
                raise ValueError(f"`Pipe(checkpoint={shown(option)})`: {expected}")
        elif not callable(option):
            raise TypeError(f"`Pipe(checkpoint={shown(option)})`: {expected}")
        else:
            _check_policy(option)
        return cls(checked)

    @property
    def policy(self) -> Policy | None:
        """What `jax.checkpoint(policy=...)` takes; `None` saves the inputs alone."""
        return None if isinstance(self.option, str) else self.option

    @property
    def name(self) -> str:
        """What a user calls it, for errors."""
        if isinstance(self.option, str):
            return repr(self.option)
        # Some of JAX's policies are objects without a name of their own.
        for name, policy in vars(jax.checkpoint_policies).items():
            if policy is self.option:
                return f"jax.checkpoint_policies.{name}"
        return shown(self.option)

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
