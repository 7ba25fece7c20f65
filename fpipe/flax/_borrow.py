"""Borrowed parameters: parts of a module's parameters that another layer owns.

A user writes `borrow={"embed": "tokens/table"}`. The module then uses the parameters
under `table` of the layer `"tokens"` in place of its own `embed`. That is

    Borrow(path=("embed",), layer="tokens", source=("table",))

The layer's own parameters are `{"out": w}`, and the owner has `{"table": t, "scale":
s}`. So the module is called with `{"out": w, "embed": t}`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax

from fpipe._core.errors import shown
from fpipe._core.pytrees import PyTree, describe

# A path in nested dicts. NNX uses numbers for the entries of a list.
Path: TypeAlias = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Borrow:
    """One borrowed part.

    Attributes:
        path: its place in the module's parameters; `()` for all of them.
        layer: the name of the layer that owns it.
        source: its place in that layer's parameters.
    """

    path: Path
    layer: str
    source: Path

    def lent(self, borrowed: Mapping[str, PyTree]) -> PyTree:
        """What the owner has there; `None` if nothing."""
        tree = borrowed[self.layer]
        # Only here it is known whether the owner is a linen or an NNX module.
        return find(tree, with_numbers(tree, self.source))

    @property
    def title(self) -> str:
        """What is borrowed, for errors: 'embed', or "its parameters" for all."""
        return repr("/".join(map(str, self.path))) if self.path else "its parameters"

    @property
    def owner(self) -> str:
        """Layer and source as the user wrote them."""
        return "/".join(map(str, (self.layer, *self.source)))


def parse_borrow(borrow: Mapping[str, str] | None, call: str) -> tuple[Borrow, ...]:
    """The borrowed parts from `{"path/in/the/module": "layer/path/in/its/params"}`."""
    if borrow is None:
        return ()
    if not isinstance(borrow, Mapping) or not all(
        isinstance(name, str) for pair in borrow.items() for name in pair
    ):
        raise TypeError(
            f"{call}: borrow= is a dict from names in the module's parameters to names "
            f"of layers, got {shown(borrow)}; to borrow all of them use "
            "`fpipe.flax.tied(module, owner)`"
        )
    parts = []
    for path, owner in borrow.items():
        layer, *source = owner.split("/")
        names = tuple(path.split("/")) if path else ()
        parts.append(Borrow(names, layer, tuple(source)))
    return tuple(parts)


def find(tree: PyTree, path: Path) -> PyTree:
    """What is at a path of nested dicts; `None` if nothing is."""
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree


def with_numbers(tree: PyTree, path: Path) -> Path:
    """A path with numbers where the dicts have numbers, as NNX names what is in a
    list.
    """
    result: list[Any] = []
    for name in path:
        # A user writes "blocks/0/w". NNX keeps the blocks of a list under the number 0,
        # linen under names such as "blocks_0": a number is meant only where no such
        # name is.
        here = find(tree, tuple(result))
        is_number = isinstance(here, Mapping) and name not in here
        is_number = is_number and str(name).isdigit()
        result.append(int(name) if is_number else name)
    return tuple(result)


def without(tree: PyTree, path: Path) -> PyTree:
    """Nested dicts without what is at a path; a dict that it leaves empty goes too."""
    if not path:
        return {}
    first, *rest = path
    # New dicts along the path, as the given ones belong to the caller.
    kept = {name: value for name, value in tree.items() if name != first}
    if first in tree and rest:
        inner = without(tree[first], tuple(rest))
        if inner:
            kept[first] = inner
    return kept


def with_value(tree: PyTree, path: Path, value: PyTree) -> PyTree:
    """Nested dicts with a value at a path."""
    if not path:
        return value
    first, *rest = path
    return {**tree, first: with_value(tree.get(first, {}), tuple(rest), value)}


def lend(
    parts: Sequence[Borrow], params: PyTree, borrowed: Mapping[str, PyTree]
) -> PyTree:
    """The module's own parameters and the borrowed ones together."""
    for part in parts:
        value = part.lent(borrowed)
        # Where the owner has nothing the module says what it misses, or `check_fit`.
        if value is not None:
            params = with_value(params, part.path, value)
    return params


def keep_own(parts: Sequence[Borrow], params: PyTree) -> PyTree:
    """The parameters that the layer owns: the inverse of `lend`."""
    for part in parts:
        params = without(params, part.path)
    return params


def check_fit(
    parts: Sequence[Borrow], name: str, needed: PyTree, borrowed: Mapping[str, PyTree]
) -> None:
    """Compare borrowed parameters with what the module needs; the owner may have more.

    Arguments:
        name: of the layer that borrows.
        needed: the module's parameters, or their shapes.
        borrowed: what the owners have, by their names.

    Raises:
        ValueError: there is nothing there, something is missing, or has another shape.
    """
    for part in parts:
        wanted = find(needed, part.path)
        if wanted is None:
            raise ValueError(
                f"layer {name!r} borrows {part.title} from layer {part.owner!r}, but "
                f"its module has no such parameters, only {describe(needed)}"
            )
        # Leaf by leaf and not as whole structures: an owner may have more than is used,
        # such as a bias beside the table.
        there = dict(jax.tree_util.tree_leaves_with_path(part.lent(borrowed)))
        fits = all(
            path in there and there[path].shape == leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(wanted)
        )
        if not fits:
            raise misfit([part], name, borrowed, f"its module needs {describe(wanted)}")


def misfit(
    parts: Sequence[Borrow], name: str, borrowed: Mapping[str, PyTree], why: str
) -> ValueError:
    """The error of borrowed parameters that a module cannot use."""
    return ValueError(
        "; ".join(
            f"layer {name!r} borrows {part.title} from layer {part.owner!r}, but the "
            f"owner has {describe(part.lent(borrowed))}, which does not fit: {why}"
            for part in parts
        )
    )
