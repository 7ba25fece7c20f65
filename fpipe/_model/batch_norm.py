"""Deferred batch normalisation: running statistics of the whole batch, updated once per
call.

After torchgpipe (Kim et al., arXiv 2004.09910, section 4.1.4). torchgpipe adds up sums
and sums of squares, and these cancel where the mean is large. This module merges means
and summed squared distances pair by pair (Chan, Golub and LeVeque, "Algorithms for
computing the sample variance", 1983). For 4,096 numbers in float32 with mean 10,000 and
variance 1.02, sums of squares give the variance 0, and merged halves give 1.02.

The state of a layer with two features goes from microbatch to microbatch:

    {"mean": [0, 0], "var": [1, 1], "calls": 0,          as the last call left them
     "moments": (count, mean [., .], m2 [., .])}         of this call's microbatches

Each microbatch merges its own moments into the last row. `finish` mixes the last row
into the first and empties it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._core.checks import as_bool, as_compute_dtype, is_at_least
from fpipe._core.errors import noting, shown
from fpipe._model.layer import Layer


class Moments(NamedTuple):
    """Mean and spread of some values, in float32 (float64 if the values are).

    `count` is how many there are, 0-d or in the shape of `mean`; `m2` is the sum of
    squared distances from the mean.
    """

    count: Any
    mean: Any
    m2: Any


def moments(x: Any, axes: Sequence[int]) -> Moments:
    """The moments of `x` over `axes`.

    The corrected two-pass algorithm: distances are taken from a first mean, and the
    error of that mean is then corrected.
    """
    x = x.astype(statistics_dtype(x.dtype))
    count = math.prod(x.shape[a] for a in axes)
    # The result is the same from any origin, so no gradient needs to go through it.
    origin = jax.lax.stop_gradient(x.mean(axes, keepdims=True))
    distance = x - origin
    # In exact arithmetic `off` is 0. In float32 the mean of large numbers is rounded,
    # and without this correction `m2` would be too large by the square of the rounding.
    off = distance.mean(axes)
    m2 = jnp.square(distance).sum(axes) - count * jnp.square(off)
    # Rounding may leave a tiny negative `m2`, whose root would be nan.
    mean = origin.reshape(off.shape) + off
    return Moments(jnp.asarray(count, x.dtype), mean, jnp.maximum(m2, 0))


def no_moments(shape: Sequence[int], dtype: Any = jnp.float32) -> Moments:
    """The moments of no values: merged with others they change nothing."""
    zeros = jnp.zeros(shape, dtype)
    return Moments(jnp.zeros((), dtype), zeros, zeros)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of the values of `a` and `b` together; either may have none."""
    # With n values in all and the distance d between the two means (Chan et al.):
    #     mean = mean_a + d * n_b / n
    #     m2   = m2_a + m2_b + d**2 * n_a * n_b / n
    # No large numbers are subtracted from each other, so nothing cancels.
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    distance = b.mean - a.mean
    mean = a.mean + distance * share
    # `a.count * share` first: it is 0 where one has no values, and a large distance
    # squared would be inf.
    m2 = a.m2 + b.m2 + distance * (distance * (a.count * share))
    return Moments(count, mean, m2)


def variance(values: Moments, unbiased: bool = False) -> Any:
    """The variance; `unbiased` divides by the count less one. Of no values, and
    unbiased of one value, it is 0.
    """
    divisor = values.count - 1 if unbiased else values.count
    return values.m2 / jnp.maximum(divisor, 1)


def updated(old: Any, new: Any, momentum: Any, count: Any) -> Any:
    """A running statistic after a call: `momentum * old + (1 - momentum) * new`, or
    `old` if nothing was counted.
    """
    mixed = momentum * old + (1 - momentum) * new.astype(old.dtype)
    # `where` and not `if`: the count is traced.
    return jnp.where(count > 0, mixed, old)


def DeferredBatchNorm(  # noqa: N802 - it stands where a class of layers would
    axis: int | Sequence[int] = -1,
    momentum: float | None = 0.99,
    epsilon: float = 1e-5,
    use_bias: bool = True,
    use_scale: bool = True,
    unbiased: bool = False,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    scale_init: Callable[..., Any] = jax.nn.initializers.ones,
    bias_init: Callable[..., Any] = jax.nn.initializers.zeros,
    name: str = "batch_norm",
) -> Layer:
    """A batch normalisation with running statistics of the whole batch.

    The statistics are the same for any `chunks`.

    With `train=True` each microbatch is normalised by its own mean and its own (biased)
    variance. The running statistics are updated once, at the end of the call, with the
    mean and variance of the whole batch. They are the numbers that
    `flax.linen.BatchNorm` computes for the same inputs in one piece. With `train=False`
    the running statistics normalise, and do not change. After torchgpipe (arXiv
    2004.09910, section 4.1.4).

    Arguments:
        axis: the feature axis or axes. Means are taken over all other axes. Default:
            the last axis.
        momentum: the weight of the old statistics in `momentum * old + (1 - momentum) *
            new`. `None` takes the plain average over all calls.
        epsilon: a number that is added to the variance, at least 0.

    Other Arguments:
        use_bias, use_scale: whether the layer has the parameters `"bias"` and
            `"scale"`, each of the shape of the features.
        unbiased: whether the running variance divides by `count - 1`, as PyTorch does;
            the variance of one value is then 0. Default `False`, as in Flax.
        dtype: the dtype of the output. Default: the dtype that `x` and the parameters
            promote to. Statistics are always computed in float32, or in float64 if `x`
            is float64.
        param_dtype, scale_init, bias_init: the dtype and the initializers of the
            parameters. An initializer is `f(key, shape, dtype)`; the defaults give ones
            and zeros.
        name: the layer's name.

    Returns:
        A `Layer` from an array of floats to an array of the same shape. Its parameters
        are `{"scale", "bias"}`. Its state is a dict: `"mean"` and `"var"`, each of the
        shape of the features; `"calls"`, the number of training calls; and `"moments"`,
        the moments of the call's microbatches so far.

    Raises:
        ValueError: `momentum` or `epsilon` is out of range, or, when the layer is
            called, `x` does not have an axis of `axis`.
        TypeError: an argument has a wrong type, or, when the layer is called, `x` is no
            array of real floats.

    Example:
        >>> model = fpipe.sequential([fpipe.DeferredBatchNorm(momentum=0.5)], chunks=2)
        >>> x = jnp.arange(4.0).reshape(4, 1)
        >>> params, state = model.init(jax.random.key(0), x), model.init_state(x)
        >>> y, state = model(params, x, state=state, train=True)
        >>> state[0]["mean"], state[0]["var"]  # from 0 and 1 half way to 1.5 and 1.25
        (Array([0.75], dtype=float32), Array([1.125], dtype=float32))
    """
    call = "`fpipe.DeferredBatchNorm"
    if momentum is not None and not (is_at_least(momentum, 0) and momentum <= 1):
        raise ValueError(
            f"{call}(momentum={shown(momentum)})`: from 0 to 1, or None for the "
            "average over all calls"
        )
    if not is_at_least(epsilon, 0):
        raise ValueError(f"{call}(epsilon={shown(epsilon)})`: at least 0")
    switches = {"use_bias": use_bias, "use_scale": use_scale, "unbiased": unbiased}
    for field, value in switches.items():
        as_bool("fpipe.DeferredBatchNorm", field, value)
    for field, init in (("scale_init", scale_init), ("bias_init", bias_init)):
        if not callable(init):
            raise TypeError(f"{call}({field}={shown(init)})`: a function is needed")
    as_compute_dtype("fpipe.DeferredBatchNorm", dtype, "dtype")
    if as_compute_dtype("fpipe.DeferredBatchNorm", param_dtype, "param_dtype") is None:
        param_dtype = jnp.float32
    several = axis if isinstance(axis, (list, tuple)) else (axis,)
    if not all(type(a) is int for a in several):
        raise TypeError(f"{call}(axis={shown(axis)})`: an int, or several")
    # Dtypes and axes in one form each: equal options must make equal layers.
    axes = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    inits = {"scale": scale_init} if use_scale else {}
    inits |= {"bias": bias_init} if use_bias else {}
    norm = _Norm(axes, epsilon, None if dtype is None else jnp.dtype(dtype), name)
    return Layer(
        norm,
        _Init(norm, tuple(inits.items()), jnp.dtype(param_dtype)),
        name,
        init_state=_InitState(norm),
        finish=_Finish(momentum, unbiased),
        state_rows=False,
    )


# Each function of the layer is a frozen value, so that equal layers are equal, also
# after pickling.


@dataclasses.dataclass(frozen=True)
class _Norm:
    axes: tuple[int, ...]
    epsilon: float
    dtype: Any
    name: str

    def __call__(self, params: Any, x: Any, *, state: Any, train: bool) -> Any:
        features = self.features(x)
        mean = state["mean"]
        var = state["var"]
        if train:
            # In training the running statistics play no part until `finish`: no
            # microbatch is normalised by what another one left.
            others = tuple(a for a in range(x.ndim) if a not in features)
            microbatch = moments(x, others)
            mean = microbatch.mean
            var = variance(microbatch)
            state = {**state, "moments": merge(state["moments"], microbatch)}
        # From here on training and evaluation are the same, in float32 for half
        # precision too.
        shape = [n if a in features else 1 for a, n in enumerate(x.shape)]
        wide = mean.dtype
        factor = jax.lax.rsqrt(var + self.epsilon).reshape(shape)
        if "scale" in params:
            factor = factor * params["scale"].astype(wide).reshape(shape)
        y = (x.astype(wide) - mean.reshape(shape)) * factor
        if "bias" in params:
            y = y + params["bias"].astype(wide).reshape(shape)
        if self.dtype is not None:
            return y.astype(self.dtype), state
        # A user who asks JAX for strict promotion means their own code. Here the dtype
        # is by definition what the inputs promote to.
        with jax.numpy_dtype_promotion("standard"):
            return y.astype(jnp.result_type(x, *params.values())), state

    def features(self, x: Any) -> tuple[int, ...]:
        """The feature axes of `x`, in order."""
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, np.floating):
            got = x.dtype if hasattr(x, "dtype") else type(x).__name__
            raise TypeError(
                f"`fpipe.DeferredBatchNorm`: {self.name!r} normalises an array of real "
                f"floats, got {got}"
            )
        wrong = [a for a in self.axes if not -x.ndim <= a < x.ndim]
        if wrong:
            raise ValueError(
                f"`fpipe.DeferredBatchNorm(axis={wrong[0]})`: {self.name!r} got an "
                f"array of shape {x.shape}; its axes go "
                f"from {-x.ndim} to {x.ndim - 1}"
            )
        return tuple(sorted({a % x.ndim for a in self.axes}))


@dataclasses.dataclass(frozen=True)
class _Init:
    norm: _Norm
    inits: tuple[tuple[str, Callable[..., Any]], ...]
    dtype: Any

    def __call__(self, key: Any, x: Any) -> dict[str, Any]:
        shape = tuple(x.shape[a] for a in self.norm.features(x))
        # Two keys always, so that the scale begins alike with and without a bias.
        keys = jax.random.split(key, 2)
        return {
            name: init(k, shape, self.dtype)
            for (name, init), k in zip(self.inits, keys, strict=False)
        }


@dataclasses.dataclass(frozen=True)
class _InitState:
    norm: _Norm

    def __call__(self, x: Any) -> dict[str, Any]:
        shape = tuple(x.shape[a] for a in self.norm.features(x))
        dtype = statistics_dtype(x.dtype)
        return {
            "mean": jnp.zeros(shape, dtype),
            "var": jnp.ones(shape, dtype),
            "calls": jnp.int32(0),
            "moments": no_moments(shape, dtype),
        }


@dataclasses.dataclass(frozen=True)
class _Finish:
    momentum: float | None
    unbiased: bool

    def __call__(self, state: dict[str, Any]) -> dict[str, Any]:
        batch = state["moments"]
        momentum = self.momentum
        if momentum is None:
            # Weights 0, 1/2, 2/3, …: after n calls each of them has the weight 1/n.
            calls = state["calls"].astype(batch.mean.dtype)
            momentum = calls / (calls + 1)
        var = variance(batch, self.unbiased)
        # A call with `train=False` has merged nothing and changes nothing, also not the
        # number of calls.
        counted = (batch.count > 0).astype(jnp.int32)
        return {
            "mean": updated(state["mean"], batch.mean, momentum, batch.count),
            "var": updated(state["var"], var, momentum, batch.count),
            "calls": state["calls"] + counted,
            "moments": no_moments(batch.mean.shape, batch.mean.dtype),
        }


def statistics_dtype(dtype: Any) -> Any:
    """The dtype of statistics of such values: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def deferred(layers: Sequence[Layer], call: str) -> tuple[Layer, ...]:
    """The layers, those with a hook `defer` with their batch norms deferred.

    Arguments:
        layers: flat.
        call: who asks, for errors.

    Raises:
        ValueError: no layer has that hook.
        TypeError: a hook that returns no `Layer`.
    """
    where = f"`{call}(deferred_batch_norm=True)`"
    # An option without an effect would let a user believe that statistics are exact.
    if all(layer.defer is None for layer in layers):
        raise ValueError(
            f"{where}: no layer can defer its batch norms. `fpipe.DeferredBatchNorm` "
            "does so by itself, without the option; a layer of your own does if it is "
            "made with `fpipe.Layer(..., defer=...)`. Otherwise leave the option out"
        )
    result = []
    for position, layer in enumerate(layers):
        if layer.defer is not None:
            with noting(f"in the defer of layer {position} {layer.name!r}"):
                made = layer.defer()
            if not isinstance(made, Layer):
                raise TypeError(
                    f"{where}: the defer of layer {position} {layer.name!r} returns an "
                    f"fpipe.Layer, got {shown(made)}"
                )
            # Names, skips and parameters are the layer's own; it may have been isolated
            # or renamed since the hook was made.
            layer = dataclasses.replace(
                layer,
                apply=made.apply,
                needs=made.needs,
                init_state=made.init_state,
                finish=made.finish,
                state_rows=(
                    made.state_rows if layer.state_rows is None else layer.state_rows
                ),
                overwrite=made.overwrite,
                defer=None,
            )
        result.append(layer)
    return tuple(result)
