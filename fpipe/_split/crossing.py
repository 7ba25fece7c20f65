"""How many bytes cross each place where a function may be cut.

In: a trace. Out: for each place the bytes of the data that are made before it and used
after it. Of `h = x @ w; y = relu(h) * h`, with 100 bytes in each value, there go

    place    0      1      2             3             4
             x      h      h, relu(h)    y
    bytes    100    100    100           100

because `relu(h)` is not sent: it is made again from `h`, which is sent.

These are estimates: each value is looked at by itself. Which values are sent in the end
is decided for all values that a piece reads together (`pieces.py`).
"""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from fpipe._core.pytrees import nbytes
from fpipe._planning.costs import Sent
from fpipe._split.state import ANYWHERE, StateSides, StateSpans
from fpipe._split.trace import Traced

# Operations that cost no more than to read their inputs: what they make can be made
# again, where that needs fewer bytes than to send it.
# fmt: off
CHEAP = frozenset((
    "abs", "add", "and", "broadcast_in_dim", "ceil", "clamp", "concatenate",
    "convert_element_type", "copy", "cos", "div", "eq", "exp", "expand_dims", "floor",
    "ge", "gt", "integer_pow", "iota", "is_finite", "le", "log", "log2", "logistic",
    "lt", "max", "min", "mul", "name", "ne", "neg", "not", "one_minus_square", "or",
    "pad", "polynomial", "pow", "reshape", "rev", "round", "rsqrt", "select_n", "sign",
    "sin", "slice", "sqrt", "square", "squeeze", "stop_gradient", "sub", "tanh",
    "transpose", "xor",
))
# fmt: on


_FORMS = ("expand_dims", "reshape", "squeeze", "transpose")


def is_form(traced: Traced, v: int) -> bool:
    """Whether a value has the numbers of another one in another form."""
    node = traced.graph.maker.get(v)
    return node is not None and node.name in _FORMS


def remade_from(traced: Traced, v: int) -> tuple[int, ...] | None:
    """The values of the data from which a value is made by a cheap operation, and by
    nothing else that would have to be sent; `None`: it is not.
    """
    node = traced.graph.maker.get(v)
    if node is None or node.name not in CHEAP or v not in traced.of_data:
        return None
    others = [u for u in node.ins if u not in traced.of_data]
    # Parameters would have to be borrowed, keys and state sent.
    if any(
        not values.isdisjoint(others)
        for values in (traced.of_params, traced.of_key, traced.of_state)
    ):
        return None
    return tuple(u for u in node.ins if u in traced.of_data)


@dataclasses.dataclass(frozen=True, eq=False)
class Crossing:
    """What goes over each place of a trace."""

    traced: Traced

    @cached_property
    def bytes(self) -> np.ndarray:
        """The bytes of data that cross each place, `(equations + 1,)`. Infinite where a
        cut would divide a state.
        """
        count = len(self.traced.graph.nodes)
        last = dict[int, int]()
        for v, reader in self._reads():
            for u in self._sent_for[v]:
                last[u] = max(last.get(u, 0), reader)
        steps = np.zeros(count + 2)
        for v, reader in last.items():
            steps[self._made_at(v) + 1] += self._bytes_of(v)
            steps[reader + 1] -= self._bytes_of(v)
        across = np.cumsum(steps)[: count + 1]
        return np.where(self.state.divided(count + 1), np.inf, across)

    def sent(self, places: Sequence[int]) -> list[Sent]:
        """What goes between the units that lie between some places."""

        def unit(position: int) -> int:
            return bisect.bisect_right(places, position)

        readers: dict[int, set[int]] = {}
        for v, reader in self._reads():
            for u in self._sent_for[v]:
                if unit(self._made_at(u)) < unit(reader):
                    readers.setdefault(u, set()).add(unit(reader))
        return [
            Sent(unit(self._made_at(v)), tuple(sorted(own)), self._bytes_of(v))
            for v, own in sorted(readers.items())
        ]

    @cached_property
    def _sent_for(self) -> dict[int, tuple[int, ...]]:
        """For each value of the data what is sent if it is read after a cut: itself,
        or what it is made again from, if that has no more bytes.
        """
        # Side inputs go to every piece that reads them, over no cut.
        found: dict[int, tuple[int, ...]] = dict.fromkeys(self.traced.row_needs, ())
        found |= {v: (v,) for v in self.traced.x}
        for node in self.traced.live:
            for v in node.outs:
                if v in self.traced.of_data:
                    found[v] = (v,)
                    sources = remade_from(self.traced, v)
                    if sources is None:
                        continue
                    sent = dict.fromkeys(u for w in sources for u in found[w])
                    if sum(map(self._bytes_of, sent)) <= self._bytes_of(v):
                        found[v] = tuple(sent)
        return found

    @cached_property
    def made_where_read(self) -> frozenset[int]:
        """The values that a piece makes itself, because they are made of fewer bytes,
        or are another form of as many.
        """
        return frozenset(
            v
            for v, sent in self._sent_for.items()
            if sum(map(self._bytes_of, sent)) < self._bytes_of(v)
            or (sent != (v,) and is_form(self.traced, v))
        )

    def _reads(self) -> Iterator[tuple[int, int]]:
        """The values of the data, each with the position of an equation that reads it;
        outputs are read at the end.
        """
        traced = self.traced
        # What makes new state alone goes over no cut: see `state.py`.
        for node in filter(traced.live_for_y.__contains__, traced.live):
            # What is made where it is read reads there.
            if self.made_where_read.issuperset(node.outs):
                continue
            for v in node.ins:
                if v in traced.of_data:
                    yield v, traced.position[node]
        for v in traced.outputs:
            if v in traced.of_data:
                yield v, len(traced.graph.nodes)

    def _made_at(self, v: int) -> int:
        """The position of the equation that makes a value; -1: it is an input."""
        maker = self.traced.graph.maker.get(v)
        return -1 if maker is None else self.traced.position[maker]

    def _bytes_of(self, v: int) -> int:
        return nbytes(self.traced.graph.avals[v])

    @cached_property
    def state(self) -> StateSpans:
        """Where the state is used."""
        return StateSpans.of(self.traced)

    @cached_property
    def uses(self) -> list[int]:
        """The positions of the first uses of parameters, in order."""
        return sorted(set(self.traced.first_uses.values()))

    def narrowest_before(self, use: int, sides: StateSides = ANYWHERE) -> int | None:
        """Of the places after the first use before that one, the narrowest; of equal
        ones the last. Those between rounds of a loop come before those in a round.
        `None`: each divides a state.

        Arguments:
            sides: the leaves of the state that are used before it and after it.
        """
        at = bisect.bisect_left(self.uses, use)
        first, last = self.state.between(sides)
        start = max(self.uses[at - 1] + 1 if at else 0, first)
        stop = int(min(use, last))
        across = self.bytes[start : stop + 1].copy()
        if not np.isfinite(across).any():
            return None
        # Between rounds of a loop, so that equal rounds are equal pieces; inside of one
        # only if nothing else is there.
        inside = self._in_a_round[start : stop + 1]
        if np.isfinite(across[~inside]).any():
            across[inside] = np.inf
        return stop - int(np.argmin(across[::-1]))

    @cached_property
    def _in_a_round(self) -> np.ndarray:
        """Whether each place is in the middle of a round of a loop."""
        inside = np.zeros(len(self.traced.graph.nodes) + 1, bool)
        for span in self.traced.rounds:
            inside[span.start + 1 : span.stop] = True
        return inside
