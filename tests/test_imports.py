"""The house: imports go down only, schedules know no JAX, and the façade is the public
API.
"""

import ast
import pathlib
import subprocess
import sys

import fpipe

ROOT = pathlib.Path(fpipe.__file__).parent

# From the top down: a module may import what stands in a later line, and its neighbours
# only within a package.
LEVELS = [
    ["fpipe.__main__"],
    ["fpipe.flax", "fpipe.optim", "fpipe.plot", "fpipe.testing"],
    ["fpipe"],
    ["fpipe._tune"],
    ["fpipe._pipe"],
    ["fpipe._prediction"],
    ["fpipe._balancing"],
    ["fpipe._placed", "fpipe._scan", "fpipe._sequential", "fpipe._costs"],
    ["fpipe._given", "fpipe._anomaly", "fpipe._record"],
    ["fpipe._plan", "fpipe._call"],
    ["fpipe._after"],
    ["fpipe._program", "fpipe._placement"],
    ["fpipe._stage", "fpipe._scheduling", "fpipe._sums"],
    ["fpipe._model", "fpipe._loss", "fpipe._batch_norm"],
    ["fpipe._layer", "fpipe._jaxpr", "fpipe._microbatch", "fpipe._remat"],
    ["fpipe._skip", "fpipe.schedules", "fpipe._frozen"],
    [
        "fpipe._tree",
        "fpipe._errors",
        "fpipe._recent",
        "fpipe._mincut",
        "fpipe._balance",
    ],
]
LEVEL = {name: k for k, names in enumerate(LEVELS) for name in names}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("fpipe", *path.relative_to(ROOT).with_suffix("").parts)
        yield (
            ".".join(parts[:-1] if parts[-1] == "__init__" else parts),
            path.read_text(),
        )


def imports(source):
    """The modules that a source imports, names imported from a package included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def home(module):
    """The module or package of `LEVELS` that a module belongs to."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next(
        (name for name in names if name in LEVEL and name != "fpipe"),
        "fpipe" if module == "fpipe" else None,
    )


def upward(sources):
    """The imports that do not go down."""
    for module, source in sources:
        for target in imports(source):
            a, b = home(module), home(target)
            if a and b and b != "fpipe" and a != b and LEVEL[a] >= LEVEL[b]:
                yield module, target


def test_every_module_has_a_level():
    assert [name for name, _ in modules() if home(name) is None] == []
    assert set(LEVEL) == {home(name) for name, _ in modules()}


def test_imports_go_down_only():
    assert list(upward(modules())) == []


def test_that_test_can_fail():
    assert list(upward([("fpipe._tree", "from fpipe._model import Model")]))
    assert list(upward([("fpipe._layer", "from fpipe import _jaxpr")]))
    assert not list(
        upward([("fpipe._plan._lower", "from fpipe._plan._programs import Inputs")])
    )


LEAVES = {"fpipe.__main__", "fpipe.flax", "fpipe.optim", "fpipe.plot", "fpipe.testing"}


def onto_leaves(sources):
    """The imports of optional leaves, but for those of the command line, which nobody
    imports.
    """
    for module, source in sources:
        for target in imports(source):
            if home(target) in LEAVES - {home(module)} and module != "fpipe.__main__":
                yield module, target


def test_nobody_imports_the_leaves():
    assert list(onto_leaves(modules())) == []
    assert list(onto_leaves([("fpipe", "from fpipe import plot")]))
    assert list(onto_leaves([("fpipe.plot", "from fpipe.__main__ import main")]))


def test_only_the_plot_knows_matplotlib():
    assert {
        m
        for m, source in modules()
        if "matplotlib" in source.replace('"matplotlib', "")
    } <= LEAVES
    code = "import sys, fpipe, fpipe.plot, fpipe.__main__; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nobody_imports_the_facade():
    for module, source in modules():
        assert (
            "fpipe" not in {t for t in imports(source) if t == "fpipe"}
            or module == "fpipe"
            or _only_modules(source)
        )


def _only_modules(source):
    """`from fpipe import _jaxpr` names a module, not the façade's content."""
    nodes = [
        n
        for n in ast.walk(ast.parse(source))
        if isinstance(n, ast.ImportFrom) and n.module == "fpipe"
    ]
    return all(alias.name.startswith("_") for n in nodes for alias in n.names)


def test_schedules_know_no_jax():
    code = "import sys, types; sys.modules['fpipe'] = types.ModuleType('fpipe'); sys.modules['fpipe'].__path__ = [{!r}]\n"
    code += "import fpipe.schedules; assert not any(m.split('.')[0] in ('jax', 'numpy', 'matplotlib') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code.format(str(ROOT))], check=True)


def test_jax_internals_are_left_alone():
    private = ("jax._src", "jax.interpreters", "jax.experimental", "jax.core")
    for module, source in modules():
        used = [t for t in imports(source) if t.startswith(private)]
        assert set(used) <= {"jax.core", "jax.core.Tracer"}, (
            module
        )  # `Tracer` is public


def test_the_facade_is_re_exports_and_nothing_else():
    body = ast.parse((ROOT / "__init__.py").read_text()).body
    assert isinstance(body[0], ast.Expr)  # its docstring
    for node in body[1:]:
        assert isinstance(node, ast.ImportFrom)
        assert [alias.asname for alias in node.names] == [
            alias.name for alias in node.names
        ]


def test_everything_public_has_a_docstring():
    for name in [n for n in vars(fpipe) if not n.startswith("_")]:
        assert (getattr(fpipe, name).__doc__ or "").strip(), name
