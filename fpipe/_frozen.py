"""Which parameters are frozen: they get no gradient."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax

from fpipe._recent import Recent
from fpipe._tree import PyTree, is_array

# `frozen(path, array)`, or a pytree of bools that the parameters begin with.
Frozen: TypeAlias = Callable[[str, Any], bool] | PyTree


class FrozenLeaves:
    """The frozen arrays of parameters, found once for each structure.

    Arguments:
        frozen: `frozen(path, array)`, with a path as `jax.tree_util.keystr` writes it; or a pytree of bools that the parameters
            begin with, one entry per layer; or `None`.
    """

    def __init__(self, frozen: Frozen | None) -> None:
        self._frozen, self._found = frozen, Recent(8)

    def of(self, params: Any) -> frozenset[tuple[int, int]]:
        """Layer and number of each frozen array.

        Arguments:
            params: one entry per layer, or packed.
        """
        if self._frozen is None:
            return frozenset()
        shapes = getattr(getattr(params, "packing", None), "shapes", None)
        trees = tuple(params) if shapes is None else tuple(shape.tree for shape in shapes)
        leaves, structure = jax.tree.flatten(trees)
        key = structure, tuple((a.shape, a.dtype) if is_array(a) else a for a in leaves)
        return self._found.get(key, lambda: self._find(trees))

    def _find(self, trees: tuple[PyTree, ...]) -> frozenset[tuple[int, int]]:
        flags = iter(_flags(self._frozen, trees))
        out = set[tuple[int, int]]()
        for k, tree in enumerate(trees):
            own = [next(flags) for leaf in jax.tree.leaves(tree) if is_array(leaf)]
            out |= {(k, n) for n, flag in enumerate(own) if flag}
        return frozenset(out)


def _flags(frozen: Any, trees: tuple[PyTree, ...]) -> list[bool]:
    """A bool for each array."""
    with_paths = jax.tree_util.tree_leaves_with_path(trees)
    if callable(frozen):
        return [bool(frozen(jax.tree_util.keystr(path), a)) for path, a in with_paths if is_array(a)]
    try:
        spread = jax.tree.leaves(
            jax.tree.map(lambda flag, tree: jax.tree.map(lambda _: flag, tree), tuple(frozen), trees)
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`value_and_grad(frozen=...)`: a function of a path and an array, or a pytree of bools with one entry per layer "
            f"that the parameters begin with, got {frozen!r}: {error}"
        ) from None
    wrong = [flag for flag in spread if not isinstance(flag, bool)]
    if wrong:
        raise TypeError(f"`value_and_grad(frozen=...)`: bools are needed, got {wrong[0]!r}")
    return [flag for flag, (_, a) in zip(spread, with_paths, strict=True) if is_array(a)]
