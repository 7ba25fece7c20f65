"""The pieces of a function as layers.

In: a function, and how it is cut. Out: an `fpipe.Layer` for each piece. Its parameters
are a tuple of the leaves that it owns; what crosses a cut is

    boundary    what a piece hands to the next one, a `Boundary`
    skip        what it hands to several or to later ones, a tuple of arrays
    borrowed    leaves of the parameters that an earlier piece owns
    side        what the call gives to it: side inputs, and arrays of `x` that later
                pieces read (`fpipe._model.straight`)

and its state is a tuple of the leaves of the state that it reads and writes.

A layer gets nothing but these. So a `Boundary` says which trace it comes from: for
evaluation, or a smaller last microbatch, the pieces come from another trace.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from fpipe._core.pytrees import PyTree, Shape, Spec, aval, describe, pack, zeros
from fpipe._core.settings import settings
from fpipe._executors.tracers import only_shapes
from fpipe._model.layer import Layer
from fpipe._model.needs import OF_CALL
from fpipe._model.skips import peek, pop, stash
from fpipe._model.stages import SIDE
from fpipe._model.straight import (
    arrays_in_place,
    rejoined,
    straight_arrays,
    user_side,
)
from fpipe._split.cuts import Cuts, find_cuts, leaves_under, places_in
from fpipe._split.notes import (
    note_constants,
    note_kept,
    note_narrow_loss,
    note_unused,
    note_whole_loops,
)
from fpipe._split.pieces import CutTrace, cut_trace, straight_inputs
from fpipe._split.rows import note_rows
from fpipe._split.specs import Specs, specs_of_blocks
from fpipe._split.stacks import Owners, Place, Roots, Rows
from fpipe._split.state import check_state_use, state_owners
from fpipe._split.trace import Function, Kind, Traced, trace_function


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Boundary:
    """What a piece hands to the next one.

    Attributes:
        values: arrays; one at least, for the next stage waits for it.
        kind: the trace that they are of.
    """

    values: tuple[Any, ...]
    kind: Kind

    def tree_flatten(self) -> tuple[tuple[Any, ...], Kind]:
        """For JAX."""
        return self.values, self.kind

    @classmethod
    def tree_unflatten(cls, kind: Kind, values: Sequence[Any]) -> "Boundary":
        """For JAX."""
        return cls(tuple(values), kind)


@dataclasses.dataclass(frozen=True)
class CutFunction:
    """A function and how it is cut: what decides the layers.

    Attributes:
        first: the microbatch that it was cut for.
        paths, stages: how, see `fpipe.split`.
        dtype: what it computes in, see `Pipe(compute_dtype=...)`; it is cut where it is
            without.
        others: microbatches of other kinds that the layers take.
        specs: for each array of the parameters how it is cut over a mesh; empty:
            nothing says so.
        straight: whether arrays of `x` and the key come to later pieces that read them
            from the call, and not by way of the first piece.
    """

    function: Function
    first: Kind
    paths: tuple[str, ...] | None
    stages: int | None
    dtype: Any = None
    others: tuple[Kind, ...] = ()
    specs: Specs = ()
    straight: bool = True

    @cached_property
    def through_first(self) -> "CutFunction":
        """The same pieces, but the first one gets all of `x`."""
        made = dataclasses.replace(self, straight=False)
        for name in ("_placed", "_first", "cuts", "in_own_dtypes", "state_owners"):
            made.__dict__[name] = getattr(self, name)
        made.__dict__["param_owners"] = self.param_owners
        return made

    @cached_property
    def _traces(self) -> dict[Any, CutTrace]:
        return {}

    @cached_property
    def _placed(self) -> dict[Any, tuple[Traced, tuple[int, ...]]]:
        return {}

    @cached_property
    def _straight(self) -> dict[Spec, frozenset[int]]:
        return {}

    @cached_property
    def _first(self) -> tuple[Any, Traced]:
        """The trace that is cut, and its key."""
        key = self._key(self.first)
        roots = None if self.dtype is None else self._all_roots
        traced = self._trace(self.first, roots)
        note_narrow_loss(self.function.layer.name, traced)
        return key, traced

    def note(self, twice: Kind) -> None:
        """Warn of what is likely to be meant otherwise.

        Arguments:
            twice: the first microbatch, with twice the rows.
        """
        _, traced = self._first
        name = self.function.layer.name
        note_kept(name, traced)
        note_constants(name, traced)
        note_whole_loops(name, traced)
        note_unused(self.function, self.wiring.used)
        note_rows(self.function, self.first, twice, traced)

    def _trace(self, kind: Kind, roots: Roots | None) -> Traced:
        leaves = leaves_under(self.function, self.paths or ())
        return trace_function(self.function, kind, leaves, roots, self.dtype)

    @property
    def roots(self) -> tuple[Rows, ...]:
        """The parameters, and the rows of parameters, that pieces read by themselves;
        the same in all traces.
        """
        return self._all_roots.params

    @property
    def state_roots(self) -> tuple[Rows, ...]:
        """The same of the state."""
        return self._all_roots.state

    @property
    def _all_roots(self) -> Roots:
        _, traced = self.in_own_dtypes._first
        return traced.all_roots

    @cached_property
    def in_own_dtypes(self) -> "CutFunction":
        """The same function in its own dtypes."""
        return self if self.dtype is None else dataclasses.replace(self, dtype=None)

    @cached_property
    def cuts(self) -> Cuts:
        """Where it is cut."""
        if self.dtype is not None:
            return self.in_own_dtypes.cuts
        _, traced = self._first
        return find_cuts(self.function, traced, self.paths, self.stages)

    def _key(self, kind: Kind) -> Any:
        """What a trace depends on: the settings of JAX too, such as its precision."""
        return kind, settings()

    def placed(self, kind: Kind) -> tuple[Traced, tuple[int, ...]]:
        """The function, traced for microbatches of one kind, and where it is cut."""
        key = self._key(kind)
        if key not in self._placed:
            first_key, traced = self._first
            if key != first_key:
                traced = self._trace(kind, self._all_roots)
            _, cut_first = self.in_own_dtypes._first
            places = places_in(self.cuts, cut_first, traced)
            self._placed[key] = traced, places
        return self._placed[key]

    def trace(self, kind: Kind) -> CutTrace:
        """The pieces of the function, traced for microbatches of one kind."""
        key, straight = self._key(kind), self.straight_of(kind)
        if key not in self._traces:
            self._traces[key] = self._cut(kind, straight)
        return self._traces[key]

    def _cut(self, kind: Kind, straight: frozenset[int] | None) -> CutTrace:
        traced, places = self.placed(kind)
        check_state_use(self.function, traced, places, self.state_owners)
        return cut_trace(traced, places, self.state_owners, straight)

    def straight_of(self, kind: Kind) -> frozenset[int] | None:
        """The arrays of `x`, by their numbers in it, that come from the call to the
        pieces that read them: the same ones for all microbatches of that structure.
        `None`: even the key goes to the first piece alone.
        """
        if not self.straight:
            return None
        if kind.x.spec not in self._straight:
            alike = [one for one in _modes(self, kind) if one.x.spec == kind.x.spec]
            self._straight[kind.x.spec], traces = straight_inputs(
                kind.x.leaves,
                lambda numbers: [self._cut(one, numbers) for one in alike],
            )
            self._traces.update(zip(map(self._key, alike), traces, strict=True))
        return self._straight[kind.x.spec]

    def fits(self, kind: Kind) -> bool:
        """Whether the layers take microbatches of a kind: no piece reads what its layer
        does not declare.
        """
        trace = self.trace(kind)
        pieces = range(len(trace.pieces))
        return all(self.wiring.declares(trace, k, self.roots) for k in pieces)

    def also_for(self, kind: Kind) -> "CutFunction":
        """The same cuts, with layers that take microbatches of another kind too."""
        made = dataclasses.replace(self, others=(*self.others, kind))
        if self.dtype is not None:
            made.__dict__["in_own_dtypes"] = self.in_own_dtypes.also_for(kind)
        # What is traced, and where it is cut, is the same: it is kept together.
        for name in ("_placed", "_first", "cuts"):
            made.__dict__[name] = getattr(self, name)
        return made

    @cached_property
    def state_owners(self) -> tuple[int, ...]:
        """For each root of the state the piece that reads and writes it, in every
        mode.
        """
        if self.dtype is not None:
            return self.in_own_dtypes.state_owners
        kinds = _modes(self, self.first)
        return state_owners(self.function, [self.placed(k) for k in kinds])

    @cached_property
    def param_owners(self) -> Owners:
        """Which piece owns each parameter, or rows of one."""
        # Neither a cast nor the way of an input changes who owns what: `Split.params`
        # has one order.
        if self.dtype is not None:
            return self.in_own_dtypes.param_owners
        if not self.straight:
            return dataclasses.replace(self, straight=True).param_owners
        kinds = _modes(self, self.first)
        return _param_owners(self, [self.trace(kind) for kind in kinds])

    @cached_property
    def state_in_blocks(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """For each piece, and each block of the state there, the roots that are in
        it.
        """
        state = self.wiring.state
        found = {
            Place(k, n): list[int]()
            for k, blocks in enumerate(state.owned)
            for n in range(len(blocks))
        }
        for root, rows in enumerate(self.state_roots):
            found[state.place_of(rows)].append(root)
        return tuple(
            tuple(tuple(found[Place(k, n)]) for n in range(len(blocks)))
            for k, blocks in enumerate(state.owned)
        )

    @cached_property
    def wiring(self) -> "Wiring":
        """What the layers declare."""
        return _wire(self)

    def __reduce__(self) -> Any:
        # Traces are made again where it is unpickled.
        fields = [getattr(self, f.name) for f in dataclasses.fields(self)]
        return CutFunction, tuple(fields)


@dataclasses.dataclass(frozen=True)
class Wiring:
    """Who owns, lends, stashes and reads what, over all traces: what the layers
    declare.

    Attributes:
        names: of the layers.
        params: which piece owns each parameter, or rows of one.
        state: which piece reads and writes each array of the state, or rows of one.
        lenders: for each piece the pieces that it borrows of.
        sources: for each piece the pieces whose skip it reads.
        needs: for each piece what it reads of the needs that the call gives.
        used: the leaves of the parameters that some piece reads.
    """

    names: tuple[str, ...]
    params: Owners
    state: Owners
    lenders: tuple[tuple[int, ...], ...]
    sources: tuple[tuple[int, ...], ...]
    needs: tuple[frozenset[str], ...]
    used: frozenset[int]

    @property
    def owned(self) -> tuple[tuple[Rows, ...], ...]:
        """For each piece the parameters, and the rows of parameters, that it owns."""
        return self.params.owned

    @cached_property
    def last_reader(self) -> dict[int, int]:
        """Of each piece with a skip the last one that reads it."""
        return {s: k for k, sources in enumerate(self.sources) for s in sources}

    def declares(self, trace: CutTrace, k: int, roots: Sequence[Rows]) -> bool:
        """Whether a piece of a trace reads nothing that its layer does not declare.

        Arguments:
            roots: the parameters that pieces read by themselves.
        """
        piece = trace.pieces[k]
        lent = {self.params.place_of(roots[r]).piece for r in piece.params} - {k}
        skips = set(trace.skips(k).values())
        fits = lent <= set(self.lenders[k]) and skips <= set(self.sources[k])
        return fits and trace.needs[k] <= self.needs[k]


def skip_name(k: int) -> str:
    """What the skip of a piece is called."""
    return f"piece {k}"


def _wire(cut: CutFunction) -> Wiring:
    """What layers declare must hold in every mode: the union of what they read when
    they train and when they do not, with a key and without.
    """
    traces = [cut.trace(kind) for kind in _modes(cut, cut.first)]
    count, params = len(traces[0].pieces), cut.param_owners
    owner = [params.place_of(rows).piece for rows in cut.roots]
    lenders, sources, needs = [], [], []
    for k in range(count):
        pieces = [trace.pieces[k] for trace in traces]
        mine = {owner[root] for piece in pieces for root in piece.params} - {k}
        lenders.append(tuple(sorted(mine)))
        makers = {maker for trace in traces for maker in trace.skips(k).values()}
        sources.append(tuple(sorted(makers)))
        needs.append(frozenset[str]().union(*(trace.needs[k] for trace in traces)))
    lending = {k for own in lenders for k in own}
    pieces = [piece for trace in traces for piece in trace.pieces]
    used = frozenset(cut.roots[r].leaf for piece in pieces for r in piece.params)
    state = Owners.of(
        cut.state_roots,
        dict(enumerate(cut.state_owners)),
        cut.function.state.leaves,
        count,
    )
    return Wiring(
        _names(cut, params.owned, lending),
        params,
        state,
        tuple(lenders),
        tuple(sources),
        tuple(needs),
        used,
    )


def _param_owners(cut: CutFunction, traces: Sequence[CutTrace]) -> Owners:
    """Each piece owns the parameters that it is the first to read, in the order of
    first use.
    """
    readers: dict[int, set[int]] = {}
    for trace in traces:
        for k, piece in enumerate(trace.pieces):
            for root in piece.params:
                readers.setdefault(root, set()).add(k)
    owner = {root: min(pieces) for root, pieces in readers.items()}
    # A parameter that nobody reads has a gradient of zeros. Its owner is the first
    # piece, or for rows of a stack the owner of the rows before them. Roots are in the
    # order of their rows.
    home: dict[int, int] = {}
    for root, rows in enumerate(cut.roots):
        owner.setdefault(root, home.get(rows.leaf, 0))
        home[rows.leaf] = owner[root]
    shapes, count = cut.function.params.leaves, len(traces[0].pieces)
    return Owners.of(cut.roots, owner, shapes, count)


def _modes(cut: CutFunction, first: Kind) -> list[Kind]:
    """The kinds of a microbatch, as it is trained and as it is evaluated, and the other
    kinds that layers take.
    """
    _, *rest = first.modes(cut.function.layer.needs or ())
    found = [first]
    for kind in rest:
        try:
            cut.placed(kind)
        except jax.errors.UnexpectedTracerError:
            raise  # A value that an earlier trace has left.
        except Exception:
            # Some functions cannot train without a key: a call in that mode says so.
            continue
        found.append(kind)
    return [*found, *cut.others]


def _names(
    cut: CutFunction, owned: Sequence[Sequence[Rows]], lending: set[int]
) -> tuple[str, ...]:
    """Of each layer: the path that its parameters share, numbers as `*`.

    Equal layers, such as the blocks of a transformer, have one name: the scan executor
    stacks what has the same name and shapes.
    """
    paths, names = cut.function.paths, list[str]()
    for k, blocks in enumerate(owned):
        given = cut.cuts.names[k - 1] if k else ""
        parts = [paths[rows.leaf].split("/") for rows in blocks]
        shared = []
        for column in zip(*parts, strict=False):
            if len(set(column)) > 1:
                break
            shared.append(column[0])
        if not shared and parts:
            # Of several modules the first one names the piece.
            shared = parts[0][:1]
        # A tree that is an array has no paths.
        name = given or "/".join(shared) or "piece"
        names.append(name if k in lending else re.sub(r"\d+", "*", name))
    # Layers borrow by the name of the owner, so this name must be unique.
    return tuple(
        f"{name} #{k}" if k in lending and names.count(name) > 1 else name
        for k, name in enumerate(names)
    )


@dataclasses.dataclass(frozen=True)
class _StateShapes:
    """The `init_state` of a piece, for plans that ask for shapes alone."""

    cut: CutFunction
    number: int

    def __call__(self, x: PyTree, *, side: PyTree = None) -> PyTree:
        if not only_shapes():
            raise ValueError(
                "`init_state(x)`: the pieces of a function that was split make no "
                "state: make the state of the function itself, and give it to calls"
            )
        inputs = x.kind.x if self.number else Shape.of(rejoined(x, side))
        shapes = self.cut.function.state_of(inputs).leaves
        return tuple(map(zeros, self.cut.wiring.state.by_piece(shapes)[self.number]))


@dataclasses.dataclass(frozen=True)
class PieceLayer:
    """A piece as the function of a layer.

    Attributes:
        cut: the function, and how it is cut.
        number: of the piece.
    """

    cut: CutFunction
    number: int

    @property
    def layer(self) -> Layer:
        """The layer that it is the function of."""
        k, wiring = self.number, self.cut.wiring
        needs = ["carry"] if wiring.sources[k] or k in wiring.last_reader else []
        needs += ["borrowed"] if wiring.lenders[k] else []
        asked = wiring.needs[k]
        if k == 0:
            # The first piece looks at all that decides which trace it is.
            asked = asked.union(self.cut.function.layer.needs or (), *wiring.needs)
        needs += [need.name for need in OF_CALL if need.name in asked]
        state = wiring.state.owned[k]
        needs += ["state"] if state else []
        return Layer(
            self,
            name=wiring.names[k],
            stash=[skip_name(k)] if k in wiring.last_reader else [],
            # The last reader pops.
            pop=[skip_name(s) for s in wiring.sources[k] if k == wiring.last_reader[s]],
            peek=[skip_name(s) for s in wiring.sources[k] if k < wiring.last_reader[s]],
            needs=needs,
            borrow=[wiring.names[lender] for lender in wiring.lenders[k]],
            init_state=_StateShapes(self.cut, k) if state else None,
            state_rows=bool(self.cut.function.layer.state_rows) if state else None,
            spec=specs_of_blocks(self.cut.specs, wiring.owned[k]),
        )

    def __call__(self, params: Sequence[Any], x: PyTree, **needs: Any) -> Any:
        """Run the piece on a microbatch."""
        k, wiring = self.number, self.cut.wiring
        side = needs.get("side")
        if k:
            kind = x.kind
        else:
            own = user_side(side)
            kind = Kind.of(rejoined(x, side), {**needs, "side": own})
        trace = self.cut.trace(kind)
        traced, piece = trace.traced, trace.pieces[k]
        self._check_reads(trace)
        state = wiring.state.owned[k]
        # 1. What enters, by the values of the graph.
        given = dict[int, Any]()
        if k:
            given.update(zip(trace.boundaries[k - 1], x.values, strict=False))
        else:
            given.update({traced.x[n]: a for n, a in arrays_in_place(x).items()})
        for name, values in traced.needs.items():
            if name in trace.needs[k]:
                arrays, _ = pack(user_side(needs.get(name)))
                given.update(zip(values, arrays, strict=True))
        if SIDE.kind in trace.needs[k]:
            straight = straight_arrays(side)
            given.update({traced.x[n]: straight[n] for n in trace.straight})
        in_block = self.cut.state_in_blocks[k]
        blocks = zip(state, in_block, needs.get("state", ()), strict=True)
        for block, roots, value in blocks:
            parts = block.split(value, [self.cut.state_roots[n] for n in roots])
            given.update(zip([traced.state[n] for n in roots], parts, strict=True))
        carry = needs.get("carry", {})
        for source in wiring.sources[k]:
            name = skip_name(source)
            if k == wiring.last_reader[source]:
                values, carry = pop(carry, name)
            else:
                values = peek(carry, name)
            given.update(zip(trace.stashes[source], values, strict=True))
        for v in piece.takes:
            if v in traced.state:
                # As in the piece that it came from, so that no gradient is sent there.
                given[v] = jax.lax.stop_gradient(given[v])
        borrowed = needs.get("borrowed", {})
        given.update(self._params(trace, params, borrowed))
        # 2. What it makes of it, and 3. what leaves.
        out = trace.boundaries[k] if k < len(trace.boundaries) else traced.outputs
        stashed = trace.stashes[k] if k in wiring.last_reader else ()
        new = [traced.new_state[n] for roots in in_block for n in roots]
        made = iter(traced.run(piece.nodes, given, (*out, *stashed, *new)))
        leaving, rest = (
            tuple(itertools.islice(made, len(part))) for part in (out, stashed)
        )
        new_state = tuple(
            block.joined(
                list(itertools.islice(made, len(roots))),
                [self.cut.state_roots[n] for n in roots],
            )
            for block, roots in zip(state, in_block, strict=True)
        )
        if k < len(trace.boundaries):
            y: Any = Boundary(leaving or (jnp.zeros(1),), kind)
        else:
            y = traced.output.unpack(leaving)
        if k in wiring.last_reader:
            carry = stash(carry, skip_name(k), rest)
        returned = [("carry", carry), ("state", new_state)]
        others = [value for need, value in returned if need in needs]
        return (y, *others) if others else y

    def _check_reads(self, trace: CutTrace) -> None:
        """What the piece reads in this trace is what its layer declares."""
        wiring, k = self.cut.wiring, self.number
        if not wiring.declares(trace, k, self.cut.roots):
            raise ValueError(
                "`fpipe.split(fn)`: traced for this call (other shapes or needs) piece "
                f"{k} {wiring.names[k]!r} reads what it did not read when the function "
                "was split: split it with an example of these shapes and needs"
            )

    def _params(
        self,
        trace: CutTrace,
        own: Sequence[Any],
        borrowed: Mapping[str, Sequence[Any]],
    ) -> dict[int, Any]:
        """The parameters that the piece reads, by the values of the trace."""
        wiring, roots = self.cut.wiring, self.cut.roots
        # Of each block, its own or another's, the roots that are in it.
        read: dict[Place, list[int]] = {}
        for root in trace.pieces[self.number].params:
            read.setdefault(wiring.params.place_of(roots[root]), []).append(root)
        given = dict[int, Any]()
        for (owner, n), mine in read.items():
            arrays = own if owner == self.number else borrowed[wiring.names[owner]]
            block = wiring.params.owned[owner][n]
            self._check_block(block, arrays[n])
            found = block.split(arrays[n], [roots[root] for root in mine])
            values = [trace.traced.params[root] for root in mine]
            given.update(zip(values, found, strict=True))
        return given

    def _check_block(self, block: Rows, array: Any) -> None:
        """A parameter is as the trace was made for."""
        expected = block.of(self.cut.function.params.leaves[block.leaf])
        got = aval(array)
        if (got.shape, got.dtype) != (expected.shape, expected.dtype):
            raise ValueError(
                "`fpipe.split(fn, params)`: the parameter "
                f"{self.cut.function.paths[block.leaf]!r} is {describe(got)}, but it "
                f"was {describe(expected)} when the function was split: split it with "
                "such parameters, or their shapes"
            )
