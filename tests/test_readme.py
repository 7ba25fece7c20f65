"""The README is true: its code runs, its commands are the ones that CI and a new user run, its names exist."""

import doctest
import importlib
import pathlib
import pkgutil
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import fpipe

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_python_blocks_run_one_after_the_other_and_print_what_the_text_blocks_show():
    code = "\n".join(text for language, text in BLOCKS if language == "python")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(text for language, text in BLOCKS if language == "text")


def test_all_blocks_are_of_a_kind_that_is_tested():
    assert {language for language, _ in BLOCKS} == {"python", "bash", "text"}


def test_the_commands_name_what_is_there():
    commands = [text.strip() for language, text in BLOCKS if language == "bash"]
    assert commands == [
        'pip install -e ".[examples]" && python examples/train_unet.py',
        'pip install -e ".[test]" && python -m pytest -n 2',
    ]
    assert (ROOT / "examples/train_unet.py").exists()


def test_the_u_net_is_twenty_lines_long():
    """From the convolution to the pipe, without blank lines."""
    block = next(text for language, text in BLOCKS if "def conv" in text)
    code = block[block.index("def conv") :]
    assert "fpipe.Pipe(" in code
    assert len([line for line in code.splitlines() if line.strip()]) == 20


def test_every_name_in_the_table_exists():
    for name in set(re.findall(r"fpipe\.([A-Za-z_]+)", README)):
        assert hasattr(fpipe, name), name


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


MODULES = sorted(m.name for m in pkgutil.walk_packages(fpipe.__path__, "fpipe."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    names = {"fpipe": fpipe, "jax": jax, "jnp": jnp}
    with jax.numpy_dtype_promotion("standard"):
        assert doctest.testmod(module, extraglobs=names).failed == 0


def test_there_are_examples_in_docstrings():
    tried = sum(
        doctest.testmod(importlib.import_module(name), extraglobs={"fpipe": fpipe, "jax": jax, "jnp": jnp}).attempted
        for name in MODULES
    )
    assert tried > 10
