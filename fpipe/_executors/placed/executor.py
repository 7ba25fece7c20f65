"""The placed executor's calls: plans made once for each kind of call and kept, inputs
put in, outputs taken out.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from fpipe._core.caches import Key, Recent
from fpipe._core.errors import warn
from fpipe._core.pytrees import (
    PyTree,
    Shape,
    fill_gradient,
    float0_like,
    is_array,
    is_inexact,
    is_traced,
    map_arrays,
    pack,
)
from fpipe._executors.call import Args, Result, check_params
from fpipe._executors.placed.compile import Progress
from fpipe._executors.placed.dispatch import Bound, Dispatch, bind
from fpipe._executors.placed.instructions import Half, Plan
from fpipe._executors.placed.lower import lower
from fpipe._executors.placement import Placement
from fpipe._executors.programs import Inputs, Layout, Request
from fpipe._executors.request import (
    check_backwards,
    inputs_of,
    numbered_leaves,
    outer_leaves,
    schedule_of,
    settings,
    wanted_leaves,
)
from fpipe._executors.scheduling import Scheduling
from fpipe._executors.tracers import refuse_tracers
from fpipe._model.loss import Loss
from fpipe._model.remat import Remat
from fpipe._model.stages import KEY, SIDE, TARGETS, Leaf, Port, X
from fpipe.schedules import Schedule

# Plans, and programs that do not depend on a loss, that one pipe keeps: enough for a
# training loop with several batch shapes and losses; few enough that a new `loss_fn` at
# each step (which compiles anew each time) does not pile up.
_PLANS, _PROGRAMS = 32, 1024


class Placed:
    """The placed executor of one pipe: plans by the types of what a call is given."""

    def __init__(
        self,
        layout: Layout,
        scheduling: Scheduling,
        map_: tuple[int, ...],
        remat: Remat,
        chunks: int,
        dispatch: Dispatch,
        kept: Recent | None = None,
    ) -> None:
        """`kept` has the traces and programs of other pipes of the same layers, if it
        is shared with them.
        """
        self.layout = self.owner = layout
        self._dispatch: Dispatch = dispatch
        self.scheduling, self.stage_to_device, self.chunks = scheduling, map_, chunks
        self._remat = remat
        self._bound, self._kept = (
            Recent(_PLANS),
            Recent(_PROGRAMS) if kept is None else kept,
        )
        self._constants: dict[tuple[Any, Placement], Any] = {}

    def make(self, layer: int, f: Callable[[Any], PyTree], key: Any) -> PyTree:
        """Run `f(key)` where a layer belongs."""
        place = self.layout.home(layer)
        with jax.default_device(place.device):  # which does not move a committed key
            return place.put_tree(f(None if key is None else place.put([key])[0]))

    make_state = make

    def place(self, params: Sequence[PyTree]) -> tuple[PyTree, ...]:
        """The parameters of each layer on its device."""
        return tuple(self.layout.home(k).put_tree(p) for k, p in enumerate(params))

    def gather(self, params: Sequence[PyTree]) -> tuple[PyTree, ...]:
        """The parameters on the first device."""
        return tuple(self.layout.home(0).put_tree(p) for p in params)

    def check(self, params: Any, call: str) -> None:
        """Refuse parameters that do not have one entry per layer. Where they are is
        looked at when a plan is.
        """
        check_params(self.layout.stages[0].model, params, call)

    def forward(self, args: Args) -> tuple[PyTree, tuple[PyTree, ...]]:
        """`(y, state)`; under `jax.grad` and `jax.vjp` as a `custom_vjp`."""
        if is_traced(args):
            return self._differentiable(args)
        bound, slots = self._start("forward", args, None, ())
        slots = bound.run(slots)
        assert bound.plan.y is not None
        return bound.plan.y.read(slots), self._state(bound.plan, slots)

    def loss(self, args: Args, loss: Loss, argnums: tuple[int, ...]) -> Result:
        """The loss, and the gradients of the numbered arguments."""
        refuse_tracers(args)
        bound, slots = self._start("grad" if argnums else "loss", args, loss, argnums)
        plan, slots = bound.plan, bound.run(slots)
        assert plan.loss is not None
        numbered = numbered_leaves(_counts(args), args)
        gradients = []
        for n in argnums:
            arrays, spec = pack(args.numbered[n])
            found = [
                slots[plan.gradients[leaf]] if leaf in plan.gradients else None
                for leaf in numbered[n]
            ]
            gradients.append(fill_gradient(spec, arrays, found))
        aux = plan.aux.read(slots) if plan.aux else None
        return Result(
            plan.loss.read(slots), aux, self._state(plan, slots), tuple(gradients)
        )

    def schedule(self, microbatches: int) -> Schedule:
        """The schedule for that many microbatches, checked against the model."""
        return schedule_of(
            self.scheduling, self.stage_to_device, self.layout.stages, microbatches
        )

    def _differentiable(self, args: Args) -> tuple[PyTree, tuple[PyTree, ...]]:
        """All forwards in the schedule's order, and a pull-back with all backwards in
        its order.
        """
        key, state = map_arrays(jax.lax.stop_gradient, (args.key, args.state))
        arrays, spec = pack((args.params, args.x, args.side))
        made: list[Any] = []

        def given(values: Sequence[Any]) -> Args:
            params, x, side = spec.unpack(values)
            full = args._replace(params=params, x=x, side=side, key=key, state=state)
            refuse_tracers(full)
            return full

        def primal(*values: Any) -> list[Any]:
            flat, out = pack(self.forward(given(values)))
            made.append(out)
            return flat

        def forward(*primals: Any) -> tuple[list[Any], Any]:
            values = [p.value for p in primals]
            full = given(values)
            asked = tuple(
                bool(p.perturbed) and is_inexact(v)
                for p, v in zip(primals, values, strict=True)
            )
            bound, slots = self._start("vjp", full, None, asked)
            slots = bound.run(slots, Half.FORWARD)
            assert bound.plan.y is not None
            flat, out = pack((bound.plan.y.read(slots), self._state(bound.plan, slots)))
            made.append(out)
            # A pull-back may run twice: it starts from these each time, and donates
            # none of them.
            kept = {n: slots[n] for n in bound.kept}
            return flat, (
                list(kept.values()),
                _PullBack(
                    bound,
                    tuple(kept),
                    _float0s(values),
                    outer_leaves(_counts(full), full),
                ),
            )

        def backward(residual: Any, cotangents: Any) -> tuple[Any, ...]:
            refuse_tracers(cotangents)
            values, pull_back = residual
            return pull_back(values, cotangents)

        f = jax.custom_vjp(primal)
        f.defvjp(forward, backward, symbolic_zeros=True)
        try:
            flat = f(*arrays)
        except TypeError as error:
            if "custom_vjp" in str(error):  # JAX's own refusal of forward mode
                error.add_note(
                    "fpipe: a placed Pipe supports `jax.grad`, `jax.vjp` and "
                    "`jax.value_and_grad`; `fpipe.sequential` "
                    "supports every transformation"
                )
            raise
        return made[-1].unpack(flat)

    def compile(
        self,
        args: Args,
        loss: Loss | None,
        argnums: tuple[int, ...],
        threads: int | None,
        progress: Progress | None,
    ) -> int:
        """Compile the programs of a call; arrays or their shapes will do. Returns how
        many there are.
        """
        return self.bound(args, loss, argnums).compile(threads, progress)

    def bound(self, args: Args, loss: Loss | None, argnums: tuple[int, ...]) -> Bound:
        """The plan of a call, ready to run; arrays or their shapes will do."""
        refuse_tracers(args)
        mode = "forward" if loss is None else "grad" if argnums else "loss"
        return self._found(mode, args, loss, argnums, _type_or_shape)[0]

    def _start(
        self, mode: Any, args: Args, loss: Loss | None, asked: tuple[Any, ...]
    ) -> tuple[Bound, list[Any]]:
        """The bound plan of a call, and slots with the inputs in them."""
        bound, params, others = self._found(mode, args, loss, asked, _type)
        if any(
            not isinstance(a, jax.Array) or a.sharding != p.sharding
            for a, p in zip(params, bound.params, strict=True)
        ):
            self._check_params(args.params)
        slots = bound.slots(
            params, {port: arrays for port, (arrays, _) in others.items()}
        )
        # Concrete arguments inside a trace (a closed-over batch in a jitted function)
        # become tracers here.
        refuse_tracers([slots[n] for put in bound.transfers for n in put.slots])
        return bound, slots

    def _found(
        self,
        mode: Any,
        args: Args,
        loss: Loss | None,
        asked: tuple[Any, ...],
        type_of: Callable[[Any], Any],
    ) -> tuple[Bound, list[Any], Any]:
        """The bound plan of a call, from the cache or new; its parameters, and its
        other inputs by port.
        """
        params, params_def = jax.tree.flatten(args.params)
        others = {X: pack(args.x), SIDE: pack(args.side), TARGETS: pack(args.targets)}
        if args.key is not None:
            others[KEY] = pack(args.key)
        if args.state is not None:
            others |= {
                Port("state", k): pack(args.state[k])
                for s in self.layout.stages
                for k in s.stateful
            }
        identity = (
            settings(),
            mode,
            args.train,
            args.frozen,
            loss,
            asked,
            params_def,
            tuple([type_of(a) for a in params]),
            tuple(
                [
                    (port, spec, tuple([type_of(a) for a in arrays]))
                    for port, (arrays, spec) in others.items()
                ]
            ),
        )
        try:
            key = Key(identity)
        except TypeError as error:
            static = [
                leaf
                for leaf in (
                    *params,
                    *(v for _, spec in others.values() for _, v in spec.static),
                )
                if not is_array(leaf)
            ]
            raise TypeError(
                f"static leaves must be hashable, among {static!r}: {error}"
            ) from error
        bound = self._bound.get(key, lambda: self._new(mode, args, loss, asked))
        return bound, params, others

    def _new(
        self, mode: Any, args: Args, loss: Loss | None, asked: tuple[Any, ...]
    ) -> Bound:
        self._check_params(args.params)
        plan, inputs = self._plan(mode, args, loss, asked)
        for text in plan.warnings:
            warn(text)
        return bind(plan, self.layout, inputs, self._dispatch, self._constant)

    def _plan(
        self, mode: Any, args: Args, loss: Loss | None, asked: tuple[Any, ...]
    ) -> tuple[Plan, Inputs]:
        inputs = inputs_of(args, [Shape.of(p) for p in args.params], self.chunks)
        if mode == "vjp":
            leaves = [
                leaf
                for leaf, a in zip(
                    outer_leaves(_counts(args), args), asked, strict=True
                )
                if a
            ]
        else:
            numbered = numbered_leaves(_counts(args), args)
            leaves = [leaf for n in asked for leaf in numbered[n]]
        wanted = wanted_leaves(inputs, leaves, args.frozen)
        schedule = self.schedule(inputs.cut.m)
        if mode in ("grad", "vjp"):
            check_backwards(schedule)
        request = Request(mode, args.train, loss, wanted, settings())
        return lower(
            self.layout, schedule, self._remat, inputs, request, self._kept
        ), inputs

    def _constant(self, value: Any, placement: Placement) -> Any:
        """A host value where it is read, put there once for all plans."""
        if (value, placement) not in self._constants:
            (placed,) = placement.put([value])
            refuse_tracers(placed)
            self._constants[value, placement] = placed
        return self._constants[value, placement]

    def _check_params(self, params: Sequence[PyTree]) -> None:
        for stage in self.layout.stages:
            for k in stage.span:
                place, layer = (
                    self.layout.home(k),
                    f"params of layer {k} {stage.model.layers[k].name!r}",
                )
                for a in jax.tree.leaves(params[k]):
                    if not is_array(a):
                        raise TypeError(
                            f"{layer} hold {a!r}, no array; `params = "
                            "pipe.place(params)` makes arrays of numbers, and what is "
                            "fixed belongs into the layer's function "
                            "(functools.partial)"
                        )
                    if not isinstance(a, jax.ShapeDtypeStruct) and not place.holds(a):
                        where = (
                            ", ".join(map(str, a.devices()))
                            if isinstance(a, jax.Array)
                            else f"the host ({type(a)})"
                        )
                        raise ValueError(
                            f"{layer} are on the wrong device: {where}, but stage "
                            f"{stage.index} is on {place}; put "
                            "them there with `params = pipe.place(params)`"
                        )

    def _state(self, plan: Plan, slots: Sequence[Any]) -> tuple[PyTree, ...]:
        layers = range(sum(len(s.span) for s in self.layout.stages))
        return tuple(
            plan.state[k].read(slots) if k in plan.state else None for k in layers
        )


@dataclasses.dataclass(frozen=True)
class _PullBack:
    """The backward half of a differentiated call.

    Attributes:
        bound: the plan.
        slots: where the kept values go.
        zeros: for each argument its `float0`, or `None` where a symbolic zero will do.
        leaves: the arguments' leaves.
    """

    bound: Bound
    slots: tuple[int, ...]
    zeros: tuple[Any, ...]
    leaves: tuple[Leaf, ...]

    def __call__(
        self, values: Sequence[Any], cotangents: Sequence[Any]
    ) -> tuple[Any, ...]:
        """The gradients of the arguments."""
        plan, slots = self.bound.plan, list(self.bound.initial)
        for n, v in zip(self.slots, values, strict=True):
            slots[n] = v
        assert plan.y is not None
        shapes = plan.y.shape.leaves
        given = [
            _instantiated(c, a)
            for c, a in zip(cotangents, shapes, strict=False)
            if is_inexact(a)
        ]
        if given:
            place = plan.slots[plan.cotangents[0]].placement
            for n, v in zip(plan.cotangents, place.put(given), strict=True):
                slots[n] = v
        slots = self.bound.run(slots, Half.BACKWARD)
        return tuple(
            slots[plan.gradients[leaf]] if leaf in plan.gradients else zero
            for leaf, zero in zip(self.leaves, self.zeros, strict=True)
        )

    # `custom_vjp` carries it as a static leaf; it is equal to nothing but itself.
    __eq__ = object.__eq__
    __hash__ = object.__hash__


jax.tree_util.register_static(_PullBack)


def _float0s(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(None if is_inexact(v) else float0_like(v) for v in values)


def _instantiated(cotangent: Any, shape: jax.ShapeDtypeStruct) -> Any:
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return jax.numpy.zeros(shape.shape, shape.dtype)
    return cotangent


def _counts(args: Args) -> list[int]:
    """How many arrays each layer's parameters have."""
    return [len(pack(p)[0]) for p in args.params]


def _type(a: Any) -> Any:
    """What a program is specialised on."""
    if isinstance(a, jax.Array):
        return a.aval
    if isinstance(a, jax.ShapeDtypeStruct):
        raise TypeError(
            f"a Pipe was called with the shape {a} in place of an array; use "
            "`jax.eval_shape` for shapes"
        )
    return jax.typeof(a) if is_array(a) else a


def _type_or_shape(a: Any) -> Any:
    """`_type`, and for a shape that of an array of it."""
    return (
        jax.make_jaxpr(lambda a: a)(a).in_avals[0]
        if isinstance(a, jax.ShapeDtypeStruct)
        else _type(a)
    )
