"""The house is drawn from its source: rooms, floors, and what each room may import.

What comes in is a table of sources, `{"fpipe._core.errors": "import jax", …}`. What
goes out is a graph of modules, the rooms that they stand in, and the floor of each room,
which is one above the highest room that it imports. `python -m tests.test_imports`
prints the drawing.
"""

import ast
import pathlib
import subprocess
import sys

import fpipe

ROOT = pathlib.Path(fpipe.__file__).parent

FRONT = "front"
"""The room of `fpipe/__init__.py` and of the private modules next to it."""

HALLS = {"fpipe._executors"}
"""Rooms with rooms inside: the executors share a hall, and do not know each other."""

MOST_FLOORS = 9
MOST_ROOMS = 14

Sources = dict[str, str]
Graph = dict[str, set[str]]


def sources() -> Sources:
    """The text of every module of the package, by the module's name."""
    texts = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("fpipe", *path.relative_to(ROOT).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        texts[name] = path.read_text()
    return texts


def imported_names(source: str) -> list[str]:
    """What a source imports, anywhere in it: `a.b` for `from a import b`."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def module_graph(texts: Sources) -> Graph:
    """The modules of the package that each module imports.

    `from fpipe._core import errors` imports the module `fpipe._core.errors`, and
    `from fpipe._core.errors import shown` does so too: the longest name that is a
    module counts.
    """
    graph = {}
    for module, text in texts.items():
        targets = set()
        for name in imported_names(text):
            while name and name not in texts:
                name = name.rpartition(".")[0]
            targets.add(name)
        graph[module] = targets - {""}
    return graph


def room_of(module: str, texts: Sources) -> str:
    """The room that a module stands in.

    A package is a room, with the packages inside it, except in a hall. A public module
    next to the front is a room of its own: `fpipe.testing`, `fpipe.__main__`.
    """
    parts = module.split(".")
    if len(parts) == 1:
        return FRONT
    room = ".".join(parts[:2])
    if not is_package(room, texts):
        return FRONT if is_private(room) else room
    inner = ".".join(parts[:3])
    if room in HALLS and is_package(inner, texts):
        return inner
    return room


def is_package(module: str, texts: Sources) -> bool:
    return any(name.startswith(module + ".") for name in texts)


def is_private(module: str) -> bool:
    name = module.split(".")[1]
    return name.startswith("_") and name != "__main__"


def room_graph(texts: Sources) -> Graph:
    """The rooms that each room imports."""
    graph: Graph = {room_of(module, texts): set() for module in texts}
    for module, targets in module_graph(texts).items():
        room = room_of(module, texts)
        graph[room] |= {room_of(target, texts) for target in targets} - {room}
    return graph


def leaf_rooms(texts: Sources) -> set[str]:
    """The optional rooms: every public one but `schedules`, which all may import."""
    rooms = set(room_graph(texts)) - {FRONT, "fpipe.schedules"}
    return {room for room in rooms if not is_private(room)}


def circle(graph: Graph) -> list[str]:
    """Nodes of a graph that form a circle; empty where there is none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(node: str) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        path.append(node)
        for target in sorted(graph[node]):
            if found := visit(target):
                return found
        path.pop()
        done.add(node)
        return []

    for node in sorted(graph):
        if found := visit(node):
            return found
    return []


def floors(texts: Sources) -> list[list[str]]:
    """The rooms of each floor, from the ground up. The leaves share the highest one."""
    graph = room_graph(texts)
    leaves = leaf_rooms(texts)
    left = set(graph) - leaves
    levels = []
    while left:
        level = sorted(room for room in left if not graph[room] & left - {room})
        assert level, f"rooms in a circle: {sorted(left)}"
        levels.append(level)
        left -= set(level)
    return [*levels, sorted(leaves)] if leaves else levels


def drawing(texts: Sources) -> str:
    """The house from the top down: a line a floor, its number first."""
    levels = floors(texts)
    lines = []
    for number in range(len(levels), 0, -1):
        names = [room.removeprefix("fpipe.") for room in levels[number - 1]]
        lines.append(
            f"{number}  {'  '.join(names)}".replace("_executors.", "_executors/")
        )
    return "\n".join(lines)


def imports_of_leaves(texts: Sources) -> list[tuple[str, str]]:
    """Imports of an optional room by another room. The command line may draw plots."""
    leaves = leaf_rooms(texts)
    found = []
    for module, targets in module_graph(texts).items():
        for target in sorted(targets):
            room = room_of(target, texts)
            outside = room in leaves and room != room_of(module, texts)
            if outside and module != "fpipe.__main__":
                found.append((module, target))
    return found


def imports_of_the_facade(texts: Sources) -> list[str]:
    """Modules that import what `fpipe/__init__.py` re-exports, instead of its home."""
    graph = module_graph(texts)
    return [module for module, targets in graph.items() if "fpipe" in targets]


def foreign_imports(texts: Sources, library: str) -> dict[str, list[str]]:
    """By module, the names that it imports from a library or from a part of it."""
    found = {}
    for module, text in texts.items():
        names = [
            name
            for name in imported_names(text)
            if name == library or name.startswith(library + ".")
        ]
        if names:
            found[module] = names
    return found


def test_rooms_have_no_circle():
    assert circle(room_graph(sources())) == []
    assert circle(
        room_graph(
            {
                "fpipe._a": "",
                "fpipe._a.x": "from fpipe._b import y",
                "fpipe._b": "",
                "fpipe._b.y": "import fpipe._a.x",
            }
        )
    ) == ["fpipe._a", "fpipe._b", "fpipe._a"]


def test_modules_of_a_room_have_no_circle():
    assert circle(module_graph(sources())) == []
    made_up = {
        "fpipe._a": "",
        "fpipe._a.x": "def f():\n    from fpipe._a.y import g",
        "fpipe._a.y": "from fpipe._a import x",
    }
    assert circle(room_graph(made_up)) == []
    assert circle(module_graph(made_up)) == ["fpipe._a.x", "fpipe._a.y", "fpipe._a.x"]


def test_the_executors_do_not_know_each_other():
    placed, scan = "fpipe._executors.placed", "fpipe._executors.scan"

    def acquainted(texts: Sources) -> bool:
        graph = room_graph(texts)
        return scan in graph[placed] or placed in graph[scan]

    made_up = {"fpipe._executors": "", "fpipe._executors.hall": ""}
    for room in (placed, scan):
        made_up |= {room: "", f"{room}.lower": "from fpipe._executors import hall"}
    assert not acquainted(made_up)
    made_up["fpipe._executors.scan.lower"] = "import fpipe._executors.placed.lower"
    assert acquainted(made_up)


def test_the_house_has_few_floors_and_rooms():
    levels = floors(sources())
    assert len(levels) <= MOST_FLOORS, drawing(sources())
    assert sum(map(len, levels)) <= MOST_ROOMS, drawing(sources())


def test_floors_are_drawn_from_the_source():
    made_up = {
        "fpipe": "from fpipe._pipe import Pipe as Pipe",
        "fpipe._pipe": "from fpipe._hall.one import run\nfrom fpipe._tune import tune",
        "fpipe._tune": "",
        "fpipe._hall": "",
        "fpipe._hall.one": "import jax\nfrom fpipe.schedules import Action",
        "fpipe.schedules": "",
        "fpipe.schedules._action": "",
        "fpipe.plot": "from fpipe.schedules import Action",
    }
    assert drawing(made_up) == "4  plot\n3  front\n2  _hall\n1  schedules"


def test_nobody_imports_the_leaves():
    assert imports_of_leaves(sources()) == []
    command = "from fpipe import plot"
    made_up = {"fpipe": "", "fpipe.plot": "", "fpipe.__main__": command}
    assert imports_of_leaves(made_up) == []
    assert imports_of_leaves(made_up | {"fpipe._pipe": "import fpipe.plot"}) == [
        ("fpipe._pipe", "fpipe.plot")
    ]
    assert imports_of_leaves(made_up | {"fpipe.plot": "import fpipe.__main__"})


def test_the_leaves_are_those_of_the_documentation():
    names = {"__main__", "flax", "optim", "plot", "testing"}
    assert {f"fpipe.{name}" for name in names} == leaf_rooms(sources())


def test_nobody_imports_the_facade():
    assert imports_of_the_facade(sources()) == []
    made_up = {"fpipe": "", "fpipe._pipe": ""}
    assert imports_of_the_facade(made_up | {"fpipe.optim": "import fpipe"})
    assert imports_of_the_facade(made_up | {"fpipe.optim": "from fpipe import Pipe"})
    assert not imports_of_the_facade(
        made_up | {"fpipe.optim": "from fpipe import _pipe"}
    )


def test_only_leaves_import_matplotlib():
    def rooms(texts: Sources) -> set[str]:
        return {room_of(m, texts) for m in foreign_imports(texts, "matplotlib")}

    assert rooms(sources()) <= leaf_rooms(sources())
    assert rooms({"fpipe": "", "fpipe._pipe": "import matplotlib.pyplot"}) == {FRONT}
    code = "import sys, fpipe, fpipe.plot, fpipe.__main__; "
    code += "assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_schedules_know_no_jax():
    def strangers(texts: Sources) -> list[str]:
        """What the schedules import that neither they nor Python's library hold."""
        return [
            name
            for module, text in texts.items()
            if room_of(module, texts) == "fpipe.schedules"
            for name in imported_names(text)
            if name.split(".")[0] not in sys.stdlib_module_names
            and not name.startswith("fpipe.schedules")
        ]

    assert strangers(sources()) == []
    made_up = {"fpipe.schedules": "import math", "fpipe.schedules._a": "import jax"}
    assert strangers(made_up) == ["jax"]
    # They are also what they say when they run: with a package `fpipe` that is empty.
    code = f"""
import sys, types
package = types.ModuleType('fpipe')
package.__path__ = [{str(ROOT)!r}]
sys.modules['fpipe'] = package
import fpipe.schedules
assert not {{'jax', 'numpy', 'matplotlib'}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_jax_internals_are_left_alone():
    def private(texts: Sources) -> set[str]:
        libraries = "jax._src", "jax.interpreters", "jax.experimental", "jax.core"
        found = [foreign_imports(texts, library).values() for library in libraries]
        return {name for modules in found for names in modules for name in names}

    assert private(sources()) <= {"jax.core.Tracer"}  # which is public
    assert private({"fpipe": "from jax._src import core"}) == {"jax._src.core"}


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


if __name__ == "__main__":
    print(drawing(sources()))
