"""Figures of a checkout: its size, its house, and what a first step goes through.

    python -m tests.figures [checkout]

What comes in is the folder of a checkout, by default this one, so that two of them can
be compared. What goes out is a table of figures, one a line:

    lines                         20386
    code tokens a line            11.9

The sources are read and not imported, except for the steps: they run in a process of
their own, that imports the package of that checkout.
"""

import argparse
import ast
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tokenize

from tests.house import FRONT, cycle, floors, room_graph, room_of, sources

BLANK = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}
"""Tokens that are no code."""


@dataclasses.dataclass(frozen=True)
class Text:
    """What one source holds: its code tokens, without documentation, and comments."""

    lines: int
    tokens: list[tokenize.TokenInfo]
    comment_lines: int

    @property
    def code_lines(self) -> int:
        return len({token.start[0] for token in self.tokens})

    def names(self, word: str) -> bool:
        """Whether the code names that word, as a name or as a string."""
        return any(token.string.strip("\"'") == word for token in self.tokens)


def documentation_lines(source: str) -> set[int]:
    """The lines of strings that stand alone: docstrings, and those under attributes."""
    lines = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            assert node.end_lineno
            lines |= set(range(node.lineno, node.end_lineno + 1))
    return lines


def read(source: str) -> Text:
    documentation = documentation_lines(source)
    lines = source.splitlines(keepends=True)
    tokens, comments = [], 0
    for token in tokenize.generate_tokens(iter(lines).__next__):
        if token.type == tokenize.COMMENT:
            comments += not token.line[: token.start[1]].strip()
        elif token.type not in BLANK and token.start[0] not in documentation:
            tokens.append(token)
    return Text(len(lines), tokens, comments)


# Runs in the checkout: three layers on three devices, two microbatches. The profiler
# sees every Python function that is entered, in all threads: `threading.setprofile` is
# for those that start later.
STEPS = """
import json, os, sys, threading
import jax, jax.numpy as jnp

jax.config.update("jax_num_cpu_devices", 3)
import fpipe

PACKAGE = os.path.dirname(fpipe.__file__) + os.sep
calls, entered = 0, set()

def apply(params, x):
    global calls
    calls += 1
    return jnp.tanh(x @ params)

def init(key, x):
    return jnp.eye(x.shape[-1])

def watch(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(PACKAGE):
        entered.add((code.co_filename[len(PACKAGE):], code.co_qualname))

def loss(y, target):
    return jnp.mean((y - target) ** 2)

executor = sys.argv[1]
x = jnp.ones((4, 4))
layers = [fpipe.Layer(apply, init, name=f"layer{k}") for k in range(3)]
pipe = fpipe.Pipe(layers, [1, 1, 1], chunks=2, executor=executor)
params = pipe.init(jax.random.key(0), x)
step = pipe.value_and_grad(loss)
threading.setprofile(watch)
sys.setprofile(watch)
step(params, x, x)
sys.setprofile(None)
threading.setprofile(None)

layers = [fpipe.Layer(apply, init, name=f"layer{k}") for k in range(3)]
pipe = fpipe.Pipe(layers, [1, 1, 1], chunks=2, executor=executor)
counts = {}
def count(name, run):
    global calls
    calls = 0
    result = run()
    counts[name] = calls
    return result

params = count("init", lambda: pipe.init(jax.random.key(0), x))
count("plan", lambda: pipe.plan(params, x, x, loss_fn=loss))
count("compile", lambda: pipe.compile(params, x, x, loss_fn=loss))
count("step", lambda: pipe.value_and_grad(loss)(params, x, x))
print(json.dumps({"entered": sorted(entered), "counts": counts}))
"""


def first_step(checkout: pathlib.Path, executor: str) -> list[tuple[str, str]]:
    """Figures of a first step, and of the calls of a layer's Python before it."""
    done = subprocess.run(
        [sys.executable, "-c", STEPS, executor],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    entered = result["entered"]
    named = [name for _, name in entered if not name.split(".")[-1].startswith("<")]
    files = {file for file, _ in entered}
    calls = [f"{name} {n}" for name, n in result["counts"].items()]
    return [
        (f"first {executor} step: files entered", str(len(files))),
        (f"first {executor} step: functions entered", str(len(named))),
        (f"first {executor} step: with lambdas, comprehensions", str(len(entered))),
        (f"calls of the layers' Python, {executor}", ", ".join(calls)),
    ]


def figures(checkout: pathlib.Path) -> list[tuple[str, str]]:
    texts = sources(checkout / "fpipe")
    modules = {name: read(source) for name, source in texts.items()}
    lines = sum(text.lines for text in modules.values())
    code = sum(text.code_lines for text in modules.values())
    tokens = sum(len(text.tokens) for text in modules.values())
    comments = sum(text.comment_lines for text in modules.values())
    long = sum(len(line) > 88 for text in texts.values() for line in text.split("\n"))
    rooms = room_graph(texts)
    front = [name for name in texts if room_of(name, texts) == FRONT]
    side = [name for name, text in modules.items() if text.names("side")]
    return [
        ("modules", str(len(modules))),
        ("lines", str(lines)),
        ("code lines", str(code)),
        ("lines over 88 columns", str(long)),
        ("code tokens a line", f"{tokens / code:.1f}"),
        ("comment lines / code lines", f"{100 * comments / code:.1f} %"),
        ("rooms", str(len(rooms))),
        ("floors", "a cycle" if cycle(rooms) else str(len(floors(texts)))),
        ("modules of the front", str(len(front))),
        ("modules that name the need `side`", str(len(side))),
        *first_step(checkout, "placed"),
        *first_step(checkout, "scan"),
    ]


def main() -> None:
    here = pathlib.Path(__file__).parents[1]
    parser = argparse.ArgumentParser(prog="python -m tests.figures")
    parser.add_argument("checkout", type=pathlib.Path, nargs="?", default=here)
    for name, value in figures(parser.parse_args().checkout.resolve()):
        print(f"{name:<56}{value}")


if __name__ == "__main__":
    main()
