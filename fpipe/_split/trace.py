"""The function that is split, and its traces.

In: the user's function with the shapes of its parameters, and for each trace the shapes
of a microbatch. Out: a `Traced`, a graph of equations whose inputs have names. For

    def f(params, x, *, side):  return tanh(x @ params["w"]) + side

the trace of microbatches of 2 rows is

    | equation     | reads | makes |     params  (0,)   leaf 0 is "w"
    | dot_general  | 1, 0  | 3     |     x       (1,)
    | tanh         | 3     | 4     |     side    (2,)
    | add          | 4, 2  | 5     |     outputs (5,)

State goes in and comes out as `state` and `new_state`, beside these.

A function is traced once for each `Kind`: other shapes, `train`, or no key make another
graph, in which the cuts have to be found again.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax

from fpipe._core.errors import add_note, at_line, line_of
from fpipe._core.leaks import TraceWatch
from fpipe._core.pytrees import (
    PyTree,
    Shape,
    aval,
    describe,
    is_array,
    is_traced,
    numbers_as_arrays,
    pack,
    path_of,
)
from fpipe._model.layer import Layer
from fpipe._model.layer_calls import LayerCall, call_layer
from fpipe._model.microbatch import Whole, cut_inputs
from fpipe._model.model import cast, wide_output
from fpipe._model.needs import OF_CALL, ROW_INPUTS
from fpipe._planning.hardware import machine
from fpipe._program.graph import (
    Graph,
    Node,
    dependents,
    inline,
    needed_nodes,
    replay,
    trace,
)
from fpipe._program.roofline import RECOMPUTED, costs
from fpipe._split.mark import Mark
from fpipe._split.opening import Checkpoint, WholeLoop, open_trace
from fpipe._split.row_rewriting import Stacks
from fpipe._split.stacks import Roots, Rows

# What JAX raises where Python asks for what a tracer does not know.
UNKNOWN_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a trace is for: everything that decides how the function is traced.

    Attributes:
        x: the shapes of one microbatch.
        needs: those of its share of what the call gives, for each of `OF_CALL`. What is
            not given has no arrays, nor has `train`: such values are parts of a shape.
    """

    x: Shape
    needs: tuple[Shape, ...]

    @classmethod
    def of(cls, x: PyTree, needs: Mapping[str, Any]) -> "Kind":
        """From arrays, tracers or shapes."""
        given = [needs.get(need.name) for need in OF_CALL]
        return cls(
            Shape.of(x),
            tuple(
                Shape.of(need.missing if value is None else value)
                for need, value in zip(OF_CALL, given, strict=True)
            ),
        )

    def modes(self, asked: Collection[str]) -> Iterator["Kind"]:
        """The same microbatch in each mode, as it is first: with a key and without, as
        it is trained and as it is evaluated.

        Arguments:
            asked: the needs that the function has.
        """
        choices = [
            (own, *(map(Shape.of, need.modes) if need.name in asked else ()))
            for need, own in zip(OF_CALL, self.needs, strict=True)
        ]
        for needs in dict.fromkeys(itertools.product(*choices)):
            yield Kind(self.x, needs)


@dataclasses.dataclass(frozen=True)
class RowsAt:
    """Where a microbatch of `x` tells its number of rows: an axis of an array."""

    array: int
    axis: int

    @classmethod
    def of(cls, x: PyTree) -> "RowsAt | None":
        """Of a batch, with what says how it is cut; `None`: it is not."""
        sources = cut_inputs({"x": x}, 1).splits["x"].sources
        for n, source in enumerate(sources):
            if not isinstance(source, Whole) and source.axis is not None:
                return cls(n, source.axis)
        return None

    def count(self, x: Shape) -> int:
        """The rows of a microbatch."""
        return x.leaves[self.array].shape[self.axis]


@dataclasses.dataclass(frozen=True)
class Function:
    """The user's function.

    Attributes:
        layer: the function as a layer: its needs, and the checks of its call.
        params: the structure and the shapes of its parameters.
        paths: for each array of the parameters its path, such as `h/0/attention/w`.
        state: the structure and the shapes of its state.
        state_paths: for each array of the state its path.
        rows: where a microbatch of `x` tells its number of rows; `None`: nowhere.
    """

    layer: Layer
    params: Shape
    paths: tuple[str, ...]
    state: Shape
    state_paths: tuple[str, ...]
    rows: RowsAt | None

    @classmethod
    def of(
        cls, layer: Layer, params: PyTree, state: PyTree, rows: RowsAt | None
    ) -> "Function":
        """From parameters and state, or their shapes."""
        params, state = numbers_as_arrays(params), numbers_as_arrays(state)
        return cls(
            layer,
            Shape.of(params),
            _paths_of(params),
            Shape.of(state),
            _paths_of(state),
            rows,
        )

    def state_of(self, x: Shape) -> Shape:
        """The shapes of the state of a microbatch: state of rows has as many."""
        if not self.layer.state_rows or self.rows is None:
            return self.state
        rows = self.rows.count(x)
        leaves = [a.update(shape=(rows, *a.shape[1:])) for a in self.state.leaves]
        return dataclasses.replace(self.state, leaves=tuple(leaves))


def _paths_of(tree: PyTree) -> tuple[str, ...]:
    """For each array of a tree its path, such as `h/0/attention/w`."""
    return tuple(
        path_of(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if is_array(leaf)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A trace of the function.

    Attributes:
        graph: its equations, calls inlined, loops over layers written out, without
            marks.
        marks: where `fpipe.cut` stands in it.
        rounds: the positions of the equations of each round of a loop.
        checkpoints: the checkpoints that an equation was in, the outermost first.
        roots: the parameters, and the rows of parameters, that it reads by themselves.
        params: the graph's value of each.
        x: the graph's values of the arrays of `x`.
        needs: those of what the call gives, by need.
        state_roots: the arrays of the state, and the rows of them, that it reads by
            themselves.
        state: the graph's value of each.
        output: how `outputs` become what the function returns.
        outputs: the graph's values of that.
        new_state: for each root of the state the value that it has afterwards.
        whole_loops: loops over most of the parameters that are not cut by rows.
        kept: what the function has put where it stays, such as `float32[3]`; `""`:
            nothing.
        jaxpr: what the graph was read from.
    """

    graph: Graph
    marks: tuple[Mark, ...]
    rounds: tuple[range, ...]
    checkpoints: Mapping[Node, tuple[Checkpoint, ...]]
    roots: tuple[Rows, ...]
    params: tuple[int, ...]
    x: tuple[int, ...]
    needs: Mapping[str, tuple[int, ...]]
    state_roots: tuple[Rows, ...]
    state: tuple[int, ...]
    output: Any
    outputs: tuple[int, ...]
    new_state: tuple[int, ...]
    whole_loops: tuple[WholeLoop, ...]
    kept: str
    jaxpr: Any

    @property
    def all_roots(self) -> Roots:
        """The roots of the parameters and of the state."""
        return Roots(self.roots, self.state_roots)

    @cached_property
    def root_of(self) -> dict[int, int]:
        """The number of each parameter's root, by its value."""
        return {v: root for root, v in enumerate(self.params)}

    @cached_property
    def live(self) -> tuple[Node, ...]:
        """The equations that the outputs and the new state need, and those with
        effects.
        """
        return self._needed_for(self.graph.outputs)

    @cached_property
    def live_for_y(self) -> frozenset[Node]:
        """Those that the outputs need, or that have effects: all others make new state
        alone.
        """
        return frozenset(self._needed_for(self.outputs))

    def _needed_for(self, values: Sequence[int]) -> tuple[Node, ...]:
        return tuple(needed_nodes(self.graph, values, required=self.effects))

    @cached_property
    def effects(self) -> tuple[Node, ...]:
        """The equations with effects."""
        return tuple(node for node in self.graph.nodes if node.eqn.effects)

    @cached_property
    def position(self) -> dict[Node, int]:
        """The place of each equation among all."""
        return {node: n for n, node in enumerate(self.graph.nodes)}

    @cached_property
    def row_needs(self) -> tuple[int, ...]:
        """The graph's values of the needs that are cut into microbatches."""
        return tuple(v for name in ROW_INPUTS for v in self.needs.get(name, ()))

    @cached_property
    def of_data(self) -> set[int]:
        """The values that depend on the microbatch."""
        return dependents(self.graph, (*self.x, *self.row_needs))

    @cached_property
    def of_params(self) -> set[int]:
        """The values that depend on parameters."""
        return dependents(self.graph, self.params)

    @cached_property
    def of_key(self) -> set[int]:
        """The values that depend on the key."""
        return dependents(self.graph, self.needs["key"])

    @cached_property
    def of_state(self) -> set[int]:
        """The values that depend on the state."""
        return dependents(self.graph, self.state)

    @cached_property
    def first_uses(self) -> dict[int, int]:
        """For each root that is used the position of the first equation on the way of
        the data that needs it: directly, or through values that depend on parameters
        alone, such as a cast.
        """
        used = ((root, self.used_at.get(v)) for root, v in enumerate(self.params))
        return {root: at for root, at in used if at is not None}

    @cached_property
    def used_at(self) -> dict[int, int]:
        """For each value without data the position of the first equation with data that
        needs it, directly or through other such values; without those that none needs.
        """
        found: dict[int, int] = {}
        for node in reversed(self.live):
            at: int | None = self.position[node]
            if self.of_data.isdisjoint(node.outs):
                uses = [found[v] for v in node.outs if v in found]
                at = min(uses, default=None)
            for v in node.ins:
                if at is not None and v not in self.of_data:
                    found[v] = min(at, found.get(v, at))
        return found

    @cached_property
    def forward_costs(self) -> dict[Node, float]:
        """What each equation takes in a forward: see `_program.roofline`."""
        return costs(self.graph, self.live, (), machine())

    @cached_property
    def costs(self) -> dict[Node, float]:
        """What each equation takes in a step that trains: see `_program.roofline`."""
        found = costs(self.graph, self.live, self.params, machine())
        for node in self.checkpoints.keys() & found.keys():
            if not self.of_params.isdisjoint(node.outs):
                found[node] *= RECOMPUTED
        return found

    def run(
        self, nodes: Sequence[Node], given: Mapping[int, Any], wanted: Sequence[int]
    ) -> list[Any]:
        """Run some of its equations in order; what stood in a `jax.checkpoint` is
        checkpointed.
        """
        if self.checkpoints:
            return self._run_inside(nodes, given, wanted, 0)
        return replay(self.graph, nodes, given, wanted)

    def _run_inside(
        self,
        nodes: Sequence[Node],
        given: Mapping[int, Any],
        wanted: Sequence[int],
        depth: int,
    ) -> list[Any]:
        """Run equations that have so many checkpoints around them."""

        def inside(node: Node) -> tuple[Checkpoint, ...]:
            return self.checkpoints.get(node, ())[depth : depth + 1]

        made = {**self.graph.consts, **given}
        groups = [(key, list(part)) for key, part in itertools.groupby(nodes, inside)]
        # What is read after each group.
        needed = set(wanted)
        later = list[set[int]]()
        for _, part in reversed(groups):
            later.append(set(needed))
            needed.update(v for node in part for v in node.ins)
        for (around, part), after in zip(groups, reversed(later), strict=True):
            outs = [v for node in part for v in node.outs if v in after]
            if not around:
                results = replay(self.graph, part, made, outs)
            else:
                own = {v for node in part for v in node.outs}
                ins = dict.fromkeys(v for node in part for v in node.ins)
                read = [v for v in ins if v not in own and v not in self.graph.consts]

                def run(
                    *arrays: Any,
                    part: list[Node] = part,
                    read: list[int] = read,
                    outs: list[int] = outs,
                ) -> list[Any]:
                    values = dict(zip(read, arrays, strict=True))
                    return self._run_inside(part, values, outs, depth + 1)

                (checkpoint,) = around
                results = checkpoint(run)(*(made[v] for v in read))
            made.update(zip(outs, results, strict=True))
        return [made[v] for v in wanted]

    @cached_property
    def form(self) -> tuple[Any, ...]:
        """Its equations without their shapes: traces of the same form are cut at the
        same equations.
        """
        return tuple((node.name, node.ins, node.outs) for node in self.graph.nodes)


def trace_function(
    function: Function,
    kind: Kind,
    cut_leaves: frozenset[int] = frozenset(),
    roots: Roots | None = None,
    dtype: Any = None,
) -> Traced:
    """Run the function's Python on a microbatch of one kind.

    Arguments:
        cut_leaves, roots: see `open_trace`.
        dtype: what parameters, `x` and the needs that are cast are cast to before, if
            they are real floats; what comes out in it becomes float32.

    Raises:
        ValueError: it holds a value of a trace around it.
        TypeError: it returns another state than it is given.
    """
    parts = (
        function.params,
        kind.x,
        *kind.needs,
        function.state_of(kind.x),
    )
    outputs: list[Any] = []
    watch = TraceWatch()

    def run(*values: Any) -> list[Any]:
        watch.see(values[-1])
        rest = iter(values)
        params, x, *given, state = (
            part.spec.unpack([next(rest) for _ in part.leaves]) for part in parts
        )
        # Casts are equations too: those of parameters are made where they are used.
        params, x = cast((params, x), dtype)
        by_name = {
            need.name: cast(value, dtype) if need.cast else value
            for need, value in zip(OF_CALL, given, strict=True)
        }
        by_name["state"] = state
        needs = {name: by_name[name] for name in function.layer.needs or ()}
        result = call_layer(function.layer, 0, LayerCall(params, x, {}, needs))
        arrays, spec = pack(wide_output(result.y, dtype))
        outputs.append(spec)
        return [*arrays, *_checked_state(function.layer, parts[-1], result.state)]

    name = function.layer.name
    with _explaining(name):
        closed = trace(run, *(leaf for part in parts for leaf in part.leaves))
    graph = inline(closed)
    if is_traced(list(graph.consts.values())):
        raise ValueError(
            f"`fpipe.split(fn)`: {name!r} closes over a value of a trace around it "
            "(`jax.jit`, `jax.grad`), or of an earlier trace of its own, kept in a "
            "list, an attribute or a cache: give the value as a parameter or in `x`, "
            "or call `fpipe.split` outside the trace"
        )
    kept = watch.kept()
    rest = iter(graph.inputs)
    params, x, *given, state = (
        tuple(next(rest) for _ in part.leaves) for part in parts
    )
    count = outputs[-1].arrays
    stacks = Stacks(
        params, state, graph.outputs[count:], bool(function.layer.state_rows)
    )
    opened = open_trace(graph, stacks, cut_leaves, roots)
    by_rows = opened.by_rows
    return Traced(
        by_rows.graph,
        opened.marks,
        opened.rounds,
        opened.checkpoints,
        by_rows.roots.params,
        by_rows.params,
        x,
        {need.name: own for need, own in zip(OF_CALL, given, strict=True)},
        by_rows.roots.state,
        by_rows.state,
        output=outputs[-1],
        outputs=by_rows.graph.outputs[:count],
        new_state=by_rows.new_state,
        whole_loops=opened.whole_loops,
        kept=describe(kept[0]) if kept else "",
        jaxpr=closed,
    )


def _checked_state(layer: Layer, old: Shape, new: PyTree) -> list[Any]:
    """The arrays of the state that a function returns."""
    if not layer.asks("state"):
        return []
    arrays, spec = pack(numbers_as_arrays(new))
    kinds = [(a.shape, a.dtype) for a in map(aval, arrays)]
    if spec != old.spec or kinds != [(a.shape, a.dtype) for a in old.leaves]:
        raise TypeError(
            f"`fpipe.split(fn)`: {layer.name!r} got the state "
            f"{describe(old.tree)} and returned {describe(new)}; a state keeps its "
            "structure, shapes and dtypes"
        )
    return arrays


@contextlib.contextmanager
def _explaining(name: str) -> Iterator[None]:
    """Say of an exception in the function's trace where it was, and of JAX's own ones
    what to do.
    """
    try:
        yield
    except Exception as error:
        where = f"in the trace of {name!r}, which `fpipe.split` cuts"
        line = at_line(line_of(error))
        if isinstance(error, UNKNOWN_VALUES):
            where += (
                f":{line} Python asks for the content of an array, which a trace does "
                "not know. Write `jnp.where` or `jax.lax.cond` in place of `if`, "
                "`jax.lax.while_loop` in place of `while`, `jnp` in place of `np` and "
                "`float`; what decides in Python and is no data is bound by "
                "`functools.partial`"
            )
        elif isinstance(error, jax.errors.UnexpectedTracerError):
            where += (
                f":{line} it uses what an earlier trace of it has put into a list, an "
                "attribute or a cache. It is traced several times (other shapes, "
                "`train`, no key): return such values, or make them in each trace"
            )
        add_note(error, where)
        raise
