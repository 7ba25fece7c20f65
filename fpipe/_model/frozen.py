"""Which parameters are frozen: they get no gradient.

Of the parameters `({"w": …, "b": …}, {"w": …})`, all of these say that layer 0 and no
other is frozen, which is found as `{Leaf(Port("params", 0), 0), …}`:

    lambda path, array: path.startswith("0/")       the paths are 0/b, 0/w and 1/w
    (True, False)
    ({"w": True, "b": True}, False)
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

from fpipe._core.caches import Recent
from fpipe._core.errors import shown
from fpipe._core.pytrees import PyTree, aval, is_array, path_of
from fpipe._model.stages import Leaf, Port

# `frozen(path, array)`, or a pytree of bools that the parameters begin with.
Frozen: TypeAlias = Callable[[str, Any], bool] | PyTree


class FrozenLeaves:
    """The frozen arrays of parameters, found once for each structure.

    Arguments:
        frozen: `frozen(path, array)`, with a path such as `0/w`; or a pytree of bools
            that the parameters begin with, one entry per layer; or `None`.
    """

    def __init__(self, frozen: Frozen | None) -> None:
        self._frozen = frozen
        self._found = Recent(8)

    def of(self, params: tuple[PyTree, ...]) -> frozenset[Leaf]:
        """The frozen arrays.

        Arguments:
            params: one entry per layer; shapes will do.
        """
        if self._frozen is None:
            return frozenset()
        # A user's function runs once for each structure and not in each call: a model
        # has hundreds of arrays, and a step should take microseconds on the host.
        leaves, structure = jax.tree.flatten(params)
        key = structure, tuple((a.shape, a.dtype) if is_array(a) else a for a in leaves)
        return self._found.get(key, lambda: self._find(params))

    def _find(self, params: tuple[PyTree, ...]) -> frozenset[Leaf]:
        # `_flags` counts the arrays of all layers in one row, a `Leaf` those of its
        # layer.
        flags = iter(_flags(self._frozen, params))
        found = set[Leaf]()
        for layer, tree in enumerate(params):
            arrays = [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]
            for number in range(len(arrays)):
                if next(flags):
                    found.add(Leaf(Port("params", layer), number))
        return frozenset(found)


def spread(frozen: Frozen, tree: PyTree) -> list[Any]:
    """What `frozen` says of each leaf of a tree: of a function's answers, or of the
    flags of a prefix.

    A function gets shapes: what it says is kept for all arrays of these.

    Raises:
        ValueError, TypeError: the tree does not begin with the prefix; the function
            reads paths of another form.
    """
    if callable(frozen):
        named = jax.tree_util.tree_leaves_with_path(tree)
        found = [
            is_array(a) and _answer(frozen, path_of(path), aval(a)) for path, a in named
        ]
        if not any(found):
            _refuse_bracketed_paths(frozen, named)
        return found
    # `jax.tree.map` takes the first tree for a prefix of the second: the part of the
    # tree below each flag gets that flag at every leaf.
    flags = jax.tree.map(
        lambda flag, part: jax.tree.map(lambda _: flag, part), frozen, tree
    )
    return jax.tree.leaves(flags)


def check_frozen(call: str, frozen: Any) -> None:
    """Refuse what is neither a function nor a tree of flags. `True` alone is one.

    Raises:
        TypeError: something else.
    """
    # What is in a tree is looked at beside the parameters, whose paths a message names.
    is_tree = not jax.tree_util.all_leaves([frozen])
    if not (is_tree or callable(frozen) or isinstance(frozen, (bool, np.bool_))):
        raise TypeError(
            f"`{call}(frozen={shown(frozen)})`: a function of a path and an array, or "
            "bools, one entry per layer"
        )


def _refuse_bracketed_paths(
    frozen: Callable[[str, Any], Any], named: list[tuple[Any, Any]]
) -> None:
    """Refuse a function that finds nothing by paths such as `0/w`, but something by
    `[0]['w']`: what JAX writes by default. Without an error nothing would be frozen.

    Raises:
        ValueError: it is one.
    """
    for path, a in named:
        if not is_array(a):
            continue
        bracketed = jax.tree_util.keystr(path)
        try:
            found = frozen(bracketed, aval(a))
        except Exception:
            return  # It reads paths of the right form, and these are none to it.
        if isinstance(found, (bool, np.bool_)) and found:
            raise ValueError(
                f"`frozen(path, array)`: it freezes {shown(bracketed)}, but that path "
                f'is written "{path_of(path)}", as by `jax.tree_util.keystr(path, '
                'simple=True, separator="/")`, so the function would freeze nothing'
            )


def _answer(frozen: Callable[[str, Any], Any], path: str, shape: Any) -> bool:
    """What a user's function says of one array."""
    answer = frozen(path, shape)
    if not isinstance(answer, (bool, np.bool_)):
        raise TypeError(
            f"`frozen(path, array)` returned {shown(answer)} for {path}: it returns "
            "True or False"
        )
    return bool(answer)


def _flags(frozen: Any, trees: tuple[PyTree, ...]) -> list[bool]:
    """A bool for each array of all layers in their order, from what the user gave.

    Raises:
        TypeError: something else than bools.
        ValueError: a pytree that the parameters do not begin with.
    """
    try:
        # Parameters are a tuple, and to JAX a list is another structure: a list of
        # flags should fit too.
        flags = spread(frozen if callable(frozen) else tuple(frozen), trees)
    except (TypeError, ValueError) as error:
        if callable(frozen):
            raise
        raise ValueError(
            "`value_and_grad(frozen=...)`: a function of a path and an array, or a "
            "pytree of bools with one entry per layer that the parameters begin with, "
            f"got {shown(frozen)}: {error}"
        ) from None
    wrong = [flag for flag in flags if not isinstance(flag, (bool, np.bool_))]
    if wrong:
        raise TypeError(
            f"`value_and_grad(frozen=...)`: bools are needed, got {shown(wrong[0])}"
        )
    return [
        flag
        for flag, a in zip(flags, jax.tree.leaves(trees), strict=True)
        if is_array(a)
    ]
