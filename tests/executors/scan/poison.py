"""NaN wherever nothing has been put: what a test of idle ticks runs under."""

import jax
import jax.numpy as jnp

from fpipe._executors.scan import interpreter, moving
from fpipe._executors.scan.machine import Outbox


def poison(monkeypatch):
    """Fill every buffer with NaN before the first tick, and every outbox before each
    phase, so that an idle device sends NaN. Returns the shapes that were filled.
    """
    filled = []

    def nan(shape, dtype, *_):
        filled.append(shape)
        fill = jnp.nan if jnp.issubdtype(dtype, jnp.inexact) else 1
        return jnp.full(shape, fill, dtype)

    def nan_on_host(shape, dtype):
        return jax.device_put(nan(shape, dtype), jax.memory.Space.Host)

    run_phase = interpreter.Interpreter._run_phase

    def poisoned_phase(self, p, tick, row, most, carry, given):
        for name, arrays in carry.items():
            if isinstance(name, Outbox):
                carry[name] = [nan(a.shape, a.dtype) for a in arrays]
        run_phase(self, p, tick, row, most, carry, given)

    for module in (interpreter, moving):
        monkeypatch.setattr(module, "empty", nan)
    monkeypatch.setattr(interpreter, "empty_on_host", nan_on_host)
    monkeypatch.setattr(interpreter.Interpreter, "_run_phase", poisoned_phase)
    return filled
