"""What `mkdocs build` does beside the ordinary: a public name without a place in the
reference fails the build.

`missing()` reads sources and needs nothing but Python, so that the tests ask it too.
"""

import ast
import pathlib
import re
from html import unescape
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
API = ROOT / "docs" / "api.md"
# The modules whose names are public.
FACADES = (
    "fpipe",
    "fpipe.schedules",
    "fpipe.distributed",
    "fpipe.flax",
    "fpipe.optim",
    "fpipe.plot",
    "fpipe.testing",
)
PROTOCOL = (
    "_",
    "tree_",
)  # methods that nobody calls by name: Python's, and those of a pytree


def source(module: str) -> list[ast.stmt]:
    """The statements of a module or package."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8")).body


def public(module: str) -> list[str]:
    """The public names of a module: `import X as X`, and what it defines without an
    underscore.
    """
    names = []
    for node in source(module):
        match node:
            case ast.ImportFrom(names=aliases):
                names += [alias.name for alias in aliases if alias.asname == alias.name]
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.append(name)
            case (
                ast.Assign(targets=[ast.Name(id=name)])
                | ast.AnnAssign(target=ast.Name(id=name))
            ):
                names.append(name)
    return [name for name in names if not name.startswith("_")]


def described(module: str, name: str) -> bool:
    """Whether a name has a docstring where it is defined, and its public methods
    have.
    """
    body = source(module)
    for n, node in enumerate(body):
        match node:
            case ast.ImportFrom(module=str(home), names=aliases) if any(
                alias.asname == name for alias in aliases
            ):
                return f"{home}.{name}" in FACADES or described(home, name)
            case ast.ImportFrom(module=str(home), names=aliases) if any(
                alias.asname is None and alias.name == name for alias in aliases
            ):
                return described(home, name)
            case ast.FunctionDef(name=known) | ast.ClassDef(name=known) if (
                known == name
            ):
                inner = node.body if isinstance(node, ast.ClassDef) else []
                methods = [
                    m
                    for m in inner
                    if isinstance(m, ast.FunctionDef)
                    and not m.name.startswith(PROTOCOL)
                ]
                return all(map(ast.get_docstring, [node, *methods]))
            case (
                ast.Assign(targets=[ast.Name(id=known)])
                | ast.AnnAssign(target=ast.Name(id=known))
            ) if known == name:
                return isinstance(
                    getattr(next(iter(body[n + 1 :]), None), "value", None),
                    ast.Constant,
                )
    return False


def listed(page: str) -> list[str]:
    """The names that the reference shows, by their lines `::: name`."""
    return re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)


def missing(page: str | None = None) -> list[str]:
    """What is wrong with the reference: names that it lacks, that are not public, or
    that say nothing of themselves.
    """
    shown = listed(API.read_text(encoding="utf-8") if page is None else page)
    names = [f"{module}.{name}" for module in FACADES for name in public(module)]
    names = [name for name in names if name not in FACADES]
    return [
        *(
            f"{name} is public and not in docs/api.md: add `::: {name}`"
            for name in names
            if name not in shown
        ),
        *(
            f"{name} is in docs/api.md and not public"
            for name in shown
            if name not in names
        ),
        *(
            f"{name} is twice in docs/api.md"
            for name in sorted(set(shown))
            if shown.count(name) > 1
        ),
        *(
            f"{name}, or a method of it, has no docstring"
            for name in names
            if not described(*name.rsplit(".", 1))
        ),
    ]


def linked(text: str, names: list[str]) -> str:
    """A page whose code `fpipe.x` leads to the reference, but for headings, code blocks
    and what is a link already.
    """

    def link(found: re.Match[str]) -> str:
        return f"[`{found[1]}`][{found[1]}]" if found[1] in names else found[0]

    kept = r"(^```.*?^```$|^#[^\n]*$|``[^\n]*?``)"  # and code with backticks in it
    parts = re.split(kept, text, flags=re.MULTILINE | re.DOTALL)
    plain = re.compile(r"(?<![`\[])`(fpipe(?:\.\w+)+)`(?![`\]])")
    return "".join(
        part if n % 2 else plain.sub(link, part) for n, part in enumerate(parts)
    )


def unbroken(html: str) -> str:
    """A page whose code within a sentence is broken between words.

    A browser breaks it behind hyphens and in front of brackets too, so that `(D-1)F`
    becomes `(D-` and `1)F`. css/extra.css keeps a marked word whole. A word that may be
    wider than a narrow page is broken behind an open bracket.
    """

    def marked(found: re.Match[str]) -> str:
        inside = "".join(map(_whole, re.split(r"(\s+)", found[1])))
        return f"<code>{inside}</code>"

    blocks = re.split(r"(<pre\b.*?</pre>)", html, flags=re.DOTALL)
    code = re.compile(r"<code>([^<]*)</code>")
    return "".join(
        part if n % 2 else code.sub(marked, part) for n, part in enumerate(blocks)
    )


def _whole(word: str) -> str:
    """A word in marked parts that fit a narrow page, most often one."""
    fits = len(unescape(word)) <= NARROW
    parts = [word] if fits else re.split(r"(?<=\()(?!\))", word)
    return "<wbr>".join(
        f"<span class=word>{part}</span>" if _breaks(part) else part for part in parts
    )


def _breaks(word: str) -> bool:
    """Whether a browser would break a word that fits a narrow page."""
    return 1 < len(unescape(word)) <= NARROW and bool(re.search(r"[-(\[{|?/]", word))


NARROW = 36  # characters of code that fit everywhere


# --- what mkdocs calls ---


def on_pre_build(config: Any) -> None:
    """Refuse to build an incomplete reference."""
    del config
    from mkdocs.exceptions import PluginError  # only a build has it

    wrong = missing()
    if wrong:
        raise PluginError("\n".join(wrong))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Names lead to the reference."""
    del config, files
    if page.file.src_uri == "api.md":
        return markdown
    return linked(markdown, listed(API.read_text(encoding="utf-8")))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Code within a sentence is broken between words.

    And mkdocstrings' bracket behind a default begins no line.
    """
    del page, config, files
    return unbroken(html).replace("</code>\n)", "</code>)")
