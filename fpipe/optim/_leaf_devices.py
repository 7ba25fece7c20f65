"""The devices of placed leaves: found, and checked where they must agree.

In: trees of parameters, gradients and states with leaves on several devices, such as
`({"w": on device 0}, {"w": on device 1})`. Out: devices, one for each leaf that a
transformation sees: `[device 0, device 1]`.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.sharding import (
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from fpipe._core.errors import a_type
from fpipe._core.processes import first_devices, is_here, processes_of
from fpipe._core.pytrees import PyTree, aval, is_array, nbytes
from fpipe._executors.placement import Device
from fpipe._executors.tracers import only_shapes
from fpipe._model.specs import WHOLE, spec_without_axis
from fpipe.optim._partition import SMALL
from fpipe.optim._seen_leaves import Path, SeenLeaves, leaf_name, parameters_of_state

Home: TypeAlias = Device | Mesh
"""Where leaves lie: one device, or the mesh of a stage on several."""

FIX = (
    "make one with `tx.init(params)`, or move this one with "
    "`fpipe.optim.place(state, params)`"
)


def device_of(array: Any) -> Home | None:
    """The one device that an array is committed to, or its mesh, if there is one.

    JAX may move an array that is not committed to the device of any array that it is
    combined with. So its present device says nothing about where it belongs.
    """
    if not isinstance(array, jax.Array) or not array.committed:
        return None
    devices = array.devices()
    if len(devices) == 1:
        return next(iter(devices))
    mesh = getattr(array.sharding, "mesh", None)
    return mesh if isinstance(mesh, Mesh) else None


def whole_at(home: Home) -> Sharding:
    """How an array lies that is whole on each device of a home."""
    if isinstance(home, Mesh):
        return NamedSharding(home, PartitionSpec())
    return SingleDeviceSharding(home)


def is_home_here(home: Home) -> bool:
    """Whether this process has devices of a home."""
    return is_here(whole_at(home))


def over_processes(homes: Iterable[Home | None]) -> bool:
    """Whether homes are in several processes."""
    found = {
        process
        for home in homes
        if home is not None
        for process in processes_of(whole_at(home))
    }
    return len(found) > 1


def first_of_each(homes: Iterable[Home | None]) -> list[Device]:
    """For each process the first of its devices that is among some homes, or its first
    one.
    """
    found: dict[int, Device] = {}
    for home in homes:
        if home is not None:
            devices = home.devices.flat if isinstance(home, Mesh) else [home]
            for device in devices:
                found.setdefault(device.process_index, device)
    return [found.get(d.process_index, d) for d in first_devices()]


def array_form(array: Any) -> Hashable:
    """The properties of an array that a plan depends on: arrays with equal forms share
    a plan.
    """
    weak = getattr(array, "weak_type", False)
    home = device_of(array)
    lies = array.sharding if isinstance(home, Mesh) else home
    return array.shape, array.dtype, weak, lies


def lies_like(shape: Any, home: Home, like: Any = None) -> Sharding | None:
    """How an array is to lie at a home that is a mesh. `None`: the home is one device.

    The array lies as `like` does, if `like` has the same shape, or one axis more.
    Otherwise it is whole on each device.

    Arguments:
        shape: the shape of the array.
        like: another array. For a moment of an optimizer, its parameter.
    """
    if not isinstance(home, Mesh):
        return None
    if like is not None and like.shape == shape:
        return like.sharding
    sharding, spec = getattr(like, "sharding", None), WHOLE
    if like is not None and isinstance(sharding, NamedSharding):
        spec = spec_without_axis(sharding.spec, like.shape, shape)
    return NamedSharding(home, spec)


def first_device(devices: Sequence[Home]) -> Home:
    """The device of the first parameter; JAX's first one, if there is none.

    What belongs to no parameter (a count of steps) lies there, and small values of
    several devices meet there.
    """
    return devices[0] if devices else jax.devices()[0]


def parameter_devices(
    call: str, arrays: Sequence[Any], paths: Sequence[Path]
) -> list[Home]:
    """The device of each parameter. All parameters have to be placed.

    Arguments:
        call: what was called, for the error.
        paths: of the parameters, for the error.
    """
    devices = []
    for array, path in zip(arrays, paths, strict=True):
        device = device_of(array)
        if device is None:
            where = (
                f"on {array.sharding}"
                if isinstance(array, jax.Array)
                else a_type(array)
            )
            raise ValueError(
                f"`{call}`: the parameter {leaf_name('params', path)} is not placed: "
                f"it is {where}, and not committed to one device; place parameters "
                "with `pipe.place(params)`"
            )
        devices.append(device)
    return devices


def check_gradients(
    seen: SeenLeaves, gradients: Sequence[Any], devices: Sequence[Home]
) -> None:
    """Refuse a gradient that is missing, or not on the device of its parameter."""
    seen.check_gradients(gradients)
    for path, array, device in zip(seen.seen_paths, gradients, devices, strict=True):
        if device_of(array) == device:
            continue
        where = "no one device" if device_of(array) is None else device_of(array)
        raise ValueError(
            f"`per_stage(tx).update`: the gradient {leaf_name('grads', path)} is on "
            f"{where}, but its parameter is on {device}; "
            "`pipe.value_and_grad` gives them where their parameters are, and "
            "`pipe.place(grads)` puts others there"
        )


def state_owners(
    seen: SeenLeaves, state: PyTree, devices: Sequence[Home]
) -> list[Home | None]:
    """The device that each array of a state belongs to; `None` for a number that all
    share.

    Arguments:
        devices: those of the parameters.

    Raises:
        ValueError: an array of the state is not where its parameter is.
    """
    # The parameter of a leaf is found by the leaf's path, not by where the leaf is: a
    # state that was restored may be anywhere, and that is the error to find.
    owners: list[Home | None] = []
    named = jax.tree_util.tree_flatten_with_path(state)[0]
    parameters = parameters_of_state(seen.seen_paths, state)
    for parameter, (path, leaf) in zip(parameters, named, strict=True):
        if not is_array(leaf):
            continue
        device = device_of(leaf)
        if parameter is None:
            # The count of steps, a learning rate: each device reads a copy and computes
            # the next one itself. Anything large stays where it is.
            owners.append(device if nbytes(aval(leaf)) > SMALL else None)
            continue
        # It could be moved here without an error. But in most cases the whole state is
        # of another partition, and `place` moves all of it at once.
        if device != devices[parameter]:
            name = leaf_name("params", seen.seen_paths[parameter])
            raise ValueError(
                f"`per_stage(tx).update`: {leaf_name('state', path)} is on {device}, "
                f"but its parameter {name} is on {devices[parameter]}: a state of "
                f"another partition, or one that was not placed; {FIX}"
            )
        owners.append(device)
    return owners


class Wanted(NamedTuple):
    """Where an output is wanted, and how it is to lie there; `None`: as it comes."""

    home: Home
    lies: Sharding | None


def new_state_places(
    seen: SeenLeaves,
    state: PyTree,
    devices: Sequence[Home],
    parameters: Sequence[Any],
) -> list[Wanted]:
    """Where each array of a new state is wanted: at its parameter, cut as that is, or
    on the first device.

    Arguments:
        parameters: arrays that lie as the parameters do.
    """
    wanted = []
    numbers = parameters_of_state(seen.seen_paths, state)
    for number, leaf in zip(numbers, jax.tree.leaves(state), strict=True):
        if not is_array(leaf):
            continue
        home = first_device(devices) if number is None else devices[number]
        like = None if number is None else parameters[number]
        wanted.append(Wanted(home, lies_like(leaf.shape, home, like)))
    return wanted


def refuse_tracers(call: str) -> None:
    """Refuse a call with placed leaves inside of a trace, unless only shapes are asked
    for.
    """
    # Flax and checkpoint libraries ask `jax.eval_shape(tx.init, params)` for the
    # structure of a state. That traces too, but nothing is to run.
    if only_shapes():
        return
    raise TypeError(
        f"`{call}` was called inside `jax.jit` (or another tracing transformation) "
        'with parameters that are no fpipe.Packed: with executor="placed" they are on '
        "several devices, and the update cannot be part of one program. Call it "
        "outside of jit (its programs are compiled all the same), or use "
        '`Pipe(..., executor="scan")`'
    )
