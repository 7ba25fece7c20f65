"""Values of a trace that outlive it.

In: a value of a trace that is going on. Out, after its end: what is left of its values,
because the traced function has put it where it stays: in a list, an attribute, a cache.

    kept = []
    def f(x):                          watch = TraceWatch()
        watch.see(x)                   jax.make_jaxpr(f)(1.0)
        kept.append(x * 2)             watch.kept()    [JitTracer(float32[])]
        return x

JAX says so itself where such a value is used again. Here it is found before.
"""

import gc
import weakref
from typing import Any

from fpipe._core.pytrees import Tracer


class TraceWatch:
    """Looks for what is left of a trace."""

    def __init__(self) -> None:
        self._trace: Any = lambda: None

    def see(self, value: Any) -> None:
        """Watch the trace that a value is of."""
        # JAX only offers `jax.checking_leaks`, under which everything is traced and
        # compiled again. Without the attribute nothing is found.
        trace = getattr(value, "_trace", None)
        if trace is not None:
            self._trace = weakref.ref(trace)

    def kept(self) -> list[Tracer]:
        """What is left of its values, and of those of traces within it."""
        # JAX's caches may keep a trace, but no values of it. Most traces are gone, so
        # that there is nothing to look for.
        if not self._values():
            return []
        # Those in cycles of objects that nobody holds will go too.
        gc.collect()
        return self._values()

    def _values(self) -> list[Tracer]:
        found, pending, seen = list[Tracer](), [self._trace()], set[int]()
        while pending:
            trace = pending.pop()
            if trace is None or id(trace) in seen:
                continue
            seen.add(id(trace))
            for holder in gc.get_referrers(trace):
                if isinstance(holder, Tracer):
                    found.append(holder)
                elif type(holder) is type(trace):
                    pending.append(holder)
        return found
