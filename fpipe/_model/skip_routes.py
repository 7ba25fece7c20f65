"""Where the skips of a model go: from its flat layers to one route for each skip.

    layer 0  encode  stash=["a"]
    layer 1  inner   stash=["a"] (in a namespace)
    layer 2  look    peek=["a"]
    layer 3  outer   pop=["a"] (in the same namespace)
    layer 4  decode  pop=["a"]

becomes

    Skip(-1, "a"): SkipRoute(maker=0, readers=(2, 4))
    Skip(0, "a"):  SkipRoute(maker=1, readers=(3,))

Declarations that do not fit together have no route. One error lists all of them.
"""

import dataclasses
import enum
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fpipe._model.layer import Layer, flatten_layers
from fpipe._model.skips import Namespace


class Skip(NamedTuple):
    """A skip of the whole model: its name, and the number of its namespace.

    The number is -1 for a skip in no namespace. It is written `a`, or `a#0` in the
    first namespace.
    """

    namespace: int
    name: str

    def __str__(self) -> str:
        return self.name if self.namespace < 0 else f"{self.name}#{self.namespace}"


@dataclasses.dataclass(frozen=True)
class SkipRoute:
    """The layer that stashes a skip, and the layers that peek at it or pop it, in
    order.
    """

    maker: int
    readers: tuple[int, ...]


class Problem(enum.Enum):
    """What can be wrong with one declaration of a skip."""

    STASH_AND_READ = enum.auto()
    POP_AND_PEEK = enum.auto()
    NEVER_STASHED = enum.auto()
    STASHED_LATER = enum.auto()
    STASHED_ELSEWHERE = enum.auto()
    POPPED_TWICE = enum.auto()
    PEEKED_AFTER_POP = enum.auto()
    STASHED_TWICE = enum.auto()
    NEVER_READ = enum.auto()


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """A declaration that does not fit.

    Arguments:
        problem: what is wrong with it.
        layer, field, skip: the declaration: `field` is "stash", "pop" or "peek".
        other: the layer whose declaration of the same skip it conflicts with.
    """

    problem: Problem
    layer: int
    field: str
    skip: Skip
    other: int | None = None


def verify_skippables(layers: Iterable[Any]) -> None:
    """Check the skips of a whole model. One error reports all mistakes.

    `Pipe` calls this itself.

    Arguments:
        layers: functions, `Layer`s, or sequences of them, nested to any depth.

    Raises:
        ValueError: one layer declares a skip in two ways. A skip is stashed twice, or
            popped twice, without a namespace. A skip is popped or peeked, and no
            earlier layer stashes it. A skip is peeked after its pop. A skip is stashed
            and never popped or peeked.
    """
    find_skip_routes(number_namespaces(flatten_layers(layers)))


def find_skip_routes(layers: Sequence[Layer]) -> dict[Skip, SkipRoute]:
    """The route of every skip, in the order of the stashes.

    Arguments:
        layers: flat, their namespaces numbered.

    Raises:
        ValueError: with all mismatches, layer by layer.
    """
    # All stashes first: a skip that is read too early is told from one that nobody
    # stashes.
    # Two passes over the layers and a look at what is left over:
    #     makers     who stashes each skip (the first, if it is stashed twice)
    #     poppers    who has popped it so far, while layers are read in order
    #     left over  skips that nobody has read
    # A wrong declaration is noted and the search goes on: one round trip for the user,
    # as torchgpipe's `verify_skippables` has it.
    makers: dict[Skip, int] = {}
    for position, layer in enumerate(layers):
        for name in layer.stash:
            makers.setdefault(skip_of(layer, name), position)

    # Then layer by layer, so that `poppers` has what is gone when a layer reads.
    readers: dict[Skip, list[int]] = {skip: [] for skip in makers}
    poppers: dict[Skip, int] = {}
    mismatches: list[Mismatch] = []
    for position, layer in enumerate(layers):
        reads = [("pop", name) for name in layer.pop]
        reads += [("peek", name) for name in layer.peek]
        for field, name in reads:
            skip = skip_of(layer, name)
            maker = makers.get(skip)
            popper = poppers.get(skip)
            problem: Problem | None = None
            other: int | None = None
            if name in layer.stash:
                problem = Problem.STASH_AND_READ
            elif field == "peek" and name in layer.pop:
                problem = Problem.POP_AND_PEEK
            elif maker is None:
                problem = Problem.NEVER_STASHED
                if any(name == made.name for made in makers):
                    problem = Problem.STASHED_ELSEWHERE
            elif maker > position:
                problem, other = Problem.STASHED_LATER, maker
            elif popper is not None:
                problem, other = Problem.POPPED_TWICE, popper
                if field == "peek":
                    problem = Problem.PEEKED_AFTER_POP
            if problem is None:
                readers[skip].append(position)
            else:
                mismatches.append(Mismatch(problem, position, field, skip, other))
            # A wrong pop counts too: else the same skip would be reported once more,
            # as never read.
            if field == "pop":
                poppers.setdefault(skip, position)
        for name in layer.stash:
            skip = skip_of(layer, name)
            maker = makers[skip]
            if maker != position:
                mismatches.append(
                    Mismatch(Problem.STASHED_TWICE, position, "stash", skip, maker)
                )
    # A skip that is only peeked at is freed after its last reader: the layers of a
    # decoder that all read the same need not be told which of them is the last one.
    for skip, maker in makers.items():
        if skip not in poppers and not readers[skip]:
            mismatches.append(Mismatch(Problem.NEVER_READ, maker, "stash", skip))

    if mismatches:
        wrong = explain_mismatches(mismatches, layers)
        raise ValueError(
            "`verify_skippables`: " + "".join(f"\n  - {line}" for line in wrong)
        )
    return {skip: SkipRoute(makers[skip], tuple(readers[skip])) for skip in makers}


def explain_mismatches(
    mismatches: Iterable[Mismatch], layers: Sequence[Layer]
) -> list[str]:
    """A line for each mismatch: which layers, what is wrong, how to put it right.

    The search returns data and writes no text: a line may name two layers, and one
    place decides how an error names a layer.
    """
    titles = [f"layer {k} {layer.name!r}" for k, layer in enumerate(layers)]
    wrong: list[str] = []
    for mismatch in mismatches:
        who = titles[mismatch.layer]
        other = "" if mismatch.other is None else titles[mismatch.other]
        name = mismatch.skip.name
        field = mismatch.field
        match mismatch.problem:
            case Problem.STASH_AND_READ:
                wrong.append(
                    f"{who} declares {name!r} both as stash and as {field}; keep one"
                )
            case Problem.POP_AND_PEEK:
                wrong.append(
                    f"{who} declares {name!r} both as pop and as peek; keep one"
                )
            case Problem.NEVER_STASHED:
                wrong.append(
                    f"{who} declares {field}=[{name!r}], but it is never stashed"
                )
            case Problem.STASHED_LATER:
                wrong.append(
                    f"{who} declares {field}=[{name!r}], but it is stashed only later, "
                    f"by {other}"
                )
            case Problem.STASHED_ELSEWHERE:
                wrong.append(
                    f"{who} declares {field}=[{name!r}], but it is stashed only in "
                    "another namespace: isolate both ends with the same one"
                )
            case Problem.POPPED_TWICE:
                wrong.append(
                    f"{name!r} is popped by {other} and {who} pops it again; isolate "
                    "the pairs with namespaces, or let all readers but the last one "
                    "peek"
                )
            case Problem.PEEKED_AFTER_POP:
                wrong.append(
                    f"{name!r} is popped by {other} and {who} peeks at it after that; "
                    "isolate the pairs with namespaces, or let all readers but the "
                    "last one peek"
                )
            case Problem.STASHED_TWICE:
                wrong.append(
                    f"{name!r} is stashed by {other} and again by {who}; isolate the "
                    "pairs with namespaces: `layer.isolate(fpipe.Namespace())`"
                )
            case Problem.NEVER_READ:
                wrong.append(
                    f"{name!r} is stashed by {who}, but no later layer pops it or "
                    "peeks at it"
                )
    return wrong


def skip_of(layer: Layer, name: str) -> Skip:
    """The whole model's name for a skip that a layer knows by its own."""
    namespace = dict(layer.namespaces).get(name)
    return Skip(-1 if namespace is None else namespace.number, name)


def number_namespaces(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """The layers with their namespaces numbered by first use, so that every process and
    every run agrees on their order and identity.
    """
    # A namespace is equal to itself alone, and layers of another model may bring
    # numbers of their own. So every namespace gets a new number.
    numbered: dict[Namespace, Namespace] = {}
    result = []
    for layer in layers:
        namespaces = []
        for name, namespace in layer.namespaces:
            if namespace not in numbered:
                numbered[namespace] = Namespace.numbered(len(numbered))
            namespaces.append((name, numbered[namespace]))
        if namespaces:
            layer = dataclasses.replace(layer, namespaces=tuple(namespaces))
        result.append(layer)
    return tuple(result)
