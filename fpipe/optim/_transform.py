"""`per_stage`: any optax transformation for the parameters of a pipe."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from fpipe._core.caches import Key, Recent
from fpipe._core.pytrees import (
    PyTree,
    is_array,
    is_inexact,
    is_traced,
    map_arrays,
    numbers_as_arrays,
    pack,
    shapes_of,
    strong,
)
from fpipe._executors.tracers import only_shapes
from fpipe._model.frozen import Frozen
from fpipe.optim import _packed
from fpipe.optim._placed import (
    check_state,
    device_of,
    first_devices,
    form,
    named,
    plan,
    plan_init,
    plan_update,
)
from fpipe.optim._run import Run
from fpipe.optim._view import (
    Chosen,
    any_packed,
    is_packed,
    mesh_of,
    owners,
    packed_state,
    templates,
    unpacked,
)

# Plans that one transformation keeps, and that `apply_updates` and `global_norm` keep
# for all.
_KEPT = 32

# What may be given away. Parameters never: whoever applies the updates still needs
# them.
_DONATE = ("state", "grads")
_DONATE_APPLY = ("params", "updates")


class PerStage(optax.GradientTransformationExtraArgs):
    """What `per_stage` returns: an `optax.GradientTransformationExtraArgs` that shows
    its plans.
    """

    @property
    def runs(self) -> list[Run]:
        """The plans made so far for placed parameters: `run.cut.moves` says what
        crosses devices in a call.
        """
        engine: Any = getattr(self.init, "__self__", None)
        return [planned.run for planned in engine.plans.values()]


class _Engine:
    """`init` and `update` of a transformation, on whatever they are given."""

    def __init__(self, tx: Any, frozen: Frozen | None, donate: tuple[str, ...]) -> None:
        self.tx, self.frozen, self.donate = tx, frozen, donate
        self.plans = Recent(_KEPT)
        numbers = tuple(n for n, name in ((1, "grads"), (2, "state")) if name in donate)
        self._init = jax.jit(self._packed_init, static_argnums=(0, 1))
        self._update = jax.jit(
            self._packed_update, static_argnums=0, donate_argnums=numbers
        )

    def init(self, params: PyTree) -> PyTree:
        if any_packed(params):
            if is_traced(params):
                return _packed.init(self.tx, params, self.frozen, mesh_of(params))
            arrays, spec = pack(_visible(params))
            return self._init(spec, mesh_of(params), arrays)
        if is_traced(params):
            _refuse("per_stage(tx).init")
            chosen = Chosen.of(params, self.frozen)
            return numbers_as_arrays(
                self.tx.init(chosen.seen(chosen.select(jax.tree.leaves(params))))
            )
        params = map_arrays(strong, params)
        arrays, spec = pack(params)
        key = Key(("init", spec, tuple(map(form, arrays))))
        planned = self.plans.get(key, lambda: plan_init(self.tx, params, self.frozen))
        return planned.state.unpack(
            planned.run(planned.chosen.select(jax.tree.leaves(params)))
        )

    def update(
        self, grads: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        extra = numbers_as_arrays(extra)
        if any_packed((grads, params)):
            if is_traced((grads, state, params, extra)):
                return _packed.update(self.tx, grads, state, params, extra, self.frozen)
            packs = [pack(_visible(part)) for part in (grads, state, params, extra)]
            specs = tuple(spec for _, spec in packs)
            return self._update(specs, *(arrays for arrays, _ in packs))
        if is_traced((grads, state, params, extra)):
            _refuse("per_stage(tx).update")
            return self._shapes(grads, state, params, extra)
        grads, state, params = map_arrays(strong, (grads, state, params))
        packs = [pack(part) for part in (grads, state, params, extra)]
        key = Key(tuple((spec, tuple(map(form, arrays))) for arrays, spec in packs))
        planned = self.plans.get(
            key,
            lambda: plan_update(
                self.tx, grads, state, params, extra, self.frozen, self.donate
            ),
        )
        chosen, like = planned.chosen, grads if params is None else params
        leaves = jax.tree.leaves(like)
        g = chosen.select(chosen.leaves(grads, "gradients"))
        p = [] if params is None else chosen.select(leaves)
        made = planned.run([*g, *packs[1][0], *p, *packs[3][0]])
        updates = chosen.treedef.unflatten(chosen.fill(made[: len(g)], leaves))
        return updates, planned.state.unpack(made[len(g) :])

    def _shapes(
        self, grads: PyTree, state: PyTree, params: PyTree, extra: dict[str, Any]
    ) -> tuple[PyTree, PyTree]:
        like = grads if params is None else params
        chosen, leaves = Chosen.of(like, self.frozen), jax.tree.leaves(like)
        seen = None if params is None else chosen.seen(chosen.select(leaves))
        g = chosen.seen(chosen.select(chosen.leaves(grads, "gradients")))
        updates, new = self.tx.update(g, state, seen, **extra)
        return chosen.treedef.unflatten(
            chosen.fill(jax.tree.leaves(updates), leaves)
        ), numbers_as_arrays(new)

    def _packed_init(self, spec: Any, mesh: Any, arrays: list[Any]) -> PyTree:
        return _packed.init(self.tx, spec.unpack(arrays), self.frozen, mesh)

    def _packed_update(
        self, specs: Any, grads: Any, state: Any, params: Any, extra: Any
    ) -> Any:
        g, s, p, e = (
            spec.unpack(part)
            for spec, part in zip(specs, (grads, state, params, extra), strict=True)
        )
        return _packed.update(self.tx, g, s, p, e, self.frozen)


def per_stage(
    tx: optax.GradientTransformation,
    frozen: Frozen | None = None,
    donate: Iterable[str] = (),
) -> PerStage:
    """Any optax transformation for the parameters of a pipe, on the devices where they
    are.

    It computes what `tx` computes on `pipe.gather(params)`: what looks at a whole leaf
    (LAMB, Adafactor, decay masks by rank) sees the leaf as the layer knows it, and what
    looks at all parameters (clipping by the global norm) sees those of all stages.
    Parameters are any pytree; integers in it are passed over.

    With `executor="placed"` `update` is traced once and cut into compiled programs that
    run on the parameters' devices. Only numbers cross devices. A state that is like a
    parameter is on its device. All else (the count of steps, hyperparameters) is on the
    device of the first parameter, and is copied to the others in each update. `update`
    cannot be inside `jax.jit`.

    With `executor="scan"` `update` is a function for your own `jax.jit` (outside, it is
    compiled by itself). Every part of the state that is like the parameters is an
    `fpipe.Packed`: each device holds that of its own stages, updates its own stages,
    and only numbers cross devices. Optimizers that work number by number (SGD, Adam)
    need none of this: give them the `Packed` as it is.

    Arguments:
        tx: the transformation.
        frozen: which parameters are not trained, as for `pipe.value_and_grad`:
            `frozen(path, shape)` with a path such as `"[0]['w']"` and a
            `jax.ShapeDtypeStruct`, or bools in the structure of the parameters or of
            its first levels (one per layer). Frozen ones have no state and an update of
            zero, and their gradients may be `float0`. Default none.

    Other Arguments:
        donate: what `update` may reuse the memory of: `"state"`, `"grads"`, or both. It
            is deleted, where an output of the same shape takes its place. Default
            nothing.

    Returns:
        An `optax.GradientTransformationExtraArgs`; `update(grads, state, params=None,
        **extra)`. Its `runs` are the plans made so far.

    Raises:
        TypeError: `tx` is no transformation; `init` or `update` of placed parameters
            inside `jax.jit`.
        ValueError: `init` or `update` of parameters that are not placed; a state of
            another partition, of other parameters or on other devices.

    Example:
        >>> import optax, fpipe.optim
        >>> dense = fpipe.Layer(lambda w, x: jnp.tanh(x @ w), init=lambda key, x: jax.random.normal(key, (3, 3)))
        >>> pipe = fpipe.Pipe([dense, dense], devices=[jax.devices()[0]] * 2, chunks=4)
        >>> x = jnp.ones((8, 3))
        >>> params = pipe.init(jax.random.key(0), x)
        >>> tx = fpipe.optim.per_stage(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), donate=["state"])
        >>> state = tx.init(params)
        >>> loss, grads = pipe.value_and_grad(lambda y, t: jnp.mean((y - t) ** 2))(params, x, x)
        >>> updates, state = tx.update(grads, state, params)
        >>> params = fpipe.optim.apply_updates(params, updates, donate=["params"])
    """
    _check_transformation("per_stage(tx)", tx)
    engine = _Engine(
        optax.with_extra_args_support(tx), frozen, _names("per_stage", donate, _DONATE)
    )
    update: Any = engine.update
    return PerStage(engine.init, update)


def _check_transformation(call: str, tx: Any) -> None:
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(
            f"`{call}`: an optax.GradientTransformation, such as `optax.adam(1e-3)`, "
            f"got {tx!r}"
        )


def _names(call: str, donate: Any, known: tuple[str, ...]) -> tuple[str, ...]:
    names = (donate,) if isinstance(donate, str) else tuple(donate)
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ValueError(
            f"`{call}(donate={donate!r})`: some of {', '.join(map(repr, known))}; "
            f"{wrong[0]!r} is none"
        )
    return names


def _visible(tree: PyTree) -> PyTree:
    """Without `float0` arrays, which `jax.jit` refuses: what has none of these as a
    gradient is passed over anyhow.
    """
    return jax.tree.map(
        lambda a: (
            np.zeros((), bool) if getattr(a, "dtype", None) == jax.dtypes.float0 else a
        ),
        tree,
    )


def _refuse(call: str) -> None:
    if not only_shapes():
        raise TypeError(
            f"`{call}` was called inside `jax.jit` (or another tracing transformation) "
            "with parameters that are no "
            'fpipe.Packed: with executor="placed" they are on several devices, and the '
            "update cannot be part of one program. "
            "Call it outside of jit (its programs are compiled all the same), or use "
            '`Pipe(..., executor="scan")`'
        )


_plans = Recent(_KEPT)


def apply_updates(
    params: PyTree, updates: PyTree, donate: Iterable[str] = ()
) -> PyTree:
    """`optax.apply_updates`, compiled, on the devices of the parameters.

    Arguments:
        params: parameters, placed or packed.
        updates: of the same structure. Where one is not a JAX array (`per_stage` gives
            a 0-d numpy zero for frozen and integer parameters), the parameter is handed
            on as it is.

    Other Arguments:
        donate: what may be reused the memory of: `"params"`, `"updates"`, or both; it
            is deleted. Default nothing.

    Returns:
        The new parameters.

    Raises:
        TypeError: placed parameters inside `jax.jit`.
        ValueError: not of the same structure, or parameters that are not placed.

    Example:
        >>> import fpipe.optim
        >>> params = jax.device_put((jnp.ones(2), jnp.ones(3)), jax.devices()[0])
        >>> fpipe.optim.apply_updates(params, (jnp.ones(2), np.zeros(())))
        (Array([2., 2.], dtype=float32), Array([1., 1., 1.], dtype=float32))
    """
    names = _names("apply_updates", donate, _DONATE_APPLY)
    leaves, treedef = jax.tree.flatten(params)
    try:
        changes = treedef.flatten_up_to(updates)
    except ValueError as error:
        raise ValueError(
            f"`apply_updates(params, updates)`: they have different structures: {error}"
        ) from error
    moving = [
        n
        for n, u in enumerate(changes)
        if isinstance(u, jax.Array) and is_array(leaves[n]) and is_inexact(leaves[n])
    ]
    p, u = map_arrays(
        strong, ([leaves[n] for n in moving], [changes[n] for n in moving])
    )
    packed = any_packed(params)
    if packed and is_traced((p, u)):
        made = _add(p, u)
    elif packed:
        made = _jitted("params" in names, "updates" in names)(p, u)
    else:
        if is_traced((p, u)):
            _refuse("fpipe.optim.apply_updates")
            made = _add(p, u)
        else:
            homes = _homes(
                p,
                [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]],
                moving,
            )
            flags = ["params" in names] * len(p) + ["updates" in names] * len(u)
            key = Key(("apply", tuple(map(form, p)), tuple(map(form, u)), names))
            half = len(p)
            run = _plans.get(
                key,
                lambda: plan(
                    lambda *a: _add(a[:half], a[half:]),
                    [*p, *u],
                    [*homes, *map(device_of, u)],
                    lambda _: homes,
                    first_devices(homes),
                    flags,
                    lambda n, k: False,
                ),
            )
            made = run([*p, *u])
    for n, new in zip(moving, made, strict=True):
        leaves[n] = new
    return treedef.unflatten(leaves)


def _add(params: Any, updates: Any) -> list[Any]:
    made: Any = optax.apply_updates(list(params), list(updates))
    return made


@functools.cache
def _jitted(params: bool, updates: bool) -> Callable[..., list[Any]]:
    return jax.jit(
        _add,
        donate_argnums=tuple(n for n, given in enumerate((params, updates)) if given),
    )


def _homes(arrays: list[Any], paths: list[Any], numbers: list[int]) -> list[Any]:
    homes = [device_of(a) for a in arrays]
    for n, home in zip(numbers, homes, strict=True):
        if home is None:
            raise ValueError(
                f"`apply_updates`: the parameter {named('params', paths[n])} is not "
                "placed: it is not committed to one device; "
                "place parameters with `pipe.place(params)`"
            )
    return homes


def global_norm(tree: PyTree) -> Any:
    """The square root of the sum of all squares: `optax.tree.norm` of leaves on several
    devices.

    Arguments:
        tree: gradients, updates or parameters, placed or packed; integers and `float0`
            are passed over.

    Returns:
        A scalar; on the device of the first leaf if they are placed. The stages' sums
        run on their own devices.

    Raises:
        TypeError: placed arrays inside `jax.jit`.

    Example:
        >>> import fpipe.optim
        >>> print(fpipe.optim.global_norm((jnp.full(2, 2.0), jnp.full(2, 2.0))))
        4.0
    """
    return _number_of("fpipe.optim.global_norm", optax.tree.norm, tree)


def all_finite(tree: PyTree) -> Any:
    """Whether no leaf has a NaN or an infinity, of leaves as for `global_norm`. A norm
    would not tell: squares overflow.
    """
    return _number_of("DynamicLossScale.adjusted", _finite, tree)


def _finite(arrays: Sequence[Any]) -> Any:
    return functools.reduce(
        jnp.logical_and, [jnp.isfinite(a).all() for a in arrays], jnp.bool_(True)
    )


def _number_of(name: str, f: Callable[[Sequence[Any]], Any], tree: PyTree) -> Any:
    """A number that is made from the leaves that can be trained, on the device of the
    first one if they are placed.
    """
    arrays = [a for a in jax.tree.leaves(tree) if is_array(a) and is_inexact(a)]
    if any_packed(tree) or not arrays:
        return f(arrays)
    if is_traced(arrays):
        _refuse(name)
        return f(arrays)
    homes = [device_of(a) for a in arrays]
    devices = first_devices([d for d in homes if d is not None])
    key = Key((name, tuple(map(form, arrays))))
    run = _plans.get(
        key,
        lambda: plan(
            lambda *a: [f(a)],
            arrays,
            homes,
            lambda _: devices[:1],
            devices,
            [False] * len(arrays),
            lambda n, k: False,
        ),
    )
    return run(arrays)[0]


def gather(state: PyTree) -> PyTree:
    """An optimizer state as plain optax has it for `pipe.gather(params)`: nothing
    packed, all on one device.

    So a checkpoint of one partition or executor is loaded in another:
    `place(gather(state), params, tx)`.

    Arguments:
        state: of `per_stage`, or of plain optax over an `fpipe.Packed`.

    Returns:
        The state, every array on the device of the first, or on the first of the mesh.
        With a mesh over several processes it is on every device.
    """
    (arrays, spec), mesh = pack(state), mesh_of(state)
    if not all(a.is_fully_addressable for a in arrays if isinstance(a, jax.Array)):
        return _replicated(arrays, spec, mesh)
    arrays, spec = pack(unpacked(state))
    if mesh is not None:
        return spec.unpack(jax.device_put(arrays, mesh.devices.flat[0]))
    devices = [d for a in arrays if isinstance(a, jax.Array) for d in a.devices()]
    return spec.unpack(jax.device_put(arrays, devices[0]) if devices else arrays)


def _replicated(arrays: list[Any], spec: Any, mesh: Any) -> PyTree:
    """Unpacked on every device: no process may take a block of another one by itself."""
    if mesh is None:
        return spec.unpack(
            arrays
        )  # nothing is packed, and what is not is whole on every device
    made: list[Any] = []

    def unpack(arrays: list[Any]) -> list[Any]:
        out, spec_out = pack(unpacked(spec.unpack(arrays)))
        made.append(spec_out)
        return out

    def compiled() -> tuple[Any, Any]:
        whole = NamedSharding(mesh, PartitionSpec())
        run = jax.jit(unpack, out_shardings=whole).lower(arrays).compile()
        return run, made[-1]

    key = Key(
        (
            "gather",
            spec,
            tuple((a.shape, a.dtype, getattr(a, "sharding", None)) for a in arrays),
            mesh,
        )
    )
    run, out = _plans.get(key, compiled)
    return out.unpack(run(arrays))


def place(state: PyTree, params: PyTree, tx: Any = None) -> PyTree:
    """Put an optimizer state where `per_stage(tx).init(params)` has it: the inverse of
    `gather`.

    Arguments:
        state: from `gather`, from plain optax on `pipe.gather(params)` (without
            `frozen` and integers), or of another partition. Numpy arrays too, as a
            checkpoint has them.
        params: parameters, placed or packed.
        tx: the transformation that the state is of: then a state of another one, or of
            another model, is refused. Default not looked at.

    Returns:
        The state, on its parameters' devices, or packed.

    Raises:
        TypeError: `tx` is no transformation.
        ValueError: parameters that are not placed; a state that is not of `tx` and
            these parameters.
    """
    state = unpacked(state)
    if tx is not None:
        _check_of(tx, state, params)
    if any_packed(params):
        mesh = mesh_of(params)
        arrays, spec = pack(state)
        if mesh is not None and not is_traced((state, params)):
            arrays = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))
        forms = templates(params)
        return jax.jit(lambda a: packed_state(spec.unpack(a), forms, mesh))(arrays)
    named_leaves = [
        (path, a)
        for path, a in jax.tree_util.tree_flatten_with_path(params)[0]
        if is_array(a)
    ]
    homes = _homes(
        [a for _, a in named_leaves],
        [path for path, _ in named_leaves],
        list(range(len(named_leaves))),
    )
    first = first_devices(homes)[0]
    own = owners([path for path, _ in named_leaves], state)
    leaves, treedef = jax.tree.flatten(state)
    put = [
        jax.device_put(a, first if n is None else homes[n]) if is_array(a) else a
        for n, a in zip(own, leaves, strict=True)
    ]
    return treedef.unflatten(put)


_OTHER = "load it with the model and the transformation that it was saved with, or begin anew with `tx.init(params)`"


def _check_of(tx: Any, state: PyTree, params: PyTree) -> None:
    """Refuse an unpacked state that is not of a transformation and parameters."""
    call = "fpipe.optim.place(state, params, tx)"
    _check_transformation(call, tx)
    seen = _shapes_unpacked(params)
    if isinstance(tx, PerStage):
        engine: Any = getattr(tx.init, "__self__", None)
        chosen = Chosen.of(seen, engine.frozen)
        tx, seen = engine.tx, chosen.seen(chosen.select(jax.tree.leaves(seen)))
    check_state(tx, seen, state, _OTHER, call)


def _shapes_unpacked(params: PyTree) -> PyTree:
    """The shapes of parameters, packed or not, without their values."""
    return shapes_of(
        jax.tree.map(
            lambda node: node.packing.whole if is_packed(node) else node,
            params,
            is_leaf=is_packed,
        )
    )
