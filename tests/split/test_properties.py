"""Random functions, cut at random, compute what they compute."""

import pytest

from tests.split.random_functions import check, of_pieces

# `python -m tests.split.random_functions` tries more.


@pytest.mark.parametrize("seed", range(4))
def test_the_pieces_of_random_functions(seed):
    """One after the other, without a pipe."""
    check(seed, of_pieces)


@pytest.mark.filterwarnings("ignore:stage .*")
@pytest.mark.parametrize("executor", ["placed", "scan"])
def test_pipes_of_random_functions(executor):
    check(4, executor=executor)
