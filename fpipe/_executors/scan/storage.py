"""How bundles of arrays lie in a pool or on a wire: as they are if all are alike, else
packed by dtype.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._executors.scan.machine import Avals


class _Place(NamedTuple):
    """Where an array of a bundle is: in which packed array, and from where to where on
    its last axis.
    """

    group: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Storage:
    """The form of the bundles in one pool.

    Bundles of different kinds share arrays, one for each dtype. Arrays with the
    microbatch's rows are laid side by side in one with those rows, so that a batch that
    is sharded stays so; others are flattened. Each is as large as the largest bundle
    needs it.

    Attributes:
        kinds: the arrays of each kind of bundle.
        rows: of a microbatch.
    """

    kinds: tuple[Avals, ...]
    rows: int

    @cached_property
    def _layout(self) -> tuple[list[jax.ShapeDtypeStruct], dict[Avals, list[_Place]]]:
        if len(self.kinds) == 1:
            alone = [raw(a) for a in self.kinds[0]]
            return alone, {self.kinds[0]: [_Place(n, 0, 0) for n in range(len(alone))]}
        sizes: dict[tuple[str, bool], int] = {}
        where: dict[Avals, list[tuple[tuple[str, bool], int, int]]] = {}
        for kind in self.kinds:
            ends: dict[tuple[str, bool], int] = {}
            where[kind] = []
            for a in map(raw, kind):
                key = (str(a.dtype), self._has_rows(a.shape))
                start, size = (
                    ends.get(key, 0),
                    _size(a.shape[1:] if key[1] else a.shape),
                )
                ends[key] = start + size
                where[kind].append((key, start, start + size))
            for key, end in ends.items():
                sizes[key] = max(sizes.get(key, 0), end)
        groups = sorted(sizes)
        shapes = [
            jax.ShapeDtypeStruct(
                (self.rows, sizes[key]) if key[1] else (sizes[key],), jnp.dtype(key[0])
            )
            for key in groups
        ]
        places = {
            kind: [
                _Place(groups.index(key), start, stop) for key, start, stop in entries
            ]
            for kind, entries in where.items()
        }
        return shapes, places

    @property
    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """The arrays of one slot."""
        return self._layout[0]

    def pack(
        self, avals: Avals, arrays: Sequence[Any], old: Sequence[Any]
    ) -> list[Any]:
        """A bundle as the arrays of a slot; what it does not fill keeps what is there."""
        given = [unwrapped(a) for a in arrays]
        if len(self.kinds) == 1:
            return given
        out = list(old)
        for a, place in zip(given, self._layout[1][avals], strict=True):
            rows = len(self.shapes[place.group].shape) == 2
            flat = a.reshape(self.rows, -1) if rows else a.reshape(-1)
            out[place.group] = jax.lax.dynamic_update_slice_in_dim(
                out[place.group], flat, place.start, -1
            )
        return out

    def put(
        self, avals: Avals, arrays: Sequence[Any], pool: Sequence[Any], slot: Any
    ) -> list[Any]:
        """A bundle into a slot of a pool."""
        given = [unwrapped(a) for a in arrays]
        out = list(pool)
        for a, place in zip(given, self._layout[1][avals], strict=True):
            shape = self.shapes[place.group].shape
            if len(self.kinds) > 1:
                a = a.reshape(self.rows, -1) if len(shape) == 2 else a.reshape(-1)
            at = [slot, *([0] * (len(shape) - 1)), *([place.start] if shape else [])]
            out[place.group] = jax.lax.dynamic_update_slice(
                out[place.group], a[None], _indices(at)
            )
        return out

    def take(self, avals: Avals, k: int, pool: Sequence[Any], slot: Any) -> Any:
        """The `k`-th array of the bundle in a slot."""
        place, aval = self._layout[1][avals][k], avals[k]
        whole, shape = pool[place.group], self.shapes[place.group].shape
        if len(self.kinds) == 1:
            return wrapped(
                jax.lax.dynamic_index_in_dim(whole, slot, keepdims=False), aval
            )
        at = [slot, *([0] * (len(shape) - 1)), place.start]
        part = jax.lax.dynamic_slice(
            whole, _indices(at), (1, *shape[:-1], place.stop - place.start)
        )
        return wrapped(part.reshape(raw(aval).shape), aval)

    def _has_rows(self, shape: tuple[int, ...]) -> bool:
        return bool(shape) and shape[0] == self.rows


def _indices(at: Sequence[Any]) -> list[Any]:
    return [jnp.int32(n) for n in at]


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def is_key(dtype: Any) -> bool:
    """Whether a dtype is that of PRNG keys."""
    return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def raw(aval: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape of an array as it is stored: PRNG keys as numbers."""
    if not is_key(aval.dtype):
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    return jax.eval_shape(jax.random.key_data, aval)


def unwrapped(array: Any) -> Any:
    """An array as it is stored."""
    return jax.random.key_data(array) if is_key(array.dtype) else array


def wrapped(array: Any, aval: Any) -> Any:
    """The inverse; of `aval` only the dtype counts."""
    if not is_key(aval.dtype):
        return array
    return jax.random.wrap_key_data(
        array, impl=jax.random.key_impl(jnp.zeros((), aval.dtype))
    )
