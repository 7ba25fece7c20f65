"""The schedules that have a name: each a pure function from sizes to a `Schedule`.

`D` devices, one stage on each, `m` microbatches; `F` and `B` are the times of a forward and a
backward of one microbatch on one device. Idle time is the makespan minus the work.
"""

from collections.abc import Callable

from fpipe.schedules._schedule import Action, Schedule


def gpipe(devices: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards (GPipe, Huang et al., arXiv 1811.06965).

    Idle time `(D-1)(F+B)`; peak live microbatches `m` on every device.

        0: F0 F1 F2 F3 .  .  B0 .  B1 .  B2 .  B3
        1: .  F0 F1 F2 F3 B0 .  B1 .  B2 .  B3
    """
    return _one_stage_each("gpipe", devices, microbatches, lambda d: microbatches)


def one_f_one_b(devices: int, microbatches: int) -> Schedule:
    """Few forwards to warm up, then one forward, one backward (1F1B, PipeDream-flush, arXiv 2006.09503).

    Idle time `(D-1)(F+B)`; peak live microbatches `min(m, D-d)` on device `d`.

        0: F0 F1 .  B0 F2 B1 F3 B2 .  B3
        1: .  F0 B0 F1 B1 F2 B2 F3 B3
    """
    return _one_stage_each("1f1b", devices, microbatches, lambda d: devices - 1 - d)


def eager_1f1b(devices: int, microbatches: int) -> Schedule:
    """1F1B with twice the warm-up, which hides the transfers (Zhuang et al., arXiv 2211.05322).

    Idle time `(D-1)(F+B)`, and a transfer of latency `c` costs `O(D)·c`, where 1F1B pays `c` for
    nearly every microbatch; peak live microbatches `min(m, 2(D-1-d)+1)` on device `d`.
    """
    return _one_stage_each("eager_1f1b", devices, microbatches, lambda d: 2 * (devices - 1 - d))


def _one_stage_each(name: str, devices: int, microbatches: int, warm_up: Callable[[int], int]) -> Schedule:
    call = f"`{name}(devices={devices!r}, microbatches={microbatches!r})`"
    for what, value in (("devices", devices), ("microbatches", microbatches)):
        if type(value) is not int:
            raise TypeError(f"{call}: {what} is an int")
        if value < 1:
            raise ValueError(f"{call}: {what} is at least 1")
    rows = []
    for d in range(devices):
        w = min(warm_up(d), microbatches)
        row = [Action("F", d, i) for i in range(w)]
        for i in range(microbatches):
            if w + i < microbatches:
                row.append(Action("F", d, w + i))
            row.append(Action("B", d, i))
        rows.append(row)
    return Schedule(rows, name=name)
