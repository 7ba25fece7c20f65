"""State: which part of a layer's state a microbatch gets.

In: a layer and its state. Out: a `Share` for each array of it. The state of a layer
with four rows, cut into two microbatches:

    declared           share    microbatch 0   microbatch 1           after the call
    -----------------  -------  -------------  ---------------------  --------------
    nothing            OWN      all of it      what 0 left            what 1 left
    state_rows=True    ROWS     rows 0-1       rows 2-3               both, joined
      given in pieces  READY    piece 0        piece 1                both, as pieces
    overwrite=[name]   WHOLE    all of it      all of it              the maximum of its
                                                                      "gradients"

State of rows may come as `fpipe.Microbatches`, with the state of each microbatch: then
nothing is cut, nothing joined, and a microbatch's state need not wait for another's.

Whether a state follows the rows although nobody has declared it shows in its shapes for
two numbers of rows (`refuse_followed_rows`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fpipe._core.pytrees import PyTree, Shape, describe, is_array, is_inexact, pack
from fpipe._model.layer import Layer
from fpipe._model.needs import Share
from fpipe._model.wrappers import Microbatches
from fpipe.schedules._checks import counted


def state_shares(layer: Layer, state: PyTree) -> tuple[Share, ...]:
    """What a microbatch gets of each array of a layer's state, or of each array of a
    piece, if it comes in pieces.
    """
    if isinstance(state, Microbatches):
        return (Share.READY,) * len(pack(state[0])[0])
    other = Share.ROWS if layer.state_rows else Share.OWN
    if not layer.overwrite:
        return (other,) * len(pack(state)[0])
    return tuple(
        Share.WHOLE if _is_overwritten(layer, path) else other
        for path, a in jax.tree_util.tree_leaves_with_path(state)
        if is_array(a)
    )


def _is_overwritten(layer: Layer, path: Sequence[Any]) -> bool:
    """Whether a backward makes the array at that path of a layer's state."""
    if layer.overwrite is True:
        return True
    return bool(path) and _entry(path) in _names(layer)


def _entry(path: Sequence[Any]) -> Any:
    """The first part of a path in a state: a key of a dict, or a field."""
    return getattr(path[0], "key", getattr(path[0], "name", None))


def _names(layer: Layer) -> tuple[str, ...]:
    """The entries of a layer's state that a backward makes, if it names them."""
    return tuple(layer.overwrite) if isinstance(layer.overwrite, Sequence) else ()


def map_state(
    layer: Layer,
    f: Callable[[Share, Any], Any],
    state: PyTree,
) -> PyTree:
    """Map the arrays of a layer's state, each with what a microbatch gets of it."""
    arrays, spec = pack(state)
    pairs = zip(state_shares(layer, state), arrays, strict=True)
    return spec.unpack([f(share, a) for share, a in pairs])


def with_overwritten(layer: Layer, state: PyTree, arrays: Sequence[Any]) -> PyTree:
    """A layer's state with other arrays where a backward makes them."""
    rest = iter(arrays)
    return map_state(
        layer, lambda share, a: next(rest) if share is Share.WHOLE else a, state
    )


def overwritten(layer: Layer, state: PyTree) -> list[Any]:
    """The arrays of a layer's state that a backward makes."""
    pairs = zip(state_shares(layer, state), pack(state)[0], strict=True)
    return [a for share, a in pairs if share is Share.WHOLE]


def check_overwritten(layers: Sequence[Layer], state: Sequence[PyTree] | None) -> None:
    """What a backward makes is there, and of a kind that it can make.

    Raises:
        ValueError: it is not.
    """
    for k, layer in enumerate(layers):
        if state is None or not layer.overwrite or isinstance(state[k], Microbatches):
            continue
        who = f"layer {k} {layer.name!r}"
        found = set[Any]()
        for path, a in jax.tree_util.tree_leaves_with_path(state[k]):
            if not (is_array(a) and _is_overwritten(layer, path)):
                continue
            found.add(_entry(path) if path else None)
            if not is_inexact(a):
                raise ValueError(
                    f"{who} declares `overwrite={_shown(layer)}`, but "
                    f"`state[{k}]{jax.tree_util.keystr(path)}` is {describe(a)}: a "
                    "backward makes only floats; name only the entries that it makes"
                )
        missing = sorted({*_names(layer)} - found)
        if missing:
            raise ValueError(
                f"{who} declares `overwrite={_shown(layer)}`, but its state has no "
                f"arrays under {missing}: it is {describe(state[k])}"
            )


def _shown(layer: Layer) -> str:
    """What a layer declares, for errors."""
    return repr(list(_names(layer)) or layer.overwrite)


def rows_of_state(array: Any, rows: Sequence[int], i: int) -> Any:
    """The rows of microbatch `i` of an array of a state, or its shape."""
    if not rows:  # everything goes whole to one microbatch
        return array
    if isinstance(array, jax.ShapeDtypeStruct):
        return array.update(shape=(rows[i], *array.shape[1:]))
    return jax.lax.slice_in_dim(array, sum(rows[:i]), sum(rows[: i + 1]))


def stacked_state(state: PyTree) -> PyTree:
    """State as it is; of pieces of state a stack for each array, as large as the
    largest piece on each axis, which begins where the piece does.
    """
    if not isinstance(state, Microbatches):
        return state
    packs = [pack(piece) for piece in state]
    stacks = []
    for column in zip(*(arrays for arrays, _ in packs), strict=True):
        most = tuple(map(max, zip(*(a.shape for a in column), strict=True)))
        stacks.append(jnp.stack([_padded(a, most) for a in column]))
    return packs[0][1].unpack(stacks)


def _padded(array: Any, shape: Sequence[int]) -> Any:
    """An array as the beginning of a larger one."""
    missing = [n - own for n, own in zip(shape, array.shape, strict=True)]
    return jnp.pad(array, [(0, n) for n in missing]) if any(missing) else array


def unstacked_state(state: PyTree, shapes: Sequence[Shape]) -> Microbatches:
    """The inverse of `stacked_state`.

    Arguments:
        shapes: of the pieces.
    """
    stacks = pack(state)[0]
    pieces = []
    for i, shape in enumerate(shapes):
        pairs = zip(stacks, shape.leaves, strict=True)
        arrays = [stack[i][tuple(map(slice, a.shape))] for stack, a in pairs]
        pieces.append(shape.spec.unpack(arrays))
    return Microbatches(pieces)


def check_pieces_of_state(
    layers: Sequence[Layer],
    state: Sequence[PyTree] | None,
    microbatches: int,
    ready: bool,
) -> None:
    """State comes in pieces where it may, and where it must.

    Arguments:
        state: one entry per layer, arrays or shapes.
        microbatches: of the call.
        ready: whether some of its inputs are ready-made microbatches.

    Raises:
        ValueError: it does not, or the pieces do not fit.
    """
    for k, layer in enumerate(layers):
        if state is None:
            continue
        own = state[k]
        what = f"state: layer {k} {layer.name!r}"
        if not isinstance(own, Microbatches):
            # How many rows of a whole state are whose, nothing says.
            if ready and layer.state_rows:
                raise ValueError(
                    f"{what} has state of rows (`state_rows=True`), and the call is "
                    "given ready-made microbatches: its state is an "
                    "`fpipe.Microbatches` too, as `pipe.init_state(x)` makes it for "
                    "such an `x`"
                )
            continue
        if not layer.state_rows or layer.overwrite:
            why = "all microbatches share its state"
            if layer.overwrite:
                why = f"a backward makes its state (`overwrite={_shown(layer)}`)"
            raise ValueError(
                f"{what} is given an `fpipe.Microbatches`, but {why}; only state of "
                "rows (`state_rows=True`) has a piece for each microbatch"
            )
        if len(own) != microbatches:
            raise ValueError(
                f"{what} has {counted(len(own), 'piece')} of state "
                "(`fpipe.Microbatches`), but the call has "
                f"{counted(microbatches, 'microbatch', 'es')}; give one for each"
            )
        first, structure = pack(own[0])
        dtypes = [a.dtype for a in first]
        for i, piece in enumerate(own):
            arrays, spec = pack(piece)
            if spec != structure or [a.dtype for a in arrays] != dtypes:
                raise ValueError(
                    f"{what}: the state of microbatch {i} is {describe(piece)}, but "
                    f"that of microbatch 0 is {describe(own[0])}: all need the same "
                    "structure, static leaves and dtypes"
                )


def check_state_rows(
    layers: Sequence[Layer],
    state: Sequence[PyTree] | None,
    rows: Sequence[int],
) -> None:
    """State of rows has as many as the batch.

    Arguments:
        state: one entry per layer, arrays or shapes.
        rows: of each microbatch; empty if they have none.

    Raises:
        ValueError: it has not.
    """
    if state is None or not rows:
        return
    for k, layer in enumerate(layers):
        if not layer.state_rows:
            continue
        own = state[k]
        if not isinstance(own, Microbatches):
            _check_rows(k, layer, own, sum(rows), f"state[{k}]", "the batch")
            continue
        for i, piece in enumerate(own):
            where = f"state[{k}][{i}]"
            _check_rows(k, layer, piece, rows[i], where, f"microbatch {i}")


def _check_rows(
    k: int, layer: Layer, state: PyTree, rows: int, where: str, whose: str
) -> None:
    """State of rows, or a piece of it, has as many rows as the batch, or the piece."""
    for path, a in jax.tree_util.tree_leaves_with_path(state):
        if not is_array(a) or _is_overwritten(layer, path):
            continue
        if a.shape and a.shape[0] == rows:
            continue
        what = counted(a.shape[0], "row") if a.shape else "no rows, it is 0-d"
        raise ValueError(
            f"state: layer {k} {layer.name!r} has state of rows "
            f"(`state_rows=True`), and `{where}{jax.tree_util.keystr(path)}` "
            f"has {what}, but {whose} has {rows}; give each array of it one "
            "entry for each row on its first axis, as `pipe.init_state(x)` does "
            "for an `x` of as many rows"
        )


def may_have_rows(state: PyTree, rows: Sequence[int]) -> bool:
    """Whether the first axis of a state's array may stand for rows.

    Arguments:
        rows: the numbers of rows that come into question.
    """
    return any(
        a.shape and any(a.shape[0] % n == 0 for n in rows) for a in pack(state)[0]
    )


def refuse_followed_rows(
    k: int, layer: Layer, few: PyTree, many: PyTree, rows: Sequence[int]
) -> None:
    """Refuse a state that has another first axis for another number of rows.

    Arguments:
        k: the layer's number.
        few, many: the shapes of its state for one microbatch, and for all together.
        rows: of each microbatch.
    """
    pairs = zip(pack(few)[0], pack(many)[0], strict=False)
    if all(a.shape[:1] == b.shape[:1] for a, b in pairs):
        return
    raise ValueError(
        f"layer {k} {layer.name!r}: its state follows the rows: it is {describe(few)} "
        f"for {counted(rows[0], 'row')} and {describe(many)} for {sum(rows)}, and all "
        f"{len(rows)} microbatches would share its entries; write "
        "`fpipe.Layer(..., state_rows=True)`, and each microbatch gets the entries of "
        "its own rows (or `state_rows=False`, if all should share all entries)"
    )
