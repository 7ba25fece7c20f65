"""Large inputs lie over the devices, and come to the device that reads them one
microbatch at a time.

Device `d` of `D` has the microbatches from `d·n` to `(d+1)·n - 1`, `n = ceil(m / D)`.
In every step of a feed what is on its way moves on by one device, towards the one that
reads and past device 0 to device `D - 1`; a device puts in a microbatch of its own as
many steps before it is read as it has to go. In the step in which microbatch `k` is
read, a device `r` devices away from the reader holds the one that is read `r` steps
later. Thus no two ever meet, whatever the order.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fpipe._executors.scan.storage import is_key

# The bytes that an input must take on every device before it is laid over them. Below
# that what it costs, one more `ppermute` for each time that a microbatch is read, is
# not worth it.
LARGE = 2**24


def is_large(a: Any, devices: int, least: int) -> bool:
    """Whether laying an array over the devices saves more than `least` bytes on each.

    Arguments:
        a: an array or its shape.
    """
    if is_key(a.dtype) or not a.shape:
        return False
    size = int(np.prod(a.shape, dtype=np.int64)) * a.dtype.itemsize
    return size - size // devices > least


def share(microbatches: int, devices: int) -> int:
    """How many microbatches lie on a device; the last ones may have fewer."""
    return -(-microbatches // devices)


def steps(
    order: Sequence[int], microbatches: int, devices: int, reader: int
) -> tuple[list[list[int]], int]:
    """What each device puts in, in every step of a feed.

    Arguments:
        order: the microbatches as they are read.
        reader: the device that reads them.

    Returns:
        For each step and device the place of the microbatch among its own, or
        `share(...)` where it passes on what has come; and how many of these steps come
        before the first in which something is read.
    """
    own = share(microbatches, devices)
    away = [(d - reader) % devices for d in range(devices)]
    early = max(0, *(away[i // own] - k for k, i in enumerate(order)))
    out = []
    for t in range(-early, len(order)):
        row = []
        for d in range(devices):
            k = t + away[d]
            mine = 0 <= k < len(order) and order[k] // own == d
            row.append(order[k] - d * own if mine else own)
        out.append(row)
    return out, early
