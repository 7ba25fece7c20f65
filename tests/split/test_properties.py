"""Random functions, cut at random, compute what they compute.

`python -m tests.split.random_functions` tries more.
"""

import pytest

from tests.split.random_functions import check, of_pieces


@pytest.mark.parametrize("seed", [0, 12, 84])
def test_the_pieces_of_random_functions(seed):
    """One after the other, without a pipe."""
    check(seed, of_pieces)


@pytest.mark.filterwarnings("ignore:stage .*")
@pytest.mark.parametrize(("executor", "seed"), [("placed", 241), ("scan", 4)])
def test_pipes_of_random_functions(executor, seed):
    check(seed, executor=executor)
