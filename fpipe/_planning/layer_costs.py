"""`layer_costs`: what each layer costs for one microbatch, from shapes.

In: layers, and a batch or its shapes. Out: a `LayerCosts`. Each layer is traced and
differentiated as if it were a stage of its own (`layer_traces.py`), so that its
backward is the one that a pipe would run; its programs are then counted (`work.py`),
and what they take and return is measured in bytes. For a dense layer of width 3 on 8
rows:

    forward 144 FLOP (2 * 8 * 3 * 3)    params 36 bytes    boundary 96 bytes
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax

from fpipe._core.checks import as_compute_dtype, is_one_of
from fpipe._core.errors import shown
from fpipe._core.meshes import to_device
from fpipe._core.pytrees import (
    PyTree,
    Shape,
    is_inexact,
    map_arrays,
    nbytes,
    numbers_as_arrays,
    pack,
    strong,
    zeros,
)
from fpipe._executors.call import Args, check_chunks, check_params
from fpipe._executors.placement import Placement, over_processes
from fpipe._model.function_layers import inputs_by_layer, model_of, params_by_layer
from fpipe._model.loss import sum_dtype
from fpipe._model.microbatch import CallShapes, cut_inputs
from fpipe._model.model import Model
from fpipe._model.needs import call_needs
from fpipe._model.remat import Policy, Remat
from fpipe._model.stages import Leaf, X
from fpipe._planning.costs import LayerCosts, Sent
from fpipe._planning.layer_traces import LayerTrace, LayerTraces, bytes_of
from fpipe._planning.work import (
    TURNS,
    Counted,
    Measured,
    count,
    least,
    of_first_process,
    runs,
    transfer_launch,
)
from fpipe._program.code import Cotangent, Input, ProgramValue
from fpipe.schedules import Kind

BalanceBy: TypeAlias = Literal["flops", "bytes", "time", "memory"]
# What the work of a layer is told in. By memory alone none is looked at.
UNITS: dict[BalanceBy, str] = {
    "flops": "FLOP",
    "bytes": "byte",
    "time": "second",
    "memory": "nothing",
}

# How often a layer runs before its time counts; the first run compiles.
_WARM_UP = 2


@dataclasses.dataclass(frozen=True)
class Gauge:
    """How the work of a layer is told: see `layer_costs`.

    Attributes:
        by: `None`: by the estimate of a function's pieces, or else by FLOPs.
        together: whether all processes measure, and take what process 0 finds.
    """

    by: BalanceBy | None = None
    device: Any = None
    repeats: int = 10
    together: bool = False

    @classmethod
    def over(cls, by: BalanceBy | None, places: Sequence[Placement]) -> "Gauge":
        """For stages on some places, of one process or of several."""
        if over_processes(places):
            return cls(by, jax.local_devices()[0], together=True)
        return cls(by, places[0].device if places else None)


_DEFAULT = Gauge()


def layer_costs(
    layers: Iterable[Any],
    x: PyTree,
    *,
    by: BalanceBy | None = None,
    side: PyTree = None,
    chunks: int = 1,
    params: Sequence[PyTree] | None = None,
    checkpoint: str | Policy = "except_last",
    compute_dtype: Any = None,
    train: bool = True,
    device: Any = None,
    repeats: int = 10,
) -> LayerCosts:
    """The costs of each layer for one microbatch: work, memory and traffic.

    The costs come from shapes alone: no array is allocated and no program is compiled.
    Only `by="time"` runs the layers. Equal layers are traced once. Layers with the same
    computation are lowered, or measured, once.

    Arguments:
        layers: functions, `Layer`s, nested sequences of them, or an `fpipe.Split`, as
            for `Pipe`.
        x: a batch, or its shapes (`jax.ShapeDtypeStruct`).

    Other Arguments:
        by: the measure of work. `"flops"` and `"bytes"` (read and written) are XLA's
            counts for the lowered forward and backward. The body of a `lax.scan` counts
            as often as it runs. Work inside a foreign call, such as a Pallas kernel or
            a callback, is not counted. `"time"` is in seconds: the shortest of
            `repeats` runs on one device, after a warm-up. The layers run in turns,
            so other work of the machine slows all layers down, and not one alone. The
            host's time to launch an action is measured too (`launch`). `"memory"`
            counts no work, only memory. Default: `"flops"`; for an `fpipe.Split` its
            time, estimated from the trace as for a `Pipe`. The unit is then the FLOPs
            that a large matrix product does in that time.
        side: side inputs, or their shapes. Default: none.
        chunks: the number of microbatches that the batch is cut into, as for `Pipe`.
            Default: 1, so `x` is one microbatch.
        params: parameters of every layer, or their shapes. They are required if a layer
            has no `init`. For an `fpipe.Split` they are the function's own tree, and
            may be left out. `"time"` runs with these parameters if they are arrays.
            Otherwise, and for all other inputs, it runs with zeros.
        checkpoint, compute_dtype: as for `Pipe`.
        train: the value for layers that ask for `train`. Default `True`.
        device: the device that `"time"` runs on. Default: the first of
            `jax.local_devices()`.
        repeats: the number of runs of each layer for `"time"`. Default 10.

    Returns:
        A `LayerCosts`.

    Raises:
        ValueError: `by` is unknown. Or a layer has no `init`, and `params` is missing.

    Example:
        >>> make = lambda key, x: jnp.zeros((3, 3))
        >>> dense = fpipe.Layer(lambda w, x: x @ w, init=make)
        >>> x = jax.ShapeDtypeStruct((8, 3), jnp.float32)
        >>> costs = fpipe.layer_costs([dense, dense], x)
        >>> costs.forward, costs.params
        ((144.0, 144.0), (36, 36))
    """
    if type(repeats) is not int or repeats < 1:
        raise ValueError(f"`layer_costs(repeats={shown(repeats)})`: an int, at least 1")
    if not isinstance(device, (jax.Device, jax.sharding.Sharding, type(None))):
        raise TypeError(
            f"`layer_costs(device={shown(device)})`: a jax.Device, such as "
            "`jax.devices()[0]`"
        )
    request = cost_request(
        layers,
        x,
        by=by,
        side=side,
        chunks=chunks,
        params=params,
        checkpoint=checkpoint,
        compute_dtype=compute_dtype,
        train=train,
    )
    return costs_of(*request._replace(gauge=Gauge(by, device, repeats)))


class CostRequest(NamedTuple):
    """Checked arguments: those of `costs_of`."""

    model: Model
    args: Args
    chunks: int
    remat: Remat
    gauge: Gauge


def cost_request(
    layers: Iterable[Any],
    x: PyTree,
    *,
    by: BalanceBy | None,
    side: PyTree,
    chunks: int,
    params: Sequence[PyTree] | None,
    checkpoint: str | Policy,
    compute_dtype: Any,
    train: bool = True,
) -> CostRequest:
    """The arguments of `layer_costs`, checked."""
    if by is not None and not is_one_of(by, UNITS):
        raise ValueError(
            f"`layer_costs(by={shown(by)})`: one of {', '.join(map(repr, UNITS))}"
        )
    chunks, remat = check_chunks("layer_costs", chunks), Remat.of(checkpoint)
    dtype = as_compute_dtype("layer_costs", compute_dtype)
    model = model_of(layers, dtype)
    params = params_by_layer(layers, params)
    needs: Mapping[str, Any] = call_needs(side=side, train=train)
    x, needs = inputs_by_layer(layers, x, needs, chunks, dtype)
    args = Args(params, x, needs=needs)
    return CostRequest(model, args, chunks, remat, Gauge(by))


def costs_of(
    model: Model,
    args: Args,
    chunks: int,
    remat: Remat,
    gauge: Gauge = _DEFAULT,
) -> LayerCosts:
    """`layer_costs` of checked arguments.

    Arguments:
        args: `x`, `params` (`None`: those that `init` makes) and needs; no key and no
            step: what layers cost does not depend on them.
    """
    return costs_and_spans(model, args, chunks, remat, gauge)[0]


def costs_and_spans(
    model: Model,
    args: Args,
    chunks: int,
    remat: Remat,
    gauge: Gauge,
) -> tuple[LayerCosts, "SpanWork | None"]:
    """`costs_of`, and what measures layers that follow each other, by request; `None`
    if nothing is measured.
    """
    params = args.params
    if params is not None:
        check_params(model, params, "`layer_costs(params=...)`")
        params = tuple(map_arrays(strong, numbers_as_arrays(p)) for p in params)
    # The first microbatch stands for all. Only the last one may be smaller.
    first = CallShapes.of(args.x, args.needs, chunks).first
    traces = LayerTraces(model, *first, params)
    spans = SpanWork(traces, gauge, () if params is None else params)
    # By memory alone no work is looked at.
    work = [LayerWork(0.0, 0.0)] * len(traces.layers)
    estimate = model.estimate if gauge.by is None else None
    if estimate is not None:
        work = [LayerWork(*each) for each in estimate(*first)]
    elif gauge.by != "memory":
        each = [(k, k + 1) for k in range(len(traces.layers))]
        measured = spans.measure(each)
        work = [measured[span] for span in each]
    boundaries = _boundaries(traces)
    # A stage keeps less than its layers one by one: what a layer hands to the next is
    # often a residual of both. How much less is told from each pair of neighbours,
    # which makes it a sum over spans, as the balance needs it. Tracing every span would
    # be exact, and take as many traces as there are spans.
    residuals = []
    for k, layer in enumerate(traces.layers):
        residuals.append(layer.programs.kept_bytes(_not_kept(k)))
    shared = []
    for k in range(len(traces.layers) - 1):
        together = traces.span(k, k + 2).programs.kept_bytes(_not_kept(k))
        shared.append(residuals[k] + residuals[k + 1] - together)
    # Of boundaries there is one more than of layers: the first is the model's input.
    costs = LayerCosts(
        names=tuple(layer.name for layer in model.layers),
        forward=tuple(layer.forward for layer in work),
        backward=tuple(layer.backward for layer in work),
        unit=UNITS[gauge.by or "flops"],
        params=tuple(map(bytes_of, traces.params)),
        gradients=tuple(map(_gradient_bytes, traces.params)),
        residuals=tuple(residuals),
        shared=(*shared, 0),
        saved=_saved_bytes(traces, remat),
        boundaries=tuple(boundaries[1:]),
        inputs=boundaries[0],
        skips=_skips(traces),
        borrowed=_borrowed(traces),
        microbatches=cut_inputs(args._replace(targets=()).inputs, chunks).m,
        checkpoint=remat.option,
        launch=_launch(work, boundaries, gauge) if gauge.by == "time" else 0.0,
        estimated=estimate is not None,
    )
    return costs, spans if gauge.by == "time" else None


def _not_kept(layer: int) -> tuple[str, ...]:
    """The inputs of a layer that a microbatch does not keep: the model's input is the
    call's, and is there anyway.
    """
    return () if layer else ("x",)


def _gradient_bytes(params: Shape) -> int:
    """The bytes of gradients, in the dtype that they are summed in."""
    total = 0
    for a in params.leaves:
        if is_inexact(a):
            total += nbytes(jax.ShapeDtypeStruct(a.shape, sum_dtype(a.dtype)))
    return total


def _saved_bytes(traces: LayerTraces, remat: Remat) -> tuple[int, ...]:
    """What a layer that is recomputed keeps besides the inputs of its stage."""
    if remat.policy is None:
        # `jax.checkpoint` saves nothing but the inputs. Those of the stage are counted
        # by where it begins; a state is an input of its layer wherever that is.
        states = traces.states
        return tuple(
            bytes_of(states[k]) if k in states else 0 for k in range(len(traces.layers))
        )
    # A policy saves values inside the layer, so only a trace under `jax.checkpoint`
    # with that policy shows them.
    found: dict[Hashable, int] = {}
    for k, layer in enumerate(traces.layers):
        if layer.key not in found:
            found[layer.key] = traces.recomputed(k, remat).kept_bytes(("x", "skip"))
    return tuple(found[layer.key] for layer in traces.layers)


def _boundaries(traces: LayerTraces) -> list[int]:
    """Bytes before each layer and after the last. Of what a layer returns only what the
    next one reads is sent.
    """
    first, *between, last = traces.boundaries
    sizes = [bytes_of(first)]
    for shape, layer in zip(between, traces.layers[1:], strict=True):
        read = layer.programs.arrays_read(X)
        sizes.append(sum(nbytes(a) for n, a in enumerate(shape.leaves) if n in read))
    return [*sizes, bytes_of(last)]


def _skips(traces: LayerTraces) -> tuple[Sent, ...]:
    """The skips, array by array: each goes only to the layers that read it. Arrays of
    one skip with the same readers go together.
    """
    # A piece of a function sends all that later ones read as one skip, and each of them
    # reads its share.
    found: list[Sent] = []
    for skip, route in traces.model.routes.items():
        read = {k: traces.arrays_popped(k, skip) for k in route.readers}
        sizes: dict[tuple[int, ...], int] = {}
        for n, a in enumerate(traces.skips[skip].leaves):
            readers = tuple(k for k in route.readers if n in read[k])
            if readers:
                sizes[readers] = sizes.get(readers, 0) + nbytes(a)
        found += [
            Sent(route.maker, readers, size, str(skip))
            for readers, size in sorted(sizes.items())
        ]
    return tuple(found)


def _borrowed(traces: LayerTraces) -> tuple[Sent, ...]:
    """What layers lend, array by array: of those that nobody reads nothing is sent.
    Arrays of one owner with the same readers go together.
    """
    # A layer borrows all that another one owns, but may read one array of it: only the
    # table of an embedding, not its norm. Only what is read is sent.
    readers: dict[tuple[int, int], list[int]] = {}
    for k in range(len(traces.layers)):
        for owner, arrays in traces.arrays_borrowed(k).items():
            for n in arrays:
                readers.setdefault((owner, n), []).append(k)
    sizes: dict[tuple[int, tuple[int, ...]], int] = {}
    for (owner, n), own in readers.items():
        key = owner, tuple(own)
        sizes[key] = sizes.get(key, 0) + nbytes(traces.params[owner].leaves[n])
    return tuple(Sent(*key, size) for key, size in sorted(sizes.items()))


# --- work ---


class LayerWork(NamedTuple):
    """What a layer takes.

    Attributes:
        forward, backward: in the unit of the gauge.
        launch: seconds of the host for both programs, if they are measured.
    """

    forward: float
    backward: float
    launch: float = 0.0


# Layers that follow each other: the first one, and the one after the last.
Span: TypeAlias = tuple[int, int]


class SpanWork:
    """The work of layers, and of layers that follow each other as one stage.

    Arguments:
        params: those of all layers, or none.
    """

    def __init__(
        self, traces: LayerTraces, gauge: Gauge, params: Sequence[PyTree]
    ) -> None:
        self._traces, self._gauge, self._params = traces, gauge, params
        self._computations: dict[Hashable, Hashable] = {}
        self._counted: dict[Hashable, LayerWork] = {}
        self._timed: dict[Hashable, _Timed] = {}

    def measure(self, spans: Sequence[Span]) -> dict[Span, LayerWork]:
        """The work of some spans. Those that are equal, or different functions that
        compute the same, are counted or measured once.

        What is measured is so in turns. So no span has all of its runs at a moment when
        the machine is busy with something else. Of a span that was measured before, the
        shortest of all runs counts.
        """
        found = {span: self._computation(*span) for span in spans}
        distinct = dict.fromkeys(found.values())
        if self._gauge.by != "time":
            return {span: self._counted[computes] for span, computes in found.items()}
        turns = min(TURNS, self._gauge.repeats)
        for _ in range(turns):
            for computes in distinct:
                self._timed[computes].turn(-(-self._gauge.repeats // turns))
        work = {computes: self._timed[computes].work for computes in distinct}
        if self._gauge.together:
            work = {c: LayerWork(*of_first_process(w)) for c, w in work.items()}
        return {span: work[computes] for span, computes in found.items()}

    def _computation(self, start: int, end: int) -> Hashable:
        """What tells spans apart. Of a new one the work is counted, or what measures it
        is made.
        """
        layer = self._traces.span(start, end)
        if layer.key in self._computations:
            return self._computations[layer.key]
        # The same function written twice makes layers that are not equal. Their codes
        # are, and it is lowering and measuring that take long.
        programs = [layer.programs.program("F"), layer.programs.program("B")]
        computes = tuple(None if p is None else p[1].identity for p in programs)
        self._computations[layer.key] = computes
        if self._gauge.by == "time":
            if computes not in self._timed:
                self._timed[computes] = _Timed(layer, self._params, self._gauge)
        elif computes not in self._counted:
            by_bytes = self._gauge.by == "bytes"
            what: Counted = "bytes accessed" if by_bytes else "flops"
            forward, backward = (
                0.0 if p is None else count(p[1], what) for p in programs
            )
            self._counted[computes] = LayerWork(forward, backward)
        return computes


def _launch(
    work: Sequence[LayerWork], boundaries: Sequence[int], gauge: Gauge
) -> float:
    """The seconds of the host for an action, in the mean: those of its program, and of
    the transfer of what it hands on.
    """
    # A program takes as long to launch whatever is in it, so that a layer stands for a
    # stage. Of transfers too: a boundary in the middle stands for all.
    programs = sum(layer.launch for layer in work) / (2 * len(work))
    source = jax.local_devices()[0] if gauge.device is None else gauge.device
    others = [device for device in jax.local_devices() if device != source]
    handed = boundaries[len(boundaries) // 2]
    if others and handed and isinstance(source, jax.Device):
        places = Placement.of(source), Placement.of(others[0])
        programs += transfer_launch(handed, *places)
    return of_first_process([programs])[0] if gauge.together else programs


class _Timed:
    """The forward and the backward of some layers, which run in turns.

    What they take and make is on the device during a turn only, because there may be no
    room for several stages.

    Arguments:
        params: those of all layers, or none. What is no array is zeros.
    """

    def __init__(
        self, layer: LayerTrace, params: Sequence[PyTree], gauge: Gauge
    ) -> None:
        self._layer, self._params = layer, params
        given = gauge.device
        self._device = jax.local_devices()[0] if given is None else given
        # Under `jax.jit`: what the first turn compiles is there in the next one.
        self._calls: dict[Kind, Callable[..., Sequence[Any]]] = {}
        self._found: dict[Kind, list[Measured]] = {"F": [], "B": []}

    @property
    def work(self) -> LayerWork:
        """The shortest of all runs so far."""
        each = [least(times) if times else _NOTHING for times in self._found.values()]
        forward, backward = each
        launch = forward.launch + backward.launch
        return LayerWork(forward.seconds, backward.seconds, launch)

    def turn(self, repeats: int) -> None:
        """Run both programs so often, after some runs that do not count."""
        # Everything that the programs may take, by name: the inputs now, what the
        # forward makes when it has run.
        known: dict[ProgramValue, Any] = {}
        for port, shape in self._layer.inputs.items():
            arrays = [zeros(a) for a in shape.leaves]
            # Zeros may take another time than numbers, in a sparse layer for example,
            # so real parameters are used where there are any.
            if port.kind == "params" and self._params:
                given = pack(self._params[port.of])[0]
                if not any(isinstance(a, jax.ShapeDtypeStruct) for a in given):
                    arrays = given
            placed = to_device(arrays, self._device)
            known |= {Input(Leaf(port, n)): a for n, a in enumerate(placed)}
        for kind in self._found:
            self._run(kind, known, repeats)

    def _run(self, kind: Kind, known: dict[ProgramValue, Any], repeats: int) -> None:
        """Measure one of the programs; what it makes is put into `known`."""
        programs = self._layer.programs
        found = programs.program(kind)
        if found is None:
            return
        program, code = found
        for value in program.ins:
            if isinstance(value, Cotangent):
                port, k = value.leaf
                shape = programs.joint.flat.out[port].leaves[k]
                known[value] = jax.device_put(zeros(shape), self._device)
        if kind not in self._calls:
            self._calls[kind] = code.compile()
        call = self._calls[kind]
        arguments = [known[value] for value in program.ins]
        self._found[kind].append(
            least(runs(call, lambda: arguments, _WARM_UP, repeats))
        )
        # The backward takes what the forward has made.
        known |= dict(zip(program.outs, call(*arguments), strict=True))
        for value, other in program.aliases.items():
            if other in known:
                known[value] = known[other]


# What a program takes that is not there.
_NOTHING = Measured(0.0, 0.0)
