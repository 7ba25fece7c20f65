"""A loss scale that adjusts itself.

In: the gradients of a step. Out: the scale of the next step. With a period of two, a
scale of 4 and gradients that are finite, finite, finite, infinite:

    scale   4   4   8   8   4
    steps   0   1   0   1   0
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._core.checks import as_int, is_at_least
from fpipe._core.errors import shown
from fpipe._core.meshes import set_aside
from fpipe._core.pytrees import PyTree, strong
from fpipe._core.settings import explicit_transfers
from fpipe.optim._packed import off_callers_mesh
from fpipe.optim._tree_functions import all_finite


def _number(dtype: Any, value: int) -> Any:
    """A number that JAX may move: made under a mesh, it would be on all its devices."""
    with set_aside():
        return jax.device_put(dtype(value))


def _first_scale() -> Any:
    return _number(np.float32, 2**15)


def _no_steps() -> Any:
    return _number(np.int32, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DynamicLossScale:
    """A loss scale for float16 that adjusts itself.

    It is halved when gradients overflow, and doubled after many steps without overflow.
    It is a pytree of two numbers, so `jax.jit` and checkpoint libraries take it. A
    training step uses it in three places:

    1. Give `scale.scale` to the call as `loss_scale=`.
    2. Skip updates that are not finite: `per_stage(optax.apply_if_finite(tx, ...))`.
    3. Take the scale of the next step from `scale.adjusted(grads)`.

    After Micikevicius et al., Mixed Precision Training ([arXiv
    1710.03740](https://arxiv.org/abs/1710.03740)), section 3.2.

    Arguments:
        scale: the scale. Default `2**15`.
        steps: the number of calls with finite gradients since the scale last changed.
            Default 0.
        period: the number of such calls after which the scale grows. Default 2000.
        factor: the scale is multiplied by this number when it grows, and divided by it
            after an overflow. Default 2.

    Example:
        >>> import fpipe.optim
        >>> scale = fpipe.optim.DynamicLossScale()
        >>> print(scale.adjusted((jnp.array([1.0, jnp.inf]),)).scale)
        16384.0
    """

    scale: Any = dataclasses.field(default_factory=_first_scale)
    steps: Any = dataclasses.field(default_factory=_no_steps)
    period: int = dataclasses.field(default=2000, metadata={"static": True})
    factor: float = dataclasses.field(default=2.0, metadata={"static": True})

    def __post_init__(self) -> None:
        as_int("DynamicLossScale", "period", self.period)
        if not is_at_least(self.factor, 1) or self.factor == 1:
            raise ValueError(
                f"`DynamicLossScale(factor={shown(self.factor)})`: a finite number "
                "more than 1"
            )

    @explicit_transfers()
    @off_callers_mesh
    def adjusted(self, grads: PyTree) -> "DynamicLossScale":
        """The loss scale for the next call.

        Arguments:
            grads: the gradients of this call, placed or packed.

        Returns:
            A new `DynamicLossScale`. Its scale is at least 1.
        """
        finite = all_finite(grads)
        steps = self.steps + 1
        due = finite & (steps >= self.period)
        # Not below 1: if gradients overflow at 1, no scale helps, and a smaller one
        # would lose the small gradients too. Not up to infinity: half of infinity is
        # infinity, so all later gradients would be infinite.
        lower = jnp.maximum(self.scale / self.factor, 1.0)
        higher = self.scale * self.factor
        higher = jnp.where(due & jnp.isfinite(higher), higher, self.scale)
        scale = jnp.where(finite, higher, lower)
        steps = jnp.where(due | ~finite, 0, steps)
        # With a weak type the next call would be compiled again.
        return dataclasses.replace(self, scale=strong(scale), steps=strong(steps))
