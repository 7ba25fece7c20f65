"""What goes over a place where a function may be cut, in bytes.

In: a trace. Out: for each place the bytes of the data that are made before it and used
behind it. Of `h = x @ w; y = relu(h) * h`, with 100 bytes in each value, there go

    place    0      1      2             3             4
             x      h      h, relu(h)    y
    bytes    100    100    100           100

for `relu(h)` is not sent: it is made again from `h`, which is.
"""

import bisect
import dataclasses
from functools import cached_property

import numpy as np

from fpipe._core.pytrees import nbytes
from fpipe._split.trace import Traced

# Operations that cost no more than to read their inputs: what they make can be made
# again, where that needs fewer bytes than to send it.
# fmt: off
CHEAP = frozenset((
    "abs", "add", "and", "broadcast_in_dim", "ceil", "clamp", "concatenate",
    "convert_element_type", "copy", "cos", "div", "eq", "exp", "expand_dims",
    "floor", "ge", "gt", "integer_pow", "iota", "is_finite", "le", "log",
    "logistic", "lt", "max", "min", "mul", "name", "ne", "neg", "not", "or", "pad",
    "pow", "reshape", "rev", "round", "rsqrt", "select_n", "sign", "sin", "slice",
    "sqrt", "square", "squeeze", "stop_gradient", "sub", "tanh", "transpose", "xor",
))
# fmt: on


def remade_from(traced: Traced, v: int) -> tuple[int, ...] | None:
    """The values of the data from which a value is made by a cheap operation, and by
    nothing else that would have to be sent; `None`: it is not.
    """
    node = traced.graph.maker.get(v)
    if node is None or node.name not in CHEAP or v not in traced.of_data:
        return None
    others = [u for u in node.ins if u not in traced.of_data]
    # Parameters would have to be borrowed, and keys sent.
    if not traced.of_params.isdisjoint(others) or not traced.of_key.isdisjoint(others):
        return None
    return tuple(u for u in node.ins if u in traced.of_data)


@dataclasses.dataclass(frozen=True, eq=False)
class Crossing:
    """What goes over each place of a trace."""

    traced: Traced

    @cached_property
    def bytes(self) -> np.ndarray:
        """The bytes of data that go over each place, `(equations + 1,)`.

        An estimate: a value that can be made again counts as what that needs, at most
        as itself. What is sent in the end is found for each piece (`pieces.py`).
        """
        traced = self.traced
        graph, position = traced.graph, traced.position
        count = len(graph.nodes)
        made = dict.fromkeys(traced.x, -1)
        last = dict.fromkeys(graph.outputs, count)
        # Side inputs go to every piece that reads them, over no cut.
        price = dict.fromkeys(traced.side, 0)
        price |= {v: nbytes(graph.avals[v]) for v in traced.x}
        for node in traced.live:
            for v in node.ins:
                last[v] = max(last.get(v, 0), position[node])
            for v in node.outs:
                if v in traced.of_data:
                    made[v], price[v] = position[node], nbytes(graph.avals[v])
                    sources = remade_from(traced, v)
                    if sources is not None:
                        again = sum(price[u] for u in set(sources))
                        price[v] = min(price[v], again)
        steps = np.zeros(count + 2)
        for v, at in made.items():
            if last.get(v, -1) > at:
                steps[at + 1] += price[v]
                steps[last[v] + 1] -= price[v]
        return np.cumsum(steps)[: count + 1]

    @cached_property
    def uses(self) -> list[int]:
        """The positions of the first uses of parameters, in order."""
        return sorted(set(self.traced.first_uses.values()))

    def narrowest_before(self, use: int) -> int:
        """Of the places behind the first use before that one, the narrowest; of equal
        ones the last. Those between rounds of a loop come before those in a round.
        """
        at = bisect.bisect_left(self.uses, use)
        start = self.uses[at - 1] + 1 if at else 0
        # Between rounds of a loop, so that equal rounds are equal pieces; inside of one
        # only if nothing else is there.
        across = self.bytes[start : use + 1].copy()
        inside = self._in_a_round[start : use + 1]
        if not inside.all():
            across[inside] = np.inf
        return use - int(np.argmin(across[::-1]))

    @cached_property
    def _in_a_round(self) -> np.ndarray:
        """Whether each place is in the middle of a round of a loop."""
        inside = np.zeros(len(self.traced.graph.nodes) + 1, bool)
        for span in self.traced.rounds:
            inside[span.start + 1 : span.stop] = True
        return inside
