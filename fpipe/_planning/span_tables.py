"""What every span of layers costs as one of the stages: tables of work, traffic and
memory.

A table is an array of `(L + 1, L + 1)`; at `[i, j]` it has the value of the layers `i`
to `j - 1` together. The work of three layers that take 1, 2 and 4 is

           j=1  j=2  j=3
    i=0      1    3    7
    i=1           2    6
    i=2                4

Entries with `j <= i` are spans without layers, which nobody reads.

Not every cost is a sum. A skip from layer 0 to the layers 2 and 3 arrives once in a
span that has both readers, and not at all in one that has layer 0 too. `arriving` and
`leaving` of it, for 10 bytes and four layers:

           j=1  j=2  j=3  j=4              j=1  j=2  j=3  j=4
    i=0      0    0    0    0        i=0    10   10   10    0
    i=1           0   10   10        i=1          0    0    0
    i=2               10   10        i=2               0    0
    i=3                    10        i=3                    0

Tables are whole arrays, and not functions of a span: the partition reads all spans of
every stage, and numpy makes them in one go.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fpipe._executors.programs import direct_pairs
from fpipe._executors.scheduling import Scheduling
from fpipe._model.remat import Remat
from fpipe._planning.costs import LayerCosts, Sent
from fpipe._planning.partition import Table
from fpipe.schedules import Schedule, simulate


def summed(values: Sequence[float]) -> Table:
    """The table of sums over spans."""
    # Of running totals: the sum of a span is the total at its end minus that at its
    # start.
    ends = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    return ends[None, :] - ends[:, None]


def arriving(layers: int, sends: Sequence[Sent]) -> Table:
    """What spans receive from layers outside: once, however many layers in the span
    read it. Readers may stand before or after the source.
    """
    table = np.zeros((layers + 1, layers + 1))
    for source, readers, size, _ in sends:
        for before, reader in itertools.pairwise([-1, *sorted(readers)]):
            # The spans whose first reader this is: they begin after the reader before.
            table[before + 1 : reader + 1, reader + 1 :] += size
            # Those of them that have the source inside receive nothing.
            first, last = min(reader, source), max(reader, source)
            table[before + 1 : first + 1, last + 1 :] -= size
    return table


def leaving(layers: int, sends: Sequence[Sent]) -> Table:
    """What spans send to layers outside: once, however many read it."""
    table = np.zeros((layers + 1, layers + 1))
    for source, readers, size, _ in sends:
        first, last = min(source, *readers), max(source, *readers)
        table[: source + 1, source + 1 :] += size
        # Spans that have all readers inside too send nothing.
        table[: first + 1, last + 1 :] -= size
    return table


class Waiting(NamedTuple):
    """How many microbatches of each thing that a stage exchanges wait for their turn.

    Attributes:
        before: boundaries from the stage before, or their cotangents.
        skips_in: skips that come in, or their cotangents.
        after: boundaries to the stage after, or their cotangents.
        skips_out: skips that go out, or their cotangents.
    """

    before: int
    skips_in: int
    after: int
    skips_out: int


class Holding(NamedTuple):
    """Of how many microbatches a stage holds something, at most, where a forward takes
    1 and a backward 2.

    What goes from stage to stage waits somewhere for its turn: where it was made (so
    does the placed executor, which sends it when it is asked for), or where it goes (so
    does the scan executor).

    Attributes:
        live: from the stage's forward to the end of its backward, but not while it is
            in the memory of the host.
        recomputed: from its recomputation to the end of its backward; 1 if that is a
            part of the backward.
        arrived: what waits here because it goes here, besides what is live.
        made: what waits here because it was made here, besides what is live.
    """

    live: int
    recomputed: int
    arrived: Waiting
    made: Waiting


@dataclasses.dataclass(frozen=True)
class MeasuredSpans:
    """The work of spans of layers that ran as one stage.

    It is not the sum of what the layers take: a program fuses operations of several
    layers, and finds in its caches what the layer before has made.

    Attributes:
        work: for the span of layers `i, …, j - 1`, at `(i, j)`, its forward and its
            backward.
        only: no other spans count: they cost infinity. Otherwise they cost the sums of
            their layers, times the least ratio of a measured span to its sum: low, so
            that none is left out that may be better than those that were measured.
    """

    work: Mapping[tuple[int, int], tuple[float, float]]
    only: bool = False

    def tables(self, forward: Table, backward: Table) -> tuple[Table, Table]:
        """Tables of the sums over spans, with what is known instead."""
        total = forward + backward
        ratios = [
            sum(work) / total[span]
            for span, work in self.work.items()
            if total[span] > 0
        ]
        scale = min(ratios, default=1.0)
        found = []
        for n, sums in enumerate((forward, backward)):
            table = np.full_like(sums, math.inf) if self.only else sums * scale
            for span, work in self.work.items():
                table[span] = work[n]
            found.append(table)
        return found[0], found[1]


class SpanTables:
    """What each span of layers costs as one of the stages.

    Arguments:
        stage_to_device: the device of each stage.
        optimizer: bytes of optimizer state for each byte of parameters.
        spans: the work of spans that was measured, if any was.

    Attributes:
        before, after: bytes of the boundary before a span, and of the one after it.
        skips_in, skips_out: bytes of the skips that come in, and of those that go out.
    """

    def __init__(
        self,
        costs: LayerCosts,
        stage_to_device: tuple[int, ...],
        scheduling: Scheduling,
        optimizer: float,
        spans: "MeasuredSpans | None" = None,
    ) -> None:
        self._costs, self._stage_to_device = costs, stage_to_device
        self._spans = spans
        self._scheduling, self._optimizer = scheduling, optimizer
        self._remat = Remat.of(costs.checkpoint)
        self._microbatches = costs.microbatches
        count = len(costs.names)
        self.skips_in = arriving(count, costs.skips)
        self.skips_out = leaving(count, costs.skips)
        # What is borrowed crosses once for all microbatches.
        lent = [
            sent._replace(bytes=sent.bytes / costs.microbatches)
            for sent in costs.borrowed
        ]
        self._sent_in = arriving(count, [*costs.skips, *lent])
        self._sent_out = leaving(count, [*costs.skips, *lent])
        self._borrowed = arriving(count, costs.borrowed)
        # The outer ends are 0: the batch is no boundary, and what the last layer
        # returns goes to no stage.
        self.before = np.zeros((count + 1, count + 1))
        self.before[1:count] = np.array(costs.boundaries[:-1])[:, None]
        self.after = np.zeros((count + 1, count + 1))
        self.after[:, 1:count] = np.array(costs.boundaries[:-1])[None, :]

    @cached_property
    def _schedule(self) -> Schedule:
        """The schedule, made when it is first looked at: a large one takes its time."""
        return self._scheduling.make(self._stage_to_device, self._microbatches)

    @cached_property
    def _kinds(self) -> set[str]:
        """The kinds of actions of the schedule."""
        return {action.kind for row in self._schedule.actions for action in row}

    def work(self, s: int) -> Table:
        """Forward, backward, and the forward again where it is recomputed, of a
        microbatch in the mean.
        """
        forward, backward = summed(self._costs.forward), summed(self._costs.backward)
        if self._spans is not None:
            forward, backward = self._spans.tables(forward, backward)
        if not any(self._costs.forward):
            # Costs that the user gave are of all that a layer does.
            return backward
        if not self._schedule.backwards:
            return forward
        # Where a forward is directly followed by its backward, nothing is recomputed:
        # which pairs these are depends on the stage, so that its work does too.
        order = itertools.chain(*self._schedule.actions)
        direct = direct_pairs(order, self._stage_to_device)
        recomputed = sum(
            self._remat.recomputes(i, self._microbatches, (s, i) in direct)
            for i in range(self._microbatches)
        )
        return forward * (1 + recomputed / self._microbatches) + backward

    def copied(self, s: int) -> Table:
        """Bytes that go to the host in each direction, of a microbatch in the mean."""
        share = len(self._schedule.order("O", s)) / self._microbatches
        return share * self._held_after_forward()

    def received(self, s: int) -> Table:
        """Bytes that come in from other devices in a microbatch's forward; as many go
        back in its backward.
        """
        # Stages of one device hand each other a boundary without a transfer. (Skips
        # count as crossing there too: the tables know spans, not where readers are.)
        apart = s > 0 and self._stage_to_device[s - 1] != self._stage_to_device[s]
        return self._sent_in + self.before * apart

    def link(self, s: int) -> Table:
        """Bytes that go in and out in a microbatch's forward: each way as many as that,
        with the backward.
        """
        apart = (
            s + 1 < len(self._stage_to_device)
            and self._stage_to_device[s + 1] != self._stage_to_device[s]
        )
        return self.received(s) + self._sent_out + self.after * apart

    def memory(self, s: int) -> Table:
        """Bytes that the stage needs on its device."""
        # Five parts: what is there for the whole step, what each live microbatch holds,
        # what the one at work needs besides, what waits to be sent or read, and one
        # array at each end for what is on its way.
        costs, params = self._costs, summed(self._costs.params)
        # The batch, which lies on the first stage, and one of each array that comes and
        # goes.
        ends = self.before + self.after + self.skips_in + self.skips_out
        ends[0] += self._microbatches * costs.inputs
        if not self._schedule.backwards:
            in_flight = self.skips_in * len(self._stage_to_device)
            return params + self._borrowed + ends + in_flight
        # Of what is borrowed a copy, and the gradient of it, are on this device.
        fixed = params * (1 + self._optimizer)
        fixed += summed(costs.gradients) + 2 * self._borrowed
        holding = self.holding(s)
        held = self._held_after_forward()
        working: Table | float = 0.0
        if self._remat.option != "never":
            # The residuals of the microbatch at work, or of those that are recomputed
            # early; with `except_last` those of the last one may be there too.
            last_too = self._remat.option == "except_last" and holding.live > 1
            working = self._residuals() * (holding.recomputed + last_too)
        # The executors let things wait at different ends: take the worse of the two.
        waiting = np.maximum(
            self._waiting_bytes(holding.arrived), self._waiting_bytes(holding.made)
        )
        return fixed + held * holding.live + working + waiting + ends

    def _residuals(self) -> Table:
        """Bytes of the residuals of a microbatch."""
        # What two neighbours share is kept once, if both are inside: in `[i, j]` these
        # are the pairs that begin with the layers i, …, j - 2.
        residuals = summed(self._costs.residuals)
        residuals[:, 1:] -= summed(self._costs.shared)[:, :-1]
        return residuals

    def _held_after_forward(self) -> Table:
        """Bytes that a microbatch holds from its forward on."""
        if self._remat.option == "never":
            return self._residuals()
        return self.before + self.skips_in + summed(self._costs.saved)

    def _waiting_bytes(self, waiting: Waiting) -> Table:
        """The bytes of what waits, for each span."""
        return (
            self.before * waiting.before
            + self.skips_in * waiting.skips_in
            + self.after * waiting.after
            + self.skips_out * waiting.skips_out
        )

    def holding(self, s: int) -> Holding:
        """What a stage holds while the schedule runs."""
        # Everything here is the most things at a time between two events, such as "the
        # stage before has made it" and "this stage's backward has ended". Cotangents
        # have the size of what they are cotangents of, so they count as that.
        times, last = self._times, len(self._stage_to_device) - 1
        held = _most_between(times.begun[[s]], times.back_done[[s]])
        live = held
        if "O" in self._kinds:
            # A copy to the host is the end of one stay, and a copy back the start of
            # another.
            starts = np.concatenate([times.begun[s], times.back_from_host[s]])
            ends = np.concatenate([times.back_done[s], times.on_host[s]])
            live = _most_between(starts[None], ends[None])
        # One that recomputes nothing holds its residuals, too.
        recomputed = max(1, _most_between(times.recomputed[[s]], times.used[[s]]))
        neighbour_before = slice(max(0, s - 1), s)
        neighbour_after = slice(s + 1, min(last, s + 1) + 1)
        # Skips may come from any earlier stage, and go to any later one.
        all_before, all_after = slice(0, s), slice(s + 1, last + 1)
        if not self._costs.skips:
            all_before = all_after = slice(0)

        def arrived(before: slice) -> int:
            """Made by an earlier stage and not yet gone back: some of them are live."""
            return max(
                0, _most_between(times.made[before], times.back_done[[s]]) - held
            )

        def cotangents_arrived(after: slice) -> int:
            return _most_between(times.back_done[after], times.back_done[[s]])

        def cotangents_made(before: slice) -> int:
            return _most_between(times.back_done[[s]], times.back_begun[before])

        def made(after: slice) -> int:
            return _most_between(times.made[[s]], times.begun[after])

        return Holding(
            live,
            recomputed,
            arrived=Waiting(
                before=arrived(neighbour_before),
                skips_in=arrived(all_before),
                after=cotangents_arrived(neighbour_after),
                skips_out=cotangents_arrived(all_after),
            ),
            made=Waiting(
                before=cotangents_made(neighbour_before),
                skips_in=cotangents_made(all_before),
                after=made(neighbour_after),
                skips_out=made(all_after),
            ),
        )

    @cached_property
    def _times(self) -> "_Times":
        shape = len(self._stage_to_device), self._microbatches
        # A backward in halves begins with `I` and is done with `W`: until then the
        # microbatch holds what `W` reads.
        begun, made, back_done = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        # What has no such time is there at no time.
        back_begun, on_host, back_from_host, recomputed, used = (
            np.full(shape, np.inf) for _ in range(5)
        )
        for _, (kind, s, i), start, end in simulate(self._schedule).events:
            match kind:
                case "F":
                    begun[s, i], made[s, i] = start, end
                case "O":
                    on_host[s, i] = end
                case "L":
                    back_from_host[s, i] = start
                case "R":
                    recomputed[s, i] = start
                case "B" | "I" | "W":
                    back_begun[s, i] = min(back_begun[s, i], start)
                    back_done[s, i] = max(back_done[s, i], end)
                    if kind != "W":
                        recomputed[s, i] = min(recomputed[s, i], start)
                        used[s, i] = end
        return _Times(
            begun,
            made,
            back_begun,
            back_done,
            on_host,
            back_from_host,
            recomputed,
            used,
        )


class _Times(NamedTuple):
    """For each stage and microbatch when its forward begins and ends, and when its
    backward does; when it is in the memory of the host, and when it begins to come
    back; when its recomputation begins, and the action ends that reads what that made.
    What there is not is at infinity.
    """

    begun: np.ndarray
    made: np.ndarray
    back_begun: np.ndarray
    back_done: np.ndarray
    on_host: np.ndarray
    back_from_host: np.ndarray
    recomputed: np.ndarray
    used: np.ndarray


def _most_between(starts: np.ndarray, ends: np.ndarray) -> int:
    """The most microbatches between a start and an end, for the worst of several
    stages.

    Arguments:
        starts, ends: by stage and microbatch; one of them is of one stage. Where one
            ends, another may start.
    """
    # With starts 0, 1, 2 and ends 2, 5, 8: when the third starts, the first has ended,
    # so 2 is the most. It is reached at a start, so only these are looked at.
    most = 0
    for start, end in itertools.product(np.sort(starts, 1), np.sort(ends, 1)):
        start = start[np.isfinite(start)]
        if not len(start):
            continue
        started = np.arange(1, len(start) + 1)
        ended = np.searchsorted(end, start, side="right")
        most = max(most, int(np.max(started - ended)))
    return most
