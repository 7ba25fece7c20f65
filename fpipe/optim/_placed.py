"""Transformations of parameters that lie on several devices: planned once for their
form, then dispatched.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from fpipe._core.pytrees import (
    PyTree,
    Spec,
    aval,
    eval_shape,
    is_array,
    numbers_as_arrays,
    pack,
    shapes_of,
)
from fpipe._executors.placement import Device
from fpipe._program.graph import trace
from fpipe.optim._cut import SMALL, cut, size
from fpipe.optim._run import Run
from fpipe.optim._steps import opened
from fpipe.optim._view import Chosen, Frozen, owners

FIX = "make one with `tx.init(params)`, or move this one with `fpipe.optim.place(state, params)`"


def device_of(array: Any) -> Device | None:
    """The one device that an array is committed to."""
    if not isinstance(array, jax.Array) or not array.committed:
        return None
    devices = array.devices()
    return next(iter(devices)) if len(devices) == 1 else None


def form(array: Any) -> Hashable:
    """What a plan is specialised on."""
    return (
        array.shape,
        array.dtype,
        getattr(array, "weak_type", False),
        device_of(array),
    )


def named(what: str, path: Any) -> str:
    """A leaf's name in an error."""
    return f"{what}{jax.tree_util.keystr(path)}"


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan, and the structures around it."""

    run: Run
    chosen: Chosen
    state: Spec


def homes_of(chosen: Chosen, leaves: Sequence[Any], call: str) -> list[Device]:
    """The device of each parameter that a transformation sees."""
    homes = []
    for path, leaf in zip(chosen.names, chosen.select(leaves), strict=True):
        device = device_of(leaf)
        if device is None:
            where = (
                f"on {leaf.sharding}"
                if isinstance(leaf, jax.Array)
                else f"a {type(leaf).__name__}"
            )
            raise ValueError(
                f"`{call}`: the parameter {named('params', path)} is not placed: it is "
                f"{where}, and not committed to one "
                "device; place parameters with `pipe.place(params)`"
            )
        homes.append(device)
    return homes


def plan(
    f: Callable[..., Sequence[Any]],
    arrays: Sequence[Any],
    given: Sequence[Device | None],
    wanted: Callable[[int], Sequence[Device | None]],
    devices: Sequence[Device],
    donate: Sequence[bool],
    through: Callable[[int, int], bool],
) -> Run:
    """Trace a function of flat arrays and cut it.

    Arguments:
        given: the device that each array belongs to, `None` for numbers that all share.
        wanted: from the number of outputs the device of each; `None` for the first.
        devices: the first is where small values meet.
        through: whether an output may be the very array that is an input, from the
            numbers of both.
    """
    closed = trace(f, *map(aval, arrays))
    graph = opened(closed)
    lies = [device_of(a) for a in arrays]
    every = list(
        dict.fromkeys([*devices, *(d for d in (*given, *lies) if d is not None)])
    )
    number = {d: n for n, d in enumerate(every)}
    source = {v: n for n, v in enumerate(graph.inputs)}
    ends = [0 if d is None else number[d] for d in wanted(len(graph.outputs))]
    may = [v in source and through(source[v], k) for k, v in enumerate(graph.outputs)]
    parts = cut(
        graph,
        [number.get(d) for d in given],
        [number.get(d) for d in lies],
        ends,
        0,
        may,
    )
    return Run(parts, every, donate)


def first_devices(homes: Sequence[Device]) -> list[Device]:
    """Devices in the order of the parameters; one at least."""
    return list(dict.fromkeys(homes)) or [jax.devices()[0]]


def plan_init(tx: Any, params: PyTree, frozen: Frozen) -> Planned:
    """The initial state, every leaf on its parameter's device, the others on the first."""
    chosen = Chosen.of(params, frozen)
    leaves = jax.tree.leaves(params)
    homes = homes_of(chosen, leaves, "per_stage(tx).init")
    states: list[tuple[PyTree, Spec]] = []

    def f(*arrays: Any) -> list[Any]:
        state = numbers_as_arrays(tx.init(chosen.seen(arrays)))
        out, spec = pack(state)
        states.append((state, spec))
        return out

    def wanted(count: int) -> list[Device | None]:
        return _owned(chosen, states[-1][0], homes)

    kept = chosen.select(leaves)
    run = plan(
        f,
        kept,
        homes,
        wanted,
        first_devices(homes),
        [False] * len(kept),
        lambda n, k: False,
    )
    return Planned(run, chosen, states[-1][1])


def _owned(
    chosen: Chosen, state: PyTree, homes: Sequence[Device]
) -> list[Device | None]:
    """The device of each array of a state."""
    own = owners(chosen.names, state)
    return [
        None if n is None else homes[n]
        for n, leaf in zip(own, jax.tree.leaves(state), strict=True)
        if is_array(leaf)
    ]


def plan_update(
    tx: Any,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    extra: dict[str, Any],
    frozen: Frozen,
    donate: Sequence[str],
) -> Planned:
    """Updates and the next state from gradients and a state."""
    like = grads if params is None else params
    chosen = Chosen.of(like, frozen)
    leaves = jax.tree.leaves(like)
    homes = homes_of(chosen, leaves, "per_stage(tx).update")
    g = chosen.select(chosen.leaves(grads, "gradients"))
    for path, array, home in zip(chosen.names, g, homes, strict=True):
        if not is_array(array) or device_of(array) != home:
            where = device_of(array) if is_array(array) else type(array).__name__
            raise ValueError(
                f"`per_stage(tx).update`: the gradient {named('grads', path)} is on "
                f"{where}, but its parameter is on {home}; "
                "`pipe.value_and_grad` gives them where their parameters are, and "
                "`pipe.place(grads)` puts others there"
            )
    p = [] if params is None else chosen.select(leaves)
    s, spec = pack(state)
    e, extra_spec = pack(extra)
    check_state(tx, chosen.seen(g if params is None else p), state, FIX)
    own = _state_homes(chosen, state, homes)
    ends = np.cumsum([len(g), len(s), len(p), len(e)])
    states: list[tuple[PyTree, Spec]] = []

    def f(*arrays: Any) -> list[Any]:
        a, b, c, d = np.split(np.array([*range(len(arrays))]), ends[:-1])
        sections = [[arrays[n] for n in part] for part in (a, b, c, d)]
        seen = None if params is None else chosen.seen(sections[2])
        updates, new = tx.update(
            chosen.seen(sections[0]),
            spec.unpack(sections[1]),
            seen,
            **extra_spec.unpack(sections[3]),
        )
        new = numbers_as_arrays(new)
        out, new_spec = pack(new)
        states.append((new, new_spec))
        return [*jax.tree.leaves(updates), *out]

    def wanted(count: int) -> list[Device | None]:
        return [*homes, *_owned(chosen, states[-1][0], homes)]

    flags = (
        ["grads" in donate] * len(g)
        + ["state" in donate] * len(s)
        + [False] * (len(p) + len(e))
    )

    def through(n: int, k: int) -> bool:
        return (n < ends[0]) == (k < len(g)) and n < ends[1]

    shared = [device_of(a) if size(a) > SMALL else None for a in e]
    run = plan(
        f,
        [*g, *s, *p, *e],
        [*homes, *own, *homes[: len(p)], *shared],
        wanted,
        first_devices(homes),
        flags,
        through,
    )
    return Planned(run, chosen, states[-1][1])


def check_state(
    tx: Any, params: PyTree, state: PyTree, fix: str, call: str = "per_stage(tx).update"
) -> None:
    """Refuse a state that is not what `init` gives for these parameters.

    Arguments:
        params: what the transformation sees of them, or the shapes of that.
        state: unpacked.
        call: for the error.
    """
    want = jax.tree_util.tree_flatten_with_path(
        eval_shape(lambda p: numbers_as_arrays(tx.init(p)), shapes_of(params))
    )
    have = jax.tree_util.tree_flatten_with_path(state)
    call = f"`{call}`: "
    paths, others = [path for path, _ in have[0]], [path for path, _ in want[0]]
    if paths != others:
        wrong = [path for path in paths if path not in others] + [
            path for path in others if path not in paths
        ]
        name = named("state", wrong[0]) if wrong else "state"
        raise ValueError(
            f"{call}{name}: the optimizer state is not of this transformation, these "
            f"parameters and `frozen`: {len(paths)} "
            f"leaves, and `init(params)` gives {len(others)}; {fix}"
        )
    if have[1] != want[1]:
        raise ValueError(
            f"{call}the optimizer state is {have[1]}, and `init(params)` gives "
            f"{want[1]}; {fix}"
        )
    for (path, leaf), (_, other) in zip(have[0], want[0], strict=True):
        if is_array(leaf) and leaf.shape != other.shape:
            raise ValueError(
                f"{call}{named('state', path)} has the shape {leaf.shape}, and "
                f"`init(params)` gives {other.shape}: a state of "
                f"other parameters; {fix}"
            )


def _state_homes(
    chosen: Chosen, state: PyTree, homes: Sequence[Device]
) -> list[Device | None]:
    """The device that each array of a state belongs to, checked."""
    out: list[Device | None] = []
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    for n, (path, leaf) in zip(owners(chosen.names, state), flat, strict=True):
        if not is_array(leaf):
            continue
        at = device_of(leaf)
        if n is not None and at != homes[n]:
            raise ValueError(
                f"`per_stage(tx).update`: {named('state', path)} is on {at}, but its "
                f"parameter {named('params', chosen.names[n])} "
                f"is on {homes[n]}: a state of another partition, or one that was not "
                f"placed; {FIX}"
            )
        out.append(
            homes[n] if n is not None else at if size(aval(leaf)) > SMALL else None
        )
    return out
