"""One layer on one microbatch, and the checks of what it returns.

In: a layer and its `LayerCall`. Out: its `LayerResult`. For a layer that pops "b",
stashes "a" and has state:

    LayerCall(params, x, carry={"b": value}, needs={"state": old})
    the function returns            y, {"a": value}, new
    LayerResult(y, stashed={"a": value}, state=new)

A mistake in a user's function is an error at the first trace, and the error names the
layer.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fpipe._core.pytrees import PyTree, describe
from fpipe._core.statics import check_leaves
from fpipe._model.layer import Layer
from fpipe._model.signatures import without_missing
from fpipe._model.skips import Scope, scoped


class LayerCall(NamedTuple):
    """What a layer is called with, on one microbatch.

    Attributes:
        carry: the skips that it pops or peeks, by its own names.
        needs: the values of the other needs that it asks for, by name.
    """

    params: PyTree
    x: PyTree
    carry: Mapping[str, PyTree]
    needs: Mapping[str, PyTree]


class LayerResult(NamedTuple):
    """What a layer returned.

    Attributes:
        stashed: the skips that it stashed, by its own names.
        state: its new state; `None` for a layer without.
    """

    y: PyTree
    stashed: dict[str, PyTree]
    state: PyTree


def call_layer(layer: Layer, index: int, call: LayerCall) -> LayerResult:
    """Run one layer on one microbatch and check everything that it returns.

    Arguments:
        index: the layer's place among all layers, for errors.
    """
    who = f"layer {index} {layer.name!r}"
    # 1. What the call gave nothing for.
    needs = without_missing(call.needs, layer.apply, who, layer.name, "params, x")
    if layer.asks("carry"):
        # 2. A dict of the layer's own: what the function does to it stays with it.
        needs["carry"] = dict(call.carry)
    scope = Scope(who, tuple(layer.stash), tuple(layer.pop), tuple(layer.peek))
    with scoped(scope):
        result = layer.apply(call.params, call.x, **needs)
    # 3. What came back. Without carry and state anything goes, also a tuple: it is `y`.
    returns = [name for name in ("carry", "state") if layer.asks(name)]
    if not returns:
        check_leaves(result, "y", f"{who}: ")
        return LayerResult(result, {}, None)
    form = f"({', '.join(['y', *returns])})"
    # `type` and not `isinstance`: a named tuple is more likely to be a `y` whose carry
    # was forgotten.
    if type(result) is not tuple or len(result) != 1 + len(returns):
        if type(result) is tuple:
            got = f"a tuple of {len(result)}"
        else:
            got = f"{describe(result)}, no tuple"
        raise TypeError(
            f"{who} declares {' and '.join(returns)} and must return `{form}`, but "
            f"returned {got}"
        )
    returned = dict(zip(returns, result[1:], strict=True))
    stashed: dict[str, PyTree] = {}
    if "carry" in returned:
        stashed = _checked_carry(layer, who, form, call.carry, returned["carry"])
    check_leaves(result[0], "y", f"{who}: ")
    check_leaves(stashed, "carry", f"{who}: ")
    check_leaves(returned.get("state"), "state", f"{who}: ")
    return LayerResult(result[0], stashed, returned.get("state"))


def _checked_carry(
    layer: Layer, who: str, form: str, given: Mapping[str, PyTree], carry: Any
) -> dict[str, PyTree]:
    """The skips that a layer stashed, from the carry that it returned.

    The rules are the same as those of `stash` and `pop`, and are checked here again:
    the carry is a plain dict, and a layer may change it without these functions.

    Arguments:
        form: how the layer returns it, for errors.
        given: the carry that the layer was called with.
    """
    if not isinstance(carry, dict):
        raise TypeError(
            f"{who} must return `{form}`, but its carry is {describe(carry)}, no dict"
        )
    for name in layer.pop:
        if name in carry:
            raise ValueError(
                f"{who} declares pop={list(layer.pop)} but never popped {name!r}: it "
                "is still in the carry "
                f"that it returned. Write `{name}, carry = fpipe.pop(carry, "
                f"{name!r})`, or declare it as peek"
            )
    for name in layer.stash:
        if name not in carry:
            raise ValueError(
                f"{who} declares stash={list(layer.stash)} but did not stash {name!r}: "
                f"`return y, fpipe.stash(carry, {name!r}, value)`"
            )
    for name in layer.peek:
        # By identity, as values are traced. Another value would be lost: a skip goes
        # from the layer that stashed it straight to each reader, not through this one.
        if name in carry and carry[name] is not given[name]:
            raise ValueError(
                f"{who} declares peek={list(layer.peek)} but returned another value of "
                f"{name!r}"
            )
    extra = sorted(map(str, set(carry) - set(layer.stash) - set(layer.peek)))
    if extra:
        raise ValueError(
            f"{who} returned the undeclared skips {extra}; it declares "
            f"stash={list(layer.stash)}: add them to "
            "`@fpipe.skippable(stash=...)`"
        )
    return {name: carry[name] for name in layer.stash}
