"""How bundles of arrays lie in a pool or on a wire.

In: the arrays of each kind of bundle that a pool holds. Out: the arrays of one slot,
and where in them each array of a bundle is.

If all bundles are alike a slot has their arrays as they are. Otherwise they share
arrays, one for each dtype: arrays with the microbatch's rows are laid side by side in
one with those rows, so that a batch that is sharded stays so, and others are flattened.
Each is as large as the largest bundle needs it. With microbatches of 2 rows and a last
one of 1 row, three kinds:

    bundle                        f32[2, 7]         f32[4]
    f32[2, 4], f32[2, 3]          a a a a b b b     . . . .
                                  a a a a b b b
    f32[2, 5], f32[4]             c c c c c . .     d d d d
                                  c c c c c . .
    f32[1, 4], f32[1, 3]          e e e e f f f     . . . .
                                  . . . . . . .

A batch that is sharded has its rows on several devices, so many of each microbatch. The
array then has an axis of these shards, and a smaller microbatch fills the beginning of
each, where its rows are.

Arrays that an offloading policy has moved to the host share none with others. They are
the last arrays of a slot.

The functions at the end make what lies in a buffer before anything is put there.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fpipe._core.pytrees import HostShape, device_bytes, host_bytes, on_host
from fpipe._executors.scan.machine import Avals


class Location(NamedTuple):
    """Where an array of a bundle is: in which array of the slot, from where on its last
    axis, and in which shape. On all other axes it begins where the slot does.
    """

    group: int
    start: int
    shape: tuple[int, ...]


class _Group(NamedTuple):
    """What the arrays that lie side by side in one array of a slot have in common."""

    host: bool
    dtype: str
    has_rows: bool


class Layout(NamedTuple):
    """A slot.

    Attributes:
        shapes: its arrays, those on the host last.
        has_rows: which of them have rows.
        locations: for each kind of bundle where its arrays are.
    """

    shapes: list[jax.ShapeDtypeStruct]
    has_rows: list[bool]
    locations: dict[Avals, list[Location]]

    @property
    def on_device(self) -> int:
        """How many of the arrays are on the device: the first ones."""
        return sum(not on_host(a) for a in self.shapes)


@dataclasses.dataclass(frozen=True)
class Storage:
    """The form of the bundles in one pool.

    Attributes:
        kinds: the arrays of each kind of bundle.
        rows: of a microbatch of each shape.
        shards: the devices over which a batch is sharded.
    """

    kinds: tuple[Avals, ...]
    rows: tuple[int, ...]
    shards: int = 1

    @cached_property
    def _sizes(self) -> frozenset[int]:
        """The lengths of a first axis by which arrays with rows are told from others.

        If microbatches differ in size, only those sizes count that the shards divide:
        the rows of others are whole on each device.
        """
        even = frozenset(n for n in self.rows if n % self.shards == 0)
        return even if even and len(set(self.rows)) > 1 else frozenset(self.rows)

    def _has_rows(self, a: jax.ShapeDtypeStruct) -> bool:
        # By its length: an array that only happens to be as long lies there too, which
        # is as good.
        return bool(a.shape) and a.shape[0] in self._sizes

    def _leading(self, rows: int) -> tuple[int, ...]:
        """The leading axes of an array with rows, where bundles share arrays."""
        # A smaller number of rows has to be the beginning of each shard's.
        if len(self._sizes) > 1 and self._sharded:
            return self.shards, rows // self.shards
        return (rows,)

    @property
    def _sharded(self) -> bool:
        """Whether each shard of a batch has rows of each slot."""
        return self.shards > 1 and all(n % self.shards == 0 for n in self._sizes)

    @cached_property
    def layout(self) -> Layout:
        """The arrays of a slot, and where in them each array of each kind is."""
        # The usual case, in which nothing is reshaped.
        if len(self.kinds) == 1:
            shapes = [stored_shape(a) for a in self.kinds[0]]
            order = sorted(range(len(shapes)), key=lambda n: on_host(shapes[n]))
            places = [
                Location(order.index(n), 0, a.shape) for n, a in enumerate(shapes)
            ]
            shapes = [shapes[n] for n in order]
            has_rows = list(map(self._has_rows, shapes))
            return Layout(shapes, has_rows, {self.kinds[0]: places})
        # An array of the slot is known by whether it is on the host, its dtype, and
        # whether it has the rows.
        widths: dict[_Group, int] = {}
        spans: dict[Avals, list[tuple[_Group, int, tuple[int, ...]]]] = {}
        for kind in self.kinds:
            # Each kind of bundle fills the slot from its beginning.
            ends: dict[_Group, int] = {}
            spans[kind] = []
            for a in map(stored_shape, kind):
                has_rows = self._has_rows(a)
                leading = self._leading(a.shape[0]) if has_rows else ()
                width = math.prod(a.shape[1:] if has_rows else a.shape)
                key = _Group(on_host(a), str(a.dtype), has_rows)
                start = ends.get(key, 0)
                ends[key] = start + width
                spans[kind].append((key, start, (*leading, width)))
            for key, end in ends.items():
                widths[key] = max(widths.get(key, 0), end)
        # Sorted, so that every process lays them out alike.
        groups = sorted(widths)
        shapes = []
        for group in groups:
            leading = self._leading(max(self._sizes)) if group.has_rows else ()
            kind = HostShape if group.host else jax.ShapeDtypeStruct
            shapes.append(kind((*leading, widths[group]), jnp.dtype(group.dtype)))
        locations = {
            kind: [
                Location(groups.index(key), start, shape) for key, start, shape in own
            ]
            for kind, own in spans.items()
        }
        return Layout(shapes, [group.has_rows for group in groups], locations)

    @property
    def slot_bytes(self) -> int:
        """The bytes of a slot on each device."""
        return self._bytes(device_bytes)

    @property
    def slot_host_bytes(self) -> int:
        """The bytes of a slot in the host's memory, for each device."""
        return self._bytes(host_bytes)

    def _bytes(self, count: Callable[[Any], int]) -> int:
        """What has rows is sharded, if the shards divide them."""
        parts = self.shards if self._sharded else 1
        pairs = zip(self.layout.shapes, self.layout.has_rows, strict=True)
        return sum(count(a) // (parts if has_rows else 1) for a, has_rows in pairs)

    def pack(
        self, avals: Avals, arrays: Sequence[Any], old: Sequence[Any]
    ) -> list[Any]:
        """A bundle as the arrays of a slot, for an outbox; what it does not fill stays
        as in `old`.
        """
        given = [as_stored(a) for a in arrays]
        if len(self.kinds) == 1:
            return given
        out = list(old)
        # What lies beside is kept rather than cleared: clearing it would be one more
        # write, and nobody reads it.
        for a, (group, start, shape) in zip(
            given, self.layout.locations[avals], strict=True
        ):
            place = [*[0] * (len(shape) - 1), start]
            out[group] = jax.lax.dynamic_update_slice(
                out[group], a.reshape(shape), place
            )
        return out

    def put(
        self, avals: Avals, arrays: Sequence[Any], pool: Sequence[Any], slot: Any
    ) -> list[Any]:
        """A bundle into a slot of a pool; `pool` are its arrays on the device."""
        # Straight into the pool, array by array: to pack a slot first would read and
        # write it once more.
        given = [as_stored(a) for a in arrays]
        out = list(pool)
        for a, (group, start, shape) in zip(
            given, self.layout.locations[avals], strict=True
        ):
            if group >= len(out):
                continue
            out[group] = jax.lax.dynamic_update_slice(
                out[group], a.reshape(1, *shape), _place(slot, start, shape)
            )
        return out

    def stage(
        self, avals: Avals, arrays: Sequence[Any], old: Sequence[Any]
    ) -> list[Any]:
        """What of a bundle goes to the host, as arrays of a slot that are still on the
        device; what it does not fill stays as in `old`.
        """
        out = list(old)
        for a, (group, start, shape) in zip(
            arrays, self.layout.locations[avals], strict=True
        ):
            n = group - self.layout.on_device
            if n >= 0 and len(self.kinds) == 1:
                out[n] = a
            elif n >= 0:
                place = [*[0] * (len(shape) - 1), start]
                out[n] = jax.lax.dynamic_update_slice(out[n], a.reshape(shape), place)
        return out

    def take(self, avals: Avals, k: int, pool: Sequence[Any], slot: Any) -> Any:
        """The `k`-th array of the bundle in a slot; `pool` are all of its arrays."""
        aval = avals[k]
        group, start, shape = self.layout.locations[avals][k]
        part = jax.lax.dynamic_slice(
            pool[group], _place(slot, start, shape), (1, *shape)
        )
        return from_stored(part.reshape(stored_shape(aval).shape), aval)


def _place(slot: Any, start: int, shape: tuple[int, ...]) -> list[Any]:
    """Where an array of a shape begins in a pool: its slot, then each of its axes."""
    place = [slot, *[0] * (len(shape) - 1), start][: 1 + len(shape)]
    return [jnp.int32(n) for n in place]


def is_key(dtype: Any) -> bool:
    """Whether a dtype is that of PRNG keys."""
    return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def stored_shape(aval: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape of an array as it is stored: PRNG keys as numbers."""
    if not is_key(aval.dtype):
        kind = HostShape if on_host(aval) else jax.ShapeDtypeStruct
        return kind(aval.shape, aval.dtype)
    return jax.eval_shape(jax.random.key_data, aval)


def as_stored(array: Any) -> Any:
    """An array as it is stored."""
    return jax.random.key_data(array) if is_key(array.dtype) else array


def from_stored(array: Any, aval: Any) -> Any:
    """The inverse of `as_stored`: keys again, if the dtype of `aval` says so."""
    if not is_key(aval.dtype):
        return array
    implementation = jax.random.key_impl(jnp.zeros((), aval.dtype))
    return jax.random.wrap_key_data(array, impl=implementation)


def own_zeros() -> Iterator[jax.Array]:
    """Zeros that XLA takes for different numbers.

    It makes one array of all that are filled with the same number, and copies it into
    each buffer before a loop starts. A buffer that is filled with a zero of its own is
    filled where it lies.
    """
    zero = jax.lax.optimization_barrier(jnp.int32(0))
    return (zero < -n for n in itertools.count())


def filled(shape: tuple[int, ...], dtype: Any, zero: jax.Array) -> jax.Array:
    """A buffer of zeros, all of them the one that is given."""
    # Numbers with a type of their own, such as Flax's scales of fp8, are not cast.
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return jnp.zeros(shape, dtype)
    return jnp.full(shape, zero.astype(dtype))


def empty(
    shape: tuple[int, ...], dtype: Any, zero: jax.Array, alone: bool
) -> jax.Array:
    """What lies in a buffer before anything is put there. No result depends on it:
    tests put NaN here.

    Arguments:
        zero: see `own_zeros`.
        alone: whether the mesh has only the axis of stages.
    """
    # Over a data axis XLA would allocate it for all rows, and then cut out those of the
    # device.
    if not alone:
        return filled(shape, dtype, zero)
    # Accelerators leave it as it is. XLA for CPUs can only fill.
    return jax.lax.platform_dependent(
        zero,
        cpu=lambda zero: filled(shape, dtype, zero),
        default=lambda _: jax.lax.empty(shape, dtype),
    )


def empty_on_host(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The same in the host's memory."""
    # XLA would fill `jnp.empty` on the device, all slots at once, and copy it.
    return jax.device_put(jax.lax.empty(shape, dtype), jax.memory.Space.Host)
