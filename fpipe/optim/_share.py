"""Steps shared out over the devices of a mesh, which all run one program: plain data.

A step that takes arrays of one device is that device's. What a step takes of several
devices (the squares of all gradients), or what one takes beside a large array of
another, is *exchanged*: small values, as a rule, which every device then has. A step
that takes only what all have is done wherever its result is needed, by all if need be.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from fpipe.optim._cut import SMALL, size
from fpipe.optim._steps import Step, Steps


@dataclasses.dataclass(frozen=True)
class Shares:
    """A function of arrays on several devices, as what each device does.

    Attributes:
        owner: the device of each value that is one device's.
        exchanges: the values that all devices get, in the rounds in which they can.
    """

    steps: Steps
    owner: Mapping[int, int]
    exchanges: tuple[tuple[int, ...], ...]

    def body(self, wanted: Iterable[int], known: Iterable[int]) -> tuple[Step, ...]:
        """The steps that make some values from others."""
        graph, have = self.steps, {*known, *self.steps.inputs, *self.steps.consts}
        numbers: set[int] = set()
        stack = list(wanted)
        while stack:
            v = stack.pop()
            if v in have or self._maker[v] in numbers:
                continue
            numbers.add(self._maker[v])
            stack += graph.needs(graph.steps[self._maker[v]])
        return tuple(graph.steps[n] for n in sorted(numbers))

    def __post_init__(self) -> None:
        object.__setattr__(
            self,
            "_maker",
            {v: n for n, s in enumerate(self.steps.steps) for v in s.outs},
        )

    _maker: Mapping[int, int] = dataclasses.field(init=False, repr=False, compare=False)


def share(
    graph: Steps, given: Sequence[int | None], wanted: Sequence[int | None]
) -> Shares:
    """Share out a function.

    Arguments:
        given: the device of each input, `None` for what all have.
        wanted: the device that each output is for, `None` for all.
    """
    owner = {v: d for v, d in zip(graph.inputs, given, strict=True) if d is not None}
    ready = dict.fromkeys(
        (*graph.inputs, *graph.consts), 0
    )  # the exchanges before a value can be made
    sent: dict[int, int] = {}  # values that are exchanged, and when

    def send(values: Iterable[int]) -> int:
        for v in values:
            sent[v] = ready[v]
        return max((ready[v] + 1 for v in values), default=0)

    for step in graph.steps:
        needs = dict.fromkeys(graph.needs(step))
        place = _place(
            {v: (owner[v], size(graph.avals[v])) for v in needs if v in owner}
        )
        foreign = [v for v in needs if v in owner and owner[v] != place]
        at = max(
            send(foreign), max((ready[v] for v in needs if v not in foreign), default=0)
        )
        ready.update(dict.fromkeys(step.outs, at))
        if place is not None:
            owner.update(dict.fromkeys(step.outs, place))
    send(
        [
            v
            for v, d in zip(graph.outputs, wanted, strict=True)
            if v in owner and owner[v] != d
        ]
    )
    rounds = 1 + max(sent.values(), default=-1)
    return Shares(
        graph,
        owner,
        tuple(tuple(v for v, r in sent.items() if r == n) for n in range(rounds)),
    )


def _place(held: Mapping[int, tuple[int, int]]) -> int | None:
    """The device that does a step with these values of one device each: all, if no
    device has the large ones.
    """
    devices = {d for d, _ in held.values()}
    if len(devices) > 1:
        devices = {d for d, nbytes in held.values() if nbytes > SMALL}
    return devices.pop() if len(devices) == 1 else None
