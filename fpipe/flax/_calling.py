"""How a module is called: its inputs, and the argument that says whether it trains.

In: the method of a module, and what the user says about its arguments. Out: a
`Calling`. For the method

    def __call__(self, h, mask, deterministic): ...

as `fpipe.flax.layer(module, inputs="h", side={"mask": "padding"})` it is

    Calling(inputs="h", side=(SideInput("mask", "padding"),), ...,
            switches=(Switch("deterministic", in_training=False),),
            positional=("h", "mask", "deterministic"))

In training, a layer that gets `h` then calls `module(h, side["padding"], False)`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fpipe._core.checks import as_names
from fpipe._core.errors import shown
from fpipe._core.pytrees import PyTree, describe

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
    """

    name: str
    in_training: bool


@dataclasses.dataclass(frozen=True)
class SideInput:
    """An argument that is one of the call's side inputs.

    Attributes:
        argument: the name of the parameter.
        source: where it is in `side`; `"text/mask"` is a dict in a dict.
    """

    argument: str
    source: str

    def of(self, side: PyTree, layer: str) -> Any:
        """The side input of a microbatch.

        Raises:
            ValueError: it is not there.
        """
        value = side
        for name in self.source.split("/"):
            if not isinstance(value, Mapping) or name not in value:
                raise ValueError(
                    f"layer {layer!r}: the argument {self.argument!r} of its module is "
                    f"the side input {self.source!r}, but side is {describe(side)}: "
                    f"pass `side={{{self.source.split('/')[0]!r}: ...}}`"
                )
            value = value[name]
        return value


@dataclasses.dataclass(frozen=True)
class Calling:
    """How a module is called.

    Attributes:
        several: a tuple is several inputs; otherwise `x` is one input, whatever it is.
        named: a dict is inputs by name.
        inputs: what the user said in their place: the name of the one argument that `x`
            is, or of the arguments that its entries are.
        side: the arguments that are side inputs.
        switches: the arguments that say whether the module trains.
        train: the value that the layer was given once and for all; `None`: as each call
            says.
        positional: the names of the positional parameters after `self`.
        carry: whether it takes skips, by a keyword-only parameter of that name.
    """

    several: bool
    named: bool
    inputs: str | tuple[str, ...] | None
    side: tuple[SideInput, ...]
    switches: tuple[Switch, ...]
    train: bool | None
    positional: tuple[str, ...]
    carry: bool = False

    @property
    def takes_whole(self) -> bool:
        """Whether `x` is one input, even if it is a tuple."""
        if self.inputs is None:
            return not self.several
        return isinstance(self.inputs, str)

    def trains(self, train: bool) -> bool:
        """Whether the module trains in a call with this `train`."""
        return train if self.train is None else self.train

    def arguments(
        self,
        x: PyTree,
        side: PyTree,
        train: bool,
        carry: Mapping[str, PyTree],
        layer: str,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call.

        With the example of this module, `arguments(h, {"padding": m}, True, {},
        "block")` is `((h, m, False), {})`.

        Arguments:
            carry: the skips that the layer pops or peeks.
            layer: its name, for errors.
        """
        # A layer has one input; a module's call may have several.
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if self.inputs is not None:
            kwargs = _by_name(self.inputs, x, layer)
        elif self.several and isinstance(x, tuple):
            args = x
        elif self.named and isinstance(x, dict):
            kwargs = dict(x)
        else:
            args = (x,)
        for each in self.side:
            kwargs[each.argument] = each.of(side, layer)
        if self.carry:
            kwargs["carry"] = dict(carry)
        for switch in self.switches:
            kwargs[switch.name] = switch.in_training == self.trains(train)
        # By position where it can be: `nn.remat(static_argnums=...)` counts positions.
        for name in self.positional[len(args) :]:
            if name not in kwargs:
                break
            args = (*args, kwargs.pop(name))
        return args, kwargs


def _by_name(inputs: str | tuple[str, ...], x: PyTree, layer: str) -> dict[str, PyTree]:
    """What comes in, by the names of the arguments."""
    if isinstance(inputs, str):
        return {inputs: x}
    if isinstance(x, Mapping) and set(x) == set(inputs):
        return dict(x)
    if not isinstance(x, (tuple, list)) or len(x) != len(inputs):
        names = list(inputs)
        raise ValueError(
            f"layer {layer!r}: its inputs are {names}, so it takes a tuple of "
            f"{len(names)} or a dict with these names, got {describe(x)}; for one "
            f"input, whatever it is, write `inputs={names[0]!r}`"
        )
    return dict(zip(inputs, x, strict=True))


def find_calling(
    method: Callable[..., Any],
    train: str | bool | None,
    chained: bool,
    fields: Mapping[str, Any],
    call: str,
    inputs: str | Iterable[str] | None = None,
    side: Mapping[str, str] | None = None,
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
        inputs, side: see `fpipe.flax.layer`.

    Raises:
        TypeError: no names.
        ValueError: no argument of that name, or one that is there twice.
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

    # 1. The arguments that the user names.
    if inputs is not None and not isinstance(inputs, str):
        inputs = as_names(inputs, f"{call}: inputs=")
        if not inputs:
            raise ValueError(f"{call}: inputs=() names no argument")
    side_inputs = _side_inputs(side, call)
    named_inputs = () if inputs is None else inputs
    named_inputs = (named_inputs,) if isinstance(named_inputs, str) else named_inputs
    claims = [("inputs", name) for name in named_inputs]
    claims += [("side", each.argument) for each in side_inputs]
    for argument, name in claims:
        if name not in names and not open_ended:
            raise ValueError(
                f"{call}: {argument}= names {name!r}, but the arguments are {names}"
            )
    twice = {each.argument for each in side_inputs}.intersection(named_inputs)
    if twice:
        raise ValueError(f"{call}: {sorted(twice)} are in inputs= and in side=")

    # 2. The argument that says whether the module trains.
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
    # cannot be said by the call too. What is named as an input is one.
    given = {name for _, name in claims}
    switches = tuple(
        Switch(name, value)
        for name, value in in_training.items()
        if fields.get(name) is None and name not in given
    )
    # 3. The inputs, if nobody names them. Only required ones: an optional mask does not
    # make a tuple two inputs.
    required = [
        p
        for p in positional
        if p.default is p.empty and p.name not in in_training and p.name not in given
    ]
    # By keyword alone, as in a layer: a recurrent cell has an input that is called so.
    takes_carry = any(
        p.name == "carry" and p.kind is p.KEYWORD_ONLY and p.name not in given
        for p in parameters
    )
    return Calling(
        several=chained or len(required) > 1 or variadic,
        named=chained,
        inputs=inputs,
        side=side_inputs,
        switches=switches,
        train=train if isinstance(train, bool) else None,
        positional=tuple(p.name for p in positional),
        carry=takes_carry,
    )


def _side_inputs(side: Mapping[str, str] | None, call: str) -> tuple[SideInput, ...]:
    """The arguments that are side inputs, from `{"argument": "name in side"}`."""
    if side is None:
        return ()
    if not isinstance(side, Mapping) or not all(
        isinstance(name, str) for pair in side.items() for name in pair
    ):
        raise TypeError(
            f"{call}: side= is a dict from names of the module's arguments to names of "
            f"side inputs, got {shown(side)}"
        )
    return tuple(SideInput(argument, source) for argument, source in side.items())


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
