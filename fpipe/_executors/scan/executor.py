"""The scan executor's calls: one program for each kind of call, made once and kept."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from fpipe._core.caches import Key, Recent
from fpipe._core.errors import warn
from fpipe._core.pytrees import (
    PyTree,
    Shape,
    Spec,
    aval,
    fill_gradient,
    float0_like,
    is_inexact,
    is_traced,
    pack,
)
from fpipe._executors.call import Args, Result
from fpipe._executors.programs import Request
from fpipe._executors.recording import recorders_of
from fpipe._executors.request import (
    check_backwards,
    inputs_of,
    numbered_leaves,
    outer_leaves,
    schedule_of,
    settings,
    wanted_leaves,
)
from fpipe._executors.scan.clock import Ran
from fpipe._executors.scan.feeds import is_large
from fpipe._executors.scan.lower import lower
from fpipe._executors.scan.mesh import AXIS, DATA, by_stage, on_mesh, replicated
from fpipe._executors.scan.packing import Packed, Packing
from fpipe._executors.scan.parameters import Parameters
from fpipe._executors.scan.step import Step
from fpipe._executors.scheduling import Scheduling
from fpipe._model.loss import Loss
from fpipe._model.microbatch import check_equal_pieces
from fpipe._model.model import Model
from fpipe._model.remat import Remat
from fpipe._model.stages import AUX, KEY, SIDE, TARGETS, Leaf, Port, X, Y, cut_stages
from fpipe.schedules import Schedule

# Programs of calls that one pipe keeps, and traces that do not depend on a loss.
_STEPS, _TRACES = 32, 1024


class Scan:
    """The scan executor of one pipe."""

    def __init__(
        self,
        model: Model,
        balance: tuple[int, ...],
        stage_to_device: tuple[int, ...],
        mesh: Mesh,
        scheduling: Scheduling,
        remat: Remat,
        chunks: int,
    ) -> None:
        self.mesh, self.parameters = (
            mesh,
            Parameters(model, balance, stage_to_device, mesh),
        )
        self._model, self._stages, self._map = (
            model,
            cut_stages(model, balance),
            stage_to_device,
        )
        self._scheduling, self._remat, self._chunks = scheduling, remat, chunks
        self._steps, self._kept = Recent(_STEPS), Recent(_TRACES)
        self.owner = self

    def schedule(self, microbatches: int) -> Schedule:
        """The schedule for that many microbatches, checked against the model."""
        return schedule_of(self._scheduling, self._map, self._stages, microbatches)

    def make(self, layer: int, f: Callable[[Any], PyTree], key: Any) -> PyTree:
        """Run `f(key)` where a layer belongs."""
        return self.parameters.make(layer, f, key)

    def make_state(self, layer: int, f: Callable[[Any], PyTree], key: Any) -> PyTree:
        """Run `f(key)` where a layer belongs, and in every process."""
        return self.parameters.make_state(layer, f, key)

    def place(self, params: Sequence[PyTree]) -> Packed:
        """Every device its own stages' parameters."""
        return self.parameters.place(params)

    def gather(self, params: Packed) -> tuple[PyTree, ...]:
        """The exact inverse."""
        return self.parameters.gather(params)

    def check(self, params: Any, call: str) -> None:
        """Refuse parameters that are not packed for this pipe."""
        self.parameters.check(params, call)

    def forward(self, args: Args) -> tuple[PyTree, tuple[PyTree, ...]]:
        """`(y, state)`; differentiable in parameters, `x` and `side`."""
        arrays, spec = pack(
            (args.params.arrays, args.x, args.side, args.key, args.state)
        )
        packing, made = args.params.packing, list[Spec]()

        def given(values: Sequence[Any]) -> Args:
            rows, x, side, key, state = spec.unpack(values)
            return args._replace(
                params=Packed(rows, packing), x=x, side=side, key=key, state=state
            )

        def run(
            mode: str, full: Args, asked: tuple[bool, ...]
        ) -> tuple[list[Any], Any, Step]:
            step = self.step(mode, full, None, asked)
            y, state, left = self._called(step, "forward", *self._flat(full))
            flat, out = pack((step.out[Y].spec.unpack(y), self._state(step, state)))
            made.append(out)
            return flat, left, step

        def primal(*values: Any) -> list[Any]:
            return run("forward", given(values), ())[0]

        def forward(*primals: Any) -> tuple[list[Any], Any]:
            values = [p.value for p in primals]
            asked = tuple(bool(p.perturbed) and is_inexact(p.value) for p in primals)
            flat, left, step = run("vjp", given(values), asked)
            return flat, (values, left, _PullBack(step, spec, packing))

        def backward(residual: Any, cotangents: Sequence[Any]) -> tuple[Any, ...]:
            values, left, pull_back = residual
            return pull_back(self, given(values), values, left, cotangents)

        f = jax.custom_vjp(primal)
        f.defvjp(forward, backward, symbolic_zeros=True)
        flat = f(*self._put(arrays))
        return made[-1].unpack(flat)

    def loss(self, args: Args, loss: Loss, argnums: tuple[int, ...]) -> Result:
        """The loss, and the gradients of the numbered arguments."""
        step = self.step("grad" if argnums else "loss", args, loss, argnums)
        value, aux, state, made = self._called(step, "loss", *self._flat(args))
        found = dict(zip(step.gradient_names, made, strict=True))
        counts = [len(shape.leaves) for shape in args.params.packing.shapes]
        leaves, gradients = numbered_leaves(counts, args), []
        for n in argnums:
            if n == 0:
                gradients.append(self._packed(step, found))
                continue
            arrays, spec = pack(args.numbered[n])
            made = [
                _gradient(found.get(leaf), a)
                for leaf, a in zip(leaves[n], arrays, strict=True)
            ]
            gradients.append(fill_gradient(spec, arrays, made))
        tree = step.out[AUX].spec.unpack(aux) if loss.has_aux else None
        return Result(value, tree, self._state(step, state), tuple(gradients))

    def compile(self, args: Args, loss: Loss | None, argnums: tuple[int, ...]) -> int:
        """Compile a call; arrays or their shapes will do. Returns the number of
        programs.
        """
        step = self.step(
            "forward" if loss is None else "grad" if argnums else "loss",
            args,
            loss,
            argnums,
        )
        (step.forward if loss is None else step.loss).lower(*self._flat(args)).compile()
        return 1

    def compiled_bytes(self, step: Step, args: Args) -> int:
        """What the compiled program of a call with a loss needs on each device: all
        that goes in and out, and its own.
        """
        analysis = step.loss.lower(*self._flat(args)).compile().memory_analysis()
        sizes = (
            analysis.argument_size_in_bytes,
            analysis.output_size_in_bytes,
            analysis.temp_size_in_bytes,
        )
        return sum(sizes) - analysis.alias_size_in_bytes

    def _called(
        self, step: Step, name: Literal["forward", "backward", "loss"], *given: Any
    ) -> Any:
        """Call a function of a step; recorded, where somebody records."""
        recorders = recorders_of(self)
        if not recorders:
            return getattr(step, name)(*given)
        self._check_recorded(given)
        clocked = step.clocked
        assert clocked.clock is not None
        f = getattr(clocked, name).lower(*given).compile()
        out, stamps = clocked.clock.run(f, *jax.block_until_ready(given))
        n, places = int(name == "backward"), tuple(map(str, self.mesh.devices.flat))
        ran = Ran(
            self.schedule(step.m),
            step,
            (step.machine.segments[n],),
            (tuple(stamps),),
            places,
            name == "backward",
        )
        for recorder in recorders:
            recorder.add(ran)
        return out

    def _check_recorded(self, given: Any) -> None:
        """Refuse to record where the host cannot be asked."""
        why = ""
        if is_traced(given):
            why = "the call is inside `jax.jit`, or under another transformation; make it outside"
        elif self.mesh.size > self.mesh.shape[AXIS]:
            why = f"the mesh has other axes than {AXIS!r}; record over a mesh of that axis alone"
        elif jax.process_count() > 1:
            why = "there are several processes; record in one"
        if why:
            raise ValueError(
                f'`fpipe.record(pipe)` of a Pipe with executor="scan": {why}. '
                "`jax.profiler.trace` works there: its "
                "operations are named `stage2 F`"
            )

    def step(
        self, mode: Any, args: Args, loss: Loss | None, asked: tuple[Any, ...]
    ) -> Step:
        """The program of a call, from the cache or new.

        Arguments:
            asked: argument numbers; for `vjp` whether each array of `(rows, x, side,
                …)` is asked for.
        """
        arrays, spec = pack(args)
        try:
            key = Key((settings(), mode, loss, asked, spec, tuple(map(aval, arrays))))
        except TypeError as error:
            raise TypeError(
                "static leaves must be hashable, among "
                f"{[leaf for _, leaf in spec.static]!r}: {error}"
            ) from error
        return self._steps.get(key, lambda: self._new(mode, args, loss, asked))

    def _new(
        self, mode: Any, args: Args, loss: Loss | None, asked: tuple[Any, ...]
    ) -> Step:
        units, packing = self.parameters.packing(args.params.packing.shapes)
        inputs = inputs_of(args, packing.shapes, self._chunks)
        check_equal_pieces(inputs.cut, self._chunks)
        counts = [len(shape.leaves) for shape in packing.shapes]
        if mode == "vjp":
            # An array of several layers is asked for as a whole.
            rows, rest = asked[: len(packing.rows)], asked[len(packing.rows) :]
            leaves = [
                Leaf(Port("params", k), n)
                for (k, n), (r, _) in packing.where.items()
                if rows[r]
            ]
            outer = [
                leaf
                for leaf in outer_leaves(counts, args)
                if leaf.port.kind != "params"
            ]
            leaves += [leaf for leaf, a in zip(outer, rest, strict=False) if a]
        else:
            numbered = numbered_leaves(counts, args)
            leaves = [leaf for n in asked for leaf in numbered[n]]
        schedule = self.schedule(inputs.cut.m)
        if mode in ("grad", "vjp"):
            check_backwards(schedule)
        request = Request(
            mode,
            args.train,
            loss,
            wanted_leaves(inputs, leaves, args.frozen),
            settings(),
        )
        state = (
            None
            if args.state is None
            else Packing.of(units, [Shape.of(s) for s in args.state])
        )
        opened = self.mesh.shape.get(DATA, 1) > 1
        machine, out = lower(
            units,
            schedule,
            self._remat,
            inputs,
            request,
            packing,
            state,
            opened,
            self._kept,
        )
        for text in machine.warnings:
            warn(text)
        return Step(machine, self.mesh, inputs, request, self._model, out)

    def _flat(self, args: Args) -> tuple[list[Any], list[Any], dict[Port, list[Any]]]:
        """Parameters, states and other inputs as arrays, on the mesh."""
        state = [] if args.state is None else pack(tuple(args.state))[0]
        given = {
            X: pack(args.x)[0],
            SIDE: pack(args.side)[0],
            TARGETS: pack(args.targets)[0],
        }
        given |= {KEY: pack(args.key)[0]} if args.key is not None else {}
        put = {port: self._put(arrays) for port, arrays in given.items()}
        return (
            on_mesh(args.params.arrays, self.mesh, lambda _: by_stage(self.mesh)),
            self._put(state),
            put,
        )

    def _put(self, arrays: Sequence[Any]) -> list[Any]:
        """Arrays where the program finds them: large ones from elsewhere over the
        devices, by rows.
        """
        devices = self.mesh.shape[AXIS]

        def sharding(a: Any) -> NamedSharding:
            over = is_large(a, devices) and a.shape[0] % devices == 0
            return by_stage(self.mesh) if over else replicated(self.mesh)

        return on_mesh(arrays, self.mesh, sharding)

    def _state(self, step: Step, arrays: Sequence[Any]) -> tuple[PyTree, ...]:
        shape = step.state_shape
        return (
            (None,) * len(self._model.layers)
            if shape is None
            else shape.spec.unpack(arrays)
        )

    def _packed(self, step: Step, found: Mapping[Any, Any]) -> Packed:
        """Gradients in the form of the parameters."""
        packing = step.machine.params
        devices = self.mesh.shape[AXIS]
        arrays = []
        for r, row in enumerate(packing.rows):
            # A row of integers or frozen arrays alone has none.
            arrays.append(
                found[r]
                if r in found
                else np.zeros((devices, *row.shape), jax.dtypes.float0)
            )
        return Packed(tuple(arrays), packing)


@dataclasses.dataclass(frozen=True, eq=False)
class _PullBack:
    """The backward half of a differentiated call."""

    step: Step
    spec: Spec
    packing: Packing

    def __call__(
        self,
        scan: Scan,
        args: Args,
        values: Sequence[Any],
        left: Any,
        cotangents: Sequence[Any],
    ) -> tuple[Any, ...]:
        """The gradients of the arguments."""
        shapes = self.step.out[Y].leaves
        given = [_instantiated(c, a) for c, a in zip(cotangents, shapes, strict=False)]
        made = scan._called(self.step, "backward", *scan._flat(args), left, given)
        found = dict(zip(self.step.gradient_names, made, strict=True))
        counts = [len(shape.leaves) for shape in self.packing.shapes]
        outer = [
            leaf for leaf in outer_leaves(counts, args) if leaf.port.kind != "params"
        ]
        keys: list[Any] = [*range(len(self.packing.rows)), *outer]
        keys += [None] * (len(values) - len(keys))
        return tuple(
            found.get(key) if is_inexact(v) else float0_like(v)
            for key, v in zip(keys, values, strict=True)
        )


jax.tree_util.register_static(_PullBack)


def _instantiated(cotangent: Any, piece: jax.ShapeDtypeStruct) -> Any:
    """A cotangent as an array; of what has none, a number that nobody reads."""
    if not is_inexact(piece):
        return jnp.zeros(())
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros(cotangent.shape, piece.dtype)
    return cotangent


def _gradient(found: Any, a: Any) -> Any:
    """Zeros where nothing depends on an array; `None` where it can have no gradient."""
    return jnp.zeros(a.shape, a.dtype) if found is None and is_inexact(a) else found
