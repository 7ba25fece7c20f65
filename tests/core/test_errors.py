"""Warnings point at the user's line, where there is one."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from fpipe._core.errors import warn


def test_without_a_line_of_the_user_a_warning_is_still_heard():
    """A thread that runs nothing but the package and the standard library."""
    with ThreadPoolExecutor() as threads, pytest.warns(UserWarning, match="heard"):
        threads.submit(warn, "heard").result()
