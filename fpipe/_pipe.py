"""`Pipe`: a model cut into stages on devices, run by a schedule."""

import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.core import Tracer

from fpipe._call import Call, check_chunks, cut_inputs, fill_gradient, first_microbatch
from fpipe._model import Model
from fpipe._placed import Bound, bind
from fpipe._placement import Device, Place, Placement, placements
from fpipe._plan import Inputs, Plan, Request, build
from fpipe._sequential import Sequential, map_arrays_numbers
from fpipe._stage import KEY, SIDE, TARGETS, Leaf, Loss, Port, Shape, Stage, X, Y, stages_of
from fpipe._tree import PyTree, Spec, aval, float0_like, is_array, is_inexact, is_traced, pack
from fpipe.schedules import Schedule, eager_1f1b, gpipe, one_f_one_b

SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "eager_1f1b": eager_1f1b,
}
CHECKPOINTS = ("always", "except_last", "never")


@dataclasses.dataclass(frozen=True, init=False)
class Pipe(Call):
    """A sequence of layers, cut into stages that live on devices, run microbatch by microbatch.

    A frozen value: it compares, hashes, copies and pickles; nothing to close.

    Arguments:
        layers: functions, `Layer`s, or nested sequences of them.
        balance: layers per stage; default as even as possible.
        devices: one place per stage, a `jax.Device` or a `Sharding` of one device; repeats and any order are
            allowed, extra ones ignored. Default `jax.devices()`.
        chunks: the number of microbatches asked for; default 1.

    Other Arguments:
        checkpoint: what a backward recomputes: `"always"`, `"except_last"` (default: all but the last
            microbatch), `"never"`, or a policy of `jax.checkpoint_policies`.
        schedule: `"gpipe"`, `"1f1b"`, `"eager_1f1b"` (default), a `Schedule`, or a function
            `f(devices, microbatches) -> Schedule`.
        executor: `"placed"`.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says what was given and what would be right.
    """

    model: Model
    balance: tuple[int, ...]
    places: tuple[Placement, ...]
    chunks: int
    checkpoint: Any
    schedule: Any
    executor: str
    _cache: dict[Any, Any] = dataclasses.field(compare=False, repr=False)

    def __init__(
        self,
        layers: Iterable[Any],
        balance: Sequence[int] | None = None,
        devices: Iterable[Place] | None = None,
        chunks: int = 1,
        checkpoint: Any = "except_last",
        schedule: str | Schedule | Callable[[int, int], Schedule] = "eager_1f1b",
        executor: str = "placed",
    ) -> None:
        model = Model(layers)
        if executor == "scan":
            raise NotImplementedError('`Pipe(executor="scan")` is not in this release; the executor is "placed"')
        if executor != "placed":
            raise ValueError(f'`Pipe(executor={executor!r})`: the executor is "placed"')
        if isinstance(checkpoint, str):
            if checkpoint not in CHECKPOINTS:
                raise ValueError(
                    f"`Pipe(checkpoint={checkpoint!r})`: one of {', '.join(CHECKPOINTS)}, or a policy of jax.checkpoint"
                )
        elif not callable(checkpoint):
            raise TypeError(
                f"`Pipe(checkpoint={checkpoint!r})`: one of {', '.join(CHECKPOINTS)}, or a policy of jax.checkpoint"
            )
        if isinstance(schedule, str):
            if schedule not in SCHEDULES:
                raise ValueError(
                    f"`Pipe(schedule={schedule!r})`: one of {', '.join(SCHEDULES)}, a Schedule, or a function that makes one"
                )
        elif not isinstance(schedule, Schedule) and not callable(schedule):
            raise TypeError(f"`Pipe(schedule={schedule!r})`: a name, a Schedule, or a function that makes one")
        count = len(model.layers)
        if balance is None:
            stages = schedule.stages if isinstance(schedule, Schedule) else len(placements(devices, None))
            stages = min(stages, count)
            balance = [count // stages + (s < count % stages) for s in range(stages)]
        balance = _check_balance(balance, model)
        needed = schedule.devices if isinstance(schedule, Schedule) else len(balance)
        fields = {
            "model": model,
            "balance": balance,
            "places": placements(devices, needed),
            "chunks": check_chunks("Pipe", chunks),
            "checkpoint": checkpoint,
            "schedule": schedule,
            "executor": executor,
            "_cache": {},
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "_cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in {**state, "_cache": {}}.items():
            object.__setattr__(self, name, value)

    @property
    def layers(self) -> tuple[Any, ...]:
        """The flattened layers."""
        return self.model.layers

    @property
    def devices(self) -> tuple[Device, ...]:
        """The device of each place of the schedule."""
        return tuple(p.device for p in self.places)

    # --- parameters and state ---

    def init(self, key: Any, x: PyTree, side: PyTree = None) -> tuple[PyTree, ...]:
        """Parameters of every layer, made on the layer's device.

        Arguments:
            key: a PRNG key; layer `l` gets `fold_in(key, l)`.
            x, side: inputs as for a call, or their shapes.

        Returns:
            A tuple with one entry per layer.
        """
        x, side = first_microbatch(x, side, self.chunks)
        return self.model.init(key, x, side, self._make)

    def init_state(self, x: PyTree, side: PyTree = None, params: Sequence[PyTree] | None = None) -> tuple[PyTree, ...]:
        """State of every layer (`None` for a layer without), made on the layer's device.

        Arguments:
            x, side: inputs as for a call, or their shapes.
            params: needed if some layer has no `init`: then the shapes cannot be told without them.
        """
        x, side = first_microbatch(x, side, self.chunks)
        return self.model.init_state(x, side, params, self._make)

    def _make(self, layer: int, make: Callable[[], PyTree]) -> PyTree:
        place = self._home(layer)
        with jax.default_device(place.device):
            return _put(map_arrays_numbers(make()), place)

    def place(self, params: Sequence[PyTree]) -> tuple[PyTree, ...]:
        """Put the parameters of each layer on its device. The structure stays."""
        count = len(self.layers)
        if not isinstance(params, (tuple, list)) or len(params) != count:
            raise ValueError(
                f"`place(params)`: a tuple with one entry per layer is needed, {count} in all, got {_count(params)}"
            )
        return tuple(_put(map_arrays_numbers(p), self._home(k)) for k, p in enumerate(params))

    def gather(self, params: Sequence[PyTree]) -> tuple[PyTree, ...]:
        """The exact inverse of `place`: the parameters as for the plain composition, on one device."""
        return tuple(_put(p, self.places[0]) for p in params)

    def _home(self, layer: int) -> Placement:
        stage = next(s for s in self._stages() if layer in s.span)
        return self.places[self._stage_to_device()[stage.index]]

    def _stages(self) -> tuple[Stage, ...]:
        if "stages" not in self._cache:
            self._cache["stages"] = stages_of(self.model, self.balance)
        return self._cache["stages"]

    def _stage_to_device(self) -> tuple[int, ...]:
        if isinstance(self.schedule, Schedule):
            return self.schedule.stage_to_device
        return tuple(range(len(self.balance)))

    def make_schedule(self, microbatches: int) -> Schedule:
        """The schedule for that many microbatches."""
        schedule = self.schedule
        if isinstance(schedule, str):
            schedule = SCHEDULES[schedule]
        if not isinstance(schedule, Schedule):
            schedule = schedule(len(self.places), microbatches)
            if not isinstance(schedule, Schedule):
                raise TypeError(f"`Pipe(schedule=...)`: the function returned {schedule!r}, no Schedule")
        if schedule.stages != len(self.balance) or schedule.microbatches != microbatches:
            raise ValueError(
                f"the schedule {schedule.name!r} is for {schedule.stages} stages and {schedule.microbatches} microbatches, but "
                f"the pipe has {len(self.balance)} stages and this batch gives {microbatches} microbatches"
            )
        if self.model.stateful:
            for s in range(schedule.stages):
                order = schedule.order("F", s)
                if list(order) != sorted(order):
                    raise ValueError(
                        f"the schedule {schedule.name!r} runs the forwards of stage {s} in the order {order}; layers with state "
                        "need them in order"
                    )
        return schedule

    # --- calls ---

    def _forward(self, params: PyTree, x: PyTree, side: PyTree, key: Any, state: Any, train: bool) -> Any:
        if not is_traced((params, x, side, key, state)):
            y, new, _ = self._run_forward(params, x, side, key, state, train)
            return y, new
        if _only_shapes():
            return self._reference()._forward(params, x, side, key, state, train)
        return self._differentiable(params, x, side, key, state, train)

    def _reference(self) -> Sequential:
        return Sequential(self.model, self.chunks)

    def _run_forward(self, params: PyTree, x: PyTree, side: PyTree, key: Any, state: Any, train: bool) -> Any:
        bound, slots, _ = self._prepare(
            "forward", params, x, side, None, key, state, train, None, lambda _: frozenset()
        )
        slots = bound.run(slots)
        return _entry(bound.plan.y, slots), _states(bound.plan, slots), None

    def _loss(
        self,
        params: PyTree,
        x: PyTree,
        targets: tuple[PyTree, ...],
        side: PyTree,
        key: Any,
        state: Any,
        train: bool,
        loss: Loss,
        argnums: tuple[int, ...] | None,
    ) -> Any:
        everything = (params, x, targets, side, key, state)
        if is_traced(everything):
            if _only_shapes():
                return self._reference()._loss(params, x, targets, side, key, state, train, loss, argnums)
            _refuse(everything)
        target_starts = [0]
        for t in targets:
            target_starts.append(target_starts[-1] + len(pack(t)[0]))

        def wanted(shapes: dict[Port, int]) -> frozenset[Leaf]:
            leaves: set[Leaf] = set()
            for n in argnums or ():
                if n == 0:
                    leaves |= {Leaf(p, k) for p, c in shapes.items() if p.kind == "params" for k in range(c)}
                elif n == 1:
                    leaves |= {Leaf(X, k) for k in range(shapes[X])}
                else:
                    leaves |= {Leaf(TARGETS, k) for k in range(target_starts[n - 2], target_starts[n - 1])}
            return frozenset(leaves)

        mode = "loss" if argnums is None else "grad"
        bound, slots, layers = self._prepare(
            mode, params, x, side, targets, key, state, train, loss, wanted, (argnums, tuple(target_starts))
        )
        slots = bound.run(slots)
        plan = bound.plan
        gradients: list[Any] = []
        for n in argnums or ():
            if n == 0:
                gradients.append(_params_gradient(plan, params, layers, slots))
            else:
                tree, port, start = (x, X, 0) if n == 1 else (targets[n - 2], TARGETS, target_starts[n - 2])
                arrays, spec = pack(tree)
                found = [
                    slots[plan.gradients[Leaf(port, start + k)]] if Leaf(port, start + k) in plan.gradients else None
                    for k in range(len(arrays))
                ]
                gradients.append(fill_gradient(spec, arrays, found))
        assert plan.loss is not None
        return slots[plan.loss], _entry(plan.aux, slots), _states(plan, slots), tuple(gradients)

    def _differentiable(self, params: PyTree, x: PyTree, side: PyTree, key: Any, state: Any, train: bool) -> Any:
        """The call as a `custom_vjp`: all forwards in the schedule's order, then all backwards in its order."""
        key, state = jax.lax.stop_gradient((key, state))
        arrays, spec = pack((params, x, side))
        outputs: list[Any] = []

        def primal(*values: Any) -> Any:
            _refuse((values, key, state))
            p, xx, ss = spec.unpack(values)
            y, new, _ = self._run_forward(p, xx, ss, key, state, train)
            flat, made = pack((y, new))
            outputs.append(made)
            return flat

        def forward(*primals: Any) -> Any:
            values = [p.value for p in primals]
            _refuse((values, key, state))
            p, xx, ss = spec.unpack(values)
            asked = tuple(bool(q.perturbed) and is_inexact(v) for q, v in zip(primals, values, strict=True))

            def leaves(shapes: dict[Port, int]) -> list[Leaf]:
                ports = [q for q in shapes if q.kind == "params"]
                return [Leaf(q, k) for q in (*ports, X, SIDE) for k in range(shapes.get(q, 0))]

            def wanted(shapes: dict[Port, int]) -> frozenset[Leaf]:
                return frozenset(leaf for leaf, a in zip(leaves(shapes), asked, strict=True) if a)

            bound, slots, layers = self._prepare("vjp", p, xx, ss, None, key, state, train, None, wanted, asked)
            slots = bound.run(slots, 0, bound.split)
            plan = bound.plan
            flat, made = pack((_entry(plan.y, slots), _states(plan, slots)))
            outputs.append(made)
            names = leaves(
                {Port("params", n): len(a) for n, a in enumerate(layers)}
                | {X: len(pack(xx)[0]), SIDE: len(pack(ss)[0])}
            )
            # Only what the backward reads is kept; the pull-back may run twice, on its own copy of the slots.
            kept = [(n, v) for n, v in enumerate(slots) if v is not None and n not in plan.constants]
            state_of_backward = _Kept(
                bound, tuple(n for n, _ in kept), tuple(names), tuple(_cotangent_like(a) for a in values)
            )
            return flat, ([v for _, v in kept], state_of_backward)

        def backward(residual: Any, cotangents: Any) -> Any:
            values, kept = residual
            plan = kept.bound.plan
            slots = list(kept.bound.blank)
            for n, v in zip(kept.slots, values, strict=True):
                slots[n] = v
            _refuse(cotangents)
            assert plan.y is not None
            shape = plan.y[0]
            carrying = [k for k, a in enumerate(shape.leaves) if is_inexact(a)]
            place = plan.slots[plan.y[1][0]].place
            given = [_instantiate(cotangents[k], shape.leaves[k]) for k in carrying]
            for n, v in zip(plan.cotangents, place.put(given), strict=True):
                slots[n] = v
            slots = kept.bound.run(slots, kept.bound.split)
            return tuple(
                slots[plan.gradients[leaf]] if leaf in plan.gradients else zero()
                for leaf, zero in zip(kept.leaves, kept.zeros, strict=True)
            )

        f = jax.custom_vjp(primal)
        f.defvjp(forward, backward, symbolic_zeros=True)
        flat = f(*arrays)
        return outputs[-1].unpack(flat)

    # --- plans ---

    def _prepare(
        self,
        mode: str,
        params: Any,
        x: PyTree,
        side: PyTree,
        targets: tuple[PyTree, ...] | None,
        key: Any,
        state: Any,
        train: bool,
        loss: Loss | None,
        wanted: Callable[[dict[Port, int]], frozenset[Leaf]],
        extra: Any = None,
    ) -> tuple[Bound, list[Any], list[list[Any]]]:
        """The bound plan of a call, from the cache or new, and slots with the inputs in them."""
        flat_params, params_def = jax.tree.flatten(params)
        trees = {X: x, SIDE: side, TARGETS: targets}
        packed = {port: pack(tree) for port, tree in trees.items()}
        states = [(None, None) if s is None else pack(s) for s in state] if state is not None else None
        identity = (
            mode,
            train,
            loss,
            extra,
            params_def,
            tuple([_type(a) for a in flat_params]),
            tuple((spec, tuple([_type(a) for a in arrays])) for arrays, spec in packed.values()),
            None
            if states is None
            else tuple((spec, arrays and tuple([_type(a) for a in arrays])) for arrays, spec in states),
            None if key is None else _type(key),
        )
        try:
            entry = self._cache.get(identity)
        except TypeError as error:
            static = [v for _, spec in packed.values() for _, v in spec.static]
            raise TypeError(f"static leaves must be hashable, among {static!r}: {error}") from error
        if entry is None:
            layers = [jax.tree.leaves(p) for p in params]
            for k, leaves in enumerate(layers):
                for a in leaves:
                    if not is_array(a):
                        raise TypeError(
                            f"params of layer {k} {self.layers[k].name!r} hold {a!r}, no array; use `pipe.place(params)`"
                        )
            self._check_places(layers)
            plan = self._plan(mode, params, trees, key, state, train, loss, wanted)
            for text in plan.warnings:
                warnings.warn(text, stacklevel=5)
            entry = self._cache[identity] = (bind(plan), [len(leaves) for leaves in layers])
        bound, counts = entry
        layers, start = [], 0
        for c in counts:
            layers.append(flat_params[start : start + c])
            start += c
        for feed, a in zip(bound.plan.feeds, flat_params, strict=False):
            if not isinstance(a, jax.Array) or a.sharding != bound.plan.slots[feed.slot].place.sharding:
                self._check_places(layers)
        others: dict[Any, Sequence[Any]] = {port: arrays for port, (arrays, _) in packed.items()}
        if states is not None:
            others |= {Port("state", k): arrays for k, (arrays, _) in enumerate(states) if arrays is not None}
        if key is not None:
            others[KEY] = [key]
        return bound, bound.slots(flat_params, others), layers

    def _plan(
        self,
        mode: str,
        params: Any,
        trees: dict[Port, PyTree],
        key: Any,
        state: Any,
        train: bool,
        loss: Loss | None,
        wanted: Callable[[dict[Port, int]], frozenset[Leaf]],
    ) -> Plan:
        cut = cut_inputs(self.model, params, trees[X], trees[SIDE], trees[TARGETS], state, self.chunks)
        shapes = {port: Shape.of(tree) for port, tree in trees.items()}
        inputs = Inputs(
            tuple(Shape.of(p) for p in params),
            {port: (shapes[port], cut.splits[port.kind]) for port in trees if port.kind in cut.splits},
            None if state is None else tuple(Shape.of(s) for s in state),
            None if key is None else Shape.of(key),
        )
        counts = {Port("params", k): len(s.leaves) for k, s in enumerate(inputs.params)}
        counts |= {port: len(s.leaves) for port, s in shapes.items()}
        schedule = self.make_schedule(cut.count)
        places = [self.places[d] for d in schedule.stage_to_device]
        request = Request(mode, train, loss, wanted(counts))
        return build(self._stages(), places, schedule, self.checkpoint, inputs, request)

    def _check_places(self, layers: Sequence[Sequence[Any]]) -> None:
        for k, leaves in enumerate(layers):
            place = self._home(k)
            for a in leaves:
                if not place.holds(a):
                    where = (
                        str(next(iter(a.devices())))
                        if isinstance(a, jax.Array)
                        else f"a {type(a).__name__} on the host"
                    )
                    stage = next(s for s in self._stages() if k in s.span)
                    raise ValueError(
                        f"params of layer {k} {self.layers[k].name!r} are on the wrong device: {where}, but stage {stage.index} is on "
                        f"{place.device}; put them there with `params = pipe.place(params)`"
                    )


def _check_balance(balance: Sequence[int], model: Model) -> tuple[int, ...]:
    """Layers per stage, each at least one, all of them."""
    count = len(model.layers)
    try:
        given = tuple(int(b) if b == int(b) else b for b in balance)
    except (TypeError, ValueError):
        raise TypeError(f"`Pipe(balance={balance!r})`: a sequence of layers per stage, such as [{count}]") from None
    if not given or any(type(b) is not int or b < 1 for b in given):
        raise ValueError(f"`Pipe(balance={list(given)})`: every stage has at least one layer")
    if sum(given) != count:
        raise ValueError(f"`Pipe(balance={list(given)})`: that is {sum(given)} layers, but the model has {count}")
    return given


@dataclasses.dataclass(frozen=True)
class _Kept:
    """What the backward of a differentiated call needs beside arrays."""

    bound: Bound
    slots: tuple[int, ...]
    leaves: tuple[Leaf, ...]
    zeros: tuple[Callable[[], Any], ...]


jax.tree_util.register_static(_Kept)


def _cotangent_like(a: Any) -> Callable[[], Any]:
    shape = aval(a)
    return lambda: None if is_inexact(shape) else float0_like(shape)


def _instantiate(cotangent: Any, shape: jax.ShapeDtypeStruct) -> Any:
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return jax.numpy.zeros(shape.shape, shape.dtype)
    return cotangent


def _type(a: Any) -> Any:
    if isinstance(a, jax.Array):
        return a.aval
    return aval(a) if is_array(a) else a


def _put(tree: PyTree, place: Placement) -> PyTree:
    arrays, spec = pack(tree)
    return spec.unpack(place.put(arrays))


def _count(params: Any) -> str:
    return f"{len(params)} entries" if isinstance(params, (tuple, list)) else type(params).__name__


def _entry(entry: tuple[Shape, tuple[int, ...]] | None, slots: Sequence[Any]) -> PyTree:
    return None if entry is None else entry[0].spec.unpack([slots[n] for n in entry[1]])


def _states(plan: Plan, slots: Sequence[Any]) -> tuple[PyTree, ...]:
    return tuple(_entry(entry, slots) for entry in plan.state)


def _params_gradient(plan: Plan, params: Any, layers: Sequence[Sequence[Any]], slots: Sequence[Any]) -> Any:
    flat = []
    for n, leaves in enumerate(layers):
        port = Port("params", n)
        for k, a in enumerate(leaves):
            flat.append(slots[plan.gradients[Leaf(port, k)]] if is_inexact(a) else float0_like(a))
    return jax.tree.structure(params).unflatten(flat)


def _only_shapes() -> bool:
    """Whether this trace is `jax.eval_shape`'s, which only wants shapes and never runs anything."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "eval_shape" and frame.f_globals.get("__name__", "").startswith("jax."):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _refuse(tree: PyTree) -> None:
    """Raise if anything is traced: the placed executor dispatches, so it needs real arrays."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, Tracer):
            if "Jaxpr" in type(leaf).__name__:
                raise TypeError(
                    "a placed Pipe was called inside `jax.jit` (or another tracing transformation): it dispatches one "
                    "program per stage to several devices, and cannot be part of one program. Call it outside of jit "
                    '(its programs are compiled all the same), or use `Pipe(..., executor="scan")`, which is one program'
                )
            raise TypeError(
                f"a placed Pipe was called under a transformation that it does not support ({type(leaf).__name__}): `jax.grad`, "
                "`jax.vjp` and `jax.value_and_grad` of a call work; higher derivatives, forward mode and `jax.vmap` do not. "
                "`fpipe.sequential` supports them all"
            )


__all__ = ["Pipe", "Spec", "Y"]
