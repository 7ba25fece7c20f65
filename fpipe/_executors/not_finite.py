"""What a program returned, looked at under `jax.debug_nans` and `jax.debug_infs`.

JAX looks itself where a program is small enough to be run again, operation by
operation. This module looks at what a program of a whole call returned. In: its arrays.
Out: nothing, or a `NotFiniteError`:

    loss 0.3, gradients finite      nothing
    loss nan                        NotFiniteError: invalid value (nan) in the result …

On such an error `Pipe` runs the layers one by one, to find the operation.
"""

import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._core.processes import is_shared, meet


class NotFiniteError(FloatingPointError):
    """A program returned a NaN or an infinity under a setting that forbids it."""


class NotFinite(enum.IntEnum):
    """What an array may not have."""

    NAN = 1
    INF = 2

    @property
    def shown(self) -> str:
        """As JAX names it in its errors."""
        return self.name.lower()


def forbidden_in(tree: Any, nans: bool, infs: bool) -> NotFinite | None:
    """What arrays have in this process that they may not have.

    Arguments:
        nans, infs: what they may not have.
    """
    for array in jax.tree.leaves(tree):
        if not isinstance(array, jax.Array) or not jnp.issubdtype(
            array.dtype, jnp.inexact
        ):
            continue
        # Each process looks at what it has.
        for shard in array.addressable_shards:
            data = np.asarray(shard.data)
            if nans and np.isnan(data).any():
                return NotFinite.NAN
            if infs and np.isinf(data).any():
                return NotFinite.INF
    return None


def check_finite(tree: Any, call: str) -> None:
    """Raise if an array has what the settings of JAX forbid, in every process that has
    a part of it.

    Arguments:
        call: what returned it, for the message.
    """
    config: Any = jax.config
    found = forbidden_in(tree, config.jax_debug_nans, config.jax_debug_infs)
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    if any(is_shared(array.sharding) for array in arrays):
        # A gradient of one process may have it alone, and the others would go on.
        told = meet([found or 0], lambda: "all processes to look for NaNs").max()
        found = NotFinite(int(told)) if told else None
    if found is not None:
        raise NotFiniteError(
            f"invalid value ({found.shown}) in the result of the {call} of a Pipe with "
            'executor="scan". The layers, run one by one, made no such value. '
            "`Pipe(..., detect_anomaly=True)` names the layer"
        )
