"""The documentation is whole: every public name, every error message, every page;
without mkdocs, which `.ci/run` has.
"""

import ast
import functools
import importlib
import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"


@functools.cache
def hooks():
    """What `mkdocs build` runs."""
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018 - for the type checker
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the reference ---


@pytest.mark.quick
def test_the_reference_has_every_public_name():
    assert hooks().missing() == []


def test_a_name_that_is_missing_or_unknown_or_twice_is_told():
    page = (DOCS / "api.md").read_text()
    without = hooks().missing(page.replace("::: fpipe.schedules.gpipe\n", ""))
    assert without == [
        "fpipe.schedules.gpipe is public and not in docs/api.md: add `::: "
        "fpipe.schedules.gpipe`"
    ]
    assert hooks().missing(page + "\n::: fpipe.Pip\n") == [
        "fpipe.Pip is in docs/api.md and not public"
    ]
    assert hooks().missing(page + "\n::: fpipe.Pipe\n") == [
        "fpipe.Pipe is twice in docs/api.md"
    ]


def test_a_name_without_a_docstring_is_told(monkeypatch):
    page = (
        DOCS / "api.md"
    ).read_text() + "\n::: fpipe.new\n\n::: fpipe.Other\n\n::: fpipe.NUMBER\n"
    undocumented = """
def new(): ...
class Other:
    "It has one."
    def method(self): ...
NUMBER = 1
"""
    read = hooks().source
    more = ast.parse(undocumented).body
    monkeypatch.setattr(
        hooks(),
        "source",
        lambda module: [*read(module), *(more if module == "fpipe" else [])],
    )
    assert hooks().missing(page) == [
        f"fpipe.{name}, or a method of it, has no docstring"
        for name in ("new", "Other", "NUMBER")
    ]


@pytest.mark.parametrize(
    "module",
    [
        "fpipe",
        "fpipe.schedules",
        "fpipe.distributed",
        "fpipe.flax",
        "fpipe.optim",
        "fpipe.plot",
        "fpipe.testing",
    ],
)
def test_the_names_are_those_that_python_sees(module):
    assert module in hooks().FACADES
    seen = vars(importlib.import_module(module))
    assert set(hooks().public(module)) <= set(seen)
    own = {
        name
        for name, value in seen.items()
        if getattr(value, "__module__", "").startswith("fpipe")
    }
    own = {name for name in own if not name.startswith("_")}
    # These import what they use, and say what is their own.
    if module in ("fpipe.plot", "fpipe.testing"):
        assert sorted(seen["__all__"]) == sorted(hooks().public(module))
    if module not in ("fpipe.distributed", "fpipe.plot", "fpipe.testing"):
        assert own <= set(hooks().public(module))


def test_names_on_pages_lead_to_the_reference():
    linked = functools.partial(hooks().linked, names=["fpipe.Pipe"])
    for before in ("", "# A page\n\n", "```python\n# code\n```\n"):
        page = f"{before}a `fpipe.Pipe` is"
        assert linked(page) == f"{before}a [`fpipe.Pipe`][fpipe.Pipe] is"
    for same in (
        "# `fpipe.Pipe`",
        "[`fpipe.Pipe`](api.md)",
        "`fpipe.Pip`",
        "`` `fpipe.Pipe`: … ``",
        "```python\n`fpipe.Pipe`\n```",
    ):
        assert linked(same) == same


def test_code_in_a_sentence_is_broken_between_words():
    long = "axis_types=(jax.sharding.AxisType.Auto,)"
    page = f"<p><code>(D-1)F if m</code> <code>{long}</code></p>"
    page += "<pre><code>a-b</code></pre>"
    word = "<span class=word>(D-1)F</span>"
    head = "<span class=word>axis_types=(</span><wbr>"
    broken = page.replace("(D-1)F", word).replace("axis_types=(", head)
    assert hooks().unbroken(page) == broken


# --- the pages ---


@pytest.mark.quick
def test_every_page_is_in_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"^ +- [^#\n]*?: (\w+\.md)$", config, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md"))


def test_what_to_read_before_a_change_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 50


NAMING = [ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


@pytest.mark.parametrize("page", NAMING, ids=lambda path: path.name)
def test_modules_that_a_page_names_are_there(page):
    named = re.findall(r"`((?:fpipe|tests|examples|docs)/[\w/.]+)`", page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)


def test_names_in_the_tour_are_there():
    """Modules by the ends of their paths, and classes, also those of a code block."""
    sources = [*(ROOT / "fpipe").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    classes = set(re.findall(r"^class (\w+)", "\n".join(map(_text, sources)), re.M))
    modules = {path.name for path in sources}
    for page in (DOCS / "architecture.md", DOCS / "contributing.md"):
        named = re.findall(r"`(\w+\.py|[A-Z]\w*[a-z]\w*)`", prose(page.read_text()))
        assert named
        assert [name for name in named if name not in classes | modules] == []


def _text(path):
    return path.read_text()


def test_both_tables_for_torch_say_the_same():
    """The README's is a part of the page's."""

    def rows(text):
        return {
            line for line in text.splitlines() if line.startswith(("| `", "| dropout"))
        }

    readme = (ROOT / "README.md").read_text()
    section = readme[readme.index("## Coming from torch Pipe") :]
    table = rows(section[: section.index("\n## ")])
    assert len(table) > 10
    assert table <= rows((DOCS / "from_torch_pipe.md").read_text())


# --- troubleshooting ---

GAP = "…"  # where a message has a value


def said(node, names):
    """The text of an expression, with a gap for what is only known when it is
    raised.
    """
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(said(part, names) for part in parts)
        case ast.FormattedValue(value=value, conversion=-1):
            return said(value, names)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return said(left, names) + said(right, names)
        case ast.Name(id=name) if len(names.get(name, ())) == 1:
            return said(names[name][0], {})
        case ast.Call(
            func=ast.Attribute(attr="join"), args=[ast.GeneratorExp(elt=each)]
        ):
            return said(each, names)
    return GAP


def assigned(scope):
    """The expressions that each name stands for in a module or function."""
    names = {}
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign):
            targets, values = [node.targets[0]], [node.value]
            if isinstance(targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                targets, values = targets[0].elts, node.value.elts
            for target, value in zip(targets, values, strict=True):
                names.setdefault(getattr(target, "id", None), []).append(value)
    return names


def texts(source):
    """All texts of a module, and whether each is a message: what an error, or a list of
    them, is made with.
    """
    tree = ast.parse(source)
    names = {}  # for each expression those of the innermost function that it is in
    for scope in ast.walk(tree):
        if isinstance(scope, ast.Module | ast.FunctionDef):
            names |= dict.fromkeys(ast.walk(scope), assigned(scope))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            if re.search(
                r"Error$|^(error|warn)$|^(wrong|warnings)\.append$",
                ast.unparse(node.func),
            ):
                yield True, said(node.args[0], names[node])
        elif isinstance(node, ast.JoinedStr):
            yield False, said(node, names[node])


@functools.cache
def messages():
    """The messages of the library by their text, the command line's apart; and all
    texts.
    """
    found = {}
    for path in sorted((ROOT / "fpipe").rglob("*.py")):
        if path.name == "__main__.py":
            continue
        for message, text in texts(path.read_text()):
            text = re.sub(f"{GAP}+", GAP, " ".join(text.split()))
            if (
                len(text.replace(GAP, "").strip(" :")) > 3
            ):  # else it is what another error says
                found[text] = found.get(text, "") or (
                    path.relative_to(ROOT).as_posix() if message else ""
                )
    return found


def documented(page=None):
    """The beginnings of messages on the page: code in the first column of its
    tables.
    """
    page = (DOCS / "troubleshooting.md").read_text() if page is None else page
    cells = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    return [
        twice or once
        for cell in cells
        for twice, once in re.findall(r"(?<!`)(?:`` (.*?) ``|`([^`]+)`)(?!`)", cell)
    ]


def begins(text, begin):
    """Whether a message begins so; what is a whole message stands for no other."""
    return text == begin or (
        begin not in messages() and text.startswith(begin.removesuffix(GAP))
    )


@pytest.mark.quick
def test_every_message_on_the_page_is_in_the_source():
    assert [
        begin
        for begin in documented()
        if not any(begins(text, begin) for text in messages())
    ] == []


@pytest.mark.quick
def test_every_message_in_the_source_is_on_the_page():
    known = documented()
    assert [
        text
        for text, path in messages().items()
        if path and not any(begins(text, begin) for begin in known)
    ] == []


def test_each_beginning_is_there_once_and_says_something():
    known = documented()
    assert sorted(known) == sorted(set(known))
    short = {begin for begin in known if len(re.findall(r"\w{2,}", begin)) < 2}
    assert short <= set(messages())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "def f(x):\n  call = f'`f(x={x!r})`'\n  raise ValueError(f'{call}: too ' "
            "'large')",
            "`f(x=…)`: too large",
        ),
        ("def f(x):\n  raise TypeError(f'no {x}' + f', but {x!r}{x}')", "no …, but ……"),
        ("warn(f'stage {s} keeps too much')", "stage … keeps too much"),
        ("def f(x, wrong):\n  wrong.append('bad')", "bad"),
        ("def f(xs):\n  return KeyError('; '.join(f'{x} is' for x in xs))", "… is"),
    ],
)
def test_messages_are_read_from_the_source(source, expected):
    assert expected in [text for message, text in texts(source) if message]


def test_the_page_is_read_by_its_tables():
    page = "| message | |\n|---|---|\n| `` `f`: no `` <br> `too …` | `x` |\n"
    assert documented(page) == ["`f`: no", "too …"]
