"""What the signature of a function says of a layer.

In: functions as users write them. Out: the needs that they name, and errors for what
cannot be a layer's function:

    def drop(params, x, *, key, train): …       needs ("key", "train")
    functools.partial(drop, train=True)         needs ("key",)
    def scale(params, x, *, factor=2.0): …      needs (): an option of the layer
    eqx.nn.Linear(2, 3, key=key)                an error: its arrays would not train
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from fpipe._core.errors import a_type
from fpipe._core.pytrees import is_array, is_inexact
from fpipe._model.needs import BY_NAME, NEEDS, Giver


def function_name(f: Callable[..., Any]) -> str:
    """The name that a person would call a function by."""
    # A partial of a partial too. What has no name, such as a callable object, is called
    # by its class.
    while isinstance(f, functools.partial):
        f = f.func
    return getattr(f, "__name__", type(f).__name__)


def inside_of(f: Any) -> Iterator[Any]:
    """A callable, and what it calls in the end: the `func` of a partial, the object of
    a method, what `jax.jit`, `jax.vmap` and decorators show as `__wrapped__`.
    """
    while f is not None:
        yield f
        if isinstance(f, functools.partial):
            f = f.func
        elif isinstance(f, types.MethodType):
            f = f.__self__
        else:
            f = getattr(f, "__wrapped__", None)


def _is_object(f: Any) -> bool:
    """Whether what is called in the end is an object with `__call__`, not a function:
    then keywords with defaults are its options, and no needs.
    """
    while True:
        if isinstance(f, functools.partial):
            f = f.func
        elif getattr(f, "__wrapped__", None) is not None:
            f = f.__wrapped__
        else:
            return not (inspect.isroutine(f) or isinstance(f, type))


def check_function(f: Callable[..., Any], call: str) -> None:
    """Refuse what has more than its call, such as arrays of its own: that would be
    lost.

    Arguments:
        call: the user's call, for the message.
    """
    outer: Any = None
    for inner in inside_of(f):
        kind = type(inner)
        # The method of a linen module, `module.apply`, takes its parameters as an
        # argument, as a layer does. That of an NNX module has them in the module.
        method = isinstance(outer, types.MethodType) and not has_floats(inner)
        # By name, as the core imports no Flax; what else Flax has, such as `nnx.jit` of
        # a function, is a function.
        if not method and any(
            base.__name__ == "Module" and base.__module__.startswith("flax.")
            for base in kind.__mro__
        ):
            raise TypeError(
                f"{call}: {a_type(inner)} is a Flax module, whose parameters would "
                "not be seen: write "
                "`fpipe.flax.layer(module)`, or `fpipe.flax.layers(...)` for a "
                "Sequential or a list of modules"
            )
        if has_floats(inner):
            cure = "`fpipe.Layer(lambda f, x: f(x), init=lambda key, x: f)`"
            if any(b.__module__.startswith("equinox") for b in kind.__mro__):
                cure = (
                    "`params, static = eqx.partition(f, eqx.is_inexact_array)`, and "
                    "`fpipe.Layer(lambda params, x: eqx.combine(params, static)(x), "
                    "init=lambda key, x: params)`"
                )
            raise TypeError(
                f"{call}: {a_type(inner)} is a pytree with arrays, which would be "
                "constants and not train. As parameters, where `f` is that object: "
                f"{cure}. Constants on purpose: `fpipe.fn(lambda x: f(x))`"
            )
        outer = inner


def has_floats(f: Any) -> bool:
    """Whether a callable is a pytree with arrays that could be trained."""
    return any(is_array(a) and is_inexact(a) for a in jax.tree.leaves(f))


def signature_needs(
    f: Callable[..., Any], name: str, given: tuple[str, ...] = ("params", "x")
) -> tuple[str, ...]:
    """The needs that a function's signature names after the positional parameters
    `given`.

    Raises:
        TypeError: too few or too many positional parameters, a need as a positional
            parameter, a required keyword that is no need.
    """
    parameters = _parameters(f)
    # Built-in functions may have no signature; they ask for nothing.
    if parameters is None:
        return ()
    # Each check below is for one mistake that was likely enough to deserve its own
    # words, the most specific first: (key, x), a need before the `*`, too few
    # parameters, too many, a keyword that nobody would give a value.
    head = ", ".join(given)
    positional = [
        p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if [p.name for p in positional[:2]] == ["key", "x"] and len(given) == 2:
        raise TypeError(
            f"layer {name!r}: `{name}(key, x)` looks like an init: a layer is called "
            f"as `f({head})`, and its init is the "
            "second argument, `fpipe.Layer(f, init)`"
        )
    for p in positional:
        if p.name in NEEDS:
            raise TypeError(
                f"layer {name!r}: the need {p.name!r} is a positional parameter; make "
                "it keyword-only, after a bare "
                f"`*`: `def {name}({head}, *, {p.name})`"
            )
    # `*args` may take the parameters and the input: nothing can be said against it.
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(positional) < len(given) and not variadic:
        one = len(positional) == 1 and len(given) == 2
        hint = (
            f"; for a function without parameters write `fpipe.fn({name})`"
            if one
            else ""
        )
        raise TypeError(
            f"layer {name!r} takes {len(positional)} positional parameter(s), but it "
            f"is called as `f({head})`{hint}"
        )
    required = [p.name for p in positional[len(given) :] if p.default is p.empty]
    if required:
        raise TypeError(
            f"layer {name!r}: a layer is `f({head}, **needs)`, but {required} are "
            "required positional parameters too; "
            "bind them with functools.partial"
        )
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    for p in keywords:
        if p.name not in NEEDS and p.default is p.empty:
            raise TypeError(
                f"layer {name!r}: the keyword-only parameter {p.name!r} has no default "
                "and is no need; the needs are "
                f"{', '.join(NEEDS)}. Bind it with functools.partial"
            )
    # A keyword with a default that is no need stays what it is: an option of the layer.
    # So do all that have a default, of an object: `key=None` of a module's `__call__`
    # says nothing of whether this one draws.
    if _is_object(f):
        keywords = [p for p in keywords if p.default is p.empty]
    return tuple(n for n in NEEDS if any(p.name == n for p in keywords))


def keyword_needs(f: Callable[..., Any]) -> tuple[str, ...]:
    """The needs among the keyword-only parameters of an `init` or `init_state`."""
    return tuple(
        p.name
        for p in _parameters(f) or ()
        if p.kind is p.KEYWORD_ONLY and p.name in NEEDS
    )


def defaults_of(f: Callable[..., Any]) -> dict[str, bool]:
    """The needs that a function's signature names, and whether each has a default of
    its own: `{"step": False}` of `def f(params, x, *, step)`. A wrapper that takes
    `**needs` shows none.
    """
    return {
        p.name: p.default is not p.empty
        for p in _parameters(f) or ()
        if p.name in NEEDS
    }


def without_missing(
    given: Mapping[str, Any], f: Callable[..., Any], who: str, name: str, head: str
) -> dict[str, Any]:
    """The needs that a function is called with: what the call gave nothing for is left
    out, where the function's own default holds then.

    Arguments:
        given: by the names of the needs; `None`: nothing.
        f: the layer's function, or its `init`.
        who: what it is, in errors; `name` its name, and `head` its positional
            parameters.

    Raises:
        ValueError: a need without default that cannot be missing.
    """
    # By identity: an array of numpy compares with `None` entry by entry.
    if all(value is not None for value in given.values()):
        return dict(given)
    defaults = defaults_of(f)
    passed = {}
    for need, value in given.items():
        if value is None and BY_NAME[need].giver is Giver.CALL:
            if need in defaults and not defaults[need] and BY_NAME[need].required:
                raise ValueError(
                    f"{who} asks for the need {need!r}, which this call was not given: "
                    f"pass `{need}=...`, or give the parameter a default: "
                    f"`def {name}({head}, *, {need}={BY_NAME[need].usual})`"
                )
            # Of a wrapper that takes `**needs` nobody sees a default. What a layer
            # cannot do without is left out there too; then Python itself complains.
            if defaults.get(need, BY_NAME[need].required):
                continue
        passed[need] = value
    return passed


def _parameters(f: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """A function's parameters, without those bound by keyword in a partial; `None` for
    a builtin without signature.
    """
    try:
        parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):
        return None
    # `inspect.signature` gives a bound keyword as one with a default. `__wrapped__` is
    # what `jax.jit` has wrapped, such as a partial.
    bound: set[str] = set()
    inner: Any = f
    while True:
        if isinstance(inner, functools.partial):
            bound.update(inner.keywords)
            inner = inner.func
        elif hasattr(inner, "__wrapped__"):
            inner = inner.__wrapped__
        else:
            return [p for p in parameters if p.name not in bound]
