"""NNX modules as layers."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from fpipe._core.pytrees import PyTree
from fpipe._model.layer import Layer
from fpipe.flax._batch_norm import DeferredNorm, defer_module, finish_module
from fpipe.flax._borrow import Borrow, Path, check_fit, keep_own, lend, numbered, owners
from fpipe.flax._calling import Calling, calling, method_of, parameters_of
from fpipe.flax._streams import no_key, stream_key, typed

MODES = (
    "deterministic",
    "use_running_average",
)  # the attributes that `nnx.Module.train` and `eval` set


class _Drawn(Exception):  # noqa: N818 - never seen by a user
    """A stream without a key was drawn from."""


class _Dry(nnx.RngStream):
    """A stream without a key. It is a class, not a value, so that it goes through the
    transforms of NNX.
    """

    def __call__(self) -> jax.Array:
        raise _Drawn(self.tag)


@dataclasses.dataclass(frozen=True, eq=False)
class Values:
    """A pytree of arrays that compares by value."""

    tree: PyTree

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Values):
            return False
        (a, one), (b, two) = jax.tree.flatten(self.tree), jax.tree.flatten(other.tree)
        return one == two and all(
            v is w
            or (v.shape == w.shape and v.dtype == w.dtype and np.array_equal(v, w))
            for v, w in zip(a, b, strict=True)
        )

    def __hash__(self) -> int:
        return hash(jax.tree.structure(self.tree))


@dataclasses.dataclass(frozen=True)
class Given:
    """Variables of a module that was given as an instance."""

    variables: Values

    def __call__(self, key: Any) -> tuple[PyTree, PyTree]:
        """Parameters and the other variables."""
        del key
        return self.variables.tree


@dataclasses.dataclass(frozen=True)
class Factory:
    """Variables of a module that is made when they are asked for."""

    make: Callable[..., nnx.Module]

    def __call__(self, key: Any) -> tuple[PyTree, PyTree]:
        """Parameters and the other variables."""
        _, params, _, rest = split(self.make(rngs=nnx.Rngs(typed(key))))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def split(module: nnx.Module) -> tuple[Any, ...]:
    """Graph, parameters, random state and the other variables of a module; what it has
    sown is thrown away.
    """
    nnx.pop(module, nnx.Intermediate)
    return nnx.split(module, nnx.Param, nnx.RngState, ...)


def paths(state: nnx.State) -> tuple[Path, ...]:
    """The paths of the variables in a state."""
    return tuple(path for path, _ in nnx.to_flat_state(state))


@dataclasses.dataclass(frozen=True)
class NNX:
    """The function of a layer: an NNX module, made from its graph and variables, and
    called.

    Attributes:
        graph: of the module, without values.
        name: the layer's.
        calling: how it is called.
        method: which of its methods.
        params: shapes of its parameters, those that are borrowed too.
        streams: the path and shape of each `nnx.RngKey` and `nnx.RngCount`.
        rest: the paths of all other variables: its state.
        modes: whether `train()` and `eval()` do something to it.
        passed: whether a call takes the random streams as `rngs=`.
        borrow: parts of the parameters that other layers own.
    """

    graph: Any
    name: str
    calling: Calling
    method: str
    params: Values
    streams: tuple[tuple[Path, tuple[int, ...]], ...]
    rest: tuple[Path, ...]
    modes: bool
    passed: bool
    borrow: tuple[Borrow, ...]

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
        check_fit(self.borrow, self.name, self.params.tree, borrowed or {})
        params = lend(self.borrow, params, borrowed or {})
        module = self.merged(params, state or {}, key)
        trains = self.calling.trains(train)
        if self.modes:
            module.train() if trains else module.eval()
        args, kwargs = self.calling.arguments(x, train)
        if self.passed:
            default = (
                jax.random.key(0) if key is None else stream_key(typed(key), "rngs")
            )
            kwargs["rngs"] = nnx.Rngs(default)
        if key is None:
            _dry(module)
            _dry(kwargs.get("rngs"))
        try:
            y = getattr(module, self.method)(*args, **kwargs)
        except _Drawn as error:
            raise no_key(self.name, str(error), trains) from None
        state = self.state(module)
        return (y, state) if self.rest else y

    def merged(self, params: PyTree, state: PyTree, key: Any = None) -> Any:
        """The module of these variables."""
        return nnx.merge(self.graph, params, self._random(key), state)

    def _random(self, key: Any) -> PyTree:
        """Random state: each stream gets a key of its own, by its path, and starts to
        count at zero.
        """
        base = jax.random.key(0) if key is None else typed(key)
        flat = {}
        for path, shape in self.streams:
            if path[-1] == "count":
                flat[path] = jnp.zeros(shape, jnp.uint32)
            else:
                own = stream_key(base, "/".join(map(str, path[:-1])))
                flat[path] = jax.random.split(own, shape) if shape else own
        return unflatten_dict(flat)

    def state(self, module: nnx.Module) -> PyTree:
        """The layer's state, from the module."""
        _, params, _, rest = split(module)
        known = {*self.rest, *flatten_dict(self.params.tree)}
        more = [path for path in (*paths(rest), *paths(params)) if path not in known]
        if more:
            names = ["/".join(map(str, path)) for path in more]
            raise ValueError(
                f"layer {self.name!r}: its module made the variables {names} while it "
                "ran, which the layer does not keep "
                "as its state: make them in `__init__`, or as `nnx.Intermediate`"
            )
        return nnx.to_pure_dict(rest)


def _dry(module: Any) -> None:
    """Let a module's streams refuse to be drawn from."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.RngStream):
            object.__setattr__(node, "__class__", _Dry)


@dataclasses.dataclass(frozen=True)
class Init:
    """The parameters of a layer."""

    source: Given | Factory
    borrow: tuple[Borrow, ...]

    def __call__(self, key: Any, x: PyTree) -> PyTree:
        """The layer's own parameters."""
        del x
        return keep_own(self.borrow, self.source(key)[0])


@dataclasses.dataclass(frozen=True)
class InitState:
    """The state of a layer."""

    source: Given | Factory

    def __call__(self, x: PyTree, *, key: Any) -> PyTree:
        """The layer's variables that are no parameters."""
        del x
        return self.source(key)[1]


@dataclasses.dataclass(frozen=True)
class Deferred:
    """A factory of modules whose batch norms are deferred."""

    make: Callable[..., nnx.Module]

    def __call__(self, rngs: nnx.Rngs) -> nnx.Module:
        """Make one."""
        return defer_module(self.make(rngs=rngs))


@dataclasses.dataclass(frozen=True)
class Defer:
    """The layer whose batch norms are deferred.

    Attributes:
        train, chained: as the layer was made.
    """

    of: NNX
    source: Given | Factory
    train: str | bool | None
    chained: bool

    def __call__(self) -> Layer:
        """A layer of another module, with the same parameters."""
        of = self.of
        if isinstance(self.source, Factory):
            module = Deferred(self.source.make)
        else:
            module = defer_module(of.merged(*self.source(None)))
        return nnx_layer(
            module,
            name=of.name,
            train=self.train,
            method=of.method,
            borrow=of.borrow,
            chained=self.chained,
        )


@dataclasses.dataclass(frozen=True)
class Finish:
    """The end of a call, of a layer whose batch norms are deferred."""

    of: NNX

    def __call__(self, state: PyTree) -> PyTree:
        """The state with its running statistics updated."""
        module = self.of.merged(self.of.params.tree, state)
        finish_module(module)
        return self.of.state(module)


def is_factory(value: Any) -> bool:
    """Whether a value is an NNX module's type, or a `functools.partial` of one."""
    while isinstance(value, functools.partial):
        value = value.func
    if isinstance(value, Deferred):
        return True
    return isinstance(value, type) and issubclass(value, nnx.Module)


def nnx_layer(
    module: Any,
    *,
    name: str,
    train: str | bool | None,
    method: str | None,
    borrow: tuple[Borrow, ...],
    chained: bool,
) -> Layer:
    """See `fpipe.flax.layer`."""
    who = f"`fpipe.flax.layer(module)` of layer {name!r}"
    made = (
        module
        if isinstance(module, nnx.Module)
        else nnx.eval_shape(lambda: module(rngs=nnx.Rngs(0)))
    )
    norms = {
        isinstance(n, DeferredNorm)
        for _, n in nnx.iter_graph(made)
        if isinstance(n, nnx.BatchNorm)
    }
    graph, params, random, rest = split(nnx.clone(made))
    f = method_of(type(made), method, who)
    how = calling(f, train, chained, {}, who)
    modes = not isinstance(train, str) and any(
        hasattr(node, mode)
        for _, node in nnx.iter_graph(made)
        if isinstance(node, nnx.Module)
        for mode in MODES
    )
    leaves = nnx.to_flat_state(random)
    own = nnx.to_pure_dict(params)
    borrow = tuple(part._replace(path=numbered(own, part.path)) for part in borrow)
    apply = NNX(
        graph,
        name,
        how,
        method or "__call__",
        Values(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), own)),
        tuple((path, tuple(v.get_value().shape)) for path, v in leaves),
        paths(rest),
        modes,
        not leaves and any(p.name == "rngs" for p in parameters_of(f)),
        borrow,
    )
    variables = own, nnx.to_pure_dict(rest)
    abstract = any(
        isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(variables)
    )
    source = Given(Values(variables)) if module is made else Factory(module)
    there = module is not made or not abstract
    needs = {
        "state": bool(apply.rest),
        "key": bool(apply.streams) or apply.passed,
        "train": how.train is None and (modes or bool(how.switches)),
        "borrowed": bool(borrow),
    }
    return Layer(
        apply,
        Init(source, borrow) if there else None,
        name,
        needs=[n for n, needed in needs.items() if needed],
        borrow=owners(borrow),
        init_state=InitState(source) if apply.rest and there else None,
        finish=Finish(apply) if True in norms else None,
        defer=Defer(apply, source, train, chained) if False in norms else None,
    )
