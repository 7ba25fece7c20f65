"""What the generators share: checked sizes, where stages live, rounds of microbatches.

For two devices:

    looped_stages(2, virtual=2) == [0, 1, 0, 1]     round and round
    v_shaped_stages(2) == [0, 1, 1, 0]              down and up again
"""

import itertools

from fpipe.schedules._checks import shown


def check_sizes(name: str, /, **sizes: int) -> None:
    """Refuse what is no size.

    Arguments:
        name: the generator, for the message.
        **sizes: its arguments.
    """
    given = ", ".join(f"{size}={shown(value)}" for size, value in sizes.items())
    call = f"`{name}({given})`"
    for size, value in sizes.items():
        if type(value) is not int:  # a bool is none
            raise TypeError(f"{call}: {size} must be an int")
        if value < 1:
            raise ValueError(f"{call}: {size} must be at least 1")


def looped_stages(devices: int, virtual: int) -> list[int]:
    """The device of each stage, round and round."""
    return list(range(devices)) * virtual


def v_shaped_stages(devices: int) -> list[int]:
    """The device of each stage, down and up again."""
    return [*range(devices), *reversed(range(devices))]


def even_rounds(devices: int, microbatches: int) -> list[range]:
    """The microbatches in as many rounds of at least `D` as there are.

    The rounds are as equal as can be, longer ones first: `even_rounds(2, 5)` is 0 to 2,
    then 3 and 4. A round shorter than `D` stalls: its second chunk waits on device 0
    until the first has passed all devices. A round longer than the first deadlocks
    after a warm-up that is as long as the first.
    """
    # `even_rounds(4, 9)`: two rounds, of 5 and 4. Rounds of `D` alone, as in Megatron,
    # would leave a round of 1.
    rounds = max(1, microbatches // devices)
    size, longer = divmod(microbatches, rounds)
    ends = [size * k + min(k, longer) for k in range(rounds + 1)]
    return [range(start, end) for start, end in itertools.pairwise(ends)]
