"""The needs: everything that enters a layer or the loss, in one table.

A layer is called as `f(params, x, **needs)`, the loss as `loss_fn(y, *targets)`.
`TABLE` says of each of these who gives it, which share a microbatch gets, and whether a
gradient goes back through it. No other place says it. A new need is a row here, and its
name in the signatures of the calls:

    name      given by     a microbatch gets   gradient   a layer gets without it
    --------  -----------  ------------------  ---------  -----------------------
    params    each layer   all of it           yes        (always there)
    x         the call     its rows            yes        (always there)
    targets   the call     its rows            yes        (only the loss reads them)
    carry     layers       its own             yes        an empty dict
    state     each layer   what the one        no         (an error)
                           before it left,
                           its rows, or one
                           given for it
    borrowed  each layer   all of it           yes        an empty dict
    side      the call     its rows            yes        its own default, or an error
    key       the call     a key of its own    no         its own default, or None
    train     the call     all of it           no         False
    step      the call     all of it           no         its own default, or an error

What a call is given is kept as a dict from these names to pytrees, for example
`{"side": None, "key": key, "train": True, "step": None}`.
"""

import dataclasses
import enum
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fpipe._core.checks import is_bool
from fpipe._core.errors import shown
from fpipe._core.pytrees import PyTree, describe, is_array, is_traced


class Giver(enum.Enum):
    """Who gives a need its value."""

    CALL = enum.auto()  # one value for all layers, an argument of the call
    LAYER = enum.auto()  # each layer has one, or lends it
    SKIP = enum.auto()  # earlier layers, while the microbatch passes


class Share(enum.Enum):
    """Which part of a value one microbatch gets."""

    ROWS = enum.auto()  # its rows, cut on axis 0
    WHOLE = enum.auto()  # all of it, the same for every microbatch
    OWN = enum.auto()  # one of its own, made on the way
    READY = enum.auto()  # one of its own, which the call gives it


@dataclasses.dataclass(frozen=True)
class Need:
    """A row of the table.

    Attributes:
        giver: who gives it.
        share: the share that a microbatch gets.
        differentiable: whether a gradient goes back through it.
        cast: whether its real floats are cast to the dtype that the model computes
            in (`Pipe(compute_dtype=...)`).
        keyword: whether a layer asks for it by naming it as a keyword-only parameter.
        missing: what a layer gets when the call gives nothing (`None`).
        required: whether a layer that asks for it, without a default of its own, cannot
            do without it.
        only_if_asked: whether a call that gives it is an error where no layer asks for
            it.
        check: the argument of the call as it is kept, or an error.
        stand_in: its shape while shapes are found, before there is a call.
        modes: the values without arrays that a call may give, where they decide which
            function a layer computes: a function that is split is traced for each.
        usual: the default of a layer's own that messages suggest, as it is written.
    """

    name: str
    giver: Giver
    share: Share
    differentiable: bool
    cast: bool = False
    keyword: bool = True
    missing: Any = None
    required: bool = False
    only_if_asked: bool = False
    check: Callable[[Any], Any] | None = None
    stand_in: Callable[[], Any] | None = None
    modes: tuple[Any, ...] = ()
    usual: str = "None"


def check_key(key: Any) -> Any:
    """A key is a key: not a seed, and not the batch."""
    dtype = getattr(key, "dtype", None)
    if dtype is None:
        raise TypeError(
            f"`key={shown(key)}`: a PRNG key is needed; write "
            f"`jax.random.key({shown(key)})`"
        )
    # New-style keys have a dtype of their own, old-style ones are arrays of uint32.
    typed = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed or jnp.issubdtype(dtype, jnp.unsignedinteger)):
        raise TypeError(
            f"`key={describe(key)}`: a PRNG key is needed, such as `jax.random.key(0)`"
        )
    return key


def check_train(train: Any) -> bool:
    """Whether the call trains: a bool that is known when the call is made."""
    if is_array(train) and not is_traced(train) and train.shape == ():
        train = train.item() if jnp.issubdtype(train.dtype, jnp.bool_) else train
    if not is_bool(train):
        raise TypeError(
            f"`train={shown(train)}`: True or False; it is static, a part of what is "
            "compiled"
        )
    return bool(train)


def check_step(step: Any) -> Any:
    """The number of a training step as an int32 scalar; shapes will do."""
    # One type for all kinds of numbers: a Python int, a numpy int64 and an int32 on the
    # device would otherwise each compile the programs anew.
    if isinstance(step, jax.ShapeDtypeStruct):
        scalar, integer = step.shape == (), jnp.issubdtype(step.dtype, jnp.integer)
    elif is_array(step):
        scalar, integer = np.ndim(step) == 0, jnp.issubdtype(step.dtype, jnp.integer)
    else:
        scalar, integer = True, _is_int(step)
    if not (scalar and integer):
        text = describe(step) if is_array(step) else shown(step)
        raise TypeError(
            f"`step={text}`: the number of a training step is an int, or a 0-d array "
            "of integers"
        )
    if isinstance(step, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((), jnp.int32)
    return step.astype(jnp.int32) if is_array(step) else np.int32(step)


def _is_int(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    # `True` is an index to Python; as a step it is more likely to be `train`.
    return not isinstance(value, bool)


# The dtype casts (`cast`) leave state, key and step alone: statistics that are
# rounded to half precision from call to call would drift, and the others are no floats.
# Targets are the loss's, which computes in its own dtype.
TABLE = (
    Need("params", Giver.LAYER, Share.WHOLE, True, cast=True, keyword=False),
    Need("x", Giver.CALL, Share.ROWS, True, cast=True, keyword=False),
    Need("carry", Giver.SKIP, Share.OWN, True, cast=True),
    # (What a layer declares of its state may change its share: see `state.py`.)
    Need("state", Giver.LAYER, Share.OWN, differentiable=False),
    Need(
        "key",
        Giver.CALL,
        Share.WHOLE,
        differentiable=False,
        check=check_key,
        stand_in=lambda: jax.eval_shape(lambda: jax.random.key(0)),
        modes=(None,),  # Without a key a layer is deterministic.
    ),
    Need(
        "train",
        Giver.CALL,
        Share.WHOLE,
        differentiable=False,
        missing=False,
        check=check_train,
        stand_in=lambda: False,
        modes=(True, False),
    ),
    Need("borrowed", Giver.LAYER, Share.WHOLE, True, cast=True),
    # A mask that no layer looks at is a mistake. A key, a `train` or a step that no
    # layer asks for is none: a training loop gives them to every model.
    Need(
        "side",
        Giver.CALL,
        Share.ROWS,
        differentiable=True,
        cast=True,
        required=True,
        only_if_asked=True,
    ),
    Need(
        "step",
        Giver.CALL,
        Share.WHOLE,
        differentiable=False,
        required=True,
        check=check_step,
        stand_in=lambda: jax.ShapeDtypeStruct((), jnp.int32),
        usual="0",
    ),
    Need("targets", Giver.CALL, Share.ROWS, True, keyword=False),
)
BY_NAME: Mapping[str, Need] = {need.name: need for need in TABLE}

# The names that a layer may ask for, in the order in which messages list them.
NEEDS = tuple(need.name for need in TABLE if need.keyword)

# The needs that a call gives beside `x` and targets, one value for all layers.
OF_CALL = tuple(n for n in TABLE if n.keyword and n.giver is Giver.CALL)

# The names of those that a gradient goes back through.
DIFFERENTIABLE = tuple(need.name for need in OF_CALL if need.differentiable)

# The needs that one function of parameters and `x` may have: what the call gives, and
# its state. The others are between layers.
OF_FUNCTION = (*(need.name for need in OF_CALL), "state")

# Everything that a call gives, `x` first: `x` decides what a microbatch's rows are.
INPUTS = ("x", *(need.name for need in OF_CALL), "targets")

# Those of them that are cut into microbatches.
ROW_INPUTS = tuple(name for name in INPUTS if BY_NAME[name].share is Share.ROWS)


def call_needs(**arguments: PyTree) -> dict[str, PyTree]:
    """What a call was given of `OF_CALL`, checked; what it was not given is `None`.

    Arguments:
        arguments: the call's keyword arguments, by the needs' names.

    Raises:
        TypeError: a key that is no key, a step that is no integer.

    Example:
        >>> call_needs(side=None, key=None, train=1)
        {'key': None, 'train': True, 'side': None, 'step': None}
    """
    # An `assert`: the names come from signatures in this package, not from a user.
    assert arguments.keys() <= BY_NAME.keys(), arguments.keys()
    given: dict[str, PyTree] = {}
    for need in OF_CALL:
        value = arguments.get(need.name)
        if value is None:
            # `train` becomes `False`; of `step` `None` stays, and a layer's own default
            # holds.
            value = need.missing
        elif need.check is not None:
            value = need.check(value)
        given[need.name] = value
    return given


def stand_ins(**arguments: PyTree) -> dict[str, PyTree]:
    """The needs of a call that only finds shapes: what is not given stands in.

    Some layers draw numbers whether they are given a key or not, and shapes are the
    same with and without. So a key stands in, and a step.
    """
    return {
        need.name: need.stand_in()
        if arguments.get(need.name) is None and need.stand_in is not None
        else arguments.get(need.name)
        for need in OF_CALL
    }
