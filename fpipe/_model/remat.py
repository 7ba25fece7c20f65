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
import functools
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
class MadePolicy:
    """A policy of JAX as a value: who makes it, and from what.

    Those that offload are functions inside of functions: they do not pickle, and two
    that were made alike are not equal, so that they would share no program.

    Attributes:
        maker: its name among `jax.checkpoint_policies`.
        arguments: by name.
    """

    maker: str
    arguments: tuple[tuple[str, Any], ...]

    @functools.cached_property
    def _policy(self) -> Policy:
        return getattr(jax.checkpoint_policies, self.maker)(**dict(self.arguments))

    def __call__(self, *args: Any, **params: Any) -> Any:
        """What JAX asks a policy."""
        return self._policy(*args, **params)

    @property
    def __name__(self) -> str:
        return self.maker

    def __reduce__(self) -> Any:
        return MadePolicy, (self.maker, self.arguments)


def _as_value(policy: Any) -> Any:
    """A policy that one of JAX's makers has made as a `MadePolicy`, if its arguments
    are values; any other option as it is.
    """
    maker, *rest = getattr(policy, "__qualname__", "").split(".<locals>.")
    make = getattr(jax.checkpoint_policies, maker, None)
    if not rest or make is None or make.__module__ != policy.__module__:
        return policy
    # What it was made from are the variables that it takes from around it.
    cells = [cell.cell_contents for cell in policy.__closure__ or ()]
    around = dict(zip(policy.__code__.co_freevars, map(_frozen, cells), strict=True))
    try:
        hash(tuple(around.values()))
        inspect.signature(make).bind(**around)
    except TypeError:
        return policy
    return MadePolicy(maker, tuple(sorted(around.items())))


def _frozen(value: Any) -> Any:
    """What a policy was made from, as a value: names, memories, other policies."""
    if isinstance(value, (set, list)):
        return frozenset(value)
    return _as_value(value)


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
            checked = _as_value(option)
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
        if isinstance(self.option, MadePolicy):
            return f"jax.checkpoint_policies.{self.option.maker}(...)"
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
