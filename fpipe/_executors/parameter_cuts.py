"""How the parameters of a layer are cut over the mesh of its stage.

In: what a layer says (`Layer(spec=...)`), its parameters, and its placement. Out: a
sharding for each array. On a mesh data=2 x model=2, of a layer whose spec is
`{"up": P(None, "model"), "down": None}`:

    params["up"]    [8, 32]    P(None, "model")    8 x 16 numbers on each device
    params["down"]  [32, 8]    P()                 all of it on each device
"""

import functools

import jax
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from fpipe._core.pytrees import PyTree, describe
from fpipe._executors.placement import Placement
from fpipe._model.layer import Layer, is_spec


def param_shardings(
    layer: Layer, call: str, params: PyTree, place: Placement
) -> list[Sharding]:
    """How the parameters of a layer are put on a mesh: as its `spec` says; what it does
    not name as it is cut now, if the mesh has these axes too; else whole on each
    device.

    Arguments:
        call: names the layer, for errors.

    Raises:
        ValueError: the spec has another form than the parameters, names an axis that
            the mesh lacks, or does not divide an array.
    """
    assert place.mesh is not None
    try:
        specs = jax.tree.broadcast(layer.spec, params, is_leaf=is_spec)
    except ValueError as error:
        raise ValueError(
            f"{call}: its `spec` has another form than its parameters, "
            f"{describe(params)}"
        ) from error
    found: list[Sharding] = []
    leaves = jax.tree_util.tree_leaves_with_path(params)
    pairs = zip(leaves, jax.tree.leaves(specs, is_leaf=is_spec), strict=True)
    for (path, leaf), spec in pairs:
        if spec is None:
            found.append(
                sharding_at(getattr(leaf, "sharding", None), leaf.shape, place)
            )
            continue
        where = f"its `spec` {spec} of params{jax.tree_util.keystr(path)}"
        for name in axes_of(spec):
            if name not in place.mesh.axis_names:
                raise ValueError(
                    f"{call}: {where} names the axis {name!r}, but the mesh of its "
                    f"stage has {place.mesh.axis_names}"
                )
        if not _divides(place.cut_by(spec), leaf.shape):
            raise ValueError(
                f"{call}: {where} does not divide its shape {leaf.shape} over the mesh "
                f"{dict(place.mesh.shape)}"
            )
        found.append(place.cut_by(spec))
    return found


@functools.lru_cache(maxsize=4096)
def sharding_at(
    sharding: Sharding | None, shape: tuple[int, ...], place: Placement
) -> Sharding:
    """How an array lies on a mesh that keeps how it is cut, if it can."""
    if not isinstance(sharding, NamedSharding) or place.mesh is None:
        return place.sharding
    if not {*axes_of(sharding.spec)} <= {*place.mesh.axis_names}:
        return place.sharding
    cut = place.cut_by(sharding.spec)
    return cut if _divides(cut, shape) else place.sharding


def axes_of(spec: P) -> list[str]:
    """The axes that a spec names."""
    parts = [(part,) if isinstance(part, str) else part or () for part in spec]
    return [name for part in parts for name in part]


def _divides(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape can be cut so."""
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True
