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
    reference. A default that a private function makes is `...`: its text says what it
    is.
    """

    def __init__(self) -> None:
        self.names = hooks.listed(hooks.API.read_text(encoding="utf-8"))

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """While a module is read, before griffe makes the `__init__` of dataclasses."""
        del kwargs
        if "default_factory=_" in str(attr.value):
            attr.value = "..."

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """After a module, class, function or attribute was read."""
        del kwargs
        if obj.docstring is not None:
            text = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )
            obj.docstring.value = hooks.linked(_as_griffe_reads(text, obj), self.names)


def _as_griffe_reads(text: str, obj: griffe.Object) -> str:
    """What griffe would read in another way than it is meant.

    It takes what stands before a colon in `Returns:` as the type. With nothing before
    it, the annotation is the type. And in `Attributes:` it takes all but the first word
    before a colon as the type, so several names stay one word, and the type of the
    first of them is written after it.
    """
    text = re.sub(r"^(Returns:\n +)(?=\S)", r"\1: ", text, flags=re.MULTILINE)
    section = re.search(r"^Attributes:\n(?:(?:    .*)?\n?)*", text, re.MULTILINE)
    if section is None:
        return text
    names = re.compile(r"^    (\w+(?:, \w+)+):", re.MULTILINE)

    def joined(found: re.Match[str]) -> str:
        first = obj.members.get(found[1].split(",")[0])
        annotation = getattr(first, "annotation", None)
        kind = f" ({annotation})" if annotation else ""
        return f"    {found[1].replace(' ', chr(0xA0))}{kind}:"

    return text.replace(section[0], names.sub(joined, section[0]))
