"""The model: layers in order, with every skip and borrowed parameter resolved to its
ends.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from fpipe._core.errors import noting
from fpipe._core.pytrees import (
    PyTree,
    Shape,
    describe,
    eval_shape,
    map_arrays,
    numbers_as_arrays,
    shapes_of,
    strong,
    zeros_like,
)
from fpipe._model.layer import Layer, call_layer, flatten_layers, keyword_needs
from fpipe._model.skip_routes import (
    Skip,
    SkipRoute,
    find_skip_routes,
    number_namespaces,
    skip_of,
)

Make: TypeAlias = Callable[[int, PyTree, Mapping[str, Any]], PyTree]
Put: TypeAlias = Callable[[int, Callable[[Any], PyTree], Any], PyTree]


@dataclasses.dataclass(frozen=True)
class Model:
    """Flattened, verified layers.

    Arguments:
        layers: functions, `Layer`s, or nested sequences of them.
        compute_dtype: what parameters, boundaries, skips and side inputs are cast to
            where a layer takes them, if they are real floats; what comes out of the
            last layer in it is cast to float32.
    """

    layers: tuple[Layer, ...]
    compute_dtype: Any

    def __init__(self, layers: Iterable[Any], compute_dtype: Any = None) -> None:
        flat = number_namespaces(flatten_layers(layers))
        if not flat:
            raise ValueError("a pipeline needs at least one layer, got none")
        object.__setattr__(self, "layers", flat)
        object.__setattr__(self, "compute_dtype", compute_dtype)
        object.__setattr__(self, "routes", find_skip_routes(flat))
        object.__setattr__(self, "borrows", _borrows(self.layers))

    routes: Mapping[Skip, SkipRoute] = dataclasses.field(
        init=False, repr=False, compare=False
    )
    borrows: tuple[tuple[tuple[str, int], ...], ...] = dataclasses.field(
        init=False, repr=False, compare=False
    )

    @property
    def stateful(self) -> tuple[int, ...]:
        """The layers with state."""
        return self.needing("state")

    def needing(self, need: str) -> tuple[int, ...]:
        """The layers that declare a need."""
        return tuple(k for k, layer in enumerate(self.layers) if layer.asks(need))

    def apply(
        self,
        span: range,
        params: Mapping[int, PyTree],
        x: PyTree,
        *,
        skips: Mapping[Skip, PyTree],
        state: Mapping[int, PyTree],
        side: PyTree = None,
        key: Any = None,
        microbatch: Any = 0,
        numbers: Mapping[int, Any] | None = None,
        train: bool = False,
        where: str = "",
    ) -> tuple[PyTree, dict[Skip, PyTree], dict[int, PyTree]]:
        """Run the layers of `span` on one microbatch.

        Arguments:
            span: which layers.
            params: parameters by layer, those of borrowed layers included.
            x: the boundary before the first layer of the span.
            skips: what earlier layers stashed.
            state: state by layer; it is put behind `stop_gradient`, and so is what
                comes out.
            key: the call's key. Layer `l` on microbatch `i` gets `fold_in(fold_in(key,
                l), i)`: nothing but these three decides a dropout mask.
            numbers: the layers' own numbers as arrays, so that layers that do the same
                are the same program.

        Returns:
            `(y, skips, state)`; `skips` has what was given plus what was stashed.
        """
        skips, new_state = dict(skips), {}
        for k in span:
            layer = self.layers[k]
            needs: dict[str, Any] = {"side": self._cast(side), "train": train}
            if layer.asks("state"):
                needs["state"] = map_arrays(_still, state[k])
            if layer.asks("key"):
                needs["key"] = layer_key(key, (numbers or {}).get(k, k), microbatch)
            if layer.asks("borrowed"):
                needs["borrowed"] = {
                    name: self._cast(params[owner]) for name, owner in self.borrows[k]
                }
            carry = {
                name: self._cast(skips[skip_of(layer, name)])
                for name in (*layer.pop, *layer.peek)
            }
            own = self._cast(params[k])
            x, stashed, out = call_layer(
                layer, k, own, self._cast(x), carry=carry, needs=needs, where=where
            )
            for name, value in stashed.items():
                skips[skip_of(layer, name)] = value
            if layer.asks("state"):
                new_state[k] = map_arrays(_still, out)
                with noting(f"in layer {k} {layer.name!r}{where}"):
                    _check_state(k, layer, needs["state"], new_state[k])
        return (
            wide_output(x, self.compute_dtype) if span.stop == len(self.layers) else x,
            skips,
            new_state,
        )

    def _cast(self, tree: PyTree) -> PyTree:
        return cast(tree, self.compute_dtype)

    def finish(self, state: Mapping[int, PyTree]) -> dict[int, PyTree]:
        """The states as they leave a call: each layer's `finish` applied."""
        out = {}
        for k, value in state.items():
            finish = self.layers[k].finish
            with noting(f"in the finish of layer {k} {self.layers[k].name!r}"):
                out[k] = value if finish is None else map_arrays(strong, finish(value))
        return out

    def init(self, key: Any, x: PyTree, side: PyTree, put: Put) -> tuple[PyTree, ...]:
        """Parameters of every layer from the shapes of one microbatch; layer `l` gets
        `fold_in(key, l)`.

        Arguments:
            key: a PRNG key.
            x, side: one microbatch, arrays or shapes.
            put: `put(layer, make, key)` runs `make(key)` where the layer belongs.
        """

        def make(k: int, x: PyTree, needs: Mapping[str, Any]) -> PyTree:
            return put(
                k,
                lambda key: self._make_params(
                    k, jax.random.fold_in(key, k), zeros_like(x), zeros_like(needs)
                ),
                key,
            )

        return self._walk(x, side, make, self._state_shapes)[0]

    def init_state(
        self,
        x: PyTree,
        side: PyTree,
        params: Sequence[PyTree] | None,
        key: Any,
        put: Put,
    ) -> tuple[PyTree, ...]:
        """State of every layer (`None` for a layer without), from the shapes of one
        microbatch.

        Arguments:
            key: layer `l` gets `fold_in(key, l)`, as in `init`; `None` is
                `jax.random.key(0)`.
        """
        key = jax.random.key(0) if key is None else key

        def given(k: int, x: PyTree, needs: Mapping[str, Any]) -> PyTree:
            if params is not None:
                return params[k]
            return eval_shape(
                lambda x, needs: self._make_params(k, jax.random.key(0), x, needs),
                x,
                needs,
            )

        def make(k: int, x: PyTree, needs: Mapping[str, Any]) -> PyTree:
            return put(
                k,
                lambda key: self._make_state(
                    k, jax.random.fold_in(key, k), zeros_like(x), zeros_like(needs)
                ),
                key,
            )

        return self._walk(x, side, given, make)[1]

    def _state_shapes(self, k: int, x: PyTree, needs: Mapping[str, Any]) -> PyTree:
        return eval_shape(
            lambda x, needs: self._make_state(k, jax.random.key(0), x, needs), x, needs
        )

    def _make_params(
        self, k: int, key: Any, x: PyTree, needs: Mapping[str, Any]
    ) -> PyTree:
        init = self.layers[k].init
        if init is None:
            raise ValueError(
                f"layer {k} {self.layers[k].name!r} has no init; give it one with "
                "`fpipe.Layer(apply, init)`, write "
                "`fpipe.fn(f)` for a function without parameters, or make the "
                "parameters yourself and call `place(params)` "
                "(and `init_state(x, params=params)`)"
            )
        with noting(f"in the init of layer {k} {self.layers[k].name!r}"):
            return numbers_as_arrays(
                init(key, x, **self._needs_of("init", k, init, needs))
            )

    def _make_state(
        self, k: int, key: Any, x: PyTree, needs: Mapping[str, Any]
    ) -> PyTree:
        init = self.layers[k].init_state
        if init is None:
            raise ValueError(
                f"`init_state`: layer {k} {self.layers[k].name!r} has state but no "
                "init_state; give it one with "
                "`fpipe.Layer(apply, init_state=...)`"
            )
        with noting(f"in the init_state of layer {k} {self.layers[k].name!r}"):
            made = init(
                x, **self._needs_of("init_state", k, init, {**needs, "key": key})
            )
            return map_arrays(strong, numbers_as_arrays(made))

    def _needs_of(
        self, what: str, k: int, f: Callable[..., Any], needs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What an `init` or `init_state` names."""
        named = keyword_needs(f)
        for name in named:
            if name not in needs:
                raise TypeError(
                    f"the {what} of layer {k} {self.layers[k].name!r} names the need "
                    f"{name!r}; it can name {', '.join(needs)}"
                )
        return {name: needs[name] for name in named}

    def _walk(
        self, x: PyTree, side: PyTree, params_of: Make, state_of: Make
    ) -> tuple[tuple[PyTree, ...], tuple[PyTree, ...]]:
        """Parameters and states layer by layer, the shapes of each one's inputs
        computed on the way.
        """
        # Parameters and states are those of the model that computes in their own dtype.
        plain = Model(self.layers)
        x, side = shapes_of(x), shapes_of(side)
        params: dict[int, PyTree] = {}
        states: dict[int, PyTree] = {}
        skips: dict[Skip, PyTree] = {}
        for k, layer in enumerate(self.layers):
            owners = [owner for _, owner in self.borrows[k]]
            late = [self.layers[owner].name for owner in owners if owner > k]
            if late:
                raise ValueError(
                    f"`init`: layer {k} {layer.name!r} borrows from {late}, which come "
                    "later; let the first user own the "
                    "parameters and the later one borrow them, or make them yourself "
                    "and call `place`"
                )
            needs = {
                "carry": {
                    n: skips[skip_of(layer, n)] for n in (*layer.pop, *layer.peek)
                },
                "borrowed": {
                    n: shapes_of(params[owner]) for n, owner in self.borrows[k]
                },
                "side": side,
                "train": False,
            }
            params[k] = params_of(k, x, needs)
            states[k] = state_of(k, x, needs) if layer.asks("state") else None
            x, skips = eval_shape(
                # With a key: some layers always draw, and shapes are the same with and
                # without.
                lambda p, x, skips, state, side, k=k: plain.apply(
                    range(k, k + 1),
                    p,
                    x,
                    skips=skips,
                    state=state,
                    side=side,
                    key=jax.random.key(0),
                )[:2],
                {owner: params[owner] for owner in (k, *owners)},
                x,
                skips,
                {k: states[k]},
                side,
            )
        return tuple(params.values()), tuple(states.values())


def cast(tree: PyTree, compute_dtype: Any) -> PyTree:
    """Real floats in the dtype that a model computes in."""
    if compute_dtype is None:
        return tree
    real = lambda a: jnp.issubdtype(a.dtype, jnp.floating)  # noqa: E731
    return map_arrays(lambda a: a.astype(compute_dtype) if real(a) else a, tree)


def wide_output(y: PyTree, compute_dtype: Any) -> PyTree:
    """What a model returns: in float32 where it is in the dtype that the model computes
    in.
    """
    if compute_dtype is None:
        return y
    return map_arrays(
        lambda a: a.astype(jnp.float32) if a.dtype == compute_dtype else a, y
    )


def _still(array: Any) -> Any:
    """An array of a state: no gradient goes through it, and its type is what it will
    be.
    """
    return strong(jax.lax.stop_gradient(array))


def _check_state(k: int, layer: Layer, old: PyTree, new: PyTree) -> None:
    """A state keeps its type: the next microbatch takes what this one returned."""
    if Shape.of(old) != Shape.of(new):
        raise TypeError(
            f"layer {k} {layer.name!r} got the state {describe(old)} and returned "
            f"{describe(new)}; a state keeps its "
            "structure, shapes and dtypes"
        )


def layer_key(key: Any, layer: Any, microbatch: Any) -> Any:
    """The key of one layer on one microbatch; `None` stays `None`."""
    return (
        None
        if key is None
        else jax.random.fold_in(jax.random.fold_in(key, layer), microbatch)
    )


def _borrows(layers: Sequence[Layer]) -> tuple[tuple[tuple[str, int], ...], ...]:
    """For each layer the names that it borrows and the layers that own them."""
    count = collections.Counter(layer.name for layer in layers)
    where = {layer.name: k for k, layer in enumerate(layers)}
    out = []
    for k, layer in enumerate(layers):
        for name in layer.borrow:
            if count[name] != 1:
                what = (
                    "no layer has that name"
                    if not count[name]
                    else f"{count[name]} layers have that name"
                )
                known = sorted(n for n in count if count[n] == 1)
                raise ValueError(
                    f"layer {k} {layer.name!r} borrows {name!r}, but {what}; unique "
                    f"names are {known}"
                )
            if where[name] == k:
                raise ValueError(
                    f"layer {k} {layer.name!r} borrows from itself; its own parameters "
                    "are `params`"
                )
        out.append(tuple((name, where[name]) for name in layer.borrow))
    return tuple(out)
