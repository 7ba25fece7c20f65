"""When everything runs: a schedule under given costs becomes a timeline.

In: a `Schedule` and `Costs`. Out: a `Timeline`; `_timeline.py` has an example.
The clock itself is in `_numbering.py`.
"""

from fpipe.schedules._checks import check_type
from fpipe.schedules._costs import Costs
from fpipe.schedules._numbering import Copies, Numbering, Played, Rows, play
from fpipe.schedules._schedule import Schedule
from fpipe.schedules._timeline import Event, Launch, Timeline


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Compute when each action of a schedule runs, under given costs.

    An action starts when its device is free, its inputs are there, and the host has
    launched it. Copies to the host run on a copy engine of the device, one for each
    direction. An `O` starts when its `F` has ended; its device waits for it at its
    position in the row. An `L` starts at its position in the row; the device waits for
    it at the backward that needs it.

    Arguments:
        schedule: any `Schedule`.
        costs: the costs of the actions. Default `Costs()`: a forward takes 1 and a
            backward 2.

    Returns:
        A `Timeline`, in the unit of `costs`.

    Raises:
        TypeError: `schedule` is no `Schedule`, or `costs` are no `Costs`.
        ValueError: a cost has one number per stage for another number of stages.
    """
    check_type("`simulate(schedule)`", schedule, Schedule)
    if costs is not None:
        check_type("`simulate(schedule, costs)`", costs, Costs)
    costs = Costs() if costs is None else costs
    costs.check(schedule.stages)
    # In numbers, played by the clock, and back as actions.
    numbering = Numbering(schedule.stages, schedule.microbatches)
    rows = numbering.rows(schedule)
    crossing = numbering.crossing_needs(rows)
    launches = _launches(schedule, costs) if costs.launch else ()
    launched: list[float] | None = None
    if launches:
        launched = [0.0] * len(crossing)
        for launch in launches:
            launched[numbering.number(launch.action)] = launch.end
    copies = numbering.copies(rows)
    played = play(
        rows,
        crossing,
        numbering.durations(costs),
        numbering.latencies(costs, schedule.stage_to_device),
        launched,
        copies,
    )
    assert played is not None, "a deadlock, which `Schedule` refuses"
    starts = played.starts
    # Ties go by device, except that what waits for an action that takes no time is
    # behind it.
    rank = _rank_at_equal_starts(rows, crossing, copies, played)
    order = sorted(
        (starts[number], rank[number], device, position, number)
        for device, row in enumerate(rows)
        for position, number in enumerate(row)
    )
    events = tuple(
        Event(device, schedule.actions[device][position], start, played.ends[number])
        for start, _, device, position, number in order
    )
    memory = tuple(costs.holds(stage) for stage in range(schedule.stages))
    return Timeline(events, schedule.devices, schedule.name, memory, launches)


def _launches(schedule: Schedule, costs: Costs) -> tuple[Launch, ...]:
    """When the host launches each action.

    A launch waits for nothing but the launch before it on its thread. `one_f_one_b(2,
    2)`, with one thread and a launch of 1:

        host     F(0,0) F(0,1) F(1,0) B(1,0) B(0,0) F(1,1) B(1,1) B(0,1)
                 0      1      2      3      4      5      6      7      8
    """
    # The order in which the placed executor dispatches: that of the simulation under
    # the default costs, whatever the costs are here.
    order = simulate(schedule).events
    free_at = [0.0] * schedule.devices
    launches: list[Launch] = []
    for device, action, _, _ in order:
        thread = device if costs.launchers == "per_device" else 0
        start = free_at[thread]
        free_at[thread] = start + costs.launch
        launches.append(Launch(thread, action, start, free_at[thread]))
    return tuple(launches)


def _rank_at_equal_starts(
    rows: Rows, crossing: list[int], copies: Copies | None, played: Played
) -> list[int]:
    """For each action how many of those that start with it are before it.

    Only an action that takes no time is before another that starts with it.
    """
    # With `Costs(W=0)`, W(0,0) and what comes after it start at one moment. The order
    # of starts cannot tell them apart, and `peak_live` would count the wrong one first.
    starts, ends = played.starts, played.ends
    rank = [0] * len(starts)
    # As a rule everything takes time, and all ranks are 0.
    if all(starts[number] < ends[number] for number in played.order):
        return rank
    before = _waited_for_in_row(rows, copies)
    # In the order of play, what an action waits for has its rank already.
    for number in played.order:
        for first in (crossing[number], *before[number]):
            if first >= 0 and starts[first] == starts[number]:
                rank[number] = max(rank[number], rank[first] + 1)
    return rank


def _waited_for_in_row(rows: Rows, copies: Copies | None) -> dict[int, list[int]]:
    """For each action those of its device that it waits for directly."""
    before: dict[int, list[int]] = {}
    for row in rows:
        computed = copied_out = copied_back = -1
        for number in row:
            if copies is None:
                before[number] = [computed]
                computed = number
                continue
            waits = before[number] = [copies.needs[number], copied_out]
            if number in copies.out:
                copied_out = number
            elif number in copies.back:
                waits += [computed, copied_back]
                copied_back = number
            else:
                waits.append(computed)
                computed = number
    return before
