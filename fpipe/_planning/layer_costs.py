"""`layer_costs`: what each layer costs for one microbatch, from shapes.

In: layers, and a batch or its shapes. Out: a `LayerCosts`. Each layer is traced and
differentiated as if it were a stage of its own (`layer_traces.py`), so that its
backward is the one that a pipe would run; its programs are then counted (`work.py`),
and what they take and return is measured in bytes. For a dense layer of width 3 on 8
rows:

    forward 144 FLOP (2 * 8 * 3 * 3)    params 36 bytes    boundary 96 bytes
"""

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
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
from fpipe._model.stages import Leaf
from fpipe._planning.costs import LayerCosts, Sent
from fpipe._planning.layer_traces import LayerTrace, LayerTraces, bytes_of
from fpipe._planning.work import (
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
        together: whether all processes measure, and take what process 0 finds.
    """

    by: BalanceBy = "flops"
    device: Any = None
    repeats: int = 10
    together: bool = False

    @classmethod
    def over(cls, by: BalanceBy, places: Sequence[Placement]) -> "Gauge":
        """For stages on some places, of one process or of several."""
        if over_processes(places):
            return cls(by, jax.local_devices()[0], together=True)
        return cls(by, places[0].device if places else None)


_FLOPS = Gauge()


def layer_costs(
    layers: Iterable[Any],
    x: PyTree,
    *,
    by: BalanceBy = "flops",
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
        by: the measure of work. `"flops"` (default) and `"bytes"` (read and written)
            are XLA's counts for the lowered forward and backward. The body of a
            `lax.scan` counts as often as it runs. Work inside a foreign call, such as a
            Pallas kernel or a callback, is not counted. `"time"` is in seconds: the
            shortest of `repeats` runs on one device, after a warm-up. The host's time
            to launch an action is measured too (`launch`). `"memory"` counts no work,
            only memory.
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
    by: BalanceBy,
    side: PyTree,
    chunks: int,
    params: Sequence[PyTree] | None,
    checkpoint: str | Policy,
    compute_dtype: Any,
    train: bool = True,
) -> CostRequest:
    """The arguments of `layer_costs`, checked."""
    if not is_one_of(by, UNITS):
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
    gauge: Gauge = _FLOPS,
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
    if gauge.by != "memory":
        work = [spans.work(k, k + 1) for k in range(len(traces.layers))]
    boundaries = list(map(bytes_of, traces.boundaries))
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
        unit=UNITS[gauge.by],
        params=tuple(map(bytes_of, traces.params)),
        gradients=tuple(map(_gradient_bytes, traces.params)),
        residuals=tuple(residuals),
        shared=(*shared, 0),
        saved=_saved_bytes(traces, remat),
        boundaries=tuple(boundaries[1:]),
        inputs=boundaries[0],
        skips=tuple(
            Sent(route.maker, route.readers, bytes_of(traces.skips[skip]))
            for skip, route in model.routes.items()
        ),
        borrowed=_borrowed(traces),
        microbatches=cut_inputs(args._replace(targets=()).inputs, chunks).m,
        checkpoint=remat.option,
        launch=_launch(work, boundaries, gauge) if gauge.by == "time" else 0.0,
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


class SpanWork:
    """The work of layers, and of layers that follow each other as one stage.

    Arguments:
        params: those of all layers, or none.
    """

    def __init__(
        self, traces: LayerTraces, gauge: Gauge, params: Sequence[PyTree]
    ) -> None:
        self._traces, self._gauge, self._params = traces, gauge, params
        self._by_key: dict[Hashable, LayerWork] = {}
        self._by_computation: dict[Hashable, LayerWork] = {}

    def work(self, start: int, end: int) -> LayerWork:
        """The work of layers `start` to `end - 1`. Layers that are equal, or different
        functions that compute the same, are counted or measured once.
        """
        layer = self._traces.span(start, end)
        if layer.key in self._by_key:
            return self._by_key[layer.key]
        # The same function written twice makes layers that are not equal. Their codes
        # are, and it is lowering and measuring that take long.
        programs = [layer.programs.program("F"), layer.programs.program("B")]
        computes = tuple(None if p is None else p[1].identity for p in programs)
        if computes not in self._by_computation:
            if self._gauge.by == "time":
                found = _seconds(layer, self._params, self._gauge)
                if self._gauge.together:
                    found = LayerWork(*of_first_process(found))
            else:
                by_flops = self._gauge.by == "flops"
                what: Counted = "flops" if by_flops else "bytes accessed"
                forward, backward = (
                    0.0 if p is None else count(p[1], what) for p in programs
                )
                found = LayerWork(forward, backward)
            self._by_computation[computes] = found
        self._by_key[layer.key] = self._by_computation[computes]
        return self._by_key[layer.key]


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


def _seconds(layer: LayerTrace, params: Sequence[PyTree], gauge: Gauge) -> LayerWork:
    """The seconds of a layer's forward and of its backward.

    Arguments:
        params: those of all layers, or none. What is no array is zeros.
    """
    # Everything that the programs may take, by name: the inputs now, what the forward
    # makes when it has run.
    device = jax.local_devices()[0] if gauge.device is None else gauge.device
    known: dict[ProgramValue, Any] = {}
    for port, shape in layer.inputs.items():
        arrays = [zeros(a) for a in shape.leaves]
        # Zeros may take another time than numbers, in a sparse layer for example, so
        # real parameters are used where there are any.
        if port.kind == "params" and params:
            given = pack(params[port.of])[0]
            if not any(isinstance(a, jax.ShapeDtypeStruct) for a in given):
                arrays = given
        placed = to_device(arrays, device)
        known |= {Input(Leaf(port, n)): a for n, a in enumerate(placed)}
    kinds: tuple[Kind, Kind] = ("F", "B")
    forward, backward = (_run(layer, kind, known, gauge, device) for kind in kinds)
    return LayerWork(
        forward.seconds, backward.seconds, forward.launch + backward.launch
    )


def _run(
    layer: LayerTrace,
    kind: Kind,
    known: dict[ProgramValue, Any],
    gauge: Gauge,
    device: Any,
) -> Measured:
    """The time of one of the programs; what it makes is put into `known`."""
    found = layer.programs.program(kind)
    if found is None:
        return Measured(0.0, 0.0)
    program, code = found
    for value in program.ins:
        if isinstance(value, Cotangent):
            port, k = value.leaf
            shape = layer.programs.joint.flat.out[port].leaves[k]
            known[value] = jax.device_put(zeros(shape), device)
    call = code.compile()
    arguments = [known[value] for value in program.ins]
    times = runs(call, lambda: arguments, _WARM_UP, gauge.repeats)
    # The backward takes what the forward has made.
    known |= dict(zip(program.outs, call(*arguments), strict=True))
    for value, other in program.aliases.items():
        if other in known:
            known[value] = known[other]
    return least(times)
