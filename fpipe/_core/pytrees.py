"""Pytrees as flat tuples of arrays, with everything that is no array set aside as
static.

    pack({"a": x, "mode": "relu"})
        -> [x], Spec(treedef of {"a", "mode"}, static=((1, "relu"),), arrays=1)

The arrays go into programs, and the `Spec` is a part of what a program is kept under.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer as Tracer  # all others take it from here: JAX may move it
from jax.sharding import NamedSharding, PartitionSpec

from fpipe._core.errors import shown

PyTree: TypeAlias = Any


def is_array(leaf: Any) -> bool:
    """Whether a leaf is data: a JAX or numpy array, or the shape of one. All else is
    static.
    """
    # Shapes count as arrays, so that plans, compilation and `init` run the same code on
    # shapes as a call runs on arrays. Python numbers do not count: `train=True` or an
    # axis number must reach a layer as it is.
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def path_of(keys: Sequence[Any]) -> str:
    """The path of a leaf as users write it, such as `h/0/w`.

    Arguments:
        keys: as JAX tells them, such as `tree_leaves_with_path`.
    """
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf can carry a derivative: real or complex floats, not integers or
    keys.
    """
    return bool(jnp.issubdtype(leaf.dtype, np.inexact))


def is_traced(tree: PyTree) -> bool:
    """Whether any leaf is a tracer: then there are no arrays that a program could be
    dispatched with, and the call becomes a part of someone's trace.
    """
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True, eq=False)
class Spec:
    """The structure of a pytree, its static leaves by position, and how many arrays it
    holds.

    Static leaves are told apart as programs must: `1`, `1.0` and `True`, or `0.0` and
    `-0.0`, are different, and a `nan` is itself.
    """

    treedef: Any
    static: tuple[tuple[int, Any], ...]
    arrays: int

    # Compared by hand: the comparison of tuples takes `1 == True` for equal, and a nan
    # for different from itself, where a program is specialised on what it is.
    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        static = tuple((k, type(v), _exact(v)) for k, v in self.static)
        return (self.treedef, self.arrays, static)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def unpack(self, arrays: Sequence[Any]) -> PyTree:
        """The inverse of `pack`: the pytree with these arrays."""
        assert len(arrays) == self.arrays, (len(arrays), self.arrays)
        # Most pytrees hold arrays alone, and every dispatched call unpacks several.
        if not self.static:
            return self.treedef.unflatten(arrays)
        rest = iter(arrays)
        static = dict(self.static)
        total = self.arrays + len(static)
        leaves = [static[k] if k in static else next(rest) for k in range(total)]
        return self.treedef.unflatten(leaves)

    def fill(self, arrays: Sequence[Any], static: Any) -> PyTree:
        """`unpack` with `static` in the place of every static leaf."""
        statics = tuple((k, static) for k, _ in self.static)
        return Spec(self.treedef, statics, self.arrays).unpack(arrays)


def _exact(value: Any) -> Any:
    """A value that equals another's only if both are the same to the last bit."""
    # The text of the bits: `0.0 == -0.0` and `nan != nan`, but their hexadecimal forms
    # differ and agree as the bits do.
    if isinstance(value, complex):
        return value.real.hex(), value.imag.hex()
    if isinstance(value, float):
        return value.hex()
    # Beside the value itself, as its own `==` may tell apart more.
    if isinstance(value, (tuple, frozenset)):
        kind = tuple if isinstance(value, tuple) else frozenset
        return value, kind((type(v), _exact(v)) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (getattr(value, f.name, None) for f in dataclasses.fields(value))
        return value, tuple((type(v), _exact(v)) for v in fields if _is_value(v))
    return value


def _is_value(value: Any) -> bool:
    """Whether a field of a static leaf may equal one that a program tells apart."""
    kinds = (bool, int, float, complex, tuple, frozenset)
    return isinstance(value, kinds) or dataclasses.is_dataclass(value)


def pack(tree: PyTree) -> tuple[list[Any], Spec]:
    """Split a pytree into its arrays and its `Spec`."""
    leaves, treedef = jax.tree.flatten(tree)
    static = tuple([(k, leaf) for k, leaf in enumerate(leaves) if not is_array(leaf)])
    # Most pytrees hold arrays alone, and every dispatched call packs several.
    arrays = [leaf for leaf in leaves if is_array(leaf)] if static else leaves
    return arrays, Spec(treedef, static, len(arrays))


# `jax.jit` refuses a string as a leaf. In a bundle it is a part of the structure, which
# `jax.jit` compares with `==` to find a kept trace. So `Spec.__eq__` decides when a
# function with static leaves is traced again.
@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """A pytree with static leaves as one that `jax.jit` takes and returns.

    Its arrays are the leaves; what is static is part of its structure.
    """

    arrays: Sequence[Any]
    spec: Spec

    @classmethod
    def of(cls, tree: PyTree) -> "Bundle":
        """A pytree with its static leaves moved into the structure."""
        return cls(*pack(tree))

    @property
    def tree(self) -> PyTree:
        """The pytree again, with its static leaves in their places."""
        return self.spec.unpack(self.arrays)

    def tree_flatten(self) -> tuple[tuple[Any, ...], Spec]:
        """For JAX."""
        return tuple(self.arrays), self.spec

    @classmethod
    def tree_unflatten(cls, spec: Spec, arrays: Sequence[Any]) -> "Bundle":
        """For JAX."""
        return cls(arrays, spec)


def aval(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and weak type of an array: what a program is specialised on."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        # JAX takes numpy's float64 for float32, unless 64-bit types are enabled.
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype)
    # A weak float32 and a strong one promote differently, so programs for the two
    # differ.
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False)
    )


def in_context(shape: Any) -> Any:
    """A shape whose type tells of the mesh in the context, as what is made there does.

    Without it the first operation of a trace gives its result another type than its
    input has, and a function that is traced for both runs twice.

    Arguments:
        shape: a `jax.ShapeDtypeStruct`, or an array or a tracer in its place.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return shape
    whole = PartitionSpec(*[None] * len(shape.shape))
    return jax.ShapeDtypeStruct(
        shape.shape,
        shape.dtype,
        sharding=NamedSharding(mesh, whole),
        weak_type=shape.weak_type,
    )


@dataclasses.dataclass(frozen=True)
class Shape:
    """A pytree's structure, static leaves and the shapes of its arrays: what a program
    is specialised on.

    It compares and hashes, so it is a part of the keys of programs and plans.
    """

    spec: Spec
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, tree: PyTree) -> "Shape":
        """From a pytree of arrays or of shapes; both give the same."""
        arrays, spec = pack(tree)
        return cls(spec, tuple(map(aval, arrays)))

    @property
    def tree(self) -> PyTree:
        """The pytree with shapes in the place of its arrays."""
        return self.spec.unpack(self.leaves)


def float0_like(leaf: Any) -> np.ndarray:
    """The cotangent of an integer array, as JAX spells it."""
    # A numpy array: JAX has no arrays of `float0` of its own.
    return np.zeros(leaf.shape, jax.dtypes.float0)


def fill_gradient(
    spec: Spec, leaves: Sequence[Any], gradients: Sequence[Any]
) -> PyTree:
    """A gradient in the structure of its argument: `float0` where there is none, `None`
    for static leaves.
    """
    filled = [
        float0_like(a) if g is None else g
        for a, g in zip(leaves, gradients, strict=True)
    ]
    return spec.fill(filled, None)


class HostShape(jax.ShapeDtypeStruct):
    """The shape of an array in the host's memory, on no device in particular.

    JAX writes such a type as `f32<host>[4,3]`; of its own, `jax.ShapeDtypeStruct` says
    where memory is by a sharding alone, which names a device.
    """

    memory_space = jax.memory.Space.Host

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HostShape) and super().__eq__(other)

    def __hash__(self) -> int:
        return hash((HostShape, super().__hash__()))


def on_host(a: Any) -> bool:
    """Whether an array, or one of that type, lies in the host's memory, where an
    offloading policy moves what is saved for a backward.
    """
    space = getattr(getattr(a, "aval", a), "memory_space", None)
    if space is not None:
        return space == jax.memory.Space.Host
    kind = getattr(getattr(a, "sharding", None), "memory_kind", None)
    return kind in ("pinned_host", "unpinned_host")


def off_host(tree: PyTree) -> PyTree:
    """A pytree under a trace, whose arrays on the host are brought to the device."""
    return jax.tree.map(
        lambda leaf: (
            jax.device_put(leaf, jax.memory.Space.Device)
            if is_array(leaf) and on_host(leaf)
            else leaf
        ),
        tree,
    )


def device_bytes(a: Any) -> int:
    """The bytes of an array in the memory of its device: none, if it is on the host."""
    return 0 if on_host(a) else nbytes(a)


def host_bytes(a: Any) -> int:
    """The bytes of an array in the host's memory."""
    return nbytes(a) if on_host(a) else 0


def nbytes(a: Any) -> int:
    """The bytes of an array, or of one of that shape, wherever it lies."""
    # A dtype of somebody's own (Flax's `fp32_max_grad`) may say what it is stored as.
    stored = getattr(a.dtype, "float_dtype", None)
    dtype = a.dtype if stored is None else jnp.dtype(stored)
    return math.prod(a.shape) * dtype.itemsize


def zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of that shape; PRNG keys too."""
    return jnp.zeros(shape.shape, shape.dtype)


def zeros_like(tree: PyTree) -> PyTree:
    """Zeros in the shapes of a pytree; static leaves stay."""
    return map_arrays(zeros, tree)


def shapes_of(tree: PyTree) -> PyTree:
    """The shapes of a pytree; static leaves stay."""
    return map_arrays(aval, tree)


def eval_shape(f: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """`jax.eval_shape` for pytrees with static leaves."""
    arrays, spec = pack(args)
    # `jax.eval_shape` takes and returns arrays alone, so the structure of the result,
    # with its static leaves, comes out by the side.
    # (The list holds one entry for each trace.)
    specs: list[Spec] = []

    def flat(*leaves: Any) -> list[Any]:
        result, result_spec = pack(f(*spec.unpack(leaves)))
        specs.append(result_spec)
        return result

    given = [in_context(aval(a)) for a in arrays]
    # Without shardings: a mesh of the context is no part of a shape.
    shapes = map(aval, jax.eval_shape(flat, *given))
    return specs[-1].unpack(list(shapes))


def describe(tree: PyTree) -> str:
    """A pytree in one short line for an error: shapes of arrays and static leaves in
    their structure.
    """
    text = _described(tree)
    # A model's parameters would fill pages; their beginning says what they are.
    return text if len(text) <= 200 else text[:199] + "…"


def _described(tree: PyTree) -> str:
    if is_array(tree):
        return f"{tree.dtype}[{','.join(map(str, tree.shape))}]"
    if tree is None:
        return "None"
    # One level at a time, and not the `repr` of a class of the user's, which may show
    # anything.
    inside = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda t: t is not tree)
    if len(inside) == 1 and not inside[0][0]:
        return shown(tree)
    texts = [_described(child) for _, child in inside]
    if type(tree) is tuple:
        return f"({', '.join(texts)}{',' * (len(texts) == 1)})"
    if type(tree) is list:
        return f"[{', '.join(texts)}]"
    if type(tree) is dict:
        # In the user's order; JAX sorts.
        return (
            "{"
            + ", ".join(f"{shown(k)}: {_described(v)}" for k, v in tree.items())
            + "}"
        )
    keys = [path[0] for path, _ in inside]
    named = [
        f"{key.name}={text}" if isinstance(key, jax.tree_util.GetAttrKey) else text
        for key, text in zip(keys, texts, strict=True)
    ]
    return f"{type(tree).__name__}({', '.join(named)})"


def numbers_as_arrays(tree: PyTree) -> PyTree:
    """Python numbers among the leaves as arrays; other static leaves stay."""
    # Left as a number, a parameter or a state would be static: compiled into the
    # programs, without a gradient, and compiled again for each new value.
    numbers = (bool, int, float, complex)
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf) if isinstance(leaf, numbers) else leaf, tree
    )


def strong(array: Any) -> Any:
    """An array (or its shape) without weak type, so that a value and what is computed
    from it have one type.
    """
    if isinstance(array, jax.ShapeDtypeStruct):
        return array.update(weak_type=False)
    if getattr(array, "weak_type", False):
        return jax.lax.convert_element_type(array, array.dtype)
    return array


def copied(tree: PyTree) -> PyTree:
    """A pytree whose arrays of JAX are copies, each where it was."""
    # Without a program to compile, as `jnp.copy` would be one for each shape. It does
    # not copy numpy's arrays (jax 0.10.2), which nothing here deletes.
    leaves, treedef = jax.tree.flatten(tree)
    own: list[int] = []
    for n, leaf in enumerate(leaves):
        if not isinstance(leaf, jax.Array):
            continue
        if is_traced(leaf) or leaf.is_fully_addressable:
            own.append(n)
        else:
            leaves[n] = _copied_part(leaf)
    copies = jax.device_put([leaves[n] for n in own], may_alias=False)
    for n, copy in zip(own, copies, strict=True):
        leaves[n] = copy
    return treedef.unflatten(leaves)


def _copied_part(array: jax.Array) -> jax.Array:
    """A copy of an array that is not in this process alone: each process copies what it
    has. `device_put` refuses such an array without a sharding (jax 0.10.2).
    """
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(
        array.shape,
        array.sharding,
        jax.device_put(shards, may_alias=False),
        dtype=array.dtype,
    )


def map_arrays(f: Callable[[Any], Any], tree: PyTree) -> PyTree:
    """Map the arrays of a pytree; static leaves stay."""
    return jax.tree.map(lambda leaf: f(leaf) if is_array(leaf) else leaf, tree)
