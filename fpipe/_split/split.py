"""`fpipe.split`: any function that JAX can trace, cut into layers.

In: the user's function, its parameters, and a microbatch, or their shapes. Out: a
`Split`. A `Pipe` runs its layers. It also converts the user's own tree of parameters to
the layers' parameters, and back. The steps, one module each:

    arguments.py      the arguments of `fpipe.split`, checked
    mark.py           `fpipe.cut`, which an author writes into the function
    trace.py          the function's graph, whose inputs have names
    opening.py        loops over layers, written out, and checkpointed models
    row_rewriting.py  stacked parameters and state, read by rows
    cuts.py           the places: marks, paths of parameters, or the best narrow places
    state.py          the piece of each array of the state
    pieces.py         the equations, the inputs and the outputs of each piece
    layers.py         the pieces as layers, over all traces of the function

A `CutGraph` (`cut_graph.py`) describes the result. `table.py` prints it as tables, and
`svg.py` draws it.

JaxPP (Xhebraj et al., arXiv 2412.14374) cuts traces into stages at marks too.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, overload

import jax

from fpipe._core.checks import as_bool, as_int
from fpipe._core.errors import shown
from fpipe._core.pytrees import (
    PyTree,
    Shape,
    Spec,
    describe,
    is_array,
    nbytes,
    numbers_as_arrays,
    pack,
)
from fpipe._core.statics import check_leaves
from fpipe._executors.placement import Placement
from fpipe._model.frozen import Frozen, spread
from fpipe._model.function_layers import FunctionLayers, OwnTree
from fpipe._model.layer import Layer
from fpipe._model.microbatch import CallShapes, Cut, Whole
from fpipe._model.model import Model
from fpipe._model.needs import OF_CALL, call_needs
from fpipe._model.straight import StraightInputs, only, rejoined, user_side
from fpipe._model.wrappers import Microbatches
from fpipe._planning.costs import LayerCosts, Sent
from fpipe._split.arguments import as_function, as_paths, check_example, check_rows
from fpipe._split.balance import best_balance
from fpipe._split.cut_graph import (
    BorrowedParameter,
    CutGraph,
    PieceNode,
    values_and_inputs,
)
from fpipe._split.layers import CutFunction, PieceLayer
from fpipe._split.specs import check_blocks, check_places, specs_of
from fpipe._split.stacks import Rows
from fpipe._split.svg import MOST_PIECES, svg
from fpipe._split.table import tables
from fpipe._split.trace import Function, Kind, RowsAt
from fpipe.schedules._checks import counted


@dataclasses.dataclass(frozen=True)
class Split(FunctionLayers):
    """A function cut into layers. `fpipe.split` makes it.

    It is a sequence of `fpipe.Layer`s. `fpipe.Pipe(split, ...)` runs it. Such a pipe
    takes parameters in the function's own tree, and returns gradients in that tree.
    `print(split)` shows the pieces. It compares, hashes and pickles if the function
    does.
    """

    cut: CutFunction

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The pieces as layers, in order.

        The parameters of each layer are a tuple of the arrays that it owns.
        """
        return _layers_of(self.cut.through_first)

    @cached_property
    def _straight_layers(self) -> tuple[Layer, ...]:
        return _layers_of(self.cut)

    def layers_in(self, dtype: Any) -> tuple[Layer, ...]:
        """The pieces of the function as a `Pipe` runs them.

        A later piece that reads an array of `x` gets it straight from the call, as
        `inputs` gives it, and not through the pieces before.

        Arguments:
            dtype: the dtype that the function computes in. `None`: its own.
        """
        return self.computing_in(dtype)._straight_layers

    @property
    def function(self) -> Layer:
        """The function that was split, as a layer."""
        return self.cut.function.layer

    def __len__(self) -> int:
        return len(self.cut.wiring.names)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    @overload
    def __getitem__(self, at: int) -> Layer: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Layer, ...]: ...
    def __getitem__(self, at: int | slice) -> Layer | tuple[Layer, ...]:
        return self.layers[at]

    def __reduce__(self) -> Any:
        return Split, (self.cut,)

    def computing_in(self, dtype: Any) -> "Split":
        """The same function and cuts, computing in another dtype.

        `Pipe(compute_dtype=...)` uses it. Parameters, `x` and side inputs are cast to
        the dtype if they are real floats. An output in this dtype is cast to float32.

        Arguments:
            dtype: the dtype, or `None` for no casts.
        """
        # Itself where nothing changes: its traces are kept with it.
        if dtype == self.cut.dtype:
            return self
        if dtype not in self._in_dtypes:
            self._in_dtypes[dtype] = Split(dataclasses.replace(self.cut, dtype=dtype))
        return self._in_dtypes[dtype]

    @cached_property
    def _in_dtypes(self) -> dict[Any, "Split"]:
        return {}

    def also_for(self, kind: Kind) -> "Split":
        """The same function and cuts, for another kind of microbatch too.

        Arguments:
            kind: the shapes and the mode of the microbatch.
        """
        return Split(self.cut.also_for(kind))

    # --- parameters ---

    @property
    def param_shapes(self) -> PyTree:
        """The shapes of the function's parameters, in its own tree."""
        return self.cut.function.params.tree

    def params(self, tree: PyTree) -> tuple[PyTree, ...]:
        """Convert the function's own tree to parameters with one entry per layer.

        Arguments:
            tree: the function's own tree of parameters, gradients or shapes.

        Returns:
            A tuple with one entry per layer.

        Raises:
            ValueError: `tree` is not the tree that the function was split with.
        """
        spec, placed = self.cut.function.params.spec, self._placed
        arrays, given = pack(tree)
        if given not in (spec, placed):
            arrays, given = pack(numbers_as_arrays(tree))
        if _fits(given, placed):
            return self.cut.wiring.params.from_blocks(arrays)
        if not _fits(given, spec):
            raise ValueError(
                "`fpipe.Pipe(split)`: the parameters are a tree as the function was "
                f"split with, {describe(self.param_shapes)}, got {describe(tree)}"
            )
        return self.cut.wiring.params.by_piece(arrays)

    @cached_property
    def _placed(self) -> Spec:
        """The structure of the function's tree when leaves are in blocks."""
        shapes = self.cut.function.params.leaves
        return pack(self.tree(self.cut.wiring.params.by_piece(shapes)))[1]

    def tree(self, params: Sequence[PyTree]) -> PyTree:
        """Convert parameters with one entry per layer to the function's own tree.

        This is the inverse of `params`.

        Arguments:
            params: parameters or gradients, one entry per layer.

        Returns:
            The function's own tree. A leaf whose rows belong to several pieces is an
            `fpipe.RowBlocks`.

        Raises:
            ValueError: `params` do not have the form that the method `params` returns.
        """
        owners = self.cut.wiring.params
        owned = owners.owned
        listed = isinstance(params, (tuple, list)) and len(params) == len(owned)
        if not listed or any(
            not isinstance(own, (tuple, list)) or len(own) != len(blocks)
            for own, blocks in zip(params, owned, strict=True)
        ):
            raise ValueError(
                "`split.tree(params)`: a tuple with one entry per layer, as "
                f"`split.params` makes it, got {describe(params)}"
            )
        return self.cut.function.params.spec.unpack(owners.leaves(params))

    @property
    def own_tree(self) -> OwnTree:
        """The form of the trees that `tree` returns."""
        return self._own_tree

    @cached_property
    def _own_tree(self) -> OwnTree:
        return OwnTree(self._placed, tuple(self.cut.wiring.params.places))

    def check_places(self, homes: Sequence[Placement]) -> None:
        """Check that the specs of parameters fit the meshes of their stages.

        Arguments:
            homes: the placement of each piece.

        Raises:
            ValueError: a spec names an axis that its mesh does not have, or the size of
                an axis does not divide the array.
        """
        check_places(self.cut.specs, self.cut.function, self.cut.wiring.owned, homes)

    # --- inputs ---

    def inputs(
        self, x: PyTree, needs: Mapping[str, PyTree], chunks: int, dtype: Any
    ) -> tuple[PyTree, dict[str, PyTree]]:
        """The batch and the needs of a call, in the form that the layers of a `Pipe`
        take. An array of `x` that later pieces read becomes a side input.

        Arguments:
            needs: what the call gives, by the names of the needs.
            dtype: the dtype that the function computes in. `None`: its own.

        Raises:
            TypeError, ValueError: they cannot be cut into microbatches; side inputs
                that the function does not ask for.
        """
        side = needs["side"]
        specs = pack(x)[1], pack(side)[1]
        try:
            ways = self._ways.get((dtype, *specs))
        except TypeError:
            # A static leaf that is not hashable; the message names it.
            CallShapes.of(x, needs, chunks)
            raise
        if ways is None:
            shapes = CallShapes.of(x, needs, chunks)
            kind = Kind.of(*shapes.first)
            numbers = self.computing_in(dtype).cut.straight_of(kind)
            ways = _Ways.of(shapes.cut, numbers or ())
            self._ways[(dtype, *specs)] = ways
            if ways.straight and side is not None:
                Model([self.function]).check_given({"side": side})
        if not ways.straight:
            return x, dict(needs)
        side = StraightInputs(side, only(x, ways.straight))
        return only(x, ways.first), {**needs, "side": side}

    @cached_property
    def _ways(self) -> dict[Any, "_Ways"]:
        return {}

    # --- costs ---

    def estimated_work(
        self, x: PyTree, needs: Mapping[str, Any]
    ) -> tuple[tuple[float, float], ...]:
        """What each piece takes in a step that trains, forward and backward, estimated
        from the trace.

        The unit is a FLOP of a large matrix product. The mode and the dtypes are those
        of the example that the function was split with, because a `Pipe` finds its
        default balance with these.

        Arguments:
            x, needs: shapes of a microbatch, as `layers_in` take them.
        """
        straight, first = needs.get("side"), self.cut.first
        side = Shape.of(user_side(straight))
        own = tuple(
            side if need.name == "side" and side.spec == given.spec else given
            for need, given in zip(OF_CALL, first.needs, strict=True)
        )
        kind = Kind(Shape.of(rejoined(x, straight)), own)
        return self.cut.trace(kind).work

    def estimated_costs(self) -> LayerCosts:
        """What decides the balance of a `Pipe`: the work of the pieces for the example
        that the function was split with, and what goes between them.
        """
        trace, borrowed = self.cut.trace(self.cut.first), self._borrowed()
        none = (0,) * len(self)
        return LayerCosts(
            names=self.cut.wiring.names,
            forward=tuple(forward for forward, _ in trace.work),
            backward=tuple(backward for _, backward in trace.work),
            unit="FLOP",
            params=none,
            gradients=none,
            residuals=none,
            shared=none,
            saved=none,
            boundaries=none,
            skips=tuple(trace.sent),
            borrowed=tuple(Sent(p.owner, p.readers, p.bytes) for p in borrowed),
            estimated=True,
        )

    # --- state ---

    @property
    def state_shapes(self) -> PyTree:
        """The shapes of the function's state, in its own tree."""
        return self.cut.function.state.tree

    def state(self, tree: PyTree) -> tuple[PyTree, ...]:
        """Convert the function's own state to a state with one entry per layer.

        Arguments:
            tree: the function's own tree, a tree of `state_tree`, or an
                `fpipe.Microbatches` of such trees. It may have shapes for arrays.

        Returns:
            A tuple with one entry per layer, `None` for a layer without state.

        Raises:
            ValueError: `tree` is not the tree that the function was split with.
        """
        if isinstance(tree, Microbatches):
            pieces = [self.state(piece) for piece in tree]
            return tuple(
                None if own[0] is None else Microbatches(own)
                for own in zip(*pieces, strict=True)
            )
        known, owners = self.cut.function.state, self.cut.wiring.state
        arrays, given = pack(numbers_as_arrays(tree))
        if given == known.spec:
            self._check_state(map(Rows, range(len(arrays))), arrays)
            pieces = owners.by_piece(arrays)
        elif given == self._placed_state:
            blocks = [
                owners.owned[place.piece][place.number] for place in owners.places
            ]
            self._check_state(blocks, arrays)
            pieces = owners.from_blocks(arrays)
        else:
            raise ValueError(
                "`fpipe.Pipe(split)`: the state is a tree as the function was split "
                f"with, {describe(known.tree)}, got {describe(tree)}; of another pipe "
                "take `other.gather_state(state)`"
            )
        return tuple(own or None for own in pieces)

    def _check_state(self, blocks: Iterable[Rows], arrays: Sequence[Any]) -> None:
        """Refuse arrays of other shapes than those of some blocks of the state."""
        paths, leaves = self.cut.function.state_paths, self.cut.function.state.leaves
        for rows, got in zip(blocks, arrays, strict=True):
            expected = rows.of(leaves[rows.leaf])
            # A state of rows may have any number of rows; `Pipe` checks the number.
            first = 1 if self.function.state_rows else 0
            same = got.shape[first:] == expected.shape[first:]
            if len(got.shape) != len(expected.shape) or got.dtype != expected.dtype:
                same = False
            if not same:
                hint = "" if first else " (state of rows is `Layer(state_rows=True)`)"
                path = paths[rows.leaf]
                path = path if rows.whole else rows.label(path)
                raise ValueError(
                    f"`fpipe.Pipe(split)`: the state {path!r} is {describe(got)}, but "
                    f"it was {describe(expected)} when the function was split{hint}"
                )

    @cached_property
    def _placed_state(self) -> Spec:
        """The structure of the function's state when leaves are in blocks."""
        state, owners = self.cut.function.state, self.cut.wiring.state
        blocks = owners.leaves(owners.by_piece(state.leaves))
        return pack(state.spec.unpack(blocks))[1]

    def state_tree(self, states: Sequence[PyTree]) -> PyTree:
        """Convert a state with one entry per layer to the function's own tree.

        This is the inverse of `state`.

        Arguments:
            states: one entry per layer.

        Returns:
            The function's own tree. A leaf whose rows belong to several pieces is an
            `fpipe.RowBlocks`.
        """
        pieces = [s for s in states if isinstance(s, Microbatches)]
        if pieces:
            return Microbatches(
                [
                    self.state_tree([s and s[i] for s in states])
                    for i in range(len(pieces[0]))
                ]
            )
        own = [state or () for state in states]
        return self.cut.function.state.spec.unpack(self.cut.wiring.state.leaves(own))

    def frozen(self, frozen: Frozen) -> PyTree:
        """Convert `frozen` of the function's own tree to flags by layer.

        Arguments:
            frozen: `frozen(path, array)`, or a pytree of bools in the structure of the
                function's parameters or of the upper part of their tree.
        """
        tree = self.param_shapes
        try:
            flags = spread(frozen, tree)
        except (TypeError, ValueError) as error:
            if callable(frozen):
                raise
            raise ValueError(
                "`value_and_grad(frozen=...)`: a function of a path and an array, or a "
                "pytree of bools that the parameters begin with, "
                f"{describe(tree)}, got {shown(frozen)}"
            ) from error
        pairs = zip(flags, jax.tree.leaves(tree), strict=True)
        mine = [flag for flag, leaf in pairs if is_array(leaf)]
        owned = self.cut.wiring.owned
        return tuple(tuple(mine[rows.leaf] for rows in blocks) for blocks in owned)

    # --- what it is ---

    def balance(self, stages: int) -> tuple[int, ...]:
        """The number of pieces in each stage, for a number of stages.

        The most expensive stage takes as little time as possible, estimated from the
        trace (see `fpipe.split`). A balance may make it up to 5 % longer if fewer bytes
        then go between stages. A forward counts once. `Pipe` and `fpipe.balance` know
        how often it runs: twice with a checkpoint mode that recomputes, except on the
        last stage of most schedules.

        Arguments:
            stages: the number of stages, at least 1.

        Raises:
            ValueError: there are more stages than pieces.
        """
        stages = as_int("Split.balance", "stages", stages)
        if stages > len(self):
            raise ValueError(
                f"`Split.balance({stages})`: the function is cut into "
                f"{counted(len(self), 'piece')}: ask for fewer stages, or cut it finer"
            )
        trace = self.cut.trace(self.cut.first)
        return best_balance(trace.costs, trace.sent, stages)

    def __str__(self) -> str:
        """Tables of the pieces and their parameters, of the values that cross cuts, and
        of the values that are computed again after a cut. The column `time` has the
        share of each piece in the estimated time of all.
        """
        return "\n\n".join(map(str, tables(self._graph)))

    def to_svg(self) -> str:
        """Draw the pieces, and the values that go between them, as an SVG document.

        A box is a piece. The filled part of a box shows its time. A straight arrow is
        a boundary. An arc over the boxes is a skip, a key, borrowed parameters or a
        side input, with its bytes. A tooltip on each of them has the details.

        Returns:
            The document. It has a white background, for light and dark pages. Up to 12
            pieces it is at most 700 pixels wide.

        Example:
            >>> mlp = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
            >>> params = {"a": jnp.eye(3), "b": jnp.eye(3)}
            >>> split = fpipe.split(mlp, params, jnp.ones((2, 3)), cuts=["b"])
            >>> split.to_svg().startswith("<svg")
            True
        """
        return svg(self._graph)

    def _repr_html_(self) -> str:
        """The drawing and the tables, for a notebook."""
        graph = self._graph
        shown = [table.html() for table in tables(graph)]
        # For hundreds of pieces a table is clearer than a drawing.
        if len(graph.pieces) <= MOST_PIECES:
            shown.insert(0, svg(graph))
        return "\n".join(shown)

    def __repr__(self) -> str:
        name = self.cut.function.layer.name
        return f"Split({name}: {counted(len(self), 'piece')})"

    def _borrowed_roots(self) -> list[list[Rows]]:
        """For each piece the parameters that it reads and does not own."""
        trace, owned = self.cut.trace(self.cut.first), self.cut.wiring.owned
        return [
            [
                root
                for root in (self.cut.roots[n] for n in piece.params)
                if not any(rows.has(root) for rows in owned[k])
            ]
            for k, piece in enumerate(trace.pieces)
        ]

    def _borrowed(self) -> tuple[BorrowedParameter, ...]:
        """The parameters that other pieces read than those that own them."""
        function, borrowed = self.cut.function, self._borrowed_roots()
        return tuple(
            BorrowedParameter(
                root.label(function.paths[root.leaf]),
                nbytes(root.of(function.params.leaves[root.leaf])),
                self.cut.wiring.params.place_of(root).piece,
                tuple(k for k, own in enumerate(borrowed) if root in own),
            )
            for root in sorted(set(itertools.chain(*borrowed)))
        )

    @property
    def _graph(self) -> CutGraph:
        trace, wiring = self.cut.trace(self.cut.first), self.cut.wiring
        borrowed = self._borrowed_roots()
        pieces = tuple(
            PieceNode(
                wiring.names[k],
                _labels(self.cut.function.paths, wiring.owned[k]),
                _labels(self.cut.function.paths, borrowed[k]),
                _labels(self.cut.function.state_paths, wiring.state.owned[k]),
                piece.flops,
                trace.costs[k],
                trace.bytes_of(piece.again),
            )
            for k, piece in enumerate(trace.pieces)
        )
        crossing, again, given = values_and_inputs(
            trace, self.cut.first, self.state_shapes
        )
        lent = self._borrowed()
        name = self.cut.function.layer.name
        return CutGraph(name, pieces, crossing, again, lent, given)


def _labels(paths: Sequence[str], blocks: Sequence[Rows]) -> tuple[str, ...]:
    """The names of some blocks of leaves in tables."""
    return tuple(rows.label(paths[rows.leaf]) for rows in sorted(blocks))


@dataclasses.dataclass(frozen=True)
class _Ways:
    """Which arrays of a batch go which way, by their numbers in what the call gives.

    Attributes:
        first: those that the first piece gets as `x`.
        straight: those that come straight to the pieces that read them.
    """

    first: frozenset[int]
    straight: frozenset[int]

    @classmethod
    def of(cls, cut: Cut, numbers: Iterable[int]) -> "_Ways":
        """Of a batch that is cut so.

        Arguments:
            numbers: the arrays of a microbatch that come straight.
        """
        split = cut.splits["x"]
        given = [
            {split.array(n, i) for i in range(cut.m)} for n in range(len(split.sources))
        ]
        straight = frozenset().union(*(given[n] for n in numbers))
        rest = frozenset().union(*given) - straight
        # By the rows of the first array that has any a mean is weighed.
        rows = (
            n
            for n, source in enumerate(split.sources)
            if not isinstance(source, Whole) and source.axis is not None
        )
        return cls(rest | given[next(rows, 0)], straight)


def _layers_of(cut: CutFunction) -> tuple[Layer, ...]:
    return tuple(PieceLayer(cut, k).layer for k in range(len(cut.wiring.names)))


def _fits(given: Spec, expected: Spec) -> bool:
    """Whether a tree has the structure of another one; static values may differ."""
    return given.treedef == expected.treedef and given.arrays == expected.arrays


def split(
    fn: Any,
    params: PyTree,
    x: PyTree,
    *,
    side: PyTree = None,
    key: Any = None,
    state: PyTree = None,
    train: bool = False,
    step: Any = None,
    stages: int | None = None,
    cuts: Sequence[str] | None = None,
    specs: PyTree = None,
) -> Split:
    """Cut a function into layers for a `Pipe`.

    The pipe then computes the function on each microbatch. `fn` is any function that
    JAX can trace: the `apply` of a model, or a function written by hand. `split` finds
    in its trace the values that cross a cut. A value that only the next piece reads is
    part of the boundary. A value that later pieces read is a skip.

    There are three ways to choose the places of the cuts, in this order:

    1. `cuts`: before the first use of the parameters that it names.
    2. The marks `h = fpipe.cut(h)` in the function.
    3. Otherwise `split` chooses. With `stages` it makes that many pieces that take
       nearly the same time. Without, it cuts between all modules of the function. It
       does not cut inside a small module if more bytes would cross there than at its
       ends.

    The time of a piece is that of its forward and backward, estimated from the trace by
    the roofline model: each equation takes the longer of the times of its FLOPs and of
    the bytes that it moves. How many FLOPs take as long as moving one byte is a
    constant of each `jax.default_backend()`.

    Arguments:
        fn: `fn(params, x, **needs)`, a pure function; `x` is any pytree. It may have
            the needs `side`, `key`, `state`, `train` and `step` as keyword-only
            parameters, like a layer. Its key on microbatch `i` is
            `fold_in(fold_in(key, 0), i)` of the call's key, for any cuts. With `state`
            it returns `y, state`.
        params: the parameters of `fn`, or their shapes.
        x: an example of a microbatch, with any number of rows, or its shapes.

    Other Arguments:
        side, key, state, train, step: examples of the needs that calls will give, as
            arrays or as shapes. `state` is any pytree, and is required if `fn` asks for
            it. Its arrays must keep their shapes.
        stages: the number of pieces, if there are neither `cuts` nor marks.
        cuts: paths of parameters, in the form of `jax.tree_util.keystr(path,
            simple=True, separator="/")`. A path may be a prefix, by whole parts:
            `"h/1"` includes `"h/1/w"`, but not `"h/10"`. Each path begins a new piece
            before the first use of its parameters.
        specs: how parameters are sharded over the meshes of stages, as for
            `Layer(spec=...)`. A `jax.sharding.PartitionSpec` holds for all parameters.
            A tree of specs has the form of `params`. A spec in place of a whole subtree
            holds for all parameters in it. `None` leaves a parameter as it is given:
            with the spec of a Flax box around the array, or else with the array's own
            sharding. For stacked parameters the first entry of a spec is `None`,
            because their rows belong to several stages.

    Returns:
        A `Split`. The cuts are the same for all shapes and modes. The function is
        traced again for a smaller microbatch, or for evaluation.

    Raises:
        TypeError: `fn` is no function, has parameters that are no needs, or has a need
            that cannot be split. `specs` contains something that is no spec.
        ValueError: a path in `cuts` names no parameter. `specs` has another form than
            `params`, or shards the rows of stacked parameters. There are too few places
            to cut at. A mark is inside a loop, a branch, a checkpointed function or a
            function with its own derivative. A piece reads an array of the state that a
            later piece writes.

    Example:
        >>> def mlp(params, x):
        ...     for layer in params:
        ...         x = x + jnp.tanh(x @ layer["w"])
        ...     return x
        >>> params = [{"w": jnp.eye(3)} for _ in range(4)]
        >>> split = fpipe.split(mlp, params, jnp.ones((2, 3)), cuts=["2"])
        >>> devices = [jax.devices()[0]] * 2
        >>> pipe = fpipe.Pipe(split, devices=devices, chunks=4)
        >>> placed = pipe.place(params)
        >>> pipe(placed, jnp.ones((8, 3))).shape
        (8, 3)
    """
    layer = as_function(fn, state)
    check_leaves(state, "state")
    if stages is not None:
        stages = as_int("fpipe.split", "stages", stages)
    train = as_bool("fpipe.split", "train", train)
    if cuts is not None:
        cuts = as_paths(cuts)
        if stages is not None:
            raise TypeError(
                "`fpipe.split(stages=..., cuts=...)`: one of them says where it is cut"
            )
    needs = call_needs(side=side, key=key, train=train, step=step)
    check_example(layer, x, needs)
    shapes = CallShapes.of(x, needs, 1)
    once, twice = Kind.of(*shapes.first), Kind.of(shapes.twice.x, shapes.twice.needs)
    function = Function.of(layer, params, state, RowsAt.of(x))
    check_rows(function, once, twice)
    cut = CutFunction(function, once, cuts, stages, specs=specs_of(specs, params))
    made = Split(cut)
    # All mistakes are found here, and not in the first call.
    check_blocks(cut.specs, function.paths, made.cut.wiring.owned)
    cut.note(twice)
    return made
