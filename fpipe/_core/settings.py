"""JAX's settings and contexts: a value for keys, set for a block or another thread.

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

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax


@jax.tree_util.register_static
class _Token:
    """An object that equals itself alone; it lives as long as a key that has it."""


_probe = jax.jit(lambda: _Token())


# The searches that JAX can make in what each program returns. To each its manager.
_SEARCHES: dict[str, Any] = {
    "jax_debug_nans": jax.debug_nans,
    "jax_debug_infs": jax.debug_infs,
}

# What changes a trace and is not in JAX's own key (measured on jax 0.10.2, CPU;
# `tests/front/test_contexts.py` walks all settings that there are). The first three
# decide what a key is made into. Searches trace nothing new, but decide whether a call
# raises: programs of such a call do not donate, because JAX runs one that has made a
# NaN again, operation by operation.
_BESIDES = (
    "jax_default_prng_impl",
    "jax_enable_custom_prng",
    "jax_legacy_prng_key",
    "jax_refs_to_pins",
    *_SEARCHES,
)


def settings() -> tuple[Any, ...]:
    """The token of what JAX's settings and contexts are now.

    It is hashable and compares in constant time. To ask takes 7 µs.
    """
    # `trace` and not a call: that would be an equation in a trace that is going on, and
    # a new token each time under `jax.disable_jit`.
    token = _probe.trace().out_tree
    return token, *[getattr(jax.config, name, None) for name in _BESIDES]


def debugging() -> bool:
    """Whether JAX looks for NaNs or infinities in what each program returns.

    It runs a program that returned one again, operation by operation, on the same
    arguments. So nothing may be donated then.
    """
    return any(getattr(jax.config, name) for name in _SEARCHES)


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """A block in which JAX looks for NaNs and infinities, if it is set to.

    JAX switches its search off and on again while it traces some derivatives. After
    that it does not look at a program that has run before in this thread, where the
    setting is one for all threads (jax 0.10.2 and 0.12.0.1). A block that sets it for
    this thread does not have that fault.
    """
    with contextlib.ExitStack() as stack:
        for name, manager in _SEARCHES.items():
            if getattr(jax.config, name):
                stack.enter_context(manager(True))
        yield


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """A block in which JAX looks for no NaNs and infinities."""
    with contextlib.ExitStack() as stack:
        for manager in _SEARCHES.values():
            stack.enter_context(manager(False))
        yield


def donated(numbers: Sequence[int]) -> tuple[int, ...]:
    """Arguments that a program made now may donate: none of them while debugging."""
    return () if debugging() else tuple(numbers)


# The settings that JAX has a context manager for, by that. Not the guard that names the
# one thread which may use JAX: that is no other thread's to take.
_CONTEXTS: dict[str, Callable[[Any], Any]] = {
    name: manager
    for name in jax.config.values
    if isinstance(
        manager := getattr(jax, name.removeprefix("jax_"), None), type(jax.enable_x64)
    )
    and name != "jax_thread_guard"
}


class CallerContext(NamedTuple):
    """What holds in the calling thread, for threads that work for it.

    A new thread has JAX's defaults and no context variables, whatever the caller set.

    Attributes:
        variables: a copy for each thread: a context is entered by one at a time.
        values: of the settings that may differ between threads.
    """

    variables: contextvars.Context
    values: tuple[Any, ...]

    @classmethod
    def here(cls) -> "CallerContext":
        """That of this thread."""
        return cls(contextvars.copy_context(), _values())

    def run(self, f: Callable[..., None], *args: Any) -> None:
        """Call `f(*args)`, in another thread, as if in this one."""
        with contextlib.ExitStack() as stack:
            for name, own, value in zip(_CONTEXTS, _values(), self.values, strict=True):
                if own != value:
                    stack.enter_context(_CONTEXTS[name](value))
            self.variables.copy().run(f, *args)


def _values() -> tuple[Any, ...]:
    return tuple([getattr(jax.config, name) for name in _CONTEXTS])


_GUARDS = (
    "transfer_guard_host_to_device",
    "transfer_guard_device_to_device",
    "transfer_guard_device_to_host",
)
_IMPLICIT = ("disallow", "log")


@contextlib.contextmanager
def explicit_transfers() -> Iterator[None]:
    """A block in which arrays are made and moved on purpose, as `device_put` does.

    `jax.transfer_guard("disallow")` is there to find what nobody asked for. Whoever
    calls `init`, `place` or `gather` asks for it, but what runs inside is not one
    `device_put`. Where explicit transfers are disallowed too, they stay so.
    """
    with contextlib.ExitStack() as stack:
        for name in _GUARDS:
            if getattr(jax.config, f"jax_{name}") in _IMPLICIT:
                stack.enter_context(getattr(jax, name)("allow"))
        yield
