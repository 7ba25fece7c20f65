"""The house as its source draws it: modules, the rooms that they stand in, floors.

What comes in is a table of sources, `{"fpipe._core.errors": "import jax", …}`. What
goes out is a graph of modules, the rooms that they stand in, and the floor of each
room, which is one above the highest room that it imports:

    3  plot
    2  front
    1  _core  schedules

The tests mirror the rooms: `rooms_entered` says which of them use private names of a
room that they do not stand in.

`python -m tests.house` prints the drawing.
"""

import ast
import functools
import pathlib
import re
from collections.abc import Iterator

FRONT = "front"
"""The room of `fpipe/__init__.py` and of the private modules next to it."""

FRONT_PACKAGES = {"fpipe._split"}
"""Packages that are a part of the front."""

HALLS = {"fpipe._executors"}
"""Rooms with rooms inside: the executors share a hall, and do not know each other."""

Sources = dict[str, str]
Graph = dict[str, set[str]]


def sources(package: pathlib.Path) -> Sources:
    """The text of every module of the package in that folder, by the module's name."""
    texts = {}
    for path in sorted(package.rglob("*.py")):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        texts[name] = path.read_text()
    return texts


@functools.cache
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
    if room in FRONT_PACKAGES:
        return FRONT
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


def cycle(graph: Graph) -> list[str]:
    """Nodes of a graph that form a cycle; empty where there is none."""
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
        assert level, f"rooms in a cycle: {sorted(left)}"
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


# --- the tests ---

NAMED_TUPLES = {"_replace", "_make", "_asdict", "_fields"}
"""Public, though they look private."""


def rooms_entered(tests: Sources, texts: Sources) -> dict[str, set[str]]:
    """By test, the rooms that it uses private names of and does not stand in."""
    rooms = {module: room_of(module, texts) for module in texts}
    holders: Graph = {}  # of each private name, the rooms that have it
    for module, text in texts.items():
        # `os._exit` is Python's.
        for name in set(re.findall(r"(?<!\bos\.)\b_\w*[^\W_]\b", text)):
            holders.setdefault(name, set()).add(rooms[module])
    found: Graph = {}
    for test, text in tests.items():
        own = own_rooms(test, set(rooms.values()))
        for entered in private_uses(text, rooms, holders):
            if entered.isdisjoint(own):
                found.setdefault(test, set()).update(entered)
    return found


def own_rooms(test: str, rooms: set[str]) -> set[str]:
    """The rooms that a test mirrors: `tests.model.test_skips` stands in `fpipe._model`.

    A test of a hall looks into the rooms within, and one of a room into its hall.
    """
    *folders, module = test.split(".")
    place = folders[1:] or [module.removeprefix("test_")]
    found = set()
    for room in rooms:
        parts = [part.strip("_") for part in room.removeprefix("fpipe.").split(".")]
        if all(part == own for part, own in zip(parts, place, strict=False)):
            found.add(room)
    if f"fpipe._{place[0]}" in FRONT_PACKAGES:
        found.add(FRONT)
    return found


def private_uses(
    text: str, rooms: dict[str, str], holders: Graph
) -> Iterator[set[str]]:
    """The rooms of each private name that a test uses: several may have an attribute.

    It imports a private module, patches one by its name, or reads a private attribute.
    What the tests of a room share, such as `tests.executors.helpers`, is as private as
    that room.
    """
    names = list(imported_names(text))
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Call(ast.Attribute(attr="setattr"), [ast.Constant(str(name)), *_]):
                names.append(name)
            case ast.Attribute(value, name) if ast.unparse(value) != "self":
                if name not in NAMED_TUPLES:
                    yield from [holders[name]] if name in holders else []
    for name in names:
        package, _, shared = name.partition(".helpers.")
        if shared and package != "tests":
            yield own_rooms(f"{package}.helpers", set(rooms.values()))
        parts = [part for part in name.split(".") if part != "__main__"]
        if parts[0] == "fpipe" and any(part.startswith("_") for part in parts):
            while name not in rooms:
                name = name.rpartition(".")[0]
            yield {rooms[name]}


if __name__ == "__main__":
    print(drawing(sources(pathlib.Path(__file__).parents[1] / "fpipe")))
