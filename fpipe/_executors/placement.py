"""Where a stage lives. The one module that turns a placement into what `jax.device_put`
takes.

In: what a user gives as `devices`, for example `jax.devices()[:2]`. Out: placements,
equal and hashable by value, one for each device of the schedule:

    (Placement(cpu:0), Placement(cpu:1))

A device may be given twice. Then two devices of the schedule are one placement, and
nothing moves between them.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from fpipe._core.errors import shown
from fpipe._core.meshes import to_device
from fpipe._core.pytrees import PyTree, copied, is_traced, on_host, pack, zeros

# `jax.Device` is a variable to type checkers: jaxlib does not declare it as a class.
Device: TypeAlias = Any
Place: TypeAlias = Device | Sharding


@dataclasses.dataclass(frozen=True)
class Placement:
    """A stage's place: one device today, by type any `Sharding`.

    It pickles by platform and id, and is looked up again where it is unpickled.
    """

    sharding: SingleDeviceSharding

    @classmethod
    def of(cls, place: Place) -> "Placement":
        """From a device or a sharding of one device."""
        if isinstance(place, jax.Device):
            return cls(SingleDeviceSharding(place))
        if isinstance(place, Sharding):
            if len(place.device_set) != 1:
                raise ValueError(
                    f"`devices`: {place} spans {len(place.device_set)} devices; a "
                    "stage's place is one device for now"
                )
            return cls(SingleDeviceSharding(next(iter(place.device_set))))
        raise TypeError(
            f"`devices`: {shown(place)} is neither a jax.Device nor a Sharding; take "
            "them "
            "from `jax.devices()`"
        )

    @functools.cached_property
    def device(self) -> Device:
        """The one device that it is. A stage on several devices would have none, so ask
        `put` and `holds` where they will do.
        """
        return next(iter(self.sharding.device_set))

    @functools.cached_property
    def host(self) -> SingleDeviceSharding:
        """The memory of its host: where an offloading policy moves what is saved."""
        return self.sharding.with_memory_kind("pinned_host")

    def as_default(self) -> Any:
        """A context in which new arrays are made here."""
        return jax.default_device(self.device)

    def put(self, arrays: Sequence[Any]) -> list[Any]:
        """Arrays on this place, without a copy where they are there already."""
        # A put takes 15 to 19 µs to a `Device`, and 45 to 56 µs to a `Sharding`
        # (measured on jax 0.10.2, CPU). Every boundary of every microbatch is one.
        return jax.device_put(list(arrays), self.device)

    def take(self, arrays: Sequence[Any]) -> list[Any]:
        """Arrays of the caller on this place, whatever mesh they lie over."""
        return to_device(arrays, self.device)

    def own(self, arrays: Sequence[Any]) -> list[Any]:
        """Arrays on this place, in memory of their own: `take` and, where that is the
        memory of a given array, a copy.

        Whoever gets them may donate them, and the given arrays stay as they are.
        """
        put = self.take(arrays)
        shared = [
            n
            for n, (array, new) in enumerate(zip(arrays, put, strict=True))
            if _share_memory(array, new)
        ]
        # One put would not do: with `may_alias=False` too it shares numpy's memory, or
        # one device's part of an array on several (jax 0.10.2).
        for n, copy in zip(shared, copied([put[n] for n in shared]), strict=True):
            put[n] = copy
        return put

    def put_tree(self, tree: PyTree, own: bool) -> PyTree:
        """A pytree's arrays on this place; what is no array stays.

        Arguments:
            own: whether they are to have memory of their own.
        """
        arrays, spec = pack(tree)
        return spec.unpack(self.own(arrays) if own else self.take(arrays))

    def holds(self, array: Any) -> bool:
        """Whether an array lives here, in the memory of the device."""
        # By its devices, not its sharding: a mesh of this one device is here too.
        return (
            isinstance(array, jax.Array)
            and array.sharding.device_set == self.sharding.device_set
            and not on_host(array)
        )

    def __str__(self) -> str:
        return str(self.device)

    def __repr__(self) -> str:
        return f"Placement({self})"

    # A device itself does not pickle: it belongs to the backend of this process.
    def __reduce__(self) -> Any:
        return _restore, (self.device.platform, self.device.id)


def as_argument(shape: jax.ShapeDtypeStruct) -> Any:
    """What a program is lowered for: a shape with its sharding, or, where that is in
    the host's memory, zeros.

    Of a shape on one device JAX takes the device, and not the kind of its memory (jax
    0.10.2), so that only an array gives the program that a call will run.
    """
    return zeros_at(shape) if on_host(shape) else shape


def zeros_at(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros where a shape says that they lie."""
    return jax.device_put(zeros(shape), shape.sharding)


def _share_memory(array: Any, new: Any) -> bool:
    """Whether an array and what `jax.device_put` to one device made of it may be the
    same memory.
    """
    # In a trace nothing has memory yet, and arrays of `float0` never have.
    if not isinstance(new, jax.Array) or is_traced((array, new)):
        return False
    if isinstance(array, jax.Array):
        return bool(new.sharding.device_set & array.sharding.device_set)
    # On a CPU an array of JAX may be numpy's memory, if that is aligned.
    return (
        isinstance(array, np.ndarray)
        and new.unsafe_buffer_pointer() == array.ctypes.data
    )


def _restore(platform: str, number: int) -> Placement:
    for device in jax.devices(platform):
        if device.id == number:
            return Placement.of(device)
    raise ValueError(f"unpickling a Pipe: there is no device {platform}:{number} here")


def as_placements(devices: Iterable[Place] | None) -> tuple[Placement, ...]:
    """Placements of devices, default those of `jax.devices()`."""
    given = jax.devices() if devices is None else devices
    if isinstance(given, (jax.Device, Sharding)):
        raise TypeError(
            "`Pipe(devices=...)`: a sequence of jax.Device or Sharding, got "
            f"{shown(given)} "
            "alone; write [device]"
        )
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(
            "`Pipe(devices=...)`: a sequence of jax.Device or Sharding, got "
            f"{shown(given)}; try `jax.devices()`"
        )
    places = tuple(Placement.of(d) for d in given)
    if not places:
        raise ValueError(
            "`Pipe(devices=[])`: at least one device is needed; leave it out for "
            "`jax.devices()`"
        )
    return places


def first_placements(places: Sequence[Placement], count: int) -> tuple[Placement, ...]:
    """The first `count` of them.

    Raises:
        ValueError: there are fewer.
    """
    if len(places) < count:
        raise ValueError(
            f"`Pipe(devices=...)`: {count} devices are needed but there are "
            f"{len(places)}. A device may be named several "
            f"times: `devices=[jax.devices()[0]] * {count}`. To simulate devices on a "
            "CPU, set "
            f'`jax.config.update("jax_num_cpu_devices", {count})` before the first use '
            "of JAX"
        )
    return tuple(places[:count])
