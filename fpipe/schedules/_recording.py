"""A timeline that was measured: a `Timeline` with every program and every transfer.

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
        device: its number in the schedule.
        name: `stage2 F mb3` for an action, else what it does.
        start, end: in seconds.
    """

    device: int
    name: str
    start: float
    end: float


class Transfer(NamedTuple):
    """Arrays that went from one device to another.

    Attributes:
        source, target: devices' numbers in the schedule.
        what: names of the arrays.
        bytes: of all of them.
        start, end: in seconds: from when they were there and the transfer had been
            asked for, until they had arrived.
    """

    source: int
    target: int
    what: tuple[str, ...]
    bytes: int
    start: float
    end: float


@dataclasses.dataclass(frozen=True, eq=False)
class Recording(Timeline):
    """What really ran when: a `Timeline` in seconds, counted from the first start.

    It is empty until the block of `fpipe.record` ends. Then it is the last of the calls
    that were made in the block, and `calls` has all of them.

    Arguments:
        events: the schedule's actions. One that has nothing to compute (such as the
            input gradient of the first stage, where it is not asked for) has no
            program, and takes no time.
        devices: `D`.
        name: for drawings.
        memory: as in `Timeline`.
        programs: every program, also those around the schedule.
        transfers: every transfer between devices.
        places: what each device is.
        host: seconds in which the host issued programs and transfers, if there were
            several.
        peak_bytes: for each place the most bytes in use since the process began, as
            the device tells them; empty where devices do not (CPUs).
        calls: one recording for each call.
    """

    programs: tuple[ProgramRun, ...] = ()
    transfers: tuple[Transfer, ...] = ()
    places: tuple[str, ...] = ()
    host: float | None = None
    peak_bytes: tuple[int, ...] = ()
    calls: tuple["Recording", ...] = ()

    def metrics(self) -> dict[str, float]:
        """The call in numbers, for a logger; what is not known is left out.

        Returns:
            `step_seconds`: from the first start to the last end; `bubble`: the idle
            share of device time, 0 to 1; `peak_live`: the most microbatches that a
            device holds at once; `transfer_bytes`: between devices (not under scan,
            where they are parts of the program); `host_seconds`: in which the host
            issued the call, watching included (not under scan); `peak_bytes`: of the
            fullest device since the process began (not on CPUs).

        Raises:
            ValueError: the block of `fpipe.record` has not ended yet.
        """
        found: dict[str, float] = {"step_seconds": self._step(), **self._shares()}
        if self.host is not None:
            found["transfer_bytes"] = sum(t.bytes for t in self.transfers)
            found["host_seconds"] = self.host
        if self.peak_bytes:
            found["peak_bytes"] = max(self.peak_bytes)
        return found

    def to_trace(self, unit: float = 1e6) -> str:
        """As `Timeline.to_trace`, with every program and every transfer; a transfer
        stands at its target.
        """
        check_positive("to_trace", "unit", unit)
        # Programs of the schedule's actions are events already, with more to tell.
        of_schedule = {event.action.name for event in self.events}
        programs = self._spans()
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
            # At the target, because there somebody waits for it. Transfers overlap, and
            # `trace` gives those that do rows of their own.
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
        return trace(names, {"programs": programs, "transfers": transfers}, unit)

    # It is filled when the block ends: equal to nothing but itself.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)
