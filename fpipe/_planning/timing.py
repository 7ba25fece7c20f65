"""Measured time of a layer's forward and backward on one device."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fpipe._core.pytrees import pack, zeros
from fpipe._model.stages import Leaf, Port
from fpipe._planning.walk import Step
from fpipe._program.code import Cotangent, Input, ProgramValue

_WARM_UP = 2


def measure(
    step: Step, params: Mapping[Port, Any], device: Any, repeats: int
) -> tuple[float, float]:
    """Seconds of the forward and of the backward: medians, after a warm-up that
    compiles.

    What is not given is zeros.

    Arguments:
        step: the layer, with the shapes of its own inputs.
        params: the parameters that the layer takes, its own and borrowed ones, if there
            are any.
    """
    made: dict[ProgramValue, Any] = {}
    for port, shape in step.inputs.items():
        arrays = (
            [zeros(a) for a in shape.leaves]
            if params.get(port) is None
            else pack(params[port])[0]
        )
        placed = jax.device_put(list(arrays), device)
        made |= {Input(Leaf(port, n)): array for n, array in enumerate(placed)}
    times = []
    for kind in ("F", "B"):
        program, code = step.cut.programs.by_kind.get(kind), step.cut.code(kind)
        if program is None or code is None:
            times.append(0.0)
            continue
        call = code.compile()
        for ref in program.ins:
            if isinstance(ref, Cotangent):
                shape = step.cut.joint.flat.out[ref.leaf.port].leaves[ref.leaf.k]
                made[ref] = jax.device_put(zeros(shape), device)
        arguments = [made[ref] for ref in program.ins]
        times.append(_median(call, arguments, repeats))
        made |= dict(zip(program.outs, call(*arguments), strict=True))
        made |= {
            ref: made[other] for ref, other in program.aliases.items() if other in made
        }
    return times[0], times[1]


def _median(call: Callable[..., Any], arguments: Sequence[Any], repeats: int) -> float:
    times = []
    for n in range(_WARM_UP + repeats):
        started = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        if n >= _WARM_UP:
            times.append(time.perf_counter() - started)
    return statistics.median(times)
