"""A script runs as in an interpreter of its own."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests import scripts

FRESH = """
import json, os, sys, __main__
import fpipe
from jax._src import xla_bridge

print(json.dumps({
    "argv": sys.argv,
    "beside": sys.path[0],
    "folder": os.getcwd(),
    "main": __main__.__dict__ is globals(),
    "left": [os.environ.get("LEFT"), hasattr(fpipe, "left")],
    "devices": bool(xla_bridge._backends),
    "input": sys.stdin.read(),
}))
os.environ["LEFT"] = "behind"
os.chdir("/")
fpipe.left = "behind"
"""


def test_each_script_finds_what_a_new_interpreter_has(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "model.py").write_text(FRESH)
    arguments = ["inner/model.py", "--flag", "é"]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=os.environ | scripts.ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    for _ in range(2):
        again = scripts.run(arguments, tmp_path)
        assert again.stderr == done.stderr == ""
        assert json.loads(again.stdout) == json.loads(done.stdout)


@pytest.mark.parametrize(
    ("text", "code", "error"),
    [
        ("raise SystemExit", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
        ("import warnings; warnings.warn('old')", 1, "UserWarning: old\n"),
    ],
)
def test_its_end_is_told(tmp_path, text, code, error):
    (tmp_path / "model.py").write_text(f"print('begins', flush=True); {text}")
    done = scripts.run(["model.py"], tmp_path, strict=True)
    assert (done.returncode, done.stdout) == (code, "begins\n")
    assert done.stderr.endswith(error)
    assert bool(done.stderr) == bool(error)


def test_one_that_hangs_is_killed(tmp_path):
    (tmp_path / "model.py").write_text("import time; time.sleep(600)")
    done = scripts.run(["model.py"], tmp_path, longest=0.1)
    assert done.returncode == -signal.SIGALRM
