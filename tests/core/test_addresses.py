"""The address that other processes are told."""

import socket

import pytest

from fpipe._core import addresses


@pytest.mark.parametrize("coordinator", [None, "unknown:5700"])
@pytest.mark.parametrize("usual", ["127.0.0.2", None])
def test_others_are_told_an_address_that_they_can_reach(
    monkeypatch, coordinator, usual
):
    """Debian gives a machine's own name an address of the machine alone."""
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    ways = {"unknown": None, "192.0.2.1": usual}
    monkeypatch.setattr(addresses, "source_of", ways.get)
    host, _, port = addresses.free_address(coordinator).rpartition(":")
    assert host == (usual or "127.0.0.1")
    assert int(port) > 0
