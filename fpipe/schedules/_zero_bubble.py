"""Schedules that split a backward into `I` and `W`: only `I` is waited for, and `W`
fills the gaps.

The words, units and drawings are those of `_generators`. In a *V* device `d` holds the
stages `d` and `2D-1-d`, its chunks 0 and 1: the pipeline runs down the devices and up
again, and the loss is on device 0.
"""

from collections.abc import Callable, Iterable

from fpipe.schedules._action import Action, Kind
from fpipe.schedules._generators import check_sizes, even_rounds, looped
from fpipe.schedules._schedule import Schedule


def zb_h1(devices: int, microbatches: int, virtual: int = 1) -> Schedule:
    """1F1B with `W` put off by `d` backwards: less idle time, the same peak (ZB-H1, Qi
    et al., arXiv 2401.10241).

    `virtual > 1` is the interleaved ZB-H1: stage `c*D + d` on device `d`, in the rounds
    of `interleaved_1f1b`, the longest of `r` microbatches.

    Idle time `(D-1)(F+I-min(F, I, W))/v` where `m >= D`, and for `v = 1`, `W <= min(F,
    I)` also below: `(D-1)(F+I-W) + max(D-m, 0) W`. Peak live chunks `min(v*m, (v-1)r +
    D)` on every device. `zb_h1(3, 4)`:

        0: F0 F1 F2 .  .  I0 W0 F3 I1 W1 I2 W2 I3 W3
        1: .  F0 F1 .  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
        2: .  .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3
    """
    check_sizes("zb_h1", devices=devices, microbatches=microbatches, virtual=virtual)
    rounds = (
        even_rounds(devices, microbatches) if virtual > 1 else [range(microbatches)]
    )
    first = (virtual - 1) * len(rounds[0])
    return looped(
        "zb_h1",
        devices,
        virtual,
        rounds,
        lambda d: first + devices - 1 - d,
        lambda d: d,
    )


def zb_h2(devices: int, microbatches: int) -> Schedule:
    """ZB-H1 with twice the warm-up and twice the lag: only the fill is idle (ZB-H2, Qi
    et al., arXiv 2401.10241).

    Idle time `(D-1)F` where `m >= 2D-1` and `I <= 2 min(F, W)`, and `(D-1) max(F, I-F,
    F+I-2W)` for other costs. Peak live microbatches `min(m, 2D-1)` on every device.
    `zb_h2(2, 4)`:

        0: F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3 .
        1: .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3
    """
    check_sizes("zb_h2", devices=devices, microbatches=microbatches)
    return looped(
        "zb_h2",
        devices,
        1,
        [range(microbatches)],
        lambda d: 2 * (devices - 1 - d),
        lambda d: 2 * d,
    )


def zb_v(devices: int, microbatches: int) -> Schedule:
    """Half of ZB-H2's idle time at the peak of 1F1B (ZB-V, Qi et al., arXiv
    2401.10241).

    Idle time `(D-1)F/2` where `m >= 2D-1` and `W <= F = I`; at `F = I = W` it is
    `max(D-1, 4(D-1) - 2(m-1)) F/2` for every `m`. Peak live chunks `min(2m, m+1+d,
    2D)`. `zb_v(2, 3)`:

        0: 0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2 .
        1: .   1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2
    """
    check_sizes("zb_v", devices=devices, microbatches=microbatches)
    D = devices  # noqa: N806 - the letter of the formulas
    n = max(microbatches, 2 * D - 1)  # what the warm-up needs

    def script(d: int) -> Iterable[tuple[str, int]]:
        yield "F0", 2 * (D - d) - 1
        yield "F1 F0", d
        yield "F1 I1 W1", D - d
        yield "F0 I0 W0 F1 I1 W1", n - 2 * D + d + 1
        yield "I0 W0 F1 I1 W1", D - d - 1
        yield "I0 I1", d
        yield "I0 W0", D - d
        yield "W1", d
        yield "W0", d

    return _scripted("zb_v", devices, microbatches, script)


def dualpipe_v(devices: int, microbatches: int) -> Schedule:
    """A forward and a backward side by side, to overlap their communication (DualPipeV,
    DeepSeek, arXiv 2412.19437).

    A pair that the paper overlaps is a forward and then a backward here. Idle time
    `(D-1)(F+I-W)/2` where `m >= 2D` and `W <= I <= F <= I+W`. The paper's
    `(D-1)(F+2I-W)/2` is for pairs that end together: the forward's output is here
    sooner. Peak live chunks `min(2m, m+1+d, 2D+1)`. `dualpipe_v(2, 4)`:

        0: 0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1---- 3F2 0B0---- 3B2---- 3F3 .   0B1----
            3B3---- 0I2 0W2 0I3 0W3
        1: .   1F0 2F0 1F1 2F1 1F2 2B0---- 2F2 1B0---- 1F3 2B1---- 2F3 1B1---- 2B2----
            1B2---- 2I3 1I3 2W3 1W3
    """
    check_sizes("dualpipe_v", devices=devices, microbatches=microbatches)
    D = devices  # noqa: N806 - the letter of the formulas
    n = max(microbatches, 2 * D)  # what the warm-up needs

    def script(d: int) -> Iterable[tuple[str, int]]:
        half, odd = divmod(d + 1, 2)
        yield "F0", 2 * (D - d - 1)
        yield "F0 F1", d + 1
        yield "I1 W F1", D - d - 1
        yield "F0 B1 F1 B0", n - 2 * D + d + 1
        yield "B1 F1 B0", D - d - 1
        yield "B1 B0", half
        yield "B1 I0", odd
        yield "I1 I0", half
        yield "W I0", D - d - 1
        yield "W", d + 1

    return _scripted("dualpipe_v", devices, microbatches, script)


def v_half(devices: int, microbatches: int) -> Schedule:
    """Half of 1F1B's idle time at half of its peak (V-Half, Qi et al., arXiv
    2405.15362).

    At `F = I = W` idle time `(D-1)(F+B)/2`, less `F/2` where `D` is odd and above 1, as
    soon as `m >= floor((D+2)/2)`. Peak live chunks at most `min(2m, 2 floor((D+2)/2))`,
    reached on some device. `v_half(2, 3)`:

        0: 0F0 .   .   3F0 0F1 3I0 3W0 3F1 0F2 0I0 3I1 0W0 3W1 3F2 .   0I1 3I2 0W1 3W2
            0I2 0W2
        1: .   1F0 2F0 .   .   1F1 2F1 2I0 1I0 2W0 1F2 1W0 2F2 2I1 1I1 2W1 1W1 2I2 1I2
            2W2 1W2
    """
    check_sizes("v_half", devices=devices, microbatches=microbatches)
    D, i = devices, 0 if devices % 2 else 3  # noqa: N806 - the letter of the formulas
    return _squeezed(
        "v_half",
        devices,
        microbatches,
        lambda d: (2 * d, 3 * D - d - 2, 3 * D + i + 2 * d - 1, 6 * D + i - d - 2),
        2 * ((D + 2) // 2),
    )


def v_min(devices: int, microbatches: int) -> Schedule:
    """Two thirds of 1F1B's idle time at a third of its peak (V-Min, Qi et al., arXiv
    2405.15362).

    At `F = I = W` and `D > 1` idle time `2(D-1)(F+B)/3 - F/2`, plus `F` where 3 divides
    `D` and `m > 1`. Peak live chunks at most `min(2m, 2 floor((D+4)/3))`, reached on
    some device. `v_min(2, 3)`:

        0: 0F0 .   .   3F0 3I0 0F1 3W0 0I0 0W0 3F1 3I1 0F2 3W1 0I1 0W1 3F2 3I2 3W2 .
            0I2 0W2
        1: .   1F0 2F0 .   .   2I0 1I0 1F1 2F1 2W0 1W0 2I1 1I1 1F2 2F2 2W1 1W1 2I2 1I2
            2W2 1W2
    """
    check_sizes("v_min", devices=devices, microbatches=microbatches)
    D, i = devices, 0 if devices % 3 else 2  # noqa: N806 - the letter of the formulas
    return _squeezed(
        "v_min",
        devices,
        microbatches,
        lambda d: (d, 2 * D - d - 1, 2 * D + i + d, 4 * D + i - d - 1),
        2 * ((D + 4) // 3),
    )


def _scripted(
    name: str,
    devices: int,
    microbatches: int,
    script: Callable[[int], Iterable[tuple[str, int]]],
) -> Schedule:
    """A V whose device `d` runs `script(d)`: actions of chunk 0 and 1, and how often
    they are repeated.

    Each action takes the next microbatch of its chunk; `W0` is the oldest `W`
    outstanding of chunk 0, `W` the oldest of all.
    """
    rows = []
    for d in range(devices):
        stages = (d, 2 * devices - 1 - d)
        row: list[Action] = []
        forwards, backwards = [0, 0], [0, 0]
        pending: list[tuple[int, int]] = []
        for text, times in script(d):
            for what in text.split() * times:
                kind: Kind = what[0]  # pyright: ignore[reportAssignmentType]
                if kind == "W":
                    at = next(
                        k
                        for k, w in enumerate(pending)
                        if what == "W" or w[0] == stages[int(what[1])]
                    )
                    row.append(Action("W", *pending.pop(at)))
                    continue
                chunk = int(what[1])
                count = forwards if kind == "F" else backwards
                row.append(Action(kind, stages[chunk], count[chunk]))
                if kind == "I":
                    pending.append((stages[chunk], count[chunk]))
                count[chunk] += 1
        # The script is for the next number of microbatches that it works for. Whole
        # microbatches are dropped again, which leaves the order and the needs of all
        # others as they were: what remains can run whenever it could.
        rows.append([a for a in row if a.microbatch < microbatches])
    return Schedule(rows, v_map(devices), name)


def _squeezed(
    name: str,
    devices: int,
    microbatches: int,
    offsets: Callable[[int], tuple[int, int, int, int]],
    limit: int,
) -> Schedule:
    """A V made of a building block, a microbatch every 6 ticks, squeezed.

    `offsets(d)` are the ticks of F0, F1, I1 and I0 of microbatch 0. They fix the order
    of the forwards and `I` on each device; run at unit costs, each starts as soon as it
    can, a forward only while fewer than `limit` chunks are live, and `W` take the ticks
    that are left.
    """
    last = 2 * devices - 1
    orders: list[list[Action]] = []
    for d in range(devices):
        f0, f1, i1, i0 = offsets(d)
        block: list[tuple[int, Kind, int]] = [
            (f0, "F", d),
            (f1, "F", last - d),
            (i1, "I", last - d),
            (i0, "I", d),
        ]
        ticks = sorted(
            (t + 6 * i, Action(kind, s, i))
            for t, kind, s in block
            for i in range(microbatches)
        )
        orders.append([a for _, a in ticks])
    rows: list[list[Action]] = [[] for _ in range(devices)]
    weights: list[list[Action]] = [[] for _ in range(devices)]
    next_, done_weights, live = [0] * devices, [0] * devices, [0] * devices
    forwards, inputs = (
        [0] * (last + 1),
        [0] * (last + 1),
    )  # F and I done of each stage, which go in order
    left = 6 * microbatches * devices
    while left:
        finished: list[tuple[list[int], int]] = []
        for d in range(devices):
            order = orders[d]
            if next_[d] < len(order):
                action = order[next_[d]]
                kind, s, i = action
                if kind == "F":
                    ready = live[d] < limit and (s == 0 or forwards[s - 1] > i)
                else:
                    ready = (forwards if s == last else inputs)[min(s + 1, last)] > i
                if ready:
                    rows[d].append(action)
                    next_[d] += 1
                    left -= 1
                    if kind == "F":
                        live[d] += 1
                        finished.append((forwards, s))
                    else:
                        weights[d].append(Action("W", s, i))
                        finished.append((inputs, s))
                    continue
            if done_weights[d] < len(weights[d]):
                rows[d].append(weights[d][done_weights[d]])
                done_weights[d] += 1
                live[d] -= 1
                left -= 1
                finished.append(([0], 0))
        assert finished, (name, devices, microbatches)
        for count, s in finished:  # others see it from the next tick on
            count[s] += 1
    return Schedule(rows, v_map(devices), name)


def v_map(devices: int) -> list[int]:
    """The device of each stage, down and up again."""
    return [*range(devices), *reversed(range(devices))]
