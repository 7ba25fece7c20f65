"""Linen modules as layers.

A linen module keeps its variables in collections. `"params"` are the layer's
parameters. The layer's state is the collections that the user names, or that the module
uses on a sample input:

    {"params": {"kernel": …}, "batch_stats": {"mean": …, "var": …}}
       parameters                state: {"batch_stats": …}

Without a sample, the collections and streams of a compact module are not known before
it runs. The layer then declares `key`. If Flax raises an error about a missing
collection or stream, the error here says how to declare it.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.core
import flax.errors
import jax
from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from fpipe._core.checks import as_names
from fpipe._core.pytrees import PyTree, eval_shape, shapes_of
from fpipe._model.layer import Layer
from fpipe.flax._batch_norm import defer_stats, deferred_apply, finish_stats
from fpipe.flax._borrow import Path, check_fit, keep_own, lend, misfit
from fpipe.flax._calling import find_method
from fpipe.flax._function import Inputs, ModuleFunction, ModuleOptions
from fpipe.flax._streams import no_key, stream_key

# Collections of sown values, for inspection. A layer has no place for them.
IGNORED = ("intermediates", "perturbations")

# The collection of fp8 products. Its "gradients" are its new values.
OVERWRITTEN = OVERWRITE_WITH_GRADIENT

# Where batch norms keep their running statistics.
STATS = "batch_stats"


@dataclasses.dataclass(frozen=True)
class LinenFunction(ModuleFunction):
    """The function of a layer: a linen module, applied.

    Attributes:
        module: the module, unbound.
        method: which of its methods; `None`: `__call__`.
        streams: its random streams; `None`: those that it asks for.
        collections: the collections that are the layer's state.
        known: whether those are all that the module has, as the user or a sample input
            says.
        deferred: whether its batch norms update their running statistics once per call.
    """

    module: nn.Module
    method: str | Callable[..., Any] | None
    streams: tuple[str, ...] | None
    collections: tuple[str, ...]
    known: bool
    deferred: bool = False

    def __hash__(self) -> int:
        # A module with a list among its fields, like `nn.Sequential`, has no hash of
        # its own.
        return hash((type(self.module), self.name, self.calling, self.collections))

    @property
    def stateful(self) -> bool:
        """See `ModuleFunction`."""
        return bool(self.collections)

    @property
    def overwritten(self) -> tuple[str, ...]:
        """The collections that a backward makes."""
        return tuple(name for name in self.collections if name == OVERWRITTEN)

    @property
    def draws(self) -> bool:
        """See `ModuleFunction`."""
        return self.streams != ()

    def run(
        self,
        params: PyTree,
        inputs: Inputs,
        state: PyTree,
        key: Any,
        borrowed: Mapping[str, PyTree],
    ) -> tuple[PyTree, PyTree]:
        """See `ModuleFunction`."""
        variables = {"params": params, **state}
        with self.explained(borrowed):
            y, state, _ = self.apply_module(variables, inputs, key)
        return y, state

    def apply_module(
        self, variables: PyTree, inputs: Inputs, key: Any
    ) -> tuple[PyTree, PyTree, tuple[str, ...]]:
        """Apply the module.

        Flax takes no "any stream". So a module whose streams are not known runs with
        those found so far, and Flax's error about a missing one names the next.

        Returns:
            `(y, collections, streams)`: the layer's collections as they are now, and
                the streams that were given.
        """
        args, kwargs = self.arguments(inputs)
        apply = self.module.apply
        if self.deferred:
            apply = functools.partial(deferred_apply, self.module)
        streams = () if key is None else self.streams or ()
        # Flax constrains annotated parameters where it takes them out of their boxes.
        # Here they lie so already, or were gathered.
        params = variables.get("params", {})
        variables = {**variables, "params": _without_boxes(params)}
        while True:
            try:
                y, collections = apply(
                    variables,
                    *args,
                    rngs={name: stream_key(key, name) for name in streams},
                    mutable=list(self.collections),
                    method=self.method,
                    **kwargs,
                )
            except flax.errors.InvalidRngError as error:
                # The error has no attribute with the name. If Flax words it differently
                # one day, its own error is raised.
                found = re.search(r'PRNG for "(.+?)"', str(error))
                if found is None or found[1] in streams:
                    raise
                missing = found[1]
                if key is None and self.streams != ():
                    trains = self.calling.trains(inputs.train)
                    raise no_key(self.name, missing, trains) from error
                if self.streams is not None:
                    raise ValueError(
                        f"layer {self.name!r}: its module draws from the random stream "
                        f"{missing!r}, but its streams are {list(self.streams)}: write "
                        "`fpipe.flax.layer(module, "
                        f"rngs={[*self.streams, missing]})`"
                    ) from error
                # Once for each stream and each trace: the loop ends when the module has
                # all.
                streams = (*streams, missing)
            else:
                # With `mutable=` Flax returns dicts, whatever its types say.
                state: Any = collections
                return y, flax.core.unfreeze(state), streams

    @property
    def owns_nothing(self) -> bool:
        """Whether other layers own all of the parameters."""
        return any(part.path == () for part in self.borrow)

    def init_variables(self, key: Any, inputs: Inputs) -> dict[str, PyTree]:
        """All variables of the module as `init` makes them, without what it sows."""
        args, kwargs = self.arguments(inputs)
        # Not in training: dropout would draw from a stream, and `init` has a key for
        # the parameters alone.
        made = self.module.init({"params": key}, *args, method=self.method, **kwargs)
        collections = flax.core.unfreeze(made)
        return {name: collections[name] for name in collections if name not in IGNORED}

    def as_state(self, collections: PyTree) -> PyTree:
        """The layer's state from the collections as Flax makes them: deferred batch
        norms keep more.
        """
        if not self.deferred or STATS not in collections:
            return collections
        return {**collections, STATS: defer_stats(collections[STATS])}

    def unknown(self, collections: Iterable[str]) -> ValueError:
        """The error of a module with collections that the layer does not keep."""
        used = sorted(collections)
        return ValueError(
            f"layer {self.name!r}: its module uses {used}, which the layer does not "
            "keep as its state: give a sample input, `fpipe.flax.layer(module, x)`, or "
            "write `fpipe.flax.layer(module, "
            f"state={[*self.collections, *used]})` if it is not only sown"
        )

    @contextlib.contextmanager
    def explained(self, borrowed: Mapping[str, PyTree]) -> Iterator[None]:
        """Inside this context Flax's errors about missing variables become errors about
        the layer.
        """
        # Flax says "collection params is not mutable". A user of layers wants to know
        # which layer, which collection, and what to write; so its messages are read
        # here.
        try:
            yield
        except (
            flax.errors.ModifyScopeVariableError,
            flax.errors.ScopeCollectionNotFound,
        ) as error:
            found = re.search(r'collection "(.+?)"', str(error))
            if found is None:
                raise
            # A collection that the layer does not keep: the user has to declare it.
            if found[1] not in ("params", *self.collections):
                raise self.unknown([found[1]]) from error
            # A parameter that is not there: only of borrowed ones the cause is known.
            if found[1] != "params" or not self.borrow:
                raise
            why = _without_address(error)
            raise misfit(self.borrow, self.name, borrowed, why) from error
        except (
            flax.errors.ScopeParamNotFoundError,
            flax.errors.ScopeParamShapeError,
        ) as error:
            if not self.borrow:
                raise
            why = _without_address(error)
            raise misfit(self.borrow, self.name, borrowed, why) from error


@dataclasses.dataclass(frozen=True)
class LinenInit:
    """The parameters of a layer, as `module.init` makes them."""

    function: LinenFunction

    def __call__(
        self,
        key: Any,
        x: PyTree,
        *,
        borrowed: Mapping[str, PyTree],
        carry: Mapping[str, PyTree] | None = None,
    ) -> PyTree:
        """The layer's own parameters, without those that it borrows."""
        return self.make(key, Inputs(x, carry=carry or {}), borrowed)

    def make(self, key: Any, inputs: Inputs, borrowed: Mapping[str, PyTree]) -> PyTree:
        """The same, of a module with side inputs too."""
        function = self.function
        if function.owns_nothing:
            return {}  # A second embedding table would only be made to be thrown away.
        if function.borrow:
            # What does not fit shows before the module computes with parameters of its
            # own in that place.
            given = (inputs.x, inputs.side, dict(inputs.carry), dict(borrowed))
            eval_shape(self._run_with_borrowed, *shapes_of(given))
        variables = function.init_variables(key, inputs)
        params = variables.pop("params", {})
        # Nobody has said what the module keeps. Without this the collection would be
        # lost silently, and with it the statistics of a norm.
        unknown = variables.keys() - set(function.collections)
        if unknown and not function.known:
            raise function.unknown(unknown)
        check_fit(function.borrow, function.name, params, borrowed)
        return keep_own(function.borrow, params)

    def _run_with_borrowed(
        self,
        x: PyTree,
        side: PyTree,
        carry: Mapping[str, PyTree],
        borrowed: Mapping[str, PyTree],
    ) -> PyTree:
        """The module on the borrowed parameters, for the error if they do not fit."""
        function = self.function
        args, kwargs = function.arguments(Inputs(x, side, carry=carry))
        with function.explained(borrowed):
            return function.module.apply(
                {"params": lend(function.borrow, {}, borrowed)},
                *args,
                rngs={"params": jax.random.key(0)},
                mutable=True,
                method=function.method,
                **kwargs,
            )


@dataclasses.dataclass(frozen=True)
class LinenInitState:
    """The state of a layer, as `module.init` makes it."""

    function: LinenFunction

    def __call__(
        self, x: PyTree, *, key: Any, carry: Mapping[str, PyTree] | None = None
    ) -> PyTree:
        """Its collections as they begin: `{"batch_stats": …}`."""
        return self.make(Inputs(x, carry=carry or {}), key)

    def make(self, inputs: Inputs, key: Any) -> PyTree:
        """The same, of a module with side inputs too."""
        made = self.function.init_variables(key, inputs)
        kept = [name for name in self.function.collections if name in made]
        return self.function.as_state({name: made[name] for name in kept})


# An `init` names the needs that it is given. One that named `side` in every layer would
# make side inputs that no layer asks for pass unseen.
class LinenInitWithSide(LinenInit):
    """`LinenInit` of a module with side inputs."""

    def __call__(
        self,
        key: Any,
        x: PyTree,
        *,
        borrowed: Mapping[str, PyTree],
        carry: Mapping[str, PyTree] | None = None,
        side: PyTree = None,
    ) -> PyTree:
        """The layer's own parameters, without those that it borrows."""
        return self.make(key, Inputs(x, side, carry=carry or {}), borrowed)


class LinenInitStateWithSide(LinenInitState):
    """`LinenInitState` of a module with side inputs."""

    def __call__(
        self,
        x: PyTree,
        *,
        key: Any,
        carry: Mapping[str, PyTree] | None = None,
        side: PyTree = None,
    ) -> PyTree:
        """Its collections as they begin."""
        return self.make(Inputs(x, side, carry=carry or {}), key)


def init_of(function: LinenFunction) -> LinenInit:
    """The `init` of a layer."""
    return (LinenInitWithSide if function.calling.side else LinenInit)(function)


def init_state_of(function: LinenFunction) -> LinenInitState:
    """The `init_state` of a layer."""
    kind = LinenInitStateWithSide if function.calling.side else LinenInitState
    return kind(function)


@dataclasses.dataclass(frozen=True)
class DeferLinen:
    """The layer whose batch norms are deferred: its module, applied differently."""

    function: LinenFunction

    def __call__(self) -> Layer:
        """The layer with deferred norms: its parameters are the same, so `init` is not
        asked for.
        """
        function = dataclasses.replace(self.function, deferred=True)
        return function.as_layer(
            None,
            init_state_of(function),
            finish_linen,
            overwrite=function.overwritten,
        )


def finish_linen(state: PyTree) -> PyTree:
    """The state of a layer whose batch norms are deferred, at the end of a call."""
    return {
        name: finish_stats(value) if name == STATS else value
        for name, value in state.items()
    }


def linen_layer(module: nn.Module, options: ModuleOptions) -> Layer:
    """The layer of a linen module; see `fpipe.flax.layer`."""
    call = options.call
    # What the user said holds; then what the sample shows; then what the fields show.
    method = find_method(type(module), options.method, call)
    fields = {name: getattr(module, name, None) for name in module.__dataclass_fields__}
    calling = options.find_calling(method, fields)
    streams = collections = None
    if options.rngs is not None:
        streams = as_names(options.rngs, f"{call}: rngs=")
    if options.state is not None:
        collections = as_names(options.state, f"{call}: state=")
    known = collections is not None or options.x is not None
    function = LinenFunction(
        options.name,
        calling,
        options.borrow,
        module,
        method if callable(options.method) else options.method,
        streams,
        collections or (),
        known,
        output=options.output,
        particular=options.particular,
        places=options.places,
    )
    if options.x is not None:
        sample = (options.x, options.side_sample, dict(options.carry_sample or {}))
        seen = _observe(function, *sample)
        function = dataclasses.replace(
            function,
            collections=seen.collections if collections is None else collections,
            streams=seen.streams if streams is None else streams,
            shapes=seen.variables,
        )
    # Without a sample, the two modules of Flax with statistics are looked for among the
    # fields. Those that a compact method makes cannot be seen.
    elif collections is None and any(
        isinstance(inner, (nn.BatchNorm, nn.SpectralNorm))
        for _, inner in modules_inside(module)
    ):
        function = dataclasses.replace(function, collections=(STATS,))
    # Statistics and scales are of features: they do not follow the rows. Otherwise that
    # would be seen from shapes, for which the layers are traced once more.
    state_rows = options.state_rows
    of_features = {STATS, OVERWRITTEN}.issuperset(function.collections)
    if state_rows is None and function.stateful and of_features:
        state_rows = False
    return function.as_layer(
        init_of(function),
        init_state_of(function),
        defer=DeferLinen(function) if STATS in function.collections else None,
        state_rows=state_rows,
        overwrite=function.overwritten,
    )


def _without_boxes(params: PyTree) -> PyTree:
    """Parameters out of the boxes that say how they are cut."""

    def is_box(node: Any) -> bool:
        return isinstance(node, nn.Partitioned)

    return jax.tree.map(
        lambda node: node.value if is_box(node) else node, params, is_leaf=is_box
    )


def _without_address(error: Exception) -> str:
    """A message of Flax without the address of its page."""
    return re.sub(r"\.? \(https://.*", "", str(error), flags=re.DOTALL)


class Observed(NamedTuple):
    """What a sample shows of a module: the collections that are state, the random
    streams, and the shapes of its variables by collection.
    """

    collections: tuple[str, ...]
    streams: tuple[str, ...]
    variables: dict[str, PyTree]


def _observe(
    function: LinenFunction, x: PyTree, side: PyTree, carry: PyTree
) -> Observed:
    """What a module uses that is called in training on `x`."""
    # Traced and not run: `eval_shape` returns arrays only, so names come out by the
    # side.
    observed: list[Observed] = []

    def call(key: Any, x: PyTree, side: PyTree, carry: PyTree) -> PyTree:
        variables = function.init_variables(key, Inputs(x, side, carry=carry))
        names = tuple(name for name in variables if name != "params")
        # In training, with all collections mutable: only then everything shows.
        trial = dataclasses.replace(
            function, collections=names, streams=None, borrow=()
        )
        inputs = Inputs(x, side, train=True, carry=carry)
        y, state, streams = trial.apply_module(variables, inputs, key)
        function.picked(y)  # for the error, here where the module is
        # What is sown grows from call to call, so it can be no state.
        structure = jax.tree.structure
        kept = [n for n in names if structure(state.get(n)) == structure(variables[n])]
        observed.append(Observed(tuple(kept), streams, shapes_of(variables)))
        return ()

    eval_shape(call, jax.random.key(0), *shapes_of((x, side, carry)))
    return observed[-1]


def modules_inside(value: Any, path: Path = ()) -> Iterator[tuple[Path, nn.Module]]:
    """The modules that can be seen in a module without calling it, itself first: its
    fields, and lists and dicts of them.
    """
    if isinstance(value, nn.Module):
        yield path, value
        fields = [n for n in value.__dataclass_fields__ if n not in ("parent", "name")]
        value = {name: getattr(value, name, None) for name in fields}
    elif isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from modules_inside(inner, (*path, name))
