"""The schedules that have a name, and how many stages each puts on a device.

`named("1f1b", devices=4, microbatches=8)` is `one_f_one_b(4, 8)`.
"""

from collections.abc import Callable
from typing import NamedTuple

from fpipe.schedules._checks import shown
from fpipe.schedules._generators.looped import (
    eager_1f1b,
    forward_only,
    gpipe,
    interleaved_1f1b,
    looped_bfs,
    one_f_one_b,
    zb_h1,
    zb_h2,
)
from fpipe.schedules._generators.v_shaped import dualpipe_v, v_half, v_min, zb_v
from fpipe.schedules._schedule import Schedule


class Named(NamedTuple):
    """A generator by name.

    Attributes:
        generator: `f(devices, microbatches)`, also with `virtual=` if `virtual` is set.
        per_device: the default number of stages on each device. `None` means several;
            the default is then two.
        virtual: whether the generator takes another number of stages per device.
    """

    generator: Callable[..., Schedule]
    per_device: int | None
    virtual: bool = False


# Messages list the names in this order, and the search tries them in this order.
NAMES: dict[str, Named] = {
    "gpipe": Named(gpipe, 1),
    "1f1b": Named(one_f_one_b, 1),
    "eager_1f1b": Named(eager_1f1b, 1),
    "interleaved_1f1b": Named(interleaved_1f1b, None, virtual=True),
    "looped_bfs": Named(looped_bfs, None, virtual=True),
    "zb_h1": Named(zb_h1, 1, virtual=True),
    "zb_h2": Named(zb_h2, 1),
    "zb_v": Named(zb_v, 2),
    "v_half": Named(v_half, 2),
    "v_min": Named(v_min, 2),
    "dualpipe_v": Named(dualpipe_v, 2),
    "forward_only": Named(forward_only, 1, virtual=True),
}
"""The generators by the names that `fpipe.Pipe(schedule=...)` takes."""


def named(
    name: str, devices: int, microbatches: int, virtual: int | None = None
) -> Schedule:
    """The schedule with a name.

    Arguments:
        name: one of `NAMES`.
        devices: `D`, the number of devices.
        microbatches: `m`, the number of microbatches.
        virtual: `v`, the number of stages per device. Default: the schedule's own
            number, or 2 if it takes several.

    Returns:
        A `Schedule`.

    Raises:
        TypeError: a size is no int.
        ValueError: `name` is unknown, or the schedule cannot have these sizes.
    """
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(
            f"no schedule is named {shown(name)}; there are {', '.join(NAMES)}"
        )
    entry = NAMES[name]
    # The generators check the sizes, because they know their limits. Only one check is
    # here: `virtual`, for a generator that has no choice of it.
    if virtual is None:
        return entry.generator(devices, microbatches)
    if entry.virtual:
        return entry.generator(devices, microbatches, virtual=virtual)
    if type(virtual) is not int:
        raise TypeError(f"`{name}`: virtual must be an int, not {shown(virtual)}")
    per_device = entry.per_device
    if virtual != per_device:
        number = "one stage" if per_device == 1 else f"{per_device} stages"
        raise ValueError(f"`{name}` puts {number} on each device, not {virtual}")
    return entry.generator(devices, microbatches)
