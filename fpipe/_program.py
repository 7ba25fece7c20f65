"""A stage's programs: flat forwards and backwards, cut out of one trace.

The layers are traced once for microbatches of one shape (`flatten`). Differentiating that gives a joint graph of forward
and backward (`differentiate`), which is cut in two (`forward_and_backward`) so that the forward hands over the values
that depend on the microbatch and that the backward cannot have otherwise: no inputs, and nothing made from parameters
alone.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from fpipe import _jaxpr
from fpipe._errors import noting
from fpipe._loss import Loss
from fpipe._remat import Remat
from fpipe._stage import CONSTANT, INDEX, LOSS, Leaf, Port, Stage
from fpipe._tree import Shape, is_inexact, pack


class Ref(NamedTuple):
    """What a program takes or returns, for the plan to give it a slot.

    `in` and `out`: a leaf. `residual`: a value that a forward hands to its backward. `cotangent`: of an
    output leaf, the `n`-th of several. `gradient`: of an input leaf. `sum`: the accumulated gradient of
    an input leaf that is the same for every microbatch.
    """

    what: Literal["in", "out", "residual", "cotangent", "gradient", "sum"]
    leaf: Leaf | None = None
    n: int = 0

    def __str__(self) -> str:
        name = str(self.n) if self.leaf is None else str(self.leaf)
        return name if self.what in ("in", "out") else f"{self.what} {name}"


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function of flat arrays.

    Attributes:
        name: `stage2_F`, as it appears in profiles.
        call: the function.
        ins, outs: what it takes and returns.
        same: outputs that are another value as it is: an input, or another output. They need no slot of their own
            (`jit` would copy them).
    """

    name: str
    call: Callable[..., Sequence[Any]]
    ins: tuple[Ref, ...]
    outs: tuple[Ref, ...]
    same: Mapping[Ref, Ref]


class Window(NamedTuple):
    """A piece that a program cuts out of a whole array itself, by the microbatch's number.

    So the pieces of a batch never lie beside it, and cutting costs no dispatch of its own.

    Attributes:
        stride: rows from one piece to the next; all pieces but the last have as many.
        shape: the piece's shape; 0-d for one element.
    """

    stride: int
    shape: tuple[int, ...]

    def cut(self, whole: Any, index: Any) -> Any:
        """The piece."""
        start = index.astype(jnp.int32) * self.stride
        if not self.shape:
            return jax.lax.dynamic_index_in_dim(whole, start, keepdims=False)
        return jax.lax.dynamic_slice_in_dim(whole, start, self.shape[0])


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
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
class Joint:
    """A stage's forward, and its backward where one is asked for, as one graph.

    Attributes:
        inputs: the graph's value of each input leaf.
        outputs: the graph's value of each output leaf.
        cotangents: output leaves that can have a cotangent, with the graph's inputs for them.
        gradients: input leaves whose gradient is asked for and not zero, with their values.
        reach: for each cotangent leaf whether any gradient depends on it.
    """

    flat: Flat
    graph: _jaxpr.Graph
    inputs: Mapping[Leaf, int]
    outputs: Mapping[Leaf, int]
    cotangents: Mapping[Leaf, int]
    gradients: Mapping[Leaf, int]
    reach: Mapping[Leaf, bool]


def flatten(
    stage: Stage, given: Mapping[Port, Shape], *, train: bool, loss: Loss | None, whole: frozenset[Leaf], where: str
) -> Flat:
    """Trace the layers of a stage.

    Arguments:
        given: the shapes of its input ports.
        whole: leaves of `x`, `side` and `targets` that go whole to every microbatch.
    """
    inputs = tuple(Leaf(port, k) for port, shape in given.items() for k in range(len(shape.leaves)))
    shapes = tuple(given[leaf.port].leaves[leaf.k] for leaf in inputs)
    out: dict[Port, Shape] = {}

    def run(*values: Any) -> list[Any]:
        rest = iter(values)
        trees = {port: shape.spec.unpack([next(rest) for _ in shape.leaves]) for port, shape in given.items()}
        made = stage.run(trees, train, loss, where)
        out.update({port: Shape.of(tree) for port, tree in made.items()})
        return [a for tree in made.values() for a in pack(tree)[0]]

    closed = _jaxpr.trace(run, *shapes)
    constant = frozenset(leaf for leaf in inputs if leaf.port.kind in CONSTANT) | whole
    outputs = tuple(Leaf(port, k) for port, shape in out.items() for k in range(len(shape.leaves)))
    return Flat(stage, inputs, shapes, out, outputs, constant, closed, where)


def forward_alone(flat: Flat) -> Joint:
    """The graph of a stage that nothing is differentiated through."""
    graph = _jaxpr.inline(flat.closed)
    inputs = dict(zip(flat.inputs, graph.inputs, strict=True))
    return Joint(flat, graph, inputs, dict(zip(flat.outputs, graph.outputs, strict=True)), {}, {}, {})


def differentiate(flat: Flat, wanted: frozenset[Leaf], remat: Remat | None) -> Joint:
    """The joint graph of a stage.

    Arguments:
        wanted: the input leaves whose gradient is asked for.
        remat: put the stage under `jax.checkpoint`, with its policy; `None`: keep everything.
    """
    run = _jaxpr.function(flat.closed)
    asked = [n for n, leaf in enumerate(flat.inputs) if leaf in wanted]
    shapes = [flat.out[leaf.port].leaves[leaf.k] for leaf in flat.outputs]
    carries = [
        leaf.port.kind in ("y", "skip", "loss") and is_inexact(a) for leaf, a in zip(flat.outputs, shapes, strict=True)
    ]

    def split(chosen: Sequence[Any], values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        merged = list(values)
        for n, v in zip(asked, chosen, strict=True):
            merged[n] = v
        results = list(zip(run(*merged), carries, strict=True))
        return [r for r, c in results if c], [r for r, c in results if not c]

    inner = split if remat is None else jax.checkpoint(split, policy=remat.policy)
    total = len(flat.inputs)

    def joint(*arguments: Any) -> list[Any]:
        values, cotangents = arguments[:total], list(arguments[total:])
        primal, pull, rest = jax.vjp(lambda chosen: inner(chosen, values), [values[n] for n in asked], has_aux=True)
        (gradients,) = pull(cotangents)
        carried, other = iter(primal), iter(rest)
        return [next(carried) if c else next(other) for c in carries] + gradients

    carrying = [leaf for leaf, c in zip(flat.outputs, carries, strict=True) if c]
    cotangent_shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a, c in zip(shapes, carries, strict=True) if c]
    with noting(f"in the backward of {flat.stage.described}{flat.where}"), _remat_advice(remat):
        graph = _jaxpr.inline(_jaxpr.trace(joint, *flat.shapes, *cotangent_shapes))
    cotangents = dict(zip(carrying, graph.inputs[total:], strict=True))
    late = _jaxpr.masks(graph, {v: 1 << n for n, v in enumerate(cotangents.values())})
    found = {flat.inputs[n]: v for n, v in zip(asked, graph.outputs[len(carries) :], strict=True)}
    gradients = {leaf: v for leaf, v in found.items() if not _jaxpr.is_zero(graph, v)}
    reached = 0
    for v in gradients.values():
        reached |= late.get(v, 0)
    return Joint(
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
            error.add_note("an effect in these layers cannot be recomputed: use `Pipe(..., checkpoint='never')`")
        raise


def forward_and_backward(
    joint: Joint,
    *,
    scale: float,
    contributions: Mapping[Leaf, int],
    returned: frozenset[Leaf],
    windows: Mapping[Ref, Window],
    accumulate: bool,
) -> tuple[Program, Program | None, list[str]]:
    """Cut a stage into its two programs.

    Arguments:
        scale: the cotangent of the loss, baked into the last stage's backward.
        contributions: how many cotangents each output leaf gets (summed in the program); none is zero.
        returned: output leaves that the user gets: buffers of their own, for the user may donate them.
        windows: what the programs take whole, and cut their piece out of.
        accumulate: whether constant leaves' gradients are added to a sum that comes in.

    Returns:
        Forward, backward (`None` if no gradient is asked for), and warnings.
    """
    graph, flat = joint.graph, joint.flat
    late = _jaxpr.masks(graph, dict.fromkeys(joint.cotangents.values(), 1))
    micro = _jaxpr.masks(graph, {v: 1 for leaf, v in joint.inputs.items() if leaf not in flat.constant})
    nodes, take = _jaxpr.residuals(graph, list(joint.gradients.values()), late, micro)
    given = {v: Ref("out", leaf) for leaf, v in joint.outputs.items() if leaf not in returned}
    given |= {v: Ref("in", leaf) for leaf, v in joint.inputs.items()}
    handed = [v for v in take if v not in given and v not in set(joint.cotangents.values())]
    given |= {v: Ref("residual", n=n) for n, v in enumerate(handed)}
    warnings = [
        f"stage {flat.stage.index} keeps {graph.avals[v].str_short()} per microbatch, made from parameters alone inside a "
        "lax.scan or lax.cond; make it outside (cast the stacked parameters before the scan, for example), or use "
        "checkpoint='always'"
        for v in _weights_kept(joint, handed)
    ]
    forward = _forward(joint, handed, late, returned, windows)
    if not joint.gradients:
        return forward, None, warnings
    taken = {v: ref for v, ref in given.items() if v in take}
    return forward, _backward(joint, nodes, taken, scale, contributions, windows, accumulate), warnings


def _weights_kept(joint: Joint, handed: Sequence[int]) -> list[int]:
    """Handed-over arrays whose content comes from parameters alone: control flow is one equation, and hides it."""
    params, other = 1, 2
    kinds = {"params": params, "key": 0}
    seeds = {v: kinds.get(leaf.port.kind, other) for leaf, v in joint.inputs.items()}
    found = _jaxpr.sources(joint.graph, seeds)
    return [v for v in handed if found.get(v, 0) == params and joint.graph.avals[v].size > 1]


def _forward(
    joint: Joint,
    handed: Sequence[int],
    late: Mapping[int, int],
    returned: frozenset[Leaf],
    windows: Mapping[Ref, Window],
) -> Program:
    graph = joint.graph
    values = {Ref("out", leaf): v for leaf, v in joint.outputs.items()}
    values |= {Ref("residual", n=n): v for n, v in enumerate(handed)}
    own = [Ref("out", leaf) for leaf in joint.outputs if leaf in returned]
    known = {v: Ref("in", leaf) for leaf, v in joint.inputs.items() if Ref("in", leaf) not in windows}
    outs, same = _unrepeated({ref: v for ref, v in values.items() if ref not in own}, known)
    outs = (*outs, *own)
    wanted = [values[ref] for ref in outs]
    nodes = _jaxpr.needed(graph, wanted, effects=lambda node: not any(late.get(v) for v in node.ins))
    used = {v for node in nodes for v in node.ins} | set(wanted)
    leaves = [leaf for leaf, v in joint.inputs.items() if v in used]
    ins = _with_index([Ref("in", leaf) for leaf in leaves], windows)

    def call(*args: Any) -> list[Any]:
        values = _opened(ins, args, windows)
        return _jaxpr.evaluate(graph, nodes, {joint.inputs[leaf]: values[Ref("in", leaf)] for leaf in leaves}, wanted)

    name = f"stage{joint.flat.stage.index}_F"
    return Program(name, _jit(call, name), ins, outs, same)


def _backward(
    joint: Joint,
    nodes: Sequence[_jaxpr.Node],
    taken: Mapping[int, Ref],
    scale: float,
    contributions: Mapping[Leaf, int],
    windows: Mapping[Ref, Window],
    accumulate: bool,
) -> Program:
    graph, constant = joint.graph, joint.flat.constant
    used = {v for node in nodes for v in node.ins} | set(joint.gradients.values())
    summed = [leaf for leaf in joint.gradients if leaf in constant]
    each = {Ref("gradient", leaf): v for leaf, v in joint.gradients.items() if leaf not in constant}
    parts = {
        v: [Ref("cotangent", leaf, n) for n in range(contributions.get(leaf, 0))]
        for leaf, v in joint.cotangents.items()
        if v in used and leaf.port != LOSS
    }
    # What is a gradient and an input alike goes through as it is, except to the user, who may donate it.
    known = dict(taken) | {v: refs[0] for v, refs in parts.items() if len(refs) == 1}
    known = {v: ref for v, ref in known.items() if ref not in windows}
    inner = {ref: v for ref, v in each.items() if ref.leaf and _is_internal(joint.flat.stage, ref.leaf)}
    kept, same = _unrepeated(inner, known)
    outs = (*kept, *(ref for ref in each if ref not in inner))
    sources = [*taken.values(), *(ref for refs in parts.values() for ref in refs)]
    ins = (*_with_index(sources, windows), *(Ref("sum", leaf) for leaf in summed if accumulate))

    def call(*args: Any) -> list[Any]:
        values = _opened(ins, args, windows)
        given = {v: values[ref] for v, ref in taken.items()}
        for leaf, v in joint.cotangents.items():
            shape, refs = graph.avals[v], parts.get(v, ())
            if leaf.port == LOSS:
                given[v] = jnp.full((), scale, shape.dtype)
            elif refs:
                given[v] = sum((values[ref] for ref in refs[1:]), values[refs[0]])
            else:
                given[v] = jnp.zeros(shape.shape, shape.dtype)
        made = dict(zip(joint.gradients, _jaxpr.evaluate(graph, nodes, given, joint.gradients.values()), strict=True))
        sums = [
            values[Ref("sum", leaf)] + made[leaf].astype(values[Ref("sum", leaf)].dtype) if accumulate else made[leaf]
            for leaf in summed
        ]
        return [*(made[ref.leaf] for ref in outs if ref.leaf), *sums]

    name = f"stage{joint.flat.stage.index}_B"
    donate = tuple(n for n, ref in enumerate(ins) if ref.what == "sum")
    return Program(
        name, _jit(call, name, donate_argnums=donate), ins, (*outs, *(Ref("sum", leaf) for leaf in summed)), same
    )


INDEX_REF = Ref("in", Leaf(INDEX, 0))


def _with_index(refs: Sequence[Ref], windows: Mapping[Ref, Window]) -> tuple[Ref, ...]:
    """The refs, and the microbatch's number where something is cut by it."""
    missing = INDEX_REF not in refs and any(ref in windows for ref in refs)
    return (*refs, INDEX_REF) if missing else tuple(refs)


def _opened(ins: Sequence[Ref], args: Sequence[Any], windows: Mapping[Ref, Window]) -> dict[Ref, Any]:
    """A program's arguments by name, pieces cut out of whole arrays."""
    values = dict(zip(ins, args, strict=True))
    return {ref: windows[ref].cut(v, values[INDEX_REF]) if ref in windows else v for ref, v in values.items()}


def _is_internal(stage: Stage, leaf: Leaf) -> bool:
    """Whether an input leaf comes from another stage."""
    return leaf.port.kind == "skip" or (leaf.port.kind == "x" and stage.index > 0)


def _unrepeated(values: Mapping[Ref, int], known: Mapping[int, Ref]) -> tuple[tuple[Ref, ...], dict[Ref, Ref]]:
    """The refs whose values are new, and the others with the ref that has their value already."""
    first, outs, same = dict(known), list[Ref](), dict[Ref, Ref]()
    for ref, v in values.items():
        if v in first:
            same[ref] = first[v]
        else:
            first[v] = ref
            outs.append(ref)
    return tuple(outs), same


def _jit(call: Callable[..., Any], name: str, **options: Any) -> Callable[..., Any]:
    call.__name__ = call.__qualname__ = name
    return jax.jit(call, **options)
