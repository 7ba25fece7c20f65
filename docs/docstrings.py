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
            obj.docstring.value = hooks.linked(text, self.names)
