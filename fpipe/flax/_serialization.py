"""`flax.serialization` of an `fpipe.Packed`: by layer, as for gathered parameters.

In: a `Packed`, alone or in a state. Out: the state dict that Flax makes of
`pipe.gather(params)`, with arrays on the host:

    Packed(0['w']: float32[2,8,8])  ->  {"0": {"w": float32[8,8]}, "1": {"w": …}}

So a saved file does not depend on the partition. It can be restored into a `Packed` of
another partition, into placed parameters and into plain parameters. Rows go through the
host, so no device ever holds the whole model.

Flax keeps one pair of functions for each type. This pair is registered when
`fpipe.flax` is imported, because the core of fpipe does not import Flax.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import serialization

from fpipe._core.errors import a_type
from fpipe._core.pytrees import Tracer, describe, float0_like, is_array
from fpipe._executors.scan.packing import Entry, Packed
from fpipe._split.stacks import RowBlocks, joined


def register() -> None:
    """Tell Flax how a `Packed` and a leaf in blocks of rows are saved and restored."""
    serialization.register_serialization_state(
        RowBlocks, _join_blocks, _split_blocks, override=True
    )
    serialization.register_serialization_state(
        Packed, _to_state_dict, _from_state_dict, override=True
    )


def _join_blocks(leaf: RowBlocks) -> Any:
    """The whole leaf, as the plain model saves it."""
    return joined(leaf.with_blocks(map(_on_host, leaf.blocks)))


def _split_blocks(target: RowBlocks, state: Any) -> RowBlocks:
    """A whole leaf in the blocks of another one."""
    where = serialization.current_path()
    if not is_array(state) or state.shape != target.shape:
        raise ValueError(
            f"`flax.serialization.from_state_dict(...)`: at {where}: an "
            f"fpipe.RowBlocks of the shape {target.shape} is restored from a whole "
            f"array, got {describe(state)}; it is a state of another model"
        )
    return target.of_whole(np.asarray(state))


def _to_state_dict(packed: Packed) -> dict[str, Any]:
    packing = packed.packing
    rows = [_on_host(row) for row in packed.arrays]

    def leaf(entry: Entry) -> Any:
        if not packed.has_gradient(entry):
            return float0_like(packing.shape(entry))
        row = rows[packing.where[entry].row]
        # An update that changes nothing is one zero for all devices.
        return packing.take(rows, entry) if np.ndim(row) else row

    leaves = [leaf(entry) for entry in packing.shown_entries]
    return serialization.to_state_dict(packing.shown_spec.unpack(leaves))


def _on_host(row: Any) -> Any:
    """A row as an array of the host; tracers stay."""
    if not isinstance(row, jax.Array) or isinstance(row, Tracer):
        return row
    if not row.is_fully_addressable:
        raise ValueError(
            "`flax.serialization.to_state_dict(...)`: an array lies on several "
            "processes, and this one has a part of it; gather it in all of them first: "
            "`pipe.gather(params)`, `fpipe.optim.gather(state)`"
        )
    return np.asarray(row)


def _from_state_dict(target: Packed, state: Any) -> Packed:
    packing = target.packing
    where = serialization.current_path()
    if not isinstance(state, Mapping):
        raise ValueError(
            f"`flax.serialization.from_state_dict(...)`: at {where}: an fpipe.Packed "
            "is restored from a state dict with one entry per layer, got "
            f"{a_type(state)}"
        )
    whole = packing.shown_shapes
    restored = serialization.from_state_dict(whole, dict(state))
    leaves, treedef = jax.tree.flatten(whole)
    found = treedef.flatten_up_to(restored)
    arrays = [v for v, leaf in zip(found, leaves, strict=True) if is_array(leaf)]
    given = dict(zip(packing.shown_entries, arrays, strict=True))
    kept = {e: v for e, v in given.items() if target.has_gradient(e)}
    for entry, value in kept.items():
        _check(where, value, target, entry)
    rows = []
    for old, row in zip(target.arrays, packing.rows, strict=True):
        if kept.keys().isdisjoint(row.entries) or not np.ndim(old):
            rows.append(old)
            continue
        blocks = [
            np.zeros(row.shape, old.dtype)
            if entry not in kept
            else row.put(np.asarray(kept[entry]))
            for entry in row.entries
        ]
        rows.append(_like(old, np.stack(blocks)))
    return Packed(tuple(rows), packing, target.absent)


def _check(where: str, value: Any, target: Packed, entry: Entry) -> None:
    """Refuse what is no array of the form that the target has in its place: flat rows
    would take any other.
    """
    packing = target.packing
    name, shape = packing.name(entry), packing.shape(entry).shape
    dtype = target.arrays[packing.where[entry].row].dtype
    if not is_array(value) or value.shape != shape:
        raise ValueError(
            f"`flax.serialization.from_state_dict(...)`: at {where}: {name} is "
            f"{describe(value)}, and the target has the shape {shape} there; "
            "it is a state of another model"
        )
    if value.dtype != dtype:
        raise ValueError(
            f"`flax.serialization.from_state_dict(...)`: at {where}: {name} is "
            f"{describe(value)}, and the target has {dtype} there: cast what "
            "is restored, or give a target of its dtype"
        )


def _like(old: Any, row: np.ndarray) -> Any:
    """A row of the host, laid over devices as another one is; on the host, if that is
    on no devices.
    """
    sharding = getattr(old, "sharding", None)
    if sharding is None:
        return row
    # Each process gives the blocks of its own devices.
    return jax.make_array_from_callback(row.shape, sharding, lambda index: row[index])
