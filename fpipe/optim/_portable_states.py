"""Optimizer states between partitions: `gather` and `place`.

A gathered state is the state of plain optax for `pipe.gather(params)`: trees with one
entry per layer, for any executor. Checkpoints hold this form. A moment of two layers is

    placed      (mu of layer 0 on device 0, mu of layer 1 on device 1)
    scan        Packed(float32[2, 16]), a block on each device
    gathered    (mu of layer 0, mu of layer 1), both on the first device
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fpipe._core.processes import gather as gather_arrays
from fpipe._core.processes import host_copy, whole_here
from fpipe._core.pytrees import Bundle, PyTree, is_array, is_traced, pack
from fpipe._core.settings import explicit_transfers
from fpipe._executors.placement import Device, Placement
from fpipe._split.stacks import RowBlocks, is_row_blocks, joined
from fpipe.optim._blocks import on_whole_leaves, split_state
from fpipe.optim._leaf_devices import (
    device_of,
    first_device,
    first_of_each,
    lies_like,
    over_processes,
    parameter_devices,
)
from fpipe.optim._packed import (
    any_packed,
    mesh_of,
    off_callers_mesh,
    pack_state,
    shapes_unpacked,
    templates_of,
    unpack_tree,
)
from fpipe.optim._seen_leaves import (
    SeenLeaves,
    check_state,
    check_transformation,
    parameters_of_state,
)
from fpipe.optim._transform import PerStage, engine_of


@explicit_transfers()
@off_callers_mesh
def gather(state: PyTree, params: PyTree = None) -> PyTree:
    """An optimizer state in the form of plain optax, on one device.

    It is the state that plain optax has for `pipe.gather(params)`. A checkpoint in this
    form, made with one partition or executor, loads with another: `place(gather(state),
    params, tx)`.

    Arguments:
        state: a state of `per_stage`, or of plain optax over an `fpipe.Packed`.
        params: what `pipe.gather(params)`, or `step.gather(params)`, gave. The state
            comes to the device of these parameters.

    Returns:
        A copy of the state, unpacked. Without `params` every array is on the device of
        the state's first array, or on the first device of the mesh. If the mesh spans
        several processes, every array is on every device. A state that is placed over
        several processes is gathered in each of them.
    """
    mesh = mesh_of(state)
    assert mesh is None or isinstance(mesh, Mesh)  # this is no trace
    leaves = jax.tree.leaves(state)
    homes = [device_of(a) for a in leaves]
    if mesh is None and over_processes(homes):
        arrays, spec = pack(state)
        state = spec.unpack(gather_arrays(arrays, first_of_each(homes)))
        leaves = jax.tree.leaves(state)
    if not all(a.is_fully_addressable for a in leaves if isinstance(a, jax.Array)):
        # An array is spread over several processes, so `device_put` cannot fetch it.
        # What is not packed is whole on every device.
        return state if mesh is None else _unpack_on(mesh)(Bundle.of(state)).tree
    arrays, spec = pack(unpack_tree(state))
    device = _first_device(params)
    if device is None:
        device = _first_device(arrays) if mesh is None else mesh.devices.flat[0]
    own = arrays if device is None else Placement.of(device).own(arrays)
    return joined(spec.unpack(own))


def _first_device(tree: PyTree) -> Device | None:
    """A device of the first array of a tree, if there is one."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return next(iter(arrays[0].devices())) if arrays else None


@functools.lru_cache(8)
def _unpack_on(mesh: Mesh) -> Callable[[Bundle], Bundle]:
    """A program of all processes that unpacks a state on every device: no process may
    take a block of another one by itself.
    """
    return jax.jit(
        lambda state: Bundle.of(joined(unpack_tree(state.tree))),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


@explicit_transfers()
@off_callers_mesh
def place(
    state: PyTree, params: PyTree, tx: Any = None, donate: bool = False
) -> PyTree:
    """Put an optimizer state on the devices of its parameters.

    This is the inverse of `gather`. The state lies where `per_stage(tx).init(params)`
    puts it.

    Arguments:
        state: a state from `gather`, from plain optax on `pipe.gather(params)`, or of
            another partition. It has nothing for `frozen` parameters and integers: give
            the `init` of plain optax an `optax.MaskedNode()` in place of each of them.
            Numpy arrays, as a checkpoint has them, are taken too.
        params: the parameters, placed or packed.
        tx: the transformation of the state. If it is given, a state of another
            transformation or of another model is an error. Default: not checked.
        donate: whether the result may reuse the arrays of `state`. With `True`, an
            array that is on its device already is not copied, and it is deleted when
            the placed state is donated. Default `False`: the given state stays valid.

    Returns:
        The state, on the devices of its parameters, or packed.

    Raises:
        TypeError: `tx` is no transformation.
        ValueError: `params` are not placed, or `state` is not of `tx` and `params`.
    """
    # Unpacked first, so that every state is compared and placed in one form, even one
    # that comes packed for another partition.
    shapes = shapes_unpacked(params)
    state = split_state(_joined_anywhere(unpack_tree(state)), shapes)
    if tx is not None:
        _check_state_of(tx, state, params)
    if any_packed(params):
        mesh = mesh_of(params)
        arrays, spec = pack(state)
        # Whole on all devices of the mesh first: then `jit` runs there, and each device
        # cuts out its block. Arrays on one device alone would be refused beside a mesh.
        if mesh is not None and not is_traced((state, params)):
            arrays = list(map(host_copy, arrays))
            arrays = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))
        templates = templates_of(params)
        return jax.jit(lambda a: pack_state(spec.unpack(a), templates, mesh))(arrays)
    # Of all parameters, frozen ones too: `place` does not know what is frozen (unless
    # it has `tx`), and a path that no state has does no harm.
    named = jax.tree_util.tree_flatten_with_path(params)[0]
    paths = [path for path, leaf in named if is_array(leaf)]
    arrays = [leaf for _, leaf in named if is_array(leaf)]
    devices = parameter_devices("fpipe.optim.place(state, params)", arrays, paths)
    first = first_device(devices)
    leaves, treedef = jax.tree.flatten(state)
    parameters = parameters_of_state(paths, state)
    for n, (leaf, parameter) in enumerate(zip(leaves, parameters, strict=True)):
        if is_array(leaf):
            device = first if parameter is None else devices[parameter]
            place = Placement.of(device)
            like = None if parameter is None else arrays[parameter]
            lies = lies_like(leaf.shape, device, like)
            put = place.take if donate else place.own
            leaves[n] = put([whole_here(leaf)], None if lies is None else [lies])[0]
    return treedef.unflatten(leaves)


def _joined_anywhere(state: PyTree) -> PyTree:
    """A state with whole leaves in the place of blocks, on whatever devices those
    are.
    """

    def together(node: Any) -> Any:
        if not isinstance(node, RowBlocks) or is_traced(node):
            return node
        arrays = [b for b in node.blocks if isinstance(b, jax.Array)]
        if len({frozenset(a.devices()) for a in arrays}) < 2:
            return node
        return node.with_blocks(jax.device_put(list(node.blocks), arrays[0].sharding))

    return joined(jax.tree.map(together, state, is_leaf=is_row_blocks))


_FIX = (
    "load it with the model and the transformation that it was saved with, or start "
    "again with `tx.init(params)`"
)


def _check_state_of(tx: Any, state: PyTree, params: PyTree) -> None:
    """Refuse an unpacked state that is not of a transformation and parameters."""
    call = "fpipe.optim.place(state, params, tx)"
    check_transformation(call, tx)
    shapes = shapes_unpacked(params)
    # What is frozen is masked as `init` masks it: the state has no leaf for it.
    if isinstance(tx, PerStage):
        engine = engine_of(tx)
        seen = SeenLeaves.of(shapes, engine.frozen)
        shapes = seen.seen_tree(seen.select(jax.tree.leaves(shapes)))
        tx = engine.tx
    else:
        tx = on_whole_leaves(optax.with_extra_args_support(tx))
    check_state(tx, shapes, state, _FIX, call)
