"""Linen modules as layers."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.core
import flax.errors
import jax
from flax import linen as nn

from fpipe._core.pytrees import PyTree, eval_shape, shapes_of
from fpipe._model.layer import Layer, checked_names
from fpipe.flax._batch_norm import defer_stats, deferred_apply, finish_stats
from fpipe.flax._borrow import Borrow, Path, check_fit, keep_own, lend, misfit, owners
from fpipe.flax._calling import Calling, calling, method_of
from fpipe.flax._streams import no_key, stream_key

# What a module sows for people to look at: a layer has no place for it.
IGNORED = ("intermediates", "perturbations")

# Where batch norms keep their running statistics.
STATS = "batch_stats"


@dataclasses.dataclass(frozen=True)
class Linen:
    """The function of a layer: a linen module, applied.

    Attributes:
        module: the module, unbound.
        name: the layer's.
        calling: how it is called.
        method: which of its methods; `None`: `__call__`.
        streams: its random streams; `None`: those that it asks for.
        collections: the collections that are the layer's state.
        known: whether those are all that the module has, as the user or a sample input
            says.
        borrow: parts of the parameters that other layers own.
        deferred: whether its batch norms update their running statistics once per call.
    """

    module: nn.Module
    name: str
    calling: Calling
    method: str | Callable[..., Any] | None
    streams: tuple[str, ...] | None
    collections: tuple[str, ...]
    known: bool
    borrow: tuple[Borrow, ...]
    deferred: bool = False

    def __hash__(self) -> int:
        # A module with a list among its fields, like `nn.Sequential`, has no hash of
        # its own.
        return hash((type(self.module), self.name, self.calling, self.collections))

    def __call__(
        self,
        params: PyTree,
        x: PyTree,
        *,
        state: PyTree = None,
        key: Any = None,
        train: bool = False,
        borrowed: Mapping[str, PyTree] | None = None,
    ) -> Any:
        """The layer on one microbatch."""
        variables = {
            "params": lend(self.borrow, params, borrowed or {}),
            **(state or {}),
        }
        with self.explained(borrowed or {}):
            y, new_state, _ = self.run(variables, x, key, train)
        return (y, new_state) if self.collections else y

    def run(
        self, variables: PyTree, x: PyTree, key: Any, train: bool
    ) -> tuple[PyTree, PyTree, tuple[str, ...]]:
        """Apply the module.

        Returns:
            `(y, collections, streams)`: the layer's collections as they are now, and
                the streams that were given.
        """
        args, kwargs = self.calling.arguments(x, train)
        streams = () if key is None else self.streams or ()
        apply = (
            functools.partial(deferred_apply, self.module)
            if self.deferred
            else self.module.apply
        )
        while True:
            rngs = {name: stream_key(key, name) for name in streams}
            try:
                y, new_state = apply(
                    variables,
                    *args,
                    rngs=rngs,
                    mutable=list(self.collections),
                    method=self.method,
                    **kwargs,
                )
                return y, flax.core.unfreeze(new_state), streams  # pyright: ignore[reportArgumentType]
            except flax.errors.InvalidRngError as error:
                # Flax takes no "any stream": it says which one is missing.
                found = re.search(r'PRNG for "(.+?)"', str(error))
                if found is None or found[1] in streams:
                    raise
                if key is None and self.streams != ():
                    raise no_key(
                        self.name, found[1], self.calling.trains(train)
                    ) from error
                if self.streams is not None:
                    raise ValueError(
                        f"layer {self.name!r}: its module draws from the random stream "
                        f"{found[1]!r}, but its streams are "
                        f"{list(self.streams)}: write `fpipe.flax.layer(module, "
                        f"rngs={[*self.streams, found[1]]})`"
                    ) from error
                streams = (*streams, found[1])

    @property
    def owns_nothing(self) -> bool:
        """Whether other layers own all of the parameters."""
        return any(part.path == () for part in self.borrow)

    def kept(self, collections: PyTree) -> PyTree:
        """The layer's state from the collections as Flax makes them."""
        if not self.deferred or STATS not in collections:
            return collections
        return {**collections, STATS: defer_stats(collections[STATS])}

    def variables(self, key: Any, x: PyTree) -> dict[str, PyTree]:
        """All variables of the module as it makes them, but for what it sows."""
        args, kwargs = self.calling.arguments(x, False)
        made = self.module.init({"params": key}, *args, method=self.method, **kwargs)
        return {
            name: value
            for name, value in flax.core.unfreeze(made).items()
            if name not in IGNORED
        }

    def unknown(self, collection: Iterable[str]) -> ValueError:
        """The error of a module with collections that the layer does not keep."""
        more = [*self.collections, *collection]
        return ValueError(
            f"layer {self.name!r}: its module uses {sorted(collection)}, which the "
            "layer does not keep as its state: give "
            "a sample input, `fpipe.flax.layer(module, x)`, or write "
            f"`fpipe.flax.layer(module, state={more})` if it is not only sown"
        )

    @contextlib.contextmanager
    def explained(self, borrowed: Mapping[str, PyTree]) -> Iterator[None]:
        """Flax's errors about variables that are not there, in the words of layers."""
        try:
            yield
        except (
            flax.errors.ModifyScopeVariableError,
            flax.errors.ScopeCollectionNotFound,
        ) as error:
            found = re.search(r'collection "(.+?)"', str(error))
            if found is not None and found[1] not in ("params", *self.collections):
                raise self.unknown([found[1]]) from error
            if found is not None and found[1] == "params" and self.borrow:
                raise misfit(self.borrow, self.name, borrowed, _said(error)) from error
            raise
        except (
            flax.errors.ScopeParamNotFoundError,
            flax.errors.ScopeParamShapeError,
        ) as error:
            if self.borrow:
                raise misfit(self.borrow, self.name, borrowed, _said(error)) from error
            raise


@dataclasses.dataclass(frozen=True)
class Init:
    """The parameters of a layer, as `module.init` makes them."""

    of: Linen

    def __call__(
        self, key: Any, x: PyTree, *, borrowed: Mapping[str, PyTree]
    ) -> PyTree:
        """The layer's own parameters."""
        if self.of.owns_nothing:
            return {}  # a second embedding table would only be made to be thrown away
        if self.of.borrow:
            # What does not fit shows before the module computes with parameters of its
            # own in that place.
            eval_shape(self._with_borrowed, shapes_of(x), shapes_of(dict(borrowed)))
        made = self.of.variables(key, x)
        params = made.pop("params", {})
        if not self.of.known and made.keys() - set(self.of.collections):
            raise self.of.unknown(sorted(made.keys() - set(self.of.collections)))
        check_fit(self.of.borrow, self.of.name, params, borrowed)
        return keep_own(self.of.borrow, params)

    def _with_borrowed(self, x: PyTree, borrowed: Mapping[str, PyTree]) -> PyTree:
        args, kwargs = self.of.calling.arguments(x, False)
        lent, rngs = (
            {"params": lend(self.of.borrow, {}, borrowed)},
            {"params": jax.random.key(0)},
        )
        with self.of.explained(borrowed):
            return self.of.module.apply(
                lent, *args, rngs=rngs, mutable=True, method=self.of.method, **kwargs
            )


@dataclasses.dataclass(frozen=True)
class InitState:
    """The state of a layer, as `module.init` makes it."""

    of: Linen

    def __call__(self, x: PyTree, *, key: Any) -> PyTree:
        """The layer's collections."""
        made = self.of.variables(key, x)
        return self.of.kept(
            {name: made[name] for name in self.of.collections if name in made}
        )


@dataclasses.dataclass(frozen=True)
class Defer:
    """The layer whose batch norms are deferred."""

    of: Linen

    def __call__(self) -> Layer:
        """Another function, state and end of a call."""
        apply = dataclasses.replace(self.of, deferred=True)
        return Layer(
            apply,
            needs=needs_of(apply),
            init_state=InitState(apply),
            finish=finish,
            borrow=owners(apply.borrow),
        )


def finish(state: PyTree) -> PyTree:
    """The state of a layer whose batch norms are deferred, at the end of a call."""
    return {
        name: finish_stats(value) if name == STATS else value
        for name, value in state.items()
    }


def needs_of(apply: Linen) -> list[str]:
    """What a layer of this function declares."""
    needs = {
        "state": bool(apply.collections),
        "key": apply.streams != (),
        "train": bool(apply.calling.switches) and apply.calling.train is None,
        "borrowed": bool(apply.borrow),
    }
    return [n for n, needed in needs.items() if needed]


def linen_layer(
    module: nn.Module,
    x: PyTree,
    *,
    name: str,
    rngs: Iterable[str] | None,
    state: Iterable[str] | None,
    train: str | bool | None,
    method: str | Callable[..., Any] | None,
    borrow: tuple[Borrow, ...],
    chained: bool,
) -> Layer:
    """See `fpipe.flax.layer`."""
    who = f"`fpipe.flax.layer(module)` of layer {name!r}"
    f = method_of(type(module), method, who)
    method = f if callable(method) else method
    how = calling(
        f,
        train,
        chained,
        {n: getattr(module, n, None) for n in module.__dataclass_fields__},
        who,
    )
    streams = None if rngs is None else checked_names(rngs, f"{who}: rngs=")
    collections = None if state is None else checked_names(state, f"{who}: state=")
    apply = Linen(
        module,
        name,
        how,
        method,
        streams,
        collections or (),
        state is not None or x is not None,
        borrow,
    )
    if x is not None:
        found, drawn = _observed(apply, x)
        apply = dataclasses.replace(
            apply,
            collections=found if collections is None else collections,
            streams=drawn if streams is None else streams,
        )
    elif collections is None and any(
        isinstance(m, (nn.BatchNorm, nn.SpectralNorm)) for _, m in inside(module)
    ):
        apply = dataclasses.replace(apply, collections=(STATS,))
    return Layer(
        apply,
        Init(apply),
        name,
        needs=needs_of(apply),
        borrow=owners(borrow),
        init_state=InitState(apply) if apply.collections else None,
        defer=Defer(apply) if STATS in apply.collections else None,
    )


def _said(error: Exception) -> str:
    """A message of Flax without the address of its page."""
    return re.sub(r"\.? \(https://.*", "", str(error), flags=re.DOTALL)


def _observed(apply: Linen, x: PyTree) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The collections that are state, and the random streams, of a module called in
    training on `x`.
    """
    found: list[Any] = []

    def call(key: Any, x: PyTree) -> PyTree:
        made = apply.variables(key, x)
        names = tuple(n for n in made if n != "params")
        trial = dataclasses.replace(apply, collections=names, streams=None, borrow=())
        _, state, streams = trial.run(made, x, key, True)
        # What is sown grows from call to call, so it can be no state.
        kept = [
            n
            for n in names
            if jax.tree.structure(state.get(n)) == jax.tree.structure(made[n])
        ]
        found.append((tuple(kept), tuple(streams)))
        return ()

    eval_shape(call, jax.random.key(0), shapes_of(x))
    return found[-1]


def inside(value: Any, path: Path = ()) -> Iterator[tuple[Path, nn.Module]]:
    """The modules that can be seen in a module without calling it, itself first: its
    fields, and lists and dicts of them.
    """
    if isinstance(value, nn.Module):
        yield path, value
        fields = [n for n in value.__dataclass_fields__ if n not in ("parent", "name")]
        value = {n: getattr(value, n, None) for n in fields}
    elif isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from inside(inner, (*path, name))
