"""What each process of the tests sets to take less time. No test can see it."""

import functools
import gc
import importlib
from typing import Any


def set_up() -> None:
    """Fewer collections, and one context of MLIR for all programs."""
    # Each young collection walks what a few layers leave when they are traced. JAX
    # makes so many small objects that it is a twentieth of all time by default.
    gc.set_threshold(200_000, 20, 20)
    # JAX makes a context for each program and loads all dialects into it, which takes
    # as long as to lower a small program.
    mlir: Any = importlib.import_module("jax._src.interpreters.mlir")
    mlir.make_ir_context = functools.cache(mlir.make_ir_context)


def forget_contexts() -> None:
    """The next program makes a new context."""
    mlir: Any = importlib.import_module("jax._src.interpreters.mlir")
    mlir.make_ir_context.cache_clear()
