"""Skips as a layer sees them: a carry, which is a dict, and namespaces.

A namespace lets a model use the same layer several times.

A layer that pops "a" and stashes "b" gets `{"a": value}` and returns `{"b": value}`:

    {"a": 1}   pop(carry, "a")       -> 1, {}
    {}         stash(carry, "b", 2)  -> {"b": 2}
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping

from fpipe._core.errors import a_type, shown
from fpipe._core.pytrees import PyTree


class Namespace:
    """A space of skip names, so that a model can use the same layers several times.

    Two skips of the same name in two namespaces are two different skips;
    `Layer.isolate` puts a layer's skips into a namespace. Two namespaces are equal only
    if they are the same object. A `Pipe` numbers its namespaces by first use, in the
    order of the layers, so every process and every run gives the same numbers.

    Example:
        >>> import fpipe
        >>> @fpipe.skippable(stash=["skip"])
        ... @fpipe.fn
        ... def keep(x, *, carry):
        ...     return x, fpipe.stash(carry, "skip", x)
        >>> inner, outer = fpipe.Namespace(), fpipe.Namespace()
        >>> # two skips, both named "skip"
        >>> layers = [keep.isolate(outer), keep.isolate(inner)]
    """

    def __init__(self) -> None:
        self._number: int | None = None

    @classmethod
    def numbered(cls, number: int) -> "Namespace":
        """The namespace with a number. All namespaces with that number are equal.

        Arguments:
            number: the number, from 0.
        """
        self = cls()
        self._number = number
        return self

    @property
    def number(self) -> int:
        """The namespace's number in its model. Only a model's namespaces have one."""
        assert self._number is not None
        return self._number

    def __eq__(self, other: object) -> bool:
        if self._number is None or not isinstance(other, Namespace):
            return self is other
        return self._number == other._number

    # By identity until it is numbered: two libraries may each bring namespaces, and
    # nothing else tells them apart. By number afterwards, so that pipes made of the
    # same layers are equal.
    # An id is different in each process. It decides no order: before anything is
    # ordered by them, namespaces are numbered.
    def __hash__(self) -> int:
        return id(self) if self._number is None else hash(self._number)

    def __repr__(self) -> str:
        return f"Namespace({'' if self._number is None else f'#{self._number}'})"


@dataclasses.dataclass(frozen=True)
class Scope:
    """The layer that is being traced: what it may stash, pop and peek, and its name for
    errors.
    """

    who: str
    stash: tuple[str, ...]
    pop: tuple[str, ...]
    peek: tuple[str, ...]


# A context variable and not a global: several threads may trace layers at the same
# time. And no argument of `pop`: `fpipe.pop(carry, "skip")` reads like an operation
# on a dict.
# Only checks and error messages read it: no value ever depends on it.
_scope: contextvars.ContextVar[Scope | None] = contextvars.ContextVar(
    "scope", default=None
)


@contextlib.contextmanager
def scoped(scope: Scope) -> Iterator[None]:
    """While this is open, `stash`, `pop` and `peek` check against `scope`."""
    token = _scope.set(scope)
    try:
        yield
    finally:
        _scope.reset(token)


def stash(carry: Mapping[str, PyTree], name: str, value: PyTree) -> dict[str, PyTree]:
    """Stash a value under a name, for later layers to peek at or to pop.

    Arguments:
        carry: the layer's carry. It is not changed.
        name: a name that the layer declares in `skippable(stash=[name])`.
        value: any pytree, also `None` or integers.

    Returns:
        A new carry, with `value` under `name`.

    Raises:
        TypeError: `carry` is no dict.
        ValueError: `name` is not declared, or was stashed before.

    Example:
        >>> fpipe.stash({}, "skip", 1)
        {'skip': 1}
    """
    call = f"`fpipe.stash(carry, {shown(name)}, ...)`"
    _check(call, carry, name, "stash")
    if name in carry:
        raise ValueError(
            f"{call} in {_who()}: {name!r} is in the carry already; stash it once"
        )
    # A new dict: a function that is traced twice (by `jax.lax.scan` or `cond`) would
    # find its own stash in a changed one.
    return {**carry, name: value}


def pop(carry: Mapping[str, PyTree], name: str) -> tuple[PyTree, dict[str, PyTree]]:
    """Take a skip out of the carry.

    Arguments:
        carry: the layer's carry. It is not changed.
        name: a name that the layer declares in `skippable(pop=[name])`.

    Returns:
        `(value, carry)`: the value that was stashed, and a new carry without it.

    Raises:
        TypeError: `carry` is no dict.
        ValueError: `name` is not declared, or was popped before.

    Example:
        >>> fpipe.pop({"skip": 1}, "skip")
        (1, {})
    """
    call = f"`fpipe.pop(carry, {shown(name)})`"
    _check(call, carry, name, "pop")
    if name not in carry:
        raise ValueError(
            f"{call} in {_who()}: the carry holds {sorted(map(str, carry))}; {name!r} "
            "was popped before. Pop it once, and go on with the carry that `pop` "
            "returns"
        )
    return carry[name], {k: v for k, v in carry.items() if k != name}


def peek(carry: Mapping[str, PyTree], name: str) -> PyTree:
    """Read a skip, and leave it in the carry.

    Later layers may peek at it too, and the last reader may pop it.

    Arguments:
        carry: the layer's carry.
        name: a name that the layer declares in `skippable(peek=[name])`.

    Returns:
        The value that was stashed.

    Raises:
        TypeError: `carry` is no dict.
        ValueError: `name` is not declared.

    Example:
        >>> fpipe.peek({"skip": 1}, "skip")
        1
    """
    call = f"`fpipe.peek(carry, {shown(name)})`"
    _check(call, carry, name, "peek")
    if name not in carry:
        raise ValueError(
            f"{call} in {_who()}: the carry holds only {sorted(map(str, carry))}"
        )
    return carry[name]


def _check(call: str, carry: object, name: str, field: str) -> None:
    """The carry is a dict, and the layer that is traced declares the name.

    Arguments:
        field: "stash", "pop" or "peek".
    """
    if not isinstance(name, str):
        raise TypeError(f"{call} in {_who()}: names must be strings")
    if not isinstance(carry, Mapping):
        raise TypeError(f"{call} in {_who()}: the carry is {a_type(carry)}, no dict")
    # Outside a pipeline, for example in a user's test of a layer, any name is allowed.
    scope = _scope.get()
    if scope is None or name in getattr(scope, field):
        return
    declared = [f for f in ("stash", "pop", "peek") if name in getattr(scope, f)]
    fix = f"@fpipe.skippable({field}={[*getattr(scope, field), name]!r})"
    cure = "; add it:"
    if declared:
        cure = f"; it is declared as {declared[0]}, so call `fpipe.{declared[0]}`, or"
    raise ValueError(
        f"{call} in {scope.who}: {name!r} is not declared as {field} there{cure} "
        f"`{fix}`"
    )


def _who() -> str:
    scope = _scope.get()
    return "a function outside a pipeline" if scope is None else scope.who
