"""Worker processes of the tests: started together, read line by line, and gone at the
end; and arrays as these lines have them.
"""

import json
import pathlib
import socket
import subprocess
import sys
import threading
from queue import Queue

import jax
import numpy as np

from tests.helpers import HANG

ROOT = pathlib.Path(__file__).parents[2]


def encoded(tree):
    """The leaves of a pytree; `None` for those of other processes. Floats survive JSON
    exactly.
    """
    return [
        None
        if isinstance(a, jax.Array) and not a.addressable_shards
        else {
            "dtype": str(a.dtype),
            "shape": a.shape,
            "values": np.asarray(a).ravel().tolist(),
        }
        for a in jax.tree.leaves(tree)
    ]


def decoded(leaves, like):
    """The inverse, in the structure of another pytree."""
    arrays = [np.array(a["values"], a["dtype"]).reshape(a["shape"]) for a in leaves]
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Workers:
    """Some processes of a module, which are gone when the `with` block ends."""

    def __init__(self, module, count, folder, *arguments):
        address = f"127.0.0.1:{free_port()}"
        self.errors = [folder / f"stderr{k}" for k in range(count)]
        self.lines, self.processes = Queue(), []
        for k, path in enumerate(self.errors):
            command = [
                sys.executable,
                "-m",
                module,
                "--coordinator",
                address,
                "--process",
                str(k),
            ]
            with path.open("w") as file:
                process = subprocess.Popen(
                    [*command, *arguments],
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    text=True,
                )
            self.processes.append(process)
            threading.Thread(
                target=self._read, args=(k, process.stdout), daemon=True
            ).start()

    def _read(self, k, file):
        with file:
            for line in file:
                if line.startswith("{"):  # gloo prints too
                    self.lines.put((k, json.loads(line)))
        self.lines.put((k, None))

    def ends(self):
        """The exit status of each."""
        return [process.wait(HANG) for process in self.processes]

    def all_lines(self):
        """What each printed, at its end."""
        found = [[] for _ in self.processes]
        running = len(found)
        while running:
            k, line = self.lines.get(timeout=HANG)
            if line is None:
                running -= 1
            else:
                found[k].append(line)
        errors = "\n".join(path.read_text() for path in self.errors)
        assert not any(self.ends()), errors
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
