"""Imports go down only, and what else a room may import. The house is drawn from its
source, by `tests/house.py`; each rule is shown able to fail on a made-up source.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

import fpipe
from tests.house import (
    FRONT,
    Sources,
    cycle,
    drawing,
    floors,
    foreign_imports,
    imported_names,
    imports_of_leaves,
    imports_of_the_facade,
    leaf_rooms,
    module_graph,
    room_graph,
    room_of,
    rooms_entered,
    sources,
)

pytestmark = pytest.mark.quick

ROOT = pathlib.Path(fpipe.__file__).parent
HOUSE = sources(ROOT)
TESTS = sources(pathlib.Path(__file__).parent)

MOST_FLOORS = 7
MOST_ROOMS = 15


def test_rooms_have_no_cycle():
    assert cycle(room_graph(HOUSE)) == []
    assert cycle(
        room_graph(
            {
                "fpipe._a": "",
                "fpipe._a.x": "from fpipe._b import y",
                "fpipe._b": "",
                "fpipe._b.y": "import fpipe._a.x",
            }
        )
    ) == ["fpipe._a", "fpipe._b", "fpipe._a"]


def test_modules_of_a_room_have_no_cycle():
    assert cycle(module_graph(HOUSE)) == []
    made_up = {
        "fpipe._a": "",
        "fpipe._a.x": "def f():\n    from fpipe._a.y import g",
        "fpipe._a.y": "from fpipe._a import x",
    }
    assert cycle(room_graph(made_up)) == []
    assert cycle(module_graph(made_up)) == ["fpipe._a.x", "fpipe._a.y", "fpipe._a.x"]


def test_the_executors_do_not_know_each_other():
    placed, scan = "fpipe._executors.placed", "fpipe._executors.scan"

    def acquainted(texts: Sources) -> bool:
        graph = room_graph(texts)
        return scan in graph[placed] or placed in graph[scan]

    assert not acquainted(HOUSE)
    made_up = {"fpipe._executors": "", "fpipe._executors.hall": ""}
    for room in (placed, scan):
        made_up |= {room: "", f"{room}.lower": "from fpipe._executors import hall"}
    assert not acquainted(made_up)
    made_up["fpipe._executors.scan.lower"] = "import fpipe._executors.placed.lower"
    assert acquainted(made_up)


def test_the_house_has_few_floors_and_rooms():
    levels = floors(HOUSE)
    assert len(levels) <= MOST_FLOORS, drawing(HOUSE)
    assert sum(map(len, levels)) <= MOST_ROOMS, drawing(HOUSE)


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


def test_the_documentation_has_the_drawing():
    page = (ROOT.parent / "docs" / "contributing.md").read_text()
    assert f"```text\n{drawing(HOUSE)}\n```" in page


def test_nobody_imports_the_leaves():
    assert imports_of_leaves(HOUSE) == []
    command = "from fpipe import plot"
    made_up = {"fpipe": "", "fpipe.plot": "", "fpipe.__main__": command}
    assert imports_of_leaves(made_up) == []
    assert imports_of_leaves(made_up | {"fpipe._pipe": "import fpipe.plot"}) == [
        ("fpipe._pipe", "fpipe.plot")
    ]
    assert imports_of_leaves(made_up | {"fpipe.plot": "import fpipe.__main__"})


def test_the_leaves_are_those_of_the_documentation():
    names = {"__main__", "distributed", "flax", "optim", "plot", "testing"}
    assert {f"fpipe.{name}" for name in names} == leaf_rooms(HOUSE)


def test_nobody_imports_the_facade():
    assert imports_of_the_facade(HOUSE) == []
    made_up = {"fpipe": "", "fpipe._pipe": ""}
    assert imports_of_the_facade(made_up | {"fpipe.optim": "import fpipe"})
    assert imports_of_the_facade(made_up | {"fpipe.optim": "from fpipe import Pipe"})
    assert not imports_of_the_facade(
        made_up | {"fpipe.optim": "from fpipe import _pipe"}
    )


def test_only_leaves_import_matplotlib():
    def rooms(texts: Sources) -> set[str]:
        return {room_of(m, texts) for m in foreign_imports(texts, "matplotlib")}

    assert rooms(HOUSE) <= leaf_rooms(HOUSE)
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

    assert strangers(HOUSE) == []
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


# Each room is tested by what it exports, or from within by its own tests. These need a
# private name of another room, and say what for.
ENTERED = {
    # What their own room takes, made where it is made.
    "tests.program.test_split": {"fpipe._core", "fpipe._model"},  # a stage of a model
    "tests.program.test_host_memory": {"fpipe._model"},  # how a stage recomputes
    "tests.planning.test_balance": {"fpipe._executors"},  # a schedule's costs
    "tests.executors.test_offload": {"fpipe._core", "fpipe._model", "fpipe._program"},
    "tests.executors.placed.test_levels": {"fpipe._core", "fpipe._model"},  # a call
    # What crosses between processes, in one and in several; what the watchdog is told.
    "tests.core.test_processes": {"fpipe._executors", "fpipe._executors.placed"},
    "tests.front.process_cases": {"fpipe._core", "fpipe._executors.placed"},
    # Two rooms are compared.
    "tests.executors.test_protocol": {"fpipe._model"},  # a call, the table of needs
    "tests.executors.placed.test_kept": {"fpipe._planning"},  # a plan, a balance
    # The executor that a pipe hides is put wrong, for the assertion to find.
    "tests.test_testing": {FRONT, "fpipe._executors"},
}


def test_tests_enter_no_room_but_their_own():
    assert rooms_entered(TESTS, HOUSE) == ENTERED
    made_up = {
        "fpipe": "from fpipe._pipe import Pipe as Pipe",
        "fpipe._pipe": "self._hidden = 1",
        "fpipe._hall": "",
        "fpipe._hall.one": "",
        "fpipe.plot": "self._canvas = 2",
    }

    def entered(test: str, text: str) -> set[str]:
        return rooms_entered({test: text}, made_up).get(test, set())

    for text, room in {
        "from fpipe._hall.one import run": "fpipe._hall",
        "from fpipe._hall import one": "fpipe._hall",
        "monkeypatch.setattr('fpipe._hall.one.run', 3)": "fpipe._hall",
        "from tests.hall.helpers import look": "fpipe._hall",
        "pipe._hidden": FRONT,
    }.items():
        assert entered("tests.test_plot", text) == {room}
        own = "hall" if room == "fpipe._hall" else "front"
        assert entered(f"tests.{own}.test_it", text) == set()
    assert entered("tests.test_plot", "fpipe.plot._canvas; self._hidden") == set()
    assert entered("tests.test_plot", "import fpipe.plot") == set()


def test_jax_internals_are_left_alone():
    def private(texts: Sources) -> set[str]:
        libraries = "jax._src", "jax.interpreters", "jax.experimental", "jax.core"
        found = [foreign_imports(texts, library).values() for library in libraries]
        return {name for modules in found for names in modules for name in names}

    assert private(HOUSE) <= {"jax.core.Tracer"}  # which is public
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
