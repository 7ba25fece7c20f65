"""How the arrays of a pytree are cut over a mesh, as users say it.

In: a spec, or a tree of specs in the form of another tree or of its upper part; or
boxes around arrays that say it, as Flax makes them. Out: a spec for each leaf, in the
order of `jax.tree.leaves`. Of the tree `{"w": {"q": a, "k": b}, "bias": c}`

    {"w": P("model"), "bias": None}                [None, P("model"), P("model")]
    {"w": {"q": Partitioned(a, ("model",)), …      [None, None, P("model")]

`None` is what nothing says anything of: an array then lies as it comes.
"""

import sys
from collections.abc import Collection, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from fpipe._core.pytrees import PyTree

WHOLE = PartitionSpec()
"""The spec of an array that is whole on each device."""


def is_spec(value: Any) -> bool:
    """Whether a value is a leaf of a tree of specs, and not a tree of such."""
    return value is None or isinstance(value, PartitionSpec)


def spread_specs(specs: PyTree, tree: PyTree) -> list[PartitionSpec | None]:
    """The spec of each leaf of a tree.

    Arguments:
        specs: a spec, or a tree of them in the form of `tree` or of its upper part.

    Raises:
        ValueError: it has another form.
    """
    found: list[PartitionSpec | None] = []

    def spread(spec: PartitionSpec | None, part: PyTree) -> None:
        found.extend([spec] * len(jax.tree.leaves(part)))

    jax.tree.map(spread, specs, tree, is_leaf=is_spec)
    return found


def annotated_specs(tree: PyTree) -> list[PartitionSpec | None]:
    """What boxes around the leaves of a tree say: linen's `Partitioned`, and variables
    of NNX with `out_sharding`.
    """
    found: list[PartitionSpec | None] = []
    for part in jax.tree.leaves(tree, is_leaf=lambda node: _said(node) is not None):
        found.extend([_said(part)] * len(jax.tree.leaves(part)))
    return found


def _said(node: Any) -> PartitionSpec | None:
    """What a box says of the array in it."""
    # By their methods, not their types: Flax need not be installed.
    ask = getattr(node, "get_partition_spec", None)
    if callable(ask):
        spec = ask()
        return _translated(spec, node) if isinstance(spec, PartitionSpec) else None
    ask = getattr(node, "get_metadata", None)
    if not callable(ask):
        return None
    metadata: Any = ask()
    said = metadata.get("out_sharding") if isinstance(metadata, dict) else None
    if isinstance(said, NamedSharding):
        said = said.spec
    if not isinstance(said, (tuple, PartitionSpec)):
        return None
    rules = dict(metadata.get("sharding_rules") or ())
    return PartitionSpec(*[rules.get(name, name) for name in said])


def _translated(spec: PartitionSpec, box: Any) -> PartitionSpec:
    """Logical names of Flax as axes of a mesh: by the rules of their box, or those of
    `nn.logical_axis_rules` around the call. Without rules they stay names.
    """
    # Flax's own function. The module of a box is loaded, and Flax need not be
    # installed.
    module: Any = sys.modules.get(type(box).__module__)
    translate = getattr(module, "logical_to_mesh_axes", None)
    if translate is None:
        return spec
    rules = getattr(box, "rules", None) or module.get_logical_axis_rules()
    return translate(spec, rules) if rules else spec


def axes_in(part: Any) -> tuple[str, ...]:
    """The axes that an entry of a spec names."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def spec_without_axis(
    spec: PartitionSpec, shape: Sequence[int], left: Sequence[int]
) -> PartitionSpec:
    """How an array is cut that lacks one axis of another array, as factored moments do
    (Adafactor). If two axes are equally long, it is not known which one is missing:
    then it is whole, unless it is cut in one way whichever is.

    Arguments:
        spec: of the other array.
        shape: of the other array.
        left: the shape of the array.
    """
    parts = [*spec, *[None] * (len(shape) - len(spec))]
    found = {
        without_axes(PartitionSpec(*parts[:n], *parts[n + 1 :]), ())
        for n in range(len(shape))
        if (*shape[:n], *shape[n + 1 :]) == tuple(left)
    }
    return found.pop() if len(found) == 1 else WHOLE


def without_axes(spec: PartitionSpec, axes: Collection[str]) -> PartitionSpec:
    """A spec that names some axes no more, in the one form that JAX has for it."""
    parts = [
        _part(tuple(name for name in axes_in(part) if name not in axes))
        for part in spec
    ]
    while parts and parts[-1] is None:  # JAX takes `P("a")` and `P("a", None)`
        parts.pop()  # for two
    return PartitionSpec(*parts)


def _part(names: tuple[str, ...]) -> Any:
    """The entry of a spec that names some axes, as JAX writes it."""
    return names if len(names) > 1 else next(iter(names), None)
