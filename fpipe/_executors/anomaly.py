"""Finding faults: which layer, on which microbatch, made a NaN or an infinity first,
forward or backward.

The layers are changed, and nothing else: both executors run them as they run any
others. What goes from layer to layer is `Watched`: the value, and beside it the first
fault of the microbatch so far as one number. Backward faults go the other way by the
same road, as the cotangent of one more number, the `tap`: a layer's entry is an
identity whose pull-back looks at the layer's gradients and returns, as the gradient of
the tap, the code of the first fault. Thus the gradient of the tap that a microbatch
starts with names the first fault of its backward.

The codes hold no number of a layer that a program would have as a constant: layers are
counted on the way. So layers that compute the same stay the same program.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._core.pytrees import (
    PyTree,
    float0_like,
    is_array,
    is_inexact,
    is_traced,
    numbers_as_arrays,
    pack,
)
from fpipe._executors.call import OF_X, Args, Result
from fpipe._model.layer import Layer
from fpipe._model.loss import Loss, wide
from fpipe._model.microbatch import NoChunk, cut_inputs
from fpipe._model.model import Model, cast, wide_output

# A fault is a number, `layer * _FORWARD + bits` or `layer * _BACKWARD + bits`, and 0 is
# none; layer `L` of `L` is the loss.
_FORWARD, _BACKWARD = 256, 32
# What came out of a layer, and what it was given.
_OUT = {"y": 1, "carry": 2, "state": 4}
_GIVEN = {"params": 8, "borrowed": 16, "side": 32, "x": 64, "state": 128}
# What a layer's backward made a gradient of. The cotangent of an input is `_OPEN` until
# it is clear that anything before that layer asks for it: a layer that comes first may
# well have an infinite derivative that nobody uses.
_GRADIENT = {"params": 1, "borrowed": 2, "side": 4, "x": 8, "carry": 8}
_OPEN = 16
# A microbatch whose backward starts with something wrong.
_SAID = -1


_LOGGER = logging.getLogger("fpipe")


class Watched(NamedTuple):
    """What goes from layer to layer.

    Attributes:
        value: what went there before.
        layer: how many layers it has passed.
        fault: the first forward fault of the microbatch so far.
        tap: 0; its cotangent is the first backward fault.
    """

    value: PyTree
    layer: Any
    fault: Any
    tap: Any


def watched(model: Model) -> Model:
    """The model with faults looked for at every layer; it takes and returns `Watched`."""
    count = len(model.layers)
    layers = [
        dataclasses.replace(
            layer,
            apply=_WatchedLayer(layer, model.compute_dtype, k == count - 1),
            needs=layer.needs,
        )
        for k, layer in enumerate(model.layers)
    ]
    return Model(
        layers
    )  # which casts nothing: the layers do, so that taps are left alone


@dataclasses.dataclass(frozen=True)
class _WatchedLayer:
    layer: Layer
    dtype: Any
    last: bool

    def __call__(self, params: PyTree, x: Watched, **needs: Any) -> Any:
        given = {"params": params, "x": x.value} | {
            n: v for n, v in needs.items() if n in (*_GIVEN, "carry")
        }
        still = {n: needs[n] for n in needs if n not in ("carry", "borrowed", "side")}
        inner, tap = _tapped(
            {n: v for n, v in given.items() if n != "state"}, x.tap, x.layer
        )
        inner = {n: cast(v, self.dtype) for n, v in inner.items()}
        params, value = inner.pop("params"), inner.pop("x")
        result = self.layer.apply(params, value, **inner, **still)
        parts = [n for n in ("carry", "state") if self.layer.asks(n)]
        if parts and (type(result) is not tuple or len(result) != 1 + len(parts)):
            return result  # wrong, as whoever calls this will say
        y, *rest = result if parts else (result,)
        out = dict(zip(parts, rest, strict=True))
        if isinstance(out.get("carry"), dict):
            # A peeked skip goes back as it came, if it does.
            back = {n: inner["carry"][n] for n in self.layer.peek}
            out["carry"] = {
                n: needs["carry"][n] if n in back and v is back[n] else v
                for n, v in out["carry"].items()
            }
            stashed = {n: v for n, v in out["carry"].items() if n not in back}
        else:
            stashed = out.get("carry")
        y = wide_output(y, self.dtype) if self.last else y
        made = _flags({"y": y, "carry": stashed, "state": out.get("state")}, _OUT)
        before = _flags({n: v for n, v in given.items() if n != "carry"}, _GIVEN)
        # A state may begin with an infinity, for a running minimum.
        bad = (
            made["y"]
            | made["carry"]
            | (made["state"] & ~before.get("state", made["state"]))
        )
        bits = _bits(made, _OUT) + _bits(before, _GIVEN)
        fault = jnp.where(bad, x.layer * _FORWARD + bits, 0).astype(jnp.int32)
        y = Watched(y, x.layer + 1, _first(x.fault, fault), tap)
        return (y, *out.values()) if parts else y


@dataclasses.dataclass(frozen=True)
class _WatchedLoss:
    """A loss of `Watched`; its aux holds the microbatch's fault."""

    fn: Callable[..., Any]
    has_aux: bool
    weighted: bool

    def __call__(self, y: Watched, *targets: PyTree) -> Any:
        inner, _ = _tapped({"x": y.value, "side": targets}, y.tap, y.layer)
        result, aux = self.fn(inner["x"], *inner["side"]), None
        if self.has_aux:
            if not isinstance(result, tuple) or len(result) != 2:
                return result  # wrong, as `Loss` will say
            result, aux = result
        weight = None
        if self.weighted and isinstance(result, tuple) and len(result) == 2:
            weight = wide(jax.lax.stop_gradient(jnp.asarray(result[1])))
        made = _flags({"y": numbers_as_arrays(result)}, _OUT)
        bits = _bits(made, _OUT) + _bits(
            _flags({"x": y.value, "side": targets}, _GIVEN), _GIVEN
        )
        fault = jnp.where(made["y"], y.layer * _FORWARD + bits, 0).astype(jnp.int32)
        return result, {"aux": aux, "fault": _first(y.fault, fault), "weight": weight}


def _bad(tree: PyTree) -> Any:
    """Whether an array has a NaN or an infinity."""
    flags = [~jnp.isfinite(a).all() for a in pack(tree)[0] if is_inexact(a)]
    return functools.reduce(jnp.logical_or, flags, jnp.zeros((), bool))


def _flags(trees: Mapping[str, PyTree], bits: Mapping[str, int]) -> dict[str, Any]:
    return {n: _bad(trees[n]) for n in bits if n in trees}


def _bits(flags: Mapping[str, Any], bits: Mapping[str, int]) -> Any:
    return sum(
        (flag.astype(jnp.int32) * bits[n] for n, flag in flags.items()),
        jnp.zeros((), jnp.int32),
    )


def _first(fault: Any, later: Any) -> Any:
    return jnp.where(fault != 0, fault, later)


# --- the backward of a layer ---


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Asked:
    """The bit of each array whose gradient is asked for; 0 for those of others."""

    bits: tuple[int, ...]


def _tapped(
    given: Mapping[str, PyTree], tap: Any, layer: Any
) -> tuple[dict[str, PyTree], Any]:
    """The same values and tap, with the pull-back that looks at gradients."""
    arrays, spec = pack(dict(given))
    bits = [_GRADIENT[n] for n in sorted(given) for _ in pack(given[n])[0]]
    where = [n for n, a in enumerate(arrays) if is_inexact(a)]

    def forward(layer: Any, tap: Any, *floats: Any) -> Any:
        asked = _Asked(
            tuple(
                bits[n] if a.perturbed else 0
                for n, a in zip(where, floats, strict=True)
            )
        )
        return (tap.value, *(a.value for a in floats)), (layer.value, asked)

    def backward(kept: Any, cotangents: Sequence[Any]) -> tuple[Any, ...]:
        layer, asked = kept
        later, *own = [
            None if isinstance(c, jax.custom_derivatives.SymbolicZero) else c
            for c in cotangents
        ]
        found = {
            bit: [
                c
                for c, b in zip(own, asked.bits, strict=True)
                if b == bit and c is not None
            ]
            for bit in asked.bits
        }
        code = sum(
            _bad(cs).astype(jnp.int32) * bit for bit, cs in found.items() if bit
        ) + jnp.zeros((), jnp.int32)
        # Parameters are asked for or not; values are always, for the sake of the tap.
        code = jnp.where(
            code == 0,
            0,
            layer * _BACKWARD + code + jnp.where(code == _GRADIENT["x"], _OPEN, 0),
        )
        code = jnp.broadcast_to(code.astype(tap.dtype), tap.shape)
        if later is not None:
            if {b for b in asked.bits if b} - {_GRADIENT["x"]}:
                later = _closed(later)
            code = _first(later, code)
        return (float0_like(layer), code, *own)

    f = jax.custom_vjp(lambda layer, tap, *floats: (tap, *floats))
    f.defvjp(forward, backward, symbolic_zeros=True)
    tap, *floats = f(layer, tap, *(arrays[n] for n in where))
    for n, a in zip(where, floats, strict=True):
        arrays[n] = a
    return spec.unpack(arrays), tap


def _closed(code: Any) -> Any:
    """The code of a fault that counts."""
    return code - jnp.where(code % _BACKWARD >= _OPEN, _OPEN, 0).astype(code.dtype)


# --- calls ---


@dataclasses.dataclass(frozen=True)
class Detector:
    """Calls of a watched model, and what is said of their faults.

    Arguments:
        call: who makes them, for errors.
        model: the layers as they were given.
        balance: layers per stage; `None` without stages.
        chunks: the number of microbatches asked for.
        found: the first fault of traced calls that was not raised yet.
    """

    call: str
    model: Model
    balance: tuple[int, ...] | None
    chunks: int
    found: list[str] = dataclasses.field(
        default_factory=list, compare=False, repr=False
    )

    @functools.cached_property
    def watched(self) -> Model:
        """The model that runs."""
        return watched(self.model)

    def given(
        self, args: Args, loss: Loss | None, argnums: tuple[int, ...], tap: Any = None
    ) -> tuple[Args, Loss | None, tuple[int, ...]]:
        """A call as the watched model takes it."""
        m = cut_inputs(args.x, args.side, args.targets, self.chunks).m
        tap = np.zeros(m, np.float32) if tap is None else tap
        x = Watched(args.x, NoChunk(np.int32(0)), NoChunk(np.int32(0)), tap)
        if loss is None:
            return args._replace(x=x), None, argnums
        watching = _WatchedLoss(loss.fn, loss.has_aux, loss.reduction == "weighted")
        loss = dataclasses.replace(loss, fn=watching, has_aux=True)
        frozen = args.frozen
        if argnums and 1 not in argnums:
            # Of x the tap alone is asked for.
            argnums, frozen = (
                (*argnums, 1),
                frozen | {(OF_X, k) for k in range(len(pack(args.x)[0]))},
            )
        return args._replace(x=x, frozen=frozen), loss, argnums

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
        given, watching, numbers = self.given(args, loss, argnums)
        assert watching is not None
        result = run(given, watching, numbers)
        gradients = dict(zip(numbers, result.gradients, strict=True))
        tap = None
        if numbers:
            tap = gradients[1].tap
            gradients[1] = gradients[1].value
        out = result._replace(
            aux=result.aux["aux"], gradients=tuple(gradients[n] for n in argnums)
        )
        self._report(
            {
                "fault": result.aux["fault"],
                "tap": tap,
                "weight": result.aux["weight"],
                "loss": _bad(out.loss),
                "sums": {
                    f"argument {n}{jax.tree_util.keystr(path)}": _bad(a)
                    for n, g in zip(argnums, out.gradients, strict=True)
                    for path, a in jax.tree_util.tree_leaves_with_path(g)
                    if is_array(a) and is_inexact(a)
                },
            },
            asked=1 in argnums,
        )
        return out

    def forward(
        self, run: Callable[[Args], tuple[PyTree, Any]], args: Args
    ) -> tuple[PyTree, Any]:
        """A call without a loss, perhaps differentiated.

        Raises:
            FloatingPointError: it made a NaN or an infinity, or a pull-back was given
                one.
        """
        if not is_traced(args):
            y, state = run(self.given(args, None, ())[0])
            self._report({"fault": y.fault})
            return y.value, state
        tap = self._entry(args)
        y, state = run(self.given(args, None, (), tap)[0])
        return self._exit(y), state

    def _entry(self, args: Args) -> Any:
        """A tap that is differentiated if anything is, and whose pull-back reports."""
        m = cut_inputs(args.x, args.side, (), self.chunks).m

        def floats(tree: PyTree) -> list[Any]:
            return [a for a in jax.tree.leaves(tree) if is_array(a) and is_inexact(a)]

        first = floats(args.x)
        others = floats((args.params, args.side))

        def forward(*primals: Any) -> Any:
            asked = any(a.perturbed for a in primals[: len(first)])
            return jnp.zeros(m, jnp.float32), _Asked((int(asked),))

        def backward(kept: _Asked, tap: Any) -> tuple[None, ...]:
            if not isinstance(tap, jax.custom_derivatives.SymbolicZero):
                self._report({"tap": tap}, asked=bool(kept.bits[0]))
            return (None,) * (len(first) + len(others))

        f = jax.custom_vjp(lambda *_: jnp.zeros(m, jnp.float32))
        f.defvjp(forward, backward, symbolic_zeros=True)
        return f(*first, *others)

    def _exit(self, y: Watched) -> PyTree:
        """The output, after its fault was reported; the pull-back looks at what it is
        given.
        """
        arrays, spec = pack(y.value)

        def primal(fault: Any, tap: Any, *arrays: Any) -> list[Any]:
            del tap
            self._report({"fault": fault})
            return list(arrays)

        def forward(fault: Any, tap: Any, *arrays: Any) -> Any:
            return primal(fault, tap, *arrays), (fault, tap)

        def backward(kept: Any, cotangents: Sequence[Any]) -> tuple[Any, ...]:
            fault, tap = kept
            bad = _bad(list(cotangents))
            # What was said of the forward is not said again of what follows from it.
            self._report({"cotangent": bad & (fault == 0).all()})
            said = jnp.where((fault != 0) | bad, _SAID, 0).astype(tap.dtype)
            return (float0_like(fault), said, *cotangents)

        f = jax.custom_vjp(primal)
        f.defvjp(forward, backward)
        return spec.unpack(f(y.fault, y.tap, *arrays))

    def raise_found(self) -> None:
        """Raise what traced calls have found since this was called last.

        Raises:
            FloatingPointError: it is the first that was found.
        """
        jax.effects_barrier()
        if self.found:
            text = self.found[0]
            self.found.clear()
            raise FloatingPointError(text)

    def _report(self, evidence: dict[str, Any], asked: bool = False) -> None:
        """Raise what the evidence says; inside a trace, have it noted when the program
        runs.
        """
        if is_traced(evidence):
            jax.debug.callback(functools.partial(self._note, asked), evidence)
            return
        text = self._verdict(asked, evidence)
        if text is not None:
            raise FloatingPointError(text)

    def _note(self, asked: bool, evidence: dict[str, Any]) -> None:
        # Nothing is raised here: that would stop one device, and the others of the
        # program would wait for it for ever.
        text = self._verdict(asked, evidence)
        if text is not None and not self.found:
            self.found.append(text)
            _LOGGER.error("%s", text)

    def _verdict(self, asked: bool, evidence: dict[str, Any]) -> str | None:
        """What there is to say of a call, if anything is wrong."""
        text, evidence = None, jax.tree.map(np.asarray, evidence)
        fault, tap, weight = (evidence.get(n) for n in ("fault", "tap", "weight"))
        if fault is not None and fault.any():
            text = self._forward_text(fault.reshape(-1))
        elif evidence.get("loss"):
            text = self._sum_text(weight)
        elif tap is not None:
            codes = (
                tap.reshape(-1) if weight is None else tap.reshape(-1) * weight.sum()
            )
            text = self._backward_text(np.rint(codes).astype(np.int64), asked)
        if text is None and evidence.get("cotangent"):
            text = "the pull-back was given a cotangent of the output that has a NaN or an infinity: look at what follows the call"
        sums = [name for name, bad in evidence.get("sums", {}).items() if bad]
        if text is None and sums:
            text = f"the gradient of {sums[0]} is not finite, though that of every microbatch is: their sum overflows"
        return text if text is None else f"`{self.call}(detect_anomaly=True)`: {text}"

    def _forward_text(self, fault: np.ndarray) -> str:
        i = int(np.flatnonzero(fault)[0])
        k, bits = divmod(int(fault[i]), _FORWARD)
        who = f"{self._who(k)}, microbatch {i}, forward (F)"
        if k == len(self.model.layers):
            before = _named(bits, {64: "the model's output", 32: "targets"})
            made = "the loss is not finite"
        else:
            before = _named(
                bits,
                {
                    8: "its parameters",
                    16: "its borrowed parameters",
                    32: "its side inputs",
                    64: "the call's x" if k == 0 else "its input",
                    128: "its state",
                },
            )
            made = f"{_named(bits, {1: 'its output', 2: 'what it stashes', 4: 'its new state'})} is not finite"
        if before:
            cause = f"{made}, and before that {before} had a NaN or an infinity already: the layer only passed it on"
        else:
            cause = f"{made}, of finite inputs: look for a division, a logarithm or an overflow in it; `jax.debug_nans` names the operation"
        return f"{who}: {cause}{_others(fault, i)}"

    def _backward_text(self, codes: np.ndarray, asked: bool) -> str | None:
        codes = np.where(
            (codes < 0) | ((codes % _BACKWARD >= _OPEN) & (not asked)), 0, codes
        )
        if not codes.any():
            return None
        i = int(np.flatnonzero(codes)[0])
        k, bits = divmod(int(codes[i]), _BACKWARD)
        last = k == len(self.model.layers)
        names = {
            1: "its parameters",
            2: "its borrowed parameters",
            4: "its side inputs",
            8: "its input",
        }
        names = {8: "the model's output", 4: "targets"} if last else names
        return (
            f"{self._who(k)}, microbatch {i}, backward (B): the gradient of "
            f"{_named(bits, names)} is not finite, of finite "
            "cotangents: a derivative is infinite (sqrt, a norm or a division at 0) or "
            "overflows; keep its argument away from "
            f"there with `jnp.where` before the function{_others(codes, i)}"
        )

    def _sum_text(self, weight: Any) -> str:
        if weight is not None and not weight.sum():
            return 'the total weight of `reduction="weighted"` is 0: write `jnp.maximum(weight, 1)` in the loss'
        return "the loss is not finite, though that of every microbatch is: their sum, or a `loss_scale`, overflows"

    def _who(self, k: int) -> str:
        layers = self.model.layers
        name = "the loss" if k == len(layers) else f"layer {k} {layers[k].name!r}"
        if self.balance is None:
            return name
        ends = np.cumsum(self.balance)
        return f"stage {min(int(np.searchsorted(ends, k, side='right')), len(ends) - 1)}, {name}"


def _named(bits: int, names: Mapping[int, str]) -> str:
    return " and ".join(name for bit, name in names.items() if bits & bit)


def _others(codes: np.ndarray, first: int) -> str:
    found = [int(i) for i in np.flatnonzero(codes)]
    if found == [first]:
        return ""
    return f". Microbatches with faults: {', '.join(map(str, found[:8]))}{', …' if len(found) > 8 else ''}"
