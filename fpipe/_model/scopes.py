"""Names that JAX carries through a trace, by which an equation's layer is found again.

A trace and its derivative are one flat list of equations, and nothing in it says which
layer made which. `jax.named_scope` does: JAX keeps the names with the equations, also
with those that a derivative makes of them. An equation of layer 3, and one of its
backward, stand under

    fpipe_layer_3/sin
    transpose(jvp(fpipe_layer_3))/mul

In: the number of a layer, or the loss. Out: the name of its scope, and from the names
around an equation who it belongs to.
"""

import contextlib
import re
from typing import Any

import jax

# No scope of a user's is called so.
_LAYER, _LOSS = "fpipe_layer_", "fpipe_loss"
_SCOPE = re.compile(rf"\b(?:{_LAYER}(\d+)|{_LOSS})\b")

# In place of the number of a layer: the loss.
LOSS_SCOPE = -1


def scope_of(layer: int) -> contextlib.AbstractContextManager[Any]:
    """The scope that a layer, or the loss, is traced in."""
    return jax.named_scope(_LOSS if layer == LOSS_SCOPE else f"{_LAYER}{layer}")


def layer_in(names: str) -> int | None:
    """The layer, or `LOSS_SCOPE`, whose scope is among the names around an equation;
    `None`: it is in none.
    """
    # The innermost one: names around an equation in a loop's body begin with those
    # around the loop.
    found = list(_SCOPE.finditer(names))
    if not found:
        return None
    return LOSS_SCOPE if found[-1][1] is None else int(found[-1][1])
