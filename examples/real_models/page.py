"""The code of "Your own model", run as it stands and compared with plain JAX.

In: the page's Python blocks, one after the other. Out: a row for each block, and for
each executor if the block trains:

    Plain JAX          line  14  ran
    Flax linen         line 231  placed  loss 0.0e+00  gradients 1.2e-07
    Flax linen         line 231  scan    loss 6.8e-08  gradients 3.4e-07

While the page runs, `fpipe.value_and_grad` notes what its steps are called with. A step
is compared with `jax.value_and_grad` of its loss function on these arguments, under
both executors, whichever the block has.
"""

# pyright: basic

import contextlib
import dataclasses
import inspect
import io
import os
import pathlib
import re
import sys
import tempfile
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
from jax.core import Tracer
from plain import PlainStep, difference

import fpipe

PAGE = pathlib.Path(__file__).parents[2] / "docs/your_model.md"


class Block(NamedTuple):
    """A Python block, and what the page shows of its output, or `None`."""

    section: str
    line: int
    code: str
    shown: str | None


def blocks(page: str) -> Iterator[Block]:
    """The Python blocks of a page, also those with a title."""
    fences = re.finditer(
        r'^```python(?: title="[^"\n]*")?\n(.*?)^```$(?:\n*^```text\n(.*?)^```$)?',
        page,
        re.MULTILINE | re.DOTALL,
    )
    for found in fences:
        *_, section = re.findall(r"^## (.*)$", page[: found.start()], re.MULTILINE)
        line = page.count("\n", 0, found.start()) + 2
        yield Block(section, line, found[1], found[2])


# --- what the page calls ---


@dataclasses.dataclass(frozen=True)
class Call:
    """A step of the page: its loss function and options, and its arguments."""

    loss_fn: Callable[..., Any]
    options: dict[str, Any]
    params: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def batch(self) -> dict[str, Any]:
        """All arguments but the parameters, by name."""
        signature = inspect.signature(self.loss_fn)
        _, *batch = signature.bind(None, *self.args, **self.kwargs).arguments.items()
        return dict(batch)


@dataclasses.dataclass(frozen=True)
class Noted:
    """A step that notes its last call, or what it made parameters for."""

    step: Any
    loss_fn: Callable[..., Any]
    options: dict[str, Any]
    calls: list[Call]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)

    def _note(self, params: Any, args: Any, kwargs: Any) -> None:
        leaves = jax.tree.leaves((params, args, kwargs))
        if not any(isinstance(leaf, Tracer) for leaf in leaves):
            params = self.step.gather(params)
            given = on_one_device((params, args, kwargs))
            self.calls[:] = [Call(self.loss_fn, self.options, *given)]

    def init(self, key: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Make parameters. In a `jax.jit` of the page this is all that has values."""
        params = self.step.init(key, *args, **kwargs)
        self._note(params, args, kwargs)
        return params

    def __call__(self, params: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A step."""
        self._note(params, args, kwargs)
        return self.step(params, *args, **kwargs)


def on_one_device(tree: Any) -> Any:
    """A state lies on the devices of its pieces, which plain JAX does not take."""

    def put(a: Any) -> Any:
        return jax.device_put(a, jax.devices()[0]) if isinstance(a, jax.Array) else a

    return jax.tree.map(put, tree)


@contextlib.contextmanager
def noting() -> Iterator[list[Call]]:
    """The last step that is called in the block, if one is."""
    calls: list[Call] = []
    make = fpipe.value_and_grad

    def value_and_grad(loss_fn: Any, **options: Any) -> Noted:
        return Noted(make(loss_fn, **options), loss_fn, options, calls)

    with mock.patch.object(fpipe, "value_and_grad", value_and_grad):
        yield calls


# --- the rows ---


def compared(call: Call, executor: str) -> tuple[float, float]:
    """How far the loss, with state or aux, and the gradients are from plain JAX."""
    options: dict[str, Any] = call.options | {"executor": executor}
    step = fpipe.value_and_grad(call.loss_fn, **options)
    loss, grads = step(step.place(call.params, **call.batch), **call.batch)
    names = ("has_aux", "reduction")
    asked = {name: options[name] for name in names if name in options}
    plain = PlainStep(call.loss_fn, options["chunks"], **asked)
    want, want_grads = plain(call.params, call.batch)
    return difference(loss, want), difference(step.gather(grads), want_grads)


def check(limit: float) -> int:
    """Run and compare all blocks, and return how many are wrong."""
    page = types.ModuleType("your_model")
    sys.modules[page.__name__] = page  # linen looks up where a module is written
    wrong = 0
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for block in blocks(PAGE.read_text()):
            title = f"{block.section:32.32}  line {block.line:3}"
            try:
                wrong += not run(block, page, title, limit)
            except Exception:
                wrong += 1
                print(f"{title}  FAILED", flush=True)
                traceback.print_exc()
    return wrong


def run(block: Block, page: types.ModuleType, title: str, limit: float) -> bool:
    """Run a block, print its rows, and say whether all is as it should be."""
    code = "\n" * (block.line - 1) + block.code  # errors have the page's lines
    printed = io.StringIO()
    with noting() as calls, contextlib.redirect_stdout(printed):
        exec(compile(code, os.fspath(PAGE), "exec"), vars(page))
    good = block.shown in (None, printed.getvalue())
    if not good:
        print(f"{title}  PRINTED\n{printed.getvalue()}", flush=True)
    if not calls:
        print(f"{title}  ran", flush=True)
    for call in calls:
        for executor in ("placed", "scan"):
            loss, grads = compared(call, executor)
            equal = max(loss, grads) <= limit
            good = good and equal
            print(
                f"{title}  {executor:6}  loss {loss:.1e}  gradients {grads:.1e}"
                f"{'' if equal else '  NOT EQUAL'}",
                flush=True,
            )
    return good
