"""Stages: a span of layers as flat programs, one forward and one backward for each kind of microbatch.

Everything that enters or leaves a stage is a *port*: the parameters of a layer (its own or a borrowed
one), the boundary, a skip, side inputs, targets, state, the key. A port is a pytree; its arrays are its
*leaves*, and programs take and return leaves.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from fpipe import _jaxpr
from fpipe._model import Model, Skip
from fpipe._tree import PyTree, Spec, aval, describe, is_inexact, pack

Reduction: TypeAlias = Literal["mean", "sum", "weighted"]


class Port(NamedTuple):
    """The name of what enters or leaves a stage; `of` is a layer or a skip where there are several."""

    kind: Literal["params", "x", "y", "skip", "side", "targets", "state", "key", "index", "loss", "weight", "aux"]
    of: Any = None

    def __str__(self) -> str:
        return self.kind if self.of is None else f"{self.kind} {self.of}"


class Leaf(NamedTuple):
    """An array of a port."""

    port: Port
    k: int


X, Y, SIDE, TARGETS, KEY, INDEX = (
    Port("x"),
    Port("y"),
    Port("side"),
    Port("targets"),
    Port("key"),
    Port("index"),
)
LOSS, WEIGHT, AUX = Port("loss"), Port("weight"), Port("aux")

# Ports that are the same for every microbatch of a call.
CONSTANT = ("params", "key")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A port's structure and its leaves' shapes."""

    spec: Spec
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, tree: PyTree) -> "Shape":
        """The shape of a pytree."""
        arrays, spec = pack(tree)
        return cls(spec, tuple(map(aval, arrays)))


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss on the last stage: `fn(y, *targets)`."""

    fn: Callable[..., Any]
    has_aux: bool
    reduction: Reduction

    def __call__(self, y: PyTree, targets: Sequence[PyTree]) -> tuple[jax.Array, jax.Array | None, PyTree]:
        """`(loss, weight, aux)` of one microbatch, checked."""
        result, aux = self.fn(y, *targets), None
        if self.has_aux:
            if not isinstance(result, tuple) or len(result) != 2:
                raise TypeError(f"`loss_fn` with has_aux=True returns `(loss, aux)`, got {describe(result)}")
            result, aux = result
        weight = None
        if self.reduction == "weighted":
            if not isinstance(result, tuple) or len(result) != 2:
                raise TypeError(f'`loss_fn` with reduction="weighted" returns `(sum, weight)`, got {describe(result)}')
            result, weight = result
            weight = jax.lax.stop_gradient(_scalar(weight, "weight"))
        return _scalar(result, "loss"), weight, aux


def _scalar(value: Any, what: str) -> jax.Array:
    if not hasattr(value, "shape") and not isinstance(value, (int, float)):
        hint = "; with an auxiliary output say has_aux=True" if isinstance(value, tuple) else ""
        raise TypeError(f"`loss_fn` must return a scalar {what}, got {describe(value)}{hint}")
    value = jnp.asarray(value)
    if value.shape:
        raise TypeError(
            f"`loss_fn` must return a scalar {what}, got {describe(value)}: reduce it, with its mean for example"
        )
    if not is_inexact(value):
        value = value.astype(jnp.float32)
    return value


@dataclasses.dataclass(frozen=True)
class Stage:
    """A span of layers on one placement.

    Arguments:
        model: the whole model.
        index: `s`.
        span: its layers.
        skips_in, skips_out: the skips that it takes from earlier stages, and those that later ones read.
        last: whether its `y` is the model's.
    """

    model: Model
    index: int
    span: range
    skips_in: tuple[Skip, ...]
    skips_out: tuple[Skip, ...]
    last: bool

    @property
    def params(self) -> tuple[int, ...]:
        """The layers whose parameters it uses: its own, then borrowed ones."""
        borrowed = {o for k in self.span for _, o in self.model.borrows[k]} - set(self.span)
        return (*self.span, *sorted(borrowed))

    def asks(self, need: str) -> bool:
        """Whether any of its layers declares a need."""
        return any(k in self.span for k in self.model.needing(need))

    @property
    def stateful(self) -> tuple[int, ...]:
        """Its layers with state."""
        return tuple(k for k in self.model.stateful if k in self.span)

    def run(self, given: Mapping[Port, PyTree], train: bool, loss: Loss | None, where: str) -> dict[Port, PyTree]:
        """The stage as a function from ports to ports."""
        y, skips, state = self.model.apply(
            self.span,
            {k: given[Port("params", k)] for k in self.params},
            given[X],
            skips={skip: given[Port("skip", skip)] for skip in self.skips_in},
            state={k: given[Port("state", k)] for k in self.stateful},
            side=given.get(SIDE),
            key=given.get(KEY),
            microbatch=given.get(INDEX, 0),
            train=train,
            where=where,
        )
        out = {Port("skip", skip): skips[skip] for skip in self.skips_out}
        out |= {Port("state", k): state[k] for k in self.stateful}
        if self.last and loss is not None:
            value, weight, aux = loss(y, given[TARGETS])
            out |= {LOSS: value, AUX: aux} | ({} if weight is None else {WEIGHT: weight})
        else:
            if not pack(y)[0]:
                raise TypeError(
                    f"stage {self.index} ends with layer {self.span[-1]} {self.model.layers[self.span[-1]].name!r}, "
                    f"which returned {describe(y)}: a boundary needs at least one array"
                )
            out[Y] = y
        return out


def stages_of(model: Model, balance: Sequence[int]) -> tuple[Stage, ...]:
    """Cut a model into stages of `balance` layers each."""
    ends = [sum(balance[: s + 1]) for s in range(len(balance))]
    at = {k: s for s, end in enumerate(ends) for k in range(end - balance[s], end)}
    stages = []
    for s, end in enumerate(ends):
        routes = model.routes.items()
        skips_in = tuple(k for k, r in routes if at[r.stash] < s and any(at[x] == s for x in r.readers))
        skips_out = tuple(k for k, r in routes if at[r.stash] == s and any(at[x] > s for x in r.readers))
        stages.append(Stage(model, s, range(end - balance[s], end), skips_in, skips_out, s == len(ends) - 1))
    return tuple(stages)


# --- programs ---------------------------------------------------------------------------------------


class Ref(NamedTuple):
    """What a program takes or returns, for the plan to give it a slot.

    `in` and `out`: a leaf. `residual`: a value that a forward hands to its backward. `cotangent`: of an
    output leaf, the `n`-th of several. `gradient`: of an input leaf. `sum`: the accumulated gradient of
    an input leaf that is the same for every microbatch.
    """

    what: Literal["in", "out", "residual", "cotangent", "gradient", "sum"]
    leaf: Leaf | None = None
    n: int = 0


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function of flat arrays."""

    name: str
    call: Callable[..., Sequence[Any]]
    ins: tuple[Ref, ...]
    outs: tuple[Ref, ...]


@dataclasses.dataclass(frozen=True)
class Traced:
    """A stage traced for microbatches of one shape: forward, and backward too where it is asked for.

    Attributes:
        inputs: the leaves that enter, in the order of the graph's inputs.
        out: the shape of every port that leaves.
        outputs: the leaves that leave, with their values in the graph.
        cotangents: output leaves that can have a cotangent, with the graph's inputs for them.
        gradients: input leaves whose gradient is asked for and not zero, with their values.
        reach: for each cotangent leaf whether any gradient depends on it.
        constant: the input leaves that are the same for every microbatch.
    """

    stage: Stage
    graph: _jaxpr.Graph
    inputs: tuple[Leaf, ...]
    out: Mapping[Port, Shape]
    outputs: Mapping[Leaf, int]
    cotangents: Mapping[Leaf, int]
    gradients: Mapping[Leaf, int]
    reach: Mapping[Leaf, bool]
    constant: frozenset[Leaf]

    @property
    def value_of(self) -> dict[Leaf, int]:
        """The graph's number of each input leaf."""
        return dict(zip(self.inputs, self.graph.inputs, strict=False))


def trace_stage(
    stage: Stage,
    given: Mapping[Port, Shape],
    *,
    train: bool,
    loss: Loss | None,
    where: str,
    wanted: frozenset[Leaf] | None = None,
    whole: frozenset[Leaf] = frozenset(),
    remat: Callable[..., Any] | bool = False,
) -> Traced:
    """Trace a stage.

    Arguments:
        given: the shapes of its input ports.
        wanted: input leaves whose gradient is asked for; `None` traces the forward alone.
        whole: leaves of `x`, `side` and `targets` that go whole to every microbatch.
        remat: `True`, or a policy: put the stage under `jax.checkpoint`.
    """
    inputs = tuple(Leaf(port, k) for port, shape in given.items() for k in range(len(shape.leaves)))
    shapes = [given[leaf.port].leaves[leaf.k] for leaf in inputs]
    out: dict[Port, Shape] = {}

    def run(values: Sequence[Any]) -> list[Any]:
        """Flat inputs to flat outputs."""
        rest = iter(values)
        trees = {port: s.spec.unpack([next(rest) for _ in s.leaves]) for port, s in given.items()}
        packed = {port: pack(tree) for port, tree in stage.run(trees, train, loss, where).items()}
        out.clear()
        for port, (arrays, spec) in packed.items():
            out[port] = Shape(spec, tuple(map(aval, arrays)))
        return [a for arrays, _ in packed.values() for a in arrays]

    constant = frozenset(leaf for leaf in inputs if leaf.port.kind in CONSTANT) | whole
    if wanted is None:
        graph = _jaxpr.trace(lambda *values: run(values), *shapes)
        leaves = [Leaf(port, k) for port, s in out.items() for k in range(len(s.leaves))]
        return Traced(stage, graph, inputs, out, dict(zip(leaves, graph.outputs, strict=True)), {}, {}, {}, constant)

    asked = [n for n, leaf in enumerate(inputs) if leaf in wanted]
    jax.eval_shape(lambda *values: run(values), *shapes)
    leaves = [Leaf(port, k) for port, s in out.items() for k in range(len(s.leaves))]
    carries = [leaf.port.kind in ("y", "skip", "loss") and is_inexact(out[leaf.port].leaves[leaf.k]) for leaf in leaves]

    def joint(values: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        def f(chosen: Sequence[Any], values: Sequence[Any]) -> Any:
            merged = list(values)
            for n, v in zip(asked, chosen, strict=True):
                merged[n] = v
            results = run(merged)
            carrying = [r for r, c in zip(results, carries, strict=True) if c]
            return carrying, [r for r, c in zip(results, carries, strict=True) if not c]

        if remat is not False:
            f = jax.checkpoint(f, policy=None if remat is True else remat)
        primal, pull, rest = jax.vjp(lambda chosen: f(chosen, values), [values[n] for n in asked], has_aux=True)
        (gradients,) = pull(list(cotangents))
        one, other = iter(primal), iter(rest)
        return [next(one) if c else next(other) for c in carries] + list(gradients)

    cotangent_shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype)
        for a, c in zip([out[leaf.port].leaves[leaf.k] for leaf in leaves], carries, strict=True)
        if c
    ]
    total = len(shapes)
    graph = _jaxpr.trace(lambda *values: joint(values[:total], values[total:]), *shapes, *cotangent_shapes)
    carrying = [leaf for leaf, c in zip(leaves, carries, strict=True) if c]
    cotangents = dict(zip(carrying, graph.inputs[total:], strict=True))
    late = _jaxpr.masks(graph, {v: 1 << n for n, v in enumerate(cotangents.values())})
    gradients, reached = {}, 0
    for n, v in zip(asked, graph.outputs[len(leaves) :], strict=True):
        if not _jaxpr.is_zero(graph, v):
            gradients[inputs[n]] = v
            reached |= late.get(v, 0)
    reach = {leaf: bool(reached >> n & 1) for n, leaf in enumerate(carrying)}
    outputs = dict(zip(leaves, graph.outputs, strict=False))
    return Traced(stage, graph, inputs, out, outputs, cotangents, gradients, reach, constant)


def forward_and_backward(
    traced: Traced,
    *,
    scale: float = 1.0,
    contributions: Mapping[Leaf, int] | None = None,
    accumulate: bool = False,
) -> tuple[Program, Program | None, list[str]]:
    """Cut a traced stage into its two programs.

    Arguments:
        scale: the cotangent of the loss, baked into the last stage's backward.
        contributions: how many cotangents each output leaf gets (summed in the program); none is zero.
        accumulate: whether constant leaves' gradients are added to a sum that comes in.

    Returns:
        Forward, backward (`None` if no gradient is asked for), and warnings.
    """
    graph, number = traced.graph, traced.value_of
    seeds = dict.fromkeys(traced.cotangents.values(), 1)
    late = _jaxpr.masks(graph, seeds)
    micro = _jaxpr.masks(graph, {v: 1 for leaf, v in number.items() if leaf not in traced.constant})
    back, take = _jaxpr.residuals(graph, list(traced.gradients.values()), late, micro)
    of_input = {v: leaf for leaf, v in number.items()}
    of_output = {v: leaf for leaf, v in traced.outputs.items()}
    cotangent_of = {v: leaf for leaf, v in traced.cotangents.items()}
    refs: dict[int, Ref] = {}
    handed: list[int] = []
    for v in take:
        if v in of_input:
            refs[v] = Ref("in", of_input[v])
        elif v in of_output:
            refs[v] = Ref("out", of_output[v])
        elif v not in cotangent_of:
            refs[v] = Ref("residual", n=len(handed))
            handed.append(v)
    warnings = [
        f"stage {traced.stage.index} keeps {graph.avals[v].str_short()} per microbatch, made from parameters alone inside a "
        "lax.scan; make it before the scan (cast the stacked parameters outside), or use checkpoint='always'"
        for v in _jaxpr.hidden_constants(graph, handed, micro)
    ]
    forward = _forward(traced, handed, late)
    if not traced.gradients:
        return forward, None, warnings
    return forward, _backward(traced, back, refs, scale, contributions or {}, accumulate), warnings


def _forward(traced: Traced, handed: Sequence[int], late: Mapping[int, int]) -> Program:
    graph, number = traced.graph, traced.value_of
    wanted = [*traced.outputs.values(), *handed]
    nodes = _jaxpr.needed(graph, wanted, effects=lambda node: not any(late.get(v) for v in node.ins))
    used = {v for node in nodes for v in node.ins} | set(wanted)
    leaves = [leaf for leaf in traced.inputs if number[leaf] in used]

    def call(*args: Any) -> Any:
        return _jaxpr.evaluate(graph, nodes, dict(zip((number[leaf] for leaf in leaves), args, strict=True)), wanted)

    outs = [Ref("out", leaf) for leaf in traced.outputs] + [Ref("residual", n=n) for n in range(len(handed))]
    name = f"stage{traced.stage.index}_F"
    return Program(name, jax.jit(_named(call, name)), tuple(Ref("in", leaf) for leaf in leaves), tuple(outs))


def _backward(
    traced: Traced,
    nodes: Sequence[_jaxpr.Node],
    refs: Mapping[int, Ref],
    scale: float,
    contributions: Mapping[Leaf, int],
    accumulate: bool,
) -> Program:
    graph = traced.graph
    used = {v for node in nodes for v in node.ins} | set(traced.gradients.values())
    cotangents = {leaf: v for leaf, v in traced.cotangents.items() if v in used and leaf.port != LOSS}
    summed = [leaf for leaf in traced.gradients if leaf in traced.constant]
    each = [leaf for leaf in traced.gradients if leaf not in traced.constant]
    ins = [
        *refs.values(),
        *(Ref("cotangent", leaf, n) for leaf in cotangents for n in range(contributions.get(leaf, 0))),
        *(Ref("sum", leaf) for leaf in summed if accumulate),
    ]

    def call(*args: Any) -> Any:
        values = dict(zip(ins, args, strict=True))
        given = {v: values[ref] for v, ref in refs.items()}
        for leaf, v in traced.cotangents.items():
            shape = graph.avals[v]
            if leaf.port == LOSS:
                given[v] = jnp.full((), scale, shape.dtype)
            else:
                parts = [values[Ref("cotangent", leaf, n)] for n in range(contributions.get(leaf, 0))]
                given[v] = sum(parts[1:], parts[0]) if parts else jnp.zeros(shape.shape, shape.dtype)
        made = dict(zip(traced.gradients, _jaxpr.evaluate(graph, nodes, given, traced.gradients.values()), strict=True))
        sums = [
            values[Ref("sum", leaf)] + made[leaf].astype(values[Ref("sum", leaf)].dtype) if accumulate else made[leaf]
            for leaf in summed
        ]
        return [*(made[leaf] for leaf in each), *sums]

    outs = [Ref("gradient", leaf) for leaf in each] + [Ref("sum", leaf) for leaf in summed]
    donate = tuple(n for n, ref in enumerate(ins) if ref.what == "sum")
    name = f"stage{traced.stage.index}_B"
    return Program(name, jax.jit(_named(call, name), donate_argnums=donate), tuple(ins), tuple(outs))


def _named(f: Callable[..., Any], name: str) -> Callable[..., Any]:
    f.__name__ = f.__qualname__ = name
    return f


def sum_dtype(dtype: Any) -> Any:
    """The dtype in which gradients are accumulated: float32 for the 16-bit floats."""
    return jnp.float32 if dtype in (jnp.bfloat16, jnp.float16) else dtype
