"""Places of a module's variables in those of the whole model.

layer(Block(), path="transformer/h/0")          all of it there
    -> (Place(own=(), model=("transformer", "h", "0")),)
layer(Embed(), path={"wte": "transformer/wte",  each part in a place of its own
                     "wpe": "transformer/wpe"})
    -> (Place(("wte",), ("transformer", "wte")), Place(("wpe",), …))
layer(Block(), stacked="blocks")                a row of what is there
    -> (Place((), ("blocks",), stacked=True),)
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from fpipe._core.errors import shown

# Names in nested dicts. A number is a string, as a file gives it back.
Names: TypeAlias = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a part of a module's variables, in every collection.

    Attributes:
        own: the path in the module's own variables; `()` for all of them.
        model: the path in the variables of the whole model.
        stacked: whether the arrays there have a row for each layer that names it.
    """

    own: Names
    model: Names
    stacked: bool = False

    def __str__(self) -> str:
        return "/".join(self.model)


def parse_places(
    path: str | Mapping[str, str] | None, stacked: str | None, call: str
) -> tuple[Place, ...]:
    """The places that a user names, `()` if none.

    Raises:
        TypeError: no names.
        ValueError: both, or one place for two parts.
    """
    for argument, value in (("path", path), ("stacked", stacked)):
        texts = [value]
        if isinstance(value, Mapping) and argument == "path":
            texts = [name for pair in value.items() for name in pair]
        if value is not None and not all(isinstance(text, str) for text in texts):
            also = ", or a dict from names in it to paths" if argument == "path" else ""
            raise TypeError(
                f"{call}: {argument}= is the path of the module's variables in the "
                f"whole model, such as 'transformer/h/0'{also}, got {shown(value)}"
            )
    if path is not None and stacked is not None:
        raise ValueError(
            f"{call}: path={shown(path)} and stacked={shown(stacked)}; a part of what "
            "is stacked is `stacked='blocks/attention'`"
        )
    if stacked is not None:
        return (Place((), _names(stacked), stacked=True),)
    if isinstance(path, str):
        return (Place((), _names(path)),)
    places = tuple(Place(_names(o), _names(m)) for o, m in (path or {}).items())
    for end in ("own", "model"):
        paths = sorted(getattr(place, end) for place in places)
        # Sorted, a path stands right before those inside it.
        for outer, inner in itertools.pairwise(paths):
            if inner[: len(outer)] == outer:
                raise ValueError(
                    f"{call}: path={shown(path)} names {'/'.join(inner)!r} twice"
                )
    return places


def _names(path: str) -> Names:
    return tuple(path.split("/")) if path else ()


def in_model(places: Sequence[Place], own: Names) -> tuple[Place, Names] | None:
    """The place that a variable of the module belongs to, and its names in the whole
    model; `None`: no place has it.
    """
    for place in places:
        if own[: len(place.own)] == place.own:
            return place, (*place.model, *own[len(place.own) :])
    return None


def as_names(path: Sequence[Any]) -> Names:
    """A path with strings for numbers."""
    return tuple(map(str, path))
