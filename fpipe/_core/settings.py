"""The settings of JAX that a trace bakes in, or that decide what it raises.

`jax.jit` does not have all of them in its own key: a function that makes a key is not
traced again after `jax_default_prng_impl` has changed (measured on jax 0.10.2, CPU). So
every cache of traces or programs has `settings()` in its keys. JAX's defaults give

    (False, None, "threefry2x32", False, NumpyDtypePromotion.STANDARD, "allow", True)
"""

from typing import Any

import jax

# Not all of `jax.config`: whoever turns on logging or another directory for compiled
# programs should not compile again.
# The first two change dtypes and precision of what is traced, the next two and the last
# one random numbers. The two of promotion change no result, but what raises: an
# operation that is legal in a kept trace may be an error under a stricter setting.
_NAMES = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_custom_prng",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_threefry_partitionable",
)


def settings() -> tuple[Any, ...]:
    """The values that hold now, with `None` for a setting that this JAX lacks."""
    return tuple([getattr(jax.config, name, None) for name in _NAMES])
