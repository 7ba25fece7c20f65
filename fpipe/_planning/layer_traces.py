"""The layers of a model one after the other, each traced and differentiated as a stage
of its own; equal layers once for all.

In: a model, and the shapes of one microbatch. Out: a `LayerTrace` for each layer. Of
`[dense, dense, head]`, where `dense` is one function on equal shapes,

    layer  key  inputs                   programs
    0      A    x f32[4,8], params 0     F A, B A: without a gradient of x
    1      B    x f32[4,8], params 1     F B, B B: with one
    2      C    x f32[4,8], params 2     F C, B C

and 1 would share the programs of 0 if the model's input had a gradient too.

Tracing is what takes time here: a stack of equal blocks is traced once or twice, not
block by block.
"""

import dataclasses
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fpipe._core.pytrees import (
    PyTree,
    Shape,
    device_bytes,
    eval_shape,
    is_inexact,
    nbytes,
)
from fpipe._model.init import init_params, init_state
from fpipe._model.model import Model
from fpipe._model.needs import stand_ins
from fpipe._model.remat import Remat
from fpipe._model.skip_routes import Skip, skip_of
from fpipe._model.stages import INDEX, Leaf, Port, Stage, X, Y, cut_stages
from fpipe._program.code import Code, Input, Output, Program, Residual
from fpipe._program.stage_programs import SplitSpec, StagePrograms, split_stage
from fpipe._program.trace import JointStage, differentiate, trace_stage
from fpipe.schedules import Kind

# What a microbatch keeps is one of these, or made in the layer; the rest of the inputs
# is there for the whole call.
_PER_MICROBATCH = ("x", "skip", "state")


def bytes_of(shape: Shape) -> int:
    """The bytes of all arrays of a pytree."""
    return sum(map(nbytes, shape.leaves))


@dataclasses.dataclass(frozen=True, eq=False)
class SpanPrograms:
    """The forward and the backward of some layers that follow each other.

    Attributes:
        joint: both as one graph.
        programs: what they take and return, and their codes: nothing is compiled here.
    """

    joint: JointStage
    programs: StagePrograms

    def program(self, kind: Kind) -> tuple[Program, Code] | None:
        """A program and what it computes, if there is one."""
        program = self.programs.by_kind.get(kind)
        if program is None or program.code is None:
            return None
        return program, program.code

    def kept_bytes(self, besides: Collection[str] = ()) -> int:
        """Bytes on the device that the backward takes from the forward, or from the
        inputs of a microbatch.

        Arguments:
            besides: kinds of inputs that do not count.
        """
        backward = self.program("B")
        if backward is None:
            return 0
        program, code = backward
        total = 0
        for value, arg in zip(program.ins, code.args, strict=True):
            kept = isinstance(value, Residual | Output)
            if isinstance(value, Input):
                kind = value.leaf.port.kind
                kept = kind in _PER_MICROBATCH and kind not in besides
            if kept and arg.value is not None:
                total += device_bytes(code.graph.avals[arg.value])
        return total

    def arrays_read(self, port: Port) -> frozenset[int]:
        """Which arrays of an input the forward or the backward reads."""
        # What a layer hands on as it is has to come to it too.
        values = [
            v
            for program in self.programs.by_kind.values()
            for v in (*program.ins, *program.aliases.values())
        ]
        return frozenset(
            v.leaf.number
            for v in values
            if isinstance(v, Input) and v.leaf.port == port
        )


class LayerTrace(NamedTuple):
    """One layer, or some that follow each other, as one stage.

    Attributes:
        key: equal for layers that are equal in all that decides their costs.
        inputs: the shapes that go in.
        wanted: the input leaves that get a gradient.
        programs: those of the first layer, or layers, with this key.
    """

    key: Hashable
    inputs: Mapping[Port, Shape]
    wanted: frozenset[Leaf]
    programs: SpanPrograms


class LayerTraces:
    """A walk through a model, from the first layer to the last.

    Arguments:
        x, needs: shapes of one microbatch; of `needs` what the call gives.
        params: those of every layer, or `None`: what `init` would make.

    Attributes:
        layers: the trace of each layer.
        boundaries: shapes before each layer, and after the last.
        skips: the shape of each skip.
        params, states: shapes by layer.
    """

    def __init__(
        self,
        model: Model,
        x: PyTree,
        needs: Mapping[str, PyTree],
        params: Sequence[PyTree] | None,
    ) -> None:
        self.model = model
        needed = stand_ins(**needs)
        model.check_given(needed, making=params is None)
        self._needs = {name: Shape.of(tree) for name, tree in needed.items()}
        key = needed["key"]
        if params is None:
            params = init_params(model, key, x, needs, shape_of_made)
        self.params = tuple(map(Shape.of, params))
        self.states: dict[int, Shape] = {}
        if model.stateful:
            states = init_state(model, x, needs, params, key, shape_of_made)
            self.states = {k: Shape.of(states[k]) for k in model.stateful}
        self.boundaries: list[Shape] = [Shape.of(x)]
        self.skips: dict[Skip, Shape] = {}
        self._stages = cut_stages(model, [1] * len(model.layers))
        # Of what crosses between layers, by the layer after it for a boundary: whether
        # a gradient depends on the leaf's cotangent.
        self._reached: dict[tuple[Port, int], bool] = {}
        self._known: dict[Hashable, SpanPrograms] = {}
        self._spans: dict[Hashable, LayerTrace] = {}
        # In order: what a layer takes is what earlier ones have made.
        self.layers: list[LayerTrace] = []
        for stage in self._stages:
            self.layers.append(self._next(stage))

    def _next(self, stage: Stage) -> LayerTrace:
        """Trace a layer, or find the trace of an equal one, and go on after it."""
        (k,) = stage.span
        # What decides the trace, without where the layer stands in the model.
        given, local = self._given(stage), _local_names(stage)
        wanted = self._wanted(k, given)
        # Names of layers and namespaces do not change what is computed; with them in
        # the key a stack of equal blocks would be traced block by block.
        layer = dataclasses.replace(stage.model.layers[k], name="layer", namespaces=())
        sent = {local(Port("skip", skip)): skip for skip in stage.skips_out}
        key: Hashable = (
            _comparable(layer),
            # What the last layer returns is cast where there is a compute dtype.
            stage.last and self.model.compute_dtype is not None,
            tuple((local(port), shape) for port, shape in given.items()),
            frozenset((local(leaf.port), leaf.number) for leaf in wanted),
            frozenset(map(str, sent)),
        )
        if key not in self._known:
            self._known[key] = self._differentiate(stage, given, wanted, None)
        programs = self._known[key]
        # Both by the names of the layer that was traced, which may be an earlier one.
        joint, theirs = programs.joint, _local_names(programs.joint.flat.stage)
        for port, shape in joint.flat.out.items():
            if port.kind == "skip":
                self.skips[sent[theirs(port)]] = shape
        # What this layer hands on is what later ones are given; and whether a gradient
        # depends on it decides what they differentiate.
        self.boundaries.append(joint.flat.out[Y])
        for leaf, reached in joint.reach.items():
            if leaf.port == Y:
                self._reached[Port("x", k + 1), leaf.number] = reached
            else:
                skip = sent[theirs(leaf.port)]
                self._reached[Port("skip", skip), leaf.number] = reached
        return LayerTrace(key, given, wanted, programs)

    def _given(self, stage: Stage) -> dict[Port, Shape]:
        """The shapes of what a stage takes, its first layer being the next of the walk
        or an earlier one.
        """
        given = {Port("params", n): self.params[n] for n in stage.param_layers}
        given[X] = self.boundaries[stage.span.start]
        given |= {Port("skip", skip): self.skips[skip] for skip in stage.skips_in}
        for port in stage.call_inputs:
            if port != X:
                given[port] = self._needs[port.kind]
        given |= {Port("state", n): self.states[n] for n in stage.stateful}
        if stage.asks("key"):
            number = Shape.of(np.uint32(0))
            given[INDEX] = number
            given |= {Port("number", n): number for n in stage.keyed}
        return given

    def _wanted(self, k: int, given: Mapping[Port, Shape]) -> frozenset[Leaf]:
        """The inputs of layer `k` that get a gradient: parameters, and what depends on
        parameters of earlier layers.
        """

        def asked(port: Port, n: int) -> bool:
            if port.kind in ("x", "skip"):
                name = Port("x", k) if port == X else port
                return self._reached.get((name, n), False)
            return port.kind == "params"

        return frozenset(
            Leaf(port, n)
            for port, shape in given.items()
            for n, a in enumerate(shape.leaves)
            if is_inexact(a) and asked(port, n)
        )

    def _differentiate(
        self,
        stage: Stage,
        given: Mapping[Port, Shape],
        wanted: frozenset[Leaf],
        remat: Remat | None,
    ) -> SpanPrograms:
        """Trace a stage, and cut its graph into a forward and a backward."""
        # Without a loss: what it costs belongs to no layer, and it is another one in
        # each call. So the last layer too gets a cotangent from outside.
        flat = trace_stage(stage, given, loss=None, whole=frozenset(), where="")
        joint = differentiate(flat, wanted, remat, where="")
        each = tuple((leaf, 1) for leaf in joint.cotangents)
        spec = SplitSpec(stage.pipe_stage, each)
        return SpanPrograms(joint, split_stage(joint, spec))

    def arrays_borrowed(self, k: int) -> dict[int, frozenset[int]]:
        """The arrays that a layer reads of those that it borrows, by their owner."""
        programs, borrows = self.layers[k].programs, self.model.borrows
        (traced,) = programs.joint.flat.stage.span
        # The trace may be that of an equal layer, which borrows by the same names from
        # other owners.
        owners = dict(borrows[traced])
        return {
            owner: programs.arrays_read(Port("params", owners[name]))
            for name, owner in borrows[k]
        }

    def arrays_popped(self, k: int, skip: Skip) -> frozenset[int]:
        """The arrays that a layer reads of a skip that it pops or peeks at."""
        programs, layers = self.layers[k].programs, self.model.layers
        (traced,) = programs.joint.flat.stage.span
        # As above: an equal layer has the same names, perhaps in other namespaces.
        (name,) = (
            name
            for name in (*layers[k].pop, *layers[k].peek)
            if skip_of(layers[k], name) == skip
        )
        return programs.arrays_read(Port("skip", skip_of(layers[traced], name)))

    def recomputed(self, k: int, remat: Remat) -> SpanPrograms:
        """A layer under `jax.checkpoint`."""
        layer = self.layers[k]
        return self._differentiate(self._stages[k], layer.inputs, layer.wanted, remat)

    def span(self, start: int, end: int) -> LayerTrace:
        """Layers `start` to `end - 1` as one stage. Of equal spans the first that was
        asked for, with its names.
        """
        span = range(start, end)
        if len(span) == 1:
            return self.layers[start]
        routes, layers = self.model.routes, self.model.layers
        # What decides the programs besides the layers: which skips end in the span, and
        # go on from there; which layer lends to which.
        between = []
        for n in span:
            for name in layers[n].stash:
                readers = routes[skip_of(layers[n], name)].readers
                inside = tuple(r - start for r in readers if r in span)
                if inside:
                    between.append((n - start, name, inside, max(readers) >= end))
        lent = tuple(
            (n - start, owner - start)
            for n in span
            for _, owner in self.model.borrows[n]
            if owner in span
        )
        key = (*(self.layers[n].key for n in span), tuple(between), lent)
        if key not in self._spans:
            # The span is the second stage, or the first if nothing stands before it.
            sizes = [n for n in (start, len(span), len(layers) - end) if n]
            stage = cut_stages(self.model, sizes)[1 if start else 0]
            given = self._given(stage)
            # No gradient leaves through a boundary inside the span: its input is that
            # of the first layer. Skips between its layers are no inputs either.
            wanted = {leaf for leaf in self.layers[start].wanted if leaf.port == X}
            for n in span:
                for leaf in self.layers[n].wanted:
                    if leaf.port in given and leaf.port != X:
                        wanted.add(leaf)
            of_span = frozenset(wanted)
            programs = self._differentiate(stage, given, of_span, None)
            self._spans[key] = LayerTrace(key, given, of_span, programs)
        return self._spans[key]


def shape_of_made(layer: int, make: Callable[[Any], PyTree], key: Any) -> PyTree:
    """In place of making a layer's parameters or state: their shapes."""
    del layer
    return eval_shape(make, key)


def _local_names(stage: Stage) -> Callable[[Port], Port]:
    """Ports of one layer by names that do not depend on where it stands."""
    # For layer 3, which borrows layer 0 as "embed":
    #
    #     Port("params", 3)  ->  Port("params")
    #     Port("params", 0)  ->  Port("params", "embed")
    (k,) = stage.span
    layer = stage.model.layers[k]
    names = {Port(kind, k): Port(kind) for kind in ("params", "state", "number")}
    for name, owner in stage.model.borrows[k]:
        names[Port("params", owner)] = Port("params", name)
    for name in (*layer.stash, *layer.pop, *layer.peek):
        names[Port("skip", skip_of(layer, name))] = Port("skip", name)
    return lambda port: names.get(port, port)


def _comparable(layer: Any) -> Hashable:
    """A layer, or where its function cannot be hashed, what is equal to it alone."""
    # A callable dataclass that is not frozen, for example. The model keeps it, so that
    # no other object gets its `id`.
    try:
        hash(layer)
    except TypeError:
        return id(layer.apply)
    return layer
