"""Finding faults: which layer, on which microbatch, made a NaN or an infinity first,
forward or backward.

The layers are changed, and nothing else: both executors run them as they run any
others. What goes from layer to layer is `Watched`: the value, and beside it the first
fault of the microbatch so far, as a number (`fpipe._executors.faults`):

    x ──> layer 0 ──────> layer 1 ──────> loss
    fault 0 ──> 0 ────────> 257 ────────> 257     forward codes, first one wins
    tap gradient 34 <────── 0 <────────── 0       backward codes, last layer first

Backward faults go the other way by the same road, as the cotangent of one more number,
the *tap*: a layer's entry is an identity whose pull-back looks at the layer's gradients
and returns, as the gradient of the tap, the code of the first fault. So the gradient
of the tap that a microbatch starts with names the first fault of its backward.

A program does not hold the position of a layer as a constant: layers are counted on the
way. So layers that compute the same stay the same program.

Two other ways would not do. A host callback in each layer: on CPU, programs with
callbacks run on the thread that calls them, so devices would no longer overlap.
`jax.debug_nans`: it names the operation, and neither the layer nor the microbatch.
Here the host looks once, at the codes, when the call has its results.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._core.processes import ghost, is_ghost, share, unknown_flag
from fpipe._core.pytrees import (
    PyTree,
    float0_like,
    is_array,
    is_inexact,
    is_traced,
    numbers_as_arrays,
    pack,
)
from fpipe._core.settings import explicit_transfers
from fpipe._executors.call import Args, Result
from fpipe._executors.faults import (
    BACKWARD,
    FORWARD,
    REPORTED,
    BackwardPart,
    Explainer,
    ForwardPart,
    confirm,
)
from fpipe._executors.request import differentiable_inputs
from fpipe._model.layer import Layer
from fpipe._model.loss import Loss, wide
from fpipe._model.microbatch import Cut, cut_inputs
from fpipe._model.model import Model, cast, wide_output
from fpipe._model.needs import DIFFERENTIABLE
from fpipe._model.stages import Leaf, X
from fpipe._model.wrappers import Microbatches, NoChunk

_LOGGER = logging.getLogger("fpipe")

# The inputs of a layer whose gradients are checked in its backward. Skips that a layer
# pops or peeks at count as its input, because an earlier layer made them too.
_TAPPED = {
    "params": BackwardPart.PARAMS,
    "x": BackwardPart.INPUT,
    "carry": BackwardPart.INPUT,
    "borrowed": BackwardPart.BORROWED,
    **dict.fromkeys(DIFFERENTIABLE, BackwardPart.SIDE),
}


class Watched(NamedTuple):
    """What goes from layer to layer.

    Attributes:
        value: what went there before.
        layer: how many layers it has passed.
        fault: the first forward fault of the microbatch so far.
        tap: 0; its cotangent is the first backward fault. A float, for integers have no
            cotangents: float32 holds codes up to 2**24 exactly.
    """

    value: PyTree
    layer: Any
    fault: Any
    tap: Any


def watch_model(model: Model) -> Model:
    """The model that looks for faults at every layer, from `Watched` to `Watched`."""
    last = len(model.layers) - 1
    layers = [
        dataclasses.replace(
            layer,
            apply=_WatchedLayer(layer, model.compute_dtype, position == last),
            needs=layer.needs,
        )
        for position, layer in enumerate(model.layers)
    ]
    # This model casts nothing. The layers do, so that taps and faults are left alone.
    return Model(layers, one_key=model.one_key)


@dataclasses.dataclass(frozen=True)
class _WatchedLayer:
    """A layer's function that takes and returns `Watched`."""

    layer: Layer
    compute_dtype: Any
    last: bool

    @property
    def __wrapped__(self) -> Any:
        """Whose signature says what it needs; Python's convention for wrappers."""
        return self.layer.apply

    def __call__(self, params: PyTree, x: Watched, **needs: Any) -> Any:
        # What the layer is given goes through the tap first. Then it is cast, here and
        # not by the model. So the gradients that are checked are those of the uncast
        # inputs, as a call returns them.
        values = {"params": params, "x": x.value}
        values |= {name: needs.pop(name) for name in list(needs) if name in _TAPPED}
        tapped, tap = tap_gradients(values, x.tap, x.layer)
        inputs = {name: cast(v, self.compute_dtype) for name, v in tapped.items()}
        result = self.layer.apply(
            inputs["params"],
            inputs["x"],
            **{name: inputs[name] for name in inputs if name not in ("params", "x")},
            **needs,
        )

        # What it returned, taken apart as the model would do it.
        names = [name for name in ("carry", "state") if self.layer.asks(name)]
        if not names:
            y = result
            returned = {}
        elif type(result) is tuple and len(result) == 1 + len(names):
            y = result[0]
            returned = dict(zip(names, result[1:], strict=True))
        else:
            return result  # It is wrong; the model checks it, and its error says so.
        stashed = returned.get("carry")
        if isinstance(stashed, dict):
            # A layer must return a peeked skip unchanged, and that is checked by
            # identity. So if the layer did not change it, the one from before the tap
            # is returned.
            peeked = {name: inputs["carry"][name] for name in self.layer.peek}
            returned["carry"] = {
                name: values["carry"][name]
                if name in peeked and value is peeked[name]
                else value
                for name, value in stashed.items()
            }
            stashed = {n: v for n, v in stashed.items() if n not in peeked}
        if self.last:
            y = wide_output(y, self.compute_dtype)

        # It is a fault of this layer if something that it made is not finite. The
        # values that it was given are kept too, for the message.
        found = {
            ForwardPart.OUTPUT: is_bad(y),
            ForwardPart.STASHED: is_bad(stashed),
            ForwardPart.NEW_STATE: is_bad(returned.get("state")),
            ForwardPart.PARAMS: is_bad(params),
            ForwardPart.BORROWED: is_bad(values.get("borrowed")),
            ForwardPart.SIDE: is_bad([values.get(name) for name in DIFFERENTIABLE]),
            ForwardPart.INPUT: is_bad(x.value),
            ForwardPart.STATE: is_bad(needs.get("state")),
        }
        # A state may begin with an infinity, for example a running minimum.
        bad_state = found[ForwardPart.NEW_STATE] & ~found[ForwardPart.STATE]
        bad = found[ForwardPart.OUTPUT] | found[ForwardPart.STASHED] | bad_state
        fault = jnp.where(bad, FORWARD.encode(x.layer, found), 0)
        watched = Watched(y, x.layer + 1, first_fault(x.fault, fault), tap)
        return (watched, *returned.values()) if names else watched


@dataclasses.dataclass(frozen=True)
class _WatchedLoss:
    """A loss of `Watched`; its aux holds the microbatch's fault."""

    fn: Callable[..., Any]
    has_aux: bool
    weighted: bool

    def __call__(self, y: Watched, *targets: PyTree) -> Any:
        # Nothing reads the last tap: the backward begins with the loss, without a
        # fault.
        tapped, _ = tap_gradients({"x": y.value, "side": targets}, y.tap, y.layer)
        result = self.fn(tapped["x"], *tapped["side"])
        aux = None
        if self.has_aux:
            if not isinstance(result, tuple) or len(result) != 2:
                return result  # It is wrong, and `Loss` says so.
            result, aux = result
        weight = None
        if self.weighted and isinstance(result, tuple) and len(result) == 2:
            weight = wide(jax.lax.stop_gradient(jnp.asarray(result[1])))
        found = {
            ForwardPart.OUTPUT: is_bad(numbers_as_arrays(result)),
            ForwardPart.SIDE: is_bad(targets),
            ForwardPart.INPUT: is_bad(y.value),
        }
        code = FORWARD.encode(y.layer, found)
        fault = jnp.where(found[ForwardPart.OUTPUT], code, 0)
        return result, _WatchedAux(aux, first_fault(y.fault, fault), weight)


class _WatchedAux(NamedTuple):
    """The aux of a `_WatchedLoss`: the loss's own, and the microbatch's first forward
    fault and weight.
    """

    aux: PyTree
    fault: Any
    weight: Any


# A tap is cut like `x`, so it has an entry for each row, and all rows of a microbatch
# have its code. (Where nothing is cut there is one row.) Beside ready-made microbatches
# it is ready-made too.


def _spread(zeros: Callable[..., Any], cut: Cut) -> Any:
    """A tap that is 0."""
    if cut.ready:
        return Microbatches([zeros((), np.float32)] * cut.m)
    return zeros(sum(cut.rows) or 1, np.float32)


def _codes(tap: Any, cut: Cut) -> Any:
    """The codes of the microbatches, from a tap's gradient."""
    # To index an array of another process would end this one: the numbers are not
    # committed.
    if (unknown := next(filter(is_ghost, jax.tree.leaves(tap)), None)) is not None:
        return ghost((cut.m,), unknown.dtype, unknown.sharding)
    if cut.ready:
        codes = [jnp.zeros(()) if _is_zero(code) else code for code in tap]
        return jnp.stack(codes)
    return tap[np.cumsum((0, *cut.rows[:-1]))]


def _of_codes(codes: Any, cut: Cut) -> Any:
    """The inverse: what a tap is given."""
    if cut.ready:
        return Microbatches([codes[i] for i in range(cut.m)])
    return codes[np.repeat(np.arange(cut.m), cut.rows or (1,))]


def _is_zero(cotangent: Any) -> bool:
    return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)


def _as_one(y: Any) -> Watched:
    """The output of a watched call; of ready-made microbatches several come out."""
    if not isinstance(y, Microbatches):
        return y
    value, _, _, tap = (Microbatches(column) for column in zip(*y, strict=True))
    return Watched(value, None, jnp.stack([piece.fault for piece in y]), tap)


def is_bad(tree: PyTree) -> Any:
    """Whether an array has a NaN or an infinity, as a boolean array."""
    bad = jnp.zeros((), bool)
    for array in pack(tree)[0]:
        if is_inexact(array):
            bad |= ~jnp.isfinite(array).all()
    return bad


def first_fault(fault: Any, later: Any) -> Any:
    """The code of the fault that was first: `later` if `fault` is none."""
    return jnp.where(fault != 0, fault, later)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _AskedParts:
    """For each array the part of the layer that it belongs to, if its gradient is asked
    for. It goes from a forward rule to its backward rule, so it has to be a pytree.
    """

    parts: tuple[BackwardPart | None, ...]


def tap_gradients(
    values: Mapping[str, PyTree], tap: Any, layer: Any
) -> tuple[dict[str, PyTree], Any]:
    """The same values and tap, with a pull-back that looks at gradients.

    The pull-back of this identity runs after the layer's own backward: the cotangents
    that it gets are the layer's gradients of what it was given.

        forward     values, tap  ->  the same
        backward    gradients, code of later layers  ->  the same gradients, and
                    code = later, if it is not 0, else that of these gradients

    Arguments:
        values: what a layer is given, by the names in `_TAPPED`.
        tap: its cotangent is the code of the first fault of the layers that follow; the
            gradient that the pull-back gives it is the first one of this layer too.
        layer: the layer's position.
    """
    values = dict(values)
    arrays, spec = pack(values)
    # For each array the part that it belongs to, in the order in which JAX flattens a
    # dict.
    parts = [_TAPPED[name] for name in sorted(values) for _ in pack(values[name])[0]]
    numbers = [n for n, array in enumerate(arrays) if is_inexact(array)]

    def forward(layer: Any, tap: Any, *floats: Any) -> Any:
        asked = [
            parts[n] if a.perturbed else None
            for n, a in zip(numbers, floats, strict=True)
        ]
        # A gradient that the call does not ask for is not checked, because it would be
        # computed only for the check.
        outputs = (tap.value, *(a.value for a in floats))
        return outputs, (layer.value, _AskedParts(tuple(asked)))

    def backward(kept: Any, cotangents: Sequence[Any]) -> tuple[Any, ...]:
        layer, asked = kept
        symbolic = jax.custom_derivatives.SymbolicZero
        # A symbolic zero is finite, and looking at it would make an array of it.
        later, *gradients = [None if isinstance(c, symbolic) else c for c in cotangents]
        by_part: dict[BackwardPart, list[Any]] = {
            part: [] for part in asked.parts if part is not None
        }
        for part, gradient in zip(asked.parts, gradients, strict=True):
            if part is not None and gradient is not None:
                by_part[part].append(gradient)
        # Parameters are asked for or not. Values always are, for the sake of the tap,
        # so a fault of the input alone is pending.
        found = {part: is_bad(gradients) for part, gradients in by_part.items()}
        bad = jnp.zeros((), bool)
        bad_input_only = found.get(BackwardPart.INPUT, bad)
        for part, flag in found.items():
            bad |= flag
            if part is not BackwardPart.INPUT:
                bad_input_only &= ~flag
        found[BackwardPart.PENDING] = bad_input_only
        code = jnp.where(bad, BACKWARD.encode(layer, found), 0)
        code = jnp.broadcast_to(code.astype(tap.dtype), tap.shape)
        # A pending fault of a later layer is confirmed if the call asks for more of
        # this layer than the gradient of its input, because that is made from the
        # infinite gradient.
        if later is not None:
            if set(by_part) - {BackwardPart.INPUT}:
                later = confirm(later)
            code = first_fault(later, code)
        return (float0_like(layer), code, *gradients)

    identity = jax.custom_vjp(lambda layer, tap, *floats: (tap, *floats))
    identity.defvjp(forward, backward, symbolic_zeros=True)
    tap, *floats = identity(layer, tap, *(arrays[n] for n in numbers))
    for n, array in zip(numbers, floats, strict=True):
        arrays[n] = array
    return spec.unpack(arrays), tap


# --- calls ---


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a call, or a part of one, tells of its faults; `None` is nothing.

    Attributes:
        faults: the forward codes of the microbatches, of shape `(m,)`.
        taps: the gradients of their taps, which are the backward codes.
        weights: the weights of the microbatches, by whose sum all gradients were
            divided, those of the taps too.
        bad_loss: whether the loss of the whole call is not finite.
        bad_sums: by the name of a gradient whether it is not finite.
        bad_cotangent: whether what a pull-back was given is not finite.
        x_asked: whether the gradient of `x` was asked for.
    """

    faults: Any = None
    taps: Any = None
    weights: Any = None
    bad_loss: Any = None
    bad_sums: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bad_cotangent: Any = None
    x_asked: bool = dataclasses.field(default=False, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Detector:
    """Calls of a watched model, and what is said of their faults.

    Arguments:
        call: who makes them, for errors.
        model: the layers as they were given.
        balance: layers per stage; `None` without stages.
        chunks: the number of microbatches asked for.
        over_processes: whether what a call makes is in several processes, each of
            which looks at what it has.
        found: the first fault of traced calls that was not raised yet.
    """

    call: str
    model: Model
    balance: tuple[int, ...] | None
    chunks: int
    over_processes: bool = False
    found: list[str] = dataclasses.field(
        default_factory=list, compare=False, repr=False
    )

    @functools.cached_property
    def watched(self) -> Model:
        """The same layers, each of them watched: the model that runs."""
        return watch_model(self.model)

    def watch_call(
        self, args: Args, loss: Loss | None, argnums: tuple[int, ...], tap: Any = None
    ) -> tuple[Args, Loss | None, tuple[int, ...]]:
        """A call as the watched model takes it."""
        # The layer's number and the fault begin as 0 for all.
        tap = _spread(np.zeros, self._cut(args)) if tap is None else tap
        x = Watched(args.x, NoChunk(np.int32(0)), NoChunk(np.int32(0)), tap)
        frozen = args.frozen
        if loss is not None:
            watching = _WatchedLoss(loss.fn, loss.has_aux, loss.reduction == "weighted")
            loss = dataclasses.replace(loss, fn=watching, has_aux=True)
        if argnums and 1 not in argnums:
            # Of `x` only the gradient of the tap is asked for. Its own arrays are
            # frozen, so no more products are computed than without a detector.
            argnums = (*argnums, 1)
            frozen |= {Leaf(X, k) for k in range(len(pack(args.x)[0]))}
        return args._replace(x=x, frozen=frozen), loss, argnums

    # The arrays that a detector checks are on devices, where the call left them. They
    # are copied to the host.
    @explicit_transfers()
    def loss(
        self,
        run: Callable[[Args, Loss, tuple[int, ...]], Result],
        args: Args,
        loss: Loss,
        argnums: tuple[int, ...],
    ) -> Result:
        """A call with a loss.

        Raises:
            FloatingPointError: it made a NaN or an infinity.
        """
        watched_args, watched_loss, numbers = self.watch_call(args, loss, argnums)
        assert watched_loss is not None
        result = run(watched_args, watched_loss, numbers)
        # The tap's gradient comes back as part of that of `x`, and is taken out of it.
        gradients = dict(zip(numbers, result.gradients, strict=True))
        taps = None
        if numbers:
            taps = _codes(gradients[1].tap, self._cut(args))
            gradients[1] = gradients[1].value
        named = {n: gradients[n] for n in argnums}
        bad_sums = {
            f"argument {n}{jax.tree_util.keystr(path)}": (
                # Another process looks. (A program of a ghost and an array that is not
                # committed ends the process when it is called again, jax 0.10.2.)
                unknown_flag(array) if is_ghost(array) else is_bad(array)
            )
            for n, tree in _as_numbered(named, args)
            for path, array in jax.tree_util.tree_leaves_with_path(tree)
            if is_array(array) and is_inexact(array)
        }
        self._report(
            Evidence(
                faults=result.aux.fault,
                taps=taps,
                weights=result.aux.weight,
                bad_loss=is_bad(result.loss),
                bad_sums=bad_sums,
                x_asked=1 in argnums,
            )
        )
        return result._replace(
            aux=result.aux.aux, gradients=tuple(gradients[n] for n in argnums)
        )

    @explicit_transfers()
    def forward(
        self, run: Callable[[Args], tuple[PyTree, Any]], args: Args
    ) -> tuple[PyTree, Any]:
        """A call without a loss, perhaps differentiated.

        Raises:
            FloatingPointError: it made a NaN or an infinity, or a pull-back was given
                one.
        """
        # Without tracers nothing is differentiated. With them a pull-back may follow
        # later, and JAX does not tell when; so taps and outputs report by themselves.
        if not is_traced(args):
            y, state = run(self.watch_call(args, None, ())[0])
            y = _as_one(y)
            self._report(Evidence(faults=y.fault))
            return y.value, state
        tap = self._reporting_tap(args)
        y, state = run(self.watch_call(args, None, (), tap)[0])
        return self._reporting_output(_as_one(y), self._cut(args)), state

    def _cut(self, args: Args) -> Cut:
        return cut_inputs(args.inputs, self.chunks)

    def _reporting_tap(self, args: Args) -> Any:
        """A tap that is differentiated if anything is, and whose pull-back reports."""
        # It is a function of everything that can be differentiated, and constant: JAX
        # sends its cotangent, the codes, to this pull-back at the end of the backward.
        cut = self._cut(args)
        of_x = [a for a in pack(args.x)[0] if is_inexact(a)]
        varied = (args.params, differentiable_inputs(args))
        others = [a for a in pack(varied)[0] if is_inexact(a)]

        def forward(*primals: Any) -> Any:
            # The part says only whether any gradient of x is asked for.
            x_asked = any(a.perturbed for a in primals[: len(of_x)])
            asked = _AskedParts((BackwardPart.INPUT,) if x_asked else ())
            return _spread(jnp.zeros, cut), asked

        def backward(asked: _AskedParts, taps: Any) -> tuple[None, ...]:
            given = [t for t in jax.tree.leaves(taps) if not _is_zero(t)]
            if given:
                self._report(
                    Evidence(taps=_codes(taps, cut), x_asked=bool(asked.parts))
                )
            return (None,) * (len(of_x) + len(others))

        tap = jax.custom_vjp(lambda *_: _spread(jnp.zeros, cut))
        tap.defvjp(forward, backward, symbolic_zeros=True)
        return tap(*of_x, *others)

    def _reporting_output(self, y: Watched, cut: Cut) -> PyTree:
        """The output, after its fault was reported; the pull-back looks at what it is
        given.
        """
        arrays, spec = pack(y.value)

        def primal(faults: Any, taps: Any, *arrays: Any) -> list[Any]:
            del taps
            self._report(Evidence(faults=faults))
            return list(arrays)

        def forward(faults: Any, taps: Any, *arrays: Any) -> Any:
            return primal(faults, taps, *arrays), (faults, taps)

        def backward(kept: Any, cotangents: Sequence[Any]) -> tuple[Any, ...]:
            # This is where the backward begins, so a code that is put here wins over
            # all that follow.
            faults, taps = kept
            bad = is_bad(list(cotangents))
            # A fault that was reported for the forward is not reported again for what
            # follows from it.
            self._report(Evidence(bad_cotangent=bad & (faults == 0).all()))
            del taps
            codes = jnp.where((faults != 0) | bad, REPORTED, 0).astype(jnp.float32)
            return (float0_like(faults), _of_codes(codes, cut), *cotangents)

        output = jax.custom_vjp(primal)
        output.defvjp(forward, backward)
        return spec.unpack(output(y.fault, y.tap, *arrays))

    def raise_found(self) -> None:
        """Raise what traced calls have found since this was called last.

        Raises:
            FloatingPointError: it is the first that was found.
        """
        # Callbacks run when the devices come to them: wait until all have run.
        jax.effects_barrier()
        if self.found:
            text = self.found[0]
            self.found.clear()
            raise FloatingPointError(text)

    def _report(self, evidence: Evidence) -> None:
        """Raise what the evidence says; inside a trace, have it noted when the program
        runs.
        """
        if is_traced(evidence):
            jax.debug.callback(self._note, evidence)
            return
        if self.over_processes:
            arrays, structure = jax.tree.flatten(evidence)
            evidence = structure.unflatten(share(arrays))
        text = self._verdict(evidence)
        if text is not None:
            raise FloatingPointError(text)

    def _note(self, evidence: Evidence) -> None:
        # Nothing is raised here: that would stop one device, and the others of the
        # program would wait for it for ever.
        text = self._verdict(evidence)
        if text is not None and not self.found:
            self.found.append(text)
            _LOGGER.error("%s", text)

    def _verdict(self, evidence: Evidence) -> str | None:
        """What there is to say of a call, if anything is wrong."""
        # A fault may cause the next one in this order: forwards, the whole loss,
        # backwards, the cotangents of a pull-back, sums of gradients. Only the first is
        # reported.
        evidence = jax.tree.map(np.asarray, evidence)
        side_inputs = "its side inputs"
        if self.model.one_key:
            side_inputs = "what the call gives it, of `x` or of the side inputs,"
        explainer = Explainer(
            tuple(layer.name for layer in self.model.layers), self.balance, side_inputs
        )
        text = None
        if evidence.faults is not None and evidence.faults.any():
            text = explainer.explain_forward(evidence.faults.reshape(-1))
        elif evidence.bad_loss:
            text = (
                "the loss is not finite, though that of every microbatch is: their "
                "sum, or a `loss_scale`, overflows"
            )
            if evidence.weights is not None and not evidence.weights.sum():
                text = (
                    'the total weight of `reduction="weighted"` is 0: write '
                    "`jnp.maximum(weight, 1)` in the loss"
                )
        elif evidence.taps is not None:
            # `weighted` divides every gradient by the total weight, the taps' too. That
            # is undone, and rounded: codes are whole numbers.
            codes = evidence.taps.reshape(-1)
            if evidence.weights is not None:
                codes = codes * evidence.weights.sum()
            codes = np.rint(codes).astype(np.int64)
            text = explainer.explain_backward(codes, evidence.x_asked)
        if text is None and evidence.bad_cotangent:
            text = (
                "the pull-back was given a cotangent of the output that has a NaN or "
                "an infinity: look at what follows the call"
            )
        if text is None:
            for name, bad in evidence.bad_sums.items():
                if bad:
                    text = (
                        f"the gradient of {name} is not finite, though that of every "
                        "microbatch is: their sum overflows"
                    )
                    break
        return None if text is None else f"`{self.call}(detect_anomaly=True)`: {text}"


def _as_numbered(
    gradients: Mapping[int, PyTree], args: Args
) -> Iterator[tuple[int, PyTree]]:
    """Gradients in the order of the user's `argnums`. Parts of `x` that go straight to
    layers come after all others.
    """
    for n, tree in gradients.items():
        if n == len(args.numbered):
            yield 1, tree.x
        else:
            yield n, tree
