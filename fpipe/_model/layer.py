"""Layers: pure functions `f(params, x, **needs)`, and the frozen record of one.

In: functions, as users write them, or `Layer`s. Out: `Layer`s, whose needs are read off
the signature:

    def drop(params, x, *, key, train): …     needs ("key", "train"), returns y
    def norm(params, x, *, state): …          needs ("state",), returns y, state
    @fpipe.skippable(stash=["a"], pop=["b"])
    def cross(params, x, *, carry): …         needs ("carry",), returns y, carry

`fpipe._model.signatures` reads the signatures, and `fpipe._model.layer_calls` runs a
layer.
"""

import dataclasses
import functools
import importlib
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from fpipe._core.checks import as_names
from fpipe._core.errors import shown
from fpipe._core.pytrees import PyTree
from fpipe._model.needs import NEEDS
from fpipe._model.signatures import check_function, function_name, signature_needs
from fpipe._model.skips import Namespace
from fpipe._model.specs import is_spec


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of the model: a pure function and its declarations.

    Arguments:
        apply: `apply(params, x, **needs)`; `x` is any pytree. A need is a further value
            that a call gives to a layer. The function asks for a need by naming it as a
            keyword-only parameter:

            - `carry`: a dict of the skips that the layer pops or peeks. A skip is a
              value that an earlier layer stashed; see `fpipe.stash` and `fpipe.pop`.
            - `state`: the layer's state. It goes from microbatch to microbatch in
              order, under `stop_gradient`, and keeps its structure, shapes and dtypes.
            - `key`: a PRNG key of this layer and microbatch, `fold_in(fold_in(key,
              layer), microbatch)`. It is `None` if the call has no key.
            - `train`: the call's `train`, `True` or `False`.
            - `borrowed`: a dict from each name in `borrow` to that layer's parameters.
            - `side`: this microbatch's piece of the call's `side`.
            - `step`: the call's `step`, an int32 scalar, the same for all microbatches.

            If the call does not give a need, the parameter takes its own default
            (`side=None`, `step=0`). A `side` or `step` without a default is required.

            The function returns `y`. With `carry` it returns `(y, carry)`, with
            `state` it returns `(y, state)`, and with both `(y, carry, state)`.
        init: `init(key, x, **needs) -> params`, where `x` is a microbatch of zeros.
            `init` may name needs too. `None`, the default, is for a layer without
            parameters. An `fpipe.fn` layer needs no `init`.
        name: the layer's name in errors, drawings and `borrow`. Default: the name of
            the function.

    Other Arguments:
        stash, pop, peek: names of the skips that the layer stashes, pops, or reads
            without popping.
        needs: the needs, where a wrapper hides the signature of the function. Default:
            the needs that the signature names. If `apply` is an object with `__call__`,
            a keyword of its signature is a need only if it has no default.
        borrow: names of layers. This layer gets their parameters as `borrowed[name]`
            (tied weights).
        init_state: `init_state(x, **needs) -> state`, for a layer with state. Its `key`
            is the layer's own.
        finish: `finish(state) -> state`, applied once at the end of a call.
        defer: `defer() -> Layer`, the same layer with deferred batch norms.
            `Pipe(deferred_batch_norm=True)` uses the `apply`, `needs`, `init_state` and
            `finish` of that layer in place of this layer's.
        state_rows: `True`: the state has one entry for each row of the batch, on the
            first axis of each array, as a key-value cache has. The state is cut like
            `x`: a microbatch gets and returns the entries of its own rows. `False`: all
            microbatches share one state, whatever its shapes. `None`, the default: they
            share one state, but with more than one microbatch a state with one entry
            for each row is an error.
        overwrite: names of entries of the state, which is a dict. The backward makes
            these entries: their "gradients" are their new values (scales and maxima of
            fp8 products, by a `jax.custom_vjp`). Every microbatch gets the values that
            the call was given. `value_and_grad` returns the maximum over the
            microbatches as the new state; other calls leave these entries as they are.
            What the layer itself returns for them is ignored. `True` means all entries.
        spec: how the parameters are sharded over the axes of a stage's mesh (tensor
            parallelism). A `jax.sharding.PartitionSpec` holds for all parameters. A
            tree of specs has the form of the parameters. A spec in place of a whole
            subtree holds for all parameters in it. `None` leaves a parameter as it is
            given: with the spec of a Flax box around the array, or else with the
            array's own sharding. A stage on one device ignores `spec`.
        namespaces: the namespace of each isolated skip; `isolate` sets it.

    Raises:
        TypeError: a need is a positional parameter. A required keyword-only parameter
            is no need. A string stands where a list of names belongs. The layer
            declares skips without the need `carry`, or an `init_state`, `finish`,
            `state_rows` or `overwrite` without the need `state`. `apply` is a `Layer`,
            a Flax module, or an object that is a pytree with arrays of floats.
            `state_rows` is no bool.
        ValueError: a list has the same name twice.

    Example:
        >>> dense = fpipe.Layer(
        ...     lambda params, x: jnp.tanh(x @ params),
        ...     init=lambda key, x: jax.random.normal(key, (x.shape[-1], 8)),
        ...     name="dense",
        ... )
    """

    apply: Callable[..., Any]
    init: Callable[..., PyTree] | None = None
    name: str = ""
    stash: Sequence[str] = ()
    pop: Sequence[str] = ()
    peek: Sequence[str] = ()
    needs: Sequence[str] | None = None
    borrow: Sequence[str] = ()
    init_state: Callable[..., PyTree] | None = None
    finish: Callable[[PyTree], PyTree] | None = None
    defer: Callable[[], "Layer"] | None = None
    state_rows: bool | None = None
    overwrite: Sequence[str] | bool = ()
    # A dict has no hash. Equal layers have equal ones without it.
    spec: PyTree = dataclasses.field(default=None, hash=False)
    namespaces: tuple[tuple[str, Namespace], ...] = ()

    def __post_init__(self) -> None:
        # The dataclass is frozen, so that a layer can be a key of compiled programs;
        # fields are brought into their final form here, past the freezing.
        put = functools.partial(object.__setattr__, self)
        for field in ("apply", "init", "init_state", "finish", "defer"):
            value = getattr(self, field)
            if not callable(value) and (value is not None or field == "apply"):
                raise TypeError(
                    f"`fpipe.Layer({field}=...)`: {shown(value)} is not callable"
                )
        _check_function(self.apply, "`fpipe.Layer(f)`")
        if not isinstance(self.name, str):
            raise TypeError(
                "`fpipe.Layer(name=...)`: a name must be a string, got "
                f"{shown(self.name)}"
            )
        put("name", self.name or function_name(self.apply))
        for field in ("stash", "pop", "peek", "borrow"):
            put(
                field,
                as_names(
                    getattr(self, field),
                    f"`fpipe.Layer({field}=...)` of layer {self.name!r}",
                ),
            )
        put("needs", self._checked_needs())
        for part in jax.tree.leaves(self.spec, is_leaf=is_spec):
            if not is_spec(part):
                raise TypeError(
                    f"`fpipe.Layer(spec=...)` of layer {self.name!r}: {shown(part)} is "
                    "no jax.sharding.PartitionSpec"
                )
        spaces = self.namespaces
        if not isinstance(spaces, (tuple, list)) or not all(
            isinstance(pair, tuple) and isinstance(pair[-1], Namespace)
            for pair in spaces
        ):
            raise TypeError(
                f"`fpipe.Layer(namespaces={shown(spaces)})` of layer {self.name!r}: "
                "`layer.isolate(namespace)` sets them"
            )
        put("namespaces", tuple(spaces))
        # Declarations without the need that they are for: the function could never see
        # the skips, the borrowed parameters or the state.
        form = f"`def {self.name}(params, x, *, "
        if (self.stash or self.pop or self.peek) and not self.asks("carry"):
            raise TypeError(
                f"layer {self.name!r} declares skips but its function has no "
                "keyword-only parameter `carry`: write "
                f"{form}carry)` and return `(y, carry)`"
            )
        if self.borrow and not self.asks("borrowed"):
            raise TypeError(
                f"layer {self.name!r} borrows {list(self.borrow)} but its function has "
                "no keyword-only parameter "
                f"`borrowed`: write {form}borrowed)`"
            )
        if self.state_rows not in (None, True, False):
            raise TypeError(
                f"`fpipe.Layer(state_rows={self.state_rows!r})` of layer "
                f"{self.name!r}: True, False or None"
            )
        if self.overwrite is not True:
            names = () if self.overwrite is False else self.overwrite
            where = f"`fpipe.Layer(overwrite=...)` of layer {self.name!r}"
            put("overwrite", as_names(names, where))
        of_state = self.init_state or self.finish or self.overwrite
        of_state = of_state or self.state_rows is not None
        if of_state and not self.asks("state"):
            raise TypeError(
                f"layer {self.name!r} has init_state, finish, state_rows or overwrite "
                "but its function has no keyword-only parameter "
                f"`state`: write {form}state)` and return `(y, state)`"
            )

    def _checked_needs(self) -> tuple[str, ...]:
        # In the order of the table, whatever order the user wrote: equal layers are
        # equal.
        if self.needs is None:
            return signature_needs(self.apply, self.name)
        given = as_names(self.needs, f"`fpipe.Layer(needs=...)` of layer {self.name!r}")
        unknown = [n for n in given if n not in NEEDS]
        if unknown:
            raise TypeError(
                f"layer {self.name!r}: {unknown} are no needs; the needs are "
                f"{', '.join(NEEDS)}"
            )
        return tuple(n for n in NEEDS if n in given)

    def __call__(self, params: PyTree, x: PyTree, **needs: Any) -> Any:
        """Call the layer's function directly, without the checks of a pipe.

        A decorated function can be tested like a plain one.

        Arguments:
            params: the layer's parameters.
            x: one microbatch.
            needs: the values of the needs that the layer asks for.

        Returns:
            What the function returns.
        """
        return self.apply(params, x, **needs)

    def __reduce__(self) -> Any:
        # `pickle` writes a function as its module and name, and checks that the name
        # leads back to the same object. Under a decorator it does not:
        #     @fpipe.skippable(stash=["skip"])
        #     def encode(params, x, *, carry): ...      # `module.encode` is now a Layer
        # So the name is written in the place of the function, and read back as that
        # layer's.
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        f = self.apply.f if isinstance(self.apply, _WithoutParams) else self.apply
        name = getattr(f, "__module__", None), getattr(f, "__qualname__", None)
        try:
            found = _by_name(*name)
        except (KeyError, AttributeError, TypeError):
            found = None
        if isinstance(found, Layer) and found.apply == self.apply:
            return _unpickled, (fields | {"apply": None}, name)
        return _unpickled, (fields, None)

    def asks(self, need: str) -> bool:
        """Whether the layer declares a need, by its signature or by `needs=`.

        Arguments:
            need: the name of the need, such as `"key"`.
        """
        return need in (self.needs or ())

    def isolate(
        self, namespace: Namespace, only: Iterable[str] | None = None
    ) -> "Layer":
        """The same layer with its skips, or `only` some of them, in a namespace.

        Arguments:
            namespace: a `Namespace`. The layers that stash, peek or pop the same skip
                need the same namespace.
            only: names of skips that this layer declares. Default: all of them.

        Returns:
            A new `Layer`.

        Raises:
            TypeError: `namespace` is no `Namespace`, or `only` is no list of names.
            ValueError: the layer declares no skip of a name in `only`.
        """
        if not isinstance(namespace, Namespace):
            raise TypeError(
                f"`isolate(namespace)` of layer {self.name!r}: {shown(namespace)} is "
                "no "
                "fpipe.Namespace"
            )
        # Isolating twice is allowed: the later namespace holds for the names it is
        # given.
        mine = (*self.stash, *self.pop, *self.peek)
        chosen = (
            mine
            if only is None
            else as_names(only, f"`isolate(only=...)` of layer {self.name!r}")
        )
        for name in chosen:
            if name not in mine:
                raise ValueError(
                    f"`isolate(only=[{name!r}])`: layer {self.name!r} declares no such "
                    f"skip, only {list(mine)}"
                )
        spaces = dict(self.namespaces) | dict.fromkeys(chosen, namespace)
        return dataclasses.replace(self, namespaces=tuple(spaces.items()))


def _by_name(module: Any, name: Any) -> Any:
    """What a module has under a name; dots lead into classes."""
    return operator.attrgetter(name)(sys.modules[module])


def _unpickled(fields: dict[str, Any], name: tuple[str, str] | None) -> Layer:
    """A layer from its pickle; `name`: of the decorated function, see `__reduce__`."""
    if name is not None:
        importlib.import_module(name[0])
        fields = fields | {"apply": _by_name(*name).apply}
    return Layer(**fields)


def _check_function(f: Callable[..., Any], call: str) -> None:
    """Refuse what looks like a function and has more than its call."""
    if isinstance(f, Layer):
        raise TypeError(
            f"{call}: {f.name!r} is an fpipe.Layer already, and its init, state, skips "
            "and borrowed parameters would be lost: "
            "use it as it is; `dataclasses.replace(layer, name=...)` changes a part of "
            "it"
        )
    check_function(f, call)


def as_layer(value: Any) -> Layer:
    """A `Layer` as it is, a bare function as a `Layer`."""
    if isinstance(value, Layer):
        return value
    if not callable(value):
        raise TypeError(
            f"a layer is a function or an fpipe.Layer, got {type(value).__name__}: "
            f"{shown(value)}"
        )
    return Layer(value)


def flatten_layers(layers: Any) -> list[Layer]:
    """Nested sequences of functions and layers as one list of `Layer`s."""
    # What can be called is one layer, even if it is iterable too, as the `Sequential`
    # of Equinox is.
    nested = isinstance(layers, (list, tuple))
    if not nested and isinstance(layers, Iterable) and not callable(layers):
        # An iterator of layers is one too; a name, a dict or an array is a mistake,
        # which `as_layer` explains.
        nested = not isinstance(layers, (str, bytes, Mapping))
        nested = nested and not hasattr(layers, "shape")
    if not nested:
        return [as_layer(layers)]
    return [leaf for item in layers for leaf in flatten_layers(item)]


def fn(
    f: Callable[..., Any], name: str = "", needs: Sequence[str] | None = None
) -> Layer:
    """A layer without parameters: `fpipe.fn(jnp.tanh)` is `lambda params, x:
    jnp.tanh(x)`.

    Arguments:
        f: `f(x, **needs)`; the needs are those of `Layer`.
        name: the layer's name. Default: the name of the function.
        needs: the needs, where a wrapper hides the signature of `f`; `()` for none.
            Default: the needs that the signature names.

    Returns:
        A `Layer` whose parameters are `()`.

    Raises:
        TypeError: `f` cannot be called as `f(x, **needs)`. Or it is a `Layer`, a Flax
            module, or an object that is a pytree with arrays of floats: these arrays
            would not train.

    Example:
        >>> activation = fpipe.fn(jax.nn.relu)
        >>> @fpipe.skippable(pop=["skip"])
        ... @fpipe.fn
        ... def add(x, *, carry):
        ...     skip, carry = fpipe.pop(carry, "skip")
        ...     return x + skip, carry
    """
    if not callable(f):
        raise TypeError(f"`fpipe.fn(f)`: {shown(f)} is not callable")
    _check_function(f, "`fpipe.fn(f)`")
    name = name or function_name(f)
    if needs is None:
        needs = signature_needs(f, name, ("x",))
    return Layer(_WithoutParams(f), _no_params, name, needs=needs)


# A class and not a closure: two `fpipe.fn(jnp.tanh)` are equal, share their programs,
# and pickle.
@dataclasses.dataclass(frozen=True)
class _WithoutParams:
    """A function without parameters, called as a layer is."""

    f: Callable[..., Any]

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """Whose signature says what it needs; Python's convention for wrappers."""
        return self.f

    def __call__(self, params: PyTree, x: PyTree, **needs: Any) -> Any:
        del params
        return self.f(x, **needs)


def without_params(layer: Layer) -> bool:
    """Whether a layer is a function without parameters, as `fn` makes them."""
    return isinstance(layer.apply, _WithoutParams)


def _no_params(key: Any, x: PyTree) -> PyTree:
    """The `init` of `fn` layers: a pytree without leaves, as optimizers take it."""
    del key, x
    return ()


def skippable(
    stash: Iterable[str] = (), pop: Iterable[str] = (), peek: Iterable[str] = ()
) -> Callable[[Callable[..., Any] | Layer], Layer]:
    """Declare the skips of a layer.

    After torchgpipe's `@skippable` (Kim et al., arXiv 2004.09910).

    Arguments:
        stash: names that the layer stashes, each with one `fpipe.stash`.
        pop: names that the layer takes out, each with one `fpipe.pop`.
        peek: names that the layer reads with `fpipe.peek`. Others may read them too.

    Returns:
        A decorator. It takes a function with the keyword-only parameter `carry`, or a
        `Layer`, and returns a `Layer`. Skips that a `Layer` declares already are kept.

    Raises:
        TypeError: a string stands where a list of names belongs.
        ValueError: a list has the same name twice.

    Example:
        >>> @fpipe.skippable(stash=["skip"])
        ... def encode(params, x, *, carry):
        ...     y = jnp.tanh(x @ params)
        ...     return y, fpipe.stash(carry, "skip", y)
    """
    # Checked when the decorator is written and not when it is applied: the error then
    # points at the line with the mistake.
    declared = {
        field: as_names(value, f"`fpipe.skippable({field}=...)`")
        for field, value in (("stash", stash), ("pop", pop), ("peek", peek))
    }

    def declare(layer: Callable[..., Any] | Layer) -> Layer:
        if not isinstance(layer, Layer):
            return Layer(
                layer,
                stash=declared["stash"],
                pop=declared["pop"],
                peek=declared["peek"],
            )
        return dataclasses.replace(
            layer, **{f: (*getattr(layer, f), *more) for f, more in declared.items()}
        )

    return declare
