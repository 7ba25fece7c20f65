"""`layer_costs`: what each layer costs, from shapes."""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax

from fpipe._core.pytrees import (
    PyTree,
    Shape,
    is_inexact,
    map_arrays,
    numbers_as_arrays,
    strong,
)
from fpipe._executors.call import as_compute_dtype, check_chunks, check_params
from fpipe._model.loss import sum_dtype
from fpipe._model.microbatch import cut_inputs, first_microbatch
from fpipe._model.model import Model
from fpipe._model.needs import call_needs
from fpipe._model.remat import Policy, Remat
from fpipe._model.stages import Port
from fpipe._planning import flops as _flops
from fpipe._planning.costs import LayerCosts, Sent
from fpipe._planning.timing import measure
from fpipe._planning.walk import Step, Walk, nbytes, size_of

By: TypeAlias = Literal["flops", "bytes", "time", "memory"]
UNITS: dict[By, str] = {
    "flops": "FLOP",
    "bytes": "byte",
    "time": "second",
    "memory": "nothing",
}


def layer_costs(
    layers: Iterable[Any],
    x: PyTree,
    *,
    by: By = "flops",
    side: PyTree = None,
    chunks: int = 1,
    params: Sequence[PyTree] | None = None,
    checkpoint: str | Policy = "except_last",
    compute_dtype: Any = None,
    train: bool = True,
    device: Any = None,
    repeats: int = 10,
) -> LayerCosts:
    """What each layer costs for one microbatch, in work, memory and traffic.

    From shapes alone, but for `by="time"`: nothing is allocated and nothing compiled.
    Layers that are equal are traced once (the same functions on the same shapes), and
    layers that compute the same are lowered, or measured, once.

    Arguments:
        layers: functions, `Layer`s, or nested sequences of them, as for `Pipe`.
        x: a batch, or its shapes (`jax.ShapeDtypeStruct`).

    Other Arguments:
        by: what work is. `"flops"` (default) and `"bytes"` (read and written): as XLA
            counts them in the layer's lowered forward and backward, the body of a
            `lax.scan` as often as it runs; what is inside a foreign call, such as a
            Pallas kernel or a callback, is not counted. `"time"`: seconds, the medians
            of runs on one device after a warm-up. `"memory"`: no work is counted, only
            memory.
        side: side inputs, or their shapes.
        chunks: as for `Pipe`: the batch is cut into so many microbatches; default 1,
            `x` is one.
        params: parameters of every layer, or their shapes; needed if a layer has no
            `init`. `"time"` uses them if they are arrays; else, and for all other
            inputs, zeros.
        checkpoint, compute_dtype: as for `Pipe`.
        train: handed to the layers that ask; default `True`.
        device: where `"time"` runs; default the first of `jax.devices()`.
        repeats: how often `"time"` runs each; default 10.

    Raises:
        ValueError: an unknown `by`; a layer without `init` and no `params`.

    Example:
        >>> dense = fpipe.Layer(lambda w, x: x @ w, init=lambda key, x: jnp.zeros((3, 3)))
        >>> costs = fpipe.layer_costs([dense, dense], jax.ShapeDtypeStruct((8, 3), jnp.float32))
        >>> costs.forward, costs.params
        ((144.0, 144.0), (36, 36))
    """
    if by not in get_args(By):
        raise ValueError(
            f"`layer_costs(by={by!r})`: one of {', '.join(map(repr, get_args(By)))}"
        )
    if type(repeats) is not int or repeats < 1:
        raise ValueError(f"`layer_costs(repeats={repeats!r})`: an int, at least 1")
    chunks, remat = check_chunks("layer_costs", chunks), Remat.of(checkpoint)
    model = Model(layers, as_compute_dtype("layer_costs", compute_dtype))
    return costs_of(
        model, x, by, side, chunks, params, remat, bool(train), device, repeats
    )


def costs_of(
    model: Model,
    x: PyTree,
    by: By,
    side: PyTree,
    chunks: int,
    params: Sequence[PyTree] | None,
    remat: Remat,
    train: bool = True,
    device: Any = None,
    repeats: int = 10,
) -> LayerCosts:
    """`layer_costs` of checked arguments."""
    if params is not None:
        check_params(model, params, "`layer_costs(params=...)`")
        params = tuple(map_arrays(strong, numbers_as_arrays(p)) for p in params)
    needs = call_needs(side=side, train=train)
    walk = Walk(model, *first_microbatch(x, needs, chunks), params)
    count = len(model.layers)
    work = _work(walk, by, params, device, repeats)
    residuals = [step.cut.kept(_outside(k)) for k, step in enumerate(walk.steps)]
    pairs = [walk.pair(k).kept(_outside(k)) for k in range(count - 1)]
    owners = {owner: () for names in model.borrows for _, owner in names}
    sizes = list(map(size_of, walk.params))
    return LayerCosts(
        names=tuple(layer.name for layer in model.layers),
        forward=tuple(forward for forward, _ in work),
        backward=tuple(backward for _, backward in work),
        unit=UNITS[by],
        params=tuple(sizes),
        gradients=tuple(map(_gradients, walk.params)),
        residuals=tuple(residuals),
        shared=(
            *(residuals[k] + residuals[k + 1] - both for k, both in enumerate(pairs)),
            0,
        ),
        saved=_saved(walk, remat),
        boundaries=tuple(map(size_of, walk.at[1:])),
        inputs=size_of(walk.at[0]),
        skips=tuple(
            Sent(r.maker, r.readers, size_of(walk.skips[skip]))
            for skip, r in model.routes.items()
        ),
        borrowed=tuple(
            Sent(
                owner,
                tuple(
                    k
                    for k, names in enumerate(model.borrows)
                    if owner in dict(names).values()
                ),
                sizes[owner],
            )
            for owner in owners
        ),
        microbatches=cut_inputs({"x": x, **needs}, chunks).m,
        checkpoint=remat.option,
    )


def _outside(k: int) -> tuple[str, ...]:
    """The model's input is the call's, and is there anyway."""
    return () if k else ("x",)


def _gradients(params: Shape) -> int:
    wide = (
        jax.ShapeDtypeStruct(a.shape, sum_dtype(a.dtype))
        for a in params.leaves
        if is_inexact(a)
    )
    return sum(map(nbytes, wide))


def _saved(walk: Walk, remat: Remat) -> tuple[int, ...]:
    """What a recomputed layer keeps besides the inputs of its stage."""
    if remat.policy is None:
        return tuple(
            size_of(walk.states[k]) if k in walk.states else 0
            for k in range(len(walk.steps))
        )
    found: dict[Hashable, int] = {}
    for k, step in enumerate(walk.steps):
        if step.key not in found:
            found[step.key] = walk.recomputed(k, remat).kept(("x", "skip"))
    return tuple(found[step.key] for step in walk.steps)


def _work(
    walk: Walk, by: By, params: Sequence[PyTree] | None, device: Any, repeats: int
) -> list[tuple[float, float]]:
    """Forward and backward of each layer; what is equal is counted or measured once."""
    if by == "memory":
        return [(0.0, 0.0)] * len(walk.steps)
    found: dict[Hashable, tuple[float, float]] = {}
    same: dict[Hashable, tuple[float, float]] = {}
    given = () if params is None else params

    def made(step: Step) -> tuple[float, float]:
        codes = [step.cut.code(kind) for kind in ("F", "B")]
        if by != "time":
            what: _flops.What = "flops" if by == "flops" else "bytes accessed"
            forward, backward = (
                0.0 if code is None else _flops.count(code, what) for code in codes
            )
            return forward, backward
        ports = {
            Port("params", k): p
            for k, p in enumerate(given)
            if all(map(_is_there, jax.tree.leaves(p)))
        }
        return measure(
            step, ports, jax.devices()[0] if device is None else device, repeats
        )

    for step in walk.steps:
        if step.key not in found:
            codes = [step.cut.code(kind) for kind in ("F", "B")]
            computes = tuple(None if code is None else code.identity for code in codes)
            if computes not in same:
                same[computes] = made(step)
            found[step.key] = same[computes]
    return [found[step.key] for step in walk.steps]


def _is_there(leaf: Any) -> bool:
    return not isinstance(leaf, jax.ShapeDtypeStruct)
