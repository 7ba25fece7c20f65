"""How a module is called: its inputs, and the argument that says whether it trains."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fpipe._core.pytrees import PyTree

# The arguments that Flax modules use, and whether they are true in training.
SWITCHES = {
    "train": True,
    "training": True,
    "deterministic": False,
    "use_running_average": False,
}


class Switch(NamedTuple):
    """An argument that is fed from the need `train`.

    Attributes:
        name: of the parameter.
        value: what it is in training.
        place: its place among the positional parameters after `self`; `None` if it is
            keyword-only.
    """

    name: str
    value: bool
    place: int | None


@dataclasses.dataclass(frozen=True)
class Calling:
    """How a module is called.

    Attributes:
        several: a tuple is several inputs; otherwise `x` is one input, whatever it is.
        named: a dict is inputs by name.
        switches: the arguments that say whether the module trains.
        train: the value that the layer was given once and for all; `None`: as each call
            says.
    """

    several: bool
    named: bool
    switches: tuple[Switch, ...]
    train: bool | None

    def trains(self, train: bool) -> bool:
        """Whether the module trains in a call."""
        return train if self.train is None else self.train

    def arguments(
        self, x: PyTree, train: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call."""
        args: tuple[Any, ...] = x if self.several and isinstance(x, tuple) else (x,)
        kwargs: dict[str, Any] = {}
        if self.named and isinstance(x, dict):
            args, kwargs = (), dict(x)
        for name, value, place in self.switches:
            given = value == self.trains(train)
            # By position where it can be: `nn.remat(static_argnums=...)` counts
            # positions.
            if place == len(args) and not kwargs:
                args = (*args, given)
            else:
                kwargs[name] = given
        return args, kwargs


def calling(
    f: Callable[..., Any],
    train: str | bool | None,
    chained: bool,
    fields: Mapping[str, Any],
    who: str,
) -> Calling:
    """How to call the method `f(self, ...)` of a module.

    Arguments:
        train: the name of the argument that says whether it trains, with `"not "`
            before it where the argument says the opposite; or what the layer does in
            every call; `None`: found in the signature.
        chained: the module stands in a Flax `Sequential`, which passes tuples as
            several and dicts as named inputs.
        fields: attributes of the module: an argument that is set there is not given
            again, which Flax refuses.
        who: the call, for errors.

    Raises:
        ValueError: no argument of that name.
    """
    parameters = parameters_of(f)
    positional = [
        p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    place = {p.name: n for n, p in enumerate(positional)}
    values = dict(SWITCHES)
    if isinstance(train, str):
        name = train.removeprefix("not ")
        if name not in {p.name for p in parameters} and not any(
            p.kind is p.VAR_KEYWORD for p in parameters
        ):
            raise ValueError(
                f"{who}: train={train!r}, but the arguments are "
                f"{[p.name for p in parameters]}"
            )
        values = {name: name == train}
    elif not isinstance(train, (bool, type(None))):
        raise TypeError(
            f"{who}: train= is the name of an argument, True, False or None, got "
            f"{train!r}"
        )
    names = (
        list(values)
        if isinstance(train, str)
        else [p.name for p in parameters if p.name in values]
    )
    switches = tuple(
        Switch(n, values[n], place.get(n)) for n in names if fields.get(n) is None
    )
    required = [p for p in positional if p.default is p.empty and p.name not in names]
    several = (
        chained
        or len(required) > 1
        or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    )
    return Calling(
        several, chained, switches, train if isinstance(train, bool) else None
    )


def method_of(
    kind: type, method: str | Callable[..., Any] | None, who: str
) -> Callable[..., Any]:
    """The method of a module that a layer calls, as a function of `self`.

    Raises:
        TypeError: neither a name nor a function; a module without that method.
    """
    if callable(method):
        return getattr(method, "__func__", method)  # of a bound method its function
    if not isinstance(method, (str, type(None))):
        raise TypeError(
            f"{who}: method= is the name of a method, or of a linen module a function, "
            f"got {method!r}"
        )
    name = method or "__call__"
    if not any(
        name in vars(base) for base in kind.__mro__
    ):  # `getattr` would find that of the metaclass
        raise TypeError(
            f"{who}: {kind.__name__} has no method {name!r}; name the one to call: "
            "`method=...`"
        )
    return getattr(kind, name)


def parameters_of(f: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a method after `self`."""
    return list(inspect.signature(f).parameters.values())[1:]
