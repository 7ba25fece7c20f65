"""How the parameters of a layer are cut over the mesh of its stage.

In: what a layer says (`Layer(spec=...)`), its parameters, and its placement. Out: a
sharding for each array. On a mesh data=2 x model=2, of a layer whose spec is
`{"up": P(None, "model"), "down": None}`:

    params["up"]    [8, 32]    P(None, "model")    8 x 16 numbers on each device
    params["down"]  [32, 8]    P()                 all of it on each device
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from fpipe._core.makers import shapes_made
from fpipe._core.meshes import no_mesh
from fpipe._core.pytrees import PyTree, describe, pack
from fpipe._executors.placement import Placement
from fpipe._model.layer import Layer
from fpipe._model.specs import annotated_specs, axes_in, spread_specs


def param_shardings(
    layer: Layer, call: str, params: PyTree, place: Placement
) -> list[Sharding]:
    """How the parameters of a layer are put on a mesh: as its `spec` says, or as they
    are annotated. Parameters that neither names keep the sharding that they have, if
    the mesh has these axes. All others are whole on each device.

    Arguments:
        call: names the layer, for errors.

    Raises:
        ValueError: the spec has another form than the parameters; a spec names an axis
            that the mesh lacks, or does not divide an array.
    """
    assert place.mesh is not None
    try:
        specs = spread_specs(layer.spec, params)
    except ValueError as error:
        raise ValueError(
            f"{call}: its `spec` has another form than its parameters, "
            f"{describe(params)}"
        ) from error
    found: list[Sharding] = []
    leaves = jax.tree_util.tree_leaves_with_path(params)
    annotated = annotated_specs(params)
    for (path, leaf), spec, said in zip(leaves, specs, annotated, strict=True):
        name = f"params{jax.tree_util.keystr(path)}"
        if spec is not None:
            where = f"{call}: its `spec` {spec} of {name}"
            found.append(cut_as_said(spec, leaf.shape, place, where))
        elif said is not None:
            where = f"{call}: the annotation {said} of {name}"
            found.append(cut_as_said(said, leaf.shape, place, where))
        else:
            own = getattr(leaf, "sharding", None)
            found.append(sharding_at(own, leaf.shape, place))
    return found


def make_cut(
    layer: Layer, call: str, make: Callable[[Any], PyTree], key: Any, place: Placement
) -> PyTree | None:
    """Run `make(key)`, which makes the parameters of a layer, so that each device of a
    mesh makes its own parts: no device ever has all of what is cut. All processes that
    have devices of the mesh make this call.

    Arguments:
        call: as for `param_shardings`.

    Returns:
        `None` if nothing is cut, if this process has no device of the mesh, or if
        `make` needs the numbers of its key and cannot be traced.
    """
    if place.mesh is None or not place.is_here:
        return None
    try:
        found = shapes_made(place.axes, make, key)
    except jax.errors.JAXTypeError:
        return None
    shapes, spec = pack(found.shapes)
    lie = param_shardings(layer, call, spec.unpack(shapes), place)
    # What asks for a mesh cannot run without one, and JAX gives one in a program alone.
    if not found.in_mesh and all(sharding == place.sharding for sharding in lie):
        return None
    own_key = None if key is None else place.take([key])[0]
    with no_mesh(), place.tracing() if found.in_mesh else contextlib.nullcontext():
        made = jax.jit(lambda key: pack(make(key))[0], out_shardings=lie)(own_key)
    return spec.unpack(made)


def cut_as_said(
    spec: P, shape: tuple[int, ...], place: Placement, where: str
) -> NamedSharding:
    """How an array lies on a mesh that a spec cuts.

    Arguments:
        where: the spec and its array, for errors.

    Raises:
        ValueError: the spec names an axis that the mesh lacks, or one twice; it has
            more entries than the array has axes, or does not divide it.
    """
    assert place.mesh is not None
    if P.UNCONSTRAINED in spec:
        raise ValueError(
            f"{where} leaves an axis unconstrained, but a parameter needs a fixed "
            "sharding: write `None`, or the name of an axis"
        )
    if len(spec) > len(shape):
        raise ValueError(
            f"{where} has {len(spec)} entries, but the array's `ndim` is {len(shape)}"
        )
    names = axes_of(spec)
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{where} names the axis {name!r} twice; it can shard one axis of the "
                "array"
            )
        if name not in place.mesh.axis_names:
            raise ValueError(
                f"{where} names the axis {name!r}, but the mesh of its stage has "
                f"{place.mesh.axis_names}"
            )
    lies = place.cut_by(spec)
    if not _divides(lies, shape):
        raise ValueError(
            f"{where} does not divide its shape {shape} over the mesh "
            f"{dict(place.mesh.shape)}"
        )
    return lies


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
    return [name for part in spec for name in axes_in(part)]


def _divides(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape can be cut so."""
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True
