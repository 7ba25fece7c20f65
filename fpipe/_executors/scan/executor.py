"""The scan executor of one pipe: one program for each kind of call, made once and kept.

In: a call's `Args`, with parameters packed into rows over the mesh (`Packed`). The
arguments' structure, shapes and dtypes are the key of a `Step`, which is three jitted
functions of flat arrays (`forward`, `backward`, `loss`). Out: what the step returns, in
the structures that the caller knows.

    pipe(params, x)                      forward: FORWARD, no gradients
    pipe.value_and_grad(loss)(...)       loss: GRADIENT, interleaved as scheduled
    jax.vjp(pipe, params, x)             first_half: PULL_BACK, all forwards
    and the function that it returns     _SecondHalf: all backwards, as often as called
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from fpipe._core.caches import Key, Recent
from fpipe._core.errors import warn
from fpipe._core.meshes import set_aside
from fpipe._core.pytrees import (
    PyTree,
    Shape,
    aval,
    copied,
    eval_shape,
    fill_gradient,
    is_inexact,
    is_traced,
    pack,
)
from fpipe._core.settings import debugging, settings, unchecked
from fpipe._executors.call import Args, Result
from fpipe._executors.not_finite import check_finite
from fpipe._executors.placement import Unshard
from fpipe._executors.plan_data import PlanData
from fpipe._executors.progress import Progress
from fpipe._executors.protocol import FirstHalf
from fpipe._executors.pull_back import differentiable_call, whole_cotangent
from fpipe._executors.recording import peak_bytes, recorders_of
from fpipe._executors.request import (
    CallKind,
    Request,
    check_backwards,
    check_consumed,
    check_donated,
    check_static,
    inputs_of,
    numbered_leaves,
    refuse_deleted,
    schedule_of,
    unmade_states,
    wanted_leaves,
)
from fpipe._executors.scan.clock import Ran
from fpipe._executors.scan.exchanges import refuse_exchanges
from fpipe._executors.scan.feeds import is_large
from fpipe._executors.scan.lower import lower
from fpipe._executors.scan.mesh import by_stage, on_mesh, replicated, waits_for_all
from fpipe._executors.scan.packing import Packed, Packing
from fpipe._executors.scan.parameters import Parameters
from fpipe._executors.scan.plan_data import plan_data
from fpipe._executors.scan.step import Step
from fpipe._executors.scheduling import Scheduling
from fpipe._executors.stage_places import AXIS, stage_context
from fpipe._executors.tracers import refuse_shapes
from fpipe._model.loss import Loss
from fpipe._model.model import Model
from fpipe._model.needs import INPUTS
from fpipe._model.remat import Remat
from fpipe._model.stages import Leaf, Port, Y, cut_stages
from fpipe._model.state import stacked_state
from fpipe._program.over_mesh import devices_over
from fpipe.schedules import Schedule

# Programs of calls that one pipe keeps, and traces that do not depend on a loss.
_STEPS = 32
_TRACES = 1024

# The functions of a step.
Function: TypeAlias = Literal["forward", "backward", "loss"]


class Scan:
    """The scan executor of one pipe; see `fpipe._executors.protocol.Executor`.

    Arguments:
        mesh: its axis "stage" has the places of stages.
        data: its axes over which rows are shared.
        unshard: how often parameters are gathered that are cut over axes of rows.
    """

    def __init__(
        self,
        model: Model,
        balance: tuple[int, ...],
        stage_to_device: tuple[int, ...],
        mesh: Mesh,
        data: tuple[str, ...],
        scheduling: Scheduling,
        remat: Remat,
        chunks: int,
        unshard: Unshard,
        kept: Recent | None = None,
    ) -> None:
        self.mesh = mesh
        self._data = data
        self.parameters = Parameters(model, balance, stage_to_device, mesh)
        self.stages = cut_stages(model, balance)
        self.stage_to_device = stage_to_device
        self.scheduling = scheduling
        self.chunks = chunks
        # Every pipe has an executor of its own, so it tells calls of pipes apart.
        self.owner = self
        self._model = model
        self._remat = remat
        self._unshard: Unshard = unshard
        self._steps = Recent(_STEPS)
        self._traces = Recent(_TRACES) if kept is None else kept

    @property
    def is_over_processes(self) -> bool:
        """Whether a stage has devices of another process."""
        return self.mesh.is_multi_process

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
        return set_aside(lambda: self.mesh)

    def tracing(self) -> AbstractContextManager[Any]:
        """The context of JAX in which layers are traced: it has the axes of a stage."""
        return stage_context(self.mesh)

    # --- parameters ---

    def make_params(
        self, layer: int, make: Callable[[Any], PyTree], key: Any
    ) -> PyTree:
        """Run `make(key)` where a layer lives; in other processes only shapes."""
        return self.parameters.make(layer, make, key)

    def make_state(self, layer: int, make: Callable[[Any], PyTree], key: Any) -> PyTree:
        """Run `make(key)` where a layer lives, and in every process."""
        return self.parameters.make_state(layer, make, key)

    def place(self, params: Sequence[PyTree], donate: bool) -> Packed:
        """Every device its own stages' parameters."""
        del donate  # Blocks are new arrays in any case.
        return self.parameters.place(params)

    def gather(self, params: Packed) -> tuple[PyTree, ...]:
        """The exact inverse of `place`: one pytree for each layer."""
        return self.parameters.gather(params)

    def check_params(self, params: Any, call: str) -> None:
        """Refuse parameters that are not packed for this pipe."""
        self.parameters.check(params, call)

    def param_shapes(self, params: Packed) -> tuple[PyTree, ...]:
        """The shapes of the parameters, one entry per layer."""
        return tuple(shape.tree for shape in params.packing.shapes)

    def param_leaves(self, params: Packed) -> list[tuple[Leaf, ...]]:
        """The leaves that each row holds: one of every device that has something there.
        JAX differentiates rows, so their gradients are asked for together.
        """
        rows: list[list[Leaf]] = [[] for _ in params.packing.rows]
        for (layer, n), (row, _) in params.packing.where.items():
            rows[row].append(Leaf(Port("params", layer), n))
        return list(map(tuple, rows))

    # --- calls ---

    def bring(self, arrays: Sequence[Any]) -> list[Any]:
        """Arrays where the program finds them: large ones from elsewhere over the
        devices, by rows.
        """
        devices = self.mesh.shape[AXIS]

        def sharding(a: Any) -> NamedSharding:
            spread = is_large(a, devices) and a.shape[0] % devices == 0
            return by_stage(self.mesh) if spread else replicated(self.mesh)

        return on_mesh(arrays, self.mesh, sharding)

    def forward(self, args: Args) -> tuple[PyTree, tuple[PyTree, ...]]:
        """`(y, state)` of a call that nothing differentiates."""
        step = self._find(CallKind.FORWARD, args, None, ())
        check_consumed(args)
        y, state, _ = self._run(step, "forward", *self._arrays(args))
        return step.output.whole.unpack(y), self._state(step, state)

    def differentiable(self, args: Args) -> tuple[PyTree, tuple[PyTree, ...]]:
        """`(y, state)` of a call with traced arguments."""
        return differentiable_call(self, args)

    def first_half(
        self, args: Args, leaves: Sequence[tuple[Leaf, ...]], asked: Sequence[bool]
    ) -> FirstHalf:
        """All forwards of the schedule, in its order."""
        # A row has arrays of several layers, and JAX asks for it as a whole.
        wanted = tuple(
            leaf
            for held, ask in zip(leaves, asked, strict=True)
            if ask
            for leaf in held
        )
        step = self._find(CallKind.PULL_BACK, args, None, wanted)
        arrays = self._arrays(args)
        y, state, buffers = self._run(step, "forward", *arrays)
        # The second half needs all that the first was given, and the buffers that it
        # left. They go as flat arrays, for `custom_vjp` keeps arrays alone.
        flat, structure = jax.tree.flatten((*arrays, buffers))
        rows = len(args.params.packing.rows)
        names = [*range(rows), *(leaf for (leaf,) in leaves[rows:])]
        second = _SecondHalf(self, step, structure, tuple(names))
        return FirstHalf(
            step.output.whole.unpack(y), self._state(step, state), flat, second
        )

    def loss(self, args: Args, loss: Loss, argnums: tuple[int, ...]) -> Result:
        """The loss, and the gradients of the numbered arguments."""
        step = self._loss_step(args, loss, argnums)
        arrays = self._arrays(args)
        value, aux, state, found_arrays = self._run(step, "loss", *arrays)
        found = dict(zip(step.gradient_names, found_arrays, strict=True))
        numbered = numbered_leaves(_counts(args.params), args)
        # Parameters come back as rows, other arguments in the user's own structure.
        gradients = []
        for n in argnums:
            if n == 0:
                gradients.append(self._packed(step, found))
                continue
            values, spec = pack(args.arguments[n])
            parts = [
                _gradient(found.get(leaf), a)
                for leaf, a in zip(numbered[n], values, strict=True)
            ]
            gradients.append(fill_gradient(spec, values, parts))
        tree = step.aux.whole.unpack(aux) if loss.has_aux else None
        return Result(value, tree, self._state(step, state), tuple(gradients))

    def compile(
        self,
        args: Args,
        loss: Loss | None,
        argnums: tuple[int, ...],
        threads: int | None,
        progress: Progress | None,
    ) -> int:
        """Compile a call; arrays or their shapes will do. Returns the number of
        programs, which is one: threads have nothing to share.
        """
        del threads
        step = self._loss_step(args, loss, argnums)
        name = "forward" if loss is None else "loss"
        if progress is not None:
            progress(0, 1)
        self._compiled(step, name, *self._arrays(args))
        if progress is not None:
            progress(1, 1)
        return 1

    def plan_data(
        self, args: Args, loss: Loss, argnums: tuple[int, ...], compiled: bool
    ) -> PlanData:
        """What a call with a loss tells for a prediction.

        Arguments:
            args: arrays or their shapes, of parameters as for the plain composition.
            compiled: whether to compile the program, for the memory that it needs.
        """
        args = args._replace(params=self.parameters.shapes(args.params))
        step = self._loss_step(args, loss, argnums)
        size = None
        if compiled:
            program = self._compiled(step, "loss", *self._arrays(args))
            analysis = program.memory_analysis()
            # An output that takes the place of a donated argument counts once.
            size = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
            size += analysis.temp_size_in_bytes - analysis.alias_size_in_bytes
        schedule = self.schedule(step.m)
        return plan_data(
            step, self.stages, schedule, self.scheduling, self._remat, size
        )

    # --- without jit ---

    def collect(self, tree: PyTree) -> PyTree:
        """Arrays on the first device, or, over several processes, on every device."""
        several = self.mesh.is_multi_process
        arrays, spec = pack(tree)
        if several:
            return spec.unpack(on_mesh(arrays, self.mesh, self._replicated))
        return spec.unpack(jax.device_put(arrays, self.mesh.devices.flat[0]))

    def gather_state(self, state: PyTree) -> PyTree:
        """The states of all layers, as `collect` puts arrays."""
        return copied(self.collect(state))

    def deliver(self, tree: PyTree) -> PyTree:
        """Arrays on every device."""
        arrays, spec = pack(tree)
        return spec.unpack(jax.device_put(arrays, replicated(self.mesh)))

    def tell(self, tree: PyTree) -> PyTree:
        """Arrays on every device."""
        return self.deliver(tree)

    def deliver_state(self, state: Sequence[PyTree]) -> tuple[PyTree, ...]:
        """The states of all layers on every device."""
        return tuple(map(self.deliver, state))

    def spread(self, gradients: Sequence[PyTree], params: Packed) -> Packed:
        """The gradients, packed as the parameters are."""
        return self.parameters.pack_gradients(gradients, params.packing)

    def _replicated(self, array: Any) -> NamedSharding:
        del array
        return replicated(self.mesh)

    # --- programs ---

    def _loss_step(
        self, args: Args, loss: Loss | None, argnums: tuple[int, ...]
    ) -> Step:
        # The leaves of each argument that `argnums` may name.
        numbered = numbered_leaves(_counts(args.params), args)
        wanted = tuple(leaf for n in argnums for leaf in numbered[n])
        return self._find(CallKind.of(loss, argnums), args, loss, wanted)

    def _find(
        self, kind: CallKind, args: Args, loss: Loss | None, wanted: tuple[Leaf, ...]
    ) -> Step:
        """The program of a call, from the cache or new."""
        # Static leaves are in `spec`, and a call with other ones is another program. So
        # is one under other settings of JAX that a trace bakes in.
        arrays, spec = pack(args)
        types = tuple(map(aval, arrays))
        try:
            key = Key((settings(), kind, loss, wanted, spec, types))
        except TypeError:
            # A static leaf that is not hashable; the message names it.
            check_static(args, self.param_shapes(args.params))
            raise
        return self._steps.get(key, lambda: self._make(kind, args, loss, wanted))

    def _make(
        self, kind: CallKind, args: Args, loss: Loss | None, wanted: tuple[Leaf, ...]
    ) -> Step:
        check_static(args, self.param_shapes(args.params))
        # Shapes alone decide all of this. What cannot run is refused before a layer is
        # traced.
        given_packing = args.params.packing
        units, packing = self.parameters.packing(
            given_packing.shapes, given_packing.specs
        )
        inputs = inputs_of(self._model, args, packing.shapes, self.chunks)
        schedule = self.schedule(inputs.cut.m, kind)
        if kind.differentiates:
            check_backwards(schedule)
        check_donated(kind, args, inputs, self._model)
        request = Request(
            kind, loss, wanted_leaves(kind, inputs, wanted, args.frozen), settings()
        )
        state, given = None, None
        if args.state is not None:
            stacks = [eval_shape(stacked_state, tree) for tree in args.state]
            state = Packing.of(units, list(map(Shape.of, stacks)))
            given = pack(tuple(args.state or ()))[1]
        with self.tracing():
            machine, outs = lower(
                units,
                schedule,
                self._remat,
                inputs,
                request,
                packing,
                state,
                devices_over(self.mesh, self._data),
                self._traces,
                len(self.mesh.axis_names) > 1,
            )
        for text in (*machine.warnings, *unmade_states(kind, inputs, self._model)):
            warn(text)
        return Step(
            machine,
            self.mesh,
            self._data,
            self._unshard,
            inputs,
            request,
            self._model,
            outs,
            given,
            args.donate_state and not debugging(),
        )

    def _arrays(self, args: Args) -> tuple[list[Any], list[Any], dict[Port, list[Any]]]:
        """Parameters, states and other inputs as arrays, on the mesh."""
        state = [] if args.state is None else pack(tuple(args.state))[0]
        inputs = args.inputs
        given = {Port(name): self.bring(pack(inputs[name])[0]) for name in INPUTS}
        refuse_deleted(args.params.arrays)
        self.parameters.check_devices(args.params.arrays, "a call's params")
        rows = []
        for row, array in zip(
            args.params.packing.rows, args.params.arrays, strict=True
        ):
            rows += on_mesh(
                [array], self.mesh, lambda _, spec=row.spec: by_stage(self.mesh, spec)
            )
        return rows, self.bring(state), given

    def _compiled(self, step: Step, name: Function, *arrays: Any) -> Any:
        """A function of a step, compiled; refused if it would hang."""
        program = getattr(step, name).lower(*arrays).compile()
        if waits_for_all(self.mesh) and name not in step.checked:
            together = {op.name for op in step.together}
            refuse_exchanges(program.as_text(), self.mesh, together)
            step.checked.add(name)
        return program

    def _refuse_exchanges(self, step: Step, name: Function, arrays: Any) -> None:
        """Refuse a program that would hang, before it is called."""
        if name in step.checked or not waits_for_all(self.mesh):
            return
        if not is_traced(arrays):
            # The call finds what is compiled here.
            self._compiled(step, name, *arrays)
            return
        if step.cannot_hang:
            return
        # Only compiling tells what XLA makes of any layer. In a trace the program will
        # be a part of another one, so it is compiled for this alone; on CPUs, and once.
        params, *others = arrays
        lie = self.parameters.shardings(step.machine.params)
        rows = [
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=to)
            for a, to in zip(params, lie, strict=True)
        ]
        self._compiled(step, name, rows, *jax.tree.map(aval, others))

    def _run(self, step: Step, name: Function, *arrays: Any) -> Any:
        """Call a function of a step, and look for NaNs in the result if JAX does."""
        refuse_shapes(jax.tree.leaves(arrays))
        self._refuse_exchanges(step, name, arrays)
        if not debugging() or is_traced(arrays):
            return self._dispatch(step, name, *arrays)
        # JAX would look for NaNs in what the program returns, and run it again without
        # `jit`, operation by operation: a scan over a mesh takes minutes so. The layers
        # alone do not: `Pipe` runs them if this finds one.
        with unchecked():
            out = self._dispatch(step, name, *arrays)
        # What is left for the backward may hold what nobody reads.
        check_finite(out[:2] if name == "forward" else out, name)
        return out

    def _dispatch(self, step: Step, name: Function, *arrays: Any) -> Any:
        """Call a function of a step; recorded, where somebody records."""
        # The program without a clock, unless somebody records.
        recorders = recorders_of(self)
        if not recorders:
            return getattr(step, name)(*arrays)
        self._check_recordable(arrays)
        clocked = step.clocked
        assert clocked.clock is not None
        # Compiled first, so that no recording has the time for that in it.
        f = self._compiled(clocked, name, *arrays)
        out, stamps = clocked.clock.run(f, *jax.block_until_ready(arrays))
        n = int(name == "backward")
        places = self.parameters.places
        ran = Ran(
            self.schedule(step.m),
            step,
            (step.machine.segments[n],),
            (tuple(stamps),),
            tuple(map(str, places)),
            name == "backward",
            peak_bytes(places),
        )
        for recorder in recorders:
            recorder.add(ran)
        return out

    def _check_recordable(self, arrays: Any) -> None:
        """Refuse to record where the host cannot be asked.

        Under a trace nothing runs yet. And a clock collects the stamps of its own
        process alone.
        """
        why = ""
        if is_traced(arrays):
            why = (
                "the call is inside `jax.jit`, or under another transformation; make "
                "it outside"
            )
        elif jax.process_count() > 1:
            why = "there are several processes; record in one"
        if why:
            raise ValueError(
                f'`fpipe.record(pipe)` of a Pipe with executor="scan": {why}. '
                "`jax.profiler.trace` works there: its "
                "operations are named `stage2 F`"
            )

    # --- results ---

    def _state(self, step: Step, arrays: Sequence[Any]) -> tuple[PyTree, ...]:
        shape = step.state_shape
        if shape is None:
            return (None,) * len(self._model.layers)
        return shape.spec.unpack(arrays)

    def _packed(self, step: Step, found: Mapping[Any, Any]) -> Packed:
        """Gradients in the form of the parameters."""
        packing = step.machine.params
        devices = self.mesh.shape[AXIS]
        arrays = [
            # A row that holds only integers, or only frozen arrays, has no gradient.
            found[r]
            if r in found
            else np.zeros((devices, *row.shape), jax.dtypes.float0)
            for r, row in enumerate(packing.rows)
        ]
        return Packed(tuple(arrays), packing, step.absent)


@dataclasses.dataclass(frozen=True)
class _SecondHalf:
    """All backwards of a differentiated call.

    Attributes:
        structure: of what the first half left: its own arguments, and its buffers.
        names: what `Step.gradient_names` calls the arguments that can be
            differentiated.
    """

    scan: Scan
    step: Step
    structure: Any
    names: tuple[int | Leaf, ...]

    def __call__(
        self, residuals: Sequence[Any], cotangents: Sequence[Any]
    ) -> list[Any]:
        """The gradients of the arguments; `None` for zero."""
        params, state, given, buffers = self.structure.unflatten(residuals)
        # The cotangents of the states follow those of `y`; nothing goes through them.
        leaves = self.step.out[Y].leaves
        types = [leaves[part.number] for part in self.step.output.parts]
        pairs = zip(cotangents, types, strict=False)
        # Integers have no cotangents. The program takes a number in their place, and
        # does not read it.
        carrying = [
            whole_cotangent(c, jax.ShapeDtypeStruct(c.shape, a.dtype))
            if is_inexact(a)
            else jax.device_put(np.float32(0))
            for c, a in pairs
        ]
        # Cotangents may come from anywhere, and `jit` moves nothing under a guard.
        carrying = self.scan.bring(carrying)
        gradients = self.scan._run(
            self.step, "backward", params, state, given, buffers, carrying
        )
        found = dict(zip(self.step.gradient_names, gradients, strict=True))
        return [found.get(name) for name in self.names]


def _counts(params: Packed) -> list[int]:
    """The number of arrays of each layer's parameters."""
    return [len(shape.leaves) for shape in params.packing.shapes]


def _gradient(found: Any, a: Any) -> Any:
    """Zeros where nothing depends on an array; `None` where it can have no gradient."""
    if found is None and is_inexact(a):
        return jax.device_put(np.zeros(a.shape, a.dtype))
    return found
