"""Where a stage lives. Only this module turns a placement into what `jax.device_put`
takes.

In: what a user gives as `devices`, for example `jax.devices()[:2]`, or a mesh with an
axis of stages. Out: placements, equal and hashable by value, one for each device of the
schedule:

    (Placement(cpu:0), Placement(cpu:1))
    (Placement(data=2 (cpu:0, cpu:1)), Placement(data=2 (cpu:2, cpu:3)))

A device may be given twice. Then two devices of the schedule are one placement, and
nothing moves between them.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias, get_args

import jax
import numpy as np
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    Sharding,
    SingleDeviceSharding,
)
from jax.sharding import PartitionSpec as P

from fpipe._core.errors import shown
from fpipe._core.meshes import no_mesh, to_device
from fpipe._core.processes import ghost, is_here, is_shared, lay, processes_of
from fpipe._core.pytrees import PyTree, aval, copied, is_traced, on_host, pack, zeros
from fpipe._executors.transfers import bring
from fpipe._model.specs import without_axes
from fpipe._program.over_mesh import devices_over

# `jax.Device` is a variable to type checkers: jaxlib does not declare it as a class.
Device: TypeAlias = Any
Place: TypeAlias = Device | Mesh | Sharding

Unshard: TypeAlias = Literal["step", "action"]
"""How often a parameter is gathered that is cut over axes of rows: once for all actions
of a step, or in each."""

UNSHARD: tuple[Unshard, ...] = get_args(Unshard)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A stage's place: one device, or a mesh of some.

    It pickles by platforms and ids, and is looked up again where it is unpickled.

    Attributes:
        sharding: of an array that is whole on each of its devices.
        data: those axes of its mesh over which rows are shared.
    """

    sharding: SingleDeviceSharding | NamedSharding
    data: tuple[str, ...] = ()

    @classmethod
    def of(cls, place: Place, data: Sequence[str] = ()) -> "Placement":
        """From a device, a mesh or a sharding.

        Arguments:
            data: names of axes; a mesh may lack some of them.
        """
        if isinstance(place, jax.Device):
            return cls(SingleDeviceSharding(place))
        if isinstance(place, Sharding) and len(place.device_set) == 1:
            return cls(SingleDeviceSharding(next(iter(place.device_set))))
        if isinstance(place, NamedSharding):
            if any(part is not None for part in place.spec):
                raise ValueError(
                    f"`devices`: the sharding {place.spec} says how arrays are cut, "
                    "but a stage needs only a mesh: give the mesh, and shard "
                    "parameters by `fpipe.Layer(spec=...)`"
                )
            place = place.mesh
        if isinstance(place, Mesh):
            refuse_explicit(place, "devices=[mesh, ...]")
            own = tuple(name for name in data if name in place.axis_names)
            return cls(NamedSharding(place, P()), own)
        if isinstance(place, Sharding):
            raise ValueError(
                f"`devices`: {place} spans {len(place.device_set)} devices and has no "
                "mesh; give a jax.sharding.Mesh of them"
            )
        raise TypeError(
            f"`devices`: {shown(place)} is neither a jax.Device nor a Mesh or "
            "Sharding; take them from `jax.devices()`"
        )

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """The mesh that it is; `None`: it is one device."""
        sharding = self.sharding
        # A concrete mesh: shardings of arrays and of a user's meshes have no other.
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
        return None

    @functools.cached_property
    def axes(self) -> AbstractMesh | None:
        """The axes that a layer may name, equal for meshes of one shape."""
        return None if self.mesh is None else self.mesh.abstract_mesh

    @functools.cached_property
    def devices(self) -> tuple[Device, ...]:
        """Its devices, in the order of its mesh."""
        if self.mesh is None:
            return tuple(self.sharding.device_set)
        return tuple(self.mesh.devices.flat)

    @functools.cached_property
    def device(self) -> Device:
        """Its first device."""
        return self.devices[0]

    @functools.cached_property
    def own_device(self) -> Device:
        """Its first device that is of this process; its first one, if none is."""
        own = self.sharding.addressable_devices
        return next((d for d in self.devices if d in own), self.device)

    @functools.cached_property
    def processes(self) -> frozenset[int]:
        """The processes that its devices are of."""
        return processes_of(self.sharding)

    @functools.cached_property
    def is_here(self) -> bool:
        """Whether this process has devices of it."""
        return is_here(self.sharding)

    @functools.cached_property
    def place(self) -> Device | Mesh:
        """What it was made of."""
        return self.device if self.mesh is None else self.mesh

    @functools.cached_property
    def parts(self) -> int:
        """Over how many devices the rows of a microbatch are shared."""
        if self.mesh is None:
            return 1
        return devices_over(self.mesh, self.data)

    @functools.cached_property
    def has_other_axes(self) -> bool:
        """Whether arrays may be cut over more than the rows' axes."""
        return self.mesh is not None and self.mesh.size > self.parts

    def tracing(self) -> AbstractContextManager[Any]:
        """The context of JAX in which the layers of its stages are traced: one device
        has no axes.
        """
        if self.axes is None:
            return no_mesh()
        return jax.sharding.use_abstract_mesh(self.axes)

    def cut_by(self, spec: P) -> NamedSharding:
        """How an array lies that is cut over axes of the mesh."""
        assert self.mesh is not None
        return NamedSharding(self.mesh, without_axes(spec, ()))

    def gathered(self, lies: Sharding) -> Sharding:
        """How an array lies that is gathered over the axes of rows."""
        if not isinstance(lies, NamedSharding) or not self.data:
            return lies
        return self.cut_by(without_axes(lies.spec, self.data))

    def by_rows(self, axis: int | None) -> Sharding:
        """How an array lies whose rows are shared; `None`: it has none."""
        if axis is None or self.mesh is None or self.parts == 1:
            return self.sharding
        return self.cut_by(P(*[None] * axis, self.data))

    @functools.cached_property
    def host(self) -> Sharding:
        """The memory of its host: where an offloading policy moves what is saved."""
        return self.sharding.with_memory_kind("pinned_host")

    def as_default(self) -> Any:
        """A context in which new arrays are made here, on the first of its devices that
        are of this process.
        """
        return jax.default_device(self.own_device)

    def put(self, arrays: Sequence[Any]) -> list[Any]:
        """Arrays on this place, without a copy where they are there already."""
        # A put takes 15 to 19 µs to a `Device`, and 45 to 56 µs to a `Sharding`
        # (measured on jax 0.10.2, CPU). Every boundary of every microbatch is one.
        if self.mesh is None:
            return jax.device_put(list(arrays), self.device)
        if is_shared(self.sharding):
            return [lay(array, self.sharding) for array in arrays]
        return jax.device_put(list(arrays), self.sharding)

    def take(
        self, arrays: Sequence[Any], shardings: Sequence[Sharding] | None = None
    ) -> list[Any]:
        """Arrays of the caller on this place, whatever mesh they lie over. In a process
        that has no part of it they are ghosts, whatever is given.

        Arguments:
            shardings: how they are to lie over its mesh; default whole on each device.
        """
        if not self.is_here:
            lie = shardings or [self.sharding] * len(arrays)
            pairs = zip(map(aval, arrays), lie, strict=True)
            return [ghost(a.shape, a.dtype, to) for a, to in pairs]
        if self.mesh is None:
            return to_device(arrays, self.device)
        return bring(arrays, shardings or [self.sharding] * len(arrays))

    def own(
        self, arrays: Sequence[Any], shardings: Sequence[Sharding] | None = None
    ) -> list[Any]:
        """Arrays on this place, in memory of their own: `take` and, where that is the
        memory of a given array, a copy.

        Whoever gets them may donate them, and the given arrays stay as they are.
        """
        put = self.take(arrays, shardings)
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

    def put_tree(
        self, tree: PyTree, own: bool, shardings: Sequence[Sharding] | None = None
    ) -> PyTree:
        """A pytree's arrays on this place; what is no array stays.

        Arguments:
            own: whether they are to have memory of their own.
            shardings: as for `take`.
        """
        arrays, spec = pack(tree)
        take = self.own if own else self.take
        return spec.unpack(take(arrays, shardings))

    def holds(self, array: Any) -> bool:
        """Whether an array lives here, in the memory of its devices."""
        # By its devices, not its sharding: a mesh of this one device is here too.
        return (
            isinstance(array, jax.Array)
            and array.sharding.device_set == self.sharding.device_set
            and not on_host(array)
        )

    def __str__(self) -> str:
        if self.mesh is None:
            return str(self.device)
        axes = " x ".join(f"{name}={size}" for name, size in self.mesh.shape.items())
        first, *_, last = [*self.devices, self.devices[-1]]
        dots = ", …, " if len(self.devices) > 2 else ", "
        ends = f"{first}{dots}{last}" if len(self.devices) > 1 else str(first)
        return f"{axes} ({ends})"

    def __repr__(self) -> str:
        return f"Placement({self})"

    # A device itself does not pickle: it belongs to the backend of this process.
    def __reduce__(self) -> Any:
        if self.mesh is None:
            return _restore, (self.device.platform, self.device.id)
        grid = np.empty(self.mesh.devices.shape, object)
        for at, device in np.ndenumerate(self.mesh.devices):
            grid[at] = device.platform, device.id
        mesh = self.mesh
        return _restore_mesh, (grid, mesh.axis_names, mesh.axis_types, self.data)


def as_argument(shape: jax.ShapeDtypeStruct) -> Any:
    """An argument that a program is lowered for: a shape with its sharding, or zeros,
    if the sharding is in the host's memory.

    Of a shape on one device JAX takes the device, and not the kind of its memory (jax
    0.10.2), so that only an array gives the program that a call will run.
    """
    return zeros_at(shape) if on_host(shape) else shape


def zeros_at(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros where a shape says that they lie."""
    return jax.device_put(zeros(shape), shape.sharding)


def _share_memory(array: Any, new: Any) -> bool:
    """Whether an array and what `jax.device_put` made of it may be the same memory."""
    # In a trace nothing has memory yet, and arrays of `float0` never have.
    if not isinstance(new, jax.Array) or is_traced((array, new)):
        return False
    if isinstance(array, jax.Array):
        return bool(new.sharding.device_set & array.sharding.device_set)
    # On a CPU an array of JAX may be numpy's memory, if that is aligned.
    return isinstance(array, np.ndarray) and any(
        shard.data.unsafe_buffer_pointer() == array.ctypes.data
        for shard in new.addressable_shards
    )


def _restore(platform: str, number: int) -> Placement:
    return Placement.of(_device(platform, number))


def _restore_mesh(
    grid: np.ndarray,
    names: tuple[str, ...],
    types: tuple[AxisType, ...],
    data: tuple[str, ...],
) -> Placement:
    devices = np.empty(grid.shape, object)
    for at, known in np.ndenumerate(grid):
        devices[at] = _device(*known)
    return Placement.of(Mesh(devices, names, axis_types=types), data)


def _device(platform: str, number: int) -> Device:
    for device in jax.devices(platform):
        if device.id == number:
            return device
    raise ValueError(f"unpickling a Pipe: there is no device {platform}:{number} here")


def refuse_explicit(mesh: Mesh, call: str) -> None:
    """Refuse a mesh with explicit axes.

    With these the sharding of an array is part of its type, and a layer that contracts
    over a sharded axis does not trace. `jax.make_mesh` makes explicit axes unless it is
    told otherwise, so the error says how.

    Raises:
        ValueError: it has some.
    """
    wrong = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    ]
    if wrong:
        auto = f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}"
        raise ValueError(
            f"`Pipe({call})`: the axes {wrong} are explicit; make the mesh with "
            f"`{auto}`"
        )


def sub_meshes(mesh: Mesh, axis: str) -> list[Device | Mesh]:
    """The places along an axis of a mesh: a mesh of the other axes for each, or a
    device if there are none.
    """
    along = mesh.axis_names.index(axis)
    rows = list(np.moveaxis(mesh.devices, along, 0))
    names = (*mesh.axis_names[:along], *mesh.axis_names[along + 1 :])
    return [Mesh(row, names) for row in rows] if names else rows


def as_data_axes(data: Any, places: Iterable[Any] | None) -> tuple[str, ...]:
    """The names of the axes over which rows are shared.

    Arguments:
        data: the user's; `None`: `"data"`, where a mesh has that axis.
        places: devices and meshes.

    Raises:
        TypeError, ValueError: these are no names of axes, or no mesh has them.
    """
    names = {
        name for place in places or () for name in getattr(place, "axis_names", ())
    }
    if data is None:
        return tuple(name for name in ("data",) if name in names)
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise TypeError(
            f"`Pipe(data_axes={shown(data)})`: a sequence of names of axes, such as "
            '("data",)'
        )
    axes = tuple(data)
    for name in axes:
        if name not in names or name == "stage":
            known = sorted(names - {"stage"})
            raise ValueError(
                f"`Pipe(data_axes={shown(axes)})`: no mesh has an axis {shown(name)} "
                f"beside that of stages; the axes are {known}"
            )
    return axes


def over_processes(places: Iterable[Placement]) -> bool:
    """Whether a place has devices of another process than this one."""
    own = frozenset({jax.process_index()})
    return any(place.processes != own for place in places)


def as_places(devices: Iterable[Place] | None) -> list[Place]:
    """What a user gives as `devices`, as a list; default `jax.devices()`.

    Raises:
        TypeError: it is one place alone, or no sequence.
    """
    given = jax.devices() if devices is None else devices
    if isinstance(given, (jax.Device, Mesh, Sharding)):
        raise TypeError(
            "`Pipe(devices=...)`: a sequence of jax.Device, Mesh or Sharding, got "
            f"{shown(given)} alone; write [device]"
        )
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(
            "`Pipe(devices=...)`: a sequence of jax.Device, Mesh or Sharding, got "
            f"{shown(given)}; try `jax.devices()`"
        )
    return list(given)


def as_placements(
    devices: Iterable[Place] | None, data: Sequence[str] = ()
) -> tuple[Placement, ...]:
    """Placements of devices and meshes, default those of `jax.devices()`.

    Arguments:
        data: names of the axes over which rows are shared.

    Raises:
        ValueError: two of them have some devices in common, but not all.
    """
    places = tuple(Placement.of(place, data) for place in as_places(devices))
    _refuse_overlaps(places)
    if not places:
        raise ValueError(
            "`Pipe(devices=[])`: at least one device is needed; leave it out for "
            "`jax.devices()`"
        )
    return places


def _refuse_overlaps(places: Sequence[Placement]) -> None:
    """Refuse placements that share some devices and are not the same."""
    if all(place.mesh is None for place in places):
        return
    holder: dict[Device, Placement] = {}
    for place in places:
        for device in place.devices:
            other = holder.setdefault(device, place)
            # Programs of two meshes that cross could wait for each other.
            if other != place:
                raise ValueError(
                    f"`Pipe(devices=...)`: {device} is in two places, {other} and "
                    f"{place}; a device belongs to one of them, which may be given "
                    "several times"
                )


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
