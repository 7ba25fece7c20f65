"""What a program returned, looked at under `jax.debug_nans` and `jax.debug_infs`.

JAX looks itself where a program is small enough to be run again, operation by
operation. This module looks at what a program of a whole call returned. In: its arrays.
Out: nothing, or a `NotFiniteError`:

    loss 0.3, gradients finite      nothing
    loss nan                        NotFiniteError: invalid value (nan) in the result …

On such an error `Pipe` runs the layers one by one, to find the operation.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class NotFiniteError(FloatingPointError):
    """A program returned a NaN or an infinity under a setting that forbids it."""


def check_finite(tree: Any, call: str) -> None:
    """Raise if an array has what the settings of JAX forbid.

    Arguments:
        call: what returned it, for the message.
    """
    config: Any = jax.config
    for array in jax.tree.leaves(tree):
        if not isinstance(array, jax.Array) or not jnp.issubdtype(
            array.dtype, jnp.inexact
        ):
            continue
        # Each process looks at what it has.
        for shard in array.addressable_shards:
            data = np.asarray(shard.data)
            if config.jax_debug_nans and np.isnan(data).any():
                found = "nan"
            elif config.jax_debug_infs and np.isinf(data).any():
                found = "inf"
            else:
                continue
            raise NotFiniteError(
                f"invalid value ({found}) in the result of the {call} of a Pipe with "
                'executor="scan". The layers, run one by one, made no such value. '
                "`Pipe(..., detect_anomaly=True)` names the layer"
            )
