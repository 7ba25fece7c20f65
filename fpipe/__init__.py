"""fpipe: pipeline-parallel training for JAX as pure functions.

In: a loss function, or a list of layers. Out: the loss and its gradients, computed in
stages on several devices:

    step = fpipe.value_and_grad(loss_fn, devices=jax.devices(), chunks=8)
    params = step.place(params, batch)
    loss, grads = step(params, batch)

    pipe = fpipe.Pipe(layers, devices=jax.devices(), chunks=8)
    params = pipe.init(key, x)
    loss, grads = pipe.value_and_grad(loss_fn)(params, x, target)

`fpipe.schedules` comes with `import fpipe`. Import `fpipe.optim`, `fpipe.flax`,
`fpipe.distributed`, `fpipe.plot` and `fpipe.testing` by their own names.
"""

from fpipe import schedules as schedules
from fpipe._executors.recording import record as record
from fpipe._executors.scan.packing import Packed as Packed
from fpipe._executors.sequential import sequential as sequential
from fpipe._model.batch_norm import DeferredBatchNorm as DeferredBatchNorm
from fpipe._model.layer import Layer as Layer
from fpipe._model.layer import fn as fn
from fpipe._model.layer import skippable as skippable
from fpipe._model.skip_routes import verify_skippables as verify_skippables
from fpipe._model.skips import Namespace as Namespace
from fpipe._model.skips import peek as peek
from fpipe._model.skips import pop as pop
from fpipe._model.skips import stash as stash
from fpipe._model.wrappers import Chunk as Chunk
from fpipe._model.wrappers import Microbatches as Microbatches
from fpipe._model.wrappers import NoChunk as NoChunk
from fpipe._model.wrappers import PerRow as PerRow
from fpipe._pipe import Pipe as Pipe
from fpipe._planning.balance import balance as balance
from fpipe._planning.costs import LayerCosts as LayerCosts
from fpipe._planning.layer_costs import layer_costs as layer_costs
from fpipe._planning.prediction import Prediction as Prediction
from fpipe._planning.shards import shards_svg as shards_svg
from fpipe._split.mark import cut as cut
from fpipe._split.split import Split as Split
from fpipe._split.split import split as split
from fpipe._split.stacks import RowBlocks as RowBlocks
from fpipe._tune import tune as tune
from fpipe._tuning import Candidate as Candidate
from fpipe._tuning import Tuning as Tuning
from fpipe._value_and_grad import ValueAndGrad as ValueAndGrad
from fpipe._value_and_grad import value_and_grad as value_and_grad
