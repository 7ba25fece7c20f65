"""`fpipe.cut`: the author of a function marks where it is cut.

In: a value of the function. Out: the same value, and a mark in the trace:

    h = fpipe.cut(h, "decoder")     b:f32[2,4] = name[name=fpipe.cut:decoder] a

In the trace a mark is an equation of `jax.ad_checkpoint.checkpoint_name`, with a name
that begins with `PREFIX`. In every other use of the function a mark is the identity. A
`jax.checkpoint` policy that saves by names does not know these names.
"""

import dataclasses

import jax
from jax.ad_checkpoint import checkpoint_name

from fpipe._core.errors import shown
from fpipe._core.pytrees import PyTree, describe, is_array
from fpipe._program.graph import Node, given_name

PREFIX = "fpipe.cut:"

# The mark of the values that a loss function returns besides its loss.
_AUX = "fpipe.aux"


def cut(h: PyTree, name: str = "") -> PyTree:
    """Mark a place in a function where `fpipe.split` cuts it.

    Outside `fpipe.split` it does nothing. Values that the function has computed before
    this line belong to the piece before the cut, if they depend on the function's
    input.

    Arguments:
        h: a pytree with at least one array. The code after the mark should continue
            from it.
        name: the name of the piece after the cut, in tables and errors. Default: a name
            from its parameters.

    Returns:
        `h`.

    Raises:
        TypeError: `h` has no array, or `name` is no string.

    Example:
        >>> def mlp(params, x):
        ...     h = jnp.tanh(x @ params["encode"])
        ...     h = fpipe.cut(h)
        ...     return h @ params["decode"]
        >>> params = {"encode": jnp.ones((3, 4)), "decode": jnp.ones((4, 2))}
        >>> len(fpipe.split(mlp, params, jnp.ones((2, 3))).layers)
        2
    """
    if not isinstance(name, str):
        raise TypeError(f"`fpipe.cut(h, name={shown(name)})`: a name must be a string")
    leaves, structure = jax.tree.flatten(h)
    # One of several arrays is marked, and that is enough: a cut is a place in the order
    # of equations, and all of `h` is computed before it.
    for n, leaf in enumerate(leaves):
        if is_array(leaf) and leaf.dtype != jax.dtypes.float0:
            leaves[n] = checkpoint_name(leaf, PREFIX + name)
            return structure.unflatten(leaves)
    raise TypeError(f"`fpipe.cut(h)`: h is {describe(h)}, which has no array to mark")


def as_aux(tree: PyTree) -> PyTree:
    """Mark the arrays that a loss function returns beside its loss: each microbatch's
    reach the caller, and nothing takes their mean.
    """
    return jax.tree.map(
        lambda leaf: checkpoint_name(leaf, _AUX) if is_array(leaf) else leaf, tree
    )


def is_aux(node: Node | None) -> bool:
    """Whether an equation is that mark."""
    return node is not None and given_name(node) == _AUX


def mark_of(node: Node) -> str | None:
    """The name of the mark that an equation is; `None`: it is none."""
    name = given_name(node)
    if name is None or not name.startswith(PREFIX):
        return None
    return name.removeprefix(PREFIX)


@dataclasses.dataclass(frozen=True)
class Mark:
    """A mark in a graph.

    Attributes:
        place: the number of the first equation after it.
        name: as its author called it; `""`: not at all.
    """

    place: int
    name: str


def mark_inside(node: Node) -> Node | None:
    """A mark in a body of an equation, at any depth."""
    for body in node.bodies:
        for inner in body.nodes:
            found = inner if mark_of(inner) is not None else mark_inside(inner)
            if found is not None:
                return found
    return None
