"""Parameters and states of all layers, made from shapes.

In: a `Model`, and the shapes of one microbatch. Out: the parameters, or the states, of
every layer, each made where it belongs (`put`):

    layer   gets, as shapes              its `init` makes
    0       x          f32[2,4]          f32[4,8]
    1       the first one's output,      f32[8,3]
            f32[2,8]

A layer's `init` takes the shapes of its input, which only the layers before it tell. So
layers are traced one after the other, and nothing is computed.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax

from fpipe._core.errors import noting
from fpipe._core.pytrees import (
    PyTree,
    eval_shape,
    map_arrays,
    numbers_as_arrays,
    shapes_of,
    strong,
    zeros_like,
)
from fpipe._core.statics import check_leaves
from fpipe._model.microbatch import BatchShapes
from fpipe._model.model import Model
from fpipe._model.needs import stand_ins
from fpipe._model.signatures import keyword_needs, without_missing
from fpipe._model.skip_routes import Skip, skip_of
from fpipe._model.state import may_have_rows, refuse_followed_rows
from fpipe._model.wrappers import Microbatches

# Parameters or state of a layer, from the shapes of its input and of its needs.
Make: TypeAlias = Callable[[int, PyTree, Mapping[str, Any]], PyTree]

# Runs a function of a key where a layer lives: `put(layer, make, key)`.
Put: TypeAlias = Callable[[int, Callable[[Any], PyTree], Any], PyTree]


def init_params(
    model: Model, key: Any, x: PyTree, needs: Mapping[str, PyTree], put: Put
) -> tuple[PyTree, ...]:
    """Parameters of every layer from the shapes of one microbatch; layer `l` gets
    `fold_in(key, l)`.

    Arguments:
        key: a PRNG key.
        x, needs: one microbatch, arrays or shapes; of `needs` what the call gives.
        put: `put(layer, make, key)` runs `make(key)` where the layer belongs.
    """

    def make_params(k: int, x: PyTree, needs: Mapping[str, Any]) -> PyTree:
        def make(key: Any) -> PyTree:
            # The rule is public: parameters of one layer can be made again without
            # the others, and no partition changes them.
            own_key = jax.random.fold_in(key, k)
            return _make_params(model, k, own_key, zeros_like(x), zeros_like(needs))

        return put(k, make, key)

    return _walk(model, x, needs, make_params, functools.partial(_state_shapes, model))[
        0
    ]


def init_state(
    model: Model,
    x: PyTree,
    needs: Mapping[str, PyTree],
    params: Sequence[PyTree] | None,
    key: Any,
    put: Put,
    batch: BatchShapes | None = None,
    ready: Sequence[BatchShapes] = (),
) -> tuple[PyTree, ...]:
    """State of every layer (`None` for a layer without), from the shapes of one
    microbatch; state of rows from those of the whole batch, or a piece for each
    ready-made microbatch.

    Arguments:
        key: layer `l` gets `fold_in(key, l)`, as in `init`; `None` is
            `jax.random.key(0)`.
        batch: all microbatches together, if there are several.
        ready: each of them, if they are ready-made.

    Raises:
        ValueError: a layer with state without `init_state`; state that follows the
            rows where nobody has said what is meant.
    """
    # Most states begin with zeros and ones and need no key.
    key = jax.random.key(0) if key is None else key

    def params_of(k: int, x: PyTree, needs: Mapping[str, Any]) -> PyTree:
        if params is not None:
            return params[k]
        # Shapes are enough here, and parameters of a large model would not fit on
        # one device.
        return eval_shape(
            lambda x, needs: _make_params(model, k, jax.random.key(0), x, needs),
            x,
            needs,
        )

    def make_state(
        k: int, x: PyTree, needs: Mapping[str, Any], piece: int | None = None
    ) -> PyTree:
        def make(key: Any) -> PyTree:
            own_key = jax.random.fold_in(key, k)
            if piece is not None:
                own_key = jax.random.fold_in(own_key, piece)
            return _make_state(model, k, own_key, zeros_like(x), zeros_like(needs))

        return put(k, make, key)

    def make_if(of_rows: bool, piece: int | None = None) -> Make:
        """States of rows, or all others; of the rest shapes are enough."""
        return lambda k, x, needs: (
            make_state(k, x, needs, piece)
            if of_rows == bool(model.layers[k].state_rows)
            else _state_shapes(model, k, x, needs)
        )

    of_rows = [k for k in model.stateful if model.layers[k].state_rows]
    if ready and of_rows:
        others = make_if(of_rows=False)
        states = list(_walk(model, x, needs, params_of, others)[1])
        pieces = [
            _walk(model, one.x, one.needs, params_of, make_if(of_rows=True, piece=i))[1]
            for i, one in enumerate(ready)
        ]
        for k in of_rows:
            states[k] = Microbatches([piece[k] for piece in pieces])
        return tuple(states)
    if batch is None:
        return _walk(model, x, needs, params_of, make_state)[1]
    states = list(_walk(model, x, needs, params_of, make_if(of_rows=False))[1])
    # State of rows is made for all rows at once, as without microbatches: what is
    # drawn for each row does not depend on `chunks`.
    if of_rows:
        whole = make_if(of_rows=True)
        made = _walk(model, batch.x, batch.needs, params_of, whole)[1]
        for k in of_rows:
            states[k] = made[k]
    suspects = _may_follow_rows(model, states, batch.rows[:1])
    if suspects:
        _refuse_undeclared_rows(model, suspects, states, batch, params_of)
    return tuple(states)


def check_undeclared_rows(
    model: Model,
    state: Sequence[PyTree],
    first: BatchShapes,
    batch: BatchShapes,
    params: Sequence[PyTree],
) -> None:
    """Refuse a call's state that follows the rows where nobody has said what is
    meant.

    Arguments:
        state: one entry per layer.
        first, batch: one of several microbatches, and all of them together.
        params: shapes will do.
    """
    suspects = _may_follow_rows(model, state, (batch.rows[0], sum(batch.rows)))
    if not suspects:
        return

    def params_of(k: int, x: PyTree, needs: Mapping[str, Any]) -> PyTree:
        del x, needs
        return params[k]

    few = _shapes_of_states(model, first, params_of)
    if few is not None:
        _refuse_undeclared_rows(model, suspects, few, batch, params_of)


def _may_follow_rows(
    model: Model, state: Sequence[PyTree], rows: Sequence[int]
) -> list[int]:
    """The layers whose state may follow the rows, and that do not say how it is
    meant: a first look at shapes, which costs nothing.
    """
    return [
        k
        for k in model.stateful
        if model.layers[k].state_rows is None
        and model.layers[k].init_state is not None
        and may_have_rows(state[k], rows)
    ]


def _refuse_undeclared_rows(
    model: Model,
    suspects: Sequence[int],
    few: Sequence[PyTree],
    batch: BatchShapes,
    params_of: Make,
) -> None:
    """Refuse states that follow the rows.

    Arguments:
        suspects: the layers to look at.
        few: the states for one microbatch.
    """
    # Only another number of rows shows whether 64 entries are rows or channels.
    many = _shapes_of_states(model, batch, params_of)
    if many is not None:
        for k in suspects:
            refuse_followed_rows(k, model.layers[k], few[k], many[k], batch.rows)


def _shapes_of_states(
    model: Model, inputs: BatchShapes, params_of: Make
) -> tuple[PyTree, ...] | None:
    """The shapes of all states for some rows; `None` if they cannot be told."""
    # This is only to see how a state is meant. A layer that cannot take so many
    # rows (it has a shape written down), or one without `init_state` beside it, is
    # no mistake.
    try:
        states_of = functools.partial(_state_shapes, model)
        return _walk(model, inputs.x, inputs.needs, params_of, states_of)[1]
    except Exception:
        return None


def _state_shapes(model: Model, k: int, x: PyTree, needs: Mapping[str, Any]) -> PyTree:
    return eval_shape(
        lambda x, needs: _make_state(model, k, jax.random.key(0), x, needs), x, needs
    )


def _make_params(
    model: Model, k: int, key: Any, x: PyTree, needs: Mapping[str, Any]
) -> PyTree:
    init = model.layers[k].init
    if init is None:
        raise ValueError(
            f"layer {k} {model.layers[k].name!r} has no init; give it one with "
            "`fpipe.Layer(apply, init)`, write "
            "`fpipe.fn(f)` for a function without parameters, or make the "
            "parameters yourself and call `place(params)` "
            "(and `init_state(x, params=params)`)"
        )
    return _made(model, "init", k, init, (key, x), needs)


def _make_state(
    model: Model, k: int, key: Any, x: PyTree, needs: Mapping[str, Any]
) -> PyTree:
    init = model.layers[k].init_state
    if init is None:
        raise ValueError(
            f"`init_state`: layer {k} {model.layers[k].name!r} has state but no "
            "init_state; give it one with "
            "`fpipe.Layer(apply, init_state=...)`"
        )
    needs = {**needs, "key": key}
    return map_arrays(strong, _made(model, "init_state", k, init, (x,), needs))


def _made(
    model: Model,
    role: str,
    k: int,
    f: Callable[..., PyTree],
    args: tuple[Any, ...],
    needs: Mapping[str, Any],
) -> PyTree:
    """What an `init` or `init_state` makes of some arguments and the needs that it
    names.
    """
    with noting(f"in the {role} of layer {k} {model.layers[k].name!r}"):
        made = f(*args, **_named_needs(model, role, k, f, needs))
        check_leaves(made, "params" if role == "init" else "state")
        return numbers_as_arrays(made)


def _named_needs(
    model: Model, role: str, k: int, f: Callable[..., Any], needs: Mapping[str, Any]
) -> dict[str, Any]:
    """The needs that an `init` or `init_state` names."""
    # `init(key, x)` is enough for most layers, so only named needs are given.
    named = keyword_needs(f)
    who = f"the {role} of layer {k} {model.layers[k].name!r}"
    for name in named:
        if name not in needs:
            raise TypeError(
                f"{who} names the need {name!r}; it can name {', '.join(needs)}"
            )
    head = "key, x" if role == "init" else "x"
    return without_missing({n: needs[n] for n in named}, f, who, role, head)


def _walk(
    model: Model,
    x: PyTree,
    needs: Mapping[str, PyTree],
    params_of: Make,
    state_of: Make,
) -> tuple[tuple[PyTree, ...], tuple[PyTree, ...]]:
    """Parameters and states layer by layer, the shapes of each one's inputs
    computed on the way.
    """
    # Parameters and states are those of the model that computes in their own dtype:
    # half precision is how a call computes, not what is kept.
    plain = model
    if model.compute_dtype is not None:
        plain = Model(model.layers, one_key=model.one_key)
    x = shapes_of(x)
    # With a key: some layers always draw, and shapes are the same with and without.
    call_needs = shapes_of(stand_ins(**needs))
    model.check_given(call_needs, making=True)
    params: dict[int, PyTree] = {}
    states: dict[int, PyTree] = {}
    skips: dict[Skip, PyTree] = {}
    # A layer's `init` takes the shapes of its input, which only the layers before
    # it tell. So layers are traced one after the other, and nothing is computed.
    for k, layer in enumerate(model.layers):
        owners = [owner for _, owner in model.borrows[k]]
        # The owner's parameters are an argument of the borrower's `init`, so they
        # must be there already. (A call may borrow from anywhere.)
        late = [model.layers[owner].name for owner in owners if owner > k]
        if late:
            raise ValueError(
                f"`init`: layer {k} {layer.name!r} borrows from {late}, which come "
                "later; let the first user own the "
                "parameters and the later one borrow them, or make them yourself "
                "and call `place`"
            )
        layer_needs = {
            "carry": {
                name: skips[skip_of(layer, name)] for name in (*layer.pop, *layer.peek)
            },
            "borrowed": {n: shapes_of(params[owner]) for n, owner in model.borrows[k]},
            **{n: value for n, value in call_needs.items() if n != "key"},
        }
        params[k] = params_of(k, x, layer_needs)
        states[k] = state_of(k, x, layer_needs) if layer.asks("state") else None

        def apply(
            params: Any, x: Any, skips: Any, state: Any, needs: Any, k: int = k
        ) -> Any:
            span = range(k, k + 1)
            return plain.apply(
                span, params, x, skips=skips, state=state, needs=needs, traced=True
            )[:2]

        # Only what this layer reads: the trace of the layer is kept by its
        # arguments.
        used = {owner: params[owner] for owner in (k, *owners)}
        x, skips = eval_shape(apply, used, x, skips, {k: states[k]}, call_needs)
    return tuple(params.values()), tuple(states.values())
