"""Flax modules as layers: one module, a whole model, or a module with the parameters of
another layer.

    layer(nn.Dense(4))                                    -> Layer "Dense"
    layers(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]))
        -> [Layer "layers_0", Layer "relu", Layer "layers_2"]
    tied(embed, "embed", method="attend")                 -> Layer "Embed_of_embed"

`_linen` and `_nnx` hold the differences between linen and NNX.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from fpipe._core.errors import noting, shown
from fpipe._core.pytrees import PyTree, describe, eval_shape, is_array, shapes_of
from fpipe._core.statics import check_leaves
from fpipe._model.layer import Layer, fn
from fpipe._model.needs import stand_ins
from fpipe._model.signatures import function_name, keyword_needs
from fpipe.flax._borrow import Borrow, Path, parse_borrow
from fpipe.flax._function import ModuleOptions, Output
from fpipe.flax._linen import linen_layer, modules_inside
from fpipe.flax._nnx import is_factory, nnx_layer
from fpipe.flax._places import parse_places


def layer(
    module: Any,
    x: PyTree = None,
    *,
    name: str = "",
    rngs: Iterable[str] | None = None,
    state: Iterable[str] | None = None,
    train: str | bool | None = None,
    method: str | Callable[..., Any] | None = None,
    borrow: Mapping[str, str] | None = None,
    state_rows: bool | None = None,
    inputs: str | Iterable[str] | None = None,
    side: Mapping[str, str] | None = None,
    side_sample: PyTree = None,
    carry_sample: Mapping[str, PyTree] | None = None,
    output: Output = None,
    path: str | Mapping[str, str] | None = None,
    stacked: str | None = None,
) -> Layer:
    """A Flax module as a layer.

    The layer's parameters have Flax's own names. For a linen module they are the
    collection `params`; for an NNX module they are its `nnx.Param`s as nested dicts.
    All other variables are the layer's state, except random state and what the module
    sows: `intermediates`, `perturbations`, and `nnx.Intermediate`s.
    If the module's call has several required inputs, the layer takes a tuple of them.

    A module that stashes, peeks or pops skips has the keyword-only parameter `carry`,
    as layers have, and returns `(y, carry)`. `fpipe.skippable` declares the names.

    Arguments:
        module: a linen module, or an NNX module. For an NNX module `init` and
            `init_state` return its own values, for any key. Or the type of an NNX
            module, or a `functools.partial` of it: that is called as
            `module(rngs=nnx.Rngs(key))`.
        x: a sample input of a linen module, arrays or `jax.ShapeDtypeStruct`s. The
            module is traced on it in training mode, which shows the random streams and
            collections that it uses. An NNX module needs no sample.

    Other Arguments:
        name: the layer's name in errors, drawings and `borrow`. Default: the module's
            name, or the name of its type.
        rngs: the random streams of a linen module, `()` for none. Default: the streams
            that it uses on `x`, or without `x` every stream that it asks for. Each
            stream gets the key `stream_key(key, name)`.
        state: the collections of a linen module that are state. Default: the
            collections that it uses on `x`. Without `x` it is `["batch_stats"]` if a
            field of the module is an `nn.BatchNorm`, otherwise none.
        train: the name of the argument that is true in training, or `"not frozen"` for
            an argument `frozen` that is false in training. `True` or `False` is for a
            layer that always or never trains. Default: the arguments `train`,
            `training`, `deterministic` and `use_running_average` that the call has. For
            an NNX module also the attributes that `module.train()` and `module.eval()`
            set.
        method: the name of the method to call, or for a linen module a function.
            Default `__call__`.
        borrow: parts of the parameters that other layers own. `{"embed": "tokens"}`
            uses the parameters of the layer `"tokens"` in place of the module's own
            `embed`. `"tokens/table"` is a part of that layer's parameters. See `tied`.
        state_rows: whether the state has one entry for each row of the batch, on the
            first axis of each array; see `fpipe.Layer`.
        inputs: the arguments of the call that come from the previous layer. With one
            name, the whole input is that argument. With several names, such as `("x",
            "mask")`, the input is a tuple of these arguments in this order, or a dict
            of them by name.
        side: the arguments of the call that are side inputs, by name.
            `{"attention_mask": "mask"}` passes `side["mask"]`; `"text/mask"` passes
            `side["text"]["mask"]`.
        side_sample: a sample of the side inputs, to go with `x`.
        carry_sample: a sample of the skips that the module peeks at or pops, by name,
            to go with `x`.
        output: the part of the module's result that is the layer's output: an index or
            a name, as in `result[0]`, or a function of the result. With an index or a
            name, equal layers stay equal and are traced once. Default: the whole
            result. But if `inputs`, `side`, `path` or `stacked` is given, and the
            result is a tuple, `output` is required.
        path: the place of the module's variables in those of the whole model, the same
            in every collection: `"transformer/h/0"`. Or a dict with the place of each
            part: `{"wte": "transformer/wte"}`. `split_variables` and `merge_variables`
            use it. Default: a place by the layer's number.
        stacked: the path of stacked variables, as `nn.scan` makes them. The n-th layer
            with this path has row n of each array there.

    Returns:
        A `fpipe.Layer`. Of the needs `key`, `state`, `train`, `side`, `carry` and
        `borrowed` it declares those that the module uses.

    Raises:
        TypeError: `module` is no Flax module, or this kind of module does not have an
            argument that was given. Later, in a call: the module takes `carry` and does
            not return it.
        ValueError: `train`, `inputs` or `side` names no argument of the call, or both
            `path` and `stacked` are given. Later, in `Pipe.init` or in a call: a random
            stream has no key, a collection is not in the layer's state, borrowed
            parameters do not fit, the result is a tuple without `output`, or a side
            input is missing.

    Example:
        >>> from flax import linen as nn
        >>> dense = fpipe.flax.layer(nn.Dense(2))
        >>> params = dense.init(jax.random.key(0), jnp.ones((4, 3)), borrowed={})
        >>> jax.tree.map(jnp.shape, params)
        {'bias': (2,), 'kernel': (3, 2)}
        >>> fpipe.flax.layer(nn.BatchNorm()).needs
        ('state', 'key', 'train')
        >>> attention = nn.MultiHeadAttention(num_heads=2)
        >>> layer = fpipe.flax.layer(
        ...     attention, inputs="inputs_q", side={"mask": "mask"}, path="h/0/attn"
        ... )
        >>> layer.needs
        ('key', 'train', 'side')
        >>> class Encode(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, *, carry):
        ...         y = nn.Dense(3)(x)
        ...         return y, fpipe.stash(carry, "skip", y)
        >>> encode = fpipe.skippable(stash=["skip"])(fpipe.flax.layer(Encode()))
        >>> encode.needs, encode.stash
        (('carry', 'key'), ('skip',))
    """
    _check_sample("fpipe.flax.layer", x, name)
    name = name or _name_of(module)
    call = f"`fpipe.flax.layer(module)` of layer {name!r}"
    options = ModuleOptions(
        name,
        x,
        side_sample,
        carry_sample,
        inputs,
        side,
        _checked_output(output, call),
        rngs,
        state,
        train,
        method,
        parse_borrow(borrow, "`fpipe.flax.layer(borrow=...)`"),
        state_rows=state_rows,
        places=parse_places(path, stacked, call),
    )
    return _module_layer(module, options)


def tied(
    module: Any,
    owner: str,
    *,
    method: str | Callable[..., Any] | None = None,
    name: str = "",
    train: str | bool | None = None,
    inputs: str | Iterable[str] | None = None,
    side: Mapping[str, str] | None = None,
    output: Output = None,
) -> Layer:
    """A layer that runs a module with the parameters of another layer.

    It owns no parameters itself.

    Arguments:
        module: as in `layer`.
        owner: the name of an earlier layer. Only one layer may have this name.
            `"tokens/table"` is a part of the parameters of the layer `"tokens"`.
        method: the method to call, such as `"attend"` of `nn.Embed`. Default
            `__call__`.
        name, train, inputs, side, output: as in `layer`.

    Returns:
        A `fpipe.Layer`. The gradient of the parameters is summed at their owner.

    Raises:
        ValueError: in `Pipe.init` or in a call, the owner's parameters are not those
            that the module needs.

    Example:
        >>> from flax import linen as nn
        >>> embed = nn.Embed(50, 8)
        >>> first = fpipe.flax.layer(embed, name="embed")
        >>> last = fpipe.flax.tied(embed, "embed", method="attend")
        >>> sequential = fpipe.sequential([first, last])
        >>> tokens = jnp.zeros((4, 3), jnp.int32)
        >>> sequential(sequential.init(jax.random.key(0), tokens), tokens).shape
        (4, 3, 50)
    """
    if not isinstance(owner, str) or not owner:
        raise TypeError(
            "`fpipe.flax.tied(module, owner)`: the owner is the name of a layer, got "
            f"{shown(owner)}"
        )
    _check_sample("fpipe.flax.tied", None, name)
    name = name or f"{_name_of(module)}_of_{owner}"
    options = ModuleOptions(
        name,
        inputs=inputs,
        side=side,
        output=_checked_output(output, f"`fpipe.flax.tied(module)` of layer {name!r}"),
        train=train,
        method=method,
        borrow=parse_borrow({"": owner}, ""),
    )
    return _module_layer(module, options)


def layers(
    model: Any, x: PyTree = None, *, train: str | bool | None = None
) -> list[Layer]:
    """The layers of a whole model.

    The layers have the names that Flax gives to their parameters: `layers_0`,
    `layers_1` and so on. In a Flax `Sequential`, a module that returns a tuple gives
    several inputs to the next one, and a dict gives inputs by name. If a module is in
    the model twice, its second layer is tied to the first.

    Arguments:
        model: an `nn.Sequential` or an `nnx.Sequential`. Or a list or tuple, nested or
            not, of modules, functions of `x`, and `fpipe.Layer`s. A `fpipe.Layer` is
            not changed.
        x: a sample input, arrays or shapes. Linen modules are traced on it, one after
            the other; see `layer`.
        train: as in `layer`, for all modules.

    Returns:
        A list of `fpipe.Layer`s, one for each entry.

    Raises:
        TypeError: `model` is none of these.
        ValueError: a module with state is in the model twice. Two NNX modules share a
            parameter, or two linen modules have the same module as a field. `x` is
            given, and a layer has skips or side inputs.

    Example:
        >>> from flax import linen as nn
        >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
        >>> [layer.name for layer in fpipe.flax.layers(model)]
        ['layers_0', 'relu', 'layers_2']
    """
    _check_sample("fpipe.flax.layers", x)
    chained = isinstance(model, (nn.Sequential, nnx.Sequential))
    if not chained and not isinstance(model, (list, tuple)):
        raise TypeError(
            "`fpipe.flax.layers(model)`: a Sequential or a list of modules and "
            f"functions belongs here, got {shown(model)}; "
            "for one module use `fpipe.flax.layer(module)`"
        )
    # A list may be nested, as a user builds it of blocks. A `Sequential` is not opened
    # further: what is inside one of its modules is that module's own.
    modules = list(model.layers) if chained else list(_flat(model))
    for module in modules:
        if isinstance(module, type) and issubclass(module, nn.Module):
            raise TypeError(
                f"`fpipe.flax.layers(model)`: got the class {module.__name__}; make a "
                f"module of it, `{module.__name__}(...)`"
            )
    _check_shared(modules)
    result: list[Layer] = []
    params: dict[str, PyTree] = {}
    owners: dict[int, Layer] = {}  # by the identity of their modules
    for position, module in enumerate(modules):
        options = ModuleOptions(
            sequential_name(position), x, train=train, chained=chained
        )
        owner = owners.get(id(module))
        if isinstance(module, Layer):
            made = module
        elif not _is_module(module):
            # Its name stays the function's: it has no variables that Flax would name.
            f = ChainedFunction(module) if chained else module
            made = fn(f, function_name(module))
        elif owner is not None:
            # Shared parameters are borrowed from the first place. Shared state cannot
            # be: a microbatch would meet it twice on different stages.
            if owner.asks("state"):
                raise ValueError(
                    f"`fpipe.flax.layers`: layer {owner.name!r} is there again as "
                    f"layer {position}, but it has state, which two layers cannot "
                    "share; make two modules"
                )
            borrow = (Borrow((), owner.name, ()),)
            made = _module_layer(module, dataclasses.replace(options, borrow=borrow))
        else:
            made = _module_layer(module, options)
            if not is_factory(module):  # which makes another module each time
                owners[id(module)] = made
        result.append(made)
        if x is not None:
            # The next layer's sample: linen modules show their collections and streams
            # only when they run on an input.
            params[made.name], x = _trace_layer(made, position, params, x)
    return result


def _flat(model: Iterable[Any]) -> Iterator[Any]:
    """The entries of nested lists and tuples."""
    for value in model:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


@dataclasses.dataclass(frozen=True)
class ChainedFunction:
    """A function in a Flax `Sequential`: a tuple is its arguments, a dict its arguments
    by name.
    """

    f: Callable[..., Any]

    def __call__(self, x: PyTree) -> PyTree:
        """What `nn.Sequential` and `nnx.Sequential` do with a function."""
        if isinstance(x, tuple):
            return self.f(*x)
        return self.f(**x) if isinstance(x, dict) else self.f(x)


def sequential_name(position: int) -> str:
    """Under which name an `nn.Sequential` keeps the variables of a module, whatever
    name that has.
    """
    return f"layers_{position}"


def _module_layer(module: Any, options: ModuleOptions) -> Layer:
    """The layer of a module of either kind."""
    if isinstance(module, nn.Module):
        with noting(f"in `fpipe.flax.layer` of layer {options.name!r}"):
            return linen_layer(module, options)
    if not _is_module(module):
        raise TypeError(
            "`fpipe.flax.layer(module)`: a linen or NNX module belongs here, got "
            f"{shown(module)}; a function without parameters is `fpipe.fn(f)`"
        )
    for_linen = (options.rngs, options.state)
    if any(given is not None for given in for_linen) or callable(options.method):
        raise TypeError(
            f"`fpipe.flax.layer(module)` of layer {options.name!r}: rngs=, state= and "
            "a function as method= are for linen modules; an NNX module shows its "
            "variables itself"
        )
    return nnx_layer(module, options)


def _checked_output(output: Any, call: str) -> Output:
    """`output`, or an error that says what it may be."""
    named = isinstance(output, (int, str)) and not isinstance(output, bool)
    if output is None or named or callable(output):
        return output
    raise TypeError(
        f"{call}: output= is an index, a name, or a function of what the module "
        f"returns, got {shown(output)}"
    )


def _is_module(value: Any) -> bool:
    """Whether a value is a linen or NNX module, or makes one."""
    return isinstance(value, (nn.Module, nnx.Module)) or is_factory(value)


def _check_sample(call: str, x: PyTree, name: Any = "") -> None:
    """Refuse a sample without an array, and a name that is none."""
    if not isinstance(name, str):
        raise TypeError(f"`{call}(name={shown(name)})`: a name must be a string")
    if x is None:
        return
    check_leaves(x, "x", f"`{call}(model, x)`: ")
    if not any(map(is_array, jax.tree.leaves(x))):
        raise TypeError(
            f"`{call}(model, x)`: x is a sample input, arrays or shapes, got "
            f"{describe(x)}"
        )


def _name_of(module: Any) -> str:
    """The name of a layer that was given none."""
    if isinstance(module, nn.Module) and module.name:
        return module.name
    if isinstance(module, (nn.Module, nnx.Module)):
        return type(module).__name__
    return function_name(module)


def _check_shared(modules: Sequence[Any]) -> None:
    """Refuse two layers that own one variable, or one linen module with variables."""
    # By identity: two modules that are equal own different variables.
    # Each layer would own a copy, and both would be trained apart from each other:
    # other numbers than Flax has, and no error.
    first_places: dict[int, int] = {}
    for position, module in enumerate(modules):
        for path, node in _owned_nodes(module):
            first = first_places.setdefault(id(node), position)
            if modules[first] is module:
                continue
            part = repr("/".join(map(str, path))) if path else "all"
            cure = ""
            if not isinstance(node, nnx.Variable):
                cure = ", or with `fpipe.flax.layer(module)` if it has no parameters"
            raise ValueError(
                f"`fpipe.flax.layers`: layers {first} and {position} share {part} of "
                f"layer {position}; make layer {position} with "
                "`fpipe.flax.layer(module, borrow=...)`, so that one of them owns "
                f"it{cure}"
            )


def _owned_nodes(module: Any) -> Iterator[tuple[Path, Any]]:
    """The variables of an NNX module, or the modules that are among the fields of a
    linen one and it itself, with paths.
    """
    if isinstance(module, nnx.Module):
        for path, node in nnx.iter_graph(module):
            # Random state is made from the call's key by its path, so sharing does no
            # harm.
            if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState):
                yield path, node
    elif isinstance(module, nn.Module):
        for path, node in modules_inside(module):
            # The one module without variables that is often shared on purpose.
            if not isinstance(node, nn.Dropout):
                yield path, node


def _trace_layer(
    layer: Layer, position: int, params: Mapping[str, PyTree], x: PyTree
) -> tuple[PyTree, PyTree]:
    """The shapes of a layer's parameters and of what comes out of it.

    Arguments:
        params: shapes of the parameters of earlier layers, by their names.
        x: shapes of what comes in.
    """
    init = layer.init
    init_state = layer.init_state
    # Skips and side inputs come from elsewhere: their shapes cannot be known here.
    missing = [f"asks for {need!r}" for need in ("carry", "side") if layer.asks(need)]
    missing += [
        f"borrows from {name!r}, which is no earlier layer"
        for name in layer.borrow
        if name not in params
    ]
    if init is None:
        missing.append("has no init")
    if init_state is None and layer.asks("state"):
        missing.append("has no init_state")
    if missing or init is None:
        raise ValueError(
            f"`fpipe.flax.layers(model, x)`: layer {position} {layer.name!r} "
            f"{' and '.join(missing)}, so the shapes of its output are not known; "
            "leave x out, and give it to `fpipe.flax.layer(module, x)` where needed"
        )

    def run(
        x: PyTree, borrowed: Mapping[str, PyTree], call_needs: Mapping[str, PyTree]
    ) -> tuple[PyTree, PyTree]:
        # What a call would give, by stand-ins: a key and a step, and `train=False`.
        needs: dict[str, Any] = {**call_needs, "borrowed": borrowed, "carry": {}}
        own = init(needs["key"], x, **{n: needs[n] for n in keyword_needs(init)})
        if init_state is not None:
            named = keyword_needs(init_state)
            needs["state"] = init_state(x, **{n: needs[n] for n in named})
        result = layer.apply(own, x, **{n: needs[n] for n in layer.needs or ()})
        return own, result[0] if layer.asks("state") else result

    borrowed = {name: params[name] for name in layer.borrow}
    with noting(f"in layer {position} {layer.name!r}"):
        return eval_shape(run, shapes_of(x), borrowed, stand_ins())
