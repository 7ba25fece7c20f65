"""`per_stage`: any optax transformation for the parameters of a pipe.

In: a transformation. Out: a transformation whose `init` and `update` take the trees of
a pipe. These are trees with leaves on several devices (`_placed.py`), or with
`fpipe.Packed` nodes (`_scan.py`). Adam on two layers, one on each device:

    params    (w0 on cpu:0, w1 on cpu:1)
    state     mu (on cpu:0, on cpu:1), nu the same, count on cpu:0
    updates   (on cpu:0, on cpu:1)

Both modules trace the given transformation on whole leaves (`_traced.py`) and divide
the trace over the devices (`_partition.py`).
"""

from collections.abc import Iterable
from types import MethodType
from typing import Any

import jax
import optax

from fpipe._core.caches import Key, Recent
from fpipe._core.meshes import AnyMesh
from fpipe._core.pytrees import (
    Bundle,
    PyTree,
    is_traced,
    map_arrays,
    numbers_as_arrays,
    pack,
    strong,
)
from fpipe._core.settings import settings
from fpipe._model.frozen import Frozen, check_frozen
from fpipe.optim import _placed, _scan
from fpipe.optim._blocks import on_whole_leaves
from fpipe.optim._dispatch import PlacedFunction
from fpipe.optim._leaf_devices import array_form, refuse_tracers
from fpipe.optim._packed import any_packed, mesh_of, off_callers_mesh
from fpipe.optim._seen_leaves import SeenLeaves, check_donate, check_transformation

# How many plans a transformation keeps: one for each form of its arguments.
_KEPT_PLANS = 32

# The arguments that `update` may overwrite. Never the parameters: `apply_updates` still
# needs them.
_DONATABLE = ("state", "grads")


class PerStage(optax.GradientTransformationExtraArgs):
    """The result of `per_stage`: an `optax.GradientTransformationExtraArgs`.

    Its property `runs` shows the plans that it has made.
    """

    @property
    def runs(self) -> list[PlacedFunction]:
        """The plans made so far for placed parameters.

        For each plan, `run.cut.moves` lists the values that cross devices in a call.
        """
        return [planned.run for planned in engine_of(self).plans.values()]


def engine_of(tx: PerStage) -> "Engine":
    """What `init` and `update` of a transformation are methods of."""
    # A transformation is a tuple of two functions, and stays one when it is copied or
    # pickled: it has no other place for what both share.
    assert isinstance(tx.init, MethodType)
    engine = tx.init.__self__
    assert isinstance(engine, Engine)
    return engine


class Engine:
    """`init` and `update` of a transformation, on whatever they are given.

    Arguments:
        tx: the transformation, which takes extra arguments.
        frozen: which parameters are not trained.
        donate: what `update` may overwrite.
    """

    def __init__(
        self,
        tx: optax.GradientTransformationExtraArgs,
        frozen: Frozen | None,
        donate: tuple[str, ...],
    ) -> None:
        self.tx = tx
        self.frozen = frozen
        self.donate = donate
        self.plans = Recent(_KEPT_PLANS)
        # Compiled once for each transformation: `jax.jit` keeps its programs by the
        # function that it is given, and each `jit` of a new function would compile
        # again.
        positions = {"grads": 0, "state": 1}
        self._init_compiled = jax.jit(self._init_packed, static_argnums=1)
        self._update_compiled = jax.jit(
            self._update_packed,
            donate_argnums=tuple(sorted(positions[name] for name in donate)),
        )

    @off_callers_mesh
    def init(self, params: PyTree) -> PyTree:
        """The initial state."""
        # Three kinds of call: packed parameters, inside of a trace or not; placed ones
        # in `jax.eval_shape`, where only shapes are wanted; placed ones, which is the
        # usual one.
        if any_packed(params):
            mesh = mesh_of(params)
            if is_traced(params):
                return _scan.init(self.tx, params, self.frozen, mesh)
            return self._init_compiled(Bundle.of(params), mesh)
        if is_traced(params):
            refuse_tracers("per_stage(tx).init")
            seen = SeenLeaves.of(params, self.frozen)
            leaves = seen.select(jax.tree.leaves(params))
            return numbers_as_arrays(self.tx.init(seen.seen_tree(leaves)))
        # Without weak types: updated parameters have none, and with them the second
        # step would be another form than the first, and be traced and compiled again.
        params = map_arrays(strong, params)
        arrays, spec = pack(params)
        planned = self.plans.get(
            Key(("init", settings(), spec, tuple(map(array_form, arrays)))),
            lambda: _placed.plan_init(self.tx, params, self.frozen),
        )
        return planned.init(params)

    @off_callers_mesh
    def update(
        self, grads: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """Updates and the next state."""
        # A learning rate given as `0.1` is an array too, or each value of it would be
        # static and have a plan of its own.
        extra = numbers_as_arrays(extra)
        traced = is_traced((grads, state, params, extra))
        if any_packed((grads, params)):
            if traced:
                return _scan.update(self.tx, grads, state, params, extra, self.frozen)
            parts = (grads, state, params, extra)
            bundles = [Bundle.of(_float0_as_static(part)) for part in parts]
            return self._update_compiled(*bundles)
        if traced:
            refuse_tracers("per_stage(tx).update")
            return self._update_shapes(grads, state, params, extra)
        grads, state, params = map_arrays(strong, (grads, state, params))
        # The plan is kept by all that its trace depends on: JAX's settings, the
        # structures with their static leaves, and the form of each array. The
        # transformation is not in the key, because the plans are its own.
        packs = [pack(part) for part in (grads, state, params, extra)]
        forms = [(spec, tuple(map(array_form, arrays))) for arrays, spec in packs]
        planned = self.plans.get(
            Key((settings(), *forms)),
            lambda: _placed.plan_update(
                self.tx, grads, state, params, extra, self.frozen, self.donate
            ),
        )
        return planned.update(grads, packs[1][0], params, packs[3][0])

    def _update_shapes(
        self, grads: PyTree, state: PyTree, params: PyTree, extra: dict[str, Any]
    ) -> tuple[PyTree, PyTree]:
        """`update` inside of `jax.eval_shape`: nothing runs, so nothing is divided."""
        like = grads if params is None else params
        leaves = jax.tree.leaves(like)
        seen = SeenLeaves.of(like, self.frozen)
        updates, new = self.tx.update(
            seen.seen_tree(seen.select_gradients(grads)),
            state,
            None if params is None else seen.seen_tree(seen.select(leaves)),
            **extra,
        )
        whole = seen.whole_tree(jax.tree.leaves(updates), leaves)
        return whole, numbers_as_arrays(new)

    def _init_packed(self, params: Bundle, mesh: AnyMesh | None) -> PyTree:
        return _scan.init(self.tx, params.tree, self.frozen, mesh)

    def _update_packed(
        self, grads: Bundle, state: Bundle, params: Bundle, extra: Bundle
    ) -> tuple[PyTree, PyTree]:
        return _scan.update(
            self.tx, grads.tree, state.tree, params.tree, extra.tree, self.frozen
        )


def per_stage(
    tx: optax.GradientTransformation,
    frozen: Frozen | None = None,
    donate: Iterable[str] = (),
) -> PerStage:
    """An optax transformation that updates a pipe's parameters on their own devices.

    It computes what `tx` computes on `pipe.gather(params)`. Transformations that read a
    whole leaf (LAMB, Adafactor, decay masks by rank) see the leaf in the shape that the
    layer knows. Transformations that read all parameters (clipping by the global norm)
    see the parameters of all stages. Parameters are any pytree; integers in it are not
    updated.

    With `executor="placed"`, `update` is traced once and cut into compiled programs
    that run on the devices of the parameters. Only numbers cross devices. A state of
    the shape of a parameter, such as a moment, is on the device of that parameter. Any
    other state (the count of steps, hyperparameters) is on the device of the first
    parameter, and each update copies it to the other devices. `update` cannot be called
    inside `jax.jit`.

    With `executor="scan"`, `update` can be called inside your own `jax.jit`. Outside,
    it is compiled by itself. Every part of the state with the structure of the
    parameters is an `fpipe.Packed`: each device holds and updates the state of its own
    stages, and only numbers cross devices. Optimizers that work element by element
    (SGD, Adam) do not need `per_stage` here: they take the `Packed` directly, if no
    parameter is frozen.

    Arguments:
        tx: the transformation.
        frozen: the parameters that are not trained, as for `pipe.value_and_grad`: a
            function `frozen(path, shape)` of a path such as `"0/w"` and a
            `jax.ShapeDtypeStruct`, or bools in the structure of the parameters or of
            its first levels (one per layer). A frozen parameter has no state, its
            update is zero, and its gradient may be `float0`. Default: none.

    Other Arguments:
        donate: the arguments whose memory `update` may reuse: `"state"`, `"grads"`, or
            both. An array is deleted if an output of the same shape takes its place.
            Default: none.

    Returns:
        A `PerStage`, which is an `optax.GradientTransformationExtraArgs`. Its update is
        `update(grads, state, params=None, **extra)`.

    Raises:
        TypeError: `tx` is no transformation, or `init` or `update` gets placed
            parameters inside `jax.jit`.
        ValueError: `init` or `update` gets parameters that are not placed. The state is
            of another partition, of other parameters or on other devices. A parameter
            has no gradient and is not `frozen`.

    Example:
        >>> import optax, fpipe.optim
        >>> def init(key, x):
        ...     return jax.random.normal(key, (3, 3))
        >>> dense = fpipe.Layer(lambda w, x: jnp.tanh(x @ w), init=init)
        >>> pipe = fpipe.Pipe([dense, dense], devices=[jax.devices()[0]] * 2, chunks=4)
        >>> x = jnp.ones((8, 3))
        >>> params = pipe.init(jax.random.key(0), x)
        >>> adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
        >>> tx = fpipe.optim.per_stage(adam, donate=["state"])
        >>> state = tx.init(params)
        >>> step = pipe.value_and_grad(lambda y, t: jnp.mean((y - t) ** 2))
        >>> loss, grads = step(params, x, x)
        >>> updates, state = tx.update(grads, state, params)
        >>> params = fpipe.optim.apply_updates(params, updates, donate=["params"])
    """
    check_transformation("per_stage(tx)", tx)
    check_frozen("per_stage", frozen)
    engine = Engine(
        on_whole_leaves(optax.with_extra_args_support(tx)),
        frozen,
        check_donate("per_stage", donate, _DONATABLE),
    )
    update: Any = engine.update
    return PerStage(engine.init, update)


def _float0_as_static(tree: PyTree) -> PyTree:
    """`float0` arrays, which `jax.jit` refuses, as their dtype alone, which is a static
    leaf.
    """
    float0 = jax.dtypes.float0
    return jax.tree.map(
        lambda a: float0 if getattr(a, "dtype", None) == float0 else a, tree
    )
