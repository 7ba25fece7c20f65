"""What `print(split)` shows. Nothing is compiled."""

import jax
import jax.numpy as jnp
import pytest

import fpipe
from fpipe._split.table import numbers, paths
from tests.split.models import EXAMPLES, gpt, residual_mlp, two_inputs


def tables(split):
    """The rows of each table, cells split at two spaces."""
    return [
        [[cell.strip() for cell in line.split("  ") if cell] for line in part]
        for part in map(str.splitlines, str(split).split("\n\n"))
    ]


@pytest.mark.quick
def test_what_crosses_and_why():
    pieces, crosses, given, again = tables(gpt().split())
    head = ["piece", "name", "parameters", "borrows", "FLOPs", "time", "boundary"]
    assert pieces[0] == [*head, "skips", "made again"]
    assert [row[1] for row in pieces[1:]] == ["embed", "block *", "block *", "piece"]
    assert pieces[2][2] == "h/0/(out qkv)"
    assert pieces[4][2] == "embed"
    rows = [[row[0], row[1], *row[3:5], row[-1]] for row in crosses[1:]]
    assert rows == [
        ["gather", "float32[2,4,3]", "0", "the next", "read there alone"],
        ["add", "float32[2,4,3]", "1-2", "the next", "read there alone"],
        ["random_unwrap", "uint32[2]", "0", "1", "a key: all draw from one"],
        ["random_unwrap", "uint32[2]", "0", "2", "a key: all draw from one"],
    ]
    # The mask goes from the call to whoever reads it, over no cut.
    assert given == [
        ["of the call", "array", "bytes", "given to"],
        ["x['mask']", "bool[2,4]", "8 B", "1-2"],
    ]
    # Where the function makes it.
    assert crosses[2][5].startswith("models.py:")
    assert again[1][:5] == ["select_n", "float32[2,4,4]", "128 B", "1-2", "x['mask']"]


def test_a_small_value_of_parameters():
    _, crosses, given = tables(two_inputs().split())
    assert crosses[-1][:2] == ["reduce_sum", "float32[]"]
    assert crosses[-1][-1] == "small beside its parameters"
    # What the call gives to later pieces is called by its path.
    assert given[1:] == [
        ["x[1]", "float32[2,3]", "24 B", "1"],
        ["side['scale']", "float32[2,1]", "8 B", "0-1"],
    ]


def test_an_input_that_crosses_is_called_by_its_path():
    """One of floats that the first piece reads too: its gradient has one owner."""

    def residual(params, x):
        h = fpipe.cut(jnp.tanh(x @ params["a"]))
        return x + h @ params["b"]

    params = {"a": jnp.eye(3), "b": jnp.eye(3)}
    _, crosses = tables(fpipe.split(residual, params, jnp.ones((2, 3))))
    assert crosses[1] == ["x", "float32[2,3]", "24 B", "0", "the next", *crosses[1][5:]]
    assert len(crosses[1]) == 6


def test_a_function_that_is_not_cut_has_one_table():
    split = fpipe.split(lambda p, x: x @ p["w"], {"w": jnp.eye(3)}, jnp.ones((2, 3)))
    (rows,) = tables(split)
    assert rows[1] == ["0", "w", "w", "36 FLOP", "100.0%"]


def test_a_function_with_its_own_derivative_has_its_name():
    def mlp(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    params = {"a": jnp.eye(3), "b": jnp.eye(3)}
    _, crosses = tables(fpipe.split(mlp, params, jnp.ones((2, 3)), cuts=["b"]))
    assert crosses[1][0] == "relu"


@pytest.mark.parametrize("name", EXAMPLES)
def test_lines_have_100_columns(name):
    assert max(map(len, str(EXAMPLES[name]().split()).splitlines())) <= 100


def test_for_a_notebook_and_in_one_line():
    split = residual_mlp().split()
    assert repr(split) == "Split(_residual_mlp: 2 pieces)"
    assert split._repr_html_().count("<table>") == 2


def test_cells():
    assert numbers([3, 1, 2, 7, 5, 8, 3]) == "1-3, 5, 7-8"
    assert paths([]) == ""
    assert paths([""]) == "(all)"
    assert paths(["h/0/b", "h/0/w"]) == "h/0/(b w)"
    assert paths(["h/0", "h"]) == "h/0 h"
    long = [f"encoder/block/{n}/attention" for n in range(9)]
    assert paths(long) == "encoder/block/(0/attention 1/a…)"
