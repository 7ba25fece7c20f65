"""`Pipe`: a model cut into stages on devices, run by a schedule.

This module checks what the user gives, finds what is left open (the balance, the
devices that are used), and hands calls to one of the two executors. For five layers on
two of eight devices:

    Pipe(layers, devices=jax.devices(), balance=[2, 3], chunks=8)
        stage_to_device    (0, 1)            which the schedule decides
        devices            the first two     as many as the schedule uses
        stages             layers 0-1, layers 2-4

Calls, gradients and losses stand in `fpipe._executors.call.Call`, which
`fpipe.sequential` shares.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from fpipe._core.caches import Recent
from fpipe._core.checks import as_bool, as_compute_dtype, as_int, is_one_of
from fpipe._core.errors import shown
from fpipe._core.forks import check_process
from fpipe._core.meshes import in_trace, set_aside
from fpipe._core.pytrees import (
    PyTree,
    copied,
    is_traced,
    map_arrays,
    numbers_as_arrays,
    strong,
)
from fpipe._core.settings import explicit_transfers
from fpipe._core.statics import check_leaves
from fpipe._executors.anomaly import Detector
from fpipe._executors.call import (
    Args,
    Call,
    Result,
    as_argnums,
    check_argnums,
    check_chunks,
    check_params,
    checked,
    scaled,
)
from fpipe._executors.eager import Eager, without_jit
from fpipe._executors.not_finite import NotFiniteError
from fpipe._executors.placed.dispatch import DISPATCH, Dispatch
from fpipe._executors.placed.executor import Placed
from fpipe._executors.placement import (
    Device,
    Place,
    Placement,
    as_placements,
    first_placements,
)
from fpipe._executors.programs import Layout
from fpipe._executors.progress import Progress, as_progress
from fpipe._executors.protocol import Executor
from fpipe._executors.recording import record
from fpipe._executors.scan.executor import Scan
from fpipe._executors.scan.mesh import as_mesh, check_size, refuse_specs
from fpipe._executors.scan.packing import Packed
from fpipe._executors.scheduling import Scheduling
from fpipe._executors.sequential import PlainExecutor
from fpipe._executors.stage_places import stage_placements, stage_tracing
from fpipe._executors.tracers import TracedCallError, only_shapes
from fpipe._model.batch_norm import deferred
from fpipe._model.frozen import Frozen, FrozenLeaves, check_frozen
from fpipe._model.function_layers import model_of, params_by_layer
from fpipe._model.layer import Layer
from fpipe._model.loss import Loss, Reduction, as_loss
from fpipe._model.microbatch import CallShapes
from fpipe._model.model import Model
from fpipe._model.needs import call_needs, check_key
from fpipe._model.remat import Policy, Remat
from fpipe._model.stages import cut_stages
from fpipe._planning.hardware import PlanOptions
from fpipe._planning.layer_costs import BalanceBy
from fpipe._planning.pipe_balance import PipeSetup, given_balance
from fpipe._planning.predict import KnownLayers, mean_square, predict
from fpipe._planning.prediction import Prediction
from fpipe._planning.step_request import StepRequest
from fpipe._split.init import Init
from fpipe._split.split import Split
from fpipe._split.stacks import joined
from fpipe._split.user_trees import FunctionTrees, UserTrees, trees_of
from fpipe.schedules import Recording, Schedule

EXECUTORS = ("placed", "scan")


# A dataclass for its comparison, its hash and `dataclasses.replace`. `__init__` is
# written by hand because fields hold what was found, not what was given: `balance` is
# numbers even where "flops" was asked for, and so a copy is cut alike.
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Pipe(Call):
    """A sequence of layers, cut into stages that live on devices, run microbatch by
    microbatch.

    A frozen value: it compares, hashes, copies and pickles, and
    `dataclasses.replace(pipe, chunks=8)` makes another; nothing to close. At equal
    `chunks` it computes what `fpipe.sequential` computes.

    Arguments:
        layers: functions, `Layer`s, or nested sequences of them; or an `fpipe.Split`:
            then parameters and gradients are trees of the function that was split.
        balance: layers per stage, such as `fpipe.balance` returns. Default as even as
            possible over the devices, in number; with a `sample` in FLOPs. Also, with a
            `sample`, `"flops"`, `"bytes"`, `"time"` (measured on the first device) or
            `"memory"`. The field is always the numbers.
        devices: one per stage (one per device of the schedule, if that puts several
            stages on each), a `jax.Device` or, for a stage on several devices, a
            `jax.sharding.Mesh`; repeats and any order are allowed, extra ones ignored.
            Meshes may differ in size. Default `jax.devices()`.
        chunks: the number of microbatches asked for; default 1.

    Other Arguments:
        checkpoint: what a backward recomputes: `"always"`, `"except_last"` (default:
            all but the last microbatch), `"never"`, or a policy of
            `jax.checkpoint_policies`.
        schedule: a name from `fpipe.schedules.NAMES` (`"gpipe"`, `"1f1b"`,
            `"eager_1f1b"`, the default, `"zb_h1"`, …), a `Schedule`, or a function
            `f(devices, microbatches) -> Schedule`. Names put one stage on each device;
            `"zb_v"`, `"v_half"`, `"v_min"` and `"dualpipe_v"` two; `"interleaved_1f1b"`
            and `"looped_bfs"` the same number, at least two, on as many devices as that
            allows. A function is asked at construction, with `chunks` microbatches (64
            per device at most), for the largest number of `devices` on which it makes
            one stage for each entry of `balance`, and again when a batch is cut.
        executor: `"placed"` (default): one program for each stage and kind of action,
            dispatched to the devices. `"scan"`: the whole call as one program, which
            may stand inside `jax.jit` and run on several processes; then parameters are
            `fpipe.Packed`.
        mesh: a `jax.sharding.Mesh` with an axis `"stage"`, in place of `devices`: each
            stage lives on the mesh of the other axes, which stay automatic. Default for
            `"scan"` a mesh of the devices alone.
        data_axes: names of axes of meshes over which the rows of each microbatch are
            shared; gradients cross them once per step. Default `("data",)`, if there is
            such an axis; for `"scan"` it can be no other.
        dispatch: who hands programs to the devices. `"one_thread"`: the calling thread,
            in clock order. `"thread_per_device"`: a thread for each device, which ends
            with the call; it keeps the devices busy where handing over a program waits
            for it, and costs more on the host. `"auto"` (default): threads if a layer
            calls Python while it runs (`jax.pure_callback`, `io_callback`,
            `jax.debug.print`), for that waits.
        compute_dtype: mixed precision: layers get their parameters, inputs, skips and
            side inputs in this dtype (real floats only; state stays), so boundaries
            have it too; what the last layer returns in it becomes float32. Parameters
            keep their own dtype and gradients have that. `jnp.bfloat16`, or
            `jnp.float16` with a `loss_scale`. Default: everything as it is.
        deferred_batch_norm: whether layers that can (`fpipe.Layer(defer=...)`) update
            their batch norms' running statistics once per call, with those of the whole
            batch; default `False`: once per microbatch.
        detect_anomaly: whether a call that makes a NaN or an infinity raises
            `FloatingPointError`, which names the first stage, layer and microbatch that
            did, forward or backward (inside `jax.jit` see `raise_anomaly`). It costs a
            look at everything that a layer takes and returns, and a wait for the result
            of each call. Default `False`, which costs nothing: the programs are the
            same as without it.
        sample: a batch, or its shapes, for the balance to be found by; no field, and
            not kept.
        sample_side: the side inputs of the sample, or their shapes, where layers ask
            for some. A step stands in where layers ask for one, and layers are taken to
            train.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says what was given and
            what would be right.

    Example:
        >>> dense = fpipe.Layer(
        ...     lambda w, x: jnp.tanh(x @ w),
        ...     init=lambda key, x: jax.random.normal(key, (3, 3)),
        ... )
        >>> pipe = fpipe.Pipe([dense, dense], devices=[jax.devices()[0]] * 2, chunks=4)
        >>> x = jnp.ones((8, 3))
        >>> params = pipe.init(jax.random.key(0), x)
        >>> step = pipe.value_and_grad(lambda y, t: jnp.mean((y - t) ** 2))
        >>> loss, grads = step(params, x, x)
        >>> jax.tree.map(jnp.shape, grads)
        ((3, 3), (3, 3))
    """

    layers: tuple[Layer, ...] | Split
    balance: tuple[int, ...]
    devices: tuple[Device, ...]  # or meshes
    chunks: int
    checkpoint: str | Policy
    schedule: str | Schedule | Callable[[int, int], Schedule]
    executor: str
    dispatch: Dispatch
    mesh: Mesh | None
    data_axes: tuple[str, ...]
    compute_dtype: Any
    deferred_batch_norm: bool
    detect_anomaly: bool

    def __init__(
        self,
        layers: Iterable[Any],
        balance: Sequence[int] | BalanceBy | None = None,
        devices: Iterable[Place] | None = None,
        chunks: int = 1,
        checkpoint: str | Policy = "except_last",
        schedule: str | Schedule | Callable[[int, int], Schedule] = "eager_1f1b",
        executor: str = "placed",
        dispatch: Dispatch = "auto",
        mesh: Mesh | None = None,
        data_axes: Sequence[str] | None = None,
        compute_dtype: Any = None,
        deferred_batch_norm: bool = False,
        detect_anomaly: bool = False,
        *,
        sample: PyTree = None,
        sample_side: PyTree = None,
    ) -> None:
        # 1. Arguments that need no other one to be checked. Wrong values are refused
        # here, at the user's line, and not in the first call.
        if not is_one_of(executor, EXECUTORS):
            raise ValueError(
                f'`Pipe(executor={shown(executor)})`: the executor is "placed" or '
                '"scan"'
            )
        listed = layers if isinstance(layers, (tuple, list)) else ()
        if any(isinstance(layer, Split) for layer in listed):
            raise TypeError(
                "`Pipe([split, ...])`: a function that was split is all that a pipe "
                "runs: write `Pipe(split)`, and make what comes before or behind a "
                "part of the function"
            )
        if not is_one_of(dispatch, DISPATCH):
            raise ValueError(
                f"`Pipe(dispatch={shown(dispatch)})`: one of "
                f"{', '.join(map(repr, DISPATCH))}"
            )
        # 2. Each argument as a checked value of its own type.
        compute_dtype = as_compute_dtype("Pipe", compute_dtype)
        chunks = check_chunks("Pipe", chunks)
        deferred_batch_norm = as_bool(
            "Pipe", "deferred_batch_norm", deferred_batch_norm
        )
        detect_anomaly = as_bool("Pipe", "detect_anomaly", detect_anomaly)
        model = model_of(layers, compute_dtype)
        scheduling = Scheduling.of(schedule)
        remat = Remat.of(checkpoint)
        # As they were given: `dataclasses.replace` defers them again.
        if not isinstance(layers, Split):
            layers = model.layers
        elif deferred_batch_norm:
            raise ValueError(
                "`Pipe(split, deferred_batch_norm=True)`: a function that was split "
                "has no layers of batch norm: give layers to `Pipe`"
            )
        if deferred_batch_norm:
            model = Model(deferred(layers, "Pipe"), compute_dtype)
        placements, data_axes = stage_placements(executor, devices, mesh, data_axes)
        # 3. The cut. The order matters: how many stages there are depends on the
        # schedule and the devices, which stage lives where on the number of stages, and
        # how many devices are used on that.
        known = params_by_layer(layers, None)
        uncut = PipeSetup(model, scheduling, remat, placements, chunks, known)
        with set_aside(), stage_tracing(executor, placements, mesh):
            # A function that was split knows what its pieces take.
            if isinstance(layers, Split) and balance is None and sample is None:
                balance = layers.balance(uncut.stages)
            balance = given_balance(balance, sample, sample_side, uncut)
        stage_to_device = scheduling.stage_to_device(
            len(balance), len(placements), chunks
        )
        placements = first_placements(placements, 1 + max(stage_to_device))
        own = tuple(p.place for p in placements)
        # The scan executor runs on a mesh always; one is made of plain devices.
        if executor == "scan":
            mesh = as_mesh(own, mesh, len(balance))
            refuse_specs(model.layers, mesh)
        elif mesh is not None:
            check_size(mesh, len(own), len(balance))
        if isinstance(layers, Split) and executor == "placed":
            homes = [placements[d] for d in stage_to_device]
            pairs = zip(homes, balance, strict=True)
            layers.check_places([home for home, n in pairs for _ in range(n)])
        # 4. The value, field by field, past the freezing.
        check_process()
        fields = {
            "layers": layers,
            "balance": balance,
            "devices": own,
            "chunks": chunks,
            "checkpoint": remat.option,
            "schedule": schedule,
            "executor": executor,
            "dispatch": dispatch,
            "mesh": mesh,
            "data_axes": data_axes,
            "compute_dtype": compute_dtype,
            "deferred_batch_norm": deferred_batch_norm,
            "detect_anomaly": detect_anomaly,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        # What runs it, and what looks for faults, is no part of its value.
        self.model: Model
        self._trees: UserTrees
        self._stage_to_device: tuple[int, ...]
        self._executor: Executor
        self._eager: Eager
        self._detector: Detector | None
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "_trees", trees_of(layers, model))
        object.__setattr__(self, "_stage_to_device", stage_to_device)
        # Looking for faults is a changed model, run like any other: without the option
        # there is nothing in the programs to pay for.
        detector = Detector("Pipe", model, balance, chunks) if detect_anomaly else None
        object.__setattr__(self, "_detector", detector)
        runs = model if detector is None else detector.watched
        made = self._make_executor(runs, None)
        object.__setattr__(self, "_executor", made)
        eager = Eager(made, PlainExecutor(runs, chunks))
        object.__setattr__(self, "_eager", eager)

    def _make_executor(self, model: Model, kept: Recent | None) -> Executor:
        """What runs a model as this pipe does.

        Arguments:
            kept: traces and programs that it shares with other pipes of the same
                layers; `None`: with none.
        """
        # From the fields, and not handed over by `__init__`: `plan` makes executors
        # too.
        scheduling = Scheduling.of(self.schedule)
        remat = Remat.of(self.checkpoint)
        # Kept, because to ask a schedule that is a function may take long.
        stage_to_device = self._stage_to_device
        if self.executor == "scan":
            assert self.mesh is not None, "one was made of the devices"
            return Scan(
                model,
                self.balance,
                stage_to_device,
                self.mesh,
                scheduling,
                remat,
                self.chunks,
                kept,
            )
        placements = as_placements(self.devices, self.data_axes)
        # One place for each stage, by the schedule's map.
        layout = Layout(
            cut_stages(model, self.balance),
            tuple(placements[d] for d in stage_to_device),
        )
        return Placed(
            layout,
            scheduling,
            stage_to_device,
            remat,
            self.chunks,
            self.dispatch,
            kept,
        )

    def __repr__(self) -> str:
        """What it is, on one screen, however many layers it has."""
        # A model may have hundreds of layers: the beginning and the end are shown.
        names = [layer.name for layer in self.layers]
        shown = ", ".join(names if len(names) <= 8 else [*names[:6], "…", names[-1]])
        schedule = getattr(self.schedule, "name", self.schedule)
        schedule = getattr(schedule, "__name__", schedule)
        checkpoint = getattr(self.checkpoint, "__name__", self.checkpoint)
        places = list(map(str, as_placements(self.devices, self.data_axes)))
        # The same device several times is how a pipeline is tried without more
        # hardware.
        if len(set(places)) == 1:
            places = (
                [f"{places[0]}"]
                if len(places) == 1
                else [f"{places[0]} x {len(places)}"]
            )
        elif len(places) > 8:
            places = [*places[:6], "…", places[-1]]
        balance = list(map(str, self.balance))
        if len(balance) > 16:
            balance = [*balance[:14], "…", balance[-1]]
        lines = [
            f"{len(names)} layers ({shown})",
            f"balance=[{', '.join(balance)}], devices=[{', '.join(places)}]",
            f"chunks={self.chunks}, schedule={schedule!r}, checkpoint={checkpoint!r}",
            f"executor={self.executor!r}, dispatch={self.dispatch!r}",
        ]
        # Options that most pipes leave alone are shown where they are used.
        rare = {
            "compute_dtype": None,
            "deferred_batch_norm": False,
            "detect_anomaly": False,
        }
        for name, default in rare.items():
            if getattr(self, name) != default:
                lines[-1] += f", {name}={getattr(self, name)!r}"
        return "Pipe(\n  " + ",\n  ".join(lines) + "\n)"

    def __reduce__(self) -> Any:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        # A `jax.Device` cannot be pickled: it belongs to a running process. A placement
        # is written as platform and id, and finds the device again, or says which is
        # missing. A mesh is written as a grid of them.
        fields["devices"] = as_placements(self.devices, self.data_axes)
        if self.mesh is not None:
            grid = np.empty(self.mesh.devices.shape, object)
            for at, device in np.ndenumerate(self.mesh.devices):
                grid[at] = Placement.of(device)
            fields["mesh"] = (grid, self.mesh.axis_names, self.mesh.axis_types)
        return _unpickled, (fields,)

    def make_schedule(self, microbatches: int) -> Schedule:
        """The schedule for that many microbatches.

        Raises:
            ValueError: `schedule` does not fit that number, or permutes the forwards of
                layers with state.
        """
        microbatches = as_int("make_schedule", "microbatches", microbatches)
        return self._executor.schedule(microbatches)

    # --- parameters and state ---

    def init(self, key: Any, x: PyTree, side: PyTree = None) -> Any:
        """Parameters of every layer, made on the layer's device.

        Arguments:
            key: a PRNG key; layer `l` gets `fold_in(key, l)`; a function that was split
                `fold_in(key, 0)`.
            x, side: inputs as for a call, or their shapes.

        Returns:
            A tuple with one entry per layer, or the tree of a function that was split;
            with `executor="scan"` the same, packed.

        Raises:
            ValueError: a layer without `init`, or one that borrows from a later layer.
            TypeError: no key; a function that was split without `init`.
        """
        check_key(key)
        check_process()
        with self._context(), self._executor.tracing(), explicit_transfers():
            # `init` functions see one microbatch, as the layers do in every call.
            first = CallShapes.of(x, call_needs(side=side), self.chunks).first
            made = self._trees.init(key, *first, self._executor.make_params)
        return self.place(made, donate=True)

    def _init_by(self, init: Init) -> Any:
        """Placed parameters as an init function makes them, of a function that was
        split.
        """
        assert isinstance(self._trees, FunctionTrees)
        check_process()
        with self._context(), self._executor.tracing(), explicit_transfers():
            made = self._trees.init_by(init, self._executor.make_params)
        return self.place(made, donate=True)

    def init_state(
        self,
        x: PyTree,
        side: PyTree = None,
        params: Sequence[PyTree] | Packed | None = None,
        key: Any = None,
    ) -> PyTree:
        """State of every layer (`None` for a layer without), made on the layer's
        device; of a function that was split its own tree.

        Arguments:
            x, side: inputs as for a call, or their shapes.
            params: needed if some layer has no `init`: then the shapes cannot be told
                without them.
            key: for states that begin with random numbers; layer `l` gets `fold_in(key,
                l)`, as in `init`. Default `jax.random.key(0)`.

        Raises:
            TypeError: a function that was split without `init_state`.
        """
        if key is not None:
            check_key(key)
        check_process()
        # A state follows from shapes; packed parameters tell theirs without being
        # unpacked.
        if params is not None:
            packed = isinstance(params, Packed)
            own = (self._executor.param_shapes if packed else self._trees.params)(
                params
            )
            check_params(self.model, own, "`init_state(params=...)`")
            params = tuple(own)
        put = self._executor.make_state
        with self._context(), self._executor.tracing(), explicit_transfers():
            shapes = CallShapes.of(x, call_needs(side=side), self.chunks)
            return self._trees.init_state(key, shapes, params, put)

    def place(self, params: PyTree, donate: bool = False) -> Any:
        """Put the parameters of each layer on its device; Python numbers become arrays.

        Arguments:
            params: one entry per layer, or, of a function that was split, its own
                tree; numpy arrays too. They stay as they are, whatever becomes of the
                placed ones.
            donate: whether they are handed over instead: arrays that are on their
                device already are not copied, and are deleted when the placed ones are
                donated. Default `False`.

        Returns:
            With `executor="placed"` the same structure. With `"scan"` an
            `fpipe.Packed`: one array over the mesh for each parameter that all stages
            have, and for what they do not have alike arrays that are padded.

        Raises:
            ValueError: not one entry per layer.
            TypeError: an `fpipe.Packed`, or shapes.
        """
        if isinstance(params, Packed):
            raise TypeError(
                "`place(params)`: these are packed already; for another pipe write "
                "`pipe.place(other.gather(params))`, where "
                "`other` is the one that packed them"
            )
        params = self._trees.params(params)
        check_params(self.model, params, "`place(params)`")
        donate = as_bool("place", "donate", donate)
        check_leaves(tuple(params), "params")
        # A process of several has shapes for the layers of the others.
        several = self.mesh is not None and self.mesh.is_multi_process
        shapes = any(
            isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(params)
        )
        if shapes and not several:
            raise TypeError(
                "`place(params)`: shapes have nothing that can be placed; `pipe.plan` "
                "and `compile` of a step take them"
            )
        check_process()
        # An optimizer returns strong types: weakly typed parameters would change their
        # type in the first update, and everything would compile once more.
        with self._context(), explicit_transfers():
            strong_params = [map_arrays(strong, numbers_as_arrays(p)) for p in params]
            placed = self._executor.place(tuple(strong_params), donate)
            return self._trees.own_params(placed)

    def gather(self, params: Any) -> Any:
        """The exact inverse of `place`: a copy of the parameters as for the plain
        composition, on the first device.

        With a mesh over several processes they are on every device.

        Raises:
            ValueError: not one entry per layer, or packed for another partition.
        """
        params = self._trees.params(params)
        self._executor.check_params(params, "`gather(params)`")
        check_process()
        with self._context(), explicit_transfers():
            return joined(self._trees.own_params(self._executor.gather(params)))

    def gather_state(self, state: PyTree) -> PyTree:
        """The state of a call as the plain composition has it: a copy on the first
        device. Of a function that was split it is the function's own tree, with whole
        leaves in the place of `fpipe.RowBlocks`.

        With a mesh over several processes it is on every device.

        Arguments:
            state: from a call, or from `init_state`.

        Raises:
            ValueError: of a function that was split, the state of another one.
        """
        own = self._trees.state(state)
        check_process()
        with self._context(), explicit_transfers():
            return joined(self._trees.own_state(copied(self._executor.collect(own))))

    # --- calls ---

    def raise_anomaly(self) -> None:
        """Raise what calls inside `jax.jit` have found since this was called last, of a
        pipe with `detect_anomaly`.

        A program that runs on several devices cannot raise: inside `jax.jit` the fault
        is logged (`logging`'s `"fpipe"`) when the program runs, and kept for this
        method, which waits for what is running. Without `detect_anomaly` it does
        nothing.

        Raises:
            FloatingPointError: the first that was found.
        """
        if self._detector is not None:
            self._detector.raise_found()

    def compile(
        self,
        params: Sequence[PyTree] | Packed,
        x: PyTree,
        *targets: PyTree,
        loss_fn: Callable[..., Any] | None = None,
        has_aux: bool = False,
        reduction: Reduction = "mean",
        argnums: int | Sequence[int] = 0,
        frozen: Frozen | None = None,
        side: PyTree = None,
        key: Any = None,
        state: PyTree = None,
        train: bool = False,
        step: Any = None,
        donate_state: bool = False,
        loss_scale: Any = None,
        threads: int | None = None,
        progress: bool | Progress | None = None,
    ) -> int:
        """Compile all programs of a call before it is made, several at once.

        The call then finds them: nothing compiles any more. Calls compile by themselves
        too, but one program after the other.

        Arguments:
            params, x, targets, side, key, state, train, step, donate_state: as for the
                call; shapes (`jax.ShapeDtypeStruct`) will do.
            loss_fn, has_aux, reduction, argnums, frozen: the call is
                `value_and_grad(loss_fn, …)(params, x, *targets)`. Without `loss_fn` it
                is `pipe(params, x)`.
            loss_scale: whether the call is given one.
            threads: at most so many compile at once; default one for each core.
            progress: `True` for a bar on stderr, or a function `f(done, total)`;
                default a bar if stderr is a terminal.

        Returns:
            The number of programs.

        Example:
            >>> dense = fpipe.Layer(
            ...     lambda w, x: jnp.tanh(x @ w), init=lambda key, x: jnp.eye(3)
            ... )
            >>> devices = [jax.devices()[0]] * 2
            >>> pipe = fpipe.Pipe([dense, dense], devices=devices, chunks=4)
            >>> x = jnp.ones((8, 3))
            >>> pipe.compile(pipe.init(jax.random.key(0), x), x)
            3
        """
        if loss_fn is None and targets:
            raise TypeError(
                "`pipe.compile(params, x, *targets)`: targets belong to a loss: give "
                "`loss_fn=` too"
            )
        check_frozen("pipe.compile", frozen)
        donate_state = as_bool("pipe.compile", "donate_state", donate_state)
        if threads is not None:
            threads = as_int("pipe.compile", "threads", threads)
        report = as_progress(progress)
        loss = (
            None
            if loss_fn is None
            else as_loss("value_and_grad", loss_fn, has_aux, reduction)
        )
        with self._context():
            needs = call_needs(side=side, key=key, train=train, step=step)
            args = self._checked(Args(params, x, targets, needs, state))
            args = args._replace(donate_state=donate_state)
            # The same steps as those of the call, in the same order: only then the
            # programs are found under the same keys.
            numbers = () if loss is None else as_argnums(argnums)
            if loss is not None:
                check_argnums(argnums, numbers, args)
                which = FrozenLeaves(self._layer_frozen(frozen))
                leaves = which.of(self._param_shapes(args.params))
                args, loss = scaled(args._replace(frozen=leaves), loss, loss_scale)
            if self._detector is not None:
                args, loss, numbers = self._detector.watch_call(args, loss, numbers)
            # What is compiled here serves the calls that are made with `jit`.
            with jax.disable_jit(False), explicit_transfers():
                return self._executor.compile(args, loss, numbers, threads, report)

    def plan(
        self,
        params: Sequence[PyTree] | Packed | None,
        x: PyTree,
        *targets: PyTree,
        loss_fn: Callable[..., Any] | None = None,
        has_aux: bool = False,
        reduction: Reduction = "mean",
        argnums: int | Sequence[int] = 0,
        frozen: Frozen | None = None,
        side: PyTree = None,
        key: Any = None,
        state: PyTree = None,
        train: bool = False,
        step: Any = None,
        by: Literal["flops", "time"] = "flops",
        speed: float | Sequence[float] | None = None,
        latency: float = 0.0,
        bandwidth: float | None = None,
        optimizer: float = 2.0,
        memory: float | Sequence[float] | None = None,
        compiled: bool = False,
    ) -> Prediction:
        """What a training step will take, before it runs: `print(pipe.plan(params,
        x))`.

        Nothing runs and nothing is allocated, except with `by="time"`. Memory is that
        of arrays: of the placed executor it is exact, instruction by instruction, as an
        allocator takes and gives it; of the scan executor it is the sizes of the
        buffers.

        Arguments:
            params: placed or not, or their shapes; `None`: what `init` makes.
            x, targets, side, key, state, train, step: as for the call; shapes
                (`jax.ShapeDtypeStruct`) will do. Layers with state get what
                `init_state` makes, if none is given. Inputs that are no arrays yet are
                taken to lie where they are read.
            loss_fn, has_aux, reduction, argnums, frozen: the step is
                `value_and_grad(loss_fn, …)(params, x, *targets)`. Without `loss_fn` the
                loss is the mean of the squares of the output.

        Other Arguments:
            by: what work is: `"flops"` (default), counted in the programs, or `"time"`:
                each program is compiled and run some times on its device.
            speed: FLOP per second of a device, one number or one for each: then times
                are in seconds. A device that is given several times counts as several;
                of a mesh with more axes than `"stage"` all devices of a stage count as
                one.
            latency, bandwidth: seconds, and bytes per second, between devices, where
                times are in seconds; default 0 and no limit.
            optimizer: bytes of optimizer state for each byte of parameters; default 2,
                as Adam has it.
            memory: bytes that a device has, one number or one for each; more than that
                is a warning.
            compiled: whether to compile the programs, for the memory that they need for
                themselves.

        Returns:
            A `fpipe.Prediction`.

        Raises:
            TypeError, ValueError: an argument is wrong, as for the call; or it is
                inside `jax.jit`.

        Example:
            >>> dense = fpipe.Layer(
            ...     lambda w, x: jnp.tanh(x @ w), init=lambda key, x: jnp.eye(3)
            ... )
            >>> devices = [jax.devices()[0]] * 2
            >>> pipe = fpipe.Pipe([dense, dense], devices=devices, chunks=4)
            >>> plan = pipe.plan(None, jax.ShapeDtypeStruct((8, 3), jnp.float32))
            >>> plan.stages[0].work["F"], f"{plan.bubble:.0%}"
            (36.0, '28%')
        """
        if loss_fn is None and targets:
            raise TypeError(
                "`pipe.plan(params, x, *targets)`: targets belong to a loss: give "
                "`loss_fn=` too"
            )
        check_frozen("pipe.plan", frozen)
        options = PlanOptions.checked(
            "pipe.plan",
            len(self.devices),
            by,
            compiled,
            speed=speed,
            latency=latency,
            bandwidth=bandwidth,
            memory=memory,
            optimizer=optimizer,
        )
        # A plan is of a training step, so there must be something to differentiate.
        fn = mean_square if loss_fn is None else loss_fn
        loss = as_loss("plan", fn, has_aux, reduction)
        # Programs are traced, and timed on zeros, for this alone. So what JAX does to
        # the caller's own programs is nothing to them.
        with (
            self._context(),
            jax.disable_jit(False),
            jax.debug_nans(False),
            jax.debug_infs(False),
            explicit_transfers(),
        ):
            needs = call_needs(side=side, key=key, train=train, step=step)
            args = self._trees.planned(Args(params, x, targets, needs, state))
            frozen = self._trees.frozen(frozen)
            return self._plan(StepRequest(args, loss, argnums, frozen), options)

    def _plan(
        self,
        step: StepRequest,
        options: PlanOptions,
        known: KnownLayers | None = None,
    ) -> Prediction:
        """`plan` of checked options.

        Arguments:
            known: what other pipes of the same layers have found out; what this one
                finds is added.
        """
        check_process()
        # Arguments may all be shapes, so nothing in them shows that a trace is going
        # on. But inside `jax.jit` even a constant that is put on a device is a tracer.
        if in_trace():
            raise TypeError(
                "`pipe.plan(...)` was called inside `jax.jit` (or another tracing "
                "transformation): programs traced there would not "
                "be those of a call; plan outside of it, shapes (`jax.eval_shape`, "
                "`jax.ShapeDtypeStruct`) will do"
            )
        model, executor = self.model, self._executor
        # `fpipe.tune` plans many pipes over the same layers: traces and costs are
        # shared.
        if known is not None:
            model = known.model
            executor = self._make_executor(model, known.traces)
        elif self._detector is not None:
            # The programs are those of the model alone.
            executor = self._make_executor(model, None)
        with executor.tracing():
            args, numbers = step.resolved(model, self.chunks)
        data = executor.plan_data(args, step.loss, numbers, options.compiled)
        # A prediction traces single layers, for its advice on the balance.
        with executor.tracing():
            costs = None if known is None else known.costs
            return predict(data, args, options, costs)

    def record(
        self, f: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, Recording]:
        """Run `f(*args, **kwargs)`, a step that calls this pipe, and record its last
        call, as `fpipe.record` does.

        Returns:
            What `f` returns, and the `fpipe.schedules.Recording`.

        Raises:
            ValueError: `f` has not called this pipe.

        Example:
            >>> dense = fpipe.Layer(
            ...     lambda w, x: jnp.tanh(x @ w), init=lambda key, x: jnp.eye(3)
            ... )
            >>> devices = [jax.devices()[0]] * 2
            >>> pipe = fpipe.Pipe([dense, dense], devices=devices, chunks=4)
            >>> x = jnp.ones((8, 3))
            >>> step = pipe.value_and_grad(lambda y: jnp.mean(y**2))
            >>> params = pipe.init(jax.random.key(0), x)
            >>> (loss, grads), timeline = pipe.record(step, params, x)
            >>> len(timeline.events)
            16
        """
        if not callable(f):
            raise TypeError(
                f"`pipe.record(f)`: {shown(f)} is not callable; write "
                "`pipe.record(step, params, x)`"
            )
        with record(self) as timeline:
            result = f(*args, **kwargs)
        return result, timeline

    def _context(self) -> AbstractContextManager[Any]:
        """The context of JAX that a call runs in; see `fpipe._core.meshes`."""
        return self._executor.context()

    def _layer_frozen(self, frozen: Frozen | None) -> Frozen | None:
        """What is frozen, by layer."""
        return self._trees.frozen(frozen)

    def _recording_owner(self) -> Any:
        """Whose calls a recording of this pipe watches; see `fpipe.record`."""
        return self._executor.owner

    def _param_shapes(self, params: Any) -> tuple[PyTree, ...]:
        """Shapes of the parameters, one entry per layer, packed or not."""
        return self._executor.param_shapes(params)

    # What `Call` asks of a pipe: to check arguments, and to run a forward or a loss.

    def _checked(self, args: Args) -> Args:
        """The arguments of a call, or an error about parameters or state."""
        check_process()
        args = self._trees.args(args)
        self._executor.check_params(args.params, "a call's params")
        return checked(self.model, args)

    def _forward(self, args: Args) -> tuple[PyTree, PyTree]:
        """`(y, states)` of a call without a loss."""
        y, states = self._layer_forward(args)
        return y, self._trees.own_state(states)

    def _layer_forward(self, args: Args) -> tuple[PyTree, tuple[PyTree, ...]]:
        """The same, with the states by layer."""
        try:
            if self._detector is not None:
                return self._detector.forward(self._run_forward, args)
            return self._run_forward(args)
        except TracedCallError:
            # `jax.eval_shape` traces as `jax.jit` does, and a placed pipe cannot be
            # traced. But shapes are those of the plain composition, which can.
            if only_shapes():
                return PlainExecutor(self.model, self.chunks).forward(args)
            raise

    def _run_forward(self, args: Args) -> tuple[PyTree, tuple[PyTree, ...]]:
        """A forward that someone may differentiate from outside, or that nobody will.

        Under `jax.grad` arguments are tracers: then residuals have to be kept for a
        pull-back. Otherwise none are.
        """
        if without_jit():
            return self._eager.forward(args)
        try:
            if is_traced(args):
                return self._executor.differentiable(args)
            return self._executor.forward(args)
        except NotFiniteError:
            # The layers one by one, in which JAX finds the operation.
            self._eager.forward(args)
            raise

    def _loss(self, args: Args, loss: Loss, argnums: tuple[int, ...]) -> Result:
        """A call with a loss, its gradients by `argnums`; `()` is the loss alone."""
        return self._trees.own_result(self._layer_loss(args, loss, argnums), argnums)

    def _layer_loss(self, args: Args, loss: Loss, argnums: tuple[int, ...]) -> Result:
        """The same, with the gradients of parameters by layer."""
        try:
            if self._detector is not None:
                return self._detector.loss(self._run_loss, args, loss, argnums)
            return self._run_loss(args, loss, argnums)
        except TracedCallError:
            if only_shapes():
                return PlainExecutor(self.model, self.chunks).loss(args, loss, argnums)
            raise

    def _run_loss(self, args: Args, loss: Loss, argnums: tuple[int, ...]) -> Result:
        if without_jit():
            return self._eager.loss(args, loss, argnums)
        try:
            return self._executor.loss(args, loss, argnums)
        except NotFiniteError:
            self._eager.loss(args, loss, argnums)
            raise


def _unpickled(fields: dict[str, Any]) -> Pipe:
    """A pipe from its pickle, on the devices of this process."""
    fields = fields | {"devices": tuple(place.place for place in fields["devices"])}
    if fields["mesh"] is not None:
        grid, names, types = fields["mesh"]
        devices = np.array([place.device for place in grid.flat]).reshape(grid.shape)
        fields["mesh"] = Mesh(devices, names, axis_types=types)
    return Pipe(**fields)
