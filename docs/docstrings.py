"""For mkdocstrings: how docstrings are read."""

import importlib.util
import pathlib
import re
from typing import Any

import griffe

_spec = importlib.util.spec_from_file_location(
    "hooks", pathlib.Path(__file__).with_name("hooks.py")
)
assert _spec is not None and _spec.loader is not None  # noqa: PT018 - for the type checker
hooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hooks)


class Docstrings(griffe.Extension):
    """`Example:` holds code, as `Examples:` does for griffe, and names lead to the
    reference.
    """

    def __init__(self) -> None:
        self.names = hooks.listed(hooks.API.read_text(encoding="utf-8"))

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """After a module, class, function or attribute was read."""
        del kwargs
        if obj.docstring is not None:
            text = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )
            obj.docstring.value = hooks.linked(_as_griffe_reads(text), self.names)


def _as_griffe_reads(text: str) -> str:
    """What griffe would read in another way than it is meant.

    It takes what stands before a colon in `Returns:` as the type. With nothing before
    it, the annotation is the type. And in `Attributes:` it takes all but the first word
    before a colon as the type, so several names stay one word.
    """
    text = re.sub(r"^(Returns:\n +)(?=\S)", r"\1: ", text, flags=re.MULTILINE)
    section = re.search(r"^Attributes:\n(?:(?:    .*)?\n?)*", text, re.MULTILINE)
    if section is None:
        return text
    names = re.compile(r"^    (\w+(?:, \w+)+):", re.MULTILINE)
    joined = names.sub(
        lambda found: f"    {found[1].replace(' ', chr(0xA0))}:", section[0]
    )
    return text.replace(section[0], joined)
