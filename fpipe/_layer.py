"""Layers: pure functions `f(params, x, **needs)`, and the frozen record behind one."""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from fpipe._tree import PyTree, describe

NEEDS = ("carry", "state", "key", "train", "borrowed", "side")


class Namespace:
    """A space of skip names of its own, so that the same layers can be used many times.

    Two namespaces are equal only if they are the same object. Inside a `Pipe` they are numbered by
    first use, in layer order, so that every process and every run agrees on them.
    """

    def __init__(self) -> None:
        self._number: int | None = None

    @classmethod
    def numbered(cls, number: int) -> "Namespace":
        """The namespace of that number: equal to every other one of that number."""
        self = cls()
        self._number = number
        return self

    @property
    def number(self) -> int:
        """Its number within a model."""
        assert self._number is not None
        return self._number

    def __eq__(self, other: object) -> bool:
        if self._number is None or not isinstance(other, Namespace):
            return self is other
        return self._number == other._number

    def __hash__(self) -> int:
        return id(self) if self._number is None else hash(self._number)

    def __repr__(self) -> str:
        return f"Namespace({'' if self._number is None else f'#{self._number}'})"


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of the model: a pure function and what it declares.

    Arguments:
        apply: `apply(params, x, **needs)`; `x` is any pytree. A need is asked for by naming it as a
            keyword-only parameter: `carry`, `state`, `key`, `train`, `borrowed`, `side`. It returns
            `y`; with `carry` `(y, carry)`; with `state` `(y, state)`; with both `(y, carry, state)`.
        init: `init(key, x, **needs) -> params`, where `x` is a microbatch of zeros; it may name
            needs too. `fpipe.fn` layers need none.
        name: for errors, drawings and `borrow`; default the function's name.

    Other Arguments:
        stash, pop, peek: names of the skips that the layer stashes, pops, or reads without popping.
        needs: overrides what the signature says, for wrappers that hide it.
        borrow: names of the layers whose parameters come as `borrowed[name]` (tied weights).
        init_state: `init_state(x, **needs) -> state`, for a layer with state.
        finish: `finish(state) -> state`, applied once at the end of a call.

    Raises:
        TypeError: a need as positional parameter, an unknown required keyword, a string where a
            list of names belongs, skips without the need `carry`.
    """

    apply: Callable[..., Any]
    init: Callable[..., PyTree] | None = None
    name: str = ""
    stash: tuple[str, ...] = ()
    pop: tuple[str, ...] = ()
    peek: tuple[str, ...] = ()
    needs: tuple[str, ...] | None = None
    borrow: tuple[str, ...] = ()
    init_state: Callable[..., PyTree] | None = None
    finish: Callable[[PyTree], PyTree] | None = None
    namespaces: tuple[tuple[str, Namespace], ...] = ()

    def __post_init__(self) -> None:
        if not callable(self.apply):
            raise TypeError(f"`fpipe.Layer(apply=...)`: {self.apply!r} is not callable")
        put = functools.partial(object.__setattr__, self)
        put("name", self.name or function_name(self.apply))
        for field in ("stash", "pop", "peek", "borrow"):
            put(field, names(getattr(self, field), f"`fpipe.Layer({field}=...)` of layer {self.name!r}"))
        if self.needs is None:
            put("needs", signature_needs(self.apply, self.name))
        else:
            given = names(self.needs, f"`fpipe.Layer(needs=...)` of layer {self.name!r}")
            unknown = [n for n in given if n not in NEEDS]
            if unknown:
                raise TypeError(f"layer {self.name!r}: {unknown} are no needs; the needs are {', '.join(NEEDS)}")
            put("needs", tuple(n for n in NEEDS if n in given))
        assert self.needs is not None
        if (self.stash or self.pop or self.peek) and "carry" not in self.needs:
            raise TypeError(
                f"layer {self.name!r} declares skips but its function has no keyword-only parameter "
                f"`carry`: write `def {self.name}(params, x, *, carry)` and return `(y, carry)`"
            )
        if self.borrow and "borrowed" not in self.needs:
            raise TypeError(
                f"layer {self.name!r} borrows {list(self.borrow)} but its function has no keyword-only "
                f"parameter `borrowed`: write `def {self.name}(params, x, *, borrowed)`"
            )
        if (self.init_state or self.finish) and "state" not in self.needs:
            raise TypeError(
                f"layer {self.name!r} has init_state or finish but its function has no keyword-only "
                f"parameter `state`: write `def {self.name}(params, x, *, state)` and return `(y, state)`"
            )

    def __call__(self, params: PyTree, x: PyTree, **needs: Any) -> Any:
        """Call the layer's function as it is."""
        return self.apply(params, x, **needs)

    def isolate(self, namespace: Namespace, only: Iterable[str] | None = None) -> "Layer":
        """The same layer with its skips (or `only` some of them) in a namespace.

        Arguments:
            namespace: a `Namespace`, shared by the layers that stash, peek and pop the skip.
            only: names of skips that this layer declares; default all of them.
        """
        if not isinstance(namespace, Namespace):
            raise TypeError(f"`isolate(namespace)` of layer {self.name!r}: {namespace!r} is no fpipe.Namespace")
        mine = (*self.stash, *self.pop, *self.peek)
        chosen = mine if only is None else names(only, f"`isolate(only=...)` of layer {self.name!r}")
        for name in chosen:
            if name not in mine:
                raise ValueError(
                    f"`isolate(only=[{name!r}])`: layer {self.name!r} declares no such skip, only {list(mine)}"
                )
        spaces = dict(self.namespaces) | dict.fromkeys(chosen, namespace)
        return dataclasses.replace(self, namespaces=tuple(spaces.items()))


def function_name(f: Callable[..., Any]) -> str:
    """The name that a person would call a function by."""
    while isinstance(f, functools.partial):
        f = f.func
    return getattr(f, "__name__", type(f).__name__)


def names(value: Iterable[str], where: str) -> tuple[str, ...]:
    """A tuple of names, or a `TypeError` that says what is wrong with it."""
    if isinstance(value, str):
        raise TypeError(f"{where}: got the string {value!r} where a list of names belongs: write [{value!r}]")
    result = tuple(value)
    for name in result:
        if not isinstance(name, str):
            raise TypeError(f"{where}: names are strings, got {name!r}")
    if len(set(result)) < len(result):
        raise ValueError(f"{where}: a name is there twice in {list(result)}")
    return result


def signature_needs(f: Callable[..., Any], name: str) -> tuple[str, ...]:
    """The needs that a function's signature names."""
    try:
        parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):  # a builtin: it has no signature to read
        return ()
    bound = f.keywords if isinstance(f, functools.partial) else {}
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for p in positional:
        if p.name in NEEDS and p.name not in bound:
            raise TypeError(
                f"layer {name!r}: the need {p.name!r} is a positional parameter; make it keyword-only, "
                f"after a bare `*`: `def {name}(params, x, *, {p.name})`"
            )
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(positional) < 2 and not variadic:
        raise TypeError(
            f"layer {name!r} takes {len(positional)} positional parameter(s), but a layer is "
            f"`f(params, x)`; for a function without parameters write `fpipe.fn({name})`"
        )
    required = [p.name for p in positional[2:] if p.default is p.empty]
    if required:
        raise TypeError(
            f"layer {name!r}: a layer is `f(params, x, **needs)`, but {required} are required "
            "positional parameters too; bind them with functools.partial"
        )
    needs = []
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and p.name not in bound:
            if p.name in NEEDS:
                needs.append(p.name)
            elif p.default is p.empty:
                raise TypeError(
                    f"layer {name!r}: the keyword-only parameter {p.name!r} has no default and is no "
                    f"need; the needs are {', '.join(NEEDS)}. Bind it with functools.partial"
                )
    return tuple(n for n in NEEDS if n in needs)


def keyword_needs(f: Callable[..., Any]) -> tuple[str, ...]:
    """The needs among the keyword-only parameters of an `init` or `init_state`."""
    try:
        parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):
        return ()
    bound = f.keywords if isinstance(f, functools.partial) else {}
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name in NEEDS and p.name not in bound)


def as_layer(value: Any) -> Layer:
    """A `Layer` as it is, a bare function as a `Layer`."""
    if isinstance(value, Layer):
        return value
    if not callable(value):
        raise TypeError(f"a layer is a function or an fpipe.Layer, got {type(value).__name__}: {value!r}")
    return Layer(value)


def fn(f: Callable[[PyTree], PyTree], name: str = "") -> Layer:
    """A layer without parameters: `fpipe.fn(jnp.tanh)` is `lambda params, x: jnp.tanh(x)`.

    Arguments:
        f: a function of one pytree.
        name: default the function's name.
    """
    return Layer(_WithoutParams(f), init=_no_params, name=name or function_name(f), needs=())


@dataclasses.dataclass(frozen=True)
class _WithoutParams:
    f: Callable[[PyTree], PyTree]

    def __call__(self, params: PyTree, x: PyTree) -> PyTree:
        del params
        return self.f(x)


def _no_params(key: Any, x: PyTree) -> PyTree:
    del key, x
    return ()


# --- skips, as a layer sees them -------------------------------------------------------------------

# The layer being traced: only so that an error of `stash` or `pop` can name it.
_current: contextvars.ContextVar[tuple[int, Layer] | None] = contextvars.ContextVar("layer", default=None)


def skippable(
    stash: Sequence[str] = (), pop: Sequence[str] = (), peek: Sequence[str] = ()
) -> Callable[[Callable[..., Any] | Layer], Layer]:
    """Declare the skips of a layer.

    Arguments:
        stash: names that the layer stashes: each with one `fpipe.stash`.
        pop: names that the layer takes: each with one `fpipe.pop`.
        peek: names that the layer reads and leaves for a later layer to pop.

    Returns:
        A decorator from a function with the keyword-only parameter `carry`, or a `Layer`, to a `Layer`.
    """

    def declare(layer: Callable[..., Any] | Layer) -> Layer:
        if isinstance(layer, Layer):
            return dataclasses.replace(layer, stash=stash, pop=pop, peek=peek)
        return Layer(layer, stash=stash, pop=pop, peek=peek)  # type: ignore[arg-type]

    for field, value in (("stash", stash), ("pop", pop), ("peek", peek)):
        names(value, f"`fpipe.skippable({field}=...)`")
    return declare


def stash(carry: Mapping[str, PyTree], name: str, value: PyTree) -> dict[str, PyTree]:
    """A new carry with `value` stashed under `name`, for a later layer to pop.

    Arguments:
        carry: the layer's carry.
        name: declared in `skippable(stash=[name])`.
        value: any pytree; `None` and integers too.

    Raises:
        ValueError: `name` is not declared, or was stashed before.
    """
    who, layer = _who()
    if layer is not None and name not in layer.stash:
        raise ValueError(
            f"`fpipe.stash(carry, {name!r}, ...)` in {who}: {name!r} is not declared there; add it: "
            f"`@fpipe.skippable(stash={[*layer.stash, name]!r})`"
        )
    if name in carry:
        raise ValueError(f"`fpipe.stash(carry, {name!r}, ...)` in {who}: {name!r} was stashed before; stash it once")
    return {**carry, name: value}


def pop(carry: Mapping[str, PyTree], name: str) -> tuple[PyTree, dict[str, PyTree]]:
    """Take a skip: its value, and a new carry without it.

    Raises:
        ValueError: `name` is not declared in `skippable(pop=[name])`, or was popped before.
    """
    who, layer = _who()
    if layer is not None and name not in layer.pop:
        raise ValueError(
            f"`fpipe.pop(carry, {name!r})` in {who}: {name!r} is not declared there; add it: "
            f"`@fpipe.skippable(pop={[*layer.pop, name]!r})`" + _peek_hint(layer, name)
        )
    if name not in carry:
        raise ValueError(
            f"`fpipe.pop(carry, {name!r})` in {who}: the carry holds {sorted(carry)}; {name!r} was popped "
            "before. Pop it once, and go on with the carry that `pop` returns"
        )
    return carry[name], {k: v for k, v in carry.items() if k != name}


def peek(carry: Mapping[str, PyTree], name: str) -> PyTree:
    """Read a skip that a later layer pops.

    Raises:
        ValueError: `name` is not declared in `skippable(peek=[name])`.
    """
    who, layer = _who()
    if layer is not None and name not in layer.peek:
        raise ValueError(
            f"`fpipe.peek(carry, {name!r})` in {who}: {name!r} is not declared there; add it: "
            f"`@fpipe.skippable(peek={[*layer.peek, name]!r})`"
        )
    if name not in carry:
        raise ValueError(f"`fpipe.peek(carry, {name!r})` in {who}: the carry holds only {sorted(carry)}")
    return carry[name]


def _peek_hint(layer: Layer, name: str) -> str:
    return f"; it is declared as peek, read it with `fpipe.peek(carry, {name!r})`" if name in layer.peek else ""


def _who() -> tuple[str, Layer | None]:
    current = _current.get()
    if current is None:
        return "a function outside a pipeline", None
    return f"layer {current[0]} {current[1].name!r}", current[1]


@contextlib.contextmanager
def _noting(note: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not any(n.startswith("fpipe: ") for n in getattr(error, "__notes__", ())):
            error.add_note(f"fpipe: {note}")
        raise


def call_layer(
    layer: Layer,
    index: int,
    params: PyTree,
    x: PyTree,
    *,
    carry: Mapping[str, PyTree],
    needs: Mapping[str, Any],
    where: str = "",
) -> tuple[PyTree, dict[str, PyTree], PyTree]:
    """Run one layer on one microbatch and check everything that it returns.

    Arguments:
        layer, index: the layer and its place among all layers.
        carry: the skips that it pops or peeks, by its own names.
        needs: the values of the other needs, by name.
        where: stage and microbatch, for the note on an error.

    Returns:
        `(y, stashed, state)`; `stashed` by the layer's own names; `state` is `None` for a layer without.
    """
    assert layer.needs is not None
    given = {n: dict(carry) if n == "carry" else needs[n] for n in layer.needs}
    who = f"layer {index} {layer.name!r}"
    token = _current.set((index, layer))
    try:
        with _noting(f"in {who}{where}"):
            result = layer.apply(params, x, **given)
            parts = [n for n in ("carry", "state") if n in layer.needs]
            if not parts:
                return result, {}, None
            form = f"({', '.join(['y', *parts])})"
            if not isinstance(result, tuple) or len(result) != 1 + len(parts):
                got = f"a tuple of {len(result)}" if isinstance(result, tuple) else f"{describe(result)}, no tuple"
                raise TypeError(f"{who} declares {' and '.join(parts)} and must return `{form}`, but returned {got}")
            y, returned = result[0], dict(zip(parts, result[1:], strict=True))
            stashed = _check_carry(layer, who, form, returned["carry"]) if "carry" in parts else {}
            return y, stashed, returned.get("state")
    finally:
        _current.reset(token)


def _check_carry(layer: Layer, who: str, form: str, carry: Any) -> dict[str, PyTree]:
    if not isinstance(carry, dict):
        raise TypeError(f"{who} must return `{form}`, but its carry is {describe(carry)}, no dict")
    for name in layer.pop:
        if name in carry:
            raise ValueError(
                f"{who} declares pop={list(layer.pop)} but never popped {name!r}: it is still in the carry "
                f"that it returned. Write `{name}, carry = fpipe.pop(carry, {name!r})`, or declare it as peek"
            )
    for name in layer.stash:
        if name not in carry:
            raise ValueError(
                f"{who} declares stash={list(layer.stash)} but did not stash {name!r}: "
                f"`return y, fpipe.stash(carry, {name!r}, value)`"
            )
    extra = sorted(set(carry) - set(layer.stash) - set(layer.peek))
    if extra:
        raise ValueError(f"{who} returned the undeclared skips {extra}; it declares stash={list(layer.stash)}")
    return {name: carry[name] for name in layer.stash}
