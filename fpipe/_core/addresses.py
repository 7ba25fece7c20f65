"""The address of this machine that other processes are told, for transfers between
CPUs.

In: the address of the coordinator, if the user gives it. Out: an address from which
this machine reaches the others, with a free port:

    "10.0.0.1:5700"     "10.0.0.2:40123"
    None                "10.0.0.2:40124", of this machine's own name
"""

import contextlib
import socket

# An address in no network, of RFC 5737. The way there begins at a machine's usual one.
_SOMEWHERE = "192.0.2.1"


def free_address(coordinator: str | None) -> str:
    """An address of this machine that the others can reach, with a free port."""
    host = None
    if coordinator is not None:
        host = source_of(coordinator.rpartition(":")[0])
    if host is None:
        with contextlib.suppress(OSError):  # it has no name
            host = socket.gethostbyname(socket.gethostname())
        # Some systems give a machine's own name an address that only it can reach.
        if host is None or host.startswith("127."):
            host = source_of(_SOMEWHERE) or "127.0.0.1"
    with socket.socket() as free:
        free.bind((host, 0))
        return f"{host}:{free.getsockname()[1]}"


def source_of(host: str) -> str | None:
    """The address of this machine from which it would send to another one, if there is
    a way to it. Nothing is sent.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return probe.getsockname()[0]
    except OSError:  # no name, or no route
        return None
