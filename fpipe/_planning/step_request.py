"""`StepRequest`: the training step whose costs are asked for, before they are known.

`pipe.plan(None, x, targets, loss_fn=...)` becomes a request with `args.params=None`;
its `resolved(model, chunks)` is the same call with the shapes of all parameters and
states. A pipe is planned, and `tune` tries many, before there are parameters: so
everything is shapes, and nothing is allocated.
"""

import dataclasses
from collections.abc import Sequence

import jax

from fpipe._core.pytrees import (
    map_arrays,
    numbers_as_arrays,
    shapes_of,
    strong,
)
from fpipe._executors.call import Args, as_argnums, check_argnums, check_params, checked
from fpipe._model.frozen import Frozen, FrozenLeaves
from fpipe._model.init import init_params, init_state
from fpipe._model.loss import Loss
from fpipe._model.microbatch import CallShapes
from fpipe._model.model import Model
from fpipe._planning.layer_traces import shape_of_made


@dataclasses.dataclass(frozen=True)
class StepRequest:
    """The step `value_and_grad(loss, argnums=..., frozen=...)(*args)`.

    Attributes:
        args: what the step is given, arrays or their shapes; parameters as for the
            plain composition. Parameters and states may be `None`: those that `init`
            and `init_state` make.
        argnums, frozen: as the user gave them.
    """

    args: Args
    loss: Loss
    argnums: int | Sequence[int] = 0
    frozen: Frozen | None = None

    def resolved(self, model: Model, chunks: int) -> tuple[Args, tuple[int, ...]]:
        """The step of a model: its arguments, with the shapes of all parameters and
        states, and the numbers of those that it differentiates.

        Raises:
            TypeError, ValueError: an argument is wrong, as for the call.
        """
        # In this order: states may depend on parameters, and what is frozen is told by
        # the paths of parameters.
        params, state = self.args.params, self.args.state
        shapes = CallShapes.of(self.args.x, self.args.needs, chunks)
        first = shapes.first
        key = jax.eval_shape(lambda: jax.random.key(0))
        if params is None:
            params = init_params(model, key, *first, shape_of_made)
        check_params(model, params, "`plan(params, x)`")
        # As `place` would have them: a Python number becomes an array, and a weak type
        # strong, so that the programs are those of the call.
        params = tuple(
            shapes_of(map_arrays(strong, numbers_as_arrays(p))) for p in params
        )
        if state is None and model.stateful:
            batches = shapes.whole, shapes.ready
            state = init_state(model, *first, params, key, shape_of_made, *batches)
        args = checked(model, self.args._replace(params=params, state=state))
        numbers = as_argnums(self.argnums)
        check_argnums(self.argnums, numbers, args)
        frozen = FrozenLeaves(self.frozen).of(params)
        return args._replace(frozen=frozen), numbers
