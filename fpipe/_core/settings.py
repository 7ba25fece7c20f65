"""The settings of JAX that a trace bakes in, or that decide what it raises.

`jax.jit` does not have all of them in its own key (`jax_default_prng_impl` is one), so
whoever keeps a trace keeps it by these too. For example
`(False, None, "threefry2x32", False, "standard", "allow", True)`.
"""

from typing import Any

import jax

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
    """Their values."""
    return tuple([getattr(jax.config, name, None) for name in _NAMES])
