"""The placed executor of one pipe: a plan for each kind of call, made once and kept.

In: a call's `Args`. The arguments' structure, shapes and dtypes are the key of a plan:

    FORWARD of f32[8,4], 4 microbatches   -> plan 0: 12 instructions
    GRADIENT of f32[8,4], 4 microbatches  -> plan 1: 31 instructions
    GRADIENT of f32[6,4], 4 microbatches  -> plan 2: …

Out: what the plan's slots hold when its instructions have been issued: arrays that JAX
is still computing.

The loss function and the wanted gradients are part of the key too. Making a plan traces
every stage, so it takes long; a training loop finds its plan from the second step on.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax

from fpipe._core.caches import Key, Recent
from fpipe._core.cpu_threads import check_enough
from fpipe._core.errors import warn
from fpipe._core.meshes import is_explicit, no_mesh, set_aside
from fpipe._core.processes import own_copy
from fpipe._core.pytrees import (
    PyTree,
    Shape,
    Spec,
    is_array,
    is_inexact,
    pack,
    shapes_of,
)
from fpipe._core.settings import settings
from fpipe._executors.call import Args, Result, check_params
from fpipe._executors.placed.dispatch import Dispatch, ReadyPlan, bind
from fpipe._executors.placed.instructions import GradientTree, Half, Plan
from fpipe._executors.placed.lower import lower
from fpipe._executors.placed.parameters import Parameters
from fpipe._executors.placed.plan_data import plan_data
from fpipe._executors.placement import Placement
from fpipe._executors.plan_data import PlanData
from fpipe._executors.programs import Layout
from fpipe._executors.progress import Progress
from fpipe._executors.protocol import FirstHalf
from fpipe._executors.pull_back import differentiable_call, whole_cotangent
from fpipe._executors.request import (
    CallKind,
    Inputs,
    Request,
    check_backwards,
    check_consumed,
    check_donated,
    check_static,
    inputs_of,
    numbered_leaves,
    params_leaves,
    refuse_deleted,
    schedule_of,
    unmade_states,
    wanted_leaves,
)
from fpipe._executors.scheduling import Scheduling
from fpipe._executors.tracers import refuse_shapes, refuse_tracers
from fpipe._model.loss import Loss
from fpipe._model.microbatch import pieces
from fpipe._model.remat import Remat
from fpipe._model.stages import CALL_PORTS, Leaf, Port
from fpipe.schedules import Schedule

# Plans, and programs that do not depend on a loss, that one pipe keeps: enough for a
# training loop with several batch shapes and losses; few enough that a new `loss_fn` at
# each step (which compiles anew each time) does not pile up.
_PLANS = 32
_PROGRAMS = 1024

# Each input of a call: its arrays and their structure. Everything is flattened once,
# and programs take flat arrays: a dispatch with 50 arrays costs 20 µs so, and 55 µs
# with nested dicts (measured on jax 0.10.2, CPU).
Packs = Mapping[Port, tuple[list[Any], Spec]]


# Most calls give few of the needs: what is not given is packed once for all.
_NOTHING = pack(None)


class Asked(NamedTuple):
    """Which gradients a call asks for.

    Attributes:
        key: argument numbers, or a flag for each array. Its hash is part of the key of
            a plan, which each call makes; the leaves themselves take longer to hash.
        arguments: finds the leaves of each argument, for a new plan.
    """

    key: tuple[int, ...] | tuple[bool, ...]
    arguments: Callable[[], list[tuple[Leaf, ...]]]


class Placed:
    """The placed executor of one pipe; see `fpipe._executors.protocol.Executor`.

    Arguments:
        layout: the stages, and where each is.
        scheduling: what makes the schedule, when the number of microbatches is known.
        stage_to_device: for each stage the number of its device in the schedule.
        remat: which backwards recompute their forward.
        chunks: the number of microbatches asked for.
        dispatch: who dispatches.
        kept: the traces and programs of other pipes of the same layers, if they are
            shared with them: tuning tries many pipes of one model.
    """

    def __init__(
        self,
        layout: Layout,
        scheduling: Scheduling,
        stage_to_device: tuple[int, ...],
        remat: Remat,
        chunks: int,
        dispatch: Dispatch,
        kept: Recent | None = None,
    ) -> None:
        check_enough(place.sharding for place in layout.placements)
        self.layout = layout
        # Recordings tell pipes apart by the identity of this object.
        self.owner = layout
        self.stages = layout.stages
        self.parameters = Parameters(layout)
        self.scheduling = scheduling
        self.stage_to_device = stage_to_device
        self.chunks = chunks
        self._remat = remat
        self._dispatch: Dispatch = dispatch
        self._plans = Recent(_PLANS)
        self._programs = Recent(_PROGRAMS) if kept is None else kept
        self._constants: dict[tuple[Any, Placement], Any] = {}

    @property
    def is_over_processes(self) -> bool:
        """Whether a stage has devices of another process."""
        return self.layout.is_over_processes

    def schedule(
        self, microbatches: int, kind: CallKind = CallKind.GRADIENT
    ) -> Schedule:
        """The schedule of such a call with that many microbatches, checked against the
        model.
        """
        return schedule_of(
            self.scheduling, self.stage_to_device, self.stages, microbatches, kind
        )

    def context(self) -> AbstractContextManager[Any]:
        """The context of JAX in which it traces and runs, whatever is the caller's."""
        return set_aside()

    def tracing(self) -> AbstractContextManager[Any]:
        """The context of JAX in which layers are traced that are asked for their shapes
        or costs alone. The programs of a stage are traced in its own.
        """
        # Stages differ at most in which axes they have, and here no device counts: any
        # layer may name axes of the mesh with most of them.
        return max(self.layout.placements, key=_count_axes).tracing()

    # --- parameters ---

    def make_params(
        self, layer: int, make: Callable[[Any], PyTree], key: Any
    ) -> PyTree:
        """Run `make(key)` where a layer lives."""
        return self.parameters.make(layer, make, key)

    def make_state(self, layer: int, make: Callable[[Any], PyTree], key: Any) -> PyTree:
        """Run `make(key)` where a layer lives; over a mesh its state is whole on each
        device.
        """
        return self.parameters.make_state(layer, make, key)

    def place(self, params: Sequence[PyTree], donate: bool) -> tuple[PyTree, ...]:
        """The parameters of each layer on its device."""
        return self.parameters.place(params, donate)

    def gather(self, params: Sequence[PyTree]) -> tuple[PyTree, ...]:
        """The parameters on the first device of this process."""
        return self.parameters.gather(tuple(params))

    def check_params(self, params: Any, call: str) -> None:
        """Refuse parameters that do not have one entry per layer. Where they are is
        looked at when a plan is made, and when their shardings are not those of the
        plan.
        """
        check_params(self.stages[0].model, params, call)

    def param_shapes(self, params: Sequence[PyTree]) -> tuple[PyTree, ...]:
        """The shapes of placed parameters, one entry per layer."""
        return tuple(map(shapes_of, params))

    def param_leaves(self, params: Sequence[PyTree]) -> list[tuple[Leaf, ...]]:
        """Every array is one leaf."""
        return [(leaf,) for leaf in params_leaves(_counts(params))]

    # --- calls ---

    def bring(self, arrays: Sequence[Any]) -> list[Any]:
        """Inputs stay where they are: a plan moves them to the stages that read them.

        (`Scan` puts them on its mesh here, before the call is a `custom_vjp`.) But no
        array keeps explicit axes: they are a part of its type, and so its gradient
        would need them too.
        """
        return [self.layout.first.take([a])[0] if is_explicit(a) else a for a in arrays]

    def forward(self, args: Args) -> tuple[PyTree, tuple[PyTree, ...]]:
        """`(y, state)`."""
        bound, slots = self._start(CallKind.FORWARD, args, None, Asked((), list))
        bound.run(slots)
        assert bound.plan.y is not None
        return bound.plan.y.read(slots), self._state(bound.plan, slots)

    def differentiable(self, args: Args) -> tuple[PyTree, tuple[PyTree, ...]]:
        """`(y, state)` of a call with traced arguments."""
        return differentiable_call(self, args)

    def first_half(
        self, args: Args, leaves: Sequence[tuple[Leaf, ...]], asked: Sequence[bool]
    ) -> FirstHalf:
        """All forwards of the schedule, in its order."""

        # Placed parameters are plain arrays, so each holds one leaf. What JAX does not
        # differentiate is not wanted, and nothing is computed for it.
        def wanted() -> list[tuple[Leaf, ...]]:
            return [leaf for leaf, ask in zip(leaves, asked, strict=True) if ask]

        bound, slots = self._start(
            CallKind.PULL_BACK, args, None, Asked(tuple(asked), wanted)
        )
        bound.run(slots, Half.FORWARD)
        assert bound.plan.y is not None
        arguments = tuple(leaf for (leaf,) in leaves)
        return FirstHalf(
            bound.plan.y.read(slots),
            self._state(bound.plan, slots),
            [slots[n] for n in bound.residuals],
            _SecondHalf(bound, arguments),
        )

    def loss(self, args: Args, loss: Loss, argnums: tuple[int, ...]) -> Result:
        """The loss, and the gradients of the numbered arguments."""
        kind = CallKind.of(loss, argnums)
        bound, slots = self._start(kind, args, loss, _numbered(args, argnums))
        bound.run(slots)
        plan = bound.plan
        assert plan.loss is not None
        aux = _own(plan.aux.read(slots)) if plan.aux else None
        state = self._state(plan, slots)
        gradients = tuple([tree.read(slots) for tree in bound.gradients])
        return Result(_own(plan.loss.read(slots)), aux, state, gradients)

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
        return self.ready_plan(args, loss, argnums).compile(threads, progress)

    def ready_plan(
        self, args: Args, loss: Loss | None, argnums: tuple[int, ...]
    ) -> ReadyPlan:
        """The plan of a call, ready to run; arrays or their shapes will do."""
        kind = CallKind.of(loss, argnums)
        params = jax.tree.flatten(args.params)
        packs = self._packs(args)
        return self._find(kind, args, loss, _numbered(args, argnums), params, packs)

    def plan_data(
        self, args: Args, loss: Loss, argnums: tuple[int, ...], compiled: bool
    ) -> PlanData:
        """What a call with a loss tells for a prediction.

        Arguments:
            args: arrays or their shapes.
            compiled: whether to compile the programs, for the memory that they need.
        """
        bound = self.ready_plan(args, loss, argnums)
        return plan_data(bound, args, self.scheduling, self._remat, compiled)

    # --- without jit ---

    def collect(self, tree: PyTree) -> PyTree:
        """The caller's arrays on the first device of this process."""
        return self.layout.first.put_tree(tree, own=False)

    def gather_state(self, state: PyTree) -> PyTree:
        """The states of all layers on the first device of this process."""
        return self.parameters.gather(state)

    def deliver(self, tree: PyTree) -> PyTree:
        """Arrays on the device of the last stage."""
        return self.layout.placements[-1].put_tree(tree, own=True)

    def tell(self, tree: PyTree) -> PyTree:
        """Arrays on the device of the last stage, or on one of this process, if that is
        in another one.
        """
        last = self.layout.placements[-1]
        alone = last.processes == {jax.process_index()}
        return (last if alone else self.layout.first).put_tree(tree, own=True)

    def deliver_state(self, state: Sequence[PyTree]) -> tuple[PyTree, ...]:
        """The state of each layer on its device."""
        return tuple(
            self.layout.home(k).put_tree(s, own=True) for k, s in enumerate(state)
        )

    def spread(
        self, gradients: Sequence[PyTree], params: Sequence[PyTree]
    ) -> tuple[PyTree, ...]:
        """The gradients of each layer on its device."""
        return self.parameters.spread(gradients, params)

    # --- plans ---

    def _start(
        self, kind: CallKind, args: Args, loss: Loss | None, asked: Asked
    ) -> tuple[ReadyPlan, list[Any]]:
        """The bound plan of a call, and slots with the inputs in them."""
        params, params_def = jax.tree.flatten(args.params)
        packs = self._packs(args)
        flat_params = (params, params_def)
        # A process may have shapes of what it does not read; its plan knows which.
        refuse_shapes(params)
        if not self.layout.is_over_processes:
            refuse_shapes([a for arrays, _ in packs.values() for a in arrays])
        bound = self._find(kind, args, loss, asked, flat_params, packs)
        check_consumed(args)
        refuse_deleted(params)
        # The key of a plan has no shardings in it, because another sharding of the
        # right device (a mesh of one) must find the same plan. So they are compared
        # here, and only if one differs, all parameters are looked at closely.
        if not bound.are_placed(params):
            self.parameters.check_placed(args.params)
            # They may be on a mesh of the one device, whose axes are explicit.
            if any(map(is_explicit, params)):
                homes = [
                    self.layout.home(k)
                    for k, count in enumerate(_counts(args.params))
                    for _ in range(count)
                ]
                pairs = zip(homes, params, strict=True)
                params = [home.take([array])[0] for home, array in pairs]
            bound.shardings[:] = [array.sharding for array in params]
        slots = bound.slots(params, {port: pack[0] for port, pack in packs.items()})
        # Concrete arguments inside a trace (a closed-over batch in a jitted function)
        # become tracers here.
        refuse_tracers([slots[n] for put in bound.transfers for n in put.slots])
        return bound, slots

    def _packs(self, args: Args) -> Packs:
        """The inputs of a call, and its states, as flat arrays."""
        inputs = args.inputs
        packs = {
            port: _NOTHING if (tree := inputs[port.kind]) is None else pack(tree)
            for port in CALL_PORTS
        }
        if args.state is not None:
            for k in self.stages[0].model.stateful:
                packs[Port("state", k)] = pack(args.state[k])
        return packs

    def _find(
        self,
        kind: CallKind,
        args: Args,
        loss: Loss | None,
        asked: Asked,
        params: tuple[list[Any], Any],
        packs: Packs,
    ) -> ReadyPlan:
        """The bound plan of a call, from the cache or new.

        Arguments:
            params: their arrays, and their structure.
            packs: the other inputs, flat.
        """
        refuse_tracers([params[0], *[arrays for arrays, _ in packs.values()]])
        # Everything that a trace depends on. Static leaves are in the structures.
        # Settings of JAX belong to it, because a trace bakes them in: a call under
        # `jax.enable_x64` has another plan.
        try:
            key = Key(
                (
                    settings(),
                    kind,
                    args.frozen,
                    args.donate_state,
                    loss,
                    asked.key,
                    params[1],
                    _types(params[0]),
                    self.parameters.shardings(args.params),
                    tuple(
                        [
                            (port, spec, _types(arrays))
                            for port, (arrays, spec) in packs.items()
                        ]
                    ),
                )
            )
        except TypeError:
            # A leaf that is neither an array of JAX's nor hashable: this names it.
            check_static(args, args.params)
            raise
        return self._plans.get(key, lambda: self._make(kind, args, loss, asked))

    def _make(
        self, kind: CallKind, args: Args, loss: Loss | None, asked: Asked
    ) -> ReadyPlan:
        """A new plan, bound. This is where a call is checked against the model."""
        check_static(args, args.params)
        self.parameters.check_placed(args.params)
        model = self.stages[0].model
        params = [Shape.of(p) for p in args.params]
        inputs = inputs_of(model, args, params, self.chunks)
        for place in self.layout.placements:
            _check_rows(inputs, place)
        schedule = self.schedule(inputs.cut.m, kind)
        if kind.differentiates:
            check_backwards(schedule)
        arguments = asked.arguments()
        leaves = [leaf for argument in arguments for leaf in argument]
        wanted = wanted_leaves(kind, inputs, leaves, args.frozen)
        check_donated(kind, args, inputs, model)
        request = Request(kind, loss, wanted, settings(), args.donate_state)
        # In the context in which `init` traces the layers, so that they are not traced
        # again.
        with no_mesh():
            plan = lower(
                self.layout,
                schedule,
                self._remat,
                inputs,
                request,
                self._programs,
                dict(self.parameters.shardings(args.params)),
            )
        for text in (*plan.warnings, *unmade_states(kind, inputs, model)):
            warn(text)
        # The gradients in the structure of the arguments. A wanted leaf has none if it
        # is frozen, or an array of integers. (A pull-back gives them leaf by leaf.)
        gradients: list[GradientTree] = []
        if kind is CallKind.GRADIENT:
            for number, argument in zip(asked.key, arguments, strict=True):
                slots = tuple(plan.gradients.get(leaf) for leaf in argument)
                shape = Shape.of(args.arguments[number])
                gradients.append(GradientTree(shape, slots))
        return bind(
            plan,
            self.layout,
            inputs,
            self._dispatch,
            self._constant,
            tuple(gradients),
        )

    def _constant(self, value: Any, placement: Placement) -> Any:
        """A host value where it is read, put there once for all plans."""
        if (value, placement) not in self._constants:
            (placed,) = placement.put([value])
            # Inside a trace `device_put` makes a tracer. Kept here, it would outlive
            # its trace and break all later calls.
            refuse_tracers(placed)
            self._constants[value, placement] = placed
        return self._constants[value, placement]

    def _state(self, plan: Plan, slots: Sequence[Any]) -> tuple[PyTree, ...]:
        layers = range(len(self.stages[0].model.layers))
        return tuple(
            plan.state[k].read(slots) if k in plan.state else None for k in layers
        )


def _own(tree: PyTree) -> PyTree:
    """What every process has a copy of, as arrays of this process: those of a stage
    with devices of several processes are whole on each of them.
    """
    return jax.tree.map(own_copy, tree)


def _check_rows(inputs: Inputs, place: Placement) -> None:
    """The devices of a mesh can share the rows of every microbatch.

    Raises:
        ValueError: they cannot.
    """
    parts, cut = place.parts, inputs.cut
    counts = cut.rows or cut.row_counts
    wrong = [n for n in counts if n % parts]
    if not wrong:
        return
    total = sum(counts)
    fitting = [
        chunks
        for chunks in range(1, total // parts + 1)
        if not any(n % parts for n in pieces(total, chunks))
    ]
    remedy = f"each needs a multiple of {parts}"
    if not cut.ready and fitting:
        remedy = f"`chunks` can be {', '.join(map(str, fitting[:12]))}"
    elif not cut.ready:
        remedy = f"give a batch of a multiple of {parts} rows"
    raise ValueError(
        f"`Pipe(data_axes={place.data})`: {parts} devices share the rows of each "
        f"microbatch, and one has {wrong[0]}; of {total} rows in all, {remedy}"
    )


@dataclasses.dataclass(frozen=True)
class _SecondHalf:
    """All backwards of a differentiated call.

    Attributes:
        bound: the plan whose first half has run.
        arguments: the leaves that can be differentiated.
    """

    bound: ReadyPlan
    arguments: tuple[Leaf, ...]

    def __call__(
        self, residuals: Sequence[Any], cotangents: Sequence[Any]
    ) -> list[Any]:
        """The gradients of the arguments; `None` for zero."""
        refuse_tracers(cotangents)
        plan = self.bound.plan
        # Slots of its own for each call: JAX may call a pull-back twice.
        slots = self.bound.fresh_slots()
        for n, array in zip(self.bound.residuals, residuals, strict=True):
            slots[n] = array
        assert plan.y is not None
        # The cotangents of the states follow those of `y`; nothing goes through them.
        pairs = zip(cotangents, plan.y.shape.leaves, strict=False)
        carrying = [whole_cotangent(c, a) for c, a in pairs if is_inexact(a)]
        if carrying:
            placement = plan.slots[plan.cotangents[0]].placement
            for n, array in zip(plan.cotangents, placement.take(carrying), strict=True):
                slots[n] = array
        self.bound.run(slots, Half.BACKWARD)
        return [
            slots[plan.gradients[leaf]] if leaf in plan.gradients else None
            for leaf in self.arguments
        ]


def _count_axes(place: Placement) -> int:
    """How many axes the layers on a placement may name."""
    return 0 if place.axes is None else len(place.axes.axis_names)


def _numbered(args: Args, argnums: tuple[int, ...]) -> Asked:
    """The gradients of the numbered arguments."""

    def arguments() -> list[tuple[Leaf, ...]]:
        numbered = numbered_leaves(_counts(args.params), args)
        return [numbered[n] for n in argnums]

    return Asked(argnums, arguments)


def _counts(params: Sequence[PyTree]) -> list[int]:
    """The number of arrays of each layer's parameters."""
    return [len(pack(p)[0]) for p in params]


def _types(arrays: Sequence[Any]) -> tuple[Any, ...]:
    """What a program is specialised on, of each array; what is no array as it is.

    A shape has the type of an array of it, so that a plan that was made or compiled
    from shapes is the plan that a call with arrays finds.
    """
    # A call asks for those of all its parameters, so they are asked in one go if they
    # are JAX's own: 0.05 µs each, while `jax.typeof` takes 1 µs (measured on jax
    # 0.10.2, CPU).
    if all(issubclass(kind, jax.Array) for kind in set(map(type, arrays))):
        return tuple([array.aval for array in arrays])
    return tuple([jax.typeof(a) if is_array(a) else a for a in arrays])
