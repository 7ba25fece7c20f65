"""How the parameters of a function are cut over the meshes of its stages.

In: what the user says, a tree of specs in the form of the parameters or of its upper
part, or what boxes around the parameters say. Out: a spec for each array, and of each
piece's arrays theirs. With two of four layers in each piece, and
`specs={"blocks": P(None, None, "model"), "out": P("model")}`,

    array             piece 0                     piece 1
    blocks [4,8,8]    [2,8,8] P(,, "model")       [2,8,8] P(,, "model")
    out    [8,3]                                  [8,3]   P("model")

the first axis of `blocks` has the layers, which pieces divide among them already: so no
axis of a mesh can cut it too.
"""

from collections.abc import Sequence
from typing import TypeAlias

import jax
from jax.sharding import PartitionSpec as P

from fpipe._core.errors import shown
from fpipe._core.pytrees import PyTree, describe, is_array, shapes_of
from fpipe._executors.parameter_cuts import cut_as_said
from fpipe._executors.placement import Placement
from fpipe._model.specs import annotated_specs, is_spec, spread_specs
from fpipe._split.stacks import Rows
from fpipe._split.trace import Function

Specs: TypeAlias = tuple[P | None, ...]
"""For each array of the parameters how it is cut; `None`: as it comes."""


def specs_of(given: PyTree, params: PyTree) -> Specs:
    """The specs of a function's arrays, the user's or those that they are annotated
    with; none at all: nothing says how they are cut.

    Arguments:
        given: the user's.
        params: the parameters, or their shapes.

    Raises:
        TypeError: something there is no spec.
        ValueError: it has another form than the parameters.
    """
    for part in jax.tree.leaves(given, is_leaf=is_spec):
        if not is_spec(part):
            raise TypeError(
                f"`fpipe.split(specs=...)`: {shown(part)} is no "
                "jax.sharding.PartitionSpec"
            )
    try:
        specs = spread_specs(given, params)
    except ValueError as error:
        raise ValueError(
            "`fpipe.split(specs=...)`: they have another form than the parameters, "
            f"{describe(shapes_of(params))}; write `None` for an array without a spec"
        ) from error
    mine = tuple(
        annotation if spec is None else spec
        for spec, annotation, leaf in zip(
            specs, annotated_specs(params), jax.tree.leaves(params), strict=True
        )
        if is_array(leaf)
    )
    return mine if any(spec is not None for spec in mine) else ()


def specs_of_blocks(specs: Specs, blocks: Sequence[Rows]) -> Specs | None:
    """The specs of what a piece owns, in the form of `Layer(spec=...)`."""
    if not specs:
        return None
    return tuple(specs[rows.leaf] for rows in blocks)


def check_blocks(
    specs: Specs, paths: Sequence[str], owned: Sequence[Sequence[Rows]]
) -> None:
    """No spec cuts an axis whose rows belong to several pieces.

    Arguments:
        paths: of the parameters.
        owned: what each piece has of them.

    Raises:
        ValueError: one does.
    """
    if not specs:
        return
    divided = {
        (rows.leaf, rows.axis) for blocks in owned for rows in blocks if not rows.whole
    }
    for leaf, axis in sorted(divided):
        spec = specs[leaf]
        if spec and spec[axis : axis + 1] not in ((), (None,)):
            raise ValueError(
                f"`fpipe.split(specs=...)`: the spec {spec} of {paths[leaf]!r} cuts "
                f"axis {axis}, on which layers are stacked, and these belong to "
                f"several stages: write {P(*spec[:axis], None, *spec[axis + 1 :])}"
            )


def check_places(
    specs: Specs,
    function: Function,
    owned: Sequence[Sequence[Rows]],
    homes: Sequence[Placement],
) -> None:
    """The specs fit the meshes of stages; on one device nobody looks at them.

    Arguments:
        owned: what each piece has of the parameters.
        homes: where each piece lives.

    Raises:
        ValueError: one names an axis that its mesh lacks, or does not divide its array.
    """
    if not specs:
        return
    for blocks, home in zip(owned, homes, strict=True):
        for rows in blocks if home.mesh is not None else ():
            spec = specs[rows.leaf]
            if spec is None:
                continue
            shape = rows.of(function.params.leaves[rows.leaf]).shape
            path = function.paths[rows.leaf]
            where = f"`fpipe.split(specs=...)`: the spec {spec} of {path!r}"
            cut_as_said(spec, shape, home, where)
