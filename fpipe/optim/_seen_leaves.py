"""The leaves of a tree that a transformation sees, and what a state says of them.

A transformation sees the parameters as the layers know them, without those that cannot
be trained and those that are frozen. Of

    ({"w": float32[4, 4], "table": int32[4]}, {"w": float32[4, 4]})

with the second layer frozen, it sees `({"w": float32[4, 4], "table": MaskedNode()},
{"w": MaskedNode()})`, as `optax.masked` would show them.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import optax

from fpipe._core.errors import shown
from fpipe._core.pytrees import (
    PyTree,
    eval_shape,
    is_array,
    is_inexact,
    numbers_as_arrays,
    shapes_of,
)
from fpipe._model.frozen import Frozen, spread
from fpipe._split.stacks import is_row_blocks, joined

Path: TypeAlias = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class SeenLeaves:
    """Which leaves of a tree a transformation sees.

    Attributes:
        treedef: the structure of the tree.
        paths: of all leaves.
        is_seen: whether it sees each.
    """

    treedef: Any
    paths: tuple[Path, ...]
    is_seen: tuple[bool, ...]

    @classmethod
    def of(cls, tree: PyTree, frozen: Frozen | None) -> "SeenLeaves":
        """Of the unpacked parameters."""
        named, treedef = jax.tree_util.tree_flatten_with_path(tree)
        # Integers are not seen because optax would make moments of them, and their
        # gradients are `float0`, with which nothing can be computed.
        flags = [False] * len(named)
        if frozen is not None:
            flags = _frozen_flags(frozen, tree)
        is_seen = tuple(
            is_array(leaf) and is_inexact(leaf) and not flag
            for (_, leaf), flag in zip(named, flags, strict=True)
        )
        return cls(treedef, tuple(path for path, _ in named), is_seen)

    @property
    def seen_paths(self) -> list[Path]:
        """The paths of the leaves that it sees."""
        return self.select(self.paths)

    def select(self, leaves: Sequence[Any]) -> list[Any]:
        """The leaves that it sees, of all."""
        return [leaf for leaf, seen in zip(leaves, self.is_seen, strict=True) if seen]

    def select_gradients(self, gradients: PyTree) -> list[Any]:
        """The gradients of the leaves that it sees."""
        # `flatten_up_to` and not `flatten`: gradients of what is not seen may be
        # anything, such as `None`, which is no leaf of its own.
        try:
            leaves = self.treedef.flatten_up_to(gradients)
        except ValueError as error:
            raise ValueError(
                "`per_stage(tx).update`: the gradients have another structure than "
                f"the parameters ({error}); both are trees as `pipe.place` gives them"
            ) from error
        return self.select(leaves)

    def check_gradients(self, gradients: Sequence[Any]) -> None:
        """Refuse a leaf that is seen and has no gradient.

        Arguments:
            gradients: as `select_gradients` gives them.
        """
        for path, gradient in zip(self.seen_paths, gradients, strict=True):
            if is_array(gradient) and gradient.dtype != jax.dtypes.float0:
                continue
            raise ValueError(
                f"`per_stage(tx).update`: the parameter {leaf_name('params', path)} "
                "has no gradient: it is frozen in "
                "`pipe.value_and_grad(loss_fn, frozen=...)`, and here it is not; write "
                "`fpipe.optim.per_stage(tx, frozen=...)`, with the same `frozen`"
            )

    def seen_tree(self, leaves: Sequence[Any]) -> PyTree:
        """The tree that it sees, from the leaves that it sees."""
        # A `MaskedNode` has no leaves, so nothing is made for it, and the others keep
        # their paths: masks and labels may be made for the whole tree.
        rest = iter(leaves)
        return self.treedef.unflatten(
            [next(rest) if seen else optax.MaskedNode() for seen in self.is_seen]
        )

    def whole_tree(self, updates: Sequence[Any], leaves: Sequence[Any]) -> PyTree:
        """A tree of updates for all leaves, from those that it sees.

        Arguments:
            leaves: all parameters; only their dtypes matter.
        """
        rest = iter(updates)
        return self.treedef.unflatten(
            [
                next(rest) if seen else no_update(leaf)
                for seen, leaf in zip(self.is_seen, leaves, strict=True)
            ]
        )


def check_transformation(call: str, tx: Any) -> None:
    """Refuse what is no transformation of optax."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(
            f"`{call}`: an optax.GradientTransformation, such as `optax.adam(1e-3)`, "
            f"got {shown(tx)}"
        )


def check_donate(
    call: str, donate: str | Iterable[str], known: Sequence[str]
) -> tuple[str, ...]:
    """The names that `donate` has, all of them known."""
    if not isinstance(donate, Iterable):
        raise TypeError(
            f"`{call}(donate={shown(donate)})`: a list of some of "
            f"{', '.join(map(repr, known))}"
        )
    names = (donate,) if isinstance(donate, str) else tuple(donate)
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ValueError(
            f"`{call}(donate={shown(donate)})`: some of {', '.join(map(repr, known))}; "
            f"{shown(wrong[0])} is none"
        )
    return names


def _frozen_flags(frozen: Frozen, tree: PyTree) -> list[bool]:
    # A stacked leaf in blocks is one to the user.
    nodes = jax.tree.leaves(tree, is_leaf=is_row_blocks)
    counts = [len(node.blocks) if is_row_blocks(node) else 1 for node in nodes]
    try:
        flags = spread(frozen, joined(shapes_of(tree)))
        return [
            bool(flag)
            for flag, count in zip(flags, counts, strict=True)
            for _ in range(count)
        ]
    except ValueError as error:
        if callable(frozen):
            raise
        raise ValueError(
            "`per_stage(frozen=...)`: bools in the structure of the parameters, or of "
            "their first levels, are needed "
            f"({error}); the parameters are one entry per layer"
        ) from error


def no_update(leaf: Any) -> Any:
    """An update that changes nothing and takes no memory; `None` where there is no
    array.
    """
    if not is_array(leaf):
        return None
    # A numpy zero is told from a JAX array by `apply_updates`, which then hands the
    # parameter on; plain `optax.apply_updates` adds it. There is no zero of a PRNG key:
    # `float0` stands for it.
    plain = isinstance(leaf.dtype, np.dtype)
    return np.zeros((), leaf.dtype if plain else jax.dtypes.float0)


def leaf_name(tree: str, path: Path) -> str:
    """A leaf's name in an error, such as `state[0].mu['w']`."""
    return f"{tree}{jax.tree_util.keystr(path)}"


def parameters_of_state(paths: Sequence[Path], state: PyTree) -> list[int | None]:
    """For each leaf of a state the number of the parameter that it belongs to.

    optax keeps a moment of each parameter under the parameter's own path, after a path
    of its own: `[0].mu[1]['w']` is of `[1]['w']`. A leaf whose path ends with no
    parameter's path (the count of steps) belongs to none.
    """
    number = {path: n for n, path in enumerate(paths)}
    found = []
    for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]:
        # The longest end counts: of the parameters `[0]` and `[1][0]`, the moment
        # `.mu[1][0]` is of the second. A bare number in a chain, at `[1]`, is taken for
        # a part of the parameter `[1]`. That is no error: it only lies on that device.
        ends = (number.get(path[start:]) for start in range(len(path) + 1))
        found.append(next((n for n in ends if n is not None), None))
    return found


def check_state(
    tx: Any,
    params: PyTree,
    state: PyTree,
    fix: str,
    call: str = "per_stage(tx).update",
) -> None:
    """Refuse a state that is not what `init` gives for these parameters.

    Arguments:
        params: what the transformation sees of them, or the shapes of that.
        state: unpacked.
        fix: what to do, for the error.
        call: what was called, for the error.
    """
    want = eval_shape(lambda p: numbers_as_arrays(tx.init(p)), shapes_of(params))
    wanted_leaves, wanted_treedef = jax.tree_util.tree_flatten_with_path(want)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
    paths = [path for path, _ in leaves]
    wanted_paths = [path for path, _ in wanted_leaves]
    if paths != wanted_paths:
        wrong = [path for path in paths if path not in wanted_paths]
        wrong += [path for path in wanted_paths if path not in paths]
        name = leaf_name("state", wrong[0]) if wrong else "state"
        raise ValueError(
            f"`{call}`: {name}: the optimizer state is not of this transformation, "
            f"these parameters and `frozen`: {len(paths)} leaves, and `init(params)` "
            f"gives {len(wanted_paths)}; {fix}"
        )
    # Equal paths in nodes of another kind: a tuple for a list, or a named tuple of an
    # older release of optax.
    if treedef != wanted_treedef:
        raise ValueError(
            f"`{call}`: the optimizer state is {treedef}, and `init(params)` gives "
            f"{wanted_treedef}; {fix}"
        )
    # Dtypes may differ: the update is traced with those that the state has.
    for (path, leaf), (_, wanted) in zip(leaves, wanted_leaves, strict=True):
        if is_array(leaf) and leaf.shape != wanted.shape:
            raise ValueError(
                f"`{call}`: {leaf_name('state', path)} has the shape {leaf.shape}, and "
                f"`init(params)` gives {wanted.shape}: a state of other parameters; "
                f"{fix}"
            )
