"""A schedule made for given costs and a memory limit.

In: sizes, `Costs`, and a limit for each device. Out: the best `Schedule` found.
`zero_bubble(2, 3, memory=2)`:

    0: F0 F1 I0 W0 F2 I1 W1 I2 W2
    1: F0 I0 F1 I1 W0 F2 I2 W1 W2

After the automatic scheduling of Zero Bubble (Qi et al., arXiv 2401.10241), with a
memory limit as in Controllable Memory (arXiv 2405.15362). As in the paper, a list
scheduler with a few parameters is tried over a grid. Three things are different:

- The parameters are the slope of the warm-up and the delay of a `W`, so the fixed
  schedules lie near the grid.
- The fixed schedules are candidates too, so the result is never worse than they are.
- A local search on the critical path comes last, as in job-shop scheduling (Nowicki and
  Smutnicki). Here a `W` can move most freely.

All limits of the search are counts, never times, so the same call gives the same
schedule.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fpipe.schedules._checks import check_type, shown
from fpipe.schedules._costs import Costs
from fpipe.schedules._generators.sizes import looped_stages, v_shaped_stages
from fpipe.schedules._names import NAMES, named
from fpipe.schedules._schedule import Schedule
from fpipe.schedules._search.improve import anneal, promise, toggle
from fpipe.schedules._search.list_scheduler import list_schedule
from fpipe.schedules._search.problem import (
    ROUNDING,
    Found,
    Policy,
    Problem,
    best_first,
)


def zero_bubble(
    devices: int,
    microbatches: int,
    costs: Costs | None = None,
    *,
    memory: float | Sequence[float] | None = None,
    placement: str | Sequence[int] = "one",
    virtual: int = 2,
) -> Schedule:
    """Search for the best schedule for given costs, within a memory limit.

    The result is never slower, under `simulate` with the same costs, than any schedule
    of `NAMES` that has the same placement and keeps the limit. Among equally fast
    schedules the one with the least memory is taken. A backward is split into `I` and
    `W` where that saves time. With equal costs, no limit and one stage per device, the
    idle time is `(D-1)F`, the time that it takes to fill the pipeline. The search takes
    seconds for 16 devices and 64 microbatches. After Qi et al. (arXiv 2401.10241).

    Arguments:
        devices: `D`, the number of devices.
        microbatches: `m`, the number of microbatches.
        costs: the times and the memory of the actions. Default `Costs()`.
        memory: the memory limit of a device, in the unit of `costs.memory`: one number,
            or one per device. Default: no limit.
        placement: `"one"` (stage `s` on device `s`), `"v"` (device `d` holds stages `d`
            and `2D-1-d`), `"looped"` (stage `s` on device `s % D`), or the device of
            each stage.
        virtual: `v`, the number of stages per device for `"looped"`.

    Returns:
        A `Schedule` with the name `zero_bubble`.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a size is too small, or the limit is below the memory that one
            microbatch alone needs. The message says how much that is.

    Example:
        >>> print(fpipe.schedules.zero_bubble(devices=2, microbatches=3, memory=2))
        0: F0 F1 I0 W0 F2 I1 W1 I2 W2
        1: F0 I0 F1 I1 W0 F2 I2 W1 W2
        >>> import functools
        >>> search = functools.partial(fpipe.schedules.zero_bubble, memory=2)
        >>> devices = [jax.devices()[0]] * 2
        >>> pipe = fpipe.Pipe([fpipe.fn(jnp.sin)] * 2, devices=devices, schedule=search)
    """
    sizes = {"devices": devices, "microbatches": microbatches, "virtual": virtual}
    for name, value in sizes.items():
        if type(value) is not int:
            raise TypeError(
                f"`zero_bubble({name}={shown(value)})`: {name} must be an int"
            )
        if value < 1:
            raise ValueError(
                f"`zero_bubble({name}={shown(value)})`: {name} must be at least 1"
            )
    if costs is not None:
        check_type("`zero_bubble(costs=...)`", costs, Costs)
    stage_to_device = _read_placement(devices, placement, virtual)
    problem = Problem.of(
        devices, microbatches, stage_to_device, costs or Costs(), memory
    )
    # Many cheap schedules first. Then an expensive search starts from the best few of
    # them, unless one of them is optimal already.
    found = best_first([*_fixed(problem), *_grid(problem)])
    bound = problem.bound() * ROUNDING
    if found[0].makespan > bound:
        for seed, finalist in enumerate(_finalists(problem, found)):
            toggled = toggle(problem, finalist)
            found.append(anneal(problem, toggled, bound, seed))
    # `Schedule` validates the result, like any rows.
    best = best_first(found)[0]
    rows = [[problem.numbering.action(number) for number in row] for row in best.rows]
    return Schedule(rows, stage_to_device, name="zero_bubble")


def _read_placement(devices: int, placement: Any, virtual: int) -> tuple[int, ...]:
    """The device of each stage."""
    known = {
        "one": looped_stages(devices, virtual=1),
        "v": v_shaped_stages(devices),
        "looped": looped_stages(devices, virtual),
    }
    call = f"`zero_bubble(placement={shown(placement)})`"
    choices = f"{', '.join(map(repr, known))}, or the device of each stage"
    if isinstance(placement, str):
        if placement not in known:
            raise ValueError(f"{call}: {choices}")
        return tuple(known[placement])
    if not isinstance(placement, Iterable):
        raise TypeError(f"{call}: {choices}")
    stage_to_device = tuple(placement)
    if any(type(device) is not int for device in stage_to_device):
        raise TypeError(f"{call}: {choices}")
    if set(stage_to_device) != set(range(devices)):
        raise ValueError(
            f"{call}: each of the devices 0 to {devices - 1} must have a stage, and "
            "there are no other devices"
        )
    return stage_to_device


def _fixed(problem: Problem) -> Iterator[Found]:
    """The schedules with a name that have this placement and these sizes, and fit."""
    # There is no table of placements: a generator itself refuses sizes that it cannot
    # have.
    virtual = len(problem.stages_of[0])
    for name in NAMES:
        try:
            schedule = named(
                name, problem.devices, problem.numbering.microbatches, virtual
            )
        except ValueError:  # sizes that it cannot have
            continue
        if not schedule.backwards:
            continue
        if schedule.stage_to_device != problem.stage_to_device:
            continue
        rows = problem.numbering.rows(schedule)
        if problem.all_fit(rows):
            yield problem.judge(rows)


def _grid(problem: Problem) -> list[Found]:
    """The list scheduler over its policies; the best of them again with less memory."""
    # `slope` and `groups`, which give the order of the forwards and backwards.
    # 0 lets every input gradient go first, 1 is 1F1B, 2 the eager one. Latency and
    # unequal stages have their best ones in between.
    orders = [(slope, False) for slope in (0.0, 0.5, 1.0, 1.25, 1.5, 2.0, 2.5)]
    if len(problem.stage_to_device) > problem.devices:
        orders += [(2.0, True), (2.5, True)]
    patiences = (0.0, 0.5)
    limited = min(problem.limits) < math.inf
    dues = (False, True) if limited else (False,)
    policies: list[Policy] = []
    for (slope, groups), patience in itertools.product(orders, patiences):
        policies.append(
            Policy(slope, patience=patience, groups=groups, split=False),
        )
    for (slope, groups), fill, patience, due in itertools.product(
        orders, (0.0, 0.5, 1.0), patiences, dues
    ):
        policies.append(Policy(slope, fill, patience, due, groups))
    # With one stage a device and no limit, there are 14 policies for whole backwards
    # and 42 for split ones. The best are then tried with less memory: a schedule that
    # holds less may be as short, and is preferred.
    found = _try_all(problem, policies)
    best = [one.policy for one in best_first(found)[:8] if one.policy]
    with_less = [
        policy._replace(share=share, due=True)
        for policy in best
        for share in (0.9, 0.75, 0.6, 0.5, 0.35)
    ]
    return found + _try_all(problem, with_less)


def _try_all(problem: Problem, policies: Iterable[Policy]) -> list[Found]:
    found: list[Found] = []
    for policy in policies:
        rows = list_schedule(problem, policy)
        if rows is not None:
            found.append(problem.judge(rows, policy))
    return found


def _finalists(problem: Problem, found: list[Found]) -> list[Found]:
    """Those that are worth improving, the best first."""
    if all(stage.gain <= 0.0 for stage in problem.costs):
        return found[:3]
    # Where a whole backward is cheaper, the best may be one that has yet to be fused,
    # or one that was never split.
    promising = sorted(found, key=lambda one: promise(problem, one))
    whole = [one for one in found if one.policy and not one.policy.split]
    return [found[0], *promising[:2], *whole[:1]]
