"""What a step runs on: what `plan`, `tune` and `balance` are told, checked once.

`pipe.plan(..., speed=2e12, memory=[8e9, 4e9])` on two devices becomes

    Hardware(speed=(2e12, 2e12), latency=0.0, bandwidth=None,
             memory=(8e9, 4e9), optimizer=2.0, launch=None, host_bandwidth=None)

Three public functions take these numbers. They are checked here and nowhere else, with
the name of the function that the user called in the message.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, get_args

import jax

from fpipe._core.checks import as_bool, is_at_least, is_number, is_one_of
from fpipe._core.errors import shown
from fpipe._program.roofline import Machine

WorkBy: TypeAlias = Literal["flops", "time"]

# Kinds of devices, for costs that are wanted before anybody has said what a step runs
# on. Of GPUs and TPUs by their data sheets: an H200 does 100 FLOPs per byte in TF32 and
# 200 in bfloat16, an A100 80 and 160, a TPU v5p 170. They take patches from a cache
# that is about three times as fast as their memory. Of CPUs measured with XLA, which
# writes the patches and reads them.
_MACHINES = {
    "cpu": Machine(flops_per_byte=8.0, patches=2.0),
    "gpu": Machine(flops_per_byte=150.0, patches=0.3),
    "tpu": Machine(flops_per_byte=200.0, patches=0.3),
}


def machine() -> Machine:
    """The kind of the devices that JAX takes if nobody says which. All processes of a
    group have the same kind, and so the same costs.
    """
    return _MACHINES.get(jax.default_backend(), _MACHINES["gpu"])


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Devices, and the links between them.

    Attributes:
        speed: work per second of each device; `None`: all alike, and not known.
        latency: seconds from a device to another.
        bandwidth: bytes per second from a device to another; `None`: no limit.
        memory: bytes of each device, infinity for no limit; `None`: no limits.
        optimizer: bytes of optimizer state for each byte of parameters.
        launch: seconds of the host for the launch of an action; `None`: not known.
        host_bandwidth: bytes per second between a device and its host; `None`: no
            limit.
    """

    speed: tuple[float, ...] | None = None
    latency: float = 0.0
    bandwidth: float | None = None
    memory: tuple[float, ...] | None = None
    optimizer: float = 2.0
    launch: float | None = None
    host_bandwidth: float | None = None

    @classmethod
    def checked(
        cls,
        call: str,
        devices: int,
        *,
        speed: Any = None,
        latency: Any = 0.0,
        bandwidth: Any = None,
        memory: Any = None,
        optimizer: Any = 2.0,
        launch: Any = None,
        host_bandwidth: Any = None,
        speed_name: str = "speed",
    ) -> "Hardware":
        """From what a user gave.

        Arguments:
            call: the user's call, for errors.
            devices: how many there are. More numbers than that are ignored.
            speed_name: what `call` calls the speed.

        Raises:
            ValueError: something is not a number, or out of range.
        """
        # Left out, a launch is measured; 0 says that it takes no time.
        launched = 0.0 if launch is None else launch
        for name, value in (("latency", latency), ("launch", launched)):
            if not is_at_least(value, 0):
                raise ValueError(
                    f"`{call}({name}={shown(value)})`: a number, 0 or more"
                )
        for name, value in (
            ("bandwidth", bandwidth),
            ("host_bandwidth", host_bandwidth),
        ):
            if value is not None and not (is_number(value) and value > 0):
                raise ValueError(
                    f"`{call}({name}={shown(value)})`: bytes per second, more than 0"
                )
        if not is_at_least(optimizer, 0):
            raise ValueError(
                f"`{call}(optimizer={shown(optimizer)})`: bytes of state for each "
                "byte of "
                "parameters, 0 or more"
            )
        return cls(
            _for_each_device(call, speed_name, speed, devices),
            latency,
            bandwidth,
            _for_each_device(call, "memory", memory, devices),
            optimizer,
            launch,
            host_bandwidth,
        )

    def memory_of(self, device: int) -> int | None:
        """The bytes of a device, if they are limited."""
        # A prediction has whole bytes, and no infinity: JSON knows none.
        limit = float("inf") if self.memory is None else self.memory[device]
        return None if limit == float("inf") else int(limit)


def _for_each_device(
    call: str, name: str, value: Any, devices: int
) -> tuple[float, ...] | None:
    """One number more than 0 for each device, from one for all or one for each."""
    if value is None:
        return None
    # An array of numpy without axes is one number.
    several = isinstance(value, Iterable) and getattr(value, "ndim", 1)
    # More numbers than devices are fine: a pipe may use fewer devices than a machine
    # has, and the same numbers then go with any of them.
    each: tuple[Any, ...] = tuple(value) if several else (value,) * devices
    if len(each) < devices or not all(is_number(v) and v > 0 for v in each):
        raise ValueError(
            f"`{call}({name}={shown(value)})`: a number more than 0, or one for each "
            "of "
            f"{devices} devices"
        )
    return tuple(float(v) for v in each[:devices])


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """How `Pipe.plan` and `tune` are to predict.

    Attributes:
        hardware: what the step runs on.
        by: whether work is counted or measured.
        compiled: whether programs are compiled for the memory that they need.
    """

    hardware: Hardware
    by: WorkBy = "flops"
    compiled: bool = False

    @classmethod
    def checked(
        cls, call: str, devices: int, by: Any, compiled: Any, **hardware: Any
    ) -> "PlanOptions":
        """From what a user gave; `hardware` goes to `Hardware.checked`.

        Raises:
            ValueError: a wrong argument, or seconds beside FLOPs.
        """
        if not is_one_of(by, get_args(WorkBy)):
            raise ValueError(
                f"`{call}(by={shown(by)})`: one of "
                f"{', '.join(map(repr, get_args(WorkBy)))}"
            )
        # The simulation adds the times of transfers to those of work, so that both must
        # be in seconds.
        own = Hardware.checked(call, devices, **hardware)
        options = cls(own, by, as_bool(call, "compiled", compiled))
        of_seconds = ("latency", "bandwidth", "launch", "host_bandwidth")
        given = [f"{name}=..." for name in of_seconds if getattr(own, name)]
        if options.unit == "FLOP" and given:
            raise ValueError(
                f"`{call}({', '.join(given)})`: seconds cannot be weighed "
                "against FLOPs: give `speed=` too, in FLOP/s, "
                'or by="time"'
            )
        return options

    @property
    def unit(self) -> str:
        """What work is told in."""
        # FLOPs become seconds where somebody says how fast a device is.
        known = self.by == "time" or self.hardware.speed is not None
        return "second" if known else "FLOP"
