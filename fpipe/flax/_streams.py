"""Random streams: one key of the layer for each stream of its module.

    key of the call -> of layer 3 -> of microbatch 1 -> of the stream "dropout"

The pipe does the first two steps, by number. This module does the last one, by name. So
a mask does not depend on the stage, the schedule, or the other streams.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from fpipe._core.errors import shown
from fpipe._model.needs import check_key


def stream_key(key: Any, stream: str) -> jax.Array:
    """The key of one random stream of a module.

    It is `jax.random.fold_in(key, zlib.crc32(stream.encode()))`. `crc32` gives the same
    number in every process; Python's `hash` does not.

    Arguments:
        key: the layer's key. Layer `l` gets `fold_in(fold_in(key of the call, l),
            microbatch)`.
        stream: for a linen module, the name of the stream (`"dropout"`). For an NNX
            module, the path of the `nnx.RngStream` in the module (`"dropout/rngs"`).

    Returns:
        The key of the stream.

    Raises:
        TypeError: `key` is no PRNG key, or `stream` is no string.

    Example:
        >>> key = fpipe.flax.stream_key(jax.random.key(0), "dropout")
        >>> bool(key == jax.random.key(0))
        False
    """
    check_key(key)
    if not isinstance(stream, str):
        raise TypeError(
            f"`fpipe.flax.stream_key(key, {shown(stream)})`: the name of a stream is a "
            'string, such as "dropout"'
        )
    return jax.random.fold_in(key, zlib.crc32(stream.encode()))


def as_typed(key: Any) -> jax.Array:
    """A key as a typed key; old-style ones are arrays of `uint32`."""
    # NNX takes typed keys only, and users may still have old ones.
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def no_key(name: str, stream: str, train: bool) -> ValueError:
    """The error of a module that draws random numbers in a call without a key."""
    evaluate = ", or `train=False`" if train else ""
    return ValueError(
        f"layer {name!r}: its module draws from the random stream {stream!r}, but the "
        f"call was given no key: pass `key=`{evaluate}"
    )
