"""optax for the parameters of a pipe, on the devices where they are.

In: an optax transformation, and trees of a pipe. Out: updates and states whose arrays
lie where their parameters lie:

    tx = fpipe.optim.per_stage(optax.adam(1e-3))
    moments = tx.init(params)
    loss, grads = step(params, x, target)
    updates, moments = tx.update(grads, moments, params)
    params = fpipe.optim.apply_updates(params, updates)

`import fpipe.optim` to use it. It needs optax.
"""

from fpipe.optim._loss_scale import DynamicLossScale as DynamicLossScale
from fpipe.optim._map import map as map  # noqa: A004
from fpipe.optim._portable_states import gather as gather
from fpipe.optim._portable_states import place as place
from fpipe.optim._transform import PerStage as PerStage
from fpipe.optim._transform import per_stage as per_stage
from fpipe.optim._tree_functions import apply_updates as apply_updates
from fpipe.optim._tree_functions import global_norm as global_norm
