"""State: which part of a layer's state a microbatch gets.

In: a layer and its state. Out: a `Share` for each array of it. The state of a layer
with four rows, cut into two microbatches:

    declared           share    microbatch 0   microbatch 1           after the call
    -----------------  -------  -------------  ---------------------  --------------
    nothing            OWN      all of it      what 0 left            what 1 left
    state_rows=True    ROWS     rows 0-1       rows 2-3               both, joined

Whether a state follows the rows although nobody has declared it shows in its shapes for
two numbers of rows (`refuse_followed_rows`).
"""

from collections.abc import Sequence
from typing import Any

import jax

from fpipe._core.pytrees import PyTree, describe, is_array, map_arrays, pack
from fpipe._model.layer import Layer
from fpipe._model.needs import Share


def state_shares(layer: Layer, state: PyTree) -> tuple[Share, ...]:
    """What a microbatch gets of each array of a layer's state."""
    share = Share.ROWS if layer.state_rows else Share.OWN
    return (share,) * len(pack(state)[0])


def state_piece(state: PyTree, rows: Sequence[int], i: int) -> PyTree:
    """The rows of microbatch `i` of a state of rows, arrays or shapes."""
    if not rows:  # everything goes whole to one microbatch
        return state
    start, stop = sum(rows[:i]), sum(rows[: i + 1])

    def piece(a: Any) -> Any:
        if isinstance(a, jax.ShapeDtypeStruct):
            return a.update(shape=(rows[i], *a.shape[1:]))
        return jax.lax.slice_in_dim(a, start, stop)

    return map_arrays(piece, state)


def check_state_rows(
    layers: Sequence[Layer],
    state: Sequence[PyTree] | None,
    rows: Sequence[int],
) -> None:
    """State of rows has as many as the batch.

    Arguments:
        state: one entry per layer, arrays or shapes.
        rows: of each microbatch.

    Raises:
        ValueError: it has not.
    """
    if state is None or not rows:
        return
    total = sum(rows)
    for k, layer in enumerate(layers):
        if not layer.state_rows:
            continue
        for path, a in jax.tree_util.tree_leaves_with_path(state[k]):
            if not is_array(a) or (a.shape and a.shape[0] == total):
                continue
            what = f"{a.shape[0]} rows" if a.shape else "no rows, it is 0-d"
            raise ValueError(
                f"state: layer {k} {layer.name!r} has state of rows "
                f"(`state_rows=True`), and `state[{k}]{jax.tree_util.keystr(path)}` "
                f"has {what}, but the batch has {total}; give each array of it one "
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
        f"for {rows[0]} rows and {describe(many)} for {sum(rows)}, and all "
        f"{len(rows)} microbatches would share its entries; write "
        "`fpipe.Layer(..., state_rows=True)`, and each microbatch gets those of its "
        "own rows (`state_rows=False`: they are meant to share them)"
    )
