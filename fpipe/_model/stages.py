"""Stages: spans of layers as functions from ports to ports.

Everything that enters or leaves a stage is a *port*. A port is a pytree; its arrays are
its *leaves*. The executors send all of them by the same mechanism. What enters:

    Port("params", 3)     the parameters of layer 3, its own or a borrowed one
    Port("x")             the boundary, or the call's `x`
    Port("skip", skip)    a skip that an earlier stage stashed
    Port("state", 3)      the state of layer 3
    Port("side")          what the call gives for a need, whole or the microbatch's rows
    Port("index")         the microbatch's number, where keys are made from it
    Port("number", 3)     the number that the keys of layer 3 are made from
    Port("first")         the number of its first layer, where a program calls Python

What leaves: `Port("y")`, `Port("skip", …)`, `Port("state", …)`, and, in the place of
`y` where the stage ends with the loss, `Port("loss")`, `Port("weight")`, `Port("aux")`.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fpipe._core.pytrees import PyTree, describe, pack
from fpipe._model.loss import Loss
from fpipe._model.model import Model
from fpipe._model.needs import INPUTS, OF_CALL, Share
from fpipe._model.skip_routes import Skip


class Port(NamedTuple):
    """The name of what enters or leaves a stage.

    Attributes:
        kind: a need of the table (`fpipe._model.needs`), or what a stage makes.
        of: a layer or a skip where there are several.
    """

    kind: str
    of: Any = None

    def __str__(self) -> str:
        return self.kind if self.of is None else f"{self.kind} {self.of}"


class Leaf(NamedTuple):
    """One array of a port, by its number in the port's flattened pytree.

    Programs take and return flat arrays, so they know leaves: `Leaf(Port("params", 3),
    1)` is written `params 3[1]`.
    """

    port: Port
    number: int

    def __str__(self) -> str:
        return f"{self.port}[{self.number}]"


# The ports that a stage has once. The others are made where they are named.
X, Y, TARGETS, SIDE = (Port(k) for k in ("x", "y", "targets", "side"))
KEY, INDEX = Port("key"), Port("index")
FIRST = Port("first")
LOSS, WEIGHT, AUX = (Port(k) for k in ("loss", "weight", "aux"))

# The ports of what a call gives, `x` first.
CALL_PORTS = tuple(Port(name) for name in INPUTS)

# Those of them that any stage may read, and that are cut into microbatches.
ROW_NEEDS = tuple(Port(need.name) for need in OF_CALL if need.share is Share.ROWS)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A span of layers that live together.

    Attributes:
        model: the whole model.
        index: its place among the stages that it was cut with.
        span: its layers.
        skips_in, skips_out: the skips that it takes from earlier stages, and those that
            later ones read.
        last: whether its `y` is the model's.
        pipe_stage: `s`, the stage of the pipe that it is, or that it is a part of: the
            number that users are told.
    """

    model: Model
    index: int
    span: range
    skips_in: tuple[Skip, ...]
    skips_out: tuple[Skip, ...]
    last: bool
    pipe_stage: int

    @property
    def param_layers(self) -> tuple[int, ...]:
        """The layers whose parameters it uses: its own, then borrowed ones."""
        # Borrowed ones come in the order of layers: a set has no order that every
        # process agrees on.
        borrowed = {
            owner for k in self.span for _, owner in self.model.borrows[k]
        } - set(self.span)
        return (*self.span, *sorted(borrowed))

    @property
    def described(self) -> str:
        """Its layers by number and name, for errors."""
        layers = [f"{k} {self.model.layers[k].name!r}" for k in self.span]
        if not layers:
            # Under scan the loss may stand apart from the layers before it.
            return "the loss function" if self.last else "no layers"
        return f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}"

    def asks(self, need: str) -> bool:
        """Whether any of its layers declares a need."""
        return any(k in self.span for k in self.model.needing(need))

    @property
    def keyed(self) -> tuple[int, ...]:
        """The numbers of its layers that ask for a key."""
        return tuple(k for k in self.model.needing("key") if k in self.span)

    @property
    def stateful(self) -> tuple[int, ...]:
        """The numbers of its layers with state."""
        return tuple(k for k in self.model.stateful if k in self.span)

    @property
    def ordered(self) -> bool:
        """Whether its microbatches have an order: one takes the state that the one
        before it left.
        """
        layers = [self.model.layers[k] for k in self.stateful]
        return any(not (a.state_rows or a.overwrite is True) for a in layers)

    @functools.cached_property
    def call_inputs(self) -> tuple[Port, ...]:
        """The ports of what it reads of what a call gives, targets aside."""
        # Later stages have `X` too, but there it is the `y` of the stage before.
        first = (X,) if self.index == 0 else ()
        return (*first, *(Port(n.name) for n in OF_CALL if self.asks(n.name)))

    def run(
        self, inputs: Mapping[Port, PyTree], loss: Loss | None, where: str
    ) -> dict[Port, PyTree]:
        """The stage as a function from ports to ports.

        Arguments:
            inputs: what enters, by port.
            loss: of a call with a loss; the last stage ends with it.
            where: the stage and the microbatch, for errors.
        """
        # The one place where ports become arguments of the model and results become
        # ports: both executors, the plans and the costs trace this function and know
        # ports alone.
        y, skips, state = self.model.apply(
            self.span,
            {k: inputs[Port("params", k)] for k in self.param_layers},
            inputs[X],
            skips={skip: inputs[Port("skip", skip)] for skip in self.skips_in},
            state={k: inputs[Port("state", k)] for k in self.stateful},
            needs={n.name: inputs.get(Port(n.name), n.missing) for n in OF_CALL},
            microbatch=inputs.get(INDEX, 0),
            numbers={
                k: inputs[Port("number", k)]
                for k in self.span
                if Port("number", k) in inputs
            },
            where=where,
            traced=True,
        )
        # A skip whose reader is in this stage too has no port: it never leaves the
        # program.
        out = {Port("skip", skip): skips[skip] for skip in self.skips_out}
        out |= {Port("state", k): state[k] for k in self.stateful}
        # The loss takes the place of `y`: an output that nobody reads would be kept
        # alive.
        if self.last and loss is not None:
            value, weight, aux = loss(y, inputs[TARGETS], where)
            return (
                out
                | {LOSS: value, AUX: aux}
                | ({} if weight is None else {WEIGHT: weight})
            )
        # The next stage waits for the arrays of its boundary; without one there is
        # nothing to wait for, and no gradient could come back.
        if not pack(y)[0]:
            k = self.span[-1]
            raise TypeError(
                f"stage {self.pipe_stage} ends with layer {k} "
                f"{self.model.layers[k].name!r}, which returned {describe(y)}: a "
                "boundary needs at least one array"
            )
        return out | {Y: y}


def cut_stages(
    model: Model, balance: Sequence[int], pipe_stages: Sequence[int] | None = None
) -> tuple[Stage, ...]:
    """Cut a model into stages of `balance` layers each.

    Arguments:
        pipe_stages: the stage of the pipe that each belongs to, where the cut is finer
            than the pipe's own.

    For three layers, where the first stashes "a" and the last pops it, the balance
    `[1, 1, 1]` makes

        stage    span           skips_in    skips_out
        0        range(0, 1)    ()          (a,)
        1        range(1, 2)    ()          ()          no port: "a" does not pass here
        2        range(2, 3)    (a,)        ()
    """
    ends = [sum(balance[: s + 1]) for s in range(len(balance))]
    at = {k: s for s, end in enumerate(ends) for k in range(end - balance[s], end)}
    # Each skip with the stage that makes it and the set of stages that read it. Readers
    # in the maker's own stage need no port.
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
            pipe_stage=s if pipe_stages is None else pipe_stages[s],
        )
        for s, end in enumerate(ends)
    )
