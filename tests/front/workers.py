"""Worker processes of the tests: started together, read line by line, and gone at the
end; and arrays as these lines have them.

A worker does what `python -m module` with its arguments does. To import JAX, fpipe and
the rest takes most of the time of a short one. So a server imports them once, in a
process that has asked JAX for no devices, and each worker is a fork of it.
"""

import atexit
import dataclasses
import gc
import importlib
import json
import multiprocessing
import os
import pathlib
import socket
import sys
import threading
from queue import Queue

import jax
import numpy as np
from jax.core import Tracer

from tests import speed
from tests.helpers import HANG

ROOT = pathlib.Path(__file__).parents[2]

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        f"tests.front.{name}"
        for name in (
            "process_cases",
            "process_checkpoints",
            "multiprocess_worker",
            "test_checkpoints",
        )
    ]
)


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


def recording(layers, seen):
    """The same layers, whose `init` notes that it made real arrays."""

    def record(k, layer):
        def init(key, x):
            if not isinstance(key, Tracer):
                seen.append(k)
            return layer.init(key, x)

        return dataclasses.replace(layer, init=init)

    return [record(k, layer) for k, layer in enumerate(layers)]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def is_taken(port):
    """Whether somebody listens there."""
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def work(module, flags, out, error):
    """What a fork of the server does: as a new interpreter, it runs the module, tells
    its `sys.excepthook` what nobody caught, and does what is to be done at its exit.
    """
    os.dup2(out.fileno(), 1)
    file = os.open(error, os.O_WRONLY)
    os.dup2(file, 2)
    gc.freeze()  # what is looked at is copied
    speed.set_up()
    sys.argv = [module, *flags]
    code = 0
    try:
        importlib.import_module(module).main()
    except BaseException as error:
        code = 1
        sys.excepthook(type(error), error, error.__traceback__)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # to take all libraries apart would take a second


class Worker:
    """A process, with the methods of a `subprocess.Popen` that the tests call."""

    def __init__(self, module, flags, error):
        error.touch()
        lines, out = SERVER.Pipe(duplex=False)
        # A daemon: it ends with the tests.
        self._process = SERVER.Process(
            target=work, args=(module, flags, out, error), daemon=True
        )
        self._process.start()
        out.close()
        self.pid = self._process.pid
        self.stdout = os.fdopen(os.dup(lines.fileno()))
        lines.close()

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"alive after {timeout} s"
        return self._process.exitcode

    def kill(self):
        self._process.kill()

    def send_signal(self, sent):
        assert self.pid
        os.kill(self.pid, sent)

    def is_stopped(self):
        """Whether a signal has stopped it."""
        stat = pathlib.Path(f"/proc/{self.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"


class Workers:
    """Some processes of a module, which are gone when the `with` block ends."""

    def __init__(self, module, count, folder, *arguments):
        address = f"127.0.0.1:{free_port()}"
        self.errors = [folder / f"stderr{k}" for k in range(count)]
        self.lines, self.processes = Queue(), []
        for k, path in enumerate(self.errors):
            flags = ["--coordinator", address, "--process", str(k), *arguments]
            process = Worker(module, flags, path)
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
