"""A measured timeline: a `Timeline` with every program run and every transfer.

One microbatch on two devices, in seconds from the first start:

    events      Event(0, F(0,0), 0.0, 0.002), Event(1, F(1,0), 0.003, 0.005)
    programs    ProgramRun(0, "stage0 F mb0", 0.0, 0.002), …
    transfers   Transfer(0, 1, ("boundary",), 4096, 0.002, 0.003)
"""

import dataclasses
from typing import NamedTuple

from fpipe.schedules._checks import check_positive
from fpipe.schedules._timeline import Timeline
from fpipe.schedules._trace import Span, trace


class ProgramRun(NamedTuple):
    """One run of a program.

    Attributes:
        device: the number of the device in the schedule.
        name: `stage2 F mb3` for an action, `stage2 F mb3 + stage2 B mb3` for a program
            of two actions; for another program, what it does.
        start, end: times in seconds.
    """

    device: int
    name: str
    start: float
    end: float


class Transfer(NamedTuple):
    """A transfer of arrays from one device to another.

    Attributes:
        source, target: the numbers of the devices in the schedule.
        what: the names of the arrays.
        bytes: the bytes of all these arrays.
        start, end: times in seconds. A transfer starts when its arrays are ready and
            the host has issued it. It ends when the arrays have arrived.
    """

    source: int
    target: int
    what: tuple[str, ...]
    bytes: int
    start: float
    end: float


@dataclasses.dataclass(frozen=True, eq=False)
class Recording(Timeline):
    """A measured `Timeline`, in seconds from the first start.

    It is empty until the block of `fpipe.record` ends. After that it is the last call
    in the block, and `calls` has all calls.

    Arguments:
        events: the schedule's actions, with their times. An action with nothing to
            compute has no program and takes no time. An example is the input gradient
            of the first stage, if it is not requested.
        devices: `D`, the number of devices.
        name: the name in drawings.
        memory: as in `Timeline`.
        launches: the time that the host took for each program of an action and for each
            transfer of its results. Empty if the call was one program.
        fused: as in `Timeline`.
        programs: all program runs, also those that belong to no action.
        transfers: all transfers between devices.
        places: a description of each device.
        host: the seconds that the host took to issue programs and transfers, with the
            time of the recording. `None` if the call was one program.
        peak_bytes: for each device, the most bytes in use since the process began, as
            the device reports them. Empty if a device does not report them (CPUs).
        calls: a recording of each call.
    """

    programs: tuple[ProgramRun, ...] = ()
    transfers: tuple[Transfer, ...] = ()
    places: tuple[str, ...] = ()
    host: float | None = None
    peak_bytes: tuple[int, ...] = ()
    calls: tuple["Recording", ...] = ()

    def metrics(self) -> dict[str, float]:
        """The call as a dict of numbers, for a logger.

        Numbers that are not known are left out.

        Returns:
            `step_seconds`: the time from the first start to the last end. `bubble`: the
            idle share of device time, 0 to 1. `peak_live`: the most (stage,
            microbatch) pairs that a device holds at once. `transfer_bytes`: the bytes
            that went between devices (left out under scan, where transfers are parts of
            the program).
            `host_seconds`: the time that the host took to issue the call, with the time
            of the recording (left out under scan). `launch_seconds`: the mean time that
            the host took to launch an action, or several that are one program, without
            the time of the recording (left out under scan). `peak_bytes`: the most
            bytes in use on the fullest device since the process began (left out on
            CPUs).

        Raises:
            ValueError: the block of `fpipe.record` has not ended yet.
        """
        found: dict[str, float] = {"step_seconds": self._step(), **self._shares()}
        if self.host is not None:
            found["transfer_bytes"] = sum(t.bytes for t in self.transfers)
            found["host_seconds"] = self.host
        if self.launches:
            found["launch_seconds"] = self.launch
        if self.peak_bytes:
            found["peak_bytes"] = max(self.peak_bytes)
        return found

    def to_trace(self, unit: float = 1e6) -> str:
        """The recording as a JSON trace, with all programs and transfers.

        See `Timeline.to_trace`. A transfer is in the rows of its target device.

        Arguments:
            unit: the microseconds in a unit of time. The default is right for seconds.
        """
        check_positive("to_trace", "unit", unit)
        # Programs of the schedule's actions are events already, with more details.
        programs = self._spans()
        of_schedule = {span.name for span in programs}
        for program in self.programs:
            if program.name not in of_schedule:
                programs.append(
                    Span(
                        program.device,
                        program.name,
                        category="around",
                        start=program.start,
                        end=program.end,
                        args={},
                    )
                )
        transfers: list[Span] = []
        for transfer in self.transfers:
            shown = {
                "source": transfer.source,
                "what": ", ".join(transfer.what),
                "bytes": transfer.bytes,
            }
            # At the target, because the target waits for it. Transfers may overlap;
            # `trace` then puts them into different rows.
            transfers.append(
                Span(
                    transfer.target,
                    f"from device {transfer.source}",
                    category="transfer",
                    start=transfer.start,
                    end=transfer.end,
                    args=shown,
                )
            )
        names: list[str] = []
        for device, place in enumerate(self.places or [""] * self.devices):
            names.append(f"device {device} ({place})" if place else f"device {device}")
        rows = {
            "programs": programs,
            "transfers": transfers,
            "launches": self._launch_spans(),
        }
        return trace([*names, *self._hosts()], rows, unit)

    # A recording is filled when its block ends, so it is equal only to itself.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)
