"""Borrowed parameters: parts of a module's parameters that another layer owns."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from fpipe._core.pytrees import PyTree, describe

Path = tuple[Any, ...]


class Borrow(NamedTuple):
    """One borrowed part.

    Attributes:
        path: where it belongs in the module's parameters; `()`: it is all of them.
        layer: the name of the layer that owns it.
        source: where it is in that layer's parameters.
    """

    path: Path
    layer: str
    source: Path

    @property
    def what(self) -> str:
        """What is borrowed, for errors."""
        return repr("/".join(map(str, self.path))) if self.path else "its parameters"

    @property
    def owner(self) -> str:
        """As the user wrote it."""
        return "/".join(map(str, (self.layer, *self.source)))

    def lent(self, borrowed: Mapping[str, PyTree]) -> PyTree:
        """What the owner has there; `None` if nothing."""
        tree = borrowed[self.layer]
        return find(tree, numbered(tree, self.source))


def borrows(borrow: Mapping[str, str] | None, who: str) -> tuple[Borrow, ...]:
    """The borrowed parts from `{"path/in/the/module": "layer/path/in/its/parameters"}`."""
    if borrow is None:
        return ()
    if not isinstance(borrow, Mapping) or not all(
        isinstance(s, str) for pair in borrow.items() for s in pair
    ):
        raise TypeError(
            f"{who}: borrow= is a dict from names in the module's parameters to names "
            f"of layers, got {borrow!r}; to "
            "borrow all of them use `fpipe.flax.tied(module, owner)`"
        )
    out = []
    for path, owner in borrow.items():
        layer, *source = owner.split("/")
        out.append(Borrow(tuple(path.split("/")) if path else (), layer, tuple(source)))
    return tuple(out)


def owners(parts: Sequence[Borrow]) -> tuple[str, ...]:
    """The layers that are borrowed from, each once."""
    return tuple(dict.fromkeys(part.layer for part in parts))


def find(tree: PyTree, path: Path) -> PyTree:
    """What is at a path of nested dicts; `None` if nothing is."""
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree


def numbered(tree: PyTree, path: Path) -> Path:
    """A path with numbers where the dicts have numbers, as NNX names what is in a list."""
    out = list[Any]()
    for name in path:
        here = find(tree, tuple(out))
        number = isinstance(here, Mapping) and name not in here and str(name).isdigit()
        out.append(int(name) if number else name)
    return tuple(out)


def without(tree: PyTree, path: Path) -> PyTree:
    """Nested dicts without what is at a path; a dict that it leaves empty goes too."""
    if not path:
        return {}
    rest = {name: value for name, value in tree.items() if name != path[0]}
    if path[0] in tree and len(path) > 1:
        inner = without(tree[path[0]], path[1:])
        rest |= {path[0]: inner} if inner else {}
    return rest


def with_value(tree: PyTree, path: Path, value: PyTree) -> PyTree:
    """Nested dicts with a value at a path."""
    if not path:
        return value
    return {**tree, path[0]: with_value(tree.get(path[0], {}), path[1:], value)}


def lend(
    parts: Sequence[Borrow], params: PyTree, borrowed: Mapping[str, PyTree]
) -> PyTree:
    """The module's own parameters and the borrowed ones together."""
    for part in parts:
        lent = part.lent(borrowed)
        if lent is not None:
            params = with_value(params, part.path, lent)
    return params


def keep_own(parts: Sequence[Borrow], params: PyTree) -> PyTree:
    """The parameters that the layer owns."""
    for part in parts:
        params = without(params, part.path)
    return params


def check_fit(
    parts: Sequence[Borrow], name: str, needed: PyTree, borrowed: Mapping[str, PyTree]
) -> None:
    """Compare borrowed parameters with what the module needs; the owner may have more.

    Raises:
        ValueError: there is nothing there, something is missing, or has another shape.
    """
    for part in parts:
        want, got = find(needed, part.path), part.lent(borrowed)
        if want is None:
            raise ValueError(
                f"layer {name!r} borrows {part.what} from layer {part.owner!r}, but "
                "its module has no such parameters, only "
                f"{describe(needed)}"
            )
        if not _fits(want, got):
            raise misfit([part], name, borrowed, f"its module needs {describe(want)}")


def misfit(
    parts: Sequence[Borrow], name: str, borrowed: Mapping[str, PyTree], why: str
) -> ValueError:
    """The error of borrowed parameters that a module cannot use."""
    return ValueError(
        "; ".join(
            f"layer {name!r} borrows {part.what} from layer {part.owner!r}, but the "
            "owner has "
            f"{describe(part.lent(borrowed))}, which does not fit: {why}"
            for part in parts
        )
    )


def _fits(want: PyTree, got: PyTree) -> bool:
    leaves = dict(jax.tree_util.tree_leaves_with_path(got))
    return all(
        path in leaves and leaves[path].shape == leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(want)
    )
