"""`init` and `update` for the placed executor: leaves lie on several devices.

In: a transformation and trees with each leaf on one device. Out: a
`PlacedTransformation`, which is made once for trees of one form and called for all of
them. With Adam over two devices, the flat arrays of `update` and their owners are

    gradient 0, gradient 1, count, mu 0, mu 1, nu 0, nu 1, parameter 0, parameter 1
             0           1   all      0     1     0     1            0            1
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from fpipe._core.pytrees import PyTree, Spec, nbytes, pack
from fpipe._model.frozen import Frozen
from fpipe.optim._dispatch import Input, Output, PlacedFunction, Tree, divide
from fpipe.optim._leaf_devices import (
    FIX,
    check_gradients,
    device_of,
    first_device,
    lies_like,
    new_state_places,
    over_processes,
    parameter_devices,
    state_owners,
)
from fpipe.optim._partition import SMALL
from fpipe.optim._seen_leaves import SeenLeaves, check_state
from fpipe.optim._traced import trace_init, trace_update


@dataclasses.dataclass(frozen=True)
class PlacedTransformation:
    """`init` or `update` of a transformation, divided over devices.

    Attributes:
        run: from the leaves of the arguments to updates and the arrays of the state.
        seen: which leaves of the parameters the transformation sees.
        updates: how many updates `run` gives.
        state_spec: the structure of the state.
    """

    run: PlacedFunction
    seen: SeenLeaves
    updates: int
    state_spec: Spec

    def init(self, params: PyTree) -> PyTree:
        """The initial state."""
        parameters = self.seen.select(jax.tree.leaves(params))
        return self.state_spec.unpack(self.run(parameters))

    def update(
        self, grads: PyTree, state: list[Any], params: PyTree, extra: list[Any]
    ) -> tuple[PyTree, PyTree]:
        """Updates and the next state.

        Arguments:
            state, extra: the arrays of the trees that the plan was made for.
        """
        # Parameters show which leaves need no update, because they are frozen or
        # integers. Without them (`params=None` is allowed by optax) the gradients have
        # the same structure.
        leaves = jax.tree.leaves(grads if params is None else params)
        gradients = self.seen.select_gradients(grads)
        parameters = [] if params is None else self.seen.select(leaves)
        made = self.run([*gradients, *state, *parameters, *extra])
        updates = self.seen.whole_tree(made[: self.updates], leaves)
        return updates, self.state_spec.unpack(made[self.updates :])


def plan_init(tx: Any, params: PyTree, frozen: Frozen | None) -> PlacedTransformation:
    """The initial state: the parts that belong to a parameter on its device, the rest
    on the first device.
    """
    seen = SeenLeaves.of(params, frozen)
    leaves = jax.tree.leaves(params)
    parameters = seen.select(leaves)
    devices = parameter_devices("per_stage(tx).init", parameters, seen.seen_paths)
    # Nothing is donated, and no output is handed through: a state may begin as a copy
    # of the parameters (`optax.contrib.schedule_free`), and must outlive them.
    traced = trace_init(tx, seen, parameters)
    run = divide(
        traced.graph,
        traced.leaves,
        [Input(device) for device in devices],
        [
            Output(home, lies=lies)
            for home, lies in new_state_places(seen, traced.state, devices, parameters)
        ],
        first_device(devices),
    )
    return PlacedTransformation(run, seen, 0, pack(traced.state)[1])


def plan_update(
    tx: Any,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    extra: dict[str, Any],
    frozen: Frozen | None,
    donate: Sequence[str],
) -> PlacedTransformation:
    """Updates and the next state, each leaf on the device of its parameter."""
    like = grads if params is None else params
    leaves = jax.tree.leaves(like)
    seen = SeenLeaves.of(like, frozen)
    shown = seen.select(leaves)
    devices = parameter_devices("per_stage(tx).update", shown, seen.seen_paths)
    # All is checked before anything is traced: errors of a trace name operations, and
    # these name leaves.
    gradients = seen.select_gradients(grads)
    check_gradients(seen, gradients, devices)
    check_state(tx, seen.seen_tree(shown), state, FIX)
    parameters = None if params is None else shown
    owners = state_owners(seen, state, devices)
    traced = trace_update(tx, seen, gradients, state, parameters, extra)

    # In the order of `trace_update`. Parameters are never donated, and never handed
    # through: whoever gets an update may overwrite it.
    donate_grads = "grads" in donate
    donate_state = "state" in donate
    inputs = [Input(device, donate_grads, Tree.GRADIENTS) for device in devices]
    inputs += [Input(owner, donate_state, Tree.STATE) for owner in owners]
    if parameters is not None:
        inputs += [Input(device) for device in devices]
    # Extra arguments (a loss, a learning rate) are like the numbers of a state.
    for array in pack(extra)[0]:
        large = nbytes(array) > SMALL
        given = over_processes(devices) and not large
        inputs.append(Input(device_of(array) if large else None, is_given=given))
    outputs = [
        Output(home, Tree.GRADIENTS, lies_like(like.shape, home, like))
        for home, like in zip(devices, shown, strict=True)
    ]
    outputs += [
        Output(home, Tree.STATE, lies)
        for home, lies in new_state_places(seen, traced.state, devices, shown)
    ]
    run = divide(traced.graph, traced.leaves, inputs, outputs, first_device(devices))
    return PlacedTransformation(run, seen, traced.updates, pack(traced.state)[1])
