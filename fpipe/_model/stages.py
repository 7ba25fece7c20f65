"""Stages: spans of layers as functions from ports to ports.

Everything that enters or leaves a stage is a *port*: the parameters of a layer (its own
or a borrowed one), the boundary, a skip, side inputs, targets, state, the key. A port
is a pytree; its arrays are its *leaves*. The plan sends all of them by the same
mechanism.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from fpipe._core.pytrees import PyTree, describe, pack
from fpipe._model.loss import Loss
from fpipe._model.model import Model
from fpipe._model.skip_routes import Skip


class Port(NamedTuple):
    """The name of what enters or leaves a stage; `of` is a layer or a skip where there
    are several.
    """

    kind: Literal[
        "params",
        "x",
        "y",
        "skip",
        "side",
        "targets",
        "state",
        "key",
        "index",
        "number",
        "loss",
        "weight",
        "aux",
    ]
    of: Any = None

    def __str__(self) -> str:
        return self.kind if self.of is None else f"{self.kind} {self.of}"


class Leaf(NamedTuple):
    """An array of a port."""

    port: Port
    k: int

    def __str__(self) -> str:
        return f"{self.port}[{self.k}]"


X, Y, SIDE, TARGETS, KEY, INDEX = (
    Port(k) for k in ("x", "y", "side", "targets", "key", "index")
)
LOSS, WEIGHT, AUX = (Port(k) for k in ("loss", "weight", "aux"))

# Ports that are the same for every microbatch of a call.
CONSTANT = ("params", "key", "number")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A span of layers that live together.

    Attributes:
        model: the whole model.
        index: `s`.
        span: its layers.
        skips_in, skips_out: the skips that it takes from earlier stages, and those that
            later ones read.
        last: whether its `y` is the model's.
    """

    model: Model
    index: int
    span: range
    skips_in: tuple[Skip, ...]
    skips_out: tuple[Skip, ...]
    last: bool

    @property
    def params(self) -> tuple[int, ...]:
        """The layers whose parameters it uses: its own, then borrowed ones."""
        borrowed = {
            owner for k in self.span for _, owner in self.model.borrows[k]
        } - set(self.span)
        return (*self.span, *sorted(borrowed))

    @property
    def described(self) -> str:
        """Its layers by number and name, for errors."""
        layers = [f"{k} {self.model.layers[k].name!r}" for k in self.span]
        return (
            "no layers"
            if not layers
            else f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}"
        )

    def asks(self, need: str) -> bool:
        """Whether any of its layers declares a need."""
        return any(k in self.span for k in self.model.needing(need))

    @property
    def keyed(self) -> tuple[int, ...]:
        """Its layers that ask for a key."""
        return tuple(k for k in self.model.needing("key") if k in self.span)

    @property
    def stateful(self) -> tuple[int, ...]:
        """Its layers with state."""
        return tuple(k for k in self.model.stateful if k in self.span)

    def run(
        self, given: Mapping[Port, PyTree], train: bool, loss: Loss | None, where: str
    ) -> dict[Port, PyTree]:
        """The stage as a function from ports to ports."""
        y, skips, state = self.model.apply(
            self.span,
            {k: given[Port("params", k)] for k in self.params},
            given[X],
            skips={skip: given[Port("skip", skip)] for skip in self.skips_in},
            state={k: given[Port("state", k)] for k in self.stateful},
            side=given.get(SIDE),
            key=given.get(KEY),
            microbatch=given.get(INDEX, 0),
            numbers={
                k: given[Port("number", k)]
                for k in self.span
                if Port("number", k) in given
            },
            train=train,
            where=where,
        )
        out = {Port("skip", skip): skips[skip] for skip in self.skips_out}
        out |= {Port("state", k): state[k] for k in self.stateful}
        if self.last and loss is not None:
            value, weight, aux = loss(y, given[TARGETS], where)
            return (
                out
                | {LOSS: value, AUX: aux}
                | ({} if weight is None else {WEIGHT: weight})
            )
        if not pack(y)[0]:
            k = self.span[-1]
            raise TypeError(
                f"stage {self.index} ends with layer {k} "
                f"{self.model.layers[k].name!r}, which returned {describe(y)}: a "
                "boundary needs at least one array"
            )
        return out | {Y: y}


def cut_stages(model: Model, balance: Sequence[int]) -> tuple[Stage, ...]:
    """Cut a model into stages of `balance` layers each."""
    ends = [sum(balance[: s + 1]) for s in range(len(balance))]
    at = {k: s for s, end in enumerate(ends) for k in range(end - balance[s], end)}
    routes = [
        (skip, at[r.maker], {at[k] for k in r.readers})
        for skip, r in model.routes.items()
    ]
    return tuple(
        Stage(
            model,
            s,
            range(end - balance[s], end),
            skips_in=tuple(
                skip for skip, source, readers in routes if source < s and s in readers
            ),
            skips_out=tuple(
                skip
                for skip, source, readers in routes
                if source == s and max(readers) > s
            ),
            last=s == len(ends) - 1,
        )
        for s, end in enumerate(ends)
    )
