"""Large inputs lie over the devices, and come to the device that reads them one
microbatch at a time.

In: the microbatches in the order in which they are read. Out: a table that says what
each device puts into the feed in each of its steps.

Device `d` of `D` has the microbatches from `d·n` to `(d+1)·n - 1`, `n = ceil(m / D)`.
In every step of a feed what is on its way moves on by one device, towards the one that
reads and past device 0 to device `D - 1`; a device puts in a microbatch of its own as
many steps before it is read as it has to go. In the step in which microbatch `k` is
read, a device `r` devices away from the reader holds the one that is read `r` steps
later. So no two ever meet, whatever the order.

Four microbatches on two devices, read by device 0 in order, at the beginning of each
step (`+` marks what a device has just put in):

    step        0     1     2     3
    device 0   +mb0  +mb1   mb2   mb3     reads
    device 1    .    +mb2  +mb3   .
"""

from collections.abc import Sequence
from typing import Any

from fpipe._core.pytrees import nbytes
from fpipe._executors.scan.storage import is_key

# The bytes that laying an input over the devices must save on each of them. Below that
# it is not worth what it costs, one more `ppermute` for each microbatch that is read.
LARGE = 2**24


def is_large(a: Any, devices: int) -> bool:
    """Whether laying an array over the devices saves more than `LARGE` bytes on each.

    Arguments:
        a: an array or its shape.
    """
    # Keys are few, and they would have to be turned into numbers to lie over devices.
    if is_key(a.dtype) or not a.shape:
        return False
    return nbytes(a) - nbytes(a) // devices > LARGE


def share(microbatches: int, devices: int) -> int:
    """How many microbatches lie on a device; the last ones may have fewer."""
    return -(-microbatches // devices)


def feed_steps(
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
    # A piece travels past one device in each step. So the `k`-th to be read, which is
    # `r` devices away, has to be put in at step `k - r`. For the first ones that may be
    # before step 0; `early` is the most that any of them needs.
    own = share(microbatches, devices)
    distance = [(d - reader) % devices for d in range(devices)]
    early = max(0, *(distance[i // own] - k for k, i in enumerate(order)))
    steps = []
    for step in range(-early, len(order)):
        row = []
        for d in range(devices):
            # What is put in here now is read when it has gone the distance.
            k = step + distance[d]
            if 0 <= k < len(order) and order[k] // own == d:
                row.append(order[k] % own)
            else:
                row.append(own)
        steps.append(row)
    return steps, early
