"""The arguments of `fpipe.split`, checked.

In: what a user gave, for example

    fpipe.split(apply, params, x, train=True, cuts=["decoder"])

Out: the function as a `Layer` with its needs, and the paths as a tuple of strings. An
argument that does not fit the others is an error, which names it.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from fpipe._core.errors import noting, shown
from fpipe._core.pytrees import PyTree, describe, is_array
from fpipe._model.layer import Layer, as_layer
from fpipe._model.needs import BY_NAME, OF_FUNCTION
from fpipe._split.trace import Function, Kind, trace_function


def as_function(fn: Any, state: PyTree) -> Layer:
    """The function that is split, as a layer.

    Arguments:
        state: the example of its state, or `None`.

    Raises:
        TypeError: it is no function, or one that cannot be split; or it asks for a
            state and there is no example, or the reverse.
    """
    if not callable(fn) and not isinstance(fn, Layer):
        raise TypeError(
            f"`fpipe.split(fn)`: fn is a function `fn(params, x)`, got {shown(fn)}; "
            "layers, or a split, are for `fpipe.Pipe`"
        )
    with noting(
        "`fpipe.split(fn)` takes a function of its parameters, such as `module.apply` "
        "of a linen module, or one that merges a module of NNX or Equinox"
    ):
        layer = as_layer(fn)
    refused = [name for name in layer.needs or () if name not in OF_FUNCTION]
    if refused:
        raise TypeError(
            f"`fpipe.split(fn)`: {layer.name!r} asks for {', '.join(refused)}, and a "
            f"function that is split can only have the needs {', '.join(OF_FUNCTION)}"
        )
    if layer.finish or layer.overwrite:
        raise TypeError(
            f"`fpipe.split(layer)`: {layer.name!r} declares finish or overwrite, which "
            "a function that is split cannot have: give `fpipe.Pipe` the layers "
            "themselves"
        )
    if layer.asks("state") != (state is not None):
        what = "asks for its" if state is None else "asks for no"
        raise TypeError(
            f"`fpipe.split(fn, state=...)`: {layer.name!r} {what} state; the parameter "
            "`state` and an example of it, or its shapes, belong together"
        )
    return layer


def check_example(layer: Layer, x: PyTree, needs: Mapping[str, Any]) -> None:
    """Refuse an example that no call can look like.

    Raises:
        TypeError: `x` has no array.
        ValueError: a need is given for which the function does not ask.
    """
    if not any(map(is_array, jax.tree.leaves(x))):
        raise TypeError(
            "`fpipe.split(fn, params, x)`: x is an example of a microbatch, or its "
            f"shapes, got {describe(x)}, which has no array"
        )
    for name, given in needs.items():
        if given is not BY_NAME[name].missing and not layer.asks(name):
            raise ValueError(
                f"`fpipe.split(fn, {name}=...)`: {layer.name!r} does not ask for it: "
                f"make it a keyword-only parameter, `def {layer.name}(params, x, *, "
                f"{name})`, or write `fpipe.Layer(fn, needs=[{name!r}])`"
            )


def as_paths(cuts: Any) -> tuple[str, ...]:
    """Paths of parameters, checked."""
    listed = isinstance(cuts, Iterable) and not isinstance(cuts, (str, Mapping))
    given = list(cuts) if listed else []
    paths = tuple(path for path in given if isinstance(path, str))
    if not listed or len(paths) < len(given):
        raise TypeError(
            f"`fpipe.split(cuts={shown(cuts)})`: a list of paths of parameters, "
            'such as ["decoder"]'
        )
    return paths


def check_rows(function: Function, once: Kind, twice: Kind) -> None:
    """Check that a state of rows is declared, and has as many rows as the microbatch.

    Arguments:
        once, twice: the microbatch, and one of twice the rows.
    """
    if function.rows is None or not function.state.leaves:
        return
    rows = function.rows.count(once.x)
    leaves = function.state.leaves
    follows = [a.shape[:1] == (rows,) for a in leaves]
    if function.layer.state_rows and not all(follows):
        n = follows.index(False)
        raise ValueError(
            f"`fpipe.split(layer, state=...)`: the state {function.state_paths[n]!r} "
            f"is {describe(leaves[n])}, but x has {rows} rows, and a state of rows "
            "(`Layer(state_rows=True)`) has as many on its first axis"
        )
    if function.layer.state_rows is not None or not any(follows):
        return
    # 64 entries may be rows or channels. A trace with another number of rows tells: if
    # the function takes that many entries, they are rows.
    more = tuple(
        a.update(shape=(2 * rows, *a.shape[1:])) if own else a
        for own, a in zip(follows, leaves, strict=True)
    )
    state = dataclasses.replace(function.state, leaves=more)
    try:
        traced = trace_function(dataclasses.replace(function, state=state), twice)
    except Exception:
        return
    read = {v for node in traced.live for v in node.ins}
    pairs = zip(traced.state_roots, traced.state, strict=True)
    read_leaves = {rows.leaf for rows, v in pairs if v in read}
    found = [n for n, own in enumerate(follows) if own and n in read_leaves]
    if not found:
        return
    path = function.state_paths[found[0]]
    raise ValueError(
        f"`fpipe.split(fn, state=...)`: the state follows the rows: {path!r} has an "
        f"entry for each of the {rows} rows of x, and all microbatches would share "
        "them: split `fpipe.Layer(fn, state_rows=True)`, and each microbatch gets "
        "those of its own rows (`state_rows=False`: they are meant to share them)"
    )
