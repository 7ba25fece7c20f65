"""The cheapest values to keep, beside trying all sets."""

import itertools
import random

import pytest

from fpipe._program.min_cut import cheapest


def works(kept, again, needed):
    """Whether everything needed can be had from what is kept; and how much is made
    again.
    """
    made, stack = set(), [v for v in needed if v not in kept]
    while stack:
        v = stack.pop()
        if v in made:
            continue
        if v not in again:
            return None
        made.add(v)
        stack += [u for u in again[v] if u not in kept]
    return len(made)


def test_no_set_is_cheaper():
    for seed in range(300):
        rng = random.Random(seed)
        n = rng.randint(1, 9)
        costs = {v: rng.randint(1, 9) for v in range(n)}
        again = {
            v: rng.sample(range(v), rng.randint(0, min(3, v)))
            for v in range(n)
            if rng.random() < 0.7
        }
        needed = rng.sample(range(n), rng.randint(0, n))
        got = cheapest(costs.__getitem__, again.get, needed)
        least = works(got, again, needed)
        assert least is not None, seed
        every = [
            set(s) for k in range(n + 1) for s in itertools.combinations(range(n), k)
        ]
        good = [
            (sum(costs[v] for v in s), made)
            for s in every
            if (made := works(s, again, needed)) is not None
        ]
        cost = min(c for c, _ in good)
        assert sum(costs[v] for v in got) == cost, seed
        assert least == min(made for c, made in good if c == cost), seed


@pytest.mark.quick
def test_an_activation_is_made_again_from_what_is_smaller():
    # 0: a product; 1: tanh of it, expensive; 2, 3, 4: sums and products of those, which
    # are cheap, all needed.
    again = {2: [0], 3: [1, 2], 4: [0, 3]}
    assert cheapest(lambda v: 4, again.get, [1, 2, 3, 4]) == {0, 1}
    # Bytes decide: a mask of one byte is kept, not the four bytes that it is made from.
    assert cheapest({0: 4, 1: 1}.__getitem__, {1: [0]}.get, [1]) == {1}


def test_what_cannot_help_is_not_looked_at():
    """A chain of residuals `v = v_before + f`: `f` would have to be kept."""
    again = {v: [v - 2, v - 1] for v in range(2, 2000, 2)}
    looked_at = list[int]()

    def remade_from(v):
        looked_at.append(v)
        return again.get(v)

    assert cheapest(lambda v: 4, remade_from, [1998]) == {1998}
    assert len(looked_at) < 10
