"""How a module is called: its inputs, and the argument that says whether it trains.

In comes the method of a module, out comes a `Calling`. Of the method

    def __call__(self, x, mask, deterministic): ...

it is

    Calling(several=True, named=False, train=None,
            switches=(Switch("deterministic", in_training=False, place=2),))

so that in training a layer that gets `(h, m)` calls `module(h, m, False)`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fpipe._core.errors import shown
from fpipe._core.pytrees import PyTree

# The arguments that Flax modules use, and whether they are true in training.
SWITCHES = {
    "train": True,
    "training": True,
    "deterministic": False,
    "use_running_average": False,
}


@dataclasses.dataclass(frozen=True)
class Switch:
    """An argument that is fed from the need `train`.

    Attributes:
        name: of the parameter.
        in_training: its value in training; otherwise it has the opposite.
        place: its place among the positional parameters after `self`; `None` if it is
            keyword-only.
    """

    name: str
    in_training: bool
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
        """Whether the module trains in a call with this `train`."""
        return train if self.train is None else self.train

    def arguments(
        self, x: PyTree, train: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call.

        With the example of this module, `arguments((h, m), train=True)` is
        `((h, m, False), {})`.
        """
        # A layer has one input; a module's call may have several.
        args: tuple[Any, ...] = (x,)
        kwargs: dict[str, Any] = {}
        if self.several and isinstance(x, tuple):
            args = x
        elif self.named and isinstance(x, dict):
            args = ()
            kwargs = dict(x)
        for switch in self.switches:
            value = switch.in_training == self.trains(train)
            # By position where it can be: `nn.remat(static_argnums=...)` counts
            # positions.
            if switch.place == len(args) and not kwargs:
                args = (*args, value)
            else:
                kwargs[switch.name] = value
        return args, kwargs


def find_calling(
    method: Callable[..., Any],
    train: str | bool | None,
    chained: bool,
    fields: Mapping[str, Any],
    call: str,
) -> Calling:
    """How to call `method(self, ...)` of a module.

    Arguments:
        train: the name of the argument that says whether it trains, with `"not "`
            before it where the argument says the opposite; or what the layer does in
            every call; `None`: found in the signature.
        chained: the module stands in a Flax `Sequential`, which passes tuples as
            several and dicts as named inputs.
        fields: attributes of the module: an argument that is set there is not given
            again, which Flax refuses.
        call: for errors.

    Raises:
        ValueError: no argument of that name.
    """
    # Flax has no common way to say "training": modules name the argument as they like,
    # and some the wrong way round (`deterministic`). The names of Flax's own modules
    # are known; for others the user says which it is.
    parameters = parameters_of(method)
    positional = [
        p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    names = [p.name for p in parameters]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)

    if isinstance(train, str):
        name = train.removeprefix("not ")
        if name not in names and not open_ended:
            raise ValueError(
                f"{call}: train={shown(train)}, but the arguments are {names}"
            )
        # "frozen" is true in training, "not frozen" false.
        in_training = {name: name == train}
    elif train is None or isinstance(train, bool):
        in_training = {name: SWITCHES[name] for name in names if name in SWITCHES}
    else:
        raise TypeError(
            f"{call}: train= is the name of an argument, True, False or None, got "
            f"{shown(train)}"
        )
    # What the module's fields say already, as `nn.Dropout(deterministic=True)` does,
    # cannot be said by the call too.
    places = {p.name: place for place, p in enumerate(positional)}
    switches = tuple(
        Switch(name, value, places.get(name))
        for name, value in in_training.items()
        if fields.get(name) is None
    )
    # Only required ones: an optional mask does not make a tuple two inputs.
    inputs = [
        p for p in positional if p.default is p.empty and p.name not in in_training
    ]
    return Calling(
        several=chained or len(inputs) > 1 or variadic,
        named=chained,
        switches=switches,
        train=train if isinstance(train, bool) else None,
    )


def find_method(
    kind: type, method: str | Callable[..., Any] | None, call: str
) -> Callable[..., Any]:
    """The method of a module that a layer calls, as a function of `self`.

    Raises:
        TypeError: neither a name nor a function; a module without that method.
    """
    if callable(method):
        return getattr(method, "__func__", method)  # of a bound method its function
    if not isinstance(method, (str, type(None))):
        raise TypeError(
            f"{call}: method= is the name of a method, or of a linen module a "
            f"function, got {shown(method)}"
        )
    name = method or "__call__"
    # `hasattr` would find the `__call__` of the metaclass.
    if not any(name in vars(base) for base in kind.__mro__):
        raise TypeError(
            f"{call}: {kind.__name__} has no method {name!r}; name the one to call: "
            "`method=...`"
        )
    return getattr(kind, name)


def parameters_of(method: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a method after `self`."""
    return list(inspect.signature(method).parameters.values())[1:]
