"""A stage traced and differentiated: one graph of its forward and its backward.

`trace_stage` calls the layers, once for each shape of microbatch; `differentiate` adds
the backward. For a stage `y = tanh(x @ w)` whose input gradient is asked for too:

    FlatStage                         JointStage
    inputs    params 1[0], x[0]       inputs      {params 1[0]: 0, x[0]: 1}
    outputs   y[0]                    cotangents  {y[0]: 2}
    constant  params 1[0]             outputs     {y[0]: 4}
                                      gradients   {params 1[0]: 11, x[0]: 12}

The user's Python runs once: the backward is made by differentiating the jaxpr, not by
calling the layers again under `jax.vjp`.

The numbers are values of the joint graph. Which part of it runs in the forward, and
which in the backward, is not decided here.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from fpipe._core.errors import noting
from fpipe._core.pytrees import Shape, is_inexact, off_host, pack
from fpipe._model.loss import Loss
from fpipe._model.remat import Remat
from fpipe._model.stages import Leaf, Port, Stage
from fpipe._program.graph import Graph, ancestors, as_function, inline, is_zero, trace


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
    """

    stage: Stage
    inputs: tuple[Leaf, ...]
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    out: Mapping[Port, Shape]
    outputs: tuple[Leaf, ...]
    constant: frozenset[Leaf]
    closed: Any


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


def trace_stage(
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
        whole: leaves of what the call gives that go whole to every microbatch.
        where: which stage of the pipe and which microbatch it is, for errors.
    """
    inputs = tuple(_leaves(given))
    shapes = tuple(given[leaf.port].leaves[leaf.number] for leaf in inputs)
    out: dict[Port, Shape] = {}

    # The trees of what comes out are only known when the layers have run, so they are
    # noted on the way.
    def run(*values: Any) -> list[Any]:
        rest = iter(values)
        trees = {
            port: shape.spec.unpack([next(rest) for _ in shape.leaves])
            for port, shape in given.items()
        }
        # Everything that leaves a stage is on devices, because it is sent, or kept next
        # to what was sent.
        results = off_host(stage.run(trees, loss, where))
        out.update({port: Shape.of(tree) for port, tree in results.items()})
        return [array for tree in results.values() for array in pack(tree)[0]]

    closed = trace(run, *shapes)
    # A `number` is a layer's own, for its keys: equal layers have the same code, and
    # take their number as an argument.
    of_model = {leaf for leaf in inputs if leaf.port.kind in ("params", "number")}
    outputs = tuple(_leaves(out))
    constant = whole.union(of_model)
    return FlatStage(stage, inputs, shapes, out, outputs, constant, closed)


def _leaves(ports: Mapping[Port, Shape]) -> Iterator[Leaf]:
    """A name for each array, in the order in which they are flattened."""
    for port, shape in ports.items():
        for k in range(len(shape.leaves)):
            yield Leaf(port, k)


def forward_only(flat: FlatStage) -> JointStage:
    """The graph of a stage that nothing is differentiated through."""
    graph = inline(flat.closed)
    return JointStage(
        flat,
        graph,
        inputs=dict(zip(flat.inputs, graph.inputs, strict=True)),
        outputs=dict(zip(flat.outputs, graph.outputs, strict=True)),
        cotangents={},
        gradients={},
        reach={},
    )


def differentiate(
    flat: FlatStage, wanted: frozenset[Leaf], remat: Remat | None, *, where: str
) -> JointStage:
    """The joint graph of a stage.

    Arguments:
        wanted: the input leaves whose gradient is asked for.
        remat: put the stage under `jax.checkpoint`, with its policy; `None`: keep
            everything.
        where: as for `trace_stage`. A trace may come from another pipe that cuts its
            stages elsewhere, so it is not kept there.
    """
    # What is differentiated, and by which outputs. States and integers have no
    # cotangent: they are auxiliary results.
    run = as_function(flat.closed)
    asked = [n for n, leaf in enumerate(flat.inputs) if leaf in wanted]
    out_shapes = [flat.out[leaf.port].leaves[leaf.number] for leaf in flat.outputs]
    has_cotangent = [
        leaf.port.kind in ("y", "skip", "loss") and is_inexact(shape)
        for leaf, shape in zip(flat.outputs, out_shapes, strict=True)
    ]

    def split(
        chosen: Sequence[Any], values: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """The stage as a function of what is asked for; outputs without cotangents are
        aside.
        """
        merged = list(values)
        for n, v in zip(asked, chosen, strict=True):
            merged[n] = v
        results = list(zip(run(*merged), has_cotangent, strict=True))
        return [r for r, yes in results if yes], [r for r, yes in results if not yes]

    # The whole stage is one checkpoint. What the backward needs of the forward is then
    # what the policy saves; the rest it recomputes, in one equation.
    inner = split if remat is None else jax.checkpoint(split, policy=remat.policy)
    count = len(flat.inputs)

    # Forward and backward are one trace. Two traces would not show which values of the
    # forward the backward reads. A function that `jax.vjp` returns is a pytree of
    # residuals; the weights, and casts of them, are among these, and `jit` copies what
    # it returns: that would be a copy of the weights for each microbatch.
    def joint(*arguments: Any) -> list[Any]:
        values = arguments[:count]
        primal, pull_back, rest = jax.vjp(
            lambda chosen: inner(chosen, values),
            [values[n] for n in asked],
            has_aux=True,
        )
        (gradients,) = pull_back(list(arguments[count:]))
        primal, rest = iter(primal), iter(rest)
        return [
            next(primal) if yes else next(rest) for yes in has_cotangent
        ] + gradients

    # The cotangents are arguments after the inputs, one for each output that has one.
    carrying = [
        (leaf, jax.ShapeDtypeStruct(shape.shape, shape.dtype))
        for leaf, shape, yes in zip(
            flat.outputs, out_shapes, has_cotangent, strict=True
        )
        if yes
    ]
    with (
        noting(f"in the backward of {flat.stage.described}{where}"),
        _remat_advice(remat),
    ):
        closed = trace(joint, *flat.shapes, *(shape for _, shape in carrying))
    # Back to names: first the outputs, then the gradients, in the order of `joint`.
    graph = inline(closed)
    cotangents = {
        leaf: v for (leaf, _), v in zip(carrying, graph.inputs[count:], strict=True)
    }
    made = graph.outputs[len(flat.outputs) :]
    gradients = {
        flat.inputs[n]: v
        for n, v in zip(asked, made, strict=True)
        if not is_zero(graph, v)
    }
    # A cotangent that no gradient depends on is not asked for, so that later stages do
    # not make it.
    reached = ancestors(graph, gradients.values())
    return JointStage(
        flat,
        graph,
        inputs=dict(zip(flat.inputs, graph.inputs[:count], strict=True)),
        outputs=dict(
            zip(flat.outputs, graph.outputs[: len(flat.outputs)], strict=True)
        ),
        cotangents=cotangents,
        gradients=gradients,
        reach={leaf: v in reached for leaf, v in cotangents.items()},
    )


@contextlib.contextmanager
def _remat_advice(remat: Remat | None) -> Iterator[None]:
    """JAX cannot recompute some effects (`io_callback`): say what to do.

    Nor can it save complex values. Its own exception goes on, with a note: the
    diagnosis is JAX's, the cure ours.
    """
    try:
        yield
    except NotImplementedError as error:
        if remat is not None and "checkpoint" in str(error):
            error.add_note(
                "an effect in these layers cannot be recomputed: use `Pipe(..., "
                "checkpoint='never')`"
            )
        raise
    except TypeError as error:
        # What a policy saves goes through an operation of JAX that takes no complex
        # numbers.
        if remat is not None and remat.policy and "reduce_precision" in str(error):
            error.add_note(
                f"checkpoint={remat.name} saves a complex value, which "
                "`jax.checkpoint` cannot: use checkpoint='always' or 'never', or a "
                "policy that does not save it, such as "
                "`jax.checkpoint_policies.save_only_these_names(...)` of real values"
            )
        raise
