"""The model: layers in order, with every skip and borrowed parameter resolved to its
ends.

In: functions and `Layer`s, nested or not. Out: a `Model`, which runs a span of its
layers on one microbatch; `init.py` makes its parameters and states. For an encoder that
stashes "a", a decoder that pops it, and a head that borrows the encoder's parameters:

    layers    (encode, decode, head)
    routes    {Skip(-1, "a"): SkipRoute(maker=0, readers=(1,))}
    borrows   ((), (), (Borrow("encode", 0),))
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from fpipe._core.errors import noting
from fpipe._core.pytrees import (
    Bundle,
    PyTree,
    Shape,
    describe,
    is_array,
    map_arrays,
    strong,
)
from fpipe._core.settings import settings
from fpipe._model.joining import check_output_axes
from fpipe._model.layer import Layer, flatten_layers
from fpipe._model.layer_calls import LayerCall, LayerResult, call_layer
from fpipe._model.needs import BY_NAME, Share
from fpipe._model.scopes import scope_of
from fpipe._model.signatures import defaults_of, keyword_needs, without_missing
from fpipe._model.skip_routes import (
    Skip,
    SkipRoute,
    find_skip_routes,
    number_namespaces,
    skip_of,
)
from fpipe._model.state import map_state, overwritten, with_overwritten
from fpipe._model.wrappers import Chunk, Microbatches, wrappers_in

# What each layer takes, forward and backward, estimated for the shapes of a microbatch
# and of its needs.
Estimate: TypeAlias = Callable[
    [PyTree, Mapping[str, Any]], Sequence[tuple[float, float]]
]


class Borrow(NamedTuple):
    """Parameters that a layer borrows: under which name, and the layer that owns
    them.
    """

    name: str
    owner: int


# What the call of a layer is named in the trace of its stage.
LAYER_CALL = "fpipe_layer"


class LayerTracer:
    """A layer under `jax.jit`, which keeps a trace for each structure and shapes."""

    def __init__(self, layer: Layer) -> None:
        # Whose call is traced is for errors alone: as an argument of the jitted
        # function it would give each of several equal layers a trace of its own.
        self._number = 0

        def run(bundle: Bundle) -> Bundle:
            call = LayerCall(*bundle.tree)
            return Bundle.of(call_layer(layer, self._number, call))

        run.__name__ = run.__qualname__ = LAYER_CALL
        self._jitted = jax.jit(run)

    def __call__(self, number: int, call: LayerCall) -> LayerResult:
        """The call of the layer with that number, traced once for all equal ones."""
        self._number = number
        return LayerResult(*self._jitted(Bundle.of(call)).tree)


@dataclasses.dataclass(frozen=True)
class Model:
    """The layers of a whole model in one row, with what follows from all of them: where
    skips go, and who owns borrowed parameters.

    Arguments:
        layers: functions, `Layer`s, or nested sequences of them.
        compute_dtype: what parameters, boundaries, skips and side inputs are cast to
            where a layer takes them, if they are real floats; what comes out of the
            last layer in it is cast to float32.
        one_key: whether all layers get the key of layer 0, as the pieces of one
            function do; else each has its own.
        estimate: what layers take, where it is known without counting it: of the pieces
            of a function.
    """

    layers: tuple[Layer, ...]
    compute_dtype: Any
    one_key: bool

    def __init__(
        self,
        layers: Iterable[Any],
        compute_dtype: Any = None,
        one_key: bool = False,
        estimate: Estimate | None = None,
    ) -> None:
        flat = number_namespaces(flatten_layers(layers))
        if not flat:
            raise ValueError("a pipeline needs at least one layer, got none")
        # The dataclass is frozen; what follows from the layers is found once, here, so
        # that a model with a wrong skip or borrow never exists.
        object.__setattr__(self, "layers", flat)
        object.__setattr__(self, "compute_dtype", compute_dtype)
        object.__setattr__(self, "one_key", one_key)
        object.__setattr__(self, "estimate", estimate)
        object.__setattr__(self, "routes", find_skip_routes(flat))
        object.__setattr__(self, "borrows", _borrows(self.layers))
        object.__setattr__(self, "_traced", {})

    # A function of the same layers, so no part of the comparison.
    estimate: Estimate | None = dataclasses.field(init=False, repr=False, compare=False)

    # Derived from the layers, so no part of the comparison and of the pickle.
    routes: Mapping[Skip, SkipRoute] = dataclasses.field(
        init=False, repr=False, compare=False
    )
    borrows: tuple[tuple[Borrow, ...], ...] = dataclasses.field(
        init=False, repr=False, compare=False
    )
    # The jitted function that traces a layer, by the layer and JAX's settings.
    _traced: dict[Any, LayerTracer] = dataclasses.field(
        init=False, repr=False, compare=False
    )

    def __reduce__(self) -> Any:
        fields = self.layers, self.compute_dtype, self.one_key, self.estimate
        return Model, fields

    def key_number(self, layer: int) -> int:
        """The number that a layer's key is made from."""
        return 0 if self.one_key else layer

    @functools.cached_property
    def stateful(self) -> tuple[int, ...]:
        """The numbers of the layers with state."""
        return self.needing("state")

    def needing(self, need: str) -> tuple[int, ...]:
        """The numbers of the layers that declare a need."""
        return tuple(k for k, layer in enumerate(self.layers) if layer.asks(need))

    def requiring(self, need: str) -> tuple[int, ...]:
        """The numbers of the layers that declare a need and have no default for it."""
        return tuple(
            k
            for k in self.needing(need)
            if defaults_of(self.layers[k].apply).get(need) is False
        )

    def check_given(self, needs: Mapping[str, PyTree], making: bool = False) -> None:
        """Refuse what a call gives and no layer asks for, and what it does not give
        and a layer cannot do without. Asked where a plan is made.

        Arguments:
            needs: what the call gives, by need; `None`: nothing.
            making: whether parameters and states are made: then their functions may ask
                too.

        Raises:
            ValueError: it names the need, and the layer.
        """
        for name, value in needs.items():
            need = BY_NAME[name]
            asking = [layer for layer in self.layers if layer.asks(name)]
            if value is not None and need.only_if_asked:
                makers = [(each.init, each.init_state) for each in self.layers]
                makers = [f for pair in makers for f in pair if f] if making else []
                if not asking and not any(name in keyword_needs(f) for f in makers):
                    raise ValueError(
                        f"`{name}=` was given, but no layer asks for it: a layer asks "
                        "by a keyword-only parameter, `def f(params, x, *, "
                        f"{name})`, or `fpipe.Layer(f, needs=[{name!r}])`. For a "
                        "Flax module write `fpipe.flax.layer(module, side={...})`"
                    )
            if value is None and need.required:
                for k, layer in enumerate(self.layers):
                    if layer.asks(name):
                        who = f"layer {k} {layer.name!r}"
                        without_missing(
                            {name: None}, layer.apply, who, layer.name, "params, x"
                        )

    def apply(
        self,
        span: range,
        params: Mapping[int, PyTree],
        x: PyTree,
        *,
        skips: Mapping[Skip, PyTree],
        state: Mapping[int, PyTree],
        needs: Mapping[str, PyTree],
        microbatch: Any = 0,
        numbers: Mapping[int, Any] | None = None,
        where: str = "",
        traced: bool = False,
    ) -> tuple[PyTree, dict[Skip, PyTree], dict[int, PyTree]]:
        """Run the layers of `span` on one microbatch.

        Arguments:
            span: which layers.
            params: parameters by layer, those of borrowed layers included.
            x: the boundary before the first layer of the span.
            skips: what earlier layers stashed.
            state: state by layer. `stop_gradient` is applied to it, and to what comes
                out.
            needs: this microbatch's share of what the call gives, by need. The key is
                the call's: layer `l` on microbatch `i` gets `fold_in(fold_in(key, l),
                i)`: nothing but these three decides a dropout mask. (With `one_key` it
                is that of layer 0.)
            numbers: those that keys are made of, by layer, as arrays, so that layers
                that do the same are the same program.
            traced: whether this is inside a trace that is kept. Then a layer's Python
                runs once for all traces with the same shapes, whichever stage, call or
                pipe they are for.

        Returns:
            `(y, skips, state)`; `skips` has what was given plus what was stashed.
        """
        skips = dict(skips)
        new_state: dict[int, PyTree] = {}
        for k in span:
            layer = self.layers[k]
            # 1. What the layer gets of the call.
            asked = {name: needs[name] for name in layer.needs or () if name in needs}
            for name in asked:
                if BY_NAME[name].cast:
                    asked[name] = cast(asked[name], self.compute_dtype)
            if layer.asks("state"):
                # Under `stop_gradient` on both sides: 1F1B starts the backward of a
                # microbatch before the forward of the next, so none can go through it.
                # What a backward makes has a "gradient", which is its new value.
                asked["state"] = map_state(layer, _state_in, state[k])
            if asked.get("key") is not None:
                # The layer and the microbatch alone decide the key: no partition,
                # schedule or recomputation may change a dropout mask
                # (pytorch issue 55036).
                # As an argument of the program, not as a constant: with the constant
                # two equal layers with dropout would be two programs to compile.
                layer_number = self.key_number(k)
                if numbers is not None:
                    layer_number = numbers.get(k, layer_number)
                layer_key = jax.random.fold_in(asked["key"], layer_number)
                asked["key"] = jax.random.fold_in(layer_key, microbatch)
            # 2. What other layers own or have stashed. It is cast at each use: the
            # owner's parameters keep their dtype, and their gradients come back in it.
            if layer.asks("borrowed"):
                asked["borrowed"] = {
                    name: cast(params[owner], self.compute_dtype)
                    for name, owner in self.borrows[k]
                }
            carry = {
                name: cast(skips[skip_of(layer, name)], self.compute_dtype)
                for name in (*layer.pop, *layer.peek)
            }
            # 3. The layer runs. JAX's errors inside get a note with layer, stage,
            # microbatch.
            call = LayerCall(
                cast(params[k], self.compute_dtype),
                cast(x, self.compute_dtype),
                carry,
                asked,
            )
            hint = _list_of_microbatches(x) if k == 0 else ""
            if "key" in asked and asked["key"] is None:
                hint += "; this call was given no `key=`, so its key is None"
            with noting(f"in layer {k} {layer.name!r}{where}{hint}"):
                result = self._trace(k, call) if traced else call_layer(layer, k, call)
                _check_wrappers(k, layer, result, k == len(self.layers) - 1)
                if "state" in asked:
                    new_state[k] = map_arrays(_constant_state, result.state)
                    _check_state(k, layer, asked["state"], new_state[k])
                    if layer.overwrite:
                        # A forward leaves it as it was.
                        kept = overwritten(layer, asked["state"])
                        new_state[k] = with_overwritten(layer, new_state[k], kept)
            x = result.y
            # 4. Its skips get the names that they have in the whole model. Popped ones
            # stay in the dict: the caller picks what leaves its span.
            for name, value in result.stashed.items():
                skips[skip_of(layer, name)] = value
        if span.stop == len(self.layers):
            # A loss in half precision would round what it sums.
            x = wide_output(x, self.compute_dtype)
        return x, skips, new_state

    def _trace(self, k: int, call: LayerCall) -> LayerResult:
        """A layer's call, by a trace of it that is kept.

        `jax.jit` keeps one for each structure, shapes and dtypes. The trace of a stage,
        which calls it, holds it as one equation and inlines it later.
        """
        # A jitted function for each layer: `jax.jit` looks traces up by the function.
        # Tried instead: keeping jaxprs here. Then the structure of what a layer returns
        # has to be kept beside them, and JAX's own context (a mesh, a precision) added
        # to the key by hand.
        layer = self.layers[k]
        try:
            hash(layer)
            # Equal layers, such as the blocks of a transformer, have one trace.
            key = (layer, settings())
        except TypeError:
            key = (k, settings())
        if key not in self._traced:
            self._traced[key] = LayerTracer(layer)
        with scope_of(k):
            return self._traced[key](k, call)

    def finish(self, state: Mapping[int, PyTree]) -> dict[int, PyTree]:
        """The states as they leave a call: each layer's `finish` applied, and strongly
        typed, so that the next call finds its programs.
        """
        finished = {}
        for k, value in state.items():
            finish = self.layers[k].finish
            if finish is not None:
                with noting(f"in the finish of layer {k} {self.layers[k].name!r}"):
                    value = _finished(finish, value)
            finished[k] = value
        return finished


def cast(tree: PyTree, compute_dtype: Any) -> PyTree:
    """Real floats in the dtype that a model computes in."""
    if compute_dtype is None:
        return tree
    real = lambda a: jnp.issubdtype(a.dtype, jnp.floating)  # noqa: E731
    # Complex numbers stay: there is no half-precision complex dtype.
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


def _state_in(share: Share, array: Any) -> Any:
    """An array of a state as a layer gets it."""
    return strong(array) if share is Share.WHOLE else _constant_state(array)


def _constant_state(array: Any) -> Any:
    """An array of a state: no gradient goes through it, and its type is what it will
    be.
    """
    return strong(jax.lax.stop_gradient(array))


def _check_wrappers(k: int, layer: Layer, result: LayerResult, last: bool) -> None:
    """Only what leaves the last layer is joined, so only there a `Chunk` says how."""
    who = f"layer {k} {layer.name!r}"
    for wrapper in wrappers_in((result.y, result.stashed)):
        if last and isinstance(wrapper, Chunk):
            continue
        raise TypeError(
            f"{who} returned or stashed an fpipe.{type(wrapper).__name__}: layers "
            "return and stash the arrays themselves; only the last layer may return "
            "an `fpipe.Chunk`, which says how outputs are joined"
        )
    if last:
        check_output_axes(result.y, who)


def _list_of_microbatches(x: PyTree) -> str:
    """What to add to an error of the first layer, if `x` may be meant as a list of
    ready-made microbatches.
    """
    if type(x) not in (list, tuple) or len(x) < 2 or not all(map(is_array, x)):
        return ""
    if len({(a.shape[1:], a.dtype) for a in x}) > 1:
        return ""
    kind = type(x).__name__
    return (
        f": `x` is a {kind} of {len(x)} arrays, so every microbatch is a {kind} of "
        f"{len(x)} arrays too, with some rows of each; if they are ready-made "
        "microbatches, pass `fpipe.Microbatches(x)`"
    )


def _check_state(k: int, layer: Layer, old: PyTree, new: PyTree) -> None:
    """A state keeps its type: the next microbatch takes what this one returned."""
    # Else the programs of microbatch 1 would be others than those of microbatch 0, and
    # the state after each call would compile the next call anew.
    if Shape.of(old) != Shape.of(new):
        raise TypeError(
            f"layer {k} {layer.name!r} got the state {describe(old)} and returned "
            f"{describe(new)}; a state keeps its "
            "structure, shapes and dtypes"
        )


def _borrows(layers: Sequence[Layer]) -> tuple[tuple[Borrow, ...], ...]:
    """What each layer borrows.

    Owners are found by name, as only the user knows which weights are tied; so an
    owner's name must be unique, and other names need not be.

    Raises:
        ValueError: no layer, or several, of that name; a layer that borrows from
            itself.
    """
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
        out.append(tuple(Borrow(name, where[name]) for name in layer.borrow))
    return tuple(out)


def _finished(finish: Callable[[PyTree], PyTree], state: PyTree) -> PyTree:
    """A state as it leaves a call; of one in pieces each."""
    if isinstance(state, Microbatches):
        return Microbatches([_finished(finish, piece) for piece in state])
    return map_arrays(strong, finish(state))
