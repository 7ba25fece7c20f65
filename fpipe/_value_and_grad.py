"""`fpipe.value_and_grad`: a pipeline in place of `jax.value_and_grad(loss_fn)`.

In: the user's loss function, and the options of a `Pipe`. Out: a `ValueAndGrad`. It is
called with the arguments of the loss function. The first call that has parameters and a
batch, or their shapes, builds the pieces and the pipe for all calls:

    loss_fn(params, tokens, key)            the user's function
      LossFunction     f(params, x, *, key)     _split/loss_function.py
      Split            its pieces               fpipe.split
      Pipe             stages on devices; its last piece returns the loss

Other shapes, and other values of static arguments, need new traces of the function.
They are cut at the same places, so placed parameters fit all of them.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import Mesh

from fpipe._core.checks import as_bool
from fpipe._core.errors import shown
from fpipe._core.meshes import set_aside
from fpipe._core.pytrees import (
    PyTree,
    map_arrays,
    numbers_as_arrays,
    pack,
    shapes_of,
    strong,
)
from fpipe._executors.added_actions import Recompute
from fpipe._executors.call import check_chunks
from fpipe._executors.gradients import unscale_and_add
from fpipe._executors.placed.dispatch import Dispatch
from fpipe._executors.placement import Place, Unshard
from fpipe._executors.scan.packing import Packed
from fpipe._executors.stage_places import stage_placements, stage_tracing
from fpipe._model.frozen import Frozen, check_frozen
from fpipe._model.loss import Reduction, as_loss
from fpipe._model.microbatch import CallShapes, first_example
from fpipe._model.needs import call_needs, check_key, stand_ins
from fpipe._model.remat import Policy
from fpipe._pipe import Pipe
from fpipe._planning.layer_costs import BalanceBy
from fpipe._planning.prediction import Prediction
from fpipe._split.init import Init
from fpipe._split.layers import PieceLayer
from fpipe._split.loss_function import LossCall, LossFunction, as_returned
from fpipe._split.split import Split, split
from fpipe._split.trace import Kind
from fpipe._tune import tune
from fpipe._tuning import Tuning
from fpipe.schedules import Schedule
from fpipe.schedules._checks import counted

# What messages of a pipe say of placing, with one pair of parentheses inside at most.
_PIPE_PLACE = re.compile(r"\bpipe\.place\(((?:[^()]|\([^()]*\))*)\)")

# The arguments of these methods besides those of the loss function. If the function has
# an argument of the same name, the value goes to the function.
_OF_CALL = ("grads", "loss_scale")
_OF_PLAN = (
    "by",
    "speed",
    "latency",
    "bandwidth",
    "launch",
    "host_bandwidth",
    "optimizer",
    "memory",
    "compiled",
)
_OF_COMPILE = ("loss_scale", "threads", "progress")
_OF_TUNE = (
    *_OF_PLAN,
    "chunks",
    "schedules",
    "checkpoints",
    "recomputes",
    "offloads",
    "measure",
)


@dataclasses.dataclass(frozen=True, eq=False)
class _Built:
    """The pieces and the pipe, made from a loss function and shapes.

    Attributes:
        split: the pieces.
        pipe: the pipe that runs them.
        step, evaluate: the pipe's functions, made once, because programs are kept for
            each of them.
        modes: the modes of the calls that it takes.
    """

    split: Split
    pipe: Pipe
    step: Callable[..., Any]
    evaluate: Callable[..., Any]
    modes: set[Any]


class ValueAndGrad:
    """A loss function that runs as a pipeline. `fpipe.value_and_grad` makes it.

    It is called with the arguments of the loss function, and returns `(loss, grads)`.
    Its methods take the same arguments. Methods that compute nothing take shapes
    (`jax.ShapeDtypeStruct`) too.
    """

    def __init__(
        self,
        function: LossFunction,
        cutting: Mapping[str, Any],
        options: Mapping[str, Any],
        frozen: Frozen | None,
        init: Callable[..., PyTree] | None,
    ) -> None:
        self._function = function
        self._cutting = dict(cutting)
        self._options = dict(options)
        self._frozen = frozen
        self._init = init
        self._built: _Built | None = None

    def __repr__(self) -> str:
        if self._built is None:
            return f"fpipe.value_and_grad({self._function.name})"
        pieces = counted(len(self.split), "piece")
        stages = counted(len(self.pipe.balance), "stage")
        return f"fpipe.value_and_grad({self._function.name}: {pieces} in {stages})"

    # --- what it is made of ---

    @property
    def split(self) -> Split:
        """The pieces of the loss function, an `fpipe.Split`.

        Raises:
            ValueError: no method has been called with parameters and a batch yet.
        """
        return self._known("split").split

    @property
    def pipe(self) -> Pipe:
        """The `fpipe.Pipe` that runs the pieces.

        `step.pipe.record(step, params, batch)` uses it, for example.

        Raises:
            ValueError: no method has been called with parameters and a batch yet.
        """
        return self._known("pipe").pipe

    def _known(self, name: str) -> _Built:
        if self._built is None:
            raise ValueError(
                f"`step.{name}`: there is none before the shapes are known: call "
                "`step.place(params, batch)` or `step.plan(params, batch)` first. The "
                "batch may be shapes; for `plan` the parameters may be shapes too"
            )
        return self._built

    @contextmanager
    def _tracing(self) -> Iterator[None]:
        """The context in which a pipe traces. A trace in another context differs."""
        names = ("executor", "devices", "mesh", "data_axes")
        executor, devices, mesh, axes = (self._options[name] for name in names)
        placements, _ = stage_placements(executor, devices, mesh, axes)
        with set_aside(), stage_tracing(executor, placements, mesh):
            yield

    def _shapes_by(self, init: Init) -> PyTree:
        """The shapes of the parameters that an init function makes."""
        with self._tracing():
            return init.shapes(jax.sharding.get_abstract_mesh())

    def _build(self, call: LossCall, name: str) -> _Built:
        """The pieces and the pipe that take a call. The first call makes them."""
        # With other static arguments, or without a key, a piece may read more values.
        mode = pack(call.x)[1], call.key is None
        if self._built is not None and mode in self._built.modes:
            return self._built
        if self._built is None and isinstance(call.params, Packed):
            raise ValueError(
                f"`{name}(params, ...)`: these parameters are packed already, but this "
                "step has not been built: write `step.place(params, batch)` with the "
                "function's own tree"
            )
        # The trace of one microbatch is cut, because that is what a call runs.
        x, needs = CallShapes.of(
            call.x, call_needs(key=call.key), self._options["chunks"]
        ).first
        kind = Kind.of(x, needs)
        if self._built is None:
            function = self._function.layer
            params = map_arrays(strong, shapes_of(numbers_as_arrays(call.params)))
            with self._tracing():
                # Without a key a stand-in is used, so the pieces take calls with a key
                # too.
                given = stand_ins(key=call.key) if self._function.draws else {}
                key = given.get("key")
                example = first_example(call.x, self._options["chunks"])
                pieces = split(
                    function,
                    params,
                    example,
                    key=key,
                    state=call.state,
                    **self._cutting,
                )
            self._built = self._built_of(self._pipe_of(pieces, self._options, call))
        elif not self._takes(self._built, kind):
            self._built = self._widened(self._built, call, kind, name)
        self._built.modes.add(mode)
        return self._built

    def _widened(self, before: _Built, call: LossCall, kind: Kind, name: str) -> _Built:
        """The same stages, whose pieces take microbatches of another kind too.

        Raises:
            ValueError: placed parameters would have to be elsewhere.
        """
        pieces = before.split.also_for(kind)
        options = self._options | {"balance": before.pipe.balance}
        made = self._built_of(self._pipe_of(pieces, options, call))
        old, new = before.split.cut.wiring, pieces.cut.wiring
        same = (old.owned, old.state) == (new.owned, new.state)
        if same and made.pipe.mesh is not None:
            # The packing of parameters is a part of their structure.
            places = [
                jax.tree.structure(jax.eval_shape(pipe.place, pieces.param_shapes))
                for pipe in (before.pipe, made.pipe)
            ]
            same = places[0] == places[1]
        if not same:
            raise ValueError(
                f"`{name}(...)`: for this call, {self._function.name!r} uses values in "
                "other pieces than when it was cut, and placed parameters do not fit: "
                "make another step, and call its `place` with these arguments first"
            )
        made.modes.update(before.modes)
        return made

    def _takes(self, built: _Built, kind: Kind) -> bool:
        """Whether a pipe takes microbatches of a kind."""
        piece = built.pipe.model.layers[0].apply
        assert isinstance(piece, PieceLayer)
        with self._tracing():
            return piece.cut.fits(kind)

    def _pipe_of(
        self, pieces: Split, options: Mapping[str, Any], call: LossCall
    ) -> Pipe:
        # A balance by name looks at a batch.
        sample = call.x if isinstance(options["balance"], str) else None
        return Pipe(pieces, sample=sample, **options)

    def _built_of(self, pipe: Pipe) -> _Built:
        pieces, loss = pipe.layers, self._function.loss
        assert isinstance(pieces, Split)
        step = pipe.value_and_grad(
            as_returned,
            loss.has_aux,
            loss.reduction,
            self._argnums,
            frozen=self._frozen,
        )
        evaluate = pipe.evaluate(as_returned, loss.has_aux, loss.reduction)
        return _Built(pieces, pipe, step, evaluate, set())

    @property
    def _argnums(self) -> int | tuple[int, ...]:
        """What the pipe differentiates: the parameters, and all of the batch if the
        gradient of an argument of it is asked.
        """
        return (0, 1) if self._function.of_batch else 0

    def _called(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        own: Sequence[str],
        shapes: bool = True,
    ) -> tuple[_Built, LossCall, dict[str, Any]]:
        """A call's arguments: those of the loss function, and those in `own`."""
        mine = {
            at: kwargs.pop(at)
            for at in own
            if at in kwargs and not self._function.names(at)
        }
        call = self._function.call(args, kwargs, name, shapes)
        with self._naming(name):
            return self._build(call, name), call, mine

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Give errors of the pipe the names that are different here."""
        try:
            yield
        except (TypeError, ValueError) as error:
            text = str(error)
            if "pipe.place(" in text:
                # A user of this function has no pipe, but the step.
                error.args = (_PIPE_PLACE.sub(r"step.place(\1, batch)", text),)
            elif "`x[" in text:
                error.add_note(
                    f"fpipe: in `{name}(...)` `x` has the batch's arguments by name, "
                    f"those of {self._function.name!r}"
                )
            raise

    # --- parameters ---

    def place(self, *args: Any, **kwargs: Any) -> Any:
        """Put each parameter on the device of the stage that uses it.

        Arguments:
            args, kwargs: as for the loss function. The batch may be shapes. A key may
                be left out.

        Other Arguments:
            donate: as for `Pipe.place`: whether arrays that are on their device already
                are not copied. Default `False`.

        Returns:
            The placed parameters, in the same tree. With `executor="scan"` they are an
            `fpipe.Packed`.

        Raises:
            TypeError, ValueError: an argument is wrong, or the function cannot be cut.
        """
        built, call, mine = self._called("step.place", args, kwargs, ("donate",))
        return built.pipe.place(call.params, **mine)

    def gather(self, params: Any) -> PyTree:
        """A copy of the parameters on the first device: the inverse of `place`.

        For several processes see `Pipe.gather`.

        Arguments:
            params: placed parameters, or their gradients.

        Returns:
            The loss function's own tree, with whole leaves.

        Raises:
            ValueError: `params` are not of this step. Or no method has been called with
                parameters and a batch yet.
        """
        return self._known("gather").pipe.gather(params)

    def gather_state(self, state: PyTree) -> PyTree:
        """A copy of the state on the first device, in the loss function's own tree.

        Arguments:
            state: the state from a step.

        Returns:
            The tree, with whole leaves in place of `fpipe.RowBlocks`.

        Raises:
            ValueError: `state` is not of this step. Or no method has been called with
                parameters and a batch yet.
        """
        return self._known("gather_state").pipe.gather_state(state)

    def init(self, key: Any, /, *batch: Any, **kwargs: Any) -> Any:
        """Make the parameters by the user's `init`, each on its own device.

        Arguments:
            key: a PRNG key for `init`.
            batch, kwargs: as for the loss function, without the parameters. They may be
                shapes. If `init` requires more than a key, it gets them too, with zeros
                in place of shapes.

        Returns:
            Placed parameters. A device only ever holds its own parameters.

        Raises:
            TypeError: `fpipe.value_and_grad` was given no `init=`.
        """
        if self._init is None:
            raise TypeError(
                "`step.init(key, batch)`: write `fpipe.value_and_grad(loss_fn, "
                "init=...)` with the function that makes the parameters, `init(key)` "
                "or `init(key, batch)`"
            )
        check_key(key)
        init = Init.of(self._init, key, batch, kwargs)
        at = self._function.argnum
        args = (*batch[:at], self._shapes_by(init), *batch[at:])
        built, _, _ = self._called("step.init", args, kwargs, ())
        return built.pipe._init_by(init)

    # --- calls ---

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss and its gradients.

        Arguments:
            args, kwargs: as for the loss function, with placed parameters.

        Other Arguments:
            grads: gradients of an earlier call. The new gradients are added to them.
            loss_scale: as for `Pipe.value_and_grad`.

        Returns:
            `(loss, grads)`, or `((loss, aux), grads)` with `has_aux`. The gradients
            have the structure and the devices of the parameters. If `argnums` is a
            sequence, `grads` is a tuple: the gradients of these arguments, in order.

        Raises:
            TypeError, ValueError: an argument is wrong, such as parameters that are not
                placed.
        """
        built, call, mine = self._called("step", args, kwargs, _OF_CALL, shapes=False)
        # Added here: they are a tuple as the user has it, and not as the pipe has it.
        given = mine.pop("grads", None)
        with self._naming("step"):
            value, found = built.step(
                call.params, call.x, key=call.key, state=call.state, **mine
            )
            grads = self._function.gradients(call, found)
            return value, unscale_and_add(grads, None, given, "`grads=`")

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss alone, by forwards only.

        Arguments:
            args, kwargs: as for the loss function, with placed parameters.

        Returns:
            `loss`, or `(loss, aux)` with `has_aux`.
        """
        built, call, _ = self._called("step.evaluate", args, kwargs, (), shapes=False)
        with self._naming("step.evaluate"):
            return built.evaluate(call.params, call.x, key=call.key, state=call.state)

    # --- before it runs ---

    def plan(self, *args: Any, **kwargs: Any) -> Prediction:
        """Predict the time and memory of a step, before it runs. See `Pipe.plan`.

        Arguments:
            args, kwargs: as for the loss function, as arrays or as shapes. A key may be
                left out. Parameters may be `None` if there is an `init=`.

        Other Arguments:
            by, speed, latency, bandwidth, launch: as for `Pipe.plan`.
            host_bandwidth, optimizer, memory, compiled: as for `Pipe.plan`.

        Returns:
            A `fpipe.Prediction`.
        """
        args = self._with_shapes("step.plan", args, kwargs)
        built, call, mine = self._called("step.plan", args, kwargs, _OF_PLAN)
        asked: dict[str, Any] = {"frozen": self._frozen, "argnums": self._argnums}
        options = self._of_step(call) | asked | mine
        with self._naming("step.plan"):
            return built.pipe.plan(call.params, call.x, **options)

    def compile(self, *args: Any, **kwargs: Any) -> int:
        """Compile all programs of a step, several at a time. See `Pipe.compile`.

        Arguments:
            args, kwargs: as for the loss function, as arrays or as shapes. If the calls
                have a key, give one of the same kind.

        Other Arguments:
            loss_scale, threads, progress: as for `Pipe.compile`.

        Returns:
            The number of programs.
        """
        args = self._with_shapes("step.compile", args, kwargs)
        built, call, mine = self._called("step.compile", args, kwargs, _OF_COMPILE)
        pipe, params = built.pipe, call.params
        # On any device: for parameters that are not placed yet the shapes are enough.
        if not isinstance(params, Packed):
            params = shapes_of(params)
            params = jax.eval_shape(pipe.place, params) if pipe.mesh else params
        asked: dict[str, Any] = {"frozen": self._frozen, "argnums": self._argnums}
        options = self._of_step(call) | asked | mine
        with self._naming("step.compile"):
            return pipe.compile(params, call.x, **options)

    def tune(self, *args: Any, **kwargs: Any) -> Tuning:
        """Choose schedule, chunks and checkpoint mode by prediction. See `fpipe.tune`.

        `step.with_pipe(tuning.pipe)` is the step with the best choice.

        Arguments:
            args, kwargs: as for the loss function, as arrays or as shapes. Parameters
                may be `None` if there is an `init=`.

        Other Arguments:
            chunks, schedules, checkpoints: the values to try, as for `fpipe.tune`.
            recomputes, offloads: the values to try, as for `fpipe.tune`.
            memory, by, speed, latency, bandwidth, launch: as for `fpipe.tune`.
            host_bandwidth, optimizer, compiled: as for `fpipe.tune`.
            measure: the number of candidates to run, as for `fpipe.tune`.

        Returns:
            A `fpipe.Tuning`.
        """
        args = self._with_shapes("step.tune", args, kwargs)
        built, call, mine = self._called("step.tune", args, kwargs, _OF_TUNE)
        # The options that `tune` chooses are not passed on.
        chosen = ("balance", "chunks", "checkpoint", "schedule", "recompute", "offload")
        options = {k: v for k, v in self._options.items() if k not in chosen}
        asked: dict[str, Any] = {"frozen": self._frozen, "argnums": self._argnums}
        options |= self._of_step(call) | asked | mine
        # Only a measured step looks at numbers.
        measured = bool(mine.get("measure"))
        options["params"] = call.params if measured else built.split.param_shapes
        with self._naming("step.tune"):
            return tune(built.split, call.x, **options)

    def _of_step(self, call: LossCall) -> dict[str, Any]:
        """The arguments of `Pipe.plan`, `compile` and `tune` for a step, without
        parameters and `x`.
        """
        loss = self._function.loss
        return {
            "loss_fn": as_returned,
            "has_aux": loss.has_aux,
            "reduction": loss.reduction,
            "key": call.key,
            "state": call.state,
        }

    def with_pipe(self, pipe: Pipe) -> "ValueAndGrad":
        """The same loss function on another pipe of its pieces.

        Arguments:
            pipe: a `Pipe` of `step.split`, such as the pipe of `step.tune(...)`, or
                `dataclasses.replace(step.pipe, schedule="zb_h1")`.

        Returns:
            A new `ValueAndGrad`.

        Raises:
            TypeError: `pipe` is no pipe of `step.split`.
        """
        if not isinstance(pipe, Pipe) or pipe.layers != self._known("with_pipe").split:
            raise TypeError(
                f"`step.with_pipe({shown(pipe)})`: a pipe of this step's pieces is "
                "needed, `fpipe.Pipe(step.split, ...)`"
            )
        options = {name: getattr(pipe, name) for name in self._options}
        made = ValueAndGrad(
            self._function, self._cutting, options, self._frozen, self._init
        )
        made._built = made._built_of(pipe)
        return made

    def _with_shapes(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """Positional arguments, with shapes in place of parameters that are `None`."""
        at = self._function.argnum
        if len(args) <= at or args[at] is not None:
            return tuple(args)
        if self._built is not None:
            shapes = self._built.split.param_shapes
        elif self._init is not None:
            key = call_needs(key=jax.eval_shape(lambda: jax.random.key(0)))["key"]
            own = {k: v for k, v in kwargs.items() if self._function.names(k)}
            rest = (*args[:at], *args[at + 1 :])
            shapes = self._shapes_by(Init.of(self._init, key, rest, own))
        else:
            raise TypeError(
                f"`{name}(None, batch)`: give the parameters, or their shapes; without "
                "them `fpipe.value_and_grad(loss_fn, init=...)` says what they are"
            )
        return (*args[:at], shapes, *args[at + 1 :])


def value_and_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    devices: Iterable[Place] | None = None,
    chunks: int = 1,
    stages: int | None = None,
    cuts: Sequence[str] | None = None,
    specs: PyTree = None,
    balance: Sequence[int] | BalanceBy | None = None,
    reduction: Reduction = "mean",
    frozen: Frozen | None = None,
    static_argnames: str | Sequence[str] = (),
    init: Callable[..., PyTree] | None = None,
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
) -> ValueAndGrad:
    """Run a loss function as a pipeline, in place of `jax.value_and_grad(loss_fn)`.

    `fpipe.split` cuts the function into pieces, and the pieces become stages on the
    devices. The pipeline computes the loss function on each microbatch, and combines
    the results by `reduction`.

    Arguments:
        loss_fn: `loss_fn(params, *batch)`, any function that JAX can trace. It returns
            a scalar; with `reduction="mean"` that is a mean over rows. Arrays of the
            batch are cut by rows on axis 0. `fpipe.NoChunk`, `Chunk` and `Microbatches`
            change that. Numbers (Python numbers and 0-d arrays) are traced, and go
            whole to every microbatch. Bools, strings and `None` are static. If an
            argument is named `key`, it is a PRNG key, and microbatch `i` gets
            `fold_in(fold_in(key, 0), i)`.
        argnums: the position of the model's parameters, a pytree, among the arguments
            of `loss_fn`. Default 0. Or several positions: first that of the parameters,
            then those of arguments of the batch. Then the gradients are a tuple, in
            this order.
        has_aux: whether `loss_fn` returns `(loss, aux)`. The `aux` of the microbatches
            is stacked, or, in an `fpipe.PerRow`, concatenated. Default `False`.
        devices, chunks: as for `fpipe.Pipe`.

    Other Arguments:
        stages, cuts: the places where the function is cut, as for `fpipe.split`.
            Default: the marks of `fpipe.cut` in the function. Without marks
            `fpipe.split` chooses the places, and `balance` joins the pieces to stages.
        specs: how parameters are sharded over the meshes of stages, as for
            `fpipe.split`.
        reduction: `"mean"` (default) or `"sum"`. Or `"weighted"`, for a function that
            returns `(sum, weight)`. See `Pipe.value_and_grad`.
        frozen: the parameters that get no gradient, as for `Pipe.value_and_grad`, with
            paths in the function's own tree.
        static_argnames: names of arguments that are static: another value compiles the
            programs again.
        init: a function that makes the parameters, `init(key)` or `init(key, *batch)`.
            `step.init` uses it.
        balance, checkpoint, schedule, executor, dispatch: as for `fpipe.Pipe`.
        mesh, data_axes, unshard: as for `fpipe.Pipe`.
        compute_dtype, detect_anomaly: as for `fpipe.Pipe`.
        recompute, offload: as for `fpipe.Pipe`.
        deferred_batch_norm: must be `False`, because it needs layers.

    Returns:
        A `ValueAndGrad`. `params = step.place(params, batch)` puts the parameters on
        their devices. Then `loss, grads = step(params, batch)`.

    Raises:
        TypeError, ValueError: an argument is wrong. Some mistakes show only with
            shapes; they are raised at the first batch.

    Example:
        >>> def loss_fn(params, x, y):
        ...     for w in params["layers"]:
        ...         x = jnp.tanh(x @ w)
        ...     return jnp.mean((x - y) ** 2)
        >>> params = {"layers": [jnp.eye(3)] * 4}
        >>> devices = [jax.devices()[0]] * 2
        >>> step = fpipe.value_and_grad(loss_fn, devices=devices, chunks=4)
        >>> x = jnp.ones((8, 3))
        >>> params = step.place(params, x, x)
        >>> loss, grads = step(params, x, x)
        >>> jax.tree.structure(grads) == jax.tree.structure(params)
        True
    """
    if as_bool("fpipe.value_and_grad", "deferred_batch_norm", deferred_batch_norm):
        raise ValueError(
            "`fpipe.value_and_grad(deferred_batch_norm=True)`: a loss function has no "
            "layers of batch norm: give layers to `fpipe.Pipe`"
        )
    if not callable(loss_fn):
        raise TypeError(
            f"`fpipe.value_and_grad(loss_fn)`: {shown(loss_fn)} is not callable; write "
            "`fpipe.value_and_grad(loss_fn, ...)(params, batch)`"
        )
    if init is not None and not callable(init):
        raise TypeError(
            f"`fpipe.value_and_grad(init={shown(init)})`: a function that makes the "
            "parameters, `init(key)` or `init(key, batch)`"
        )
    loss = as_loss("value_and_grad", loss_fn, has_aux, reduction)
    check_frozen("value_and_grad", frozen)
    function = LossFunction.checked(loss, argnums, static_argnames)
    options = {
        "balance": balance,
        "devices": devices if devices is None else list(devices),
        "chunks": check_chunks("fpipe.value_and_grad", chunks),
        "checkpoint": checkpoint,
        "schedule": schedule,
        "executor": executor,
        "dispatch": dispatch,
        "mesh": mesh,
        "data_axes": data_axes,
        "unshard": unshard,
        "compute_dtype": compute_dtype,
        "detect_anomaly": detect_anomaly,
        "recompute": recompute,
        "offload": offload,
    }
    cutting = {"stages": stages, "cuts": cuts, "specs": specs}
    return ValueAndGrad(function, cutting, options, frozen, init)
