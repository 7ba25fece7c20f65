"""NNX modules as layers.

A module is split into its graph and its variables, and merged again in every call. Its
`nnx.Param`s are the layer's parameters, its random streams are made from the call's
key, and all other variables are the layer's state:

    Residual            graph     dense, norm, dropout, and how they are connected
      dense.kernel      params    {"dense": {"kernel": …}, "norm": {"scale": …}}
      norm.scale
      norm.mean         state     {"norm": {"mean": …}}
      dropout.rngs      streams   ((("dropout", "rngs", "count"), ()),
                                   (("dropout", "rngs", "key"), ()))   paths and shapes
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from fpipe._core.pytrees import PyTree
from fpipe._model.layer import Layer
from fpipe._model.specs import annotated_specs
from fpipe.flax._batch_norm import DeferredNorm, defer_module, finish_module
from fpipe.flax._borrow import Path, check_fit, keep_own, with_numbers
from fpipe.flax._calling import find_method, parameters_of
from fpipe.flax._function import Inputs, ModuleFunction, ModuleOptions
from fpipe.flax._streams import as_typed, no_key, stream_key

# The attributes that `nnx.Module.train` and `eval` set.
MODES = ("deterministic", "use_running_average")


class _NoKeyError(Exception):
    """A stream without a key was used. A user never sees this error."""


class _DryStream(nnx.RngStream):
    """A stream without a key. It is a class, not a value, so that it goes through the
    transforms of NNX.
    """

    def __call__(self) -> jax.Array:
        # With a placeholder for a key instead, a module that should not draw at all
        # would draw the same mask in each call, and nobody would notice.
        raise _NoKeyError(self.tag)


@dataclasses.dataclass(frozen=True, eq=False)
class Values:
    """A pytree of arrays, or of their shapes, that compares by value."""

    tree: PyTree

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Values):
            return False
        mine, structure = jax.tree.flatten(self.tree)
        others, other_structure = jax.tree.flatten(other.tree)
        return structure == other_structure and all(
            # Identity first: comparing the weights of a model takes long.
            a is b
            or (a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b))
            for a, b in zip(mine, others, strict=True)
        )

    def __hash__(self) -> int:
        return hash(jax.tree.structure(self.tree))


class Variables(NamedTuple):
    """What a layer gets of a module: nested dicts of parameters and of state."""

    params: PyTree
    state: PyTree


@dataclasses.dataclass(frozen=True)
class Given:
    """Variables of a module that was given as an instance, whatever the key."""

    values: Values

    def __call__(self, key: Any) -> Variables:
        """The values that the module has, whatever the key."""
        del key
        return self.values.tree


@dataclasses.dataclass(frozen=True)
class Factory:
    """Variables of a module that is made when they are asked for."""

    make: Callable[..., nnx.Module]

    def __call__(self, key: Any) -> Variables:
        """The variables of a module that is made with this key."""
        rngs = nnx.Rngs(as_typed(key))
        split = split_module(_without_mesh(lambda: self.make(rngs=rngs)))
        return Variables(nnx.to_pure_dict(split.params), nnx.to_pure_dict(split.rest))


def _without_mesh(make: Callable[[], nnx.Module]) -> nnx.Module:
    """A module, also one whose variables say how they are cut: of these Flax asks for a
    mesh in the context, and here their stage has one.
    """
    # The scan executor has taken the axis of the stages, and Flax refuses a mesh of
    # which some axes are taken.
    if not jax.sharding.get_abstract_mesh().manual_axes:
        try:
            return make()
        except ValueError as error:
            # If Flax words it differently one day, its own error is raised.
            if "out_sharding" not in str(error):
                raise
    with nnx.use_eager_sharding(False):
        return make()


class SplitModule(NamedTuple):
    """A module taken apart: `random` is its `nnx.RngState`, `rest` all that is left."""

    graph: Any
    params: nnx.State
    random: nnx.State
    rest: nnx.State


def split_module(module: nnx.Module) -> SplitModule:
    """Take a module apart; what it has sown is thrown away."""
    # What is sown would count as state, and it grows from call to call.
    nnx.pop(module, nnx.Intermediate)
    return SplitModule(*nnx.split(module, nnx.Param, nnx.RngState, ...))


def paths_of(state: nnx.State) -> tuple[Path, ...]:
    """The paths of the variables in a state."""
    return tuple(path for path, _ in nnx.to_flat_state(state))


@dataclasses.dataclass(frozen=True)
class NNXFunction(ModuleFunction):
    """The function of a layer: an NNX module, made from its graph and variables, and
    called.

    Attributes:
        graph: of the module, without values.
        method: the name of the method that is called.
        params: shapes of the module's parameters, those that are borrowed too.
        streams: the path and shape of each `nnx.RngKey` and `nnx.RngCount`.
        state_paths: the paths of all other variables.
        has_modes: whether `train()` and `eval()` do something to it.
        takes_rngs: whether a call takes the random streams as `rngs=`.
    """

    graph: Any
    method: str
    params: Values
    streams: tuple[tuple[Path, tuple[int, ...]], ...]
    state_paths: tuple[Path, ...]
    has_modes: bool
    takes_rngs: bool

    @property
    def stateful(self) -> bool:
        """See `ModuleFunction`."""
        return bool(self.state_paths)

    @property
    def draws(self) -> bool:
        """See `ModuleFunction`."""
        return bool(self.streams) or self.takes_rngs

    @property
    def switched(self) -> bool:
        """See `ModuleFunction`."""
        return self.has_modes or super().switched

    def run(
        self,
        params: PyTree,
        inputs: Inputs,
        state: PyTree,
        key: Any,
        borrowed: Mapping[str, PyTree],
    ) -> tuple[PyTree, PyTree]:
        """See `ModuleFunction`."""
        # 1. The module with this microbatch's variables.
        check_fit(self.borrow, self.name, self.params.tree, borrowed)
        module = self.merge(params, state, key)
        trains = self.calling.trains(inputs.train)
        if self.has_modes:
            module.train() if trains else module.eval()
        # 2. Its random streams and its call.
        args, kwargs = self.arguments(inputs)
        if self.takes_rngs:
            # A placeholder: without a key every stream below is replaced by a dry one.
            default = jax.random.key(0)
            if key is not None:
                default = stream_key(as_typed(key), "rngs")
            kwargs["rngs"] = nnx.Rngs(default)
        if key is None:
            for _, node in nnx.iter_graph((module, kwargs.get("rngs"))):
                if isinstance(node, nnx.RngStream):
                    # The class of the object is changed, as the module may hold the
                    # stream in many places.
                    # Not by assignment, which NNX checks.
                    object.__setattr__(node, "__class__", _DryStream)
        try:
            y = getattr(module, self.method)(*args, **kwargs)
        except _NoKeyError as error:
            raise no_key(self.name, str(error), trains) from None
        return y, self.state_of(module)

    def merge(self, params: PyTree, state: PyTree, key: Any = None) -> Any:
        """The module of these variables.

        Each random stream gets a key of its own, by its path, and starts to count at
        zero.
        """
        # By path, and counting from zero, because a stream that counts on would make
        # masks depend on how many microbatches its stage has seen.
        base = jax.random.key(0) if key is None else as_typed(key)
        random = {}
        for path, shape in self.streams:
            if path[-1] == "count":
                random[path] = jnp.zeros(shape, jnp.uint32)
            else:
                own = stream_key(base, "/".join(map(str, path[:-1])))
                # A stream inside `nnx.vmap` or `nnx.scan` has a key for each copy of
                # the module.
                random[path] = jax.random.split(own, shape) if shape else own
        return nnx.merge(self.graph, params, unflatten_dict(random), state)

    def state_of(self, module: nnx.Module) -> PyTree:
        """The layer's state, from the module.

        Raises:
            ValueError: the module has variables that it had not when it was made.
        """
        split = split_module(module)
        # A variable that is made in a call has no place in the state of the next call,
        # whose structure must be the same.
        known = {*self.state_paths, *flatten_dict(self.params.tree)}
        found = (*paths_of(split.rest), *paths_of(split.params))
        more = ["/".join(map(str, path)) for path in found if path not in known]
        if more:
            raise ValueError(
                f"layer {self.name!r}: its module made the variables {more} while it "
                "ran, which the layer does not keep as its state: make them in "
                "`__init__`, or as `nnx.Intermediate`"
            )
        return nnx.to_pure_dict(split.rest)


@dataclasses.dataclass(frozen=True)
class NNXInit:
    """The `init` of a layer: the parameters of its module."""

    function: NNXFunction
    source: Given | Factory

    def __call__(self, key: Any, x: PyTree) -> PyTree:
        """The layer's own parameters, without those that it borrows."""
        del x
        return keep_own(self.function.borrow, self.source(key).params)


@dataclasses.dataclass(frozen=True)
class NNXInitState:
    """The `init_state` of a layer: all other variables of its module."""

    source: Given | Factory

    def __call__(self, x: PyTree, *, key: Any) -> PyTree:
        """The layer's variables that are no parameters."""
        del x
        return self.source(key).state


@dataclasses.dataclass(frozen=True)
class DeferredFactory:
    """A factory of modules whose batch norms are deferred."""

    make: Callable[..., nnx.Module]

    def __call__(self, rngs: nnx.Rngs) -> nnx.Module:
        """A module as the user's factory makes it, with deferred norms."""
        return defer_module(self.make(rngs=rngs))


@dataclasses.dataclass(frozen=True)
class DeferNNX:
    """The layer whose batch norms are deferred: one of another module, with the same
    parameters.
    """

    function: NNXFunction
    source: Given | Factory
    options: ModuleOptions

    def __call__(self) -> Layer:
        """The layer with deferred norms, from the same factory or the same values."""
        if isinstance(self.source, Factory):
            module = DeferredFactory(self.source.make)
        else:
            module = defer_module(self.function.merge(*self.source(None)))
        return nnx_layer(module, self.options)


@dataclasses.dataclass(frozen=True)
class FinishNNX:
    """The end of a call, of a layer whose batch norms are deferred."""

    function: NNXFunction

    def __call__(self, state: PyTree) -> PyTree:
        """The state with its running statistics updated."""
        # `finish` reads no parameters: their shapes stand in for them.
        module = self.function.merge(self.function.params.tree, state)
        finish_module(module)
        return self.function.state_of(module)


def is_factory(value: Any) -> bool:
    """Whether a value is an NNX module's type, or a `functools.partial` of one."""
    while isinstance(value, functools.partial):
        value = value.func
    if isinstance(value, DeferredFactory):
        return True
    return isinstance(value, type) and issubclass(value, nnx.Module)


def nnx_layer(module: Any, options: ModuleOptions) -> Layer:
    """The layer of an NNX module, or of a factory of them; see `fpipe.flax.layer`."""
    # A factory is asked for shapes only: its values are made in `init`, on the device
    # of its stage.
    made = module
    if not isinstance(module, nnx.Module):
        made = _without_mesh(lambda: nnx.eval_shape(lambda: module(rngs=nnx.Rngs(0))))
    nodes = [node for _, node in nnx.iter_graph(made)]
    # A clone, as splitting throws away what is sown and the module is the user's.
    split = split_module(nnx.clone(made))
    variables = Variables(nnx.to_pure_dict(split.params), nnx.to_pure_dict(split.rest))
    streams = [
        (path, tuple(variable.get_value().shape))
        for path, variable in nnx.to_flat_state(split.random)
    ]
    method = find_method(type(made), options.method, options.call)
    # A user who names the argument of the call wants the attributes left alone.
    has_modes = not isinstance(options.train, str) and any(
        hasattr(node, mode)
        for node in nodes
        if isinstance(node, nnx.Module)
        for mode in MODES
    )
    # What is known of the module becomes a value without arrays, so that layers of
    # equal modules are equal and stages of equal layers share their programs.
    function = NNXFunction(
        options.name,
        options.find_calling(method, {}),
        tuple(
            dataclasses.replace(part, path=with_numbers(variables.params, part.path))
            for part in options.borrow
        ),
        graph=split.graph,
        method=str(options.method or "__call__"),
        # Shapes alone: weights in here would be copies that no optimizer sees.
        params=Values(
            jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), variables.params
            )
        ),
        streams=tuple(streams),
        state_paths=paths_of(split.rest),
        has_modes=has_modes,
        takes_rngs=not streams and any(p.name == "rngs" for p in parameters_of(method)),
        output=options.output,
        particular=options.particular,
        places=options.places,
    )

    init = init_state = None
    source = Given(Values(variables)) if module is made else Factory(module)
    shapes_only = any(
        isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(variables)
    )
    # A module of shapes has no values to begin with; its parameters are given.
    if module is not made or not shapes_only:
        init = NNXInit(function, source)
        init_state = NNXInitState(source)
    norms = [node for node in nodes if isinstance(node, nnx.BatchNorm)]
    deferred = [isinstance(norm, DeferredNorm) for norm in norms]
    finish = defer = None
    if any(deferred):
        finish = FinishNNX(function)
    if not all(deferred):
        # The sample is of no use here, and arrays would not compare as values.
        options = dataclasses.replace(options, x=None, side_sample=None)
        defer = DeferNNX(function, source, options)
    # The module has its state before it sees a batch: nothing of it follows the rows
    # unless the user says so.
    state_rows = options.state_rows
    if state_rows is None and function.stateful:
        state_rows = False
    made_layer = function.as_layer(init, init_state, finish, defer, state_rows)
    return dataclasses.replace(made_layer, spec=_spec_of(function, split.params))


def _spec_of(function: NNXFunction, params: nnx.State) -> PyTree:
    """What the variables of a module say of how a layer's own parameters are cut."""
    specs = annotated_specs(params)
    if not any(specs):
        return None
    tree = jax.tree.unflatten(jax.tree.structure(function.params.tree), specs)
    return keep_own(function.borrow, tree)
