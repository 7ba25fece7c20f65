"""README and docs are true: their code runs, it prints what they show, names, links and
pictures exist.
"""

import doctest
import importlib
import importlib.util
import pathlib
import pkgutil
import re
import shlex

import jax
import jax.numpy as jnp
import pytest

import fpipe
from fpipe.schedules import NAMES
from tests import scripts

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MEASURED = "docs/benchmarks.md"  # its text is what was measured once
# `examples/real_models/check.py --page` runs its Python blocks in CI, and compares what
# they print. Those with a title need packages that are not installed here.
SCRIPTED = "docs/your_model.md"
PAGES = [
    "README.md",
    *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")),
]
TESTED = [page for page in PAGES if page != MEASURED]
# What a new user, a contributor and CI run; all other commands are run here.
INSTALL = [
    'pip install -e ".[examples]" && python examples/train_unet.py',
    'pip install -e ".[test]" && python -m pytest -n 3',
    'pip install -e ".[test]" && python -m pytest -m quick -n 2',
    ".ci/run",
    "python -m tests.house",  # `tests/test_imports.py` compares the drawing
]


def blocks(page):
    """Language, with a title if it has one, and content of the fenced blocks, in
    order.
    """
    return re.findall(
        r"^```(\w*(?: title=\"[^\"\n]*\")?)\n(.*?)^```$",
        (ROOT / page).read_text(),
        re.MULTILINE | re.DOTALL,
    )


# What is shown of what was printed: as it is, or with numbers that another release of
# JAX counts otherwise.
SHOWN = ("text", "numbers")


def shown_after(page, language):
    """Every block of a language, with the block of what it prints that follows it, if
    one does, and its kind.
    """
    found = [*blocks(page), ("", "")]
    return [
        (text, *(found[n + 1][::-1] if found[n + 1][0] in SHOWN else ("", "text")))
        for n, (kind, text) in enumerate(found)
        if kind == language
    ]


def as_shown(text, kind):
    """What is compared: of `numbers` the words, line by line."""
    return (
        [re.findall("[A-Za-z]+", line) for line in text.splitlines()]
        if kind == "numbers"
        else text
    )


def python(arguments, folder):
    """Run Python with fpipe in an empty folder, and return what it prints."""
    done = scripts.run(arguments, folder, strict=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(text):
    """The arguments of `python -m fpipe ...`, the one program that a page may run."""
    words = shlex.split(text)
    assert words[:3] == ["python", "-m", "fpipe"], text
    return words[1:]


@pytest.mark.parametrize("page", [page for page in TESTED if page != SCRIPTED])
def test_the_python_blocks_run_one_after_the_other_and_print_what_the_text_blocks_show(
    page, tmp_path
):
    code = shown_after(page, "python")
    between = "print('-' * 8)"
    model = tmp_path / "model.py"  # readers have the code in a file
    model.write_text(f"\n{between}\n".join(text for text, _, _ in code))
    parts = re.split("^-{8}\n", python([model.name], tmp_path), flags=re.MULTILINE)
    for part, (_, shown, kind) in zip(parts, code, strict=bool(code)):
        assert as_shown(part, kind) == as_shown(shown, kind)


@pytest.mark.parametrize("page", TESTED)
def test_the_commands_run_and_print_what_the_text_blocks_show(page, tmp_path):
    for text, shown, _ in shown_after(page, "bash"):
        if text.strip() not in INSTALL:
            assert shown, f"{text!r}: no text block follows"
            assert python(command(text), tmp_path) == shown
    for text in re.findall(r"`(python -m fpipe [^`\n]+)`", (ROOT / page).read_text()):
        python(command(text), tmp_path)


@pytest.mark.parametrize("page", TESTED)
def test_all_blocks_are_of_a_kind_that_is_tested(page):
    found = blocks(page)
    kinds = {language for language, _ in found}
    if page == SCRIPTED:
        kinds -= {
            f'python title="with {name}"' for name in ("transformers 4", "penzai")
        }
    assert kinds <= {"python", "bash", *SHOWN}
    before = ["", *(language for language, _ in found)]
    assert [
        text
        for (language, text), last in zip(found, before, strict=False)
        if language in SHOWN and last in SHOWN
    ] == []
    assert (ROOT / page).read_text().count("```") == 2 * len(found)


@pytest.mark.parametrize("page", TESTED)
def test_code_is_narrow_enough_for_the_site(page):
    lines = [
        line
        for language, text in blocks(page)
        if language.startswith("python")
        for line in text.splitlines()
    ]
    assert [line for line in lines if len(line) > 80] == []


def test_the_commands_name_what_is_there():
    assert [
        text.strip() for language, text in blocks("README.md") if language == "bash"
    ][:2] == INSTALL[:2]
    assert (ROOT / "examples/train_unet.py").exists()


def test_the_u_net_is_twenty_lines_long():
    """From the convolution to the pipe, without blank lines."""
    block = next(text for language, text in blocks("README.md") if "def conv" in text)
    code = block[block.index("def conv") :]
    assert "fpipe.Pipe(" in code
    assert len([line for line in code.splitlines() if line.strip()]) == 20


@pytest.mark.parametrize("page", PAGES)
def test_every_name_exists(page):
    for name in sorted(
        set(re.findall(r"\bfpipe(?:\.[A-Za-z_]\w*)+", (ROOT / page).read_text()))
    ):
        pkgutil.resolve_name(name)


def anchors(page):
    """Of the headings, as they are made on GitHub."""
    headings = re.findall(
        r"^#+ (.*)$",
        re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S),
        re.M,
    )
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.relative_to(ROOT)), target


# --- pictures, and docs/schedules.md ---

PICTURES = ROOT / "docs/pictures"


def test_pictures_are_what_the_script_makes():
    spec = importlib.util.spec_from_file_location("make", PICTURES / "make.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018 - for the type checker
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    made = {name: text.encode() for name, text in make.pictures().items()}
    assert {p.name: p.read_bytes() for p in PICTURES.glob("*.svg")} == made, (
        "run python docs/pictures/make.py"
    )
    assert max(map(len, made.values())) < 60_000
    shown = [
        name
        for page in PAGES
        for name in re.findall(r"\]\(pictures/(.*?)\)", (ROOT / page).read_text())
    ]
    assert sorted(shown) == sorted(made)  # each is shown once


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_has_a_section(name):
    page = (ROOT / "docs/schedules.md").read_text()
    found = re.search(rf"^## {name}\n(.*?)(?=^## )", page, re.MULTILINE | re.DOTALL)
    assert found, name
    section = found[1]
    words = " ".join(section.split())
    assert section.startswith(f"\n![Timeline of {name}](pictures/{name}.svg)\n")
    for part in (
        "- **Idle time** ",
        "- **Peak live** ",
        "- **Why it is good.** ",
        "- **Why it is annoying.** ",
    ):
        assert section.count(part) == 1, part
    assert f'`Pipe(schedule="{name}")`' in words
    each = NAMES[name].per_device
    number = (
        "2 or more stages"
        if each is None
        else "1 stage"
        if each == 1
        else f"{each} stages"
    )
    assert f"{number} per device" in words
    # Its paper, as the docstring has it.
    assert set(re.findall(r"\d{4}\.\d{5}", NAMES[name].generator.__doc__ or "")) == set(
        re.findall(r"\d{4}\.\d{5}", section)
    )
    row = re.search(rf"^\| \[`{name}`\]\(#{name}\) \|", page, re.MULTILINE)
    assert row, name
    assert f'`"{name}"`' in README


# --- docstrings ---

MODULES = sorted(m.name for m in pkgutil.walk_packages(fpipe.__path__, "fpipe."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    names = {"fpipe": fpipe, "jax": jax, "jnp": jnp}
    with jax.numpy_dtype_promotion("standard"):
        assert doctest.testmod(module, extraglobs=names).failed == 0


def test_there_are_examples_in_docstrings():
    find = doctest.DocTestFinder(exclude_empty=True).find
    found = [find(importlib.import_module(name)) for name in MODULES]
    assert sum(len(test.examples) for tests in found for test in tests) > 10
