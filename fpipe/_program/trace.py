"""A stage traced and differentiated: one graph of its forward and its backward."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from fpipe._core.errors import noting
from fpipe._core.pytrees import Shape, is_inexact, pack
from fpipe._model.loss import Loss
from fpipe._model.remat import Remat
from fpipe._model.stages import Leaf, Port, Stage
from fpipe._program.graph import Graph, function, inline, is_zero, masks, trace


@dataclasses.dataclass(frozen=True, eq=False)
class FlatStage:
    """A stage as a flat function, for microbatches of one shape.

    Attributes:
        inputs: the leaves that enter, in the order of the function's arguments.
        shapes: their shapes.
        out: the shape of every port that leaves.
        outputs: the leaves that leave, in order.
        constant: the input leaves that are the same for every microbatch.
        closed: the function as a closed jaxpr.
        where: which microbatch was traced, for errors.
    """

    stage: Stage
    inputs: tuple[Leaf, ...]
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    out: Mapping[Port, Shape]
    outputs: tuple[Leaf, ...]
    constant: frozenset[Leaf]
    closed: Any
    where: str


@dataclasses.dataclass(frozen=True, eq=False)
class JointStage:
    """A stage's forward, and its backward where one is asked for, as one graph.

    Attributes:
        inputs: the graph's value of each input leaf.
        outputs: the graph's value of each output leaf.
        cotangents: output leaves that can have a cotangent, with the graph's inputs for
            them.
        gradients: input leaves whose gradient is asked for and not zero, with their
            values.
        reach: for each cotangent leaf whether any gradient depends on it.
    """

    flat: FlatStage
    graph: Graph
    inputs: Mapping[Leaf, int]
    outputs: Mapping[Leaf, int]
    cotangents: Mapping[Leaf, int]
    gradients: Mapping[Leaf, int]
    reach: Mapping[Leaf, bool]


def flatten(
    stage: Stage,
    given: Mapping[Port, Shape],
    *,
    loss: Loss | None,
    whole: frozenset[Leaf],
    where: str,
) -> FlatStage:
    """Trace the layers of a stage.

    Arguments:
        given: the shapes of its input ports.
        whole: leaves of `x`, `side` and `targets` that go whole to every microbatch.
    """
    inputs = tuple(
        Leaf(port, k) for port, shape in given.items() for k in range(len(shape.leaves))
    )
    shapes = tuple(given[leaf.port].leaves[leaf.k] for leaf in inputs)
    out: dict[Port, Shape] = {}

    def run(*values: Any) -> list[Any]:
        rest = iter(values)
        trees = {
            port: shape.spec.unpack([next(rest) for _ in shape.leaves])
            for port, shape in given.items()
        }
        made = stage.run(trees, loss, where)
        out.update({port: Shape.of(tree) for port, tree in made.items()})
        return [a for tree in made.values() for a in pack(tree)[0]]

    closed = trace(run, *shapes)
    constant = (
        frozenset(leaf for leaf in inputs if leaf.port.kind in ("params", "number"))
        | whole
    )
    outputs = tuple(
        Leaf(port, k) for port, shape in out.items() for k in range(len(shape.leaves))
    )
    return FlatStage(stage, inputs, shapes, out, outputs, constant, closed, where)


def forward_alone(flat: FlatStage) -> JointStage:
    """The graph of a stage that nothing is differentiated through."""
    graph = inline(flat.closed)
    inputs = dict(zip(flat.inputs, graph.inputs, strict=True))
    return JointStage(
        flat,
        graph,
        inputs,
        dict(zip(flat.outputs, graph.outputs, strict=True)),
        {},
        {},
        {},
    )


def differentiate(
    flat: FlatStage, wanted: frozenset[Leaf], remat: Remat | None
) -> JointStage:
    """The joint graph of a stage.

    Arguments:
        wanted: the input leaves whose gradient is asked for.
        remat: put the stage under `jax.checkpoint`, with its policy; `None`: keep
            everything.
    """
    run = function(flat.closed)
    asked = [n for n, leaf in enumerate(flat.inputs) if leaf in wanted]
    shapes = [flat.out[leaf.port].leaves[leaf.k] for leaf in flat.outputs]
    carries = [
        leaf.port.kind in ("y", "skip", "loss") and is_inexact(a)
        for leaf, a in zip(flat.outputs, shapes, strict=True)
    ]

    def split(
        chosen: Sequence[Any], values: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        merged = list(values)
        for n, v in zip(asked, chosen, strict=True):
            merged[n] = v
        results = list(zip(run(*merged), carries, strict=True))
        return [r for r, c in results if c], [r for r, c in results if not c]

    inner = split if remat is None else jax.checkpoint(split, policy=remat.policy)
    total = len(flat.inputs)

    def joint(*arguments: Any) -> list[Any]:
        values, cotangents = arguments[:total], list(arguments[total:])
        primal, pull, rest = jax.vjp(
            lambda chosen: inner(chosen, values),
            [values[n] for n in asked],
            has_aux=True,
        )
        (gradients,) = pull(cotangents)
        carried, other = iter(primal), iter(rest)
        return [next(carried) if c else next(other) for c in carries] + gradients

    carrying = [leaf for leaf, c in zip(flat.outputs, carries, strict=True) if c]
    cotangent_shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype)
        for a, c in zip(shapes, carries, strict=True)
        if c
    ]
    with (
        noting(f"in the backward of {flat.stage.described}{flat.where}"),
        _remat_advice(remat),
    ):
        graph = inline(trace(joint, *flat.shapes, *cotangent_shapes))
    cotangents = dict(zip(carrying, graph.inputs[total:], strict=True))
    late = masks(graph, {v: 1 << n for n, v in enumerate(cotangents.values())})
    found = {
        flat.inputs[n]: v
        for n, v in zip(asked, graph.outputs[len(carries) :], strict=True)
    }
    gradients = {leaf: v for leaf, v in found.items() if not is_zero(graph, v)}
    reached = 0
    for v in gradients.values():
        reached |= late.get(v, 0)
    return JointStage(
        flat,
        graph,
        dict(zip(flat.inputs, graph.inputs[:total], strict=True)),
        dict(zip(flat.outputs, graph.outputs[: len(carries)], strict=True)),
        cotangents,
        gradients,
        {leaf: bool(reached >> n & 1) for n, leaf in enumerate(carrying)},
    )


@contextlib.contextmanager
def _remat_advice(remat: Remat | None) -> Iterator[None]:
    """JAX cannot recompute some effects (`io_callback`): say what to do."""
    try:
        yield
    except NotImplementedError as error:
        if remat is not None and "checkpoint" in str(error):
            error.add_note(
                "an effect in these layers cannot be recomputed: use `Pipe(..., "
                "checkpoint='never')`"
            )
        raise
