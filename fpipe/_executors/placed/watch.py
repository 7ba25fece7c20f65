"""When the instructions of a plan run: the placed executor's side of `fpipe.record`.

Devices run later than the thread dispatches to them. So each instruction is stamped
when it is issued, and what it makes goes to a thread that waits until it is there and
looks at the clock. There is such a *lane* for each device, one for each way between
devices, and one for each way between a device and its host: what stands in a lane ends
in the order in which it was issued. A lane holds one array at a time.

What a later program consumes (a sum of gradients is donated to the next backward)
cannot be waited for. There a tiny program that reads it, the *mark*, is issued right
after, and its end is waited for.

What is seen, for the first instructions of a plan of two stages:

    number  instruction                  lane            issued        ended  moved
    0       cpu:0: F(0,0) (w0, x) -> y   cpu:0           0.00 to 0.01  0.31
    2       cpu:0 -> cpu:1: y -> y'      cpu:0 to cpu:1  0.02 to 0.03  0.35   [96]
    4       cpu:1: F(1,0) (w1, y') -> z  cpu:1           0.03 to 0.04  0.70

and `WatchedCall.timeline` makes of it when each of them ran: a program starts when it
is issued, its device is free and its inputs are there, so `F(1,0)` ran from 0.35. What
its program and the transfers of its results took to issue is the launch of an action.

The calling thread cannot wait itself: while it waited for one result it would not issue
the next program, and a recorded call would run in another order than the others.

Simulated devices that have a dispatching thread each are another matter. They share the
cores with all these threads, so that a lane wakes up late, by as much as a program
takes: then the program that waits for its array would seem to run for no time. There
the dispatching thread waits for the inputs of a program and for its result, and looks
at the clock itself. Its own device has nothing else to do meanwhile.
"""

import contextlib
import dataclasses
import functools
import itertools
import queue
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from fpipe._core.processes import clock_offsets, gather_floats
from fpipe._executors.placed.instructions import (
    FIRST_HALF,
    Copy,
    Free,
    Half,
    Instruction,
    Move,
    Plan,
    Run,
)
from fpipe._executors.placed.threads import Call, Step
from fpipe._executors.placement import Placement
from fpipe._executors.recording import completed, peak_bytes
from fpipe.schedules import (
    Action,
    Costs,
    Event,
    Launch,
    ProgramRun,
    Recording,
    Transfer,
)
from fpipe.schedules._action import joined_names


class Span(NamedTuple):
    """From when to when an instruction ran, or was issued, in seconds of
    `time.perf_counter`.
    """

    start: float
    end: float


class Probe(NamedTuple):
    """How to learn the end of an instruction: wait for one of its results, or for what
    `mark` makes of that.
    """

    result: int
    mark: Callable[[Any], Any] | None


def probes_of(plan: Plan, compiled: Mapping[int, Any]) -> dict[int, Probe]:
    """For each instruction that makes something in this process how to learn its end.

    Arguments:
        compiled: the program of each run, by the number of its instruction.
    """
    consumed = {
        slot
        for item in plan.instructions
        if isinstance(item, Run)
        for slot in item.donates
    }

    # Few marks do for many instructions: one for each shape and placement.
    @functools.cache
    def mark(
        shape: tuple[int, ...], dtype: Any, sharding: Sharding
    ) -> Callable[[Any], Any]:
        # The sum keeps it from handing on the very array.
        array = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        program = jax.jit(lambda a: a.reshape(-1)[:1].sum())
        program.lower(array).compile()  # `jit` finds it
        return program

    probes: dict[int, Probe] = {}
    for number, item in enumerate(plan.instructions):
        if isinstance(item, Free) or not item.outs or not item.placement.is_here:
            continue
        # Any result that stays will do: all results of a program are there at once.
        stays = [k for k, slot in enumerate(item.outs) if slot not in consumed]
        if stays:
            probes[number] = Probe(stays[0], None)
        else:
            shapes = compiled[number].out_info
            # The cheapest to read.
            smallest = min(range(len(shapes)), key=lambda k: shapes[k].size)
            shape = shapes[smallest]
            sharding = plan.sharding(item.outs[smallest])
            probes[number] = Probe(smallest, mark(shape.shape, shape.dtype, sharding))
    return probes


class Seen(NamedTuple):
    """A result that a lane waits for.

    Attributes:
        number: of the instruction that makes it.
        array: `None` if there is nothing to wait for.
        ended: when it was there, if that is known already.
    """

    number: int
    array: Any
    ended: float | None


class Failure(NamedTuple):
    """An exception on a device, and the number of the instruction."""

    number: int
    error: Exception


class Lane:
    """A thread that waits for one result after the other.

    Arguments:
        wait: called with each of them.
    """

    def __init__(self, wait: Callable[[Seen], None], name: str) -> None:
        self.queue: queue.SimpleQueue[Seen | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, args=(wait,), name=name)

    def _work(self, wait: Callable[[Seen], None]) -> None:
        while (seen := self.queue.get()) is not None:
            wait(seen)
            del seen  # the array, before the next one comes


class Watch:
    """Watches one run of a plan; as a context, until everything has run.

    Arguments:
        plan: what runs.
        probes: how the end of each instruction is learnt.
        threaded: whether each device has a dispatching thread.

    Attributes:
        issued, ended: when, by the number of the instruction.
        fed: the programs whose inputs were there when they were issued.
        host: seconds that issuing took.
        moved: the bytes of each array of a transfer.
        failures: what went wrong on a device.
    """

    def __init__(self, plan: Plan, probes: Mapping[int, Probe], threaded: bool) -> None:
        self.issued: dict[int, Span] = {}
        self.ended: dict[int, float] = {}
        self.fed: set[int] = set()
        self.host = 0.0
        self.moved: dict[int, list[int]] = {}
        self.failures: list[Failure] = []
        self._plan = plan
        self._probes = probes
        self._threaded = threaded
        self._waits_itself = threaded and _is_simulated(plan)
        # A lane for what cannot overlap, no lane for each instruction: there are
        # thousands of them, and a lane that waits for one array keeps few alive.
        self._lanes: dict[Hashable, Lane] = {}
        for number in probes:
            key = self._lane_key(plan.instructions[number])
            if key not in self._lanes:
                name = f"fpipe record {len(self._lanes)}"
                self._lanes[key] = Lane(self.wait, name)

    def watched(self, step: Step) -> Call:
        """The call of a step, watched."""
        number, call = step.number, step.call
        if number not in self._probes:
            return call
        result, mark = self._probes[number]
        moves = isinstance(step.item, Move)
        put = self._lanes[self._lane_key(step.item)].queue.put
        # A copy to the host or back runs beside the programs.
        waits = self._waits_itself and isinstance(step.item, Run)

        def watched(*arrays: Any) -> Sequence[Any]:
            if waits:
                _wait_for(arrays)
                self.fed.add(number)
            started = time.perf_counter()
            made = call(*arrays)
            # Here, so that what the recording itself does is no part of it.
            self.issued[number] = Span(started, time.perf_counter())
            array = made[result]
            if waits:
                _wait_for(array)
            # Some programs run in the thread that calls them. Then nobody has to wake
            # up to see the end. A key can be waited for, and cannot be asked.
            is_ready = getattr(array, "is_ready", None)
            ended = time.perf_counter() if is_ready and is_ready() else None
            # The next program on this device consumes the array, and then it cannot be
            # waited for. So the mark is issued now, before that program.
            if mark is not None:
                array = mark(array) if ended is None else None
            put(Seen(number, array, ended))
            if moves:
                self.moved[number] = [a.nbytes for a in made]
            return made

        return watched

    def wait(self, seen: Seen) -> None:
        """Wait for a result, in the thread of its lane, and note when it is there."""
        number, array, ended = seen
        try:
            if array is not None:
                array.block_until_ready()
            self.ended[number] = time.perf_counter() if ended is None else ended
        except Exception as error:
            # The lane goes on: what comes next must be waited for too, or the call
            # would return while devices still work for it.
            self.failures.append(Failure(number, error))

    def call(self, half: Half) -> "WatchedCall":
        """What was seen of a run that has ended."""
        return WatchedCall(
            self._plan,
            half,
            self.issued,
            self.ended,
            frozenset(self.fed),
            self.moved,
            self.host,
            peak_bytes(_devices_of(self._plan)),
            self._threaded,
        )

    def __enter__(self) -> "Watch":
        try:
            for lane in self._lanes.values():
                lane.thread.start()
        except BaseException:
            # No thread to be had, or Ctrl-C: those that are there end.
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for lane in self._lanes.values():
            lane.queue.put(None)
        for lane in self._lanes.values():
            if lane.thread.ident is not None:
                lane.thread.join()

    def _lane_key(self, item: Instruction) -> Hashable:
        """What runs one after the other: a device's programs, and transfers from the
        same devices to the same one.
        """
        assert not isinstance(item, Free)
        if isinstance(item, Run):
            return item.placement
        if isinstance(item, Copy):
            return item.placement, item.to_host
        sources = frozenset(self._plan.slots[slot].placement for slot in item.ins)
        return item.placement, sources


def _is_simulated(plan: Plan) -> bool:
    """Whether all devices of a plan are CPUs of this process."""
    here = jax.process_index()
    places = {i.placement for i in plan.instructions if not isinstance(i, Free)}
    return all(
        device.platform == "cpu" and device.process_index == here
        for place in places
        for device in place.devices
    )


def _wait_for(arrays: Any) -> None:
    """Wait until arrays are there, or have failed: what reads them says so."""
    with contextlib.suppress(Exception):
        jax.block_until_ready(arrays)


@dataclasses.dataclass(frozen=True)
class WatchedCall:
    """A run of a plan, or of a half of it, with what was seen."""

    plan: Plan
    half: Half
    issued: Mapping[int, Span]
    ended: Mapping[int, float]
    fed: frozenset[int]
    moved: Mapping[int, Sequence[int]]
    host: float
    peak_bytes: tuple[int, ...]
    threaded: bool

    def joined(self, later: object) -> "WatchedCall | None":
        """A forward with its pull-back, as one call; `None` if these are two calls."""
        if not isinstance(later, WatchedCall) or later.plan is not self.plan:
            return None
        if (self.half, later.half) != (Half.FORWARD, Half.BACKWARD):
            return None
        return WatchedCall(
            self.plan,
            Half.WHOLE,
            {**self.issued, **later.issued},
            {**self.ended, **later.ended},
            self.fed | later.fed,
            {**self.moved, **later.moved},
            self.host + later.host,
            later.peak_bytes,
            self.threaded,
        )

    def merged(self, sizes: Mapping[int, Sequence[int]]) -> "WatchedCall":
        """What all processes have seen, on the clock of the first. Every process calls
        it, and gets the same.

        Arguments:
            sizes: the bytes of each array of each transfer.
        """
        seen = np.full((len(self.plan.instructions), 3), np.nan)
        for number, ended in self.ended.items():
            issued = self.issued[number]
            seen[number] = issued.start, issued.end, ended
        rows = gather_floats(
            np.array([*seen.reshape(-1), self.host]),
            lambda: "all processes to tell what they have recorded",
        )
        hosts = rows[:, -1]
        times = rows[:, :-1] - clock_offsets()[:, None]
        times = times.reshape(len(rows), *seen.shape)
        issued_by_all: dict[int, Span] = {}
        ended_by_all: dict[int, float] = {}
        for of_process in times:
            for number in np.flatnonzero(~np.isnan(of_process[:, 0])).tolist():
                start, end, ended = of_process[number].tolist()
                # Several processes run what a stage over all of them computes.
                others = issued_by_all.get(number, Span(start, end))
                issued_by_all[number] = Span(
                    min(start, others.start), max(end, others.end)
                )
                ended_by_all[number] = max(ended, ended_by_all.get(number, ended))
        return dataclasses.replace(
            self,
            issued=dict(sorted(issued_by_all.items())),
            ended=dict(sorted(ended_by_all.items())),
            moved=sizes,
            host=float(hosts.max()),
        )

    def timeline(self) -> Recording:
        """When everything ran, counted from the first start."""
        plan = self.plan
        schedule = plan.schedule
        spans = self._spans()
        zero = min((span.start for span in spans.values()), default=0.0)
        device_of = _devices_of(plan)
        # An action is an event of the schedule, on the schedule's device, and a
        # program. A program around the schedule is no event.
        events: dict[Action, Event] = {}
        programs: list[ProgramRun] = []
        transfers: list[Transfer] = []
        fused: list[tuple[Action, ...]] = []
        for number, span in spans.items():
            item = plan.instructions[number]
            start = span.start - zero
            end = span.end - zero
            if isinstance(item, Move):
                # One instruction may move arrays of several devices: a transfer each.
                names: dict[Placement, list[str]] = {}
                sizes: dict[Placement, int] = {}
                for slot, size in zip(item.sources, self.moved[number], strict=True):
                    value, source, _ = plan.slots[slot]
                    names.setdefault(source, []).append(str(value))
                    sizes[source] = sizes.get(source, 0) + size
                target = device_of[item.placement]
                for source, moved in names.items():
                    transfer = Transfer(
                        device_of[source],
                        target,
                        tuple(moved),
                        sizes[source],
                        start,
                        end,
                    )
                    transfers.append(transfer)
                continue
            if isinstance(item, Copy):
                device = schedule.stage_to_device[item.action.stage]
                events[item.action] = Event(device, item.action, start, end)
                continue
            assert isinstance(item, Run)
            device = device_of[item.placement]
            name = joined_names(item.actions) or item.name
            if item.parts:
                device = schedule.stage_to_device[item.actions[0].stage]
            programs.append(ProgramRun(device, name, start, end))
            if len(item.parts) > 1:
                fused.append(item.actions)
            for event in _shared(device, item.actions, start, end):
                events[event.action] = event
        programs.sort(key=lambda program: (program.start, program.device))
        transfers.sort(key=lambda transfer: (transfer.start, transfer.target))
        names_of = {device: str(place) for place, device in device_of.items()}
        return Recording(
            events=completed(schedule, self._actions(), events),
            devices=schedule.devices,
            name=f"{schedule.name}, recorded",
            launches=self._launches(zero, device_of),
            fused=tuple(fused),
            programs=tuple(programs),
            transfers=tuple(transfers),
            places=tuple(names_of.get(d, "") for d in range(schedule.devices)),
            host=self.host,
            peak_bytes=self.peak_bytes,
        )

    def _launches(
        self, zero: float, device_of: Mapping[Placement, int]
    ) -> tuple[Launch, ...]:
        """What the host did for each action: it issued its program, and the transfers
        of what that makes.

        Arguments:
            zero: the first start.
            device_of: as `_devices_of` gives it.
        """
        action_of: dict[int, Action] = {}
        launches: list[Launch] = []
        for number, item in enumerate(self.plan.instructions):
            if isinstance(item, Free) or number not in self.issued:
                continue
            action: Action | None
            if isinstance(item, Run):
                # A program of several actions is launched once.
                action = item.actions[0] if item.parts else None
            else:
                # The arrays of a transfer may be of several actions: it is issued
                # after the last of them.
                makers = [action_of[slot] for slot in item.ins if slot in action_of]
                action = makers[-1] if makers else None
            if action is None:
                continue
            action_of |= dict.fromkeys(item.outs, action)
            thread = device_of[item.placement] if self.threaded else 0
            start, end = self.issued[number]
            launches.append(Launch(thread, action, start - zero, end - zero))
        return tuple(sorted(launches, key=lambda launch: launch.start))

    def _actions(self) -> list[Action]:
        """The actions of this run in order, also those that have nothing to run."""
        order = list(self.plan.order)
        splits = self.plan.backward < len(self.plan.instructions)
        if not splits or self.half is Half.WHOLE:
            return order
        forward = self.half is Half.FORWARD
        return [a for a in order if (a.kind in FIRST_HALF) == forward]

    def _spans(self) -> dict[int, Span]:
        """From when to when each instruction ran, by its number.

        A start is not seen. It is computed: the latest of the instruction's issue and
        the ends of what it waits for. An end that was seen late is corrected first:

            number  instruction        waits for  seen   corrected
            0       cpu:0: F(0,0)                 0.90   0.35
            2       cpu:0 -> cpu:1     0          0.35   0.35
            4       cpu:1: F(1,0)      2          1.20   0.70
            5       cpu:1 -> cpu:0     4          1.20   0.70
            7       cpu:0: B(0,0)      5          1.05   1.05
        """
        code = {
            number: item
            for number, item in enumerate(self.plan.instructions)
            if number in self.ended and not isinstance(item, Free)
        }
        # What each instruction waits for: those that make its inputs, and what its
        # device runs before.
        maker: dict[int, int] = {}
        last_on: dict[Hashable, int] = {}
        before: dict[int, list[int]] = {}
        ends = {number: self.ended[number] for number in code}
        for number, item in code.items():
            before[number] = [maker[slot] for slot in item.ins if slot in maker]
            if number in self.fed:
                for earlier in before[number]:
                    ends[earlier] = min(ends[earlier], self.issued[number].start)
            if isinstance(item, Run | Copy):
                way = (item.placement, isinstance(item, Copy) and item.action.kind)
                if way in last_on:
                    before[number].append(last_on[way])
                last_on[way] = number
            for slot in item.outs:
                maker[slot] = number
        # An end is seen late at times (a thread has to wake up for it), but it is never
        # later than that of what needs it, nor than when that was issued with all its
        # inputs there. `after` counts the programs that still have to run after an
        # instruction until this latest moment.
        after = dict.fromkeys(code, 0)
        for number in reversed(code):
            count = after[number] + isinstance(code[number], Run)
            for earlier in before[number]:
                if ends[number] < ends[earlier]:
                    ends[earlier], after[earlier] = ends[number], count
                elif ends[number] == ends[earlier] < self.ended[earlier]:
                    after[earlier] = max(after[earlier], count)
        spans: dict[int, Span] = {}
        for number, item in code.items():
            earlier = [spans[n].end for n in before[number]]
            start = max([self.issued[number].start, *earlier])
            end = ends[number]
            if end < self.ended[number]:
                # All that is known of a late end is that it lies between the start and
                # `ends`. Programs that follow one another there share the time. A
                # transfer is short beside them.
                end = start + (end - start) / (1 + after[number])
                end = start if isinstance(item, Move) else end
            spans[number] = Span(start, end)
        return spans


def _shared(
    device: int, actions: Sequence[Action], start: float, end: float
) -> list[Event]:
    """The events of the actions that a program runs.

    Where one action ends in a program and the next one starts cannot be seen. They
    share its time as the default costs have it: a backward takes twice a forward.
    """
    costs = Costs()
    weights = [costs.of(action) for action in actions]
    ends = [
        start + (end - start) * weight / sum(weights)
        for weight in itertools.accumulate(weights)
    ]
    # Rounding must not move the end of the program.
    ends[-1:] = [end] * bool(ends)
    starts = [start, *ends[:-1]]
    return [Event(device, *of) for of in zip(actions, starts, ends, strict=False)]


def _devices_of(plan: Plan) -> dict[Placement, int]:
    """The device of the schedule that each placement is; one that is several of them is
    the first.
    """
    devices: dict[Placement, int] = {}
    for item in plan.instructions:
        if isinstance(item, Run) and item.parts:
            device = plan.schedule.stage_to_device[item.actions[0].stage]
            devices[item.placement] = min(devices.get(item.placement, device), device)
    return devices
