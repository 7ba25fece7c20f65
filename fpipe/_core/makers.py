"""What makes parameters and states, in a context without a mesh unless it asks for one.

In: a function of a key, and the axes that it may name. Out: the shapes of what it
makes, or what it makes. Over the axes model=2:

    makes                                              is traced
    jnp.zeros((8, 4))                                  without a mesh
    with_sharding_constraint(zeros, P("model"))        over model=2
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, SingleDeviceSharding

from fpipe._core.meshes import no_mesh, to_device
from fpipe._core.pytrees import PyTree, eval_shape, is_traced, pack


@dataclasses.dataclass(frozen=True)
class ShapesMade:
    """What makes parameters or a state, seen without running it.

    Attributes:
        shapes: of what it makes.
        in_mesh: whether it was traced over the axes of its stage.
    """

    shapes: PyTree
    in_mesh: bool


def shapes_made(
    axes: AbstractMesh | None, make: Callable[..., PyTree], *args: PyTree
) -> ShapesMade:
    """The shapes of what `make(*args)` makes.

    It sees no mesh, whatever the context has: by its annotations Flax would fix how an
    array lies, over a mesh that may have other devices than the layer's. What names
    axes itself, as a module does whose call is part of its `init`, is traced over those
    of its stage.

    Arguments:
        axes: of its stage; `None`: that has none.
    """
    with no_mesh():
        try:
            return ShapesMade(eval_shape(make, *args), in_mesh=False)
        # JAX raises the one without a mesh, and Flax's NNX the other. An error that has
        # nothing to do with a mesh comes again.
        except (RuntimeError, ValueError):
            if axes is None or axes.empty:
                raise
        with jax.sharding.use_abstract_mesh(axes):
            return ShapesMade(eval_shape(make, *args), in_mesh=True)


def made_whole(
    axes: AbstractMesh | None, make: Callable[[Any], PyTree], key: Any
) -> PyTree:
    """What `make(key)` makes, whole, on the device of the key.

    What names axes runs over axes of the same names that have one device each: every
    process can do that alone, also one without a device of the layer's stage.

    Arguments:
        axes: as for `shapes_made`.
    """
    found = None
    if axes is not None and not axes.empty:
        # What needs the numbers of its key cannot be traced, and names no axes.
        with contextlib.suppress(jax.errors.JAXTypeError, jax.errors.JAXIndexError):
            found = shapes_made(axes, make, key)
    with no_mesh():
        if axes is None or found is None or not found.in_mesh:
            return make(key)
        if is_traced(key):
            with jax.sharding.use_abstract_mesh(axes):
                return make(key)
        device, *_ = key.sharding.addressable_devices
        alone = AbstractMesh((1,) * len(axes.axis_names), axes.axis_names)
        lies = SingleDeviceSharding(device)
        # JAX gives a mesh in a program alone.
        with jax.sharding.use_abstract_mesh(alone):
            run = jax.jit(lambda key: pack(make(key))[0], out_shardings=lies)
            arrays = run(to_device([key], device)[0])
    return pack(found.shapes)[1].unpack(arrays)
