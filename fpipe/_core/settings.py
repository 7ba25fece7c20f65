"""What JAX's settings and contexts are now, as one value that can be part of a key.

Every cache of traces, plans and programs has `settings()` in its keys. The value says
nothing but whether two moments are alike:

    a = settings()
    a == settings()                                       True
    with jax.default_matmul_precision("highest"):
        a == settings()                                   False

There is no list of settings: JAX has one itself, in the key of its own cache of traces.
A jitted function of nothing returns a pytree without arrays, whose structure holds a
new object. JAX traces it again exactly if something is different that a trace may
depend on, and gives the kept structure otherwise. So meshes and settings that a later
release adds are in it too.
"""

from typing import Any

import jax


@jax.tree_util.register_static
class _Token:
    """An object that equals itself alone; it lives as long as a key that has it."""


_probe = jax.jit(lambda: _Token())


# What changes a trace and is not in JAX's own key (measured on jax 0.10.2, CPU;
# `tests/front/test_contexts.py` walks all settings that there are). The first three
# decide what a key is made into. The last two trace nothing new, but decide whether a
# call raises: programs of such a call do not donate, because JAX runs one that has made
# a NaN again, operation by operation.
_BESIDES = (
    "jax_default_prng_impl",
    "jax_enable_custom_prng",
    "jax_legacy_prng_key",
    "jax_refs_to_pins",
    "jax_debug_nans",
    "jax_debug_infs",
)


def settings() -> tuple[Any, ...]:
    """The token of what JAX's settings and contexts are now.

    It is hashable and compares in constant time. To ask takes 8 µs.
    """
    # `trace` and not a call: that would be an equation in a trace that is going on, and
    # a new token each time under `jax.disable_jit`.
    token = _probe.trace().out_tree
    return token, *[getattr(jax.config, name, None) for name in _BESIDES]
