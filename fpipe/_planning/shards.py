"""Which device holds which part of each array, as a picture.

In: a pytree of arrays, such as placed parameters. Out: an SVG document with a row for
each array and a column for each device. Of parameters on two meshes of two devices

                         cpu:0   cpu:1   cpu:2   cpu:3
    0/up float32[8,32]   [# ]    [ #]    [  ]    [  ]      P(None, 'model')
    1/up float32[8,32]   [  ]    [  ]    [# ]    [ #]      P(None, 'model')
    bytes                 512     512     512     512

a frame is the whole array, and the filled part of it what the device has.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import NamedSharding

from fpipe._core.errors import shown
from fpipe._core.pytrees import PyTree, describe
from fpipe._planning.text import size
from fpipe.schedules._draw.elements import (
    LETTER,
    LINE,
    MARGIN,
    SIZE,
    document,
    rect,
    text,
)
from fpipe.schedules._draw.picture import COLOURS, IDLE, INK
from fpipe.schedules._html import escape

Block: TypeAlias = tuple[tuple[int, int], ...]
"""A part of an array: from where to where on each axis."""

CAPTION = "a frame is an array, the filled part what the device holds of it"
# Of a frame, in pixels, and the room around it.
_WIDTH, _HEIGHT = 52.0, 26.0
_COLUMN, _ROW = 64.0, 34.0


@dataclasses.dataclass(frozen=True)
class ShardedArray:
    """An array, and what devices hold of it.

    Attributes:
        name: its path, and its type.
        spec: how it is sharded; `""`: nothing names axes of a mesh.
        shape: of all of it.
        parts: by device what that holds, in the order of the devices.
        item: the bytes of one number.
    """

    name: str
    spec: str
    shape: tuple[int, ...]
    parts: Mapping[Any, Block]
    item: int

    @property
    def cut(self) -> tuple[int, ...]:
        """The axes that are cut, so that a device holds a part."""
        return tuple(
            axis
            for axis, length in enumerate(self.shape)
            if any(end - start < length for start, end in self._ends(axis))
        )

    def _ends(self, axis: int) -> list[tuple[int, int]]:
        return [block[axis] for block in self.parts.values()]

    def bytes_on(self, device: Any) -> int:
        """What a device has of it."""
        count = self.item if device in self.parts else 0
        for start, end in self.parts.get(device, ()):
            count *= end - start
        return count


def shards_svg(tree: PyTree) -> str:
    """Draw which device holds which part of each array, as an SVG document.

    Each array has a row, and each device a column. A frame is the whole array. It shows
    two axes, one down and one to the right: the first two that are sharded. If fewer
    are sharded, the first of the other axes take their place. Devices that hold parts
    of the same arrays have one colour. The last row has the bytes of each device.

    Arguments:
        tree: a pytree of arrays: placed parameters, gradients, the state of an
            optimizer. Shapes with a `sharding` will do.

    Returns:
        The document. It has a white background, for light and dark pages.

    Raises:
        TypeError: an entry that no device holds.
        ValueError: no array at all.

    Example:
        >>> fpipe.shards_svg({"w": jnp.ones((2, 3))}).startswith("<svg")
        True
    """
    arrays = sharded_arrays(tree)
    devices = list(dict.fromkeys(d for array in arrays for d in array.parts))
    left = MARGIN + LETTER * SIZE * max(len(array.name) for array in arrays)
    specs = LETTER * SIZE * max(len(array.spec) for array in arrays)
    right = left + _COLUMN * len(devices)
    colours = _colours(arrays)
    top = MARGIN + 2 * LINE
    parts = [text(MARGIN, MARGIN + SIZE, CAPTION)]
    middle = 'text-anchor="middle"'
    for n, device in enumerate(devices):
        x = left + _COLUMN * (n + 0.5)
        parts.append(text(x, top, str(device), middle))
    for k, array in enumerate(arrays):
        y = top + 8 + _ROW * k
        line = y + _HEIGHT / 2 + SIZE * 0.35
        parts.append(text(MARGIN, line, array.name))
        parts.append(text(right + 6, line, array.spec))
        for n, device in enumerate(devices):
            x = left + _COLUMN * n + (_COLUMN - _WIDTH) / 2
            parts.append(rect(x, y, _WIDTH, _HEIGHT, IDLE))
            if device in array.parts:
                parts.append(_filled(array, device, x, y, colours[device]))
    bottom = top + 8 + _ROW * len(arrays) + SIZE
    parts.append(text(MARGIN, bottom, "bytes on each device"))
    for n, device in enumerate(devices):
        held = size(sum(array.bytes_on(device) for array in arrays))
        parts.append(text(left + _COLUMN * (n + 0.5), bottom, held, middle))
    width = max(right + 6 + specs, LETTER * SIZE * len(CAPTION) + MARGIN) + MARGIN
    return document(round(width), bottom + MARGIN, CAPTION, parts)


def sharded_arrays(tree: PyTree) -> tuple[ShardedArray, ...]:
    """What devices hold of each array of a pytree.

    Raises:
        TypeError: an entry that no device holds.
        ValueError: no array at all.
    """
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, jax.sharding.Sharding):
            raise TypeError(
                f"`fpipe.shards_svg(tree)`: {name or 'the tree'} is {shown(leaf)}, "
                "which no device holds; give arrays of JAX, such as `pipe.place` "
                "returns"
            )
        spec = str(sharding.spec) if isinstance(sharding, NamedSharding) else ""
        shape = tuple(leaf.shape)
        parts = {
            device: tuple(
                part.indices(length)[:2]
                for part, length in zip(index, shape, strict=True)
            )
            for device, index in sharding.devices_indices_map(shape).items()
        }
        label = f"{name} {describe(leaf)}".strip()
        found.append(ShardedArray(label, spec, shape, parts, leaf.dtype.itemsize))
    if not found:
        raise ValueError("`fpipe.shards_svg(tree)`: there is no array in the tree")
    return tuple(found)


def _colours(arrays: Sequence[ShardedArray]) -> dict[Any, str]:
    """A colour for each device: one for those that hold parts of the same arrays."""
    held: dict[Any, tuple[int, ...]] = {}
    for k, array in enumerate(arrays):
        for device in array.parts:
            held[device] = (*held.get(device, ()), k)
    kinds = list(dict.fromkeys(held.values()))
    colours = list(COLOURS.values())
    return {
        device: colours[kinds.index(mine) % len(colours)]
        for device, mine in held.items()
    }


def _filled(array: ShardedArray, device: Any, x: float, y: float, colour: str) -> str:
    """The part of a frame that a device holds."""
    rest = [axis for axis in range(len(array.shape)) if axis not in array.cut]
    axes = sorted([*array.cut, *rest][:2])
    # A vector lies.
    spans = [(0.0, 1.0)] * (2 - len(axes))
    for axis in axes:
        start, end = array.parts[device][axis]
        length = max(array.shape[axis], 1)
        spans.append((start / length, end / length))
    (above, below), (before, after) = spans
    block = ", ".join(f"{start}:{end}" for start, end in array.parts[device])
    title = escape(f"{device}: {array.name}, [{block}]")
    return (
        f'<rect x="{x + _WIDTH * before:.2f}" y="{y + _HEIGHT * above:.2f}" '
        f'width="{_WIDTH * (after - before):.2f}" '
        f'height="{_HEIGHT * (below - above):.2f}" fill="{colour}" stroke="{INK}" '
        f'stroke-width="0.6"><title>{title}</title></rect>'
    )
