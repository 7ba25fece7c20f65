"""The notebook runs from its first cell to its last, and values show themselves."""

import ast
import json
import pathlib
import re
from typing import Any

import jax
import pytest

NOTEBOOK = pathlib.Path(__file__).parents[2] / "examples/any_model.ipynb"


@pytest.fixture(scope="module")
def cells():
    """Source of each cell that has code, by its id."""
    return {
        cell["id"]: "".join(cell["source"])
        for cell in json.loads(NOTEBOOK.read_text())["cells"]
        if cell["cell_type"] == "code"
    }


def run(source, names):
    """Run a cell as a notebook does; what its last expression shows, or `None`."""
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), NOTEBOOK.name, "exec"), names)
    if last is None:
        return None
    value = eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)
    show = getattr(value, "_repr_html_", None) or getattr(value, "_repr_svg_", None)
    return show() if show is not None else repr(value)


def test_it_is_a_notebook_without_outputs():
    """What version 4.5 of the format asks for."""
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        assert all(isinstance(line, str) for line in cell["source"])
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
        else:
            assert cell["cell_type"] == "markdown"
            assert "outputs" not in cell


def test_it_runs_and_shows(cells, capsys):
    names: dict[str, Any] = {"__name__": "__main__"}
    with jax.numpy_dtype_promotion("standard"):
        shown = {name: run(source, names) for name, source in cells.items()}
    # Tables of pieces, devices and candidates; drawings of schedules and timelines.
    tables = {name for name, html in shown.items() if html and "<table" in html}
    drawings = {name for name, html in shown.items() if html and "<svg" in html}
    assert tables == {"pieces", "prediction", "candidates"}
    assert drawings == {"pieces", "prediction", "schedule", "timeline"}
    assert all(len(html) < 200_000 for html in shown.values() if html)
    assert names["accuracy"] > 0.7
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", printed)]
    assert len(losses) == 4
    assert losses[3] < losses[0]
