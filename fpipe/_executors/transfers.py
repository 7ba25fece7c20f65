"""How an array gets from the devices of one stage to those of another, without the host
waiting for whoever makes it.

In: the shape of an array, how it lies and how it is to lie. Out: a `Sending`. Of eight
rows over two devices, that go to

    the next two devices, by rows      the array as it is, by one `device_put`
    the next two devices, whole        cut by a program of the source into the array,
                                       whole; then by one `device_put`
    the next four devices, by rows     cut by a program of the source into four pieces
                                       of two rows, each whole on both of its devices;
                                       then a copy of a piece to each device

A `device_put` to another sharding, or to another number of devices, does all of these
too, but the host waits in it until the array is made (jax 0.10.2). In a pipeline that
is a stage's whole forward, in which no other stage is given work.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from fpipe._core.meshes import is_explicit
from fpipe._core.processes import (
    Link,
    connect,
    ghost,
    is_ghost,
    is_here,
    is_shared,
    lay,
    processes_of,
    put_across,
)
from fpipe._core.pytrees import is_traced
from fpipe._core.watchdog import Describe

Index: TypeAlias = tuple[tuple[int, int], ...]
"""A block of an array: from where to where on each axis."""


class Copy(NamedTuple):
    """A block, by its number, that a device gets."""

    device: Any
    block: int


@dataclasses.dataclass(frozen=True)
class Sending:
    """How one array goes from some devices to others.

    Attributes:
        cuts: the blocks that a program of the source's devices makes; empty if the
            array goes as it is.
        made: how these blocks lie.
        target: how the array lies in the end.
        copies: for each device of `target` the block that it gets a copy of; `None`:
            what is sent goes to all of them by one `device_put`.
    """

    cuts: tuple[Index, ...]
    made: Sharding
    target: Sharding
    copies: tuple["Copy", ...] | None

    @property
    def parts(self) -> int:
        """How many arrays are sent."""
        return max(1, len(self.cuts))

    @functools.cached_property
    def goes_at_once(self) -> bool:
        """Whether one `device_put` sends all shards to other processes: JAX refuses it
        where a process is on both ends.
        """
        ends = processes_of(self.made), processes_of(self.target)
        return self.copies is None and ends[0].isdisjoint(ends[1])

    def shape(self, part: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the array, from that of the first part."""
        if not self.cuts:
            return part
        return tuple(max(b for _, b in ends) for ends in zip(*self.cuts, strict=True))

    def cut(self, array: Any) -> list[Any]:
        """The arrays to send, in the program of the source."""
        return [
            jax.lax.slice(array, [a for a, _ in cut], [b for _, b in cut])
            for cut in self.cuts
        ]


@functools.lru_cache(maxsize=4096)
def sending(shape: tuple[int, ...], source: Sharding, target: Sharding) -> Sending:
    """How an array goes from one sharding to another, over other devices."""
    everything = tuple((0, length) for length in shape)
    if isinstance(source, NamedSharding) and isinstance(target, NamedSharding):
        # One `device_put` moves each shard to the device in the same place.
        if _form(source.mesh) == _form(target.mesh):
            if source.spec == target.spec:
                return Sending((), source, target, None)
            made = NamedSharding(source.mesh, target.spec)
            return Sending((everything,), made, target, None)
    elif len(source.device_set) == len(target.device_set) == 1:
        return Sending((), source, target, None)
    given = target.devices_indices_map(shape)
    indices = [
        tuple(part.indices(length)[:2] for part, length in zip(at, shape, strict=True))
        for at in given.values()
    ]
    cuts = tuple(dict.fromkeys(indices))
    copies = tuple(
        Copy(device, cuts.index(index))
        for device, index in zip(given, indices, strict=True)
    )
    if cuts == (everything,) and source.is_fully_replicated:
        return Sending((), source, target, copies)
    return Sending(cuts, whole(source), target, copies)


def _form(mesh: Any) -> tuple[tuple[str, int], ...]:
    return tuple(mesh.shape.items())


def whole(sharding: Sharding) -> Sharding:
    """All of an array on each device of a sharding."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, P())
    return sharding


def receive(sendings: Sequence[Sending], arrays: Sequence[Any]) -> list[Any]:
    """Put arrays where they are sent to: for each sending its parts."""
    # All copies are one `device_put`: one for each would cost a dispatch each.
    sent: list[Any] = []
    places: list[Any] = []
    rest = iter(arrays)
    for to in sendings:
        parts = [next(rest) for _ in range(to.parts)]
        if to.copies is None:
            sent += parts
            places.append(to.target)
            continue
        # Each device of the source has all blocks, and sends its share of them.
        for n, (device, block) in enumerate(to.copies):
            part = parts[block]
            sent.append(part.addressable_data(n % len(part.sharding.device_set)))
            places.append(device)
    put = iter(jax.device_put(sent, places))
    received = []
    for to in sendings:
        shards = [next(put) for _ in to.copies or (None,)]
        if to.copies is None:
            received += shards
        else:
            shape = to.shape(shards[0].shape)
            received.append(joined(shape, shards[0].dtype, to.target, shards))
    return received


def send_across(
    sendings: Sequence[Sending],
    arrays: Sequence[Any],
    describe: Describe,
    owned: bool = False,
) -> list[Any]:
    """`receive` from another process: every process calls it, and gives ghosts where it
    has none of the arrays.

    Arguments:
        arrays: all on the devices of one place.
        describe, owned: as for `put_across`.
    """
    rest = iter(arrays)
    of_each = [[next(rest) for _ in range(to.parts)] for to in sendings]
    # One `device_put` for all that goes from the same devices to the same ones.
    whole: list[Any] = []
    targets: list[Sharding] = []
    for to, parts in zip(sendings, of_each, strict=True):
        if to.goes_at_once:
            whole += parts
            targets.append(to.target)
    put = iter(put_across(whole, targets, describe, owned))
    sent: list[Any] = []
    for to, parts in zip(sendings, of_each, strict=True):
        if to.goes_at_once:
            sent.append(next(put))
        elif to.copies is None:
            sent.append(_shard_by_shard(to, parts[0], describe, owned))
        else:
            sent.append(_copied(to, parts, to.copies, describe))
    return sent


def _shard_by_shard(to: Sending, array: Any, describe: Describe, owned: bool) -> Any:
    """An array whose shards go to the devices in the same places, some of them in the
    process that they are in already.
    """
    own: list[Any] = []
    for source, target in zip(_in_order(to.made), _in_order(to.target), strict=True):
        own += _to_device(_on(array, source), source, target, describe, owned)
    return joined(array.shape, array.dtype, to.target, own)


def _copied(
    to: Sending, parts: Sequence[Any], copies: Sequence[Copy], describe: Describe
) -> Any:
    """An array of another process that is sent device by device."""
    sources = sorted(parts[0].sharding.device_set, key=lambda device: device.id)
    own: list[Any] = []
    for n, (device, block) in enumerate(copies):
        # All of them have all blocks. One of the same process need not send any.
        near = [s for s in sources if s.process_index == device.process_index]
        source = near[0] if near else sources[n % len(sources)]
        part = _on(parts[block], source)
        own += _to_device(part, source, device, describe)
    return joined(to.shape(parts[0].shape), parts[0].dtype, to.target, own)


def _to_device(
    part: Any, source: Any, device: Any, describe: Describe, owned: bool = False
) -> list[Any]:
    """What one device has, on another one; nothing, if that is of another process."""
    target = SingleDeviceSharding(device)
    if source.process_index != device.process_index:
        (part,) = put_across([part], [target], describe, owned)
    elif is_here(target):
        part = jax.device_put(part, target)
    return [part] if is_here(target) else []


def _in_order(sharding: Sharding) -> list[Any]:
    """The devices of a sharding in the order of its mesh."""
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return list(sharding.mesh.devices.flat)
    return list(sharding.device_set)


def _on(array: Any, device: Any) -> Any:
    """What a device has of an array."""
    for shard in array.addressable_shards:
        if shard.device == device:
            return shard.data
    shape = array.sharding.shard_shape(array.shape)
    return ghost(shape, array.dtype, SingleDeviceSharding(device))


def bring_across(
    arrays: Sequence[Any], targets: Sequence[Sharding], describe: Describe
) -> list[Any]:
    """`bring` from another process: every process calls it, and gives ghosts where it
    has none of the arrays.

    Arguments:
        arrays: all on the devices of one place.
        describe: says what they are, if they do not come.
    """
    sendings = [
        sending(array.shape, array.sharding, target)
        for array, target in zip(arrays, targets, strict=True)
    ]
    parts: list[Any] = []
    for array, to in zip(arrays, sendings, strict=True):
        if to.cuts and is_ghost(array):
            shapes = [tuple(b - a for a, b in cut) for cut in to.cuts]
            parts += [ghost(shape, array.dtype, to.made) for shape in shapes]
        else:
            parts += _cutter(to)(array) if to.cuts else [array]
    return send_across(sendings, parts, describe)


def evenly(shape: Sequence[int]) -> NamedSharding:
    """How an array lies over all devices of all processes: cut along the longest axis
    that can be divided; whole on each, if there is none.
    """
    mesh = Mesh(np.array(jax.devices()), "device")
    axes = [k for k, size in enumerate(shape) if size % mesh.size == 0]
    along = max(axes, key=lambda k: shape[k], default=None)
    spec = P() if along is None else P(*[None] * along, "device")
    return NamedSharding(mesh, spec)


def spread_evenly(arrays: Sequence[Any]) -> list[Any]:
    """Arrays over all devices of all processes, each along the longest axis that can be
    divided. Every process calls it, with the same arrays; what is no array of JAX
    stays.
    """
    spread = list(arrays)
    for n, array in enumerate(arrays):
        if not isinstance(array, jax.Array):
            continue
        target = evenly(array.shape)
        if array.sharding.device_set == target.device_set:
            spread[n] = lay(array, target)
            continue
        connect(
            Link(source, device)
            for source in sorted(array.sharding.device_set, key=lambda d: d.id)
            for device in jax.devices()
            if source.process_index != device.process_index
        )
        (spread[n],) = bring_across([array], [target], _spreading)
    return spread


def _spreading() -> str:
    return "arrays that are spread over all devices"


def joined(
    shape: tuple[int, ...], dtype: Any, target: Sharding, shards: Sequence[Any]
) -> Any:
    """An array of what each device of this process has of it."""
    if isinstance(target, SingleDeviceSharding) and shards:
        return shards[0]
    return jax.make_array_from_single_device_arrays(
        shape, target, list(shards), dtype=dtype
    )


def bring(arrays: Sequence[Any], targets: Sequence[Sharding]) -> list[Any]:
    """Arrays of the caller, wherever they lie, as shardings say."""
    out = list(arrays)
    parts: list[Any] = []
    sendings: list[Sending] = []
    sent: list[int] = []
    put: list[int] = []
    for n, (array, target) in enumerate(zip(arrays, targets, strict=True)):
        # In a trace nothing lies anywhere yet.
        if is_traced(array):
            put.append(n)
            continue
        # What is on the host is made, so that nobody waits in a `device_put`, and over
        # the same devices that is a program.
        source = array.sharding if isinstance(array, jax.Array) else None
        if source == target:
            continue
        if is_shared(target):
            out[n] = lay(array, target)
            continue
        if (
            not isinstance(source, NamedSharding | SingleDeviceSharding)
            or is_explicit(array)
            or source.device_set == target.device_set
        ):
            put.append(n)
            continue
        to = sending(array.shape, source, target)
        parts += _cutter(to)(array) if to.cuts else [array]
        sendings.append(to)
        sent.append(n)
    made = jax.device_put([arrays[n] for n in put], [targets[n] for n in put])
    for n, array in zip(put, made, strict=True):
        out[n] = array
    if sent:
        for n, array in zip(sent, receive(sendings, parts), strict=True):
            out[n] = array
    return out


@functools.lru_cache(maxsize=1024)
def _cutter(to: Sending) -> Any:
    """The program of the source that makes what is sent."""
    return jax.jit(to.cut, out_shardings=[to.made] * len(to.cuts))
