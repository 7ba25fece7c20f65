"""What each process of the tests sets to take less time. No test can see it."""

import functools
import gc
import importlib
from typing import Any


def set_up() -> None:
    """Collect rarely, share one context of MLIR, and share programs."""
    # Each young collection walks what a few layers leave when they are traced. JAX
    # makes so many small objects that it is a twentieth of all time by default.
    gc.set_threshold(1_000_000, 20, 20)
    # JAX makes a context for each program and loads all dialects into it, which takes
    # as long as to lower a small program.
    mlir: Any = importlib.import_module("jax._src.interpreters.mlir")
    mlir.make_ir_context = functools.cache(mlir.make_ir_context)
    share_programs()


def forget_contexts() -> None:
    """The next program makes a new context."""
    mlir: Any = importlib.import_module("jax._src.interpreters.mlir")
    mlir.make_ir_context.cache_clear()


def share_programs() -> None:
    """What was compiled for some CPU devices is found in the cache for any others.

    Stages compute much the same on each device. JAX looks for a program of a GPU
    whatever its device, and for one of a CPU by its device.
    """
    keys: Any = importlib.import_module("jax._src.cache_key")
    hashed = keys._hash_serialized_compile_options

    def hashed_alike(into: Any, options: Any, strip_device_assignment: bool) -> Any:
        del strip_device_assignment
        return hashed(into, options, strip_device_assignment=True)

    keys._hash_serialized_compile_options = hashed_alike
