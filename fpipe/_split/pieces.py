"""The equations of each piece of a cut trace, the values that it reads, and those that
it hands on.

In: a trace and the places of its cuts. Out: for each piece a `Piece`. A function of two
layers with a mask `m = x > 0`, cut between them,

    piece  equations            reads                         makes for others
    0      tanh(x @ w0) -> h    x                             h
    1      x > 0, h @ w1, …     h and x of piece 0            the output

shows the rules of who makes a value:

- What depends on the data is made in the piece where it stands, and sent to the pieces
  that read it. Where something cheap can be made again out of fewer bytes, it is: the
  mask above, from `x`. The set that is sent is a minimum cut (`min_cut`).
- What depends on parameters alone, or on nothing, is made wherever it is used: casts,
  masks, tables of positions. But a reduction of parameters that makes them small, such
  as a penalty on their norm, is made where the parameters are, and sent.
- What the call gives goes straight to the pieces that read it: side inputs, and those
  arrays of `x` that the caller names (`straight`). Others are sent by the first piece.
- The key goes straight to the pieces that draw from it itself, as `x` does.
- A key that is made from the key is made in the first piece and sent, so that all
  pieces that draw do the same; what is drawn from it is drawn where it is used.
- New state is made where the state is, out of what that piece has.
- Equations with effects run where they stand.
"""

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from fpipe._core.pytrees import is_inexact, nbytes
from fpipe._model.needs import BY_NAME, ROW_INPUTS, Share
from fpipe._model.stages import SIDE
from fpipe._planning.costs import Sent
from fpipe._program.flops import flops
from fpipe._program.graph import Node
from fpipe._program.min_cut import cheapest
from fpipe._split.crossing import CHEAP, is_form, remade_from
from fpipe._split.trace import Traced

# A value of parameters alone is made at their owner if it has so many times fewer
# bytes than they have.
_REDUCTION = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A piece of a trace.

    Attributes:
        nodes: its equations, in order.
        params: the roots that it reads, in the order of first use.
        takes: the values that it reads of earlier pieces, each with the piece that
            makes it, in the order of first use.
        given: the arrays of `x` and of needs that are cut into microbatches, as side
            inputs are, that it reads of the call.
        needs: the needs that are the same for all microbatches, and that it reads.
        flops: of its forward.
        again: the values of the data that it makes again, which an earlier piece has
            made.
    """

    nodes: tuple[Node, ...]
    params: tuple[int, ...]
    takes: Mapping[int, int]
    given: tuple[int, ...]
    needs: frozenset[str]
    again: tuple[int, ...]

    @property
    def flops(self) -> float:
        return sum(map(flops, self.nodes))


@dataclasses.dataclass(frozen=True, eq=False)
class CutTrace:
    """A trace with its pieces.

    Attributes:
        straight: the arrays of `x` that the call gives to all pieces that read them, by
            their numbers in it.
    """

    traced: Traced
    pieces: tuple[Piece, ...]
    straight: frozenset[int]

    def readers_of_x(self, n: int) -> tuple[int, ...]:
        """The pieces that get an array of `x` from the call, by its number in it."""
        v = self.traced.x[n]
        return tuple(k for k, piece in enumerate(self.pieces) if v in piece.given)

    @cached_property
    def needs(self) -> tuple[frozenset[str], ...]:
        """For each piece the needs that it reads."""
        by_name = dict(self.traced.needs)
        # What goes straight to pieces comes as side inputs.
        straight = (self.traced.x[n] for n in self.straight)
        by_name[SIDE.kind] = (*by_name[SIDE.kind], *straight)
        return tuple(
            piece.needs.union(
                name
                for name in ROW_INPUTS
                if not set(by_name.get(name, ())).isdisjoint(piece.given)
            )
            for piece in self.pieces
        )

    @cached_property
    def costs(self) -> tuple[float, ...]:
        """What each piece takes in a step that trains, with what it makes again."""
        costs = self.traced.costs
        return tuple(sum(costs[n] for n in piece.nodes) for piece in self.pieces)

    @cached_property
    def work(self) -> tuple[tuple[float, float], ...]:
        """The same of its forward and of its backward."""
        costs, found = self.traced.forward_costs, []
        for piece, both in zip(self.pieces, self.costs, strict=True):
            forward = min(both, sum(costs[n] for n in piece.nodes))
            found.append((forward, both - forward))
        return tuple(found)

    @cached_property
    def _readers(self) -> dict[int, list[int]]:
        """For each value that crosses a cut the pieces that read it."""
        readers: dict[int, list[int]] = {}
        for k, piece in enumerate(self.pieces):
            for v in piece.takes:
                readers.setdefault(v, []).append(k)
        return readers

    @cached_property
    def senders(self) -> dict[int, tuple[int, tuple[int, ...]]]:
        """For each value that crosses a cut the piece that makes it, and those that
        read it.
        """
        return {
            v: (self.pieces[readers[0]].takes[v], tuple(readers))
            for v, readers in self._readers.items()
        }

    @cached_property
    def sent(self) -> list[Sent]:
        """The same with bytes, for costs."""
        return [
            Sent(source, readers, self.bytes_of([v]))
            for v, (source, readers) in self.senders.items()
        ]

    @cached_property
    def boundary_values(self) -> frozenset[int]:
        """The values that are parts of boundaries."""
        return frozenset().union(*self.boundaries)

    @cached_property
    def boundaries(self) -> tuple[tuple[int, ...], ...]:
        """For each piece but the last the values that it hands to the next one: of the
        data, and read by no other piece.
        """
        # What several read, such as a mask, and keys come to all pieces the same way:
        # so pieces that do the same have the same inputs.
        return tuple(
            tuple(
                v
                for v, maker in after.takes.items()
                if maker == k and self._goes_on(v, maker)
            )
            for k, after in enumerate(self.pieces[1:])
        )

    def _goes_on(self, v: int, maker: int) -> bool:
        """Whether a value is a part of the boundary after its maker."""
        return v in self.traced.of_data and self._readers[v] == [maker + 1]

    @cached_property
    def stashes(self) -> tuple[tuple[int, ...], ...]:
        """For each piece all other values that it hands on."""
        found: list[list[int]] = [[] for _ in self.pieces]
        for v, readers in sorted(self._readers.items()):
            maker = self.pieces[readers[0]].takes[v]
            if not self._goes_on(v, maker):
                found[maker].append(v)
        return tuple(map(tuple, found))

    def skips(self, k: int) -> dict[int, int]:
        """What a piece reads of skips, each value with the piece that makes it."""
        takes = self.pieces[k].takes.items()
        return {v: maker for v, maker in takes if v in self.stashes[maker]}

    def bytes_of(self, values: Sequence[int]) -> int:
        """The bytes of some values together."""
        return sum(nbytes(self.traced.graph.avals[v]) for v in values)


def cut_trace(
    traced: Traced,
    places: Sequence[int],
    state_owners: Sequence[int] = (),
    straight: frozenset[int] | None = None,
) -> CutTrace:
    """Cut a trace at some places.

    Arguments:
        state_owners: for each array of the state the piece that reads and writes it.
        straight: the arrays of `x`, by their numbers in it, that the call gives to all
            pieces that read them, as it gives the key; others go to the first piece.
            `None`: `x` and the key do.
    """
    homes = _homes(traced, places, state_owners, straight)
    last = len(places)
    # Backwards: what a piece has to make is known when all later ones are.
    wanted: list[list[int]] = [[] for _ in range(last + 1)]
    wanted[last] += traced.outputs
    for v, owner in zip(traced.new_state, state_owners, strict=True):
        wanted[owner].append(v)
    pieces = []
    for k in range(last, -1, -1):
        piece = _piece(traced, places, homes, k, wanted[k])
        pieces.append(piece)
        for v, maker in piece.takes.items():
            wanted[maker].append(v)
    return CutTrace(traced, tuple(pieces[::-1]), straight or frozenset())


def straight_inputs(
    leaves: Sequence[Any], cut: Callable[[frozenset[int]], Sequence[CutTrace]]
) -> tuple[frozenset[int], list[CutTrace]]:
    """The arrays of `x`, by their numbers in it, that go straight from the call to all
    pieces that read them: what pieces after the first one read. Also the traces of the
    function, cut so.

    An array of floats that the first piece reads too is sent on by the first piece.
    Otherwise pieces would make again whatever is cheap to make from `x`, such as the
    sum of a residual, and equal blocks would not be equal pieces.

    Arguments:
        leaves: shapes of the arrays of `x`.
        cut: the traces of a function, cut where so many arrays go straight.
    """
    floats = {n for n, a in enumerate(leaves) if is_inexact(a)}
    straight = frozenset(range(len(leaves)))
    while True:
        traces = cut(straight)
        readers = {
            n: {k for trace in traces for k in trace.readers_of_x(n)}
            for n in range(len(leaves))
        }
        later = {n for n in straight if any(readers[n])}
        through_first = {n for n in later & floats if 0 in readers[n]}
        # The first piece is there to do something with the batch.
        if not through_first and not any(0 in own for own in readers.values()):
            through_first = set(sorted(later & floats)[:1])
        if not through_first:
            # The others go to the first piece in any case, so that no piece changes.
            found = frozenset(later)
            return found, [dataclasses.replace(t, straight=found) for t in traces]
        straight -= through_first


def _homes(
    traced: Traced,
    places: Sequence[int],
    state_owners: Sequence[int],
    straight: frozenset[int] | None,
) -> dict[int, int]:
    """The piece that makes each value; a value that is not there is made wherever it is
    used.
    """
    graph = traced.graph

    def piece_at(node: Node) -> int:
        return bisect.bisect_right(places, traced.position[node])

    owners = {
        root: bisect.bisect_right(places, use)
        for root, use in traced.first_uses.items()
    }
    nothing: frozenset[int] = frozenset()
    made_of = {v: frozenset([root]) for root, v in enumerate(traced.params)}
    if straight is None:
        homes = dict.fromkeys((*traced.x, *traced.needs["key"]), 0)
    else:
        homes = {v: 0 for n, v in enumerate(traced.x) if n not in straight}
    homes.update(zip(traced.state, state_owners, strict=True))
    # Of values that are made wherever they are used the first piece that can.
    first = dict[int, int]()
    for node in traced.live:
        start = max((homes.get(v, first.get(v, 0)) for v in node.ins), default=0)
        if node.eqn.effects or not traced.of_data.isdisjoint(node.outs):
            # What makes new state alone runs as soon as it can, wherever it stands:
            # the update of a running mean may be written at the end of the function.
            home = piece_at(node) if node in traced.live_for_y else start
            homes.update(dict.fromkeys(node.outs, home))
            continue
        first.update(dict.fromkeys(node.outs, start))
        roots = nothing.union(*(made_of.get(v, nothing) for v in node.ins))
        made_of.update(dict.fromkeys(node.outs, roots))
        if not traced.of_key.isdisjoint(node.outs):
            of_keys = all(_is_key(graph.avals[v]) for v in node.outs)
            if not roots and of_keys and traced.of_state.isdisjoint(node.outs):
                homes.update(dict.fromkeys(node.outs, 0))
            continue
        if not traced.of_state.isdisjoint(node.outs):
            continue
        if roots and node.name not in CHEAP:
            read = sum(nbytes(graph.avals[traced.params[root]]) for root in roots)
            made = sum(nbytes(graph.avals[v]) for v in node.outs)
            where = {owners.get(root) for root in roots}
            if made * _REDUCTION <= read and len(where) == 1:
                (owner,) = where
                # What is used for a penalty alone lives in the last piece.
                home = len(places) if owner is None else owner
                homes.update(dict.fromkeys(node.outs, home))
    return homes


def _is_key(aval: Any) -> bool:
    """Whether a value is a key, new-style or raw, or several."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return True
    return str(aval.dtype) == "uint32" and aval.shape[-1:] == (2,)


def _piece(
    traced: Traced,
    places: Sequence[int],
    homes: Mapping[int, int],
    k: int,
    wanted: Sequence[int],
) -> Piece:
    """The piece `k`, which makes the values that others want of it."""
    graph, maker = traced.graph, traced.graph.maker
    root_of = traced.root_of
    # What it reads and no piece makes.
    of_call = {*traced.x, *traced.row_needs}
    forced = [
        node
        for node in traced.effects
        if bisect.bisect_right(places, traced.position[node]) == k
    ]

    def is_earlier(v: int) -> bool:
        return homes.get(v, k) < k

    def needed(is_elsewhere: Callable[[int], bool]) -> tuple[set[int], set[int]]:
        """The values that it makes, and those that it reads, if some are made
        elsewhere.
        """
        inside, read = set[int](), set[int]()
        pending = [*wanted, *(v for node in forced for v in (*node.ins, *node.outs))]
        while pending:
            v = pending.pop()
            if v in inside or v in read or v in graph.consts:
                continue
            if v in maker and not is_elsewhere(v):
                inside.update(maker[v].outs)
                pending += maker[v].ins
            else:
                read.add(v)
        return inside, read

    # 1. What it reads if nothing is made again; 2. what is cheapest to send for that.
    _, read = needed(is_earlier)
    # What the call gives costs nothing.
    free = of_call - homes.keys()
    sent = _cheapest_to_send(traced, sorted(filter(is_earlier, read)), free)
    inside, read = needed(sent.__contains__)
    # Of each piece its own equations alone are looked at: there may be hundreds.
    runs = dict.fromkeys([*forced, *(maker[v] for v in inside)])
    nodes = tuple(sorted(runs, key=traced.position.__getitem__))
    # 3. In the order of first use, so that equal pieces have equal programs.
    order = dict.fromkeys([*(v for node in nodes for v in node.ins), *wanted])
    reads = [v for v in order if v in read]
    again = [
        v
        for node in nodes
        for v in node.outs
        if v in traced.of_data
        and bisect.bisect_right(places, traced.position[node]) < k
    ]
    return Piece(
        nodes,
        tuple(root_of[v] for v in reads if v in root_of),
        {v: homes[v] for v in reads if is_earlier(v)},
        tuple(v for v in reads if v in of_call and not is_earlier(v)),
        frozenset(
            name
            for name, values in traced.needs.items()
            if BY_NAME[name].share is Share.WHOLE
            and any(v in read and not is_earlier(v) for v in values)
        ),
        tuple(again),
    )


def _cheapest_to_send(
    traced: Traced, foreign: Sequence[int], free: Set[int]
) -> set[int]:
    """Of the values of earlier pieces the cheapest set from which a piece can make
    those that it reads.

    Arguments:
        free: values that go to every piece that reads them.
    """

    def cost(v: int) -> int:
        if v in free:
            return 0
        # What has only another form is sent in its first one, if that costs the same:
        # others may read that too, and then both are one array.
        return 2 * nbytes(traced.graph.avals[v]) + is_form(traced, v)

    return cheapest(cost, lambda v: remade_from(traced, v), foreign)
