"""Parameters put on the mesh and taken off it again.

In: one pytree for each layer. Out: `Packed`, arrays over the mesh (see `packing.py`),
and back. Two layers on two devices:

    place     ({"w": f32[3,3]}, {"w": f32[3,3]})  ->  Packed(0['w']: float32[2,3,3])
    gather    the same back

`place` runs on each process for the devices that it has. `gather` is one program, which
the whole mesh runs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fpipe._core.caches import Key, Recent
from fpipe._core.makers import made_whole, shapes_made
from fpipe._core.meshes import is_explicit, no_mesh
from fpipe._core.processes import host_copy
from fpipe._core.pytrees import (
    PyTree,
    Shape,
    Tracer,
    copied,
    float0_like,
    is_traced,
    pack,
)
from fpipe._executors.parameter_cuts import axes_of, make_cut, param_shardings
from fpipe._executors.placement import Placement, sub_meshes
from fpipe._executors.scan.mesh import by_stage, on_device, replicated
from fpipe._executors.scan.packing import Entry, Packed, Packing, Row
from fpipe._executors.scan.units import Units, cut_units
from fpipe._executors.stage_places import AXIS, columns
from fpipe._model.model import Model
from fpipe._model.specs import without_axes
from fpipe.schedules._checks import counted

# Packings, and programs that unpack, that one pipe keeps.
_KEPT = 32


class Parameters:
    """Where the parameters of one pipe are.

    Arguments:
        balance: layers of each stage.
        stage_to_device: the place of each stage on the mesh's axis of stages.
    """

    def __init__(
        self,
        model: Model,
        balance: Sequence[int],
        stage_to_device: Sequence[int],
        mesh: Mesh,
    ) -> None:
        self.mesh = mesh
        self._model = model
        self._balance = tuple(balance)
        self._stage_to_device = tuple(stage_to_device)
        # A pipe is made before its parameters, and may be called with parameters of
        # other shapes later. So units and packings are made when they are asked for.
        self._kept = Recent(_KEPT)
        # The devices of each place, and of each layer, that this process has.
        process = jax.process_index()
        self._columns = [
            [device for device in column if device.process_index == process]
            for column in columns(mesh)
        ]
        # For each place the mesh of its other axes, over which parameters may be cut.
        self.places = [Placement.of(place) for place in sub_meshes(mesh, AXIS)]
        self._place_of: list[int] = []
        for layers, place in zip(self._balance, self._stage_to_device, strict=True):
            self._place_of += [place] * layers
        self._devices_of = [self._columns[place] for place in self._place_of]

    def packing(
        self, shapes: Sequence[Shape], specs: Mapping[Entry, P]
    ) -> tuple[Units, Packing]:
        """How parameters of these shapes are cut into units and packed.

        Arguments:
            specs: of those that are cut over axes of the mesh beside that of stages.
        """
        shapes = tuple(shapes)

        def make() -> tuple[Units, Packing]:
            cuts: list[list[tuple[int, P]]] = [[] for _ in shapes]
            for (layer, n), spec in specs.items():
                cuts[layer].append((n, spec))
            units = cut_units(
                self._model,
                self._balance,
                self._stage_to_device,
                shapes,
                [tuple(sorted(cut, key=lambda own: own[0])) for cut in cuts],
            )
            return units, Packing.of(units, shapes, specs)

        return self._kept.get(Key((shapes, frozenset(specs.items()))), make)

    def shapes(self, params: Sequence[PyTree]) -> Packed:
        """What `place` would give, as shapes; parameters are arrays or their shapes."""
        packing = self._packing_of(params)
        return Packed(
            tuple(
                jax.ShapeDtypeStruct(
                    (len(self._columns), *row.shape),
                    row.dtype,
                    sharding=by_stage(self.mesh, row.spec),
                )
                for row in packing.rows
            ),
            packing,
        )

    def _packing_of(self, params: Sequence[PyTree]) -> Packing:
        """How given parameters are packed."""
        specs: dict[Entry, P] = {}
        for k, own in enumerate(params):
            home = self.places[self._place_of[k]]
            if home.mesh is None:
                continue
            layer = self._model.layers[k]
            lie = param_shardings(layer, f"layer {k} {layer.name!r}", own, home)
            # JAX writes no axis of one device in a spec.
            alone = [name for name, size in home.mesh.shape.items() if size == 1]
            for n, sharding in enumerate(lie):
                assert isinstance(sharding, NamedSharding)
                spec = without_axes(sharding.spec, alone)
                if spec:
                    specs[k, n] = spec
        return self.packing([Shape.of(own) for own in params], specs)[1]

    def make_state(self, layer: int, f: Callable[[Any], PyTree], key: Any) -> PyTree:
        """Run `f(key)` where a layer belongs. A process that has no part of the layer
        runs it too, on its default device: a call takes all states, whole.
        """
        device = next(iter(self._devices_of[layer]), None)
        axes = self.places[self._place_of[layer]].axes
        with no_mesh(), jax.default_device(device):
            own_key = key if device is None else on_device(key, device)
            made = made_whole(axes, f, own_key)
            # A user's `init_state` may return an array that the user keeps.
            return copied(made)

    def make(self, layer: int, f: Callable[[Any], PyTree], key: Any) -> PyTree:
        """Run `f(key)` where a layer belongs; where this process has no part of it,
        only its shapes.
        """
        here = self._devices_of[layer]
        home = self.places[self._place_of[layer]]
        if not here:
            return shapes_made(home.axes, f, key).shapes
        own = self._model.layers[layer]
        cut = make_cut(own, f"layer {layer} {own.name!r}", f, key, home)
        if cut is not None:
            return cut
        with no_mesh(), jax.default_device(here[0]):
            return f(None if key is None else on_device(key, here[0]))

    def place(self, params: Sequence[PyTree]) -> Packed:
        """Every device its own stages' parameters, and no others.

        Inside a trace too: then XLA moves them. Outside, the blocks of each place are
        made there and joined to arrays over the mesh. To stack all of them first would
        need a device that holds the whole model.
        """
        packing = self._packing_of(params)
        if is_traced(params):
            rows = packing.pack(params)
            placed = [
                a if row.is_empty else jax.lax.with_sharding_constraint(a, lies)
                for row, a, lies in zip(
                    packing.rows, rows, self.shardings(packing), strict=True
                )
            ]
            return Packed(tuple(placed), packing)
        # Arrays that a trace has from outside are placed outside of it.
        with jax.ensure_compile_time_eval():
            return self._joined(params, packing)

    def _joined(self, params: Sequence[PyTree], packing: Packing) -> Packed:
        """The blocks of each place, made there and joined to arrays over the mesh."""
        shards: list[list[Any]] = [[] for _ in packing.rows]
        lie = self.shardings(packing)
        leaves = [pack(own)[0] for own in params]
        if self.mesh.is_multi_process:
            # All processes come by here. On the host there is room for all layers. But
            # what lies as it is to lie was made in parts, and stays in parts.
            leaves = [
                [
                    a if self._lies_there(a, packing, (k, n)) else host_copy(a)
                    for n, a in enumerate(own)
                ]
                for k, own in enumerate(leaves)
            ]
        for place, devices in enumerate(self._columns):
            # Each process makes the blocks of its own devices. It may have arrays for
            # their layers alone: of the others `make` returns shapes.
            if not devices:
                continue
            for row, shard, sharding in zip(packing.rows, shards, lie, strict=True):
                if row.is_empty:
                    continue
                entry = row.entries[place]
                array = None if entry is None else leaves[entry[0]][entry[1]]
                if row.spec:
                    shard += self._parts(row, array, devices, sharding)
                else:
                    # The block is made on the first device: the others get copies.
                    block = _block(row, array, devices[0])[None]
                    shard += [jax.device_put(block, device) for device in devices]
        arrays = []
        for row, shard, sharding in zip(packing.rows, shards, lie, strict=True):
            shape = (len(self._columns), *row.shape)
            arrays.append(
                np.zeros(shape, row.dtype)
                if row.is_empty
                else jax.make_array_from_single_device_arrays(shape, sharding, shard)
            )
        return Packed(tuple(arrays), packing)

    def _lies_there(self, array: Any, packing: Packing, entry: Entry) -> bool:
        """Whether an array is cut over the devices of its place as its row is."""
        place = self.places[packing.where[entry].device]
        spec = packing.specs.get(entry)
        if spec is None or place.mesh is None or not isinstance(array, jax.Array):
            return False
        return array.sharding == place.cut_by(spec)

    def _parts(
        self, row: Row, array: Any, devices: Sequence[Any], sharding: NamedSharding
    ) -> list[Any]:
        """What each device has of a row that is cut: no device ever has all of it.

        Arguments:
            array: that of the row which these devices have; `None`: zeros stand there.
        """
        shape = (len(self._columns), *row.shape)
        indices = sharding.addressable_devices_indices_map(shape)
        parts = []
        for device in devices:
            index = indices[device]
            assert index is not None
            if array is None:
                with jax.default_device(device):
                    parts.append(jnp.zeros(sharding.shard_shape(shape), row.dtype))
            else:
                parts.append(_part(array, index[1:], device)[None])
        return parts

    def shardings(self, packing: Packing) -> list[NamedSharding]:
        """How each row lies."""
        return [by_stage(self.mesh, row.spec) for row in packing.rows]

    def check_devices(self, arrays: Sequence[Any], call: str) -> None:
        """Refuse rows that lie on other devices than this pipe's mesh, or on the same
        ones in another order: a stage's parameters would be on another stage's device.

        Raises:
            ValueError: they do.
        """
        # The rows of one packing lie together, so one of them tells, and a step looks
        # at one. What is traced lies where the program has it, and of the host's arrays
        # each device takes its block.
        first = next(iter(arrays), None)
        if not isinstance(first, jax.Array) or isinstance(first, Tracer):
            return
        mesh = getattr(first.sharding, "mesh", self.mesh)
        if mesh is self.mesh or not isinstance(mesh, Mesh):
            return
        if list(mesh.devices.flat) != list(self.mesh.devices.flat):
            raise ValueError(
                f"{call}: these parameters are packed for the devices {_names(mesh)}, "
                f"but this pipe is on {_names(self.mesh)}; write "
                "`pipe.place(other.gather(params))`, where `other` is the pipe that "
                "placed them"
            )

    def pack_gradients(self, gradients: Sequence[PyTree], packing: Packing) -> Packed:
        """Gradients, one entry per layer, packed as their parameters are; what is
        `float0` has no gradient.
        """
        arrays = [a for tree in gradients for a in pack(tree)[0]]
        given = dict(zip(packing.entries, arrays, strict=True))
        made = {e for e, a in given.items() if a.dtype != jax.dtypes.float0}
        kept = {packing.where[entry].row for entry in made}
        # A block that nobody has a gradient for is zero.
        filled = [
            a if entry in made else jnp.zeros(a.shape, packing.shape(entry).dtype)
            for entry, a in given.items()
        ]
        rows = packing.pack(packing.trees(filled))
        lie = self.shardings(packing)
        return Packed(
            tuple(
                jax.device_put(a, lie[r])
                if r in kept
                else np.zeros(a.shape, jax.dtypes.float0)
                for r, a in enumerate(rows)
            ),
            packing,
            frozenset(
                e for e in given if e not in made and packing.where[e].row in kept
            ),
        )

    def gather(self, params: Packed) -> tuple[PyTree, ...]:
        """The exact inverse of `place`: on the first device, or, over several
        processes, on every device.
        """
        packing = params.packing
        # Rows of gradients of integers are no arrays of JAX, and hold nothing. Nor do
        # the blocks of what is frozen, in a row with others.
        kept = tuple(filter(params.has_gradient, packing.entries))
        whole = sorted({packing.where[entry].row for entry in kept})

        # One program for all layers, which every process runs: slicing an array that
        # lies on several processes is a collective.
        def unpack(arrays: Sequence[Any]) -> list[Any]:
            rows = dict(zip(whole, arrays, strict=True))
            return [packing.take(rows, entry) for entry in kept]

        arrays = [params.arrays[r] for r in whole]
        self.check_devices(arrays, "`gather(params)`")
        if is_traced(params):
            made = unpack(arrays)
        else:
            run = self._kept.get(
                Key((packing, kept)),
                lambda: jax.jit(unpack, out_shardings=replicated(self.mesh)),
            )
            made = run(arrays)
            if not self.mesh.is_multi_process:
                made = jax.device_put(made, self.mesh.devices.flat[0])
        # Each leaf is an array that was unpacked, or, where there is no gradient, the
        # zeros of dtype `float0` that stand for none.
        found = dict(zip(kept, made, strict=True))
        return packing.trees(
            [
                found[entry] if entry in found else float0_like(packing.shape(entry))
                for entry in packing.entries
            ]
        )

    def check(self, params: Any, call: str) -> None:
        """Refuse parameters that are not packed for this pipe.

        Raises:
            TypeError: they are not packed.
            ValueError: they are packed for another partition.
        """
        if not isinstance(params, Packed):
            raise TypeError(
                f'{call}: a Pipe with executor="scan" takes packed parameters, got '
                f"{type(params).__name__}; make them with "
                "`params = pipe.place(params)`"
            )
        shapes = params.packing.shapes
        if len(shapes) != len(self._model.layers):
            raise ValueError(
                f"{call}: these parameters are of {counted(len(shapes), 'layer')}, "
                f"but the model has {len(self._model.layers)}"
            )
        # They fit if this pipe would pack arrays of their shapes into the same rows.
        specs = params.packing.specs
        named = {name for spec in specs.values() for name in axes_of(spec)}
        if (
            not named <= {*self.mesh.axis_names}
            or self.packing(shapes, specs)[1] != params.packing
        ):
            raise ValueError(
                f"{call}: these parameters are packed for another partition; write "
                "`pipe.place(other.gather(params))`, "
                "where `other` is the pipe that placed them"
            )


def _block(row: Row, array: Any, device: Any) -> Any:
    """An array as a block of a row, made on a device; `None`: zeros."""
    with jax.default_device(device):
        if array is None:
            return jnp.zeros(row.shape, row.dtype)
        return row.put(on_device(array, device))


def _part(array: Any, index: tuple[slice, ...], device: Any) -> Any:
    """A device's part of an array: the one that it has already, or a piece that is made
    where the array is.
    """
    if is_explicit(array):
        return on_device(array, device)[index]
    for own in getattr(array, "addressable_shards", ()):
        if own.device == device and own.index == index:
            return own.data
    if not getattr(array, "is_fully_addressable", True):
        return on_device(array, device)[index]
    return on_device(array[index], device)


def _names(mesh: Mesh) -> str:
    """The devices of a mesh, in their order."""
    names = list(map(str, mesh.devices.flat))
    return ", ".join(names if len(names) <= 8 else [*names[:7], "…"])
