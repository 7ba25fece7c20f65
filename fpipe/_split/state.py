"""Which piece has each array of the state: the one that reads and writes it.

In: the traces of a function, for training and for evaluation, and where each is cut.
Out: for each leaf of the state the number of a piece. For a batch norm that is cut
after its statistics

    equation                 piece    training            evaluation
    mean(h)                  0        read by the update  -
    0.9 * old + 0.1 * mean   any      the new value       -
    h - mean                 1        -                   reads the old value

the leaf belongs to piece 1: that is the first one that reads it on the way to the
output, in any of the traces, and the mean is sent there. What only leads to new state
may run in any piece that has what it takes, wherever it stands in the function.

A leaf cannot be written before it is read: if its new value takes what only a later
piece computes, no piece can have it, and the cut between them is wrong.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from fpipe._split.trace import Function, Traced


@dataclasses.dataclass(frozen=True)
class StateUse:
    """Where a trace reads and writes the leaves of the state. A leaf may here be rows
    of a stacked one.

    Attributes:
        reader: of each leaf the first piece that reads it on the way to the output;
            infinite: none does.
        ready: of each leaf the first piece that has what its new value takes of the
            data.
        wish: of each leaf the last piece whose parameters its new value takes: the
            average of weights is best where the weights are.
        made_of: of each leaf those that its new value is made of where it is written.
    """

    reader: tuple[float, ...]
    ready: tuple[int, ...]
    wish: tuple[int, ...]
    made_of: tuple[frozenset[int], ...]


def state_use(traced: Traced, piece_at: Callable[[int], int], last: int) -> StateUse:
    """Where a trace reads and writes the leaves of the state.

    Arguments:
        piece_at: the piece in which an equation at a position stands.
        last: the piece that returns the output.
    """
    if not traced.state:
        return StateUse((), (), (), ())
    nothing: frozenset[int] = frozenset()
    reader = [math.inf] * len(traced.state)
    # Of each value the first piece that has what it takes of the data, the last one
    # whose parameters it takes, and the state that has to be there to make it.
    ready = dict[int, int]()
    wish = {
        traced.params[leaf]: piece_at(use) for leaf, use in traced.first_uses.items()
    }
    made_of = {v: frozenset([leaf]) for leaf, v in enumerate(traced.state)}

    def read(leaves: frozenset[int], piece: int) -> None:
        for leaf in leaves:
            reader[leaf] = min(reader[leaf], piece)

    for node in traced.live:
        leaves = nothing.union(*(made_of.get(v, nothing) for v in node.ins))
        of_data = not traced.of_data.isdisjoint(node.outs)
        if node in traced.live_for_y and (of_data or node.eqn.effects):
            here = piece_at(traced.position[node])
            read(leaves, here)
            ready.update(dict.fromkeys(node.outs, here))
            continue
        start = max((ready.get(v, 0) for v in node.ins), default=0)
        wanted = max((wish.get(v, 0) for v in node.ins), default=0)
        for v in node.outs:
            ready[v], wish[v], made_of[v] = start, wanted, leaves
    for v in traced.outputs:
        read(made_of.get(v, nothing), last)
    return StateUse(
        tuple(reader),
        tuple(ready.get(v, 0) for v in traced.new_state),
        tuple(wish.get(v, 0) for v in traced.new_state),
        tuple(made_of.get(v, nothing) for v in traced.new_state),
    )


def _united(uses: Sequence[StateUse]) -> StateUse:
    """What holds for all of several traces."""
    return StateUse(
        tuple(map(min, zip(*(use.reader for use in uses), strict=True))),
        tuple(map(max, zip(*(use.ready for use in uses), strict=True))),
        tuple(map(max, zip(*(use.wish for use in uses), strict=True))),
        tuple(
            frozenset().union(*leaves)
            for leaves in zip(*(use.made_of for use in uses), strict=True)
        ),
    )


def _bounds(use: StateUse) -> tuple[list[int], list[float]]:
    """For each leaf the first piece that can write it, and the last one that it can
    belong to.
    """
    first, last = list(use.ready), list(use.reader)
    # A leaf goes into the new value of another one, so it is there no later. Chains of
    # these are short: a count that several means read.
    changed = True
    while changed:
        changed = False
        for leaf, sources in enumerate(use.made_of):
            for source in sources:
                if first[leaf] < first[source]:
                    first[leaf], changed = first[source], True
                if last[source] > last[leaf]:
                    last[source], changed = last[leaf], True
    return first, last


@dataclasses.dataclass(frozen=True)
class StateSpans:
    """Where a trace uses each leaf of the state.

    Attributes:
        written: of each leaf the first place before which it can be written.
        read: of each leaf the first place before which it has been read; infinite:
            it is not.
    """

    written: tuple[int, ...]
    read: tuple[float, ...]

    @classmethod
    def of(cls, traced: Traced) -> "StateSpans":
        """Of a trace."""
        # As if it were cut everywhere: the equation at position `p` is piece `p + 1`.
        last = len(traced.graph.nodes) + 1
        use = state_use(traced, lambda position: position + 1, last)
        written, read = _bounds(use)
        return cls(tuple(written), tuple(read))

    def divided(self, count: int) -> np.ndarray:
        """Of the places below `count` those at which it cannot be cut: a leaf is read
        before, and what its new value is made of comes after.
        """
        steps = np.zeros(count + 1, int)
        for written, read in zip(self.written, self.read, strict=True):
            if read < written:
                steps[int(read)] += 1
                steps[written] -= 1
        return np.cumsum(steps)[:count] > 0

    def sides(self, place: int) -> "StateSides":
        """Which leaves are used before a place, and which after it."""
        return StateSides(
            tuple(n for n, read in enumerate(self.read) if read <= place),
            tuple(n for n, written in enumerate(self.written) if written > place),
        )

    def between(self, sides: "StateSides") -> tuple[int, float]:
        """The first and the last place that has some leaves on the same sides."""
        first = max((self.written[leaf] for leaf in sides.before), default=0)
        last = min((self.read[leaf] - 1 for leaf in sides.after), default=math.inf)
        return first, last


@dataclasses.dataclass(frozen=True)
class StateSides:
    """The leaves of the state that are used before a place, and those after it; others
    may be used on either side.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]


ANYWHERE = StateSides((), ())


def _use_of_pieces(traced: Traced, places: Sequence[int]) -> StateUse:
    return state_use(
        traced, lambda position: bisect.bisect_right(places, position), len(places)
    )


def state_owners(
    function: Function, traces: Sequence[tuple[Traced, Sequence[int]]]
) -> tuple[int, ...]:
    """The piece that reads and writes each leaf of the state, in all traces.

    Raises:
        ValueError: a leaf that is read in a piece before the one that can write it.
    """
    use = _united([_use_of_pieces(*trace) for trace in traces])
    first, last = _bounds(use)
    traced, _ = traces[0]
    paths = _paths(function, traced)
    _refuse(paths, first, last)
    # Where it is read, if it is: then only what writes it is sent. Else where it can
    # be written.
    owners = [
        int(end) if end < math.inf else max(start, wish)
        for start, end, wish in zip(first, last, use.wish, strict=True)
    ]
    changed = True
    while changed:
        changed = False
        for leaf, sources in enumerate(use.made_of):
            start = max((owners[source] for source in sources), default=0)
            if owners[leaf] < start:
                owners[leaf], changed = start, True
    return tuple(owners)


def check_state_use(
    function: Function,
    traced: Traced,
    places: Sequence[int],
    owners: Sequence[int],
) -> None:
    """Each leaf of the state is where a trace needs it.

    Raises:
        ValueError: one is not.
    """
    use = _use_of_pieces(traced, places)
    first, last = _bounds(use)
    paths = _paths(function, traced)
    _refuse(paths, first, last)
    for leaf, owner in enumerate(owners):
        if not first[leaf] <= owner <= last[leaf]:
            raise ValueError(
                "`fpipe.split(fn)`: traced for this call (other shapes or needs) the "
                f"state {paths[leaf]!r} is used in another piece than "
                "when the function was split: split it with an example of these shapes "
                "and needs"
            )


def _paths(function: Function, traced: Traced) -> list[str]:
    """What messages call the leaves of the state, rows of one by their number."""
    named = function.state_paths
    return [
        named[rows.leaf] if rows.whole else rows.label(named[rows.leaf])
        for rows in traced.state_roots
    ]


def _refuse(paths: Sequence[str], first: Sequence[int], last: Sequence[float]) -> None:
    """Refuse a leaf that no piece can have."""
    for path, start, end in zip(paths, first, last, strict=True):
        if end < start:
            raise ValueError(
                f"`fpipe.split(fn)`: the state {path!r} is read in piece {int(end)}, "
                f"but its new value is made of what piece {start} computes. One piece "
                "must read and write each array of a state: cut before the read or "
                "after the write, not between them"
            )
