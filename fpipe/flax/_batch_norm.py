"""Deferred batch normalisation for modules that contain Flax's: `flax.linen.BatchNorm`
and `flax.nnx.BatchNorm`.

Linen and NNX work in the same way. The state of each norm has its running statistics,
and also the moments of the call's microbatches so far:

    linen  {"mean", "var"} -> {"mean", "var", "deferred": {"count", "mean", "m2",
                                                           "momentum"}}
    NNX     mean, var      ->  mean, var, batch_count, batch_mean, batch_m2

For each microbatch a norm merges the microbatch's moments into these, and does not
update its running statistics. `finish` updates the running statistics once. All of it
is ordinary Flax state, so Flax's own transforms work on it. The moments, the count and
the momentum have the shape of the statistics: a transform may add an axis to all.

Flax itself computes the mean and variance of a microbatch. A norm with a momentum of 0
writes them in the place of its running statistics. They are read there, and the old
running statistics are put back. Variances are always computed from squared distances,
as with `use_fast_variance=False`.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen, nnx

from fpipe._core.errors import a_type
from fpipe._model.batch_norm import Moments, merge, statistics_dtype, updated, variance

DEFERRED = "deferred"
"""The name of linen's moments in the statistics of a norm."""


# --- linen ---


def defer_stats(batch_stats: Mapping[str, Any]) -> dict[str, Any]:
    """The collection `"batch_stats"` of a linen module with room for the moments of
    each norm.

    Arguments:
        batch_stats: a nested dict, as `module.init` makes it. Room is made wherever a
            `"mean"` and a `"var"` stand.

    Example:
        >>> from fpipe.flax._batch_norm import defer_stats
        >>> stats = {"BatchNorm_0": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
        >>> sorted(defer_stats(stats)["BatchNorm_0"])
        ['deferred', 'mean', 'var']
    """

    def defer(norm: Mapping[str, Any]) -> dict[str, Any]:
        return {**norm, DEFERRED: _no_moments(norm["mean"])}

    return _map_norms(batch_stats, defer)


def plain_stats(batch_stats: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `defer_stats`: the collection as Flax knows it."""

    def restore(norm: Mapping[str, Any]) -> dict[str, Any]:
        return {name: norm[name] for name in norm if name != DEFERRED}

    return _map_norms(batch_stats, restore)


def deferred_apply(
    module: linen.Module,
    variables: Mapping[str, Any],
    *args: Any,
    rngs: Any = None,
    mutable: Sequence[str] = ("batch_stats",),
    method: Any = None,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """`module.apply`, in which no `linen.BatchNorm` updates its running statistics.

    A norm that would, because it is called with `use_running_average=False`, normalises
    by the microbatch, and merges the microbatch's moments into what `defer_stats` made
    room for. A norm that is called several times counts each time. Of a subclass of
    `linen.BatchNorm` that is so if it calls `super().__call__`; one that does not stays
    as it is.

    Arguments:
        module: an unbound module.
        variables: its collections, `"batch_stats"` from `defer_stats`.
        args, kwargs, rngs, method: as for `module.apply`.
        mutable: the collections that come back; without `"batch_stats"` no norm may be
            in training, as in Flax.

    Returns:
        `(y, collections)`, those that `mutable` names.

    Raises:
        ValueError: a norm in training for which `defer_stats` made no room; one with
            `axis_name`.
    """
    # Flax computes a norm's mean and variance inside `__call__` and hands them out in
    # one place only: the running statistics. So each norm in training is run by a
    # stand-in, and what stands there is read and put back:
    #     old       mean 0.0   var 1.0     running statistics before the call
    #     stand-in  mean 0.5   var 0.25    momentum 0: those of the microbatch alone
    #     after     mean 0.0   var 1.0     deferred: moments with 0.5 and 0.25 merged in
    # Computing the moments here a second time would be another formula (masks, dtypes,
    # axes) that has to agree with Flax's in every release.
    stand_ins: list[linen.Module] = []

    def intercept(
        call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
        norm = context.module
        # Of a subclass it is Flax's own `__call__` that counts, with what the subclass
        # gives it.
        is_norm = getattr(context.orig_method, "func", None) is _NORM_CALL
        # The stand-in is a `linen.BatchNorm` too, so its own call is intercepted.
        if not is_norm or any(norm is stand_in for stand_in in stand_ins):
            return call(*args, **kwargs)
        arguments = _NORM_SIGNATURE.bind(norm, *args, **kwargs).arguments
        average = linen.merge_param(
            "use_running_average",
            norm.use_running_average,
            arguments.get("use_running_average"),
        )
        # A norm that only uses its statistics has nothing to defer.
        if average or norm.is_initializing():
            return call(*args, **kwargs)
        name = "/".join(norm.path)
        _check_axis_name(norm, f"linen.BatchNorm {name!r}")
        room = norm.get_variable("batch_stats", DEFERRED)
        if room is None:
            raise ValueError(
                f"`deferred_apply`: the linen.BatchNorm {name!r} is in training, but "
                "its statistics have no room for moments; give `variables` with "
                '`"batch_stats": defer_stats(batch_stats)`'
            )

        # Plain `linen.BatchNorm` in the scope of the norm: it finds the norm's own
        # scale, bias and statistics there by their names.
        old_mean = norm.get_variable("batch_stats", "mean")
        old_var = norm.get_variable("batch_stats", "var")
        fields = {
            field: getattr(norm, field)
            for field in linen.BatchNorm.__dataclass_fields__
            if field not in ("parent", "name")
        }
        fields |= {"momentum": 0.0, "use_fast_variance": False}
        stand_in = linen.BatchNorm(**fields, parent=norm.scope)
        stand_ins.append(stand_in)
        y = stand_in(*args, **kwargs)
        microbatch = _microbatch_moments(
            arguments["x"],
            norm.axis,
            arguments.get("mask"),
            norm.get_variable("batch_stats", "mean"),
            norm.get_variable("batch_stats", "var"),
            room["count"],
        )
        merged = merge(_moments_in(room), microbatch)
        # `finish_stats` sees arrays and no modules, so the momentum goes along as an
        # array.
        momentum = jnp.full_like(room["momentum"], norm.momentum)
        norm.put_variable("batch_stats", "mean", old_mean)
        norm.put_variable("batch_stats", "var", old_var)
        norm.put_variable(
            "batch_stats", DEFERRED, {**merged._asdict(), "momentum": momentum}
        )
        return y

    # Flax's own hook around methods: it reaches norms at any depth, inside `nn.scan`,
    # `nn.remat` and compact methods too, and the user's module stays as it is.
    with linen.intercept_methods(intercept):
        y, collections = module.apply(
            variables, *args, rngs=rngs, mutable=list(mutable), method=method, **kwargs
        )
    return y, dict(collections)


def finish_stats(batch_stats: Mapping[str, Any]) -> dict[str, Any]:
    """The collection `"batch_stats"` at the end of a call: running statistics updated,
    moments empty again.

    Arguments:
        batch_stats: as `defer_stats` made and `deferred_apply` filled it. Norms that
            have counted nothing stay.
    """

    def finish(norm: Mapping[str, Any]) -> dict[str, Any]:
        batch = _moments_in(norm[DEFERRED])
        momentum = norm[DEFERRED]["momentum"]

        def update(name: str, value: Any) -> Any:
            old = norm[name]
            return updated(old, value, momentum.astype(old.dtype), batch.count)

        return {
            **norm,
            "mean": update("mean", batch.mean),
            "var": update("var", variance(batch)),
            DEFERRED: _no_moments(norm["mean"]),
        }

    return _map_norms(batch_stats, finish)


_NORM_SIGNATURE = inspect.signature(linen.BatchNorm.__call__)
# What Flax calls, inside of what it wraps around methods.
_NORM_CALL = inspect.unwrap(linen.BatchNorm.__call__)


def _map_norms(
    stats: Mapping[str, Any], f: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Map the statistics of the norms in a nested dict."""
    is_norm = "mean" in stats and "var" in stats
    # A module may be called "mean": then a dict stands there.
    if is_norm and not isinstance(stats["mean"], Mapping):
        return f(stats)
    return {
        name: _map_norms(value, f) if isinstance(value, Mapping) else value
        for name, value in stats.items()
    }


def _no_moments(mean: Any) -> dict[str, Any]:
    """Empty room for the moments of a norm."""
    zeros = jnp.zeros(mean.shape, statistics_dtype(mean.dtype))
    return {"count": zeros, "mean": zeros, "m2": zeros, "momentum": zeros}


def _moments_in(room: Mapping[str, Any]) -> Moments:
    """What has been merged into the room of a norm so far."""
    return Moments(room["count"], room["mean"], room["m2"])


# --- nnx ---


MOMENTS = ("batch_count", "batch_mean", "batch_m2")
"""What a deferred norm keeps beside Flax's variables, by name."""


# A subclass, so that filters for `nnx.BatchStat` (in `nnx.vmap`, `nnx.split`) treat
# moments as they treat the running statistics.
class BatchMoments(nnx.BatchStat):
    """The moments of the microbatches of a call, of one norm."""


class DeferredNorm(nnx.BatchNorm):
    """An `nnx.BatchNorm` that leaves its running statistics to `finish`; see
    `defer_module`.

    Arguments:
        norm: takes its place, with its variables.
    """

    def __init__(self, norm: nnx.BatchNorm) -> None:
        # NNX has no hook around methods as linen has, so the norm itself is replaced.
        # All is made anew and then thrown away: only Flax knows how to set its fields
        # up.
        super().__init__(
            norm.num_features,
            use_running_average=norm.use_running_average,
            axis=norm.axis,
            momentum=0.0,  # so the running statistics become the microbatch's own
            epsilon=norm.epsilon,
            dtype=norm.dtype,
            param_dtype=norm.param_dtype,
            use_bias=norm.use_bias,
            use_scale=norm.use_scale,
            use_fast_variance=False,
            promote_dtype=norm.promote_dtype,
            rngs=nnx.Rngs(0),
        )
        # The same variables, so that checkpoints and optimizers find them under the
        # names and paths that they had.
        self.mean = norm.mean
        self.var = norm.var
        self.scale = norm.scale
        self.bias = norm.bias
        self.deferred_momentum = norm.momentum
        zeros = jnp.zeros(norm.mean.shape, jnp.float32)
        self.batch_count = BatchMoments(zeros)
        self.batch_mean = BatchMoments(zeros)
        self.batch_m2 = BatchMoments(zeros)

    def __call__(
        self, x: Any, use_running_average: bool | None = None, *, mask: Any = None
    ) -> Any:
        """What `nnx.BatchNorm` returns; in training the moments are merged, and the
        running statistics stay.
        """
        # Flax's rule: the argument of the call, else the attribute.
        average = use_running_average
        if average is None:
            average = self.use_running_average
        old_mean = self.mean[...]
        old_var = self.var[...]
        y = super().__call__(x, average, mask=mask)
        if not average:
            microbatch = _microbatch_moments(
                x, self.axis, mask, self.mean[...], self.var[...], self.batch_count[...]
            )
            self._keep(merge(self._moments, microbatch))
            self.mean[...] = old_mean
            self.var[...] = old_var
        return y

    def finish(self) -> None:
        """Update the running statistics, if anything was counted, and begin again."""
        batch = self._moments
        momentum = self.deferred_momentum
        self.mean[...] = updated(self.mean[...], batch.mean, momentum, batch.count)
        self.var[...] = updated(self.var[...], variance(batch), momentum, batch.count)
        zeros = jnp.zeros_like(batch.mean)
        self._keep(Moments(zeros, zeros, zeros))

    @property
    def _moments(self) -> Moments:
        return Moments(self.batch_count[...], self.batch_mean[...], self.batch_m2[...])

    def _keep(self, moments: Moments) -> None:
        self.batch_count[...] = moments.count
        self.batch_mean[...] = moments.mean
        self.batch_m2[...] = moments.m2


def defer_module(module: nnx.Module) -> Any:
    """An nnx module in which no `nnx.BatchNorm` updates its running statistics before
    `finish_module`.

    Arguments:
        module: a module, or an `nnx.BatchNorm` itself. It stays as it is.

    Returns:
        A module with the same variables at the same paths, and of each norm the
        `BatchMoments` `batch_count`, `batch_mean` and `batch_m2`.

    Raises:
        ValueError: an `nnx.BatchNorm` with `axis_name`.
        TypeError: a subclass of `nnx.BatchNorm`.

    Example:
        >>> from flax import nnx
        >>> from fpipe.flax._batch_norm import defer_module, finish_module
        >>> norm = defer_module(nnx.BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0)))
        >>> for microbatch in (jnp.array([[0.0], [1.0]]), jnp.array([[2.0], [3.0]])):
        ...     y = norm(microbatch)
        >>> finish_module(norm)
        >>> norm.mean[...], norm.var[...]  # from 0 and 1 half way to 1.5 and 1.25
        (Array([0.75], dtype=float32), Array([1.125], dtype=float32))
    """

    def defer(path: tuple[Any, ...], node: Any) -> Any:
        if not isinstance(node, nnx.BatchNorm) or isinstance(node, DeferredNorm):
            return node
        name = "/".join(map(str, path))
        # (Linen runs a subclass's own `__call__`; here it would be replaced and lost.)
        if type(node) is not nnx.BatchNorm:
            raise TypeError(
                f"`defer_module`: {name!r} is {a_type(node)}, a subclass of "
                "nnx.BatchNorm that may do anything; use nnx.BatchNorm itself, or keep "
                "the module as it is"
            )
        _check_axis_name(node, f"nnx.BatchNorm {name!r}")
        return DeferredNorm(node)

    return nnx.recursive_map(defer, module)


def finish_module(module: nnx.Module) -> None:
    """Update the running statistics of the norms that `defer_module` made, in place;
    those that counted nothing stay.
    """
    for _, node in nnx.iter_graph(module):
        if isinstance(node, DeferredNorm):
            node.finish()


# --- both ---


def _check_axis_name(norm: Any, title: str) -> None:
    if norm.axis_name is not None:
        raise ValueError(
            f"deferred batch norm: the {title} has axis_name={norm.axis_name!r}; its "
            "moments cannot be merged here. Microbatches are what a call is cut into, "
            "not a mapped axis: leave axis_name out"
        )


def _microbatch_moments(
    x: Any, axis: Any, mask: Any, mean: Any, var: Any, like: Any
) -> Moments:
    """A microbatch's moments from its mean and variance, with a count for each feature.

    Arguments:
        axis: the feature axis or axes of `x`.
        mask: which values count; `None` for all.
        like: an array of the moments' shape and dtype.
    """
    # Flax has divided by the number of values already: `m2` is the variance times that.
    axes = axis if isinstance(axis, Sequence) else (axis,)
    features = {a % x.ndim for a in axes}
    others = tuple(a for a in range(x.ndim) if a not in features)
    if mask is None:
        count = jnp.full(like.shape, math.prod(x.shape[a] for a in others), like.dtype)
    else:
        count = jnp.broadcast_to(mask, x.shape).astype(like.dtype).sum(others)
    # The mean of nothing is nan.
    mean = jnp.where(count > 0, mean.astype(like.dtype), 0)
    var = jnp.where(count > 0, var.astype(like.dtype), 0)
    return Moments(count, mean, var * count)
