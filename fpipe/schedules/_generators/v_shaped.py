"""Schedules whose stages go down the devices and up again, in a *V*.

Device `d` holds the stages `d` and `2D-1-d`. Here they are its *chunks* 0 and 1, as in
Megatron; these are no microbatches. The loss is on device 0. All of them split a
backward into `I` and `W`. Other devices only wait for `I`, and `W` fills the gaps. The
words, units and drawings are those of the package.

    device     0   1   2
    chunk 0    0   1   2
    chunk 1    5   4   3

`zb_v` and `dualpipe_v` are written as a script for each device. `v_half` and `v_min`
are a block of ticks that is repeated, and then squeezed.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from fpipe.schedules._action import KINDS, Action, Kind
from fpipe.schedules._generators.sizes import check_sizes, v_shaped_stages
from fpipe.schedules._rules import StageKind, last_needs
from fpipe.schedules._schedule import Schedule


class Stretch(NamedTuple):
    """A part of a device's script.

    Attributes:
        actions: each is a kind and a chunk and takes the next microbatch of its chunk.
            `W0` is the oldest `W` of chunk 0 that has been put off, `W` the oldest of
            all.
        times: how often they are repeated.
    """

    actions: str
    times: int


class Block(NamedTuple):
    """The ticks at which a device runs the actions of microbatch 0.

    Attributes:
        forward_down: the `F` of chunk 0.
        forward_up: the `F` of chunk 1.
        input_up: the `I` of chunk 1.
        input_down: the `I` of chunk 0.
    """

    forward_down: int
    forward_up: int
    input_up: int
    input_down: int


# An action that is not made yet: a kind and stage, and the microbatch. (A plain tuple,
# because 10^5 of them are made for a large schedule.)
Turn: TypeAlias = tuple[StageKind, int]

_KINDS: dict[str, Kind] = {kind: kind for kind in KINDS}

# A microbatch takes as many ticks of each device: F, I and W of two chunks.
BLOCK_TICKS = 6


def zb_v(devices: int, microbatches: int) -> Schedule:
    """Half of ZB-H2's idle time, with the peak memory of 1F1B (ZB-V).

    After Qi et al. (arXiv 2401.10241). The idle time is `(D-1)F/2` if `m >= 2D-1` and
    `W <= F = I`. At `F = I = W` it is `max(D-1, 4(D-1) - 2(m-1)) F/2` for every `m`.
    The peak is `min(2m, m+1+d, 2D)` live (stage, microbatch) pairs. `zb_v(2, 3)`:

        0: 0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2 .
        1: .   1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2

    Arguments:
        devices: `D`, the number of devices.
        microbatches: `m`, the number of microbatches.

    Returns:
        A `Schedule`.
    """
    check_sizes("zb_v", devices=devices, microbatches=microbatches)
    D = devices  # noqa: N806 - the letter of the formulas
    n = max(microbatches, 2 * D - 1)  # what the warm-up needs
    scripts = [
        [
            Stretch("F0", times=2 * (D - d) - 1),
            Stretch("F1 F0", times=d),
            Stretch("F1 I1 W1", times=D - d),
            Stretch("F0 I0 W0 F1 I1 W1", times=n - 2 * D + d + 1),
            Stretch("I0 W0 F1 I1 W1", times=D - d - 1),
            Stretch("I0 I1", times=d),
            Stretch("I0 W0", times=D - d),
            Stretch("W1", times=d),
            Stretch("W0", times=d),
        ]
        for d in range(D)
    ]
    rows = _follow_scripts(scripts, microbatches)
    return Schedule(rows, v_shaped_stages(devices), "zb_v")


def dualpipe_v(devices: int, microbatches: int) -> Schedule:
    """A forward paired with a backward, to overlap their communication (DualPipeV).

    After DeepSeek-V3 (arXiv 2412.19437). The paper runs the two actions of a pair at
    the same time. Here the forward runs first, then the backward. The idle time is
    `(D-1)(F+I-W)/2` if `m >= 2D` and `W <= I <= F <= I+W`. The paper has
    `(D-1)(F+2I-W)/2`, because both actions of a pair end together there; here the
    forward ends sooner. The peak is `min(2m, m+1+d, 2D+1)` live (stage, microbatch)
    pairs. `dualpipe_v(2, 4)`:

        0: 0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1---- 3F2 0B0---- 3B2---- 3F3 .   0B1----
        1: .   1F0 2F0 1F1 2F1 1F2 2B0---- 2F2 1B0---- 1F3 2B1---- 2F3 1B1---- 2B2----

        0: 3B3---- 0I2 0W2 0I3 0W3
        1: 1B2---- 2I3 1I3 2W3 1W3

    Arguments:
        devices: `D`, the number of devices.
        microbatches: `m`, the number of microbatches.

    Returns:
        A `Schedule`.
    """
    check_sizes("dualpipe_v", devices=devices, microbatches=microbatches)
    D = devices  # noqa: N806 - the letter of the formulas
    n = max(microbatches, 2 * D)  # what the warm-up needs
    scripts = [
        [
            Stretch("F0", times=2 * (D - d - 1)),
            Stretch("F0 F1", times=d + 1),
            Stretch("I1 W F1", times=D - d - 1),
            Stretch("F0 B1 F1 B0", times=n - 2 * D + d + 1),
            Stretch("B1 F1 B0", times=D - d - 1),
            # Half of the last d + 1 pairs are split, to have `W` for the drain.
            Stretch("B1 B0", times=(d + 1) // 2),
            Stretch("B1 I0", times=(d + 1) % 2),
            Stretch("I1 I0", times=(d + 1) // 2),
            Stretch("W I0", times=D - d - 1),
            Stretch("W", times=d + 1),
        ]
        for d in range(D)
    ]
    rows = _follow_scripts(scripts, microbatches)
    return Schedule(rows, v_shaped_stages(devices), "dualpipe_v")


def v_half(devices: int, microbatches: int) -> Schedule:
    """Half of 1F1B's idle time, with half of its peak memory (V-Half).

    After Qi et al. (arXiv 2405.15362). At `F = I = W` and `m >= floor((D+2)/2)` the
    idle time is `(D-1)(F+B)/2`; it is `F/2` less if `D` is odd and above 1. The peak is
    `min(2m, 2 floor((D+2)/2))` live (stage, microbatch) pairs on at least one device,
    and no more on the others. `v_half(2, 3)`:

        0: 0F0 .   .   3F0 0F1 3I0 3W0 3F1 0F2 0I0 3I1 0W0 3W1 3F2 .   0I1 3I2 0W1 3W2
        1: .   1F0 2F0 .   .   1F1 2F1 2I0 1I0 2W0 1F2 1W0 2F2 2I1 1I1 2W1 1W1 2I2 1I2

        0: 0I2 0W2
        1: 2W2 1W2

    Arguments:
        devices: `D`, the number of devices.
        microbatches: `m`, the number of microbatches.

    Returns:
        A `Schedule`.
    """
    check_sizes("v_half", devices=devices, microbatches=microbatches)
    D = devices  # noqa: N806 - the letter of the formulas
    # Else two actions of a device would fall on the same one of the six ticks.
    later = 0 if D % 2 else 3
    blocks = [
        Block(
            forward_down=2 * d,
            forward_up=3 * D - d - 2,
            input_up=3 * D + later + 2 * d - 1,
            input_down=6 * D + later - d - 2,
        )
        for d in range(D)
    ]
    # The paper's peak, in chunks; the squeeze alone would start forwards sooner and
    # hold more.
    rows = _squeeze(blocks, microbatches, most_live=2 * ((D + 2) // 2))
    return Schedule(rows, v_shaped_stages(devices), "v_half")


def v_min(devices: int, microbatches: int) -> Schedule:
    """Two thirds of 1F1B's idle time, with a third of its peak memory (V-Min).

    After Qi et al. (arXiv 2405.15362). At `F = I = W` and `D > 1` the idle time is
    `2(D-1)(F+B)/3 - F/2`; it is `F` more if 3 divides `D` and `m > 1`. The peak is
    `min(2m, 2 floor((D+4)/3))` live (stage, microbatch) pairs on at least one device,
    and no more on the others. `v_min(2, 3)`:

        0: 0F0 .   .   3F0 3I0 0F1 3W0 0I0 0W0 3F1 3I1 0F2 3W1 0I1 0W1 3F2 3I2 3W2 .
        1: .   1F0 2F0 .   .   2I0 1I0 1F1 2F1 2W0 1W0 2I1 1I1 1F2 2F2 2W1 1W1 2I2 1I2

        0: 0I2 0W2
        1: 2W2 1W2

    Arguments:
        devices: `D`, the number of devices.
        microbatches: `m`, the number of microbatches.

    Returns:
        A `Schedule`.
    """
    check_sizes("v_min", devices=devices, microbatches=microbatches)
    D = devices  # noqa: N806 - the letter of the formulas
    # Else two actions of a device would fall on the same one of the six ticks.
    later = 0 if D % 3 else 2
    blocks = [
        Block(
            forward_down=d,
            forward_up=2 * D - d - 1,
            input_up=2 * D + later + d,
            input_down=4 * D + later - d - 1,
        )
        for d in range(D)
    ]
    rows = _squeeze(blocks, microbatches, most_live=2 * ((D + 4) // 3))
    return Schedule(rows, v_shaped_stages(devices), "v_min")


def _follow_scripts(
    scripts: Sequence[Sequence[Stretch]], microbatches: int
) -> list[list[Action]]:
    """The rows of devices that each follow a script."""
    # Device 1 in `zb_v(2, 3)`, whose chunks 0 and 1 are the stages 1 and 2:
    #
    #   F0 once                    1F0
    #   F1 F0 once                 2F0 1F1
    #   F1 I1 W1 once              2F1 2I0 2W0
    #   F0 I0 W0 F1 I1 W1 once     1F2 1I0 1W0 2F2 2I1 2W1
    #   I0 I1 once                 1I1 2I2
    #   I0 W0 once                 1I2 1W1
    #   W1, W0 once                2W2 1W2
    devices = len(scripts)
    rows: list[list[Action]] = []
    for device, script in enumerate(scripts):
        stages = (device, 2 * devices - 1 - device)
        row: list[Action] = []
        # By chunk the next microbatch; and the `W` that have been put off.
        forwards = [0, 0]
        backwards = [0, 0]
        weights: list[Action] = []
        for stretch in script:
            for word in stretch.actions.split() * stretch.times:
                kind = _KINDS[word[0]]
                if kind == "W":
                    stage = stages[int(word[1])] if len(word) > 1 else None
                    oldest = next(w for w in weights if stage in (None, w.stage))
                    weights.remove(oldest)
                    row.append(oldest)
                    continue
                chunk = int(word[1])
                next_of_chunk = forwards if kind == "F" else backwards
                action = Action(kind, stages[chunk], next_of_chunk[chunk])
                next_of_chunk[chunk] += 1
                row.append(action)
                if kind == "I":
                    weights.append(action._replace(kind="W"))
        # The script is for the next number of microbatches that it works for. Whole
        # microbatches are dropped again, which leaves the order and the needs of all
        # others as they were: what remains can run whenever it could.
        rows.append([action for action in row if action.microbatch < microbatches])
    return rows


def _squeeze(
    blocks: Sequence[Block], microbatches: int, most_live: int
) -> list[list[Action]]:
    """The rows of devices that repeat a block for each microbatch, squeezed.

    The blocks fix the order of the forwards and `I` on each device. These run at unit
    costs, each as soon as it can, a forward only while fewer than `most_live` chunks
    are held; the oldest `W` takes a tick that is left.
    """
    # Repeated every six ticks, the blocks are a schedule already, in which a device may
    # wait although its input is there. Played as soon as can be, it does not.
    devices = len(blocks)
    orders = [
        deque(_repeat(block, device, 2 * devices - 1 - device, microbatches))
        for device, block in enumerate(blocks)
    ]
    weights: list[deque[Turn]] = [deque() for _ in blocks]
    live = [0] * devices
    rows: list[list[Action]] = [[] for _ in blocks]
    waits_for = last_needs(2 * devices, ("F", "I", "W"))
    weight_of = {
        what: StageKind("W", what.stage) for what in waits_for if what.kind == "I"
    }
    # How many microbatches are done, which is the next one: they go in order.
    done = dict.fromkeys(waits_for, 0)
    while any(orders) or any(weights):
        started: list[StageKind] = []
        for device, order in enumerate(orders):
            if order:
                what, microbatch = order[0]
                source = waits_for[what]
                ready = source is None or done[source] > microbatch
                if ready and (what.kind != "F" or live[device] < most_live):
                    order.popleft()
                    rows[device].append(Action(*what, microbatch))
                    started.append(what)
                    if what.kind == "F":
                        live[device] += 1
                    else:
                        weights[device].append((weight_of[what], microbatch))
                    continue
            if weights[device]:
                what, microbatch = weights[device].popleft()
                rows[device].append(Action(*what, microbatch))
                started.append(what)
                live[device] -= 1
        assert started, (devices, microbatches)
        # Only now: other devices see from the next tick on what is done in this one.
        for stage_kind in started:
            done[stage_kind] += 1
    return rows


def _repeat(block: Block, down: int, up: int, microbatches: int) -> list[Turn]:
    """The forwards and `I` of a device with these stages, by their ticks."""
    first = {
        StageKind("F", down): block.forward_down,
        StageKind("F", up): block.forward_up,
        StageKind("I", up): block.input_up,
        StageKind("I", down): block.input_down,
    }
    ticks = [
        (tick + BLOCK_TICKS * microbatch, (what, microbatch))
        for what, tick in first.items()
        for microbatch in range(microbatches)
    ]
    return [turn for _, turn in sorted(ticks)]
