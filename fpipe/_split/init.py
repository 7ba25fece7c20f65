"""The user's own init function, run piece by piece where each piece lives.

In: a function of a key, or of a key and a batch, that makes all parameters. Out: for
each layer a function that makes its entry, and nothing else. Of

    def init(key):
        a, b = jax.random.split(key)
        return {"first": normal(a, (4, 4)), "last": normal(b, (4, 4))}

and a split after "first" they are

    layer 0    split, normal(a)    -> ("first",)
    layer 1    split, normal(b)    -> ("last",)

The function is traced, and no array of all parameters is made anywhere. Its operations
run one by one, as they do where the user calls it, and so make the same numbers to the
last bit. One that is under `jax.jit` as a whole is a program for each layer: how XLA
puts operations together may then change the last bit.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh

from fpipe._core.errors import noting
from fpipe._core.makers import made_whole, shapes_made
from fpipe._core.pytrees import (
    PyTree,
    Spec,
    aval,
    is_traced,
    numbers_as_arrays,
    pack,
    zeros,
)
from fpipe._model.function_layers import FunctionLayers
from fpipe._model.init import Put, init_state
from fpipe._model.layer import Layer
from fpipe._model.microbatch import BatchShapes
from fpipe._model.model import Model
from fpipe._model.signatures import keyword_needs
from fpipe._model.wrappers import unwrapped
from fpipe._program.graph import Graph, Node, evaluate, inline, needed_nodes, trace

_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclasses.dataclass(frozen=True, eq=False)
class Init:
    """An init function and what it is called with.

    Attributes:
        fn: the user's function.
        key: the first argument.
        args, kwargs: the batch, or its shapes, if the function takes it; without
            wrappers. Of shapes it gets zeros.
    """

    fn: Callable[..., PyTree]
    key: Any
    args: tuple[PyTree, ...]
    kwargs: Mapping[str, PyTree]

    @classmethod
    def of(
        cls, fn: Callable[..., PyTree], key: Any, args: Sequence[Any], kwargs: Any
    ) -> "Init":
        """The call of an init function: of the key alone, if it requires no more; else
        with the batch's positional arguments, as many as it takes, and those keywords
        that it names.
        """
        try:
            parameters = list(inspect.signature(fn).parameters.values())
        except (TypeError, ValueError):  # some built-in functions have none
            return cls(fn, key, tuple(map(unwrapped, args)), {})
        kinds = {p.kind for p in parameters}
        required = [
            p for p in parameters if p.default is p.empty and p.kind not in _VARIADIC
        ]
        if inspect.Parameter.VAR_POSITIONAL not in kinds:
            if len(required) <= 1:
                return cls(fn, key, (), {})
            positional = [p for p in parameters if p.kind in _POSITIONAL]
            args = args[: len(positional) - 1]
        names = [p.name for p in parameters[1 + len(args) :] if p.kind in _NAMED]
        own = {name: unwrapped(kwargs[name]) for name in names if name in kwargs}
        return cls(fn, key, tuple(map(unwrapped, args)), own)

    @classmethod
    def of_layer(
        cls, layer: Layer, key: Any, x: PyTree, needs: Mapping[str, Any]
    ) -> "Init":
        """The call of the `init` of a function that is a layer: as that of layer 0.

        Arguments:
            x, needs: shapes of a microbatch, and of what the call gives besides.
        """
        assert layer.init is not None
        named = {n: needs[n] for n in keyword_needs(layer.init) if n in needs}
        return cls(layer.init, jax.random.fold_in(key, 0), (x,), named)

    @property
    def _given(self) -> PyTree:
        return self.key, self.args, self.kwargs

    def _run(self, key: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> PyTree:
        with noting("in `init`, which makes the parameters"):
            return numbers_as_arrays(self.fn(key, *args, **kwargs))

    def shapes(self, axes: AbstractMesh | None) -> PyTree:
        """What it makes, as shapes.

        Arguments:
            axes: those that it may name.
        """
        return shapes_made(axes, self._run, *self._given).shapes

    def traced(self, layers_of: Callable[[PyTree], Sequence[PyTree]]) -> "TracedInit":
        """Its trace, once for all stages that share a mesh in the context.

        Arguments:
            layers_of: parameters as layers take them, one entry per layer.
        """
        arrays, spec = pack(self._given)
        specs: list[Spec] = []

        def run(*values: Any) -> list[Any]:
            made = [pack(entry) for entry in layers_of(self._run(*spec.unpack(values)))]
            specs[:] = [own for _, own in made]
            return [a for own, _ in made for a in own]

        closed = trace(run, *map(aval, arrays))
        graph = inline(closed, keep_calls=("jit", "pjit"))
        outputs = set(graph.outputs)
        whole = any(
            node.name in ("jit", "pjit") and len(outputs.intersection(node.outs)) > 1
            for node in graph.nodes
        )
        if whole:
            graph = inline(closed)
        return TracedInit(graph, tuple(arrays), tuple(specs), whole)


@dataclasses.dataclass(frozen=True, eq=False)
class TracedInit:
    """An init function's trace.

    Attributes:
        graph: from the arrays of the key and the batch to those of all layers.
        given: these arrays, or their shapes; the key first.
        specs: of each layer's entry.
        jitted: whether several parameters come out of one jitted function, whose
            equations are then in the graph.
    """

    graph: Graph
    given: tuple[Any, ...]
    specs: tuple[Spec, ...]
    jitted: bool

    def needed(self, layer: int) -> tuple[list[Node], tuple[int, ...]]:
        """The equations that make a layer's entry, and the values of its arrays."""
        start = sum(spec.arrays for spec in self.specs[:layer])
        wanted = self.graph.outputs[start : start + self.specs[layer].arrays]
        return needed_nodes(self.graph, wanted), wanted

    def make(self, layer: int, key: Any) -> PyTree:
        """A layer's entry, on the device of the key."""
        graph = self.graph
        nodes, wanted = self.needed(layer)
        read = {*wanted, *(v for node in nodes for v in node.ins)}
        keys = pack(key)[0]
        values = dict(zip(graph.inputs, keys, strict=False))
        for v, a in list(zip(graph.inputs, self.given, strict=True))[len(keys) :]:
            if v in read:
                values[v] = _beside(a, keys[0])

        def run(values: Mapping[int, Any]) -> list[Any]:
            return evaluate(graph, nodes, values, wanted)

        made = jax.jit(run)(values) if self.jitted else run(values)
        return self.specs[layer].unpack(made)


def _beside(a: Any, key: Any) -> Any:
    """An array where a key is; of a shape zeros."""
    a = zeros(a) if isinstance(a, jax.ShapeDtypeStruct) else a
    if is_traced(key):
        return a
    (device,) = key.devices()
    return jax.device_put(a, device)


def make_state(
    function: Layer,
    pieces: FunctionLayers,
    key: Any,
    x: PyTree,
    needs: Mapping[str, Any],
    put: Put,
    batch: BatchShapes | None,
    ready: Sequence[BatchShapes],
) -> tuple[PyTree, ...]:
    """What the `init_state` of a function makes, one entry per piece.

    Arguments:
        function: the function as a layer.
        key: `init_state` gets `fold_in(key, 0)`; `None`: of `jax.random.key(0)`.
        x, needs: shapes of a microbatch.
        put: `put(piece, make, key)` runs `make(key)` where a piece lives.
        batch, ready: all microbatches together, or each; see
            `fpipe._model.init.init_state`.
    """
    key = jax.random.key(0) if key is None else key
    params = (pieces.param_shapes,)

    # All of it at once: a state is small, or it is of rows and begins with zeros.
    def whole(piece: int, make: Callable[[Any], PyTree], key: Any) -> PyTree:
        del piece
        return made_whole(jax.sharding.get_abstract_mesh(), make, key)

    model = Model([function])
    state = init_state(model, x, needs, params, key, whole, batch, ready)[0]
    return tuple(
        None if own is None else put(k, lambda _, own=own: own, key)
        for k, own in enumerate(pieces.state(state))
    )
