"""Scripts as users run them, each in a process that begins with JAX imported.

What comes in is what stands after `python` on a command line, and a folder to run in.
What goes out is what `subprocess.run` gives:

    run(["-m", "fpipe", "schedule", "gpipe"], folder).stdout

To import JAX, Flax, Optax, Orbax and fpipe takes longer than most scripts do. A server
imports them once, and each script runs in a fork of it. The server has asked JAX for no
devices: a script finds what a new interpreter has after these imports. What an import
does, and what Python does with its flags, is tested with new interpreters.
"""

import atexit
import contextlib
import dataclasses
import functools
import gc
import importlib
import json
import os
import pathlib
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings

from tests import speed

ROOT = pathlib.Path(__file__).parents[1]
# Scripts share compiled programs with each other, and with earlier runs. No test reads
# a time that a script measures: programs that LLVM leaves as they are compile in half
# the time.
ENVIRONMENT = {
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
    "PYTHONPATH": os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    ),
    "PYTHONUTF8": "1",
}
LIBRARIES = ["jax", "flax.linen", "flax.nnx", "optax", "orbax.checkpoint"]
LIBRARIES += ["matplotlib.pyplot", "PIL.Image", "sklearn.datasets", "tqdm"]
OWN = ["fpipe", "fpipe.flax", "fpipe.optim"]
LONGEST = 600.0  # seconds; a script that takes longer hangs


@dataclasses.dataclass(frozen=True)
class Script:
    """What a process is to run, and where its outputs go."""

    arguments: list[str]
    folder: str
    strict: bool
    longest: float  # seconds
    stdout: str
    stderr: str


# --- the server, and its forks ---


def next_script() -> Script:
    """In each fork, its script. The server itself stays here until the tests end."""
    for line in sys.stdin:
        with warnings.catch_warnings(action="ignore"):  # of the threads of libraries
            child = os.fork()
        if not child:
            return Script(**json.loads(line))
        _, status = os.waitpid(child, 0)
        try:
            print(os.waitstatus_to_exitcode(status), flush=True)
        except BrokenPipeError:  # killed tests do not ask
            os._exit(1)
    os._exit(0)


def end_with_tests(requests: int) -> None:
    """A script does not outlive the tests, whatever ends them."""
    ends = select.poll()
    ends.register(requests, 0)
    ends.poll()
    os._exit(1)


def become(script: Script) -> None:
    """Do what `python` with the arguments does, in this process."""
    requests = os.dup(0)
    threading.Thread(target=end_with_tests, args=[requests], daemon=True).start()
    signal.setitimer(signal.ITIMER_REAL, script.longest)
    for number, path in enumerate((os.devnull, script.stdout, script.stderr)):
        file = os.open(path, os.O_WRONLY if number else os.O_RDONLY)
        os.dup2(file, number)
        os.close(file)
    os.chdir(script.folder)
    if script.strict:
        warnings.simplefilter("error")
    if script.arguments[0] == "-m":
        sys.argv = script.arguments[1:]
        sys.path[0] = script.folder
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = script.arguments
        sys.path[0] = str(pathlib.Path(sys.argv[0]).parent.resolve())
        runpy.run_path(sys.argv[0], run_name="__main__")


def exit_code(script: Script) -> int:
    """What `python` says in the end, after its error."""
    try:
        become(script)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


# --- the tests ---


@functools.cache
def server() -> subprocess.Popen[str]:
    made = subprocess.Popen(
        [sys.executable, "-m", "tests.scripts"],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(made.communicate)
    return made


def run(
    arguments: list[str],
    folder: pathlib.Path = ROOT,
    *,
    strict: bool = False,
    longest: float = LONGEST,
) -> subprocess.CompletedProcess[str]:
    """Run a script, or `-m` and a module, with its arguments.

    `strict` makes warnings errors, as `-W error` does. After `longest` seconds it is
    killed by `SIGALRM`.
    """
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(tempfile.NamedTemporaryFile("r", encoding="utf-8"))
            for _ in range(2)
        ]
        names = [file.name for file in files]
        script = Script(arguments, str(folder), strict, longest, *names)
        requests, codes = server().stdin, server().stdout
        assert requests
        assert codes
        print(json.dumps(dataclasses.asdict(script)), file=requests, flush=True)
        code = int(codes.readline())
        return subprocess.CompletedProcess(
            arguments, code, *(file.read() for file in files)
        )


if __name__ == "__main__":
    for name in LIBRARIES:
        importlib.import_module(name)
    # What fpipe compiles to is kept, also where Python is to leave no files beside it.
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(ROOT / ".cache" / "python")
    for name in OWN:
        importlib.import_module(name)
    speed.set_up()
    gc.freeze()  # what is looked at is copied
    code = exit_code(next_script())
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # to take all libraries apart would take a second
