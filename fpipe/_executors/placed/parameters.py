"""Parameters and states put on the devices of their layers, and taken off them again.

In: one pytree for each layer. Out: the same pytrees, with each array where its layer
lives. On a mesh it is cut as the layer says:

    layer  lives on            is placed as
    0      cpu:0               {"w": f32[4,4] on cpu:0}
    1      mesh {"model": 2}   {"w": f32[4,4] over "model", by columns}

Over several processes each one has the arrays of its own devices alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding

from fpipe._core.errors import shown
from fpipe._core.makers import made_whole, shapes_made
from fpipe._core.meshes import no_mesh
from fpipe._core.processes import gather, is_ghost, whole_here
from fpipe._core.pytrees import PyTree, is_array, map_arrays, pack
from fpipe._executors.parameter_cuts import make_cut, param_shardings, sharding_at
from fpipe._executors.placement import Placement
from fpipe._executors.programs import Layout
from fpipe._model.stages import Leaf, Port


class Parameters:
    """Where the parameters of one pipe are.

    Arguments:
        layout: the stages, and where each is.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.stages = layout.stages

    def make(self, layer: int, make: Callable[[Any], PyTree], key: Any) -> PyTree:
        """Run `make(key)` where a layer lives."""
        own = self.stages[0].model.layers[layer]
        home = self.layout.home(layer)
        made = make_cut(own, f"layer {layer} {own.name!r}", make, key, home)
        if made is not None:
            return made
        made = self._make_at(layer, make, key)
        return self._at_home(layer, made, own=True)

    def make_state(self, layer: int, make: Callable[[Any], PyTree], key: Any) -> PyTree:
        """Run `make(key)` where a layer lives; over a mesh its state is whole on each
        device.
        """
        home = self.layout.home(layer)
        whole = functools.partial(made_whole, home.axes, make)
        made = self._make_at(layer, whole if home.is_here else make, key)
        # A user's `init_state` may return an array that the user keeps.
        return home.put_tree(made, own=True)

    def _make_at(self, layer: int, make: Callable[[Any], PyTree], key: Any) -> PyTree:
        """Run `make(key)` on the first device of a layer's place that is of this
        process; in a process that has no part of it, only its shapes are found.
        """
        home = self.layout.home(layer)
        if not home.is_here:
            return shapes_made(home.axes, make, key).shapes
        # Made there, and not made on the first device and moved: that device would need
        # room for every layer in turn. The default device does not move a committed
        # key, so the key is put there first.
        with no_mesh(), home.as_default():
            device = Placement.of(home.own_device)
            return make(None if key is None else device.take([key])[0])

    def place(self, params: Sequence[PyTree], donate: bool) -> tuple[PyTree, ...]:
        """The parameters of each layer on its device."""
        placed = []
        for k, tree in enumerate(params):
            # All processes come by here, layer by layer.
            own = map_arrays(whole_here, tree)
            self._refuse_ghosts(k, own)
            placed.append(self._at_home(k, own, own=not donate))
        return tuple(placed)

    def _refuse_ghosts(self, layer: int, params: PyTree) -> None:
        """Refuse arrays that another process has, and this one is to get: it would wait
        for a process that sends nothing.
        """
        if self.layout.home(layer).is_here and any(map(is_ghost, pack(params)[0])):
            name = self.stages[0].model.layers[layer].name
            raise ValueError(
                f"`place(params)`: params of layer {layer} {name!r} are in another "
                "process; gather them in all processes with the pipe that has placed "
                "them: `pipe.place(other.gather(params))`"
            )

    def _at_home(self, layer: int, params: PyTree, own: bool) -> PyTree:
        """The parameters of a layer where it lives, cut over its mesh as they say."""
        home = self.layout.home(layer)
        if home.mesh is None:
            return home.put_tree(params, own=own)
        return home.put_tree(params, own, self._layer_shardings(layer, params))

    def _layer_shardings(self, layer: int, params: PyTree) -> list[Sharding]:
        """How the parameters of a layer are put on its mesh."""
        own = self.stages[0].model.layers[layer]
        call = f"layer {layer} {own.name!r}"
        return param_shardings(own, call, params, self.layout.home(layer))

    def gather(self, tree: PyTree) -> Any:
        """The arrays of parameters or states on the first device of this process."""
        if self.layout.is_over_processes:
            arrays, spec = pack(tree)
            firsts = [first.device for first in self.layout.firsts]
            tree = spec.unpack(gather(arrays, firsts))
        return self.layout.first.put_tree(tree, own=True)

    def spread(
        self, gradients: Sequence[PyTree], params: Sequence[PyTree]
    ) -> tuple[PyTree, ...]:
        """The gradients of each layer on its device."""
        spread = []
        for k, tree in enumerate(gradients):
            arrays, treedef = jax.tree.flatten(tree)
            # `float0` has no place: JAX has no arrays of it.
            there = [n for n, a in enumerate(arrays) if a.dtype != jax.dtypes.float0]
            own = jax.tree.leaves(params[k])
            shardings = [own[n].sharding for n in there]
            put = self.layout.home(k).take([arrays[n] for n in there], shardings)
            for n, array in zip(there, put, strict=True):
                arrays[n] = array
            spread.append(treedef.unflatten(arrays))
        return tuple(spread)

    def check_placed(self, params: Sequence[PyTree]) -> None:
        """Every array of the parameters is on its layer's device."""
        for stage in self.stages:
            for k in stage.span:
                home = self.layout.home(k)
                layer = f"params of layer {k} {stage.model.layers[k].name!r}"
                for array in jax.tree.leaves(params[k]):
                    if not is_array(array):
                        raise TypeError(
                            f"{layer} hold {shown(array)}, no array; `params = "
                            "pipe.place(params)` makes arrays of numbers; bind other "
                            "constants to the layer's function (functools.partial)"
                        )
                    if isinstance(array, jax.ShapeDtypeStruct) or home.holds(array):
                        continue
                    where = f"the host ({type(array)})"
                    if isinstance(array, jax.Array):
                        where = ", ".join(map(str, array.devices()))
                    raise ValueError(
                        f"{layer} are on the wrong device: {where}, but stage "
                        f"{stage.index} is on {home}; put "
                        "them there with `params = pipe.place(params)`"
                    )

    def shardings(
        self, params: Sequence[PyTree]
    ) -> tuple[tuple[Leaf, NamedSharding], ...]:
        """How the parameters lie that are on meshes; a shape lies as `place` would put
        it.
        """
        if not self.layout.has_meshes:
            return ()
        found = []
        for k, tree in enumerate(params):
            home = self.layout.home(k)
            if home.mesh is None:
                continue
            arrays = jax.tree.leaves(tree)
            if any(isinstance(array, jax.ShapeDtypeStruct) for array in arrays):
                shardings = self._layer_shardings(k, tree)
            else:
                shardings = [
                    sharding_at(getattr(a, "sharding", None), np.shape(a), home)
                    for a in arrays
                ]
            for n, lies in enumerate(shardings):
                assert isinstance(lies, NamedSharding)
                found.append((Leaf(Port("params", k), n), lies))
        return tuple(found)
