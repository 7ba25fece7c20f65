"""The front: one module, a whole model, or a borrowed module as layers."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from fpipe._core.errors import noting
from fpipe._core.pytrees import PyTree, eval_shape, shapes_of
from fpipe._model.layer import Layer, fn, function_name, keyword_needs
from fpipe.flax._borrow import Borrow, borrows
from fpipe.flax._linen import inside, linen_layer
from fpipe.flax._nnx import is_factory, nnx_layer


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
) -> Layer:
    """A Flax module as a layer.

    Its parameters are what Flax calls so, with Flax's names: of a linen module the
    collection `params`, of an NNX module the `nnx.Param`s as nested dicts. All other
    variables, but for what is sown into `intermediates`, are the layer's state. A tuple
    that comes in is several inputs if the module's call has several required ones.

    Arguments:
        module: a linen module; an NNX module, whose own values are what `init` and
            `init_state` return, whatever the key; or the type of an NNX module or a
            `functools.partial` of it, called as `module(rngs=nnx.Rngs(key))`.
        x: a sample input of a linen module, arrays or `jax.ShapeDtypeStruct`s. The
            module is traced on it, in training, to see what it uses. An NNX module
            shows that itself.

    Other Arguments:
        name: for errors, drawings and `borrow`; default the module's name, or its
            type's.
        rngs: the random streams of a linen module, `()` for none; default those seen
            with `x`, else all that it asks for. Each gets the key `stream_key(key,
            name)`.
        state: the collections of a linen module that are state; default those seen with
            `x`, else `["batch_stats"]` if an `nn.BatchNorm` is among the fields, else
            none.
        train: the name of the argument that says whether the module trains (`"not
            frozen"` where it says the opposite); `True` or `False` for a layer that
            always or never trains. Default `train`, `training`, `deterministic` or
            `use_running_average`, where the call has them; of an NNX module also the
            attributes that `module.train()` and `module.eval()` set.
        method: the method to call; default `__call__`. A name; of a linen module also a
            function.
        borrow: parts of the parameters that other layers own: `{"embed": "tokens"}`
            puts the parameters of the layer `"tokens"` in the place of the module's own
            `embed`; `"tokens/table"` is a part of them. See `tied`.

    Returns:
        A `fpipe.Layer` that declares what it needs of `key`, `state`, `train` and
        `borrowed`.

    Raises:
        TypeError: no Flax module; an argument that this kind of module does not have.
        ValueError: `train` names no argument. Later, in `Pipe.init` or a call: a random
            stream without a key, a collection that is not the layer's state, borrowed
            parameters that do not fit.

    Example:
        >>> from flax import linen as nn
        >>> dense = fpipe.flax.layer(nn.Dense(2))
        >>> jax.tree.map(jnp.shape, dense.init(jax.random.key(0), jnp.ones((4, 3)), borrowed={}))
        {'bias': (2,), 'kernel': (3, 2)}
        >>> fpipe.flax.layer(nn.BatchNorm()).needs
        ('state', 'key', 'train')
    """
    return _layer(
        module,
        x,
        name,
        rngs,
        state,
        train,
        method,
        borrows(borrow, "`fpipe.flax.layer(borrow=...)`"),
        False,
    )


def tied(
    module: Any,
    owner: str,
    *,
    method: str | Callable[..., Any] | None = None,
    name: str = "",
    train: str | bool | None = None,
) -> Layer:
    """A layer that owns no parameters and runs a module with those of another layer.

    Arguments:
        module: as in `layer`.
        owner: the name of an earlier layer, which must be unique; `"tokens/table"` is a
            part of its parameters.
        method: the method to call, such as `"attend"` of `nn.Embed`; default
            `__call__`.
        name, train: as in `layer`.

    Returns:
        A `fpipe.Layer`; the gradient of the parameters is summed where they are owned.

    Raises:
        ValueError: in `Pipe.init` or a call: the owner's parameters are not those that
            the module needs.

    Example:
        >>> from flax import linen as nn
        >>> embed = nn.Embed(50, 8)
        >>> model = [fpipe.flax.layer(embed, name="embed"), fpipe.flax.tied(embed, "embed", method="attend")]
        >>> sequential = fpipe.sequential(model)
        >>> tokens = jnp.zeros((4, 3), jnp.int32)
        >>> sequential(sequential.init(jax.random.key(0), tokens), tokens).shape
        (4, 3, 50)
    """
    if not isinstance(owner, str) or not owner:
        raise TypeError(
            "`fpipe.flax.tied(module, owner)`: the owner is the name of a layer, got "
            f"{owner!r}"
        )
    name = name or f"{_name(module)}_of_{owner}"
    return _layer(
        module, None, name, None, None, train, method, borrows({"": owner}, ""), False
    )


def layers(
    model: Any, x: PyTree = None, *, train: str | bool | None = None
) -> list[Layer]:
    """The layers of a whole model.

    A module's layer is named as Flax names its parameters: `layers_0`, `layers_1` and
    so on. In a Flax `Sequential` a tuple that comes out of a module is several inputs
    of the next, and a dict is inputs by name. A module that is there twice is tied to
    its first place.

    Arguments:
        model: an `nn.Sequential`, an `nnx.Sequential`, or a list or tuple, nested or
            not, of modules, functions of `x`, and `fpipe.Layer`s (which are left as
            they are).
        x: a sample input, arrays or shapes, with which linen modules are seen through
            one after the other.
        train: as in `layer`, for all modules.

    Returns:
        A list of `fpipe.Layer`s, one for each entry.

    Raises:
        TypeError: none of these.
        ValueError: a module with state that is there twice; a parameter that two NNX
            modules share, or a module that is a field of two linen ones; with `x`, a
            layer with skips or side inputs.

    Example:
        >>> from flax import linen as nn
        >>> [layer.name for layer in fpipe.flax.layers(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]))]
        ['layers_0', 'relu', 'layers_2']
    """
    chained = isinstance(model, (nn.Sequential, nnx.Sequential))
    if not chained and not isinstance(model, (list, tuple)):
        raise TypeError(
            "`fpipe.flax.layers(model)`: a Sequential or a list of modules and "
            f"functions belongs here, got {model!r}; "
            "for one module use `fpipe.flax.layer(module)`"
        )
    modules = list(model.layers) if chained else list(_flat(model))
    for module in modules:
        if isinstance(module, type) and issubclass(module, nn.Module):
            raise TypeError(
                f"`fpipe.flax.layers(model)`: got the class {module.__name__}; a "
                f"module is made of it, `{module.__name__}(...)`"
            )
    _check_shared(modules)
    out: list[Layer] = []
    params: dict[str, PyTree] = {}
    first: dict[int, Layer] = {}
    for k, module in enumerate(modules):
        if isinstance(module, Layer):
            out.append(module)
        elif not _is_module(module):
            out.append(
                fn(Chained(module), function_name(module)) if chained else fn(module)
            )
        elif id(module) in first:
            out.append(_again(module, first[id(module)], k, x, train, chained))
        else:
            out.append(
                _layer(module, x, entry(k), None, None, train, None, (), chained)
            )
            if not is_factory(module):  # which makes another module each time
                first[id(module)] = out[-1]
        if x is not None:
            x = _through(out[-1], k, params, x)
    return out


def _flat(model: Iterable[Any]) -> Iterator[Any]:
    for value in model:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


@dataclasses.dataclass(frozen=True)
class Chained:
    """A function in a Flax `Sequential`: a tuple is its arguments, a dict its arguments
    by name.
    """

    f: Callable[..., Any]

    def __call__(self, x: PyTree) -> PyTree:
        """Call it."""
        if isinstance(x, tuple):
            return self.f(*x)
        return self.f(**x) if isinstance(x, dict) else self.f(x)


def entry(k: int) -> str:
    """Under which name an `nn.Sequential` keeps the variables of its `k`-th module,
    whatever name that has.
    """
    return f"layers_{k}"


def _again(
    module: Any,
    owner: Layer,
    k: int,
    x: PyTree,
    train: str | bool | None,
    chained: bool,
) -> Layer:
    if owner.asks("state"):
        raise ValueError(
            f"`fpipe.flax.layers`: layer {owner.name!r} is there again as layer {k}, "
            "but it has state, which has one place "
            "only; make it two modules"
        )
    return _layer(
        module,
        x,
        entry(k),
        None,
        None,
        train,
        None,
        (Borrow((), owner.name, ()),),
        chained,
    )


def _layer(
    module: Any,
    x: PyTree,
    name: str,
    rngs: Iterable[str] | None,
    state: Iterable[str] | None,
    train: str | bool | None,
    method: Any,
    borrow: Sequence[Borrow],
    chained: bool,
) -> Layer:
    name = name or _name(module)
    if isinstance(module, nn.Module):
        with noting(f"in `fpipe.flax.layer` of layer {name!r}"):
            return linen_layer(
                module,
                x,
                name=name,
                rngs=rngs,
                state=state,
                train=train,
                method=method,
                borrow=tuple(borrow),
                chained=chained,
            )
    if not _is_module(module):
        raise TypeError(
            "`fpipe.flax.layer(module)`: a linen or NNX module belongs here, got "
            f"{module!r}; a function without "
            "parameters is `fpipe.fn(f)`"
        )
    if rngs is not None or state is not None or callable(method):
        raise TypeError(
            f"`fpipe.flax.layer(module)` of layer {name!r}: rngs=, state= and a "
            "function as method= are for linen "
            "modules; an NNX module shows its variables itself"
        )
    return nnx_layer(
        module,
        name=name,
        train=train,
        method=method,
        borrow=tuple(borrow),
        chained=chained,
    )


def _is_module(value: Any) -> bool:
    return isinstance(value, (nn.Module, nnx.Module)) or is_factory(value)


def _name(module: Any) -> str:
    own = getattr(module, "name", None) if isinstance(module, nn.Module) else None
    made = isinstance(module, (nn.Module, nnx.Module))
    return own or (type(module).__name__ if made else function_name(module))


def _check_shared(modules: Sequence[Any]) -> None:
    """Two layers cannot both own a variable, or a linen module that may have variables."""
    at: dict[int, tuple[int, Any]] = {}
    for k, module in enumerate(modules):
        for path, node in _owned(module):
            first, owner = at.setdefault(id(node), (k, module))
            if owner is not module:
                what = repr("/".join(map(str, path))) if path else "all"
                other = (
                    ""
                    if isinstance(node, nnx.Variable)
                    else ", or with `fpipe.flax.layer(module)` if it has no parameters"
                )
                raise ValueError(
                    f"`fpipe.flax.layers`: layers {first} and {k} share {what} of "
                    f"layer {k}; make layer {k} with "
                    "`fpipe.flax.layer(module, borrow=...)`, so that one of them owns "
                    f"it{other}"
                )


def _owned(module: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The variables of an NNX module, or the modules that are among the fields of a
    linen one and it itself, with paths.
    """
    if isinstance(module, nnx.Module):
        for path, node in nnx.iter_graph(module):
            if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState):
                yield path, node
    elif isinstance(module, nn.Module):
        yield from (
            (path, node)
            for path, node in inside(module)
            if not isinstance(node, nn.Dropout)
        )


def _through(layer: Layer, k: int, params: dict[str, PyTree], x: PyTree) -> PyTree:
    """The shapes of what comes out of a layer."""
    init, init_state = layer.init, layer.init_state
    why = [f"asks for {need!r}" for need in ("carry", "side") if layer.asks(need)]
    why += [
        f"borrows from {name!r}, which is no earlier layer"
        for name in layer.borrow
        if name not in params
    ]
    why += ["has no init"] if init is None else []
    why += ["has no init_state"] if init_state is None and layer.asks("state") else []
    if why or init is None:
        raise ValueError(
            f"`fpipe.flax.layers(model, x)`: layer {k} {layer.name!r} "
            f"{' and '.join(why)}, so nobody knows what comes out of "
            "it; leave x out, and give it to `fpipe.flax.layer(module, x)` where it is "
            "needed"
        )
    known = {name: params[name] for name in layer.borrow}

    def run(
        key: Any, x: PyTree, borrowed: Mapping[str, PyTree]
    ) -> tuple[PyTree, PyTree]:
        given: dict[str, Any] = {
            "carry": {},
            "side": None,
            "borrowed": borrowed,
            "train": False,
            "key": key,
        }
        own = init(key, x, **{n: given[n] for n in keyword_needs(init)})
        if init_state is not None:
            given["state"] = init_state(
                x, **{n: given[n] for n in keyword_needs(init_state)}
            )
        out = layer.apply(own, x, **{n: given[n] for n in layer.needs or ()})
        return own, out[0] if layer.asks("state") else out

    with noting(f"in layer {k} {layer.name!r}"):
        params[layer.name], y = eval_shape(run, jax.random.key(0), shapes_of(x), known)
    return y
