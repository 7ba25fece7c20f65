"""When everything runs: a schedule under given costs becomes a timeline.

In: a `Schedule` and `Costs`. Out: a `Timeline`. `simulate(gpipe(2, 1))`, where a
forward takes 1 and a backward 2:

    Event(0, F(0,0), 0.0, 1.0), Event(1, F(1,0), 1.0, 2.0)
    Event(1, B(1,0), 2.0, 4.0), Event(0, B(0,0), 4.0, 6.0)

The clock itself is in `_clock.py`.
"""

from collections.abc import Iterable, Sequence

from fpipe.schedules._action import Action
from fpipe.schedules._checks import check_type
from fpipe.schedules._clock import Clock
from fpipe.schedules._costs import Costs
from fpipe.schedules._schedule import Schedule
from fpipe.schedules._timeline import Event, Launch, Timeline


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Compute when each action of a schedule runs, under given costs.

    An action starts when its device is free, its inputs are there, and the host has
    launched it. Copies to the host run on a copy engine of the device, one for each
    direction. An `O` starts when its `F` has ended. At the `O` in its row the device
    waits until the copy is done. An `L` starts at its position in the row. The device
    waits for this copy at the backward that needs it.

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
    return simulate_fused(schedule, Costs() if costs is None else costs, ())


def simulate_fused(
    schedule: Schedule, costs: Costs, fused: Iterable[Sequence[Action]]
) -> Timeline:
    """Compute when each action runs where some run as one program.

    Arguments:
        fused: the actions of each such program, which are launched together. Nobody
            waits for them longer than if they were apart.
    """
    costs.check(schedule.stages)
    # In numbers, played by the clock, and back as actions.
    clock = Clock(schedule, costs, fused)
    run = clock.run(clock.rows)
    action_of = clock.action_of
    device_of: dict[int, int] = {}
    for device, numbers in enumerate(clock.rows):
        device_of.update(dict.fromkeys(numbers, device))
    order = run.order()
    # `map` makes the events of a long schedule in half the time of a loop.
    events = map(
        Event,
        map(device_of.__getitem__, order),
        map(action_of.__getitem__, order),
        map(run.played.starts.__getitem__, order),
        map(run.played.ends.__getitem__, order),
    )
    launches = tuple(
        Launch(thread, action_of[number], start, end)
        for thread, number, start, end in run.launches
    )
    memory = tuple(costs.holds(stage) for stage in range(schedule.stages))
    return Timeline(tuple(events), schedule.devices, schedule.name, memory, launches)


def launch_order(schedule: Schedule) -> list[Action]:
    """One order for all devices, in which one thread can launch their actions."""
    # That of the simulation under the default costs, whatever the costs are.
    clock = Clock(schedule, Costs())
    action_of = clock.action_of
    return [action_of[number] for number in clock.run(clock.rows).launch_order()]
