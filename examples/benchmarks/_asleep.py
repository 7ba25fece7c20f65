"""An operation that sleeps, for programs on simulated CPU devices.

A program that calls Python runs in the thread that launches it, and one that XLA takes
for a short one (less than a thousand FLOPs) does too. One that calls the C library's
`nanosleep`, and has some work besides, runs in a thread of its own: the launch returns
at once, and devices sleep side by side however few cores there are.
"""

import ctypes
from typing import Any

import jax
import jax.numpy as jnp

jax.ffi.register_ffi_target(
    "nanosleep",
    jax.ffi.pycapsule(ctypes.cast(ctypes.CDLL(None).nanosleep, ctypes.c_void_p)),
    platform="cpu",
    api_version=0,
)


def asleep(seconds: float, *values: Any) -> Any:
    """The first of some arrays, so many seconds after all of them are there."""
    # XLA calls `nanosleep(result, arguments)`, and its own arguments are how long, and
    # where to write what is left of that. So the first argument lies where the result
    # does: an integer of 64 bits for seconds, and one for nanoseconds.
    whole, rest = divmod(seconds, 1)
    how_long = jnp.array([whole, 0, rest * 1e9, 0]).astype(jnp.int32)
    call = jax.ffi.ffi_call(
        "nanosleep",
        jax.ShapeDtypeStruct((4,), jnp.int32),
        input_output_aliases={0: 0},
        custom_call_api_version=3,
    )
    woken = call(how_long, *values)
    # XLA does not know that this is always so.
    return jnp.where(woken[1] == 0, values[0], -values[0])
