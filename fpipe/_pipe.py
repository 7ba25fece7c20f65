"""`Pipe`: a model cut into stages on devices, run by a schedule.

This module has the methods that a user calls. The work is done elsewhere:

    _pipe_arguments.py        checks the arguments, and finds the cut into stages
    _pipe_executor.py         makes the executor of a cut
    _split/user_trees.py      converts the user's trees to those of the layers, and back
    _executors/runner.py      runs a call

Calls, gradients and losses are in `fpipe._executors.call.Call`, the base class that
`fpipe.sequential` shares.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from fpipe._core.checks import as_bool, as_int
from fpipe._core.errors import shown
from fpipe._core.forks import check_process
from fpipe._core.meshes import in_trace
from fpipe._core.pytrees import PyTree, map_arrays, numbers_as_arrays, strong
from fpipe._core.settings import explicit_transfers, unchecked
from fpipe._core.statics import check_leaves
from fpipe._executors.added_actions import Offload, Recompute
from fpipe._executors.call import (
    Args,
    Call,
    Result,
    as_argnums,
    check_argnums,
    check_params,
    checked,
    scaled,
)
from fpipe._executors.placed.dispatch import Dispatch
from fpipe._executors.placement import Device, Place, Placement, Unshard
from fpipe._executors.progress import Progress, as_progress
from fpipe._executors.protocol import Executor
from fpipe._executors.recording import record
from fpipe._executors.runner import Runner
from fpipe._executors.scan.packing import Packed
from fpipe._model.frozen import Frozen, FrozenLeaves, check_frozen
from fpipe._model.layer import Layer
from fpipe._model.loss import Loss, Reduction, as_loss
from fpipe._model.microbatch import CallShapes
from fpipe._model.model import Model
from fpipe._model.needs import call_needs, check_key
from fpipe._model.remat import Policy
from fpipe._pipe_arguments import PipeCut, PipeOptions, cut_pipe
from fpipe._pipe_executor import make_executor, make_runner
from fpipe._pipe_text import pipe_text
from fpipe._planning.hardware import PlanOptions
from fpipe._planning.layer_costs import BalanceBy
from fpipe._planning.predict import KnownLayers, mean_square, predict
from fpipe._planning.prediction import Prediction
from fpipe._planning.step_request import StepRequest
from fpipe._split.init import Init
from fpipe._split.split import Split
from fpipe._split.stacks import joined
from fpipe._split.user_trees import FunctionTrees, UserTrees, trees_of
from fpipe.schedules import Recording, Schedule


# A dataclass for its comparison, its hash and `dataclasses.replace`. `__init__` is
# written by hand because fields hold what was found, not what was given: `balance` is
# numbers even where "flops" was asked for, and so a copy is cut alike.
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Pipe(Call):
    """A model cut into stages, which run on devices microbatch by microbatch.

    A `Pipe` is a frozen value. It compares, hashes, copies and pickles, and nothing has
    to be closed. `dataclasses.replace(pipe, chunks=8)` makes another pipe. At equal
    `chunks` a pipe computes what `fpipe.sequential` computes.

    Arguments:
        layers: functions, `Layer`s, or nested sequences of them. Or an `fpipe.Split`:
            then parameters and gradients are trees of the function that was split.
        balance: the number of layers of each stage, such as `fpipe.balance` returns.
            With a `sample` it may be `"flops"`, `"bytes"`, `"time"` (measured on the
            first device) or `"memory"`. Default: equal FLOPs as far as possible if
            there is a `sample`, otherwise equal numbers of layers; for an
            `fpipe.Split` equal estimated times. The field `balance` always has numbers.
        devices: one device for each stage, or for each device of the schedule if it
            puts several stages on a device. An entry is a `jax.Device`, or a
            `jax.sharding.Mesh` for a stage on several devices. Meshes may differ in
            size. Devices may repeat and have any order; extra ones are ignored.
            Default: `jax.devices()`.
        chunks: the number of microbatches asked for. Default 1.

    Other Arguments:
        checkpoint: the forwards that a backward recomputes: `"always"` (those of all
            microbatches), `"except_last"` (default: of all microbatches except the last
            one), `"never"`, or a policy of `jax.checkpoint_policies`.
        schedule: a name from `fpipe.schedules.NAMES` (`"eager_1f1b"`, the default,
            `"gpipe"`, `"1f1b"`, `"zb_h1"`, …), a `Schedule`, or a function
            `f(devices, microbatches) -> Schedule`. `"zb_v"`, `"v_half"`, `"v_min"` and
            `"dualpipe_v"` put two stages on each device. `"interleaved_1f1b"` and
            `"looped_bfs"` put the same number of stages on each device, at least two,
            and use as many devices as that allows. All other names put one stage on
            each device. A function is called at construction with `chunks`
            microbatches, but no more than 64 per device. It gets the largest number of
            `devices` for which it makes one stage for each entry of `balance`. It is
            called again when a batch is cut.
        executor: `"placed"` (default) runs one program for each stage and kind of
            action, and dispatches these programs to the devices. Some actions that
            follow each other share a program. `"scan"` runs the whole call as one
            program, which can be inside `jax.jit`. Its parameters are `fpipe.Packed`.
            Both run on one process or on several.
        mesh: a `jax.sharding.Mesh` with an axis `"stage"`, in place of `devices`. Each
            stage lives on the mesh of the other axes, which are automatic axes.
            Default for `"scan"`: a mesh of the devices with only the axis `"stage"`.
        data_axes: the names of mesh axes that share out the rows of each microbatch.
            Gradients are summed over these axes once per step. Default: `("data",)` if
            there is such an axis.
        unshard: how often a parameter is gathered if its spec shards it over one of
            `data_axes`. `"step"` (default): once for all actions of a call. Its
            gradient is then scattered once, after the last backward. `"action"`: once
            in each action, which takes less memory and more time. Each backward then
            scatters the gradient. Without a mesh the option does nothing.
        dispatch: the threads that dispatch programs to the devices. With `"one_thread"`
            the calling thread dispatches all of them, in the order in which the
            simulated schedule starts its actions. `"thread_per_device"` starts a thread
            for each device, and ends it with the call. It keeps devices busy when a
            dispatch waits for its program, and costs more time on the host. `"auto"`
            (default) uses threads if a layer calls Python while it runs
            (`jax.pure_callback`, `io_callback`, `jax.debug.print`), because such a
            dispatch waits. It also measures the first calls. If launches are slow and
            devices wait for them, it tries threads, and keeps them if a call is then
            launched in less time.
        compute_dtype: the dtype for mixed precision, `jnp.bfloat16`, or `jnp.float16`
            with a `loss_scale`. Layers get parameters, inputs, skips and side inputs in
            this dtype, if they are real floats. States are not cast. Boundaries have
            this dtype too. If the last layer returns it, the output is cast to float32.
            Parameters keep their own dtype, and gradients have the dtype of the
            parameters. Default: nothing is cast.
        deferred_batch_norm: whether batch norms update their running statistics once
            per call, with the statistics of the whole batch. It holds for layers with
            `fpipe.Layer(defer=...)`. Default `False`: once per microbatch.
        recompute: when a backward's recomputation runs. `"with_backward"`: as a part of
            the backward. `"early"`: as an action of its own, `R`, which may run while
            the backward's cotangent is on its way; see
            `fpipe.schedules.early_recompute`. The schedule gets an `R` for each
            backward that recomputes by `checkpoint`. Under `"placed"` an `R` right
            before its own backward is left out if the same device makes the cotangent
            of that backward. A schedule that has an `R` already stays as it is.
            `"auto"` (default) is what was measured to be better: `"early"` under
            `"placed"`, and `"with_backward"` under `"scan"`. With `"auto"`, a
            `Schedule` that is given as data stays as it is. Early recomputation holds
            the residuals (what a backward reads of its forward) of at most one more
            microbatch on a device.
        offload: the largest number of microbatches that a device holds, or a sequence
            of one number for each device. The residuals of all other microbatches wait
            in the memory of the host; see `fpipe.schedules.offload`. A device with
            several stages counts a microbatch once for each stage. Default `None`:
            nothing is copied to the host.
        detect_anomaly: whether a call that makes a NaN or an infinity raises
            `FloatingPointError`. The error names the first stage, layer and microbatch
            that made one, forward or backward. Inside `jax.jit` see `raise_anomaly`.
            With this option every array that a layer takes or returns is checked, and
            each call waits for its result. Default `False`, at no cost: the programs
            then have no checks.
        sample: a batch, or its shapes, from which the balance is computed. It is not
            kept, and is no field.
        sample_side: the side inputs of the sample, or their shapes, if layers ask for
            some. Layers that ask for `step` get a stand-in, and `train` is `True`.

    Raises:
        TypeError, ValueError: an argument is wrong. The message says what was given and
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
    unshard: Unshard
    compute_dtype: Any
    deferred_batch_norm: bool
    detect_anomaly: bool
    recompute: Recompute
    offload: Offload

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
        unshard: Unshard = "step",
        compute_dtype: Any = None,
        deferred_batch_norm: bool = False,
        detect_anomaly: bool = False,
        recompute: Recompute = "auto",
        offload: int | Sequence[int] | None = None,
        *,
        sample: PyTree = None,
        sample_side: PyTree = None,
    ) -> None:
        options = PipeOptions.checked(
            chunks=chunks,
            checkpoint=checkpoint,
            schedule=schedule,
            executor=executor,
            dispatch=dispatch,
            unshard=unshard,
            compute_dtype=compute_dtype,
            deferred_batch_norm=deferred_batch_norm,
            detect_anomaly=detect_anomaly,
            recompute=recompute,
            offload=offload,
        )
        trees = trees_of(
            layers, options.compute_dtype, options.deferred_batch_norm, options.chunks
        )
        cut = cut_pipe(
            trees,
            options,
            devices=devices,
            mesh=mesh,
            data_axes=data_axes,
            balance=balance,
            sample=sample,
            sample_side=sample_side,
        )
        check_process()
        # The value, field by field, past the freezing.
        fields = {
            "layers": trees.layers,
            "balance": cut.balance,
            "devices": cut.devices,
            "chunks": options.chunks,
            "checkpoint": options.remat.option,
            "schedule": schedule,
            "executor": executor,
            "dispatch": dispatch,
            "mesh": cut.mesh,
            "data_axes": cut.data_axes,
            "unshard": unshard,
            "compute_dtype": options.compute_dtype,
            "deferred_batch_norm": options.deferred_batch_norm,
            "detect_anomaly": options.detect_anomaly,
            "recompute": options.recompute,
            "offload": options.offload,
        }
        # What follows from the value, and is no part of it.
        self.model: Model
        self._trees: UserTrees
        self._options: PipeOptions
        self._cut: PipeCut
        self._executor: Executor
        self._runner: Runner
        runner = make_runner(trees.model, options, cut)
        derived = {
            "model": trees.model,
            "_trees": trees,
            "_options": options,
            "_cut": cut,
            "_executor": runner.executor,
            "_runner": runner,
        }
        for name, value in (fields | derived).items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        """What it is, on one screen, however many layers it has."""
        return pipe_text(self._options, self._cut, self.layers)

    def __reduce__(self) -> Any:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        # A `jax.Device` cannot be pickled: it belongs to a running process. A placement
        # is written as platforms and ids, and finds the devices again, or says which is
        # missing.
        fields["devices"] = self._cut.placements
        fields["mesh"] = None if self.mesh is None else Placement.of(self.mesh)
        return _unpickled, (fields,)

    def make_schedule(self, microbatches: int) -> Schedule:
        """The schedule for a number of microbatches.

        Arguments:
            microbatches: the number of microbatches, at least 1.

        Returns:
            A `fpipe.schedules.Schedule`.

        Raises:
            ValueError: `schedule` does not fit that number. Or it changes the order of
                the forwards of a stage with state.
        """
        microbatches = as_int("make_schedule", "microbatches", microbatches)
        return self._executor.schedule(microbatches)

    # --- parameters and state ---

    def init(self, key: Any, x: PyTree, side: PyTree = None) -> Any:
        """Make the parameters of every layer, on the layer's device.

        Arguments:
            key: a PRNG key. Layer `l` gets `fold_in(key, l)`. A function that was split
                gets `fold_in(key, 0)`.
            x, side: inputs as for a call, or their shapes.

        Returns:
            A tuple with one entry per layer, or the tree of a function that was split.
            With `executor="scan"` it is an `fpipe.Packed`.

        Raises:
            ValueError: a layer has no `init`, or it borrows from a later layer.
            TypeError: `key` is no PRNG key, or a function was split without `init`.
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
        """Make the state of every layer, on the layer's device.

        Arguments:
            x, side: inputs as for a call, or their shapes.
            params: the parameters, placed or not. They are required if a layer has no
                `init`, because then nothing else gives the shapes.
            key: a PRNG key for states that begin with random numbers. Layer `l` gets
                `fold_in(key, l)`, as in `init`. Default `jax.random.key(0)`.

        Returns:
            A tuple with one entry per layer, `None` for a layer without state. For a
            function that was split it is the function's own tree.

        Raises:
            ValueError: a layer with state has no `init_state`. Or its state has one
                entry for each row, and the layer does not declare `state_rows`.
            TypeError: a function was split without `init_state`.
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
        """Put the parameters of each layer on its device.

        Numpy arrays and Python numbers become JAX arrays.

        Arguments:
            params: one entry per layer. For a function that was split, its own tree.
            donate: whether the result may reuse the given arrays. With `True`, an array
                that is on its device already is not copied, and it is deleted when the
                placed parameters are donated. Default `False`: the given arrays stay
                valid.

        Returns:
            With `executor="placed"`, the same structure. With `"scan"`, an
            `fpipe.Packed`. It has one array over the mesh for each parameter of the
            same shape in all stages, and padded arrays for the other parameters.

        Raises:
            ValueError: there is not one entry for each layer.
            TypeError: `params` are an `fpipe.Packed`, or shapes.
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
        several = self._executor.is_over_processes
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
        """A copy of the parameters on the first device: the exact inverse of `place`.

        It has the form of the plain composition's parameters. If the pipe runs on
        several processes, each of them gets a copy: on its own first device under
        `"placed"`, on every device under `"scan"`.

        Arguments:
            params: placed parameters, or their gradients.

        Returns:
            A tuple with one entry per layer, or the tree of a function that was split.

        Raises:
            ValueError: there is not one entry for each layer, or `params` are packed
                for another partition.
        """
        params = self._trees.params(params)
        self._executor.check_params(params, "`gather(params)`")
        check_process()
        with self._context(), explicit_transfers():
            return joined(self._trees.own_params(self._executor.gather(params)))

    def gather_state(self, state: PyTree) -> PyTree:
        """A copy of the state on the first device.

        It has the form of the plain composition's state. If the pipe runs on several
        processes, each of them gets a copy: on its own first device under `"placed"`,
        on every device under `"scan"`.

        Arguments:
            state: a state from a call, or from `init_state`.

        Returns:
            A tuple with one entry per layer. For a function that was split it is the
            function's own tree, with whole leaves in place of `fpipe.RowBlocks`.

        Raises:
            ValueError: `state` is not the state of the function that was split.
        """
        own = self._trees.state(state)
        check_process()
        with self._context(), explicit_transfers():
            return joined(self._trees.own_state(self._executor.gather_state(own)))

    # --- calls ---

    def raise_anomaly(self) -> None:
        """Raise the first NaN or infinity that calls inside `jax.jit` have made.

        It is for a pipe with `detect_anomaly`; otherwise it does nothing. A program on
        several devices cannot raise an error. So a call inside `jax.jit` logs the fault
        (to the logger `"fpipe"`) when it runs, and this method raises it. It waits for
        running programs, and covers the calls since it was last called.

        Raises:
            FloatingPointError: a call made a NaN or an infinity; the first one is
                named.
        """
        if self._runner.detector is not None:
            self._runner.detector.raise_found()

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
        """Compile all programs of a call before the call, several at a time.

        The call itself then compiles nothing. Without `compile`, a call compiles its
        programs one after the other.

        Arguments:
            params, x, targets, side, key, state, train, step, donate_state: as for the
                call, as arrays or as shapes (`jax.ShapeDtypeStruct`).
            loss_fn, has_aux, reduction, argnums, frozen: the call is
                `value_and_grad(loss_fn, …)(params, x, *targets)`. Without `loss_fn` it
                is `pipe(params, x)`.
            loss_scale: the `loss_scale` of the call, if it has one.
            threads: the largest number of programs that compile at once. Default: the
                number of cores.
            progress: `True` for a progress bar on stderr, `False` for none, or a
                function `f(done, total)`. Default: a bar if stderr is a terminal.

        Returns:
            The number of programs.

        Raises:
            TypeError, ValueError: an argument is wrong, as for the call. Or `targets`
                are given without a `loss_fn`.

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
            # The same steps as in the call, in the same order. Otherwise the call would
            # look for its programs under other keys.
            numbers = () if loss is None else as_argnums(argnums)
            if loss is not None:
                check_argnums(argnums, numbers, args)
                which = FrozenLeaves(self._layer_frozen(frozen))
                leaves = which.of(self._param_shapes(args.params))
                args, loss = scaled(args._replace(frozen=leaves), loss, loss_scale)
                args, numbers = self._trees.asked(args, numbers)
            if self._runner.detector is not None:
                args, loss, numbers = self._runner.detector.watch_call(
                    args, loss, numbers
                )
            # The programs serve calls with `jit`, so they are compiled with it.
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
        launch: float | None = None,
        host_bandwidth: float | None = None,
        optimizer: float = 2.0,
        memory: float | Sequence[float] | None = None,
        compiled: bool = False,
    ) -> Prediction:
        """Predict the time and memory of a training step, before it runs.

        `print(pipe.plan(params, x))` shows a table. Nothing runs and nothing is
        allocated, except with `by="time"`. Memory is the memory of arrays. For the
        placed executor it is exact: it follows each allocation and each release of the
        plan. For the scan executor it is the sum of the buffers.

        Arguments:
            params: the parameters, placed or not, or their shapes. `None` stands for
                the parameters that `init` makes.
            x, targets, side, key, state, train, step: as for the call, as arrays or as
                shapes (`jax.ShapeDtypeStruct`). Without `state`, layers with state
                start from the state of `init_state`. An input given as a shape counts
                as already on the device that reads it.
            loss_fn, has_aux, reduction, argnums, frozen: the step is
                `value_and_grad(loss_fn, …)(params, x, *targets)`. Without `loss_fn` the
                loss is the mean of the squares of the output.

        Other Arguments:
            by: the measure of work. `"flops"` (default) counts the FLOPs in the
                programs. `"time"` compiles each program and runs it a few times on its
                device.
            speed: FLOP per second of a device, one number or one for each device. Times
                are then in seconds. A device that is given twice counts as two. If a
                stage has a mesh, all its devices together count as one.
            latency, bandwidth: the latency in seconds, and the bytes per second,
                between devices. They need times in seconds. Default: 0, and no limit.
            launch: the host's seconds to launch an action: its program, and the
                transfer of its result. It needs times in seconds. A recording has it as
                `launch_seconds` in its `metrics()`. Default: with `by="time"` it is
                measured; otherwise 0. Under the scan executor there are no launches.
            host_bandwidth: the bytes per second between a device and the memory of its
                host, for schedules that copy there. Default: no limit.
            optimizer: bytes of optimizer state for each byte of parameters. Default 2,
                as for Adam.
            memory: bytes that a device has, one number or one for each device. A step
                that needs more gets a warning. Default: no limit.
            compiled: whether to compile the programs and add the memory that they need
                for themselves. Default `False`.

        Returns:
            A `fpipe.Prediction`.

        Raises:
            TypeError, ValueError: an argument is wrong, as for the call, or `plan` is
                called inside `jax.jit`.

        Example:
            >>> dense = fpipe.Layer(
            ...     lambda w, x: jnp.tanh(x @ w), init=lambda key, x: jnp.eye(3)
            ... )
            >>> devices = [jax.devices()[0]] * 2
            >>> pipe = fpipe.Pipe([dense, dense], devices=devices, chunks=4)
            >>> plan = pipe.plan(None, jax.ShapeDtypeStruct((8, 3), jnp.float32))
            >>> plan.stages[0].work["F"], f"{plan.bubble:.0%}"
            (36.0, '27%')
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
            launch=launch,
            host_bandwidth=host_bandwidth,
        )
        # A plan is of a training step, so there must be something to differentiate.
        fn = mean_square if loss_fn is None else loss_fn
        loss = as_loss("plan", fn, has_aux, reduction)
        # These programs are only traced, or timed on zeros. So JAX's settings for the
        # caller's own programs do not matter to them.
        with (
            self._context(),
            jax.disable_jit(False),
            unchecked(),
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
            known: traces and costs from other pipes of the same layers. The traces of
                this pipe are added.
        """
        check_process()
        # All arguments may be shapes, and then they do not show that a trace is going
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
            executor = make_executor(model, self._options, self._cut, known.traces)
        elif self._runner.detector is not None:
            # The programs are those of the model alone.
            executor = make_executor(model, self._options, self._cut)
        with executor.tracing():
            args, numbers = step.resolved(model, self.chunks)
            args, numbers = self._trees.asked(args, numbers)
        data = executor.plan_data(args, step.loss, numbers, options.compiled)
        # A prediction traces single layers, for its advice on the balance.
        with executor.tracing():
            costs = None if known is None else known.costs
            return predict(data, args, options, costs)

    def record(
        self, f: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, Recording]:
        """Run `f(*args, **kwargs)` and record its last call of this pipe.

        See `fpipe.record`.

        Arguments:
            f: a training step, or another function that calls this pipe.
            args, kwargs: the arguments of `f`.

        Returns:
            `(result, recording)`: the result of `f`, and a
            `fpipe.schedules.Recording`.

        Raises:
            TypeError: `f` is not callable.
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
            >>> len(timeline.events)  # of them 3 recomputations
            19
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
        y, states = self._runner.forward(args)
        return y, self._trees.own_state(states)

    def _loss(self, args: Args, loss: Loss, argnums: tuple[int, ...]) -> Result:
        """A call with a loss, its gradients by `argnums`; `()` is the loss alone."""
        args, numbers = self._trees.asked(args, argnums)
        result = self._runner.loss(args, loss, numbers)
        return self._trees.own_result(result, argnums)


def _unpickled(fields: dict[str, Any]) -> Pipe:
    """A pipe from its pickle, on the devices of this process."""
    mesh = fields["mesh"]
    places = {
        "devices": tuple(place.place for place in fields["devices"]),
        "mesh": None if mesh is None else mesh.place,
    }
    return Pipe(**fields | places)
