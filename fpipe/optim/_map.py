"""`map`: a function of whole trees whose leaves lie on several devices.

In: a function and trees, placed or packed. Out: the results of the function. The
function is traced on whole trees. The trace is then divided over the devices, as an
update is (`_partition.py`): each device computes the part of its own leaves. For two
layers on two devices, `lambda old, new: (ema(old, new), norm(new))` gives

    output                 where                 why
    average of layer 0     device 0              it is made of arrays on device 0 only
    average of layer 1     device 1              it is made of arrays on device 1 only
    norm                   the first device      a number, of sums of both devices

An output may be made of leaves of several devices, such as a gradient that was clipped
by the norm of all. If its tree has the structure of a given tree, it lies where the
given leaf in the same place lies.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fpipe._core.caches import Key, Recent
from fpipe._core.errors import shown
from fpipe._core.meshes import AnyMesh
from fpipe._core.processes import fetch
from fpipe._core.pytrees import (
    PyTree,
    Shape,
    Spec,
    is_array,
    is_traced,
    map_arrays,
    nbytes,
    numbers_as_arrays,
    pack,
    shapes_of,
    strong,
)
from fpipe._core.settings import explicit_transfers, settings
from fpipe._core.statics import check_leaves
from fpipe._executors.placement import Device
from fpipe._program.identity import traced_identity
from fpipe._split.stacks import joined
from fpipe.optim._blocks import divide_leaves, split_result
from fpipe.optim._dispatch import Input, Output, PlacedFunction, divide
from fpipe.optim._leaf_devices import (
    Home,
    array_form,
    device_of,
    first_device,
    first_of_each,
    over_processes,
    refuse_tracers,
)
from fpipe.optim._packed import (
    Packed,
    PackedLeaf,
    Rows,
    StateTemplate,
    any_packed,
    is_packed,
    mesh_of,
    off_callers_mesh,
    packed_nodes,
    state_outputs,
    templates_of,
    with_float0,
    without_float0,
)
from fpipe.optim._partition import SMALL, Partition
from fpipe.optim._seen_leaves import leaf_name
from fpipe.optim._sharded import ShardedCall
from fpipe.optim._traced import TracedFunction
from fpipe.optim._update_graph import UpdateGraph, open_trace, trace_flat

_CALL = "fpipe.optim.map(f, *trees)"

# A device may get this many bytes of leaves from other devices; numbers do not count.
# More would be a part of the model, and the device may have no room for that.
_LARGEST_SHARE = 1 << 16

# Plans by the computation of the function. If the function closes over nothing, its
# plan is also kept by the function itself, so the next call need not trace it.
_plans = Recent(32)
_plans_of_functions = Recent(64)


@explicit_transfers()
@off_callers_mesh
def map(f: Callable[..., PyTree], *trees: PyTree) -> PyTree:  # noqa: A001
    """Compute `f(*trees)` for trees whose leaves lie on several devices.

    The result is that of `jax.jit(f)` on the gathered trees. Examples of `f`: a norm of
    all parameters (`optax.tree.norm`), parameters for evaluation
    (`optax.contrib.schedule_free_eval_params`), an average, any function that only
    calls `jax.tree.map`. Each device computes the part of its own leaves, and only
    numbers cross devices.

    Arguments:
        f: a function of arrays that JAX can trace. It gets whole trees, a tuple with
            one entry per layer. That holds for states of optimizers and for an
            `fpipe.Packed` too. Python numbers come as arrays. `float0`, `None` and
            other leaves that are no arrays come unchanged.
        trees: parameters, gradients, updates or states of `per_stage`. All are of one
            pipe, placed or packed. Numbers and numpy arrays are sent to all devices.

    Returns:
        The result of `f`. A tree with the structure of a given tree, or of the
        parameters in a state, is placed or packed like that tree. A value made of the
        leaves of one device stays on that device. Any other value, such as a norm, is
        on the device of the first leaf, or replicated over the mesh. Over several
        processes each has such a value, on the first of its own devices.

    Raises:
        TypeError: `f` is no function, placed trees are given inside `jax.jit`, or a
            leaf is neither an array nor a value that compares.
        ValueError: the trees are on different devices, or packed for another partition.
            Or a result needs, on one device, more than 64 KiB of leaves of other
            devices; all parameters in one array, for example.

    Example:
        >>> import optax, fpipe.optim
        >>> params = (jnp.full(2, 2.0), jnp.full(2, 2.0))
        >>> print(fpipe.optim.map(optax.tree.norm, params))
        4.0
        >>> def average(old, new, decay):
        ...     return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new)
        >>> fpipe.optim.map(average, (jnp.ones(2),), (jnp.zeros(2),), 0.75)
        (Array([0.75, 0.75], dtype=float32),)
    """
    if not callable(f):
        raise TypeError(
            f"`{_CALL}`: a function of whole trees comes first, such as "
            f"`optax.tree.norm`, got {shown(f)}"
        )
    trees = numbers_as_arrays(trees)
    for n, tree in enumerate(trees):
        check_leaves(tree, f"trees[{n}]", f"in `{_CALL}`: ")
    if any_packed(trees):
        return _map_packed(f, trees)
    if is_traced(trees):
        refuse_tracers("fpipe.optim.map")
        return f(*trees)
    trees = without_float0(trees)
    arrays, spec = pack(trees)
    forms = (spec, *[array_form(a) for a in arrays])
    plan = _plan(f, forms, spec, arrays, functools.partial(_plan_placed, trees))
    return plan(arrays)


# --- traced on whole trees ---


class _Traced(NamedTuple):
    """A function that was traced.

    Attributes:
        jaxpr: from the arrays of the trees to those of the result.
        result: shapes; without `float0`.
    """

    jaxpr: Any
    result: PyTree


def _trace(f: Callable[..., PyTree], spec: Spec, arrays: Sequence[Any]) -> _Traced:
    results: list[PyTree] = []

    def flat(*leaves: Any) -> list[Any]:
        given = with_float0(spec.unpack(leaves))
        made = split_result(f(*joined(given)), given)
        made = without_float0(numbers_as_arrays(made))
        check_leaves(made, "f(*trees)", f"in `{_CALL}`: ")
        results.append(shapes_of(made))
        return pack(made)[0]

    return _Traced(trace_flat(flat, arrays), results[-1])


def _plan(
    f: Callable[..., PyTree],
    forms: Hashable,
    spec: Spec,
    arrays: Sequence[Any],
    make: Callable[[_Traced], Callable[[list[Any]], PyTree]],
) -> Callable[[list[Any]], PyTree]:
    """The plan of a function for trees of one form, from the arrays to the result."""

    # A function that is written in the call, such as `lambda p: norm(p)`, is a new one
    # each time. So plans are found by what it computes: tracing takes little, compiling
    # does not. What closes over something may compute something else the next time.
    def by_computation() -> Callable[[list[Any]], PyTree]:
        traced = _trace(f, spec, arrays)
        key = settings(), forms, traced_identity(traced.jaxpr), Shape.of(traced.result)
        return _plans.get(Key(key), lambda: make(traced))

    if isinstance(f, types.FunctionType) and f.__closure__ is None:
        key = Key((settings(), forms, f))
        return _plans_of_functions.get(key, by_computation)
    return by_computation()


# --- placed ---


@dataclasses.dataclass(frozen=True)
class _PlacedMap:
    """A function of placed trees.

    Attributes:
        run: from the arrays of the trees to those of the result.
        result: the structure of the result.
        shared: the numbers of results that belong to the leaves of no device.
        firsts: for each process the device on which it gets these; empty: there is one
            process.
    """

    run: PlacedFunction
    result: Spec
    shared: tuple[int, ...]
    firsts: tuple[Device, ...]

    def __call__(self, arrays: list[Any]) -> PyTree:
        made = self.run(arrays)
        if self.firsts and self.shared:
            own = fetch([made[n] for n in self.shared], self.firsts)
            for n, array in zip(self.shared, own, strict=True):
                made[n] = array
        return with_float0(self.result.unpack(made))


def _plan_placed(trees: Sequence[PyTree], traced: _Traced) -> _PlacedMap:
    """Divide a function over the devices of the leaves of its trees."""
    nodes = [list(_nodes(tree)) for tree in trees]
    _check_devices(trees, nodes)
    graph = divide_leaves(open_trace(traced.jaxpr))
    arrays, _ = pack(trees)
    devices = [device_of(a) for a in arrays]
    first = first_device([d for d in devices if d is not None])
    # A number is nobody's: each device reads a copy. What is not committed to a device
    # goes to wherever it is read.
    owners = [d if a.ndim else None for a, d in zip(arrays, devices, strict=True)]
    homes = _homes(nodes)
    found = [
        home if source is None else source
        for source, home in zip(
            _sources(graph, devices, owners),
            _devices_like(traced.result, homes),
            strict=True,
        )
    ]
    outputs = [Output(first if device is None else device) for device in found]
    run = divide(graph, arrays, [Input(o) for o in owners], outputs, first)
    _check_moves(run)
    shared = tuple(n for n, device in enumerate(found) if device is None)
    firsts = tuple(first_of_each(devices)) if over_processes(devices) else ()
    return _PlacedMap(run, pack(traced.result)[1], shared, firsts)


class _Node(NamedTuple):
    """A part of a tree that has parts.

    Attributes:
        treedef: its structure.
        first: the number of its first leaf in the tree.
        devices: of its leaves; `None` for one that is on no device by itself.
    """

    treedef: Any
    first: int
    devices: tuple[Home | None, ...]


def _nodes(tree: PyTree) -> Iterator[_Node]:
    """The tree itself and each tuple in it, such as the parameters in a state."""
    leaves, treedef = jax.tree.flatten(tree)
    devices = [device_of(leaf) for leaf in leaves]

    def walk(node: Any, first: int) -> Iterator[_Node]:
        data, count = node.node_data(), node.num_leaves
        if data is None:
            return
        if count and (node is treedef or data[0] is tuple):
            yield _Node(node, first, tuple(devices[first : first + count]))
        for child in node.children():
            yield from walk(child, first)
            first += child.num_leaves

    yield from walk(treedef, 0)


def _homes(nodes: Sequence[Sequence[_Node]]) -> dict[Any, tuple[Home | None, ...]]:
    """Where leaves lie in a tree of each structure, if all that have it agree."""
    homes: dict[Any, tuple[Home | None, ...]] = {}
    ambiguous = set()
    for node in (node for own in nodes for node in own):
        if homes.setdefault(node.treedef, node.devices) != node.devices:
            ambiguous.add(node.treedef)
    return {t: devices for t, devices in homes.items() if t not in ambiguous}


def _devices_like(
    result: PyTree, homes: dict[Any, tuple[Home | None, ...]]
) -> list[Home | None]:
    """For each array of the result the device of the leaf in its place, if the result,
    or a part of it, has the structure of something that was given.
    """

    def walk(node: Any) -> Iterator[Home | None]:
        if node in homes:
            yield from homes[node]
        elif node.node_data() is None:
            yield None
        else:
            for child in node.children():
                yield from walk(child)

    leaves, treedef = jax.tree.flatten(result)
    return [
        device
        for device, leaf in zip(walk(treedef), leaves, strict=True)
        if is_array(leaf)
    ]


def _sources(
    graph: UpdateGraph,
    devices: Sequence[Home | None],
    owners: Sequence[Home | None],
) -> list[Home | None]:
    """For each output the one device that has all arrays it is made of, if there is
    one. Numbers count where there is nothing else.
    """
    none = frozenset[Home]()
    # By value: the devices of arrays, and those of numbers.
    arrays = {
        v: none if d is None else none | {d}
        for v, d in zip(graph.inputs, owners, strict=True)
    }
    numbers = {
        v: none if d is None else none | {d}
        for v, d in zip(graph.inputs, devices, strict=True)
    }
    for operation in graph.operations:
        for known in (arrays, numbers):
            # Most operations read values of one device, and share its set.
            sets = {known.get(v, none) for v in operation.reads} - {none}
            union = sets.pop() if len(sets) == 1 else none.union(*sets)
            known.update(dict.fromkeys(operation.makes, union))
    found = []
    for v in graph.outputs:
        sources = arrays.get(v, none) or numbers.get(v, none)
        found.append(next(iter(sources)) if len(sources) == 1 else None)
    return found


def _check_devices(trees: Sequence[PyTree], nodes: Sequence[Sequence[_Node]]) -> None:
    """Refuse a tree whose structure another one has too, on other devices: one of
    another pipe, or one that is not placed.
    """
    for n, own in enumerate(nodes):
        if not own:
            continue
        root = own[0]
        for m, others in enumerate(nodes):
            alike = [node for node in others if node.treedef == root.treedef]
            differing = [_first_difference(root, node) for node in alike]
            if m == n or not alike or None in differing:
                continue
            k = differing[0]
            assert k is not None
            one, other = _leaf_paths(trees[n]), _leaf_paths(trees[m])
            raise ValueError(
                f"`{_CALL}`: {leaf_name(f'trees[{n}]', one[k])} is on "
                f"{root.devices[k]}, but "
                f"{leaf_name(f'trees[{m}]', other[alike[0].first + k])} is on "
                f"{alike[0].devices[k]}: a tree of another pipe, or one that is not "
                "placed; place all trees for one pipe, by `pipe.place(params)` and "
                "`fpipe.optim.place(state, params)`"
            )


def _first_difference(one: _Node, other: _Node) -> int | None:
    """The first leaf that is on another device in one of two nodes."""
    for k, (a, b) in enumerate(zip(one.devices, other.devices, strict=True)):
        if a is not None and b is not None and a != b:
            return k
    return None


def _leaf_paths(tree: PyTree) -> list[Any]:
    """The paths of all leaves of a tree."""
    return [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _check_moves(run: PlacedFunction) -> None:
    """Refuse a plan that would put large parts of the model on one device."""
    share: dict[int, int] = {}
    for move in run.cut.moves:
        bundled = run.cut.slots[move.slot].bundled
        # What is on no device of its own goes wherever it is read.
        if move.source is not None and move.bytes > SMALL and not bundled:
            share[move.target] = share.get(move.target, 0) + move.bytes
    _check_share(max(share.values(), default=0))


def _check_share(size: int) -> None:
    if size > _LARGEST_SHARE:
        raise ValueError(
            f"`{_CALL}`: f combines leaves of several devices on one device: that "
            f"device would get {size} bytes of other devices' leaves, and the limit is "
            f"{_LARGEST_SHARE}. Return numbers, or trees in which each leaf is made of "
            "the given leaves in its place; for anything else write "
            "`f(pipe.gather(params))`"
        )


# --- packed ---


@dataclasses.dataclass(frozen=True)
class _PackedMap:
    """A function of packed trees, as one program.

    Attributes:
        call: the function, divided over the mesh.
        program: from rows and whole arrays to the same.
    """

    call: ShardedCall
    program: Callable[..., tuple[list[Any], list[Any]]]

    def __call__(self, arrays: Sequence[Any]) -> PyTree:
        rows, shared = arrays
        return with_float0(self.call.assemble(*self.program(rows, shared)))


def _map_packed(f: Callable[..., PyTree], trees: tuple[PyTree, ...]) -> PyTree:
    _check_packings(trees)
    rows = Rows(spread=True)
    unpacked = without_float0(rows.add(trees))
    leaves, spec = pack(unpacked)
    shared = [leaf for leaf in leaves if not isinstance(leaf, PackedLeaf)]
    mesh = mesh_of(trees)
    if is_traced(trees):
        call = _divide_packed(trees, rows, leaves, mesh, _trace(f, spec, leaves))
        return with_float0(call.assemble(*call.run(rows.arrays, shared)))
    if isinstance(mesh, Mesh):
        everywhere = NamedSharding(mesh, PartitionSpec())
        shared = jax.device_put(shared, everywhere)
    # The structure of the trees has their packings in it.
    forms = (
        jax.tree.structure(trees),
        spec,
        mesh,
        *[(a.shape, a.dtype, getattr(a, "weak_type", False)) for a in leaves],
    )

    def make(traced: _Traced) -> _PackedMap:
        call = _divide_packed(trees, rows, leaves, mesh, traced)
        return _PackedMap(call, jax.jit(call.run))

    return _plan(f, forms, spec, leaves, make)([rows.arrays, shared])


def _divide_packed(
    trees: PyTree,
    rows: Rows,
    leaves: Sequence[Any],
    mesh: AnyMesh | None,
    traced: _Traced,
) -> ShardedCall:
    graph = divide_leaves(open_trace(traced.jaxpr))
    outputs = state_outputs(traced.result, templates_of(trees), first=0)
    function = TracedFunction(graph, tuple(leaves))
    call = ShardedCall.of(function, rows.arrays, outputs, mesh)
    _check_crossings(call.update.partition)
    return call


def _check_crossings(divided: Partition) -> None:
    """Refuse a plan in which large leaves would go to all devices."""
    sizes = [nbytes(divided.graph.avals[c.value]) for c in divided.crossings]
    _check_share(sum(size for size in sizes if size > SMALL))


def _check_packings(trees: Sequence[PyTree]) -> None:
    """Refuse trees that are packed for different partitions or devices, and one that is
    not packed beside one that is.
    """
    nodes = packed_nodes(trees)
    templates = [StateTemplate(node.packing) for node in nodes]
    for k, (node, template) in enumerate(zip(nodes, templates, strict=True)):
        for other, its in zip(nodes[:k], templates, strict=False):
            if not (_agree(its, node) or _agree(template, other)):
                raise ValueError(
                    f"`{_CALL}`: trees are packed for different partitions; give all "
                    "as one pipe has them, by `pipe.place(other.gather(params))` and "
                    "`fpipe.optim.place(fpipe.optim.gather(state), params)`"
                )
            if not _same_devices(mesh_of(node), mesh_of(other)):
                raise ValueError(
                    f"`{_CALL}`: trees are packed for different devices, or for the "
                    "same ones in another order; give all as one pipe has them, by "
                    "`pipe.place(other.gather(params))`"
                )
    wholes = {Shape.of(node.packing.shown_shapes) for node in nodes}
    for n, tree in enumerate(trees):
        for part in _tuples(tree):
            if Shape.of(map_arrays(strong, part)) in wholes:
                raise ValueError(
                    f"`{_CALL}`: trees[{n}] is not packed, as the others are; write "
                    "`pipe.place(tree)`, or `fpipe.optim.place(state, params)`"
                )


def _tuples(tree: PyTree) -> Iterator[tuple[Any, ...]]:
    """The tuples in a tree that are not packed, at any depth."""
    if type(tree) is tuple:
        yield tree

    def stop(node: Any) -> bool:
        return is_packed(node) or (node is not tree and type(node) is tuple)

    for part in jax.tree.leaves(tree, is_leaf=stop):
        if type(part) is tuple:
            yield from _tuples(part)


def _agree(template: StateTemplate, node: Packed) -> bool:
    """Whether a `Packed` is of other parameters, or packed as a template has it."""
    tree = node.packing.shown_shapes
    return not template.fits(tree) or template.packing_of(tree) == node.packing


def _same_devices(one: AnyMesh | None, other: AnyMesh | None) -> bool:
    if not (isinstance(one, Mesh) and isinstance(other, Mesh)):
        return True
    return list(one.devices.flat) == list(other.devices.flat)
