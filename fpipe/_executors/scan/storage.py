"""How bundles of arrays lie in a pool or on a wire.

In: the arrays of each kind of bundle that a pool holds. Out: the arrays of one slot,
and where in them each array of a bundle is.

If all bundles are alike a slot has their arrays as they are. Otherwise they share
arrays, one for each dtype: arrays with the microbatch's rows are laid side by side in
one with those rows, so that a batch that is sharded stays so, and others are flattened.
Each is as large as the largest bundle needs it. With microbatches of 2 rows, two kinds:

    bundle                        f32[2, 7]         f32[4]
    f32[2, 4], f32[2, 3]          a a a a b b b     . . . .
                                  a a a a b b b
    f32[2, 5], f32[4]             c c c c c . .     d d d d
                                  c c c c c . .
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fpipe._executors.scan.machine import Avals


class Location(NamedTuple):
    """Where an array of a bundle is: in which array of the slot, and from where to
    where on its last axis.
    """

    group: int
    start: int
    stop: int


class Layout(NamedTuple):
    """A slot: its arrays, and for each kind of bundle where its arrays are."""

    shapes: list[jax.ShapeDtypeStruct]
    locations: dict[Avals, list[Location]]


@dataclasses.dataclass(frozen=True)
class Storage:
    """The form of the bundles in one pool.

    Attributes:
        kinds: the arrays of each kind of bundle.
        rows: of a microbatch.
    """

    kinds: tuple[Avals, ...]
    rows: int

    @cached_property
    def layout(self) -> Layout:
        """The arrays of a slot, and where in them each array of each kind is."""
        # The usual case, in which nothing is reshaped: start and stop are not used.
        if len(self.kinds) == 1:
            shapes = [stored_shape(a) for a in self.kinds[0]]
            places = [Location(n, 0, 0) for n in range(len(shapes))]
            return Layout(shapes, {self.kinds[0]: places})
        # An array of the slot is known by its dtype and whether it has the rows.
        widths: dict[tuple[str, bool], int] = {}
        spans: dict[Avals, list[tuple[tuple[str, bool], int, int]]] = {}
        for kind in self.kinds:
            # Each kind of bundle fills the slot from its beginning.
            ends: dict[tuple[str, bool], int] = {}
            spans[kind] = []
            for a in map(stored_shape, kind):
                # By its length: an array that only happens to be as long lies there
                # too, which is as good.
                has_rows = bool(a.shape) and a.shape[0] == self.rows
                key = (str(a.dtype), has_rows)
                start = ends.get(key, 0)
                ends[key] = start + math.prod(a.shape[1:] if has_rows else a.shape)
                spans[kind].append((key, start, ends[key]))
            for key, end in ends.items():
                widths[key] = max(widths.get(key, 0), end)
        # Sorted, so that every process lays them out alike.
        groups = sorted(widths)
        shapes = []
        for dtype, has_rows in groups:
            width = widths[dtype, has_rows]
            shape = (self.rows, width) if has_rows else (width,)
            shapes.append(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))
        locations = {
            kind: [Location(groups.index(key), start, stop) for key, start, stop in own]
            for kind, own in spans.items()
        }
        return Layout(shapes, locations)

    def pack(
        self, avals: Avals, arrays: Sequence[Any], old: Sequence[Any]
    ) -> list[Any]:
        """A bundle as the arrays of a slot, for an outbox; what it does not fill stays
        as in `old`.
        """
        given = [as_stored(a) for a in arrays]
        if len(self.kinds) == 1:
            return given
        shapes, locations = self.layout
        out = list(old)
        # What lies beside is kept rather than cleared: clearing it would be one more
        # write, and nobody reads it.
        for a, (group, start, _) in zip(given, locations[avals], strict=True):
            flat = a.reshape(*shapes[group].shape[:-1], -1)
            out[group] = jax.lax.dynamic_update_slice_in_dim(
                out[group], flat, start, -1
            )
        return out

    def put(
        self, avals: Avals, arrays: Sequence[Any], pool: Sequence[Any], slot: Any
    ) -> list[Any]:
        """A bundle into a slot of a pool."""
        # Straight into the pool, array by array: to pack a slot first would read and
        # write it once more.
        given = [as_stored(a) for a in arrays]
        shapes, locations = self.layout
        out = list(pool)
        for a, (group, start, _) in zip(given, locations[avals], strict=True):
            shape = shapes[group].shape
            if len(self.kinds) > 1:
                a = a.reshape(*shape[:-1], -1)
            # The slot, then the beginning of each axis but the last.
            place = [slot, *[0] * (len(shape) - 1)]
            if shape:
                place.append(start)
            out[group] = jax.lax.dynamic_update_slice(
                out[group], a[None], [jnp.int32(n) for n in place]
            )
        return out

    def take(self, avals: Avals, k: int, pool: Sequence[Any], slot: Any) -> Any:
        """The `k`-th array of the bundle in a slot."""
        aval = avals[k]
        shapes, locations = self.layout
        group, start, stop = locations[avals][k]
        if len(self.kinds) == 1:
            part = jax.lax.dynamic_index_in_dim(pool[group], slot, keepdims=False)
            return from_stored(part, aval)
        outer = shapes[group].shape[:-1]
        place = [slot, *[0] * len(outer), start]
        part = jax.lax.dynamic_slice(
            pool[group], [jnp.int32(n) for n in place], (1, *outer, stop - start)
        )
        return from_stored(part.reshape(stored_shape(aval).shape), aval)


def is_key(dtype: Any) -> bool:
    """Whether a dtype is that of PRNG keys."""
    return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def stored_shape(aval: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape of an array as it is stored: PRNG keys as numbers."""
    if not is_key(aval.dtype):
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
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
