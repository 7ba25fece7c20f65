"""A list scheduler: each device, whenever it is free, takes what is due first.

In: a `Problem` and a `Policy`. Out: rows of numbered actions that keep the limits.

It is a clock with events. An event is a moment and a device that has something to
decide then: it has become free, or something arrives there. The device starts the
action that is due first of those whose inputs are there, and whoever waits for what it
makes gets an event of its own. For a device with one stage under 1F1B's policy
(`slope=1`), the moment when forward 1 ends:

    queue       next    due     input is there
    forward     F2      2.0     yes                 of stage 0: always
    backward    I0      1.5     yes                 since I0 of the next stage ended
    weight      W0      ∞       no, I0 has not run

`I0` starts. Not every free device starts something: it may wait a little for an input
gradient (`patience`), or have no memory for a forward.
"""

import dataclasses
import heapq
import math
from typing import NamedTuple

from fpipe.schedules._action import KINDS, Kind
from fpipe.schedules._numbering import Rows
from fpipe.schedules._rules import StageKind, last_needs
from fpipe.schedules._search.problem import ROUNDING, Policy, Problem


@dataclasses.dataclass(slots=True, eq=False)
class _Queue:
    """The actions of one kind of one stage; they run in the order of microbatches.

    Attributes:
        kind: theirs.
        device: theirs.
        number: of the first of them; the others follow it.
        duration: of each.
        latency: how long what each waits for is under way.
        held_change: how each changes what its device holds.
        due: for each microbatch.
        arrivals: for each microbatch when what it waits for is there, infinite as long
            as that is not known. One more than there are, infinite: what comes after
            the last never arrives.
        waiting: the queues whose actions wait for these, microbatch by microbatch.
        started: how many of them have, which is the microbatch of the next one.
    """

    kind: Kind
    device: int
    number: int
    duration: float
    latency: float
    held_change: float
    due: list[float]
    arrivals: list[float]
    waiting: list["_Queue"] = dataclasses.field(default_factory=list)
    started: int = 0


@dataclasses.dataclass(slots=True, eq=False)
class _Chunk:
    """One stage of a device.

    Attributes:
        forward, backward: its queues; a backward is `I` or `B`.
        weight: its third queue, where backwards are split.
        held: what a microbatch holds until its backward.
        held_weight: what it holds from there to its `W`.
    """

    forward: _Queue
    backward: _Queue
    weight: _Queue | None
    held: float
    held_weight: float

    @property
    def finished(self) -> int:
        """How many microbatches hold nothing any more, or will not when all ends."""
        return (self.weight or self.backward).started


@dataclasses.dataclass(slots=True, eq=False)
class _Device:
    """What a device has done and holds.

    Attributes:
        chunks: its stages.
        limit: the most that it may hold.
        held: what it holds when the action that it runs has ended.
        free_at: when that is.
        row: the actions that it has started.
    """

    chunks: list[_Chunk]
    limit: float
    held: float = 0.0
    free_at: float = 0.0
    row: list[int] = dataclasses.field(default_factory=list)


class _Choice(NamedTuple):
    """What a free device does: it starts the next action of `queue`, or looks again
    when something arrives.
    """

    queue: _Queue | None
    arrival: float


class _DueTimes(NamedTuple):
    """When the actions of a stage are due, by microbatch."""

    forward: list[float]
    backward: list[float]
    weight: list[float]


def list_schedule(problem: Problem, policy: Policy) -> Rows | None:
    """The rows that the policy leads to; `None` where its share of the limit is not
    enough for one microbatch.
    """
    # Where backwards are split, a microbatch may hold more for its `W` than it did
    # before. It is counted with the larger from the start, so that an `I` never needs
    # room.
    held = [
        max(memory.full, memory.weight) if policy.split else memory.full
        for memory in problem.memory
    ]
    limits: list[float] = []
    for device, stages in enumerate(problem.stages_of):
        limit = problem.limits[device]
        if policy.share != 1.0:
            # Without a limit the shares are of two rounds of the pipeline, which is
            # what it takes to hide all.
            if limit == math.inf:
                limit = 2.5 * problem.devices * problem.one_microbatch[device]
            limit *= policy.share
        if limit * ROUNDING < math.fsum(held[stage] for stage in stages):
            return None
        limits.append(limit)
    return _ListScheduler(problem, policy, held, limits).run()


class _ListScheduler:
    """One run.

    Arguments:
        problem: what is to be scheduled.
        policy: how to choose.
        held: for each stage what a microbatch holds until its backward.
        limits: for each device the most that it may hold.
    """

    def __init__(
        self, problem: Problem, policy: Policy, held: list[float], limits: list[float]
    ) -> None:
        self._policy = policy
        # What device is to decide something, and when.
        self._events = [(0.0, device) for device in range(problem.devices)]
        due = _due_times(problem, policy, limits)
        # Three queues for each stage, or two where backwards are whole.
        chunks: list[_Chunk] = []
        queues: dict[StageKind, _Queue] = {}
        for stage, due_of_stage in enumerate(due):
            weight_held = problem.memory[stage].weight if policy.split else 0.0
            forward = _queue(problem, "F", stage, held[stage], due_of_stage.forward)
            queues[StageKind("F", stage)] = forward
            backward = _queue(
                problem,
                "I" if policy.split else "B",
                stage,
                weight_held - held[stage],
                due_of_stage.backward,
            )
            queues[StageKind(backward.kind, stage)] = backward
            weight = None
            if policy.split:
                weight = _queue(problem, "W", stage, -weight_held, due_of_stage.weight)
                queues[StageKind("W", stage)] = weight
            chunks.append(_Chunk(forward, backward, weight, held[stage], weight_held))
        kinds: tuple[Kind, ...] = ("F", "I", "W") if policy.split else ("F", "B")
        for waiting, source in last_needs(len(due), kinds).items():
            if source is None:
                # The inputs of stage 0 are there from the start.
                queues[waiting].arrivals[:-1] = [0.0] * len(due[0].forward)
            else:
                queues[source].waiting.append(queues[waiting])
        self._devices = [
            _Device([chunks[stage] for stage in stages], limit * ROUNDING)
            for stages, limit in zip(problem.stages_of, limits, strict=True)
        ]
        self._actions = len(queues) * problem.numbering.microbatches

    def run(self) -> Rows:
        """The rows of all devices."""
        while self._events:
            # An event is only a reason to look. One that comes while the device is busy
            # is dropped, since the end of its action is an event too. Memory needs no
            # events: a device frees its own, by actions that end in one.
            now, index = heapq.heappop(self._events)
            device = self._devices[index]
            if now < device.free_at:
                continue
            choice = self._choose(device, now)
            if choice.queue is not None:
                self._start(device, choice.queue, now)
            elif choice.arrival < math.inf:
                heapq.heappush(self._events, (choice.arrival, index))
        rows = [device.row for device in self._devices]
        assert sum(map(len, rows)) == self._actions, "stuck"
        return rows

    def _choose(self, device: _Device, now: float) -> _Choice:
        """What a free device does."""
        # First the best of the backwards and forwards that could start; then whether to
        # wait for a cotangent rather than start a forward; last whether a `W` fills the
        # gap.
        best: _Queue | None = None
        best_due = math.inf
        weight: _Queue | None = None
        weight_due = math.inf
        # The next of each that is known to come.
        gradient_arrival = math.inf
        forward_arrival = math.inf
        for chunk in device.chunks:
            queue = chunk.backward
            arrival = queue.arrivals[queue.started]
            if arrival > now:
                gradient_arrival = min(gradient_arrival, arrival)
            elif queue.due[queue.started] < best_due:
                best = queue
                best_due = queue.due[queue.started]

            queue = chunk.forward
            arrival = queue.arrivals[queue.started]
            # Whether the memory admits it is asked last, since that takes longest.
            if now < arrival < math.inf:
                if self._admits(device, chunk):
                    forward_arrival = min(forward_arrival, arrival)
            elif (
                arrival <= now
                and queue.due[queue.started] < best_due
                and self._admits(device, chunk)
            ):
                best = queue
                best_due = queue.due[queue.started]

            queue = chunk.weight
            if queue is not None and queue.arrivals[queue.started] <= now:
                due = queue.due[queue.started]
                # One that is never due is a choice, too.
                if weight is None or due < weight_due:
                    weight = queue
                    weight_due = due

        arrival = min(forward_arrival, gradient_arrival)
        if best is not None and best.kind == "F":
            # A forward that starts just before a cotangent arrives delays the stages
            # before.
            patience = self._policy.patience * best.duration
            if gradient_arrival < now + patience:
                best = None
                arrival = gradient_arrival
        if weight is not None:
            # Against another action the due times decide. Against waiting, a `W` runs
            # if the gap is long enough for `fill` of it; with `fill=0` it always runs.
            if best is not None:
                first = weight_due < best_due
            else:
                first = arrival - now >= self._policy.fill * weight.duration
            if first:
                best = weight
        return _Choice(best, arrival)

    def _admits(self, device: _Device, chunk: _Chunk) -> bool:
        """Whether the chunk's next forward fits, and every microbatch can still be
        finished, the oldest first.
        """
        room = device.limit - device.held - chunk.held
        if room < 0.0 or room == math.inf or len(device.chunks) == 1:
            return room >= 0.0
        # With several chunks a device can be full of microbatches that cannot go on:
        # each wants another chunk's forward, and there is no room for it.
        new = chunk.forward.started
        oldest = min(other.finished for other in device.chunks)
        newest = max(other.forward.started for other in device.chunks)
        # On paper: finish the microbatches one by one, the oldest first, and see
        # whether each finds room for the forwards that it lacks and then gives its own
        # room back. That is the banker's algorithm; it looks at microbatches under way
        # only.
        for microbatch in range(oldest, newest + 1):
            wanted = freed = 0.0
            for other in device.chunks:
                is_new = other is chunk and microbatch == new
                if other.forward.started <= microbatch and not is_new:
                    wanted += other.held
                elif other.backward.started <= microbatch:
                    freed += other.held
                elif other.weight is not None and other.weight.started <= microbatch:
                    freed += other.held_weight
            if wanted > room:
                return False
            room += freed
        return True

    def _start(self, device: _Device, queue: _Queue, now: float) -> None:
        """Start the next action of a queue, and tell those that wait for it."""
        microbatch = queue.started
        queue.started += 1
        end = now + queue.duration
        device.free_at = end
        device.held += queue.held_change
        device.row.append(queue.number + microbatch)
        heapq.heappush(self._events, (end, queue.device))
        # Queues of the same device need no event: it has one when this action ends.
        for waiting in queue.waiting:
            arrival = end + waiting.latency
            waiting.arrivals[microbatch] = arrival
            if waiting.device != queue.device:
                free_at = self._devices[waiting.device].free_at
                event = (max(arrival, free_at), waiting.device)
                heapq.heappush(self._events, event)


def _queue(
    problem: Problem, kind: Kind, stage: int, held_change: float, due: list[float]
) -> _Queue:
    stages = len(problem.stage_to_device)
    number = (KINDS.index(kind) * stages + stage) * len(due)
    return _Queue(
        kind=kind,
        device=problem.stage_to_device[stage],
        number=number,
        duration=problem.durations[number],
        latency=problem.latencies[number],
        held_change=held_change,
        due=due,
        arrivals=[math.inf] * (len(due) + 1),
    )


def _due_times(
    problem: Problem, policy: Policy, limits: list[float]
) -> list[_DueTimes]:
    """When the actions of each stage are due, on one clock for all.

    A microbatch is a unit of that clock. Its forward is due when it reaches the stage;
    its backward as much later as there are microbatches ahead of it there.
    """
    stages = len(problem.stage_to_device)
    virtual = stages / problem.devices
    clock = [float(i) for i in range(problem.numbering.microbatches)]
    if policy.groups:
        # The chunks take turns: `D` microbatches of the one, then of the next.
        devices = problem.devices
        clock = [t - t % devices + (t % devices) / virtual for t in clock]
    step = policy.slope / 2.0 / virtual
    # The numbers for four stages, one on each device, under `slope=1`:
    #
    #   stage       0     1     2     3
    #   ahead       4     3     2     1       1F1B holds as many
    #   F0 is due   0     0.5   1     1.5
    #   B0 is due   3.5   3     2.5   2       the way back, stage by stage
    ahead = [1.0 + 2.0 * step * (stages - 1 - stage) for stage in range(stages)]
    due: list[_DueTimes] = []
    for stage, device in enumerate(problem.stage_to_device):
        later = math.inf
        needed = problem.one_microbatch[device]
        if policy.due and needed and limits[device] < math.inf:
            # A `W` is due when the device is full.
            of_device = [ahead[other] for other in problem.stages_of[device]]
            mean = sum(of_device) / len(of_device)
            # That is: when as many microbatches wait for their `W` as the limit has
            # room for, beside those that the warm-up holds; a little before.
            later = limits[device] / needed - mean - 0.2
        reached = [t + step * stage for t in clock]
        # At equal dues the input gradient goes first, then what is deeper.
        backward = [t + ahead[stage] - 0.5 - 1e-4 * stage for t in reached]
        due.append(
            _DueTimes(
                forward=[t - 1e-3 * stage for t in reached],
                backward=backward,
                weight=[t + 0.5 + later for t in backward],
            )
        )
    return due
