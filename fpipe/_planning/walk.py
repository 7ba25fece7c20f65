"""Layers one after the other, each traced and differentiated as a stage of its own;
equal layers once for all.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._core.pytrees import PyTree, Shape, eval_shape, is_inexact
from fpipe._model.model import Model
from fpipe._model.needs import stand_ins
from fpipe._model.remat import Remat
from fpipe._model.skip_routes import Skip, skip_of
from fpipe._model.stages import INDEX, Leaf, Port, Stage, X, Y, cut_stages
from fpipe._program.code import Code, Input, Output, Residual
from fpipe._program.stage_programs import SplitSpec, StagePrograms, split_stage
from fpipe._program.trace import JointStage, differentiate, flatten

# What a microbatch keeps is one of these, or made in the layer; the rest of the inputs
# is there for the whole call.
_PER_MICROBATCH = ("x", "skip", "state")


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """A span of layers, cut into its forward and its backward.

    Attributes:
        joint: both as one graph.
        programs: what they take and return, by name; their calls are the codes.
    """

    joint: JointStage
    programs: StagePrograms

    def code(self, kind: Any) -> Code | None:
        """What a program computes, if there is one."""
        program = self.programs.by_kind.get(kind)
        return None if program is None else program.code

    def kept(self, without: Sequence[str] = ()) -> int:
        """Bytes that the backward takes from the forward or from the stage's inputs,
        inputs of some kinds aside.
        """
        program, code = self.programs.by_kind.get("B"), self.code("B")
        if program is None or code is None:
            return 0
        total = 0
        for ref, arg in zip(program.ins, code.args, strict=True):
            ours = isinstance(ref, Residual | Output)
            if isinstance(ref, Input):
                ours = (
                    ref.leaf.port.kind in _PER_MICROBATCH
                    and ref.leaf.port.kind not in without
                )
            total += (
                nbytes(code.graph.avals[arg.value])
                if ours and arg.value is not None
                else 0
            )
        return total


class Step(NamedTuple):
    """One layer of the walk.

    Attributes:
        key: equal for layers that are equal in all that decides their costs.
        inputs: the shapes that go in.
        wanted: the input leaves that get a gradient.
        cut: the first layer with this key.
    """

    key: Hashable
    inputs: Mapping[Port, Shape]
    wanted: frozenset[Leaf]
    cut: Cut


def nbytes(shape: Any) -> int:
    """The bytes of an array of that shape and dtype; keys count as the numbers that
    they are made of.
    """
    if jnp.issubdtype(shape.dtype, jax.dtypes.extended):
        shape = jax.eval_shape(
            jax.random.key_data, jax.ShapeDtypeStruct(shape.shape, shape.dtype)
        )
    return int(np.prod(shape.shape, dtype=np.int64)) * shape.dtype.itemsize


def size_of(shape: Shape) -> int:
    """The bytes of all arrays of a pytree."""
    return sum(map(nbytes, shape.leaves))


class Walk:
    """A walk through a model.

    Arguments:
        x, needs: shapes of one microbatch; of `needs` what the call gives.
        params: those of every layer, or `None`: what `init` would make.
    """

    def __init__(
        self,
        model: Model,
        x: PyTree,
        needs: Mapping[str, PyTree],
        params: Sequence[PyTree] | None,
    ) -> None:
        self.model = model
        call_needs = stand_ins(**needs)
        self.needs = {name: Shape.of(tree) for name, tree in call_needs.items()}
        key = call_needs["key"]
        if params is None:
            params = model.init(
                key, x, needs, lambda k, make, key: eval_shape(make, key)
            )
        self.params = tuple(map(Shape.of, params))
        self.states: dict[int, Shape] = {}
        if model.stateful:
            states = model.init_state(
                x, needs, params, key, lambda k, make, key: eval_shape(make, key)
            )
            self.states = {k: Shape.of(states[k]) for k in model.stateful}
        self.stages = cut_stages(model, [1] * len(model.layers))
        self.at: list[Shape] = [Shape.of(x)]  # before each layer, and behind the last
        self.skips: dict[Skip, Shape] = {}
        self._reach: dict[
            tuple[Port, int], bool
        ] = {}  # a gradient depends on that leaf's cotangent
        self._found: dict[Hashable, tuple[Cut, dict[Port, Shape]]] = {}
        self._pairs: dict[Hashable, Cut] = {}
        self.steps = tuple(self._step(k) for k in range(len(model.layers)))

    def _step(self, k: int) -> Step:
        stage = self.stages[k]
        given, local = self.given(stage), _local(stage)
        wanted = self._wanted(given)
        layer = dataclasses.replace(stage.model.layers[k], name="layer", namespaces=())
        key: Hashable = (
            _comparable(layer),
            stage.last
            and self.model.compute_dtype is not None,  # then what it returns is cast
            tuple((local(port), shape) for port, shape in given.items()),
            frozenset((local(leaf.port), leaf.k) for leaf in wanted),
            frozenset(
                map(str, map(local, (Port("skip", skip) for skip in stage.skips_out)))
            ),
        )
        if key not in self._found:
            made = self.cut(stage, given, wanted, None)
            self._found[key] = (
                made,
                {local(port): shape for port, shape in made.joint.flat.out.items()},
            )
        made, out = self._found[key]
        names = {local(Port("skip", skip)): skip for skip in stage.skips_out}
        for port, shape in out.items():
            if port.kind == "skip":
                self.skips[names[port]] = shape
        self.at.append(out[Y])
        # The reach of the layer that was traced first, in this one's names.
        theirs = _local(made.joint.flat.stage)
        reached = {
            (theirs(leaf.port), leaf.k): yes for leaf, yes in made.joint.reach.items()
        }
        for (port, n), yes in reached.items():
            at = Port("x", k + 1) if port == Y else Port("skip", names[port])
            self._reach[at, n] = yes
        return Step(key, given, wanted, made)

    def given(self, stage: Stage) -> dict[Port, Shape]:
        """The shapes of what a stage takes, its first layer being the next of the walk
        or an earlier one.
        """
        given = {Port("params", n): self.params[n] for n in stage.params}
        given[X] = self.at[stage.span.start]
        given |= {Port("skip", skip): self.skips[skip] for skip in stage.skips_in}
        for port in stage.call_inputs:
            if port != X:
                given[port] = self.needs[port.kind]
        given |= {Port("state", n): self.states[n] for n in stage.stateful}
        if stage.asks("key"):
            number = Shape.of(np.uint32(0))
            given[INDEX] = number
            given |= {Port("number", n): number for n in stage.keyed}
        return given

    def _wanted(self, given: Mapping[Port, Shape]) -> frozenset[Leaf]:
        here = len(self.at) - 1

        def asked(port: Port, n: int) -> bool:
            if port.kind in ("x", "skip"):
                return self._reach.get(
                    (Port("x", here) if port == X else port, n), False
                )
            return port.kind == "params"

        return frozenset(
            Leaf(port, n)
            for port, shape in given.items()
            for n, a in enumerate(shape.leaves)
            if is_inexact(a) and asked(port, n)
        )

    def cut(
        self,
        stage: Stage,
        given: Mapping[Port, Shape],
        wanted: frozenset[Leaf],
        remat: Remat | None,
    ) -> Cut:
        """Trace, differentiate and cut a stage."""
        flat = flatten(stage, given, loss=None, whole=frozenset(), where="")
        joint = differentiate(flat, wanted, remat)
        one = tuple((leaf, 1) for leaf in joint.cotangents)
        return Cut(joint, split_stage(joint, SplitSpec(cotangent_counts=one)))

    def recomputed(self, k: int, remat: Remat) -> Cut:
        """A layer under `jax.checkpoint`."""
        return self.cut(
            self.stages[k], self.steps[k].inputs, self.steps[k].wanted, remat
        )

    def pair(self, k: int) -> Cut:
        """Layers `k` and `k + 1` as one stage; equal pairs once for all."""
        a, b = self.steps[k], self.steps[k + 1]
        routes, layers = self.model.routes, self.model.layers
        between = tuple(
            (name, max(routes[skip_of(layers[k], name)].readers) > k + 1)
            for name in layers[k].stash
            if k + 1 in routes[skip_of(layers[k], name)].readers
        )
        lent = tuple(
            (n, owner - k)
            for n in (k, k + 1)
            for _, owner in self.model.borrows[n]
            if owner in (k, k + 1)
        )
        key = (a.key, b.key, between, lent)
        if key not in self._pairs:
            count = len(layers)
            sizes = [n for n in (k, 2, count - k - 2) if n]
            stage = cut_stages(self.model, sizes)[1 if k else 0]
            given = self.given(stage)
            wanted = frozenset(
                leaf
                for leaf in a.wanted | b.wanted
                if leaf.port in given and leaf.port != X
            )
            wanted |= {leaf for leaf in a.wanted if leaf.port == X}
            self._pairs[key] = self.cut(stage, given, wanted, None)
        return self._pairs[key]


def _local(stage: Stage) -> Callable[[Port], Port]:
    """Ports of one layer by names that do not depend on where it stands."""
    (k,) = stage.span
    layer = stage.model.layers[k]
    names: dict[Port, Port] = {
        Port(kind, k): Port(kind) for kind in ("params", "state", "number")
    }
    names |= {
        Port("params", owner): Port("params", name)
        for name, owner in stage.model.borrows[k]
    }
    names |= {
        Port("skip", skip_of(layer, n)): Port("skip", n)
        for n in (*layer.stash, *layer.pop, *layer.peek)
    }
    return lambda port: names.get(port, port)


def _comparable(layer: Any) -> Hashable:
    try:
        hash(layer)
    except TypeError:  # an unhashable function in it: equal to itself alone
        return id(layer.apply)
    return layer
