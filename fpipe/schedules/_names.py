"""The schedules that have a name, and how many stages each puts on a device."""

from collections.abc import Callable
from typing import NamedTuple

from fpipe.schedules._generators import eager_1f1b, gpipe, one_f_one_b
from fpipe.schedules._schedule import Schedule


class Named(NamedTuple):
    """A generator by name.

    Attributes:
        generator: `f(devices, microbatches)`; also `virtual=` where `per_device` is `None`.
        per_device: the stages on each device; `None`: several, as many as `virtual` says.
    """

    generator: Callable[..., Schedule]
    per_device: int | None


NAMES: dict[str, Named] = {
    "gpipe": Named(gpipe, 1),
    "1f1b": Named(one_f_one_b, 1),
    "eager_1f1b": Named(eager_1f1b, 1),
}


def named(name: str, devices: int, microbatches: int, virtual: int | None = None) -> Schedule:
    """The schedule of that name.

    Arguments:
        name: one of `NAMES`.
        devices: `D`.
        microbatches: `m`.
        virtual: `v`, stages per device; default what the schedule prescribes, 2 where it takes several.

    Raises:
        ValueError: no such name, or sizes that the schedule cannot have.
    """
    if name not in NAMES:
        raise ValueError(f"no schedule is named {name!r}; there are {', '.join(NAMES)}")
    generator, per_device = NAMES[name]
    if per_device is None:
        return generator(devices, microbatches, virtual=2 if virtual is None else virtual)
    if virtual not in (None, per_device):
        number = "one stage" if per_device == 1 else f"{per_device} stages"
        raise ValueError(f"`{name}` puts {number} on each device, not {virtual}")
    return generator(devices, microbatches)
