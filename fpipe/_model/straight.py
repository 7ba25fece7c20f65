"""Inputs of a model that go straight to the layers that read them.

In: a batch `x`, and which of its arrays later layers read. Out: `x` without these, and
a `StraightInputs` that has them, beside the call's side inputs. It takes the place of
`side`, for that goes straight to the layers that ask for it. Of a batch whose labels
the last layer reads

    x      {"tokens": tokens, "labels": labels}
    side   mask

there is made

    x      {"tokens": tokens, "labels": Elsewhere()}
    side   StraightInputs(side=mask, x={"tokens": Elsewhere(), "labels": labels})

Both keep the structure of the batch, and its wrappers: arrays keep their paths, by
which errors and plans name them, and are cut as the user says.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax

from fpipe._core.pytrees import PyTree, is_array, pack


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """Stands where an array was that goes another way. It has no leaves."""

    def tree_flatten(self) -> tuple[tuple[()], None]:
        """For JAX."""
        return (), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[()]) -> "Elsewhere":
        """For JAX."""
        del aux, children
        return cls()


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class StraightInputs:
    """What stands in the place of the side inputs of a call.

    Attributes:
        side: the user's side inputs.
        x: the batch, with `Elsewhere` in the place of what the first layer gets.
    """

    side: PyTree
    x: PyTree

    def tree_flatten(self) -> tuple[tuple[PyTree, PyTree], None]:
        """For JAX."""
        return (self.side, self.x), None

    @classmethod
    def tree_unflatten(
        cls, aux: None, children: tuple[PyTree, PyTree]
    ) -> "StraightInputs":
        """For JAX."""
        del aux
        return cls(*children)


def only(tree: PyTree, numbers: Collection[int]) -> PyTree:
    """A pytree with `Elsewhere` in the place of all other arrays.

    Arguments:
        numbers: of the arrays that stay, as the tree is flattened.
    """
    arrays, spec = pack(tree)
    return spec.unpack(
        [a if n in numbers else Elsewhere() for n, a in enumerate(arrays)]
    )


def arrays_in_place(tree: PyTree) -> dict[int, Any]:
    """The arrays of a pytree from which some were taken, by their numbers among all."""
    leaves = jax.tree.leaves(tree, is_leaf=_is_elsewhere)
    places = [leaf for leaf in leaves if is_array(leaf) or _is_elsewhere(leaf)]
    return {n: leaf for n, leaf in enumerate(places) if is_array(leaf)}


def user_side(side: PyTree) -> PyTree:
    """The user's part of what came as side inputs."""
    return side.side if isinstance(side, StraightInputs) else side


def straight_arrays(side: PyTree) -> dict[int, Any]:
    """The arrays of the batch that came as side inputs, by their numbers in it."""
    return arrays_in_place(side.x) if isinstance(side, StraightInputs) else {}


def rejoined(x: PyTree, side: PyTree) -> PyTree:
    """The batch as the user has it, from both parts; what is in both is taken from the
    side inputs.
    """
    if not isinstance(side, StraightInputs):
        return x
    return jax.tree.map(
        lambda rest, straight: rest if _is_elsewhere(straight) else straight,
        x,
        side.x,
        is_leaf=_is_elsewhere,
    )


def _is_elsewhere(leaf: Any) -> bool:
    return isinstance(leaf, Elsewhere)


def names_of(name: str, tree: PyTree) -> Sequence[tuple[str, PyTree]]:
    """What an input of a call consists of, each part with the name by which a user
    knows it.
    """
    if isinstance(tree, StraightInputs):
        return (name, tree.side), ("x", tree.x)
    return ((name, tree),)
