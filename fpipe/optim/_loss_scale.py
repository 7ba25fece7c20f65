"""A loss scale that finds its size by itself.

In come the gradients of a step, out goes the scale of the next one. With a period of
two, a scale of 4 and gradients that are finite, finite, finite, infinite:

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DynamicLossScale:
    """A loss scale for float16: halved where gradients overflow, doubled where they
    have not for a while.

    A pytree of two numbers, so that it goes through `jax.jit` and into checkpoints.
    Give `scale.scale` to a call as `loss_scale=`, leave out the updates that are not
    finite (`optax.apply_if_finite` within `per_stage`), and take the next one from
    `scale.adjusted(grads)`. After Micikevicius et al., Mixed Precision Training ([arXiv
    1710.03740](https://arxiv.org/abs/1710.03740)), section 3.2.

    Arguments:
        scale: the first one; default 2**15.
        steps: how many calls with finite gradients there have been since it changed;
            default 0.
        period: after how many of these it is multiplied by `factor`; default 2000.
        factor: what it is multiplied or divided by; default 2.

    Example:
        >>> import fpipe.optim
        >>> scale = fpipe.optim.DynamicLossScale()
        >>> print(scale.adjusted((jnp.array([1.0, jnp.inf]),)).scale)
        16384.0
    """

    scale: Any = dataclasses.field(default_factory=lambda: _number(np.float32, 2**15))
    steps: Any = dataclasses.field(default_factory=lambda: _number(np.int32, 0))
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
        """The scale for the next call, after the gradients of this one, placed or
        packed.
        """
        finite = all_finite(grads)
        steps = self.steps + 1
        due = finite & (steps >= self.period)
        # Not below 1: if gradients overflow at 1, no scale helps, and a smaller one
        # would lose the small gradients too. Not to infinity either: then all gradients
        # would be infinite for ever, as half of infinity is infinity.
        lower = jnp.maximum(self.scale / self.factor, 1.0)
        higher = self.scale * self.factor
        higher = jnp.where(due & jnp.isfinite(higher), higher, self.scale)
        scale = jnp.where(finite, higher, lower)
        steps = jnp.where(due | ~finite, 0, steps)
        # A weak type would make the next call a new one to compile.
        return dataclasses.replace(self, scale=strong(scale), steps=strong(steps))
