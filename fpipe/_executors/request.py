"""What a call was given, as the executors see it: inputs by leaf, what is wanted, and
the schedule that fits.
"""

from collections.abc import Container, Iterable, Sequence
from typing import Any

import jax

from fpipe._core.pytrees import PyTree, Shape, is_inexact, pack
from fpipe._executors.call import OF_X, Args
from fpipe._executors.programs import Inputs
from fpipe._executors.scheduling import Scheduling
from fpipe._model.microbatch import cut_inputs
from fpipe._model.stages import SIDE, TARGETS, Leaf, Port, Stage, X
from fpipe.schedules import Schedule

# The settings of JAX that a trace bakes in, or that decide what it raises.
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_custom_prng",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_threefry_partitionable",
)


def settings() -> tuple[Any, ...]:
    """Their values."""
    return tuple([getattr(jax.config, name, None) for name in _SETTINGS])


def inputs_of(args: Args, params: Sequence[Shape], chunks: int) -> Inputs:
    """The shapes of a call's inputs, and how they are cut."""
    return Inputs(
        params=tuple(params),
        x=Shape.of(args.x),
        side=Shape.of(args.side),
        targets=Shape.of(args.targets),
        key=None if args.key is None else Shape.of(args.key),
        state=None
        if args.state is None
        else {k: Shape.of(s) for k, s in enumerate(args.state)},
        cut=cut_inputs(args.x, args.side, args.targets, chunks),
    )


def schedule_of(
    scheduling: Scheduling,
    stage_to_device: tuple[int, ...],
    stages: Sequence[Stage],
    microbatches: int,
) -> Schedule:
    """The schedule for that many microbatches.

    Raises:
        ValueError: it permutes the forwards of layers with state.
    """
    schedule = scheduling.make(stage_to_device, microbatches)
    for stage in stages:
        order = schedule.order("F", stage.index) if stage.stateful else ()
        if list(order) != sorted(order):
            raise ValueError(
                f"the schedule {schedule.name!r} runs the forwards of stage "
                f"{stage.index} in the order {order}; layers "
                "with state need them in the order of the microbatches"
            )
    return schedule


def check_backwards(schedule: Schedule) -> None:
    """Refuse to differentiate by a schedule without backwards."""
    if not schedule.backwards:
        raise ValueError(
            f"the schedule {schedule.name!r} has forwards only, and gradients are "
            "asked for; give it a B for every F"
        )


def params_leaves(counts: Sequence[int]) -> tuple[Leaf, ...]:
    """The leaves of parameters; `counts` has the number of each layer's."""
    return tuple(
        Leaf(Port("params", k), n)
        for k, count in enumerate(counts)
        for n in range(count)
    )


def outer_leaves(counts: Sequence[int], args: Args) -> tuple[Leaf, ...]:
    """The leaves of `(params, x, side)`."""
    return (*params_leaves(counts), *_leaves(X, args.x), *_leaves(SIDE, args.side))


def numbered_leaves(counts: Sequence[int], args: Args) -> list[tuple[Leaf, ...]]:
    """The leaves of each of `(params, x, *targets)`."""
    out, start = [params_leaves(counts), _leaves(X, args.x)], 0
    for target in args.targets:
        out.append(_leaves(TARGETS, target, start))
        start += len(out[-1])
    return out


def wanted_leaves(
    inputs: Inputs, leaves: Iterable[Leaf], frozen: Container[tuple[int, int]]
) -> frozenset[Leaf]:
    """Those that can have a gradient and are not frozen."""

    def still(leaf: Leaf) -> bool:
        return (
            leaf.port.kind in ("params", "x")
            and (OF_X if leaf.port == X else leaf.port.of, leaf.k) in frozen
        )

    return frozenset(
        leaf
        for leaf in leaves
        if is_inexact(inputs.of(leaf.port).leaves[leaf.k]) and not still(leaf)
    )


def _leaves(port: Port, tree: PyTree, start: int = 0) -> tuple[Leaf, ...]:
    return tuple(Leaf(port, start + k) for k in range(len(pack(tree)[0])))
