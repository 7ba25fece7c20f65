"""Random functions, cut at random, compute what they compute.

`python -m tests.split.random_functions` tries more.
"""

import functools

import pytest

from tests.split.random_functions import check, of_pieces, of_pipe


@pytest.mark.parametrize("seed", [0, 12, 84])
def test_the_pieces_of_random_functions(seed):
    """One after the other, without a pipe."""
    check(seed, of_pieces)


@pytest.mark.filterwarnings("ignore:stage .*")
@pytest.mark.parametrize(
    ("executor", "seed", "axis"),
    [
        ("placed", 241, None),
        ("scan", 4, None),
        ("placed", 38, "data"),
        ("scan", 25, "data"),
    ],
)
def test_pipes_of_random_functions(executor, seed, axis):
    check(seed, functools.partial(of_pipe, axis=axis), executor)
