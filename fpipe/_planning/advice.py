"""What a prediction says against the way a pipe is set up, and what would be better.

In: the rows and the timeline of a prediction. Out: sentences for its `warnings`. Each
function looks at one thing, and yields a sentence if there is something to say. For six
equal layers, cut as [4, 1, 1]:

    stage 0 takes 1.9 times the mean of the stages: balance=[2, 2, 2] makes the most
    expensive one take 1.0 times
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from fpipe._planning.prediction import DeviceRow, StageRow
from fpipe._planning.text import quantity, size
from fpipe.schedules import Timeline
from fpipe.schedules._checks import counted

# The thresholds are for what a reader would act on. A cut between layers is hardly ever
# even, so a stage is told of only if it takes so many times the mean.
_UNEVEN = 1.25

# A device is idle for that share of the time before it is worth a word: a
# pipeline has to fill and to drain, so that some idle time is normal.
_IDLE = 0.2

# What is proposed gains at least that share.
_BETTER = 0.05
# What JAX calls GPUs.
_GPUS = frozenset({"gpu", "cuda", "rocm"})

# Microbatches for each stage, beyond which more gain little: with 4 the bubble of 1F1B,
# (D - 1) / (m + D - 1), is less than a fifth.
_ENOUGH = 4


def advise_balance(
    stages: Sequence[StageRow],
    work: Sequence[float],
    best: Callable[[], tuple[tuple[int, ...], float]],
) -> Iterator[str]:
    """A stage that the others wait for.

    Arguments:
        work: what each stage takes for a microbatch.
        best: finds the balance that makes the most expensive stage cheapest, and what
            is left of its work, as a share. It is asked only if that is worth while.
    """
    # A stage slows all others down by what it takes more than they do: in the steady
    # state each microbatch takes as long as on the most expensive stage.
    mean, most = sum(work) / len(stages), max(work)
    worst = stages[work.index(most)]
    if not mean or most <= _UNEVEN * mean:
        return
    times = most / mean
    text = f"stage {worst.stage} takes {times:.1f} times the mean of the stages"
    balance, left = best()
    if left < 1 - _BETTER:
        yield (
            f"{text}: balance={list(balance)} makes the most expensive one take "
            f"{left * times:.1f} times"
        )
    else:
        names = ", ".join(map(repr, dict.fromkeys(worst.layers)))
        yield (
            f"{text}, and no other balance is better: cut its layers ({names}) into "
            "smaller ones, or take fewer stages"
        )


def advise_more_microbatches(
    stages: Sequence[StageRow],
    timeline: Timeline,
    microbatches: int,
    more: Iterable[tuple[int, float]],
) -> Iterator[str]:
    """Too few microbatches for the stages.

    Arguments:
        more: larger numbers of microbatches, with the bubble of each.
    """
    if timeline.bubble <= _IDLE:
        return
    # The first that is enough, else the last of these: ever smaller microbatches keep
    # a device less and less busy.
    found = None
    for found in more:
        if found[1] <= _IDLE or found[0] >= _ENOUGH * len(stages):
            break
    if found is not None and timeline.bubble - found[1] > _BETTER:
        yield (
            f"devices are idle for {timeline.bubble:.0%} of the time: "
            f"{counted(microbatches, 'microbatch', 'es')} "
            f"{'is' if microbatches == 1 else 'are'} few for {len(stages)} "
            f"stages; chunks={found[0]} makes it {found[1]:.0%}"
        )


def warn_of_slow_launches(
    timeline: Timeline, without: Callable[[], Timeline], platforms: Collection[str]
) -> Iterator[str]:
    """A host that launches more slowly than devices work.

    Arguments:
        timeline: in seconds.
        without: the same, if launches took no time. It is asked only if there are some.
        platforms: of the devices, as JAX names them.
    """
    if not timeline.launches:
        return
    shortest = without().makespan
    if shortest >= timeline.makespan * (1 - _BETTER):
        return
    busy = quantity(timeline.busiest_thread, "second")
    step = quantity(timeline.makespan, "second")
    text = (
        f"host-bound: the host launches for {busy} of {step}, and without launches the "
        f"step would take {quantity(shortest, 'second')}: take fewer microbatches, "
        'fewer stages on a device, whole backwards, or executor="scan"'
    )
    if _GPUS.intersection(platforms):
        text += (
            "; the environment variable PJRT_GPU_ENABLE_ASYNC_DISPATCH=1, set before "
            "JAX starts, has it launch for each GPU in a thread of its own"
        )
    yield text


def advise_equal_pieces(microbatch_rows: Sequence[int]) -> Iterator[str]:
    """A last microbatch of another size."""
    if len(set(microbatch_rows)) > 1:
        yield (
            "the last microbatch is smaller than the others, so every program is "
            "compiled twice: take a number of chunks that "
            "divides the batch"
        )


def warn_of_repeated_devices(places: int, devices: int) -> Iterator[str]:
    """A device under several numbers in the schedule, which knows nothing of that.

    Arguments:
        places: the devices of the schedule.
        devices: how many different ones these are.
    """
    if devices < places:
        yield (
            f"the schedule has {places} devices, and `devices=` names only {devices} "
            f"different ones: the step and the bubble are predicted for {places}, so "
            "the real step takes longer; the predicted memory is right"
        )


def warn_of_short_memory(devices: Sequence[DeviceRow]) -> Iterator[str]:
    """Devices that have less memory than they need."""
    for row in devices:
        if row.missing:
            largest = max(row.memory, key=lambda role: row.memory[role])
            cure = _CURES.get(largest, "more devices, or a balance with memory=")
            yield (
                f"device {row.device} ({row.name}) is short of {size(row.missing)}; "
                f"most of its memory is {largest}: {cure}"
            )


# By the largest part of what a device holds: what makes that part smaller.
_CURES = {
    "constants": "make them parameters (frozen=...), which all programs share",
    "residuals": 'checkpoint="always", or more chunks',
    "boundaries": "more chunks, or a schedule that holds fewer microbatches (1f1b)",
    "skips": "more chunks, or a balance that keeps both ends of a skip on one device",
    "temporary": "more chunks, or smaller layers",
}
